"""Pushing to the Hub: one commit and a tag, or a clear error and nothing changed.

A publisher's process (`hub_publisher.py`) pushes to a loopback Hub (`hub_server.py`), on which the base already is.
Each test pushes to a repository of its own; what the Hub holds afterwards is looked up in the server.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file

from adaptface.checkpoint import not_of_a_release
from image_processing_adaptface import AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel
from tests.conftest import build_tiny_model, replace_tensors
from tests.hub_server import HubServer, Repository, visit

BASE, FACES = "user/tiny-dinov2", "user/faces"
ROOT = Path(__file__).parents[1]
MODULES = {"configuration_adaptface.py", "image_processing_adaptface.py", "modeling_adaptface.py"}

pytestmark = pytest.mark.slow


class Publisher:
    """`hub_publisher.py` in an environment where only the loopback Hub is."""

    def __init__(self, hub: HubServer, home: Path) -> None:
        env = {**hub.client_env(home), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(Path(__file__).with_name("hub_publisher.py"))]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def do(self, **job: Any) -> dict[str, Any]:
        """The answer to a job; empty if the process died over it."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline() or "{}")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@dataclass
class World:
    """The Hub with the base, a run that was released and pushed by the command, and the process that did it."""

    hub: HubServer
    publisher: Publisher
    tmp: Path
    run: Path
    commanded: dict[str, Any]  # what the command printed
    token: str

    @property
    def release(self) -> Path:
        return self.run / "release"

    def push(self, repo_id: str, folder: Path | None = None, version: str = "1.0", **more: Any) -> dict[str, Any]:
        job = {"do": "push", "folder": str(folder or self.release), "repo_id": repo_id, "version": version}
        return self.publisher.do(**job, **{"token": self.token, **more})

    def repository(self, repo_id: str) -> Repository:
        return self.hub.repositories[repo_id]

    def writes(self, since: int) -> list[str]:
        """Requests since then that change something."""
        harmless = ("/api/validate-yaml", "/preupload/", "/paths-info/")
        requests = [r for r in self.hub.requests[since:] if r.method not in ("GET", "HEAD")]
        return [r.path for r in requests if not any(part in r.path for part in harmless)]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _on_hub(repository: Repository, revision: str = "main") -> dict[str, bytes]:
    """The files that users get, without the Hub's own."""
    files = repository.commits[repository.resolve(revision)]
    return {name: data for name, data in files.items() if name != ".gitattributes"}


