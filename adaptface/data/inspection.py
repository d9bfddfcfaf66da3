"""What a set of training faces holds, before a model is trained on it: counts, sizes, broken files, duplicates.

    report = inspect_faces(open_source("data/casia-webface"), load_pairs("lfw.bin"))
    print(as_text(report))
    draw(report, source, Path("faces.png"))

Every image is decoded once, by several processes. Duplicates are told by three signs, each weaker than the one before:
the same file, the same pixels, and the same difference hash (64 bits: whether brightness rises from each of 9 x 8 cells
to the next), which survives another encoding or size, and now and then meets another picture.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from adaptface.data.base import FaceSource
from adaptface.data.images import load_image, picture_format
from adaptface.data.parallel import map_images

SIGNS = ("file", "pixels", "hash")
_SHOWN = 20  # entries of a list in the text report; all are in the JSON
_FLAT = 8.0  # grey levels between the darkest and the brightest cell: below, the difference hash is noise


class Faces(Protocol):
    """What is looked at: training faces, or the images of a benchmark."""

    def __len__(self) -> int: ...

    def where(self, index: int, /) -> str:
        """What an image is called in a message."""

    def encoded(self, index: int, /) -> bytes:
        """The file of an image, as it lies on the disk."""


class Look(NamedTuple):
    """What one look at one image finds; `error` says why it is broken, the rest is then unknown.

    Attributes:
        bytes, width, height (`int`): of the file and the picture.
        format, mode (`str`): PIL's names, before conversion to RGB.
        signs (`tuple`): digests of file and pixels, and the difference hash (None for a flat picture).
    """

    bytes: int
    width: int
    height: int
    format: str
    mode: str
    signs: tuple[Any, ...]
    error: str | None = None


def look(faces: Faces, index: int) -> Look:
    """Decode one image; see [`Look`]."""
    try:
        content = faces.encoded(index)
        name, mode = picture_format(content, faces.where(index))
        image = load_image(content, faces.where(index))
    except (OSError, ValueError) as error:
        return Look(0, 0, 0, "", "", (), str(error))
    pixels = f"{image.size}".encode() + image.tobytes()
    digests = [hashlib.sha256(data).digest()[:16] for data in (content, pixels)]
    return Look(len(content), image.width, image.height, name, mode, (*digests, difference_hash(image)))


def difference_hash(image: Image.Image) -> int | None:
    """64 bits, one for each horizontal step between 9 x 8 cells; None where the picture is too flat for one."""
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    if np.ptp(cells) < _FLAT:
        return None
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


def look_at_all(faces: Faces, workers: int = 0, progress: bool = False, label: str = "look") -> list[Look]:
    """[`look`] at every image, in order; `workers` processes, 0 for this one."""
    return list(map_images(look, faces, range(len(faces)), workers, progress, label))


def inspect_faces(
    source: FaceSource,
    benchmarks: Mapping[str, Faces] | None = None,
    workers: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Look at every image of a training set.

    Args:
        source: the faces.
        benchmarks (mapping of names to images, *optional*): sets that must not share an image with them.
        workers (`int`): processes to decode with; 0 decodes in this one.
        progress: show progress bars.
    Returns:
        `dict`, JSON-ready: `source`, `images`, `identities`, `bytes`, `images_per_identity` (min, median, mean, max),
        `histogram` (number of images -> identities that have so many), `sizes`, `modes`, `formats` (counts), `broken`
        (image and error), `duplicates` within and across identities (groups of images, and the strongest sign that
        they share) and `overlap` (for each benchmark, groups of training and of benchmark images, and their sign).
    """
    looks = look_at_all(source, workers, progress)
    counts = np.bincount(source.labels, minlength=len(source.identities))
    good = [entry for entry in looks if entry.error is None]
    report: dict[str, Any] = {
        "source": source.name,
        "images": len(source),
        "identities": len(source.identities),
        "bytes": sum(entry.bytes for entry in good),
        "images_per_identity": {
            "min": int(counts.min()),
            "median": float(np.median(counts)),
            "mean": float(counts.mean()),
            "max": int(counts.max()),
        },
        "histogram": {str(images): people for images, people in sorted(Counter(counts.tolist()).items())},
        "sizes": _counted(f"{entry.width}x{entry.height}" for entry in good),
        "modes": _counted(entry.mode for entry in good),
        "formats": _counted(entry.format for entry in good),
        "broken": [
            {"image": source.where(i), "error": entry.error} for i, entry in enumerate(looks) if entry.error is not None
        ],
        "duplicates": {"within": [], "across": []},
        "overlap": {},
    }
    for group, sign in duplicate_groups(looks):
        people = {source.labels.item(index) for index in group}
        entry = {"sign": sign, "images": [source.where(index) for index in group], "indices": group}
        report["duplicates"]["within" if len(people) == 1 else "across"].append(entry)
    for name, images in (benchmarks or {}).items():
        theirs = look_at_all(images, workers, progress, f"look at {name}")
        report["overlap"][name] = [
            {"sign": sign, "training": [source.where(i) for i in ours], "benchmark": [images.where(j) for j in others]}
            for ours, others, sign in shared(looks, theirs)
        ]
    return report


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def duplicate_groups(looks: Sequence[Look]) -> list[tuple[list[int], str]]:
    """Indices of images that are one picture, and the strongest sign that all of a group share.

    The same images are told once, by their strongest sign; a weaker one may join them with others.
    """
    groups: dict[tuple[int, ...], str] = {}
    for place, sign in enumerate(SIGNS):
        for group in _by_sign(looks, place).values():
            if len(group) > 1:
                groups.setdefault(tuple(group), sign)
    return [(list(group), sign) for group, sign in groups.items()]


