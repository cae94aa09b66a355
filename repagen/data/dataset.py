"""What every dataset of images offers, and what happens when one of its images is bad."""

from __future__ import annotations

import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypedDict

import torch
from PIL import Image
from torch.utils.data import Dataset

from repagen.data.buckets import (
    Size,
    bucket_sizes,
    describe_buckets,
    index_file,
    kept,
    nearest_buckets,
    read_sizes,
)
from repagen.data.captions import Captions
from repagen.data.config import DataConfig
from repagen.data.images import BadImageError, center_crop, random_crop, to_tensor
from repagen.errors import UserError
from repagen.randomness import derived_seed

logger = logging.getLogger(__name__)


class ImageSample(TypedDict):
    """One training sample: image (3, H, W) float32 in [0, 1], its label, and the index it was read from.

    H and W are `image_size`, or with buckets those of the sample's bucket.
    """

    image: torch.Tensor
    label: int
    index: int


class CaptionedSample(ImageSample):
    """A sample of a dataset with captions: one of them, drawn by weight."""

    caption: str


class SampleDataset(Dataset[Any], ABC):
    """A finite, indexed set of training samples with their class names.

    Attributes:
        class_names: name of each label, in order; empty when the samples have no classes (every label is then 0).
        has_captions: whether samples have a `caption`, and `captions` may be called.
        bucket_sizes: height and width of the images, or latents, of each bucket; empty where all have one size.
    """

    class_names: list[str]
    has_captions: bool = False
    bucket_sizes: Sequence[Size] = ()

    @property
    def buckets(self) -> torch.Tensor | None:
        """Bucket of every sample (N,) int64: samples of one bucket have one size. None where all samples have one."""
        return None

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 = unconditional."""
        return len(self.class_names)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int, generator: torch.Generator | None = None) -> Any:
        """Return sample `index`; its augmentations are drawn from the generator, none are applied without one."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Return where sample `index` comes from, for messages: a file name, a row."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the samples' identities, labels and preprocessing."""

    def captions(self, index: int) -> Captions:
        """Return all captions of sample `index`; for datasets with captions."""
        raise NotImplementedError(f"{type(self).__name__} has no captions")

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.load(index % len(self))


