"""Pixels as latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoModel

from repagen import PixelAutoencoder, images_to_latents, latents_to_images
from repagen.errors import UserError
from repagen.models.latents import decoded_size, latent_shape


def test_latents_are_standardised_pixels_and_come_back() -> None:
    model, images = PixelAutoencoder(image_size=8), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(images_to_latents(model, images), 2 * images - 1)
    torch.testing.assert_close(latents_to_images(model, images_to_latents(model, images)), images)
    torch.testing.assert_close(model(images).sample, images)
    assert latent_shape(model, 8) == (3, 8, 8)
    assert decoded_size(model, (3, 4, 6)) == (4, 6)
    assert list(model.parameters()) == []


def test_statistics_are_saved_with_it(tmp_path: Path) -> None:
    model, images = PixelAutoencoder(image_size=8), torch.rand(4, 3, 8, 8)
    flat = images.transpose(0, 1).flatten(1)
    model.set_statistics(flat.mean(1).view(3, 1, 1), std=flat.std(1).view(3, 1, 1))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert isinstance(loaded, PixelAutoencoder) and loaded.image_size == 8
    assert torch.equal(loaded.latents_std, model.latents_std)
    latents = model.encode(images).latent.transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(3))


def test_what_does_not_fit_is_refused() -> None:
    model = PixelAutoencoder(image_size=8)
    with pytest.raises(UserError, match="images must be float"):
        model.encode(torch.rand(1, 4, 8, 8))
    with pytest.raises(UserError, match=r"\(B, 3, h, w\), got \(1, 4, 8, 8\)"):
        model.decode(torch.rand(1, 4, 8, 8))
    with pytest.raises(UserError, match="16 px, but the autoencoder is for images of 8 px"):
        latent_shape(model, 16)
    with pytest.raises(UserError, match="image_size: 0"):
        PixelAutoencoder(image_size=0)
