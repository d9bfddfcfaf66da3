"""IJB-B and IJB-C as insightface lays them out: templates, which are sets of images of one person, and pairs of them.

A folder holds `loose_crop/` and, in `meta/`, for the name `ijbb` or `ijbc`:

    {name}_face_tid_mid.txt         `image template media`, a line an image
    {name}_name_5pts_score.txt      `image x1 y1 ... x5 y5 score`, the same images in the same order
    {name}_template_pair_label.txt  `template template 1|0`
    {name}_1N_gallery_G1.csv, _G2   (`_S1`, `_S2` in IJB-B) template, subject, ...; with the next one, or both missing
    {name}_1N_probe_mixed.csv       template, subject, ...

Source: insightface, `recognition/arcface_torch/eval_ijbc.py` and `recognition/_evaluation_/ijb/ijb_evals.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from adaptface.data.base import missing_files, problems
from adaptface.data.images import align_image
from adaptface.data.pairs import contradictions, oddities
from adaptface.data.synthetic import PARAMETERS_FILE
from adaptface.metrics import only_one_kind
from image_processing_adaptface import ARCFACE_TEMPLATE

_ENDING = "_face_tid_mid.txt"  # of the list that tells IJB
_LINES = 50_000  # of a list, read at a time


class _Table(NamedTuple):
    """What the lines of a list hold: words, or the columns of a CSV.

    Attributes:
        dtype: the words of a line.
        form: the same for messages.
        valid: which rows of an array of `dtype` hold values in range.
        columns: of a CSV with a header, the columns that are read.
    """

    dtype: np.dtype
    form: str
    valid: Callable[[np.ndarray], np.ndarray]
    columns: tuple[int, ...] | None = None


def _any_value(rows: np.ndarray) -> np.ndarray:
    return np.ones(len(rows), dtype=bool)


def _valid_face(rows: np.ndarray) -> np.ndarray:
    spread = np.ptp(rows["points"].reshape(-1, 5, 2), axis=1).max(axis=1)  # (n,): NaN and inf stay so
    return (rows["score"] >= 0) & (rows["score"] <= 1) & (spread > 0) & np.isfinite(spread)


_MEMBERS = _Table(np.dtype([("image", "O"), ("template", "i4"), ("media", "i4")]), "`image template media`", _any_value)
_FACES = _Table(
    np.dtype([("image", "O"), ("points", "f8", (10,)), ("score", "f8")]),
    "`image x1 y1 ... x5 y5 score` with five points that do not coincide and a score of 0 to 1",
    _valid_face,
)
_PAIRS = _Table(
    np.dtype([("a", "i4"), ("b", "i4"), ("same", "i4")]),
    "`template template 1|0`",
    lambda rows: (rows["same"] == 0) | (rows["same"] == 1),
)
_SUBJECTS = _Table(np.dtype([("template", "i4"), ("subject", "i4")]), "`template,subject,...`", _any_value, (0, 1))


class TemplateImages:
    """Photos of a template set, each warped by its landmarks to the aligned 112 px crop when it is asked for.

    Args:
        folder: where the photos are.
        names (`np.ndarray` of shape `(I,)`): their paths in it.
        landmarks (`np.ndarray` of shape `(I, 5, 2)`): as for `AdaptFaceImageProcessor.align`.
    """

    def __init__(self, folder: Path, names: np.ndarray, landmarks: np.ndarray) -> None:
        self.folder = folder
        self.names = names
        self.landmarks = landmarks

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Image.Image:
        return align_image(self.folder / self.names[index], self.landmarks[index], self.where(index))

    def encoded(self, index: int) -> bytes:
        """The photo's file as it is, not decoded."""
        return (self.folder / self.names[index]).read_bytes()

    def digest(self, index: int) -> bytes:
        """SHA-256 of all that a crop is made of: the photo's file and its landmarks."""
        return hashlib.sha256(self.encoded(index) + self.landmarks[index].tobytes()).digest()

    def where(self, index: int) -> str:
        """Name of an image for messages: its path."""
        return str(self.folder / self.names[index])


