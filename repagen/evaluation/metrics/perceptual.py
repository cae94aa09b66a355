"""LPIPS, the perceptual distance of losses and of reconstruction (Zhang et al. 2018, arXiv 1801.03924, version 0.1).

Weights come from local files only: the trunk from a torchvision state dict (the torch cache by default), the linear
heads from the file that the `lpips` package carries. Nothing is downloaded and nothing but tensors is read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from repagen.errors import UserError
from repagen.hub.places import published_file_command, torch_checkpoint

Backbone = Literal["vgg", "alex"]

# File name => how the sha256 of the published file begins. A file of one of these names must have this content.
PUBLISHED_SHA256 = {
    "vgg16-397923af.pth": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    "vgg.pth": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "alexnet-owt-7be5be79.pth": "7be5be79",  # torchvision publishes no more than these digits, in the name
    "alex.pth": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
}
# Backbone => torchvision's name of the network, and of its file in the torch cache.
TRUNKS = {"vgg": ("vgg16", "vgg16-397923af.pth"), "alex": ("alexnet", "alexnet-owt-7be5be79.pth")}
_OR_WITHOUT = "or do without LPIPS (in training lpips.weight=0)"

# LPIPS's own normalisation of images in [-1, 1]; it is not ImageNet's.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10


class PerceptualDistance(nn.Module):
    """LPIPS: d(a, b) = sum over stages of mean over pixels of w . (u(a) - u(b))^2.

    u are the features after the last ReLU of each stage, divided by their length over channels. A stage of VGG ends at
    a pooling, in AlexNet every convolution is one. The widths and depths of the stages are those of the given state
    dicts, so a small network of the same layout works too. Frozen: its parameters take no gradient and it stays in
    eval mode; gradients flow to the images.

    Args:
        trunk: `features.{i}.{weight,bias}` without batch norm; indices advance by 2, and by 3 over a pooling. Other
            parts of the network (`classifier.*`) are left out.
        heads: `lin{k}.model.1.weight` (1, C_k, 1, 1), one per stage.
        backbone: whose layout it is: `vgg`, the usual one of losses, or `alex`, the usual one of reported figures.

    Raises:
        UserError: when the state dicts have another layout or do not fit together.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: Mapping[str, Tensor], heads: Mapping[str, Tensor], backbone: Backbone = "vgg") -> None:
        super().__init__()
        self.backbone = backbone
        stages = _build_stages(trunk, backbone)
        widths = [cast(nn.Conv2d, stage[-2]).out_channels for stage in stages]
        self.stages = nn.ModuleList(stages)
        for index, weight in enumerate(_head_weights(heads, widths)):
            self.register_buffer(f"head_{index}", weight)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.files: dict[str, str] = {}
        self.requires_grad_(False)
        super().train(False)

    @classmethod
    def from_files(
        cls,
        trunk: str | os.PathLike[str] | None = None,
        heads: str | os.PathLike[str] | None = None,
        backbone: Backbone = "vgg",
    ) -> PerceptualDistance:
        """Load the network from local files and record their sha256 in `files`.

        Args:
            trunk: state dict (`.pth` or `.safetensors`); None = torchvision's VGG16 or AlexNet in the torch cache.
            heads: linear heads; None = the file inside the installed `lpips` package.
            backbone: `vgg` or `alex`.

        Raises:
            UserError: when a file is absent, damaged, not what its published name promises, or of another layout, or
                has a weight that is not finite.
        """
        paths = {
            "trunk": Path(trunk) if trunk else _cached_trunk(backbone),
            "heads": Path(heads) if heads else _packaged_heads(backbone),
        }
        digests = {path.name: _verified_sha256(path, part) for part, path in paths.items()}
        tensors = {part: _read_tensors(path, part) for part, path in paths.items()}
        network = cls(tensors["trunk"], tensors["heads"], backbone)
        network.files = digests
        return network

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stay in eval mode: the distance is a fixed function."""
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the unit-length features of images (B, 3, H, W) in [0, 1]: one float32 (B, C_k, H_k, W_k) a stage."""
        x = (2.0 * images.float() - 1.0 - self.shift) / self.scale
        features = []
        for stage in self.stages:
            x = stage(x)
            # vector_norm has gradient 0 at 0, where the textbook sqrt(sum of squares) gives NaN (dead ReLUs do occur).
            length = torch.linalg.vector_norm(x.float(), dim=1, keepdim=True)
            features.append(x.float() / (length + _EPS))
        return features

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Return the distance (B,) float32 between images and references, both (B, 3, H, W) in [0, 1].

        Gradients flow to both arguments; pass `references` under no grad (they are data in training).
        """
        distance = images.new_zeros(images.shape[0], dtype=torch.float32)
        for index, (a, b) in enumerate(zip(self.features(images), self.features(references), strict=True)):
            weight = self.get_buffer(f"head_{index}")
            distance = distance + ((a - b).square() * weight).sum(1).mean((1, 2))
        return distance


def _build_stages(state: Mapping[str, Tensor], backbone: Backbone) -> list[nn.Sequential]:
    """Build the convolution stages that the keys of a state dict describe, each with its weights."""
    indices = sorted(int(m[1]) for key in state if (m := re.fullmatch(r"features\.(\d+)\.weight", key)))
    if not indices or indices[0] != 0 or any(state[f"features.{i}.weight"].ndim != 4 for i in indices):
        network = TRUNKS[backbone][0]
        raise UserError(
            f"LPIPS trunk: the file holds no plain {network} (keys features.0.weight, features.2.weight, ... of "
            f"convolutions, no batch norm); give torchvision's {network} state dict"
        )
    stages: list[list[nn.Module]] = []
    for previous, index in zip([-2, *indices], indices, strict=False):
        if index - previous not in (2, 3):
            raise UserError(
                f"LPIPS trunk: after features.{previous} comes features.{index}; indices go on by 2, and by 3 over a "
                "pooling"
            )
        pooled = index - previous == 3
        if pooled or backbone == "alex" or not stages:
            stages.append([nn.MaxPool2d(3 if backbone == "alex" else 2, 2)] if pooled else [])
        stages[-1] += [_convolution(state, index, strided=backbone == "alex" and index == 0), nn.ReLU(inplace=True)]
    return [nn.Sequential(*layers) for layers in stages]


def _convolution(state: Mapping[str, Tensor], index: int, strided: bool) -> nn.Conv2d:
    """Return a convolution that keeps the size, or AlexNet's first one (stride 4, padding 2)."""
    weight, bias = state[f"features.{index}.weight"], state.get(f"features.{index}.bias")
    if bias is None:
        raise UserError(f"LPIPS trunk: features.{index}.bias is missing")
    stride, padding = (4, 2) if strided else (1, weight.shape[2] // 2)
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride=stride, padding=padding)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def _head_weights(state: Mapping[str, Tensor], widths: list[int]) -> list[Tensor]:
    """Return the linear heads' weights (1, C_k, 1, 1) float32, checked against the trunk's widths."""
    wanted = [f"lin{index}.model.1.weight" for index in range(len(widths))]
    found = sorted(state)
    if found != wanted:
        raise UserError(f"LPIPS heads: a trunk of {len(widths)} stages needs the keys {wanted}; the file has {found}")
    for key, width in zip(wanted, widths, strict=True):
        if tuple(state[key].shape) != (1, width, 1, 1):
            raise UserError(
                f"LPIPS heads: {key} has shape {tuple(state[key].shape)}; the trunk needs (1, {width}, 1, 1)"
            )
    return [state[key].float() for key in wanted]


