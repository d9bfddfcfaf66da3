"""Verification pair lists: CSV/TXT files with an image folder, and insightface `.bin` files.

Whatever the format, a list becomes a [`PairSet`]: each distinct image once, opened when it is asked for, and two
index arrays. A `.bin` is a pickle from a stranger. It is never unpickled: `_read_pickle` interprets the few opcodes
the format uses, on bytes, numbers, lists, tuples and flat arrays, and can neither import nor call anything.
"""

from __future__ import annotations

import csv
import hashlib
import mmap
import pickletools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from PIL import Image

from adaptface.data.images import load_image
from adaptface.data.synthetic import PARAMETERS_FILE
from adaptface.metrics import contiguous_folds, suspect_folds

_LABELS = {"1": True, "true": True, "0": False, "false": False}
_SHOWN = 20  # problems listed in one message; the rest is counted


class PairImages:
    """The distinct images of a pair list, decoded to RGB each time one is asked for.

    Args:
        items: a file path or the bytes of an encoded image, each.
        names: what to call each image in messages.
    """

    def __init__(self, items: Sequence[Path | bytes], names: Sequence[str]) -> None:
        self.items = items
        self.names = names

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Image.Image:
        return load_image(self.items[index], self.where(index))

    def encoded(self, index: int) -> bytes:
        """The image file as it is, not decoded."""
        item = self.items[index]
        return item.read_bytes() if isinstance(item, Path) else item

    def where(self, index: int) -> str:
        """Name of an image for messages: its path, or its place in the `.bin` file."""
        return self.names[index]


@dataclass(frozen=True)
class PairSet:
    """A verification benchmark: pair i compares `images[index_a[i]]` with `images[index_b[i]]`.

    Attributes:
        name: file name without its suffix.
        images: distinct images, opened lazily; `images.where(i)` names one.
        index_a, index_b (`np.ndarray` of shape `(N,)`): int64 indices into `images`.
        same (`np.ndarray` of shape `(N,)`): True for genuine pairs.
        folds (`np.ndarray` of shape `(N,)`): fold number of each pair.
        protocol: how the folds came about, for reports.
        domain: domain name of each pair, where the list gives one.
        synthetic: rendered faces (their parameters lie beside the list or its images); results must be called so.
    """

    name: str
    images: PairImages
    index_a: np.ndarray
    index_b: np.ndarray
    same: np.ndarray
    folds: np.ndarray
    protocol: str
    domain: np.ndarray | None = None
    synthetic: bool = False

    def __len__(self) -> int:
        return len(self.same)

    def _keys(self) -> np.ndarray:
        """One number for each unordered pair of images, shape `(N,)`."""
        low, high = np.minimum(self.index_a, self.index_b), np.maximum(self.index_a, self.index_b)
        return low * len(self.images) + high

    def suspect_labels(self) -> list[str]:
        """Signs that labels are wrong: unbalanced folds, a pair with both labels, an image unlike itself."""
        problems = suspect_folds(self.same, self.folds)
        conflicts = len(np.intersect1d(self._keys()[self.same], self._keys()[~self.same]))
        if conflicts:
            problems.append(f"{conflicts} pairs are listed both as genuine and as impostor")
        if selves := int(np.count_nonzero((self.index_a == self.index_b) & ~self.same)):
            problems.append(f"{selves} impostor pairs compare an image with itself")
        return problems

    def notes(self) -> list[str]:
        """Harmless oddities worth a line in a report: repeated pairs, images compared with themselves."""
        notes = []
        if repeated := len(self) - len(np.unique(self._keys())):
            notes.append(f"{repeated} pairs repeat an earlier pair")
        if selves := int(np.count_nonzero((self.index_a == self.index_b) & self.same)):
            notes.append(f"{selves} genuine pairs compare an image with itself")
        return notes


