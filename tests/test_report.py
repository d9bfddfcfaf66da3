"""Averages over benchmarks."""

import pytest

from adaptface.report import average_results


def result(name: str, benchmark: str, domain: str | None, accuracy: float, data: str = "unspecified") -> dict:
    embedder = {"kind": "fake", "name": name}
    return {"embedder": embedder, "benchmark": benchmark, "domain": domain, "data": data,
            "accuracy": accuracy, "auc": accuracy / 2, "eer": 1 - accuracy}  # fmt: skip


def test_averages_by_domain_and_over_all() -> None:
    rows = average_results(
        [
            result("a", "lfw", "general", 0.9),
            result("b", "lfw", "general", 0.5),
            result("a", "agedb_30", "age", 0.6),
            result("a", "mine", None, 0.1),
            result("a", "calfw", "age", 0.8),
            result("a", "synthetic", None, 0.99, "synthetic"),
        ]
    )
    found = {(row["embedder"]["name"], row["data"], row["domain"]): row for row in rows}
    assert len(found) == len(rows) == 6
    assert found["a", "unspecified", "age"]["benchmarks"] == ["agedb_30", "calfw"]
    assert found["a", "unspecified", "age"]["accuracy"] == pytest.approx(0.7)
    assert found["a", "unspecified", "age"]["auc"] == pytest.approx(0.35)
    assert found["a", "unspecified", "age"]["eer"] == pytest.approx(0.3)
    assert found["a", "unspecified", "general"]["accuracy"] == 0.9
    assert found["a", "unspecified", None]["accuracy"] == pytest.approx((0.9 + 0.6 + 0.1 + 0.8) / 4)
    assert found["a", "unspecified", None]["benchmarks"] == ["lfw", "agedb_30", "mine", "calfw"]
    assert found["b", "unspecified", None]["accuracy"] == 0.5
    assert found["a", "synthetic", None]["benchmarks"] == ["synthetic"], "not among the others"
    assert average_results([]) == []
