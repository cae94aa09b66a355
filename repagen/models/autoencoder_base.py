"""What autoencoders of this library share: buffers that standardise latents, and a frozen encoder beside the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from repagen.encoders.images import check_images, image_grid
from repagen.encoders.spec import EncoderSpec
from repagen.errors import UserError, naming
from repagen.hub.published import PublishedModelMixin
from repagen.hub.whole_models import WholeModelMixin
from repagen.models import encoder_storage

if TYPE_CHECKING:
    from repagen.encoders import VisionEncoder
    from repagen.hub.card import LicenceFact

VARIANCE_EPSILON = 1e-5
"""Added to the variance before the square root of a standard deviation, as RAE does."""


def check_positive(**sizes: Any) -> None:
    """Refuse sizes that are no positive whole numbers, by name."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise UserError(f"{name}: {value!r} must be a positive whole number")


def check_latents(latents: torch.Tensor, channels: int) -> None:
    """Refuse anything but latents (B, channels, h, w)."""
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise UserError(f"latents must have shape (B, {channels}, h, w), got {tuple(latents.shape)}")


class LatentStandardisation(nn.Module):
    """Mean and standard deviation of raw latents; a module, so that offloading hooks bring them along for `decode`."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, shape: tuple[int, int, int], mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full(shape, mean))
        self.register_buffer("std", torch.full(shape, std))

    def forward(self, latents: torch.Tensor, undo: bool = False) -> torch.Tensor:
        """Standardise latents (B, C, h, w), or undo it; float32.

        For a grid other than their own, statistics of every element are stretched over it (bilinear, corners on
        corners): tokens at an edge keep those of that edge.
        """
        mean, std = (self._on_grid(value.float(), latents.shape[-2:]) for value in (self.mean, self.std))
        return latents.float() * std + mean if undo else (latents.float() - mean) / std

    def _on_grid(self, values: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        if values.shape[1:] in ((1, 1), tuple(grid)):
            return values
        return F.interpolate(values[None], size=tuple(grid), mode="bilinear", align_corners=True)[0]


class StandardisedLatents(PublishedModelMixin, WholeModelMixin):
    """An autoencoder whose latents are standardised by buffers, which are saved with it.

    A frozen encoder waits for the first `encode`.
    """

    latent_statistics: LatentStandardisation

    @property
    def latents_mean(self) -> torch.Tensor:
        """Mean of the raw latents, (C, h, w) or per channel (C, 1, 1)."""
        return self.latent_statistics.mean

    @property
    def latents_std(self) -> torch.Tensor:
        """Standard deviation of the raw latents, of the same shape."""
        return self.latent_statistics.std

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latent of a square of `image_size`."""
        raise NotImplementedError

    @property
    def patch_size(self) -> int:
        """Side in pixels of the patch that one token becomes."""
        raise NotImplementedError

    @property
    def image_size(self) -> int:
        """Side in pixels of the squares that it was made for."""
        return self.latent_shape[1] * self.patch_size

    @property
    def latents_depend_on_batch(self) -> bool:
        """Whether an image's latent depends on the other images that are encoded with it."""
        return False

    def latent_grid(self, height: int, width: int, name: str = "images") -> tuple[int, int]:
        """Return rows and columns (h, w) of the latents of images of a size in pixels.

        Args:
            height, width: of the images.
            name: what the user gave the size as, for messages.

        Raises:
            UserError: for a size that is not encoded.
        """
        return image_grid((height, width), self.patch_size, 1, name, "the autoencoder's")

    def decoded_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width in pixels of the image that a grid of latents becomes."""
        return height * self.patch_size, width * self.patch_size

    def raw_latents(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images (B, 3, H, W) float in [0, 1] to latents (B, C, h, w) float32 before standardisation."""
        raise NotImplementedError

    def encoding_facts(self) -> tuple[list[Any], list[torch.Tensor]]:
        """Return all that raw latents of an image depend on: JSON-able values, and tensors."""
        raise NotImplementedError

    def set_statistics(
        self, mean: torch.Tensor | None, var: torch.Tensor | None = None, *, std: torch.Tensor | None = None
    ) -> None:
        """Set the statistics of raw latents; `encode` standardises with them and `decode` undoes it.

        Args:
            mean: of the shape of `latents_mean`, or None for 0.
            var: variance, or None for 1; the standard deviation is sqrt(var + 1e-5).
            std: standard deviation, in place of `var`; taken as it is.

        Raises:
            UserError: for another shape, negative variances, deviations of 0 or values that are not finite.
        """
        if var is not None and std is not None:
            raise UserError("latent statistics: give var or std, not both")
        shape = tuple(self.latents_mean.shape)
        for name, value in {"mean": mean, "var": var, "std": std}.items():
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise UserError(
                    f"latent statistics: {name} has shape {tuple(value.shape)}, this autoencoder's latents have "
                    f"{shape}; they belong to another encoder or image size"
                )
            negative = (name == "var" and (value < 0).any()) or (name == "std" and (value <= 0).any())
            if negative or not torch.isfinite(value).all():
                raise UserError(
                    f"latent statistics: {name} holds values that are not finite, negative variances or deviations "
                    "of 0"
                )
        if var is not None:
            std = (var.double() + VARIANCE_EPSILON).sqrt()
        self.latents_mean.copy_(torch.zeros_like(self.latents_mean) if mean is None else mean)
        self.latents_std.copy_(torch.ones_like(self.latents_std) if std is None else std)


