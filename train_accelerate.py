"""Train AdaptFace: `accelerate launch train_accelerate.py recipes/NAME.yaml [--key value ...]`.

    python train_accelerate.py recipes/quickstart.yaml                    one process
    accelerate launch train_accelerate.py recipes/casia_dalora_vits.yaml  one process a GPU
    python train_accelerate.py recipes/NAME.yaml --dry_run true           check everything, train nothing
    python train_accelerate.py recipes/NAME.yaml --resume auto            go on after a stop or a crash
    python train_accelerate.py --help                                     all settings

Two CPU processes: `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 train_accelerate.py ...`

Everything random is a function of the position: image order of (seed, epoch), augmentation of (seed, epoch, image),
dropout of (seed, step, process). A run that resumes therefore writes, bit for bit, what the uninterrupted one would
have written.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    send_to_device,
)
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Dinov2Model
from transformers.utils.logging import disable_progress_bar

from adaptface.checkpoint import (
    SETTINGS,
    find_checkpoint,
    holds_run,
    list_checkpoints,
    load_checkpoint,
    read_state,
    recover_run,
    register_weight_hooks,
    remove_run,
    run_lock,
    save_checkpoint,
    save_model_folder,
)
from adaptface.data.augmentation import TrainingFaces
from adaptface.data.base import FINGERPRINT_IMAGES, LabelledFaces, spread
from adaptface.data.benchmarks import load_pairs
from adaptface.data.pairs import PairSet
from adaptface.data.sources import open_source
from adaptface.data.stream import StreamBatches, StreamSource, open_stream
from adaptface.data.synthetic import write_synthetic
from adaptface.embedders import ModelEmbedder
from adaptface.embedding import embed_images
from adaptface.evaluation import evaluate_pairs
from adaptface.files import write_text_atomically
from adaptface.memory import peak_memory
from adaptface.processes import check_launch
from adaptface.report import printable_output
from adaptface.schedule import EpochBatches, learning_rate
from adaptface.settings import (
    SYNTHETIC,
    TINY_RANDOM,
    TrainSettings,
    changed_settings,
    describe_settings,
    read_settings,
)
from adaptface.tracking import RunLog, check_trackers
from adaptface.training import augmentation_of, build_optimizer, build_trainer, prepare_model, tiny_random_config
from image_processing_adaptface import AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel

DRY_RUN_STEPS = 3


def main(arguments: list[str] | None = None) -> None:
    """Run one training from the command line."""
    words = sys.argv[1:] if arguments is None else arguments
    if "--help" in words or "-h" in words:
        print(__doc__, "\nSettings, with their defaults:\n" + describe_settings(), sep="")
        return
    disable_progress_bar()  # transformers' own, for loading and saving
    try:
        settings = read_settings(words)
        check_trackers(settings.trackers)
        accelerator = start_accelerator(settings)
        with ExitStack() as stack:
            if settings.dry_run:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
            else:
                folder = settings.output_dir
                if accelerator.is_main_process:
                    stack.enter_context(run_lock(Path(folder)))
            job = prepare(settings, accelerator, Path(folder))
            stopped = None
            if settings.dry_run:
                dry_run(job)
            else:
                state = resume(job)
                start_run(job)
                with StopRequest() as stop:
                    stopped = train(job, state, stop)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    del job  # gloo can hang at exit while modules still hold the process group
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
    if stopped:
        sys.exit(128 + stopped)


# ------------------------------------------------------------------------------------------------------- the loop


def train(job: Job, state: dict[str, Any] | None, stop: StopRequest) -> int | None:
    """The training loop, from a resumed state or from the start; returns the signal that stopped it, if one did."""
    settings, accelerator, run = job.settings, job.accelerator, job.folder
    steps_per_epoch, micro_batches = job.batches.steps, settings.gradient_accumulation
    total_steps = settings.epochs * steps_per_epoch
    save_every = settings.save_every_steps or steps_per_epoch

    def say(text: str) -> None:
        if accelerator.is_main_process:
            tqdm.write(text)
            sys.stdout.flush()

    state = state or {
        "step": 0, "history": [], "window": {}, "window_steps": 0, "skipped_steps": 0, "skipped_in_a_row": 0,
        "broken_images": 0, **job.fingerprints(), "num_processes": accelerator.num_processes,
    }  # fmt: skip
    log = RunLog(accelerator, run / "log.jsonl", state["step"])
    log.write("start" if state["step"] == 0 else "resume", state["step"], **job.describe())

    def save() -> None:
        folder = save_checkpoint(accelerator, run, state, settings.to_yaml(), settings.keep_checkpoints)
        say(f"saved {folder}")

    def evaluate_if_due() -> bool:
        step, epochs = state["step"], state["step"] // steps_per_epoch
        due = step % steps_per_epoch == 0 and (epochs % settings.eval_every_epochs == 0 or step == total_steps)
        if job.dev_pairs is None or not due or any(entry["step"] == step for entry in state["history"]):
            return False
        if accelerator.is_main_process:
            entry = {"step": step, "epoch": epochs, **evaluate(job)}
            best = max(state["history"], key=selection_key, default=None)
            if best is None or selection_key(entry) > selection_key(best):
                save_model_folder(run / "best", job.model, job.processor)
                entry["best"] = True
            state["history"].append(entry)
            log.write("dev", **entry)
            say(f"epoch {epochs}: dev accuracy {100 * entry['accuracy']:.2f} +- {100 * entry['accuracy_std']:.2f} %, "
                f"AUC {entry['auc']:.4f}{'  (best so far)' if 'best' in entry else ''}")  # fmt: skip
        accelerator.wait_for_everyone()
        return True

    progress = tqdm(
        total=total_steps, initial=state["step"], unit="step", smoothing=0.05, disable=not accelerator.is_main_process,
        dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30,
    )  # fmt: skip
    window_start, window_images = time.perf_counter(), 0
    job.trainer.train()
    # In case the run was stopped between an epoch and its evaluation.
    if state["step"] and evaluate_if_due():
        save()

    while state["step"] < total_steps:
        epoch, position = divmod(state["step"], steps_per_epoch)
        if position == 0:
            state["broken_images"] = 0  # of this epoch
        job.faces.set_epoch(epoch)
        job.batches.set_position(epoch, position)
        batches = iter(job.loader)
        for _ in range(position, steps_per_epoch):
            rates = set_learning_rates(job.optimizer, settings, (state["step"] + 0.5) / steps_per_epoch)
            seed_step(settings.seed, state["step"], accelerator.process_index)
            values = train_step(job, islice(batches, micro_batches), stop.requested)
            state["step"] += 1

            state["broken_images"] += round(values.pop("broken") * accelerator.num_processes)
            if state["broken_images"] > settings.max_broken_images:
                raise ValueError(
                    f"{state['broken_images']} training images of epoch {epoch + 1} are broken, named above; mend or "
                    "remove them, or raise max_broken_images, and go on with --resume auto"
                )
            stopping = values.pop("stop") > 0 or state["step"] == settings.stop_after_steps
            if values.pop("finite"):
                state["skipped_in_a_row"] = 0
                state["window_steps"] += 1
                for name, value in values.items():
                    state["window"][name] = state["window"].get(name, 0.0) + value
            else:
                state["skipped_steps"] += 1
                state["skipped_in_a_row"] += 1
                say(f"step {state['step']}: loss {values['loss']}, gradient norm {values['gradient_norm']}: skipped")
                log.write("skip", state["step"], in_a_row=state["skipped_in_a_row"])
                if state["skipped_in_a_row"] >= settings.max_nonfinite_steps:
                    raise FloatingPointError(
                        f"{state['skipped_in_a_row']} steps in a row gave NaN or Inf (the last one was step "
                        f"{state['step']}); they changed no weight. Start a new run with a lower "
                        "learning_rate or head_learning_rate, or with mixed_precision: bf16 or no; or raise "
                        "max_nonfinite_steps and go on with --resume auto"
                    )

            window_images += job.batches.step_size
            progress.update()
            if state["step"] % settings.log_every_steps == 0 or state["step"] == total_steps:
                seconds = time.perf_counter() - window_start
                means = {name: total / state["window_steps"] for name, total in state["window"].items()}
                speed = round(window_images / seconds, 2)
                log.write(
                    "train", state["step"], epoch=state["step"] / steps_per_epoch, **means, **rates,
                    skipped_steps=state["skipped_steps"], broken_images=state["broken_images"], images_per_second=speed,
                )  # fmt: skip
                progress.set_postfix_str(f"loss {means.get('loss', math.nan):.3f}, {speed:.0f} images/s")
                state["window"], state["window_steps"] = {}, 0
                window_start, window_images = time.perf_counter(), 0

            if stopping:
                progress.close()
                save()
                say(f"stopped after step {state['step']} of {total_steps}; go on with --resume auto")
                return stop.signal_number
            if state["step"] % save_every == 0 and state["step"] % steps_per_epoch:
                save()

        paused = time.perf_counter()
        save_due = state["step"] % save_every == 0 or state["step"] == total_steps
        if save_due:
            save()  # first: an evaluation that fails must not cost the epoch
        if evaluate_if_due() and save_due:
            save()
        window_start += time.perf_counter() - paused  # evaluation does not count as training time

    progress.close()
    if accelerator.is_main_process:
        save_model_folder(run / "last", job.model, job.processor)
        best = max(state["history"], key=selection_key, default=None)
        chosen = f"; best/ is from epoch {best['epoch']}" if best else "; there is no best/ without dev_pairs"
        say(f"trained {settings.epochs} epochs: {run / 'last'}{chosen}")
    accelerator.wait_for_everyone()
    return None


def train_step(job: Job, batches: Iterable[dict[str, torch.Tensor]], stop_requested: bool = False) -> dict[str, float]:
    """One optimiser step over the given micro-batches; every process calls it together.

    Returns:
        Means over micro-batches and processes of the losses and of each expert's weight, `gradient_norm`, `broken` (of
        the processes' numbers of images that could not be used), and `stop` (above 0 if any process was asked to stop)
        and `finite` (whether the step was taken: a NaN or Inf on one process reaches all through the averaged gradient
        and loss, so all skip together).
    """
    accelerator, optimizer, settings = job.accelerator, job.optimizer, job.settings
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        with accelerator.accumulate(job.trainer):  # gradients travel between processes with the last one only
            terms = job.trainer(batch["pixel_values"], batch["label"], batch["domain"])
            accelerator.backward(terms["loss"])  # divides by the number of micro-batches
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term.detach() / settings.gradient_accumulation
        sums["broken"] = sums.get("broken", 0.0) + batch["broken"].sum().float()
    norm = accelerator.clip_grad_norm_(job.parameters, settings.gradient_clip)
    vector = torch.stack([*sums.values(), norm, norm.new_tensor(float(stop_requested))]).float()
    numbers = accelerator.reduce(vector, "mean").tolist()  # the only wait of a step
    values = dict(zip([*sums, "gradient_norm", "stop"], numbers, strict=True))
    finite = math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])
    if finite or accelerator.scaler is not None:  # fp16: the scaler skips by itself, and lowers its scale
        optimizer.step()
    optimizer.zero_grad()
    return {**values, "finite": finite}


def set_learning_rates(optimizer: torch.optim.Optimizer, settings: TrainSettings, epoch: float) -> dict[str, float]:
    """Set the rate of each group for this point in time; returns the rates of model and head."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(
            settings.schedule, group["peak_lr"], settings.min_learning_rate, epoch,
            warmup_epochs=settings.warmup_epochs, total_epochs=settings.epochs,
        )  # fmt: skip
    groups = {group["part"]: group["lr"] for group in optimizer.param_groups}
    return {"learning_rate": groups["model"], "head_learning_rate": groups["head"]}


