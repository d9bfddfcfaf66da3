"""Metrics of face verification (k-fold accuracy, AUC, EER, TAR at a false accept rate) and of identification.

A leaf: numpy, scipy and scikit-learn only. A pair is accepted as "same person" iff its squared distance d < t,
strictly; for L2-normalised embeddings d = ||a - b||^2 = 2 - 2 cos. Rates are fractions in [0, 1], never percent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit
from scipy.stats import norm, quantile_test
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import auc, log_loss, roc_auc_score, roc_curve

# insightface `eval/verification.py`: 400 thresholds on the squared distance.
THRESHOLDS = np.arange(0, 4, 0.01)
FALSE_ACCEPT_RATES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
FALSE_POSITIVE_IDENTIFICATION_RATES = (1e-1, 1e-2, 1e-3)
RANKS = (1, 5, 10)
# The fewest impostor pairs (or non-mated searches) that must lie above a threshold before its rate counts as measured.
MIN_FALSE_ACCEPTS = 3
NUM_FOLDS = 10
CONFIDENCE = 0.95
BOOTSTRAP_SAMPLES = 10_000
_BLOCK = 1024  # pairs or probes scored at a time
IDENTITY_SAMPLES = 1_000  # each weighs every pair anew, so that ten times as many would take seconds


@dataclass(frozen=True)
class VerificationReport:
    """What a list of scored pairs says about an embedder. Rates and accuracies are fractions.

    Intervals are two-sided with 95 % confidence. That of the accuracy is by a bootstrap over the folds. Where the
    identities are known, that of the AUC is by a bootstrap over them, and those of rates and thresholds are for as many
    independent pairs as the bootstrap says these are worth; else AUC by the folds, and the others for all pairs.

    Attributes:
        accuracy, accuracy_std: mean and population standard deviation over the folds.
        accuracy_interval, auc_interval: lower and upper end.
        resampled: what the bootstrap of the AUC draws: "identities", or "folds" where no identities are known.
        fold_accuracies, fold_thresholds: one a fold, in the order of the fold numbers; thresholds on d.
        auc: area under the ROC of the raw scores.
        eer, eer_threshold: equal error rate, and the cosine similarity where it is reached.
        tar_at_far: one dict for each FAR the set supports; see [`tar_at_far`].
        unsupported_fars: the FARs asked for that the impostor pairs cannot support.
    """

    pairs: int
    genuine: int
    impostor: int
    accuracy: float
    accuracy_std: float
    accuracy_interval: list[float]
    fold_accuracies: list[float]
    fold_thresholds: list[float]
    auc: float
    auc_interval: list[float] | None
    resampled: str
    eer: float
    eer_threshold: float
    tar_at_far: list[dict[str, Any]]
    unsupported_fars: list[float]


@dataclass(frozen=True)
class RocReport:
    """What many scored pairs without folds, as IJB has them, say about an embedder. Rates are fractions.

    Attributes:
        auc: area under the ROC of the raw scores.
        eer, eer_threshold: equal error rate, and the similarity where it is reached.
        tar_at_far: one dict for each FAR the set supports, as from [`tar_at_far`], but for the nearest FAR of the ROC
            (see [`roc_report`]) and accepted iff at or above `threshold`.
        unsupported_fars: the FARs asked for that the impostor pairs cannot support.
    """

    pairs: int
    genuine: int
    impostor: int
    auc: float
    eer: float
    eer_threshold: float
    tar_at_far: list[dict[str, Any]]
    unsupported_fars: list[float]


@dataclass(frozen=True)
class IdentificationReport:
    """What searches of a gallery say about an embedder (1:N, open set). Rates are fractions, intervals Wilson's, 95 %.

    A search is mated if the probe's subject is enrolled. The rank of its mate is one more than the candidates of other
    subjects that score at least as high: ties count against the mate.

    Attributes:
        searches, mated, nonmated, enrolled: searches in all and of each kind; templates of the gallery.
        rank_rates: for each rank `rank`, `rate` (share of the mated searches whose mate is among so many first
            candidates, without a threshold) and `rate_interval`.
        tpir_at_fpir: one dict for each FPIR the searches support; see [`tpir_at_fpir`].
        unsupported_fpirs: the FPIRs asked for that the non-mated searches cannot support.
    """

    searches: int
    mated: int
    nonmated: int
    enrolled: int
    rank_rates: list[dict[str, Any]]
    tpir_at_fpir: list[dict[str, Any]]
    unsupported_fpirs: list[float]


def pair_distances(embeddings: np.ndarray, index_a: np.ndarray, index_b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances of pairs of embeddings, in float64 as the reference computes them.

    Args:
        embeddings (`np.ndarray` of shape `(M, E)`): L2-normalised.
        index_a, index_b (`np.ndarray` of shape `(N,)`): rows of `embeddings`.
    Returns:
        `np.ndarray` of shape `(N,)`, float64, about 0 to 4.
    """

    def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.square(np.subtract(a, b, dtype=np.float64)).sum(axis=1)

    return _blockwise(squared, embeddings, index_a, index_b)


