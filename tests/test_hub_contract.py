"""The contract with the Hub: one line loads the pinned base and the adapters, silently; a wrong file is an error.

Everything is seen from strangers' processes (`hub_client.py`) that cannot import this project and talk to a loopback
Hub (`hub_server.py`): one with an empty cache, then one offline.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.numpy import load_file, save_file

from adaptface.release import REMARKS
from image_processing_adaptface import AdaptFaceImageProcessor
from tests.conftest import build_tiny_model, oldest_python
from tests.hub_server import HubServer, visit

BASE, FACES = "user/tiny-dinov2", "user/faces"
TENSOR = "adapters.1.qkv.lora_B"
PIPELINE = "Device set to use"  # of transformers 4
LOOSE = 2e-2  # bfloat16 keeps about three digits


@dataclass
class World:
    """What the strangers saw, and what they should have seen."""

    hub: HubServer
    folder: Path
    resaved: Path
    expected: np.ndarray  # (N, E) embeddings of the newest release
    expected_first: np.ndarray  # (N, E) embeddings of the first release
    online: dict[str, Any]
    offline: dict[str, Any]
    offline_requests: list


def _edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | values), encoding="utf-8")


def _set_nan(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].flat[0] = np.nan

    return change


def _sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def _write_faults(hub: HubServer, folder: Path, base: Path, other_base: str, out: Path) -> dict[str, Path]:
    """Copies of the release, each with one thing wrong: name of the fault -> folder."""

    def broken(name: str) -> Path:
        return Path(shutil.copytree(folder, out / name.replace(" ", "_")))

    def publish_base(name: str, change: Callable[[dict[str, np.ndarray]], None]) -> dict[str, str]:
        copy = Path(shutil.copytree(base, out / name))
        _edit_weights(copy, change)
        commit = hub.commit(f"user/{name}", copy)
        return {"backbone": f"user/{name}", "backbone_revision": commit, "backbone_sha256": _sha256(copy)}

    key = "encoder.layer.1.mlp.fc1.weight"
    weights: dict[str, Callable[[dict[str, np.ndarray]], None]] = {
        "nan adapter": _set_nan(TENSOR),
        "missing key": lambda tensors: tensors.pop(TENSOR),  # type: ignore[dict-item]
        "surplus key": lambda tensors: tensors.update({"head.weight": np.zeros((2, 2), np.float32)}),
        "other shape": lambda tensors: tensors.update({"projection.bias": np.zeros(17, np.float32)}),
    }
    configs: dict[str, dict[str, object]] = {
        "base at another revision": {"backbone_revision": other_base},
        "base revision not there": {"backbone_revision": "0" * 40},
        "base not there": {"backbone": "user/nowhere"},
        "base incomplete": {**publish_base("incomplete", lambda tensors: tensors.pop(key))},  # type: ignore[arg-type, return-value]
        "base damaged": {**publish_base("damaged", _set_nan(key))},
    }
    faults = {name: broken(name) for name in [*weights, *configs, "no weights", "no code"]}
    for name, change in weights.items():
        _edit_weights(faults[name], change)
    for name, values in configs.items():
        _edit_config(faults[name], **values)
    (faults["no weights"] / "model.safetensors").unlink()
    (faults["no code"] / "configuration_adaptface.py").unlink()
    return faults


@pytest.fixture(scope="module", params=["this", pytest.param("oldest", marks=pytest.mark.slow)])
def world(
    request: pytest.FixtureRequest, tiny_backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """With clients of this environment, and with those of the oldest transformers that is supported."""
    python = sys.executable if request.param == "this" else oldest_python()
    tmp = tmp_path_factory.mktemp("hub")
    model = build_tiny_model(tiny_backbone_dir, seed=0)
    processor = AdaptFaceImageProcessor(size=56)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    np.save(tmp / "images.npy", pictures)
    pixel_values = processor(list(pictures))["pixel_values"]

    with HubServer() as hub, torch.no_grad():
        commit = hub.commit(BASE, tiny_backbone_dir)
        other = Path(shutil.copytree(tiny_backbone_dir, tmp / "other-base"))
        _edit_weights(other, lambda tensors: tensors.update({k: 2 * v for k, v in tensors.items()}))
        newest_base = hub.commit(BASE, other, parent=commit)  # the base moves on; a release stays where it was pinned
        model.config.backbone, model.config.backbone_revision = BASE, commit

        def release(folder: Path) -> np.ndarray:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            return model(pixel_values).pooler_output.numpy()

        expected_first = release(tmp / "first")
        first = hub.commit(FACES, tmp / "first")
        hub.tag(FACES, "v1", first)
        torch.nn.init.normal_(model.projection.weight)
        folder = tmp / "release"
        expected = release(folder)
        hub.commit(FACES, folder, parent=first)

        named = [
            {"name": "repo", "source": FACES, "resave": str(tmp / "resaved"), "pipeline": True},
            {"name": "bfloat16", "source": FACES, "dtype": "bfloat16"},
            {"name": "tag", "source": FACES, "revision": "v1"},
            {"name": "commit", "source": FACES, "revision": first},
        ]
        faults = _write_faults(hub, folder, tiny_backbone_dir, newest_base, tmp)
        loads = [{"name": "folder", "source": str(folder)}, *named]
        loads += [{"name": f"fault: {name}", "source": str(path)} for name, path in faults.items()]
        loads += [{"name": "fault: no such repository", "source": "user/nobody"}]
        loads += [{"name": "fault: no such revision", "source": FACES, "revision": "v9"}]
        online = visit(hub, tmp, tmp / "images.npy", loads, python=python)
        before = len(hub.requests)
        offline = visit(hub, tmp, tmp / "images.npy", named, offline=True, python=python)
        yield World(hub, folder, tmp / "resaved", expected, expected_first, online, offline, hub.requests[before:])


@pytest.mark.parametrize("name", ["folder", "repo"])
def test_one_line_loads_config_processor_and_model(world: World, name: str) -> None:
    seen = world.online[name]
    assert "error" not in seen, seen
    classes = ["AdaptFaceConfig", "AdaptFaceImageProcessor", "AdaptFaceModel"]
    assert seen["classes"] == [f"transformers_modules.{c}" for c in classes]
    assert seen["dtypes"] == ["torch.float32"] and not seen["training"]
    np.testing.assert_allclose(seen["embeddings"], world.expected, atol=1e-6)


def test_the_pictures_tell_models_apart(world: World) -> None:
    """Without this the comparisons of embeddings could not fail."""
    assert np.abs(world.expected - world.expected_first).max() > 0.1
    assert np.abs(world.expected[0] - world.expected[1]).max() > 1e-3


def test_loading_is_silent(world: World) -> None:
    """No Python warning (an error under -W error), no log record, nothing on standard error, no key left over.

    Exceptions: transformers itself remarks that code came from the Hub, unless a revision is named; and version 4 that
    a processor is not "fast".
    """
    remark = "A new version of the following files was downloaded"
    for place, answer in {"online": world.online, "offline": world.offline}.items():
        for name, seen in answer.items():
            if name.startswith("fault"):
                continue
            assert "error" not in seen, (place, name, seen["error"])
            assert seen["info"] == {}, (place, name)
            remarked = [message for message in seen["messages"] if message.startswith(remark)]
            said = [message for message in seen["messages"] if not message.startswith((*REMARKS, PIPELINE))]
            assert said == remarked, (place, name)
            assert bool(remarked) == ((place, name) == ("online", "repo"))
            printed = seen["stderr"]
            for message in seen["messages"]:
                printed = printed.replace(f"[transformers] {message}", "").replace(message, "")
            assert printed.strip() == "", (place, name)


def test_bfloat16(world: World) -> None:
    for seen in (world.online["bfloat16"], world.offline["bfloat16"]):
        assert seen["dtypes"] == ["torch.bfloat16"]
        np.testing.assert_allclose(seen["embeddings"], world.expected, atol=LOOSE)


@pytest.mark.parametrize("name", ["tag", "commit"])
def test_a_pinned_revision_gives_the_first_release(world: World, name: str) -> None:
    np.testing.assert_allclose(world.online[name]["embeddings"], world.expected_first, atol=1e-6)


def test_the_pipeline_returns_the_embedding(world: World) -> None:
    np.testing.assert_allclose(world.online["repo"]["pipeline"], world.expected, atol=1e-6)


def test_the_cache_serves_offline_without_a_request(world: World) -> None:
    assert world.offline_requests == []
    np.testing.assert_allclose(world.offline["repo"]["embeddings"], world.expected, atol=1e-6)
    np.testing.assert_allclose(world.offline["repo"]["pipeline"], world.expected, atol=1e-6)
    np.testing.assert_allclose(world.offline["tag"]["embeddings"], world.expected_first, atol=1e-6)


def test_saving_holds_adapters_and_modules_only(world: World) -> None:
    modules = {"configuration_adaptface.py", "image_processing_adaptface.py", "modeling_adaptface.py"}
    for folder in (world.folder, world.resaved):
        files = {path.name for path in folder.iterdir() if path.name != "__pycache__"}
        assert files == {"config.json", "model.safetensors", "preprocessor_config.json", *modules}
        names = set(load_file(folder / "model.safetensors"))
        assert TENSOR in names and not [name for name in names if name.startswith("backbone.")]
        for file in ("config.json", "preprocessor_config.json"):
            text = (folder / file).read_text(encoding="utf-8")
            assert "--" not in json.dumps(json.loads(text)["auto_map"]), "the code of a release is its own"
            assert str(folder.parent) not in text
    np.testing.assert_allclose(world.online["repo"]["resaved"]["embeddings"], world.expected, atol=1e-6)
    kept, written = (load_file(folder / "model.safetensors") for folder in (world.folder, world.resaved))
    assert all(np.array_equal(kept[name], written[name]) for name in kept)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nan adapter", ["ValueError", TENSOR, "NaN"]),
        ("missing key", ["ValueError", TENSOR, "missing"]),
        ("surplus key", ["ValueError", "head.weight", "unexpected"]),
        ("other shape", ["ValueError", "projection.bias", "mismatched"]),
        ("no code", ["configuration_adaptface.py"]),
        ("no weights", ["OSError", "model.safetensors", "no_weights"]),
        ("base at another revision", ["ValueError", BASE, "other weights"]),
        ("base revision not there", ["OSError", BASE, "0" * 40]),
        ("base not there", ["OSError", "user/nowhere", "config.backbone"]),
        ("base incomplete", ["ValueError", "user/incomplete", "encoder.layer.1.mlp.fc1.weight"]),
        ("base damaged", ["ValueError", "user/damaged", "layer.1.mlp.fc1.weight", "NaN"]),
        ("no such repository", ["OSError", "user/nobody"]),
        ("no such revision", ["OSError", "v9"]),
    ],
)
def test_a_fault_is_an_error_that_names_it(world: World, fault: str, words: list[str]) -> None:
    seen = world.online[f"fault: {fault}"]
    assert "error" in seen, f"{fault}: loaded as if nothing were wrong"
    assert [word for word in words if word not in seen["error"]] == [], seen["error"]


def test_no_unknown_route(world: World) -> None:
    assert world.hub.unknown == []


def test_the_loopback_hub_speaks_the_clients_language(tmp_path: Path) -> None:
    """`huggingface_hub` reads listings, revisions, parts of files and errors as it would from the Hub."""
    with HubServer() as hub:
        first = hub.commit("user/model", {"a.txt": b"one", "sub/w.bin": b"0123456789"})
        second = hub.commit("user/model", {"a.txt": b"two"}, parent=first)
        hub.tag("user/model", "v1", first)
        api = HfApi(endpoint=hub.url, token=False)
        assert api.model_info("user/model").sha == second and first != second
        assert api.model_info("user/model", revision="v1").sha == first
        assert api.list_repo_files("user/model", revision="v1") == ["a.txt", "sub/w.bin"]
        assert [entry.path for entry in api.list_repo_tree("user/model")] == ["sub", "a.txt"]
        (weights,) = api.list_repo_tree("user/model", "sub")
        assert weights.lfs.sha256 == hashlib.sha256(b"0123456789").hexdigest()
        for revision, content in {"main": "two", "v1": "one"}.items():
            file = api.hf_hub_download("user/model", "a.txt", revision=revision, cache_dir=tmp_path)
            assert Path(file).read_text(encoding="utf-8") == content
        with pytest.raises(EntryNotFoundError):
            api.hf_hub_download("user/model", "b.txt", cache_dir=tmp_path)
        with pytest.raises(RevisionNotFoundError):
            api.hf_hub_download("user/model", "a.txt", revision="v2", cache_dir=tmp_path)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("user/nobody")
        assert hub.unknown == []
