"""docs/tutorial.py, run whole, as a reader runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from adaptface.gallery import Gallery

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "docs/tutorial.py"


def test_it_is_in_cells_and_says_that_its_faces_are_synthetic() -> None:
    cells = TUTORIAL.read_text(encoding="utf-8").split("# %%")[1:]
    prose = [cell for cell in cells if cell.startswith(" [markdown]")]
    assert len(prose) >= 7 and len(cells) > len(prose)
    assert all(line.startswith("#") for cell in prose for line in cell.splitlines()[1:] if line)
    assert "All faces here are synthetic" in prose[0]


@pytest.mark.slow
def test_it_runs_and_makes_what_it_says(tmp_path: Path) -> None:
    work = tmp_path / "work"
    env = {**os.environ, "ADAPTFACE_TUTORIAL": str(work), "PYTHONPATH": str(ROOT), "ADAPTFACE_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(TUTORIAL)], cwd=tmp_path, env=env, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout

    pairs = re.findall(r"similarity (-?[\d.]+), threshold (-?[\d.]+), same person: (\w+) \(in truth: (\w+)\)", said)
    assert [truth for *_, truth in pairs] == ["True", "False"]
    for similarity, threshold, answer, _ in pairs:
        assert (float(similarity) > float(threshold)) is (answer == "True")
    assert "synthetic: rendered faces, no people" in said

    gallery = Gallery.load(work / "gallery.parquet")
    assert (len(gallery), gallery.templates) == (30, 120) and "enrolled: 30 people, 120 templates" in said
    counts = {
        what: tuple(map(int, found.groups()))
        for what in ("named rightly", "no match", "nearest without a threshold")
        if (found := re.search(rf"^{what}: (\d+) of (\d+) ", said, re.MULTILINE))
    }
    assert [of for _, of in counts.values()] == [30, 30, 30]
    # By chance one in thirty is nearest; five right by chance has a probability below 1 %.
    assert counts["nearest without a threshold"][0] >= 5
    assert counts["no match"][0] > 0

    for page in ("face.html", "faces.html"):
        text = (work / page).read_text(encoding="utf-8")
        assert all(expert in text for expert in ("general", "pose", "age")) and text.endswith("</html>\n")
    assert (work / "model.onnx").stat().st_size > 1e6
    assert float(re.findall(r"within ([\d.e-]+) \(cosine distance\)", said)[0]) < 1e-4
    release = work / "run/release"
    for file in (work / "peft/adapter_model.safetensors", release / "model.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert list(opened.keys())
    assert "synthetic" in (release / "README.md").read_text(encoding="utf-8")
