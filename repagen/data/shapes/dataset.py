"""Drawn scenes as training samples."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from repagen.data.captions import Captions
from repagen.data.config import DataConfig
from repagen.data.dataset import ImageDataset
from repagen.data.shapes.drawing import draw_scene, picture_sides
from repagen.data.shapes.scenes import NEW_SHAPES, SHAPES, Combinations, Scene, sample_scene
from repagen.errors import UserError

TRAINING_SEED, VALIDATION_SEED = 0, 1
"""Of the scenes that are trained on, and of all others."""
_COMBINATIONS: dict[str, Combinations] = {
    "all": "all",
    "train": "seen",
    "validation": "seen",
    "unseen": "unseen",
    "with_new_shapes": "seen",
}


def shapes_encoders_path() -> Path:
    """Return the folder of the bundled SigLIP-like pair trained on shapes (both towers, 32 px, 4x4 tokens)."""
    return Path(__file__).parents[1] / "shapes_encoders"


def shapes_pipeline_path() -> Path:
    """Return the folder of the bundled text-to-image pipeline of shapes."""
    return Path(__file__).parents[1] / "shapes_pipeline"


class ShapesDataset(ImageDataset):
    """Drawn scenes with captions, without classes.

    Of `data.subset`, `train` and `validation` hold other scenes of the same combinations, `unseen` scenes with a
    combination of shape and colour, or of two objects, that `train` leaves out, and `all` scenes of both sorts.
    `with_new_shapes` is for decoders: it shows shapes that no generator is taught in the other subsets.

    Raises:
        UserError: crops or flips are asked for (captions would no longer be true), or pictures too small.
    """

    has_captions = True

    def __init__(self, config: DataConfig) -> None:
        if config.crop != "center" or config.horizontal_flip:
            raise UserError(
                "data: shapes are neither mirrored nor cropped, their captions would be wrong; drop "
                "data.horizontal_flip and data.crop"
            )
        super().__init__(config, torch.zeros(config.num_images, dtype=torch.int64), [])
        for size in self.bucket_sizes or [(config.image_size, config.image_size)]:
            picture_sides(size)

    @cached_property
    def buckets(self) -> torch.Tensor | None:
        """See `SampleDataset.buckets`; scenes are drawn in the sizes in turn."""
        return torch.arange(len(self)) % len(self.bucket_sizes) if self.bucket_sizes else None

    def scene(self, index: int) -> Scene:
        """Return the scene of a sample."""
        subset = self.config.subset
        seed = TRAINING_SEED if subset in ("train", "with_new_shapes") else VALIDATION_SEED
        shapes = (*SHAPES, *NEW_SHAPES) if subset == "with_new_shapes" else SHAPES
        return sample_scene(seed, index, combinations=_COMBINATIONS[subset], shapes=shapes)

    def describe(self, index: int) -> str:
        """Return the number of the scene within its subset."""
        return f"scene {index} of subset {self.config.subset}"

    def captions(self, index: int) -> Captions:
        """Return the prompts of a scene, all of one weight."""
        texts = tuple(prompt.text for prompt in self.scene(index).prompts())
        return Captions(texts, (1.0,) * len(texts))

    def _decode(self, index: int) -> Image.Image:
        return Image.fromarray(draw_scene(self.scene(index), self.size(index)))

    def _hash_sources(self, digest: hashlib._Hash) -> None:
        for index in range(min(len(self), 16)):
            digest.update(repr(self.scene(index)).encode() + draw_scene(self.scene(index)).tobytes())

    def _hash_captions(self, digest: hashlib._Hash) -> None:
        """Add those of the first scenes: the others follow from the same code."""
        for index in range(min(len(self), 16)):
            digest.update(self.captions(index).to_json().encode())
