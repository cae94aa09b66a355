"""A Hub on this machine that takes uploads: repositories with branches, each a folder, over HTTP on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from folders import folder_bytes

TOKEN = "hf_" + "a" * 34

# huggingface_hub 2.4 hands LFS uploads to httpx by the argument's old name.
UPLOAD_WARNING = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class UploadHub:
    """What the server knows.

    `faults` maps a pattern of "METHOD path" to the status that answers it instead.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.endpoint = ""
        self.role = "write"  # of the token
        self.private: dict[str, bool] = {}
        self.commits: list[tuple[str, str, str]] = []  # repository, branch, message
        self.faults: dict[str, int] = {}
        self.requests: list[str] = []
        self.large: dict[str, bytes] = {}

    def branch(self, repo_id: str, name: str = "main") -> Path:
        return self.folder / repo_id / name

    def files(self, repo_id: str, name: str = "main") -> dict[str, bytes]:
        return folder_bytes(self.branch(repo_id, name))

    def open(self, repo_id: str, *, private: bool = False) -> None:
        self.private[repo_id] = private
        self.write(repo_id, "main", ".gitattributes", b"")

    def write(self, repo_id: str, branch: str, name: str, content: bytes) -> None:
        path = self.branch(repo_id, branch) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def commit_of(self, repo_id: str, name: str) -> str | None:
        """The hash of a branch's files; a hash is itself."""
        if re.fullmatch("[0-9a-f]{40}", name):
            return name
        if not self.branch(repo_id, name).is_dir():
            return None
        return hashlib.sha1(repr(self.files(repo_id, name)).encode()).hexdigest()

    def branch_of(self, repo_id: str, name: str) -> str:
        branches = [path.name for path in (self.folder / repo_id).iterdir()]
        return next((branch for branch in branches if self.commit_of(repo_id, branch) == name), name)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: UploadHub

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        self.hub.requests.append(line)
        fault = next((status for pattern, status in self.hub.faults.items() if re.search(pattern, line)), None)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        writing = self.command in ("POST", "PUT") or "whoami" in path
        if fault is not None:
            return self._answer({"error": "as the test asks"}, fault)
        if writing and not path.startswith("/lfs/") and token != TOKEN:
            return self._answer({"error": "Invalid user token."}, 401)
        for pattern, answer in _ROUTES:
            if found := re.fullmatch(pattern, line):
                return answer(self, body, *found.groups())
        return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # --- writing ---------------------------------------------------------------------------------------------------

    def _whoami(self, body: bytes) -> None:
        self._answer(
            {"type": "user", "name": "me", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": self.hub.role}}}
        )

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = repo_id in self.hub.private
        if not known:
            self.hub.open(repo_id, private=asked.get("private") or asked.get("visibility") == "private")
        self._answer({"url": f"{self.hub.endpoint}/{repo_id}"}, 409 if known else 200)

    def _write_access(self, body: bytes, repo_id: str) -> None:
        if repo_id not in self.hub.private:
            return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return self._answer({})

    def _branch(self, body: bytes, repo_id: str, name: str) -> None:
        if known := self.hub.branch(repo_id, name).is_dir():
            return self._answer({"error": "exists"}, 409)
        for file, content in self.hub.files(repo_id).items():
            self.hub.write(repo_id, name, file, content)
        return self._answer({"known": known})

    def _validate(self, body: bytes) -> None:
        self._answer({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", ".png")) else "regular"

        paths = [file["path"] for file in json.loads(body)["files"]]
        self._answer({"files": [{"path": p, "uploadMode": mode(p), "shouldIgnore": False} for p in paths]})

    def _batch(self, body: bytes, repo_id: str) -> None:
        objects = json.loads(body)["objects"]
        for one in objects:
            one["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}
        self._answer({"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._answer({})

    def _commit(self, body: bytes, repo_id: str, revision: str) -> None:
        entries = [json.loads(line) for line in body.splitlines()]
        message = ""
        for key, value in ((entry["key"], entry["value"]) for entry in entries):
            if key == "header":
                message = value["summary"]
            elif key == "file":
                self.hub.write(repo_id, revision, value["path"], base64.b64decode(value["content"]))
            elif key == "lfsFile":
                self.hub.write(repo_id, revision, value["path"], self.hub.large[value["oid"]])
            else:
                assert key == "deletedFile"
                (self.hub.branch(repo_id, revision) / value["path"]).unlink()
        self.hub.commits.append((repo_id, revision, message))
        oid = self.hub.commit_of(repo_id, revision)
        self._answer({"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid})

    # --- reading ---------------------------------------------------------------------------------------------------

    def _info(self, body: bytes, repo_id: str, revision: str | None) -> None:
        sha = self.hub.commit_of(repo_id, revision or "main")
        if repo_id not in self.hub.private or sha is None:
            code = "RevisionNotFound" if repo_id in self.hub.private else "RepoNotFound"
            return self._answer({"error": code}, 404, {"X-Error-Code": code})
        names = self.hub.files(repo_id, self.hub.branch_of(repo_id, revision or "main"))
        siblings = [{"rfilename": name} for name in names]
        return self._answer({"id": repo_id, "sha": sha, "private": self.hub.private[repo_id], "siblings": siblings})

    def _tree(self, body: bytes, repo_id: str, revision: str) -> None:
        if self.hub.commit_of(repo_id, revision) is None:
            return self._answer({"error": "RevisionNotFound"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.files(repo_id, self.hub.branch_of(repo_id, revision))
        return self._answer([_entry(name, content) for name, content in files.items()])

    def _resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        branch = self.hub.branch_of(repo_id, revision)
        commit = self.hub.commit_of(repo_id, branch) or ""
        content = self.hub.files(repo_id, branch).get(name)
        if content is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self._answer({"error": "Entry not found"}, 404, headers)
        return self._answer(content, 200, {"ETag": f'"{_entry(name, content)["oid"]}"', "X-Repo-Commit": commit})


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


_ID = "([^/]+/[^/]+)"
_ROUTES = (
    ("GET /api/whoami-v2", _Handler._whoami),
    ("POST /api/repos/create", _Handler._create),
    (f"GET /api/models/{_ID}/auth-check/write", _Handler._write_access),
    (f"POST /api/models/{_ID}/branch/(.+)", _Handler._branch),
    ("POST /api/validate-yaml", _Handler._validate),
    (f"POST /api/models/{_ID}/preupload/(.+)", _Handler._preupload),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT /lfs/(.+)", _Handler._store),
    (f"POST /api/models/{_ID}/commit/(.+)", _Handler._commit),
    (f"GET /api/models/{_ID}/tree/([^/]+)", _Handler._tree),
    (f"GET /api/models/{_ID}(?:/revision/([^/]+))?", _Handler._info),
    (f"(?:GET|HEAD) /{_ID}/resolve/([^/]+)/(.+)", _Handler._resolve),
)


@contextmanager
def serve_uploads(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """Run the server, as the Hub of this process; what is pushed lands below `folder`."""
    hub = UploadHub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    reach(hub, patch)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reach(hub: UploadHub, patch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
    """Let this process reach the server as the Hub, logged in, with a cache of its own."""
    from huggingface_hub import constants, hf_api

    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(hf_api.api, "endpoint", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(hub.folder.with_name("hub cache")))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_TOKEN_PATH", str(hub.folder / "no token"))
    patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    patch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
