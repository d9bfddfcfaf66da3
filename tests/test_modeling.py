"""The model, proven by second derivations: a naive formula in float64, Hugging Face's own Dinov2, plain counting."""

import copy
import errno
import hashlib
import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from configuration_adaptface import AdaptFaceConfig
from modeling_adaptface import AdaptFaceModel, DomainLoRA
from tests.conftest import TINY_BACKBONE

SIZES = {"lora_rank": 4, "router_layer": 1, "embedding_size": 16, "image_size": 56}


def moved(model: AdaptFaceModel) -> AdaptFaceModel:
    """The model with every trained tensor away from its start, so that nothing is zero by chance."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def images(batch: int = 3, height: int = 56, width: int = 56, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(7)).to(dtype)


# ---------------------------------------------------------------------------------- the naive formula, written apart


def attention_matrices(attention: Any) -> list[Any]:
    """q, k, v and output of a block, by the names of transformers 5 or 4."""
    if hasattr(attention, "q_proj"):
        return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    inner = attention.attention
    return [inner.query, inner.key, inner.value, attention.output.dense]


def naive_features(model: AdaptFaceModel, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and mix, image by image, with W + s * sum_k w_k B_k A_k built as one dense matrix for each image."""
    base: Any = model.backbone
    config = model.config
    experts, heads = config.num_domains, config.backbone_config.num_attention_heads
    scaling = config.lora_alpha / (config.lora_rank**0.5 if config.use_rslora else config.lora_rank)
    rows, mixes = [], []
    for image in pixel_values:
        prior = torch.full((experts,), 1 / experts, dtype=image.dtype)

        def dense(weight: torch.Tensor, adapter: Any, mix: torch.Tensor, first: int = 0) -> torch.Tensor:
            for k in range(experts if adapter is not None else 0):
                update = adapter.lora_B[k].T @ adapter.lora_A[k]  # (out, in)
                weight = weight + scaling * mix[k] * update[first : first + len(weight)]
            return weight

        convolution = base.embeddings.patch_embeddings.projection
        kernel = dense(convolution.weight.flatten(1), model.patch_adapter, prior).view_as(convolution.weight)
        tokens = F.conv2d(image[None], kernel, convolution.bias, stride=kernel.shape[-1])[0].flatten(1).T  # (N, D)
        x = torch.cat([base.embeddings.cls_token[0], tokens]) + base.embeddings.position_embeddings[0]
        mix = prior
        for index, block in enumerate(base.encoder.layer):
            if model.router is not None and index == config.router_layer:
                read = x[0] if index else x[1:].mean(0)
                read = (read - read.mean()) / (read.var(unbiased=False) + 1e-5).sqrt()
                hidden = torch.clamp(model.router.fc1.weight @ read + model.router.fc1.bias, min=0)
                mix = torch.softmax(model.router.fc2.weight @ hidden + model.router.fc2.bias, 0)
            adapters = dict(model.adapters[str(index)].items()) if str(index) in model.adapters else {}
            y = block.norm1(x)
            width = x.shape[1]
            *inputs, out = attention_matrices(block.attention)
            q, k, v = (
                y @ dense(matrix.weight, adapters.get("qkv"), mix, i * width).T + matrix.bias
                for i, matrix in enumerate(inputs)
            )
            heads_out = []
            for h in range(heads):
                part = slice(h * width // heads, (h + 1) * width // heads)
                scores = q[:, part] @ k[:, part].T / (width // heads) ** 0.5
                heads_out.append(scores.softmax(-1) @ v[:, part])
            y = torch.cat(heads_out, 1) @ dense(out.weight, adapters.get("proj"), mix).T + out.bias
            x = x + y * block.layer_scale1.lambda1
            y = block.norm2(x) @ dense(block.mlp.fc1.weight, adapters.get("fc1"), mix).T + block.mlp.fc1.bias
            y = F.gelu(y) @ dense(block.mlp.fc2.weight, adapters.get("fc2"), mix).T + block.mlp.fc2.bias
            x = x + y * block.layer_scale2.lambda1
        rows.append(model.projection(base.layernorm(x)[0]))
        mixes.append(mix)
    return torch.stack(rows), torch.stack(mixes)


VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {},
    "attention+mlp": {"adapter_targets": "attention+mlp"},
    "all-linear": {"adapter_targets": "all-linear"},
    "router reads patches": {"router_layer": 0},
    "router before the last block": {"router_layer": 2},
    "two of three blocks": {"adapter_layers": [0, 2]},
    "alpha / r": {"use_rslora": False, "lora_alpha": 6.0},
    "plain LoRA": {"domains": ["general"], "router_layer": None},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradients_equal_the_naive_formula(tiny_backbone_dir: Path, variant: str) -> None:
    model = AdaptFaceModel.from_backbone(tiny_backbone_dir, **{**SIZES, **VARIANTS[variant]})
    model = moved(model).double().eval()
    pixel_values = images(dtype=torch.float64)
    expected, mix = naive_features(model, pixel_values)
    output = model(pixel_values)
    torch.testing.assert_close(output.features, expected.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.embeddings, (expected / expected.norm(dim=1, keepdim=True)).float())
    if model.router is not None:
        torch.testing.assert_close(output.domain_weights.double(), mix, atol=1e-6, rtol=1e-6)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).double()
    want = torch.autograd.grad((expected * upstream).sum(), list(trained.values()))
    have = torch.autograd.grad((output.features * upstream).sum(), list(trained.values()))
    for name, a, b in zip(trained, have, want, strict=True):
        # the features and the mix are float32 at one point each: 1e-5 of the largest entry
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()), name
        assert float(b.abs().max()) > 0, f"{name} gets no gradient"


