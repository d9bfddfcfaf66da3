"""Evaluation results as pictures: ROC, DET, score histograms, accuracy by domain, and the pairs that went worst.

The sheets of worst pairs show faces: they are for the eyes of whoever owns the data, and no release takes them along.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.special import ndtri
from sklearn.metrics import roc_curve

from adaptface.data.pairs import PairSet
from adaptface.data.templates import TemplateSet
from adaptface.report import average_results, embedder_key, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that colour-blind people tell apart: Paul Tol's bright scheme, for embedders Okabe and Ito's without yellow.
GENUINE, IMPOSTOR = "#4477aa", "#ee6677"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_LINES = ("-", "--", ":", "-.")  # once the colours are used up
_HATCHES = ("", "//", "..", "xx")
_PICTURES = ("roc.png", "det.png", "scores.png", "domains.png", "worst_pairs_*.png")
_WORST = 6  # pairs of each kind on a sheet
_SIDE = 112  # px of a face on a sheet
_RATES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.4)  # ticks of a DET curve
_LOWEST = 1e-6  # rate that an axis shows: the lowest FAR of results
_CELLS = 1000  # a factor of ten, with one point of a curve each: less than a pixel


class Scored(NamedTuple):
    """The similarity of each pair of a benchmark, `(N,)`, as one embedder sees it."""

    benchmark: PairSet | TemplateSet
    similarities: np.ndarray


class _Style(NamedTuple):
    colour: str
    line: str
    hatch: str


class _Curve(NamedTuple):
    """An embedder's errors on a benchmark from no pair accepted to all: false accept and true accept rates."""

    embedder: str
    far: np.ndarray
    tar: np.ndarray


class _Panel(NamedTuple):
    """A benchmark, with the curves of all embedders and how many pairs of each kind there are."""

    title: str
    impostors: int
    genuine: int
    curves: list[_Curve]


def draw_plots(folder: Path, scored: Sequence[Scored], results: Sequence[dict[str, Any]]) -> list[Path]:
    """Draw everything into a folder, in place of earlier pictures.

    Args:
        scored: one an embedder and benchmark.
        results: what `results.json` says, in the same order.
    Returns:
        paths of the pictures.
    """
    names = short_names(results)
    embedders = [names[embedder_key(result["embedder"])] for result in results]
    styles = _styles(list(names.values()))
    panels = _panels(embedders, scored)
    pictures = {
        "roc": _curves(panels, _roc, styles),
        "det": _curves(panels, _det, styles),
        "scores": _histograms(embedders, scored),
    }
    if groups := _domain_accuracies(embedders, scored, results, names):
        pictures["domains"] = _domains(groups, styles)
    for number, (embedder, one) in enumerate(zip(embedders, scored, strict=True), start=1):
        slug = re.sub(r"[^\w.-]+", "_", f"{embedder}_{one.benchmark.name}")[:100]
        if isinstance(one.benchmark, PairSet):
            pictures[f"worst_pairs_{number}_{slug}"] = _sheet(embedder, one.benchmark, one.similarities)
    files = []
    for name, figure in pictures.items():
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=110)
    return files


def remove_plots(folder: Path) -> None:
    """Take away the pictures of an earlier evaluation, which are not of these results."""
    for name in _PICTURES:
        for file in folder.glob(name):
            file.unlink()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _styles(names: Sequence[str]) -> dict[str, _Style]:
    """Colour, line and hatch of each embedder, the same in all pictures."""
    styles = {}
    for number, name in enumerate(names):
        turn = number // len(COLOURS) % len(_LINES)
        styles[name] = _Style(COLOURS[number % len(COLOURS)], _LINES[turn], _HATCHES[turn])
    return styles


def _legend(figure: Figure, handles: dict[str, Any]) -> None:
    """Above everything: it covers nothing, and names each thing once."""
    width = figure.get_figwidth() / (0.7 + 0.085 * max(map(len, handles)))  # columns of labels of this font
    columns = max(1, min(len(handles), int(width)))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, fontsize="small")


def _panels(embedders: Sequence[str], scored: Sequence[Scored]) -> list[_Panel]:
    panels: dict[int, _Panel] = {}
    for embedder, (benchmark, similarities) in zip(embedders, scored, strict=True):
        genuine = int(np.count_nonzero(benchmark.same))
        panel = _Panel(_title(benchmark), len(benchmark.same) - genuine, genuine, [])
        # drop_intermediate would take points that lie on a straight line here and not on these axes; ours are thinned.
        far, tar, _ = roc_curve(benchmark.same, similarities, drop_intermediate=False)
        kept = _visible(far, 1 - tar)
        panels.setdefault(id(benchmark), panel).curves.append(_Curve(embedder, far[kept], tar[kept]))
    return list(panels.values())


