"""The one way a data source opens a picture: the shipped processor's, so that training and serving see the same."""

import io
from functools import cache

import numpy as np
from PIL import Image

from image_processing_adaptface import FORMATS, AdaptFaceImageProcessor, ImageLike


def load_image(image: ImageLike, name: str) -> Image.Image:
    """Upright RGB image of a path or of encoded bytes; errors call it `name`. See `AdaptFaceImageProcessor.load`."""
    return _processor().load(image, name=name)


def align_image(image: ImageLike, landmarks: np.ndarray, name: str) -> Image.Image:
    """The aligned 112 px crop of a photo with five landmarks `(5, 2)`. See `AdaptFaceImageProcessor.align`."""
    return _processor().align(image, landmarks, name=name)


def picture_format(content: bytes, name: str) -> tuple[str, str]:
    """PIL's names of an image file's format and mode, from its header.

    Raises:
        ValueError: it is no image file; calls it `name`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return image.format or "", image.mode
    except Exception:  # the processor knows better how to say why
        load_image(content, name)
        raise


def starts_like(content: bytes) -> str | None:
    """PIL's name of the format whose mark an image file bears, None if it bears none of those that are opened.

    These are the marks that PIL itself goes by. Whether the rest of the file is whole is not looked at.
    """
    Image.init()
    head = content[:16].ljust(16, b"\0")  # some look at the second byte before they count
    accepts = {name: Image.OPEN[name][1] for name in FORMATS}
    return next((name for name, accept in accepts.items() if accept and accept(head) is True), None)


@cache
def _processor() -> AdaptFaceImageProcessor:
    return AdaptFaceImageProcessor()
