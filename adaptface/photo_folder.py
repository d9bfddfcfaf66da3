"""A folder of photos -> a table of embeddings, and a gallery of the people in it.

Embedding a folder goes on where it was broken off: finished photos are kept beside the table, under a hidden name,
until the table is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet
from tqdm import tqdm

from adaptface.data.base import shown
from adaptface.data.folder import IMAGE_SUFFIXES, find_images, person_of
from adaptface.faces import FaceEmbedder, FaceEmbeddings
from adaptface.files import replacing, sha256, write_text_atomically
from adaptface.gallery import Gallery

PART = 512  # photos that are written at a time: at most these are embedded again after a crash
FORMATS = (".parquet", ".npz")
_KINDS = " ".join(IMAGE_SUFFIXES)
_METADATA = b"adaptface_embeddings"


@dataclass(frozen=True)
class Report:
    """What became of some photos.

    Attributes:
        photos (`int`): how many there are, with all files among them that are expected to be photos.
        faces (`int`): rows of the table, or templates that were enrolled.
        kept (`int`): photos of them that an earlier, broken off run had embedded.
        errors (`dict[str, str]`): why a photo gave nothing, by its path below the folder.
    """

    photos: int
    faces: int
    kept: int
    errors: dict[str, str]


class Photos(NamedTuple):
    """Photos of a folder.

    Attributes:
        root (`Path`): the folder.
        names (`list[str]`): their paths below it with "/", in natural order.
        errors (`dict[str, str]`): why another file there, which may be meant as a photo, cannot be one; by its path.
    """

    root: Path
    names: list[str]
    errors: dict[str, str]


def photos_below(source: Path) -> Photos:
    """The photos below a folder, links to folders followed, or one photo and its folder.

    Raises:
        FileNotFoundError: there is no such file or folder, or no photo in it.
        ValueError: a link to a folder leads in a circle, or nowhere.
    """
    if source.is_file():
        root, names, others = source.parent, [source.name], list[str]()
    elif source.is_dir():
        root, (names, others) = source, find_images(source)
    else:
        raise FileNotFoundError(f"there is no photo or folder at {source}")
    errors = {shown(name): f"none of {_KINDS}; convert it" for name in others if not name.endswith(FORMATS)}
    unnamed = {name for name in names if not _is_text(name)}
    errors |= {
        shown(name): "its name is no valid Unicode and cannot be written down; rename it" for name in sorted(unnamed)
    }
    names = [name for name in names if name not in unnamed]
    if not names:
        first = "".join(f"; {name}: {error}" for name, error in list(errors.items())[:1])
        raise FileNotFoundError(f"{source} holds no photo ({_KINDS}){first}")
    return Photos(root, names, errors)


def _is_text(name: str) -> bool:
    """Whether a file's name is Unicode, which it need not be on Linux."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def embed_folder(embedder: FaceEmbedder, source: Path, out: Path, *, progress: bool = True, **options: Any) -> Report:
    """Embed all photos below a folder into one file, which its owner alone may read.

    A `.parquet` has a row a face: `file`, `embedding` (E float32, length 1), `quality`, `mix_DOMAIN` of each expert,
    `box`, `landmarks`, `score` (null of aligned crops) and `warnings`; its metadata `adaptface_embeddings` is JSON: the
    model and the options. An `.npz` has `embeddings`, `files` and `quality`; evaluation takes it, too.

    Args:
        embedder (`FaceEmbedder`): what embeds.
        source (`Path`): folder, with all folders below it, or one photo.
        out (`Path`): the file to be made, `.parquet` or `.npz`.
        progress: show a progress bar.
        options: `batch_size`, `aligned`, `faces`, `workers`; see [`~faces.FaceEmbedder.embed`].
    Returns:
        [`Report`]; a photo that cannot be read, or shows no face, is an error in it and no row.
    Raises:
        FileExistsError: `out` is there already.
        FileNotFoundError: there are no photos.
        OSError: a file cannot be written.
        ValueError: `out` is of another kind, or was begun with another model or options; or no photo gave a face.
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"{out}: give a name that ends in {' or '.join(FORMATS)}")
    if out.exists():
        raise FileExistsError(f"{out} is there already; move it away, or name another file")
    root, names, errors = photos_below(source)
    used = {key: value for key, value in options.items() if key in ("aligned", "faces")}
    used |= {"engine": embedder.engine, "dtype": str(embedder.embedder.model.dtype)}
    if not options.get("aligned"):
        used["detector_sha256"] = sha256(embedder.detector.file)
    made_by = {"model": embedder.identity(), "options": used}
    parts = _Parts(out, root, made_by, embedder)
    left = parts.missing(names)
    kept, total = len(names) - len(left), len(names) + len(errors)
    with tqdm(total=len(names), initial=kept, unit="photo", disable=not progress) as bar:
        for first, batch in _finished(embedder, root, left, options):
            parts.write(left[first : first + batch.photos], batch)
            bar.update(batch.photos)
    faces, failed = parts.finish(names)
    return Report(total, faces, kept, errors | failed)


@dataclass(frozen=True)
class _Batch:
    """Faces and errors of some photos in a row, each photo whole; `images` are counted from the first of them."""

    photos: int
    images: list[int]
    faces: list[Any]  # EmbeddedFace
    errors: dict[int, str]


def _finished(
    embedder: FaceEmbedder, root: Path, names: Sequence[str], options: dict[str, Any]
) -> Iterator[tuple[int, _Batch]]:
    """Number of the first photo, and what came of it and those behind it, as soon as `PART` of them are done."""
    rows: list[Any] = []
    errors: dict[int, str] = {}
    first = 0

    def batch(end: int) -> _Batch:
        done = [face for face in rows if face.image < end]
        rows[:] = [face for face in rows if face.image >= end]
        failed = {image - first: errors.pop(image) for image in sorted(errors) if image < end}
        return _Batch(end - first, [face.image - first for face in done], done, failed)

    photos = (root / name for name in names)
    for found in embedder.embed_batches(photos, on_error="skip", **options):
        rows += [found[row] for row in range(len(found))]
        errors |= found.errors
        open_photo = max([*(face.image for face in rows[-1:]), *errors], default=first)  # more faces of it may come
        if open_photo - first >= PART:
            yield first, batch(open_photo)
            first = open_photo
    if first < len(names):
        yield first, batch(len(names))


class _Parts:
    """The hidden folder beside a table that holds what is finished of it."""

    def __init__(self, out: Path, root: Path, made_by: dict[str, Any], embedder: FaceEmbedder) -> None:
        self.out, self.root, self.made_by = out, root, made_by
        self.folder = out.with_name(f".{out.name}.parts")
        config = embedder.config
        mixes = [f"mix_{name}" for name in config.domains] if config.has_router else []
        self.schema = pa.schema(
            [
                ("file", pa.string()),
                ("embedding", pa.list_(pa.float32(), config.embedding_size)),
                ("quality", pa.float32()),
                *((name, pa.float32()) for name in mixes),
                ("box", pa.list_(pa.float32(), 4)),
                ("landmarks", pa.list_(pa.float32(), 10)),
                ("score", pa.float32()),
                ("warnings", pa.list_(pa.string())),
            ]
        )
        self.part_schema = pa.schema(
            [*self.schema, ("error", pa.string()), ("bytes", pa.int64()), ("modified", pa.int64())]
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        begun = self.folder / "made_by.json"
        if begun.is_file():
            if json.loads(begun.read_text(encoding="utf-8")) != json.loads(json.dumps(made_by)):
                raise ValueError(
                    f"{out} was begun with another model or other options; delete {self.folder}, or name another file"
                )
        else:
            self.folder.mkdir(mode=0o700, exist_ok=True)  # embeddings are personal data
            write_text_atomically(begun, json.dumps(made_by))

    def _state(self, name: str) -> tuple[int, int]:
        """What changes when a photo does."""
        try:
            status = (self.root / name).stat()
        except OSError:  # embedding it says why
            return -1, -1
        return status.st_size, status.st_mtime_ns

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def missing(self, names: Sequence[str]) -> list[str]:
        """Photos that are in no part as they are now; parts that cannot be read are thrown away."""
        known: dict[str, tuple[int, int]] = {}
        for file in self._files():
            try:
                columns = parquet.read_table(file, columns=["file", "bytes", "modified"]).to_pydict()
            except (pa.ArrowException, OSError):
                file.unlink()
                continue
            known |= dict(zip(columns["file"], zip(columns["bytes"], columns["modified"], strict=True), strict=True))
        return [name for name in names if known.get(name) != self._state(name)]

    def write(self, names: Sequence[str], batch: _Batch) -> None:
        """Keep what came of some photos."""
        rows = []
        for image, face in zip(batch.images, batch.faces, strict=True):
            row = {"file": names[image], "embedding": face.embedding, "quality": face.quality}
            row |= {f"mix_{name}": weight for name, weight in (face.domain_mix or {}).items()}
            if face.face is not None:
                row |= {"box": face.face.box, "landmarks": face.face.landmarks.ravel(), "score": face.face.score}
            rows.append((image, {**row, "warnings": list(face.warnings)}))
        rows += [(image, {"file": names[image], "error": error}) for image, error in batch.errors.items()]
        for image, row in rows:
            row["bytes"], row["modified"] = self._state(names[image])
        last = max((int(file.stem.partition("-")[2]) for file in self._files()), default=-1)
        table = pa.Table.from_pylist([row for _, row in sorted(rows, key=lambda item: item[0])], self.part_schema)
        with replacing(self.folder / f"part-{last + 1:08}.parquet") as partial:
            parquet.write_table(table, partial)

    def finish(self, names: Sequence[str]) -> tuple[int, dict[str, str]]:
        """Make the table of the parts and remove them; returns its number of rows, and the errors."""
        wanted, faces = set(names), 0
        errors: dict[str, str] = {}
        newest: dict[str, int] = {}  # a photo that was changed is in an older part, too
        for number, file in enumerate(self._files()):
            newest |= dict.fromkeys(parquet.read_table(file, columns=["file"])["file"].to_pylist(), number)
        blocks = []
        for number, file in enumerate(self._files()):
            table = parquet.read_table(file)
            mine = [name in wanted and newest[name] == number for name in table["file"].to_pylist()]
            table = table.filter(pa.array(mine, pa.bool_()))
            failed = table.filter(pc.is_valid(table["error"]))
            errors |= dict(zip(failed["file"].to_pylist(), failed["error"].to_pylist(), strict=True))
            blocks.append((number, file, mine))
            faces += len(table) - len(failed)
        if not faces:
            shutil.rmtree(self.folder)
            first = next(iter(errors.values()), "there are no photos")
            raise ValueError(f"none of {len(names)} photos gave a face; the first: {first}")

        def rows() -> Iterator[pa.Table]:
            for _, file, mine in blocks:
                table = parquet.read_table(file).filter(pa.array(mine, pa.bool_()))
                yield table.filter(pc.is_null(table["error"])).select(self.schema.names)

        with replacing(self.out) as partial:
            partial.unlink(missing_ok=True)
            partial.touch(mode=0o600)
            if self.out.suffix == ".parquet":
                schema = self.schema.with_metadata({_METADATA: json.dumps(self.made_by)})
                with parquet.ParquetWriter(partial, schema) as writer:
                    for table in rows():
                        writer.write_table(table.cast(self.schema))
            else:
                table = pa.concat_tables(rows())
                with open(partial, "wb") as stream:
                    np.savez(
                        stream,
                        embeddings=_matrix(table),
                        files=np.array(table["file"].to_pylist()),
                        quality=table["quality"].to_numpy(),
                    )
        shutil.rmtree(self.folder)
        return faces, errors


def _matrix(table: pa.Table) -> np.ndarray:
    """(N, E) of the column `embedding`."""
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def enroll_folder(
    embedder: FaceEmbedder,
    gallery: Gallery,
    source: Path,
    identity: str | None = None,
    *,
    progress: bool = True,
    **options: Any,
) -> Report:
    """Enroll the people of a folder: a sub-folder is a person, a photo directly in it a person called as the file.

    Args:
        embedder (`FaceEmbedder`): what embeds.
        gallery (`Gallery`): of the embedder's model (`Gallery(E, model=embedder.identity())`); it is not saved here.
        source (`Path`): a folder, one photo, or a `.parquet` that [`embed_folder`] made.
        identity (`str`, *optional*): whose all these photos are.
        progress, options: see [`embed_folder`].
    Raises:
        FileNotFoundError: there are no photos.
        ValueError: the gallery or the table is of another model, or the table is no such file.
    """
    if source.suffix == ".parquet":
        names, embeddings, model = read_embeddings(source)
        people = [identity or person_of(name) for name in names]
        added = gallery.enroll(people, embeddings, names, model=model)
        return Report(len(set(names)), added, 0, {})
    root, names, errors = photos_below(source)
    total, added = len(names) + len(errors), 0
    photos = tqdm((root / name for name in names), total=len(names), unit="photo", disable=not progress)
    for found in embedder.embed_batches(photos, on_error="skip", **options):
        errors |= {names[image]: text for image, text in found.errors.items()}
        added += _enroll(gallery, found, names, identity, embedder.identity())
    return Report(total, added, 0, errors)


def _enroll(
    gallery: Gallery, found: FaceEmbeddings, names: Sequence[str], identity: str | None, model: dict[str, Any] | None
) -> int:
    if not len(found):
        return 0
    files = [names[image] for image in found.images]
    return gallery.enroll([identity or person_of(name) for name in files], found.embeddings, files, model=model)


def read_embeddings(path: Path) -> tuple[list[str], np.ndarray, dict[str, Any] | None]:
    """Files, embeddings (N, E) and model of a `.parquet` that [`embed_folder`] made.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another kind of file, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no table of embeddings at {path}")
    try:
        table = parquet.read_table(path, columns=["file", "embedding"])
        made_by = json.loads((parquet.read_schema(path).metadata or {})[_METADATA])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: no table of `adaptface embed`, or damaged: {type(error).__name__}; make it again"
        ) from error
    return table["file"].to_pylist(), _matrix(table), made_by["model"]
