"""Photos on their way from the browser: one JSON text, decoded in memory. Nothing of them touches a disk.

gradio's own upload writes each file to a folder of the server and tells the browser its path. So `picker.js` sends the
files' bytes as text with the click itself, and the door (`door.py`) keeps gradio's upload shut.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 10 * 2**20  # of one photo
MOST_AT_ONCE = 4  # photos of one click
MOST_OF_NAME = 80  # characters
# Of a request: the photos as base64, four characters for three bytes, and the rest of it.
MOST_OF_REQUEST = MOST_AT_ONCE * (4 * MOST_BYTES // 3 + 4) + 2**16


@dataclass(frozen=True)
class Photo:
    """A file that somebody chose.

    Args:
        name (`str`): of the file, as the browser calls it; no path, but any characters.
        content (`bytes`): its bytes, which may be anything.
    """

    name: str
    content: bytes


def read_photos(text: str | None, what: str, most: int = 1) -> list[Photo]:
    """What `adaptface.photos` of picker.js sends.

    Args:
        text (`str`, *optional*): JSON, a list of `{"name", "size", "data"}`; `data` is base64, or null of a file that
            the browser left out since it is too large, or could not read.
        what (`str`): what the photos are called in an error.
        most (`int`): how many there may be.
    Raises:
        ValueError: there are none or too many, one is too large or could not be read, or the text is something else.
    """
    try:
        files: Any = json.loads(text or "[]")
        found = [(str(file["name"])[:MOST_OF_NAME], int(file["size"]), file["data"]) for file in files]
        if not all(data is None or isinstance(data, str) for *_, data in found):
            raise ValueError("data is no text")
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"{what}: what the browser sent is no list of photos; reload the page") from error
    if not found:
        raise ValueError(f"{what}: choose a photo first")
    if len(found) > most:
        raise ValueError(f"{what}: {len(found)} photos were chosen; take {most} at a time")
    photos = []
    for name, size, data in found:
        if size > MOST_BYTES or len(data or "") > 4 * (MOST_BYTES + 2) // 3:
            raise ValueError(
                f"{name} is {size / 2**20:.1f} MB large; a photo may have {MOST_BYTES // 2**20} MB: scale it down first"
            )
        try:
            photos.append(Photo(name, base64.b64decode(data, validate=True)))
        except (TypeError, ValueError, binascii.Error) as error:
            raise ValueError(f"{name}: the browser could not read this file; choose it again") from error
    return photos
