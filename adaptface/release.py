"""Stage a trained run as a release folder, and load it again the way its users will.

    adaptface release runs/NAME [--repo_id USER/NAME] [--push]

A release holds the adapters, the configuration, the processor and the code that loads them: no base weight, no
identity head, no training image, and no path of this machine but that of a local base. It becomes visible under its
name only when it is complete and has been loaded by a fresh interpreter that cannot import this project and reproduces
the embeddings of the run.
"""

from __future__ import annotations

import json
import keyword
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from adaptface import __version__
from adaptface.card import TEMPLATE, build_card, gap_in, is_local, is_of, training_data
from adaptface.checkpoint import RELEASE_FILES, RELEASE_PLOTS, files_below, not_of_a_release, strangers_in_release
from adaptface.export import export_peft, peft_adapters
from adaptface.files import new_folder, without_folders
from adaptface.plots import domain_usage, draw_domain_usage
from adaptface.tracking import read_log
from configuration_adaptface import AdaptFaceConfig
from image_processing_adaptface import AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel, tensors_sha256, weights_sha256

ROOT = Path(__file__).resolve().parents[1]
SHIPPED_REQUIREMENTS = ("numpy", "pillow", "safetensors", "torch", "transformers")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MIN_COSINE = 0.999  # of an embedding before and after the weights are rounded
HEADER_BYTES = 100_000  # of a safetensors file, at most
OTHER_BYTES = 4_000_000  # of any other file
REMARKS = ("Using a slow image processor as",)  # of transformers 4 on any processor that is not "fast"
_TOKEN = re.compile(
    r"hf_[A-Za-z0-9]{30,}|(?<![a-z])(?:(?:hf|api_org|gh[pousr]|github_pat|glpat)[_-][\w.-]{20,}"
    r"|(?:sk|xox[a-z])-[\w-]{20,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY)"
    r"|(?:api|access|secret|auth)_?(?:key|token)\W{1,4}[\w-]{20,}|//[^/\s:@]+:[^/\s@]+@",
    re.IGNORECASE,
)
_HEADER = {"format", "version", "adaptface_version", "training_data"}  # of the weights; the commit where there is one
_CHUNKS = {b"IHDR", b"PLTE", b"pHYs", b"tEXt", b"IDAT", b"IEND"}  # of a plot's PNG file
_AUTO_MAPS = {
    "config.json": {
        "AutoConfig": "configuration_adaptface.AdaptFaceConfig",
        "AutoModel": "modeling_adaptface.AdaptFaceModel",
    },
    "preprocessor_config.json": {"AutoImageProcessor": "image_processing_adaptface.AdaptFaceImageProcessor"},
}

# What the card reads of a point of the thresholds, and of a row of results.json.
_POINT = ("far", "threshold", "threshold_interval", "measured_far", "far_interval", "tar", "tar_interval")
_ROW: dict[str, type | tuple[type, ...]] = {
    "benchmark": str, "data": str, "protocol": dict, "embedder": dict, "pairs": int, "accuracy": (int, float),
    "accuracy_std": (int, float), "auc": (int, float), "eer": (int, float), "tar_at_far": list,
}  # fmt: skip


class ReleaseError(RuntimeError):
    """The folder is no release that may be published; the message says why."""


class Staged(NamedTuple):
    """What loading a release in a clean process showed.

    Attributes:
        difference (`float`): largest absolute difference between its embeddings and those of the model it was made
            from, with the weights rounded alike.
        cosine (`float`): smallest cosine of an embedding before and after the weights were rounded.
    """

    difference: float
    cosine: float


