"""What every feature extractor offers, what tells two of them apart, and the settings that a protocol fixes for one.

One contract: uint8 images (B, 3, H, W) => named features (B, D) float32, plus an identity that goes beside a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import torch

from repagen.errors import UserError
from repagen.evaluation.resize import ResizeKernel

ExtractorKind = Literal["inception", "encoder", "clip", "timm"]
Pooling = Literal["mean", "cls", "attention"]


@dataclass
class ExtractorRule:
    """How images become features.

    Attributes:
        kind: `inception` (torch-fidelity's port of the TensorFlow network), `encoder` (any `VisionEncoder`), `clip`
            (projected CLIP embeddings), `timm` (any model of timm, pooled).
        model: Hub id, folder or timm name of the weights; unused by `inception`.
        size_px: side of the images that the network sees; the model's own where none is given.
        kernel: how images get there.
        pooling: of tokens: their mean, the class token, or the model's attention pooling (timm).
        precision: `float32`, without TF32; or `bfloat16` under autocast, as FD-Loss runs its encoders.
    """

    kind: ExtractorKind = "inception"
    model: str = ""
    size_px: int | None = None
    kernel: ResizeKernel = "torch-bicubic-antialias"
    pooling: Pooling = "mean"
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class ExtractorIdentity:
    """What must be equal for two figures to be comparable.

    Attributes:
        name: `inception-v3-compat`, or the model's id or folder name.
        weights_sha256: hash of the weights.
        settings: port, size, kernel, pooling, layers, dtype.
    """

    name: str
    weights_sha256: str
    settings: str

    def __str__(self) -> str:
        return f"{self.name} ({self.settings}; weights {self.weights_sha256[:12]})"

    def matches(self, other: ExtractorIdentity) -> bool:
        """Whether both compute the same features; where the weights were loaded from does not matter."""
        return (self.weights_sha256, self.settings) == (other.weights_sha256, other.settings)

    def as_dict(self) -> dict[str, str]:
        """The fields, for JSON."""
        return asdict(self)


class FeatureExtractor(Protocol):
    """uint8 images (B, 3, H, W) on any device => features by name, each (B, D) float32.

    The first name is that of the features whose distance the space is known by.
    """

    @property
    def identity(self) -> ExtractorIdentity:
        """Name, weights and settings of the extractor."""

    @property
    def dimensions(self) -> Mapping[str, int]:
        """Number of features D by name."""

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features."""


def in_fixed_batches(
    function: Callable[[torch.Tensor], dict[str, torch.Tensor]], images: torch.Tensor, size: int
) -> dict[str, torch.Tensor]:
    """Call a network on batches of exactly `size` images, the last one padded with copies, and join the results.

    Kernels are chosen by the shape of a batch and round differently. At one shape, the features of an image depend
    neither on its place nor on its neighbours: hence equal, bit by bit, for every number of images and processes.
    """
    parts = []
    for batch in images.split(size):
        padding = batch[-1:].expand(size - len(batch), *batch.shape[1:])
        features = function(torch.cat([batch, padding]))
        parts.append({name: rows[: len(batch)].cpu() for name, rows in features.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def require_square(images: torch.Tensor) -> None:
    """Refuse images that a square network input would distort.

    Raises:
        UserError: naming the size.
    """
    if images.shape[-2] != images.shape[-1]:
        raise UserError(f"encoders see square images, got {images.shape[-2]} x {images.shape[-1]} px; crop them")


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Switch off TF32 and autocast: both move Inception features enough to change an FID's second digit."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
