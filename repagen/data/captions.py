"""Captions of an image: one or several with weights, how files say them, and the draw among them."""

from __future__ import annotations

import io
import json
import logging
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from repagen.errors import UserError, require_unicode

logger = logging.getLogger(__name__)

MissingRule = Literal["refuse", "empty", "drop"]
KEYS = ("captions", "caption", "text")
"""Names under which captions are found without being told; the first that says something counts."""

_NAMED = 5
_FORMS = 'a text, a list of texts, or a list of {"caption": text, "weight": number}'


@dataclass(frozen=True)
class Captions:
    """The captions of one image.

    Attributes:
        texts: one or more.
        weights: of each text, positive; a caption is drawn in proportion to its weight.
    """

    texts: tuple[str, ...]
    weights: tuple[float, ...]

    def draw(self, generator: torch.Generator | None = None) -> str:
        """Return a caption drawn by weight; without a generator the heaviest, of equals the first.

        Nothing is drawn from the generator where there is no choice.
        """
        if generator is None:
            return self.texts[max(range(len(self.texts)), key=self.weights.__getitem__)]
        if len(self.texts) == 1:
            return self.texts[0]
        ends = list(accumulate(self.weights))
        drawn = float(torch.rand((), generator=generator, dtype=torch.float64)) * ends[-1]
        return self.texts[min(bisect_right(ends, drawn), len(ends) - 1)]

    def to_json(self) -> str:
        """Return them as a JSON text, which `from_json` reads back."""
        return json.dumps(list(zip(self.texts, self.weights, strict=True)), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Captions:
        """Read what `to_json` wrote."""
        texts, weights = zip(*json.loads(text), strict=True)
        return cls(texts, weights)


NO_CAPTION = Captions(("",), (1.0,))
"""What an image without a caption has where `captions.missing=empty`."""


def read_captions(value: Any, columns: Mapping[str, float], where: str) -> Captions | None:
    """Return the captions in a value of a JSON file or a row of a table, None where it holds none.

    Args:
        value: a text, a list of texts, a list of {"caption": text, "weight": number}, or an object that holds one of
            these in its columns.
        columns: name => weight of the columns that count, whose captions share it; when empty, the first of `KEYS`
            that holds a caption.
        where: what the value is called in messages.

    Raises:
        UserError: the value is of another form, a weight is no number from 0 on, or a text is not Unicode.
    """
    if not isinstance(value, Mapping):
        return _captions([] if columns else _pairs(value, where))
    if columns:
        parts = [(weight, _pairs(value.get(name), f"{where}:{name}")) for name, weight in columns.items()]
    else:
        found = (_pairs(value.get(name), f"{where}:{name}") for name in KEYS)
        parts = [(1.0, next((pairs for pairs in found if pairs), []))]
    return _captions((text, share * part) for share, pairs in parts for text, part in _shares(pairs))


def read_caption_text(text: str, columns: Mapping[str, float]) -> Captions | None:
    """Return the captions in a text file, one per line that is not blank; none where columns are asked for."""
    lines = io.StringIO(text, newline=None)  # not splitlines(): it breaks at U+2028, too, which belongs to a caption
    return _captions([] if columns else [(line.strip(), 1.0) for line in lines if line.strip()])


def read_json(text: bytes | str, where: str) -> Any:
    """Parse JSON.

    Raises:
        UserError: it is none; `where` is named.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError, too
        raise UserError(f"{where}: no readable JSON ({error}); repair or remove it") from None


def decode_text(content: bytes, where: str) -> str:
    """Decode a text file, with or without a byte order mark.

    Raises:
        UserError: it is not UTF-8; `where` is named.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not a text in UTF-8 ({error.reason} at byte {error.start}); convert it") from None


def captioned_samples(
    has: Iterable[bool], rule: MissingRule, describe: Callable[[int], str], columns: Iterable[str] = ()
) -> list[int]:
    """Return the samples that stay in a dataset.

    Args:
        has: whether each sample has a caption.
        rule: what becomes of those without.
        describe: how a sample is called in messages.
        columns: where captions were looked for, where that was asked for.

    Raises:
        UserError: samples are without caption and the rule refuses them; or none has one and all would be dropped.
    """
    there = list(has)
    missing = [index for index, captioned in enumerate(there) if not captioned]
    if not missing:
        return list(range(len(there)))
    names = ", ".join(describe(index) for index in missing[:_NAMED]) + (" ..." if len(missing) > _NAMED else "")
    place = f" in {', '.join(columns)}" if columns else ""
    message = f"{len(missing)} of {len(there)} images have no caption{place}: {names}"
    if rule == "refuse" or (rule == "drop" and len(missing) == len(there)):
        raise UserError(
            f"data.captions: {message}; add them, or set data.captions.missing=empty (an empty caption) or "
            "data.captions.missing=drop (leave those images out)"
        )
    logger.warning("%s; they %s", message, "are left out" if rule == "drop" else "get an empty one")
    return [index for index, captioned in enumerate(there) if captioned or rule == "empty"]


class CaptionFiles:
    """Captions in files beside the images of a folder.

    Of an image `name.jpg` the first of these that holds a caption counts: `name.json`, `name.txt` (one caption per
    line), its row in a `metadata.jsonl` in its folder or above (`file_name` and the caption's columns, as Hugging Face
    imagefolder has it). Files are read when they are asked for; of `metadata.jsonl` the places of the rows are kept.

    Raises:
        UserError: a row of a `metadata.jsonl` cannot be read, names no file, or names one a second time.
    """

    METADATA = "metadata.jsonl"

    def __init__(self, root: Path, files: Sequence[str], columns: Mapping[str, float]) -> None:
        """Look for rows of the images.

        Args:
            root: the dataset's folder.
            files: paths of the images, below it.
            columns: as of `read_captions`.
        """
        self._root = root
        self._columns = dict(columns)
        self._rows: dict[str, tuple[Path, int]] = {}  # image => where its row begins
        folders = {folder for file in files for folder in Path(file).parents}
        for folder in sorted(folders, key=lambda folder: len(folder.parts)):  # rows nearer to the image win
            if (root / folder / self.METADATA).is_file():
                self._rows.update(self._read_places(folder))

    def read(self, file: str) -> Captions | None:
        """Return the captions of an image, None where it has none.

        Raises:
            UserError: a file cannot be read; it is named.
        """
        return self._beside(file) or self._in_row(file)

    def _beside(self, file: str) -> Captions | None:
        path = self._root / file
        content = _content(path.with_suffix(".json"))
        if content is not None:
            where = str(path.with_suffix(".json"))
            captions = read_captions(read_json(content, where), self._columns, where)
            if captions:
                return captions
        content = _content(path.with_suffix(".txt"))
        if content is None:
            return None
        return read_caption_text(decode_text(content, str(path.with_suffix(".txt"))), self._columns)

    def _in_row(self, file: str) -> Captions | None:
        if file not in self._rows:
            return None
        path, place = self._rows[file]
        with path.open("rb") as stream:
            stream.seek(place)
            line = stream.readline()
        where = f"{path} ({file})"
        name = _file_name(row := _json_or_none(line))
        if name is None or path.parent / name != self._root / file:
            raise UserError(f"{where}: the row is not where it was; the file was changed while in use, start again")
        return read_captions(row, self._columns, where)

    def _read_places(self, folder: Path) -> Iterator[tuple[str, tuple[Path, int]]]:
        path, place = self._root / folder / self.METADATA, 0
        seen: set[str] = set()
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    name = _file_name(read_json(line, where))
                    if name is None or name in seen:
                        _refuse_row(where, name)
                    seen.add(name)
                    yield str(folder / name), (path, place)
                place += len(line)


def _file_name(row: Any) -> str | None:
    name = row.get("file_name") if isinstance(row, Mapping) else None
    return name if isinstance(name, str) else None


def _json_or_none(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _refuse_row(where: str, name: str | None) -> NoReturn:
    what = "no file_name" if name is None else f"a second row of {name}"
    raise UserError(f'{where}: {what}; allowed: one {{"file_name": ..., "text": ...}} per image')


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _captions(pairs: Iterable[tuple[str, float]]) -> Captions | None:
    listed = list(pairs)
    return Captions(tuple(text for text, _ in listed), tuple(weight for _, weight in listed)) if listed else None


def _shares(pairs: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    total = sum(weight for _, weight in pairs)
    return [(text, weight / total) for text, weight in pairs]


def _pairs(value: Any, where: str) -> list[tuple[str, float]]:
    """=> text and weight of the captions that are not blank and can be drawn."""
    entries = value if isinstance(value, list) else [value]
    pairs = [_pair(entry, where) for entry in entries if entry is not None]
    return [(text.strip(), weight) for text, weight in pairs if text.strip() and weight > 0]


def _pair(entry: Any, where: str) -> tuple[str, float]:
    text, weight = entry, 1.0
    if isinstance(entry, Mapping):
        text, weight = entry.get("caption", entry.get("text")), entry.get("weight", 1.0)
    if not isinstance(text, str):
        raise UserError(f"{where}: {type(entry).__name__} given as a caption; allowed: {_FORMS}")
    require_unicode(text, where)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight <= sys.float_info.max:
        raise UserError(f"{where}: weight {weight!r} given; allowed: a number from 0 on")
    return text, float(weight)
