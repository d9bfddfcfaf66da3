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
from scipy.stats import norm
from sklearn.metrics import roc_curve

from adaptface.data.pairs import PairSet
from adaptface.data.templates import TemplateSet
from adaptface.report import average_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GENUINE, IMPOSTOR = "#4477aa", "#ee6677"  # Paul Tol's bright scheme, told apart by colour-blind people
_PICTURES = ("roc.png", "det.png", "scores.png", "domains.png", "worst_pairs_*.png")
_WORST = 6  # pairs of each kind on a sheet
_SIDE = 112  # px of a face on a sheet
_RATES = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.2, 0.4)  # ticks of a DET curve


class Scored(NamedTuple):
    """An embedder's cosine similarity of each pair of a benchmark, `(N,)`."""

    embedder: str
    benchmark: PairSet | TemplateSet
    similarities: np.ndarray


def draw_plots(folder: Path, scored: Sequence[Scored], results: Sequence[dict[str, Any]]) -> list[Path]:
    """Draw everything into a folder, in place of earlier pictures.

    Args:
        scored: one an embedder and benchmark.
        results: what `results.json` says, in the same order.
    Returns:
        paths of the pictures.
    """
    names = _short_names([one.embedder for one in scored])
    scored = [one._replace(embedder=names[one.embedder]) for one in scored]
    pictures = {"roc": _curves(scored, _roc), "det": _curves(scored, _det), "scores": _histograms(scored)}
    if accuracies := _domain_accuracies(results):
        pictures["domains"] = _domains({names.get(name, name): found for name, found in accuracies.items()})
    for number, one in enumerate(scored, start=1):
        slug = re.sub(r"[^\w.-]+", "_", f"{one.embedder}_{one.benchmark.name}")
        if isinstance(one.benchmark, PairSet):
            pictures[f"worst_pairs_{number}_{slug}"] = _worst_pairs(one.embedder, one.benchmark, one.similarities)
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


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """The shortest ends of paths that tell all of them apart: `best`, or of two runs `a/best` and `b/best`."""
    distinct = set(names)
    for length in range(1, 20):
        short = {name: "/".join(Path(name).parts[-length:]) for name in distinct}
        if len(set(short.values())) == len(distinct):
            return short
    return {name: name for name in distinct}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _curves(scored: Sequence[Scored], draw: Callable[[Axes, np.ndarray, np.ndarray, str], None]) -> Figure:
    """A panel a benchmark, a curve an embedder."""
    benchmarks: dict[int, list[Scored]] = {}
    for one in scored:
        benchmarks.setdefault(id(one.benchmark), []).append(one)
    columns = min(3, len(benchmarks))
    rows = -(-len(benchmarks) // columns)
    figure = _figure(5 * columns, 4.2 * rows)
    for number, members in enumerate(benchmarks.values(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        for one in members:
            far, tar, _ = roc_curve(one.benchmark.same, one.similarities)
            draw(axes, far, tar, one.embedder)
        axes.set_title(_title(members[0].benchmark))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def _title(benchmark: PairSet | TemplateSet) -> str:
    return f"{benchmark.name} (synthetic faces)" if benchmark.synthetic else benchmark.name


def _roc(axes: Axes, far: np.ndarray, tar: np.ndarray, name: str) -> None:
    axes.step(far, tar, where="post", label=name)
    least = min(far[far > 0].min(), 0.1)  # of one impostor, or of several with one score
    axes.set(xscale="log", xlim=(least, 1), xlabel="false accept rate", ylabel="true accept rate", ylim=(0, 1.01))


def _det(axes: Axes, far: np.ndarray, tar: np.ndarray, name: str) -> None:
    """Both errors on the scale of a normal deviate, where normal scores give a straight line (Martin et al., 1997)."""
    inner = (far > 0) & (tar < 1)
    axes.plot(norm.ppf(far[inner]), norm.ppf(1 - tar[inner]), label=name)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(norm.ppf(_RATES).tolist(), [f"{rate:g}" for rate in _RATES])
    limits = norm.ppf([np.clip(far[far > 0].min(), _RATES[0], 0.1), 0.6])
    axes.set(xlabel="false accept rate", ylabel="false reject rate", xlim=limits, ylim=limits)


def _histograms(scored: Sequence[Scored]) -> Figure:
    figure = _figure(6, 2.6 * len(scored))
    for number, one in enumerate(scored, start=1):
        axes = figure.add_subplot(len(scored), 1, number)
        edges = np.linspace(one.similarities.min(), one.similarities.max(), 61).tolist()
        for same, colour, label in ((True, GENUINE, "genuine"), (False, IMPOSTOR, "impostor")):
            axes.hist(
                one.similarities[one.benchmark.same == same], edges, density=True, color=colour, alpha=0.6, label=label
            )
        axes.set(title=f"{one.embedder}, {_title(one.benchmark)}", ylabel="density")
        axes.legend(fontsize="small")
    axes.set_xlabel("cosine similarity")
    return figure


def _domain_accuracies(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Accuracy in percent of each embedder on each domain: of a benchmark's pairs, and of whole benchmarks."""
    found: dict[str, dict[str, float]] = {}
    for result in results:
        for domain, scores in (result["domains"] or {}).items():
            of_embedder = found.setdefault(result["embedder"]["name"], {})
            of_embedder[_group(domain, [result["benchmark"]], result["data"])] = 100 * scores["accuracy"]
    for average in average_results(results):
        if average["domain"] is not None:
            of_embedder = found.setdefault(average["embedder"]["name"], {})
            of_embedder[_group(average["domain"], average["benchmarks"], average["data"])] = 100 * average["accuracy"]
    return found


def _group(domain: str, benchmarks: Sequence[str], data: str) -> str:
    return f"{domain}\n{', '.join(benchmarks)}" + ("\n(synthetic)" if data == "synthetic" else "")


def _domains(accuracies: dict[str, dict[str, float]]) -> Figure:
    """A group of bars a domain, a bar an embedder."""
    groups = list(dict.fromkeys(group for of_embedder in accuracies.values() for group in of_embedder))
    figure = _figure(max(5.0, 1.2 * len(groups) + 2), 4)
    axes = figure.add_subplot()
    width = 0.8 / len(accuracies)
    for number, (name, of_embedder) in enumerate(accuracies.items()):
        places = [at + (number - (len(accuracies) - 1) / 2) * width for at in range(len(groups))]
        bars = axes.bar(places, [of_embedder.get(group, 0.0) for group in groups], width, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize="x-small")
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylabel="accuracy, %", ylim=(0, 105))
    axes.axhline(50, color="grey", linewidth=0.8, linestyle=":")  # what chance gives
    axes.legend(fontsize="small", loc="lower right")
    return figure


def _worst_pairs(embedder: str, pair_set: PairSet, similarities: np.ndarray) -> Figure:
    """The impostor pairs most alike, and the genuine pairs least alike."""
    order = np.argsort(similarities, kind="stable")
    same = pair_set.same
    kinds = {
        "impostor pairs, most alike": [index for index in order[::-1] if not same[index]][:_WORST],
        "genuine pairs, least alike": [index for index in order if same[index]][:_WORST],
    }
    figure = _figure(1.5 * _WORST, 7.2)
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
    figure = _figure(6, 3.2)
    axes = figure.add_subplot()
    steps = [step for step, _ in next(iter(usage.values()))]
    axes.stackplot(steps, [[share for _, share in points] for points in usage.values()], labels=list(usage), alpha=0.8)
    axes.set(xlabel="training step", ylabel="mean weight of an expert", ylim=(0, 1), xlim=(steps[0], steps[-1]))
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
