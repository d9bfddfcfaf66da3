"""The training script on a tiny model: what it learns, writes, refuses and reports."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_accelerate
from adaptface import training
from adaptface.data.augmentation import build_augmentation
from adaptface.losses import build_head
from adaptface.settings import TrainSettings, read_settings
from adaptface.training import FaceTrainer, build_optimizer
from image_processing_adaptface import AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel
from tests.training import assert_same_run, checkpoint_tensors, read_log, train, words, write_faces
from train_accelerate import prepare, start_accelerator, train_step


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"))


@pytest.fixture(scope="module")
def run(faces: Path, tiny_backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six epochs."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return train(faces, tiny_backbone_dir, folder, epochs=6, trackers="tensorboard")


@pytest.fixture
def fresh_state():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_it_learns_and_logs(run: Path) -> None:
    log = read_log(run, "train")
    assert log[-1]["identity_loss"] < 0.5 * log[0]["identity_loss"]
    assert [line["step"] for line in log] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    for line in log:
        assert sum(line[f"usage_{name}"] for name in ("general", "pose", "age")) == pytest.approx(1, abs=1e-5)
        weighted = line["identity_loss"] + 0.1 * line["domain_loss"] + 0.01 * line["balance_loss"]
        assert line["loss"] == pytest.approx(weighted + 0.001 * line["router_z_loss"], rel=1e-5)
    assert list((run / "trackers").rglob("events.out.tfevents*"))


def test_best_is_the_best_epoch_and_both_models_load(run: Path) -> None:
    dev = read_log(run, "dev")
    assert [line["step"] for line in dev] == [6, 12, 18]
    chosen = max(dev, key=lambda line: (line["accuracy"], line["auc"]))
    assert [line for line in dev if line.get("best")][-1] == chosen
    for name in ("best", "last"):
        assert AdaptFaceModel.from_pretrained(run / name).dtype == torch.float32
        assert AdaptFaceImageProcessor.from_pretrained(run / name).size["height"] == 28
        assert not [key for key in load_file(run / name / "model.safetensors") if key.startswith(("backbone", "head"))]
    newest = load_file(sorted((run / "checkpoints").iterdir())[-1] / "trained.safetensors")
    last = load_file(run / "last" / "model.safetensors")
    assert all(torch.equal(newest[f"model.{key}"], last[key]) for key in last)


def test_settings_lie_beside_the_checkpoints(run: Path) -> None:
    for folder in (run, *(run / "checkpoints").iterdir()):
        settings = read_settings([str(folder / "settings.yaml")])
        assert (settings.epochs, settings.lora_rank, settings.seed) == (6, 4, 0)


def test_an_earlier_run_is_not_overwritten_unasked(faces: Path, tiny_backbone_dir: Path, tmp_path: Path) -> None:
    short = {"epochs": 1, "dev_pairs": "null", "dev_images": "null"}
    run = train(faces, tiny_backbone_dir, tmp_path / "run", **short)
    assert not (run / "best").exists()
    weights = (run / "last" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="holds an earlier run; add --resume auto"):
        train(faces, tiny_backbone_dir, run, seed=1, **short)
    assert (run / "last" / "model.safetensors").read_bytes() == weights
    train(faces, tiny_backbone_dir, run, seed=1, overwrite="true", **short)
    assert (run / "last" / "model.safetensors").read_bytes() != weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_data": "absent"}, "absent"),
        ({"backbone": "vit"}, "base .* is a 'vit' model"),
        ({"image_size": 30}, "multiple of the base's patch size"),
        ({"batch_size": 100}, "a step needs 200 images"),
        ({"dev_pairs": "absent.csv"}, "absent.csv"),
        ({"trackers": "wandb"}, "'wandb' is not installed"),
    ],
)
def test_wrong_input_ends_with_one_clear_line(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path, change: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if "backbone" in change:
        change = {"backbone": tmp_path}
        (tmp_path / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        train(faces, tiny_backbone_dir, tmp_path / "run", **{"trackers": "", **change})
    assert not (tmp_path / "run" / "log.jsonl").exists()


def job_of(faces: Path, base: Path, run: Path, **settings):
    values = read_settings(words(faces, base, run, **settings))
    return prepare(values, start_accelerator(values), run)


def state_of(job) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in job.trainer.state_dict().items()}


def test_speed_is_images_over_time(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if line["event"] == "train"]
    seconds = sum(2 * 16 / line["images_per_second"] for line in trained)  # windows of two steps of 16 images
    assert 0.2 * trained[-1]["seconds"] < seconds < 1.05 * trained[-1]["seconds"] + 0.2  # the rest is evaluation


def test_best_stays_where_later_epochs_are_worse(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(
        train_accelerate,
        "evaluate",
        lambda job: {"accuracy": next(scores), "accuracy_std": 0.0, "auc": 0.5, "eer": 0.5},
    )
    run = train(faces, tiny_backbone_dir, tmp_path / "run", eval_every_epochs=1, keep_checkpoints=3)
    best = load_file(run / "best" / "model.safetensors")
    for epoch in (1, 2, 3):
        trained = load_file(run / "checkpoints" / f"step_{3 * epoch:08d}" / "trained.safetensors")
        assert all(torch.equal(best[name], trained[f"model.{name}"]) for name in best) == (epoch == 2)


def test_each_epoch_has_its_own_order_and_augmentation_and_the_asked_precision(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model is really fed, seen where it takes a step."""
    epochs: list[list[tuple[int, float]]] = [[], []]
    steps, norms, dtypes, bases = 0, [], set(), set()
    real = train_accelerate.train_step

    def spy(job, batches, *arguments):
        nonlocal steps
        batches = list(batches)
        for batch in batches:
            # Even under a flip a picture keeps its sum; weighted by columns it does not.
            columns = (batch["pixel_values"].double() * torch.arange(28)).sum((1, 2, 3)).tolist()
            epochs[steps // 3] += zip(batch["label"].tolist(), columns, strict=True)
        bases.add(job.model.backbone.dtype)
        if steps == 0:
            job.optimizer.optimizer.register_step_pre_hook(
                lambda *_: norms.append(torch.stack([p.grad.norm() for p in job.parameters]).norm())
            )
            job.model.backbone.layernorm.register_forward_hook(lambda module, inputs, output: dtypes.add(
                torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None))  # fmt: skip
        steps += 1
        return real(job, iter(batches), *arguments)

    monkeypatch.setattr(train_accelerate, "train_step", spy)
    options = {"epochs": 2, "flip": 0.5, "mixed_precision": "bf16", "gradient_clip": 0.01, "dev_pairs": "null"}
    train(faces, tiny_backbone_dir, tmp_path / "run", **options)
    assert len(epochs[0]) == len(epochs[1]) == 48
    assert [label for label, _ in epochs[0]] != [label for label, _ in epochs[1]]
    moved = {value for _, value in epochs[1]} - {value for _, value in epochs[0]}
    assert 8 < len(moved) < 40  # about half of the pictures are flipped the other way
    assert dtypes == {torch.bfloat16}
    assert bases == {torch.bfloat16}  # held so, not only cast on the way
    assert len(norms) == 6 and all(float(norm) == pytest.approx(0.01, rel=0.02) for norm in norms)


def test_every_augmentation_setting_arrives(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_state: None
) -> None:
    given: dict = {}

    def spy(**options):
        given.update(options)
        return build_augmentation(**options)

    monkeypatch.setattr(training, "build_augmentation", spy)
    wanted = {
        "flip": 0.1,
        "randaugment_ops": 3,
        "low_resolution": 0.2,
        "occlusion": 0.3,
        "crop": 0.4,
        "photometric": 0.5,
    }
    settings = read_settings(
        words(faces, tiny_backbone_dir, tmp_path / "run", randaugment_magnitude="2,7", dry_run="true", **wanted)
    )
    prepare(settings, start_accelerator(settings), tmp_path / "run")
    assert given == {**wanted, "randaugment_magnitude": [2, 7]}


def test_overwriting_deletes_nothing_before_all_else_is_checked(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path
) -> None:
    run = train(faces, tiny_backbone_dir, tmp_path / "run", epochs=1, trackers="tensorboard")
    curves = len(list((run / "trackers").rglob("events.out.tfevents*")))
    for mistake in ({"train_data": "/typo"}, {"dev_pairs": "/typo.csv"}, {"backbone": "/typo"}):
        with pytest.raises(SystemExit):
            train(faces, tiny_backbone_dir, run, **{"epochs": 1, "overwrite": "true", **mistake})
    assert (run / "last").is_dir() and (run / "best").is_dir() and (run / "checkpoints").is_dir()
    train(faces, tiny_backbone_dir, run, epochs=1, overwrite="true", trackers="tensorboard")
    assert len(list((run / "trackers").rglob("events.out.tfevents*"))) == curves
    assert len(read_log(run, "start")) == 1


def test_a_random_base_belongs_to_its_seed(tmp_path: Path) -> None:
    def digest(folder: Path, **values: int) -> bytes:
        base = train_accelerate.tiny_random_base(folder, TrainSettings(**values))
        return (Path(base) / "model.safetensors").read_bytes()

    first = digest(tmp_path / "a" / "base", seed=0, image_size=56)
    assert digest(tmp_path / "a" / "base", seed=1, image_size=56) == digest(
        tmp_path / "b" / "base", seed=1, image_size=56
    )
    assert digest(tmp_path / "a" / "base", seed=0, image_size=56) == first
    assert len(digest(tmp_path / "a" / "base", seed=0, image_size=84)) > len(first)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")],
)
def test_a_launcher_that_contradicts_the_settings_is_refused(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=f"the launcher asks for {value}"):
        train(faces, tiny_backbone_dir, tmp_path / "run")


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("head", ["cosface", "adaface"])
def test_a_nonfinite_step_changes_nothing(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path, fresh_state: None, poison: float, head: str
) -> None:
    job = job_of(faces, tiny_backbone_dir, tmp_path / "run", head=head)
    job.trainer.train()
    good, bad = list(job.loader)[:2], list(job.loader)[2:4]
    bad[1]["pixel_values"][0, 0, 0, 0] = poison
    assert train_step(job, good)["finite"]
    before, steps = state_of(job), [entry["step"].item() for entry in job.optimizer.state.values()]
    assert not train_step(job, bad)["finite"]
    assert all(torch.equal(value, before[name]) for name, value in state_of(job).items() if "running" not in name)
    assert [entry["step"].item() for entry in job.optimizer.state.values()] == steps
    assert all(torch.isfinite(value).all() for value in state_of(job).values())
    assert train_step(job, good)["finite"]
    assert any(not torch.equal(value, before[name]) for name, value in state_of(job).items())


