"""Embedding and comparing faces from photos and crops."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from adaptface.detection import FILE, Face, FaceDetector, NoFaceError
from adaptface.embedders import ModelEmbedder
from adaptface.embedding import embed_images
from adaptface.faces import FaceEmbedder
from benchmarks import embed_faces
from image_processing_adaptface import ARCFACE_TEMPLATE, AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel

THRESHOLDS = {
    "benchmark": "dev",
    "pairs": 4000,
    "embedding": "flip",
    "operating_points": [{"far": 0.01, "threshold": 0.3, "tar": 0.9}, {"far": 0.001, "threshold": 0.4, "tar": 0.8}],
    "calibration": {"slope": 9.0, "intercept": -3.0},
}


def crop(seed: int, side: int = 112) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((400, 400), Image.Resampling.BICUBIC)


def face(scale: float = 1.0, shift: tuple[float, float] = (0.0, 0.0), score: float = 0.94) -> Face:
    side = 112 * scale
    return Face((*shift, side, side), ARCFACE_TEMPLATE * scale + shift, score)


class Scripted:
    """A detector that finds the given faces in every photo, and none in a black one."""

    def __init__(self, *faces: Face) -> None:
        self.faces = list(faces)

    def detect(self, photo: Image.Image, name: str | None = None) -> list[Face]:
        return self.faces if photo.getextrema() != ((0, 0),) * 3 else []


@pytest.fixture
def embedder(tiny_model: AdaptFaceModel) -> FaceEmbedder:
    model = ModelEmbedder(tiny_model, AdaptFaceImageProcessor(size=56))
    return FaceEmbedder(model, Scripted(face()))  # type: ignore[arg-type]


# --- embeddings -----------------------------------------------------------------------------------------------------


def test_crops_are_embedded_as_in_an_evaluation(embedder: FaceEmbedder, tiny_model: AdaptFaceModel) -> None:
    crops = [crop(seed) for seed in range(5)]
    found = embedder.embed(crops, batch_size=2, aligned=True)
    np.testing.assert_array_equal(
        found.embeddings, embed_images(embedder.embedder, crops, batch_size=2, progress=False)
    )
    with torch.no_grad():
        pixel_values = embedder.processor(crops).pixel_values
        output = tiny_model(pixel_values)
        both = output.features + tiny_model(pixel_values.flip(-1)).features
    np.testing.assert_allclose(found.embeddings, both / both.norm(dim=1, keepdim=True), atol=1e-5)
    np.testing.assert_allclose(found.quality, output.features.square().sum(1).sqrt(), rtol=1e-5)
    np.testing.assert_allclose(found.domain_weights, output.domain_weights, atol=1e-6)
    plain = embedder.embed(crops, aligned=True, flip=False)
    np.testing.assert_allclose(plain.embeddings, output.pooler_output, atol=1e-5)
    np.testing.assert_array_equal(found.images, range(5))
    assert found.faces == (None,) * 5 and found.errors == {} and len(found) == 5


def test_photos_are_aligned_first(embedder: FaceEmbedder) -> None:
    photo = picture(1)
    there = face(2.0, (60, 70))
    embedder._detector = Scripted(there)  # type: ignore[assignment]
    found = embedder.embed(photo)
    assert found.embeddings.shape == (1, 16) and found.faces == (there,)  # one image: a list of one
    aligned = embedder.processor.align(photo, there.landmarks)
    np.testing.assert_array_equal(found.embeddings, embedder.embed(aligned, aligned=True).embeddings)


def test_all_faces_of_a_photo_get_a_row_each(embedder: FaceEmbedder) -> None:
    faces = [face(2.0, (10, 10)), face(1.0, (250, 20)), face(0.8, (155, 160))]
    embedder._detector = Scripted(*faces)  # type: ignore[assignment]
    photos = [picture(1), picture(2)]
    every = embedder.embed(photos, faces="all", batch_size=4)
    assert every.images.tolist() == [0, 0, 0, 1, 1, 1] and every.faces == (*faces, *faces)
    largest, central = embedder.embed(photos), embedder.embed(photos, faces="central")
    np.testing.assert_allclose(largest.embeddings, every.embeddings[[0, 3]], atol=1e-6)
    np.testing.assert_allclose(central.embeddings, every.embeddings[[2, 5]], atol=1e-6)
    assert every.warnings == ((),) * 6
    assert [len(batch) for batch in embedder.embed_batches(photos, batch_size=4, faces="all")] == [4, 2]
    assert largest.warnings[0] == ("3 faces were found; the largest one was taken",)
    assert embedder.detect(photos[0]) == faces and embedder.detect(photos[0], "largest") == faces[:1]


def test_inputs_of_every_kind_give_the_same(embedder: FaceEmbedder, tmp_path: Path) -> None:
    photo = crop(3)
    photo.save(tmp_path / "a.png")
    kinds = [photo, np.asarray(photo), tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()]
    found = embedder.embed(kinds)
    assert (found.embeddings == found.embeddings[0]).all()
    stacked = embedder.embed(np.stack([np.asarray(photo)] * 2))
    np.testing.assert_allclose(stacked.embeddings, found.embeddings[:2], atol=1e-6)


@pytest.mark.slow
def test_the_benchmark_measures(tiny_model: AdaptFaceModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    AdaptFaceImageProcessor(size=56).save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--device", "cpu", "--images", "8", "--rounds", "1"]
    found = embed_faces.main([*words, "--output", str(tmp_path / "out.json")])
    said = capsys.readouterr().out
    for part in ("model", "crops"):
        assert list(found[part]) == [1, 8, 32, 64] and min(found[part].values()) > 0
        assert f"{found[part][8]:.1f} images/s  {found[part][8] / found[part][1]:.2f} x batch 1" in said
    assert json.loads((tmp_path / "out.json").read_text())["crops"]["64"] == found["crops"][64]


def test_loading_takes_engine_and_precision(
    tiny_model: AdaptFaceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("adaptface.faces.load_engine", lambda model, name: asked.append((model.dtype, name)))
    tiny_model.save_pretrained(tmp_path)
    AdaptFaceImageProcessor(size=56).save_pretrained(tmp_path)
    made = FaceEmbedder.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16, engine="onnx")
    assert asked == [(torch.bfloat16, "onnx")] and made.engine == "onnx"


def test_any_engine_can_compute(embedder: FaceEmbedder) -> None:
    calls = []

    def engine(pixel_values: torch.Tensor) -> tuple[torch.Tensor, None]:
        calls.append((tuple(pixel_values.shape), pixel_values.dtype, pixel_values.device.type))
        return pixel_values.mean(dim=(2, 3)) + torch.tensor([3.0, 0, 0]), None

    found = FaceEmbedder(embedder.embedder, engine=engine).embed([crop(1), crop(2), crop(3)], 2, aligned=True)
    assert found.embeddings.shape == (3, 3) and found.domain_weights is None and found[0].domain_mix is None
    one, two = ((2, 3, 56, 56), torch.float32, "cpu"), ((1, 3, 56, 56), torch.float32, "cpu")
    assert calls == [one, one, two, two]
    calls.clear()
    many = [crop(seed) for seed in range(19)]
    found = FaceEmbedder(embedder.embedder, engine=engine).embed(many, 17, aligned=True)
    assert [shape[0] for shape, *_ in calls] == [8, 8, 1] * 2 + [2, 2]  # a CPU's caches hold no more
    for row in (0, 9, 16, 18):
        alone = FaceEmbedder(embedder.embedder, engine=engine).embed(many[row], aligned=True)
        np.testing.assert_allclose(found.embeddings[row], alone.embeddings[0], atol=1e-6)


def test_batches_are_read_as_they_are_asked_for(embedder: FaceEmbedder) -> None:
    read = 0

    def images() -> Iterator[Image.Image]:
        nonlocal read
        for seed in range(1000):
            read += 1
            yield crop(seed % 7)

    batches = embedder.embed_batches(images(), batch_size=4, aligned=True, workers=2)
    assert read == 0
    first, second = next(batches), next(batches)
    assert first.images.tolist() == [0, 1, 2, 3] and second.images.tolist() == [4, 5, 6, 7]
    assert read <= 16
    batches.close()


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_images_that_cannot_be_used(embedder: FaceEmbedder, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    images = [crop(0), tmp_path / "broken.jpg", crop(1), Image.new("RGB", (300, 200)), "missing.jpg"]
    with pytest.raises(ValueError, match=r"broken\.jpg: not a readable image"):
        embedder.embed(images)
    with pytest.raises(NoFaceError, match=r"image 1: no face was found in 300 x 200 px.*aligned=True"):
        embedder.embed([images[0], images[3]])
    found = embedder.embed(images, on_error="skip")
    assert found.images.tolist() == [0, 2] and list(found.errors) == [1, 3, 4]
    assert "missing.jpg: no such file" in found.errors[4]
    batches = list(embedder.embed_batches(images, batch_size=1, on_error="skip"))
    assert [batch.images.tolist() for batch in batches if len(batch)] == [[0], [2]]
    assert {image for batch in batches for image in batch.errors} == {1, 3, 4}
    nothing = embedder.embed("missing.jpg", on_error="skip")
    assert nothing.embeddings.shape == (0, 16) and nothing.domain_weights is not None
    assert nothing.domain_weights.shape == (0, 3) and list(nothing.errors) == [0]
    with pytest.raises(TypeError, match="image 0"):
        embedder.embed([1.5], on_error="skip")  # type: ignore[list-item]
    with pytest.raises(ValueError, match="image 0: 300 x 200 px is no square"):
        embedder.embed(images[3], aligned=True)


def test_a_face_too_small_to_align_is_told(embedder: FaceEmbedder) -> None:
    embedder._detector = Scripted(face(0.05, (50, 50)))  # type: ignore[assignment]
    with pytest.raises(NoFaceError, match=r"image 0: a face was found.*6 x 6 px: the five landmarks lie within"):
        embedder.embed(crop(0))


def test_settings_are_checked(embedder: FaceEmbedder) -> None:
    for settings in ({"batch_size": 0}, {"faces": "both"}, {"on_error": "ignore"}, {"workers": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            embedder.embed(crop(0), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images is empty"):
        embedder.embed([])


def test_an_embedding_that_is_nan_is_an_error(embedder: FaceEmbedder) -> None:
    def engine(pixel_values: torch.Tensor) -> tuple[torch.Tensor, None]:
        features = torch.ones(len(pixel_values), 4)
        features[1] = math.nan
        return features, None

    broken = FaceEmbedder(embedder.embedder, engine=engine)
    with pytest.raises(ValueError, match="image 1 is zero, NaN or infinite"):
        broken.embed([crop(0), crop(1)], aligned=True)
    found = broken.embed([crop(0), crop(1), crop(2)], aligned=True, on_error="skip")
    assert found.images.tolist() == [0, 2] and list(found.errors) == [1] and len(found.warnings) == 2


# --- decisions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def deciding(embedder: FaceEmbedder) -> FaceEmbedder:
    embedder.config.thresholds = THRESHOLDS
    return embedder


def test_a_decision_follows_from_the_thresholds_of_the_model(deciding: FaceEmbedder) -> None:
    a, b = crop(1), crop(2)
    answer = deciding.verify(a, b)
    rows = deciding.embed([a, b]).embeddings
    assert answer.similarity == pytest.approx(float(rows[0] @ rows[1]), abs=1e-5)
    assert answer.threshold == 0.4 and answer.far == 0.001 and answer.same is (answer.similarity > 0.4)
    assert answer.source == {"benchmark": "dev", "pairs": 4000, "embedding": "flip", "tar": 0.8}
    assert answer.match_probability == pytest.approx(1 / (1 + math.exp(-(9 * answer.similarity - 3))))
    assert deciding.verify(a, b, far=0.01).threshold == 0.3
    with pytest.raises(ValueError, match=r"measured are 0\.01, 0\.001"):
        deciding.verify(a, b, far=0.1)
    assert deciding.verify(a, a).same is True and deciding.verify(a, a).similarity == pytest.approx(1)
    assert answer.first.face is not None and answer.first.face.score == 0.94
    assert answer.first.domain_mix is not None and sum(answer.first.domain_mix.values()) == pytest.approx(1)


def test_a_given_threshold_is_exceeded_strictly(deciding: FaceEmbedder) -> None:
    a, b = crop(1), crop(2)
    similarity = deciding.verify(a, b).similarity
    at, below = (deciding.verify(a, b, threshold=value) for value in (similarity, similarity - 1e-6))
    assert at.same is False and below.same is True
    assert at.far is None and at.source is None and at.match_probability is not None


def test_without_thresholds_nothing_is_decided(embedder: FaceEmbedder) -> None:
    answer = embedder.verify(crop(1), crop(2))
    assert answer.same is None and answer.threshold is None and answer.match_probability is None
    assert "--write_thresholds" in answer.warnings[-1]
    assert embedder.verify(crop(1), crop(2), threshold=-1.0).same is True
    for threshold in (math.nan, math.inf, -1.5):
        with pytest.raises(ValueError, match="give a cosine similarity"):
            embedder.verify(crop(1), crop(2), threshold=threshold)


def test_two_photos_of_groups_are_compared_by_the_faces_asked_for(embedder: FaceEmbedder) -> None:
    large, central = face(2.0, (10, 10)), face(0.8, (155, 160))
    embedder._detector = Scripted(large, central)  # type: ignore[assignment]
    answer = embedder.verify(picture(1), picture(2), threshold=0.5, faces="central")
    assert answer.first.face is answer.second.face is central
    assert embedder.verify(picture(1), picture(2), threshold=0.5).first.face is large


def test_errors_of_a_comparison_name_the_image(embedder: FaceEmbedder) -> None:
    with pytest.raises(NoFaceError, match=r"^the second image: no face"):
        embedder.verify(crop(1), Image.new("RGB", (50, 50)))
    with pytest.raises(ValueError, match="'largest' or 'central'"):
        embedder.verify(crop(1), crop(2), faces="all")  # type: ignore[arg-type]


def test_results_are_json(deciding: FaceEmbedder) -> None:
    answer = json.loads(json.dumps(deciding.verify(crop(1), crop(2)).to_dict()))
    assert answer["first"]["face"]["landmarks"][0] == pytest.approx(ARCFACE_TEMPLATE[0], abs=0.01)
    assert set(answer["second"]["domain_mix"]) == {"general", "pose", "age"} and "embedding" not in answer["first"]
    found = json.loads(json.dumps(deciding.embed([crop(1), "missing.jpg"], on_error="skip").to_dict()))
    assert len(found["faces"]) == 1 and len(found["faces"][0]["embedding"]) == 16 and "1" in found["errors"]


# --- warnings -------------------------------------------------------------------------------------------------------


def turned(face: Face, degrees: float) -> Face:
    angle = math.radians(degrees)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return Face(face.box, (face.landmarks - 56) @ rotation + 56, face.score)


def nose_off(share: float) -> Face:
    there = face()
    points = there.landmarks.copy()
    points[2, 0] = points[:2, 0].mean() + share * (points[1, 0] - points[0, 0])
    return Face(there.box, points, there.score)


@pytest.mark.parametrize(
    ("found", "warning"),
    [
        (face(0.33), "the face is small: 12 px between the eyes"),
        (face(score=0.75), "not sure that this is a face (score 0.75"),
        (nose_off(0.5), "the head is turned: the nose is 0.50"),
        (turned(face(), 40), "the head is tilted by 40°"),
        (turned(face(), -90), "the photo is not upright"),
    ],
)
def test_faces_are_warned_of(embedder: FaceEmbedder, found: Face, warning: str) -> None:
    embedder._detector = Scripted(found)  # type: ignore[assignment]
    assert any(warning in text for text in embedder.embed(crop(1)).warnings[0])
    embedder._detector = Scripted(face())  # type: ignore[assignment]
    assert embedder.embed(crop(1)).warnings == ((),)


@pytest.mark.parametrize(
    ("image", "warning"),
    [
        (crop(1).convert("L"), "the image is black-and-white"),
        (crop(1).point(lambda value: value // 10), "the face is dark"),
        (crop(1).point(lambda value: 255 - value // 10), "the face is overexposed"),
        (crop(1).filter(ImageFilter.GaussianBlur(6)), "the face is blurred"),
        (crop(1, 32), "the face is small: 10 px"),
    ],
)
def test_crops_are_warned_of(embedder: FaceEmbedder, image: Image.Image, warning: str) -> None:
    (texts,) = embedder.embed(image, aligned=True).warnings
    assert len(texts) == 1 and warning in texts[0]
    answer = embedder.verify(crop(1), image, threshold=0.5, aligned=True)
    assert [text.partition(":")[0] for text in answer.warnings] == ["second image"]


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_saved_model_is_loaded_by_its_folder(embedder: FaceEmbedder, tmp_path: Path) -> None:
    embedder.embedder.model.save_pretrained(tmp_path / "model")
    embedder.processor.save_pretrained(tmp_path / "model")
    loaded = FaceEmbedder.from_pretrained(tmp_path / "model", device="cpu", detector=tmp_path / "no.onnx")
    crops = [crop(1), crop(2)]
    np.testing.assert_allclose(
        loaded.embed(crops, aligned=True).embeddings, embedder.embed(crops, aligned=True).embeddings, atol=1e-6
    )
    with pytest.raises(FileNotFoundError, match=r"no face detector at .*no\.onnx"):
        loaded.embed(crops, on_error="skip")  # no fault of an image: not skipped
    with pytest.raises(FileNotFoundError, match="it has no config"):
        FaceEmbedder.from_pretrained(tmp_path)
    half = FaceEmbedder.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.bfloat16)
    found = half.embed(crops, aligned=True)
    assert found.embeddings.dtype == np.float32 and found.domain_weights is not None
    assert (found.embeddings * loaded.embed(crops, aligned=True).embeddings).sum(axis=1).min() > 0.98


@pytest.mark.slow
def test_the_package_gives_its_names_and_stays_light() -> None:
    code = """
import sys, adaptface
assert not {"torch", "transformers", "numpy", "cv2"} & set(sys.modules)
assert "FaceEmbedder" in dir(adaptface) and set(adaptface.__all__) <= set(dir(adaptface))
try:
    adaptface.Nothing
except AttributeError as error:
    assert "Nothing" in str(error)
else:
    raise SystemExit("no error")
for name in adaptface.__all__:
    getattr(adaptface, name)
from adaptface import FaceEmbedder
assert FaceEmbedder.__module__ == "adaptface.faces" and "cv2" not in sys.modules
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.real_faces
def test_real_photos_are_embedded_whatever_the_batch(embedder: FaceEmbedder, real_faces: Path) -> None:
    embedder._detector = FaceDetector(real_faces.parent / "models" / FILE)
    photos = sorted((real_faces / "raw_photos").iterdir())
    whole, single = embedder.embed(photos), embedder.embed(photos, batch_size=1, workers=1)
    assert len(whole) == 40 and whole.images.tolist() == list(range(40))
    np.testing.assert_allclose(whole.embeddings, single.embeddings, atol=1e-4)
    assert sum(bool(texts) for texts in whole.warnings) < 10
