"""What [`adaptface.explain`] finds, as one HTML page that needs nothing else, or as a folder of PNGs.

    explain(model, processor, "face.jpg", Path("page.html"))
    explain_folder(model, processor, open_source("data/faces", domains=None, training=False), Path("faces.html"))

A page shows faces: it is for the eyes of whoever owns them. It names files, identities and the base, never a folder of
this machine, and forbids itself the network.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adaptface.data.base import FaceSource, shown
from adaptface.data.folder import IMAGE_SUFFIXES
from adaptface.explain import (
    DECILES,
    FacesLook,
    ImageLook,
    MixSummary,
    UpdateNorm,
    attention_of,
    check_method,
    grid_side,
    look_at_faces,
    look_at_image,
    mix_summaries,
    project,
    update_norms,
)
from adaptface.explain_assets import ALPHAS, HEAT, SCRIPT, STYLE, coloured
from adaptface.explain_plots import draw_faces, draw_images
from adaptface.files import new_folder, without_folders, write_text_atomically
from image_processing_adaptface import ImageLike

MOST_IMAGES = 16  # on a page: each is looked at token by token
_PATCH_BYTES = 2_600_000  # of a page, for what each patch looks at
_GENERATOR = '<meta name="generator" content="adaptface explain">'


def explain(
    model: Any,
    processor: Any,
    images: ImageLike | Sequence[ImageLike],
    out: Path,
    landmarks: Sequence[Any] | None = None,
) -> list[Path]:
    """Show what happens inside a model for one face or a few: attention, the router's mix, the size of its updates.

    Args:
        model: `AdaptFaceModel`, of whatever adaptation.
        processor: its `AdaptFaceImageProcessor`.
        images: one image or up to 16, as the processor takes them: aligned square crops, or photos with landmarks.
        out: a page, `name.html`, or a new folder for PNGs. An earlier page of ours is replaced, nothing else.
        landmarks (sequence of arrays of shape `(5, 2)` or None, *optional*): one entry an image; None for a crop.
    Returns:
        paths of the files that were written.
    Raises:
        FileExistsError: `out` is something else that is kept.
        OSError, ValueError: an image cannot be read or is no square, landmarks form no face or are not one an image,
            or there are more images than a page takes.
    """
    batch: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
    points = [None] * len(batch) if landmarks is None else list(landmarks)
    if not 1 <= len(batch) <= MOST_IMAGES:
        raise ValueError(f"{len(batch)} images: give 1 to {MOST_IMAGES}; explain_folder takes a whole set of faces")
    if len(points) != len(batch):
        raise ValueError(f"landmarks: give one entry an image, {len(batch)} in all; got {len(points)}")
    names = [
        shown(Path(image).name) if isinstance(image, (str, os.PathLike)) else f"image {number}"
        for number, image in enumerate(batch, start=1)
    ]

    def looks() -> list[ImageLook]:
        return [look_at_image(model, processor, image, of) for image, of in zip(batch, points, strict=True)]

    with _written(out) as (folder, write):
        if folder is None:
            write(images_page(model, names, looks()))
        else:
            draw_images(folder, names, looks(), model.config.domains, update_norms(model))
    return _files(out)


def explain_folder(
    model: Any,
    processor: Any,
    source: FaceSource,
    out: Path,
    method: str = "tsne",
    most: int = 2000,
    **options: Any,
) -> list[Path]:
    """Show what a model makes of a set of faces: the router's mixes, and embeddings by identity and by domain.

    A face's domain is its label where the set has labels, and the expert that the router gives most weight to.

    Args:
        model, processor, out: see [`explain`].
        source (`FaceSource`): the faces, aligned and square; see `open_source`, best with `domains=None`.
        method (`str`): `tsne` or `umap`, see [`project`].
        most (`int`): embeddings that are laid out, spread over the set.
        options: `batch_size`, `num_workers`, `progress`, see [`look_at_faces`].
    Returns:
        paths of the files that were written.
    Raises:
        FileExistsError: `out` is something else that is kept.
        ImportError: `method` is `umap` and umap-learn is not installed.
        OSError, ValueError: an image cannot be read or is no square, or the method is unknown.
    """
    check_method(method)
    with _written(out) as (folder, write):
        look = look_at_faces(model, processor, source, most, **options)
        places = project(look.embeddings, method)
        if folder is None:
            write(faces_page(model, look, places, method))
        else:
            draw_faces(folder, look, scatters(look, model.config.domains), places, method, model.config.domains)
    return _files(out)


@contextmanager
def _written(out: Path) -> Iterator[tuple[Path | None, Callable[[str], None]]]:
    """Looks at `out` before anything is computed: a new folder to write into, or None and what writes the page."""
    if out.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f"{out}: there are several pictures; name a page, {out.stem}.html, or a folder for PNGs")
    if out.suffix.lower() not in (".html", ".htm"):
        with new_folder(out) as folder:
            yield folder, lambda page: None
        return
    if out.exists() and not (out.is_file() and _GENERATOR.encode() in out.read_bytes()[:1000]):
        raise FileExistsError(f"{out} is no page of adaptface explain; name another one, or move it away")

    def write(page: str) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(out, page)

    yield None, write


def _files(out: Path) -> list[Path]:
    return sorted(out.iterdir()) if out.is_dir() else [out]


# ----------------------------------------------------------------------------------------------------------- the pages


def images_page(model: Any, names: Sequence[str], looks: Sequence[ImageLook]) -> str:
    """The page of some images.

    Args:
        model: `AdaptFaceModel`.
        names: what the page calls the images.
        looks: see [`look_at_image`].
    """
    sections = [
        _image_section(model.config, name, look, _PATCH_BYTES // len(looks))
        for name, look in zip(names, looks, strict=True)
    ]
    title = f"Inside the model: {names[0] if len(names) == 1 else f'{len(names)} images'}"
    return _page(title, [_model_facts(model), *sections, _updates(update_norms(model), model.config)], SCRIPT)


def faces_page(model: Any, look: FacesLook, places: np.ndarray, method: str) -> str:
    """The page of a set of faces.

    Args:
        model: `AdaptFaceModel`.
        look: see [`look_at_faces`].
        places (`np.ndarray` of shape `(M, 2)`): of `look.chosen`, see [`project`].
        method (`str`): how they were found.
    """
    name = str(without_folders(look.source.name))
    counts = _facts(
        {
            "images": f"{len(look.source):,}",
            "identities": f"{len(look.source.identities):,}",
            "embedding norm": f"median {np.median(look.norms):.2f}, middle 80% "
            + " to ".join(f"{norm:.2f}" for norm in np.percentile(look.norms, (10, 90))),
        }
    )
    parts = [_model_facts(model), f"<section><h2>The faces</h2>{counts}</section>"]
    parts.append(_distribution(look, model.config))
    parts.append(_scatter_section(look, model.config.domains, places, method))
    return _page(f"Inside the model: {name}", parts, "")


def _page(title: str, parts: Sequence[str], script: str) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    head = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_GENERATOR}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
    )
    ending = f"<script>{script}</script>\n" if script else ""
    return f"{head}<body>\n<h1>{_text(title)}</h1>\n{chr(10).join(parts)}\n{ending}</body>\n</html>\n"


def _text(content: Any) -> str:
    """Any name as the text of an element or of a quoted attribute."""
    return html.escape(shown(str(content)))


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{rows}</dl>'


def _model_facts(model: Any) -> str:
    config, base = model.config, model.config.backbone_config
    layers = config.adapted_layers
    if config.adaptation == "lora":
        where = "every block" if len(layers) == base.num_hidden_layers else f"blocks {', '.join(map(str, layers))}"
        adapters = f"rank {config.lora_rank} on {config.adapter_targets} of {where}"
    else:
        adapters = {"frozen": "none, only the projection is trained", "full": "none, the whole base is trained"}[
            config.adaptation
        ]
    facts = {
        "base": str(without_folders(config.backbone)),
        "blocks": f"{base.num_hidden_layers} (0 to {base.num_hidden_layers - 1}), "
        f"{base.num_attention_heads} heads, {base.hidden_size} wide",
        "adapters": adapters,
        "embedding": f"{config.embedding_size} numbers",
    }
    if config.adaptation == "lora":
        facts["experts"] = ", ".join(config.domains)
    if config.has_router:
        facts["router"] = f"before block {config.router_layer}"
    return f"<section><h2>The model</h2>{_facts(facts)}</section>"


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------------------- one image


def _image_section(config: Any, name: str, look: ImageLook, most_bytes: int) -> str:
    face = _data_uri(look.picture, "JPEG", quality=92)
    grey = _data_uri(look.picture.convert("L"), "JPEG", quality=85)
    side = grid_side(look.attention)
    blocks, heads = look.attention.shape[:2]
    facts = _facts(
        {
            "embedding norm": f"{look.norm:.3f}",
            "input": f"{look.picture.width} x {look.picture.height} px, {side} x {side} patches",
        }
    )
    norm_note = (
        "The norm, before the embedding is made one long, follows the image's quality. "
        "Compare it with other images of this model only."
    )
    maps = f'<div class="maps" style="--columns:{heads + 1}">{_cls_maps(look.attention, blocks, heads)}</div>'
    used = ""
    if config.adaptation == "lora":
        used = ", adapters and this image's own mix included" if config.has_router else ", adapters included"
    return f"""<section class="look" style="--face:url({face});--grey:url({grey});--side:{side}">
