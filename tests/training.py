"""A small training set, and runs on it inside the test process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import train_accelerate

IDENTITIES, IMAGES = 6, 9  # 54 images: an epoch is no multiple of a step


def write_faces(folder: Path) -> Path:
    """Coloured patterns, one a person, under noise; domains on most of them, and pairs for selection."""
    rng = np.random.default_rng(0)
    rows, pairs = ["file,domain"], ["fold,image_a,image_b,same"]
    for identity in range(IDENTITIES):
        (folder / "faces" / f"id_{identity}").mkdir(parents=True)
        pattern = rng.integers(0, 255, (7, 7, 3))
        for image in range(IMAGES):
            pixels = np.clip(pattern + rng.normal(0, 30, pattern.shape), 0, 255).astype(np.uint8)
            name = f"id_{identity}/{image}.png"
            Image.fromarray(pixels).resize((28, 28)).save(folder / "faces" / name)
            rows.append(f"{name},{['general', 'pose', 'age', ''][image % 4]}")
    for fold in range(10):
        one, other = fold % IDENTITIES, (fold + 1) % IDENTITIES
        pairs += [f"{fold},id_{one}/{fold % 9}.png,id_{one}/{(fold + 1) % 9}.png,1"]
        pairs += [f"{fold},id_{one}/{fold % 9}.png,id_{other}/{fold % 9}.png,0"]
    (folder / "faces" / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    (folder / "dev_pairs.csv").write_text("\n".join(pairs), encoding="utf-8")
    return folder


def words(faces: Path, base: Path, run: Path, **settings: Any) -> list[str]:
    """Command-line words of a small run: 3 epochs of 3 steps of 2 x 8 images, dropout on."""
    values = {
        "output_dir": run, "train_data": faces / "faces",
        "dev_pairs": faces / "dev_pairs.csv", "dev_images": faces / "faces",
        "backbone": base, "image_size": 28, "lora_rank": 4, "embedding_size": 16, "lora_dropout": 0.1, "scale": 16,
        "epochs": 3, "batch_size": 8, "gradient_accumulation": 2, "learning_rate": 0.01, "num_workers": 0,
        "log_every_steps": 2, "eval_every_epochs": 2, **settings,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


def train(faces: Path, base: Path, run: Path, **settings: Any) -> Path:
    """Run the script in this process."""
    AcceleratorState._reset_state(True)
    try:
        train_accelerate.main(words(faces, base, run, **settings))
    finally:
        AcceleratorState._reset_state(True)
    return run


def read_log(run: Path, *events: str) -> list[dict[str, Any]]:
    """The log without what the clock says, and without the lines that only say how the run was started."""
    clock = {"seconds", "images_per_second"}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = events or ("train", "dev", "skip")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines if line["event"] in wanted]


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Trained weights and optimiser state of a checkpoint, flat."""
    tensors = dict(load_file(folder / "trained.safetensors"))
    optimizer = torch.load(folder / "optimizer.bin", weights_only=True)
    for index, entries in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in entries.items()}
    for index, group in enumerate(optimizer["param_groups"]):
        tensors[f"optimizer.rate.{index}"] = torch.tensor(group["lr"], dtype=torch.float64)
    return tensors


def assert_same_run(run: Path, reference: Path) -> None:
    """Bit for bit: newest checkpoint, development history, final model, log."""
    name = sorted(path.name for path in (reference / "checkpoints").iterdir())[-1]
    ours, theirs = checkpoint_tensors(run / "checkpoints" / name), checkpoint_tensors(reference / "checkpoints" / name)
    assert ours.keys() == theirs.keys()
    assert any(key.startswith("optimizer.") for key in ours)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
    state, expected = ((r / "checkpoints" / name / "state.json").read_text(encoding="utf-8") for r in (run, reference))
    assert state == expected
    for folder in ("best", "last"):
        ours, theirs = (
            load_file(run / folder / "model.safetensors"),
            load_file(reference / folder / "model.safetensors"),
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), folder
    assert read_log(run) == read_log(reference)
