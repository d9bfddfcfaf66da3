"""One training step of DA-LoRA beside plain PEFT LoRA, the naive K-module way, a frozen head and full fine-tuning.

    python benchmarks/train_step.py --output train_step.json
    python benchmarks/train_step.py --device cuda --dtype bfloat16

All methods share geometry (dinov2-small, random weights), input, loss and optimiser (AdamW on what trains). Ratios are
to PEFT LoRA r=16 on q, k, v and o of the same run.

- time: forward, backward and optimiser step, in interleaved rounds of one process; the ratio of every round to the
  reference's of the same round, median and quartiles (whatever slows the machine for a while slows both).
- memory: peak of a process of its own for each method (CPU: largest resident set, libraries included; CUDA: allocator).
- kernels, bytes: operators that reach the dispatcher below autograd, views and allocations left out, and the sizes of
  the tensors they read and write; FLOPs by torch's counter. These three do not depend on the machine.

The bars: DA-LoRA within 0.95 of PEFT's time, 0.70 of its memory, 0.80 of its bytes and of its kernels, with gradients
equal to the naive formula's in float64.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path, installed or not

from adaptface.memory import peak_memory  # noqa: E402
from configuration_adaptface import AdaptFaceConfig  # noqa: E402
from modeling_adaptface import AdaptFaceModel, _attention_linears  # noqa: E402

BARS = {"seconds": 0.95, "memory": 0.70, "bytes": 0.80, "kernels": 0.80}
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
RANK, ALPHA, EMBEDDING = 16, 16.0, 512
REFERENCE, OURS = "PEFT LoRA r=16", "DA-LoRA K=3 r=16"


# --------------------------------------------------------------------------------------------------------- methods


class PlainLoRA(nn.Module):
    """PEFT's LoRA on q, k, v and o of a Dinov2, and the same projection as ours."""

    def __init__(self, geometry: dict[str, int]) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value", "attention.output.dense"]
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=targets)
        self.base = get_peft_model(
            Dinov2Model(
                Dinov2Config(**geometry),
            ),
            lora,
        )  # type: ignore[arg-type]
        self.projection = nn.Linear(geometry["hidden_size"], EMBEDDING)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(self.base(pixel_values=pixel_values).pooler_output)


class NaiveExperts(nn.Module):
    """A frozen Linear and K LoRA modules beside it, each computed in full and weighed per image."""

    def __init__(self, linear: nn.Linear, experts: int, mix: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.mix, self.scaling = linear, mix, ALPHA / RANK**0.5
        self.down = nn.ModuleList(nn.Linear(linear.in_features, RANK, bias=False) for _ in range(experts))
        self.up = nn.ModuleList(nn.Linear(RANK, linear.out_features, bias=False) for _ in range(experts))
        for up in self.up:
            nn.init.zeros_(up.weight)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        for k, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            y = y + self.scaling * self.mix["weights"][:, k, None, None] * up(down(x))
        return y


class NaiveModel(nn.Module):
    """DA-LoRA as one would write it first: K modules a Linear, the router on the mean patch embedding."""

    def __init__(self, geometry: dict[str, int], experts: int = 3) -> None:
        super().__init__()
        self.base = Dinov2Model(Dinov2Config(**geometry)).requires_grad_(False)
        self.mix: dict[str, torch.Tensor] = {}
        for block in self.base.encoder.layer:
            attention: Any = block.attention
            names = {module: name for name, module in attention.named_modules()}  # newer and older transformers differ
            for linear in _attention_linears(attention):
                attention.set_submodule(names[linear], NaiveExperts(linear, experts, self.mix))
        width = geometry["hidden_size"]
        self.router = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, experts))
        self.projection = nn.Linear(width, EMBEDDING)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            patches = self.base.embeddings.patch_embeddings(pixel_values).mean(1)  # (B, D)
        self.mix["weights"] = self.router(patches).softmax(-1)  # (B, K)
        return self.projection(self.base(pixel_values).pooler_output)


class Ours(nn.Module):
    """AdaptFaceModel, down to its features."""

    def __init__(self, geometry: dict[str, int], **config: Any) -> None:
        super().__init__()
        self.model = AdaptFaceModel(
            AdaptFaceConfig(backbone_config=dict(geometry), lora_rank=RANK, lora_alpha=ALPHA, **config)
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).features


METHODS: dict[str, Callable[[dict[str, int]], nn.Module]] = {
    REFERENCE: PlainLoRA,
    OURS: lambda geometry: Ours(geometry),
    "LoRA K=1 r=16 (ours)": lambda geometry: Ours(geometry, domains=["general"]),
    "naive, K modules": NaiveModel,
    "frozen head": lambda geometry: Ours(geometry, adaptation="frozen"),
    "full": lambda geometry: Ours(geometry, adaptation="full"),
}


class Step:
    """A method with its optimiser and input; calling it does one training step."""

    def __init__(self, method: str, geometry: dict[str, int], options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        dtype = getattr(torch, options.dtype)
        self.device = torch.device(options.device)
        self.model = METHODS[method](geometry).to(self.device).train()
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trainable = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05)
        self.pixels = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=self.device)
        self.target = F.normalize(torch.randn(options.batch_size, EMBEDDING, device=self.device))

    def __call__(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        with self.autocast:
            features = self.model(self.pixels)  # (B, E)
        loss = 1 - (F.normalize(features.float()) * self.target).sum(-1).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


# ------------------------------------------------------------------------------------------------------- measuring


class Traffic(TorchDispatchMode):
    """Counts what reaches the dispatcher below autograd, also inside custom autograd functions.

    A kernel is an operator that is neither a view nor a bare allocation; its bytes are those of the tensors it reads
    and writes. An operator that returns one of its inputs (in place) counts it as read and written.
    """

    ALLOCATIONS = (
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "detach",
        "alias",
        "lift_fresh",
    )

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in self.ALLOCATIONS:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.kernels += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in read + written)
        return result