def _cached_trunk(backbone: Backbone) -> Path:
    """Return torchvision's network in torch's cache."""
    network, name = TRUNKS[backbone]
    path = torch_checkpoint(name)
    if not path.is_file():
        raise UserError(
            f"LPIPS trunk: no {network} weights at {path}; get them with "
            f"{published_file_command(f'lpips-{backbone}')}, or give a local file, {_OR_WITHOUT}"
        )
    return path


def _packaged_heads(backbone: Backbone) -> Path:
    """Return the heads that the `lpips` package carries, found without importing it."""
    specification = importlib.util.find_spec("lpips")
    if specification is None or specification.origin is None:
        raise UserError(
            "LPIPS heads: the package `lpips` is not installed; run `pip install 'repagen[metrics]'`, or give its "
            f"weights/v0.1/{backbone}.pth, {_OR_WITHOUT}"
        )
    return Path(specification.origin).parent / "weights" / "v0.1" / f"{backbone}.pth"


def _verified_sha256(path: Path, part: str) -> str:
    if not path.is_file():
        raise UserError(f"LPIPS {part}: no file at {path}; correct the path, {_OR_WITHOUT}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(PUBLISHED_SHA256.get(path.name, "")):
        raise UserError(
            f"LPIPS {part}: {path} has sha256 {digest[:16]}..., the published file of this name has "
            f"{PUBLISHED_SHA256[path.name][:16]}...; download it again, or rename it if it is meant to differ"
        )
    return digest


def _read_tensors(path: Path, part: str) -> dict[str, Tensor]:
    """Read a state dict of tensors; a pickle is read with `weights_only`, so that no code of it runs."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile and pickle each raise their own kind
        raise UserError(f"LPIPS {part}: {path} is no readable state dict ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"LPIPS {part}: {path} holds no plain state dict of tensors")
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise UserError(f"LPIPS {part}: {path}:{key} is not finite; the file is damaged, fetch it again")
    return state
