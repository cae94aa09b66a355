"""Train a class-conditional generator in the latents of a frozen autoencoder (RAE 2510.11690, SiT, REPA 2410.06940).

    accelerate launch -m repagen.training.generator --config NAME_OR_PATH [key=value ...]

The same command again continues an interrupted run, and writes the pipeline again after a finished one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from repagen.config import load_config
from repagen.data import DataConfig, SampleDataset, open_dataset
from repagen.errors import run_as_program
from repagen.training.conditioning import ClassConditioning, Conditioning
from repagen.training.frozen import FrozenParts
from repagen.training.generator_alignment import refuse_single_samples
from repagen.training.generator_config import GeneratorConfig, NewGeneratorConfig
from repagen.training.generator_loop import GeneratorTraining, noise_process
from repagen.training.generator_model import build_model, pinned_pretrained, refuse_other_autoencoder
from repagen.training.launch import program_main
from repagen.training.release import build_pipeline
from repagen.training.run import Run, open_run


def train(config: GeneratorConfig) -> Path:
    """Train, or continue training, and release the result.

    Returns:
        The folder of the released pipeline, `output_dir/pipeline`.

    Raises:
        UserError: for whatever the user can repair; see the message.
        RunStopped: when a signal stopped the run after a checkpoint.
    """
    with open_run(config, "generator") as run:
        return train_new(
            run,
            config,
            open_dataset,
            lambda dataset: ClassConditioning.of_all(dataset.class_names, config.label_dropout),
        )


def train_new(
    run: Run,
    config: NewGeneratorConfig,
    open_data: Callable[[DataConfig], SampleDataset],
    condition_on: Callable[[SampleDataset], Conditioning],
) -> Path:
    """Make the network, or take a pretrained one, train it and release a pipeline.

    Args:
        run: the run.
        config: of the training.
        open_data: opens the dataset.
        condition_on: makes of a dataset what the network is conditioned on.

    Raises:
        UserError: parts do not fit together; a step went wrong.
        RunStopped: when a signal stopped the run after a checkpoint.
    """
    refuse_single_samples(config.alignment, run.plan.micro_size)
    config.transformer.revision = run.on_main(partial(pinned_pretrained, config.transformer))
    dataset = open_data(config.data)
    conditioning = condition_on(dataset)
    frozen = FrozenParts.open(config, dataset, run)
    model = build_model(config, frozen.latent_shape, conditioning.model_arguments, frozen.class_token_dim)
    refuse_other_autoencoder(config, frozen.fingerprints["autoencoder"])
    pipeline = build_pipeline(config, model, frozen.autoencoder, conditioning, frozen.latent_shape)
    process = noise_process(config, model, frozen.latent_shape, conditioning.dropout)
    training = GeneratorTraining(run, config, pipeline, process, frozen, conditioning, dataset)
    start_step = training.restore({}, {})
    training.train(start_step)
    return training.release(
        start_step,
        "pipeline",
        pipeline.save_pretrained,
        base_model=config.transformer.pretrained,
        base_revision=config.transformer.revision,
    )


def main(words: Sequence[str]) -> None:
    """The command line; see the module's docstring."""
    program_main(partial(load_config, GeneratorConfig), train, "generator", words)


if __name__ == "__main__":
    run_as_program(main)
