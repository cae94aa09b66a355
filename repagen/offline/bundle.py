"""A folder that holds everything some recipes need, and a list of it with hashes.

DIR/hub          a cache of huggingface_hub (HF_HUB_CACHE), of plain files
DIR/torch        torch's cache (TORCH_HOME), for published files that are no Hub repositories
DIR/reference    reference statistics, put there by the user
DIR/bundle.json  what is in there; written last
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from repagen.errors import UserError, refusing
from repagen.files import file_digest, replace_file
from repagen.hub.fetching import NotThereError
from repagen.hub.places import BUNDLE_FILE
from repagen.offline.needs import BLANK, Need
from repagen.offline.published import PUBLISHED_FILES, fetch_published
from repagen.offline.recipes import Request
from repagen.offline.repository import Listing, fetch_files, look_up, referred_needs

logger = logging.getLogger(__name__)

_FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One need, and what of it is in the bundle.

    Attributes:
        need: what it is.
        command: which asks for it, without `--to DIR`.
        commit: of a Hub repository.
        licence: of the weights.
        files: path within the bundle => {"bytes": size, "sha256": digest}; empty where it is missing.
        problem: why it is missing.
        absent: there is no such thing, so that asking again is in vain.
    """

    need: Need
    command: str
    commit: str | None = None
    licence: str = ""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    problem: str = ""
    absent: bool = False


