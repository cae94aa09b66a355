"""Images as encoders take them: their shape, and ImageNet's pixel statistics."""

from __future__ import annotations

import torch

from repagen.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_images(images: torch.Tensor, *, square: bool = True) -> None:
    """Refuse anything but (B, 3, H, W) floating point images, H = W where they must be `square`, naming what came."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise UserError(f"images must be float (B, 3, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}")
    if square and images.shape[-1] != images.shape[-2]:
        raise UserError(f"images must be square, got {images.shape[-2]} x {images.shape[-1]} px; crop them first")
