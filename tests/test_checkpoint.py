"""Checkpoints and model folders: complete or absent, never half, and never lost."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from adaptface import checkpoint
from adaptface.checkpoint import (
    RELEASE_FILES,
    find_checkpoint,
    find_problem,
    list_checkpoints,
    load_checkpoint,
    recover_model_folder,
    register_weight_hooks,
    remove_run,
    save_checkpoint,
    save_model_folder,
)


class Net(nn.Module):
    """A frozen and a trained part."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 4)


class Trained:
    """A small prepared model, saved with `save(step)`."""

    def __init__(self, run: Path) -> None:
        AcceleratorState._reset_state(True)
        self.run, self.accelerator, self.net = run, Accelerator(cpu=True), Net()
        self.optimizer = torch.optim.AdamW(self.net.head.parameters())
        register_weight_hooks(self.accelerator, lambda name: name.startswith("backbone."))
        self.net, self.optimizer = self.accelerator.prepare(self.net, self.optimizer)

    def save(self, step: int, keep: int = 2) -> Path:
        with torch.no_grad():
            self.net.head.weight.fill_(step)
        return save_checkpoint(self.accelerator, self.run, {"step": step, "x": 0.1 + 0.2}, "seed: 0\n", keep)


@pytest.fixture
def trained(tmp_path: Path):
    yield Trained(tmp_path)
    AcceleratorState._reset_state(True)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_checkpoint_restores_what_trains_and_holds_no_frozen_weight(trained: Trained) -> None:
    folder = trained.save(7)
    files = {
        "manifest.json",
        "optimizer.bin",
        "random_states_0.pkl",
        "settings.yaml",
        "state.json",
        "trained.safetensors",
    }
    assert {path.name for path in folder.iterdir()} == files
    assert set(load_file(folder / "trained.safetensors")) == {"head.weight", "head.bias"}
    with torch.no_grad():
        trained.net.head.weight.zero_()
    frozen = trained.net.backbone.weight.clone()
    assert load_checkpoint(trained.accelerator, folder) == {"step": 7, "x": 0.1 + 0.2}
    assert (trained.net.head.weight == 7).all() and torch.equal(trained.net.backbone.weight, frozen)


def test_rotation_keeps_the_newest_and_never_touches_later_ones(trained: Trained) -> None:
    for step in (1, 2, 3):
        trained.save(step)
    assert names(trained.run) == ["step_00000002", "step_00000003"]
    trained.save(1, keep=1)  # an older checkpoint was resumed; what lies ahead is not its to delete
    assert names(trained.run) == ["step_00000001", "step_00000002", "step_00000003"]


def test_the_old_checkpoint_goes_only_after_the_new_one_is_in_place(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.save(1, keep=1)
    seen = []
    real = checkpoint._remove
    monkeypatch.setattr(checkpoint, "_remove", lambda folder: (seen.append(names(trained.run)), real(folder)))
    trained.save(2, keep=1)
    assert all("step_00000001" in entry or "step_00000002" in entry for entry in seen)
    assert any(entry == ["step_00000001", "step_00000002"] for entry in seen)
    assert names(trained.run) == ["step_00000002"]


def test_saving_the_same_step_again_replaces_it(trained: Trained) -> None:
    folder = trained.save(1)
    (folder / "state.json").write_text("{", encoding="utf-8")
    assert find_problem(trained.save(1)) is None and names(trained.run) == ["step_00000001"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "optimizer.bin").unlink(), "optimizer.bin is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("[]", encoding="utf-8"), "manifest.json is unreadable"),
        (lambda folder: os.truncate(folder / "trained.safetensors", 10), "trained.safetensors has 10 bytes instead"),
        (lambda folder: flip_last_byte(folder / "optimizer.bin"), "optimizer.bin is altered"),
    ],
)  # fmt: skip
def test_damage_is_found_and_passed_over(trained: Trained, damage, problem: str) -> None:
    good, bad = trained.save(1), trained.save(2)
    assert find_problem(bad) is None
    damage(bad)
    said: list[str] = []
    assert find_checkpoint(trained.run, "auto", said.append) == good
    assert len(said) == 1 and problem in said[0] and str(bad) in said[0]
    with pytest.raises(ValueError, match="is damaged"):
        find_checkpoint(trained.run, str(bad))
    assert find_checkpoint(trained.run, str(good)) == good


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "no") is None and find_checkpoint(tmp_path, "auto") is None
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        find_checkpoint(tmp_path, str(tmp_path / "absent"))


