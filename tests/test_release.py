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
from adaptface.release import ALLOWED_FILES, ReleaseError, check_release, main, stage_release, verify_release
from image_processing_adaptface import AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel


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
        "embedder": {"kind": "adaptface", "name": "best", "weights_sha256": digest},
        "pairs": 100, "accuracy": 0.75, "accuracy_std": 0.01,
        "auc": 0.8, "eer": 0.2, "tar_at_far": [], "warnings": [],
    }  # fmt: skip
    (folder / "results").mkdir()
    (folder / "results" / "results.json").write_text(json.dumps({"results": [row]}), encoding="utf-8")
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
    assert {path.name for path in released.iterdir()} == ALLOWED_FILES
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
    assert len(code.strip().splitlines()) == 4
    images = [np.random.default_rng(1).integers(0, 256, (112, 112, 3), dtype=np.uint8)]
    monkeypatch.chdir(released.parent)
    scope: dict = {"images": images}
    exec(code, scope)
    model = AdaptFaceModel.from_pretrained(run / "best")
    expected = model(AdaptFaceImageProcessor(size=56)(images)["pixel_values"]).embeddings
    torch.testing.assert_close(scope["embeddings"], expected, atol=1e-6, rtol=0)


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
        assert {path.name for path in out.iterdir()} == ALLOWED_FILES - {"results.json"}
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

    def test_a_full_fine_tuning_is_refused_unless_asked_for(
        self, tiny_backbone_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _save_run(tmp_path, tiny_backbone_dir, adaptation="full")
        assert main([str(tmp_path)]) == 1
        assert "--allow_full" in capsys.readouterr().err and not (tmp_path / "release").exists()
        assert main([str(tmp_path), "--allow_full"]) == 0
        assert any(name.startswith("backbone.") for name in load_file(tmp_path / "release" / "model.safetensors"))

    def test_what_is_missing_is_named(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([str(tmp_path / "nowhere")]) == 1
        assert "nowhere" in capsys.readouterr().err
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
