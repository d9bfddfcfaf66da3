"""The demo without gradio: what it draws, what it takes, whom it remembers, what it shuts."""

import asyncio
import base64
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adaptface.faces import EmbeddedFace, Verification
from configuration_adaptface import AdaptFaceConfig
from demo import door, views
from demo.door import Door
from demo.people import MOST_PEOPLE, MOST_PHOTOS, People
from demo.photos import MOST_BYTES, MOST_OF_REQUEST, read_photos
from tests.test_explain_page import Parsed

ROOT = Path(__file__).resolve().parents[1]
EVIL = "\"'><img src=x onerror=alert(1)> ${1+1} {{7}} `x`"
CROP = "data:image/jpeg;base64,AA=="
POINTS = [{"far": 0.01, "threshold": 0.3, "tar": 0.9}, {"far": 0.001, "threshold": 0.45, "tar": 0.8}]


@pytest.fixture
def config(tiny_config: AdaptFaceConfig) -> AdaptFaceConfig:
    tiny_config.thresholds = {
        "benchmark": EVIL,
        "data": "files",
        "genuine": 1200,
        "impostor": 3400,
        "date": "2026-01-02",
        "operating_points": POINTS,
        "calibration": {"slope": 9.0, "intercept": -3.0},
    }
    return tiny_config


def face(*warnings: str, mix: dict[str, float] | None = None) -> EmbeddedFace:
    return EmbeddedFace(0, np.array([1.0, 0.0], np.float32), 17.25, mix, None, warnings)


def answer(similarity: float, **more: Any) -> Verification:
    source = {"benchmark": EVIL, "genuine": 1200, "impostor": 3400, "date": "2026-01-02", "tar": 0.9}
    first, second = face(EVIL, mix={"general": 0.25, EVIL: 0.75}), face()
    known = {"same": similarity > 0.3, "threshold": 0.3, "far": 0.01, "source": source, "match_probability": 0.5}
    return Verification(similarity=similarity, first=first, second=second, warnings=(), **{**known, **more})


# --- what it draws --------------------------------------------------------------------------------------------------


def places(page: Parsed) -> dict[str, float]:
    """Where the marks of a scale stand, in percent of its width."""
    marks = [a for tag, a in page.elements if tag == "i" and a.get("class", "").startswith("af-at")]
    return {a["class"].split("af-")[-1]: float(re.findall(r"left:([\d.]+)%", a["style"])[0]) for a in marks}


@pytest.mark.parametrize(("similarity", "low"), [(0.612, -0.3), (-0.05, -0.3), (-0.7, -1.0)])
def test_a_comparison_is_drawn_to_scale(similarity: float, low: float) -> None:
    page = Parsed(views.comparison(answer(similarity), (CROP, CROP), "no experts"))
    wanted = {"similarity": similarity, "threshold": 0.3}
    assert places(page) == {name: pytest.approx(100 * (x - low) / (1 - low), abs=0.01) for name, x in wanted.items()}
    assert ("Same person" in page.text()) == (similarity > 0.3) != ("Different people" in page.text())
    assert page.of("div", role="img")[0]["aria-label"].startswith(f"similarity {similarity:.3f}, threshold 0.300")
    bars = [a["style"] for tag, a in page.elements if tag == "i" and a.get("style", "").startswith("width")]
    assert bars == ["width:25.0%", "width:75.0%"] and "no experts" in page.text()


def test_names_and_messages_are_escaped() -> None:
    people = {EVIL: [CROP]}
    drawn = [
        views.comparison(answer(0.5), (CROP, CROP), EVIL), views.fault(EVIL), views.gallery(people),
        views.about(EVIL, EVIL),
    ]  # fmt: skip
    for content in drawn:
        page = Parsed(content)
        assert not page.of("img", src="x") and not re.search(r"[${}`\\]", content)
        assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
        assert EVIL in page.text()


