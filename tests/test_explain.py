"""What is shown of a model is what it computes: proven by plain Dinov2, dense updates and counting."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from adaptface.data.sources import open_source
from adaptface.data.synthetic import Nuisance, draw_nuisance, render
from adaptface.explain import (
    attention_maps,
    attention_of,
    look_at_faces,
    look_at_image,
    mix_summaries,
    project,
    router_mix,
    update_norms,
)
from configuration_adaptface import AdaptFaceConfig
from image_processing_adaptface import ARCFACE_TEMPLATE, AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel
from tests.conftest import TINY_BACKBONE

SIZES: dict[str, Any] = {"lora_rank": 4, "router_layer": 1, "embedding_size": 16, "image_size": 56}
VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {},
    "all-linear": {"adapter_targets": "all-linear"},
    "router reads patches": {"router_layer": 0},
    "two of three blocks": {"adapter_layers": [0, 2]},
    "K = 1": {"domains": ["general"], "router_layer": None, "adapter_targets": "attention+mlp"},
    "frozen": {"adaptation": "frozen", "router_layer": None},
    "full": {"adaptation": "full", "router_layer": None},
}


def built(backbone: Path, variant: str = "attention", **more: Any) -> AdaptFaceModel:
    """A model whose router and experts tell images apart."""
    torch.manual_seed(3)
    model = AdaptFaceModel.from_backbone(backbone, **{**SIZES, **VARIANTS[variant], **more})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)
            if name.startswith("router.fc"):
                parameter.normal_(std=0.1)
    return model.eval()


def pixels(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 56, 56, generator=torch.Generator().manual_seed(7))


def processor() -> AdaptFaceImageProcessor:
    return AdaptFaceImageProcessor(size=56)


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_is_that_of_a_plain_dinov2_with_the_image_s_own_mix_merged(
    tiny_backbone_dir: Path, variant: str
) -> None:
    model = built(tiny_backbone_dir, variant).double()  # rounding is not the question
    maps = attention_maps(model, pixels())
    mix = router_mix(model, pixels())
    assert maps.shape == (3, 3, 2, 17, 17) and maps.dtype == np.float32
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-6)
    for image in range(3):
        merged = model.merged_backbone(None if mix is None else mix[image].tolist())
        plain = Dinov2Model(Dinov2Config(**TINY_BACKBONE, attn_implementation="eager")).double().eval()
        plain.load_state_dict(merged.state_dict())
        with torch.no_grad():
            expected = plain(pixels()[image : image + 1].double(), output_attentions=True).attentions
        np.testing.assert_allclose(maps[image], torch.cat(expected).numpy(), atol=1e-6)


def test_the_mix_moves_attention_from_the_router_s_block_on(tiny_backbone_dir: Path) -> None:
    model = built(tiny_backbone_dir)
    mix = router_mix(model, pixels())
    assert mix is not None and np.ptp(mix, axis=0).max() > 0.05, "images are mixed alike: the test below would be empty"
    with torch.no_grad():
        even = model(pixels(), domain_weights=torch.full((3,), 1 / 3), output_attentions=True).attentions
    maps = attention_maps(model, pixels())
    np.testing.assert_array_equal(maps[:, 0], even[0].numpy())  # block 0 comes before the router
    for block in (1, 2):
        assert np.abs(maps[:, block] - even[block].numpy()).max() > 1e-3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_looking_changes_no_embedding(tiny_backbone_dir: Path, implementation: str) -> None:
    """With `output_attentions` the context is computed from the maps that are returned: the embedding is theirs."""
    model = built(tiny_backbone_dir).double()
    model.config._attn_implementation = implementation
    with torch.no_grad():
        used, looked = model(pixels()), model(pixels(), output_attentions=True)
    torch.testing.assert_close(looked.features, used.features, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(looked.embeddings, used.embeddings, atol=1e-6, rtol=0)


def test_the_last_block_s_map_makes_the_embedding(tiny_backbone_dir: Path) -> None:
    """CLS from the map times v, and then the rest of the block, gives the features of an ordinary call."""
    model = built(tiny_backbone_dir, "K = 1", adapter_targets="attention")
    maps = torch.from_numpy(attention_maps(model, pixels()))
    with torch.no_grad():
        output = model(pixels(), output_hidden_states=True)
        merged: Any = model.merged_backbone()
        block, x = merged.encoder.layer[-1], output.hidden_states[-2]
        attention: Any = block.attention
        value = attention.v_proj if hasattr(attention, "v_proj") else attention.attention.value
        out = attention.o_proj if hasattr(attention, "o_proj") else attention.output.dense
        v = value(block.norm1(x)).unflatten(-1, (2, 16)).transpose(1, 2)  # (B, heads, 1 + N, D / heads)
        context = (maps[:, -1] @ v).transpose(1, 2).flatten(2)
        x = x + block.layer_scale1(out(context))
        x = x + block.layer_scale2(block.mlp(block.norm2(x)))
        features = model.projection(merged.layernorm(x)[:, 0])
    torch.testing.assert_close(features, model(pixels()).features, atol=1e-5, rtol=1e-5)


def test_attention_of_a_patch() -> None:
    maps = np.random.default_rng(0).random((3, 2, 10, 10)).astype(np.float32)  # 3 x 3 patches
    seen = attention_of(maps, 1, 1, (2, 0))
    for row in range(3):
        for column in range(3):
            assert seen[row, column] == maps[1, 1, 7, 1 + 3 * row + column]
    np.testing.assert_allclose(attention_of(maps, 2), (maps[2, 0, 0, 1:] + maps[2, 1, 0, 1:]).reshape(3, 3) / 2)
    for wrong, message in (
        ({"block": 3}, "block 3: there are 3, 0 to 2"),
        ({"block": 0, "head": -1}, "head -1: there are 2"),
        ({"block": 0, "patch": (0, 3)}, "patch column 3: there are 3"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_of(maps, **wrong)
    with pytest.raises(ValueError, match=r"attention_maps\(...\)\[0\]"):
        attention_of(maps[None], 0)
    with pytest.raises(ValueError, match="in a square"):
        attention_of(maps[..., :9, :9], 0)


def test_a_model_in_training_is_looked_at_without_noise_and_put_back(tiny_backbone_dir: Path) -> None:
    model = built(tiny_backbone_dir, lora_dropout=0.5)
    still = attention_maps(model, pixels())
    model.train()
    np.testing.assert_array_equal(attention_maps(model, pixels()), still)
    assert model.training


# -------------------------------------------------------------------------------------------------------- the updates


def dense_norms(model: AdaptFaceModel) -> dict[tuple[Any, str, str], tuple[float, float]]:
    """Norms from whole matrices: `delta_weight` of one expert alone, and the state dict's frozen weights by name."""
    state = {name.removeprefix("backbone."): tensor for name, tensor in model.state_dict().items()}
    names = {
        ("qkv", 0): ("q", ("attention.q_proj", "attention.attention.query")),
        ("qkv", 1): ("k", ("attention.k_proj", "attention.attention.key")),
        ("qkv", 2): ("v", ("attention.v_proj", "attention.attention.value")),
        ("proj", 0): ("proj", ("attention.o_proj", "attention.output.dense")),
        ("fc1", 0): ("fc1", ("mlp.fc1",)),
        ("fc2", 0): ("fc2", ("mlp.fc2",)),
    }
    found: dict[tuple[Any, str, str], tuple[float, float]] = {}
    experts = model.config.domains
    for layer in model.config.adapted_layers:
        adapters: Any = model.adapters[str(layer)]
        for (target, part), (matrix, modules) in names.items():
            if target not in adapters:
                continue
            keys = [f"encoder.layer.{layer}.{module}.weight" for module in modules]
            frozen = next(state[key] for key in keys if key in state)
            for k, expert in enumerate(experts):
                delta = adapters[target].delta_weight(torch.eye(len(experts))[k])
                delta = delta[part * len(frozen) : (part + 1) * len(frozen)]
                found[layer, matrix, expert] = (float(delta.norm()), float(delta.norm() / frozen.norm()))
    if model.patch_adapter is not None:
        frozen = state["embeddings.patch_embeddings.projection.weight"]
        for k, expert in enumerate(experts):
            size = float(model.patch_adapter.delta_weight(torch.eye(len(experts))[k]).norm())
            found[None, "patch", expert] = (size, size / float(frozen.norm()))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_norms_are_those_of_the_dense_updates(tiny_backbone_dir: Path, variant: str) -> None:
    model = built(tiny_backbone_dir, variant)
    rows = update_norms(model)
    have = {(row.block, row.matrix, row.expert): (row.norm, row.relative) for row in rows}
    want = dense_norms(model)
    assert len(rows) == len(have) and have.keys() == want.keys()
    assert bool(rows) == (model.config.adaptation == "lora")
    for key, numbers in want.items():
        assert have[key] == pytest.approx(numbers, rel=1e-5), key