def stage_release(
    model_dir: Path,
    results: Path | None,
    out_dir: Path,
    *,
    settings: Path | None = None,
    repo_id: str | None = None,
    license_id: str | None = None,
    allow_full: bool = False,
    dtype: str = "bfloat16",
    version: str = __version__,
) -> Staged:
    """Build a release folder from a model folder, verify it, and put it in place of the former one.

    Args:
        model_dir (`Path`): folder written by `save_pretrained` of model and processor (`runs/NAME/best`).
        results (`Path`, *optional*): `results.json` of `eval_benchmarks.py`, with a row of exactly these weights;
            without it the card says "not measured".
        out_dir (`Path`): the release folder. An older release there is replaced; any other content is refused.
        settings (`Path`, *optional*): `settings.yaml` of the run, for the card; `log.jsonl` beside it for a plot.
        repo_id (`str`, *optional*): the Hub repository that the release will be, `user/name`, for the card; without it
            the card speaks of a local folder. Refused for a base that only this machine has.
        license_id (`str`, *optional*): Hub licence id of the weights; see `adaptface.card.build_card`.
        allow_full (`bool`): accept `adaptation="full"`, whose weights contain the whole (changed) base.
        dtype (`str`): precision of the weights in the file, "bfloat16" or "float32"; they are loaded as float32.
        version (`str`): version of the release, for the header of the weights.
    Returns:
        [`Staged`].
    Raises:
        FileNotFoundError: a named file is missing.
        FileExistsError: `out_dir` is `model_dir`, or holds something that is not a release.
        ReleaseError: the folder or a file that it is made from breaks a rule, or the release does not load to the same
            embeddings.
        ValueError: `repo_id`, `license_id` or the folder's name cannot be used.
    """
    for path in (results, settings):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{path} is not there; run the evaluation or leave it out")
    if not (model_dir / "config.json").is_file():
        raise FileNotFoundError(f"{model_dir} holds no saved model (no config.json); train or save it again")
    _require_names(out_dir, repo_id)
    for needed in ("LICENSE", "pyproject.toml", TEMPLATE.relative_to(ROOT)):
        _project_file(needed)
    _require_replaceable(out_dir, model_dir)
    scores = without_folders(_read_results(results)) if results else None
    run = _read_settings(settings) if settings else None

    if repo_id:
        _require_pinned(AdaptFaceConfig.from_pretrained(model_dir), model_dir)
    model = AdaptFaceModel.from_pretrained(model_dir)
    if model.config.adaptation == "full" and not allow_full:
        raise ReleaseError(
            f"{model_dir}: adaptation='full' would publish every weight of {model.config.backbone}; pass --allow_full "
            "if its licence and size permit that"
        )
    if repo_id and is_local(model.config.backbone) and model.config.adaptation != "full":
        raise ReleaseError(
            f"{model_dir}: its base is the folder {model.config.backbone} of this machine, so that nobody could load "
            f"{repo_id}; set backbone and backbone_revision in {model_dir / 'config.json'} to the Hub id and commit of "
            "this base, or leave --repo_id out"
        )
    digest = weights_sha256(model_dir, None, {})
    if scores is not None and not any(is_of(row, digest) for row in scores["results"]):
        raise ReleaseError(
            f"{results} was not measured with the weights of {model_dir} (SHA-256 {digest}); evaluate them again, or "
            "move the file away to release without results"
        )
    if fault := _fault_of_thresholds(model.config.thresholds, digest):
        raise ReleaseError(
            f"{model_dir}: the thresholds in config.json {fault}; measure them again by eval_benchmarks.py "
            "--write_thresholds, or set them to null to release without any"
        )
    processor = AdaptFaceImageProcessor.from_pretrained(model_dir)
    if processor.size["height"] != model.config.image_size:
        raise ReleaseError(
            f"{model_dir}: the processor makes images of {processor.size['height']} px, the model was trained on "
            f"{model.config.image_size} px; save the processor of the run"
        )
    exact = _embeddings_of_patterns(model)
    _round_weights(model, DTYPES[dtype])
    cosine = float(torch.nn.functional.cosine_similarity(exact, _embeddings_of_patterns(model)).min())
    if cosine < MIN_COSINE:
        raise ReleaseError(
            f"{model_dir}: rounding the weights to {dtype} turns an embedding by a cosine of {cosine:.5f}; release "
            "them with --dtype float32"
        )
    name = repo_id or out_dir.name
    plots = _plots(results, settings)
    card = build_card(
        model.config, model.summary(), scores, run, name=name, weights_sha256=digest, license_id=license_id,
        rounding=None if dtype == "float32" else (dtype, cosine), plots=tuple(plots),
    )  # fmt: skip
    if model.config.adaptation == "full":  # the base is inside: its name is a mere remark, nothing loads it
        model.config.backbone = without_folders(model.config.backbone)

    with new_folder(out_dir, replace=True) as folder:  # verified under the name it will be loaded by
        _save(model, folder, DTYPES[dtype], _metadata(version, run))
        processor.save_pretrained(folder)
        if model.config.adaptation == "lora":
            export_peft(model, folder / "peft")
        for plot, draw in plots.items():
            (folder / "plots").mkdir(exist_ok=True)
            draw(folder / "plots" / plot)
        (folder / "README.md").write_text(f"{card}\n", encoding="utf-8", newline="\n")
        for file, content in _own_files().items():
            (folder / file).write_bytes(content)
        if scores is not None:
            (folder / "results.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8", newline="\n")
        try:
            check_release(folder, allow_full=allow_full, run_folder=model_dir.parent)
            return Staged(verify_release(folder, model_dir), cosine)
        except ReleaseError as error:  # which names a folder that is gone in a moment
            raise ReleaseError(str(error).replace(str(folder), str(out_dir))) from error


