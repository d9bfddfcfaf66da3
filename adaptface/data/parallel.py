"""One function over many images of a set, by several processes."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

from tqdm import tqdm

_CHUNK = 64  # images handed to a process at once

Faces = TypeVar("Faces")
Found = TypeVar("Found")


def map_images(
    function: Callable[[Faces, int], Found],
    faces: Faces,
    indices: Sequence[int],
    workers: int = 0,
    progress: bool = False,
    label: str = "look",
) -> Iterator[Found]:
    """`function(faces, index)` of each index, in order.

    Args:
        function: can be pickled, like `faces`: each process gets both once.
        workers: processes; 0 for this one.
        progress: show a progress bar, called `label`.
    """
    chunks = [indices[at : at + _CHUNK] for at in range(0, len(indices), _CHUNK)]
    with tqdm(total=len(indices), desc=label, unit="img", disable=not progress) as bar, ExitStack() as stack:
        results: Iterable[list[Found]]
        if workers == 0:
            results = ([function(faces, index) for index in chunk] for chunk in chunks)
        else:
            context = multiprocessing.get_context("spawn")
            results = stack.enter_context(
                ProcessPoolExecutor(workers, mp_context=context, initializer=_hold, initargs=(function, faces))
            ).map(_work, chunks)
        for found in results:
            yield from found
            bar.update(len(found))


_held: list[Any] = []  # in a worker process: the function, and the images it works on


def _hold(function: Callable[[Any, int], Any], faces: Any) -> None:
    _held[:] = [function, faces]


def _work(chunk: Sequence[int]) -> list[Any]:
    function, faces = _held
    return [function(faces, index) for index in chunk]
