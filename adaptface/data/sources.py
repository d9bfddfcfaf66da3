"""Training sources: what a path holds becomes a `FaceSource` of labelled face images.

    source = open_source("data/faces")                 # one folder an identity, metadata.csv optional
    source = open_source("data/faces.parquet")         # Hugging Face `datasets`: parquet, saved, imagefolder
    source = open_source("hf://user/faces", split="validation")

A source keeps arrays of labels and compact file names in memory and opens images one by one, so that it is
cheap to hold for 500,000 images and to send to spawned workers.
"""

import csv
import glob
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from adaptface.data.images import load_image

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_DOMAINS = ("general", "pose", "age")
UNLABELLED = -1

IMAGE_SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
NEIGHBOURS = (".csv", ".db", ".ini", ".json", ".lst", ".md", ".txt", ".yaml", ".yml")  # expected beside images
SPLIT_FOLDERS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test"))

FILE_COLUMNS = ("file", "file_name")  # the second is the name used by `datasets` imagefolder
IMAGE_COLUMNS = (("image",), ("img", "face", "picture", "jpg", "png"))  # before and after a look at the type
IDENTITY_COLUMNS = (("identity", "person", "label"), ("id",))  # "id" comes last: it may number the rows
DOMAIN_COLUMN = "domain"

