"""Faces in photos: where they are, in whichever size and turn; the detector's file and what can be wrong with it.

Most tests put a stand-in in the place of YuNet's network: it finds a drawn face by its colours, as OpenCV hands them.
"""

import hashlib
import io
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from adaptface import detection
from adaptface.detection import Face, FaceDetector, choose, detector_file
from image_processing_adaptface import ARCFACE_TEMPLATE, AdaptFaceImageProcessor
from tests.hub_server import HubServer, Repository

SKIN = (200, 120, 80)
DOTS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))  # eyes, nose, corners of the mouth
TEMPLATE = ARCFACE_TEMPLATE / 112


def draw(size: tuple[int, int], left: int, top: int, side: int) -> tuple[Image.Image, np.ndarray]:
    """A face of so many pixels a side at a place in a grey photo; its five points (5, 2)."""
    photo = Image.new("RGB", size, (90, 90, 90))
    pen = ImageDraw.Draw(photo)
    pen.rectangle((left, top, left + side - 1, top + side - 1), fill=SKIN)
    points = TEMPLATE * side + (left, top)
    radius = side * 0.07
    for (x, y), colour in zip(points, DOTS, strict=True):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return photo, points


class DrawnFaces:
    """Finds the drawn face, in pixels of the image it gets; of a turned one it takes the mouth for the eyes."""

    def __init__(self) -> None:
        self.size = (0, 0)

    def setInputSize(self, size: tuple[int, int]) -> None:
        self.size = size

    def detect(self, bgr: np.ndarray) -> tuple[int, np.ndarray | None]:
        assert bgr.shape == (self.size[1], self.size[0], 3) and bgr.flags.c_contiguous
        colours = bgr[:, :, ::-1].astype(int)

        def near(colour: tuple[int, ...]) -> np.ndarray:
            return np.argwhere(np.abs(colours - colour).max(axis=2) < 60)[:, ::-1]  # (x, y)

        places = [near(colour) for colour in DOTS]
        if not all(len(place) for place in places):
            return 0, None
        points = np.array([place.mean(axis=0) for place in places])
        whole = np.concatenate([near(SKIN), *places])
        low, high = whole.min(axis=0), whole.max(axis=0) + 1
        upright = points[:2, 1].mean() < points[3:, 1].mean() and points[0, 0] < points[1, 0]
        if not upright:
            points = points[[4, 3, 2, 1, 0]]
        row = [*low, *(high - low), *points.ravel(), 0.95 if upright else 0.87]
        return 1, np.array([row], dtype=np.float32)


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FaceDetector:
    monkeypatch.setattr(FaceDetector, "_create", lambda self: DrawnFaces())
    (tmp_path / "model.onnx").write_bytes(b"stand-in")
    return FaceDetector(tmp_path / "model.onnx")


@pytest.fixture(scope="session")
def yunet(real_faces: Path) -> FaceDetector:
    """The real thing."""
    return FaceDetector(real_faces.parent / "models" / detection.FILE)


# --- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "left", "top", "side"),
    [
        ((112, 112), 4, 6, 100),  # enlarged
        ((333, 250), 101, 52, 120),
        ((900, 1400), 300, 700, 260),
        ((2600, 1900), 1500, 200, 180),  # seen in the largest size alone
        ((1500, 1100), 120, 30, 1000),  # in the smaller ones alone
    ],
)
def test_places_are_pixels_of_the_photo(detector: FaceDetector, size: tuple[int, int], left: int, top: int, side: int):
    photo, points = draw(size, left, top, side)
    (face,) = detector.detect(photo)
    near = max(1.2, max(size) / 320)  # about a pixel of the size it was seen in, at worst
    np.testing.assert_allclose(face.landmarks, points, atol=near)
    np.testing.assert_allclose(face.box, (left, top, side, side), atol=2 * near)
    assert face.score == pytest.approx(0.95) and face.roll == pytest.approx(0, abs=3)


