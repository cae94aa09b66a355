"""What a WebDataset shard holds, and where: a tar file is gone through once, and what was found is kept.

Members belong to one sample by their name up to the first dot of its last part: `00017.jpg`, `00017.txt`,
`00017.json`, `00017.cls`. Of a sample the index has the place of the image and its size in pixels, and, as they are
few bytes, its name, label and captions as they stand in the shard.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

import torch

from repagen.data.buckets import index_file, kept
from repagen.data.images import EXTENSIONS, UNREAD_EXTENSIONS, BadImageError, read_size
from repagen.errors import UserError

INDEX_FORMAT = 1
TEXTS = ("name", "cls", "json", "txt")
"""What the index has of every sample as bytes, `name` being that of the image, or of the sample without one."""

_MAX_TEXT_BYTES = 2**20
_MAX_SHARDS = 10**6
_ZEROS = bytes(tarfile.BLOCKSIZE)


class ShardIndex:
    """The samples of a shard, in its order.

    Attributes:
        path: of the shard.
        places: offset and length of each image in bytes (N, 2) int64, zeros for a sample without an image.
        sizes: height and width of each image in pixels (N, 2) int32, zeros where the image cannot be read.
    """

    def __init__(self, path: Path, folder: str | None) -> None:
        """Read the index, or make it where there is none of the shard as it is now.

        Args:
            path: of the shard.
            folder: where indices are kept.

        Raises:
            UserError: the shard is missing, damaged or truncated, or members contradict each other.
        """
        self.path = path
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"data.path: shard {path} cannot be read ({error.strerror})") from None
        identity = (str(path.resolve()), status.st_size, status.st_mtime_ns, INDEX_FORMAT)
        tensors = kept(index_file(folder, "shard", *identity), partial(_make_index, path))
        self.places, self.sizes = tensors["places"], tensors["sizes"]
        self._texts = {name: (tensors[name], tensors[f"{name}_ends"]) for name in TEXTS}

    def __len__(self) -> int:
        return len(self.places)

    def has(self, name: str) -> bool:
        """Return whether any sample has one of `TEXTS`."""
        return bool(self._texts[name][1][-1:].sum())

    def hash_into(self, digest: hashlib._Hash) -> None:
        """Add what identifies the images to a hash: name of the shard, names and lengths of the images."""
        content, ends = self._texts["name"]
        digest.update(f"{self.path.name}\0{len(self)}\n".encode("utf-8", "surrogateescape"))
        for tensor in (content, ends, self.places[:, 1].contiguous()):
            digest.update(tensor.numpy().tobytes())

    def text(self, name: str, row: int) -> bytes:
        """Return one of `TEXTS` of a sample; empty where the shard has none."""
        content, ends = self._texts[name]
        start = int(ends[row - 1]) if row else 0
        return content[start : int(ends[row])].numpy().tobytes()


@dataclass
class _Sample:
    texts: dict[str, bytes] = field(default_factory=dict)
    place: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)


def _make_index(path: Path) -> dict[str, torch.Tensor]:
    samples: dict[str, _Sample] = {}
    last = "its beginning"
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                last = f"member {member.name}"
                _add(samples, tar, member, path)
            _require_end(tar)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"data.path: shard {path} is damaged or truncated at {last}: {error}; copy it again, or leave it out "
            "(a compressed shard must be unpacked to a plain .tar)"
        ) from None
    found = list(samples.values())
    tensors = {
        "places": torch.tensor([sample.place for sample in found], dtype=torch.int64).reshape(-1, 2),
        "sizes": torch.tensor([sample.size for sample in found], dtype=torch.int32).reshape(-1, 2),
    }
    for name in TEXTS:
        texts = [sample.texts.get(name, b"") for sample in found]
        tensors[name] = torch.frombuffer(bytearray(b"".join(texts) or b"\0"), dtype=torch.uint8)
        tensors[f"{name}_ends"] = torch.tensor([len(text) for text in texts], dtype=torch.int64).cumsum(0)
    return tensors


def _add(samples: dict[str, _Sample], tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Note what a member says of its sample; those that are no image, caption or label are passed over."""
    folder, base = posixpath.split(member.name)
    stem, _, kind = base.partition(".")
    kind = kind.lower()
    is_image, is_text = f".{kind}" in EXTENSIONS, kind in TEXTS[1:]
    if (
        not stem
        or not member.isreg()
        or member.issparse()
        or not (is_image or is_text or f".{kind}" in UNREAD_EXTENSIONS)
    ):
        return
    name = posixpath.join(folder, stem)
    sample = samples.setdefault(name, _Sample({"name": name.encode("utf-8", "surrogateescape")}))
    if (is_image and sample.place != (0, 0)) or kind in sample.texts:
        what = "a second image" if is_image else f"a second .{kind}"
        raise UserError(f"data.path: shard {path}: member {member.name} is {what} of one sample; rename or drop it")
    if not (is_image or is_text):
        return
    with _content(tar, member) as content:
        if is_image:
            sample.texts["name"] = member.name.encode("utf-8", "surrogateescape")
            sample.place, sample.size = (member.offset_data, member.size), _size(content)
        elif member.size > _MAX_TEXT_BYTES:
            raise UserError(
                f"data.path: shard {path}: member {member.name} has {member.size} bytes; allowed: {_MAX_TEXT_BYTES}"
            )
        else:
            sample.texts[kind] = content.read()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    assert content is not None, "of a regular file there is one"
    return content


