"""Push a staged release to the Hub: one commit, compared with the local files, then a tag.

Whoever loads the repository gets the earlier release or the new one, never a mixture: all files arrive in one commit,
on top of exactly the commit that was looked at before. Pushing again goes on where a push stopped, and changes nothing
where nothing is left to do.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from adaptface.card import is_local
from adaptface.checkpoint import files_below, not_of_a_release
from adaptface.release import ReleaseError, check_release
from configuration_adaptface import AdaptFaceConfig

HUB_FILES = {".gitattributes"}  # the Hub's own: it says what is in large file storage
_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)  # what huggingface_hub raises
_VERSION = re.compile(r"[0-9A-Za-z]+([._+-][0-9A-Za-z]+)*")

# SHA-256 and git's id of a file: the Hub knows large files by the one and small ones by the other.
Fingerprint = tuple[str, str]


class PushError(ReleaseError):
    """A push that did not end well; the message names repository, step, cause, remedy and what users get now."""


@dataclass(frozen=True)
class Pushed:
    """A release on the Hub.

    Args:
        url (`str`): page of the repository.
        commit (`str`): the commit that holds the release.
        tag (`str`): its tag.
        changed (`bool`): False where the Hub held all of it already.
        private (`bool`): whether only its owner sees it.
    """

    url: str
    commit: str
    tag: str
    changed: bool
    private: bool


def push_release(
    folder: Path,
    repo_id: str,
    *,
    version: str,
    private: bool | None = None,
    token: str | None = None,
    allow_full: bool = False,
) -> Pushed:
    """Make a release folder the newest commit of a Hub repository, and tag it `v{version}`.

    `HfApi.create_commit` is used, not `upload_folder`: where hf_xet is installed the latter may make several commits.

    Args:
        folder (`Path`): folder made by `stage_release`; it is checked again and never changed.
        repo_id (`str`): `user/name`; created if it is not there. It must hold nothing but an older release.
        version (`str`): version of the release. Its tag is never moved.
        private (`bool`, *optional*): visibility of a new repository; that of an existing one is never changed.
        token (`str`, *optional*): token with write access; default: that of `hf auth login` or `HF_TOKEN`.
        allow_full (`bool`): accept weights of the base, as `check_release` does.
    Returns:
        [`Pushed`].
    Raises:
        ReleaseError: the folder is no release.
        PushError: there is no token, the token may not do it, the base is not where the release says, the repository
            or the version is taken, someone else pushed at the same time, the Hub or the network failed, or the Hub
            holds other content than was sent.
    """
    check_release(folder, allow_full=allow_full)
    tag = tag_of(version)
    local = {name: _fingerprint(folder / name) for name in files_below(folder)}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    base = None if config.get("adaptation") == "full" else config["backbone"]
    if base and is_local(base):
        raise PushError(
            f"{repo_id}: the base is the folder {base} of this machine, so that nobody could load the release; stage "
            "it with --repo_id, which says what to do. Nothing was pushed."
        )
    push = _Push(folder, repo_id, require_token(repo_id, token))
    push.require_owner()
    private_base = base if base and push.require_base(base, config) else None
    is_private = push.require_repository(private, private_base)
    head, tagged = push.look_up(tag)
    remote = push.list_files(head)
    push.require_release(head, remote, local)

    changed = _differences(remote, local)
    if tagged is not None and (changed or tagged != head):
        raise PushError(
            f"{repo_id}: {tag} is already another release, commit {tagged}; a tag is never moved, so give this one "
            f"another --version. {push.state}"
        )
    commit = head
    if changed:
        commit = push.commit(f"Release {tag}", head, local, changed)
        push.compare(commit, head, local, remote)
    if tagged is None:
        push.tag(tag, commit)
    return Pushed(f"{push.api.endpoint}/{repo_id}", commit, tag, bool(changed) or tagged is None, is_private)


def tag_of(version: str) -> str:
    """The tag of a version, `v1.0` for `1.0` (or `v1.0`).

    Raises:
        PushError: git would not take it.
    """
    version = version.removeprefix("v")
    if not _VERSION.fullmatch(version) or version.endswith(".lock"):
        raise PushError(f"version {version!r} makes no tag; use letters and digits with '.', '-', '_' or '+' between")
    return f"v{version}"


def require_token(repo_id: str, token: str | None = None) -> str:
    """The given token, or that of this machine.

    Raises:
        PushError: there is none.
    """
    token = token or get_token()
    if not token:
        raise PushError(
            f"{repo_id}: there is no token to push with; run `hf auth login`, or set HF_TOKEN to a token with write "
            "access. Nothing was pushed"
        )
    return token


class _Push:
    """One push on its way.

    Args:
        folder (`Path`): the release.
        repo_id (`str`): its repository.
        token (`str`): a token.
    """

    def __init__(self, folder: Path, repo_id: str, token: str) -> None:
        self.folder, self.repo_id = folder, repo_id
        self.owner = repo_id.split("/")[0]
        self.api = HfApi(token=token)
        self.state = "Nothing was pushed."  # what users get now; the end of each error

    def fail(self, step: str, error: BaseException) -> NoReturn:
        """Turns an error of huggingface_hub into a [`PushError`]."""
        cause, remedy = _explain(error, self.owner)
        raise PushError(
            f"{self.repo_id}: {step} failed: {cause}. {remedy}. {self.state} {self.folder} is untouched."
        ) from error

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        try:
            yield
        except PushError:
            raise
        except _ERRORS as error:
            self.fail(name, error)

    def require_owner(self) -> None:
        """Refuses a token that cannot write where it must, before anything is made there."""
        with self.step("asking whose token this is"):
            who = self.api.whoami()
        role = who.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise PushError(f"{self.repo_id}: the token may only read; take one with write access. {self.state}")
        names = [who["name"], *(organisation["name"] for organisation in who.get("orgs", ()))]
        if self.owner not in names and role != "fineGrained":  # what that one may do, the Hub alone knows
            raise PushError(
                f"{self.repo_id}: the name belongs to {self.owner}, and the token is of {who['name']}, who may write "
                f"only below {', '.join(names)}; take a --repo_id there, or a token of {self.owner}. {self.state}"
            )

    def require_base(self, base: str, config: Mapping[str, Any]) -> bool:
        """Refuses a release whose base is not on the Hub, as a cache may hide here; returns whether it is private."""
        revision, digest = config.get("backbone_revision"), config.get("backbone_sha256")
        with self.step(f"looking for the base {base} at revision {revision}"):
            is_private = bool(self.api.model_info(base, revision=revision).private)
            found = self.api.get_paths_info(base, "model.safetensors", revision=revision)  # [] where it is sharded
        for file in found:
            if isinstance(file, RepoFile) and file.lfs and file.lfs.sha256 != digest:
                raise PushError(
                    f"{self.repo_id}: the base {base} at revision {revision} has other weights than the release was "
                    f"made for: SHA-256 {file.lfs.sha256} instead of {digest}. {self.state}"
                )
        return is_private

    def require_repository(self, private: bool | None, private_base: str | None) -> bool:
        """Creates the repository where there is none; returns whether it is private, as that of a private base must."""
        with self.step("looking for the repository"):
            try:
                found = bool(self.api.model_info(self.repo_id).private)
            except RepositoryNotFoundError:
                if private_base is None or private:
                    self.api.create_repo(self.repo_id, private=private, exist_ok=True)
                    found = bool(self.api.model_info(self.repo_id).private)
                else:
                    found = False  # as it would be
        if private_base is not None and not found:
            raise PushError(
                f"{self.repo_id}: the base {private_base} is private and this repository is public, or would be, so "
                "that nobody could load the release; make it private (--private where it is new), or the base public. "
                f"{self.state}"
            )
        if private is not None and found != private:
            is_now, wanted = ("private", "public") if found else ("public", "private")
            raise PushError(
                f"{self.repo_id}: the repository is {is_now}, and not to be so; a push changes no visibility: make it "
                f"{wanted} in its settings, or push without asking for it. {self.state}"
            )
        return found

    def look_up(self, tag: str) -> tuple[str, str | None]:
        """The newest commit, and that of a tag (None without it)."""
        with self.step("looking for the newest commit"):
            head = self._head()
            self.state = f"Users of {self.repo_id} still get commit {head}."
            return head, self._commit_of(tag)

    def _head(self) -> str:
        sha = self.api.model_info(self.repo_id).sha
        if sha is None:
            raise ValueError("the Hub names no commit")
        return sha

    def _commit_of(self, tag: str) -> str | None:
        """The commit of a tag; None without it."""
        refs = self.api.list_repo_refs(self.repo_id)
        if any(branch.name == tag for branch in refs.branches):
            raise ValueError(f"a branch has the name of the tag {tag}; rename it there, or give another --version")
        return next((found.target_commit for found in refs.tags if found.name == tag), None)

    def list_files(self, commit: str) -> dict[str, str]:
        """Name and id of each file of a commit; the id is the SHA-256 in large file storage, else git's."""
        with self.step("listing the files"):
            entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
            files = [entry for entry in entries if isinstance(entry, RepoFile) and entry.path not in HUB_FILES]
            return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}

    def require_release(self, head: str, remote: Mapping[str, str], local: Mapping[str, Fingerprint]) -> None:
        """Refuses a repository that holds anything but an older release, as `stage_release` does with a folder."""
        strangers = not_of_a_release(remote)
        if not strangers and "config.json" in remote.keys() & _differences(remote, local):
            with self.step("reading config.json"), tempfile.TemporaryDirectory() as scratch:
                file = self.api.hf_hub_download(self.repo_id, "config.json", revision=head, local_dir=scratch)
                if json.loads(Path(file).read_text(encoding="utf-8")).get("model_type") != AdaptFaceConfig.model_type:
                    strangers = ["config.json of another model"]
        if strangers:
            raise PushError(
                f"{self.repo_id}: the repository holds files that are no release ({', '.join(strangers[:5])}); delete "
                f"them there, or take another --repo_id. {self.state}"
            )

    def commit(self, title: str, head: str, local: Mapping[str, Fingerprint], changed: list[str]) -> str:
        """Uploads what differs and makes it one commit on top of `head`; returns it."""
        operations = [
            CommitOperationAdd(name, self.folder / name) if name in local else CommitOperationDelete(name)
            for name in changed
        ]
        try:
            return self.api.create_commit(self.repo_id, operations, commit_message=title, parent_commit=head).oid
        except _ERRORS as error:
            try:
                now = self._head()
                if now != head and not _differences(self.list_files(now), local):
                    return now  # it is there: only the answer was lost
                self.state = f"Users of {self.repo_id} {'still ' if now == head else ''}get commit {now}."
            except (*_ERRORS, PushError):
                self.state = f"Unless the commit arrived, which cannot be seen now, users still get commit {head}."
            self.fail("the upload", error)

    def compare(self, commit: str, head: str, local: Mapping[str, Fingerprint], remote: Mapping[str, str]) -> None:
        """Compares what the Hub holds with what was sent, and undoes the commit where they differ."""
        self.state = f"Users of {self.repo_id} get commit {commit}, which was not compared and has no tag yet."
        arrived = self.list_files(commit)
        damaged = _differences(arrived, local)
        if not damaged:
            self.state = f"Users of {self.repo_id} get commit {commit}, which is complete but has no tag yet."
            return
        self.state = f"Users of {self.repo_id} get the damaged commit {commit}: revert it there."
        with self.step(f"undoing commit {commit}, in which {', '.join(damaged)} arrived damaged,"):
            operations = [
                CommitOperationCopy(name, name, src_revision=head) if name in remote else CommitOperationDelete(name)
                for name in sorted(arrived.keys() | remote.keys())
                if arrived.get(name) != remote.get(name)
            ]
            undone = self.api.create_commit(
                self.repo_id, operations, commit_message=f"Undo {commit}", parent_commit=commit
            )
            if self.list_files(undone.oid) != remote:
                raise ValueError("the files differ from those before")
        raise PushError(
            f"{self.repo_id}: {', '.join(damaged)} arrived damaged in commit {commit}, which was undone; run the same "
            f"command again. Users of {self.repo_id} get commit {undone.oid}, with the files of {head}. {self.folder} "
            "is untouched."
        )

    def tag(self, tag: str, commit: str) -> None:
        """Tags a commit; a tag that someone else made meanwhile must be the same."""
        with self.step(f"the tag {tag}"):
            try:
                self.api.create_tag(self.repo_id, tag=tag, revision=commit, exist_ok=True)
            except _ERRORS:
                if self._commit_of(tag) != commit:  # else only the answer was lost
                    raise
            if (found := self._commit_of(tag)) != commit:
                raise ValueError(f"someone else made it meanwhile, for commit {found}; give another --version")


