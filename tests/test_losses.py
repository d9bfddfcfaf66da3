"""Margin heads and router losses against pytorch-metric-learning and against their formulas, one image at a time."""

import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import ArcFaceLoss, CosFaceLoss, SupConLoss
from torch import Tensor

from adaptface.losses import (
    AdaFaceHead,
    ArcFaceHead,
    CosFaceHead,
    MarginHead,
    build_head,
    domain_alignment_loss,
    domain_cross_entropy,
    load_balancing_loss,
    router_z_loss,
)

B, E, C = 12, 16, 7
HEADS = ["cosface", "arcface", "adaface"]


def batch(seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(B, E, generator=generator) * torch.linspace(0.2, spread, B)[:, None]
    return features, torch.randint(C, (B,), generator=generator)


def head_of(name: str, **kwargs: float) -> MarginHead:
    torch.manual_seed(1)
    return build_head(name, E, C, **kwargs)


# --- margin heads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("cosface", CosFaceLoss(C, E, margin=0.35, scale=64)),
        ("arcface", ArcFaceLoss(C, E, margin=math.degrees(0.5), scale=64)),
    ],
)
def test_head_equals_pytorch_metric_learning(name: str, oracle: torch.nn.Module) -> None:
    features, labels = batch()
    features[0] = -features[0]
    head = head_of(name)
    with torch.no_grad():
        # One image nearly opposite its centre: the far side of ArcFace's extension.
        features[0] = -3 * head.weight[labels[0]] + 0.001 * features[0]
        oracle.W.copy_(head.weight.T)
    mine, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    loss = F.cross_entropy(head(mine, labels), labels)
    expected = oracle(theirs, labels)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(head.weight.grad, oracle.W.grad.T, rtol=1e-3, atol=1e-3)


def cosface_target(theta: Tensor, norm: Tensor, head: MarginHead) -> Tensor:
    return theta.cos() - head.margin


def arcface_target(theta: Tensor, norm: Tensor, head: MarginHead) -> Tensor:
    if theta < math.pi - head.margin:
        return (theta + head.margin).cos()
    return theta.cos() - head.margin * math.sin(head.margin)


def adaface_target(theta: Tensor, norm: Tensor, head: MarginHead) -> Tensor:
    """arXiv:2204.00964, eq. 14 and 16, with the statistics the head holds after its forward pass."""
    assert isinstance(head, AdaFaceHead)
    quality = 0.333 * (norm - head.running_mean.double()) / (head.running_std.double() + 0.001)
    quality = max(-1.0, min(1.0, quality.item()))
    g_angle, g_add = -head.margin * quality, head.margin * quality + head.margin
    return (theta + g_angle).cos() - g_add


@pytest.mark.parametrize(
    ("name", "target"), [("cosface", cosface_target), ("arcface", arcface_target), ("adaface", adaface_target)]
)
def test_head_logits_and_gradients_equal_the_formula_in_loops(name: str, target: Callable[..., Tensor]) -> None:
    features, labels = batch()
    head = head_of(name, scale=10.0)
    mine = features.clone().requires_grad_()
    logits = head(mine, labels)
    upstream = torch.randn(B, C, generator=torch.Generator().manual_seed(3))
    (logits * upstream).sum().backward()

    naive, centres = features.double().requires_grad_(), head.weight.detach().double().requires_grad_()
    rows = []
    for i in range(B):
        norm = naive[i].square().sum().sqrt()
        row = []
        for j in range(C):
            cosine = naive[i] @ centres[j] / (norm * centres[j].square().sum().sqrt())
            if j == labels[i]:
                row.append(10.0 * target(cosine.acos(), norm.detach().clamp(0.001, 100), head))
            else:
                row.append(10.0 * cosine)
        rows.append(torch.stack(row))
    expected = torch.stack(rows)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad.double(), naive.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.weight.grad.double(), centres.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", HEADS)
def test_margin_lowers_the_target_logit_only(name: str) -> None:
    features, labels = batch()
    logits, cosines = head_of(name)(features, labels), head_of(name, margin=0.0)(features, labels)
    is_target = F.one_hot(labels, C).bool()
    assert (logits[is_target] < cosines[is_target] - 1).all()
    assert torch.equal(logits[~is_target], cosines[~is_target])


def test_arcface_target_falls_with_the_angle_everywhere() -> None:
    head = ArcFaceHead(2, 1, scale=1.0)
    angles = torch.linspace(0.01, math.pi - 0.01, 400)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0]]))
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    logits = head(points, torch.zeros(400, dtype=torch.int64))[:, 0]
    assert (logits.diff() < 0).all()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_cosines_have_finite_bounded_logits_and_gradients(name: str, sign: float) -> None:
    head = head_of(name)
    labels = torch.arange(C)
    features = (sign * 1e3 * head.weight.detach()).requires_grad_()
    logits = head(features, labels)
    F.cross_entropy(logits, labels).backward()
    assert logits.abs().max() <= 64 * (1 + 2 * 0.5)
    assert features.grad.isfinite().all() and head.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", HEADS)
