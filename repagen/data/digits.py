"""The bundled UCI handwritten digits (CC BY 4.0, see NOTICE): 1,797 real pictures of 8x8 pixels.

The file is scikit-learn's `load_digits` with its grey levels 0..16 as 8 bits, round(level * 255 / 16). Of each digit
every fifth picture is validation (by index alone the split would be lopsided: the file counts 0 to 9 over and over).
Pictures are bright on black, three equal channels, scaled by
replicating pixels, so that nothing is interpolated.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image

from repagen.data.config import DataConfig, DigitsSubset
from repagen.data.dataset import ImageDataset
from repagen.errors import UserError

DIGIT_SIDE = 8
CLASS_NAMES = [str(digit) for digit in range(10)]
_FOLDER = Path(__file__).parent


def load_digits(subset: DigitsSubset = "all") -> tuple[np.ndarray, np.ndarray]:
    """Return the digits: pictures (N, 8, 8) uint8, bright on black, and labels (N,) int64.

    N is 1,797 for `all`, 1,442 for `train`, 355 for `validation`.
    """
    with np.load(_FOLDER / "digits.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"].astype(np.int64)
    turn = np.array([(labels[:index] == label).sum() for index, label in enumerate(labels)])  # how many of it before
    validation = turn % 5 == 4
    chosen = {"all": validation | True, "train": ~validation, "validation": validation}[subset]
    return images[chosen], labels[chosen]


def digits_to_images(digits: np.ndarray, image_size: int = 32) -> torch.Tensor:
    """Scale digits (N, 8, 8) uint8 by replication to images (N, 3, S, S) float32 in [0, 1], three equal channels.

    Raises:
        UserError: `image_size` is not a multiple of 8.
    """
    if image_size % DIGIT_SIDE or image_size < DIGIT_SIDE:
        raise UserError(f"data.image_size: {image_size} given; the digits allow multiples of {DIGIT_SIDE}, such as 32")
    pixels = torch.from_numpy(digits).float().div(255.0)
    scale = image_size // DIGIT_SIDE
    pixels = pixels.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    return pixels[:, None].expand(-1, 3, -1, -1).contiguous()


def digits_encoder_path() -> Path:
    """Return the folder of the bundled frozen digits encoder (a DINOv2 with registers, 32 px, 4x4 tokens)."""
    return _FOLDER / "digits_encoder"


class DigitsDataset(ImageDataset):
    """The bundled digits as training samples with ten classes.

    Raises:
        UserError: `image_size` is not a multiple of 8, or crops or flips are asked for (they would make other digits).
    """

    def __init__(self, config: DataConfig) -> None:
        if config.crop != "center" or config.horizontal_flip or config.buckets:
            raise UserError(
                "data: the digits are neither mirrored nor cropped; drop data.horizontal_flip, data.crop and "
                "data.buckets"
            )
        digits, labels = load_digits(cast(DigitsSubset, config.subset))
        digits_to_images(digits[:1], config.image_size)  # refuses a wrong size here rather than in a worker
        super().__init__(config, torch.from_numpy(labels), list(CLASS_NAMES))
        self._digits = digits

    def describe(self, index: int) -> str:
        """Return the number of the digit within its subset."""
        return f"digit {index} of subset {self.config.subset}"

    def _decode(self, index: int) -> Image.Image:
        scale = self.config.image_size // DIGIT_SIDE
        return Image.fromarray(self._digits[index].repeat(scale, 0).repeat(scale, 1)).convert("RGB")

    def _hash_sources(self, digest: hashlib._Hash) -> None:
        digest.update(self._digits.tobytes())
