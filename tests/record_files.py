"""A writer of RecordIO files, after the words of their specification and not after our reader.

Frames: dmlc-core `src/recordio.cc`, `RecordIOWriter::WriteRecord`. Headers: mxnet `python/mxnet/recordio.py`, `pack`.
The order of the records: insightface `recognition/_datasets_/`, `face2rec2.py`.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

MAGIC = bytes.fromhex("0a23d7ce")  # 0xced7230a, little-endian


def frame(payload: bytes) -> bytes:
    """A payload as its frames: cut wherever it holds the magic number at a multiple of four."""
    pieces, start = [], 0
    for at in range(0, len(payload) // 4 * 4, 4):
        if payload[at : at + 4] == MAGIC:
            pieces.append(payload[start:at])
            start = at + 4
    pieces.append(payload[start:])
    written = b""
    for number, piece in enumerate(pieces):
        kind = 0 if len(pieces) == 1 else 1 if number == 0 else 3 if number == len(pieces) - 1 else 2
        written += MAGIC + struct.pack("<I", kind * 2**29 + len(piece)) + piece
        written += b"\0" * (-len(written) % 4)
    return written


def pack(label: float | Sequence[float], number: int, image: bytes = b"") -> bytes:
    """A header and an image as a payload; several labels follow the header, their count is the flag."""
    if isinstance(label, (int, float)):
        return struct.pack("<I", 0) + struct.pack("<f", label) + struct.pack("<QQ", number, 0) + image
    start = struct.pack("<I", len(label)) + struct.pack("<f", 0) + struct.pack("<QQ", number, 0)
    return start + b"".join(struct.pack("<f", value) for value in label) + image


def write_records(path: Path, payloads: dict[int, bytes]) -> Path:
    """`path` and its index, the records in the order given."""
    frames, index, offset = [], "", 0
    for key, payload in payloads.items():
        index += f"{key}\t{offset}\n"
        frames.append(frame(payload))
        offset += len(frames[-1])
    path.write_bytes(b"".join(frames))
    path.with_suffix(".idx").write_text(index)
    return path


def write_face_records(
    folder: Path, identities: Sequence[Sequence[bytes]], labels: Sequence[int] | None = None
) -> Path:
    """A folder as insightface packs it: header record, images, ranges of identities, `property`."""
    labels = range(len(identities)) if labels is None else labels
    images = [(label, image) for label, faces in zip(labels, identities, strict=True) for image in faces]
    count = len(images)
    payloads = {0: pack([count + 1, count + 1 + len(identities)], 0)}
    for number, (label, image) in enumerate(images, start=1):
        payloads[number] = pack(label, number, image)
    start = 1
    for number, faces in enumerate(identities, start=count + 1):
        payloads[number] = pack([start, start + len(faces)], number)
        start += len(faces)
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder / "train.rec", payloads)
    (folder / "property").write_text(f"{max(labels) + 1},112,112\n")
    return folder