def test_a_gated_mlp_has_two_matrices_in(tiny_config: AdaptFaceConfig) -> None:
    config = AdaptFaceConfig(
        backbone_config={**TINY_BACKBONE, "use_swiglu_ffn": True}, adapter_targets="attention+mlp", **SIZES
    )
    model = AdaptFaceModel(config)
    for parameter in model.adapters.parameters():
        torch.nn.init.normal_(parameter)
    have = {(row.block, row.matrix, row.expert): row for row in update_norms(model)}
    adapters: Any = model.adapters["1"]
    delta = adapters["fc1"].delta_weight(torch.tensor([0.0, 1.0, 0.0]))  # (2 * inner, D): gate above up
    mlp: Any = model.backbone.encoder.layer[1].mlp  # type: ignore[union-attr]
    newer = hasattr(mlp, "gate_proj")
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight] if newer else mlp.weights_in.weight.chunk(2)
    for name, part, frozen in zip(("gate", "up"), delta.chunk(2), weights, strict=True):
        assert have[1, name, "pose"].norm == pytest.approx(float(part.norm()), rel=1e-5)
        assert have[1, name, "pose"].relative == pytest.approx(float(part.norm() / frozen.norm()), rel=1e-5)


def test_an_untrained_adapter_has_no_update(tiny_backbone_dir: Path) -> None:
    rows = update_norms(AdaptFaceModel.from_backbone(tiny_backbone_dir, **SIZES))
    assert len(rows) == 3 * 4 * 3 and all(row.norm == row.relative == 0 for row in rows)


