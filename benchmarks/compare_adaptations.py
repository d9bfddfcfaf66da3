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
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

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
    start = time.perf_counter()
    call(
        "train_accelerate.py", str(recipe), "--output_dir", str(folder / "run"), "--resume", "auto", *settings,
        threads=threads, log=folder / "train.log",
    )  # fmt: skip
    (row,) = evaluate(folder / "last", pairs, ["--model", str(folder / "run" / "last")], threads)
    end = json.loads((folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    result = {"settings": settings, "row": row, "end": end, "wall_seconds": time.perf_counter() - start}
    summary.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    raise SystemExit("incomplete")


if __name__ == "__main__":
    main()
