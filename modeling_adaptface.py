"""The whole model in one file: domain-aware LoRA, the router that mixes its experts, the model and its output.

For every adapted matrix W with input x and image b,

    y = W x + s * sum_k w[b, k] * B_k A_k x

is evaluated as *one* LoRA of rank K * r, whose hidden columns are scaled per image by `w`.

Source: LoRA, arXiv:2106.09685 eq. 3; rsLoRA scaling, arXiv:2312.03732; the per-image mixture is ours. The frozen
base is DINOv2, arXiv:2304.07193, as implemented by transformers.
"""

import copy
import hashlib
import inspect
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel
from transformers.utils import ModelOutput, cached_file
from transformers.utils.hub import extract_commit_hash

try:
    from .configuration_adaptface import AdaptFaceConfig  # type: ignore[import-not-found]
except ImportError:  # imported as a script beside its siblings, not as a package
    from configuration_adaptface import AdaptFaceConfig

_DAMAGED = "the weights file is damaged or cut off; fetch it or save it again"
_FETCH = "Fetch them again by from_pretrained(..., force_download=True), or save the model again."

# Patterns of tensors' names in earlier releases, and what stands in their place now; see UPGRADING.md.
RENAMED_KEYS: dict[str, str] = {}

# What says where to look on the Hub; the rest of `from_pretrained`'s arguments concern the adapters only.
_HUB_OPTIONS = ("cache_dir", "local_files_only", "token", "proxies", "force_download")
# Arguments of `save_pretrained` that concern its push.
_PUSH_OPTIONS = (
    "repo_id", "token", "private", "commit_message", "commit_description", "create_pr", "revision", "tags",
)  # fmt: skip
_SAME_ARCHITECTURE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "patch_size", "num_channels",
    "qkv_bias", "use_swiglu_ffn", "hidden_act", "layer_norm_eps",
)  # fmt: skip


@dataclass
class AdaptFaceOutput(ModelOutput):
    """Output of [`AdaptFaceModel`].

    Args:
        pooler_output (`torch.FloatTensor` of shape `(B, E)`): L2-normalised embeddings, float32.
        features (`torch.FloatTensor` of shape `(B, E)`): embeddings before normalisation, float32. Margin heads and
            the flip test take these; their norm follows the image's quality.
        domain_logits (`torch.FloatTensor` of shape `(B, K)`, *optional*): the router's logits; None without a router.
        domain_weights (`torch.FloatTensor` of shape `(B, K)`, *optional*): the mix that was used; rows sum to 1.
        last_hidden_state (`torch.FloatTensor` of shape `(B, 1 + N, D)`, *optional*): normalised tokens of the last
            block; computed only with `output_hidden_states` or `output_attentions`, since embeddings need CLS alone.
        hidden_states (`tuple` of L + 1 tensors of shape `(B, 1 + N, D)`, *optional*): input of the first block and
            output of each block.
        attentions (`tuple` of L tensors of shape `(B, heads, 1 + N, 1 + N)`, *optional*): attention of each block.
    """

    pooler_output: torch.Tensor | None = None
    features: torch.Tensor | None = None
    domain_logits: torch.Tensor | None = None
    domain_weights: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    @property
    def embeddings(self) -> torch.Tensor | None:
        """`(B, E)` L2-normalised embeddings; another name of `pooler_output`."""
        return self.pooler_output


