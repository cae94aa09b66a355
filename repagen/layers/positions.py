"""Positions of the tokens of grids other than that a model was made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MAX_CACHED_GRIDS = 64
"""Tables of positions that are kept, each for a grid, width and device."""


def grid_positions(
    grid: tuple[int, int],
    base_grid: tuple[int, int],
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of rows and columns in the coordinates of a base grid, which counts 0, 1, 2 ... in both directions.

    The grid lies over the base grid with the same centre and, up to one scale for both directions, the same area, as
    in Stable Diffusion 3 (Esser et al. 2024, section 5.3.2): p_i = (i - (n - 1) / 2) s + (n_base - 1) / 2 with
    s = sqrt(base tokens / tokens). So a token is as far from the next one in a row as in a column, and in a bucket of
    as many tokens as the base grid (s = 1) as far as it was in training; a rule per axis would squeeze pictures of
    another aspect ratio. For a multiple of the base grid it is (i + 1/2) n_base / n - 1/2.

    Args:
        grid: rows and columns of tokens.
        base_grid: rows and columns that the model was made for.
        dtype: of the positions.
        device: where to make them; None for PyTorch's default device.

    Returns:
        Positions of the rows (grid[0],) and of the columns (grid[1],).
    """
    scale = ((base_grid[0] * base_grid[1]) / (grid[0] * grid[1])) ** 0.5

    def positions(n: int, base: int) -> torch.Tensor:
        counted = torch.arange(n, dtype=dtype, device=device)
        return counted if grid == base_grid else (counted - (n - 1) / 2) * scale + (base - 1) / 2

    return positions(grid[0], base_grid[0]), positions(grid[1], base_grid[1])


def cached(function: Any) -> Callable[..., Any]:
    """A function of `lru_cache`, or while `torch.compile` traces the bare function, which it can look into."""
    return function.__wrapped__ if torch.compiler.is_compiling() else function
