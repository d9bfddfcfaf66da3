"""Verification metrics against naive loops, scikit-learn and hand counts."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.stats import binomtest, mannwhitneyu, norm
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import KFold

from adaptface import metrics
from adaptface.metrics import (
    accuracy_interval,
    auc_interval,
    contiguous_folds,
    dependent_interval,
    equal_error_rate,
    group_error_rates,
    group_scores,
    identification_report,
    identity_bootstrap,
    kfold_accuracy,
    match_calibration,
    pair_distances,
    pair_similarities,
    roc_report,
    search,
    supports_far,
    suspect_folds,
    tar_at_far,
    tpir_at_fpir,
    verification_report,
    wilson_interval,
)


def naive_kfold(distances: np.ndarray, same: np.ndarray, num_folds: int = 10) -> tuple[list[float], list[float]]:
    """The reference procedure, written out: folds x thresholds, strict `<`, first argmax."""
    thresholds = np.arange(0, 4, 0.01)
    accuracies, chosen = [], []
    for train, test in KFold(n_splits=num_folds, shuffle=False).split(distances):
        train_accuracy = [np.mean((distances[train] < t) == same[train]) for t in thresholds]
        best = int(np.argmax(train_accuracy))
        chosen.append(thresholds[best])
        accuracies.append(np.mean((distances[test] < thresholds[best]) == same[test]))
    return accuracies, chosen


def scores(seed: int, num_pairs: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    same = rng.random(num_pairs) < 0.5
    distances = np.clip(rng.normal(1.9 - 0.4 * same, 0.5), 0, 4)
    if kind == "ties":  # on the thresholds themselves, as arange makes them
        distances = np.arange(0, 4, 0.01)[(distances * 20).astype(int) * 5 % 400]
    if kind == "beyond":  # rounding can push 2 - 2 cos over 4; then nothing accepts it
        distances[::7] = 4 + 1e-9
    return distances, same


@pytest.mark.parametrize("kind", ["continuous", "ties", "beyond"])
@pytest.mark.parametrize("num_pairs", [200, 203])
def test_kfold_accuracy_is_the_naive_procedure(kind: str, num_pairs: int) -> None:
    for seed in range(3):
        distances, same = scores(seed, num_pairs, kind)
        accuracies, thresholds = kfold_accuracy(distances, same, contiguous_folds(num_pairs))
        expected_accuracies, expected_thresholds = naive_kfold(distances, same)
        assert accuracies.tolist() == expected_accuracies
        assert thresholds.tolist() == expected_thresholds


def test_first_of_equally_good_thresholds_and_strict_comparison() -> None:
    # Every threshold in (0.5, 1.5] separates the pairs; d < t is strict, so 0.5 itself does not accept 0.5.
    distances, same = np.tile([0.5, 1.5], 20), np.tile([True, False], 20)
    accuracies, thresholds = kfold_accuracy(distances, same, contiguous_folds(40))
    assert accuracies.tolist() == [1.0] * 10
    assert thresholds.tolist() == [np.arange(0, 4, 0.01)[51]] * 10


def test_fold_column_may_be_interleaved_and_numbered_freely() -> None:
    distances, same = scores(0, 200, "continuous")
    order = np.argsort(np.tile(np.arange(10), 20), kind="stable")
    blocks = kfold_accuracy(distances[order], same[order], contiguous_folds(200))
    column = kfold_accuracy(distances, same, np.tile(np.arange(10) * 3 + 5, 20))
    assert np.array_equal(blocks, column)


def test_report_gives_population_standard_deviation_and_scikit_learn_auc() -> None:
    distances, same = scores(1, 400, "continuous")
    report = verification_report(distances, same)
    expected, _ = naive_kfold(distances, same)
    assert report.accuracy == pytest.approx(sum(expected) / 10)
    assert report.accuracy_std == pytest.approx((sum((a - report.accuracy) ** 2 for a in expected) / 10) ** 0.5)
    genuine, impostor = distances[same], distances[~same]
    wins = (genuine[:, None] < impostor) + 0.5 * (genuine[:, None] == impostor)  # Mann-Whitney
    assert report.auc == pytest.approx(wins.mean())
    assert report.genuine + report.impostor == report.pairs == 400


def test_pair_distances_are_two_minus_two_cosines_in_float64() -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(50, 16))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    index_a, index_b = rng.integers(0, 50, (2, 3000))  # more than a block
    distances = pair_distances(embeddings.astype(np.float32), index_a, index_b)
    assert distances.dtype == np.float64
    assert np.allclose(distances, 2 - 2 * (embeddings[index_a] * embeddings[index_b]).sum(1), atol=1e-6)
    narrow = embeddings.astype(np.float32)[[index_a, index_b]].astype(np.float64)
    assert np.array_equal(distances, np.square(narrow[0] - narrow[1]).sum(axis=1)), "as of the whole list at once"


def test_equal_error_rate_on_a_hand_made_set() -> None:
    # At a threshold of 0.5 one of four genuine pairs is rejected and one of four impostor pairs accepted.
    similarities = np.array([0.9, 0.8, 0.7, 0.2, 0.6, 0.3, 0.1, 0.0])
    rate, threshold = equal_error_rate(similarities, np.array([True] * 4 + [False] * 4))
    assert rate == pytest.approx(0.25)
    assert 0.2 < threshold <= 0.7


def test_equal_error_rate_is_where_both_rates_meet() -> None:
    distances, same = scores(3, 20000, "continuous")
    similarities = 1 - distances / 2
    rate, threshold = equal_error_rate(similarities, same)
    assert np.mean(similarities[~same] > threshold) == pytest.approx(rate, abs=1e-3)
    assert np.mean(similarities[same] <= threshold) == pytest.approx(rate, abs=1e-3)


@pytest.mark.parametrize("kind", ["continuous", "ties"])
def test_auc_and_equal_error_rate_agree_with_scipy(kind: str) -> None:
    for seed in range(5):
        distances, same = scores(seed, 500, kind)
        report = verification_report(distances, same)
        wins = mannwhitneyu(-distances[same], -distances[~same]).statistic
        assert report.auc == pytest.approx(wins / (same.sum() * (~same).sum()))
        far, tar, _ = roc_curve(same, -distances)
        assert report.eer == pytest.approx(brentq(lambda x: 1 - x - np.interp(x, far, tar), 0, 1), abs=1e-9)  # noqa: B023


@pytest.mark.parametrize(("num_impostors", "far", "errors"), [(3000, 1e-3, 3), (3000, 1e-2, 30), (3500, 1e-3, 3)])
def test_tar_at_far_lets_exactly_the_allowed_impostors_pass(num_impostors: int, far: float, errors: int) -> None:
    rng = np.random.default_rng(0)
    same = rng.permutation(num_impostors + 500) < 500
    similarities = rng.normal(3.0 * same, 1.0)
    impostors = np.sort(similarities[~same])
    result = tar_at_far(similarities, same, far)
    assert impostors[-errors - 1] < result["threshold"] < impostors[-errors]
    assert result["measured_far"] == errors / num_impostors <= far
    assert result["tar"] == np.mean(similarities[same] > result["threshold"])


def test_far_needs_three_expected_errors() -> None:
    assert supports_far(1e-3, 3000) and not supports_far(1e-3, 2999) and not supports_far(1e-4, 3000)
    rng = np.random.default_rng(0)
    same = np.repeat([True, False], 3000)
    distances = rng.random(6000) + ~same
    report = verification_report(distances, same, rng.permutation(6000) % 10)
    assert [rate["far"] for rate in report.tar_at_far] == [1e-1, 1e-2, 1e-3]
    assert report.unsupported_fars == [1e-4, 1e-5, 1e-6]
    with pytest.raises(ValueError, match=r"FAR 0\.0001 cannot be measured on 3000 impostor pairs: it takes 30000"):
        tar_at_far(-distances, same, 1e-4)


def test_tied_impostors_never_exceed_the_far() -> None:
    similarities = np.array([0.5] * 100 + [0.9] * 100)
    result = tar_at_far(similarities, np.repeat([False, True], 100), 0.1)
    assert result["measured_far"] == 0 and result["tar"] == 1


def test_threshold_interval_holds_the_true_quantile() -> None:
    """Its ends are impostor scores, and 95 of 100 such intervals must hold the quantile of the scores' own law."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(300):
        impostors = rng.normal(size=1000)
        point = tar_at_far(np.append(impostors, 9.0), np.append(np.zeros(1000, bool), True), 0.05)
        low, high = point["threshold_interval"]
        assert low in impostors and high in impostors and low < point["threshold"] < high
        held += low <= norm.ppf(0.95) <= high
    assert 0.92 < held / 300 < 0.99
    few = tar_at_far(np.append(np.arange(3000.0), 9e9), np.append(np.zeros(3000, bool), True), 1e-3)
    assert few["threshold_interval"][1] is None, "the largest score of all bounds nothing from above"


