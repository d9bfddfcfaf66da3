"""The gallery against brute force by numpy: who is found, what is removed, what a file holds. Synthetic embeddings."""

import builtins
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from adaptface import gallery as module
from adaptface.gallery import Gallery, Match
from benchmarks import gallery as benchmark

ROOT = Path(__file__).resolve().parents[1]
E = 32


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def people(count: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Templates of `count` people, 1 to 9 each, shuffled."""
    rng = np.random.default_rng(seed)
    owners = rng.permutation(np.repeat(np.arange(count), rng.integers(1, 10, count)))
    centres = rng.standard_normal((count, E))
    return [f"p{owner}" for owner in owners], (centres[owners] + 0.7 * rng.standard_normal((len(owners), E)))


def brute_force(names: list[str], templates: np.ndarray, query: np.ndarray, threshold: float = -2) -> list[Any]:
    """(name, cosine) of all people above the threshold, the best first."""
    cosines = templates @ query / np.linalg.norm(templates, axis=1) / np.linalg.norm(query)
    best: dict[str, float] = {}
    for name, cosine in zip(names, cosines, strict=True):
        best[name] = max(cosine, best.get(name, -2))
    found = sorted(best.items(), key=lambda item: -item[1])
    return [item for item in found if item[1] > threshold]


def check(found: list[list[Match]], expected: list[list[Any]]) -> None:
    assert [[match.identity for match in matches] for matches in found] == [[n for n, _ in row] for row in expected]
    for matches, row in zip(found, expected, strict=True):
        assert [match.similarity for match in matches] == pytest.approx([c for _, c in row], abs=1e-6)


@pytest.fixture
def coded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small galleries count as large ones, and few candidates are compared; how many each scan was asked for."""
    import faiss

    asked: list[int] = []
    scan = faiss.IndexPQFastScan.search

    def counting(self: Any, queries: np.ndarray, count: int) -> Any:
        asked.append(count)
        return scan(self, queries, count)

    monkeypatch.setattr(faiss.IndexPQFastScan, "search", counting)
    monkeypatch.setattr(module, "EXACT_BELOW", 300)
    monkeypatch.setattr(module, "CANDIDATES", 60)
    return asked


# ------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("k", [1, 3, 50, 1000])
def test_distinct_people_by_their_best_template(k: int) -> None:
    names, templates = people(100)
    gallery = Gallery(E)
    assert gallery.enroll(names, templates) == len(names) == gallery.templates
    queries = random(7, E)
    check(gallery.search(queries, k), [brute_force(names, templates, query)[:k] for query in queries])


def test_one_person_with_most_of_the_templates_hides_nobody() -> None:
    crowd = random(1, E) + 0.1 * random(500, E, seed=1)  # all nearer to the query than anybody else
    others = random(20, E, seed=2)
    gallery = Gallery(E)
    gallery.enroll("crowd", crowd)
    gallery.enroll([f"o{i}" for i in range(20)], others)
    names = ["crowd"] * 500 + [f"o{i}" for i in range(20)]
    expected = brute_force(names, np.concatenate([crowd, others]), random(1, E)[0])
    check(gallery.search(random(1, E)[0], 4), [expected[:4]])


def test_only_above_the_threshold_and_an_empty_list_is_no_match() -> None:
    gallery = Gallery(2)
    gallery.enroll("east", np.array([1.0, 0.0]))
    gallery.enroll("diagonal", np.array([3.0, 4.0]))  # cosine 0.6 with east, exactly representable as 3 / 5
    query = np.array([2.0, 0.0])
    (similarity,) = {m.similarity for m in gallery.search(query)[0] if m.identity == "diagonal"}
    assert similarity == pytest.approx(0.6)
    assert [m.identity for m in gallery.search(query, threshold=np.nextafter(similarity, 0))[0]] == ["east", "diagonal"]
    assert [m.identity for m in gallery.search(query, threshold=similarity)[0]] == ["east"]
    assert gallery.search(query, threshold=1.0) == [[]]
    assert gallery.search(np.stack([query, -query]), threshold=0.9) == [[Match("east", 1.0)], []]


def test_the_source_is_that_of_the_nearest_template() -> None:
    gallery = Gallery(2)
    gallery.enroll("ada", np.array([[1.0, 0.0], [0.0, 1.0]]), ["a.jpg", "b.jpg"])
    gallery.enroll("bob", np.array([-1.0, -1.0]))
    gallery.enroll("cy", np.array([-1.0, 0.0]), "c.jpg")
    assert gallery.search(np.array([0.1, 1.0]), 1)[0][0].source == "b.jpg"
    assert gallery.search(np.array([1.0, 0.1]), 1)[0][0].source == "a.jpg"
    assert [m.source for m in gallery.search(np.array([-1.0, -0.1]), 2)[0]] == ["c.jpg", None]
    assert gallery.sources("ada") == ["a.jpg", "b.jpg"] and gallery.sources("bob") == [None]


def test_an_empty_gallery_matches_nobody() -> None:
    gallery = Gallery(E)
    assert gallery.search(random(3, E)) == [[], [], []] and gallery.search(random(0, E)) == []
    assert len(gallery) == 0 and "ada" not in gallery and gallery.identities == []


def test_scale_and_float_type_do_not_matter() -> None:
    gallery = Gallery(E)
    rows = random(3, E)
    gallery.enroll(["a", "b", "c"], np.array([1e30, 1, 1e-30])[:, None] * rows)
    for dtype in (np.float16, np.float64):
        assert gallery.search(rows[2].astype(dtype), 1)[0] == [Match("c", pytest.approx(1, abs=1e-4))]
    huge = np.full(E, 6e4, np.float16)  # its length is beyond float16
    assert gallery.search(huge, 1)[0][0].similarity < 1


# ------------------------------------------------------------------------------------------------ codes of large ones


def test_codes_find_what_brute_force_finds(coded: list[int]) -> None:
    names, templates = people(400)
    gallery = Gallery(E)
    gallery.enroll(names, templates)
    queries = random(40, E)
    expected = [brute_force(names, templates, query) for query in queries]
    found = gallery.search(queries, 5)
    assert coded
    hits = sum(
        len({m.identity for m in matches} & {n for n, _ in row[:5]})
        for matches, row in zip(found, expected, strict=True)
    )
    assert hits >= 0.99 * 200
    for matches, row in zip(found, expected, strict=True):  # also where one is missed, the similarities are exact
        assert all(match.similarity == pytest.approx(dict(row)[match.identity], abs=1e-6) for match in matches)
    assert gallery.search(queries, 5) == [gallery.search(query, 5)[0] for query in queries]
    scans = len(coded)
    check(gallery.search(queries, 5, exact=True), [row[:5] for row in expected])
    check(gallery.search(queries[:3], 399), [row[:399] for row in expected[:3]])  # so many need all templates anyway
    assert len(coded) == scans


def test_a_scan_goes_on_until_nobody_unseen_can_belong_to_the_answer(
    coded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd, others = random(1, E) + 0.3 * random(250, E, seed=1), random(3000, E, seed=2)
    names = ["crowd"] * 250 + [f"o{i}" for i in range(3000)]
    gallery = Gallery(E)
    gallery.enroll(names, np.concatenate([crowd, others]))
    query = random(1, E)[0]
    expected = brute_force(names, np.concatenate([crowd, others]), query)
    check(gallery.search(query, 2), [expected[:2]])  # the first 60 templates are all of the crowd
    assert coded[0] == 60 and len(coded) > 1
    coded.clear()
    check(gallery.search(query, 2, threshold=1.5), [[]])  # nobody unseen can be above that: one scan is enough
    assert coded == [60]


def test_poor_codes_make_scans_longer_and_answers_no_worse(coded: list[int]) -> None:
    """Embeddings that are nearly all in a few dimensions, which the codes render worst."""
    spectrum = 1 / np.arange(1, 65)
    rows, queries = random(5000, 64) * spectrum, random(50, 64, seed=1) * spectrum
    gallery = Gallery(64)
    gallery.enroll([f"p{i}" for i in range(5000)], rows)
    found = gallery.search(queries, 5)
    expected = [brute_force([f"p{i}" for i in range(5000)], rows, query)[:5] for query in queries]
    hits = [len({m.identity for m in a} & {n for n, _ in b}) for a, b in zip(found, expected, strict=True)]
    assert sum(hits) >= 0.98 * 250 and len(coded) > 1


def test_codes_follow_enrolment_and_removal(coded: list[int]) -> None:
    names, templates = people(400)
    gallery = Gallery(E)
    gallery.enroll(names, templates)
    gallery.search(templates[0])
    more = random(200, E, seed=5)
    gallery.enroll([f"new{i}" for i in range(200)], more)
    gone = {f"p{i}" for i in range(0, 400, 7)}
    gallery.remove(*gone)
    assert gallery._codes.ntotal == gallery.templates
    names, templates = [*names, *(f"new{i}" for i in range(200))], np.concatenate([templates, more])
    kept = [row for row, name in enumerate(names) if name not in gone]
    coded.clear()
    for row in kept[::25]:
        assert gallery.search(templates[row], 1)[0] == [Match(names[row], pytest.approx(1, abs=1e-6))]
    assert coded and not gone & {m.identity for row in gallery.search(templates[::20], 10) for m in row}


def test_codes_are_fitted_anew_when_the_gallery_has_doubled(coded: list[int]) -> None:
    gallery = Gallery(E)
    narrow = random(1, E) + 1e-3 * random(400, E, seed=1)  # codes fitted to these cannot tell others apart
    gallery.enroll([f"n{i}" for i in range(400)], narrow)
    gallery.search(narrow[0])
    fitted = gallery._codes
    assert fitted is not None
    gallery.enroll([f"w{i}" for i in range(1000)], random(1000, E, seed=2))
    gallery.search(random(1, E, seed=3))
    assert gallery._codes is not fitted and gallery._codes_of == 1400


@pytest.mark.filterwarnings("error")  # of places that hold no template
def test_templates_that_the_scan_passes_over_are_found(coded: list[int]) -> None:
    """The scan leaves out templates that score least on every code."""
    gallery = Gallery(E)
    gallery.enroll([f"p{i}" for i in range(1000)], np.concatenate([np.ones((990, E)), -np.ones((10, E))]))
    found = gallery.search(-np.ones(E), 15)[0]
    assert [match.similarity for match in found] == pytest.approx([1] * 10 + [-1] * 5, abs=1e-6) and coded
    assert {match.identity for match in found[:10]} == {f"p{i}" for i in range(990, 1000)}
    assert len({match.identity for match in found}) == 15


def test_an_odd_length_has_codes_too(coded: list[int]) -> None:
    rows = random(500, 15)
    gallery = Gallery(15)
    gallery.enroll([f"p{i}" for i in range(500)], rows)
    assert [row[0].identity for row in gallery.search(rows[:20], 1)] == [f"p{i}" for i in range(20)]
    assert coded


# ------------------------------------------------------------------------------------------------------------ enrolment


def test_a_repeated_template_is_added_once_a_person() -> None:
    gallery = Gallery(E)
    rows = random(3, E)
    assert gallery.enroll("ada", rows[[0, 1, 0]], ["first", "other", "again"]) == 2
    assert gallery.sources("ada") == ["first", "other"]
    assert gallery.enroll(["ada", "bob", "bob"], np.stack([2 * rows[1], rows[1], rows[2]])) == 2  # by direction
    assert gallery.sources("ada") == ["first", "other"] and len(gallery.sources("bob")) == 2
    assert {m.identity for m in gallery.search(rows[1], 2, threshold=0.999)[0]} == {"ada", "bob"}
    assert (len(gallery), gallery.templates) == (2, 4)


@pytest.mark.parametrize(
    ("identity", "embeddings", "sources", "message"),
    [
        ("b", random(E + 1), None, r"shape \(33,\)"),
        ("b", random(2, 2, E), None, "shape"),
        ("b", np.ones(E, int), None, "floating-point"),
        ("b", np.zeros(E), None, "number 0 .* zero"),
        (["b", "c"], np.stack([np.ones(E), np.full(E, np.nan)]), None, "number 1 .* not finite"),
        ("b", np.full(E, np.inf), None, "not finite"),
        ("b", np.full(E, 1e200), None, "not finite"),
        (["b"], random(2, E), None, "identity: 1 for 2"),
        (["b", ""], random(2, E), None, "empty"),
        (["b", 7], random(2, E), None, "int, not a text"),
        (None, random(2, E), None, "NoneType, not a text"),
        ("b\ud800", random(E), None, "valid Unicode"),
        ("b", random(2, E), ["x"], "sources: 1 for 2"),
        ("b", random(2, E), ["x", Path("y")], "sources: .* not a text"),
    ],
)
def test_what_is_refused_changes_nothing(identity: Any, embeddings: Any, sources: Any, message: str) -> None:
    gallery = Gallery(E)
    gallery.enroll("ada", random(2, E, seed=9))
    before = gallery.search(random(5, E))
    with pytest.raises(ValueError, match=message):
        gallery.enroll(identity, embeddings, sources)
    assert (gallery.identities, gallery.templates) == (["ada"], 2) and gallery.search(random(5, E)) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 0}, "k is 0"), ({"threshold": float("nan")}, "not a number")],
)
def test_senseless_searches_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gallery(E).search(random(E), **options)