def test_nonfinite_steps_in_a_row_stop_the_run_and_single_ones_do_not(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train_accelerate.send_to_device
    calls = 0

    def poisoned(batch, *arguments, **options):
        nonlocal calls
        calls += 1
        if calls in (1, 5) or calls > 8:  # of two micro-batches a step: steps 1, 3, 5, 6, 7
            batch["pixel_values"][:] = math.nan
        return real(batch, *arguments, **options)

    monkeypatch.setattr(train_accelerate, "send_to_device", poisoned)
    with pytest.raises(SystemExit, match=r"^error: 3 steps in a row gave NaN or Inf .*step 7.*lower learning_rate"):
        train(faces, tiny_backbone_dir, tmp_path / "run", max_nonfinite_steps=3)
    skips = [(line["step"], line["in_a_row"]) for line in read_log(tmp_path / "run", "skip")]
    assert skips == [(1, 1), (3, 1), (5, 1), (6, 2), (7, 3)]
    assert all(math.isfinite(line["loss"]) for line in read_log(tmp_path / "run", "train") if "loss" in line)
    saved = checkpoint_tensors(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"domains": ["one"]},
        {"adaptation": "frozen"},
        {"adaptation": "full"},
        {"adapter_targets": "all-linear", "router_layer": 0},
        {"domain_loss_weight": 0.0, "balance_loss_weight": 0.0, "router_z_loss_weight": 0.0},
        {"adapter_layers": [2], "alignment_loss_weight": 1.0},
    ],
)
def test_every_trained_parameter_gets_a_gradient(tiny_backbone_dir: Path, options: dict) -> None:
    """Data parallelism waits for the gradient of every parameter; none may be left out, none frozen may get one."""
    settings = TrainSettings(lora_rank=4, image_size=28, embedding_size=16, **options)
    model = AdaptFaceModel.from_backbone(tiny_backbone_dir, **settings.model_arguments())
    trainer = FaceTrainer(model, build_head("cosface", 16, 5), settings).train()
    terms = trainer(torch.randn(4, 3, 28, 28), torch.tensor([0, 1, 2, 0]), torch.tensor([-1, -1, -1, -1]))
    terms["loss"].backward()
    for name, parameter in trainer.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    trained = {name for name, parameter in trainer.named_parameters() if parameter.requires_grad}
    assert settings.adaptation == "full" or not any(name.startswith("model.backbone.") for name in trained)


