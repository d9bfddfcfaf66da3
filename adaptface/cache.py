"""Features that were computed before, by the content of the image: an evaluation that is repeated embeds nothing."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_AT_ONCE = 500  # values in one query; SQLite's oldest limit is 999


def default_cache_dir() -> Path:
    """`ADAPTFACE_CACHE`, else `adaptface` in the user's cache folder."""
    if folder := os.environ.get("ADAPTFACE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptface"


class FeatureCache:
    """Raw features of one embedder in one SQLite file, which several runs may read and write at a time.

    Args:
        folder: created if it is not there; gets a file for each embedder.
        identity: everything that the features depend on beside the image, JSON-ready.
    Raises:
        OSError: the file cannot be read or written, or is none of SQLite's; so do the methods.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # features are personal data
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"features-{digest[:32]}.sqlite"
        with self._named_errors():
            self._database = sqlite3.connect(self.path, timeout=60)
            self._database.execute(
                "create table if not exists features (digest blob primary key, feature blob) without rowid"
            )

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(f"{self.path}: cannot be used as a cache ({error}); delete it, or use none") from error

    def known(self, digests: Sequence[bytes]) -> set[bytes]:
        """Those images whose features are kept."""
        return {digest for (digest,) in self._rows("digest", digests)}

    def find(self, digests: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The features, float32 of shape `(E,)`, of those images that are known."""
        return {digest: np.frombuffer(feature, np.float32) for digest, feature in self._rows("*", digests)}

    def _rows(self, columns: str, digests: Sequence[bytes]) -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(digests), _AT_ONCE):
            some = list(digests[start : start + _AT_ONCE])
            places = ",".join("?" * len(some))
            with self._named_errors():
                yield from self._database.execute(f"select {columns} from features where digest in ({places})", some)

    def keep(self, digests: Sequence[bytes], features: np.ndarray) -> None:
        """Add the features, `(N, E)`, of images; all of them or, after an error, none."""
        rows = [(digest, row.astype(np.float32).tobytes()) for digest, row in zip(digests, features, strict=True)]
        with self._named_errors(), self._database:
            self._database.executemany("insert or replace into features values (?, ?)", rows)

    def close(self) -> None:
        """Close the file; what was kept stays."""
        self._database.close()
