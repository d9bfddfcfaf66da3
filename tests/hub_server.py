"""A small Hugging Face Hub on the loopback interface, for tests: standard library only.

It serves the routes that reading a model or a data set takes (repository info, refs, tree listings and files, each at a
branch, a tag or a commit) and those that writing a model takes (create, upload, commit, branch, tag). A repository is
a set of commits; a commit is a mapping from path to bytes:

    with HubServer() as hub:
        first = hub.commit("user/base", folder)                      # -> commit sha, also the branch "main"
        hub.tag("user/base", "v1", first)
        hub.commit("user/base", {"config.json": b"{}"}, parent=first)  # the files of `parent`, then these
        run_client(env=hub.client_env(tmp_path / "hf_home"))
        assert not hub.unknown, hub.unknown

The client reads HF_ENDPOINT when it is imported, so clients run in subprocesses. A route that is not here is
recorded in `unknown` and answered with status 500, so that a test notices it. A new route is one method with
a `@route` line.

Who may do what: `hub.token("user")` is a token of that user. It writes to the user's own repositories and reads their
private ones; nobody else does. What a test puts in with `hub.commit` asks for no token.

Things that go wrong are ordered beforehand, and each order counts in `seen` how often it was served:

    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "7"}, times=2)  # answered so, twice
    hub.drop("PUT", "/lfs/", after_bytes=1000)  # reads (or, of a GET, sends) so much, then hangs up
    hub.corrupt("PUT", "/lfs/")                 # one byte of the file arrives changed
    hub.lose("POST", "/commit/")                # it is done, and nobody is told
    hub.meanwhile("POST", "/commit/", action)   # something happens before this request is served
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".png", ".pt")
API = r"/api/(models|datasets)"
REPO = r"(?P<repo>[^/]+/[^/]+)"


class Request(NamedTuple):
    """One request as the server saw it."""

    method: str
    path: str


@dataclass
class Fault:
    """What was ordered to go wrong with the next `times` requests of a method whose path holds a match of `pattern`."""

    method: str
    pattern: str
    times: int
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after_bytes: int | None = None
    corrupt: bool = False
    lost: bool = False
    action: Callable[[], object] | None = None
    seen: int = 0


class HubError(Exception):
    """An answer in the Hub's own error form: a status and the `X-Error-Code` that the client reads."""

    def __init__(self, status: int, code: str | None, message: str, commit: str | None = None):
        super().__init__(message)
        self.status, self.code, self.commit = status, code, commit


