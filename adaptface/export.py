"""A model in forms that need no code of this project: a PEFT adapter, or the base with the adapters merged in.

A PEFT adapter goes into a folder of its own (`peft/` of a release): beside the model's config.json, an
adapter_config.json makes AutoModel load the plain base without projection and routing. Neither form holds the router
or the projection: both compute the CLS token before the projection, under one fixed mix of the experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from adaptface.card import is_local
from adaptface.files import new_folder, without_folders
from modeling_adaptface import PATCH_MODULE, AdaptFaceModel, DomainLoRA, block_modules, target_shapes

Mix = Sequence[float] | torch.Tensor | None

# Ids of licences, as the Hub has them, that let changed copies be passed on, be it under conditions.
CHANGED_COPIES = frozenset((
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "creativeml-openrail-m", "ecl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2", "gpl", "gpl-2.0", "gpl-3.0",
    "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "mit", "mpl-2.0", "ms-pl", "ncsa", "openrail", "openrail++", "osl-3.0",
    "postgresql", "unlicense", "wtfpl", "zlib",
))  # fmt: skip


def parse_mix(text: str, domains: Sequence[str]) -> list[float]:
    """A mix as it is typed, `general=0.5,pose=0.5`, or one expert by name, `pose`; who is not named weighs 0.

    Args:
        domains: names of the K experts.
    Returns:
        K weights in the order of `domains`.
    Raises:
        ValueError: an expert is unknown or named twice, or a weight is no number.
    """
    mix: dict[str, float] = {}
    for item in text.split(","):
        name, equals, weight = (part.strip() for part in item.partition("="))
        if name not in domains or name in mix:
            raise ValueError(f"domain_mix {text!r}: name each of {', '.join(domains)} at most once, as NAME=WEIGHT,...")
        try:
            mix[name] = float(weight) if equals else 1.0
        except ValueError:
            raise ValueError(f"domain_mix {text!r}: {weight!r} is no number; give NAME=WEIGHT,...") from None
    return [mix.get(name, 0.0) for name in domains]


def peft_adapter(
    model: AdaptFaceModel, domain_mix: Mix = None, dtype: torch.dtype | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The adapters under one fixed mix as a LoRA of PEFT, without peft: equal to `model.merged_backbone(domain_mix)`.

    The experts that take part are stacked: rank n * r for n of them. Weights that are all equal go into `lora_alpha`,
    so that the tensors stay what they are; others are multiplied into `lora_B` in float32. Blocks before the router mix
    uniformly; where that makes their rank or scaling another one, `rank_pattern` and `alpha_pattern` say so. The
    tensors stand under the names that newer and those that older transformers give the modules (PEFT drops those it has
    no module for), and the pattern of `target_modules` takes both.

    Args:
        model (`AdaptFaceModel`): with `adaptation="lora"`.
        domain_mix (sequence of K numbers, *optional*): weights of the experts from the router on; uniform by default.
        dtype (`torch.dtype`, *optional*): dtype of the tensors; default: bfloat16 where that loses nothing, or float32.
    Returns:
        Content of adapter_config.json, and of adapter_model.safetensors: `lora_A` (R, in), `lora_B` (out, R); of the
        patch embedding (R, C, p, p) and (D, R, 1, 1).
    Raises:
        ValueError: there are no adapters, or `domain_mix` is no mix.
    Source: peft 0.21, tuners/lora/layer.py (scaling = lora_alpha / r) and model.py (patterns).
    """
    config, base = model.config, model.config.backbone_config
    if config.adaptation != "lora":
        raise ValueError(
            f"adaptation={config.adaptation!r}: there are no adapters to export; a model with adaptation='full' can be "
            "exported as a backbone"
        )
    prior = torch.full((config.num_domains,), 1 / config.num_domains)
    mix = prior if domain_mix is None else model._checked_mix(torch.as_tensor(domain_mix), 1)[0].cpu()
    weights_of = {i: mix if config.has_router and i >= config.router_layer else prior for i in config.adapted_layers}

    tensors: dict[str, torch.Tensor] = {}
    for layer, weights in weights_of.items():
        for target, adapter in model._adapters_of(layer).items():
            a, b = _stacked(adapter, weights)
            starts = [sum(target_shapes(base)[target][1][:part]) for part in range(4)]
            for name, (of, parts) in block_modules(base).items():
                if of == target:
                    rows = slice(starts[parts[0]], starts[parts[-1] + 1])
                    tensors |= _pair(f"encoder.layer.{layer}.{name}", a, b[rows])
    if model.patch_adapter is not None:
        a, b = _stacked(model.patch_adapter, prior)
        kernel = (base.num_channels, base.patch_size, base.patch_size)
        tensors |= _pair(PATCH_MODULE, a.unflatten(1, kernel), b[:, :, None, None])
    if dtype is None:
        lossless = all(torch.equal(tensor.bfloat16().float(), tensor) for tensor in tensors.values())
        dtype = torch.bfloat16 if lossless else torch.float32

    rank, alpha = _rank_and_alpha(mix, config.lora_rank, config.scaling)
    early_rank, early_alpha = _rank_and_alpha(prior, config.lora_rank, config.scaling)
    early = [str(layer) for layer, weights in weights_of.items() if weights is prior]
    where = [rf"encoder\.layer\.({'|'.join(early)})\..*"] * bool(early)
    where += [re.escape(PATCH_MODULE)] * (model.patch_adapter is not None)
    settings = {
        "auto_mapping": {
            "base_model_class": "Dinov2Model",
            "parent_library": "transformers.models.dinov2.modeling_dinov2",
        },
        "alpha_pattern": {"|".join(where): early_alpha} if where and early_alpha != alpha else {},
        "base_model_name_or_path": base_id(config.backbone),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {"|".join(where): early_rank} if where and early_rank != rank else {},
        "revision": config.backbone_revision,
        "target_modules": _target_modules(model),
        "task_type": None,
        "use_rslora": False,
    }
    return settings, {name: tensor.to(dtype).clone().contiguous() for name, tensor in tensors.items()}