class _MixedLowRankLinear(torch.autograd.Function):
    """`x W^T + b + s * ((x A^T) * w) B` with W and b frozen.

    Keeps its inputs and the narrow `x A^T` for the backward pass, and none of the copies that autograd's own chain of
    operators would keep; adds the update in place.
    """

    @staticmethod
    def forward(ctx, x, adapter_x, weight, bias, lora_a, lora_b, mix, scaling):
        # x, adapter_x (B, N, in); weight (out, in); lora_a (K, r, in); lora_b (K, r, out); mix (B, K)
        low = _low_rank(x if adapter_x is None else adapter_x, lora_a)  # (B, N, K, r)
        ctx.save_for_backward(x if adapter_x is None else adapter_x, low, weight, lora_a, lora_b, mix)
        ctx.shared_input, ctx.scaling = adapter_x is None, scaling
        y = F.linear(x, weight, bias)  # (B, N, out)
        y.flatten(0, 1).addmm_(_mixed(low, mix).flatten(0, 1), lora_b.flatten(0, 1), alpha=scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, low, weight, lora_a, lora_b, mix = ctx.saved_tensors
        needs_x, needs_adapter_x, _, _, needs_a, needs_b, needs_mix, _ = ctx.needs_input_grad
        a, b = lora_a.flatten(0, 1), lora_b.flatten(0, 1)  # (K * r, in), (K * r, out)
        grad_y = grad_y.flatten(0, 1)  # (B * N, out)

        grad_x = grad_adapter_x = grad_a = grad_b = grad_mix = None
        if needs_b:
            mixed = _mixed(low, mix).flatten(0, 1)  # (B * N, K * r)
            grad_b = (mixed.t() @ grad_y).mul_(ctx.scaling).view_as(lora_b)
        grad_low = (grad_y @ b.t()).mul_(ctx.scaling).view_as(low)  # (B, N, K, r), before the mix
        if needs_mix:
            grad_mix = (grad_low * low).sum((1, 3))
        grad_low = _mixed(grad_low, mix).flatten(0, 1)  # (B * N, K * r)
        if needs_a:
            grad_a = (grad_low.t() @ x.flatten(0, 1)).view_as(lora_a)
        if needs_x:
            grad_x = grad_y @ weight
            if ctx.shared_input:
                grad_x.addmm_(grad_low, a)
            grad_x = grad_x.view_as(x)
        if needs_adapter_x:
            grad_adapter_x = (grad_low @ a).view_as(x)
        return grad_x, grad_adapter_x, None, None, grad_a, grad_b, grad_mix, None


def _low_rank(x: torch.Tensor, lora_a: torch.Tensor) -> torch.Tensor:
    """`x A^T` of all experts at once: `(B, N, in) -> (B, N, K, r)`."""
    return F.linear(x, lora_a.flatten(0, 1)).unflatten(-1, lora_a.shape[:2])


def _mixed(low: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Each expert's columns times its weight in this image: `(B, N, K, r), (B, K) -> (B, N, K * r)`."""
    return (low * mix[:, None, :, None]).flatten(2)


class DomainLoRA(nn.Module):
    """K low-rank experts on one frozen matrix, mixed by weights that belong to each image.

    The vocabulary is PEFT's (`r`, `lora_A`, `lora_B`, scaling). `lora_B` starts at zero, so that a new adapter changes
    nothing. Several matrices that read the same input (q, k and v) are adapted as one: they share `lora_A`.

    Args:
        in_features (`int`): width of the input.
        out_features (`int`): width of the output, all fused matrices together.
        num_domains (`int`): number K of experts.
        rank (`int`): rank r of each expert.
        scaling (`float`): factor s of the update.
        dropout (`float`): dropout on the adapter's input in training.
    Source: LoRA, arXiv:2106.09685, eq. 3; the mixture is ours.
    """

    def __init__(
        self, in_features: int, out_features: int, num_domains: int, rank: int, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(num_domains, rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(num_domains, rank, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PEFT's start: A uniform as in `nn.Linear`, B zero."""
        bound = 1 / math.sqrt(self.lora_A.shape[-1])  # kaiming_uniform_(a=sqrt(5)) of each (r, in) expert
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)

    def forward(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        domain_weights: torch.Tensor,
        columns: slice = slice(None),
    ) -> torch.Tensor:
        """Applies the frozen matrix and the mixed update.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(B, N, in_features)`): token features.
            weight (`torch.FloatTensor` of shape `(out, in_features)`, *optional*): the frozen matrix; None gives the
                update alone.
            bias (`torch.FloatTensor` of shape `(out,)`, *optional*): its bias.
            domain_weights (`torch.FloatTensor` of shape `(B, K)`): mixing weights, rows sum to 1.
            columns (`slice`): the part of `out_features` that `weight` computes, `out` wide.
        Returns:
            `torch.FloatTensor` of shape `(B, N, out)`.
        """
        x = hidden_states
        a, b = self.lora_A.to(x.dtype), self.lora_B[..., columns].to(x.dtype)
        mix = domain_weights.to(x.dtype)
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout > 0 else None
        trains = torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or mix.requires_grad)
        if trains and weight is not None and not weight.requires_grad:
            return _MixedLowRankLinear.apply(x, dropped, weight, bias, a, b, mix, self.scaling)
        update = _mixed(_low_rank(x if dropped is None else dropped, a), mix) @ b.flatten(0, 1) * self.scaling
        return update if weight is None else F.linear(x, weight, bias) + update

    @torch.no_grad()
    def delta_weight(self, domain_mix: torch.Tensor) -> torch.Tensor:
        """The update of the matrix under a fixed mix.

        Args:
            domain_mix (`torch.FloatTensor` of shape `(K,)`): mixing weights.
        Returns:
            `torch.FloatTensor` of shape `(out_features, in_features)`, float32, or float64 of float64 weights.
        """
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        mix, a, b = (part.to(self.lora_A.device, dtype) for part in (domain_mix, self.lora_A, self.lora_B))
        return self.scaling * torch.einsum("k,kro,kri->oi", mix, b, a)

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        (experts, rank, width), out = self.lora_A.shape, self.lora_B.shape[-1]
        return f"in={width}, out={out}, experts={experts}, r={rank}, scaling={self.scaling:g}, p={self.dropout}"


class DomainRouter(nn.Module):
    """Reads one feature an image and weighs the experts: LayerNorm (no weights), `D -> hidden -> ReLU -> dropout -> K`.

    Args:
        in_features (`int`): width D of the feature.
        hidden_size (`int`): width of the hidden layer.
        num_domains (`int`): number K of experts.
        dropout (`float`): dropout of the hidden layer in training.
    """

    def __init__(self, in_features: int, hidden_size: int, num_domains: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_size)
        self.fc2 = nn.Linear(hidden_size, num_domains)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(B, D)` features -> `(B, K)` logits, computed at the weights' precision whatever autocast says."""
        with torch.autocast(features.device.type, enabled=False):
            features = F.layer_norm(features.to(self.fc1.weight.dtype), features.shape[-1:])
            return self.fc2(self.dropout(F.relu(self.fc1(features))))


class AdaptFacePreTrainedModel(PreTrainedModel):
    """Ties [`AdaptFaceConfig`] to transformers' loading, saving and weight initialisation."""

    config_class = AdaptFaceConfig
    base_model_prefix = "adaptface"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: list[str] = []  # noqa: RUF012  (declared so by transformers)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only torch.nn.init functions: transformers guards them, so that they never overwrite loaded tensors.
        if isinstance(module, DomainLoRA):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
            if module is getattr(self, "projection", None) and module.weight.dtype.itemsize >= 4:
                # Orthonormal columns keep the base's inner products: an untrained model is the zero-shot base. They
                # exist where E >= D; a narrower projection starts with orthonormal rows and keeps them roughly.
                nn.init.orthogonal_(module.weight)


class AdaptFaceModel(AdaptFacePreTrainedModel):
    """DINOv2 with domain-aware LoRA: an aligned face -> a 512-d embedding.

    The model owns adapters, router and projection. The frozen base comes from `config.backbone` at
    `config.backbone_revision` and is never saved. `AdaptFaceModel(config)` gives the architecture with random weights;
    [`~AdaptFaceModel.from_backbone`] starts from a pretrained base, [`~AdaptFaceModel.from_pretrained`] loads a
    trained model.

    Args:
        config (`AdaptFaceConfig`): the architecture.
        defer_backbone (`bool`): leave the base out; whoever asks for it loads it afterwards.
    """

    def __init__(self, config: AdaptFaceConfig, defer_backbone: bool = False) -> None:
        """The architecture with random weights; see the class."""
        config._validate()  # again: `from_pretrained(..., name=value)` sets fields after the configuration was made
        super().__init__(config)
        base: Dinov2Config = config.backbone_config
        width, shapes = base.hidden_size, target_shapes(base)

        def lora(target: str) -> DomainLoRA:
            in_features, parts = shapes[target]
            return DomainLoRA(
                in_features, sum(parts), config.num_domains, config.lora_rank, config.scaling, config.lora_dropout
            )

        targets = ("qkv", "proj") if config.adapter_targets == "attention" else ("qkv", "proj", "fc1", "fc2")
        self.adapters = nn.ModuleDict()
        self.patch_adapter = None
        for layer in config.adapted_layers:
            self.adapters[str(layer)] = nn.ModuleDict({target: lora(target) for target in targets})
        if config.adapted_layers and config.adapter_targets == "all-linear":
            self.patch_adapter = lora("patch")
        self.router = None
        if config.has_router:
            self.router = DomainRouter(width, config.router_hidden_size, config.num_domains, config.router_dropout)
        self.projection = nn.Linear(width, config.embedding_size)

        # Not under the name `base_model_prefix`: transformers would strip it from the keys.
        self.backbone: Dinov2Model | None = None
        if config.adaptation == "full" or not defer_backbone:
            self.backbone = Dinov2Model(base)
            self._freeze_backbone()
        self.gradient_checkpointing = False
        self.post_init()

    # ---------------------------------------------------------------------------------------- loading and saving

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **config_kwargs: Any,
    ) -> "AdaptFaceModel":
        """A pretrained base with new, untrained adapters; the start of a training run.

        Args:
            backbone (`str` or path): Hub id or local folder of a Dinov2 model with safetensors weights.
            revision (`str`, *optional*): branch, tag or commit of the base; the commit is recorded in the config.
            dtype (`torch.dtype`, *optional*): dtype of the model (default float32).
            attn_implementation (`str`, *optional*): `sdpa` or `eager`.
            cache_dir, local_files_only, token: as in `from_pretrained`.
            config_kwargs: fields of [`AdaptFaceConfig`].
        Returns:
            `AdaptFaceModel` in evaluation mode.
        Raises:
            OSError: the base cannot be found or fetched.
            TypeError: the configuration has no such field.
            ValueError: the base is no complete, finite Dinov2 model, or a field of the configuration is wrong.
        """
        if unknown := sorted(set(config_kwargs) - set(inspect.signature(cls.config_class.__init__).parameters)):
            raise TypeError(f"from_backbone: {', '.join(unknown)}: no field of {cls.config_class.__name__}")
        hub = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        base_config, commit = _fetch_base_config(backbone, revision, hub)
        digest = _base_sha256(backbone, commit or revision, hub)
        config = cls.config_class(
            backbone=Path(backbone).as_posix() if isinstance(backbone, os.PathLike) else backbone,
            backbone_revision=commit,
            backbone_sha256=digest,
            backbone_config=base_config,
            **config_kwargs,
        )
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        model = cls(config, defer_backbone=True).to(dtype or torch.float32)
        model._load_backbone(hub, verified=True)
        return model.eval()

    @classmethod
    def from_peft(
        cls,
        adapter: str | os.PathLike,
        *,
        subfolder: str = "",
        revision: str | None = None,
        backbone: str | os.PathLike | None = None,
        backbone_revision: str | None = None,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **config_kwargs: Any,
    ) -> "AdaptFaceModel":
        """A plain PEFT LoRA of a Dinov2 model as a model with one expert; its projection is untrained.

        The model's CLS before the projection is that of the PEFT model. q, k and v share `lora_A` here: matrices A that
        differ are stacked, which takes the sum of their ranks, and every module gets the largest rank. Where the
        adapter has nothing, `lora_B` is zero and `lora_A` is new, so that it changes nothing and can be trained. The
        tensors in the file say what is adapted. peft itself is not needed.

        Args:
            adapter (`str` or path): Hub id or local folder with adapter_config.json and adapter_model.safetensors; the
                names of modules may be those of newer or of older transformers, or both.
            subfolder (`str`): folder in it, such as `peft`.
            revision (`str`, *optional*): branch, tag or commit of the adapter.
            backbone (`str` or path, *optional*): the base, if not the one that adapter_config.json names.
            backbone_revision (`str`, *optional*): its revision; default: the one of adapter_config.json, unless
                `backbone` is given.
            dtype, attn_implementation, cache_dir, local_files_only, token: as in `from_backbone`.
            config_kwargs: fields of [`AdaptFaceConfig`] that the adapter does not determine.
        Returns:
            `AdaptFaceModel` in evaluation mode.
        Raises:
            OSError: the adapter or the base cannot be found or fetched.
            TypeError: the adapter determines a field that was given, or the configuration has no such field.
            ValueError: the adapter is no plain LoRA, is damaged, or does not fit the base; names file, key and remedy.
        Source: peft 0.21, tuners/lora/layer.py (scaling), utils/other.py:get_pattern_key.
        """
        determined = {"adaptation", "adapter_targets", "adapter_layers", "lora_rank", "lora_alpha", "use_rslora"}
        if given := sorted(determined & set(config_kwargs)):
            raise TypeError(f"from_peft: {', '.join(given)}: the adapter determines it; leave it out")
        if len(config_kwargs.setdefault("domains", ["general"])) != 1:
            raise ValueError(f"domains={config_kwargs['domains']!r}: a PEFT adapter is one expert; give one name")
        hub = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        file, settings = _peft_settings(adapter, subfolder, revision, hub)
        weights, tensors = _peft_tensors(adapter, subfolder, revision, hub)
        name = backbone or settings.get("base_model_name_or_path")
        if not name:
            raise ValueError(f"{file}: base_model_name_or_path is empty; say which base it is by backbone=")
        if backbone is None and backbone_revision is None:
            backbone_revision = settings.get("revision")
        try:
            base, commit = _fetch_base_config(name, backbone_revision, hub)
        except OSError as error:
            raise OSError(f"{file}: {error} Or give backbone=, a Hub id or a folder.") from error
        found = _peft_updates(file, settings, weights, tensors, base)

        ranks = {place: sum(a.shape[0] for a, _ in groups) for place, groups in found.items()}
        rank, rslora = max(ranks.values()), bool(settings.get("use_rslora"))
        alpha = settings["lora_alpha"]
        if rank != settings["r"]:  # the scaling that the adapter's own rank gives
            alpha *= math.sqrt(rank / settings["r"]) if rslora else rank / settings["r"]
        layers = sorted({layer for layer, _ in found if layer is not None})
        targets = {target for _, target in found}
        wanted = "all-linear" if "patch" in targets else "attention+mlp" if targets & {"fc1", "fc2"} else "attention"
        model = cls.from_backbone(
            name,
            revision=commit or backbone_revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            adapter_targets=wanted,
            adapter_layers=None if len(layers) == base.num_hidden_layers else layers or [0],
            lora_rank=rank,
            lora_alpha=float(alpha),
            use_rslora=rslora,
            **{"lora_dropout": settings.get("lora_dropout") or 0.0, **config_kwargs},
        )
        with torch.no_grad():
            for (layer, target), groups in found.items():
                lora: Any = model.patch_adapter if layer is None else model._adapters_of(layer)[target]
                first = 0
                for a, updates in groups:  # a (r, in)
                    rows = slice(first, first + a.shape[0])
                    lora.lora_A[0, rows] = a.to(lora.lora_A.dtype)
                    for columns, b in updates:  # b (out, r)
                        lora.lora_B[0, rows, columns] = b.T.to(lora.lora_B.dtype)
                    first = rows.stop
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Loads adapters, router and projection, then the frozen base that the configuration names.

        Takes the arguments of `PreTrainedModel.from_pretrained`. `revision` concerns the adapters; the base is pinned
        by `config.backbone_revision`, and its weights are compared with `config.backbone_sha256`. The model is a few
        megabytes on one base and stays on one device: `device_map="auto"` means the accelerator, or the CPU.

        Raises:
            OSError: the model or its base cannot be found or fetched.
            ValueError: a tensor is missing, surplus or not finite, the base is another one than trained on, or
                `device_map` names several devices.
        """
        output_loading_info = kwargs.pop("output_loading_info", False)
        if (device_map := kwargs.get("device_map")) is not None:
            kwargs["device_map"] = _one_device(device_map)
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
        kwargs["ignore_mismatched_sizes"] = True  # they are refused below, by name
        if RENAMED_KEYS:
            kwargs.setdefault("key_mapping", RENAMED_KEYS)
        source = pretrained_model_name_or_path or "the given state dict"
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, defer_backbone=True, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(f"{source}: {_DAMAGED} ({error})") from error
        except OSError as error:
            if error.errno is None:  # transformers' own words
                raise
            raise OSError(
                f"{source}: its files could not be stored or read: {error}. Check the space on the disk and the rights "
                "to the cache, then load it again"
            ) from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(kind):
                raise ValueError(
                    f"{source}: the weights do not fit config.json ({kind.replace('_', ' ')}: {listed(info[kind])}). "
                    "The files are incomplete or of different models; download or save the model again."
                )
        _require_finite(model, f"{source}")
        if pretrained_model_name_or_path is not None and kwargs.get("state_dict") is None:
            model._require_same_tensors(pretrained_model_name_or_path, kwargs)
        if RENAMED_KEYS:
            model._weight_conversions = None  # transformers 5 would save it under its old names
        if model.backbone is None:
            model._load_backbone(hub)
        return (model, info) if output_loading_info else model

    def _require_same_tensors(self, source: str | os.PathLike, options: dict[str, Any]) -> None:
        """Refuses weights that are not those that config.json was saved with: nothing else notices a damaged file."""
        wanted = self.config.tensors_sha256
        if wanted is None:  # saved by an earlier version
            return
        names = ("cache_dir", "local_files_only", "token", "proxies", "subfolder")  # no download, a second time
        hub = {name: options[name] for name in names if options.get(name) is not None}
        digest = tensors_sha256(_tensors_of(_weight_files(source, options.get("revision"), hub)))
        if digest != wanted:
            raise ValueError(
                f"{source}: the weights are not those that config.json was saved with (SHA-256 of the tensors {digest} "
                f"instead of {wanted}): they are damaged, or of another model. {_FETCH}"
            )

    def _load_backbone(self, hub: dict[str, Any], verified: bool = False) -> None:
        """Fetches the frozen base, refuses any but the one that the configuration names, and puts it in place."""
        config = self.config
        name, revision = config.backbone, config.backbone_revision
        if config.backbone_sha256 is None:
            raise ValueError(
                f"config.json pins no base (backbone_sha256 is missing), so that {name!r} cannot be told from another "
                "base; save the model again from one built with AdaptFaceModel.from_backbone"
            )
        base_config, _ = _fetch_base_config(name, revision, hub)
        wanted = config.backbone_config
        differing = [k for k in _SAME_ARCHITECTURE if getattr(base_config, k) != getattr(wanted, k)]
        if differing:
            details = ", ".join(f"{k} {getattr(base_config, k)!r} instead of {getattr(wanted, k)!r}" for k in differing)
            raise ValueError(f"base {name!r} is not the one this model was made for: {details}")
        if not verified:
            digest = _base_sha256(name, revision, hub)
            if digest != config.backbone_sha256:
                raise ValueError(
                    f"base {name!r} (revision {revision}) has other weights than this model was trained on: SHA-256 "
                    f"{digest} instead of {config.backbone_sha256}. {_FETCH}"
                )
        hub = {key: value for key, value in hub.items() if key != "force_download"}  # it is there now
        try:
            base, info = Dinov2Model.from_pretrained(
                name,
                config=copy.deepcopy(wanted),  # not the fetched one, which might ask for dropout
                revision=revision,
                dtype=self.dtype,
                attn_implementation=config._attn_implementation,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
                **hub,
            )
        except SafetensorError as error:
            raise ValueError(f"base {name!r} (revision {revision}): {_DAMAGED} ({error})") from error
        lacking = [*info["missing_keys"], *(info.get("mismatched_keys") or ())]
        if lacking:
            raise ValueError(f"base {name!r} (revision {revision}) is incomplete: no tensor for {listed(lacking)}")
        _require_finite(base, f"base {name!r}")
        self.backbone = base.to(self.device)
        self._freeze_backbone()

    def _freeze_backbone(self) -> None:
        assert self.backbone is not None
        trains = self.config.adaptation == "full"
        self.backbone.requires_grad_(trains)
        if trains and self.backbone.embeddings.mask_token is not None:
            self.backbone.embeddings.mask_token.requires_grad_(False)  # of pre-training; no gradient reaches it

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes config, adapters, router, projection and the shipped modules; never a weight of a frozen base.

        Takes the arguments of `PreTrainedModel.save_pretrained`. A model with `adaptation="full"` is saved whole.

        Raises:
            ValueError: the base is pinned by no digest, as a random one is: what is saved could not be loaded again.
                Or `safe_serialization=False` asks for a pickle, which is not read again.
                Or `state_dict` holds tensors under other names, among which weights of the base could hide.
                With `push_to_hub=True` also what [`~AdaptFaceModel.push_to_hub`] refuses.
        """
        if self.config.adaptation != "full" and self.config.backbone_sha256 is None:
            raise ValueError(
                "this model's base is random or unknown (config.backbone_sha256 is None), and is not saved; adapters "
                "are worth nothing without it: build the model with AdaptFaceModel.from_backbone"
            )
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "an adapter of PEFT was added to this model, and would be saved in its place; remove it, or save it by "
                "the PEFT model"
            )
        if kwargs.get("safe_serialization") is False:
            raise ValueError("safe_serialization=False: only safetensors are read again; leave it out")
        pushes = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name) for name in _PUSH_OPTIONS if name in kwargs} if pushes else {}
        if pushes:
            self._require_publishable()
        state = kwargs.pop("state_dict", None)
        state = self.state_dict() if state is None else state
        if unknown := set(state) - set(self.state_dict()):
            raise ValueError(
                f"state_dict: {listed(unknown)}: no tensors of this model; give its own state dict, without the prefix "
                "of a wrapper"
            )
        if self.config.adaptation != "full":
            state = {key: value for key, value in state.items() if not key.startswith("backbone.")}
        super().save_pretrained(save_directory, state_dict=state, **kwargs)
        config = Path(save_directory) / "config.json"
        files = sorted(Path(save_directory).glob("*.safetensors"))
        if not files:  # not the main process
            return
        for file in files:  # safetensors makes them private to their owner
            shutil.copymode(config, file)
        # Of the file: transformers may name and cut the tensors of a whole base otherwise than in memory.
        self.config.tensors_sha256 = tensors_sha256(_tensors_of(files))
        content = json.loads(config.read_text(encoding="utf-8")) | {"tensors_sha256": self.config.tensors_sha256}
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
        if pushes:
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **hub})

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Uploads what `save_pretrained` writes, in one commit; never a weight of the base.

        Takes the arguments of `PreTrainedModel.push_to_hub`.

        Raises:
            ValueError: the weights are those of a whole base (`adaptation="full"`), or the base is a folder of this
                machine, so that nobody else could load the model.
        """
        self._require_publishable()
        return super().push_to_hub(*args, **kwargs)

    def _require_publishable(self) -> None:
        name = self.config.backbone
        if self.config.adaptation == "full":
            raise ValueError(
                f"adaptation='full': this would publish every weight of {name}, changed; if its licence permits that, "
                "use save_pretrained and upload the folder, or `adaptface release RUN --allow_full --push`"
            )
        if os.path.isabs(name) or os.path.isdir(name):
            raise ValueError(
                f"the base is the folder {name} of this machine, so that nobody else could load the model; set "
                "config.backbone and config.backbone_revision to its Hub id and commit"
            )

    # --------------------------------------------------------------------------------------------------- computing

    def forward(
        self,
        pixel_values: torch.Tensor,
        domain_weights: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> AdaptFaceOutput | tuple[Any, ...]:
        """Embeds aligned faces.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): images from [`AdaptFaceImageProcessor`].
            domain_weights (`torch.FloatTensor` of shape `(K,)` or `(B, K)`, *optional*): a mix to use in place of the
                router's.
            output_hidden_states (`bool`, *optional*): return the tokens after each block.
            output_attentions (`bool`, *optional*): return the attention of each block.
            return_dict (`bool`, *optional*): False returns a tuple.
        Returns:
            [`AdaptFaceOutput`].
        Raises:
            ValueError: `pixel_values` or `domain_weights` have another shape, the weights are no mix (numbers of at
                least 0 with the sum 1), or there is no router whose place they could take.
        """
        backbone, config = self.backbone, self.config
        if backbone is None:
            raise RuntimeError("this model has no base: build it with from_backbone or from_pretrained")
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values of shape {tuple(pixel_values.shape)}: give (B, 3, H, W)")
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        batch = pixel_values.shape[0]
        if domain_weights is not None:
            domain_weights = self._checked_mix(domain_weights, batch)  # (B, K)

        x = backbone.embeddings(pixel_values)  # (B, 1 + N, D)
        prior = x.new_full((batch, config.num_domains), 1 / config.num_domains)  # (B, K)
        if self.patch_adapter is not None:
            patches = F.unfold(
                pixel_values.to(x.dtype), config.backbone_config.patch_size, stride=config.backbone_config.patch_size
            )
            x = x + F.pad(self.patch_adapter(patches.transpose(1, 2), None, None, prior), (0, 0, 1, 0))

        mix, logits = prior, None
        every_token = bool(output_hidden_states or output_attentions)
        hidden_states: list[torch.Tensor] = [x]
        attentions: list[torch.Tensor] = []
        for index in range(len(backbone.encoder.layer)):
            if self.router is not None and index == config.router_layer:
                logits = self.router(x[:, 0] if index > 0 else x[:, 1:].mean(1))  # (B, K)
                mix = logits.float().softmax(-1) if domain_weights is None else domain_weights
            cls_only = index == len(backbone.encoder.layer) - 1 and not every_token
            arguments = (index, x, mix, cls_only, bool(output_attentions))
            if self.gradient_checkpointing and self.training:
                x, attention = self._gradient_checkpointing_func(self._block, *arguments)
            else:
                x, attention = self._block(*arguments)
            if output_hidden_states:
                hidden_states.append(x)
            if output_attentions:
                attentions.append(attention)

        tokens = backbone.layernorm(x)  # (B, 1 + N, D), or (B, 1, D) where only CLS was computed
        with torch.autocast(x.device.type, enabled=False):
            features = self.projection(tokens[:, 0].to(self.projection.weight.dtype)).float()  # (B, E)
            embeddings = F.normalize(features, dim=-1)  # (B, E)
        output = AdaptFaceOutput(
            pooler_output=embeddings,
            features=features,
            domain_logits=logits,
            domain_weights=mix if self.router is not None else None,
            last_hidden_state=tokens if every_token else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _block(
        self, index: int, x: torch.Tensor, mix: torch.Tensor, cls_only: bool, need_attention: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Block `index` of the base with its adapters: `(B, 1 + N, D) -> (B, 1 + N, D)`, or `(B, 1, D)` of CLS only."""
        assert self.backbone is not None
        block: Any = self.backbone.encoder.layer[index]
        adapters = self._adapters_of(index)
        base = self.config.backbone_config
        width, heads = base.hidden_size, base.num_attention_heads

        def adapted(name: str, x: torch.Tensor, linears: Sequence[nn.Linear], columns: slice = slice(None)):
            weight, bias = _fused(linears, x)
            if name in adapters:
                return adapters[name](x.to(weight.dtype), weight, bias, mix, columns)
            return F.linear(x.to(weight.dtype), weight, bias)

        def split(x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # (B, N, n * D) -> n x (B, heads, N, D / heads)
            return x.unflatten(-1, (-1, heads, width // heads)).permute(2, 0, 3, 1, 4).unbind(0)

        query, key, value, out = _attention_linears(block.attention)
        normed = block.norm1(x)  # (B, 1 + N, D)
        if cls_only:  # the projection reads CLS alone: one query, all keys and values
            x = x[:, :1]
            (q,) = split(adapted("qkv", normed[:, :1], [query], slice(0, width)))
            k, v = split(adapted("qkv", normed, [key, value], slice(width, None)))
        else:
            q, k, v = split(adapted("qkv", normed, [query, key, value]))
        attention = None
        if need_attention or self.config._attn_implementation == "eager":
            attention = (q @ k.transpose(-1, -2) * (width // heads) ** -0.5).softmax(-1)  # (B, heads, 1 + N, 1 + N)
            context = attention @ v
        else:
            context = F.scaled_dot_product_attention(q, k, v)
        context = context.transpose(1, 2).flatten(2)  # (B, 1 + N, D)
        x = torch.addcmul(x, adapted("proj", context, [out]), block.layer_scale1.lambda1)

        entry, act, exit_ = _mlp_linears(block.mlp)
        inner = adapted("fc1", block.norm2(x), entry)  # (B, 1 + N, mlp), twice as wide if gated
        if base.use_swiglu_ffn:
            gate, up = inner.chunk(2, -1)
            inner = F.silu(gate) * up
        else:
            inner = act(inner)
        return torch.addcmul(x, adapted("fc2", inner, [exit_]), block.layer_scale2.lambda1), attention

    def _adapters_of(self, index: int) -> dict[str, DomainLoRA]:
        """Adapters of block `index` by target (`qkv`, `proj`, `fc1`, `fc2`); empty where it carries none."""
        adapters: Any = self.adapters
        return dict(adapters[str(index)].items()) if str(index) in adapters else {}

    def _checked_mix(self, domain_weights: torch.Tensor, batch: int) -> torch.Tensor:
        """A given mix as `(B, K)`."""
        experts = self.config.num_domains
        if self.router is None:
            raise ValueError("domain_weights: this model has no router and one fixed mix; leave them out")
        mix = torch.as_tensor(domain_weights, device=self.device, dtype=torch.float32)
        if mix.shape not in ((experts,), (batch, experts)):
            raise ValueError(
                f"domain_weights of shape {tuple(mix.shape)}: give ({experts},) or ({batch}, {experts}), one weight "
                f"for each of {', '.join(self.config.domains)}"
            )
        if torch.compiler.is_compiling():  # a look at the values would break the graph
            return mix.expand(batch, experts)
        if not ((mix >= 0).all() and ((mix.sum(-1) - 1).abs() < 1e-2).all()):  # NaN fails both
            raise ValueError(f"domain_weights {mix.tolist()}: give numbers of at least 0 that sum to 1")
        return mix.expand(batch, experts)

    # ---------------------------------------------------------------------------------------------- merging, counts

    @torch.no_grad()
    def merged_backbone(self, domain_mix: Sequence[float] | torch.Tensor | None = None) -> Dinov2Model:
        """The base with its adapters folded in, under one fixed mix: an ordinary `Dinov2Model`.

        Its CLS output equals this model's before the projection when called with `domain_weights=domain_mix`.

        Args:
            domain_mix (sequence of K numbers, *optional*): weights of the experts from the router on; uniform by
                default. Blocks before the router always mix uniformly.
        Returns:
            `Dinov2Model` of the same dtype, on the same device, in evaluation mode.
        """
        config = self.config
        merged: Any = copy.deepcopy(self.backbone)
        prior = torch.full((config.num_domains,), 1 / config.num_domains)
        mix = prior if domain_mix is None else self._checked_mix(torch.as_tensor(domain_mix), 1)[0].cpu()

        def add(linears: Sequence[nn.Linear], adapter: DomainLoRA, weights: torch.Tensor) -> None:
            delta = adapter.delta_weight(weights)
            for linear, part in zip(linears, delta.split([lin.out_features for lin in linears]), strict=True):
                linear.weight.copy_(linear.weight.to(part.dtype) + part)

        for index in config.adapted_layers:
            block, adapters = merged.encoder.layer[index], self._adapters_of(index)
            weights = mix if config.has_router and index >= config.router_layer else prior
            query, key, value, out = _attention_linears(block.attention)
            entry, _, exit_ = _mlp_linears(block.mlp)
            for target, linears in {"qkv": [query, key, value], "proj": [out], "fc1": entry, "fc2": [exit_]}.items():
                if target in adapters:
                    add(linears, adapters[target], weights)
        if self.patch_adapter is not None:
            convolution = merged.embeddings.patch_embeddings.projection
            delta = self.patch_adapter.delta_weight(prior).view_as(convolution.weight)
            convolution.weight.copy_(convolution.weight.to(delta.dtype) + delta)
        return merged.eval()

    def summary(self) -> dict[str, float]:
        """Parameter counts: base, per expert, adapters, router, projection, trainable, total; percent trainable."""

        def count(module: nn.Module | None) -> int:
            return 0 if module is None else sum(p.numel() for p in module.parameters())

        adapters = count(self.adapters) + count(self.patch_adapter)
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = count(self)
        return {
            "base": count(self.backbone),
            "per_expert": adapters // self.config.num_domains,
            "adapters": adapters,
            "router": count(self.router),
            "projection": count(self.projection),
            "trainable": trainable,
            "total": total,
            "percent_trainable": 100 * trainable / total,
        }

    def summary_table(self) -> str:
        """[`~AdaptFaceModel.summary`] as a printable table."""
        counts, config = self.summary(), self.config
        experts = f"{config.num_domains} x {counts['per_expert']:,}: {', '.join(config.domains)}"
        rows = [
            (f"base {config.backbone}", f"{counts['base']:,}", "trains" if config.adaptation == "full" else "frozen"),
            (f"adapters, {config.adapter_targets}, r={config.lora_rank}", f"{counts['adapters']:,}", experts),
            ("router", f"{counts['router']:,}", f"before block {config.router_layer}" if config.has_router else "none"),
            ("projection", f"{counts['projection']:,}", f"-> {config.embedding_size}"),
            ("trainable", f"{counts['trainable']:,}", f"{counts['percent_trainable']:.2f}% of {counts['total']:,}"),
        ]  # fmt: skip
        left, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{a:<{left}}  {b:>{middle}}  {c}" for a, b, c in rows)


# ------------------------------------------------------------------------------------------- the base's own modules


def _attention_linears(attention: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """q, k, v and output matrices, by the names of newer or older transformers."""
    if hasattr(attention, "q_proj"):
        return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    inner = attention.attention
    return inner.query, inner.key, inner.value, attention.output.dense


def _mlp_linears(mlp: Any) -> tuple[list[nn.Linear], Any, nn.Linear]:
    """Matrices into the MLP (two of them if it is gated in newer transformers), activation, matrix out of it."""
    if hasattr(mlp, "gate_proj"):
        return [mlp.gate_proj, mlp.up_proj], None, mlp.down_proj
    if hasattr(mlp, "weights_in"):
        return [mlp.weights_in], None, mlp.weights_out
    return [mlp.fc1], getattr(mlp, "activation_fn", None) or mlp.activation, mlp.fc2


def target_shapes(base: Dinov2Config) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Adaptable matrices of a base: target -> width in, widths out of the matrices that are fused in it."""
    width, inner = base.hidden_size, int(base.hidden_size * base.mlp_ratio)
    if base.use_swiglu_ffn:  # two matrices in; transformers keeps two thirds of the width, in steps of 8
        inner = (int(inner * 2 / 3) + 7) // 8 * 8
    return {
        "qkv": (width, (width, width, width)),
        "proj": (width, (width,)),
        "fc1": (width, (inner, inner) if base.use_swiglu_ffn else (inner,)),
        "fc2": (inner, (width,)),
        "patch": (base.num_channels * base.patch_size**2, (width,)),
    }


PATCH_MODULE = "embeddings.patch_embeddings.projection"


def block_modules(base: Dinov2Config) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Modules of a block, by the names of newer and of older transformers: name -> target, parts of it."""
    modules: dict[str, tuple[str, tuple[int, ...]]] = {}
    for part, (new, old) in enumerate((("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))):
        modules[f"attention.{new}"] = modules[f"attention.attention.{old}"] = ("qkv", (part,))
    modules["attention.o_proj"] = modules["attention.output.dense"] = ("proj", (0,))
    if base.use_swiglu_ffn:
        modules |= {"mlp.gate_proj": ("fc1", (0,)), "mlp.up_proj": ("fc1", (1,)), "mlp.weights_in": ("fc1", (0, 1))}
        modules |= {"mlp.down_proj": ("fc2", (0,)), "mlp.weights_out": ("fc2", (0,))}
    else:
        modules |= {"mlp.fc1": ("fc1", (0,)), "mlp.fc2": ("fc2", (0,))}
    return modules


def _fused(linears: Sequence[nn.Linear], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and biases of matrices with one input, stacked, in the dtype that autocast wants for `x`."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else linears[0].weight.dtype

    def stack(tensors: list[torch.Tensor]) -> torch.Tensor:
        return (torch.cat(tensors) if len(tensors) > 1 else tensors[0]).to(dtype)

    weight = stack([linear.weight for linear in linears])
    return weight, None if linears[0].bias is None else stack([linear.bias for linear in linears])


def _one_device(device_map: Any) -> Any:
    """`device_map` of a model that is not to be split: base and adapters of a block meet in one sum."""
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return "cpu" if found is None else found.type  # its current device
    if isinstance(device_map, dict) and len({str(device) for device in device_map.values()}) > 1:
        raise ValueError(
            f"device_map={device_map!r} names several devices: this model stays on one; give a single device, such as "
            'device_map="cuda:0"'
        )
    return device_map


def _fetch_base_config(
    backbone: str | os.PathLike, revision: str | None, hub: dict[str, Any]
) -> tuple[Dinov2Config, str | None]:
    """Configuration and commit (None for a local folder) of a base; refuses what is no Dinov2 model."""
    try:
        file = cached_file(backbone, "config.json", revision=revision, **hub)
        if file is None:
            raise OSError("there is no config.json")
    except (OSError, ValueError) as error:  # ValueError: transformers 4, a path that is not there
        raise _no_base(backbone, revision, error) from error
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        kind = content.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"base {str(backbone)!r}: its config.json is damaged ({error}); fetch it or save it again"
        ) from error
    if kind != "dinov2":
        raise ValueError(
            f"base {str(backbone)!r} is a {kind!r} model: AdaptFace adapts Dinov2 models; choose "
            "one whose config.json says model_type 'dinov2'"
        )
    return Dinov2Config(**{k: v for k, v in content.items() if k != "model_type"}), extract_commit_hash(file, None)


def _base_sha256(backbone: str | os.PathLike, revision: str | None, hub: dict[str, Any]) -> str:
    """SHA-256 of a base's weights, which are fetched for it."""
    try:
        return weights_sha256(backbone, revision, hub)
    except OSError as error:
        raise _no_base(backbone, revision, error) from error


def _no_base(backbone: str | os.PathLike, revision: str | None, error: Exception) -> OSError:
    at = f" at revision {revision}" if revision else ""
    return OSError(
        f"the base {str(backbone)!r}{at} could not be loaded: {error}\nThe adapters need it: check the name, the "
        "network, the space on the disk or the cache, or set config.backbone to a local copy."
    )


# ------------------------------------------------------------------------------------------------ adapters of PEFT

# Options of a LoRA that change what is computed, or that train more than the pair of an A and a B.
_PEFT_BEYOND_PLAIN = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias",
    "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora",
)  # fmt: skip
_PEFT_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")  # starts that leave the base's weights alone
_PEFT_KEY = re.compile(
    rf"base_model\.model\.(?P<module>encoder\.layer\.(?P<layer>\d+)\.(?P<name>.+)|{re.escape(PATCH_MODULE)})"
    r"\.lora_(?P<half>[AB])\.weight"
)
_Place = tuple[int | None, str]  # block (None: before the blocks), target
_Groups = list[tuple[torch.Tensor, list[tuple[slice, torch.Tensor]]]]  # A (r, in), and each B (out, r) on it


def _peft_file(adapter: str | os.PathLike, name: str, subfolder: str, revision: str | None, hub: dict[str, Any]) -> str:
    """Path of a file of an adapter."""
    file = cached_file(
        adapter, name, subfolder=subfolder, revision=revision, _raise_exceptions_for_missing_entries=False, **hub
    )
    if file is None:
        raise OSError(
            f"{str(adapter)!r} has no {f'{subfolder}/' if subfolder else ''}{name}: give a PEFT adapter saved as "
            "safetensors, and subfolder= where it is not in the root"
        )
    return file


def _peft_settings(
    adapter: str | os.PathLike, subfolder: str, revision: str | None, hub: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Path and content of adapter_config.json; refuses what is no plain LoRA."""
    file = _peft_file(adapter, "adapter_config.json", subfolder, revision, hub)
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        kind = settings.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: it is damaged ({error}); fetch or save it again") from error
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type {kind!r}: only LORA can be read; merge it into its base, or train a LoRA")
    for key in _PEFT_BEYOND_PLAIN:
        if settings.get(key):
            raise ValueError(f"{file}: {key} {settings[key]!r}: only plain LoRA can be read; train without it")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias {settings['bias']!r}: the base stays frozen here; train with bias 'none'")
    if settings.get("init_lora_weights") not in _PEFT_KEEPS_BASE:
        raise ValueError(
            f"{file}: init_lora_weights {settings['init_lora_weights']!r} changed the base's weights; save it from "
            "PEFT by save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it"
        )
    numbers = {"r": settings.get("r"), "lora_alpha": settings.get("lora_alpha")}
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(field) or {}, dict):
            raise ValueError(f"{file}: {field} {settings[field]!r}: give a mapping from names of modules to numbers")
        numbers |= {f"{field}[{name!r}]": number for name, number in (settings.get(field) or {}).items()}
    for key, number in numbers.items():
        whole = key == "r" or key.startswith("rank")
        if type(number) not in ((int,) if whole else (int, float)) or not 0 < number < math.inf:
            raise ValueError(f"{file}: {key} {number!r}: give a {'whole' if whole else 'finite'} number above 0")
    return file, settings


def _peft_tensors(
    adapter: str | os.PathLike, subfolder: str, revision: str | None, hub: dict[str, Any]
) -> tuple[str, dict[str, torch.Tensor]]:
    """Path and content of adapter_model.safetensors; refuses an empty and a damaged file."""
    file = _peft_file(adapter, "adapter_model.safetensors", subfolder, revision, hub)
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: {_DAMAGED} ({error})") from error
    if not tensors:
        raise ValueError(f"{file} holds no tensor; save the adapter again from the PEFT model that was trained")
    for key, tensor in tensors.items():
        if not (tensor.is_floating_point() and torch.isfinite(tensor).all()):
            raise ValueError(f"{file}: tensor {key!r} holds NaN, infinite or whole numbers; fetch or train it again")
    return file, tensors


def _peft_updates(
    file: str, settings: dict[str, Any], weights: str, tensors: dict[str, torch.Tensor], base: Dinov2Config
) -> dict[_Place, _Groups]:
    """The adapter's updates by place; equal A of one place are one, and B are scaled by `settings`' own alpha and r.

    Raises:
        ValueError: a tensor fits no module of the base, lacks its other half, has another shape, or contradicts the
            same module under its other name.
    """
    modules, shapes = block_modules(base), target_shapes(base)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    places: dict[str, tuple[int | None, str, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        match = _PEFT_KEY.fullmatch(key)
        layer = int(match["layer"]) if match and match["layer"] else None
        known = match and (layer is None or (layer < base.num_hidden_layers and match["name"] in modules))
        if not known:
            raise ValueError(
                f"{weights}: tensor {key!r} fits no module of the base (Dinov2Model, {base.num_hidden_layers} blocks, "
                f"modules {', '.join([*modules, PATCH_MODULE])}); train the LoRA on a Dinov2Model, and only on these"
            )
        assert match is not None
        halves.setdefault(match["module"], {})[match["half"]] = tensor
        places[match["module"]] = (layer, *(("patch", (0,)) if layer is None else modules[match["name"]]))

    def chosen(field: str, module: str, default: float) -> float:
        """The number of the first pattern that the end of a module's name matches, as PEFT finds it."""
        for pattern, number in (settings.get(field) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return number
            except re.error as error:
                raise ValueError(f"{file}: {field} {pattern!r} is no regular expression ({error})") from error
        return default

    power = 0.5 if settings.get("use_rslora") else 1
    scaling = settings["lora_alpha"] / settings["r"] ** power
    slots: dict[tuple[int | None, str, int], tuple[torch.Tensor, torch.Tensor, str]] = {}
    for module, pair in halves.items():
        layer, target, parts = places[module]
        rank = int(chosen("rank_pattern", module, settings["r"]))
        wide, outs = shapes[target]
        out = sum(outs[part] for part in parts)
        kernel = (base.num_channels, base.patch_size, base.patch_size)
        wanted: dict[str, tuple[int, ...]] = {"A": (rank, wide), "B": (out, rank)}
        if layer is None:
            wanted = {"A": (rank, *kernel), "B": (out, rank, 1, 1)}
        for half, shape in wanted.items():
            key = f"base_model.model.{module}.lora_{half}.weight"
            if half not in pair:
                raise ValueError(f"{weights}: tensor {key!r} is missing, its other half is there; save it again")
            if tuple(pair[half].shape) != shape:
                raise ValueError(
                    f"{weights}: tensor {key!r} has the shape {tuple(pair[half].shape)}, not {shape}: it is of another "
                    "base, or of another rank than adapter_config.json says; give the two files of one adapter"
                )
        ratio = chosen("alpha_pattern", module, settings["lora_alpha"]) / rank**power / scaling
        a = pair["A"].float().flatten(1)  # (r, in)
        b = (pair["B"].double().flatten(1) * ratio).float()  # (out, r)
        for part, b_part in zip(parts, b.split([outs[part] for part in parts]), strict=True):
            other = slots.setdefault((layer, target, part), (a, b_part, module))
            if not (torch.equal(other[0], a) and torch.equal(other[1], b_part)):
                raise ValueError(
                    f"{weights}: {module!r} and {other[2]!r} are one matrix under two names, and their tensors differ; "
                    "leave one of them out"
                )
    found: dict[_Place, _Groups] = {}
    for (layer, target, part), (a, b, _) in sorted(slots.items(), key=lambda item: item[0][2]):
        first = sum(shapes[target][1][:part])
        groups = found.setdefault((layer, target), [])
        same = next((updates for other, updates in groups if torch.equal(other, a)), None)
        if same is None:
            groups.append((a, same := []))
        same.append((slice(first, first + len(b)), b))
    return found


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors with their names, dtypes and shapes, in order of name; not of the file that holds them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors_of(files: Sequence[str | os.PathLike]) -> dict[str, torch.Tensor]:
    """All tensors of some safetensors files."""
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def weights_sha256(model: str | os.PathLike, revision: str | None, hub: dict[str, Any]) -> str:
    """SHA-256 of a model's `model.safetensors`; where it is sharded, of its shards' digests in order of name.

    Args:
        model (`str` or path): Hub id or local folder.
        revision (`str`, *optional*): revision on the Hub.
        hub (`dict`): arguments of `cached_file` that say where to look.
    Raises:
        OSError: there are no safetensors weights.
    """
    digests = []
    for path in _weight_files(model, revision, hub):
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _weight_files(model: str | os.PathLike, revision: str | None, hub: dict[str, Any]) -> list[str]:
    """Paths of a model's safetensors weights, of several shards in order of name."""

    def find(name: str, **options: Any) -> Any:
        return cached_file(model, name, revision=revision, **options, **hub)

    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": True}
    single = find("model.safetensors", **optional)
    if single is not None:
        return [single]
    index = find("model.safetensors.index.json", **optional)
    if index is None:
        raise OSError(f"{str(model)!r} has no model.safetensors: only safetensors weights are loaded; convert it")
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [find(shard) for shard in shards]


def _require_finite(module: nn.Module, source: str) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"{source}: tensor {name!r} holds NaN or infinite values; the file is damaged, fetch it again"
            )


def listed(keys: Any, most: int = 8) -> str:
    """The first names, in order, for a message, and how many more there are."""
    names = sorted(key if isinstance(key, str) else str(key[0]) for key in keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


AdaptFaceModel.register_for_auto_class("AutoModel")
