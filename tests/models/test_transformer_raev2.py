"""`RAEv2Transformer2DModel` against the official network: both heads, its published size, what in-context means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from golden_cases import GoldenCase
from torch.testing import assert_close
from transformer_cases import RAEV2, build, inputs, output

from repagen import RAEv2Transformer2DModel, UserError


@pytest.fixture
def case(golden: Path) -> Iterator[GoldenCase]:
    # As for DiT^DH: the expected outputs were computed with several threads, whose kernels round otherwise.
    torch.set_num_threads(2)
    yield GoldenCase(golden / "raev2_ditdh", "raev2_ditdh")
    torch.set_num_threads(1)


@torch.no_grad()
def test_both_heads_equal_the_official(case: GoldenCase) -> None:
    model = case.convert()
    both = model(case.x, case.t, class_labels=case.labels, return_base=True)
    assert_close(both.sample, case.expected["out"], rtol=0, atol=1e-5)
    assert_close(both.base_sample, case.expected["out_base"], rtol=0, atol=1e-5)
    assert_close(model(case.x, case.t, case.null_labels).sample, case.expected["out_null"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_layer_equals_the_official(case: GoldenCase) -> None:
    model, taps = case.convert(), case.taps
    seen: dict[str, torch.Tensor] = {}
    modules = {
        "s_embedder": model.patch_embed,
        "x_embedder": model.head_patch_embed,
        "s_projector": model.condition_proj,
    }
    modules |= {f"blocks.{i}": block for i, block in enumerate([*model.blocks, *model.head_blocks])}
    modules |= {"t_embedder": model.time_embedder}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, result, name=name: seen.update({name: result}))
    model(case.x, case.t, case.labels)
    for name in sorted(modules.keys() & taps.keys()):
        assert_close(
            seen[name].reshape(taps[name].shape), taps[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_published_size_has_the_published_parameters() -> None:
    with torch.device("meta"):
        model = RAEv2Transformer2DModel(**RAEv2Transformer2DModel.config_for_size("XL"))
    frozen = model.time_embedder.frequencies.numel()
    assert sum(parameter.numel() for parameter in model.parameters()) + frozen == 875_216_500


@torch.no_grad()
def test_base_head_costs_no_second_pass_and_changes_nothing() -> None:
    model, calls = build(RAEV2), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    plain = model(**inputs(RAEV2))
    both = model(**inputs(RAEV2), return_base=True)
    assert len(calls) == 2 and plain.base_sample is None
    assert torch.equal(plain.sample, both.sample) and not torch.allclose(both.base_sample, both.sample, atol=1e-2)
    sample, base_sample = model(**inputs(RAEV2), return_base=True, return_dict=False)
    assert torch.equal(sample, both.sample) and torch.equal(base_sample, both.base_sample)


def test_base_head_trains_the_first_blocks_only() -> None:
    model = build(RAEV2).train()
    model(**inputs(RAEV2), return_base=True).base_sample.square().mean().backward()
    reached = [any(p.grad is not None and bool(p.grad.any()) for p in block.parameters()) for block in model.blocks]
    assert reached == [True] * RAEV2.config["base_depth"] + [False] * (len(reached) - RAEV2.config["base_depth"])
    assert model.proj_out.weight.grad is None and model.base_head.proj_out.weight.grad.any()


def test_conditions_are_tokens_without_a_position() -> None:
    model = build(RAEV2)
    lengths = []
    model.blocks[0].register_forward_hook(lambda _, args, result: lengths.append(result.shape[1]))
    output(model, RAEV2)
    assert lengths == [16 + 4 + 8]
    assert torch.equal(model.rope.cos[16:], torch.ones(12, 16)) and not model.rope.sin[16:].any()
    moved = build(RAEV2)
    with torch.no_grad():  # the order of condition tokens means nothing
        moved.class_tokens.copy_(model.class_tokens.flip(0))
    assert torch.allclose(output(moved, RAEV2), output(model, RAEV2), atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["sample", "velocity"])
def test_base_head_obeys_the_time_direction(prediction_type: str) -> None:
    forward = build(RAEV2, prediction_type=prediction_type)
    backward = build(RAEV2, prediction_type=prediction_type, time_direction="data_at_one")
    batch, t = inputs(RAEV2), torch.tensor([0.25, 0.75])
    with torch.no_grad():
        one = forward(**{**batch, "timestep": t}, return_base=True).base_sample
        other = backward(**{**batch, "timestep": 1 - t}, return_base=True).base_sample
    assert torch.equal(other, -one if prediction_type == "velocity" else one)


@pytest.mark.parametrize(
    "change", [{"head_hidden_size": 32}, {"patch_size": 2}, {"base_depth": 3}, {"num_time_tokens": 1}], ids=str
)
def test_variants_save_load_and_differ(change: dict[str, int], tmp_path: Path) -> None:
    model = build(RAEV2, **change)
    model.save_pretrained(tmp_path)
    loaded = RAEv2Transformer2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, result = (m(**inputs(RAEV2), return_base=True) for m in (model, loaded))
        other = build(RAEV2)(**inputs(RAEV2), return_base=True)
    assert expected.sample.shape == expected.base_sample.shape == inputs(RAEV2)["hidden_states"].shape
    assert torch.equal(result.sample, expected.sample) and torch.equal(result.base_sample, expected.base_sample)
    assert not torch.allclose(other.base_sample, expected.base_sample, atol=1e-3)


def test_initial_weights_are_the_published_ones() -> None:
    model = RAEv2Transformer2DModel(**{**RAEV2.config, "num_time_tokens": 64, "num_class_tokens": 64})
    model.initialize_weights()
    with torch.no_grad():
        both = model(**inputs(RAEV2), return_base=True)
    assert not both.sample.any() and not both.base_sample.any()
    for tokens in (model.time_tokens, model.class_tokens):
        assert tokens.std().item() == pytest.approx(32**-0.5, rel=0.1)


@pytest.mark.parametrize("base_depth", [0, 4])
def test_base_head_beyond_the_deep_part_is_refused(base_depth: int) -> None:
    with pytest.raises(UserError, match=f"base_depth {base_depth} is no block of the deep part; allowed are 1..3"):
        RAEv2Transformer2DModel(**{**RAEV2.config, "base_depth": base_depth})


@pytest.mark.parametrize(
    "cache",
    [
        FirstBlockCacheConfig(),
        MagCacheConfig(num_inference_steps=2, mag_ratios=[1.0, 1.0]),
        SeaCacheConfig(),
        TaylorSeerCacheConfig(use_lite_mode=True),
    ],
    ids=["first_block", "mag", "sea", "taylor_seer_lite"],
)
def test_base_head_refuses_caches_that_skip_its_blocks(cache: object) -> None:
    model = build(RAEV2)
    model.enable_cache(cache)
    with pytest.raises(UserError, match=f"return_base: {type(cache).__name__} skips the blocks"):
        model(**inputs(RAEV2), return_base=True)
    model.disable_cache()
    model.enable_cache(PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500))
    assert model(**inputs(RAEV2), return_base=True).base_sample is not None
