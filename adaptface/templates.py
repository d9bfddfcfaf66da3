"""Template sets (IJB-B, IJB-C) -> results of verification (1:1) and identification (1:N), for any embedder."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np

from adaptface.data.templates import Subjects, TemplateSet
from adaptface.embedders import Embedder
from adaptface.embedding import StoredEmbeddings, feature_blocks
from adaptface.evaluation import Evaluation, refuse_suspect, suspect_auc
from adaptface.metrics import (
    MIN_FALSE_ACCEPTS,
    IdentificationReport,
    identification_report,
    pair_similarities,
    roc_report,
    search,
)

PROTOCOL = {
    "folds": "none",
    "embedding": "features of image and mirror image added raw, times the detector's score; mean over the images of a "
    "medium, sum over the media of a template, L2-normalised",
    "score": "cosine of two templates",
    "tar_at_far": "the point of the ROC (intermediate points dropped) whose FAR is nearest; accepted at or above its "
    f"threshold; at least {MIN_FALSE_ACCEPTS} errors",
    "identification": "open set, every probe against each gallery; ties count against the mate. TPIR: mate at rank 1 "
    "and above the threshold; FPIR: best candidate of a non-mated search above it; the threshold is one of these; at "
    f"least {MIN_FALSE_ACCEPTS} errors; over the galleries: ranks of all mated searches together, plain mean of TPIRs",
}
STORED = PROTOCOL["embedding"].replace("of image and mirror image added raw", "as given")


def image_weights(template_set: TemplateSet) -> np.ndarray:
    """What each image's features count for in its template: the detector's score over the images of its medium there.

    A sum of media means is the sum over all images of their features so weighted.

    Returns:
        `np.ndarray` of shape `(I,)`, float64.
    """
    medium = np.stack([template_set.template, template_set.media])  # (2, I)
    _, group, sizes = np.unique(medium, axis=1, return_inverse=True, return_counts=True)
    return template_set.scores / sizes[group]


def template_features(
    embedder: Embedder | StoredEmbeddings, template_set: TemplateSet, **options: Any
) -> tuple[np.ndarray, int]:
    """Embed templates: the features of an image and of its mirror image are added raw and weighted by the detector's
    score, then averaged over each medium, summed over the media and L2-normalised.

    Nothing is held but a block of images and one row a template.

    Args:
        embedder: what turns images into features, or features that were made elsewhere, of any length: it weighs them.
        template_set: from `load_ijb`.
        options: batch size, workers, progress, processes, cache; see [`~embedding.feature_blocks`].
    Returns:
        `np.ndarray` of shape `(T, E)`, float64 as in the reference, rows of length 1, in the order of
        `template_set.templates`; and how many images were embedded now, not found in the cache.
    Raises:
        ValueError: see [`~embedding.feature_blocks`]; a template's features add up to zero, or all its scores are 0.
    Source: insightface, `recognition/arcface_torch/eval_ijbc.py`, `image2template_feature`, with its settings N1 (norms
        kept), D1 (detector's score) and F1 (flip added).
    """
    weights = image_weights(template_set)
    embedded = 0
    sums: np.ndarray | None = None
    images = template_set.images
    if isinstance(embedder, StoredEmbeddings):
        blocks = embedder.blocks(images)
    else:
        blocks = feature_blocks(embedder, images, **options)
    for start, features, computed in blocks:
        embedded += computed
        block = slice(start, start + len(features))
        if sums is None:
            sums = np.zeros((len(template_set.templates), features.shape[1]))
        np.add.at(sums, template_set.template[block], weights[block, None] * features)
    assert sums is not None
    norms = np.linalg.norm(sums, axis=1, keepdims=True)  # (T, 1)
    if zero := np.flatnonzero(norms == 0).tolist():
        raise ValueError(
            f"{template_set.name}, {embedder.name}: the features of {len(zero)} templates are zero, the first is "
            f"template {template_set.templates[zero[0]]}; are the detector's scores of its images 0?"
        )
    return np.divide(sums, norms, out=sums), embedded


def _identification(features: np.ndarray, probes: Subjects, gallery: Subjects) -> IdentificationReport:
    found = search(features[probes.index], probes.subjects, features[gallery.index], gallery.subjects)
    return identification_report(found, enrolled=len(gallery.index))


def _mean_over_galleries(reports: list[IdentificationReport]) -> dict[str, Any]:
    """Rates over the galleries as insightface's `run_model_test_1N` takes them: ranks over the mated searches of all,
    TPIRs as the plain mean, where all galleries have them."""
    searches = [report.mated for report in reports]
    by_rank = zip(*(report.rank_rates for report in reports), strict=True)
    fpirs = [{row["fpir"]: row["tpir"] for row in report.tpir_at_fpir} for report in reports]
    return {
        "rank_rates": [
            {"rank": rows[0]["rank"], "rate": float(np.average([row["rate"] for row in rows], weights=searches))}
            for rows in by_rank
        ],
        "tpir_at_fpir": [
            {"fpir": fpir, "tpir": float(np.mean([rates[fpir] for rates in fpirs]))}
            for fpir in fpirs[0]
            if all(fpir in rates for rates in fpirs)
        ],
    }


def evaluate_templates(
    embedder: Embedder | StoredEmbeddings, template_set: TemplateSet, strict: bool = True, **options: Any
) -> Evaluation:
    """Run IJB's verification protocol and, where the set has galleries, its identification protocol.

    Args:
        embedder, template_set, options: see [`template_features`].
        strict: stop where labels look wrong: contradicting labels, a template unlike itself, an AUC below 0.5. False
            puts a line into `warnings` instead.
    Returns:
        whose `result` is JSON-ready: `benchmark`, `data` ("synthetic" or "unspecified"), `protocol`, `embedder`,
        `images`, `templates`, `embedding_size`, the fields of [`~metrics.RocReport`], `identification` (None without
        galleries; `galleries`, by name the fields of [`~metrics.IdentificationReport`], and `mean`), and `warnings`,
        `seconds`, `embedded` and `images_per_second` as of pairs.
    Raises:
        SuspectLabelsError: see `strict`.
        ValueError: see [`template_features`]; no probe is of a subject of a gallery.
    """
    suspect = template_set.suspect_labels()
    if strict:
        refuse_suspect(template_set.name, suspect)

    start = time.perf_counter()
    features, embedded = template_features(embedder, template_set, **options)  # (T, E)
    seconds = time.perf_counter() - start

    similarities = pair_similarities(features, template_set.index_a, template_set.index_b)  # (P,)
    report = roc_report(similarities, template_set.same)
    suspect += suspect_auc(template_set.name, embedder.name, report.auc, strict)
    identification = None
    if template_set.probes is not None:
        galleries = {
            name: _identification(features, template_set.probes, gallery)
            for name, gallery in template_set.galleries.items()
        }
        identification = {
            "galleries": {name: asdict(result) for name, result in galleries.items()},
            "mean": _mean_over_galleries(list(galleries.values())),
        }
    result = {
        "benchmark": template_set.name,
        "data": "synthetic" if template_set.synthetic else "unspecified",
        "protocol": PROTOCOL | ({"embedding": STORED} if isinstance(embedder, StoredEmbeddings) else {}),
        "embedder": embedder.describe(),
        "images": len(template_set.images),
        "templates": len(template_set.templates),
        "embedding_size": features.shape[1],
        **asdict(report),
        "domain": None,
        "domains": None,
        "groups": None,
        "identification": identification,
        "warnings": suspect + template_set.notes(),
        "seconds": seconds,
        "embedded": embedded,
        "images_per_second": embedded / seconds if embedded else None,
    }
    return Evaluation(result, similarities)
