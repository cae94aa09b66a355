"""Tiny autoencoders of random weights that see the digits at 32 px, and an encoder that sees their features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from repagen import PixelAutoencoder, RepresentationAutoencoder
from repagen.encoders import VisionEncoder
from repagen.evaluation import DatasetImages
from repagen.evaluation.samples import open_images

DIGITS = ["data.kind=digits", "data.image_size=32", "data.subset=validation"]


@pytest.fixture(scope="session")
def digits() -> DatasetImages:
    source = open_images(DIGITS)
    assert isinstance(source, DatasetImages)
    return source


@pytest.fixture(scope="session")
def rae(encoder: VisionEncoder) -> RepresentationAutoencoder:
    """32 px images, latents (16, 4, 4), with noise in training mode."""
    sizes = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    }
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return RepresentationAutoencoder.from_encoder(encoder, decoder=sizes, image_size=32, noise_tau=0.8).eval()


@pytest.fixture(scope="session")
def kl() -> AutoencoderKL:
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return AutoencoderKL(
            **types, block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, sample_size=32
        ).eval()


@pytest.fixture(scope="session")
def identity() -> PixelAutoencoder:
    """An autoencoder that gives back what it got."""
    return PixelAutoencoder(image_size=32).eval()


@pytest.fixture(scope="session")
def rae_folder(rae: RepresentationAutoencoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rae")
    rae.save_pretrained(folder)
    return folder
