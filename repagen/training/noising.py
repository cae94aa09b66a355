"""Noisy latents of one micro-batch, drawn sample by sample from keyed generators; the flow's path and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from repagen.flow.conditions import ConditionDropout, Conditions
from repagen.flow.distillation import loop_distillation_loss
from repagen.flow.path import PredictionType, interpolate, to_velocity, velocity_target
from repagen.flow.time import TimeDistribution
from repagen.randomness import normal_per_sample, uniform_per_sample


@dataclass(frozen=True)
class NoisySample:
    """Noisy latents of one micro-batch.

    Attributes:
        latents: x (B, C, h, w) float32, standardised.
        noisy: x_t (B, C, h, w) float32.
        noise: (B, C, h, w) float32, standard normal.
        t: (B,) float32 in [0, 1]; 0 = data, 1 = noise.
        conditions: what the generator is told of each sample, the null condition where dropped.
    """

    latents: torch.Tensor
    noisy: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    conditions: Conditions

    @property
    def timestep(self) -> torch.Tensor:
        """What the network is given as time, (B,)."""
        return self.t


@dataclass(frozen=True)
class FlowSample(NoisySample):
    """A sample on the straight path x_t = (1 - t) x + t noise.

    Attributes:
        student_loops: (B,) int64, after how many loops of a looped network each sample's student leaves; None for
            other networks.
    """

    student_loops: torch.Tensor | None = None

    @property
    def velocity(self) -> torch.Tensor:
        """Noise - x, (B, C, h, w)."""
        return velocity_target(self.latents, self.noise)


class NoiseProcess(Protocol):
    """How latents are made noisy, and what the network's prediction of it loses."""

    def draw(
        self, latents: torch.Tensor, conditions: Conditions, generators: Sequence[torch.Generator]
    ) -> NoisySample:
        """Draw time, dropout of conditions and noise of each sample, in this order, from its own generator."""

    def losses(self, output: Any, sample: Any, prediction_type: PredictionType) -> dict[str, torch.Tensor]:
        """Losses by name, each (B,) float32, or a scalar for the mean."""


@dataclass(frozen=True)
class FlowMatching:
    """Flow matching on the straight path (SiT 2401.08740, RAE 2510.11690).

    Attributes:
        times: law of t.
        dropout: of conditions.
        num_loops: of a looped network (ELT); None for others.
        direction_loss: compute the loss of the velocity's direction too.
    """

    times: TimeDistribution
    dropout: ConditionDropout
    num_loops: int | None = None
    direction_loss: bool = False

    def draw(self, latents: torch.Tensor, conditions: Conditions, generators: Sequence[torch.Generator]) -> FlowSample:
        """Draw time, dropout of conditions, noise and loops of each sample, in this order, from its own generator.

        Args:
            latents: x (B, C, h, w).
            conditions: of the samples.
            generators: one per sample, on the latents' device.
        """
        t = self.times.from_uniform(uniform_per_sample(generators))
        kept = self.dropout(conditions, generators)
        noise = normal_per_sample(generators, latents.shape[1:])
        loops = None
        if self.num_loops is not None and self.num_loops > 1:
            loops = 1 + (uniform_per_sample(generators) * (self.num_loops - 1)).long()
        return FlowSample(latents, interpolate(latents, noise, t), noise, t, kept, loops)

    def losses(self, output: Any, sample: FlowSample, prediction_type: PredictionType) -> dict[str, torch.Tensor]:
        """Losses by name, each (B,) float32, or a scalar for the mean.

        - `flow`: squared error of the velocity.
        - `direction`: 1 - its cosine to the true one over the channels (FasterDiT 2410.10356, section 3.3).
        - `base`: of the base head's prediction (RAEv2 2605.18324, section 2.3).
        - `student`, `distillation`: of the prediction after some of the loops, to the target and to the prediction
          after all loops (ELT 2604.09168).
        """
        predicted, target = velocities(output.sample.float(), sample, prediction_type)
        losses = {"flow": (predicted - target).square().flatten(1).mean(1)}
        if self.direction_loss:
            losses["direction"] = (1 - F.cosine_similarity(predicted, target, dim=1)).flatten(1).mean(1)
        if getattr(output, "base_sample", None) is not None:
            losses["base"] = flow_losses(output.base_sample.float(), sample, prediction_type)
        if sample.student_loops is not None:
            every_loop = torch.stack(output.loop_samples)  # (loops - 1, B, C, h, w)
            student = every_loop[sample.student_loops - 1, torch.arange(len(sample.t), device=every_loop.device)]
            losses["student"] = flow_losses(student.float(), sample, prediction_type)
            losses["distillation"] = loop_distillation_loss(student, output.sample)
        return losses


def velocities(
    prediction: torch.Tensor, sample: FlowSample, prediction_type: PredictionType
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted and true velocity, both (B, C, h, w).

    For a `sample` prediction the clamp of the denominator stands in prediction and target alike, so that the squared
    error is |x_hat - x|^2 / max(t, 0.05)^2 (JiT; RAEv2).
    """
    if prediction_type == "velocity":
        return prediction, sample.velocity
    predicted, target = (to_velocity(x, sample.noisy, sample.t, prediction_type) for x in (prediction, sample.latents))
    return predicted, target


def flow_losses(prediction: torch.Tensor, sample: FlowSample, prediction_type: PredictionType) -> torch.Tensor:
    """Squared error of the velocity, mean over elements: (B,); see `velocities`."""
    predicted, target = velocities(prediction, sample, prediction_type)
    return (predicted - target).square().flatten(1).mean(1)
