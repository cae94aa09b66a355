"""Where an encoder's files come from: a local folder or the Hub, each failure one line naming its cause."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repagen.encoders.backbones import FROZEN_VARIANT
from repagen.encoders.families import (
    FAMILIES,
    UNCHANGED_MEAN,
    UNCHANGED_STD,
    EncoderFamily,
    TransformersFamily,
    family_of,
)
from repagen.errors import UserError
from repagen.hub.fetching import fetch_snapshot
from repagen.hub.inspection import inspect_encoder_folder
from repagen.hub.places import repository_command

logger = logging.getLogger(__name__)

CONFIG_FILES = ["config.json", "preprocessor_config.json"]
TEXT_FILES = [
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "spiece.model", "tokenizer.model"),
]
# Safetensors first; a repository that has none is fetched once more for the older format.
WEIGHT_FILES = (["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"], ["pytorch_model.bin"])
_WEIGHT_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    f"model.{FROZEN_VARIANT}.safetensors",
    "pytorch_model.bin",
)
_noted: set[str] = set()


@dataclass(frozen=True)
class FoundFiles:
    """An encoder's files on this machine, config read, weights not yet.

    Attributes:
        name: what the user asked for.
        folder: the local folder, or the snapshot of the Hub repository at `revision`.
        repo_id: the Hub repository; None for a local folder.
        revision: the commit of that repository.
        config: the content of its `config.json`.
        local_files_only: never touch the network.
    """

    name: str
    folder: Path
    repo_id: str | None
    revision: str | None
    config: dict[str, Any]
    local_files_only: bool

    def weights(self, family: TransformersFamily) -> Path:
        """Return the file with the weights (or its index), downloading it now if it is not here.

        Args:
            family: its row of a table, whose licence is told before.

        Raises:
            UserError: where there is none, naming the folder.
        """
        if self.repo_id is None:
            return weights_file(self.folder, self.name)
        note_licence(family, self.repo_id)
        for patterns in WEIGHT_FILES:
            _fetch(self.repo_id, self.revision, patterns, self.local_files_only)
            if any((self.folder / name).is_file() for name in _WEIGHT_NAMES):
                break
        from huggingface_hub import is_offline_mode

        for_the_user = self.local_files_only or is_offline_mode()
        return weights_file(self.folder, self.name, self.repo_id if for_the_user else None)


def vision_family(files: FoundFiles) -> EncoderFamily:
    """Return the family of a vision encoder.

    Raises:
        UserError: for an unsupported model type.
    """
    timm_layout = "architecture" in files.config and "model_type" not in files.config
    return FAMILIES["timm"] if timm_layout else family_of(files.config.get("model_type"), files.name)


def pixel_statistics(files: FoundFiles, family: EncoderFamily) -> tuple[list[float], list[float]]:
    """Return mean and std of the pixels in [0, 1], from a vision encoder's own image processor."""
    if family.name == "timm":
        described = files.config.get("pretrained_cfg", {})
        mean, std = described.get("mean"), described.get("std")
    else:
        path = files.folder / "preprocessor_config.json"
        described = read_json(path) if path.is_file() else {}
        if described.get("do_normalize") is False:
            return list(UNCHANGED_MEAN), list(UNCHANGED_STD)
        mean, std = described.get("image_mean"), described.get("image_std")
    return list(mean or family.image_mean), list(std or family.image_std)


def weights_file(folder: Path, name: str, repo_id: str | None = None) -> Path:
    """Return the file in a folder that holds an encoder's weights, or their index.

    Args:
        folder: where to look.
        name: what the user asked for.
        repo_id: the Hub repository to fetch it from, where that is for the user to do.

    Raises:
        UserError: where there is none.
    """
    for candidate in _WEIGHT_NAMES:
        if (folder / candidate).is_file():
            return folder / candidate
    fetching = f"; fetch it with {repository_command(repo_id)}" if repo_id else ""
    raise UserError(f"{folder}: no model.safetensors (nor pytorch_model.bin) of encoder {name!r}{fetching}")


