"""Every family keeps the contract of `VisionEncoder` and agrees with the library that holds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import TINY, make_tiny
from torch import nn

from repagen.encoders import VisionEncoder
from repagen.errors import UserError

ALL = sorted(TINY)


def holder_states(encoder: VisionEncoder, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the holder itself returns: its last hidden state, and the outputs of its blocks before the final norm."""
    model: Any = encoder.backbone.model
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.image_mean, encoder.image_std))
    pixels = (images - mean) / std
    with torch.no_grad():
        if encoder.family == "timm":
            blocks = model.forward_intermediates(
                pixels, norm=False, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
            )
            return model.forward_features(pixels), [torch.cat([prefix, patches], 1) for patches, prefix in blocks]
        extra: dict[str, Any] = {}
        if encoder.family == "vit_mae":
            extra["noise"] = torch.arange(encoder.grid_size**2).float().expand(len(images), -1)
        output = model(pixels, output_hidden_states=True, **extra)
        return output.last_hidden_state, list(output.hidden_states[1:])


@pytest.mark.parametrize("name", ALL)
def test_tokens_are_the_holders_without_prefix(name: str) -> None:
    encoder = make_tiny(name)
    prefix = TINY[name][2]
    images = torch.rand(2, 3, encoder.image_size, encoder.image_size)
    last, _ = holder_states(encoder, images)
    output = encoder(images)
    assert output.grid == (4, 4)
    assert output.tokens.shape == (2, 16, encoder.hidden_size)
    assert encoder.backbone.prefix_tokens == prefix
    torch.testing.assert_close(output.tokens, last[:, prefix:], atol=1e-6, rtol=0)
    assert (output.cls is None) == (prefix == 0)
    if output.cls is not None and encoder.family != "clip":
        torch.testing.assert_close(output.cls, last[:, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_affine_free_tokens_are_normalised_and_leave_the_model_alone(name: str) -> None:
    encoder = make_tiny(name)
    images = torch.rand(2, 3, encoder.image_size, encoder.image_size)
    before = encoder(images).tokens
    stripped = encoder.reading(norm_affine=False)(images).tokens
    _, blocks = holder_states(encoder, images)
    norm = encoder.backbone.final_norm
    assert isinstance(norm, nn.LayerNorm)
    expected = F.layer_norm(blocks[-1], (encoder.hidden_size,), eps=norm.eps)[:, TINY[name][2] :]
    torch.testing.assert_close(stripped, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(stripped.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    assert torch.equal(encoder(images).tokens, before)
    assert not torch.allclose(before, stripped, atol=1e-2)


def test_clip_normalises_the_class_token_only() -> None:
    encoder = make_tiny("clip")
    images = torch.rand(1, 3, 64, 64)
    last, blocks = holder_states(encoder, images)
    assert torch.equal(last, blocks[-1])
    pooled = encoder.backbone.model.post_layernorm(last[:, 0])
    torch.testing.assert_close(encoder(images).cls, pooled, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_patches_stay_in_order_and_calls_agree(name: str) -> None:
    encoder = make_tiny(name)
    patch = encoder.patch_size
    images = torch.rand(1, 3, encoder.image_size, encoder.image_size)
    changed = images.clone()
    changed[:, :, 2 * patch : 3 * patch, patch : 2 * patch] = torch.rand(3, patch, patch)
    tokens, again = encoder(images).tokens, encoder(images).tokens
    assert torch.equal(tokens, again)
    assert (encoder(changed).tokens - tokens).norm(dim=-1).argmax() == 2 * 4 + 1


@pytest.mark.parametrize("name", ALL)
def test_frozen(name: str) -> None:
    encoder = make_tiny(name)
    nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = torch.rand(1, 3, encoder.image_size, encoder.image_size, requires_grad=True)
    assert not encoder(images).tokens.requires_grad


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_is_close(name: str) -> None:
    encoder = make_tiny(name, norm_affine=False)
    images = torch.rand(2, 3, encoder.image_size, encoder.image_size)
    exact = encoder(images).tokens
    fingerprint = make_tiny(name, norm_affine=False).fingerprint()
    rounded = encoder.to(torch.bfloat16)(images).tokens
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 2e-2
    assert encoder.fingerprint() == fingerprint


@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded_encoders_agree(name: str, tmp_path: Any) -> None:
    encoder = make_tiny(name, norm_affine=False, image_mean=[0.4, 0.5, 0.6])
    encoder.save_pretrained(tmp_path)
    if encoder.family == "timm":  # timm keeps the pixel statistics in its config
        encoder = encoder.reading(image_mean=None, image_std=None)
    loaded = VisionEncoder.from_pretrained(tmp_path, norm_affine=False)
    images = torch.rand(1, 3, 70, 70)
    assert torch.equal(loaded(images).tokens, encoder(images).tokens)
    assert loaded.fingerprint() == encoder.fingerprint()
    assert loaded.revision is None


@pytest.mark.parametrize("name", ["dinov2_with_registers", "siglip", "vit_mae", "timm_perception"])
def test_another_grid(name: str) -> None:
    encoder = make_tiny(name)
    larger = make_tiny(name, image_size=encoder.patch_size * 6)
    assert larger(torch.rand(1, 3, 50, 50)).tokens.shape == (1, 36, encoder.hidden_size)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (torch.rand(1, 3, 64, 48), "square, got 64 x 48"),
        (torch.rand(1, 4, 64, 64), r"\(1, 4, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "uint8"),
    ],
)
def test_wrong_images_are_refused(images: torch.Tensor, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make_tiny("dinov2")(images)


def test_a_side_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(UserError, match=r"image_size: 70 px .* 16 px"):
        make_tiny("dinov2", image_size=70)
