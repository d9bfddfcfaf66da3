"""The model card of a release, from its configuration, its run settings and its results.

The card states what is known and says "not measured" or "not stated" of the rest. It renders numbers; it computes none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from configuration_adaptface import AdaptFaceConfig

TEMPLATE = Path(__file__).resolve().parents[1] / "model_card" / "template.md"
NOT_MEASURED, NOT_STATED = "not measured", "not stated"
CODE_LICENSE = "apache-2.0"
SYNTHETIC = "synthetic"  # `train_data` of the settings, `data` of a result
_PLACEHOLDER = re.compile(
    r"\{\{|\}\}|\{%|\[More Information|\b(?:TODO|TBD|FIXME|XXX|nan)\b|\bNone\b(?!-)"
    r"|lorem ipsum|placeholder|<your|\byour-"
)
_LICENSE_ID = re.compile(r"[a-z0-9]+([.+-][a-z0-9]+)*\+*")  # such as cc-by-nc-4.0, openrail++
_HUB_DATA = re.compile(r"hf://(?:datasets/)?([\w.-]+(?:/[\w.-]+)?)")  # a revision or a folder may follow
_PLOTS = {
    "roc.png": "ROC", "det.png": "DET", "scores.png": "Similarities of genuine and impostor pairs",
    "domains.png": "Accuracy by domain", "domain_usage.png": "Mean weight of each expert over training",
}  # fmt: skip
_TRAINING = {
    "adapter_targets": "adapted matrices",
    "epochs": "epochs",
    "batch_size": "batch size of a process",
    "gradient_accumulation": "gradient accumulation",
    "learning_rate": "learning rate",
    "schedule": "schedule",
    "weight_decay": "weight decay",
    "head": "margin head",
    "scale": "scale s",
    "margin": "margin m",
    "mixed_precision": "mixed precision",
    "seed": "seed",
}


def build_card(
    config: AdaptFaceConfig,
    counts: Mapping[str, float],
    results: Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None,
    *,
    name: str,
    weights_sha256: str | None = None,
    license_id: str | None = None,
    rounding: tuple[str, float] | None = None,
    plots: Sequence[str] = (),
) -> ModelCard:
    """Write the README.md of a release.

    Args:
        config (`AdaptFaceConfig`): the model's configuration.
        counts (`dict`): its parameter counts, `AdaptFaceModel.summary()`.
        results (`dict`, *optional*): content of `results.json`. Rows of other embedders, also of other AdaptFace
            models, are shown for comparison and stay out of the metadata.
        settings (`dict`, *optional*): content of the run's `settings.yaml`.
        name (`str`): Hub id `user/name`, or name of the local folder, without a slash; what the example loads.
        weights_sha256 (`str`, *optional*): digest of this model's weights; rows with it are this model's.
        license_id (`str`, *optional*): Hub licence id of the weights. Default: that of the code if only synthetic faces
            were used in training, else "other": the terms of the training data.
        rounding (`tuple`, *optional*): precision that the weights were rounded to after they were measured, and the
            smallest cosine of an embedding before and after it.
        plots: names of the pictures in `plots/`.
    Returns:
        `ModelCard`: text and metadata; `str(card)` is the file.
    Raises:
        ValueError: `license_id` has not the form of one, a value is no number where one belongs, or a placeholder is
            left in the text.
    """
    settings = settings or {}
    if license_id is not None and not _LICENSE_ID.fullmatch(license_id):
        raise ValueError(
            f"license {license_id!r} is no licence id of the Hub; give one of "
            "https://huggingface.co/docs/hub/repositories-licenses, such as apache-2.0, or other"
        )
    chosen_on = _development_pairs(settings)
    rows = [
        {**row, "ours": is_of(row, weights_sha256), "chosen_on": row["benchmark"] == chosen_on}
        for row in (results["results"] if results else [])
    ]
    local, trained_on = is_local(config.backbone), training_data(settings)
    license_id = license_id or (CODE_LICENSE if trained_on == SYNTHETIC else "other")
    base = (
        f"the base `{Path(config.backbone).name}`"
        if local
        else f"[{config.backbone}](https://huggingface.co/{config.backbone})"
    )
    if config.backbone_revision:
        base += f" (revision `{config.backbone_revision}`)"
    absent = set() if config.has_router else {"router"}  # of the parts, and of the settings that concern them
    if config.adaptation != "lora":
        absent |= {"adapters", "adapter_targets"}
    text = str(
        ModelCard.from_template(
            _metadata(config, rows, name, license_id, settings),
            template_str=TEMPLATE.read_text(encoding="utf-8"),
            title=name if "/" in name else f"{name} (local folder)",
            holds_base=config.adaptation == "full",
            has_router=config.has_router,
            adaptation=_adaptation(config),
            base=base,
            embedding_size=config.embedding_size,
            image_size=config.image_size,
            warnings=_warnings(config, rows, local, trained_on),
            usage=_usage(name, config),
            parameters=[
                (part, _count(part, counts, config))
                for part in ("base", "adapters", "router", "projection")
                if part not in absent
            ],
            training=[
                ("training data", _cell(trained_on)),
                *([("experts", _cell(", ".join(config.domains)))] if config.has_router else []),
                *((label, _setting(settings, key)) for key, label in _TRAINING.items() if key not in absent),
            ],
            evaluation=_evaluation(rows, settings, rounding),
            plots=[(_PLOTS[name], f"plots/{name}") for name in _PLOTS if name in plots],
            groups=_groups(rows),
            peft=_peft(name, config),
            thresholds=_thresholds(config),
            licence=_licence(license_id, trained_on),
        )
    )
    if gap := gap_in(text):
        raise ValueError(f"the model card of {name} has a gap: {gap}")
    return ModelCard(text)


def gap_in(text: str) -> str | None:
    """The first placeholder in a card, with what is around it."""
    if not (left := _PLACEHOLDER.search(text)):
        return None
    around = text[max(0, left.start() - 40) : left.end() + 40].replace("\n", " ")
    return f"{left.group()!r} in '...{around}...'"


def is_of(row: Mapping[str, Any], weights_sha256: str | None) -> bool:
    """Whether a row of `results.json` was measured with exactly these weights."""
    return weights_sha256 is not None and row["embedder"].get("weights_sha256") == weights_sha256


def is_local(backbone: str) -> bool:
    """Whether the base is a folder of this machine, as transformers decides it, rather than a Hub id."""
    return Path(backbone).is_dir() or Path(backbone).is_absolute()


def _metadata(
    config: AdaptFaceConfig, rows: Sequence[Mapping[str, Any]], name: str, license_id: str, settings: Mapping[str, Any]
) -> ModelCardData:
    """The YAML block; its model-index holds this model's own accuracy and AUC, as fractions.

    Results on the pairs that the checkpoint was chosen on stay out: whoever reads the index takes them for a test.
    """
    evaluations = [
        EvalResult(
            task_type="image-feature-extraction",
            task_name="Face verification",
            dataset_type=_slug(row["benchmark"]),
            dataset_name=_benchmark(row),
            metric_type=metric,
            metric_name=f"{label} ({row['protocol']['folds']})" if metric == "accuracy" else label,
            metric_value=_number(row[key], row),
        )
        for row in rows
        if row["ours"] and not row["chosen_on"]
        for metric, label, key in (("accuracy", "Accuracy", "accuracy"), ("roc_auc", "AUC", "auc"))
        if key in row  # templates (IJB) have no accuracy
    ]
    lora = ["lora"] if config.adaptation == "lora" else []
    optional: dict[str, Any] = {}
    if license_id == "other":
        optional["license_name"] = "terms-of-the-training-data"
    if not is_local(config.backbone):
        optional["base_model"] = config.backbone
        optional["base_model_relation"] = "finetune" if config.adaptation == "full" else "adapter"
    if dataset := _HUB_DATA.match(str(settings.get("train_data", ""))):
        optional["datasets"] = [dataset[1]]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        license=license_id,
        tags=["adaptface", "face-recognition", "face-verification", *lora, "dinov2"],
        model_name=name,
        eval_results=evaluations or None,
        metrics=["accuracy", "roc_auc"] if evaluations else None,
        **optional,
    )


def _usage(name: str, config: AdaptFaceConfig) -> str:
    is_folder = "/" not in name
    source = f"./{name}" if is_folder else name  # the dot keeps a folder that is not there from being asked of the Hub
    remark = "  # a local folder: its path from where you work" if is_folder else ""
    return (
        "import torch\n"
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        f'source = "{source}"{remark}\n'
        "processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True)\n"
        "model = AutoModel.from_pretrained(source, trust_remote_code=True)\n"
        "with torch.inference_mode():\n"
        f"    embeddings = model(**processor(images)).pooler_output  # (B, {config.embedding_size}), length 1"
    )


def _adaptation(config: AdaptFaceConfig) -> str:
    """How the base was adapted, up to the word before its name."""
    if config.adaptation == "frozen":
        return "a trained projection, without adapters, on"
    if config.adaptation == "full":
        return "full fine-tuning, without adapters, of"
    numbers = f"rank {config.lora_rank}, scaling {config.scaling:g}, on"
    if config.has_router:
        return f"domain-aware LoRA (DA-LoRA): {config.num_domains} experts mixed per image by a router, {numbers}"
    return f"plain LoRA: {numbers}"


def _count(part: str, counts: Mapping[str, float], config: AdaptFaceConfig) -> str:
    """Parameters of a part, as a cell."""
    experts = f" ({config.num_domains} x {counts['per_expert']:,})" if config.has_router else ""
    return f"{counts[part]:,}{experts if part == 'adapters' else ''}"


def _warnings(config: AdaptFaceConfig, rows: Sequence[Mapping[str, Any]], local: bool, trained_on: str) -> list[str]:
    warnings = []
    if local and config.adaptation != "full":
        warnings.append(
            f"Development release: its base is the local folder {Path(config.backbone).name} of the machine that made "
            "it, by the path in config.json. It loads there and nowhere else."
        )
    if trained_on == SYNTHETIC:
        warnings.append("Trained on synthetic (rendered) faces only: a demonstration, of no use on real faces.")
    if not any(row["ours"] for row in rows):
        warnings.append("Not evaluated: how well this model compares faces is not measured.")
    if chosen_on := {_benchmark(row): None for row in rows if row["ours"] and row["chosen_on"]}:
        warnings.append(
            f"The checkpoint was chosen on {', '.join(chosen_on)}, as the best of its run: its results on these pairs "
            "are no independent measurement."
        )
    return warnings


def _evaluation(
    rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], rounding: tuple[str, float] | None
) -> str:
    """The table of results, with the protocol of each benchmark below it."""
    if not rows:
        return f"Accuracy, AUC, EER and TAR@FAR: {NOT_MEASURED}."
    lines = [
        "| benchmark | embedder | pairs | accuracy, % | AUC | EER, % | TAR@FAR, % |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    notes = []
    for row in rows:
        rates = [f"{100 * _number(r['tar'], row):.2f} @ {r['far']:g}" for r in row["tar_at_far"]]
        embedder = f"{Path(row['embedder']['name']).name} ({row['embedder']['kind']})"
        if row["ours"]:
            embedder = "**this model** (chosen on these pairs)" if row["chosen_on"] else "**this model**"
        cells = [
            _benchmark(row),
            embedder,
            f"{row['pairs']:,}",
            f"{100 * _number(row['accuracy'], row):.2f} ± {100 * _number(row['accuracy_std'], row):.2f}"
            + _interval(row, "accuracy_interval", 100, 2)
            if "accuracy" in row
            else "-",
            f"{_number(row['auc'], row):.4f}" + _interval(row, "auc_interval", 1, 4),
            f"{100 * _number(row['eer'], row):.2f}",
            ", ".join(rates) or NOT_MEASURED,
        ]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
        protocol = "; ".join(f"{key}: {value}" for key, value in row["protocol"].items())
        notes.append(f"- {_benchmark(row)}: {protocol}.")
        notes += [f"- {_benchmark(row)}, warning: {warning}." for warning in row.get("warnings", ())]
    lines += [
        "",
        "Accuracy is the mean over the folds ± their standard deviation; in brackets intervals of 95 %. Protocols:",
        "",
        *dict.fromkeys(notes),
    ]
    if rounding:
        lines += [
            "",
            f"Measured before the weights were rounded to {rounding[0]}, as they are here; the cosine between the "
            f"embeddings before and after is at least {rounding[1]:.6f} on test patterns.",
        ]
    if not settings:
        lines += ["", f"Whether the checkpoint was chosen on one of these benchmarks: {NOT_STATED}."]
    return "\n".join(lines)


def _interval(row: Mapping[str, Any], key: str, factor: float, digits: int) -> str:
    ends = row.get(key)
    return f" ({factor * ends[0]:.{digits}f} to {factor * ends[1]:.{digits}f})" if ends else ""


def _groups(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Error rates of demographic groups at one threshold, at the lowest false accept rate; None if not measured."""
    lines = []
    for row in rows:
        if not row["ours"] or not (rates := (row.get("groups") or {}).get("rates")):
            continue
        rate = rates[-1]
        lines += [
            "",
            f"On {_benchmark(row)}, at one threshold for all groups ({rate['threshold']:.4f}, where the false accept "
            f"rate of the whole list is {rate['far']:g}):",
            "",
            "| group | false match rate, % | false non-match rate, % |",
            "|---|---|---|",
        ]
        for name, group in rate["groups"].items():
            cells = [
                NOT_MEASURED
                if group[key] is None
                else f"{100 * group[key]:.2f}{_interval(group, f'{key}_interval', 100, 2)}"
                for key in ("fmr", "fnmr")
            ]
            lines.append(f"| {_cell(name)} | {' | '.join(cells)} |")
    return "\n".join(lines[1:]) or None


