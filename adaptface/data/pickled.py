"""insightface `.bin` benchmarks: pickles from strangers, read without unpickling.

`_read_pickle` interprets the few opcodes that the format uses, on bytes, numbers, lists, tuples and flat arrays, and
can neither import nor call anything.
"""

from __future__ import annotations

import codecs
import hashlib
import mmap
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from adaptface.data.base import check_content
from adaptface.data.pairs import PairImages, PairSet, pair_set
from adaptface.data.synthetic import PARAMETERS_FILE


def load_bin(path: Path) -> PairSet:
    """The pairs of insightface's `.bin`: a pickled `(images, labels)`, two encoded images a label.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or damaged; names what is wrong.
    """
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

    digests: dict[int, bytes] = {}  # of each object: the memo lets a small file name a large one again and again
    index: dict[bytes, int] = {}  # of each distinct image, by digest
    items: list[bytes] = []
    names: list[str] = []
    indices = []
    for number, image in enumerate(images):
        content = image.data if isinstance(image, _Array) and image.dtype == np.uint8 else image
        if not isinstance(content, bytes) or not content:
            raise ValueError(f"{path}: image {number} of pair {number // 2} is {_kind(image)}, not an encoded image")
        if id(content) not in digests:
            digests[id(content)] = hashlib.sha256(content).digest()
        digest = digests[id(content)]
        if digest not in index:
            index[digest] = len(items)
            items.append(content)
            names.append(f"{path}, image {number} (pair {number // 2})")
        indices.append(index[digest])
    return pair_set(
        path,
        PairImages(items, names),
        np.array(indices, dtype=np.int64).reshape(-1, 2),
        labels,
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
    "STRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_PY2_STRINGS = {"BINSTRING", "SHORT_BINSTRING"}  # bytes, which pickletools shows as latin-1 text
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_MAX_OPCODES = 5_000_000  # far beyond any benchmark; bounds what a file of one-byte opcodes can allocate


def _read_pickle(path: Path) -> Any:
    """Interpret a pickle made of bytes, text, booleans, whole numbers, numpy's too, flat arrays, lists and tuples.

    `pickletools` reads the opcodes' arguments, each checked against the bytes that are left. Memory is bounded by the
    file's size: nothing is sized by a number in the file, and the memo is a dict.

    Raises:
        ValueError: anything else, naming the file and the offset.
    """
    if not path.stat().st_size:
        raise ValueError(f"{path}: is empty")
    check_content(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        machine = _PickleMachine(budget=len(data))
        position = 0
        try:
            for number, (name, argument) in enumerate(_opcodes(cast(IO[bytes], data))):
                if number == _MAX_OPCODES:
                    raise ValueError(f"more than {_MAX_OPCODES} opcodes")
                if machine.step(name, argument):
                    return machine.result
                position = data.tell()
        except (ValueError, IndexError, KeyError, TypeError, RecursionError) as error:
            detail = str(error) if type(error) is ValueError else "malformed or truncated"
            raise ValueError(
                f"{path}: not an insightface benchmark, at offset {position} of {len(data)}: {detail}"
            ) from error
    raise AssertionError("a pickle ends with STOP or an error")


def _opcodes(data: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Name and argument of each opcode.

    `pickletools.genops` would do, but it wants ASCII in STRING, which is what Python 2 wrote binary images as.
    """
    while code := data.read(1):
        opcode = _OPCODES.get(code.decode("latin-1"))
        if opcode is None:
            raise ValueError(f"byte {code!r} is no opcode")
        if opcode.name == "STRING":
            yield opcode.name, _python2_string(data.readline())
        else:
            yield opcode.name, opcode.arg and opcode.arg.reader(data)
    raise ValueError("ends before the pickle does")


def _python2_string(line: bytes) -> bytes:
    """The bytes that a line of Python 2's `repr` of a `str` stands for."""
    if len(line) < 3 or line[:1] not in (b"'", b'"') or line[-2:] != line[:1] + b"\n":
        raise ValueError("a string without its quotes")
    return codecs.escape_decode(line[1:-2])[0]


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
