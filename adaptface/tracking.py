"""The record of a run: `log.jsonl` always, other trackers by name through accelerate."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from adaptface.files import write_text_atomically


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError if a tracker's package is missing (accelerate would drop it silently)."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without an origin it is a mere folder, as wandb leaves one
            raise ValueError(f"trackers: {name!r} is not installed; `pip install {name}`, or leave it out of trackers")


class RunLog:
    """Writes one JSON object a line; only the main process writes.

    Args:
        path: the `log.jsonl` to append to.
        step: lines of later steps are dropped, so that a resumed run continues the log it would have written.
    """

    def __init__(self, accelerator: Accelerator, path: Path, step: int = 0) -> None:
        self.accelerator, self.path, self.started = accelerator, path, time.time()
        if accelerator.is_main_process:
            kept = [line for line in read_log(path) if line["step"] <= step] if path.exists() and step else []
            write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append a line; numbers go to the trackers too, as `event/name`."""
        if self.accelerator.is_main_process:
            line = {"event": event, "step": step, **values, "seconds": round(time.time() - self.started, 3)}
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")
        numbers = {f"{event}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=step)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a `log.jsonl` (a line torn by a kill is left out)."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
