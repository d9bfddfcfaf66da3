"""Verification benchmarks: what a path holds becomes a [`PairSet`].

load_pairs("dev_pairs.csv")                      # image_a,image_b,same[,fold][,domain]
load_pairs("lfw.bin")                            # insightface: pickled images and labels
load_pairs("lfw/pairs.txt", "lfw/aligned")       # LFW's own list: folds and pairs in its first line
load_pairs("cfp-dataset/Protocol/Split/FP")      # CFP's own folders of folds
"""

from __future__ import annotations

from pathlib import Path

from adaptface.data.pair_lists import load_list
from adaptface.data.pairs import PairSet
from adaptface.data.pickled import load_bin
from adaptface.data.protocols import is_cfp_split, is_lfw_list, load_cfp, load_lfw


def load_pairs(path: str | Path, images: str | Path | None = None) -> PairSet:
    """Read a pair list.

    Args:
        path: by its suffix:
            `.csv`: a header naming image_a, image_b, same (1/0) and optionally fold (a whole number) and domain.
            `.txt`: lines `image_a image_b 1|0`, without a header; or LFW's own list, told by its first line.
            `.bin`: insightface's pickled `(images, labels)`.
            a folder: CFP's `Protocol/Split/FP` or `FF`.
        images: folder that the image paths of a `.csv` or `.txt` are relative to. Default: the folder beside the list
            that is called like it without `_pairs`, or the list's own folder: where the first image is.
    Returns:
        [`PairSet`]. Without a fold column the folds are ten equal contiguous blocks.
    Raises:
        FileNotFoundError: no such list, or images are missing (all are counted, the first 20 listed).
        ValueError: another suffix, malformed content (with line or offset), one class only, too few pairs or folds.
    """
    path = Path(path)
    if is_cfp_split(path):
        return load_cfp(path, Path(images) if images is not None else None)
    if path.is_dir():
        raise ValueError(
            f"{path}: a folder, but none of CFP's splits (01/same.txt ...); name a list, or Protocol/Split/FP"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no pair list at {path}")
    suffix = path.suffix.lower()
    if suffix == ".bin":
        if images is not None:
            raise ValueError(f"{path} holds its images itself; leave out the image folder {images}")
        return load_bin(path)
    if suffix not in (".csv", ".txt"):
        raise ValueError(f"{path}: unknown pair list suffix {suffix!r}; use .csv, .txt or .bin")
    folders = [Path(images)] if images is not None else _default_folders(path)
    return load_lfw(path, folders) if suffix == ".txt" and is_lfw_list(path) else load_list(path, folders)


def _default_folders(path: Path) -> list[Path]:
    beside = path.parent / path.stem.removesuffix("_pairs")
    return [beside, path.parent] if beside.is_dir() else [path.parent]
