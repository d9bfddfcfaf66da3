"""Images -> embeddings, for any embedder.

All are compared in the same way: the features of an image and of its mirror image are added raw, then L2-normalised.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from adaptface.cache import FeatureCache
from adaptface.data.base import missing_files
from adaptface.embedders import Embedder, Preprocess
from adaptface.files import sha256

_BLOCK = 4096  # images whose features are taken from the cache at a time


class Images(Protocol):
    """PIL images in order: a list, or images opened lazily that `where(i)` may name."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class EncodedImages(Images, Protocol):
    """Images whose files can be read, too."""

    def encoded(self, index: int, /) -> bytes:
        """The file of an image, as it lies on the disk."""

    def digest(self, index: int, /) -> bytes:
        """SHA-256 of all that a picture is made of."""


class _Pixels(Dataset[torch.Tensor]):
    """Images through an embedder's preprocessing, with errors that name the image."""

    def __init__(self, images: Images, preprocess: Preprocess) -> None:
        self.images = images
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = self.images[index]
        try:
            return self.preprocess(image)
        except ValueError as error:
            raise ValueError(f"{_where(self.images, index)}: {error}") from error


def _where(images: Images, index: int) -> str:
    return images.where(index) if hasattr(images, "where") else f"image {index}"


def _batches(count: int, batch_size: int, processes: PartialState | None) -> list[list[int]]:
    """The batches of this process: every W-th one; at the end one again, so that all have equally many."""
    batches = [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]
    if processes is None:
        return batches
    rounds = -(-len(batches) // processes.num_processes)
    turns = range(processes.process_index, rounds * processes.num_processes, processes.num_processes)
    return [batches[min(turn, len(batches) - 1)] for turn in turns]


def _gathered(features: torch.Tensor, batch_size: int, processes: PartialState | None) -> torch.Tensor:
    """The features of all processes' batches of a round, in order; all but the last batch are full."""
    if processes is None or processes.num_processes == 1:
        return features
    padded = F.pad(features.to(processes.device), (0, 0, 0, batch_size - len(features)))  # equal shapes
    return gather(padded)


@torch.no_grad()
def feature_batches(
    embedder: Embedder,
    images: Images,
    batch_size: int = 64,
    flip: bool = True,
    num_workers: int = 0,
    progress: bool = True,
    processes: PartialState | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Raw features of images, in their order, a batch (with processes, a batch each) at a time.

    Args:
        embedder: what turns images into features.
        images: PIL images, opened when they are asked for; `images.where(i)`, where it exists, names one in errors.
        batch_size: images in one forward pass; their mirror images take a second one.
        flip: add the features of the mirror image.
        num_workers: processes that decode images; 0 decodes in this one.
        progress: show a progress bar.
        processes: processes that share the work, each with an embedder of its own; all get all features, and the same
            ones as a single process would.
    Yields:
        number of the first image, and features of shape `(B, E)`, float32, on the CPU.
    Raises:
        ValueError: an image cannot be read, or its features are zero, NaN or infinite; names the image.
    """
    if len(images) == 0:
        raise ValueError("there are no images to embed")
    loader = DataLoader(
        _Pixels(images, embedder.preprocess),
        batch_sampler=_batches(len(images), batch_size, processes),
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
    )
    start = 0
    shown = progress and (processes is None or processes.is_main_process)
    with tqdm(total=len(images), unit="img", desc=embedder.name, disable=not shown) as bar:
        for pixel_values in loader:
            pixel_values = pixel_values.to(embedder.device)  # (B, 3, H, W)
            features = embedder(pixel_values)  # (B, E)
            if flip:
                features = features + embedder(pixel_values.flip(-1))
            features = _gathered(features, batch_size, processes)[: len(images) - start].cpu()
            norms = features.norm(dim=1)
            broken = torch.nonzero(~(norms.isfinite() & (norms > 0))).flatten().tolist()
            if broken:
                raise ValueError(
                    f"{embedder.name}: the embedding of {_where(images, start + broken[0])} is zero, NaN or infinite"
                )
            yield start, features
            bar.update(len(features))
            start += len(features)


def embed_images(embedder: Embedder, images: Images, *args: Any, **kwargs: Any) -> np.ndarray:
    """Embed images in their order. Memory is bounded by the batch, but for the result.

    Args:
        see [`feature_batches`].
    Returns:
        `np.ndarray` of shape `(N, E)`, float32, rows of length 1.
    Raises:
        ValueError: see [`feature_batches`].
    """
    embeddings: np.ndarray | None = None
    for start, features in feature_batches(embedder, images, *args, **kwargs):
        if embeddings is None:
            embeddings = np.empty((len(images), features.shape[1]), dtype=np.float32)
        embeddings[start : start + len(features)] = F.normalize(features, dim=1).numpy()
    assert embeddings is not None
    return embeddings


class _Chosen:
    """Some of a set of images."""

    def __init__(self, images: EncodedImages, indices: Sequence[int]) -> None:
        self.images = images
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.images[self.indices[index]]

    def encoded(self, index: int) -> bytes:
        return self.images.encoded(self.indices[index])

    def digest(self, index: int) -> bytes:
        return self.images.digest(self.indices[index])

    def where(self, index: int) -> str:
        return _where(self.images, self.indices[index])


class Block(NamedTuple):
    """Features of some images in a row.

    Attributes:
        start (`int`): number of the first image.
        features (`np.ndarray` of shape `(B, E)`): raw features, float32.
        computed (`int`): how many of them were computed now, not found in the cache.
    """

    start: int
    features: np.ndarray
    computed: int


def feature_blocks(
    embedder: Embedder,
    images: EncodedImages,
    digests: Sequence[bytes] | None = None,
    flip: bool = True,
    cache_dir: Path | None = None,
    processes: PartialState | None = None,
    **options: Any,
) -> Iterator[Block]:
    """Raw features of images, in their order, those that the cache knows from there; memory is bounded by a block.

    Args:
        digests: of the images' contents; None takes them where they are needed.
        cache_dir: where features are kept from run to run, batch by batch; None keeps nothing. A live model, whose
            weights may change, is never kept.
        embedder, images, flip, processes, options: see [`feature_batches`].
    Raises:
        OSError: an image file or the cache cannot be read.
        ValueError: see [`feature_batches`].
    """
    common: dict[str, Any] = {"flip": flip, "processes": processes, **options}
    identity = None if cache_dir is None else embedder.identity()
    if cache_dir is None or identity is None or not len(images):
        for start, batch in feature_batches(embedder, images, **common):
            yield Block(start, batch.numpy(), len(batch))
        return

    cache: _Known | None = None  # of the main process alone: processes may be on machines of their own
    if processes is None or processes.is_main_process:
        of = {**identity, "flip": flip, "device": embedder.device.type}
        cache = _Known(FeatureCache(cache_dir, of), digests or _digests(images))
    known = _from_main(cache.known if cache else None, processes)  # (N,)
    missing = np.flatnonzero(~known)

    def computed() -> Iterator[np.ndarray]:
        for start, batch in feature_batches(embedder, _Chosen(images, missing.tolist()), **common):
            if cache:
                cache.keep(missing[start : start + len(batch)], batch.numpy())
            yield from batch.numpy()

    new = computed() if len(missing) else iter(())
    for start in range(0, len(images), _BLOCK):
        block = known[start : start + _BLOCK]
        old: Iterator[np.ndarray] = iter(())
        if block.any():
            old = iter(_from_main(cache.find(start + np.flatnonzero(block)) if cache else None, processes))
        yield Block(start, np.stack([next(old if kept else new) for kept in block]), int((~block).sum()))
    assert next(new, None) is None  # which also completes the progress bar
    if cache:
        cache.close()


def _digests(images: EncodedImages) -> list[bytes]:
    return [images.digest(index) for index in range(len(images))]


class _Known:
    """The cache, by the numbers of images."""

    def __init__(self, cache: FeatureCache, digests: Sequence[bytes]) -> None:
        self._cache = cache
        self._digests = digests
        there = cache.known(digests)
        self.known = np.array([digest in there for digest in digests], dtype=bool)  # (N,)

    def find(self, indices: np.ndarray) -> list[np.ndarray]:
        digests = [self._digests[index] for index in indices]
        found = self._cache.find(digests)
        return [found[digest] for digest in digests]

    def keep(self, indices: np.ndarray, features: np.ndarray) -> None:
        self._cache.keep([self._digests[index] for index in indices], features)

    def close(self) -> None:
        self._cache.close()


def _from_main(value: Any, processes: PartialState | None) -> Any:
    """The main process's value, in all processes."""
    if processes is None or processes.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


class Embedded(NamedTuple):
    """Embeddings of a set of images.

    Attributes:
        embeddings (`np.ndarray` of shape `(M, E)`): of the M images of different content, float32, rows of length 1.
        rows (`np.ndarray` of shape `(N,)`): row of each image.
        computed (`int`): how many of the M were embedded now, not found in the cache.
    """

    embeddings: np.ndarray
    rows: np.ndarray
    computed: int


def embed_distinct(embedder: Embedder, images: EncodedImages, *args: Any, **kwargs: Any) -> Embedded:
    """Embed images of the same content once, and those that the cache knows not at all.

    Args:
        see [`feature_blocks`].
    Raises:
        OSError, ValueError: see [`feature_blocks`].
    """
    rows: dict[bytes, int] = {}
    chosen: list[int] = []  # image that stands for each content
    row_of = np.empty(len(images), dtype=np.int64)
    for index, digest in enumerate(_digests(images)):
        if digest not in rows:
            rows[digest] = len(rows)
            chosen.append(index)
        row_of[index] = rows[digest]
    embeddings: np.ndarray | None = None
    computed = 0
    for start, features, new in feature_blocks(embedder, _Chosen(images, chosen), list(rows), *args, **kwargs):
        if embeddings is None:
            embeddings = np.empty((len(rows), features.shape[1]), dtype=np.float32)
        embeddings[start : start + len(features)] = F.normalize(torch.from_numpy(features), dim=1).numpy()
        computed += new
    assert embeddings is not None
    return Embedded(embeddings, row_of, computed)


class StoredEmbeddings:
    """Embeddings that were made elsewhere, as an `.npz` file.

    It holds `embeddings`, `(N, E)`, and says which image each row is of: `files`, `(N,)`, paths or the ends of them, as
    far up as they tell one image from another, with "/"; or `sha256`, `(N,)`, hex digests of the image files.

    Args:
        path: the file; it is read without unpickling.
        name: what reports call it; the path by default.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; an embedding is zero, NaN or infinite; two rows are of one image.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = name or str(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no file of embeddings at {self.path}")
        expected = "expected `embeddings` (N, E) and `files` or `sha256` (N,)"
        try:
            content = np.load(self.path, allow_pickle=False)
            if isinstance(content, np.ndarray):
                raise ValueError(f"it is a single array; {expected}")
            with content:
                arrays = {key: content[key] for key in ("embeddings", "files", "sha256") if key in content}
        except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{self.path}: cannot be read as .npz: {error}") from error
        embeddings = arrays.pop("embeddings", None)
        if embeddings is None or embeddings.ndim != 2 or embeddings.dtype.kind != "f" or len(arrays) != 1:
            raise ValueError(f"{self.path}: {expected}, found {', '.join(content.files) or 'nothing'}")
        ((self._key, names),) = arrays.items()
        if names.shape != embeddings.shape[:1] or names.dtype.kind != "U":
            raise ValueError(f"{self.path}: `{self._key}` must be {len(embeddings)} texts, one a row of `embeddings`")
        norms = np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)  # (N, 1)
        if len(broken := np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))):
            raise ValueError(f"{self.path}: row {broken[0]} ({names[broken[0]]}) is zero, NaN or infinite")
        self._row = {str(name): row for row, name in enumerate(names)}
        if len(self._row) < len(names):
            raise ValueError(f"{self.path}: {len(names) - len(self._row)} rows are of an image that another row is of")
        self._features, self._norms = embeddings, norms
        self._image: dict[int, tuple[str, str]] = {}  # digest and name of the image that each row was taken for

    def describe(self) -> dict[str, Any]:
        """Kind, name, and as revision the digest of the file, JSON-ready."""
        return {"kind": "embeddings", "name": self.name, "revision": f"sha256:{sha256(self.path)}"}

    def of(self, images: EncodedImages) -> Embedded:
        """The embeddings of these images.

        Raises:
            ValueError: see `rows`.
        """
        used, rows = np.unique(self.rows(images), return_inverse=True)
        return Embedded((self._features[used] / self._norms[used]).astype(np.float32), rows, 0)

    def blocks(self, images: EncodedImages) -> Iterator[Block]:
        """The features as they are given, as [`feature_blocks`] gives those of an embedder.

        Raises:
            ValueError: see `rows`.
        """
        rows = self.rows(images)
        for start in range(0, len(rows), _BLOCK):
            yield Block(start, self._features[rows[start : start + _BLOCK]].astype(np.float32), 0)

    def rows(self, images: EncodedImages) -> np.ndarray:
        """Row of each image.

        Raises:
            ValueError: some have none; all are counted and listed. Or a row's name fits other images, too.
        """
        rows, missing = [], []
        for index in range(len(images)):
            digest = hashlib.sha256(images.encoded(index)).hexdigest()
            where = _where(images, index)
            row = self._row.get(digest) if self._key == "sha256" else self._row_of_path(where)
            if row is None:
                missing.append(where)
                continue
            rows.append(row)
            first, other = self._image.setdefault(row, (digest, where))
            if first != digest:
                raise ValueError(f"{self.path}: one row fits both {other} and {where}; name longer paths, or sha256")
        if missing:
            listed = missing_files(missing)
            raise ValueError(f"{self.path}: has no row for {len(missing)} of {len(images)} images{listed}")
        return np.array(rows, dtype=np.int64)

    def _row_of_path(self, path: str) -> int | None:
        parts = Path(path).as_posix().split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((self._row[end] for end in ends if end in self._row), None)
