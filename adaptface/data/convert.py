"""Training faces from one format into another: image folder, insightface RecordIO, parquet.

    convert("data/casia-webface", "data/casia-folder")             # one folder an identity, and metadata.csv
    convert("data/casia-folder", "data/casia/train.rec")           # train.rec, train.idx, property
    convert("data/casia-folder", "data/casia-parquet", "parquet")  # shards that hold the images themselves

Image files are copied byte for byte, never decoded and encoded again. What is written grows in a hidden place beside
the destination and gets its name when it has been read back: as many images of as many identities, with the same
checksums. A conversion that was broken off goes on where it stopped.
"""

import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from adaptface.data.base import UNLABELLED, FaceSource, shown
from adaptface.data.images import starts_like
from adaptface.data.records import RecordSource, RecordWriter, pack
from adaptface.data.sources import open_source
from adaptface.data.tables import DatasetsSource, load_dataset
from adaptface.files import partial_path, replacing, sync_folder, write_text, write_text_atomically

KINDS = ("folder", "records", "parquet")
SHARD_IMAGES, SHARD_BYTES = 20_000, 100_000_000  # a parquet file ends at either; it is what a break can cost
GROUP_BYTES = 16_000_000  # of image files in a row group of it, which writer and readers hold in memory
_PLAN = ".convert.json"  # what a broken-off conversion was about; hidden, as it is in the way of no reader
_SUFFIXES = {
    "BMP": ".bmp", "GIF": ".gif", "JPEG": ".jpg", "JPEG2000": ".jp2", "PNG": ".png", "PPM": ".ppm", "TIFF": ".tif",
    "WEBP": ".webp",
}  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """What a set of faces holds, whatever its order and format.

    Attributes:
        images, identities (`int`): how many.
        bytes (`int`): of all image files together.
        checksum (`str`): SHA-256 over the sorted SHA-256 digests of (identity, domain, image file).
    """

    images: int
    identities: int
    bytes: int
    checksum: str


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    kind: str | None = None,
    *,
    metadata: str | os.PathLike[str] | None = None,
    split: str = "train",
    progress: bool = True,
) -> Contents:
    """Copy training faces into another format.

    Args:
        source, metadata, split: see `open_source`.
        destination: a new folder; for records also the `.rec` file to write, which may lie beside other files, else
            `train.rec` in the folder.
        kind: `folder`, `records` or `parquet`. Default: `records` if the destination ends in `.rec`, else `folder`.
        progress: show progress bars.
    Returns:
        [`Contents`] of what was written, read back and found equal to the source. Records hold no names: there the
        identities are compared as numbers, and domains are lost (which is refused unless there are none).
    Raises:
        FileNotFoundError, ValueError: see `open_source`; the destination cannot hold what the source does.
        FileExistsError: there is something at the destination, or it cannot be replaced.
        OSError: it could not be written; what is complete is kept for the next call.
    """
    kind = kind_of(destination, kind)
    target = Path(os.path.abspath(destination))  # "." has no name
    is_file = kind == "records" and target.suffix.lower() == ".rec"
    # A link to a folder cannot be replaced by one; beside a link to a .rec its index would not be found.
    target = Path(os.path.realpath(target.parent)) / target.name if is_file else Path(os.path.realpath(target))
    folder, file = (target.parent, target.name) if is_file else (target, "train.rec")
    joins = is_file and folder.is_dir()
    _check_destination(folder, _record_files(target) if joins else None)

    faces = open_source(source, metadata=metadata, split=split, domains=None)
    if not isinstance(faces, RecordSource) and target.is_relative_to(Path(source).expanduser().resolve()):
        raise ValueError(f"{shown(target)}: lies in the source, which would then hold other faces; name another place")
    partial = partial_path(target if joins else folder)
    _begin(partial, faces, kind, file)
    if kind == "folder":
        _write_folder(partial, faces, progress)
    elif kind == "records":
        _write_records(partial / file, faces, progress)
    else:
        _write_parquet(partial, faces, progress)

    by_number = kind == "records"
    wanted = contents(faces, by_number, progress, "source")
    with tempfile.TemporaryDirectory(dir=partial.parent, prefix=".convert-") as cache:  # of `datasets`, for parquet
        if kind == "parquet":
            copy: FaceSource = DatasetsSource(shown(partial), load_dataset(str(partial), partial, "train", cache), None)
        else:
            copy = open_source(partial / file if by_number else partial, domains=None)
        found = contents(copy, by_number, progress, "copy")
        del copy
    if found != wanted:
        raise ValueError(f"{shown(partial)}: the copy holds {found}, the source {wanted}; delete it and convert again")
    if joins:
        for path in _record_files(partial / file):
            path.rename(folder / path.name)
        (partial / _PLAN).unlink()
        partial.rmdir()
        sync_folder(folder)
    else:
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
        (folder / _PLAN).unlink()  # not before: without it the copy would be nobody's
        sync_folder(folder.parent)
    return found


