"""A Hugging Face Hub on the loopback interface, so that tests go through the real download and upload code.

Repositories are folders `root/<namespace>/<name>`; every revision is the present content. Point a fresh process at it
with `environment()`, or `HfApi(endpoint=hub.url, token="any")` in this one.
"""

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answer = tuple[int, bytes | dict[str, Any] | list[Any], dict[str, str]]


class LoopbackHub:
    """The running server: its address, its folder of repositories and the paths that were asked for."""

    def __init__(self, url: str, root: Path, requests: list[str]) -> None:
        self.url = url
        self.root = root
        self.requests = requests

    def environment(self, cache: Path) -> dict[str, str]:
        """Environment variables for a process that is to see this Hub and nothing else; set before its first import."""
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return inherited | ours | {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def running_hub(root: Path) -> Iterator[LoopbackHub]:
    """Serve the repositories under `root` until the block ends."""
    requests: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, root, requests))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield LoopbackHub(f"http://127.0.0.1:{server.server_port}", root, requests)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """The few endpoints that `from_pretrained`, `snapshot_download` and `create_commit` use."""

    protocol_version = "HTTP/1.1"

    def __init__(self, root: Path, requests: list[str], *args: Any) -> None:
        self.root = root
        self.requests = requests
        super().__init__(*args)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.reply(*self.file(Repository(self.root / match[1]), match[2]))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/tree/[^/]+|/revision/[^/]+)?", path):
            self.reply(*self.listing(Repository(self.root / match[1]), (match[2] or "").startswith("/tree/")))
        else:
            self.reply(404, {}, {})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = self.path.split("?")[0]
        self.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/repos/create":
            self.reply(*self.create(json.loads(body)))
        elif path == "/api/validate-yaml":
            self.reply(200, {"warnings": [], "errors": []}, {})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.reply(200, {"files": modes}, {})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            self.reply(*self.commit(match[1], body))
        else:
            self.reply(404, {}, {})

    def file(self, repository: "Repository", name: str) -> Answer:
        """The bytes of a file. Clients insist on the two headers."""
        if name not in repository.files:
            return 404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.sha}
        data = repository.files[name]
        return 200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": repository.sha}

    def listing(self, repository: "Repository", tree: bool) -> Answer:
        """What a repository holds: as a tree for snapshots, else as model information."""
        if not repository.files:
            return 404, {}, {"X-Error-Code": "RepoNotFound"}
        if tree:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in repository.files.items()
            ]
            return 200, entries, {}
        siblings = [{"rfilename": name} for name in repository.files]
        information = {"id": repository.name, "sha": repository.sha, "siblings": siblings}
        return 200, information, {"X-Repo-Commit": repository.sha}

    def create(self, request: dict[str, Any]) -> Answer:
        """A new, empty repository; 409 if it exists, as the Hub answers."""
        name = f"{request['organization']}/{request['name']}"
        status = 409 if (self.root / name).exists() else 200
        (self.root / name).mkdir(parents=True, exist_ok=True)
        return status, {"url": f"http://{self.headers['Host']}/{name}", "name": name}, {}

    def commit(self, name: str, body: bytes) -> Answer:
        """Write the files of a commit; only added regular files."""
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                path = self.root / name / operation["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(operation["value"]["content"]))
        sha = Repository(self.root / name).sha
        return 200, {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{sha}", "commitOid": sha}, {}

    def reply(self, status: int, body: bytes | dict[str, Any] | list[Any], headers: dict[str, str]) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep test output clean."""


class Repository:
    """A snapshot of a repository's folder: file names, contents and a hash of both in place of a commit."""

    def __init__(self, folder: Path) -> None:
        self.name = f"{folder.parent.name}/{folder.name}"
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        digest = hashlib.sha1()
        for name, data in self.files.items():
            digest.update(name.encode() + b"\0" + data)
        self.sha = digest.hexdigest()
