"""Where downloaded things lie, and the command that gets one that is missing there."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUNDLE_FILE = "bundle.json"
"""Lies in a folder that `repagen download` filled: what is in it, with hashes."""


def torch_checkpoint(file: str) -> Path:
    """Return where torch keeps a published file: TORCH_HOME, else XDG_CACHE_HOME/torch, else ~/.cache/torch."""
    return _torch_home() / "hub" / "checkpoints" / file


def repository_command(repo_id: str, revision: str | None = None, *, dataset: bool = False) -> str:
    """Return the command that gets a Hub repository to where it is looked for.

    That is `repagen download` where the cache in use is part of a bundle, so that the bundle stays complete; else
    `hf download`, into the cache itself.
    """
    from huggingface_hub import constants

    at = f" --revision {revision}" if revision else ""
    bundle = _bundle_around(Path(constants.HF_HUB_CACHE))
    if bundle is None:
        return f"`hf download {repo_id}{' --repo-type dataset' if dataset else ''}{at}`"
    return f"`repagen download {repo_id}{at}{' --with-data' if dataset else ''} --to {shlex.quote(str(bundle))}`"


def fetch_once(repo_id: str, revision: str | None = None) -> str:
    """Say how to get a model that is not here while the Hub cannot be asked."""
    command = repository_command(repo_id, revision)
    return f"fetch it once with {command} on a machine that is online, or pass a local folder"


def published_file_command(name: str) -> str:
    """Return the command that gets a file that is no Hub repository: `inception`, `lpips-vgg` or `lpips-alex`."""
    bundle = _bundle_around(_torch_home())
    if bundle is not None:
        return f"`repagen download {name} --to {shlex.quote(str(bundle))}`"
    return f"`repagen download {name} --to DIR` and set TORCH_HOME=DIR/torch"


def _torch_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_HOME") or f"{cache}/torch").expanduser()


def _bundle_around(folder: Path) -> Path | None:
    return folder.parent if (folder.parent / BUNDLE_FILE).is_file() else None


def without_names(value: Any) -> Any:
    """Return a description without the names in it: a folder may lie elsewhere on another machine."""
    if isinstance(value, Mapping):
        return {key: without_names(item) for key, item in value.items() if key != "name"}
    return [without_names(item) for item in value] if isinstance(value, list) else value
