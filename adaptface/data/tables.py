"""Training faces in a Hugging Face data set: an imagefolder, parquet, saved to disk, or on the Hub."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptface.data.base import (
    DOMAIN_COLUMN,
    UNLABELLED,
    DomainNumbers,
    FaceSource,
    check_content,
    label_fault,
    natural,
    shown,
)
from adaptface.data.lists import IDENTITY_COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from pyarrow import ChunkedArray

IMAGE_COLUMNS = (("image",), ("img", "face", "picture", "jpg", "png"))  # before and after a look at the type
SAVED_MARKS = ("dataset_dict.json", "state.json")  # left by save_to_disk

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class DatasetsSource(FaceSource):
    """Rows of a Hugging Face `datasets.Dataset`.

    The image column is `image`, else the only one of type `Image`, else one of a usual name. The identity column
    is `identity`, `person` or `label`, else the only `ClassLabel`, else `id`. The domain column is `domain`: names,
    or numbers into `domains`. Identities keep the order of their numbers, text is in natural order.
    """

    def __init__(self, name: str, dataset: "Dataset", domains: Sequence[str] | None):
        from datasets import Image as ImageFeature

        image, identity = face_columns(name, dataset)
        codes, names = identity_codes(name, identity, column_cells(dataset, identity), dataset.features[identity])
        numbers = DomainNumbers(domains)
        domain_labels = np.full(len(dataset), UNLABELLED)
        if DOMAIN_COLUMN in dataset.column_names:
            column, feature = column_cells(dataset, DOMAIN_COLUMN), dataset.features[DOMAIN_COLUMN]
            domain_labels = domain_codes(name, column, feature, numbers)
        super().__init__(name, names, codes, domain_labels, numbers.names)
        # decode=False: a broken image then fails when it is opened, and the shipped processor decodes it
        self._rows = dataset.select_columns([image]).cast_column(image, ImageFeature(decode=False))
        self._column = image

    def _encoded(self, index: int) -> Path | bytes:
        return image_file(self._rows[int(index)][self._column])

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}, column {self._column!r}"

    def key(self, index: int) -> str:
        return str(index)


def _parts(folder: Path) -> list[Path]:
    return [part for part in (folder, folder / "data", folder / "train") if part.is_dir()]


def is_dataset_folder(folder: Path) -> bool:
    """Whether `datasets` must read this folder: saved with save_to_disk, parquet, or metadata that is no CSV."""
    marks = ("metadata.jsonl", "metadata.parquet", *SAVED_MARKS)
    return any((part / mark).is_file() for part in _parts(folder) for mark in marks) or bool(parquet_files(folder))


def parquet_files(local: Path) -> list[Path]:
    """The parquet files that a path is or holds, where data sets have them."""
    if local.is_file():
        return [local] if local.suffix.lower() == ".parquet" else []
    return sorted(file for part in _parts(local) for file in part.glob("*.parquet") if file.is_file())


def load_dataset(text: str, local: Path, split: str | None, cache_dir: str | None = None) -> "Dataset":
    """One split of a local or Hub dataset, as a memory-mapped table (in `cache_dir`, else the user's cache).

    `split` None means the only one or, of several, `test`.
    """
    import datasets

    for file in parquet_files(local):
        check_content(file)
    with opening(text, local) as hub_id:
        if hub_id:
            split = split or _default_split(datasets.get_dataset_split_names(hub_id))
            return datasets.load_dataset(hub_id, split=split, cache_dir=cache_dir)
        if local.is_file():
            return datasets.Dataset.from_parquet(glob.escape(os.fspath(local)), split=split, cache_dir=cache_dir)
        if not any((local / mark).is_file() for mark in SAVED_MARKS):
            folder = os.fspath(local.absolute())
            split = split or _default_split(datasets.get_dataset_split_names(folder))
            return datasets.load_dataset(folder, split=split, cache_dir=cache_dir)
        try:
            saved = datasets.load_from_disk(os.fspath(local))
        except (IndexError, ZeroDivisionError) as error:  # of a set without shards
            raise ValueError("it was saved without any rows") from error
        if isinstance(saved, datasets.Dataset):
            return saved
        split = split or _default_split(list(saved))
        if split not in saved:
            raise ValueError(f"has no split '{split}', only {', '.join(saved)}")
        return saved[split]


@contextmanager
def opening(text: str, local: Path) -> Iterator[str | None]:
    """Yields the id of a dataset that is on the Hub, None for a local one; errors inside name where it was sought."""
    import datasets

    remote = text.startswith("hf://") or not local.exists()
    hub_id = text.removeprefix("hf://").removeprefix("datasets/")
    origin = f"{shown(text)}: " + ("" if not remote or text != hub_id else "no such path here, and as a Hub dataset: ")
    try:
        if remote and not HUB_ID.fullmatch(hub_id):
            raise FileNotFoundError("the name is not of the form user/name")
        yield hub_id if remote else None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{origin}{error}") from error
    except ConnectionError as error:
        raise ConnectionError(f"{origin}{error}; connect, or give a local copy") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{origin}{error}") from error


def _default_split(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else "test"


def face_columns(name: str, dataset: "Dataset | IterableDataset") -> tuple[str, str]:
    """The columns of images and of identities; see `DatasetsSource`."""
    image = _pick(name, dataset, "Image", *IMAGE_COLUMNS)
    return image, _pick(name, dataset, "ClassLabel", IDENTITY_COLUMNS, ("id",))  # "id" last: it may number the rows


def image_file(cell: dict[str, Any] | None) -> Path | bytes:
    """What an undecoded cell of an image column holds: the bytes of a file (none of an empty cell), or its path."""
    cell = cell or {}
    return Path(cell["path"]) if cell.get("path") and not cell.get("bytes") else cell.get("bytes") or b""


def column_cells(dataset: "Dataset", column: str) -> "ChunkedArray":
    """A whole column, as the table has it."""
    return dataset.select_columns([column]).with_format("arrow")[:].column(column)


def _pick(name: str, dataset: "Dataset | IterableDataset", kind: str, first: Sequence[str], last: Sequence[str]) -> str:
    """The column with a name of `first`, else the only one of feature type `kind`, else a name of `last`."""
    columns = [column for column in dataset.column_names if column != DOMAIN_COLUMN]
    typed = [column for column in columns if type(dataset.features[column]).__name__ == kind]
    candidates = (*first, *(typed if len(typed) == 1 else ()), *last)
    for column in candidates:
        if column in columns:
            return column
    raise ValueError(
        f"{name}: cannot tell which column holds the {'images' if kind == 'Image' else 'identities'}; expected one "
        f"named {', '.join((*first, *last))}, or a single one of type {kind}, found {', '.join(dataset.column_names)}"
    )


def _factorise(
    name: str, column: str, cells: "ChunkedArray", feature: Any
) -> tuple[np.ndarray, list[str | int | None]]:
    """Codes `(N,)` of a column, -1 for empty cells, and the value of each code in order (class labels as names)."""
    kind = str(getattr(feature, "dtype", feature))
    if not kind.startswith(("int", "uint")) and kind not in ("string", "large_string"):
        raise ValueError(f"{name}: column '{column}' is of type {kind}; expected text, integers or ClassLabel")
    encoded = cells.combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    order = sorted(range(len(values)), key=lambda at: natural(v) if isinstance(v := values[at], str) else v)
    rank = np.append(np.argsort(order), -1).astype(np.int64)  # the last entry serves code -1
    codes = rank[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    values = [values[at] for at in order]
    if type(feature).__name__ == "ClassLabel":
        values = [feature.names[value] if 0 <= value < feature.num_classes else None for value in values]
    return codes, values


def identity_codes(name: str, column: str, cells: "ChunkedArray", feature: Any) -> tuple[np.ndarray, list[str]]:
    """The identity of each row as an index into the names that are returned with it; refuses rows without one."""
    codes, values = _factorise(name, column, cells, feature)
    unknown = [-1, *(code for code, value in enumerate(values) if value in (None, ""))]
    nameless = np.isin(codes, unknown)
    if nameless.any():
        raise ValueError(f"{name}, row {nameless.argmax()}: column '{column}' names no identity; drop or label the row")
    names = [str(value) for value in values]
    if fault := label_fault(names):
        row = (codes == fault[0]).argmax()
        raise ValueError(f"{name}, row {row}: column '{column}': {fault[1]}")
    return codes, names


def domain_codes(name: str, cells: "ChunkedArray", feature: Any, domains: DomainNumbers) -> np.ndarray:
    """The domain number of each row, -1 where it has none."""
    codes, values = _factorise(name, DOMAIN_COLUMN, cells, feature)
    numbers = [domains.number(f"{name}, row {(codes == code).argmax()}", value) for code, value in enumerate(values)]
    return np.array([*numbers, UNLABELLED])[codes]
