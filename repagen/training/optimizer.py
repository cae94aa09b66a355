"""AdamW, its state in 8 bits where asked for, or Muon with AdamW; and the learning rate as a function of the step."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from repagen.config import require
from repagen.errors import UserError


@dataclass
class ScheduleConfig:
    """Learning rate over the steps, as a share of the peak: linear warm-up, constant, then a decay.

    Attributes:
        kind: shape of the decay; `constant` has none.
        warmup_steps: step i < warmup_steps uses the share (i + 1) / warmup_steps.
        decay_start_step: first step of the decay; None: the end of the warm-up.
        decay_end_step: from this step on the share is `final_share`; None: the run's max_steps.
        final_share: share of the peak at the end of the decay.
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    decay_start_step: int | None = None
    decay_end_step: int | None = None
    final_share: float = 0.0

    def validate(self) -> None:
        """Check the ranges."""
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        require(0.0 <= self.final_share <= 1.0, "final_share", self.final_share, "in [0, 1]")
        start = self.warmup_steps if self.decay_start_step is None else self.decay_start_step
        require(start >= self.warmup_steps, "decay_start_step", start, "at least warmup_steps")
        if self.decay_end_step is not None:
            require(self.decay_end_step > start, "decay_end_step", self.decay_end_step, "after the start of the decay")


@dataclass
class OptimizerConfig:
    """The optimiser and its schedule.

    Attributes:
        name: `adamw`; `adamw8bit`, whose state takes a quarter of the memory (2110.02861, of bitsandbytes); or `muon`:
            Muon for every parameter of two dimensions and AdamW for the rest, as RAEv2 trains. Fine-tuning takes
            `auto` too: `adamw8bit` on a CUDA GPU where bitsandbytes is installed, else `adamw`.
        learning_rate: peak learning rate, the same for both parts of `muon`, whose update is scaled to the size of
            AdamW's.
        beta1, beta2, epsilon: of AdamW.
        weight_decay: decoupled; biases and other vectors get none.
        momentum: of Muon (Nesterov's).
        max_grad_norm: gradients are scaled down to this global norm; None: never.
        schedule: the learning rate over the steps.
    """

    name: Literal["adamw", "adamw8bit", "muon", "auto"] = "adamw"
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.95
    max_grad_norm: float | None = 1.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def validate(self) -> None:
        """Check the ranges."""
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        require(0 <= self.beta1 < 1, "beta1", self.beta1, "at least 0 and below 1")
        require(0 <= self.beta2 < 1, "beta2", self.beta2, "at least 0 and below 1")
        require(self.epsilon > 0, "epsilon", self.epsilon, "above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "at least 0 and below 1")
        require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0")


class MuonWithAdamW:
    """Muon for matrices and AdamW for everything else, as one optimiser with one learning rate.

    Muon (Jordan et al. 2024) replaces the momentum of a matrix by its nearest orthogonal matrix, found by five
    Newton-Schulz iterations. The update is scaled by 0.2 sqrt(max(rows, columns)), so that its entries have the size
    of AdamW's (Liu et al. 2025, 2502.16982). RAEv2's released trainer iterates with the Polar Express coefficients;
    here they are those of `torch.optim.Muon`.

    Args:
        matrices: parameters of two dimensions.
        others: groups of all other parameters, as `torch.optim.AdamW` takes them.
        config: of both.
    """

    def __init__(
        self, matrices: Sequence[nn.Parameter], others: Sequence[dict[str, Any]], config: OptimizerConfig
    ) -> None:
        self._parts: dict[str, torch.optim.Optimizer] = {}  # those that have parameters
        if matrices:
            self._parts["muon"] = torch.optim.Muon(
                matrices,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        if any(group["params"] for group in others):
            self._parts["adamw"] = _adamw(others, config)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both parts."""
        return [group for part in self._parts.values() for group in part.param_groups]

    def step(self) -> None:
        """Take one step with the gradients at hand."""
        for part in self._parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for part in self._parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """=> {"muon": state, "adamw": state}, of those that have parameters."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])


Optimizer = torch.optim.Optimizer | MuonWithAdamW


def resolve_optimizer(config: OptimizerConfig, device: str) -> OptimizerConfig:
    """The configuration with a name in place of `auto`; what it names can be used here.

    Args:
        config: as given.
        device: `auto` or `cpu`, as a run's.

    Raises:
        UserError: `adamw8bit`, and bitsandbytes is not installed.
    """
    if config.name == "adamw8bit":
        _require_bitsandbytes()
    if config.name != "auto":
        return config
    eight_bit = device != "cpu" and torch.cuda.is_available() and _has_bitsandbytes()
    return replace(config, name="adamw8bit" if eight_bit else "adamw")


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _require_bitsandbytes() -> None:
    if not _has_bitsandbytes():
        raise UserError(
            "optimizer.name: adamw8bit needs bitsandbytes, which is not installed; pip install bitsandbytes, or set "
            "optimizer.name=adamw"
        )


def build_optimizer(modules: Iterable[nn.Module], config: OptimizerConfig) -> Optimizer:
    """The configured optimiser over the trainable parameters; vectors get no weight decay."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    vectors = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    if config.name == "auto":
        raise UserError("optimizer.name: auto is for fine-tuning; allowed here: adamw, adamw8bit, muon")
    if config.name != "muon":
        return _adamw([{"params": [p for p in parameters if p.ndim > 1]}, vectors], config)
    kernels = {"params": [p for p in parameters if p.ndim > 2]}  # convolutions
    return MuonWithAdamW([p for p in parameters if p.ndim == 2], [kernels, vectors], config)


def state_bytes(modules: Iterable[nn.Module], config: OptimizerConfig) -> int:
    """Memory of the optimiser's state: two moments in float32 or 8 bits, or Muon's one of a matrix, about."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    if config.name == "adamw8bit":
        return sum(p.numel() * (2 if p.numel() >= 4096 else 8) for p in parameters)  # small ones stay in float32
    return sum(p.numel() * (4 if config.name == "muon" and p.ndim == 2 else 8) for p in parameters)


def _adamw(groups: Sequence[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {
        "params": [group for group in groups if group["params"]],
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw8bit":
        _require_bitsandbytes()
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(**arguments)
    return torch.optim.AdamW(**arguments, fused=True)  # one kernel per group, on a CPU too


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """The learning rate of optimiser step `step` = 0, 1, ... of a run of `max_steps`."""
    return config.learning_rate * schedule_share(config.schedule, step, max_steps)


def schedule_share(schedule: ScheduleConfig, step: int, max_steps: int) -> float:
    """Share of the peak learning rate at step 0, 1, ...; a pure function, so resuming needs no scheduler state."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    start = schedule.warmup_steps if schedule.decay_start_step is None else schedule.decay_start_step
    end = max_steps if schedule.decay_end_step is None else schedule.decay_end_step
    progress = min(max((step - start) / max(end - start, 1), 0.0), 1.0)
    remaining = 1.0 - progress if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.final_share + (1.0 - schedule.final_share) * remaining


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Give every parameter group the learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = value
