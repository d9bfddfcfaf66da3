"""RecordIO: what a writer made after the specification is read back, and every damage is named with its place."""

import io
import multiprocessing
import pickle
import struct
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adaptface.data.records import RecordFile, RecordSource, _read_index, find_record_file, unpack
from adaptface.data.sources import open_source
from tests.record_files import MAGIC, pack, write_face_records, write_records


def jpeg(shade: int, size: int = 24) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), (shade, 100, 255 - shade)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


FACES = [[jpeg(0), jpeg(10)], [jpeg(60)], [jpeg(120), jpeg(130), jpeg(140)]]
SHADES = [0, 10, 60, 120, 130, 140]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_face_records(tmp_path / "faces", FACES)


def shades(source: RecordSource) -> list[int]:
    return [np.asarray(source.image(i))[0, 0, 0].item() for i in range(len(source))]


def test_reads_what_insightface_writes(folder: Path) -> None:
    source = open_source(folder)
    assert source.labels.tolist() == [0, 0, 1, 2, 2, 2] and source.identities == ["0", "1", "2"]
    assert set(source.domain_labels.tolist()) == {-1}
    assert shades(source) == pytest.approx(SHADES, abs=3)
    assert (
        source.where(3) == f"{folder / 'train.rec'}, record 4 at byte {(folder / 'train.idx').read_text().split()[9]}"
    )
    assert open_source(folder / "train.rec").labels.tolist() == source.labels.tolist()


def test_bytes_are_those_of_the_writer(folder: Path) -> None:
    records = RecordFile(folder / "train.rec")
    assert records.keys.tolist() == list(range(10))
    assert [unpack(records[i])[1] for i in range(1, 7)] == [image for faces in FACES for image in faces]
    assert unpack(records[0])[0].labels == (7.0, 10.0) and unpack(records[9])[0].labels == (4.0, 7.0)
    header, _ = unpack(records[4])
    assert header.labels == (2.0,) and (header.id, header.id2) == (4, 0)


