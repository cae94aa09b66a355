"""Images as encoders take them: their shape, and ImageNet's pixel statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from repagen.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_images(images: torch.Tensor, *, square: bool = True) -> None:
    """Refuse anything but (B, 3, H, W) floating point images, H = W where they must be `square`, naming what came."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise UserError(f"images must be float (B, 3, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}")
    if square and images.shape[-1] != images.shape[-2]:
        raise UserError(f"images must be square, got {images.shape[-2]} x {images.shape[-1]} px; crop them first")


def image_grid(size: Sequence[int], image_size: int, grid_size: int, name: str, whose: str) -> tuple[int, int]:
    """Rows and columns of the tokens of an image, each token of as many pixels as in a square of a known grid.

    Args:
        size: height and width of the image in pixels.
        image_size: side of the square in pixels.
        grid_size: its tokens per row and column.
        name: what the user gave the size as, for the message.
        whose: the tokens are, for the message.

    Raises:
        UserError: a side is no whole number of tokens.
    """
    height, width = size
    if height <= 0 or width <= 0 or height * grid_size % image_size or width * grid_size % image_size:
        side = image_size // math.gcd(image_size, grid_size)
        raise UserError(f"{name}: {height}x{width} px; allowed: multiples of {whose} {side} px")
    return height * grid_size // image_size, width * grid_size // image_size
