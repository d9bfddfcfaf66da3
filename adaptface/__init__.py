"""AdaptFace: Domain-Aware LoRA face embeddings on a frozen vision backbone."""

__version__ = "0.1.0"
