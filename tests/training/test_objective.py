from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from repagen.flow.conditions import ConditionDropout, Conditions
from repagen.flow.path import interpolate
from repagen.flow.time import TimeDistribution, TimeShift
from repagen.models.transformer_sit import SiTTransformer2DModel
from repagen.randomness import generator_for
from repagen.training.generator_config import LossConfig
from repagen.training.noising import FlowMatching, FlowSample, flow_losses
from repagen.training.objective import GeneratorObjective, weighted_sum

SHAPE = (3, 2, 2)
KEPT = ConditionDropout.of_classes(10, 0.0)
FLOW = FlowMatching(TimeDistribution(), ConditionDropout.of_classes(10, 0.5))


def generators(positions: range) -> list[torch.Generator]:
    return [generator_for(0, "flow", position) for position in positions]


def draw(positions: range, label_dropout: float = 0.5, num_classes: int = 10) -> FlowSample:
    latents = torch.stack([torch.full(SHAPE, float(position)) for position in positions])
    labels = torch.arange(len(positions)) % max(num_classes, 1)
    dropout = ConditionDropout.of_classes(num_classes, label_dropout)
    conditions = Conditions(labels) if num_classes else Conditions()
    return FlowMatching(TimeDistribution(), dropout).draw(latents, conditions, generators(positions))


def test_draws_belong_to_the_position_not_to_the_batch() -> None:
    whole, part = draw(range(8)), draw(range(5, 8))
    assert torch.equal(whole.t[5:], part.t)
    assert torch.equal(whole.noisy[5:], part.noisy)


def test_drawn_point_lies_on_the_path() -> None:
    flow = draw(range(6))
    assert torch.equal(flow.noisy, interpolate(flow.latents, flow.noise, flow.t))
    assert torch.equal(flow.velocity, flow.noise - flow.latents)
    assert torch.equal(flow.timestep, flow.t)
    assert flow.t.min() >= 0 and flow.t.max() <= 1


def test_labels_are_dropped_at_the_rate_to_the_null_label() -> None:
    flow = draw(range(4000), label_dropout=0.1)
    labels = flow.conditions.labels
    assert labels is not None
    share = (labels == 10).float().mean().item()
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / 4000)
    assert torch.equal(labels[labels != 10], (torch.arange(4000) % 10)[labels != 10])


def test_no_classes_no_labels() -> None:
    assert draw(range(3), num_classes=0).conditions == Conditions()


def test_exact_predictions_have_no_loss() -> None:
    flow = draw(range(5))
    assert flow_losses(flow.velocity, flow, "velocity").abs().max() == 0
    assert flow_losses(flow.latents, flow, "sample").abs().max() == 0


def test_sample_loss_is_the_velocity_loss_with_a_clamped_time() -> None:
    flow = draw(range(5))
    flow = FlowSample(flow.latents, flow.noisy, flow.noise, torch.tensor([0.001, 0.02, 0.05, 0.5, 1.0]), Conditions())
    losses = flow_losses(flow.latents + 0.3, flow, "sample")
    expected = (0.3 / torch.tensor([0.05, 0.05, 0.05, 0.5, 1.0])) ** 2
    assert torch.allclose(losses, expected, rtol=1e-3)


def test_new_model_loses_the_energy_of_the_velocity() -> None:
    model = SiTTransformer2DModel(sample_size=2, patch_size=1, in_channels=3, hidden_size=8, depth=1, num_heads=2)
    model.initialize_weights()
    flow = draw(range(4))
    losses = GeneratorObjective(model, FLOW)(flow, {})
    assert losses.keys() == {"flow"}
    assert torch.allclose(losses["flow"], flow.velocity.square().flatten(1).mean(1))


def test_losses_are_float32_under_autocast() -> None:
    model = SiTTransformer2DModel(sample_size=2, patch_size=1, in_channels=3, hidden_size=8, depth=1, num_heads=2)
    nn.init.normal_(model.proj_out.weight)
    losses = GeneratorObjective(model, FLOW)(draw(range(4)), {}, (), torch.autocast("cpu", torch.bfloat16))
    assert losses["flow"].dtype == torch.float32


