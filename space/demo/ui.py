"""The page: three tabs on one model. Answers are made here of what the library finds; views.py draws them."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from adaptface import FaceEmbedder
from adaptface.explain import look_at_image
from adaptface.explain_page import images_page
from adaptface.faces import EmbeddedFace, Verification
from adaptface.files import without_folders
from demo import views
from demo.people import Found, People, clean_name
from demo.photos import MOST_AT_ONCE, MOST_BYTES, Photo, read_photos

HERE = Path(__file__).parent
FACES = [("the largest", "largest"), ("the most central", "central")]
ALIGNED = "My pictures are aligned face crops"
# What the library says to a program, and what the page says instead.
REWORDED = {
    "Pass aligned=True (--aligned)": f'Tick "{ALIGNED}"',
    "pass an aligned square face crop, or the photo with its five landmarks": (
        f'cut the face out as a square, or have it looked for: untick "{ALIGNED}"'
    ),
    ", anything else may be opened with PIL and passed as an image": "; save it as one of these first",
    "; run `git lfs pull`": "; choose the image itself",
}
MOST_MATCHES = 5
AT_ONCE = 2  # answers that are worked on at the same time
WAITING = 16  # clicks that may wait; more are told to try again
VISITS = 64  # visitors whose last answers and galleries are remembered; the longest idle one is forgotten first
MINUTE, HOUR = 60, 3600  # seconds

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
        added = people.enroll(name, np.stack([face.embedding for face in faces]), crops)
        same = len(photos) - added
        told = [f"{name}: {added} photo{'s' if added != 1 else ''} enrolled."]
        told += [f"{same} there already."] if same else []
        told += [f"{photo.name}: {text}." for photo, face in zip(photos, faces, strict=True) for text in face.warnings]
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
        landmarks = None if face.face is None else face.face.landmarks
        processor = self.embedder.processor
        seen = look_at_image(self.embedder.embedder.model, processor, picture, landmarks)
        return views.look(images_page(self.embedder.embedder.model, ["Your photo"], [seen]), face)

    # ------------------------------------------------------------------------------------------------------- helpers

    def _crops(self, aligned: bool) -> bool:
        return aligned or not self.finds_faces

    def _load(self, photo: Photo, name: str) -> Image.Image:
        try:
            return self.embedder.processor.load(photo.content, name)
        except ValueError as error:
            raise _renamed(error, {}) from error

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


def _renamed(error: ValueError, names: dict[str, str]) -> ValueError:
    """The library's error in this page's words."""
    text = str(error)
    for ours, words in REWORDED.items():
        text = text.replace(ours, words)
    for ours, name in names.items():
        text = f"{name}{text.removeprefix(ours)}" if text.startswith(ours) else text
    return type(error)(text)


# ------------------------------------------------------------------------------------------------------------- the page


def _guarded(handler: Handler, failed: Callable[[str], tuple[Any, ...]]) -> Handler:
    """`handler`, whose errors become one toast and an answer; what is no fault of the visitor's goes to the log."""

    def run(*values: Any) -> tuple[Any, ...]:
        try:
            return handler(*values)
        except ValueError as error:
            message = without_folders(str(error))  # none is there; should one ever be, it stays here
        except Exception:
            logging.exception("a request failed")
            message = "something went wrong on the server; try again, and tell who runs it if it stays"
        gr.Warning(html.escape(message), duration=8, title="That did not work")
        return failed(message)

    return run


def _reading(*fields: str | None) -> str:
    """The script that puts the photos of pickers in the place of inputs; None is an input that stays."""
    reads = ", ".join(
        f"v[{place}]" if name is None else f'await adaptface.photos("{name}", {MOST_BYTES})'
        for place, name in enumerate(fields)
    )
    return f"async (...v) => [{reads}]"


