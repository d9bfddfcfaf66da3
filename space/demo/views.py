"""What the demo shows, as HTML. Every name and message is escaped; colours are those of gradio's theme, light or dark.

gradio fills a value into a template of its own: [`text`] also takes the characters away that such a template acts on.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from adaptface.card import SYNTHETIC
from adaptface.data.base import shown
from adaptface.faces import EmbeddedFace, Verification
from demo.people import MOST_PEOPLE, MOST_PHOTOS, Found
from demo.photos import MOST_AT_ONCE, MOST_BYTES

DEFAULT_FAR = 0.001  # if the model has it; else the lowest that it has
LEAST = -0.3  # where the scale starts, unless something lies below
_TEMPLATE = {ord(char): f"&#{ord(char)};" for char in "{}$`\\"}


def text(content: object) -> str:
    """Anything as the text of an element or of a quoted attribute."""
    return html.escape(shown(str(content))).translate(_TEMPLATE)


def picture_of(image: Image.Image) -> str:
    """A crop as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --------------------------------------------------------------------------------------------------- about the model


def rates(config: Any) -> list[tuple[str, float]]:
    """The false accept rates that the model has thresholds at: label and rate, the strictest last.

    Args:
        config: `AdaptFaceConfig`.
    """
    points = (config.thresholds or {}).get("operating_points", ())
    return [(_rate(far), far) for far in sorted({point["far"] for point in points}, reverse=True)]


def default_rate(config: Any) -> float | None:
    """The rate that is chosen at first; None of a model without thresholds."""
    found = [far for _, far in rates(config)]
    return DEFAULT_FAR if DEFAULT_FAR in found else min(found, default=None)


def _rate(far: float) -> str:
    return f"1 in {round(1 / far):,}" if abs(1 / far - round(1 / far)) < 1e-6 else f"{100 * far:g}%"


def banner(config: Any, training_data: str | None, finds_faces: bool) -> str:
    """What whoever looks at a result has to know of this model; empty if there is nothing.

    Args:
        config: `AdaptFaceConfig`.
        training_data (`str`, *optional*): name of what it was trained on.
        finds_faces (`bool`): whether there is a face detector.
    """
    notes = []
    measured = config.thresholds
    if training_data == SYNTHETIC:
        notes.append(
            "<b>Trained on rendered faces only.</b> This model is a demonstration: its answers on real people mean "
            "nothing."
        )
    if not measured:
        notes.append(
            "<b>No thresholds.</b> Nobody has measured from which similarity on two faces count as one person, so this "
            "demo shows similarities and decides nothing. Its makers can measure thresholds with "
            "<code>eval_benchmarks.py --write_thresholds</code>."
        )
    elif measured.get("data") == SYNTHETIC:
        notes.append("<b>Thresholds of rendered faces.</b> They were not measured on people, and do not hold for them.")
    if not finds_faces:
        notes.append(
            "<b>No face detector.</b> This server could not load one: only square, aligned face crops are taken."
        )
    return f'<div class="af af-banner" role="note">{"".join(f"<p>{note}</p>" for note in notes)}</div>' if notes else ""


def about(name: str, training_data: str | None) -> str:
    """The privacy notice, and what this is not for."""
    of = f"Model: <b>{text(name)}</b>" + (f", trained on {text(training_data)}" if training_data else "") + "."
    limit = f"{MOST_BYTES // 2**20} MB"
    return f"""<div class="af af-about">
<h3>Your photos</h3>
<ul>
<li>A photo goes from your browser to this server, is looked at in memory and is dropped with the answer. It is never
written to a disk, not kept, not used for training, and sent to nobody else.</li>
<li>What the page shows (the aligned faces, the numbers) and the people you enroll (embeddings and small pictures) stay
in this server's memory for your visit alone: no other visitor sees them. They are forgotten when you close or reload
the page, or lose the connection; the gallery also an hour after it was last changed, or when you clear it.</li>
<li>No cookies for tracking, no analytics, nothing from other hosts. Whoever runs this server or the network before it
may keep logs of its own.</li>
</ul>
<h3>Please</h3>
<ul>
<li>Use photos of people who agreed to it. Embeddings of faces are personal data, in many places of a protected
kind.</li>
<li>Decide nothing about anybody with this page. It does not notice a printed photo, a screen or a mask in front of the
camera (no presentation-attack detection), and its errors may differ between groups of people.</li>
</ul>
<h3>Limits</h3>
<p>Photos of up to {limit} and 80 million pixels, {MOST_AT_ONCE} at a time; JPEG, PNG, WebP, BMP, GIF, TIFF, PPM or JPEG
2000. A gallery holds {MOST_PEOPLE} people and {MOST_PHOTOS} photos. {of}</p>
</div>"""


