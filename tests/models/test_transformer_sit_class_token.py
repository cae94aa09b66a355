"""SiT with REG's class token: one token more, denoised beside the latent; without it the model is what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import FasterCacheConfig, FirstBlockCacheConfig, TaylorSeerCacheConfig
from torch.testing import assert_close
from transformer_cases import SIT, build, inputs

from repagen import SiTTransformer2DModel

DIM = 12


def batch() -> dict[str, torch.Tensor]:
    return {**inputs(SIT), "class_token": torch.randn(2, DIM, generator=torch.Generator().manual_seed(2))}


@torch.no_grad()
def predict(model: Any, **changes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return model(**{**batch(), **changes}, return_dict=False)


def test_prediction_is_that_of_one_more_token_in_the_sequence() -> None:
    """Restated: the token enters the blocks after the patches without position, and leaves by the shared norm."""
    model = build(SIT, class_token_dim=DIM)
    given = batch()
    with torch.no_grad():
        output = model(**given)
        condition = model.time_embedder(given["timestep"]) + model.label_embedder.table(given["class_labels"])
        patches = model.patch_embed(given["hidden_states"]) + model.pos_embed
        tokens = torch.cat([patches, model.class_token_in(given["class_token"])[:, None]], dim=1)
        for block in model.blocks:
            tokens = block(tokens, condition)
        shift, scale = model.modulation_out(torch.nn.functional.silu(condition))[:, None].chunk(2, dim=-1)
        tokens = model.norm_out(tokens) * (1 + scale) + shift
        expected = model.class_token_out(tokens[:, -1])
        pixels = model.proj_out(tokens[:, :-1]).unflatten(1, (4, 4)).unflatten(-1, (2, 2, 4))
    assert_close(output.class_token, expected)
    assert_close(output.sample, pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3))


def test_token_and_latent_see_one_another() -> None:
    model = build(SIT, class_token_dim=DIM)
    sample, token = predict(model)
    other_sample, other_token = predict(model, class_token=torch.zeros(2, DIM))
    assert (sample - other_sample).abs().amax() > 1e-3
    _, token_of_other_latent = predict(model, hidden_states=torch.zeros(2, 4, 8, 8))
    assert (token - token_of_other_latent).abs().amax() > 1e-3 and (token - other_token).abs().amax() > 1e-3


def test_without_class_token_dim_nothing_is_added() -> None:
    plain = build(SIT)
    assert not any("class_token" in name for name in plain.state_dict())
    with torch.no_grad():
        assert plain(**inputs(SIT)).class_token is None
        assert len(plain(**inputs(SIT), return_dict=False)) == 1


def test_published_initial_weights_predict_zero() -> None:
    model = SiTTransformer2DModel(**SIT.config, class_token_dim=DIM)
    model.initialize_weights()
    sample, token = predict(model)
    assert not sample.any() and not token.any()
    assert model.class_token_in.weight.any()


def test_reversed_time_reverses_both_velocities() -> None:
    forward = build(SIT, class_token_dim=DIM)
    backward = build(SIT, class_token_dim=DIM, time_direction="data_at_one")
    for one, two in zip(predict(forward), predict(backward, timestep=1 - batch()["timestep"]), strict=True):
        assert_close(one, -two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_saved_and_loaded_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(SIT, class_token_dim=DIM)
    model.save_pretrained(tmp_path)
    assert all(torch.equal(*pair) for pair in zip(predict(model), predict(loaded(tmp_path)), strict=True))
    half = predict(loaded(tmp_path, dtype=dtype), hidden_states=batch()["hidden_states"].to(dtype))
    for one, two in zip(predict(model), half, strict=True):
        assert two.dtype == dtype
        assert (one - two.float()).norm() < 0.02 * one.norm()


def loaded(folder: Path, **options: Any) -> Any:
    return SiTTransformer2DModel.from_pretrained(folder, **options)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(SIT, class_token_dim=DIM).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        output = model(**batch())
        (output.sample.square().mean() + output.class_token.square().mean()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    for one, two in zip(*gradients, strict=True):
        assert_close(one, two)


def test_caches() -> None:
    model = build(SIT, class_token_dim=DIM)
    expected = predict(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        for one, two in zip(predict(model), expected, strict=True):
            assert_close(one, two)
    model.disable_cache()
    for config in (FasterCacheConfig(), TaylorSeerCacheConfig(use_lite_mode=True)):
        with pytest.raises(ValueError, match="not for a model with class_token_dim"):
            model.enable_cache(config)
    model.enable_cache(TaylorSeerCacheConfig())


@pytest.mark.parametrize(
    ("dim", "token", "message"),
    [
        (DIM, None, r"takes one of shape \(2, 12\); got none"),
        (DIM, torch.zeros(2, 5), r"takes one of shape \(2, 12\); got shape \(2, 5\)"),
        (DIM, torch.zeros(3, DIM), r"takes one of .* got shape \(3, 12\)"),
        (0, torch.zeros(2, DIM), "takes none, its class_token_dim is 0; got shape"),
    ],
)
def test_wrong_class_tokens_are_refused(dim: int, token: torch.Tensor | None, message: str) -> None:
    model = build(SIT, class_token_dim=dim)
    with pytest.raises(ValueError, match=f"class_token: this model {message}"):
        model(**inputs(SIT), class_token=token)


def test_published_size_with_dinov2_base() -> None:
    with torch.device("meta"):
        plain = SiTTransformer2DModel(**SiTTransformer2DModel.config_for_size("XL"))
        reg = SiTTransformer2DModel(**SiTTransformer2DModel.config_for_size("XL", class_token_dim=768))
    added = 768 * 1152 + 1152 + 1152 * 768 + 768
    assert sum(p.numel() for p in reg.parameters()) == sum(p.numel() for p in plain.parameters()) + added
