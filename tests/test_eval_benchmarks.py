"""The evaluation script end to end on a tiny backbone, its table and its results file."""

import csv
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

import eval_benchmarks
from adaptface.data.pairs import PairImages, PairSet
from adaptface.metrics import contiguous_folds, match_calibration
from adaptface.report import results_table, write_results, write_tables
from adaptface.thresholds import decision_thresholds
from image_processing_adaptface import AdaptFaceImageProcessor
from modeling_adaptface import AdaptFaceModel
from tests.test_embedding import save_onnx_with_data
from tests.test_templates import write_ijb

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("dev_pairs", "second")
TABLES = {"results.json", "results.md", "results.csv", "results_long.csv"}


@pytest.fixture(scope="module")
def benchmark_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pairs of random textures: genuine pairs share the texture, under noise."""
    folder = tmp_path_factory.mktemp("faces")
    (folder / "dev").mkdir()
    rng = np.random.default_rng(0)
    lines = ["fold,image_a,image_b,same,domain"]
    for number in range(40):
        first, other = rng.integers(0, 256, (2, 7, 7, 3))
        for letter, texture in (("a", first), ("b", first if number % 2 else other)):
            noisy = np.clip(texture.repeat(8, 0).repeat(8, 1) + rng.normal(0, 20, (56, 56, 3)), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(folder / "dev" / f"{number}{letter}.png")
        lines.append(f"{number // 4},{number}a.png,{number}b.png,{number % 2},{'pose' if number % 4 < 2 else 'age'}")
    (folder / "dev_pairs.csv").write_text("\n".join(lines), encoding="utf-8")
    (folder / "synthetic.json").write_text("{}", encoding="utf-8")
    return folder / "dev_pairs.csv"


def test_script_writes_results_and_prints_one_row_each(
    tiny_backbone_dir: Path, benchmark_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = tmp_path / "second.csv"
    second.write_text(benchmark_path.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = ["--zero_shot", str(tiny_backbone_dir), "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    arguments += ["--benchmark", str(benchmark_path), "--benchmark", str(second)]
    arguments += ["--images", str(benchmark_path.parent / "dev"), "--batch_size", "16"]
    results = eval_benchmarks.main(arguments)

    content = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert content["results"] == results and len(results) == 2
    assert content["command"] == ["eval_benchmarks.py", *arguments]
    assert {"python", "torch", "transformers", "numpy"} <= set(content["versions"])
    assert content["machine"]["cpus"] >= 1 and content["date"].endswith("+00:00")
    names = {path.name for path in (tmp_path / "out").iterdir()}  # nothing half-written is left
    sheets = {f"worst_pairs_{n + 1}_{tiny_backbone_dir.name}_{name}.png" for n, name in enumerate(NAMES)}
    assert names == {*TABLES, "roc.png", "det.png", "scores.png", "domains.png", *sheets}
    for name in names - TABLES:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 300 and len(picture.convert("L").getcolors() or "many") > 20, f"{name} is blank"
    first = results[0]
    assert first["data"] == "synthetic" and first["auc"] > 0.5
    assert first["protocol"]["folds"] == "the list's own 10 folds"
    assert first["embedder"]["kind"] == "zero-shot backbone" and first["embedder"]["image_size"] == 56
    printed = capsys.readouterr().out
    assert f"{100 * first['accuracy']:.2f} ± {100 * first['accuracy_std']:.2f}" in printed
    assert "dev_pairs" in printed and "second" in printed and "synthetic: rendered faces" in printed
    eval_benchmarks.main([*arguments, "--no_plots"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == TABLES, "no pictures of other results are left"


def test_options_reach_the_embedders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: dict[str, list[tuple]] = {}

    def spy(kind: str) -> Callable[..., str]:
        return lambda *arguments: calls.setdefault(kind, []).append(arguments) or kind  # type: ignore[func-returns-value]

    monkeypatch.setattr(eval_benchmarks.ModelEmbedder, "from_pretrained", spy("model"))
    monkeypatch.setattr(eval_benchmarks.BackboneEmbedder, "from_pretrained", spy("zero_shot"))
    monkeypatch.setattr(eval_benchmarks, "OnnxEmbedder", spy("onnx"))
    monkeypatch.setattr(eval_benchmarks, "check_model", spy("check"))
    words = ["--benchmark", "x.csv", "--device", "cpu", "--model", "me/one", "--model", "me/two", "--revision", "r1"]
    words += ["--zero_shot", "it/base", "--zero_shot_size", "98", "--zero_shot_revision", "r2", "--onnx", "a.onnx"]
    words += [
        "--onnx",
        "b.onnx",
        "--onnx_size",
        "112",
        "--onnx_mean",
        "0.1",
        "0.2",
        "0.3",
        "--onnx_mean",
        "0",
        "0",
        "0",
    ]
    options = eval_benchmarks.parse_arguments(words)
    cpu = torch.device("cpu")
    for load in eval_benchmarks.embedder_loaders(options, cpu):
        load()
    assert calls == {
        "check": [("me/one", "r1"), ("me/two", "r1"), ("it/base", "r2")],
        "model": [("me/one", "r1", cpu), ("me/two", "r1", cpu)],
        "zero_shot": [("it/base", "r2", 98, cpu)],
        "onnx": [
            (Path("a.onnx"), 112, [0.1, 0.2, 0.3], eval_benchmarks.IMAGENET_STD),
            (Path("b.onnx"), 112, [0.0, 0.0, 0.0], eval_benchmarks.IMAGENET_STD),
        ],
    }
    with pytest.raises(SystemExit):
        eval_benchmarks.parse_arguments([*words, "--onnx_mean", "0", "0", "1"])


@pytest.fixture
def run_script(benchmark_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the file as a program, in this process."""

    def run(output_dir: Path, *backbones: Path) -> None:
        words = [word for folder in backbones for word in ("--zero_shot", str(folder))]
        words += ["--benchmark", str(benchmark_path), "--device", "cpu", "--no_plots", "--output_dir", str(output_dir)]
        monkeypatch.setattr(sys, "argv", ["eval_benchmarks.py", *words])
        runpy.run_path(str(ROOT / "eval_benchmarks.py"), run_name="__main__")

    return run


def test_a_failed_run_leaves_earlier_results_and_keeps_its_finished_rows(
    tiny_backbone_dir: Path, run_script: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_backbone_dir, broken)
    (broken / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    out = tmp_path / "out"
    file, partial = out / "results.json", out / "results.partial.json"

    with pytest.raises(SystemExit) as stop:
        run_script(out, broken)
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value) and not list(out.iterdir())
    run_script(out, tiny_backbone_dir)
    printed = capsys.readouterr().out
    assert printed.endswith(f"written to {file}; beside it: results.md, results.csv, results_long.csv\n")
    assert {path.name for path in out.iterdir()} == TABLES
    before = file.read_bytes()

    with pytest.raises(SystemExit) as stop:
        run_script(out, tiny_backbone_dir, broken)
    assert str(stop.value).splitlines() == [
        str(stop.value).splitlines()[0],
        f"finished rows of this run, 1, are kept in {partial}",
        f"{file} is the one of an earlier run, as it was",
    ]
    assert file.read_bytes() == before
    rows = json.loads(partial.read_text(encoding="utf-8"))["results"]
    assert [row["embedder"]["name"] for row in rows] == [str(tiny_backbone_dir)]

    capsys.readouterr()
    run_script(out, tiny_backbone_dir, Path(shutil.copytree(tiny_backbone_dir, tmp_path / "second")))
    printed = capsys.readouterr()
    assert f"{partial} holds rows of a run that did not end; this run replaces it" in printed.err
    assert f"\nwritten to {file}, in place of an earlier one; beside it: " in printed.out
    assert {path.name for path in out.iterdir()} == TABLES and len(
        json.loads(file.read_text(encoding="utf-8"))["results"]
    ) == 2


