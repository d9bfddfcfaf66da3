"""Face verification as a metric of Hugging Face `evaluate`: similarities of pairs -> accuracy, AUC, EER, TAR@FAR.

    verification = evaluate.load("evaluate_module/adaptface_verification")
    verification.compute(predictions=cosines, references=labels)

`metrics.py` beside this file is a link to `adaptface/metrics.py`: `evaluate` copies what it points to, so that the
module needs numpy, scipy and scikit-learn, but not the package. Its loader wants relative imports, one name a line.
"""

from dataclasses import asdict

import datasets
import evaluate
import numpy as np

from .metrics import verification_report

_DESCRIPTION = """\
Scores of pairs of faces, same person or not: accuracy over folds, each at the threshold that is best on the others;
AUC, equal error rate, and true accept rates at the false accept rates that the impostor pairs can support; with
intervals of 95 %.
"""
_INPUTS = """\
Args:
    predictions: cosine similarity of each pair, -1 to 1.
    references: 1 for a genuine pair (same person), 0 for an impostor pair.
    folds (optional): fold number of each pair; default: ten contiguous blocks.
    identities (optional): names or numbers of the two people of each pair, for intervals that allow for shared people.
Returns:
    a dict, JSON-ready: the fields of VerificationReport; rates and accuracies are fractions.
"""
_CITATION = """\
@techreport{LFWTech, author = {Gary B. Huang and Manu Ramesh and Tamara Berg and Erik Learned-Miller},
title = {Labeled Faces in the Wild: A Database for Studying Face Recognition in Unconstrained Environments},
institution = {University of Massachusetts, Amherst}, year = {2007}, number = {07-49}}
"""


class AdaptFaceVerification(evaluate.Metric):
    """See the metric card, README.md."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, folds=None, identities=None):
        similarities, same = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        outside = np.flatnonzero(np.abs(similarities) > 1 + 1e-6)
        if len(outside):
            raise ValueError(
                f"prediction {outside[0]} is {similarities[outside[0]]:g}, no cosine similarity of -1 to 1; give "
                "similarities, not distances: of a squared distance d of normalised embeddings 1 - d / 2"
            )
        unknown = np.flatnonzero(~np.isin(same, (0, 1)))
        if len(unknown):
            raise ValueError(f"reference {unknown[0]} is {same[unknown[0]]}, not 1 (same person) or 0")
        folds, identities = (None if value is None else np.asarray(value) for value in (folds, identities))
        return asdict(verification_report(2 - 2 * similarities, same, folds, identities=identities))
