"""Pair lists -> verification results, for any embedder."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from adaptface.data.pairs import PairSet, contradictions
from adaptface.embedders import Embedder
from adaptface.embedding import StoredEmbeddings, embed_distinct
from adaptface.metrics import (
    MIN_FALSE_ACCEPTS,
    THRESHOLDS,
    group_error_rates,
    group_scores,
    pair_distances,
    verification_report,
)

EMBEDDING = "features of image and mirror image added raw, then L2-normalised"
UNFLIPPED = "features, L2-normalised"
STORED = "embeddings as given, L2-normalised"


class SuspectLabelsError(ValueError):
    """A pair list's labels look wrong, so that a result on it would mean nothing."""


def refuse_suspect(where: str, suspect: list[str]) -> None:
    """Stop at signs that labels are wrong, where there are any.

    Raises:
        SuspectLabelsError: names `where` and the signs.
    """
    if suspect:
        raise SuspectLabelsError(f"{where}: {'; '.join(suspect)}; check labels and order of the pairs")


def suspect_auc(name: str, embedder: str, auc: float, strict: bool) -> list[str]:
    """The sign of wrong labels that an AUC below one half is, if it is.

    Raises:
        SuspectLabelsError: it is, and `strict` asks to stop.
    """
    if auc >= 0.5:
        return []
    text = f"AUC {auc:.3f} is below 0.5: labels are wrong or out of order, or the model is"
    if strict:
        raise SuspectLabelsError(f"{name}, {embedder}: {text}")
    return [text]


class Evaluation(NamedTuple):
    """An embedder on a benchmark.

    Attributes:
        result (`dict`): JSON-ready; of pairs `benchmark`, `domain` (of the whole benchmark, None of an unknown one),
            `data` ("synthetic" or "unspecified"), `protocol`, `embedder`, `images` (of different content),
            `embedding_size`, the fields of [`~metrics.VerificationReport`], `domains` (per domain, where the list names
            them), `groups` (None, or `scores` of [`~metrics.group_scores`] and `rates` of
            [`~metrics.group_error_rates`], where the list names demographic groups), `warnings`, `seconds`, `embedded`
            and `images_per_second` (the images embedded now, not found in the cache, and their rate; None where there
            were none).
        similarities (`np.ndarray` of shape `(N,)`): cosine of each pair.
    """

    result: dict[str, Any]
    similarities: np.ndarray


def evaluate_pairs(
    embedder: Embedder | StoredEmbeddings,
    pair_set: PairSet,
    flip: bool = True,
    strict: bool = True,
    **options: Any,
) -> Evaluation:
    """Run the verification protocol on a pair list.

    Args:
        embedder: what turns images into features, or embeddings that were made elsewhere.
        pair_set: from `load_pairs`.
        flip: add the features of the mirror image.
        strict: stop where labels look wrong, see [`~data.pairs.PairSet.suspect_labels`], or the AUC is below 0.5.
            False puts a line into `warnings` instead; for the untrained model of a training run.
        options: batch size, workers, progress, processes, cache; see [`~embedding.embed_distinct`].
    Raises:
        SuspectLabelsError: see `strict`.
        ValueError: see `embed_distinct`.
    """
    suspect = pair_set.suspect_labels()
    if strict:
        refuse_suspect(pair_set.name, suspect)

    start = time.perf_counter()
    if isinstance(embedder, StoredEmbeddings):
        embeddings, rows, computed = embedder.of(pair_set.images)
    else:
        embeddings, rows, computed = embed_distinct(embedder, pair_set.images, flip, **options)  # (M, E), (images,)
    seconds = time.perf_counter() - start

    sides = rows[pair_set.index_a], rows[pair_set.index_b]
    distances = pair_distances(embeddings, *sides)  # (N,)
    report = verification_report(distances, pair_set.same, pair_set.folds, identities=pair_set.identity)

    def scores(names: np.ndarray) -> dict[str, Any]:
        return group_scores(distances, pair_set.same, pair_set.folds, report.fold_thresholds, names)

    groups = None
    if pair_set.group is not None:
        rates = group_error_rates(distances, pair_set.same, pair_set.group, report.tar_at_far)
        groups = {"scores": scores(pair_set.group), "rates": rates}
    by_content: list[str] = []  # copies of one picture, under names of their own
    if len(embeddings) < len(rows):
        by_content = [f"of images with one content, {found}" for found in contradictions(*sides, pair_set.same, "one")]
    suspect += suspect_auc(pair_set.name, embedder.name, report.auc, strict)
    result = {
        "benchmark": pair_set.name,
        "domain": pair_set.tag,
        "data": "synthetic" if pair_set.synthetic else "unspecified",
        "protocol": {
            "embedding": STORED if isinstance(embedder, StoredEmbeddings) else EMBEDDING if flip else UNFLIPPED,
            "score": "d = ||a - b||^2 = 2 - 2 cos; same person iff d < threshold",
            "folds": pair_set.protocol,
            "thresholds": f"arange(0, 4, 0.01) on d ({len(THRESHOLDS)}); first best of the other folds",
            "std": "population, over folds",
            "tar_at_far": f"cosine threshold interpolated on impostor scores; at least {MIN_FALSE_ACCEPTS} errors",
        },
        "embedder": embedder.describe(),
        "images": len(embeddings),
        "embedding_size": embeddings.shape[1],
        **asdict(report),
        "domains": None if pair_set.domain is None else scores(pair_set.domain),
        "groups": groups,
        "warnings": suspect + pair_set.notes() + by_content,
        "seconds": seconds,
        "embedded": computed,
        "images_per_second": computed / seconds if computed else None,
    }
    return Evaluation(result, 1 - distances / 2)