def test_paths_that_the_console_cannot_show_do_not_end_an_evaluation(
    tiny_backbone_dir: Path, run_script: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(console, encoding="cp1252", write_through=True))
    run_script(tmp_path / "人", tiny_backbone_dir)
    assert b"\\u4eba" in console.getvalue() and b" \xb1 " in console.getvalue()

    code = "from adaptface.report import printable_output; {}; print('人 ±')"
    legacy = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    for call, ok in (("printable_output()", True), ("0", False)):
        done = subprocess.run([sys.executable, "-c", code.format(call)], cwd=ROOT, env=legacy, capture_output=True)
        assert (done.returncode == 0, done.stdout.strip() == b"\\u4eba \xb1") == (ok, ok), done.stderr


def test_table_shows_only_supported_rates_domains_and_warnings() -> None:
    result = {
        "embedder": {"name": "ours"}, "benchmark": "lfw", "domain": "general", "data": "unspecified", "pairs": 6000,
        "fold_accuracies": [0.9] * 10, "accuracy": 0.98765, "accuracy_std": 0.00432, "auc": 0.99876, "eer": 0.0123,
        "tar_at_far": [{"far": f, "tar": t} for f, t in ((0.1, 0.999), (0.01, 0.97), (0.001, 0.95))],
        "domains": {"pose": {"pairs": 3000, "accuracy": 0.91, "auc": None}},
        "warnings": ["odd"], "images_per_second": 9,
    }  # fmt: skip
    table = results_table([result])
    row = " ".join(table.splitlines()[2].split())
    assert row == "ours lfw unspecified 6,000 10 98.77 ± 0.43 0.9988 1.23 97.00@0.01 95.00@0.001 9.0"
    assert table.splitlines()[3].split() == ["pose", "3,000", "91.00", "-"]
    assert "warning: lfw: odd" in table and "synthetic" not in table and "mean of" not in table

    rate = {"far": 0.001, "fmr_difference": 0.0021, "fnmr_difference": None}
    part = {"pairs": 10, "accuracy": 0.5, "auc": 0.6}
    hard = result | {"benchmark": "cplfw", "domain": "pose", "accuracy": 0.8, "domains": None}
    second = hard | {"benchmark": "cfp_fp", "accuracy": 0.9, "groups": {"scores": {"north": part}, "rates": [rate]}}
    table = "\n".join(" ".join(line.split()) for line in results_table([result, hard, second]).splitlines())
    assert "\nnorth 10 50.00 0.6000\ngap of groups FMR differs by 0.21@0.001\n" in table
    assert "\nours mean of pose (2) unspecified 85.00 0.9988 1.23\n" in table
    assert "\nours mean of all (3) unspecified 89.59 0.9988 1.23\n" in table and "mean of general" not in table