def shared(ours: Sequence[Look], theirs: Sequence[Look]) -> list[tuple[list[int], list[int], str]]:
    """Indices of two sets whose images are one picture, by groups, and their sign.

    The same images are told once, by their strongest sign; a weaker one may join them with others.
    """
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    for place, sign in enumerate(SIGNS):
        mine, other = _by_sign(ours, place), _by_sign(theirs, place)
        for value in mine.keys() & other.keys():
            groups.setdefault((tuple(mine[value]), tuple(other[value])), sign)
    return [(list(mine), list(other), sign) for (mine, other), sign in sorted(groups.items())]


def _by_sign(looks: Sequence[Look], place: int) -> dict[Any, list[int]]:
    """Indices of the images that have a sign, by its value."""
    members: dict[Any, list[int]] = defaultdict(list)
    for index, entry in enumerate(looks):
        if entry.error is None and entry.signs[place] is not None:
            members[entry.signs[place]].append(index)
    return members


# --- reports ------------------------------------------------------------------------------------------------


def as_text(report: Mapping[str, Any]) -> str:
    """The report for a terminal; long lists are cut, and say so."""
    per = report["images_per_identity"]
    lines = [
        f"{report['source']}",
        f"{report['images']:,} images of {report['identities']:,} identities, {report['bytes'] / 1e6:,.1f} MB",
        f"images an identity: {per['min']} to {per['max']}, median {per['median']:g}, mean {per['mean']:.1f}",
        *(f"{name}: {_shares(report[name])}" for name in ("sizes", "modes", "formats")),
    ]
    lines += _section("broken", [f"{entry['error']}" for entry in report["broken"]])
    for where, title in (("within", "duplicates within an identity"), ("across", "duplicates across identities")):
        lines += _section(title, [f"same {g['sign']}: {_several(g['images'])}" for g in report["duplicates"][where]])
    for name, groups in report["overlap"].items():
        entries = [f"same {g['sign']}: {_several(g['training'])} = {_several(g['benchmark'])}" for g in groups]
        lines += _section(f"shared with {name}", entries)
    return "\n".join(lines)


def _shares(counts: Mapping[str, int]) -> str:
    shown = [f"{name} ({count:,})" for name, count in list(counts.items())[:5]]
    return ", ".join(shown) + (f" and {len(counts) - 5} others" if len(counts) > 5 else "")


def _several(images: Sequence[str]) -> str:
    return ", ".join(images[:_SHOWN]) + (f" and {len(images) - _SHOWN:,} more" if len(images) > _SHOWN else "")


def _section(title: str, entries: Sequence[str]) -> list[str]:
    more = [f"  and {len(entries) - _SHOWN:,} more (all with --json)"] if len(entries) > _SHOWN else []
    return [f"{title}: {len(entries):,}", *(f"  {entry}" for entry in entries[:_SHOWN]), *more]


def draw(report: Mapping[str, Any], source: FaceSource, path: Path, people: int = 6, columns: int = 10) -> None:
    """The report as a picture: histogram of images an identity, faces of some people, duplicates across identities.

    Args:
        path: picture file; its suffix says the format.
        people, columns: rows and columns of the contact sheet.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    across = report["duplicates"]["across"][: people * 2]
    figure = Figure(figsize=(13, 8 if across else 6), layout="constrained")
    rows = figure.add_gridspec(2 if across else 1, 1, height_ratios=[3, 1] if across else [1])
    above = rows[0].subgridspec(1, 2, width_ratios=[1, 1.6])

    axes = figure.add_subplot(above[0])
    histogram = {int(images): count for images, count in report["histogram"].items()}
    step = -(-(max(histogram) - min(histogram) + 1) // 40)  # images a bar
    edges = np.arange(min(histogram), max(histogram) + step + 1, step) - 0.5
    axes.hist(list(histogram), bins=edges.tolist(), weights=list(histogram.values()), color="#4477aa")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="images an identity", ylabel="identities", title=f"{report['images']:,} images")

    chosen = np.unique(np.linspace(0, len(source.identities) - 1, people).astype(int)).tolist()
    rows_of_faces = [np.flatnonzero(source.labels == person)[:columns].tolist() for person in chosen]
    axes = figure.add_subplot(above[1])
    _show(axes, source, rows_of_faces, columns)
    axes.set_title(f"{len(chosen)} of {report['identities']:,} identities, a row each")
    if across:
        axes = figure.add_subplot(rows[1])
        _show(axes, source, [[index for group in across for index in group["indices"][:2]]], 2 * len(across))
        axes.set_title(f"duplicates across identities: {len(report['duplicates']['across']):,}, in pairs")
    figure.savefig(path, dpi=110)


def _show(axes: Any, source: FaceSource, rows: Sequence[Sequence[int]], columns: int, side: int = 64) -> None:
    """Images in rows, on white; a broken one stays grey."""
    sheet = Image.new("RGB", (columns * side, len(rows) * side), "white")
    for row, indices in enumerate(rows):
        for column, index in enumerate(indices):
            try:
                face = source.image(index).resize((side, side))
            except (OSError, ValueError):
                face = Image.new("RGB", (side, side), "grey")
            sheet.paste(face, (column * side, row * side))
    axes.imshow(np.asarray(sheet))
    axes.set_axis_off()
