"""What an evaluation of 6,000 pairs costs beside the model: time in it, all arithmetic, repeats, memory.

    python benchmarks/evaluate_pairs.py                  # geometry of dinov2-small, random weights, 224 px
    python benchmarks/evaluate_pairs.py --layers 2       # a model so light that everything else shows

- inside the model: share of the evaluation's time that its forward passes take; the bar is 0.95. The pairs are of few
  images, so that what does not grow with the images (the arithmetic) weighs more than in a real set.
- protocol: ten folds x 400 thresholds by histogram and cumulative sum, milliseconds (the bar is 5, and for this alone),
  beside the naive way; the results must be identical.
- the rest of the arithmetic, which has no bar: distances of the pairs, the report with its intervals where the list
  names no people (folds are drawn) and where it does (people are drawn; as many as LFW's list has), and the
  calibration of `--write_thresholds`.
- repeats: every image stands twice in the list, as two files; it must be embedded once.
- memory: peak of the process for the set, for one of four times as many images, and for ten times as many pairs of the
  same images.

Rendered faces (synthetic), one process a measurement.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path, installed or not

from adaptface.data.benchmarks import load_pairs  # noqa: E402
from adaptface.data.synthetic import draw_images, render  # noqa: E402
from adaptface.embedders import BackboneEmbedder  # noqa: E402
from adaptface.evaluation import evaluate_pairs  # noqa: E402
from adaptface.memory import peak_memory  # noqa: E402
from adaptface.metrics import (  # noqa: E402
    THRESHOLDS,
    contiguous_folds,
    kfold_accuracy,
    match_calibration,
    pair_distances,
    verification_report,
)

PAIRS = 6000
PEOPLE, DIMENSIONS = 4281, 384  # of LFW's list, and of dinov2-small


def write_pairs(folder: Path, images: int, pairs: int) -> Path:
    """Pairs in ten balanced folds, of `images` rendered faces (four a person), each as two files."""
    names = []
    for person in range(images // 4):
        for number, draw in enumerate(draw_images(person, 4)):
            names.append(f"{person}_{number}")
            Image.fromarray(render(person, draw, 112)).save(folder / f"{names[-1]}a.jpg", quality=95)
            shutil.copy(folder / f"{names[-1]}a.jpg", folder / f"{names[-1]}b.jpg")
    rng = np.random.default_rng(0)
    lines = ["image_a,image_b,same"]
    for pair in range(pairs):
        person, step = rng.integers(images // 4), rng.integers(1, images // 4)
        other = person if pair % 2 else (person + step) % (images // 4)
        first, second = rng.permutation(4)[:2]
        lines.append(f"{person}_{first}{'ab'[pair // 2 % 2]}.jpg,{other}_{second}{'ba'[pair // 2 % 2]}.jpg,{pair % 2}")
    (folder / "pairs.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "pairs.csv"


class Timed(BackboneEmbedder):
    """Counts images, and the seconds spent in forward passes."""

    seconds, images = 0.0, 0

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        features = super().__call__(pixel_values).cpu()
        self.seconds += time.perf_counter() - start
        self.images += len(pixel_values)
        return features


def measure(images: int, pairs: int, layers: int, batch_size: int, threads: int) -> dict[str, Any]:
    """One evaluation in this process."""
    torch.set_num_threads(threads)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=layers, image_size=224)
    embedder = Timed(Dinov2Model(config), 224)
    with tempfile.TemporaryDirectory() as folder:
        pair_set = load_pairs(write_pairs(Path(folder), images, pairs))
        embedder(torch.zeros(batch_size, 3, 224, 224))  # warm up
        before, embedder.seconds, embedder.images = peak_memory(torch.device("cpu")), 0.0, 0
        start = time.perf_counter()
        result = evaluate_pairs(embedder, pair_set, strict=False, batch_size=batch_size, progress=False).result
        total = time.perf_counter() - start
    return {
        "pairs": result["pairs"],
        "files": len(pair_set.images),
        "embedded": result["embedded"],
        "forwards": embedder.images // 2,  # each with its mirror image
        "seconds": total,
        "inside": embedder.seconds / total,
        "memory": peak_memory(torch.device("cpu")),
        "memory_before": before,
    }


def naive(distances: np.ndarray, same: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The reference procedure, loop by loop."""
    accuracies, chosen = [], []
    for fold in range(10):
        rest, mine = folds != fold, folds == fold
        best = int(np.argmax([np.mean((distances[rest] < t) == same[rest]) for t in THRESHOLDS]))
        chosen.append(THRESHOLDS[best])
        accuracies.append(np.mean((distances[mine] < THRESHOLDS[best]) == same[mine]))
    return np.array(accuracies), np.array(chosen)


