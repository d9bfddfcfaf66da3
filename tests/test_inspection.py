"""The inspection of training faces finds what was put there, and nothing else."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from adaptface.cli import app
from adaptface.data.benchmarks import load_pairs
from adaptface.data.inspection import (
    SIGNS,
    as_text,
    difference_hash,
    draw,
    duplicate_groups,
    inspect_faces,
    look,
    look_at_all,
    shared,
)
from adaptface.data.sources import open_source
from tests.test_templates import write_ijb


def picture(seed: int, size: int = 64) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three people: a file in two of them, pixels twice in one, a smaller copy in two, a flat and two broken images."""
    seen_through = picture(4)
    seen_through.putalpha(128)
    people = {
        "ada": {
            "0.png": encoded(picture(0)),
            "1.png": encoded(picture(1)),
            "2.png": encoded(picture(1), compress_level=0),  # other bytes, the same pixels
            "3.jpg": encoded(Image.new("L", (40, 40), 99), "JPEG"),
        },
        "bob": {"0.png": encoded(picture(0)), "1.jpg": encoded(picture(2), "JPEG", quality=95), "2.jpg": b""},
        "cyd": {
            "0.png": encoded(picture(2, 96)),  # what bob's 1.jpg was made from, larger
            "1.jpg": encoded(picture(3), "JPEG")[:300],
            "2.jpg": encoded(Image.new("L", (40, 40), 180), "JPEG"),
            "3.webp": encoded(seen_through, "WEBP"),
        },
    }
    for person, files in people.items():
        (tmp_path / "faces" / person).mkdir(parents=True)
        for name, content in files.items():
            (tmp_path / "faces" / person / name).write_bytes(content)
    return tmp_path / "faces"


def names(images: list[str]) -> list[str]:
    return ["/".join(Path(image).parts[-2:]) for image in images]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_finds_what_is_there(folder: Path, workers: int) -> None:
    report = inspect_faces(open_source(folder), workers=workers)
    assert (report["images"], report["identities"]) == (11, 3)
    assert report["images_per_identity"] == {"min": 3, "median": 4.0, "mean": pytest.approx(11 / 3), "max": 4}
    assert report["histogram"] == {"3": 1, "4": 2}
    assert report["sizes"] == {"64x64": 6, "40x40": 2, "96x96": 1}
    assert report["formats"] == {"PNG": 5, "JPEG": 3, "WEBP": 1} and report["modes"] == {"RGB": 6, "L": 2, "RGBA": 1}
    assert names([entry["image"] for entry in report["broken"]]) == ["bob/2.jpg", "cyd/1.jpg"]
    assert "the file is empty" in report["broken"][0]["error"]
    within, across = (
        [(group["sign"], names(group["images"])) for group in report["duplicates"][kind]]
        for kind in ("within", "across")
    )
    assert within == [("pixels", ["ada/1.png", "ada/2.png"])]
    assert across == [("file", ["ada/0.png", "bob/0.png"]), ("hash", ["bob/1.jpg", "cyd/0.png"])]
    assert report["bytes"] == sum(p.stat().st_size for p in folder.rglob("*.*") if p.name != "x") - 300
    json.dumps(report)


def test_overlap_with_a_benchmark(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    for name, image in (
        ("a.png", encoded(picture(3))),
        ("b.png", encoded(picture(0))),
        ("c.bmp", encoded(picture(1), "BMP")),
    ):
        (tmp_path / "bench" / name).write_bytes(image)
    lines = [f"{a} {b} {i % 2}" for i in range(10) for a, b in (("a.png", "b.png"), ("a.png", "c.bmp"))]
    (tmp_path / "bench" / "pairs.txt").write_text("\n".join(lines))
    images = load_pairs(tmp_path / "bench" / "pairs.txt").images
    overlap = inspect_faces(open_source(folder), {"bench": images})["overlap"]["bench"]
    found = [(group["sign"], names(group["training"]), names(group["benchmark"])) for group in overlap]
    assert found == [
        ("file", ["ada/0.png", "bob/0.png"], ["bench/b.png"]),
        ("pixels", ["ada/1.png", "ada/2.png"], ["bench/c.bmp"]),
    ]


def test_many_copies_of_one_picture_are_one_group() -> None:
    class Copies:
        def __init__(self, count: int) -> None:
            self.count = count

        def __len__(self) -> int:
            return self.count

        def where(self, index: int) -> str:
            return f"{index}.png"

        def encoded(self, index: int) -> bytes:
            return encoded(picture(0))

    (group,) = shared(look_at_all(Copies(200)), look_at_all(Copies(150)))
    assert group == (list(range(200)), list(range(150)), "file")


def test_overlap_with_templates_and_with_images_elsewhere(folder: Path, tmp_path: Path) -> None:
    ijb = write_ijb(tmp_path / "ijb")
    shutil.copy(folder / "ada" / "0.png", ijb / "loose_crop" / "3.png")
    (tmp_path / "lists").mkdir()
    pairs = [f"{a} {b} {i % 2}" for i in range(10) for a, b in (("0.png", "1.png"), ("0.png", "2.png"))]
    (tmp_path / "lists" / "some.txt").write_text("\n".join(pairs))
    command = ["inspect", str(folder), "--workers", "0", "--json", "--benchmark", str(ijb)]
    command += ["--benchmark", str(tmp_path / "lists" / "some.txt"), "--images", str(folder / "ada")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    overlap = json.loads(done.output)["overlap"]
    (group,) = overlap["ijb"]
    assert names(group["training"]) == ["ada/0.png", "bob/0.png"] and names(group["benchmark"]) == ["loose_crop/3.png"]
    found = [(group["sign"], names(group["benchmark"])) for group in overlap["some.txt"]]
    assert found[:2] == [("file", ["ada/0.png"]), ("file", ["ada/1.png"])]
    assert ("pixels", ["ada/1.png", "ada/2.png"]) in found  # the weaker sign joins what the stronger told apart


def test_difference_hash() -> None:
    """Bits of horizontal steps, row by row, kept by encoding and size, and turned over by a negative."""
    rising = Image.fromarray(np.tile(np.arange(0, 252, 28, dtype=np.uint8), (8, 1)))
    assert difference_hash(rising) == 2**64 - 1
    assert difference_hash(rising.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    assert difference_hash(Image.new("RGB", (50, 50), (7, 8, 9))) is None
    steps = Image.fromarray(np.array([[0, 200, 0, 200, 0, 200, 0, 200, 0]] + [[0] * 9] * 7, dtype=np.uint8))
    assert difference_hash(steps) == 0b10101010 << 56


def test_a_weaker_sign_is_told_only_where_it_joins_others(folder: Path) -> None:
    source = open_source(folder)
    looks = [look(source, index) for index in range(len(source))]
    one = looks[0]
    copies = [one, one, one._replace(signs=(b"other", b"other", one.signs[2]))]
    assert duplicate_groups(copies) == [([0, 1], "file"), ([0, 1, 2], "hash")]
    assert [sign for _, sign in duplicate_groups(looks)] == ["file", "pixels", "hash"] == list(SIGNS)


def test_command_text_json_and_picture(folder: Path, tmp_path: Path) -> None:
    runner, drawn = CliRunner(), tmp_path / "report.png"
    done = runner.invoke(app, ["inspect", str(folder), "--workers", "0", "--picture", str(drawn)])
    assert done.exit_code == 0, done.output
    for part in (
        "11 images of 3 identities",
        "images an identity: 3 to 4",
        "broken: 2",
        "duplicates across identities: 2",
    ):
        assert part in done.stdout
    with Image.open(drawn) as image:
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 1000  # faces, not an empty frame
    done = runner.invoke(app, ["inspect", str(folder), "--workers", "0", "--json"])
    assert json.loads(done.stdout)["broken"][1]["image"].endswith("1.jpg")
    done = runner.invoke(app, ["inspect", str(tmp_path / "nothing" / "at" / "all")])
    assert done.exit_code == 1 and "adaptface inspect: " in done.stderr


def test_long_lists_are_cut_in_text_only(folder: Path) -> None:
    report = inspect_faces(open_source(folder))
    report["broken"] = [{"image": f"{i}", "error": f"{i}: broken"} for i in range(50)]
    text = as_text(report)
    assert "broken: 50" in text and "and 30 more (all with --json)" in text and "20: broken" not in text


def test_draws_without_duplicates(folder: Path, tmp_path: Path) -> None:
    source = open_source(folder)
    report = inspect_faces(source)
    report["duplicates"]["across"] = []
    draw(report, source, tmp_path / "report.svg")
    assert (tmp_path / "report.svg").stat().st_size > 1000
