"""What every verification benchmark is: distinct images, opened when they are asked for, and pairs of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adaptface.data.base import missing_files, shown
from adaptface.data.images import load_image
from adaptface.data.synthetic import PARAMETERS_FILE
from adaptface.metrics import contiguous_folds, one_sided_folds, only_one_kind, suspect_folds

# What the published benchmarks are about, by their names in small letters and without punctuation.
_DOMAINS = {"lfw": "general", "cfpfp": "pose", "cplfw": "pose", "agedb": "age", "agedb30": "age", "calfw": "age"}


def benchmark_domain(name: str) -> str | None:
    """Domain that a whole benchmark is about, by its usual name (`cfp_fp`, `AgeDB-30`, `pairs_CALFW`, and as a split:
    `faces:cfp_fp`); None of others.

    Source: the benchmarks' papers: LFW (Huang et al., 2007), CFP-FP (Sengupta et al., 2016), AgeDB (Moschoglou et al.,
    2017), CALFW (Zheng et al., 2017) and CPLFW (Zheng and Deng, 2018).
    """
    key = re.sub(r"[^a-z0-9]", "", name.lower().rpartition(":")[2])
    return _DOMAINS.get(key.removeprefix("pairs").removesuffix("pairs"))


class PairImages:
    """The distinct images of a pair list, decoded to RGB each time one is asked for.

    Args:
        items: a file path or the bytes of an encoded image, each; may be a sequence that reads them when asked.
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

    def digest(self, index: int) -> bytes:
        """SHA-256 of the image file."""
        return hashlib.sha256(self.encoded(index)).digest()

    def where(self, index: int) -> str:
        """Name of an image for messages: its path, or its place in the `.bin` file."""
        return self.names[index]


@dataclass(frozen=True)
class PairSet:
    """A verification benchmark: pair i compares `images[index_a[i]]` with `images[index_b[i]]`.

    Attributes:
        name: file name without its suffix, or the benchmark's own.
        images: distinct images, opened lazily; `images.where(i)` names one.
        index_a, index_b (`np.ndarray` of shape `(N,)`): int64 indices into `images`.
        same (`np.ndarray` of shape `(N,)`): True for genuine pairs.
        folds (`np.ndarray` of shape `(N,)`): fold number of each pair.
        protocol: how the folds came about, for reports.
        domain: domain name of each pair, where the list gives one.
        group: demographic group of each pair, where the list gives one; empty where its people are of two groups.
        identity (`np.ndarray` of shape `(N, 2)`): number of the person on each image, where the list names them.
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
    group: np.ndarray | None = None
    identity: np.ndarray | None = None
    synthetic: bool = False

    def __len__(self) -> int:
        return len(self.same)

    @property
    def tag(self) -> str | None:
        """Domain of the whole benchmark, see [`benchmark_domain`]."""
        return benchmark_domain(self.name)

    def suspect_labels(self) -> list[str]:
        """Signs that labels are wrong: a pair with both labels, an image unlike itself, a fold of one kind of pairs;
        labels that contradict the identities or, where the list names none, unbalanced folds."""
        problems = contradictions(self.index_a, self.index_b, self.same, "an image")
        problems += one_sided_folds(self.same, self.folds)
        if self.identity is None:
            return suspect_folds(self.same, self.folds) + problems
        wrong = np.flatnonzero((self.identity[:, 0] == self.identity[:, 1]) != self.same)
        if len(wrong):
            where = " and ".join(self.images.where(side[wrong[0]]) for side in (self.index_a, self.index_b))
            problems.append(f"{len(wrong)} labels contradict the identities, the first is that of {where}")
        return problems

    def notes(self) -> list[str]:
        """Harmless oddities worth a line in a report: repeated pairs, images compared with themselves, and, where
        identities vouch for the labels, unbalanced folds."""
        unbalanced = [] if self.identity is None else suspect_folds(self.same, self.folds)
        return unbalanced + oddities(self.index_a, self.index_b, self.same, "an image")


def _keys(index_a: np.ndarray, index_b: np.ndarray) -> np.ndarray:
    """One number for each unordered pair, int64 of shape `(N,)`."""
    low, high = np.minimum(index_a, index_b), np.maximum(index_a, index_b)
    return low.astype(np.int64) * (int(high.max(initial=0)) + 1) + high


def contradictions(index_a: np.ndarray, index_b: np.ndarray, same: np.ndarray, thing: str) -> list[str]:
    """Say which pairs have both labels, or call `thing` ("an image") unlike itself."""
    keys, found = _keys(index_a, index_b), []
    if conflicts := len(np.intersect1d(keys[same], keys[~same])):
        found.append(f"{conflicts} pairs are listed both as genuine and as impostor")
    if selves := int(np.count_nonzero((index_a == index_b) & ~same)):
        found.append(f"{selves} impostor pairs compare {thing} with itself")
    return found


def oddities(index_a: np.ndarray, index_b: np.ndarray, same: np.ndarray, thing: str) -> list[str]:
    """Say how many pairs are repeated, and how many compare `thing` with itself."""
    found = []
    if repeated := len(same) - len(np.unique(_keys(index_a, index_b))):
        found.append(f"{repeated} pairs repeat an earlier pair")
    if selves := int(np.count_nonzero((index_a == index_b) & same)):
        found.append(f"{selves} genuine pairs compare {thing} with itself")
    return found


def pair_set(
    path: str | Path,
    images: PairImages,
    indices: np.ndarray,
    same: Sequence[bool] | np.ndarray,
    folds: Sequence[int] | np.ndarray | None,
    domain: Sequence[str] | None = None,
    group: Sequence[str] | None = None,
    identity: Sequence[tuple[str, str]] | None = None,
    **fields: Any,
) -> PairSet:
    """Check labels and folds, and build the set.

    Args:
        path: what defines the pairs, for messages and the set's name.
        images: see [`PairSet`].
        indices (`np.ndarray` of shape `(N, 2)`): of each pair's two images.
        same, folds, domain, group: one a pair; see [`PairSet`].
        identity: names of the people on each pair's two images.
    Raises:
        ValueError: one class only, one fold only, or too few pairs for folds.
    """
    same = np.array(same, dtype=bool)
    if problem := only_one_kind(same):
        raise ValueError(f"{path}: {problem}")
    if folds is None:
        try:
            folds = contiguous_folds(len(same))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        protocol = "ten equal contiguous folds"
    else:
        folds = np.array(folds, dtype=np.int64)
        if (num_folds := len(np.unique(folds))) < 2:
            raise ValueError(f"{path}: all pairs are in one fold; number at least two, or leave out the fold column")
        protocol = f"the list's own {num_folds} folds"
    codes = None if identity is None else np.unique(np.array(identity), return_inverse=True)[1].reshape(-1, 2)
    return PairSet(
        images=images, index_a=indices[:, 0], index_b=indices[:, 1], same=same, folds=folds, protocol=protocol,
        domain=None if domain is None else np.array(domain), group=None if group is None else np.array(group),
        identity=codes, **{"name": Path(path).stem, **fields},
    )  # fmt: skip


def pairs_of_files(
    path: Path,
    folders: Sequence[Path],
    names: Sequence[tuple[str, str]],
    **fields: Any,
) -> PairSet:
    """A benchmark whose pairs name image files.

    Args:
        path: what defines the pairs, for messages and the set's name.
        folders: where the images may be; the one that holds the first image is taken.
        names: relative paths of each pair's two images.
        fields: the others of [`pair_set`].
    Raises:
        FileNotFoundError: images are missing; all are counted, the first ones listed.
        ValueError: see `pair_set`.
    """
    index: dict[Path, int] = {}  # distinct images in order of appearance
    indices = [[index.setdefault(Path(name), len(index)) for name in pair] for pair in names]
    first = next(iter(index))
    folder = next((place for place in folders if (place / first).is_file()), folders[0])
    files = [folder / name for name in index]
    if missing := [shown(file) for file in files if not file.is_file()]:
        places = " and in ".join(map(str, folders))
        tried = f" (the first image was looked for in {places})" if len(folders) > 1 else ""
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {len(files)} images are missing; "
            f"is {folder} the image folder?{tried}{missing_files(missing)}"
        )
    return pair_set(
        path,
        PairImages(files, [shown(file) for file in files]),
        np.array(indices, dtype=np.int64),
        synthetic=any((place / PARAMETERS_FILE).is_file() for place in (path.parent, folder)),
        **fields,
    )