def seed_step(seed: int, step: int, process: int) -> None:
    """Make the random numbers of a step (dropout) a function of seed, step and process."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0] >> 1))


class StopRequest:
    """Remembers SIGTERM or SIGINT until the step is done; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self.signal_number: int | None = None

    def __enter__(self) -> StopRequest:
        self.earlier = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested, self.signal_number = True, number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"{signal.Signals(number).name}: saving a checkpoint after this step", file=sys.stderr, flush=True)


def ignore_stop_signals(worker: int) -> None:
    """For loader workers: a signal to the whole process group must not take them away from the last step.

    They end when the loader tells them to, or when they find their parent gone.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# -------------------------------------------------------------------------------------------------- before the loop


@dataclass
class Job:
    """What the loop works with: settings, prepared objects, data."""

    settings: TrainSettings
    accelerator: Accelerator
    folder: Path
    source: LabelledFaces
    faces: TrainingFaces
    batches: EpochBatches
    loader: DataLoader
    dev_pairs: PairSet | None
    processor: AdaptFaceImageProcessor
    model: AdaptFaceModel  # inside trainer
    trainer: nn.Module  # as accelerate wrapped it
    parameters: list[nn.Parameter]  # those that train
    optimizer: torch.optim.Optimizer

    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of what a resumed run must find again: training data (labels, and some of the images), base, pairs."""
        pairs, dev = self.dev_pairs, None
        if pairs is not None:
            arrays = (pairs.index_a, pairs.index_b, pairs.same, pairs.folds)
            held = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))
            for index in spread(len(pairs.images), FINGERPRINT_IMAGES):
                held.update(pairs.images[index].tobytes())
            dev = held.hexdigest()
        return {"data": self.source.fingerprint(), "base": self.model.config.backbone_sha256, "dev_pairs": dev}

    def describe(self) -> dict[str, Any]:
        """Counts for the log."""
        return {
            "images": len(self.source),
            "identities": len(self.source.identities),
            "steps_per_epoch": self.batches.steps,
            "images_per_step": self.batches.step_size,
            "num_processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "base_dtype": str(self.model.backbone.dtype).removeprefix("torch.") if self.model.backbone else None,
            "parameters": self.model.summary(),
        }


