from __future__ import annotations

import math

import torch
from torch import nn

from repagen.flow.path import interpolate
from repagen.flow.time import TimeDistribution, TimeShift
from repagen.models.transformer_sit import SiTTransformer2DModel
from repagen.randomness import generator_for
from repagen.training.objective import FlowSample, GeneratorObjective, draw_flow_sample, flow_losses

SHAPE = (3, 2, 2)


def generators(positions: range) -> list[torch.Generator]:
    return [generator_for(0, "flow", position) for position in positions]


def draw(positions: range, label_dropout: float = 0.5, num_classes: int = 10) -> FlowSample:
    latents = torch.stack([torch.full(SHAPE, float(position)) for position in positions])
    labels = torch.arange(len(positions)) % max(num_classes, 1)
    return draw_flow_sample(
        latents,
        labels,
        generators(positions),
        TimeDistribution(),
        num_classes=num_classes,
        label_dropout=label_dropout,
    )


def test_draws_belong_to_the_position_not_to_the_batch() -> None:
    whole, part = draw(range(8)), draw(range(5, 8))
    assert torch.equal(whole.t[5:], part.t)
    assert torch.equal(whole.noisy[5:], part.noisy)


def test_drawn_point_lies_on_the_path() -> None:
    flow = draw(range(6))
    noise = flow.velocity + flow.latents
    assert torch.allclose(flow.noisy, interpolate(flow.latents, noise, flow.t), atol=1e-5)
    assert flow.t.min() >= 0 and flow.t.max() <= 1


def test_labels_are_dropped_at_the_rate_to_the_null_label() -> None:
    flow = draw(range(4000), label_dropout=0.1)
    assert flow.labels is not None
    share = (flow.labels == 10).float().mean().item()
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / 4000)
    assert torch.equal(flow.labels[flow.labels != 10], (torch.arange(4000) % 10)[flow.labels != 10])


def test_no_classes_no_labels() -> None:
    assert draw(range(3), num_classes=0).labels is None


def test_exact_predictions_have_no_loss() -> None:
    flow = draw(range(5))
    assert flow_losses(flow.velocity, flow, "velocity").abs().max() == 0
    assert flow_losses(flow.latents, flow, "sample").abs().max() == 0


def test_sample_loss_is_the_velocity_loss_with_a_clamped_time() -> None:
    flow = draw(range(5))
    flow = FlowSample(flow.latents, flow.noisy, torch.tensor([0.001, 0.02, 0.05, 0.5, 1.0]), None, flow.velocity)
    losses = flow_losses(flow.latents + 0.3, flow, "sample")
    expected = (0.3 / torch.tensor([0.05, 0.05, 0.05, 0.5, 1.0])) ** 2
    assert torch.allclose(losses, expected, rtol=1e-3)


def test_new_model_loses_the_energy_of_the_velocity() -> None:
    model = SiTTransformer2DModel(sample_size=2, patch_size=1, in_channels=3, hidden_size=8, depth=1, num_heads=2)
    model.initialize_weights()
    flow = draw(range(4))
    losses, aligned = GeneratorObjective(model)(flow)
    assert aligned is None
    assert torch.allclose(losses, flow.velocity.square().flatten(1).mean(1))


def test_losses_are_float32_under_autocast() -> None:
    model = SiTTransformer2DModel(sample_size=2, patch_size=1, in_channels=3, hidden_size=8, depth=1, num_heads=2)
    nn.init.normal_(model.proj_out.weight)
    losses, _ = GeneratorObjective(model)(draw(range(4)), None, torch.autocast("cpu", torch.bfloat16))
    assert losses.dtype == torch.float32


def test_shift_moves_the_drawn_times() -> None:
    plain, shifted = TimeDistribution(), TimeDistribution(shift=TimeShift(4.0))
    latents, labels = torch.zeros(6, *SHAPE), torch.zeros(6, dtype=torch.long)
    draws = [
        draw_flow_sample(latents, labels, generators(range(6)), times, num_classes=1, label_dropout=0.0).t
        for times in (plain, shifted)
    ]
    assert torch.allclose(TimeShift(4.0)(draws[0]), draws[1])