# -------------------------------------------------------------------------------------------------------- the answers


def fault(message: str) -> str:
    """What went wrong, where the answer would be."""
    return f'<div class="af af-fault" role="alert">{text(message)}</div>'


def rejudged(answer: Verification, config: Any, far: float | None) -> Verification:
    """The same comparison at another false accept rate, one of the model's."""
    if far is None or far == answer.far or answer.source is None:
        return answer
    threshold = config.threshold(far)
    point = next(point for point in config.thresholds["operating_points"] if point["far"] == far)
    source = {**answer.source, **{key: value for key, value in point.items() if key not in ("far", "threshold")}}
    return replace(answer, same=answer.similarity > threshold, threshold=threshold, far=far, source=source)


def comparison(answer: Verification, crops: tuple[str, str], router: str) -> str:
    """Two faces side by side, and what is to be said of them.

    Args:
        answer: of `FaceEmbedder.verify`.
        crops: the aligned faces, data URIs.
        router: what to say where a face has no mix, see [`no_router`].
    """
    if answer.same is None:
        kind, word = "none", "No decision"
        said = f"The similarity is {answer.similarity:.3f}. This model has no threshold to compare it with."
    else:
        kind, word = ("same", "Same person") if answer.same else ("other", "Different people")
        side = "above" if answer.same else "not above"
        said = f"The similarity {answer.similarity:.3f} is {side} the threshold {answer.threshold:.3f}."
    probability = ""
    if answer.match_probability is not None:
        probability = (
            f"<p>Chance of one person, if both were as likely before: <b>{_percent(answer.match_probability)}</b>.</p>"
        )
    faces = "".join(
        _face(title, crop, face, router)
        for title, crop, face in zip(("Photo A", "Photo B"), crops, (answer.first, answer.second), strict=True)
    )
    return f"""<div class="af af-answer">
<p class="af-verdict af-{kind}">{word}</p>
<p>{said}</p>{probability}
{_scale(answer.similarity, answer.threshold)}
{_source(answer)}
<div class="af-pair">{faces}</div>
</div>"""


def _percent(share: float) -> str:
    """A probability, never rounded to a certainty."""
    if share > 0.999:
        return "over 99.9%"
    return "under 0.1%" if share < 0.001 else f"{100 * share:.1f}%"


def _scale(similarity: float, threshold: float | None) -> str:
    """Both on one line, from `LEAST` or -1 to 1."""
    low = LEAST if min(similarity, threshold if threshold is not None else 1.0) >= LEAST else -1.0

    def mark(kind: str, value: float, words: str) -> str:
        place = 100 * (value - low) / (1 - low)
        return (
            f'<i class="af-at af-{kind}" style="left:{place:.2f}%"></i><span class="af-label af-{kind}" '
            f'style="left:{place:.2f}%;transform:translateX(-{place:.2f}%)">{words}</span>'
        )

    marks, said = mark("similarity", similarity, f"similarity <b>{similarity:.3f}</b>"), ""
    if threshold is not None:
        marks += mark("threshold", threshold, f"threshold <b>{threshold:.3f}</b>")
        said = f", threshold {threshold:.3f}"
        marks += f'<i class="af-zone" style="left:{100 * (threshold - low) / (1 - low):.2f}%"></i>'
    ends = "".join(
        f'<span class="af-end" style="left:{100 * (end - low) / (1 - low):.2f}%;'
        f'transform:translateX(-{100 * (end - low) / (1 - low):.2f}%)">{end:g}</span>'
        for end in (low, 0.0, 0.5, 1.0)
    )
    label = f"similarity {similarity:.3f}{said}, on a scale from {low:g} to 1"
    return f'<div class="af-scale" role="img" aria-label="{label}"><div class="af-line">{marks}</div>{ends}</div>'


def _source(answer: Verification) -> str:
    """Where the threshold comes from."""
    if answer.source is None or answer.far is None:
        return ""
    source = answer.source
    parts = [f"At this threshold {_rate(answer.far)} pairs of different people is taken for one person"]
    if "tar" in source:
        parts.append(f", and {100 * source['tar']:.1f}% of the pairs of one person are found")
    parts.append(f": measured on {text(source.get('benchmark', 'pairs that are not named'))}")
    counts = [f"{source[key]:,} {key}" for key in ("genuine", "impostor") if isinstance(source.get(key), int)]
    parts.append(f" ({' and '.join(counts)} pairs)" if counts else "")
    parts.append(f", {text(source['date'])}" if "date" in source else "")
    return f'<p class="af-note">{"".join(parts)}. It holds for pictures like those; yours may differ.</p>'


