"""Improved precision and recall (1904.06991): how much of each set lies inside the other's neighbourhoods."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from repagen.errors import UserError
from repagen.evaluation.moments import Features, as_matrix

_ROWS = 2048  # rows of a distance matrix in memory at once


@dataclass(frozen=True)
class PrecisionRecall:
    """Fractions in [0, 1]: precision = samples near some real image, recall = real images near some sample."""

    precision: float
    recall: float


def precision_recall(samples: Features, reference: Features, neighbours: int = 3) -> PrecisionRecall:
    """Compute Eq. 2 of 1904.06991 with Euclidean distances in float64.

    Args:
        samples: features (N, D) of generated images.
        reference: features (M, D) of real images.
        neighbours: k; a point's ball reaches its k-th nearest other point of its own set (ADM: 3).

    Raises:
        UserError: when a set has no more than k points, or the numbers of features differ.
    """
    generated, real = as_matrix(samples), as_matrix(reference)
    if min(len(generated), len(real)) <= neighbours:
        raise UserError(
            f"precision and recall with k={neighbours} need more than {neighbours} images on each side, "
            f"got {len(generated)} and {len(real)}"
        )
    if generated.shape[1] != real.shape[1]:
        raise UserError(
            f"cannot compare {generated.shape[1]} features with {real.shape[1]}; use the same extractor for both"
        )
    return PrecisionRecall(_covered(generated, real, neighbours), _covered(real, generated, neighbours))


def _covered(points: torch.Tensor, centres: torch.Tensor, neighbours: int) -> float:
    """Fraction of points (N, D) that lie in the ball of at least one centre (M, D)."""
    # The nearest point of the own set is the point itself: hence k + 1.
    radii = torch.cat([torch.cdist(rows, centres).kthvalue(neighbours + 1).values for rows in centres.split(_ROWS)])
    hits = [(torch.cdist(rows, centres) <= radii).any(dim=1) for rows in points.split(_ROWS)]
    return torch.cat(hits).double().mean().item()