def test_embeddings_of_another_model_are_refused(tmp_path: Path) -> None:
    ours, theirs = {"weights_sha256": "ab", "revision": "1"}, {"weights_sha256": "cd", "revision": "1"}
    gallery = Gallery(E, model=ours)
    gallery.enroll("ada", random(E), model=dict(ours))
    gallery.enroll("ada", random(E, seed=1))  # not said: not checked
    gallery.save(tmp_path / "g.parquet")
    for call in (
        lambda: gallery.enroll("bob", random(E), model=theirs),
        lambda: gallery.search(random(E), model=theirs),
        lambda: Gallery.load(tmp_path / "g.parquet", model=theirs),
    ):
        with pytest.raises(ValueError, match=r"another model .*weights_sha256: 'ab' there, 'cd' here"):
            call()
    assert "bob" not in gallery and Gallery.load(tmp_path / "g.parquet", model=ours).model == ours
    with pytest.raises(ValueError, match="does not say which model"):
        Gallery(E).enroll("bob", random(E), model=theirs)
    with pytest.raises(ValueError, match="model must be"):
        Gallery(E, model={"a": {1, 2}})


# -------------------------------------------------------------------------------------------------------------- removal


def test_removal_leaves_the_others_as_they_were() -> None:
    names, templates = people(60)
    gallery = Gallery(E)
    gallery.enroll(names, templates, [str(row) for row in range(len(names))])
    gone = {"p0", "p17", "p59"}
    assert gallery.remove(*gone) == sum(name in gone for name in names)
    kept = [row for row, name in enumerate(names) if name not in gone]
    assert gallery.identities == list(dict.fromkeys(names[row] for row in kept))
    for name in gallery.identities:
        assert gallery.sources(name) == [str(row) for row in kept if names[row] == name]
    expected = [brute_force([names[row] for row in kept], templates[kept], query)[:9] for query in random(5, E)]
    check(gallery.search(random(5, E), 9), expected)
    assert not gallery._vectors[gallery.templates :].any()  # removed from memory too
    gallery.enroll("p17", templates[:1])
    assert gallery.identities[-1] == "p17" and gallery.search(templates[0], 9)[0][0].similarity > 0.999


