"""Autoencoders on images that are not square: statistics, positions, sizes; and squares as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from autoencoder_cases import TINY_DECODER, tiny_autoencoder, tiny_config, tiny_svg
from diffusers import AutoencoderRAE

from repagen import PixelAutoencoder, RepresentationAutoencoder
from repagen.encoders.images import IMAGENET_MEAN, IMAGENET_STD
from repagen.errors import UserError
from repagen.layers.embeddings import sincos_position_table
from repagen.models.autoencoder_base import LatentStandardisation
from repagen.models.latents import decoded_size, images_to_latents, latent_shape, latents_to_images, require_sizes

GRIDS = {"1:1": (4, 4), "3:2": (4, 6), "2:3": (6, 4), "16:9": (9, 16)}


def images(grid: tuple[int, int], patch: int = 4) -> torch.Tensor:
    return torch.rand(2, 3, grid[0] * patch, grid[1] * patch, generator=torch.Generator().manual_seed(7))


def stretched(values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(C, h, w) read linearly along each axis, corners on corners, by NumPy."""
    found = values.numpy()
    for axis, count in enumerate(grid, 1):
        places = np.linspace(0, found.shape[axis] - 1, count)
        found = np.apply_along_axis(lambda row, at=places: np.interp(at, np.arange(len(row)), row), axis, found)
    return torch.from_numpy(found).float()


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_latents_are_the_tokens_of_the_encoder_called_directly(grid: tuple[int, int]) -> None:
    """Patches of 8 px of images enlarged twofold, without the norm's affine part, by stretched statistics."""
    model, pixels = tiny_autoencoder(), images(grid)
    network: Any = model.encoder.backbone.model
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    large = F.interpolate(pixels, scale_factor=2, mode="bicubic", align_corners=False)
    states = network((large - mean) / std, output_hidden_states=True).hidden_states[-1]
    tokens = F.layer_norm(states[:, 5:], (32,), eps=1e-6).transpose(1, 2).unflatten(2, grid)
    expected = (tokens - stretched(model.latents_mean, grid)) / stretched(model.latents_std, grid)
    torch.testing.assert_close(model.encode(pixels).latent, expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_squares_are_as_before_bit_for_bit() -> None:
    model, pixels = tiny_autoencoder(), images((4, 4))
    for given in (pixels, torch.rand(2, 3, 50, 50)):  # other squares are brought to the same grid
        tokens = model.encoder(given).tokens.float().transpose(1, 2).unflatten(2, (4, 4))
        expected = (tokens - model.latents_mean) / model.latents_std
        assert torch.equal(model.encode(given).latent, expected)
    latents = model.encode(pixels).latent
    raw = (latents * model.latents_std + model.latents_mean).flatten(2).transpose(1, 2)
    patches = model.decoder(raw).unflatten(1, (4, 4)).unflatten(3, (4, 4, 3))
    image = patches.permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 16, 16)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.equal(model.decode(latents).sample, image * std + mean)


@pytest.mark.parametrize("grid", [(3, 5), (8, 8), (1, 7)])
def test_statistics_keep_constants_ramps_and_corners(grid: tuple[int, int]) -> None:
    statistics = LatentStandardisation((2, 4, 6))
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 4), torch.linspace(0, 1, 6), indexing="ij")
    statistics.mean[0], statistics.mean[1] = 0.7, 2 + 3 * rows - 5 * columns
    statistics.std[0], statistics.std[1] = 2.0, 1 + rows
    zeros = torch.zeros(1, 2, *grid)
    there = [torch.linspace(0, 1, n) for n in grid]
    ramp = 2 + 3 * there[0][:, None] - 5 * there[1]
    mean = statistics(zeros, undo=True)[0]
    torch.testing.assert_close(mean, torch.stack([torch.full(grid, 0.7), ramp]))
    torch.testing.assert_close((statistics(zeros + 1, undo=True)[0] - mean)[1], (1 + there[0])[:, None].expand(grid))
    given = torch.randn(1, 2, *grid)
    torch.testing.assert_close(statistics(statistics(given), undo=True), given)


def test_statistics_per_channel_are_broadcast() -> None:
    statistics = LatentStandardisation((2, 1, 1))
    statistics.mean[1], statistics.std[1] = 3.0, 2.0
    assert torch.equal(statistics(torch.ones(1, 2, 3, 5))[0, :, 0, 0], torch.tensor([1.0, -1.0]))
    assert statistics(torch.ones(1, 2, 3, 5)).shape == (1, 2, 3, 5)


def decoded_by_hand(model: RepresentationAutoencoder, raw: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The decoder's own modules, one after the other, with given positions (1, N, dim)."""
    decoder: Any = model.decoder
    embedded = decoder.decoder_embed(raw.flatten(2).transpose(1, 2)) + positions
    states = torch.cat([decoder.trainable_cls_token.expand(len(raw), -1, -1), embedded], dim=1)
    for block in decoder.decoder_layers:
        states = block(states, torch.float32)
    return decoder.decoder_pred(decoder.decoder_norm(states))[:, 1:]


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (9, 16), (8, 8), (2, 8)])
def test_the_decoder_takes_the_generators_positions(grid: tuple[int, int]) -> None:
    """Sines and cosines on the base grid; what training added to the table is read off linearly, and clamped."""
    model = tiny_autoencoder(image_mean=[0.0] * 3, image_std=[1.0] * 3)
    model.set_statistics(None)
    model.latents_std.fill_(1.0)
    raw = torch.randn(2, 32, *grid)
    positions = sincos_position_table(grid, 32, (4, 4))
    direction = torch.randn(32)
    for slope in (0.0, 0.5):
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        own = sincos_position_table((4, 4), 32) + slope * (rows - 2 * columns).reshape(1, 16, 1) * direction
        model.decoder.decoder_pos_embed[:, 1:] = own
        scale = (16 / (grid[0] * grid[1])) ** 0.5
        there = [((torch.arange(n) - (n - 1) / 2) * scale + 1.5).clamp(0, 3) for n in grid]
        added = slope * (there[0][:, None] - 2 * there[1]).reshape(1, -1, 1) * direction
        patches = decoded_by_hand(model, raw, positions + added)
        image = model.decode(raw).sample
        for row, column in ((0, 0), (1, 2), (grid[0] - 1, grid[1] - 1)):
            expected = patches[:, row * grid[1] + column].view(2, 4, 4, 3).permute(0, 3, 1, 2)
            found = image[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_autoencoder, tiny_svg, lambda: PixelAutoencoder(image_size=16)])