def start_accelerator(settings: TrainSettings) -> Accelerator:
    """Device, precision and process group.

    Raises:
        ValueError: the launcher was asked for more processes than it started.
    """
    if settings.cpu_threads:
        torch.set_num_threads(settings.cpu_threads)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)  # names the kernels that have no such form
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=settings.gradient_accumulation, sync_with_dataloader=False
        ),
        log_with=settings.trackers or None,
        project_dir=str(Path(settings.output_dir) / "trackers"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],  # others wait while one evaluates
    )
    for variable, name in (
        ("ACCELERATE_MIXED_PRECISION", "mixed_precision"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation"),
    ):
        wanted, own = os.environ.get(variable), str(getattr(settings, name))
        if wanted not in (None, "no", "1", own):
            raise ValueError(
                f"{name}: the launcher asks for {wanted}, the settings say {own}; give --{name} {wanted}, or launch "
                "without that option"
            )
    check_launch(accelerator.num_processes, "train_accelerate.py")
    return accelerator


def prepare(settings: TrainSettings, accelerator: Accelerator, folder: Path) -> Job:
    """Open the data, build the model, prepare the run folder.

    Raises:
        ValueError, OSError: settings, data, base or run folder are not usable; the message says how to mend it.
    """
    if accelerator.is_main_process and not settings.dry_run:
        open_run_folder(settings, folder)
    accelerator.wait_for_everyone()

    torch.manual_seed(settings.seed)
    with accelerator.main_process_first():
        backbone, metadata, dev_pairs = settings.backbone, settings.train_metadata, settings.dev_pairs
        train_data = settings.train_data
        if backbone == TINY_RANDOM:
            backbone = tiny_random_base(folder / "base", settings)
        if train_data == SYNTHETIC:
            train_data, metadata, rendered_pairs = synthetic_faces(folder / "synthetic", settings)
            dev_pairs = dev_pairs or rendered_pairs
        source = open_training_data(settings, train_data, metadata)
    pairs = load_pairs(dev_pairs, settings.dev_images) if dev_pairs else None

    if Path(backbone).is_dir():
        backbone = Path(backbone).resolve().as_posix()  # the saved model must find it from anywhere
    torch.manual_seed(settings.seed)  # the same weights whatever was drawn before
    model = AdaptFaceModel.from_backbone(
        backbone,
        revision=settings.backbone_revision,
        attn_implementation=settings.attention,
        **settings.model_arguments(),
    )
    prepare_model(model, settings)
    processor = AdaptFaceImageProcessor(size=settings.image_size)
    if pairs is not None and accelerator.is_main_process:
        check_images(pairs, processor)
    trainer = build_trainer(model, len(source.identities), settings)
    optimizer = build_optimizer(trainer, settings)

    faces = TrainingFaces(source, processor, augmentation_of(settings), settings.seed)
    division = (
        settings.batch_size, settings.gradient_accumulation, accelerator.process_index, accelerator.num_processes,
        settings.seed,
    )  # fmt: skip
    if isinstance(source, StreamSource):
        batches: EpochBatches = StreamBatches(source, *division, buffer_size=settings.stream_buffer)
    else:
        batches = EpochBatches(len(source), *division)
    loader = DataLoader(
        faces, batch_sampler=batches, num_workers=settings.num_workers, persistent_workers=settings.num_workers > 0,
        worker_init_fn=ignore_stop_signals,
        pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip

    # The base is frozen and in no checkpoint, so its name is how it is told apart.
    register_weight_hooks(
        accelerator, lambda name: settings.adaptation != "full" and name.startswith("model.backbone.")
    )
    wrapped, optimizer = accelerator.prepare(trainer, optimizer)
    trained = [parameter for parameter in trainer.parameters() if parameter.requires_grad]
    job = Job(
        settings, accelerator, folder, source, faces, batches, loader, pairs, processor, model, wrapped, trained,
        optimizer,
    )  # fmt: skip
    if model.router is not None and not source.has_domains and settings.domain_loss_weight > 0:
        accelerator.print(
            "no image carries a domain label: the router learns from the identity and balance losses alone"
        )
    accelerator.print(
        f"{source.name}: {source.describe()}; {batches.steps} steps of {batches.step_size} images an epoch\n"
        f"{model.summary_table()}\n"
        f"identity head, training only: {sum(p.numel() for p in trainer.head.parameters()):,}"
    )
    if pairs is None:
        accelerator.print("no dev_pairs: there will be no best/, only last/")
    return job


def open_training_data(settings: TrainSettings, path: str, metadata: str | None) -> LabelledFaces:
    """The training images, held or streamed, as the settings say."""
    if settings.stream:
        return open_stream(path, settings.train_split, settings.routed_domains, settings.stream_images)
    return open_source(
        path, metadata, settings.train_split, settings.routed_domains, domain_labels=settings.domain_labels
    )


def check_images(pairs: PairSet, processor: AdaptFaceImageProcessor) -> None:
    """Process every development image once: a broken one found later would cost an epoch.

    Raises:
        FileNotFoundError, ValueError: an image cannot be used; names it.
    """
    for index in range(len(pairs.images)):
        image = pairs.images[index]
        try:
            processor(image)
        except ValueError as error:  # such as an image that is not square
            raise ValueError(f"{pairs.images.where(index)}: {error}") from error


def open_run_folder(settings: TrainSettings, folder: Path) -> None:
    """Mend what a killed run left; refuses an earlier run that is neither gone on with nor to be overwritten."""
    recover_run(folder)
    goes_on = settings.resume == "auto" or Path(settings.resume).resolve().parent == (folder / "checkpoints").resolve()
    if not settings.overwrite and not goes_on and holds_run(folder):
        raise ValueError(
            f"output_dir: {folder} holds an earlier run; add --resume auto to go on with it, --overwrite true to "
            "delete it, or choose another --output_dir"
        )


def start_run(job: Job) -> None:
    """Delete the earlier run where that was asked for, now that all else is checked; write settings, start trackers."""
    settings, accelerator = job.settings, job.accelerator
    if accelerator.is_main_process:
        if settings.overwrite:
            remove_run(job.folder)
        if not list_checkpoints(job.folder):
            write_text_atomically(job.folder / SETTINGS, settings.to_yaml())
    accelerator.wait_for_everyone()
    if settings.trackers:
        simple = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(settings).items()}
        accelerator.init_trackers("adaptface", simple)


def resume(job: Job) -> dict[str, Any] | None:
    """Restore the checkpoint that the settings ask for; returns its state, or None to start afresh.

    Raises:
        ValueError: settings, data or number of processes differ from the checkpoint's where that matters.
    """
    settings, accelerator = job.settings, job.accelerator
    found: list[Path | None] = [None]
    if accelerator.is_main_process:
        found = [find_checkpoint(job.folder, settings.resume, accelerator.print)]
    folder = broadcast_object_list(found)[0]
    if folder is None:
        if settings.resume == "auto":
            accelerator.print(f"no checkpoint in {job.folder} to resume from; starting afresh")
        return None
    saved = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    state = read_state(folder)
    changes = changed_settings(saved, settings)
    if state["num_processes"] != accelerator.num_processes:
        changes.append(f"processes: {state['num_processes']} -> {accelerator.num_processes}")
    now = job.fingerprints()
    for name, what in (
        ("data", "training data: other identities, labels, domains or images"),
        ("base", "backbone: other weights"),
        ("dev_pairs", "dev_pairs: other pairs or images, so that the best epoch could not be told"),
    ):
        if state[name] != now[name]:
            changes.append(what)
    if changes:
        raise ValueError(
            f"cannot resume {folder}: it was trained with other settings:\n  " + "\n  ".join(changes)
            + "\nrestore them, or start a new run in another --output_dir"
        )  # fmt: skip
    load_checkpoint(accelerator, folder)
    origin = folder.parent.parent / "best"
    if accelerator.is_main_process and state["history"] and not (job.folder / "best").exists():
        if not origin.is_dir():
            raise ValueError(
                f"cannot resume {folder}: {origin}, the model of its best epoch so far, is gone; put it back, or start "
                "a new run in another --output_dir"
            )
        shutil.copytree(origin, job.folder / "best")  # a checkpoint of another run folder
    if accelerator.is_main_process:
        write_text_atomically(job.folder / SETTINGS, settings.to_yaml())
    accelerator.print(f"resumed {folder} at step {state['step']}")
    return state


def tiny_random_base(folder: Path, settings: TrainSettings) -> str:
    """Write a small Dinov2 with random weights, always the same ones for a seed; returns its folder."""
    origin = json.dumps({"seed": settings.seed, "image_size": settings.image_size})
    record = folder.with_name(f"{folder.name}.json")  # beside the base, which holds nothing but itself
    made_of = record.read_text(encoding="utf-8") if record.is_file() else None
    if made_of != origin or not (folder / "model.safetensors").is_file():
        torch.manual_seed(settings.seed)
        save_model_folder(folder, Dinov2Model(tiny_random_config(settings)))
        write_text_atomically(record, origin)
    return str(folder)


def synthetic_faces(folder: Path, settings: TrainSettings) -> tuple[str, str, str]:
    """Render the embedded faces, unless they are there; returns training folder, its CSV and the development pairs.

    Another set there is an error, or replaced if the run may be overwritten.
    """
    write_synthetic(
        folder,
        num_identities=settings.synthetic_identities,
        images_per_identity=settings.synthetic_images,
        dev_identities=settings.synthetic_dev_identities,
        pairs=settings.synthetic_pairs,
        seed=settings.seed,
        workers=settings.num_workers,
        overwrite=settings.overwrite,
    )
    return str(folder / "train"), str(folder / "train" / "metadata.csv"), str(folder / "dev_pairs.csv")


# -------------------------------------------------------------------------------------------------- beside the loop


def evaluate(job: Job) -> dict[str, float]:
    """Accuracy (mean and deviation over the folds), AUC and EER of the current model on the development pairs."""
    assert job.dev_pairs is not None
    embedder = ModelEmbedder(job.model, job.processor)
    batch_size = job.settings.eval_batch_size
    result = evaluate_pairs(embedder, job.dev_pairs, strict=False, batch_size=batch_size, progress=False).result
    return {name: result[name] for name in ("accuracy", "accuracy_std", "auc", "eer")}


def selection_key(entry: dict[str, Any]) -> tuple[float, float]:
    """What `best/` is chosen by: accuracy on the development pairs, then AUC."""
    return entry["accuracy"], entry["auc"]


def dry_run(job: Job) -> None:
    """Measure a few steps and an evaluation batch, and print what the whole run takes on this machine."""
    settings, accelerator, say = job.settings, job.accelerator, job.accelerator.print
    say(f"images an identity: {job.source.images_an_identity()}")
    sample, broken = job.source.sample(20), []
    for key in sample:
        try:
            job.source.image(key)
        except (ValueError, OSError) as error:
            broken.append(str(error))
    say(f"decoded {len(sample)} sample images, {len(broken)} of them broken")
    if broken:
        say(f"broken images are skipped, up to {settings.max_broken_images} an epoch; the first here: {broken[0]}")

    job.trainer.train()
    batches = iter(job.loader)
    seconds = []
    # Time only what the workers deliver as fast as they can, not what they had prepared before (two batches each).
    measured = max(DRY_RUN_STEPS, settings.num_workers)
    prepared = 1 + math.ceil(2 * settings.num_workers / settings.gradient_accumulation)
    for step in range(min(prepared + measured, job.batches.steps)):
        set_learning_rates(job.optimizer, settings, (step + 0.5) / job.batches.steps)
        start = time.perf_counter()
        values = train_step(job, islice(batches, settings.gradient_accumulation))
        seconds.append(time.perf_counter() - start)
        # In fp16 the scaler starts high on purpose and comes down by skipping a few steps: then the loss is finite.
        if not math.isfinite(values["loss"]) or not (values["finite"] or accelerator.scaler):
            raise ValueError(f"step {step + 1} gave loss {values['loss']}; check the data and mixed_precision")
    if len(seconds) == prepared + measured:
        step_seconds = statistics.mean(seconds[prepared:])  # workers deliver in bursts
    else:  # an epoch of few steps; the first also starts the loader and warms up
        step_seconds = statistics.median(seconds[1:] or seconds)
    steps = settings.epochs * job.batches.steps
    duration = steps * step_seconds
    say(f"loss of the last step {values['loss']:.3f}; {job.batches.step_size / step_seconds:.1f} images/s; "
        f"{step_seconds:.3f} s a step, {steps} steps")  # fmt: skip
    if job.dev_pairs is not None:
        images = [job.dev_pairs.images[i] for i in range(min(settings.eval_batch_size, len(job.dev_pairs.images)))]
        start = time.perf_counter()
        embed_images(ModelEmbedder(job.model, job.processor), images, settings.eval_batch_size, progress=False)
        each = (time.perf_counter() - start) / len(images) * len(job.dev_pairs.images)
        evaluations = math.ceil(settings.epochs / settings.eval_every_epochs)
        duration += evaluations * each
        say(f"development set: {len(job.dev_pairs)} pairs of {len(job.dev_pairs.images)} images, "
            f"{evaluations} evaluations of {each:.0f} s")  # fmt: skip
    say(f"peak memory {peak_memory(accelerator.device) / 2**20:.0f} MB ({accelerator.device.type}); expected duration "
        f"on this machine {timedelta(seconds=round(duration))}. Nothing was trained or kept.")  # fmt: skip


if __name__ == "__main__":
    printable_output()
    main()