<h2>{_text(name)}</h2>
<div class="columns">
<div class="face" role="img" aria-label="the aligned face, as the model saw it"></div>
<div>{facts}<p class="note">{norm_note}</p>{_mix(config, look.mix)}</div>
</div>
<h3>Where CLS looks</h3>
<p class="note">CLS becomes the embedding. A row is a block, a column a head. Each map is scaled to its own strongest
patch; point at it for numbers. This is the attention that the model used{used}: what was read, not why the embedding
came out as it did.</p>
<div class="scroll">{maps}</div>
{_patch_section(look.attention, most_bytes)}
</section>"""


def _mix(config: Any, mix: np.ndarray | None) -> str:
    if mix is None:
        if config.adaptation != "lora":
            return '<p class="note">No router: this model has no experts to mix.</p>'
        return f'<p class="note">No router: the one expert, {_text(config.domains[0])}, always has the weight 1.</p>'
    bars = "".join(
        f'<div class="bar"><span>{_text(name)}</span>'
        f'<span class="track"><i style="width:{100 * weight:.2f}%"></i></span><b>{100 * weight:.1f}%</b></div>'
        for name, weight in zip(config.domains, mix.tolist(), strict=True)
    )
    first = config.router_layer
    uniform = {0: "", 1: " Block 0 mixes evenly."}.get(first, f" Blocks 0 to {first - 1} mix evenly.")
    return f'<h3>Router</h3>{bars}<p class="note">Weights of the experts from block {first} on.{uniform}</p>'


def _cls_maps(attention: np.ndarray, blocks: int, heads: int) -> str:
    """A row of maps a block: the mean of the heads, then each head."""
    columns: list[tuple[str, int | None]] = [("mean", None), *((f"head {head}", head) for head in range(heads))]
    cells = ["<span></span>", "<span>mean</span>", *(f"<span>{head}</span>" for head in range(heads))]
    for block in range(blocks):
        cells.append(f"<span>{block}</span>")
        for name, head in columns:
            values = attention_of(attention, block, head)
            text = (
                f"block {block}, {name}: {_percent(1 - values.sum())} on CLS itself, at most {_percent(values.max())}"
            )
            cells.append(f'<div class="map" title="{text} on a patch"><img alt="" src="{_heat(values)}"></div>')
    return "".join(cells)


def _percent(share: float) -> str:
    return f"{100 * max(0.0, float(share)):.1f}%"


def _heat(values: np.ndarray) -> str:
    """`(rows, columns)` of at least 0 as a picture of as many pixels, opaque where they are greatest."""
    shades = (15 * values / max(float(values.max()), 1e-12)).round().astype(np.uint8)
    picture = Image.fromarray(shades, "P")
    picture.putpalette(HEAT * 16)
    return _data_uri(picture, "PNG", bits=4, transparency=ALPHAS, optimize=False)


def _patch_section(attention: np.ndarray, most_bytes: int) -> str:
    title = "<h3>Which patch looks at which</h3>"
    packed = pack_attention(attention, most_bytes)
    if packed is None:
        note = "There are too many patches for this page; name a folder in place of it, and see the PNGs."
        return f'{title}<p class="note">{note}</p>'
    shape, content = packed
    last = attention.shape[0] - 1
    levels = shape["levels"]
    kept = "" if levels == 255 else f" It is kept in {levels} steps of that: less than half of one shows as none."
    heads = "" if shape["heads"] == attention.shape[1] else " Of this many tokens the page holds the mean of the heads."
    return f"""{title}
