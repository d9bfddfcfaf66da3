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
    for result in (row for row in results if "accuracy" in row):  # templates have none
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


_HEADER = ["embedder", "benchmark", "data", "pairs", "folds", "accuracy", "AUC", "EER", "TAR@FAR", "img/s"]
_UNITS = (
    "accuracy: k-fold, mean ± population standard deviation over the folds, in %; EER and TAR in %; full protocol in "
    "results.json"
)
_SYNTHETIC = "synthetic: rendered faces, no people; such numbers say nothing about real faces"


def _rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Cells for people: a row an embedder and benchmark, below it one a part; then the means over benchmarks."""
    rows: list[dict[str, str]] = []
    for result in results:
        rates = [f"{100 * rate['tar']:.2f}@{rate['far']:g}" for rate in result["tar_at_far"][-2:]]
        speed = result["images_per_second"]
        row = {
            "embedder": result["embedder"]["name"],
            "benchmark": result["benchmark"],
            "data": result["data"],
            "pairs": f"{result['pairs']:,}",
            "folds": "-",
            "accuracy": "-",
            "AUC": f"{result['auc']:.4f}",
            "EER": f"{100 * result['eer']:.2f}",
            "TAR@FAR": " ".join(rates) or "-",
            "img/s": "-" if speed is None else f"{speed:.1f}",
        }
        if "accuracy" in result:  # templates (IJB) have none
            row["folds"] = str(len(result["fold_accuracies"]))
            row["accuracy"] = f"{100 * result['accuracy']:.2f} ± {100 * result['accuracy_std']:.2f}"
        rows += [row, *_parts(result)]
    for average in average_results(results):
        if len(average["benchmarks"]) > 1:
            rows.append(
                {
                    "embedder": average["embedder"]["name"],
                    "benchmark": f"mean of {average['domain'] or 'all'} ({len(average['benchmarks'])})",
                    "data": average["data"],
                    "accuracy": f"{100 * average['accuracy']:.2f}",
                    "AUC": f"{average['auc']:.4f}",
                    "EER": f"{100 * average['eer']:.2f}",
                }
            )
    return [[row.get(column, "") for column in _HEADER] for row in rows]


def _parts(result: dict[str, Any]) -> list[dict[str, str]]:
    """Rows below that of a benchmark: domains, demographic groups and their gaps, identification of templates."""
    groups = result.get("groups") or {"scores": {}, "rates": []}
    rows = [
        {
            "benchmark": f"  {name}",
            "pairs": f"{scores['pairs']:,}",
            "accuracy": f"{100 * scores['accuracy']:.2f}",
            "AUC": "-" if scores["auc"] is None else f"{scores['auc']:.4f}",
        }
        for name, scores in [*(result["domains"] or {}).items(), *groups["scores"].items()]
    ]
    for rate in groups["rates"][-1:]:  # at the lowest false accept rate
        gaps = [(kind.upper(), rate[f"{kind}_difference"]) for kind in ("fmr", "fnmr")]
        text = ", ".join(f"{kind} differs by {100 * gap:.2f}" for kind, gap in gaps if gap is not None)
        rows.append({"benchmark": "  gap of groups", "TAR@FAR": f"{text}@{rate['far']:g}" if text else "-"})
    if found := result.get("identification"):
        rates = [f"rank-{row['rank']} {100 * row['rate']:.2f}" for row in found["mean"]["rank_rates"][:1]]
        rates += [f"TPIR {100 * row['tpir']:.2f}@{row['fpir']:g}" for row in found["mean"]["tpir_at_fpir"]]
        rows.append({"benchmark": f"  1:N, mean of {', '.join(found['galleries'])}", "TAR@FAR": " ".join(rates)})
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
        ends = [end for key in ("accuracy_interval", "auc_interval") for end in result.get(key) or ("", "")]
        numbers = [*(result.get(key, "") for key in plain), *ends, *(tars.get(far, "") for far in rates)]
        writer.writerow([result["embedder"]["name"], *numbers])
    files = {folder / "results.md": markdown, folder / "results.csv": content.getvalue()}
    for file, text in files.items():
        write_text_atomically(file, text)
    return list(files)
