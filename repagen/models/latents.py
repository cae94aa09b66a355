"""One pair of functions between images and standardised latents, for every autoencoder a generator can train in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderRAE

from repagen.encoders.vision import check_images
from repagen.errors import UserError
from repagen.models.autoencoder_representation import RepresentationAutoencoder


@torch.no_grad()
def images_to_latents(
    autoencoder: Any,
    images: torch.Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """Encode images to standardised latents.

    Args:
        autoencoder: a `RepresentationAutoencoder`, or diffusers' `AutoencoderKL` or `AutoencoderRAE`.
        images: (B, 3, H, H) float in [0, 1], on the device on which the autoencoder runs.
        generator: of the draw from `AutoencoderKL`'s posterior: one for the batch, or one per image so that a latent
            does not depend on its neighbours. The other two encode without chance in eval mode.

    Returns:
        (B, C, h, w) in the autoencoder's dtype. `AutoencoderKL`: (z - shift_factor) * scaling_factor, or with latent
        statistics in its config (z - mean) / std * scaling_factor.

    Raises:
        UserError: for images that are not square float batches, or an autoencoder of another kind.
    """
    check_images(images)
    kind = _kind(autoencoder)
    if kind != "representation":
        images = images.to(autoencoder.dtype)
    if kind != "kl":
        return autoencoder.encode(images, return_dict=False)[0]
    streams = list(generator) if isinstance(generator, Sequence) else generator
    posterior = autoencoder.encode(images * 2 - 1, return_dict=False)[0]
    mean, std = kl_statistics(autoencoder, posterior.mean)
    return (posterior.sample(generator=streams) - mean) / std


@torch.no_grad()
def latents_to_images(autoencoder: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode standardised latents.

    Args:
        autoencoder: as in `images_to_latents`.
        latents: (B, C, h, w), on the device on which the autoencoder runs.

    Returns:
        (B, 3, H, H) float32, clamped to [0, 1].

    Raises:
        UserError: for latents that do not fit, or an autoencoder of another kind.
    """
    kind = _kind(autoencoder)
    if kind == "representation":
        return autoencoder.decode(latents, return_dict=False)[0].float().clamp(0, 1)
    latents = latents.to(autoencoder.dtype)
    if kind == "kl":
        mean, std = kl_statistics(autoencoder, latents)
        images = autoencoder.decode(latents * std + mean, return_dict=False)[0] / 2 + 0.5
    else:
        # Its decoder resizes any other grid without a word.
        _refuse_other_shape(latents, latent_shape(autoencoder, autoencoder.decoder_image_size))
        images = autoencoder.decode(latents, return_dict=False)[0]
    return images.float().clamp(0, 1)


def latent_shape(autoencoder: Any, image_size: int) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of the latents of square images of a side in pixels.

    Raises:
        UserError: if the autoencoder does not take that side.
    """
    kind = _kind(autoencoder)
    if kind == "kl":
        factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
        if image_size <= 0 or image_size % factor:
            raise UserError(f"image_size: {image_size} px is no positive multiple of the autoencoder's {factor} px")
        return (autoencoder.config.latent_channels, image_size // factor, image_size // factor)
    if kind == "representation":
        own, shape = autoencoder.image_size, autoencoder.latent_shape
    else:
        side = round(autoencoder.num_patches**0.5)
        own, shape = autoencoder.decoder_image_size, (autoencoder.config.encoder_hidden_size, side, side)
    if image_size != own:
        raise UserError(f"image_size: {image_size} px, but the autoencoder decodes to {own} px only")
    return shape


def kl_statistics(autoencoder: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return shift and scale of a KL autoencoder's latents, broadcastable over (B, C, h, w)."""
    config = autoencoder.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        channels = (1, -1, 1, 1)
        return like.new_tensor(mean).view(channels), like.new_tensor(std).view(channels) / config.scaling_factor
    return like.new_tensor(config.shift_factor or 0.0), like.new_tensor(1 / config.scaling_factor)


def _refuse_other_shape(latents: torch.Tensor, expected: tuple[int, int, int]) -> None:
    if tuple(latents.shape[1:]) != expected:
        raise UserError(f"latents must have shape (B, {', '.join(map(str, expected))}), got {tuple(latents.shape)}")


def _kind(autoencoder: Any) -> Literal["representation", "kl", "rae"]:
    if isinstance(autoencoder, RepresentationAutoencoder):
        return "representation"
    if isinstance(autoencoder, AutoencoderKL):
        return "kl"
    if isinstance(autoencoder, AutoencoderRAE):
        return "rae"
    name = type(autoencoder).__name__
    raise UserError(f"autoencoder: {name} is none of RepresentationAutoencoder, AutoencoderKL, AutoencoderRAE")
