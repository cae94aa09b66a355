"""Train a generator and its autoencoder together (REPA-E, arXiv 2504.10483).

    accelerate launch -m repagen.training.end_to_end --config NAME_OR_PATH [key=value ...]

The same command again continues an interrupted run, and writes the pipeline again after a finished one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from repagen.config import load_config
from repagen.data import open_dataset
from repagen.errors import UserError, run_as_program
from repagen.training.conditioning import ClassConditioning, Conditioning
from repagen.training.ema import Ema
from repagen.training.end_to_end_config import EndToEndConfig
from repagen.training.end_to_end_step import EndToEndStep
from repagen.training.evaluation import open_evaluation
from repagen.training.frozen import FrozenParts
from repagen.training.generator_alignment import build_terms
from repagen.training.generator_loop import noise_process, prepare_model
from repagen.training.generator_model import build_model, refuse_sizes
from repagen.training.launch import program_main
from repagen.training.noising import FlowMatching
from repagen.training.objective import GeneratorObjective
from repagen.training.release import build_pipeline, release_pipeline, write_sample_grid
from repagen.training.run import open_run


def train(config: EndToEndConfig) -> Path:
    """Train, or continue training, and release the result.

    Returns:
        The folder of the released pipeline, `output_dir/pipeline`: the generator's EMA weights, and the autoencoder as
        it is after the last step, with the running statistics of its latents.

    Raises:
        UserError: for whatever the user can repair; see the message.
        RunStopped: when a signal stopped the run after a checkpoint.
    """
    with open_run(config, "end_to_end") as run:
        dataset = open_dataset(config.data)
        frozen = FrozenParts.open(config, dataset, run)
        autoencoder = trainable_autoencoder(config, frozen)
        conditioning = ClassConditioning.of_all(dataset.class_names, config.label_dropout)
        objective = build_objective(config, frozen, conditioning)
        model = objective.model
        refuse_sizes(config, dataset, autoencoder, model, frozen.latent_shape)
        ema = Ema(model, config.ema)
        prepare_model(config, model)
        optimiser_step = EndToEndStep(run, config, frozen, conditioning, objective, dataset)

        parts = {**optimiser_step.parts(), "ema": ema}
        facts = {
            "data": dataset.fingerprint(),
            "latent_shape": list(frozen.latent_shape),
            "lpips": optimiser_step.perceptual.files if optimiser_step.perceptual else {},
            **frozen.fingerprints,
        }
        start_step = run.restore(parts, facts)
        pipeline = build_pipeline(config, model, autoencoder, conditioning, frozen.latent_shape)
        evaluation = open_evaluation(config, run, pipeline, dataset, frozen.latent_shape)
        for notice in optimiser_step.autoencoder_step.gates.notices(config.max_steps):
            run.notice("%s", notice)

        for step, micro_batches in run.steps(dataset, start_step):
            # Report and save first, then step: the last pass needs no copy of this code.
            if run.due(config.sample.every_steps, step):
                with ema.swapped(model):
                    optimiser_step.norm.store_in(autoencoder)
                    path = run.folder / "samples" / f"step-{step:08d}.png"
                    run.on_main(partial(write_sample_grid, config, pipeline, conditioning.shown, path))
            run.save_if_due(step, parts)
            if micro_batches is None:
                break
            row = optimiser_step(step, micro_batches)
            ema.update(model)
            if evaluation and evaluation.due(step + 1):
                with ema.swapped(model):
                    optimiser_step.norm.store_in(autoencoder)
                    row |= evaluation(step + 1)
            run.log(step + 1, row)

        with ema.swapped(model):
            optimiser_step.norm.store_in(autoencoder)
            return release_pipeline(
                run,
                config,
                pipeline,
                step,
                dataset,
                name="pipeline",
                save=pipeline.save_pretrained,
                shown=conditioning.shown,
                base_model=config.transformer.pretrained,
                base_revision=config.transformer.revision,
            )


def build_objective(config: EndToEndConfig, frozen: FrozenParts, conditioning: Conditioning) -> GeneratorObjective:
    """The generator and its alignment, with initial weights that depend on the seed alone.

    Raises:
        UserError: sizes do not fit together, or the network counts discrete steps or is looped.
    """
    model = build_model(config, frozen.latent_shape, conditioning.model_arguments)
    process = noise_process(config, model, frozen.latent_shape, conditioning.dropout)
    if not isinstance(process, FlowMatching):
        raise UserError("transformer.architecture: end-to-end training takes networks of continuous time, not dit")
    if "num_loops" in model.config:
        # A network cut behind the aligned block (`first_blocks`) would pass what is left of it num_loops times.
        raise UserError(
            "transformer.architecture: end-to-end training carries the alignment back through a network's first "
            "blocks, and a looped network has none, not elt; allowed: sit, lightningdit, ditdh, raev2, ddt"
        )
    return GeneratorObjective(model, process, build_terms(config.alignment, model, frozen.target_dims))


def trainable_autoencoder(config: EndToEndConfig, frozen: FrozenParts) -> Any:
    """The autoencoder to begin with.

    Raises:
        UserError: it is not a KL autoencoder.
    """
    if not isinstance(frozen.autoencoder, AutoencoderKL):
        raise UserError(
            f"autoencoder.path: {config.autoencoder.path} is a {type(frozen.autoencoder).__name__}; end-to-end "
            "training takes an AutoencoderKL"
        )
    return frozen.autoencoder


def main(words: Sequence[str]) -> None:
    """The command line; see the module's docstring."""
    program_main(partial(load_config, EndToEndConfig), train, "end_to_end", words)


if __name__ == "__main__":
    run_as_program(main)
