"""PNG files that say how they came about. Nothing in them depends on the time or the place of writing.

The text chunk `repagen` is a JSON object with the facts, `Software` names the library and its version, `Description`
is one line for people. Any reader of PNG shows them; with Pillow: `json.loads(Image.open(path).info["repagen"])`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from repagen.errors import UserError
from repagen.files import TEMPORARY_PREFIX, put_file


def save_png(image: Image.Image, path: Path, facts: Mapping[str, Any], description: str) -> None:
    """Write an image with its facts as a PNG, whole or not at all; equal images and facts give equal bytes.

    Args:
        image: 8-bit RGB.
        path: the PNG; its folder is made if needed.
        facts: JSON-able values; how the image came about.
        description: the same in one line.
    """
    import repagen

    metadata = PngInfo()
    metadata.add_text("Software", f"repagen {repagen.__version__}")
    metadata.add_text("Description", description)
    metadata.add_text("repagen", json.dumps(facts, allow_nan=False))
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    put_file(path, content.getvalue())


def read_png_facts(path: Path) -> dict[str, Any]:
    """Return the facts that `save_png` wrote into a file.

    Raises:
        UserError: the file cannot be read whole, or carries no facts of this library.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            return json.loads(image.info["repagen"])
    except (OSError, SyntaxError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no PNG with metadata of repagen ({type(error).__name__})") from error


def refuse_other_facts(path: Path, facts: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a picture in --output that another command has written.

    Args:
        path: the file.
        facts: that it carries.
        ours: that it would carry from this command.

    Raises:
        UserError: they differ, naming what does.
    """
    differing = sorted(name for name in {*facts, *ours} if facts.get(name) != ours.get(name))
    if differing:
        raise UserError(
            f"--output: {path} was made with other values of {', '.join(differing)}; name a new folder, or "
            "repeat the interrupted command"
        )


def refuse_foreign_files(folder: Path, own: Collection[str]) -> None:
    """Take a folder of --output that is new, or in which this command was interrupted, whose half files are removed.

    Args:
        folder: there or not.
        own: names of what the command writes into it.

    Raises:
        UserError: it is a file, or holds something else.
    """
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(name for name in found.difference(own) if not name.startswith(TEMPORARY_PREFIX))
    if foreign or (folder.exists() and not folder.is_dir()):
        held = f" holds {foreign[0]}, which is not of this command" if foreign else " is a file"
        raise UserError(f"--output: {folder}{held}; name a new folder")
    for name in found.difference(own):  # of a killed process
        (folder / name).unlink()
