"""Augmentation: what each operation does, and that (seed, epoch, index) alone decides an item."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from adaptface.data.augmentation import (
    RANDAUGMENT,
    TrainingFaces,
    build_augmentation,
    horizontal_flip,
    occlude,
    rand_augment,
    random_crop,
    reduce_resolution,
    vary_light,
)
from adaptface.data.base import FaceSource
from adaptface.data.sources import open_source
from image_processing_adaptface import AdaptFaceImageProcessor

EVERYTHING = dict(flip=0.5, randaugment_ops=2, low_resolution=0.5, occlusion=0.5, crop=0.5, photometric=0.5)


def make_image(seed: int = 0, width: int = 40, height: int = 40) -> Image.Image:
    """Smooth colours with a full range of values, different in every corner."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.int64)


# --- single operations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [-1.0, -1 / 30, 0.0, 1 / 30, 1.0])
@pytest.mark.parametrize("name", RANDAUGMENT)
def test_operations_keep_size_and_mode(name: str, strength: float) -> None:
    image = make_image(width=40, height=48)
    before = image.tobytes()
    changed = RANDAUGMENT[name](image, strength)
    assert changed.size == (40, 48) and changed.mode == "RGB"
    assert image.tobytes() == before
    if name not in ("autocontrast", "equalize"):  # these two have no strength
        idle = strength == 0 or name == "identity" or (name == "posterize" and abs(strength) < 0.1)
        assert (changed.tobytes() == before) == idle


