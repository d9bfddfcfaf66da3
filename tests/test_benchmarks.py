"""The benchmark of the training step: its counters count, and the bars that no machine can shift are met."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compare_adaptations, train_step

SMALL = ["--image_size", "56", "--batch_size", "2", "--layers", "2", "--width", "384", "--rounds", "2", "--no-memory"]


def test_traffic_counts_kernels_and_bytes_also_inside_custom_functions() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = torch.ones(10, requires_grad=True)
    with train_step.Traffic() as traffic:
        y = Double.apply(x)  # 1 kernel: reads 40 bytes, writes 40
        y.view(2, 5)  # no kernel
        torch.empty(1000)  # no kernel
    assert (traffic.kernels, traffic.bytes) == (1, 80)
    with train_step.Traffic() as traffic:
        y.backward(torch.ones(10))  # the multiplication, and nothing else but bookkeeping
    assert traffic.kernels >= 2 and traffic.bytes >= 80  # ones, mul


def test_gradients_equal_the_naive_formula() -> None:
    assert train_step.gradient_error() < 1e-12


def test_runs_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = train_step.main([*SMALL, "--output", str(tmp_path / "out.json")])
    assert content is not None and json.loads((tmp_path / "out.json").read_text()) == content
    assert set(content["methods"]) == set(train_step.METHODS)
    printed = capsys.readouterr().out
    assert all(method in printed for method in train_step.METHODS) and "bar: kernels" in printed
    per_block = {train_step.OURS: 3 * 36_864, train_step.REFERENCE: 49_152}  # 442,368 and 589,824 on twelve blocks
    for method, parameters in per_block.items():
        router = 99_331 if method == train_step.OURS else 0
        assert content["methods"][method]["trainable"] == 2 * parameters + router + 197_120


@pytest.mark.parametrize("method", train_step.METHODS)
def test_every_method_trains_all_that_it_counts(method: str) -> None:
    """An adapter that the forward pass does not reach would be compared without its cost."""
    torch.manual_seed(0)
    geometry = {**train_step.SMALL, "num_hidden_layers": 2, "hidden_size": 96}
    model = train_step.METHODS[method](geometry).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or ".up." in name:
                parameter.normal_()  # else A has no gradient in the first step
    model(torch.randn(2, 3, 28, 28)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # Of a whole base, what images without masks and keys' biases (which softmax takes out) never move.
    assert [
        name for name in without if "mask_token" not in name and "key.bias" not in name and "k_proj.bias" not in name
    ] == []


@pytest.mark.slow
def test_bars_that_do_not_depend_on_the_machine() -> None:
    """Kernels and bytes on the full depth, at the benchmark's own batch (small ones weigh the weights more)."""
    words = ["--methods", train_step.REFERENCE, train_step.OURS, "--batch_size", "16", "--rounds", "1", "--no-memory",
             "--threads", str(torch.get_num_threads())]  # fmt: skip
    content = train_step.main(words)
    assert content is not None
    ratios = content["methods"][train_step.OURS]["ratios"]
    assert ratios["kernels"] <= 0.80 and ratios["bytes"] <= 0.80


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_the_process_alone() -> None:
    ballast = torch.ones(300 * 2**20, dtype=torch.uint8)  # what the parent holds must not count
    options = train_step.argparse.Namespace(
        batch_size=1, image_size=28, device="cpu", dtype="float32", threads=1, layers=1, width=384
    )
    small = train_step.measure_memory(train_step.OURS, options)
    options.batch_size, options.image_size = 8, 224
    assert small + 10 * 2**20 < train_step.measure_memory(train_step.OURS, options)
    assert len(ballast)


