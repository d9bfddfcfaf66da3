"""The `evaluate` module, loaded offline in a clean process that cannot import the package."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from adaptface.metrics import verification_report

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "evaluate_module" / "adaptface_verification"

CODE = """
import json, sys
class Blocked:
    def find_spec(name, *more):
        assert name != "adaptface", "the module imports the package"
sys.meta_path.insert(0, Blocked)
import evaluate
metric = evaluate.load(sys.argv[1])
given = json.load(sys.stdin)
results = {"plain": metric.compute(predictions=given["cosines"], references=given["same"])}
for start in range(0, len(given["same"]), 50):
    part = slice(start, start + 50)
    metric.add_batch(predictions=given["cosines"][part], references=given["same"][part])
results["all"] = metric.compute(folds=given["folds"], identities=given["identities"])
for name, changed in (("distances", {"predictions": [1.5, *given["cosines"][1:]]}),
                      ("labels", {"references": [*given["same"][:-1], 2]}),
                      ("classes", {"references": [1] * len(given["same"])})):
    try:
        metric.compute(**{"predictions": given["cosines"], "references": given["same"], **changed})
    except ValueError as error:
        results[name] = str(error)
json.dump(results, open(sys.argv[2], "w"))
"""


def test_its_metrics_are_those_of_the_package() -> None:
    """A link: there is one implementation. A checkout without links has a file that names the target."""
    assert (FOLDER / "metrics.py").resolve() == ROOT / "adaptface" / "metrics.py"


@pytest.mark.slow
def test_loads_offline_without_the_package_and_gives_the_report(tmp_path: Path) -> None:
    pytest.importorskip("evaluate", reason="evaluate is not installed: pip install 'adaptface[evaluate]'")
    if not (FOLDER / "metrics.py").is_symlink():
        pytest.skip("this checkout has no symbolic links, as on Windows: copy adaptface/metrics.py there")
    rng = np.random.default_rng(0)
    same = np.tile([True, False], 100)
    cosines = np.round(np.tanh(rng.normal(0.8 * same, 0.5)), 2)
    folds, identities = rng.permutation(200) % 5, rng.integers(0, 30, (200, 2))
    given = {"cosines": cosines, "same": same.astype(int), "folds": folds, "identities": identities}
    environment = {
        **os.environ,
        "HF_EVALUATE_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(FOLDER), str(tmp_path / "out.json")],
        input=json.dumps({name: values.tolist() for name, values in given.items()}),
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    distances = 2 - 2 * cosines
    assert results["plain"] == asdict(verification_report(distances, same))
    assert results["all"] == asdict(verification_report(distances, same, folds, identities=identities))
    assert "prediction 0 is 1.5, no cosine similarity of -1 to 1; give similarities" in results["distances"]
    assert "reference 199 is 2, not 1 (same person) or 0" in results["labels"]
    assert "all 200 pairs are genuine pairs" in results["classes"]
