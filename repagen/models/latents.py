"""One pair of functions between images and standardised latents, for every autoencoder a generator can train in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderRAE

from repagen.encoders.images import check_images, image_grid
from repagen.errors import UserError, naming
from repagen.models.autoencoder_base import FrozenEncoderAutoencoder, StandardisedLatents


@torch.no_grad()
def images_to_latents(
    autoencoder: Any,
    images: torch.Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    *,
    sample_posterior: bool = True,
) -> torch.Tensor:
    """Encode images to standardised latents.

    Args:
        autoencoder: a `RepresentationAutoencoder`, `SVGAutoencoder` or `PixelAutoencoder`, or diffusers'
            `AutoencoderKL` (SD-VAE, VA-VAE) or `AutoencoderRAE`.
        images: (B, 3, H, W) float in [0, 1], on the device on which the autoencoder runs; sides multiples of the
            patch that a token takes, and of `AutoencoderRAE` equal.
        generator: of the draw from `AutoencoderKL`'s posterior: one for the batch, or one per image so that a latent
            does not depend on its neighbours. The others encode without chance in eval mode.
        sample_posterior: draw from that posterior, as generators are trained; False: take its mode, without chance.

    Returns:
        (B, C, h, w) in the autoencoder's dtype, of the size's `latent_shape`. `AutoencoderKL`: (z - shift_factor) *
        scaling_factor, or with latent statistics in its config (z - mean) / std * scaling_factor.

    Raises:
        UserError: for images that are no float batches, or of a size that is not encoded, or an autoencoder of another
            kind.
    """
    kind = _kind(autoencoder)
    check_images(images, square=kind == "rae")
    if kind == "rae":
        return autoencoder.encode(images.to(autoencoder.dtype), return_dict=False)[0]
    grid = _latent_grid(autoencoder, (images.shape[-2], images.shape[-1]), "images")
    if kind == "own":  # without the grid, those with an encoder bring squares of any side to their own
        sized = {"grid": grid} if isinstance(autoencoder, FrozenEncoderAutoencoder) else {}
        return autoencoder.encode(images, return_dict=False, **sized)[0]
    images = images.to(autoencoder.dtype)
    streams = list(generator) if isinstance(generator, Sequence) else generator
    posterior = autoencoder.encode(images * 2 - 1, return_dict=False)[0]
    mean, std = kl_statistics(autoencoder, posterior.mean)
    return ((posterior.sample(generator=streams) if sample_posterior else posterior.mode()) - mean) / std


@torch.no_grad()
def latents_to_images(autoencoder: Any, latents: torch.Tensor, *, clamp: bool = True) -> torch.Tensor:
    """Decode standardised latents.

    Args:
        autoencoder: as in `images_to_latents`.
        latents: (B, C, h, w), on the device on which the autoencoder runs.
        clamp: to [0, 1]; an infinity is then no longer told from white.

    Returns:
        (B, 3, H, W) float32, in [0, 1] or about it; see `decoded_size`.

    Raises:
        UserError: for latents that do not fit, or an autoencoder of another kind.
    """
    kind = _kind(autoencoder)
    if kind != "own":
        latents = latents.to(autoencoder.dtype)
    if kind == "kl":
        mean, std = kl_statistics(autoencoder, latents)
        images = autoencoder.decode(latents * std + mean, return_dict=False)[0] / 2 + 0.5
    else:
        if kind == "rae":  # its decoder resizes any other grid without a word
            _refuse_other_shape(latents.shape[1:], _rae_shape(autoencoder))
        images = autoencoder.decode(latents, return_dict=False)[0]
    return images.float().clamp(0, 1) if clamp else images.float()


def latent_shape(autoencoder: Any, image_size: int | tuple[int, int]) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of the latents of images of a size in pixels.

    Args:
        autoencoder: as in `images_to_latents`.
        image_size: the side of squares, which must be the one that statistics and decoder were made for, if there is
            one; or height and width of one of several sizes.

    Raises:
        UserError: if the autoencoder does not encode images of that size.
    """
    channels = _latent_channels(autoencoder)
    if isinstance(image_size, tuple):
        return channels, *_latent_grid(autoencoder, image_size, "image_size")
    kind = _kind(autoencoder)
    if kind == "kl":
        factor = _kl_factor(autoencoder)
        if image_size <= 0 or image_size % factor:
            raise UserError(f"image_size: {image_size} px is no positive multiple of the autoencoder's {factor} px")
    else:
        own = autoencoder.image_size if kind == "own" else autoencoder.decoder_image_size
        if image_size != own:
            raise UserError(f"image_size: {image_size} px, but the autoencoder is for images of {own} px")
    return channels, *_latent_grid(autoencoder, (image_size, image_size), "image_size")


def require_sizes(autoencoder: Any, sizes: Sequence[tuple[int, int]], option: str) -> None:
    """Refuse sizes of images that an autoencoder does not encode.

    Args:
        autoencoder: as in `images_to_latents`.
        sizes: height and width in pixels.
        option: where the user gave them, for the message.

    Raises:
        UserError: naming the first that is not encoded.
    """
    for size in sizes:
        _latent_grid(autoencoder, size, option)