def test_custom_function_passes_gradcheck() -> None:
    torch.manual_seed(0)
    lora = DomainLoRA(5, 7, num_domains=2, rank=3, scaling=1.5, dropout=0.0).double()
    weight, bias = torch.randn(7, 5).double(), torch.randn(7).double()
    a, b = torch.randn(2, 3, 5).double().requires_grad_(), torch.randn(2, 3, 7).double().requires_grad_()
    x, mix = torch.randn(2, 4, 5).double().requires_grad_(), torch.rand(2, 2).double().requires_grad_()

    def run(x, mix, a, b):
        return torch.func.functional_call(lora, {"lora_A": a, "lora_B": b}, (x, weight, bias, mix))

    assert torch.autograd.gradcheck(run, (x, mix, a, b))


def test_lora_dropout_masks_the_adapters_input_only() -> None:
    torch.manual_seed(0)
    lora = DomainLoRA(6, 4, num_domains=1, rank=2, scaling=1.0, dropout=0.5).double()
    torch.nn.init.normal_(lora.lora_B)
    weight, mix = torch.randn(4, 6).double(), torch.ones(3, 1).double()
    x = torch.randn(3, 5, 6).double().requires_grad_()
    torch.manual_seed(11)
    y = lora(x, weight, None, mix)
    torch.manual_seed(11)
    mask = F.dropout(torch.ones_like(x), 0.5)
    expected = x @ weight.T + (x * mask) @ (lora.lora_B[0].T @ lora.lora_A[0]).T
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, [x, lora.lora_A, lora.lora_B], upstream),
        torch.autograd.grad(expected, [x, lora.lora_A, lora.lora_B], upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(lora.eval()(x, weight, None, mix), x @ (weight + lora.delta_weight(mix[0]).double()).T,
                               atol=1e-6, rtol=1e-6)  # fmt: skip


# ------------------------------------------------------------------------------------------------ against Dinov2


@pytest.mark.parametrize(("height", "width"), [(56, 56), (84, 84), (42, 70)])
def test_an_untrained_adapter_is_the_base(tiny_backbone_dir: Path, height: int, width: int) -> None:
    model = AdaptFaceModel.from_backbone(tiny_backbone_dir, **SIZES)
    base = Dinov2Model.from_pretrained(tiny_backbone_dir).eval()
    pixel_values = images(2, height, width)
    with torch.no_grad():
        expected = model.projection(base(pixel_values).pooler_output)
        torch.testing.assert_close(model(pixel_values).features, expected, atol=1e-5, rtol=0)


def test_an_untrained_projection_keeps_the_cosines_of_the_base(tiny_backbone_dir: Path) -> None:
    model = AdaptFaceModel.from_backbone(tiny_backbone_dir, **{**SIZES, "embedding_size": 48})
    base = Dinov2Model.from_pretrained(tiny_backbone_dir).eval()
    with torch.no_grad():
        cls, embeddings = F.normalize(base(images()).pooler_output), model(images()).embeddings
    torch.testing.assert_close(embeddings @ embeddings.T, cls @ cls.T, atol=1e-5, rtol=0)


def test_hidden_states_and_attentions_are_those_of_dinov2(tiny_backbone_dir: Path) -> None:
    model = AdaptFaceModel.from_backbone(tiny_backbone_dir, **SIZES)
    base = Dinov2Model.from_pretrained(tiny_backbone_dir, attn_implementation="eager").eval()
    with torch.no_grad():
        output = model(images(), output_hidden_states=True, output_attentions=True)
        expected = base(images(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == len(expected.hidden_states) == 4
    for have, want in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(have, want, atol=1e-5, rtol=0)
    for have, want in zip(output.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(have, want, atol=1e-5, rtol=0)
        torch.testing.assert_close(have.sum(-1), torch.ones_like(have[..., 0]))
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_last_block_of_cls_alone_is_the_full_one(tiny_model: AdaptFaceModel, implementation: str) -> None:
    tiny_model.config._attn_implementation = implementation
    widths: list[torch.Size] = []
    tiny_model.backbone.layernorm.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape))
    short, full = tiny_model(images()), tiny_model(images(), output_hidden_states=True)
    assert widths == [(3, 1, 32), (3, 17, 32)]  # CLS is all that the short one computed
    assert short.last_hidden_state is None and full.last_hidden_state.shape == (3, 17, 32)
    torch.testing.assert_close(short.features, full.features, atol=2e-6, rtol=1e-5)


def test_gated_mlp_bases_work_too() -> None:
    config = AdaptFaceConfig(
        backbone_config={**TINY_BACKBONE, "use_swiglu_ffn": True}, adapter_targets="attention+mlp", **SIZES
    )
    model = AdaptFaceModel(config).eval()
    with torch.no_grad():
        expected = model.projection(model.backbone(images()).pooler_output)
        torch.testing.assert_close(model(images()).features, expected, atol=1e-5, rtol=0)
    moved(model)
    merged, mix = model.merged_backbone(), torch.full((3,), 1 / 3)
    with torch.no_grad():
        expected = model.projection(merged(images()).pooler_output)
        torch.testing.assert_close(model(images(), domain_weights=mix).features, expected, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ properties


def test_an_embedding_does_not_depend_on_its_neighbours(tiny_model: AdaptFaceModel) -> None:
    pixel_values = images(5)
    together = tiny_model(pixel_values)
    for i in range(5):
        alone = tiny_model(pixel_values[i : i + 1])
        torch.testing.assert_close(alone.features[0], together.features[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.domain_weights[0], together.domain_weights[i], atol=1e-5, rtol=0)
    broken = pixel_values.clone()
    broken[1:] = float("nan")
    torch.testing.assert_close(tiny_model(broken).features[0], together.features[0], atol=1e-5, rtol=0)


def test_the_mix_depends_on_the_image(tiny_model: AdaptFaceModel) -> None:
    moved(tiny_model)
    weights = tiny_model(images(5)).domain_weights
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    assert weights.detach().std(0).max() > 1e-4


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", "all-linear"])
def test_merged_under_a_fixed_mix_equals_unmerged(tiny_backbone_dir: Path, targets: str) -> None:
    model = moved(AdaptFaceModel.from_backbone(tiny_backbone_dir, adapter_targets=targets, **SIZES)).eval()
    mix = torch.tensor([0.2, 0.5, 0.3])
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    merged = model.merged_backbone(mix)
    assert type(merged) is Dinov2Model
    with torch.no_grad():
        expected = model(images(), domain_weights=mix).features
        torch.testing.assert_close(model.projection(merged(images()).pooler_output), expected, atol=1e-5, rtol=1e-4)
        other = model.projection(model.merged_backbone([1, 0, 0])(images()).pooler_output)
        assert float((other - expected).abs().max()) > 1e-3
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_domain_weights_are_taken_and_checked(tiny_model: AdaptFaceModel) -> None:
    rows = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    mixed = tiny_model(images(), domain_weights=rows)
    for i in range(3):
        one = tiny_model(images()[i : i + 1], domain_weights=rows[i])
        torch.testing.assert_close(one.features[0], mixed.features[i], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"domain_weights of shape \(2,\).*general, pose, age"):
        tiny_model(images(), domain_weights=torch.ones(2))
    for wrong in ([1.0, 1.0, 1.0], [2.0, -1.0, 0.0], [math.nan, 0.5, 0.5]):
        with pytest.raises(ValueError, match="at least 0 that sum to 1"):
            tiny_model(images(), domain_weights=torch.tensor(wrong))
    with pytest.raises(ValueError, match=r"pixel_values of shape \(3, 56, 56\)"):
        tiny_model(images()[0])


def trained_names(model: AdaptFaceModel) -> set[str]:
    model.train()
    model(images()).features.square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    return {name.split(".")[0] for name in with_gradient}


def test_gradients_reach_what_trains_and_nothing_else(tiny_backbone_dir: Path) -> None:
    build: Callable[..., AdaptFaceModel] = AdaptFaceModel.from_backbone
    assert trained_names(build(tiny_backbone_dir, **SIZES)) == {"adapters", "router", "projection"}
    plain = {**SIZES, "domains": ["general"], "router_layer": None}
    assert trained_names(build(tiny_backbone_dir, **plain)) == {"adapters", "projection"}
    assert trained_names(build(tiny_backbone_dir, adaptation="frozen", **SIZES)) == {"projection"}
    assert trained_names(build(tiny_backbone_dir, adaptation="full", **SIZES)) == {"backbone", "projection"}


def test_gradient_checkpointing_changes_nothing_but_computes_blocks_twice(
    tiny_model: AdaptFaceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    block = AdaptFaceModel._block
    monkeypatch.setattr(AdaptFaceModel, "_block", lambda self, i, *rest: computed.append(i) or block(self, i, *rest))

    def gradients() -> list[torch.Tensor]:
        tiny_model.zero_grad()
        torch.manual_seed(0)
        tiny_model(images()).features.square().sum().backward()
        return [p.grad.clone() for p in tiny_model.parameters() if p.requires_grad]

    tiny_model.train()
    plain = gradients()
    assert computed == [0, 1, 2]
    tiny_model.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b)
    assert computed[3:] == [0, 1, 2, 2, 1, 0]  # again on the way back


def test_a_mix_is_refused_where_there_is_none(tiny_backbone_dir: Path) -> None:
    for options in ({"domains": ["general"]}, {"adaptation": "frozen"}):
        model = AdaptFaceModel.from_backbone(tiny_backbone_dir, **{**SIZES, "router_layer": None, **options})
        with pytest.raises(ValueError, match="no router"):
            model(images(), domain_weights=torch.ones(1))


def test_router_and_projection_leave_autocast(tiny_model: AdaptFaceModel) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        logits, output = tiny_model.router(x), tiny_model(images(), output_hidden_states=True)
    assert torch.equal(logits, tiny_model.router(x))
    expected = F.linear(
        output.last_hidden_state[:, 0].float(), tiny_model.projection.weight, tiny_model.projection.bias
    )
    assert torch.equal(output.features, expected)


def test_autocast_and_a_base_held_in_bfloat16(tiny_model: AdaptFaceModel) -> None:
    exact = tiny_model(images()).embeddings.detach()
    for hold in (False, True):
        if hold:
            tiny_model.backbone.to(torch.bfloat16)
        tiny_model.train()
        with torch.autocast("cpu", torch.bfloat16):
            output = tiny_model(images())
        assert output.features.dtype == output.embeddings.dtype == torch.float32
        assert (output.embeddings.detach() * exact).sum(1).min() > 0.99
        output.features.square().sum().backward()
        for name, parameter in tiny_model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name
        tiny_model.zero_grad()


# ---------------------------------------------------------------------------------------------------------- counts


def numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("targets", "per_expert"),
    [("attention", 442_368), ("attention+mlp", 1_179_648), ("all-linear", 1_179_648 + 16 * (588 + 384))],
)
def test_counts_on_dinov2_small(targets: str, per_expert: int) -> None:
    with torch.device("meta"):
        model = AdaptFaceModel(AdaptFaceConfig(adapter_targets=targets))
    counts = model.summary()
    assert counts["per_expert"] == per_expert
    assert counts["adapters"] == 3 * per_expert
    assert counts["router"] == 384 * 256 + 256 + 256 * 3 + 3 == 99_331
    assert counts["projection"] == 384 * 512 + 512 == 197_120
    assert counts["base"] == numel(model.backbone)
    assert counts["trainable"] == 3 * per_expert + 99_331 + 197_120
    assert counts["percent_trainable"] == pytest.approx(100 * counts["trainable"] / numel(model))
    assert f"3 x {per_expert:,}" in model.summary_table()
    if targets == "attention":
        assert counts["trainable"] == 1_623_555


def test_one_domain_is_plain_lora_without_a_router() -> None:
    with torch.device("meta"):
        model = AdaptFaceModel(AdaptFaceConfig(domains=["general"]))
    assert model.router is None
    assert model.summary()["trainable"] == 442_368 + 197_120


# ----------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_bit_for_bit_without_the_base(
    tiny_model: AdaptFaceModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    moved(tiny_model).to(dtype)
    tiny_model.save_pretrained(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert not [key for key in saved if key.startswith("backbone.")]
    assert {key.split(".")[0] for key in saved} == {"adapters", "router", "projection"}
    assert (tmp_path / "model" / "modeling_adaptface.py").is_file()
    modes = {file.suffix: file.stat().st_mode for file in (tmp_path / "model").iterdir()}
    assert modes[".safetensors"] == modes[".json"]  # whoever may read the one may read the other
    assert not json.loads((tmp_path / "model" / "config.json").read_text())["backbone_config"].get("_name_or_path")
    loaded, info = AdaptFaceModel.from_pretrained(tmp_path / "model", dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == loaded.backbone.dtype == dtype and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(images()).features, tiny_model(images()).features)


def test_no_weight_of_the_base_is_saved_under_another_name(tiny_model: AdaptFaceModel, tmp_path: Path) -> None:
    own = tiny_model.state_dict()
    for state in (
        {f"_orig_mod.{name}": tensor for name, tensor in own.items()},
        {f"module.{name}": tensor for name, tensor in own.items()},
        tiny_model.backbone.state_dict(),
        own | {"head.weight": torch.zeros(2, 2)},
    ):
        with pytest.raises(ValueError, match="no tensors of this model; give its own state dict"):
            tiny_model.save_pretrained(tmp_path, state_dict=state)
    assert list(tmp_path.iterdir()) == []


def test_sharded_and_full_models_load(tiny_model: AdaptFaceModel, tiny_backbone_dir: Path, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    with torch.no_grad():
        loaded = AdaptFaceModel.from_pretrained(tmp_path / "sharded")
        assert torch.equal(loaded(images()).features, tiny_model(images()).features)

        full = moved(AdaptFaceModel.from_backbone(tiny_backbone_dir, adaptation="full", **SIZES))
        full.config.backbone = "nowhere/at-all"  # a full model needs no base
        full.save_pretrained(tmp_path / "full")
        loaded = AdaptFaceModel.from_pretrained(tmp_path / "full")
        assert torch.equal(loaded(images()).features, full(images()).features)
        assert loaded.backbone.embeddings.cls_token.requires_grad


def test_copies_and_pickles(tiny_model: AdaptFaceModel) -> None:
    expected = tiny_model(images()).features
    for twin in (copy.deepcopy(tiny_model), pickle.loads(pickle.dumps(tiny_model))):
        torch.testing.assert_close(twin(images()).features, expected)  # memory is laid out anew: last digits may differ


def test_auto_model_builds_the_architecture(tiny_config: AdaptFaceConfig) -> None:
    assert AdaptFaceModel._from_config(tiny_config)(images()).embeddings.shape == (3, 16)
    with pytest.raises(RuntimeError, match="no base"):
        AdaptFaceModel(tiny_config, defer_backbone=True)(images())
    assert "adaptface" not in AutoModel._model_mapping._extra_content  # or the local class would win over remote code


@pytest.fixture
def saved(tiny_model: AdaptFaceModel, tmp_path: Path) -> Path:
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "adapters.1.qkv.lora_A"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(KEY), f"missing keys: {KEY}"),
        (lambda t: t.update(stranger=torch.zeros(2)), "unexpected keys: stranger"),
        (lambda t: t.update({KEY: torch.zeros(3, 5, 32)}), f"mismatched keys: {KEY}"),
        (lambda t: t[KEY].view(-1)[:1].fill_(float("nan")), f"'{KEY}' holds NaN"),
        (lambda t: t["projection.bias"][:1].fill_(float("inf")), "'projection.bias' holds NaN or inf"),
    ],
)
def test_damaged_adapters_are_refused_by_name(saved: Path, edit: Callable[..., Any], message: str) -> None:
    change(saved, edit)
    with pytest.raises(ValueError, match=message):
        AdaptFaceModel.from_pretrained(saved)


def test_a_disk_without_space_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", fill)
    with pytest.raises(OSError, match=r"model: its files could not be stored.*No space left.*Check the space"):
        AdaptFaceModel.from_pretrained(saved)


def point_to(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **values}), encoding="utf-8")


