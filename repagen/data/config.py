"""What a data section of a training config, or the `data.*` words of a command, may say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from repagen.data.buckets import bucket_sizes
from repagen.data.captions import MissingRule
from repagen.errors import UserError

DatasetKind = Literal["folder", "datasets", "webdataset", "digits", "shapes", "latents"]
CropKind = Literal["center", "random"]
DigitsSubset = Literal["all", "train", "validation"]
Subset = Literal["all", "train", "validation", "unseen", "with_new_shapes"]


@dataclass
class CaptionConfig:
    """How images get their captions.

    Attributes:
        missing: what becomes of images without one: `refuse` (they are counted and named), `empty` (an empty caption),
            `drop` (they are left out of the dataset).
        columns: name => weight of the columns of a dataset, or of the keys in JSON, that hold captions, such as
            {short: 1, long: 3}; found by name or type when not given. The captions of a column share its weight.
    """

    missing: MissingRule = "refuse"
    columns: dict[str, float] = field(default_factory=dict)


@dataclass
class DataConfig:
    """Where the training samples come from and how an image becomes a square.

    Attributes:
        kind: `folder` (class folders, or a flat folder without classes), `datasets` (Hugging Face datasets, local or
            from the Hub), `webdataset` (tar shards), `digits` (bundled), `shapes` (drawn scenes with captions),
            `latents` (shards written by `repagen cache`).
        path: folder, file or Hub id; of shards a pattern such as shard-{0000..0015}.tar, too; unused by `digits` and
            `shapes`.
        split: split of a Hugging Face dataset.
        revision: branch, tag or commit of a dataset on the Hub.
        image_column: column of a Hugging Face dataset that holds the images; found by its type when not given.
        label_column: column that holds the labels; found by its type when not given, none = unconditional.
        image_size: side of the square images, in pixels.
        crop: `center` (ADM's) or `random` (after a resize of the short side to `resize_px`).
        resize_px: short side before a random crop, in pixels; 1.5 times `image_size` by default.
        horizontal_flip: mirror half of the training samples.
        max_bad_images: how many unreadable images a run may meet before it stops. A bad image is replaced by another
            one that depends on its index alone, and is named once in the log.
        subset: part of the digits or shapes; `unseen` and `with_new_shapes` are of shapes.
        num_images: how many shapes are drawn.
        verify_shards: check the sha256 of latent shards when they are opened (their sizes are always checked).
        captions: give samples a caption; none when not given.
        buckets: sizes that images may have instead of the square alone: ratios such as "3:2" (width : height), at
            about image_size^2 pixels, or [height, width]. An image goes to the size of the nearest proportions and is
            cropped to it; every step of training holds one size.
        bucket_step: what the sides of `buckets` are multiples of, in pixels: the pixels of a token, or more.
        index_folder: where sizes of images and places in shards are kept; ~/.cache/repagen/data when not given.
    """

    kind: DatasetKind = "folder"
    path: str | None = None
    split: str = "train"
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: int = 256
    crop: CropKind = "center"
    resize_px: int | None = None
    horizontal_flip: bool = False
    max_bad_images: int = 0
    subset: Subset = "all"
    num_images: int = 50_000
    verify_shards: bool = True
    captions: CaptionConfig | None = None
    buckets: list[Any] = field(default_factory=list)
    bucket_step: int = 16
    index_folder: str | None = None

    def validate(self) -> None:
        """Check what the types cannot say.

        Raises:
            UserError: a number is out of range, or a path is missing.
        """
        if self.image_size < 1:
            raise UserError(f"data.image_size: {self.image_size} given; allowed: a positive number of pixels")
        if self.max_bad_images < 0:
            raise UserError(f"data.max_bad_images: {self.max_bad_images} given; allowed: 0 or more")
        if self.resize_px is not None and self.crop != "random":
            raise UserError(
                f"data.resize_px: {self.resize_px} given, but only data.crop=random resizes; set it or drop it"
            )
        if self.crop == "random" and self.short_side_px < self.image_size:
            raise UserError(
                f"data.resize_px: {self.resize_px} given; allowed: at least data.image_size={self.image_size}"
            )
        if self.num_images < 1:
            raise UserError(f"data.num_images: {self.num_images} given; allowed: 1 or more")
        if self.subset in ("unseen", "with_new_shapes") and self.kind != "shapes":
            raise UserError(
                f"data.subset: {self.subset} given; only data.kind=shapes has it; allowed: all, train, validation"
            )
        if self.kind not in ("digits", "shapes") and not self.path:
            raise UserError(f"data.path: nothing given; data.kind={self.kind} needs a folder, file or Hub id there")
        if self.bucket_step < 1:
            raise UserError(f"data.bucket_step: {self.bucket_step} given; allowed: a positive number of pixels")
        bucket_sizes(self.buckets, self.image_size, self.bucket_step)
        columns = self.captions.columns if self.captions else {}
        if columns and self.kind in ("shapes", "latents"):
            raise UserError(
                f"data.captions.columns: {', '.join(columns)} given, but data.kind={self.kind} has no columns; drop it"
            )
        for name, weight in columns.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not (0 < weight < math.inf):
                raise UserError(f"data.captions.columns.{name}: {weight!r} given; allowed: a positive weight")

    @property
    def short_side_px(self) -> int:
        """Short side before a random crop, in pixels; RAE's 384 for 256."""
        return self.resize_px if self.resize_px is not None else self.image_size * 3 // 2


def data_config_from_words(words: Sequence[str]) -> DataConfig:
    """Build a config from command-line words such as `data.kind=folder data.path=photos data.image_size=256`.

    Raises:
        UserError: a word is no `data.KEY=VALUE`, a key is unknown or given twice, a value is of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    keys = ", ".join(f"data.{key}" for key in DataConfig.__dataclass_fields__)
    given: set[str] = set()
    for word in words:
        key, equals, value = word.partition("=")
        section, _, name = key.partition(".")
        nested = name.startswith("captions.")
        if not equals or section != "data" or not (nested or name in DataConfig.__dataclass_fields__):
            raise UserError(f"{word}: not a known setting; allowed: KEY=VALUE with KEY one of {keys}")
        if "${" in value or key in given:
            raise UserError(
                f"{word}: {'given twice' if key in given else 'references are not resolved here'}; drop it"
            )
        given.add(key)
    try:
        settings = OmegaConf.from_dotlist([word.removeprefix("data.") for word in words])
        config = cast(DataConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), settings)))
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{' '.join(words)}: {str(error).splitlines()[0]}; allowed keys: {keys}") from error
    config.validate()
    return config
