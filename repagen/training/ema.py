"""Exponential moving average of a model's weights, in float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from repagen.config import require
from repagen.errors import UserError


@dataclass
class EmaConfig:
    """How fast the average follows the weights.

    Attributes:
        decay: share of the old average kept at each step. Papers: 0.9999 (SiT, REPA), 0.9995 (RAE's DiT^DH), 0.9978
            (RAE's decoder).
        warmup: for short runs, use min(decay, (1 + i) / (10 + i)) at update i = 0, 1, ..., so that the random initial
            weights are forgotten quickly; the papers' runs use the constant.
    """

    decay: float = 0.9999
    warmup: bool = False

    def validate(self) -> None:
        """Check the ranges."""
        require(0.0 <= self.decay < 1.0, "decay", self.decay, "at least 0 and below 1")

    def decay_at(self, update: int) -> float:
        """The decay of update number 0, 1, ..."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay


class Averaged(Protocol):
    """What can be averaged: a module, or some of its parameters."""

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state: Any, /) -> Any: ...  # noqa: D102


class Ema:
    """Float32 shadow of a model's trainable parameters; frozen parameters and buffers are copied as they are.

    The decay is a function of the number of updates alone, and the number is part of the state.
    """

    def __init__(self, model: Averaged, config: EmaConfig) -> None:
        self.config = config
        self.updates = 0
        self._shadow = {
            name: tensor.detach().clone().float() if _is_averaged(tensor) else tensor.detach().clone()
            for name, tensor in model.state_dict(keep_vars=True).items()
        }

    @torch.no_grad()
    def update(self, model: Averaged) -> None:
        """shadow <- decay * shadow + (1 - decay) * weights."""
        averaged, weights = [], []
        for name, tensor in model.state_dict(keep_vars=True).items():
            if _is_averaged(tensor):
                averaged.append(self._shadow[name])
                weights.append(tensor.detach().float())
            else:
                self._shadow[name].copy_(tensor)
        torch._foreach_lerp_(averaged, weights, 1.0 - self.config.decay_at(self.updates))
        self.updates += 1

    def teacher(self, model: nn.Module) -> nn.Module:
        """A copy of the model that holds the averaged weights themselves, so that it follows every update."""
        copied = copy.deepcopy(model)
        copied.load_state_dict(self._shadow, assign=True)
        return copied.requires_grad_(False).eval()

    @contextmanager
    @torch.no_grad()
    def swapped(self, model: Averaged) -> Iterator[None]:
        """Within the context the model holds the averaged weights; its own come back at the end, bit for bit."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self._shadow)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        """=> {"updates": count, "shadow": the averaged state dict}."""
        return {"updates": self.updates, "shadow": self._shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state; every tensor must be there with its shape."""
        saved = state["shadow"]
        for name in self._shadow.keys() ^ saved.keys():
            raise UserError(f"the EMA weights in the checkpoint do not fit this model: {name} is on one side only")
        for name, tensor in self._shadow.items():
            tensor.copy_(saved[name])
        self.updates = state["updates"]


def _is_averaged(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad
