"""What each way of adapting a base is worth, on one recipe: zero-shot, frozen head, LoRA, DA-LoRA, full, ONNX peers.

    python benchmarks/compare_adaptations.py recipes/real_faces_dev.yaml --output_dir runs/compare \
        --seeds 0 1 2 --onnx ${ADAPTFACE_REAL_FACES}/../models/MobileFaceNet.onnx

Each way first gets a short run on one seed for every learning rate (and, where it has adapters, every LoRA scaling) of
one and the same grid, and for further rates as long as the best one is the lowest or highest tried. The best setting,
by AUC, then trains at full length on every seed. The last weights are evaluated: no checkpoint is selected, so that the
table does not profit from looking at the development set every epoch. The settings are chosen on it; the table shows
them.

`comparison.json` in the output folder holds what is finished, written after every run: the same command goes on where
it was stopped, also in the middle of a run, or with a copy of that file alone on another machine.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path, installed or not

from adaptface.files import write_text_atomically  # noqa: E402
from adaptface.settings import TrainSettings, changed_settings, read_settings  # noqa: E402
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


def evaluate(folder: Path, pairs: list[str], arguments: list[str], threads: int) -> dict[str, Any]:
    """Content of `results.json` for the embedder that `arguments` name, measured once.

    `pairs` are the arguments that name the benchmark.
    """
    results = folder / "results.json"
    if not results.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        call(
            "eval_benchmarks.py", *arguments, *pairs, "--no_cache", "--no_plots", "--output_dir", str(folder),
            threads=threads, log=folder / "eval.log",
        )  # fmt: skip
    return json.loads(results.read_text(encoding="utf-8"))


def train(folder: Path, recipe: Path, settings: list[str], pairs: list[str], threads: int) -> dict[str, Any]:
    """One run and the evaluation of its last weights; a run that was broken off goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    call(
        "train_accelerate.py", str(recipe), "--output_dir", str(folder / "run"), "--resume", "auto", *settings,
        threads=threads, log=folder / "train.log",
    )  # fmt: skip
    results = evaluate(folder / "last", pairs, ["--model", str(folder / "run" / "last")], threads)
    log = read_log(folder / "run" / "log.jsonl")
    return {
        "row": scores(results["results"][0]),
        "parameters": log[0]["parameters"],
        "minutes": training_minutes(log),
        **{key: results[key] for key in ("date", "versions", "machine")},
        "threads": threads,
    }


def scores(row: dict[str, Any]) -> dict[str, Any]:
    """What the table and its reader need of a row of `results.json`; no paths of this machine."""
    kept = ("data", "protocol", "pairs", "accuracy", "accuracy_std", "auc", "eer", "fold_accuracies")
    embedder = {"kind": row["embedder"]["kind"], "name": Path(row["embedder"]["name"]).name}
    return {"embedder": embedder, **{key: row[key] for key in kept}}