SAVED_MARKS = ("dataset_dict.json", "state.json")  # left by save_to_disk

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class FaceSource(ABC):
    """Labelled face images. Labels are contiguous: holes and unused classes of the origin disappear.

    Args:
        name (`str`): what messages and logs call this source.
        identity_names (`Sequence[str]`): name of each identity code, in the order labels shall have.
        identity_codes (`np.ndarray` of shape `(N,)`): index into `identity_names`, one an image.
        domain_labels (`np.ndarray` of shape `(N,)`): index into `domains`, -1 where unlabelled.
        domains (`Sequence[str]`): domain names.
    Attributes:
        identities (`list[str]`): identity names; the index is the label.
        labels (`np.ndarray` of shape `(N,)`, int64): identity of each image, 0 .. len(identities) - 1.
        domain_labels (`np.ndarray` of shape `(N,)`, int64): domain of each image, -1 where unlabelled.
    Raises:
        ValueError: no image, or fewer than two identities (a margin loss needs a rival class).
    """

    def __init__(
        self,
        name: str,
        identity_names: Sequence[str],
        identity_codes: np.ndarray,
        domain_labels: np.ndarray,
        domains: Sequence[str],
    ):
        used, labels = np.unique(identity_codes, return_inverse=True)
        self.name = name
        self.identities = [_shown(identity_names[code]) for code in used]
        self.labels = labels.astype(np.int64)
        self.domain_labels = domain_labels.astype(np.int64)
        self.domains = tuple(domains)
        if not len(self):
            raise ValueError(f"{name}: holds no image")
        if len(self.identities) < 2:
            raise ValueError(
                f"{name}: all {len(self)} images belong to one identity, '{self.identities[0]}'; training "
                "needs two or more: give the folder that directly holds the identity folders, or check the labels"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The image as RGB, EXIF orientation applied.

        Raises:
            FileNotFoundError, ValueError: the image is missing, damaged or none; the message names it.
        """
        return load_image(self._encoded(index), self.where(index))

    @abstractmethod
    def where(self, index: int) -> str:
        """A printable name of an image, for messages."""

    @abstractmethod
    def _encoded(self, index: int) -> Path | bytes:
        """What the shipped processor's loader opens: the path or the bytes of an image file."""


def open_source(
    path: str | os.PathLike[str],
    metadata: str | os.PathLike[str] | None = None,
    split: str = "train",
    domains: Sequence[str] | None = DEFAULT_DOMAINS,
) -> FaceSource:
    """Open training faces, chosen by what `path` holds.

    Args:
        path: a folder of identity folders (or of train/validation/... folders of them); a parquet file or a
            folder of them; a dataset saved with `save_to_disk`; an imagefolder with metadata.jsonl/.parquet; a
            Hub dataset as `hf://user/name`, or as `user/name` where no such path exists.
        metadata: CSV of an image folder with the columns `file[,identity][,domain]`, others are ignored. Paths
            are relative to the folder, with forward slashes. `metadata.csv` inside the folder is found by itself.
            With an `identity` column the CSV must list every image, and wins over the folder names. An image
            that is not listed, or has an empty domain, carries no domain label.
        split: split of a dataset, or sub-folder of an image folder made of splits.
        domains: domain names; their order gives the domain labels, another name in the data is an error. None, for
            a model without a router: whatever names the data has, numbered as they turn up.
    Raises:
        FileNotFoundError: nothing at `path`, and no such dataset on the Hub.
        ConnectionError: the Hub cannot be reached and the dataset is not in the cache.
        ValueError: the data is empty, ambiguous or contradictory; the message names file and line, or row.
    """
    text = os.fspath(path)
    local = Path(text).expanduser()
    if not text.startswith("hf://") and local.exists():
        if local.is_dir() and not _is_dataset_folder(local):
            return FolderSource(local.absolute(), metadata, split, domains)
        if local.is_file() and local.suffix.lower() != ".parquet":
            raise ValueError(
                f"{_shown(local)}: is a file of an unknown kind; give a folder of identity folders, a .parquet "
                "file or a Hub dataset (a CSV belongs into `metadata`)"
            )
    if metadata is not None:
        raise ValueError(
            f"metadata={os.fspath(metadata)!r}: goes with an image folder only; {_shown(text)} carries its "
            "identities and domains as columns"
        )
    return DatasetsSource(_shown(text), _load_dataset(text, local, split), domains)


class FolderSource(FaceSource):
    """An image folder, one folder an identity; see `open_source` for the arguments.

    Labels and images follow the natural order of their names ("id_2" before "id_10") on every system. Images
    may lie deeper than one level; the first folder names the identity. Links to folders are followed.
    """

    def __init__(
        self, root: Path, metadata: str | os.PathLike[str] | None, split: str, domains: Sequence[str] | None
    ) -> None:
        root = _split_folder(root, split)
        files = _find_images(root)
        listed = root / "metadata.csv"
        numbers = _DomainNumbers(domains)
        table: dict[str, _Row] = {}
        if metadata is not None or listed.is_file():
            table = _read_metadata(Path(metadata) if metadata is not None else listed, root, set(files), numbers)
        identities = _identities(root, files, table)
        names = sorted(set(identities), key=_natural)
        code = {name: number for number, name in enumerate(names)}
        unlisted = _Row(None, UNLABELLED, 0)
        super().__init__(
            _shown(root),
            names,
            np.fromiter((code[name] for name in identities), np.int64, len(files)),
            np.fromiter((table.get(file, unlisted).domain for file in files), np.int64, len(files)),
            numbers.names,
        )
        self._root = root
        self._files = np.array([os.fsencode(file) for file in files])  # one block of bytes, no object an image

    def _encoded(self, index: int) -> Path:
        return self._root / os.fsdecode(bytes(self._files[index]))

    def where(self, index: int) -> str:
        return _shown(self._encoded(index))


class DatasetsSource(FaceSource):
    """Rows of a Hugging Face `datasets.Dataset`.

    The image column is `image`, else the only one of type `Image`, else one of a usual name. The identity column
    is `identity`, `person` or `label`, else the only `ClassLabel`, else `id`. The domain column is `domain`: names,
    or numbers into `domains`. Identities keep the order of their numbers, text is in natural order.
    """

    def __init__(self, name: str, dataset: "Dataset", domains: Sequence[str] | None):
        from datasets import Image as ImageFeature

        image = _pick(name, dataset, "Image", *IMAGE_COLUMNS)
        identity = _pick(name, dataset, "ClassLabel", *IDENTITY_COLUMNS)
        codes, names = _identity_codes(name, dataset, identity)
        numbers = _DomainNumbers(domains)
        domain_labels = np.full(len(dataset), UNLABELLED)
        if DOMAIN_COLUMN in dataset.column_names:
            domain_labels = _domain_labels(name, dataset, numbers)
        super().__init__(name, names, codes, domain_labels, numbers.names)
        # decode=False: a broken image then fails when it is opened, and the shipped processor decodes it
        self._rows = dataset.select_columns([image]).cast_column(image, ImageFeature(decode=False))
        self._column = image

    def _encoded(self, index: int) -> Path | bytes:
        row = self._rows[int(index)][self._column] or {"bytes": b""}
        return Path(row["path"]) if row["bytes"] is None else row["bytes"]

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}, column {self._column!r}"


# --- image folder -------------------------------------------------------------------------------------------


def _split_folder(root: Path, split: str) -> Path:
    """`root/split` where the folder is made of splits, else `root` (which is then all training data)."""
    folders = set(_folders(root))
    if folders and folders <= SPLIT_FOLDERS:
        if split not in folders:
            raise ValueError(f"{_shown(root)}: has no split {split!r}, only {', '.join(sorted(folders))}")
        return root / split
    if split != "train":
        raise ValueError(
            f"{_shown(root)}: is not divided into splits, so it has no {split!r}; give that part's own folder"
        )
    return root


def _folders(root: Path) -> list[str]:
    return [name for name in os.listdir(root) if not name.startswith(".") and (root / name).is_dir()]


