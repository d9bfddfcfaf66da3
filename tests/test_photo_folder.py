"""Folders of photos: the table of their embeddings, broken off and taken up again, and galleries of them.

The pictures are noise, given as aligned crops: what matters here is which of them ends up where.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

from adaptface import FaceEmbedder, Gallery, photo_folder
from adaptface.cli import app
from adaptface.data.folder import person_of
from adaptface.detection import Face
from adaptface.embedding import StoredEmbeddings
from adaptface.photo_folder import embed_folder, enroll_folder, photos_below, read_embeddings
from image_processing_adaptface import AdaptFaceImageProcessor
from tests.conftest import build_tiny_model

THRESHOLDS = {
    "benchmark": "dev", "data": "synthetic", "genuine": 50, "impostor": 50, "embedding": "raw sum",
    "operating_points": [{"far": 0.001, "threshold": 0.9, "tar": 0.5}, {"far": 0.1, "threshold": -0.99, "tar": 1.0}],
    "calibration": {"slope": 1.0, "intercept": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tiny_backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = build_tiny_model(tiny_backbone_dir, seed=0)
    model.config.thresholds = THRESHOLDS
    model.save_pretrained(folder)
    AdaptFaceImageProcessor(size=56).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def embedder(model_dir: Path) -> FaceEmbedder:
    return FaceEmbedder.from_pretrained(model_dir, device="cpu")


def _photo(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((112, 112), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photos of anna, two of bob, one of a person beside them, a broken one, and what is no photo."""
    folder = tmp_path / "photos"
    for seed, name in enumerate(("anna/1.png", "anna/2.JPG", "bob/x/1.png", "bob/2.png", "cara.png")):
        _photo(folder / name, seed)
    (folder / "anna" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "notes.txt").write_text("no photo", encoding="utf-8")
    (folder / ".hidden").mkdir()
    _photo(folder / ".hidden" / "1.png", 9)
    return folder


NAMES = ["anna/1.png", "anna/2.JPG", "bob/2.png", "bob/x/1.png", "cara.png"]


def _table(path: Path) -> dict[str, Any]:
    return {row["file"]: row for row in parquet.read_table(path).to_pylist()}


def test_a_folder_becomes_a_table(embedder: FaceEmbedder, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "faces.parquet"
    report = embed_folder(embedder, photos, out, aligned=True, progress=False, batch_size=2)
    assert (report.photos, report.faces, report.kept) == (6, 5, 0)
    assert list(report.errors) == ["anna/broken.jpg"] and "broken.jpg" in report.errors["anna/broken.jpg"]
    rows = _table(out)
    assert sorted(rows) == NAMES
    expected = embedder.embed([str(photos / name) for name in NAMES], aligned=True)
    for row, name in enumerate(NAMES):
        np.testing.assert_allclose(rows[name]["embedding"], expected.embeddings[row], atol=1e-6)
        assert rows[name]["quality"] == pytest.approx(expected.quality[row], rel=1e-5)
        mix = [rows[name][f"mix_{domain}"] for domain in embedder.config.domains]
        np.testing.assert_allclose(mix, expected.domain_weights[row], atol=1e-6)
        assert rows[name]["box"] is None and rows[name]["warnings"] == list(expected.warnings[row])
    assert [path.name for path in out.parent.iterdir()] == ["faces.parquet"]
    if os.name == "posix":
        assert stat.S_IMODE(out.stat().st_mode) == 0o600, "embeddings are personal data"
    names, embeddings, model = read_embeddings(out)
    assert embeddings.shape == (5, 16) and names == list(rows) and model == embedder.identity()


def test_an_npz_is_read_by_evaluation(embedder: FaceEmbedder, photos: Path, tmp_path: Path) -> None:
    embed_folder(embedder, photos, tmp_path / "faces.npz", aligned=True, progress=False)
    StoredEmbeddings(tmp_path / "faces.npz")
    with np.load(tmp_path / "faces.npz") as content:
        assert sorted(content["files"]) == NAMES
        np.testing.assert_allclose(np.linalg.norm(content["embeddings"], axis=1), 1, atol=1e-5)


class Broken:
    """An embedder whose run ends after some batches."""

    def __init__(self, embedder: FaceEmbedder, after: int) -> None:
        self.whole, self.after = embedder, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def embed_batches(self, *args: Any, **options: Any) -> Any:
        for number, batch in enumerate(self.whole.embed_batches(*args, **options)):
            if number == self.after:
                raise KeyboardInterrupt
            yield batch


def test_a_run_that_was_broken_off_goes_on(
    embedder: FaceEmbedder, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photo_folder, "PART", 1)
    options = {"aligned": True, "progress": False, "batch_size": 1}
    out, whole = tmp_path / "out" / "faces.parquet", tmp_path / "whole.parquet"
    with pytest.raises(KeyboardInterrupt):
        embed_folder(Broken(embedder, 5), photos, out, **options)  # type: ignore[arg-type]
    (parts,) = out.parent.iterdir()
    if os.name == "posix":
        assert stat.S_IMODE(parts.stat().st_mode) == 0o700
    _photo(photos / "anna" / "1.png", 77)  # changed meanwhile
    _photo(photos / "aaron.png", 78)  # new
    (photos / "anna" / "2.JPG").unlink()  # gone
    written = [parquet.read_table(path)["file"].to_pylist() for path in sorted(parts.glob("part-*"))]
    assert written[:2] == [["anna/1.png"], ["anna/2.JPG"]] and len(written) > 2
    (parts / "part-00000000.parquet").write_bytes(b"PAR1")  # damaged by a power cut
    report = embed_folder(embedder, photos, out, **options)
    assert 1 <= report.kept <= 3 and list(report.errors) == ["anna/broken.jpg"]
    embed_folder(embedder, photos, whole, **options)
    found, expected = _table(out), _table(whole)
    assert len(parquet.read_table(out)) == len(parquet.read_table(whole)) == len(expected), "a photo is there once"
    assert found == expected and "aaron.png" in found and "anna/2.JPG" not in found
    assert [path.name for path in out.parent.iterdir()] == ["faces.parquet"]


def test_faces_of_one_photo_stay_together(
    embedder: FaceEmbedder, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a photo whose faces came in two batches nothing is kept before the last of them is there."""
    monkeypatch.setattr(photo_folder, "PART", 1)

    class Twice(Broken):
        def embed_batches(self, *args: Any, **options: Any) -> Any:
            for number, batch in enumerate(self.whole.embed_batches(*args, **options)):
                for _ in range(2 if len(batch) else 1):
                    if number == self.after:
                        raise KeyboardInterrupt
                    yield batch

    options = {"aligned": True, "progress": False, "batch_size": 1}
    out = tmp_path / "faces.parquet"
    with pytest.raises(KeyboardInterrupt):
        embed_folder(Twice(embedder, 3), photos, out, **options)  # type: ignore[arg-type]
    embed_folder(Twice(embedder, 99), photos, out, **options)  # type: ignore[arg-type]
    assert sorted(parquet.read_table(out)["file"].to_pylist()) == sorted(NAMES * 2)


def test_what_cannot_be_is_said(embedder: FaceEmbedder, photos: Path, tmp_path: Path, model_dir: Path) -> None:
    options: dict[str, Any] = {"aligned": True, "progress": False}
    with pytest.raises(ValueError, match=r"give a name that ends in .parquet or .npz"):
        embed_folder(embedder, photos, tmp_path / "faces.csv", **options)
    with pytest.raises(FileNotFoundError, match="no photo or folder at"):
        embed_folder(embedder, tmp_path / "nowhere", tmp_path / "faces.npz", **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no photo"):
        embed_folder(embedder, tmp_path / "empty", tmp_path / "faces.npz", **options)
    with pytest.raises(ValueError, match=r"none of 1 photos gave a face; the first: .*broken.jpg"):
        embed_folder(embedder, photos / "anna" / "broken.jpg", tmp_path / "faces.npz", **options)
    (tmp_path / "there.npz").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"there.npz is there already"):
        embed_folder(embedder, photos, tmp_path / "there.npz", **options)
    with pytest.raises(KeyboardInterrupt):
        embed_folder(Broken(embedder, 0), photos, tmp_path / "begun.npz", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="was begun with another model or other options; delete"):
        embed_folder(embedder, photos, tmp_path / "begun.npz", faces="central", **options)
    other = FaceEmbedder(embedder.embedder, engine=lambda pixel_values: (pixel_values.mean((2, 3)), None))
    with pytest.raises(ValueError, match="was begun with another model or other options; delete"):
        embed_folder(other, photos, tmp_path / "begun.npz", **options)
    with pytest.raises(ValueError, match="no table of `adaptface embed`"):
        read_embeddings(tmp_path / "there.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".begun.npz.parts", "empty", "photos", "there.npz"]


def test_whose_photo_it_is() -> None:
    assert [person_of(name) for name in ("anna/1.png", "bob/x/1.png", "cara.png")] == ["anna", "bob", "cara"]


def test_a_single_photo(photos: Path) -> None:
    assert photos_below(photos / "cara.png") == (photos, ["cara.png"], {})


def test_what_may_be_meant_as_a_photo_is_named(embedder: FaceEmbedder, photos: Path, tmp_path: Path) -> None:
    (photos / "bob" / "4.HEIC").write_bytes(b"\0" * 9)
    (photos / "old.parquet").write_bytes(b"PAR1")  # a table or a gallery may lie there
    expected = {"anna/broken.jpg", "bob/4.HEIC"}
    if os.name == "posix":
        (photos / "dora").symlink_to(photos.parent / "elsewhere")
        _photo(photos.parent / "elsewhere" / "1.png", 7)
    if sys.platform == "linux":  # elsewhere names are Unicode
        _photo(photos / "bob" / os.fsdecode(b"\xe9.png"), 8)
        expected.add("bob/\\udce9.png")
    report = embed_folder(embedder, photos, tmp_path / "f.parquet", aligned=True, progress=False)
    assert set(report.errors) == expected and report.photos == report.faces + len(expected)
    assert "convert it" in report.errors["bob/4.HEIC"]
    assert "dora/1.png" in _table(tmp_path / "f.parquet") or os.name != "posix"
    gallery = Gallery(16, model=embedder.identity())
    assert enroll_folder(embedder, gallery, photos, aligned=True, progress=False) == report


@pytest.mark.parametrize("via", ["folder", "table"])
def test_people_are_enrolled(embedder: FaceEmbedder, photos: Path, tmp_path: Path, via: str) -> None:
    gallery, source = Gallery(16, model=embedder.identity()), photos
    if via == "table":
        source = tmp_path / "faces.parquet"
        embed_folder(embedder, photos, source, aligned=True, progress=False)
    report = enroll_folder(embedder, gallery, source, aligned=True, progress=False)
    assert sorted(gallery.identities) == ["anna", "bob", "cara"] and report.faces == gallery.templates == 5
    assert sorted(gallery.sources("bob")) == ["bob/2.png", "bob/x/1.png"]
    query = embedder.embed(str(photos / "bob" / "2.png"), aligned=True).embeddings
    (matches,) = gallery.search(query, k=1)
    assert (matches[0].identity, matches[0].source) == ("bob", "bob/2.png")
    enroll_folder(embedder, gallery, photos / "cara.png", "anna", aligned=True, progress=False)
    assert len(gallery.sources("anna")) == 3


def test_a_table_of_another_model_is_refused(embedder: FaceEmbedder, photos: Path, tmp_path: Path) -> None:
    embed_folder(embedder, photos, tmp_path / "faces.parquet", aligned=True, progress=False)
    with pytest.raises(ValueError, match="model"):
        enroll_folder(embedder, Gallery(16, model={"weights_sha256": "0"}), tmp_path / "faces.parquet")


class TestCommands:
    @pytest.fixture
    def run(self, model_dir: Path) -> Any:
        def run(*words: object, model: bool = True) -> tuple[int, str, str]:
            options = ["--model", str(model_dir)] if model else []
            done = CliRunner().invoke(app, [*map(str, words), *options])
            return done.exit_code, done.stdout, done.stderr

        return run

    def test_embed(self, run: Any, photos: Path, tmp_path: Path) -> None:
        code, out, _ = run("embed", photos, tmp_path / "f.parquet", "--aligned", "--json")
        said = json.loads(out)
        assert code == 0 and (said["photos"], said["faces"]) == (6, 5) and list(said["errors"]) == ["anna/broken.jpg"]
        code, _, err = run("embed", photos, tmp_path / "f.parquet", "--aligned")
        assert code == 1 and "is there already" in err
        code, out, err = run("embed", photos, tmp_path / "g.npz", "--aligned")
        assert code == 0 and "5 faces of 6 photos" in out and "left out: anna/broken.jpg: " in err

    def test_verify_answers_with_its_exit_code(self, run: Any, photos: Path, tiny_backbone_dir: Path, tmp_path: Path):
        anna, bob = photos / "anna" / "1.png", photos / "bob" / "2.png"
        code, out, _ = run("verify", anna, anna, "--aligned")
        assert code == 0 and "the same person: similarity 1.0000" in out and "false accept rate of 0.001 on dev" in out
        code, out, _ = run("verify", anna, bob, "--aligned", "--threshold", "0.99999", "--json")
        said = json.loads(out)
        assert code == 3 and said["same"] is False and -1 <= said["similarity"] <= 1
        assert run("verify", anna, bob, "--aligned", "--far", "0.1")[0] == 0  # at a threshold below any pair
        code, _, err = run("verify", anna, bob, "--aligned", "--far", "0.5")
        assert code == 1 and "measured are 0.001, 0.1" in err
        code, _, err = run("verify", anna, photos / "anna" / "broken.jpg", "--aligned")
        assert code == 1 and "broken.jpg" in err and "Traceback" not in err
        bare = tmp_path / "bare"
        build_tiny_model(tiny_backbone_dir, seed=0).save_pretrained(bare)
        AdaptFaceImageProcessor(size=56).save_pretrained(bare)
        code, out, err = run("verify", anna, bob, "--aligned", "--model", bare, model=False)
        assert code == 1 and "undecided" in out and "--write_thresholds" in err
        assert run("verify", anna)[0] == 2
        for threshold in ("nan", "inf", "-1.5"):
            code, _, err = run("verify", anna, bob, "--aligned", "--threshold", threshold)
            assert code == 2 and "no cosine similarity" in err

    def test_a_gallery(self, run: Any, photos: Path, tmp_path: Path) -> None:
        gallery, anna = tmp_path / "people.parquet", photos / "anna" / "1.png"
        code, out, _ = run("enroll", gallery, photos, "--aligned")
        assert code == 0 and "5 faces of 6 photos enrolled, 3 people in it" in out
        code, out, _ = run("search", gallery, anna, "--aligned", "-k", "1")
        assert code == 0 and "1.0000  anna (anna/1.png)" in out and "threshold 0.9000, 3 people" in out
        code, out, _ = run("search", gallery, anna, "--aligned", "--threshold", "-1", "-k", "2", "--json")
        assert code == 0 and len(json.loads(out)["faces"][0]["matches"]) == 2
        code, out, _ = run("remove", gallery, "anna", "--json", model=False)
        assert code == 0 and json.loads(out) == {"gallery": str(gallery), "removed": 2, "identities": 2}
        code, out, _ = run("search", gallery, anna, "--aligned", "--threshold", "0.99999", "--json")
        assert code == 3 and json.loads(out)["faces"][0]["matches"] == []
        code, out, _ = run("search", gallery, anna, "--aligned", "--threshold", "0.99999")
        assert code == 3 and "no match" in out
        broken = photos / "anna" / "broken.jpg"
        code, out, err = run("search", gallery, broken, photos / "cara.png", "--aligned", "--json")
        said = json.loads(out)
        assert code == 1 and "broken.jpg" in err and list(said["errors"]) == [str(broken)]
        assert [face["matches"][0]["identity"] for face in said["faces"]] == ["cara"]
        code, _, err = run("remove", gallery, "nobody", model=False)
        assert code == 1 and "nobody" in err
        code, _, err = run("search", tmp_path / "none.parquet", anna)
        assert code == 1 and "there is no gallery" in err

    def test_detect(self, run: Any, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Two:
            def __init__(self, file: Path | None) -> None:
                assert file == Path("yunet.onnx")

            def detect(self, photo: Image.Image) -> list[Face]:
                if photo.size == (30, 30):
                    return []
                return [Face((float(x), 0, 112 - x, 112 - x), np.zeros((5, 2)), 0.9) for x in (0, 60)]

        monkeypatch.setattr("adaptface.detection.FaceDetector", Two)
        two, none, options = photos / "cara.png", photos / "none.png", ("--detector", "yunet.onnx", "--json")
        Image.new("RGB", (30, 30)).save(none)

        def boxes(*words: object) -> tuple[int, list[list[float]]]:
            code, out, _ = run("detect", *words, *options, model=False)
            return code, [face["box"] for those in json.loads(out)["faces"].values() for face in those]

        assert boxes(two) == (0, [[0, 0, 112, 112], [60, 0, 52, 52]])
        assert boxes(two, "--faces", "largest") == (0, [[0, 0, 112, 112]])
        assert boxes(two, none, "--faces", "central")[0] == 3
        code, out, _ = run("detect", two, none, *options[:2], model=False)
        assert code == 3 and "cara.png: 2 faces" in out and "none.png: 0 faces" in out

    def test_photos_are_not_taken_for_crops_unasked(self, run: Any, photos: Path, monkeypatch: Any) -> None:
        class Nobody:
            file = Path(__file__)  # any file has a digest

            def __init__(self, file: Path | None) -> None:
                pass

            def detect(self, photo: Image.Image, name: str | None = None) -> list[Face]:
                return []

        monkeypatch.setattr("adaptface.faces.FaceDetector", Nobody)
        for words in (("verify", photos / "cara.png", photos / "cara.png"), ("embed", photos, photos / "f.npz")):
            code, _, err = run(*words)
            assert code == 1 and "no face was found" in err and "--aligned" in err

    def test_explain(self, run: Any, photos: Path, tmp_path: Path) -> None:
        out_file = tmp_path / "page.html"
        code, out, _ = run("explain", photos / "cara.png", "--aligned", "--out", out_file, "--json")
        assert code == 0 and json.loads(out) == {"files": [str(out_file)]} and out_file.stat().st_size > 5000
        assert str(photos) not in out_file.read_text(encoding="utf-8")

    def test_export_to_onnx(self, run: Any, model_dir: Path, tmp_path: Path) -> None:
        words = ("export", model_dir, tmp_path / "m.onnx", "--to", "onnx")
        code, _, err = run(*words, model=False)
        assert code == 1 and "--base_license ID" in err
        code, _, err = run(*words, "--base_license", "apache-2.0", "--domain_mix", "pose", model=False)
        assert code == 1 and "mixes the experts itself" in err
        folder = ("export", model_dir, tmp_path, "--to", "onnx", "--base_license", "apache-2.0")
        code, _, err = run(*folder, model=False)
        assert code == 1 and f"{tmp_path} is a folder; name a file, " in err
        code, out, _ = run(*words, "--base_license", "apache-2.0", "--json", model=False)
        assert code == 0 and json.loads(out)["bytes"] == {str(words[2]): words[2].stat().st_size}


@pytest.mark.real_faces
def test_photos_of_people(embedder: FaceEmbedder, model_dir: Path, real_faces: Path, tmp_path: Path) -> None:
    models = real_faces.parent / "models"
    detector = models / "face_detection_yunet_2026may.onnx"
    photo = sorted((real_faces / "raw_photos").iterdir())[0]
    done = CliRunner().invoke(app, ["detect", str(photo), "--detector", str(detector), "--json"])
    assert done.exit_code == 0 and len(json.loads(done.stdout)["faces"][str(photo)][0]["landmarks"]) == 5
    words = ["embed", str(photo), str(tmp_path / "f.parquet"), "--model", str(model_dir), "--detector", str(detector)]
    assert CliRunner().invoke(app, words).exit_code == 0
    (row,) = _table(tmp_path / "f.parquet").values()
    assert len(row["landmarks"]) == 10 and row["score"] > 0.7 and torch.tensor(row["box"])[2:].min() > 20
    blank = tmp_path / "blank.png"
    Image.new("RGB", (300, 300), (120, 120, 120)).save(blank)
    assert CliRunner().invoke(app, ["detect", str(blank), "--detector", str(detector)]).exit_code == 3
    none = str(tmp_path / "none.jpg")
    done = CliRunner().invoke(app, ["detect", none, str(photo), "--detector", str(detector), "--json"])
    said = json.loads(done.stdout)
    assert done.exit_code == 1 and none in done.stderr
    assert list(said["errors"]) == [none] and list(said["faces"]) == [str(photo)]
