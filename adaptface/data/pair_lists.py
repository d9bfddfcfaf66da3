"""Pair lists as text: CSV with a header, BFW's table among them, or TXT of lines `image_a image_b 1|0`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptface.data.base import csv_rows, problems
from adaptface.data.pairs import PairSet, pairs_of_files

OPTIONAL_COLUMNS = ("fold", "domain", "group", "identity_a", "identity_b")
_LABELS = {"1": True, "true": True, "0": False, "false": False}
_BFW = {"p1": "image_a", "p2": "image_b", "label": "same", "id1": "identity_a", "id2": "identity_b"}


@dataclass
class PairColumns:
    """What rows of a list say about their pairs besides the images; see [`~pairs.pair_set`]."""

    same: list[bool] = field(default_factory=list)
    folds: list[int] = field(default_factory=list)
    domain: list[str] = field(default_factory=list)
    group: list[str] = field(default_factory=list)
    identity: list[tuple[str, str]] = field(default_factory=list)

    def add(self, values: dict[str, str]) -> str | None:
        """Append the fields of one row, all under the same names in all rows, or say what is wrong with them."""
        same = _LABELS.get(values["same"].lower())
        if same is None:
            return f"same is {values['same']!r}, not 1 or 0"
        if "fold" in values:
            if not (values["fold"].isdecimal() and len(values["fold"]) <= 9):
                return f"fold is {values['fold']!r}, not a whole number"
            self.folds.append(int(values["fold"]))
        if "domain" in values:
            if not values["domain"]:
                return "domain is empty"
            self.domain.append(values["domain"])
        if "group" in values:
            self.group.append(values["group"])
        if "identity_a" in values or "identity_b" in values:
            people = values.get("identity_a", ""), values.get("identity_b", "")
            if not all(people):
                return f"identity_{'b' if people[0] else 'a'} is empty"
            self.identity.append(people)
        self.same.append(same)
        return None

    def fields(self) -> dict[str, Any]:
        """Arguments for [`~pairs.pair_set`]; None for what the list does not give."""
        return {name: values or None for name, values in vars(self).items()}


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Line number with the fields of each line, or with what is wrong with it."""
    # surrogateescape: names of any encoding are compared byte by byte, as the file system gives them
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.suffix.lower() == ".txt":
            for number, text in enumerate(file, start=1):
                words = text.split()
                if len(words) == 3:
                    yield number, dict(zip(("image_a", "image_b", "same"), words, strict=True))
                elif words:
                    yield number, f"{len(words)} words instead of `image_a image_b 1|0`"
            return
        header, rows = csv_rows(file, skipinitialspace=True)
        is_bfw = {*_BFW, "att1", "att2"} <= set(header)
        if is_bfw:
            header = [_BFW.get(name, name) for name in header]
        if missing := {"image_a", "image_b", "same"} - set(header):
            raise ValueError(
                f"{path}: line 1 must name the columns image_a, image_b and same (and may name "
                f"{', '.join(OPTIONAL_COLUMNS)}); missing: {', '.join(sorted(missing))}"
            )
        for line, row in rows:
            if is_bfw and not isinstance(row, str):
                row = dict(zip(header, row.values(), strict=True))
                row["group"] = row["att1"] if row["att1"] == row["att2"] else ""
            yield line, row


def load_list(path: Path, folders: list[Path]) -> PairSet:
    """Read a `.csv` or `.txt`; its images are in that one of `folders` which holds the first of them.

    BFW's `bfw-v*-datatable.csv` is told by its header: `fold,p1,p2,label,id1,id2,att1,att2` and others. Its groups are
    the subgroups of both people (`asian_females`); a pair across two of them belongs to none: such impostors are easier
    to tell apart than those of one subgroup, which a group's false match rate is about.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: lines are malformed; all are counted, the first ones listed.
    Source: BFW: Robinson et al., Face Recognition: Too Bias, or Not Too Bias?, 2020; data/README.md of
        github.com/visionjo/facerec-bias-bfw.
    """
    columns, names, malformed = PairColumns(), [], []
    try:
        for line, row in _rows(path):
            if isinstance(row, str):
                malformed.append(f"line {line}: {row}")
                continue
            values = {key: value.strip() for key, value in row.items()}
            pair = values["image_a"].replace("\\", "/"), values["image_b"].replace("\\", "/")  # written on Windows
            if problem := columns.add(values) or ("" if all(pair) else "an image name is empty"):
                malformed.append(f"line {line}: {problem}")
            names.append(pair)
    except csv.Error as error:
        raise ValueError(f"{path}: not a CSV file, after {len(names)} pairs: {error}") from error
    if malformed:
        raise ValueError(f"{path}: {len(malformed)} malformed lines:{problems(malformed)}")
    if not names:
        raise ValueError(f"{path}: holds no pairs")
    return pairs_of_files(path, folders, names, **columns.fields())