@dataclass(frozen=True)
class Subjects:
    """Templates and whose they are, each template once: a gallery, or probes.

    Attributes:
        index (`np.ndarray` of shape `(N,)`): int64 indices of templates.
        subjects (`np.ndarray` of shape `(N,)`): subject numbers.
    """

    index: np.ndarray
    subjects: np.ndarray


@dataclass(frozen=True)
class TemplateSet:
    """A benchmark of templates: pair i compares template `index_a[i]` with template `index_b[i]`.

    Attributes:
        name: "ijbb" or "ijbc".
        images: aligned crops, opened lazily; `images.where(i)` names one.
        templates (`np.ndarray` of shape `(T,)`): the templates' numbers, ascending; elsewhere they are indices into it.
        template (`np.ndarray` of shape `(I,)`): template of each image.
        media (`np.ndarray` of shape `(I,)`): media number of each image: a still, or the video a frame is from.
        scores (`np.ndarray` of shape `(I,)`): the face detector's score of each image, 0 to 1.
        index_a, index_b (`np.ndarray` of shape `(P,)`): int32 indices of templates.
        same (`np.ndarray` of shape `(P,)`): True for genuine pairs.
        galleries, probes: for 1:N, by the galleries' names ("G1", "G2"); none and None where the folder has no such
            lists.
        synthetic: rendered faces (their parameters lie in the folder or beside the images); results must be called so.
    """

    name: str
    images: TemplateImages
    templates: np.ndarray
    template: np.ndarray
    media: np.ndarray
    scores: np.ndarray
    index_a: np.ndarray
    index_b: np.ndarray
    same: np.ndarray
    galleries: dict[str, Subjects] = field(default_factory=dict)
    probes: Subjects | None = None
    synthetic: bool = False

    def suspect_labels(self) -> list[str]:
        """Signs that labels are wrong: a pair with both labels, a template unlike itself."""
        return contradictions(self.index_a, self.index_b, self.same, "a template")

    def notes(self) -> list[str]:
        """Oddities that are scored like all other pairs, as the reference does: repeated pairs, a template twice."""
        return oddities(self.index_a, self.index_b, self.same, "a template")


def is_ijb(folder: Path) -> bool:
    """Whether a folder holds IJB's lists as insightface lays them out."""
    return any((folder / "meta").glob(f"*{_ENDING}"))


def load_ijb(folder: str | Path) -> TemplateSet:
    """Read a folder of IJB-B or IJB-C in insightface's layout; the module's docstring lists the files.

    No image is opened. The lists are read a block at a time: beside the result, which is some 200 MB for IJB-C, at most
    a copy of it is held.

    Raises:
        FileNotFoundError: a list or images are missing; all are counted, the first ones listed.
        ValueError: malformed lines, values out of range, lists that do not fit each other, templates without images,
            pairs of one class only; names the file and the lines.
    """
    folder = Path(folder)
    meta, crops = folder / "meta", folder / "loose_crop"
    name = _name(folder)
    members, faces, pairs = (
        meta / f"{name}_{part}.txt" for part in ("face_tid_mid", "name_5pts_score", "template_pair_label")
    )
    if lacking := [str(path) for path in (faces, pairs, crops) if not path.exists()]:
        raise FileNotFoundError(f"{folder}: parts of the data set are missing:{problems(lacking)}")
    names, numbers, media, landmarks, scores = _read_images(members, faces)
    present = set(os.listdir(crops))  # one listing is faster than half a million look-ups
    if missing := [str(crops / n) for n in names if n not in present and not (crops / n).is_file()]:
        raise FileNotFoundError(f"{crops}: {len(missing)} of {len(names)} images are missing:{missing_files(missing)}")
    templates, template = np.unique(numbers, return_inverse=True)
    index_a, index_b, same = _read_pairs(pairs, templates)
    galleries, probes = _read_searches(meta, name, templates)
    return TemplateSet(
        name=name,
        images=TemplateImages(crops, names, landmarks),
        templates=templates,
        template=template,
        media=media,
        scores=scores,
        index_a=index_a,
        index_b=index_b,
        same=same,
        galleries=galleries,
        probes=probes,
        synthetic=any((place / PARAMETERS_FILE).is_file() for place in (folder, crops)),
    )


