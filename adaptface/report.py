"""Evaluation results as files and as tables. `results.json` is the one place where scores live."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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


_HEADER = ["embedder", "benchmark", "data", "pairs", "folds", "accuracy", "AUC", "EER", "TAR@FAR", "img/s"]
_UNITS = (
    "accuracy: k-fold, mean ± population standard deviation over the folds, in %; EER and TAR in %; full protocol in "
    "results.json"
)
_SYNTHETIC = "synthetic: rendered faces, no people; such numbers say nothing about real faces"


def _rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Cells for people; a row an embedder and benchmark, and below it one a domain."""
    rows = []
    for result in results:
        rates = [f"{100 * rate['tar']:.2f}@{rate['far']:g}" for rate in result["tar_at_far"][-2:]]
        speed = result["images_per_second"]
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
                "-" if speed is None else f"{speed:.1f}",
            ]
        )
        for name, scores in (result["domains"] or {}).items():
            auc = "-" if scores["auc"] is None else f"{scores['auc']:.4f}"
            rows.append(
                ["", f"  {name}", "", f"{scores['pairs']:,}", "", f"{100 * scores['accuracy']:.2f}", auc, "", "", ""]
            )
    return rows


def _notes(results: Sequence[dict[str, Any]]) -> list[str]:
    notes = [_UNITS]
    if any(result["data"] == "synthetic" for result in results):
        notes.append(_SYNTHETIC)
    warnings = [f"warning: {result['benchmark']}: {text}" for result in results for text in result["warnings"]]
    return notes + list(dict.fromkeys(warnings))


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """Results as plain text, one row an embedder and benchmark, then notes and warnings.

    Accuracies and rates are in percent. TAR@FAR is shown for the two lowest false accept rates that the set supports.
    """
    rows = _rows(results)
    widths = [max(len(row[i]) for row in [_HEADER, *rows]) for i in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in
             [_HEADER, ["-" * width for width in widths], *rows]]  # fmt: skip
    return "\n".join(lines + _notes(results))


def write_tables(folder: Path, results: Sequence[dict[str, Any]]) -> list[Path]:
    """The table as `results.md`, and every number as `results.csv`: fractions, a row an embedder and benchmark.

    Returns:
        paths of the files.
    """
    lines = [_HEADER, ["---"] * len(_HEADER), *_rows(results)]
    table = ["| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in lines]
    markdown = "\n".join([*table, "", *(f"- {note}" for note in _notes(results))]) + "\n"
    content = io.StringIO()
    rates = sorted({rate["far"] for result in results for rate in result["tar_at_far"]}, reverse=True)
    plain = ("benchmark", "data", "pairs", "genuine", "impostor", "images", "accuracy", "accuracy_std", "auc", "eer")
    writer = csv.writer(content, lineterminator="\n")
    intervals = ["accuracy_low", "accuracy_high", "auc_low", "auc_high"]
    writer.writerow(["embedder", *plain, *intervals, *(f"tar@far={far:g}" for far in rates)])
    for result in results:
        tars = {rate["far"]: rate["tar"] for rate in result["tar_at_far"]}
        ends = [*result["accuracy_interval"], *(result["auc_interval"] or ["", ""])]
        numbers = [*(result[key] for key in plain), *ends, *(tars.get(far, "") for far in rates)]
        writer.writerow([result["embedder"]["name"], *numbers])
    files = {folder / "results.md": markdown, folder / "results.csv": content.getvalue()}
    for file, text in files.items():
        write_text_atomically(file, text)
    return list(files)
