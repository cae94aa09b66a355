"""The scale that one call gives to LoRA layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

from torch import nn

from repagen.errors import UserError


def apply_lora_scale(forward: Callable[..., Any]) -> Any:
    """Let `attention_kwargs={"scale": s}` of a forward multiply what its active adapters add, in this call only.

    diffusers' decorator of that name divides by the scale afterwards, which after a scale of 0 resets the weights that
    `set_adapters` gave; here they are put back as they were.
    """

    @functools.wraps(forward)
    def scaled_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        scale = (kwargs.get("attention_kwargs") or {}).get("scale", 1.0)
        if scale == 1.0:
            return forward(model, *args, **kwargs)
        with _scaled_adapters(model, scale):
            return forward(model, *args, **kwargs)

    return scaled_forward


def check_attention_kwargs(attention_kwargs: Mapping[str, Any] | None) -> None:
    """Refuse what `apply_lora_scale` would pass over, or fail at.

    Raises:
        UserError: no mapping, another key than "scale", or a scale that is no finite number.
    """
    if not isinstance(attention_kwargs, Mapping | None):
        raise UserError(f"attention_kwargs is {attention_kwargs!r}; give a dict, as {{'scale': 0.5}}, or None")
    unknown = sorted(map(repr, set(attention_kwargs or {}) - {"scale"}))
    if unknown:
        raise UserError(f"attention_kwargs has {', '.join(unknown)}; allowed: 'scale', which multiplies LoRA layers")
    scale = (attention_kwargs or {}).get("scale", 1.0)
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise UserError(f"attention_kwargs: scale is {scale!r}; give a finite number, as in {{'scale': 0.5}}")


@contextmanager
def _scaled_adapters(model: nn.Module, scale: float) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer.scaling for layer in layers]
    for layer in layers:
        active = set(layer.active_adapters)
        layer.scaling = {name: s * scale if name in active else s for name, s in layer.scaling.items()}
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling
