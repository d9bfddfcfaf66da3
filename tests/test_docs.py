"""The documentation: docstrings, the reference made of them, the pages' code, and the two READMEs."""

import ast
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

import adaptface
from adaptface.cli import app
from adaptface.detection import Face, FaceDetector
from adaptface.faces import FaceEmbedder
from image_processing_adaptface import ARCFACE_TEMPLATE, TEMPLATE_SIZE, AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel

ROOT = Path(__file__).resolve().parents[1]
DESCRIBED = [*ROOT.glob("*_adaptface.py"), *(ROOT / "adaptface").rglob("*.py")]

# --- docstrings -----------------------------------------------------------------------------------------------------


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def undocumented(files: dict[str, ast.Module]) -> list[str]:
    """Public functions, classes and methods without a docstring of their own or, for a method, of a class above."""
    classes = {node.name: node for tree in files.values() for node in tree.body if isinstance(node, ast.ClassDef)}

    def documented(owner: ast.ClassDef, method: str) -> bool:
        own = any(node.name == method and ast.get_docstring(node) for node in public(owner.body))
        above = (classes.get(ast.unparse(base).rpartition(".")[2]) for base in owner.bases)
        return own or any(documented(base, method) for base in above if base is not None)

    found = []
    for name, tree in files.items():
        for node in public(tree.body):
            if not ast.get_docstring(node):
                found.append(f"{name}:{node.lineno} {node.name}")
            for method in public(node.body) if isinstance(node, ast.ClassDef) else ():
                if not documented(node, method.name):
                    found.append(f"{name}:{method.lineno} {node.name}.{method.name}")
    return found


def test_every_public_name_has_a_docstring() -> None:
    files = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in DESCRIBED}
    assert len(files) > 50
    assert undocumented(files) == []


def test_a_missing_docstring_is_noticed() -> None:
    above = "class A:\n '''a'''\n def f(self):\n  '''f'''\n def g(self): ...\n"
    below = "class B(A):\n '''b'''\n def f(self): ...\ndef h(): ..."
    assert undocumented({"x": ast.parse(above + below)}) == ["x:5 A.g", "x:9 h"]


# --- the reference made of them -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The text, identifiers and links of a page of the reference."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: dict[str, str] = {}  # of a section or member: the text up to the next one
        self.links: list[str] = []
        self._last = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag in ("section", "div") and given.get("id"):
            self._last = str(given["id"])
            self.ids[self._last] = ""
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))

    def handle_data(self, data: str) -> None:
        self.ids[self._last] = self.ids.get(self._last, "") + data


def page_text(page: Page, name: str) -> str:
    return " ".join(page.ids[name].split())


