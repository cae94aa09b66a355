"""Tiny representation autoencoders."""

from __future__ import annotations

from typing import Any

import torch

from repagen import RepresentationAutoencoder

TINY_DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 48,
}
TINY_ENCODER = {
    "family": "dinov2_with_registers",
    "config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32},
    "image_size": 32,
    "norm_affine": False,
}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """Constructor arguments: 16 px images, latents (32, 4, 4), decoder patch 4."""
    sizes = {"latent_channels": 32, "latent_size": 4, "decoder_patch_size": 4, "noise_tau": 0.0}
    return {"encoder": TINY_ENCODER, **sizes, **TINY_DECODER, **changes}


def tiny_autoencoder(**changes: Any) -> RepresentationAutoencoder:
    """A tiny autoencoder with random weights and statistics, in eval mode."""
    torch.manual_seed(0)
    model = RepresentationAutoencoder(**tiny_config(**changes))
    model.set_statistics(torch.randn(model.latent_shape), torch.rand(model.latent_shape) + 0.5)
    return model.eval()
