"""The page: three tabs on one model. Answers are made here of what the library finds; views.py draws them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from adaptface import FaceEmbedder
from adaptface.detection import NoFaceError
from adaptface.explain import look_at_image
from adaptface.explain_page import images_page
from adaptface.faces import EmbeddedFace, Verification
from demo import views
from demo.people import Found, People, clean_name
from demo.photos import MOST_AT_ONCE, MOST_BYTES, Photo, read_photos

HERE = Path(__file__).parent
FACES = [("the largest", "largest"), ("the most central", "central")]
ALIGNED = "My pictures are aligned face crops"
MOST_MATCHES = 5
AT_ONCE = 2  # answers that are worked on at the same time
WAITING = 16  # clicks that may wait; more are told to try again
VISITS = 64  # visitors whose last answers and galleries are remembered; the longest idle one is forgotten first
HOUR = 3600  # seconds

Handler = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Compared:
    """The last comparison, to show it again at another threshold."""

    answer: Verification
    crops: tuple[str, str]


@dataclass(frozen=True)
class Searched:
    """The last search, to show it again at another threshold."""

    face: EmbeddedFace
    crop: str
    found: list[Found]


class Demo:
    """What the buttons do, on one model.

    Args:
        embedder: the model.
        finds_faces: whether it has a face detector; else pictures are taken for aligned crops.
    """

    def __init__(self, embedder: FaceEmbedder, finds_faces: bool) -> None:
        self.embedder = embedder
        self.config = embedder.config
        self.finds_faces = finds_faces
        self.router = views.no_router(self.config)

    # ------------------------------------------------------------------------------------------------------- answers

    def compare(
        self, photo_a: str, photo_b: str, far: float | None, which: str, aligned: bool
    ) -> tuple[str, Compared | None]:
        """Both photos' faces, and whether they are one person's."""
        (a,), (b,) = read_photos(photo_a, "Photo A"), read_photos(photo_b, "Photo B")
        pictures = self._load(a, "Photo A"), self._load(b, "Photo B")
        rate = {} if far is None else {"far": far}
        try:
            answer = self.embedder.verify(*pictures, aligned=self._crops(aligned), faces=which, **rate)  # type: ignore[arg-type]
        except ValueError as error:
            raise _renamed(error, {"the first image": "Photo A", "the second image": "Photo B"}) from error
        crops = self._crop(pictures[0], answer.first), self._crop(pictures[1], answer.second)
        return views.comparison(answer, crops, self.router), Compared(answer, crops)

    def compared_at(self, last: Compared | None, far: float | None) -> str:
        """The last comparison, at another threshold."""
        if last is None:
            return ""
        return views.comparison(views.rejudged(last.answer, self.config, far), last.crops, self.router)

    def enroll(self, people: People | None, name: str, text: str, which: str, aligned: bool) -> tuple[People, str]:
        """Add a person's photos to the gallery: all, or none after an error."""
        name = clean_name(name)
        photos = read_photos(text, "Photos", MOST_AT_ONCE)
        faces, crops = zip(*(self._embed(photo, photo.name, which, aligned) for photo in photos), strict=True)
        people = People(self.config.embedding_size) if people is None else people
        added = people.enroll(name, _stacked(faces), crops)
        same = len(photos) - added
        told = [f"{name}: {added} photo{'s' if added != 1 else ''} enrolled."]
        told += [f"{same} there already."] if same else []
        told += [
            f"{photo.name}: {text}." for photo, face in zip(photos, faces, strict=True) for text in face.warnings
        ]
        return people, " ".join(told)

    def search(
        self, people: People | None, text: str, far: float | None, which: str, aligned: bool
    ) -> tuple[str, Searched | None]:
        """Who of the gallery a photo shows."""
        if not people:
            raise ValueError("the gallery is empty: enroll someone first")
        (photo,) = read_photos(text, "Photo to look for")
        face, crop = self._embed(photo, "The photo", which, aligned)
        searched = Searched(face, crop, people.search(face.embedding, MOST_MATCHES))
        return self.searched_at(searched, far), searched

    def searched_at(self, last: Searched | None, far: float | None) -> str:
        """The last search, at another threshold."""
        return "" if last is None else views.matches(last.face, last.crop, last.found, self.config, far)

    def look(self, text: str, which: str, aligned: bool) -> str:
        """What happens inside the model for one face."""
        (photo,) = read_photos(text, "Photo")
        picture = self._load(photo, "The photo")
        face = self._face(picture, "The photo", which, aligned)
        landmarks = None if face.face is None else [face.face.landmarks]
        processor = self.embedder.processor
        seen = look_at_image(self.embedder.embedder.model, processor, picture, landmarks)
        return views.look(images_page(self.embedder.embedder.model, ["Your photo"], [seen]), face)

    # ------------------------------------------------------------------------------------------------------- helpers

    def _crops(self, aligned: bool) -> bool:
        return aligned or not self.finds_faces

    def _load(self, photo: Photo, name: str) -> Image.Image:
        return self.embedder.processor.load(photo.content, name)

    def _face(self, picture: Image.Image, name: str, which: str, aligned: bool) -> EmbeddedFace:
        try:
            return self.embedder.embed(picture, aligned=self._crops(aligned), faces=which, workers=1)[0]  # type: ignore[arg-type]
        except ValueError as error:
            raise _renamed(error, {"image 0": name}) from error

    def _embed(self, photo: Photo, name: str, which: str, aligned: bool) -> tuple[EmbeddedFace, str]:
        picture = self._load(photo, name)
        face = self._face(picture, name, which, aligned)
        return face, self._crop(picture, face)

    def _crop(self, picture: Image.Image, face: EmbeddedFace) -> str:
        if face.face is not None:
            picture = self.embedder.processor.align(picture, face.face.landmarks)
        return views.picture_of(picture.resize((112, 112), Image.Resampling.BICUBIC))


def _stacked(faces: tuple[EmbeddedFace, ...]) -> Any:
    import numpy as np

    return np.stack([face.embedding for face in faces])


def _renamed(error: ValueError, names: dict[str, str]) -> ValueError:
    """The library's error in this page's words."""
    text = str(error).replace("Pass aligned=True", f'Tick "{ALIGNED}"')
    for ours, name in names.items():
        text = f"{name}{text.removeprefix(ours)}" if text.startswith(ours) else text
    return type(error)(text)
