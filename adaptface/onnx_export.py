"""A whole model as one ONNX file, which runs without this project, without torch and without transformers.

The router is in it and mixes the experts for each image; where there is no router the adapters are merged into the
base, which is exact. The file contains the base's weights.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from adaptface import __version__
from adaptface.embedders import open_onnx
from adaptface.export import base_id, notice_of, require_licence, require_outside
from adaptface.files import replacing, without_folders
from modeling_adaptface import AdaptFaceModel

OPSET = 20  # of ONNX 1.15; onnxruntime reads it from 1.17 on
PARITY = 1e-4  # cosine distance between an embedding of the file and the model's, float32
_LARGEST = 2**31 - 1  # bytes of a protobuf message, which an ONNX file without external data is
_NO_LIMIT = 2**40
_SMALL = 64  # values, of which half the bytes are fewer than those of a node


class OnnxExport(NamedTuple):
    """A written file.

    Attributes:
        path (`Path`): the file.
        size (`int`): bytes.
        distance (`float`): largest cosine distance between its embeddings and the model's, of three noise images.
    """

    path: Path
    size: int
    distance: float


def export_onnx(
    model: AdaptFaceModel,
    processor: Any,
    path: Path,
    *,
    base_license: str,
    quantize: bool = False,
    digest: str | None = None,
) -> OnnxExport:
    """Write a model as one ONNX file for others, with all that they need to use it.

    Input `pixel_values` (B, 3, S, S); outputs `features` (B, E), `embeddings` (B, E), of length 1, and with a router
    `domain_weights` (B, K); all float32; B is free, but with int8 it is 1. `metadata_props` holds, each as JSON, what
    to do to an image (`image_size`, `image_mean`, `image_std`, `rescale_factor`, `resample`), `domains` (columns of
    `domain_weights`), `thresholds`, `precision`, and where the weights come from; no folder of this machine.

    Args:
        model (`AdaptFaceModel`): of any device and dtype; it is left as it is.
        processor (`AdaptFaceImageProcessor`): the model's.
        path (`Path`): the file; an earlier one is replaced once the new one is complete.
        base_license (`str`): licence of the base by its id, such as `apache-2.0`; who exports states it, and it is
            written into the file, which contains the base's weights.
        quantize (`bool`): round the matrices to int8, see [`write_onnx`].
        digest (`str`, *optional*): SHA-256 of the model's weights file, to be found again in the metadata.
    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        IsADirectoryError: `path` is a folder.
        ValueError: `base_license` names no licence or one without changed copies, `path` lies in a model folder, the
            processor is another model's, or see [`write_onnx`].
    """
    require_licence(base_license, model)
    require_outside(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file, {path / 'adaptface.onnx'}")
    config = model.config
    if processor.size["height"] != config.image_size:
        raise ValueError(
            f"the processor makes images of {processor.size['height']} px and the model takes {config.image_size} px: "
            "give the processor of this model"
        )
    change = {
        "frozen": "converted to ONNX, with a projection",
        "full": "all weights were trained further and converted to ONNX, with a projection",
        "lora": "low-rank adapters were merged in, converted to ONNX, with a projection",
    }[config.adaptation]
    if config.has_router:
        change = "converted to ONNX, with low-rank adapters, a router and a projection"
    metadata = {
        "adaptface_version": __version__,
        "weights_sha256": digest,
        "backbone": base_id(config.backbone),
        "backbone_revision": config.backbone_revision,
        "backbone_sha256": config.backbone_sha256,
        "base_license": base_license,
        "notice": notice_of(model, change + (" and rounded to int8" if quantize else ""), base_license),
        "precision": "int8" if quantize else "float32",
        "domains": config.domains if config.has_router else [],
        "thresholds": config.thresholds,
        "image_size": processor.size["height"],
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        "rescale_factor": processor.rescale_factor,
        "resample": processor.resample,
    }
    distance = write_onnx(model, path, quantize=quantize, metadata=without_folders(metadata))
    return OnnxExport(path, path.stat().st_size, distance)


def write_onnx(
    model: AdaptFaceModel, path: Path, *, quantize: bool = False, metadata: Mapping[str, Any] | None = None
) -> float:
    """Write the graph of [`export_onnx`], and run it once in onnxruntime before it takes its place.

    Args:
        model, path: see [`export_onnx`].
        quantize (`bool`): matrices of the blocks become int8 (symmetric, a scale for each output, of seven bits so that
            sums do not saturate on processors without VNNI); their inputs are rounded as they come, by one scale for
            all of a batch. The file takes one image at a time, so that no image changes another one's embedding. Patch
            embedding, router, projection and attention stay float32.
        metadata (`dict`, *optional*): goes into the file, each value as JSON.
    Returns:
        Largest cosine distance between embeddings of file and model, of three noise images.
    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: the model is over 2 GB, or the file does not give the model's embeddings; nothing is written.
    Source: onnxruntime, docs/performance/model-optimizations/quantization.md (reduce_range).
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "ONNX files are made with onnx, onnxscript, onnxruntime: pip install 'adaptface[onnx]'"
        ) from error
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    if size > _LARGEST:
        raise ValueError(
            f"{path}: a single ONNX file holds at most 2 GB, this model has {size / 1e9:.1f} GB in float32"
        )
    copied: Any = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
    side = copied.config.image_size
    noise = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = copied(noise).pooler_output
    if copied.router is None and copied.config.adaptation == "lora":
        copied.backbone = copied.merged_backbone().requires_grad_(False)
        copied.adapters, copied.patch_adapter = nn.ModuleDict(), None
    proto = _converted(copied)
    if quantize:
        proto = _quantized(proto)
    _halve(proto)
    for key, value in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(proto.SerializeToString())
        found = torch.from_numpy(run_onnx(open_onnx(partial), noise.numpy())["embeddings"])
        distance = float((1 - F.cosine_similarity(found.double(), expected.double())).max())
        if not distance <= (math.inf if quantize else PARITY):  # NaN included
            raise ValueError(
                f"{path}: not written: onnxruntime gives embeddings that are {distance:.1e} (cosine distance) from the "
                f"model's; torch {torch.__version__} exported it wrongly, use the versions of constraints.txt"
            )
    return distance


