"""`RepresentationAutoencoder` from and to diffusers' `AutoencoderRAE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from autoencoder_cases import TINY_DECODER
from diffusers import AutoencoderRAE

from repagen import RepresentationAutoencoder
from repagen.errors import UserError


def diffusers_rae(encoder_type: str) -> AutoencoderRAE:
    """A tiny AutoencoderRAE with statistics, a 16 x 16 grid and an encoder of 64-wide heads."""
    torch.manual_seed(0)
    patch = 14 if encoder_type == "dinov2" else 16
    model = AutoencoderRAE(
        encoder_type=encoder_type, encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_patch_size=patch,
        encoder_input_size=16 * patch, decoder_hidden_size=32, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2, decoder_intermediate_size=48, patch_size=2, noise_tau=0.8,
        encoder_norm_mean=[0.4, 0.5, 0.6], latents_mean=torch.randn(64, 16, 16),
        latents_std=torch.rand(64, 16, 16) + 0.5,
    )  # fmt: skip
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("encoder_type", ["dinov2", "mae"])
def test_diffusers_both_ways(encoder_type: str, tmp_path: Path) -> None:
    theirs = diffusers_rae(encoder_type)
    ours = RepresentationAutoencoder.from_diffusers(theirs)
    images, latents = torch.rand(1, 3, 40, 40), torch.randn(1, 64, 16, 16)

    def check(one: Any, two: Any) -> None:
        torch.testing.assert_close(one.encode(images).latent, two.encode(images).latent, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.decode(latents).sample, two.decode(latents).sample, atol=1e-5, rtol=0)

    check(ours, theirs)
    assert (ours.config.noise_tau, ours.image_size) == (0.8, 32)
    ours.save_pretrained(tmp_path / "ours")
    back = RepresentationAutoencoder.from_pretrained(tmp_path / "ours").to_diffusers()
    check(back, theirs)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, atol=1e-6, rtol=0, msg=name)
    back.save_pretrained(tmp_path / "theirs")
    check(AutoencoderRAE.from_pretrained(tmp_path / "theirs"), theirs)


def test_what_diffusers_cannot_hold_is_named(golden: Path) -> None:
    def with_grid(case: str, grid: int) -> RepresentationAutoencoder:
        folder = golden / case / "encoder"
        return RepresentationAutoencoder.from_encoder(folder, TINY_DECODER, image_size=2 * grid, decoder_patch_size=2)

    with pytest.raises(UserError, match="SigLIP2"):
        with_grid("rae_siglip2", 4).to_diffusers()
    with pytest.raises(UserError, match="a grid of 4"):
        with_grid("rae_dinov2", 4).to_diffusers()
    with pytest.raises(UserError, match="num_attention_heads 1, not 2"):
        with_grid("rae_dinov2", 16).to_diffusers()
    ours = RepresentationAutoencoder.from_diffusers(diffusers_rae("dinov2"))
    ours.decoder.decoder_pos_embed.data += 0.1
    with pytest.raises(UserError, match="learned table"):
        ours.to_diffusers()


def test_siglip_folders_of_diffusers_are_refused_by_name(tmp_path: Path) -> None:
    config = {"_class_name": "AutoencoderRAE", "encoder_type": "siglip2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cannot build 'siglip2' with transformers 5"):
        RepresentationAutoencoder.from_diffusers(tmp_path)
