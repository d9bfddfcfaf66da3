"""Verification benchmarks of one or several embedders, side by side -> a table and `results.json`.

A trained model and the backbone it stands on, on a list of pairs (image_a, image_b, same) and on an insightface file:

    python eval_benchmarks.py --model runs/NAME/best --zero_shot facebook/dinov2-small \
        --benchmark dev_pairs.csv --benchmark lfw.bin --output_dir runs/NAME/results

A peer as an ONNX file:

    python eval_benchmarks.py --onnx peer.onnx --onnx_mean 0.5 0.5 0.5 --onnx_std 0.5 0.5 0.5 --benchmark lfw.bin

On several GPUs, with the same results: `accelerate launch --num_processes N eval_benchmarks.py ...`.

Protocol: features of image and mirror image are added, then L2-normalised; accuracy over ten contiguous folds, each at
the squared-distance threshold that is best on the other nine. Evaluation never skips an image, and stops where labels
look wrong.
`--model` runs the Python code of that model folder or Hub repository: name only ones you trust.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from adaptface.cache import default_cache_dir
from adaptface.data.benchmarks import load_benchmark
from adaptface.data.pairs import PairSet
from adaptface.data.templates import TemplateSet
from adaptface.embedders import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BackboneEmbedder,
    Embedder,
    ModelEmbedder,
    OnnxEmbedder,
    check_model,
    default_device,
)
from adaptface.embedding import StoredEmbeddings
from adaptface.evaluation import evaluate_pairs, refuse_suspect
from adaptface.plots import Scored, draw_plots, remove_plots
from adaptface.processes import start_processes
from adaptface.report import (
    PARTIAL_RESULTS_FILE,
    RESULTS_FILE,
    printable_output,
    results_table,
    write_results,
    write_tables,
)
from adaptface.templates import evaluate_templates
from adaptface.thresholds import decision_thresholds, write_thresholds

Evaluated = Embedder | StoredEmbeddings
Benchmark = PairSet | TemplateSet

_OPTIONS_OF = {  # what an option is about
    "revision": "model",
    "zero_shot_revision": "zero_shot",
    "zero_shot_size": "zero_shot",
    "onnx_size": "onnx",
    "onnx_mean": "onnx",
    "onnx_std": "onnx",
}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("what to evaluate (each may be given several times)")
    model.add_argument("--model", action="append", default=[], help="AdaptFace model: folder or Hub id")
    model.add_argument("--revision", help="Hub revision of --model")
    model.add_argument("--zero_shot", action="append", default=[], help="plain backbone (CLS token): folder or Hub id")
    model.add_argument("--zero_shot_revision", help="Hub revision of --zero_shot")
    model.add_argument("--zero_shot_size", type=_positive, help="its input side, px (default: its own, at most 224)")
    model.add_argument("--onnx", action="append", default=[], type=Path, help="peer as an ONNX file")
    model.add_argument(
        "--onnx_size", type=_positive, action="append",
        help="its input side, px (default: read from the file); like mean and deviation once for all peers, or once "
        "for each in their order",
    )  # fmt: skip
    model.add_argument(
        "--onnx_mean", type=float, nargs=3, action="append", help="its RGB mean, 0..1 scale (default: ImageNet's)"
    )
    model.add_argument(
        "--onnx_std", type=float, nargs=3, action="append", help="its RGB standard deviation, same scale"
    )
    model.add_argument(
        "--embeddings", action="append", default=[], type=Path, help="embeddings made elsewhere: .npz file"
    )
    data = parser.add_argument_group("benchmarks")
    data.add_argument(
        "--benchmark",
        action="append",
        required=True,
        help="a list (.csv, .txt), a .bin, a folder of CFP, RFW or IJB, a data set of pairs; several allowed",
    )
    data.add_argument(
        "--images", type=Path,
        help="image folder of benchmarks that do not hold their images (default: the folder called like the list "
        "without _pairs, or the list's own)",
    )  # fmt: skip
    data.add_argument(
        "--allow_suspect_labels",
        action="store_true",
        help="warn instead of stopping where folds are unbalanced, labels contradict each other or AUC < 0.5",
    )
    parser.add_argument("--batch_size", type=_positive, default=64)
    parser.add_argument("--num_workers", type=_not_negative, default=0, help="processes that decode images")
    parser.add_argument("--device", type=_device, help="default: the accelerator, else the CPU")
    parser.add_argument(
        "--cache_dir", type=Path, default=default_cache_dir(),
        help="embeddings are kept here by image content, and not computed again (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--no_cache", action="store_const", const=None, dest="cache_dir", help="keep and use none")
    parser.add_argument("--no_plots", action="store_false", dest="plots", help="draw nothing")
    parser.add_argument(
        "--write_thresholds", metavar="NAME",
        help="write the thresholds measured on this benchmark into config.json of the --model folders",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", type=Path, default=Path("results"),
        help="gets results.json, tables and plots, in place of earlier ones (default: results)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if not (options.model or options.zero_shot or options.onnx or options.embeddings):
        parser.error("nothing to evaluate: give --model, --zero_shot, --onnx or --embeddings")
    for option, of in _OPTIONS_OF.items():
        if getattr(options, option) and not getattr(options, of):
            parser.error(f"--{option} without --{of}, which it is about: give --{of} or leave out --{option}")
    peers = len(options.onnx)
    for name, default in (("onnx_size", None), ("onnx_mean", IMAGENET_MEAN), ("onnx_std", IMAGENET_STD)):
        values = getattr(options, name) or [default]
        if len(values) not in (1, peers):
            parser.error(f"--{name} is given {len(values)} times for {peers} --onnx: give it once, or once for each")
        setattr(options, name, values * peers if len(values) == 1 else values)
    if twice := _given_twice(options):
        parser.error(f"{twice} is given twice: leave one out")
    if options.write_thresholds and not options.model:
        parser.error("--write_thresholds without --model, whose config they belong into")
    for name in options.model if options.write_thresholds else ():
        if not Path(name).is_dir():
            parser.error(f"--write_thresholds needs model folders, and {name} is none: download it first")
    if options.output_dir.exists() and not options.output_dir.is_dir():
        parser.error(f"--output_dir {options.output_dir} is a file")
    return options


def _given_twice(options: argparse.Namespace) -> str | None:
    """What of the embedders and benchmarks is the same, options included, as another one."""
    peers = zip(options.onnx, options.onnx_size, options.onnx_mean, options.onnx_std, strict=True)
    given = [("onnx", str(path), size, *mean, *std) for path, size, mean, std in peers]
    given += [
        (of, str(name)) for of in ("model", "zero_shot", "embeddings", "benchmark") for name in getattr(options, of)
    ]
    seen = set()
    for of, name, *more in given:
        place = (of, Path(name).resolve() if Path(name).exists() else name, *more)
        if place in seen:
            return f"--{of} {name}"
        seen.add(place)
    return None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without it: AssertionError
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {str(error).splitlines()[0]}") from error
    return device


def embedder_loaders(options: argparse.Namespace, device: torch.device) -> list[Callable[[], Evaluated]]:
    """One function an embedder, so that only one model is in memory at a time; all are looked for here already."""
    inputs = zip(options.onnx, options.onnx_size, options.onnx_mean, options.onnx_std, strict=True)
    peers = [OnnxEmbedder(*given) for given in inputs]
    given: list[Evaluated] = [*peers, *(StoredEmbeddings(path) for path in options.embeddings)]
    size, revision = options.zero_shot_size, options.zero_shot_revision
    for name in options.model:
        check_model(name, options.revision)
    for name in options.zero_shot:
        check_model(name, revision)
    loaders: list[Callable[[], Evaluated]] = []
    loaders += [partial(ModelEmbedder.from_pretrained, name, options.revision, device) for name in options.model]
    loaders += [partial(BackboneEmbedder.from_pretrained, name, revision, size, device) for name in options.zero_shot]
    loaders += [partial(_opened, embedder) for embedder in given]
    return loaders


def _opened(given: Evaluated) -> Evaluated:
    return given


def load_benchmarks(options: argparse.Namespace) -> list[Benchmark]:
    """All benchmarks, checked before any model is loaded."""
    benchmarks = [load_benchmark(path, options.images) for path in options.benchmark]
    for path, benchmark in zip(options.benchmark, benchmarks, strict=True):
        if not options.allow_suspect_labels:
            refuse_suspect(path, benchmark.suspect_labels())
    names = [benchmark.name for benchmark in benchmarks if isinstance(benchmark, PairSet)]
    if options.write_thresholds and names.count(options.write_thresholds) != 1:
        raise ValueError(
            f"--write_thresholds {options.write_thresholds}: must name one of the pair lists, here {', '.join(names)}"
        )
    return benchmarks


def evaluate_all(
    loaders: Sequence[Callable[[], Evaluated]],
    benchmarks: Sequence[Benchmark],
    options: argparse.Namespace,
    processes: PartialState,
) -> Iterator[tuple[Evaluated, dict[str, Any], Scored]]:
    """The result of each embedder on each benchmark, and its scores of pairs; one embedder in memory at a time."""
    common: dict[str, Any] = {
        "strict": not options.allow_suspect_labels,
        "cache_dir": options.cache_dir,
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "processes": processes,
    }
    for load in loaders:
        embedder = load()
        for benchmark in benchmarks:
            if isinstance(benchmark, PairSet):
                found = evaluate_pairs(embedder, benchmark, **common)
            else:
                found = evaluate_templates(embedder, benchmark, **common)
            yield embedder, found.result, Scored(benchmark, found.similarities)
        del embedder


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    processes = start_processes("eval_benchmarks.py")
    device = options.device or (processes.device if processes.num_processes > 1 else default_device())
    benchmarks = load_benchmarks(options)
    loaders = embedder_loaders(options, device)
    runs = evaluate_all(loaders, benchmarks, options, processes)
    if not processes.is_main_process:
        return [result for _, result, _ in runs]

    options.output_dir.mkdir(parents=True, exist_ok=True)
    command = ["eval_benchmarks.py", *arguments]
    partial_file, file = options.output_dir / PARTIAL_RESULTS_FILE, options.output_dir / RESULTS_FILE
    if partial_file.exists():
        print(f"{partial_file} holds rows of a run that did not end; this run replaces it", file=sys.stderr)
    results: list[dict[str, Any]] = []
    scored: list[Scored] = []
    try:
        for embedder, result, scores in runs:
            write_results(options.output_dir, [*results, result], command, PARTIAL_RESULTS_FILE)
            results.append(result)
            scored.append(scores)
            benchmark = scores.benchmark
            if not isinstance(benchmark, PairSet) or benchmark.name != options.write_thresholds:
                continue
            if isinstance(embedder, ModelEmbedder):
                thresholds = decision_thresholds(result, benchmark, scores.similarities)
                write_thresholds(Path(embedder.name), thresholds)
        replaced = ", in place of an earlier one" if file.exists() else ""
        os.replace(partial_file, file)
    except BaseException as error:  # an interrupt too
        if results:
            error.add_note(f"finished rows of this run, {len(results)}, are kept in {partial_file}")
        if file.exists():
            error.add_note(f"{file} is the one of an earlier run, as it was")
        raise
    print(results_table(results))
    written = [file, *write_tables(options.output_dir, results)]
    remove_plots(options.output_dir)
    if options.plots:
        written += draw_plots(options.output_dir, scored, results)
    print(f"written to {file}{replaced}; beside it: {', '.join(path.name for path in written[1:])}")
    return results


if __name__ == "__main__":
    printable_output()
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]))
