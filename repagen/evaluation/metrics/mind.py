"""Monge Inception Distance (2605.06797): a sliced Wasserstein distance that needs fewer images than an FID."""

from __future__ import annotations

import torch

from repagen.errors import UserError
from repagen.evaluation.metrics.pairs import feature_pair
from repagen.evaluation.moments import ROWS, Features
from repagen.randomness import generator_for

DIRECTIONS = 64  # projected on at once


def monge_inception_distance(
    samples: Features, reference: Features, *, directions: int = 1000, seed: int = 0
) -> float:
    """Return 3 D times the mean over unit directions of the squared 1-D Wasserstein distance, in float64.

    Along a direction it is the mean of (x_j - y_j)^2 over sorted projections x and y. A mean shift m alone gives
    3 |m|^2.

    Args:
        samples: features (N, D) of generated images.
        reference: features (M, D) of real images. The larger set is brought to the size of the other by a random
            subset.
        directions: number of random directions; the relative error they leave is about sqrt(2 / directions).
        seed: of directions and subset.

    Raises:
        UserError: when a side has fewer than 2 images, no direction is asked for, features are not finite (the row is
            named), or the numbers of features differ.
    """
    if directions < 1:
        raise UserError(f"MIND needs at least 1 direction, got {directions}; customary are 1000")
    generated, real = feature_pair(samples, reference, metric="MIND", least=2)
    count, dimension = min(len(generated), len(real)), generated.shape[1]
    chosen = [_subset(len(side), count, seed) for side in (generated, real)]
    generator = generator_for(seed, "mind directions")
    unit = torch.nn.functional.normalize(
        torch.randn(directions, dimension, generator=generator, dtype=torch.float64), dim=1
    )
    squared = [
        (_sorted_projections(generated, chosen[0], chunk) - _sorted_projections(real, chosen[1], chunk))
        .square()
        .mean(dim=1)
        for chunk in unit.split(DIRECTIONS)
    ]
    return 3 * dimension * torch.cat(squared).mean().item()


def _subset(available: int, count: int, seed: int) -> torch.Tensor:
    if available == count:
        return torch.arange(count)
    return torch.randperm(available, generator=generator_for(seed, "mind subset"))[:count]


def _sorted_projections(features: torch.Tensor, chosen: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Projections (directions, chosen) in float64, ascending along each direction."""
    blocks = [directions @ features[indices].double().T for indices in chosen.split(ROWS)]
    return torch.cat(blocks, dim=1).sort(dim=1).values
