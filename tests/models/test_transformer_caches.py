"""diffusers' caches between sampling steps, on all generators: what its cache testers ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from transformer_cases import Case, all_generators, build, inputs, output

CLOCK = {"timestep": 500}


def current_timestep() -> int:
    return CLOCK["timestep"]


CACHES: dict[str, Any] = {
    "pab": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=current_timestep
    ),
    "first_block": lambda: FirstBlockCacheConfig(threshold=1.0),
    "faster": lambda: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        tensor_format="BCHW",
        current_timestep_callback=current_timestep,
    ),
    "mag": lambda: MagCacheConfig(num_inference_steps=2, retention_ratio=0.0, threshold=100.0, mag_ratios=[1.0, 1.0]),
    "taylor_seer": lambda: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=1),
    "taylor_seer_lite": lambda: TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1, max_order=1, use_lite_mode=True
    ),
}
pytestmark = [all_generators, pytest.mark.parametrize("cache", CACHES)]


def hooks(model: Any) -> set[str]:
    """Names of the hooks that the cache put on modules, without those that only mark the root."""
    found: set[str] = set()
    for module in model.modules():
        if registry := getattr(module, "_diffusers_hook", None):
            found |= set(registry.hooks)
    return found


def test_enable_and_disable(case: Case, cache: str) -> None:
    model = build(case)
    expected = output(model, case)
    model.enable_cache(CACHES[cache]())
    assert model.is_cache_enabled and hooks(model)
    with pytest.raises(ValueError, match="Caching has already been enabled"):
        model.enable_cache(CACHES[cache]())
    model.disable_cache()
    assert not model.is_cache_enabled and not hooks(model)
    assert torch.equal(output(model, case), expected)


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # diffusers.hooks.faster_cache passes no indexing
def test_second_step_is_approximated(case: Case, cache: str) -> None:
    model, moved = build(case), inputs(case)["hidden_states"] + 0.5
    expected_first, exact = output(model, case), output(model, case, hidden_states=moved)
    model.enable_cache(CACHES[cache]())
    with model.cache_context("cond"):
        CLOCK["timestep"] = 1000 if cache == "faster" else 500
        assert torch.allclose(output(model, case), expected_first, atol=1e-6)
        CLOCK["timestep"] = 500
        approximate = output(model, case, hidden_states=moved)
    assert approximate.isfinite().all()
    assert not torch.allclose(approximate, exact, atol=1e-5)
    model._reset_stateful_cache()
    with model.cache_context("cond"):
        assert torch.allclose(output(model, case), expected_first, atol=1e-6)


def test_contexts_are_apart(case: Case, cache: str) -> None:
    if cache in ("pab", "faster", "mag"):
        pytest.skip("this cache of diffusers keeps one state for all contexts")
    model = build(case)
    model.enable_cache(CACHES[cache]())
    results = []
    for name in ("cond", "uncond"):
        with model.cache_context(name):
            results.append(output(model, case))
    assert torch.equal(*results)