def run_onnx(session: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """All outputs of a file for images (B, 3, S, S), by name; one image at a time where the file wants that."""
    names = [output.name for output in session.get_outputs()]
    step = 1 if session.get_inputs()[0].shape[0] == 1 else max(1, len(images))
    parts = [session.run(names, {"pixel_values": images[i : i + step]}) for i in range(0, len(images), step)]
    return {name: np.concatenate(arrays) for name, *arrays in zip(names, *parts, strict=True)}


class _Graph(nn.Module):
    """`pixel_values` (B, 3, S, S) -> features (B, E), embeddings (B, E) and, with a router, domain weights (B, K)."""

    def __init__(self, model: AdaptFaceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(pixel_values, output_hidden_states=False, output_attentions=False)
        found = (output.features, output.pooler_output)
        return found if self.model.router is None else (*found, output.domain_weights)


def _converted(model: AdaptFaceModel) -> Any:
    """The graph as an `onnx.ModelProto`, constants folded, each weight once, without traces of our source files."""
    import onnxscript.optimizer
    from onnx_ir.passes import common

    side = model.config.image_size
    names = ["features", "embeddings", "domain_weights"]
    with _quiet():
        program = torch.onnx.export(
            _Graph(model).eval(),
            (torch.zeros(2, 3, side, side),),
            dynamo=True,
            external_data=False,
            optimize=False,  # below, without the limits that leave stacked matrices and positions to each run
            opset_version=OPSET,
            input_names=["pixel_values"],
            output_names=names[: 2 if model.router is None else 3],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
        assert program is not None
        graph: Any = program.model
        onnxscript.optimizer.optimize(graph, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT)
        common.DeduplicateInitializersPass(size_limit=_NO_LIMIT)(graph)
        common.ClearMetadataAndDocStringPass()(graph)
    proto = program.model_proto
    proto.graph.ClearField("metadata_props")
    proto.graph.ClearField("value_info")  # shapes that any reader infers
    return proto


def _quantized(proto: Any) -> Any:
    """The same with int8 matrices in its blocks."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = Path(folder) / "int8.onnx"
        # The blocks' matrices read tokens and are MatMul; router and projection read one vector an image and are Gemm,
        # of which the quantizer makes MatMul under other names.
        blocks = [node.name for node in proto.graph.node if node.op_type == "MatMul"]
        quantize_dynamic(
            proto, file, op_types_to_quantize=["MatMul"], nodes_to_quantize=blocks, per_channel=True,
            reduce_range=True, weight_type=QuantType.QInt8,
        )  # fmt: skip
        found = onnx.load(file)
    del found.metadata_props[:]  # the quantizer's own, which are no JSON
    for value in (*found.graph.input, *found.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    return found


def _halve(proto: Any) -> None:
    """Keeps in 16 bits the weights whose float32 values these hold exactly, as those of a base or a release in half
    precision are. Engines turn them into float32 once, when they load the file: what they compute stays the same.
    """
    import onnx.helper
    import onnx.numpy_helper

    formats = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}
    casts = []
    for weight in proto.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or math.prod(weight.dims) < _SMALL:
            continue
        values = torch.from_numpy(onnx.numpy_helper.to_array(weight).copy())
        halves = {dtype: values.to(dtype) for dtype in formats}
        exact = [dtype for dtype, half in halves.items() if torch.equal(half.float(), values)]
        if not exact:
            continue
        used, weight.name = weight.name, f"{weight.name}h"
        weight.data_type = formats[exact[0]]
        weight.ClearField("float_data")
        weight.raw_data = halves[exact[0]].view(torch.int16).numpy().astype("<i2").tobytes()
        casts.append(onnx.helper.make_node("Cast", [weight.name], [used], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]  # in the order of their use
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on libraries that it does not need here."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.disable(previous)