def test_calibration_is_the_least_loss_under_softened_labels() -> None:
    rng = np.random.default_rng(4)
    same = rng.random(900) < 0.3
    similarities = np.where(same, rng.normal(0.5, 0.2, 900), rng.normal(0.1, 0.15, 900))
    genuine = same.sum()
    targets = np.where(same, (genuine + 1) / (genuine + 2), 1 / (900 - genuine + 2))  # Platt, eq. for t+ and t-
    weights = np.where(same, 1 / genuine, 1 / (900 - genuine))

    def loss(line: np.ndarray) -> float:
        probability = 1 / (1 + np.exp(-(line[0] * similarities + line[1])))
        return float(-(weights * (targets * np.log(probability) + (1 - targets) * np.log(1 - probability))).sum())

    folds = contiguous_folds(900)
    calibration = match_calibration(similarities, same, folds)
    expected = minimize(loss, [1.0, 0.0], tol=1e-12).x
    assert [calibration["slope"], calibration["intercept"]] == pytest.approx(expected, rel=1e-4)
    assert 0 < calibration["log_loss"] < np.log(2) and calibration["prior"] == 0.5

    apart = np.where(same, 0.9, 0.1)
    assert 0 < match_calibration(apart, same, folds)["slope"] < 100, "no overlap, and yet finite"
    with pytest.raises(ValueError, match="does not tell matches"):
        match_calibration(-similarities, same, folds)


