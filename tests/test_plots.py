"""Pictures: what they show does not depend on the order of embedders, and nothing is lost."""

from typing import Any

import numpy as np
import pytest
from scipy.special import ndtri

from adaptface import plots
from adaptface.data.pairs import PairImages, PairSet
from adaptface.plots import Scored

PAIRS = 6000


def pair_set(pairs: int = PAIRS, genuine: int | None = None) -> PairSet:
    same = np.arange(pairs) < (pairs // 2 if genuine is None else genuine)
    nothing = np.zeros(pairs, dtype=np.int64)
    return PairSet("lfw", PairImages([], []), nothing, nothing, same, nothing, "none")


def similarities(benchmark: PairSet, kind: str) -> np.ndarray:
    """Weak scores overlap, perfect ones do not, and of near ones two impostor pairs are above some genuine pairs."""
    rng, same = np.random.default_rng(0), benchmark.same
    if kind == "weak":
        return np.where(same, rng.normal(0.6, 0.1, len(same)), rng.normal(0.3, 0.1, len(same)))
    scores = np.where(same, rng.uniform(0.6, 0.9, len(same)), rng.uniform(-0.1, 0.2, len(same)))
    if kind == "near":
        scores[-2:] = 0.7
    return scores


def drawn(draw: Any, kinds: tuple[str, ...], benchmark: PairSet) -> Any:
    """The axes of one panel, with a curve a kind."""
    panels = plots._panels(kinds, [Scored(benchmark, similarities(benchmark, kind)) for kind in kinds])
    return plots._curves(panels, draw, plots._styles(kinds)).axes[0]


@pytest.mark.parametrize("draw", [plots._roc, plots._det])
def test_limits_come_of_the_counts_whatever_the_order(draw: Any) -> None:
    for benchmark in (pair_set(), pair_set(4000, 100)):
        genuine = int(benchmark.same.sum())
        impostors = len(benchmark) - genuine
        for kinds in (("weak", "perfect", "near"), ("near", "perfect", "weak"), ("perfect",)):
            axes = drawn(draw, kinds, benchmark)
            if draw is plots._roc:
                assert axes.get_xlim() == pytest.approx((1 / impostors, 1))
                continue
            for (low, high), count in ((axes.get_xlim(), impostors), (axes.get_ylim(), genuine)):
                assert high == pytest.approx(ndtri(0.6)) and low == pytest.approx(ndtri(0.5 / count) - 0.1)


def test_limits_stay_where_results_are() -> None:
    """Few pairs leave an axis of a decade, many an axis down to the lowest rate that results give."""
    panel = plots._Panel("", 15_000_000, 5, [])
    axes = plots.new_figure(4, 4).add_subplot()
    plots._roc(axes, panel, {})
    assert axes.get_xlim() == pytest.approx((1e-6, 1))
    plots._det(axes, panel, {})
    assert axes.get_xlim()[0] == pytest.approx(ndtri(1e-6) - 0.1) and axes.get_ylim()[0] == pytest.approx(
        ndtri(0.1) - 0.1
    )
    plots._roc(axes, panel._replace(impostors=5), {})
    assert axes.get_xlim() == pytest.approx((0.1, 1))


def test_no_error_is_drawn_as_half_an_error() -> None:
    axes = drawn(plots._det, ("perfect", "near"), pair_set())
    half = ndtri(0.5 * 2 / PAIRS)
    for line in axes.lines:
        x, y = line.get_data()
        assert np.isfinite([x, y]).all() and len(x) >= 3
        assert x.min() == pytest.approx(half) and y.min() == pytest.approx(half)
        inside = (
            (x >= axes.get_xlim()[0]) & (x <= axes.get_xlim()[1]) & (y >= axes.get_ylim()[0]) & (y < axes.get_ylim()[1])
        )
        assert inside.any()


def test_curves_are_thinned_by_less_than_shows() -> None:
    rng = np.random.default_rng(0)
    same = np.arange(300_000) < 150_000
    benchmark = pair_set(len(same))
    many = rng.normal(same * 0.5)  # no two equal
    (panel,) = plots._panels(["e"], [Scored(benchmark, many)])
    far, tar, _ = plots.roc_curve(same, many, drop_intermediate=False)
    kept_far, kept_tar = panel.curves[0].far, panel.curves[0].tar
    assert len(kept_far) < 10_000 < len(far)
    assert set(zip(kept_far, kept_tar, strict=True)) < set(zip(far, tar, strict=True))
    steps = kept_tar[np.searchsorted(kept_far, far, side="right") - 1]  # TAR of the drawn steps at each FAR
    exact = tar[np.searchsorted(far, far, side="right") - 1]
    assert np.abs(steps - exact).max() < 0.003, "a pixel of 400"

    few = pair_set(100_000, 20)  # long runs of impostors, which the lines of a DET must not cut short
    scores = rng.normal(few.same * 1.0)
    (panel,) = plots._panels(["e"], [Scored(few, scores)])
    far, tar, _ = plots.roc_curve(few.same, scores, drop_intermediate=False)
    lines = np.interp(far, panel.curves[0].far, panel.curves[0].tar)
    assert np.mean(np.abs(lines - tar) > 0.01) < 0.01


def test_worst_pairs_are_the_impostors_most_alike_and_the_genuine_pairs_least_alike() -> None:
    same = np.array([False, True] * 8)
    similarities = np.array([0.5, 0.4, 0.1, 0.9, 0.3, 0.8, 0.7, 0.2, -1, 1, -0.9, 0.6, -0.8, 0.95, -0.7, 0.97])
    impostors, genuine = plots._worst(same, similarities)
    assert impostors.tolist() == [6, 0, 4, 2, 14, 12]
    assert genuine.tolist() == [7, 1, 11, 5, 3, 13]
    assert [len(found) for found in plots._worst(same[:3], similarities[:3])] == [2, 1]


@pytest.mark.slow
def test_an_embedder_has_one_colour_and_no_legend_covers_a_panel() -> None:
    names = [f"embedder {number}" for number in range(9)]
    styles = plots._styles(names)
    assert len(set(styles.values())) == 9 and styles["embedder 7"].colour == styles["embedder 0"].colour
    benchmarks = [pair_set(), pair_set(500)]
    scored = [Scored(benchmark, similarities(benchmark, "weak")) for _ in names for benchmark in benchmarks]
    embedders = [name for name in names for _ in benchmarks]
    figure = plots._curves(plots._panels(embedders, scored), plots._roc, styles)
    bars = plots._domains([plots._Bars("pose", dict.fromkeys(names, 90.0))], styles)
    for axes in figure.axes:
        assert [line.get_color() for line in axes.lines] == [styles[name].colour for name in names]
    assert [patch[0].get_facecolor()[:3] for patch in bars.axes[0].containers] == [
        rgb(styles[name].colour) for name in names
    ]
    histograms = plots._histograms(embedders, scored)
    assert len({axes.get_xlim() for axes in histograms.axes}) == 1
    grid = histograms.axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols) == (9, 2)
    for one in (figure, bars, histograms):
        one.draw_without_rendering()
        (legend,) = one.legends
        below = legend.get_window_extent().y0
        assert all(axes.get_tightbbox().y1 <= below for axes in one.axes)


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
