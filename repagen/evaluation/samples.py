"""Where uint8 images come from: a folder, an npz of the ADM layout, a dataset, or memory."""

from __future__ import annotations

import hashlib
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch

from repagen.data import (
    DataConfig,
    ImageDataset,
    SampleDataset,
    data_config_from_words,
    open_image_dataset,
    sample_indices,
)
from repagen.data.folders import list_images
from repagen.data.images import EXTENSIONS, BadImageError, decode_image
from repagen.errors import UserError
from repagen.files import printable, state_of_files

LabelMode = Literal["balanced", "random"]
Rounding = Literal["round", "truncate"]
_DECODING_THREADS = 8  # Pillow decodes without the interpreter's lock
_ANY_NUMBER = 2**62


@dataclass(frozen=True)
class Unreadable:
    """Stands in for an image that could not be decoded: which one, and why."""

    name: str
    reason: str


class ImageSource(ABC):
    """A numbered set of images. Image i is the same for every batch size and process count."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, unreadable ones included."""

    @abstractmethod
    def load(self, indices: Sequence[int]) -> list[torch.Tensor | Unreadable]:
        """Return the images at `indices`, each uint8 (3, H, W), or what stands in for an unreadable one."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Name of one image, for messages."""

    @property
    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """How the images came about, for the result file."""

    def origin(self) -> str:
        """What must be the same for features of any of these images to be used again, beside the protocol."""
        return ""

    def state(self, indices: Sequence[int]) -> str:
        """What must be the same of these images for their features to be used again; see `FeatureStore`."""
        return ""


class FolderImages(ImageSource):
    """All images below a folder, in the order of their paths, as they are: nothing is cropped or resized.

    Args:
        folder: searched with its subfolders, also where they are links (see `list_images`).

    Raises:
        UserError: when there is no such folder, or no image in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"no such folder of images: {folder}")
        readable, unread = list_images(self.folder)  # those of unread formats count as unreadable images
        self.paths = sorted(map(Path, readable + unread))
        if not self.paths:
            raise UserError(f"{folder}: no images found; looked for {', '.join(sorted(EXTENSIONS))}")

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, indices: Sequence[int]) -> list[torch.Tensor | Unreadable]:
        """Decode image files to RGB."""
        with ThreadPoolExecutor(min(_DECODING_THREADS, max(len(indices), 1))) as pool:
            return list(pool.map(self._decode, indices))

    def _decode(self, index: int) -> torch.Tensor | Unreadable:
        try:
            pixels = np.array(decode_image(self.paths[index]))
        except BadImageError as error:
            return Unreadable(self.describe(index), str(error))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def describe(self, index: int) -> str:
        """Path of the file below the folder."""
        return printable(self.paths[index].relative_to(self.folder).as_posix())

    @property
    def protocol(self) -> dict[str, Any]:
        """Kind and folder."""
        return {"kind": "folder", "path": printable(self.folder)}

    def state(self, indices: Sequence[int]) -> str:
        """Names, sizes and times of the files."""
        return state_of_files([self.paths[index] for index in indices])


class NpzImages(ImageSource):
    """Array `arr_0` of an npz, uint8 (N, H, W, 3), as the ADM suite exchanges samples.

    Read piece by piece, so that 50,000 images need no 10 GB of memory; best read in ascending order.

    Args:
        path: the npz. Pickled content is refused.

    Raises:
        UserError: when the file or the array is missing, damaged or of another layout.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stream = _open_npz_member(self.path, "arr_0")
        try:
            shape, fortran_order, dtype = _read_npy_header(self._stream)
        except (ValueError, zipfile.BadZipFile) as error:
            raise self._damaged(error) from error
        if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3:
            raise UserError(f"{path}: arr_0 must be uint8 (N, H, W, 3), got {dtype} {shape}; save it so")
        self.shape = shape
        self._start = self._stream.tell()

    def __len__(self) -> int:
        return self.shape[0]

    def load(self, indices: Sequence[int]) -> list[torch.Tensor | Unreadable]:
        """Read single images."""
        return [self._read(index) for index in indices]

    def _read(self, index: int) -> torch.Tensor:
        image_bytes = int(np.prod(self.shape[1:]))
        try:
            self._stream.seek(self._start + index * image_bytes)
            content = self._stream.read(image_bytes)
        except zipfile.BadZipFile as error:
            raise self._damaged(error) from error
        if len(content) != image_bytes:
            raise UserError(f"{self.path}: ends within image {index} of {len(self)}; write it again")
        pixels = np.frombuffer(content, np.uint8).reshape(self.shape[1:])
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def _damaged(self, error: Exception) -> UserError:
        self._stream.close()
        return UserError(f"{self.path}: the file is damaged ({error}); write it again")

    def describe(self, index: int) -> str:
        """Row of the array."""
        return f"{printable(self.path.name)}[{index}]"

    @property
    def protocol(self) -> dict[str, Any]:
        """Kind and file."""
        return {"kind": "npz", "path": printable(self.path)}

    def origin(self) -> str:
        """Size and time of the file."""
        return state_of_files([self.path])