<noscript><p class="note">This part needs JavaScript.</p></noscript>
<div class="patches" hidden>
<p class="note">Point at a patch, or use the arrow keys; a click holds it. Each map is scaled to its own strongest
patch.{kept}{heads}</p>
<div class="columns">
<div class="chooser">
<div class="face" tabindex="0" role="img" aria-label="the face; arrow keys choose a patch"><i class="at"></i></div>
<label>block <output></output><input type="range" min="0" max="{last}" value="{last}"></label>
<button type="button">CLS</button><p class="note" aria-live="polite"></p></div>
<div class="big maps"></div>
</div>
</div>
<script type="text/plain" class="data" data-shape='{json.dumps(shape)}'>{content}</script>"""


def pack_attention(attention: np.ndarray, most_bytes: int) -> tuple[dict[str, int], str] | None:
    """Attention of one image as text that a page can carry, coarser if it must be smaller.

    Of each token that looks it holds the greatest attention to a patch and the attention to CLS, in 1/65535, and the
    attention to each patch in steps of that greatest one. Tried in this order until it fits: 255, 15 and 7 steps, then
    the same with the mean of the heads in place of each. What would have to take less than a bit a number is not tried.

    Args:
        attention (`np.ndarray` of shape `(L, heads, 1 + N, 1 + N)`): see [`attention_maps`].
        most_bytes (`int`): length of the text.
    Returns:
        shape (`blocks`, `heads`, `side`, `levels`), and the base64 text of the deflated numbers: little-endian uint16
        `(L, heads, 1 + N)` of the greatest, the same of CLS, and uint8 `(L, heads, 1 + N, N)`; None if nothing fits.
    """
    side = grid_side(attention)
    for maps in (attention, attention.mean(1, keepdims=True)):
        if maps.size > 8 * most_bytes:
            continue
        peak = maps[..., 1:].max(-1)  # (L, heads, 1 + N)
        whole = [np.rint(65535 * np.clip(part, 0, 1)).astype("<u2").tobytes() for part in (peak, maps[..., 0])]
        for levels in (255, 15, 7):
            steps = np.rint(levels * maps[..., 1:] / np.maximum(peak, 1e-12)[..., None]).astype(np.uint8)
            text = base64.b64encode(zlib.compress(b"".join([*whole, steps.tobytes()]))).decode()
            if len(text) <= most_bytes:
                return {"blocks": maps.shape[0], "heads": maps.shape[1], "side": side, "levels": levels}, text
    return None


# ------------------------------------------------------------------------------------------------------ the updates


def _updates(rows: Sequence[UpdateNorm], config: Any) -> str:
    title = "<h2>Size of the updates</h2>"
    if not rows:
        why = {
            "frozen": "the base is as it was",
            "full": "the base itself was trained, without its first state at hand",
        }
        return f'<section>{title}<p class="note">No adapters: {why[config.adaptation]}.</p></section>'
    most = max(row.relative for row in rows) or 1.0
    matrices = list(dict.fromkeys(row.matrix for row in rows))
    tables = []
    for expert in config.domains:
        cells = {(row.block, row.matrix): row for row in rows if row.expert == expert}
        lines = [f"<tr><th>block</th>{''.join(f'<th>{matrix}</th>' for matrix in matrices)}</tr>"]
        for block in dict.fromkeys(row.block for row in rows):
            name = "patches" if block is None else str(block)
            found = [cells.get((block, matrix)) for matrix in matrices]
            lines.append(f"<tr><th>{name}</th>{''.join(_update_cell(row, most) for row in found)}</tr>")
        tables.append(f"<table><caption>{_text(expert)}</caption>{''.join(lines)}</table>")
    return f"""<section>{title}
