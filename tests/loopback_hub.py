"""A Hugging Face Hub on the loopback interface, so that tests run the real download and upload code.

Repositories are folders `root/<namespace>/<name>` with the content of `main`; tags are copies. A fresh process uses it
by `environment`, this process by `HfApi(endpoint=hub.url, token=WRITER)`.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

Answer = tuple[int, bytes | dict[str, Any] | list[Any], dict[str, str]]
WRITER, READER = "hf_loopback", "hf_reader"  # tokens: the second may not write, others are unknown
# Suffixes in the `.gitattributes` of a new model repository, to which large binary files are added.
LARGE_FILES = {".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors"}


@dataclasses.dataclass
class LoopbackHub:
    """The running server.

    Attributes:
        root: The folder of repositories.
        cache: The download cache of processes of `environment`.
        url: Its address.
        requests: The methods and paths of all requests.
        private: The private repositories.
        largest_binary: The bytes above which binary files are stored as large files: https://git-lfs.com.
    """

    root: Path
    cache: Path
    url: str = ""
    requests: list[str] = dataclasses.field(default_factory=list)
    private: set[str] = dataclasses.field(default_factory=set)
    largest_binary: int = 1_000_000

    def begin(self, root: Path) -> None:
        """Serve the repositories of another folder, with an empty download cache."""
        shutil.rmtree(self.cache, ignore_errors=True)
        vars(self).update(vars(LoopbackHub(root, self.cache, self.url)))

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process that sees this Hub only; to be set before its first import."""
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.cache)}
        ours |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return inherited | ours | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}

    @property
    def large_files(self) -> Path:
        """The folder of large files that are not committed yet."""
        return self.root.with_name(f"{self.root.name}.large")

    def tags(self, name: str) -> Path:
        """Return the folder with a copy of a repository per tag."""
        return self.root.with_name(f"{self.root.name}.tags") / name

    def repository(self, name: str, revision: str = "main") -> "Repository | None":
        """Return a repository at a branch, tag or commit, or `None`."""
        main = self.root / name
        if revision in ("main", "refs/heads/main"):
            return Repository(main, name) if main.is_dir() else None
        tagged = sorted(self.tags(name).glob("*"))
        known = [Repository(folder, name) for folder in (main, *tagged) if folder.is_dir()]
        return next((each for each in known if revision in (each.sha, each.folder.name)), None)

    def is_large(self, path: str, sample: bytes, size: int) -> bool:
        """Return whether a file is stored as a large one: by its name, or as a large binary."""
        return Path(path).suffix in LARGE_FILES or (b"\0" in sample and size > self.largest_binary)


