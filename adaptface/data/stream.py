"""Training faces that are read as a stream and never stored whole: for sets larger than the disk.

    source = open_stream("hf://user/faces", split="train")
    batches = StreamBatches(source, batch_size=128, batches_per_step=1, rank=0, num_processes=2, seed=0)
    loader = DataLoader(TrainingFaces(source, processor, augmentation, seed=0), batch_sampler=batches, num_workers=4)

Each process walks the same shuffled stream of image files, whole steps at a time, and hands the rows of its own batches
to its loader workers, which decode and augment them. So a step holds the same images however it is divided, every
process finds an error at the same step, and to go on at a step is to walk to it: nothing of the stream is saved.
`datasets` can share shards out among processes instead, but then a step depends on their number, and processes whose
shards differ in size run out at different steps.
"""

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptface.data.base import (
    DEFAULT_DOMAINS,
    DOMAIN_COLUMN,
    FINGERPRINT_IMAGES,
    UNLABELLED,
    DomainNumbers,
    LabelledFaces,
    check_content,
    shown,
)
from adaptface.data.tables import (
    SAVED_MARKS,
    domain_codes,
    face_columns,
    identity_codes,
    image_file,
    is_dataset_folder,
    opening,
    parquet_files,
)
from adaptface.schedule import EpochBatches

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset
    from pyarrow import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a stream, not decoded: what goes to a loader worker."""

    index: int  # place in the order of the epoch
    file: Path | bytes
    path: str | None  # what the set calls the image
    label: int
    domain: int


class StreamSource(LabelledFaces):
    """Rows of a Hugging Face `datasets.IterableDataset`; its keys are `Row`s.

    Columns are told as in `DatasetsSource`, but identities must be a `ClassLabel`: its names are known before the rows
    are. A name without images keeps its label. The first rows are held: they are the sample, stand in for broken
    images, and tell a resumed run that the set is the same.

    Args:
        name: what messages and logs call this source.
        dataset: the stream, in its own order.
        num_images: length of the stream.
        domains: see `open_source`.
    Raises:
        ValueError: columns or labels are not usable, or there is no image; the message names the remedy.
    """

    def __init__(self, name: str, dataset: "IterableDataset", num_images: int, domains: Sequence[str] | None):
        from datasets import ClassLabel
        from datasets import Image as ImageFeature

        if dataset.features is None:
            raise ValueError(f"{name}: does not say of which types its columns are; write it again as parquet")
        self.name, self._num_images = name, num_images
        self._image, self._identity = face_columns(name, dataset)
        self._has_domains = DOMAIN_COLUMN in dataset.column_names
        self._features, self._domains = dataset.features, DomainNumbers(domains)
        feature = self._features[self._identity]
        if not isinstance(feature, ClassLabel):
            raise ValueError(
                f"{name}: column '{self._identity}' is no ClassLabel, so the number of identities is not known before "
                f"all is read; write the set again after `dataset.class_encode_column('{self._identity}')`, or read "
                "it whole, with stream: false"
            )
        self.identities = list(feature.names)
        self._labels = {identity: label for label, identity in enumerate(feature.names)}
        if len(self.identities) < 2:
            raise ValueError(f"{name}: column '{self._identity}' names {len(self.identities)} identities; give two")
        columns = [self._image, self._identity, *([DOMAIN_COLUMN] if self._has_domains else [])]
        undecoded = dataset.select_columns(columns).cast_column(self._image, ImageFeature(decode=False))
        self.stream = undecoded.with_format("arrow")
        first = next(self.stream.iter(batch_size=FINGERPRINT_IMAGES), None)
        if first is None:
            raise ValueError(f"{name}: holds no image")
        self._first = self.rows(first, *self.targets(first, f"{name}, first rows"), 0)
        if remote := next(
            (row.file for row in self._first if isinstance(row.file, Path) and ":/" in str(row.file)), None
        ):
            raise ValueError(
                f"{name}: holds addresses such as {remote} in place of images; write it as parquet, as `push_to_hub` "
                "does, or read it whole, with stream: false"
            )

    def targets(self, table: "Table", name: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels and domains `(N,)` of a table's rows.

        Raises:
            ValueError: a row has no identity, or a domain of an unknown name.
        """
        codes, names = identity_codes(
            name, self._identity, table.column(self._identity), self._features[self._identity]
        )
        labels = np.array([self._labels[identity] for identity in names])[codes]
        if not self._has_domains:
            return labels, np.full(len(labels), UNLABELLED)
        feature = self._features[DOMAIN_COLUMN]
        return labels, domain_codes(name, table.column(DOMAIN_COLUMN), feature, self._domains)

    def rows(self, table: "Table", labels: np.ndarray, domains: np.ndarray, first_index: int) -> list[Row]:
        """The rows of a table, the first of which has the index `first_index`."""
        cells = table.column(self._image).to_pylist()
        return [
            Row(index, image_file(cell), cell and cell["path"], int(label), int(domain))
            for index, (cell, label, domain) in enumerate(zip(cells, labels, domains, strict=True), first_index)
        ]

    def __len__(self) -> int:
        return self._num_images

    @property
    def has_domains(self) -> bool:
        return self._has_domains

    def numbers(self, row: Row) -> dict[str, int]:
        return {"label": row.label, "domain": row.domain, "index": row.index}

    def stand_ins(self, row: Row) -> Iterator[Row]:
        start = row.index % len(self._first)
        yield from self._first[start:]
        yield from self._first[:start]

    def sample(self, most: int) -> list[Row]:
        return self._first[:most]

    def images_an_identity(self) -> str:
        return "not known of a stream"

    def describe(self) -> str:
        domains = "with" if self._has_domains else "without"
        return f"{len(self)} images of {len(self.identities)} identities, {domains} domain labels, as a stream"

    def fingerprint(self) -> str:
        """See `LabelledFaces`; of labels and images only the first are seen."""
        digest = hashlib.sha256("\n".join([str(len(self)), *self.identities]).encode("utf-8", "surrogatepass"))
        for row in self._first:
            digest.update(f"{row.label} {row.domain}\n".encode())
            with suppress(OSError):
                digest.update(self.encoded(row))
        return digest.hexdigest()

    def where(self, row: Row) -> str:
        called = f" ({shown(row.path)})" if row.path else ""
        return f"{self.name}, image {row.index}{called} of the stream, column {self._image!r}"

    def _encoded(self, row: Row) -> Path | bytes:
        return row.file


