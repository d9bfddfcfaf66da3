"""Who is this, among the people enrolled? A gallery of embeddings, searched by cosine similarity (1:N).

It is built on faiss itself: `datasets`' FAISS index can neither remove nor group by person, and keeps no model's name.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from adaptface.files import replacing

VERSION = 1  # of the file
EXACT_BELOW = 50_000  # templates up to which all are compared: at most some 7 ms a query
SAMPLE = 16_384  # templates that the compressed codes are fitted to
CANDIDATES = 1_000  # templates, best by their codes, that are compared exactly for up to 20 people
MARGIN = 3.5  # standard deviations of the codes' error that stand between a found and an unseen template
_BLOCK = 65_536  # rows of one step: bounds what saving and searching hold beside the embeddings
_METADATA = b"adaptface_gallery"


@dataclass(frozen=True, slots=True)
class Match:
    """A person that a search found.

    Args:
        identity: as enrolled.
        similarity: cosine of the query and that template of this person which is nearest to it, -1..1.
        source: the name that this template was enrolled with, or None.
    """

    identity: str
    similarity: float
    source: str | None = None


class Gallery:
    """People, each with one or more templates (embeddings), and the search for those nearest to a query.

    All methods may be called from several threads; they take turns. Embeddings are personal data, and so is a gallery.

    Up to `EXACT_BELOW` templates every search compares all. In a larger one the first search builds 4-bit codes of
    the templates (product quantisation, two dimensions a code); a search then scans the codes, compares the best
    `CANDIDATES` exactly, and goes on with four times as many as long as a template it has not compared could, by the
    codes' observed error, belong to its answer. So similarities are always exact; what the answer may lack is measured
    by `benchmarks/gallery.py`. `search(..., exact=True)` compares all.

    Args:
        dim: length E of an embedding.
        model (*optional*): what makes the embeddings, JSON-ready (weights' digest, revision, protocol). What is given
            to other methods as `model` must equal it: similarities between two models' embeddings mean nothing.
    Raises:
        ImportError: faiss is not installed.
        ValueError: `dim` is not positive, or `model` is not JSON-ready.
    Source: the scan is `IndexPQFastScan` of faiss (André, Kermarrec, Le Scouarnec, "Quicker ADC", arXiv:1812.09162).
    """

    def __init__(self, dim: int, *, model: Mapping[str, Any] | None = None) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError("a gallery needs faiss: pip install 'adaptface[gallery]'") from error
        if dim < 1:
            raise ValueError(f"dim is {dim}; give the length of an embedding, e.g. 512")
        self._faiss = faiss
        self.dim = int(dim)
        self.model = None if model is None else _json_ready(model)
        self._lock = threading.Lock()
        self._count = 0  # templates; rows beyond them in the arrays below are room to grow
        self._vectors = np.empty((0, self.dim), np.float32)  # (capacity, E), length 1
        self._owners = np.empty(0, np.int32)  # (capacity,), places in _names
        self._sources: list[str | None] = []
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}  # the place of each name in _names
        self._codes: Any = None  # faiss index of the codes; None: not built
        self._codes_of = 0  # templates when it was fitted

    # ------------------------------------------------------------------------------------------------ what is enrolled

    def __len__(self) -> int:
        """Number of people."""
        return len(self._names)

    def __contains__(self, identity: object) -> bool:
        return identity in self._numbers

    @property
    def identities(self) -> list[str]:
        """Names of all people, in the order of enrolment."""
        with self._lock:
            return list(self._names)

    @property
    def templates(self) -> int:
        """Number of templates of all people."""
        return self._count

    def sources(self, identity: str) -> list[str | None]:
        """The names of a person's templates, None where one has none; as many as there are templates.

        Raises:
            KeyError: nobody of that name is enrolled.
        """
        with self._lock:
            rows = np.flatnonzero(self._owners[: self._count] == self._number(identity))
            return [self._sources[row] for row in rows]

    def enroll(
        self,
        identity: str | Sequence[str],
        embeddings: np.ndarray,
        sources: str | Sequence[str | None] | None = None,
        *,
        model: Mapping[str, Any] | None = None,
    ) -> int:
        """Add templates, all or, after an error, none. They are normalised; of any scale, that is, but zero.

        A template that a person already has, equal to the last bit, is not added again; two people may share one.

        Args:
            identity: whose all these embeddings are, or a name for each of them.
            embeddings (`np.ndarray` of shape `(N, E)` or `(E,)`): floating-point numbers.
            sources: names of the templates (files, say), which `Match.source` tells.
            model: what made the embeddings.
        Returns:
            The number of templates added.
        Raises:
            ValueError: wrong shape, kind or number; not finite; zero; empty names; another model.
        """
        self._check_model(model, "these embeddings")
        rows = _rows(embeddings, self.dim, "embeddings")
        identities = _texts(identity, len(rows), "identity")
        if not all(identities):
            raise ValueError("an identity is empty; every embedding needs the name of its person")
        names = _texts(sources, len(rows), "sources")
        with self._lock:
            unknown = (name for name in dict.fromkeys(identities) if name not in self._numbers)
            fresh = {name: number for number, name in enumerate(unknown, start=len(self._names))}
            owners = [fresh[name] if name in fresh else self._numbers[name] for name in identities]
            start, end = self._count, self._count + len(rows)
            self._reserve(end)
            _normalize(rows, self._vectors[start:end], "embeddings")
            self._owners[start:end] = owners
            new = self._new(start, end)
            if len(new) < len(rows):
                self._vectors[start : start + len(new)] = self._vectors[new]
                self._owners[start : start + len(new)] = self._owners[new]
            end = start + len(new)
            codes, self._codes = self._codes, None  # an error leaves none rather than half of them
            if codes is not None and end <= 2 * self._codes_of:  # else they are fitted anew to what is now enrolled
                self._add_codes(codes, start, end)
                self._codes = codes
            self._sources += [names[row - start] for row in new]
            self._numbers.update(fresh)
            self._names += fresh
            self._count = end
        return len(new)

    def remove(self, *identities: str) -> int:
        """Remove people and all their templates, also from memory; from a saved file by saving again.

        Returns:
            The number of templates removed.
        Raises:
            KeyError: one is not enrolled; then nobody is removed.
        """
        with self._lock:
            numbers = {self._number(identity) for identity in identities}
            gone = np.isin(self._owners[: self._count], list(numbers))
            kept, rows = np.flatnonzero(~gone), np.flatnonzero(gone)
            codes, self._codes = self._codes, None
            if codes is not None:
                codes.remove_ids(rows.astype(np.int64))
            place = np.cumsum([number not in numbers for number in range(len(self._names))]) - 1
            for first in range(0, len(kept), _BLOCK):  # rows only ever move down, so that none is overwritten unread
                some = kept[first : first + _BLOCK]
                self._vectors[first : first + len(some)] = self._vectors[some]
                self._owners[first : first + len(some)] = place[self._owners[some]]
            self._vectors[len(kept) : self._count] = 0
            self._sources = [self._sources[row] for row in kept]
            self._names = [name for number, name in enumerate(self._names) if number not in numbers]
            self._numbers = {name: number for number, name in enumerate(self._names)}
            self._count, self._codes = len(kept), codes
        return len(rows)

    # ---------------------------------------------------------------------------------------------------------- search

    def search(
        self,
        embeddings: np.ndarray,
        k: int = 5,
        threshold: float | None = None,
        *,
        exact: bool = False,
        model: Mapping[str, Any] | None = None,
    ) -> list[list[Match]]:
        """The nearest people to each query, each by the best of its templates.

        Args:
            embeddings (`np.ndarray` of shape `(Q, E)` or `(E,)`, which is one query): of any scale but zero.
            k: people a query at most.
            threshold: only people whose similarity is above it; an empty list says "no match". Default: no threshold.
            exact: compare all templates of a large gallery, too (see the class).
            model: what made the embeddings.
        Returns:
            For each query its matches, the most similar first; of equal ones that enrolled first.
        Raises:
            ValueError: as for `enroll`; `k` is not positive or `threshold` not a number.
        """
        self._check_model(model, "these queries")
        if k < 1:
            raise ValueError(f"k is {k}; a search is for one person at least")
        if threshold is not None and math.isnan(threshold):
            raise ValueError("the threshold is not a number (NaN)")
        rows = _rows(embeddings, self.dim, "queries")
        queries = _normalize(rows, np.empty(rows.shape, np.float32), "queries")
        found: list[list[Match]] = [[] for _ in queries]
        with self._lock:
            k = min(k, len(self._names))
            pending = np.arange(len(queries) if k else 0)
            if self._count <= EXACT_BELOW:
                exact = True
            # Templates to compare, and how many times more if they do not settle it; people have several.
            count, growth = (8 * k, 8) if exact else (CANDIDATES * math.ceil(k / 20), 4)
            while len(pending):
                exact = exact or 4 * count > self._count  # so many are found faster without codes
                count = min(count, self._count)
                incomplete = []
                step = max(1, 2**20 // count)
                for first in range(0, len(pending), step):
                    some = pending[first : first + step]
                    for query, rows, scores in zip(some, *self._candidates(queries[some], count, exact), strict=True):
                        found[query], complete = self._matches(queries[query], rows, scores, k, threshold, exact)
                        if not complete:
                            incomplete.append(query)
                pending, count = np.array(incomplete, np.int64), count * growth
        return found

    def _candidates(self, queries: np.ndarray, count: int, exact: bool) -> tuple[np.ndarray, np.ndarray]:
        """The `count` best templates of each query, and how similar they seem, in falling order: two `(Q, count)`."""
        if not exact:
            scores, rows = self._built_codes().search(queries, count)
            if (rows >= 0).all():  # the scan passes over templates that score least on every code
                return rows, scores
        scores, rows = self._faiss.knn(
            queries, self._vectors[: self._count], count, metric=self._faiss.METRIC_INNER_PRODUCT
        )
        return rows, scores

    def _matches(
        self, query: np.ndarray, rows: np.ndarray, scores: np.ndarray, k: int, threshold: float | None, exact: bool
    ) -> tuple[list[Match], bool]:
        """The k best people among the templates `rows`, and whether no other template can belong to them."""
        parts = [rows[first : first + _BLOCK] for first in range(0, len(rows), _BLOCK)]
        similarities = np.concatenate([np.einsum("ij,j->i", self._vectors[part], query) for part in parts])
        order = np.lexsort((rows, -similarities))
        _, first_of = np.unique(self._owners[rows[order]], return_index=True)
        best = order[np.sort(first_of)[:k]]
        if exact:
            limit = similarities[order[-1]]
        else:  # of the templates that were not compared
            error = similarities - scores
            limit = scores[-1] + error.mean() + MARGIN * error.std()
        reached = max(
            float(similarities[best[-1]]) if len(best) == k else -math.inf,
            -math.inf if threshold is None else threshold,
        )
        matches = [
            Match(
                self._names[self._owners[rows[i]]], min(1.0, max(-1.0, float(similarities[i]))), self._sources[rows[i]]
            )
            for i in best
            if threshold is None or similarities[i] > threshold
        ]
        return matches, len(rows) == self._count or reached > limit

    def _built_codes(self) -> Any:
        if self._codes is None:
            size = self.dim // 2 if self.dim % 2 == 0 else self.dim  # codes of a template, 4 bits each
            codes = self._faiss.IndexPQFastScan(self.dim, size, 4, self._faiss.METRIC_INNER_PRODUCT)
            sample = np.random.default_rng(0).choice(self._count, min(SAMPLE, self._count), replace=False)
            threads = self._faiss.omp_get_max_threads()
            self._faiss.omp_set_num_threads(1)  # steps so small that threads wait for each other: up to 30 times slower
            try:
                codes.train(self._vectors[np.sort(sample)])
            finally:
                self._faiss.omp_set_num_threads(threads)
            self._add_codes(codes, 0, self._count)
            self._codes, self._codes_of = codes, self._count
        return self._codes

    def _add_codes(self, codes: Any, start: int, end: int) -> None:
        for first in range(start, end, _BLOCK):
            codes.add(self._vectors[first : min(first + _BLOCK, end)])

    # ----------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | Path) -> None:
        """Write everything to one Parquet file, which only its owner may read; complete, or an earlier one stays.

        Columns: `identity`, `source` (text) and `embedding` (E float32, length 1), a row a template. The metadata
        `adaptface_gallery` is JSON: `version`, `dim`, `model`. Codes are not saved: they are built again when needed.

        Raises:
            OSError: the file cannot be written.
        """
        import pyarrow as pa
        from pyarrow import parquet

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            content = {"version": VERSION, "dim": self.dim, "model": self.model}
            schema = _schema(self.dim).with_metadata({_METADATA: json.dumps(content)})
            options: dict[str, Any] = {
                "use_dictionary": ["identity"],
                "compression": "none",
            }  # embeddings have no pattern
            options |= {"write_statistics": ["identity"], "write_page_checksum": True}
            with replacing(path) as partial:
                partial.unlink(missing_ok=True)  # of an interrupted save
                partial.touch(mode=0o600)
                with parquet.ParquetWriter(partial, schema, **options) as file:
                    for first in range(0, self._count, _BLOCK):
                        rows = slice(first, min(first + _BLOCK, self._count))
                        columns = [
                            pa.array([self._names[number] for number in self._owners[rows]], pa.string()),
                            pa.array(self._sources[rows], pa.string()),
                            pa.FixedSizeListArray.from_arrays(
                                pa.array(self._vectors[rows].ravel()), type=schema.field("embedding").type
                            ),
                        ]
                        file.write_table(pa.Table.from_arrays(columns, schema=schema))

    @classmethod
    def load(cls, path: str | Path, *, model: Mapping[str, Any] | None = None) -> Gallery:
        """Read what `save` wrote.

        Args:
            model: what will make the queries; a gallery of another model is refused.
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no gallery, of a newer version, damaged or cut off; or of another model.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no gallery at {path}")
        import pyarrow as pa
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path, page_checksum_verification=True) as file:
                content = _content(path, file.schema_arrow.metadata)
                gallery = cls(content["dim"], model=content["model"])
                gallery._check_model(model, "the queries", str(path))
                if not file.schema_arrow.equals(_schema(gallery.dim)):
                    raise ValueError(f"{path}: its columns are not those that Gallery.save writes; take a copy of it")
                templates = file.metadata.num_rows
                if templates * gallery.dim * 4 > path.stat().st_size:  # before memory is taken for them
                    raise ValueError(f"{path}: damaged: it is too small for {templates} templates; take a copy of it")
                gallery._reserve(templates)
                for group in range(file.metadata.num_row_groups):
                    gallery._take(path, file.read_row_group(group, ["identity", "source", "embedding"]))
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path}: no gallery, or damaged or cut off; take a copy of it ({reason})") from error
        gallery._names = list(gallery._numbers)
        return gallery

    def _take(self, path: Path, table: Any) -> None:
        """Rows of a file, checked, behind those that were read before."""
        end = self._count + len(table)
        identities = table["identity"].to_pylist()
        vectors = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if vectors.shape != (len(table) * self.dim,) or not all(identities):
            raise ValueError(f"{path}: damaged: a template lacks its identity or numbers; take a copy of it")
        vectors = vectors.reshape(-1, self.dim)
        lengths = np.einsum("ij,ij->i", vectors, vectors)
        if not (np.abs(lengths - 1) < 1e-4).all():  # also where it is NaN
            raise ValueError(f"{path}: damaged: an embedding is not finite, or its length is not 1; take a copy of it")
        self._vectors[self._count : end] = vectors
        numbers = (self._numbers.setdefault(name, len(self._numbers)) for name in identities)
        self._owners[self._count : end] = np.fromiter(numbers, np.int32, len(table))
        self._sources += table["source"].to_pylist()
        self._count = end

    @classmethod
    @contextmanager
    def updating(
        cls, path: str | Path, dim: int | None = None, *, model: Mapping[str, Any] | None = None, timeout: float = 10
    ) -> Iterator[Gallery]:
        """A file's gallery to be changed, saved if the block ends well; other processes that want that wait meanwhile.

        A hidden file beside it, `.NAME.lock`, stays.

        Args:
            dim: makes a new gallery, of `model`, where there is no file.
            model: as for `load`.
            timeout: seconds to wait for another process.
        Raises:
            TimeoutError: another process keeps it for so long.
            FileNotFoundError, OSError, ValueError: as for `load` and `save`.
        """
        path = Path(path)
        if dim is None and not path.is_file():
            raise FileNotFoundError(f"there is no gallery at {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=timeout).acquire()
        except Timeout as error:
            raise TimeoutError(f"{path}: another process is changing it; try again when it is done") from error
        with lock:
            gallery = cls.load(path, model=model) if dim is None or path.exists() else cls(dim, model=model)
            yield gallery
            gallery.save(path)

    # --------------------------------------------------------------------------------------------------------- helpers

    def _number(self, identity: str) -> int:
        try:
            return self._numbers[identity]
        except KeyError:
            raise KeyError(f"nobody called {identity!r} is enrolled") from None

    def _reserve(self, count: int) -> None:
        """Make room for `count` templates, and for half as many again where it is the second time."""
        capacity = len(self._vectors)
        if count > capacity:
            capacity = max(count, capacity * 3 // 2)
            vectors, owners = np.empty((capacity, self.dim), np.float32), np.empty(capacity, np.int32)
            vectors[: self._count] = self._vectors[: self._count]
            owners[: self._count] = self._owners[: self._count]
            self._vectors, self._owners = vectors, owners

    def _new(self, start: int, end: int) -> np.ndarray:
        """Those of the rows `start` to `end` that repeat no template, above them or among them, of the same person."""

        def digest(row: int) -> tuple[int, bytes]:
            return int(self._owners[row]), hashlib.blake2b(self._vectors[row], digest_size=16).digest()

        present = np.flatnonzero(np.isin(self._owners[:start], self._owners[start:end]))
        seen = {digest(int(row)) for row in present}
        new = []
        for row in range(start, end):
            key = digest(row)
            if key not in seen:
                seen.add(key)
                new.append(row)
        return np.array(new, np.int64)

    def _check_model(self, model: Mapping[str, Any] | None, what: str, where: str = "this gallery") -> None:
        if model is None or (other := _json_ready(model)) == self.model:
            return
        if self.model is None:
            raise ValueError(
                f"{where} does not say which model made its embeddings, so that {what} of a named model cannot be "
                "compared with them; make it anew with Gallery(dim, model=...)"
            )
        keys = sorted(key for key in {*other, *self.model} if other.get(key) != self.model.get(key))
        differ = "; ".join(f"{key}: {self.model.get(key)!r} there, {other.get(key)!r} here" for key in keys)
        raise ValueError(
            f"{where} holds embeddings of another model than {what}, and similarities between two models mean nothing: "
            f"{differ}. Enroll the faces anew with this model"
        )


def _json_ready(model: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = json.loads(json.dumps(dict(model), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model must be a mapping of texts, numbers, lists and mappings ({error})") from error
    return content


def _schema(dim: int) -> Any:
    """Columns of a file."""
    import pyarrow as pa

    number = pa.field("element", pa.float32(), nullable=False)
    return pa.schema(
        [
            pa.field("identity", pa.string(), nullable=False),
            pa.field("source", pa.string()),
            pa.field("embedding", pa.list_(number, dim), nullable=False),
        ]
    )


def _content(path: Path, metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """A gallery file's own metadata."""
    try:
        content = json.loads((metadata or {})[_METADATA])
        version, dim, model = int(content["version"]), int(content["dim"]), content["model"]
        if dim < 1 or not (model is None or isinstance(model, dict)):
            raise ValueError("its dim or its model is of another kind")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: a Parquet file, but no gallery; Gallery.save makes one") from error
    if version != VERSION:
        raise ValueError(
            f"{path}: a gallery of version {version}, and this adaptface reads version {VERSION}; update it"
        )
    return {"dim": dim, "model": model}


def _texts(texts: Any, count: int, what: str) -> list[Any]:
    """A text (or None) for each of `count` embeddings, of one for all or of as many."""
    found = [texts] * count if texts is None or isinstance(texts, str) else list(texts)
    if len(found) != count:
        raise ValueError(f"{what}: {len(found)} for {count} embeddings; give one for each")
    for text in found[:1] if texts is None or isinstance(texts, str) else found:
        if not isinstance(text, str) and (text is not None or what == "identity"):
            raise ValueError(f"{what}: {text!r} is a {type(text).__name__}, not a text")
        if text is not None:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{what}: {text!r} is no valid Unicode and could not be saved; rename it") from error
    return found


def _rows(embeddings: np.ndarray, dim: int, what: str) -> np.ndarray:
    """Embeddings as `(N, E)`.

    Raises:
        ValueError: they are of another shape, or no floating-point numbers.
    """
    array = np.asarray(embeddings)
    if array.dtype.kind != "f":
        raise ValueError(f"{what} must be floating-point numbers, not {array.dtype}")
    rows = array[None] if array.ndim == 1 else array
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise ValueError(f"{what} have the shape {array.shape}; this gallery takes ({dim},) or (N, {dim})")
    return rows


def _normalize(rows: np.ndarray, out: np.ndarray, what: str) -> np.ndarray:
    """Write the rows, at length 1, to `out`, float32, and return it."""
    step = 2048  # float64 copies that stay in the processor's cache
    for first in range(0, len(rows), step):
        exact = rows[first : first + step].astype(np.float64)  # squares of float16 or float32 could overflow
        with np.errstate(over="ignore"):
            lengths = np.sqrt(np.einsum("ij,ij->i", exact, exact))
        for bad, problem in ((~np.isfinite(lengths), "not finite"), (lengths == 0, "zero, and has no direction")):
            if bad.any():
                raise ValueError(f"{what}: number {first + int(bad.argmax())} (from 0) is {problem}; nothing was done")
        np.divide(exact, lengths[:, None], out=out[first : first + step], casting="same_kind")
    return out
