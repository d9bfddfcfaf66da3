"""The README's main command, from rendering to a release, and what it promises of the embedded faces."""

import json
import sys
from pathlib import Path

import pytest

import dev


@pytest.mark.slow
def test_quickstart_learns_and_ends_with_a_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faces are hard enough that the untrained base is below 75 %, and the trained model is well above it."""
    run = tmp_path / "run"
    monkeypatch.setattr(dev, "python_of", lambda environment: Path(sys.executable))
    monkeypatch.setattr(dev, "RUN", str(run))
    dev.quickstart()
    results = json.loads((run / "results" / "results.json").read_text(encoding="utf-8"))["results"]
    trained, untrained = results
    assert (trained["embedder"]["kind"], untrained["embedder"]["kind"]) == ("adaptface", "zero-shot backbone")
    assert all(row["data"] == "synthetic" and row["pairs"] == 600 for row in results)
    # 600 pairs: one standard error is 1.6 points at 80 %.
    assert untrained["accuracy"] < 0.70 and trained["accuracy"] > 0.79 and trained["auc"] > 0.85
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in (run / "release").iterdir()}