def local_folder(name: str) -> Path:
    """Return a folder by its path, or the snapshot of a Hub id or `timm:NAME` in the cache; no network is touched.

    Raises:
        UserError: where it is not here, naming the command that fetches it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    # No pattern: which files are needed is for the caller to say, and a snapshot of some files will do.
    return _fetch(hub_id(name), None, [], local_files_only=True)


def local_weights(name: str) -> Path:
    """Return the file with the weights, or their index, in `local_folder(name)`.

    Raises:
        UserError: where it is not here, naming the command that fetches it.
    """
    is_folder = Path(name).expanduser().is_dir()
    return weights_file(local_folder(name), name, None if is_folder else hub_id(name))


def require_pinned(name: str, revision: str | None, what: str) -> None:
    """Refuse an encoder that a saved model refers to by a branch: what is fetched for it must never change.

    Args:
        name: a folder or Hub id, as the model's config has it.
        revision: that of the config.
        what: it is, for messages.

    Raises:
        UserError: it is neither a folder on this machine nor named with a commit.
    """
    if not Path(name).expanduser().is_dir() and not re.fullmatch("[0-9a-f]{40}", str(revision)):
        raise UserError(
            f"{what} {name!r}: no such folder, and as a Hub id it needs a commit, 40 hex digits, as its revision in "
            f"config.json, got {revision!r}; load the encoder by itself and save this model again"
        )


def find_encoder(
    source: str | os.PathLike[str],
    revision: str | None,
    local_files_only: bool,
    patterns: Sequence[str] = CONFIG_FILES,
) -> FoundFiles:
    """Find an encoder and read its config; no weights are downloaded yet.

    Args:
        source: a local folder, a Hub id, or `timm:NAME` for a timm model on the Hub.
        revision: branch, tag or commit of the Hub repository.
        local_files_only: use the local cache only.
        patterns: of the files beside the weights.

    Raises:
        UserError: for a folder that is not there, or a repository that is closed, unknown or out of reach.
    """
    name = os.fspath(source)
    folder = Path(name).expanduser()
    repo_id: str | None = None
    if folder.is_dir():
        revision = None
    else:
        repo_id = hub_id(name)
        folder = _fetch(repo_id, revision, patterns, local_files_only)
        revision = folder.name
    inspect_encoder_folder(folder, f"encoder {name!r}")
    return FoundFiles(name, folder, repo_id, revision, read_json(folder / "config.json"), local_files_only)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or broken file is a `UserError` naming it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; an encoder folder holds config.json and model.safetensors") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def note_licence(family: TransformersFamily, repo_id: str) -> None:
    """Log an encoder's licence once per process, before its weights are used or downloaded."""
    if repo_id in _noted:
        return
    _noted.add(repo_id)
    gate = f"; access is gated, ask at https://huggingface.co/{repo_id}" if family.gated else ""
    logger.warning("encoder %s: licence %s%s", repo_id, family.licence, gate)


def hub_id(name: str) -> str:
    """Return the Hub id that a name means: itself, or that of `timm:NAME`.

    Raises:
        UserError: where the name looks like a path, or is no timm model with weights on the Hub.
    """
    if name.startswith("timm:"):
        import timm

        model = name.removeprefix("timm:")
        described = timm.models.get_pretrained_cfg(model, allow_unregistered=False) if timm.is_model(model) else None
        if described is None or not described.hf_hub_id:
            raise UserError(f"encoder {name!r}: timm {timm.__version__} has no such model with weights on the Hub")
        found = described.hf_hub_id
        return f"{found}{described.architecture}.{described.tag}" if found.endswith("/") else found
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise UserError(
            f"encoder {name!r}: no such folder (a Hub id has the form 'org/name', a timm model 'timm:NAME')"
        )
    return name


def _fetch(repo_id: str, revision: str | None, patterns: Sequence[str], local_files_only: bool) -> Path:
    return fetch_snapshot(
        repo_id, revision=revision, patterns=patterns, what="encoder", local_files_only=local_files_only
    )