def test_biases_and_norms_do_not_decay_and_the_head_has_its_rate(tiny_backbone_dir: Path) -> None:
    settings = TrainSettings(
        adaptation="full", image_size=28, head_learning_rate=0.5, learning_rate=0.25, weight_decay=0.1
    )
    model = AdaptFaceModel.from_backbone(tiny_backbone_dir, **settings.model_arguments())
    trainer = FaceTrainer(model, build_head("cosface", 512, 5), settings)
    optimizer = build_optimizer(trainer, settings)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(of) == sum(p.requires_grad for p in trainer.parameters())
    decay = {name: of[id(p)]["weight_decay"] for name, p in trainer.named_parameters() if p.requires_grad}
    without = (
        "bias",
        "norm1.weight",
        "norm2.weight",
        "layernorm.weight",
        "lambda1",
        "cls_token",
        "position_embeddings",
    )
    for name, value in decay.items():
        assert value == (0.0 if name.endswith(without) else 0.1), name
    assert of[id(trainer.head.weight)]["peak_lr"] == 0.5 and of[id(model.projection.weight)]["peak_lr"] == 0.25


def test_accumulation_is_one_large_batch(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path, fresh_state: None
) -> None:
    """Without what is a mean over a micro-batch (balance) or random (dropout), the gradients are those of 16 images."""
    options = {"lora_dropout": 0, "router_dropout": 0, "balance_loss_weight": 0, "domain_loss_weight": 0}
    updates = []
    for size, accumulation in ((8, 2), (16, 1)):
        AcceleratorState._reset_state(True)
        sizes = {"batch_size": size, "gradient_accumulation": accumulation}
        job = job_of(faces, tiny_backbone_dir, tmp_path / f"{size}", **sizes, **options)
        train_step(job, list(job.loader)[:accumulation])
        updates.append(job.optimizer.state_dict()["state"])
    for index, entry in updates[0].items():
        torch.testing.assert_close(entry["exp_avg"], updates[1][index]["exp_avg"], rtol=1e-3, atol=1e-6)


