"""Seconds and peak memory of evaluating a set as large as IJB-C, but for reading images and embedding them.

    python benchmarks/evaluate_templates.py

Lists of IJB-C's size (469,375 images, 23,124 templates, 15,658,489 pairs, two galleries, 19,593 probes) are written to
a temporary folder and read by `load_ijb`; the features are random ones about a centre a subject. One thread, processor
time: other programs do not count.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by path, installed or not

from adaptface import templates  # noqa: E402
from adaptface.data.templates import load_ijb  # noqa: E402
from adaptface.embedding import Block  # noqa: E402
from adaptface.memory import peak_memory  # noqa: E402
from image_processing_adaptface import ARCFACE_TEMPLATE  # noqa: E402

IMAGES, PAIRS, GENUINE = 469_375, 15_658_489, 19_557
GALLERIES, PROBES = (1772, 1759), 19_593


class NoModel:
    """What `evaluate_templates` asks of an embedder whose features are made up."""

    name = "random features"

    def describe(self) -> dict[str, Any]:
        return {"kind": "stand-in", "name": self.name}


def write_lists(folder: Path, scale: float) -> tuple[np.ndarray, int]:
    """IJB-C's lists, at a share of its size, without images; the subject of each image, and how many there are."""
    rng = np.random.default_rng(0)
    galleries = [max(20, int(size * scale)) for size in GALLERIES]
    subjects, probes = sum(galleries), int(PROBES * scale)
    owner = np.concatenate([np.arange(subjects), rng.integers(0, subjects, probes)])  # (T,)
    template = np.concatenate([np.arange(len(owner)), rng.integers(0, len(owner), int(IMAGES * scale) - len(owner))])
    meta = folder / "meta"
    meta.mkdir()
    (folder / "loose_crop").mkdir()
    words = " ".join(f"{value:.3f}" for value in ARCFACE_TEMPLATE.ravel())
    with (meta / "ijbc_face_tid_mid.txt").open("w") as members, (meta / "ijbc_name_5pts_score.txt").open("w") as faces:
        media = rng.integers(0, 140_000, len(template))
        for number, (place, medium, score) in enumerate(zip(template, media, rng.random(len(template)), strict=True)):
            members.write(f"{number}.jpg {place} {medium}\n")
            faces.write(f"{number}.jpg {words} {score:.3f}\n")
    probe = rng.integers(subjects, len(owner), int(PAIRS * scale))
    enrolled = rng.integers(0, subjects, len(probe))
    genuine = int(GENUINE * scale)
    enrolled[:genuine] = owner[probe[:genuine]]
    with (meta / "ijbc_template_pair_label.txt").open("w") as pairs:
        pairs.writelines(
            f"{a} {b} {int(same)}\n" for a, b, same in zip(enrolled, probe, owner[probe] == enrolled, strict=True)
        )
    ends = np.cumsum([0, *galleries, probes])
    for name, start, end in zip(("gallery_G1", "gallery_G2", "probe_mixed"), ends[:-1], ends[1:], strict=True):
        lines = [f"{number},{owner[number]}\n" for number in range(start, end)]
        (meta / f"ijbc_1N_{name}.csv").write_text("TEMPLATE_ID,SUBJECT_ID\n" + "".join(lines))
    return owner[template], subjects


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of IJB-C's size")
    parser.add_argument("--embedding_size", type=int, default=512)
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    clock = time.process_time
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subject, subjects = write_lists(folder, options.scale)
        before = peak_memory(torch.device("cpu"))
        start = clock()
        files = [f"{number}.jpg" for number in range(len(subject))]
        with patch("os.listdir", return_value=files):  # there are no images
            template_set = load_ijb(folder)
        seconds = {"read": clock() - start}
        memory = {"before": before, "read": peak_memory(torch.device("cpu"))}

    rng = np.random.default_rng(1)
    centres = rng.standard_normal((subjects, options.embedding_size), dtype=np.float32)

    def blocks(embedder: Any, images: Any, batch_size: int = 64) -> Any:
        for first in range(0, len(images), batch_size):
            features = centres[subject[first : first + batch_size]]
            yield Block(first, features + 4 * rng.standard_normal(features.shape, dtype=np.float32), len(features))

    start = clock()
    with patch.object(templates, "feature_blocks", blocks):
        found = templates.template_features(NoModel(), template_set)  # type: ignore[arg-type]
    seconds["templates"] = clock() - start
    memory["templates"] = peak_memory(torch.device("cpu"))
    start = clock()
    with patch.object(templates, "template_features", return_value=found):
        result = templates.evaluate_templates(NoModel(), template_set).result  # type: ignore[arg-type]
    seconds["scores"] = clock() - start
    memory["all"] = peak_memory(torch.device("cpu"))
    measured = {
        "images": len(template_set.images),
        "templates": len(template_set.templates),
        "pairs": len(template_set.same),
        "seconds": seconds,
        "peak_memory": memory,
        "result": result,
    }
    print(f"{measured['images']:,} images, {measured['templates']:,} templates, {measured['pairs']:,} pairs")
    for part, meaning in (
        ("read", "reading the lists"),
        ("templates", "random features -> templates"),
        ("scores", "pairs, ROC, searches, checks of the labels"),
    ):
        print(f"{seconds[part]:7.1f} s  {meaning}")
    print("peak memory in MB: " + ", ".join(f"{part} {size / 1e6:,.0f}" for part, size in memory.items()))
    if options.output:
        options.output.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    return measured


if __name__ == "__main__":
    main()
