from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from repagen.training.optimizer import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate, schedule_share


def test_constant_schedule_after_warmup() -> None:
    schedule = ScheduleConfig(warmup_steps=4)
    assert [schedule_share(schedule, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_between_steps() -> None:
    # RAE's DiT^DH: constant for 40 epochs, then linearly to a tenth of the peak.
    schedule = ScheduleConfig("linear", decay_start_step=40, decay_end_step=80, final_share=0.1)
    shares = [schedule_share(schedule, step, 1000) for step in (0, 40, 60, 80, 999)]
    assert shares == pytest.approx([1.0, 1.0, 0.55, 0.1, 0.1])


def test_cosine_decay_ends_with_the_run() -> None:
    schedule = ScheduleConfig("cosine", warmup_steps=10)
    assert schedule_share(schedule, 10, 110) == 1.0
    assert schedule_share(schedule, 60, 110) == pytest.approx(0.5)
    assert schedule_share(schedule, 110, 110) == pytest.approx(0.0)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_never_rises(kind: str) -> None:
    schedule = ScheduleConfig(kind, warmup_steps=3, final_share=0.2)  # type: ignore[arg-type]
    shares = [schedule_share(schedule, step, 50) for step in range(2, 60)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(0.2)


def test_learning_rate_scales_the_share() -> None:
    config = OptimizerConfig(learning_rate=2e-4, schedule=ScheduleConfig(warmup_steps=2))
    assert learning_rate(config, 0, 10) == 1e-4


def test_only_matrices_decay() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    module[0].weight.data.fill_(1.0)
    module[0].bias.data.fill_(1.0)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    optimizer = build_optimizer([module, frozen], OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(module[0].weight, torch.full((2, 3), 1.0 - 0.1 * 0.5))
    assert torch.equal(module[0].bias, torch.ones(2))


def test_step_follows_adamw() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    module = nn.ParameterList([parameter])
    optimizer = build_optimizer([module], OptimizerConfig(learning_rate=0.1, beta1=0.8, beta2=0.9, epsilon=1e-6))
    parameter.grad = torch.full((2, 2), 3.0)
    optimizer.step()  # bias-corrected first step: lr * g / (|g| + eps)
    assert torch.allclose(parameter, torch.full((2, 2), -0.1 * 3.0 / (3.0 + 1e-6)))
    assert math.isclose(optimizer.state[parameter]["exp_avg"][0, 0].item(), 0.2 * 3.0, rel_tol=1e-6)
