"""Many images as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image


def save_image_grid(
    images: Sequence[Image.Image] | torch.Tensor,
    path: Path,
    *,
    columns: int | None = None,
    enlarge: int = 1,
    gap_px: int = 0,
) -> None:
    """Write equally sized images as one PNG; arguments as in `image_grid`.

    Args:
        images: PIL images, or a tensor (B, 3, H, W) in [0, 1].
        path: the PNG; its folder is made if needed.
        columns, enlarge, gap_px: of the grid.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, columns=columns, enlarge=enlarge, gap_px=gap_px).save(path)


def image_grid(
    images: Sequence[Image.Image] | torch.Tensor, *, columns: int | None = None, enlarge: int = 1, gap_px: int = 0
) -> Image.Image:
    """Return equally sized images as one, row by row; what they do not cover is black.

    Args:
        images: PIL images, or a tensor (B, 3, H, W) in [0, 1].
        columns: images a row; None: about as many as rows.
        enlarge: integer factor by which every pixel is repeated.
        gap_px: pixels between neighbours.
    """
    from torchvision.transforms.functional import to_pil_image

    if isinstance(images, torch.Tensor):
        images = [to_pil_image(image) for image in images.detach().float().cpu().clamp(0, 1)]
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = (side * enlarge for side in images[0].size)
    grid = Image.new("RGB", (columns * (width + gap_px) - gap_px, rows * (height + gap_px) - gap_px))
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        enlarged = image.resize((width, height), Image.Resampling.NEAREST)
        grid.paste(enlarged, (column * (width + gap_px), row * (height + gap_px)))
    return grid
