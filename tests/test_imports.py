"""Imports go one way, and importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {"configuration_adaptface", "modeling_adaptface", "image_processing_adaptface"}
SHIPPED_MAY_IMPORT = {"torch", "transformers", "safetensors", "numpy", "PIL"}
SCRIPTS = {"train_accelerate", "eval_benchmarks", "dev"}

# The layer of each module; it may import lower layers, and its own. What is not named here fails the test.
LAYERS = {
    0: SHIPPED,
    1: {"adaptface.losses", "adaptface.metrics", "adaptface.schedule", "adaptface.settings", "adaptface.cache",
        "adaptface.checkpoint", "adaptface.detection", "adaptface.files", "adaptface.gallery", "adaptface.memory",
        "adaptface.processes", "adaptface.tracking", "adaptface.report", "adaptface.plots", "adaptface.data"},
    2: {"adaptface.embedders", "adaptface.embedding", "adaptface.evaluation", "adaptface.templates",
        "adaptface.thresholds", "adaptface.training", "adaptface.card", "adaptface.clean_load", "adaptface.explain",
        "adaptface.explain_assets", "adaptface.explain_page", "adaptface.explain_plots"},
    3: {"adaptface.estimate", "adaptface.export", "adaptface.onnx_export", "adaptface.release", "adaptface.hub",
        "adaptface.runtime", "adaptface.faces", "adaptface.photo_folder", "adaptface"},
    4: {*SCRIPTS, "adaptface.cli"},
}  # fmt: skip
LEAVES = {"adaptface.losses", "adaptface.metrics", "adaptface.data"}


def modules() -> dict[str, Path]:
    files = [*ROOT.glob("*.py"), *(ROOT / "adaptface").rglob("*.py")]
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def imported(file: Path) -> set[str]:
    """Absolute names of all that a file imports, modules or not, wherever in it that stands."""
    found: set[str] = set()
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level and package else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
    found.discard("")
    return found


def layer(name: str) -> int | None:
    for number, names in LAYERS.items():
        if name in names or any(name.startswith(f"{n}.") for n in names - {"adaptface"}):
            return number
    return None


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_one_way(name: str) -> None:
    mine = layer(name)
    assert mine is not None, f"{name} has no place in LAYERS: give it one"
    for other in imported(modules()[name]):
        target = layer(other)
        assert target is None or target <= mine, f"{name} imports {other}, which stands above it"
        assert not (name in SCRIPTS and other in SCRIPTS), f"script {name} imports script {other}"
        is_leaf = any(name == leaf or name.startswith(f"{leaf}.") for leaf in LEAVES)
        assert not (is_leaf and other == "modeling_adaptface"), f"leaf {name} sees the model"


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_files_need_nothing_that_a_consumer_lacks(name: str) -> None:
    for other in imported(ROOT / f"{name}.py"):
        top = other.partition(".")[0]
        assert top in SHIPPED | SHIPPED_MAY_IMPORT | set(sys.stdlib_module_names), f"{name} imports {other}"


@pytest.mark.slow
def test_importing_does_nothing() -> None:
    skipped = {"adaptface.clean_load", "dev"}  # run by path, never imported
    names = sorted(set(modules()) - skipped)
    code = f"""
import importlib, os, sys
before = dict(os.environ)
for name in {names!r}:
    importlib.import_module(name)
import torch
assert not torch.distributed.is_initialized()
assert {{k: v for k, v in os.environ.items() if k.startswith(("MASTER", "RANK", "WORLD", "HF_"))}} == \
       {{k: v for k, v in before.items() if k.startswith(("MASTER", "RANK", "WORLD", "HF_"))}}
"""
    done = subprocess.run([sys.executable, "-c", code, "--not-an-option"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
