"""Streams: every image once however the work is divided, the same order again, and what bad data is told."""

import io
import itertools
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from adaptface.data.augmentation import TrainingFaces, build_augmentation
from adaptface.data.sources import open_source
from adaptface.data.stream import Row, StreamBatches, StreamSource, _num_images, open_stream
from adaptface.settings import TrainSettings
from image_processing_adaptface import AdaptFaceImageProcessor
from tests.hub_server import HubServer
from tests.test_resume import ROOT, finish, launch
from tests.test_sources import private_cache  # noqa: F401
from tests.training import assert_same_run, checkpoint_tensors, read_log, train, words, write_faces

NAMES = ["ann", "bob", "unused", "eve"]
CUTS = (0, 7, 31, 32, 83)  # four shards of uneven length
IMAGES = CUTS[-1]


def png(number: int) -> bytes:
    """An image whose pixels are its number."""
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (number, 0, 0)).save(content, "PNG")
    return content.getvalue()


def make_rows(numbers: range, damage: dict[int, Any] | None = None, **more: tuple[Any, list]) -> datasets.Dataset:
    """Rows whose image is the row's number; `more` maps columns to their feature and cells."""
    images = [(damage or {}).get(n, {"bytes": png(n), "path": f"{n}.png"}) for n in numbers]
    columns = {"label": (datasets.ClassLabel(names=NAMES), [(0, 1, 3)[n % 3] for n in numbers]), **more}
    features = {"image": datasets.Image()} | {name: feature for name, (feature, _) in columns.items()}
    cells = {name: cells for name, (_, cells) in columns.items()}
    return datasets.Dataset.from_dict({"image": images, **cells}, datasets.Features(features))


