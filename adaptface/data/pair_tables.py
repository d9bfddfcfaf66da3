"""Pair lists in a Hugging Face data set: two image columns and `same`, in parquet, saved to disk, or on the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from adaptface.data.base import problems, shown
from adaptface.data.pair_lists import OPTIONAL_COLUMNS, PairColumns
from adaptface.data.pairs import PairImages, PairSet, pair_set
from adaptface.data.synthetic import PARAMETERS_FILE
from adaptface.data.tables import column_cells, image_file, load_dataset

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_COLUMNS = (("image_a", "image_b"), ("img1", "img2"))
LABEL_COLUMNS = ("same", "label", "issame")
_CHUNK = 64  # rows whose images are in memory while the set is read


class _Cells(Sequence[Path | bytes]):
    """Cells of image columns, read from the table when they are asked for.

    Args:
        columns: a table of one column each.
        places (`np.ndarray` of shape `(M, 2)`): row and column of each cell.
    """

    def __init__(self, columns: Sequence[Dataset], places: np.ndarray) -> None:
        self._columns = columns
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Path | bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Path | bytes]: ...
    def __getitem__(self, index: int | slice) -> Path | bytes | Sequence[Path | bytes]:
        if isinstance(index, slice):
            return _Cells(self._columns, self._places[index])
        row, column = self._places[index].tolist()
        (cell,) = self._columns[column][row].values()
        return image_file(cell)


def load_pair_table(text: str, local: Path, split: str | None) -> PairSet:
    """Read a data set of pairs.

    The image columns are `image_a` and `image_b`, else `img1` and `img2`, else the only two of type `Image`; the label
    is `same`, else `label` or `issame`. Optional are fold, domain, group, and identity_a with identity_b, as in a CSV.
    Equal images are told by their content and listed once; none stays in memory.

    Args:
        text, local, split: see [`~tables.load_dataset`]. A split that is given is part of the set's name.
    Raises:
        FileNotFoundError, ConnectionError: see [`~tables.load_dataset`].
        ValueError: columns are missing or ambiguous, or cells empty or malformed; names row and column.
    """
    from datasets import Image as ImageFeature

    name, dataset = shown(text), load_dataset(text, local, split)
    image_columns = _image_columns(name, dataset)
    label = next((column for column in LABEL_COLUMNS if column in dataset.column_names), None)
    if label is None:
        raise ValueError(f"{name}: no column {', '.join(LABEL_COLUMNS)}, only {', '.join(dataset.column_names)}")
    values = {column: _texts(dataset, column) for column in OPTIONAL_COLUMNS if column in dataset.column_names}
    values["same"] = _texts(dataset, label)
    columns = PairColumns()
    rows = (dict(zip(values, cells, strict=True)) for cells in zip(*values.values(), strict=True))
    malformed = [f"row {row}: {problem}" for row, cells in enumerate(rows) if (problem := columns.add(cells))]

    # decode=False: a broken image then fails when it is opened, and the shipped processor decodes it
    images = [dataset.select_columns([column]) for column in image_columns]
    try:
        images = [table.cast_column(*table.column_names, ImageFeature(decode=False)) for table in images]
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: columns {' and '.join(image_columns)} do not hold images: {error}") from error
    index: dict[bytes, int] = {}  # digest of each distinct image
    places: list[tuple[int, int]] = []  # row and column of each
    names: list[str] = []
    indices = np.empty((len(dataset), 2), dtype=np.int64)
    for column, (table, title) in enumerate(zip(images, image_columns, strict=True)):
        for row, cell in enumerate(cell for chunk in table.iter(_CHUNK) for cell in chunk[title]):
            try:
                if not (content := image_file(cell)):
                    raise ValueError("the cell is empty")
                digest = hashlib.sha256(content.read_bytes() if isinstance(content, Path) else content).digest()
            except (OSError, ValueError) as error:
                malformed.append(f"row {row}, column {title!r}: {error}")
                continue
            if digest not in index:
                index[digest] = len(places)
                places.append((row, column))
                names.append(f"{name}, row {row}, column {title!r}")
            indices[row, column] = index[digest]
    if malformed:
        raise ValueError(f"{name}: {len(malformed)} malformed cells:{problems(malformed)}")
    return pair_set(
        text,
        PairImages(_Cells(images, np.array(places)), names),
        indices,
        name=local.stem + (f":{split}" if split else ""),
        synthetic=any((place / PARAMETERS_FILE).is_file() for place in (local, local.parent)),
        **columns.fields(),
    )


def _image_columns(name: str, dataset: Dataset) -> tuple[str, str]:
    for pair in IMAGE_COLUMNS:
        if {*pair} <= {*dataset.column_names}:
            return pair
    typed = [column for column in dataset.column_names if type(dataset.features[column]).__name__ == "Image"]
    if len(typed) != 2:
        expected = " or ".join(f"{a} and {b}" for a, b in IMAGE_COLUMNS)
        raise ValueError(
            f"{name}: cannot tell which columns hold the images; expected {expected}, or two of type Image, found "
            f"{', '.join(dataset.column_names)}"
        )
    return typed[0], typed[1]


def _texts(dataset: Dataset, column: str) -> list[str]:
    """A column's values as a CSV would spell them, empty where there is none; classes by name, but for a label's."""
    feature = dataset.features[column]
    values = column_cells(dataset, column).to_pylist()
    if type(feature).__name__ == "ClassLabel" and column not in LABEL_COLUMNS:
        values = [value if value is None else feature.int2str(value) for value in values]
    return ["" if value is None else str(value).strip() for value in values]
