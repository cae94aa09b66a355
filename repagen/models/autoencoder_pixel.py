"""Pixels as latents: the null encoder that representation latents are compared with."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, EncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from repagen.encoders.images import check_images
from repagen.models.autoencoder_base import LatentStandardisation, StandardisedLatents, check_latents, check_positive


class PixelAutoencoder(StandardisedLatents, ModelMixin, AutoencoderMixin, ConfigMixin):
    """Standardised pixels as latents: (x - mean) / std per channel, and back. It has no weights.

    New ones have mean 0.5 and deviation 0.5, so that latents are pixels in [-1, 1], as in pixel-space diffusion
    (JiT, arXiv 2511.13720, which predicts x in them). Images of any size are taken.

    Args:
        image_size: side in pixels of `latent_shape`.

    Raises:
        UserError: for a size that is no positive whole number.
    """

    config: Any
    _group_offload_block_modules: ClassVar[list[str]] = ["latent_statistics"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["latent_statistics"]

    @register_to_config
    def __init__(self, image_size: int = 64) -> None:
        super().__init__()
        check_positive(image_size=image_size)
        self.latent_statistics = LatentStandardisation((3, 1, 1), mean=0.5, std=0.5)

    @property
    def patch_size(self) -> int:
        """See `StandardisedLatents.patch_size`: one pixel."""
        return 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See `StandardisedLatents.latent_shape`."""
        return (3, self.config.image_size, self.config.image_size)

    def encoding_facts(self) -> tuple[list[Any], list[torch.Tensor]]:
        """See `StandardisedLatents.encoding_facts`."""
        return [], []

    @apply_forward_hook
    def encode(self, images: torch.Tensor, return_dict: bool = True) -> EncoderOutput | tuple[torch.Tensor]:
        """Standardise images (B, 3, H, W) float in [0, 1]: `.latent` (B, 3, H, W) in the model's dtype."""
        latents = self.latent_statistics(self.raw_latents(images)).to(self.dtype)
        return EncoderOutput(latent=latents) if return_dict else (latents,)

    def raw_latents(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (B, 3, H, W) as float32, after checking them."""
        check_images(images, square=False)
        return images.float()

    @apply_forward_hook
    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Undo `encode`: `.sample` (B, 3, H, W), about [0, 1], not clamped.

        Raises:
            UserError: for latents of another number of channels.
        """
        check_latents(latents, 3)
        images = self.latent_statistics(latents, undo=True).to(latents.dtype)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Encode and decode images (B, 3, H, W) in [0, 1]."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)
