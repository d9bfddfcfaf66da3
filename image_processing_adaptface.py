"""Image processor of AdaptFace: any picture of one face -> `pixel_values`.

The one owner of alignment, resizing and normalisation, in training and in serving. PIL does all the resampling, so
that both give the same numbers on every machine.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BaseImageProcessor, BatchFeature

# Left eye, right eye, nose, left and right corner of the mouth, as seen in the image (x, y), pixel centres at integers.
# Source: insightface python-package/insightface/utils/face_align.py, `arcface_dst`.
ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
TEMPLATE_SIZE = 112  # pixels a side of the aligned crop
MIN_SIDE = 16  # pixels; below it there is no face to recognise
MAX_PIXELS = 80_000_000  # a larger picture is refused before it is decoded
MAX_STRETCH = 1.05  # longer over shorter side of a crop that may be resized to a square
# Formats whose decoders read bytes and start no other program (EPS would start Ghostscript).
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

ImageLike = Image.Image | np.ndarray | bytes | str | os.PathLike


def _describe(image: Any) -> str:
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"{type(image).__name__} image"


def _open(image: Any, name: str) -> Image.Image:
    """Any accepted input -> decoded, upright PIL image in its own mode."""
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such file")
        with path.open("rb") as stream:
            return _decode(stream, name)
    if isinstance(image, bytes):
        return _decode(io.BytesIO(image), name)
    if isinstance(image, np.ndarray):
        return Image.fromarray(_checked_array(image, name))
    if isinstance(image, Image.Image):
        return _upright(image, name)
    raise TypeError(
        f"{name}: expected a PIL image, a uint8 array of shape (H, W, 3), the bytes or the path of an image file; "
        f"got {type(image).__name__}"
    )


def _decode(stream: Any, name: str) -> Image.Image:
    head = stream.read(64)
    stream.seek(0)
    if not head:
        raise ValueError(f"{name}: the file is empty; fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{name}: a Git LFS pointer, not the image itself; run `git lfs pull`")
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{name}: a web page or XML, not an image; the download went wrong, fetch it again")
    try:
        image = Image.open(stream, formats=FORMATS)
    except Image.DecompressionBombError as error:  # PIL's own limit is higher than ours
        raise ValueError(f"{name}: over {MAX_PIXELS:,} pixels ({error}); scale it down first") from error
    except Exception as error:
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"  # that one only names a stream
        raise ValueError(
            f"{name}: not a readable image{reason}; known formats are {', '.join(FORMATS)}, "
            "anything else may be opened with PIL and passed as an image"
        ) from error
    return _upright(image, name, in_place=True)


def _upright(image: Image.Image, name: str, in_place: bool = False) -> Image.Image:
    """Decode a lazily opened image and apply its EXIF orientation; `in_place` saves a copy."""
    if image.width * image.height > MAX_PIXELS:  # from the header alone
        raise ValueError(
            f"{name}: {image.width} x {image.height} px is over {MAX_PIXELS:,} pixels; scale it down first"
        )
    try:
        if in_place:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
        return ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise whatever they like on damaged data
        raise ValueError(f"{name}: damaged or incomplete image ({error}); fetch it again") from error


def _checked_array(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"{name}: array of shape {array.shape} has its channels first; pass (H, W, C), array.transpose(1, 2, 0)"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or not array.size:
        raise ValueError(f"{name}: array must have shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); got {array.shape}")
    if array.dtype != np.uint8:
        raise ValueError(
            f"{name}: array must be uint8 with values 0 .. 255, got {array.dtype}; "
            "for values 0 .. 1 pass (array * 255).round().astype('uint8')"
        )
    return array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Every PIL mode -> RGB.

    Transparent parts become black, as the warp's outside is. Modes of more than eight bits (I;16, I, F) are grey:
    scaled down from 0 .. 65535, except that I and F whose values stay within 0 .. 255 are taken as they are, and F
    within 0 .. 1 is scaled up.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "La":  # PIL knows no direct way from here to RGBA
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64)
        low, high = grey.min(), grey.max()
        if not (low >= 0 and high <= 65535):  # not finite included
            raise ValueError(
                f"{name}: mode {image.mode} holds values {low:g} .. {high:g}; expected 0 .. 1 (F), 0 .. 255 or "
                "0 .. 65535; rescale it to 8 bits"
            )
        if image.mode.startswith("I;16") or high > 255:
            grey = grey / 257
        elif image.mode == "F" and high <= 1:
            grey = grey * 255
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _checked_landmarks(landmarks: Any, size: tuple[int, int], name: str) -> np.ndarray:
    try:
        points = np.asarray(landmarks, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: landmarks are not numbers of shape (5, 2) ({error})") from error
    if points.shape != (5, 2):
        raise ValueError(f"{name}: landmarks must have shape (5, 2), five points (x, y); got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError(f"{name}: landmarks hold NaN or infinity; leave this face out")
    centre = points.mean(axis=0)
    if np.sqrt(((points - centre) ** 2).sum(axis=1).mean()) < 2.0:
        raise ValueError(
            f"{name}: the five landmarks lie within about two pixels of each other; "
            "pass pixel coordinates (not 0 .. 1) of a face that can be told from a dot"
        )
    if not ((centre >= 0) & (centre < size)).all():
        raise ValueError(
            f"{name}: the landmarks' centre ({centre[0]:.0f}, {centre[1]:.0f}) lies outside the {size[0]} x {size[1]} "
            "px image; pass pixel coordinates (x, y) of this image, after its EXIF orientation"
        )
    return points


def _fit_similarity(points: np.ndarray, name: str) -> tuple[complex, complex]:
    """Least-squares similarity from `points` to the template, as `z -> a z + b` on x + iy.

    Complex regression: in the plane it is the closed form of Umeyama, TPAMI 13(4), 1991, eq. 39-43, without reflection.
    """
    source, target = points @ (1, 1j), ARCFACE_TEMPLATE @ (1, 1j)  # (5,) complex
    centred, wanted = source - source.mean(), target - target.mean()
    a = np.vdot(centred, wanted) / np.vdot(centred, centred).real
    mirrored = np.dot(centred, wanted) / np.vdot(centred, centred).real  # the same after flipping the face
    if abs(mirrored) > 2 * abs(a):  # a profile view may come slightly over 1
        raise ValueError(
            f"{name}: the landmarks are mirrored; the order is left eye, right eye, nose, left and right corner of "
            "the mouth, left and right as seen in the image"
        )
    # What the fit explains of the template: 1 for a frontal face, about 0.5 for a full profile. Other orders of the
    # points, or points of something else, mostly explain less, or put nose and mouth where they cannot be.
    explained = abs(a) ** 2 * np.vdot(centred, centred).real / np.vdot(wanted, wanted).real
    x, y = (a * source).real, (a * source).imag
    ordered = y[:2].mean() < y[2] < y[3:].mean() and min(x[1] - x[0], x[4] - x[3]) > -10  # px; a profile's may cross
    if explained < 0.4 or not ordered:
        raise ValueError(
            f"{name}: the landmarks do not form a face; their order is left eye, right eye, nose, left and right "
            "corner of the mouth; check the detector"
        )
    return complex(a), complex(target.mean() - a * source.mean())


class AdaptFaceImageProcessor(BaseImageProcessor):
    """Turns pictures of faces into the model's input.

    Without landmarks an image is taken as an aligned, square face crop. With five landmarks it is a photo: it is
    warped to the 112 px ArcFace template first, what lies outside the photo being black. The crop is then resized to
    `size`, multiplied by `rescale_factor` and normalised per channel.

    Args:
        size (`int` or `dict`): pixels a side of the output, or `{"height": S, "width": S}`.
        resample (`int`): PIL resampling filter of the resize; bicubic by default.
        rescale_factor (`float`): from 8-bit values to 0 .. 1.
        image_mean, image_std (`Sequence[float]`): per RGB channel, on the 0 .. 1 scale; ImageNet's by default.
    Raises:
        ValueError: a value out of range, or a step (`do_resize`, `do_rescale`, `do_normalize`) switched off: the model
            was trained with all of them.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (the base class's declaration)

    def __init__(
        self,
        size: int | Mapping[str, int] = 224,
        resample: int = Image.Resampling.BICUBIC,
        rescale_factor: float = 1 / 255,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size = self._square(size)
        self.resample = int(Image.Resampling(resample))
        self.rescale_factor = float(rescale_factor)
        self.image_mean, self.image_std = [float(x) for x in image_mean], [float(x) for x in image_std]
        # Other readers of preprocessor_config.json look for these three.
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if kwargs.get(step, True) is not True:
                raise ValueError(f"{step} must be true, got {kwargs[step]!r}: AdaptFace models are trained with it")
            setattr(self, step, True)
        if not 0.0 < self.rescale_factor < math.inf:
            raise ValueError(f"rescale_factor must be a positive number, got {rescale_factor}")
        if len(self.image_mean) != 3 or not np.isfinite(self.image_mean).all():
            raise ValueError(f"image_mean must be three numbers, got {image_mean}")
        if len(self.image_std) != 3 or not all(0.0 < x < math.inf for x in self.image_std):
            raise ValueError(f"image_std must be three positive numbers, got {image_std}")

    @staticmethod
    def _square(size: int | Mapping[str, int]) -> dict[str, int]:
        sides = dict(size) if isinstance(size, Mapping) else {"height": size, "width": size}
        height = sides.get("height")
        if sides != {"height": height, "width": height} or not isinstance(height, int) or height < 1:
            raise ValueError(f"size must be a positive int, or a dict of an equal height and width; got {size}")
        return {"height": height, "width": height}

    def load(self, image: ImageLike, name: str | None = None) -> Image.Image:
        """Read one image as upright RGB.

        Transparent parts become black, 16-bit values are scaled to 8 bits, of several frames the first is taken.

        Args:
            image (PIL image, uint8 `np.ndarray`, `bytes`, `str` or path): arrays are (H, W), (H, W, 1), (H, W, 3) in
                RGB order or (H, W, 4) RGBA; bytes are those of an image file.
            name (`str`, *optional*): what to call the image in an error; its path by default.
        Returns:
            `PIL.Image.Image` in mode RGB, always a new one.
        Raises:
            FileNotFoundError: there is no such file.
            TypeError: the input is of another type.
            ValueError: not an image, damaged, under 16 px a side or over 80 million pixels, an array of another dtype
                or shape, values that have no 8-bit reading.
        """
        name = name or _describe(image)
        opened = _open(image, name)
        if min(opened.size) < MIN_SIDE:
            raise ValueError(
                f"{name}: {opened.width} x {opened.height} px is too small; {MIN_SIDE} px a side are needed"
            )
        return _to_rgb(opened, name)

    def align(self, image: ImageLike, landmarks: Any, name: str | None = None) -> Image.Image:
        """Warp a photo so that its five landmarks meet the ArcFace template.

        Args:
            image: as for `load`.
            landmarks (array of shape `(5, 2)`): pixels (x, y) in the upright image, pixel centres at integers; left
                eye, right eye, nose, left and right corner of the mouth, left and right as seen in the image.
            name (`str`, *optional*): as for `load`.
        Returns:
            `PIL.Image.Image`: RGB, 112 x 112 px; black where the photo ends.
        Raises:
            ValueError: as for `load`; landmarks of another shape, not finite, coinciding, mirrored, off the image,
                or forming no face.
        """
        name = name or _describe(image)
        photo = self.load(image, name)
        points = _checked_landmarks(landmarks, photo.size, name)
        a, b = _fit_similarity(points, name)
        # The warp samples single points: average a large face down to about its final size first.
        shrink = max(1, int(1 / abs(a)))
        if shrink > 1:
            photo = photo.reduce(shrink)
        # PIL wants the way back, from crop to photo, z -> (z - b) / a, with pixel centres at halves.
        inverse = 1 / a
        half = 0.5 + 0.5j
        shift = (-inverse * (b + half) + half) / shrink
        inverse /= shrink
        matrix = (inverse.real, -inverse.imag, shift.real, inverse.imag, inverse.real, shift.imag)
        square = (TEMPLATE_SIZE, TEMPLATE_SIZE)
        # Channel by channel in floats: on 8-bit pixels this filter cuts fractions off, half a grey level on average.
        channels = [
            np.asarray(channel.convert("F").transform(square, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))
            for channel in photo.split()
        ]
        return Image.fromarray(np.stack(channels, axis=2).round().clip(0, 255).astype(np.uint8))

    def __call__(self, images: ImageLike | Sequence[ImageLike], landmarks: Any = None, **kwargs: Any) -> BatchFeature:
        """See [`~AdaptFaceImageProcessor.preprocess`]; transformers 4 hands on no second argument by itself."""
        return self.preprocess(images, landmarks, **kwargs)

    def preprocess(
        self,
        images: ImageLike | Sequence[ImageLike],
        landmarks: Any = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """What calling the processor does. An image's result does not depend on the rest of its batch.

        Args:
            images: one image as for `load`, or a list (or (B, H, W, C) array) of them.
            landmarks (array of shape `(5, 2)` for one image, `(B, 5, 2)` for several, *optional*): as for `align`.
            return_tensors (`str`, *optional*): "pt" or "np".
        Returns:
            `BatchFeature` with `pixel_values`, float32 of shape `(B, 3, size, size)`.
        Raises:
            ValueError: an empty list, a crop that is not square, not as many landmarks as images; or as for `load` and
                `align`, naming the image by its index.
        """
        points = None if landmarks is None else list(landmarks) if np.iterable(landmarks) else [landmarks]
        if isinstance(images, (list, tuple)) or (isinstance(images, np.ndarray) and images.ndim == 4):
            batch = list(images)
            names = [f"images[{i}]: {_describe(image)}" for i, image in enumerate(batch)]
        else:
            batch, names = [images], [_describe(images)]
        if not batch:
            raise ValueError("images is empty; pass at least one image")
        if points is not None and len(batch) == 1 and len(points) != 1:  # one face's (5, 2), without the list around it
            points = [landmarks]
        if points is not None and len(points) != len(batch):
            raise ValueError(f"landmarks must be one (5, 2) array an image, {len(batch)} in all; got {len(points)}")
        side = self.size["height"]
        # An 8-bit channel has 256 values: normalise those once, then look the pixels up.
        mean, std = (np.array(x, dtype=np.float32)[:, None] for x in (self.image_mean, self.image_std))
        table = (np.arange(256, dtype=np.float32) * np.float32(self.rescale_factor) - mean) / std  # (3, 256)
        pixel_values = np.empty((len(batch), 3, side, side), dtype=np.float32)
        for i, (image, name) in enumerate(zip(batch, names, strict=True)):
            if points is None:
                crop = self.load(image, name)
                if max(crop.size) > MAX_STRETCH * min(crop.size):
                    raise ValueError(
                        f"{name}: {crop.width} x {crop.height} px is no square, resizing would distort the face; pass "
                        "an aligned square face crop, or the photo with its five landmarks"
                    )
            else:
                crop = self.align(image, points[i], name)
            resized = crop.resize((side, side), Image.Resampling(self.resample))
            for channel, pixels in enumerate(resized.split()):
                pixel_values[i, channel] = table[channel][np.asarray(pixels)]
        return BatchFeature({"pixel_values": torch.from_numpy(pixel_values)}, tensor_type=return_tensors)


AdaptFaceImageProcessor.register_for_auto_class()
