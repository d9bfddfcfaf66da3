"""Training checkpoints and model folders that are complete or absent, never half.

A checkpoint `checkpoints/step_XXXXXXXX` is written to a hidden folder beside its place, listed with sizes and hashes
in `manifest.json`, synced to the disk and renamed; older ones go afterwards. It holds what training needs and a release
does not: trained weights with the identity head, optimiser, scaler, random states, `state.json` (step, development
history, running sums) and `settings.yaml`. The frozen base is not in it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adaptface.files import partial_path, sha256, sync_folder, write_text
from adaptface.report import PARTIAL_RESULTS_FILE, RESULTS_FILE
from configuration_adaptface import AdaptFaceConfig

MANIFEST = "manifest.json"
STATE = "state.json"
SETTINGS = "settings.yaml"
WEIGHTS = "trained.safetensors"

# All that a release may hold. `adaptface.release` keeps to it; here, since a new run deletes the earlier one's.
RELEASE_FILES = frozenset(
    {"configuration_adaptface.py", "image_processing_adaptface.py", "modeling_adaptface.py", "config.json",
     "model.safetensors", "preprocessor_config.json", "README.md", "LICENSE", "requirements.txt"}
)  # fmt: skip
RELEASE_PLOTS = ("roc.png", "det.png", "scores.png", "domains.png", "domain_usage.png")  # none shows a face
_OF_EVALUATION = re.compile(  # what evaluation writes into results/
    rf"{re.escape(RESULTS_FILE)}|{re.escape(PARTIAL_RESULTS_FILE)}|results\.md|results(_long)?\.csv"
    r"|(roc|det|scores|domains|worst_pairs_.+)\.png"
)
_OPTIONAL = re.compile(
    rf"{re.escape(RESULTS_FILE)}|plots/({'|'.join(map(re.escape, RELEASE_PLOTS))})"
    r"|peft/(experts/[^/]+/)?adapter_(config\.json|model\.safetensors)"
)


def not_of_a_release(files: Iterable[str]) -> list[str]:
    """Those of some paths, relative to a release, that belong in none."""
    return sorted(name for name in files if name not in RELEASE_FILES and not _OPTIONAL.fullmatch(name))


def register_weight_hooks(accelerator: Accelerator, is_frozen: Callable[[str], bool]) -> None:
    """Make `save_state`/`load_state` of the one prepared model write and read only what is not frozen.

    Args:
        is_frozen: tells from a state-dict name whether the tensor belongs to the frozen base.
    """

    def save(models: list[torch.nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()  # keeps accelerate from writing the whole model
        if accelerator.is_main_process:
            state = accelerator.unwrap_model(models[0]).state_dict()
            kept = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if not is_frozen(name)}
            save_file(kept, Path(folder) / WEIGHTS)

    def load(models: list[torch.nn.Module], folder: str) -> None:
        model = accelerator.unwrap_model(models.pop())
        missing, surplus = model.load_state_dict(load_file(Path(folder) / WEIGHTS), strict=False)
        missing = [name for name in missing if not is_frozen(name)]
        if missing or surplus:
            raise ValueError(f"checkpoint {folder} does not fit the model: missing {missing}, surplus {surplus}")

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(
    accelerator: Accelerator, run_folder: Path, state: dict[str, Any], settings_yaml: str, keep: int
) -> Path:
    """Write the checkpoint of `state["step"]`; every process calls this at the same step.

    Args:
        state: JSON values; floats come back bit-equal.
        keep: how many of the newest checkpoints, this one included, stay.
    Returns:
        The finished folder.
    Raises:
        OSError: it could not be written; earlier checkpoints are intact and the partial one is gone.
    """
    final = run_folder / "checkpoints" / f"step_{state['step']:08d}"
    partial = partial_path(final)
    if accelerator.is_main_process:
        _remove(partial)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _explain_write_errors(final):
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()  # the random states of all processes are there
        if accelerator.is_main_process:
            write_text(partial / STATE, json.dumps(state))
            write_text(partial / SETTINGS, settings_yaml)
            files = sorted(path for path in partial.iterdir() if path.is_file())
            manifest = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in files}
            write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
            _publish(partial, final)
            older = [folder for folder in list_checkpoints(run_folder) if folder.name < final.name]
            for folder in older[: max(0, len(older) - (keep - 1))]:
                _remove(folder)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Restore weights, optimiser, scaler and random states of the prepared objects; returns the saved `state`."""
    accelerator.load_state(str(folder))
    return read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest step first, complete or not."""
    return sorted((run_folder / "checkpoints").glob("step_" + "[0-9]" * 8))


def holds_run(folder: Path) -> bool:
    """Whether a run folder holds what a new run would destroy or mix itself with: checkpoints or models."""
    return bool(list_checkpoints(folder)) or any((folder / name).exists() for name in ("best", "last"))


def find_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted (missing, truncated or altered file), or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if unlisted := {STATE, SETTINGS, WEIGHTS} - manifest.keys():
            return f"{MANIFEST} does not list {', '.join(sorted(unlisted))}"
        for name, entry in manifest.items():
            path = folder / name
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
            if sha256(path) != entry["sha256"]:
                return f"{name} is altered (its hash differs from {MANIFEST})"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable"
    return None


def find_checkpoint(run_folder: Path, resume: str, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint to resume from.

    Args:
        resume: `no`, `auto` (the newest complete one of the run folder, None if there is none) or a folder.
        say: told about every checkpoint that is passed over.
    Raises:
        FileNotFoundError: the named folder does not exist.
        ValueError: the named checkpoint is damaged or a run folder; or `auto` finds a run, but no good checkpoint.
    """
    if resume == "no":
        return None
    if resume != "auto":
        folder = Path(resume)
        if not folder.is_dir():
            raise FileNotFoundError(f"resume: no checkpoint folder {folder}; use 'auto' or checkpoints/step_XXXXXXXX")
        if holds_run(folder):
            raise ValueError(
                f"resume: {folder} is a run folder; name one of its checkpoints/step_XXXXXXXX, or go on in it with "
                f"--output_dir {folder} --resume auto"
            )
        problem = find_problem(folder)
        if problem:
            raise ValueError(f"resume: checkpoint {folder} is damaged: {problem}; 'auto' takes the newest good one")
        return folder
    for folder in reversed(list_checkpoints(run_folder)):
        problem = find_problem(folder)
        if problem is None:
            return folder
        say(f"passing over checkpoint {folder}: {problem}")
    if holds_run(run_folder):
        raise ValueError(
            f"resume: {run_folder} holds a run, but no complete checkpoint to go on from; restore one, delete the run "
            "with --overwrite true, or choose another --output_dir"
        )
    return None


