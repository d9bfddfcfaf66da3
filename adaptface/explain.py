"""What happens inside a model: attention, the size of its updates, the router's mixes, embeddings laid out in a plane.

    look = look_at_image(model, processor, "face.jpg")
    attention_of(look.attention, block=11, patch=(6, 4))  # (rows, columns): where the patch looks, all heads' mean
    update_norms(model)                                   # of each adapted matrix and expert
    faces = look_at_faces(model, processor, open_source("data/faces", domains=None, training=False))
    project(faces.embeddings)                             # (M, 2)

Numbers only; [`adaptface.explain_page`] shows them. Attention says what a token reads in a block, not why the embedding
came out as it did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from adaptface.data.base import UNLABELLED, FaceSource
from adaptface.embedders import ModelEmbedder
from adaptface.embedding import feature_batches
from image_processing_adaptface import ImageLike
from modeling_adaptface import block_modules, target_shapes

CLS: Literal["cls"] = "cls"
UNLABELLED_NAME = "unlabelled"
DECILES = tuple(range(0, 101, 10))  # percent, with the least and the greatest value
METHODS = ("tsne", "umap")
_NEIGHBOURS = {"tsne": 30, "umap": 15}  # both libraries' own defaults; fewer where there are few images


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout and without gradients; a model in training is put back."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


# ---------------------------------------------------------------------------------------------------------- attention


def attention_maps(model: Any, pixel_values: torch.Tensor) -> np.ndarray:
    """The attention that the model's own forward pass used, with each image's own mix of experts.

    Args:
        model: `AdaptFaceModel`, of whatever adaptation.
        pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): images from the processor.
    Returns:
        `np.ndarray` of shape `(B, L, heads, 1 + N, 1 + N)`, float32: of L blocks, row = the token that looks, column =
        the token that is looked at, CLS first, then patches row by row. Rows sum to 1, of a model in half precision as
        nearly as that allows.
    """
    with _evaluating(model):
        return _stacked(model(pixel_values.to(model.device), output_attentions=True).attentions)


def _stacked(attentions: Sequence[torch.Tensor]) -> np.ndarray:
    return torch.stack([attention.float() for attention in attentions], 1).cpu().numpy()


def attention_of(
    maps: np.ndarray, block: int, head: int | None = None, patch: tuple[int, int] | Literal["cls"] = CLS
) -> np.ndarray:
    """Where one token of one image looks.

    Args:
        maps (`np.ndarray` of shape `(L, heads, 1 + N, 1 + N)`): of one square image, see [`attention_maps`].
        block (`int`): 0 to L - 1.
        head (`int`, *optional*): 0 to heads - 1; the mean of all by default.
        patch (`(row, column)` or `"cls"`): the token that looks, from the top left.
    Returns:
        `np.ndarray` of shape `(rows, columns)`: its attention to each patch. What is missing from 1 goes to CLS.
    Raises:
        ValueError: an index that is not there, or maps of another shape.
    """
    side = grid_side(maps)
    _require_index("block", block, maps.shape[0])
    if head is not None:
        _require_index("head", head, maps.shape[1])
    row = 0
    if patch != CLS:
        for name, index in zip(("row", "column"), patch, strict=True):
            _require_index(f"patch {name}", int(index), side)
        row = 1 + int(patch[0]) * side + int(patch[1])
    looked = maps[block, :, row, 1:]  # (heads, N)
    return (looked.mean(0) if head is None else looked[head]).reshape(side, side)


def grid_side(maps: np.ndarray) -> int:
    """Patches a side of the square image that attention `(L, heads, 1 + N, 1 + N)` is of.

    Raises:
        ValueError: it has another shape.
    """
    side = math.isqrt(maps.shape[-1] - 1)
    if maps.ndim != 4 or maps.shape[-1] != maps.shape[-2] or side**2 + 1 != maps.shape[-1]:
        raise ValueError(
            f"attention of shape {maps.shape}: give (blocks, heads, 1 + N, 1 + N) of one image with N patches in a "
            "square; attention_maps(...)[0] is the first image's"
        )
    return side


def _require_index(what: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ValueError(f"{what} {index}: there are {count}, 0 to {count - 1}")


# --------------------------------------------------------------------------------------------------------- the updates


class UpdateNorm(NamedTuple):
    """The size of one expert's update of one matrix.

    Attributes:
        block (`int`, *optional*): 0 to L - 1; None for the patch embedding.
        matrix (`str`): `q`, `k`, `v`, `proj`, `fc1` (`gate` and `up` of a gated MLP), `fc2` or `patch`.
        expert (`str`): name of the expert.
        norm (`float`): Frobenius norm of `s * B_k A_k`, as it is added at a weight of 1.
        relative (`float`): the same over the norm of the frozen matrix.
    """

    block: int | None
    matrix: str
    expert: str
    norm: float
    relative: float


def update_norms(model: Any) -> list[UpdateNorm]:
    """The size of each expert's update of each adapted matrix; empty for a model without adapters.

    Args:
        model: `AdaptFaceModel`.
    Returns:
        list of [`UpdateNorm`], by block, matrix and expert; the patch embedding first.
    """
    base = model.config.backbone_config
    rows: list[UpdateNorm] = []
    if model.patch_adapter is not None:
        kernel = model.backbone.embeddings.patch_embeddings.projection.weight
        rows += _norms_of(model, None, "patch", model.patch_adapter, [kernel])
    for index in model.config.adapted_layers:
        block = model.backbone.encoder.layer[index]
        frozen: dict[tuple[str, int], torch.Tensor] = {}
        for name, (target, parts) in block_modules(base).items():
            try:
                weight = block.get_submodule(name).weight
            except AttributeError:  # the name of another version of transformers
                continue
            frozen |= {(target, part): piece for part, piece in zip(parts, weight.chunk(len(parts)), strict=True)}
        for target, adapter in model.adapters[str(index)].items():
            pieces = [frozen[target, part] for part in range(len(target_shapes(base)[target][1]))]
            rows += _norms_of(model, index, target, adapter, pieces)
    return rows


@torch.no_grad()
def _norms_of(
    model: Any, block: int | None, target: str, adapter: Any, frozen: Sequence[torch.Tensor]
) -> list[UpdateNorm]:
    """Rows of one adapter, whose `lora_B` is split as its frozen matrices are."""
    names = {"qkv": ("q", "k", "v"), "fc1": ("gate", "up") if len(frozen) > 1 else ("fc1",)}.get(target, (target,))
    a = adapter.lora_A.detach().cpu().double()  # (K, r, in)
    pieces = adapter.lora_B.detach().cpu().double().split([len(weight) for weight in frozen], -1)  # (K, r, out) each
    rows = []
    for name, weight, b in zip(names, frozen, pieces, strict=True):
        size = float(torch.linalg.vector_norm(weight, dtype=torch.float32))
        # |B^T A|^2 = tr(A^T B B^T A) = sum of (B B^T) * (A A^T): r x r, never out x in
        squares = ((b @ b.mT) * (a @ a.mT)).sum((1, 2)).clamp(min=0)  # (K,)
        for expert, norm in zip(model.config.domains, (adapter.scaling * squares.sqrt()).tolist(), strict=True):
            rows.append(UpdateNorm(block, name, expert, norm, norm / size if size else math.inf))
    return rows


# ----------------------------------------------------------------------------------------------------------- one image


def router_mix(model: Any, pixel_values: torch.Tensor) -> np.ndarray | None:
    """How the router mixes the experts for each image.

    Args:
        model: `AdaptFaceModel`.
        pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): images from the processor.
    Returns:
        `np.ndarray` of shape `(B, K)`, float32, rows sum to 1, columns in the order of `model.config.domains`. None
        where there is no router: with one expert its weight is always 1, and without adapters there is no expert.
    """
    with _evaluating(model):
        return _mix_of(model(pixel_values.to(model.device)))


def _mix_of(output: Any) -> np.ndarray | None:
    return None if output.domain_weights is None else output.domain_weights.float().cpu().numpy()


@dataclass
class ImageLook:
    """What one image shows of a model.

    Attributes:
        picture (`PIL.Image.Image`): the crop as the model saw it, RGB, resized to its input.
        norm (`float`): length of the embedding before normalisation; it follows the image's quality.
        mix (`np.ndarray` of shape `(K,)`, *optional*): see [`router_mix`].
        attention (`np.ndarray` of shape `(L, heads, 1 + N, 1 + N)`): see [`attention_maps`].
    """

    picture: Image.Image
    norm: float
    mix: np.ndarray | None
    attention: np.ndarray


def look_at_image(model: Any, processor: Any, image: ImageLike, landmarks: Any = None) -> ImageLook:
    """Run one image through the model, once, and keep what can be looked at.

    Args:
        model: `AdaptFaceModel`.
        processor: its `AdaptFaceImageProcessor`.
        image: an aligned square crop, or with landmarks a photo, as the processor takes it.
        landmarks (array of shape `(5, 2)`, *optional*): the photo's, as the processor takes them.
    Raises:
        OSError, ValueError: the image cannot be read or is no square, the landmarks form no face; see the processor.
    """
    pixel_values = processor(image, landmarks=landmarks, return_tensors="pt")["pixel_values"]  # (1, 3, H, W)
    with _evaluating(model):
        output = model(pixel_values.to(model.device), output_attentions=True)
    mix = _mix_of(output)
    return ImageLook(
        picture=_picture(processor, pixel_values[0]),
        norm=float(output.features.float().norm()),
        mix=None if mix is None else mix[0],
        attention=_stacked(output.attentions)[0],
    )


def _picture(processor: Any, pixel_values: torch.Tensor) -> Image.Image:
    """`(3, H, W)` normalised values back to the pixels that they were made of."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (processor.image_mean, processor.image_std))
    pixels = (pixel_values * std + mean) / processor.rescale_factor
    return Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())


