"""What a generator is trained on: the losses of one micro-batch, by name, and their weighted sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from repagen.alignment import AlignmentBatch, AlignmentTerm, arguments_of
from repagen.training.noising import NoiseProcess, NoisySample


class GeneratorObjective(nn.Module):
    """The losses of one micro-batch; one module, so that one wrapper averages all gradients over processes.

    Attributes:
        model: the generator.
        process: how latents are made noisy, and what the prediction loses.
        terms: alignment terms by name; their projectors are trained too.
    """

    def __init__(
        self, model: nn.Module, process: NoiseProcess, terms: Mapping[str, AlignmentTerm] | None = None
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.process = process
        self.terms = nn.ModuleDict(terms or {})

    def forward(
        self,
        sample: NoisySample,
        given: Mapping[str, Any],
        active: Collection[str] = (),
        autocast: AbstractContextManager[Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses by name, in float32: (B,) where they are known by sample, or a scalar for the mean.

        Args:
            sample: the noisy latents.
            given: what the terms need beside it: further fields of `AlignmentBatch`.
            active: names of the terms whose losses are computed.
            autocast: precision of the generator's and the projectors' matmuls.
        """
        batch = AlignmentBatch(sample.latents, sample.noise, sample.t, **vars(sample.conditions), **given)
        terms: list[Any] = [self.terms[name] for name in active]
        with autocast or nullcontext():  # the losses themselves are float32 under it too
            arguments = {
                **sample.conditions.arguments,
                **self._further_outputs(sample),
                **arguments_of(self._all_terms(), batch),
            }
            with ExitStack() as captures:
                for term in terms:
                    captures.enter_context(term.capture(self.model))
                output = self.model(sample.noisy, sample.timestep, **arguments)
            aligned = {term.name: term.batch_loss(batch, output) for term in terms}
        return {**self.process.losses(output, sample, self.model.config.prediction_type), **aligned}

    def _all_terms(self) -> list[Any]:
        return list(self.terms.values())

    def _further_outputs(self, sample: NoisySample) -> dict[str, Any]:
        """Ask for what the network predicts beside its last layer's output, where it has that."""
        wanted: dict[str, Any] = {"return_base": True} if self.model.has_base_head else {}
        if getattr(sample, "student_loops", None) is not None:
            wanted["return_loops"] = range(1, self.model.config.num_loops)
        return wanted


def weighted_sum(
    losses: Mapping[str, torch.Tensor], weights: Mapping[str, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the means of the losses by their weights.

    Args:
        losses: by name, as the objective gives them.
        weights: by name.

    Returns:
        The sum, a scalar; and the sum over the losses that are known by sample, (B,).
    """
    total = torch.stack([weights[name] * loss.mean() for name, loss in losses.items()]).sum()
    by_sample = torch.stack([weights[name] * loss for name, loss in losses.items() if loss.ndim]).sum(0)
    return total, by_sample
