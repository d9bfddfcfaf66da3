"""Engines, compared with the model in PyTorch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adaptface import runtime
from adaptface.embedders import ModelEmbedder
from adaptface.embedding import embed_images
from adaptface.runtime import ENGINES, EngineEmbedder, load_engine
from image_processing_adaptface import AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel
from tests.conftest import build_tiny_model

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("onnx", "onnxruntime", "onnxscript", "openvino")


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(3))


def need(*packages: str) -> None:
    """Skip without them. They are not imported: `import openvino` alone would send telemetry."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no {package}")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversions of `tiny_model`, which is the same in each test."""
    need(*PACKAGES)
    return tmp_path_factory.mktemp("engines") / "new"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were converted, in place of converting."""
    done: list[Path] = []

    def write(model: AdaptFaceModel, path: Path, *, quantize: bool = False) -> float:
        done.append(path)
        path.write_bytes(b"graph")
        return 0.0

    monkeypatch.setattr(runtime, "write_onnx", write)
    monkeypatch.setattr(runtime, "_OnnxEngine", lambda path, side: path)
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bound"), [("torch-compiled", 1e-5), ("onnx", 1e-5), ("openvino", 1e-5), ("onnx-int8", 0.15)]
)
def test_an_engine_computes_what_the_model_does(
    tiny_model: AdaptFaceModel, cache: Path, name: str, bound: float
) -> None:
    engine = load_engine(tiny_model, name, cache_dir=cache)
    with torch.no_grad():
        expected = tiny_model(noise(7))
    for images in (noise(7), noise(7).numpy(), noise(7)[:1], noise(7).flip(-1).flip(-1)[:3]):
        features, weights = engine(images)
        assert features.dtype == torch.float32 and features.shape == (len(images), 16) and weights is not None
        wanted = expected.features[: len(images)]
        assert ((features - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < bound
        torch.testing.assert_close(weights, expected.domain_weights[: len(images)], rtol=0, atol=bound)
    first, _ = engine(noise(7))
    engine(noise(7).flip(0))
    torch.testing.assert_close(first, engine(noise(7))[0])  # no view of memory that the next call writes to
    if not name.startswith("torch"):
        with pytest.raises(ValueError, match=r"takes \(B, 3, 56, 56\)"):
            engine(torch.zeros(1, 3, 70, 70))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch-compiled", "onnx", "openvino"])
def test_threads_may_share_an_engine(tiny_model: AdaptFaceModel, cache: Path, name: str) -> None:
    engine = load_engine(tiny_model, name, cache_dir=cache)
    batches = [noise(40)[i : i + 1 + i % 3] for i in range(36)]
    alone = [engine(batch)[0] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(alone, pool.map(lambda batch: engine(batch)[0], batches), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_model_without_a_router_has_no_weights(tiny_backbone_dir: Path, cache: Path) -> None:
    model = AdaptFaceModel.from_backbone(tiny_backbone_dir, domains=["general"], embedding_size=16, image_size=56)
    for name in ("torch", "onnx", "openvino"):
        features, weights = load_engine(model, name, cache_dir=cache)(noise(2))
        assert features.shape == (2, 16) and weights is None


@pytest.mark.slow
def test_openvino_talks_to_nobody(tiny_model: AdaptFaceModel, cache: Path, tmp_path: Path) -> None:
    load_engine(tiny_model, "openvino", cache_dir=cache)
    (file,) = [path for path in cache.glob("model-*.onnx") if "int8" not in path.name and holds_router(path)]
    script = f"""
import sys, time
from pathlib import Path
import numpy as np
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen", "os.system"):
        print(event, arguments)
sys.addaudithook(watch)
from adaptface.runtime import _openvino_core, _OpenVinoEngine
engine = _OpenVinoEngine(_openvino_core(), Path({str(file)!r}), 56, False)
print(engine(np.zeros((2, 3, 56, 56), np.float32))[0].shape)
time.sleep(1)
"""
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([2, 16])\n"
    assert not [path for path in tmp_path.rglob("*") if "intel" in path.name.lower()]  # where consent would be kept


def holds_router(path: Path) -> bool:
    return b"domain_weights" in path.read_bytes()


def test_torch_is_the_model_itself(tiny_model: AdaptFaceModel) -> None:
    tiny_model.train()
    engine = load_engine(tiny_model, "torch")
    with torch.no_grad():
        expected = tiny_model.eval()(noise(3))
    for images in (noise(3), noise(3).numpy()):
        features, weights = engine(images)
        assert torch.equal(features, expected.features) and weights is not None and not features.requires_grad
        assert torch.equal(weights, expected.domain_weights)
    with torch.no_grad():
        tiny_model.projection.bias.add_(1)
    torch.testing.assert_close(engine(noise(3))[0], expected.features + 1)


def test_a_model_is_converted_once(
    tiny_model: AdaptFaceModel, tiny_backbone_dir: Path, tmp_path: Path, conversions: list[Path]
) -> None:
    need("onnx", "onnxruntime", "onnxscript")
    folder = tmp_path / "cache"
    first: Any = load_engine(tiny_model, "onnx", cache_dir=folder)
    assert load_engine(build_tiny_model(tiny_backbone_dir, 1), "onnx", cache_dir=folder) == first
    tiny_model.config.thresholds = {"operating_points": [], "calibration": {"slope": 1.0, "intercept": 0.0}}
    assert load_engine(tiny_model, "onnx", cache_dir=folder) == first
    assert conversions == [first] and first.parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700 and first.stat().st_mode & 0o777 == 0o600

    assert load_engine(tiny_model, "onnx-int8", cache_dir=folder) != first  # another graph
    weight = tiny_model.backbone.encoder.layer[1].mlp.fc1.weight
    with torch.no_grad():
        weight[0, 0] += 1e-6 * weight[0, 0].sign()  # of the base, by a last bit or so
    assert load_engine(tiny_model, "onnx", cache_dir=folder) != first
    tiny_model.config.lora_alpha = 8.0  # what a copy of the model would be built with
    assert load_engine(tiny_model, "onnx", cache_dir=folder) not in conversions[:3]
    assert len(conversions) == len(set(conversions)) == 4


def test_the_users_cache_is_the_default(
    tiny_model: AdaptFaceModel, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("onnx", "onnxruntime", "onnxscript")
    monkeypatch.setenv("ADAPTFACE_CACHE", str(tmp_path / "mine"))
    found: Any = load_engine(tiny_model, "onnx")
    assert found.parent == tmp_path / "mine"
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be kept there .* ADAPTFACE_CACHE"):
        load_engine(tiny_model, "onnx", cache_dir=tmp_path / "file")


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_a_damaged_conversion_is_named(
    tiny_model: AdaptFaceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    need(*PACKAGES)
    monkeypatch.setattr(runtime, "write_onnx", lambda model, path, quantize: path.write_bytes(b"graph"))
    with pytest.raises(ValueError, match=r"model-\w+\.onnx cannot be loaded: delete it"):
        load_engine(tiny_model, name, cache_dir=tmp_path)


def test_refusals(tiny_model: AdaptFaceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"engine 'tensorrt': choose one of torch, torch-compiled, onnx, .*openvino"):
        load_engine(tiny_model, "tensorrt")

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return ["FP32", "INT8"]

    with monkeypatch.context() as patched:
        patched.setattr(runtime, "_openvino_core", Core)
        with pytest.raises(ValueError, match="no bfloat16 arithmetic; choose 'openvino'"):
            load_engine(tiny_model, "openvino-bf16", cache_dir=tmp_path)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "openvino", None)
        with pytest.raises(ImportError, match=r"pip install 'adaptface\[openvino\]'"):
            load_engine(tiny_model, "openvino", cache_dir=tmp_path)
    elsewhere = tiny_model.to("meta")  # stands for a GPU
    for name in ENGINES:
        if not name.startswith("torch"):
            with pytest.raises(ValueError, match=f"{name}.* on meta: choose 'torch'"):
                load_engine(elsewhere, name, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "precision"), [("openvino", "f32"), ("openvino-bf16", "bf16")])
def test_openvino_computes_as_asked(
    tiny_model: AdaptFaceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "BF16"]

        def read_model(self, path: Path) -> Path:
            return path

        def compile_model(self, model: Path, device: str, settings: dict[str, Any]) -> Any:
            asked.append((device, settings))
            return SimpleNamespace(create_infer_request=lambda: None)

    monkeypatch.setattr(runtime, "_openvino_core", Core)
    monkeypatch.setattr(runtime, "write_onnx", lambda model, path, quantize: path.touch())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    load_engine(tiny_model, name, cache_dir=tmp_path)
    ((device, settings),) = asked
    assert device == "CPU" and settings["INFERENCE_PRECISION_HINT"] == precision
    assert (settings["INFERENCE_NUM_THREADS"], settings["NUM_STREAMS"]) == (7, 1)


def test_without_a_compiler_nothing_is_compiled(tiny_model: AdaptFaceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(model: Any) -> Any:
        def call(images: torch.Tensor) -> Any:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler \(InvalidCxxCompiler: .* found\)\. Install one, or"):
        load_engine(tiny_model, "torch-compiled")


def test_evaluation_takes_an_engine(
    tiny_model: AdaptFaceModel, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("onnxruntime")
    processor = AdaptFaceImageProcessor(size=56)
    model = ModelEmbedder(tiny_model, processor, "mine", digest="ab12")
    pictures = [np.random.default_rng(i).integers(0, 256, (60, 60, 3), dtype=np.uint8) for i in range(3)]
    embedder = EngineEmbedder(model, "torch")
    assert embedder.name == "mine (torch)" and embedder.describe()["engine"] == "torch"
    np.testing.assert_array_equal(
        embed_images(embedder, pictures, progress=False), embed_images(model, pictures, progress=False)
    )
    other = EngineEmbedder(model, "onnx", tmp_path)
    kept = [embedder.identity(), other.identity(), model.identity()]  # features of one engine are not another's
    assert all(kept) and len({str(identity) for identity in kept}) == 3
    assert EngineEmbedder(ModelEmbedder(tiny_model, processor), "torch").identity() is None  # a live model
