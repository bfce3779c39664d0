"""A Hub on this machine: enough of its API that the real `huggingface_hub` works with it, unmodified, over HTTP.

Repositories of models with commits and branches, small files and large ones (LFS), tokens with rights, ranges, and
requests that fail on demand. Kept in memory, but for the contents, which are files named by their SHA-256.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_SUFFIXES = (".bin", ".safetensors", ".pt")
LARGE_BYTES = 10_000_000
ATTRIBUTES = b"".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n".encode() for suffix in LARGE_SUFFIXES)
NAME = r"[\w.-]+/[\w.-]+"


@dataclass(frozen=True)
class Blob:
    """Contents of a file: where they lie, and how git and the large file storage name them."""

    path: Path
    sha256: str
    size: int
    large: bool

    @property
    def pointer(self) -> bytes:
        """What git keeps of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        data = self.pointer if self.large else self.path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def lfs(self, key: str) -> dict:
        return {key: self.sha256, "size": self.size, "pointerSize": len(self.pointer)}


@dataclass
class Repository:
    """A repository: what each commit holds, and to which commit each branch points."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        listing = "".join(f"{name} {blob.sha256}\n" for name, blob in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)} {listing}".encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class HubServer:
    """The server; `with HubServer(folder) as hub` runs it in a thread, at `hub.url`.

    Args:
        root: empty folder for contents.
        tokens: token to the organisations that it may write to.
    """

    def __init__(self, root: Path, tokens: dict[str, set[str]]) -> None:
        self.root, self.tokens = root, tokens
        self.repositories: dict[str, Repository] = {}
        # Every request: method, path, status, and the `Range` that was asked for.
        self.requests: list[tuple[str, str, int, str | None]] = []
        self._faults: list[list] = []
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        # Large files lie on another host, as the Hub's do: the client follows redirects within one host by itself.
        self.storage_url = f"http://localhost:{self.http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fail(self, method: str, path: str, status: int, times: int = 1) -> None:
        """Answer the next requests of a method, whose path a pattern finds, with a status; 0 hangs up half-way."""
        self._faults.append([method, re.compile(path), status, times])

    def fault(self, method: str, path: str) -> int | None:
        with self.lock:
            for one in self._faults:
                if one[0] == method and one[1].search(path) and one[3] > 0:
                    one[3] -= 1
                    return one[2]
        return None

    def store(self, data: bytes, large: bool) -> Blob:
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.root / sha256
        if not path.exists():
            path.write_bytes(data)
        return Blob(path, sha256, len(data), large)

    def create(self, name: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repository:
        repository = self.repositories[name] = Repository(private)
        contents = {".gitattributes": ATTRIBUTES, **(files or {})}
        repository.commit("main", {key: self.store(data, is_large(key, len(data))) for key, data in contents.items()})
        return repository

    def files(self, name: str, revision: str = "main") -> dict[str, Blob]:
        """What a repository holds, the attributes that it was born with left out."""
        repository = self.repositories[name]
        found = repository.commits[repository.find(revision)]
        return {key: blob for key, blob in found.items() if key != ".gitattributes"}

    def count(self, method: str, path: str) -> int:
        """How many requests of a method, whose path a pattern finds, were answered with success."""
        return sum(one[0] == method and one[2] < 300 and bool(re.search(path, one[1])) for one in self.requests)


def is_large(name: str, size: int) -> bool:
    """Whether the Hub keeps a file in its large file storage."""
    return name.endswith(LARGE_SUFFIXES) or size > LARGE_BYTES


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    # The routes: method, pattern, and the method `on_…` that answers.
    ROUTES = [
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", rf"/api/models/(?P<name>{NAME})(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", rf"/api/models/(?P<name>{NAME})/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("POST", rf"/api/models/(?P<name>{NAME})/paths-info/(?P<revision>[^/]+)", "paths"),
        ("POST", rf"/api/models/(?P<name>{NAME})/branch/(?P<branch>[^/]+)", "branch"),
        ("POST", rf"/api/models/(?P<name>{NAME})/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/models/(?P<name>{NAME})/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"/(?P<name>{NAME})\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/storage/(?P<sha256>[0-9a-f]{64})", "upload"),
        ("POST", r"/storage/verify", "verify"),
        ("GET", r"/storage/(?P<sha256>[0-9a-f]{64})", "download"),
        ("GET", rf"/(?P<name>{NAME})/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def log_message(self, *_) -> None:
        """Nothing: tests look at `requests`."""

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self) -> None:
        hub, path = self.server_hub, urlsplit(self.path).path
        fault = hub.fault(self.command, path)
        if fault == 0:
            # Half of what was announced, and then nothing: a connection that breaks.
            self.record(0)
            with suppress(OSError):
                length = int(self.headers.get("Content-Length") or 0)
                self.rfile.read(length // 2)
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(2)
            return
        body = self.read_body()
        try:
            if fault:
                raise _RefusedError(fault, "told to fail")
            self.answer_route(path, body)
        except _RefusedError as error:
            headers = {"X-Error-Message": error.message, **error.headers}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.reply(error.status, {"error": error.message}, headers)

    def answer_route(self, path: str, body: bytes) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, route in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if wanted == method and match:
                arguments = {key: unquote(value) for key, value in match.groupdict().items() if value}
                with self.server_hub.lock:
                    getattr(self, f"on_{route}")(body, **arguments)
                return
        raise _RefusedError(404, f"no such address: {method} {path}")

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def record(self, status: int) -> None:
        with self.server_hub.lock:
            self.server_hub.requests.append((self.command, self.path, status, self.headers.get("Range")))

    def reply(
        self, status: int, value: object = None, headers: dict[str, str] | None = None, data: bytes = b""
    ) -> None:
        if value is not None:
            data, headers = json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}
        self.record(status)
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Rights: an unknown token is refused everywhere, and a private repository is not shown to who may not read it.

    def organisations(self) -> set[str] | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.server_hub.tokens:
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return self.server_hub.tokens[token]

    def repository(self, name: str) -> Repository:
        rights = self.organisations()
        found = self.server_hub.repositories.get(name)
        if found is None or (found.private and name.split("/")[0] not in (rights or ())):
            # As the Hub does: who is unknown is not told what exists.
            raise _RefusedError(401 if rights is None else 404, "Repository not found", "RepoNotFound")
        return found

    def writable(self, name: str) -> None:
        rights = self.organisations()
        if rights is None:
            raise _RefusedError(401, "Log in first")
        if name.split("/")[0] not in rights:
            raise _RefusedError(403, "You don't have the rights to write there")

    def revision(self, name: str, revision: str) -> tuple[Repository, str]:
        repository = self.repository(name)
        oid = repository.find(revision)
        if oid is None:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, oid

    # Reading.

    def on_info(self, body: bytes, name: str, revision: str = "main") -> None:
        repository, oid = self.revision(name, revision)
        with_blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = []
        for path, blob in sorted(repository.commits[oid].items()):
            one: dict = {"rfilename": path}
            if with_blobs:
                one |= {"size": blob.size, "blobId": blob.oid}
                if blob.large:
                    one["lfs"] = blob.lfs("sha256")
            siblings.append(one)
        self.reply(
            200,
            {
                "_id": "0" * 24, "id": name, "modelId": name, "author": name.split("/")[0], "sha": oid,
                "private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0,
                "tags": ["transformers"], "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z", "siblings": siblings,
            },
        )  # fmt: skip

    def on_tree(self, body: bytes, name: str, revision: str, path: str = "") -> None:
        repository, oid = self.revision(name, revision)
        prefix = f"{path.rstrip('/')}/" if path else ""
        found = {key: blob for key, blob in repository.commits[oid].items() if key.startswith(prefix)}
        if prefix and not found:
            raise _RefusedError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = sorted({f"{prefix}{key[len(prefix) :].split('/')[0]}" for key in found if "/" in key[len(prefix) :]})
        entries: list[dict] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders]
        entries += [entry(key, blob) for key, blob in found.items() if recursive or "/" not in key[len(prefix) :]]
        self.reply(200, entries)

    def on_paths(self, body: bytes, name: str, revision: str) -> None:
        repository, oid = self.revision(name, revision)
        asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
        self.reply(200, [entry(key, blob) for key, blob in repository.commits[oid].items() if key in asked])

    def on_resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        repository, oid = self.revision(name, revision)
        blob = repository.commits[oid].get(path)
        if blob is None:
            raise _RefusedError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
        if blob.large:
            headers = {
                "X-Repo-Commit": oid,
                "X-Linked-Etag": f'"{blob.sha256}"',
                "X-Linked-Size": str(blob.size),
                "Location": f"{self.server_hub.storage_url}/storage/{blob.sha256}",
            }
            self.reply(302, None, headers)
        else:
            self.send_contents(blob, {"X-Repo-Commit": oid, "ETag": f'"{blob.oid}"'})

    def on_download(self, body: bytes, sha256: str) -> None:
        path = self.server_hub.root / sha256
        if not path.exists():
            raise _RefusedError(404, "no such object")
        self.send_contents(Blob(path, sha256, path.stat().st_size, True), {"ETag": f'"{sha256}"'})

    def send_contents(self, blob: Blob, headers: dict[str, str]) -> None:
        data, status = blob.path.read_bytes(), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            first = int(asked[1])
            last = min(int(asked[2] or blob.size), blob.size - 1)
            if first >= blob.size:
                raise _RefusedError(416, "no such range", **{"Content-Range": f"bytes */{blob.size}"})
            data, status = data[first : last + 1], 206
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{blob.size}"}
        if self.command == "GET" and self.server_hub.fault("BREAK", self.path) is not None:
            # All of it is announced, and half of it comes.
            self.record(status)
            self.send_response(status)
            for key, text in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, text)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.reply(status, None, {**headers, "Accept-Ranges": "bytes"}, data)

    # Writing.

    def on_create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        self.writable(name)
        if name in self.server_hub.repositories:
            raise _RefusedError(409, "You already created this model repo")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server_hub.create(name, private=bool(private))
        self.reply(200, {"url": f"{self.server_hub.url}/{name}", "name": name, "id": "0" * 24})

    def on_validate(self, body: bytes) -> None:
        self.reply(200, {"errors": [], "warnings": []})

    def on_branch(self, body: bytes, name: str, branch: str) -> None:
        self.writable(name)
        repository, oid = self.revision(name, json.loads(body or b"{}").get("startingPoint") or "main")
        repository.branches[branch] = oid
        self.reply(200, {})

    def on_preupload(self, body: bytes, name: str, revision: str) -> None:
        self.writable(name)
        repository, oid = self.revision(name, revision)
        held = repository.commits[oid]
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            one = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in held:
                blob = held[file["path"]]
                one["oid"] = blob.sha256 if blob.large else blob.oid
            files.append(one)
        self.reply(200, {"files": files})

    def on_batch(self, body: bytes, name: str) -> None:
        self.writable(name)
        self.repository(name)
        objects = []
        for one in json.loads(body)["objects"]:
            answer = {"oid": one["oid"], "size": one["size"], "authenticated": True}
            if not (self.server_hub.root / one["oid"]).exists():
                url = self.server_hub.storage_url
                answer["actions"] = {
                    "upload": {"href": f"{url}/storage/{one['oid']}"},
                    "verify": {"href": f"{url}/storage/verify"},
                }
            objects.append(answer)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def on_upload(self, body: bytes, sha256: str) -> None:
        if hashlib.sha256(body).hexdigest() != sha256:
            raise _RefusedError(400, "the contents have another hash")
        self.server_hub.store(body, True)
        self.reply(200, {}, {"ETag": f'"{sha256}"'})

    def on_verify(self, body: bytes) -> None:
        asked = json.loads(body)
        path = self.server_hub.root / asked["oid"]
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise _RefusedError(404, "not there")
        self.reply(200, {})

    def on_commit(self, body: bytes, name: str, revision: str) -> None:
        self.writable(name)
        repository, oid = self.revision(name, revision)
        if revision not in repository.branches:
            raise _RefusedError(400, "one commits to a branch")
        files = dict(repository.commits[oid])
        for line in body.splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "header":
                if value.get("parentCommit") not in (None, oid):
                    raise _RefusedError(412, "the branch has moved on")
            elif key == "file":
                files[value["path"]] = self.server_hub.store(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                path = self.server_hub.root / value["oid"]
                if not path.exists():
                    raise _RefusedError(400, f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(path, value["oid"], path.stat().st_size, True)
            elif key == "deletedFile":
                files.pop(value["path"])
            else:
                raise _RefusedError(400, f"unknown operation {key}")
        new = repository.commit(revision, files)
        url = f"{self.server_hub.url}/{name}/commit/{new}"
        self.reply(200, {"success": True, "commitOid": new, "commitUrl": url})


def entry(path: str, blob: Blob) -> dict:
    """A file as the Hub lists it in a tree."""
    found: dict = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.large:
        found["lfs"] = blob.lfs("oid")
    return found