def test_a_page_in_a_frame_is_whole_and_shut_in() -> None:
    inner = f'<p title="a">{EVIL}</p><script>const a = `${{1}}`;</script>'
    page = Parsed(views.look(inner, face("dark")))
    (frame,) = page.of("iframe")
    assert frame["srcdoc"] == inner and frame["sandbox"] == "allow-scripts" and "dark" in page.text()


def test_without_a_threshold_nothing_is_decided(tiny_config: AdaptFaceConfig) -> None:
    nothing = answer(0.9, same=None, threshold=None, far=None, source=None, match_probability=None)
    page = Parsed(views.comparison(nothing, (CROP, CROP), ""))
    assert (
        "No decision" in page.text() and "threshold" not in places(page) and "%" not in page.text().split("general")[0]
    )
    assert views.rejudged(nothing, tiny_config, None) is nothing and views.default_rate(tiny_config) is None
    assert "No thresholds" in views.banner(tiny_config, None, True)


def test_the_rate_moves_the_threshold(config: AdaptFaceConfig) -> None:
    assert views.rates(config) == [("1 in 100", 0.01), ("1 in 1,000", 0.001)] and views.default_rate(config) == 0.001
    config.thresholds["operating_points"] = [{"far": 0.07, "threshold": 0.1}]
    assert views.rates(config) == [("7%", 0.07)] and views.default_rate(config) == 0.07
    config.thresholds["operating_points"] = POINTS
    at = views.rejudged(answer(0.4), config, 0.001)
    assert (at.same, at.threshold, at.far) == (False, 0.45, 0.001)
    assert at.source is not None and (at.source["tar"], at.source["genuine"]) == (0.8, 1200)
    assert "80.0% of the pairs of one person" in views.comparison(at, (CROP, CROP), "")


@pytest.mark.parametrize(("share", "said"), [(0.99995, "over 99.9%"), (0.0, "under 0.1%"), (0.273, "27.3%")])
def test_no_probability_is_a_certainty(share: float, said: str) -> None:
    assert f"<b>{said}</b>" in views.comparison(answer(0.5, match_probability=share), (CROP, CROP), "")


def test_the_banner_tells_what_weighs(config: AdaptFaceConfig) -> None:
    assert views.banner(config, "faces", True) == ""
    assert "rendered faces only" in views.banner(config, "synthetic", True)
    assert "No face detector" in views.banner(config, "faces", False)
    config.thresholds["data"] = "synthetic"
    assert "not measured on people" in views.banner(config, "faces", True)


# --- what it takes --------------------------------------------------------------------------------------------------


def sent(*files: tuple[Any, Any, Any]) -> str:
    return json.dumps([{"name": name, "size": size, "data": data} for name, size, data in files])


