"""What decoder training asks of a kind of autoencoder; `decoder_step.py` and `decoder.py` know nothing else of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from repagen.data import open_image_dataset
from repagen.hub.card import LicenceFact
from repagen.hub.published import PublishedMixin
from repagen.models.latents import latent_shape
from repagen.randomness import normal_per_sample
from repagen.training.decoder_config import DecoderConfig
from repagen.training.run import Batch, Run

Inputs = dict[str, Any]
"""What a reconstruction starts from: images, frozen features, draws."""


ENCODER_KEYS = {"encoder.": "autoencoder.", "encoder ": "autoencoder.encoder ", "image_size:": "data.image_size:"}
"""How messages about a new autoencoder's encoder begin => the configuration's key; see `errors.naming`."""


class AutoencoderKind(ABC):
    """One kind of autoencoder in training.

    A step calls `prepare` once on all its micro-batches, without gradients: every draw and every number that belongs
    to the whole global batch is fixed there, so that `reconstruct` is a function of its inputs and the weights.

    Attributes:
        part: name of the trained module in checkpoints.
        autoencoder: the model; its latents are raw during training.
        penalties: name => weight of the losses that `reconstruct` returns beside the pixels.
    """

    part: ClassVar[str] = "autoencoder"

    def __init__(self, autoencoder: Any, config: DecoderConfig, run: Run) -> None:
        self.autoencoder = autoencoder
        self.config = config
        self.run = run
        self.penalties: Mapping[str, float] = {}

    @property
    def trained(self) -> nn.Module:
        """The module whose parameters are trained, averaged and saved in checkpoints."""
        return self.autoencoder

    @property
    @abstractmethod
    def last_weight(self) -> nn.Parameter:
        """The decoder's last weight; gradients to it set the adaptive weight of the adversarial loss."""

    def facts(self) -> dict[str, Any]:
        """What must be the same when a run continues although no key of the configuration says so."""
        return {}

    @abstractmethod
    def prepare(self, batches: Sequence[Batch]) -> list[Batch]:
        """Add `inputs` to the micro-batches of a step, without gradients."""

    @abstractmethod
    def reconstruct(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the training reconstruction (B, 3, H, W), about [0, 1], and each penalty per sample (B,)."""

    def fakes(self, batch: Batch, reconstruction: Tensor) -> Tensor:
        """Return what the discriminator learns to tell from `batch["image"]`: this step's reconstruction, detached."""
        return reconstruction

    @abstractmethod
    def preview(self, images: Tensor) -> Tensor:
        """Reconstruct images (B, 3, H, W) as the released autoencoder does, without chance."""

    def compile(self) -> None:
        """Compile the repeated blocks."""
        self.autoencoder.compile_repeated_blocks()

    @abstractmethod
    def finish(self) -> None:
        """Put in what is computed once after training: the statistics, if they are asked for."""

    def save(self, folder: Path) -> None:
        """Write the released autoencoder, with the weights it has now."""
        self.autoencoder.save_pretrained(folder)

    def licences(self) -> Sequence[LicenceFact]:
        """Licences of its frozen parts, for the model card; AutoencoderKL has none."""
        return self.autoencoder.part_licences() if isinstance(self.autoencoder, PublishedMixin) else ()

    def statistics_arguments(self) -> dict[str, Any]:
        """What statistics are computed from and how: centre crops, which generators are trained on, all square."""
        return {
            "dataset": open_image_dataset(replace(self.config.data, crop="center", resize_px=None, buckets=[])),
            "batch_size": self.run.plan.micro_size,
            "flips": self.config.data.horizontal_flip,
            "num_workers": self.config.num_workers,
        }

    def shape_of(self, images: Tensor) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of the latents of images (B, 3, H, W)."""
        return latent_shape(self.autoencoder, (images.shape[2], images.shape[3]))

    def keyed_normal(self, purpose: str, batch: Batch, shape: Sequence[int]) -> Tensor:
        """Standard normal noise (B, *shape), each sample's own."""
        return normal_per_sample(self.run.generators(purpose, batch), torch.Size(shape))
