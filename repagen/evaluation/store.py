"""Features on disk, block by block: memory does not grow with the number of images, no work is done twice."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from repagen.errors import UserError, refusing
from repagen.evaluation.samples import Unreadable
from repagen.files import TEMPORARY_PREFIX, file_digest, put_file

_KEY_FILE = "key.json"
_OWN = re.compile(rf"({re.escape(TEMPORARY_PREFIX)}.*|key\.json|\d+\.(json|safetensors)|images\.npy)")


@dataclass(frozen=True)
class FeatureBlock:
    """What is kept of a block of images.

    Attributes:
        indices: numbers of the readable images, ascending.
        features: name => (len(indices), D) float32.
        digests: sha256 of each readable image's pixels, hex.
        image_size: (height, width) of the readable images; None where there are none.
        unreadable: number => the image that could not be read.
    """

    indices: list[int]
    features: dict[str, torch.Tensor]
    digests: list[str]
    image_size: tuple[int, int] | None
    unreadable: dict[int, Unreadable]

    def is_of(self, numbers: range) -> bool:
        """Whether these are the images with these numbers, no more and no fewer."""
        return sorted([*self.indices, *self.unreadable]) == list(numbers)


class FeatureStore:
    """A folder with one file of features and one of facts per block; several processes may write different blocks.

    A block counts once its facts are there, which are written last and hold the hash of its features. Anything torn,
    altered or half written is not there, and is made again; so is a block whose images changed meanwhile.

    Args:
        folder: created if needed.
        key: what all features are a function of; another key is another store.

    Raises:
        UserError: when the folder holds features of another key, or cannot be written to.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        text = json.dumps(key, sort_keys=True, default=str)
        path = folder / _KEY_FILE
        with refusing(f"{folder}: features cannot be written there; choose another place"):
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                put_file(path, text.encode())
        if path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{folder}: holds features of an interrupted evaluation of other images, extractors or settings"
                f"{_first_difference(path, key)}; finish that one, remove the folder, or choose another place"
            )

    def _paths(self, block: int) -> tuple[Path, Path]:
        return self.folder / f"{block:08d}.safetensors", self.folder / f"{block:08d}.json"

    def write(self, block: int, content: FeatureBlock, state: str) -> None:
        """Keep a block of images in a state (see `ImageSource.state`); it survives the death of the process."""
        features_path, facts_path = self._paths(block)
        features = save({name: rows.contiguous() for name, rows in content.features.items()})
        facts = {
            "sha256": hashlib.sha256(features).hexdigest(),
            "state": state,
            "indices": content.indices,
            "digests": content.digests,
            "image_size": content.image_size,
            "unreadable": {index: [image.name, image.reason] for index, image in content.unreadable.items()},
        }
        put_file(features_path, features)
        put_file(facts_path, json.dumps(facts).encode())

    def read(self, block: int, numbers: range, state: str) -> FeatureBlock | None:
        """Return a block as it was written, or None where it is missing, damaged, or of other images.

        Args:
            block: its number.
            numbers: of its images.
            state: of its images, see `ImageSource.state`.
        """
        features_path, facts_path = self._paths(block)
        try:
            facts = json.loads(facts_path.read_text(encoding="utf-8"))
            if facts["state"] != state or file_digest(features_path)["sha256"] != facts["sha256"]:
                return None
            content = FeatureBlock(
                indices=facts["indices"],
                features=load(features_path.read_bytes()),
                digests=facts["digests"],
                image_size=tuple(facts["image_size"]) if facts["image_size"] else None,
                unreadable={int(index): Unreadable(*image) for index, image in facts["unreadable"].items()},
            )
            return content if content.is_of(numbers) else None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None


def require_own_folder(folder: Path) -> None:
    """Refuse a folder that holds anything but stores: it is removed when its features are no longer needed.

    Raises:
        UserError: naming what is not ours.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file where a folder of features is to be; move it away")
    foreign = [path for path in folder.rglob("*") if path.is_file() and not _OWN.fullmatch(path.name)]
    if foreign:
        raise UserError(f"{folder}: is for features, and would be removed with {foreign[0].name} in it; move it away")


def _first_difference(path: Path, key: Mapping[str, Any]) -> str:
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return ""
    new = json.loads(json.dumps(key, sort_keys=True, default=str))
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return f" ({', '.join(changed)})" if changed else ""
