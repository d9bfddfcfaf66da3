"""How long a recipe takes on this machine, in how much memory, and what other GPUs would roughly make of it.

    adaptface estimate recipes/NAME.yaml

A few training steps are measured on pixels of noise, with random weights of the base's geometry: neither the training
data nor the base are needed. Each batch size is measured in a process of its own, so that memory is that of one size
and a batch that does not fit ends that process alone.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config

from adaptface.data.sources import open_source
from adaptface.data.synthetic import draw_images, render
from adaptface.embedders import default_device
from adaptface.memory import peak_memory
from adaptface.settings import SYNTHETIC, TINY_RANDOM, TrainSettings
from adaptface.training import augmentation_of, build_optimizer, build_trainer, prepare_model, tiny_random_config
from configuration_adaptface import AdaptFaceConfig
from image_processing_adaptface import AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel

CASIA = (490_623, 10_572)  # images and identities of CASIA-WebFace as insightface distributes it
MEASURED_STEPS, MEASURED_IMAGES = 3, 64
COUNTED_IMAGES = 8  # of a step whose operations are counted: it takes more memory an image than one that is measured
MEMORY_SHARE = 0.9  # of what is free, that a run may take
LARGEST_BATCH = 4096  # larger ones are not asked for

# Width, blocks, heads of the bases by their ids, for a machine that has none of them yet.
# Source: config.json of facebook/dinov2-*.
_GEOMETRY = {
    "facebook/dinov2-small": (384, 12, 6),
    "facebook/dinov2-base": (768, 12, 12),
    "facebook/dinov2-large": (1024, 24, 16),
    "facebook/dinov2-giant": (1536, 40, 24),
}


class GPU(NamedTuple):
    """A card by its data sheet: memory in GB, dense peak TFLOP/s in float32 and of its half-precision tensor cores, and
    whether these know bfloat16."""

    name: str
    memory: float
    float32: float
    half: float
    bfloat16: bool = True

    def peak(self, precision: str) -> float:
        """TFLOP/s in a mixed precision of accelerate; without tensor cores for it, those of float32."""
        return self.half if precision == "fp16" or (precision == "bf16" and self.bfloat16) else self.float32


# Half precision with float32 sums, without sparsity. GeForce cards sum in float32 at half their quoted tensor rate.
# Source: NVIDIA's data sheets of T4, V100 SXM2, A100 and H100 SXM; architecture papers of GA10x and Ada for GeForce.
GPUS = (
    GPU("RTX 3060", 12, 12.7, 25.5),
    GPU("RTX 4060", 8, 15.1, 30.2),
    GPU("RTX 4070", 12, 29.1, 58.3),
    GPU("T4", 16, 8.1, 65, bfloat16=False),
    GPU("V100", 16, 15.7, 125, bfloat16=False),
    GPU("A100", 40, 19.5, 312),
    GPU("H100", 80, 66.9, 989),
)
UTILISATION = (0.15, 0.4)  # share of the peak that training of a ViT reaches: an assumption


@dataclass(frozen=True)
class Measured:
    """Training steps of one batch size.

    Attributes:
        batch (`int`): images in a step of one process.
        seconds (`float`): of a step, the median.
        memory (`int`): most bytes that the process held (CPU: libraries included; CUDA: allocated on the device).
        flops (`float`): floating-point operations of a step.
    """

    batch: int
    seconds: float
    memory: int
    flops: float


def estimate(
    settings: TrainSettings,
    images: int | None = None,
    identities: int | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Measure a recipe here, and predict its whole run.

    Args:
        settings (`TrainSettings`): the run.
        images, identities (`int`, *optional*): of the training data; default: those of `train_data`, or CASIA-WebFace's
            where it is not here.
        device (`torch.device`, *optional*): where to train; default: the accelerator, or the CPU.
    Returns:
        JSON-ready: `device`, `data`, `steps` (measured, by batch size), `images_per_second`, `decoding_per_second`
        (what the loader's workers deliver), `hours` of all epochs without evaluations, `memory_bytes` at the recipe's
        batch, `free_bytes`, `largest_batch` that fits into them (`LARGEST_BATCH` at most), and `gpus`: estimates from
        published numbers.
    Raises:
        ValueError: the base's geometry is not known here, or not even the smallest batch fits.
        OSError: the training data cannot be read.
    """
    device = device or default_device()
    data, images, identities = _training_data(settings, images, identities)
    free = _free_memory(device)
    first, second, flops = _measure_two(settings, identities, device)
    slope = max((second.memory - first.memory) / (second.batch - first.batch), 1.0)  # bytes an image
    fixed = max(first.memory - slope * first.batch, 0.0)
    largest = min(int((MEMORY_SHARE * free - fixed) / slope), LARGEST_BATCH)
    if largest < 1:
        raise ValueError(
            f"not one image fits: {fixed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; use a smaller base, "
            "or free some memory"
        )
    nearest = min((first, second), key=lambda step: abs(step.batch - settings.batch_size))
    computing = nearest.batch / nearest.seconds
    decoding = _decoding_rate(settings)
    rate = min(computing, decoding)
    total = settings.epochs * images
    return {
        "recipe": settings.output_dir,
        "device": _device_name(device, settings),
        "data": {"source": data, "images": images, "identities": identities},
        "steps": [asdict(step) for step in (first, second)],
        "images_per_second": computing,
        "decoding_per_second": decoding,
        "epochs": settings.epochs,
        "hours": total / rate / 3600,
        "batch_size": settings.batch_size,
        "memory_bytes": int(fixed + slope * settings.batch_size),
        "free_bytes": free,
        "largest_batch": largest,
        "flops_per_image": flops,
        "gpus": [_on(gpu, settings, flops * total, fixed, slope) for gpu in GPUS],
    }


