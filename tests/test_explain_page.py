"""Pages hold the numbers they claim, nothing of this machine and nothing that others could put in; nothing is lost."""

import base64
import io
import re
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adaptface.data.sources import open_source
from adaptface.data.synthetic import Nuisance, render
from adaptface.explain import (
    CLS,
    FacesLook,
    ImageLook,
    attention_of,
    look_at_faces,
    look_at_image,
    project,
    update_norms,
)
from adaptface.explain_assets import ALPHAS, HEAT, coloured
from adaptface.explain_page import (
    MOST_IMAGES,
    explain,
    explain_folder,
    faces_page,
    images_page,
    pack_attention,
    scatters,
)
from image_processing_adaptface import ARCFACE_TEMPLATE
from tests.test_explain import built, faces, processor

EVIL = "\"'><img src=x onerror=alert(1)></style><script>alert(2)</script>"
NO_FORMULA = "$\\nothing$ <b>"
VOID = {"meta", "img", "input", "link", "br", "hr"}


class Parsed(HTMLParser):
    """A page as a browser's parser sees it: elements with their attributes, and the text of each."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # element, text
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def of(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in wanted.items())]

    def text(self) -> str:
        return "\n".join(text for tag, text in self.texts if tag not in ("script", "style"))


def crop(seed: int = 4, side: int = 56, **nuisance: float) -> Image.Image:
    return Image.fromarray(render(seed, Nuisance(**nuisance), side))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def image_look(tiny_backbone_dir: Path) -> ImageLook:
    return look_at_image(built(tiny_backbone_dir), processor(), crop())


@pytest.fixture(scope="module")
def faces_look(tiny_backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> FacesLook:
    folder = faces(tmp_path_factory.mktemp("secret") / "faces")
    return look_at_faces(built(tiny_backbone_dir), processor(), open_source(folder, domains=None))


# --------------------------------------------------------------------------------------------------- what pages hold


def unpacked(shape: dict[str, int], text: str) -> np.ndarray:
    """`(L, heads, 1 + N, 1 + N)` again, number by number as the format says."""
    data = zlib.decompress(base64.b64decode(text))
    tokens = shape["side"] ** 2 + 1
    rows = shape["blocks"] * shape["heads"] * tokens
    assert len(data) == 4 * rows + rows * (tokens - 1)
    found = np.empty((rows, tokens))
    for row in range(rows):
        peak, cls = (int.from_bytes(data[at : at + 2], "little") / 65535 for at in (2 * row, 2 * (rows + row)))
        start = 4 * rows + row * (tokens - 1)
        found[row] = [cls, *(peak * step / shape["levels"] for step in data[start : start + tokens - 1])]
    return found.reshape(shape["blocks"], shape["heads"], tokens, tokens)


def test_packed_attention_is_the_attention(image_look: ImageLook) -> None:
    attention = image_look.attention
    shape, text = pack_attention(attention, 10**6) or pytest.fail("nothing fits")
    assert shape == {"blocks": 3, "heads": 2, "side": 4, "levels": 255}
    np.testing.assert_allclose(unpacked(shape, text), attention, atol=0.5 / 255 + 1 / 65535)


def test_packed_attention_grows_coarser_until_it_fits(image_look: ImageLook) -> None:
    attention, limit, seen = image_look.attention, 10**6, []
    while (packed := pack_attention(attention, limit)) is not None:
        shape, text = packed
        assert len(text) <= limit
        seen.append((shape["heads"], shape["levels"]))
        want = attention if shape["heads"] == 2 else attention.mean(1, keepdims=True)
        np.testing.assert_allclose(unpacked(shape, text), want, atol=0.5 / shape["levels"] + 1 / 65535)
        limit = len(text) - 1
    assert seen[:3] == [(2, 255), (2, 15), (2, 7)] and set(seen[3:]) <= {(1, 255), (1, 15), (1, 7)} and seen[3:]


def test_a_page_says_how_coarse_it_is(
    tiny_backbone_dir: Path, image_look: ImageLook, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(tiny_backbone_dir)
    assert "kept in" not in images_page(model, ["face.png"], [image_look])
    _, text = pack_attention(image_look.attention, 10**6) or pytest.fail("nothing fits")
    monkeypatch.setattr("adaptface.explain_page._PATCH_BYTES", len(text) - 1)
    page = images_page(model, ["face.png"], [image_look])
    assert "kept in 15 steps of that" in page and '"levels": 15' in page


def test_faces_need_no_folders_and_no_second_person(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    """What training refuses can be looked at."""
    model = built(tiny_backbone_dir)
    folder = faces(tmp_path / "faces", 1, 3, domains=False)
    (person,) = folder.iterdir()
    for place, people in ((folder, 1), (person, 3)):
        source = open_source(place, domains=None, training=False)
        assert len(source.identities) == people
        explain_folder(model, processor(), source, tmp_path / "page.html")
        assert f"<dt>identities</dt><dd>{people}</dd>" in (tmp_path / "page.html").read_text(encoding="utf-8")
        with pytest.raises(ValueError, match=r"belong to one identity|outside any identity folder"):
            open_source(place, domains=None)


def test_a_page_shows_what_was_computed(tiny_backbone_dir: Path, image_look: ImageLook) -> None:
    model = built(tiny_backbone_dir)
    page = Parsed(images_page(model, ["face.png"], [image_look]))
    text = page.text()
    assert f"{image_look.norm:.3f}" in text and "before block 1" in text and "Block 0 mixes evenly" in text
    assert image_look.mix is not None
    for weight in image_look.mix:
        assert f"{100 * weight:.1f}%" in text
        assert any(a.get("style") == f"width:{100 * weight:.2f}%" for a in page.of("i"))
    rows = update_norms(model)
    cells = [a for a in page.of("td") if "title" in a]
    assert len(cells) == len(rows) == 36
    assert sorted(a["title"] for a in cells) == sorted(f"norm {row.norm:.4g}" for row in rows)
    assert max(float(a["style"].removeprefix("--depth:").removesuffix("%")) for a in cells) == 100


def test_the_maps_of_cls_are_its_attention(tiny_backbone_dir: Path, image_look: ImageLook) -> None:
    page = Parsed(images_page(built(tiny_backbone_dir), ["face.png"], [image_look]))
    maps = [a for a in page.of("div") if a.get("class") == "map"]
    pictures = page.of("img")
    assert len(maps) == len(pictures) == 3 * (1 + 2)
    for place, (about, picture) in enumerate(zip(maps, pictures, strict=True)):
        block, column = divmod(place, 3)
        values = attention_of(image_look.attention, block, None if column == 0 else column - 1, CLS)
        with Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))) as heat:
            colours = np.asarray(heat.convert("RGBA"))
        assert (colours[..., :3] == HEAT).all()
        expected = ALPHAS[-1] * values / values.max()
        assert np.abs(colours[..., 3] - expected).max() <= ALPHAS[-1] / 30 + 1  # half a shade of 16
        assert about["title"].startswith(f"block {block}, {'mean' if column == 0 else f'head {column - 1}'}: ")
        on_cls, most = (float(number) for number in re.findall(r"([\d.]+)%", about["title"]))
        assert on_cls == pytest.approx(100 * (1 - values.sum()), abs=0.051)
        assert most == pytest.approx(100 * values.max(), abs=0.051)


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        ("K = 1", ["the one expert, general, always has the weight 1", "rank 4 on attention+mlp of every block"]),
        ("frozen", ["has no experts to mix", "only the projection is trained", "the base is as it was"]),
        ("full", ["has no experts to mix", "the whole base is trained", "without its first state"]),
        ("all-linear", ["rank 4 on all-linear", "patches"]),
        ("two of three blocks", ["of blocks 0, 2"]),
        ("router reads patches", ["from block 0 on"]),
    ],
)
def test_models_of_every_kind_have_a_page(
    tiny_backbone_dir: Path, tmp_path: Path, variant: str, says: list[str]
) -> None:
    model = built(tiny_backbone_dir, variant)
    explain(model, processor(), crop(), tmp_path / "page.html")
    text = Parsed((tmp_path / "page.html").read_text(encoding="utf-8")).text()
    for words in says:
        assert words in text


@pytest.mark.parametrize("variant", ["K = 1", "frozen"])
def test_models_without_a_router_say_so_of_faces_too(tiny_backbone_dir: Path, tmp_path: Path, variant: str) -> None:
    model, source = built(tiny_backbone_dir, variant), open_source(faces(tmp_path / "faces", 2, 2), domains=None)
    explain_folder(model, processor(), source, tmp_path / "faces.html")
    page = Parsed((tmp_path / "faces.html").read_text(encoding="utf-8"))
    assert "No router" in page.text() and "first expert" not in page.text() and len(page.of("svg")) == 2
    files = explain_folder(model, processor(), source, tmp_path / "pictures")
    assert [file.name for file in files] == ["embeddings.png"]


def test_a_page_of_faces_shows_their_distribution(tiny_backbone_dir: Path, faces_look: FacesLook) -> None:
    model = built(tiny_backbone_dir)
    places = project(faces_look.embeddings)
    page = Parsed(faces_page(model, faces_look, places, "tsne"))
    text = page.text()
    mix = faces_look.mix
    assert mix is not None
    for k in range(3):
        assert f"mean {100 * mix[:, k].mean():.1f}%, first in {100 * (mix.argmax(1) == k).mean():.1f}%" in text
    assert "12 images" in text and "unlabelled" in text and "t-SNE" in text
    assert len(page.of("svg")) == 3 and len(page.of("circle")) == 3 * 12
    by_identity = list(zip(page.of("circle")[:12], [t for tag, t in page.texts if tag == "title"][1:13], strict=True))
    order = [int(title[len("person_0: person_")]) * 4 + int(title.removesuffix(".png")[-1]) for _, title in by_identity]
    assert sorted(order) == list(range(12))
    dots = np.array([[float(dot["cx"]), 100 - float(dot["cy"])] for dot, _ in by_identity])
    assert dots.min() >= 0 and dots.max() <= 100
    want = places[order]
    scale = (np.ptp(dots, axis=0) / np.ptp(want, axis=0)).astype(float)
    assert scale[0] == pytest.approx(scale[1], rel=1e-2)  # one scale for both axes
    np.testing.assert_allclose(dots - dots[0], (want - want[0]) * scale[0], atol=0.05)


def test_dots_are_coloured_by_identity_label_and_expert(faces_look: FacesLook) -> None:
    found = scatters(faces_look, ["general", "pose", "age"])
    assert found["identity"] == [f"person_{person}" for person in range(3) for _ in range(4)]
    assert found["domain label"] == ["general", "pose", "age", "unlabelled"] * 3
    assert faces_look.mix is not None
    assert found["router's first expert"] == [["general", "pose", "age"][row.argmax()] for row in faces_look.mix]


def test_colours_follow_experts_and_else_what_is_common() -> None:
    experts = ["general", "pose", "age"]
    assert coloured(["age", "age", "unlabelled", "general"], experts) == {"general": 0, "age": 2}
    people = [f"p{i}" for i in range(9) for _ in range(9 - i)]
    assert coloured(people, experts) == {f"p{i}": i for i in range(6)}


# ---------------------------------------------------------------------------------------- what pages must not hold


def test_names_cannot_put_anything_into_a_page(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    model = built(tiny_backbone_dir)
    model.config.domains = ["general", EVIL, "no\ntext \udce9"]  # a configuration would refuse such names
    file = tmp_path / EVIL.replace("/", "\\")
    crop().save(file, "PNG")
    strange = tmp_path / "undecodable-\udce9.png"
    shutil.copy(file, strange)
    plain = Parsed(images_page(model, ["a", "b"], [look_at_image(model, processor(), crop())] * 2))
    explain(model, processor(), [file, strange], tmp_path / "page.html")
    page = Parsed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]  # text, and no element more
    assert file.name in page.text() or file.name.replace("\\", "\\\\") in page.text()
    assert page.text().count(EVIL) >= 4 and "undecodable-\\" in page.text()

    folder = faces(tmp_path / "faces", 2, 2, domains=False)
    source = open_source(folder, domains=None)
    source.identities[0] = EVIL
    source.name = EVIL
    look = look_at_faces(model, processor(), source)
    page = Parsed(faces_page(model, look, project(look.embeddings), "tsne"))
    assert not page.of("img") and not page.of("script") and page.text().count("onerror") >= 4


def test_a_page_needs_and_tells_nothing_of_this_machine(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    model = built(tiny_backbone_dir)
    model.config.backbone = "/home/somebody/bases/dino-base"
    crop().save(tmp_path / "face.png")
    explain(model, processor(), tmp_path / "face.png", tmp_path / "page.html")
    source = open_source(faces(tmp_path / "faces", 2, 2), domains=None)
    explain_folder(model, processor(), source, tmp_path / "faces.html")
    for name in ("page.html", "faces.html"):
        content = (tmp_path / name).read_text(encoding="utf-8")
        assert str(tmp_path) not in content and "somebody" not in content and "dino-base" in content
        page = Parsed(content)
        policy = page.of("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
        assert policy.startswith("default-src 'none'; img-src data:;")
        for tag, attributes in page.elements:
            for attribute in ("src", "href", "action", "srcset"):
                assert attributes.get(attribute, "data:").startswith("data:"), tag
            for address in re.findall(r"url\((.*?)\)", attributes.get("style", "")):
                assert address.startswith("data:")
        assert not page.of("link") and not re.search(r"https?://|@import", content)


# --------------------------------------------------------------------------------------------------- what is written


def test_one_page_holds_several_images(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    photo = Image.new("RGB", (300, 200), "grey")
    photo.paste(crop(8, 112), (100, 40))
    out = tmp_path / "new" / "page.html"
    images = [crop(), photo, np.asarray(crop(6))]
    points = [None, ARCFACE_TEMPLATE + np.array([100, 40]), None]
    assert explain(built(tiny_backbone_dir), processor(), images, out, points) == [out]
    page = Parsed(out.read_text(encoding="utf-8"))
    assert len(page.of("section", **{"class": "look"})) == 3
    assert [text for tag, text in page.texts if tag == "h2"][1:4] == ["image 1", "image 2", "image 3"]


@pytest.mark.slow
def test_pictures_are_the_same_each_time_whatever_the_names(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    """A formula that cannot be read, if names were taken for formulas, is an error."""
    model = built(tiny_backbone_dir)
    model.config.domains = [NO_FORMULA, "pose", "age"]  # a configuration would refuse such a name
    crop().save(tmp_path / f"{NO_FORMULA}.png")
    source = open_source(faces(tmp_path / "faces"), domains=None)
    source.identities[1], source.domains = NO_FORMULA, (NO_FORMULA, "pose", "age")
    for run in ("a", "b"):
        files = explain(model, processor(), tmp_path / f"{NO_FORMULA}.png", tmp_path / run)
        assert [file.name for file in files] == ["cls_1.png", "face_1.png", "patches_1.png", "updates.png"]
        files = explain_folder(model, processor(), source, tmp_path / f"{run}_faces")
        assert [file.name for file in files] == ["embeddings.png", "router.png"]
    for first in [*(tmp_path / "a").iterdir(), *(tmp_path / "a_faces").iterdir()]:
        second = tmp_path / first.parent.name.replace("a", "b", 1) / first.name
        assert first.read_bytes() == second.read_bytes(), first.name


def test_only_a_page_of_ours_is_replaced(
    tiny_backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = built(tiny_backbone_dir), tmp_path / "page.html"
    explain(model, processor(), crop(4), out)
    first = out.read_text()
    explain(model, processor(), crop(6), out)
    assert out.read_text() != first

    before = out.read_text()
    with pytest.raises(ValueError, match="not a readable image"):
        explain(model, processor(), b"no picture", out)
    assert out.read_text() == before and sorted(file.name for file in tmp_path.iterdir()) == ["page.html"]

    (tmp_path / "diary.html").write_text("<p>dear diary")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear diary")
    monkeypatch.setattr("adaptface.explain_page.look_at_image", lambda *_: pytest.fail("computed for nothing"))
    for name, message in (
        ("diary.html", "no page of adaptface explain"),
        ("folder.html", "no page of adaptface explain"),
        ("full", "not an empty folder"),
    ):
        with pytest.raises(FileExistsError, match=message):
            explain(model, processor(), crop(), tmp_path / name)
    with pytest.raises(ValueError, match=r"page\.html, or a folder"):
        explain(model, processor(), crop(), tmp_path / "page.png")
    assert (tmp_path / "diary.html").read_text() == "<p>dear diary"
    assert (tmp_path / "full" / "diary.txt").read_text() == "dear diary"


def test_what_goes_wrong_leaves_nothing(
    tiny_backbone_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = built(tiny_backbone_dir), tmp_path / "out"
    for images, landmarks, message in (
        ([Image.new("RGB", (90, 56))], None, "five landmarks"),
        ([b""], None, "empty"),
        ([], None, "0 images: give 1 to 16"),
        ([crop()] * (MOST_IMAGES + 1), None, "explain_folder takes"),
        ([crop()] * 2, [None], "one entry an image, 2 in all; got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(model, processor(), images, out, landmarks)
    for name in ("out", "new/page.html"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            explain(model, processor(), tmp_path / "none.png", tmp_path / name)
    source = open_source(faces(tmp_path / "faces", 2, 2), domains=None)
    with pytest.raises(ValueError, match="choose one of tsne, umap"):
        explain_folder(model, processor(), source, out, method="pca")
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.setattr("adaptface.explain_page.look_at_faces", lambda *_, **__: pytest.fail("an hour's work"))
    with pytest.raises(ImportError, match=r"pip install 'adaptface\[umap\]'"):
        explain_folder(model, processor(), source, out, method="umap")
    assert [file.name for file in tmp_path.iterdir()] == ["faces"]


# -------------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.slow
def test_a_browser_shows_where_a_patch_looks(tiny_backbone_dir: Path, tmp_path: Path, image_look: ImageLook) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no browser: install Debian's chromium")
    page = images_page(built(tiny_backbone_dir), ["face.png"], [image_look])
    act = """
      const wait = setInterval(() => {
        const part = document.querySelector(".patches");
        if (part.hidden) return;
        clearInterval(wait);
        const slider = part.querySelector("input"), face = part.querySelector(".face");
        slider.value = 1;
        slider.dispatchEvent(new Event("input"));
        const box = face.getBoundingClientRect();
        const at = { clientX: box.left + box.width * 0.9, clientY: box.top + box.height * 0.4 };
        face.dispatchEvent(new MouseEvent("click", at));
        face.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
        const captions = [...part.querySelectorAll("figure > div:last-child")].map((found) => found.textContent);
        const canvas = part.querySelectorAll("canvas")[2];
        const alphas = canvas.getContext("2d").getImageData(0, 0, 4, 4).data.filter((_, i) => i % 4 === 3);
        document.body.textContent = "FOUND " + captions.join("|") + "|" + alphas.join(" ") + " END";
      }, 20);
    """
    (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{act}</script></body>"), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search("FOUND (.*) END", done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    *captions, alphas = found[1].split("|")
    token = 1 + 1 * 4 + 2  # row 1, column 3, one to the left; block 1
    maps = image_look.attention[1, :, token]  # (heads, 1 + N)
    for caption, values in zip(captions, [maps.mean(0), *maps], strict=True):
        on_cls, most = (float(number) for number in re.findall(r"([\d.]+)%", caption))
        assert on_cls == pytest.approx(100 * values[0], abs=0.11) and most == pytest.approx(
            100 * values[1:].max(), abs=0.25
        )
    expected = ALPHAS[-1] * maps[1, 1:] / maps[1, 1:].max()
    np.testing.assert_allclose([int(alpha) for alpha in alphas.split()], expected, atol=1.5)
