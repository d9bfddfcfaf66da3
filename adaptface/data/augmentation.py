"""Seeded augmentation of face crops, and the training set that applies it.

    augment = build_augmentation(flip=0.5, randaugment_ops=4, low_resolution=0.2)
    faces = TrainingFaces(source, processor, augment, seed=0)
    faces.set_epoch(3)

Every random number comes from one generator seeded by (seed, epoch, index): an item does not depend on
workers, processes, order or what was read before, and a resumed run sees the very same images.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import Dataset

from .base import LabelledFaces

LEVELS = 30  # highest of RandAugment's 31 magnitudes, 0 .. 30
RESAMPLINGS = tuple(Image.Resampling[name] for name in ("NEAREST", "BILINEAR", "BOX", "BICUBIC", "LANCZOS"))

Generator = np.random.Generator
Operation = Callable[[Image.Image, Generator], Image.Image]


class Processor(Protocol):
    """What `TrainingFaces` asks of the shipped image processor."""

    def __call__(self, images: Image.Image, /) -> Mapping[str, Any]: ...


def build_augmentation(
    flip: float = 0.5,
    randaugment_ops: int = 0,
    randaugment_magnitude: Sequence[int] = (1, 16),
    low_resolution: float = 0.0,
    occlusion: float = 0.0,
    crop: float = 0.0,
    photometric: float = 0.0,
) -> Operation:
    """Compose an augmentation: scene first (flip, crop, RandAugment, occlusion), then camera.

    Args:
        flip, low_resolution, occlusion, crop, photometric (`float` in [0, 1]): probability of each; see
            `horizontal_flip`, `reduce_resolution`, `occlude`, `random_crop` and `vary_light`.
        randaugment_ops (`int`): operations drawn for each image, 0 for none.
        randaugment_magnitude (two `int`s): lowest and highest magnitude on a scale of 31 (0 .. 30).
    Returns:
        A picklable `callable(image, rng)`: RGB `PIL.Image` and `np.random.Generator` to an image of equal size.
    Raises:
        ValueError: a probability or magnitude is out of range; the message names it.
    """
    low, high = randaugment_magnitude
    if not 0 <= low <= high <= LEVELS:
        raise ValueError(f"randaugment_magnitude={low}, {high}: give 0 <= lowest <= highest <= {LEVELS}")
    if randaugment_ops < 0:
        raise ValueError(f"randaugment_ops={randaugment_ops}: give the number of operations, 0 for none")
    randaugment = partial(rand_augment, ops=randaugment_ops, magnitude=(low, high))
    steps: list[tuple[str, float, Operation]] = [
        ("flip", flip, horizontal_flip),
        ("crop", crop, random_crop),
        ("randaugment_ops", float(randaugment_ops > 0), randaugment),
        ("occlusion", occlusion, occlude),
        ("low_resolution", low_resolution, reduce_resolution),
        ("photometric", photometric, vary_light),
    ]
    for name, probability, _ in steps:
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"{name}={probability}: is a probability, give 0 .. 1")
    return partial(_apply, steps=tuple((probability, step) for _, probability, step in steps if probability))


def _apply(image: Image.Image, rng: Generator, steps: tuple[tuple[float, Operation], ...]) -> Image.Image:
    for probability, step in steps:
        if rng.random() < probability:
            image = step(image, rng)
    return image


def horizontal_flip(image: Image.Image, rng: Generator) -> Image.Image:
    """The mirror image."""
    return ImageOps.mirror(image)


def random_crop(image: Image.Image, rng: Generator) -> Image.Image:
    """Keep a window of 20% to 100% of the area where it is, black around: a badly detected face.

    Source: crop augmentation of AdaFace, arXiv:2204.00964, section 4.1.
    """
    box = _random_box(image.size, rng, area=(0.2, 1.0), aspect=4 / 3)
    canvas = Image.new(image.mode, image.size)
    canvas.paste(image.crop(box), box)
    return canvas


def occlude(image: Image.Image, rng: Generator) -> Image.Image:
    """Cover a rectangle of 2% to 33% of the area by black or by noise, at even odds.

    Source: Random Erasing, arXiv:1708.04896, algorithm 1.
    """
    left, top, right, bottom = box = _random_box(image.size, rng, area=(0.02, 0.33), aspect=1 / 0.3)
    covered = image.copy()
    if rng.random() < 0.5:
        covered.paste((0, 0, 0), box)
    else:
        noise = rng.integers(0, 256, (bottom - top, right - left, 3), dtype=np.uint8)
        covered.paste(Image.fromarray(noise), box)
    return covered


def reduce_resolution(image: Image.Image, rng: Generator) -> Image.Image:
    """Shrink to 20% to 100% of the side and back, each with a random interpolation: a face far away.

    Source: low-resolution augmentation of AdaFace, arXiv:2204.00964, section 4.1.
    """
    ratio = rng.uniform(0.2, 1.0)
    down, up = rng.integers(len(RESAMPLINGS), size=2)
    small = max(1, round(ratio * image.width)), max(1, round(ratio * image.height))
    return image.resize(small, RESAMPLINGS[down]).resize(image.size, RESAMPLINGS[up])


def vary_light(image: Image.Image, rng: Generator) -> Image.Image:
    """Scale brightness, contrast and saturation by 0.5 to 1.5 each, in random order.

    Source: photometric augmentation of AdaFace, arXiv:2204.00964, section 4.1.
    """
    for at in rng.permutation(3):
        enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[at]
        image = enhancer(image).enhance(rng.uniform(0.5, 1.5))
    return image


def _random_box(
    size: tuple[int, int], rng: Generator, area: tuple[float, float], aspect: float
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) inside `size`: a share of its area, aspect ratio 1/aspect .. aspect."""
    width, height = size
    share = rng.uniform(*area)
    stretch = math.exp(rng.uniform(-math.log(aspect), math.log(aspect)) / 2)  # sqrt of the aspect ratio
    box_width = min(width, max(1, round(math.sqrt(share) * width * stretch)))
    box_height = min(height, max(1, round(math.sqrt(share) * height / stretch)))
    left, top = int(rng.integers(width - box_width + 1)), int(rng.integers(height - box_height + 1))
    return left, top, left + box_width, top + box_height


