"""A small Hugging Face Hub on the loopback interface, for tests: standard library only.

It serves the routes that reading a model or a data set takes: repository info, tree listings and files, each at a
branch, a tag or a commit. A repository is a set of commits; a commit is a mapping from path to bytes:

    with HubServer() as hub:
        first = hub.commit("user/base", folder)                      # -> commit sha, also the branch "main"
        hub.tag("user/base", "v1", first)
        hub.commit("user/base", {"config.json": b"{}"}, parent=first)  # the files of `parent`, then these
        run_client(env=hub.client_env(tmp_path / "hf_home"))
        assert not hub.unknown, hub.unknown

The client reads HF_ENDPOINT when it is imported, so clients run in subprocesses. A route that is not here is
recorded in `unknown` and answered with status 500, so that a test notices it. A new route is one method with
a `@route` line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".png", ".pt")
API = r"/api/(models|datasets)"
REPO = r"(?P<repo>[^/]+/[^/]+)"


class Request(NamedTuple):
    """One request as the server saw it."""

    method: str
    path: str


class HubError(Exception):
    """An answer in the Hub's own error form: a status and the `X-Error-Code` that the client reads."""

    def __init__(self, status: int, code: str, message: str, commit: str | None = None):
        super().__init__(message)
        self.status, self.code, self.commit = status, code, commit


@dataclass
class Repository:
    """Commits (sha -> path -> content) and the branches and tags that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str:
        """The commit sha that a branch, a tag or a sha stands for."""
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


class HubServer:
    """A running loopback Hub, as a context manager.

    Attributes:
        requests: every request, in order of arrival.
        unknown: those that no route took.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.unknown: list[Request] = []
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
        repository = self.repositories.setdefault(repo_id, Repository())
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
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
        repository.branches[branch] = sha
        return sha

    def tag(self, repo_id: str, name: str, sha: str) -> None:
        self.repositories[repo_id].tags[name] = sha

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


def _tree_entry(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": _git_blob(data)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


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

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        """Requests go to `HubServer.requests`; stderr belongs to the test."""

    def do_GET(self) -> None:
        request = Request(self.command, self.path)
        self.hub.requests.append(request)
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        for accepted, pattern, handler in ROUTES:
            match = pattern.fullmatch(path)
            if match and accepted == method:
                groups = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                try:
                    handler(self, groups)
                except HubError as error:
                    headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
                    if error.commit:
                        headers["X-Repo-Commit"] = error.commit
                    self.answer_json({"error": str(error)}, status=error.status, headers=headers)
                return
        self.hub.unknown.append(request)
        self.answer_json({"error": "no such route on the loopback Hub"}, status=500)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.answer(json.dumps(body).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def find(self, match: Match) -> tuple[str, dict[str, bytes]]:
        """(commit sha, files) of the request's repository at its revision."""
        repository = self.hub.repositories.get(match["repo"])
        if repository is None:
            raise HubError(404, "RepoNotFound", "Repository not found")
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
        self.answer_json(info | {"private": False, "gated": False, "disabled": False})

    @route("GET", rf"/(datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
    def resolve(self, match: Match) -> None:
        sha, files = self.find(match)
        if match["file"] not in files:
            raise HubError(404, "EntryNotFound", f"{match['file']} does not exist", commit=sha)
        data = files[match["file"]]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if match["file"].endswith(LFS_SUFFIXES):
            etag = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        else:
            etag = _git_blob(data)
        headers["ETag"] = f'"{etag}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.answer(data, headers=headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
        if start >= len(data):
            return self.answer(b"", status=416, headers=headers | {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.answer(data[start:end], status=206, headers=headers)
