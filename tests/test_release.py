"""A release: what is in it, what is refused, and that a process without this project loads it to the same embeddings.

The clean process costs an import of transformers, so that one release serves most tests.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file

from adaptface import release
from adaptface.checkpoint import RELEASE_FILES
from adaptface.cli import app
from adaptface.files import without_folders
from adaptface.release import (
    ReleaseError,
    check_release,
    stage_release,
    verify_release,
)
from image_processing_adaptface import AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel


def main(arguments: list[str]) -> int:
    """Exit code of `adaptface release`."""
    return app(["release", *arguments], standalone_mode=False) or 0


def _save_run(run: Path, base: Path, **config: object) -> AdaptFaceModel:
    """A run folder as training and evaluation leave it."""
    torch.manual_seed(0)
    model = AdaptFaceModel.from_backbone(base, lora_rank=4, embedding_size=16, image_size=56, **config)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(run / "best")
    AdaptFaceImageProcessor(size=56).save_pretrained(run / "best")
    (run / "settings.yaml").write_text("train_data: synthetic\nepochs: 3\n", encoding="utf-8")
    return model.eval()


@pytest.fixture(scope="module")
def run(tiny_backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    _save_run(folder, tiny_backbone_dir)
    digest = hashlib.sha256((folder / "best" / "model.safetensors").read_bytes()).hexdigest()
    row = {
        "benchmark": "dev", "data": "synthetic", "protocol": {"folds": "10 contiguous folds"},
        "embedder": {
            "kind": "adaptface", "name": str(folder / "best"), "weights_sha256": digest,
            "backbone": str(tiny_backbone_dir),
        },
        "pairs": 100, "accuracy": 0.75, "accuracy_std": 0.01,
        "auc": 0.8, "eer": 0.2, "tar_at_far": [], "warnings": [],
    }  # fmt: skip
    (folder / "results").mkdir()
    command = ["eval_benchmarks.py", "--model", str(folder / "best"), f"--output_dir={folder / 'results'}"]
    content = {"command": command, "results": [row]}
    (folder / "results" / "results.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def released(run: Path) -> Path:
    """The command line's release of `run`, verified by it in a clean process."""
    assert main([str(run)]) == 0
    return run / "release"


@pytest.fixture
def no_clean_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what comes before the verification."""
    monkeypatch.setattr(release, "verify_release", lambda folder, model_dir: 0.0)


def test_a_release_holds_exactly_the_allowed_files(released: Path) -> None:
    assert {path.name for path in released.iterdir()} == RELEASE_FILES
    names = load_file(released / "model.safetensors")
    assert names and not [name for name in names if name.startswith("backbone.")]
    assert [path.name for path in released.parent.iterdir() if path.name.startswith(".")] == []  # no scratch left


def test_the_card_tells_what_the_files_hold(released: Path) -> None:
    card = ModelCard.load(released / "README.md")
    assert (
        "| dev (synthetic faces) | **this model** | 100 | 75.00 ± 1.00 | 0.8000 | 20.00 | not measured |" in card.text
    )
    assert "Trained on synthetic" in card.text and "Development release" in card.text  # the base is a folder here
    requirements = (released / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {re.split("[<>=]", line)[0] for line in requirements} == set(release.SHIPPED_REQUIREMENTS)


def test_the_example_in_the_card_runs(released: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (released / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    images = [np.random.default_rng(1).integers(0, 256, (112, 112, 3), dtype=np.uint8)]
    monkeypatch.chdir(released.parent)
    scope: dict = {"images": images}
    exec(code, scope)
    model = AdaptFaceModel.from_pretrained(run / "best")
    expected = model(AdaptFaceImageProcessor(size=56)(images)["pixel_values"]).embeddings
    assert not scope["embeddings"].requires_grad
    torch.testing.assert_close(scope["embeddings"], expected.detach(), atol=1e-6, rtol=0)


def test_no_path_of_the_machine_is_published_but_that_of_a_local_base(
    released: Path, run: Path, tiny_backbone_dir: Path
) -> None:
    results = json.loads((released / "results.json").read_text(encoding="utf-8"))
    assert results["command"] == ["eval_benchmarks.py", "--model", "best", "--output_dir=results"]
    assert results["results"][0]["embedder"]["name"] == "best"
    assert results["results"][0]["embedder"]["backbone"] == tiny_backbone_dir.name
    assert results["results"][0]["accuracy"] == 0.75
    places = {
        path.name for path in released.iterdir() for folder in (run, tiny_backbone_dir)
        if str(folder).encode() in path.read_bytes()
    }  # fmt: skip
    assert places == {"config.json"}
    assert json.loads((released / "config.json").read_text(encoding="utf-8"))["backbone"] == str(tiny_backbone_dir)


def test_absolute_paths_of_any_system_are_cut() -> None:
    kept = ["facebook/dinov2-small", "runs/x/best", "d = ||a - b||^2", "2 / 3", "--seed=0", 0.5, None, True]
    assert without_folders(kept) == kept
    paths = ["/home/a/lfw.bin", r"C:\Users\a\lfw.bin", "D:/a/lfw.bin", r"\\server\share\lfw.bin", "--b=/home/a/lfw.bin"]
    assert without_folders({"command": paths}) == {"command": ["lfw.bin"] * 4 + ["--b=lfw.bin"]}


@pytest.mark.parametrize("name", ["my release", "class", "run(2)"])
@pytest.mark.slow
def test_a_name_that_transformers_complains_about_is_found(
    released: Path, run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is built; the verification of one example shows that the refusal has its reason."""
    assert main([str(run), "--out", str(tmp_path / name)]) == 1
    assert f"out {name!r}: " in (said := capsys.readouterr().err) and "use letters, digits" in said
    assert list(tmp_path.iterdir()) == []
    if name == "my release":
        copy = Path(shutil.copytree(released, tmp_path / name))
        with pytest.raises(ReleaseError, match=r"not silently: .*my release.* is not a valid Python identifier"):
            verify_release(copy, run / "best")


