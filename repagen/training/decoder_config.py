"""The configuration of decoder training: `-m repagen.training.decoder --config NAME_OR_PATH [key=value ...]`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from repagen.data import DataConfig
from repagen.encoders import Combination
from repagen.errors import UserError
from repagen.models.autoencoder_representation import DECODER_SIZES
from repagen.training.config import require
from repagen.training.discriminator import AdversarialConfig
from repagen.training.ema import EmaConfig
from repagen.training.optimizer import OptimizerConfig
from repagen.training.perceptual import LpipsConfig
from repagen.training.run_config import RunConfig


@dataclass
class TrainedAutoencoderConfig:
    """The autoencoder whose decoder is trained; its image side is `data.image_size`.

    Attributes:
        encoder: local folder, Hub id, `timm:NAME`, or `digits` for the bundled one.
        revision: branch, tag or commit of the encoder on the Hub.
        pretrained: folder or Hub id of an autoencoder to go on from, in place of all keys but `noise_tau` and
            `include_encoder`.
        decoder: `vit-b`, `vit-l`, `vit-xl`, or the four `decoder_*` sizes of `RepresentationAutoencoder`.
        decoder_patch_size: side in pixels of the patch that a token becomes; None: 16.
        layers: `last`, or 0-based blocks of the encoder.
        combination: how several layers become one.
        noise_tau: sigma = noise_tau * u, u ~ U(0, 1) per sample, of the noise on the tokens; RAE 0.8.
        include_encoder: save the encoder's weights in the released folder; None: where their licence allows it.
    """

    encoder: str | None = None
    revision: str | None = None
    pretrained: str | None = None
    decoder: Literal["vit-b", "vit-l", "vit-xl"] | dict[str, Any] = "vit-xl"
    decoder_patch_size: int | None = None
    layers: Literal["last"] | list[int] = "last"
    combination: Combination = "last"
    noise_tau: float = 0.8
    include_encoder: bool | None = None

    def validate(self) -> None:
        """Check that there is one source, and the sizes' names."""
        if (self.encoder is None) == (self.pretrained is None):
            raise UserError("encoder: give either an encoder or a pretrained autoencoder to go on from, not both")
        if isinstance(self.decoder, dict):
            names = sorted(DECODER_SIZES["vit-b"])
            require(sorted(self.decoder) == names, "decoder", sorted(self.decoder), f"sizes for {', '.join(names)}")
        require(
            self.decoder_patch_size is None or self.decoder_patch_size >= 1,
            "decoder_patch_size",
            self.decoder_patch_size,
            "at least 1",
        )
        require(self.noise_tau >= 0, "noise_tau", self.noise_tau, "at least 0")


@dataclass
class ReconstructionConfig:
    """Grids of images above their reconstructions, as PNG during training, from the EMA weights.

    Attributes:
        every_steps: a grid after every so many optimiser steps; 0: none.
        num_images: pairs in a grid; images are taken at even distances from the dataset, without random augmentation.
    """

    every_steps: int = 0
    num_images: int = 8

    def validate(self) -> None:
        """Check the ranges."""
        require(self.every_steps >= 0, "every_steps", self.every_steps, "at least 0")
        require(self.num_images >= 1, "num_images", self.num_images, "at least 1")


@dataclass(kw_only=True)
class DecoderConfig(RunConfig):
    """Everything about one training of a decoder.

    Attributes:
        data: images.
        autoencoder: encoder and decoder.
        lpips, adversarial: parts of the loss beside L1; weight 0 switches each off.
        optimizer, ema: as everywhere; of the decoder.
        sample: reconstruction grids during training.
        statistics: compute the latent statistics of `data` at the end and release the autoencoder with them, ready for
            a generator; without, they are those of `autoencoder.pretrained`, or none.
    """

    data: DataConfig
    autoencoder: TrainedAutoencoderConfig
    lpips: LpipsConfig = field(default_factory=LpipsConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    sample: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    statistics: bool = True

    def validate(self) -> None:
        """Check the ranges."""
        super().validate()
        require(self.data.kind != "latents", "data.kind", self.data.kind, "a kind of images; latents have none")