@contextlib.contextmanager
def running_hub(folder: Path) -> Iterator[LoopbackHub]:
    """Run an empty Hub until the block ends; its downloads are cached in `folder`."""
    hub = LoopbackHub(folder / "hub", folder / "cache")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """The endpoints that `from_pretrained`, `snapshot_download`, `create_commit` and `create_tag` use."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: LoopbackHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def do_GET(self) -> None:
        path = self.asked()
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.reply(*self.file(self.hub.repository(match[1], match[2]), match[3]))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self.reply(*self.tree(self.hub.repository(match[1], match[2])))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self.reply(*self.information(self.hub.repository(match[1], match[2] or "main")))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
            self.reply(*self.references(match[1]))
        else:
            self.reply(404, {}, {})

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        """Store a large file, at an address that was handed out to a writer."""
        path, data = self.asked(), self.body()
        oid = path.removeprefix("/large/")
        if hashlib.sha256(data).hexdigest() != oid:
            self.reply(400, {"error": "The content is not that of its name."}, {})
        else:
            self.hub.large_files.mkdir(exist_ok=True)
            (self.hub.large_files / oid).write_bytes(data)
            self.reply(200, {}, {})

    def do_POST(self) -> None:
        path, body = self.asked(), self.body()
        if refusal := self.refusal():
            self.reply(*refusal)
        elif path == "/api/repos/create":
            self.reply(*self.create(json.loads(body)))
        elif path == "/api/validate-yaml":
            self.reply(*self.validate(json.loads(body)["content"]))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            self.reply(*self.preupload(match[1], json.loads(body)["files"]))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.reply(*self.batch(json.loads(body)["objects"]))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.reply(*self.commit(match[1], body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tag/([^/]+)", path):
            self.reply(*self.tag(match[1], match[2], json.loads(body)["tag"]))
        else:
            self.reply(404, {}, {})

    def asked(self) -> str:
        """Return the path of the request, and record it."""
        path = self.path.split("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def refusal(self) -> Answer | None:
        """Return the answer to an unknown token or one that may not write, else `None`."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            return 401, {"error": "Invalid username or password."}, {}
        return None if token == WRITER else (403, {"error": "You don't have the rights to write here."}, {})

    def file(self, repository: "Repository | None", name: str) -> Answer:
        """Return the bytes of a file, with the two headers that clients require."""
        if repository is None:
            return 404, {}, {"X-Error-Code": "RepoNotFound"}
        if name not in repository.files:
            return 404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.sha}
        data = repository.files[name]
        return 200, data, {"ETag": f'"{self.oid(name, data)}"', "X-Repo-Commit": repository.sha}

    def oid(self, name: str, data: bytes) -> str:
        """Return the id of a content: SHA-256 of large files, else the id of git."""
        if self.hub.is_large(name, data[:512], len(data)):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def tree(self, repository: "Repository | None") -> Answer:
        """List the files, for snapshots."""
        if repository is None:
            return 404, {}, {"X-Error-Code": "RevisionNotFound"}
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": self.oid(name, data)}
            for name, data in repository.files.items()
        ]
        return 200, entries, {}

    def information(self, repository: "Repository | None") -> Answer:
        if repository is None:
            return 404, {}, {"X-Error-Code": "RepoNotFound"}
        siblings = [{"rfilename": name} for name in repository.files]
        information = {"id": repository.name, "sha": repository.sha, "siblings": siblings}
        information["private"] = repository.name in self.hub.private
        return 200, information, {"X-Repo-Commit": repository.sha}

    def references(self, name: str) -> Answer:
        """List the tags of a repository."""
        tags = [
            {"name": folder.name, "ref": f"refs/tags/{folder.name}", "targetCommit": Repository(folder, name).sha}
            for folder in sorted(self.hub.tags(name).glob("*"))
        ]
        return 200, {"branches": [], "converts": [], "tags": tags}, {}

    def create(self, request: dict[str, Any]) -> Answer:
        """Create an empty repository; answer 409 if it exists, as the Hub does."""
        name = f"{request['organization']}/{request['name']}"
        folder = self.hub.root / name
        status = 409 if folder.exists() else 200
        folder.mkdir(parents=True, exist_ok=True)
        if status == 200 and request.get("visibility") == "private":
            self.hub.private.add(name)
        return status, {"url": f"{self.hub.url}/{name}", "name": name}, {}

    def validate(self, text: str) -> Answer:
        """Check that the front matter of a README.md is a YAML mapping."""
        match = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
        try:
            valid = isinstance(yaml.safe_load(match[1]) if match else None, dict)
        except yaml.YAMLError:
            valid = False
        errors = [] if valid else [{"message": "The front matter is no mapping."}]
        return 200 if valid else 400, {"warnings": [], "errors": errors}, {}

    def preupload(self, name: str, files: list[dict[str, Any]]) -> Answer:
        """Return the upload mode of each file, and the id of an existing file of that name."""
        repository = self.hub.repository(name)
        answers = []
        for file in files:
            large = self.hub.is_large(file["path"], base64.b64decode(file["sample"]), file["size"])
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if repository is not None and file["path"] in repository.files:
                answer["oid"] = self.oid(file["path"], repository.files[file["path"]])
            answers.append(answer)
        return 200, {"files": answers}, {}

    def batch(self, objects: list[dict[str, Any]]) -> Answer:
        """Return the upload addresses of large files that are missing."""
        answers = []
        for entry in objects:
            answer: dict[str, Any] = {"oid": entry["oid"], "size": entry["size"]}
            if not (self.hub.large_files / entry["oid"]).exists():
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/large/{entry['oid']}"}}
            answers.append(answer)
        return 200, {"transfer": "basic", "objects": answers}, {}

    def commit(self, name: str, body: bytes) -> Answer:
        """Write the added files of a commit."""
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] in ("file", "lfsFile"):
                value = operation["value"]
                path = self.hub.root / name / value["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                large = operation["key"] == "lfsFile"
                stored = self.hub.large_files / value["oid"] if large else None
                path.write_bytes(stored.read_bytes() if stored else base64.b64decode(value["content"]))
        sha = Repository(self.hub.root / name, name).sha
        return 200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha}, {}

    def tag(self, name: str, revision: str, tag: str) -> Answer:
        """Copy a revision under a name; answer 409 if the name is taken."""
        repository, folder = self.hub.repository(name, revision), self.hub.tags(name) / tag
        if repository is None:
            return 404, {}, {"X-Error-Code": "RevisionNotFound"}
        if folder.exists():
            return 409, {"error": "Tag reference exists already."}, {}
        shutil.copytree(repository.folder, folder)
        return 200, {}, {}

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
    """A snapshot of a repository's folder: names, contents, and a hash of both as its commit."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        digest = hashlib.sha1()
        for path, data in self.files.items():
            digest.update(path.encode() + b"\0" + data)
        self.sha = digest.hexdigest()
