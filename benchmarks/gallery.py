"""Search in a gallery of a million embeddings: speed, memory, recall, and how often strangers match.

    python benchmarks/gallery.py                      # 1,000,000 x 512, three kinds of embeddings, 10 to 20 minutes
    python benchmarks/gallery.py --templates 100000   # smaller

All embeddings are synthetic; none come from faces or a model:

- faces: people are random directions; each has five templates, noisy copies, so that two of one person have a cosine of
  about 0.5. Queries are new noisy copies of enrolled people, and of strangers.
- subspace: the same within 64 of the dimensions (a random subspace), which is nearer to real models, whose embeddings
  do not fill their space: strangers are more alike.
- random: every template is a person and every query a stranger: directions without any structure, the hardest case for
  an index, since the tenth best is hardly better than the hundredth.

Recall@10 compares the ten people that a search returns with those of numpy's exact search. Processor time of one thread
unless `--threads` says more; other programs do not count. One process a kind.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from scipy.special import betainc

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path, installed or not

from adaptface.gallery import Gallery, Match  # noqa: E402
from adaptface.memory import peak_memory  # noqa: E402

KINDS = {"faces": (5, None), "subspace": (5, 64), "random": (1, None)}  # templates a person, dimensions used
COSINE = 0.5  # of two templates of one person
TOP = 10
CPU = torch.device("cpu")


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Synthetic:
    """Embeddings of people 0, 1, ...; each block of them is made anew from its number, so that none need be kept."""

    people = 10_000  # of a block

    def __init__(self, kind: str, dim: int) -> None:
        self.per_person, used = KINDS[kind]
        used = min(used or dim, dim)
        rng = np.random.default_rng(0)
        self.basis = None
        if used < dim:
            self.basis = np.linalg.qr(rng.standard_normal((dim, used)))[0].T.astype(np.float32)  # (used, E)
        self.used = used

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Random directions, `(count, E)`."""
        rows = unit(rng.standard_normal((count, self.used), dtype=np.float32))
        return rows if self.basis is None else rows @ self.basis

    def noisy(self, rng: np.random.Generator, centres: np.ndarray) -> np.ndarray:
        """A template about each centre."""
        return unit(COSINE**0.5 * centres + (1 - COSINE) ** 0.5 * self.draw(rng, len(centres)))

    def centres(self, block: int) -> np.ndarray:
        return self.draw(np.random.default_rng((1, block)), self.people)

    def block(self, block: int, people: int) -> np.ndarray:
        """Templates of the first `people` people of a block, `(people * per_person, E)`, one person after the other."""
        centres = self.centres(block)[:people]
        if self.per_person == 1:
            return centres
        return self.noisy(np.random.default_rng((2, block)), np.repeat(centres, self.per_person, axis=0))

    def blocks(self, people: int) -> Iterator[tuple[int, np.ndarray]]:
        """First person of each block, and its templates."""
        for first in range(0, people, self.people):
            yield first, self.block(first // self.people, min(self.people, people - first))

    def queries(self, people: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Who is searched for, a new template of each, and as many of strangers."""
        rng = np.random.default_rng(3)
        known = rng.integers(0, people, count)
        centres = np.empty((count, self.draw(rng, 1).shape[1]), np.float32)
        for block in np.unique(known // self.people):
            mine = known // self.people == block
            centres[mine] = self.centres(block)[known[mine] % self.people]
        return known, self.noisy(rng, centres), self.draw(rng, count)


def exact_people(synthetic: Synthetic, people: int, queries: np.ndarray) -> np.ndarray:
    """Numbers of the ten nearest people of each query, by numpy alone, `(Q, 10)`."""
    best = np.full((len(queries), TOP), -np.inf, np.float32)
    who = np.full((len(queries), TOP), -1)
    for first, templates in synthetic.blocks(people):
        scores = (queries @ templates.T).reshape(len(queries), -1, synthetic.per_person).max(axis=2)
        some = np.argpartition(-scores, TOP - 1, axis=1)[:, :TOP]
        best = np.concatenate([best, np.take_along_axis(scores, some, axis=1)], axis=1)
        who = np.concatenate([who, first + some], axis=1)
        keep = np.argpartition(-best, TOP - 1, axis=1)[:, :TOP]
        best, who = np.take_along_axis(best, keep, axis=1), np.take_along_axis(who, keep, axis=1)
    return who


def recall(found: list[list[Match]], expected: np.ndarray) -> float:
    shares = [
        len({int(match.identity) for match in matches} & set(row.tolist())) / TOP
        for matches, row in zip(found, expected, strict=True)
    ]
    return float(np.mean(shares))


def timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    start = time.process_time()
    result = work(*arguments, **options)
    return time.process_time() - start, result


def measure(kind: str, templates: int, dim: int, count: int, threshold: float, threads: int) -> dict[str, Any]:
    """One kind of embeddings in this process; seconds, milliseconds a query, bytes, shares."""
    faiss.omp_set_num_threads(threads)
    synthetic = Synthetic(kind, dim)
    people = templates // synthetic.per_person
    gallery = Gallery(dim, model={"name": "synthetic"})
    memory = {"before": peak_memory(CPU)}
    seconds = dict.fromkeys(("enroll", "codes", "save", "load"), 0.0)
    for first, block in synthetic.blocks(people):
        names = [str(first + row // synthetic.per_person) for row in range(len(block))]
        seconds["enroll"] += timed(gallery.enroll, names, block)[0]
    memory["enrolled"] = peak_memory(CPU)
    known, mates, strangers = synthetic.queries(people, count)
    queries = np.concatenate([mates, strangers]) if synthetic.per_person > 1 else strangers
    seconds["codes"] = timed(gallery.search, queries[0])[0]
    memory["searched"] = peak_memory(CPU)
    milliseconds = {}
    for name, exact in (("exact", True), ("index", False)):
        single = queries[:20]
        took = sum(timed(gallery.search, query, TOP, exact=exact)[0] for query in single)
        milliseconds[f"{name}_single"] = 1000 * took / len(single)
        batch = queries[: 256 if exact else None]
        took, found = timed(gallery.search, batch, TOP, exact=exact)
        milliseconds[f"{name}_batch"] = 1000 * took / len(batch)
        if exact:
            exactly = found
    expected = exact_people(synthetic, people, queries)
    result = {
        "kind": kind,
        "templates": gallery.templates,
        "people": len(gallery),
        "dim": dim,
        "queries": len(queries),
        "exact_recall_at_10": recall(exactly, expected[: len(exactly)]),
        "recall_at_10": recall(found, expected),
        "milliseconds": milliseconds,
    }
    of_strangers = found[len(queries) - count :]
    above = [matches for matches in of_strangers if matches[0].similarity > threshold]
    # Of two random directions: P(cosine > t) = I((d - 1) / 2, 1 / 2; 1 - t²) / 2, I the regularised beta function.
    accept = float(betainc((synthetic.used - 1) / 2, 0.5, 1 - threshold**2)) / 2
    result |= {
        "threshold": threshold,
        "false_accept_rate": accept,
        "false_positive_rate": len(above) / count,
        "expected_false_positive_rate": 1 - (1 - accept) ** gallery.templates,
    }
    if synthetic.per_person > 1:
        right = [matches[0].identity == str(who) for matches, who in zip(found, known, strict=False)]
        hit = [matches[0].similarity > threshold for matches in found[:count]]
        result |= {
            "rank_1": float(np.mean(right)),
            "true_positive_rate": float(np.mean(np.array(right) & np.array(hit))),
        }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gallery.parquet"
        seconds["save"] = timed(gallery.save, path)[0]
        memory["saved"] = peak_memory(CPU)
        result["file"] = path.stat().st_size
        seconds["remove"] = timed(gallery.remove, "0")[0]
        seconds["load"], loaded = timed(Gallery.load, path)
        assert loaded.templates == result["templates"]
    return result | {"seconds": seconds, "peak_memory": memory}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=500, help="of enrolled people, and as many of strangers")
    parser.add_argument(
        "--threshold", type=float, default=0.22, help="cosine above which two faces count as one person"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # one kind, printed as JSON
    options = parser.parse_args(arguments)
    numbers = ("templates", "dim", "queries", "threshold", "threads")
    if options.measure:
        values = [getattr(options, name) for name in numbers]
        print(json.dumps(measure(options.kinds[0], *values)))
        return {}
    results = {}
    for kind in options.kinds:
        command = [sys.executable, __file__, "--measure", "--kinds", kind]
        for name in numbers:
            command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found = results[kind] = json.loads(done.stdout.splitlines()[-1])
        ms, seconds, memory = found["milliseconds"], found["seconds"], found["peak_memory"]
        print(
            f"{kind} (synthetic): {found['templates']:,} templates x {found['dim']} of {found['people']:,} people, "
            f"{found['queries']:,} queries"
        )
        print(f"  recall@10   {found['recall_at_10']:.4f} index, {found['exact_recall_at_10']:.4f} exact=True")
        for name, what in (("single", "one by one"), ("batch", "in a batch")):
            exact, index = ms[f"exact_{name}"], ms[f"index_{name}"]
            print(f"  ms a query  {index:.1f} index, {exact:.1f} exact, {what}: {exact / index:.1f} times as fast")
        if "rank_1" in found:
            right, above = found["rank_1"], found["true_positive_rate"]
            print(f"  people      rank 1 {right:.4f}, and above {found['threshold']} {above:.4f}")
        print(
            f"  strangers   {found['false_positive_rate']:.4f} match somebody above {found['threshold']}; expected "
            f"{found['expected_false_positive_rate']:.4f} at a FAR of {found['false_accept_rate']:.1e} a comparison"
        )
        print("  seconds     " + ", ".join(f"{part} {value:.1f}" for part, value in seconds.items()))
        print("  peak MB     " + ", ".join(f"{part} {size / 1e6:,.0f}" for part, size in memory.items()), flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