@dataclass
class Repository:
    """Commits (sha -> path -> content) and the branches and tags that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    private: bool = False
    uploads: dict[str, bytes] = field(default_factory=dict)  # by the sha256 that the client promised, not checked yet
    lfs: dict[str, bytes] = field(default_factory=dict)  # by their sha256

    def resolve(self, revision: str) -> str:
        """The commit sha that a branch, a tag or a sha stands for."""
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def history(self, branch: str = "main") -> list[str]:
        """The commits of a branch, the newest first."""
        shas: list[str] = []
        sha: str | None = self.branches.get(branch)
        while sha:
            shas.append(sha)
            sha = self.parents[sha]
        return shas


class HubServer:
    """A running loopback Hub, as a context manager.

    Attributes:
        requests: every request, in order of arrival.
        unknown: those that no route took.
        lock: held while a repository changes.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.unknown: list[Request] = []
        self.lock = threading.RLock()
        self.faults: list[Fault] = []
        self.tokens: dict[str, tuple[str, str]] = {}  # token -> (user, role)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def commit(
        self,
        repo_id: str,
        files: Path | Mapping[str, bytes | None],
        *,
        parent: str | None = None,
        branch: str = "main",
    ) -> str:
        """Add a commit and move `branch` to it.

        Args:
            files: a folder, or a mapping from path to content (None deletes the path).
            parent: the commit whose files stay where `files` does not name them.
        Returns:
            The sha: 40 hex digits, the same for the same repository, parent and content.
        """
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        with self.lock:
            repository = self.repositories.setdefault(repo_id, Repository())
            content: dict[str, bytes] = dict(repository.commits[parent]) if parent else {}
            for path, data in files.items():
                content.pop(path, None)
                if data is not None:
                    content[path] = data
            digest = hashlib.sha1(f"{repo_id} {parent}".encode())
            for path in sorted(content):
                digest.update(f"{path} {_git_blob(content[path])}".encode())
            sha = digest.hexdigest()
            repository.commits[sha] = content
            repository.parents[sha] = parent
            repository.branches[branch] = sha
        return sha

    def tag(self, repo_id: str, name: str, sha: str) -> None:
        self.repositories[repo_id].tags[name] = sha

    def token(self, user: str, role: str = "write") -> str:
        """A token of a user, who exists from now on; role `read` may not write. All are in the organisation `club`."""
        token = f"hf_{user}_{role}"
        self.tokens[token] = (user, role)
        return token

    def fail(
        self, method: str, pattern: str, *, status: int = 500, headers: Mapping[str, str] | None = None, times: int = 1
    ) -> Fault:
        """Answer with an error instead of serving."""
        return self._order(Fault(method, pattern, times, status=status, headers=headers or {}))

    def drop(
        self, method: str, pattern: str, *, after_bytes: int, times: int = 1, action: Callable[[], object] | None = None
    ) -> Fault:
        """Read so much of what is sent (or send so much of what is read), do `action`, and hang up."""
        return self._order(Fault(method, pattern, times, after_bytes=after_bytes, action=action))

    def corrupt(self, method: str, pattern: str, *, times: int = 1) -> Fault:
        """Change the last byte of the file on its way."""
        return self._order(Fault(method, pattern, times, corrupt=True))

    def lose(self, method: str, pattern: str, *, times: int = 1) -> Fault:
        """Serve a request, and hang up instead of answering."""
        return self._order(Fault(method, pattern, times, lost=True))

    def meanwhile(self, method: str, pattern: str, action: Callable[[], object], *, times: int = 1) -> Fault:
        """Do something after a request has arrived and before it is served."""
        return self._order(Fault(method, pattern, times, action=action))

    def _order(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def due(self, request: Request) -> Fault | None:
        """The fault that a request is to suffer, which then counts as served."""
        with self.lock:
            for fault in self.faults:
                if fault.method == request.method and re.search(fault.pattern, request.path) and fault.times:
                    fault.times -= 1
                    fault.seen += 1
                    return fault
        return None

    def client_env(self, hf_home: Path, *, offline: bool = False) -> dict[str, str]:
        """The environment of a client process: this endpoint, a cache of its own, no telemetry, no token."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        env |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(hf_home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
        }
        return env


def _git_blob(data: bytes) -> str:
    """The id that git gives a file: the sha1 of its header and content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def _object_id(path: str, data: bytes) -> str:
    """What the Hub calls the `oid` of a file: its sha256 in large file storage, else the id that git gives it."""
    return hashlib.sha256(data).hexdigest() if _is_lfs(path) else _git_blob(data)


def _altered(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _tree_entry(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": _git_blob(data)}
    if _is_lfs(path):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def visit(
    hub: HubServer, tmp: Path, images: Path, loads: list[dict], *, offline: bool = False, python: str = sys.executable
) -> dict[str, Any]:
    """What one stranger's process (`hub_client.py`) saw, by name of the load. Any Python warning is an error to it."""
    job = {
        "clean_load": str(Path(__file__).parents[1] / "adaptface" / "clean_load.py"),
        "images": str(images),
        "answer": str(tmp / "answer.json"),
        "loads": loads,
    }
    env = hub.client_env(tmp / "hf_home", offline=offline)
    env.pop("PYTHONPATH", None)
    process = subprocess.run(
        [python, "-P", "-W", "error", str(Path(__file__).with_name("hub_client.py"))],
        input=json.dumps(job), cwd=tmp, env=env, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    answer = json.loads((tmp / "answer.json").read_text(encoding="utf-8"))
    imports, *sections = process.stderr.split("== ")
    assert imports == ""
    for section in sections:
        name, _, answer_text = section.partition("\n")
        answer[name]["stderr"] = answer_text
    return answer


Match = Mapping[str, str]
ROUTES: list[tuple[str, re.Pattern[str], Callable[[_Handler, Match], None]]] = []


def route(method: str, pattern: str) -> Callable[[Callable], Callable]:
    """Register a handler method for one HTTP method and a pattern over the whole, still quoted, path."""

    def register(handler: Callable[[_Handler, Match], None]) -> Callable:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; without this each answer takes 40 ms

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        """Requests go to `HubServer.requests`; stderr belongs to the test."""

    def do_GET(self) -> None:
        request = Request(self.command, self.path)
        self.hub.requests.append(request)
        self.fault = fault = self.hub.due(request)
        if fault and fault.after_bytes is not None and self.command != "GET":
            self.rfile.read(fault.after_bytes)
            return self.hang_up(fault)
        self.body = self.read_body()
        if fault and fault.action and fault.after_bytes is None:
            fault.action()
        if fault and fault.status:
            return self.answer_json({"error": f"ordered: {fault.status}"}, status=fault.status, headers=fault.headers)
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        for accepted, pattern, handler in ROUTES:
            match = pattern.fullmatch(path)
            if match and accepted == method:
                groups = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                try:
                    self.user = self.authenticate()
                    handler(self, groups)
                except HubError as error:
                    headers = {"X-Error-Message": str(error)}
                    if error.code:
                        headers["X-Error-Code"] = error.code
                    if error.commit:
                        headers["X-Repo-Commit"] = error.commit
                    self.answer_json({"error": str(error)}, status=error.status, headers=headers)
                return
        self.hub.unknown.append(request)
        self.answer_json({"error": "no such route on the loopback Hub"}, status=500)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def hang_up(self, fault: Fault) -> None:
        if fault.action:
            fault.action()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        fault = self.fault
        if fault and fault.lost:
            return self.hang_up(fault)
        if fault and fault.corrupt and self.command == "GET":
            body = _altered(body)
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault and fault.after_bytes is not None and self.command == "GET":
            self.wfile.write(body[: fault.after_bytes])
            self.hang_up(fault)
        elif self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.answer(json.dumps(body).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def authenticate(self) -> str | None:
        """The user whose token came with the request; None without one."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        user, self.role = self.hub.tokens.get(token, (None, "none"))
        return user

    def repository(self, repo_id: str, *, write: bool = False) -> Repository:
        """A repository that the user may read, or write; strangers are told that a private one is not there."""
        repository = self.hub.repositories.get(repo_id)
        owns = self.user == repo_id.split("/")[0]
        if repository is None or (repository.private and not owns):
            if self.user is None:
                raise HubError(401, "RepoNotFound", "Invalid username or password.")
            raise HubError(404, "RepoNotFound", "Repository not found")
        if write:
            self.require_write(repo_id.split("/")[0])
        return repository

    def require_write(self, owner: str) -> None:
        if self.user is None:
            raise HubError(401, None, "Invalid username or password.")
        if owner not in (self.user, "club") or self.role not in ("write", "fineGrained"):
            raise HubError(403, None, f"You don't have the rights to write under the namespace {owner}")

    def find(self, match: Match) -> tuple[str, dict[str, bytes]]:
        """(commit sha, files) of the request's repository at its revision."""
        repository = self.repository(match["repo"])
        sha = repository.resolve(match.get("revision", "main"))
        return sha, repository.commits[sha]

    @route("GET", rf"{API}/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
    def tree(self, match: Match) -> None:
        sha, files = self.find(match)
        prefix = f"{match['folder']}/" if "folder" in match else ""
        inside = {path: data for path, data in files.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise HubError(404, "EntryNotFound", f"{match['folder']} does not exist", commit=sha)
        query = parse_qs(urlsplit(self.path).query)
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = sorted({prefix + path[len(prefix) :].split("/")[0] for path in inside} - set(inside))
        listing: list[dict] = [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in folders]
        for path, data in sorted(inside.items()):
            if recursive or "/" not in path[len(prefix) :]:
                listing.append(_tree_entry(path, data))
        self.answer_json(listing)

    @route("GET", rf"{API}/{REPO}(/revision/(?P<revision>[^/]+))?")
    def info(self, match: Match) -> None:
        sha, files = self.find(match)
        siblings = [{"rfilename": path} for path in sorted(files)]
        info = {"id": match["repo"], "modelId": match["repo"], "sha": sha, "siblings": siblings, "tags": []}
        private = self.repository(match["repo"]).private
        self.answer_json(info | {"private": private, "gated": False, "disabled": False})

    @route("GET", rf"{API}/{REPO}/refs")
    def refs(self, match: Match) -> None:
        repository = self.repository(match["repo"])

        def listed(names: Mapping[str, str], kind: str) -> list[dict]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in sorted(names.items())]

        tags = listed(repository.tags, "tags")
        self.answer_json({"branches": listed(repository.branches, "heads"), "converts": [], "tags": tags})

    @route("GET", rf"/(datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
    def resolve(self, match: Match) -> None:
        sha, files = self.find(match)
        if match["file"] not in files:
            raise HubError(404, "EntryNotFound", f"{match['file']} does not exist", commit=sha)
        data = files[match["file"]]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        etag = _object_id(match["file"], data)
        if _is_lfs(match["file"]):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        headers["ETag"] = f'"{etag}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.answer(data, headers=headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
        if start >= len(data):
            return self.answer(b"", status=416, headers=headers | {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.answer(data[start:end], status=206, headers=headers)

    @route("GET", r"/api/whoami-v2")
    def whoami(self, match: Match) -> None:
        if self.user is None:
            raise HubError(401, None, "Invalid username or password.")
        access = {"accessToken": {"displayName": "test", "role": self.role}}
        self.answer_json({"type": "user", "name": self.user, "orgs": [{"name": "club"}], "auth": access})

    @route("POST", r"/api/repos/create")
    def create(self, match: Match) -> None:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.user
        self.require_write(owner)
        repo_id = f"{owner}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}"}
        with self.hub.lock:
            if repo_id in self.hub.repositories:
                return self.answer_json({"error": "You already created this model repo", **url}, status=409)
            self.hub.commit(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.repositories[repo_id].private = bool(private)
        self.answer_json(url)

    @route("POST", r"/api/validate-yaml")
    def validate_yaml(self, match: Match) -> None:
        if not json.loads(self.body)["content"].startswith("---\n"):
            return self.answer_json({"errors": [{"message": "there is no metadata"}], "warnings": []}, status=400)
        self.answer_json({"errors": [], "warnings": []})

    @route("POST", rf"{API}/{REPO}/preupload/(?P<revision>[^/]+)")
    def preupload(self, match: Match) -> None:
        self.repository(match["repo"], write=True)
        _, files = self.find(match)
        plans = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            plan = {"path": path, "uploadMode": "lfs" if _is_lfs(path) else "regular", "shouldIgnore": False}
            plans.append(plan | ({"oid": _object_id(path, files[path])} if path in files else {}))
        self.answer_json({"files": plans})

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, match: Match) -> None:
        stored = self.repository(match["repo"], write=True).lfs
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in stored:
                target = {"href": f"{self.hub.url}/lfs/{match['repo']}/{item['oid']}"}
                verify = {"href": f"{self.hub.url}/{match['repo']}.git/info/lfs/objects/verify"}
                item["actions"] = {"upload": target, "verify": verify}
        self.answer_json({"transfer": "basic", "objects": objects})

    @route("PUT", rf"/lfs/{REPO}/(?P<oid>[0-9a-f]{{64}})")
    def lfs_put(self, match: Match) -> None:  # the address is the permission, as with signed ones
        data = _altered(self.body) if self.fault and self.fault.corrupt else self.body
        self.hub.repositories[match["repo"]].uploads[match["oid"]] = data
        self.answer(b"")

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/verify")
    def lfs_verify(self, match: Match) -> None:
        repository = self.repository(match["repo"], write=True)
        promised = json.loads(self.body)
        stored = repository.lfs.get(promised["oid"], b"")  # by another client that sent the same
        data = repository.uploads.pop(promised["oid"], stored)
        if (hashlib.sha256(data).hexdigest(), len(data)) != (promised["oid"], promised["size"]):
            raise HubError(422, None, "the uploaded content has another SHA-256 or size than announced")
        repository.lfs[promised["oid"]] = data
        self.answer_json({})

    @route("POST", rf"{API}/{REPO}/commit/(?P<revision>[^/]+)")
    def add_commit(self, match: Match) -> None:
        repository = self.repository(match["repo"], write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.lock:
            head = repository.branches.get(match["revision"])
            if head is None:
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {match['revision']}")
            changes: dict[str, bytes | None] = {}
            for key, value in ((line["key"], line["value"]) for line in lines):
                if key == "header" and value.get("parentCommit", head) != head:
                    raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
                if key == "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    if value["oid"] not in repository.lfs:
                        raise HubError(400, None, f"no content was uploaded for {value['path']}")
                    changes[value["path"]] = repository.lfs[value["oid"]]
                elif key == "deletedFile":
                    if value["path"] not in repository.commits[head]:
                        raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
                    changes[value["path"]] = None
            if self.fault and self.fault.corrupt:
                path, data = next((path, data) for path, data in changes.items() if data)
                changes[path] = _altered(data)
            sha = self.hub.commit(match["repo"], changes, parent=head, branch=match["revision"])
        url = f"{self.hub.url}/{match['repo']}/commit/{sha}"
        self.answer_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    @route("POST", rf"{API}/{REPO}/(?P<kind>tag|branch)/(?P<name>[^/]+)")
    def name_commit(self, match: Match) -> None:
        """A tag (the path names the revision, the body the tag) or a branch (the other way round)."""
        repository = self.repository(match["repo"], write=True)
        wanted = json.loads(self.body or b"{}")
        if match["kind"] == "tag":
            names, name, revision = repository.tags, wanted["tag"], match["name"]
        else:
            names, name, revision = repository.branches, match["name"], wanted.get("startingPoint", "main")
        with self.hub.lock:
            if name in names:
                raise HubError(409, None, f"Reference already exists: {name}")
            names[name] = repository.resolve(revision)
        self.answer_json({})

    @route("POST", rf"{API}/{REPO}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, match: Match) -> None:
        _, files = self.find(match)
        paths = parse_qs(self.body.decode())["paths"]
        self.answer_json([_tree_entry(path, files[path]) for path in paths if path in files])