def pair_similarities(embeddings: np.ndarray, index_a: np.ndarray, index_b: np.ndarray) -> np.ndarray:
    """Cosine similarities of pairs of embeddings; see [`pair_distances`] for the arguments.

    Returns:
        `np.ndarray` of shape `(N,)`, float64.
    """
    return _blockwise(lambda a, b: np.einsum("ne,ne->n", a, b), embeddings, index_a, index_b)


def _blockwise(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray], embeddings: np.ndarray, *index: np.ndarray
) -> np.ndarray:
    """Scores of pairs, a block of them at a time: no list of pairs is gathered whole."""
    scores = np.empty(len(index[0]))
    for start in range(0, len(scores), _BLOCK):
        block = slice(start, start + _BLOCK)
        scores[block] = score(*(embeddings[side[block]] for side in index))
    return scores


def _labels(same: np.ndarray) -> np.ndarray:
    """Labels as booleans: `~` of a number would be another one."""
    same = np.asarray(same)
    if same.dtype != bool and not np.isin(same, (0, 1)).all():
        raise ValueError("labels must be 1 or True for a genuine pair, 0 or False for an impostor pair")
    return same.astype(bool)


def contiguous_folds(num_pairs: int, num_folds: int = NUM_FOLDS) -> np.ndarray:
    """Fold number of each pair: equal contiguous blocks, the first ones a pair longer if it does not divide evenly.

    The same blocks as scikit-learn's `KFold(num_folds, shuffle=False)`.

    Raises:
        ValueError: fewer pairs than folds.
    """
    if num_pairs < num_folds:
        raise ValueError(f"{num_pairs} pairs cannot be cut into {num_folds} folds; give at least one pair a fold")
    sizes = [len(block) for block in np.array_split(np.arange(num_pairs), num_folds)]
    return np.repeat(np.arange(num_folds), sizes)  # (N,)


def only_one_kind(same: np.ndarray) -> str | None:
    """What is wrong with a list whose pairs are all genuine or all impostor pairs."""
    genuine = int(np.count_nonzero(same))
    if 0 < genuine < len(same):
        return None
    return f"all {len(same)} pairs are {'genuine' if genuine else 'impostor'} pairs; verification needs both kinds"


def one_sided_folds(same: np.ndarray, folds: np.ndarray) -> list[str]:
    """Say which folds hold genuine or impostor pairs only: of such a fold no rate means anything."""
    sided = [fold for fold in np.unique(folds) if only_one_kind(np.asarray(same)[folds == fold])]
    return [f"folds of one kind of pairs only: {', '.join(map(str, sided[:10]))}"] if sided else []


def suspect_folds(same: np.ndarray, folds: np.ndarray) -> list[str]:
    """Say which folds are not half genuine: the sign of labels that are wrong or out of order.

    A fold with an odd number of pairs may be one pair off. Published `.bin` benchmarks have half-genuine folds.

    Returns:
        `list[str]`: one sentence, or none if every fold is balanced.
    """
    unbalanced = []
    for fold in np.unique(folds):
        labels = np.asarray(same)[folds == fold]
        genuine = int(np.count_nonzero(labels))
        if abs(2 * genuine - len(labels)) > len(labels) % 2:
            unbalanced.append(f"fold {fold} has {genuine} genuine of {len(labels)}")
    if not unbalanced:
        return []
    more = f" and {len(unbalanced) - 5} more" if len(unbalanced) > 5 else ""
    return [f"unbalanced folds: {'; '.join(unbalanced[:5])}{more}; half of each fold must be genuine pairs"]