def _visible(far: np.ndarray, frr: np.ndarray) -> np.ndarray:
    """The points that a picture needs: the first of each run of points that fall together."""
    cells = [np.floor(_CELLS * np.log10(np.maximum(rates, _LOWEST / 10))) for rates in (far, frr)]
    moved = np.ones(len(far), dtype=bool)
    moved[1:] = (np.diff(cells[0]) != 0) | (np.diff(cells[1]) != 0)
    return moved


def _curves(
    panels: Sequence[_Panel],
    draw: Callable[[Axes, _Panel, dict[str, _Style]], list[Any]],
    styles: dict[str, _Style],
) -> Figure:
    """A panel a benchmark, a curve an embedder."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(5 * columns, 4.2 * rows)
    handles: dict[str, Any] = {}
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        lines = draw(axes, panel, styles)
        handles |= {curve.embedder: line for curve, line in zip(panel.curves, lines, strict=True)}
        axes.set_title(panel.title)
        axes.grid(alpha=0.3)
    _legend(figure, handles)
    return figure


def _title(benchmark: PairSet | TemplateSet) -> str:
    return f"{benchmark.name} (synthetic faces)" if benchmark.synthetic else benchmark.name


def _roc(axes: Axes, panel: _Panel, styles: dict[str, _Style]) -> list[Any]:
    lines = []
    for curve in panel.curves:
        style = styles[curve.embedder]
        lines += axes.step(curve.far, curve.tar, where="post", color=style.colour, linestyle=style.line)
    least = np.clip(1 / panel.impostors, _LOWEST, 0.1)
    axes.set(xscale="log", xlim=(least, 1), xlabel="false accept rate", ylabel="true accept rate", ylim=(0, 1.01))
    return lines


def _det(axes: Axes, panel: _Panel, styles: dict[str, _Style]) -> list[Any]:
    """Both errors on the scale of a normal deviate, where normal scores give a straight line (Martin et al., 1997).

    That scale has no place for a rate of 0 or 1, which is drawn as half an error: a curve that goes along the edge says
    that there was none.
    """
    halves = (0.5 / panel.impostors, 0.5 / panel.genuine)
    lines = []
    for curve in panel.curves:
        style = styles[curve.embedder]
        rates = (curve.far, 1 - curve.tar)
        places = [ndtri(np.clip(rate, half, 1 - half)) for rate, half in zip(rates, halves, strict=True)]
        lines += axes.plot(*places, color=style.colour, linestyle=style.line)
    for axis, half in zip((axes.xaxis, axes.yaxis), halves, strict=True):
        axis.set_ticks(ndtri(_RATES).tolist(), [f"{rate:g}" for rate in _RATES], fontsize="small")
        axis.set_view_interval(ndtri(np.clip(half, _LOWEST, 0.1)) - 0.1, ndtri(0.6), ignore=True)
    axes.set(xlabel="false accept rate", ylabel="false reject rate")
    return lines


def _histograms(embedders: Sequence[str], scored: Sequence[Scored]) -> Figure:
    """A row of panels an embedder, a column a benchmark, all over one range of similarities."""
    rows, columns = (list(dict.fromkeys(keys)) for keys in (embedders, [id(one.benchmark) for one in scored]))
    figure = new_figure(max(5.0, 3.4 * len(columns)), 0.6 + 2.2 * len(rows))
    limits = _common_range(scored)
    handles: dict[str, Any] = {}
    for embedder, one in zip(embedders, scored, strict=True):
        row, column = rows.index(embedder), columns.index(id(one.benchmark))
        axes = figure.add_subplot(len(rows), len(columns), 1 + row * len(columns) + column)
        edges = np.histogram_bin_edges(one.similarities, 60).tolist()
        for same, colour, label in ((True, GENUINE, "genuine pairs"), (False, IMPOSTOR, "impostor pairs")):
            values = one.similarities[one.benchmark.same == same]
            handles[label] = axes.hist(values, edges, density=True, color=colour, alpha=0.6)[2]
        axes.set_title(f"{embedder}\n{_title(one.benchmark)}", fontsize="small")
        axes.set(xlim=limits, yticks=[])
        if row == len(rows) - 1:
            axes.set_xlabel("cosine similarity")
        if column == 0:
            axes.set_ylabel("density")
    _legend(figure, handles)
    return figure


def _common_range(scored: Sequence[Scored]) -> tuple[float, float]:
    low = min(float(one.similarities.min()) for one in scored)
    high = max(float(one.similarities.max()) for one in scored)
    margin = 0.02 * (high - low) or 0.01
    return low - margin, high + margin


class _Bars(NamedTuple):
    """Accuracies in percent, by embedder, on what a label says."""

    label: str
    accuracies: dict[str, float]


def _domain_accuracies(
    embedders: Sequence[str], scored: Sequence[Scored], results: Sequence[dict[str, Any]], names: dict[str, str]
) -> list[_Bars]:
    """Accuracy on each domain: of a benchmark's pairs, and of whole benchmarks."""
    groups: dict[tuple[Any, ...], _Bars] = {}

    def add(key: tuple[Any, ...], label: str, embedder: str, accuracy: float) -> None:
        groups.setdefault(key, _Bars(label, {})).accuracies[embedder] = 100 * accuracy

    for embedder, one, result in zip(embedders, scored, results, strict=True):
        for domain, scores in (result["domains"] or {}).items():
            label = _group(domain, [result["benchmark"]], result["data"])
            add((domain, id(one.benchmark)), label, embedder, scores["accuracy"])
    for average in average_results(results):
        if (domain := average["domain"]) is not None:
            label = _group(domain, average["benchmarks"], average["data"])
            add((domain, average["data"]), label, names[embedder_key(average["embedder"])], average["accuracy"])
    return list(groups.values())


