"""Models of earlier versions: they load as they were, with their own code and with today's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import modeling_adaptface
from image_processing_adaptface import AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel
from tests.conftest import oldest_python

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = sorted((ROOT / "tests" / "fixtures").glob("release-*"))


@pytest.fixture(params=FIXTURES, ids=lambda path: path.name)
def earlier(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a release of an earlier version, `release`, that finds its base; `expected.npz` beside it."""
    copy = Path(shutil.copytree(request.param, tmp_path / "earlier"))
    config = json.loads((copy / "release" / "config.json").read_text(encoding="utf-8"))
    config["backbone"] = str(copy / "base")
    (copy / "release" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def pictures() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)


def test_there_is_one() -> None:
    assert FIXTURES


def test_todays_code_loads_it_to_the_bit(earlier: Path, tmp_path: Path) -> None:
    model, info = AdaptFaceModel.from_pretrained(earlier / "release", output_loading_info=True)
    assert not any(info.values())
    stored, loaded = load_file(earlier / "release" / "model.safetensors"), model.state_dict()
    assert {name for name in loaded if not name.startswith("backbone.")} == stored.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
    processor = AdaptFaceImageProcessor.from_pretrained(earlier / "release")
    with torch.no_grad():
        output = model(processor(list(pictures()))["pixel_values"])
    expected = np.load(earlier / "expected.npz")
    assert np.abs(expected["embeddings"][0] - expected["embeddings"][1]).max() > 1e-2, "pictures differ"
    np.testing.assert_allclose(output.pooler_output.numpy(), expected["embeddings"], atol=1e-6)
    np.testing.assert_allclose(output.domain_weights.numpy(), expected["domain_weights"], atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)


@pytest.mark.parametrize("transformers", ["this", pytest.param("oldest", marks=pytest.mark.slow)])
def test_its_own_code_still_runs(earlier: Path, tmp_path: Path, transformers: str) -> None:
    np.save(tmp_path / "images.npy", pictures())
    words = [str(earlier / "release"), str(tmp_path / "images.npy"), str(tmp_path / "found.npz")]
    script = ROOT / "adaptface" / "clean_load.py"
    python = sys.executable if transformers == "this" else oldest_python()
    done = subprocess.run(
        [python, "-P", str(script), *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = np.load(earlier / "expected.npz")["embeddings"]
    np.testing.assert_allclose(np.load(tmp_path / "found.npz")["embeddings"], expected, atol=1e-6)


def test_renamed_weights_load_and_are_saved_under_their_new_names(
    earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was renamed yet: a file with other names stands for one from before a renaming."""
    file = earlier / "release" / "model.safetensors"
    now = load_file(file)
    before = {re.sub(r"\.lora_A$", ".down", name.replace("router.fc1", "router.hidden")): now[name] for name in now}
    assert len(before.keys() - now.keys()) > 5
    save_file(before, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights do not fit config.json \(missing keys: adapters.0"):
        AdaptFaceModel.from_pretrained(earlier / "release")
    renamed = {r"^router\.hidden\.": "router.fc1.", r"\.down$": ".lora_A"}
    monkeypatch.setattr(modeling_adaptface, "RENAMED_KEYS", renamed)
    model = AdaptFaceModel.from_pretrained(earlier / "release")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in now.items())
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == now.keys() and all(torch.equal(again[name], now[name]) for name in now)
    assert AdaptFaceModel.from_pretrained(tmp_path / "again").config.domains == model.config.domains
