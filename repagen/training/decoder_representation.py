"""Training of a representation autoencoder (RAE 2510.11690, RAEv2 2605.18324): a ViT decoder on a frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from repagen.errors import UserError, naming
from repagen.models.autoencoder_representation import RepresentationAutoencoder
from repagen.models.identity import describe_encoder
from repagen.randomness import normal_per_sample, uniform_per_sample
from repagen.training.decoder_config import DecoderConfig, TrainedAutoencoderConfig
from repagen.training.decoder_kind import ENCODER_KEYS, AutoencoderKind, Inputs
from repagen.training.frozen import encoder_source
from repagen.training.latent_identity import open_autoencoder
from repagen.training.latent_statistics import compute_latent_statistics, set_latent_statistics
from repagen.training.run import Batch, Run


class RepresentationKind(AutoencoderKind):
    """Trains the decoder, through noise on the encoder's tokens; latents are raw during training."""

    part: ClassVar[str] = "decoder"

    def __init__(self, autoencoder: RepresentationAutoencoder, config: DecoderConfig, run: Run) -> None:
        super().__init__(autoencoder, config, run)
        self._statistics = autoencoder.latents_mean.clone(), autoencoder.latents_std.clone()
        autoencoder.set_statistics(None, None)

    @classmethod
    def open(cls, config: DecoderConfig, run: Run) -> RepresentationKind:
        """Load the encoder and make its new decoder, or load the pretrained autoencoder.

        Raises:
            UserError: something is not there or does not fit.
        """
        return cls(build_autoencoder(config.autoencoder, config.data.image_size), config, run)

    @property
    def trained(self) -> nn.Module:
        """The decoder."""
        return self.autoencoder.decoder

    @property
    def last_weight(self) -> nn.Parameter:
        """The decoder's projection to pixels."""
        return self.autoencoder.decoder.decoder_pred.weight

    def facts(self) -> dict[str, Any]:
        """The frozen encoder's weights."""
        return {"encoder": describe_encoder(self.autoencoder.encoder)["weights"]}

    def prepare(self, batches: Sequence[Batch]) -> list[Batch]:
        """Add raw `latents` and the noisy ones, z + tau u eps with u ~ U(0, 1) per sample."""
        return [self._prepare(batch) for batch in batches]

    def _prepare(self, batch: Batch) -> Batch:
        with torch.no_grad(), self.run.autocast():
            latents = self._latents(batch["image"])
        generators = self.run.generators("latent noise", batch)
        sigma = self.autoencoder.config["noise_tau"] * uniform_per_sample(generators)
        noise = normal_per_sample(generators, latents.shape[1:])
        return {**batch, "latents": latents, "inputs": {"noisy": latents + sigma.view(-1, 1, 1, 1) * noise}}

    def reconstruct(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode the noisy latents; there is no penalty."""
        return self.autoencoder.decode(inputs["noisy"]).sample.float(), {}

    def fakes(self, batch: Batch, reconstruction: Tensor) -> Tensor:
        """Reconstruct anew, with the updated decoder and without noise, as RAE does."""
        return self.autoencoder.decode(batch["latents"]).sample.float()

    def preview(self, images: Tensor) -> Tensor:
        """Reconstruct without noise."""
        return self.autoencoder.decode(self._latents(images)).sample.float()

    def _latents(self, images: Tensor) -> Tensor:
        latents: Tensor = self.autoencoder.raw_latents(images, self.shape_of(images)[1:])
        return latents

    def finish(self) -> None:
        """Set the statistics of the data, or those that the pretrained autoencoder came with."""
        self.autoencoder.latents_mean.copy_(self._statistics[0])
        self.autoencoder.latents_std.copy_(self._statistics[1])
        if self.config.statistics:
            found = compute_latent_statistics(self.autoencoder, **self.statistics_arguments())
            set_latent_statistics(self.autoencoder, found)

    def save(self, folder: Path) -> None:
        """Write decoder, statistics, and the encoder or where it is."""
        self.autoencoder.save_pretrained(folder, include_encoder=self.config.autoencoder.include_encoder)


def build_autoencoder(config: TrainedAutoencoderConfig, image_size: int) -> RepresentationAutoencoder:
    """Load the encoder and make its new decoder, or load the pretrained autoencoder, in eval mode.

    Raises:
        UserError: something is not there or does not fit.
    """
    if config.pretrained is not None:
        autoencoder = open_autoencoder(config.pretrained, option="autoencoder.pretrained")
        if not isinstance(autoencoder, RepresentationAutoencoder):
            raise UserError(
                f"autoencoder.pretrained: {config.pretrained} is a {type(autoencoder).__name__}; allowed: a "
                "RepresentationAutoencoder, or another autoencoder.kind"
            )
        autoencoder.register_to_config(noise_tau=config.noise_tau)
    else:
        assert config.encoder is not None, "the config's validate saw to it"
        with naming(ENCODER_KEYS):
            autoencoder = RepresentationAutoencoder.from_encoder(
                encoder_source(config.encoder),
                decoder=config.decoder,
                image_size=image_size,
                decoder_patch_size=config.decoder_patch_size,
                noise_tau=config.noise_tau,
                revision=config.revision,
                layers=config.layers,
                combination=config.combination,
                norm_affine=config.norm_affine,
                normalised_pixels=config.normalised_pixels,
            )
    refuse_other_size(autoencoder, image_size)
    return autoencoder.eval()


def refuse_other_size(autoencoder: RepresentationAutoencoder, image_size: int) -> None:
    """Refuse images of another side in pixels than the autoencoder decodes.

    Raises:
        UserError: it is another.
    """
    if autoencoder.image_size != image_size:
        raise UserError(
            f"data.image_size: {image_size} px given, but the autoencoder decodes {autoencoder.image_size} px; set "
            f"data.image_size={autoencoder.image_size}"
        )
