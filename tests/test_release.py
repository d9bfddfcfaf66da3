"""A release: what is in it, what is refused, and that a process without this project loads it to the same embeddings.

The clean process costs an import of transformers, so that one release serves most tests.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from transformers import Dinov2Model

from adaptface import __version__, release
from adaptface.checkpoint import RELEASE_FILES
from adaptface.cli import app
from adaptface.files import new_folder, without_folders
from adaptface.release import (
    ReleaseError,
    check_release,
    stage_release,
    verify_release,
)
from configuration_adaptface import AdaptFaceConfig
from image_processing_adaptface import AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel
from tests.conftest import replace_tensors


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
    for name in ("roc.png", "worst_pairs_1_best_dev.png"):  # the second shows faces
        Figure(figsize=(1, 1)).savefig(folder / "results" / name)
    lines = [
        {"event": "train", "step": step, "usage_general": 0.5, "usage_pose": 0.5, "usage_age": 0.0} for step in (1, 9)
    ]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
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


PEFT_FILES = {
    f"peft/{folder}adapter_{file}"
    for folder in ("", "experts/general/", "experts/pose/", "experts/age/")
    for file in ("config.json", "model.safetensors")
}


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_release_holds_exactly_the_allowed_files(released: Path) -> None:
    assert _files(released) == RELEASE_FILES | PEFT_FILES | {"results.json", "plots/roc.png", "plots/domain_usage.png"}
    names = load_file(released / "model.safetensors")
    assert names and not [name for name in names if name.startswith("backbone.")]
    assert [path.name for path in released.parent.iterdir() if path.name.startswith(".")] == []  # no scratch left


def test_weights_are_stored_in_bfloat16_and_loaded_in_float32(released: Path, run: Path) -> None:
    trained, stored = (load_file(folder / "model.safetensors") for folder in (run / "best", released))
    assert trained.keys() == stored.keys() and {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in trained.items())
    model = AdaptFaceModel.from_pretrained(released)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with safe_open(released / "model.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["version"] == header["adaptface_version"] == __version__ and header["training_data"] == "synthetic"
    if (release.ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", header["adaptface_commit"])
    mode = (released / "config.json").stat().st_mode
    assert (released / "model.safetensors").stat().st_mode == mode, "whoever may read the one may read the other"


@pytest.mark.slow
def test_float32_on_request_and_a_loss_that_is_too_large(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = stage_release(run / "best", None, tmp_path / "exact", dtype="float32", version="7.1")
    assert staged.cosine == pytest.approx(1, abs=1e-12) and staged.difference < 1e-5
    trained, stored = (load_file(folder / "model.safetensors") for folder in (run / "best", tmp_path / "exact"))
    assert all(torch.equal(stored[name], tensor) for name, tensor in trained.items())
    assert "rounded" not in (tmp_path / "exact" / "README.md").read_text(encoding="utf-8")
    with safe_open(tmp_path / "exact" / "model.safetensors", framework="pt") as file:
        assert file.metadata()["version"] == "7.1"
    monkeypatch.setattr(release, "MIN_COSINE", 1.0)
    with pytest.raises(ReleaseError, match=r"rounding the weights to bfloat16 turns an embedding .*--dtype float32"):
        stage_release(run / "best", None, tmp_path / "rounded")
    assert not (tmp_path / "rounded").exists()


def test_three_experts_of_the_default_take_3_3_megabytes(tmp_path: Path) -> None:
    model = AdaptFaceModel(AdaptFaceConfig(backbone_sha256="0" * 64), defer_backbone=True)
    release._save(model, tmp_path, torch.bfloat16, {})
    assert 3.2e6 < (tmp_path / "model.safetensors").stat().st_size <= 3.3e6


def test_plain_peft_loads_the_release(released: Path, tiny_backbone_dir: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AdaptFaceModel.from_pretrained(released).double()
    pictures = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)).double()  # without rounding
    for subfolder, mix in (("peft", None), ("peft/experts/pose", [0.0, 1.0, 0.0])):
        base = Dinov2Model.from_pretrained(tiny_backbone_dir)
        plain = peft.PeftModel.from_pretrained(base, released, subfolder=subfolder).double()
        with torch.no_grad():
            found, expected = plain(pictures).pooler_output, model.merged_backbone(mix)(pictures).pooler_output
            assert (model.backbone(pictures).pooler_output - expected).abs().max() > 1e-2, "they do something"
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_card_tells_what_the_files_hold(released: Path) -> None:
    card = ModelCard.load(released / "README.md")
    assert (
        "| dev (synthetic faces) | **this model** | 100 | 75.00 ± 1.00 | 0.8000 | 20.00 | not measured |" in card.text
    )
    assert "Trained on synthetic" in card.text and "Development release" in card.text  # the base is a folder here
    requirements = (released / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {re.split("[<>=]", line)[0] for line in requirements} == set(release.SHIPPED_REQUIREMENTS)


def test_the_example_in_the_card_runs(
    released: Path, tiny_backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, peft = re.findall(r"```python\n(.*?)```", (released / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert 'subfolder="peft")  # or "peft/experts/general"' in peft
    images = [np.random.default_rng(1).integers(0, 256, (112, 112, 3), dtype=np.uint8)]
    if find_spec("peft"):  # a base that is stored in half precision is loaded in float32
        (name,) = re.findall(r'Dinov2Model.from_pretrained\("([^"]+)"', peft)
        Dinov2Model.from_pretrained(tiny_backbone_dir, dtype=torch.float16).save_pretrained(tmp_path / name)
        shutil.copytree(released, tmp_path / released.name)
        monkeypatch.chdir(tmp_path)
        of_peft: dict = {}
        exec(peft, of_peft)
        assert {parameter.dtype for parameter in of_peft["model"].parameters()} == {torch.float32}
    monkeypatch.chdir(released.parent)
    scope: dict = {"images": images}
    exec(code, scope)
    model = AdaptFaceModel.from_pretrained(released)
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
        name for name in _files(released) for folder in (run, tiny_backbone_dir)
        if str(folder).encode() in (released / name).read_bytes()
    }  # fmt: skip
    assert places == {"config.json"}
    assert json.loads((released / "config.json").read_text(encoding="utf-8"))["backbone"] == str(tiny_backbone_dir)


def test_absolute_paths_of_any_system_are_cut() -> None:
    kept = ["facebook/dinov2-small", "runs/x/best", "d = ||a - b||^2", "2 / 3", "--seed=0", 0.5, None, True]
    assert without_folders(kept) == kept
    paths = ["/home/a/lfw.bin", r"C:\Users\a\lfw.bin", "D:/a/lfw.bin", r"\\server\share\lfw.bin", "--b=/home/a/lfw.bin"]
    assert without_folders({"command": paths}) == {"command": ["lfw.bin"] * 4 + ["--b=lfw.bin"]}
    within = [
        "12 images of /mnt/cluster/alice/lfw.bin are", "see `/srv/x/lfw.bin`", "[x](/srv/x/lfw.bin)", "file:///mnt/lfw.bin",
        r"at C:\Users\bob\lfw.bin", "--note=see /mnt/a/lfw.bin", r"on \\server\share\lfw.bin",
        "path:/mnt/a/lfw.bin",
    ]  # fmt: skip
    assert [text.count("lfw.bin") for text in without_folders(within)] == [1] * 8
    assert not any(word in text for text in without_folders(within) for word in ("mnt", "srv", "bob", "share", "file:"))
    addresses = ["https://arxiv.org/abs/2304.07193", "a/b/c", "q/k/v", "1 / (1 + exp(3))", "and/or", "</b>", "~/x/y"]
    assert without_folders(addresses) == addresses


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
    """The clean process really loads the folder it is given: a change that bfloat16 can just hold is seen."""
    changed = Path(shutil.copytree(released, tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors["projection.weight"][0] *= 1.01
    replace_tensors(changed, tensors)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["peft", "scipy"])  # installed here, and no requirement of a release
def test_a_release_that_needs_what_it_does_not_declare_is_refused(
    released: Path, run: Path, tmp_path: Path, name: str
) -> None:
    broken = Path(shutil.copytree(released, tmp_path / "broken"))
    module = broken / "configuration_adaptface.py"
    module.write_text(f"import {name}\n" + module.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ReleaseError, match=rf"does not load in a clean process(?s:.*){name}"):
        verify_release(broken, run / "best")


@pytest.mark.slow
def test_a_release_that_warns_is_refused(released: Path, run: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(released, tmp_path / "broken"))
    module = broken / "modeling_adaptface.py"
    text = module.read_text(encoding="utf-8")
    module.write_text(f"{text}\nimport warnings\n\nwarnings.warn('look out', UserWarning)\n", encoding="utf-8")
    with pytest.raises(ReleaseError, match="loads, but not silently: look out"):
        verify_release(broken, run / "best")


@pytest.mark.slow
def test_the_clean_process_sees_nothing_of_this_one(
    released: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither modules on PYTHONPATH and in the working directory, nor code that transformers keeps of other models."""
    for name in ("packaging", "numpy", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not mine')\n", encoding="utf-8")
    kept = tmp_path / "modules"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_MODULES_CACHE", str(kept))
    monkeypatch.chdir(tmp_path)
    assert verify_release(released, run / "best") <= 1e-5
    assert not kept.exists()


class TestComparing:
    """What verification makes of what the clean process found."""

    @pytest.fixture
    def verify(
        self, released: Path, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[Mapping[str, float], Mapping[str, object]], float]:
        """Verifies, with these differences in what was computed, and these words in the report."""
        model, processor = AdaptFaceModel.from_pretrained(released), AdaptFaceImageProcessor.from_pretrained(released)

        def verify(differences: Mapping[str, float], said: Mapping[str, object]) -> float:
            def load(folder: Path, images: np.ndarray, scratch: Path) -> tuple[dict, dict]:
                pixel_values = processor(list(images))["pixel_values"]
                with torch.no_grad():
                    found = {"pixel_values": pixel_values, "embeddings": model(pixel_values).pooler_output}
                arrays = {name: array.numpy().copy() for name, array in found.items()}
                for name, difference in differences.items():
                    arrays[name].flat[3] += difference
                return {"warnings": [], "loading_info": {}, **said}, arrays

            monkeypatch.setattr(release, "_load_in_clean_process", load)
            return verify_release(released, run / "best")

        return verify

    def test_rounding_of_the_arithmetic_is_accepted_and_reported(self, verify) -> None:
        assert verify({}, {}) < 1e-6
        assert verify({"embeddings": 5e-6}, {}) == pytest.approx(5e-6, rel=0.3)
        assert verify({"pixel_values": 5e-6}, {"warnings": ["Using a slow image processor as of now"]}) < 1e-6

    @pytest.mark.parametrize("name", ["pixel_values", "embeddings"])
    @pytest.mark.parametrize("difference", [2e-5, -2e-5, float("nan")])
    def test_any_larger_difference_is_refused(self, verify, name: str, difference: float) -> None:
        with pytest.raises(ReleaseError, match=rf"its {name} differ from those of .* \(allowed: 1e-05\)"):
            verify({name: difference}, {})

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            ({"warnings": ["You should probably TRAIN"]}, "not silently: You should probably TRAIN"),
            ({"loading_info": {"missing_keys": ["a", "b"]}}, "not silently: missing_keys: a, b"),
        ],
    )
    def test_whatever_a_load_has_to_say_is_refused(self, verify, said: Mapping[str, object], message: str) -> None:
        with pytest.raises(ReleaseError, match=message):
            verify({}, said)