def _face(title: str, crop: str, face: EmbeddedFace, router: str) -> str:
    warned = _warnings(face)
    facts = f"quality {face.quality:.2f}"
    if face.face is not None:
        facts += f" · {face.face.eye_distance:.0f} px between the eyes · found with a score of {face.face.score:.2f}"
    mix = _mix(face.domain_mix) if face.domain_mix else f'<p class="af-note">{text(router)}</p>'
    return f"""<figure><div class="af-side"><img src="{crop}" width="168" height="168" alt="{title}, the aligned face">
<figcaption><b>{title}</b><span class="af-note">{facts}</span></figcaption></div>{warned}{mix}</figure>"""


def _warnings(face: EmbeddedFace) -> str:
    if not face.warnings:
        return ""
    return f'<ul class="af-warnings">{"".join(f"<li>{text(warning)}</li>" for warning in face.warnings)}</ul>'


def _mix(mix: Mapping[str, float]) -> str:
    bars = "".join(
        f'<span>{text(name)}</span><span class="af-track"><i style="width:{100 * weight:.1f}%"></i></span>'
        f"<b>{100 * weight:.1f}%</b>"
        for name, weight in mix.items()
    )
    return f'<p class="af-note">The router mixed the experts:</p><div class="af-bars">{bars}</div>'


def no_router(config: Any) -> str:
    """What to say in place of a mix, of a model that has no router."""
    if config.adaptation != "lora":
        return "This model has no experts to mix."
    return f"This model has one expert, {config.domains[0]}: nothing is mixed."


def gallery(people: Mapping[str, Sequence[str]]) -> str:
    """Who is enrolled: names and faces, data URIs."""
    if not people:
        return '<div class="af af-note">Nobody is enrolled yet.</div>'
    cards = "".join(
        f'<li><span class="af-faces">{"".join(_thumb(picture) for picture in pictures)}</span>'
        f'<span class="af-name">{text(name)}</span></li>'
        for name, pictures in people.items()
    )
    return f'<div class="af"><ul class="af-people">{cards}</ul></div>'


def _thumb(picture: str, side: int = 48) -> str:
    return f'<img src="{picture}" width="{side}" height="{side}" alt="">'


def matches(face: EmbeddedFace, crop: str, found: Sequence[Found], config: Any, far: float | None) -> str:
    """The people of the gallery that a face is most like, those above the threshold marked.

    Args:
        face: the one that was looked for.
        crop: it, aligned, a data URI.
        found: the most similar first.
        config: `AdaptFaceConfig`.
        far: false accept rate, one of the model's; None of a model without thresholds.
    """
    threshold = None if far is None else config.threshold(far)
    warned = _warnings(face)
    if threshold is None:
        kind, word = "none", "No decision"
        said = "This model has no threshold; these are the most similar people of your gallery."
    elif found and found[0].similarity > threshold:
        kind, word = "same", text(found[0].name)
        above = sum(match.similarity > threshold for match in found)
        said = (
            f"{above} of the most similar people {'is' if above == 1 else 'are'} above the threshold {threshold:.3f}."
        )
    else:
        kind, word = "other", "Nobody in the gallery"
        said = f"No one is above the threshold {threshold:.3f}."
    if far is not None:
        said += (
            f" It lets {_rate(far)} pairs of different people pass; with more people in the gallery, a false match "
            "becomes likelier."
        )
    rows = "".join(_match(match, threshold) for match in found)
    return f"""<div class="af af-answer">
<div class="af-side"><img src="{crop}" width="112" height="112" alt="the face that was looked for, aligned">
<div><p class="af-verdict af-{kind}">{word}</p><p>{said}</p></div></div>{warned}
<ol class="af-matches">{rows}</ol></div>"""


def _match(match: Found, threshold: float | None) -> str:
    above = threshold is not None and match.similarity > threshold
    side = "" if threshold is None else f" · {'above' if above else 'below'} the threshold"
    return f"""<li class="{"af-above" if above else ""}">{_thumb(match.picture, 72)}<div>
<span class="af-name">{text(match.name)}</span>
<span class="af-note">similarity <b>{match.similarity:.3f}</b>{side}</span>
{_scale(match.similarity, threshold)}</div></li>"""


def look(page: str, face: EmbeddedFace) -> str:
    """A page of `adaptface.explain_page`, in a frame of its own that can reach nothing of this one.

    Args:
        page: the page.
        face: the face that it is of, for its warnings.
    """
    content = html.escape(page).translate(_TEMPLATE)
    return f"""<div class="af">{_warnings(face)}
<iframe class="af-look" sandbox="allow-scripts" referrerpolicy="no-referrer" title="inside the model"
srcdoc="{content}"></iframe></div>"""
