"""Images in a plain folder: class folders, or a flat folder without classes."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image

from repagen.data.buckets import Size
from repagen.data.captions import NO_CAPTION, CaptionFiles, Captions, captioned_samples
from repagen.data.config import DataConfig
from repagen.data.dataset import ImageDataset
from repagen.data.images import EXTENSIONS, UNREAD_EXTENSIONS, decode_image, read_size
from repagen.errors import UserError
from repagen.files import printable, state_of_files

logger = logging.getLogger(__name__)

_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})


def _raise(error: UserError) -> NoReturn:
    raise error


class FolderDataset(ImageDataset):
    """The images below a folder.

    Folders in it are classes, named by the folder and numbered in sorted order; a class may hold further folders. A
    folder with images and no folders in it has no classes. Hidden files and files of other kinds are passed over;
    image files of a format that is not read count as bad images. Captions, where asked for, stand in files beside the
    images (`CaptionFiles`).

    Args:
        config: names the folder.
        refuse: takes a defect of its layout: raises it by default; where it returns, the rest of the folder is opened.

    Raises:
        UserError: the folder is missing, holds no images, mixes images and folders, or holds splits instead of
            classes; a class folder is without images; more image files are of unread formats than
            `max_bad_images` allows; captions are missing or cannot be read.
    """

    def __init__(self, config: DataConfig, refuse: Callable[[UserError], object] = _raise) -> None:
        root = Path(config.path or "").expanduser()
        if not root.is_dir():
            what = "is a file" if root.is_file() else "does not exist"
            raise UserError(f"data.path: {root} {what}; allowed: a folder of class folders, or of images")
        class_names = _find_classes(root, refuse)
        folders = [root / name for name in class_names] or [root]
        files, unread, labels = [], [], []
        for label, folder in enumerate(folders):
            readable, others = list_images(folder)
            files += readable
            unread += others
            labels += [label] * len(readable)
        _report_empty(root, class_names, labels, refuse)
        _report_unread(unread, config.max_bad_images)
        names = [os.path.relpath(file, root) for file in files]
        if config.captions is not None:
            self.has_captions = True
            self._captions = CaptionFiles(root, names, config.captions.columns)
            has = (self._captions.read(name) is not None for name in names)
            rule, columns = config.captions.missing, config.captions.columns
            kept = captioned_samples(has, rule, lambda index: printable(files[index]), columns)
            names, labels = [names[index] for index in kept], [labels[index] for index in kept]
        super().__init__(config, torch.tensor(labels, dtype=torch.int64), class_names, excluded=len(unread))
        self._root = root
        self._files = names

    def describe(self, index: int) -> str:
        """Return the path of image `index`."""
        return str(self._root / self._files[index])

    def captions(self, index: int) -> Captions:
        """Return the captions of image `index`."""
        return self._captions.read(self._files[index]) or NO_CAPTION

    def _decode(self, index: int) -> Image.Image:
        return decode_image(self._root / self._files[index])

    def _original_size(self, index: int) -> Size:
        return read_size(self._root / self._files[index])

    def _hash_sources(self, digest: hashlib._Hash) -> None:
        for name in self._files:
            path = self._root / name
            size = path.stat().st_size if path.exists() else -1
            digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))

    def state(self) -> str:
        """See `ImageDataset.state`: the fingerprint, and where the files are and when each was changed."""
        root = self._root.resolve()
        files = state_of_files(root / name for name in self._files)
        return hashlib.sha256(f"{self.fingerprint()}/{files}".encode()).hexdigest()


def _find_classes(root: Path, refuse: Callable[[UserError], object]) -> list[str]:
    """Return the sorted class folders of a folder, none when it is flat."""
    entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    images = sorted(entry.name for entry in entries if not entry.is_dir() and _suffix(entry.name) in EXTENSIONS)
    if folders and images:
        beside = f"holds images ({images[0]} ...) beside folders ({folders[0]} ...)"
        refuse(UserError(f"data.path: {root} {beside}; allowed: class folders only, or images only"))
    if folders and all(name.lower() in _SPLIT_NAMES for name in folders):
        splits = f"holds the splits {', '.join(folders)}, not classes"
        refuse(UserError(f"data.path: {root} {splits}; try data.path={root / folders[0]}"))
    return folders


def list_images(folder: Path) -> tuple[list[str], list[str]]:
    """List the images below a folder, in sorted order: those that can be read, and those of unread formats.

    Links to folders are followed, each folder is listed once; what is hidden is passed over.
    """
    readable: list[str] = []
    unread: list[str] = []
    visited: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:  # a link back to a folder that was listed already
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [os.path.join(parent, name) for name in sorted(names) if not name.startswith(".")]
        readable += [path for path in paths if _suffix(path) in EXTENSIONS]
        unread += [path for path in paths if _suffix(path) in UNREAD_EXTENSIONS]
    return readable, unread


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _report_empty(
    root: Path, class_names: list[str], labels: list[int], refuse: Callable[[UserError], object]
) -> None:
    allowed = ", ".join(sorted(EXTENSIONS))
    if not labels:
        raise UserError(f"data.path: {root} holds no images; allowed: {allowed} files, or folders of them")
    empty = [name for label, name in enumerate(class_names) if label not in set(labels)]
    if empty:
        without = f"has class folders without images: {', '.join(empty[:10])}"
        refuse(UserError(f"data.path: {root} {without}; allowed: {allowed} files in each; fill or remove them"))


def _report_unread(unread: list[str], allowed: int) -> None:
    if len(unread) > allowed:
        raise UserError(
            f"data.path: {len(unread)} image files are of formats that are not read, first {unread[0]}; allowed: "
            f"{', '.join(sorted(EXTENSIONS))}; convert or remove them, or raise data.max_bad_images ({allowed})"
        )
    for path in unread:
        logger.warning("left out, format not read: %s", path)
