"""What each way of adapting a base is worth, on one recipe: zero-shot, frozen head, LoRA, DA-LoRA, full, ONNX peers.

    python benchmarks/compare_adaptations.py recipes/real_faces_dev.yaml --output_dir runs/compare \
        --seeds 0 1 2 --onnx ${ADAPTFACE_REAL_FACES}/../models/MobileFaceNet.onnx

Each way first gets a short run for every learning rate (and, where it has adapters, every LoRA scaling) of one and the
same grid, on one seed; its best setting then trains at full length on every seed. The last weights are evaluated: no
checkpoint is selected, so that the table does not profit from looking at the development set every epoch. The grid is
chosen on the development set and says so.

Whatever is finished is kept: the same command goes on where it was stopped, also in the middle of a run. The table, as
Markdown and JSON, holds what is finished so far.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path, installed or not

from adaptface.files import write_text_atomically  # noqa: E402
from adaptface.settings import read_settings  # noqa: E402
from adaptface.tracking import read_log  # noqa: E402

WAYS: dict[str, list[str]] = {
    "frozen head": ["--adaptation", "frozen"],
    "LoRA": ["--adaptation", "lora", "--domains", "[general]"],
    "DA-LoRA": ["--adaptation", "lora"],
    "full": ["--adaptation", "full"],
}
HAS_ADAPTERS = ("LoRA", "DA-LoRA")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=40, help="length of the runs that count")
    parser.add_argument("--tune_epochs", type=int, default=5, help="length of the runs that choose a setting")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--lora_alphas", type=float, nargs="+", default=[4.0, 16.0])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; the cores are shared out among them")
    parser.add_argument("--onnx", nargs="*", default=[], help="ONNX peers (112 px, RGB, ImageNet mean and deviation)")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="further settings of every run, last")
    return parser.parse_args(arguments)


def call(script: str, *arguments: str, threads: int, log: Path) -> None:
    """Runs a script of the project; its output goes to `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            stdout=file, stderr=subprocess.STDOUT, env=environment, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{script} ended with {done.returncode}; see {log}")


def evaluate(folder: Path, pairs: str, arguments: list[str], threads: int) -> list[dict[str, Any]]:
    """Rows of `results.json` for the embedders that `arguments` name, measured once."""
    results = folder / "results.json"
    if not results.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        call(
            "eval_benchmarks.py", *arguments, "--benchmark", pairs, "--output_dir", str(folder),
            threads=threads, log=folder / "eval.log",
        )  # fmt: skip
    return json.loads(results.read_text(encoding="utf-8"))["results"]


def train(folder: Path, recipe: Path, settings: list[str], pairs: str, threads: int) -> dict[str, Any]:
    """One run and the evaluation of its last weights; a finished run is read, a broken-off one goes on."""
    summary = folder / "run.json"
    if summary.is_file():
        return json.loads(summary.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    call(
        "train_accelerate.py", str(recipe), "--output_dir", str(folder / "run"), "--resume", "auto", *settings,
        threads=threads, log=folder / "train.log",
    )  # fmt: skip
    (row,) = evaluate(folder / "last", pairs, ["--model", str(folder / "run" / "last")], threads)
    log = read_log(folder / "run" / "log.jsonl")
    result = {
        "settings": settings,
        "row": row,
        "parameters": log[0]["parameters"],
        "minutes": training_minutes(log),
    }
    write_text_atomically(summary, json.dumps(result, indent=2))
    return result


class Comparison:
    """The plan of a comparison and what of it is finished."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.settings = read_settings([str(options.recipe), *options.extra])
        if self.settings.dev_pairs is None:
            raise ValueError(f"{options.recipe}: dev_pairs is not set; the comparison needs pairs to evaluate on")
        self.threads = max(1, (os.cpu_count() or 1) // options.jobs)
        self.lock = threading.Lock()

    def grid(self, way: str) -> list[list[str]]:
        """Settings that are tried for a way: the same learning rates for all, the same scalings where they exist."""
        scalings = [["--lora_alpha", str(alpha)] for alpha in self.options.lora_alphas] if way in HAS_ADAPTERS else [[]]
        return [
            ["--learning_rate", str(rate), *scaling] for rate in self.options.learning_rates for scaling in scalings
        ]

    def run(self, way: str, setting: list[str], epochs: int, seed: int) -> dict[str, Any]:
        """One training run, in a folder named after what it is."""
        words = [way.replace(" ", "_"), f"epochs{epochs}", *(word.strip("-") for word in setting), f"seed{seed}"]
        settings = [*WAYS[way], *setting, "--epochs", str(epochs), "--seed", str(seed), *self.options.extra]
        settings += ["--eval_every_epochs", str(epochs)]  # the last weights count; looking earlier would only cost time
        result = train(
            self.options.output_dir / "-".join(words), self.options.recipe, settings, str(self.settings.dev_pairs),
            self.threads,
        )  # fmt: skip
        row = result["row"]
        with self.lock:
            print(f"{' '.join(words)}: accuracy {100 * row['accuracy']:.2f}%, AUC {row['auc']:.4f}", flush=True)
        return {"way": way, "setting": setting, "epochs": epochs, "seed": seed, **result}

    def side_by_side(self, jobs: list[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(self.options.jobs) as pool:
            return [future.result() for future in [pool.submit(job) for job in jobs]]

    def references(self) -> list[dict[str, Any]]:
        """The untrained base and the peers."""
        arguments = ["--zero_shot", self.settings.backbone, "--zero_shot_size", str(self.settings.image_size)]
        for peer in self.options.onnx:
            arguments += ["--onnx", os.path.expandvars(peer)]
        return evaluate(
            self.options.output_dir / "references", str(self.settings.dev_pairs), arguments, os.cpu_count() or 1
        )

    def tune(self) -> list[dict[str, Any]]:
        """A short run for every point of every grid."""
        options = self.options
        return self.side_by_side(
            [
                partial(self.run, way, setting, options.tune_epochs, options.seeds[0])
                for way in options.ways
                for setting in self.grid(way)
            ]
        )

    def measure(self, tuned: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The runs that count: each way at its best setting, on every seed."""
        best = {
            way: max((run for run in tuned if run["way"] == way), key=lambda run: run["row"]["auc"])["setting"]
            for way in self.options.ways
        }
        # Seed by seed, so that a comparison that is stopped early still has all ways.
        return self.side_by_side(
            [
                partial(self.run, way, best[way], self.options.epochs, seed)
                for seed in self.options.seeds
                for way in self.options.ways
            ]
        )


def spread(values: list[float], digits: int, factor: float = 1.0) -> str:
    """Mean and, with several seeds, standard deviation over them."""
    mean = f"{factor * statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {factor * statistics.stdev(values):.{digits}f}"


def table(references: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """Markdown: references first, then one row a way, means over seeds."""
    lines = [
        "| way | trainable | settings | seeds | accuracy % | AUC | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in references:
        name = Path(row["embedder"]["name"]).name
        accuracy = f"{100 * row['accuracy']:.2f}"
        lines.append(f"| {name} ({row['embedder']['kind']}) | 0 | | | {accuracy} | {row['auc']:.4f} | |")
    for way in dict.fromkeys(run["way"] for run in runs):
        mine = [run for run in runs if run["way"] == way]
        rows = [run["row"] for run in mine]
        lines.append(
            f"| {way} | {mine[0]['parameters']['trainable']:,} | {' '.join(w.strip('-') for w in mine[0]['setting'])} "
            f"| {len(mine)} | {spread([row['accuracy'] for row in rows], 2, 100)} "
            f"| {spread([row['auc'] for row in rows], 4)} | {spread([run['minutes'] for run in mine], 1)} |"
        )
    return "\n".join(lines)


def training_minutes(log: list[dict[str, Any]]) -> float:
    """Minutes of training by a run's log, without evaluation; also right for a run that was stopped and went on."""
    lines = [line for line in log if line["event"] == "train"]
    images, done, seconds = log[0]["images_per_step"], 0, 0.0
    for line in lines:
        seconds += (line["step"] - done) * images / line["images_per_second"]
        done = line["step"]
    return seconds / 60


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    comparison = Comparison(options)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    references = comparison.references()
    tuned = comparison.tune()
    print(table([], tuned), flush=True)
    runs = comparison.measure(tuned)
    text = table(references, runs)
    content = {"references": references, "tuning": tuned, "runs": runs}
    write_text_atomically(options.output_dir / "comparison.json", json.dumps(content, indent=2))
    write_text_atomically(options.output_dir / "comparison.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
