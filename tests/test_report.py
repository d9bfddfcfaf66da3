"""Averages over benchmarks, names of embedders, and every number in a table."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptface.metrics import (
    Searches,
    contiguous_folds,
    group_error_rates,
    group_scores,
    identification_report,
    verification_report,
)
from adaptface.report import average_results, embedder_key, short_names, write_tables


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


@pytest.mark.parametrize(
    ("embedders", "names"),
    [
        ([], []),
        ([{"name": "runs/x/best"}], ["best"]),
        (
            [{"name": "runs/a/best"}, {"name": "runs/b/best"}, {"name": "peer.onnx"}],
            ["a/best", "b/best", "peer.onnx"],
        ),
        ([{"name": "/p.onnx"}, {"name": "p.onnx"}], ["/p.onnx", "p.onnx"]),
        (
            [{"kind": "adaptface", "name": "runs/a"}, {"kind": "zero-shot backbone", "name": "./runs/a/"}],
            ["a (kind adaptface)", "a (kind zero-shot backbone)"],
        ),
        (
            [{"kind": "onnx", "name": "p", "image_mean": [m] * 3} for m in (0.0, 0.5)],
            ["p (image_mean 0.0 0.0 0.0)", "p (image_mean 0.5 0.5 0.5)"],
        ),
        (
            [{"name": "p", "x": x, "y": y} for x, y in ((0, 0), (0, 1), (1, 1))],
            ["p (1)", "p (2)", "p (3)"],
        ),
    ],
)
def test_names_are_short_and_tell_embedders_apart(embedders: list[dict[str, Any]], names: list[str]) -> None:
    found = short_names([{"embedder": embedder} for embedder in (*embedders, *embedders)])
    assert list(found.values()) == names
    assert list(found) == [embedder_key(embedder) for embedder in embedders]


def numbers(content: Any) -> list[float]:
    """All numbers of a JSON-ready structure."""
    if isinstance(content, dict):
        return [number for value in content.values() for number in numbers(value)]
    if isinstance(content, list):
        return [number for value in content for number in numbers(value)]
    return [float(content)] if isinstance(content, int | float) else []


def test_every_number_is_in_the_long_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    same = np.arange(400) % 2 == 1
    distances, folds = np.where(same, rng.uniform(0, 2, 400), rng.uniform(1, 4, 400)), contiguous_folds(400)
    report = vars(verification_report(distances, same, folds))
    groups = np.array(["north", "far"])[rng.integers(0, 2, 400)]  # a group may be called like a column
    searches = Searches(rng.random(50), rng.integers(1, 9, 50), rng.random(40))
    found = {
        "embedder": {"name": "runs/x/best", "image_size": 12345}, "benchmark": "all", "domain": None,
        "data": "unspecified", "protocol": {"folds": 12345}, "images": 700, "warnings": ["12345"],
        **report, "images_per_second": None, "domains": None,
        "groups": {
            "scores": group_scores(distances, same, folds, report["fold_thresholds"], groups),
            "rates": group_error_rates(distances, same, groups, report["tar_at_far"]),
        },
        "identification": {"galleries": {"G1": vars(identification_report(searches, 30))}, "mean": {
            "rank_rates": [{"rank": 1, "rate": 0.25}], "tpir_at_fpir": [{"fpir": 0.1, "tpir": 0.125}]}},
    }  # fmt: skip
    text = write_tables(tmp_path, [found])[2].read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    shown = {float(row[column]) for row in rows for column in ("at", "value", "low", "high") if row[column]}
    expected = set(numbers({key: value for key, value in found.items() if key not in ("embedder", "protocol")}))
    assert len(expected) > 80 and expected <= shown and 12345 not in shown
    by = {(row["part"], row["metric"], row["at"]): row for row in rows}
    assert len(by) == len(rows), "one row a number"
    assert all(row["embedder"] == "best" and row["benchmark"] == "all" for row in rows)

    def cells(*key: str) -> list[float]:
        return [float(by[key][column]) for column in ("value", "low", "high")]

    assert cells("", "accuracy", "") == [report["accuracy"], *report["accuracy_interval"]]
    point = report["tar_at_far"][0]
    assert cells("tar_at_far", "tar", "0.1") == [point["tar"], *point["tar_interval"]]
    assert cells("tar_at_far", "measured_far", "0.1") == [point["measured_far"], *point["far_interval"]]
    assert by["identification/mean/rank_rates", "rate", "1"]["value"] == "0.25"
    assert by["identification/mean/tpir_at_fpir", "tpir", "0.1"]["value"] == "0.125"
    rate = found["groups"]["rates"][0]
    assert cells("groups/rates/groups/far", "fnmr", "0.1")[0] == rate["groups"]["far"]["fnmr"]
    assert float(by["groups/rates", "fnmr_difference", "0.1"]["value"]) == rate["fnmr_difference"]
    assert float(by["", "fold_accuracies", "3"]["value"]) == report["fold_accuracies"][3]