def kfold_accuracy(
    distances: np.ndarray, same: np.ndarray, folds: np.ndarray, thresholds: np.ndarray = THRESHOLDS
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of each fold at the threshold that is best on all the other folds.

    Identical to counting correct pairs for each fold and threshold (`d < t`, first argmax), by one histogram a fold and
    its cumulative sum.

    Args:
        distances (`np.ndarray` of shape `(N,)`): squared distances.
        same (`np.ndarray` of shape `(N,)`): True for genuine pairs.
        folds (`np.ndarray` of shape `(N,)`): fold number of each pair, at least two different ones.
        thresholds (`np.ndarray` of shape `(T,)`): candidates, ascending.
    Returns:
        accuracies and thresholds, both of shape `(F,)`, in ascending order of the fold numbers.
    Raises:
        ValueError: fewer than two folds.
    Source: insightface, `recognition/arcface_torch/eval/verification.py`, `calculate_roc`.
    """
    same = _labels(same)
    numbers, fold = np.unique(folds, return_inverse=True)
    num_folds, num_thresholds = len(numbers), len(thresholds)
    if num_folds < 2:
        raise ValueError("k-fold accuracy needs at least two folds: the threshold is chosen on the others")
    first_accepting = np.searchsorted(thresholds, distances, side="right")  # (N,): accepted from this threshold on
    # A genuine pair turns correct where it is accepted first, an impostor pair turns wrong there.
    gains = np.zeros((num_folds, num_thresholds + 1), dtype=np.int64)
    np.add.at(gains, (fold, first_accepting), np.where(same, 1, -1))
    impostors = np.bincount(fold[~same], minlength=num_folds)  # (F,): all correct while nothing is accepted
    correct = impostors[:, None] + gains.cumsum(axis=1)[:, :num_thresholds]  # (F, T)
    best = (correct.sum(axis=0) - correct).argmax(axis=1)  # (F,): first maximum over the other folds
    accuracies = correct[np.arange(num_folds), best] / np.bincount(fold, minlength=num_folds)
    return accuracies, thresholds[best]


def equal_error_rate(similarities: np.ndarray, same: np.ndarray) -> tuple[float, float]:
    """Error rate where false accepts and false rejects are equally frequent, linear between the points of the ROC.

    Returns:
        the rate, and the similarity threshold where it is reached.
    """
    return _equal_error(_roc(similarities, _labels(same), drop_intermediate=False))


def _roc(similarities: np.ndarray, same: np.ndarray, drop_intermediate: bool) -> tuple[np.ndarray, ...]:
    """FARs, TARs and thresholds (accepted iff at or above), ascending but for the thresholds.

    The first threshold, where nothing is accepted, is just above the highest score; scikit-learn's is infinite.
    """
    far, tar, thresholds = roc_curve(same, similarities, drop_intermediate=drop_intermediate)
    thresholds[0] = np.nextafter(thresholds[1], np.inf)
    return far, tar, thresholds


def _equal_error(curve: tuple[np.ndarray, ...]) -> tuple[float, float]:
    """Where the points of a ROC, joined by lines, have as many false accepts as false rejects."""
    far, tar, thresholds = curve
    gap = far - (1 - tar)  # ascends from -1 to 1
    after = int(np.argmax(gap >= 0))
    share = -gap[after - 1] / (gap[after] - gap[after - 1])
    rate = far[after - 1] + share * (far[after] - far[after - 1])
    threshold = thresholds[after - 1] + share * (thresholds[after] - thresholds[after - 1])
    return float(rate), float(threshold)


def supports_far(far: float, num_impostors: int) -> bool:
    """Whether a set can measure a FAR: at least `MIN_FALSE_ACCEPTS` impostor pairs are expected to pass.

    3,000 impostor pairs support 1e-3 (three errors) and no lower rate.
    """
    return math.floor(far * num_impostors + 1e-9) >= MIN_FALSE_ACCEPTS


def wilson_interval(successes: float, trials: float, confidence: float = CONFIDENCE) -> list[float]:
    """Interval of a rate of independent trials, also sound near 0 and 1.

    Trials may be a fraction, as an effective number is; scipy's `binomtest` takes whole numbers only.

    Source: Wilson, JASA 22, 1927.
    """
    rate, z2 = successes / trials, norm.ppf((1 + confidence) / 2) ** 2
    centre = rate + z2 / (2 * trials)
    reach = math.sqrt(z2 * (rate * (1 - rate) + z2 / (4 * trials)) / trials)
    low, high = (float(end / (1 + z2 / trials)) for end in (centre - reach, centre + reach))
    return [low if rate > 0 else 0.0, high if rate < 1 else 1.0]  # these ends are exact, but for rounding


def _resampled_folds(num_folds: int) -> np.ndarray:
    """How often each fold is drawn in each sample of the bootstrap, `(BOOTSTRAP_SAMPLES, F)`; always the same."""
    return np.random.default_rng(0).multinomial(num_folds, np.full(num_folds, 1 / num_folds), BOOTSTRAP_SAMPLES)


def _percentiles(values: np.ndarray, confidence: float = CONFIDENCE) -> list[float]:
    """The ends of the middle `confidence` of the bootstrap's values."""
    return np.nanquantile(values, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()


def accuracy_interval(fold_accuracies: np.ndarray) -> list[float]:
    """Bootstrap interval of the mean accuracy: folds are drawn with replacement, their thresholds stay as they are.

    Ten folds are few: the interval is a little too narrow.
    """
    draws = _resampled_folds(len(fold_accuracies))  # (S, F)
    return _percentiles(draws @ fold_accuracies / len(fold_accuracies))


def auc_interval(similarities: np.ndarray, same: np.ndarray, folds: np.ndarray) -> list[float] | None:
    """Bootstrap interval of the AUC: whole folds are drawn with replacement, and their pairs pooled.

    The AUC of a sample is a ratio of two quadratic forms of how often each fold was drawn, so that no sample is
    ranked anew: the genuine pairs of fold f win `wins[f, g]` of their comparisons with the impostor pairs of fold g.

    Returns:
        lower and upper end; None where a fold holds one kind of pairs only, so that a sample might, too.
    """
    same = _labels(same)
    numbers, fold = np.unique(folds, return_inverse=True)
    genuine = [np.sort(similarities[same & (fold == f)]) for f in range(len(numbers))]
    impostor = [np.sort(similarities[~same & (fold == f)]) for f in range(len(numbers))]
    positives, negatives = np.array([len(x) for x in genuine]), np.array([len(x) for x in impostor])
    if not (positives.all() and negatives.all()):
        return None
    wins = np.empty((len(numbers), len(numbers)))  # ties count half
    for f, mine in enumerate(genuine):
        for g, theirs in enumerate(impostor):
            below, up_to = (np.searchsorted(theirs, mine, side=side).sum() for side in ("left", "right"))
            wins[f, g] = (below + up_to) / 2
    draws = _resampled_folds(len(numbers))  # (S, F)
    won = np.einsum("sf,fg,sg->s", draws, wins, draws)
    return _percentiles(won / ((draws @ positives) * (draws @ negatives)))


def _require_support(name: str, rate: float, trials: str, count: int) -> None:
    if not supports_far(rate, count):
        raise ValueError(
            f"{name} cannot be measured on {trials}: it takes {math.ceil(MIN_FALSE_ACCEPTS / rate - 1e-6)} for "
            f"{MIN_FALSE_ACCEPTS} expected errors"
        )


def _threshold(impostors: np.ndarray, rate: float) -> float:
    """Threshold that floor(rate * n) of n scores exceed, or fewer where equal scores lie on it."""
    return float(np.quantile(impostors, _level(rate, len(impostors))))


def _level(rate: float, count: int) -> float:
    """Which quantile of `count` impostor scores the threshold is."""
    return 1 - math.floor(rate * count + 1e-9) / count


def _identity_draws(num_identities: int) -> Iterator[np.ndarray]:
    """How often each identity is drawn in each sample of the bootstrap, `(people,)`; always the same."""
    rng = np.random.default_rng(0)
    for _ in range(IDENTITY_SAMPLES):
        yield np.bincount(rng.integers(0, num_identities, num_identities), minlength=num_identities)


def identity_bootstrap(
    similarities: np.ndarray, same: np.ndarray, identities: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUC, and true and false accept rates at given thresholds, in each sample of a bootstrap over identities.

    Identities are drawn with replacement. A pair of one person counts as often as the person was drawn, a pair of two
    people the product of both. The scores are sorted once; a sample only weighs them.

    Args:
        similarities, same: `(N,)`.
        identities (`np.ndarray` of shape `(N, 2)`): names or numbers of the people on each pair's images.
        thresholds (`np.ndarray` of shape `(T,)`): on the similarity; accepted iff strictly above.
    Returns:
        AUC of shape `(S,)`, true and false accept rates of shape `(S, T)`; NaN where a sample lacks a kind of pairs.
    Source: the vertex bootstrap of Fogliato, Patil and Perona, Confidence Intervals for Error Rates in 1:1 Matching
        Tasks, arXiv:2306.01198. The subset bootstrap of Bolle, Ratha and Pankanti (Evaluating Authentication Systems
        Using Bootstrap Confidence Intervals, 1999) draws one person of an impostor pair, and neglects the other.
    """
    same = _labels(same)
    names, codes = np.unique(identities, return_inverse=True)
    order = np.argsort(similarities, kind="stable")
    scores, people, parts = similarities[order], codes.reshape(-1, 2)[order], (same[order], ~same[order])
    genuine, impostor = (scores[part] for part in parts)
    ranks = [np.searchsorted(impostor, genuine, side=side) for side in ("left", "right")]
    cuts = [np.searchsorted(part, thresholds, side="right") for part in (genuine, impostor)]  # the first accepted
    sides = [people[part].T for part in parts]
    alone = [first == second for first, second in sides]
    aucs: list[float] = []
    rates: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    with np.errstate(invalid="ignore"):  # 0 / 0
        for drawn in _identity_draws(len(names)):
            weights = [
                drawn[first] * np.where(one, 1, drawn[second])
                for (first, second), one in zip(sides, alone, strict=True)
            ]
            below = [np.concatenate([[0], np.cumsum(part)]) for part in weights]  # weight of the lowest pairs
            won = weights[0] @ (below[1][ranks[0]] + below[1][ranks[1]]) / 2  # ties count half
            aucs.append(won / (below[0][-1] * below[1][-1]))
            for kind, total, cut in zip(rates, below, cuts, strict=True):
                kind.append(1 - total[cut] / total[-1])
    return np.array(aucs), np.array(rates[0]), np.array(rates[1])


def dependent_interval(rate: float, trials: int, samples: np.ndarray) -> list[float]:
    """Wilson's interval for as many independent trials as vary as much as these samples, but no more than there are.

    Percentiles of the samples would say that a rate of 0 or 1 is certain.

    Args:
        rate: measured on `trials` trials that are not independent.
        samples (`np.ndarray` of shape `(S,)`): the rate in each sample of a bootstrap.
    Source: Fogliato et al. (see [`identity_bootstrap`]), who recommend Wilson's interval with such a variance.
    """
    variance = float(np.nanvar(samples))
    worth = min(trials, rate * (1 - rate) / variance) if variance > 0 and 0 < rate < 1 else trials
    return wilson_interval(rate * worth, worth)


def _threshold_interval(impostors: np.ndarray, far: float, samples: np.ndarray) -> list[float | None]:
    """Where the impostors' scores have the FARs that [`dependent_interval`] takes for possible; null as it is there."""
    low, high = dependent_interval(far, len(impostors), samples)
    return [float(np.quantile(impostors, 1 - rate)) if rate * len(impostors) >= 1 else None for rate in (high, low)]


def tar_at_far(similarities: np.ndarray, same: np.ndarray, far: float) -> dict[str, Any]:
    """True accept rate at a false accept rate.

    With n impostor pairs the threshold lets k = floor(far * n) of them pass: it is interpolated between the impostor
    scores k and k + 1 from the top, so that the measured FAR never exceeds the one asked for.

    Returns:
        `far` asked, `tar`, `threshold` (a cosine similarity; accepted iff strictly above), `measured_far` (never above
        `far`), and their intervals: `tar_interval` and `far_interval` of the two measured rates at this threshold
        (Wilson), `threshold_interval` of the impostors' quantile that it is (binomial, without a model of the scores;
        an end that the set cannot bound is null).
    Raises:
        ValueError: the impostor pairs are too few for this FAR.
    """
    same = _labels(same)
    impostors = similarities[~same]
    _require_support(f"FAR {far:g}", far, f"{len(impostors)} impostor pairs", len(impostors))
    threshold = _threshold(impostors, far)
    accepted, passed = similarities[same] > threshold, impostors > threshold
    quantile = quantile_test(impostors, p=_level(far, len(impostors))).confidence_interval(CONFIDENCE)
    return {
        "far": far,
        "tar": float(accepted.mean()),
        "tar_interval": wilson_interval(int(accepted.sum()), len(accepted)),
        "threshold": threshold,
        "threshold_interval": [float(end) if math.isfinite(end) else None for end in quantile],
        "measured_far": float(passed.mean()),
        "far_interval": wilson_interval(int(passed.sum()), len(passed)),
    }


def match_calibration(similarities: np.ndarray, same: np.ndarray, folds: np.ndarray) -> dict[str, Any]:
    """From a cosine similarity s to the probability of a match, `1 / (1 + exp(-(slope * s + intercept)))`.

    Logistic regression of the labels on s, both kinds of pairs weighing the same: the probability holds for a prior of
    one half, and `log(prior / (1 - prior))` added to the intercept makes it hold for another one. The labels are
    softened as Platt does, so that scores without overlap give a finite slope.

    Args:
        similarities, same, folds: `np.ndarray` of shape `(N,)`; both kinds of pairs in every fold but one, at least.
    Returns:
        `slope`, `intercept`, `prior` and `log_loss`, in nats, of each fold under the fit to the others (0.693 is that
        of saying one half each time).
    Raises:
        ValueError: more similar pairs match less often, or not more.
    Source: Platt, Probabilistic outputs for support vector machines, 1999, section 2.2.
    """
    same = _labels(same)
    slope, intercept = _logistic_fit(similarities, same)
    if slope <= 0:
        raise ValueError(f"similarity does not tell matches (slope {slope:.3g}): no probability can be read off it")
    losses = []
    for fold in np.unique(folds):
        rest, mine = folds != fold, folds == fold
        a, b = _logistic_fit(similarities[rest], same[rest])
        losses.append(log_loss(same[mine], expit(a * similarities[mine] + b), labels=[False, True]) * mine.sum())
    return {"slope": slope, "intercept": intercept, "prior": 0.5, "log_loss": float(np.sum(losses) / len(same))}


def _logistic_fit(similarities: np.ndarray, same: np.ndarray) -> tuple[float, float]:
    """Slope and intercept; each pair counts for both labels, by Platt's soft label, and each kind of pairs as one."""
    genuine = np.count_nonzero(same)
    kinds = np.where(same, genuine, len(same) - genuine)  # (N,): pairs of the same kind
    wrong = 1 / (kinds + 2)  # Platt's target of an impostor pair, and what a genuine pair's lacks to 1
    labels = np.concatenate([same, ~same])
    weights = np.concatenate([1 - wrong, wrong]) / np.tile(kinds, 2) * len(same) / 2
    fit = LogisticRegression(C=np.inf, tol=1e-8).fit(np.tile(similarities, 2)[:, None], labels, sample_weight=weights)
    return float(fit.coef_[0, 0]), float(fit.intercept_[0])


def verification_report(
    distances: np.ndarray,
    same: np.ndarray,
    folds: np.ndarray | None = None,
    fars: tuple[float, ...] = FALSE_ACCEPT_RATES,
    identities: np.ndarray | None = None,
) -> VerificationReport:
    """Score a pair list.

    Args:
        distances (`np.ndarray` of shape `(N,)`): squared distances of L2-normalised embeddings (`pair_distances`).
        same (`np.ndarray` of shape `(N,)`): True or 1 for genuine pairs.
        folds (`np.ndarray` of shape `(N,)`, *optional*): fold number of each pair; ten contiguous blocks by default.
        fars: false accept rates to report; those the set cannot support are listed, not reported.
        identities (`np.ndarray` of shape `(N, 2)`, *optional*): names or numbers of the people on each pair's images.
    Raises:
        ValueError: shapes differ, a distance is not finite, or the pairs are of one class only.
    """
    distances, same = np.asarray(distances, dtype=np.float64), _labels(same)
    folds = contiguous_folds(len(same)) if folds is None else np.asarray(folds)
    if not distances.shape == same.shape == folds.shape or distances.ndim != 1:
        raise ValueError(
            f"distances {distances.shape}, same {same.shape} and folds {folds.shape} must all have the shape (N,)"
        )
    if identities is not None and identities.shape != (len(same), 2):
        raise ValueError(f"identities {identities.shape} must have the shape (N, 2), here ({len(same)}, 2)")
    broken = np.flatnonzero(~np.isfinite(distances))
    if len(broken):
        raise ValueError(f"{len(broken)} distances are NaN or infinite, the first is that of pair {broken[0]}")
    if problem := only_one_kind(same):
        raise ValueError(problem)

    genuine = int(same.sum())
    accuracies, thresholds = kfold_accuracy(distances, same, folds)
    similarities = 1 - distances / 2  # the cosine
    eer, eer_threshold = equal_error_rate(similarities, same)
    impostor = len(same) - genuine
    rates = [tar_at_far(similarities, same, far) for far in fars if supports_far(far, impostor)]
    if identities is None:
        auc_ends = auc_interval(similarities, same, folds)
    else:
        cosines = np.array([rate["threshold"] for rate in rates])
        aucs, tars, measured_fars = identity_bootstrap(similarities, same, identities, cosines)
        auc_ends = _percentiles(aucs)
        for rate, tar, measured_far in zip(rates, tars.T, measured_fars.T, strict=True):
            rate["tar_interval"] = dependent_interval(rate["tar"], genuine, tar)
            rate["far_interval"] = dependent_interval(rate["measured_far"], impostor, measured_far)
            rate["threshold_interval"] = _threshold_interval(similarities[~same], rate["far"], measured_far)
    return VerificationReport(
        pairs=len(same),
        genuine=genuine,
        impostor=impostor,
        accuracy=float(accuracies.mean()),
        accuracy_std=float(accuracies.std()),
        accuracy_interval=accuracy_interval(accuracies),
        fold_accuracies=accuracies.tolist(),
        fold_thresholds=thresholds.tolist(),
        auc=float(roc_auc_score(same, -distances)),
        auc_interval=auc_ends,
        resampled="folds" if identities is None else "identities",
        eer=eer,
        eer_threshold=eer_threshold,
        tar_at_far=rates,
        unsupported_fars=[far for far in fars if not supports_far(far, impostor)],
    )


def group_scores(
    distances: np.ndarray, same: np.ndarray, folds: np.ndarray, fold_thresholds: list[float], groups: np.ndarray
) -> dict[str, dict[str, float | int | None]]:
    """Results of each group of pairs, such as a domain, at the thresholds that the whole list chose for their folds.

    Args:
        distances, same, folds: as for [`verification_report`].
        fold_thresholds: `VerificationReport.fold_thresholds` of the whole list.
        groups (`np.ndarray` of shape `(N,)`): group name of each pair, empty where it belongs to none.
    Returns:
        for each name `pairs`, `genuine`, `accuracy` and `auc` (None where the group has one class only), and
        `own_accuracy` and `own_accuracy_std`, over the group's own folds at thresholds chosen within the group, as RFW
        is reported (None where it is in fewer than two folds).
    """
    same = _labels(same)
    fold = np.unique(folds, return_inverse=True)[1]
    correct = (distances < np.asarray(fold_thresholds)[fold]) == same  # (N,)
    scores: dict[str, dict[str, float | int | None]] = {}
    for name in _group_names(groups):
        members = groups == name
        genuine, pairs = int(same[members].sum()), int(members.sum())
        scores[name] = {
            "pairs": pairs,
            "genuine": genuine,
            "accuracy": float(correct[members].mean()),
            "auc": float(roc_auc_score(same[members], -distances[members])) if 0 < genuine < pairs else None,
            "own_accuracy": None,
            "own_accuracy_std": None,
        }
        if len(np.unique(folds[members])) > 1:
            own, _ = kfold_accuracy(distances[members], same[members], folds[members])
            scores[name] |= {"own_accuracy": float(own.mean()), "own_accuracy_std": float(own.std())}
    return scores


def _tar_at_nearest_far(curve: tuple[np.ndarray, ...], genuine: int, impostor: int, far: float) -> dict[str, Any]:
    """That point of a ROC whose FAR is nearest to the one asked for; of equally near ones the one of the highest TAR.

    Source: insightface, `recognition/arcface_torch/eval_ijbc.py` (step 5) and
        `recognition/_evaluation_/ijb/ijb_evals.py`, `plot_roc_and_calculate_tpr`.
    """
    fars, tars, thresholds = curve
    at = len(fars) - 1 - int(np.argmin(np.abs(fars[::-1] - far)))  # the last of the nearest
    return {
        "far": far,
        "tar": float(tars[at]),
        "tar_interval": wilson_interval(round(tars[at] * genuine), genuine),
        "threshold": float(thresholds[at]),
        "measured_far": float(fars[at]),
        "far_interval": wilson_interval(round(fars[at] * impostor), impostor),
    }


def roc_report(similarities: np.ndarray, same: np.ndarray, fars: tuple[float, ...] = FALSE_ACCEPT_RATES) -> RocReport:
    """Score a long list of pairs without folds, all from one ROC, at about 55 bytes a pair beside the scores.

    Here TAR@FAR is, as IJB's results are, the TAR of that point of the ROC whose FAR is nearest to the one asked for,
    which it may exceed a little. Points in a straight run of the ROC do not count (scikit-learn's default).

    Args:
        similarities (`np.ndarray` of shape `(N,)`): any finite scores, higher for the same person.
        same (`np.ndarray` of shape `(N,)`, bool): True for genuine pairs.
        fars: false accept rates to report; those the set cannot support are listed, not reported.
    Raises:
        ValueError: the pairs are of one class only, or (scikit-learn's words) a score is not finite.
    """
    same = _labels(same)
    if problem := only_one_kind(same):
        raise ValueError(problem)
    genuine = int(same.sum())
    impostor = len(same) - genuine
    curve = _roc(similarities, same, drop_intermediate=True)
    eer, eer_threshold = _equal_error(curve)
    supported = [far for far in fars if supports_far(far, impostor)]
    return RocReport(
        pairs=len(same),
        genuine=genuine,
        impostor=impostor,
        auc=float(auc(curve[0], curve[1])),
        eer=eer,
        eer_threshold=eer_threshold,
        tar_at_far=[_tar_at_nearest_far(curve, genuine, impostor, far) for far in supported],
        unsupported_fars=[far for far in fars if far not in supported],
    )


@dataclass(frozen=True)
class Searches:
    """Outcome of searching a gallery with probes.

    Attributes:
        mate (`np.ndarray` of shape `(M,)`): score of the mate in each mated search.
        rank (`np.ndarray` of shape `(M,)`): its rank, from 1; candidates of equal score rank before it.
        best (`np.ndarray` of shape `(U,)`): highest score in each non-mated search.
    """

    mate: np.ndarray
    rank: np.ndarray
    best: np.ndarray


def search(
    probes: np.ndarray, probe_subjects: np.ndarray, gallery: np.ndarray, gallery_subjects: np.ndarray
) -> Searches:
    """Search a gallery with every probe; a block of probes at a time, so that no (P, G) matrix is held.

    Args:
        probes (`np.ndarray` of shape `(P, E)`), gallery (`np.ndarray` of shape `(G, E)`): L2-normalised embeddings.
        probe_subjects (`np.ndarray` of shape `(P,)`), gallery_subjects (`np.ndarray` of shape `(G,)`): whose they are.
    Raises:
        ValueError: the gallery is empty, or a subject is enrolled twice.
    """
    order = np.argsort(gallery_subjects)
    enrolled = gallery_subjects[order]
    if not len(enrolled) or (enrolled[1:] == enrolled[:-1]).any():
        raise ValueError("a gallery must enrol at least one subject, and each with one template")
    place = np.searchsorted(enrolled, probe_subjects).clip(max=len(enrolled) - 1)
    mated = enrolled[place] == probe_subjects  # (P,)
    column = order[place]  # (P,): of the mate, where there is one
    mate, rank, best = [], [], []
    for start in range(0, len(probes), _BLOCK):
        block = slice(start, start + _BLOCK)
        scores, with_mate = probes[block] @ gallery.T, mated[block]  # (B, G)
        mates = np.take_along_axis(scores, column[block, None], axis=1)[with_mate]  # (M, 1)
        mate.append(mates[:, 0])
        rank.append((scores[with_mate] >= mates).sum(axis=1))  # the mate itself is counted, too
        best.append(scores[~with_mate].max(axis=1))
    return Searches(np.concatenate(mate), np.concatenate(rank), np.concatenate(best))


def tpir_at_fpir(searches: Searches, fpir: float) -> dict[str, Any]:
    """True positive identification rate at a false positive identification rate.

    FPIR is the share of the non-mated searches whose best candidate scores above the threshold, TPIR the share of the
    mated searches whose mate does *and* is at rank 1. With n non-mated searches the threshold is the best score that is
    floor(n * fpir)-th from the top.

    Returns:
        `fpir` asked, `tpir`, `threshold` (strictly above), `measured_fpir` (never above `fpir`), and `tpir_interval`
        and `fpir_interval`, the intervals of the two measured rates at this threshold.
    Raises:
        ValueError: the non-mated searches are too few for this FPIR.
    Source: insightface, `recognition/_evaluation_/ijb/ijb_evals.py`, `evaluation_1N`; the rates are those of ISO/IEC
        19795-1 as NIST's FRVT 1:N reports use them (NISTIR 8271, "FPIR", "FNIR" with rank 1).
    """
    _require_support(f"FPIR {fpir:g}", fpir, f"{len(searches.best)} non-mated searches", len(searches.best))
    threshold = float(np.sort(searches.best)[-max(int(len(searches.best) * fpir), 1)])
    found, raised = (searches.rank == 1) & (searches.mate > threshold), searches.best > threshold
    return {
        "fpir": fpir,
        "tpir": float(found.mean()),
        "tpir_interval": wilson_interval(int(found.sum()), len(found)),
        "threshold": threshold,
        "measured_fpir": float(raised.mean()),
        "fpir_interval": wilson_interval(int(raised.sum()), len(raised)),
    }


def identification_report(
    searches: Searches,
    enrolled: int,
    fpirs: tuple[float, ...] = FALSE_POSITIVE_IDENTIFICATION_RATES,
    ranks: tuple[int, ...] = RANKS,
) -> IdentificationReport:
    """Rates of searches.

    Args:
        searches: from [`search`].
        enrolled: templates of the gallery.
        fpirs: rates to report; those the non-mated searches cannot support are listed, not reported.
        ranks: ranks to report.
    Raises:
        ValueError: no search is mated.
    """
    mated, nonmated = len(searches.mate), len(searches.best)
    if not mated:
        raise ValueError(f"none of {nonmated} probes is of a subject of the gallery; identification needs some")
    hits = {rank: int((searches.rank <= rank).sum()) for rank in ranks}
    return IdentificationReport(
        searches=mated + nonmated,
        mated=mated,
        nonmated=nonmated,
        enrolled=enrolled,
        rank_rates=[
            {"rank": rank, "rate": count / mated, "rate_interval": wilson_interval(count, mated)}
            for rank, count in hits.items()
        ],
        tpir_at_fpir=[tpir_at_fpir(searches, fpir) for fpir in fpirs if supports_far(fpir, nonmated)],
        unsupported_fpirs=[fpir for fpir in fpirs if not supports_far(fpir, nonmated)],
    )


def _group_names(groups: np.ndarray) -> list[str]:
    return [str(name) for name in np.unique(groups) if name]


def group_error_rates(
    distances: np.ndarray, same: np.ndarray, groups: np.ndarray, rates: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """False match and false non-match rates of each group of pairs at the thresholds of the whole list, and their gaps.

    One threshold for all is what a deployment has; at thresholds of their own groups would look more alike.

    Args:
        distances, same: as for [`verification_report`].
        groups (`np.ndarray` of shape `(N,)`): group name of each pair, empty where it belongs to none.
        rates: `VerificationReport.tar_at_far` of the whole list.
    Returns:
        for each rate `far` and `threshold` (a cosine similarity; accepted iff strictly above), `groups`, and
        `fmr_difference`, `fmr_ratio`, `fnmr_difference` and `fnmr_ratio`: the largest rate minus, and divided by, the
        smallest; None with fewer than two rates, and of the ratio where the smallest is 0. `groups` gives for each name
        the counts `genuine`, `impostor`, `false_non_matches` and `false_matches`, the rates `fnmr` and `fmr` with
        Wilson's `fnmr_interval` and `fmr_interval`, and `note`. A rate is None, and the note says why, where the group
        has no genuine pairs, or too few impostor pairs for `far` (see [`supports_far`]).
    Source: Grother, Ngan and Hanaoka, Face Recognition Vendor Test Part 3: Demographic Effects, NISTIR 8280, 2019.
    """
    similarities, same = 1 - distances / 2, _labels(same)  # the cosine
    return [_group_errors(similarities > rate["threshold"], same, groups, rate) for rate in rates]


def _group_errors(accepted: np.ndarray, same: np.ndarray, groups: np.ndarray, rate: dict[str, Any]) -> dict[str, Any]:
    far = rate["far"]
    found: dict[str, dict[str, Any]] = {}
    for name in _group_names(groups):
        mine, theirs = accepted[(groups == name) & same], accepted[(groups == name) & ~same]
        false_non_matches, false_matches = int((~mine).sum()), int(theirs.sum())
        notes = [] if len(mine) else ["no genuine pairs"]
        if not (measurable := supports_far(far, len(theirs))):
            notes.append(f"{len(theirs)} impostor pairs are too few for a rate of {far:g}")
        found[name] = {
            "genuine": len(mine),
            "impostor": len(theirs),
            "false_non_matches": false_non_matches,
            "false_matches": false_matches,
            "fnmr": false_non_matches / len(mine) if len(mine) else None,
            "fnmr_interval": wilson_interval(false_non_matches, len(mine)) if len(mine) else None,
            "fmr": false_matches / len(theirs) if measurable else None,
            "fmr_interval": wilson_interval(false_matches, len(theirs)) if measurable else None,
            "note": "; ".join(notes) or None,
        }
    gaps: dict[str, float | None] = {}
    for kind in ("fmr", "fnmr"):
        values = [group[kind] for group in found.values() if group[kind] is not None]
        comparable = len(values) > 1
        gaps[f"{kind}_difference"] = max(values) - min(values) if comparable else None
        gaps[f"{kind}_ratio"] = max(values) / min(values) if comparable and min(values) > 0 else None
    return {"far": far, "threshold": rate["threshold"], "groups": found, **gaps}