def kind_of(destination: str | os.PathLike[str], kind: str | None) -> str:
    """The format to write, where None is given by the destination's name."""
    kind = kind or ("records" if Path(destination).suffix.lower() == ".rec" else "folder")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    return kind


def _check_destination(folder: Path, files: list[Path] | None) -> None:
    """Whether a folder can be made or replaced, or take `files` beside what else it holds; before all work."""
    for path in files or ():
        if os.path.lexists(path):
            raise FileExistsError(f"{shown(path)}: exists; name another .rec file, or one in a new folder")
    if files is not None or not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise FileExistsError(f"{shown(folder)}: is not empty; name a new folder")
    if os.path.ismount(folder) or folder.samefile("."):
        what = "a mount point" if os.path.ismount(folder) else "the working folder"
        raise FileExistsError(f"{shown(folder)}: is {what}, which cannot be replaced; name a new folder inside it")


def _record_files(path: Path) -> list[Path]:
    """What belongs to a `.rec` file; itself last, as the others are nothing without it."""
    return [path.with_suffix(".idx"), path.with_name("property"), path]


def contents(faces: FaceSource, by_number: bool = False, progress: bool = False, label: str = "") -> Contents:
    """Counts and checksum of a source; reads every image file.

    Args:
        by_number: take identities by their number and leave domains out, for comparison with a record file.
    """
    digests, size = [], 0
    for index in tqdm(range(len(faces)), desc=f"check {label}", unit="img", disable=not progress):
        image = faces.encoded(index)
        size += len(image)
        identity = str(faces.labels[index]) if by_number else faces.identities[faces.labels[index]]
        domain = "" if by_number else _domain(faces, index)
        names = json.dumps([identity, domain]).encode()
        digests.append(hashlib.sha256(names + hashlib.sha256(image).digest()).digest())
    checksum = hashlib.sha256(b"".join(sorted(digests))).hexdigest()
    return Contents(len(faces), len(faces.identities), size, checksum)


def _begin(partial: Path, faces: FaceSource, kind: str, file: str) -> None:
    """Make the hidden folder, or find in it the same conversion, broken off."""
    digest = hashlib.sha256(np.ascontiguousarray(faces.labels).tobytes() + faces.domain_labels.tobytes())
    digest.update(json.dumps([faces.identities, list(faces.domains)]).encode())
    plan = {"source": faces.name, "kind": kind, "file": file, "images": len(faces), "labels": digest.hexdigest()}
    record = partial / _PLAN
    if os.path.lexists(partial):
        if not record.is_file() and (not partial.is_dir() or any(partial.iterdir())):
            raise FileExistsError(f"{shown(partial)}: is in the way, and of no conversion; move or remove it")
        with suppress(FileNotFoundError, ValueError):  # none yet, or cut off when it was written
            if json.loads(record.read_text(encoding="utf-8")) == plan:
                return
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    write_text(record, json.dumps(plan))  # under no other name, by which it would not be known again


def _domain(faces: FaceSource, index: int) -> str:
    label = faces.domain_labels[index]
    return "" if label == UNLABELLED else faces.domains[label]


def _suffix(image: bytes, name: str) -> str:
    kind = starts_like(image)
    if kind is None:
        raise ValueError(f"{name}: is no image file; mend or remove it (`adaptface inspect` lists all such files)")
    return _SUFFIXES[kind]


def _by_identity(faces: FaceSource) -> Iterator[tuple[int, int, int]]:
    """Each image once, identity by identity: number of the identity, of the image within it, and its index."""
    order = np.argsort(faces.labels, kind="stable")
    starts = np.searchsorted(faces.labels[order], np.arange(len(faces.identities)))
    for place, index in enumerate(order.tolist()):
        label = faces.labels.item(index)
        yield label, place - starts.item(label), index


