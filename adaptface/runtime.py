"""One model, several engines: what computes `pixel_values -> features` is one argument.

`torch` is the model itself, on any device, and `torch-compiled` the same by `torch.compile`. The others run on the CPU,
from an ONNX file that is made once and kept.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from adaptface import onnx_export
from adaptface.cache import default_cache_dir
from adaptface.embedders import ModelEmbedder, open_onnx
from adaptface.onnx_export import run_onnx, write_onnx
from modeling_adaptface import AdaptFaceModel

# Engine -> package that runs it; what each is worth stands in docs/deploy.md.
ENGINES = {
    "torch": "torch",
    "torch-compiled": "torch",
    "onnx": "onnxruntime",
    "onnx-int8": "onnxruntime",
    "openvino": "openvino",
    "openvino-bf16": "openvino",
}

Engine = Callable[[torch.Tensor | np.ndarray], tuple[torch.Tensor, torch.Tensor | None]]


def load_engine(model: AdaptFaceModel, name: str, *, cache_dir: Path | None = None) -> Engine:
    """Something to call with `pixel_values` (B, 3, S, S), an array or a tensor, of any batch size B.

    It returns raw features (B, E), float32, and the weights of the experts (B, K), or None without a router. It may be
    called from several threads. All but `torch` and `torch-compiled` compute with the weights that the model has now,
    and with as many threads as torch has now.

    Args:
        model (`AdaptFaceModel`): for all but these two on the CPU. These call it, and put it into evaluation mode.
        name (`str`): one of `ENGINES`.
        cache_dir (`Path`, *optional*): where converted models are kept, which hold the base's weights; default: see
            [`~cache.default_cache_dir`].
    Raises:
        ImportError: a package is missing; names the extra to install.
        OSError: the cache cannot be written.
        ValueError: there is no such engine, the model is on another device, this processor lacks what the engine
            needs, or the model cannot be converted or compiled.
    """
    if name not in ENGINES:
        raise ValueError(f"engine {name!r}: choose one of {', '.join(ENGINES)}")
    if name == "torch":
        return _TorchEngine(model)
    if name == "torch-compiled":
        return _CompiledEngine(model)
    if model.device.type != "cpu":
        raise ValueError(f"engine {name!r} runs on the CPU and the model is on {model.device}: choose 'torch'")
    core: Any = _openvino_core() if ENGINES[name] == "openvino" else None
    if name == "openvino-bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError("engine 'openvino-bf16': this processor has no bfloat16 arithmetic; choose 'openvino'")
    path = _conversion(model, name == "onnx-int8", cache_dir)
    try:
        if core is not None:
            return _OpenVinoEngine(core, path, model.config.image_size, bf16=name == "openvino-bf16")
        return _OnnxEngine(path, model.config.image_size)
    except (ValueError, RuntimeError) as error:  # RuntimeError: OpenVINO's
        raise ValueError(f"{path} cannot be loaded: delete it, and it is made again ({error})") from error


class EngineEmbedder:
    """An [`~embedders.ModelEmbedder`] whose features an engine computes; evaluation takes it like any embedder.

    Args:
        embedder (`ModelEmbedder`): model, processor, name and digest.
        engine, cache_dir: see [`load_engine`], and what it raises.
    """

    def __init__(self, embedder: ModelEmbedder, engine: str, cache_dir: Path | None = None) -> None:
        self.embedder, self.engine = embedder, engine
        self.preprocess = embedder.preprocess
        self.name = f"{embedder.name} ({engine})"
        self._run = load_engine(embedder.model, engine, cache_dir=cache_dir)

    @property
    def device(self) -> torch.device:
        """Where the model is; an engine takes its input there."""
        return self.embedder.device

    def describe(self) -> dict[str, Any]:
        """As the model's embedder does, with the engine."""
        return {**self.embedder.describe(), "name": self.name, "engine": self.engine}

    def identity(self) -> dict[str, Any] | None:
        """As the model's embedder does, with the engine and the version of what runs it."""
        identity = self.embedder.identity()
        package = ENGINES[self.engine]
        return identity and {**identity, "engine": [self.engine, package, version(package)]}

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._run(pixel_values)[0]


