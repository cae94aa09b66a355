"""Images in WebDataset shards: tar files that are read where they lie, at any sample."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from repagen.data.captions import (
    NO_CAPTION,
    Captions,
    captioned_samples,
    decode_text,
    read_caption_text,
    read_captions,
    read_json,
)
from repagen.data.config import DataConfig
from repagen.data.dataset import ImageDataset
from repagen.data.images import BadImageError, decode_image
from repagen.data.labels import labels_of_names, labels_of_numbers
from repagen.data.shards import MAX_OPEN_SHARDS
from repagen.data.tar_index import ShardIndex, shard_paths
from repagen.errors import UserError
from repagen.files import state_of_files


class WebDataset(ImageDataset):
    """The images of tar shards, with labels from `.cls` and captions from `.json` or `.txt` members.

    Shards are neither unpacked nor loaded: an index of each, made once, says where the images lie. Samples are thus
    numbered as those of any dataset, and the order, its division over processes and workers and its continuation are
    the same as for all of them.

    Raises:
        UserError: shards are missing or damaged, more samples than `max_bad_images` have no image that can be read,
            only some have a label, or captions are missing.
    """

    def __init__(self, config: DataConfig) -> None:
        paths = shard_paths(config.path or "")
        progress = tqdm(paths, desc="shards", unit="shard", delay=2)
        self._shards = [ShardIndex(path, config.index_folder) for path in progress]
        counts = torch.tensor([len(shard) for shard in self._shards])
        shard_of = torch.arange(len(counts)).repeat_interleave(counts)
        rows = torch.cat([torch.arange(len(shard)) for shard in self._shards])
        has_image = torch.cat([shard.places[:, 1] for shard in self._shards]) > 0
        self._samples = torch.stack([shard_of, rows], dim=1)[has_image]  # (N, 2): shard, row of its index
        excluded = self._report_without_image(torch.stack([shard_of, rows], dim=1)[~has_image], config.max_bad_images)
        if config.captions is not None:
            self.has_captions = True
            self._columns = dict(config.captions.columns)
            has = (self._find_captions(index) is not None for index in range(len(self._samples)))
            kept = captioned_samples(has, config.captions.missing, self.describe, self._columns)
            self._samples = self._samples[kept]
        labels, class_names = self._read_labels()
        super().__init__(config, labels, class_names, excluded=excluded)
        self._files = _OpenFiles()

    def describe(self, index: int) -> str:
        """Return the image's name and the shard it is in."""
        return self._name(*self._samples[index].tolist())

    def captions(self, index: int) -> Captions:
        """Return the captions of image `index`."""
        return self._find_captions(index) or NO_CAPTION

    def original_sizes(self) -> torch.Tensor:
        """Return height and width of every image before cropping (N, 2) int32, zeros for unreadable ones."""
        starts = torch.tensor([0, *accumulate(len(shard) for shard in self._shards)])
        numbers, rows = self._samples.unbind(1)
        return torch.cat([shard.sizes for shard in self._shards])[starts[numbers] + rows]

    def state(self) -> str:
        """See `ImageDataset.state`: the fingerprint, and where the shards are and when each was changed."""
        shards = state_of_files(shard.path.resolve() for shard in self._shards)
        return hashlib.sha256(f"{self.fingerprint()}/{shards}".encode()).hexdigest()

    def _decode(self, index: int) -> Image.Image:
        number, row = self._samples[index].tolist()
        shard = self._shards[number]
        return decode_image(self._files.read(shard.path, *shard.places[row].tolist()))

    def _find_captions(self, index: int) -> Captions | None:
        number, row = self._samples[index].tolist()
        shard, where = self._shards[number], self._name(number, row)
        content = shard.text("json", row)
        captions = read_captions(read_json(content, f"{where}, its .json"), self._columns, where) if content else None
        return captions or read_caption_text(decode_text(shard.text("txt", row), f"{where}, its .txt"), self._columns)

    def _read_labels(self) -> tuple[torch.Tensor, list[str]]:
        places = self._samples.tolist()
        if not any(shard.has("cls") for shard in self._shards):
            return torch.zeros(len(places), dtype=torch.int64), []
        texts = [decode_text(self._shards[number].text("cls", row), self._name(number, row)) for number, row in places]
        values = [text.strip() for text in texts]
        if not all(values):
            without = self.describe(values.index(""))
            raise UserError(f"data.path: {without} has no .cls, others have; allowed: all or none; add or drop them")
        if all(value.isascii() and value.isdigit() for value in values):
            return labels_of_numbers([int(value) for value in values])
        return labels_of_names(values)

    def _report_without_image(self, places: torch.Tensor, allowed: int) -> int:
        """=> how many samples have no image that can be read."""
        names = [self._name(number, row) for number, row in places[:3].tolist()]
        if len(places) > allowed:
            raise UserError(
                f"data.path: {len(places)} samples have no image that can be read, first {', '.join(names)}; add or "
                f"drop them, or raise data.max_bad_images ({allowed})"
            )
        if not len(self._samples):
            raise UserError(f"data.path: {self._shards[0].path} and the shards after it hold no images")
        return len(places)

    def _name(self, number: int, row: int) -> str:
        shard = self._shards[number]
        return f"{shard.text('name', row).decode('utf-8', 'backslashreplace')} of {shard.path}"

    def _hash_sources(self, digest: hashlib._Hash) -> None:
        for shard in self._shards:
            shard.hash_into(digest)
        digest.update(self._samples.numpy().tobytes())


class _OpenFiles:
    """The files that were read from last, kept open; for threads too, and every process has its own."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Return bytes of a file.

        Raises:
            BadImageError: the file cannot be read, or ends before.
        """
        try:
            with self._lock:
                content = os.pread(self._descriptor(path), length, offset)
        except OSError as error:
            raise BadImageError(f"the shard cannot be read ({error.strerror})") from None
        if len(content) < length:
            raise BadImageError("the shard ends within it")
        return content

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            if len(self._descriptors) >= MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        self._descriptors.move_to_end(path)
        return self._descriptors[path]

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return _OpenFiles, ()
