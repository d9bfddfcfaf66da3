"""Images -> embeddings, for any embedder.

All are compared in the same way: the features of an image and of its mirror image are added raw, then L2-normalised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from adaptface.embedders import Embedder, Preprocess


class Images(Protocol):
    """PIL images in order: a list, or images opened lazily that `where(i)` may name."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


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