def test_photos_arrive_byte_by_byte() -> None:
    content = bytes(range(256)) * 3
    text = sent(("a.png", 768, base64.b64encode(content).decode()), ("b.png", 0, ""))
    assert [(photo.name, photo.content) for photo in read_photos(text, "Photos", 2)] == [
        ("a.png", content),
        ("b.png", b""),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "Photos: choose a photo first"),
        ("[]", "Photos: choose a photo first"),
        ("no JSON", "no list of photos"),
        ('{"name": 1}', "no list of photos"),
        ("[" * 100_000, "no list of photos"),
        ('[{"name": "a", "size": 1e999, "data": null}]', "no list of photos"),
        ('[{"name": "a", "size": 1, "data": 5}]', "no list of photos"),
        (sent(("a", 1, "AA=="), ("b", 1, "AA==")), "2 photos were chosen; take 1 at a time"),
        (sent(("a", MOST_BYTES + 1, None)), "a is 10.0 MB large"),
        (sent(("a", 1, "A" * (MOST_BYTES * 4 // 3 + 8))), "may have 10 MB"),  # says less than it is
        (sent(("a", 1, None)), "a: the browser could not read this file"),
        (sent(("a", 1, "?!")), "a: the browser could not read this file"),
    ],
)
def test_other_photos_are_refused(text: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_photos(text, "Photos")


# --- whom it remembers ----------------------------------------------------------------------------------------------


def embeddings(*seeds: int) -> np.ndarray:
    rows = np.stack([np.random.default_rng(seed).normal(size=8) for seed in seeds])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_people_are_found_with_the_nearest_picture_and_forgotten() -> None:
    people = People(8)
    assert people.enroll("  Ada \n", embeddings(1), ["a1"]) == 1
    assert people.enroll("Ada", embeddings(2), ["a2"]) == 1
    assert people.enroll("Ada", embeddings(2), ["again"]) == 0
    assert people.enroll("Bob", embeddings(3), ["b"]) == 1
    assert people.pictures == {"Ada": ["a1", "a2"], "Bob": ["b"]}
    best, other = people.search(embeddings(2)[0], 5)
    assert (best.name, best.picture, other.name) == ("Ada", "a2", "Bob")
    assert best.similarity == pytest.approx(1) and other.similarity == pytest.approx(
        float(embeddings(2)[0] @ embeddings(3)[0]), abs=1e-6
    )
    people.remove("Ada")
    people.remove("Ada")
    assert people.pictures == {"Bob": ["b"]} and list(people._pictures.values()) == ["b"]
    people.clear()
    assert len(people) == 0 and people._pictures == {} and not people._gallery._vectors.any()


def test_a_gallery_is_small() -> None:
    people = People(8)
    for number in range(MOST_PEOPLE):
        people.enroll(str(number), embeddings(number), ["x"])
    with pytest.raises(ValueError, match=f"holds {MOST_PEOPLE} people"):
        people.enroll("one more", embeddings(99), ["x"])
    people.enroll("0", embeddings(*range(100, 100 + MOST_PHOTOS - MOST_PEOPLE)), ["x"] * (MOST_PHOTOS - MOST_PEOPLE))
    with pytest.raises(ValueError, match=f"holds {MOST_PHOTOS} photos"):
        people.enroll("0", embeddings(99), ["x"])
    for name, message in (("", "a name first"), (" \n", "a name first"), ("x" * 61, "61 characters")):
        with pytest.raises(ValueError, match=message):
            people.enroll(name, embeddings(99), ["x"])


# --- what it shuts --------------------------------------------------------------------------------------------------


def asked(
    method: str, path: str, parts: list[bytes], most: int = 10, **scope: Any
) -> tuple[int, dict[str, str], bytes | None]:
    """What a request is answered, and the body that came through the door, None if none did."""
    came: list[bytes] = []
    said: list[dict[str, Any]] = []
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        came.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Referrer-Policy", b"unsafe-url")]})
        await send({"type": "http.response.body", "body": b"fine"})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        said.append(message)

    request = {"type": "http", "method": method, "path": path, "headers": [], **scope}
    asyncio.run(Door(app, most)(request, receive, send))
    headers = {name.decode().lower(): value.decode() for name, value in said[0]["headers"]}
    return said[0]["status"], headers, came[0] if came else None


def test_what_is_open_comes_through_whole() -> None:
    status, headers, body = asked("POST", "/gradio_api/queue/join", [b"12345", b"67890"])
    assert (status, body) == (200, b"1234567890")
    assert headers["referrer-policy"] == "no-referrer" and headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'" and policy["object-src"] == "'none'" and "connect-src" not in policy
    words = {word for sources in policy.values() for word in sources.split()}
    assert words == {"'self'", "'none'", "'unsafe-inline'", "'unsafe-eval'", "data:", "blob:"}  # no other host
    assert asked("GET", "/", [])[0] == asked("GET", "/assets/index-A_b.js", [])[0] == 200
    assert asked("GET", "/at/config", [], root_path="/at")[0] == 200
    assert asked("GET", "/atconfig", [], root_path="/at")[0] == 404


def test_a_large_request_is_turned_away() -> None:
    assert asked("POST", "/gradio_api/queue/join", [b"123456", b"78901"])[::2] == (413, None)
    long = [(b"content-length", b"11")]
    assert asked("POST", "/gradio_api/queue/join", [], headers=long)[::2] == (413, None)
    assert asked("POST", "/gradio_api/queue/join", [], headers=[(b"content-length", b"-1")])[0] == 413


def test_bodies_are_bounded_together_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "SECONDS", 0.2)
    said: dict[str, int] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    gate = Door(app, 10)
    request = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": []}

    async def ask(who: str, *messages: dict[str, Any]) -> None:
        left = list(messages)

        async def receive() -> dict[str, Any]:
            if not left:
                await asyncio.sleep(9)  # the rest never comes
            return left.pop(0)

        async def send(message: Any) -> None:
            said.setdefault(who, message.get("status", 0))

        await gate(request, receive, send)

    half = {"type": "http.request", "body": b"1234567890", "more_body": True}
    whole = {"type": "http.request", "body": b"1234567890", "more_body": False}

    async def go() -> None:
        slow = [asyncio.create_task(ask(f"slow {number}", half)) for number in range(door.AT_ONCE)]
        await asyncio.sleep(0.05)
        await ask("while they wait", whole)
        await asyncio.gather(*slow)
        await ask("left", half, {"type": "http.disconnect"})
        await ask("large", half, half)
        for number in range(3 * door.AT_ONCE):
            await ask(f"later {number}", whole)

    asyncio.run(go())
    assert said.pop("while they wait") == 503 and said.pop("left") == 408 and said.pop("large") == 413
    assert {status for who, status in said.items() if who.startswith("slow")} == {408}
    assert {status for who, status in said.items() if who.startswith("later")} == {200}


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/upload",
        "/gradio_api/file=/etc/hostname",
        "/static/../x",
        "/assets/..%2fx",
        "/docs",
        "//",
        "/gradio_api/queue/join",
    ],
)
def test_the_rest_is_shut(path: str) -> None:
    assert asked("GET", path, [])[::2] == (404, None)


