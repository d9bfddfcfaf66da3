"""The image processor: what it accepts, what it makes of it, what it refuses, and that AutoImageProcessor loads it."""

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from image_processing_adaptface import ARCFACE_TEMPLATE, AdaptFaceImageProcessor

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture
def processor() -> AdaptFaceImageProcessor:
    return AdaptFaceImageProcessor()


def picture(width: int = 112, height: int = 112, seed: int = 0) -> Image.Image:
    """A smooth colour picture without symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, file_format: str = "PNG", **kwargs: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **kwargs)
    return buffer.getvalue()


def error_of(processor: AdaptFaceImageProcessor, *arguments: object) -> str:
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
        processor(*arguments)
    return str(caught.value)


# --- pixel values -------------------------------------------------------------------------------------------------


def test_pixel_values_equal_the_formula_pixel_by_pixel(processor: AdaptFaceImageProcessor) -> None:
    image = picture(224, 224)
    values = processor(image).pixel_values
    assert values.shape == (1, 3, 224, 224) and values.dtype == torch.float32
    for x, y in [(0, 0), (223, 0), (17, 200)]:
        expected = [(v / 255 - m) / s for v, m, s in zip(image.getpixel((x, y)), MEAN, STD, strict=True)]
        np.testing.assert_allclose(values[0, :, y, x], expected, atol=1e-6)


def test_a_crop_is_resized_bicubically(processor: AdaptFaceImageProcessor) -> None:
    image = picture().point(lambda value: 64 + value // 2)
    # Pillow's float mode interpolates each channel without rounding, or clipping, in between.
    channels = [
        np.asarray(Image.fromarray(channel.astype(np.float32)).resize((224, 224), Image.Resampling.BICUBIC))
        for channel in np.moveaxis(np.asarray(image), 2, 0)
    ]
    values = processor(image).pixel_values[0].numpy() * STD[:, None, None] + MEAN[:, None, None]
    np.testing.assert_allclose(values * 255, np.clip(channels, 0, 255), atol=1.2)  # two passes, each rounded


def test_every_input_kind_gives_the_same_values(processor: AdaptFaceImageProcessor, tmp_path: Path) -> None:
    image = picture()
    path = tmp_path / "face ü.png"
    path.write_bytes(encoded(image))
    expected = processor(image).pixel_values
    kinds = [path, str(path), path.read_bytes(), np.asarray(image), np.asarray(image.convert("RGBA")), Image.open(path)]
    for kind in kinds:
        assert torch.equal(processor(kind).pixel_values, expected), type(kind)
    grey = np.asarray(image.convert("L"))
    assert torch.equal(processor(grey).pixel_values, processor(grey[:, :, None]).pixel_values)
    assert torch.equal(processor(grey).pixel_values, processor(np.stack([grey] * 3, axis=2)).pixel_values)


def test_a_batch_equals_its_images_one_by_one(processor: AdaptFaceImageProcessor) -> None:
    images = [picture(side, side, seed=side) for side in (112, 224, 64, 300)]
    landmarks = [ARCFACE_TEMPLATE * side / 112 for side in (112, 224, 64, 300)]
    for arguments in ((images,), (images, np.stack(landmarks))):
        together = processor(*arguments).pixel_values
        alone = [processor(*(column[i] for column in arguments)).pixel_values for i in range(4)]
        assert torch.equal(together, torch.cat(alone))
        assert torch.equal(together, processor(*arguments).pixel_values)
    array = np.stack([np.asarray(picture(seed=s)) for s in range(3)])
    assert torch.equal(processor(array).pixel_values, processor(list(array)).pixel_values)


def test_input_images_are_left_alone(processor: AdaptFaceImageProcessor) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(picture(), exif=exif)))
    before = encoded(image, exif=image.getexif())
    processor(image, ARCFACE_TEMPLATE)
    assert encoded(image, exif=image.getexif()) == before


@pytest.mark.parametrize("size", [56, {"height": 56, "width": 56}])
def test_size_and_statistics_are_settings(size: object) -> None:
    processor = AdaptFaceImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=0)
    assert processor.size == {"height": 56, "width": 56}
    values = processor(Image.new("RGB", (112, 112), (255, 255, 0)), return_tensors="np").pixel_values
    assert isinstance(values, np.ndarray) and values.shape == (1, 3, 56, 56)
    np.testing.assert_allclose(values[0, :, 0, 0], [1, 1, -1])


# --- PIL modes and orientation ------------------------------------------------------------------------------------


def pixel(processor: AdaptFaceImageProcessor, image: object) -> tuple[int, ...]:
    """Colour of a plain image after loading."""
    rgb = processor.load(image)
    assert rgb.mode == "RGB"
    colours = rgb.getcolors()
    assert colours is not None and len(colours) == 1
    return colours[0][1]


def plain(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (32, 32), colour)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (plain("1", 1), (255, 255, 255)),
        (plain("L", 77), (77, 77, 77)),
        (plain("LA", (200, 255)), (200, 200, 200)),
        (plain("LA", (200, 0)), (0, 0, 0)),
        (plain("La", (200, 255)), (200, 200, 200)),
        (plain("RGB", (10, 20, 30)), (10, 20, 30)),
        (plain("RGBX", (10, 20, 30, 0)), (10, 20, 30)),
        (plain("RGBA", (200, 100, 50, 255)), (200, 100, 50)),
        (plain("RGBA", (200, 100, 50, 0)), (0, 0, 0)),
        (plain("RGBA", (200, 100, 50, 51)), (40, 20, 10)),  # a fifth opaque over black
        (plain("RGBa", (40, 20, 10, 51)), (40, 20, 10)),  # the same, premultiplied
        (plain("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
        (plain("YCbCr", (128, 128, 128)), (128, 128, 128)),
        (plain("HSV", (0, 255, 255)), (255, 0, 0)),
        (plain("I", 200), (200, 200, 200)),
        (plain("I", 65535), (255, 255, 255)),
        (plain("F", 200.4), (200, 200, 200)),
        (plain("F", 0.5), (128, 128, 128)),
        (plain("F", 32768.0), (128, 128, 128)),
        (plain("I;16", 32768), (128, 128, 128)),
        (plain("I;16B", 32768), (128, 128, 128)),
        (plain("I;16", 200), (1, 1, 1)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_rgb(
    processor: AdaptFaceImageProcessor, image: Image.Image, expected: tuple[int, ...]
) -> None:
    assert pixel(processor, image) == expected
    assert processor(image).pixel_values.isfinite().all()


def test_lab_becomes_the_colour_it_stands_for(processor: AdaptFaceImageProcessor) -> None:
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(plain("RGB", (200, 120, 40)), transform)
    assert lab.mode == "LAB"
    np.testing.assert_allclose(pixel(processor, lab), (200, 120, 40), atol=3)


def test_transparent_palette_entries_become_black(processor: AdaptFaceImageProcessor) -> None:
    palette = plain("P", 1)
    palette.putpalette([0, 0, 0, 250, 150, 50])
    assert pixel(processor, encoded(palette)) == (250, 150, 50)
    assert pixel(processor, encoded(palette, transparency=1)) == (0, 0, 0)
    assert pixel(processor, encoded(palette, transparency=0)) == (250, 150, 50)
    palette_alpha = Image.open(io.BytesIO(encoded(palette, transparency=1)))
    assert pixel(processor, palette_alpha.convert("PA")) == (0, 0, 0)
    assert pixel(processor, encoded(plain("RGB", (1, 2, 3)), transparency=(1, 2, 3))) == (0, 0, 0)


def test_sixteen_bit_png_is_scaled_not_clipped(processor: AdaptFaceImageProcessor) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    loaded = np.asarray(processor.load(encoded(Image.fromarray(ramp))))[:, :, 0]
    np.testing.assert_allclose(loaded, ramp / 65535 * 255, atol=0.51)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(processor: AdaptFaceImageProcessor, orientation: int) -> None:
    upright = picture(112, 80)
    # What a camera stores so that the viewer's instruction of EXIF 2.32, table 6, brings `upright` back.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](np.asarray(upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    once = processor.load(data)
    assert np.array_equal(np.asarray(once), np.asarray(upright))
    assert np.array_equal(np.asarray(processor.load(once)), np.asarray(upright))
    landmarks = ARCFACE_TEMPLATE * 0.6 + 5  # in the upright picture
    assert np.array_equal(np.asarray(processor.align(data, landmarks)), np.asarray(processor.align(upright, landmarks)))


# --- alignment ----------------------------------------------------------------------------------------------------


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Umeyama 1991, eq. 40-43, by singular values -> (2, 3) matrix from source to target."""
    covariance = (target - target.mean(0)).T @ (source - source.mean(0)) / len(source)
    u, d, vt = np.linalg.svd(covariance)
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ np.diag(sign) @ vt
    scale = (d * sign).sum() / ((source - source.mean(0)) ** 2).sum(1).mean()
    return np.column_stack([scale * rotation, target.mean(0) - scale * rotation @ source.mean(0)])


