"""Benchmarks in the files that their authors publish: LFW's `pairs.txt`, CFP's protocol folders and RFW's folders."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptface.data.base import problems
from adaptface.data.pairs import PairSet, pairs_of_files
from adaptface.metrics import contiguous_folds, suspect_folds

_SUFFIXES = (".jpg", ".png", ".jpeg", ".webp", ".bmp")
_Image = tuple[str, int]  # the person's name and the image's number


def is_lfw_list(path: Path) -> bool:
    """Whether a `.txt` begins as LFW's lists do, or as RFW's, which lack the first line: `name n1 n2`."""
    words = _first_words(path)
    return _counts_pairs(path) or (len(words) in (3, 4) and all(word.isdigit() for word in (words[1], words[-1])))


def _counts_pairs(path: Path) -> bool:
    """Whether the first line holds one or two numbers, of folds and of pairs."""
    words = _first_words(path)
    return len(words) in (1, 2) and all(word.isdigit() for word in words)


def _first_words(path: Path) -> list[bytes]:
    with path.open("rb") as file:
        return file.readline(1000).removeprefix(codecs.BOM_UTF8).split()


def load_lfw(path: Path, folders: Sequence[Path]) -> PairSet:
    """LFW's `pairs.txt`: `folds  pairs`, then for each fold `name n1 n2` and as many `name1 n1 name2 n2`.

    A list of RFW, of one race, has no first line, and ten equal folds.

    Images are `name/name_0001.jpg` (or another usual suffix) below one of `folders`.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: a line is malformed, or there are more or fewer than the first one says; names the line.
    Source: Huang et al., Labeled Faces in the Wild, 2007; README of the data set.
    """
    name = "lfw" if path.name == "pairs.txt" else path.stem  # as published; other sets use its form, too
    pairs, same, folds = _lfw_pairs(path)
    if not _counts_pairs(path):
        _require_whole(path, same, folds)
    return _set_of_people(path, folders, pairs, same, folds, name=name)


def is_rfw(path: Path) -> bool:
    """Whether a folder is laid out as RFW: `txts/<Race>/<Race>_pairs.txt`, beside `data/<Race>`."""
    return any(file.name == f"{file.parent.name}_pairs.txt" for file in path.glob("txts/*/*_pairs.txt"))


def load_rfw(path: Path, images: Path | None) -> PairSet:
    """RFW as one benchmark whose groups are the races: `txts/<Race>/<Race>_pairs.txt`, one a folder of `txts`.

    Each list holds ten folds of 300 genuine and 300 impostor pairs in lines like LFW's, as published without its first
    line. Fold k of the set is that of every race. A name is one person, whose images may lie under two races.

    Args:
        images: folder that holds `<Race>/<id>/<id>_0001.jpg` ...; by default `data` beside `txts`.
    Raises:
        FileNotFoundError: a race's list or images are missing.
        ValueError: a line is malformed, or a fold is not half genuine; names the list.
    Source: Wang et al., Racial Faces in the Wild, 2019; whdeng.cn/RFW/testing.html. People of two races: RFWDatabase of
        bob.bio.face.
    """
    pairs: list[tuple[_Image, _Image]] = []
    same, folds, groups = [], [], []
    races = _subfolders(path / "txts")
    crops = path / "data"
    if images is not None and any((images / race).is_dir() for race in races):  # else it is of another benchmark
        crops = images
    for race in _subfolders(crops):
        if race not in races and any((crops / race).iterdir()):
            raise FileNotFoundError(f"{crops / race} has no lists in {path / 'txts'}; unpack the data set again")
    for race in races:
        if not (file := path / "txts" / race / f"{race}_pairs.txt").is_file():
            raise FileNotFoundError(f"{file}: this list of RFW is missing; unpack the data set again")
        of_race, labels, numbers = _lfw_pairs(file)
        _require_whole(file, labels, numbers)
        pairs += [((f"{race}/{a}", n), (f"{race}/{b}", m)) for (a, n), (b, m) in of_race]
        same.append(labels)
        folds.append(numbers)
        groups += [race] * len(of_race)
    fields = {"group": groups, "name": "rfw"}
    return _set_of_people(path, [crops], pairs, np.concatenate(same), np.concatenate(folds), **fields)


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, but for those that systems leave there."""
    if not folder.is_dir():
        return []
    names = sorted(place.name for place in folder.iterdir() if place.is_dir())
    return [name for name in names if not name.startswith(".") and name != "__MACOSX"]


