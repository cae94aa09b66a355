"""Train an autoencoder: RAE's or RAEv2's decoder, SVG, or an AutoencoderKL.

    accelerate launch -m repagen.training.decoder --config NAME_OR_PATH [key=value ...]

The same command again continues an interrupted run, and writes the autoencoder again after a finished one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from repagen.config import load_config
from repagen.data import SampleDataset, indices_of_largest, open_dataset
from repagen.errors import run_as_program
from repagen.evaluation.metrics.perceptual import PerceptualDistance
from repagen.models.latents import images_to_latents, latents_to_images, require_sizes
from repagen.models.modes import in_eval_mode
from repagen.pipelines.grid import save_image_grid
from repagen.training.decoder_config import DecoderConfig
from repagen.training.decoder_kind import AutoencoderKind
from repagen.training.decoder_kl import KLKind
from repagen.training.decoder_representation import RepresentationKind
from repagen.training.decoder_step import DecoderStep
from repagen.training.decoder_svg import SVGKind
from repagen.training.discriminator import AdversarialConfig, DinoDiscriminator, Discriminator
from repagen.training.ema import Ema
from repagen.training.launch import program_main
from repagen.training.patch_discriminator import PatchDiscriminator
from repagen.training.perceptual import LpipsConfig
from repagen.training.run import Run, open_run
from repagen.training.run_release import release_and_publish

logger = logging.getLogger(__name__)

KINDS: dict[str, type[RepresentationKind | SVGKind | KLKind]] = {
    "representation": RepresentationKind,
    "svg": SVGKind,
    "kl": KLKind,
}
"""Autoencoders that can be trained, by `autoencoder.kind`."""


def train(config: DecoderConfig) -> Path:
    """Train, or continue training, and release the result.

    Returns:
        The folder of the released autoencoder, `output_dir/autoencoder`, with EMA weights.

    Raises:
        UserError: for whatever the user can repair; see the message.
        RunStopped: when a signal stopped the run after a checkpoint.
    """
    with open_run(config, "decoder") as run:
        dataset = open_dataset(config.data)
        training = AutoencoderTraining(run, config, KINDS[config.autoencoder.kind].open(config, run), dataset)
        start_step = training.restore({}, {})
        training.train(start_step)
        base_model = config.autoencoder.pretrained
        return training.release(start_step, "autoencoder", training.kind.save, base_model=base_model)


class AutoencoderTraining:
    """An autoencoder with its losses and its data, ready to be trained.

    Attributes:
        kind: the autoencoder.
        step: its losses and optimisers.
        ema: its average.
    """

    def __init__(self, run: Run, config: DecoderConfig, kind: AutoencoderKind, dataset: SampleDataset) -> None:
        """Load the networks of the losses and build what is trained.

        Raises:
            UserError: weights are absent, and it says how to get them and how to do without; or there are images of a
                size that the autoencoder does not take.
        """
        self.run, self.config, self.kind, self.dataset = run, config, kind, dataset
        require_sizes(kind.autoencoder, dataset.bucket_sizes, "data.buckets")
        perceptual, discriminator = build_loss_networks(config.lpips, config.adversarial)
        self.step = DecoderStep(run, config, kind, dataset, perceptual, discriminator)
        if config.gradient_checkpointing:
            kind.autoencoder.enable_gradient_checkpointing()
        if config.compile:
            kind.compile()
        self.ema = Ema(kind.trained, config.ema)
        self._parts: dict[str, Any] = {**self.step.parts(), "ema": self.ema}

    def restore(self, facts: Mapping[str, Any], further_parts: Mapping[str, Any]) -> int:
        """Load the checkpoint that the run continues from, if any: => optimiser steps already done.

        Args:
            facts: what must not have changed, beside the data and the frozen parts.
            further_parts: name => what a checkpoint keeps beside the training's own.

        Raises:
            UserError: something changed that may not.
        """
        self._parts |= further_parts
        perceptual, discriminator = self.step.perceptual, self.step.discriminator
        own = {
            "data": self.dataset.fingerprint(),
            **self.kind.facts(),
            "lpips": perceptual.files if perceptual else {},
            "discriminator backbone": discriminator.fingerprint() if discriminator else None,
        }
        return self.run.restore(self._parts, {**own, **facts})

    def train(self, start_step: int) -> None:
        """Do all optimiser steps from `start_step` on, with checkpoints and reconstruction grids.

        Raises:
            UserError: a step went wrong.
            RunStopped: when a signal stopped the run after a checkpoint.
        """
        run, kind, ema = self.run, self.kind, self.ema
        for notice in self.step.gates.notices(self.config.max_steps):
            run.notice("%s", notice)

        for step, micro_batches in run.steps(self.dataset, start_step):
            # Report and save first, then step: the last pass needs no copy of this code.
            if run.due(self.config.sample.every_steps, step):
                with ema.swapped(kind.trained):
                    path = run.folder / "samples" / f"step-{step:08d}.png"
                    count = self.config.sample.num_images
                    run.on_main(partial(write_reconstructions, count, run, kind.preview, self.dataset, path))
            run.save_if_due(step, self._parts)
            if micro_batches is None:
                break
            row = self.step(step, micro_batches)
            ema.update(kind.trained)
            run.log(step + 1, row)

    def release(self, start_step: int, name: str, save: Callable[[Path], Any], **options: Any) -> Path:
        """Write what the run hands out, while the autoencoder holds the averaged weights; see `release_and_publish`.

        Args:
            start_step: as of `train`.
            name: of the release's folder.
            save: writes it into a folder.
            options: `base_model` and `base_revision`.
        """
        run, kind = self.run, self.kind
        with self.ema.swapped(kind.trained):
            kind.finish()
            reconstruct = partial(reconstruct_released, kind.autoencoder)
            return release_and_publish(
                run,
                max(start_step, self.config.max_steps),
                self.dataset,
                folder=run.folder / name,
                save=save,
                draw=partial(write_reconstructions, self.config.sample.num_images, run, reconstruct, self.dataset),
                shows="images above their reconstructions",
                licences=kind.licences(),
                **options,
            )


def build_loss_networks(
    lpips: LpipsConfig, adversarial: AdversarialConfig
) -> tuple[PerceptualDistance | None, Discriminator | None]:
    """Load the perceptual network and make the discriminator; None where the weight is 0.

    Raises:
        UserError: weights are absent; it says how to get them and how to do without.
    """
    perceptual = lpips.open()
    if adversarial.weight == 0:
        return perceptual, None
    if adversarial.discriminator == "patch":
        widths = adversarial.patch_width, adversarial.patch_layers
        return perceptual, PatchDiscriminator(*widths, norm_samples=adversarial.norm_samples)
    discriminator = DinoDiscriminator.from_pretrained(
        adversarial.backbone, adversarial.blocks, adversarial.kernel_size
    )
    return perceptual, discriminator


@torch.no_grad()
def write_reconstructions(
    num_images: int, run: Run, reconstruct: Callable[[torch.Tensor], torch.Tensor], dataset: SampleDataset, path: Path
) -> None:
    """Write a PNG with images, of one size, above their reconstructions, which are made without chance."""
    members = indices_of_largest(dataset)
    count = min(num_images, len(members))
    chosen = [dataset[members[index * len(members) // count]]["image"] for index in range(count)]
    images = torch.stack(chosen).to(run.device)
    with run.autocast():
        reconstructions = reconstruct(images).float()
    save_image_grid(torch.cat([images, reconstructions], dim=2), path)


def reconstruct_released(autoencoder: Any, images: torch.Tensor) -> torch.Tensor:
    """Encode and decode images (B, 3, H, W) as whoever loads the autoencoder does, statistics included."""
    with in_eval_mode(autoencoder):
        return latents_to_images(autoencoder, images_to_latents(autoencoder, images, sample_posterior=False))


def main(words: Sequence[str]) -> None:
    """The command line; see the module's docstring."""
    program_main(partial(load_config, DecoderConfig), train, "decoder", words)


if __name__ == "__main__":
    run_as_program(main)
