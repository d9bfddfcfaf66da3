"""Evaluation results as files and as tables. `results.json` is the one place where scores live."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
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


def embedder_key(embedder: dict[str, Any]) -> str:
    """What tells one embedder from another: all that it says of itself."""
    return json.dumps(embedder, sort_keys=True)


def short_names(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What people call each embedder: the shortest ends of the paths that tell all of them apart.

    `best`, or of two runs `a/best` and `b/best`; embedders of one path go by the first thing that they differ in, too.

    Args:
        results: what `evaluate_pairs` returned, one an embedder and benchmark.
    Returns:
        a name for each [`embedder_key`], in order of appearance.
    """
    embedders = {embedder_key(result["embedder"]): result["embedder"] for result in results}
    of_path: dict[Path, list[str]] = {}
    for key, embedder in embedders.items():
        of_path.setdefault(Path(embedder["name"]), []).append(key)
    lengths = range(1, 2 + max((len(path.parts) for path in of_path), default=0))
    ends = ({path: Path(*path.parts[-length:]).as_posix() for path in of_path} for length in lengths)
    end = next(found for found in ends if len(set(found.values())) == len(of_path))
    names: dict[str, str] = {}
    for path, keys in of_path.items():
        differences = _differences([embedders[key] for key in keys]) if len(keys) > 1 else [""]
        names |= {key: end[path] + difference for key, difference in zip(keys, differences, strict=True)}
    return {key: names[key] for key in embedders}


def _differences(embedders: Sequence[dict[str, Any]]) -> list[str]:
    """The first thing that all of them differ in, else their numbers."""
    for field in embedders[0]:
        values = [_words(embedder.get(field)) for embedder in embedders]
        if field != "name" and len(set(values)) == len(values):
            return [f" ({field} {value})" for value in values]
    return [f" ({number})" for number in range(1, len(embedders) + 1)]


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


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
        rows.setdefault((embedder_key(result["embedder"]), result["data"]), []).append(result)
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
_GIVEN = ("far", "fpir", "rank")  # what a rate is given at
_UNITS = (
    "accuracy: k-fold, mean ± population standard deviation over the folds, in %; EER and TAR in %; full protocol in "
    "results.json"
)
_SYNTHETIC = "synthetic: rendered faces, no people; such numbers say nothing about real faces"


def _rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Cells for people: a row an embedder and benchmark, below it one a part; then the means over benchmarks."""
    names = short_names(results)
    rows: list[dict[str, str]] = []
    for result in results:
        rates = [f"{100 * rate['tar']:.2f}@{rate['far']:g}" for rate in result["tar_at_far"][-2:]]
        speed = result["images_per_second"]
        row = {
            "embedder": names[embedder_key(result["embedder"])],
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
                    "embedder": names[embedder_key(average["embedder"])],
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
    """The table as `results.md`; the main numbers as `results.csv`, a row an embedder and benchmark; and every number
    as `results_long.csv`, a row each. Numbers of the CSV files are fractions.

    Returns:
        paths of the files.
    """
    lines = [_HEADER, ["---"] * len(_HEADER), *_rows(results)]
    table = ["| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in lines]
    markdown = "\n".join([*table, "", *(f"- {note}" for note in _notes(results))]) + "\n"
    files = {
        folder / "results.md": markdown,
        folder / "results.csv": _csv(_main_numbers(results)),
        folder / "results_long.csv": _csv(_all_numbers(results)),
    }
    for file, text in files.items():
        write_text_atomically(file, text)
    return list(files)


def _csv(rows: Iterator[list[Any]]) -> str:
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows(rows)
    return content.getvalue()


def _main_numbers(results: Sequence[dict[str, Any]]) -> Iterator[list[Any]]:
    names = short_names(results)
    fars = sorted({rate["far"] for result in results for rate in result["tar_at_far"]}, reverse=True)
    plain = ("benchmark", "data", "pairs", "genuine", "impostor", "images", "accuracy", "accuracy_std", "auc", "eer")
    intervals = ["accuracy_low", "accuracy_high", "auc_low", "auc_high"]
    yield ["embedder", *plain, *intervals, *(f"tar@far={far:g}" for far in fars)]
    for result in results:
        tars = {rate["far"]: rate["tar"] for rate in result["tar_at_far"]}
        ends = [end for key in ("accuracy_interval", "auc_interval") for end in result.get(key) or ("", "")]
        numbers = [*(result.get(key, "") for key in plain), *ends, *(tars.get(far, "") for far in fars)]
        yield [names[embedder_key(result["embedder"])], *numbers]


def _all_numbers(results: Sequence[dict[str, Any]]) -> Iterator[list[Any]]:
    names = short_names(results)
    yield ["embedder", "benchmark", "part", "metric", "at", "value", "low", "high"]
    for result in results:
        measured = {key: value for key, value in result.items() if key not in ("embedder", "protocol")}
        for row in _numbers(measured, (), ""):
            yield [names[embedder_key(result["embedder"])], result["benchmark"], *row]


def _numbers(found: dict[str, Any], part: tuple[str, ...], at: Any) -> Iterator[list[Any]]:
    """`part`, `metric`, `at`, `value`, `low`, `high` of each number in a mapping of `results.json`, however deep.

    Nothing is named here but what a rate is given at and how an interval is called: what evaluation adds comes along.
    """
    at = next((found[key] for key in _GIVEN if isinstance(found.get(key), int | float)), at)
    for key, value in found.items():
        if isinstance(value, dict):
            yield from _numbers(value, (*part, key), at)
        elif isinstance(value, list) and not key.endswith("_interval"):
            for place, item in enumerate(value):
                if isinstance(item, dict):
                    yield from _numbers(item, (*part, key), at)
                elif isinstance(item, int | float):
                    yield ["/".join(part), key, place, item, "", ""]
        elif isinstance(value, int | float) and key not in _GIVEN:
            ends = found.get(f"{key.removeprefix('measured_')}_interval") or ("", "")
            yield ["/".join(part), key, at, value, *("" if end is None else end for end in ends)]