<p class="note">The norm of each expert's update, in percent of the norm of the frozen matrix that it is added to, if
the expert had the weight 1. Point at a number for the norm itself.</p>
<div class="scroll"><div class="tables">{"".join(tables)}</div></div></section>"""


def _update_cell(row: UpdateNorm | None, most: float) -> str:
    if row is None:
        return "<td></td>"
    depth, percent = 100 * row.relative / most, 100 * row.relative
    number = f"{percent:.1f}" if percent >= 1 else f"{percent:.2g}"
    return f'<td style="--depth:{depth:.0f}%" title="norm {row.norm:.4g}">{number}</td>'


# ----------------------------------------------------------------------------------------------------- many faces


def _distribution(look: FacesLook, config: Any) -> str:
    if look.mix is None:
        return f"<section><h2>The router's mixes</h2>{_mix(config, None)}</section>"
    labels = look.domain_labels()
    groups = "".join(
        _group(name, summary, config.domains, labels is not None)
        for name, summary in mix_summaries(look.mix, labels).items()
    )
    by = ", of all images and by their domain label" if labels is not None else ""
    return f"""<section><h2>The router's mixes</h2>
<p class="note">The weight of each expert{by}. The band is the middle 80% of the images, its dark part the middle 40%,
the line the median.</p>
<div class="groups">{groups}</div></section>"""


def _group(name: str, summary: MixSummary, experts: Sequence[str], headed: bool) -> str:
    title = f"<h3>{_text(name)} <small>{summary.images:,} images</small></h3>" if headed else ""
    rows = []
    for number, expert in enumerate(experts):
        low, inner, middle, outer, high = (
            100 * summary.deciles[DECILES.index(decile), number] for decile in (10, 30, 50, 70, 90)
        )
        band = f'<i class="pale" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>'
        band += f'<i style="left:{inner:.2f}%;width:{outer - inner:.2f}%"></i><u style="left:{middle:.2f}%"></u>'
        numbers = f"mean {100 * summary.mean[number]:.1f}%, first in {100 * summary.first[number]:.1f}%"
        rows.append(f'<div class="bar"><span>{_text(expert)}</span><span class="track">{band}</span></div>')
        rows.append(f'<p class="numbers">{numbers}</p>')
    return f"<div>{title}{''.join(rows)}</div>"


def scatters(look: FacesLook, experts: Sequence[str]) -> dict[str, list[str]]:
    """What the embeddings that are laid out are coloured by: title -> a name for each of them.

    Args:
        look: see [`look_at_faces`].
        experts: names of the K experts.
    Returns:
        `dict` of identity, domain label (if there are any) and the router's first expert (if there is a router) to
        `list` of M `str`.
    """
    found = {"identity": [shown(look.source.identities[look.source.labels[i]]) for i in look.chosen]}
    if (labels := look.domain_labels()) is not None:
        found["domain label"] = [shown(labels[i]) for i in look.chosen]
    if look.mix is not None:
        found["router's first expert"] = [experts[i] for i in look.mix[look.chosen].argmax(1)]
    return found


def _scatter_section(look: FacesLook, experts: Sequence[str], places: np.ndarray, method: str) -> str:
    files = [shown(look.source.key(index)) for index in look.chosen]
    drawn = "".join(_scatter(by, names, files, places, experts) for by, names in scatters(look, experts).items())
    how = {"tsne": "t-SNE", "umap": "UMAP"}[method]
    some = "" if len(look.chosen) == len(look.source) else f" of {len(look.source):,}, spread over the set"
    return f"""<section><h2>Embeddings</h2>
