"""Decision thresholds and match probability, measured by an evaluation, in the config of the model they hold for."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from adaptface.data.pairs import PairSet
from adaptface.files import write_text_atomically
from adaptface.metrics import match_calibration
from configuration_adaptface import AdaptFaceConfig


def decision_thresholds(result: dict[str, Any], pair_set: PairSet, similarities: np.ndarray) -> dict[str, Any]:
    """What `AdaptFaceConfig.thresholds` holds: thresholds at the false accept rates that the pairs support.

    Args:
        result: of `evaluate_pairs`, of the model on `pair_set`.
        similarities (`np.ndarray` of shape `(N,)`): cosine of each pair.
    Returns:
        `benchmark`, `data`, counts of pairs, `embedding` and `score` of the protocol, `date`, `weights_sha256`,
        `operating_points` (see [`~metrics.tar_at_far`]) and `calibration` (see [`~metrics.match_calibration`]).
    Raises:
        ValueError: the pairs support no false accept rate, or the similarity does not tell matches.
    """
    if not result["tar_at_far"]:
        raise ValueError(
            f"{pair_set.name}: {result['impostor']} impostor pairs are too few for any threshold; calibrate on more"
        )
    return {
        **{key: result[key] for key in ("benchmark", "data", "pairs", "genuine", "impostor")},
        "embedding": result["protocol"]["embedding"],
        "score": "cosine similarity; same person iff above the threshold",
        "date": datetime.now(UTC).date().isoformat(),
        "weights_sha256": result["embedder"]["weights_sha256"],
        "operating_points": result["tar_at_far"],
        "calibration": match_calibration(similarities, pair_set.same, pair_set.folds),
    }


def write_thresholds(folder: Path, thresholds: dict[str, Any]) -> None:
    """Put thresholds into a model folder's config.json, in place of earlier ones; nothing else of it changes.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it is no AdaptFace config; see the class.
    """
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["thresholds"] = thresholds
    AdaptFaceConfig(**content)
    write_text_atomically(file, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
