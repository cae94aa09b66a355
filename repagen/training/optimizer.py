"""AdamW, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from repagen.training.config import require


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
    """AdamW and its schedule.

    Attributes:
        learning_rate: peak learning rate.
        beta1, beta2, epsilon, weight_decay: of AdamW; biases and other vectors get no weight decay.
        max_grad_norm: gradients are scaled down to this global norm; None: never.
        schedule: the learning rate over the steps.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def validate(self) -> None:
        """Check the ranges."""
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        require(0 <= self.beta1 < 1, "beta1", self.beta1, "at least 0 and below 1")
        require(0 <= self.beta2 < 1, "beta2", self.beta2, "at least 0 and below 1")
        require(self.epsilon > 0, "epsilon", self.epsilon, "above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0")


def build_optimizer(modules: Iterable[nn.Module], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in two groups: matrices with weight decay, vectors without."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,  # one kernel per group, on a CPU too
    )


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


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group the learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = value
