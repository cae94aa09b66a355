"""Train a class-conditional generator in the latents of a frozen autoencoder (RAE 2510.11690, SiT, REPA 2410.06940).

    accelerate launch -m repagen.training.generator --config NAME_OR_PATH [key=value ...]

The same command again continues an interrupted run, and writes the pipeline again after a finished one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repagen.alignment import AlignmentTarget, RepresentationAlignment, alignment_weight
from repagen.data import open_dataset
from repagen.errors import UserError, run_as_program
from repagen.flow.time import TimeDistribution, TimeShift
from repagen.randomness import derived_seed
from repagen.training.ema import Ema
from repagen.training.frozen import FrozenParts
from repagen.training.generator_config import GeneratorConfig
from repagen.training.launch import program_main
from repagen.training.objective import GeneratorObjective, draw_flow_sample
from repagen.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from repagen.training.release import build_pipeline, write_release, write_sample_grid
from repagen.training.run import open_run

logger = logging.getLogger(__name__)


def train(config: GeneratorConfig) -> Path:
    """Train, or continue training, and release the result.

    Returns:
        The folder of the released pipeline, `output_dir/pipeline`.

    Raises:
        UserError: for whatever the user can repair; see the message.
        RunStopped: when a signal stopped the run after a checkpoint.
    """
    with open_run(config, "generator") as run:
        dataset = open_dataset(config.data)
        frozen = FrozenParts(config, dataset, run)
        model, alignment = build_model(config, frozen.latent_shape, dataset.num_classes, frozen.target_dims)
        times = time_distribution(config, frozen.latent_shape)
        objective = run.wrap(
            GeneratorObjective(model, alignment), find_unused_parameters=config.alignment.schedule.kind != "constant"
        )
        prepare_model(config, model)
        optimizer = build_optimizer([objective], config.optimizer)
        ema = Ema(model, config.ema)

        parts = {"model": model, "ema": ema, "optimizer": optimizer, **({"alignment": alignment} if alignment else {})}
        facts = {"data": dataset.fingerprint(), "latent_shape": list(frozen.latent_shape), **frozen.fingerprints}
        start_step = run.restore(parts, facts)
        pipeline = build_pipeline(config, model, frozen.autoencoder, dataset, times.shift.alpha)
        draw = partial(
            draw_flow_sample, times=times, num_classes=dataset.num_classes, label_dropout=config.label_dropout
        )

        for step, micro_batches in run.steps(dataset, start_step):
            # Report and save first, then step: the last pass needs no copy of this code.
            if run.due(config.sample.every_steps, step):
                with ema.swapped(model):
                    path = run.folder / "samples" / f"step-{step:08d}.png"
                    run.on_main(partial(write_sample_grid, config, pipeline, dataset.num_classes, path))
            run.save_if_due(step, parts)
            if micro_batches is None:
                break

            rate = learning_rate(config.optimizer, step, config.max_steps)
            set_learning_rate(optimizer, rate)
            weight = alignment_weight(step, config.alignment.schedule) if alignment else 0.0
            report, samples = [], []
            for batch in run.accumulate(objective, micro_batches):
                flow = draw(frozen.latents(batch), batch["label"], run.generators("flow", batch))
                targets = frozen.targets(batch) if weight else None
                losses, aligned = objective(flow, targets, run.autocast())
                loss = losses.mean() if aligned is None else losses.mean() + weight * aligned
                run.backward(loss)
                parts_of_loss = {"loss_flow": losses.mean()} | ({} if aligned is None else {"loss_alignment": aligned})
                report.append({"loss": loss, **parts_of_loss})
                samples.append((batch, losses))

            grad_norm = nn.utils.clip_grad_norm_(
                objective.parameters(), config.optimizer.max_grad_norm or float("inf")
            )
            row = run.mean([{**entry, "grad_norm": grad_norm} for entry in report])
            run.stop_if_not_finite(step, row, dataset, samples)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(model)
            run.log(step + 1, {**row, "learning_rate": rate})

        with ema.swapped(model):
            return run.on_main(lambda: write_release(pipeline, run.folder / "pipeline"))


def build_model(
    config: GeneratorConfig, latent_shape: tuple[int, int, int], num_classes: int, target_dims: Sequence[int]
) -> tuple[Any, RepresentationAlignment | None]:
    """The generator and its projectors, with initial weights that depend on the seed alone.

    Args:
        config: architecture and alignment.
        latent_shape: (C, h, w).
        num_classes: of the dataset; 0 = unconditional.
        target_dims: token width of each alignment encoder.

    Raises:
        UserError: if the sizes do not fit together.
    """
    torch.manual_seed(derived_seed(config.seed, "generator weights"))
    channels, height, width = latent_shape
    model_class = config.transformer.model_class
    try:
        arguments = model_class.config_for_size(config.transformer.size, **config.transformer.overrides)
        model: Any = model_class(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            patch_size=config.transformer.patch_size,
            num_classes=num_classes,
            class_dropout_prob=config.label_dropout if num_classes else 0.0,
            prediction_type=config.transformer.prediction,
            **arguments,
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"transformer: these sizes do not fit together: {error}") from None
    model.initialize_weights()
    if not config.alignment.targets:
        return model, None
    targets = [
        AlignmentTarget(dim, target.block, target.projector, target.loss, target.projector_dim)
        for dim, target in zip(target_dims, config.alignment.targets, strict=True)
    ]
    alignment = RepresentationAlignment(model.config.hidden_size, targets)
    alignment.attach(model)
    return model, alignment


def prepare_model(config: GeneratorConfig, model: Any) -> None:
    """Switch on gradient checkpointing and compilation, as configured."""
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.compile:
        model.compile_repeated_blocks()


def time_distribution(config: GeneratorConfig, latent_shape: tuple[int, int, int]) -> TimeDistribution:
    """The law of training times, with the shift that follows from the latent where it is `auto`."""
    flow = config.flow
    shift = TimeShift.for_latent_shape(latent_shape) if flow.shift == "auto" else TimeShift(flow.shift)
    return TimeDistribution(flow.time, flow.mean, flow.std, flow.maximum, shift)


def main(words: Sequence[str]) -> None:
    """The command line; see the module's docstring."""
    program_main(GeneratorConfig, train, "generator", words)


if __name__ == "__main__":
    run_as_program(main)
