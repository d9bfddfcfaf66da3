"""Files that are complete or absent, never half, also after a power cut."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text and force it to the disk."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small file completely or not at all; an earlier one stays until the new one is on the disk."""
    with replacing(path) as partial:
        write_text(partial, text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path to write to; once written it is forced to the disk and takes the place of `path`."""
    partial = partial_path(path)
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder of the same name that takes the place of `path` if the block ends well, or else vanishes.

    Args:
        replace: what is there is replaced then; without it there must be nothing.
    Raises:
        FileExistsError: `path` is a file, or a folder that is not empty.
        OSError: the disk is full.
    """
    if not replace and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder; name another one, or move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        _full_disk_named(path),
        tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch,
    ):
        staged = Path(scratch) / "new" / path.name
        staged.mkdir(parents=True)
        yield staged
        for file in staged.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())
        if path.exists() and replace:
            path.rename(Path(scratch) / "former")
        elif path.exists():
            path.rmdir()  # fails if something came in meanwhile
        staged.rename(path)
    sync_folder(path.parent)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # safetensors has an error of its own
        is_full = isinstance(error, OSError) and error.errno in _FULL
        if not is_full and not any(f"(os error {number})" in str(error) for number in _FULL):
            raise
        raise OSError(
            f"{path} could not be written, the disk is full: {error}. Free some space and run it again; what was there "
            "is unchanged"
        ) from error


# An absolute path within a text: of POSIX with two parts at least, of Windows, or a file's address.
_PART = r"[^\s\\/'\"`()<>|,;]+"
_PATH = re.compile(rf"(?:file:/+|(?<![\w./<~-])(?!(?<=:)//)/|(?<!\w)[A-Za-z]:[\\/]|\\\\)(?:{_PART}[\\/])+({_PART})")


def without_folders(content: Any) -> Any:
    """JSON content with each absolute path, of any system, cut to its last part: folders tell who worked where."""
    if isinstance(content, dict):
        return {key: without_folders(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_folders(value) for value in content]
    if not isinstance(content, str):
        return content
    option, equals, path = content.partition("=") if content.startswith("-") else ("", "", content)  # --model=/a/b
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(path).is_absolute():
            return f"{option}{equals}{kind(path).name}"
    return _PATH.sub(r"\1", content)


def partial_path(path: Path) -> Path:
    """Hidden name beside `path` under which it is written until it is complete."""
    return path.with_name(f".{path.name}.partial")


def sync_folder(folder: Path) -> None:
    """Force a folder's list of names to the disk."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
