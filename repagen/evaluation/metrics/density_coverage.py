"""Density and coverage (2002.09797): precision and recall that outliers among the real images do not inflate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from repagen.evaluation.metrics.neighbourhoods import ball_radii, count_in_balls
from repagen.evaluation.metrics.pairs import neighbourhood_pair
from repagen.evaluation.moments import Features


@dataclass(frozen=True)
class DensityCoverage:
    """Density = real balls around a sample, in units of k, above 0 and perhaps above 1; coverage in [0, 1]."""

    density: float
    coverage: float


def density_coverage(samples: Features, reference: Features, neighbours: int = 5) -> DensityCoverage:
    """Compute both (2002.09797, Sec. 3) with Euclidean distances in float64; balls are without their edge.

    A real image's ball reaches its k-th nearest other real image. Density is the mean over samples of the number of
    balls that hold the sample, divided by k; coverage is the fraction of balls that hold at least one sample.

    Args:
        samples: features (N, D) of generated images.
        reference: features (M, D) of real images.
        neighbours: k (the paper and dgm-eval: 5).

    Raises:
        UserError: when a set has no more than k points, k is below 1, features are not finite (the row is named), or
            the numbers of features differ.
    """
    generated, real = neighbourhood_pair(samples, reference, metric="density and coverage", neighbours=neighbours)
    radii = ball_radii(real, neighbours, torch.float64)
    _, samples_in_ball = count_in_balls(generated, real, radii, with_edge=False)
    return DensityCoverage(
        density=samples_in_ball.sum().item() / (neighbours * len(generated)),
        coverage=(samples_in_ball > 0).double().mean().item(),
    )