def _picker(name: str, title: str, several: bool = False) -> gr.Textbox:
    """A field to choose photos; returned is the input that carries them, empty but for the click that sends them."""
    hint = f"up to {MOST_AT_ONCE} photos" if several else "a photo"
    gr.HTML(
        f"""<label class="af-picker" data-name="{name}"><b>{title}</b><span class="af-note af-hint">Drop {hint} here, or
click to choose</span><ul></ul><input type="file" aria-label="{title}"{" multiple" if several else ""}>
<button type="button" aria-label="remove the choice" title="remove the choice">✕</button></label>""",
        js_on_load="adaptface.start(element);",
        elem_id=f"af-{name}",
    )
    return gr.Textbox(visible=False)


def build(demo: Demo, name: str, training_data: str | None) -> gr.Blocks:
    """The page.

    Args:
        demo: what its buttons do.
        name: what the page calls the model.
        training_data: name of what the model was trained on, if it is known.
    """
    rates, start = views.rates(demo.config), views.default_rate(demo.config)
    busy: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": AT_ONCE, "api_visibility": "private"}
    # through the queue, too: what gradio runs beside it comes by a route that the door shuts
    quick: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}

    with gr.Blocks(title="AdaptFace", analytics_enabled=False) as page:
        gr.HTML(
            '<div class="af"><h1>AdaptFace</h1><p>Face embeddings from a frozen DINOv2 and domain-aware adapters. '
            '<span class="af-note">Photos are dropped with the answer and never written to a disk. '
            "Use photos of people who agreed to it.</span></p></div>"
        )
        if warning := views.banner(demo.config, training_data, demo.finds_faces):
            gr.HTML(warning)
        far = gr.Radio(
            rates,
            value=start,
            label="False accept rate",
            info="How many pairs of different people may pass as one person; it sets the threshold.",
            visible=bool(rates),
            elem_id="af-far",
        )
        with gr.Accordion("Options", open=False, visible=demo.finds_faces):
            which = gr.Radio(FACES, value="largest", label="In a photo of several faces, take")
            aligned = gr.Checkbox(label=ALIGNED, info="Square pictures of one face; no face is looked for.")
        with gr.Tabs():
            with gr.Tab("Compare", elem_id="af-compare"):
                with gr.Row():
                    with gr.Column(min_width=260):
                        photo_a = _picker("a", "Photo A")
                    with gr.Column(min_width=260):
                        photo_b = _picker("b", "Photo B")
                compare = gr.Button("Compare", variant="primary")
                compared, last_compared = gr.HTML(elem_id="af-compared"), gr.State(time_to_live=HOUR)
            with gr.Tab("Search", elem_id="af-search"):
                people = gr.State(time_to_live=HOUR)
                with gr.Row():
                    with gr.Column(min_width=260):
                        gr.HTML('<div class="af"><h3>1. Enroll people</h3></div>')
                        who = gr.Textbox(label="Name", max_length=200)
                        enrolling = _picker("enroll", "Photos of this person", several=True)
                        enroll = gr.Button("Enroll", variant="primary")
                        enrolled = gr.HTML(elem_id="af-enrolled")
                    with gr.Column(min_width=260):
                        gr.HTML('<div class="af"><h3>2. Look for someone</h3></div>')
                        searching = _picker("query", "Photo to look for")
                        search = gr.Button("Search", variant="primary")
                        searched, last_searched = gr.HTML(elem_id="af-searched"), gr.State(time_to_live=HOUR)
                gr.HTML('<div class="af"><h3>Your gallery</h3></div>')
                listed = gr.HTML(views.gallery({}), elem_id="af-gallery")
                with gr.Row(elem_classes="af-bottom"):
                    gone = gr.Dropdown([], label="Person", interactive=True, min_width=160)
                    remove, clear = gr.Button("Remove", min_width=120), gr.Button("Clear all", min_width=120)
            with gr.Tab("Look inside", elem_id="af-inside"):
                gr.HTML(
                    '<div class="af af-note">Where each block and head of the model looks, for any patch of the face; '
                    "and how large the adapters' updates are.</div>"
                )
                looking = _picker("look", "Photo")
                look = gr.Button("Look inside", variant="primary")
                looked = gr.HTML(elem_id="af-looked")
        with gr.Accordion("Privacy, limits, and what this is not for", open=False):
            gr.HTML(views.about(name, training_data))

        def listing(held: People | None) -> tuple[Any, Any]:
            pictures = held.pictures if held is not None else {}
            return views.gallery(pictures), gr.update(choices=list(pictures), value=None)

        def add(held: People | None, *values: Any) -> tuple[Any, ...]:
            held, told = demo.enroll(held, *values)
            return held, f'<div class="af">{views.text(told)}</div>', *listing(held), "", "done"

        def drop(held: People | None, chosen: str | None) -> tuple[Any, ...]:
            if not chosen:
                raise ValueError("choose a person to remove first")
            if held is not None:
                held.remove(chosen)
            return held, *listing(held), "", "", None  # what was said and found may show the person

        def wipe(held: People | None) -> tuple[Any, ...]:
            if held is not None:
                held.clear()
            return None, *listing(None), "", "", None

        compare.click(
            _guarded(lambda *v: (*demo.compare(*v), None, None), lambda text: (views.fault(text), None, None, None)),
            [photo_a, photo_b, far, which, aligned],
            [compared, last_compared, photo_a, photo_b],
            js=_reading("a", "b", None, None, None),
            **busy,
        )
        enroll.click(
            _guarded(add, lambda text: (gr.skip(), views.fault(text), gr.skip(), gr.skip(), gr.skip(), None)),
            [people, who, enrolling, which, aligned],
            [people, enrolled, listed, gone, who, enrolling],
            js=_reading(None, None, "enroll", None, None),
            **busy,
        ).then(
            None,
            [enrolling],
            [enrolling],
            js='(state) => { if (state === "done") adaptface.clear("enroll"); return null; }',
        )
        search.click(
            _guarded(lambda *v: (*demo.search(*v), None), lambda text: (views.fault(text), None, None)),
            [people, searching, far, which, aligned],
            [searched, last_searched, searching],
            js=_reading(None, "query", None, None, None),
            **busy,
        )
        look.click(
            _guarded(lambda *v: (demo.look(*v), None), lambda text: (views.fault(text), None)),
            [looking, which, aligned],
            [looked, looking],
            js=_reading("look", None, None),
            **busy,
        )
        remove.click(
            _guarded(drop, lambda text: tuple(gr.skip() for _ in range(6))),
            [people, gone],
            [people, listed, gone, enrolled, searched, last_searched],
            **quick,
        )
        clear.click(wipe, [people], [people, listed, gone, enrolled, searched, last_searched], **quick)
        # After an hour gradio drops the people, but not what the page shows of them, which the server keeps as well.
        gr.Timer(MINUTE).tick(
            lambda held: wipe(None)[1:] if held is None else tuple(gr.skip() for _ in range(5)),
            [people],
            [listed, gone, enrolled, searched, last_searched],
            **quick,
        )
        far.input(
            lambda comparison, query, rate: (demo.compared_at(comparison, rate), demo.searched_at(query, rate)),
            [last_compared, last_searched, far],
            [compared, searched],
            **quick,
        )

        def forget(request: gr.Request) -> None:
            # gradio keeps what a visitor sent and saw for longer than the visit
            page.state_holder.session_data.pop(str(request.session_hash), None)

        page.unload(forget)
    page.validate_inputs = _told_without_content(page.validate_inputs)
    return page.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE)


def _told_without_content(check: Callable[..., None]) -> Callable[..., None]:
    """gradio's check of how many inputs a request has, whose error would write them, photos too, to the log."""

    def run(*values: Any) -> None:
        try:
            check(*values)
        except ValueError:
            raise ValueError("a request that is not of this version of the page: reload it") from None

    return run


def look_of_page() -> dict[str, Any]:
    """Theme, style and script, as `launch` takes them: nothing of them comes from another host."""
    system = ["system-ui", "sans-serif"]
    script = (HERE / "picker.js").read_text(encoding="utf-8")
    theme = gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"])
    return {
        # gradio's own grey of small print is too pale to read on white
        "theme": theme.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500"),
        "css_paths": [HERE / "style.css"],
        "head": f"<script>{script}</script>",
    }