def test_calibrated_probabilities_are_frequencies() -> None:
    """Scores of two normal laws of one width: the true log odds are a line, which the fit must find."""
    rng = np.random.default_rng(5)
    same = np.arange(40_000) % 2 == 0
    similarities = np.where(same, 0.6, 0.2) + rng.normal(0, 0.2, 40_000)
    calibration = match_calibration(similarities, same, contiguous_folds(40_000))
    assert calibration["slope"] == pytest.approx((0.6 - 0.2) / 0.2**2, rel=0.05)
    assert calibration["intercept"] == pytest.approx(-(0.6**2 - 0.2**2) / (2 * 0.2**2), rel=0.05)


def test_group_scores_use_the_thresholds_of_the_whole_list() -> None:
    distances = np.array([0.4, 0.6, 0.4, 1.2])
    same = np.array([True, False, True, True])
    folds = np.array([7, 7, 9, 9])
    groups = np.array(["pose", "pose", "age", "age"])
    scores = group_scores(distances, same, folds, [0.5, 1.0], groups)
    auc, alone = roc_auc_score([1, 0], [-0.4, -0.6]), {"own_accuracy": None, "own_accuracy_std": None}
    assert scores["pose"] == {"pairs": 2, "genuine": 1, "accuracy": 1.0, "auc": auc, **alone}
    assert scores["age"] == {"pairs": 2, "genuine": 2, "accuracy": 0.5, "auc": None, **alone}


def test_a_group_has_thresholds_of_its_own_too() -> None:
    rng = np.random.default_rng(0)
    same, groups = np.arange(400) % 2 == 0, np.repeat(["near", "far"], 200)
    distances = rng.normal(np.where(same, 0.8, 1.2), 0.1) + np.where(groups == "far", 0.8, 0)  # one threshold fits none
    folds = np.tile(np.arange(10), 40)
    report = verification_report(distances, same, folds)
    scores = group_scores(distances, same, folds, report.fold_thresholds, groups)
    for name in ("near", "far"):
        part = groups == name
        alone = verification_report(distances[part], same[part], folds[part])
        own = scores[name]["own_accuracy"], scores[name]["own_accuracy_std"]
        assert own == (alone.accuracy, alone.accuracy_std) and alone.accuracy > 0.8 > scores[name]["accuracy"]


