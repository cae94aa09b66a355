"""A Hub on this machine: the few endpoints that huggingface_hub needs to read one model repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_repository(repo_id: str, folder: Path) -> Iterator[str]:
    """Serve a folder as the repository `repo_id`; yield the endpoint for HF_ENDPOINT."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET(head=True)

        def do_GET(self, head: bool = False):
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/api/models/{repo_id}/tree/"):
                entries = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest(file)}
                    for name, file in files.items()
                ]
                return self.answer(json.dumps(entries).encode(), head=head)
            if path in (f"/api/models/{repo_id}", *(f"/api/models/{repo_id}/revision/{r}" for r in ("main", COMMIT))):
                info = {"id": repo_id, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                return self.answer(json.dumps(info).encode(), head=head)
            for revision in ("main", COMMIT):
                prefix = f"/{repo_id}/resolve/{revision}/"
                if path.startswith(prefix) and path.removeprefix(prefix) in files:
                    file = files[path.removeprefix(prefix)]
                    return self.answer(file.read_bytes(), head=head, headers={"ETag": f'"{digest(file)}"'})
            code = "EntryNotFound" if path.startswith(f"/{repo_id}/resolve/") else "RepoNotFound"
            return self.answer(b"", status=404, head=head, headers={"X-Error-Code": code})

        def answer(self, body: bytes, *, head: bool, status: int = 200, headers: dict[str, str] | None = None):
            self.send_response(status)
            for key, value in {"X-Repo-Commit": COMMIT, **(headers or {})}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not head:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
