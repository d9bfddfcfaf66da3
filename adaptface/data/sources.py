"""Training sources: what a path holds becomes a `FaceSource` of labelled face images.

    source = open_source("data/faces")                 # one folder an identity, metadata.csv optional
    source = open_source("data/casia-webface")         # insightface RecordIO: train.rec, train.idx, property
    source = open_source("data/faces.csv")             # file,identity[,domain]; or a TXT of lines `file label`
    source = open_source("data/faces.parquet")         # Hugging Face `datasets`: parquet, saved, imagefolder
    source = open_source("hf://user/faces", split="validation")

For a Hugging Face set that is to be read as a stream and never stored whole see `open_stream` in `stream.py`.

A source keeps arrays of labels and compact file names in memory and opens images one by one, so that it is
cheap to hold for 500,000 images and to send to spawned workers.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from adaptface.data.base import DEFAULT_DOMAINS, FaceSource, shown
from adaptface.data.domains import relabel
from adaptface.data.folder import FolderSource
from adaptface.data.lists import LIST_SUFFIXES, ListSource
from adaptface.data.records import RecordSource, find_record_file
from adaptface.data.tables import DatasetsSource, is_dataset_folder, load_dataset


def open_source(
    path: str | os.PathLike[str],
    metadata: str | os.PathLike[str] | None = None,
    split: str = "train",
    domains: Sequence[str] | None = DEFAULT_DOMAINS,
    domain_labels: str | os.PathLike[str] | None = None,
    training: bool = True,
) -> FaceSource:
    """Open training faces, chosen by what `path` holds.

    Args:
        path: a folder of identity folders (or of train/validation/... folders of them); insightface RecordIO, as
            the `.rec` file or the folder that holds `train.rec`; a list of files with labels, as a CSV with the columns
            `file,identity[,domain]` or a TXT of lines `file label`; a parquet file or a folder of them; a dataset saved
            with `save_to_disk`; an imagefolder with metadata.jsonl/.parquet; a Hub dataset as `hf://user/name`, or as
            `user/name` where no such path exists.
        metadata: CSV of an image folder with the columns `file[,identity][,domain]`, others are ignored. Paths
            are relative to the folder, with forward slashes. `metadata.csv` inside the folder is found by itself.
            With an `identity` (or `person`, `label`) column the CSV must list every image, and wins over the folder
            names. An image that is not listed, or has an empty domain, carries no domain label.
        split: split of a dataset, or sub-folder of an image folder made of splits.
        domains: domain names; their order gives the domain labels, another name in the data is an error. None, for
            a model without a router: whatever names the data has, numbered as they turn up.
        domain_labels: sidecar of `adaptface domains`, whose labels take the place of the data's own.
        training: refuse what nothing can be trained on, images of one identity or outside any identity folder. Without
            it one identity will do, and an image directly in a folder is a person called as the file.
    Raises:
        FileNotFoundError: nothing at `path`, and no such dataset on the Hub; or no such sidecar.
        ConnectionError: the Hub cannot be reached and the dataset is not in the cache.
        ValueError: the data is empty, ambiguous or contradictory, or the sidecar is not its own; the message names file
            and line, or row.
    """
    # With a sidecar the data's own labels do not count, so neither their names.
    source = _open(path, metadata, split, None if domain_labels is not None else domains, loose=not training)
    if training:
        source.check_rivals()
    if domain_labels is not None:
        relabel(source, Path(domain_labels), domains)
    return source


def _open(
    path: str | os.PathLike[str],
    metadata: str | os.PathLike[str] | None,
    split: str,
    domains: Sequence[str] | None,
    loose: bool,
) -> FaceSource:
    """`open_source` without labels of a sidecar, and of one identity, too; `loose` images are each a person's."""
    text = os.fspath(path)
    local = Path(text).expanduser()
    is_local = not text.startswith("hf://") and local.exists()
    record_file = find_record_file(local) if is_local else None
    if is_local and not record_file and local.is_dir() and not is_dataset_folder(local):
        return FolderSource(local.absolute(), metadata, split, domains, loose)
    if metadata is not None:
        raise ValueError(
            f"metadata={os.fspath(metadata)!r}: goes with an image folder only; {shown(text)} carries its "
            "identities itself"
        )
    if is_local and (record_file or local.suffix.lower() in LIST_SUFFIXES):
        if split != "train":
            raise ValueError(
                f"{shown(text)}: is not divided into splits, so it has no {split!r}; give that part itself"
            )
        return RecordSource(record_file.absolute(), domains) if record_file else ListSource(local.absolute(), domains)
    if is_local and local.is_file() and local.suffix.lower() != ".parquet":
        raise ValueError(
            f"{shown(local)}: is a file of an unknown kind; give a folder of identity folders, a .rec or .parquet "
            "file, a .csv or .txt list of files with labels, or a Hub dataset"
        )
    return DatasetsSource(shown(text), load_dataset(text, local, split), domains)