@pytest.fixture(scope="module")
def world(tiny_backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    tmp = tmp_path_factory.mktemp("push")
    model = build_tiny_model(tiny_backbone_dir, seed=0)
    images = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    np.save(tmp / "images.npy", images)
    with HubServer() as hub:
        token = hub.token("user")
        model.config.backbone, model.config.backbone_revision = BASE, hub.commit(BASE, tiny_backbone_dir)
        run = tmp / "run"
        model.save_pretrained(run / "best")
        AdaptFaceImageProcessor(size=56).save_pretrained(run / "best")
        publisher = Publisher(hub, tmp / "publisher")
        words = [str(run), "--repo_id", FACES, "--push", "--version", "1.0"]
        yield World(hub, publisher, tmp, run, publisher.do(do="release", words=words, token=token), token)
        publisher.close()


@pytest.fixture(autouse=True)
def nothing_local_changes(world: World) -> Iterator[None]:
    """Whatever happens, the release folder stays as it is, every ordered fault is met and no route is missing."""
    before = _files(world.release)
    yield
    unmet, unknown = [fault for fault in world.hub.faults if fault.times], list(world.hub.unknown)
    world.hub.faults.clear()
    world.hub.unknown.clear()
    assert _files(world.release) == before
    assert unmet == [] and unknown == []


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A repository that no other test uses."""
    return f"user/r{hashlib.sha1(request.node.nodeid.encode()).hexdigest()[:8]}"


@pytest.fixture
def pushed(world: World, repo: str) -> str:
    """The commit of version 1.0, which `repo` holds."""
    return world.push(repo)["commit"]


@pytest.fixture
def newer(world: World, tmp_path: Path) -> Path:
    """The next release: other weights, another card, and no results any more."""
    folder = Path(shutil.copytree(world.release, tmp_path / "newer"))
    tensors = load_file(folder / "model.safetensors")
    replace_tensors(folder, tensors | {"projection.bias": tensors["projection.bias"] + 1})
    card = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(f"{card}\nNewer.\n", encoding="utf-8")
    return folder


# ------------------------------------------------------------------------------------------------------ what works


def test_the_command_stages_and_pushes_in_one_commit(world: World) -> None:
    assert world.commanded["code"] == 0, world.commanded
    repository = world.repository(FACES)
    release, created = repository.history()
    assert set(repository.commits[created]) == {".gitattributes"}
    assert _on_hub(repository) == _files(world.release) and not_of_a_release(_on_hub(repository)) == []
    assert repository.tags == {"v1.0": release} and repository.branches == {"main": release}
    assert f"{world.hub.url}/{FACES} (public) now holds it: v1.0, {release}" in world.commanded["out"]
    assert [name for name in load(_on_hub(repository)["model.safetensors"]) if name.startswith("backbone.")] == []


def test_pushing_again_changes_nothing(world: World, repo: str, pushed: str) -> None:
    before = len(world.hub.requests)
    again = world.push(repo)
    assert again["commit"] == pushed and again["tag"] == "v1.0" and again["changed"] is False, again
    assert world.writes(before) == []
    assert world.repository(repo).history()[0] == pushed and len(world.repository(repo).history()) == 2


def test_a_new_version_is_one_more_commit_and_the_old_tag_stays(
    world: World, repo: str, newer: Path, tmp_path: Path
) -> None:
    older = Path(shutil.copytree(world.release, tmp_path / "older"))
    (older / "results.json").write_text('{"results": []}', encoding="utf-8")
    first = world.push(repo, older)["commit"]
    before = len(world.hub.requests)
    second = world.push(repo, newer, version="1.1")
    assert second["changed"] is True and second["url"] == f"{world.hub.url}/{repo}", second
    repository = world.repository(repo)
    assert repository.history()[:2] == [second["commit"], first]
    assert repository.tags == {"v1.0": first, "v1.1": second["commit"]}
    assert _on_hub(repository) == _files(newer) and _on_hub(repository, "v1.0") == _files(older)
    assert len([path for path in world.writes(before) if path.startswith("/lfs/")]) == 1


def test_a_push_that_stopped_before_its_tag_is_ended_by_the_next(world: World, repo: str, pushed: str) -> None:
    del world.repository(repo).tags["v1.0"]
    again = world.push(repo)
    assert again["changed"] is True and again["commit"] == pushed
    assert world.repository(repo).tags == {"v1.0": pushed} and world.repository(repo).history()[0] == pushed


def test_a_private_repository_is_for_its_owner(world: World, repo: str) -> None:
    first = world.push(repo, private=True)
    assert first["private"] is True and world.repository(repo).private
    again = world.push(repo)  # not asked for: it stays private, and the answer says so
    assert again["private"] is True and again["changed"] is False
    folder = world.publisher.do(do="download", repo_id=repo, revision="v1.0", token=world.token)["folder"]
    for token in (None, world.hub.token("stranger")):
        refused = world.publisher.do(do="download", repo_id=repo, token=token)
        assert "RepositoryNotFoundError" in refused["error"], refused
    assert {name: data for name, data in _files(Path(folder)).items() if name != ".gitattributes"} == _files(
        world.release
    )


def test_pushes_at_the_same_time_are_not_mixed(world: World, repo: str, pushed: str, newer: Path) -> None:
    """Both saw the same commit; one comes first, the other is refused and pushed on top when it is run again."""
    other = Path(shutil.copytree(newer, newer.with_name("other")))
    (other / "README.md").write_text("---\nlibrary_name: transformers\n---\nOther.\n", encoding="utf-8")
    both = {"2.0": newer, "3.0": other}
    barrier = threading.Barrier(2)
    world.hub.meanwhile("POST", f"{repo}/commit/", lambda: barrier.wait(30), times=2)
    jobs = [{"do": "push", "folder": str(f), "repo_id": repo, "version": v} for v, f in both.items()]
    answers = world.publisher.do(do="together", token=world.token, jobs=jobs)["answers"]
    (won,), (lost,) = ([a for a in answers if ("error" in a) is failed] for failed in (False, True))
    repository = world.repository(repo)
    assert repository.history()[:2] == [won["commit"], pushed]
    assert repository.tags == {"v1.0": pushed, won["tag"]: won["commit"]}
    assert _on_hub(repository) == _files(both[won["tag"][1:]])
    assert "HTTP 412, A commit has happened since" in lost["error"] and "Someone else pushed meanwhile" in lost["error"]
    assert f"Users of {repo} get commit {won['commit']}." in lost["error"]
    (version,) = both.keys() - {won["tag"][1:]}
    again = world.push(repo, both[version], version=version)
    assert repository.history()[:3] == [again["commit"], won["commit"], pushed]
    assert _on_hub(repository) == _files(both[version])


# ------------------------------------------------------------------------------------------- what is refused at once


def _with_base(release: Path, out: Path, **config: object) -> Path:
    folder = Path(shutil.copytree(release, out / "other-base"))
    content = json.loads((folder / "config.json").read_text(encoding="utf-8")) | config
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    card, name = (folder / "README.md").read_text(encoding="utf-8"), str(content["backbone"])
    named = "" if Path(name).is_absolute() else f"base_model: {name}\n"  # nobody knows a folder of this machine
    (folder / "README.md").write_text(card.replace(f"base_model: {BASE}\n", named), encoding="utf-8")
    backbone = Path(str(content["backbone"]))
    base = {"base_model_name_or_path": backbone.name if backbone.is_absolute() else content["backbone"]}
    base["revision"] = content["backbone_revision"]
    for file in folder.glob("peft/**/adapter_config.json"):
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | base), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no token", ["there is no token to push with", "hf auth login"]),
        ("invalid token", ["HTTP 401", "The token is not valid"]),
        ("token that reads", ["the token may only read"]),
        ("token of another", ["belongs to user, and the token is of stranger"]),
        ("a version that was given", ["v1.0 is already another release", "another --version"]),
        ("a version that is no tag", ["version '1 2' makes no tag"]),
        ("public, asked to be private", ["the repository is public", "a push changes no visibility"]),
        ("other files there", ["no release (notes/thesis.txt)"]),
        ("another model there", ["no release (config.json of another model)"]),
        ("a folder that is no release", ["ReleaseError", "secret.txt must not be in a release"]),
        ("base not there", ["the base user/nowhere", "HTTP 404"]),
        ("base revision not there", [f"the base {BASE} at revision {'0' * 40}", "HTTP 404, Invalid rev id"]),
        ("base with other weights", [f"the base {BASE}", "other weights", "f" * 64]),
        ("base of this machine", ["the base is the folder /", "nobody could load"]),
        ("base private", [f"the base {BASE} is private and this repository is public"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(
    world: World, repo: str, pushed: str, newer: Path, tmp_path: Path, fault: str, words: list[str]
) -> None:
    hub, repository = world.hub, world.repository(repo)
    folder, more = newer, {"version": "1.1"}
    if "token" in fault:
        tokens = {"no token": None, "invalid token": "hf_wrong", "token that reads": hub.token("user", "read")}
        more["token"] = tokens[fault] if fault in tokens else hub.token("stranger")
    elif fault.startswith("base ") and fault != "base private":
        change: dict[str, dict[str, object]] = {
            "base not there": {"backbone": "user/nowhere"},
            "base revision not there": {"backbone_revision": "0" * 40},
            "base with other weights": {"backbone_sha256": "f" * 64},
            "base of this machine": {"backbone": str(tmp_path)},
        }
        folder = _with_base(newer, tmp_path, **change[fault])
    elif fault == "base private":
        world.repository(BASE).private = True
    elif fault == "a folder that is no release":
        (newer / "secret.txt").write_text("", encoding="utf-8")
    elif fault == "public, asked to be private":
        more["private"] = True
    elif fault == "other files there":
        pushed = hub.commit(repo, {"notes/thesis.txt": b"mine"}, parent=pushed)
    elif fault == "another model there":
        pushed = hub.commit(repo, {"config.json": b'{"model_type": "bert"}'}, parent=pushed)
    else:
        more["version"] = "1.0" if fault == "a version that was given" else "1 2"
    history, tags, before = repository.history(), dict(repository.tags), len(hub.requests)
    answer = world.push(repo, folder, **more)
    world.repository(BASE).private = False
    assert [word for word in words if word not in answer["error"]] == [], answer
    assert world.writes(before) == []
    assert repository.history() == history and repository.tags == tags and not repository.private


@pytest.mark.parametrize("private", [None, False])
def test_a_new_repository_over_a_private_base_is_not_made_public(world: World, repo: str, private: bool | None) -> None:
    world.repository(BASE).private = True
    try:
        refused = world.push(repo, private=private)
        assert f"the base {BASE} is private and this repository is public, or would be" in refused["error"]
        assert "Nothing was pushed" in refused["error"] and repo not in world.hub.repositories
        assert world.push(repo, private=True)["private"] is True
    finally:
        world.repository(BASE).private = False


def test_an_organisation_and_a_token_of_few_rights_may_push(world: World) -> None:
    assert world.push("club/faces")["changed"] is True
    limited = world.hub.token("user", "fineGrained")
    assert world.push("club/others", token=limited)["changed"] is True
    answer = world.push("stranger/faces", token=limited)  # the Hub alone knows what it may do
    assert "HTTP 403" in answer["error"] and "stranger/faces" not in world.hub.repositories


def test_a_branch_of_the_tags_name_is_refused(world: World, repo: str, pushed: str, newer: Path) -> None:
    world.repository(repo).branches["v1.1"] = pushed
    error = world.push(repo, newer, version="1.1")["error"]
    assert "a branch has the name of the tag v1.1; rename it there" in error and f"still get commit {pushed}" in error
    assert world.repository(repo).history()[0] == pushed and world.repository(repo).tags == {"v1.0": pushed}


@pytest.mark.parametrize(("version", "tag"), [("v2.0", "v2.0"), ("2.0.lock", None), ("2..0", None)])
def test_the_name_of_a_tag(world: World, repo: str, version: str, tag: str | None) -> None:
    answer = world.push(repo, version=version)
    assert answer.get("tag") == tag and (tag is not None or "makes no tag" in answer["error"])


def test_a_new_repository_below_anothers_name_is_not_made(world: World) -> None:
    answer = world.push("stranger/faces")
    assert "belongs to stranger, and the token is of user, who may write only below user, club" in answer["error"]
    assert "stranger/faces" not in world.hub.repositories


# ----------------------------------------------------------------------------------------------- what fails underway


@pytest.mark.parametrize(
    ("method", "path", "step", "tries"),
    [
        ("GET", "/api/whoami-v2", "asking whose token this is", 1),
        ("GET", f"/api/models/{BASE}/revision", f"looking for the base {BASE}", 1),
        ("GET", r"/api/models/user/r\w+$", "looking for the repository", 1),
        ("GET", r"/api/models/user/r\w+/tree", "listing the files", 6),
        ("POST", "/api/validate-yaml", "the upload", 1),
        ("POST", "/preupload/", "the upload", 6),
        ("POST", r"\.git/info/lfs/objects/batch", "the upload", 6),
        ("PUT", "/lfs/", "the upload", 6),
        ("POST", r"\.git/info/lfs/objects/verify", "the upload", 6),
        ("POST", "/commit/", "the upload", 1),
    ],
)
@pytest.mark.parametrize(
    ("status", "headers", "remedy"),
    [(500, {}, "later if it repeats"), (429, {"Retry-After": "7"}, "Wait 7 seconds, then run the same command again")],
    ids=["500", "429"],
)
def test_an_error_of_the_hub_leaves_the_earlier_release(
    world: World, repo: str, pushed: str, newer: Path, method: str, path: str, step: str,
    tries: int, status: int, headers: dict[str, str], remedy: str,
) -> None:  # fmt: skip
    """However often huggingface_hub tries, each try fails; the same push goes through afterwards."""
    fault = world.hub.fail(method, path, status=status, headers=headers, times=tries)
    answer = world.push(repo, newer, version="1.1")
    assert fault.seen == tries
    assert answer["error"].startswith(f"PushError: {repo}: {step}") and remedy in answer["error"], answer
    assert f"HTTP {status}" in answer["error"] and f"{newer} is untouched" in answer["error"]
    assert answer["waits"] == ([8.0] * 5 if status == 429 else [1, 2, 4, 8, 8])[: tries - 1]
    repository = world.repository(repo)
    assert repository.history()[0] == pushed and repository.tags == {"v1.0": pushed}
    assert _on_hub(repository) == _files(world.release)

    again = world.push(repo, newer, version="1.1")
    assert repository.history()[:2] == [again["commit"], pushed] and _on_hub(repository) == _files(newer)
    assert repository.tags == {"v1.0": pushed, "v1.1": again["commit"]}


@pytest.mark.parametrize("path", ["/api/repos/create", "/commit/"])
def test_a_first_push_that_fails_leaves_no_release(world: World, repo: str, path: str) -> None:
    world.hub.fail("POST", path, status=500)
    assert f"{repo}: " in world.push(repo, private=True)["error"]
    repository = world.hub.repositories.get(repo, Repository())
    assert {name for files in repository.commits.values() for name in files} <= {".gitattributes"}
    assert repository.tags == {}
    assert world.push(repo, private=True)["commit"] == world.repository(repo).tags["v1.0"]
    assert _on_hub(world.repository(repo)) == _files(world.release)


def test_without_its_tag_a_release_is_complete(world: World, repo: str, pushed: str, newer: Path) -> None:
    world.hub.fail("POST", "/tag/", status=500)
    error = world.push(repo, newer, version="1.1")["error"]
    repository = world.repository(repo)
    (head, before, _) = repository.history()
    assert before == pushed and repository.tags == {"v1.0": pushed} and _on_hub(repository) == _files(newer)
    assert "the tag v1.1 failed: HTTP 500" in error
    assert f"Users of {repo} get commit {head}, which is complete but has no tag yet" in error
    assert world.push(repo, newer, version="1.1")["commit"] == head == repository.tags["v1.1"]


def test_a_tag_that_someone_else_makes_meanwhile_is_not_moved(
    world: World, repo: str, pushed: str, newer: Path
) -> None:
    repository = world.repository(repo)
    world.hub.meanwhile("POST", "/tag/", lambda: world.hub.tag(repo, "v1.1", pushed))
    error = world.push(repo, newer, version="1.1")["error"]
    assert f"someone else made it meanwhile, for commit {pushed}" in error and repository.tags["v1.1"] == pushed


@pytest.mark.parametrize("path", ["/lfs/", "/commit/"])
def test_someone_elses_commit_meanwhile_is_kept(world: World, repo: str, pushed: str, newer: Path, path: str) -> None:
    theirs: list[str] = []
    method = "PUT" if path == "/lfs/" else "POST"
    world.hub.meanwhile(
        method, path, lambda: theirs.append(world.hub.commit(repo, {"LICENSE": b"theirs"}, parent=pushed))
    )
    error = world.push(repo, newer, version="1.1")["error"]
    assert "Someone else pushed meanwhile" in error and f"get commit {theirs[0]}" in error
    assert world.repository(repo).history()[:2] == [theirs[0], pushed]
    assert world.repository(repo).tags == {"v1.0": pushed}


def test_a_lost_answer_to_the_tag_is_looked_up(world: World, repo: str, pushed: str, newer: Path) -> None:
    world.hub.lose("POST", "/tag/")
    answer = world.push(repo, newer, version="1.1")
    assert "error" not in answer and world.repository(repo).tags == {"v1.0": pushed, "v1.1": answer["commit"]}


def test_a_lost_answer_is_looked_up(world: World, repo: str, pushed: str, newer: Path) -> None:
    """The commit was made and the connection broke before the answer: no second commit, no error."""
    world.hub.lose("POST", "/commit/")
    answer = world.push(repo, newer, version="1.1")
    assert world.repository(repo).history()[:2] == [answer["commit"], pushed], answer
    assert world.repository(repo).tags == {"v1.0": pushed, "v1.1": answer["commit"]}


@pytest.mark.parametrize("times", [1, 6])
def test_a_connection_that_drops_in_the_middle_of_a_file(
    world: World, repo: str, pushed: str, newer: Path, times: int
) -> None:
    fault = world.hub.drop("PUT", "/lfs/", after_bytes=1000, times=times)
    answer = world.push(repo, newer, version="1.1")
    repository = world.repository(repo)
    assert fault.seen == times
    if times == 6:  # as often as huggingface_hub tries
        assert "the upload failed: " in answer["error"] and f"still get commit {pushed}" in answer["error"], answer
        assert repository.history()[0] == pushed and repository.tags == {"v1.0": pushed}
        assert hashlib.sha256((newer / "model.safetensors").read_bytes()).hexdigest() not in repository.lfs
        answer = world.push(repo, newer, version="1.1")
    assert repository.history()[:2] == [answer["commit"], pushed] and _on_hub(repository) == _files(newer)


def test_an_upload_that_arrives_damaged_is_no_commit(world: World, repo: str, pushed: str, newer: Path) -> None:
    world.hub.corrupt("PUT", "/lfs/")
    error = world.push(repo, newer, version="1.1")["error"]
    assert "the upload failed: HTTP 422, the uploaded content has another SHA-256" in error
    assert f"still get commit {pushed}" in error and world.repository(repo).history()[0] == pushed
    assert _on_hub(world.repository(repo)) == _files(world.release)
    world.push(repo, newer, version="1.1")
    assert _on_hub(world.repository(repo)) == _files(newer)


def test_a_commit_that_holds_other_content_is_undone(world: World, repo: str, pushed: str, newer: Path) -> None:
    world.hub.corrupt("POST", "/commit/")
    error = world.push(repo, newer, version="1.1")["error"]
    repository = world.repository(repo)
    undone, damaged, before, _ = repository.history()
    assert before == pushed and repository.tags == {"v1.0": pushed}
    assert f"arrived damaged in commit {damaged}, which was undone" in error and f"get commit {undone}" in error
    assert _on_hub(repository) == _files(world.release) != _on_hub(repository, damaged)
    again = world.push(repo, newer, version="1.1")
    assert repository.tags["v1.1"] == again["commit"] and _on_hub(repository) == _files(newer)


def test_an_undoing_that_someone_overtakes_is_stated(world: World, repo: str, pushed: str, newer: Path) -> None:
    """Their commit is kept, and nobody is told that the damaged one was undone."""
    repository, theirs = world.repository(repo), []

    def overtake() -> None:
        theirs.append(world.hub.commit(repo, {"LICENSE": b"theirs"}, parent=repository.history()[0]))

    world.hub.corrupt("POST", "/commit/")
    world.hub.meanwhile("POST", "/commit/", overtake)
    error = world.push(repo, newer, version="1.1")["error"]
    damaged = repository.history()[1]
    assert f"undoing commit {damaged}, in which" in error and "HTTP 412" in error
    assert f"get the damaged commit {damaged}: revert it there" in error
    assert repository.history()[0] == theirs[0] and repository.tags == {"v1.0": pushed}


def test_an_upload_whose_end_cannot_be_seen_is_stated(world: World, repo: str, pushed: str, newer: Path) -> None:
    def go_down() -> None:
        world.hub.fail("GET", rf"/api/models/{repo}$", status=503)

    world.hub.drop("POST", "/commit/", after_bytes=10, action=go_down)
    error = world.push(repo, newer, version="1.1")["error"]
    assert f"Unless the commit arrived, which cannot be seen now, users still get commit {pushed}" in error
    assert world.push(repo, newer, version="1.1")["commit"] == world.repository(repo).history()[0]


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_a_file_is_run_again(
    world: World, repo: str, pushed: str, newer: Path, tmp_path: Path
) -> None:
    second = Publisher(world.hub, tmp_path / "home")
    world.hub.drop("PUT", "/lfs/", after_bytes=1000, action=second.process.kill)
    job = {"do": "push", "folder": str(newer), "repo_id": repo, "version": "1.1", "token": world.token}
    assert second.do(**job) == {} and second.process.wait() != 0
    second.close()
    repository = world.repository(repo)
    assert repository.history()[0] == pushed and repository.tags == {"v1.0": pushed}
    assert _on_hub(repository) == _files(world.release)
    again = world.push(repo, newer, version="1.1")
    assert repository.history()[:2] == [again["commit"], pushed] and _on_hub(repository) == _files(newer)
    assert repository.tags["v1.1"] == again["commit"]


# ------------------------------------------------------------------------------------------------ model.push_to_hub


def _require_adapters_only(files: dict[str, bytes]) -> None:
    assert set(files) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", *MODULES}
    names = set(load(files["model.safetensors"]))
    assert "projection.weight" in names and not [name for name in names if name.startswith("backbone.")]
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert auto_map["AutoModel"] == "modeling_adaptface.AdaptFaceModel", "the code is the repository's own"


@pytest.mark.parametrize("remote", [False, True], ids=["local class", "remote code"])
def test_model_and_processor_upload_adapters_and_modules_only(world: World, repo: str, remote: bool) -> None:
    """Two commits, one of each part; what remote code uploads is what it was loaded from, byte for byte."""
    source = FACES if remote else str(world.run / "best")
    job = {"do": "push_to_hub", "repo_id": repo, "token": world.token, "remote": remote}
    answer = world.publisher.do(**job, source=source)
    assert answer.get("module", "").startswith("transformers_modules." if remote else "image_processing_adaptface"), (
        answer
    )
    assert len(world.repository(repo).history()) == 3
    files = _on_hub(world.repository(repo))
    _require_adapters_only(files)
    again = world.publisher.do(**{**job, "repo_id": f"{repo}-2", "remote": True}, source=repo)
    assert "error" not in again, again
    copy = _on_hub(world.repository(f"{repo}-2"))
    assert {name for name in files if files[name] != copy[name]} == set()


def test_saving_can_upload_too(world: World, repo: str, tmp_path: Path) -> None:
    job = {"do": "push_to_hub", "source": str(world.run / "best"), "repo_id": repo, "token": world.token}
    answer = world.publisher.do(**job, save=str(tmp_path / "model"))
    assert "error" not in answer, answer
    _require_adapters_only({**_on_hub(world.repository(repo)), "README.md": b""})


@pytest.mark.parametrize("fault", ["full", "local base"])
@pytest.mark.parametrize("save", [False, True], ids=["push_to_hub", "save_pretrained"])
def test_a_model_that_must_not_be_published_uploads_nothing(
    world: World, repo: str, tiny_backbone_dir: Path, tmp_path: Path, fault: str, save: bool
) -> None:
    adaptation = "full" if fault == "full" else "lora"
    AdaptFaceModel.from_backbone(tiny_backbone_dir, image_size=56, adaptation=adaptation).save_pretrained(
        tmp_path / "m"
    )
    job = {"do": "push_to_hub", "source": str(tmp_path / "m"), "repo_id": repo, "token": world.token}
    error = world.publisher.do(**job, save=str(tmp_path / "saved") if save else None)["error"]
    assert ("every weight of" if fault == "full" else "the folder") in error and error.startswith("ValueError")
    assert repo not in world.hub.repositories


# ---------------------------------------------------------------------------------------------------- what users get


@pytest.fixture(scope="module")
def visited(world: World, tiny_backbone_dir: Path) -> dict[str, Any]:
    """What a stranger's process saw of pushed releases; the disk is full the first time."""
    newer = Path(shutil.copytree(world.release, world.tmp / "moved-on"))
    module = newer / "modeling_adaptface.py"
    module.write_text(module.read_text(encoding="utf-8") + "\nNEWER = True\n", encoding="utf-8")
    tensors = load_file(newer / "model.safetensors")
    tensors["projection.weight"] = tensors["projection.weight"].flip(0)
    replace_tensors(newer, tensors)
    world.push("user/moved", version="1.0")
    world.hub.tag("user/moved", "v2.0", world.hub.commit("user/moved", newer))
    world.push("user/secret", private=True)
    model = {"do": "push_to_hub", "source": FACES, "repo_id": "user/model", "token": world.token, "remote": True}
    world.publisher.do(**model)
    base_size = (tiny_backbone_dir / "model.safetensors").stat().st_size
    assert max(len(data) for data in _files(world.release).values()) < 0.9 * base_size
    tag = {"revision": "v1.0"}
    loads: list[dict[str, Any]] = [
        {"name": "full disk", "source": FACES, "disk": int(0.9 * base_size)},
        {"name": "space again", "source": FACES, "pipeline": True},
        {"name": "tag", "source": "user/moved", **tag},
        {"name": "newest", "source": "user/moved"},
        {"name": "code of the tag", "source": "user/moved", "revision": "main", "code_revision": "v1.0"},
        {"name": "push_to_hub", "source": "user/model"},
        {"name": "no token", "source": "user/secret"},
        {"name": "token", "source": "user/secret", "token": world.token, "pipeline": True},
    ]
    return visit(world.hub, world.tmp, world.tmp / "images.npy", loads)


@pytest.fixture(scope="module")
def expected(world: World, tiny_backbone_dir: Path) -> np.ndarray:
    """(N, E) embeddings of the run's model, with its weights in the precision of a release."""
    model = build_tiny_model(tiny_backbone_dir, seed=0)
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        pixel_values = AdaptFaceImageProcessor(size=56)(list(np.load(world.tmp / "images.npy")))["pixel_values"]
        return model(pixel_values).pooler_output.numpy()


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_the_next_load_works(visited: dict[str, Any], expected: np.ndarray) -> None:
    error = visited["full disk"]["error"]
    assert error.startswith("OSError") and BASE in error and "File too large" in error, error
    np.testing.assert_allclose(visited["space again"]["embeddings"], expected, atol=1e-6)
    np.testing.assert_allclose(visited["space again"]["pipeline"], expected, atol=1e-6)


@pytest.mark.slow
def test_a_tag_and_a_revision_of_the_code_are_what_they_name(
    world: World, visited: dict[str, Any], expected: np.ndarray
) -> None:
    tags = world.repository("user/moved").tags
    np.testing.assert_allclose(visited["tag"]["embeddings"], expected, atol=1e-6)
    np.testing.assert_allclose(visited["newest"]["embeddings"], expected[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(visited["code of the tag"]["embeddings"], expected[:, ::-1], atol=1e-6)
    code = {name: visited[name]["code"] for name in ("tag", "newest", "code of the tag")}
    assert tags["v2.0"] in code["newest"] and tags["v1.0"] in code["tag"] == code["code of the tag"], code


@pytest.mark.slow
def test_what_push_to_hub_uploaded_loads(visited: dict[str, Any], expected: np.ndarray) -> None:
    np.testing.assert_allclose(visited["push_to_hub"]["embeddings"], expected, atol=1e-6)


@pytest.mark.slow
def test_a_private_release_loads_with_its_token_only(visited: dict[str, Any], expected: np.ndarray) -> None:
    np.testing.assert_allclose(visited["token"]["embeddings"], expected, atol=1e-6)
    np.testing.assert_allclose(visited["token"]["pipeline"], expected, atol=1e-6)
    assert "user/secret" in visited["no token"]["error"] and "OSError" in visited["no token"]["error"]


def test_a_snapshot_holds_the_release(world: World) -> None:
    folder = world.publisher.do(do="download", repo_id=FACES, revision="v1.0")["folder"]
    snapshot = _files(Path(folder))
    assert {name: snapshot[name] for name in _files(world.release)} == _files(world.release)


def test_a_damaged_download_is_an_error_and_can_be_mended(world: World) -> None:
    """Of the adapters and of the base; a cut connection is taken up again, and an error of the server is named."""
    weights = {FACES: r"/user/faces/resolve/[^/]+/model.safetensors", BASE: rf"/{BASE}/resolve/[^/]+/model.safetensors"}
    for damaged, pattern in weights.items():
        home = world.tmp / f"damaged-{damaged.replace('/', '-')}"
        home.mkdir()
        fault = world.hub.corrupt("GET", pattern)
        loads = [
            {"name": "damaged", "source": FACES},
            {"name": "from the cache", "source": FACES},
            {"name": "fetched again", "source": FACES, "force_download": True},
        ]
        seen = visit(world.hub, home, world.tmp / "images.npy", loads)
        assert fault.seen == 1
        for name in ("damaged", "from the cache"):
            assert "error" in seen[name], f"{damaged}: {name}: loaded as if nothing were wrong"
            words = "config.json was saved with" if damaged == FACES else "other weights than this model"
            assert words in seen[name]["error"] and "force_download=True" in seen[name]["error"], seen[name]
        assert "error" not in seen["fetched again"], seen["fetched again"]

    home = world.tmp / "cut"
    home.mkdir()
    world.hub.drop("GET", weights[FACES], after_bytes=1000)
    seen = visit(world.hub, home, world.tmp / "images.npy", [{"name": "cut", "source": FACES}])
    assert "error" not in seen["cut"], seen["cut"]

    home = world.tmp / "down"
    home.mkdir()
    world.hub.fail("GET", weights[FACES], status=500)
    world.hub.fail("HEAD", weights[FACES], status=500)
    loads = [{"name": "down", "source": FACES}, {"name": "up", "source": FACES}]
    seen = visit(world.hub, home, world.tmp / "images.npy", loads)
    world.hub.faults.clear()  # it is asked for by one of the two
    assert "error" not in seen["up"] and ("error" not in seen["down"] or "500" in seen["down"]["error"]), seen
