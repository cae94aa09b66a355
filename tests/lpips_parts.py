"""LPIPS networks with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

VGG_STAGES = ((4, 4), (6,))
State = dict[str, torch.Tensor]


def random_lpips(stages: Sequence[Sequence[int]] = VGG_STAGES, seed: int = 0) -> tuple[State, State]:
    """Random state dicts in the layout of torchvision's VGG and of the lpips package's heads."""
    generator = torch.Generator().manual_seed(seed)
    trunk: State = {}
    heads: State = {}
    index, channels = 0, 3
    for number, stage in enumerate(stages):
        for width in stage:
            scale = (2 / (9 * channels)) ** 0.5
            trunk[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * scale
            trunk[f"features.{index}.bias"] = torch.randn(width, generator=generator) * 0.1
            channels, index = width, index + 2
        index += 1
        heads[f"lin{number}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator)
    return trunk, heads


def write_lpips(folder: Path) -> tuple[Path, Path]:
    trunk, heads = random_lpips()
    torch.save(trunk, folder / "tiny_vgg.pth")
    torch.save(heads, folder / "tiny_heads.pth")
    return folder / "tiny_vgg.pth", folder / "tiny_heads.pth"


def random_alex_lpips(widths: Sequence[int] = (6, 8, 8, 6, 6), seed: int = 0) -> tuple[State, State]:
    """The same in the layout of torchvision's AlexNet."""
    generator = torch.Generator().manual_seed(seed)
    trunk: State = {}
    heads: State = {}
    channels = 3
    for number, (index, kernel, width) in enumerate(zip((0, 3, 6, 8, 10), (11, 5, 3, 3, 3), widths, strict=True)):
        scale = (2 / (kernel**2 * channels)) ** 0.5
        trunk[f"features.{index}.weight"] = torch.randn(width, channels, kernel, kernel, generator=generator) * scale
        trunk[f"features.{index}.bias"] = torch.randn(width, generator=generator) * 0.1
        heads[f"lin{number}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
        channels = width
    return trunk, heads
