"""Exported files, run by onnxruntime and compared with the model in PyTorch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from adaptface import onnx_export
from adaptface.embedders import ModelEmbedder, OnnxEmbedder, open_onnx
from adaptface.onnx_export import OnnxExport, export_onnx, run_onnx, write_onnx
from configuration_adaptface import AdaptFaceConfig
from image_processing_adaptface import AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROOT = Path(__file__).resolve().parents[1]
PROCESSOR = AdaptFaceImageProcessor(size=56)
VARIANTS: dict[str, dict[str, Any]] = {
    "K = 3": {"lora_rank": 16},
    "all-linear, router reads patches, other positions": {
        "adapter_targets": "all-linear", "router_layer": 0, "image_size": 28,
    },
    "K = 1": {"domains": ["general"], "router_layer": None, "adapter_targets": "all-linear"},
    "frozen": {"adaptation": "frozen", "router_layer": None},
    "full": {"adaptation": "full", "router_layer": None},
}  # fmt: skip


def build(backbone: Path, **options: Any) -> AdaptFaceModel:
    """A model whose adapters are away from the no-op, and whose router prefers one expert for one image."""
    settings = {"lora_rank": 4, "router_layer": 1, "embedding_size": 16, "image_size": 56, **options}
    torch.manual_seed(5)
    model = AdaptFaceModel.from_backbone(backbone, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.2)
            elif name.startswith("router."):
                parameter.mul_(8)
    return model.eval()


def noise(count: int, side: int = 56) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def run(path: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    return run_onnx(open_onnx(path), images.numpy())


def metadata(path: Path) -> dict[str, Any]:
    return {key: json.loads(text) for key, text in open_onnx(path).get_modelmeta().custom_metadata_map.items()}


@pytest.fixture(scope="session")
def routed(tiny_backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[AdaptFaceModel, OnnxExport]:
    """A model with a router and its file."""
    model = build(tiny_backbone_dir)
    path = tmp_path_factory.mktemp("export") / "new" / "adaptface.onnx"
    return model, export_onnx(model, PROCESSOR, path, base_license="apache-2.0", digest="ab12")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_computes_what_the_model_does(tiny_backbone_dir: Path, tmp_path: Path, name: str) -> None:
    model = build(tiny_backbone_dir, **VARIANTS[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / "model.onnx"
    assert write_onnx(model, path) < 1e-10
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    images = noise(7, model.config.image_size)
    with torch.no_grad():
        expected = model(images)
    for count in (1, 3, 7):
        found = run(path, images[:count])
        assert list(found) == ["features", "embeddings", "domain_weights"][: 2 + model.config.has_router]
        np.testing.assert_allclose(found["features"], expected.features[:count], rtol=0, atol=2e-5)
        np.testing.assert_allclose(found["embeddings"], expected.pooler_output[:count], rtol=0, atol=5e-6)
        if model.config.has_router:
            np.testing.assert_allclose(found["domain_weights"], expected.domain_weights[:count], rtol=0, atol=1e-5)
            assert np.ptp(found["domain_weights"], axis=0).max() > 0.01 or count == 1  # images differ in their mix
    # Every value is there once, and no other: of the base without mask token and at the positions of this image size.
    stored = sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer)
    weights: set[bytes] = set()  # equal tensors, such as zero biases, are stored once
    for key, value in model.state_dict().items():
        if key.endswith("position_embeddings"):
            value = value[:, : 1 + (model.config.image_size // 14) ** 2]
        if not (key.endswith("mask_token") or ("adapter" in key and not model.config.has_router)):
            weights.add(value.numpy().tobytes())
    assert stored <= sum(map(len, weights)) + 1000  # zeros of other lengths, shapes


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_neighbours(routed: tuple[AdaptFaceModel, OnnxExport]) -> None:
    images = noise(7)
    together, backwards = run(routed[1].path, images), run(routed[1].path, images.flip(0))
    for name, values in together.items():
        np.testing.assert_allclose(values, backwards[name][::-1], rtol=0, atol=1e-5)
        alone = np.concatenate([run(routed[1].path, images[i : i + 1])[name] for i in range(7)])
        np.testing.assert_allclose(values, alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_file_says_all_that_its_user_needs_and_nothing_of_this_machine(
    routed: tuple[AdaptFaceModel, OnnxExport], tiny_backbone_dir: Path
) -> None:
    model, export = routed
    assert export.size == export.path.stat().st_size and export.distance < 1e-10
    found = metadata(export.path)
    assert found["domains"] == ["general", "pose", "age"] and found["weights_sha256"] == "ab12"
    assert found["backbone"] == tiny_backbone_dir.name and found["backbone_sha256"] == model.config.backbone_sha256
    assert found["image_size"] == 56 and found["image_mean"] == PROCESSOR.image_mean
    assert found["precision"] == "float32" and found["base_license"] == "apache-2.0"
    assert "apache-2.0" in found["notice"] and "changed copy" in found["notice"]
    content = export.path.read_bytes()
    for text in (str(tiny_backbone_dir.parent), str(ROOT), "modeling_adaptface", "site-packages"):
        assert text.encode() not in content, text


@pytest.mark.slow
def test_evaluation_takes_a_file(routed: tuple[AdaptFaceModel, OnnxExport]) -> None:
    images = noise(3)
    with torch.no_grad():
        expected = ModelEmbedder(routed[0], PROCESSOR)(images)
    torch.testing.assert_close(OnnxEmbedder(routed[1].path)(images), expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_int8(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    model = build(tiny_backbone_dir).bfloat16()  # of any dtype
    path = tmp_path / "int8.onnx"
    export = export_onnx(model, PROCESSOR, path, base_license="apache-2.0", quantize=True)
    found = run(path, noise(3))
    with torch.no_grad():
        expected = model.float()(noise(3))
    distance = 1 - (found["embeddings"] * expected.pooler_output.numpy()).sum(1)
    assert 1e-7 < distance.max() < 0.02 and 1e-7 < export.distance < 0.02
    alone = np.concatenate([run(path, noise(3)[i : i + 1])["features"] for i in range(3)])
    np.testing.assert_array_equal(found["features"], alone)  # int8's scales would be those of the whole batch
    torch.testing.assert_close(OnnxEmbedder(path)(noise(3)), torch.from_numpy(alone))
    assert metadata(path)["precision"] == "int8" and "int8" in metadata(path)["notice"]
    tensors = {t.name: t for t in onnx.load(path).graph.initializer}
    whole = {name for name, t in tensors.items() if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2}
    # qkv, out, fc1, fc2, A and B of qkv and of out for three blocks, qkv and its B cut in two in the last one
    assert len(whole) == 3 * 8 + 2
    kinds = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    floats = {tuple(sorted(t.dims)) for t in tensors.values() if t.data_type in kinds}
    assert floats >= {(16, 32), (32, 256), (3, 256)}  # projection and router


@pytest.mark.slow
def test_weights_in_half_precision_are_stored_in_it(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    model = build(tiny_backbone_dir)
    assert write_onnx(model, tmp_path / "whole.onnx") < 1e-10
    for name, parameter in model.named_parameters():
        # adapters below float16's range, or most of bfloat16's values would be exact in it
        parameter.data = (parameter * 1e-9).bfloat16().float() if "lora_" in name else parameter.half().float()
    assert write_onnx(model, tmp_path / "half.onnx") < 1e-10
    whole, half = (onnx.load(tmp_path / f"{name}.onnx").graph.initializer for name in ("whole", "half"))
    assert sum(len(t.raw_data) for t in half) < 0.51 * sum(len(t.raw_data) for t in whole)
    kinds = {t.data_type for t in half if np.prod(t.dims) >= 64 and t.data_type != onnx.TensorProto.INT64}
    assert kinds == {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


CONSUMER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "adaptface", "onnx", "safetensors"}:
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.slow
def test_the_code_of_the_docs_needs_neither_torch_nor_this_project(
    routed: tuple[AdaptFaceModel, OnnxExport], tmp_path: Path
) -> None:
    model, export = routed
    code = re.search(r"```python\n(import json\n.*?)```", (ROOT / "docs" / "deploy.md").read_text("utf-8"), re.S)
    assert code is not None
    (tmp_path / "adaptface.onnx").write_bytes(export.path.read_bytes())
    rng, pictures = np.random.default_rng(0), []
    for name, side in (("face_a.png", 112), ("face_b.png", 90)):
        pictures.append(Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)))
        pictures[-1].save(tmp_path / name)
    script = CONSUMER + code[1] + "np.savez('found.npz', f=features, e=embeddings, s=similarity)\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(**PROCESSOR(pictures))
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_allclose(found["e"], expected.pooler_output, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["f"], expected.features, rtol=0, atol=2e-5)
    assert abs(float(found["s"]) - float(expected.pooler_output[0] @ expected.pooler_output[1])) < 1e-5


@pytest.mark.slow
def test_a_file_of_dinov2_small_is_no_larger_than_base_and_adapters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AdaptFaceModel(AdaptFaceConfig())
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
    assert write_onnx(model, tmp_path / "small.onnx") < 1e-10
    parts: tuple[dict[str, torch.Tensor], ...] = ({}, {})
    for name, tensor in model.state_dict().items():
        parts[name.startswith("backbone.")][name] = tensor.contiguous()
    adapters, base = (len(save(part)) for part in parts)
    size = (tmp_path / "small.onnx").stat().st_size
    print(f"one file {size:,} bytes; base {base:,} + adapters {adapters:,} = {base + adapters:,}")
    assert size <= base + adapters


@pytest.mark.slow
@pytest.mark.real_faces
def test_parity_on_real_faces(real_faces: Path, tmp_path: Path) -> None:
    base = real_faces.parent / "models" / "dinov2-tiny"
    if not base.is_dir():
        pytest.skip(f"no {base}")
    model = build(base, lora_rank=16, embedding_size=512, image_size=112, router_layer=3)
    path = tmp_path / "model.onnx"
    write_onnx(model, path)
    faces = sorted((real_faces / "faces_dev").rglob("*.jpg"))[:200]
    assert len(faces) == 200
    images = AdaptFaceImageProcessor(size=112)(faces)["pixel_values"]
    with torch.no_grad():
        expected = model(images).pooler_output.double()
    found = torch.from_numpy(run(path, images)["embeddings"]).double()
    distance = float((1 - torch.nn.functional.cosine_similarity(found, expected)).max())
    print(f"largest cosine distance of {len(faces)} real faces: {distance:.2e}")
    assert distance <= 1e-4


# ------------------------------------------------------------------------------------------------------------ refusals


def stand_in(model: AdaptFaceModel) -> Any:
    """A graph that is quick to make and computes other embeddings: the first E pixels of an image."""
    side, width = model.config.image_size, model.config.embedding_size
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    first = helper.make_tensor("first", onnx.TensorProto.INT64, [width], list(range(width)))
    nodes = [
        helper.make_node("Flatten", ["pixel_values"], ["flat"]),
        helper.make_node("Gather", ["flat", "first"], ["embeddings"], axis=1),
    ]
    given = helper.make_tensor_value_info("pixel_values", kind, ["batch", 3, side, side])
    found = helper.make_tensor_value_info("embeddings", kind, ["batch", width])
    graph = helper.make_graph(nodes, "other", [given], [found], [first])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_a_file_that_computes_something_else_is_not_written(
    tiny_model: AdaptFaceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("an earlier one")
    monkeypatch.setattr(onnx_export, "_converted", stand_in)
    with pytest.raises(ValueError, match=r"model\.onnx: not written: .* constraints\.txt"):
        write_onnx(tiny_model, path)
    assert path.read_text() == "an earlier one" and [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("licence", ["", "unknown", "cc-by-nd-4.0"])
def test_the_licence_of_the_base_is_asked_for(tiny_model: AdaptFaceModel, tmp_path: Path, licence: str) -> None:
    with pytest.raises(ValueError, match="base_license"):
        export_onnx(tiny_model, PROCESSOR, tmp_path / "model.onnx", base_license=licence)
    with pytest.raises(ValueError, match="112 px and the model takes 56 px"):
        other = AdaptFaceImageProcessor(size=112)
        export_onnx(tiny_model, other, tmp_path / "model.onnx", base_license="apache-2.0")
    (tmp_path / "config.json").write_text('{"model_type": "adaptface"}')
    with pytest.raises(ValueError, match="lies in the model folder"):
        export_onnx(tiny_model, PROCESSOR, tmp_path / "model.onnx", base_license="apache-2.0")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_model_over_two_gigabytes_is_refused(
    tiny_model: AdaptFaceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "_LARGEST", 1000)
    with pytest.raises(ValueError, match="at most 2 GB"):
        write_onnx(tiny_model, tmp_path / "model.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(
    tiny_model: AdaptFaceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'adaptface\[onnx\]'"):
        write_onnx(tiny_model, tmp_path / "model.onnx")