def test_other_bases_are_refused(saved: Path, tiny_backbone_dir: Path, tmp_path: Path) -> None:
    point_to(saved, backbone=str(tmp_path / "gone"))
    with pytest.raises(OSError, match=r"gone.*could not be loaded"):
        AdaptFaceModel.from_pretrained(saved)

    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"empty.*could not be loaded: .*config\.json"):
        AdaptFaceModel.from_backbone(tmp_path / "empty")

    def refused(message: str, **values: Any) -> None:
        base = tmp_path / "base"
        digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
        point_to(saved, backbone=str(base), **{"backbone_sha256": digest, **values})
        with pytest.raises(ValueError, match=message):
            AdaptFaceModel.from_pretrained(saved)

    Dinov2Model(Dinov2Config(**TINY_BACKBONE)).save_pretrained(tmp_path / "base")
    refused("has other weights.*SHA-256", backbone_sha256="0" * 64)
    refused("pins no base", backbone_sha256=None)
    Dinov2Model(Dinov2Config(**{**TINY_BACKBONE, "hidden_size": 48})).save_pretrained(tmp_path / "base")
    refused("hidden_size 48 instead of 32")
    ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path / "base")
    refused("'vit' model")

    whole = Dinov2Model.from_pretrained(tiny_backbone_dir)
    whole.save_pretrained(tmp_path / "base")
    change(tmp_path / "base", lambda t: t.pop("encoder.layer.1.norm1.weight"))
    refused("incomplete.*encoder.layer.1.norm1.weight")
    whole.save_pretrained(tmp_path / "base")
    change(tmp_path / "base", lambda t: t["layernorm.weight"].fill_(float("nan")))
    refused("'layernorm.weight' holds NaN")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no model\.safetensors"):
        AdaptFaceModel.from_backbone(tmp_path / "base", **SIZES)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_attention_heads", 4), ("mlp_ratio", 3), ("patch_size", 7), ("qkv_bias", False),
     ("use_swiglu_ffn", True), ("hidden_act", "relu"), ("layer_norm_eps", 1e-3)],
)  # fmt: skip
def test_a_base_that_computes_otherwise_is_refused(saved: Path, tmp_path: Path, field: str, value: Any) -> None:
    """Of the same digest: a changed config.json alone must not pass."""
    shutil.copytree(Path(AdaptFaceConfig.from_pretrained(saved).backbone), tmp_path / "base")
    point_to(tmp_path / "base", **{field: value})
    point_to(saved, backbone=str(tmp_path / "base"))
    with pytest.raises(ValueError, match=f"not the one this model was made for: {field} {value!r} instead of"):
        AdaptFaceModel.from_pretrained(saved)


