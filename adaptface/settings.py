"""Settings of a training run: one flat dataclass, filled from a YAML recipe and then from `--key value` words.

The same names serve everywhere: the recipe, the command line, `settings.yaml` of the run folder. Every value is
converted by the type of its field, so `1e-4`, `"1e-4"` and `0.0001` are the same learning rate, and `--overwrite false`
is false.
"""

# ruff: noqa: RUF009  (`setting` is `dataclasses.field`)

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from adaptface.data.protocols import is_cfp_split, is_lfw_list

TRACKERS = ("tensorboard", "trackio", "wandb")
SYNTHETIC = "synthetic"  # train_data: render the embedded synthetic faces into the run folder
TINY_RANDOM = "tiny-random"  # backbone: write a tiny, randomly initialised Dinov2 into the run folder

# Fields of the settings that are handed to AdaptFaceConfig under the same name.
MODEL_FIELDS = (
    "adaptation",
    "adapter_targets",
    "adapter_layers",
    "lora_rank",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "domains",
    "router_layer",
    "router_hidden_size",
    "router_dropout",
    "embedding_size",
    "image_size",
)


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    above: float | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    path: bool = False,
    may_change: bool = False,
) -> Any:
    """A dataclass field with its documentation and limits.

    Args:
        choices: allowed values (of each item, for a list).
        above, minimum, maximum: exclusive lower, inclusive lower and inclusive upper bound.
        path: `${NAME}` and `~` in the value are expanded.
        may_change: a resumed run may have another value than its checkpoint.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "above": above,
        "minimum": minimum,
        "maximum": maximum,
        "path": path,
        "may_change": may_change,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class TrainSettings:
    """Everything `train_accelerate.py` can be told. Defaults are the reference recipe (see recipes/)."""

    # The run
    output_dir: str = setting("runs/train", "run folder to write", path=True, may_change=True)
    resume: str = setting("no", "'no', 'auto' (newest complete checkpoint, if any) or a checkpoint folder", path=True,
                          may_change=True)  # fmt: skip
    overwrite: bool = setting(False, "delete an earlier run in output_dir first", may_change=True)
    dry_run: bool = setting(False, "check data, base and memory, measure a few steps, train nothing", may_change=True)
    cpu_threads: int = setting(
        0, "threads of each process's CPU arithmetic, 0 = torch's choice", minimum=0, may_change=True
    )
    seed: int = setting(0, "seed of weights, image order, augmentation and dropout", minimum=0)
    deterministic: bool = setting(False, "deterministic kernels only: on CUDA slower, but a resume is bit for bit")
    stop_after_steps: int = setting(0, "save and stop once this step is done, 0 = never (for job time limits)",
                                    minimum=0, may_change=True)  # fmt: skip

    # Data
    train_data: str = setting("./data/casia-webface", "folder of identity folders, parquet, hf://user/name, synthetic",
                              path=True, may_change=True)  # fmt: skip
    train_metadata: str | None = setting(None, "CSV with columns file[,identity][,domain]", path=True, may_change=True)
    domain_labels: str | None = setting(None, "sidecar of `adaptface domains`; its labels replace those of train_data",
                                        path=True, may_change=True)  # fmt: skip
    train_split: str = setting("train", "split of a Hugging Face data set")
    stream: bool = setting(False, "read a Hugging Face data set as a stream, never stored whole")
    stream_buffer: int = setting(10_000, "images held in memory to shuffle a stream", minimum=1)
    stream_images: int | None = setting(None, "images of a stream, null = what the set says", minimum=1)
    synthetic_identities: int = setting(200, "synthetic faces: training identities", minimum=2)
    synthetic_images: int = setting(8, "synthetic faces: images an identity", minimum=2)
    synthetic_dev_identities: int = setting(60, "synthetic faces: development identities", minimum=12)
    synthetic_pairs: int = setting(600, "synthetic faces: development pairs, a multiple of 20", minimum=20)
    max_broken_images: int = setting(100, "stop when more images than this are broken in an epoch; fewer are skipped",
                                     minimum=0, may_change=True)  # fmt: skip
    num_workers: int = setting(4, "loader processes of each training process", minimum=0, may_change=True)
    flip: float = setting(0.5, "probability of a horizontal flip", minimum=0, maximum=1)
    randaugment_ops: int = setting(0, "RandAugment operations an image, 0 = none", minimum=0)
    randaugment_magnitude: list[int] = setting([1, 16], "RandAugment magnitudes, of 0 to 30", minimum=0, maximum=30)
    low_resolution: float = setting(0.0, "probability of a low-resolution copy", minimum=0, maximum=1)
    occlusion: float = setting(0.0, "probability of an occluding patch", minimum=0, maximum=1)
    crop: float = setting(0.0, "probability of a crop put back in place", minimum=0, maximum=1)
    photometric: float = setting(0.0, "probability of other brightness, contrast, saturation", minimum=0, maximum=1)

    # Model: see AdaptFaceConfig
    backbone: str = setting("facebook/dinov2-small", "Hub id or folder of a Dinov2, or 'tiny-random'", path=True)
    backbone_revision: str | None = setting(None, "revision of a base from the Hub")
    adaptation: str = setting("lora", "what trains", choices=("lora", "frozen", "full"))
    adapter_targets: str = setting("attention", "adapted Linears", choices=("attention", "attention+mlp", "all-linear"))
    adapter_layers: list[int] | None = setting(None, "adapted blocks, null = all", minimum=0)
    lora_rank: int = setting(16, "rank of one expert", minimum=1)
    lora_alpha: float = setting(16.0, "scale = alpha / sqrt(rank), or alpha / rank without rsLoRA", above=0)
    use_rslora: bool = setting(True, "scale by alpha / sqrt(rank)")
    lora_dropout: float = setting(0.0, "dropout before A", minimum=0, maximum=0.99)
    domains: list[str] = setting(["general", "pose", "age"], "names of the experts; one name = plain LoRA")
    router_layer: int | None = setting(None, "block whose CLS token the router reads, null = the middle", minimum=0)
    router_hidden_size: int = setting(256, "hidden width of the router", minimum=1)
    router_dropout: float = setting(0.1, "dropout of the router", minimum=0, maximum=0.99)
    embedding_size: int = setting(512, "width of the embedding", minimum=1)
    image_size: int = setting(224, "side of the square input, pixels", minimum=14)
    attention: str = setting("sdpa", "attention implementation", choices=("sdpa", "eager"))
    frozen_dtype: str = setting("auto", "type the frozen base is held in; auto = bfloat16 under bf16",
                                choices=("auto", "float32", "bfloat16"))  # fmt: skip

    # Losses
    head: str = setting("cosface", "margin head", choices=("cosface", "arcface", "adaface"))
    scale: float = setting(64.0, "scale s of the margin head", above=0)
    margin: float | None = setting(None, "margin m, null = the published one (0.35, 0.5, 0.4)", minimum=0, maximum=1.57)
    domain_loss_weight: float = setting(0.1, "weight of the domain cross-entropy (labelled images)", minimum=0)
    balance_loss_weight: float = setting(0.01, "weight of the load-balancing loss", minimum=0)
    router_z_loss_weight: float = setting(0.001, "weight of the router z-loss", minimum=0)
    alignment_loss_weight: float = setting(0.0, "weight of the domain alignment loss", minimum=0)
    alignment_temperature: float = setting(0.1, "temperature of the domain alignment loss", above=0)

    # Optimisation
    epochs: int = setting(40, "passes over the training images", minimum=1)
    batch_size: int = setting(128, "images of one forward pass of one process", minimum=1)
    gradient_accumulation: int = setting(1, "forward passes of each process a step", minimum=1)
    learning_rate: float = setting(1e-4, "peak learning rate of AdamW", above=0)
    head_learning_rate: float | None = setting(None, "peak learning rate of the identity head, null = learning_rate",
                                               above=0)  # fmt: skip
    weight_decay: float = setting(0.05, "AdamW decay of matrices; biases, norms and position embeddings have none",
                                  minimum=0)  # fmt: skip
    gradient_clip: float = setting(5.0, "largest gradient norm", above=0)
    schedule: str = setting("cosine", "learning rate over time", choices=("cosine", "constant", "froundation"))
    warmup_epochs: float = setting(1.0, "linear warm-up (cosine, constant)", minimum=0)
    min_learning_rate: float = setting(1e-6, "floor of the schedule", minimum=0)
    mixed_precision: str = setting("no", "autocast of the forward pass", choices=("no", "bf16", "fp16"))
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, about 1.45 x the time")
    max_nonfinite_steps: int = setting(20, "stop after this many skipped (NaN/Inf) steps in a row", minimum=1,
                                       may_change=True)  # fmt: skip

    # Development set: selects best/; never a benchmark
    dev_pairs: str | None = setting(None, "pair list of the development set", path=True, may_change=True)
    dev_images: str | None = setting(None, "image folder of dev_pairs, null = beside it", path=True, may_change=True)
    eval_every_epochs: int = setting(1, "evaluate after every so many epochs, and at the end", minimum=1)
    eval_batch_size: int = setting(128, "images of an evaluation batch", minimum=1, may_change=True)

    # Records
    log_every_steps: int = setting(20, "steps a line of log.jsonl stands for", minimum=1)
    trackers: list[str] = setting([], "further trackers, by name", choices=TRACKERS, may_change=True)
    save_every_steps: int = setting(0, "steps between checkpoints, 0 = one an epoch", minimum=0, may_change=True)
    keep_checkpoints: int = setting(2, "newest checkpoints kept", minimum=1, may_change=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _convert(field, getattr(self, field.name))
            if field.metadata["path"] and value is not None:
                value = _expand(field.name, value)
            _check_limits(field, value)
            setattr(self, field.name, value)
        if len(self.randaugment_magnitude) != 2 or self.randaugment_magnitude[0] > self.randaugment_magnitude[1]:
            raise ValueError(
                f"randaugment_magnitude: {self.randaugment_magnitude} is no range; give two numbers, lowest first, "
                "such as [1, 16]"
            )
        if not self.domains or len(set(self.domains)) != len(self.domains):
            raise ValueError(f"domains: {self.domains} must name each expert once, and at least one")
        if self.frozen_dtype == "bfloat16" and self.mixed_precision != "bf16":
            raise ValueError(
                f"frozen_dtype: 'bfloat16' needs mixed_precision: bf16, but that is {self.mixed_precision!r}; "
                "change one of the two"
            )
        if self.frozen_dtype == "bfloat16" and self.adaptation == "full":
            raise ValueError("frozen_dtype: 'bfloat16' has no meaning with adaptation: full; use 'auto' or 'float32'")
        if self.overwrite and self.resume != "no":
            raise ValueError(f"overwrite: true contradicts resume: {self.resume!r}; choose one of them")
        held = [name for name in ("train_metadata", "domain_labels") if getattr(self, name) is not None]
        if self.stream and (held or self.train_data == SYNTHETIC):
            other = held[0] if held else "train_data: synthetic"
            raise ValueError(
                f"stream: true reads Hugging Face data sets only, and contradicts {other}; drop one of them"
            )
        for name in ("dev_pairs", "dev_images"):
            _refuse_benchmark(name, getattr(self, name))
        folder = Path(self.output_dir)
        if blocked := next((place for place in (folder, *folder.parents) if place.is_file()), None):
            raise ValueError(f"output_dir: {self.output_dir!r} cannot be made, {blocked} is a file; choose another one")

    @property
    def holds_base_in_bfloat16(self) -> bool:
        """Whether the frozen base is cast to bfloat16."""
        allowed = self.mixed_precision == "bf16" and self.adaptation != "full"
        return allowed and self.frozen_dtype != "float32"

    @property
    def routed_domains(self) -> list[str] | None:
        """Domains that the router tells apart, so that the data may name no other; None without a router."""
        return self.domains if self.adaptation == "lora" and len(self.domains) > 1 else None

    def model_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `AdaptFaceConfig`."""
        return {name: getattr(self, name) for name in MODEL_FIELDS}

    def to_yaml(self) -> str:
        """The resolved settings, in the order of the fields."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def read_settings(arguments: Sequence[str]) -> TrainSettings:
    """Read a recipe and the words after it.

    Args:
        arguments: `[RECIPE.yaml] [--key value | --key=value ...]`, as in `sys.argv[1:]`. A list is written as YAML
            (`--domains "[general, pose]"`) or with commas (`--domains general,pose`).
    Returns:
        The checked settings.
    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: unknown key, wrong type or range (naming key, value and remedy), unset environment variable.
    """
    words = list(arguments)
    values: dict[str, Any] = {}
    given: set[str] = set()
    if words and not words[0].startswith("--"):
        values = read_recipe(Path(words.pop(0)))
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} stands where a setting is expected; write --key value")
        key, equals, value = word[2:].partition("=")
        field = _field(key)
        given.add(key)
        if not equals and _field_types()[field.name] is bool and (not words or words[0].startswith("--")):
            value = "true"  # a bare switch
        elif not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"--{key} has no value; write --{key} value (true or false for a switch)")
            value = words.pop(0)
        values[key] = value
    if "resume" in given and "overwrite" not in given and values["resume"] != "no":
        values["overwrite"] = False  # a recipe that starts afresh each time can still be resumed by hand
    return TrainSettings(**values)


def read_recipe(path: Path) -> dict[str, Any]:
    """The key-value pairs of a flat YAML file, names checked, values not yet converted."""
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} does not exist; see recipes/ for those that do")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        values, node = yaml.safe_load(text) or {}, yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} holds a {type(values).__name__}; it must be lines of `key: value`")
    for key in values:
        _field(str(key))
    keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"recipe {path} sets {', '.join(twice)} twice; keep one of the lines")
    return values


def changed_settings(saved: dict[str, Any], settings: TrainSettings) -> list[str]:
    """What a resumed run may not change, as `key: saved -> now` lines.

    Args:
        saved: the mapping in `settings.yaml` of the checkpoint.
    """
    lines = []
    for field in dataclasses.fields(settings):
        now = getattr(settings, field.name)
        if not field.metadata["may_change"] and saved.get(field.name, now) != now:
            lines.append(f"{field.name}: {saved[field.name]!r} -> {now!r}")
    return lines


def describe_settings() -> str:
    """One line a setting: name, default, meaning."""
    lines = []
    defaults = TrainSettings()
    for field in dataclasses.fields(TrainSettings):
        default = getattr(defaults, field.name)
        choices = f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        lines.append(f"  --{field.name} {default!r}: {field.metadata['help']}{choices}")
    return "\n".join(lines)


def _field(name: str) -> dataclasses.Field:
    fields = {field.name: field for field in dataclasses.fields(TrainSettings)}
    if name not in fields:
        close = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else "--help lists all settings"
        raise ValueError(f"unknown setting {name!r}; {hint}")
    return fields[name]


@functools.cache
def _field_types() -> dict[str, Any]:
    return typing.get_type_hints(TrainSettings)


def _convert(field: dataclasses.Field, value: Any) -> Any:
    """`value` as the type the field is annotated with."""
    kind = _field_types()[field.name]
    if value is False and "no" in (field.default, *(field.metadata["choices"] or ())):
        value = "no"  # what YAML makes of a bare `no`
    kinds = typing.get_args(kind) if NoneType in typing.get_args(kind) else (kind,)
    if value is None or (isinstance(value, str) and value.strip().lower() in ("null", "none")):
        if NoneType in kinds:
            return None
        raise ValueError(f"{field.name}: has no value; give {_kind_name(kind)}")
    kind = kinds[0]
    if typing.get_origin(kind) is list:
        if isinstance(value, str):
            words = [word for word in value.split(",") if word.strip()]
            try:
                value = yaml.safe_load(value) if value.strip().startswith("[") else words
            except yaml.YAMLError as error:
                raise ValueError(f"{field.name}: {value!r} is not a list; write [a, b] or a,b") from error
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{field.name}: {value!r} is not a list; write {field.name}: [a, b]")
        return [_convert_scalar(field.name, typing.get_args(kind)[0], item) for item in value]
    return _convert_scalar(field.name, kind, value)


def _convert_scalar(name: str, kind: type, value: Any) -> Any:
    text = str(value).strip()
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is int and not isinstance(value, bool) and re.fullmatch(r"[+-]?\d+(\.0+)?", text):
        return int(float(text))
    if kind is float and not isinstance(value, bool):
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if number == number and abs(number) != float("inf"):
            return number
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool) and text:
        return text
    raise ValueError(f"{name}: {value!r} is not {_kind_name(kind)}")


def _kind_name(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
    return names.get(kind, "a list")


def _check_limits(field: dataclasses.Field, value: Any) -> None:
    limits = field.metadata
    for item in value if isinstance(value, list) else [value]:
        if item is None:
            continue
        if limits["choices"] and item not in limits["choices"]:
            raise ValueError(f"{field.name}: {item!r} is not one of {', '.join(limits['choices'])}")
        if limits["above"] is not None and item <= limits["above"]:
            raise ValueError(f"{field.name}: {item!r} must be above {limits['above']}")
        if limits["minimum"] is not None and item < limits["minimum"]:
            raise ValueError(f"{field.name}: {item!r} is too small; the least is {limits['minimum']}")
        if limits["maximum"] is not None and item > limits["maximum"]:
            raise ValueError(f"{field.name}: {item!r} is too large; the most is {limits['maximum']}")


def _expand(name: str, value: str) -> str:
    def lookup(match: re.Match) -> str:
        variable = match.group(1)
        if not os.environ.get(variable):
            raise ValueError(
                f"{name}: {value!r} needs the environment variable {variable}, which is not set; "
                f"set it to a folder, or give --{name} PATH"
            )
        return os.environ[variable]

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", lookup, value))


# LFW and its kin (CALFW, CPLFW, XQLFW...), CFP, AgeDB, IJB and others, however their files are called.
_BENCHMARKS = re.compile(r"(?<!ha)lfw|cfp|(?<!im)age[-_]?db|vgg2?_?fp|tinyface|megaface|(?<![a-z])(ijb|rfw|bfw)")


def _refuse_benchmark(setting: str, value: str | None) -> None:
    """A checkpoint chosen on a benchmark makes the benchmark's number worthless.

    It is told by its name (lfw.bin, pairs_lfw.csv, lfw/pairs.txt), or by a form that only LFW and CFP have.
    """
    if value is None:
        return
    path = Path(value).absolute()
    named = any(_BENCHMARKS.search(name.lower()) for name in (path.name, path.parent.name))
    if named or is_cfp_split(path) or (path.suffix.lower() == ".txt" and path.is_file() and is_lfw_list(path)):
        raise ValueError(
            f"{setting}: {value!r} is a benchmark; selecting a checkpoint on it would make its result meaningless. "
            "Use pairs of identities that are in no benchmark, and measure the benchmark with eval_benchmarks.py"
        )
