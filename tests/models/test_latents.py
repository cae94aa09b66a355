"""Images to latents and back, for each kind of autoencoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from autoencoder_cases import tiny_autoencoder, tiny_svg
from diffusers import AutoencoderKL, AutoencoderRAE

from repagen import PixelAutoencoder
from repagen.errors import UserError
from repagen.models.latents import (
    decoded_size,
    images_to_latents,
    latent_shape,
    latents_to_images,
    require_autoencoder,
    require_sizes,
)


def tiny_kl(**config: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 4, "sample_size": 16}
    return AutoencoderKL(**types, **sizes, **config).eval()


def tiny_rae() -> AutoencoderRAE:
    torch.manual_seed(0)
    return AutoencoderRAE(
        encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_patch_size=14, encoder_input_size=56,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=48, patch_size=4,
    ).eval()  # fmt: skip


def test_representation_autoencoder() -> None:
    model, images = tiny_autoencoder(), torch.rand(2, 3, 16, 16)
    latents = images_to_latents(model, images)
    assert torch.equal(latents, model.encode(images).latent)
    assert latents.shape[1:] == latent_shape(model, 16)
    assert torch.equal(latents_to_images(model, latents), model.decode(latents).sample.clamp(0, 1))
    with pytest.raises(UserError, match="for images of 16 px"):
        latent_shape(model, 32)


def test_svg() -> None:
    model, images = tiny_svg(), torch.rand(2, 3, 16, 16)
    latents = images_to_latents(model, images)
    assert torch.equal(latents, model.encode(images).latent) and not latents.requires_grad
    assert latents.shape[1:] == latent_shape(model, 16) == (36, 4, 4)
    assert torch.equal(latents_to_images(model, latents), model.decode(latents).sample.clamp(0, 1))
    with pytest.raises(UserError, match="for images of 16 px"):
        latent_shape(model, 32)


def test_decoded_size_says_what_is_decoded() -> None:
    """What a pipeline asks before it samples: grids that are decoded, and all others refused."""
    kinds = {"kl": tiny_kl(), "rae": tiny_rae(), "svg": tiny_svg(), "representation": tiny_autoencoder()}
    assert decoded_size(kinds["kl"], (4, 8, 3)) == (16, 6)
    assert decoded_size(kinds["svg"], (36, 8, 3)) == (32, 12)
    assert decoded_size(kinds["rae"], (64, 4, 4)) == (16, 16)
    assert decoded_size(kinds["representation"], (32, 4, 6)) == (16, 24)
    for name, model in kinds.items():
        with pytest.raises(UserError, match="5"):
            decoded_size(model, (5, 4, 4))
        if name == "rae":
            with pytest.raises(UserError, match="8"):
                decoded_size(model, (latent_shape(model, 16)[0], 8, 8))


@pytest.mark.parametrize("shift", [None, 0.3])
def test_kl_speaks_minus_one_to_one_and_is_scaled(shift: float | None) -> None:
    model, images = tiny_kl(scaling_factor=0.5, shift_factor=shift), torch.rand(2, 3, 16, 16)
    latents = images_to_latents(model, images, generator=torch.Generator().manual_seed(3))
    posterior = model.encode(images * 2 - 1).latent_dist
    draw = posterior.sample(generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(latents, (draw - (shift or 0)) * 0.5)
    assert latents.shape[1:] == latent_shape(model, 16) == (4, 8, 8)
    expected = (model.decode(draw).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(latents_to_images(model, latents), expected, atol=1e-6, rtol=0)


def test_kl_encodes_any_proportions() -> None:
    model, images = tiny_kl(), torch.rand(1, 3, 16, 24)
    latents = images_to_latents(model, images, sample_posterior=False)
    assert latents.shape == (1, 4, 8, 12) and latents_to_images(model, latents).shape == images.shape
    require_sizes(model, [(16, 24), (8, 8)], "data.buckets")
    with pytest.raises(UserError, match=r"data\.buckets: 8x9 px"):
        require_sizes(model, [(8, 8), (8, 9)], "data.buckets")


def test_kl_with_latent_statistics() -> None:
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 1.0, 2.0]
    model = tiny_kl(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    images = torch.rand(1, 3, 16, 16)
    latents = images_to_latents(model, images, generator=torch.Generator().manual_seed(3))
    draw = model.encode(images * 2 - 1).latent_dist.sample(generator=torch.Generator().manual_seed(3))
    expected = (draw - torch.tensor(mean).view(1, 4, 1, 1)) * 0.5 / torch.tensor(std).view(1, 4, 1, 1)
    torch.testing.assert_close(latents, expected)
    expected_images = (model.decode(draw).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(latents_to_images(model, latents), expected_images, atol=1e-6, rtol=0)


def test_kl_draws_depend_on_the_image_alone_with_a_generator_each() -> None:
    model, images = tiny_kl(), torch.rand(3, 3, 16, 16)

    def draw(chosen: list[int]) -> torch.Tensor:
        return images_to_latents(model, images[chosen], [torch.Generator().manual_seed(i) for i in chosen])

    torch.testing.assert_close(draw([0, 1, 2])[1:], draw([1, 2]), atol=1e-6, rtol=0)


def test_diffusers_rae() -> None:
    model, images = tiny_rae(), torch.rand(2, 3, 16, 16)
    latents = images_to_latents(model, images)
    assert torch.equal(latents, model.encode(images).latent)
    assert latents.shape[1:] == latent_shape(model, 16) == (64, 4, 4)
    assert torch.equal(latents_to_images(model, latents), model.decode(latents).sample.clamp(0, 1))
    with pytest.raises(UserError, match=r"\(B, 64, 4, 4\)"):  # diffusers resizes it without a word
        latents_to_images(model, torch.zeros(1, 64, 8, 8))


def test_infinities_are_seen_where_nothing_is_clamped() -> None:
    model = PixelAutoencoder(image_size=16)
    latents = images_to_latents(model, torch.rand(2, 3, 16, 16))
    latents[1, 0, 2, 3] = torch.inf
    assert latents_to_images(model, latents)[1, 0, 2, 3] == 1
    images = latents_to_images(model, latents, clamp=False)
    assert images[1, 0, 2, 3] == torch.inf and torch.equal(images, model.decode(latents).sample)


def test_what_is_no_autoencoder_is_refused_by_its_class() -> None:
    require_autoencoder(tiny_kl(), "--autoencoder")
    with pytest.raises(UserError, match=r"^--autoencoder: Linear is none of .*AutoencoderRAE"):
        require_autoencoder(torch.nn.Linear(1, 1), "--autoencoder")


def test_wrong_input_is_named() -> None:
    with pytest.raises(UserError, match="square"):
        images_to_latents(tiny_rae(), torch.rand(1, 3, 16, 8))
    with pytest.raises(UserError, match="images: 16x9 px; allowed: multiples of the autoencoder's 2 px"):
        images_to_latents(tiny_kl(), torch.rand(1, 3, 16, 9))
    with pytest.raises(UserError, match="15 px"):
        latent_shape(tiny_kl(), 15)
    with pytest.raises(UserError, match="Linear is none of"):
        latents_to_images(torch.nn.Linear(1, 1), torch.zeros(1, 4, 8, 8))