def test_a_base_brings_no_dropout_along(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(Path(AdaptFaceConfig.from_pretrained(saved).backbone), tmp_path / "base")
    point_to(tmp_path / "base", hidden_dropout_prob=0.5, drop_path_rate=0.5)
    point_to(saved, backbone=str(tmp_path / "base"))
    loaded = AdaptFaceModel.from_pretrained(saved)
    assert not [m for m in loaded.backbone.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    assert loaded.backbone.config.drop_path_rate == 0


@pytest.mark.parametrize("cut", [0, 5, 600])
def test_cut_off_weights_are_named(saved: Path, tmp_path: Path, cut: int) -> None:
    base = Path(AdaptFaceConfig.from_pretrained(saved).backbone)
    shutil.copytree(base, tmp_path / "base")
    for folder, load in ((saved, AdaptFaceModel.from_pretrained), (tmp_path / "base", AdaptFaceModel.from_backbone)):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:cut])
        with pytest.raises(ValueError, match=rf"{folder.name}.*damaged or cut off"):
            load(folder)


@pytest.mark.parametrize(
    "override", [{"lora_alpha": math.nan}, {"router_layer": 99}, {"lora_rank": 0}, {"adapter_targets": "nonsense"}]
)
def test_overrides_are_checked_like_the_configuration(saved: Path, override: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"AdaptFaceConfig.{next(iter(override))}="):
        AdaptFaceModel.from_pretrained(saved, **override)