def test_photometric_operations_against_their_formulas() -> None:
    x = pixels(make_image())
    image = Image.fromarray(x.astype(np.uint8))
    grey = np.round(x @ (0.299, 0.587, 0.114))[..., None]
    for strength in (-1.0, 0.5):
        factor = 1 + 0.9 * strength
        expected = {
            "brightness": factor * x,
            "contrast": factor * x + (1 - factor) * grey.mean(),
            "color": factor * x + (1 - factor) * grey,
        }
        for name, value in expected.items():
            assert np.abs(pixels(RANDAUGMENT[name](image, strength)) - value.clip(0, 255)).max() <= 2, name
    assert (pixels(RANDAUGMENT["posterize"](image, 1.0)) == x // 16 * 16).all()
    assert (pixels(RANDAUGMENT["posterize"](image, -0.5)) == x // 4 * 4).all()
    assert (pixels(RANDAUGMENT["solarize"](image, 1.0)) == 255 - x).all()
    assert (pixels(RANDAUGMENT["solarize"](image, -0.5)) == np.where(x >= 128, 255 - x, x)).all()


def test_geometric_operations_against_their_formulas() -> None:
    """Where the middle of a dot goes: coordinates are those of the dot relative to the image's corner, in pixels."""

    def place(name: str, strength: float) -> tuple[float, float]:
        image = Image.new("RGB", (331, 331))
        image.paste((255, 255, 255), (96, 46, 105, 55))  # centre (100.5, 50.5)
        weights = pixels(RANDAUGMENT[name](image, strength))[..., 0]
        rows, columns = np.indices(weights.shape) + 0.5
        return float((weights * columns).sum() / weights.sum()), float((weights * rows).sum() / weights.sum())

    assert place("translate_x", -2 / 3) == pytest.approx((200.5, 50.5), abs=0.05)
    assert place("translate_y", -2 / 3) == pytest.approx((100.5, 150.5), abs=0.05)
    assert place("shear_x", 0.5) == pytest.approx((100.5 - 0.15 * 50.5, 50.5), abs=0.05)
    assert place("shear_y", -1.0) == pytest.approx((100.5, 50.5 + 0.3 * 100.5), abs=0.05)
    turn = np.exp(-1j * np.pi / 6) * complex(100.5 - 165.5, 50.5 - 165.5)  # y points down: counter-clockwise
    assert place("rotate", 1.0) == pytest.approx((165.5 + turn.real, 165.5 + turn.imag), abs=0.2)


def test_flip_is_the_mirror() -> None:
    image = make_image()
    assert (pixels(horizontal_flip(image, np.random.default_rng(0))) == pixels(image)[:, ::-1]).all()
    assert (pixels(build_augmentation(flip=1.0)(image, np.random.default_rng(0))) == pixels(image)[:, ::-1]).all()


def white(seed: int, operation) -> np.ndarray:
    return pixels(operation(Image.new("RGB", (100, 80), (255, 255, 255)), np.random.default_rng(seed)))


def sides(mask: np.ndarray) -> tuple[int, int]:
    """Width and height of the box that `mask` fills; fails if it is no box."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    return columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]


def test_crop_keeps_a_window_in_place() -> None:
    shares = []
    for seed in range(200):
        left = white(seed, random_crop)
        width, height = sides((left == 255).all(-1))
        shares.append(width * height / 8000)
        assert ((left == 255) | (left == 0)).all()
    assert 0.15 < min(shares) < 0.3 and 0.9 < max(shares) <= 1.0


def test_occlusion_covers_a_box_by_black_or_noise() -> None:
    shares, kinds = [], {"black": 0, "noise": 0}
    for seed in range(200):
        covered = white(seed, occlude)
        width, height = sides((covered != 255).any(-1))
        shares.append(width * height / 8000)
        kinds["black" if (covered[(covered != 255).any(-1)] == 0).all() else "noise"] += 1
    assert 0.01 < min(shares) < 0.05 and 0.28 < max(shares) < 0.35
    assert min(kinds.values()) > 60


def test_low_resolution_loses_detail_and_keeps_the_mean() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    kept = [pixels(reduce_resolution(noise, np.random.default_rng(seed))) for seed in range(50)]
    spread = np.array([image.std() for image in kept]) / pixels(noise).std()
    assert spread.min() < 0.3 and spread.max() > 0.8 and (spread < 1.2).all()
    assert all(abs(image.mean() - pixels(noise).mean()) < 6 for image in kept)
    assert reduce_resolution(make_image(width=2, height=1), np.random.default_rng(0)).size == (2, 1)


def test_light_stays_within_half() -> None:
    grey = Image.new("RGB", (8, 8), (100, 100, 100))  # contrast and colour leave a plain grey alone
    values = [pixels(vary_light(grey, np.random.default_rng(seed)))[0, 0, 0] for seed in range(100)]
    assert 50 <= min(values) < 60 and 140 < max(values) <= 150


def test_randaugment_draws_every_operation_within_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float]] = []
    for name in list(RANDAUGMENT):
        monkeypatch.setitem(
            RANDAUGMENT, name, lambda image, strength, name=name: seen.append((name, strength)) or image
        )
    rng = np.random.default_rng(0)
    for _ in range(500):
        rand_augment(make_image(), rng, ops=4, magnitude=(1, 16))
    assert len(seen) == 2000
    assert {name for name, _ in seen} == set(RANDAUGMENT) and len(RANDAUGMENT) == 14
    magnitudes = {round(abs(strength) * 30) for _, strength in seen}
    assert magnitudes == set(range(1, 17))
    assert 900 < sum(strength > 0 for _, strength in seen) < 1100


# --- composition ----------------------------------------------------------------------------------------------


def test_probability_zero_is_the_identity() -> None:
    image = make_image()
    rng = np.random.default_rng(0)
    assert build_augmentation(flip=0.0)(image, rng) is image
    assert rng.random() == np.random.default_rng(0).random()  # nothing was drawn


def test_probabilities_are_met() -> None:
    image = make_image(width=8, height=8)
    augment = build_augmentation(flip=0.3)
    flipped = sum(augment(image, np.random.default_rng(seed)).tobytes() != image.tobytes() for seed in range(1000))
    assert 255 < flipped < 345  # three standard deviations


@pytest.mark.parametrize("name", ["flip", "crop", "occlusion", "low_resolution", "photometric", "randaugment_ops"])
def test_each_option_acts(name: str) -> None:
    image = make_image()
    augment = build_augmentation(**{"flip": 0, name: 1})
    assert any(augment(image, np.random.default_rng(seed)).tobytes() != image.tobytes() for seed in range(9))


def test_randomness_comes_from_the_generator_only() -> None:
    augment = pickle.loads(pickle.dumps(build_augmentation(**EVERYTHING)))
    image = make_image()
    results = set()
    for seed in range(20):
        torch.manual_seed(seed)
        np.random.seed(seed)
        first = augment(image, np.random.default_rng(seed)).tobytes()
        torch.manual_seed(99)
        np.random.seed(99)
        assert build_augmentation(**EVERYTHING)(image, np.random.default_rng(seed)).tobytes() == first
        results.add(first)
    assert len(results) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, r"flip=1\.5: is a probability"),
        ({"occlusion": -0.1}, r"occlusion=-0\.1: is a probability"),
        ({"low_resolution": float("nan")}, "low_resolution=nan: is a probability"),
        ({"randaugment_ops": -1}, "randaugment_ops=-1"),
        ({"randaugment_magnitude": (1, 31)}, "randaugment_magnitude=1, 31: give 0 <= lowest <= highest <= 30"),
        ({"randaugment_magnitude": (9, 3)}, "randaugment_magnitude=9, 3"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_augmentation(**options)


# --- training set ---------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> FaceSource:
    rows = ["file,domain"]
    for at in range(12):
        path = tmp_path / "faces" / f"id_{at % 3}" / f"{at:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(at).save(path)
        rows.append(f"id_{at % 3}/{at:02d}.png,{('general', 'pose', 'age', '')[at % 4]}")
    (tmp_path / "faces" / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    return open_source(tmp_path / "faces")


def make_faces(source: FaceSource, seed: int = 7) -> TrainingFaces:
    return TrainingFaces(source, AdaptFaceImageProcessor(size=28), build_augmentation(**EVERYTHING), seed)


def test_items(source: FaceSource) -> None:
    plain = TrainingFaces(source, AdaptFaceImageProcessor(size=28), build_augmentation(flip=0.0), seed=0)
    assert len(plain) == 12
    item = plain[5]
    assert set(item) == {"pixel_values", "label", "domain", "index", "broken"} and item["broken"] == 0
    assert item["pixel_values"].dtype == torch.float32 and item["pixel_values"].shape == (3, 28, 28)
    assert item["label"] == 1 and item["index"] == 5
    assert item["domain"] == {"04": 0, "01": 1, "10": 2, "07": -1}[Path(source.where(5)).stem]
    expected = AdaptFaceImageProcessor(size=28)(source.image(5))["pixel_values"][0]
    assert torch.equal(item["pixel_values"], expected)


def test_seed_epoch_and_index_decide(source: FaceSource) -> None:
    faces = make_faces(source)

    def epoch(number: int, faces: TrainingFaces = faces) -> torch.Tensor:
        faces.set_epoch(number)
        return torch.stack([faces[at]["pixel_values"] for at in range(12)])

    first, second = epoch(0), epoch(1)
    backwards = torch.stack([faces[at]["pixel_values"] for at in reversed(range(12))]).flip(0)
    assert torch.equal(second, backwards)
    assert torch.equal(first, epoch(0)) and torch.equal(first, epoch(0, make_faces(source)))
    assert not torch.equal(first, second) and not torch.equal(first, epoch(0, make_faces(source, seed=8)))
    assert len({tuple(image.flatten().tolist()) for image in torch.cat([first, second])}) == 24


@pytest.mark.parametrize(("start", "num_workers"), [pytest.param("spawn", 1, marks=pytest.mark.slow), (None, 2)])
def test_workers_change_nothing(source: FaceSource, start: str | None, num_workers: int) -> None:
    """Persistent workers over two epochs give the bytes of the main process, and see `set_epoch`."""
    faces = make_faces(source)
    workers = dict(num_workers=num_workers, persistent_workers=True, multiprocessing_context=start)
    alone, helped = DataLoader(faces, batch_size=5), DataLoader(faces, batch_size=5, **workers)
    for epoch in (3, 4):
        faces.set_epoch(epoch)
        pairs = list(zip(alone, helped, strict=True))
        assert [len(batch["label"]) for batch, _ in pairs] == [5, 5, 2]
        for expected, batch in pairs:
            assert batch["label"].dtype == batch["domain"].dtype == batch["index"].dtype == torch.int64
            for name, value in expected.items():
                assert torch.equal(value, batch[name]), (epoch, name)


@pytest.mark.parametrize("damage", ["cut off", "missing", "not square"])
def test_broken_images_are_named_counted_and_replaced(source: FaceSource, damage: str) -> None:
    for victim in (4, 5):
        path = Path(source.where(victim))
        if damage == "not square":
            make_image(width=40, height=60).save(path)
        elif damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:200])
    faces = make_faces(source)
    name = Path(source.where(4)).name
    with pytest.warns(UserWarning, match=rf"skipped a broken training image: .*{name}"):
        item = faces[4]
    assert item["broken"] == 1 and item["index"] == 6 and faces[6]["broken"] == 0
    assert torch.equal(item["pixel_values"], faces[6]["pixel_values"]) and item["label"] == faces[6]["label"]


def test_after_the_last_image_comes_the_first(source: FaceSource) -> None:
    last = len(source) - 1
    Path(source.where(last)).write_bytes(b"")
    with pytest.warns(UserWarning, match="the file is empty"):
        assert make_faces(source)[last]["index"] == 0
    for index in range(last):
        Path(source.where(index)).write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="every image is broken"):
        make_faces(source)[2]


def test_seed_must_not_be_negative(source: FaceSource) -> None:
    with pytest.raises(ValueError, match="seed=-1: must not be negative"):
        make_faces(source, seed=-1)