def grouped(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """600 pairs: groups a and b of each kind, c without genuine pairs, d of ten pairs, and pairs of no group."""
    distances, same = scores(seed, 600, "ties")
    groups = np.array(["a", "b", "b", ""])[np.arange(600) % 4].astype(object)
    groups[(np.arange(600) % 9 == 0) & ~same] = "c"
    groups[:10] = "d"
    return distances, same, groups.astype(str)


def test_group_error_rates_are_those_of_plain_loops() -> None:
    distances, same, groups = grouped(0)
    report = verification_report(distances, same, fars=(0.5, 0.1))
    results = group_error_rates(distances, same, groups, report.tar_at_far)
    assert [result["far"] for result in results] == [0.5, 0.1]
    for result, rate in zip(results, report.tar_at_far, strict=True):
        assert result["threshold"] == rate["threshold"]
        assert set(result["groups"]) == {"a", "b", "c", "d"}
        rates: dict[str, list[float]] = {"fmr": [], "fnmr": []}
        for name, found in result["groups"].items():
            wrong, total = {True: 0, False: 0}, {True: 0, False: 0}
            for distance, genuine, group in zip(distances, same, groups, strict=True):
                if group == name:
                    total[bool(genuine)] += 1
                    wrong[bool(genuine)] += genuine != (1 - distance / 2 > rate["threshold"])
            assert (found["genuine"], found["impostor"]) == (total[True], total[False])
            assert (found["false_non_matches"], found["false_matches"]) == (wrong[True], wrong[False])
            for kind, genuine, known in (
                ("fnmr", True, total[True] > 0),
                ("fmr", False, rate["far"] * total[False] >= 3),
            ):
                if not known:
                    assert found[kind] is None and found[f"{kind}_interval"] is None and found["note"]
                    continue
                assert found[kind] == wrong[genuine] / total[genuine]
                assert found[f"{kind}_interval"] == wilson_interval(wrong[genuine], total[genuine])
                rates[kind].append(found[kind])
        assert result["groups"]["a"]["note"] is None
        assert result["groups"]["c"]["note"] == "no genuine pairs"
        assert "impostor pairs are too few for a rate of 0.1" in results[1]["groups"]["d"]["note"]
        for kind, values in rates.items():
            assert result[f"{kind}_difference"] == max(values) - min(values)
            assert result[f"{kind}_ratio"] == (max(values) / min(values) if min(values) else None)
        assert rates["fmr"] and result["fmr_ratio"] > 1


def test_gaps_of_error_free_or_single_groups() -> None:
    distances, same = np.array([0.2, 0.2, 1.8, 1.8] * 10), np.array([True, True, False, False] * 10)
    rate = {"far": 0.5, "threshold": 0.5}
    (result,) = group_error_rates(distances, same, np.array(["a", "b"] * 20), [rate])
    assert (result["fmr_difference"], result["fmr_ratio"], result["fnmr_ratio"]) == (0, None, None)
    (result,) = group_error_rates(distances, same, np.array(["a"] * 40), [rate])
    assert (result["fmr_difference"], result["fnmr_difference"], result["fmr_ratio"]) == (None, None, None)
    assert group_error_rates(distances, same, np.array([""] * 40), [rate])[0]["groups"] == {}
    assert group_scores(distances, same, np.arange(40) % 10, [1.0] * 10, np.array(["a", ""] * 20)).keys() == {"a"}


def test_folds_that_are_not_half_genuine_are_named() -> None:
    same = np.tile([True, False], 50)
    assert suspect_folds(same, contiguous_folds(100)) == []
    same[31] = True
    assert suspect_folds(same, contiguous_folds(100))[0].startswith("unbalanced folds: fold 3 has 6 genuine of 10;")
    same[30:40] = True
    assert "fold 3 has 10 genuine of 10" in suspect_folds(same, contiguous_folds(100))[0]
    assert suspect_folds(np.array([True, True, False]), np.zeros(3)) == []  # an odd fold cannot be half and half


@pytest.mark.parametrize(
    ("distances", "same", "folds", "message"),
    [
        ([0.1] * 9 + [np.nan], [1, 0] * 5, None, "1 distances are NaN or infinite, the first is that of pair 9"),
        ([0.1] * 10, [1] * 10, None, "all 10 pairs are genuine"),
        ([0.1] * 10, [0] * 10, None, "all 10 pairs are impostor"),
        ([0.1] * 9, [1, 0] * 5, None, "must all have the shape"),
        ([0.1] * 4, [1, 0] * 2, None, "4 pairs cannot be cut into 10 folds"),
        ([0.1] * 4, [1, 0] * 2, [0] * 4, "at least two folds"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    distances: list[float], same: list[int], folds: list[int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        verification_report(np.array(distances), np.array(same), None if folds is None else np.array(folds))


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 3000), (57, 60), (10, 10)])
def test_wilson_interval_solves_its_equation(successes: int, trials: int) -> None:
    """Its ends are the rates p whose own standard error puts the observed one 1.96 of them away."""
    observed = successes / trials
    for end in wilson_interval(successes, trials):
        distance = abs(observed - end)
        assert distance == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / trials), rel=1e-5, abs=1e-9)
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= observed <= high <= 1 and low < high
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert [low, high] == pytest.approx([expected.low, expected.high], abs=1e-12)


