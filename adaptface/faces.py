"""Photos or face crops -> embeddings, and whether two of them show one person.

    from adaptface import FaceEmbedder

    embedder = FaceEmbedder.from_pretrained("someone/AdaptFace")
    found = embedder.embed(["a.jpg", "b.jpg"])                    # found.embeddings: (2, 512), rows of length 1
    answer = embedder.verify("a.jpg", "b.jpg")
    print(answer.same, answer.similarity, answer.warnings)

In a photo the face is found and aligned first (`pip install 'adaptface[faces]'`); `aligned=True` takes square crops
that are aligned already, as the model's own processor does.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from adaptface.data.domains import measure
from adaptface.detection import Choice, Face, FaceDetector, NoFaceError, choose
from adaptface.embedders import ModelEmbedder, check_model
from adaptface.runtime import load_engine
from image_processing_adaptface import ARCFACE_TEMPLATE, TEMPLATE_SIZE, ImageLike

# `(B, 3, S, S)`, float32 on the CPU -> features `(B, E)` before normalisation, and the mix `(B, K)` of a router.
Forward = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]

# When an image is warned of. Measured on pairs of development faces with a strong peer, one image of each pair made
# worse: the mean similarity of genuine pairs, 0.66 at first, falls to 0.6 or less.
SMALL = 12.0  # pixels between the eyes: 0.60 there, 0.55 at 10
DARK, BRIGHT = 20.0, 225.0  # mean luma of the face, 0 to 255: about 0.5 and 0.56 there
BLURRED = 10.0  # variance of the Laplacian: 0.55 there; of 99 in 100 faces it is above 40
TURNED = 0.35  # of Face.turn; see data.domains.yaw_proxy
TILTED = 25.0  # degrees: at 30 half of the landmarks are off by a quarter of the eyes' distance or more
ASIDE = 60.0  # degrees: the whole photo lies on its side
UNSURE = 0.8  # score; of 40 photos of people the lowest right one was 0.82
COLOURLESS = 2  # grey levels that the channels differ by at most

EYES = float(np.linalg.norm(ARCFACE_TEMPLATE[1] - ARCFACE_TEMPLATE[0])) / TEMPLATE_SIZE  # of an aligned crop's side

MAX_WORKERS = 8
# Images that a CPU computes at a time: the activations of more fall out of its caches. 1, 8, 32 or 64 at a time made
# 3.6, 4.8, 3.8 and 3.3 images a second, dinov2-small's geometry (`benchmarks/embed_faces.py`, "the model alone").
AT_ONCE_ON_CPU = 8


@dataclass(frozen=True, eq=False)
class EmbeddedFace:
    """One face and what is known of it.

    Args:
        image (`int`): number of its image among those given.
        embedding (`np.ndarray` of shape `(E,)`): float32, of length 1.
        quality (`float`): length of the image's features before normalisation. It follows the image's quality; what is
            high differs from model to model.
        domain_mix (`dict[str, float]`, *optional*): weight of each expert; None where the model has no router.
        face (`Face`, *optional*): box, landmarks and score in the upright photo; None of an aligned crop.
        warnings (`tuple[str, ...]`): what may make the embedding worse.
    """

    image: int
    embedding: np.ndarray
    quality: float
    domain_mix: dict[str, float] | None
    face: Face | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the embedding."""
        mix = self.domain_mix
        return {
            "image": self.image,
            "quality": self.quality,
            "domain_mix": mix and {name: round(weight, 6) for name, weight in mix.items()},
            "face": self.face and self.face.to_dict(),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, eq=False)
