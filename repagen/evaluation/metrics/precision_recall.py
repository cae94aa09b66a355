"""Improved precision and recall (1904.06991): how much of each set lies inside the other's neighbourhoods."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from repagen.evaluation.metrics.neighbourhoods import ball_radii, count_in_balls
from repagen.evaluation.metrics.pairs import neighbourhood_pair
from repagen.evaluation.moments import Features


@dataclass(frozen=True)
class PrecisionRecall:
    """Fractions in [0, 1]: precision = samples near some real image, recall = real images near some sample."""

    precision: float
    recall: float


def precision_recall(samples: Features, reference: Features, neighbours: int = 3) -> PrecisionRecall:
    """Compute Eq. 2 of 1904.06991 as torch-fidelity does, edges of balls included.

    Float32 features are computed with in float32, so that the figures agree with torch-fidelity's; float64 features in
    float64. Of its functions, which hold all pairs or rows of them, none is used: for 10,000 images they take 0.5 GB.

    Args:
        samples: features (N, D) of generated images.
        reference: features (M, D) of real images.
        neighbours: k; a point's ball reaches its k-th nearest other point of its own set (ADM: 3).

    Raises:
        UserError: when a set has no more than k points, k is below 1, features are not finite (the row is named), or
            the numbers of features differ.
    """
    generated, real = neighbourhood_pair(samples, reference, metric="precision and recall", neighbours=neighbours)
    return PrecisionRecall(_share_in_balls(generated, real, neighbours), _share_in_balls(real, generated, neighbours))


def _share_in_balls(points: torch.Tensor, centres: torch.Tensor, neighbours: int) -> float:
    radii = ball_radii(centres, neighbours, centres.dtype)
    balls_around, _ = count_in_balls(points, centres, radii, with_edge=True)
    return (balls_around > 0).float().mean().item()  # rounded as torch-fidelity rounds it