def similar(points: np.ndarray, scale: float, degrees: float, shift: tuple[float, float]) -> np.ndarray:
    c, s = scale * np.cos(np.radians(degrees)), scale * np.sin(np.radians(degrees))
    return points @ np.array([[c, s], [-s, c]]) + shift


@pytest.mark.parametrize(("scale", "degrees"), [(1.0, 0), (1.3, 25), (0.6, -40), (1.5, 180), (1.9, 90)])
def test_align_puts_each_pixel_where_umeyama_says(
    processor: AdaptFaceImageProcessor, scale: float, degrees: float
) -> None:
    # Red counts the column and green the row, so a crop's colour says where in the photo it came from.
    side = 250
    photo = np.zeros((side, side, 3), np.uint8)
    photo[:, :, 0], photo[:, :, 1] = np.arange(side), np.arange(side)[:, None]
    jitter = np.random.default_rng(0).normal(0, 2, (5, 2))
    landmarks = similar(ARCFACE_TEMPLATE + jitter - 56, scale, degrees, (125, 120))
    crop = processor.align(photo, landmarks)
    assert crop.size == (112, 112) and crop.mode == "RGB"
    forward = umeyama(landmarks, ARCFACE_TEMPLATE)
    ys, xs = np.mgrid[0:112, 0:112]
    where = np.linalg.solve(forward[:, :2], np.stack([xs.ravel(), ys.ravel()]) - forward[:, 2:]).T  # (112*112, 2)
    inside = ((where > 2) & (where < side - 3)).all(axis=1)
    assert inside.sum() > 5000
    np.testing.assert_allclose(np.asarray(crop)[:, :, :2].reshape(-1, 2)[inside], where[inside], atol=0.51)