# ---------------------------------------------------------------------------------------------------------- many faces


@dataclass
class FacesLook:
    """What a set of faces shows of a model.

    Attributes:
        source (`FaceSource`): the N faces, with their identities and domain labels.
        norms (`np.ndarray` of shape `(N,)`): lengths of the embeddings before normalisation.
        mix (`np.ndarray` of shape `(N, K)`, *optional*): see [`router_mix`].
        chosen (`list` of M `int`): the images that are laid out, spread over the set.
        embeddings (`np.ndarray` of shape `(M, E)`): theirs, rows of length 1.
    """

    source: FaceSource
    norms: np.ndarray
    mix: np.ndarray | None
    chosen: list[int]
    embeddings: np.ndarray

    def domain_labels(self) -> list[str] | None:
        """Label of each image, "unlabelled" where it has none; None where the set has no label at all."""
        if not self.source.has_domains:
            return None
        names = self.source.domains
        return [UNLABELLED_NAME if i == UNLABELLED else names[i] for i in self.source.domain_labels.tolist()]


class _Crops:
    """A source's faces as [`feature_batches`] takes images."""

    def __init__(self, source: FaceSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Image.Image:
        return self.source.image(index)

    def where(self, index: int) -> str:
        return self.source.where(index)


class _MixedEmbedder(ModelEmbedder):
    """Features and the router's mix of an image in one row, `(B, E + K)`; without a router `(B, E)`."""

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with _evaluating(self.model):
            output = self.model(pixel_values)
        parts = [output.features] if output.domain_weights is None else [output.features, output.domain_weights]
        return torch.cat([part.float() for part in parts], 1)


def look_at_faces(
    model: Any,
    processor: Any,
    source: FaceSource,
    most: int = 2000,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = False,
) -> FacesLook:
    """Run every face of a source through the model, batch by batch, without mirror images.

    Args:
        model: `AdaptFaceModel`.
        processor: its `AdaptFaceImageProcessor`.
        source: aligned square faces; see `open_source`, best with `domains=None`, which takes any label.
        most (`int`): embeddings that are kept at most, for [`project`]; norms and mixes are kept of all.
        batch_size, num_workers, progress: see [`feature_batches`].
    Raises:
        OSError, ValueError: an image cannot be read or is no square; names it.
    """
    embedder = _MixedEmbedder(model, processor)
    width = model.config.embedding_size
    chosen = source.sample(most)
    kept = np.zeros(len(source), dtype=bool)
    kept[chosen] = True
    norms, mixes, embeddings = [], [], []
    for start, rows in feature_batches(
        embedder, _Crops(source), batch_size, flip=False, num_workers=num_workers, progress=progress
    ):
        features = rows[:, :width]
        norms.append(features.norm(dim=1).numpy())
        mixes.append(rows[:, width:].numpy())
        embeddings.append(F.normalize(features, dim=1).numpy()[kept[start : start + len(rows)]])
    mix = np.concatenate(mixes)
    return FacesLook(source, np.concatenate(norms), mix if mix.shape[1] else None, chosen, np.concatenate(embeddings))


class MixSummary(NamedTuple):
    """How the router mixes for a group of images.

    Attributes:
        images (`int`): how many.
        mean (`np.ndarray` of shape `(K,)`): mean weight of each expert; they sum to 1.
        deciles (`np.ndarray` of shape `(11, K)`): least weight, deciles, greatest weight; see `DECILES`.
        first (`np.ndarray` of shape `(K,)`): share of images in which the expert weighs most; they sum to 1.
    """

    images: int
    mean: np.ndarray
    deciles: np.ndarray
    first: np.ndarray


def mix_summaries(mix: np.ndarray, labels: Sequence[str] | None = None) -> dict[str, MixSummary]:
    """The router's distribution over a set of images.

    Args:
        mix (`np.ndarray` of shape `(N, K)`): see [`router_mix`].
        labels (sequence of N `str`, *optional*): a summary of each label's images follows the one of all.
    Returns:
        `dict` of label to [`MixSummary`], "all" first; a label of that name is called "label all".
    """

    def summary(rows: np.ndarray) -> MixSummary:
        first = np.bincount(rows.argmax(1), minlength=rows.shape[1]) / len(rows)
        return MixSummary(len(rows), rows.mean(0, dtype=np.float64), np.percentile(rows, DECILES, axis=0), first)

    found = {"all": summary(mix)}
    each = np.array(labels if labels is not None else [])
    for label in sorted(set(each.tolist())):
        found["label all" if label == "all" else label] = summary(mix[each == label])
    return found


def check_method(method: str) -> None:
    """That embeddings can be laid out so.

    Raises:
        ValueError: there is no such method.
        ImportError: it is `umap`, and umap-learn is not installed.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: choose one of {', '.join(METHODS)}")
    if method == "umap":
        try:
            import umap  # noqa: F401
        except ImportError as error:
            raise ImportError("UMAP needs umap-learn: pip install 'adaptface[umap]', or take method='tsne'") from error


def project(embeddings: np.ndarray, method: str = "tsne", seed: int = 0) -> np.ndarray:
    """Lay embeddings out in a plane, so that neighbours stay neighbours. Distances between far groups say little.

    Args:
        embeddings (`np.ndarray` of shape `(N, E)`): rows of length 1, so that distances follow cosine similarity.
        method (`str`): `tsne`, or `umap`, which needs umap-learn.
        seed (`int`): of the method's random numbers.
    Returns:
        `np.ndarray` of shape `(N, 2)`, float32; zeros where all embeddings are one.
    Raises:
        ValueError: another method, or embeddings that are no finite `(N, E)` array with a row at least.
        ImportError: umap-learn is not installed.
    Source: t-SNE, van der Maaten and Hinton, JMLR 9, 2008; UMAP, arXiv:1802.03426.
    """
    check_method(method)
    if embeddings.ndim != 2 or not embeddings.size or not np.isfinite(embeddings).all():
        raise ValueError(f"embeddings of shape {embeddings.shape}: give (N, E) finite numbers, N at least 1")
    count = len(embeddings)
    if not np.ptp(embeddings, axis=0).any():  # one point, whose place is no question
        return np.zeros((count, 2), dtype=np.float32)
    if method == "umap":
        return _umap(embeddings, min(_NEIGHBOURS["umap"], count - 1), seed)
    from sklearn.manifold import TSNE

    perplexity = max(1.0, min(_NEIGHBOURS["tsne"], (count - 1) / 3))  # three times as many neighbours are looked up
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(embeddings).astype(np.float32)


def _umap(embeddings: np.ndarray, neighbours: int, seed: int) -> np.ndarray:
    import umap

    if neighbours < 3:
        raise ValueError(f"UMAP needs 4 images, here are {neighbours + 1}; take method='tsne'")
    # The spectral start solves for more eigenvectors than a few images have.
    start = "spectral" if len(embeddings) > 10 else "random"
    reducer = umap.UMAP(n_neighbors=neighbours, metric="cosine", init=start, random_state=seed, n_jobs=1)
    return reducer.fit_transform(embeddings).astype(np.float32)
