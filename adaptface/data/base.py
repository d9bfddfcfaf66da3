"""What every training source is: labelled face images, opened one by one; and the words all of them use."""

import csv
import hashlib
import os
import re
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from adaptface.data.images import load_image

DEFAULT_DOMAINS = ("general", "pose", "age")
UNLABELLED = -1
DOMAIN_COLUMN = "domain"
FINGERPRINT_IMAGES = 32
_SHOWN = 20  # problems listed in one message; the rest is counted
_NUMBER = re.compile(r"[+-]?[0-9]+(\.0*)?|nan", re.IGNORECASE)
_NEGATIVE = re.compile(r"-[0-9]+(\.0*)?")
_BREAK = re.compile(r"[\r\n]")
_LARGEST = 2**64 - 1  # of labels that are numbers


class LabelledFaces(ABC):
    """What training asks of its images, be they held (`FaceSource`) or streamed (`StreamSource`).

    An image goes by its item: its index where the set is held, the row itself in a stream.

    Attributes:
        name (`str`): what messages and logs call this source.
        identities (`list[str]`): identity names as the data has them; the index is the label. For messages see `shown`.
    """

    name: str
    identities: list[str]

    @property
    @abstractmethod
    def has_domains(self) -> bool:
        """Whether images may carry a domain label."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    def image(self, item: Any) -> Image.Image:
        """The image as RGB, EXIF orientation applied.

        Raises:
            FileNotFoundError, ValueError: the image is missing, damaged or none; the message names it.
        """
        return load_image(self._encoded(item), self.where(item))

    def encoded(self, item: Any) -> bytes:
        """The image file as it is, not decoded.

        Raises:
            OSError: the file cannot be read.
        """
        content = self._encoded(item)
        return content.read_bytes() if isinstance(content, Path) else content

    @abstractmethod
    def numbers(self, item: Any) -> dict[str, int]:
        """`label`, `domain` (-1 unlabelled) and `index` of an image."""

    @abstractmethod
    def stand_ins(self, item: Any) -> Iterator[Any]:
        """Items to take in place of a broken one, best first: they depend on nothing but data and item."""

    @abstractmethod
    def sample(self, most: int) -> list[Any]:
        """At most so many items, as spread over the set as it can be read: always the same ones."""

    @abstractmethod
    def images_an_identity(self) -> str:
        """Fewest and most images of an identity, for people."""

    @abstractmethod
    def describe(self) -> str:
        """Counts of images, identities and domain labels, for people."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of what a resumed run must find again: identities, labels, domains and some of the images."""

    @abstractmethod
    def where(self, item: Any) -> str:
        """A printable name of an image, for messages."""

    @abstractmethod
    def _encoded(self, item: Any) -> Path | bytes:
        """What the shipped processor's loader opens: the path or the bytes of an image file."""