<p class="note">{len(look.chosen):,} embeddings{some}, laid out by {how}: neighbours are alike; how far groups lie apart
says little. Point at a dot for its name.</p>
<div class="scatters">{drawn}</div></section>"""


def _scatter(by: str, names: Sequence[str], files: Sequence[str], places: np.ndarray, experts: Sequence[str]) -> str:
    """Dots in a square of 100, those without a colour of their own below."""
    counts, colours = Counter(names), coloured(names, experts)
    centred = places - (places.max(0) + places.min(0)) / 2
    points = 50 + 47 * centred / max(float(np.abs(centred).max()), 1e-12)  # (M, 2)
    order = sorted(range(len(names)), key=lambda i: names[i] in colours)
    dots = "".join(
        f'<circle class="c{colours.get(names[i], "")}" cx="{points[i, 0]:.2f}" cy="{100 - points[i, 1]:.2f}" r="0.9">'
        f"<title>{_text(names[i])}: {_text(files[i])}</title></circle>"
        for i in order
    )
    legend = [f'<li class="c{number}">{_text(name)} ({counts[name]:,})</li>' for name, number in colours.items()]
    if others := sorted(counts.keys() - colours.keys()):
        name = f"{others[0]} ({counts[others[0]]:,})" if len(others) == 1 else f"{len(others):,} others"
        legend.append(f'<li class="c">{_text(name)}</li>')
    picture = f'<svg viewBox="0 0 100 100" role="img" aria-label="embeddings by {_text(by)}">{dots}</svg>'
    return f"<figure><figcaption>by {_text(by)}</figcaption>{picture}<ul>{''.join(legend)}</ul></figure>"