def decoded_size(autoencoder: Any, shape: Sequence[int]) -> tuple[int, int]:
    """Return height and width in pixels of the image that a latent becomes.

    Args:
        autoencoder: as in `images_to_latents`.
        shape: (C, h, w) of the latent.

    Raises:
        UserError: if the autoencoder decodes no latents of that shape.
    """
    kind = _kind(autoencoder)
    channels, height, width = shape
    if kind == "rae":
        _refuse_other_shape(shape, _rae_shape(autoencoder))
        return autoencoder.decoder_image_size, autoencoder.decoder_image_size
    own = _latent_channels(autoencoder)
    if channels != own:
        raise UserError(f"latents of {channels} channels, but the autoencoder decodes {own}")
    if kind == "own":
        return autoencoder.decoded_size(height, width)
    return height * _kl_factor(autoencoder), width * _kl_factor(autoencoder)


def require_latents(autoencoder: Any, shape: Sequence[int]) -> None:
    """Refuse an autoencoder that decodes no latents of a generator, or was made for others than it is.

    Statistics of every element, and the decoder trained with them, are made for one grid. Latents of other grids are
    for images of other sizes beside it; a generator made for another grid was trained in other latents.

    Args:
        autoencoder: as in `images_to_latents`.
        shape: (C, h, w) of the latents that the generator is made for.

    Raises:
        UserError: says what differs.
    """
    decoded_size(autoencoder, shape)
    per_element = isinstance(autoencoder, StandardisedLatents) and autoencoder.latents_mean.shape[1:] != (1, 1)
    if per_element and tuple(shape) != autoencoder.latent_shape:
        own = " x ".join(map(str, autoencoder.latent_shape[1:]))
        raise UserError(
            f"latents of {shape[1]} x {shape[2]} tokens, but its statistics are of no other grid than {own}"
        )


def require_autoencoder(model: Any, option: str) -> None:
    """Refuse a model that is no autoencoder which a generator can train in.

    Args:
        model: as in `images_to_latents`, or anything else.
        option: what the user gave it as, for the message.

    Raises:
        UserError: naming the class of the model and those that are allowed.
    """
    with naming({"autoencoder: ": f"{option}: "}):
        _kind(model)


def require_independent_latents(autoencoder: Any, option: str) -> None:
    """Refuse an autoencoder whose latents depend on the images that are encoded together.

    They would depend on batch size, order, and the split into processes as well.

    Args:
        autoencoder: as in `images_to_latents`.
        option: what the user gave it as, for the message.

    Raises:
        UserError: it is such a one; says what to run.
    """
    if isinstance(autoencoder, StandardisedLatents) and autoencoder.latents_depend_on_batch:
        raise UserError(
            f"{option}: matching='batch' makes an image's latent depend on the other images of its batch; write a "
            "copy that does not by `repagen stats data.path=... --autoencoder PATH --matching running --output "
            "FOLDER`, and give FOLDER"
        )


def kl_statistics(autoencoder: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return shift and scale of a KL autoencoder's latents, broadcastable over (B, C, h, w)."""
    config = autoencoder.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        channels = (1, -1, 1, 1)
        return like.new_tensor(mean).view(channels), like.new_tensor(std).view(channels) / config.scaling_factor
    return like.new_tensor(config.shift_factor or 0.0), like.new_tensor(1 / config.scaling_factor)


def _kl_factor(autoencoder: Any) -> int:
    return 2 ** (len(autoencoder.config.block_out_channels) - 1)


def _latent_channels(autoencoder: Any) -> int:
    kind = _kind(autoencoder)
    if kind == "own":
        return autoencoder.latent_shape[0]
    return autoencoder.config.latent_channels if kind == "kl" else _rae_shape(autoencoder)[0]


def _latent_grid(autoencoder: Any, size: tuple[int, int], name: str) -> tuple[int, int]:
    """Rows and columns of the latents of images of a height and width in pixels.

    Raises:
        UserError: such images are not encoded; `name` is what the user gave the size as.
    """
    kind = _kind(autoencoder)
    if kind == "own":
        return autoencoder.latent_grid(*size, name)
    if kind == "kl":
        return image_grid(size, _kl_factor(autoencoder), 1, name, "the autoencoder's")
    side = autoencoder.decoder_image_size
    if size != (side, side):
        raise UserError(
            f"{name}: {size[0]}x{size[1]} px, but AutoencoderRAE encodes {side}x{side} px alone; read it with "
            "RepresentationAutoencoder.from_diffusers, which takes other sizes"
        )
    return _rae_shape(autoencoder)[1], _rae_shape(autoencoder)[2]


def _rae_shape(autoencoder: Any) -> tuple[int, int, int]:
    side = round(autoencoder.num_patches**0.5)
    return (autoencoder.config.encoder_hidden_size, side, side)


def _refuse_other_shape(given: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(given) != tuple(expected):
        shown = ", ".join(map(str, expected))
        raise UserError(f"latents must have shape (B, {shown}), got (B, {', '.join(map(str, given))})")


def _kind(autoencoder: Any) -> Literal["own", "kl", "rae"]:
    if isinstance(autoencoder, StandardisedLatents):
        return "own"
    if isinstance(autoencoder, AutoencoderKL):
        return "kl"
    if isinstance(autoencoder, AutoencoderRAE):
        return "rae"
    known = "RepresentationAutoencoder, SVGAutoencoder, PixelAutoencoder, AutoencoderKL, AutoencoderRAE"
    raise UserError(f"autoencoder: {type(autoencoder).__name__} is none of {known}")
