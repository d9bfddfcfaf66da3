"""The one way a data source opens a picture: the shipped processor's, so that training and serving see the same."""

from functools import cache

from PIL import Image

from image_processing_adaptface import AdaptFaceImageProcessor, ImageLike


def load_image(image: ImageLike, name: str) -> Image.Image:
    """Upright RGB image of a path or of encoded bytes; errors call it `name`. See `AdaptFaceImageProcessor.load`."""
    return _processor().load(image, name=name)


@cache
def _processor() -> AdaptFaceImageProcessor:
    return AdaptFaceImageProcessor()