def test_shift_moves_the_drawn_times() -> None:
    plain, shifted = TimeDistribution(), TimeDistribution(shift=TimeShift(4.0))
    latents, dropout = torch.zeros(6, *SHAPE), ConditionDropout.of_classes(0, 0.0)
    draws = [
        FlowMatching(times, dropout).draw(latents, Conditions(), generators(range(6))).t for times in (plain, shifted)
    ]
    assert torch.allclose(TimeShift(4.0)(draws[0]), draws[1])


def test_direction_loss_sees_angles_alone() -> None:
    flow = draw(range(5))
    process = FlowMatching(TimeDistribution(), KEPT, direction_loss=True)

    def direction(prediction: torch.Tensor) -> torch.Tensor:
        return process.losses(SimpleNamespace(sample=prediction), flow, "velocity")["direction"]

    assert direction(3 * flow.velocity).abs().max() < 1e-6
    assert torch.allclose(direction(-flow.velocity), torch.full((5,), 2.0))
    across = torch.stack([flow.velocity[:, 1], -flow.velocity[:, 0], torch.zeros(5, 2, 2)], dim=1)
    assert torch.allclose(direction(across), torch.ones(5), atol=1e-6)


def test_base_head_has_the_error_of_the_last_layer() -> None:
    flow = draw(range(5))
    output = SimpleNamespace(sample=flow.latents, base_sample=flow.latents + 0.3)
    losses = FLOW.losses(output, flow, "sample")
    assert losses["flow"].abs().max() == 0
    assert torch.allclose(losses["base"], (0.3 / flow.t.clamp(min=0.05)) ** 2, rtol=1e-3)


def test_students_of_a_looped_network_leave_after_their_own_number_of_loops() -> None:
    process = FlowMatching(TimeDistribution(), KEPT, num_loops=4)
    latents, labels = torch.zeros(600, *SHAPE), Conditions(torch.zeros(600, dtype=torch.long))
    whole = process.draw(latents, labels, generators(range(600)))
    part = process.draw(latents[:5], Conditions(labels.labels[:5]), generators(range(595, 600)))
    assert whole.student_loops is not None and part.student_loops is not None
    assert torch.equal(whole.student_loops[595:], part.student_loops)
    shares = torch.bincount(whole.student_loops, minlength=5) / 600
    assert shares[0] == shares[4] == 0 and (shares[1:4] - 1 / 3).abs().max() < 4 * math.sqrt(2 / 9 / 600)
    plain = FlowMatching(TimeDistribution(), KEPT).draw(latents, labels, generators(range(600)))
    assert torch.equal(plain.noisy, whole.noisy)

    every = tuple(torch.full_like(whole.velocity, float(loop)) for loop in (1, 2, 3))
    teacher = torch.full_like(whole.velocity, 4.0).requires_grad_()
    losses = process.losses(SimpleNamespace(sample=teacher, loop_samples=every), whole, "velocity")
    left = whole.student_loops.float()
    expected = (left.reshape(-1, 1, 1, 1) - whole.velocity).square().flatten(1).mean(1)
    assert torch.allclose(losses["student"], expected)
    assert losses["distillation"].item() == pytest.approx((4 - left).square().mean().item(), rel=1e-5)
    assert not losses["distillation"].requires_grad  # the teacher learns nothing from its student


def test_weighted_sum() -> None:
    losses = {"flow": torch.tensor([1.0, 3.0]), "base": torch.tensor([2.0, 4.0]), "dispersive": torch.tensor(-1.0)}
    total, by_sample = weighted_sum(losses, {"flow": 1.0, "base": 0.5, "dispersive": 2.0, "student": 1.0})
    assert total.item() == pytest.approx(2.0 + 1.5 - 2.0)
    assert by_sample.tolist() == [2.0, 5.0]


def test_weights_of_the_student_move_from_the_target_to_the_teacher() -> None:
    weights = [LossConfig(distillation=0.8).at(step, 100) for step in (0, 25, 100)]
    assert [w["student"] for w in weights] == pytest.approx([0.8, 0.6, 0.0])
    assert [w["distillation"] for w in weights] == pytest.approx([0.0, 0.2, 0.8])
    assert all(w["flow"] == w["epsilon"] == w["base"] == 1.0 for w in weights)
