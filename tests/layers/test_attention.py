"""Attention against its formula, and the early refusal of backends that cannot run."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import re
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from repagen.layers.attention import Attention, AttentionBackendMixin, check_attention_backend
from repagen.layers.rope import RotaryTable, apply_rotary


class Model(AttentionBackendMixin, ModelMixin, ConfigMixin):
    """One attention layer as a diffusers model."""

    @register_to_config
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.attn = Attention(dim, 2)


def installed(monkeypatch: pytest.MonkeyPatch, *packages: str, cuda: bool) -> None:
    """Pretend that exactly these packages, and CUDA or not, are there."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in packages else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", "xformers" in packages)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("qk_norm", [None, "layer", "rms"])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_formula(rotary: bool, qk_norm: Any, bias: bool) -> None:
    attention = Attention(24, 3, bias=bias, qk_norm=qk_norm)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    table = RotaryTable((2, 3), 8) if rotary else None
    x = torch.randn(2, 6, 24)

    query, key, value = (
        linear(x).unflatten(-1, (3, 8)) for linear in (attention.to_q, attention.to_k, attention.to_v)
    )
    if qk_norm:
        query, key = attention.norm_q(query), attention.norm_k(key)
    if table:
        query, key = (apply_rotary(t, table.cos, table.sin) for t in (query, key))
    weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) * 8**-0.5).softmax(-1)
    expected = attention.to_out[0](torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2))

    arguments = (table.cos, table.sin) if table else ()
    assert torch.allclose(attention(x, *arguments), expected, atol=1e-5)
    attention.fuse_projections()
    assert torch.allclose(attention(x, *arguments), expected, atol=1e-5)


def restated(attention: Attention, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention row by row, over the keys of `text` that count."""
    rows = []
    for row in range(len(x)):
        query = attention.to_q(x[row]).unflatten(-1, (3, 8))
        key, value = (
            linear(text[row][mask[row]]).unflatten(-1, (3, 8)) for linear in (attention.to_k, attention.to_v)
        )
        weights = (torch.einsum("qhd,khd->hqk", query, key) * 8**-0.5).softmax(-1)
        rows.append(attention.to_out[0](torch.einsum("hqk,khd->qhd", weights, value).flatten(1)))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_mask_leaves_keys_out(across: bool, backend: str) -> None:
    attention = Attention(24, 3, is_cross_attention=across)
    x = torch.randn(2, 6, 24)
    text = torch.randn(2, 4, 24) if across else x
    mask = torch.arange(text.shape[1]) < torch.tensor([[2], [3]])
    options = {"attention_mask": mask[:, None, None], "encoder_hidden_states": text if across else None}
    expected = restated(attention, x, text, mask)
    attention.set_attention_backend(backend)
    assert torch.allclose(attention(x, **options), expected, atol=1e-5)
    attention.fuse_projections()
    assert torch.allclose(attention(x, **options), expected, atol=1e-5)


def test_xformers_gets_a_mask_of_two_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four dimensions, diffusers would cast a boolean one to 0 and 1 and add it."""
    given = []
    monkeypatch.setattr(
        "repagen.layers.attention.dispatch_attention_fn", lambda *args, **more: given.append(more) or args[0]
    )
    attention = Attention(24, 3)
    attention.processor._attention_backend = AttentionBackendName.XFORMERS
    mask = torch.tensor([[True, False, True], [True, True, True]])
    attention(torch.randn(2, 3, 24), attention_mask=mask[:, None, None])
    assert torch.equal(given[0]["attn_mask"], mask)


def test_backends_without_masks_refuse_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([[True, False], [True, True]])[:, None, None]
    monkeypatch.setattr("repagen.layers.attention.dispatch_attention_fn", lambda *args, **more: args[0])
    refused = set()
    for backend in AttentionBackendName:
        attention = Attention(24, 3)
        attention.processor._attention_backend = backend
        attention(torch.randn(2, 2, 24), attention_mask=torch.ones_like(mask))
        try:
            attention(torch.randn(2, 2, 24), attention_mask=mask)
        except ValueError as error:
            assert "\n" not in str(error) and f"{backend.value!r} cannot leave out padding" in str(error)
            refused.add(backend.value)
    source = inspect.getsource(attention_dispatch)
    functions = source.split("@_AttentionBackendRegistry.register(")[1:]
    refusing = [f for f in functions if re.search(r"if attn_mask is not None:\s+raise ValueError", f)]
    names = {re.search(r"AttentionBackendName\.(\w+)", function)[1] for function in refusing}
    assert refused == {AttentionBackendName[name].value for name in names}


def test_state_keys_are_those_of_diffusers() -> None:
    keys = set(Attention(8, 2, bias=False).state_dict())
    assert keys == {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"}


def test_head_count_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 10 is not a multiple of the number of heads 3"):
        Attention(10, 3)


def test_every_backend_of_diffusers_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without packages and CUDA only PyTorch's own backends remain; all others are refused before a forward pass."""
    installed(monkeypatch, cuda=False)
    usable = set()
    for backend in AttentionBackendName:
        try:
            check_attention_backend(backend.value)
            usable.add(backend.value)
        except (ValueError, ModuleNotFoundError) as error:
            assert "\n" not in str(error) and repr(backend.value) in str(error)
    assert usable == {"native", "flex", "_native_flash", "_native_math"}


def test_absent_package_and_absent_cuda_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, cuda=True)
    with pytest.raises(
        ModuleNotFoundError, match="'xformers' needs the package xformers, which is not installed"
    ) as e:
        check_attention_backend("xformers")
    assert e.value.name == "xformers"
    for backend, package in (
        ("flash", "flash_attn"),
        ("flash_hub", "kernels"),
        ("_sage_qk_int8_pv_fp8_cuda", "sageattention"),
    ):
        with pytest.raises(ModuleNotFoundError, match=f"needs the package {package}"):
            check_attention_backend(backend)
    installed(monkeypatch, "xformers", cuda=False)
    with pytest.raises(ValueError, match=r"'xformers' runs on CUDA only, and torch.cuda.is_available"):
        check_attention_backend("xformers")
    installed(monkeypatch, "xformers", cuda=True)
    check_attention_backend("xformers")
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", False)
    with pytest.raises(ValueError, match=r"'xformers': .*version is too old"):
        check_attention_backend("xformers")


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention backend 'fast' does not exist; allowed are auto, .*native"):
        Model().set_attention_backend("fast")


def test_refused_backend_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "xformers", cuda=False)
    model = Model()
    with pytest.raises(ValueError, match="CUDA only"):
        model.set_attention_backend("xformers")
    assert model.attn.processor._attention_backend is None