def _name(folder: Path) -> str:
    """What the names of a folder's lists begin with."""
    names = [path.name.removesuffix(_ENDING) for path in sorted((folder / "meta").glob(f"*{_ENDING}"))]
    if len(names) != 1:
        found = f"the lists of {' and '.join(names)}" if names else f"no list meta/*{_ENDING}"
        raise FileNotFoundError(
            f"{folder}: holds {found}; give the folder of one data set, which holds meta/ and loose_crop/"
        )
    return names[0]


def _parsed(lines: Iterable[str], table: _Table) -> np.ndarray:
    """Lines as an array of the table's rows.

    Raises:
        ValueError: a line is malformed or a value out of range; does not say which.
    """
    delimiter = "," if table.columns else None
    rows = np.loadtxt(lines, table.dtype, comments=None, delimiter=delimiter, usecols=table.columns, ndmin=1)
    if not table.valid(rows).all():
        raise ValueError("a value is out of range")
    return rows


def _malformed(lines: list[str], first: int, table: _Table) -> Iterator[str]:
    """What is wrong with the lines that cannot be parsed; `first` is the number of the first one."""
    for number, line in enumerate(lines, start=first):
        try:
            if line.strip():
                _parsed([line], table)
        except ValueError:
            yield f"line {number}: expected {table.form}, found {line[:120].rstrip()!r}"


def _rows(path: Path, table: _Table) -> Iterator[np.ndarray]:
    """A list's rows, a block of lines at a time; blank lines do not count.

    Raises:
        ValueError: there is none, or lines are malformed: after the last block, so that all can be counted.
    """
    malformed: list[str] = []
    number, found = 1, False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        if table.columns:
            header = file.readline()
            if header.split(",")[0].strip().isdecimal():
                raise ValueError(f"{path}, line 1: expected a header, found {header[:80].rstrip()!r}")
            number = 2
        while lines := list(islice(file, _LINES)):
            if filled := list(filter(str.strip, lines)):
                found = True
                try:
                    yield _parsed(filled, table)
                except ValueError:
                    malformed += _malformed(lines, number, table)
            number += len(lines)
    if malformed:
        raise ValueError(f"{path}: {len(malformed)} malformed lines:{problems(malformed)}")
    if not found:
        raise ValueError(f"{path}: is empty; fetch it again")


