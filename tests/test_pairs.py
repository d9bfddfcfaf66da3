"""Pair lists: CSV, TXT and insightface `.bin`, written by hand and by both generations of pickle writers."""

import io
import os
import pickle
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adaptface.data.benchmarks import load_pairs
from adaptface.data.pairs import benchmark_domain
from adaptface.data.pickled import _read_pickle


def encoded(number: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (24, 24), (number % 256, number // 256, 7)).save(stream, kind)
    return stream.getvalue()


def write_faces(folder: Path, count: int = 20) -> None:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:02}.png").write_bytes(encoded(number))


ROWS = [(f"{i % 20:02}.png", f"{(i + 1 + i // 20) % 20:02}.png", i % 2) for i in range(40)]


def write_csv(path: Path, header: str = "image_a,image_b,same", rows: list[str] | None = None) -> Path:
    rows = [f"{a},{b},{same}" for a, b, same in ROWS] if rows is None else rows
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------- CSV and TXT
def test_csv_and_txt_give_the_same_pairs_and_open_each_image_once(tmp_path: Path) -> None:
    write_faces(tmp_path / "dev")
    csv = load_pairs(write_csv(tmp_path / "dev_pairs.csv"))
    (tmp_path / "dev.txt").write_text("".join(f"{a}\t{b} {s}\r\n" for a, b, s in ROWS), encoding="utf-8", newline="")
    txt = load_pairs(tmp_path / "dev.txt")
    for pairs in (csv, txt):
        assert len(pairs) == 40 and len(pairs.images) == 20
        for i, (a, b, same) in enumerate(ROWS):
            assert Path(pairs.images.where(pairs.index_a[i])).name == a
            assert pairs.images[pairs.index_b[i]].getpixel((0, 0)) == (int(b[:2]), 0, 7)
            assert pairs.same[i] == bool(same)
        assert pairs.folds.tolist() == [i // 4 for i in range(40)]
        assert pairs.domain is None and not pairs.synthetic and not pairs.suspect_labels()
    assert csv.name == "dev_pairs" and csv.protocol == "ten equal contiguous folds"


def test_fold_and_domain_columns_in_any_order_and_an_image_folder_elsewhere(tmp_path: Path) -> None:
    write_faces(tmp_path / "elsewhere")
    rows = [f"pose,{same},{a},{b},{3 + i // 20}" for i, (a, b, same) in enumerate(ROWS)]
    path = write_csv(tmp_path / "x.csv", "domain,same,image_a,image_b,fold", rows)
    pairs = load_pairs(path, tmp_path / "elsewhere")
    assert pairs.domain is not None
    assert pairs.folds.tolist() == [3] * 20 + [4] * 20 and pairs.domain.tolist() == ["pose"] * 40
    assert pairs.protocol == "the list's own 2 folds"


def test_group_and_identity_columns(tmp_path: Path) -> None:
    write_faces(tmp_path / "dev")
    rows = [f"{a},{b},{same},{'FM'[i % 3 // 2]},p{int(a[:2])},p{int(a[:2]) + 1 - same}"
            for i, (a, b, same) in enumerate(ROWS)]  # fmt: skip
    rows[3] = rows[3].replace(",M,", ",,").replace(",F,", ",,")
    pairs = load_pairs(write_csv(tmp_path / "dev.csv", "image_a,image_b,same,group,identity_a,identity_b", rows))
    assert pairs.group is not None and pairs.identity is not None
    assert pairs.group.tolist() == ["" if i == 3 else "FM"[i % 3 // 2] for i in range(40)]
    assert pairs.identity.shape == (40, 2) and len(np.unique(pairs.identity)) == 20
    assert ((pairs.identity[:, 0] == pairs.identity[:, 1]) == pairs.same).all()
    assert pairs.suspect_labels() == [] and pairs.tag is None


def test_labels_against_identities_are_suspect_and_unbalanced_folds_then_are_not(tmp_path: Path) -> None:
    write_faces(tmp_path / "dev")
    header = "image_a,image_b,same,identity_a,identity_b"
    people = [(i % 20, i % 20 if i % 3 == 0 else (i + 1) % 20) for i in range(60)]
    others = [(a + 1 + i // 20) % 20 for i, (a, _) in enumerate(people)]
    rows = [f"{a:02}.png,{c:02}.png,{int(a == b)},p{a},p{b}" for (a, b), c in zip(people, others, strict=True)]
    pairs = load_pairs(write_csv(tmp_path / "dev.csv", header, rows))
    assert pairs.suspect_labels() == [] and pairs.notes()[0].startswith("unbalanced folds: fold 0 has 2 genuine of 6")
    mixed = rows.copy()
    mixed[7] = "07.png,08.png,0,p7,p7"
    mixed[9] = "09.png,10.png,1,p9,p10"
    (problem,) = load_pairs(write_csv(tmp_path / "dev.csv", header, mixed)).suspect_labels()
    assert problem.startswith("2 labels contradict the identities, the first is that of ")
    assert problem.endswith("07.png and " + str(tmp_path / "dev" / "08.png"))

    rows.sort(key=lambda row: row.split(",")[2])  # identities vouch for the labels, but these folds measure nothing
    (problem,) = load_pairs(write_csv(tmp_path / "dev.csv", header, rows)).suspect_labels()
    assert problem == "folds of one kind of pairs only: 0, 1, 2, 3, 4, 5, 7, 8, 9"


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("lfw", "general"), ("LFW", "general"), ("lfw_pairs", "general"), ("cfp_fp", "pose"), ("CFP-FP", "pose"),
        ("cplfw", "pose"), ("agedb_30", "age"), ("AgeDB-30", "age"), ("agedb30", "age"), ("agedb", "age"),
        ("faces:calfw", "age"),
        ("pairs_CALFW", "age"), ("cfp_ff", None), ("mylfw", None), ("agedb_5", None), ("pairs", None), ("", None),
    ],
)  # fmt: skip
def test_domain_of_a_benchmark_by_its_name(name: str, domain: str | None) -> None:
    assert benchmark_domain(name) == domain


BFW_HEADER = "fold,p1,p2,label,id1,id2,att1,att2,vgg16,resnet50,senet50,a1,a2,g1,g2,e1,e2"


def write_bfw(folder: Path) -> list[str]:
    """BFW's table in small: five folds, each two genuine and two impostor pairs, one of them across subgroups."""
    rows = []
    for fold in range(1, 6):
        for letter, att in (("F", "asian_females"), ("M", "white_males")):
            other = ("M", "white_males") if letter == "F" else (letter, att)
            for image in (f"{att}/n00000{fold}/0010_01.jpg", f"{att}/n00000{fold}/0043_02.jpg"):
                (folder / image).parent.mkdir(parents=True, exist_ok=True)
                (folder / image).write_bytes(encoded(fold, "JPEG"))
            mine, person = f"{att}/n00000{fold}", f"{letter}{fold}"
            theirs, stranger = f"{other[1]}/n00000{fold % 5 + 1}", f"{other[0]}{fold % 5 + 1}"
            tail = f"0.8,0.7,0.6,A{letter},X,{letter},{other[0]},A,A"
            rows.append(f"{fold},{mine}/0010_01.jpg,{mine}/0043_02.jpg,1,{person},{person},{att},{att},{tail}")
            rows.append(f"{fold},{mine}/0010_01.jpg,{theirs}/0043_02.jpg,0,{person},{stranger},{att},{other[1]},{tail}")
    return rows


def test_bfw_table_is_told_by_its_header(tmp_path: Path) -> None:
    rows = write_bfw(tmp_path / "bfw")
    pairs = load_pairs(write_csv(tmp_path / "bfw-v0.1.5-datatable.csv", BFW_HEADER, rows), tmp_path / "bfw")
    assert (
        len(pairs) == 20
        and len(pairs.images) == 20
        and pairs.folds.tolist() == [f for f in range(1, 6) for _ in "1234"]
    )
    assert pairs.group is not None and pairs.group.tolist() == ["asian_females", "", "white_males", "white_males"] * 5
    assert pairs.identity is not None and len(np.unique(pairs.identity)) == 10
    assert pairs.same.tolist() == [True, False] * 10 and pairs.suspect_labels() == []
    assert pairs.images.where(pairs.index_b[1]).endswith("white_males/n000002/0043_02.jpg")
    write_csv(tmp_path / "bfw.csv", BFW_HEADER, [rows[0], rows[1].replace(",0,F1,", ",2,F1,"), *rows[2:]])
    with pytest.raises(ValueError, match=r"bfw.csv: 1 malformed lines:\s+line 3: same is '2', not 1 or 0"):
        load_pairs(tmp_path / "bfw.csv", tmp_path / "bfw")


def test_byte_order_mark_quotes_blank_lines_and_other_spellings(tmp_path: Path) -> None:
    write_faces(tmp_path / "dev")
    rows = [f'"./{a}", {b},{"TRUE" if same else "False"}\n' for a, b, same in ROWS]
    path = write_csv(tmp_path / "dev.csv", "\ufeffimage_a,image_b,same", rows)
    assert len(load_pairs(path).images) == 20


def test_paths_written_on_windows(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    write_faces(tmp_path / "dev" / "a")
    rows = [f"a\\{a},.\\a\\{b},{same}" for a, b, same in ROWS]
    (tmp_path / "dev.txt").write_text("\n".join(row.replace(",", " ") for row in rows), encoding="utf-8")
    for path in (write_csv(tmp_path / "dev.csv", rows=rows), tmp_path / "dev.txt"):
        pairs = load_pairs(path)
        assert len(pairs.images) == 20, "both spellings of a name are one image"
        assert Path(pairs.images.where(pairs.index_b[3])) == tmp_path / "dev" / "a" / ROWS[3][1]


def test_default_image_folder_is_the_one_that_holds_the_first_image(tmp_path: Path) -> None:
    write_faces(tmp_path / "faces")
    path = write_csv(tmp_path / "faces_pairs.csv", rows=[f"faces/{a},faces/{b},{same}" for a, b, same in ROWS])
    assert Path(load_pairs(path).images.where(0)) == tmp_path / "faces" / "00.png", "relative to the list's own folder"
    assert Path(load_pairs(write_csv(path)).images.where(0)) == tmp_path / "faces" / "00.png", "to the one beside it"

    write_csv(path, rows=[f"no/{a},no/{b},{same}" for a, b, same in ROWS])
    with pytest.raises(FileNotFoundError, match="20 of 20 images are missing") as error:
        load_pairs(path)
    assert f"looked for in {tmp_path / 'faces'} and in {tmp_path})" in str(error.value)
    (tmp_path / "faces").rename(tmp_path / "no")
    assert Path(load_pairs(path).images.where(0)) == tmp_path / "no" / "00.png", "without a folder beside the list"
    assert len(load_pairs(write_csv(tmp_path / "no" / "_pairs.csv"))) == 40, "a list called only _pairs"


def test_synthetic_sets_say_so(tmp_path: Path) -> None:
    write_faces(tmp_path / "dev")
    path = write_csv(tmp_path / "dev.csv")
    (tmp_path / "synthetic.json").write_text("{}", encoding="utf-8")
    assert load_pairs(path).synthetic


def test_repeated_pairs_are_noted_and_contradictions_are_suspect(tmp_path: Path) -> None:
    write_faces(tmp_path / "dev")
    rows = [f"{a},{b},{same}" for a, b, same in ROWS]
    rows[2] = rows[0]
    rows[4] = ",".join(reversed(ROWS[1][:2])) + ",0"  # pair 1 is genuine
    rows[6] = "06.png,06.png,0"
    pairs = load_pairs(write_csv(tmp_path / "dev.csv", rows=rows))
    assert pairs.notes() == ["2 pairs repeat an earlier pair"]
    assert pairs.suspect_labels() == [
        "1 pairs are listed both as genuine and as impostor",
        "1 impostor pairs compare an image with itself",
    ]


def test_missing_images_are_all_counted_and_listed(tmp_path: Path) -> None:
    write_faces(tmp_path / "dev", 10)
    with pytest.raises(FileNotFoundError, match="10 of 20 images are missing") as error:
        load_pairs(write_csv(tmp_path / "dev.csv"))
    assert all(f"{number}.png" in str(error.value) for number in range(10, 20))
    rows = [f"no{i}.png,other{i}.png,{i % 2}" for i in range(20)]
    with pytest.raises(FileNotFoundError, match=r"40 of 40 .*\n(.*\n)+  and 20 more"):
        load_pairs(write_csv(tmp_path / "dev.csv", rows=rows))


def replace_row(number: int, row: str) -> list[str]:
    rows = [f"{a},{b},{same}" for a, b, same in ROWS]
    rows[number] = row
    return rows


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("image_a,image_b", None, "line 1 must name .*missing: same"),
        ("image_a,image_b,same", [], "holds no pairs"),
        ("image_a,image_b,same", replace_row(4, "00.png,01.png"), "1 malformed lines:\n  line 6: expected 3 fields"),
        ("image_a,image_b,same", replace_row(4, "00.png,01.png,1,2"), "line 6: expected 3 fields"),
        ("image_a,image_b,same", replace_row(0, "00.png,01.png,2"), "line 2: same is '2', not 1 or 0"),
        ("image_a,image_b,same", replace_row(0, ",01.png,1"), "line 2: an image name is empty"),
        ("image_a,image_b,fold,same", ["00.png,01.png,-1,1"], "line 2: fold is '-1', not a whole number"),
        ("image_a,image_b,domain,same", ["00.png,01.png,,1"], "line 2: domain is empty"),
        ("image_a,image_b,same,identity_a,identity_b", ["00.png,01.png,1,p,"], "line 2: identity_b is empty"),
        ("image_a,image_b,same,identity_a", ["00.png,01.png,1,p"], "line 2: identity_b is empty"),
        ("image_a,image_b,same,identity_b", ["00.png,01.png,1,p"], "line 2: identity_a is empty"),
        ("image_a,image_b,same", ["00.png,01.png,1"] * 12, "all 12 pairs are genuine pairs"),
        ("image_a,image_b,same", ["00.png,01.png,1", "02.png,01.png,0"], "2 pairs cannot be cut into 10 folds"),
        ("image_a,image_b,fold,same", ["00.png,01.png,1,1", "02.png,01.png,1,0"], "all pairs are in one fold"),
    ],
)
def test_malformed_csv_names_file_and_line(tmp_path: Path, header: str, rows: list[str] | None, message: str) -> None:
    write_faces(tmp_path / "dev")
    path = write_csv(tmp_path / "dev.csv", header, rows)
    with pytest.raises(ValueError, match=f"(?s){message}") as error:
        load_pairs(path)
    assert str(path) in str(error.value)


def test_malformed_txt_encoding_suffix_and_path(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("00.png 01.png 1\n\n00.png 01.png with space 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 3: 5 words instead of"):
        load_pairs(tmp_path / "a.txt")
    (tmp_path / "a.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"suffix '.json'; use .csv, .txt, .bin or .parquet"):
        load_pairs(tmp_path / "a.json")
    for name in ("none.csv", "none.bin", "none.parquet"):
        with pytest.raises(FileNotFoundError, match="no pair list at"):
            load_pairs(tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.txt: is not divided into splits, so it has no 'test'"):
        load_pairs(tmp_path / "a.txt", split="test")


def test_a_stray_quote_swallows_no_pair(tmp_path: Path) -> None:
    write_faces(tmp_path / "dev")
    rows = [f"{int(i < 10)},{i:02}.png,{(i + 1) % 20:02}.png,pose" for i in range(20)]
    header = "same,image_a,image_b,domain"
    assert len(load_pairs(write_csv(tmp_path / "dev.csv", header, rows))) == 20
    for first, last, message in (
        ('"pose', 'pose"', "line 6: a quote is open to line 10; close it"),
        ('"pose', "pose", "not a CSV file, after 4 pairs: unexpected end of data"),
        ('"po"se', "pose", "not a CSV file, after 4 pairs: ',' expected after '\"'"),
    ):
        broken = rows.copy()
        broken[4] = rows[4].replace("pose", first)
        broken[8] = rows[8].replace("pose", last)
        with pytest.raises(ValueError, match=message):
            load_pairs(write_csv(tmp_path / "dev.csv", header, broken))
    with pytest.raises(ValueError, match="line 1 names the column 'domain' twice"):
        load_pairs(write_csv(tmp_path / "dev.csv", "same,domain,image_b,domain", rows))


def test_missing_images_are_all_listed(tmp_path: Path) -> None:
    rows = [f"{i}a.png,{i}b.png,{i % 2}" for i in range(20)]
    with pytest.raises(FileNotFoundError, match="40 of 40 images are missing") as error:
        load_pairs(write_csv(tmp_path / "dev.csv", rows=rows))
    text = str(error.value)
    assert "and 20 more; all of them: " in text
    listed = Path(text.rpartition("all of them: ")[2])
    assert listed.read_text().split() == [str(tmp_path / f"{i}{side}.png") for i in range(20) for side in "ab"]
    listed.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux file systems take names of any bytes")
@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_names_that_are_no_utf8(tmp_path: Path, suffix: str) -> None:
    strange = os.fsencode(tmp_path) + b"/\xe9.png"
    for name in (strange, os.fsencode(tmp_path) + b"/b.png"):
        with open(name, "wb") as file:
            file.write(encoded(5))
    lines = [b"\xe9.png,b.png,%d" % (i % 2) for i in range(20)]
    content = b"\n".join([b"image_a,image_b,same", *lines])
    path = tmp_path / f"list{suffix}"
    path.write_bytes(content if suffix == ".csv" else b"\n".join(lines).replace(b",", b" "))
    pairs = load_pairs(path)
    assert len(pairs.images) == 2 and pairs.images[0].size and pairs.images.where(0).endswith("\\udce9.png")


def test_an_unreadable_image_is_named_when_it_is_opened(tmp_path: Path) -> None:
    write_faces(tmp_path / "dev")
    (tmp_path / "dev" / "05.png").write_bytes(encoded(5)[:40])
    pairs = load_pairs(write_csv(tmp_path / "dev.csv"))
    with pytest.raises(ValueError, match=r"05\.png"):
        pairs.images[5]


# --------------------------------------------------------------------------------------------------- insightface .bin
LABELS = [True, False] * 10
IMAGES = [encoded(number // 2 if number < 4 else number) for number in range(40)]  # pairs 0 and 1 hold one image twice


def python2_pickle(images: list[bytes], labels: list[bool]) -> bytes:
    """What Python 2's cPickle wrote at protocol 2: `str` items, memo from 1, opcodes spelled out."""
    out = [b"\x80\x02", b"]q\x01("]
    for number, image in enumerate(images):
        put = b"q" + bytes([number + 2]) if number + 2 < 256 else b"r" + struct.pack("<I", number + 2)
        short = len(image) < 256
        out.append((b"U" + bytes([len(image)]) if short else b"T" + struct.pack("<i", len(image))) + image + put)
    memo = struct.pack("<I", len(images) + 2)
    out += [b"e", b"]r" + memo + b"(", *(b"\x88" if label else b"\x89" for label in labels), b"e", b"\x86", b"."]
    return b"".join(out)


def python2_array_pickle(images: list[bytes], labels: list[bool]) -> bytes:
    """Items as uint8 arrays as numpy 1 on Python 2 wrote them, at protocol 2 without a memo."""
    out = [b"\x80\x02", b"]("]
    for image in images:
        out += [b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"K\x00\x85U\x01b\x87R"]
        out += [b"(K\x01K" + bytes([len(image)]) + b"\x85", b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"]
        out += [b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"]
        out += [b"\x89U" + bytes([len(image)]) + image + b"tb"]
    return b"".join([*out, b"e](", *(b"I01\n" if label else b"I00\n" for label in labels), b"e\x86."])


def python2_text_pickle(images: list[bytes], labels: list[bool], as_arrays: bool = False) -> bytes:
    """What Python 2 wrote at protocol 0: all is text, a `str` as its `repr`, whose quotes depend on what it holds."""
    out = [b"((lp1\n"]
    for number, image in enumerate(images):
        string = b"S" + repr(image)[1:].encode() + b"\n"
        if as_arrays:
            out += [b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I%d\nt" % len(image)]
            out += [b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\n", string, b"tba"]
        else:
            out += [string, b"p%d\na" % (number + 3)]
    return b"".join([*out, b"(lp2\n", *(b"I01\na" if label else b"I00\na" for label in labels), b"tp0\n."])


def old_numpy(content: bytes) -> bytes:
    """The same pickle as numpy 1 named its modules; protocols below 4 spell names without a length."""
    return content.replace(b"numpy._core", b"numpy.core")


ARRAYS = [np.frombuffer(image, np.uint8) for image in IMAGES]
WRITERS: dict[str, Callable[[], bytes]] = {
    "python2": lambda: python2_pickle(IMAGES, LABELS),
    "python2 text": lambda: python2_text_pickle(IMAGES, LABELS),
    "python2 text of arrays": lambda: python2_text_pickle(IMAGES, LABELS, as_arrays=True),
    "python2 arrays": lambda: python2_array_pickle(IMAGES, LABELS),
    **{f"bytes {p}": lambda p=p: pickle.dumps((IMAGES, LABELS), p) for p in range(6)},
    **{f"arrays {p}": lambda p=p: pickle.dumps((ARRAYS, LABELS), p) for p in range(6)},
    "writable arrays 5": lambda: pickle.dumps(([array.copy() for array in ARRAYS], LABELS), 5),
    "old numpy": lambda: old_numpy(pickle.dumps((ARRAYS, LABELS), 3)),
    "tuples of numbers": lambda: pickle.dumps((tuple(IMAGES), tuple(map(int, LABELS)))),
    **{
        f"labels {name} {p}": lambda labels=labels, p=p: pickle.dumps((IMAGES, labels), p)
        for p in (2, 4, 5)
        for name, labels in {
            "of numpy": [np.bool_(label) for label in LABELS],
            "of numpy, with others": [np.bool_(LABELS[0]), LABELS[1], *map(np.int64, LABELS[2:])],
            **{f"array {kind}": np.array(LABELS, kind) for kind in ("?", "i1", "u1", "<i4", "<i8", ">i8")},
        }.items()
    },
    "labels of old numpy": lambda: old_numpy(pickle.dumps((ARRAYS, [np.bool_(label) for label in LABELS]), 2)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_bin_of_every_writer(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "lfw.bin"
    path.write_bytes(WRITERS[writer]())
    pairs = load_pairs(path)
    assert pairs.name == "lfw" and pairs.same.tolist() == LABELS
    assert len(pairs.images) == 38, "equal images are stored and embedded once"
    for number in range(40):
        index = (pairs.index_a, pairs.index_b)[number % 2][number // 2]
        assert pairs.images[index].getpixel((0, 0)) == Image.open(io.BytesIO(IMAGES[number])).getpixel((0, 0))
    assert pairs.folds.tolist() == [i // 2 for i in range(20)]
    assert "lfw.bin, image 39 (pair 19)" in pairs.images.where(pairs.index_b[19])


@pytest.mark.parametrize(
    "image", [bytes(range(256)), b"it's", b'say "it\'s"', rb"\\x41\n", b"ends in \\", b"'", b"\r", "caf\u00e9".encode()]
)
def test_python2_text_is_read_as_pickle_reads_it(image: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lfw.bin"
    path.write_bytes(python2_text_pickle([image, b"other"] * 2, [True, False]))
    assert pickle.loads(path.read_bytes(), encoding="bytes") == ([image, b"other"] * 2, [True, False])
    assert _read_pickle(path) == ([image, b"other"] * 2, [True, False])


class Evil:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def hostile_files(tmp_path: Path) -> dict[str, tuple[bytes, str]]:
    whole = pickle.dumps((IMAGES, LABELS))
    pixels = np.zeros((4, 4, 3), np.uint8)
    text = "x" * 50_000
    shared = b"\x80\x04" + b"X" + struct.pack("<I", len(text)) + text.encode() + b"\x94"
    copies = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R" * 50
    laughs = b"\x80\x04)" + b"2\x86" * 3  # DUP is none of the format's opcodes
    arrays = {kind: np.array(LABELS, kind) for kind in ("?", "i2", "f8", "O")}
    scalar = pickle.dumps((IMAGES, [np.bool_(True)] * 20), 2)
    scalars = b"(" + b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02b1\x85RU\x01\x01\x86R0" * 3000 + b"Nt."
    return {
        "empty": (b"", "is empty"),
        "truncated": (whole[: len(whole) // 2], f"offset .* of {len(whole) // 2}"),
        "a web page": (b"<!DOCTYPE html>", "a web page was saved in its place"),
        "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        "code": (pickle.dumps(([Evil(os.mkdir, str(tmp_path / "owned"))], [True])), r"asks for '\w+.mkdir'"),
        "code, protocol 0": (f"cos\nmkdir\n(V{tmp_path / 'owned'}\ntR.".encode(), "offset 0 of .*asks for 'os.mkdir'"),
        "builtins": (pickle.dumps(([Evil(eval, "1")], [True])), "asks for 'builtins.eval'"),
        "object": (pickle.dumps(([Path("x")], [True])), "asks for 'pathlib"),
        "called data": (b"\x80\x02K\x01)R.", "calls something other"),
        "text bomb": (shared + copies + b".", "text turns into more bytes"),
        "memo bomb": (b"\x80\x02Nr\xff\xff\xff\x7f.", "is not a pickled pair"),
        "frame bomb": (b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f" + b"N.", "is not a pickled pair"),
        "size bomb": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"N.", "offset 2 of"),
        "duplication": (laughs + b".", "opcode DUP does not belong"),
        "huge array": (pickle.dumps(([Evil(np.zeros, 10**12)], [True])), "asks for"),
        "stack underflow": (b"\x80\x02\x86.", "malformed or truncated"),
        "unknown memo": (b"\x80\x02h\x05.", "malformed or truncated"),
        "no quotes": (b"(lS'abc\na.", "a string without its quotes"),
        "one quote": (b"(lS'\na.", "a string without its quotes"),
        "cut escape": (b"(lS'\\x4'\na.", "invalid .x escape"),
        "other": (pickle.dumps({"a": 1}), "opcode EMPTY_DICT does not belong"),
        "not a pair": (pickle.dumps([IMAGES]), "is not a pickled pair"),
        "not lists": (pickle.dumps((IMAGES, 3)), "must be lists, not a list and a int"),
        "counts": (pickle.dumps((IMAGES[:-1], LABELS)), "39 images for 20 labels"),
        "no pairs": (pickle.dumps(([], [])), "0 images for 0 labels"),
        "label": (pickle.dumps((IMAGES, [*LABELS[:-1], 2])), "label 19 is a int, not true or false"),
        "text label": (pickle.dumps((IMAGES, [*LABELS[:-1], "1"])), "label 19 is a str, not true or false"),
        "no image": (pickle.dumps(([*IMAGES[:-1], b""], LABELS)), "image 39 of pair 19 is empty"),
        "text image": (pickle.dumps(([*IMAGES[:-1], "x"], LABELS)), "image 39 of pair 19 is a str"),
        "decoded": (pickle.dumps(([pixels] * 40, LABELS), 4), "channel order is unknown"),
        "floats": (pickle.dumps(([np.zeros(3)] * 40, LABELS), 4), "calls something other than what arrays"),
        "bool images": (pickle.dumps(([arrays["?"]] * 40, LABELS), 2), "image 0 of pair 0 is an array of bool"),
        "number image": (pickle.dumps(([np.bool_(True)] * 40, LABELS), 2), "image 0 of pair 0 is a int"),
        "array label": (pickle.dumps((IMAGES, [arrays["?"]] * 20), 5), "label 0 is an array of bool, not true"),
        "label table": (pickle.dumps((IMAGES, arrays["?"][None]), 4), "an array of bool whose shape does not fit"),
        "label outside": (pickle.dumps((IMAGES, np.full(20, -1)), 4), "label 0 is a int, not true or false"),
        "bool of 2": (pickle.dumps((IMAGES, np.full(20, 2, "u1").view("?")), 4), "label 0 is a int, not true or false"),
        "scalar of 2": (scalar.replace(b"X\x01\x00\x00\x00\x01", b"X\x01\x00\x00\x00\x02"), "label 0 is a int"),
        "long scalar": (
            scalar.replace(b"X\x01\x00\x00\x00\x01", b"X\x02\x00\x00\x00\x01\x01"),
            "array of bool whose shape does not fit its 2 bytes",
        ),
        "label count": (pickle.dumps((IMAGES, arrays["?"][:-1]), 5), "40 images for 19 labels"),
        "no labels": (pickle.dumps(([], arrays["?"][:0]), 5), "0 images for 0 labels"),
        "unbuilt labels": (
            b"\x80\x02]cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R\x86.",
            "0 images for 0 labels",
        ),
        **{
            f"labels {kind} {p}": (pickle.dumps((IMAGES, arrays[kind]), p), "calls something other than what arrays")
            for kind in ("i2", "f8", "O")
            for p in (2, 4)
        },
        "float label": (pickle.dumps((IMAGES, [np.float64(1)] * 20), 4), "calls something other than what arrays"),
        "array length": (
            old_numpy(pickle.dumps((IMAGES, arrays["?"]), 2)).replace(b"K\x14\x85", b"K\x7f\x85"),
            "not fit",
        ),
        "scalar bomb": (b"\x80\x02" + scalars.replace(b"R0", b"R"), "is not a pickled pair"),
        "one class": (pickle.dumps((IMAGES, [True] * 20)), "all 20 pairs are genuine"),
    }


def test_hostile_and_broken_bin_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lfw.bin"
    for name, (content, message) in hostile_files(tmp_path).items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            load_pairs(path)
        assert str(path) in str(error.value), name
    assert not (tmp_path / "owned").exists()


def test_every_truncation_of_a_bin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lfw.bin"
    whole = python2_pickle(IMAGES[:20], LABELS[:10])
    for length in range(1, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"of {length}: "):
            load_pairs(path)


def test_bin_allocates_no_more_than_the_file(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "lfw.bin"
    bombs = {name: content for name, (content, _) in hostile_files(tmp_path).items() if "bomb" in name}
    for name, content in bombs.items():
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ValueError):
            load_pairs(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * len(content) + 500_000, name


def test_bin_hashes_an_image_once_however_often_it_is_named(tmp_path: Path) -> None:
    """Two bytes name what the memo holds once more: 10 GB to hash in a file of 1 MB."""
    path = tmp_path / "lfw.bin"
    size = struct.pack("<i", 1_000_000)
    image = b"T" + size + b"x" * 1_000_000 + b"q\x01"
    array = b"cnumpy.core.numeric\n_frombuffer\n(h\x01cnumpy\ndtype\nU\x02u1\x85RJ" + size + b"\x85U\x01CtR"
    for again, count in ((b"h\x01", 10_000), (array, 2_000)):  # the memo holds the first image
        labels = b"\x88\x89" * (count // 4)
        path.write_bytes(b"\x80\x02" + b"](" + image + again * (count - 1) + b"e](" + labels + b"e\x86.")
        start = time.perf_counter()
        pairs = load_pairs(path)
        assert time.perf_counter() - start < 1 and len(pairs.images) == 1 and len(pairs) == count // 2


def test_bin_takes_no_image_folder(tmp_path: Path) -> None:
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((IMAGES, LABELS)))
    with pytest.raises(ValueError, match="holds its images itself"):
        load_pairs(tmp_path / "lfw.bin", tmp_path)


def test_labels_out_of_order_are_suspect(tmp_path: Path) -> None:
    (tmp_path / "agedb.bin").write_bytes(pickle.dumps((IMAGES, sorted(LABELS))))
    assert "unbalanced folds: fold 0 has 0 genuine of 2" in load_pairs(tmp_path / "agedb.bin").suspect_labels()[0]
