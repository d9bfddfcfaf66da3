"""The cache of embeddings: kept by content, apart for each embedder, shared by runs."""

from pathlib import Path

import numpy as np
import pytest

from adaptface.cache import FeatureCache, default_cache_dir


def test_embeddings_are_found_by_content_and_embedder(tmp_path: Path) -> None:
    digests = [bytes([number]) * 32 for number in range(3)]
    embeddings = np.arange(12, dtype=np.float32).reshape(3, 4)
    cache = FeatureCache(tmp_path / "new" / "folder", {"weights": "a"})
    cache.keep(digests[:2], embeddings[:2])
    beside = FeatureCache(tmp_path / "new" / "folder", {"weights": "a"})  # another run, at the same time
    beside.keep(digests[1:], embeddings[1:])
    found = cache.find(digests * 300)  # more than one query holds
    assert found.keys() == set(digests)
    assert all(np.array_equal(found[digest], row) for digest, row in zip(digests, embeddings, strict=True))
    assert FeatureCache(tmp_path / "new" / "folder", {"weights": "b"}).find(digests) == {}


def test_a_batch_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, {})
    with pytest.raises(ValueError):
        cache.keep([b"1", b"2"], np.ones((1, 4), np.float32))
    assert cache.find([b"1", b"2"]) == {}


def test_what_is_no_cache_is_named(tmp_path: Path) -> None:
    path = FeatureCache(tmp_path, {}).path
    path.write_bytes(b"something else" * 100)
    with pytest.raises(OSError, match=r"features-.*: cannot be used as a cache .*; delete it"):
        FeatureCache(tmp_path, {})


def test_a_cache_damaged_further_in_is_named(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, {})
    digests = [bytes([number]) * 32 for number in range(200)]
    cache.keep(digests, np.ones((200, 64), np.float32))
    cache.close()
    content = cache.path.read_bytes()
    cache.path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with pytest.raises(OSError, match="cannot be used as a cache"):
        FeatureCache(tmp_path, {}).find(digests)


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ADAPTFACE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache_dir() == Path.home() / ".cache" / "adaptface"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "adaptface"
