"""The demo in a real browser: what it answers, what it refuses, and what it never gives away or keeps."""

import base64
import http.client
import io
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from adaptface.data.synthetic import Nuisance, render
from adaptface.detection import FILE, FaceDetector
from adaptface.embedders import ModelEmbedder
from adaptface.faces import FaceEmbedder, Verification
from image_processing_adaptface import AdaptFaceImageProcessor
from tests.conftest import build_tiny_model
from tests.hub_server import HubServer

pytestmark = [pytest.mark.slow, pytest.mark.browser]

ROOT = Path(__file__).resolve().parents[1]
CLIENT = Path(__file__).with_name("space_client.py")
CHROMIUM = Path("/usr/bin/chromium")
ALIGNED = "My pictures are aligned face crops"
EVIL = "<img src=x onerror=alert(1)> & ${1+1} {{7}} `x`"


# --- pictures -------------------------------------------------------------------------------------------------------


def photo(*people: int, side: int = 224, **nuisance: float) -> Image.Image:
    """Rendered faces side by side, large enough for the detector; the first one is the largest."""
    picture = Image.new("RGB", (side * 2 * len(people), side * 2), (120, 130, 140))
    for place, person in enumerate(people):
        size = side if place == 0 else side * 3 // 4
        face = Image.fromarray(render(person, Nuisance(**nuisance), size))  # type: ignore[arg-type]
        picture.paste(face, (side * 2 * place + side // 2, side // 2))
    return picture


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


FACE, SAME, OTHER = png(photo(1)), png(photo(1, smile=0.5)), png(photo(2))


# --- what is tested with --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter with the demo's libraries and playwright."""
    found = os.environ.get("ADAPTFACE_SPACE_PYTHON")
    if found is None:
        pytest.skip("no gradio: set ADAPTFACE_SPACE_PYTHON to an interpreter with constraints-space.txt")
    if not CHROMIUM.is_file():
        pytest.skip(f"no browser: there is no {CHROMIUM}; apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def detector() -> Path:
    """The detector's file."""
    faces = os.environ.get("ADAPTFACE_REAL_FACES")
    found = os.environ.get("ADAPTFACE_DETECTOR") or (str(Path(faces).parent / "models" / FILE) if faces else "")
    if not Path(found).is_file():
        pytest.skip("no face detector: set ADAPTFACE_DETECTOR to its file, or ADAPTFACE_REAL_FACES")
    return Path(found)


@pytest.fixture(scope="module")
def embedder(tiny_backbone_dir: Path, detector: Path) -> FaceEmbedder:
    """The model, in this process; with thresholds at which the two people are one at 1 in 100, not at 1 in 1,000."""
    embedder = FaceEmbedder(
        ModelEmbedder(build_tiny_model(tiny_backbone_dir, seed=1), AdaptFaceImageProcessor(size=56)),
        FaceDetector(detector),
    )
    between = embedder.verify(FACE, OTHER, threshold=0.5).similarity
    genuine = embedder.verify(FACE, SAME, threshold=0.5).similarity
    assert between < genuine - 0.002
    embedder.config.thresholds = {
        "benchmark": "rendered pairs",
        "data": "files",
        "genuine": 1200,
        "impostor": 3400,
        "date": "2026-01-02",
        "operating_points": [
            {"far": 0.01, "threshold": between - 0.05, "tar": 0.9},
            {"far": 0.001, "threshold": (between + genuine) / 2, "tar": 0.8},
        ],
        "calibration": {"slope": 5.0, "intercept": -2.0},
    }
    return embedder


@pytest.fixture(scope="module")
def model(embedder: FaceEmbedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-faces"
    embedder.embedder.model.save_pretrained(folder)
    embedder.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Space, which knows nothing of this checkout."""
    folder = tmp_path_factory.mktemp("spaces") / "staged"
    command = [sys.executable, str(ROOT / "space/stage.py"), str(folder), "--model", "you/AdaptFace"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Server:
    """A running demo, and a place of its own for whatever it writes."""

    def __init__(self, port: int, home: Path, log: Path) -> None:
        self.port, self.home, self.log = port, home, log
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def files(self) -> set[str]:
        """Everything below its home, its temporary folder included."""
        return {str(path) for path in self.home.rglob("*") if path.is_file()}


@contextmanager
def serving(python: str, staged: Path, model: str, home: Path, **more: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = home / "tmp"
    temporary.mkdir(parents=True)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    env = kept | {
        "HOME": str(home), "TMPDIR": str(temporary), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "GRADIO_SERVER_PORT": str(port),
        "PYTHONDONTWRITEBYTECODE": "1", "ADAPTFACE_MODEL": model,
        "MPLCONFIGDIR": str(staged.parent / "matplotlib"),  # a list of fonts
    } | more  # fmt: skip
    log = home / "log"
    with log.open("wb") as out:
        process = subprocess.Popen([python, str(staged / "app.py")], cwd=home, env=env, stdout=out, stderr=out)
    server = Server(port, home, log)
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            try:
                if server.ask("GET", "/config")[0] == 200:
                    break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"the demo did not start: {log.read_text()}")
        yield server
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def server(
    python: str, staged: Path, model: Path, detector: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    with serving(python, staged, str(model), home, ADAPTFACE_DETECTOR=str(detector)) as running:
        yield running


class Browser:
    """The client, as a function."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process

    def __call__(self, who: str, do: str, **job: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"who": who, "do": do, **job}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def choose(self, who: str, field: str, *files: bytes, name: str = "holiday.png") -> None:
        self(who, "choose", field=field, files=[{"name": name, "data": base64.b64encode(f).decode()} for f in files])


@pytest.fixture(scope="module")
def browser(python: str) -> Iterator[Browser]:
    with subprocess.Popen([python, str(CLIENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Browser(process)
        assert process.stdin
        process.stdin.close()


@pytest.fixture
def visit(browser: Browser, server: Server, model: Path, staged: Path) -> Iterator[str]:
    """A visitor with the page open. Afterwards: nothing was asked of another host, no folder of the server was told,
    nothing was written to its disk, and the browser met no error."""
    before = server.files()
    browser("ada", "open", url=server.url)
    yield "ada"
    seen = browser("ada", "seen")
    hosts = {urlsplit(request.split(" ", 1)[1]).netloc for request in seen["requests"] if " http" in request}
    assert hosts == {f"127.0.0.1:{server.port}"}
    assert seen["errors"] == []
    told = seen["bodies"] | {"the page": seen["page"]}
    assert [url for url, text in told.items() if "/queue/data" in url and "process_completed" in text]
    for url, text in told.items():
        for folder in (server.home, model.parent, staged.parent, ROOT, Path(sys.prefix), Path.home()):
            assert str(folder) not in text, f"{url} tells of {folder}"
        assert not re.search(r"[\"'\s(=]/(tmp|root|home|var|usr|work)/", text), url
    assert server.files() == before
    browser("ada", "close")


# --- what it answers ------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d{3}", text)]


def expected(answer: Verification) -> list[float]:
    assert answer.threshold is not None
    return [round(answer.similarity, 3), round(answer.threshold, 3)]


def test_two_photos_are_compared(browser: Browser, visit: str, embedder: FaceEmbedder) -> None:
    browser.choose(visit, "a", FACE)
    browser.choose(visit, "b", OTHER)
    strict = embedder.verify(FACE, OTHER, far=0.001)
    found = browser(visit, "press", name="Compare", answer="#af-compared")
    assert found["text"].startswith("Different people") and found["toasts"] == []
    assert numbers(found["text"])[:2] == pytest.approx(expected(strict), abs=0.0011)
    assert (
        "1 in 1,000 pairs" in found["text"]
        and "rendered pairs (1,200 genuine and 3,400 impostor pairs)" in found["text"]
    )
    assert strict.match_probability is not None and f"{100 * strict.match_probability:.1f}%" in found["text"]
    for face in (strict.first, strict.second):
        assert face.domain_mix and all(f"{100 * weight:.1f}%" in found["text"] for weight in face.domain_mix.values())
        assert face.face is not None
        assert f"quality {face.quality:.2f} · {face.face.eye_distance:.0f} px between the eyes" in found["text"]
    crop = base64.b64decode(re.findall(r'src="data:image/jpeg;base64,([^"]+)"', found["html"])[0])
    shown = np.asarray(Image.open(io.BytesIO(crop)), dtype=float)
    aligned = embedder.processor.align(FACE, strict.first.face.landmarks)  # type: ignore[union-attr]
    assert np.abs(shown - np.asarray(aligned, dtype=float)).mean() < 5

    loose = embedder.verify(FACE, OTHER, far=0.01)  # the same photos, without sending them again
    found = browser(visit, "press", name="1 in 100", answer="#af-compared")
    assert found["text"].startswith("Same person") and "1 in 100 pairs" in found["text"]
    assert numbers(found["text"])[:2] == pytest.approx(expected(loose), abs=0.0011)

    browser.choose(visit, "b", SAME)
    browser(visit, "press", name="1 in 1,000", answer="#af-compared")
    found = browser(visit, "press", name="Compare", answer="#af-compared")
    assert found["text"].startswith("Same person")


def test_of_several_faces_one_is_taken_and_that_is_said(browser: Browser, visit: str) -> None:
    two = png(photo(1, 2))
    browser.choose(visit, "a", two)
    browser.choose(visit, "b", FACE)
    found = browser(visit, "press", name="Compare", answer="#af-compared")
    assert found["text"].startswith("Same person") and found["toasts"] == []
    assert "2 faces were found; the largest one was taken" in found["text"]


def test_aligned_crops_are_taken_as_they_are(browser: Browser, visit: str, embedder: FaceEmbedder) -> None:
    crops = [png(Image.fromarray(render(person, Nuisance(), 112))) for person in (1, 2)]
    browser.choose(visit, "a", crops[0])
    browser.choose(visit, "b", crops[1])
    for name in ("Options", ALIGNED):
        browser(visit, "click", name=name)
    found = browser(visit, "press", name="Compare", answer="#af-compared")
    answer = embedder.verify(*crops, far=0.001, aligned=True)
    assert numbers(found["text"])[:2] == pytest.approx(expected(answer), abs=0.0011)
    assert "between the eyes ·" not in found["text"]


def test_options_hold_in_every_tab(browser: Browser, visit: str, embedder: FaceEmbedder) -> None:
    """The face in the middle of three, and pictures in which no face would be found."""
    three = png(photo(1, 2, 3))
    for name in ("Options", "the most central"):
        browser(visit, "click", name=name)
    browser.choose(visit, "a", three)
    browser.choose(visit, "b", OTHER)
    found = browser(visit, "press", name="Compare", answer="#af-compared")
    answer = embedder.verify(three, OTHER, far=0.001, faces="central")
    assert numbers(found["text"])[0] == pytest.approx(answer.similarity, abs=0.0011)
    assert "the most central one was taken" in found["text"]
    browser(visit, "tab", name="Search")
    browser(visit, "fill", label="Name", text="Grace")
    browser.choose(visit, "enroll", OTHER)
    browser(visit, "press", name="Enroll", answer="#af-enrolled")
    browser.choose(visit, "query", three)
    found = browser(visit, "press", name="Search", answer="#af-searched")
    assert f"similarity {answer.similarity:.3f}" in found["text"] and "1 in 1,000 pairs" in found["text"]
    loose = browser(visit, "press", name="1 in 100", answer="#af-searched")["text"]
    thresholds = [embedder.config.threshold(far) for far in (0.001, 0.01)]
    for text, threshold in zip((found["text"], loose), thresholds, strict=True):
        assert f"threshold {threshold:.3f}" in text

    browser(visit, "click", name=ALIGNED)
    square = png(Image.new("RGB", (112, 112), (90, 140, 60)))
    browser(visit, "fill", label="Name", text="Square")
    browser.choose(visit, "enroll", square)
    assert browser(visit, "press", name="Enroll", answer="#af-enrolled")["text"].startswith("Square: 1 photo enrolled")
    browser.choose(visit, "query", square)
    assert browser(visit, "press", name="Search", answer="#af-searched")["text"].startswith("Square")
    browser(visit, "tab", name="Look inside")
    browser.choose(visit, "look", square)
    assert browser(visit, "press", name="Look inside", answer="#af-looked")["toasts"] == []


def test_a_gallery_is_searched(browser: Browser, visit: str) -> None:
    browser(visit, "tab", name="Search")
    browser.choose(visit, "query", SAME)
    found = browser(visit, "press", name="Search", answer="#af-searched")
    assert found["text"] == "the gallery is empty: enroll someone first" and len(found["toasts"]) == 1
    for name, files in ((EVIL, [FACE, SAME]), ("Grace", [OTHER])):
        browser(visit, "fill", label="Name", text=name)
        browser.choose(visit, "enroll", *files)
        found = browser(visit, "press", name="Enroll", answer="#af-enrolled")
        assert found["text"].startswith(f"{name}: {len(files)} photo") and found["toasts"] == []
    chosen = browser(visit, "evaluate", code="document.querySelectorAll('.af-picker[data-name=enroll] li').length")
    assert chosen["value"] == 0  # ready for the next person
    found = browser(visit, "press", name="Search", answer="#af-searched")
    assert found["text"].startswith(EVIL) and "1.000 · above the threshold" in found["text"]
    assert "Grace" in found["text"] and "<img src=x" not in found["html"]
    listed = browser(visit, "evaluate", code="document.querySelector('#af-gallery').innerText")["value"]
    assert EVIL in listed and "Grace" in listed
    assert browser(visit, "evaluate", code="document.querySelectorAll('#af-gallery img').length")["value"] == 3

    browser(visit, "select", label="Person", option=EVIL)
    browser(visit, "press", name="Remove", answer="#af-gallery")
    listed = browser(visit, "evaluate", code="document.querySelector('#af-gallery').innerText")["value"]
    assert listed == "Grace"
    shown = "document.querySelector('#af-searched').innerText + document.querySelector('#af-enrolled').innerText"
    assert browser(visit, "evaluate", code=shown)["value"].strip() == ""  # no answer shows the person any more
    browser(visit, "click", name="1 in 100")  # nor comes back at another rate
    browser.choose(visit, "query", FACE)
    found = browser(visit, "press", name="Search", answer="#af-searched")
    assert "Grace" in found["text"] and EVIL not in found["text"]
    browser(visit, "press", name="Clear all", answer="#af-gallery")
    found = browser(visit, "press", name="Search", answer="#af-searched")
    assert found["text"].startswith("the gallery is empty")


def test_visitors_do_not_see_each_other(browser: Browser, visit: str, server: Server) -> None:
    browser(visit, "tab", name="Search")
    browser(visit, "fill", label="Name", text="Ada's friend")
    browser.choose(visit, "enroll", FACE)
    browser(visit, "press", name="Enroll", answer="#af-enrolled")
    browser("eve", "open", url=server.url)
    browser("eve", "tab", name="Search")
    browser.choose("eve", "query", FACE)
    found = browser("eve", "press", name="Search", answer="#af-searched")
    assert found["text"].startswith("the gallery is empty")
    seen = browser("eve", "seen")
    assert not [url for url, text in seen["bodies"].items() if "friend" in text] and "friend" not in seen["page"]
    browser("eve", "close")
    browser.choose(visit, "query", FACE)
    assert browser(visit, "press", name="Search", answer="#af-searched")["text"].startswith("Ada's friend")


def test_the_model_is_looked_into(browser: Browser, visit: str) -> None:
    browser(visit, "tab", name="Look inside")
    browser.choose(visit, "look", FACE)
    found = browser(visit, "press", name="Look inside", answer="#af-looked")
    assert found["toasts"] == [] and 'sandbox="allow-scripts"' in found["html"]
    at = browser(visit, "frame", selector=".chooser .note", click=".chooser .face")["text"]
    assert re.fullmatch(r"patch in row \d, column \d, held", at)  # the page's script runs in its frame


# --- what it refuses ------------------------------------------------------------------------------------------------

CORRUPT = FACE[: len(FACE) // 2]
FAULTS = {
    "no face": (png(Image.new("RGB", (300, 200), (90, 140, 60))), f'Photo B: no face was found .*Tick "{ALIGNED}"'),
    "cut off": (CORRUPT, "Photo B: damaged or incomplete image"),
    "text": (b"hello, I am no picture", "Photo B: not a readable image; .*; save it as one of these first$"),
    "empty": (b"", "Photo B: the file is empty"),
    "bomb": (bomb(), "Photo B: .*80,000,000 pixels"),
    "too large": (bytes(10 * 2**20 + 1), r"holiday\.png is 10\.0 MB large; a photo may have 10 MB"),
    "nothing": (None, "Photo B: choose a photo first"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_toast(browser: Browser, visit: str, fault: str) -> None:
    content, message = FAULTS[fault]
    browser.choose(visit, "a", FACE)
    if content is not None:
        browser.choose(visit, "b", content)
    found = browser(visit, "press", name="Compare", answer="#af-compared")
    assert re.match(message, found["text"]), found["text"]
    (toast,) = found["toasts"]
    assert re.search(message, toast)
    assert "bytes" not in found["text"] and "aligned=" not in found["text"]
    browser.choose(visit, "b", SAME)  # and it goes on
    found = browser(visit, "press", name="Compare", answer="#af-compared")
    assert found["text"].startswith("Same person") and found["toasts"] == []


def test_a_photo_is_no_aligned_crop(browser: Browser, visit: str) -> None:
    for name in ("Options", ALIGNED):
        browser(visit, "click", name=name)
    browser.choose(visit, "a", FACE)
    browser.choose(visit, "b", png(Image.new("RGB", (300, 200), (90, 140, 60))))
    found = browser(visit, "press", name="Compare", answer="#af-compared")
    assert f'looked for: untick "{ALIGNED}"' in found["text"] and "landmarks" not in found["text"]


def test_a_person_is_enrolled_whole_or_not_at_all(browser: Browser, visit: str) -> None:
    browser(visit, "tab", name="Search")
    browser.choose(visit, "enroll", FACE)
    found = browser(visit, "press", name="Enroll", answer="#af-enrolled")
    assert found["text"] == "give the person a name first" and len(found["toasts"]) == 1
    browser(visit, "fill", label="Name", text="Ada")
    browser.choose(visit, "enroll", FACE, CORRUPT, name="<b>half</b>.png")
    found = browser(visit, "press", name="Enroll", answer="#af-enrolled")
    assert found["text"].startswith("<b>half</b>.png: damaged") and found["toasts"][0].count("<b>half</b>") == 1
    listed = browser(visit, "evaluate", code="document.querySelector('#af-gallery').innerText")["value"]
    assert listed == "Nobody is enrolled yet."
    assert len(browser(visit, "evaluate", code="document.querySelector('#af-enrolled').innerText")["value"]) > 10
    browser.choose(visit, "enroll", *[FACE] * 5)
    found = browser(visit, "press", name="Enroll", answer="#af-enrolled")
    assert "5 photos were chosen; take 4 at a time" in found["text"]


# --- what is shut ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/deep_link?session_hash=abc"),
        ("GET", "/gradio_api/file=/etc/hostname"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/info"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/component_server"),
        ("GET", "/static/../../../etc/hostname"),
        ("GET", "/docs"),
    ],
)
def test_what_the_page_does_not_need_is_shut(server: Server, method: str, path: str) -> None:
    before = server.files()
    status, body = server.ask(method, path, b"{}" if method == "POST" else None)
    assert status == 404 and len(body) < 200
    assert server.files() == before


def test_it_answers_to_this_machine_alone(server: Server) -> None:
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", server.port), timeout=5):
        pass


def test_requests_are_bounded(server: Server) -> None:
    status, _ = server.ask("POST", "/gradio_api/queue/join", b"x", **{"Content-Length": str(10**9)})
    assert status == 413

    sent: list[int] = []

    def chunks() -> Iterator[bytes]:
        for number in range(400):
            sent.append(number)
            yield bytes(2**20)

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    headers = {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}
    with suppress(OSError):  # it hangs up
        connection.request("POST", "/gradio_api/queue/join", chunks(), headers, encode_chunked=True)
        assert connection.getresponse().status == 413
    assert len(sent) < 100  # and does not read it all
    connection.close()
    assert server.ask("GET", "/config")[0] == 200


def test_what_a_visitor_sent_is_forgotten(
    python: str, staged: Path, model: Path, detector: Path, tmp_path: Path
) -> None:
    """gradio keeps the last inputs and outputs of each visitor: no photo may be among them, and nothing afterwards."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(FACE)
    code = f"""
import base64, json, sys
sys.path.insert(0, {str(staged)!r})
from adaptface import FaceEmbedder
from demo.ui import Demo, build
import gradio as gr
page = build(Demo(FaceEmbedder.from_pretrained({str(model)!r}, detector={str(detector)!r}), True), "m", None)
seen = [fn for fn in page.fns.values() if fn.name == "run" and len(fn.inputs) == 5]
data = base64.b64encode(open({str(pictures / "a.png")!r}, "rb").read()).decode()
sent = json.dumps([{{"name": "a.png", "size": 9, "data": data}}])
import asyncio
from gradio.state_holder import SessionState, StateHolder
holder = StateHolder(); holder.set_blocks(page)
state = holder["visitor"]
compare = seen[0]
async def go():
    return await page.process_api(compare, [sent, sent, 0.001, "largest", False], state=state)
found = asyncio.run(go())
kept = str({{k: v["props"].get("value") for k, v in state.config_values.items() if "props" in v}})
assert "Same person" in kept, kept[:2000]
assert data[:200] not in kept
try:
    asyncio.run(page.process_api(compare, [sent], state=state))
    raise SystemExit("a request with too few inputs was taken")
except ValueError as error:  # gradio writes it to the log
    assert data[:50] not in str(error) and error.__cause__ is None and error.__suppress_context__, error
unload = [fn for fn in page.fns.values() if fn.name == "forget"][0]
request = gr.Request(session_hash="visitor")
assert "visitor" in holder
asyncio.run(page.process_api(unload, [], state=state, request=request))
assert "visitor" not in holder
print("fine")
"""
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("fine\n"), done.stderr[-3000:]


# --- other models ---------------------------------------------------------------------------------------------------


def test_a_model_of_the_hub_without_thresholds_and_detector(
    browser: Browser, python: str, staged: Path, model: Path, tiny_backbone_dir: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    config = json.loads((bare / "config.json").read_text(encoding="utf-8"))
    (bare / "config.json").write_text(json.dumps({**config, "thresholds": None}), encoding="utf-8")
    with HubServer() as hub:
        sha = hub.commit("club/faces", bare)
        hub.commit("club/faces", {"config.json": b"{}"}, parent=sha)  # main has moved on, to what cannot be loaded
        more = {
            name: value for name, value in hub.client_env(tmp_path / "hf").items() if name.startswith("HF_")
        } | {"ADAPTFACE_REVISION": sha}  # fmt: skip
        with serving(python, staged, "club/faces", tmp_path / "home", **more) as server:
            text = browser("phone", "open", url=server.url, width=390, dark=True)["text"]
            assert "No thresholds." in text and "No face detector." in text and "False accept rate" not in text
            crops = [png(Image.fromarray(render(person, Nuisance(), 112))) for person in (1, 2)]
            browser.choose("phone", "a", crops[0])
            browser.choose("phone", "b", crops[1])
            found = browser("phone", "press", name="Compare", answer="#af-compared")
            assert found["text"].startswith("No decision") and found["toasts"] == []
            for page in ("Search", "Look inside", "Compare"):
                browser("phone", "tab", name=page)
                wide = browser("phone", "evaluate", code="document.documentElement.scrollWidth")["value"]
                assert wide <= 390, page
            browser("phone", "close")
        assert server.url  # and it ended in good order


@pytest.mark.real_faces
def test_real_photos_are_compared(browser: Browser, visit: str, real_faces: Path, embedder: FaceEmbedder) -> None:
    first, second = ((real_faces / "raw_photos" / name).read_bytes() for name in ("000.jpg", "001.jpg"))
    browser.choose(visit, "a", first)
    browser.choose(visit, "b", second)
    found = browser(visit, "press", name="Compare", answer="#af-compared")
    answer = embedder.verify(first, second, far=0.001)
    assert numbers(found["text"])[:2] == pytest.approx(expected(answer), abs=0.0011)
    assert answer.same is found["text"].startswith("Same person")
