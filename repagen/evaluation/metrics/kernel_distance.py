"""Squared maximum mean discrepancies between two sets of features: KID (1801.01401) and CMMD (2401.09603)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from repagen.errors import UserError
from repagen.evaluation.metrics.pairs import feature_pair
from repagen.evaluation.moments import ROWS, Features

_CLIP_BANDWIDTH = 10.0
_CLIP_SCALE = 1000.0


@dataclass(frozen=True)
class KernelDistance:
    """Mean and (population) standard deviation over subsets; the estimate is unbiased and may be below zero."""

    mean: float
    std: float


def kernel_inception_distance(
    samples: Features, reference: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """Compute the KID with torch-fidelity: kernel (x.y / D + 1)^3, subsets drawn without replacement.

    Float32 features are computed with in float32, as torch-fidelity does, so that the figures agree; float64 features
    in float64.

    Args:
        samples: features (N, D) of generated images.
        reference: features (M, D) of real images.
        subsets: number of subsets.
        subset_size: images of each side in a subset.
        seed: of torch-fidelity's draws; its default makes figures comparable.

    Raises:
        UserError: when a side has fewer images than a subset, no subset or a subset of fewer than 2 images is asked
            for, features are not finite (the row is named), or the numbers of features differ.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    if subsets < 1 or subset_size < 2:
        raise UserError(
            f"KID needs at least 1 subset of at least 2 images, got {subsets} of {subset_size}; customary are 100 of "
            "1000"
        )
    metric = f"KID with subset_size={subset_size} (a smaller one gives figures of its own)"
    generated, real = feature_pair(samples, reference, metric=metric, least=subset_size)
    figures = kid_features_to_metric(
        generated,
        real,
        kid_subsets=subsets,
        kid_subset_size=subset_size,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
        rng_seed=seed,
        verbose=False,
    )
    return KernelDistance(figures[KEY_METRIC_KID_MEAN], figures[KEY_METRIC_KID_STD])


def clip_mmd(samples: Features, reference: Features) -> float:
    """Return CMMD: 1000 times the biased squared MMD of L2-normalised rows, in float64.

    The kernel is exp(-|x - y|^2 / (2 * 10^2)), as in 2401.09603.

    Args:
        samples: CLIP's image embeddings (N, D) of generated images.
        reference: the same (M, D) of real images.

    Raises:
        UserError: when a side has no image, a row is not finite or zero (it is named), or the numbers of features
            differ.
    """
    generated, real = feature_pair(samples, reference, metric="CMMD", least=1)
    for side in (generated, real):
        _refuse_zero_rows(side)
    squared = _mean_kernel(generated, generated) + _mean_kernel(real, real) - 2 * _mean_kernel(generated, real)
    return max(_CLIP_SCALE * squared, 0.0)  # below zero by rounding only: the exact value is a squared norm


def _refuse_zero_rows(matrix: torch.Tensor) -> None:
    zero = (~matrix.any(dim=1)).nonzero().flatten().tolist()
    if zero:
        raise UserError(f"the embedding of sample {zero[0]} is zero and has no direction; drop or redo it")


def _unit_rows(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """Blocks of rows of length 1, float64."""
    return (torch.nn.functional.normalize(rows.double(), dim=1, eps=0) for rows in matrix.split(ROWS))


def _mean_kernel(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean of k(x, y) - 1 over all pairs of unit rows: k is near 1 throughout, and the ones cancel in the distance."""
    total = math.fsum(
        (rows @ others.T).sub_(1).div_(_CLIP_BANDWIDTH**2).expm1_().sum().item()
        for rows in _unit_rows(a)
        for others in _unit_rows(b)
    )
    return total / (len(a) * len(b))
