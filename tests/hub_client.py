"""A stranger's process: loads models by name with transformers only. Run by path, with a JSON job on standard input.

The job: `{"clean_load": path of adaptface/clean_load.py, "images": npy file, "answer": JSON file to write,
"loads": [...]}`, each load being `{"name", "source", "revision", "code_revision", "token", "force_download", "dtype",
"resave", "pipeline", "disk"}`, all but the first two optional; "disk" is the size in bytes that files may have. The
answer maps each name to what was seen. On standard error a line `== NAME` precedes what a load has to say.
"""

import json
import logging
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

with suppress(ImportError):  # Windows has none
    import resource

job = json.load(sys.stdin)
clean_load = runpy.run_path(job["clean_load"])
clean_load["declared_only"](["numpy", "pillow", "safetensors", "torch", "transformers"])

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline  # noqa: E402


@contextmanager
def disk_of(size: int | None) -> Iterator[None]:
    """No file grows beyond `size` bytes; what tries to gets the error of a full disk."""
    if size is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run(load: dict) -> dict:
    source, options = load["source"], {"trust_remote_code": True}
    options |= {name: load[name] for name in ("revision", "code_revision", "token", "force_download") if load.get(name)}
    images = list(np.load(job["images"]))
    config = AutoConfig.from_pretrained(source, **options)
    processor = AutoImageProcessor.from_pretrained(source, **options)
    model, info = AutoModel.from_pretrained(
        source, dtype=getattr(torch, load.get("dtype", "float32")), output_loading_info=True, **options
    )
    pixel_values = processor(images)["pixel_values"].to(model.dtype)
    with torch.no_grad():
        embeddings = model(pixel_values).pooler_output.float()
    seen = {
        "code": type(model).__module__,
        "classes": [f"{type(x).__module__.split('.')[0]}.{type(x).__name__}" for x in (config, processor, model)],
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "training": model.training,
        "info": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "embeddings": embeddings.tolist(),
    }
    if load.get("pipeline"):
        extractor = pipeline("image-feature-extraction", model=source, pool=True, dtype=torch.float32, **options)
        seen["pipeline"] = [extractor(Image.fromarray(image))[0] for image in images]
    if load.get("resave"):
        model.save_pretrained(load["resave"])
        processor.save_pretrained(load["resave"])
        seen["resaved"] = run({"source": load["resave"]})
    return seen


collector = clean_load["Collector"]()
for name in ("", "transformers", "huggingface_hub"):
    logging.getLogger(name).addHandler(collector)
answer: dict[str, dict] = {}
for load in job["loads"]:
    print(f"== {load['name']}", file=sys.stderr, flush=True)
    collector.messages.clear()
    try:
        with disk_of(load.get("disk")):
            answer[load["name"]] = run(load)
    except Exception as error:
        answer[load["name"]] = {"error": f"{type(error).__name__}: {error}"}
    answer[load["name"]]["messages"] = list(dict.fromkeys(collector.messages))
Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")
