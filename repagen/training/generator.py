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

from torch import nn

from repagen.data import open_dataset
from repagen.errors import run_as_program
from repagen.flow.time import TimeDistribution
from repagen.training.discrete_diffusion import DDPM
from repagen.training.ema import Ema
from repagen.training.evaluation import open_evaluation
from repagen.training.frozen import FrozenParts
from repagen.training.generator_alignment import build_terms, refuse_single_samples
from repagen.training.generator_config import GeneratorConfig
from repagen.training.generator_model import build_model, pinned_pretrained, refuse_other_autoencoder
from repagen.training.generator_step import GeneratorStep
from repagen.training.launch import program_main
from repagen.training.noising import FlowMatching, NoiseProcess
from repagen.training.objective import GeneratorObjective
from repagen.training.release import build_pipeline, training_facts, write_release, write_sample_grid
from repagen.training.run import Batch, open_run

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
        refuse_single_samples(config.alignment, run.plan.micro_size)
        config.transformer.revision = run.on_main(partial(pinned_pretrained, config.transformer))
        dataset = open_dataset(config.data)
        frozen = FrozenParts(config, dataset, run)
        model = build_model(config, frozen.latent_shape, dataset.num_classes, frozen.class_token_dim)
        refuse_other_autoencoder(config, frozen.fingerprints["autoencoder"])
        terms = build_terms(config.alignment, model, frozen.target_dims)
        process = noise_process(config, model, frozen.latent_shape)
        objective = run.wrap(
            GeneratorObjective(model, process, terms), find_unused_parameters=config.alignment.changes_over_time
        )
        pipeline = build_pipeline(config, model, frozen.autoencoder, dataset, frozen.latent_shape)
        evaluation = open_evaluation(config, run, pipeline, dataset, frozen.latent_shape)
        ema = Ema(model, config.ema)
        teacher = ema.teacher(model) if config.alignment.self_alignment else None
        prepare_model(config, model)
        optimiser_step = GeneratorStep(run, config, objective, process, dataset)

        def given(batch: Batch, active: list[str]) -> dict[str, Any]:
            return {**frozen.alignment_inputs(batch, terms, active), "teacher": teacher}

        parts: dict[str, Any] = {"model": model, "ema": ema, "optimizer": optimiser_step.optimizer}
        if any(term.state_dict() for term in terms.values()):
            parts["alignment"] = nn.ModuleDict(terms)
        facts = {
            "data": dataset.fingerprint(),
            "latent_shape": list(frozen.latent_shape),
            "transformer": {"class": type(model).__name__, "prediction": model.config.prediction_type},
            **frozen.fingerprints,
        }
        start_step = run.restore(parts, facts)

        for step, micro_batches in run.steps(dataset, start_step):
            # Report and save first, then step: the last pass needs no copy of this code.
            if run.due(config.sample.every_steps, step):
                with ema.swapped(model):
                    path = run.folder / "samples" / f"step-{step:08d}.png"
                    run.on_main(partial(write_sample_grid, config, pipeline, dataset.num_classes, path))
            run.save_if_due(step, parts)
            if micro_batches is None:
                break

            row = optimiser_step(step, micro_batches, frozen.latents, given)
            ema.update(model)
            if evaluation and evaluation.due(step + 1):
                with ema.swapped(model):
                    row |= evaluation(step + 1)
            run.log(step + 1, row)

        with ema.swapped(model):
            facts = training_facts(run, step, dataset)
            return run.on_main(lambda: write_release(pipeline, run.folder / "pipeline", facts))


def noise_process(config: GeneratorConfig, model: Any, latent_shape: tuple[int, int, int]) -> NoiseProcess:
    """How the model's latents are made noisy: DDPM's steps for a model that counts them, else the straight path."""
    num_classes = model.config.num_classes
    if model.discrete_time:
        return DDPM(num_classes, config.label_dropout)
    return FlowMatching(
        time_distribution(config, latent_shape),
        num_classes,
        config.label_dropout,
        num_loops=model.config.get("num_loops"),
        direction_loss=config.loss.direction > 0,
    )


def prepare_model(config: GeneratorConfig, model: Any) -> None:
    """Switch on gradient checkpointing and compilation, as configured."""
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.compile:
        model.compile_repeated_blocks()


def time_distribution(config: GeneratorConfig, latent_shape: tuple[int, int, int]) -> TimeDistribution:
    """The law of training times, with the shift that follows from the latent where it is `auto`."""
    flow = config.flow
    return TimeDistribution(flow.time, flow.mean, flow.std, flow.maximum, flow.time_shift(latent_shape))


def main(words: Sequence[str]) -> None:
    """The command line; see the module's docstring."""
    program_main(GeneratorConfig, train, "generator", words)


if __name__ == "__main__":
    run_as_program(main)