# --- what a Space needs ---------------------------------------------------------------------------------------------


def ranges(lines: list[str]) -> dict[str, str]:
    return dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in lines if line and not line.startswith("#"))  # type: ignore[union-attr]


def test_requirements_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    ours = ranges([*project["dependencies"], *extras["faces"], *extras["gallery"]])
    demo = ranges((ROOT / "space/requirements.txt").read_text(encoding="utf-8").splitlines())
    assert {name: wanted for name, wanted in demo.items() if name != "gradio"} == {
        n: ours[n] for n in demo if n != "gradio"
    }
    tested = ranges((ROOT / "constraints-space.txt").read_text(encoding="utf-8").splitlines())
    assert demo.keys() <= {name.lower() for name in tested} | {"huggingface_hub"}
    card = (ROOT / "space/README.md").read_text(encoding="utf-8")
    assert f"sdk_version: {tested['gradio'].removeprefix('==')}\n" in card
    assert MOST_OF_REQUEST < 64 * 2**20


def test_matches_are_marked(config: AdaptFaceConfig) -> None:
    found: Any = [
        SimpleNamespace(name=EVIL, similarity=0.4, picture=CROP),
        SimpleNamespace(name="Bob", similarity=0.2, picture=CROP),
    ]
    page = Parsed(views.matches(face("dark"), CROP, found, config, 0.01))
    assert [a["class"] for a in page.of("li") if "class" in a] == ["af-above", ""] and EVIL in page.text()
    assert "Nobody in the gallery" in views.matches(face(), CROP, found, config, 0.001)
    config.thresholds = None
    assert "No decision" in views.matches(face(), CROP, found, config, None)