def test_align_of_an_aligned_crop_is_the_crop(processor: AdaptFaceImageProcessor) -> None:
    image = picture()
    assert np.array_equal(np.asarray(processor.align(image, ARCFACE_TEMPLATE)), np.asarray(image))
    assert torch.equal(processor(image, ARCFACE_TEMPLATE).pixel_values, processor(image).pixel_values)


def test_align_of_a_large_face_averages_instead_of_sampling(processor: AdaptFaceImageProcessor) -> None:
    """A checkerboard of single pixels is grey from afar; a picture enlarged nine times comes back."""
    checks = (np.indices((1008, 1008)).sum(0) % 2 * 255).astype(np.uint8)
    landmarks = ARCFACE_TEMPLATE * 9 + 4  # each on the middle pixel of a block of nine
    grey = np.asarray(processor.align(checks, landmarks)).astype(int)
    assert abs(grey - 127.5).max() < 3
    small = np.asarray(picture())
    large = Image.fromarray(small.repeat(9, axis=0).repeat(9, axis=1))
    assert abs(np.asarray(processor.align(large, landmarks)).astype(int) - small).mean() < 1
    offset = processor.align(large.crop((3, 7, 1005, 1003)), landmarks - (3, 7))  # no multiple of nine
    assert abs(np.asarray(offset).astype(int) - small)[2:-2, 2:-2].mean() < 1


def test_outside_of_the_photo_is_black(processor: AdaptFaceImageProcessor) -> None:
    crop = np.asarray(processor.align(Image.new("RGB", (112, 112), "white"), ARCFACE_TEMPLATE - (40, 0)))
    assert (crop[:, :39] == 0).all() and (crop[:, 41:] == 255).all()


def test_any_container_of_landmarks_will_do(processor: AdaptFaceImageProcessor) -> None:
    image, points = picture(), ARCFACE_TEMPLATE + 1
    expected = processor(image, points).pixel_values
    for landmarks in (points.tolist(), torch.tensor(points), points[None], [points.tolist()]):
        assert torch.equal(processor(image, landmarks).pixel_values, expected)


