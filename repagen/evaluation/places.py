"""Where results go: looked at before anything is computed, so that no run fails at its end."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repagen.errors import UserError, refusing
from repagen.files import replace_file


def require_result_file(path: Path, option: str = "--output") -> None:
    """Refuse to write a result over anything but an earlier result, or where nothing can be written.

    Raises:
        UserError: naming the option and the path.
    """
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file")
    _require_writable(path.parent, f"{option} {path}")
    if not _is_free(path):
        raise UserError(f"{option} {path} exists and is no result of an evaluation; name another file")


def require_result_folder(path: Path, option: str = "--output", result: str | None = None) -> None:
    """Refuse a path that is no folder and cannot become one, or where nothing can be written.

    Args:
        path: of the folder.
        option: what the user gave it as.
        result: file in the folder that may be replaced only where it is an earlier result.

    Raises:
        UserError: naming the option and the path.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {path} is a file; name a folder, or one to be made")
    _require_writable(path, f"{option} {path}")
    if result and not _is_free(path / result):
        raise UserError(f"{option} {path}: its {result} is no result of an evaluation; name another folder")


def _is_free(path: Path) -> bool:
    """Whether nothing is there, or an earlier result."""
    try:
        return not path.exists() or "schema" in json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, OSError):
        return False


def _require_writable(folder: Path, what: str) -> None:
    """Refuse a folder that cannot be made or written; nothing is left of the trial."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise UserError(f"{what}: {existing} is a file, so that no folder can be made there; name another place")
    with refusing(f"{what}: nothing can be written in {existing}; name another place"):
        tempfile.TemporaryFile(dir=existing).close()


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result as JSON, in one rename; its folder is made if needed.

    Raises:
        UserError: for a number that is not finite, which JSON cannot hold.
    """
    with refusing(f"{path}: a figure of the result is not finite"):
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
