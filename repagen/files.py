"""Files and folders that are whole or not there at all: flushing, digests, and replacing a folder in one rename."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"
"""Begins the name of what is being written; a leftover of a killed process is removed by the next."""

_CHUNK_BYTES = 1 << 22


def printable(path: str | os.PathLike[str]) -> str:
    """Return a path as text that any file takes: bytes that are not UTF-8 become escapes such as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def state_of_files(paths: Iterable[Path]) -> str:
    """Return a hash of paths, sizes and times of change: that of files which nobody has written since."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = path.stat()
            facts = f"\0{status.st_size}\0{status.st_mtime_ns}\n"
        except OSError as error:  # a link to nothing, which counts as an unreadable image
            facts = f"\0{error.errno}\n"
        digest.update(os.fsencode(path) + facts.encode())
    return digest.hexdigest()


def file_digest(path: Path) -> dict[str, Any]:
    """=> {"bytes": size, "sha256": hex digest}."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def follow_umask(path: Path) -> None:
    """Give a file the mode that the umask asks for; safetensors writes 0600 whatever it is."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def sync_file(path: Path) -> None:
    """Give a file the mode that the umask asks for, and flush it to disk."""
    follow_umask(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, so that names and renames survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def put_file(final: Path, content: bytes) -> None:
    """Write a file in one rename, without flushing it to disk: whole or not there when the process dies."""
    temporary = final.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{final.name}")
    temporary.write_bytes(content)
    os.replace(temporary, final)


def replace_file(final: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write a file under a temporary name beside `final`, then put it in `final`'s place.

    Where this fails, `final` stays as it was and nothing else is left.
    """
    temporary = final.with_name(f"{TEMPORARY_PREFIX}{final.name}")
    try:
        write(temporary)
        sync_file(temporary)
        temporary.rename(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(final.parent)


def replace_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a folder under a temporary name beside `final`, then put it in `final`'s place.

    Where `fill` fails, `final` stays as it was and nothing else is left.
    """
    temporary = final.with_name(f"{TEMPORARY_PREFIX}{final.name}")
    old = final.with_name(f"{TEMPORARY_PREFIX}old-{final.name}")
    if old.exists() and not final.exists():  # a process was killed between the two renames below
        old.rename(final)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        fill(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for path in sorted(temporary.rglob("*"), reverse=True):
        sync_folder(path) if path.is_dir() else sync_file(path)
    sync_folder(temporary)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)
