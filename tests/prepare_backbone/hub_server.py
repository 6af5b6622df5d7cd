"""A model hub on loopback, small enough for tests: listing, files, the redirect of large ones, and faults."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

from huggingface_hub import constants
from huggingface_hub.utils import close_session

LARGE = (".safetensors", ".bin", ".model", ".parquet")
COMMIT = "c" * 40


class HubServer:
    """Serves `root`/<organisation>/<model> and `root`/datasets/<organisation>/<name>; `faults` says what goes wrong,
    and `sent` what went out.

    faults: "gated" (401 or 403), "private" (True), "status" (an HTTP status, for files), "corrupt", "drop", "stall"
    (the name of a file: a flipped bit, a connection closed once in mid-file, one that stops sending in mid-file).
    """

    def __init__(self, root: Path) -> None:
        self.root, self.faults, self.sent = root, {}, []
        self.stop = threading.Event()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn = (
            f"http://localhost:{self._server.server_port}"  # another host: the client does not follow a HEAD there
        )
        threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        ).start()  # asks every 50 ms whether to stop

    def close(self) -> None:
        self.stop.set()
        self._server.shutdown()
        self._server.server_close()

    def weights(self) -> list[str]:
        """The files of weights that were sent, in order."""
        return [name for name, _ in self.sent if name.endswith((".safetensors", ".bin"))]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server_hub
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        is_api = parts[0] == "api"
        parts = parts[1:] if parts[:2] in (["api", "models"], ["api", "datasets"]) else parts
        kind = ["datasets"] if parts[0] == "datasets" else []
        parts = parts[1:] if parts[0] in ("models", "datasets") else parts
        repository, rest = parts[:2], parts[2:]
        folder = hub.root.joinpath(*kind, *repository)
        if not folder.is_dir() or hub.faults.get("private"):
            return self.refuse(401, "RepoNotFound")
        if len(rest) > 1 and rest[1] not in (COMMIT, "main"):
            return self.refuse(404, "RevisionNotFound")
        if is_api:
            return self.describe(folder, "/".join(repository), listing=rest[:1] == ["tree"])
        if status := hub.faults.get("gated"):
            return self.refuse(status, "GatedRepo")
        if status := hub.faults.get("status"):
            return self.refuse(status, "")
        return self.send_file(folder / "/".join(rest[2:]), "/".join(rest[2:]), rest[0] == "cdn")

    def describe(self, folder, repository, listing):
        if not listing:
            return self.reply(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": []}).encode())
        entries = []
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            sha256, sha1 = digests(file)
            size = file.stat().st_size
            entry = {"type": "file", "path": file.relative_to(folder).as_posix(), "size": size, "oid": sha1}
            if file.suffix in LARGE:
                entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 1}
            entries.append(entry)
        self.reply(200, json.dumps(entries).encode())

    def send_file(self, file, name, on_cdn):
        hub = self.server_hub
        if not file.is_file():
            return self.refuse(404, "EntryNotFound")
        sha256, sha1 = digests(file)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha1}"'}
        content = file.read_bytes()
        if file.suffix in LARGE and not on_cdn:
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            return self.reply(302, b"", headers | {"Location": hub.cdn + self.path.replace("/resolve/", "/cdn/")})
        if hub.faults.get("corrupt") == name:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        half = len(content) // 2
        body = content[start:]
        if self.command == "GET":  # noted first, for the client may go on before this thread does
            hub.sent.append((name, len(body)))
        if hub.faults.get("drop") == name and self.command == "GET":
            del hub.faults["drop"]
            self.reply(200, content, headers, cut=half)
            self.close_connection = True
        elif hub.faults.get("stall") == name and self.command == "GET":
            self.reply(200, content, headers, cut=half)
            hub.stop.wait(20)
        else:
            self.reply(206 if start else 200, body, headers)

    def refuse(self, status, code):
        self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"})

    def reply(self, status, body, headers=None, cut=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
            self.wfile.flush()


def digests(file: Path) -> tuple[str, str]:
    """SHA-256 and git's SHA-1 of a file."""
    content = file.read_bytes()
    return hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serving(root: Path, cache: Path, monkeypatch) -> Iterator[HubServer]:
    """Serve the repositories in `root` as the hub of this process's client, whose cache is `cache`."""
    server = HubServer(root)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    close_session()
    server.close()
