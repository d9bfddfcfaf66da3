"""insightface RecordIO (`train.rec`, `train.idx`, `property`), read without mxnet.

    records = RecordFile("faces_webface_112x112/train.rec")
    header, image = unpack(records[1])                        # the record with the second smallest key
    source = RecordSource("faces_webface_112x112")

Sources: dmlc-core `include/dmlc/recordio.h` (frames); mxnet `python/mxnet/recordio.py` (`IRHeader`, `unpack`, the
index); insightface `recognition/arcface_torch/dataset.py` (`MXFaceDataset`: header record, range of the images).
"""

import mmap
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from adaptface.data.base import UNLABELLED, FaceSource, check_content, shown

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_LENGTH_BITS = 29  # the three bits above them say which part of a record a frame is
WHOLE, FIRST, MIDDLE, LAST = range(4)
_FRAME = struct.Struct("<II")  # magic, cflag << 29 | length of the payload
_HEADER = struct.Struct("<IfQQ")  # flag, label, id, id2
_EXACT = 2**24  # float32 holds every whole number up to here; labels beyond would run together
_CHUNK = 1 << 16  # records whose headers are read at once
_BLOCK, _LINE = 1 << 20, 64  # bytes of an index read at once, and more than a line of it has
_NO_ENTRY = re.compile(rb"^(?!(?:[0-9]{1,18}\t[0-9]{1,18})?[ \r]*$).{1,40}", re.MULTILINE)  # start of a wrong line


class Header(NamedTuple):
    """What precedes the image in a record.

    Attributes:
        flag (`int`): how many labels follow the header; 0 if its own is the only one.
        labels (`tuple[float, ...]`): these labels; the first is the identity.
        id, id2 (`int`): the writer's own numbers.
    """

    flag: int
    labels: tuple[float, ...]
    id: int
    id2: int


def unpack(payload: bytes) -> tuple[Header, bytes]:
    """Header and image file of a record's payload.

    Raises:
        ValueError: the payload is shorter than the header or the labels that it announces.
    """
    if len(payload) < _HEADER.size:
        raise ValueError(f"{len(payload)} bytes are too few for a header of {_HEADER.size}")
    count, label, id_, id2 = _HEADER.unpack_from(payload)
    start = _HEADER.size + 4 * count
    if start > len(payload):
        raise ValueError(f"its header announces {count} labels, but it holds {len(payload)} bytes")
    labels = struct.unpack_from(f"<{count}f", payload, _HEADER.size) if count else (label,)
    return Header(count, labels, id_, id2), payload[start:]


