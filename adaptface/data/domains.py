"""Domain labels of training faces: what is measured of every image, the label that follows, and a sidecar of both.

    source = open_source("data/faces", domains=None)
    known = read_known(source, Path("landmarks.csv"), landmarks=True)
    print(as_text(label_faces(source, Path("faces.domains.csv"), known)))
    source = open_source("data/faces", domain_labels="faces.domains.csv")     # what training does

The sidecar, CSV or parquet, has a row an image: `file` (its key in the source), `identity`, `domain` (empty where it is
unlabelled), the measurements, and the name of what estimated the age, if anything did. Measurements are not taken
twice: labels by other thresholds follow from them in seconds.

Illumination and sharpness come from the image, the turn of the head from a table of yaws or landmarks, the age from a
table or from any function `module:function` that takes an RGB `PIL.Image.Image` and returns years, NaN where it cannot
tell. Illumination and sharpness decide no label; they are there to look at and to build other labels on.
"""

import csv
import importlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from adaptface.data.base import DomainNumbers, FaceSource, problems, shown
from adaptface.data.lists import column_names, read_csv, relative_name
from adaptface.data.parallel import map_images
from adaptface.data.records import RecordSource
from adaptface.files import partial_path, replacing, sync_folder

MEASUREMENTS = ("luminance", "imbalance", "sharpness", "yaw", "age")
COLUMNS = ("file", "identity", "domain", *MEASUREMENTS, "estimator")
# Of the five landmarks those that tell the yaw, called as in CelebA's list_landmarks_align_celeba: left in the image.
LANDMARK_COLUMNS = ("lefteye_x", "lefteye_y", "righteye_x", "righteye_y", "nose_x", "nose_y")
SIDE = 112  # pixels: images are measured at this size, whatever their own
FACE = (slice(28, 98), slice(28, 84))  # rows and columns of an ArcFace crop that show the face, not what is around it
DEGREES = 2.0  # half of all faces being turned further than this is possible in degrees only
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SAVE_EVERY = 20_000  # images: about a minute's work


# --- measurements -------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What one look at one image finds; NaN where it is unknown, `error` where the image is broken.

    Attributes:
        luminance (`float`): mean luma of the face, 0 (black) to 255; luma = 0.299 R + 0.587 G + 0.114 B (ITU-R 601).
        imbalance (`float`): (right - left) / (right + left), of the mean lumas of the face's halves in the image: 0 is
            even light, 1/3 one side twice as bright as the other, negative where the left one is brighter.
        sharpness (`float`): variance of the Laplacian of the luma, squared grey levels, over the whole image at 112 px.
            Source: Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR 2000 (their LAPV).
        age (`float`): years, as the estimator says.
    """

    luminance: float = math.nan
    imbalance: float = math.nan
    sharpness: float = math.nan
    age: float = math.nan
    error: str | None = None


def measure(image: Image.Image) -> Measured:
    """Illumination and sharpness of an aligned face crop; see [`Measured`]."""
    luma = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float64)
    left, right = (half.mean() for half in np.hsplit(luma[FACE], 2))
    imbalance = (right - left) / (right + left) if right + left else 0.0
    centre, rows, columns = luma[1:-1, 1:-1], luma[:, 1:-1], luma[1:-1]
    laplacian = rows[:-2] + rows[2:] + columns[:, :-2] + columns[:, 2:] - 4 * centre
    return Measured(float((left + right) / 2), float(imbalance), float(laplacian.var()))


def yaw_proxy(landmarks: np.ndarray) -> np.ndarray:
    """How far heads are turned: the nose's offset from the middle of the eyes, along their line, over their distance.

    Below 0.12 in size a face is about frontal, above 0.35 clearly turned; the sign says which way. The roll of the head
    and the size of the image do not matter.

    Args:
        landmarks (`np.ndarray` of shape `(N, 6)`): x and y of left eye, right eye and nose; left in the image.
    Returns:
        `np.ndarray` of shape `(N,)`, NaN where a coordinate is unknown or the eyes are one point.
    """
    left, right, nose = landmarks[:, 0:2], landmarks[:, 2:4], landmarks[:, 4:6]
    eyes = right - left
    squared = (eyes * eyes).sum(axis=1)
    along = ((nose - (left + right) / 2) * eyes).sum(axis=1)
    return np.divide(along, squared, out=np.full(len(landmarks), np.nan), where=squared > 0)


@cache
def load_estimator(name: str) -> Callable[[Image.Image], float]:
    """The function that `module:function` names.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"age estimator '{name}': write it as module:function, both importable ({error})") from error
    if not callable(found):
        raise ValueError(f"age estimator '{name}': is no function")
    return found