def test_frozen_weights_in_bfloat16_are_saved_as_float32_models(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path
) -> None:
    run = train(faces, tiny_backbone_dir, tmp_path / "run", mixed_precision="bf16", epochs=2)
    config = json.loads((run / "best" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"
    assert {value.dtype for value in load_file(run / "best" / "model.safetensors").values()} == {torch.float32}
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert {value.dtype for value in load_file(newest / "trained.safetensors").values()} == {torch.float32}


def test_attention_threads_and_determinism_arrive(faces: Path, tiny_backbone_dir: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        for attention in ("eager", "sdpa"):
            options = {"attention": attention, "cpu_threads": threads + 1, "deterministic": "true"}
            job = job_of(faces, tiny_backbone_dir, tmp_path / attention, **options)
            assert job.model.config._attn_implementation == attention
            assert torch.get_num_threads() == threads + 1 and torch.are_deterministic_algorithms_enabled()
            AcceleratorState._reset_state(True)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def test_a_damaged_development_image_is_found_before_training(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_accelerate, "FINGERPRINT_IMAGES", 2)  # more would find it by chance in so small a set
    file = write_faces(tmp_path) / "faces" / "id_0" / "1.png"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(SystemExit, match=r"error: .*id_0.1\.png: .*image"):
        train(faces, tiny_backbone_dir, tmp_path / "run", dev_images=tmp_path / "faces")
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.slow
def test_broken_training_images_are_skipped_counted_and_limited(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = write_faces(tmp_path)
    for number in (0, 7):
        (other / "faces" / "id_5" / f"{number}.png").write_bytes(b"")
    development = {"dev_pairs": faces / "dev_pairs.csv", "dev_images": faces / "faces"}
    options = {
        **development,
        "batch_size": 9,
        "gradient_accumulation": 2,
        "log_every_steps": 3,
    }  # 54 images, all of them
    train(other, tiny_backbone_dir, tmp_path / "dry", dry_run="true", **options)
    assert "20 sample images, 0 of them broken" in capsys.readouterr().out
    with pytest.warns(UserWarning, match=r"skipped a broken training image: .*id_5.[07]\.png: the file is empty"):
        whole = train(other, tiny_backbone_dir, tmp_path / "run", **options)
    assert [line["broken_images"] for line in read_log(whole, "train")] == [2, 2, 2]  # of each epoch
    with pytest.warns(UserWarning):
        train(other, tiny_backbone_dir, tmp_path / "again", stop_after_steps=4, **options)
        train(other, tiny_backbone_dir, tmp_path / "again", resume="auto", **options)
    assert_same_run(tmp_path / "again", whole)
    with pytest.warns(UserWarning), pytest.raises(SystemExit, match=r"2 training images of epoch 1 are broken, named"):
        train(other, tiny_backbone_dir, tmp_path / "strict", max_broken_images=1, **options)
    (other / "faces" / "id_5" / "8.png").write_bytes(b"")  # the last one, which a dry run decodes
    with pytest.warns(UserWarning):
        train(other, tiny_backbone_dir, tmp_path / "dry", dry_run="true", **options)
    assert "1 of them broken" in (said := capsys.readouterr().out) and "8.png: the file is empty" in said


def test_dry_run_says_that_there_will_be_no_best_model(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(faces, tiny_backbone_dir, tmp_path / "run", dry_run="true", dev_pairs="null", dev_images="null")
    assert "no dev_pairs: there will be no best/, only last/" in capsys.readouterr().out


def test_dry_run_reports_and_leaves_nothing(
    faces: Path, tiny_backbone_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(faces, tiny_backbone_dir, tmp_path / "run", dry_run="true")
    output = capsys.readouterr().out
    for part in ("54 images of 6 identities", "images an identity: 9 to 9", "trainable", "images/s", "9 steps",
                 "20 pairs", "peak memory"):  # fmt: skip
        assert part in output, output
    assert re.search(r"expected duration on this machine 0:0\d:\d\d\.", output), output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings", [{"domains": "general"}, {"adaptation": "frozen"}, {"adaptation": "full"}], ids=lambda s: str(s)
)
def test_without_a_router_the_data_may_name_any_domains(
    settings: dict, faces: Path, tiny_backbone_dir: Path, tmp_path: Path
) -> None:
    """Plain LoRA beside DA-LoRA on one data set: labels that only a router reads stop nothing, and still align."""
    root = faces / "faces"
    files = [file.relative_to(root).as_posix() for file in sorted(root.rglob("*.png"))]
    rows = [f"{file},{('night', 'day')[at % 2]}" for at, file in enumerate(files)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,domain", *rows]), encoding="utf-8")
    labels = str(tmp_path / "labels.csv")
    run = train(
        faces, tiny_backbone_dir, tmp_path / "run", epochs=1, train_metadata=labels, alignment_loss_weight=1, **settings
    )
    for line in read_log(run, "train"):
        assert line["alignment_loss"] > 0
        assert line["loss"] == pytest.approx(line["identity_loss"] + line["alignment_loss"], rel=1e-5)
    with pytest.raises(SystemExit, match="domain 'night' is unknown"):
        train(faces, tiny_backbone_dir, tmp_path / "routed", epochs=1, train_metadata=labels)


@pytest.mark.real_faces
@pytest.mark.slow
def test_the_recipe_for_real_faces_trains(real_faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A few steps of the very recipe; its results are in docs/results.md."""
    words = ["recipes/real_faces_dev.yaml", "--output_dir", str(tmp_path / "run"), "--num_workers", "0"]
    AcceleratorState._reset_state(True)
    train_accelerate.main([*words, "--dry_run"])
    output = capsys.readouterr().out
    assert "4351 images of 236 identities" in output and "the router learns from the identity" in output
    assert "3200 pairs of 4992 images" in output
    AcceleratorState._reset_state(True)
    train_accelerate.main([*words, "--stop_after_steps", "2"])
    AcceleratorState._reset_state(True)
    assert (tmp_path / "run" / "checkpoints" / "step_00000002" / "trained.safetensors").is_file()


def test_help_needs_no_recipe(capsys: pytest.CaptureFixture) -> None:
    train_accelerate.main(["--help"])
    assert "--learning_rate 0.0001: peak learning rate" in capsys.readouterr().out


def test_a_launcher_that_starts_one_of_several_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, fresh_state: None
) -> None:
    """`accelerate launch --cpu --num_processes 2` sets exactly these."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"asked for several processes, but train_accelerate.py sees 1.*--multi_gpu"):
        start_accelerator(TrainSettings())
