"""Benchmarks in the files that their authors publish: LFW's `pairs.txt` and CFP's protocol folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adaptface.data.base import problems
from adaptface.data.pairs import PairSet, pairs_of_files

_SUFFIXES = (".jpg", ".png", ".jpeg", ".webp", ".bmp")


def is_lfw_list(path: Path) -> bool:
    """Whether a `.txt` begins as LFW's lists do: with one or two numbers, of folds and of pairs."""
    with path.open("rb") as file:
        words = file.readline(100).split()
    return len(words) in (1, 2) and all(word.isdigit() for word in words)


def load_lfw(path: Path, folders: Sequence[Path]) -> PairSet:
    """LFW's `pairs.txt`: `folds  pairs`, then for each fold `name n1 n2` and as many `name1 n1 name2 n2`.

    Images are `name/name_0001.jpg` (or another usual suffix) below one of `folders`.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: a line is malformed, or there are more or fewer than the first one says; names the line.
    Source: Huang et al., Labeled Faces in the Wild, 2007; README of the data set.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}; save the list as UTF-8") from error
    while lines and not lines[-1].strip():
        lines.pop()
    numbers = [int(word) for word in lines[0].split()]
    if len(numbers) == 1:
        raise ValueError(
            f"{path}, line 1: names {numbers[0]} pairs and no folds, as LFW's lists for development do; its pairs.txt "
            "begins with `10 300`"
        )
    num_folds, pairs = numbers
    if (wanted := 1 + 2 * num_folds * pairs) != len(lines) or not num_folds or not pairs:
        raise ValueError(
            f"{path}, line 1: {num_folds} folds of {pairs} genuine and {pairs} impostor pairs take {wanted} lines, but "
            f"there are {len(lines)}"
        )
    names: list[tuple[tuple[str, int], tuple[str, int]]] = []
    malformed = []
    for number, line in enumerate(lines[1:], start=2):
        genuine = (number - 2) // pairs % 2 == 0
        words = line.split("\t") if "\t" in line else line.split()
        digits = words[1:] if genuine else words[1::2]
        if len(words) != (3 if genuine else 4) or not all(word.strip().isdecimal() for word in digits):
            form = "name n1 n2" if genuine else "name1 n1 name2 n2"
            malformed.append(f"line {number}: expected `{form}`, found {line[:80]!r}")
            continue
        first, second = (words[0], words[0]) if genuine else (words[0], words[2])
        names.append(((first.strip(), int(digits[0])), (second.strip(), int(digits[1]))))
    if malformed:
        raise ValueError(f"{path}: {len(malformed)} malformed lines:{problems(malformed)}")
    stem = "{0}/{0}_{1:04d}".format(*names[0][0])
    suffix = next((s for s in _SUFFIXES if any((folder / f"{stem}{s}").is_file() for folder in folders)), _SUFFIXES[0])
    files = [(_lfw_file(a, suffix), _lfw_file(b, suffix)) for a, b in names]
    same = np.tile(np.repeat([True, False], pairs), num_folds)
    return pairs_of_files(path, folders, files, same.tolist(), np.repeat(np.arange(num_folds), 2 * pairs))


def _lfw_file(image: tuple[str, int], suffix: str) -> str:
    name, number = image
    return f"{name}/{name}_{number:04d}{suffix}"


def is_cfp_split(path: Path) -> bool:
    """Whether a folder holds CFP's folds: `01/same.txt`, `01/diff.txt` and so on."""
    return path.is_dir() and (path / "01" / "same.txt").is_file() and (path / "01" / "diff.txt").is_file()


def load_cfp(path: Path, images: Path | None) -> PairSet:
    """CFP's protocol, `Protocol/Split/FP` or `FF`: a folder a fold, with `i,j` lines of genuine and impostor pairs.

    The numbers count lines of `Protocol/Pair_list_F.txt` (frontal) and, for the second image of FP, `Pair_list_P.txt`
    (profile), which name files such as `../Data/Images/001/frontal/01.jpg`.

    Args:
        images: folder that holds `001/frontal/01.jpg` ...; by default `Data/Images` beside `Protocol`.
    Raises:
        FileNotFoundError: a list or images are missing.
        ValueError: a line is malformed or counts no image; names file and line.
    Source: Sengupta et al., Frontal to Profile Face Verification in the Wild, 2016; README of the data set.
    """
    kind, protocol = path.name.upper(), path.parent.parent
    if kind not in ("FP", "FF"):
        raise ValueError(f"{path}: is no split of CFP; give Protocol/Split/FP or Protocol/Split/FF")
    lists = [_cfp_list(protocol / f"Pair_list_{letter}.txt") for letter in ("F", kind[1])]
    names: list[tuple[str, str]] = []
    same: list[bool] = []
    folds: list[int] = []
    for number, fold in enumerate(sorted(place for place in path.iterdir() if place.is_dir())):
        for file, genuine in (("same.txt", True), ("diff.txt", False)):
            for pair in _cfp_pairs(fold / file, lists):
                names.append(pair)
                same.append(genuine)
                folds.append(number)
    folder = images or protocol.parent / "Data" / "Images"
    return pairs_of_files(path, [folder], names, same, np.array(folds, dtype=np.int64), name=f"cfp_{kind.lower()}")


def _cfp_list(path: Path) -> list[str]:
    """Files below `Images/` by their number, of which the first is 1."""
    files: list[str] = []
    for line, text in _lines(path):
        number, _, name = text.partition(" ")
        place = name.strip().replace("\\", "/").partition("Images/")[2]
        if number != str(len(files) + 1) or not place:
            expected = f"`{len(files) + 1} ../Data/Images/...`"
            raise ValueError(f"{path}, line {line}: expected {expected}, found {text[:80]!r}")
        files.append(place)
    return files


def _cfp_pairs(path: Path, lists: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    pairs = []
    for line, text in _lines(path):
        words = [word.strip() for word in text.split(",")]
        if len(words) != 2 or not all(word.isdecimal() for word in words):
            raise ValueError(f"{path}, line {line}: expected two numbers `i,j`, found {text[:80]!r}")
        for word, files in zip(words, lists, strict=True):
            if not 1 <= int(word) <= len(files):
                raise ValueError(f"{path}, line {line}: there is no image {word}, only 1 to {len(files)}")
        pairs.append((lists[0][int(words[0]) - 1], lists[1][int(words[1]) - 1]))
    return pairs


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines that are not blank, with their numbers."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this list of CFP's protocol is missing; unpack the data set again")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
