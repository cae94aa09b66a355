"""A Hub on this machine: the endpoints that huggingface_hub needs to read model repositories, and its failures.

    with StandInHub() as hub:
        repository = hub.add("org/tiny", folder)          # one commit, the branch main
        second = repository.commit(other_folder)          # another commit; main moves to it
        repository.refs["v1"] = second                    # a tag
        hub.fault("org/tiny", "*.safetensors", status=429, times=1)

`serve_repository` is the short form for one folder as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """A model repository: commits, each a folder, and the branches and tags that point to them."""

    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # needed to read it
    gated: bool = False  # the token is not enough

    def commit(self, folder: Path, commit: str | None = None, *, branch: str = "main") -> str:
        """Serve a folder as a commit and let a branch point to it; it is made up from their number."""
        commit = commit or hashlib.sha1(str(len(self.commits)).encode()).hexdigest()
        self.commits[commit] = folder
        self.refs[branch] = commit
        return commit

    def files(self, commit: str) -> dict[str, Path]:
        """The files of a commit, by their paths in the repository."""
        folder = self.commits[commit]
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass
class Fault:
    """What happens in place of an answer; see `StandInHub.fault`."""

    repo_id: str
    pattern: str
    method: str | None
    times: int
    answer: dict[str, Any]
    then: Callable[[], Any] | None


@dataclass(frozen=True)
class Request:
    """One request that came: the method, the repository, what was asked for, at which revision."""

    method: str
    repo_id: str
    path: str  # of the file; "(info)" and "(tree)" for facts of the repository
    revision: str


class StandInHub:
    """Serves repositories on loopback while it is entered."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.released = threading.Event()
        hub = self
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo_id: str, folder: Path, commit: str | None = None, **facts: Any) -> Repository:
        """Serve a folder as the only commit of a repository, its main branch."""
        repository = self.repositories[repo_id] = Repository(**facts)
        repository.commit(folder, commit)
        return repository

    def fault(
        self,
        repo_id: str,
        pattern: str = "*",
        *,
        method: str | None = None,
        times: int = 10**6,
        then: Callable[[], Any] | None = None,
        **answer: Any,
    ) -> None:
        """Answer requests for a path otherwise.

        Args:
            repo_id: the repository.
            pattern: of the paths, with `*`; "(info)" is the repository's description, "(tree)" its list of files.
            method: "HEAD" or "GET"; None for both.
            times: so often; then the true answer comes again.
            then: called after the answer, for example to move a branch.
            answer: any of `status` (with `code`, the Hub's X-Error-Code, and `headers`), `hang=True` (nothing comes
                until the Hub stops), `cut=n` (the connection breaks after n bytes of the body; with `stall=True` it
                stays open and silent), `resumes=False` (Range
                is ignored), `length=n` (the header says so many bytes in place of the true number), `body=...`. With
                none of them the true answer comes.
        """
        self.faults.append(Fault(repo_id, pattern, method, times, answer, then))

    def asked(self, pattern: str = "*", method: str | None = "GET") -> list[Request]:
        """The requests so far for paths of a pattern."""
        return [r for r in self.requests if fnmatch(r.path, pattern) and method in (None, r.method)]

    def due_fault(self, request: Request) -> Fault | None:
        """The first fault that fits a request, counted as used."""
        for fault in self.faults:
            fits = fault.repo_id == request.repo_id and fault.method in (None, request.method)
            if fault.times > 0 and fits and fnmatch(request.path, fault.pattern):
                fault.times -= 1
                return fault
        return None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.reply()

    def do_GET(self) -> None:
        self.reply()

    def reply(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = self.parse(path)
        if request is None:
            return self.answer(b"", status=404, code="RepoNotFound")
        self.hub.requests.append(request)
        fault = self.hub.due_fault(request)
        try:
            self.reply_to(request, fault.answer if fault else {})
        finally:
            if fault and fault.then:
                fault.then()

    def parse(self, path: str) -> Request | None:
        assert self.command in ("GET", "HEAD")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            repo_id, kind, revision = found.groups()
            return Request(self.command, repo_id, "(tree)" if kind == "tree" else "(info)", revision or "main")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo_id, revision, file = found.groups()
            return Request(self.command, repo_id, file, revision)
        return None

    def reply_to(self, request: Request, fault: dict[str, Any]) -> None:
        if fault.get("hang"):
            self.hub.released.wait()
            self.close_connection = True
            return None
        if "status" in fault:
            return self.answer(b"", **{key: fault[key] for key in ("status", "code", "headers") if key in fault})
        repository = self.hub.repositories.get(request.repo_id)
        authorised = repository and repository.token in (None, self.token())
        if repository is None or (not authorised and not repository.gated):
            return self.answer(b"", status=401, code="RepoNotFound")
        if repository.gated and request.path not in ("(info)", "(tree)"):
            return self.answer(b"", status=403 if self.token() else 401, code="GatedRepo")
        commit = repository.refs.get(request.revision, request.revision)
        if commit not in repository.commits:
            return self.answer(b"", status=404, code="RevisionNotFound")
        return self.reply_at(request, repository.files(commit), commit, fault)

    def reply_at(self, request: Request, files: dict[str, Path], commit: str, fault: dict[str, Any]) -> None:
        at = {"X-Repo-Commit": commit}
        if request.path == "(info)":
            info = {"id": request.repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return self.answer(json.dumps(info).encode(), headers=at)
        if request.path == "(tree)":
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest(file)}
                for name, file in files.items()
            ]
            return self.answer(json.dumps(entries).encode(), headers=at)
        if request.path not in files:
            return self.answer(b"", status=404, code="EntryNotFound", headers=at)
        file = files[request.path]
        body = fault.get("body", file.read_bytes())
        return self.answer(body, headers={**at, "ETag": f'"{digest(file)}"'}, fault=fault)

    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def answer(
        self,
        body: bytes,
        *,
        status: int = 200,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        fault: dict[str, Any] | None = None,
    ) -> None:
        fault = fault or {}
        headers = dict(headers or {})
        if code is not None:
            headers["X-Error-Code"] = code
        if status == 200 and fault.get("resumes", True) and (found := self.headers.get("Range")):
            start = int(found.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[start:]
        headers["Content-Length"] = str(fault.get("length", len(body)))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: fault.get("cut")])
        if fault.get("stall"):
            self.hub.released.wait()
        if "cut" in fault or "length" in fault:
            self.close_connection = True


@contextmanager
def serve_repository(repo_id: str, folder: Path) -> Iterator[str]:
    """Serve a folder as the repository `repo_id`; yield the endpoint for HF_ENDPOINT."""
    with StandInHub() as hub:
        hub.add(repo_id, folder, COMMIT)
        yield hub.endpoint


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def write_model(folder: Path, text: str) -> Path:
    """Write a folder with a small file, and one of 100 KB and more in a folder below."""
    (folder / "part").mkdir(parents=True)
    (folder / "config.json").write_text(f'{{"text": "{text}"}}')
    (folder / "part" / "weights.safetensors").write_bytes(text.encode() * 20_000)
    return folder
