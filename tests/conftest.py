"""Fixtures shared by all tests: one tiny model, one tiny base on disk, the optional real faces."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from configuration_adaptface import AdaptFaceConfig
from modeling_adaptface import AdaptFaceModel, tensors_sha256

TINY_BACKBONE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 14,
    "image_size": 56,
    "layerscale_value": 0.5,
}


@pytest.fixture(autouse=True, scope="session")
def cache_of_embeddings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests keep nothing in the user's cache, and find nothing there."""
    os.environ["ADAPTFACE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Dinov2 of three blocks, hidden size 32, with weights large enough to tell blocks apart."""
    folder = tmp_path_factory.mktemp("tiny-dinov2")
    torch.manual_seed(0)
    base = Dinov2Model(Dinov2Config(**TINY_BACKBONE, initializer_range=0.2))
    base.save_pretrained(folder)
    return folder


def replace_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Give a model folder other weights, as if it had been saved with them; the header stays."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        header = file.metadata()
    save_file(tensors, folder / "model.safetensors", metadata=header)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["tensors_sha256"] = tensors_sha256(tensors)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def tiny_config() -> AdaptFaceConfig:
    """The configuration that most tests share: K = 3 experts of rank 4 on a three-block Dinov2."""
    return AdaptFaceConfig(
        backbone="tiny",
        backbone_config=dict(TINY_BACKBONE),
        lora_rank=4,
        router_layer=1,
        embedding_size=16,
        image_size=56,
    )


def build_tiny_model(backbone: Path, seed: int) -> AdaptFaceModel:
    """A model on `backbone` whose adapters have been moved away from the no-op, in eval mode."""
    torch.manual_seed(seed)
    model = AdaptFaceModel.from_backbone(backbone, lora_rank=4, router_layer=1, embedding_size=16, image_size=56)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def tiny_model(tiny_backbone_dir: Path) -> AdaptFaceModel:
    """[`build_tiny_model`] on `tiny_backbone_dir`."""
    return build_tiny_model(tiny_backbone_dir, seed=1)


@pytest.fixture(scope="session")
def real_faces() -> Path:
    """The folder of real development faces; tests that need it skip where it is not."""
    folder = os.environ.get("ADAPTFACE_REAL_FACES")
    if not folder:
        pytest.skip("real faces are not here: set ADAPTFACE_REAL_FACES to the folder that holds faces_train")
    path = Path(folder)
    if not (path / "faces_train").is_dir():
        pytest.fail(f"ADAPTFACE_REAL_FACES={folder} has no folder faces_train")
    return path


def oldest_python() -> str:
    """An interpreter with the libraries of constraints-oldest.txt; skips the test where there is none."""
    python = os.environ.get("ADAPTFACE_OLD_PYTHON")
    if python is None:
        pytest.skip("no older transformers: set ADAPTFACE_OLD_PYTHON to an interpreter with constraints-oldest.txt")
    return python
