"""A user's own image files, of any size, as squares that an autoencoder takes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repagen.data.folders import list_images
from repagen.data.images import EXTENSIONS, BadImageError, center_crop, decode_image
from repagen.errors import UserError
from repagen.evaluation.samples import ImageSource, Unreadable
from repagen.files import printable

_THREADS = 8


class CroppedFiles(ImageSource):
    """Image files, cropped to squares as training crops them: the short side resized, the middle kept.

    Args:
        words: files and folders; folders are searched with their subfolders.
        side: of the squares, in pixels.

    Attributes:
        sizes: number of an image => its own width and height, of those that were loaded.

    Raises:
        UserError: a path that is not there, or a folder without images.
    """

    def __init__(self, words: Sequence[str | Path], side: int) -> None:
        self.paths = [path for word in words for path in _image_files(Path(word).expanduser())]
        self.side = side
        self.sizes: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, indices: Sequence[int]) -> list[torch.Tensor | Unreadable]:
        """Decode and crop images."""
        with ThreadPoolExecutor(min(_THREADS, max(len(indices), 1))) as pool:
            return list(pool.map(self._load, indices))

    def _load(self, index: int) -> torch.Tensor | Unreadable:
        try:
            image = decode_image(self.paths[index])
            self.sizes[index] = image.size
            pixels = np.array(center_crop(image, self.side))
        except BadImageError as error:
            return Unreadable(self.describe(index), str(error))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def describe(self, index: int) -> str:
        """Path of the file."""
        return printable(self.paths[index])

    @property
    def protocol(self) -> dict[str, Any]:
        """Kind, and how images become squares."""
        return {"kind": "files", "image_size": self.side, "crop": "center"}


def _image_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--images {printable(path)}: no such file or folder")
    readable, unread = list_images(path)  # those of unread formats count as broken images
    if not readable and not unread:
        raise UserError(
            f"--images {printable(path)}: no images in that folder; looked for {', '.join(sorted(EXTENSIONS))}"
        )
    return sorted(map(Path, readable + unread))
