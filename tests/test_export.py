"""Exports and imports, proven by plain peft and plain transformers: those of this environment, and older ones.

`peft_client.py` is what runs on either side.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner

from adaptface import export as export_module
from adaptface.cli import app
from adaptface.export import export_backbone, export_peft, parse_mix, peft_adapter
from configuration_adaptface import AdaptFaceConfig
from image_processing_adaptface import AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel
from tests.conftest import TINY_BACKBONE, build_tiny_model, oldest_python
from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[1]
EXACT = 1e-6
MOVED = 1e-2  # an adapter that changes CLS by less might as well not be there
MIX = [0.2, 0.5, 0.3]
OPTIONS = {"lora_rank": 4, "router_layer": 1, "embedding_size": 16, "image_size": 56}
VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {},
    "attention+mlp": {"adapter_targets": "attention+mlp"},
    "all-linear": {"adapter_targets": "all-linear"},
    "two of three blocks": {"adapter_layers": [0, 2], "adapter_targets": "all-linear"},
    "router reads patches": {"router_layer": 0, "adapter_targets": "all-linear"},
    "alpha / r": {"use_rslora": False, "lora_alpha": 6.0},
    "K = 1": {"domains": ["general"], "router_layer": None, "adapter_targets": "all-linear", "lora_dropout": 0.1},
}


@pytest.fixture(scope="session")
def gated_backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Dinov2 with a gated MLP, the only matrices whose number depends on the version of transformers."""
    folder = tmp_path_factory.mktemp("gated-dinov2")
    torch.manual_seed(1)
    Dinov2Model(Dinov2Config(**TINY_BACKBONE, initializer_range=0.1, use_swiglu_ffn=True)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "images.npy"
    np.save(file, torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(7)).numpy())
    return file


Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session", params=["this", pytest.param("oldest", marks=pytest.mark.slow)])
def ask(request: pytest.FixtureRequest, picture_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Puts tasks to `peft_client.py` under this transformers and peft, then under older ones.

    With `env` they are a stranger's, who talks to another Hub: a process of its own.
    """
    pytest.importorskip("peft")
    old = request.param == "oldest"
    python = oldest_python() if old else sys.executable

    def ask(tasks: list[dict[str, Any]], env: dict[str, str] | None = None) -> list[dict[str, Any]]:
        file = tmp_path_factory.mktemp("ask") / "answer.json"
        job = {"project": str(ROOT), "images": str(picture_file), "answer": str(file), "tasks": tasks}
        if env is None and not old:
            from tests.peft_client import answer

            return answer(job)
        done = subprocess.run(
            [python, str(ROOT / "tests" / "peft_client.py")], input=json.dumps(job), cwd=file.parent,
            env=env or {**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, encoding="utf-8",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        content = json.loads(file.read_text(encoding="utf-8"))
        assert content["versions"]["transformers"].startswith("4.") == old, content["versions"]
        return content["answers"]

    return ask


def mutated(backbone: Path, **options: Any) -> AdaptFaceModel:
    """A model whose adapters are away from the no-op, in eval mode."""
    torch.manual_seed(5)
    model = AdaptFaceModel.from_backbone(backbone, **{**OPTIONS, **options})
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def cls_of(model: AdaptFaceModel, picture_file: Path, mix: list[float] | None = None) -> torch.Tensor:
    """`(B, D)` CLS before the projection in float64, as our own forward computes it under a fixed mix."""
    experts = model.config.num_domains
    weights = torch.tensor(mix or [1 / experts] * experts) if experts > 1 else None
    images = torch.from_numpy(np.load(picture_file)).double()
    precision = model.dtype
    with torch.no_grad():
        output = model.double()(images, domain_weights=weights, output_hidden_states=True)
    model.to(precision)
    return output.last_hidden_state[:, 0]


def differs(seen: list[list[float]], wanted: torch.Tensor | list[list[float]]) -> float:
    return float((torch.tensor(seen).double() - torch.as_tensor(wanted).double()).abs().max())


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------- to PEFT


@pytest.mark.slow
def test_plain_peft_computes_what_we_compute(
    tiny_backbone_dir: Path, gated_backbone_dir: Path, picture_file: Path, tmp_path: Path, ask: Ask
) -> None:
    """Every target, block subset, scaling and kind of mix; both MLPs; experts; and all of it read back as K = 1."""
    tasks: list[dict[str, Any]] = []
    wanted: list[torch.Tensor] = []

    def expect(base: Path, adapter: Path, cls: torch.Tensor) -> None:
        tasks.append({"do": "load", "base": str(base), "adapter": str(adapter)})
        tasks.append({"do": "from_peft", "adapter": str(adapter), "backbone": str(base), "image_size": 56})
        wanted.extend([cls, cls])

    for base in (tiny_backbone_dir, gated_backbone_dir):
        for variant, options in (
            VARIANTS.items() if base is tiny_backbone_dir else [("all-linear", VARIANTS["all-linear"])]
        ):
            model = mutated(base, **options)
            mixes = [None, MIX] if model.config.has_router else [None]
            for mix in [*mixes, [0.5, 0.5, 0.0]] if variant == "all-linear" else mixes:
                folder = tmp_path / base.name / variant.replace("/", "") / str(mix)
                export_peft(model, folder, mix)
                expect(base, folder, cls_of(model, picture_file, mix))
            if variant == "all-linear":
                for k, name in enumerate(model.config.domains):
                    alone = [float(k == other) for other in range(3)]
                    expect(base, folder / "experts" / name, cls_of(model, picture_file, alone))
            assert (folder / "experts").exists() == model.config.has_router

    answers = ask(tasks)
    plain = {str(base): answers[i]["plain"] for i, base in ((0, tiny_backbone_dir), (-2, gated_backbone_dir))}
    for task, seen, cls in zip(tasks, answers, wanted, strict=True):
        assert "error" not in seen, (task, seen["error"])
        assert seen["said"] == [], task
        base = task.get("base") or task["backbone"]
        assert differs(seen["cls"], plain[base]) > MOVED, f"{task}: a no-op"
        assert differs(seen["cls"], cls) < EXACT, task
        assert differs(seen["merged"], cls) < 10 * EXACT, task  # merged weights are float32
    experts = {task["adapter"]: cls for task, cls in zip(tasks, wanted, strict=True) if "experts" in task["adapter"]}
    assert len(experts) == 6
    for a, b in itertools.combinations(experts.values(), 2):
        assert float((a - b).abs().max()) > MOVED


@pytest.mark.parametrize("mix", [None, MIX, [0.0, 1.0, 0.0]])
def test_merged_by_peft_or_by_us_the_weights_are_the_same(
    tiny_backbone_dir: Path, tmp_path: Path, mix: list[float] | None
) -> None:
    peft = pytest.importorskip("peft")
    model = mutated(tiny_backbone_dir, adapter_targets="all-linear")
    export_peft(model, tmp_path / "peft", mix)
    base = Dinov2Model.from_pretrained(tiny_backbone_dir)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "peft").merge_and_unload().state_dict()
    wanted, before = model.merged_backbone(mix).state_dict(), model.backbone.state_dict()
    changed = {name for name, tensor in wanted.items() if not torch.equal(tensor, before[name])}
    assert len(changed) == 3 * 6 + 1
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, atol=EXACT, rtol=0, msg=name)
        assert (name in changed) == (not torch.equal(merged[name], before[name])), name


def test_an_adapter_with_one_set_of_names_is_silently_nothing_elsewhere(
    tiny_backbone_dir: Path, tmp_path: Path, ask: Ask
) -> None:
    """Why the file holds both; and that the other tests would see a no-op."""
    model = mutated(tiny_backbone_dir)
    tasks: list[dict[str, Any]] = [{"do": "load", "base": str(tiny_backbone_dir)} for _ in range(2)]
    for task, pattern in zip(tasks, (r"_proj\.", r"attention\.attention|output\.dense"), strict=True):
        folder = tmp_path / str(len(pattern))
        export_peft(model, folder)
        edit_tensors(folder, lambda tensors, p=pattern: [tensors.pop(k) for k in list(tensors) if not re.search(p, k)])
        task["adapter"] = str(folder)
    moved = [differs(seen["cls"], seen["plain"]) for seen in ask(tasks)]
    assert sorted(value > MOVED for value in moved) == [False, True]
    assert min(moved) == 0


def test_counts_of_dinov2_small() -> None:
    """442,368 parameters an expert, 589,824 as peft counts A of q, k and v; the file names them twice."""
    model = AdaptFaceModel(AdaptFaceConfig(domains=["general"]))
    settings, tensors = peft_adapter(model)
    assert model.summary()["per_expert"] == 442_368
    newer = {name: tensor for name, tensor in tensors.items() if "_proj." in name}
    assert sum(tensor.numel() for tensor in newer.values()) == 589_824
    assert len(tensors) == 2 * len(newer) == 2 * 2 * 4 * 12
    assert (settings["r"], settings["lora_alpha"]) == (16, 64.0)


def test_a_uniform_mix_of_bfloat16_adapters_loses_nothing(tiny_backbone_dir: Path) -> None:
    model = mutated(tiny_backbone_dir)
    assert {t.dtype for t in peft_adapter(model)[1].values()} == {torch.float32}  # bfloat16 would lose something
    assert {t.dtype for t in peft_adapter(model, dtype=torch.bfloat16)[1].values()} == {torch.bfloat16}
    model.adapters.to(torch.bfloat16)
    for mix in (None, [1 / 3] * 3, [0.0, 0.0, 1.0]):
        settings, tensors = peft_adapter(model, mix)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        chosen = slice(2, None) if mix and mix[0] == 0 else slice(None)
        lora = model.adapters["2"]["proj"]
        stem = "base_model.model.encoder.layer.2.attention.o_proj."
        assert torch.equal(tensors[f"{stem}lora_A.weight"], lora.lora_A[chosen].flatten(0, 1))
        assert torch.equal(tensors[f"{stem}lora_B.weight"], lora.lora_B[chosen].flatten(0, 1).T)
        scaling = settings["lora_alpha"] / settings["r"]
        assert math.isclose(scaling, model.config.scaling / (1 if mix and mix[0] == 0 else 3), rel_tol=1e-7)
    assert {tensor.dtype for tensor in peft_adapter(model, MIX)[1].values()} == {torch.float32}


def test_nothing_in_it_tells_where_it_was_made(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    model = mutated(tiny_backbone_dir)
    export_peft(model, tmp_path / "peft")
    export_backbone(model, tmp_path / "backbone", base_license="apache-2.0")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 2 * 4 + 3
    for file in files:
        assert str(tiny_backbone_dir.parent).encode() not in file.read_bytes(), file
        assert file.stat().st_mode & 0o777 == (tmp_path / "peft" / "adapter_config.json").stat().st_mode & 0o777
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == tiny_backbone_dir.name
    assert settings["task_type"] is None
    model.config.backbone, model.config.backbone_revision = "user/base", "0" * 40
    settings, _ = peft_adapter(model)
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("user/base", "0" * 40)


def test_export_is_whole_or_not_at_all(
    tiny_model: AdaptFaceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            export_peft(tiny_model, path)
        with pytest.raises(FileExistsError, match="not an empty folder"):
            export_backbone(tiny_model, path, base_license="apache-2.0")
    export_peft(tiny_model, tmp_path / "empty")
    assert (tmp_path / "empty" / "adapter_model.safetensors").is_file()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    write = export_module._write_adapter
    monkeypatch.setattr(
        export_module, "_write_adapter", lambda folder, *rest: (fail if folder.name == "age" else write)(folder, *rest)
    )
    monkeypatch.setattr(Dinov2Model, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_peft(tiny_model, tmp_path / "new")
    with pytest.raises(OSError, match="disk full"):
        export_backbone(tiny_model, tmp_path / "new", base_license="apache-2.0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["backbone", "peft/backbone"])
def test_a_base_is_not_written_into_a_release(tiny_model: AdaptFaceModel, tmp_path: Path, place: str) -> None:
    tiny_model.save_pretrained(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=rf"{place} lies in the model folder .*, which holds no base"):
        export_backbone(tiny_model, tmp_path / place, base_license="apache-2.0")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_exported_is_refused(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    for adaptation in ("frozen", "full"):
        model = AdaptFaceModel.from_backbone(tiny_backbone_dir, adaptation=adaptation, image_size=56)
        with pytest.raises(ValueError, match=f"adaptation='{adaptation}': there are no adapters"):
            export_peft(model, tmp_path / "peft")
    model = AdaptFaceModel.from_backbone(tiny_backbone_dir, adaptation="frozen", image_size=56)
    with pytest.raises(ValueError, match="nothing to merge"):
        export_backbone(model, tmp_path / "backbone", base_license="apache-2.0")
    for wrong in ("", "other", "apache 2.0", "a/b", "proprietary", "cc-by-nd-4.0", "no-derivatives", "x"):
        with pytest.raises(ValueError, match=rf"'{wrong}' is no licence known .*{tiny_backbone_dir.name}.* as peft"):
            export_backbone(model, tmp_path / "backbone", base_license=wrong)
    model = mutated(tiny_backbone_dir)
    for mix in ([1.0, 1.0, 1.0], [1.0], [math.nan, 0.5, 0.5]):
        with pytest.raises(ValueError, match="domain_weights"):
            peft_adapter(model, mix)
    with pytest.raises(ValueError, match="no router"):
        peft_adapter(mutated(tiny_backbone_dir, domains=["general"], router_layer=None), [1.0])
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------- the Hub

BASE, FACES, WRONG = "user/tiny-dinov2", "user/faces", "user/adapter-in-root"


@pytest.fixture(scope="module")
def hub(tiny_backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Path, Any]]:
    """A loopback Hub with a base, a release with `peft/`, and one with the adapter in its root."""
    tmp = tmp_path_factory.mktemp("peft-hub")
    model = build_tiny_model(tiny_backbone_dir, seed=0)
    with HubServer() as server:
        model.config.backbone, model.config.backbone_revision = BASE, server.commit(BASE, tiny_backbone_dir)
        model.save_pretrained(tmp / "release")
        AdaptFaceImageProcessor(size=56).save_pretrained(tmp / "release")
        wrong = Path(shutil.copytree(tmp / "release", tmp / "wrong"))
        export_peft(model, tmp / "release" / "peft", MIX)
        for file in (tmp / "release" / "peft").glob("adapter_*"):
            shutil.copy(file, wrong)
        server.commit(FACES, tmp / "release")
        server.commit(WRONG, wrong)
        yield server, tmp, model
        assert server.unknown == []


@pytest.mark.slow
def test_by_repo_id_a_release_with_peft_is_a_face_model_and_an_adapter(
    hub: tuple[HubServer, Path, AdaptFaceModel], picture_file: Path, tmp_path: Path, ask: Ask
) -> None:
    """And why the adapter has a folder of its own: in the root it makes AutoModel return the plain base, or fail."""
    server, folders, model = hub
    tasks: list[dict[str, Any]] = [
        {"do": "auto", "source": FACES},
        {"do": "from_peft", "adapter": FACES, "subfolder": "peft", "image_size": 56},
        {"do": "load", "base": BASE, "adapter": FACES, "subfolder": "peft"},
        {"do": "load", "base": BASE, "adapter": FACES, "subfolder": "peft/experts/age"},
        {"do": "load_alone", "adapter": str(folders / "release" / "peft")},
        {"do": "auto", "source": WRONG},
        {"do": "auto", "source": str(folders / "wrong")},
    ]
    mixed, age = cls_of(model, picture_file, MIX), cls_of(model, picture_file, [0, 0, 1])
    assert float((mixed - age).abs().max()) > MOVED
    whole, *computed, remote, local = ask(tasks, server.client_env(tmp_path / "hf_home"))

    before = len(server.requests)
    (snapshot,) = (tmp_path / "hf_home" / "hub" / "models--user--faces" / "snapshots").iterdir()
    tasks[2:] = [{"do": "load", "base": BASE, "adapter": str(snapshot / "peft")}]  # peft loses a subfolder offline
    offline, *cached = ask(tasks, server.client_env(tmp_path / "hf_home", offline=True))
    assert len(server.requests) == before

    for seen in (whole, offline):
        assert "error" not in seen, seen
        assert (seen["class"], seen["parts"]) == ("AdaptFaceModel", ["adapters", "projection", "router"])
    for seen, cls in zip([*computed, *cached], [mixed, mixed, age, mixed, mixed, mixed], strict=True):
        assert "error" not in seen, seen["error"]
        assert differs(seen["cls"], cls) < EXACT
    assert (remote["class"], remote["parts"]) == ("Dinov2Model", []), "wrong, and silently so"
    # from a folder transformers 5 fails, transformers 4 is as wrong
    assert "error" in local or (local["class"], local["parts"]) == ("Dinov2Model", [])


# ----------------------------------------------------------------------------------------------------- from PEFT


def test_a_round_trip_of_one_expert_keeps_rank_alpha_and_tensors(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    model = mutated(tiny_backbone_dir, **VARIANTS["K = 1"], adapter_layers=[0, 2])
    export_peft(model, tmp_path / "peft")
    again = AdaptFaceModel.from_peft(tmp_path / "peft", backbone=tiny_backbone_dir, image_size=56, domains=["faces"])
    for field in ("lora_rank", "scaling", "adapter_targets", "adapter_layers", "lora_dropout", "backbone_sha256"):
        assert getattr(again.config, field) == getattr(model.config, field), field
    wanted = {name: p for name, p in model.named_parameters() if "adapter" in name}
    assert len(wanted) == 2 * (2 * 4 + 1)
    for name, parameter in again.named_parameters():
        if "adapter" in name:
            assert torch.equal(parameter, wanted[name]), name
    assert again.config.domains == ["faces"] and again.router is None and not again.training
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(AdaptFaceModel.from_pretrained(tmp_path / "saved").adapters["0"]["qkv"].lora_A,
                       model.adapters["0"]["qkv"].lora_A)  # fmt: skip


QV = ["q_proj", "v_proj", "query", "value"]  # peft takes those that are there
PATCHES = "embeddings.patch_embeddings.projection"
TRAINED: dict[str, tuple[int, dict[str, Any]]] = {  # rank that is needed here, arguments of LoraConfig
    "query and value": (6, {"r": 3, "lora_alpha": 5, "target_modules": QV}),
    "rsLoRA": (8, {"r": 4, "lora_alpha": 2, "target_modules": QV, "use_rslora": True}),
    "patterns": (
        7,
        {
            "r": 2,
            "lora_alpha": 6,
            "target_modules": QV,
            "rank_pattern": {"(v_proj|value)": 5},
            "alpha_pattern": {"layer.1.*": 3},
        },
    ),
    "one block": (4, {"r": 2, "target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layer"}),
    "MLP and patches": (2, {"r": 2, "target_modules": ["q_proj", "query", "fc2", PATCHES]}),
    "patches alone": (2, {"r": 2, "target_modules": [PATCHES]}),
}


def test_a_lora_trained_by_plain_peft_is_read(
    tiny_backbone_dir: Path, gated_backbone_dir: Path, picture_file: Path, tmp_path: Path, ask: Ask
) -> None:
    """Under either version's names, and on a gated MLP; read by this transformers, whichever one trained it."""
    ranks = {name: rank for name, (rank, _) in TRAINED.items()}
    tasks: list[dict[str, Any]] = [
        {"do": "train", "base": str(tiny_backbone_dir), "out": str(tmp_path / name), **options}
        for name, (_, options) in TRAINED.items()
    ]
    gated = ["gate_proj", "up_proj", "down_proj", "weights_in", "weights_out"]
    out = str(tmp_path / "gated")
    tasks.append({"do": "train", "base": str(gated_backbone_dir), "out": out, "r": 2, "target_modules": gated})
    for task, trained in zip(tasks, ask(tasks), strict=True):
        assert "error" not in trained, (task, trained["error"])
        assert differs(trained["cls"], trained["plain"]) > MOVED / 10, task
        folder = Path(task["out"])
        model = AdaptFaceModel.from_peft(folder, image_size=56)
        fused = any("weights_in" in key for key in load_file(folder / "adapter_model.safetensors"))
        assert model.config.lora_rank == ranks.get(folder.name, 2 if fused else 4)
        assert len(model.config.adapted_layers) == (1 if folder.name in ("one block", "patches alone") else 3)
        assert differs(trained["cls"], cls_of(model, picture_file)) < EXACT, task


def adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """A well-formed adapter of one expert on `base`, in newer and older names."""
    model = mutated(base, **VARIANTS["K = 1"])
    export_peft(model, folder)
    edit_config(folder, **{"base_model_name_or_path": str(base), **settings})
    return folder


Q = "base_model.model.encoder.layer.1.attention.q_proj.lora_"
UNREADABLE: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora True: only plain LoRA"),
    "bias": ({"bias": "lora_only"}, "bias 'lora_only'"),
    "modules_to_save": ({"modules_to_save": ["classifier"]}, "modules_to_save"),
    "LoHa": ({"peft_type": "LOHA"}, "peft_type 'LOHA': only LORA"),
    "no type": ({"peft_type": None}, "peft_type None"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
    "lora_bias": ({"lora_bias": True}, "lora_bias True"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "'pissa' changed the base's weights"),
    "r": ({"r": 0}, "r 0: give a whole number"),
    "r is no number": ({"r": "4"}, "r '4': give a whole number"),
    "alpha": ({"lora_alpha": None}, "lora_alpha None"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": math.inf}}, r"alpha_pattern\['q_proj'\] inf"),
    "no mapping": ({"rank_pattern": [1]}, r"rank_pattern \[1\]: give a mapping"),
    "no pattern": ({"rank_pattern": {"(": 4}}, r"rank_pattern '\(' is no regular expression"),
    "other rank": ({"r": 5}, r"has the shape \(4, .*another rank than adapter_config"),
    "no base": ({"base_model_name_or_path": None}, "base_model_name_or_path is empty.*backbone="),
}


@pytest.mark.parametrize("fault", UNREADABLE)
def test_settings_beyond_plain_lora_are_refused(tiny_backbone_dir: Path, tmp_path: Path, fault: str) -> None:
    settings, words = UNREADABLE[fault]
    adapter(tmp_path / "a", tiny_backbone_dir, **settings)
    with pytest.raises(ValueError, match=words) as caught:
        AdaptFaceModel.from_peft(tmp_path / "a", image_size=56)
    assert str(tmp_path / "a" / "adapter_") in str(caught.value)


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "block of another base": (
        lambda t: rename(t, f"{Q}A.weight", f"{Q}A.weight".replace("layer.1", "layer.3")), "layer.3.*fits no module"
    ),
    "unknown module": (lambda t: rename(t, f"{Q}A.weight", "base_model.model.head.lora_A.weight"), "head.*fits no"),
    "gated": (lambda t: t.update({f"{Q}A.weight".replace("attention.q", "mlp.gate"): torch.ones(4, 32)}), "gate_proj"),
    "magnitudes": (lambda t: t.update({f"{Q}magnitude_vector": torch.ones(32)}), "magnitude_vector.*fits no module"),
    "half": (lambda t: t.pop(f"{Q}B.weight"), r"q_proj.lora_B.weight' is missing"),
    "shape": (lambda t: t.update({f"{Q}B.weight": torch.ones(33, 4)}), r"q_proj.lora_B.* \(33, 4\), not \(32, 4\)"),
    "NaN": (lambda t: t[f"{Q}A.weight"][0].fill_(math.nan), "q_proj.lora_A.weight' holds NaN"),
    "no tensors": (lambda t: t.clear(), "holds no tensor"),
    "two truths": (lambda t: t[f"{Q}B.weight"].mul_(2), "one matrix under two names"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_tensors_are_refused(tiny_backbone_dir: Path, tmp_path: Path, fault: str) -> None:
    change, words = BROKEN[fault]
    edit_tensors(adapter(tmp_path / "a", tiny_backbone_dir), change)
    with pytest.raises(ValueError, match=words) as caught:
        AdaptFaceModel.from_peft(tmp_path / "a", image_size=56)
    assert str(tmp_path / "a" / "adapter_model.safetensors") in str(caught.value)


def test_files_that_are_missing_or_damaged_are_named(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", tiny_backbone_dir)
    with pytest.raises(OSError, match=r"has no sub/adapter_config.json"):
        AdaptFaceModel.from_peft(folder, subfolder="sub")
    edit_config(folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(OSError, match=r"(?s)adapter_config.json: the base .*gone.*backbone="):
        AdaptFaceModel.from_peft(folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="'vit' model"):
        AdaptFaceModel.from_peft(folder, backbone=other)
    (folder / "adapter_model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: the weights file is damaged"):
        AdaptFaceModel.from_peft(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match=r"has no adapter_model.safetensors"):
        AdaptFaceModel.from_peft(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json: it is damaged"):
        AdaptFaceModel.from_peft(folder)


def test_what_the_adapter_determines_is_not_taken(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", tiny_backbone_dir)
    with pytest.raises(TypeError, match=r"from_peft: lora_rank, use_rslora: the adapter determines it"):
        AdaptFaceModel.from_peft(folder, lora_rank=4, use_rslora=False)
    with pytest.raises(TypeError, match=r"nonsense: no field"):
        AdaptFaceModel.from_peft(folder, nonsense=4)
    with pytest.raises(ValueError, match=r"domains=\['a', 'b'\]: a PEFT adapter is one expert"):
        AdaptFaceModel.from_peft(folder, domains=["a", "b"])


def test_what_is_padded_can_train(tiny_backbone_dir: Path, picture_file: Path, tmp_path: Path) -> None:
    """Where the adapter has nothing B is zero, A is not: a rank that can never learn would be a dead weight."""
    folder = adapter(tmp_path / "a", tiny_backbone_dir)
    edit_tensors(folder, lambda t: [t.pop(k) for k in list(t) if "layer.1.attention" in k and "mlp" not in k])
    model = AdaptFaceModel.from_peft(folder, image_size=56)
    lora = model.adapters["1"]["qkv"]
    assert not lora.lora_B.any() and lora.lora_A.abs().min() > 0
    model.train()
    model(torch.from_numpy(np.load(picture_file))).features.square().sum().backward()
    assert lora.lora_B.grad.abs().max() > 0


# --------------------------------------------------------------------------------------------- backbone, command


def test_the_backbone_is_an_ordinary_dinov2(tiny_backbone_dir: Path, picture_file: Path, tmp_path: Path) -> None:
    model = mutated(tiny_backbone_dir)
    export_backbone(model, tmp_path / "b", base_license="apache-2.0", domain_mix=MIX)
    loaded, info = Dinov2Model.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert type(loaded) is Dinov2Model and not any(info.values())
    for name, tensor in model.merged_backbone(MIX).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        cls = loaded.double()(torch.from_numpy(np.load(picture_file)).double()).pooler_output
    assert differs(cls.tolist(), cls_of(model, picture_file, MIX)) < 10 * EXACT
    notice = (tmp_path / "b" / "NOTICE").read_text(encoding="utf-8")
    for words in (tiny_backbone_dir.name, "apache-2.0", "general=0.2, pose=0.5, age=0.3", "changed copy"):
        assert words in notice
    export_backbone(model, tmp_path / "half", base_license="apache-2.0", dtype=torch.bfloat16)
    assert Dinov2Model.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert model.dtype == torch.float32


def test_the_command_exports(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    model = mutated(tiny_backbone_dir)
    model.save_pretrained(tmp_path / "model")

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["export", str(tmp_path / "model"), *words])
        return done.exit_code, done.stdout if "--json" in words else done.output

    code, output = run(str(tmp_path / "b"), "--to", "backbone")
    assert code == 1 and "--base_license ID" in output and tiny_backbone_dir.name in output
    assert not (tmp_path / "b").exists()
    code, output = run(str(tmp_path / "b"), "--to", "backbone", "--base_license", "apache-2.0", "--domain_mix", "pose")
    assert code == 0, output
    merged = model.merged_backbone([0, 1, 0]).state_dict()
    loaded = Dinov2Model.from_pretrained(tmp_path / "b").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in merged.items())
    code, output = run(str(tmp_path / "b"), "--to", "peft")
    assert code == 1 and "not an empty folder" in output
    code, output = run(str(tmp_path / "p"), "--to", "peft", "--dtype", "bfloat16", "--domain_mix", "pose=0.5,age=0.5")
    assert code == 0 and "adapter_model.safetensors" in output
    tensors = load_file(tmp_path / "p" / "adapter_model.safetensors")
    expected = peft_adapter(model, [0, 0.5, 0.5], torch.bfloat16)[1]
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[k], expected[k]) for k in tensors)
    code, output = run(str(tmp_path / "q"), "--to", "peft", "--domain_mix", "smile")
    assert code == 1 and "general, pose, age" in output
    code, output = run(str(tmp_path / "j"), "--to", "peft", "--json")
    said, files = json.loads(output), [path for path in (tmp_path / "j").rglob("*") if path.is_file()]
    assert said["bytes"] == {str(path): path.stat().st_size for path in files} and len(files) == 8
    assert tiny_backbone_dir.name in said["base"]
    code, output = run(str(tmp_path / "q"), "--to", "pickle")
    assert code == 2


def test_a_mix_is_typed_by_name() -> None:
    domains = ["general", "pose", "age"]
    assert parse_mix("age=0.25, general=0.75", domains) == [0.75, 0.0, 0.25]
    assert parse_mix("pose", domains) == [0.0, 1.0, 0.0]
    for wrong in ("smile=1", "pose=0.5,pose=0.5", "pose=half", "", "0.2,0.5,0.3"):
        with pytest.raises(ValueError, match="domain_mix"):
            parse_mix(wrong, domains)