# ------------------------------------------------------------------------------------------------- images and folders


def test_a_look_at_an_image_is_what_the_model_makes_of_it(tiny_backbone_dir: Path) -> None:
    model = built(tiny_backbone_dir)
    crop = Image.fromarray(render(4, Nuisance(yaw=20), 56))
    look = look_at_image(model, processor(), crop)
    np.testing.assert_array_equal(np.asarray(look.picture), np.asarray(crop))  # of the model's size: not a pixel moves
    with torch.no_grad():
        output = model(**processor()(crop))
    assert look.norm == pytest.approx(float(output.features.norm()), rel=1e-5)
    np.testing.assert_allclose(look.mix, output.domain_weights[0], atol=1e-6)
    np.testing.assert_array_equal(look.attention, attention_maps(model, processor()(crop)["pixel_values"])[0])


def test_a_photo_is_aligned_by_its_landmarks(tiny_backbone_dir: Path) -> None:
    model = built(tiny_backbone_dir)
    photo = Image.new("RGB", (300, 200), "grey")
    photo.paste(Image.fromarray(render(4, Nuisance(), 112)), (100, 40))
    with pytest.raises(ValueError, match="landmarks"):
        look_at_image(model, processor(), photo)
    look = look_at_image(model, processor(), photo, ARCFACE_TEMPLATE + np.array([100, 40]))
    crop = Image.fromarray(render(4, Nuisance(), 112)).resize((56, 56), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(look.picture, dtype=int) - np.asarray(crop, dtype=int)).max() <= 1


def faces(folder: Path, people: int = 3, images: int = 4, domains: bool = True) -> Path:
    """A folder of rendered faces, an identity a sub-folder; all but one labelled."""
    lines = ["file,domain"]
    rng = np.random.default_rng(0)
    for person in range(people):
        (folder / f"person_{person}").mkdir(parents=True)
        for number in range(images):
            domain = ("general", "pose", "age")[number % 3]
            file = f"person_{person}/{number}.png"
            Image.fromarray(render(2 * person, draw_nuisance(rng, domain), 56)).save(folder / file)
            lines.append(f"{file},{domain if number < images - 1 else ''}")
    if domains:
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("variant", ["attention", "K = 1"])
def test_a_look_at_faces_is_the_looks_at_each(tiny_backbone_dir: Path, tmp_path: Path, variant: str) -> None:
    model = built(tiny_backbone_dir, variant)
    source = open_source(faces(tmp_path / "faces"), domains=None)
    look = look_at_faces(model, processor(), source, most=5, batch_size=5)
    assert len(look.norms) == 12 and look.chosen == source.sample(5) and look.embeddings.shape == (5, 16)
    rows = dict(zip(look.chosen, look.embeddings, strict=True))
    for index in range(12):
        alone = look_at_image(model, processor(), source.image(index))
        assert look.norms[index] == pytest.approx(alone.norm, rel=1e-5)
        if index in rows:
            with torch.no_grad():
                embedding = model(**processor()(source.image(index))).embeddings[0]
            np.testing.assert_allclose(rows[index], embedding, atol=1e-5)
        if look.mix is not None:
            np.testing.assert_allclose(look.mix[index], alone.mix, atol=1e-5)
    assert (look.mix is None) == (variant == "K = 1")
    assert look.domain_labels() == ["general", "pose", "age", "unlabelled"] * 3