def _peft(name: str, config: AdaptFaceConfig) -> str | None:
    """How plain PEFT loads the adapters; None where there are none."""
    if config.adaptation != "lora":
        return None
    base = f'"{config.backbone}"'
    if config.backbone_revision:
        base += f', revision="{config.backbone_revision}"'
    if is_local(config.backbone):
        base = f'"{Path(config.backbone).name}"'
    source = f"./{name}" if "/" not in name else name
    return (  # float32: transformers 5 would keep the precision that the base is stored in
        "import torch\n"
        "from peft import PeftModel\n"
        "from transformers import Dinov2Model\n\n"
        f"base = Dinov2Model.from_pretrained({base}, dtype=torch.float32)\n"
        f'model = PeftModel.from_pretrained(base, "{source}", subfolder="peft")'
        + (f'  # or "peft/experts/{config.domains[0]}"' if config.num_domains > 1 else "")
    )


def _thresholds(config: AdaptFaceConfig) -> str:
    if not config.thresholds:
        return (
            f"{NOT_MEASURED.capitalize()}. Do not guess one: choose it on pairs of your own, at the false accept rate "
            "you can bear."
        )
    measured, calibration = config.thresholds, config.thresholds["calibration"]
    lines = [
        f"Measured on {_benchmark(measured)}: {measured['impostor']:,} impostor and {measured['genuine']:,} genuine "
        f"pairs; {measured['embedding']}. Two faces count as one person above a threshold; 95 % intervals in brackets.",
        "",
        "| false accept rate | threshold (cosine) | false accepts | true accepts |",
        "|---:|---|---|---|",
    ]
    for point in measured["operating_points"]:
        low, high = ("?" if end is None else f"{end:.4f}" for end in point["threshold_interval"])
        rates = [
            f"{100 * point[rate]:.{digits}f} % ({100 * ends[0]:.{digits}f} to {100 * ends[1]:.{digits}f})"
            for rate, ends, digits in (
                ("measured_far", point["far_interval"], 3),
                ("tar", point["tar_interval"], 2),
            )
        ]
        lines.append(f"| {point['far']:g} | {point['threshold']:.4f} ({low} to {high}) | {' | '.join(rates)} |")
    lines += [
        "",
        f"The probability of a match at a cosine similarity s is 1 / (1 + exp({-calibration['intercept']:.3f} - "
        f"{calibration['slope']:.3f} s)), where a match is as likely as not beforehand "
        "(`model.config.match_probability(s, prior)`).",
    ]
    return "\n".join(lines)