class StreamBatches(EpochBatches):
    """The rows of each batch of one process, as `EpochBatches` gives indices: cut from one shuffled stream an epoch.

    The order depends on (seed, epoch) alone: `datasets` shuffles the shards, mixes ten of them, draws from a buffer.

    Args:
        source: the stream.
        batch_size, batches_per_step, rank, num_processes, seed: see `EpochBatches`.
        buffer_size: images held to draw from.
    Raises:
        ValueError: there are fewer images than one step needs; while iterating, in every process at the same step:
            there are fewer than the source says, or a row has no identity or an unknown domain.
    """

    def __init__(self, source: StreamSource, *division: int, buffer_size: int = 10_000) -> None:
        super().__init__(len(source), *division)
        self.source, self.buffer_size = source, buffer_size

    def __iter__(self) -> Iterator[list[Any]]:
        order = np.random.default_rng((self.seed, self.epoch))
        shuffled = self.source.stream.shuffle(generator=order, buffer_size=self.buffer_size)
        tables = shuffled.iter(batch_size=self.step_size, drop_last_batch=True)
        step = self.first_step
        for table in islice(tables, self.first_step, self.steps):
            # Of the whole step, so that what is wrong in another process's batch stops this one, too.
            name = f"{self.source.name}, epoch {self.epoch + 1}, step {step + 1} of it"
            labels, domains = self.source.targets(table, name)  # (step_size,) each
            for batch in range(self.batches_per_step):
                start = (batch * self.num_processes + self.rank) * self.batch_size
                part = slice(start, start + self.batch_size)
                yield self.source.rows(
                    table.slice(start, self.batch_size), labels[part], domains[part], step * self.step_size + start
                )
            step += 1
        if step < self.steps:
            raise ValueError(
                f"{self.source.name}: ended in step {step + 1} of {self.steps} of an epoch, so it has fewer than "
                f"{len(self.source)} images; give their true number as stream_images in a new run"
            )


def open_stream(
    path: str | os.PathLike[str],
    split: str = "train",
    domains: Sequence[str] | None = DEFAULT_DOMAINS,
    num_images: int | None = None,
) -> StreamSource:
    """Open a Hugging Face data set as a stream.

    Args:
        path: a parquet file or a folder of them, or a Hub dataset as `hf://user/name` or `user/name`.
        split, domains: see `open_source`.
        num_images: length of the split where the set does not tell: local parquet files and Hub datasets whose card
            was written by `push_to_hub` do.
    Raises:
        FileNotFoundError, ConnectionError: see `open_source`.
        ValueError: the set cannot be streamed; the message names the remedy.
    """
    import datasets

    text = os.fspath(path)
    local = Path(text).expanduser()
    name = shown(text)
    if not text.startswith("hf://") and local.exists():
        parquet = local.suffix.lower() == ".parquet" if local.is_file() else is_dataset_folder(local)
        if not parquet or any((local / mark).is_file() for mark in SAVED_MARKS):
            raise ValueError(
                f"{name}: is neither parquet nor a Hub dataset, and cannot be streamed; drop stream: it is read where "
                "it lies, image by image"
            )
        for file in parquet_files(local):
            check_content(file)
    with opening(text, local) as hub_id:
        if hub_id:
            builder = datasets.load_dataset_builder(hub_id)
        elif local.is_file():
            builder = datasets.load_dataset_builder(
                "parquet", data_files={split: glob.escape(os.fspath(local.absolute()))}
            )
        else:
            builder = datasets.load_dataset_builder(os.fspath(local.absolute()))
        stream = builder.as_streaming_dataset(split=split)
        num_images = num_images or _num_images(builder, split)
        if num_images is None:
            raise ValueError("does not say how many images it has; give their number as stream_images")
    return StreamSource(name, stream, num_images, domains)


def _num_images(builder: "DatasetBuilder", split: str) -> int | None:
    """The length of a split: of local parquet files as their footers say, else as the dataset's card says."""
    from pyarrow.parquet import read_metadata

    files = (builder.config.data_files or {}).get(split, [])
    if files and all(file.endswith(".parquet") and os.path.isfile(file) for file in files):
        return sum(read_metadata(file).num_rows for file in files)
    return info.num_examples if (info := (builder.info.splits or {}).get(split)) else None