@pytest.mark.usefixtures("no_clean_process")
class TestStaging:
    def test_an_older_release_is_replaced(self, run: Path, released: Path, tmp_path: Path) -> None:
        out = Path(shutil.copytree(released, tmp_path / "out"))
        (out / "README.md").write_text("older", encoding="utf-8")
        stage_release(run / "best", None, out)
        assert _files(out) == RELEASE_FILES | PEFT_FILES
        assert "not measured" in (out / "README.md").read_text(encoding="utf-8")

    def test_a_failure_leaves_the_older_release(
        self, run: Path, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(folder: Path, model_dir: Path) -> float:
            raise ReleaseError("differs")

        out = Path(shutil.copytree(released, tmp_path / "out"))
        before = {name: (out / name).read_bytes() for name in _files(out)}
        monkeypatch.setattr(release, "verify_release", fail)
        with pytest.raises(ReleaseError, match="differs"):
            stage_release(run / "best", None, out)
        assert {name: (out / name).read_bytes() for name in _files(out)} == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_model_folder_is_not_replaced(self, run: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(run / "best", tmp_path / "other"))
        with pytest.raises(FileExistsError, match=r"no release \(no LICENSE, no README.md, no requirements.txt\)"):
            stage_release(run / "best", None, other)
        assert (other / "model.safetensors").read_bytes() == (run / "best" / "model.safetensors").read_bytes()

    def test_staging_twice_gives_the_same_bytes(self, run: Path, tmp_path: Path) -> None:
        for name in ("one", "two", "three"):
            stage_release(run / "best", None, tmp_path / name / "release", settings=run / "settings.yaml")
        first, *others = (
            {name: (tmp_path / place / "release" / name).read_bytes() for name in _files(tmp_path / place / "release")}
            for place in ("one", "two", "three")
        )
        assert all(other == first for other in others)

    @pytest.mark.parametrize("size", [1_000, 20_000])  # too small for the config; for the code
    def test_a_full_disk_is_named(self, run: Path, released: Path, tmp_path: Path, size: int) -> None:
        resource = pytest.importorskip("resource")
        out = Path(shutil.copytree(released, tmp_path / "out"))
        before = {name: (out / name).read_bytes() for name in _files(out)}
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(OSError, match=r"out could not be written, the disk is full: .* Free some space"):
                stage_release(run / "best", None, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert {name: (out / name).read_bytes() for name in _files(out)} == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_full_disk_in_the_words_of_safetensors_is_named(self, tmp_path: Path) -> None:
        resource = pytest.importorskip("resource")
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limit[1]))
        try:
            with (
                pytest.raises(OSError, match="new could not be written, the disk is full"),
                new_folder(tmp_path / "new") as new,
            ):
                save_file({"a": torch.zeros(10_000)}, new / "a.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert list(tmp_path.iterdir()) == []

    def test_thresholds_of_other_weights_are_refused(self, run: Path, tmp_path: Path) -> None:
        best = Path(shutil.copytree(run / "best", tmp_path / "best"))
        digest = hashlib.sha256((best / "model.safetensors").read_bytes()).hexdigest()
        point = {
            "far": 0.1, "threshold": 0.5, "threshold_interval": [0.4, 0.6], "measured_far": 0.1,
            "far_interval": [0, 0.2], "tar": 0.9, "tar_interval": [0.8, 1],
        }  # fmt: skip
        thresholds = {
            "benchmark": "dev", "data": "synthetic", "genuine": 50, "impostor": 50, "embedding": "raw sum",
            "weights_sha256": digest, "operating_points": [point], "calibration": {"slope": 1.0, "intercept": 0.0},
        }  # fmt: skip
        _edit(best / "config.json", thresholds=thresholds)
        stage_release(best, None, tmp_path / "out")
        assert "Measured on dev" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        for wrong, words in (
            (thresholds | {"weights_sha256": "0" * 64}, "were measured with other weights"),
            ({key: value for key, value in thresholds.items() if key != "data"}, "lack data"),
            (
                thresholds | {"operating_points": [{"far": 0.1, "threshold": 0.5}]},
                r"lack operating_points\[0\].threshold_i",
            ),
        ):
            _edit(best / "config.json", thresholds=wrong)
            with pytest.raises(ReleaseError, match=rf"the thresholds in config.json {words}.*--write_thresholds"):
                stage_release(best, None, tmp_path / "other")
        assert not (tmp_path / "other").exists()

    def test_places_that_cannot_be_replaced(
        self, run: Path, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = Path(shutil.copytree(released, tmp_path / "target"))
        (tmp_path / "link").symlink_to(target)
        with pytest.raises(FileExistsError, match="link is a link, which cannot be replaced; name a new folder"):
            stage_release(run / "best", None, tmp_path / "link")
        monkeypatch.chdir(target)
        with pytest.raises(FileExistsError, match="is the folder you work in"):
            stage_release(run / "best", None, Path(".").absolute())

    def test_a_fault_is_named_in_the_folder_that_was_asked_for(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def check(folder: Path, **options: object) -> None:
            raise ReleaseError(f"{folder} is no release: why")

        monkeypatch.setattr(release, "check_release", check)
        with pytest.raises(ReleaseError) as error:
            stage_release(run / "best", None, tmp_path / "out")
        assert str(error.value) == f"{tmp_path / 'out'} is no release: why"

    @pytest.mark.parametrize("revision", [None, "main"])
    def test_a_base_that_is_not_pinned_is_refused(self, run: Path, tmp_path: Path, revision: str | None) -> None:
        best = Path(shutil.copytree(run / "best", tmp_path / "best"))
        config = json.loads((best / "config.json").read_text(encoding="utf-8"))
        config |= {"backbone": "user/base", "backbone_revision": revision}
        (best / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(
            ReleaseError, match=f"base user/base is at revision {revision!r}, maybe another base tomorrow"
        ):
            stage_release(best, None, tmp_path / "out", repo_id="user/faces")

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

    def test_a_path_inside_a_text_of_the_results_is_cut(self, run: Path, tmp_path: Path) -> None:
        content = json.loads((run / "results" / "results.json").read_text(encoding="utf-8"))
        content["results"][0]["warnings"] = [f"see {run / 'log.jsonl'}"]
        (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
        stage_release(run / "best", tmp_path / "results.json", tmp_path / "out")
        for name in ("README.md", "results.json"):
            text = (tmp_path / "out" / name).read_text(encoding="utf-8")
            assert "see log.jsonl" in text and str(run) not in text

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
    intruders = {name: torch.zeros(2, 2) for name in ("backbone.layernorm.weight", "head.weight")}
    save_file(tensors | intruders, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "photos").mkdir()
    (copy / "photos" / "0001.jpg").write_bytes(b"")
    (copy / "adapter_config.json").write_text("{}", encoding="utf-8")
    (copy / "LICENSE").unlink()
    (copy / "plots" / "face.png").write_bytes(b"")
    (copy / "plots" / "roc.png").write_bytes(bytes(release.OTHER_BYTES + 1))
    with pytest.raises(ReleaseError) as error:
        check_release(copy)
    for words in ("photos/0001.jpg must not", "adapter_config.json must not", "LICENSE is missing",
                  "backbone.layernorm.weight belongs to the base", "head.weight is no part", "plots/face.png must not",
                  "plots/roc.png has 4,000,001 bytes", "adapter_config.json must not"):  # fmt: skip
        assert words in str(error.value)


def _edit(file: Path, **values: object) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil/repo--modeling_adaptface.AdaptFaceModel"}}, "other code"),
        ("config.json", {"auto_map": None}, r"config.json asks for other code than that beside it \(auto_map\)"),
        ("preprocessor_config.json", {"auto_map": None}, "preprocessor_config.json asks for other code"),
        ("config.json", {"picture": "iVBORw0KGgo="}, "config.json has unknown fields: picture"),
        ("preprocessor_config.json", {"note": "x" * 999}, "preprocessor_config.json has unknown fields: note"),
        ("preprocessor_config.json", {"size": {"height": 112, "width": 112}}, "the model takes 56 px"),
        ("config.json", {"backbone": "user/other"}, "README.md names another base"),
        ("config.json", {"tensors_sha256": "0" * 64}, r"other tensors than config.json was saved with"),
    ],
)
def test_what_a_release_says_of_itself_is_compared(
    released: Path, tmp_path: Path, name: str, values: dict[str, object], words: str
) -> None:
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    card = (copy / "README.md").read_text(encoding="utf-8")
    (copy / "README.md").write_text(card.replace("---\n", "---\nbase_model: user/base\n", 1), encoding="utf-8")
    _edit(copy / "config.json", backbone="user/base")
    _edit(copy / name, **values)
    with pytest.raises(ReleaseError, match=words):
        check_release(copy)


def _with_header(file: Path, metadata: dict[str, str], padding: int = 0) -> None:
    content = save(load_file(file), metadata=metadata)
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size] + b" " * padding
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def test_the_header_of_the_weights_is_complete_and_no_hiding_place(released: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    for name in ("model.safetensors", "peft/adapter_model.safetensors"):
        with safe_open(released / name, framework="pt") as file:
            metadata = file.metadata()
        _with_header(copy / name, metadata, padding=release.HEADER_BYTES)
        with pytest.raises(ReleaseError, match=r"holds more than its tensors|is not the adapter of this model"):
            check_release(copy)
        shutil.copyfile(released / name, copy / name)
    _with_header(copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ReleaseError, match=r"the header of model.safetensors has format, not adaptface_version, "):
        check_release(copy)
    tensors = load_file(released / "model.safetensors")
    replace_tensors(copy, tensors | {"projection.bias": tensors["projection.bias"].float()})
    with pytest.raises(ReleaseError, match="has tensors of several precisions"):
        check_release(copy)


@pytest.mark.parametrize("name", ["LICENSE", "requirements.txt", "modeling_adaptface.py"])
def test_what_the_project_gives_to_a_release_is_unchanged_in_it(released: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    (copy / name).write_bytes((copy / name).read_bytes() + b"\n")
    with pytest.raises(ReleaseError, match=f"{name} is not that of this checkout; stage the release again"):
        check_release(copy)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("README.md", "", "README.md is no model card"),
        ("README.md", "---\nlibrary_name: transformers\n---\n[More Information Needed]", "README.md has a gap: "),
        ("README.md", "---\nlibrary_name: transformers\n---\ntrained on TBD", "README.md has a gap: 'TBD'"),
        ("results.json", "{}", "results.json is no file of eval_benchmarks.py"),
    ],
)
def test_a_card_and_results_are_read_again(released: Path, tmp_path: Path, name: str, text: str, words: str) -> None:
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    (copy / name).write_text(text, encoding="utf-8")
    with pytest.raises(ReleaseError, match=words.replace("[", r"\[")):
        check_release(copy)


def test_a_photo_is_no_plot(released: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    face = Image.new("RGB", (112, 112))
    said = PngInfo()
    said.add_text("Comment", "hf_" + "aB3" * 11)
    drawn, of_matplotlib, exif = copy / "plots" / "domain_usage.png", PngInfo(), Image.Exif()
    plot, exif[0x010E] = drawn.read_bytes(), "/home/someone"
    of_matplotlib.add_text("Software", "Matplotlib version 3")
    for write in (
        lambda: face.save(copy / "plots" / "roc.png", "JPEG"),
        lambda: face.save(copy / "plots" / "roc.png"),
        lambda: face.save(copy / "plots" / "roc.png", pnginfo=said),
        lambda: (copy / "plots" / "roc.png").write_bytes(b"PK"),
        lambda: (copy / "plots" / "roc.png").write_bytes(plot + b"hidden"),
        lambda: face.save(copy / "plots" / "roc.png", pnginfo=of_matplotlib, exif=exif),
    ):
        write()
        with pytest.raises(ReleaseError, match=r"plots/roc.png cannot be read \("):
            check_release(copy)


def test_a_link_is_not_followed(released: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    (copy / "plots" / "roc.png").unlink()
    (copy / "plots" / "roc.png").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ReleaseError, match=r"plots/roc.png is a link; a release holds files"):
        check_release(copy)


def test_every_tensor_must_be_one_of_the_model(released: Path, tmp_path: Path, tiny_backbone_dir: Path) -> None:
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    own, base = load_file(copy / "model.safetensors"), load_file(tiny_backbone_dir / "model.safetensors")
    key = "router.fc1.weight"
    for tensors, words in (
        (own | {"adapters.9.base": base["layernorm.weight"]}, "adapters.9.base is no part of the model"),
        (own | {key: torch.zeros(2, 2)}, f"{key} is not of the model's shape"),
        (own | {key: own[key] * torch.nan}, f"{key} is not of the model's shape, bfloat16 or float32, and finite"),
        (own | {key: own[key].half()}, f"{key} is not of"),
        ({name: own[name] for name in own if name != key}, f"{key} is missing"),
    ):
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ReleaseError, match=words):
            check_release(copy)
    (copy / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ReleaseError, match=r"config.json or model.safetensors cannot be read"):
        check_release(copy)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("peft", "peft/ is not the adapter of this model"),
        ("peft/experts/pose", "peft/experts/pose is not the adapter of this model"),
        ("peft/experts/base", "peft/experts/base/adapter_model.safetensors must not be in a release"),
    ],
)
def test_no_base_hides_among_the_adapters_for_peft(
    released: Path, tmp_path: Path, tiny_backbone_dir: Path, place: str, words: str
) -> None:
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    file = copy / place / "adapter_model.safetensors"
    file.parent.mkdir(exist_ok=True)
    own = load_file(file) if file.exists() else {}
    save_file(own | {"base": load_file(tiny_backbone_dir / "model.safetensors")["layernorm.weight"]}, file)
    with pytest.raises(ReleaseError, match=words):
        check_release(copy)
    (copy / "peft" / "adapter_model.safetensors").unlink()
    with pytest.raises(ReleaseError, match=r"peft/ holds no adapter that can be read"):
        check_release(copy)


