"""A hub of models on this machine: the four calls of HTTP by which ``huggingface_hub`` downloads a snapshot.

The client is the real one. What is left out of the hub: files in LFS or Xet, redirects, tokens, pages.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class LocalHub(ThreadingHTTPServer):
    """Serves the folders ``root/OWNER/NAME`` as models of one commit each.

    Attributes:
        commit: of every model. endpoint: its address, for ``HF_ENDPOINT``. sent: names of the files whose
        contents were asked for, in order. calls: paths of all requests, in order.
    """

    def __init__(self, root: Path, commit: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.commit, self.sent, self.calls = root, commit, list[str](), list[str]()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args) -> None:
        """Nothing is printed."""

    def _answer(self, *, with_body: bool) -> None:
        self.server.calls.append(self.path)
        status, body, headers = self._found(unquote(urlsplit(self.path).path).strip("/").split("/"))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.server.sent += [headers["File"]] if "File" in headers else []
            self.wfile.write(body)

    def _found(self, parts: list[str]) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of a path such as ``OWNER/NAME/resolve/COMMIT/FILE``."""
        parts = parts[2:] if parts[:2] == ["api", "models"] else parts
        folder, commit = self.server.root.joinpath(*parts[:2]), self.server.commit
        if not folder.is_dir():
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        match parts[2:]:
            case ["revision", name] if name in ("main", commit):
                return _json({"id": "/".join(parts[:2]), "sha": commit, "siblings": []})
            case ["tree", name] if name == commit:
                return _json([_entry(path) for path in sorted(folder.iterdir())])
            case ["resolve", name, file] if name == commit and (folder / file).is_file():
                body = (folder / file).read_bytes()
                return 200, body, {"ETag": f'"{_identity(body)}"', "X-Repo-Commit": commit, "File": file}
        return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}


def _json(value: object) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _entry(path: Path) -> dict[str, object]:
    body = path.read_bytes()
    return {"type": "file", "path": path.name, "size": len(body), "oid": _identity(body)}


def _identity(body: bytes) -> str:
    """Git's name of a file with these bytes, which is the hub's ETag of a small file."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@contextmanager
def local_hub(root: Path, commit: str) -> Iterator[LocalHub]:
    """A hub that answers inside the ``with``."""
    with LocalHub(root, commit) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