def test_cosines_are_clamped_to_one(name: str) -> None:
    features = torch.randn(200, E, generator=torch.Generator().manual_seed(0))
    head = build_head(name, E, 201, scale=1.0)
    with torch.no_grad():
        head.weight[:200] = features * 0.37
    logits = head(features, torch.full((200,), 200))
    assert logits[:, :200].max() == 1.0
    assert (F.linear(F.normalize(features), F.normalize(head.weight)) > 1).any()  # so that it had something to clamp


@pytest.mark.parametrize("name", HEADS)
def test_autocast_does_not_change_a_bit(name: str) -> None:
    features, labels = batch()
    plain = head_of(name)(features, labels)
    head = head_of(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (features @ features.T).dtype == torch.bfloat16
        logits = head(features, labels)
        loss = domain_alignment_loss(features, labels, labels % 2)
    assert logits.dtype == torch.float32 and torch.equal(logits, plain)
    assert torch.equal(loss, domain_alignment_loss(features, labels, labels % 2))
    # Features that already are bfloat16 are lifted, not the centres lowered.
    low = head_of(name)(features.bfloat16(), labels)
    assert torch.equal(low, head_of(name)(features.bfloat16().float(), labels))


def test_adaface_averages_follow_the_batches_and_the_state_dict() -> None:
    head = AdaFaceHead(E, C)
    mean, std = 20.0, 100.0
    for seed in range(3):
        features, labels = batch(seed, spread=40.0)
        head(features, labels)
        norms = [min(max(math.sqrt(sum(x * x for x in row)), 0.001), 100.0) for row in features.tolist()]
        batch_mean = sum(norms) / B
        batch_std = math.sqrt(sum((n - batch_mean) ** 2 for n in norms) / (B - 1))
        mean, std = 0.01 * batch_mean + 0.99 * mean, 0.01 * batch_std + 0.99 * std
        assert head.running_mean.item() == pytest.approx(mean, rel=1e-5)
        assert head.running_std.item() == pytest.approx(std, rel=1e-5)
    restored = AdaFaceHead(E, C)
    restored.load_state_dict(head.state_dict())
    assert torch.equal(restored.running_mean, head.running_mean)
    assert torch.equal(restored.running_std, head.running_std)
    head.eval()
    before = head.state_dict()["running_mean"].clone()
    features, labels = batch(9)
    assert torch.equal(head(features, labels), restored.eval()(features, labels))
    assert torch.equal(head.running_mean, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_adaface_averages_survive_one_image_and_values_that_are_not_finite(value: float) -> None:
    head = AdaFaceHead(E, C)
    features, labels = batch()
    assert head(features[:1], labels[:1]).isfinite().all()
    features[3, 3] = value
    assert head(features, labels).isnan().any()  # the caller has to see it
    assert (head.running_mean.item(), head.running_std.item()) == (20.0, 100.0)


def test_adaface_gives_a_sharp_face_the_larger_additive_margin() -> None:
    head = AdaFaceHead(E, C, scale=1.0).eval()
    with torch.no_grad():
        head.running_std.fill_(10.0)
        direction = F.normalize(head.weight[0] + 0.004 * torch.randn(E), dim=0)
    labels = torch.zeros(2, dtype=torch.int64)
    poor, good = head(torch.stack([5 * direction, 60 * direction]), labels)[:, 0]
    assert good < poor


def _adaface_rank(rank: int, store: str, out: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    head = AdaFaceHead(E, C)
    features, labels = batch(spread=40.0)
    mine = slice(0, 5) if rank == 0 else slice(5, B)
    head(features[mine], labels[mine])
    torch.save(head.state_dict(), Path(out) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_adaface_averages_over_all_ranks(tmp_path: Path) -> None:
    store = (tmp_path / "store").as_uri()
    torch.multiprocessing.spawn(_adaface_rank, args=(store, str(tmp_path)), nprocs=2)
    alone = AdaFaceHead(E, C)
    alone(*batch(spread=40.0))
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(state["running_mean"], alone.running_mean)
        torch.testing.assert_close(state["running_std"], alone.running_std)


def test_build_head_uses_the_published_margins() -> None:
    margins = {name: build_head(name, E, C).margin for name in HEADS}
    assert margins == {"cosface": 0.35, "arcface": 0.5, "adaface": 0.4}
    head = build_head("cosface", E, C, scale=32.0, margin=0.3)
    assert (type(head), head.scale, head.margin) == (CosFaceHead, 32.0, 0.3)
    assert head.weight.shape == (C, E)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("softmax", E, C), "unknown margin head 'softmax'; choose one of cosface, arcface, adaface"),
        (("cosface", E, 0), "num_classes must be >= 1"),
        (("cosface", E, C, 0.0), "scale must be a positive number, got 0.0"),
        (("cosface", E, C, math.nan), "scale must be a positive"),
        (("arcface", E, C, 64.0, 28.6), r"margin must lie in 0 .. pi/2 .*not degrees.* got 28.6"),
        (("adaface", E, C, 64.0, -0.1), "margin must lie in"),
    ],
)
def test_build_head_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_head(*arguments)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.ones(2, E), torch.tensor([0, C]), f"labels must lie in 0 .. {C - 1}, got {C}"),
        (torch.ones(2, E), torch.tensor([-1, 0]), "labels must lie in 0"),
        (torch.ones(2, E), torch.tensor([0, 1, 2]), r"int64 of shape \(2,\)"),
        (torch.ones(2, E), torch.tensor([0.0, 1.0]), "got torch.float32"),
        (torch.ones(2, E + 1), torch.tensor([0, 1]), rf"features must have shape \(B, {E}\), got \(2, {E + 1}\)"),
    ],
)
def test_head_refuses_what_does_not_fit(features: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CosFaceHead(E, C)(features, labels)


def test_meta_device_needs_no_autocast() -> None:
    with torch.device("meta"):
        logits = AdaFaceHead(E, C)(torch.empty(B, E), torch.empty(B, dtype=torch.int64))
    assert logits.shape == (B, C)


# --- router losses ------------------------------------------------------------------------------------------------


def router_logits(k: int = 3) -> Tensor:
    return torch.randn(B, k, generator=torch.Generator().manual_seed(5)).mul(2).requires_grad_()


def test_domain_cross_entropy_averages_the_labelled_images() -> None:
    logits = router_logits()
    domains = torch.tensor([0, -1, 2, 1, -1, -1, 0, 0, 2, -1, 1, 1])
    expected, labelled = 0.0, 0
    for row, domain in zip(logits.tolist(), domains.tolist(), strict=True):
        if domain >= 0:
            expected -= math.log(math.exp(row[domain]) / sum(math.exp(x) for x in row))
            labelled += 1
    loss = domain_cross_entropy(logits, domains)
    loss.backward()
    assert loss.item() == pytest.approx(expected / labelled, rel=1e-5)
    assert (logits.grad[domains == -1] == 0).all() and (logits.grad[domains >= 0] != 0).all()


def test_domain_cross_entropy_without_labels_is_a_zero_that_trains_nothing() -> None:
    logits = router_logits()
    loss = domain_cross_entropy(logits, torch.full((B,), -1))
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros(B, 3))


