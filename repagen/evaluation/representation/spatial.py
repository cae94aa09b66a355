"""Spatial structure of tokens: how their likeness falls with distance on the grid (iREPA, 2512.10794)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from repagen.errors import UserError
from repagen.evaluation.representation.inputs import as_tokens, check_grid

_REFERENCE_SIDE = 16  # the published distances are cells of a 16 x 16 grid


@dataclass(frozen=True)
class SpatialStructure:
    """`local_distant_similarity`, `correlation_decay_slope` and `spatial_contrast_rms` of the same tokens."""

    lds: float
    cds: float
    rmsc: float


def spatial_structure(tokens: torch.Tensor, grid: tuple[int, int]) -> SpatialStructure:
    """Measure tokens (B, T, D) on a grid (h, w) in the three ways of iREPA, at the published distances.

    Raises:
        UserError: as the three functions.
    """
    return SpatialStructure(
        lds=local_distant_similarity(tokens, grid),
        cds=correlation_decay_slope(tokens, grid),
        rmsc=spatial_contrast_rms(tokens),
    )


def local_distant_similarity(tokens: torch.Tensor, grid: tuple[int, int], distant: int = 6) -> float:
    """LDS: mean cosine of neighbours less mean cosine of distant tokens of the same image; 0 without structure.

    Neighbours have Manhattan distance 1 on the grid, distant tokens at least `distant`.

    Args:
        tokens: (B, T, D) of any float dtype, row-major, without prefix tokens.
        grid: (h, w) with h * w = T.
        distant: least distance in cells of a 16 x 16 grid. On a grid whose smaller side s is below 16 it becomes
            max(2, round(distant * s / 16)), on larger grids it stays: 6 is 6 at 16, 3 at 8, 2 at 4.

    Raises:
        UserError: on a grid that does not fit the tokens or has no such pairs; on tokens that are not finite or zero.
    """
    cosines, distances = _mean_cosines(tokens, grid)
    far = distances >= _scaled(distant, grid)
    if not far.any():
        raise _too_small(grid, _scaled(distant, grid))
    return (cosines[distances == 1].mean() - cosines[far].mean()).item()


def correlation_decay_slope(tokens: torch.Tensor, grid: tuple[int, int], max_distance: int = 8) -> float:
    """CDS: minus the least-squares slope of the mean cosine against the Manhattan distance 1, 2, ... in cells.

    Positive where likeness falls with distance; per cell of the grid at hand, each distance with the same weight.

    Args:
        tokens: (B, T, D) of any float dtype, row-major, without prefix tokens.
        grid: (h, w) with h * w = T.
        max_distance: largest distance, scaled to small grids as in `local_distant_similarity`: 8 is 8 at 16, 4 at 8.

    Raises:
        UserError: on a grid that does not fit the tokens or has no such pairs; on tokens that are not finite or zero.
    """
    cosines, distances = _mean_cosines(tokens, grid)
    furthest = _scaled(max_distance, grid)
    if not (distances == furthest).any():
        raise _too_small(grid, furthest)
    steps = torch.arange(1, furthest + 1, dtype=torch.float64)
    means = torch.stack([cosines[distances == step].mean() for step in range(1, furthest + 1)])
    centred = steps - steps.mean()
    return -((centred * means).sum() / centred.square().sum()).item()


def spatial_contrast_rms(tokens: torch.Tensor) -> float:
    """RMSC: root mean square distance of an image's normalised tokens to their mean, averaged over images; in [0, 1].

    Args:
        tokens: (B, T, D) of any float dtype, T >= 2.

    Raises:
        UserError: on a single token per image; on tokens that are not finite or zero.
    """
    units = _unit_tokens(tokens)
    if units.shape[1] < 2:
        raise UserError("spatial contrast needs at least 2 tokens per image, got 1; give the tokens, not their mean")
    centred = units - units.mean(dim=1, keepdim=True)
    return centred.square().sum(dim=-1).mean(dim=1).sqrt().mean().item()


def _unit_tokens(tokens: torch.Tensor) -> torch.Tensor:
    checked = as_tokens(tokens)
    norms = checked.norm(dim=-1, keepdim=True)
    zero = (norms[..., 0] == 0).nonzero().tolist()
    if zero:
        raise UserError(f"token {zero[0][1]} of sample {zero[0][0]} is all zero and has no direction; drop or redo it")
    return checked / norms


def _mean_cosines(tokens: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for all pairs of tokens, the cosine averaged over images (T, T) and the Manhattan distance (T, T)."""
    units = _unit_tokens(tokens)
    check_grid(units.shape[1], grid)
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid))
    distances = (places[:, None] - places[None]).abs().sum(dim=-1)
    by_place = units.transpose(0, 1).flatten(1)
    return by_place @ by_place.T / len(units), distances


def _scaled(distance: int, grid: tuple[int, int]) -> int:
    if distance < 2:
        raise UserError(f"distance: must be at least 2 cells, got {distance}; neighbours have 1")
    return max(2, round(distance * min(*grid, _REFERENCE_SIDE) / _REFERENCE_SIDE))


def _too_small(grid: tuple[int, int], distance: int) -> UserError:
    return UserError(
        f"grid: {grid[0]} x {grid[1]} has no tokens {distance} cells apart (at most {sum(grid) - 2}); "
        "use a larger grid or a smaller distance"
    )