class ImageDataset(SampleDataset):
    """Images that are decoded, cropped and flipped as a `DataConfig` says.

    A bad image counts once, however often it is met and whichever loader worker of this process meets it. As long as
    no more than `max_bad_images` are bad, `load` returns another sample in its place, chosen by the index alone, so
    that neither workers nor restarts change the training samples.
    """

    def __init__(self, config: DataConfig, labels: torch.Tensor, class_names: list[str], excluded: int = 0) -> None:
        """Keep what is common to all image datasets.

        Args:
            config: preprocessing and the number of bad images allowed.
            labels: label of every sample (N,) int64.
            class_names: name of each label.
            excluded: files already left out when the dataset was listed; they count as bad images.
        """
        self.config = config
        self.labels = labels
        self.class_names = class_names
        self.bucket_sizes = bucket_sizes(config.buckets, config.image_size, config.bucket_step)
        self._excluded = excluded
        self._bad = torch.zeros(len(labels), dtype=torch.bool)
        if config.max_bad_images > 0:
            self._bad.share_memory_()  # one count for all loader workers

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def _decode(self, index: int) -> Image.Image:
        """Return image `index` as 8-bit RGB; raises `BadImageError`."""

    @cached_property
    def buckets(self) -> torch.Tensor | None:
        """See `SampleDataset.buckets`; the heads of all images are read for it, once for the dataset as it is."""
        if not self.bucket_sizes:
            return None
        found = nearest_buckets(self.original_sizes(), self.bucket_sizes)
        logger.info("images per size: %s", describe_buckets(found, self.bucket_sizes))
        return found

    def original_sizes(self) -> torch.Tensor:
        """Return height and width of every image before cropping (N, 2) int32, zeros for unreadable ones."""

        def read() -> dict[str, torch.Tensor]:
            return {"sizes": read_sizes(self._original_size, range(len(self)), len(self))}

        return kept(index_file(self.config.index_folder, "sizes", self.state()), read)["sizes"]

    def _original_size(self, index: int) -> Size:
        """Return height and width of image `index` before cropping; raises `BadImageError`."""
        image = self._decode(index)
        return image.height, image.width

    def size(self, index: int) -> Size:
        """Return height and width to which image `index` is cropped."""
        side = self.config.image_size
        return (side, side) if self.buckets is None else self.bucket_sizes[int(self.buckets[index])]

    @property
    def bad_indices(self) -> list[int]:
        """Indices of the bad images this process has met so far."""
        return self._bad.nonzero().flatten().tolist()

    def load(self, index: int, generator: torch.Generator | None = None) -> ImageSample:
        """Return sample `index`, or its replacement when the image is bad.

        Args:
            index: in [0, len).
            generator: source of the random crop, the flip and the draw among captions, in this order; without it the
                crop is central, nothing is flipped and the heaviest caption is taken.

        Raises:
            UserError: the image is bad and `max_bad_images` does not allow another one.
        """
        for attempt in range(len(self)):
            replacement = derived_seed(index, "replacement", attempt) % len(self) if attempt else index
            sample = self._try_load(replacement, self.size(index), generator)
            if sample is not None:
                return sample
        raise UserError(f"data: no readable image found in place of {self.describe(index)}")

    def try_load(self, index: int, generator: torch.Generator | None = None) -> ImageSample | None:
        """Return sample `index`, or None when its image is bad and one more bad image is allowed.

        Raises:
            UserError: the image is bad and `max_bad_images` does not allow another one.
        """
        return self._try_load(index, self.size(index), generator)

    def _try_load(self, index: int, size: Size, generator: torch.Generator | None) -> ImageSample | None:
        try:
            image = self.crop(self.original(index), size, generator)
        except BadImageError as error:
            self._count_bad(index, str(error))
            return None
        sample: ImageSample = {"image": image, "label": int(self.labels[index]), "index": index}
        if not self.has_captions:
            return sample
        captioned: CaptionedSample = {**sample, "caption": self.captions(index).draw(generator)}
        return captioned

    def read(self, index: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return image `index` (3, H, W) as the config crops it; bad images are the caller's to count.

        Raises:
            BadImageError: the image is bad; the message is the reason.
        """
        return self.crop(self.original(index), self.size(index), generator)

    def original(self, index: int) -> Image.Image:
        """Return image `index` as 8-bit RGB in its own size; bad images are the caller's to count.

        Raises:
            BadImageError: the image is bad; the message is the reason.
        """
        return self._decode(index)

    def crop(self, image: Image.Image, size: Size, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return an 8-bit RGB image (3, H, W) as the config crops and flips it; `size` is (H, W).

        Raises:
            BadImageError: the image is too elongated for it.
        """
        config = self.config
        if config.crop == "center":
            part = center_crop(image, size)
        else:
            resize_px = config.short_side_px * math.sqrt(size[0] * size[1]) / config.image_size
            part = random_crop(image, size, resize_px, generator)
        pixels = to_tensor(part)
        if config.horizontal_flip and generator is not None and torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(-1)
        return pixels

    def _count_bad(self, index: int, reason: str) -> None:
        if self._bad[index]:
            return
        self._bad[index] = True
        count, allowed = self._excluded + int(self._bad.sum()), self.config.max_bad_images
        if count > allowed:
            raise UserError(
                f"data: bad image {self.describe(index)}: {reason}; bad images so far {count}, data.max_bad_images="
                f"{allowed}; raise it to have other images in place of bad ones (a run may continue so), or repair or "
                "remove this one and start anew"
            )
        logger.warning("bad image %d of at most %d: %s: %s", count, allowed, self.describe(index), reason)

    def _preprocessing(self) -> str:
        config = self.config
        short_side = config.short_side_px if config.crop == "random" else config.image_size
        sizes = "".join(f"/{height}x{width}" for height, width in self.bucket_sizes)
        return f"{config.image_size}/{config.crop}/{short_side}{sizes}"

    def fingerprint(self) -> str:
        """Return a hash of the samples' names, labels, captions and preprocessing (random flips excluded)."""
        digest = hashlib.sha256(self._preprocessing().encode())
        digest.update("\0".join(self.class_names).encode())
        digest.update(self.labels.numpy().tobytes())
        self._hash_sources(digest)
        if self.has_captions:
            self._hash_captions(digest)
        return digest.hexdigest()

    def _hash_captions(self, digest: hashlib._Hash) -> None:
        """Add the captions of all samples to the hash."""
        for index in range(len(self)):
            digest.update(self.captions(index).to_json().encode("utf-8", "surrogatepass"))

    def state(self) -> str:
        """Return a hash that is another one once any image may have been changed or exchanged, on this machine.

        The fingerprint is the same for copies of a dataset elsewhere, and does not look into files; this is to tell
        whether what was computed of the images still holds.
        """
        return self.fingerprint()

    @abstractmethod
    def _hash_sources(self, digest: hashlib._Hash) -> None:
        """Add what identifies the images to the hash."""