def test_one_face_seen_in_several_sizes_is_one(detector: FaceDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(DrawnFaces, "setInputSize", lambda self, size: (seen.append(size), setattr(self, "size", size)))
    photo, _ = draw((1600, 1200), 500, 300, 400)
    assert len(detector.detect(photo)) == 1
    assert seen == [(1280, 960), (640, 480), (320, 240)]  # once each: nothing is looked at turned


def test_the_size_with_the_steadiest_landmarks_counts(detector: FaceDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    """A face is about 180 pixels wide there; which size a detection comes from its score tells here."""
    find = DrawnFaces.detect

    def scored(self: DrawnFaces, bgr: np.ndarray) -> tuple[int, np.ndarray | None]:
        count, rows = find(self, bgr)
        if rows is not None:
            rows[:, 14] = 0.92 + self.size[0] / 1e5
        return count, rows

    monkeypatch.setattr(DrawnFaces, "detect", scored)
    for side, width in ((1000, 320), (375, 640), (200, 1280)):  # 200, 150 and 160 pixels in that size
        (face,) = detector.detect(draw((1600, 1200), 60, 60, side)[0])
        assert face.score == pytest.approx(0.92 + width / 1e5, abs=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_are_followed(detector: FaceDetector, orientation: int) -> None:
    photo, _ = draw((400, 300), 50, 60, 150)
    undone = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what brings the upright photo into each orientation
    stored = photo if orientation == 1 else photo.transpose(Image.Transpose(undone[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", exif=exif)
    expected, found = detector.detect(photo)[0], detector.detect(buffer.getvalue())[0]
    assert found.box == expected.box
    np.testing.assert_array_equal(found.landmarks, expected.landmarks)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_photo_on_its_side_gives_the_upright_crop(detector: FaceDetector, quarters: int) -> None:
    photo, _ = draw((400, 300), 50, 60, 150)
    turned = Image.fromarray(np.rot90(np.asarray(photo), quarters))
    upright, face = detector.detect(photo)[0], detector.detect(turned)[0]
    # Where each point went: look it up in coordinates that are turned in the same way.
    x, y = (np.rot90(axis, quarters) for axis in np.meshgrid(np.arange(400), np.arange(300)))
    rows, columns = face.landmarks[:, 1].round().astype(int), face.landmarks[:, 0].round().astype(int)
    np.testing.assert_allclose(x[rows, columns], upright.landmarks[:, 0], atol=1)
    np.testing.assert_allclose(y[rows, columns], upright.landmarks[:, 1], atol=1)
    assert abs(face.roll) == pytest.approx((90, 180, 90)[quarters - 1], abs=2)
    left, top, width, height = (round(value) for value in face.box)
    inside = np.asarray(turned)[top + 2 : top + height - 2, left + 2 : left + width - 2]
    assert np.abs(inside.astype(int) - (90, 90, 90)).max(axis=2).min() > 20  # no background within the box
    processor = AdaptFaceImageProcessor()
    crops = [np.asarray(processor.align(image, points.landmarks), float) for image, points in
             ((photo, upright), (turned, face))]  # fmt: skip
    assert np.abs(crops[0] - crops[1]).mean() < 1


def test_a_photo_without_a_face_gives_none(detector: FaceDetector) -> None:
    assert detector.detect(Image.new("RGB", (300, 200))) == []
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg: no such file"):
        detector.detect("nowhere.jpg")


def test_choices() -> None:
    def face(left: float, side: float) -> Face:
        return Face((left, 40, side, side), np.zeros((5, 2)), 0.9)

    large, central, small = face(0, 60), face(80, 40), face(180, 20)
    faces = [large, central, small]
    assert choose(faces, "largest", (200, 100)) == [large]
    assert choose(faces, "central", (200, 100)) == [central]
    assert choose(faces, "all", (200, 100)) == faces
    assert choose([], "central", (200, 100)) == []
    with pytest.raises(ValueError, match="'largest', 'central' or 'all'"):
        choose(faces, "smallest", (200, 100))  # type: ignore[arg-type]


def test_threads_do_not_share_a_network(detector: FaceDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    busy: set[int] = set()
    together = threading.Barrier(4, timeout=10)
    find = DrawnFaces.detect

    def alone(self: DrawnFaces, bgr: np.ndarray):
        assert id(self) not in busy
        busy.add(id(self))
        together.wait()
        found = find(self, bgr)
        busy.remove(id(self))
        return found

    monkeypatch.setattr(DrawnFaces, "detect", alone)
    photo, _ = draw((300, 200), 50, 40, 100)
    with ThreadPoolExecutor(4) as pool:
        assert [len(found) for found in pool.map(detector.detect, [photo] * 4)] == [1] * 4


# --- the detector's file --------------------------------------------------------------------------------------------


def test_a_path_comes_before_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setenv(detection.VARIABLE, str(tmp_path / "b"))
    assert detector_file() == tmp_path / "b"
    assert detector_file(tmp_path / "a") == tmp_path / "a"
    monkeypatch.setenv(detection.VARIABLE, str(tmp_path / "c"))
    with pytest.raises(FileNotFoundError, match=f"named by {detection.VARIABLE}"):
        detector_file()
    with pytest.raises(FileNotFoundError, match="no face detector at"):
        detector_file(tmp_path / "d")


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="not a YuNet face detector"):
        FaceDetector(tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"score_threshold=1\.5"):
        FaceDetector(tmp_path / "x.onnx", score_threshold=1.5)


def test_opencv_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"pip install 'adaptface\[faces\]'"):
        FaceDetector()


CLIENT = """
import hashlib, json, sys
from adaptface import detection
for detection.SHA256 in sys.argv[1:]:
    try:
        file = detection.detector_file()
        print(json.dumps(["found", hashlib.sha256(file.read_bytes()).hexdigest()]))
    except (OSError, ValueError) as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.mark.slow
def test_the_file_comes_from_the_hub_once_and_is_checked(tmp_path: Path) -> None:
    def client(hub: HubServer, home: str, *digests: str, offline: bool = False) -> list[list[str]]:
        """What comes of looking for the file once for each digest."""
        env = hub.client_env(tmp_path / home, offline=offline)
        env.pop(detection.VARIABLE, None)
        root = Path(__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, *digests], cwd=root, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    content = b"the pinned file"
    digest = hashlib.sha256(content).hexdigest()
    with HubServer() as hub:
        pinned = Repository(branches={"main": detection.REVISION})
        pinned.commits[detection.REVISION] = {detection.FILE: content}
        pinned.parents[detection.REVISION] = None
        hub.repositories[detection.REPOSITORY] = pinned
        found, again, (kind, message) = client(hub, "a", digest, digest, "0" * 64)
        assert found == again == ["found", digest]
        asked = [request for request in hub.requests if f"/{detection.FILE}" in request.path]
        assert all(f"/resolve/{detection.REVISION}/" in request.path for request in asked)
        assert [request.method for request in asked].count("GET") == 1 and len(asked) <= 2  # then from the cache
        assert kind == "ValueError" and digest in message and "fetch it again" in message
        ((kind, message),) = client(hub, "b", digest, offline=True)
        assert kind == "OSError" and detection.VARIABLE in message and detection.REPOSITORY in message
        del hub.repositories[detection.REPOSITORY]
        ((kind, message),) = client(hub, "c", digest)
        assert kind == "OSError" and "cannot be fetched" in message
        assert not hub.unknown, hub.unknown


# --- real photos ----------------------------------------------------------------------------------------------------


@pytest.mark.real_faces
def test_the_pinned_digest_is_that_of_the_file(yunet: FaceDetector) -> None:
    assert detection.sha256(yunet.file) == detection.SHA256


@pytest.mark.slow
@pytest.mark.real_faces
def test_real_photos_give_upright_aligned_faces(yunet: FaceDetector, real_faces: Path) -> None:
    """All of them, also in grey, and each fourth turned; `align` refuses points that are mirrored or form no face."""
    processor = AdaptFaceImageProcessor()
    photos = sorted((real_faces / "raw_photos").iterdir())
    assert len(photos) == 40
    for number, photo in enumerate(photos):
        image = processor.load(photo)
        face = yunet.detect(image)[0]
        processor.align(photo, face.landmarks)
        assert face.score > 0.85 and abs(face.roll) < 30
        image.thumbnail((1000, 1000))
        assert yunet.detect(image.convert("L"))
        if number % 4:
            continue
        crop = np.asarray(processor.align(image, yunet.detect(image)[0].landmarks), float)
        for quarters in (1, 2, 3):
            turned = Image.fromarray(np.rot90(np.asarray(image), quarters))
            again = np.asarray(processor.align(turned, yunet.detect(turned)[0].landmarks), float)
            assert np.abs(crop - again).mean() < 5, photo.name  # upside down it would be about 60


@pytest.mark.slow
@pytest.mark.real_faces
def test_crops_are_photos_too(yunet: FaceDetector, real_faces: Path) -> None:
    crops = sorted((real_faces / "faces_dev").iterdir())[::100]
    for crop in crops:
        face = yunet.detect(crop)[0]
        assert np.abs(face.landmarks.mean(axis=0) - ARCFACE_TEMPLATE.mean(axis=0)).max() < 12
        assert abs(face.roll) < 25
    assert FaceDetector(yunet.file, score_threshold=0.99).detect(crops[0]) == []