def write_shards(folder: Path, damage: dict[int, Any] | None = None) -> Path:
    """Several row groups a shard, and a domain on two rows of three."""
    (folder / "data").mkdir(parents=True)
    for shard, (start, end) in enumerate(itertools.pairwise(CUTS)):
        domains = [("pose", "age", None)[n % 3] for n in range(start, end)]
        rows = make_rows(range(start, end), damage, domain=(datasets.Value("string"), domains))
        rows.to_parquet(folder / "data" / f"train-{shard:05}-of-{len(CUTS) - 1:05}.parquet", batch_size=4)
    return folder


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` waits five seconds at the end of a parquet stream for its threads."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("set") / "faces")


def number(row: Row) -> int:
    return Image.open(io.BytesIO(row.file)).getpixel((0, 0))[0]


def read(batches: StreamBatches, epoch: int = 0, first_step: int = 0) -> list[list[Row]]:
    """Each batch of an epoch, labels checked."""
    batches.set_position(epoch, first_step)
    read = list(batches)
    assert all(row.label == (0, 1, 3)[number(row) % 3] for batch in read for row in batch)
    return read


def test_what_a_stream_says_of_itself(shards: Path, tmp_path: Path) -> None:
    source = open_stream(shards)
    assert len(source) == IMAGES and source.identities == NAMES and source.has_domains
    assert source.describe() == "83 images of 4 identities, with domain labels, as a stream"
    rows = [row for batch in StreamBatches(source, 83, buffer_size=20) for row in batch]
    assert [row.index for row in rows] == list(range(IMAGES))
    for row in rows:
        assert source.numbers(row) == {
            "label": (0, 1, 3)[number(row) % 3], "domain": (1, 2, -1)[number(row) % 3], "index": row.index,
        }  # fmt: skip
        assert source.image(row).getpixel((0, 0)) == (number(row), 0, 0) and f"({number(row)}.png)" in source.where(row)
    assert (
        "identities, without domain labels"
        in open_stream(embed(make_rows(range(9)), tmp_path / "x.parquet")).describe()
    )


def embed(rows: datasets.Dataset, path: Path) -> Path:
    rows.to_parquet(path)
    return path


def test_an_epoch_holds_each_image_once_in_another_order(shards: Path) -> None:
    batches = StreamBatches(open_stream(shards), 5, 2, buffer_size=12)
    assert batches.steps == 8 and len(batches) == 16
    first, second = read(batches), read(batches, epoch=1)
    assert all(len(batch) == 5 for batch in first) and len(first) == 16
    for epoch in (first, second):
        assert set(Counter(number(row) for batch in epoch for row in batch).values()) == {1}
    assert [row.index for batch in second for row in batch] == list(range(80))
    orders = [[number(row) for batch in epoch for row in batch] for epoch in (first, second)]
    assert orders[0] != orders[1] and sorted(orders[0]) != orders[0]
    assert read(StreamBatches(open_stream(shards), 5, 2, buffer_size=12)) == first
    assert read(StreamBatches(open_stream(shards), 5, 2, 0, 1, 9, buffer_size=12)) != first
    everything = read(StreamBatches(open_stream(shards), IMAGES, buffer_size=12))
    assert sorted(map(number, everything[0])) == list(range(IMAGES))


@pytest.mark.parametrize(("size", "accumulation", "processes"), [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4)])
def test_a_step_does_not_depend_on_how_it_is_divided(
    shards: Path, size: int, accumulation: int, processes: int
) -> None:
    source = open_stream(shards)
    whole = read(StreamBatches(source, 8, buffer_size=12))
    parts = [
        read(StreamBatches(source, size, accumulation, rank, processes, buffer_size=12)) for rank in range(processes)
    ]
    assert [len(part) for part in parts] == [len(whole) * accumulation] * processes
    micro = list(zip(*parts, strict=True))  # of each micro-batch, what each process has
    for step, expected in enumerate(whole):
        seen = [row for parts in micro[step * accumulation : (step + 1) * accumulation] for b in parts for row in b]
        assert seen == expected


@pytest.mark.parametrize("first_step", [0, 1, 7, 8])
def test_going_on_at_a_step_is_walking_to_it(shards: Path, first_step: int) -> None:
    whole = StreamBatches(open_stream(shards), 5, 2, 1, 1 + 1, buffer_size=12)
    batches = StreamBatches(open_stream(shards), 5, 2, 1, 2, buffer_size=12)
    first_step = min(first_step, batches.steps)
    assert read(batches, 3, first_step) == read(whole, 3)[2 * first_step :]
    assert len(batches) == 2 * (whole.steps - first_step)


# --- through the loader ---------------------------------------------------------------------------------------


def make_faces(source: StreamSource) -> TrainingFaces:
    return TrainingFaces(source, AdaptFaceImageProcessor(size=28), build_augmentation(photometric=0.5), seed=7)


@pytest.mark.parametrize(("start", "workers"), [(None, 2), pytest.param("spawn", 1, marks=pytest.mark.slow)])
def test_workers_change_nothing(shards: Path, start: str | None, workers: int) -> None:
    """Persistent workers over two epochs, the first of which is left before its end."""
    loaders = []
    for options in ({}, {"num_workers": workers, "persistent_workers": True, "multiprocessing_context": start}):
        source = open_stream(shards)
        faces, batches = make_faces(source), StreamBatches(source, 4, 2, 1, 2, buffer_size=12)
        loaders.append((faces, batches, DataLoader(faces, batch_sampler=batches, **options)))
    for epoch, first_step, taken in ((0, 1, 4), (1, 0, 10)):
        seen = []
        for faces, batches, loader in loaders:
            faces.set_epoch(epoch)
            batches.set_position(epoch, first_step)
            seen.append(list(itertools.islice(loader, taken)))
        for expected, batch in zip(*seen, strict=True):
            for name, value in expected.items():
                assert torch.equal(value, batch[name]), (epoch, name)
        assert len(seen[0]) == taken


def test_what_goes_to_spawned_workers(shards: Path) -> None:
    source = open_stream(shards)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint() and copy.identities == source.identities


def test_broken_images_are_named_counted_and_replaced(tmp_path: Path) -> None:
    """By the same image, whoever meets them."""
    damage = {1: None, 2: {"bytes": b"no image", "path": "2.png"}, 40: {"bytes": png(40)[:45], "path": "40.png"},
              50: {"bytes": None, "path": str(tmp_path / "lost.png")}}  # fmt: skip
    source = open_stream(write_shards(tmp_path / "faces", damage))
    faces, seen = make_faces(source), []
    for processes in (1, 2):
        numbers = {}
        for rank in range(processes):
            for row in itertools.chain(*StreamBatches(source, 80 // processes, 1, rank, processes, buffer_size=100)):
                if isinstance(row.file, Path) or row.file in (b"", b"no image") or len(row.file) == 45:
                    with pytest.warns(UserWarning, match=f"skipped a broken training image: .*image {row.index}"):
                        item = faces[row]
                    assert item["broken"] == 1
                    numbers[row.index] = item["index"]
                else:
                    item = faces[row]
                    assert item["broken"] == 0 and item["index"] == row.index
        seen.append(numbers)
    assert seen[0] == seen[1] and 2 <= len(seen[0]) <= 4
    assert all(stand_in not in (1, 2) and stand_in < 32 for stand_in in seen[0].values())


# --- bad data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"label": (datasets.Value("int64"), list(range(9)))}, r"no ClassLabel.*class_encode_column\('label'"),
        ({"label": (datasets.Value("string"), ["a"] * 9)}, "'label' is no ClassLabel.*or read it whole"),
        ({"label": (datasets.ClassLabel(names=["a"]), [0] * 9)}, "'label' names 1 identities; give two"),
        ({"label": (datasets.ClassLabel(names=NAMES), [0, 1, -1] * 3)}, "first rows, row 2: column 'label' names no"),
        ({"label": (datasets.ClassLabel(names=NAMES), [0, None, 1] * 3)}, "row 1: column 'label' names no identity"),
        ({"domain": (datasets.Value("string"), ["age"] * 8 + ["sex"])}, "row 8: domain 'sex' is unknown"),
        ({"domain": (datasets.Value("float32"), [0.5] * 9)}, "'domain' is of type float32"),
    ],
)  # fmt: skip
def test_sets_that_cannot_be_streamed(tmp_path: Path, rows: dict, message: str) -> None:
    path = embed(make_rows(range(9), **rows), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message) as caught:
        open_stream(path)
    assert str(path) in str(caught.value) and str(caught.value).count(str(path)) == 1


def test_other_sources_are_told_to_drop_the_stream(tmp_path: Path) -> None:
    make_rows(range(9)).save_to_disk(tmp_path / "saved")
    write_faces(tmp_path)
    (tmp_path / "list.csv").write_text("file,identity\n", encoding="utf-8")
    for name in ("saved", "faces", "list.csv"):
        with pytest.raises(ValueError, match=rf"{name}: is neither parquet nor a Hub dataset.*drop stream"):
            open_stream(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing: no such path here, and as a Hub dataset: the name is not"):
        open_stream(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"x\.parquet: .*Parquet magic bytes not found"):
        (tmp_path / "x.parquet").write_bytes(b"no parquet file")
        open_stream(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="train_metadata; drop one"):
        TrainSettings(stream=True, train_metadata="m.csv")
    with pytest.raises(ValueError, match="contradicts train_data: synthetic; drop one"):
        TrainSettings(stream=True, train_data="synthetic")


def test_an_unknown_split_is_named(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"faces: .*validation.*train"):
        open_stream(shards, split="validation")


def test_an_empty_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.parquet: holds no image"):
        open_stream(embed(make_rows(range(0)), tmp_path / "x.parquet"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_set_that_promises_too_much_stops_every_process_at_the_same_step(shards: Path, rank: int) -> None:
    """83 images fill ten steps of eight; the second process has nothing in the cut-off step."""
    batches, taken = StreamBatches(open_stream(shards, num_images=96), 4, 1, rank, 2, buffer_size=12), 0
    with pytest.raises(ValueError, match=r"ended in step 11 of 12 .* fewer than 96 images; give .* stream_images"):
        for _ in batches:
            taken += 1
    assert taken == 10


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bad_row_stops_every_process_at_the_same_step(tmp_path: Path, rank: int) -> None:
    labels = [0] * 49 + [-1] + [1] * 10
    rows = make_rows(range(60), label=(datasets.ClassLabel(names=NAMES), labels))
    batches, taken = StreamBatches(open_stream(embed(rows, tmp_path / "x.parquet")), 5, 1, rank, 2, buffer_size=1), 0
    with pytest.raises(ValueError, match="epoch 1, step 5 of it, row 9: column 'label' names no identity"):
        for _ in batches:
            taken += 1
    assert taken == 4


def test_the_number_of_images_comes_from_the_card_where_files_do_not_tell(shards: Path) -> None:
    config = SimpleNamespace(data_files={"train": ["hf://datasets/user/faces/x.parquet"]})
    info = SimpleNamespace(splits={"train": datasets.SplitInfo("train", num_examples=12)})
    builder = SimpleNamespace(config=config, info=info)
    assert _num_images(builder, "train") == 12 and _num_images(builder, "dev") is None
    assert len(open_stream(shards, num_images=40)) == 40


def test_a_set_without_a_count_asks_for_it(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptface.data.stream._num_images", lambda builder, split: None)
    with pytest.raises(ValueError, match=r"faces: does not say how many images it has; .* as stream_images"):
        open_stream(shards)


HUB_CLIENT = """
import datasets
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.01
from adaptface.data.stream import StreamBatches, open_stream
source = open_stream("hf://user/faces")
print(len(source), source.name, *source.identities)
print(*sorted(source.image(row).getpixel((0, 0))[0] for batch in StreamBatches(source, 83) for row in batch))
"""


@pytest.mark.slow
def test_a_set_on_the_hub_is_read_and_not_stored(shards: Path, tmp_path: Path) -> None:
    """Its length stands in the card, as `push_to_hub` writes it."""
    card = "---\ndataset_info:\n  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: 83\n---\n"
    with HubServer() as hub:
        first = hub.commit("user/faces", shards)
        hub.commit("user/faces", {"README.md": card.encode()}, parent=first)
        done = subprocess.run(
            [sys.executable, "-c", HUB_CLIENT], cwd=ROOT, env=hub.client_env(tmp_path), capture_output=True, text=True
        )
    assert not hub.unknown, hub.unknown
    assert done.stdout.splitlines() == ["83 hf://user/faces ann bob unused eve", " ".join(map(str, range(83)))], done
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".parquet", ".arrow")]


# --- training -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The faces of `tests.training`, also as three parquet shards."""
    folder = write_faces(tmp_path_factory.mktemp("faces"))
    source = open_source(folder / "faces")
    domains = [None if at < 0 else source.domains[at] for at in source.domain_labels]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=source.identities),
            "domain": datasets.Value("string"),
        }
    )
    images = [{"bytes": source.encoded(at), "path": None} for at in range(len(source))]
    rows = datasets.Dataset.from_dict({"image": images, "label": source.labels, "domain": domains}, features)
    (folder / "shards").mkdir()
    for shard, cut in enumerate(np.array_split(np.arange(len(rows)), [10, 31])):
        embed(rows.select(cut), folder / "shards" / f"train-{shard:05}-of-00003.parquet")
    return folder


def options(faces: Path, **more: Any) -> dict[str, Any]:
    return {"train_data": faces / "shards", "stream": "true", "stream_buffer": 20, **more}


@pytest.mark.slow
def test_resume_is_bit_exact(faces: Path, tiny_backbone_dir: Path, tmp_path: Path, capsys) -> None:
    """Step 4 is in the midst of an epoch."""
    whole = train(faces, tiny_backbone_dir, tmp_path / "whole", **options(faces))
    assert (
        "shards: 54 images of 6 identities, with domain labels, as a stream; 3 steps of 16" in capsys.readouterr().out
    )
    for workers in (0, 2):
        run = tmp_path / f"run{workers}"
        train(faces, tiny_backbone_dir, run, stop_after_steps=4, **options(faces, num_workers=workers))
        train(faces, tiny_backbone_dir, run, resume="auto", **options(faces, num_workers=workers))
        assert_same_run(run, whole)
    assert read_log(whole, "start")[0]["images"] == 54
    with pytest.raises(SystemExit, match="stream_buffer: 20 -> 21"):
        train(faces, tiny_backbone_dir, whole, resume="auto", **options(faces, stream_buffer=21))


def test_resume_refuses_another_set(faces: Path, tiny_backbone_dir: Path, tmp_path: Path) -> None:
    run = train(faces, tiny_backbone_dir, tmp_path / "run", **options(faces, epochs=1))
    other = embed(make_rows(range(54), label=(datasets.ClassLabel(names=[f"id_{n}" for n in range(6)]), [0] * 54)),
                  tmp_path / "other.parquet")  # fmt: skip
    with pytest.raises(SystemExit, match="training data: other identities, labels, domains or images"):
        train(faces, tiny_backbone_dir, run, resume="auto", **options(faces, train_data=other, epochs=1))


def test_dry_run(faces: Path, tiny_backbone_dir: Path, tmp_path: Path, capsys) -> None:
    train(faces, tiny_backbone_dir, tmp_path / "run", dry_run="true", **options(faces))
    output = capsys.readouterr().out
    for part in (
        "images an identity: not known of a stream",
        "20 sample images, 0 of them broken",
        "expected duration",
    ):
        assert part in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one_that_accumulates(faces: Path, tiny_backbone_dir: Path, tmp_path: Path) -> None:
    """And stop together, without waiting for each other, when the set ends too early."""
    same = options(
        faces, lora_dropout=0, router_dropout=0, balance_loss_weight=0, domain_loss_weight=0, epochs=1, weight_decay=0,
        dev_pairs="null", dev_images="null", batch_size=8,
    )  # fmt: skip
    finish(launch(words(faces, tiny_backbone_dir, tmp_path / "two", gradient_accumulation=1, num_workers=2, **same), 2))
    train(faces, tiny_backbone_dir, tmp_path / "one", gradient_accumulation=2, **same)
    two, one = (checkpoint_tensors(tmp_path / name / "checkpoints" / "step_00000003") for name in ("two", "one"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5, msg=key)

    same |= {"gradient_accumulation": 1, "stream_images": 80}
    process = launch(words(faces, tiny_backbone_dir, tmp_path / "short", **same), 2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode and output.count("ended in step 4 of 5 of an epoch") == 2, output