class Comparison:
    """The plan of a comparison, and what of it is finished: `comparison.json`, written after every run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.settings = read_settings([str(options.recipe), *options.extra])
        if self.settings.dev_pairs is None:
            raise ValueError(f"{options.recipe}: dev_pairs is not set; the comparison needs pairs to evaluate on")
        self.pairs = ["--benchmark", self.settings.dev_pairs]
        if self.settings.dev_images is not None:
            self.pairs += ["--images", self.settings.dev_images]
        self.threads = max(1, (os.cpu_count() or 1) // options.jobs)
        self.lock = threading.Lock()
        self.file = options.output_dir / "comparison.json"
        self.done: dict[str, Any] = {"settings": shaping(self.settings), "chosen": {}, "references": {}, "runs": {}}
        if self.file.is_file():
            self.done = json.loads(self.file.read_text(encoding="utf-8"))
            if changes := changed_settings(self.done["settings"], self.settings):
                raise ValueError(
                    f"{self.file} was made with other settings: {'; '.join(changes)}; restore them, or choose another "
                    "--output_dir"
                )

    def save(self) -> None:
        write_text_atomically(self.file, json.dumps(self.done, indent=1) + "\n")

    def run(self, way: str, setting: dict[str, float], epochs: int, seed: int) -> dict[str, Any]:
        """One training run, in a folder named after what it is."""
        words = [f"{key}{value:g}" for key, value in setting.items()]
        name = "-".join([way.replace(" ", "_"), f"epochs{epochs}", *words, f"seed{seed}"])
        if name not in self.done["runs"]:
            settings = [*WAYS[way], "--epochs", str(epochs), "--seed", str(seed)]
            for key, value in setting.items():
                settings += [f"--{key}", str(value)]
            # Nothing is selected on the pairs while a run trains: its last weights count.
            settings += [*self.options.extra, "--dev_pairs", "null"]
            result = train(self.options.output_dir / name, self.options.recipe, settings, self.pairs, self.threads)
            with self.lock:
                self.done["runs"][name] = {"way": way, "setting": setting, "epochs": epochs, "seed": seed, **result}
                self.save()
                row = result["row"]
                print(f"{name}: accuracy {100 * row['accuracy']:.2f}%, AUC {row['auc']:.4f}", flush=True)
        return self.done["runs"][name]

    def references(self) -> None:
        """The untrained base and the peers."""
        zero_shot = ["--zero_shot", self.settings.backbone, "--zero_shot_size", str(self.settings.image_size)]
        for arguments in [zero_shot, *(["--onnx", os.path.expandvars(peer)] for peer in self.options.onnx)]:
            name = Path(arguments[1]).name
            if name not in self.done["references"]:
                folder = self.options.output_dir / "references" / name
                results = evaluate(folder, self.pairs, arguments, os.cpu_count() or 1)
                self.done["references"][name] = scores(results["results"][0])
                self.save()

    def tune(self, way: str) -> dict[str, float]:
        """Best setting of a way in short runs on the first seed, by AUC.

        Every way starts from the same learning rates and, where it has adapters, the same scalings. While the best
        rate is the lowest or highest one tried, the next one beyond is tried too: no way is cut off by the grid.
        """
        scalings = [{"lora_alpha": alpha} for alpha in self.options.lora_alphas] if way in HAS_ADAPTERS else [{}]
        rates, tried = sorted(self.options.learning_rates), []
        pending = rates
        while pending:
            for rate in pending:
                for scaling in scalings:
                    setting = {"learning_rate": rate, **scaling}
                    tried.append(self.run(way, setting, self.options.tune_epochs, self.options.seeds[0]))
            best = max(tried, key=lambda run: run["row"]["auc"])["setting"]
            rate, step = best["learning_rate"], (rates[1] / rates[0] if len(rates) > 1 else 3.0)
            beyond = {rates[0]: rates[0] / step, rates[-1]: rates[-1] * step}.get(rate) if len(rates) > 1 else None
            pending = [] if beyond is None else [float(f"{beyond:.2g}")]
            rates = sorted({*rates, *pending})
        return best

    def measure(self) -> None:
        """Tunes every way, then trains each at its best setting on every seed."""
        ways = self.options.ways
        with ThreadPoolExecutor(self.options.jobs) as pool:
            best = dict(zip(ways, pool.map(self.tune, ways), strict=True))
            self.done["chosen"] |= best
            self.save()
            # Seed by seed, so that a comparison that is stopped early still has all ways.
            plan = [(way, best[way], self.options.epochs, seed) for seed in self.options.seeds for way in ways]
            for future in [pool.submit(self.run, *what) for what in plan]:
                future.result()


def shaping(settings: TrainSettings) -> dict[str, Any]:
    """The settings that shape a result, without paths of this machine."""
    fields = [f for f in dataclasses.fields(settings) if not f.metadata["may_change"] and not f.metadata["path"]]
    return {field.name: getattr(settings, field.name) for field in fields}


def spread(values: list[float], digits: int, factor: float = 1.0) -> str:
    """Mean and, with several seeds, standard deviation over them."""
    mean = f"{factor * statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {factor * statistics.stdev(values):.{digits}f}"


def table(done: dict[str, Any], epochs: int) -> str:
    """Markdown: references first, then one row a way, means over the seeds of its chosen setting at `epochs` epochs."""
    lines = [
        "| way | trainable | settings | seeds | accuracy % | AUC | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in done["references"].values():
        accuracy = f"{100 * row['accuracy']:.2f}"
        embedder = row["embedder"]
        lines.append(f"| {embedder['name']} ({embedder['kind']}) | 0 | | | {accuracy} | {row['auc']:.4f} | |")
    runs = [run for run in done["runs"].values() if run["epochs"] == epochs]
    for way in WAYS:
        mine = [run for run in runs if run["way"] == way and run["setting"] == done["chosen"].get(way)]
        if not mine:
            continue
        rows = [run["row"] for run in mine]
        setting = ", ".join(f"{key} {value:g}" for key, value in mine[0]["setting"].items())
        lines.append(
            f"| {way} | {mine[0]['parameters']['trainable']:,} | {setting} | {len(mine)} "
            f"| {spread([row['accuracy'] for row in rows], 2, 100)} | {spread([row['auc'] for row in rows], 4)} "
            f"| {spread([run['minutes'] for run in mine], 1)} |"
        )
    return "\n".join(lines)


def training_minutes(log: list[dict[str, Any]]) -> float:
    """Minutes of training by a run's log, without evaluation: all its steps at the median speed of the log's windows.

    So a pause, or another program on the machine for a while, does not count; nor does a stop before a resume.
    """
    windows = [line for line in log if line["event"] == "train"]
    images = windows[-1]["step"] * log[0]["images_per_step"]
    return images / statistics.median(line["images_per_second"] for line in windows) / 60


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(options)
    comparison.references()
    comparison.measure()
    text = table(comparison.done, options.epochs)
    write_text_atomically(options.output_dir / "comparison.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