# --- RandAugment --------------------------------------------------------------------------------------------


def _enhance(image: Image.Image, strength: float, enhancer: Callable[[Image.Image], Any]) -> Image.Image:
    return enhancer(image).enhance(1 + 0.9 * strength)


def _warp(image: Image.Image, strength: float, term: int, reach: float) -> Image.Image:
    """Add `reach * strength` to one term of the affine map (1, 0, 0, 0, 1, 0) from output to input pixels."""
    terms = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    pixels = {2: image.width, 5: image.height}.get(term, 1)  # translations are shares of the side
    terms[term] += reach * strength * pixels
    return image.transform(image.size, Image.Transform.AFFINE, terms, Image.Resampling.BILINEAR)


def _rotate(image: Image.Image, strength: float) -> Image.Image:
    return image.rotate(30 * strength, Image.Resampling.BILINEAR)


def _posterize(image: Image.Image, strength: float) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(4 * abs(strength)))


def _solarize(image: Image.Image, strength: float) -> Image.Image:
    return ImageOps.solarize(image, round(256 * (1 - abs(strength))))


RANDAUGMENT: dict[str, Callable[[Image.Image, float], Image.Image]] = {  # (image, strength -1 .. 1)
    "identity": lambda image, strength: image,
    "autocontrast": lambda image, strength: ImageOps.autocontrast(image),
    "equalize": lambda image, strength: ImageOps.equalize(image),
    "rotate": _rotate,
    "solarize": _solarize,
    "posterize": _posterize,
    "color": partial(_enhance, enhancer=ImageEnhance.Color),
    "contrast": partial(_enhance, enhancer=ImageEnhance.Contrast),
    "brightness": partial(_enhance, enhancer=ImageEnhance.Brightness),
    "sharpness": partial(_enhance, enhancer=ImageEnhance.Sharpness),
    "shear_x": partial(_warp, term=1, reach=0.3),
    "shear_y": partial(_warp, term=3, reach=0.3),
    "translate_x": partial(_warp, term=2, reach=150 / 331),
    "translate_y": partial(_warp, term=5, reach=150 / 331),
}


