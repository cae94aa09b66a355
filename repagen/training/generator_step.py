"""One optimiser step of a generator's training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from repagen.data import SampleDataset
from repagen.flow.conditions import Conditions
from repagen.training.generator_alignment import term_weights
from repagen.training.generator_config import GeneratorRunConfig
from repagen.training.noising import NoiseProcess
from repagen.training.objective import GeneratorObjective, weighted_sum
from repagen.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from repagen.training.run import Batch, Run

InputsOf = Callable[[Batch], tuple[torch.Tensor, Conditions]]
"""A micro-batch => its standardised latents (B, C, h, w), and what the generator is told of them."""
GivenOf = Callable[[Batch, list[str]], Mapping[str, Any]]
"""A micro-batch and the names of the active terms => what they need beside the noisy latents."""


class GeneratorStep:
    """The generator's losses and optimiser, and what one optimiser step does with them.

    Args:
        run: the run.
        config: weights of the losses and terms, and the optimiser.
        objective: wrapped for data parallelism.
        process: how latents are made noisy.
        dataset: names the samples of a broken step.
    """

    def __init__(
        self, run: Run, config: GeneratorRunConfig, objective: nn.Module, process: NoiseProcess, dataset: SampleDataset
    ) -> None:
        self.run = run
        self.config = config
        self.objective: GeneratorObjective | Any = objective
        self.process = process
        self.dataset = dataset
        self.optimizer = build_optimizer([objective], config.optimizer)

    def __call__(self, step: int, batches: Iterator[Batch], inputs: InputsOf, given: GivenOf) -> dict[str, float]:
        """Do optimiser step `step` = 0, 1, ... and return the row to log.

        Args:
            step: its number.
            batches: the micro-batches.
            inputs: makes the latents and conditions of a micro-batch.
            given: gives what the active terms need.

        Raises:
            UserError: a loss or gradient is not finite; before the optimiser step, naming the samples.
        """
        rate = learning_rate(self.config.optimizer, step, self.config.max_steps)
        set_learning_rate(self.optimizer, rate)
        of_terms = term_weights(self.config.alignment, step)
        active = [name for name, weight in of_terms.items() if weight]
        weights = {**self.config.loss.at(step, self.config.max_steps), **of_terms}
        report, samples = [], []
        for batch in self.run.accumulate(self.objective, batches):
            losses = self._losses(self.objective, batch, inputs, given, active)
            loss, loss_by_sample = weighted_sum(losses, weights)
            self.run.backward(loss)
            report.append({"loss": loss, **{f"loss_{name}": value.mean() for name, value in losses.items()}})
            samples.append((batch, loss_by_sample))

        limit = self.config.optimizer.max_grad_norm or math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.objective.parameters(), limit)
        row = self.run.mean([{**entry, "grad_norm": grad_norm} for entry in report])
        self.run.stop_if_not_finite(step, row, self.dataset, samples)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**row, "learning_rate": rate}

    def rehearse(self, batch: Batch, inputs: InputsOf, given: GivenOf) -> None:
        """Go forward and back with a micro-batch, in this process alone, and drop the gradients."""
        own = getattr(self.objective, "module", self.objective)  # without the exchange between processes
        weights = term_weights(self.config.alignment, 0)
        try:
            losses = self._losses(own, batch, inputs, given, [name for name, weight in weights.items() if weight])
            torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _losses(
        self,
        objective: nn.Module,
        batch: Batch,
        inputs: InputsOf,
        given: GivenOf,
        active: list[str],
    ) -> dict[str, torch.Tensor]:
        sample = self.process.draw(*inputs(batch), self.run.generators("flow", batch))
        return objective(sample, given(batch, active), active, self.run.autocast())