def test_removing_a_stranger_removes_nobody() -> None:
    gallery = Gallery(E)
    gallery.enroll("ada", random(E))
    with pytest.raises(KeyError, match="'bob'"):
        gallery.remove("ada", "bob")
    assert "ada" in gallery
    assert gallery.remove("ada") == 1 and len(gallery) == gallery.templates == 0
    assert gallery.search(random(E)) == [[]]


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Gallery, Path]:
    names, templates = people(50)
    gallery = Gallery(E, model={"name": "é", "flip": True})
    gallery.enroll(names, templates, [None if row % 3 else f"{row}.jpg" for row in range(len(names))])
    gallery.save(tmp_path / "deep" / "g.parquet")
    return gallery, tmp_path / "deep" / "g.parquet"


@pytest.mark.parametrize("block", [7, 65_536])
def test_a_file_holds_everything(saved: tuple[Gallery, Path], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, path = saved
    monkeypatch.setattr(module, "_BLOCK", block)
    gallery.save(path)
    loaded = Gallery.load(path)
    assert (loaded.dim, loaded.model, loaded.identities) == (E, gallery.model, gallery.identities)
    assert all(loaded.sources(name) == gallery.sources(name) for name in gallery.identities)
    assert loaded.search(random(9, E), 7) == gallery.search(random(9, E), 7)
    loaded.enroll("new", random(E))
    loaded.remove("p3")
    assert "new" in loaded and loaded.templates == gallery.templates + 1 - len(gallery.sources("p3"))


def test_others_can_read_it(saved: tuple[Gallery, Path]) -> None:
    gallery, path = saved
    names, templates = people(50)
    table = parquet.read_table(path)
    assert table["identity"].to_pylist() == names
    assert table["source"].to_pylist()[:4] == ["0.jpg", None, None, "3.jpg"]
    unit = templates / np.linalg.norm(templates, axis=1, keepdims=True)
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), unit, atol=1e-6)
    assert json.loads(table.schema.metadata[b"adaptface_gallery"])["model"] == gallery.model


