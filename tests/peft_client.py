"""What plain peft makes of an adapter, under the transformers and peft of whichever interpreter runs this.

    PYTHON tests/peft_client.py < job.json          or          answers = answer(job)

The job: `{"project": folder of the shipped modules, "images": npy file (B, 3, H, W), "answer": JSON file to write,
"tasks": [...]}`, each task being `{"do": name of a function below, ...its arguments}`. A task that fails answers
`{"error": ...}`. CLS tokens are computed in float64, so that a difference is a difference of what is computed.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, Dinov2Model


def cls_of(model, images):
    """`(B, D)` CLS tokens in float64, as lists."""
    with torch.no_grad():
        return model.double().eval()(pixel_values=images.double()).last_hidden_state[:, 0].tolist()


def load(images, base, adapter, **options):
    """`PeftModel.from_pretrained` on a plain base: CLS without, with and with merged adapter."""
    plain = Dinov2Model.from_pretrained(base)
    seen = {"plain": cls_of(plain, images)}
    model = PeftModel.from_pretrained(Dinov2Model.from_pretrained(base), adapter, **options)
    seen["parameters"] = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    seen["cls"] = cls_of(model, images)
    seen["merged"] = cls_of(model.merge_and_unload(), images)
    return seen


def load_alone(images, adapter, **options):
    """`AutoPeftModel`: the adapter says what its base is."""
    return {"cls": cls_of(peft.AutoPeftModel.from_pretrained(adapter, **options), images)}


def auto(images, source):
    """`AutoModel` with the source's own code."""
    model = AutoModel.from_pretrained(source, trust_remote_code=True)
    parts = sorted(name for name, _ in model.named_children() if name in ("adapters", "projection", "router"))
    return {"class": type(model).__name__, "parts": parts}


def train(images, base, out, steps=3, **options):
    """A few steps of plain peft; the adapter is saved to `out`."""
    torch.manual_seed(0)
    model = get_peft_model(Dinov2Model.from_pretrained(base), LoraConfig(**options))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(pixel_values=images).last_hidden_state[:, 0, ::2].mean().backward()
        optimizer.step()
    model.save_pretrained(out)
    return {"plain": cls_of(Dinov2Model.from_pretrained(base), images), "cls": cls_of(model, images)}


def from_peft(images, adapter, **options):
    """`AdaptFaceModel.from_peft`; CLS of the model as it computes, and merged."""
    from modeling_adaptface import AdaptFaceModel

    model = AdaptFaceModel.from_peft(adapter, **options).double().eval()
    with torch.no_grad():
        cls = model(images.double(), output_hidden_states=True).last_hidden_state[:, 0]
    return {"cls": cls.tolist(), "merged": cls_of(model.merged_backbone(), images)}


def answer(job):
    """The answers to a job, in the order of its tasks; each with what was said: warnings and log records."""
    images = torch.from_numpy(np.load(job["images"]))
    functions = {f.__name__: f for f in (load, load_alone, auto, train, from_peft)}
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    answers = []
    for task in job["tasks"]:
        options = dict(task)
        said.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                seen = functions[options.pop("do")](images, **options)
            except Exception as error:
                seen = {"error": f"{type(error).__name__}: {error}"}
        # a FutureWarning or a DeprecationWarning is peft's own affair with transformers and torch
        texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        answers.append({**seen, "said": [*texts, *said]})
    logging.getLogger().removeHandler(handler)
    return answers


if __name__ == "__main__":
    job = json.load(sys.stdin)
    sys.path.insert(0, job["project"])
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    content = {"versions": versions, "answers": answer(job)}
    Path(job["answer"]).write_text(json.dumps(content), encoding="utf-8")
