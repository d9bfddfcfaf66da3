"""A run that was stopped and resumed equals the run that was not, bit for bit."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train_accelerate
from adaptface.checkpoint import run_lock
from tests.training import assert_same_run, checkpoint_tensors, read_log, train, words, write_faces

ROOT = Path(train_accelerate.__file__).parent


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"))


@pytest.fixture(scope="module")
def reference(faces: Path, tiny_backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(faces, tiny_backbone_dir, tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.parametrize("stop_after", [4, 6])
def test_resume_is_bit_exact(
    faces: Path, tiny_backbone_dir: Path, reference: Path, tmp_path: Path, stop_after: int
) -> None:
    """Step 4 is in the midst of an epoch; step 6 is saved before the evaluation that is due there."""
    run = train(faces, tiny_backbone_dir, tmp_path / "run", stop_after_steps=stop_after)
    assert [path.name for path in (run / "checkpoints").iterdir()][-1] == f"step_{stop_after:08d}"
    train(faces, tiny_backbone_dir, run, resume="auto")
    assert_same_run(run, reference)


@pytest.mark.slow
def test_workers_do_not_change_the_run(faces: Path, tiny_backbone_dir: Path, reference: Path, tmp_path: Path) -> None:
    run = train(faces, tiny_backbone_dir, tmp_path / "run", num_workers=2, stop_after_steps=4)
    train(faces, tiny_backbone_dir, run, num_workers=2, resume="auto")
    assert_same_run(run, reference)


def test_checkpointed_activations_and_adaface_resume(faces: Path, tiny_backbone_dir: Path, tmp_path: Path) -> None:
    options = {"head": "adaface", "gradient_checkpointing": "true", "randaugment_ops": 2, "epochs": 2}
    whole = train(faces, tiny_backbone_dir, tmp_path / "whole", **options)
    run = train(faces, tiny_backbone_dir, tmp_path / "run", stop_after_steps=2, **options)
    train(faces, tiny_backbone_dir, run, resume="auto", **options)
    assert "head.running_mean" in checkpoint_tensors(sorted((run / "checkpoints").iterdir())[-1])
    assert_same_run(run, whole)


def test_resume_after_a_kill_drops_the_lines_and_models_of_lost_steps(
    faces: Path, tiny_backbone_dir: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies without a word at step 8, the checkpoint of step 6 is damaged: log and best/ are ahead of 3."""
    real = train_accelerate.train_step
    steps = 0

    def dying(*arguments):
        nonlocal steps
        steps += 1
        if steps == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train_accelerate, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train(faces, tiny_backbone_dir, tmp_path / "run")
    monkeypatch.undo()
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000006" / "optimizer.bin").write_bytes(b"")
    with open(run / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"event": "train", "st')
    train(faces, tiny_backbone_dir, run, resume="auto")
    assert_same_run(run, reference)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"learning_rate": 0.02}, "learning_rate: 0.01 -> 0.02"), ({"domains": "general"}, "domains"),
     ({"epochs": 4}, "epochs: 3 -> 4")],
)  # fmt: skip
def test_resume_refuses_changed_settings(
    faces: Path, tiny_backbone_dir: Path, reference: Path, change: dict, named: str
) -> None:
    before = checkpoint_tensors(sorted((reference / "checkpoints").iterdir())[-1])
    with pytest.raises(SystemExit, match=named):
        train(faces, tiny_backbone_dir, reference, resume="auto", **change)
    after = checkpoint_tensors(sorted((reference / "checkpoints").iterdir())[-1])
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_resume_refuses_other_data(faces: Path, tiny_backbone_dir: Path, reference: Path, tmp_path: Path) -> None:
    other = write_faces(tmp_path)
    (other / "faces" / "id_0" / "0.png").unlink()
    rows = (other / "faces" / "metadata.csv").read_text(encoding="utf-8").splitlines()
    (other / "faces" / "metadata.csv").write_text("\n".join(r for r in rows if "id_0/0.png" not in r), encoding="utf-8")
    with pytest.raises(SystemExit, match="training data"):
        train(other, tiny_backbone_dir, reference, resume="auto", dev_pairs=faces / "dev_pairs.csv",
              dev_images=faces / "faces")  # fmt: skip