def test_changes_of_several_processes_are_all_kept(tmp_path: Path) -> None:
    """Each reads the file, waits for the other to have read it if it may, and adds a person."""
    path = tmp_path / "people.parquet"
    with Gallery.updating(path, 2) as gallery:
        gallery.enroll("nobody", np.ones(2))
    code = f"""
import sys, time
import numpy as np
from adaptface.gallery import Gallery
with Gallery.updating({str(path)!r}) as gallery:
    time.sleep(0.5)
    gallery.enroll(sys.argv[1], np.ones(2))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", code, name], env=environment) for name in ("ada", "bob")]
    assert [process.wait() for process in started] == [0, 0]
    assert sorted(Gallery.load(path).identities) == ["ada", "bob", "nobody"]


def test_what_updating_refuses_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "people.parquet"
    with pytest.raises(FileNotFoundError, match="there is no gallery at"), Gallery.updating(path):
        pass
    assert not list(tmp_path.iterdir())
    with Gallery.updating(path, 2, model={"a": 1}) as gallery:
        gallery.enroll("ada", np.ones(2))
        with (
            pytest.raises(TimeoutError, match="another process is changing it"),
            Gallery.updating(path, 2, timeout=0.1),
        ):
            pass
    with pytest.raises(ValueError, match="another model"), Gallery.updating(path, 2, model={"a": 2}):
        pass
    with pytest.raises(ZeroDivisionError), Gallery.updating(path, 2) as gallery:
        gallery.remove("ada")
        raise ZeroDivisionError
    assert Gallery.load(path).identities == ["ada"]


def test_an_empty_gallery_can_be_saved(tmp_path: Path) -> None:
    Gallery(E).save(tmp_path / "g.parquet")
    loaded = Gallery.load(tmp_path / "g.parquet")
    assert (len(loaded), loaded.dim, loaded.model) == (0, E, None)


def test_a_removed_person_is_not_in_the_next_file(saved: tuple[Gallery, Path]) -> None:
    gallery, path = saved
    row = gallery._vectors[gallery._owners[: gallery.templates] == gallery._numbers["p4"]][0].tobytes()
    assert row in path.read_bytes()
    gallery.remove("p4")
    gallery.save(path)
    content = path.read_bytes()
    assert row not in content and b"p4\x02" not in content and "p4" not in Gallery.load(path)


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_only_the_owner_may_read_a_file(saved: tuple[Gallery, Path]) -> None:
    gallery, path = saved
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    path.with_name(".g.parquet.partial").write_text("of an interrupted save")
    gallery.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and [p.name for p in path.parent.iterdir()] == ["g.parquet"]


def test_a_failed_save_leaves_the_earlier_file(saved: tuple[Gallery, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, path = saved
    before = path.read_bytes()
    gallery.enroll("new", random(E))

    def full(self: Any, table: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(parquet.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="no space"):
        gallery.save(path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["g.parquet"]


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    parquet.write_table(change(parquet.read_table(path)), path, compression="none")


def with_embedding(table: pa.Table, value: float) -> pa.Table:
    rows = np.array(table["embedding"].to_pylist(), np.float32)
    rows[5] *= value
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), type=table.schema.field("embedding").type)
    return table.set_column(2, table.schema.field("embedding"), column)


def without_names(table: pa.Table) -> pa.Table:
    return table.set_column(0, table.schema.field("identity"), pa.array([""] * len(table)))


def metadata(table: pa.Table, **changed: Any) -> pa.Table:
    content = json.loads(table.schema.metadata[b"adaptface_gallery"]) | changed
    return table.replace_schema_metadata({b"adaptface_gallery": json.dumps(content)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged or cut off"),
        (lambda path: path.write_bytes(b""), "damaged or cut off"),
        (lambda path: path.write_bytes(b"no parquet" * 100), "no gallery"),
        (lambda path: rewrite(path, lambda t: t.replace_schema_metadata(None)), "but no gallery"),
        (lambda path: rewrite(path, lambda t: metadata(t, version=2)), "version 2.* reads version 1"),
        (lambda path: rewrite(path, lambda t: metadata(t, dim="x")), "no gallery"),
        (lambda path: rewrite(path, lambda t: metadata(t, dim=E - 1)), "columns are not"),
        (lambda path: rewrite(path, lambda t: metadata(t, dim=0)), "no gallery"),
        (lambda path: rewrite(path, lambda t: metadata(t, model=3)), "no gallery"),
        (lambda path: rewrite(path, lambda t: t.drop_columns(["source"])), "columns are not"),
        (lambda path: rewrite(path, lambda t: with_embedding(t, np.nan)), "not finite"),
        (lambda path: rewrite(path, lambda t: with_embedding(t, 1.1)), "length is not 1"),
        (lambda path: rewrite(path, without_names), "lacks its identity"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_right_is_refused(
    saved: tuple[Gallery, Path], damage: Callable[[Path], Any], message: str
) -> None:
    path = saved[1]
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        Gallery.load(path)
    assert str(path) in str(caught.value)


def test_a_changed_bit_is_noticed(saved: tuple[Gallery, Path]) -> None:
    gallery, path = saved
    content = bytearray(path.read_bytes())
    place = content.index(gallery._vectors[7].tobytes())
    content[place] ^= 1  # the last bit of a number: only the checksum tells
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        Gallery.load(path)


def test_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no gallery at"):
        Gallery.load(tmp_path / "none")


# --------------------------------------------------------------------------------------------------- threads, packages


def test_threads_take_turns(coded: list[int]) -> None:
    names, templates = people(200)
    gallery = Gallery(E)
    gallery.enroll(names, templates)
    errors: list[BaseException] = []

    def change() -> None:
        try:
            for number in range(40):
                gallery.enroll(f"t{number}", random(20, E, seed=number))
                if number % 4 == 3:
                    gallery.remove(f"t{number}", f"t{number - 1}")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    searches = 0
    while thread.is_alive() or searches < 5:
        found = gallery.search(templates[:50], 1)
        assert [row[0].identity for row in found] == names[:50]
        searches += 1
    thread.join()
    assert not errors and len(gallery) == 200 + 20


@pytest.mark.parametrize("method", ["search", "enroll", "remove", "save", "sources"])
def test_a_call_waits_for_another(method: str, tmp_path: Path) -> None:
    gallery = Gallery(E)
    gallery.enroll("ada", random(E))
    arguments = {"search": (random(E),), "enroll": ("bob", random(E)), "save": (tmp_path / "g.parquet",)}
    thread = threading.Thread(target=getattr(gallery, method), args=arguments.get(method, ("ada",)))
    with gallery._lock:  # as another call holds it
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()


def test_without_faiss_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def lacking(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(ImportError, match=r"pip install 'adaptface\[gallery\]'"):
        Gallery(E)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["torch", "faiss"])
def test_faiss_and_torch_work_in_one_process(first: str) -> None:
    """Each brings an OpenMP of its own; whichever comes first, both compute, with several threads, and are right."""
    code = f"""