def load_pairs(path: str | Path, images: str | Path | None = None) -> PairSet:
    """Read a pair list.

    Args:
        path: by its suffix:
            `.csv`: a header naming image_a, image_b, same (1/0) and optionally fold (a whole number) and domain.
            `.txt`: lines `image_a image_b 1|0`, without a header.
            `.bin`: insightface's pickled `(images, labels)`.
        images: folder that the image paths of a `.csv` or `.txt` are relative to. Default: the folder beside the list
            that is called like it without `_pairs`, or the list's own folder: where the first image is.
    Returns:
        [`PairSet`]. Without a fold column the folds are ten equal contiguous blocks.
    Raises:
        FileNotFoundError: no such list, or images are missing (all are counted, the first 20 listed).
        ValueError: another suffix, malformed content (with line or offset), one class only, too few pairs or folds.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no pair list at {path}")
    suffix = path.suffix.lower()
    if suffix == ".bin":
        if images is not None:
            raise ValueError(f"{path} holds its images itself; leave out the image folder {images}")
        return _load_bin(path)
    if suffix not in (".csv", ".txt"):
        raise ValueError(f"{path}: unknown pair list suffix {suffix!r}; use .csv, .txt or .bin")
    return _load_list(path, [Path(images)] if images is not None else _default_folders(path))


def _default_folders(path: Path) -> list[Path]:
    beside = path.parent / path.stem.removesuffix("_pairs")
    return [beside, path.parent] if beside.is_dir() else [path.parent]


def _pair_set(
    path: Path, images: PairImages, indices: np.ndarray, same: np.ndarray, folds: np.ndarray | None, **fields: Any
) -> PairSet:
    """Check labels and folds, and build the set; `indices` has the shape `(N, 2)`."""
    genuine = int(same.sum())
    if genuine in (0, len(same)):
        kind = "impostor" if genuine == 0 else "genuine"
        raise ValueError(f"{path}: all {len(same)} pairs are {kind} pairs; verification needs both kinds")
    if folds is None:
        try:
            folds = contiguous_folds(len(same))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        protocol = "ten equal contiguous folds"
    else:
        if (num_folds := len(np.unique(folds))) < 2:
            raise ValueError(f"{path}: all pairs are in one fold; number at least two, or leave out the fold column")
        protocol = f"the list's own {num_folds} folds"
    return PairSet(
        name=path.stem, images=images, index_a=indices[:, 0], index_b=indices[:, 1], same=same, folds=folds,
        protocol=protocol, **fields,
    )  # fmt: skip


def _problems(items: list[str]) -> str:
    more = f"\n  and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "\n  " + "\n  ".join(items[:_SHOWN]) + more


# ------------------------------------------------------------------------------------------------------- CSV and TXT
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


def _load_list(path: Path, folders: list[Path]) -> PairSet:
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
        raise ValueError(f"{path}: {len(malformed)} malformed lines:{_problems(malformed)}")
    if not columns.names:
        raise ValueError(f"{path}: holds no pairs")

    index: dict[Path, int] = {}  # distinct images in order of appearance
    indices = [[index.setdefault(Path(name), len(index)) for name in pair] for pair in columns.names]
    first = next(iter(index))
    folder = next((place for place in folders if (place / first).is_file()), folders[0])
    files = [folder / name for name in index]
    if missing := [str(file) for file in files if not file.is_file()]:
        tried = f" (the first image was looked for in {' and in '.join(map(str, folders))})" if len(folders) > 1 else ""
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {len(files)} images are missing; "
            f"is {folder} the image folder?{tried}{_problems(missing)}"
        )
    return _pair_set(
        path,
        PairImages(files, [str(file) for file in files]),
        np.array(indices, dtype=np.int64),
        np.array(columns.same),
        np.array(columns.folds, dtype=np.int64) if columns.folds else None,
        domain=np.array(columns.domains) if columns.domains else None,
        synthetic=any((place / PARAMETERS_FILE).is_file() for place in (path.parent, folder)),
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


# --------------------------------------------------------------------------------------------------- insightface .bin
def _load_bin(path: Path) -> PairSet:
    content = _read_pickle(path)
    if not (isinstance(content, (tuple, list)) and len(content) == 2):
        raise ValueError(f"{path}: is not a pickled pair (images, labels)")
    images, labels = content
    if not (isinstance(images, (tuple, list)) and isinstance(labels, (tuple, list, _Array))):
        raise ValueError(f"{path}: images and labels must be lists, not {_kind(images)} and {_kind(labels)}")
    if isinstance(labels, _Array):
        labels = labels.values()
    if len(labels) == 0 or len(images) != 2 * len(labels):
        raise ValueError(f"{path}: {len(images)} images for {len(labels)} labels; there must be two images a label")
    labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
    for number, label in enumerate(labels):
        if not isinstance(label, int) or label not in (0, 1):
            raise ValueError(f"{path}: label {number} is {_kind(label)}, not true or false")

    index: dict[bytes, int] = {}  # digest of each distinct image
    items: list[bytes] = []
    names: list[str] = []
    indices = []
    for number, image in enumerate(images):
        content = image.data if isinstance(image, _Array) and image.dtype == np.uint8 else image
        if not isinstance(content, bytes) or not content:
            raise ValueError(f"{path}: image {number} of pair {number // 2} is {_kind(image)}, not an encoded image")
        digest = hashlib.sha256(content).digest()
        if digest not in index:
            index[digest] = len(items)
            items.append(content)
            names.append(f"{path}, image {number} (pair {number // 2})")
        indices.append(index[digest])
    return _pair_set(
        path,
        PairImages(items, names),
        np.array(indices, dtype=np.int64).reshape(-1, 2),
        np.array(labels, dtype=bool),
        folds=None,
        synthetic=(path.parent / PARAMETERS_FILE).is_file(),
    )


def _kind(value: Any) -> str:
    """What a value of a pickle is, for messages; never its content, which may be hostile."""
    if isinstance(value, _Array):
        return f"an array of {value.dtype}" if value.data else "an empty array"
    return "empty" if value == b"" else f"a {type(value).__name__}"


@dataclass(slots=True)
class _Dtype:
    """Stands for a dtype; the pickle makes it first and sets its byte order afterwards."""

    numpy: np.dtype


@dataclass(slots=True)
class _Array:
    """Stands for a one-dimensional array: its bytes and what they are, None until they are known."""

    data: bytes | None = None
    dtype: np.dtype | None = None

    def values(self) -> np.ndarray:
        """Its numbers; of booleans the byte that stands for each, so that a 2 is seen."""
        return np.frombuffer(self.data or b"", "u1" if self.dtype == bool else self.dtype)


@dataclass(frozen=True)
class _Global:
    """A name that a pickle asks for. It is compared, never imported."""

    name: str


_GLOBALS = {"_codecs.encode": "encode", "numpy.ndarray": "ndarray", "numpy.dtype": "dtype"}
for _core in ("numpy.core", "numpy._core"):  # up to numpy 1 and from numpy 2 on
    _GLOBALS |= {f"{_core}.multiarray._reconstruct": "reconstruct", f"{_core}.numeric._frombuffer": "frombuffer"}
    _GLOBALS[f"{_core}.multiarray.scalar"] = "scalar"

_DTYPES: dict[str | bytes, np.dtype] = {"?": np.dtype("?")}  # admitted; Python 2 wrote their names as bytes
for _dtype in map(np.dtype, ("u1", "b1", "i1", "i4", "i8")):
    for _name in (_dtype.str[1:], _dtype.str, _dtype.name):
        _DTYPES |= {_name: _dtype, _name.encode(): _dtype}
_ADMITTED = "uint8, bool, int8, int32 and int64"
_BYTE_ORDERS: dict[str | bytes, str] = {"|": "|", "<": "<", ">": ">", b"|": "|", b"<": "<", b">": ">"}

_VALUES = {  # opcodes that push their argument
    "INT", "BININT", "BININT1", "BININT2", "LONG1",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_PY2_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # bytes, which pickletools shows as latin-1 text
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MAX_OPCODES = 5_000_000  # far beyond any benchmark; bounds what a file of one-byte opcodes can allocate


def _read_pickle(path: Path) -> Any:
    """Interpret a pickle made of bytes, text, booleans, whole numbers, numpy's too, flat arrays, lists and tuples.

    `pickletools.genops` splits the file into opcodes, each argument checked against the bytes that are left. Memory is
    bounded by the file's size: nothing is sized by a number in the file, and the memo is a dict.

    Raises:
        ValueError: anything else, naming the file and the offset.
    """
    if not path.stat().st_size:
        raise ValueError(f"{path}: is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        machine = _PickleMachine(budget=len(data))
        position = 0
        try:
            for number, (opcode, argument, offset) in enumerate(pickletools.genops(cast(IO[bytes], data))):
                position = offset or 0
                if number == _MAX_OPCODES:
                    raise ValueError(f"more than {_MAX_OPCODES} opcodes")
                if machine.step(opcode.name, argument):
                    return machine.result
                position = data.tell()
        except (ValueError, IndexError, KeyError, TypeError, RecursionError) as error:
            detail = str(error) if type(error) is ValueError else "malformed or truncated"
            raise ValueError(
                f"{path}: not an insightface benchmark, at offset {position} of {len(data)}: {detail}"
            ) from error
    raise AssertionError("genops ends with STOP or an error")


class _PickleMachine:
    """A pickle interpreter that knows data and the harmless calls: latin-1 text to bytes, a dtype, array or scalar.

    Args:
        budget: number of bytes that text may turn into. A call of a few bytes could otherwise copy the same long text
            again and again.
    """

    def __init__(self, budget: int) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below each open MARK
        self.memo: dict[int, Any] = {}
        self.budget = budget
        self.result: Any = None

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def step(self, name: str, argument: Any) -> bool:
        """Run one opcode; True at the end of the pickle."""
        stack = self.stack
        if name in _VALUES:
            stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
        elif name in _PY2_STRINGS:
            stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _PUTS:
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in _GETS:
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif name in ("EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append([] if name == "EMPTY_LIST" else ())
        elif name in ("LIST", "TUPLE"):
            items = self._since_mark()
            self.stack.append(items if name == "LIST" else tuple(items))
        elif name in _TUPLES:
            count = _TUPLES[name]
            if len(stack) < count:
                raise IndexError
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._since_mark()
            if not isinstance(self.stack[-1], list):
                raise ValueError(f"appends to {_kind(self.stack[-1])}")
            self.stack[-1].extend(items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ") if name == "GLOBAL" else [stack.pop(), stack.pop()][::-1]
            wanted = ".".join(part if isinstance(part, str) else "?" for part in parts)
            if wanted not in _GLOBALS:
                raise ValueError(f"asks for {wanted[:80]!r}; this file is not data, it may try to run code")
            stack.append(_Global(_GLOBALS[wanted]))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            self._build(stack[-1], state)
        elif name == "STOP":
            self.result = stack.pop()
            return True
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"opcode {name} does not belong in this format")
        return False

    def _call(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case _Global("encode"), (str() as text, "latin1" | "latin-1"):
                self.budget -= len(text)
                if self.budget < 0:
                    raise ValueError("text turns into more bytes than the file holds")
                return text.encode("latin-1")
            case _Global("dtype"), (str() | bytes() as name, *_) if name in _DTYPES:
                return _Dtype(_DTYPES[name])
            case _Global("reconstruct"), (_Global("ndarray"), *_):
                return _Array()
            case _Global("frombuffer"), (bytes() as data, _Dtype(numpy=dtype), shape, *_):
                return self._filled(_Array(), data, dtype, shape)
            case _Global("scalar"), (_Dtype(numpy=dtype), bytes() as data):
                return self._filled(_Array(), data, dtype, (1,)).values().item()
        raise ValueError(f"calls something other than what arrays and numbers of {_ADMITTED} need")

    def _build(self, target: Any, state: Any) -> None:
        match target, state:
            case _Dtype(), (int(), str() | bytes() as order, *_) if order in _BYTE_ORDERS:
                target.numpy = target.numpy.newbyteorder(cast(Any, _BYTE_ORDERS[order]))
            case _Array(data=None), (_, shape, _Dtype(numpy=dtype), _, bytes() as data):
                self._filled(target, data, dtype, shape)
            case _:
                raise ValueError(f"sets the state of something other than an array of {_ADMITTED}")

    @staticmethod
    def _filled(array: _Array, data: bytes, dtype: np.dtype, shape: Any) -> _Array:
        match shape:
            case (int() as length,) if length * dtype.itemsize == len(data):
                array.data, array.dtype = data, dtype
                return array
            case (int(), int(), int()):
                raise ValueError("holds decoded images, whose channel order is unknown; store encoded ones (JPEG, PNG)")
        raise ValueError(f"an array of {dtype} whose shape does not fit its {len(data)} bytes")
