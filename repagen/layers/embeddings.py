"""Embeddings of patches, positions, time and class, and the way back from tokens to a latent."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from repagen.errors import UserError
from repagen.layers.positions import MAX_CACHED_GRIDS, cached, grid_positions


def sincos_position_table(grid: tuple[int, int], dim: int, base_grid: tuple[int, int] | None = None) -> torch.Tensor:
    """Fixed sine-cosine positions of MAE and DiT.

    The first half of the channels encodes the column, the second the row, each as sines then cosines of
    position * 10000^(-k / (dim / 4)). (Rotary positions take row and column in the other order.)

    Args:
        grid: rows and columns of tokens.
        dim: width of a token, a multiple of 4.
        base_grid: positions are those of `grid_positions` on this grid; None: 0, 1, 2 ...

    Returns:
        (1, rows * columns, dim) float32, computed in float64, tokens row-major.

    Raises:
        UserError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise UserError(f"sine-cosine positions need a width that is a multiple of 4, got {dim}")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*grid_positions(grid, base_grid or grid), indexing="ij")
    angles = [positions.reshape(-1, 1) * frequencies for positions in (columns, rows)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]


@lru_cache(MAX_CACHED_GRIDS)
def other_sincos_table(
    grid: tuple[int, int], dim: int, base_grid: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """`sincos_position_table` of a grid other than the model's own, kept for the next calls; call through `cached`."""
    with torch.inference_mode(False):  # what is made in that mode could not be trained with later
        return sincos_position_table(grid, dim, base_grid).to(device)


def trained_sincos_table(table: torch.Tensor, grid: tuple[int, int], base_grid: tuple[int, int]) -> torch.Tensor:
    """A table for another grid, made of one that began as `sincos_position_table` and may have been trained since.

    The sines and cosines are those at `grid_positions`; what training added to the table is read off bilinearly at the
    same places, and beyond the edges as at the edges.

    Args:
        table: (1, rows * columns, dim) of the base grid.
        grid: rows and columns wanted.
        base_grid: rows and columns of the table.

    Returns:
        (1, grid[0] * grid[1], dim) float32; the table itself where the grids are equal.
    """
    if grid == base_grid:
        return table.float()
    fixed, own = (
        cached(other_sincos_table)(wanted, table.shape[-1], base_grid, table.device) for wanted in (grid, base_grid)
    )
    rows, columns = (
        (1 - (places.clamp(0, n - 1)[:, None] - torch.arange(n, device=table.device)).abs()).clamp(min=0)
        for places, n in zip(grid_positions(grid, base_grid, torch.float32, table.device), base_grid, strict=True)
    )  # weights (wanted, own) of a linear reading
    added = torch.einsum("ih,jw,hwd->ijd", rows, columns, (table.float() - own)[0].unflatten(0, base_grid))
    return fixed + added.flatten(0, 1)


class PatchEmbedding(nn.Module):
    """Square patches to tokens: (B, C, h, w) => (B, h/p * w/p, dim), row-major, in the weights' dtype."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Cut into patches and project."""
        return self.proj(latents.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Tokens to a latent: (B, h * w, p * p * C) => (B, C, h * p, w * p); the channel runs fastest within a token."""
    patches = tokens.unflatten(1, grid).unflatten(3, (patch_size, patch_size, -1))  # B h w p q C
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class _TimeEmbedding(nn.Module):
    """Features of the time through Linear, SiLU, Linear, in float32 even under autocast: (B,) => (B, dim) float32."""

    def __init__(self, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(feature_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def features(self, t: torch.Tensor) -> torch.Tensor:
        """Features (B, feature_dim) float32 of the times t (B,) float32."""
        raise NotImplementedError

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Embed the times t (B,), each in [0, 1]."""
        with _without_autocast(t.device):
            # The weights are float32 unless somebody cast the whole model.
            features = self.features(t.float()).to(self.linear_1.weight.dtype)
            return self.linear_2(F.silu(self.linear_1(features))).float()


class SinusoidalTimeEmbedding(_TimeEmbedding):
    """Time embedding of DiT and SiT: 128 cosines then 128 sines of t * max_period^(-k / 128).

    Args:
        dim: width of the embedding.
        num_frequencies: half the number of features.
        max_period: 10000 in DiT, SiT and LightningDiT; 10 in DDT.
    """

    def __init__(self, dim: int, num_frequencies: int = 128, max_period: float = 10000.0) -> None:
        super().__init__(2 * num_frequencies, dim)
        self.num_frequencies = num_frequencies
        self.max_period = max_period

    def features(self, t: torch.Tensor) -> torch.Tensor:
        """Features (B, 2 * num_frequencies) float32 of the times t (B,) float32."""
        k = torch.arange(self.num_frequencies, dtype=torch.float32, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(self.max_period) * k / self.num_frequencies)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class FourierTimeEmbedding(_TimeEmbedding):
    """Time embedding of RAE: sines then cosines of 2 pi W t with fixed random frequencies W ~ N(0, 1).

    W is a buffer, saved with the model: drawing it anew would destroy a trained model.
    """

    frequencies: torch.Tensor

    def __init__(self, dim: int, num_frequencies: int = 256) -> None:
        super().__init__(2 * num_frequencies, dim)
        self.register_buffer("frequencies", torch.randn(num_frequencies))

    def features(self, t: torch.Tensor) -> torch.Tensor:
        """Features (B, 2 * num_frequencies) float32 of the times t (B,) float32."""
        angles = t[:, None] * self.frequencies.float() * (2 * math.pi)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class LabelEmbedding(nn.Module):
    """Class embedding with an optional null row: (B,) int => (B, dim).

    The null label is `num_classes`. With 0 classes every sample takes the null row, whatever its label.
    """

    def __init__(self, num_classes: int, dim: int, null_row: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + null_row, dim)

    def forward(self, class_labels: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Embed the labels (B,); `like` (B, ...) gives batch size and device where there are no classes.

        Raises:
            UserError: labels missing, not integers, of another batch size, or (seen on the CPU only, because on an
                accelerator the look would cost a synchronisation) outside the table.
        """
        if self.num_classes == 0:
            return self.table(torch.zeros(like.shape[0], dtype=torch.long, device=like.device))
        self._check(class_labels, like.shape[0])
        return self.table(class_labels)

    @torch.no_grad()
    def choose(self, kept: Sequence[int], new_rows: torch.Tensor) -> None:
        """Let the table hold the rows of the classes `kept`, in that order, then new rows (R, dim); the null row last.

        Raises:
            UserError: a kept class that is none or named twice, or rows of another width.
        """
        table = self.table.weight
        wrong = [label for label in kept if not 0 <= label < self.num_classes]
        if wrong or len(set(kept)) < len(kept):
            raise UserError(f"classes to keep: ids from 0 to {self.num_classes - 1}, each once; got {list(kept)[:10]}")
        if new_rows.ndim != 2 or new_rows.shape[1] != table.shape[1]:
            raise UserError(f"rows of new classes: shape (classes, {table.shape[1]}), got {tuple(new_rows.shape)}")
        rows = torch.cat([table[list(kept)], new_rows.to(table), table[self.num_classes :]])
        self.table.weight = nn.Parameter(rows, requires_grad=table.requires_grad)
        self.num_classes, self.table.num_embeddings = len(kept) + len(new_rows), len(rows)

    def _check(self, class_labels: torch.Tensor | None, batch_size: int) -> None:
        rows = self.table.num_embeddings
        allowed = f"0..{self.num_classes - 1}" + (f", or {self.num_classes} for no class" * (rows > self.num_classes))
        if class_labels is None:
            raise UserError(f"class_labels: missing; this model is conditional, give one of {allowed} per sample")
        if class_labels.shape != (batch_size,) or class_labels.is_floating_point():
            raise UserError(
                f"class_labels: expected {batch_size} integers, shape ({batch_size},), one per sample; "
                f"got shape {tuple(class_labels.shape)} of {class_labels.dtype}"
            )
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = class_labels[(class_labels < 0) | (class_labels >= rows)]
            if wrong.numel():
                raise UserError(f"class_labels: {int(wrong[0])} is no class of this model; allowed are {allowed}")
