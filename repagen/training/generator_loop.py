"""The training of a generator, whatever it starts from: its parts, its loop, its end.

`generator.py` makes a new network, or goes on with all of a pretrained one; `finetune.py` changes a saved pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repagen.data import SampleDataset
from repagen.flow.conditions import ConditionDropout, Conditions
from repagen.flow.time import TimeDistribution, TimeShift
from repagen.training.conditioning import Conditioning
from repagen.training.discrete_diffusion import DDPM
from repagen.training.ema import Averaged, Ema
from repagen.training.evaluation import open_evaluation
from repagen.training.frozen import FrozenParts
from repagen.training.generator_alignment import build_terms
from repagen.training.generator_config import GeneratorRunConfig
from repagen.training.generator_model import refuse_sizes
from repagen.training.generator_step import GeneratorStep
from repagen.training.noising import FlowMatching, NoiseProcess
from repagen.training.objective import GeneratorObjective
from repagen.training.release import release_pipeline, write_sample_grid
from repagen.training.run import Batch, Run


class GeneratorTraining:
    """A generator in a pipeline, with its data and frozen parts, ready to be trained.

    Attributes:
        model: the generator, not wrapped.
        trained: what of it is averaged and kept in checkpoints.
        ema: its average.
        step: its losses and optimiser.
    """

    def __init__(
        self,
        run: Run,
        config: GeneratorRunConfig,
        pipeline: Any,
        process: NoiseProcess,
        frozen: FrozenParts,
        conditioning: Conditioning,
        dataset: SampleDataset,
        *,
        trained: Averaged | None = None,
    ) -> None:
        """Build what is trained; its initial weights go on from the random state as it is.

        Args:
            run: the run.
            config: of the training.
            pipeline: around the generator.
            process: how latents are made noisy.
            frozen: autoencoder and encoders.
            conditioning: what the generator is told of the samples.
            dataset: of the training.
            trained: what of the generator is averaged and kept in checkpoints; None: all.

        Raises:
            UserError: parts do not fit together, or an evaluation would fail.
        """
        self.run, self.config, self.frozen, self.dataset = run, config, frozen, dataset
        self.model = model = pipeline.transformer
        self._pipeline, self._conditioning = pipeline, conditioning
        refuse_sizes(config, dataset, frozen.autoencoder, model, frozen.latent_shape)
        self._terms = build_terms(config.alignment, model, frozen.target_dims)
        objective = run.wrap(
            GeneratorObjective(model, process, self._terms), find_unused_parameters=config.alignment.changes_over_time
        )
        self._evaluation = open_evaluation(config, run, pipeline, dataset, frozen.latent_shape)
        self.trained: Averaged = model if trained is None else trained
        self.ema = Ema(self.trained, config.ema)
        self._teacher = self.ema.teacher(model) if config.alignment.self_alignment else None
        prepare_model(config, model)
        self.step = GeneratorStep(run, config, objective, process, dataset)
        self._parts: dict[str, Any] = {"model": self.trained, "ema": self.ema, "optimizer": self.step.optimizer}
        if any(term.state_dict() for term in self._terms.values()):
            self._parts["alignment"] = nn.ModuleDict(self._terms)

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, Conditions]:
        """Latents (B, C, h, w) and conditions of a micro-batch."""
        return self.frozen.latents(batch), self._conditioning.conditions(batch)

    def given(self, batch: Batch, active: list[str]) -> dict[str, Any]:
        """What the active terms need beside the noisy latents of a micro-batch."""
        return {**self.frozen.alignment_inputs(batch, self._terms, active), "teacher": self._teacher}

    def rehearse(self, batch: Batch) -> None:
        """Go forward and back with a micro-batch, to measure it; nothing is changed."""
        self.step.rehearse(batch, self.inputs, self.given)

    def restore(self, facts: Mapping[str, Any], further_parts: Mapping[str, Any]) -> int:
        """Load the checkpoint that the run continues from, if any: => optimiser steps already done.

        Args:
            facts: what must not have changed, beside the data and the frozen parts.
            further_parts: name => what a checkpoint keeps beside the training's own.

        Raises:
            UserError: something changed that may not.
        """
        self._parts |= further_parts
        own = {
            "data": self.dataset.fingerprint(),
            "latent_shape": list(self.frozen.latent_shape),
            "transformer": {"class": type(self.model).__name__, "prediction": self.model.config.prediction_type},
        }
        return self.run.restore(
            self._parts, {**own, **self.frozen.fingerprints, **self._conditioning.fingerprints, **facts}
        )

    def train(self, start_step: int) -> None:
        """Do all optimiser steps from `start_step` on, with checkpoints, sample grids and evaluations.

        Raises:
            UserError: a step went wrong.
            RunStopped: when a signal stopped the run after a checkpoint.
        """
        run, ema = self.run, self.ema
        for step, micro_batches in run.steps(self.dataset, start_step):
            # Report and save first, then step: the last pass needs no copy of this code.
            if run.due(self.config.sample.every_steps, step):
                with ema.swapped(self.trained):
                    path = run.folder / "samples" / f"step-{step:08d}.png"
                    run.on_main(
                        partial(write_sample_grid, self.config, self._pipeline, self._conditioning.shown, path)
                    )
            run.save_if_due(step, self._parts)
            if micro_batches is None:
                break

            row = self.step(step, micro_batches, self.inputs, self.given)
            ema.update(self.trained)
            if self._evaluation and self._evaluation.due(step + 1):
                with ema.swapped(self.trained):
                    row |= self._evaluation(step + 1)
            run.log(step + 1, row)

    def release(self, start_step: int, name: str, save: Callable[[Path], Any], **options: Any) -> Path:
        """Write what the run hands out, while the model holds the averaged weights; see `release_pipeline`.

        Args:
            start_step: as of `train`.
            name: of the release's folder.
            save: writes it into a folder.
            options: `base_model`, `base_revision` and `facts`.
        """
        step = max(start_step, self.config.max_steps)
        with self.ema.swapped(self.trained):
            return release_pipeline(
                self.run,
                self.config,
                self._pipeline,
                step,
                self.dataset,
                name=name,
                save=save,
                shown=self._conditioning.shown,
                **options,
            )


def noise_process(
    config: GeneratorRunConfig,
    model: Any,
    latent_shape: tuple[int, int, int],
    dropout: ConditionDropout,
    shift: float | None = None,
) -> NoiseProcess:
    """How the model's latents are made noisy: DDPM's steps for a model that counts them, else the straight path.

    Args:
        config: of the training.
        model: the generator.
        latent_shape: (C, h, w).
        dropout: of the conditions.
        shift: of the times where the configuration leaves it to `auto`; None: by the latent.
    """
    if model.discrete_time:
        return DDPM(dropout)
    return FlowMatching(
        time_distribution(config, latent_shape, shift),
        dropout,
        num_loops=model.config.get("num_loops"),
        direction_loss=config.loss.direction > 0,
    )


def time_distribution(
    config: GeneratorRunConfig, latent_shape: tuple[int, int, int], shift: float | None = None
) -> TimeDistribution:
    """The law of training times; arguments as in `noise_process`."""
    flow = config.flow
    own = TimeShift(shift) if shift is not None and flow.shift == "auto" else flow.time_shift(latent_shape)
    return TimeDistribution(flow.time, flow.mean, flow.std, flow.maximum, own)


def prepare_model(config: GeneratorRunConfig, model: Any) -> None:
    """Switch on gradient checkpointing and compilation, as configured."""
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.compile:
        model.compile_repeated_blocks()