@pytest.mark.parametrize("domain", [3, -2])
def test_domain_cross_entropy_refuses_an_unknown_domain(domain: int) -> None:
    domains = torch.zeros(B, dtype=torch.int64)
    domains[4] = domain
    with pytest.raises(ValueError, match=f"domains must lie in -1 .. 2, got {domain}"):
        domain_cross_entropy(router_logits(), domains)


def test_load_balancing_loss_is_one_when_balanced_and_k_when_collapsed() -> None:
    assert load_balancing_loss(torch.eye(3)).item() == pytest.approx(1.0)  # decided images, balanced batch
    assert load_balancing_loss(torch.full((5, 4), 0.25)).item() == pytest.approx(1.0)
    assert load_balancing_loss(torch.tensor([[1.0, 0.0, 0.0]] * 5)).item() == pytest.approx(3.0)
    assert load_balancing_loss(torch.ones(5, 1)).item() == pytest.approx(1.0)  # K = 1


def test_load_balancing_loss_equals_the_formula_and_levels_the_router() -> None:
    logits = router_logits()
    with torch.no_grad():
        logits[:, 1] += 2.0  # expert 1 is overused
    weights = logits.softmax(dim=1)
    loss = load_balancing_loss(weights)
    loss.backward()
    rows = weights.tolist()
    assert loss.item() == pytest.approx(3 * sum((sum(r[k] for r in rows) / B) ** 2 for k in range(3)), rel=1e-5)
    stepped = (logits - 5 * logits.grad).softmax(dim=1)
    assert stepped.mean(dim=0)[1] < weights.mean(dim=0)[1]
    assert load_balancing_loss(stepped) < loss