def test_faces_without_labels_have_none(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    source = open_source(faces(tmp_path / "faces", 2, 1, domains=False), domains=None)
    assert look_at_faces(built(tiny_backbone_dir), processor(), source).domain_labels() is None


def test_a_face_that_cannot_be_used_is_named(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    folder = faces(tmp_path / "faces", 2, 2)
    Image.new("RGB", (90, 56)).save(folder / "person_1" / "1.png")
    with pytest.raises(ValueError, match=r"person_1/1\.png: .*landmarks"):
        look_at_faces(built(tiny_backbone_dir), processor(), open_source(folder, domains=None))
    (folder / "person_1" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"person_1/1\.png: not a readable image"):
        look_at_faces(built(tiny_backbone_dir), processor(), open_source(folder, domains=None))


def test_distribution_of_mixes() -> None:
    mix = np.array([[0.1, 0.9], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3], [0.9, 0.1]], dtype=np.float32)
    found = mix_summaries(mix, ["pose", "all", "pose", "pose", "all"])
    assert list(found) == ["all", "label all", "pose"]
    everyone = found["all"]
    assert everyone.images == 5
    np.testing.assert_allclose(everyone.mean, [0.5, 0.5], atol=1e-7)
    np.testing.assert_allclose(everyone.first, [0.6, 0.4])
    assert everyone.deciles.shape == (11, 2)
    np.testing.assert_allclose(everyone.deciles[[0, 5, 10], 0], [0.1, 0.6, 0.9], atol=1e-7)
    np.testing.assert_allclose(everyone.deciles[1, 0], 0.1 + 0.4 * (0.2 - 0.1), atol=1e-7)  # the 0.4th of five
    assert found["pose"].images == 3 and found["pose"].first[0] == pytest.approx(2 / 3)
    np.testing.assert_allclose(found["label all"].mean, [0.55, 0.45], atol=1e-7)
    assert list(mix_summaries(mix)) == ["all"]


# ------------------------------------------------------------------------------------------------------- projection


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_few_embeddings_are_laid_out(count: int) -> None:
    rows = np.random.default_rng(1).normal(size=(count, 8)).astype(np.float32)
    places = project(rows)
    assert places.shape == (count, 2) and places.dtype == np.float32 and np.isfinite(places).all()
    assert len(np.unique(places, axis=0)) == count


def clusters() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    labels = np.repeat(np.arange(3), 12)
    rows = rng.normal(size=(3, 16))[labels] + 0.1 * rng.normal(size=(36, 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def nearest_is_of_the_same(places: np.ndarray, labels: np.ndarray) -> bool:
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    return bool((labels[distances.argmin(1)] == labels).all())


def test_tsne_keeps_neighbours_and_is_the_same_each_time() -> None:
    rows, labels = clusters()
    places = project(rows)
    assert nearest_is_of_the_same(places, labels)
    np.testing.assert_array_equal(project(rows), places)


def test_one_point_many_times_has_one_place() -> None:
    np.testing.assert_array_equal(project(np.ones((5, 4), dtype=np.float32)), np.zeros((5, 2)))


def test_what_cannot_be_laid_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = clusters()
    with pytest.raises(ValueError, match="choose one of tsne, umap"):
        project(rows, "pca")
    with pytest.raises(ValueError, match="finite"):
        project(np.full((3, 4), np.nan))
    with pytest.raises(ValueError, match=r"\(0, 4\)"):
        project(np.empty((0, 4)))
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r"pip install 'adaptface\[umap\]'"):
        project(rows, "umap")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_umap_keeps_neighbours_and_is_the_same_each_time() -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    rows, labels = clusters()
    places = project(rows, "umap")
    assert nearest_is_of_the_same(places, labels)
    np.testing.assert_array_equal(project(rows, "umap"), places)
    assert np.isfinite(project(rows[:4], "umap")).all()
    with pytest.raises(ValueError, match="UMAP needs 4 images, here are 3"):
        project(rows[:3], "umap")


# -------------------------------------------------------------------------------------------------------- real faces


@pytest.mark.real_faces
def test_maps_of_a_real_base(real_faces: Path) -> None:
    folder = real_faces.parent / "models" / "dinov2-tiny"
    if not folder.is_dir():
        pytest.skip(f"no base at {folder}")
    model = AdaptFaceModel.from_backbone(folder, image_size=112)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
    model.eval()
    face = next((real_faces / "faces_train").rglob("*.jpg"))
    pixel_values = AdaptFaceImageProcessor(size=112)(face)["pixel_values"]
    maps, mix = attention_maps(model, pixel_values), router_mix(model, pixel_values)
    assert mix is not None
    plain = Dinov2Model.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    plain.load_state_dict(model.merged_backbone(mix[0].tolist()).state_dict())
    with torch.no_grad():
        expected = plain(pixel_values, output_attentions=True).attentions
    np.testing.assert_allclose(maps[0], torch.cat(expected).numpy(), atol=1e-5)
