"""The people that one visitor enrolled: in memory, few, and gone with the visit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np

from adaptface.data.base import shown
from adaptface.gallery import Gallery

MOST_PEOPLE = 40
MOST_PHOTOS = 120
MOST_OF_NAME = 60  # characters


@dataclass(frozen=True)
class Found:
    """A person that a search found.

    Args:
        name (`str`): as enrolled.
        similarity (`float`): cosine of the query and the nearest photo of this person.
        picture (`str`): that photo's face, a data URI.
    """

    name: str
    similarity: float
    picture: str


class People:
    """A small gallery with a picture of each face.

    Args:
        dim (`int`): length of an embedding.
    """

    def __init__(self, dim: int) -> None:
        self._gallery = Gallery(dim)
        self._pictures: dict[str, str] = {}  # by the name of the template in the gallery
        self._next = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._gallery)

    def __deepcopy__(self, memo: object) -> People:
        raise TypeError("a gallery belongs to one visitor and is not copied")

    @property
    def pictures(self) -> dict[str, list[str]]:
        """Each person's faces, data URIs, in the order of enrolment."""
        with self._lock:
            return {
                name: [self._pictures[str(source)] for source in self._gallery.sources(name)]
                for name in self._gallery.identities
            }

    def enroll(self, name: str, embeddings: np.ndarray, pictures: Sequence[str]) -> int:
        """Add faces of one person, all or none; one that is there already is left out.

        Args:
            name (`str`): white space is tidied, control characters are spelt out.
            embeddings (`np.ndarray` of shape `(N, E)`): of length 1.
            pictures: their faces, data URIs.
        Returns:
            how many faces were added.
        Raises:
            ValueError: there is no name, it is too long, or the gallery is full.
        """
        name = clean_name(name)
        with self._lock:
            if name not in self._gallery and len(self._gallery) >= MOST_PEOPLE:
                raise ValueError(f"the gallery is full: it holds {MOST_PEOPLE} people; remove someone first")
            if self._gallery.templates + len(pictures) > MOST_PHOTOS:
                raise ValueError(f"the gallery is full: it holds {MOST_PHOTOS} photos; remove someone first")
            numbers = [str(self._next + place) for place in range(len(pictures))]
            self._next += len(pictures)
            added = self._gallery.enroll(name, embeddings, numbers)
            kept = set(self._gallery.sources(name))
            pairs = zip(numbers, pictures, strict=True)
            self._pictures |= {number: picture for number, picture in pairs if number in kept}
        return added

    def remove(self, name: str) -> None:
        """Forget a person; of one that is not there nothing happens."""
        with self._lock:
            if name in self._gallery:
                for source in self._gallery.sources(name):
                    del self._pictures[str(source)]
                self._gallery.remove(name)

    def clear(self) -> None:
        """Forget everybody."""
        with self._lock:
            self._gallery.remove(*self._gallery.identities)
            self._pictures.clear()

    def search(self, embedding: np.ndarray, k: int) -> list[Found]:
        """The k people nearest to a face, the most similar first.

        Args:
            embedding (`np.ndarray` of shape `(E,)`): of length 1.
        """
        with self._lock:
            return [
                Found(match.identity, match.similarity, self._pictures[str(match.source)])
                for match in self._gallery.search(embedding, k)[0]
            ]


def clean_name(name: str) -> str:
    """A person's name as it is kept.

    Raises:
        ValueError: there is none, or it is too long.
    """
    name = shown(" ".join((name or "").split()))
    if not name:
        raise ValueError("give the person a name first")
    if len(name) > MOST_OF_NAME:
        raise ValueError(f"the name has {len(name)} characters; {MOST_OF_NAME} are the most")
    return name