def export_peft(model: AdaptFaceModel, folder: Path, domain_mix: Mix = None, dtype: torch.dtype | None = None) -> None:
    """Write the mix as a PEFT adapter into `folder`, and with K > 1 each expert into `folder/experts/DOMAIN`.

    An expert is the mix in which it alone has weight: from the router on it stands alone, earlier blocks are as ever.

    Args:
        folder (`Path`): new or empty; never the root of a release.
        model, domain_mix, dtype: as in [`peft_adapter`].
    Raises:
        FileExistsError: `folder` is not empty.
        ValueError: see [`peft_adapter`].
    """
    with new_folder(folder) as staged:
        for place, (settings, tensors) in peft_adapters(model, domain_mix, dtype):
            _write_adapter(staged / place, settings, tensors)


def peft_adapters(
    model: AdaptFaceModel, domain_mix: Mix = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]]:
    """What [`export_peft`] writes: folder, and config and tensors of the adapter in it."""
    yield "", peft_adapter(model, domain_mix, dtype)
    domains = model.config.domains if model.config.num_domains > 1 else []
    for name in domains:
        yield f"experts/{name}", peft_adapter(model, [float(name == other) for other in domains], dtype)


def export_backbone(
    model: AdaptFaceModel,
    folder: Path,
    *,
    base_license: str,
    domain_mix: Mix = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `model.merged_backbone(domain_mix)`: an ordinary Dinov2Model, with a note on where its weights come from.

    What is written contains the base's weights, so that its licence must let changed copies be passed on; a
    release never does. Neither router nor projection are in it.

    Args:
        folder (`Path`): new or empty.
        base_license (`str`): licence of the base by its id, such as `apache-2.0`; who exports states it, and it is
            written into NOTICE.
        domain_mix (sequence of K numbers, *optional*): weights of the experts from the router on; uniform by default.
        dtype (`torch.dtype`, *optional*): dtype of the weights; default: the model's.
    Raises:
        FileExistsError: `folder` is not empty.
        ValueError: `base_license` is not known to allow it, `folder` lies in a model folder,
            `domain_mix` is no mix, or there is nothing to merge.
    """
    config = model.config
    require_licence(base_license, model)
    require_outside(folder)
    if config.adaptation == "frozen":
        raise ValueError(
            f"adaptation='frozen': there is nothing to merge; {base_name(model)} is the backbone as it stands"
        )
    merged: Any = model.merged_backbone(domain_mix)
    merged.to(dtype or merged.dtype)
    change = "all weights were trained further" if config.adaptation == "full" else "low-rank adapters were merged in"
    if config.has_router:
        prior = [1 / config.num_domains] * config.num_domains
        mix = prior if domain_mix is None else torch.as_tensor(domain_mix).tolist()
        change += ", under the mix " + ", ".join(f"{n}={w:.4g}" for n, w in zip(config.domains, mix, strict=True))
    with new_folder(folder) as staged:
        merged.save_pretrained(staged)
        (staged / "NOTICE").write_text(notice_of(model, change, base_license), encoding="utf-8", newline="\n")
        for file in staged.glob("*.safetensors"):  # safetensors makes them private to their owner
            file.chmod((staged / "config.json").stat().st_mode)


def notice_of(model: AdaptFaceModel, change: str, base_license: str) -> str:
    """What accompanies weights of the base: where they are from, what was changed, what they inherit."""
    return (
        f"These weights are a changed copy of {base_name(model)}: {change}.\n"
        f"Licence of the base, as stated by who made this copy: {base_license}\n"
        "What was trained inherits the terms of the faces it was trained on.\n"
    )


def require_licence(base_license: str, model: AdaptFaceModel) -> None:
    """Refuse a licence that is not known to let changed copies be passed on."""
    if base_license.lower() not in CHANGED_COPIES:
        raise ValueError(
            f"base_license {base_license!r} is no licence known to let changed copies be passed on; read that of "
            f"{base_name(model)} and give its id, one of {', '.join(sorted(CHANGED_COPIES))}; or export the adapters "
            "alone, as peft"
        )


def require_outside(folder: Path) -> None:
    """Refuse a place within a model or a release, which would be published with it."""
    for parent in folder.resolve().parents:
        config = parent / "config.json"
        if config.is_file() and '"adaptface"' in config.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(f"{folder} lies in the model folder {parent}, which holds no base; name one outside of it")


def base_name(model: AdaptFaceModel) -> str:
    """The base and its revision, without folders of this machine."""
    config = model.config
    name = base_id(config.backbone)
    return f"{name} (revision {config.backbone_revision})" if config.backbone_revision else f"{name} (a local folder)"


def base_id(backbone: str) -> str:
    """Hub id of a base, or the name of its folder without those around it."""
    return Path(backbone).name if is_local(backbone) else without_folders(backbone)


def _rank_and_alpha(weights: torch.Tensor, rank: int, scaling: float) -> tuple[int, float]:
    """PEFT's r and lora_alpha of the stacked experts, lora_alpha / r being their scaling."""
    taking_part = weights[weights > 0]
    total = rank * len(taking_part)
    return total, scaling * total * (float(taking_part[0]) if _all_equal(taking_part) else 1.0)


def _stacked(adapter: DomainLoRA, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, in) and B (out, R) of the experts that take part, float32; weights that differ are multiplied into B."""
    chosen = weights > 0
    a, b = (p.detach().cpu()[chosen].float() for p in (adapter.lora_A, adapter.lora_B))  # (n, r, in), (n, r, out)
    if not _all_equal(weights[chosen]):
        b = b * weights[chosen][:, None, None]
    return a.flatten(0, 1), b.flatten(0, 1).T


def _all_equal(weights: torch.Tensor) -> bool:
    return bool((weights == weights[0]).all())


def _pair(module: str, a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A and B of a module under the keys of PEFT's files."""
    yield f"base_model.model.{module}.lora_A.weight", a
    yield f"base_model.model.{module}.lora_B.weight", b


def _target_modules(model: AdaptFaceModel) -> str:
    """A pattern of the whole names of the adapted modules; a model in which they are called otherwise fails to load."""
    config = model.config
    layers = "|".join(map(str, config.adapted_layers))
    adapted = model._adapters_of(config.adapted_layers[0])
    names = [
        re.escape(name) for name, (target, _) in block_modules(config.backbone_config).items() if target in adapted
    ]
    pattern = rf"encoder\.layer\.({layers})\.({'|'.join(names)})"
    return pattern if model.patch_adapter is None else f"{pattern}|{re.escape(PATCH_MODULE)}"


def _write_adapter(folder: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8", newline="\n")
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