@pytest.mark.parametrize(
    "token",
    [
        "xhf_" + "aB3" * 11, "api_org_" + "a" * 30, "ghp_" + "a" * 36, "github_pat_" + "a" * 30, "glpat-" + "a" * 20,
        "sk-" + "a" * 40, "xoxb-" + "1" * 24, "AKIA" + "A" * 16, "-----BEGIN RSA PRIVATE KEY", "https://me:pw@host/x",
        "WANDB_API_KEY=" + "a1" * 20,
    ],
)  # fmt: skip
def test_any_kind_of_token_is_found(released: Path, tmp_path: Path, token: str) -> None:
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    with open(copy / "README.md", "a", encoding="utf-8") as card:
        card.write(f"\nas {token} said\n")
    with pytest.raises(ReleaseError, match=r"README.md holds a token, .*\.\.\."):
        check_release(copy)


def test_the_home_folder_is_found_by_its_name_alone(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    with open(copy / "README.md", "a", encoding="utf-8") as card:
        card.write("\nmade in /quux\n")
    check_release(copy)
    monkeypatch.setenv("HOME", "/quux")
    with pytest.raises(ReleaseError, match=r"README.md holds a path of this machine in 'made in /quux'"):
        check_release(copy)


@pytest.mark.parametrize("name", ["results.json", "README.md", "modeling_adaptface.py", "model.safetensors"])
def test_a_token_is_found(released: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(released, tmp_path / "copy"))
    token = "hf_" + "aB3" * 11
    if name.endswith(".safetensors"):
        save_file(load_file(copy / name), copy / name, metadata={"format": "pt", "version": token})
    else:
        text = (copy / name).read_text(encoding="utf-8")
        changed = json.dumps(json.loads(text) | {"note": token}) if name.endswith(".json") else f"{text}\n# {token}\n"
        (copy / name).write_text(changed, encoding="utf-8")
    with pytest.raises(ReleaseError, match=f"{name} holds a token, hf_aB3...; take it out, and revoke it"):
        check_release(copy)


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
