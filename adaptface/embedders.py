"""What is evaluated: our model, a plain backbone (zero-shot), or a peer as an ONNX file.

An embedder turns images into raw feature vectors, on a device, from the input that its `preprocess` makes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import pickle
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.utils import cached_file

from adaptface.files import sha256
from image_processing_adaptface import AdaptFaceImageProcessor
from modeling_adaptface import listed, weights_sha256

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The start of an entry of a tensor's external data (field 13 of TensorProto, its key `location`) in an ONNX file.
# Source: onnx.proto3 of ONNX 1.15.
_LOCATION = re.compile(rb"j([\x00-\x7f]|[\x80-\xff][\x00-\x7f])\n\x08location\x12")
_UNUSED_TENSORS = {"pooler", "mask_token"}  # of a backbone, by the CLS token; many files lack them


class Preprocess:
    """PIL image -> float32 tensor `(3, H, W)`, by an image processor; what spawned workers get of an embedder.

    Args:
        processor: an `AdaptFaceImageProcessor`, also one loaded as remote code.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


class Embedder(Protocol):
    """What evaluation needs of a model: a name, its input and its features."""

    name: str
    preprocess: Preprocess

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def describe(self) -> dict[str, Any]:
        """Kind, name, revision (commit or digest of the weights) and input of the embedder, JSON-ready."""

    def identity(self) -> dict[str, Any] | None:
        """All that an embedding depends on beside the image, JSON-ready; None for a live model, which may change."""

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)` on `self.device` -> raw features `(B, E)`, float32."""


def default_device() -> torch.device:
    """The machine's accelerator if it has one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _describe_input(processor: Any) -> dict[str, Any]:
    return {
        "image_size": processor.size["height"],
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
    }


def _revision(config: Any, digest: str | None) -> str | None:
    """The commit on the Hub, or for a folder the digest of its weights."""
    return getattr(config, "_commit_hash", None) or (f"sha256:{digest}" if digest else None)


def _identity(embedder: Embedder, *code: object, **more: Any) -> dict[str, Any]:
    """What an embedder says of itself but its name, its input in full, the source of its code, and the libraries it
    runs on."""
    processor = embedder.preprocess.processor
    described = {key: value for key, value in embedder.describe().items() if key != "name"}
    settings = json.loads(processor.to_json_string())
    settings.pop("auto_map", None)  # where its class was found: its source counts
    sources = [Path(inspect.getfile(type(part))).read_bytes() for part in (*code, processor)]
    digest = hashlib.sha256(b"".join(sources)).hexdigest()
    versions = {name: version(name) for name in ("torch", "transformers", "pillow")}
    return {**described, **more, "processor": settings, "code": digest, "versions": versions}


def check_model(name: str, revision: str | None = None, **hub: Any) -> None:
    """Refuse what is neither a model folder nor a model of the Hub, before anything large is read.

    Args:
        name: folder or Hub id. What looks like a path, and what exists, is taken for a folder.
        revision: revision on the Hub.
        hub: `token`, `cache_dir` or `local_files_only`, as `from_pretrained` takes them.
    Raises:
        OSError: says which of both was looked for, and what is there instead.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        return
    if inner := [str(folder / part) for part in ("best", "last") if (folder / part / "config.json").is_file()]:
        raise FileNotFoundError(f"{name} is a run folder; give the model in it: {' or '.join(inner)}")
    if folder.exists():
        raise FileNotFoundError(f"{name} is no model folder: it has no config.json")
    if name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name or folder.is_absolute():
        raise FileNotFoundError(f"there is no folder {name}")
    try:
        if cached_file(name, "config.json", revision=revision, **hub) is None:
            raise OSError("it has no config.json")
    except OSError as error:
        at = f" at revision {revision}" if revision else ""
        raise OSError(
            f"{name} is neither a folder here nor a model of the Hub{at} that can be had: {str(error).splitlines()[0]}"
        ) from error


class ModelEmbedder:
    """An AdaptFace model, from a folder, a Hub id or the live objects.

    The device is the model's. A model in training mode is evaluated in eval mode and put back.

    Args:
        model: `AdaptFaceModel`; its `features`, the embedding before normalisation, are used.
        processor: `AdaptFaceImageProcessor`.
        name: what reports call it.
        digest: SHA-256 of the weights it was loaded from; ties a result to them.
    Raises:
        ValueError: the model is of another kind.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, name: str = "adaptface", digest: str | None = None
    ) -> None:
        if model.config.model_type != "adaptface":  # remote code has its own class: isinstance would not tell
            raise ValueError(
                f"{name} is a {model.config.model_type} model, not an AdaptFace model; "
                "evaluate it as a zero-shot backbone"
            )
        self.model = model
        self.preprocess = Preprocess(processor)
        self.name = name
        self.digest = digest

    @classmethod
    def from_pretrained(
        cls,
        folder_or_id: str | Path,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        code_revision: str | None = None,
        **hub: Any,
    ) -> ModelEmbedder:
        """Load a model and its processor as any user would: `AutoModel` with `trust_remote_code`.

        Args:
            folder_or_id: folder, or id on the Hub.
            revision, code_revision: commit, tag or branch on the Hub, of the model and of the code that comes with it.
            device: the accelerator by default, else the CPU.
            dtype: of the weights; features are float32 in any case.
            hub: `token`, `cache_dir` or `local_files_only`, as `from_pretrained` takes them.
        """
        name = str(folder_or_id)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": True, **hub}
        if code_revision is not None:
            options["code_revision"] = code_revision
        processor = AutoImageProcessor.from_pretrained(name, **options)
        model = AutoModel.from_pretrained(name, dtype=dtype, **options)
        return cls(model.to(device or default_device()), processor, name, weights_sha256(name, revision, hub))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def describe(self) -> dict[str, Any]:
        """Kind, name, revision (commit or digest of the weights) and input, JSON-ready."""
        config = self.model.config
        return {
            "kind": config.model_type,
            "name": self.name,
            "revision": _revision(config, self.digest),
            "weights_sha256": self.digest,
            "backbone": config.backbone,
            "backbone_revision": config.backbone_revision,
            "backbone_sha256": config.backbone_sha256,
            **_describe_input(self.preprocess.processor),
        }

    def identity(self) -> dict[str, Any] | None:
        """All that an embedding depends on beside the image, JSON-ready; None for a live model, which may change."""
        if self.digest is None:
            return None
        config = json.loads(self.model.config.to_json_string())
        config.pop("thresholds", None)  # they come of embeddings, not the other way round
        return _identity(self, self.model, config=config)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        training = self.model.training
        self.model.eval()
        try:
            return self.model(pixel_values).features.float()
        finally:
            self.model.train(training)


class BackboneEmbedder:
    """A plain Hugging Face vision transformer, zero-shot: the CLS token of its last hidden state.

    Of a model of images and text (CLIP) the vision tower is taken. Images are normalised with ImageNet's mean and
    standard deviation.

    Args:
        model: the backbone; the device is the model's.
        image_size (`int`, *optional*): input side in pixels. Default: 224, or the size of `model.config` if smaller.
        name: what reports call it.
        digest: SHA-256 of the weights it was loaded from; ties a result to them.
    Raises:
        ValueError: the model takes no images, or images of no such size.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_size: int | None = None,
        name: str = "backbone",
        digest: str | None = None,
    ) -> None:
        tower: Any = getattr(model, "vision_model", model)
        if getattr(tower, "main_input_name", "pixel_values") != "pixel_values":  # a tower of transformers 4 has none
            raise ValueError(f"{name} is a {tower.config.model_type} model and takes no images; name a vision backbone")
        self.model = tower.eval()
        if image_size is None:
            image_size = min(224, getattr(tower.config, "image_size", 224))
        patch = getattr(tower.config, "patch_size", 1)
        if image_size < patch:
            raise ValueError(f"{name}: {image_size} px is less than one patch of {patch} px; give a larger size")
        self.preprocess = Preprocess(AdaptFaceImageProcessor(size=image_size))
        self.name = name
        self.digest = digest

    @classmethod
    def from_pretrained(
        cls,
        folder_or_id: str | Path,
        revision: str | None = None,
        image_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> BackboneEmbedder:
        """Load a backbone in float32.

        Raises:
            OSError: there is no such model.
            ValueError: its weights cannot be read or lack tensors, which would be random, or see the class.
        """
        name = str(folder_or_id)
        options = {"ignore_mismatched_sizes": True, "output_loading_info": True}  # they are refused below, by name
        try:
            model, info = AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32, **options)
        except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
            reason = (str(error) or "it ends too early").splitlines()[0]
            raise ValueError(
                f"{name}: its weights cannot be read: cut off, or a Git LFS pointer in their place? Fetch them again "
                f"({reason})"
            ) from error
        lacking = {key for key in info["missing_keys"] if _UNUSED_TENSORS.isdisjoint(key.split("."))}
        lacking |= {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}  # transformers 4 and 5
        if lacking:
            raise ValueError(
                f"{name}: its weights do not fit its config.json; missing or of another shape: {listed(lacking)}. "
                "Fetch the model again"
            )
        try:
            digest = weights_sha256(name, revision, {})
        except OSError:  # weights of another format
            digest = None
        return cls(model.to(device or default_device()), image_size, name, digest)

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.model.device

    def describe(self) -> dict[str, Any]:
        """Kind, name, revision (commit or digest of the weights) and input, JSON-ready."""
        return {
            "kind": "zero-shot backbone",
            "name": self.name,
            "revision": _revision(self.model.config, self.digest),
            **_describe_input(self.preprocess.processor),
        }

    def identity(self) -> dict[str, Any] | None:
        """All that an embedding depends on beside the image, JSON-ready; None for a live model, which may change."""
        if self.digest is None:
            return None
        config = json.loads(self.model.config.to_json_string())
        return _identity(self, self.model, weights_sha256=self.digest, config=config)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tokens = self.model(pixel_values).last_hidden_state  # (B, 1 + N, D)
        if tokens.ndim != 3:
            raise ValueError(
                f"{self.name}: its last hidden state has the shape {tuple(tokens.shape)} and no CLS token; name a "
                "vision transformer"
            )
        return tokens[:, 0].float()  # (B, D)


def _varint(content: bytes, start: int) -> tuple[int, int]:
    """A whole number of protobuf, and where it ends."""
    value = shift = 0
    for end in range(start, len(content)):
        value |= (content[end] & 127) << shift
        shift += 7
        if content[end] < 128:
            return value, end + 1
    return 0, len(content)


def _external_data(content: bytes) -> Iterator[str]:
    """Paths of the files that hold tensors of an ONNX model, relative to it, as the tensors name them."""
    for entry in _LOCATION.finditer(content):
        size, inner = _varint(content, entry.start() + 1)
        length, start = _varint(content, entry.end())
        if start + length == inner + size:  # else weights that look like an entry
            yield content[start : start + length].decode(errors="replace")


def _onnx_sha256(path: Path) -> str:
    """Digest of a model with its external data.

    Raises:
        FileNotFoundError: a file of its data is not there.
    """
    content = path.read_bytes()
    files = [path.parent / name for name in sorted(set(_external_data(content)))]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{path}: its weights are in other files, and these are not there: {listed(missing)}")
    digests = [hashlib.sha256(content).hexdigest(), *map(sha256, files)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def open_onnx(path: Path) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU, with as many threads as torch uses.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: onnxruntime cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("ONNX files need onnxruntime: pip install 'adaptface[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes derive from Exception
        raise ValueError(f"{path}: onnxruntime cannot load it: {error}") from error


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


class OnnxEmbedder:
    """A peer as an ONNX file with one input `(B, 3, S, S)` and a first output `(B, E)`, both float32, on the CPU.

    Args:
        path: the `.onnx` file; its external data, if any, lies where it says, relative to it.
        size (`int`, *optional*): input side S in pixels; read from the file where it is fixed there.
        mean, std: per channel, RGB, on the 0..1 scale: mean within 0..1, std above 0 and at most 1.
        name: what reports call it; the path by default.
    Raises:
        ImportError: onnxruntime is not installed.
        FileNotFoundError: there is no such file, or none of its external data.
        ValueError: the file is not a readable model, or has another kind of input or output; mean or std is on
            another scale.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        path: str | Path,
        size: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        name: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.name = name or str(path)
        if not (all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std)):
            raise ValueError(
                f"{self.path}: mean {_numbers(mean)} and std {_numbers(std)} are not on the 0..1 scale; divide what "
                "is on the 0..255 scale by 255: mean 127.5 becomes 0.5"
            )
        if not self.path.is_file():
            raise FileNotFoundError(f"no ONNX file at {self.path}")
        self.digest = _onnx_sha256(self.path)
        self.session = open_onnx(self.path)
        self.batch, size = self._check_input(size)
        self.preprocess = Preprocess(AdaptFaceImageProcessor(size=size, image_mean=mean, image_std=std))

    def _check_input(self, size: int | None) -> tuple[int | None, int]:
        """Batch size if the file fixes one, and input side."""
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
            found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise ValueError(f"{self.path}: must have one float32 input of shape (B, 3, S, S); found: {found}")
        # A free dimension is a name or None.
        batch, channels, height, width = (d if isinstance(d, int) else None for d in inputs[0].shape)
        fixed = height or width
        if channels not in (3, None) or (height and width and height != width):
            raise ValueError(f"{self.path}: input {inputs[0].shape} is not (B, 3, S, S)")
        if size is None and fixed is None:
            raise ValueError(f"{self.path}: does not fix its input size; give it (onnx_size)")
        if size is not None and fixed is not None and size != fixed:
            raise ValueError(f"{self.path}: takes {fixed} px images, not {size} px")
        return batch, int(size or fixed or 0)

    def describe(self) -> dict[str, Any]:
        """Kind, name, digest of the file, input and scale, JSON-ready."""
        return {
            "kind": "onnx",
            "name": self.name,
            "revision": f"sha256:{self.digest}",
            **_describe_input(self.preprocess.processor),
        }

    def identity(self) -> dict[str, Any] | None:
        """All that an embedding depends on beside the image, JSON-ready."""
        return _identity(self, onnxruntime=version("onnxruntime"))

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        images = pixel_values.numpy()
        count, step = len(images), self.batch or len(images)
        if count % step:  # a fixed batch size: repeat the last image to fill the last batch
            images = np.concatenate([images, np.repeat(images[-1:], -count % step, axis=0)])
        name = self.session.get_inputs()[0].name
        try:
            outputs = [self.session.run(None, {name: images[i : i + step]})[0] for i in range(0, len(images), step)]
        except Exception as error:  # onnxruntime's own classes derive from Exception
            raise ValueError(f"{self.path}: onnxruntime cannot run it on {images.shape[1:]}: {error}") from error
        if outputs[0].ndim != 2 or len(outputs[0]) != step:
            raise ValueError(f"{self.path}: first output has shape {outputs[0].shape}, not ({step}, E)")
        return torch.from_numpy(np.concatenate(outputs)[:count]).float()