# ------------------------------------------------------------------------------------------ the comparison's planning


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[list[str]]]:
    """A recipe, and scripts that pretend: AUC depends on the learning rate as told, accuracy on the seed."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dev_pairs: pairs.csv\ndev_images: crops\nbackbone: base\n", encoding="utf-8")
    calls: list[list[str]] = []
    peaks = {"frozen": 1e-2, "lora": 1e-3, "full": 1e-4}

    def call(script: str, *arguments: str, threads: int, log: Path) -> None:
        words = list(arguments)
        calls.append([script, *words])
        value = {key: words[i + 1] for i, key in enumerate(words) if key.startswith("--")}
        if script == "train_accelerate.py":
            run = Path(value["--output_dir"])
            run.mkdir(parents=True, exist_ok=True)
            start = {"event": "start", "images_per_step": 10, "parameters": {"trainable": 7}}
            line = {"event": "train", "step": 60, "images_per_second": 10.0}
            (run / "log.jsonl").write_text(json.dumps(start) + "\n" + json.dumps(line) + "\n", encoding="utf-8")
            rate = abs(math.log10(float(value["--learning_rate"]) / peaks[value["--adaptation"]]))
            (run / "fake.json").write_text(json.dumps([0.9 - 0.1 * rate, 0.7 + 0.01 * int(value["--seed"])]))
            return
        auc, accuracy = 0.5, 0.5
        if "--model" in value:
            auc, accuracy = json.loads((Path(value["--model"]).parent / "fake.json").read_text())
        name = next(value[key] for key in ("--model", "--zero_shot", "--onnx") if key in value)
        row = {
            "embedder": {"kind": "fake", "name": f"/home/me/{name}"},
            "data": "unspecified",
            "protocol": {},
            "pairs": 10,
            "accuracy": accuracy,
            "accuracy_std": 0.0,
            "auc": auc,
            "eer": 0.5,
            "fold_accuracies": [],
        }
        content = {"results": [row], "date": "today", "versions": {}, "machine": {}}
        (Path(value["--output_dir"]) / "results.json").write_text(json.dumps(content), encoding="utf-8")

    monkeypatch.setattr(compare_adaptations, "call", call)
    return recipe, calls


def compare(recipe: Path, *words: str) -> dict:
    out = recipe.parent / "out"
    compare_adaptations.main([str(recipe), "--output_dir", str(out), "--epochs", "6", "--tune_epochs", "2", *words])
    return json.loads((out / "comparison.json").read_text(encoding="utf-8"))


def test_every_way_is_tuned_until_its_best_rate_lies_inside(stage: tuple[Path, list[list[str]]]) -> None:
    recipe, calls = stage
    done = compare(recipe, "--learning_rates", "1e-4", "1e-3", "--lora_alphas", "4", "--seeds", "0", "1", "2")
    rates = {way: done["chosen"][way]["learning_rate"] for way in done["chosen"]}
    assert rates == {"frozen head": 0.01, "LoRA": 0.001, "DA-LoRA": 0.001, "full": 0.0001}
    tried = {run["setting"]["learning_rate"] for run in done["runs"].values() if run["way"] == "frozen head"}
    assert tried == {1e-4, 1e-3, 1e-2, 1e-1}  # one beyond the best
    table = (recipe.parent / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "| full | 7 | learning_rate 0.0001 | 3 | 71.00 ± 1.00 | 0.9000 ± 0.0000 | 1.0 ± 0.0 |" in table
    assert "/home/me" not in json.dumps(done)
    trained = [words for words in calls if words[0] == "train_accelerate.py"]
    assert all(words[words.index("--dev_pairs") + 1] == "null" for words in trained)  # nothing is selected on the way
    evaluated = [words for words in calls if words[0] == "eval_benchmarks.py"]
    assert all(words[words.index("--images") + 1] == "crops" for words in evaluated)


def test_what_is_finished_is_kept_and_only_that_counts(stage: tuple[Path, list[list[str]]]) -> None:
    recipe, calls = stage
    words = ["--learning_rates", "1e-4", "1e-3", "--lora_alphas", "4", "16", "--ways", "LoRA", "--seeds", "0"]
    first = compare(recipe, *words)
    for leftover in (recipe.parent / "out").iterdir():  # another machine, which has the one file only
        if leftover.is_dir():
            leftover.rename(recipe.parent / leftover.name)
    calls.clear()
    assert compare(recipe, *words) == first and calls == []
    more = compare(recipe, *words, "--onnx", "peer.onnx")
    assert [call[1] for call in calls] == ["--onnx"] and set(more["references"]) == {"base", "peer.onnx"}
    # Runs of the tuning's length are no further seeds of the table.
    text = compare_adaptations.table(more, epochs=2)
    assert "lora_alpha 4 | 1 | 70.00 | 0.9000 | 1.0 |" in text
    with pytest.raises(ValueError, match="other settings: batch_size: 128 -> 16"):
        compare(recipe, *words, "--extra", "--batch_size", "16")


def test_training_minutes_leave_out_a_pause() -> None:
    log = [{"event": "start", "step": 0, "images_per_step": 60}]
    log += [{"event": "train", "step": step, "images_per_second": 10.0} for step in (20, 40, 60, 80)]
    log += [{"event": "resume", "step": 80}, {"event": "train", "step": 100, "images_per_second": 0.01}]
    assert compare_adaptations.training_minutes(log) == pytest.approx(100 * 60 / 10 / 60)