class RecordFile:
    """Random access to the records of a `.rec` file by its `.idx`, memory-mapped.

    The whole structure is checked when the file is opened, so that a cut-off or foreign index or record file is
    found then and not in the middle of training. Reading takes no lock and keeps no position: threads, forked and
    spawned processes may share one object.

    Args:
        path: the `.rec` file; the `.idx` file of the same name lies beside it.
    Attributes:
        keys (`np.ndarray` of shape `(N,)`): keys of the records, ascending; `self[i]` is the record of `keys[i]`.
    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged or they do not belong together; names file and line, or byte offset.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.index_path = self.path.with_suffix(".idx")
        for file in (self.path, self.index_path):
            if not file.is_file():
                raise FileNotFoundError(f"{shown(file)}: no such file; a .rec is read with its .idx beside it")
            check_content(file)
        keys, offsets = _read_index(self.index_path)
        order = np.argsort(keys, kind="stable")
        self.keys, self._offsets = keys[order], offsets[order]
        if (repeated := np.flatnonzero(np.diff(self.keys) == 0)).size:
            raise ValueError(f"{shown(self.index_path)}: lists key {self.keys[repeated[0]]} twice")
        self._open()
        self._lengths, self._parts = self._check_frames()

    def _open(self) -> None:
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ValueError(f"{shown(self.path)}: is empty")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_bytes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: int) -> bytes:
        """Payload of the record at a position in `keys`."""
        start = self._offsets.item(position) + _FRAME.size
        if self._parts and position in self._parts:
            pieces = [self._bytes[at : at + length] for at, length in self._parts[position]]
            return _MAGIC_BYTES.join(pieces)
        return self._bytes[start : start + self._lengths.item(position)]

    def where(self, position: int) -> str:
        """Printable place of a record, for messages."""
        return f"{shown(self.path)}, record {self.keys[position]} at byte {self._offsets[position]}"

    def headers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Headers of all records at once.

        Returns:
            count of announced labels, first label and length of the image, each of shape `(N,)`.
        Raises:
            ValueError: a record is too short for its header; names key and offset.
        """
        flags, labels = np.zeros(len(self), np.int64), np.zeros(len(self), np.float32)
        images, data = np.zeros(len(self), np.int64), np.frombuffer(self._bytes, np.uint8)
        whole = np.setdiff1d(np.arange(len(self)), list(self._parts), assume_unique=True)
        for chunk in np.array_split(whole, max(1, len(self) // _CHUNK)):
            starts, lengths = self._offsets[chunk] + _FRAME.size, self._lengths[chunk]
            if (short := np.flatnonzero(lengths < _HEADER.size)).size:
                at = short[0]
                raise ValueError(f"{self.where(chunk[at])}: {lengths[at]} bytes are too few for a header")
            fields = data[starts[:, None] + np.arange(8)].view("<u4")  # (n, 2): flag, label
            counts, first = fields[:, 0].astype(np.int64), fields[:, 1].copy()
            images[chunk] = lengths - _HEADER.size - 4 * counts
            if (short := np.flatnonzero(images[chunk] < 0)).size:
                at = short[0]
                found = f"announces {counts[at]} labels, but it holds {lengths[at]} bytes"
                raise ValueError(f"{self.where(chunk[at])}: its header {found}")
            several = np.flatnonzero(counts)
            first[several] = data[(starts[several] + _HEADER.size)[:, None] + np.arange(4)].view("<u4")[:, 0]
            flags[chunk], labels[chunk] = counts, first.view("<f4")
        for position in self._parts:
            try:
                header, image = unpack(self[position])
            except ValueError as error:
                raise ValueError(f"{self.where(position)}: {error}") from error
            flags[position], labels[position], images[position] = header.flag, header.labels[0], len(image)
        return flags, labels, images

    def _check_frames(self) -> tuple[np.ndarray, dict[int, list[tuple[int, int]]]]:
        """Payload length of every record `(N,)`, and `(start, length)` of the parts of those that have several."""
        size, data = len(self._bytes), np.frombuffer(self._bytes, np.uint8)
        name, index = shown(self.path), shown(self.index_path)
        outside = np.flatnonzero((self._offsets % 4 != 0) | (self._offsets > size - _FRAME.size))
        if outside.size:
            at = outside[0]
            raise ValueError(
                f"{index}: key {self.keys[at]} is said to lie at byte {self._offsets[at]}, where no record of {name} "
                f"({size} bytes) can start; the two files do not belong together, or {name} is cut off"
            )
        by_offset = np.argsort(self._offsets, kind="stable")
        starts = self._offsets[by_offset]
        if (shared := np.flatnonzero(np.diff(starts) == 0)).size:
            first, second = self.keys[by_offset[shared[0] : shared[0] + 2]]
            raise ValueError(f"{index}: the keys {first} and {second} both lie at byte {starts[shared[0]]}")
        lengths, kinds = np.zeros(len(self), np.int64), np.zeros(len(self), np.int64)
        for chunk in np.array_split(np.arange(len(self)), max(1, len(self) // _CHUNK)):
            fields = data[self._offsets[chunk][:, None] + np.arange(_FRAME.size)].view("<u4").astype(np.int64)
            if (wrong := np.flatnonzero(fields[:, 0] != MAGIC)).size:
                at = chunk[wrong[0]]
                raise ValueError(
                    f"{name}, byte {self._offsets[at]}: no record starts here (bad magic number), though {index} says "
                    f"so of key {self.keys[at]}; the two files do not belong together, or one is damaged"
                )
            kinds[chunk], lengths[chunk] = _kind_and_length(fields[:, 1])
        ends = self._offsets + _FRAME.size + lengths
        if (past := np.flatnonzero(ends > size)).size:
            raise ValueError(f"{self.where(past[0])}: runs to byte {ends[past[0]]}, past the end at {size}; cut off")
        if (odd := np.flatnonzero((kinds != WHOLE) & (kinds != FIRST))).size:
            raise ValueError(f"{self.where(odd[0])}: is the middle of a record (part {kinds[odd[0]]}), not its start")
        borders, parts = np.append(starts[1:], size), {}
        for place in np.flatnonzero(kinds[by_offset] == FIRST).tolist():
            at = by_offset.item(place)
            parts[at] = self._follow_parts(at, borders.item(place))
            ends[at] = sum(parts[at][-1])
        ends = (ends[by_offset] + 3) // 4 * 4
        here, there = np.append(0, ends), np.append(starts, max(size, ends[-1]))
        if (gap := np.flatnonzero(here != there)).size:
            here, there = here[gap[0]], there[gap[0]]
            what = "lie in no record of" if here < there else "lie in two records of"
            raise ValueError(
                f"{name}: bytes {min(here, there)} to {max(here, there)} {what} {index}; the index is incomplete or "
                "belongs to another file"
            )
        return lengths, parts

    def _follow_parts(self, position: int, border: int) -> list[tuple[int, int]]:
        """`(start, length)` of each part of a record that was cut where its payload held the magic number.

        None is sought from `border` on, where the next record starts or the file ends: the whole file is read once.
        """
        at = self._offsets.item(position)
        next_is = "the file ends" if border == len(self._bytes) else "the next record starts"
        parts: list[tuple[int, int]] = []
        while True:
            if at + _FRAME.size > border:
                raise ValueError(f"{self.where(position)}: its last part is missing; {next_is} at byte {at}")
            magic, word = _FRAME.unpack_from(self._bytes, at)
            kind, length = _kind_and_length(word)
            if magic != MAGIC or kind not in ((MIDDLE, LAST) if parts else (FIRST,)):
                raise ValueError(f"{self.where(position)}: the part expected at byte {at} is none; damaged or cut off")
            start = at + _FRAME.size
            if start + length > border:
                raise ValueError(
                    f"{self.where(position)}: its part at byte {at} runs past byte {border}, where {next_is}; damaged"
                )
            parts.append((start, length))
            if kind == LAST:
                return parts
            at = start + length  # only the last part may end off the grid of four bytes


def _kind_and_length(word: Any) -> tuple[Any, Any]:
    """Which part of a record a frame is, and its payload's length, from its second number (or an array of these)."""
    return word >> _LENGTH_BITS, word & ((1 << _LENGTH_BITS) - 1)


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and byte offsets of an index, each of shape `(N,)`; names the line that is none."""
    blocks, before = [np.zeros(0, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK) + file.readline(_LINE):  # to the end of a line, unless that is too long
            if wrong := _NO_ENTRY.search(block):
                line = 1 + before + block.count(b"\n", 0, wrong.start())
                start = wrong[0].decode("utf-8", "backslashreplace")
                raise ValueError(
                    f"{shown(path)}, line {line}: expected a key, a tab and a byte offset, found {start!r}"
                )
            before += block.count(b"\n")
            if block.strip():
                blocks.append(np.fromstring(block, np.int64, sep=" "))
    numbers = np.concatenate(blocks)
    if not numbers.size:
        raise ValueError(f"{shown(path)}: is empty; fetch it again")
    return numbers[::2], numbers[1::2]


# --- faces --------------------------------------------------------------------------------------------------


def find_record_file(path: Path) -> Path | None:
    """The `.rec` file that a path names or that a folder holds, or None.

    Raises:
        ValueError: the folder holds several, none of them called `train.rec`.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".rec" else None
    if (usual := path / "train.rec").is_file():
        return usual
    found = sorted(path.glob("*.rec"))
    if len(found) > 1:
        raise ValueError(f"{shown(path)}: holds {len(found)} .rec files and no train.rec; name the one to read")
    return found[0] if found else None


class RecordSource(FaceSource):
    """Faces of an insightface record file.

    Where record 0 is a header (several labels, no image), its first label N + 1 says that the records 1 .. N are the
    images; those after them are ranges of identities, which must agree with the images' own labels. Otherwise every
    record is an image. The label of an image is the first one in its header. Of more than 16.7 million images these
    numbers are known only as float32 rounds them, and the images end where the first range is.

    Args:
        path: the `.rec` file.
        domains: names for `domain_labels`; record files carry none themselves.
    Raises:
        FileNotFoundError, ValueError: see [`RecordFile`]; or an image is missing or nameless, a label is no whole
            number of at least 0, ranges or `property` contradict the images.
    """

    def __init__(self, path: Path, domains: Sequence[str] | None) -> None:
        self._records = records = RecordFile(path)
        flags, labels, images = records.headers()
        positions = np.arange(len(records))
        ranges = positions[:0]
        if records.keys[0] == 0 and flags[0] > 0 and images[0] == 0:
            positions, ranges = self._images_and_ranges((flags > 0) & (images == 0))
        mine = labels[positions]
        whole = np.isfinite(mine) & (mine >= 0) & (mine == np.floor(mine))
        if not whole.all():
            at = int(np.argmin(whole))
            raise ValueError(
                f"{records.where(positions[at])}: label {mine[at]:g} is no identity; labels are whole numbers from 0"
            )
        if mine.max() >= _EXACT:
            at = int(mine.argmax())
            raise ValueError(
                f"{records.where(positions[at])}: label {mine[at]:.0f} is too large; float32, in which this format "
                f"keeps labels, tells identities apart only below {_EXACT:,}"
            )
        self._positions = positions
        codes = mine.astype(np.int64)
        _check_property(path.with_name("property"), int(codes.max()))
        self._check_ranges(ranges, codes)
        unlabelled = np.full(len(positions), UNLABELLED)
        super().__init__(shown(path), _Numbers(int(codes.max()) + 1), codes, unlabelled, domains or ())

    def _images_and_ranges(self, is_range: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the images and of the identity ranges, by the header record.

        Args:
            is_range (`np.ndarray` of shape `(N,)`): whether a record looks like a range: several labels, no image.
        """
        records = self._records
        first, *rest = unpack(records[0])[0].labels  # N + 1 and, where it is there, N + 1 + C
        end, total = (int(label) if np.isfinite(label) else 0 for label in (first, *(rest[:1] or [len(records)])))
        if 1 < end < total + 1 and abs(total - len(records)) <= _rounding(total):
            total = len(records)
            near = np.arange(max(2, end - _rounding(end)), min(end + _rounding(end), total - 1) + 1)
            end = near[np.argmax(is_range[near])].item() if is_range[near].any() else min(end, total)
        if not 1 < end <= total or not np.array_equal(records.keys, np.arange(total)):
            missing = np.setdiff1d(np.arange(min(max(total, 1), len(records) + 10**6)), records.keys)
            lost = f"; {len(missing)} of these keys are missing, the first is {missing[0]}" if missing.size else ""
            raise ValueError(
                f"{records.where(0)}: announces the images 1 to {end - 1} and {total} records in all, but "
                f"{shown(records.index_path)} lists {len(records)} records, 0 to {records.keys[-1]}{lost}"
            )
        return np.arange(1, end), np.arange(end, total)

    def _check_ranges(self, ranges: np.ndarray, codes: np.ndarray) -> None:
        """Every range `[first, end)` of keys holds the images of one identity, and together they hold all.

        A border that float32 may have rounded lies within some images; those count to either side of it.
        """
        records, covered = self._records, np.zeros(len(codes), bool)
        for position in ranges.tolist():
            header, image = unpack(records[position])
            if image or len(header.labels) < 2:
                raise ValueError(f"{records.where(position)}: comes after the images, but is no range of an identity")
            first, end = header.labels[:2]
            if not 1 <= first <= end <= len(codes) + 1 + _rounding(end):
                raise ValueError(f"{records.where(position)}: its range {first:.0f} to {end:.0f} is none of the images")
            start, stop = int(first) - 1, int(end) - 1  # the first image has the key 1
            before, after = _rounding(first), _rounding(end)
            mine = codes[start + before : max(start + before, stop - after)]
            if mine.size and np.ptp(mine):
                raise ValueError(
                    f"{records.where(position)}: its range {first:.0f} to {end:.0f} holds images of several "
                    "identities; the record file is damaged or was put together wrongly"
                )
            covered[start - before : stop + after] = True
        if ranges.size and not covered.all():
            raise ValueError(f"{self.where(int(np.argmin(covered)))}: is an image of no identity's range")

    def _encoded(self, index: int) -> bytes:
        payload = self._records[self._positions.item(index)]
        (count,) = struct.unpack_from("<I", payload)
        return payload[_HEADER.size + 4 * count :]

    def where(self, index: int) -> str:
        return self._records.where(self._positions.item(index))

    def key(self, index: int) -> str:
        return str(self._records.keys.item(self._positions.item(index)))


def _rounding(number: float) -> int:
    """How far a whole number of float32 may be from the one that was meant."""
    return 0 if not number >= _EXACT or np.isinf(number) else int(np.spacing(np.float32(number))) // 2


class _Numbers(Sequence[str]):
    """Names of identities that have but a number, without holding them."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return str(index)


def _check_property(path: Path, largest_label: int) -> None:
    """`property`, where it is there, says `identities,height,width`; no label may lie beyond."""
    if not path.is_file():
        return
    words = path.read_text(encoding="utf-8", errors="replace").strip().split(",")
    if len(words) != 3 or not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"{shown(path)}: expected `identities,height,width`, such as 10572,112,112")
    if largest_label >= int(words[0]):
        raise ValueError(
            f"{shown(path)}: speaks of {int(words[0])} identities, but the record file has the label {largest_label}; "
            "they do not belong together"
        )


# --- writing ------------------------------------------------------------------------------------------------


def pack(labels: Sequence[float], number: int, image: bytes = b"") -> bytes:
    """Payload of a record: a header with one label, or announcing several, and an image file."""
    flag, label = (0, labels[0]) if len(labels) == 1 else (len(labels), 0.0)
    return _HEADER.pack(flag, label, number, 0) + struct.pack(f"<{flag}f", *labels[:flag]) + image


class RecordWriter:
    """Appends records to a `.rec` file and its `.idx` file; goes on after the last complete record of what is there.

    A record is in the index only once it is wholly in the `.rec` file, so that a killed writer loses at most the record
    it was at.

    Args:
        path: the `.rec` file, its index beside it; both are made where they do not exist.
    Attributes:
        count (`int`): records written so far, by this writer and earlier ones.
    """

    def __init__(self, path: Path) -> None:
        index_path = path.with_suffix(".idx")
        self.count = end = 0
        if path.is_file() and index_path.is_file():
            lines = [line for line in index_path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            size = path.stat().st_size
            with path.open("rb") as file:
                while lines and not end:  # the index may have reached the disk before the record did
                    file.seek(int(lines[-1].split(b"\t")[1]))
                    end = _end_of_record(file)
                    if end > size or not end:
                        end = 0
                        lines.pop()
            self.count = len(lines)
            with index_path.open("rb+") as file:
                file.truncate(sum(map(len, lines)))
            with path.open("rb+") as file:
                file.truncate(end)
        self._records, self._index = path.open("ab" if end else "wb"), index_path.open("ab" if end else "wb")

    def write(self, key: int, payload: bytes) -> None:
        """Append one record; a payload that holds the magic number on the grid of four bytes is cut there."""
        offset = self._records.tell()
        words = np.frombuffer(payload[: len(payload) // 4 * 4], "<u4")
        starts = [0, *(4 * np.flatnonzero(words == MAGIC) + 4).tolist()]
        ends = [*(start - 4 for start in starts[1:]), len(payload)]
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            is_last = number == len(starts) - 1
            kind = (WHOLE if is_last else FIRST) if number == 0 else LAST if is_last else MIDDLE
            length = end - start
            if length >> _LENGTH_BITS:
                raise ValueError(f"record {key}: {length} bytes are more than this format holds in one piece")
            padding = b"\0" * (-length % 4)
            self._records.write(_FRAME.pack(MAGIC, kind << _LENGTH_BITS | length) + payload[start:end] + padding)
        self._index.write(b"%d\t%d\n" % (key, offset))
        self.count += 1

    def flush(self) -> None:
        """Put everything on the disk, the records before the index."""
        for file in (self._records, self._index):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Put everything on the disk and close the files."""
        self.flush()
        self._records.close()
        self._index.close()


def _end_of_record(file: BinaryIO) -> int:
    """Where the record at the file's position ends, with its padding; 0 if there is none."""
    while True:
        frame = file.read(_FRAME.size)
        if len(frame) < _FRAME.size:
            return 0
        magic, word = _FRAME.unpack(frame)
        kind, length = _kind_and_length(word)
        if magic != MAGIC:
            return 0
        end = file.tell() + (length + 3) // 4 * 4
        if kind in (WHOLE, LAST):
            return end
        file.seek(end)
