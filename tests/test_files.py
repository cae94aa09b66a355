"""Folders are replaced whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from repagen.files import TEMPORARY_PREFIX, replace_file, replace_folder


def filling(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "file").write_text(text)

    return write


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    final = tmp_path / "manifest.json"
    for text in ("one", "two"):
        replace_file(final, lambda file, text=text: file.write_text(text))
        assert final.read_text() == text

    def fail(file: Path) -> None:
        file.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        replace_file(final, fail)
    assert final.read_text() == "two" and [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_file_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path / "folder", lambda file: file.write_text("one"))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_whole_folders_are_swapped(tmp_path: Path) -> None:
    final = tmp_path / "pipeline"
    for text in ("one", "two"):
        replace_folder(final, filling(text))
        assert (final / "sub" / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    final = tmp_path / "pipeline"
    replace_folder(final, filling("one"))

    def fail(folder: Path) -> None:
        filling("two")(folder)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        replace_folder(final, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    assert (final / "sub" / "file").read_text() == "one"


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    final = tmp_path / "pipeline"
    filling("one")(tmp_path / f"{TEMPORARY_PREFIX}old-pipeline")

    def fail(folder: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        replace_folder(final, fail)
    assert (final / "sub" / "file").read_text() == "one"