def _size(content: IO[bytes]) -> tuple[int, int]:
    try:
        return read_size(content)
    except BadImageError:  # met again, and counted, when the image is loaded
        return 0, 0


def _require_end(tar: tarfile.TarFile) -> None:
    """Refuse what `tarfile` passes over: a file cut between two members, a damaged header, a second archive behind."""
    file = tar.fileobj
    assert file is not None, "it is open"
    file.seek(tar.offset)
    blocks = 0
    while block := file.read(tarfile.BLOCKSIZE):
        if block != _ZEROS[: len(block)]:
            raise tarfile.ReadError(
                "something else than the end of the archive follows" if blocks else "the next header is damaged"
            )
        blocks += 1
    if not blocks:
        raise tarfile.ReadError("the end of the archive is missing")


def shard_paths(path: str) -> list[Path]:
    """Return the shards that `data.path` names, in order.

    Args:
        path: a folder (its .tar files and those of folders below, sorted), a .tar file, a pattern with braces such as
            `shard-{0000..0015}.tar` or `{a,b}.tar`, or several of these joined by `::`.

    Raises:
        UserError: nothing is there, a shard is missing or named twice, or an address on the network is given.
    """
    words = [word for part in path.split("::") for word in _braces(part)]
    remote = next((word for word in words if re.match(r"[a-z0-9]+://|pipe:", word)), None)
    if remote:
        raise UserError(
            f"data.path: {remote} given; shards are read from folders, of a network file system too; copy them first"
        )
    found: list[Path] = []
    for word in words:
        place = Path(word).expanduser()
        found += sorted(place.rglob("*.tar")) if place.is_dir() else [place]
    missing = [str(place) for place in found if not place.is_file()]
    if missing:
        raise UserError(
            f"data.path: {len(missing)} of {len(found)} shards are not there, first {', '.join(missing[:3])}"
        )
    if not found:
        raise UserError(
            f"data.path: {path} holds no .tar files; allowed: a folder of shards, or shard-{{0000..0015}}.tar"
        )
    if len(set(found)) < len(found):
        twice = next(place for place in found if found.count(place) > 1)
        raise UserError(f"data.path: shard {twice} is named twice")
    return found


def _braces(pattern: str) -> Iterator[str]:
    """Expand the first {first..last} or {a,b}, and those after it."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    for choice in _choices(match[1], pattern):
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _choices(words: str, pattern: str) -> Sequence[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", words)
    if not span:
        return words.split(",")
    first, last = int(span[1]), int(span[2])
    if not first <= last < first + _MAX_SHARDS:
        raise UserError(f"data.path: {{{words}}} in {pattern}; allowed: up to {_MAX_SHARDS} numbers, from low to high")
    width = len(span[1]) if span[1].startswith("0") else 0
    return [str(number).zfill(width) for number in range(first, last + 1)]