class _TorchEngine:
    def __init__(self, model: AdaptFaceModel) -> None:
        self._model: Any = model.eval()
        self._call: Any = model

    def __call__(self, pixel_values: torch.Tensor | np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.no_grad():
            images = torch.as_tensor(pixel_values).to(self._model.device, self._model.dtype)
            output = self._call(images)
        return output.features, output.domain_weights


class _CompiledEngine(_TorchEngine):
    """Compiles for one image now, for other batches when the first one comes, and then no more."""

    def __init__(self, model: AdaptFaceModel) -> None:
        super().__init__(model)
        self._lock = threading.Lock()  # compilers take turns
        self._call = torch.compile(model)
        side = model.config.image_size
        try:
            self(torch.zeros(1, 3, side, side))
        except Exception as error:  # of compilers, which have no class in common
            raise ValueError(
                "engine 'torch-compiled': torch.compile does not work here; on a CPU it needs a C++ compiler "
                f"({(str(error).strip() or type(error).__name__).splitlines()[0]}). Install one, or choose 'torch'"
            ) from error

    def __call__(self, pixel_values: torch.Tensor | np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self._lock:
            return super().__call__(pixel_values)


class _OnnxEngine:
    def __init__(self, path: Path, side: int) -> None:
        self._side = side
        self._session = open_onnx(path)

    def __call__(self, pixel_values: torch.Tensor | np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _named(run_onnx(self._session, _images(pixel_values, self._side)))


class _OpenVinoEngine:
    def __init__(self, core: Any, path: Path, side: int, bf16: bool) -> None:
        self._side = side
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",  # its own choice would be bf16 where there is some
        }
        self._request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
        self._lock = threading.Lock()  # a request runs once at a time

    def __call__(self, pixel_values: torch.Tensor | np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        images = _images(pixel_values, self._side)
        with self._lock:
            found = self._request.infer({"pixel_values": images}).to_dict()  # copies
        return _named({output.get_any_name(): array for output, array in found.items()})


def _named(outputs: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features and, where there are any, domain weights of a graph's outputs."""
    weights = outputs.get("domain_weights")
    return torch.from_numpy(outputs["features"]), None if weights is None else torch.from_numpy(weights)


def _images(pixel_values: torch.Tensor | np.ndarray, side: int) -> np.ndarray:
    """Images as a float32 array; refuses another size than the graph was made for."""
    images = torch.as_tensor(pixel_values).detach().to("cpu", torch.float32).contiguous().numpy()
    if images.shape[1:] != (3, side, side):
        raise ValueError(f"pixel_values of shape {images.shape}: this engine takes (B, 3, {side}, {side})")
    return images


def _openvino_core() -> Any:
    """OpenVINO's entry point, without its telemetry.

    Importing openvino 2025 and 2026 sends an event to Google Analytics, unasked, and leaves an identifier in the user's
    home. Where the package openvino_telemetry is absent openvino does neither; here it is absent while openvino is
    imported.
    """
    hidden = "openvino_telemetry"
    absent = hidden not in sys.modules
    if absent:
        sys.modules[hidden] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise ImportError("this engine needs OpenVINO: pip install 'adaptface[openvino]'") from error
    finally:
        if absent:
            del sys.modules[hidden]
    return openvino.Core()


def _conversion(model: AdaptFaceModel, quantize: bool, cache_dir: Path | None) -> Path:
    """The model as an ONNX file in the cache, made if it is not there; another model is another file."""
    folder = cache_dir or default_cache_dir()
    path = folder / f"model-{_digest(model)[:32]}{'-int8' if quantize else ''}.onnx"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):  # of several processes one converts
            if not path.is_file():
                write_onnx(model, path, quantize=quantize)
                path.chmod(0o600)
    except OSError as error:
        raise OSError(
            f"{path}: the converted model cannot be kept there ({error}); name another folder by cache_dir or "
            "ADAPTFACE_CACHE"
        ) from error
    return path


def _digest(model: AdaptFaceModel) -> str:
    """SHA-256 of all that a conversion depends on: weights as they are now, configuration, code, versions."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    config = json.loads(model.config.to_json_string())
    config.pop("thresholds", None)  # no part of the graph
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in (inspect.getfile(type(model)), onnx_export.__file__):
        digest.update(Path(file).read_bytes())
    packages = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    try:
        digest.update(json.dumps([version(package) for package in packages]).encode())
    except ImportError as error:
        raise ImportError(f"engines run ONNX files ({error}): pip install 'adaptface[onnx]'") from error
    return digest.hexdigest()