def _find_images(root: Path) -> list[str]:
    """Images below `root` as relative paths with "/", in natural order; warns about what it leaves out."""
    images: list[str] = []
    strangers: list[str] = []

    def scan(folder: str, prefix: str, above: tuple[str, ...]) -> None:
        real = os.path.realpath(folder)
        if real in above:
            raise ValueError(f"{_shown(folder)}: a link that leads back to {_shown(real)}; remove the loop")
        for entry in sorted(os.scandir(folder), key=lambda entry: _natural(entry.name)):
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a link to itself
                raise ValueError(f"{_shown(entry.path)}: cannot be followed ({error.strerror})") from error
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            if is_folder:
                scan(entry.path, f"{prefix}{entry.name}/", (*above, real))
            elif suffix in IMAGE_SUFFIXES:
                images.append(prefix + entry.name)
            elif suffix not in NEIGHBOURS:
                strangers.append(prefix + entry.name)

    scan(os.fspath(root), "", ())
    if not images:
        raise ValueError(f"{_shown(root)}: holds no image ({' '.join(IMAGE_SUFFIXES)}); expected a folder an identity")
    if strangers:
        _warn(root, strangers, "files are no images and are left out")
    filled = {file.partition("/")[0] for file in images}
    empty = sorted((name for name in _folders(root) if name not in filled), key=_natural)
    if empty:
        _warn(root, empty, "identity folders hold no image and are left out")
    return images


def _identities(root: Path, files: list[str], table: "dict[str, _Row]") -> list[str]:
    """Identity name of each image: from the CSV where it has that column, else the first folder."""
    if any(row.identity is not None for row in table.values()):
        missing = [file for file in files if file not in table]
        if missing:
            raise ValueError(
                f"{_shown(root / missing[0])}: not listed in the metadata, nor are {len(missing) - 1} others; with an "
                "`identity` column every image must be listed"
            )
        return [str(table[file].identity) for file in files]
    loose = [file for file in files if "/" not in file]
    if loose:
        raise ValueError(
            f"{_shown(root / loose[0])}: lies outside any identity folder, like {len(loose) - 1} others; move it, or "
            "name its identity in a metadata CSV"
        )
    identities = [file.partition("/")[0] for file in files]
    folded: dict[str, str] = {}
    for name in dict.fromkeys(identities):
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(
                f"{_shown(root)}: the folders '{_shown(other)}' and '{_shown(name)}' differ by case only and would be "
                "one identity on other systems; rename or merge them"
            )
    return identities


class _Row(NamedTuple):
    identity: str | None
    domain: int
    line: int


def _read_metadata(path: Path, root: Path, files: set[str], domains: "_DomainNumbers") -> dict[str, _Row]:
    """Rows of the CSV by image file, checked against the images found."""
    if not path.is_file():
        raise FileNotFoundError(f"{_shown(path)}: no such metadata file")
    table: dict[str, _Row] = {}
    # surrogateescape: names of any encoding are compared byte by byte, as the file system gives them
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.DictReader(stream)
        columns = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        file_column = next((column for column in FILE_COLUMNS if column in columns), None)
        if file_column is None:
            raise ValueError(
                f"{_shown(path)}, line 1: no column 'file', only {_shown(', '.join(columns)) or 'nothing'}"
            )
        try:
            for record in reader:
                here = f"{_shown(path)}, line {reader.line_num}"
                if None in record or None in record.values():
                    raise ValueError(f"{here}: expected {len(columns)} fields, as in the header")
                file = record[file_column].replace("\\", "/").removeprefix("./")
                if file not in files:
                    raise ValueError(f"{here}: '{_shown(file)}' is no image of {_shown(root)}")
                if file in table:
                    raise ValueError(f"{here}: '{_shown(file)}' was listed before, on line {table[file].line}")
                identity = record.get("identity")
                if identity is not None and not identity.strip():
                    raise ValueError(f"{here}: '{_shown(file)}' has no identity")
                domain = domains.number(here, record.get(DOMAIN_COLUMN))
                table[file] = _Row(identity and identity.strip(), domain, reader.line_num)
        except csv.Error as error:
            raise ValueError(f"{_shown(path)}, line {reader.line_num}: {error}") from error
    if not table and "identity" in columns:
        raise ValueError(f"{_shown(path)}: has an `identity` column and no row; list every image, or drop the column")
    return table


# --- Hugging Face datasets ----------------------------------------------------------------------------------


def _is_dataset_folder(folder: Path) -> bool:
    """Whether `datasets` must read this folder: saved with save_to_disk, parquet, or metadata that is no CSV."""
    parts = [part for part in (folder, folder / "data", folder / "train") if part.is_dir()]
    marks = ("metadata.jsonl", "metadata.parquet", *SAVED_MARKS)
    return any((part / mark).is_file() for part in parts for mark in marks) or any(
        any(part.glob("*.parquet")) for part in parts
    )