class FaceEmbeddings:
    """Embeddings of N faces, in the order of their images; `found[i]` is the i-th [`EmbeddedFace`].

    Args:
        embeddings (`np.ndarray` of shape `(N, E)`): float32, rows of length 1: a dot product is the cosine similarity.
        quality (`np.ndarray` of shape `(N,)`): lengths of the images' features before normalisation, float32.
        domain_weights (`np.ndarray` of shape `(N, K)`, *optional*): how the router mixed the experts, float32.
        domains (`tuple[str, ...]`): names of the K experts.
        images (`np.ndarray` of shape `(N,)`): number of the image that each row is of.
        faces (`tuple[Face | None, ...]`): the face of each row; None of aligned crops.
        warnings (`tuple[tuple[str, ...], ...]`): of each row.
        errors (`dict[int, str]`): of the images that gave no row, by their number; with `on_error="skip"` alone.
    """

    embeddings: np.ndarray
    quality: np.ndarray
    domain_weights: np.ndarray | None
    domains: tuple[str, ...]
    images: np.ndarray
    faces: tuple[Face | None, ...]
    warnings: tuple[tuple[str, ...], ...]
    errors: dict[int, str]

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, row: int) -> EmbeddedFace:
        mix = None
        if self.domain_weights is not None:
            mix = dict(zip(self.domains, self.domain_weights[row].tolist(), strict=True))
        return EmbeddedFace(
            int(self.images[row]), self.embeddings[row], float(self.quality[row]), mix, self.faces[row],
            self.warnings[row],
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the embeddings."""
        rows = [{**self[row].to_dict(), "embedding": self.embeddings[row].tolist()} for row in range(len(self))]
        return {"faces": rows, "errors": {str(image): message for image, message in self.errors.items()}}


@dataclass(frozen=True, eq=False)
class Verification:
    """Whether two images show one person.

    Args:
        same (`bool`, *optional*): the decision, `similarity > threshold`; None where there is no threshold.
        similarity (`float`): cosine of the two embeddings, -1 to 1.
        threshold (`float`, *optional*): cosine similarity above which two faces count as one person.
        far (`float`, *optional*): false accept rate at which the threshold was measured; None of one that was given.
        source (`dict`, *optional*): what the threshold was measured on: benchmark, data, counts of pairs, protocol,
            date, measured rates with their intervals. None of one that was given.
        match_probability (`float`, *optional*): that both are one person, of pairs half of which are; None where the
            model has no calibration.
        first, second (`EmbeddedFace`): the two faces.
        warnings (`tuple[str, ...]`): those of both, and of the decision.
    """

    same: bool | None
    similarity: float
    threshold: float | None
    far: float | None
    source: dict[str, Any] | None
    match_probability: float | None
    first: EmbeddedFace
    second: EmbeddedFace
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the embeddings."""
        return {
            "same": self.same,
            "similarity": self.similarity,
            "threshold": self.threshold,
            "far": self.far,
            "source": self.source,
            "match_probability": self.match_probability,
            "first": self.first.to_dict(),
            "second": self.second.to_dict(),
            "warnings": list(self.warnings),
        }


class _Prepared(NamedTuple):
    """A face on its way into the model."""

    image: int
    name: str
    face: Face | None
    pixel_values: torch.Tensor  # (3, S, S)
    warnings: tuple[str, ...]


class FaceEmbedder:
    """Embeds faces and compares them.

    An embedding is made as the evaluations make it on which the model's thresholds were measured: the features of the
    image and of its mirror image are added raw, then L2-normalised. Several threads may use one embedder.

    Args:
        embedder (`ModelEmbedder`): model and processor.
        detector (`FaceDetector`, *optional*): made when the first photo comes, by default.
        engine (`str` or a function): what computes: see [`~runtime.load_engine`], or `(B, 3, S, S)`, float32 on the
            CPU -> features `(B, E)` before normalisation and the router's mix `(B, K)`, or None without a router.
    """

    def __init__(
        self, embedder: ModelEmbedder, detector: FaceDetector | None = None, engine: str | Forward = "torch"
    ) -> None:
        self.embedder = embedder
        self.engine = engine if isinstance(engine, str) else "given"
        self.processor = embedder.preprocess.processor
        self.config = embedder.model.config
        self._forward: Forward = load_engine(embedder.model, engine) if isinstance(engine, str) else engine
        self._detector = detector
        self._detector_file: str | os.PathLike | None = None
        self._lock = Lock()

    @classmethod
    def from_pretrained(
        cls,
        folder_or_id: str | Path,
        *,
        revision: str | None = None,
        code_revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        engine: str = "torch",
        detector: FaceDetector | str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> FaceEmbedder:
        """Load a model, its processor and its code, as `AutoModel` with `trust_remote_code` does.

        Args:
            folder_or_id (`str` or path): model folder, or id on the Hub.
            revision, code_revision (`str`, *optional*): commit, tag or branch, of the model and of its code.
            device (*optional*): the accelerator by default, else the CPU.
            dtype (`torch.dtype`): of the weights. Thresholds are measured in float32.
            engine (`str`): what computes: `torch`, `torch-compiled`, or on a CPU `onnx`, `onnx-int8`, `openvino`,
                `openvino-bf16`; see [`~runtime.load_engine`]. docs/deploy.md says what each is worth.
            detector (*optional*): a [`FaceDetector`], or the path of its file; see [`~detection.detector_file`].
            token, local_files_only: for the Hub, as `from_pretrained` takes them.
        Raises:
            OSError: there is no such model, or it cannot be fetched.
            ValueError: it is another kind of model, damaged, or its base is another one than trained on.
        """
        hub: dict[str, Any] = {"local_files_only": local_files_only} if local_files_only else {}
        if token is not None:
            hub["token"] = token
        check_model(str(folder_or_id), revision, **hub)
        embedder = ModelEmbedder.from_pretrained(folder_or_id, revision, device, dtype, code_revision, **hub)
        made = cls(embedder, detector if isinstance(detector, FaceDetector) else None, engine)
        if not isinstance(detector, FaceDetector):
            made._detector_file = detector
        return made

    def identity(self) -> dict[str, Any] | None:
        """What makes the embeddings, JSON-ready: those of another identity cannot be compared with them.

        Engine and precision are no part of it: theirs can. None of a live model, whose weights may change.
        """
        if self.embedder.digest is None:
            return None
        described = self.embedder.describe()
        keys = ("weights_sha256", "backbone_sha256", "image_size", "image_mean", "image_std")
        return {
            **{key: described[key] for key in keys},
            "embedding": "features of the image and of its mirror image added, then L2-normalised",
        }

    @property
    def detector(self) -> FaceDetector:
        """What finds faces in photos.

        Raises:
            ImportError, OSError, ValueError: see [`FaceDetector`].
        """
        with self._lock:
            if self._detector is None:
                self._detector = FaceDetector(self._detector_file)
            return self._detector

    def detect(self, photo: ImageLike, faces: Choice = "all") -> list[Face]:
        """The faces in a photo, the largest first, or one of them; none is an empty list.

        Args:
            photo: path, PIL image, uint8 array (H, W, 3) in RGB order, or the bytes of an image file.
            faces: `all`, `largest` or `central`; see [`~detection.choose`].
        Raises:
            see [`~detection.FaceDetector.detect`].
        """
        image = self.processor.load(photo)
        return choose(self.detector.detect(image), faces, image.size)

    def embed(
        self,
        images: ImageLike | Sequence[ImageLike],
        batch_size: int = 64,
        aligned: bool = False,
        faces: Choice = "largest",
        flip: bool = True,
        on_error: Literal["raise", "skip"] = "raise",
        workers: int | None = None,
    ) -> FaceEmbeddings:
        """Embed photos, or aligned crops.

        Args:
            images: one image or a list (or (B, H, W, C) array) of them; each a path, a PIL image, a uint8 array
                (H, W, 3) in RGB order, or the bytes of an image file. One image is a list of one.
            batch_size: faces in one forward pass, of which a CPU computes eight at a time; their mirror images take a
                second one.
            aligned: they are square face crops, aligned already; no face is looked for.
            faces: which face of a photo is taken: the `largest`, the most `central`, or `all`, a row each.
            flip: add the mirror image's features. The model's thresholds hold for embeddings that have them.
            on_error: `raise` at the first image that cannot be read or shows no face, or `skip` it and tell in
                `errors`.
            workers: threads that read images and look for faces; by default one a CPU, at most 8.
        Returns:
            [`FaceEmbeddings`], also for one image.
        Raises:
            FileNotFoundError: there is no such file.
            NoFaceError: a photo shows no face.
            TypeError, ValueError: an image cannot be used, there are none, or a setting is out of range.
        """
        listed = _as_list(images)
        if not listed:
            raise ValueError("images is empty; pass at least one image")
        workers = min(_workers(workers), len(listed))
        batches = list(self.embed_batches(listed, batch_size, aligned, faces, flip, on_error, workers))
        return batches[0] if len(batches) == 1 else _joined(batches)

    def embed_batches(
        self,
        images: Iterable[ImageLike],
        batch_size: int = 64,
        aligned: bool = False,
        faces: Choice = "largest",
        flip: bool = True,
        on_error: Literal["raise", "skip"] = "raise",
        workers: int | None = None,
    ) -> Iterator[FaceEmbeddings]:
        """Embed any number of images, a batch at a time; memory is bounded by a batch, and images are read as it goes.

        Args:
            images: as for `embed`, from a list, a generator, or anything else that can be iterated over.
            batch_size, aligned, faces, flip, on_error, workers: see `embed`.
        Yields:
            [`FaceEmbeddings`] of up to `batch_size` faces; images are numbered from the first of all. The `errors` of
            an image come no later than the rows of the one after it.
        Raises:
            see `embed`.
        """
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: give a whole number of at least 1")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r}: choose 'raise' or 'skip'")
        choose([], faces, (1, 1))  # refuses what is no choice
        named = ((image, _name(image, f"image {index}")) for index, image in enumerate(images))
        return self._batches(named, batch_size, aligned, faces, flip, on_error, _workers(workers))

    def verify(
        self,
        a: ImageLike,
        b: ImageLike,
        far: float = 0.001,
        threshold: float | None = None,
        aligned: bool = False,
        faces: Literal["largest", "central"] = "largest",
    ) -> Verification:
        """Whether two images show one person.

        Args:
            a, b: the images, as for `embed`.
            far: false accept rate, one of those that the model's thresholds were measured at.
            threshold: cosine similarity above which they count as one person, in place of the model's.
            aligned, faces: see `embed`.
        Returns:
            [`Verification`]. Where the model has no thresholds and none is given, `same` is None and a warning says
            how to measure them.
        Raises:
            ValueError: the model has thresholds, but none at this rate; names those that it has. `threshold` is no
                cosine similarity. Or see `embed`.
        """
        if faces not in ("largest", "central"):
            raise ValueError(f"faces={faces!r}: two faces are compared; choose 'largest' or 'central'")
        if threshold is not None and not -1 <= threshold <= 1:  # also NaN
            raise ValueError(f"threshold={threshold!r}: give a cosine similarity, -1 to 1")
        at = self._threshold(far) if threshold is None else {"threshold": threshold, "far": None, "source": None}
        named = [(a, _name(a, "the first image")), (b, _name(b, "the second image"))]
        (pair,) = self._batches(named, 2, aligned, faces, True, "raise", 2)
        similarity = float(np.clip(pair.embeddings[0] @ pair.embeddings[1], -1, 1))
        warnings = [
            f"{which} image: {text}" for row, which in ((0, "first"), (1, "second")) for text in pair[row].warnings
        ]
        if at["threshold"] is None:
            warnings.append(
                "the model has no threshold, so nothing is decided: measure one with eval_benchmarks.py "
                "--write_thresholds NAME, or pass threshold="
            )
        return Verification(
            same=None if at["threshold"] is None else similarity > at["threshold"],
            similarity=similarity,
            **at,
            match_probability=self.config.match_probability(similarity) if self.config.thresholds else None,
            first=pair[0],
            second=pair[1],
            warnings=tuple(warnings),
        )

    def _threshold(self, far: float) -> dict[str, Any]:
        """The model's threshold at a false accept rate, and where it comes from; all None of a model without any."""
        measured = self.config.thresholds
        if not measured:
            return {"threshold": None, "far": None, "source": None}
        threshold = self.config.threshold(far)
        point = next(point for point in measured["operating_points"] if point["far"] == far)
        of_set = {key: value for key, value in measured.items() if key not in ("operating_points", "calibration")}
        of_point = {key: value for key, value in point.items() if key not in ("far", "threshold")}
        return {"threshold": threshold, "far": far, "source": of_set | of_point}

    def _batches(
        self,
        named: Iterable[tuple[ImageLike, str]],
        batch_size: int,
        aligned: bool,
        faces: Choice,
        flip: bool,
        on_error: str,
        workers: int,
    ) -> Iterator[FaceEmbeddings]:
        waiting: list[_Prepared] = []
        errors: dict[int, str] = {}

        def work(index: int, image: ImageLike, name: str) -> list[_Prepared] | Exception:
            try:
                return list(self._prepare(index, image, name, detector, faces))
            except (OSError, ValueError) as error:
                if on_error == "raise":
                    raise
                return error

        detector = None if aligned else self.detector  # what is wrong with it is no image's fault
        numbered = ((index, image, name) for index, (image, name) in enumerate(named))
        for index, found in enumerate(_in_order(work, numbered, workers, ahead=batch_size)):
            if isinstance(found, Exception):
                errors[index] = str(found)
            else:
                waiting += found
            while len(waiting) >= batch_size or len(errors) >= batch_size:
                batch, waiting = waiting[:batch_size], waiting[batch_size:]
                yield self._embed(batch, errors, flip, on_error)
                errors = {}
        if waiting or errors:
            yield self._embed(waiting, errors, flip, on_error)

    def _prepare(
        self, index: int, image: ImageLike, name: str, detector: FaceDetector | None, faces: Choice
    ) -> Iterator[_Prepared]:
        """Read an image, find and align its faces (without a detector it is a crop), and make the model's input."""
        photo = self.processor.load(image, name)
        if detector is None:
            yield self._crop(index, name, photo, None, _small(photo.width * EYES))
            return
        found = detector.detect(photo, name)
        if not found:
            raise NoFaceError(
                f"{name}: no face was found in {photo.width} x {photo.height} px. Pass aligned=True (--aligned) if it "
                "is a face crop already; else take a photo that shows the face larger and more clearly"
            )
        warnings = []
        if faces != "all" and len(found) > 1:
            taken = "largest" if faces == "largest" else "most central"
            warnings.append(f"{len(found)} faces were found; the {taken} one was taken")
        usable, reason = 0, ""
        for face in choose(found, faces, photo.size):
            try:
                crop = self.processor.align(photo, face.landmarks, name)
            except ValueError as error:
                width, height = face.box[2:]
                reason = f"{width:.0f} x {height:.0f} px: {str(error).removeprefix(f'{name}: ')}"
                continue
            usable += 1
            yield self._crop(index, name, crop, face, warnings + _warnings(face))
        if not usable:
            raise NoFaceError(
                f"{name}: a face was found, but cannot be aligned ({reason}). Take a photo that shows it larger and "
                "more clearly"
            )

    def _crop(self, index: int, name: str, crop: Image.Image, face: Face | None, warnings: list[str]) -> _Prepared:
        try:
            pixel_values = self.embedder.preprocess(crop)
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix('Image image: ')}") from error
        return _Prepared(index, name, face, pixel_values, (*warnings, *_crop_warnings(crop)))

    @torch.no_grad()
    def _embed(self, batch: list[_Prepared], errors: dict[int, str], flip: bool, on_error: str) -> FaceEmbeddings:
        if not batch:
            return self._none(errors)
        pixel_values = torch.stack([face.pixel_values for face in batch])  # (B, 3, S, S)
        features, mix = self._compute(pixel_values)  # (B, E), (B, K)
        quality = features.norm(dim=1)
        if flip:
            features = features + self._compute(pixel_values.flip(-1))[0]
        norms = features.norm(dim=1)
        whole = (norms.isfinite() & (norms > 0)).cpu().numpy()
        for row in np.flatnonzero(~whole):
            message = f"the embedding of {batch[row].name} is zero, NaN or infinite"
            if on_error == "raise":
                raise ValueError(message)
            errors[batch[row].image] = message
        batch = [face for face, good in zip(batch, whole, strict=True) if good]
        return FaceEmbeddings(
            embeddings=F.normalize(features, dim=1).cpu().numpy()[whole],
            quality=quality.cpu().numpy()[whole],
            domain_weights=None if mix is None else mix.float().cpu().numpy()[whole],
            domains=tuple(self.config.domains),
            images=np.array([face.image for face in batch], dtype=np.int64),
            faces=tuple(face.face for face in batch),
            warnings=tuple(face.warnings for face in batch),
            errors=errors,
        )

    def _compute(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features `(B, E)` and mix `(B, K)` of a batch, on a CPU a few images at a time."""
        if self.embedder.device.type != "cpu":
            return self._forward(pixel_values)
        features, mixes = zip(*map(self._forward, pixel_values.split(AT_ONCE_ON_CPU)), strict=True)
        return torch.cat(features), None if mixes[0] is None else torch.cat(mixes)

    def _none(self, errors: dict[int, str]) -> FaceEmbeddings:
        size, domains = self.config.embedding_size, tuple(self.config.domains)
        weights = np.empty((0, len(domains)), np.float32) if self.config.has_router else None
        empty = np.empty((0, size), np.float32)
        return FaceEmbeddings(empty, empty[:, 0], weights, domains, np.empty(0, np.int64), (), (), errors)


def _warnings(face: Face) -> list[str]:
    """What a face's place in the photo says about its embedding."""
    found = []
    if face.score < UNSURE:
        found.append(f"the detector is not sure that this is a face (score {face.score:.2f}, below {UNSURE:g})")
    found += _small(face.eye_distance)
    if abs(face.roll) > ASIDE:
        found.append(
            f"the photo is not upright, and no EXIF orientation says so: the face is turned by {face.roll:.0f}°"
        )
    elif abs(face.roll) > TILTED:
        found.append(
            f"the head is tilted by {abs(face.roll):.0f}°, over {TILTED:g}: turn the photo so that it is upright"
        )
    if abs(face.turn) > TURNED:
        found.append(
            f"the head is turned: the nose is {abs(face.turn):.2f} eye distances off the middle of the eyes, over "
            f"{TURNED:g}"
        )
    return found


def _small(eye_distance: float) -> list[str]:
    if eye_distance >= SMALL:
        return []
    return [f"the face is small: {eye_distance:.0f} px between the eyes, below {SMALL:g}"]


def _crop_warnings(crop: Image.Image) -> list[str]:
    """What a crop's pixels say about its embedding."""
    found = []
    measured = measure(crop)
    pixels = np.asarray(crop, dtype=np.int16)
    if np.ptp(pixels, axis=2).max() <= COLOURLESS:
        found.append("the image is black-and-white")
    if measured.luminance < DARK:
        found.append(f"the face is dark: mean brightness {measured.luminance:.0f} of 255, below {DARK:g}")
    elif measured.luminance > BRIGHT:
        found.append(f"the face is overexposed: mean brightness {measured.luminance:.0f} of 255, over {BRIGHT:g}")
    elif measured.sharpness < BLURRED:  # in the dark little contrast says nothing of the focus
        found.append(f"the face is blurred: sharpness {measured.sharpness:.0f}, below {BLURRED:g}")
    return found


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)) or (isinstance(images, np.ndarray) and images.ndim == 4):
        return list(images)
    return [images]