def test_without_a_header_record_every_record_is_an_image(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.rec", {0: pack(5, 0, jpeg(0)), 7: pack(2, 7, jpeg(90)), 3: pack(5, 3, jpeg(40))})
    source = open_source(path)
    assert source.identities == ["2", "5"] and source.labels.tolist() == [1, 1, 0]  # holes close, keys ascend
    assert shades(source) == pytest.approx([0, 40, 90], abs=3)


def test_the_first_of_several_labels_is_the_identity(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.rec", {1: pack([3, 0.5, 9], 1, jpeg(0)), 2: pack([4, 0.1, 9], 2, jpeg(90))})
    source = open_source(path)
    assert source.identities == ["3", "4"] and shades(source) == pytest.approx([0, 90], abs=3)


@pytest.mark.parametrize("at", [0, 4, 24, 28, 40])
def test_a_payload_that_holds_the_magic_number_is_put_together_again(tmp_path: Path, at: int) -> None:
    """It is cut wherever the number stands at a multiple of four: also in the header, twice in a row, at the end."""
    plain = bytearray(pack(1, 1, bytes(range(40))))
    plain[at : at + 4] = MAGIC
    payloads = {
        1: bytes(plain),
        2: bytes(plain) + MAGIC,
        3: bytes(plain[:at]) + MAGIC * 3 + b"xyz",
        4: pack(2, 4, b"ab"),
    }
    records = RecordFile(write_records(tmp_path / "a.rec", payloads))
    assert [records[i] for i in range(4)] == list(payloads.values())
    assert (tmp_path / "a.rec").read_bytes().count(MAGIC) > 4  # frames, and none of the payloads' own
    flags, labels, images = records.headers() if at >= 8 else (None, None, None)
    if flags is not None:
        assert labels.tolist() == [1, 1, 1, 2] and flags.tolist() == [0] * 4
        assert images.tolist() == [40, 44, max(0, at + 15 - 24), 2]


def test_magic_number_off_the_grid_is_left_alone(tmp_path: Path) -> None:
    payload = pack(1, 1, b"a" + MAGIC + b"bcd")
    path = write_records(tmp_path / "a.rec", {1: payload})
    assert RecordFile(path)[0] == payload and path.stat().st_size == 8 + 32


def read_all(source: RecordSource) -> list[bytes]:
    return [source._encoded(i) for i in range(len(source))]


@pytest.mark.slow
def test_threads_and_processes_share_a_source(folder: Path) -> None:
    source = open_source(folder)
    expected = read_all(source)
    assert len(pickle.dumps(source)) < 5_000  # indices, not the file
    with ThreadPoolExecutor(8) as threads:
        assert all(found == expected for found in threads.map(read_all, [source] * 40))
    for method in ("spawn", "fork") if "fork" in multiprocessing.get_all_start_methods() else ("spawn",):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as processes:
            assert processes.submit(read_all, source).result() == expected


def test_labels_are_remapped_and_holes_close(tmp_path: Path) -> None:
    source = open_source(write_face_records(tmp_path / "faces", FACES, labels=[10, 3, 700]))
    assert source.identities == ["3", "10", "700"] and source.labels.tolist() == [1, 1, 0, 2, 2, 2]


def test_a_broken_image_names_its_record(folder: Path, tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 60).save(stream, "JPEG")
    half = stream.getvalue()[: stream.tell() // 2]
    source = open_source(write_face_records(tmp_path / "broken", [[jpeg(0), half], [b"", jpeg(9)]]))
    for index, message in ((1, "damaged or incomplete"), (2, "the file is empty")):
        with pytest.raises(ValueError, match=message) as caught:
            source.image(index)
        assert source.where(index) in str(caught.value) and f"record {index + 1} at byte" in str(caught.value)


# --- damage -------------------------------------------------------------------------------------------------


def damage(folder: Path, name: str, change) -> None:
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def with_lines(change):
    return lambda content: b"\n".join(change(content.splitlines())) + b"\n"


def offset(folder: Path, key: int) -> int:
    return int((folder / "train.idx").read_text().splitlines()[key].split("\t")[1])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train.idx", lambda c: b"", r"train\.idx: is empty"),
        ("train.idx", lambda c: b"\n\n", r"train\.idx: is empty"),
        ("train.idx", lambda c: b"not found\n", "train.idx, line 1: expected a key, a tab .* 'not found'"),
        ("train.idx", with_lines(lambda x: [*x[:3], b"3 200", *x[4:]]), "train.idx, line 4: .*'3 200'"),
        ("train.idx", with_lines(lambda x: [*x[:3], b"3\t-8", *x[4:]]), "train.idx, line 4: "),
        ("train.idx", with_lines(lambda x: [*x[:3], b"3\t9\t9", *x[4:]]), "train.idx, line 4: "),
        ("train.idx", with_lines(lambda x: [*x[:3], b"3\t" + b"9" * 30, *x[4:]]), "train.idx, line 4: "),
        ("train.idx", with_lines(lambda x: [*x[:3], b"\xff\xfe", *x[4:]]), "train.idx, line 4: "),
        ("train.idx", with_lines(lambda x: [*x, x[2]]), "lists key 2 twice"),
        (
            "train.idx",
            with_lines(lambda x: x[:-1]),
            "bytes .* lie in no record of .*train.idx; the index is",
        ),
        ("train.idx", with_lines(lambda x: x[:4] + x[5:]), "bytes .* lie in no record of .*train.idx"),
        (
            "train.idx",
            with_lines(lambda x: [*x[:3], b"3\t10", *x[4:]]),
            "key 3 is said to lie at byte 10, where",
        ),
        ("train.idx", with_lines(lambda x: [*x, b"10\t99999996"]), "key 10 is said to lie at byte 99999996, where"),
        ("train.idx", with_lines(lambda x: [*x, b"10\t4"]), "byte 4: no record starts here .bad magic number."),
        ("train.rec", lambda c: b"", r"train\.rec: is empty"),
        ("train.rec", lambda c: b"\0" * len(c), "byte 0: no record starts here .bad magic number."),
        ("train.rec", lambda c: c + b"junk", "bytes .* lie in no record of"),
        ("property", lambda c: b"3\n", "property: expected `identities,height,width`"),
        ("property", lambda c: b"2,112,112\n", "speaks of 2 identities, but the record file has the label 2"),
    ],
)
def test_damage_is_named(folder: Path, name: str, change, message: str) -> None:
    damage(folder, name, change)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(folder)
    assert str(folder / name) in str(caught.value) or "train.rec, byte" in str(caught.value) or "bytes" in message


def test_index_with_a_long_line_costs_no_more_than_its_bytes(tmp_path: Path) -> None:
    """Lines of very different lengths: a table of them would be as wide as the longest, everywhere."""
    path = tmp_path / "a.idx"
    for content, line in ((b'{"a": 1}\n' * 2000, 1), (b"0\t0\n" * 2000, 2001), (b"0\t0\r\n" * 300_000, 300_001)):
        path.write_bytes(content + b"9" * 100_000)
        tracemalloc.start()
        with pytest.raises(
            ValueError, match=rf"a\.idx, line {line}: expected a key, a tab and a byte offset, found '.{{8,40}}'$"
        ):
            _read_index(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20_000_000


def test_index_of_many_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    path.write_bytes(b"".join(b"%d\t%d\r\n" % (key, 40 * key) for key in range(200_000)) + b"200000\t8000000\n\n \n")
    keys, offsets = _read_index(path)
    assert np.array_equal(keys, np.arange(200_001)) and np.array_equal(offsets, 40 * keys)


def test_length_past_the_end_names_record_and_offset(folder: Path) -> None:
    at = offset(folder, 9)
    damage(folder, "train.rec", lambda c: c[: at + 4] + struct.pack("<I", 5000) + c[at + 8 :])
    with pytest.raises(ValueError, match=rf"record 9 at byte {at}: runs to byte {at + 8 + 5000}, past the end"):
        open_source(folder)


def test_cut_off_record_file(folder: Path) -> None:
    size = (folder / "train.rec").stat().st_size
    damage(folder, "train.rec", lambda c: c[:-4])
    with pytest.raises(ValueError, match=f"record 9 at byte .*: runs to byte {size}, past the end at {size - 4}"):
        open_source(folder)
    damage(folder, "train.rec", lambda c: c[: len(c) // 2])
    with pytest.raises(ValueError, match=r"is said to lie at byte .* or .*train.rec is cut off"):
        open_source(folder)


def test_index_and_records_cut_off_alike_do_not_pass(folder: Path) -> None:
    at = offset(folder, 8)
    damage(folder, "train.rec", lambda c: c[:at])
    damage(folder, "train.idx", with_lines(lambda lines: lines[:8]))
    with pytest.raises(ValueError, match=r"announces the images 1 to 6 and 10 records in all, but .*lists 8 records"):
        open_source(folder)


@pytest.mark.parametrize("cut", ["second part", "inside the second part", "foreign second part"])
def test_truncated_parts(tmp_path: Path, cut: str) -> None:
    path = write_records(tmp_path / "a.rec", {1: pack(1, 1, b"abcd" + MAGIC + b"efghijkl")})
    content = path.read_bytes()
    second = content.index(MAGIC, 4)
    path.write_bytes(
        {
            "second part": content[:second],
            "inside the second part": content[:-4],
            "foreign second part": content[: second + 4] + struct.pack("<I", 8) + content[second + 8 :],
        }[cut]
    )
    expected = {
        "second part": f"record 1 at byte 0: its last part is missing; the file ends at byte {second}",
        "inside the second part": f"record 1 at byte 0: its part at byte {second} runs past byte .*, where the file",
        "foreign second part": f"record 1 at byte 0: the part expected at byte {second} is none",
    }[cut]
    with pytest.raises(ValueError, match=expected):
        RecordFile(path)


def test_parts_are_sought_no_further_than_the_next_record(tmp_path: Path) -> None:
    """Many keys on one long record must not read the file once a key."""
    first, middle = (MAGIC + struct.pack("<I", kind << 29) for kind in (1, 2))
    path = tmp_path / "a.rec"
    path.write_bytes(first + middle * 3000 + MAGIC + struct.pack("<I", 3 << 29))
    path.with_suffix(".idx").write_text("".join(f"{key}\t0\n" for key in range(3000)))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"a.idx: the keys 0 and 1 both lie at byte 0"):
        RecordFile(path)
    assert time.perf_counter() - start < 1

    path.write_bytes(first * 2 + middle * 2)
    path.with_suffix(".idx").write_text("1\t0\n2\t8\n")
    with pytest.raises(ValueError, match="at byte 0: its last part is missing; the next record starts at byte 8"):
        RecordFile(path)
    path.write_bytes(MAGIC + struct.pack("<I", 1 << 29 | 4) + first + middle)
    with pytest.raises(ValueError, match="record 1 at byte 0: its part at byte 0 runs past byte 8, where"):
        RecordFile(path)


def test_parts_too_short_for_a_header_name_their_record(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.rec", {1: b"abcd" + MAGIC + b"efgh"})
    with pytest.raises(ValueError, match="record 1 at byte 0: 12 bytes are too few for a header"):
        open_source(path)


def test_the_middle_of_a_record_is_no_start(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.rec", {1: pack(1, 1, b"abcd" + MAGIC + b"efgh")})
    second = path.read_bytes().index(MAGIC, 4)
    path.with_suffix(".idx").write_text(f"1\t0\n2\t{second}\n")
    with pytest.raises(ValueError, match=f"record 2 at byte {second}: is the middle of a record"):
        RecordFile(path)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"too short", "record 1 at byte 0: 9 bytes are too few for a header"),
        (struct.pack("<IfQQ", 1000, 0, 1, 0), "record 1 at byte 0: its header announces 1000 labels, but it holds 24"),
        (pack(-1, 1, b"x"), "record 1 at byte 0: label -1 is no identity"),
        (pack(0.5, 1, b"x"), "label 0.5 is no identity"),
        (pack(float("nan"), 1, b"x"), "label nan is no identity"),
        (pack(float("inf"), 1, b"x"), "label inf is no identity"),
        (pack(2**24, 1, b"x"), "label 16777216 is too large"),
    ],
)
def test_payloads_that_are_no_faces(tmp_path: Path, payload: bytes, message: str) -> None:
    path = write_records(tmp_path / "a.rec", {1: payload, 2: pack(1, 2, b"x")})
    with pytest.raises(ValueError, match=message):
        open_source(path)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([[1, 4], [4, 7]], "record 7 at byte .*: its range 1 to 4 holds images of several identities"),
        ([[1, 3], [4, 7]], "record 3 at byte .*: is an image of no identity's range"),
        ([[1, 3], [3, 9]], "record 8 at byte .*: its range 3 to 9 is none of the images"),
    ],
)
def test_ranges_that_contradict_the_images(tmp_path: Path, ranges: list[list[int]], message: str) -> None:
    images = [(label, image) for label, faces in enumerate(FACES) for image in faces]
    payloads = {0: pack([7, 9], 0)} | {n: pack(label, n, image) for n, (label, image) in enumerate(images, start=1)}
    payloads |= {7 + n: pack(pair, 7 + n) for n, pair in enumerate(ranges)}
    with pytest.raises(ValueError, match=message):
        open_source(write_records(tmp_path / "train.rec", payloads))


