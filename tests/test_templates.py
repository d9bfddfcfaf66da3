"""IJB-B and IJB-C: lists written as insightface has them, results against naive loops over the same files."""

import csv
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adaptface.cache import FeatureCache
from adaptface.data.templates import load_ijb
from adaptface.embedders import Preprocess
from adaptface.embedding import StoredEmbeddings, feature_batches
from adaptface.evaluation import SuspectLabelsError
from adaptface.metrics import IdentificationReport
from adaptface.templates import _mean_over_galleries, evaluate_templates, image_weights, template_features
from image_processing_adaptface import ARCFACE_TEMPLATE, AdaptFaceImageProcessor

SUBJECTS, SIDE = 12, 28


class Patches:
    """A stand-in: brightness of the patches of the left half, so that the mirror image has other features."""

    name = "patches"
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.preprocess = Preprocess(AdaptFaceImageProcessor(size=SIDE))

    def describe(self) -> dict[str, Any]:
        return {"kind": "stand-in", "name": self.name}

    def identity(self) -> dict[str, Any]:
        return {"weights": "none"}

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixel_values[..., : SIDE // 2], 7).flatten(1)  # (B, 24)


def write_ijb(folder: Path, name: str = "ijbc") -> Path:
    """Pictures of 12 people, as IJB's lists tell them apart.

    Everybody is enrolled in one template: half of them in each gallery. Two probes each; a template has one to three
    media of one to four images. Pairs are each enrolled template with each probe. Numbers have holes and no order.
    """
    rng = np.random.default_rng(0)
    meta, crops = folder / "meta", folder / "loose_crop"
    meta.mkdir(parents=True)
    crops.mkdir()
    looks = rng.normal(128, 30, (SUBJECTS, 6, 6, 3))
    subjects = rng.permutation(500)[:SUBJECTS].tolist()
    numbers = (rng.permutation(400)[: 3 * SUBJECTS] + 1).tolist()
    members, faces = [], []
    for at in rng.permutation(len(numbers)):
        for medium in rng.permutation(60)[: rng.integers(1, 4)]:  # the same numbers turn up in other templates
            for _ in range(rng.integers(1, 5)):
                image = f"{len(members) + 1}.png"
                look = (looks[at % SUBJECTS] + rng.normal(0, 60, (6, 6, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(look).resize((70, 76)).save(crops / image)
                points = ARCFACE_TEMPLATE * rng.uniform(0.4, 0.6) + rng.uniform(0, 9, 2) + rng.normal(0, 0.5, (5, 2))
                words = " ".join(f"{value:.3f}" for value in points.ravel())
                members.append(f"{image} {numbers[at]} {medium}")
                faces.append(f"{image} {words} {rng.uniform(0.1, 1):.3f}")
    (meta / f"{name}_face_tid_mid.txt").write_text("\n".join(members) + "\n")
    (meta / f"{name}_name_5pts_score.txt").write_text("\n".join(faces) + "\n")
    enrolled, probes = range(SUBJECTS), range(SUBJECTS, 3 * SUBJECTS)
    pairs = [f"{numbers[a]} {numbers[b]} {int(a == b % SUBJECTS)}" for a in enrolled for b in probes]
    (meta / f"{name}_template_pair_label.txt").write_text("\n".join(pairs) + "\n")
    gallery = "SG"[name == "ijbc"]
    for file, part in (
        (f"gallery_{gallery}1", range(SUBJECTS // 2)),
        (f"gallery_{gallery}2", range(SUBJECTS // 2, SUBJECTS)),
        ("probe_mixed", probes),
    ):
        with (meta / f"{name}_1N_{file}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["TEMPLATE_ID", "SUBJECT_ID", "FILENAME", "SIGHTING_ID"])
            for at in part:  # NIST's lists have a line for each image
                for _ in range(rng.integers(1, 3)):
                    writer.writerow([numbers[at], subjects[at % SUBJECTS], "img/1, 2.png", 7])
    return folder


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ijb(tmp_path_factory.mktemp("ijb") / "IJBC")


@pytest.fixture
def ijb(written: Path, tmp_path: Path) -> Path:
    """A copy to change; its images may be removed, but not written to."""
    shutil.copytree(written / "meta", tmp_path / "meta")
    shutil.copytree(written / "loose_crop", tmp_path / "loose_crop", copy_function=os.link)
    return tmp_path


def words(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


def naive_templates(folder: Path, name: str = "ijbc") -> dict[int, np.ndarray]:
    """As the reference describes it, template by template and medium by medium, from the files themselves."""
    embedder, processor = Patches(), AdaptFaceImageProcessor()
    images: dict[int, dict[int, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for (image, template, medium), (_, *points, score) in zip(
        words(folder / "meta" / f"{name}_face_tid_mid.txt"),
        words(folder / "meta" / f"{name}_name_5pts_score.txt"),
        strict=True,
    ):
        crop = processor.align(folder / "loose_crop" / image, np.array(points, dtype=float).reshape(5, 2))
        pixels = embedder.preprocess(crop)[None]
        feature = (embedder(pixels) + embedder(pixels.flip(-1)))[0].double().numpy()
        images[int(template)][int(medium)].append(feature * float(score))
    features = {}
    for template, media in images.items():
        total = np.sum([np.mean(medium, axis=0) for medium in media.values()], axis=0)
        features[template] = total / np.linalg.norm(total)
    return features


# ------------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("name", ["ijbb", "ijbc"])
def test_the_set_is_what_the_lists_say(tmp_path: Path, name: str) -> None:
    folder = write_ijb(tmp_path / "set", name)
    loaded = load_ijb(folder)
    meta = folder / "meta"
    members, faces = words(meta / f"{name}_face_tid_mid.txt"), words(meta / f"{name}_name_5pts_score.txt")
    assert loaded.name == name and len(loaded.images) == len(members) and not loaded.synthetic
    assert loaded.templates[loaded.template].tolist() == [int(template) for _, template, _ in members]
    assert loaded.media.tolist() == [int(medium) for *_, medium in members]
    assert loaded.scores.tolist() == [float(line[-1]) for line in faces]
    pairs = zip(loaded.templates[loaded.index_a], loaded.templates[loaded.index_b], loaded.same, strict=True)
    assert [[str(int(word)) for word in pair] for pair in pairs] == words(meta / f"{name}_template_pair_label.txt")
    assert loaded.suspect_labels() == loaded.notes() == []
    letter = {"ijbb": "S", "ijbc": "G"}[name]
    assert list(loaded.galleries) == [f"{letter}1", f"{letter}2"] and loaded.probes is not None
    for file, part in (("gallery_%s1" % letter, loaded.galleries[f"{letter}1"]), ("probe_mixed", loaded.probes)):  # noqa: UP031
        with (meta / f"{name}_1N_{file}.csv").open(newline="") as stream:
            rows = {(int(row["TEMPLATE_ID"]), int(row["SUBJECT_ID"])) for row in csv.DictReader(stream)}
        found = list(zip(loaded.templates[part.index].tolist(), part.subjects.tolist(), strict=True))
        assert len(found) == len(set(found)) and set(found) == rows


def test_images_are_warped_as_the_processor_warps_them(ijb: Path) -> None:
    loaded, processor = load_ijb(ijb), AdaptFaceImageProcessor()
    for index in (0, 7, len(loaded.images) - 1):
        name, *points, _ = words(ijb / "meta" / "ijbc_name_5pts_score.txt")[index]
        expected = processor.align(ijb / "loose_crop" / name, np.array(points, dtype=float).reshape(5, 2))
        crop = loaded.images[index]
        assert crop.size == (112, 112) and loaded.images.where(index) == str(ijb / "loose_crop" / name)
        assert np.abs(np.asarray(crop, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1  # rounding


def replace_line(path: Path, number: int, line: str) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


def test_landmarks_that_form_no_face_are_warped_by_least_squares(ijb: Path) -> None:
    points = ARCFACE_TEMPLATE[[2, 0, 4, 1, 3]] * 0.5 + [[3, 1]]  # out of order
    path = ijb / "meta" / "ijbc_name_5pts_score.txt"
    replace_line(path, 1, f"1.png {' '.join(map(str, points.ravel()))} 0.1")
    with pytest.raises(ValueError, match="landmarks"):
        AdaptFaceImageProcessor().align(ijb / "loose_crop" / "1.png", points)
    fitted = load_ijb(ijb).images.landmarks[0]
    # the similarity of both to the template, by solving x' = a x - b y + c, y' = b x + a y + d
    solutions = []
    for xy in (points, fitted):
        rows = [row for x, y in xy for row in ((x, -y, 1, 0), (y, x, 0, 1))]
        solutions.append(np.linalg.lstsq(np.array(rows), ARCFACE_TEMPLATE.ravel(), rcond=None)[0])
    assert solutions[0] == pytest.approx(solutions[1])
    assert load_ijb(ijb).images[0].size == (112, 112)


def test_lists_longer_than_a_block_with_blank_lines(ijb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_ijb(ijb)
    monkeypatch.setattr("adaptface.data.templates._LINES", 7)
    path = ijb / "meta" / "ijbc_template_pair_label.txt"
    path.write_text("\n" + path.read_text().replace("\n", " \r\n", 3) + "\n" * 20)
    loaded = load_ijb(ijb)
    for key in ("index_a", "index_b", "same", "template", "media", "scores"):
        assert np.array_equal(getattr(loaded, key), getattr(expected, key))
    replace_line(path, 30, "1 x 0")
    replace_line(path, 41, "1 2 0 0")
    with pytest.raises(ValueError, match=r"2 malformed lines:\s+line 30: .*found '1 x 0'\s+line 41: .* '1 2 0 0'"):
        load_ijb(ijb)


POINTS = " ".join(str(value) for value in ARCFACE_TEMPLATE.ravel())


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("face_tid_mid.txt", "1.png 5", "line 3: expected `image template media`, found '1.png 5'"),
        ("face_tid_mid.txt", "3.png five 1", "line 3: expected `image template media`"),
        ("face_tid_mid.txt", "9.png 5 1", "name other images in 1 places:\\s+image 3: 9.png and 3.png"),
        ("name_5pts_score.txt", f"3.png {POINTS}", "line 3: expected `image x1 y1 ... x5 y5 score` with five points"),
        ("name_5pts_score.txt", f"3.png {POINTS} nan", "line 3: expected .* a score of 0 to 1, found '3.png"),
        ("name_5pts_score.txt", f"3.png {POINTS} 1.01", "line 3: expected .* a score of 0 to 1"),
        ("name_5pts_score.txt", f"3.png {POINTS} -0.1", "line 3: expected .* a score of 0 to 1"),
        ("name_5pts_score.txt", f"3.png {'5 ' * 10} 1", "line 3: expected .* five points that do not coincide"),
        ("name_5pts_score.txt", f"3.png {POINTS.replace('38.2946', 'inf')} 1", "line 3: expected .* five points"),
        ("name_5pts_score.txt", f"3.png {POINTS.replace('51.5014', 'nan')} 1", "line 3: expected .* five points"),
        ("template_pair_label.txt", "1 2", "line 3: expected `template template 1|0`, found '1 2'"),
        ("template_pair_label.txt", "1 2 2", "line 3: expected `template template 1|0`"),
        ("template_pair_label.txt", "1 9999999999 1", "line 3: expected `template template 1|0`"),
        ("template_pair_label.txt", "901 902 0", "pair_label.txt: 2 templates have no image:\\s+template 901\\s+templ"),
        ("1N_gallery_G1.csv", "5,six,a.png,1", "G1.csv: 1 malformed lines:\\s+line 3: expected `template,subject,...`"),
        ("1N_gallery_G2.csv", "901,6,a.png,1", "G2.csv: 1 templates have no image:\\s+template 901"),
        ("1N_probe_mixed.csv", "901,6,a.png,1", "probe_mixed.csv: 1 templates have no image:\\s+template 901"),
    ],
)
def test_malformed_lines_and_unknown_templates(ijb: Path, file: str, line: str, message: str) -> None:
    path = ijb / "meta" / f"ijbc_{file}"
    replace_line(path, 3, line)
    with pytest.raises(ValueError, match=message) as caught:
        load_ijb(ijb)
    assert str(path) in str(caught.value)


def cut_last_line(path: Path) -> None:
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))


def all_genuine(path: Path) -> None:
    path.write_text("".join(f"{line[:-1]}1\n" for line in path.read_text().splitlines()))


def no_header(path: Path) -> None:
    path.write_text(path.read_text().split("\n", 1)[1])


def two_subjects(path: Path) -> None:
    template = path.read_text().splitlines()[1].split(",")[0]
    path.write_text(path.read_text() + f"{template},1234,a.png,1\n")


def enrolled_twice(path: Path) -> None:
    subject = path.read_text().splitlines()[1].split(",")[1]
    probe = path.with_name("ijbc_1N_probe_mixed.csv").read_text().splitlines()[1].split(",")[0]
    path.write_text(path.read_text() + f"{probe},{subject},a.png,1\n")


def empty(path: Path) -> None:
    path.write_text("\n")


@pytest.mark.parametrize(
    ("file", "damage", "error", "message"),
    [
        ("face_tid_mid.txt", cut_last_line, ValueError, r"lists \d+ images, but .*name_5pts_score.txt lists \d+"),
        ("face_tid_mid.txt", empty, ValueError, "tid_mid.txt: is empty"),
        (
            "face_tid_mid.txt",
            Path.unlink,
            FileNotFoundError,
            r"holds no list meta/\*_face_tid_mid.txt; give the folder",
        ),
        ("name_5pts_score.txt", Path.unlink, FileNotFoundError, r"parts .* missing:\s+\S+ijbc_name_5pts_score.txt$"),
        ("template_pair_label.txt", Path.unlink, FileNotFoundError, r"missing:\s+\S+ijbc_template_pair_label.txt$"),
        ("template_pair_label.txt", all_genuine, ValueError, "pair_label.txt: all 288 pairs are genuine pairs"),
        (
            "1N_gallery_G2.csv",
            Path.unlink,
            FileNotFoundError,
            "1:N takes two .* found only ijbc_1N_gallery_G1.csv, ijbc",
        ),
        ("1N_probe_mixed.csv", Path.unlink, FileNotFoundError, "and ijbc_1N_probe_mixed.csv; found only"),
        ("1N_probe_mixed.csv", no_header, ValueError, "probe_mixed.csv, line 1: expected a header, found "),
        (
            "1N_probe_mixed.csv",
            two_subjects,
            ValueError,
            r"probe_mixed.csv: 1 templates are of several subjects:\s+templ",
        ),
        ("1N_gallery_G1.csv", enrolled_twice, ValueError, r"G1.csv: 1 subjects are enrolled with several templates:"),
    ],
)
def test_lists_that_cannot_be_used(
    ijb: Path, file: str, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    damage(ijb / "meta" / f"ijbc_{file}")
    with pytest.raises(error, match=message):
        load_ijb(ijb)


def test_missing_images_are_all_counted_and_the_first_ones_listed(ijb: Path) -> None:
    for number in range(1, 31):
        (ijb / "loose_crop" / f"{number}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"loose_crop: 30 of \d+ images are missing:") as caught:
        load_ijb(ijb)
    listed = str(caught.value).splitlines()[1:]
    assert len(listed) == 21 and listed[0].endswith("1.png") and listed[-1].startswith("  and 10 more; all of them: ")


def test_two_data_sets_in_one_folder(ijb: Path) -> None:
    (ijb / "meta" / "ijbb_face_tid_mid.txt").write_text("1.png 1 1\n")
    with pytest.raises(FileNotFoundError, match="holds the lists of ijbb and ijbc"):
        load_ijb(ijb)


# ------------------------------------------------------------------------------------------------------------- results
def test_template_features_are_the_naive_loops(ijb: Path) -> None:
    loaded, expected = load_ijb(ijb), naive_templates(ijb)
    for batch_size in (7, 1000):  # templates lie across batches, or twice in one
        features, _ = template_features(Patches(), loaded, batch_size=batch_size, progress=False)
        assert features.dtype == np.float64
        for number, feature in zip(loaded.templates, features, strict=True):
            assert feature == pytest.approx(expected[number], abs=2e-3)  # a pixel may be rounded differently


def test_features_in_the_cache_give_the_same_templates(ijb: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "batch_size": 7, "progress": False}
    loaded, images = load_ijb(ijb), len(load_ijb(ijb).images)
    plain, _ = template_features(Patches(), loaded, batch_size=7, progress=False)
    some = list(range(3, 40, 2))  # as far as an earlier run got, say
    raw = np.concatenate([features.numpy() for _, features in feature_batches(Patches(), loaded.images)])
    digests = [loaded.images.digest(index) for index in range(images)]
    cache = FeatureCache(tmp_path / "cache", {"weights": "none", "flip": True, "device": "cpu"})
    cache.keep([digests[index] for index in some], raw[some])
    for embedded in (images - len(some), 0):
        features, computed = template_features(Patches(), loaded, **options)
        assert computed == embedded and np.array_equal(features, plain)
    loaded.images.landmarks[5] += 1.0  # another crop of the same photo
    assert template_features(Patches(), loaded, **options)[1] == 1


def test_image_weights_by_hand(ijb: Path) -> None:
    loaded = load_ijb(ijb)
    weights = image_weights(loaded)
    places = list(zip(loaded.template.tolist(), loaded.media.tolist(), strict=True))
    assert weights.tolist() == [s / places.count(p) for s, p in zip(loaded.scores, places, strict=True)]


def test_a_template_without_weight_is_refused(ijb: Path) -> None:
    loaded = load_ijb(ijb)
    loaded.scores[loaded.template == 2] = 0
    with pytest.raises(
        ValueError, match=f"features of 1 templates are zero, the first is template {loaded.templates[2]}"
    ):
        template_features(Patches(), loaded, progress=False)


def test_results_are_those_of_a_full_matrix(ijb: Path) -> None:
    loaded = load_ijb(ijb)
    result = evaluate_templates(Patches(), loaded, progress=False).result
    assert json.loads(json.dumps(result)) == result
    rows, _ = template_features(Patches(), loaded, progress=False)
    features = dict(zip(loaded.templates.tolist(), rows, strict=True))

    scores: dict[int, list[float]] = {0: [], 1: []}
    for a, b, same in (map(int, line) for line in words(ijb / "meta" / "ijbc_template_pair_label.txt")):
        scores[same].append(float(features[a] @ features[b]))
    impostors, genuine = np.array(scores[0]), np.array(scores[1])
    assert (result["pairs"], result["genuine"], result["impostor"]) == (288, 24, 264)
    assert result["auc"] == pytest.approx((genuine[:, None] > impostors).mean()) and 0.7 < result["auc"] < 1
    assert [row["far"] for row in result["tar_at_far"]] == [0.1]
    assert result["unsupported_fars"] == [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    for row in result["tar_at_far"]:
        assert row["measured_far"] == pytest.approx((impostors >= row["threshold"] - 1e-12).mean())
        assert row["tar"] == pytest.approx((genuine >= row["threshold"] - 1e-12).mean())

    tables = {}
    for file in ("gallery_G1", "gallery_G2", "probe_mixed"):
        with (ijb / "meta" / f"ijbc_1N_{file}.csv").open(newline="") as stream:
            tables[file] = {int(row["TEMPLATE_ID"]): int(row["SUBJECT_ID"]) for row in csv.DictReader(stream)}
    rank_1 = []
    for name in ("G1", "G2"):
        gallery, probes = tables[f"gallery_{name}"], tables["probe_mixed"]
        matrix = {p: {g: float(features[p] @ features[g]) for g in gallery} for p in probes}
        mates = {
            p: next(g for g in gallery if gallery[g] == probes[p]) for p in probes if probes[p] in gallery.values()
        }
        found = result["identification"]["galleries"][name]
        assert (found["searches"], found["mated"], found["nonmated"], found["enrolled"]) == (24, 12, 12, 6)
        ranks = {p: sum(s >= matrix[p][g] for s in matrix[p].values()) for p, g in mates.items()}
        for row in found["rank_rates"]:
            assert row["rate"] == sum(rank <= row["rank"] for rank in ranks.values()) / 12
        assert [row["rank"] for row in found["rank_rates"]] == [1, 5, 10]
        rank_1.append(found["rank_rates"][0]["rate"])
        assert found["tpir_at_fpir"] == [] and found["unsupported_fpirs"] == [0.1, 0.01, 0.001]  # of 12 searches
    assert 0.3 < rank_1[0] < 1  # neither trivial nor chance
    assert result["identification"]["mean"]["rank_rates"][0] == {"rank": 1, "rate": pytest.approx(np.mean(rank_1))}
    assert result["images"] == len(loaded.images) and result["templates"] == 36 and result["embedding_size"] == 24
    assert result["embedder"] == {"kind": "stand-in", "name": "patches"} and result["warnings"] == []


def test_the_mean_over_galleries_is_that_of_all_searches_and_of_plain_rates() -> None:
    def report(mated: int, rank_1: float, tpir: float) -> IdentificationReport:
        return IdentificationReport(
            searches=mated, mated=mated, nonmated=0, enrolled=9, rank_rates=[{"rank": 1, "rate": rank_1}],
            tpir_at_fpir=[{"fpir": 0.1, "tpir": tpir}], unsupported_fpirs=[],
        )  # fmt: skip

    mean = _mean_over_galleries([report(30, 1.0, 0.2), report(10, 0.6, 0.4)])
    assert mean["rank_rates"] == [{"rank": 1, "rate": pytest.approx((30 + 6) / 40)}]
    assert mean["tpir_at_fpir"] == [{"fpir": 0.1, "tpir": pytest.approx(0.3)}]


def test_features_that_were_made_elsewhere(ijb: Path, tmp_path: Path) -> None:
    loaded = load_ijb(ijb)
    raw = np.concatenate([features.numpy() for _, features in feature_batches(Patches(), loaded.images)])
    order = np.random.default_rng(0).permutation(len(raw))
    np.savez(tmp_path / "peer.npz", embeddings=raw[order], files=np.array([str(n) for n in loaded.images.names])[order])
    ours, theirs = (
        evaluate_templates(embedder, loaded, progress=False).result
        for embedder in (Patches(), StoredEmbeddings(tmp_path / "peer.npz"))
    )
    assert all(ours[key] == theirs[key] for key in ("auc", "eer", "tar_at_far", "identification", "images"))
    assert theirs["embedded"] == 0 and theirs["protocol"]["embedding"].startswith("features as given, times the det")


def test_without_galleries_there_is_no_identification(ijb: Path) -> None:
    for path in (ijb / "meta").glob("*.csv"):
        path.unlink()
    assert evaluate_templates(Patches(), load_ijb(ijb), progress=False).result["identification"] is None


def test_suspect_labels_stop_the_evaluation_or_become_warnings(ijb: Path) -> None:
    path = ijb / "meta" / "ijbc_template_pair_label.txt"
    lines = path.read_text().splitlines()
    a, b, _ = lines[0].split()
    path.write_text("\n".join([*lines, lines[1], f"{b} {a} {1 - int(lines[0][-1])}", f"{a} {a} 1", f"{b} {b} 0"]))
    loaded = load_ijb(ijb)
    said = ["1 pairs are listed both as genuine and as impostor", "1 impostor pairs compare a template with itself"]
    with pytest.raises(SuspectLabelsError, match=f"ijbc: {said[0]}; {said[1]}; check labels"):
        evaluate_templates(Patches(), loaded, progress=False)
    result = evaluate_templates(Patches(), loaded, strict=False, progress=False).result
    assert result["warnings"] == [
        *said,
        "2 pairs repeat an earlier pair",
        "1 genuine pairs compare a template with itself",
    ]
    assert result["pairs"] == 292  # all are scored, as in the reference


def test_an_auc_below_one_half_stops_the_evaluation(ijb: Path) -> None:
    path = ijb / "meta" / "ijbc_template_pair_label.txt"
    path.write_text("".join(f"{line[:-1]}{1 - int(line[-1])}\n" for line in path.read_text().splitlines()))
    loaded = load_ijb(ijb)
    with pytest.raises(SuspectLabelsError, match=r"ijbc, patches: AUC 0\.\d+ is below 0.5"):
        evaluate_templates(Patches(), loaded, progress=False)
    assert "is below 0.5" in evaluate_templates(Patches(), loaded, strict=False, progress=False).result["warnings"][0]


def test_rendered_faces_are_called_synthetic(ijb: Path) -> None:
    (ijb / "synthetic.json").write_text("{}")
    assert evaluate_templates(Patches(), load_ijb(ijb), progress=False).result["data"] == "synthetic"


def test_a_damaged_image_is_named(ijb: Path) -> None:
    (ijb / "loose_crop" / "5.png").unlink()
    (ijb / "loose_crop" / "5.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"loose_crop.5.png: not a readable image"):
        template_features(Patches(), load_ijb(ijb), progress=False)
