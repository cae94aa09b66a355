"""Checks of two feature matrices that a metric compares."""

from __future__ import annotations

import torch

from repagen.errors import UserError, naming
from repagen.evaluation.moments import Features, as_rows


def feature_pair(
    samples: Features, reference: Features, *, metric: str, least: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (N, D) and (M, D) as tensors on the CPU: float64 where a side is, else float32.

    Nothing is copied where both are so already. Metrics that compute in float64 convert some rows at a time.

    Args:
        samples: features of generated images.
        reference: features of real images.
        metric: name of the metric, with its settings, for the message.
        least: smallest number of images it can do with on each side.

    Raises:
        UserError: on fewer images, different numbers of features, or features that are not finite (side and row are
            named).
    """
    with naming({"features": "samples: features"}):
        generated = as_rows(samples)
    with naming({"features": "reference: features"}):
        real = as_rows(reference)
    if min(len(generated), len(real)) < least:
        raise UserError(
            f"{metric} needs at least {least} images on each side, got {len(generated)} samples and {len(real)} "
            "reference images; give more images"
        )
    require_equal_dimensions(generated.shape[1], real.shape[1])
    precision = torch.float64 if torch.float64 in (generated.dtype, real.dtype) else torch.float32
    return generated.to(precision), real.to(precision)


def neighbourhood_pair(
    samples: Features, reference: Features, *, metric: str, neighbours: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `feature_pair` returns, for a metric whose balls reach the k-th nearest other point of a set.

    Raises:
        UserError: as `feature_pair`, and for k below 1 or a set of no more than k points.
    """
    if neighbours < 1:
        raise UserError(f"{metric} needs at least 1 neighbour, got {neighbours}; customary are 3 to 5")
    return feature_pair(samples, reference, metric=f"{metric} with k={neighbours}", least=neighbours + 1)


def require_equal_dimensions(samples: int, reference: int) -> None:
    """Refuse to compare features of different extractors.

    Raises:
        UserError: when the numbers of features differ.
    """
    if samples != reference:
        raise UserError(
            f"cannot compare {samples} features with {reference}; both sides must come from the same extractor"
        )