def test_templates_and_pairs_in_one_run(
    tiny_backbone_dir: Path, benchmark_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_ijb(tmp_path / "ijb")
    words = ["--benchmark", str(folder), "--benchmark", str(benchmark_path), "--device", "cpu"]
    words += ["--allow_suspect_labels", "--output_dir", str(tmp_path / "out")]
    templates, pairs = eval_benchmarks.main(["--zero_shot", str(tiny_backbone_dir), *words])
    assert templates["benchmark"] == "ijbc" and templates["identification"]["galleries"].keys() == {"G1", "G2"}
    assert "accuracy" not in templates and pairs["accuracy"] > 0
    printed = capsys.readouterr().out
    assert "1:N, mean of G1, G2" in printed and "rank-1" in printed
    with (tmp_path / "out" / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["benchmark"] == "ijbc" and rows[0]["accuracy"] == "" and float(rows[0]["auc"]) == templates["auc"]
    with (tmp_path / "out" / "results_long.csv").open(encoding="utf-8") as file:
        rank = [row for row in csv.DictReader(file) if row["metric"] == "rate" and row["at"] == "1"]
    of = {row["part"]: float(row["value"]) for row in rank if row["benchmark"] == "ijbc"}
    assert of["identification/mean/rank_rates"] == templates["identification"]["mean"]["rank_rates"][0]["rate"]
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"roc.png", "det.png", "scores.png"} < pictures and not any("ijbc" in name for name in pictures)
    again, _ = eval_benchmarks.main(["--zero_shot", str(tiny_backbone_dir), *words])
    assert templates["embedded"] == templates["images"] and again["embedded"] == 0
    assert all(again[key] == templates[key] for key in ("auc", "eer", "tar_at_far", "identification"))


def test_tables_for_people_and_for_programs(tmp_path: Path) -> None:
    result = {
        "embedder": {"name": "a|b"}, "benchmark": "lfw", "domain": None, "data": "unspecified", "pairs": 6000,
        "genuine": 3000,
        "impostor": 3000, "images": 7701, "fold_accuracies": [0.9] * 10, "accuracy": 0.98765, "accuracy_std": 0.00432,
        "accuracy_interval": [0.98, 0.99], "auc": 0.99876, "auc_interval": None, "eer": 0.0123,
        "tar_at_far": [{"far": 0.01, "tar": 0.97}, {"far": 0.001, "tar": 0.95}],
        "domains": None, "warnings": [], "images_per_second": None,
    }  # fmt: skip
    small = result | {"benchmark": "small", "tar_at_far": [{"far": 0.1, "tar": 0.5}], "auc_interval": [0.1, 0.2]}
    markdown, table, _ = write_tables(tmp_path, [result, small])
    lines = markdown.read_text(encoding="utf-8").splitlines()
    assert lines[1].count("---") == lines[0].count("|") - 1
    assert lines[2].startswith("| a\\|b | lfw | unspecified | 6,000 | 10 | 98.77 ± 0.43 | 0.9988 |")
    first, second = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8")))
    assert (first["embedder"], first["accuracy"], first["accuracy_high"]) == ("a|b", "0.98765", "0.99")
    assert [first[f"tar@far={far}"] for far in ("0.1", "0.01", "0.001")] == ["", "0.97", "0.95"]
    assert [second[f"tar@far={far}"] for far in ("0.1", "0.01", "0.001")] == ["0.5", "", ""]
    assert first["auc_low"] == "" and second["auc_low"] == "0.1"


@pytest.fixture(scope="module")
def many_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred pairs of ten textures, of which the thirty impostor pairs support a false accept rate of 0.1."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(1)
    lines = ["fold,image_a,image_b,same"]
    for number in range(10):
        for letter in "ab":
            pixels = rng.integers(0, 256, (7, 7, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}{letter}.png")
    for fold in range(10):
        for step in range(3):
            lines.append(f"{fold},{fold}a.png,{(fold + step + 1) % 10}a.png,0")
            lines.append(f"{fold},{fold}{'ab'[step % 2]}.png,{fold}{'ab'[step % 2]}.png,1")
    (folder / "many.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "many.csv"


def test_thresholds_go_into_the_config_of_the_model(
    tiny_model: AdaptFaceModel, many_pairs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    AdaptFaceImageProcessor(size=56).save_pretrained(folder)
    before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    words = ["--model", str(folder), "--benchmark", str(many_pairs), "--device", "cpu", "--no_plots"]
    words += ["--output_dir", str(tmp_path / "out"), "--write_thresholds"]
    with pytest.raises(ValueError, match="--write_thresholds lfw: must name one of the pair lists, here many"):
        eval_benchmarks.main([*words, "lfw"])
    (result,) = eval_benchmarks.main([*words, "many"])

    after = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written = after.pop("thresholds")
    assert after == {key: value for key, value in before.items() if key != "thresholds"}
    assert written["benchmark"] == "many" and written["impostor"] == 30 and written["data"] == "unspecified"
    assert written["weights_sha256"] == result["embedder"]["weights_sha256"] is not None
    config = AutoModel.from_pretrained(folder, trust_remote_code=True).config
    assert config.threshold(0.1) == result["tar_at_far"][0]["threshold"]
    assert config.match_probability(1.0) > 0.5 > config.match_probability(-1.0)
    again = eval_benchmarks.main([*words, "many"])[0]
    assert again["embedded"] == 0, "thresholds do not change what an embedding is"


def test_thresholds_are_calibrated_on_the_folds_of_the_list() -> None:
    rng = np.random.default_rng(0)
    same = np.arange(600) % 2 == 1
    similarities = np.where(same, rng.normal(0.6, 0.2, 600), rng.normal(0.3, 0.2, 600))
    folds = np.argsort(np.argsort(similarities * (2 * same - 1))) // 60  # the hard pairs together
    pair_set = PairSet("lfw", PairImages([], []), *np.zeros((2, 600), dtype=np.int64), same, folds, "sorted")
    counts = {"benchmark": "lfw", "data": "unspecified", "pairs": 600, "genuine": 300, "impostor": 300}
    rest = {"protocol": {"embedding": "any"}, "embedder": {"weights_sha256": None}, "tar_at_far": [{}]}
    found = decision_thresholds({**counts, **rest}, pair_set, similarities)["calibration"]
    assert found == match_calibration(similarities, same, folds)
    assert found["log_loss"] > match_calibration(similarities, same, contiguous_folds(600))["log_loss"] + 0.01


@pytest.mark.distributed
def test_several_processes_measure_what_one_does(tiny_backbone_dir: Path, benchmark_path: Path, tmp_path: Path) -> None:
    rows = []
    for processes in (1, 3):
        out = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["eval_benchmarks.py", "--zero_shot", str(tiny_backbone_dir), "--benchmark", str(benchmark_path)]
        command += ["--output_dir", str(out), "--no_plots", "--device", "cpu"]
        # 80 images: 7 batches, the last of 8; three processes do some again to be equally busy
        command += ["--batch_size", "12", "--cache_dir", str(out / "cache")]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("written to") == 1
        (row,) = json.loads((out / "results.json").read_text(encoding="utf-8"))["results"]
        assert row["embedded"] == 80
        rows.append({key: value for key, value in row.items() if key not in ("seconds", "images_per_second")})
    assert rows[0] == rows[1]


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_results(tmp_path, [{"accuracy": 0.5}], ["eval"])
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_results(tmp_path, [{"accuracy": 0.6}, {"accuracy": float("nan")}], ["eval"])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate: give --model, --zero_shot, --onnx or --embeddings"),
        (["--zero_shot", "x", "--batch_size", "0"], "'0' is not a whole number of at least 1"),
        (["--zero_shot", "x", "--num_workers", "-1"], "whole number of at least 0"),
        (["--zero_shot", "x", "--device", "quantum"], "cannot use 'quantum'"),
        (["--zero_shot", "x", "--output_dir", "FILE"], "is a file"),
        (["--zero_shot", "x", "--revision", "r"], "--revision without --model, which it is about"),
        (["--model", "x", "--zero_shot_revision", "r"], "--zero_shot_revision without --zero_shot"),
        (["--model", "x", "--zero_shot_size", "98"], "--zero_shot_size without --zero_shot"),
        (["--model", "x", "--onnx_size", "112"], "--onnx_size without --onnx"),
        (["--model", "x", "--onnx_mean", "0", "0", "0"], "--onnx_mean without --onnx"),
        (["--model", "x", "--onnx_std", "1", "1", "1"], "--onnx_std without --onnx"),
        (["--zero_shot", "x", "--write_thresholds", "dev_pairs"], "--write_thresholds without --model"),
        (["--model", "me/x", "--write_thresholds", "dev_pairs"], "needs model folders, and me/x is none"),
        (["--zero_shot", "x", "--benchmark", "FILE"], "--benchmark FILE is given twice: leave one out"),
        (["--model", "me/x", "--model", "me/y", "--model", "me/x"], "--model me/x is given twice"),
        (["--zero_shot", "me/x", "--model", "me/x", "--zero_shot", "me/x"], "--zero_shot me/x is given twice"),
        (["--embeddings", "FILE", "--embeddings", "AGAIN"], "--embeddings AGAIN is given twice"),
        (["--onnx", "a/p", "--onnx", "a/p", "--onnx_size", "9"], "--onnx a/p is given twice"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], message: str, benchmark_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = benchmark_path.parent / "dev" / ".." / benchmark_path.name  # the same file by another path
    places = {"FILE": str(benchmark_path), "AGAIN": str(again)}
    arguments = [places.get(argument, argument) for argument in arguments]
    for word, place in places.items():
        message = message.replace(word, place)
    with pytest.raises(SystemExit) as stop:
        eval_benchmarks.main(["--benchmark", str(benchmark_path), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_one_peer_may_be_given_with_other_means(benchmark_path: Path) -> None:
    words = ["--benchmark", str(benchmark_path), "--onnx", "p", "--onnx", "p", "--onnx_mean", "0", "0", "0"]
    assert eval_benchmarks.parse_arguments([*words, "--onnx_mean", "0.5", "0.5", "0.5"]).onnx == [Path("p")] * 2


def test_peers_of_one_file_name_stay_apart_everywhere(
    benchmark_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = [tmp_path / letter / "peer.onnx" for letter in "ab"]
    for number, peer in enumerate(peers):
        peer.parent.mkdir()
        save_onnx_with_data(peer, "peer.data", side=56, seed=number)
    words = [word for peer in peers for word in ("--onnx", str(peer))]
    words += ["--benchmark", str(benchmark_path), "--output_dir", str(tmp_path / "out"), "--no_cache"]
    results = eval_benchmarks.main(words)
    assert [row["embedder"]["name"] for row in results] == [str(peer) for peer in peers]
    assert results[0]["auc"] != results[1]["auc"]
    printed = capsys.readouterr().out
    for name, count in (("a/peer.onnx", 1), ("b/peer.onnx", 1), (str(tmp_path / "a"), 0)):
        assert sum(line.startswith(name) for line in printed.splitlines()) == count
    for name in ("results.md", "results.csv", "results_long.csv"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "a/peer.onnx" in text and "b/peer.onnx" in text and str(tmp_path) not in text
    assert (tmp_path / "out" / "worst_pairs_2_b_peer.onnx_dev_pairs.png").is_file()


def test_bad_inputs_stop_before_any_model_is_loaded(
    benchmark_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(eval_benchmarks.BackboneEmbedder, "from_pretrained", no_model)
    good, output = ["--benchmark", str(benchmark_path)], ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(FileNotFoundError, match="no pair list at"):
        eval_benchmarks.main(["--zero_shot", "x", *good, "--benchmark", str(tmp_path / "none.csv"), *output])
    with pytest.raises(FileNotFoundError, match="is no model folder"):
        eval_benchmarks.main(["--zero_shot", "x", "--model", str(tmp_path), *good, *output])
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        eval_benchmarks.main(["--zero_shot", "x", "--onnx", str(tmp_path / "none.onnx"), *good, *output])
    unbalanced = tmp_path / "unbalanced.csv"
    lines = benchmark_path.read_text(encoding="utf-8").splitlines()
    flipped = [line.replace(",1,pose", ",0,pose") for line in lines]
    unbalanced.write_text("\n".join(flipped), encoding="utf-8")
    with pytest.raises(ValueError, match=r"unbalanced\.csv: unbalanced folds: fold 0 has 1 genuine of 4"):
        images = ["--images", str(benchmark_path.parent / "dev")]
        eval_benchmarks.main(["--zero_shot", "x", "--benchmark", str(unbalanced), *images, *output])
    assert not (tmp_path / "out").exists()


def test_the_command_line_ends_with_one_line_of_error(tmp_path: Path) -> None:
    command = [sys.executable, "eval_benchmarks.py", "--zero_shot", "x", "--benchmark", str(tmp_path / "none.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == f"error: no pair list at {tmp_path / 'none.csv'}"
    assert "Traceback" not in done.stderr