def test_misspelt_fields_are_refused(tiny_backbone_dir: Path) -> None:
    with pytest.raises(TypeError, match="lora_rnak: no field of AdaptFaceConfig"):
        AdaptFaceModel.from_backbone(tiny_backbone_dir, lora_rnak=8)


def test_adapters_of_a_random_base_are_not_saved(tiny_config: AdaptFaceConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base is random or unknown"):
        AdaptFaceModel(tiny_config).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_where_to_look_on_the_hub_reaches_the_base(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(AdaptFaceModel, "_load_backbone", lambda self, hub: seen.append(hub))
    AdaptFaceModel.from_pretrained(saved, cache_dir="/somewhere", local_files_only=True, token="t", revision="main")
    assert seen == [{"cache_dir": "/somewhere", "local_files_only": True, "token": "t"}]


def test_sharded_bases_are_loaded_and_checked(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    base = Dinov2Model.from_pretrained(tiny_backbone_dir)
    base.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    model = AdaptFaceModel.from_backbone(tmp_path / "base", **SIZES)
    shards = sorted((tmp_path / "base").glob("*.safetensors"))
    digests = "".join(hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards)
    assert model.config.backbone_sha256 == hashlib.sha256(digests.encode()).hexdigest()
    model.save_pretrained(tmp_path / "model")
    AdaptFaceModel.from_pretrained(tmp_path / "model")
    shard = sorted((tmp_path / "base").glob("*.safetensors"))[-1]
    tensors = {name: tensor + 1 for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="other weights"):
        AdaptFaceModel.from_pretrained(tmp_path / "model")


@pytest.mark.slow
def test_compiles_as_one_graph(tiny_model: AdaptFaceModel) -> None:
    compiled = torch.compile(tiny_model, fullgraph=True)
    with torch.no_grad():
        for mix in (None, torch.tensor([0.2, 0.3, 0.5])):
            expected = tiny_model(images(), domain_weights=mix).features
            torch.testing.assert_close(compiled(images(), domain_weights=mix).features, expected, atol=1e-5, rtol=1e-4)


def test_stays_on_one_device(tiny_model: AdaptFaceModel, tmp_path: Path) -> None:
    """Adapters and base of a block meet in one sum: no map may part them."""
    tiny_model.save_pretrained(tmp_path)
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    for device_map, device in (("auto", best.type), ("balanced", best.type), ("cpu", "cpu"), ({"": "cpu"}, "cpu")):
        loaded = AdaptFaceModel.from_pretrained(tmp_path, device_map=device_map)
        assert {parameter.device.type for parameter in loaded.parameters()} == {device}
    for several in ({"adapters": 0, "projection": 1}, {"adapters": "cpu", "router": "disk", "projection": "cpu"}):
        with pytest.raises(ValueError, match="names several devices: this model stays on one"):
            AdaptFaceModel.from_pretrained(tmp_path, device_map=several)


@pytest.mark.parametrize("content", ["{", "[]", '"dinov2"'])
def test_a_damaged_config_of_the_base_is_named(tiny_backbone_dir: Path, tmp_path: Path, content: str) -> None:
    base = Path(shutil.copytree(tiny_backbone_dir, tmp_path / "base"))
    (base / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"base .*base': its config.json is damaged"):
        AdaptFaceModel.from_backbone(base)


@pytest.mark.real_faces
def test_real_base_untrained_equals_dinov2(real_faces: Path) -> None:
    folder = real_faces.parent / "models" / "dinov2-tiny"
    model = AdaptFaceModel.from_backbone(folder, image_size=112)
    base = Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
    pixel_values = images(2, 112, 112)
    with torch.no_grad():
        expected = model.projection(base(pixel_values).pooler_output)
        torch.testing.assert_close(model(pixel_values).features, expected, atol=1e-5, rtol=0)


def test_a_pickle_is_not_written(tiny_model: AdaptFaceModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safe_serialization=False: only safetensors are read again"):
        tiny_model.save_pretrained(tmp_path / "model", safe_serialization=False)
    assert not (tmp_path / "model").exists()