def test_a_profile_view_is_not_taken_for_a_mirrored_face(processor: AdaptFaceImageProcessor) -> None:
    profile = ARCFACE_TEMPLATE.copy()
    profile[:, 0] = [52, 50, 30, 51, 50]  # the eyes have even changed sides a little
    assert processor.align(picture(), profile).size == (112, 112)


def test_of_all_orders_of_the_points_only_turned_faces_pass(processor: AdaptFaceImageProcessor) -> None:
    """The fit may turn a face, so three orders look like the face on its side or upside down; 116 must not pass."""
    passed = []
    for order in itertools.permutations(range(5)):
        try:
            processor.align(picture(), ARCFACE_TEMPLATE[list(order)])
            passed.append(order)
        except ValueError:
            pass
    assert passed == [(0, 1, 2, 3, 4), (1, 4, 2, 0, 3), (3, 0, 2, 4, 1), (4, 3, 2, 1, 0)]


@pytest.mark.parametrize("nose", [10, 25])
@pytest.mark.parametrize("pitch", [-20, 0, 20])
@pytest.mark.parametrize("yaw", [-90, -60, 0, 45, 75])
def test_turned_heads_are_aligned(processor: AdaptFaceImageProcessor, yaw: int, pitch: int, nose: int) -> None:
    """Five points of a head in space, `nose` px before the eyes, turned and projected."""
    centre = ARCFACE_TEMPLATE.mean(0)
    head = np.column_stack([ARCFACE_TEMPLATE - centre, [0, 0, nose, 4, 4]])
    y, p = np.radians(yaw), np.radians(pitch)
    turn = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    nod = np.array([[1, 0, 0], [0, np.cos(p), -np.sin(p)], [0, np.sin(p), np.cos(p)]])
    points = (head @ turn.T @ nod.T)[:, :2] + centre
    assert processor.align(picture(), points).size == (112, 112)


# --- wrong input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b"<!DOCTYPE html><html></html>", ["web page"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ["LFS pointer", "git lfs pull"]),
        (b"\0" * 5000, ["not a readable image", "JPEG"]),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", ["not a readable image"]),
        (encoded(picture())[:2000], ["damaged or incomplete"]),
        (encoded(picture(), "JPEG")[:900], ["damaged or incomplete"]),
        (encoded(picture(15, 112)), ["15 x 112 px is too small", "16 px"]),
        (encoded(picture(112, 64)), ["112 x 64 px is no square", "landmarks"]),
        (encoded(Image.new("1", (20_000, 20_000))), ["over 80,000,000 pixels", "scale it down"]),
        (encoded(Image.new("1", (10_000, 9_000))), ["10000 x 9000 px", "80,000,000 pixels", "scale it down"]),
    ],
    ids=["empty", "html", "lfs", "zeros", "eps", "png-cut", "jpeg-cut", "small", "oblong", "bomb", "huge"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_refused_by_name(
    processor: AdaptFaceImageProcessor, tmp_path: Path, content: bytes, words: list[str]
) -> None:
    path = tmp_path / "face.jpg"
    path.write_bytes(content)
    for image, name in ((path, str(path)), (content, "bytes image")):
        message = error_of(processor, [picture(), image])
        assert all(word in message for word in ["images[1]", name, *words]), message
        assert ("object at" not in message and "known formats" not in message) or "not a readable image;" in message


def test_other_things_are_refused(processor: AdaptFaceImageProcessor, tmp_path: Path) -> None:
    array = np.asarray(picture())
    cases: list[tuple[object, str]] = [
        (tmp_path / "nowhere.png", "no such file"),
        (tmp_path, "no such file"),
        (None, "got NoneType"),
        (torch.zeros(3, 112, 112), "got Tensor"),
        ([[picture()]], "got list"),
        ([], "images is empty"),
        (array.astype(np.float32) / 255, "must be uint8 with values 0 .. 255, got float32"),
        (np.full((112, 112, 3), np.nan), "must be uint8"),
        (array.astype(np.int64), "got int64"),
        (array.astype(object), "got object"),
        (array.transpose(2, 0, 1), "channels first"),
        (array[:, :, :2], "array must have shape"),
        (array[0, 0], "array must have shape"),
        (np.zeros((0, 0, 3), np.uint8), "array must have shape"),
        (array[:5, :5], "too small"),
        (Image.fromarray(np.full((32, 32), np.nan, np.float32)), "mode F holds values nan"),
        (Image.fromarray(np.full((32, 32), -5, np.int32)), "mode I holds values -5"),
    ]
    for image, words in cases:
        assert words in error_of(processor, image), words


@pytest.mark.parametrize(
    ("landmarks", "words"),
    [
        (np.zeros((4, 2)), "must have shape (5, 2), five points (x, y); got (4, 2)"),
        (np.zeros((5, 3)), "must have shape (5, 2)"),
        ([["a", "b"]] * 5, "not numbers"),
        (ARCFACE_TEMPLATE * [[np.nan]] * 1.0, "NaN or infinity"),
        (np.full((5, 2), 50.0), "within about two pixels"),
        (ARCFACE_TEMPLATE / 112, "not 0 .. 1"),
        (ARCFACE_TEMPLATE + 200, "lies outside the 112 x 112 px image"),
        (ARCFACE_TEMPLATE * [-1, 1] + [112, 0], "mirrored"),
        (ARCFACE_TEMPLATE[[1, 0, 2, 4, 3]], "mirrored"),
        ([(56, 56), (56, 56), (100, 20), (56, 56), (56, 56)], "do not form a face"),
    ],
)
def test_bad_landmarks_are_refused(processor: AdaptFaceImageProcessor, landmarks: object, words: str) -> None:
    message = error_of(processor, picture(), landmarks)
    assert words in message and "Image image" in message
    message = error_of(processor, [picture()] * 2, [ARCFACE_TEMPLATE, landmarks])
    assert words in message and "images[1]" in message


def test_landmarks_must_match_the_images(processor: AdaptFaceImageProcessor) -> None:
    assert "3 in all; got 2" in error_of(processor, [picture()] * 3, np.stack([ARCFACE_TEMPLATE] * 2))
    assert "2 in all" in error_of(processor, [picture()] * 2, 7)
    assert "2 in all; got 5" in error_of(processor, [picture()] * 2, ARCFACE_TEMPLATE)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"size": {"height": 112, "width": 96}},
        {"size": {"shortest_edge": 224}},
        {"size": "224"},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0.5, 0.0]},
        {"rescale_factor": 0.0},
        {"do_normalize": False},
        {"do_resize": False},
        {"resample": 99},
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"size|image_mean|image_std|rescale_factor|do_|99"):
        AdaptFaceImageProcessor(**settings)