def _name(image: Any, other: str) -> str:
    """What an image is called in an error."""
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else other


def _workers(given: int | None) -> int:
    if given is None:
        return min(MAX_WORKERS, os.cpu_count() or 1)
    if type(given) is not int or given < 1:
        raise ValueError(f"workers={given!r}: give a whole number of at least 1")
    return given


def _in_order(work: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], workers: int, ahead: int) -> Iterator[Any]:
    """`work(*job)` of each job, in order, by threads that are at most `ahead` jobs ahead of what was taken."""
    if workers == 1:
        yield from (work(*job) for job in jobs)
        return
    left = iter(jobs)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="adaptface")
    try:
        pending: deque[Future] = deque(pool.submit(work, *job) for job in islice(left, max(ahead, workers)))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(work, *job) for job in islice(left, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _joined(batches: list[FaceEmbeddings]) -> FaceEmbeddings:
    first = batches[0]
    weights = [batch.domain_weights for batch in batches if batch.domain_weights is not None]
    return FaceEmbeddings(
        embeddings=np.concatenate([batch.embeddings for batch in batches]),
        quality=np.concatenate([batch.quality for batch in batches]),
        domain_weights=np.concatenate(weights) if weights else None,
        domains=first.domains,
        images=np.concatenate([batch.images for batch in batches]),
        faces=tuple(face for batch in batches for face in batch.faces),
        warnings=tuple(texts for batch in batches for texts in batch.warnings),
        errors={image: text for batch in batches for image, text in batch.errors.items()},
    )
