"""The rendered faces: deterministic, labelled as rendered, written whole, development identities apart."""

import csv
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adaptface.data.synthetic import OLD_AGE, POSE_YAW, Nuisance, draw_nuisance, render, write_synthetic

SMALL = {"num_identities": 3, "images_per_identity": 4, "dev_identities": 12, "pairs": 60, "size": 28, "seed": 1}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("synthetic") / "set", **SMALL)


def test_a_face_is_a_function_of_identity_and_nuisance() -> None:
    face = render(4, Nuisance(), size=56)
    assert face.shape == (56, 56, 3) and face.dtype == np.uint8
    assert np.array_equal(face, render(4, Nuisance(), size=56))
    for other in (render(5, Nuisance(), 56), render(4, Nuisance(yaw=40.0), 56), render(4, Nuisance(age=80.0), 56)):
        assert np.abs(face.astype(int) - other).mean() > 2


def test_turning_the_head_moves_the_face_to_that_side() -> None:
    """Left and right turns mirror each other more than they equal each other (faces are only nearly symmetric)."""
    plain = {"light_azimuth": 0.0, "light_strength": 0.0, "seed": 3}
    left, right = (render(8, Nuisance(yaw=yaw, **plain), 56).astype(int) for yaw in (-35.0, 35.0))
    middle = slice(14, 42)  # leaves most of the background out
    mirrored = np.abs(left[:, ::-1][middle, middle] - right[middle, middle]).mean()
    assert mirrored < 0.7 * np.abs(left[middle, middle] - right[middle, middle]).mean()


@pytest.mark.parametrize("domain", ["general", "pose", "age"])
def test_drawn_nuisance_belongs_to_its_domain(domain: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        drawn = draw_nuisance(rng, domain)
        by_rule = "pose" if abs(drawn.yaw) >= POSE_YAW else "age" if drawn.age >= OLD_AGE else "general"
        assert drawn.domain == by_rule == domain


def test_the_set_is_labelled_as_it_was_rendered(small_set: Path) -> None:
    for part, identities in (("train", 3), ("dev", 12)):
        table = rows(small_set / part / "metadata.csv")
        assert len({row["identity"] for row in table}) == identities
        assert {row["file"] for row in table} == {
            p.relative_to(small_set / part).as_posix() for p in (small_set / part).rglob("*.png")
        }
        for row in table:
            assert (row["domain"] == "pose") == (abs(float(row["yaw"])) >= POSE_YAW)
        with Image.open(small_set / part / table[0]["file"]) as image:
            assert image.size == (28, 28) and image.mode == "RGB"
    assert {name: json.loads((small_set / "synthetic.json").read_text())[name] for name in SMALL} == SMALL


def test_development_pairs_are_balanced_and_of_other_people(small_set: Path) -> None:
    pairs = rows(small_set / "dev_pairs.csv")
    domains = {row["file"]: row["domain"] for row in rows(small_set / "dev" / "metadata.csv")}
    folds = [int(pair["fold"]) for pair in pairs]
    assert len(pairs) == 60 and folds == sorted(folds) and set(folds) == set(range(10))
    for fold in range(10):
        same = [int(pair["same"]) for pair in pairs if int(pair["fold"]) == fold]
        assert sum(same) * 2 == len(same)
    for pair in pairs:
        a, b = pair["image_a"], pair["image_b"]
        assert a != b and a in domains and b in domains
        assert (a.split("/")[0] == b.split("/")[0]) == bool(int(pair["same"]))
    assert {pair["domain"] for pair in pairs} == {"general", "pose", "age"}
    faces = {p.read_bytes() for p in (small_set / "train").rglob("*.png")}
    assert not faces & {p.read_bytes() for p in (small_set / "dev").rglob("*.png")}


def test_the_same_parameters_give_the_same_bytes(small_set: Path, tmp_path: Path) -> None:
    assert contents(write_synthetic(tmp_path / "again", **SMALL)) == contents(small_set)
    other = contents(write_synthetic(tmp_path / "other", **{**SMALL, "seed": 2}))
    assert other["train/id_0000/000.png"] != contents(small_set)["train/id_0000/000.png"]


def test_a_set_is_kept_and_another_is_not_overwritten(small_set: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in small_set.rglob("*")}
    assert write_synthetic(small_set, **SMALL) == small_set
    assert {p: p.stat().st_mtime_ns for p in small_set.rglob("*")} == before
    with pytest.raises(FileExistsError, match="size=28 instead of 56"):
        write_synthetic(small_set, **{**SMALL, "size": 56})
    (tmp_path / "mine.txt").write_text("notes")
    with pytest.raises(FileExistsError, match="no synthetic set"):
        write_synthetic(tmp_path, **SMALL)


def test_a_set_is_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path / "set", **SMALL)
    (folder / "stale.txt").write_text("of the old set")
    other = {**SMALL, "seed": SMALL.get("seed", 0) + 1}
    assert contents(write_synthetic(folder, **other, overwrite=True)) == contents(
        write_synthetic(tmp_path / "fresh", **other)
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("notes")
    with pytest.raises(FileExistsError, match="no synthetic set"):
        write_synthetic(tmp_path / "mine", **SMALL, overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "notes"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_others_may_read_the_set(small_set: Path) -> None:
    assert small_set.stat().st_mode & 0o777 == (small_set / "train").stat().st_mode & 0o777  # the user's own umask


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("adaptface.data.synthetic._write_csv", fail)
    with pytest.raises(OSError, match="disk full"):
        write_synthetic(tmp_path / "set", **SMALL)
    assert not list(tmp_path.iterdir())


def test_nuisance_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Nuisance().yaw = 3.0  # type: ignore[misc]