def _licence(license_id: str, trained_on: str) -> str:
    weights = f"The weights: {license_id}."
    if license_id == "other":
        weights = (
            f"The weights follow the terms of the training data ({trained_on}), which this card does not state; "
            "many face data sets allow non-commercial research only."
        )
    return f"The Python files: {CODE_LICENSE} (see `LICENSE`). {weights} The base keeps its own licence."


def training_data(settings: Mapping[str, Any]) -> str:
    """What the model was trained on, without the folders of the machine."""
    source = str(settings.get("train_data") or "")
    if not source:
        return NOT_STATED
    return source if source == SYNTHETIC or source.startswith("hf://") else Path(source).name


def _development_pairs(settings: Mapping[str, Any]) -> str | None:
    """Name, as results have it, of the pairs that `best/` was chosen on; a run on rendered faces renders its own."""
    rendered = "dev_pairs" if settings.get("train_data") == SYNTHETIC else None
    pairs = settings.get("dev_pairs") or rendered
    return Path(str(pairs)).stem if pairs else None


def _setting(settings: Mapping[str, Any], key: str) -> str:
    """A setting as a cell; null in the settings leaves the choice to the code."""
    value = settings.get(key, NOT_STATED)
    return "default" if value is None else _cell(value)


def _benchmark(row: Mapping[str, Any]) -> str:
    return f"{row['benchmark']} (synthetic faces)" if row["data"] == SYNTHETIC else str(row["benchmark"])


def _number(value: Any, row: Mapping[str, Any]) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"results of {row['benchmark']}: {value!r} is no finite number; evaluate again")
    return float(value)


def _slug(text: str) -> str:
    """A name of any script as one word of the metadata."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-") or "benchmark"


def _cell(value: Any) -> str:
    """Text for one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")