def test_resume_refuses_other_images_base_and_pairs(
    faces: Path, tiny_backbone_dir: Path, reference: Path, tmp_path: Path
) -> None:
    """Of the same names, labels and counts: what is in the files is held."""
    other = write_faces(tmp_path / "faces")
    for file in sorted((other / "faces").rglob("*.png")):
        Image.effect_noise((28, 28), 90).convert("RGB").save(file)
    same = {"dev_pairs": faces / "dev_pairs.csv", "dev_images": faces / "faces"}
    with pytest.raises(SystemExit, match=r"training data: other .*images"):
        train(other, tiny_backbone_dir, reference, resume="auto", **same)

    base = tmp_path / "base"
    shutil.copytree(tiny_backbone_dir, base)
    run = train(faces, base, tmp_path / "run", epochs=1)
    changed = {name: tensor + 1 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="backbone: other weights"):
        train(faces, base, run, epochs=1, resume="auto")

    rows = (faces / "dev_pairs.csv").read_text(encoding="utf-8").splitlines()
    inverted = [rows[0], *(f"{row[:-1]}{1 - int(row[-1])}" for row in rows[1:])]
    (tmp_path / "inverted.csv").write_text("\n".join(inverted), encoding="utf-8")
    with pytest.raises(SystemExit, match="dev_pairs: other pairs"):
        train(faces, tiny_backbone_dir, reference, resume="auto", dev_pairs=tmp_path / "inverted.csv")
    # The very same list of pairs, over other pictures.
    with pytest.raises(SystemExit, match=r"dev_pairs: other pairs or images"):
        train(faces, tiny_backbone_dir, reference, resume="auto", dev_images=other / "faces")


def test_another_runs_checkpoint_needs_a_folder_of_its_own(
    faces: Path, tiny_backbone_dir: Path, reference: Path, tmp_path: Path
) -> None:
    """Else models, log and checkpoints of two runs would lie side by side under one name."""
    run = train(faces, tiny_backbone_dir, tmp_path / "run", seed=7)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=r"output_dir: .* holds an earlier run"):
        train(faces, tiny_backbone_dir, run, resume=reference / "checkpoints" / "step_00000006")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    own = run / "checkpoints" / "step_00000006"
    train(faces, tiny_backbone_dir, run, seed=7, resume=own)  # its own, by name, is no other's
    with pytest.raises(SystemExit, match=r"is a run folder; name one of its checkpoints/step_XXXXXXXX, or go on in it"):
        train(faces, tiny_backbone_dir, tmp_path / "new", resume=run)


@pytest.mark.parametrize("damage", ["all checkpoints cut off", "checkpoints deleted"])
def test_auto_does_not_start_afresh_over_a_run_it_cannot_go_on_with(
    faces: Path, tiny_backbone_dir: Path, reference: Path, tmp_path: Path, damage: str
) -> None:
    run = Path(shutil.copytree(reference, tmp_path / "run"))
    if damage == "checkpoints deleted":
        shutil.rmtree(run / "checkpoints")
    else:
        for weights in run.glob("checkpoints/*/trained.safetensors"):
            weights.write_bytes(weights.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="holds a run, but no complete checkpoint to go on from"):
        train(faces, tiny_backbone_dir, run, resume="auto")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_kill_after_a_made_up_evaluation_repeats_no_line(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(faces, tiny_backbone_dir, tmp_path / "run", stop_after_steps=6)  # the evaluation is still due

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_accelerate, "train_step", killed)
        train(faces, tiny_backbone_dir, run, resume="auto")
    train(faces, tiny_backbone_dir, run, resume="auto")
    assert [line["step"] for line in read_log(run, "dev")] == [6, 9]