@pytest.mark.parametrize("kind", ["plain", "ties"])
def test_bootstrap_intervals_equal_resampling_by_hand(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BOOTSTRAP_SAMPLES", 60)
    distances, same = scores(5, 400, kind)
    folds = contiguous_folds(400)
    accuracies, _ = kfold_accuracy(distances, same, folds)
    draws = metrics._resampled_folds(10)
    assert draws.shape == (60, 10) and (draws.sum(axis=1) == 10).all() and len(np.unique(draws, axis=0)) > 50
    aucs, means = [], []
    for counts in draws:
        members = np.concatenate([np.flatnonzero(folds == f) for f in np.repeat(np.arange(10), counts)])
        aucs.append(roc_auc_score(same[members], -distances[members]))
        means.append(np.repeat(accuracies, counts).mean())
    assert auc_interval(-distances, same, folds) == pytest.approx(np.quantile(aucs, [0.025, 0.975]).tolist(), abs=1e-12)
    assert accuracy_interval(accuracies) == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=1e-12)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Of 200 sets drawn from known scores; with ten folds a bootstrap is a little narrow, so 88 % will do."""
    rng = np.random.default_rng(0)
    same = np.tile([True, False], 100)
    truth = 0.7602  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    hits = 0
    for _ in range(200):
        low, high = auc_interval(rng.normal(size=200) + same, same, contiguous_folds(200)) or (0, 0)
        hits += low <= truth <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_report_has_intervals_where_they_exist() -> None:
    distances, same = scores(2, 6000, "plain")
    report = verification_report(distances, same)
    for value, (low, high) in (
        (report.accuracy, report.accuracy_interval),
        (report.auc, report.auc_interval),
        *((rate["tar"], rate["tar_interval"]) for rate in report.tar_at_far),
        *((rate["measured_far"], rate["far_interval"]) for rate in report.tar_at_far),
    ):
        assert low < value < high
    assert verification_report(distances, same) == report  # the same draws each time
    one_kind = np.arange(6000) < 3000  # folds of one kind only
    assert verification_report(distances, one_kind).auc_interval is None


# --------------------------------------------------------------------------------------------------- long lists and 1:N
def naive_nearest(similarities: np.ndarray, same: np.ndarray, far: float) -> tuple[float, float]:
    """FAR and TAR of the ROC's nearest point: every threshold tried, points in a straight, even run left out."""
    counts = [(0, 0)]
    for threshold in np.unique(similarities)[::-1]:
        accepted = similarities >= threshold
        counts.append((int((accepted & ~same).sum()), int((accepted & same).sum())))
    corners = [
        now
        for before, now, after in zip(counts, counts[1:], counts[2:], strict=False)
        if (now[0] - before[0], now[1] - before[1]) != (after[0] - now[0], after[1] - now[1])
    ]
    points = [(false / (~same).sum(), true / same.sum()) for false, true in (counts[0], *corners, counts[-1])]
    nearest = min(abs(point[0] - far) for point in points)
    return max(point for point in points if abs(point[0] - far) == nearest)


