"""LFW's, RFW's and CFP's own files, written here as their authors describe them, mean the pairs that they say."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adaptface.data.benchmarks import load_pairs

FOLDS, PAIRS = 10, 3


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((20, 20), 50).convert("RGB").save(path)


@pytest.fixture
def lfw(tmp_path: Path) -> Path:
    """People Ann_F0 ... with four images each; genuine (1, 2), (3, 4)..., impostors beside them."""
    lines = [f"{FOLDS}\t{PAIRS}"]
    for fold in range(FOLDS):
        lines += [f"Ann_F{fold}\t1\t{n}" for n in (2, 3, 4)]
        lines += [f"Ann_F{fold}\t{n}\tBob_F{fold}\t1" for n in (1, 2, 3)]
        for n in (1, 2, 3, 4):
            save(tmp_path / "lfw" / f"Ann_F{fold}" / f"Ann_F{fold}_{n:04d}.png")
        save(tmp_path / "lfw" / f"Bob_F{fold}" / f"Bob_F{fold}_0001.png")
    (tmp_path / "lfw" / "pairs.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "lfw" / "pairs.txt"


def image(pairs, index: int) -> str:
    return "/".join(Path(pairs.images.where(index)).parts[-3:])


def test_lfw_list(lfw: Path) -> None:
    pairs = load_pairs(lfw)
    assert (pairs.name, pairs.tag) == ("lfw", "general")
    assert load_pairs(lfw.rename(lfw.with_name("others.txt"))).tag is None
    assert len(pairs) == 60 and len(pairs.images) == 50 and pairs.protocol == "the list's own 10 folds"
    assert pairs.same.tolist() == ([True] * 3 + [False] * 3) * 10
    assert pairs.folds.tolist() == [fold for fold in range(10) for _ in range(6)]
    assert image(pairs, pairs.index_a[8]) == "lfw/Ann_F1/Ann_F1_0001.png"
    assert image(pairs, pairs.index_b[8]) == "lfw/Ann_F1/Ann_F1_0004.png"
    assert image(pairs, pairs.index_a[11]) == "lfw/Ann_F1/Ann_F1_0003.png"
    assert image(pairs, pairs.index_b[11]) == "lfw/Bob_F1/Bob_F1_0001.png"
    assert pairs.suspect_labels() == [] and pairs.images[0].size == (20, 20)
    assert pairs.identity is not None and len(np.unique(pairs.identity)) == 20
    assert ((pairs.identity[:, 0] == pairs.identity[:, 1]) == pairs.same).all()


def test_lfw_list_with_a_byte_order_mark(lfw: Path) -> None:
    lfw.write_bytes(b"\xef\xbb\xbf" + lfw.read_bytes())
    assert len(load_pairs(lfw)) == 60


def test_lfw_list_with_another_image_folder(lfw: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    moved = lfw.rename(tmp_path / "lists" / "pairs.txt")
    assert len(load_pairs(moved, tmp_path / "lfw")) == 60
    with pytest.raises(FileNotFoundError, match=r"pairs.txt: 50 of 50 images are missing; is .*lists the image folder"):
        load_pairs(moved)


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (1, "10\t4", r"line 1: 10 folds of 4 genuine and 4 impostor pairs take 81 lines, but there are 61"),
        (1, "60", r"line 1: names 60 pairs and no folds"),
        (1, "0 3", r"line 1: 0 folds of 3 genuine"),
        (3, "Ann_F0\t1", r"1 malformed lines:\s+line 3: expected `name n1 n2`, found 'Ann_F0.t1'"),
        (3, "Ann_F0\t1\tx", r"line 3: expected `name n1 n2`"),
        (5, "Ann_F0\t1\t2", r"line 5: expected `name1 n1 name2 n2`"),
        (5, "Ann_F0\tx\tBob_F0\t1", r"line 5: expected `name1 n1 name2 n2`"),
    ],
)
def test_lfw_list_malformed(lfw: Path, number: int, line: str, message: str) -> None:
    lines = lfw.read_text().splitlines()
    lines[number - 1] = line
    lfw.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message) as caught:
        load_pairs(lfw)
    assert str(lfw) in str(caught.value)


def test_lfw_list_cut_off(lfw: Path) -> None:
    lfw.write_text("\n".join(lfw.read_text().splitlines()[:-7]))
    with pytest.raises(ValueError, match="take 61 lines, but there are 54"):
        load_pairs(lfw)


@pytest.fixture
def rfw(tmp_path: Path) -> Path:
    """Two races, ten folds of two genuine and two impostor pairs each; no first line, as published."""
    for race in ("African", "Asian"):
        lines = []
        for fold in range(FOLDS):
            a, b = (f"m.0{race[1]}{fold}{letter}" for letter in "xy")
            lines += [f"{a}\t1\t2", f"{b}\t2\t1", f"{a}\t1\t{b}\t2", f"{b}\t1\t{a}\t2"]
            for name in (a, b):
                for number in (1, 2):
                    save(tmp_path / "rfw" / "data" / race / name / f"{name}_{number:04d}.jpg")
        (tmp_path / "rfw" / "txts" / race).mkdir(parents=True)
        (tmp_path / "rfw" / "txts" / race / f"{race}_pairs.txt").write_text("\n".join(lines) + "\n")
        (tmp_path / "rfw" / "txts" / race / f"{race}_people.txt").write_text("not read\n")
    return tmp_path / "rfw"


def test_rfw_is_one_benchmark_whose_groups_are_the_races(rfw: Path) -> None:
    pairs = load_pairs(rfw)
    assert (pairs.name, len(pairs), len(pairs.images)) == ("rfw", 80, 80)
    assert pairs.group is not None and pairs.group.tolist() == ["African"] * 40 + ["Asian"] * 40
    assert pairs.folds.tolist() == [fold for fold in range(10) for _ in range(4)] * 2
    assert pairs.same.tolist() == [True, True, False, False] * 20
    assert image(pairs, pairs.index_a[42]) == "Asian/m.0s0x/m.0s0x_0001.jpg"
    assert image(pairs, pairs.index_b[42]) == "Asian/m.0s0y/m.0s0y_0002.jpg"
    assert pairs.identity is not None and len(np.unique(pairs.identity)) == 40
    assert pairs.suspect_labels() == [] and pairs.images[0].size == (20, 20)


def test_rfw_with_counted_lists_people_of_two_races_and_images_elsewhere(rfw: Path, tmp_path: Path) -> None:
    (rfw / "data").rename(tmp_path / "aligned")
    file = rfw / "txts" / "Asian" / "Asian_pairs.txt"
    file.write_text("10\t2\n" + file.read_text().replace("m.0s3x", "m.0f3x"))
    (tmp_path / "aligned" / "Asian" / "m.0s3x").rename(tmp_path / "aligned" / "Asian" / "m.0f3x")
    for number in (1, 2):
        folder = tmp_path / "aligned" / "Asian" / "m.0f3x"
        (folder / f"m.0s3x_{number:04d}.jpg").rename(folder / f"m.0f3x_{number:04d}.jpg")
    pairs = load_pairs(rfw, tmp_path / "aligned")
    assert len(pairs.images) == 80 and pairs.identity is not None and len(np.unique(pairs.identity)) == 39
    with pytest.raises(FileNotFoundError, match=r"rfw: 80 of 80 images are missing; is .*data the image folder"):
        load_pairs(rfw)


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (3, "a\t1", r"Asian_pairs.txt: 1 malformed lines:\s+line 3: expected `name1 n1 name2 n2`, found 'a.t1'"),
        (1, "a\t1\tb", r"Asian_pairs.txt: 1 malformed lines:\s+line 1: expected `name n1 n2`, found 'a.t1.tb'"),
        (3, "a\t1\tb\tx", r"line 3: expected `name1 n1 name2 n2`"),
        (9, "a\t1\tb\t2", r"Asian_pairs.txt: unbalanced folds: fold 2 has 1 genuine of 4.*is the list cut off\?"),
        (1, "10\t3", r"Asian_pairs.txt, line 1: 10 folds of 3 genuine and 3 impostor pairs take 61 lines"),
    ],
)
def test_rfw_malformed(rfw: Path, number: int, line: str, message: str) -> None:
    file = rfw / "txts" / "Asian" / "Asian_pairs.txt"
    lines = file.read_text().splitlines()
    lines[number - 1] = line
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        load_pairs(rfw)


def test_rfw_incomplete(rfw: Path) -> None:
    file = rfw / "txts" / "Asian" / "Asian_pairs.txt"
    whole = file.read_text()
    file.write_text("\n".join(whole.splitlines()[:7]))
    with pytest.raises(ValueError, match=r"Asian_pairs.txt: 7 pairs cannot be cut into 10 folds"):
        load_pairs(rfw)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"Asian_pairs.txt: this list of RFW is missing; unpack"):
        load_pairs(rfw)


@pytest.fixture
def cfp(tmp_path: Path) -> Path:
    """Two people a fold, ten frontal images and four profiles in all lists, as `number path` lines."""
    protocol = tmp_path / "cfp-dataset" / "Protocol"
    frontal = [f"{person:03d}/frontal/{n:02d}.jpg" for person in range(1, 21) for n in (1, 2)]
    profile = [f"{person:03d}/profile/{n:02d}.jpg" for person in range(1, 21) for n in (1,)]
    for name, files in (("F", frontal), ("P", profile)):
        protocol.mkdir(parents=True, exist_ok=True)
        lines = [f"{number} ../Data/Images/{file}" for number, file in enumerate(files, start=1)]
        (protocol / f"Pair_list_{name}.txt").write_text("\r\n".join(lines) + "\r\n")
        for file in files:
            save(tmp_path / "cfp-dataset" / "Data" / "Images" / file)
    for fold in range(10):
        a, b = 2 * fold + 1, 2 * fold + 2  # the fold's two people
        for kind, same, different in (
            ("FP", [(2 * a - 1, a), (2 * b, b)], [(2 * a, b), (2 * b - 1, a)]),
            ("FF", [(2 * a - 1, 2 * a), (2 * b - 1, 2 * b)], [(2 * a, 2 * b), (2 * a - 1, 2 * b - 1)]),
        ):
            folder = protocol / "Split" / kind / f"{fold + 1:02d}"
            folder.mkdir(parents=True)
            (folder / "same.txt").write_text("".join(f"{i},{j}\n" for i, j in same))
            (folder / "diff.txt").write_text("".join(f"{i},{j}\n" for i, j in different))
    return protocol / "Split"


def test_cfp_frontal_profile(cfp: Path) -> None:
    pairs = load_pairs(cfp / "FP")
    assert (pairs.name, len(pairs), len(pairs.images)) == ("cfp_fp", 40, 60)
    assert pairs.same.tolist() == [True, True, False, False] * 10
    assert pairs.folds.tolist() == [fold for fold in range(10) for _ in range(4)]
    for pair, (first, second) in {
        0: ("001/frontal/01.jpg", "001/profile/01.jpg"),
        1: ("002/frontal/02.jpg", "002/profile/01.jpg"),
        38: ("019/frontal/02.jpg", "020/profile/01.jpg"),
    }.items():
        assert (image(pairs, pairs.index_a[pair]), image(pairs, pairs.index_b[pair])) == (first, second)
    assert pairs.suspect_labels() == [] and pairs.tag == "pose"
    assert pairs.identity is not None and len(np.unique(pairs.identity)) == 20
    assert ((pairs.identity[:, 0] == pairs.identity[:, 1]) == pairs.same).all()


def test_cfp_frontal_frontal_and_images_elsewhere(cfp: Path, tmp_path: Path) -> None:
    (tmp_path / "cfp-dataset" / "Data" / "Images").rename(tmp_path / "aligned")
    pairs = load_pairs(cfp / "FF", tmp_path / "aligned")
    assert pairs.name == "cfp_ff" and all("frontal" in image(pairs, i) for i in range(len(pairs.images)))
    assert image(pairs, pairs.index_b[3]) == "002/frontal/01.jpg"
    with pytest.raises(FileNotFoundError, match=r"40 of 40 images are missing; is .*Images the image folder"):
        load_pairs(cfp / "FF")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("Split/FP/03/same.txt", "1,2\n3;4\n", r"same.txt, line 2: expected two numbers `i,j`, found '3;4'"),
        ("Split/FP/03/diff.txt", "1,21\n", r"diff.txt, line 1: there is no image 21, only 1 to 20"),
        ("Split/FP/03/diff.txt", "0,1\n", r"diff.txt, line 1: there is no image 0, only 1 to 40"),
        ("Pair_list_P.txt", "1 ../Data/Images/a.jpg\n3 ../Data/Images/b.jpg\n", r"line 2: expected `2 ../Data/Images"),
        ("Pair_list_F.txt", "1 a.jpg\n", r"Pair_list_F.txt, line 1: expected `1 ../Data/Images/...`"),
    ],
)
def test_cfp_malformed(cfp: Path, file: str, content: str, message: str) -> None:
    (cfp.parent / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_pairs(cfp / "FP")


def test_cfp_cut_off(cfp: Path) -> None:
    kept = (cfp / "FP" / "03" / "diff.txt").read_text()
    for content, message in ((kept.splitlines()[0] + "\n", "folds of 3 to 4 pairs"), ("", "folds of 2 to 4 pairs")):
        (cfp / "FP" / "03" / "diff.txt").write_text(content)
        with pytest.raises(ValueError, match=f"FP: {message}.*is the list cut off"):
            load_pairs(cfp / "FP")
    (cfp / "FP" / "03" / "diff.txt").write_text(kept)
    shutil.rmtree(cfp / "FP" / "07")
    with pytest.raises(ValueError, match="FP: 9 folds instead of ten"):
        load_pairs(cfp / "FP")


def test_folders_that_systems_leave_do_not_count(rfw: Path, cfp: Path) -> None:
    for place in (rfw / "data", rfw / "txts", cfp / "FP"):
        for name in (".ipynb_checkpoints", "__MACOSX"):
            (place / name).mkdir()
    (rfw / "data" / "Indian").mkdir()  # empty
    assert len(load_pairs(rfw)) == 80 and len(load_pairs(cfp / "FP")) == 40


def test_an_image_folder_of_another_benchmark_is_left_alone(rfw: Path, cfp: Path, lfw: Path) -> None:
    for path in (rfw, cfp / "FP"):
        assert all(Path(where).is_file() for where in load_pairs(path, lfw.parent).images.names)


def test_one_race_of_rfw(rfw: Path) -> None:
    pairs = load_pairs(rfw / "txts" / "Asian" / "Asian_pairs.txt", rfw / "data" / "Asian")
    assert pairs.name == "Asian_pairs" and len(pairs) == 40 and pairs.group is None
    both = load_pairs(rfw)
    assert both.group is not None
    assert pairs.same.tolist() == both.same[both.group == "Asian"].tolist()
    assert pairs.folds.tolist() == both.folds[both.group == "Asian"].tolist()


def test_rfw_with_a_race_missing_or_a_line_cut_off(rfw: Path) -> None:
    lists = rfw / "txts" / "Asian"
    content = (lists / "Asian_pairs.txt").read_text().splitlines()
    (lists / "Asian_pairs.txt").write_text("\n".join(content[:-1]))
    with pytest.raises(ValueError, match=r"Asian_pairs.txt: folds of 3 to 4 pairs, instead of equal ones"):
        load_pairs(rfw)
    shutil.rmtree(lists)
    with pytest.raises(FileNotFoundError, match=r"data.Asian has no lists in .*txts; unpack the data set again"):
        load_pairs(rfw)


def test_cfp_incomplete(cfp: Path) -> None:
    (cfp / "FP" / "04" / "diff.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"04.diff.txt: this list of CFP's protocol is missing"):
        load_pairs(cfp / "FP")
    with pytest.raises(ValueError, match="a folder, but none of CFP's splits"):
        load_pairs(cfp)
    other = (cfp / "FF").rename(cfp / "XX")
    with pytest.raises(ValueError, match="XX: is no split of CFP; give Protocol/Split/FP"):
        load_pairs(other)
