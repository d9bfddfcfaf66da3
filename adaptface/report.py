"""Evaluation results as a file and as a table. `results.json` is the one place where scores live."""

from __future__ import annotations

import io
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from adaptface.files import write_text_atomically

RESULTS_FILE = "results.json"
PARTIAL_RESULTS_FILE = "results.partial.json"  # the rows of a run that has not ended
_PACKAGES = ("adaptface", "torch", "transformers", "numpy", "scikit-learn", "pillow", "onnxruntime")


def write_results(
    folder: str | Path, results: Sequence[dict[str, Any]], command: Sequence[str], name: str = RESULTS_FILE
) -> Path:
    """Write `results.json`, whole or not at all.

    Args:
        folder: created if it is not there.
        results: what `evaluate_pairs` returned, one an embedder and benchmark.
        command: the program and its arguments.
        name: of the file.
    Returns:
        path of the file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "versions": _versions(),
        "machine": {"platform": platform.platform(), "processor": _processor(), "cpus": os.cpu_count()},
        "results": list(results),
    }
    path = folder / name
    write_text_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return path


def average_results(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Plain means over benchmarks, of each embedder: over those about one domain, for each, and over all.

    Results on synthetic faces are averaged apart from the others.

    Args:
        results: what `evaluate_pairs` returned, one an embedder and benchmark.
    Returns:
        for each embedder and kind of data, in order of appearance, one dict a domain and one for all: `embedder` (its
        description), `data`, `domain` (None: all benchmarks, also those without a domain), `benchmarks` (names), and
        the means `accuracy`, `auc` and `eer`, as fractions.
    """
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        rows.setdefault((json.dumps(result["embedder"], sort_keys=True), result["data"]), []).append(result)
    averages = []
    for of_embedder in rows.values():
        domains = dict.fromkeys(row["domain"] for row in of_embedder if row["domain"] is not None)
        for domain in (*domains, None):
            members = [row for row in of_embedder if domain in (None, row["domain"])]
            averages.append(
                {
                    **{key: members[0][key] for key in ("embedder", "data")},
                    "domain": domain,
                    "benchmarks": [row["benchmark"] for row in members],
                    **{key: fmean(row[key] for row in members) for key in ("accuracy", "auc", "eer")},
                }
            )
    return averages


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux, where platform.processor() is empty
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def printable_output() -> None:
    """Let no print fail: what the console's encoding lacks (paths, `±`) is written as an escape, `\\u4eba`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """Results as plain text, one row an embedder and benchmark, then notes and warnings.

    Accuracies and rates are in percent. TAR@FAR is shown for the two lowest false accept rates that the set supports.
    """
    header = ["embedder", "benchmark", "data", "pairs", "folds", "accuracy", "AUC", "EER", "TAR@FAR", "img/s"]
    rows = []
    notes = []
    for result in results:
        rates = [f"{100 * rate['tar']:.2f}@{rate['far']:g}" for rate in result["tar_at_far"][-2:]]
        rows.append(
            [
                result["embedder"]["name"],
                result["benchmark"],
                result["data"],
                f"{result['pairs']:,}",
                str(len(result["fold_accuracies"])),
                f"{100 * result['accuracy']:.2f} ± {100 * result['accuracy_std']:.2f}",
                f"{result['auc']:.4f}",
                f"{100 * result['eer']:.2f}",
                " ".join(rates) or "-",
                f"{result['images_per_second']:.1f}",
            ]
        )
        for name, scores in (result["domains"] or {}).items():
            auc = "-" if scores["auc"] is None else f"{scores['auc']:.4f}"
            rows.append(
                ["", f"  {name}", "", f"{scores['pairs']:,}", "", f"{100 * scores['accuracy']:.2f}", auc, "", "", ""]
            )
        notes += [f"{result['benchmark']}: {warning}" for warning in result["warnings"]]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in
             [header, ["-" * width for width in widths], *rows]]  # fmt: skip
    lines.append(
        "accuracy: k-fold, mean ± population standard deviation over the folds, in %; EER and TAR in %; "
        "full protocol in results.json"
    )
    if any(result["data"] == "synthetic" for result in results):
        lines.append("synthetic: rendered faces, no people; such numbers say nothing about real faces")
    return "\n".join(lines + [f"warning: {note}" for note in dict.fromkeys(notes)])