def _on(gpu: GPU, settings: TrainSettings, flops: float, fixed: float, slope: float) -> dict[str, Any]:
    """A run on a card by its published peak: hours at either utilisation, and the batch that fits."""
    peak = gpu.peak(settings.mixed_precision)
    slow, fast = UTILISATION
    hours = [flops / (share * peak * 1e12) / 3600 for share in (fast, slow)]
    batch = int((MEMORY_SHARE * gpu.memory * 1e9 - fixed) / slope)
    return {
        "name": gpu.name,
        "memory_gb": gpu.memory,
        "peak_tflops": peak,
        "without": "bfloat16" if settings.mixed_precision == "bf16" and not gpu.bfloat16 else None,
        "hours": hours,
        "largest_batch": max(0, min(batch, LARGEST_BATCH)),
    }


def _training_data(settings: TrainSettings, images: int | None, identities: int | None) -> tuple[str, int, int]:
    """What the data are called, and their numbers of images and identities."""
    name = settings.train_data
    if images is not None and identities is not None:
        return "as given", images, identities
    if name == SYNTHETIC:
        found = (settings.synthetic_identities * settings.synthetic_images, settings.synthetic_identities)
    elif name and Path(name).exists():
        source = open_source(name, settings.train_metadata, settings.train_split, None)
        found = (len(source), len(source.identities))
    else:
        name, found = f"{name} is not here; numbers of CASIA-WebFace", CASIA
    return str(name), images or found[0], identities or found[1]