import {first}, sys
sys.path.insert(0, {str(ROOT)!r})
import faiss, numpy as np, torch
from adaptface.gallery import Gallery
torch.set_num_threads(2); faiss.omp_set_num_threads(2)
torch.manual_seed(0)
for _ in range(3):
    x = torch.nn.functional.normalize(torch.randn(60_000, 64) @ torch.randn(64, 64))
    gallery = Gallery(64)
    gallery.enroll([str(i) for i in range(len(x))], x.numpy())
    expected = (x[:600] @ x.T).topk(2).indices[:, 1].tolist()
    for exact in (True, False):
        found = gallery.search(x[:600].numpy(), 2, exact=exact)
        assert [int(m[0].identity) for m in found] == list(range(600))
        agree = sum(int(m[1].identity) == e for m, e in zip(found, expected))
        assert agree >= 598, (exact, agree)
assert torch.get_num_threads() == faiss.omp_get_max_threads() == 2
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_benchmark_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--templates",
        "60000",
        "--dim",
        "64",
        "--queries",
        "60",
        "--threshold",
        "0.5",
        "--kinds",
        "faces",
        "random",
    ]
    results = benchmark.main([*words, "--output", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == results
    for kind, people in (("faces", 12_000), ("random", 60_000)):
        found = results[kind]
        assert (found["templates"], found["people"]) == (60_000, people)
        assert found["exact_recall_at_10"] == 1 and found["recall_at_10"] >= 0.99
        # 60 strangers, as many false matches as expected within four standard deviations
        share = found["expected_false_positive_rate"]
        assert abs(found["false_positive_rate"] - share) < 4 * (share * (1 - share) / 60) ** 0.5 + 1e-9
    assert "recall@10" in capsys.readouterr().out