def _load_dataset(text: str, local: Path, split: str) -> "Dataset":
    """One split of a local or Hub dataset, as a memory-mapped table."""
    import datasets

    remote = text.startswith("hf://") or not local.exists()
    hub_id = text.removeprefix("hf://").removeprefix("datasets/")
    origin = f"{_shown(text)}: " + ("" if not remote or text != hub_id else "no such path here, and as a Hub dataset: ")
    try:
        if remote:
            if not _HUB_ID.fullmatch(hub_id):
                raise FileNotFoundError("the name is not of the form user/name")
            return datasets.load_dataset(hub_id, split=split)
        if local.is_file():
            return datasets.Dataset.from_parquet(glob.escape(os.fspath(local)), split=split)
        if not any((local / mark).is_file() for mark in SAVED_MARKS):
            return datasets.load_dataset(os.fspath(local.absolute()), split=split)
        saved = datasets.load_from_disk(os.fspath(local))
        if isinstance(saved, datasets.Dataset):
            return saved
        if split not in saved:
            raise ValueError(f"has no split '{split}', only {', '.join(saved)}")
        return saved[split]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{origin}{error}") from error
    except ConnectionError as error:
        raise ConnectionError(f"{origin}{error}; connect, or give a local copy") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{origin}{error}") from error


def _pick(name: str, dataset: "Dataset", kind: str, first: Sequence[str], last: Sequence[str]) -> str:
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


def _factorise(name: str, dataset: "Dataset", column: str) -> tuple[np.ndarray, list[str | int | None]]:
    """Codes `(N,)` of a column, -1 for empty cells, and the value of each code in order (class labels as names)."""
    feature = dataset.features[column]
    kind = str(getattr(feature, "dtype", feature))
    if not kind.startswith(("int", "uint")) and kind not in ("string", "large_string"):
        raise ValueError(f"{name}: column '{column}' is of type {kind}; expected text, integers or ClassLabel")
    table = dataset.select_columns([column]).with_format("arrow")[:]
    encoded = table.column(column).combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    order = sorted(range(len(values)), key=lambda at: _natural(v) if isinstance(v := values[at], str) else v)
    rank = np.append(np.argsort(order), -1).astype(np.int64)  # the last entry serves code -1
    codes = rank[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    values = [values[at] for at in order]
    if type(feature).__name__ == "ClassLabel":
        values = [feature.names[value] if 0 <= value < feature.num_classes else None for value in values]
    return codes, values


def _identity_codes(name: str, dataset: "Dataset", column: str) -> tuple[np.ndarray, list[str]]:
    codes, values = _factorise(name, dataset, column)
    unknown = [-1, *(code for code, value in enumerate(values) if value in (None, ""))]
    nameless = np.isin(codes, unknown)
    if nameless.any():
        raise ValueError(f"{name}, row {nameless.argmax()}: column '{column}' names no identity; drop or label the row")
    return codes, [str(value) for value in values]


def _domain_labels(name: str, dataset: "Dataset", domains: "_DomainNumbers") -> np.ndarray:
    codes, values = _factorise(name, dataset, DOMAIN_COLUMN)
    numbers = [domains.number(f"{name}, row {(codes == code).argmax()}", value) for code, value in enumerate(values)]
    return np.array([*numbers, UNLABELLED])[codes]


# --- both ---------------------------------------------------------------------------------------------------


class _DomainNumbers:
    """Numbers of domains: of given names, or without any, of the names in the order in which they turn up."""

    def __init__(self, names: Sequence[str] | None):
        self.names = list(names or ())
        self._open = names is None

    def number(self, where: str, value: str | int | None) -> int:
        """Index of a domain given by name or number; empty and -1 mean unlabelled."""
        if isinstance(value, str):
            value = value.strip()
        if value in (None, "", UNLABELLED, str(UNLABELLED)):
            return UNLABELLED
        if self._open:
            value = str(value)
            if value not in self.names:
                self.names.append(value)
        elif isinstance(value, int) and 0 <= value < len(self.names):
            return value
        if value not in self.names:
            raise ValueError(
                f"{where}: domain '{_shown(str(value))}' is unknown; the configured domains are {', '.join(self.names)}"
            )
        return self.names.index(str(value))


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sort key that reads numbers as numbers: id_2 < id_10."""
    parts = re.split(r"([0-9]+)", name)  # text and digits alternate, so that keys are comparable
    return [int(part) if at % 2 else part for at, part in enumerate(parts)], name


def _shown(name: str | os.PathLike[str]) -> str:
    """A name that every terminal and log can print: undecodable bytes and control characters are escaped."""
    text = os.fspath(name)
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _warn(root: Path, names: list[str], what: str) -> None:
    warnings.warn(f"{_shown(root)}: {len(names)} {what}, first '{_shown(names[0])}'", stacklevel=2)
