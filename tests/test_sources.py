"""Sources: what is found, in which order, under which label, and what bad data is told."""

import os
import pickle
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from adaptface.data.benchmarks import load_pairs
from adaptface.data.sources import open_source
from adaptface.data.stream import open_stream
from adaptface.data.tables import DatasetsSource

DOMAINS = ("general", "pose", "age")


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` converts parquet into its cache: keep that out of the user's home, and the progress bars silent."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def colour(number: int) -> tuple[int, int, int]:
    return (number * 37 % 256, number * 101 % 256, number * 59 % 256)


def write_faces(root: Path, files: Mapping[str, int] | list[str]) -> Path:
    """PNG files whose colour tells which is which."""
    numbered = files if isinstance(files, Mapping) else {file: at for at, file in enumerate(files)}
    for file, number in numbered.items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), colour(number)).save(path, format="PNG")
    return root


def write_csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\r\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_faces(tmp_path / "faces", ["a/1.png", "a/2.png", "b/1.png"])


# --- image folder ---------------------------------------------------------------------------------------------


def test_folder_order_is_natural_and_images_match(tmp_path: Path) -> None:
    files = {"id_10/1.png": 5, "id_2/10.png": 3, "id_2/9.PNG": 2, "id_1/x/1.png": 0, "id_1/y.png": 1, "id_2/1.png": 4}
    source = open_source(write_faces(tmp_path / "faces", files))
    expected = ["id_1/x/1.png", "id_1/y.png", "id_2/1.png", "id_2/9.PNG", "id_2/10.png", "id_10/1.png"]
    assert source.identities == ["id_1", "id_2", "id_10"]
    assert [source.where(i) for i in range(len(source))] == [str(tmp_path / "faces" / file) for file in expected]
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert source.domain_labels.dtype == np.int64 and source.domain_labels.tolist() == [-1] * 6
    for at, file in enumerate(expected):
        image = source.image(at)
        assert image.mode == "RGB" and image.getpixel((0, 0)) == colour(files[file])


def test_order_does_not_depend_on_the_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = open_source(folder)
    scandir, listdir = os.scandir, os.listdir

    class Backwards(list[os.DirEntry[str]]):
        def __init__(self, path: os.PathLike[str]):
            super().__init__(sorted(scandir(path), key=lambda entry: entry.name, reverse=True))

        def __enter__(self) -> "Backwards":
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Backwards)
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    backwards = open_source(folder)
    assert [forwards.where(i) for i in range(3)] == [backwards.where(i) for i in range(3)]


def test_a_relative_path_survives_a_change_of_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    source = open_source("faces")
    monkeypatch.chdir("/")
    assert source.image(2).getpixel((0, 0)) == colour(2)


def test_splits_of_an_image_folder(tmp_path: Path) -> None:
    root = write_faces(
        tmp_path / "faces", ["train/a/1.png", "train/b/1.png", "validation/c/1.png", "validation/d/1.png"]
    )
    assert open_source(root).identities == ["a", "b"]
    assert open_source(root, split="validation").identities == ["c", "d"]
    with pytest.raises(ValueError, match="no split 'test', only train, validation"):
        open_source(root, split="test")


def test_a_folder_without_splits_is_training_data_only(folder: Path) -> None:
    with pytest.raises(ValueError, match="not divided into splits"):
        open_source(folder, split="validation")


def test_junk_is_silent_and_strangers_are_named(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    for name in (".DS_Store", "a/Thumbs.db", "b/notes.txt", "a/._1.png", "pairs.csv"):
        (folder / name).write_bytes(b"junk")
    assert len(open_source(folder)) == 3 and not recwarn.list
    (folder / "a" / "face.heic").write_bytes(b"?")
    (folder / "c").mkdir()
    with pytest.warns(UserWarning) as warned:
        assert open_source(folder).identities == ["a", "b"]
    messages = [str(warning.message) for warning in warned]
    assert any("1 files are no images" in message and "a/face.heic" in message for message in messages)
    assert any("1 identity folders hold no image" in message and "'c'" in message for message in messages)


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no image"):
        (tmp_path / "empty").mkdir()
        open_source(tmp_path / "empty")
    with pytest.raises(ValueError, match="all 2 images belong to one identity, 'a'"):
        open_source(write_faces(tmp_path / "one", ["a/1.png", "a/2.png"]))
    with pytest.raises(ValueError, match=r"loose.png: lies outside any identity folder"):
        open_source(write_faces(tmp_path / "loose", ["a/1.png", "b/1.png", "loose.png"]))
    with pytest.raises(FileNotFoundError, match="missing: no such path here"):
        open_source(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"1.png: is a file of an unknown kind"):
        open_source(tmp_path / "one" / "a" / "1.png")


def test_names_that_differ_by_case(tmp_path: Path) -> None:
    root = write_faces(tmp_path / "faces", ["Anna/1.png", "anna/2.png", "b/1.png"])
    if len(list(root.iterdir())) < 3:
        pytest.skip("this file system does not tell cases apart")
    with pytest.raises(ValueError, match="'Anna' and 'anna' differ by case only"):
        open_source(root)


def link(target: Path, path: Path) -> None:
    try:
        path.symlink_to(target, target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")


def test_folders_may_be_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_faces(tmp_path / "faces", ["a/1.png", "b/1.png"])
    monkeypatch.chdir(root / "b")
    depth = 1200  # deeper than Python's calls, so that pytest could not remove them
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    try:
        assert len(open_source(root)) == 2
    finally:
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("d")


@pytest.mark.parametrize("form", ["txt", "csv", "metadata", "parquet", "text parquet"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["3", "-1", "4"], "label -1 is no whole number from 0 on"),
        (["3", "4", str(2**64)], "label 18446744073709551616 is too large for a number of 64 bits"),
        (["3", "nan", "4"], "label nan is no whole number"),
        (["03", "4", "3"], "label 3 is the same number as 03; write it in one way"),
    ],
)
def test_labels_that_are_numbers_must_be_good_ones(tmp_path: Path, form: str, labels: list, message: str) -> None:
    if form == "parquet" and not labels[1].startswith("-"):
        return  # integers are of one form
    root = write_faces(tmp_path / "faces", [f"{at}.png" for at in range(3)])
    if form.endswith("parquet"):
        values = [int(label) for label in labels] if form == "parquet" else labels
        feature = datasets.Value("int64" if form == "parquet" else "string")
        path, place = embed(make_dataset(values, feature), tmp_path / "x.parquet"), "row [12]"
    elif form == "txt":
        path, place = root / "x.txt", "x.txt, line [23]"
        path.write_text("".join(f"{at}.png {label}\n" for at, label in enumerate(labels)))
    else:
        path, place = root / ("x.csv" if form == "csv" else "metadata.csv"), "csv, line [34]"
        path.write_text("".join(["file,identity\n", *(f"{at}.png,{label}\n" for at, label in enumerate(labels))]))
    with pytest.raises(ValueError, match=f"{place}.*{message}" if form != "parquet" else f"row [012].*{message}"):
        open_source(root if form == "metadata" else path)


def test_numbers_among_names_are_names(tmp_path: Path) -> None:
    root = write_faces(tmp_path / "faces", ["0.png", "1.png", "2.png"])
    (root / "x.txt").write_text("0.png 007\n1.png Nan\n2.png Ann\n")
    assert open_source(root / "x.txt").identities == ["007", "Ann", "Nan"]
    (root / "x.txt").write_text("0.png Ann\n1.png -1\n2.png Ann\n")
    with pytest.raises(ValueError, match=r"x\.txt, line 2: label -1 is no whole number"):
        open_source(root / "x.txt")
    (root / "x.txt").write_text(f"0.png {2**64 - 1}\n1.png 1\n2.png 1\n")
    assert open_source(root / "x.txt").identities == ["1", str(2**64 - 1)]


def test_a_field_may_hold_a_line_break(tmp_path: Path) -> None:
    root = write_faces(tmp_path / "faces", ["0.png", "1.png", "2.png"])
    (root / "x.csv").write_text('file,identity,note\n0.png,"A\nB","two\nlines, a comma"\n1.png,b,\n2.png,b,\n')
    assert len(open_source(root / "x.csv").identities) == 2
    (root / "x.csv").write_text('file,identity,note\n0.png,a,"one\n1.png,b,\n2.png,c,two"\n')
    with pytest.raises(ValueError, match=r"x\.csv, line 2: a quote is open to line 4"):
        open_source(root / "x.csv")


def test_links(tmp_path: Path) -> None:
    elsewhere = write_faces(tmp_path / "elsewhere", ["1.png"])
    root = write_faces(tmp_path / "faces", ["a/1.png"])
    link(elsewhere, root / "b")
    assert open_source(root).identities == ["a", "b"]
    link(root, root / "a" / "up")
    with pytest.raises(ValueError, match=r"up: a link to .*faces, whose images would count twice, or without end"):
        open_source(root)
    (root / "a" / "up").unlink()
    link(root / "b", root / "c")
    with pytest.raises(ValueError, match=r"c: a link to .*b, whose images would count twice"):
        open_source(root)
    (root / "c").unlink()
    link(root / "self", root / "self")
    with pytest.raises(ValueError, match="self: cannot be followed"):
        open_source(root)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux file systems take names of any bytes")
def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    root = write_faces(tmp_path / "faces", ["a/1.png"])
    strange = os.fsencode(root) + b"/\xe9t\xe9\n"
    os.mkdir(strange)
    shutil.copy(root / "a" / "1.png", os.path.join(strange, b"\xff.png"))
    source = open_source(root)
    assert source.identities == ["a", "\udce9t\udce9\n"] and source.fingerprint()
    assert source.where(1).isprintable() and source.where(1).encode("utf-8")
    assert source.image(1).size == (16, 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer, .*`git lfs pull`"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "a web page was saved in its place; download it again"),
    ],
)
def test_what_lies_in_place_of_a_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    for name in ("train.rec", "train.idx", "lfw.bin", "faces.parquet"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "data" / "data").mkdir(parents=True)
    (tmp_path / "data" / "data" / "train-0.parquet").write_bytes(content)
    for read, file, culprit in (
        (open_source, "train.rec", "train.rec"),
        (open_source, "faces.parquet", "faces.parquet"),
        (open_source, "data", "train-0.parquet"),
        (open_stream, "faces.parquet", "faces.parquet"),
        (load_pairs, "lfw.bin", "lfw.bin"),
        (load_pairs, "faces.parquet", "faces.parquet"),
    ):
        with pytest.raises(ValueError, match=f"{culprit}: {message}"):
            read(tmp_path / file)
    (tmp_path / "train.rec").write_bytes(b"\n#\xd7\xce" + bytes(4))
    with pytest.raises(ValueError, match=f"train.idx: {message}"):
        open_source(tmp_path / "train.rec")


def test_broken_images_are_named(folder: Path) -> None:
    source = open_source(folder)
    (folder / "a" / "1.png").write_bytes((folder / "a" / "1.png").read_bytes()[:50])
    (folder / "a" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"a.1\.png: damaged"):
        source.image(0)
    with pytest.raises(FileNotFoundError, match=r"a.2\.png"):
        source.image(1)


# --- metadata CSV ---------------------------------------------------------------------------------------------


def test_metadata_gives_identity_and_domain(folder: Path, tmp_path: Path) -> None:
    rows = ["file,yaw, Domain,identity ", "b/1.png,0.1,age,P10", r"a\2.png,,,P2", "./a/1.png,x,pose,P10"]
    source = open_source(folder, metadata=write_csv(tmp_path / "list.csv", *rows))
    assert source.identities == ["P2", "P10"]
    assert source.labels.tolist() == [1, 0, 1]  # a/1, a/2, b/1
    assert source.domain_labels.tolist() == [1, -1, 2]


def test_metadata_inside_the_folder_is_found(folder: Path, tmp_path: Path) -> None:
    write_csv(folder / "metadata.csv", "file_name,domain", "a/2.png,frontal")
    source = open_source(folder, domains=("frontal", "profile"))
    assert source.identities == ["a", "b"] and source.domains == ("frontal", "profile")
    assert source.domain_labels.tolist() == [-1, 0, -1]
    named = write_csv(tmp_path / "other.csv", "file,domain", "a/1.png,profile")
    assert open_source(folder, named, domains=("frontal", "profile")).domain_labels.tolist() == [1, -1, -1]


def test_without_a_router_the_data_name_their_own_domains(folder: Path, tmp_path: Path) -> None:
    write_csv(folder / "metadata.csv", "file,domain", "b/1.png,profile", "a/1.png, frontal", "a/2.png,")
    source = open_source(folder, domains=None)
    assert source.domains == ("profile", "frontal") and source.domain_labels.tolist() == [1, -1, 0]
    table = embed(make_dataset([0, 1, 2, 2], domain=[7, -1, 3, 7]), tmp_path / "numbers.parquet")
    source = open_source(table, domains=None)
    assert sorted(source.domains) == ["3", "7"] and [
        label if label < 0 else source.domains[label] for label in source.domain_labels
    ] == ["7", -1, "3", "7"]


@pytest.mark.parametrize("column", ["identity", "Label", "person"])
def test_identities_of_the_metadata_win_over_folders(folder: Path, column: str) -> None:
    write_csv(folder / "metadata.csv", f"file_name,{column},caption", "a/1.png,x,-", "a/2.png,y,-", "b/1.png,x,-")
    source = open_source(folder)
    assert source.identities == ["x", "y"] and source.labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["path,domain", "a/1.png,pose"], "line 1: no column 'file', only path, domain"),
        (["file,domain", "a/1.png,", "c/9.png,"], "line 3: 'c/9.png' is no image of"),
        (["file,domain", "../faces/a/1.png,"], "line 2: '../faces/a/1.png' is no image"),
        (["file,domain", "a/1.png,", "a/2.png,", "a/1.png,"], "line 4: 'a/1.png' was listed before, on line 2"),
        (["file,identty", "a/1.png,x"], "line 1: neither a column 'identity' nor 'domain', only file, identty"),
        (["file,domain", "a/1.png,pose", "a/2.png,poze"], "line 3: domain 'poze' is unknown.*general, pose, age"),
        (["file,domain", "a/1.png"], "line 2: expected 2 fields"),
        (["file,domain", "a/1.png,pose,x"], "line 2: expected 2 fields"),
        (["file,identity"], "has no row; list the images"),
        (["file,identity", "a/1.png, "], "line 2: 'a/1.png' has no identity"),
        (["file,identity", "a/1.png,x"], "a.2.png: not listed in the metadata, nor are 1 others"),
        (["file", "a/" + "x" * 200_000], "line 1: field larger than"),
    ],
)
def test_metadata_errors_name_file_and_line(folder: Path, tmp_path: Path, rows: list[str], message: str) -> None:
    table = write_csv(tmp_path / "list.csv", *rows)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(folder, metadata=table)
    assert str(table) in str(caught.value) or "not listed" in message


def test_missing_metadata(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv: no such file"):
        open_source(folder, metadata=folder / "nowhere.csv")


# --- Hugging Face datasets ------------------------------------------------------------------------------------


def make_dataset(labels: list, feature: object | None = None, column: str = "label", **more: list) -> datasets.Dataset:
    images = [Image.new("RGB", (16, 16), colour(at)) for at in range(len(labels))]
    features = {"picture": datasets.Image(), column: feature or datasets.Value("int64")}
    features.update({name: datasets.Value("string") for name in more})
    return datasets.Dataset.from_dict({"picture": images, column: labels, **more}, datasets.Features(features))


def embed(dataset: datasets.Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(path)
    return path


def test_parquet_file_and_folder(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["zoe", "unused", "amy"])
    dataset = make_dataset([2, 0, 2, 2], names, domain=["age", "", "pose", None])
    for path in (
        embed(dataset, tmp_path / "faces [1].parquet"),
        embed(dataset, tmp_path / "hub" / "data" / "train-00000-of-00001.parquet").parents[1],
        embed(dataset, tmp_path / "plain" / "faces.parquet").parent,
    ):
        source = open_source(path)
        assert source.identities == ["zoe", "amy"]  # the order of the codes; the hole is closed
        assert source.labels.tolist() == [1, 0, 1, 1]
        assert source.domain_labels.tolist() == [2, -1, 1, -1]
        assert [source.image(i).getpixel((0, 0)) for i in range(4)] == [colour(i) for i in range(4)]
        assert str(path) in source.where(2) and "row 2" in source.where(2)


def test_saved_datasets(tmp_path: Path) -> None:
    dataset = make_dataset([5, 3, 900, 5])
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, dev=dataset.select([1, 2])).save_to_disk(tmp_path / "two")
    for path in (tmp_path / "one", tmp_path / "two"):
        source = open_source(path)
        assert source.identities == ["3", "5", "900"] and source.labels.tolist() == [1, 0, 2, 1]
    dev = open_source(tmp_path / "two", split="dev")
    assert dev.identities == ["3", "900"] and dev.image(1).getpixel((0, 0)) == colour(2)
    with pytest.raises(ValueError, match="two: has no split 'test', only train, dev"):
        open_source(tmp_path / "two", split="test")
    dataset.select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="none: it was saved without any rows"):
        open_source(tmp_path / "none")


def test_imagefolder_with_jsonl_metadata(tmp_path: Path) -> None:
    root = write_faces(tmp_path / "faces", ["1.png", "2.png", "3.png"])
    rows = [f'{{"file_name": "{at}.png", "identity": "p{at % 2}"}}' for at in (1, 2, 3)]
    (root / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    source = open_source(root)
    assert source.identities == ["p0", "p1"]
    assert {source.image(i).getpixel((0, 0)): int(source.labels[i]) for i in range(3)} == {
        colour(0): 1, colour(1): 0, colour(2): 1,
    }  # fmt: skip


def test_encoded_images_without_feature_types(tmp_path: Path) -> None:
    """A parquet file as pandas or pyarrow write it: bytes and text, no Hugging Face types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = write_faces(tmp_path, ["1.png", "2.png"])
    encoded = [(root / name).read_bytes() for name in ("1.png", "2.png")]
    pq.write_table(pa.table({"img": encoded, "person": ["n10", "n9"], "domain": [1, 0]}), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert source.identities == ["n9", "n10"] and source.labels.tolist() == [1, 0]
    assert source.domain_labels.tolist() == [1, 0]
    assert source.image(1).getpixel((0, 0)) == colour(1)


def test_identity_column_is_preferred_to_a_class_label(tmp_path: Path) -> None:
    dataset = make_dataset([0, 1, 1], datasets.ClassLabel(names=["female", "male"]), "gender", identity=["x", "y", "z"])
    assert open_source(embed(dataset, tmp_path / "a.parquet")).identities == ["x", "y", "z"]
    dataset = make_dataset([0, 1, 1], datasets.ClassLabel(names=["ann", "bob"]), "celebrity", id=["1", "2", "3"])
    assert open_source(embed(dataset, tmp_path / "b.parquet")).identities == ["ann", "bob"]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (lambda: make_dataset([0, 0]), "all 2 images belong to one identity"),
        (lambda: make_dataset([0, None, 1]), "row 1: column 'label' names no identity"),
        (lambda: make_dataset([0, 1, -1], datasets.ClassLabel(names=["a", "b"])), "row 2: column 'label' names no"),
        (lambda: make_dataset(["a", "b", ""], datasets.Value("string")), "row 2: column 'label' names no identity"),
        (lambda: make_dataset([0.5, 1.5], datasets.Value("float32")), "'label' is of type float32; expected text"),
        (lambda: make_dataset([0, 1], column="speed"), "which column holds the identities.*found picture, speed"),
        (lambda: make_dataset([0, 1], domain=["age", "sex"]), "row 1: domain 'sex' is unknown"),
        (lambda: make_dataset([0, 1]).remove_columns("picture"), "which column holds the images.*found label"),
        (lambda: make_dataset([]), "corresponds to no data"),
    ],
)  # fmt: skip
def test_dataset_errors(tmp_path: Path, dataset, message: str) -> None:
    path = embed(dataset(), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message) as caught:
        open_source(path)
    assert str(path) in str(caught.value)


def test_an_empty_dataset() -> None:
    with pytest.raises(ValueError, match="nothing: holds no image"):
        DatasetsSource("nothing", make_dataset([]), DOMAINS)


def test_broken_dataset_images_are_named(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    lost = write_faces(tmp_path, ["lost.png"]) / "lost.png"
    rows = {"image": [{"bytes": b"no image", "path": None}, None, str(lost)], "label": [0, 1, 2]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "x.parquet")
    lost.unlink()
    source = open_source(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="row 0, column 'image': not a readable image"):
        source.image(0)
    with pytest.raises(ValueError, match=r"row 1, column 'image'.*empty"):
        source.image(1)
    with pytest.raises(FileNotFoundError, match="row 2, column 'image': no such file"):
        source.image(2)


def test_a_broken_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but nothing more")
    with pytest.raises(ValueError, match=r"x\.parquet: "):
        open_source(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("list.csv", ["File,label,domain", "b/1.png,7,pose", "./a/1.png,10,", "a\\2.png,7,age"]),
        ("list.csv", ["identity,file,domain", "7,b/1.png,pose", "10,a/1.png,", "7,a/2.png,age"]),
        ("list.txt", ["b/1.png 7", "a/1.png 10", "", "a/2.png\t7"]),
    ],
)
def test_lists_of_files_with_labels(folder: Path, name: str, lines: list[str]) -> None:
    source = open_source(write_csv(folder / name, *lines))
    assert source.identities == ["7", "10"] and source.labels.tolist() == [0, 1, 0]  # numbers as numbers
    assert source.domain_labels.tolist() == ([-1, -1, -1] if name == "list.txt" else [1, -1, 2])
    for index, file in enumerate(("b/1.png", "a/1.png", "a/2.png")):
        assert source.encoded(index) == (folder / file).read_bytes()
        assert source.where(index) == str(folder / file)
    assert source.image(0).mode == "RGB"


def test_lists_take_names_with_blanks_and_of_any_encoding(folder: Path) -> None:
    strange = os.fsdecode(b"caf\xe9 1.png")
    try:
        (folder / "a" / "1.png").rename(folder / "a" / strange)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (folder / "list.txt").write_bytes(b"a/caf\xe9 1.png anna maria\nb/1.png  bo\n".replace(b"anna maria", b"anna"))
    source = open_source(folder / "list.txt")
    assert source.identities == ["anna", "bo"] and source.image(0).size == source.image(1).size
    assert source.where(0).isprintable()


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("list.csv", ["path,identity", "a/1.png,x"], "line 1: no column 'file'"),
        ("list.csv", ["file,name", "a/1.png,x"], "line 1: no column 'identity', only file, name"),
        ("list.csv", ["file,identity", "a/1.png,x", "a/2.png"], "line 3: expected 2 fields"),
        ("list.csv", ["file,identity", "a/1.png,x", "a/2.png, "], "line 3: 'a/2.png' has no identity"),
        ("list.csv", ["file,identity", ",x"], "line 2: names no file"),
        ("list.csv", ["file,identity,domain", "a/1.png,x,poze"], "line 2: domain 'poze' is unknown"),
        ("list.csv", ["file,identity"], "holds no image"),
        ("list.txt", ["a/1.png 1", "a/2.png"], "line 2: expected `file label`, found 'a/2.png'"),
        ("list.txt", ["a/1.png 1", "a/1.png 2"], "line 2: 'a/1.png' was listed before, on line 1"),
        ("list.txt", ["a/1.png 1", "a/2.png 1"], "belong to one identity"),
        ("list.txt", [""], "holds no image"),
    ],
)
def test_malformed_lists_name_the_line(folder: Path, name: str, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_source(write_csv(folder / name, *lines))
    assert str(folder / name) in str(caught.value)


def test_all_files_that_a_list_lacks_are_counted(folder: Path) -> None:
    lost = [f"x/{number}.png {number}" for number in range(30)]
    with pytest.raises(FileNotFoundError, match=r"(?s)30 of 31 files are missing.*line 2: x/0\.png.*and 10 more"):
        open_source(write_csv(folder / "list.txt", "a/1.png 1", *lost))


def test_metadata_belongs_to_image_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metadata='m.csv': goes with an image folder only"):
        open_source(embed(make_dataset([0, 1]), tmp_path / "x.parquet"), metadata="m.csv")


@pytest.mark.parametrize("path", ["hf://user/faces", "hf://datasets/user/faces", "user/faces"])
def test_hub_ids_are_passed_on(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str, cache_dir: str | None) -> datasets.Dataset:
        asked.append((name, split))
        return make_dataset([3, 4])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert open_source(path, split="validation").identities == ["3", "4"]
    assert asked == [("user/faces", "validation")]
    with pytest.raises(FileNotFoundError, match="not of the form user/name"):
        open_source("./user/faces")


def test_the_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"^hf://user/faces: Couldn't reach .*; connect, or give a local copy"):
        open_source("hf://user/faces")
    with pytest.raises(ConnectionError, match=r"^user/faces: no such path here, and as a Hub dataset: Couldn't reach"):
        open_source("user/faces")


# --- workers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "parquet", "saved"])
def test_sources_travel_to_workers_small(kind: str, folder: Path, tmp_path: Path) -> None:
    if kind == "parquet":
        folder = embed(make_dataset([0, 0, 1]), tmp_path / "x.parquet")
    elif kind == "saved":
        folder = tmp_path / "saved"
        make_dataset([0, 0, 1]).save_to_disk(folder)
    source = open_source(folder)
    pickled = pickle.dumps(source)
    copy = pickle.loads(pickled)
    assert copy.identities == source.identities and (copy.labels == source.labels).all()
    assert copy.image(2).getpixel((0, 0)) == source.image(2).getpixel((0, 0)) == colour(2)
    assert len(pickled) < 8_000


def test_a_large_folder_stays_small_in_memory(tmp_path: Path) -> None:
    root = tmp_path / "faces"
    for identity in range(20):
        (root / f"{identity:06d}").mkdir(parents=True)
        for number in range(100):
            (root / f"{identity:06d}" / f"{number:03d}.jpg").touch()
    assert len(pickle.dumps(open_source(root))) / 2000 < 40  # bytes an image


@pytest.mark.real_faces
def test_real_faces(real_faces: Path) -> None:
    source = open_source(real_faces / "faces_train")
    listed = open_source(real_faces / "faces_train", metadata=real_faces / "faces_train.csv")
    assert len(source) == len(listed) and (source.labels == listed.labels).all()
    assert source.image(0).mode == "RGB"
