"""From 8-bit images to the side that a network looks at. The kernel moves every figure, so each has a name."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ResizeKernel = Literal["tensorflow1-bilinear", "pillow-bicubic", "pillow-bicubic-float", "torch-bicubic-antialias"]

KERNELS: dict[str, str] = {
    "tensorflow1-bilinear": "TensorFlow 1's bilinear kernel, neither antialiased nor centred (the FID literature)",
    "pillow-bicubic": "Pillow's bicubic kernel on 8-bit images (dgm-eval, CMMD)",
    "pillow-bicubic-float": "Pillow's bicubic kernel on each channel in floating point, not rounded (clean-fid)",
    "torch-bicubic-antialias": "torch's antialiased bicubic kernel on floats, not rounded or clamped (EDM2, FD-Loss)",
}


def resize(images: torch.Tensor, side: int, kernel: ResizeKernel) -> torch.Tensor:
    """Resize uint8 images (B, 3, H, W) to float32 (B, 3, side, side) in [0, 255], or a little beyond for bicubics.

    Args:
        images: on any device; Pillow's kernels work on the CPU and bring the result back.
        side: in pixels.
        kernel: see `KERNELS`. Images that already have the side are only converted.
    """
    if images.shape[-2:] == (side, side):
        return images.float()
    if kernel == "tensorflow1-bilinear":
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        return interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(side, side), align_corners=False)
    if kernel == "torch-bicubic-antialias":
        return F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True)
    by_channel = kernel == "pillow-bicubic-float"
    resized = [_with_pillow(image, side, by_channel) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float().to(images.device)


def _with_pillow(image: np.ndarray, side: int, by_channel: bool) -> np.ndarray:
    """(H, W, 3) uint8 => (side, side, 3), float32 where each channel is resized by itself, uint8 otherwise."""
    size, bicubic = (side, side), Image.Resampling.BICUBIC
    if not by_channel:
        return np.asarray(Image.fromarray(image).resize(size, bicubic))
    channels = [
        Image.fromarray(channel.astype(np.float32)).resize(size, bicubic) for channel in np.moveaxis(image, 2, 0)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)
