"""Features on disk, block by block: memory does not grow with the number of images, no work is done twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from repagen.errors import UserError
from repagen.evaluation.samples import Unreadable
from repagen.files import file_digest, put_file

_KEY_FILE = "key.json"


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


class FeatureStore:
    """A folder with one file of features and one of facts per block; several processes may write different blocks.

    A block counts once its facts are there, which are written last and hold the hash of its features. Anything torn,
    altered or half written is not there, and is made again.

    Args:
        folder: created if needed.
        key: what the features are a function of; another key is another store.

    Raises:
        UserError: when the folder holds features of another key.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(key, sort_keys=True, default=str)
        path = folder / _KEY_FILE
        if not path.exists():
            put_file(path, text.encode())
        elif path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{folder}: holds features of an evaluation that was interrupted and had other images, extractors or "
                f"settings{_first_difference(path, key)}; finish that one, remove the folder, or choose another place"
            )

    def _paths(self, block: int) -> tuple[Path, Path]:
        return self.folder / f"{block:08d}.safetensors", self.folder / f"{block:08d}.json"

    def write(self, block: int, content: FeatureBlock) -> None:
        """Keep a block; it survives the death of the process."""
        features_path, facts_path = self._paths(block)
        features = save({name: rows.contiguous() for name, rows in content.features.items()})
        facts = {
            "sha256": hashlib.sha256(features).hexdigest(),
            "indices": content.indices,
            "digests": content.digests,
            "image_size": content.image_size,
            "unreadable": {index: [image.name, image.reason] for index, image in content.unreadable.items()},
        }
        put_file(features_path, features)
        put_file(facts_path, json.dumps(facts).encode())

    def read(self, block: int) -> FeatureBlock | None:
        """Return a block as it was written, or None where it is missing or damaged."""
        features_path, facts_path = self._paths(block)
        try:
            facts = json.loads(facts_path.read_text(encoding="utf-8"))
            if file_digest(features_path)["sha256"] != facts["sha256"]:
                return None
            return FeatureBlock(
                indices=facts["indices"],
                features=load(features_path.read_bytes()),
                digests=facts["digests"],
                image_size=tuple(facts["image_size"]) if facts["image_size"] else None,
                unreadable={int(index): Unreadable(*image) for index, image in facts["unreadable"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None


def _first_difference(path: Path, key: Mapping[str, Any]) -> str:
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return ""
    new = json.loads(json.dumps(key, sort_keys=True, default=str))
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return f" ({', '.join(changed)})" if changed else ""
