"""A folder of harvested features: one safetensors a slice, and a manifest that says what made them."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from repagen.errors import UserError
from repagen.evaluation.representation.sources import FeatureSlice
from repagen.files import file_digest, replace_file

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST_NAME = "manifest.json"


class FeatureCache:
    """Features of one source on one set of images, below a folder that many may share.

    The rule: everything that decides the features (weights, dataset, seed, dtypes ...) is hashed to the name of a
    subfolder, so features of something else are never taken, and stay beside these. A subfolder whose manifest names
    something else than its hash says is refused. A slice whose bytes are not those that the manifest knows, or a
    manifest that cannot be read, is computed again. Files appear whole or not at all.

    Args:
        root: the folder; created when something is saved.
        made_by: all that decides the features, JSON-able.

    Raises:
        UserError: `root` is no folder, or the subfolder holds features of something else.
    """

    def __init__(self, root: str | Path, made_by: dict[str, Any]) -> None:
        if Path(root).exists() and not Path(root).is_dir():
            raise UserError(f"--cache {root}: is no folder; name a folder, or one to be made")
        self.made_by = json.loads(json.dumps({"format": FORMAT, **made_by}))
        content = json.dumps(self.made_by, sort_keys=True).encode()
        self.folder = Path(root) / hashlib.sha256(content).hexdigest()[:16]
        self._entries = self._read_manifest()

    def load(self, place: FeatureSlice) -> dict[str, torch.Tensor] | None:
        """The tensors saved of a slice; None where there are none, or damaged ones."""
        entry = self._entries.get(_file_name(place))
        path = self.folder / _file_name(place)
        if entry is None:
            return None
        if path.is_file() and file_digest(path) == {key: entry.get(key) for key in ("bytes", "sha256")}:
            try:
                return load_file(path)
            except SafetensorError:
                pass
        logger.warning("%s is missing or damaged; its features are computed again", path)
        return None

    def save(self, place: FeatureSlice, tensors: dict[str, torch.Tensor]) -> None:
        """Keep the tensors of a slice."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = _file_name(place)
        replace_file(self.folder / name, lambda file: save_file(tensors, file))
        facts = {"block": place.block, "timestep": place.timestep, **file_digest(self.folder / name)}
        # Another process may have added slices meanwhile.
        self._entries = {**self._read_manifest(), name: facts}
        manifest = json.dumps({"made_by": self.made_by, "slices": self._entries}, indent=2) + "\n"
        replace_file(self.folder / MANIFEST_NAME, lambda file: file.write_text(manifest, encoding="utf-8"))

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        path = self.folder / MANIFEST_NAME
        if not path.is_file():
            return {}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            made_by, entries = manifest["made_by"], dict(manifest["slices"])
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s); all its features are computed again", path, type(error).__name__)
            return {}
        if made_by != self.made_by:
            raise UserError(f"{self.folder}: holds features of something else; remove it, or name another --cache")
        return entries


def _file_name(place: FeatureSlice) -> str:
    if place.timestep is None:
        return f"layer-{place.block:03d}.safetensors"
    return f"block-{place.block:03d}-t-{place.timestep!r}.safetensors"