def _write_folder(folder: Path, faces: FaceSource, progress: bool) -> None:
    folded: dict[str, str] = {}
    for name in faces.identities:
        if not _can_name_a_folder(name):
            raise ValueError(
                f"{faces.name}: the identity '{shown(name)}' cannot name a folder; convert to parquet instead"
            )
        if (other := folded.setdefault(name.casefold(), name)) != name:
            raise ValueError(
                f"{faces.name}: the identities '{shown(other)}' and '{shown(name)}' differ by case only and would be "
                "one folder on other systems; rename one, or convert to parquet instead"
            )
    rows = []
    bar = tqdm(total=len(faces), desc="write", unit="img", disable=not progress)
    for label, number, index in _by_identity(faces):
        image = faces.encoded(index)
        identity = faces.identities[label]
        file = folder / identity / f"{number:06d}{_suffix(image, faces.where(index))}"
        if number == 0:
            file.parent.mkdir(exist_ok=True)
        if not file.is_file() or file.stat().st_size != len(image):  # else it was written before
            file.write_bytes(image)
        rows.append((f"{identity}/{file.name}", _domain(faces, index)))
        bar.update()
    bar.close()
    if any(domain for _, domain in rows):
        with (folder / "metadata.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerows([("file", "domain"), *rows])


def _can_name_a_folder(name: str) -> bool:
    """Whether this system can hold a folder of this name, and a reader of image folders finds it."""
    refused = set('/\\:*?"<>|\0' if os.name == "nt" else "/\\\0")
    trimmed = name.rstrip(". ") if os.name == "nt" else name
    return (
        bool(name) and trimmed == name and name[0] != "." and not refused & set(name) and len(os.fsencode(name)) < 256
    )


def _write_records(path: Path, faces: FaceSource, progress: bool) -> None:
    if (faces.domain_labels != UNLABELLED).any():
        raise ValueError(f"{faces.name}: names domains, which a record file cannot hold; convert to parquet instead")
    counts = np.bincount(faces.labels)
    images, identities = len(faces), len(faces.identities)
    writer = RecordWriter(path)
    bar = tqdm(total=images, initial=max(0, writer.count - 1), desc="write", unit="img", disable=not progress)
    if writer.count == 0:
        writer.write(0, pack([images + 1, images + 1 + identities], 0))
    try:
        for key, (label, _, index) in enumerate(_by_identity(faces), start=1):
            if key < writer.count:  # written before
                continue
            image = faces.encoded(index)
            _suffix(image, faces.where(index))
            writer.write(key, pack([label], key, image))
            bar.update()
        ends = np.cumsum(counts) + 1
        for label, end in enumerate(ends.tolist()):
            key = images + 1 + label
            if key >= writer.count:
                writer.write(key, pack([end - counts.item(label), end], key))
    finally:
        bar.close()
        writer.close()
    width, height = _image_size(faces)
    write_text_atomically(path.with_name("property"), f"{identities},{height},{width}\n")


def _image_size(faces: FaceSource) -> tuple[int, int]:
    """Of the first image that is not broken."""
    for index in range(len(faces)):
        try:
            return faces.image(index).size
        except ValueError:
            continue
    raise ValueError(f"{faces.name}: not one image can be decoded")


def _write_parquet(folder: Path, faces: FaceSource, progress: bool) -> None:
    """Shards as `datasets` writes them, but a row group at a time: memory holds no more than one."""
    from datasets import Features, Image, Value
    from pyarrow.parquet import ParquetWriter, read_metadata

    columns = {"image": Image(), "identity": Value("string"), "domain": Value("string")}
    if not (faces.domain_labels != UNLABELLED).any():
        del columns["domain"]
    for name in (*faces.identities, *faces.domains):
        if any("\ud800" <= char <= "\udfff" for char in name):  # bytes of a file name
            raise ValueError(
                f"{faces.name}: the name '{shown(name)}' is not UTF-8, as parquet needs it; rename it first"
            )
    schema = Features(columns).arrow_schema
    bar = tqdm(total=len(faces), desc="write", unit="img", disable=not progress)
    order = [index for *_, index in _by_identity(faces)]
    done = number = 0
    while done < len(order):
        file = folder / f"train-{number:05d}.parquet"  # how many there will be is not known before the last
        rows = size = 0
        if file.is_file():  # written before
            rows = read_metadata(file).num_rows
            bar.update(rows)
        else:
            with replacing(file) as partial, ParquetWriter(partial, schema) as writer:
                while (rest := order[done + rows : done + SHARD_IMAGES]) and size < SHARD_BYTES:
                    group = _row_group(faces, rest, schema)
                    writer.write_table(group)
                    rows, size = rows + len(group), size + group.nbytes
                    bar.update(len(group))
        done += rows
        number += 1
    bar.close()


def _row_group(faces: FaceSource, indices: list[int], schema: Any) -> Any:
    """The first of the images as a table, as many as make up a row group."""
    import pyarrow as pa

    rows: dict[str, list[Any]] = {name: [] for name in schema.names}
    size = 0
    for index in indices:
        image = faces.encoded(index)
        name = f"{index:08d}{_suffix(image, faces.where(index))}"
        rows["image"].append({"bytes": image, "path": name})
        rows["identity"].append(faces.identities[faces.labels[index]])
        if "domain" in rows:
            rows["domain"].append(_domain(faces, index) or None)
        if (size := size + len(image)) >= GROUP_BYTES:
            break
    return pa.table(rows, schema=schema)
