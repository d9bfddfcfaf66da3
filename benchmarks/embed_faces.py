"""How fast FaceEmbedder embeds: aligned crops and photos, by the size of the batch.

    python benchmarks/embed_faces.py                                  # geometry of dinov2-small, random weights, 224 px
    python benchmarks/embed_faces.py --model runs/casia_dalora_vits/best --photos photos --detector yunet.onnx

Images a second at each batch size, from files on the disk to embeddings on the CPU (reading, detection, alignment, the
image and its mirror image through the model), and the ratio to batch 1, which is one image a call. Beside them stands
what the model alone takes, and one detection a photo. On a GPU the model gains much by batches. On a CPU it gains what
the processor's cores leave idle, and loses what its caches do not hold, which is why FaceEmbedder computes eight images
at a time there.

Without `--photos` only crops are measured, rendered faces (synthetic). The batch sizes take turns, so that a machine
that slows down slows all of them; the median of the rounds counts.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path, installed or not

from adaptface import FaceEmbedder  # noqa: E402
from adaptface.data.synthetic import draw_images, render  # noqa: E402
from adaptface.files import write_text  # noqa: E402
from image_processing_adaptface import AdaptFaceImageProcessor  # noqa: E402
from modeling_adaptface import AdaptFaceModel  # noqa: E402

BATCHES = (1, 8, 32, 64)


def small_model(folder: Path) -> Path:
    """A model of dinov2-small's size with random weights."""
    base = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=224))
    base.save_pretrained(folder / "base")
    AdaptFaceModel.from_backbone(folder / "base").save_pretrained(folder / "model")
    AdaptFaceImageProcessor().save_pretrained(folder / "model")
    return folder / "model"


def render_crops(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    crops = []
    for number, draw in enumerate(draw_images(0, count)):
        crops.append(folder / f"{number}.jpg")
        Image.fromarray(render(0, draw, 112)).save(crops[-1], quality=95)
    return crops


def rates(work: dict[int, Callable[[], Any]], images: int, rounds: int) -> dict[int, float]:
    """Images a second of each batch size, the median of rounds in which they take turns."""
    seconds: dict[int, list[float]] = {size: [] for size in work}
    for do in work.values():
        do()  # warm up
    for _ in range(rounds):
        for size, do in work.items():
            start = time.perf_counter()
            do()
            seconds[size].append(time.perf_counter() - start)
    return {size: images / statistics.median(times) for size, times in seconds.items()}


def show(what: str, found: dict[int, float]) -> None:
    print(what)
    for size, rate in found.items():
        print(f"  batch {size:3d}  {rate:8.1f} images/s  {rate / found[1]:.2f} x batch 1")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or Hub id; random weights by default")
    parser.add_argument("--photos", type=Path, help="folder of photos with faces")
    parser.add_argument("--detector", help="the detector's file; from the Hub by default")
    parser.add_argument("--images", type=int, default=64, help="crops, and at most so many photos")
    parser.add_argument("--device", help="the accelerator if there is one, else cpu")
    parser.add_argument("--workers", type=int, help="threads that read and detect; one a CPU by default, at most 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or str(small_model(Path(scratch)))
        embedder = FaceEmbedder.from_pretrained(model, device=options.device, detector=options.detector)
        device = embedder.embedder.device
        crops = render_crops(Path(scratch) / "crops", options.images)
        photos = sorted(path for path in options.photos.iterdir() if path.is_file()) if options.photos else []
        photos = photos[: options.images]
        print(f"{model} on {device.type}, {os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads")

        def embed(images: list[Path], size: int, aligned: bool) -> Callable[[], Any]:
            # One image a call at batch 1, as a program that knows no batches would.
            groups = [[image] for image in images] if size == 1 else [images]
            options_ = {"batch_size": size, "aligned": aligned, "on_error": "skip", "workers": options.workers}
            return lambda: [embedder.embed(group, **options_) for group in groups]

        def alone(size: int) -> Callable[[], Any]:
            pixel_values = torch.rand(size, 3, *[embedder.processor.size["height"]] * 2, device=device)

            @torch.inference_mode()
            def forward() -> None:
                for _ in range(0, options.images, size):
                    for _ in ("image", "mirror image"):
                        embedder.embedder.model(pixel_values).features.cpu()

            return forward

        result: dict[str, Any] = {"options": vars(options) | {"photos": None, "output": None}, "device": device.type}
        result["model"] = rates({size: alone(size) for size in BATCHES}, options.images, options.rounds)
        show("the model alone", result["model"])
        result["crops"] = rates({size: embed(crops, size, True) for size in BATCHES}, len(crops), options.rounds)
        show(f"{len(crops)} aligned crops", result["crops"])
        if photos:
            detect = rates({1: lambda: [embedder.detect(photo) for photo in photos]}, len(photos), options.rounds)
            result["detection"] = detect[1]
            print(f"detection, one thread: {detect[1]:.1f} photos/s")
            result["photos"] = rates(
                {size: embed(photos, size, False) for size in BATCHES}, len(photos), options.rounds
            )
            show(f"{len(photos)} photos", result["photos"])
    if options.output:
        write_text(options.output, json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
