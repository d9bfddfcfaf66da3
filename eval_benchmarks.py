"""Verification benchmarks of one or several embedders, side by side -> a table and `results.json`.

A trained model and the backbone it stands on, on a list of pairs (image_a, image_b, same) and on an insightface file:

    python eval_benchmarks.py --model runs/NAME/best --zero_shot facebook/dinov2-small \
        --benchmark dev_pairs.csv --benchmark lfw.bin --output_dir runs/NAME/results

A peer as an ONNX file:

    python eval_benchmarks.py --onnx peer.onnx --onnx_mean 0.5 0.5 0.5 --onnx_std 0.5 0.5 0.5 --benchmark lfw.bin

Protocol: features of image and mirror image are added, then L2-normalised; accuracy over ten contiguous folds, each at
the squared-distance threshold that is best on the other nine. Evaluation never skips an image, and stops where labels
look wrong.
`--model` runs the Python code of that model folder or Hub repository: name only ones you trust.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adaptface.data.benchmarks import load_pairs
from adaptface.data.pairs import PairSet
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
from adaptface.evaluation import SuspectLabelsError, evaluate_pairs
from adaptface.report import PARTIAL_RESULTS_FILE, RESULTS_FILE, printable_output, results_table, write_results

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
    data = parser.add_argument_group("benchmarks")
    data.add_argument(
        "--benchmark", action="append", required=True, type=Path, help=".csv, .txt or .bin; several allowed"
    )
    data.add_argument(
        "--images", type=Path,
        help="image folder of the .csv and .txt lists (default: the folder called like the list without _pairs, or "
        "the list's own)",
    )  # fmt: skip
    data.add_argument(
        "--allow_suspect_labels",
        action="store_true",
        help="warn instead of stopping where folds are unbalanced, labels contradict each other or AUC < 0.5",
    )
    parser.add_argument("--batch_size", type=_positive, default=64)
    parser.add_argument("--num_workers", type=_not_negative, default=0, help="processes that decode images")
    parser.add_argument(
        "--device", type=_device, default=default_device(), help="default: the accelerator, else the CPU"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("results"),
        help="gets results.json, in place of an earlier one (default: results)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if not options.model and not options.zero_shot and not options.onnx:
        parser.error("nothing to evaluate: give --model, --zero_shot or --onnx")
    for option, of in _OPTIONS_OF.items():
        if getattr(options, option) and not getattr(options, of):
            parser.error(f"--{option} without --{of}, which it is about: give --{of} or leave out --{option}")
    peers = len(options.onnx)
    for name, default in (("onnx_size", None), ("onnx_mean", IMAGENET_MEAN), ("onnx_std", IMAGENET_STD)):
        values = getattr(options, name) or [default]
        if len(values) not in (1, peers):
            parser.error(f"--{name} is given {len(values)} times for {peers} --onnx: give it once, or once for each")
        setattr(options, name, values * peers if len(values) == 1 else values)
    if options.output_dir.exists() and not options.output_dir.is_dir():
        parser.error(f"--output_dir {options.output_dir} is a file")
    return options


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


def embedder_loaders(options: argparse.Namespace) -> list[Callable[[], Embedder]]:
    """One function an embedder, so that only one model is in memory at a time; all are looked for here already."""
    inputs = zip(options.onnx, options.onnx_size, options.onnx_mean, options.onnx_std, strict=True)
    peers = [OnnxEmbedder(*given) for given in inputs]
    device, size, revision = options.device, options.zero_shot_size, options.zero_shot_revision
    for name in options.model:
        check_model(name, options.revision)
    for name in options.zero_shot:
        check_model(name, revision)
    loaders: list[Callable[[], Embedder]] = []
    loaders += [partial(ModelEmbedder.from_pretrained, name, options.revision, device) for name in options.model]
    loaders += [partial(BackboneEmbedder.from_pretrained, name, revision, size, device) for name in options.zero_shot]
    loaders += [partial(_opened, peer) for peer in peers]
    return loaders


def _opened(peer: OnnxEmbedder) -> Embedder:
    return peer


def load_benchmarks(options: argparse.Namespace) -> list[PairSet]:
    """All pair lists, checked before any model is loaded."""
    pair_sets = []
    for path in options.benchmark:
        pair_set = load_pairs(path, None if path.suffix.lower() == ".bin" else options.images)
        if not options.allow_suspect_labels and (suspect := pair_set.suspect_labels()):
            raise SuspectLabelsError(f"{path}: {'; '.join(suspect)}; check labels and order of the pairs")
        pair_sets.append(pair_set)
    return pair_sets


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    pair_sets = load_benchmarks(options)
    loaders = embedder_loaders(options)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    command = ["eval_benchmarks.py", *arguments]
    partial_file, file = options.output_dir / PARTIAL_RESULTS_FILE, options.output_dir / RESULTS_FILE
    if partial_file.exists():
        print(f"{partial_file} holds rows of a run that did not end; this run replaces it", file=sys.stderr)
    results: list[dict[str, Any]] = []
    try:
        for load in loaders:
            embedder = load()
            for pair_set in pair_sets:
                result = evaluate_pairs(
                    embedder,
                    pair_set,
                    options.batch_size,
                    options.num_workers,
                    strict=not options.allow_suspect_labels,
                )
                write_results(options.output_dir, [*results, result], command, PARTIAL_RESULTS_FILE)
                results.append(result)
            del embedder
        replaced = ", in place of an earlier one" if file.exists() else ""
        os.replace(partial_file, file)
    except BaseException as error:  # an interrupt too
        if results:
            error.add_note(f"finished rows of this run, {len(results)}, are kept in {partial_file}")
        if file.exists():
            error.add_note(f"{file} is the one of an earlier run, as it was")
        raise
    print(results_table(results))
    print(f"written to {file}{replaced}")
    return results


if __name__ == "__main__":
    printable_output()
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]))
