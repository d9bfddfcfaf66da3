"""Everything that is needed to rebuild an AdaptFace model: the base it stands on, its adapters and its router."""

import math
import re
from typing import Any

import transformers
from transformers import Dinov2Config, PretrainedConfig
from transformers.utils import logging
from transformers.utils.versions import require_version

# From the oldest version that CI tests up to a major one that nobody knows; pyproject.toml and README say the same.
OLDEST_TRANSFORMERS, UNKNOWN_TRANSFORMERS = "4.57", "6"
require_version(
    f"transformers>={OLDEST_TRANSFORMERS}", f"For AdaptFace pip install -U 'transformers>={OLDEST_TRANSFORMERS}'"
)
if int(transformers.__version__.split(".")[0]) >= int(UNKNOWN_TRANSFORMERS):
    logging.get_logger(__name__).warning(
        f"AdaptFace is tested up to transformers {UNKNOWN_TRANSFORMERS}, this is {transformers.__version__}: look for "
        f"a newer release of this model, or pip install 'transformers<{UNKNOWN_TRANSFORMERS}'"
    )

ADAPTATIONS = ("lora", "frozen", "full")
ADAPTER_TARGETS = ("attention", "attention+mlp", "all-linear")

# Written into a base's config by the machine that saved it; says nothing of the architecture, may hold a local path.
_NOT_ARCHITECTURE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