def test_router_z_loss_equals_the_formula() -> None:
    logits = router_logits()
    loss = router_z_loss(logits)
    loss.backward()
    expected = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits.tolist()) / B
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logits.grad.abs().sum() > 0
    assert router_z_loss(torch.full((2, 3), 1e4, dtype=torch.bfloat16)).isfinite()


ALIGNMENT_LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 4])
ALIGNMENT_DOMAINS = torch.tensor([0, 1, 1, 0, 2, 1, 1, -1, 0, 0, 1, 2])


def alignment_triples(labels: Tensor, domains: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """Positives and negatives of each anchor, from the words of the definition."""
    positives, negatives = [], []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i]
        known = [j for j in others if domains[i] >= 0 and domains[j] >= 0]
        positives.append([j for j in known if labels[j] == labels[i] and domains[j] != domains[i]])
        negatives.append([j for j in others if labels[j] != labels[i]])
    return positives, negatives


def test_domain_alignment_loss_and_gradient_equal_the_formula_in_loops() -> None:
    features, _ = batch(spread=1.0)
    mine, naive = features.clone().requires_grad_(), features.double().requires_grad_()
    loss = domain_alignment_loss(mine, ALIGNMENT_LABELS, ALIGNMENT_DOMAINS, temperature=0.2)
    positives, negatives = alignment_triples(ALIGNMENT_LABELS, ALIGNMENT_DOMAINS)
    unit = naive / naive.square().sum(dim=1, keepdim=True).sqrt()
    anchors = []
    for i in range(B):
        if positives[i]:
            total = sum(((unit[i] @ unit[j]) / 0.2).exp() for j in positives[i] + negatives[i])
            terms = [(((unit[i] @ unit[j]) / 0.2).exp() / total).log() for j in positives[i]]
            anchors.append(-sum(terms) / len(terms))
    expected = sum(anchors) / len(anchors)
    assert len(anchors) == 8  # of 12: identities 2 and 3 are in one known domain only
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.grad.double(), naive.grad, rtol=1e-4, atol=1e-6)


def test_domain_alignment_loss_equals_pytorch_metric_learning() -> None:
    features, _ = batch(spread=1.0)
    pairs: tuple[list[int], ...] = ([], [], [], [])
    for i, (positives, negatives) in enumerate(
        zip(*alignment_triples(ALIGNMENT_LABELS, ALIGNMENT_DOMAINS), strict=True)
    ):
        pairs[0].extend([i] * len(positives))
        pairs[1].extend(positives)
        pairs[2].extend([i] * len(negatives))
        pairs[3].extend(negatives)
    expected = SupConLoss(temperature=0.1)(
        features, ALIGNMENT_LABELS, indices_tuple=tuple(torch.tensor(p) for p in pairs)
    )
    torch.testing.assert_close(domain_alignment_loss(features, ALIGNMENT_LABELS, ALIGNMENT_DOMAINS), expected)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [0]])
def test_domain_alignment_loss_without_positives_is_a_zero_that_trains_nothing(labels: list[int]) -> None:
    features = torch.randn(len(labels), E, requires_grad=True)
    loss = domain_alignment_loss(features, torch.tensor(labels), torch.zeros(len(labels), dtype=torch.int64))
    with torch.autograd.set_detect_anomaly(True):  # no NaN even where a mask would hide it
        loss.backward()
    assert loss.item() == 0.0 and torch.equal(features.grad, torch.zeros_like(features))


def test_domain_alignment_loss_draws_domains_of_one_identity_together() -> None:
    features, _ = batch(spread=1.0)
    features.requires_grad_()
    domain_alignment_loss(features, ALIGNMENT_LABELS, ALIGNMENT_DOMAINS).backward()
    stepped = features - 0.1 * features.grad

    def same_identity(x: Tensor) -> Tensor:
        return F.cosine_similarity(x[3], x[4], dim=0)

    assert same_identity(stepped) > same_identity(features)
    assert domain_alignment_loss(stepped, ALIGNMENT_LABELS, ALIGNMENT_DOMAINS) < domain_alignment_loss(
        features, ALIGNMENT_LABELS, ALIGNMENT_DOMAINS
    )


def test_router_losses_refuse_wrong_shapes() -> None:
    vector, labels = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    for call in (
        lambda: domain_cross_entropy(vector, labels),
        lambda: load_balancing_loss(vector),
        lambda: router_z_loss(vector),
        lambda: domain_alignment_loss(vector, labels, labels),
    ):
        with pytest.raises(ValueError, match=r"must have shape \(B, any\), got \(3,\)"):
            call()
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
        domain_alignment_loss(torch.ones(3, 2), labels, labels, temperature=0)
    with pytest.raises(ValueError, match="domains must be int64"):
        domain_alignment_loss(torch.ones(3, 2), labels, labels[:2])