def _fingerprint(path: Path) -> Fingerprint:
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest()


def _differences(remote: Mapping[str, str], local: Mapping[str, Fingerprint]) -> list[str]:
    """Names of the files that are not the same on both sides, or on one side only."""
    return [name for name in sorted(remote.keys() | local.keys()) if remote.get(name) not in local.get(name, ())]


def _explain(error: BaseException, owner: str) -> tuple[str, str]:
    """Cause and remedy of an error of huggingface_hub."""
    while type(error) is RuntimeError and error.__cause__ is not None:  # "Error while uploading", the rest is below
        error = error.__cause__
    response = getattr(error, "response", None)
    if response is None:
        return f"{type(error).__name__}: {' '.join(str(error).split())}", "Run the same command again"
    said = getattr(error, "server_message", None) or response.headers.get("X-Error-Message")
    cause = f"HTTP {response.status_code}" + (f", {' '.join(str(said).split())}" if said else "")
    remedies = {
        401: "The token is not valid: run `hf auth login`, or set HF_TOKEN",
        403: f"The token may not do this: take one with write access to {owner}",
        404: "Check that it is there and that the token may see it",
        412: "Someone else pushed meanwhile: look at that commit, then run the same command again",
        429: f"Wait {response.headers.get('Retry-After') or 'some'} seconds, then run the same command again",
    }
    return cause, remedies.get(response.status_code, "Run the same command again, later if it repeats")