def _look(source: FaceSource, index: int, estimator: str) -> Measured:
    """Measure one image; `estimator` names what estimates its age, if anything does."""
    try:
        image = source.image(index)
    except (OSError, ValueError) as error:
        return Measured(error=str(error))
    found = measure(image)
    if not estimator:
        return found
    try:
        return found._replace(age=float(load_estimator(estimator)(image)))
    except Exception as error:
        raise ValueError(f"age estimator '{estimator}' failed on {source.where(index)}: {error!r}") from error


# --- from measurements to labels ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """When an image is "pose" or "age".

    Attributes:
        yaw_threshold (`float`): "pose" is a yaw beyond it, either way; 0.35 of [`yaw_proxy`] is a clear turn. A column
            of degrees needs a threshold in degrees.
        age_gap (`float`): "age" is an age that differs from the median of its identity by at least so many years. Two
            such images on either side of it are 30 years apart, as the pairs of AgeDB-30 are.
        age_range (`tuple[float, float]`): "age" is also an age below the first number, when faces still grow, and one
            from the second on, where the synthetic faces become "age" too.
    Raises:
        ValueError: a threshold is negative, or the range none.
    """

    yaw_threshold: float = 0.35
    age_gap: float = 15.0
    age_range: tuple[float, float] = (18.0, 55.0)

    def __post_init__(self) -> None:
        for name in ("yaw_threshold", "age_gap"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is too small; the least is 0")
        if not self.age_range[0] < self.age_range[1]:
            raise ValueError(f"age_range: {self.age_range} is no range; give two ages, lowest first, such as 18 55")

    def domains(self, identities: np.ndarray, yaw: np.ndarray, age: np.ndarray) -> np.ndarray:
        """The domain of each image: "pose" before "age", "general" where nothing else is true.

        What is known of no image at all is left out. Otherwise "general" needs all of it: an image without a yaw may be
        turned (many a face detector fails on just these), so it stays unlabelled.

        Args:
            identities (`np.ndarray` of shape `(N,)`, int): identity of each image.
            yaw, age (`np.ndarray` of shape `(N,)`): NaN where unknown.
        Returns:
            `np.ndarray` of shape `(N,)`, text; empty where unlabelled.
        Raises:
            ValueError: the yaws are degrees, the threshold is not.
        """
        size, known = np.abs(yaw), ~np.isnan(age)
        if (turns := size[~np.isnan(size)]).size and np.median(turns) > DEGREES > self.yaw_threshold:
            raise ValueError(
                f"yaw_threshold: {self.yaw_threshold} is for a nose offset over eye distance, but the median yaw is "
                f"{np.median(turns):g} in size, as in degrees; give a threshold in the unit of the yaws, such as 40"
            )
        median = np.full(len(age), np.nan)
        if known.any():
            median[known] = ndimage.median(age[known], identities[known], identities[known])
        low, high = self.age_range
        aged = (np.abs(age - median) >= self.age_gap) | (age < low) | (age >= high)
        supplied = [values for values in (yaw, age) if not np.isnan(values).all()]
        unknown = np.isnan(supplied).any(axis=0) if supplied else np.ones(len(age), bool)
        return np.select([size > self.yaw_threshold, aged, unknown], ["pose", "age", ""], "general")


# --- tables -------------------------------------------------------------------------------------------------


def _rows(path: Path, required: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a CSV or parquet file stands, and its cells by column: `file` and at least the required ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, there is no row, or the file is damaged; names file, and line or row.
    """
    where = ""
    for where, row in _parquet_rows(path) if _is_parquet(path) else _csv_rows(path):
        if missing := [column for column in required if column not in row]:
            raise ValueError(f"{shown(path)}: no column '{missing[0]}', only {shown(', '.join(row))}")
        row["file"] = relative_name(str(row["file"]))
        yield where, row
    if not where:
        raise ValueError(f"{shown(path)}: has no row")


