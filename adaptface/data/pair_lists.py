"""Pair lists as text: CSV with a header, or TXT of lines `image_a image_b 1|0`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from adaptface.data.base import problems
from adaptface.data.pairs import PairSet, pairs_of_files

_LABELS = {"1": True, "true": True, "0": False, "false": False}


@dataclass
class _Columns:
    names: list[tuple[str, str]] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    folds: list[int] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str | None] | str]]:
    """Line number with the fields of each line, or with what is wrong with it."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".txt":
            for number, line in enumerate(file, start=1):
                words = line.split()
                if len(words) == 3:
                    yield number, dict(zip(("image_a", "image_b", "same"), words, strict=True))
                elif words:
                    yield number, f"{len(words)} words instead of `image_a image_b 1|0`"
            return
        reader = csv.DictReader(file, skipinitialspace=True)
        header = reader.fieldnames or []
        if missing := {"image_a", "image_b", "same"} - set(header):
            raise ValueError(
                f"{path}: line 1 must name the columns image_a, image_b and same (and may name fold and domain); "
                f"missing: {', '.join(sorted(missing))}"
            )
        for row in reader:
            fits = None not in row and None not in row.values()
            yield reader.line_num, row if fits else f"not {len(header)} fields as in the header"


def load_list(path: Path, folders: list[Path]) -> PairSet:
    """Read a `.csv` or `.txt`; its images are in that one of `folders` which holds the first of them."""
    columns, malformed = _Columns(), []
    try:
        for line, row in _rows(path):
            problem = row if isinstance(row, str) else _add_row(columns, row)
            if problem:
                malformed.append(f"line {line}: {problem}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}; save the list as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from error
    if malformed:
        raise ValueError(f"{path}: {len(malformed)} malformed lines:{problems(malformed)}")
    if not columns.names:
        raise ValueError(f"{path}: holds no pairs")

    return pairs_of_files(
        path,
        folders,
        columns.names,
        columns.same,
        np.array(columns.folds, dtype=np.int64) if columns.folds else None,
        columns.domains or None,
    )


def _add_row(columns: _Columns, row: dict[str, str | None]) -> str | None:
    """Append one line's fields, or say what is wrong with them."""
    values = {key: (value or "").strip() for key, value in row.items()}
    same = _LABELS.get(values["same"].lower())
    if same is None:
        return f"same is {values['same']!r}, not 1 or 0"
    if not values["image_a"] or not values["image_b"]:
        return "an image name is empty"
    if "fold" in values:
        if not (values["fold"].isdecimal() and len(values["fold"]) <= 9):
            return f"fold is {values['fold']!r}, not a whole number"
        columns.folds.append(int(values["fold"]))
    if "domain" in values:
        if not values["domain"]:
            return "domain is empty"
        columns.domains.append(values["domain"])
    image_a, image_b = (values[key].replace("\\", "/") for key in ("image_a", "image_b"))  # written on Windows
    columns.names.append((image_a, image_b))
    columns.same.append(same)
    return None
