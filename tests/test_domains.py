"""Domain labels: what is measured is right, labels follow, and the sidecar comes back on its own source only."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import ndimage
from scipy.stats import spearmanr
from typer.testing import CliRunner

from adaptface.cli import app
from adaptface.data import domains as module
from adaptface.data.base import FaceSource
from adaptface.data.domains import Known, Rule, as_text, label_faces, measure, read_known, yaw_proxy
from adaptface.data.folder import FolderSource
from adaptface.data.lists import read_csv
from adaptface.data.sources import open_source
from adaptface.data.synthetic import TEMPLATE, Nuisance, render
from tests import training
from tests.record_files import write_face_records

FILES = ("ann/1.png", "ann/2.png", "ann/10.png", "bob/1.png", "bob/2.png")


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` converts parquet into its cache: keep that out of the user's home, and the progress bars silent."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two people; each image is noise of its own."""
    for number, file in enumerate(FILES):
        path = tmp_path / "faces" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (30, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return tmp_path / "faces"


def write_table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def yaws(path: Path, values: Sequence[object] = (0.1, -0.5, 0.36, 0.35, 0)) -> Path:
    return write_table(path, "file,turn", *(f"{file},{value}" for file, value in zip(FILES, values, strict=True)))


def rows(path: Path) -> list[dict[str, str]]:
    return [row for _, row in read_csv(path)]


def labels(source: FaceSource) -> list[str]:
    return [source.domains[number] if number >= 0 else "" for number in source.domain_labels.tolist()]


def looked_at(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Indices of the images that are opened from here on; the one after so many of them cannot be."""
    indices: list[int] = []
    image = FolderSource.image

    def counted(self: FolderSource, index: int) -> Image.Image:
        if len(indices) == stop_after:
            raise KeyboardInterrupt
        indices.append(index)
        return image(self, index)

    monkeypatch.setattr(FolderSource, "image", counted)
    return indices


# --- measurements ---------------------------------------------------------------------------------------------


def test_measurements_by_plain_loops() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112), dtype=np.uint8)
    found = measure(Image.fromarray(pixels).convert("RGB"))
    grey = pixels.tolist()
    left = [grey[y][x] for y in range(28, 98) for x in range(28, 56)]
    right = [grey[y][x] for y in range(28, 98) for x in range(56, 84)]
    left_mean, right_mean = sum(left) / len(left), sum(right) / len(right)
    assert found.luminance == pytest.approx(sum(left + right) / len(left + right))
    assert found.imbalance == pytest.approx((right_mean - left_mean) / (right_mean + left_mean))
    laplacian = ndimage.laplace(pixels.astype(float))[1:-1, 1:-1]
    assert found.sharpness == pytest.approx(((laplacian - laplacian.mean()) ** 2).mean())
    assert np.isnan(found.age) and found.error is None


def test_measurements_have_their_units() -> None:
    half = np.zeros((56, 56, 3), np.uint8)
    half[:, :28], half[:, 28:] = 60, 120
    found = measure(Image.fromarray(half).resize((224, 224), Image.Resampling.NEAREST))
    assert found.luminance == pytest.approx(90, abs=0.5) and found.imbalance == pytest.approx(1 / 3, abs=0.01)
    assert measure(Image.new("RGB", (50, 50), (255, 0, 0)))[:3] == (pytest.approx(76, abs=0.5), 0, 0)  # 0.299 x 255
    assert measure(Image.new("RGB", (50, 50)))[:3] == (0, 0, 0)  # black: no side is brighter


def test_yaw_proxy_by_hand() -> None:
    level = [30, 50, 70, 50, 60, 70]  # eyes 40 apart, the nose 10 right of their middle
    steep = [100, 100, 100, 140, 90, 130]  # the same turn of a head that lies on its side: 10 along, 10 across
    mirrored = [30, 50, 70, 50, 40, 70]
    points = np.array([level, steep, mirrored, [9, 9, 9, 9, 5, 5], [30, 50, np.nan, 50, 60, 70]], float)
    np.testing.assert_allclose(yaw_proxy(points), [0.25, 0.25, -0.25, np.nan, np.nan])
    eyes_and_nose = np.stack([TEMPLATE.real, TEMPLATE.imag], axis=1)[:3].reshape(1, 6)
    assert abs(yaw_proxy(eyes_and_nose)[0]) < 0.01  # the ArcFace template is frontal


@pytest.mark.parametrize("person", [1, 2])
def test_rendered_faces_are_in_order(person: int) -> None:
    """Light from left to right, more of it, and less blur: each moves its own measurement, the right way."""
    light = [measure(_shot(person, light_azimuth=a, light_strength=0.7)).imbalance for a in (-60, -30, 0, 30, 60)]
    assert light == sorted(light) and light[0] < -0.1 and light[-1] > 0.1
    exposed = [measure(_shot(person, exposure=e)).luminance for e in (0.6, 0.8, 1.0, 1.3)]
    assert exposed == sorted(exposed)
    sharp = [measure(_shot(person, blur=b)).sharpness for b in (2.0, 1.0, 0.5, 0.0)]
    assert sharp == sorted(sharp) and sharp[-1] > 4 * sharp[0]


def _shot(person: int, **nuisance: float) -> Image.Image:
    return Image.fromarray(render(person, Nuisance(**nuisance)))


def test_yaw_proxy_of_turned_heads_is_in_order() -> None:
    """Of a head's landmarks seen from -60 to 60 degrees, the true turns of the renderer."""
    from adaptface.data.synthetic import _head, _turn

    for person in range(3):
        spots = [
            (_head(person, 112).landmarks @ _turn(np.radians(yaw), 0.0).T)[:3, :2].ravel() for yaw in range(-60, 61, 15)
        ]
        proxies = yaw_proxy(np.array(spots))
        assert spearmanr(range(9), proxies).statistic == 1
        assert abs(proxies[4]) < 0.12 and abs(proxies[[0, -1]]).min() > Rule().yaw_threshold


# --- the rule -------------------------------------------------------------------------------------------------


def test_rule_of_turns_and_ages() -> None:
    nan = np.nan
    people = np.array([7, 7, 7, 7, 7, 3, 3, 3])
    ages = np.array([20, 30, 30, 44.9, 45, 17.9, 55, nan])  # medians 30 and 36.45
    turns = np.array([0.35, -0.36, 0, 0, 0, 0, nan, 0])
    assert Rule().domains(people, turns, ages).tolist() == [
        "general", "pose", "general", "general", "age", "age", "age", "",
    ]  # fmt: skip
    unknown = np.full(8, nan)
    assert Rule().domains(people, turns, unknown).tolist() == ["general", "pose", *["general"] * 4, "", "general"]
    assert Rule(age_gap=10).domains(people, unknown, ages).tolist() == ["age", *["general"] * 2, *["age"] * 4, ""]
    assert Rule(age_range=(0, 100)).domains(people, unknown, ages).tolist() == [
        *["general"] * 4, "age", "age", "age", "",
    ]  # fmt: skip
    assert set(Rule().domains(people, unknown, unknown)) == {""}
    assert Rule().domains(people, turns + 1, ages).tolist() == [
        *["pose"] * 6,
        "age",
        "pose",
    ]  # a turn goes before an age


def test_degrees_need_a_threshold_in_degrees() -> None:
    people, degrees, unknown = np.array([0, 0, 1]), np.array([-10.0, 45.0, 3.0]), np.full(3, np.nan)
    with pytest.raises(ValueError, match=r"yaw_threshold: 0.35 is for a nose offset .* the median yaw is 10"):
        Rule().domains(people, degrees, unknown)
    assert Rule(yaw_threshold=40).domains(people, degrees, unknown).tolist() == ["general", "pose", "general"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"yaw_threshold": -1}, "yaw_threshold: -1"), ({"age_gap": -2}, "age_gap: -2"), ({"age_range": (9, 9)}, "range")],
)
def test_thresholds_that_are_none(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(**wrong)


# --- sources and sidecars -------------------------------------------------------------------------------------


def sources(folder: Path, root: Path) -> dict[str, tuple[Path, list[str]]]:
    """The same faces in every kind of source, and the keys of its images."""
    contents = {file: (folder / file).read_bytes() for file in FILES}
    people = [[contents[f] for f in FILES if f.startswith(name)] for name in ("ann", "bob")]
    write_face_records(root / "rec", people)
    table = {"image": list(contents.values()), "identity": [file.split("/")[0] for file in FILES]}
    pq.write_table(pa.table(table), root / "faces.parquet")
    write_table(folder / "list.txt", *(f"{file} {file.split('/')[0]}" for file in reversed(FILES)))
    return {
        "folder": (folder, list(FILES)),
        "list": (folder / "list.txt", list(reversed(FILES))),
        "records": (root / "rec", ["1", "2", "3", "4", "5"]),
        "dataset": (root / "faces.parquet", ["0", "1", "2", "3", "4"]),
    }


@pytest.mark.parametrize("kind", ["folder", "list", "records", "dataset"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_every_kind_of_source(kind: str, suffix: str, folder: Path, tmp_path: Path) -> None:
    path, keys = sources(folder, tmp_path)[kind]
    source = open_source(path)
    assert [source.key(at) for at in range(5)] == keys
    table = write_table(tmp_path / "known.csv", "file,turn", *(f"{k},{t}" for k, t in zip(keys, "10020", strict=True)))
    sidecar = tmp_path / f"labels{suffix}"
    report = label_faces(source, sidecar, read_known(source, table, yaw="Turn"))
    assert report["domains"] == {"general": 3, "pose": 2, "age": 0, "unlabelled": 0} and report["measured"] == 5
    labelled = open_source(path, domain_labels=sidecar)
    assert labels(labelled) == ["pose", "general", "general", "pose", "general"]
    assert labelled.domains == ("general", "pose", "age") and labelled.domain_labels.dtype == np.int64
    assert labelled.labels.tolist() == source.labels.tolist()
    at = [source.encoded(index) for index in range(5)].index((folder / FILES[1]).read_bytes())
    stored = pq.read_table(sidecar).to_pylist() if suffix == ".parquet" else rows(sidecar)
    assert stored[at]["file"] == keys[at] and stored[at]["identity"] == source.identities[source.labels[at]]
    expected = measure(Image.open(folder / FILES[1]))
    for name in ("luminance", "imbalance", "sharpness"):
        assert float(stored[at][name]) == getattr(expected, name)


def test_the_order_of_the_rows_does_not_matter(folder: Path, tmp_path: Path) -> None:
    table = write_table(
        tmp_path / "x.csv", "file,domain", *(f"{file},{'pose' * (at == 1)}" for at, file in enumerate(FILES))
    )
    lines = table.read_text().splitlines()
    write_table(table, lines[0], *reversed(lines[1:]))
    assert labels(open_source(folder, domain_labels=table)) == ["", "pose", "", "", ""]


def test_a_sidecar_replaces_the_labels_of_the_data(folder: Path, tmp_path: Path) -> None:
    write_table(folder / "metadata.csv", "file,domain", "ann/1.png,night", "bob/1.png,pose")
    table = write_table(tmp_path / "x.csv", "file,domain", *(f"{f},{d}" for f, d in zip(FILES, "abab ", strict=True)))
    open_labels = open_source(folder, domains=None, domain_labels=table)
    assert labels(open_labels) == ["a", "b", "a", "b", ""] and open_labels.domains == ("a", "b")
    with pytest.raises(ValueError, match=r"x.csv, 'ann/1.png': domain 'a' is unknown; the configured domains are pose"):
        open_source(folder, domains=("pose",), domain_labels=table)


def test_a_sidecar_of_another_source_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(*lines: str) -> str:
        with pytest.raises(ValueError, match="is of another source than") as caught:
            open_source(folder, domain_labels=write_table(tmp_path / "x.csv", *lines))
        return str(caught.value)

    text = refused("file,domain", "ann/1.png,pose", "ann/2.png,", "eve/1.png,", "eve/2.png,age")
    assert "3 of 5 images have no row, 2 rows are no image, 0 name another" in text
    assert "\n  'ann/10.png' has no row" in text and "line 4: 'eve/1.png' is no image" in text
    assert "1 of 5 images have no row, 0 rows" in refused("file,domain", *(f"{file},pose" for file in FILES[:4]))
    text = refused("file,domain,identity", *(f"{file},pose,{'ann' if at else 'amy'}" for at, file in enumerate(FILES)))
    assert "3 name another identity" in text and "line 2: 'ann/1.png' is of 'ann', not of 'amy'" in text
    many = refused("file,domain", *(f"zoe/{n}.png,pose" for n in range(30)))
    assert len(many.splitlines()) == 22 and "and 15 more" in many


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,mood", "ann/1.png,good"], "no column 'domain', only file, mood"),
        (["file,domain"], "has no row"),
        (["domain", "pose"], "no column 'file'"),
        (["file,domain", "ann/1.png,pose", "ann/1.png,age"], "line 3: 'ann/1.png' was listed before"),
    ],
)
def test_what_is_no_sidecar(lines: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(folder, domain_labels=write_table(tmp_path / "x.csv", *lines))


def test_files_that_are_missing_or_damaged(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv: no such file"):
        open_source(folder, domain_labels=tmp_path / "nowhere.csv")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match=r"x\.parquet: is no parquet file, or a damaged one"):
        open_source(folder, domain_labels=tmp_path / "x.parquet")


def test_names_of_any_encoding(folder: Path, tmp_path: Path) -> None:
    try:
        shutil.copy(folder / "bob/1.png", bytes(folder / "bob") + b"/\xff,\n.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    source = open_source(folder)
    known = Known({"yaw": np.array([0.0, 0, 0, 0, 0, 1])})
    label_faces(source, tmp_path / "x.csv", known)
    assert labels(open_source(folder, domain_labels=tmp_path / "x.csv")) == [*["general"] * 5, "pose"]
    with pytest.raises(ValueError, match=r"is not UTF-8; write a \.csv"):
        label_faces(source, tmp_path / "x.parquet", known)


# --- tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_landmarks_and_ages_of_a_table(suffix: str, folder: Path, tmp_path: Path) -> None:
    columns: dict[str, list] = {name: [value] * 4 for name, value in zip(
        module.LANDMARK_COLUMNS, (30.0, 50.0, 70.0, 50.0, 60.0, 70.0), strict=True)}  # fmt: skip
    columns |= {"file": [".\\ann\\1.png", "./ann/2.png", "bob/2.png", "eve/1.png"], "Age": [30, None, 61.5, 9]}
    columns["nose_x"] = [60.0, 70.0, 50.0, 50.0]
    path = tmp_path / f"known{suffix}"
    if suffix == ".parquet":
        columns["file"][0] = "ann/1.png"
        pq.write_table(pa.table(columns), path)
    else:
        lines = [
            ",".join("" if cell is None else str(cell) for cell in row) for row in zip(*columns.values(), strict=True)
        ]
        write_table(path, ",".join(columns), *lines)
    source = open_source(folder)
    known = read_known(source, path, age="age", landmarks=True)
    np.testing.assert_allclose(known.values["yaw"], [0.25, 0.5, np.nan, np.nan, 0])
    np.testing.assert_allclose(known.values["age"], [30, np.nan, np.nan, np.nan, 61.5])
    assert len(known.strangers) == 1 and "'eve/1.png' is no image" in known.strangers[0]
    assert [Path(image).name for image in known.unlisted] == ["10.png", "1.png"]
    report = label_faces(source, tmp_path / "out.csv", known)
    assert [row["domain"] for row in rows(tmp_path / "out.csv")] == ["general", "pose", "", "", "age"]
    text = as_text(report)
    assert "unlabelled: 2 (40.0 %)" in text and "rows without image: 1\n" in text and "images without row: 2\n" in text


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["file,turn", "ann/1.png,0"], {"yaw": "yaw"}, "no column 'yaw', only file, turn"),
        (["file,turn", "ann/1.png,0"], {"landmarks": True}, "no column 'lefteye_x', only file, turn"),
        (["file,turn", "ann/1.png,much"], {"yaw": "turn"}, "line 2: turn 'much' is no finite number"),
        (["file,turn", "ann/1.png,inf"], {"yaw": "turn"}, "line 2: turn 'inf' is no finite number"),
        (["file,turn", "ann/1.png,0", "./ann/1.png,1"], {"yaw": "turn"}, "line 3: 'ann/1.png' was listed before"),
        (["file,turn", "1.png,0", "2.png,0"], {"yaw": "turn"}, "none of its 2 rows .* called 'ann/1.png'\n  .*'1.png'"),
        (["file,turn", "ann/1.png,0"], {}, "say what to take from it"),
        (["file,turn", "ann/1.png,0"], {"yaw": "turn", "landmarks": True}, "both tell the yaw"),
    ],
)
def test_bad_tables(lines: list[str], options: dict, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_known(open_source(folder), write_table(tmp_path / "known.csv", *lines), **options)


# --- again, and after a stop ----------------------------------------------------------------------------------


def test_again_by_other_thresholds_measures_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, sidecar = open_source(folder), tmp_path / "x.csv"
    label_faces(source, sidecar, read_known(source, yaws(tmp_path / "known.csv"), yaw="turn"))
    before = rows(sidecar)
    assert [row["domain"] for row in before] == ["general", "pose", "pose", "general", "general"]
    opened = looked_at(monkeypatch)
    report = label_faces(source, sidecar, rule=Rule(yaw_threshold=0.4))
    assert not opened and report["measured"] == 0
    assert report["domains"] == {"general": 4, "pose": 1, "age": 0, "unlabelled": 0}
    assert rows(sidecar) == [{**row, "domain": "pose" if at == 1 else "general"} for at, row in enumerate(before)]
    label_faces(source, sidecar, read_known(source, yaws(tmp_path / "known.csv", ["", 0, 0, 0, 9]), yaw="turn"))
    assert [row["domain"] for row in rows(sidecar)] == ["", "general", "general", "general", "pose"] and not opened


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_broken_off_call_goes_on(suffix: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY", 1)
    source, sidecar = open_source(folder), tmp_path / f"x{suffix}"
    label_faces(source, tmp_path / f"whole{suffix}")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr("adaptface.data.parallel._CHUNK", 1)
        looked_at(patch, stop_after=3)
        label_faces(source, sidecar)
    assert not sidecar.exists()  # complete or absent
    opened = looked_at(monkeypatch)
    assert label_faces(source, sidecar)["measured"] == 2 and opened == [3, 4]
    assert sidecar.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", f"whole{suffix}", f"x{suffix}"]


def test_what_is_there_stays(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, sidecar = open_source(folder), tmp_path / "x.csv"
    label_faces(source, sidecar)
    saved = sidecar.read_bytes()
    monkeypatch.setattr(module, "_write", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space left"):
        label_faces(source, sidecar, rule=Rule(yaw_threshold=1))
    assert sidecar.read_bytes() == saved
    monkeypatch.undo()
    (folder / "bob" / "2.png").unlink()
    with pytest.raises(ValueError, match="0 of 4 images have no row, 1 rows are no image"):
        label_faces(open_source(folder), sidecar)
    assert sidecar.read_bytes() == saved


def test_broken_images_are_listed_and_tried_again(folder: Path, tmp_path: Path) -> None:
    good = (folder / "ann/2.png").read_bytes()
    (folder / "ann/2.png").write_bytes(good[:200])
    source, sidecar = open_source(folder), tmp_path / "x.csv"
    report = label_faces(source, sidecar, read_known(source, yaws(tmp_path / "known.csv"), yaw="turn"))
    assert len(report["broken"]) == 1 and "2.png" in report["broken"][0] and report["measured"] == 4
    assert report["measurements"]["luminance"]["known"] == 4 and report["measurements"]["yaw"]["known"] == 5
    assert rows(sidecar)[1]["luminance"] == "" and rows(sidecar)[1]["domain"] == "pose"
    assert "broken: 1\n" in as_text(report)
    (folder / "ann/2.png").write_bytes(good)
    report = label_faces(source, sidecar)
    assert report["measured"] == 1 and not report["broken"] and rows(sidecar)[1]["luminance"]


# --- age by a function ----------------------------------------------------------------------------------------

ESTIMATORS = """
calls = []
def by_width(image):
    assert image.mode == "RGB"
    calls.append(image.width)
    return image.width
def never(image): return float("nan")
def fails(image): raise KeyError("no model")
number = 3
"""


@pytest.fixture
def estimators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_ages.py").write_text(ESTIMATORS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_ages", raising=False)
    module.load_estimator.cache_clear()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_ages_by_a_function(
    workers: int, folder: Path, tmp_path: Path, estimators: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (60, 60)).save(folder / "ann/2.png")  # "60 years", all others 30
    source, sidecar = open_source(folder), tmp_path / "x.csv"
    label_faces(source, sidecar)
    report = label_faces(source, sidecar, estimator="my_ages:by_width", workers=workers)
    assert report["measured"] == 5 and [row["age"] for row in rows(sidecar)] == ["30.0", "60.0", *["30.0"] * 3]
    assert [row["domain"] for row in rows(sidecar)] == ["general", "age", *["general"] * 3]
    assert {row["estimator"] for row in rows(sidecar)} == {"my_ages:by_width"}
    opened = looked_at(monkeypatch)
    assert label_faces(source, sidecar, estimator="my_ages:by_width")["measured"] == 0 and not opened
    label_faces(source, sidecar)  # none named: what is known stays
    assert rows(sidecar)[1]["age"] == "60.0" and not opened
    label_faces(source, sidecar, estimator="my_ages:never")  # another one begins anew
    assert len(opened) == 5 and {row["age"] for row in rows(sidecar)} == {""} == {r["domain"] for r in rows(sidecar)}
    label_faces(source, sidecar, Known({"age": np.full(5, 20.0)}))
    assert {row["estimator"] for row in rows(sidecar)} == {""} and len(opened) == 5
    assert {row["age"] for row in rows(sidecar)} == {"20.0"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_ages", "write it as module:function, both importable"),
        ("no_such_module:age", "No module named 'no_such_module'"),
        ("my_ages:nothing", "has no attribute 'nothing'"),
        ("my_ages:number", "is no function"),
        ("my_ages:fails", r"failed on .*ann.1\.png: KeyError\('no model'\)"),
    ],
)
def test_functions_that_give_no_age(name: str, message: str, folder: Path, tmp_path: Path, estimators: None) -> None:
    with pytest.raises(ValueError, match=message):
        label_faces(open_source(folder), tmp_path / "x.csv", estimator=name)
    with pytest.raises(ValueError, match="both tell the age"):
        label_faces(open_source(folder), tmp_path / "x.csv", Known({"age": np.zeros(5)}), estimator="my_ages:never")


# --- the command, and training --------------------------------------------------------------------------------


def test_no_parquet_inside_an_image_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder would be a data set then, whose images are not those of the sidecar."""
    monkeypatch.setattr(module, "label_faces", lambda *_, **__: pytest.fail("nothing is measured"))
    for out in (folder / "faces.domains.parquet", folder / "sub" / ".." / "x.PARQUET"):
        done = CliRunner().invoke(app, ["domains", str(folder), "--out", str(out)])
        assert done.exit_code == 1 and "lies in the source, and" in done.stderr and "or as a .csv" in done.stderr
    monkeypatch.undo()
    out = folder / "faces.domains.csv"
    assert CliRunner().invoke(app, ["domains", str(folder), "--out", str(out), "--workers", "0"]).exit_code == 0
    assert len(open_source(folder, domain_labels=out)) == len(open_source(folder))


def test_command_text_and_json(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    words = ["domains", "faces/", "--table", str(yaws(tmp_path / "known.csv")), "--yaw", "turn", "--workers", "0"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "general: 3 (60.0 %)" in done.stdout and "pose: 2 (40.0 %)" in done.stdout
    assert "yaw known of 5; 5 %: -0.4" in done.stdout and "50 %: 0.1," in done.stdout
    done = CliRunner().invoke(app, [*words, "--yaw_threshold", "0.2", "--age_range", "1", "99", "--json"])
    report = json.loads(done.stdout)
    assert report["domains"]["pose"] == 3 and report["measured"] == 0 and report["sidecar"] == "faces.domains.csv"
    assert labels(open_source(folder, domain_labels=tmp_path / "faces.domains.csv"))[3] == "pose"
    (tmp_path / "here.py").write_text("def age(image): return 70", encoding="utf-8")  # found in the current folder
    done = CliRunner().invoke(app, ["domains", "faces", "--age_estimator", "here:age", "--workers", "0", "--json"])
    assert json.loads(done.stdout)["domains"]["age"] == 3, done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.txt"], "x.txt: a sidecar is a .csv or a .parquet file"),
        (["--out", "no/such/folder/x.csv"], "No such file or directory"),
        (["--yaw", "turn"], "give --table FILE"),
        (["--table", "known.csv", "--yaw", "speed"], "no column 'speed'"),
        (["--age_gap", "-3"], "age_gap: -3.0"),
    ],
)
def test_command_errors(
    words: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    yaws(tmp_path / "known.csv")
    done = CliRunner().invoke(app, ["domains", "faces", "--workers", "0", *words])
    assert done.exit_code == 1 and done.stderr.startswith("adaptface domains: ") and message in done.stderr


@pytest.mark.slow
def test_training_uses_the_labels(tiny_backbone_dir: Path, tmp_path: Path) -> None:
    """A run on labels of a sidecar is the run on the same labels in metadata.csv, and resumes with no others."""
    faces = training.write_faces(tmp_path)
    options = {"epochs": 1, "stop_after_steps": 1, "save_every_steps": 1, "log_every_steps": 1}
    training.train(faces, tiny_backbone_dir, tmp_path / "by_metadata", **options)
    sidecar = (faces / "faces" / "metadata.csv").rename(tmp_path / "labels.csv")
    training.train(faces, tiny_backbone_dir, tmp_path / "by_sidecar", domain_labels=sidecar, **options)
    ours, theirs = (training.read_log(tmp_path / run, "train") for run in ("by_sidecar", "by_metadata"))
    assert ours == theirs and ours[0]["domain_loss"] > 0
    with pytest.raises(SystemExit, match="training data: other identities, labels, domains or images"):
        training.train(faces, tiny_backbone_dir, tmp_path / "by_sidecar", resume="auto", **options)
    moved = sidecar.rename(tmp_path / "moved.csv")
    options["stop_after_steps"] = 2
    training.train(faces, tiny_backbone_dir, tmp_path / "by_sidecar", resume="auto", domain_labels=moved, **options)


@pytest.mark.real_faces
def test_real_faces(real_faces: Path, tmp_path: Path) -> None:
    source = open_source(real_faces / "faces_train")
    table = real_faces / "faces_train.csv"
    report = label_faces(source, tmp_path / "x.parquet", read_known(source, table, yaw="yaw_proxy"))
    proxies = np.array([float(row["yaw_proxy"]) for row in rows(table)])
    assert report["domains"]["pose"] == (abs(proxies) > 0.35).sum() > 0
    assert report["domains"]["unlabelled"] == 0 == len(report["broken"])
    assert len(open_source(real_faces / "faces_train", domain_labels=tmp_path / "x.parquet")) == report["measured"]