@pytest.mark.slow
def test_the_reference_describes_every_public_name(tmp_path: Path) -> None:
    """Warnings of pdoc's and references that lead nowhere end the build."""
    run = [sys.executable, "docs/reference.py", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home = Page(tmp_path / "adaptface.html")
    for name in set(adaptface.__all__) - {"__version__"}:
        assert " Args " in page_text(home, name), name
    assert "far: false accept rate, one of those" in page_text(home, "FaceEmbedder.verify")
    assert "Raises FileNotFoundError: there is no such file." in page_text(home, "FaceEmbedder.embed")
    for module, name in (
        ("configuration_adaptface", "AdaptFaceConfig"),
        ("modeling_adaptface", "AdaptFaceModel"),
        ("image_processing_adaptface", "AdaptFaceImageProcessor"),
    ):
        assert " Args " in page_text(Page(tmp_path / f"{module}.html"), name)
    for path in DESCRIBED:
        module = path.relative_to(ROOT).with_suffix("")
        if path.stem.startswith("_") or "cli" in module.parts or path.stem == "clean_load":
            continue
        page = Page((tmp_path / module).with_suffix(".html"))
        for node in public(ast.parse(path.read_text(encoding="utf-8")).body):
            assert node.name in page.ids, f"{module}: {node.name}"
    losses = page_text(Page(tmp_path / "adaptface/losses.html"), "ArcFaceHead")
    assert "Source ArcFace, arXiv:1801.07698, eq. 3;" in losses
    assert "internal Module state" not in (tmp_path / "adaptface/losses.html").read_text(encoding="utf-8")
    faces = Page(tmp_path / "adaptface/faces.html")
    assert "runtime.html#load_engine" in faces.links  # [`~runtime.load_engine`]
    assert "found[i] is the i-th adaptface.faces.EmbeddedFace." in page_text(faces, "FaceEmbeddings")


# --- pages ----------------------------------------------------------------------------------------------------------


def blocks(path: Path, language: str = "") -> list[str]:
    """The code blocks of a page, of one language or all."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [code for of, code in found if not language or of == language]


class WholePicture(FaceDetector):
    """Finds one face in each photo, as large as the photo."""

    def __init__(self, file: str | None = None) -> None:
        pass  # without YuNet

    def detect(self, photo: Image.Image, name: str | None = None) -> list[Face]:
        side = min(photo.size)
        return [Face((0, 0, side, side), ARCFACE_TEMPLATE * side / TEMPLATE_SIZE, 0.99)]


@pytest.fixture
def model_folder(tiny_model: AdaptFaceModel, tmp_path: Path) -> Path:
    """A model with thresholds, and photos of two people beside it."""
    tiny_model.config.thresholds = {
        "benchmark": "dev",
        "operating_points": [{"far": 0.001, "threshold": 0.9}],
        "calibration": {"slope": 9.0, "intercept": -3.0},
    }
    tiny_model.save_pretrained(tmp_path / "model")
    AdaptFaceImageProcessor(size=56).save_pretrained(tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 256, (2, 14, 14, 3), dtype=np.uint8)
    for name, person in (("anna_1.jpg", 0), ("anna_2.jpg", 0), ("ben_1.jpg", 1), ("crop_a.png", 0), ("crop_b.png", 1)):
        Image.fromarray(noise[person]).resize((112, 112), Image.Resampling.BICUBIC).save(tmp_path / name)
    return tmp_path / "model"


def test_the_quick_start_runs(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss")
    code = blocks(ROOT / "docs/quickstart.md", "python")[0]
    assert len(code.split("\n\n")) == 2 and len([line for line in code.splitlines() if line]) == 10
    assert "someone/AdaptFace" in code
    monkeypatch.chdir(model_folder.parent)
    monkeypatch.setattr("adaptface.faces.FaceDetector", WholePicture)
    names: dict[str, Any] = {}
    exec(code.replace("someone/AdaptFace", str(model_folder)), names)
    found, answer = names["found"], names["answer"]
    assert found.embeddings.shape == (3, 16)
    assert answer.same is True and answer.threshold == 0.9  # one picture, saved twice
    assert capsys.readouterr().out.splitlines()[-1] == "Anna"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/quickstart.md", "README.md"])
def test_plain_transformers_give_the_same_embedding(page: str, model_folder: Path) -> None:
    """In another process, offline, with the code that lies in the model folder."""
    code = next(code for code in blocks(ROOT / page, "python") if "AutoModel.from_pretrained" in code)
    code = code.replace("someone/AdaptFace", str(model_folder))
    code = f"face_a, face_b = 'crop_a.png', 'crop_b.png'\n{code}\nprint('cosine', similarity)\n"
    folder = model_folder.parent
    env = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    embedder = FaceEmbedder.from_pretrained(model_folder, device="cpu")
    crops = [str(folder / "crop_a.png"), str(folder / "crop_b.png")]
    a, b = embedder.embed(crops, aligned=True, flip=page != "README.md").embeddings
    assert float(done.stdout.split()[-1]) == pytest.approx(float(a @ b), abs=1e-5)


def headings(path: Path) -> list[int]:
    """The levels of a page's headings, in order."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]


def test_the_readmes_say_the_same() -> None:
    """Whoever changes one is told to change the other: headings, code, tables, lists and links correspond."""
    english, french = ROOT / "README.md", ROOT / "README.fr.md"
    assert headings(english) == headings(french)
    assert blocks(english) == blocks(french)

    def rows(path: Path) -> list[str]:
        return re.findall(
            r"^(?:\| (`.*?`) \||- (\[.*?\]\(.*?\)|`.*?`))", path.read_text(encoding="utf-8"), re.MULTILINE
        )

    def links(path: Path) -> list[str]:
        return sorted(set(re.findall(r"\]\((.*?)\)", path.read_text(encoding="utf-8"))) - {"README.md", "README.fr.md"})

    assert rows(english) == rows(french) and len(rows(english)) > 20
    assert links(english) == links(french)
    assert "(README.fr.md)" in english.read_text(encoding="utf-8").split("\n## ")[0]
    assert "(README.md)" in french.read_text(encoding="utf-8").split("\n## ")[0]


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"`adaptface {command}" in text, command
    assert set(re.findall(r"`adaptface (\w+)", text)) <= set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "page", sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (path.parent / link).exists(), f"{page}: {link}"


@pytest.mark.slow
def test_the_hubs_commands_exist() -> None:
    """Of the version that is tested; they were renamed before."""
    pages = [ROOT / "README.md", ROOT / "space/README.md", *(ROOT / "docs").glob("*.md")]
    lines = [line for page in pages for line in re.findall(r"^hf .*", page.read_text(encoding="utf-8"), re.MULTILINE)]
    assert len(lines) >= 2
    for line in lines:
        words = line.split()
        names = list(itertools.takewhile(str.isalpha, words[1:]))
        command = [str(Path(sys.executable).with_name("hf")), *names, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        options = [word for word in words if word.startswith("--")]
        assert all(re.search(rf"{option}\b", done.stdout) for option in options), line