@pytest.mark.slow
def test_verification_notices_other_weights(released: Path, run: Path, tmp_path: Path) -> None:
    """The clean process really loads the folder it is given: a change of one part in a thousand is seen."""
    changed = Path(shutil.copytree(released, tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors["projection.weight"] = tensors["projection.weight"] * np.float32(1)
    tensors["projection.weight"][0] *= np.float32(1.001)
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ReleaseError, match=r"embeddings differ from those of .* by \d"):
        verify_release(changed, run / "best")


@pytest.mark.slow
def test_a_release_that_needs_this_project_is_refused(released: Path, run: Path, tmp_path: Path) -> None:
    """Its code must stand alone, whether or not the project is installed beside it."""
    broken = Path(shutil.copytree(released, tmp_path / "broken"))
    module = broken / "configuration_adaptface.py"
    module.write_text("import adaptface\n" + module.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ReleaseError, match=r"does not load in a clean process(?s:.*)adaptface"):
        verify_release(broken, run / "best")


@pytest.mark.usefixtures("no_clean_process")
class TestStaging:
    def test_an_older_release_is_replaced(self, run: Path, released: Path, tmp_path: Path) -> None:
        out = Path(shutil.copytree(released, tmp_path / "out"))
        (out / "README.md").write_text("older", encoding="utf-8")
        stage_release(run / "best", None, out)
        assert {path.name for path in out.iterdir()} == RELEASE_FILES - {"results.json"}
        assert "not measured" in (out / "README.md").read_text(encoding="utf-8")

    def test_a_failure_leaves_the_older_release(
        self, run: Path, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(folder: Path, model_dir: Path) -> float:
            raise ReleaseError("differs")

        out = Path(shutil.copytree(released, tmp_path / "out"))
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        monkeypatch.setattr(release, "verify_release", fail)
        with pytest.raises(ReleaseError, match="differs"):
            stage_release(run / "best", None, out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_folder_of_other_files_is_refused(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("", encoding="utf-8")
        with pytest.raises(FileExistsError, match="no release"):
            stage_release(run / "best", None, tmp_path)
        (tmp_path / "config.json").write_text('{"my": "project"}', encoding="utf-8")
        with pytest.raises(FileExistsError, match="no release"):
            stage_release(run / "best", None, tmp_path)
        assert (tmp_path / "thesis.txt").is_file()

    def test_a_release_with_other_files_in_it_is_refused(self, run: Path, released: Path, tmp_path: Path) -> None:
        out = Path(shutil.copytree(released, tmp_path / "out"))
        (out / "notes").mkdir()
        (out / "notes" / "thesis.txt").write_text("", encoding="utf-8")
        with pytest.raises(FileExistsError, match=r"no release \(notes/thesis\.txt\)"):
            stage_release(run / "best", None, out)
        with pytest.raises(FileExistsError, match="is the model that is to be released"):
            stage_release(run / "best", None, run / "release" / ".." / "best")
        assert (out / "notes" / "thesis.txt").is_file() and (run / "best" / "model.safetensors").is_file()

    def test_it_is_verified_under_the_name_that_it_will_have(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = []
        monkeypatch.setattr(release, "verify_release", lambda folder, model_dir: names.append(folder.name) or 0.0)
        stage_release(run / "best", None, tmp_path / "former")
        stage_release(run / "best", None, tmp_path / "former")
        assert names == ["former", "former"] and [path.name for path in tmp_path.iterdir()] == ["former"]

    def test_a_path_inside_a_text_of_the_results_stops_the_release(self, run: Path, tmp_path: Path) -> None:
        content = json.loads((run / "results" / "results.json").read_text(encoding="utf-8"))
        content["results"][0]["warnings"] = [f"see {run / 'log.jsonl'}"]
        (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ReleaseError, match=r"README\.md holds a path of this machine.*results\.json holds a path"):
            stage_release(run / "best", tmp_path / "results.json", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_licence_that_is_none_is_refused(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([str(run), "--out", str(tmp_path / "out"), "--license", "not a licence"]) == 1
        assert "'not a licence' is no licence id" in capsys.readouterr().err and not (tmp_path / "out").exists()

    def test_results_of_other_weights_are_refused(self, run: Path, tmp_path: Path) -> None:
        content = json.loads((run / "results" / "results.json").read_text(encoding="utf-8"))
        content["results"][0]["embedder"]["weights_sha256"] = "0" * 64
        (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ReleaseError, match="was not measured with the weights of"):
            stage_release(run / "best", tmp_path / "results.json", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_processor_of_another_size_is_refused(self, run: Path, tmp_path: Path) -> None:
        model = Path(shutil.copytree(run / "best", tmp_path / "best"))
        AdaptFaceImageProcessor(size=112).save_pretrained(model)
        with pytest.raises(ReleaseError, match="images of 112 px, the model was trained on 56 px"):
            stage_release(model, None, tmp_path / "out")

    def test_what_cannot_be_pushed_is_refused_before_anything_is_done(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("adaptface.hub.get_token", lambda: None)
        words = [str(run), "--out", str(tmp_path / "out"), "--push"]
        for more, said in {
            (): "--push needs --repo_id user/name",
            ("--repo_id", "user/faces"): "there is no token to push with; run `hf auth login`",
            ("--repo_id", "user/faces", "--version", "1/2"): "version '1/2' makes no tag",
        }.items():
            assert main([*words, *more]) == 1
            assert said in capsys.readouterr().err and list(tmp_path.iterdir()) == []
        monkeypatch.setattr("adaptface.hub.get_token", lambda: "a token")
        assert main([*words, "--repo_id", "user/faces"]) == 1  # its base is local
        assert "nobody could load user/faces" in capsys.readouterr().err and list(tmp_path.iterdir()) == []

    def test_without_push_the_command_that_pushes_is_named(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([str(run), "--out", str(tmp_path / "out")]) == 0
        assert "Not pushed, and not to be: its base is a folder of this machine" in capsys.readouterr().out
        _save_run(tmp_path, Path(json.loads((run / "best" / "config.json").read_text())["backbone"]), adaptation="full")
        words = [str(tmp_path), "--repo_id", "user/faces", "--allow_full", "--version", "2"]
        assert main(words) == 0
        command = f"adaptface release {tmp_path} --repo_id user/faces --push --allow_full --version 2\n"
        assert capsys.readouterr().out.endswith(f"Not pushed. To push it: {command}")
        assert main([*words, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["pushed"] is None and said["weights_bytes"] > 0 and said["folder"] == str(tmp_path / "release")

    def test_a_full_fine_tuning_is_refused_unless_asked_for(
        self, tiny_backbone_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _save_run(tmp_path, tiny_backbone_dir, adaptation="full")
        assert main([str(tmp_path)]) == 1
        assert "--allow_full" in capsys.readouterr().err and not (tmp_path / "release").exists()
        assert main([str(tmp_path), "--allow_full", "--repo_id", "user/faces-2.0"]) == 0
        release = tmp_path / "release"
        assert any(name.startswith("backbone.") for name in load_file(release / "model.safetensors"))
        assert 'source = "user/faces-2.0"\n' in (release / "README.md").read_text(encoding="utf-8")
        config = json.loads((release / "config.json").read_text(encoding="utf-8"))
        assert config["backbone"] == tiny_backbone_dir.name  # nothing is loaded from there

    @pytest.mark.parametrize(
        ("repo_id", "words"),
        [
            ("my model", "Repo id must use"), ("a/b/c", "namespace/repo_name"), ("", "Repo id must use"),
            ("faces", "names no owner"), ("user/import", "'import'.*no word of Python's"),
        ],
    )  # fmt: skip
    def test_a_repository_that_cannot_be_is_refused(self, run: Path, tmp_path: Path, repo_id: str, words: str) -> None:
        with pytest.raises(ValueError, match=rf"repo_id.*{words}"):
            stage_release(run / "best", None, tmp_path / "out", repo_id=repo_id)
        assert not (tmp_path / "out").exists()

    def test_a_base_that_nobody_else_has_makes_no_repository(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(ReleaseError, match=r"nobody could load user/faces; set backbone .* or leave --repo_id out"):
            stage_release(run / "best", None, tmp_path / "out", repo_id="user/faces")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("{", "readable JSON"),
            ("{}", "there is no list 'results'"),
            ("[]", "there is no list 'results'"),
            ('{"results": [{}]}', r"results\[0\] lacks benchmark, data, protocol"),
            ('{"results": [1]}', r"results\[0\] is no mapping"),
        ],
    )
    def test_a_broken_results_file_is_named(self, run: Path, tmp_path: Path, content: str, words: str) -> None:
        (tmp_path / "results.json").write_text(content, encoding="utf-8")
        with pytest.raises(ReleaseError, match=rf"^{re.escape(str(tmp_path))}.results\.json is no .*{words}") as error:
            stage_release(run / "best", tmp_path / "results.json", tmp_path / "out")
        assert "again, or move" in str(error.value) and "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"embedder": {"weights_sha256": "5"}}, "lacks embedder.kind, embedder.name"),
            ({"protocol": {}}, "lacks protocol.folds"),
            ({"tar_at_far": [0.5]}, "lacks tar_at_far"),
            ({"pairs": "100"}, "lacks pairs"),
        ],
    )
    def test_a_row_that_the_card_cannot_show_is_named(
        self, run: Path, tmp_path: Path, change: dict[str, object], words: str
    ) -> None:
        content = json.loads((run / "results" / "results.json").read_text(encoding="utf-8"))
        content["results"].append(content["results"][0] | change)
        (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ReleaseError, match=rf"results\[1\] {words}, or has them"):
            stage_release(run / "best", tmp_path / "results.json", tmp_path / "out")

    @pytest.mark.parametrize("content", [b"a: [1", b"", b"- a", b"\xff\xfe\xfa"])
    def test_a_broken_settings_file_is_named(self, run: Path, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "settings.yaml").write_bytes(content)
        with pytest.raises(ReleaseError, match=rf"^{re.escape(str(tmp_path))}.settings\.yaml is no settings") as error:
            stage_release(run / "best", None, tmp_path / "out", settings=tmp_path / "settings.yaml")
        assert "newest checkpoint" in str(error.value) and "\n" not in str(error.value)

    def test_what_is_missing_is_named(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for folder, words in {
            tmp_path / "nowhere": "nowhere is no folder; give the folder of a run",
            tmp_path: "holds neither best/ nor last/; give the folder of a run",
            run / "best": f"best is a model folder; give the folder of its run, {run}\n",
        }.items():
            assert main([str(folder)]) == 1
            assert words in capsys.readouterr().err
        with pytest.raises(FileNotFoundError, match=r"results\.json"):
            stage_release(run / "best", tmp_path / "results.json", tmp_path / "out")


def test_the_list_of_files_and_tensors(released: Path, tmp_path: Path) -> None:
    check_release(released)
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    intruders = {name: np.zeros((2, 2), np.float32) for name in ("backbone.layernorm.weight", "head.weight")}
    save_file(tensors | intruders, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "photos").mkdir()
    (copy / "photos" / "0001.jpg").write_bytes(b"")
    (copy / "adapter_config.json").write_text("{}", encoding="utf-8")
    (copy / "LICENSE").unlink()
    with pytest.raises(ReleaseError) as error:
        check_release(copy)
    for words in ("photos/0001.jpg must not", "adapter_config.json must not", "LICENSE is missing",
                  "backbone.layernorm.weight belongs to the base", "head.weight is no part"):  # fmt: skip
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["results.json", "config.json", "README.md"])
@pytest.mark.parametrize("place", ["run", "home", "elsewhere"])
def test_a_path_of_this_machine_is_found(
    released: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    check_release(copy, run_folder=run)
    home = tmp_path / "home" / "notes.txt"
    texts = {"run": f"made in {run / 'best'}", "home": f"see {home}.", "elsewhere": "/data/lfw.bin"}
    text = (copy / name).read_text(encoding="utf-8")
    if name == "README.md":
        text += f"\n{texts[place]}\n"
    else:
        text = json.dumps(json.loads(text) | {"note": [texts[place]]})
    (copy / name).write_text(text, encoding="utf-8")
    with pytest.raises(ReleaseError, match=rf"{re.escape(name)} holds a path of this machine in .*; take it out"):
        check_release(copy, run_folder=run)
