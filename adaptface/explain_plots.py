"""The pictures of [`adaptface.explain_page`] as PNGs, for papers and slides. Those of images show faces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from adaptface.explain import FacesLook, ImageLook, UpdateNorm, attention_of, grid_side, mix_summaries
from adaptface.explain_assets import ALPHAS, HEAT, coloured
from adaptface.plots import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 110
_CELL = 96  # px of a map on a sheet
_OTHER = "#b4bcc4"


def draw_images(
    folder: Path, names: Sequence[str], looks: Sequence[ImageLook], experts: Sequence[str], rows: Sequence[UpdateNorm]
) -> None:
    """Draw `face_I.png` (crop, norm and mix), `cls_I.png` (where CLS looks, by block and head) and `patches_I.png`
    (which patch looks at which, by block) of the I-th image, and `updates.png` if there are any.

    Args:
        folder: where they go.
        names, looks: of the images.
        experts: names of the K experts.
        rows: see [`update_norms`].
    """
    for number, (name, look) in enumerate(zip(names, looks, strict=True), start=1):
        _face(name, look, experts).savefig(folder / f"face_{number}.png", dpi=_DPI)
        _cls(name, look).savefig(folder / f"cls_{number}.png", dpi=_DPI)
        _patches(name, look).savefig(folder / f"patches_{number}.png", dpi=_DPI)
    if rows:
        _updates(rows).savefig(folder / "updates.png", dpi=_DPI)


def draw_faces(
    folder: Path,
    look: FacesLook,
    names: dict[str, list[str]],
    places: np.ndarray,
    method: str,
    experts: Sequence[str],
) -> None:
    """Draw `embeddings.png`, and `router.png` if there is one.

    Args:
        folder: where they go.
        look: see [`look_at_faces`].
        names: what dots are coloured by, see `scatters`.
        places (`np.ndarray` of shape `(M, 2)`): of the dots.
        method: how they were found.
        experts: names of the K experts.
    """
    _scatters(names, places, method, experts).savefig(folder / "embeddings.png", dpi=_DPI)
    if look.mix is not None:
        _router(look, experts).savefig(folder / "router.png", dpi=_DPI)


def _title(axes: Axes, text: str, **options: Any) -> None:
    axes.set_title(text, fontsize="small", parse_math=False, **options)  # a name may hold dollar signs


def _face(name: str, look: ImageLook, experts: Sequence[str]) -> Figure:
    figure = new_figure(6.5 if look.mix is not None else 3, 2.8)
    axes = figure.add_subplot(1, 2 if look.mix is not None else 1, 1)
    axes.imshow(np.asarray(look.picture))
    axes.set_axis_off()
    _title(axes, f"{name}\nembedding norm {look.norm:.3f}")
    if look.mix is not None:
        axes = figure.add_subplot(1, 2, 2)
        bars = axes.barh(range(len(experts)), look.mix, color=COLOURS[0])
        axes.bar_label(bars, labels=[f"{100 * weight:.1f}%" for weight in look.mix], padding=3, fontsize="small")
        axes.set_yticks(range(len(experts)), experts, parse_math=False)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.2), xlabel="weight of an expert", xticks=(0, 0.5, 1))
    return figure


def _cls(name: str, look: ImageLook) -> Figure:
    """A row of maps a block: the mean of the heads, then each head; each scaled to its own strongest patch."""
    blocks, heads = look.attention.shape[:2]
    columns: list[int | None] = [None, *range(heads)]
    step = _CELL + 4
    sheet = Image.new("RGB", (step * len(columns), step * blocks), "white")
    grey = look.picture.convert("L").convert("RGB").resize((_CELL, _CELL))
    heat = Image.new("RGB", (_CELL, _CELL), HEAT)
    for block in range(blocks):
        for column, head in enumerate(columns):
            values = attention_of(look.attention, block, head)
            alpha = Image.fromarray((ALPHAS[-1] * values / max(float(values.max()), 1e-12)).round().astype(np.uint8))
            alpha = alpha.resize((_CELL, _CELL), Image.Resampling.NEAREST)
            sheet.paste(Image.composite(heat, grey, alpha), (step * column + 2, step * block + 2))
    figure = new_figure(0.6 + sheet.width / _DPI, 0.9 + sheet.height / _DPI)
    figure.suptitle(f"where CLS looks: {name}", fontsize="small", parse_math=False)
    axes = figure.add_subplot()
    axes.imshow(np.asarray(sheet))
    centres = [step * (number + 0.5) for number in range(max(blocks, len(columns)))]
    labels = ["mean" if head is None else f"head {head}" for head in columns]
    axes.set_xticks(centres[: len(columns)], labels, fontsize="small")
    axes.set_yticks(centres[:blocks], [f"block {block}" for block in range(blocks)], fontsize="small")
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure


def _patches(name: str, look: ImageLook) -> Figure:
    """Each block's attention of patches to patches, the mean of the heads; rows look, columns are looked at."""
    blocks = look.attention.shape[0]
    columns = min(4, blocks)
    rows = -(-blocks // columns)
    figure = new_figure(3 * columns, 0.6 + 2.7 * rows)
    title = f"which patch looks at which: {name}\na row looks, a column is looked at, patches row by row"
    figure.suptitle(title, fontsize="small", parse_math=False)
    side = grid_side(look.attention)
    for block in range(blocks):
        axes = figure.add_subplot(rows, columns, block + 1)
        values = look.attention[block, :, 1:, 1:].mean(0)  # (N, N)
        shown = axes.imshow(100 * values, cmap="magma", vmin=0, vmax=100 * np.percentile(values, 99.5))
        figure.colorbar(shown, ax=axes, shrink=0.8, extend="max").set_label("%", fontsize="small")
        ticks = range(0, side * side, side * max(1, side // 4))
        axes.set(xticks=ticks, yticks=ticks)
        axes.tick_params(labelsize="x-small")
        _title(axes, f"block {block}")
    return figure


def _updates(rows: Sequence[UpdateNorm]) -> Figure:
    """A table of colours an expert: blocks by matrices."""
    experts, matrices, blocks = (
        list(dict.fromkeys(values))
        for values in zip(*((row.expert, row.matrix, row.block) for row in rows), strict=True)
    )
    figure = new_figure(max(3.0, (0.9 + 0.55 * len(matrices)) * len(experts)) + 1, 1.2 + 0.32 * len(blocks))
    most = max(100 * row.relative for row in rows)
    panels = []
    for number, expert in enumerate(experts, start=1):
        table = np.full((len(blocks), len(matrices)), np.nan)
        for row in rows:
            if row.expert == expert:
                table[blocks.index(row.block), matrices.index(row.matrix)] = 100 * row.relative
        axes = figure.add_subplot(1, len(experts), number)
        shown = axes.imshow(table, cmap="viridis", vmin=0, vmax=most or 1, aspect="auto")
        axes.set_xticks(range(len(matrices)), matrices, fontsize="small")
        axes.set_yticks(range(len(blocks)), ["patches" if block is None else block for block in blocks])
        _title(axes, expert)
        if number == 1:
            axes.set_ylabel("block")
        panels.append(axes)
    figure.colorbar(shown, ax=panels).set_label("norm of the update, % of the frozen matrix", fontsize="small")
    return figure


def _router(look: FacesLook, experts: Sequence[str]) -> Figure:
    """A panel a group: deciles of each expert's weight, least and greatest as whiskers, the mean as a dot."""
    assert look.mix is not None
    groups = mix_summaries(look.mix, look.domain_labels())
    figure = new_figure(max(4.0, (0.6 + 0.6 * len(experts)) * len(groups)), 3.4)
    for number, (name, summary) in enumerate(groups.items(), start=1):
        axes = figure.add_subplot(1, len(groups), number)
        d = summary.deciles
        boxes = [
            {
                "whislo": d[1, k],
                "q1": d[3, k],
                "med": d[5, k],
                "q3": d[7, k],
                "whishi": d[9, k],
                "mean": summary.mean[k],
            }
            for k in range(len(experts))
        ]
        axes.bxp(boxes, showmeans=True, showfliers=False, widths=0.6)
        axes.set_xticks(range(1, len(experts) + 1), experts, rotation=45, ha="right", parse_math=False)
        axes.set(ylim=(-0.02, 1.02))
        if number == 1:
            axes.set_ylabel("weight of an expert")
        _title(axes, f"{name}\n{summary.images:,} images")
    figure.supxlabel("box: middle 40% of the images, whiskers: middle 80%, triangle: mean", fontsize="x-small")
    return figure


def _scatters(names: dict[str, list[str]], places: np.ndarray, method: str, experts: Sequence[str]) -> Figure:
    figure = new_figure(4.6 * len(names), 5.2)
    figure.suptitle(f"{len(places):,} embeddings, {({'tsne': 't-SNE', 'umap': 'UMAP'})[method]}", fontsize="small")
    for panel, (by, labels) in enumerate(names.items(), start=1):
        axes = figure.add_subplot(1, len(names), panel)
        colours = coloured(labels, experts)
        each = np.array(labels)
        rest = ~np.isin(each, list(colours))
        if others := sorted(set(each[rest].tolist())):
            label = others[0] if len(others) == 1 else f"{len(others):,} others"
            axes.scatter(places[rest, 0], places[rest, 1], s=8, color=_OTHER, label=label)
        for name, number in colours.items():
            axes.scatter(places[each == name, 0], places[each == name, 1], s=10, color=COLOURS[number], label=name)
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.set_adjustable("datalim")
        _title(axes, f"by {by}")
        for text in axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3).get_texts():
            text.set_parse_math(False)
    return figure
