"""Axial rotary positions: EVA-02's (Fang et al. 2023), as LightningDiT and RAE use them, and DDT's."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from repagen.errors import UserError
from repagen.layers.positions import MAX_CACHED_GRIDS, cached, grid_positions


def rotary_table(
    grid: tuple[int, int],
    head_dim: int,
    theta: float = 10000.0,
    *,
    extent: float | None = None,
    base_grid: tuple[int, int] | None = None,
    alternating: bool = False,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every token's rotation angles.

    The first half of a head's channels turns by the row, the second half by the column; neighbouring channels
    (2k, 2k+1) share the angle position * theta^(-2k / (head_dim / 2)).

    Args:
        grid: rows and columns of tokens.
        head_dim: channels of one head, a multiple of 4.
        theta: base of the geometric sequence of frequencies.
        extent: positions run evenly from 0 to it, both ends included, instead of counting 0, 1, 2 ...
        base_grid: positions are those of `grid_positions` on this grid.
        alternating: channel pairs turn by column, row, column, row ... instead of half and half.
        device: where to make them; None for PyTorch's default device.

    Returns:
        cos and sin, each (rows * columns, head_dim) float32, tokens row-major.

    Raises:
        UserError: head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise UserError(f"rotary positions need a head width that is a multiple of 4, got {head_dim}")
    half = head_dim // 2
    frequencies = theta ** (-torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    steps = (
        grid_positions(grid, base_grid or grid, torch.float32, device)
        if extent is None
        else [torch.linspace(0, extent, n, dtype=torch.float32, device=device) for n in grid]
    )
    rows, columns = (step[:, None] * frequencies for step in steps)
    rows, columns = rows[:, None, :].expand(-1, grid[1], -1), columns[None, :, :].expand(grid[0], -1, -1)
    pairs = torch.stack([columns, rows], -1).flatten(-2) if alternating else torch.cat([rows, columns], dim=-1)
    angles = pairs.flatten(0, 1).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs (2k, 2k+1) of x (B, L, heads, head_dim) by the angles of cos and sin (L, head_dim).

    Computed and returned in float32.
    """
    x = x.float()
    cos, sin = cos.float()[:, None, :], sin.float()[:, None, :]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cos + rotated * sin


class RotaryTable(nn.Module):
    """The table of `rotary_table` as buffers that are saved and loaded with the model, never recomputed.

    Other grids get tables of their own, which are kept for the next calls, but not saved.

    Args:
        grid: rows and columns of tokens.
        head_dim: channels of one head, a multiple of 4.
        num_unrotated: tokens that follow those of the grid and have no position (angle 0).
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, grid: tuple[int, int], head_dim: int, num_unrotated: int = 0) -> None:
        super().__init__()
        self.grid, self.head_dim, self.num_unrotated = grid, head_dim, num_unrotated
        cos, sin = rotary_table(grid, head_dim)
        self.register_buffer("cos", torch.cat([cos, torch.ones(num_unrotated, head_dim)]))
        self.register_buffer("sin", torch.cat([sin, torch.zeros(num_unrotated, head_dim)]))

    def forward(self, grid: tuple[int, int] | None = None, num_appended: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of cos and sin; asked for by a call, so that offloading hooks bring the tables along.

        Args:
            grid: rows and columns of tokens, where other than the table's.
            num_appended: tokens without a position that follow all others.
        """
        appended = self.num_unrotated + num_appended
        if grid is None or grid == self.grid:
            cos, sin, appended = self.cos.clone(), self.sin.clone(), num_appended
        else:
            cos, sin = cached(_other_table)(grid, self.grid, self.head_dim, self.cos.device)
        return F.pad(cos, (0, 0, 0, appended), value=1.0), F.pad(sin, (0, 0, 0, appended))


@lru_cache(MAX_CACHED_GRIDS)
def _other_table(
    grid: tuple[int, int], base_grid: tuple[int, int], head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):  # what is made in that mode could not be trained with later
        return rotary_table(grid, head_dim, base_grid=base_grid, device=device)