@pytest.mark.parametrize("decimals", [12, 2, 1])  # few decimals: many equal scores, also of both kinds
@pytest.mark.parametrize("seed", range(4))
def test_tar_at_the_nearest_far_is_the_naive_search(decimals: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    same = rng.random(400) < 0.2
    similarities = rng.normal(0.8 * same, 0.5).round(decimals)
    report = roc_report(similarities, same, (0.3, 0.1, 0.05, 0.012, 0.001))
    assert [row["far"] for row in report.tar_at_far] == [0.3, 0.1, 0.05, 0.012] and report.unsupported_fars == [0.001]
    for row in report.tar_at_far:
        assert (row["measured_far"], row["tar"]) == pytest.approx(naive_nearest(similarities, same, row["far"]))
        assert row["measured_far"] == pytest.approx((similarities[~same] >= row["threshold"]).mean())
        assert row["tar"] == pytest.approx((similarities[same] >= row["threshold"]).mean())
        assert row["tar_interval"] == wilson_interval(int((similarities[same] >= row["threshold"]).sum()), same.sum())
        assert row["far_interval"][0] <= row["measured_far"] <= row["far_interval"][1]
    assert report.auc == pytest.approx(roc_auc_score(same, similarities))
    rate, _ = equal_error_rate(similarities, same)
    assert report.eer == pytest.approx(rate)
    assert (report.pairs, report.genuine, report.impostor) == (400, same.sum(), (~same).sum())


def test_a_nearest_far_of_zero_has_a_finite_threshold_that_accepts_nobody() -> None:
    similarities = np.array([0.9] * 10 + [0.5] * 10 + [0.1] * 10)
    same = np.repeat([False, True, False], 10)
    row = roc_report(similarities, same, (0.15,)).tar_at_far[0]
    assert (row["measured_far"], row["tar"]) == (0, 0) and 0.9 < row["threshold"] < 1


def test_pairs_of_one_kind_have_no_roc() -> None:
    with pytest.raises(ValueError, match="all 9 pairs are impostor pairs; verification needs both kinds"):
        roc_report(np.arange(9.0), np.zeros(9, dtype=bool))


def test_similarities_of_pairs_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    rng = np.random.default_rng(0)
    embeddings, index = rng.normal(size=(20, 5)), rng.integers(0, 20, (2, 50)).astype(np.int32)
    assert pair_similarities(embeddings, *index) == pytest.approx((embeddings @ embeddings.T)[tuple(index)])


@pytest.mark.parametrize("seed", range(3))
def test_searches_are_the_full_matrix(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small whole numbers: products are exact, and many candidates score the same."""
    monkeypatch.setattr(metrics, "_BLOCK", 16)
    rng = np.random.default_rng(seed)
    gallery_subjects = rng.permutation(40)[:15]
    probe_subjects = rng.integers(0, 40, 200)
    looks = rng.integers(-3, 4, (40, 6)).astype(float)
    gallery = looks[gallery_subjects] + rng.integers(-1, 2, (15, 6))
    probes = looks[probe_subjects] + rng.integers(-1, 2, (200, 6))
    matrix = probes @ gallery.T  # (200, 15)
    ranks, mates, best = [], [], []
    for scores, subject in zip(matrix, probe_subjects, strict=True):
        if subject in gallery_subjects:
            mate = scores[gallery_subjects == subject][0]
            others = scores[gallery_subjects != subject]
            mates.append(mate)
            ranks.append(1 + int((others >= mate).sum()))  # an equal score of another subject comes first
        else:
            best.append(scores.max())
    found = search(probes, probe_subjects, gallery, gallery_subjects)
    assert (found.mate.tolist(), found.rank.tolist(), found.best.tolist()) == (mates, ranks, best)
    assert sum((matrix == matrix.max(axis=1, keepdims=True)).sum(axis=1) > 1) > 5  # there are ties at the top

    report = identification_report(found, enrolled=15, fpirs=(0.5, 0.1, 0.01), ranks=(1, 3))
    assert (report.searches, report.mated, report.nonmated, report.enrolled) == (200, len(mates), len(best), 15)
    for row in report.rank_rates:
        hits = sum(rank <= row["rank"] for rank in ranks)
        assert row["rate"] == hits / len(ranks) and row["rate_interval"] == wilson_interval(hits, len(ranks))
    assert [row["rank"] for row in report.rank_rates] == [1, 3]
    assert [row["fpir"] for row in report.tpir_at_fpir] == [0.5, 0.1] and report.unsupported_fpirs == [0.01]
    for row in report.tpir_at_fpir:
        raised = sum(score > row["threshold"] for score in best)
        hits = sum(rank == 1 and mate > row["threshold"] for rank, mate in zip(ranks, mates, strict=True))
        assert row["tpir"] == hits / len(mates) and row["tpir_interval"] == wilson_interval(hits, len(mates))
        assert row["measured_fpir"] == raised / len(best) <= row["fpir"]
        assert row["fpir_interval"] == wilson_interval(raised, len(best))


def test_tpir_lets_exactly_the_allowed_searches_raise_an_alarm() -> None:
    rng = np.random.default_rng(0)
    found = metrics.Searches(rng.normal(2, 1, 50), rng.integers(1, 3, 50), rng.normal(0, 1, 300))
    row = tpir_at_fpir(found, 0.01)
    assert row["threshold"] == np.sort(found.best)[-3] and row["measured_fpir"] == 2 / 300  # strictly above it
    with pytest.raises(
        ValueError, match=r"FPIR 0\.001 cannot be measured on 300 non-mated searches: it takes 3000 for 3"
    ):
        tpir_at_fpir(found, 0.001)


def test_labels_may_be_numbers_but_no_others() -> None:
    rng = np.random.default_rng(0)
    same = np.arange(1000) % 3 == 0
    similarities, folds = rng.normal(size=1000) + same, contiguous_folds(1000)
    calls: list[Callable[[np.ndarray], Any]] = [
        lambda labels: kfold_accuracy(2 - 2 * similarities, labels, folds)[0].tolist(),
        lambda labels: equal_error_rate(similarities, labels),
        lambda labels: auc_interval(similarities, labels, folds),
        lambda labels: tar_at_far(similarities, labels, 0.1),
        lambda labels: match_calibration(similarities, labels, folds),
        lambda labels: metrics.roc_report(similarities, labels),
    ]
    for call in calls:
        assert call(same.astype(np.int64)) == call(same.astype(float)) == call(same)
        with pytest.raises(ValueError, match="labels must be 1 or True for a genuine pair"):
            call(np.where(same, 1, -1))


def test_galleries_that_cannot_be_searched() -> None:
    rows = np.eye(3)
    with pytest.raises(ValueError, match="each with one template"):
        search(rows, np.arange(3), rows, np.array([4, 7, 4]))
    with pytest.raises(ValueError, match="at least one subject"):
        search(rows, np.arange(3), rows[:0], np.arange(0))
    with pytest.raises(ValueError, match="none of 3 probes is of a subject of the gallery"):
        identification_report(search(rows, np.arange(3), rows, np.array([4, 7, 5])), enrolled=3)
    all_mated = identification_report(search(rows, np.arange(3), rows, np.arange(3)), enrolled=3)
    assert all_mated.rank_rates[0]["rate"] == 1 and all_mated.tpir_at_fpir == []


# ----------------------------------------------------------------------------------------------------------- identities
def people(seed: int, num_people: int, spread: float = 0.6) -> SimpleNamespace:
    """Pairs whose scores depend on who is on them: two genuine pairs a person, two impostor pairs beside them."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(size=num_people)  # of each person
    first = np.tile(np.arange(num_people), 4)
    second = np.concatenate([first[: 2 * num_people], *((np.arange(num_people) + k) % num_people for k in (1, 2))])
    same = first == second
    noise = rng.normal(size=4 * num_people) * (1 - spread**2) ** 0.5
    similarities = same * 1.0 + noise + spread * (ease[first] + ease[second]) / np.where(same, 2, 2**0.5)
    return SimpleNamespace(similarities=similarities, same=same, identities=np.stack([first, second], axis=1))


@pytest.mark.parametrize("ties", [False, True])
def test_identity_bootstrap_equals_repeating_the_pairs_by_hand(ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "IDENTITY_SAMPLES", 30)
    data = people(0, 12)
    similarities = np.round(data.similarities, 1 - ties)
    order = np.random.default_rng(1).permutation(len(data.same))
    similarities, same, identities = similarities[order], data.same[order], data.identities[order]
    thresholds = np.array([0.5, 1.0])
    aucs, tars, fars = identity_bootstrap(similarities, same, identities, thresholds)
    names = np.array([f"p{number:02}" for number in range(12)])[identities]
    assert np.array_equal(identity_bootstrap(similarities, same, names, thresholds)[0], aucs)
    draws = list(metrics._identity_draws(12))
    assert len(draws) == 30 and all(counts.sum() == 12 for counts in draws) and len({tuple(d) for d in draws}) == 30
    for sample, counts in enumerate(draws):
        members: list[int] = []  # each pair as often as the bootstrap has it
        for pair, (a, b) in enumerate(identities):
            members += [pair] * int(counts[a] if a == b else counts[a] * counts[b])
        labels, drawn = same[members], similarities[members]
        assert aucs[sample] == pytest.approx(roc_auc_score(labels, drawn), abs=1e-12)
        for at, threshold in enumerate(thresholds):
            assert tars[sample, at] == pytest.approx(np.mean(drawn[labels] > threshold), abs=1e-12)
            assert fars[sample, at] == pytest.approx(np.mean(drawn[~labels] > threshold), abs=1e-12)


def test_report_says_what_its_intervals_allow_for() -> None:
    data = people(0, 100)
    distances = 2 - np.clip(data.similarities, -4, 4) / 4 * 2
    alone = verification_report(distances, data.same, np.arange(400) % 10, (0.1,))
    known = verification_report(distances, data.same, np.arange(400) % 10, (0.1,), data.identities)
    assert (alone.resampled, known.resampled) == ("folds", "identities")
    cosines = 1 - distances / 2
    rate = known.tar_at_far[0]
    aucs, tars, fars = identity_bootstrap(cosines, data.same, data.identities, np.array([rate["threshold"]]))
    assert known.auc_interval == pytest.approx(np.quantile(aucs, [0.025, 0.975]).tolist())
    assert rate["tar_interval"] == dependent_interval(rate["tar"], 200, tars[:, 0])
    assert rate["far_interval"] == dependent_interval(rate["measured_far"], 200, fars[:, 0])
    unchanged = {"auc_interval", "resampled", "tar_at_far"}
    for name in set(vars(alone)) - unchanged:
        assert getattr(alone, name) == getattr(known, name)
    assert verification_report(distances, data.same, np.arange(400) % 10, (0.1,), data.identities) == known
    with pytest.raises(ValueError, match=r"identities \(400,\) must have the shape \(N, 2\), here \(400, 2\)"):
        verification_report(distances, data.same, identities=data.identities[:, 0])


def test_dependent_interval_is_wilsons_for_the_pairs_worth() -> None:
    # Samples that vary as 50 independent trials do: variance p (1 - p) / 50.
    samples = 0.2 + (0.2 * 0.8 / 50) ** 0.5 * np.array([-1, 1, np.nan])
    assert dependent_interval(0.2, 400, samples) == pytest.approx(wilson_interval(10, 50))
    assert dependent_interval(0.2, 20, samples) == wilson_interval(4, 20), "never more than there are"
    assert dependent_interval(0.0, 400, np.zeros(9)) == wilson_interval(0, 400), "never certain"
    assert dependent_interval(1.0, 400, np.ones(9)) == wilson_interval(400, 400)


def test_identity_intervals_hold_the_truth_where_people_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 150 sets of 60 people each; Wilson's for independent pairs is too narrow for them, which shows the need."""
    monkeypatch.setattr(metrics, "IDENTITY_SAMPLES", 200)
    truth = people(99, 100_000, spread=0.95)
    far = np.mean(truth.similarities[~truth.same] > 1)
    tar = np.mean(truth.similarities[truth.same] > 1)
    auc = roc_auc_score(truth.same, truth.similarities)
    threshold = np.quantile(truth.similarities[~truth.same], 0.8) / 10  # as the cosines below
    hits = dict.fromkeys(("auc", "tar", "far", "threshold", "tar, independent", "threshold, independent"), 0)
    for seed in range(150):
        data = people(seed, 60, spread=0.95)
        aucs, tars, fars = identity_bootstrap(data.similarities, data.same, data.identities, np.array([1.0]))
        measured_tar, measured_far = (np.mean(data.similarities[part] > 1) for part in (data.same, ~data.same))
        for name, value, (low, high) in (
            ("auc", auc, np.nanquantile(aucs, [0.025, 0.975])),
            ("tar", tar, dependent_interval(measured_tar, 120, tars[:, 0])),
            ("far", far, dependent_interval(measured_far, 120, fars[:, 0])),
            ("tar, independent", tar, wilson_interval(measured_tar * 120, 120)),
            *(
                (
                    f"threshold{how}",
                    threshold,
                    verification_report(
                        2 - data.similarities / 5, data.same, np.arange(240) % 10, (0.2,), people_known
                    ).tar_at_far[0]["threshold_interval"],
                )
                for how, people_known in (("", data.identities), (", independent", None))
            ),
        ):
            hits[name] += low <= value <= high
    assert all(hits[name] >= 0.9 * 150 for name in ("auc", "tar", "far", "threshold")), hits
    assert hits["tar, independent"] < 0.9 * 150 and hits["threshold, independent"] < hits["threshold"], hits
