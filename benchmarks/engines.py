"""What each engine of `adaptface/runtime.py` is worth on this CPU: images per second, and what it loses.

    python benchmarks/engines.py                               # geometry of dinov2-small, random weights, 224 px
    python benchmarks/engines.py --model RUN/last --pairs dev_pairs.csv    # a model, and its accuracy on a pair list

Speed: one thread, processor seconds of this process (other programs on the machine then count little), medians of
interleaved rounds; the ratio to the model in PyTorch, eager and float32, is the median of the rounds' ratios. Distance:
the largest cosine distance of an embedding to that model's, on faces of the pair list or on rendered ones (synthetic).
Without `--model` the weights are random: the figures of speed hold, those of distance say little about a trained model.
Engines that this machine or environment lacks are named and left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path, installed or not

from adaptface.data.benchmarks import load_pairs  # noqa: E402
from adaptface.data.synthetic import draw_images, render  # noqa: E402
from adaptface.embedders import ModelEmbedder  # noqa: E402
from adaptface.evaluation import evaluate_pairs  # noqa: E402
from adaptface.runtime import ENGINES, EngineEmbedder  # noqa: E402
from configuration_adaptface import AdaptFaceConfig  # noqa: E402
from image_processing_adaptface import AdaptFaceImageProcessor  # noqa: E402
from modeling_adaptface import AdaptFaceModel  # noqa: E402

FACES = 32  # whose embeddings are compared


def random_model(domains: list[str]) -> ModelEmbedder:
    """DA-LoRA on a random base of dinov2-small's geometry, with adapters that change something."""
    torch.manual_seed(0)
    model = AdaptFaceModel(AdaptFaceConfig(domains=domains)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
    processor = AdaptFaceImageProcessor(size=model.config.image_size)
    return ModelEmbedder(model, processor, f"dinov2-small geometry, random weights, K = {len(domains)}")


def speeds(engines: dict[str, EngineEmbedder], batch: int, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each engine's runs, in interleaved rounds."""
    side = next(iter(engines.values())).preprocess.processor.size["height"]
    images = torch.randn(batch, 3, side, side)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    with torch.no_grad():
        for engine in engines.values():  # warm up
            engine(images)
        for _ in range(rounds):
            for name, engine in engines.items():
                start = time.process_time()
                engine(images)
                seconds[name].append(time.process_time() - start)
    return seconds


def available(model: ModelEmbedder, names: list[str], cache_dir: Path) -> dict[str, EngineEmbedder]:
    found = {}
    for name in names:
        start = time.perf_counter()
        try:
            found[name] = EngineEmbedder(model, name, cache_dir)
        except (ImportError, ValueError) as error:
            print(f"{name}: left out: {error}")
        else:
            print(f"{name}: ready in {time.perf_counter() - start:.1f} s", flush=True)
    return found


def embeddings(engine: EngineEmbedder, faces: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = torch.cat([engine(part) for part in faces.split(8)])
    return F.normalize(found.double(), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or Hub id, whose code is run; default: random weights")
    parser.add_argument("--domains", nargs="+", default=["general", "pose", "age"], help="experts of the random model")
    parser.add_argument("--pairs", type=Path, help="pair list: accuracy of each engine on it (needs --model)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.pairs and not options.model:
        parser.error("--pairs needs --model: random weights tell no faces apart")

    torch.set_num_threads(1)
    names = ["torch", *(name for name in options.engines if name != "torch")]
    pair_set = load_pairs(options.pairs) if options.pairs else None
    model = (
        ModelEmbedder.from_pretrained(options.model, device="cpu") if options.model else random_model(options.domains)
    )
    print(f"{model.name}; torch {torch.__version__}, transformers {transformers.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        engines = available(model, names, Path(folder))
        if pair_set is not None:
            pictures: list[Any] = [pair_set.images[i] for i in range(min(FACES, len(pair_set.images)))]
        else:
            pictures = [render(person, draw_images(person, 1)[0], 112) for person in range(FACES)]
        faces = torch.stack([model.preprocess(picture) for picture in pictures])
        expected = embeddings(engines["torch"], faces)
        distances = {
            name: float((1 - (embeddings(engine, faces) * expected).sum(1)).max()) for name, engine in engines.items()
        }
        kind = "faces of the pair list" if pair_set is not None else "rendered faces (synthetic)"
        print(f"\ndistance: largest of {len(faces)} {kind}; speed: images per second and ratio to torch, by batch\n")
        print("| engine | distance |" + "".join(f" batch {batch} |" for batch in options.batches))
        print("|---|---|" + "---|" * len(options.batches))
        seconds = {batch: speeds(engines, batch, options.rounds) for batch in options.batches}
        for name in engines:
            row = f"| {name} | {distances[name]:.1e} |"
            for batch, of in seconds.items():
                ratio = statistics.median(np.divide(of["torch"], of[name]))
                row += f" {batch / statistics.median(of[name]):.2f} ({ratio:.2f}x) |"
            print(row)
        if pair_set is None:
            return
        print(f"\n{pair_set.name}: {len(pair_set.same):,} pairs\n")
        print("| engine | accuracy, 10-fold, % | AUC | largest change of a pair's similarity |\n|---|---|---|---|")
        similarities: np.ndarray | None = None
        for name, engine in engines.items():
            found = evaluate_pairs(engine, pair_set, progress=False)
            similarities = found.similarities if similarities is None else similarities  # torch is the first
            change = float(np.abs(found.similarities - similarities).max())
            result = found.result
            accuracy = f"{100 * result['accuracy']:.3f} ± {100 * result['accuracy_std']:.2f}"
            print(f"| {name} | {accuracy} | {result['auc']:.5f} | {change:.1e} |", flush=True)


if __name__ == "__main__":
    main()