def test_choice_stays_with_the_model() -> None:
    one, other = Model(), Model()
    default = _AttentionBackendRegistry._active_backend
    one.set_attention_backend("_native_math")
    assert one.attn.processor._attention_backend == "_native_math"
    assert other.attn.processor._attention_backend is None
    assert _AttentionBackendRegistry._active_backend == default
    one.reset_attention_backend()
    assert one.attn.processor._attention_backend is None


def test_auto_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    installed(monkeypatch, cuda=False)
    model = Model()
    with caplog.at_level(logging.WARNING, logger="repagen"):
        model.set_attention_backend("auto")
    assert model.attn.processor._attention_backend == "native"
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("repagen")]
    assert len(warnings) == 1 and warnings[0].startswith("attention backend 'auto' takes 'native': ")


def test_xformers_switch_of_models_and_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipeline(DiffusionPipeline):
        def __init__(self, model: Model) -> None:
            super().__init__()
            self.register_modules(model=model)

    model = Model()
    for owner in (model, Pipeline(model)):
        installed(monkeypatch, cuda=False)
        with pytest.raises(ModuleNotFoundError, match="needs the package xformers"):
            owner.enable_xformers_memory_efficient_attention()
        installed(monkeypatch, "xformers", cuda=False)
        with pytest.raises(ValueError, match="CUDA only"):
            owner.enable_xformers_memory_efficient_attention()
        assert model.attn.processor._attention_backend is None
        installed(monkeypatch, "xformers", cuda=True)
        owner.enable_xformers_memory_efficient_attention()
        assert model.attn.processor._attention_backend == "xformers"
        owner.disable_xformers_memory_efficient_attention()
        assert model.attn.processor._attention_backend is None
        with pytest.raises(ValueError, match="attention_op: not supported"):
            owner.enable_xformers_memory_efficient_attention(attention_op=object())