class ManyRecords:
    """In place of a `RecordFile`: more images than float32 can count, without a file of half a gigabyte."""

    index_path = Path("train.idx")

    def __init__(self, counts: list[int], shift: int = 0) -> None:
        ends = np.cumsum(counts) + 1
        self.images, total = ends[-1].item() - 1, ends[-1].item() + len(counts)
        self.keys = np.arange(total, dtype=np.int32)
        self.ranges = {0: (self.images + 1, total)}
        self.ranges |= {self.images + 1 + i: (ends[i] - counts[i], ends[i] + shift) for i in range(len(counts))}
        self.labels = np.zeros(total, np.float32)
        self.labels[1 : self.images + 1] = np.repeat(np.arange(len(counts), dtype=np.float32), counts)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: int) -> bytes:
        return pack(self.ranges[position], position)

    def where(self, position: int) -> str:
        return f"record {position}"

    def headers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sizes = np.full(len(self), 1, np.int8)
        sizes[[*self.ranges]] = 0
        return 2 * (sizes == 0).astype(np.int8), self.labels, sizes


@pytest.mark.slow
@pytest.mark.parametrize("last", [1, 2, 3, 4])  # rounded up, down, or not at all
def test_numbers_that_float32_rounds(last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Glint360K has 17,091,657 images: its header and its later ranges are off by one, as the format has them."""
    counts = [2**24 - 4, 4, 5, last]
    assert np.float32(sum(counts[:2]) + 1) == sum(counts[:2]), "the first border beyond is rounded"
    monkeypatch.setattr("adaptface.data.records.RecordFile", lambda _: ManyRecords(counts))
    source = RecordSource(Path("train.rec"), None)
    assert np.bincount(source.labels).tolist() == counts and source.key(len(source) - 1) == str(sum(counts))
    monkeypatch.setattr("adaptface.data.records.RecordFile", lambda _: ManyRecords(counts, shift=4))
    with pytest.raises(ValueError, match="its range 1 to 16777216 holds images of several"):
        RecordSource(Path("train.rec"), None)


def test_header_that_announces_other_records(tmp_path: Path) -> None:
    for announced in ([9, 10], [0, 3], [float("nan"), 3], [3, float("inf")]):
        path = write_records(tmp_path / "train.rec", {0: pack(announced, 0), 1: pack(0, 1, b"x"), 2: pack(1, 2, b"x")})
        with pytest.raises(ValueError, match="record 0 at byte 0: announces the images"):
            open_source(path)


def test_one_identity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="belong to one identity"):
        open_source(write_face_records(tmp_path / "faces", [FACES[2]]))


def test_missing_index(folder: Path) -> None:
    (folder / "train.idx").unlink()
    with pytest.raises(FileNotFoundError, match=r"train.idx: no such file; a .rec is read with its .idx"):
        open_source(folder)


def test_which_record_file(folder: Path, tmp_path: Path) -> None:
    (folder / "val.rec").write_bytes(b"")
    assert find_record_file(folder) == folder / "train.rec"
    (folder / "train.rec").rename(folder / "other.rec")
    with pytest.raises(ValueError, match=r"holds 2 .rec files and no train.rec"):
        open_source(folder)
    assert find_record_file(tmp_path) is None
    with pytest.raises(ValueError, match="is not divided into splits"):
        open_source(folder / "other.rec", split="validation")
