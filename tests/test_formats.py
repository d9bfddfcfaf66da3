"""The formats of insightface on real faces, end to end: the same numbers as from folders and lists of files."""

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import eval_benchmarks
from tests.record_files import write_face_records
from tests.training import read_log, train


def write_bin(pairs: Path, folder: Path, path: Path) -> Path:
    """A list of pairs as insightface's `lfw2pack.py` packs it: `(bins, issame_list)`, pickled."""
    with pairs.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    bins = [(folder / row[key]).read_bytes() for row in rows for key in ("image_a", "image_b")]
    path.write_bytes(pickle.dumps((bins, [row["same"] == "1" for row in rows]), protocol=4))
    return path


@pytest.mark.slow
@pytest.mark.real_faces
def test_a_record_file_and_a_bin_give_the_numbers_of_folders(
    real_faces: Path, tiny_backbone_dir: Path, tmp_path: Path
) -> None:
    """Training and evaluation are run twice: one epoch of every training face, all development pairs."""
    people = sorted((real_faces / "faces_train").iterdir())
    identities = [[image.read_bytes() for image in sorted(person.iterdir())] for person in people]
    records = write_face_records(tmp_path / "records", identities)
    listed = real_faces / "faces_dev_pairs.csv"
    packed = write_bin(listed, real_faces / "faces_dev", tmp_path / "faces_dev_pairs.bin")

    rows: list[dict[str, Any]] = []
    logs = []
    for name, data, pairs in (("folder", real_faces / "faces_train", listed), ("records", records, packed)):
        run = train(
            tmp_path, tiny_backbone_dir, tmp_path / name, train_data=data, dev_pairs=pairs, dev_images="null",
            image_size=56, epochs=1, batch_size=64, eval_every_epochs=1, learning_rate=0.003,
        )  # fmt: skip
        words = ["--model", str(run / "best"), "--benchmark", str(pairs), "--no_cache", "--no_plots"]
        rows += eval_benchmarks.main([*words, "--device", "cpu", "--output_dir", str(run / "results")])
        logs.append(read_log(run))
    assert logs[0] == logs[1] and len(logs[0]) > 10, "the same losses at every step, and the same dev results"
    same = ("accuracy", "accuracy_std", "auc", "eer", "tar_at_far", "fold_accuracies", "fold_thresholds", "images")
    assert [{key: row[key] for key in same} for row in rows[:1]] == [
        {key: row[key] for key in same} for row in rows[1:]
    ]
    assert rows[0]["pairs"] == rows[1]["pairs"] == 3200 and rows[0]["embedding_size"] == 16
    digests = [row["embedder"]["weights_sha256"] for row in rows]
    assert digests[0] == digests[1], "the same weights, bit for bit"
    content = json.loads((tmp_path / "records" / "results" / "results.json").read_text(encoding="utf-8"))
    assert content["results"][0]["benchmark"] == "faces_dev_pairs"