def count(step: Step) -> dict[str, float]:
    """Kernels, bytes and FLOPs of one step."""
    step()  # optimiser state exists afterwards
    with Traffic() as traffic:
        step()
    with FlopCounterMode(display=False) as flops:
        step()
    return {"kernels": traffic.kernels, "bytes": traffic.bytes, "flops": flops.get_total_flops()}


def measure_memory(method: str, options: argparse.Namespace) -> int:
    """Bytes that building and two steps need at most, in a process of its own."""
    words = [sys.executable, __file__, "--only_memory", method]
    for name in ("batch_size", "image_size", "device", "dtype", "threads", "layers", "width"):
        words += [f"--{name}", str(getattr(options, name))]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def gradient_error() -> float:
    """Largest difference, relative to the largest entry, between our gradients and the naive formula's, in float64."""
    torch.manual_seed(0)
    batch, tokens, width, out, experts = 3, 5, 8, 12, 3
    from modeling_adaptface import DomainLoRA

    lora = DomainLoRA(width, out, experts, rank=4, scaling=2.0).double()
    nn.init.normal_(lora.lora_B)
    weight, bias = torch.randn(out, width).double(), torch.randn(out).double()
    x = torch.randn(batch, tokens, width).double().requires_grad_()
    mix = torch.rand(batch, experts).double().requires_grad_()
    inputs = [x, mix, lora.lora_A, lora.lora_B]
    grad = torch.randn(batch, tokens, out).double()
    ours = torch.autograd.grad(lora(x, weight, bias, mix), inputs, grad)
    naive = x @ weight.T + bias
    for k in range(experts):
        naive = naive + 2.0 * mix[:, k, None, None] * (x @ lora.lora_A[k].T @ lora.lora_B[k])
    expected = torch.autograd.grad(naive, inputs, grad)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, expected, strict=True))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of all methods."""
    geometry = {**SMALL, "num_hidden_layers": options.layers, "hidden_size": options.width}
    steps = {method: Step(method, geometry, options) for method in options.methods}
    results: dict[str, dict[str, Any]] = {
        method: {"trainable": step.trainable, **count(step)} for method, step in steps.items()
    }
    rounds: dict[str, list[float]] = {method: [] for method in steps}
    for _ in range(options.rounds):
        for method, step in steps.items():  # interleaved: whatever else the machine does hits all alike
            rounds[method].append(step())
    del steps
    reference = options.methods[0]
    for method, seconds in rounds.items():
        ratios = [mine / theirs for mine, theirs in zip(seconds, rounds[reference], strict=True)]
        results[method]["seconds"] = statistics.median(seconds)
        results[method]["ratios"] = {"seconds": statistics.median(ratios)}
        results[method]["ratio_quartiles"] = quartiles(ratios)
        results[method]["memory"] = measure_memory(method, options) if options.memory else None
    for result in results.values():
        for key in ("memory", "bytes", "kernels", "flops"):
            if result[key]:
                result["ratios"][key] = result[key] / results[reference][key]
    return {
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(), "device": options.device},
        "torch": torch.__version__,
        "setting": {key: value for key, value in vars(options).items() if key not in ("output", "only_memory")},
        "gradient_error": gradient_error(),
        "methods": results,
    }


def quartiles(values: list[float]) -> list[float]:
    """First and third quartile."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def table(content: dict[str, Any]) -> str:
    """Ratios to the reference, and whether the bars are met."""
    head = f"{'method':<22}{'trainable':>12}{'seconds':>9}{'time ratio (quartiles)':>24}"
    lines = [f"{head}{'memory':>8}{'bytes':>7}{'kernels':>9}{'FLOPs':>7}"]
    for method, result in content["methods"].items():
        ratios, (low, high) = result["ratios"], result["ratio_quartiles"]
        time = f"{ratios['seconds']:.3f} ({low:.3f}-{high:.3f})"
        memory = f"{ratios['memory']:.2f}" if "memory" in ratios else "-"
        lines.append(
            f"{method:<22}{result['trainable']:>12,}{result['seconds']:>9.2f}{time:>24}{memory:>8}"
            f"{ratios['bytes']:>7.2f}{ratios['kernels']:>9.2f}{ratios['flops']:>7.2f}"
        )
    if OURS in content["methods"] and next(iter(content["methods"])) == REFERENCE:  # what the ratios are to
        ratios = content["methods"][OURS]["ratios"]
        for key, bar in BARS.items():
            if key in ratios:
                verdict = "met" if ratios[key] <= bar else "NOT MET"
                lines.append(f"bar: {key} <= {bar:.2f} of {REFERENCE}: {ratios[key]:.3f}, {verdict}")
    lines.append(
        f"gradients against the naive formula, float64: largest relative difference {content['gradient_error']:.1e}"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="the first is the reference"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--layers", type=int, default=SMALL["num_hidden_layers"])
    parser.add_argument("--width", type=int, default=SMALL["hidden_size"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    parser.add_argument("--only_memory", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.only_memory:
        geometry = {**SMALL, "num_hidden_layers": options.layers, "hidden_size": options.width}
        step = Step(options.only_memory, geometry, options)
        for _ in range(2):
            step()
        print(peak_memory(step.device))
        return None
    content = measure(options)
    print(table(content))
    if options.output:
        options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


if __name__ == "__main__":
    main()
