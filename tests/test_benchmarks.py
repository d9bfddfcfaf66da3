"""The benchmark of the training step: its counters count, and the bars that no machine can shift are met."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import train_step

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


@pytest.mark.slow
def test_bars_that_do_not_depend_on_the_machine() -> None:
    """Kernels and bytes on the full depth (two images are enough: both grow with the batch alike)."""
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