def _fault_of_thresholds(thresholds: Mapping[str, Any] | None, digest: str) -> str | None:
    """What is wrong with thresholds that the card is to show for these weights, or None."""
    if thresholds is None:
        return None
    lacking = [name for name in ("benchmark", "data", "genuine", "impostor", "embedding") if name not in thresholds]
    for number, point in enumerate(thresholds["operating_points"]):
        lacking += [f"operating_points[{number}].{name}" for name in _POINT if name not in point]
    if lacking:
        return f"lack {', '.join(lacking)}"
    if thresholds.get("weights_sha256") != digest:
        return f"were measured with other weights (SHA-256 {thresholds.get('weights_sha256')} instead of {digest})"
    return None


def _require_pinned(config: AdaptFaceConfig, model_dir: Path) -> None:
    """Refuse a base of the Hub without a commit."""
    is_pinned = re.fullmatch("[0-9a-f]{40}", str(config.backbone_revision))
    if config.adaptation != "full" and not is_local(config.backbone) and not is_pinned:
        raise ReleaseError(
            f"{model_dir}: its base {config.backbone} is at revision {config.backbone_revision!r}, maybe another "
            f"base tomorrow; set backbone_revision in {model_dir / 'config.json'} to the commit it was trained on"
        )


def _round_weights(model: AdaptFaceModel, dtype: torch.dtype) -> None:
    """Give the weights that a release holds the values that this precision leaves of them."""
    released = model.state_dict()
    for name, tensor in released.items():
        if tensor.is_floating_point() and (model.config.adaptation == "full" or not name.startswith("backbone.")):
            tensor.copy_(tensor.to(dtype))


def _embeddings_of_patterns(model: AdaptFaceModel) -> torch.Tensor:
    """`(8, E)`, float64, of pictures of noise that are always the same."""
    side = model.config.image_size
    pictures = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(pictures).pooler_output.double()