# --- loading ------------------------------------------------------------------------------------------------------


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    processor = AdaptFaceImageProcessor(size=112, image_mean=(0.1, 0.2, 0.3), resample=Image.Resampling.LANCZOS)
    processor.save_pretrained(tmp_path)
    restored = AdaptFaceImageProcessor.from_pretrained(tmp_path)
    assert restored.to_dict() == processor.to_dict()
    assert torch.equal(restored(picture()).pixel_values, processor(picture()).pixel_values)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert saved["size"] == {"height": 112, "width": 112}
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_adaptface.AdaptFaceImageProcessor"}
    assert (tmp_path / "image_processing_adaptface.py").is_file()


CLEAN_PROCESS = """
import sys, warnings
warnings.simplefilter("error", UserWarning)
from PIL import Image
from transformers import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
values = processor(Image.new("RGB", (112, 112), (255, 0, 0)), return_tensors="pt")["pixel_values"]
print(type(processor).__name__, tuple(values.shape), round(values[0, 0].mean().item(), 4))
processor.save_pretrained(sys.argv[2])
"""


@pytest.mark.slow
def test_auto_image_processor_loads_it_in_a_clean_process_without_a_word(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    AdaptFaceImageProcessor(size=56).save_pretrained(first)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", CLEAN_PROCESS, str(first), str(second)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.split("\n")[0] == "AdaptFaceImageProcessor (1, 3, 56, 56) 2.2489"
    for name in ("preprocessor_config.json", "image_processing_adaptface.py"):
        assert (second / name).read_bytes() == (first / name).read_bytes()


@pytest.mark.real_faces
def test_real_photos_load_and_aligned_crops_pass(processor: AdaptFaceImageProcessor, real_faces: Path) -> None:
    photos = sorted((real_faces / "raw_photos").iterdir())
    assert all(processor.load(photo).mode == "RGB" for photo in photos[:10])
    crops = sorted((real_faces / "faces_train" / "id_0000").iterdir())
    assert processor(crops[:4]).pixel_values.shape == (4, 3, 224, 224)
