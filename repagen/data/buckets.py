"""Aspect buckets: sizes of about equal area, and which of them an image goes to."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm

from repagen.data.images import BadImageError
from repagen.errors import UserError
from repagen.files import put_file

logger = logging.getLogger(__name__)

Size = tuple[int, int]
"""Height and width in pixels."""

_THREADS = 8
_FORMS = "a ratio in quotes as '3:2' (width : height), or [height, width]"


def bucket_sizes(entries: Sequence[Any], image_size: int, step: int) -> list[Size]:
    """Return the sizes that `data.buckets` names.

    A ratio w:h becomes the size of about image_size^2 pixels, both sides rounded to multiples of `step`.

    Args:
        entries: ratios such as "3:2", or [height, width].
        image_size: side of the square of the wanted area, in pixels.
        step: what every side is a multiple of, in pixels.

    Raises:
        UserError: an entry is neither, a side is no multiple of `step`, or two entries have the same proportions.
    """
    sizes: list[Size] = []
    for number, entry in enumerate(entries):
        size = _size(entry, f"data.buckets.{number}", image_size, step)
        twin = next((other for other in sizes if other[0] * size[1] == other[1] * size[0]), None)
        if twin:
            raise UserError(
                f"data.buckets.{number}: {entry} becomes {size[0]}x{size[1]}, of the same proportions as {twin[0]}x"
                f"{twin[1]}; drop one of them, or set a smaller data.bucket_step than {step}"
            )
        sizes.append(size)
    return sizes


def _size(entry: Any, key: str, image_size: int, step: int) -> Size:
    ratio = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", entry) if isinstance(entry, str) else None
    if ratio:
        side = math.sqrt(int(ratio[1]) / int(ratio[2]))  # wide by tall
        height, width = (max(1, round(extent / step)) * step for extent in (image_size / side, image_size * side))
        return height, width
    if isinstance(entry, list | tuple) and len(entry) == 2 and all(type(side) is int and side > 0 for side in entry):
        if any(side % step for side in entry):
            raise UserError(f"{key}: {list(entry)} given; allowed: multiples of data.bucket_step={step} pixels")
        return entry[0], entry[1]
    hint = ""
    if isinstance(entry, int) and entry >= 60:  # YAML's numbers to the base of 60
        hint = f" (YAML reads {entry // 60}:{entry % 60} without quotes as that number)"
    raise UserError(f"{key}: {entry!r} given{hint}; allowed: {_FORMS}")


def nearest_buckets(image_sizes: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
    """Return the bucket of each image (N,) int64: of the nearest proportions, in the logarithm of width/height.

    Args:
        image_sizes: height and width of each image (N, 2); an unreadable one has zeros, and counts as a square.
        sizes: of the buckets; of equally near ones the first.
    """
    height, width = image_sizes.double().clamp(min=1).numpy().T
    own = np.array([math.log(width / height) for height, width in sizes])
    return torch.from_numpy(np.abs(np.log(width / height)[:, None] - own).argmin(1)).long()


def describe_buckets(buckets: torch.Tensor, sizes: Sequence[Size]) -> str:
    """Return how many images each bucket holds, as in `256x256: 310, 192x320: 27`; height by width."""
    counts = torch.bincount(buckets, minlength=len(sizes)).tolist()
    return ", ".join(f"{height}x{width}: {count}" for (height, width), count in zip(sizes, counts, strict=True))


def index_file(folder: str | None, name: str, *identity: object) -> Path:
    """Return where what was found out about a data set is kept: a file whose name changes with the identity.

    Args:
        folder: `data.index_folder`.
        name: begins the file's name.
        identity: everything that the content depends on.

    Raises:
        UserError: the folder cannot be made.
    """
    path = Path(folder or "~/.cache/repagen/data").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.index_folder: {path} cannot be made ({error.strerror}); name a folder to write to"
        ) from None
    digest = hashlib.sha256(repr(identity).encode("utf-8", "backslashreplace")).hexdigest()
    return path / f"{name}-{digest[:32]}.safetensors"


def kept(path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the tensors of an index file, made and written where it is not there or damaged.

    They lie in the file: memory is taken for what is read of them, once for all processes.
    """
    if path.exists():
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s); it is written again", path, error)
    content = save(make())
    try:
        put_file(path, content)
    except OSError as error:
        raise UserError(
            f"data.index_folder: {path} cannot be written ({error.strerror}); name another folder"
        ) from None
    return load_file(path)


def read_sizes(read: Callable[[int], Size], indices: Iterable[int], count: int) -> torch.Tensor:
    """Return height and width of images (count, 2) int32, zeros for those that cannot be read.

    Args:
        read: gives the size of an image, or raises `BadImageError`.
        indices: of the images.
        count: how many these are.
    """

    def one(index: int) -> Size:
        try:
            return read(index)
        except BadImageError:
            return 0, 0

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(tqdm(pool.map(one, indices), total=count, desc="sizes", unit="image", delay=2))
    return torch.tensor(found, dtype=torch.int32).reshape(count, 2)