def test_an_evaluation_that_fails_costs_no_epoch(
    faces: Path, tiny_backbone_dir: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments):
        raise OSError("the disk of the development images is gone")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="development images is gone"):
        patch.setattr(train_accelerate, "evaluate", failing)
        train(faces, tiny_backbone_dir, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step_00000006").is_dir()
    train(faces, tiny_backbone_dir, tmp_path / "run", resume="auto")
    assert_same_run(tmp_path / "run", reference)


def test_an_evaluation_made_up_for_is_saved_once(faces: Path, tiny_backbone_dir: Path, tmp_path: Path) -> None:
    run = train(faces, tiny_backbone_dir, tmp_path / "run", stop_after_steps=9)  # the last step, before its evaluation
    for _ in range(2):
        train(faces, tiny_backbone_dir, run, resume="auto")
    assert [line["step"] for line in read_log(run, "dev")] == [6, 9]
    state = json.loads((run / "checkpoints" / "step_00000009" / "state.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in state["history"]] == [6, 9]


def test_resuming_elsewhere_brings_the_best_model_along(
    faces: Path, tiny_backbone_dir: Path, reference: Path, tmp_path: Path
) -> None:
    checkpoint = reference / "checkpoints" / "step_00000009"
    run = train(faces, tiny_backbone_dir, tmp_path / "new", resume=checkpoint)
    assert (run / "best" / "model.safetensors").read_bytes() == (reference / "best" / "model.safetensors").read_bytes()


def test_a_run_folder_has_one_writer_and_no_leftovers(faces: Path, tiny_backbone_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with run_lock(run), pytest.raises(SystemExit, match="another run is writing into"):
        train(faces, tiny_backbone_dir, run)
    leftover = run / "checkpoints" / ".step_00000002.partial"
    leftover.mkdir(parents=True)
    (run / ".synthetic.12345" / "train").mkdir(parents=True)  # a kill while faces were rendered
    train(faces, tiny_backbone_dir, run, epochs=1)
    assert not leftover.exists() and not (run / ".synthetic.12345").exists()
    newest = run / "checkpoints" / "step_00000003"
    newest.rename(newest.with_name(".step_00000003.replaced"))  # a kill between the two renames of a replacement
    train(faces, tiny_backbone_dir, run, epochs=1, resume="auto")
    assert newest.is_dir() and len(read_log(run, "start")) == 1


def test_a_checkpoint_without_a_list_of_its_files_is_passed_over(
    faces: Path, tiny_backbone_dir: Path, reference: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(reference, tmp_path / "run"))
    (run / "checkpoints" / "step_00000009" / "manifest.json").write_text("{}", encoding="utf-8")
    train(faces, tiny_backbone_dir, run, resume="auto")
    assert_same_run(run, reference)


def test_resuming_a_finished_run_changes_nothing(faces: Path, tiny_backbone_dir: Path, reference: Path) -> None:
    log = read_log(reference)
    train(faces, tiny_backbone_dir, reference, resume="auto", num_workers=1)
    assert read_log(reference) == log


def launch(
    arguments: list[str], processes: int, script: Path = ROOT / "train_accelerate.py", **popen
) -> subprocess.Popen:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*command, str(script), *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **popen,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_resume_bit_exactly(faces: Path, tiny_backbone_dir: Path, tmp_path: Path) -> None:
    """With workers, and a head that has a state of its own beside its weights."""
    options = {"head": "adaface", "batch_size": 4, "num_workers": 2}
    finish(launch(words(faces, tiny_backbone_dir, tmp_path / "whole", **options), 2))
    finish(launch(words(faces, tiny_backbone_dir, tmp_path / "run", stop_after_steps=4, **options), 2))
    finish(launch(words(faces, tiny_backbone_dir, tmp_path / "run", resume="auto", **options), 2))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(SystemExit, match="processes: 2 -> 1"):
        train(faces, tiny_backbone_dir, tmp_path / "run", resume="auto", **options)


POISONED = """
import math, os, sys
import train_accelerate as script

real, calls = script.send_to_device, 0

def send(batch, *arguments, **options):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 3:  # the first of the second step's two
        batch["pixel_values"][0] = math.nan
    return real(batch, *arguments, **options)

script.send_to_device = send
script.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_all_processes_skip_the_step_that_one_of_them_spoils(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path
) -> None:
    """AdaFace, whose averages are shared, too: after the step both processes must still agree to go on."""
    (tmp_path / "poisoned.py").write_text(POISONED, encoding="utf-8")
    options = {"batch_size": 4, "head": "adaface", "log_every_steps": 1, "epochs": 1, "dev_pairs": "null",
               "dev_images": "null"}  # fmt: skip
    arguments = words(faces, tiny_backbone_dir, tmp_path / "run", **options)
    finish(launch(arguments, 2, script=tmp_path / "poisoned.py"))
    run = tmp_path / "run"
    assert [line["step"] for line in read_log(run, "skip")] == [2]
    finite = [all(math.isfinite(v) for v in line.values() if isinstance(v, float)) for line in read_log(run, "train")]
    assert finite == [True] * 3
    saved = checkpoint_tensors(run / "checkpoints" / "step_00000003")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one_that_accumulates(faces: Path, tiny_backbone_dir: Path, tmp_path: Path) -> None:
    """No dropout, no router losses (they are means over a micro-batch): the very same mean gradient."""
    options = {"lora_dropout": 0, "router_dropout": 0, "balance_loss_weight": 0, "domain_loss_weight": 0, "epochs": 1,
               "weight_decay": 0, "dev_pairs": "null", "dev_images": "null"}  # fmt: skip
    finish(
        launch(words(faces, tiny_backbone_dir, tmp_path / "two", batch_size=8, gradient_accumulation=1, **options), 2)
    )
    train(faces, tiny_backbone_dir, tmp_path / "one", batch_size=8, gradient_accumulation=2, **options)
    two, one = (checkpoint_tensors(tmp_path / name / "checkpoints" / "step_00000003") for name in ("two", "one"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send SIGTERM")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    """Sent to the whole group, as a terminal and most schedulers do: loader workers get it, too."""
    run = tmp_path / "run"
    options = {"epochs": 2000, "eval_every_epochs": 2000, "num_workers": workers}
    process = launch(words(faces, tiny_backbone_dir, run, **options), 1, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "saved" in line:
            break
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert output.count("saving a checkpoint") == 1  # said once, not by each worker
    assert f"{number.name}: saving a checkpoint" in output and "go on with --resume auto" in output
    stopped_at = int(output.split("stopped after step ")[1].split()[0])
    assert (run / "checkpoints" / f"step_{stopped_at:08d}" / "manifest.json").is_file()
