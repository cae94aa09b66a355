"""Sampling that starts from an image: partial noising, and the part of it that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from repagen.errors import UserError
from repagen.flow.path import interpolate
from repagen.flow.time import TimeShift
from repagen.pipelines.sampling_options import is_number
from repagen.schedulers.presets import lay_grid

Images: TypeAlias = Image.Image | np.ndarray | torch.Tensor | Sequence[Image.Image | np.ndarray | torch.Tensor]
"""A PIL image; an array (H, W, C) or tensor (C, H, W), a batch of these, floats in [0, 1] or uint8; or a list."""


@dataclass(frozen=True)
class KnownImage:
    """An image in the latent space, and the noise that it is mixed with.

    Attributes:
        latents: (B, C, h, w) float32, standardised.
        noise: (B, C, h, w) float32.
        repainted: (B, 1, h, w) bool, True for tokens that are drawn anew; None: all are.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    repainted: torch.Tensor | None

    def at(self, t: float) -> torch.Tensor:
        """The image noised to time t, (B, C, h, w)."""
        return interpolate(self.latents, self.noise, t)

    def kept(self, latents: torch.Tensor, t: float) -> torch.Tensor:
        """Latents at time t with the image's own, noised to t, where it is kept."""
        return latents if self.repainted is None else torch.where(self.repainted, latents, self.at(t))


def lay_partial_grid(
    scheduler: Any,
    strength: float,
    num_inference_steps: int,
    sigmas: Sequence[float] | None,
    device: torch.device | None,
) -> bool:
    """Set the timesteps of a scheduler to the part of its grid from t = strength on, beginning with exactly that time.

    Args:
        scheduler: of ours, or diffusers' `FlowMatchEulerDiscreteScheduler`.
        strength: t in [0, 1] to begin at, after the time shift; 1 is the whole grid.
        num_inference_steps, sigmas, device: of the whole grid; see `lay_grid`.

    Returns:
        Whether there is a step to make; not at strength 0, nor where the grid ends above the strength.

    Raises:
        UserError: as `lay_grid`; strength outside [0, 1].
    """
    if not (is_number(strength) and 0 <= strength <= 1):
        raise UserError(
            f"strength is {strength!r}; give a number in [0, 1]: 0 keeps the image, 1 leaves nothing of it"
        )
    grid = lay_grid(scheduler, num_inference_steps, sigmas, device)
    if strength == 1 or grid is None:
        return True
    start = TimeShift(scheduler.shift).inverse(strength)
    rest = [sigma for sigma in grid if sigma < start]
    if strength == 0 or not (rest or float(scheduler.sigmas[-1]) == 0):
        return False
    lay_grid(scheduler, num_inference_steps, [start, *rest], device)
    return True


def image_batch(images: Images, size: tuple[int, int], name: str, channels: int) -> torch.Tensor:
    """Return images as one batch (B, channels, height, width) float32 in [0, 1].

    Those of another size are scaled, with their proportions, until they cover it, and cropped around their centre.

    Args:
        images: see `Images`.
        size: height and width in pixels.
        name: of the argument, for messages.
        channels: 3, or 1 for a mask, which may also be given without channels.

    Raises:
        UserError: something that is none of these, or numbers outside [0, 1].
    """
    return torch.cat([_covering(batch, size) for batch in _batches(images, name, channels)])


def check_frames(images: Images, masks: Images) -> None:
    """Refuse a mask of other proportions than its image, over which it would not lie.

    Raises:
        UserError: proportions that differ by more than a pixel; what is no image.
    """
    frames, covers = _sides(images, "image", 3), _sides(masks, "mask_image", 1)
    count = max(len(frames), len(covers))
    frames, covers = (sides * count if len(sides) == 1 else sides for sides in (frames, covers))
    for (height, width), (rows, columns) in zip(frames, covers, strict=False):
        if abs(rows * width - columns * height) > max(height, width, rows, columns):
            raise UserError(
                f"mask_image is {columns} x {rows} for an image of {width} x {height}; give one of the image's size, "
                "or of its proportions"
            )


def _sides(images: Images, name: str, channels: int) -> list[tuple[int, int]]:
    return [(batch.shape[2], batch.shape[3]) for batch in _batches(images, name, channels) for _ in batch]


def _batches(images: Images, name: str, channels: int) -> list[torch.Tensor]:
    if isinstance(images, (Image.Image, torch.Tensor, np.ndarray)):
        images = [images]
    batches = [_tensors(image, name, channels) for image in images]
    if not batches:
        raise UserError(f"{name} is an empty list; give at least one")
    return batches


def token_mask(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens that a mask touches: pixels (B, 1, H, W), painted above 1/2 => (B, 1, h, w) bool, on the grid (h, w)."""
    return F.adaptive_max_pool2d(mask, grid) > 0.5


def _tensors(image: Any, name: str, channels: int) -> torch.Tensor:
    """One image, or a batch, as (B, channels, H, W) float32 in [0, 1]."""
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB" if channels == 3 else "L"))
    if isinstance(image, np.ndarray):
        array = torch.from_numpy(np.ascontiguousarray(image))
        tensor = array.movedim(-1, -3) if array.ndim > 2 else array
    elif isinstance(image, torch.Tensor):
        tensor = image
    else:
        raise UserError(f"{name} has a {type(image).__name__}; give PIL images, arrays or tensors")
    tensor = tensor[(None,) * max(0, 4 - tensor.ndim)]
    if tensor.ndim != 4 or tensor.shape[1] != channels or 0 in tensor.shape:
        wanted = f"(H, W, {channels})" if isinstance(image, np.ndarray) else f"({channels}, H, W)"
        raise UserError(f"{name} has shape {tuple(image.shape)}; give {wanted}, or a batch of such")
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if not (tensor.dtype == torch.bool or (tensor.is_floating_point() and 0 <= tensor.amin() <= tensor.amax() <= 1)):
        raise UserError(f"{name} is {tensor.dtype} with values outside [0, 1]; give floats in [0, 1], or uint8")
    return tensor.float()


def _covering(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    height, width = images.shape[2:]
    if (height, width) == size:
        return images
    factor = max(size[0] / height, size[1] / width)
    scaled = [max(round(side * factor), least) for side, least in zip((height, width), size, strict=True)]
    images = F.interpolate(images, size=scaled, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return images[:, :, top : top + size[0], left : left + size[1]]