class Bundle:
    """A folder that `repagen download` fills, and checks.

    Args:
        folder: the folder, there or not.

    Raises:
        UserError: its list cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.entries: dict[tuple[Any, ...], Entry] = {}
        path = folder / BUNDLE_FILE
        if path.is_file():
            with refusing(f"{path}: cannot be read; delete it and run `repagen download` again"):
                content = json.loads(path.read_text(encoding="utf-8"))
                if content["format"] != _FORMAT:
                    raise UserError(f"{path}: of format {content['format']!r}, this version reads {_FORMAT}")
                entries = [Entry(**{**one, "need": Need(**one["need"])}) for one in content["things"]]
            self.entries = {entry.need.identity: entry for entry in entries}

    @property
    def environment(self) -> str:
        """The line that makes every program look here and nowhere else."""
        hub, torch = (shlex.quote(str(self.folder / name)) for name in ("hub", "torch"))
        return f"export HF_HUB_CACHE={hub} TORCH_HOME={torch} HF_HUB_OFFLINE=1"

    # --- filling -----------------------------------------------------------------------------------------------------

    def fill(self, request: Request) -> list[Entry]:
        """Fetch what a request needs and what that refers to; what is here already is only verified.

        What cannot be got now stays listed with its reason, and the rest is fetched all the same. What does not exist
        is not listed, nor what an earlier request of the same name asked for in vain and this one does not. A branch
        that moved on at the Hub changes nothing: a bundle keeps the commits it has.

        Returns:
            An entry for each need; those with a `problem` are missing.

        Raises:
            UserError: for the request itself.
        """
        done: dict[tuple[Any, ...], Entry] = {}
        todo = request.needs()
        while todo:
            wanted = {need.identity: need for need in reversed(todo) if need.identity not in done}
            plans = [self._plan(need, request.command) for need in reversed(wanted.values())]
            for entry, listing in plans:
                done[entry.need.identity] = self._fetched(entry, listing)
            todo = [need for entry, _ in plans for need in self._referred(done[entry.need.identity])]
        self._put_into_list(done, request)
        return list(done.values())

    def _plan(self, need: Need, command: str) -> tuple[Entry, Listing | None]:
        """=> the entry, without files where they must be fetched; and what the Hub says about it, which is shown."""
        entry = replace(self.entries.get(need.identity, Entry(need, command)), problem="", absent=False)
        damage = list(_damage(self.folder, entry))
        if entry.files and not damage:
            return entry, None
        for path, _ in damage:
            (self.folder / path).unlink(missing_ok=True)
        entry, listing = replace(entry, files={}), None
        if need.on_hub:
            try:
                listing = look_up(replace(need, revision=entry.commit or need.revision), self.folder / "hub")
            except UserError as error:
                entry = replace(entry, problem=str(error), absent=isinstance(error, NotThereError))
        _announce(need, listing)
        return entry, listing

    def _fetched(self, entry: Entry, listing: Listing | None) -> Entry:
        if entry.files or entry.problem:
            return entry
        try:
            return self._fetch(entry, listing)
        except UserError as error:
            return replace(entry, problem=str(error))

    def _fetch(self, entry: Entry, listing: Listing | None) -> Entry:
        need = entry.need
        if need.kind == "path":
            problem = _path_problem(need)
            return replace(entry, problem=problem, absent=bool(problem))
        if need.kind == "statistics":
            return replace(entry, files=self._digests([self._statistics(need)]))
        if need.kind == "file":
            published = PUBLISHED_FILES[need.name]
            path = self.folder / "torch" / "hub" / "checkpoints" / published.file
            if not path.is_file() or not file_digest(path)["sha256"].startswith(published.sha256):
                fetch_published(published, path)
            return replace(entry, licence=published.licence, files=self._digests([path]))
        assert listing is not None, "what is on the Hub has been looked up"
        found = fetch_files(need, listing, self.folder / "hub")
        return replace(entry, commit=listing.commit, licence=listing.licence, files=self._digests(found))

    def _statistics(self, need: Need) -> Path:
        path = self.folder / "reference" / need.name
        if not path.is_file():
            raise UserError(
                f"{need.name}: {need.advice}; no package knows where it is, so get it by hand, put it at {path} and "
                "run the same command again"
            )
        return path

    def _referred(self, entry: Entry) -> list[Need]:
        need = entry.need
        if entry.problem:
            return []
        if need.kind == "path" and Path(need.name).expanduser().is_dir() and need.why != "data.path":
            return list(referred_needs(Path(need.name).expanduser(), need.why))
        if need.kind == "model":
            described = [self.folder / path for path in entry.files if "/snapshots/" in path]
            folder = next(parent for parent in described[0].parents if parent.parent.name == "snapshots")
            return list(referred_needs(folder, need.why))
        return []

    def _digests(self, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
        return {path.relative_to(self.folder).as_posix(): file_digest(path) for path in paths}

    def _put_into_list(self, done: Mapping[tuple[Any, ...], Entry], request: Request) -> None:
        def stays(entry: Entry) -> bool:
            if entry.need.identity in done:
                return bool(entry.commit) or not entry.absent  # what has a commit was here once, and is damaged now
            return bool(entry.files) or shlex.split(entry.command)[2] != request.name

        entries = {identity: entry for identity, entry in {**self.entries, **done}.items() if stays(entry)}
        if entries == self.entries:  # perhaps a folder that cannot be written
            return
        self.entries = entries
        content = {"format": _FORMAT, "things": [asdict(entry) for entry in entries.values()]}
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1) + "\n"
        replace_file(self.folder / BUNDLE_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    # --- checking ----------------------------------------------------------------------------------------------------

    def problems(self, needs: Sequence[Need] | None = None, command: str = "") -> Iterator[str]:
        """Name each thing that is missing or damaged with the command that gets it; no network is touched.

        Args:
            needs: of a request; None: everything that was ever asked for.
            command: of the request.

        Raises:
            UserError: there is no list.
        """
        path = self.folder / BUNDLE_FILE
        if not path.is_file():
            raise UserError(f"{path}: not there; fill the folder with `repagen download NAME --to {self.folder}`")
        for need in needs or ():
            if need.identity not in self.entries:
                yield f"{need.why}: {_path_problem(need) or self._missing(need, command)}"
        asked = None if needs is None else {need.identity for need in needs}
        parents = tuple(f"{need.why}:" for need in needs or ())  # of what these refer to
        for identity, entry in self.entries.items():
            if asked is None or identity in asked or entry.need.why.startswith(parents):
                yield from self._problems_of(entry)

    def _problems_of(self, entry: Entry) -> Iterator[str]:
        need = entry.need
        if need.kind == "path":
            if problem := _path_problem(need):
                yield f"{need.why}: {problem}"
        elif not entry.files:
            yield f"{need.why}: {self._missing(need, entry.command)}"
        for path, problem in _damage(self.folder, entry):
            where = f"{need.why}: {need.kind} {need.name}: {self.folder / path}"
            yield f"{where} {problem}; {self._advice(entry.command)}"

    def _missing(self, need: Need, command: str) -> str:
        return f"{need.kind} {need.name}: missing; {self._advice(command)}"

    def _advice(self, command: str) -> str:
        return f"get it with `{command} --to {shlex.quote(str(self.folder))}`"


def _path_problem(need: Need) -> str:
    """Say that a path is not there, or was left to the user; nothing about other needs."""
    if need.kind != "path" or Path(need.name).expanduser().exists():
        return ""
    if need.name == BLANK:
        return f"the recipe leaves it to you; give {need.why}=PATH_OR_HUB_ID"
    return f"{need.name} is not there; correct the path, or give {need.why}=ANOTHER"


def _damage(folder: Path, entry: Entry) -> Iterator[tuple[str, str]]:
    """Yield path and trouble of each file that is not as the list has it."""
    for name, expected in entry.files.items():
        path = folder / name
        if not path.is_file():
            yield name, "is missing"
        elif path.stat().st_size != expected["bytes"]:
            yield name, f"is damaged ({path.stat().st_size} bytes, must be {expected['bytes']})"
        elif file_digest(path)["sha256"] != expected["sha256"]:
            yield name, f"is damaged (its sha256 is not {expected['sha256'][:12]}...)"


def _announce(need: Need, listing: Listing | None) -> None:
    """Tell what is about to be downloaded, and its licence."""
    if need.kind == "file":
        logger.warning("%s: %s: licence %s", need.why, need.name, PUBLISHED_FILES[need.name].licence)
    elif listing is not None:
        sizes = [size for size, _ in listing.files.values() if size is not None]
        megabytes = f", {sum(sizes) / 1e6:.1f} MB" if sizes else ""
        count = len(listing.files)
        logger.warning(
            "%s: %s %s at %s: %d files%s; licence %s",
            need.why, need.kind, need.name, listing.commit[:12], count, megabytes, listing.licence,
        )  # fmt: skip
