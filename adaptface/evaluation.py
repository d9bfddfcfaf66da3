"""Pair lists -> verification results, for any embedder."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np

from adaptface.data.pairs import PairSet
from adaptface.embedders import Embedder
from adaptface.embedding import embed_images
from adaptface.metrics import (
    MIN_FALSE_ACCEPTS,
    THRESHOLDS,
    group_error_rates,
    group_scores,
    pair_distances,
    verification_report,
)

EMBEDDING = "features of image and mirror image added raw, then L2-normalised"


class SuspectLabelsError(ValueError):
    """A pair list's labels look wrong, so that a result on it would mean nothing."""


def evaluate_pairs(
    embedder: Embedder,
    pair_set: PairSet,
    batch_size: int = 64,
    num_workers: int = 0,
    flip: bool = True,
    strict: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the verification protocol on a pair list.

    Args:
        embedder, batch_size, flip, num_workers, progress: see [`embed_images`].
        pair_set: from `load_pairs`.
        strict: stop where labels look wrong: folds that are not half genuine, contradicting labels, an AUC below 0.5.
            False puts a line into `warnings` instead; for the untrained model of a training run.
    Returns:
        `dict`, JSON-ready: `benchmark`, `domain` (of the whole benchmark, None of an unknown one), `data` ("synthetic"
        or "unspecified"), `protocol`, `embedder`, `images` (distinct ones), `embedding_size`, the fields of
        [`~metrics.VerificationReport`], `domains` (per domain, where the list names them), `groups` (None, or `scores`
        of [`~metrics.group_scores`] and `rates` of [`~metrics.group_error_rates`], where the list names demographic
        groups), `warnings`, `seconds` and `images_per_second` (of embedding).
    Raises:
        SuspectLabelsError: see `strict`.
        ValueError: see `embed_images`.
    """
    suspect = pair_set.suspect_labels()
    if strict and suspect:
        raise SuspectLabelsError(f"{pair_set.name}: {'; '.join(suspect)}; check labels and order of the pairs")

    start = time.perf_counter()
    embeddings = embed_images(embedder, pair_set.images, batch_size, flip, num_workers, progress)  # (images, E)
    seconds = time.perf_counter() - start

    distances = pair_distances(embeddings[pair_set.index_a], embeddings[pair_set.index_b])  # (N,)
    report = verification_report(distances, pair_set.same, pair_set.folds, identities=pair_set.identity)

    def scores(names: np.ndarray) -> dict[str, Any]:
        return group_scores(distances, pair_set.same, pair_set.folds, report.fold_thresholds, names)

    groups = None
    if pair_set.group is not None:
        rates = group_error_rates(distances, pair_set.same, pair_set.group, report.tar_at_far)
        groups = {"scores": scores(pair_set.group), "rates": rates}
    if report.auc < 0.5:
        suspect.append(f"AUC {report.auc:.3f} is below 0.5: labels are wrong or out of order, or the model is")
        if strict:
            raise SuspectLabelsError(f"{pair_set.name}, {embedder.name}: {suspect[-1]}")
    return {
        "benchmark": pair_set.name,
        "domain": pair_set.tag,
        "data": "synthetic" if pair_set.synthetic else "unspecified",
        "protocol": {
            "embedding": EMBEDDING if flip else "features, L2-normalised",
            "score": "d = ||a - b||^2 = 2 - 2 cos; same person iff d < threshold",
            "folds": pair_set.protocol,
            "thresholds": f"arange(0, 4, 0.01) on d ({len(THRESHOLDS)}); first best of the other folds",
            "std": "population, over folds",
            "tar_at_far": f"cosine threshold interpolated on impostor scores; at least {MIN_FALSE_ACCEPTS} errors",
        },
        "embedder": embedder.describe(),
        "images": len(pair_set.images),
        "embedding_size": embeddings.shape[1],
        **asdict(report),
        "domains": None if pair_set.domain is None else scores(pair_set.domain),
        "groups": groups,
        "warnings": suspect + pair_set.notes(),
        "seconds": seconds,
        "images_per_second": len(pair_set.images) / seconds,
    }