def _require_whole(path: Path, same: Any, folds: Any) -> None:
    """Refuse pairs other than ten folds of one size, half of them genuine each, as CFP and RFW have them."""
    _, sizes = np.unique(folds, return_counts=True)
    fault = f"{len(sizes)} folds instead of ten" if len(sizes) != 10 else None
    if not fault and len(set(sizes.tolist())) > 1:
        fault = f"folds of {sizes.min()} to {sizes.max()} pairs, instead of equal ones"
    suspect = suspect_folds(np.asarray(same), np.asarray(folds))
    if fault or suspect:
        raise ValueError(f"{path}: {fault or suspect[0]}; is the list cut off?")


def _set_of_people(
    path: Path,
    folders: Sequence[Path],
    pairs: list[tuple[_Image, _Image]],
    same: np.ndarray,
    folds: np.ndarray,
    **fields: Any,
) -> PairSet:
    """A benchmark of images `name/name_0001.jpg`; the name may have folders before it, which the file's has not."""
    stems = [tuple(f"{place}/{place.rpartition('/')[2]}_{number:04d}" for place, number in pair) for pair in pairs]
    first = stems[0][0]
    suffix = next((s for s in _SUFFIXES if any((folder / f"{first}{s}").is_file() for folder in folders)), _SUFFIXES[0])
    names = [(f"{a}{suffix}", f"{b}{suffix}") for a, b in stems]
    people = [(a.rpartition("/")[2], b.rpartition("/")[2]) for (a, _), (b, _) in pairs]
    return pairs_of_files(path, folders, names, same=same, folds=folds, identity=people, **fields)


def _lfw_pairs(path: Path) -> tuple[list[tuple[_Image, _Image]], np.ndarray, np.ndarray]:
    """Pairs, labels and folds of a list of LFW's lines.

    Its first line says how they follow each other; without one they are ten equal folds, of pairs in any order.
    """
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    words = [line.split("\t") if "\t" in line else line.split() for line in lines]
    if counted := _counts_pairs(path):
        same, folds = _lfw_counts(path, lines)
    else:
        same = np.array([len(line) == 3 for line in words])
        try:
            folds = contiguous_folds(len(lines))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    pairs: list[tuple[_Image, _Image]] = []
    malformed = []
    for at, (line, genuine) in enumerate(zip(words[counted:], same, strict=True), start=counted):
        digits = line[1:] if genuine else line[1::2]
        if len(line) != (3 if genuine else 4) or not all(word.strip().isdecimal() for word in digits):
            form = "name n1 n2" if genuine else "name1 n1 name2 n2"
            malformed.append(f"line {at + 1}: expected `{form}`, found {lines[at][:80]!r}")
            continue
        people = (line[0], line[0]) if genuine else (line[0], line[2])
        pairs.append(((people[0].strip(), int(digits[0])), (people[1].strip(), int(digits[1]))))
    if malformed:
        raise ValueError(f"{path}: {len(malformed)} malformed lines:{problems(malformed)}")
    return pairs, same, folds


def _lfw_counts(path: Path, lines: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and folds of all lines but the first, as that one states them."""
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
    return np.tile(np.repeat([True, False], pairs), num_folds), np.repeat(np.arange(num_folds), 2 * pairs)


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
    for number, fold in enumerate(_subfolders(path)):
        for file, genuine in (("same.txt", True), ("diff.txt", False)):
            for pair in _cfp_pairs(path / fold / file, lists):
                names.append(pair)
                same.append(genuine)
                folds.append(number)
    _require_whole(path, same, folds)
    folders = [*([images] if images else []), protocol.parent / "Data" / "Images"]  # where the first image is
    people = [(a.partition("/")[0], b.partition("/")[0]) for a, b in names]  # 001/frontal/01.jpg
    fields = {"same": same, "folds": folds, "identity": people, "name": f"cfp_{kind.lower()}"}
    return pairs_of_files(path, folders, names, **fields)


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
