"""AdaptFace: Domain-Aware LoRA face embeddings on a frozen vision backbone."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptface.detection import FaceDetector as FaceDetector
    from adaptface.faces import FaceEmbedder as FaceEmbedder
    from adaptface.gallery import Gallery as Gallery

__version__ = "0.1.0"

# What can be imported from here, and the module that has it: imported when it is asked for.
_LAZY = {
    "FaceDetector": "adaptface.detection",
    "FaceEmbedder": "adaptface.faces",
    "Gallery": "adaptface.gallery",
}
__all__ = ["FaceDetector", "FaceEmbedder", "Gallery", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'adaptface' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