class FaceSource(LabelledFaces):
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
        ValueError: no image.
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
        self.identities = [identity_names[code] for code in used]
        self.labels = labels.astype(np.int64)
        self.domain_labels = domain_labels.astype(np.int64)
        self.domains = tuple(domains)
        if not len(self):
            raise ValueError(f"{name}: holds no image")

    def check_rivals(self) -> None:
        """That there are two identities at least: a margin loss needs a rival class.

        Raises:
            ValueError: there is only one.
        """
        if len(self.identities) < 2:
            raise ValueError(
                f"{self.name}: all {len(self)} images belong to one identity, '{shown(self.identities[0])}'; training "
                "needs two or more: give the folder that directly holds the identity folders, or check the labels"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_domains(self) -> bool:
        return bool((self.domain_labels >= 0).any())

    def numbers(self, index: int) -> dict[str, int]:
        return {"label": int(self.labels[index]), "domain": int(self.domain_labels[index]), "index": index}

    def stand_ins(self, index: int) -> Iterator[int]:
        yield from range(index + 1, len(self))
        yield from range(index)

    def sample(self, most: int) -> list[int]:
        return spread(len(self), most)

    def images_an_identity(self) -> str:
        counts = np.bincount(self.labels)
        return f"{counts.min()} to {counts.max()}"

    def describe(self) -> str:
        labelled = int((self.domain_labels >= 0).sum())
        return f"{len(self)} images of {len(self.identities)} identities, {labelled} with a domain label"

    def fingerprint(self) -> str:
        digest = hashlib.sha256("\n".join(self.identities).encode("utf-8", "surrogatepass"))
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        digest.update(np.ascontiguousarray(self.domain_labels).tobytes())
        for index in self.sample(FINGERPRINT_IMAGES):
            with suppress(OSError):  # a missing one is skipped in training
                digest.update(self.encoded(index))
        return digest.hexdigest()

    @abstractmethod
    def key(self, index: int) -> str:
        """Name of an image among those of its source, the same wherever that lies: what files about it call it."""


class DomainNumbers:
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
                f"{where}: domain '{shown(str(value))}' is unknown; the configured domains are {', '.join(self.names)}"
            )
        return self.names.index(str(value))


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` indices, evenly spread, first and last among them."""
    return np.unique(np.linspace(0, count - 1, num=most).astype(int)).tolist()


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key that reads numbers as numbers: id_2 < id_10."""
    parts = re.split(r"([0-9]+)", name)  # text and digits alternate, so that keys are comparable
    return [int(part) if at % 2 else part for at, part in enumerate(parts)], name


def shown(name: str | os.PathLike[str]) -> str:
    """A name that every terminal and log can print: undecodable bytes and control characters are escaped."""
    text = os.fspath(name)
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def check_content(path: str | os.PathLike[str]) -> None:
    """That a file is not what lies in its place when a download went wrong; its reader would speak of damage.

    Raises:
        ValueError: it is a Git LFS pointer or a web page; names the remedy.
    """
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{shown(path)}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        raise ValueError(f"{shown(path)}: a web page was saved in its place; download it again")


def warn(root: Path, names: list[str], what: str) -> None:
    """Warn of files in a set: how many, what is wrong with them, and the first."""
    warnings.warn(f"{shown(root)}: {len(names)} {what}, first '{shown(names[0])}'", stacklevel=2)


def problems(items: list[str]) -> str:
    """The end of a message: the first problems, a line each, and how many more there are."""
    more = f"\n  and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "\n  " + "\n  ".join(items[:_SHOWN]) + more


def missing_files(items: list[str]) -> str:
    """[`problems`] for files that are not there; many are all listed in a file that the message names."""
    if len(items) <= _SHOWN:
        return problems(items)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="missing-", suffix=".txt", delete=False) as file:
        file.writelines(f"{item}\n" for item in map(shown, items))
    return f"{problems(items)}; all of them: {file.name}"


def csv_rows(stream: TextIO, **options: Any) -> tuple[list[str], Iterator[tuple[int, dict[str, str] | str]]]:
    """A CSV's header, and the line number of each row with its fields or with what is wrong with it.

    A quote that is left open swallows the lines up to the next one. A field may hold line breaks, but no line with as
    many commas as a row has.

    Args:
        options: of `csv.DictReader`.
    Raises:
        csv.Error: a column is named twice; and while rows are read, the file is no CSV.
    """
    reader = csv.DictReader(stream, strict=True, **options)
    header = list(reader.fieldnames or [])
    if twice := [name for name in dict.fromkeys(header) if header.count(name) > 1]:
        raise csv.Error(f"line 1 names the column '{shown(twice[0])}' twice")

    def rows() -> Iterator[tuple[int, dict[str, str] | str]]:
        before = reader.line_num
        for row in reader:
            line, before = before + 1, reader.line_num
            if None in row or None in row.values():
                yield reader.line_num, f"expected {len(header)} fields, as in the header"
            elif any(part.count(",") >= len(header) - 1 for cell in row.values() for part in _BREAK.split(cell)[1:]):
                yield line, f"a quote is open to line {reader.line_num}; close it, or write two for one"
            else:
                yield reader.line_num, row

    return header, rows()


def label_fault(labels: Sequence[str]) -> tuple[int, str] | None:
    """The first of some labels that is wrong, and what is; names are not judged, numbers where all are numbers.

    -1 and NaN stand for people who are not known, and would be one person in training.
    """
    unknown = "is no whole number from 0 on; give each person one, or leave the image out"
    negative = next((place for place, label in enumerate(labels) if _NEGATIVE.fullmatch(label)), None)
    if negative is not None:
        return negative, f"label {labels[negative]} {unknown}"
    if not all(_NUMBER.fullmatch(label) for label in labels):
        return None
    first: dict[int, str] = {}
    for place, label in enumerate(labels):
        digits = re.sub(r"\.0*$", "", label)
        if not digits.isdecimal():
            return place, f"label {label} {unknown}"
        if len(digits.lstrip("0")) > 20 or int(digits) > _LARGEST:
            return place, f"label {label} is too large for a number of 64 bits"
        if (other := first.setdefault(int(digits), label)) != label:
            return place, f"label {label} is the same number as {other}; write it in one way"
    return None