class TensorImages(ImageSource):
    """Images in memory.

    Args:
        images: uint8 (N, 3, H, W).
        name: what they are, for messages and results.

    Raises:
        UserError: for another dtype or shape.
    """

    def __init__(self, images: torch.Tensor, name: str = "tensor") -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"{name}: images must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}; see to_uint8"
            )
        self.images = images
        self.name = name

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: Sequence[int]) -> list[torch.Tensor | Unreadable]:
        """Return single images."""
        return [self.images[index].cpu() for index in indices]

    def describe(self, index: int) -> str:
        """Row of the tensor."""
        return f"{self.name}[{index}]"

    @property
    def protocol(self) -> dict[str, Any]:
        """Kind and name."""
        return {"kind": "tensor", "name": self.name}

    def state(self, indices: Sequence[int]) -> str:
        """A hash of the pixels."""
        return hashlib.sha256(self.images[list(indices)].cpu().contiguous().numpy().tobytes()).hexdigest()


def npz_keys(path: Path) -> set[str]:
    """Names of the arrays in an npz.

    Raises:
        UserError: when there is no such file, or it is no npz.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: not an npz file ({error})") from error


def _open_npz_member(path: Path, key: str) -> IO[bytes]:
    keys = npz_keys(path)
    if key not in keys:
        raise UserError(f"{path}: no array {key} (it has {', '.join(sorted(keys)) or 'none'}); save images as {key}")
    return zipfile.ZipFile(path).open(f"{key}.npy")


def _read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


class DatasetImages(ImageSource):
    """A dataset of `repagen.data`: its central or resized crops, rounded to uint8."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, indices: Sequence[int]) -> list[torch.Tensor | Unreadable]:
        """Decode and crop images."""
        return [self._load(index) for index in indices]

    def _load(self, index: int) -> torch.Tensor | Unreadable:
        try:
            return to_uint8(self.dataset.read(index))
        except BadImageError as error:
            return Unreadable(self.describe(index), str(error))

    def describe(self, index: int) -> str:
        """The dataset's own name for an image."""
        return printable(self.dataset.describe(index))

    @property
    def protocol(self) -> dict[str, Any]:
        """Kind, where the images are, and how they are cropped."""
        config = self.dataset.config
        source = {"path": config.path}
        if config.kind in ("digits", "shapes"):
            source = {"subset": config.subset}
        elif config.kind == "datasets":
            source |= {"split": config.split, "revision": config.revision}
        return {"kind": config.kind, **source, "image_size": config.image_size, "crop": config.crop}

    def origin(self) -> str:
        """The dataset's state: an image that was changed since is another one."""
        return self.dataset.state()


def dataset_images(config: DataConfig) -> DatasetImages:
    """Open a dataset whose bad images are counted by `extract` alone.

    Raises:
        UserError: when there is nothing there.
    """
    return DatasetImages(open_image_dataset(replace(config, max_bad_images=_ANY_NUMBER)))


def captions_of(dataset: SampleDataset, count: int, seed: int) -> list[str]:
    """Return prompts for `count` images: captions of samples that are drawn, none twice before all have come.

    Args:
        dataset: with captions.
        count: of the images; where the dataset is smaller its captions are to take turns.
        seed: of the draw.
    """
    indices = sample_indices(0, min(count, len(dataset)), len(dataset), seed)
    return [dataset.captions(index).draw() for index in indices]


def to_uint8(images: torch.Tensor, rounding: Rounding = "round") -> torch.Tensor:
    """Bring images in [0, 1] to uint8; values outside are clamped.

    Args:
        images: of any shape.
        rounding: to the nearest value, or down (`truncate`, as RAE's and REPA's samplers do it).
    """
    scaled = images.float().clamp(0, 1).mul(255)
    return (scaled.round() if rounding == "round" else scaled).to(torch.uint8)


def open_images(words: Sequence[str]) -> FolderImages | NpzImages | DatasetImages:
    """Open images named on a command line.

    Args:
        words: one path of a folder or an npz; or the settings of a dataset, `data.kind=digits data.subset=train`.
            How many images may be bad is for `extract` to decide.

    Raises:
        UserError: when there is nothing there, or a setting is unknown.
    """
    if all(word.startswith("data.") and "=" in word for word in words):
        for word in words:
            if word.startswith("data.max_bad_images="):
                raise UserError(f"{word}: is for training; say here --max-bad {word.partition('=')[2]}")
        return dataset_images(data_config_from_words(words))
    if len(words) > 1:
        raise UserError(f"give one path, or settings of a dataset (data.KEY=VALUE ...), got {' '.join(words)}")
    path = Path(words[0])
    return NpzImages(path) if path.suffix == ".npz" else FolderImages(path)
