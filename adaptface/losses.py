"""Margin heads for identity, and the losses of the router.

A head turns raw features and labels into scaled margin logits; the caller applies cross-entropy to them. Everything
here is computed in float32 with autocast switched off, whatever the model around it runs in. Means are taken over the
images this process holds, as data-parallel training expects; only AdaFace's norm statistics are shared by the ranks.

Labels are range-checked where that is free, on the CPU. On an accelerator the check would stall every step, so there
a label out of range stops with the device's own index assertion.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _float32_region(tensor: Tensor) -> AbstractContextManager:
    """Autocast off on the tensor's device; devices that know no autocast (meta) need nothing."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _check_matrix(name: str, values: Tensor, columns: int | None = None) -> None:
    if values.ndim != 2 or columns not in (None, values.shape[1]):
        raise ValueError(f"{name} must have shape (B, {columns or 'any'}), got {tuple(values.shape)}")


def _check_indices(name: str, indices: Tensor, batch: int, low: int | None = None, high: int | None = None) -> None:
    """One int64 index an image; each in `low` .. `high` - 1 (compared on the CPU only: elsewhere it would sync)."""
    if indices.shape != (batch,) or indices.dtype != torch.int64:
        raise ValueError(
            f"{name} must be int64 of shape ({batch},), one an image; got {indices.dtype} of {tuple(indices.shape)}"
        )
    if low is not None and high is not None and indices.device.type == "cpu":
        wrong = indices[(indices < low) | (indices >= high)]
        if wrong.numel():
            raise ValueError(f"{name} must lie in {low} .. {high - 1}, got {wrong[0].item()}")


