"""Conversion between formats: the same images of the same people, also after a break, or an error and no copy."""

import io
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from adaptface.cli import app
from adaptface.data import convert as module
from adaptface.data.base import FaceSource
from adaptface.data.convert import contents, convert
from adaptface.data.domains import label_faces, relabel
from adaptface.data.folder import FolderSource
from adaptface.data.records import RecordFile, RecordWriter
from adaptface.data.records import pack as our_pack
from adaptface.data.sources import open_source
from tests.record_files import MAGIC, pack, write_face_records, write_records


def picture(shade: int, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 24), (shade, 50, 255 - shade)).save(stream, kind)
    return stream.getvalue()


PEOPLE = {
    "ada": [picture(0), picture(9, "PNG")],
    "bob": [picture(80, "WEBP")],
    "cy 2": [picture(150, "BMP"), picture(7)],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, images in PEOPLE.items():
        (tmp_path / "faces" / name).mkdir(parents=True)
        for number, image in enumerate(images):
            (tmp_path / "faces" / name / f"{number}.jpg").write_bytes(image)
    return tmp_path / "faces"


def held(source: FaceSource) -> Counter:
    """Every image file with its identity's name and domain, in any order."""
    domains = [*source.domains, ""]  # -1 is unlabelled
    return Counter(
        (source.identities[source.labels[i]], domains[source.domain_labels[i]], source.encoded(i))
        for i in range(len(source))
    )


@pytest.mark.slow
def test_around_all_formats(folder: Path, tmp_path: Path) -> None:
    start = open_source(folder)
    found = convert(folder, tmp_path / "parquet", "parquet", progress=False)
    assert (found.images, found.identities) == (5, 3) and found.bytes == sum(len(i) for x in PEOPLE.values() for i in x)
    assert held(open_source(tmp_path / "parquet")) == held(start)
    convert(tmp_path / "parquet", tmp_path / "again", progress=False)
    assert held(open_source(tmp_path / "again")) == held(start)
    convert(tmp_path / "again", tmp_path / "rec" / "train.rec", progress=False)
    records = open_source(tmp_path / "rec")
    numbers = {"ada": "0", "bob": "1", "cy 2": "2"}
    assert held(records) == Counter((numbers[name], d, image) for name, d, image in held(start).elements())
    assert (tmp_path / "rec" / "property").read_text() == "3,24,20\n"
    convert(tmp_path / "rec", tmp_path / "back", progress=False)
    assert held(open_source(tmp_path / "back")) == held(records)
    names = sorted(p.relative_to(tmp_path / "back").as_posix() for p in (tmp_path / "back").rglob("*.*"))
    assert names == ["0/000000.jpg", "0/000001.png", "1/000000.webp", "2/000000.bmp", "2/000001.jpg"]
    assert not list(tmp_path.glob(".*")), "nothing hidden is left"


def test_records_are_what_insightface_writes(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "ours", "records", progress=False)
    write_face_records(tmp_path / "theirs", list(PEOPLE.values()))
    for name in ("train.rec", "train.idx"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize("payload", [b"", MAGIC, MAGIC * 3, b"abcd" + MAGIC + b"x", b"a" + MAGIC, b"abcd" + MAGIC])
def test_writer_cuts_payloads_as_specified(tmp_path: Path, payload: bytes) -> None:
    writer = RecordWriter(tmp_path / "ours.rec")
    writer.write(1, our_pack([3], 1, payload))
    writer.write(2, our_pack([3, 4], 2, payload))
    writer.close()
    write_records(tmp_path / "theirs.rec", {1: pack(3, 1, payload), 2: pack([3, 4], 2, payload)})
    for suffix in (".rec", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("lost", [0, 1, 7, 8, 30, 100, 130, 10_000])
@pytest.mark.parametrize("index_lost", [0, 3])
def test_writer_goes_on_after_a_cut(tmp_path: Path, lost: int, index_lost: int) -> None:
    payloads = {k: our_pack([k], k, bytes(range(k, k + 40)) + (MAGIC if k == 2 else b"")) for k in range(4)}
    whole = write_records(tmp_path / "whole.rec", payloads)
    path = tmp_path / "cut.rec"
    path.write_bytes(whole.read_bytes()[: max(0, whole.stat().st_size - lost)])
    index = whole.with_suffix(".idx").read_bytes()
    path.with_suffix(".idx").write_bytes(index[: len(index) - index_lost])
    writer = RecordWriter(path)
    kept = writer.count
    assert kept == 4 if lost == index_lost == 0 else kept < 4
    for key in range(kept, 4):
        writer.write(key, payloads[key])
    writer.close()
    for suffix in (".rec", ".idx"):
        assert path.with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()


def test_domains_travel(folder: Path, tmp_path: Path) -> None:
    (folder / "metadata.csv").write_text("file,domain\nada/0.jpg,pose\nbob/0.jpg,indoors\n")
    start = held(open_source(folder, domains=None))
    assert sorted(domain for _, domain, _ in start) == ["", "", "", "indoors", "pose"]
    convert(folder, tmp_path / "parquet", "parquet", progress=False)
    assert held(open_source(tmp_path / "parquet", domains=None)) == start
    convert(tmp_path / "parquet", tmp_path / "folder", progress=False)
    assert held(open_source(tmp_path / "folder", domains=None)) == start
    with pytest.raises(ValueError, match="names domains, which a record file cannot hold; convert to parquet"):
        convert(folder, tmp_path / "rec" / "x.rec", progress=False)


@pytest.mark.parametrize("kind", ["folder", "records", "parquet"])
def test_a_broken_off_conversion_goes_on(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_IMAGES", 2)
    read: list[int] = []
    encoded = FolderSource.encoded

    def counted(self: FolderSource, index: int) -> bytes:
        if len(read) == 3:
            raise OSError("no space left on device")
        read.append(index)
        return encoded(self, index)

    monkeypatch.setattr(FolderSource, "encoded", counted)
    with pytest.raises(OSError, match="no space left"):
        convert(folder, tmp_path / "copy", kind, progress=False)
    assert not (tmp_path / "copy").exists()
    written = {
        p: p.stat().st_mtime_ns for p in (tmp_path / ".copy.partial").rglob("*.*") if p.suffix in (".jpg", ".parquet")
    }
    monkeypatch.setattr(FolderSource, "encoded", encoded)
    convert(folder, tmp_path / "copy", kind, progress=False)
    for path, time in written.items():  # what was complete was not written again
        assert (tmp_path / "copy" / path.relative_to(tmp_path / ".copy.partial")).stat().st_mtime_ns == time
    assert written or kind == "records"
    assert contents(open_source(tmp_path / "copy"), by_number=True) == contents(open_source(folder), by_number=True)
    if kind == "records":
        write_face_records(tmp_path / "theirs", list(PEOPLE.values()))
        assert (tmp_path / "copy" / "train.rec").read_bytes() == (tmp_path / "theirs" / "train.rec").read_bytes()


def test_parquet_is_cut_by_bytes_and_held_a_row_group_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Image as ImageFeature
    from datasets import Value, load_dataset
    from pyarrow.parquet import ParquetFile

    for number in range(13):
        (folder / "cy 2" / f"{number}.jpg").write_bytes(picture(number) + bytes(10_000))
    monkeypatch.setattr(module, "GROUP_BYTES", 20_000)  # two images
    monkeypatch.setattr(module, "SHARD_BYTES", 60_000)  # three row groups
    convert(folder, tmp_path / "copy", "parquet", progress=False)
    files = [ParquetFile(file).metadata for file in sorted((tmp_path / "copy").glob("*"))]
    groups = [[file.row_group(i).num_rows for i in range(file.num_row_groups)] for file in files]
    assert groups == [[5, 2, 2], [2, 2, 2], [1]], "three small images go along"
    rows = load_dataset(str(tmp_path / "copy"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features == {"image": ImageFeature(), "identity": Value("string")} and rows[0]["image"].size == (20, 24)
    assert held(open_source(tmp_path / "copy")) == held(open_source(folder))


def test_another_conversion_that_was_broken_off_is_not_mixed_in(folder: Path, tmp_path: Path) -> None:
    stale = tmp_path / ".copy.partial" / "zoe"
    stale.mkdir(parents=True)
    (stale / "000000.jpg").write_bytes(picture(3))
    (tmp_path / ".copy.partial" / ".convert.json").write_text(json.dumps({"source": "elsewhere"}))
    convert(folder, tmp_path / "copy", progress=False)
    assert held(open_source(tmp_path / "copy")) == held(open_source(folder))


def test_a_folder_of_something_else_is_not_cleared_away(folder: Path, tmp_path: Path) -> None:
    """A conversion's own hidden folder holds its plan, or nothing yet, or a plan cut off while it was written."""
    partial = tmp_path / ".copy.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("years of work")
    with pytest.raises(
        FileExistsError, match=r"\.copy\.partial: is in the way, and of no conversion; move or remove it"
    ):
        convert(folder, tmp_path / "copy", progress=False)
    (partial / "thesis.tex").rename(tmp_path / "thesis.tex")
    convert(folder, tmp_path / "copy", progress=False)
    partial.mkdir()
    (partial / ".convert.json").write_text('{"sour')
    (partial / "zoe").mkdir()
    convert(folder, tmp_path / "copy" / ".." / "copy2", progress=False)
    partial.rename(tmp_path / ".copy3.partial")
    convert(folder, tmp_path / "copy3", progress=False)
    assert not (tmp_path / "copy3" / "zoe").exists()


def test_a_link_to_an_empty_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    convert(folder, tmp_path / "link", progress=False)
    assert (tmp_path / "link").is_symlink() and held(open_source(tmp_path / "real")) == held(open_source(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "link", "real"], "nothing hidden is left"


def test_what_a_rename_cannot_replace_is_refused_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(module, "open_source", lambda *_, **__: pytest.fail("nothing is read"))
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(FileExistsError, match=r"disk: is a mount point, which cannot be .* a new folder inside it"):
        convert(folder, tmp_path / "disk", progress=False)
    (tmp_path / "link.rec").symlink_to("elsewhere.rec")
    with pytest.raises(FileExistsError, match=r"link\.rec"):
        convert(folder, tmp_path / "link.rec", progress=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", tmp_path / "here"):
        with pytest.raises(FileExistsError, match="here: is the working folder, which cannot be replaced"):
            convert(folder, name, progress=False)


@pytest.mark.parametrize("destination", ["copy", "rec/train.rec"])
def test_a_copy_that_could_not_be_named_is_kept(
    destination: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rec").mkdir()

    def refuse(self: Path, target: Path) -> Path:
        raise OSError("device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(OSError, match="busy"):
            convert(folder, tmp_path / destination, progress=False)
    for writes in (RecordWriter, "write"), (Path, "write_bytes"):
        monkeypatch.setattr(*writes, lambda *_: pytest.fail("it is not written again"))
    convert(folder, tmp_path / destination, progress=False)
    assert len(open_source(tmp_path / destination)) == 5 and not list(tmp_path.rglob(".*"))


def test_a_record_file_beside_other_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    convert(folder, "faces.rec", progress=False)
    names = ["faces.idx", "faces.rec", "notes.txt", "property"]
    assert sorted(path.name for path in Path().iterdir()) == names
    assert contents(open_source("faces.rec"), by_number=True) == contents(open_source(folder), by_number=True)
    for other, taken in (("faces.rec", "faces.idx"), ("other.rec", "property")):
        with pytest.raises(FileExistsError, match=f"{taken}: exists; name another .rec file, or one in a new folder"):
            convert(folder, other, progress=False)
    assert sorted(path.name for path in Path().iterdir()) == names


def test_no_copy_inside_an_image_folder(folder: Path, tmp_path: Path) -> None:
    for name in ("copy", "ada/copy", "train.rec"):
        with pytest.raises(ValueError, match="lies in the source, which would then hold other faces"):
            convert(folder, folder / name, progress=False)
    assert sorted(path.name for path in folder.iterdir()) == sorted(PEOPLE)
    write_face_records(tmp_path / "rec", list(PEOPLE.values()))
    convert(tmp_path / "rec", tmp_path / "rec" / "folder", progress=False)  # a .rec file knows its own


@pytest.mark.parametrize("kind", ["folder", "records", "parquet"])
def test_a_copy_that_differs_does_not_get_its_name(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = FolderSource.encoded
    calls: list[int] = []

    def changing(self: FolderSource, index: int) -> bytes:
        calls.append(index)
        image = honest(self, index)
        return image[:-1] + b"\0" if len(calls) == 4 else image  # one image is written otherwise than it is read later

    monkeypatch.setattr(FolderSource, "encoded", changing)
    with pytest.raises(ValueError, match=r"the copy holds Contents.*delete it and convert again"):
        convert(folder, tmp_path / "copy", kind, progress=False)
    assert not (tmp_path / "copy").exists()


def test_refusals(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("notes")
    with pytest.raises(FileExistsError, match="taken: is not empty; name a new folder"):
        convert(folder, tmp_path / "taken", progress=False)
    with pytest.raises(ValueError, match="kind='lmdb': choose one of folder, records, parquet"):
        convert(folder, tmp_path / "copy", "lmdb", progress=False)
    for broken in (b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n"):
        (folder / "bob" / "0.jpg").write_bytes(broken)
        for kind in ("folder", "records", "parquet"):
            with pytest.raises(ValueError, match=r"bob.0\.jpg: is no image file; mend or remove it"):
                convert(folder, tmp_path / "copy", kind, progress=False)
    (folder / "bob" / "0.jpg").write_bytes(picture(80))
    convert(folder, tmp_path / "parquet", "parquet", progress=False)


def test_every_file_that_is_loaded_is_an_image_file(folder: Path, tmp_path: Path) -> None:
    """Also the rarer marks of the formats that the processor opens: training takes them, so conversion must."""
    flags = {
        "j2k": {"format": "JPEG2000", "no_jp2": True}, "bigtiff": {"format": "TIFF", "big_tiff": True},
        "gif": {"format": "GIF"}, "tiff": {"format": "TIFF"}, "jp2": {"format": "JPEG2000"},
    }  # fmt: skip
    files = []
    for options in flags.values():
        Image.open(io.BytesIO(picture(80))).save(stream := io.BytesIO(), **options)
        files.append(stream.getvalue())
    for number, (white, deepest) in enumerate([(b"0", b""), (b"1", b"1\n"), (b"1", b"1\n")], start=1):  # P1 to P3: text
        pixels = (white + b" ") * (16 * 16 * (3 if number == 3 else 1))
        files.append(b"P%d\n16 16\n%s" % (number, deepest) + pixels)
    files += [b"P4\n16 16\n" + b"\1" * 32, b"P5\n16 16\n255\n" + b"\1" * 256, b"P6\n16 16\n255\n" + b"\1" * 768]
    for number, content in enumerate(files):
        (folder / "bob" / f"x{number}.png").write_bytes(content)
    source = open_source(folder)
    assert [source.image(index).mode for index in range(len(source))] == ["RGB"] * (5 + len(files))
    convert(folder, tmp_path / "copy", progress=False)
    assert held(open_source(tmp_path / "copy")) == held(source)


def test_identities_that_cannot_name_a_folder(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    for name in ("../up", "a/b", "a\\b", "..", ".hidden", "x" * 300, "nul\0"):
        rows = {"image": [{"bytes": picture(1), "path": None}] * 2, "identity": [name, "other"]}
        path = tmp_path / "faces.parquet"
        Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "identity": Value("string")})).to_parquet(
            path
        )
        with pytest.raises(ValueError, match="cannot name a folder; convert to parquet instead"):
            convert(path, tmp_path / "copy", progress=False)
    assert not (tmp_path.parent / "up").exists()


def test_names_are_kept_as_they_are(folder: Path, tmp_path: Path) -> None:
    """Joiners, of which Persian names are full, and non-breaking blanks; no terminal is asked to show them."""
    names = [
        "Ana\xa0Mar",
        "\u0639\u0644\u06cc\u200c\u0631\u0636\u0627",
        "two\nlines",
        " blanks ",
        'what? "x": <*>|',
        "\xe9" * 120,
    ]
    for name in names:
        (folder / name).mkdir()
        (folder / name / "0.jpg").write_bytes(picture(40))
    (folder / "metadata.csv").write_text(f"file,domain\n{names[1]}/0.jpg,pose\n", encoding="utf-8")
    start = open_source(folder)
    assert sorted(start.identities) == sorted([*PEOPLE, *names])
    for kind, source in (("folder", folder), ("parquet", folder), ("folder", tmp_path / "parquet")):
        target = tmp_path / (kind if source == folder else "again")
        convert(source, target, kind, progress=False)
        assert held(open_source(target)) == held(start)
    for table in ("sidecar.csv", "sidecar.parquet"):
        label_faces(start, tmp_path / table)
        relabel(open_source(folder), tmp_path / table, None)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems hold no such name")
def test_names_that_are_not_utf8(folder: Path, tmp_path: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9")).mkdir()
    (folder / os.fsdecode(b"caf\xe9") / "0.jpg").write_bytes(picture(40))
    (folder / "metadata.csv").write_bytes(b"file,domain\ncaf\xe9/0.jpg,pose\n")
    start = open_source(folder)
    convert(folder, tmp_path / "copy", progress=False)
    assert held(open_source(tmp_path / "copy")) == held(start) and start.fingerprint()
    with pytest.raises(ValueError, match=r"the name 'caf\\udce9' is not UTF-8, as parquet needs it; rename it first"):
        convert(folder, tmp_path / "parquet", "parquet", progress=False)


def test_names_that_differ_by_case_only(tmp_path: Path) -> None:
    for number, name in enumerate(("Ana", "ana")):
        (tmp_path / f"{number}.jpg").write_bytes(picture(40 * number))
        with (tmp_path / "list.txt").open("a") as file:
            file.write(f"{number}.jpg {name}\n")
    with pytest.raises(
        ValueError, match="'Ana' and 'ana' differ by case only and would be one folder on other systems"
    ):
        convert(tmp_path / "list.txt", tmp_path / "copy", progress=False)


def test_command(folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["convert", str(folder), str(tmp_path / "a.rec" / "train.rec")])
    assert done.exit_code == 0 and "5 images, 3 identities" in done.stdout, done.output
    assert "Records hold no names: identities are numbers from 0, in the order" in done.stdout
    assert len(RecordFile(tmp_path / "a.rec" / "train.rec")) == 9
    done = runner.invoke(app, ["convert", str(folder), str(tmp_path / "b"), "--to", "parquet", "--json"])
    assert json.loads(done.stdout)["images"] == 5
    done = runner.invoke(app, ["convert", str(tmp_path / "b"), str(tmp_path / "d")])
    assert done.exit_code == 0 and "Records" not in done.stdout
    done = runner.invoke(app, ["convert", str(tmp_path / "nothing" / "here" / "x"), str(tmp_path / "c")])
    assert done.exit_code == 1 and "adaptface convert: " in done.stderr
    assert np.asarray(open_source(tmp_path / "b").image(0)).shape == (24, 20, 3)