class FrozenEncoderAutoencoder(StandardisedLatents):
    """An autoencoder on a frozen `VisionEncoder` that is no sub-module.

    The encoder is built or fetched on the first `encode`, so that decoding needs neither its files nor access to them,
    and its weights are in no optimiser and no state dict. It follows `.to(...)`. With random weights (a description
    without `name_or_path`) it is a fixed function of that description.

    A class calls `_without_encoder()` in its constructor; its config has `encoder`, `encoder_fingerprint` and
    `encoder_stored`.
    """

    config: Any
    dtype: torch.dtype
    register_to_config: Callable[..., None]
    _encoder: VisionEncoder | None

    @property
    def encoder_width(self) -> int:
        """Channels of a latent that come from the encoder."""
        raise NotImplementedError

    def latent_grid(self, height: int, width: int, name: str = "images") -> tuple[int, int]:
        """See `StandardisedLatents.latent_grid`; the encoder is not needed for it."""
        from repagen.encoders import FAMILIES

        grid = super().latent_grid(height, width, name)
        if self.config.encoder is not None:
            description = EncoderSpec.from_mapping(self.config.encoder)
            with naming({"encoder: ": f"{name}: "}):
                FAMILIES[description.family].require_grid(description.config, grid, self.latent_shape[1])
        return grid

    def _grid_of(self, images: torch.Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
        """Rows and columns of the latents of images; see `encode`."""
        check_images(images, square=False)
        height, width = images.shape[-2:]
        if grid is None:
            grid = self.latent_shape[1:] if height == width else self.latent_grid(height, width)
        return grid

    @property
    def encoder(self) -> VisionEncoder:
        """The frozen encoder, loaded or downloaded now if it has not been.

        Raises:
            UserError: where there is none, it cannot be loaded, or it is another than this autoencoder was made with.
        """
        if self._encoder is None:
            if self.config.encoder is None:
                raise UserError("encode: this autoencoder was made without an encoder and only decodes")
            self.attach_encoder(encoder_storage.load_encoder(self.config, self._folder).to(self.dtype))
        assert self._encoder is not None
        return self._encoder

    def attach_encoder(self, encoder: VisionEncoder) -> None:
        """Use an encoder that is already loaded, for example a local copy of a gated one.

        Args:
            encoder: read as this autoencoder's description says; its weights are shared and follow `.to(...)`.

        Raises:
            UserError: if it is not the encoder that the decoder and the latent statistics were made with.
        """
        encoder_storage.check_encoder(self.config, encoder, self.encoder_width)
        spec = EncoderSpec.from_mapping(self.config.encoder)
        wanted = {name: getattr(spec, name) for name in ("layers", "combination", "norm_affine")}
        object.__setattr__(self, "_encoder", encoder.reading(**wanted))

    def save_pretrained(  # the parameters by name: pipelines read them from the signature
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        *,
        include_encoder: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save weights, statistics and the encoder or a reference to it.

        Args:
            save_directory: the folder.
            is_main_process, save_function, safe_serialization, variant, max_shard_size, push_to_hub, kwargs: see
                `ModelMixin.save_pretrained`.
            include_encoder: save the encoder's weights too (sub-folder `encoder.frozen`), or only where they come
                from. By default they are saved if their licence allows it or they come from nowhere (random weights,
                or found in an official file); an encoder that has not been loaded is saved as it was found.

        Raises:
            UserError: if the encoder shall be saved and cannot be loaded, or is closed and without a Hub id.
        """
        stored = encoder_storage.shall_store(self.config, self._encoder, include_encoder)
        encoder = self.encoder if stored else self._encoder
        if self.config.encoder is not None:
            facts = encoder_storage.saved_facts(self.config, encoder, stored)
            self.register_to_config(**facts)
        if stored and is_main_process:  # first, since the rest may upload the folder
            encoder_storage.save_encoder(self.encoder, Path(save_directory))
        super().save_pretrained(
            save_directory,
            is_main_process=is_main_process,
            save_function=save_function,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            push_to_hub=push_to_hub,
            **kwargs,
        )

    def part_licences(self) -> tuple[LicenceFact, ...]:
        """See `PublishedMixin.part_licences`: the encoder's."""
        return encoder_storage.encoder_licences(self.config)

    def _without_encoder(self) -> None:
        # Outside the module tree on purpose; see the class docstring.
        object.__setattr__(self, "_encoder", None)

    def _placed_encoder(self, device: torch.device) -> VisionEncoder:
        """Return the encoder on the device of the images: `encode` may be called where offloading moved the model."""
        encoder = self.encoder
        if encoder.device != device:
            encoder.to(device)
        return encoder

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        if self._encoder is not None:
            self._encoder._apply(fn)
        return self
