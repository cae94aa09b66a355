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

FORMAT = 2
MANIFEST_NAME = "manifest.json"


class FeatureCache:
    """Features of one source on one set of images, below a folder that many may share.

    The rule: everything that decides the features (weights, state of the dataset, seed, dtypes ...) is hashed to the
    name of a subfolder, so that features of something else stay beside these and are not taken. A subfolder whose
    manifest names something else than its hash says is refused, and so are slices of other pixels than those that are
    there. A slice whose bytes are not those that the manifest knows, or a manifest that cannot be read, is computed
    again. Files appear whole or not at all.

    Attributes:
        pixels_sha256: hash of the images whose features are there; None where none are.

    Args:
        root: the folder; created when something is saved.
        made_by: all that decides the features, JSON-able.

    Raises:
        UserError: `root` is no folder, or the subfolder holds features of something else.
    """

    def __init__(self, root: str | Path, made_by: dict[str, Any]) -> None:
        if Path(root).exists() and not Path(root).is_dir():
            raise UserError(f"cache: {root} is no folder; name a folder, or one to be made")
        self.made_by = json.loads(json.dumps({"format": FORMAT, **made_by}))
        content = json.dumps(self.made_by, sort_keys=True).encode()
        self.folder = Path(root) / hashlib.sha256(content).hexdigest()[:16]
        self._entries, self.pixels_sha256 = self._read_manifest()

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

    def save(self, place: FeatureSlice, tensors: dict[str, torch.Tensor], pixels_sha256: str) -> None:
        """Keep the tensors of a slice, and the hash of the images they are of.

        Raises:
            UserError: slices of other images are there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        name = _file_name(place)
        replace_file(self.folder / name, lambda file: save_file(tensors, file))
        facts = {"block": place.block, "timestep": place.timestep, **file_digest(self.folder / name)}
        # Another process may have added slices meanwhile.
        entries, known = self._read_manifest()
        if known not in (None, pixels_sha256):
            raise UserError(
                f"{self.folder}: its features are of other pixels than the images have now; remove it, or name "
                "another cache"
            )
        self._entries, self.pixels_sha256 = {**entries, name: facts}, pixels_sha256
        content = {"made_by": self.made_by, "pixels_sha256": pixels_sha256, "slices": self._entries}
        manifest = json.dumps(content, indent=2) + "\n"
        replace_file(self.folder / MANIFEST_NAME, lambda file: file.write_text(manifest, encoding="utf-8"))

    def _read_manifest(self) -> tuple[dict[str, dict[str, Any]], str | None]:
        """What is known of each slice, and the hash of the pixels; nothing where the file is missing or damaged."""
        path = self.folder / MANIFEST_NAME
        if not path.is_file():
            return {}, None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            made_by, pixels_sha256 = manifest["made_by"], str(manifest["pixels_sha256"])
            entries = {name: dict(entry) for name, entry in manifest["slices"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read (%s); all its features are computed again", path, type(error).__name__)
            return {}, None
        if made_by != self.made_by:
            raise UserError(f"{self.folder}: holds features of something else; remove it, or name another cache")
        return entries, pixels_sha256


def _file_name(place: FeatureSlice) -> str:
    if place.timestep is None:
        return f"layer-{place.block:03d}.safetensors"
    return f"block-{place.block:03d}-t-{place.timestep!r}.safetensors"
