"""One tiny encoder of every family, with random weights."""

from __future__ import annotations

from typing import Any

import torch

from repagen.encoders import VisionEncoder

_COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
_FFN = {**_COMMON, "intermediate_size": 48}
_TIMM = {"depth": 3, "num_heads": 2, "img_size": 64}

# name => (family, config, number of prefix tokens)
TINY: dict[str, tuple[str, dict[str, Any], int]] = {
    "dinov2": ("dinov2", _COMMON, 1),
    "dinov2_with_registers": ("dinov2_with_registers", {**_COMMON, "num_register_tokens": 4}, 5),
    "dinov2_with_two_registers": ("dinov2_with_registers", {**_COMMON, "num_register_tokens": 2}, 3),
    "dinov3_vit": ("dinov3_vit", {**_FFN, "num_register_tokens": 4}, 5),
    "siglip": ("siglip", _FFN, 0),
    "clip": ("clip", _FFN, 1),
    "vit_mae": ("vit_mae", _FFN, 1),
    "ijepa": ("ijepa", _FFN, 0),
    "timm_vit": ("timm", {"architecture": "vit_tiny_patch16_224", "model_args": {**_TIMM, "embed_dim": 32}}, 1),
    "timm_registers": (
        "timm",
        {"architecture": "vit_small_patch14_reg4_dinov2", "model_args": {**_TIMM, "embed_dim": 32, "img_size": 56}},
        5,
    ),
    "timm_perception": (
        "timm",
        {"architecture": "vit_pe_core_tiny_patch16_384", "model_args": {**_TIMM, "embed_dim": 48}},
        1,
    ),
}


def make_tiny(name: str, **reading: Any) -> VisionEncoder:
    """Build a tiny encoder; its norms and position tables are made non-trivial, so that skipping one shows."""
    family, config, _ = TINY[name]
    torch.manual_seed(0)
    encoder = VisionEncoder.from_config({"family": family, "config": config, **reading})
    for key, value in encoder.backbone.model.named_parameters():
        if "norm" in key or "pos" in key or "register" in key or "reg_token" in key:
            value.data.add_(0.3 * torch.randn_like(value))
    return encoder
