"""Encoders on grids that are not square: the holder's own interpolation, order of tokens, refusals by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import TINY, make_tiny

from repagen.encoders import VisionEncoder
from repagen.errors import UserError

SQUARE_ALONE = ["aimv2", "vjepa2", *(name for name in TINY if name.startswith("timm"))]
ANY_GRID = sorted(set(TINY) - set(SQUARE_ALONE))
GRIDS = [(4, 6), (6, 4), (3, 5), (2, 8)]  # the last has as many tokens as the square of 4


def noise(encoder: VisionEncoder, grid: tuple[int, int], count: int = 1) -> torch.Tensor:
    size = [n * encoder.patch_size for n in grid]
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(3))


def holders_tokens(encoder: VisionEncoder, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Last hidden state of the transformers model, called directly."""
    model: Any = encoder.backbone.model
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.image_mean, encoder.image_std))
    takes = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
    if encoder.family == "vit_mae":
        extra["noise"] = torch.arange(grid[0] * grid[1]).float().expand(len(images), -1)
    with torch.no_grad():
        return model((images - mean) / std, **extra).last_hidden_state


@pytest.mark.parametrize("name", ANY_GRID)
def test_tokens_of_any_grid_are_the_holders(name: str) -> None:
    encoder = make_tiny(name)
    for grid in GRIDS:
        images = noise(encoder, grid, 2)
        output = encoder(images, grid=grid)
        expected = holders_tokens(encoder, images, grid)[:, TINY[name][2] :]
        assert output.grid == grid and output.tokens.shape == (2, grid[0] * grid[1], encoder.hidden_size)
        torch.testing.assert_close(output.tokens, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ANY_GRID)
def test_tokens_lie_row_major(name: str) -> None:
    encoder, patch = make_tiny(name), make_tiny(name).patch_size
    images = noise(encoder, (3, 5))
    changed = images.clone()
    changed[:, :, patch : 2 * patch, 3 * patch : 4 * patch] = torch.rand(3, patch, patch)
    difference = encoder(changed, grid=(3, 5)).tokens - encoder(images, grid=(3, 5)).tokens
    assert difference.norm(dim=-1).argmax() == 1 * 5 + 3


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_own_square_is_the_same_bit_for_bit(name: str) -> None:
    encoder = make_tiny(name)
    images = torch.rand(2, 3, 50, 50)
    assert torch.equal(encoder(images, grid=(4, 4)).tokens, encoder(images).tokens)


@pytest.mark.parametrize("name", SQUARE_ALONE)
def test_families_that_cannot_are_refused_by_name(name: str) -> None:
    encoder = make_tiny(name)
    for grid in ((4, 6), (6, 6)):
        with pytest.raises(UserError, match=f"{grid[0]}x{grid[1]} tokens, but this {encoder.family} has .* 4x4"):
            encoder(noise(encoder, grid), grid=grid)
    with pytest.raises(UserError, match=r"data\.buckets: images of 4x6 tokens"):
        encoder.grid_of((64, 96), 64, "data.buckets")


def test_images_are_resized_without_squashing() -> None:
    encoder = make_tiny("dinov2")
    images = torch.rand(1, 3, 32, 48)
    resized = F.interpolate(images, size=(64, 96), mode="bicubic", align_corners=False)
    assert torch.equal(encoder(images, grid=(4, 6)).tokens, encoder(resized, grid=(4, 6)).tokens)
    with pytest.raises(UserError, match=r"images: 32x48 px are not of the proportions of the grid 4x5"):
        encoder(images, grid=(4, 5))


def test_attention_maps_of_any_grid() -> None:
    encoder = make_tiny("dinov2_with_registers")
    (maps,) = encoder(noise(encoder, (3, 5)), attention_layers=[-1], grid=(3, 5)).attention
    assert maps.shape == (1, 2, 15, 15)
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, 2, 15))


def test_tokens_are_of_as_many_pixels_in_every_size() -> None:
    encoder = make_tiny("dinov2")
    assert encoder.grid_of((256, 256), 256) == (4, 4)
    assert encoder.grid_of((192, 320), 256) == (3, 5)
    with pytest.raises(UserError, match=r"data\.buckets: 192x300 px; allowed: multiples of the encoder's 64 px"):
        encoder.grid_of((192, 300), 256, "data.buckets")
