"""What a training step is made of: model, identity head and losses, the optimiser, and the augmentation of a recipe."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Dinov2Config

from adaptface.data.augmentation import Operation, build_augmentation
from adaptface.losses import (
    build_head,
    domain_alignment_loss,
    domain_cross_entropy,
    load_balancing_loss,
    router_z_loss,
)
from adaptface.settings import TrainSettings
from modeling_adaptface import AdaptFaceModel


class FaceTrainer(nn.Module):
    """Model, identity head and losses as one module: data parallelism and autocast see a single forward pass."""

    def __init__(self, model: AdaptFaceModel, head: nn.Module, settings: TrainSettings) -> None:
        super().__init__()
        self.model, self.head, self.settings = model, head, settings

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, domains: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, S, S)`): processed faces.
            labels (`torch.LongTensor` of shape `(B,)`): identities.
            domains (`torch.LongTensor` of shape `(B,)`): domains, -1 where unlabelled.
        Returns:
            Scalars: `loss`, its parts, and `usage_DOMAIN`, the mean weight of each expert.
        """
        weights = self.settings
        output = self.model(pixel_values)  # features (B, E), domain_logits and domain_weights (B, K) or None
        terms = {"identity_loss": F.cross_entropy(self.head(output.features, labels), labels)}  # logits (B, C)
        loss = terms["identity_loss"]
        if output.domain_logits is not None:
            terms["domain_loss"] = domain_cross_entropy(output.domain_logits, domains)
            terms["balance_loss"] = load_balancing_loss(output.domain_weights)
            terms["router_z_loss"] = router_z_loss(output.domain_logits)
            loss = (
                loss
                + weights.domain_loss_weight * terms["domain_loss"]
                + weights.balance_loss_weight * terms["balance_loss"]
                + weights.router_z_loss_weight * terms["router_z_loss"]
            )
            usage = output.domain_weights.detach().float().mean(dim=0)  # (K,)
            terms |= {f"usage_{name}": share for name, share in zip(weights.domains, usage, strict=True)}
        if weights.alignment_loss_weight > 0:
            terms["alignment_loss"] = domain_alignment_loss(
                output.features, labels, domains, weights.alignment_temperature
            )
            loss = loss + weights.alignment_loss_weight * terms["alignment_loss"]
        return {"loss": loss, **terms}


def build_optimizer(trainer: FaceTrainer, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW; biases, norms and position embeddings do not decay, the head may have its own learning rate."""
    head_rate = settings.learning_rate if settings.head_learning_rate is None else settings.head_learning_rate
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in trainer.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "head" if name.startswith("head.") else "model"
        decays = parameter.ndim >= 2 and not name.endswith(("position_embeddings", "cls_token", "mask_token"))
        rate = head_rate if part == "head" else settings.learning_rate
        group = groups.setdefault(
            (part, decays),
            {"params": [], "part": part, "peak_lr": rate, "weight_decay": settings.weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), lr=settings.learning_rate)


def build_trainer(model: AdaptFaceModel, identities: int, settings: TrainSettings) -> FaceTrainer:
    """The model with a new identity head."""
    head = build_head(settings.head, settings.embedding_size, identities, scale=settings.scale, margin=settings.margin)
    return FaceTrainer(model, head, settings)


def prepare_model(model: AdaptFaceModel, settings: TrainSettings) -> None:
    """Hold the base in the precision, and keep the activations, that the settings ask for."""
    if settings.holds_base_in_bfloat16 and model.backbone is not None:
        model.backbone.to(torch.bfloat16)
    if settings.gradient_checkpointing:
        new_name = "activation_checkpointing_enable"
        old_name = "gradient_checkpointing_enable"
        getattr(model, new_name if hasattr(model, new_name) else old_name)({"use_reentrant": False})


def augmentation_of(settings: TrainSettings) -> Operation:
    """What happens to a training image before the processor."""
    return build_augmentation(
        flip=settings.flip,
        randaugment_ops=settings.randaugment_ops,
        randaugment_magnitude=settings.randaugment_magnitude,
        low_resolution=settings.low_resolution,
        occlusion=settings.occlusion,
        crop=settings.crop,
        photometric=settings.photometric,
    )


def tiny_random_config(settings: TrainSettings) -> Dinov2Config:
    """Architecture of the base that `backbone: tiny-random` stands for."""
    return Dinov2Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2, patch_size=14,
        image_size=settings.image_size, layerscale_value=1.0, initializer_range=0.1,
    )  # fmt: skip
