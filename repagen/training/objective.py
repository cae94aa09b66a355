"""What a generator is trained on: keyed draws of time, noise and label, and the flow-matching and alignment losses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from repagen.alignment import RepresentationAlignment
from repagen.flow.path import PredictionType, interpolate, to_velocity
from repagen.flow.time import TimeDistribution
from repagen.randomness import normal_per_sample, uniform_per_sample


@dataclass(frozen=True)
class FlowSample:
    """Noisy latents of one micro-batch.

    Attributes:
        latents: x (B, C, h, w) float32, standardised.
        noisy: x_t (B, C, h, w) float32.
        t: (B,) float32 in [0, 1].
        labels: (B,) with the null label `num_classes` where dropped; None without classes.
        velocity: noise - x, (B, C, h, w) float32.
    """

    latents: torch.Tensor
    noisy: torch.Tensor
    t: torch.Tensor
    labels: torch.Tensor | None
    velocity: torch.Tensor


def draw_flow_sample(
    latents: torch.Tensor,
    labels: torch.Tensor,
    generators: Sequence[torch.Generator],
    times: TimeDistribution,
    *,
    num_classes: int,
    label_dropout: float,
) -> FlowSample:
    """Draw time, label dropout and noise of each sample, in this order, from the sample's own generator.

    Args:
        latents: x (B, C, h, w).
        labels: (B,) in [0, num_classes).
        generators: one per sample, on the latents' device.
        times: law of t.
        num_classes: 0 = unconditional.
        label_dropout: probability of the null label.
    """
    t = times.from_uniform(uniform_per_sample(generators))
    dropped = uniform_per_sample(generators) < label_dropout
    noise = normal_per_sample(generators, latents.shape[1:])
    kept = torch.where(dropped, num_classes, labels) if num_classes else None
    return FlowSample(latents, interpolate(latents, noise, t), t, kept, noise - latents)


class GeneratorObjective(nn.Module):
    """The losses of one micro-batch; one module, so that one wrapper averages all gradients over processes.

    Attributes:
        model: the generator.
        alignment: projectors of REPA, or None.
    """

    def __init__(self, model: nn.Module, alignment: RepresentationAlignment | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.alignment = alignment

    def forward(
        self,
        flow: FlowSample,
        targets: Sequence[torch.Tensor] | None = None,
        autocast: AbstractContextManager[Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the losses, both in float32.

        Args:
            flow: the noisy latents.
            targets: tokens (B, N, D_k) of each alignment encoder; None computes no alignment loss.
            autocast: precision of the generator's and the projectors' matmuls.

        Returns:
            loss of every sample (B,): mean over elements of (v_hat - v)^2 (RAE, SiT; for a `sample` prediction both v
            are divided by max(t, 0.05) instead of t); and the alignment loss, a scalar, or None.
        """
        alignment = self.alignment if targets is not None else None
        with autocast or nullcontext():  # the losses themselves are float32 under it too
            with alignment.capture(self.model) if alignment else nullcontext():
                prediction = self.model(flow.noisy, flow.t, class_labels=flow.labels).sample
            aligned = alignment.loss(targets) if alignment and targets is not None else None
        return flow_losses(prediction.float(), flow, self.model.config.prediction_type), aligned


def flow_losses(prediction: torch.Tensor, flow: FlowSample, prediction_type: PredictionType) -> torch.Tensor:
    """Squared error of the velocity, mean over elements: (B,).

    For a `sample` prediction the clamp of the denominator stands in prediction and target alike, so that the loss is
    |x_hat - x|^2 / max(t, 0.05)^2 (JiT; RAEv2).
    """
    if prediction_type == "velocity":
        return (prediction - flow.velocity).square().flatten(1).mean(1)
    predicted, target = (to_velocity(x, flow.noisy, flow.t, prediction_type) for x in (prediction, flow.latents))
    return (predicted - target).square().flatten(1).mean(1)