class AdaptFaceConfig(PretrainedConfig):
    """Configuration of [`AdaptFaceModel`].

    Args:
        backbone (`str`): Hub id or local folder of the frozen Dinov2 base.
        backbone_revision (`str`, *optional*): commit of the base; filled in by `AdaptFaceModel.from_backbone`.
        backbone_sha256 (`str`, *optional*): digest of the base's weight files, checked whenever the base is loaded.
        backbone_config (`Dinov2Config` or `dict`, *optional*): architecture of the base (default: dinov2-small).
        adaptation (`str`): `lora` (adapters + projection train), `frozen` (projection only) or `full` (everything).
        adapter_targets (`str`): `attention` (q, k, v, o), `attention+mlp`, or `all-linear` (these and the patch
            embedding).
        adapter_layers (`list[int]`, *optional*): blocks that carry adapters, counted from 0; all by default.
        lora_rank (`int`): rank r of each expert.
        lora_alpha (`float`): numerator of the scaling; see [`~AdaptFaceConfig.scaling`].
        use_rslora (`bool`): scale by `alpha / sqrt(r)` (arXiv:2312.03732) instead of `alpha / r`.
        lora_dropout (`float`): dropout on the adapters' input, in `[0, 1)`.
        domains (`list[str]`): names of the K experts. One name is plain LoRA, without a router.
        router_layer (`int`, *optional*): the router reads the CLS token that enters this block; earlier blocks mix
            uniformly. 0 reads the mean patch embedding. Default: the middle block.
        router_hidden_size (`int`): width of the router's hidden layer.
        router_dropout (`float`): dropout of the router's hidden layer, in `[0, 1)`.
        embedding_size (`int`): width E of the embeddings.
        image_size (`int`): side of the input in pixels, a multiple of the base's patch size.
        tensors_sha256 (`str`, *optional*): digest of the tensors in the weights file, checked whenever the model is
            loaded; filled in by `AdaptFaceModel.save_pretrained`.
        thresholds (`dict`, *optional*): decision thresholds with protocol and FAR, written by evaluation; see
            [`~AdaptFaceConfig.threshold`] and [`~AdaptFaceConfig.match_probability`].

    Raises:
        ValueError: a value is out of range; the message names field, value and remedy.
    """

    model_type = "adaptface"
    sub_configs = {"backbone_config": Dinov2Config}  # noqa: RUF012  (the name and form that transformers reads)

    def __init__(
        self,
        backbone: str = "facebook/dinov2-small",
        backbone_revision: str | None = None,
        backbone_sha256: str | None = None,
        backbone_config: Dinov2Config | dict[str, Any] | None = None,
        adaptation: str = "lora",
        adapter_targets: str = "attention",
        adapter_layers: list[int] | None = None,
        lora_rank: int = 16,
        lora_alpha: float = 16.0,
        use_rslora: bool = True,
        lora_dropout: float = 0.0,
        domains: list[str] | tuple[str, ...] = ("general", "pose", "age"),
        router_layer: int | None = None,
        router_hidden_size: int = 256,
        router_dropout: float = 0.1,
        embedding_size: int = 512,
        image_size: int = 224,
        tensors_sha256: str | None = None,
        thresholds: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if backbone_config is None:
            backbone_config = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518}  # dinov2-small
        elif isinstance(backbone_config, PretrainedConfig):
            backbone_config = backbone_config.to_dict()
        elif not isinstance(backbone_config, dict):
            raise ValueError(f"AdaptFaceConfig.backbone_config={backbone_config!r}: give a Dinov2Config or a dict")
        if backbone_config.get("model_type", "dinov2") != "dinov2":
            raise ValueError(
                f"backbone_config.model_type={backbone_config['model_type']!r}: AdaptFace adapts Dinov2 models; "
                "choose a base whose config.json says model_type 'dinov2'"
            )
        architecture = {key: value for key, value in backbone_config.items() if key not in _NOT_ARCHITECTURE}
        self.backbone_config = Dinov2Config(**architecture)
        self.backbone = str(backbone)
        self.backbone_revision = backbone_revision
        self.backbone_sha256 = backbone_sha256
        self.adaptation = adaptation
        self.adapter_targets = adapter_targets
        self.adapter_layers = adapter_layers
        if isinstance(adapter_layers, (list, tuple)) and all(type(layer) is int for layer in adapter_layers):
            self.adapter_layers = sorted(adapter_layers)
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.use_rslora = use_rslora
        self.lora_dropout = lora_dropout
        self.domains = list(domains) if isinstance(domains, tuple) else domains
        self.router_hidden_size = router_hidden_size
        self.router_dropout = router_dropout
        self.embedding_size = embedding_size
        self.image_size = image_size
        self.tensors_sha256 = tensors_sha256
        self.thresholds = thresholds
        self.router_layer = router_layer
        if router_layer is None and adaptation == "lora" and isinstance(self.domains, list) and len(self.domains) > 1:
            self.router_layer = self.backbone_config.num_hidden_layers // 2
        super().__init__(**kwargs)
        self._validate()

    @property
    def num_domains(self) -> int:
        """K, the number of experts."""
        return len(self.domains)

    @property
    def has_router(self) -> bool:
        """Whether the mix depends on the image: several experts, and adapters to mix."""
        return self.adaptation == "lora" and self.num_domains > 1

    @property
    def scaling(self) -> float:
        """s in `W x + s * sum_k w_k B_k A_k x`: `alpha / sqrt(r)` (rsLoRA) or `alpha / r`."""
        return self.lora_alpha / (self.lora_rank**0.5 if self.use_rslora else self.lora_rank)

    def threshold(self, far: float) -> float:
        """Cosine similarity above which two faces count as one person.

        Args:
            far: false accept rate, one of those that were measured.
        Raises:
            ValueError: it was not measured; names those that were.
        """
        points = {point["far"]: point["threshold"] for point in (self.thresholds or {}).get("operating_points", ())}
        if far not in points:
            measured = f"measured are {', '.join(f'{rate:g}' for rate in points)}" if points else "none was measured"
            raise ValueError(f"no threshold at a false accept rate of {far:g}: {measured}")
        return points[far]

    def match_probability(self, similarity: float, prior: float = 0.5) -> float:
        """Probability that two faces of this cosine similarity are one person.

        Args:
            prior: the probability before looking, in `(0, 1)`.
        Raises:
            ValueError: no calibration was measured.
        """
        if not self.thresholds:
            raise ValueError("no match probability: no calibration was measured")
        calibration = self.thresholds["calibration"]
        logit = calibration["slope"] * similarity + calibration["intercept"] + math.log(prior / (1 - prior))
        return (1 + math.tanh(logit / 2)) / 2

    @property
    def adapted_layers(self) -> list[int]:
        """Indices of the blocks that carry adapters, ascending; empty unless `adaptation="lora"`."""
        if self.adaptation != "lora":
            return []
        if self.adapter_layers is None:
            return list(range(self.backbone_config.num_hidden_layers))
        return self.adapter_layers

    def _validate(self) -> None:
        def require(ok: bool, field: str, remedy: str) -> None:
            if not ok:
                raise ValueError(f"AdaptFaceConfig.{field}={getattr(self, field)!r}: {remedy}")

        base = self.backbone_config
        layers = base.num_hidden_layers
        require(self.adaptation in ADAPTATIONS, "adaptation", f"choose one of {', '.join(ADAPTATIONS)}")
        require(
            self.adapter_targets in ADAPTER_TARGETS, "adapter_targets", f"choose one of {', '.join(ADAPTER_TARGETS)}"
        )
        for field in ("lora_rank", "router_hidden_size", "embedding_size", "image_size"):
            value = getattr(self, field)
            require(type(value) is int and value > 0, field, "give a whole number above 0")
        require(
            type(self.lora_alpha) in (int, float) and 0 < self.lora_alpha < float("inf"),
            "lora_alpha", "give a finite number above 0",
        )  # fmt: skip
        require(isinstance(self.use_rslora, bool), "use_rslora", "give True or False")
        for field in ("lora_dropout", "router_dropout"):
            value = getattr(self, field)
            require(type(value) in (int, float) and 0 <= value < 1, field, "give a number in [0, 1)")
        names = self.domains
        require(
            isinstance(names, list) and bool(names) and all(isinstance(n, str) and n for n in names)
            and len(set(names)) == len(names),
            "domains", "give a list of at least one name, each of them once",
        )  # fmt: skip
        require(  # they name folders of a release
            all(re.fullmatch(r"\w([\w .-]*[\w-])?", name) for name in names)
            and len({name.lower() for name in names}) == len(names),
            "domains", "give names of letters, digits, ' ', '.', '-' and '_' that differ in more than their case",
        )  # fmt: skip
        chosen = self.adapter_layers
        if chosen is not None:
            require(
                isinstance(chosen, list)
                and bool(chosen)
                and all(type(i) is int and 0 <= i < layers for i in chosen)
                and len(set(chosen)) == len(chosen),
                "adapter_layers", f"name blocks of the base, 0 to {layers - 1}, each once; None adapts all",
            )  # fmt: skip
        if self.has_router:
            last = max(self.adapted_layers)
            require(
                type(self.router_layer) is int and 0 <= self.router_layer <= last,
                "router_layer", f"give a block from 0 to {last}, the last adapted one, so that the mix has a use",
            )  # fmt: skip
        if self.thresholds is not None:
            try:
                numbers = [point[key] for point in self.thresholds["operating_points"] for key in ("far", "threshold")]
                numbers += [self.thresholds["calibration"][key] for key in ("slope", "intercept")]
                readable = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
            except (KeyError, TypeError):
                readable = False
            require(readable, "thresholds", "leave them to eval_benchmarks.py --write_thresholds")
        patch = base.patch_size
        require(
            isinstance(patch, int) and self.image_size % patch == 0,
            "image_size", f"give a multiple of the base's patch size, {patch}",
        )  # fmt: skip
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if getattr(base, field):
                raise ValueError(
                    f"backbone_config.{field}={getattr(base, field)!r}: the base runs without noise; set it to 0"
                )


AdaptFaceConfig.register_for_auto_class()