class MarginHead(nn.Module):
    """One learned centre a class; logits are scaled cosines, with a margin taken off the target's.

    Args:
        embedding_size (`int`): width E of the features.
        num_classes (`int`): number C of training identities.
        scale (`float`): s, factor from cosine to logit.
        margin (`float`): m in 0 .. pi/2; what it means is the subclass's.
    Raises:
        ValueError: a size below 1, a scale that is not positive, a margin out of range (degrees, for instance).
    """

    def __init__(self, embedding_size: int, num_classes: int, scale: float, margin: float):
        super().__init__()
        if embedding_size < 1 or num_classes < 1:
            raise ValueError(f"embedding_size and num_classes must be >= 1, got {embedding_size} and {num_classes}")
        if not 0.0 < scale < math.inf:
            raise ValueError(f"scale must be a positive number, got {scale}")
        if not 0.0 <= margin <= math.pi / 2:
            raise ValueError(f"margin must lie in 0 .. pi/2 (cosine or radians, not degrees), got {margin}")
        self.scale, self.margin = float(scale), float(margin)
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))  # (C, E)
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """
        Args:
            features (`torch.FloatTensor` of shape `(B, E)`): raw features, not normalised.
            labels (`torch.LongTensor` of shape `(B,)`): identities, 0 .. C - 1.
        Returns:
            `torch.FloatTensor` of shape `(B, C)`: scaled margin logits in float32, for cross-entropy.
        Raises:
            ValueError: a shape or dtype does not fit, or (on the CPU) a label is out of range.
        """
        num_classes, embedding_size = self.weight.shape
        _check_matrix("features", features, embedding_size)
        _check_indices("labels", labels, len(features), 0, num_classes)
        with _float32_region(features):
            features, weight = features.float(), self.weight.float()
            # The norms divide the (B, C) product: no normalised copy of the (C, E) centres is kept for backward.
            inverse_norms = weight.norm(dim=1).clamp_min(1e-12).reciprocal()  # (C,)
            cosines = F.linear(F.normalize(features), weight) * inverse_norms  # (B, C)
            with torch.no_grad():  # only rounding leaves -1 .. 1: clip the value in place, leave the gradient alone
                cosines.clamp_(-1.0, 1.0)
            rows = torch.arange(len(labels), device=labels.device)
            target = self.margin_cosine(cosines[rows, labels], features)  # (B,)
            return cosines.index_put_((rows, labels), target).mul_(self.scale)

    def margin_cosine(self, cosine: Tensor, features: Tensor) -> Tensor:
        """Cosine to the own centre, `(B,)`, and raw features, `(B, E)` -> the cosine less its margin, `(B,)`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        num_classes, embedding_size = self.weight.shape
        return f"{embedding_size}, {num_classes}, scale={self.scale}, margin={self.margin}"


class CosFaceHead(MarginHead):
    """Additive cosine margin: the target's cosine becomes cos(theta) - m.

    Source: CosFace, arXiv:1801.09414, eq. 4.
    """

    def __init__(self, embedding_size: int, num_classes: int, scale: float = 64.0, margin: float = 0.35):
        super().__init__(embedding_size, num_classes, scale, margin)

    def margin_cosine(self, cosine: Tensor, features: Tensor) -> Tensor:
        return cosine - self.margin


class ArcFaceHead(MarginHead):
    """Additive angular margin (radians): the target's cosine becomes cos(theta + m).

    Beyond theta = pi - m, where cos(theta + m) would rise again, it goes on falling as cos(theta) - m sin(m).
    Source: ArcFace, arXiv:1801.07698, eq. 3; the extension: insightface recognition/arcface_torch/losses.py
    (2e2e8c9), `easy_margin = False`.
    """

    def __init__(self, embedding_size: int, num_classes: int, scale: float = 64.0, margin: float = 0.5):
        super().__init__(embedding_size, num_classes, scale, margin)

    def margin_cosine(self, cosine: Tensor, features: Tensor) -> Tensor:
        cosine = cosine.clamp(-1 + 1e-6, 1 - 1e-6)  # the slope of sin(theta) is infinite at +-1
        shifted = cosine * math.cos(self.margin) - (1 - cosine.square()).sqrt() * math.sin(self.margin)
        extended = cosine - self.margin * math.sin(self.margin)
        return torch.where(cosine > -math.cos(self.margin), shifted, extended)


class AdaFaceHead(MarginHead):
    """Margin adapted to image quality, which the norm of the raw feature stands for.

    With z = clip(h (norm - mean) / (std + 0.001), -1, 1), the target's cosine becomes cos(theta - m z) - (m + m z).
    Mean and standard deviation of the norms are running averages, kept as buffers (so in `state_dict`), updated in
    training mode only, from the images of all ranks together. A batch with a norm that is not finite leaves them alone.

    Source: AdaFace, arXiv:2204.00964, eq. 13-16; head.py of the reference (9cb9816), with its training script's
    `t_alpha` = 0.01. Cosines of other classes are not limited to +-0.999 as there, only the target's.

    Args:
        concentration (`float`): h; 0.333 puts about two thirds of the norms inside -0.333 .. 0.333.
        momentum (`float`): `t_alpha`, weight of the newest batch in the running averages.
    """

    running_mean: Tensor
    running_std: Tensor

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float = 64.0,
        margin: float = 0.4,
        concentration: float = 0.333,
        momentum: float = 0.01,
    ):
        super().__init__(embedding_size, num_classes, scale, margin)
        if not 0.0 < concentration < math.inf or not 0.0 < momentum <= 1.0:
            raise ValueError(f"need concentration > 0 and 0 < momentum <= 1, got {concentration} and {momentum}")
        self.concentration, self.momentum = concentration, momentum
        self.register_buffer("running_mean", torch.tensor(20.0))
        self.register_buffer("running_std", torch.tensor(100.0))

    def margin_cosine(self, cosine: Tensor, features: Tensor) -> Tensor:
        with torch.no_grad():
            raw = features.norm(dim=1)  # (B,)
            norms = raw.clamp(1e-3, 100.0)
            if self.training:
                self._update_statistics(norms, raw.isfinite().logical_not().sum())
            z = self.concentration * (norms - self.running_mean) / (self.running_std + 1e-3)
            z = z.clamp(-1.0, 1.0)
        angle = cosine.clamp(-1 + 1e-3, 1 - 1e-3).acos()
        angle = (angle - self.margin * z).clamp(1e-3, math.pi - 1e-3)
        return angle.cos() - (self.margin + self.margin * z)

    def _update_statistics(self, norms: Tensor, broken: Tensor) -> None:
        offsets = norms - self.running_mean  # about zero, so that the sum of squares loses no digits
        sums = torch.stack([torch.ones_like(norms).sum(), offsets.sum(), offsets.square().sum(), broken.float()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        count, total, squares, broken = sums
        mean = self.running_mean + total / count
        std = ((squares - total.square() / count).clamp_min(0.0) / (count - 1)).sqrt()  # unbiased; NaN for one image
        usable = mean.isfinite() & std.isfinite() & (broken == 0)
        for running, new in ((self.running_mean, mean), (self.running_std, std)):
            running.copy_(torch.where(usable, torch.lerp(running, new, self.momentum), running))


HEADS: dict[str, type[MarginHead]] = {"cosface": CosFaceHead, "arcface": ArcFaceHead, "adaface": AdaFaceHead}


def build_head(
    name: str, embedding_size: int, num_classes: int, scale: float = 64.0, margin: float | None = None
) -> MarginHead:
    """Margin head by name: "cosface", "arcface" or "adaface"; `margin=None` takes the published one (0.35, 0.5, 0.4).

    Raises:
        ValueError: an unknown name, or a value the head refuses.
    """
    if name not in HEADS:
        raise ValueError(f"unknown margin head {name!r}; choose one of {', '.join(HEADS)}")
    optional = {} if margin is None else {"margin": margin}
    return HEADS[name](embedding_size, num_classes, scale=scale, **optional)


def domain_cross_entropy(domain_logits: Tensor, domains: Tensor) -> Tensor:
    """Cross-entropy of the router over the images whose domain is known.

    Args:
        domain_logits (`torch.FloatTensor` of shape `(B, K)`): the router's logits.
        domains (`torch.LongTensor` of shape `(B,)`): 0 .. K - 1, or -1 where unlabelled.
    Returns:
        `torch.FloatTensor` scalar: mean over the labelled images; 0 (with zero gradients) if there is none.
    Raises:
        ValueError: a shape or dtype does not fit, or (on the CPU) a domain is out of range.
    """
    _check_matrix("domain_logits", domain_logits)
    _check_indices("domains", domains, len(domain_logits), -1, domain_logits.shape[1])
    total = F.cross_entropy(domain_logits.float(), domains, ignore_index=-1, reduction="sum")
    return total / (domains >= 0).sum().clamp_min(1)


def load_balancing_loss(domain_weights: Tensor) -> Tensor:
    """K * sum_k p_k^2 with p_k the mean weight of expert k over the batch: 1 if balanced, K if one expert has it all.

    Every image uses every expert by its weight, so the share of images sent to expert k (f_k of the source) is p_k
    itself. An image may be as decided as it likes: only the average over the batch is pulled to uniform.

    Args:
        domain_weights (`torch.FloatTensor` of shape `(B, K)`): mixing weights, rows sum to 1.
    Returns:
        `torch.FloatTensor` scalar in 1 .. K.
    Raises:
        ValueError: not two-dimensional.
    Source: Switch Transformer, arXiv:2101.03961, eq. 4, without its factor alpha.
    """
    _check_matrix("domain_weights", domain_weights)
    return domain_weights.shape[1] * domain_weights.float().mean(dim=0).square().sum()


def router_z_loss(domain_logits: Tensor) -> Tensor:
    """Mean over the images of logsumexp(logits)^2: keeps the router's logits small.

    Args:
        domain_logits (`torch.FloatTensor` of shape `(B, K)`): the router's logits.
    Returns:
        `torch.FloatTensor` scalar >= 0.
    Raises:
        ValueError: not two-dimensional.
    Source: ST-MoE, arXiv:2202.08906, eq. 5, without its factor.
    """
    _check_matrix("domain_logits", domain_logits)
    return domain_logits.float().logsumexp(dim=1).square().mean()


def domain_alignment_loss(embeddings: Tensor, labels: Tensor, domains: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss that draws one identity together across domains.

    Positives of an anchor: its identity in another (known) domain. Negatives: other identities. The same identity in
    the same or an unknown domain is neither. Anchors without a positive are left out of the mean.

    Args:
        embeddings (`torch.FloatTensor` of shape `(B, E)`): raw or L2-normalised; normalised here.
        labels (`torch.LongTensor` of shape `(B,)`): identities.
        domains (`torch.LongTensor` of shape `(B,)`): domains, -1 where unlabelled.
        temperature (`float`): divides the cosines.
    Returns:
        `torch.FloatTensor` scalar; 0 (with zero gradients) if no anchor has a positive.
    Raises:
        ValueError: a shape or dtype does not fit, or the temperature is not positive.
    Source: SupCon, arXiv:2004.11362, eq. 2 (the mean outside the logarithm); the choice of positives is ours.
    """
    _check_matrix("embeddings", embeddings)
    _check_indices("labels", labels, len(embeddings))
    _check_indices("domains", domains, len(embeddings))
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    same_identity = labels[:, None] == labels  # (B, B)
    known = domains >= 0
    positive = same_identity & (domains[:, None] != domains) & known[:, None] & known
    with _float32_region(embeddings):
        embeddings = F.normalize(embeddings.float())
        similarity = embeddings @ embeddings.T / temperature  # (B, B)
        # finfo.min, not -inf: a row with nothing to compare must not turn gradients into NaN.
        compared = similarity.masked_fill(~(positive | ~same_identity), torch.finfo(torch.float32).min)
        log_probability = similarity - compared.logsumexp(dim=1, keepdim=True)
        positives = positive.sum(dim=1)  # (B,)
        losses = -log_probability.where(positive, 0.0).sum(dim=1) / positives.clamp_min(1)
        return losses.sum() / (positives > 0).sum().clamp_min(1)
