"""Train a text-to-image generator in the latents of a frozen autoencoder (RAEv2 2605.18324, Scale-RAE 2601.16208).

    accelerate launch -m repagen.training.text_to_image --config NAME_OR_PATH [key=value ...]

The same command again continues an interrupted run, and writes the pipeline again after a finished one. A second stage
on other data goes on from a released pipeline: `transformer.pretrained=runs/first/pipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from repagen.config import load_config
from repagen.data import DataConfig, SampleDataset, open_dataset
from repagen.data.config import CaptionConfig
from repagen.errors import UserError, run_as_program
from repagen.training.generator import train_new
from repagen.training.launch import program_main
from repagen.training.run import Run, open_run
from repagen.training.text_conditioning import TextConditioning, open_text_encoder, shown_prompts
from repagen.training.text_to_image_config import TextToImageConfig


def train(config: TextToImageConfig) -> Path:
    """Train, or continue training, and release the result.

    Returns:
        The folder of the released pipeline, `output_dir/pipeline`.

    Raises:
        UserError: for whatever the user can repair; see the message.
        RunStopped: when a signal stopped the run after a checkpoint.
    """
    with open_run(config, "text_to_image") as run:
        return train_new(run, config, open_captioned, partial(_read_captions, config, run))


def _read_captions(config: TextToImageConfig, run: Run, dataset: SampleDataset) -> TextConditioning:
    prompts = shown_prompts(config.sample.prompts, dataset, config.sample.num_images)
    encoder, text = open_text_encoder(config), config.text
    return TextConditioning(encoder, run, text.null_prompt, text.dropout, prompts, text.cache)


def open_captioned(config: DataConfig) -> SampleDataset:
    """Open the dataset that a configuration names, with captions whether or not it asks for them.

    Raises:
        UserError: there is none, or it has no captions.
    """
    asked = config.captions or (CaptionConfig() if config.kind in ("folder", "datasets", "webdataset") else None)
    dataset = open_dataset(replace(config, captions=asked))
    if not dataset.has_captions:
        raise UserError(
            f"data.kind: {config.kind}{f' of {config.path}' if config.path else ''} has no captions; allowed: images "
            "with captions (see docs/captions.md), or latents that `repagen cache` made of them with data.captions"
        )
    return dataset


def main(words: Sequence[str]) -> None:
    """The command line; see the module's docstring."""
    program_main(partial(load_config, TextToImageConfig), train, "text_to_image", words)


if __name__ == "__main__":
    run_as_program(main)
