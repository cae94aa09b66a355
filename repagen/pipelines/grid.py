"""Many images as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image


def save_image_grid(
    images: Sequence[Image.Image] | torch.Tensor, path: Path, *, columns: int | None = None, enlarge: int = 1
) -> None:
    """Write equally sized images as one PNG, row by row; missing ones at its end are black.

    Args:
        images: PIL images, or a tensor (B, 3, H, W) in [0, 1].
        path: the PNG; its folder is made if needed.
        columns: images a row; None: about as many as rows.
        enlarge: integer factor by which every pixel is repeated.
    """
    from diffusers.utils import make_image_grid
    from torchvision.transforms.functional import to_pil_image

    if isinstance(images, torch.Tensor):
        images = [to_pil_image(image) for image in images.detach().float().cpu().clamp(0, 1)]
    width, height = images[0].size
    if enlarge > 1:
        size = (width * enlarge, height * enlarge)
        images = [image.resize(size, Image.Resampling.NEAREST) for image in images]
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    missing = [Image.new("RGB", images[0].size)] * (rows * columns - len(images))
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid([*images, *missing], rows=rows, cols=columns).save(path)