def _measure_two(settings: TrainSettings, identities: int, device: torch.device) -> tuple[Measured, Measured, float]:
    """A small batch, and the recipe's or the largest that surely fits; and the FLOPs of an image."""
    small = max(1, min(8, settings.batch_size // 2))
    first = _in_own_process(settings, identities, device, small)
    if first is None:
        raise ValueError(f"a batch of {small} does not fit into the memory of {device}; use a smaller base")
    large = max(settings.batch_size, small + 1)
    if device.type == "cpu":  # where too much memory would end more than this process
        large = min(large, max(small + 1, 4 * small))
    second = None
    while second is None:
        second = _in_own_process(settings, identities, device, large)
        if second is None and large == small + 1:
            raise ValueError(f"a batch of {large} does not fit into the memory of {device}; train with {small}")
        large = max(small + 1, large // 2)
    return first, second, first.flops / first.batch


def _in_own_process(settings: TrainSettings, identities: int, device: torch.device, batch: int) -> Measured | None:
    """Steps measured in a fresh process; None where the batch does not fit."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure_steps, settings, identities, str(device), batch).result()
        except (BrokenProcessPool, torch.OutOfMemoryError, MemoryError):
            return None


def measure_steps(settings: TrainSettings, identities: int, device: str, batch: int) -> Measured:
    """Train on noise for a few steps, in this process.

    Args:
        settings (`TrainSettings`): model, losses, optimiser and precision.
        identities (`int`): classes of the identity head.
        device (`str`): "cpu" or "cuda".
        batch (`int`): images in a step.
    Raises:
        ValueError: the base's geometry is not known here.
    """
    torch.manual_seed(0)
    if settings.cpu_threads:
        torch.set_num_threads(settings.cpu_threads)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=settings.mixed_precision)
    config = AdaptFaceConfig(
        backbone=settings.backbone, backbone_config=_geometry(settings), **settings.model_arguments()
    )
    config._attn_implementation = settings.attention
    model = AdaptFaceModel(config)
    prepare_model(model, settings)
    trainer = build_trainer(model, identities, settings)
    parameters = [parameter for parameter in trainer.parameters() if parameter.requires_grad]
    wrapped, optimizer = accelerator.prepare(trainer, build_optimizer(trainer, settings))
    wrapped.train()
    side = settings.image_size
    pixels = torch.randn(batch, 3, side, side, device=accelerator.device)
    labels = torch.randint(identities, (batch,), device=accelerator.device)
    domains = torch.randint(config.num_domains, (batch,), device=accelerator.device)

    def step(images: int = batch) -> None:
        accelerator.backward(wrapped(pixels[:images], labels[:images], domains[:images])["loss"])
        accelerator.clip_grad_norm_(parameters, settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    step()  # warms up
    seconds = []
    for _ in range(MEASURED_STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    memory = peak_memory(accelerator.device)
    # The counter knows no fused attention of CPUs; as matrix products its operations are the same.
    counted = min(batch, COUNTED_IMAGES)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(counted)
    return Measured(batch, statistics.median(seconds), memory, batch / counted * counter.get_total_flops())


def _geometry(settings: TrainSettings) -> Dinov2Config:
    """Architecture of the base: of a folder or the cache, or known by its id."""
    name = settings.backbone
    if name == TINY_RANDOM:
        return tiny_random_config(settings)
    try:
        return Dinov2Config.from_pretrained(name, revision=settings.backbone_revision, local_files_only=True)
    except (OSError, ValueError) as error:
        if name not in _GEOMETRY:
            raise ValueError(
                f"backbone {name}: its config.json is not here, so that its size is not known; fetch it, or name one "
                f"of {', '.join(_GEOMETRY)}"
            ) from error
    width, blocks, heads = _GEOMETRY[name]
    return Dinov2Config(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, patch_size=14, image_size=518,
        use_swiglu_ffn=name.endswith("giant"),
    )  # fmt: skip


def _decoding_rate(settings: TrainSettings) -> float:
    """Images a second that the workers of the recipe decode and augment: 112 px JPEG files of rendered faces."""
    processor, augment = AdaptFaceImageProcessor(size=settings.image_size), augmentation_of(settings)
    files = []
    for nuisance in draw_images(0, 8):
        file = io.BytesIO()
        Image.fromarray(render(0, nuisance)).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    for index in range(MEASURED_IMAGES):
        processor(augment(processor.load(files[index % len(files)]), rng))
    one = MEASURED_IMAGES / (time.perf_counter() - start)
    return one * max(1, min(settings.num_workers, os.cpu_count() or 1))


def _free_memory(device: torch.device) -> int:
    """Bytes that a run could take on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _device_name(device: torch.device, settings: TrainSettings) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, threads: {settings.cpu_threads or torch.get_num_threads()}"


def as_text(found: dict[str, Any]) -> str:
    """An estimate as it is printed."""
    data, last = found["data"], found["steps"][-1]
    waits = found["decoding_per_second"] < found["images_per_second"]
    lines = [
        f"data: {data['images']:,} images of {data['identities']:,} identities ({data['source']})",
        f"measured here ({found['device']}), random weights, noise for images:",
        *(
            f"  batch {step['batch']}: {step['seconds']:.3f} s a step, {step['batch'] / step['seconds']:.1f} images/s, "
            f"peak memory {step['memory'] / 1e9:.2f} GB"
            for step in found["steps"]
        ),
        f"  decoding and augmentation: {found['decoding_per_second']:.0f} images/s"
        + (" - the run waits for it; raise num_workers" if waits else ""),
        "predicted from that:",
        f"  {found['epochs']} epochs: {_hours(found['hours'])}, evaluations not counted",
        f"  memory at batch_size {found['batch_size']}: {found['memory_bytes'] / 1e9:.1f} GB of "
        f"{found['free_bytes'] / 1e9:.1f} GB free; the largest batch that fits: {_batch(found['largest_batch'])}",
    ]
    if found["batch_size"] > found["largest_batch"]:
        lines.append(
            f"  batch_size {found['batch_size']} does not fit: lower it, and raise gradient_accumulation instead"
        )
    slow, fast = (f"{100 * share:.0f} %" for share in UTILISATION)
    lines += [
        "NOT measured: other GPUs, estimated from published peak TFLOP/s "
        f"({last['flops'] / last['batch'] / 1e9:.2g} GFLOP an image, {slow} to {fast} of the peak assumed, data never "
        "waited for; the batch by this machine's memory):",
        f"  {'GPU':<10} {'memory':>7} {'peak':>14} {'epochs take about':>22} {'largest batch':>14}",
    ]
    for gpu in found["gpus"]:
        peak = f"{gpu['peak_tflops']:g} TFLOP/s"
        hours = " to ".join(_hours(value) for value in gpu["hours"])
        batch = _batch(gpu["largest_batch"])
        without = f"  (has no {gpu['without']}: take fp16)" if gpu["without"] else ""
        lines.append(f"  {gpu['name']:<10} {gpu['memory_gb']:>4g} GB {peak:>14} {hours:>22} {batch:>14}{without}")
    return "\n".join(lines)


def _batch(largest: int) -> str:
    return f"{largest} or more" if largest == LARGEST_BATCH else str(largest)


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
