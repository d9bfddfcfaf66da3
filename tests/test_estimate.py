"""`adaptface estimate`: its arithmetic on made-up measurements, and a real measurement of a tiny model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adaptface import estimate as module
from adaptface.cli import app
from adaptface.estimate import CASIA, GPU, Measured, as_text, estimate, measure_steps
from adaptface.settings import TrainSettings, read_settings

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = {"backbone": "tiny-random", "image_size": 56, "lora_rank": 4, "embedding_size": 16, "domains": ["general"]}


@dataclass
class Machine:
    """A machine whose steps take `overhead` and then `each` second an image, `fixed` and then `slope` bytes."""

    fixed: float = 1e9
    slope: float = 10e6
    overhead: float = 0.1
    each: float = 0.01
    fits: int = 10**9
    asked: tuple[int, ...] = ()

    def measure(self, settings: TrainSettings, identities: int, device: Any, batch: int) -> Measured | None:
        self.asked += (batch,)
        if batch > self.fits:
            return None
        memory = int(self.fixed + self.slope * batch)
        return Measured(batch, self.overhead + self.each * batch, memory, 3e9 * batch)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(module, "_in_own_process", machine.measure)
    monkeypatch.setattr(module, "_free_memory", lambda device: int(4e9))
    monkeypatch.setattr(module, "_decoding_rate", lambda settings: 1000.0)
    monkeypatch.setattr(module, "_device_name", lambda device, settings: str(device))
    return machine


def recipe(**values: Any) -> TrainSettings:
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return read_settings([str(RECIPES / "casia_dalora_vits.yaml"), *words])


def test_the_predictions_follow_from_the_measurements(machine: Machine) -> None:
    found = estimate(recipe(batch_size=128), device=torch.device("cpu"))
    assert machine.asked == (8, 32)  # on a CPU more might end other programs
    assert found["images_per_second"] == pytest.approx(32 / 0.42)
    assert found["hours"] == pytest.approx(40 * CASIA[0] / (32 / 0.42) / 3600)
    assert found["memory_bytes"] == pytest.approx(1e9 + 128 * 10e6, rel=1e-6)
    assert found["largest_batch"] == int((0.9 * 4e9 - 1e9) / 10e6)
    assert "is not here; numbers of CASIA-WebFace" in found["data"]["source"]
    assert json.loads(json.dumps(found)) == found


def test_the_rate_is_that_of_the_batch_nearest_to_the_recipes(machine: Machine) -> None:
    machine.each, machine.overhead = 0.01, -0.005  # small batches are faster
    assert estimate(recipe(batch_size=128), device=torch.device("cpu"))["images_per_second"] == pytest.approx(
        32 / 0.315
    )
    assert estimate(recipe(batch_size=2), device=torch.device("cpu"))["steps"][1]["batch"] == 2
    found = estimate(recipe(batch_size=1), device=torch.device("cpu"))
    assert [step["batch"] for step in found["steps"]] == [1, 2]


def test_a_batch_beyond_what_is_asked_for_is_no_measurement(machine: Machine) -> None:
    machine.slope = 1e3
    found = estimate(recipe(), device=torch.device("cpu"))
    assert found["largest_batch"] == module.LARGEST_BATCH
    assert as_text(found).count("4096 or more") == 8


def test_threads_are_those_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    settings = TrainSettings(output_dir=str(tmp_path), train_data="synthetic", cpu_threads=1, **TINY)
    measure_steps(settings, 10, "cpu", 2)
    assert asked == [1] and module._device_name(torch.device("cpu"), settings) == "cpu, threads: 1"


def test_on_a_gpu_the_batch_of_the_recipe_is_tried_and_halved(machine: Machine) -> None:
    machine.fits = 40
    found = estimate(recipe(batch_size=128), device=torch.device("cuda"))
    assert machine.asked == (8, 128, 64, 32) and [step["batch"] for step in found["steps"]] == [8, 32]


def test_a_run_that_waits_for_its_data(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_decoding_rate", lambda settings: 10.0)
    found = estimate(recipe(), images=36_000, identities=10, device=torch.device("cpu"))
    assert found["hours"] == pytest.approx(40 * 36_000 / 10 / 3600)
    assert "the run waits for it; raise num_workers" in as_text(found)


def test_other_cards_are_marked_as_estimates(machine: Machine) -> None:
    found = estimate(recipe(mixed_precision="bf16"), device=torch.device("cpu"))
    text = as_text(found)
    assert "NOT measured: other GPUs, estimated from published peak TFLOP/s (3 GFLOP an image, 15 % to 40 %" in text
    assert {gpu["name"] for gpu in found["gpus"]} == {"RTX 3060", "RTX 4060", "RTX 4070", "T4", "V100", "A100", "H100"}
    operations = 3e9 * 40 * CASIA[0]
    a100 = next(gpu for gpu in found["gpus"] if gpu["name"] == "A100")
    assert a100["hours"] == pytest.approx([operations / (share * 312e12) / 3600 for share in (0.4, 0.15)])
    assert a100["largest_batch"] == int((0.9 * 40e9 - 1e9) / 10e6)
    t4 = next(gpu for gpu in found["gpus"] if gpu["name"] == "T4")
    assert t4["peak_tflops"] == 8.1 and text.count("(has no bfloat16: take fp16)") == 2
    in_half = estimate(recipe(mixed_precision="fp16"), device=torch.device("cpu"))
    assert next(gpu for gpu in in_half["gpus"] if gpu["name"] == "T4")["peak_tflops"] == 65
    assert "has no" not in as_text(in_half)
    in_float32 = estimate(recipe(), device=torch.device("cpu"))["gpus"]
    assert next(gpu for gpu in in_float32 if gpu["name"] == "A100")["peak_tflops"] == 19.5
    assert all(isinstance(gpu, GPU) and gpu.float32 < gpu.half for gpu in module.GPUS)


def test_what_does_not_fit_is_said(machine: Machine) -> None:
    text = as_text(estimate(recipe(batch_size=1024), device=torch.device("cpu")))
    assert "batch_size 1024 does not fit: lower it, and raise gradient_accumulation" in text
    machine.fits = 1
    with pytest.raises(ValueError, match="a batch of 8 does not fit into the memory of cpu; use a smaller base"):
        estimate(recipe(), device=torch.device("cpu"))
    machine.fits, machine.fixed = 100, 5e9
    with pytest.raises(ValueError, match=r"not one image fits: 5.0 GB are needed, 4.0 GB are free"):
        estimate(recipe(), device=torch.device("cpu"))


def test_an_unknown_base_is_named(tmp_path: Path) -> None:
    settings = TrainSettings(output_dir=str(tmp_path), train_data="synthetic", backbone="someone/base")
    with pytest.raises(ValueError, match=r"backbone someone/base: its config.json is not here, .* facebook/dinov2-"):
        measure_steps(settings, 10, "cpu", 2)


def test_steps_are_measured(tmp_path: Path) -> None:
    """The operations are those of the matrices: forward, and backward to inputs and weights."""
    settings = TrainSettings(output_dir=str(tmp_path), train_data="synthetic", **{**TINY, "adaptation": "full"})
    found = measure_steps(settings, 10, "cpu", 3)
    tokens, width, blocks = 17, 64, 4
    linear = tokens * (4 * width**2 + 2 * width * 2 * width) * blocks + 16 * 3 * 14**2 * width  # multiplications
    attention = 2 * tokens**2 * width * blocks
    least = 2 * 3 * linear  # 2 operations each, forward and both gradients
    assert least * 0.7 < found.flops / 3 < 1.3 * (least + 6 * attention)
    eager = dataclasses.replace(settings, attention="eager")
    assert measure_steps(eager, 10, "cpu", 3).flops == found.flops  # fused attention counts as well
    assert found.batch == 3 and 0 < found.seconds < 60 and found.memory > 50e6


def test_steps_are_those_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    for name in ("build_trainer", "build_optimizer"):
        build = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, build=build: made.append(build(*given)) or made[-1])
    measure_steps(TrainSettings(output_dir=str(tmp_path), train_data="synthetic", **TINY), 10, "cpu", 2)
    trainer, optimizer = made
    assert trainer.training
    taken = {int(state["step"]) for state in optimizer.state.values()}
    assert taken == {1 + module.MEASURED_STEPS + 1}  # one that warms up and one that is counted


def test_published_speeds_are_units_times_clock() -> None:
    """Multiprocessors, their operations a cycle (float32, half precision with float32 sums), boost clocks in GHz."""
    chips = {
        "RTX 3060": (28, 256, 512, 1.777, 1.777),
        "RTX 4060": (24, 256, 512, 2.46, 2.46),
        "RTX 4070": (46, 256, 512, 2.475, 2.475),
        "T4": (40, 128, 1024, 1.59, 1.59),
        "V100": (80, 128, 1024, 1.53, 1.53),
        "A100": (108, 128, 2048, 1.41, 1.41),
        "H100": (132, 256, 4096, 1.98, 1.83),
    }
    for gpu in module.GPUS:
        count, float32, half, clock, clock_of_half = chips[gpu.name]
        assert gpu.float32 == pytest.approx(count * float32 * clock / 1000, rel=0.01), gpu.name
        assert gpu.half == pytest.approx(count * half * clock_of_half / 1000, rel=0.01), gpu.name


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    words = ["estimate", str(RECIPES / "quickstart.yaml"), "--output_dir", str(tmp_path / "run"), "--batch_size", "4"]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [step["batch"] for step in found["steps"]] == [2, 4] and found["data"]["images"] > 100
    assert list(tmp_path.iterdir()) == []
    done = CliRunner().invoke(app, [*words, "--learning_rat", "1"])
    assert done.exit_code == 1 and "learning_rate" in done.output
