"""Photo -> the faces in it, each with a box and five landmarks: YuNet, run by OpenCV.

    detector = FaceDetector()
    face = detector.detect("party.jpg")[0]                              # the largest one
    crop = processor.align("party.jpg", face.landmarks)                 # what the model takes

The detector's file is fetched from the Hub once, at a pinned commit, and compared with a pinned digest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError

from adaptface.data.domains import yaw_proxy
from adaptface.files import sha256
from image_processing_adaptface import AdaptFaceImageProcessor, ImageLike

# OpenCV Zoo's file of that name, unchanged; OpenCV's own repository on the Hub holds older exports only, which OpenCV 5
# refuses for photos of any size.
REPOSITORY = "pollen-robotics/face_detection_yunet_2026may"
REVISION = "2b8e922362946a0db67e861bae0f77826980effd"
FILE = "face_detection_yunet_2026may.onnx"
SHA256 = "ebafce4e3c118d6554634be5c27ab333b4c047a9a8c3faf1d7cf93101c22f0f0"
VARIABLE = "ADAPTFACE_DETECTOR"  # environment: path of the file

# The photo is looked at in these sizes (pixels of its longer side). YuNet knows faces of about 10 to 300 px: the first
# size finds those that fill the picture, the last one those that take a hundredth of it.
SIDES = (320, 640, 1280)
LARGEST = 320  # pixels: a wider face is left to a smaller size
BEST = 180  # pixels: faces about so wide get the steadiest landmarks
OVERLAP = 0.4  # intersection over union from which on two boxes are one face

# YuNet finds faces that are upside down or on their side, too, and takes the mouth for the eyes, but is a little less
# sure of them: of 40 photos and 500 crops the surest face scored 0.90 to 0.96; turned by quarters 0.93 at most, and
# never more than its upright self.
SURE = 0.92  # no face of a higher score is turned
MARGIN = 0.01  # by which a turned photo's surest face must be surer than the upright photo's

Choice = Literal["largest", "central", "all"]


class NoFaceError(ValueError):
    """A photo in which no face was found."""


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a photo.

    Args:
        box (`tuple[float, float, float, float]`): left, top, width and height in pixels of the upright photo; it may
            reach beyond the photo's edge.
        landmarks (`np.ndarray` of shape `(5, 2)`): pixels (x, y) of the upright photo, pixel centres at integers; left
            eye, right eye, nose, left and right corner of the mouth, left and right as seen in the image. What
            `AdaptFaceImageProcessor.align` takes.
        score (`float`): how sure the detector is, 0 to 1.
    """

    box: tuple[float, float, float, float]
    landmarks: np.ndarray
    score: float

    @property
    def area(self) -> float:
        """Of the box, square pixels."""
        return self.box[2] * self.box[3]

    @cached_property
    def eye_distance(self) -> float:
        """Pixels between the eyes."""
        return float(np.linalg.norm(self.landmarks[1] - self.landmarks[0]))

    @cached_property
    def turn(self) -> float:
        """How far the head is turned; see [`~data.domains.yaw_proxy`]."""
        return float(yaw_proxy(self.landmarks[:3].reshape(1, 6))[0])

    @cached_property
    def roll(self) -> float:
        """How far the head is tilted in the picture, in degrees from -180 to 180; clockwise is positive."""
        x, y = self.landmarks[1] - self.landmarks[0]
        return float(np.degrees(np.arctan2(y, x)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "box": [round(value, 2) for value in self.box],
            "landmarks": self.landmarks.round(2).tolist(),
            "score": round(self.score, 4),
        }


def choose(faces: Sequence[Face], which: Choice, size: tuple[int, int]) -> list[Face]:
    """One of the faces of a photo, or all of them.

    Args:
        faces: as `FaceDetector.detect` gives them, the largest first.
        which: `largest` by the area of the box, `central` by the distance of its centre from the photo's, or `all`.
        size: width and height of the photo.
    Raises:
        ValueError: `which` is something else.
    """
    if which == "all":
        return list(faces)
    if which == "largest":
        return list(faces[:1])
    if which == "central":

        def distance(face: Face) -> float:
            x, y, width, height = face.box
            return (x + width / 2 - size[0] / 2) ** 2 + (y + height / 2 - size[1] / 2) ** 2

        return sorted(faces, key=distance)[:1]
    raise ValueError(f"faces={which!r}: choose 'largest', 'central' or 'all'")


def detector_file(path: str | os.PathLike | None = None) -> Path:
    """The detector's file: the path given, that in the environment variable ADAPTFACE_DETECTOR, or the Hub's.

    The Hub's is fetched once and then found in the cache of huggingface_hub, also without a network.

    Raises:
        FileNotFoundError: there is no file at the path given.
        OSError: it is not in the cache and cannot be fetched.
        ValueError: the Hub's is another file than the pinned one.
    """
    given = path if path is not None else os.environ.get(VARIABLE)
    if given:
        file = Path(given).expanduser()
        if not file.is_file():
            by = "" if path is not None else f" (named by {VARIABLE})"
            raise FileNotFoundError(f"no face detector at {given}{by}; give the path of {FILE}")
        return file
    try:
        file = Path(hf_hub_download(REPOSITORY, FILE, revision=REVISION))
    except (OSError, HTTPError) as error:
        raise OSError(
            f"the face detector is not in the cache and cannot be fetched from {REPOSITORY} on the Hub "
            f"({str(error).splitlines()[0]}). Connect once; or bring {FILE} from elsewhere and give its path, "
            f"as detector or in {VARIABLE}; or pass aligned crops, which need no detector"
        ) from error
    if (found := sha256(file)) != SHA256:
        raise ValueError(
            f"{file}: not the pinned face detector: its SHA-256 is {found}, not {SHA256}. Delete it "
            f"({file.resolve()}) and fetch it again"
        )
    return file


class FaceDetector:
    """Finds the faces in photos. Several threads may use one at the same time.

    Args:
        model (`str` or path, *optional*): a YuNet file; see [`detector_file`] for where it comes from by default.
        score_threshold (`float`): detections of a lower score are no faces, in `(0, 1)`.
    Raises:
        ImportError: OpenCV is not installed.
        OSError: there is no such file, or it cannot be fetched.
        ValueError: the file is no YuNet, or not the pinned one; the threshold is out of range.
    Source: Wu, Peng & Yu, YuNet: a tiny millisecond-level face detector, Machine Intelligence Research 20, 2023;
        `cv2.FaceDetectorYN`.
    """

    def __init__(self, model: str | os.PathLike | None = None, score_threshold: float = 0.7) -> None:
        if not 0 < score_threshold < 1:
            raise ValueError(f"score_threshold={score_threshold!r}: give a number between 0 and 1")
        try:
            import cv2
        except ImportError as error:
            raise ImportError("finding faces needs OpenCV: pip install 'adaptface[faces]'") from error
        if not hasattr(cv2, "FaceDetectorYN"):
            raise ImportError(f"OpenCV {cv2.__version__} has no FaceDetectorYN: pip install -U 'adaptface[faces]'")
        self._cv2 = cv2
        self.file = detector_file(model)
        self.score_threshold = score_threshold
        self._processor = AdaptFaceImageProcessor()
        # A network of OpenCV serves one thread at a time: each takes one that is free, or makes a new one.
        self._free: list[Any] = []
        try:
            network = self._create()
            network.setInputSize((32, 32))
            network.detect(np.zeros((32, 32, 3), dtype=np.uint8))
        except cv2.error as error:
            raise ValueError(
                f"{self.file}: not a YuNet face detector that OpenCV {cv2.__version__} can read; use {FILE} "
                f"({str(error).strip().splitlines()[0]})"
            ) from error
        self._free.append(network)

    def _create(self) -> Any:
        cv2 = self._cv2
        logging = getattr(getattr(cv2, "utils", None), "logging", None)
        before = logging.getLogLevel() if logging else None
        if logging:
            logging.setLogLevel(logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns of a setting that nobody made
        try:
            return cv2.FaceDetectorYN.create(str(self.file), "", (320, 320), self.score_threshold, 0.3, 5000)
        finally:
            if logging:
                logging.setLogLevel(before)

    @contextmanager
    def _network(self) -> Iterator[Any]:
        try:
            network = self._free.pop()
        except IndexError:
            network = self._create()
        yield network
        self._free.append(network)  # not after an error: it may have left the network in any state

    def detect(self, photo: ImageLike, name: str | None = None) -> list[Face]:
        """The faces in a photo, the largest first; none is an empty list.

        A photo may lie on its side or upside down, also without an EXIF orientation that says so: then its faces have
        a `roll` of about 90 degrees or more. All its faces are taken to be turned alike.

        Args:
            photo: as for `AdaptFaceImageProcessor.load`.
            name (`str`, *optional*): what to call the photo in an error; its path by default.
        Raises:
            FileNotFoundError, TypeError, ValueError: see `AdaptFaceImageProcessor.load`.
        """
        pixels = np.asarray(self._processor.load(photo, name))  # (H, W, 3), RGB
        found = self._faces(pixels, SIDES)
        quarters, sure = 0, max((face.score for face in found), default=0.0)
        if sure >= SURE:
            return found
        for turn in (1, 2, 3):
            turned = self._faces(np.rot90(pixels, turn), SIDES[:2])
            surest = max((face.score for face in turned), default=0.0)
            if surest > sure + MARGIN:
                quarters, sure = turn, surest
        if quarters:
            turned = self._faces(np.rot90(pixels, quarters), SIDES)
            found = [_turned_back(face, quarters, pixels.shape) for face in turned]
        return found

    def _faces(self, pixels: np.ndarray, sides: Sequence[int]) -> list[Face]:
        """The faces in an image, all taken to be upright, looked at in several sizes."""
        height, width = pixels.shape[:2]
        longest = max(width, height)
        used = [sides[0], *(min(side, longest) for last, side in pairwise(sides) if longest > last)]
        found: list[tuple[float, Face]] = []  # how far the face's width is from the best one, and the face
        for side in reversed(used):  # each from the one before: the largest is shrunk once
            small = (max(1, round(width * side / longest)), max(1, round(height * side / longest)))
            shrinks = small[0] < pixels.shape[1]
            how = self._cv2.INTER_AREA if shrinks else self._cv2.INTER_LINEAR
            pixels = self._cv2.resize(pixels, small, interpolation=how)
            scale = np.array([width, height]) / small
            for row in self._rows(pixels):
                if row[2] <= LARGEST or side == sides[0]:
                    found.append((abs(np.log(row[2] / BEST)), _face(row, scale)))
        kept: list[Face] = []
        for _, face in sorted(found, key=lambda pair: pair[0]):
            if all(_overlap(face.box, other.box) < OVERLAP for other in kept):
                kept.append(face)
        return sorted(kept, key=lambda face: face.area, reverse=True)

    def _rows(self, pixels: np.ndarray) -> np.ndarray:
        """`(N, 15)`: x, y, width and height of the box, x and y of the landmarks, score; pixels of this image."""
        with self._network() as network:
            network.setInputSize((pixels.shape[1], pixels.shape[0]))
            _, rows = network.detect(np.ascontiguousarray(pixels[:, :, ::-1]))  # OpenCV's colours are B, G, R
        if rows is None:
            return np.empty((0, 15))
        rows = rows.astype(np.float64)
        return rows[np.isfinite(rows).all(axis=1) & (rows[:, 2:4] > 0).all(axis=1)]


def _face(row: np.ndarray, scale: np.ndarray) -> Face:
    """A row of YuNet -> a face, in pixels of the photo.

    YuNet's first eye and first corner of the mouth are the person's right ones, which are left in the image. Its own
    coordinates move by about a pixel when the image is mirrored: where in the pixel they are meant is not to be told,
    and taken as the centre, as OpenCV draws them.
    """
    left, top = row[:2] * scale
    width, height = row[2:4] * scale
    landmarks = (row[4:14].reshape(5, 2) + 0.5) * scale - 0.5
    return Face((float(left), float(top), float(width), float(height)), landmarks, float(row[14]))


def _turned_back(face: Face, quarters: int, shape: tuple[int, ...]) -> Face:
    """A face of `np.rot90(pixels, quarters)`, in pixels of the image of this shape."""
    (x, y, width, height), landmarks = face.box, face.landmarks
    for turn in range(quarters, 0, -1):
        side = shape[1] if turn % 2 else shape[0]  # the turned image's height: the width before this turn
        x, y, width, height = side - y - height, x, height, width
        landmarks = np.stack([side - 1 - landmarks[:, 1], landmarks[:, 0]], axis=1)
    return Face((x, y, width, height), landmarks, face.score)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    return both / (a[2] * a[3] + b[2] * b[3] - both)
