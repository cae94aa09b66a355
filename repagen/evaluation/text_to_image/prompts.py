"""Prompts that images are made from: a text file, GenEval's JSON lines, or DPG-Bench's folder of text files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repagen.errors import UserError, refusing
from repagen.files import file_digest


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: the name of its images; `00000`, `00001` ... where the file gives none.
        text: what the model is asked for.
        metadata: the JSON object it stood in; None for plain text.
    """

    id: str
    text: str
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their file; those of a folder in that of `natural_key`.

    Attributes:
        path: the file or folder; of prompts that lie nowhere, what they are.
        sha256: of the file; otherwise of all ids and texts.
        prompts: at least one, with different ids.
        named: whether the ids come from the file and not from the order.
    """

    path: Path | str
    sha256: str
    prompts: tuple[Prompt, ...]
    named: bool

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def protocol(self) -> dict[str, Any]:
        """What the prompts were, for the result file."""
        return {"kind": "prompts", "path": str(self.path), "sha256": self.sha256, "count": len(self)}


def read_prompts(path: str | Path) -> PromptSet:
    """Read prompts.

    Args:
        path: `FILE.txt` with one prompt a line; `FILE.jsonl` with one JSON object a line, which has `prompt`, perhaps
            `id`, and what GenEval's `evaluation_metadata.jsonl` has (`tag`, `include` ...); or a folder of `<id>.txt`
            as DPG-Bench has it, in the order of `natural_key`.

    Raises:
        UserError: when there is no such file, or a prompt is empty, not JSON, or of an id that was there before;
            naming the line.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(f"no such file or folder of prompts: {path}")
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path}: prompts come as FILE.txt, FILE.jsonl or a folder of <id>.txt; rename or convert it")
    with refusing(f"{path}: cannot be read as UTF-8"):
        # Not splitlines(): it also breaks at characters that belong to a prompt, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    prompts, named = _read_lines(lines, path) if path.suffix == ".txt" else _read_json_lines(lines, path)
    return PromptSet(path, file_digest(path)["sha256"], tuple(prompts), named)


def prompt_set(what: str, texts: Sequence[str]) -> PromptSet:
    """Make a set of texts that lie nowhere.

    Args:
        what: they are, for messages and results.
        texts: at least one.
    """
    prompts = tuple(Prompt(f"{number:05d}", text) for number, text in enumerate(texts))
    return PromptSet(what, _digest(prompts), prompts, named=False)


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key of names by which their numbers count as numbers: `p2` before `p10`."""
    words = re.split(r"(\d+)", name)
    return [(1, int(word), "") if word.isdecimal() else (0, 0, word) for word in words], name


def _read_lines(lines: Sequence[str], path: Path) -> tuple[list[Prompt], bool]:
    prompts = []
    for number, line in enumerate(lines):
        if not line.strip():
            raise UserError(f"{path}:{number + 1}: empty; write one prompt on every line")
        prompts.append(Prompt(f"{number:05d}", line.strip()))
    return prompts, False


def _read_json_lines(lines: Sequence[str], path: Path) -> tuple[list[Prompt], bool]:
    objects = [_json_object(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    named = "id" in objects[0]
    prompts: dict[str, Prompt] = {}
    for number, metadata in enumerate(objects):
        place = f"{path}:{number + 1}"
        if ("id" in metadata) != named:
            raise UserError(
                f"{place}: either every line has an id or none; the first line has {'one' * named or 'none'}"
            )
        name = _checked_id(metadata["id"], place) if named else f"{number:05d}"
        if name in prompts:
            raise UserError(f"{place}: id {name!r} was there before; give every prompt its own")
        prompts[name] = Prompt(name, metadata["prompt"].strip(), metadata)
    return list(prompts.values()), named


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error.msg}); write one JSON object on every line") from error
    if not isinstance(content, dict):
        raise UserError(f"{place}: must be a JSON object with a prompt, got {type(content).__name__}")
    text = content.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place}:prompt: must be a text that is not empty, got {json.dumps(text)}")
    if not isinstance(content.get("tag", ""), str):
        raise UserError(f"{place}:tag: must be a text, got {json.dumps(content['tag'])}")
    for key in ("include", "exclude"):
        for demand in _list_of(content, key, place):
            if not isinstance(demand, dict) or not {"class", "count"} <= demand.keys():
                raise UserError(f"{place}:{key}: each entry needs class and count, got {json.dumps(demand)}")
    return content


def _list_of(content: dict[str, Any], key: str, place: str) -> list[Any]:
    found = content.get(key, [])
    if not isinstance(found, list):
        raise UserError(f"{place}:{key}: must be a list of objects, got {type(found).__name__}")
    return found


def _checked_id(value: Any, place: str) -> str:
    name = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not name or "/" in name or name.startswith("."):
        raise UserError(f"{place}:id: must be a number or a text that can name a file, got {json.dumps(value)}")
    return name


def _read_folder(folder: Path) -> PromptSet:
    found = (path for path in folder.glob("*.txt") if not path.name.startswith("."))
    files = sorted(found, key=lambda path: natural_key(path.stem))
    if not files:
        raise UserError(f"{folder}: no prompts found; looked for <id>.txt")
    prompts = []
    for path in files:
        with refusing(f"{path}: cannot be read as UTF-8"):
            text = path.read_text(encoding="utf-8-sig").strip()
        if not text:
            raise UserError(f"{path}: empty; write the prompt into it, or remove it")
        prompts.append(Prompt(path.stem, text))
    return PromptSet(folder, _digest(prompts), tuple(prompts), named=True)


def _digest(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.text]).encode())
    return digest.hexdigest()