def test_an_unfinished_folder_is_no_checkpoint(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies while the files are on their way."""
    trained.save(1)
    monkeypatch.setattr(checkpoint, "_publish", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trained.save(2)
    assert [folder.name for folder in list_checkpoints(trained.run)] == ["step_00000001"]
    monkeypatch.undo()
    trained.save(2)
    assert names(trained.run) == ["step_00000001", "step_00000002"]  # the partial folder was cleared away


@pytest.mark.skipif(os.name == "nt", reason="Windows has no RLIMIT_FSIZE")
def test_a_full_disk_is_explained_and_loses_nothing(tmp_path: Path) -> None:
    """Files may not grow beyond a limit: first the weights, then the random states fail to be written."""
    script = f"""
        import resource
        from pathlib import Path
        from tests.test_checkpoint import Trained, find_problem, names
        run, free = Path({str(tmp_path)!r}), resource.RLIM_INFINITY
        trained = Trained(run)
        trained.save(1)
        for limit in (100, 3000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free))
            try:
                trained.save(2, keep=1)
            except OSError as error:
                print(error)
            assert names(run) == ["step_00000001"] and find_problem(run / "checkpoints" / "step_00000001") is None
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, free))
        trained.save(2, keep=1)
        assert names(run) == ["step_00000002"]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for message in ("could not write", "step_00000002", "--resume auto"):
        assert done.stdout.count(message) == 2, done.stdout


class Part:
    """Something with `save_pretrained`."""

    def __init__(self, text: str, fails: bool = False) -> None:
        self.text, self.fails = text, fails

    def save_pretrained(self, folder: Path) -> None:
        (folder / f"{self.text}.json").write_text(json.dumps(self.text), encoding="utf-8")
        if self.fails:
            raise OSError("No space left on device")


def test_a_model_folder_is_replaced_whole(tmp_path: Path) -> None:
    best = tmp_path / "best"
    save_model_folder(best, Part("a"), Part("b"))
    save_model_folder(best, Part("c"))
    assert [path.name for path in best.iterdir()] == ["c.json"]
    with pytest.raises(OSError, match=r"could not write .*best.*No space left"):
        save_model_folder(best, Part("d"), Part("e", fails=True))
    assert [path.name for path in best.iterdir()] == ["c.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_replacement_cut_off_midway_is_undone(tmp_path: Path) -> None:
    save_model_folder(tmp_path / "best", Part("a"))
    (tmp_path / "best").rename(tmp_path / ".best.replaced")
    recover_model_folder(tmp_path / "best")
    assert (tmp_path / "best" / "a.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


class TestRemoveRun:
    """A new run in the folder of an earlier one."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        files = ["best/config.json", "last/config.json", "log.jsonl", "settings.yaml", "results/results.json"]
        files += [
            f"results/{name}" for name in ("results.md", "results_long.csv", "roc.png", "worst_pairs_1_best_lfw.png")
        ]
        files += [
            f"release/{name}" for name in (*RELEASE_FILES, "plots/roc.png", "peft/experts/age/adapter_config.json")
        ]
        for name in [*files, "synthetic/dev_pairs.csv"]:
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name).write_text('{"model_type": "adaptface"}', encoding="utf-8")
        return tmp_path

    def test_results_and_release_of_the_earlier_run_go_with_it(self, run: Path) -> None:
        remove_run(run)
        assert [path.name for path in run.iterdir()] == ["synthetic"]

    @pytest.mark.parametrize("stranger", ["results/plot.png", "release/notes/thesis.txt", "release/.git/HEAD"])
    def test_a_folder_with_anything_else_in_it_stays_whole(self, run: Path, stranger: str) -> None:
        (run / stranger).parent.mkdir(exist_ok=True)
        (run / stranger).write_text("", encoding="utf-8")
        top = stranger.split("/")[0]
        before = sorted((run / top).rglob("*"))
        remove_run(run)
        assert sorted((run / top).rglob("*")) == before
        assert {path.name for path in run.iterdir()} == {"synthetic", top}

    @pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "dinov2"}'])
    def test_what_is_no_release_of_ours_stays(self, run: Path, content: str | None) -> None:
        (run / "release" / "config.json").unlink()
        if content is not None:
            (run / "release" / "config.json").write_text(content, encoding="utf-8")
        remove_run(run)
        assert (run / "release" / "model.safetensors").is_file() and not (run / "results").exists()

    @pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
    def test_a_link_stays_and_so_does_what_it_leads_to(
        self, run: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        for name in ("results", "release"):
            (run / name).rename(elsewhere / name)
            (run / name).symlink_to(elsewhere / name)
        remove_run(run)
        assert (elsewhere / "results" / "results.json").is_file() and (elsewhere / "release" / "README.md").is_file()
        assert (run / "release").is_symlink()