def rand_augment(image: Image.Image, rng: Generator, ops: int, magnitude: tuple[int, int]) -> Image.Image:
    """Apply `ops` operations of `RANDAUGMENT`, drawn with replacement, each with its own magnitude and sign.

    Magnitude m of 0 .. 30 is a strength t = m / 30: rotation by 30 t degrees, shear by 0.3 t, translation by
    150/331 t of the side, colour, contrast, brightness and sharpness times 1 +- 0.9 t, 8 - round(4 t) bits a
    channel, inversion of the values from 256 (1 - t) on. Uncovered borders are black, as in aligned crops.

    Source: RandAugment, arXiv:1909.13719, section 3; ranges as in torchvision's `RandAugment`. A magnitude drawn
    from a range (1 .. 16) is the recipe of FRoundation, arXiv:2410.23831.
    """
    names = tuple(RANDAUGMENT)
    for _ in range(ops):
        name = names[rng.integers(len(names))]
        strength = rng.integers(magnitude[0], magnitude[1] + 1) / LEVELS
        image = RANDAUGMENT[name](image, strength if rng.random() < 0.5 else -strength)
    return image


# --- training set -------------------------------------------------------------------------------------------


class TrainingFaces(Dataset[dict[str, Any]]):
    """Augmented, processed faces for a `DataLoader` (default collation).

    The epoch lives in shared memory: `set_epoch` reaches persistent and spawned workers. Call it between epochs,
    before the loader is iterated, since workers read ahead.

    Args:
        source (`LabelledFaces`): images and labels; its keys are what items are asked by.
        processor: the shipped image processor; image -> `{"pixel_values": (1, 3, S, S)}`.
        augmentation: `callable(image, rng)` of `build_augmentation`.
        seed (`int`, not negative): with epoch and index the seed of an item's random numbers.
    Items:
        `{"pixel_values": float32 tensor (3, S, S), "label": int, "domain": int (-1 unlabelled), "index": int,
        "broken": int}`. Where an image is broken (missing, damaged, not square) a warning names it, `broken` is 1, and
        the source's first stand-in that is not takes its place: which one depends on nothing but the data.
    Raises:
        ValueError: the image and all its stand-ins are broken.
    """

    def __init__(self, source: LabelledFaces, processor: Processor, augmentation: Operation, seed: int):
        if seed < 0:
            raise ValueError(f"seed={seed}: must not be negative")
        self.source = source
        self.processor = processor
        self.augmentation = augmentation
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose augmentation the next items carry."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        for broken, candidate in enumerate(chain((key,), self.source.stand_ins(key))):
            try:
                return {**self._item(candidate), "broken": min(broken, 1)}
            except (ValueError, OSError) as error:
                warnings.warn(f"skipped a broken training image: {error}", stacklevel=2)
                last = error
        raise ValueError(f"{self.source.name}: every image is broken, such as {last}")

    def _item(self, key: Any) -> dict[str, Any]:
        numbers = self.source.numbers(key)
        rng = np.random.default_rng((self.seed, int(self._epoch), numbers["index"]))
        image = self.augmentation(self.source.image(key), rng)
        try:
            pixel_values = self.processor(image)["pixel_values"][0]
        except ValueError as error:  # such as an image that is not square
            raise ValueError(f"{self.source.where(key)}: {error}") from error
        return {"pixel_values": pixel_values, **numbers}
