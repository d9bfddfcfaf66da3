"""Verification benchmarks: what a path holds becomes a [`PairSet`], or, of IJB, a [`TemplateSet`].

load_pairs("dev_pairs.csv")                      # image_a,image_b,same[,fold][,domain][,group][,identity_a,identity_b]
load_pairs("lfw.bin")                            # insightface: pickled images and labels
load_pairs("lfw/pairs.txt", "lfw/aligned")       # LFW's own list: folds and pairs in its first line
load_pairs("cfp-dataset/Protocol/Split/FP")      # CFP's own folders of folds
load_pairs("rfw/test")                           # RFW's own folders: txts/<Race>/<Race>_pairs.txt, data/<Race>
load_pairs("bfw-v0.1.5-datatable.csv", "bfw")    # BFW's own table
load_pairs("pairs.parquet")                      # Hugging Face `datasets`: parquet, saved
load_pairs("hf://user/pairs", split="test")      # ... or on the Hub
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from adaptface.data.pair_lists import load_list
from adaptface.data.pair_tables import load_pair_table
from adaptface.data.pairs import PairSet
from adaptface.data.pickled import load_bin
from adaptface.data.protocols import is_cfp_split, is_lfw_list, is_rfw, load_cfp, load_lfw, load_rfw
from adaptface.data.tables import HUB_ID, is_dataset_folder
from adaptface.data.templates import TemplateSet, is_ijb, load_ijb

LIST_SUFFIXES = (".bin", ".csv", ".txt")


def load_benchmark(path: str | Path, images: str | Path | None = None) -> PairSet | TemplateSet:
    """Whatever a path holds: IJB-B or IJB-C (a folder of `meta` and `loose_crop`), else pairs; see [`load_pairs`].

    Args:
        path: of a Hugging Face data set also with the split, `user/name:split`.
        images: see [`load_pairs`]; for those benchmarks only that do not hold their images themselves.
    """
    if is_ijb(Path(path)):
        return load_ijb(path)
    text = _text(path)
    name, _, split = text.rpartition(":")
    if re.fullmatch(r"\w+(\.\w+)*", split) and not Path(text).exists() and _is_table(name):
        return load_pairs(name, split=split)
    return load_pairs(text, None if _is_table(text) or _is_bin(Path(text)) else images)


def _text(path: str | Path) -> str:
    return re.sub("^hf:/+", "hf://", os.fspath(path))  # a Path keeps one slash


def _is_table(text: str) -> bool:
    """Whether it is a Hugging Face data set, here or on the Hub."""
    path = Path(text)
    suffix = path.suffix.lower()
    if path.exists():
        return is_dataset_folder(path) if path.is_dir() else suffix == ".parquet"
    return text.startswith("hf://") or (suffix not in LIST_SUFFIXES and HUB_ID.fullmatch(text) is not None)


def _is_bin(path: Path) -> bool:
    return path.suffix.lower() == ".bin" and path.is_file()


def load_pairs(path: str | Path, images: str | Path | None = None, split: str | None = None) -> PairSet:
    """Read a pair list.

    Args:
        path: by its suffix:
            `.csv`: a header naming image_a, image_b, same (1/0) and optionally fold (a whole number), domain, group,
            identity_a and identity_b; or BFW's table, told by its header.
            `.txt`: lines `image_a image_b 1|0`, without a header; or LFW's own list, told by its first line.
            `.bin`: insightface's pickled `(images, labels)`.
            a folder: CFP's `Protocol/Split/FP` or `FF`; RFW's, which holds `txts` and `data`.
            `.parquet`, a folder of them or one saved with `save_to_disk`, or a Hub dataset (`hf://user/name`, or
            `user/name` where no such path exists): see [`load_pair_table`].
        images: folder that the image paths are relative to. Default: for a list the folder beside it that is called
            like it without `_pairs`, or its own folder: where the first image is; for CFP and RFW their own.
        split: of a Hugging Face data set; default: the only one, else `test`.
    Returns:
        [`PairSet`]. Without a fold column the folds are ten equal contiguous blocks.
    Raises:
        FileNotFoundError: no such list, or images are missing (all are counted, the first 20 listed).
        ConnectionError: the Hub cannot be reached and the dataset is not in the cache.
        ValueError: another suffix, malformed content (with line, row or offset), one class only, too few pairs or
            folds.
    """
    text = _text(path)
    path = Path(text)
    is_table = _is_table(text)
    if images is not None and (is_table or _is_bin(path)):
        raise ValueError(f"{text} holds its images itself; leave out the image folder {images}")
    if is_table:
        return load_pair_table(text, path, split)
    if split is not None:
        raise ValueError(f"{text}: is not divided into splits, so it has no {split!r}; leave out the split")
    folder = Path(images) if images is not None else None
    if path.is_dir():
        for is_layout, load in ((is_cfp_split, load_cfp), (is_rfw, load_rfw)):
            if is_layout(path):
                return load(path, folder)
        raise ValueError(
            f"{path}: a folder, but none of CFP's splits (01/same.txt ...), not RFW's (txts/<Race>/<Race>_pairs.txt) "
            "and no data set of pairs; name a list, or Protocol/Split/FP"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no pair list at {path}")
    suffix = path.suffix.lower()
    if suffix == ".bin":
        return load_bin(path)
    if suffix not in LIST_SUFFIXES:
        raise ValueError(f"{path}: unknown pair list suffix {suffix!r}; use .csv, .txt, .bin or .parquet")
    folders = [folder] if folder is not None else _default_folders(path)
    return load_lfw(path, folders) if suffix == ".txt" and is_lfw_list(path) else load_list(path, folders)


def _default_folders(path: Path) -> list[Path]:
    beside = path.parent / path.stem.removesuffix("_pairs")
    return [beside, path.parent] if beside.is_dir() else [path.parent]
