"""Checkpoints of a run: a folder per step, safetensors and JSON only, whole or not there at all.

    checkpoints/step-00001234/
        model.safetensors ...   one file per part of the training state
        state.json              step, structure of the parts, and what the program wants to remember
        manifest.json           size and sha256 of every other file; written last

A folder is written under a temporary name, flushed to disk, renamed, and read back; only then are older ones removed.
A damaged folder is named, skipped and never deleted. Nothing here is ever unpickled.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from repagen.config import require
from repagen.errors import UserError
from repagen.files import TEMPORARY_PREFIX, file_digest, sync_file, sync_folder

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})")
_MANIFEST = "manifest.json"
_STATE = "state.json"

State = Mapping[str, Any]


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay.

    Attributes:
        every_steps: a checkpoint after every so many optimiser steps, besides the one at the end.
        keep: newest checkpoints to keep; at least 2, since the newest may turn out damaged.
    """

    every_steps: int = 1000
    keep: int = 2

    def validate(self) -> None:
        """Check the ranges."""
        require(self.every_steps >= 1, "every_steps", self.every_steps, "at least 1")
        require(self.keep >= 2, "keep", self.keep, "at least 2 (the newest may be damaged)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file was verified against its manifest.

    Attributes:
        path: its folder.
        step: optimiser steps done when it was written.
        info: what the program stored beside the tensors (plain JSON values).
    """

    path: Path
    step: int
    info: dict[str, Any]
    _structures: dict[str, Any]

    def part(self, name: str) -> dict[str, Any]:
        """The state dict saved under `name`, tensors on the CPU."""
        if name not in self._structures:
            raise UserError(f"{self.path}: holds no {name!r}; it holds {', '.join(self._structures)}")
        return join_tensors(load_file(self.path / f"{name}.safetensors"), self._structures[name])


class CheckpointFolder:
    """The checkpoints of one run, under `folder`."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """Folders named like a checkpoint, newest first, verified or not."""
        if not self.folder.is_dir():
            return []
        return sorted(
            (path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), key=_step_of, reverse=True
        )

    def sweep(self) -> None:
        """Remove what killed saves left behind (temporary names only)."""
        if self.folder.is_dir():
            for path in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
                shutil.rmtree(path)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; damaged newer ones are reported and left alone.

        Raises:
            UserError: if there are checkpoints but none verifies.
        """
        damage = []
        for path in self.paths():
            try:
                return read_checkpoint(path)
            except UserError as error:
                damage.append(str(error))
                logger.warning("skipping a damaged checkpoint: %s", error)
        if damage:
            raise UserError(
                f"{self.folder}: every checkpoint is damaged ({'; '.join(damage)}); restore one from a copy, or move "
                "the folder away to start anew"
            )
        return None

    def save(self, step: int, parts: Mapping[str, State], info: Mapping[str, Any]) -> Path:
        """Write a checkpoint, verify it, and only then remove all but the newest `keep`.

        Args:
            step: optimiser steps done.
            parts: name => state dict: tensors and plain values in any nesting of dicts and lists.
            info: plain JSON values to remember.

        Raises:
            UserError: if a tensor is not finite, the disk is too full, or a write fails; older checkpoints are
                untouched.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f"{TEMPORARY_PREFIX}{final.name}-{os.getpid()}"
        split = {name: split_tensors(state) for name, state in parts.items()}
        _refuse_non_finite(step, {name: tensors for name, (tensors, _) in split.items()})
        try:
            temporary.mkdir(parents=True)
            self._require_space(sum(tensor.nbytes for tensors, _ in split.values() for tensor in tensors.values()))
            _write(temporary, step, split, info)
            if final.exists():  # only a damaged one: a run never saves a verified step twice
                final.rename(final.with_name(f"damaged-{final.name}-{os.getpid()}"))
            temporary.rename(final)
            sync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(
                f"cannot write the checkpoint {final}: {error}; older checkpoints are untouched, free or repair the "
                "disk and run the same command again"
            ) from None
        read_checkpoint(final)
        older = [path for path in self.paths() if _step_of(path) <= step]  # a damaged later one does not count as kept
        for path in older[self.keep :]:
            shutil.rmtree(path)
        return final

    def _require_space(self, tensor_bytes: int) -> None:
        needed_bytes = tensor_bytes + tensor_bytes // 20 + (1 << 20)
        free_bytes = shutil.disk_usage(self.folder).free
        if free_bytes < needed_bytes:
            raise OSError(errno.ENOSPC, f"needs {needed_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB are free")


def read_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Verify every file of a checkpoint folder against its manifest and open it.

    Args:
        path: a folder named like `step-00001234`.
        verify: False skips the digests of the files, for a folder that was verified a moment ago.

    Raises:
        UserError: naming the first file that is missing, extra, or not what was written.
    """
    manifest = _read_json(path / _MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or _STATE not in files:
        raise UserError(f"{path / _MANIFEST}: not a manifest")
    if manifest.get("step") != _step_of(path):
        raise UserError(f"{path / _MANIFEST}: belongs to step {manifest.get('step')}, not to this folder")
    present = {entry.name for entry in path.iterdir()} - {_MANIFEST}
    if present != set(files):
        raise UserError(f"{path}: missing or foreign files: {', '.join(sorted(present ^ set(files)))}")
    for name, digest in files.items() if verify else ():
        if file_digest(path / name) != digest:
            raise UserError(f"{path / name}: damaged, its content is not what was written")
    state = _read_json(path / _STATE)
    return Checkpoint(path, manifest["step"], state["info"], state["parts"])


def split_tensors(state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Take a nested state apart: => (flat dict of tensors by dotted path, the rest as JSON values).

    Dicts become lists of [key, value] pairs, since the keys of optimiser states are numbers.
    """
    tensors: dict[str, torch.Tensor] = {}
    addresses: set[int] = set()

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensor = value.detach().to("cpu").contiguous()
            # Optimisers of bitsandbytes share tables between parameters, which a file must not.
            tensors[path] = tensor.clone() if tensor.data_ptr() in addresses else tensor
            addresses.add(tensors[path].data_ptr())
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {
                "dict": [[key, walk(child, f"{path}.{key}" if path else str(key))] for key, child in value.items()]
            }
        if isinstance(value, (list, tuple)):
            return {"list": [walk(child, f"{path}.{index}") for index, child in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise TypeError(f"{path}: a {type(value).__name__} cannot be saved in a checkpoint")

    return tensors, walk(state, "")


def join_tensors(tensors: Mapping[str, torch.Tensor], structure: Any) -> Any:
    """Undo `split_tensors` (tuples come back as lists)."""
    ((kind, value),) = structure.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: join_tensors(tensors, child) for key, child in value}
    if kind == "list":
        return [join_tensors(tensors, child) for child in value]
    return value


# --- files ---------------------------------------------------------------------------------------------------------


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder, so that two runs cannot share it.

    The lock is the operating system's (a record lock on `run.lock`, honoured over NFS too): it ends with the process
    that holds it, however that dies, so a stale file never blocks. The file names the holder for the message.

    Raises:
        UserError: if another run holds it.
    """
    path = folder / "run.lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{path}: the file system cannot lock files ({error}); choose another folder"
                ) from None
            file.seek(0)
            raise UserError(
                f"{folder}: another run is using this folder ({file.read().strip() or 'unknown'}); wait for it, stop "
                "it, or choose another output_dir"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
        file.truncate(0)


def _write(folder: Path, step: int, split: Mapping[str, tuple[dict[str, torch.Tensor], Any]], info: State) -> None:
    for name, (tensors, _) in split.items():
        save_file(tensors, folder / f"{name}.safetensors")
    state = {"info": dict(info), "parts": {name: structure for name, (_, structure) in split.items()}}
    (folder / _STATE).write_text(json.dumps(state), encoding="utf-8")
    files = sorted(folder.iterdir())
    for path in files:
        sync_file(path)
    manifest = {"step": step, "files": {path.name: file_digest(path) for path in files}}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync_file(folder / _MANIFEST)
    sync_folder(folder)


def _refuse_non_finite(step: int, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise UserError(
                    f"step {step}: {part} holds a value that is not finite ({name}); no checkpoint was written and "
                    "the older ones are untouched; lower the learning rate or use precision=fp32, then run again"
                )


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path}: not a checkpoint folder (their names are step-00001234)")
    return int(match.group(1))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged, not JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged, not a JSON object")
    return content