def _read_images(members: Path, faces: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each image its name, template number and media number, landmarks `(I, 5, 2)` and detector score."""
    member, face = (np.concatenate(list(_rows(path, table))) for path, table in ((members, _MEMBERS), (faces, _FACES)))
    if len(member) != len(face):
        raise ValueError(f"{members} lists {len(member)} images, but {faces} lists {len(face)}")
    unlike = np.flatnonzero(member["image"] != face["image"])
    if len(unlike):
        differ = [f"image {i + 1}: {member['image'][i]} and {face['image'][i]}" for i in unlike]
        raise ValueError(f"{members} and {faces} name other images in {len(differ)} places:{problems(differ)}")
    landmarks = _fitted(face["points"].reshape(-1, 5, 2))
    return (
        np.array(face["image"], dtype=str),
        member["template"].copy(),
        member["media"].copy(),
        landmarks,
        face["score"].copy(),
    )


def _fitted(landmarks: np.ndarray) -> np.ndarray:
    """The template's five points where the least-squares similarity of each image's landmarks puts them in the image.

    The processor warps both alike, but refuses landmarks that form no face. IJB has such: a detector's on faces that it
    hardly found. The reference warps them all, and trusts the detector's score to weigh them down.

    Args:
        landmarks (`np.ndarray` of shape `(I, 5, 2)`).
    Returns:
        `np.ndarray` of shape `(I, 5, 2)`.
    """
    points, target = landmarks @ (1, 1j), ARCFACE_TEMPLATE @ (1, 1j)  # (I, 5) and (5,), complex
    centre = points.mean(axis=1, keepdims=True)
    centred, wanted = points - centre, target - target.mean()
    scale = (centred.conj() * wanted).sum(axis=1, keepdims=True) / (np.abs(centred) ** 2).sum(axis=1, keepdims=True)
    fitted = centre + wanted / scale  # scale * z + b is the regression of the template on the landmarks
    return np.stack([fitted.real, fitted.imag], axis=2)


def _places(templates: np.ndarray, numbers: np.ndarray, unknown: set[int]) -> np.ndarray:
    """Indices of template numbers, int32; numbers without an image are added to `unknown`."""
    index = np.searchsorted(templates, numbers).clip(max=len(templates) - 1)
    unknown.update(numbers[templates[index] != numbers].tolist())
    return index.astype(np.int32)


def _refuse_unknown(path: Path, unknown: set[int]) -> None:
    if unknown:
        listed = problems([f"template {number}" for number in sorted(unknown)])
        raise ValueError(f"{path}: {len(unknown)} templates have no image:{listed}")


def _read_pairs(path: Path, templates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    unknown: set[int] = set()
    parts = [
        (_places(templates, rows["a"], unknown), _places(templates, rows["b"], unknown), rows["same"] == 1)
        for rows in _rows(path, _PAIRS)
    ]
    _refuse_unknown(path, unknown)
    index_a, index_b, same = (np.concatenate(column) for column in zip(*parts, strict=True))
    if problem := only_one_kind(same):
        raise ValueError(f"{path}: {problem}")
    return index_a, index_b, same


def _read_searches(meta: Path, name: str, templates: np.ndarray) -> tuple[dict[str, Subjects], Subjects | None]:
    """The two galleries and the probes, if the folder has them."""
    paths = sorted(meta.glob(f"{name}_1N_gallery_*.csv"))
    probes = meta / f"{name}_1N_probe_mixed.csv"
    if not paths and not probes.is_file():
        return {}, None
    if len(paths) != 2 or not probes.is_file():
        found = ", ".join(path.name for path in (*paths, probes) if path.is_file())
        raise FileNotFoundError(
            f"{meta}: 1:N takes two lists {name}_1N_gallery_*.csv (G1 and G2, in IJB-B S1 and S2) and {probes.name}; "
            f"found only {found}; fetch the others, or remove these to do without 1:N"
        )
    galleries = {path.stem.rpartition("_")[2]: _read_subjects(path, templates) for path in paths}
    for path, gallery in zip(paths, galleries.values(), strict=True):
        if repeated := _repeated(gallery.subjects, "subject"):
            raise ValueError(
                f"{path}: {len(repeated)} subjects are enrolled with several templates:{problems(repeated)}"
            )
    return galleries, _read_subjects(probes, templates)


def _read_subjects(path: Path, templates: np.ndarray) -> Subjects:
    """A list with a line an image, or a line a template."""
    rows = np.unique(np.concatenate(list(_rows(path, _SUBJECTS))))
    if repeated := _repeated(rows["template"], "template"):
        raise ValueError(f"{path}: {len(repeated)} templates are of several subjects:{problems(repeated)}")
    unknown: set[int] = set()
    index = _places(templates, rows["template"], unknown)
    _refuse_unknown(path, unknown)
    return Subjects(index, rows["subject"].copy())


def _repeated(numbers: np.ndarray, what: str) -> list[str]:
    values, counts = np.unique(numbers, return_counts=True)
    return [f"{what} {value}" for value in values[counts > 1]]
