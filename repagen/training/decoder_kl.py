"""Training of diffusers' `AutoencoderKL`, encoder and decoder (LDM, arXiv 2112.10752; VA-VAE's form of latents)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from repagen.errors import UserError
from repagen.models.latents import latent_shape
from repagen.training.decoder_config import DecoderConfig, KLConfig
from repagen.training.decoder_kind import AutoencoderKind, Inputs
from repagen.training.latent_identity import open_autoencoder
from repagen.training.latent_statistics import compute_latent_statistics, set_latent_statistics
from repagen.training.run import Batch, Run


class KLKind(AutoencoderKind):
    """Trains encoder and decoder through a draw from the posterior, with 1e-6 of its divergence from N(0, I)."""

    def __init__(self, autoencoder: Any, config: DecoderConfig, run: Run) -> None:
        super().__init__(autoencoder, config, run)
        latent_shape(autoencoder, config.data.image_size)  # refuses sides that are no multiple
        self.penalties = {"kl": config.autoencoder.kl.weight}

    @classmethod
    def open(cls, config: DecoderConfig, run: Run) -> KLKind:
        """Make a new autoencoder, or load the pretrained one.

        Raises:
            UserError: it is not there, of another kind, or does not take the images' side.
        """
        settings = config.autoencoder
        autoencoder = open_kl(settings.pretrained) if settings.pretrained else build_kl(settings.kl)
        return cls(autoencoder, config, run)

    @property
    def last_weight(self) -> nn.Parameter:
        """The decoder's last convolution."""
        return self.autoencoder.decoder.conv_out.weight

    def prepare(self, batches: Sequence[Batch]) -> list[Batch]:
        """Draw the posterior's noise."""
        return [self._prepare(batch, batch["image"]) for batch in batches]

    def _prepare(self, batch: Batch, images: Tensor) -> Batch:
        noise = self.keyed_normal("posterior", batch, self.shape_of(images))
        return {**batch, "inputs": {"images": images, "noise": noise}}

    def reconstruct(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode, draw, decode; the penalty `kl` is summed over a latent's elements."""
        latents, divergence = draw_latents(self.autoencoder, inputs["images"], inputs["noise"])
        return decode_latents(self.autoencoder, latents), {"kl": divergence}

    @torch.no_grad()
    def preview(self, images: Tensor) -> Tensor:
        """Reconstruct from the posterior's mean."""
        return decode_latents(self.autoencoder, self.autoencoder.encode(2.0 * images - 1.0).latent_dist.mode())

    def compile(self) -> None:
        """Compile encoder and decoder whole: they have no repeated block."""
        self.autoencoder.encoder.compile()
        self.autoencoder.decoder.compile()

    def finish(self) -> None:
        """Put each channel's mean and standard deviation over data and posterior into the config, as VA-VAE has them.

        Without `statistics` the config keeps its scaling factor.
        """
        if self.config.statistics:
            found = compute_latent_statistics(self.autoencoder, **self.statistics_arguments())
            set_latent_statistics(self.autoencoder, found)


def draw_latents(autoencoder: Any, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Encode images to drawn, raw latents, with gradients.

    Args:
        autoencoder: the autoencoder.
        images: (B, 3, H, W) in [0, 1].
        noise: (B, C, h, w) standard normal.

    Returns:
        mean + std * noise (B, C, h, w) float32, and the divergence from N(0, I) (B,), summed over elements.
    """
    posterior = autoencoder.encode(2.0 * images - 1.0).latent_dist
    mean, std, logvar = posterior.mean.float(), posterior.std.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum((1, 2, 3))
    return mean + std * noise, divergence


def decode_latents(autoencoder: Any, latents: Tensor) -> Tensor:
    """Decode raw latents (B, C, h, w) to images (B, 3, H, W) float32, about [0, 1], with gradients."""
    return autoencoder.decode(latents).sample.float() / 2.0 + 0.5


def build_kl(config: KLConfig) -> Any:
    """Make an autoencoder with random weights."""
    count = len(config.widths)
    autoencoder: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        block_out_channels=tuple(config.widths),
        layers_per_block=config.blocks,
        latent_channels=config.channels,
        norm_num_groups=config.norm_groups,
        mid_block_add_attention=config.attention,
        scaling_factor=config.scaling_factor,
    )
    return autoencoder.eval()


def open_kl(name: str) -> Any:
    """Load an `AutoencoderKL`.

    Raises:
        UserError: it is not there or of another kind.
    """
    autoencoder = open_autoencoder(name, option="autoencoder.pretrained")
    if not isinstance(autoencoder, AutoencoderKL):
        raise UserError(
            f"autoencoder.pretrained: {name} is a {type(autoencoder).__name__}; allowed: an AutoencoderKL, or another "
            "autoencoder.kind"
        )
    return autoencoder
