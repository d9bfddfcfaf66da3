"""Training faces in single files: what folders and lists of them share, and lists of files with labels.

A CSV list has a header with the columns `file` and `identity` (or `label`), and perhaps `domain`; a TXT list has lines
`file label`, parted by a tab or blanks, the label last. Files are relative to the list's folder.
"""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from adaptface.data.base import (
    DOMAIN_COLUMN,
    DomainNumbers,
    FaceSource,
    csv_rows,
    label_fault,
    missing_files,
    natural,
    shown,
)

LIST_SUFFIXES = (".csv", ".txt")
FILE_COLUMNS = ("file", "file_name")  # the second is the name used by `datasets` imagefolder
IDENTITY_COLUMNS = ("identity", "person", "label")


class FileSource(FaceSource):
    """Faces in files below a folder.

    Args:
        name: see [`FaceSource`].
        root: the folder.
        files: relative paths with "/".
        identities: name of the identity of each file; labels follow the natural order of the names.
        domain_labels, domains: see [`FaceSource`].
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[str],
        identities: Sequence[str],
        domain_labels: Sequence[int],
        domains: Sequence[str],
    ) -> None:
        names = sorted(set(identities), key=natural)
        code = {name: number for number, name in enumerate(names)}
        codes = np.fromiter((code[name] for name in identities), np.int64, len(files))
        super().__init__(name, names, codes, np.array(domain_labels, np.int64), domains)
        self._root = root
        self._files = np.array([os.fsencode(file) for file in files])  # one block of bytes, no object an image

    def _encoded(self, index: int) -> Path:
        return self._root / self.key(index)

    def key(self, index: int) -> str:
        return os.fsdecode(bytes(self._files[index]))

    def where(self, index: int) -> str:
        return shown(self._encoded(index))


class ListSource(FileSource):
    """Faces that a TXT or CSV list names one by one; see `open_source` for the arguments.

    Raises:
        FileNotFoundError: files of the list are missing; all are counted, the first ones named.
        ValueError: a line is malformed, or a file is listed twice; names the line.
    """

    def __init__(self, path: Path, domains: Sequence[str] | None) -> None:
        numbers = DomainNumbers(domains)
        lines: dict[str, int] = {}
        identities, domain_labels = [], []
        for line, file, identity, domain in _entries(path):
            here = f"{shown(path)}, line {line}"
            file = relative_name(file)
            if not file:
                raise ValueError(f"{here}: names no file")
            if not identity:
                raise ValueError(f"{here}: '{shown(file)}' has no identity")
            if file in lines:
                raise ValueError(f"{here}: '{shown(file)}' was listed before, on line {lines[file]}")
            lines[file] = line
            identities.append(identity)
            domain_labels.append(numbers.number(here, domain))
        if fault := label_fault(identities):
            raise ValueError(f"{shown(path)}, line {list(lines.values())[fault[0]]}: {fault[1]}")
        if missing := [file for file in lines if not (path.parent / file).is_file()]:
            named = missing_files([f"line {lines[file]}: {shown(file)}" for file in missing])
            raise FileNotFoundError(
                f"{shown(path)}: {len(missing)} of {len(lines)} files are missing; they are looked up in "
                f"{shown(path.parent)}{named}"
            )
        super().__init__(shown(path), path.parent, list(lines), identities, domain_labels, numbers.names)


def _entries(path: Path) -> Iterator[tuple[int, str, str, str | None]]:
    """Line number, file, identity and domain of each entry of a list."""
    if path.suffix.lower() == ".csv":
        for line, record in read_csv(path):
            if "identity" not in record:
                raise ValueError(f"{shown(path)}, line 1: no column 'identity', only {shown(', '.join(record))}")
            yield line, record["file"], record["identity"].strip(), record.get(DOMAIN_COLUMN)
        return
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
        for line, text in enumerate(stream, start=1):
            if not (text := text.strip()):
                continue
            words = text.rsplit("\t" if "\t" in text else None, 1)
            if len(words) == 1:
                raise ValueError(f"{shown(path)}, line {line}: expected `file label`, found '{shown(text[:80])}'")
            yield line, words[0].strip(), words[1].strip(), None


def relative_name(file: str) -> str:
    """A file's path as lists write it in the form that sources use: with "/", no "./" before it."""
    return file.replace("\\", "/").removeprefix("./")


def column_names(place: str, names: Sequence[str]) -> list[str]:
    """Columns of a table in small letters; those of files and identities are always called `file` and `identity`.

    Raises:
        ValueError: there is no column of files; calls the table `place`.
    """
    columns = [name.strip().lower() for name in names]
    for name, candidates in (("file", FILE_COLUMNS), ("identity", IDENTITY_COLUMNS)):
        found = next((column for column in candidates if column in columns), None)
        if found is not None:
            columns[columns.index(found)] = name
    if "file" not in columns:
        raise ValueError(f"{place}: no column 'file', only {shown(', '.join(columns)) or 'nothing'}")
    return columns


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields of each row of a CSV with a header.

    Columns are called as [`column_names`] does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no column of files, a row of another length, or no CSV; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: no such file")
    # surrogateescape: names of any encoding are compared byte by byte, as the file system gives them
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        line = 1
        try:
            header, rows = csv_rows(stream)
            columns = column_names(f"{shown(path)}, line 1", header)
            for line, row in rows:
                if isinstance(row, str):
                    raise ValueError(f"{shown(path)}, line {line}: {row}")
                yield line, dict(zip(columns, row.values(), strict=True))
        except csv.Error as error:
            raise ValueError(f"{shown(path)}, after line {line}: {error}") from error