def _is_parquet(path: Path) -> bool:
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: no such file")
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line, row in read_csv(path):
        yield f"{shown(path)}, line {line}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as table:
            names = column_names(shown(path), table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=4096):
                for cells in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    yield f"{shown(path)}, row {number}", dict(zip(names, cells, strict=True))
                    number += 1
    except (OSError, ArrowException) as error:
        raise ValueError(f"{shown(path)}: is no parquet file, or a damaged one ({error})") from error


def _number(where: str, row: Mapping[str, Any], column: str) -> float:
    """A cell as a finite number, NaN where it is empty."""
    value = row[column]
    if value is None or value != value or not str(value).strip():
        return math.nan
    try:
        number = float(value)
    except ValueError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where}: {column} '{shown(str(value))}' is no finite number")
    return number


def _matched(
    path: Path, source: FaceSource, columns: Sequence[str], strangers: list[str]
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Index of the image, place and cells of each row; those that name no image are added to `strangers`.

    Raises:
        FileNotFoundError, ValueError: see [`_rows`]; or an image is listed twice.
    """
    index, listed = {source.key(at): at for at in range(len(source))}, set()
    for where, row in _rows(path, columns):
        at = index.get(row["file"])
        if at is None:
            strangers.append(f"{where}: '{shown(row['file'])}' is no image of the source")
            continue
        if at in listed:
            raise ValueError(f"{where}: '{shown(row['file'])}' was listed before")
        listed.add(at)
        yield at, where, row


@dataclass(frozen=True)
class Known:
    """What a table says of a source's images.

    Attributes:
        values (`dict[str, np.ndarray]`): "yaw", "age" or both, `(N,)`, NaN where the table has nothing.
        strangers (`list[str]`): rows that name no image of the source.
        unlisted (`list[str]`): images without a row.
    """

    values: dict[str, np.ndarray] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)


def read_known(
    source: FaceSource, path: Path, yaw: str | None = None, age: str | None = None, landmarks: bool = False
) -> Known:
    """Yaws and ages from a table with a column `file` that names images by their key.

    Args:
        source: the faces.
        path: CSV or parquet. A key is a path relative to the image folder or list, with "/"; the key of a record; or
            the number of a data set's row, from 0.
        yaw, age: columns of the table.
        landmarks: take the yaw from `LANDMARK_COLUMNS` instead, by [`yaw_proxy`].
    Raises:
        FileNotFoundError, ValueError: no column was asked for, a column is missing, a cell is no number, an image is
            listed twice, or no row names an image of the source.
    """
    if yaw and landmarks:
        raise ValueError(f"yaw '{yaw}' and landmarks both tell the yaw; choose one of them")
    columns = [*(LANDMARK_COLUMNS if landmarks else ()), *(name.strip().lower() for name in (yaw, age) if name)]
    if not columns:
        raise ValueError(f"{shown(path)}: say what to take from it: a column of yaws or ages, or landmarks")
    strangers: list[str] = []
    cells, listed = np.full((len(source), len(columns)), np.nan), np.zeros(len(source), bool)
    for at, where, row in _matched(path, source, columns, strangers):
        listed[at] = True
        cells[at] = [_number(where, row, column) for column in columns]
    if not listed.any():
        raise ValueError(
            f"{shown(path)}: none of its {len(strangers)} rows is an image of {source.name}, whose first is called "
            f"'{shown(source.key(0))}'{problems(strangers)}"
        )
    values = {}
    if landmarks:
        values["yaw"] = yaw_proxy(cells[:, : len(LANDMARK_COLUMNS)])
    elif yaw:
        values["yaw"] = cells[:, 0]
    if age:
        values["age"] = cells[:, -1]
    return Known(values, strangers, [source.where(at) for at in np.flatnonzero(~listed).tolist()])


# --- the sidecar --------------------------------------------------------------------------------------------


def read_sidecar(path: Path, source: FaceSource, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of a sidecar, in the order of the source's images.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of this source: its images are others, or of other identities; counted, the first named.
    """
    strangers: list[str] = []
    others: list[str] = []
    found: dict[str, list[Any]] = {column: [None] * len(source) for column in columns}
    listed = np.zeros(len(source), bool)
    for at, where, row in _matched(path, source, columns, strangers):
        listed[at] = True
        identity = source.identities[source.labels[at]]
        if shown(other := str(row.get("identity", identity))) != shown(identity):
            others.append(f"{where}: '{shown(row['file'])}' is of '{shown(identity)}', not of '{shown(other)}'")
        for column in columns:
            found[column][at] = row[column]
    missing = [f"'{shown(source.key(at))}' has no row" for at in np.flatnonzero(~listed).tolist()]
    if strangers or missing or others:
        raise ValueError(
            f"{shown(path)}: is of another source than {source.name}, or that has changed: {len(missing)} of "
            f"{len(source)} images have no row, {len(strangers)} rows are no image, {len(others)} name another "
            f"identity; label this source anew, in another file{problems(missing + strangers + others)}"
        )
    return found


def relabel(source: FaceSource, path: Path, domains: Sequence[str] | None) -> None:
    """Give a source the labels of a sidecar in place of its own; an empty cell is unlabelled.

    Args:
        path: the sidecar, or any table with the columns `file` and `domain` that lists every image.
        domains: see `open_source`.
    Raises:
        FileNotFoundError, ValueError: see [`read_sidecar`]; or it names an unknown domain.
    """
    numbers = DomainNumbers(domains)
    names = read_sidecar(path, source, ["domain"])["domain"]
    labels = [numbers.number(f"{shown(path)}, '{shown(source.key(at))}'", name) for at, name in enumerate(names)]
    source.domain_labels, source.domains = np.array(labels, np.int64), tuple(numbers.names)


def check_place(source: FaceSource, path: str | os.PathLike[str], sidecar: Path) -> None:
    """That a sidecar does not change what `open_source(path)` finds: a folder with a parquet file is a data set.

    Raises:
        ValueError: `sidecar` is a parquet file inside the source.
    """
    folder = Path(path).expanduser()
    inside = folder.is_dir() and sidecar.resolve().is_relative_to(folder.resolve())
    if inside and sidecar.suffix.lower() == ".parquet" and not isinstance(source, RecordSource):
        raise ValueError(
            f"{shown(sidecar)}: lies in the source, and {source.name} would be a parquet data set from then on; "
            "write it elsewhere, or as a .csv"
        )


def label_faces(
    source: FaceSource,
    path: Path,
    known: Known | None = None,
    estimator: str = "",
    rule: Rule | None = None,
    workers: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure what is not yet measured, label every image, write the sidecar.

    Measurements of an earlier sidecar at `path` are kept, and those of a call that was broken off, which grow in a
    hidden file beside it; yaws and ages too, unless `known` or another estimator has them anew. Broken images are tried
    again each time. Delete the sidecar to measure everything again.

    Args:
        source: the faces.
        path: the sidecar, .csv or .parquet.
        known: yaws and ages of a table.
        estimator: `module:function` that estimates the age of each image.
        rule: thresholds.
        workers: processes to measure with; 0 measures in this one.
        progress: show a progress bar.
    Returns:
        `dict`, JSON-ready: `source`, `sidecar`, `images`, `measured` (images measured in this call), `domains` (counts,
        with `unlabelled`), `measurements` (of each, how many are known and their quantiles), `broken` (errors), and of
        the table `rows_without_image` and `images_without_row`.
    Raises:
        OSError: the sidecar cannot be written; what is saved stays.
        ValueError: `path` has another suffix or holds the sidecar of another source, or the estimator fails.
    """
    known, rule = known or Known(), rule or Rule()
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise ValueError(f"{shown(path)}: a sidecar is a .csv or a .parquet file; name one")
    if estimator:
        if "age" in known.values:
            raise ValueError(f"the table and '{estimator}' both tell the age; choose one of them")
        load_estimator(estimator)
    unfinished = partial_path(path)
    columns = _begin(source, unfinished if unfinished.exists() else path)
    columns |= known.values
    if "age" in known.values:
        columns["estimator"][:] = ""

    def save() -> None:
        with replacing(unfinished) as file:
            _write(file, columns, path.suffix.lower() == ".parquet")

    columns["domain"] = rule.domains(source.labels, columns["yaw"], columns["age"])
    save()  # at once: that it cannot be written is to be known before hours of work
    todo = np.isnan(columns["luminance"]) | (columns["estimator"] != estimator if estimator else False)
    indices, broken = np.flatnonzero(todo).tolist(), []
    looks = map_images(partial(_look, estimator=estimator), source, indices, workers, progress, "measure")
    for count, (index, look) in enumerate(zip(indices, looks, strict=True), start=1):
        if look.error is not None:
            broken.append(look.error)
        else:
            for name in ("luminance", "imbalance", "sharpness"):
                columns[name][index] = getattr(look, name)
            if estimator:
                columns["age"][index], columns["estimator"][index] = look.age, estimator
        if count % SAVE_EVERY == 0:
            save()

    columns["domain"] = rule.domains(source.labels, columns["yaw"], columns["age"])
    save()
    os.replace(unfinished, path)
    sync_folder(path.parent)
    counts = Counter(str(name) or "unlabelled" for name in columns["domain"])
    return {
        "source": source.name,
        "sidecar": str(path),
        "images": len(source),
        "measured": len(indices) - len(broken),
        "domains": {name: counts[name] for name in ("general", "pose", "age", "unlabelled")},
        "measurements": {name: _spread(columns[name]) for name in MEASUREMENTS},
        "broken": broken,
        "rows_without_image": known.strangers,
        "images_without_row": known.unlisted,
    }


def _begin(source: FaceSource, path: Path) -> dict[str, np.ndarray]:
    """Columns of the sidecar, as far as an earlier one has them."""
    columns: dict[str, np.ndarray] = {
        "file": np.array([source.key(index) for index in range(len(source))], object),
        "identity": np.array([_in_a_line(name) for name in source.identities], object)[source.labels],
        "domain": np.full(len(source), "", object),
        **{name: np.full(len(source), np.nan) for name in MEASUREMENTS},
        "estimator": np.full(len(source), "", object),
    }
    if path.exists():
        found = read_sidecar(path, source, COLUMNS)
        for name in MEASUREMENTS:
            columns[name][:] = [_number(shown(path), {name: value}, name) for value in found[name]]
        columns["estimator"][:] = [value or "" for value in found["estimator"]]
    return columns


def _in_a_line(name: str) -> str:
    """A name without the line breaks that a CSV may hold in file names only."""
    return name.replace("\n", r"\n").replace("\r", r"\r")


def _write(path: Path, columns: Mapping[str, np.ndarray], as_parquet: bool) -> None:
    if as_parquet:
        import pyarrow as pa
        from pyarrow.parquet import write_table

        try:
            table = pa.table({name: pa.array(columns[name], from_pandas=True) for name in COLUMNS})  # NaN: null
        except UnicodeEncodeError as error:
            raise ValueError(f"{error.object!r}: parquet holds no name that is not UTF-8; write a .csv") from error
        write_table(table, path)
        return
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in zip(*(columns[name].tolist() for name in COLUMNS), strict=True):
            writer.writerow("" if cell != cell else cell for cell in row)  # NaN differs from itself


# --- the report ---------------------------------------------------------------------------------------------


def _spread(values: np.ndarray) -> dict[str, Any]:
    """How many values are known, and their quantiles."""
    known = values[~np.isnan(values)]
    quantiles = {f"{100 * share:g} %": float(np.quantile(known, share)) for share in QUANTILES if known.size}
    return {"known": known.size, "quantiles": quantiles}


def as_text(report: Mapping[str, Any]) -> str:
    """The report for a terminal; long lists are cut, and say so."""
    images = report["images"]
    lines = [
        f"{report['sidecar']}: {images:,} images of {report['source']}, {report['measured']:,} of them measured now",
        *(f"{name}: {count:,} ({100 * count / images:.1f} %)" for name, count in report["domains"].items()),
    ]
    for name, found in report["measurements"].items():
        quantiles = ", ".join(f"{share}: {value:.4g}" for share, value in found["quantiles"].items())
        lines.append(f"{name} known of {found['known']:,}" + (f"; {quantiles}" if quantiles else ""))
    for name in ("broken", "rows_without_image", "images_without_row"):
        if entries := report[name]:
            lines.append(f"{name.replace('_', ' ')}: {len(entries):,}{problems(entries)}")
    return "\n".join(lines)
