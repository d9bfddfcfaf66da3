"""Pairs in Hugging Face data sets: parquet, saved to disk, and how a Hub id finds its way."""

import io
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from adaptface.data import pair_tables
from adaptface.data.benchmarks import load_benchmark, load_pairs
from adaptface.data.pairs import PairSet


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (24, 24), (number, 0, 7)).save(stream, "PNG")
    return stream.getvalue()


def table(columns: dict[str, list[Any]] | None = None, names: tuple[str, str] = ("image_a", "image_b")) -> Any:
    """Forty pairs of twenty pictures, i with i + 1 or i + 2; `columns` replace or join the label."""
    sides = [[i % 20 for i in range(40)], [(i + 1 + i // 20) % 20 for i in range(40)]]
    content: dict[str, list[Any]] = {
        name: [{"bytes": encoded(number), "path": None} for number in side]
        for name, side in zip(names, sides, strict=True)
    }
    content |= {"same": [i % 2 for i in range(40)]} if columns is None else columns
    made = datasets.Dataset.from_dict(content)
    for name in names:
        made = made.cast_column(name, datasets.Image())
    return made


def check(pairs: Any) -> None:
    assert len(pairs) == 40 and len(pairs.images) == 20, "equal images are listed once"
    assert pairs.same.tolist() == [i % 2 == 1 for i in range(40)]
    for i in range(40):
        assert pairs.images[pairs.index_a[i]].getpixel((0, 0)) == (i % 20, 0, 7)
        assert pairs.images[pairs.index_b[i]].getpixel((0, 0)) == ((i + 1 + i // 20) % 20, 0, 7)
    assert pairs.images.encoded(3) == encoded(3)


def test_parquet_file_folder_and_saved_set(tmp_path: Path) -> None:
    table().to_parquet(tmp_path / "dev.parquet")
    (tmp_path / "folder").mkdir()
    table().to_parquet(tmp_path / "folder" / "validation.parquet")
    table().save_to_disk(tmp_path / "saved")
    for name in ("dev.parquet", "folder", "saved"):
        pairs = load_pairs(tmp_path / name)
        check(pairs)
        check(pickle.loads(pickle.dumps(pairs)))  # as spawned workers get it
        assert pairs.name == name.removesuffix(".parquet") and pairs.folds.tolist() == [i // 4 for i in range(40)]
        assert (pairs.domain, pairs.group, pairs.identity, pairs.synthetic) == (None, None, None, False)
        where = pairs.images.where(pairs.index_b[19])
        assert where == f"{tmp_path / name}, row 0, column 'image_a'"
        with pytest.raises(ValueError, match="holds its images itself; leave out the image folder"):
            load_pairs(tmp_path / name, tmp_path)
    (tmp_path / "synthetic.json").write_text("{}", encoding="utf-8")
    assert load_pairs(tmp_path / "dev.parquet").synthetic


def test_split_is_the_only_one_or_test_or_the_one_named(tmp_path: Path) -> None:
    other = table().select(range(20))
    (tmp_path / "folder").mkdir()
    for name, part in (("train", other), ("test", table())):
        part.to_parquet(tmp_path / "folder" / f"{name}.parquet")
    datasets.DatasetDict({"train": other, "test": table()}).save_to_disk(tmp_path / "saved")
    for name in ("folder", "saved"):
        check(load_pairs(tmp_path / name))
        assert len(load_pairs(tmp_path / name, split="train")) == 20
    datasets.DatasetDict({"train": other, "dev": table()}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other: has no split 'test', only train, dev"):
        load_pairs(tmp_path / "other")
    (tmp_path / "folder" / "test.parquet").rename(tmp_path / "folder" / "validation.parquet")
    with pytest.raises(ValueError, match=r'folder: Unknown split "test"'):
        load_pairs(tmp_path / "folder")


@pytest.mark.parametrize("names", [("img1", "img2"), ("left", "right")])
@pytest.mark.parametrize("label", ["same", "label", "issame"])
def test_names_of_columns(tmp_path: Path, names: tuple[str, str], label: str) -> None:
    labels = {"same": [bool(i % 2) for i in range(40)], "label": [str(i % 2) for i in range(40)]}
    made = table({label: labels.get(label, [i % 2 for i in range(40)])}, names)
    if label == "label":
        made = made.cast_column("label", datasets.ClassLabel(names=["0", "1"]))
    made.to_parquet(tmp_path / "dev.parquet")
    check(load_pairs(tmp_path / "dev.parquet"))


def test_optional_columns(tmp_path: Path) -> None:
    people = [f"p{i % 20}" for i in range(40)]
    columns = {
        "same": [i % 2 for i in range(40)],
        "fold": [3 + i // 20 for i in range(40)],
        "domain": [i % 3 for i in range(40)],
        "group": [None if i == 2 else "FM"[i % 2] for i in range(40)],
        "identity_a": people,
        "identity_b": [person if i % 2 else person + "x" for i, person in enumerate(people)],
    }
    made = table(columns).cast_column("domain", datasets.ClassLabel(names=["general", "pose", "age"]))
    made.to_parquet(tmp_path / "dev.parquet")
    pairs = load_pairs(tmp_path / "dev.parquet")
    check(pairs)
    assert pairs.folds.tolist() == columns["fold"] and pairs.protocol == "the list's own 2 folds"
    assert pairs.domain is not None and pairs.domain.tolist() == [("general", "pose", "age")[i % 3] for i in range(40)]
    assert pairs.group is not None and pairs.group.tolist() == [group or "" for group in columns["group"]]
    assert pairs.identity is not None and len(np.unique(pairs.identity)) == 30 and pairs.suspect_labels() == []


def test_images_as_files(tmp_path: Path) -> None:
    sides: dict[str, list[Any]] = {"image_a": [], "image_b": []}
    for i in range(40):
        for (name, paths), number in zip(sides.items(), (i % 20, (i + 1 + i // 20) % 20), strict=True):
            paths.append(str(tmp_path / f"{name}{i}.png"))
            Path(paths[-1]).write_bytes(encoded(number))
    datasets.Dataset.from_dict({**sides, "same": [i % 2 for i in range(40)]}).save_to_disk(tmp_path / "saved")
    check(load_pairs(tmp_path / "saved"))
    (tmp_path / "image_b7.png").unlink()
    with pytest.raises(ValueError, match=r"saved: 1 malformed cells:\s+row 7, column 'image_b': .*No such file"):
        load_pairs(tmp_path / "saved")


def replaced(row: int, value: Any, column: str = "image_b") -> Any:
    rows = table()[:]
    rows = {name: list(values) for name, values in rows.items()}
    rows[column][row] = value
    made = datasets.Dataset.from_dict(rows)
    return made.cast_column("image_a", datasets.Image()).cast_column("image_b", datasets.Image())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: replaced(5, None), r"1 malformed cells:\s+row 5, column 'image_b': the cell is empty"),
        (lambda: replaced(5, {"bytes": b"", "path": None}), r"row 5, column 'image_b': the cell is empty"),
        (lambda: replaced(9, None, "same"), r"row 9: same is '', not 1 or 0"),
        (lambda: replaced(9, 2, "same"), r"row 9: same is '2', not 1 or 0"),
        (lambda: table({"same": [1, 0] * 20, "fold": [-1] * 40}), r"40 malformed cells:\s+row 0: fold is '-1'"),
        (lambda: table({"same": [1, 0] * 20, "fold": [1] * 40}), r"all pairs are in one fold"),
        (lambda: table({"same": [1, 0] * 20, "domain": [""] * 40}), r"row 0: domain is empty"),
        (lambda: table({"same": [1, 0] * 20, "identity_a": ["p"] * 40}), r"row 0: identity_b is empty"),
        (lambda: table({"same": [1] * 40}), r"all 40 pairs are genuine pairs"),
        (lambda: table({"score": [1] * 40}), r"no column same, label, issame, only image_a, image_b, score"),
        (lambda: table().select(range(4)), r"4 pairs cannot be cut into 10 folds"),
        (lambda: table().remove_columns("image_b"), r"cannot tell which columns hold the images; expected image_a and"),
        (
            lambda: datasets.Dataset.from_dict({"image_a": [1] * 9, "image_b": [2] * 9, "same": [1] * 9}),
            r"columns image_a and image_b do not hold images: ",
        ),
    ],
)
def test_malformed_sets_name_row_and_column(tmp_path: Path, made: Any, message: str) -> None:
    made().save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=message) as error:
        load_pairs(tmp_path / "saved")
    assert str(tmp_path / "saved") in str(error.value)


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    table().select(range(0)).to_parquet(tmp_path / "dev.parquet")
    with pytest.raises(ValueError, match=r"dev.parquet: Instruction \"train\" corresponds to no data"):
        load_pairs(tmp_path / "dev.parquet")


def test_a_broken_image_is_named_when_it_is_opened(tmp_path: Path) -> None:
    replaced(5, {"bytes": encoded(3)[:40], "path": None}).save_to_disk(tmp_path / "saved")
    pairs = load_pairs(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved, row 5, column 'image_b'"):
        pairs.images[pairs.index_b[5]]


def test_memory_is_that_of_a_chunk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [{"bytes": rng.bytes(100_000), "path": None} for _ in range(400)]
    made = datasets.Dataset.from_dict({"image_a": pictures, "image_b": pictures[::-1], "same": [1, 0] * 200})
    for name in ("image_a", "image_b"):
        made = made.cast_column(name, datasets.Image())
    made.save_to_disk(tmp_path / "saved")
    del made, pictures
    tracemalloc.start()
    pairs = load_pairs(tmp_path / "saved")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(pairs.images) == 400 and peak < 15e6  # the set holds 80 MB


@pytest.mark.parametrize("path", ["hf://user/pairs", Path("hf://user/pairs"), "user/pairs", "hf://datasets/user/pairs"])
def test_hub_ids_arrive_whole(path: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def load(name: str, split: str | None, cache_dir: str | None) -> Any:
        asked.append((name, split))
        return table()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "test"])
    pairs = load_pairs(path)
    check(pairs)
    assert pairs.name == "pairs" and load_pairs(path, split="train").name == "pairs:train"
    assert asked == [("user/pairs", "test"), ("user/pairs", "train")]
    assert "user/pairs, row 0, column 'image_a'" in pairs.images.where(0)
    by_split = load_benchmark(f"{path}:cfp_fp")
    assert isinstance(by_split, PairSet) and by_split.name == "pairs:cfp_fp" and by_split.tag == "pose"
    assert asked[2] == ("user/pairs", "cfp_fp")


def test_what_is_no_hub_id_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*words: Any, **more: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(pair_tables, "load_dataset", fail)
    for path in ("lists/none.csv", "lists/lfw.bin", "none", "a/b/c", tmp_path / "a" / "b"):
        with pytest.raises(FileNotFoundError, match="no pair list at"):
            load_pairs(path)
    monkeypatch.undo()

    def missing(name: str) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist")

    monkeypatch.setattr(datasets, "get_dataset_split_names", missing)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"user/none: no such path here, and as a Hub dataset: Dataset 'user/"):
        load_pairs("user/none")