def _group(domain: str, benchmarks: Sequence[str], data: str) -> str:
    return f"{domain}\n{', '.join(benchmarks)}" + ("\n(synthetic)" if data == "synthetic" else "")


def _domains(groups: Sequence[_Bars], styles: dict[str, _Style]) -> Figure:
    """A group of bars a domain, a bar an embedder."""
    embedders = list(groups[0].accuracies)  # each is run on every benchmark
    width = 0.8 / len(embedders)
    figure = new_figure(max(5.0, len(groups) * max(1.2, 0.4 * (len(embedders) + 1)) + 1), 4)  # a number fits over a bar
    axes = figure.add_subplot()
    handles: dict[str, Any] = {}
    for number, embedder in enumerate(embedders):
        style = styles[embedder]
        places = [at + (number - (len(embedders) - 1) / 2) * width for at in range(len(groups))]
        heights = [group.accuracies[embedder] for group in groups]
        handles[embedder] = axes.bar(places, heights, width, color=style.colour, hatch=style.hatch, edgecolor="white")
        axes.bar_label(handles[embedder], fmt="%.1f", fontsize="x-small")
    axes.set_xticks(range(len(groups)), [group.label for group in groups])
    axes.set(ylabel="accuracy, %", ylim=(0, 105))
    axes.axhline(50, color="grey", linewidth=0.8, linestyle=":")  # what chance gives
    _legend(figure, handles)
    return figure


def _worst(same: np.ndarray, similarities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the impostor pairs most alike and of the genuine pairs least alike, the worst first."""
    order = np.argsort(similarities, kind="stable")
    return order[~same[order]][::-1][:_WORST], order[same[order]][:_WORST]


def _sheet(embedder: str, pair_set: PairSet, similarities: np.ndarray) -> Figure:
    """The faces of the worst pairs."""
    impostors, genuine = _worst(pair_set.same, similarities)
    kinds = {"impostor pairs, most alike": impostors, "genuine pairs, least alike": genuine}
    figure = new_figure(1.5 * _WORST, 7.2)
    figure.suptitle(f"{embedder}, {_title(pair_set)}")
    for row, (kind, pairs) in enumerate(kinds.items()):
        axes = figure.add_subplot(2, 1, row + 1)
        sheet = Image.new("RGB", (_WORST * _SIDE, 2 * _SIDE), "white")
        for column, pair in enumerate(pairs):
            for below, index in enumerate((pair_set.index_a[pair], pair_set.index_b[pair])):
                face = pair_set.images[index].resize((_SIDE - 4, _SIDE - 4))
                sheet.paste(face, (column * _SIDE + 2, below * _SIDE + 2))
        axes.imshow(np.asarray(sheet))
        centres = [(column + 0.5) * _SIDE for column in range(len(pairs))]
        axes.set_xticks(centres, [f"{similarities[pair]:.3f}" for pair in pairs])
        axes.set(yticks=[], title=kind)
        axes.tick_params(length=0)
    return figure


def domain_usage(log: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Step and mean weight of each expert over training, from the lines of a `log.jsonl`; empty without a router."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in log:
        for key, share in line.items():
            if key.startswith("usage_"):
                found.setdefault(key.removeprefix("usage_"), []).append((line["step"], share))
    return found


def draw_domain_usage(usage: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Draw what [`domain_usage`] found, as shares that add up to one."""
    figure = new_figure(6, 3.2)
    axes = figure.add_subplot()
    steps = [step for step, _ in next(iter(usage.values()))]
    axes.stackplot(steps, [[share for _, share in points] for points in usage.values()], labels=list(usage), alpha=0.8)
    axes.set(xlabel="training step", ylabel="mean weight of an expert", ylim=(0, 1), xlim=(steps[0], steps[-1]))
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