def _save(model: AdaptFaceModel, folder: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Save a model whose config asks for float32 and whose file has another precision, and a header that tells more."""
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state, max_shard_size="1TB")
    file = folder / "model.safetensors"
    mode = file.stat().st_mode
    content = save(load_file(file), metadata={"format": "pt", **metadata})
    size = int.from_bytes(content[:8], "little")
    # safetensors orders the metadata by chance: the same run shall give the same release
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    file.chmod(mode)


def _metadata(version: str, settings: Mapping[str, Any] | None) -> dict[str, str]:
    """What the header of the weights says of them: release, code, and name of the training data."""
    found = {"version": version, "adaptface_version": __version__, "training_data": training_data(settings or {})}
    if (ROOT / ".git").exists():
        done = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
        if not any(process.returncode for process in done):
            found["adaptface_commit"] = done[0].stdout.strip() + ("+changes" if done[1].stdout.strip() else "")
    return found


def _plots(results: Path | None, settings: Path | None) -> dict[str, Callable[[Path], object]]:
    """What makes each picture: those of the evaluation beside its results, and the experts' use in training."""
    found: dict[str, Callable[[Path], object]] = {}
    for name in RELEASE_PLOTS if results else ():
        assert results is not None
        if (file := results.with_name(name)).is_file():
            found[name] = partial(shutil.copyfile, file)
    log = settings.with_name("log.jsonl") if settings else None
    usage = domain_usage(read_log(log)) if log and log.is_file() else {}
    if usage:
        found["domain_usage.png"] = partial(draw_domain_usage, usage)
    return found


def check_release(folder: Path, *, allow_full: bool = False, run_folder: Path | None = None) -> None:
    """Hold a folder against the rules that need no loading: list of files, names of the tensors, paths of the machine.

    Args:
        folder (`Path`): the release.
        allow_full (`bool`): accept tensors of the base.
        run_folder (`Path`, *optional*): the run it was made from; its path, like the home folder's, must not appear.
    Raises:
        ReleaseError: names every file and tensor that is missing or must not be published, and every path. The one
            path that may stay is a local base in config.json: the release, which its card calls a development release,
            is loaded by it.
    """
    files = files_below(folder)
    faults = [f"{name} must not be in a release" for name in not_of_a_release(files)]
    if links := [f"{name} is a link; a release holds files" for name in sorted(files) if (folder / name).is_symlink()]:
        raise ReleaseError(f"{folder} is no release: " + "; ".join(links[:10]))  # nothing is opened that they lead to
    faults += [f"{name} is missing" for name in sorted(RELEASE_FILES - files)]
    faults += [
        f"{name} is not that of this checkout; stage the release again"
        for name, content in _own_files().items()
        if name in files and (folder / name).read_bytes() != content
    ]
    if "model.safetensors" in files:
        faults += _faults_of_weights(folder, allow_full)
    faults += [
        f"{name} has {size:,} bytes, more than {OTHER_BYTES:,}"
        for name in sorted(files)
        if not name.endswith(".safetensors") and (size := (folder / name).stat().st_size) > OTHER_BYTES
    ]
    if {"config.json", "preprocessor_config.json"} <= files:
        faults += _faults_of_settings(folder)
    if {"README.md", "config.json"} <= files:
        faults += _faults_of_card(folder)
    if "results.json" in files:
        _read_results(folder / "results.json")
    private = [Path(os.path.expanduser("~")), *([run_folder.resolve()] if run_folder else [])]
    for name in sorted(files):
        try:
            texts = _texts(folder / name)
        except (SafetensorError, OSError, ValueError) as error:
            faults.append(f"{name} cannot be read ({error})")
            continue
        for text in texts:
            tokens = _TOKEN.findall(text)
            faults += [f"{name} holds a token, {token[:6]}...; take it out, and revoke it" for token in tokens]
            is_path = without_folders(text) != text or any(_holds(text, path) for path in private)
            if is_path and not name.endswith(".py"):
                faults.append(f"{name} holds a path of this machine in {text[:200]!r}; take it out of its source")
    if faults:
        raise ReleaseError(f"{folder} is no release: " + "; ".join(faults[:10]))


def _faults_of_settings(folder: Path) -> list[str]:
    """What config.json and preprocessor_config.json say beyond their classes, or against each other."""
    faults, sides = [], []
    known = {
        "config.json": {*AdaptFaceConfig().to_dict(), "torch_dtype"},
        "preprocessor_config.json": {*AdaptFaceImageProcessor().to_dict(), "processor_class"},
    }
    for name, auto_map in _AUTO_MAPS.items():
        content = _read_json(folder / name)
        if content.pop("auto_map", None) != auto_map:
            faults.append(f"{name} asks for other code than that beside it (auto_map)")
        if strange := sorted(content.keys() - known[name]):
            faults.append(f"{name} has unknown fields: {', '.join(strange)[:200]}")
        sides.append(content.get("image_size", content.get("size")))
    if sides[1] != {"height": sides[0], "width": sides[0]}:
        faults.append(f"preprocessor_config.json makes images of {sides[1]}, the model takes {sides[0]} px")
    return faults


def _faults_of_card(folder: Path) -> list[str]:
    try:
        card = ModelCard.load(folder / "README.md")
    except ValueError as error:
        return [f"README.md is no model card ({error})"]
    said = card.data.to_dict()
    if said.get("library_name") != "transformers":
        return ["README.md is no model card of ours; stage the release again"]
    base = _read_json(folder / "config.json").get("backbone")
    if said.get("base_model", base) != base:
        return [f"README.md names another base ({said['base_model']}) than config.json ({base})"]
    gap = gap_in(str(card))
    return [f"README.md has a gap: {gap}"] if gap else []


def _texts(file: Path) -> list[str]:
    """What can be read in a file of a release, but for a base in config.json that is needed there."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="np") as tensors:
            return [*tensors.keys(), *(tensors.metadata() or {}), *(tensors.metadata() or {}).values()]
    if file.suffix == ".png":
        with Image.open(file) as picture:
            said = getattr(picture, "text", {})
            drawn = said.keys() == {"Software"} and said["Software"].startswith("Matplotlib")
            if picture.format != "PNG" or not drawn or not _chunks(file.read_bytes()) <= _CHUNKS:
                raise ValueError("no picture of eval_benchmarks.py; evaluate again")
        return []
    if file.suffix != ".json":
        return file.read_text(encoding="utf-8").splitlines()
    content = _read_json(file)
    if file.name == "config.json" and content.get("adaptation") != "full":
        content.pop("backbone", None)
    return list(_strings(content))


def _chunks(png: bytes) -> set[bytes]:
    """Kinds of the chunks of a PNG file, and what follows its end."""
    found, start = set(), 8
    while start < len(png) and b"IEND" not in found:
        found.add(png[start + 4 : start + 8])
        start += 12 + int.from_bytes(png[start : start + 4], "big")  # length, kind, content, checksum
    return found | ({png[start:]} if start < len(png) else set())


def _faults_of_weights(folder: Path, allow_full: bool) -> list[str]:
    """What is wrong with the weights of a release: every tensor must be one that the model has, also in `peft/`."""
    file = folder / "model.safetensors"
    try:
        config = AdaptFaceConfig.from_pretrained(folder)
        tensors = load_file(file)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        return [f"config.json or model.safetensors cannot be read ({error})"]
    model = AdaptFaceModel(config, defer_backbone=True)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith("backbone.")}
    faults = []
    for name, tensor in sorted(tensors.items()):
        if name.startswith("backbone."):
            if config.adaptation != "full" or not allow_full:
                faults.append(f"tensor {name} belongs to the base")
        elif name not in wanted:
            faults.append(f"tensor {name} is no part of the model; identity heads stay in the checkpoints")
        elif tensor.shape != wanted[name] or tensor.dtype not in DTYPES.values() or not tensor.isfinite().all():
            faults.append(f"tensor {name} is not of the model's shape, bfloat16 or float32, and finite")
    faults += [f"tensor {name} is missing" for name in sorted(wanted.keys() - tensors.keys())]
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        faults.append("model.safetensors has tensors of several precisions")
    if config.tensors_sha256 != tensors_sha256(tensors):
        faults.append("model.safetensors holds other tensors than config.json was saved with (tensors_sha256)")
    with safe_open(file, framework="np") as opened:
        header = set(opened.metadata() or {})
    if header - {"adaptface_commit"} != _HEADER:
        faults.append(
            f"the header of model.safetensors has {', '.join(sorted(header))}, not {', '.join(sorted(_HEADER))}"
        )
    if file.stat().st_size > sum(tensor.nbytes for tensor in tensors.values()) + HEADER_BYTES:
        faults.append("model.safetensors holds more than its tensors")
    if faults or config.adaptation != "lora":
        return faults
    model.load_state_dict(tensors)
    return _faults_of_peft(folder / "peft", model)


def _faults_of_peft(folder: Path, model: AdaptFaceModel) -> list[str]:
    """Where `peft/` is anything but the export of a release's own adapters."""
    faults = []
    files = files_below(folder)
    for place, (settings, tensors) in peft_adapters(model):
        config_file, weights = (folder / place / name for name in ("adapter_config.json", "adapter_model.safetensors"))
        files -= {path.relative_to(folder).as_posix() for path in (config_file, weights)}
        try:
            held = load_file(weights)
            same = json.loads(config_file.read_text(encoding="utf-8")) == json.loads(json.dumps(settings))
        except (SafetensorError, OSError, ValueError) as error:
            faults.append(f"peft/{place} holds no adapter that can be read ({error})")
            continue
        same &= held.keys() == tensors.keys() and all(torch.equal(held[name], tensors[name]) for name in tensors)
        if not same or weights.stat().st_size > sum(tensor.nbytes for tensor in held.values()) + HEADER_BYTES:
            faults.append(f"peft/{place} is not the adapter of this model; stage the release again")
    return faults + [f"peft/{name} must not be in a release" for name in sorted(files)]


def verify_release(folder: Path, model_dir: Path, *, tolerance: float = 1e-5) -> float:
    """Load a release in a clean process and compare it with the model it was made from.

    The process is a fresh interpreter in an empty working directory that cannot import this project and compiles the
    release's own modules anew. Both sides embed the same four images in float32.

    Args:
        folder (`Path`): the release.
        model_dir (`Path`): the model folder it was staged from.
        tolerance (`float`): largest accepted absolute difference of pixel values and embeddings, from the model with
            its weights rounded to the precision of the release.
    Returns:
        `float`: largest absolute difference of the embeddings.
    Raises:
        ReleaseError: the release does not load, warns while it loads, or embeds differently.
    """
    images = np.random.default_rng(0).integers(0, 256, (4, 112, 112, 3), dtype=np.uint8)
    model = AdaptFaceModel.from_pretrained(model_dir, dtype=torch.float32).eval()
    pixel_values = AdaptFaceImageProcessor.from_pretrained(model_dir)(list(images))["pixel_values"]  # (4, 3, S, S)
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        dtype = tensors.get_tensor("projection.weight").dtype
    _round_weights(model, dtype)
    with torch.no_grad():
        expected = {"pixel_values": pixel_values.numpy(), "embeddings": model(pixel_values).pooler_output.numpy()}

    with tempfile.TemporaryDirectory() as scratch:
        report, found = _load_in_clean_process(folder, images, Path(scratch))
    said = [text for text in report["warnings"] if not text.startswith(REMARKS)]
    said += [f"{key}: {', '.join(names)}" for key, names in report["loading_info"].items()]
    if said:
        raise ReleaseError(f"{folder} loads, but not silently: " + " | ".join(said))
    differences = {}
    for name, wanted in expected.items():
        if found[name].shape != wanted.shape:
            raise ReleaseError(f"{folder}: {name} have shape {found[name].shape}, the run's have {wanted.shape}")
        differences[name] = float(np.abs(found[name] - wanted).max())
        if not differences[name] <= tolerance:  # NaN is a difference, too
            raise ReleaseError(
                f"{folder}: loaded in a clean process, its {name} differ from those of {model_dir} by "
                f"{differences[name]:.2e} (allowed: {tolerance:.0e})"
            )
    return differences["embeddings"]


def _load_in_clean_process(
    folder: Path, images: np.ndarray, scratch: Path
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `adaptface/clean_load.py` reports, and the arrays it computes, run in the empty folder `scratch`."""
    workplace = scratch / "empty"
    workplace.mkdir()
    np.save(scratch / "images.npy", images)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["HF_MODULES_CACHE"] = str(scratch / "modules")
    script = Path(__file__).with_name("clean_load.py")
    arguments = [folder.resolve(), scratch / "images.npy", scratch / "embeddings.npz"]
    process = subprocess.run(
        [sys.executable, "-P", str(script), *map(str, arguments)],
        cwd=workplace, env=env, capture_output=True, text=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    if process.returncode:
        reason = "\n".join(process.stderr.strip().splitlines()[-10:])
        raise ReleaseError(f"{folder} does not load in a clean process (exit code {process.returncode}):\n{reason}")
    with np.load(scratch / "embeddings.npz") as arrays:
        return json.loads(process.stdout.splitlines()[-1]), dict(arrays)


def _strings(content: Any) -> Iterator[str]:
    """All texts in JSON content, names included."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, (dict, list)):
        for value in [*content, *content.values()] if isinstance(content, dict) else content:
            yield from _strings(value)


def _holds(text: str, path: Path) -> bool:
    """Whether a path, or one below it, stands anywhere in a text."""
    return len(path.parts) > 1 and bool(re.search(rf"(?<![\w-]){re.escape(str(path))}(?![\w-])", text))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReleaseError(f"{path} is no readable JSON ({error}); write it again, or move it away") from error


def _read_results(path: Path) -> dict[str, Any]:
    """`results.json`, its rows complete."""
    content = _read_json(path)
    rows = content.get("results") if isinstance(content, dict) else None
    fault = None if isinstance(rows, list) else "there is no list 'results'"
    for number, row in enumerate(rows or ()):
        fault = fault or _fault_of_row(row, f"results[{number}]")
    if fault:
        raise ReleaseError(
            f"{path} is no file of eval_benchmarks.py: {fault}; evaluate again, or move the file away to release "
            "without results"
        )
    return content


def _fault_of_row(row: Any, place: str) -> str | None:
    """What the card would miss in a row, or None."""
    if not isinstance(row, dict):
        return f"{place} is no mapping"
    kinds = {name: kind for name, kind in _ROW.items() if not (name.startswith("accuracy") and "templates" in row)}
    wrong = [name for name, kind in kinds.items() if not isinstance(row.get(name), kind)]
    if not wrong:
        wrong += [f"embedder.{name}" for name in ("kind", "name") if not isinstance(row["embedder"].get(name), str)]
        wrong += [] if "folds" in row["protocol"] else ["protocol.folds"]
        rates = all(isinstance(rate, dict) and {"far", "tar"} <= rate.keys() for rate in row["tar_at_far"])
        wrong += [] if rates else ["tar_at_far"]
    return f"{place} lacks {', '.join(wrong)}, or has them of another type" if wrong else None


def _read_settings(path: Path) -> dict[str, Any]:
    """`settings.yaml` of a run."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        fault = None if isinstance(content, dict) else "it holds no lines of `key: value`"
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fault = " ".join(str(error).split())
    if fault:
        raise ReleaseError(
            f"{path} is no settings file ({fault}); take that of the newest checkpoint, or move the file away to "
            "release without it"
        )
    return content


def _require_names(out_dir: Path, repo_id: str | None) -> None:
    """Refuse names that the Hub does not take, or that make transformers complain whenever the release is loaded.

    transformers makes a Python module of each part of a name, with other signs for dots, hyphens and a leading digit.
    """
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ValueError(f"repo_id {repo_id!r}: {error} Give it as user/name") from error
        if "/" not in repo_id:
            raise ValueError(f"repo_id {repo_id!r} names no owner; give it as user/name")
    for what, name in [("out", out_dir.name), *(("repo_id", part) for part in (repo_id or "").split("/") if part)]:
        module = re.sub(r"[.-]", "_", name)
        if keyword.iskeyword(module) or not f"_{module}".isidentifier():
            raise ValueError(
                f"{what} {name!r}: transformers can make no Python module name of it and would complain at each load; "
                "use letters, digits, '_', '-' and '.', and no word of Python's own"
            )


def _require_replaceable(out_dir: Path, model_dir: Path) -> None:
    """Refuse a target whose replacement would lose anything but an older release."""
    if out_dir.resolve() == model_dir.resolve():
        raise FileExistsError(f"{out_dir} is the model that is to be released; name another folder")
    if out_dir.is_symlink() or out_dir.resolve() == Path.cwd():
        what = "a link" if out_dir.is_symlink() else "the folder you work in"
        raise FileExistsError(f"{out_dir} is {what}, which cannot be replaced; name a new folder")
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    if strangers := ", ".join(strangers_in_release(out_dir)[:5]):
        raise FileExistsError(f"{out_dir} holds files that are no release ({strangers}); name an empty or new folder")


def _project_file(name: str | Path) -> Path:
    path = ROOT / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; stage releases from a checkout of the project")
    return path


def _own_files() -> dict[str, bytes]:
    """What a release has from the project as it is."""
    code = sorted(name for name in RELEASE_FILES if name.endswith(".py"))
    copied = {name: _project_file(name).read_bytes() for name in (*code, "LICENSE")}
    return copied | {"requirements.txt": _requirements().encode()}


def _requirements() -> str:
    """The lines of pyproject's dependencies that the shipped modules need."""
    project = tomllib.loads(_project_file("pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for line in project["dependencies"] if re.split(r"[<>=!~;\[ ]", line)[0] in SHIPPED_REQUIREMENTS]
    return "\n".join(lines) + "\n"


def model_folder(run: Path) -> Path:
    """The model of a run: best/, or last/ where no development set chose one."""
    for folder in (run / "best", run / "last"):
        if folder.is_dir():
            return folder
    if (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} is a model folder; give the folder of its run, {run.absolute().parent}")
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is no folder; give the folder of a run, output_dir of its settings")
    raise FileNotFoundError(
        f"{run} holds neither best/ nor last/; give the folder of a run that has saved a model, or let it finish"
    )
