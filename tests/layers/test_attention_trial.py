"""Attention backends are judged by running them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from repagen.layers.attention_trial import AttentionTrial, try_attention

CPU = torch.device("cpu")


def replace_backend(monkeypatch: pytest.MonkeyPatch, name: str, function: Any) -> None:
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName(name), function)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_what_runs_here_is_within_rounding(backend: str, dtype: torch.dtype) -> None:
    trial = try_attention(backend, CPU, dtype)
    assert trial.runs and trial.trains and not trial.is_wrong and trial.reason is None
    assert 0 < trial.error < trial.tolerance / 3  # type: ignore[operator]


@pytest.mark.parametrize("backend", ["flash", "_native_efficient", "no_such_thing"])
def test_what_cannot_run_is_refused_in_one_line(backend: str) -> None:
    trial = try_attention(backend, CPU, torch.float32)
    assert not trial.runs and not trial.trains and not trial.is_wrong
    assert trial.reason and "\n" not in trial.reason and backend in trial.reason


def test_a_backend_that_is_accepted_and_fails_at_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("No operator found for\n  `memory_efficient_attention_forward` " + "x" * 500)

    replace_backend(monkeypatch, "_native_math", fail)
    trial = try_attention("_native_math", CPU, torch.float32)
    assert trial.error is None and trial.reason and len(trial.reason) < 200
    assert trial.reason.startswith("No operator found for `memory")


def test_a_backend_without_a_backward_pass_samples_and_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward_only(query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
        parts = [part.detach().transpose(1, 2) for part in (query, key, value)]
        return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)

    replace_backend(monkeypatch, "_native_math", forward_only)
    trial = try_attention("_native_math", CPU, torch.float32)
    assert trial.runs and not trial.trains and not trial.is_wrong and trial.reason


@pytest.mark.parametrize("fault", [0.01, torch.nan], ids=["off", "nan"])
def test_a_backend_with_other_values_is_wrong(monkeypatch: pytest.MonkeyPatch, fault: float) -> None:
    native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
    replace_backend(monkeypatch, "_native_math", lambda **kwargs: native(**kwargs) + fault)
    trial = try_attention("_native_math", CPU, torch.float32)
    assert trial.is_wrong and not trial.runs and not trial.trains


def test_gradients_count_too() -> None:
    assert AttentionTrial(error=0.0, gradient_error=1.0, tolerance=0.1).is_wrong
    assert AttentionTrial(error=0.0, gradient_error=1.0, tolerance=0.1).runs