def save_model_folder(folder: Path, *parts: Any) -> None:
    """Write a loadable model folder in one go: `save_pretrained` of each part (model, processor).

    An existing folder is replaced only once the new one is complete.

    Raises:
        OSError: it could not be written; the earlier folder is intact.
    """
    partial = partial_path(folder)
    _remove(partial)
    partial.mkdir(parents=True)
    with _explain_write_errors(folder):
        for part in parts:
            part.save_pretrained(partial)
        _publish(partial, folder)


@contextmanager
def run_lock(run_folder: Path) -> Iterator[None]:
    """Hold a run folder against a second run; the system lets go of it however the process ends.

    Raises:
        ValueError: another process holds it.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_folder / "run.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"output_dir: another run is writing into {run_folder}; wait, stop it, or choose another --output_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def recover_run(run_folder: Path) -> None:
    """Undo what a killed run left half done: models and checkpoints being replaced or written, faces being rendered."""
    for path in run_folder.glob(".synthetic.*"):
        _remove(path)
    unfinished = {path.name.split(".")[1] for path in (run_folder / "checkpoints").glob(".step_*")}
    for name in ("best", "last", *(f"checkpoints/{step}" for step in sorted(unfinished))):
        recover_model_folder(run_folder / name)


def remove_run(run_folder: Path) -> None:
    """Delete what an earlier training run wrote, with its results and its release, which would pass for the new run's.

    Data and base folders stay, they are checked before use. `results/` and `release/` stay, too, where they hold
    anything that evaluation and release did not write.
    """
    for name in ("checkpoints", "best", "last", "trackers"):
        _remove(run_folder / name)
    for name in ("log.jsonl", SETTINGS):
        (run_folder / name).unlink(missing_ok=True)
    results, release = run_folder / "results", run_folder / "release"
    if all(map(_OF_EVALUATION.fullmatch, files_below(results))) and not results.is_symlink():
        _remove(results)
    if release.is_dir() and not release.is_symlink() and not strangers_in_release(release):
        _remove(release)


def strangers_in_release(folder: Path) -> list[str]:
    """Why a folder is no release that may be deleted: files that belong in none, or lack; empty for a release."""
    files = files_below(folder)
    if strangers := not_of_a_release(files):
        return strangers
    if lacking := sorted(RELEASE_FILES - files):  # a model folder, say
        return [f"no {name}" for name in lacking]
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    return [] if kind == AdaptFaceConfig.model_type else ["config.json of another model"]


def files_below(folder: Path) -> set[str]:
    """Paths of all files below a folder, relative to it; links count as files."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in paths}


def recover_model_folder(folder: Path) -> None:
    """Undo a replacement that was cut off between its two renames."""
    replaced = _replaced(folder)
    if replaced.is_dir() and not folder.exists():
        replaced.rename(folder)
    _remove(replaced)
    _remove(partial_path(folder))


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _publish(partial: Path, final: Path) -> None:
    """Sync everything in `partial`, then give it its final name."""
    for path in partial.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    for path in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        sync_folder(path)
    replaced = _replaced(final)
    _remove(replaced)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)
    _remove(replaced)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _explain_write_errors(final: Path) -> Iterator[None]:
    """Turn what the writers raise on a full disk into one clear error, and clear the partial folder away."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial_path(final), ignore_errors=True)
        raise OSError(
            f"could not write {final}: {error}. Free some disk space (or lower keep_checkpoints), then go on with "
            "--resume auto; what was saved earlier is intact"
        ) from error