def milliseconds(work: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times)


def arithmetic(rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    same = np.arange(PAIRS) % 2 == 1
    distances = np.clip(np.where(same, rng.normal(1.2, 0.4, PAIRS), rng.normal(1.8, 0.3, PAIRS)), 0, 4)
    folds = contiguous_folds(PAIRS)
    person = rng.integers(0, PEOPLE, PAIRS)
    people = np.stack([person, np.where(same, person, (person + rng.integers(1, PEOPLE, PAIRS)) % PEOPLE)], axis=1)
    embeddings = rng.normal(size=(2 * PAIRS, DIMENSIONS)).astype(np.float32)
    ours, reference = kfold_accuracy(distances, same, folds), naive(distances, same, folds)
    works: dict[str, Callable[[], Any]] = {
        "naive_ms": lambda: naive(distances, same, folds),
        "distances_ms": lambda: pair_distances(embeddings, np.arange(PAIRS), np.arange(PAIRS, 2 * PAIRS)),
        "report_folds_ms": lambda: verification_report(distances, same, folds),
        "report_people_ms": lambda: verification_report(distances, same, folds, identities=people),
        "calibration_ms": lambda: match_calibration(1 - distances / 2, same, folds),
    }
    return {
        "protocol_ms": milliseconds(lambda: kfold_accuracy(distances, same, folds), 20 * rounds),
        **{name: milliseconds(work, rounds) for name, work in works.items()},
        "identical": all(np.array_equal(mine, theirs) for mine, theirs in zip(ours, reference, strict=True)),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model")
    parser.add_argument("--images", type=int, default=80, help="different images, a multiple of 4")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of them")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of the arithmetic")
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # one evaluation, printed as JSON
    options = parser.parse_args(arguments)
    model = (options.layers, options.batch_size, options.threads)
    if options.measure:
        print(json.dumps(measure(options.images, options.pairs, *model)))
        return {}

    runs = []
    images, pairs = options.images, options.pairs
    for size, count in ((images, pairs), (4 * images, pairs), (images, 10 * pairs)):
        command = [sys.executable, __file__, "--measure", "--images", str(size), "--pairs", str(count)]
        for name, value in zip(("layers", "batch_size", "threads"), model, strict=True):
            command += [f"--{name}", str(value)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    small, more_images, more_pairs = runs
    found = arithmetic(options.rounds)
    result = {
        "options": vars(options) | {"output": None},
        "small": small,
        "more_images": more_images,
        "more_pairs": more_pairs,
        "arithmetic": found,
    }
    print(f"inside the model   {small['inside']:.4f} of {small['seconds']:.1f} s, {small['pairs']:,} pairs (bar: 0.95)")
    print(
        f"protocol           {found['protocol_ms']:.2f} ms for the ten folds alone (bar: 5); naive "
        f"{found['naive_ms']:.0f} ms; identical: {found['identical']}"
    )
    print(
        f"other arithmetic   distances {found['distances_ms']:.0f} ms; the whole report with its intervals "
        f"{found['report_folds_ms']:.0f} ms by folds, {found['report_people_ms']:.0f} ms by people; calibration "
        f"{found['calibration_ms']:.0f} ms ({PAIRS:,} pairs, {DIMENSIONS} dimensions, {PEOPLE:,} people; no bar)"
    )
    print(f"repeats            {small['files']} files, {small['forwards']} embedded")
    for run, key, what in ((more_images, "embedded", "images"), (more_pairs, "pairs", "pairs of the same images")):
        print(
            f"peak memory        {small['memory'] / 2**20:.0f} MB for {small[key]:,}, "
            f"{run['memory'] / 2**20:.0f} MB for {run[key]:,} {what}: ratio {run['memory'] / small['memory']:.3f}"
        )
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