def test_sizes_of_round_trips(make: Any) -> None:
    model = make()
    for grid in GRIDS.values():
        pixels = images(grid)
        size = (pixels.shape[-2], pixels.shape[-1])
        latents = images_to_latents(model, pixels)
        assert latents.shape[1:] == latent_shape(model, size)
        assert decoded_size(model, latents.shape[1:]) == size
        assert latents_to_images(model, latents).shape == pixels.shape == model(pixels).sample.shape
        alone = torch.cat([images_to_latents(model, image[None]) for image in pixels])
        torch.testing.assert_close(latents, alone, atol=1e-5, rtol=1e-5)
    require_sizes(model, [(16, 16), (24, 16), (32, 32)], "data.buckets")


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_autoencoder, tiny_svg])
def test_squares_of_another_side_by_name(make: Any) -> None:
    """`encode` brings squares to the own grid; the grid can be named, and by the one pair of functions it is."""
    model, pixels = make(), images((8, 8))
    assert model.encode(pixels).latent.shape[2:] == (4, 4)
    finer = model.encode(pixels, grid=(8, 8)).latent
    assert finer.shape[2:] == (8, 8) and torch.equal(images_to_latents(model, pixels), finer)
    with pytest.raises(UserError, match="32 px, but the autoencoder is for images of 16 px"):
        latent_shape(model, 32)


def test_what_is_not_encoded_is_refused_by_name() -> None:
    for model in (tiny_autoencoder(), tiny_svg()):
        with pytest.raises(UserError, match=r"data\.buckets: 16x18 px; allowed: multiples of the autoencoder's 4 px"):
            require_sizes(model, [(16, 24), (16, 18)], "data.buckets")
        with pytest.raises(UserError, match="images: 16x18 px; allowed"):
            model.encode(torch.rand(1, 3, 16, 18))
        with pytest.raises(UserError, match="16x24 px are not of the proportions of the grid 4x5"):
            model.encode(torch.rand(1, 3, 16, 24), grid=(4, 5))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    fixed = {"family": "aimv2", "config": {**sizes, "patch_size": 8, "image_size": 32}, "norm_affine": False}
    model = RepresentationAutoencoder(**tiny_config(encoder=fixed)).eval()
    with pytest.raises(UserError, match=r"data\.buckets: images of 4x6 tokens, but this aimv2"):
        require_sizes(model, [(16, 16), (16, 24)], "data.buckets")
    assert model._encoder is None  # known without it
    with pytest.raises(UserError, match="this aimv2"):
        model.encode(torch.rand(1, 3, 16, 24))
    assert model.decode(torch.zeros(1, 32, 4, 6)).sample.shape == (1, 3, 16, 24)
    theirs = AutoencoderRAE(
        encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_patch_size=14, encoder_input_size=56,
        patch_size=4, **TINY_DECODER,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"data\.buckets: 16x24 px, but AutoencoderRAE encodes 16x16 px alone"):
        require_sizes(theirs, [(16, 24)], "data.buckets")


@torch.no_grad()
def test_svgs_residual_is_a_function_of_patches_and_positions() -> None:
    """With one position for all, the same patches on another grid give the same channels."""
    residual = tiny_svg().residual_encoder
    residual.network.encoder.pos_embedding[:, 1:] = torch.randn(32)
    pixels = images((4, 4))
    other = pixels.unflatten(2, (2, 2, 4)).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 8, 32)  # rows 0 | 1 and 2 | 3
    torch.testing.assert_close(residual(other, (2, 8)), residual(pixels), atol=1e-5, rtol=0)
    # Positions that tell rows alone do so on every grid: of one grey, tokens of a row are alike.
    residual.network.encoder.pos_embedding[:, 1:] = torch.randn(4, 1, 32).expand(4, 4, 32).flatten(0, 1)
    grey = residual(torch.full((1, 3, 8, 32), 0.5), (2, 8))[0].unflatten(1, (2, 8))
    torch.testing.assert_close(grey, grey[:, :, :1].expand_as(grey), atol=1e-5, rtol=0)
    assert (grey[:, 0] - grey[:, 1]).abs().max() > 1e-2


def test_training_takes_sizes_too() -> None:
    model = tiny_autoencoder(noise_tau=0.8).train()
    model(images((4, 6)), generator=torch.Generator().manual_seed(0)).sample.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pos_embed" not in name)


@torch.no_grad()
def test_sizes_after_saving(tmp_path: Path) -> None:
    model, latents = tiny_autoencoder(), torch.randn(1, 32, 3, 5)
    model.save_pretrained(tmp_path)
    loaded = RepresentationAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.decode(latents).sample, model.decode(latents).sample)
    assert torch.equal(loaded.encode(images((3, 5))).latent, model.encode(images((3, 5))).latent)
