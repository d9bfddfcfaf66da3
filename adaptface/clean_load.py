"""Load a released model as a stranger would: with its declared requirements only, and without this project.

    python -P clean_load.py FOLDER images.npy embeddings.npz

Run by path, never imported: `adaptface.release` starts it in a fresh interpreter. What FOLDER's requirements.txt does
not name, nor what that requires in turn, is as if it were not installed. It embeds the images (uint8,
shape `(N, H, W, 3)`) in float32 and writes `pixel_values` and `embeddings`; standard output is one line of JSON with
what the load had to say (`warnings`, `loading_info`).
"""

import json
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

CODE_OF_MODELS = "transformers_modules"  # the package into which transformers copies the code of a model


def declared_only(requirements: Iterable[str]) -> None:
    """Hide from this process all that is installed but these packages, what they require, and Python's own.

    Args:
        requirements: lines of a requirements file, such as "torch>=2.6".
    """
    named = _with_their_own(requirements)
    modules = {CODE_OF_MODELS, *sys.stdlib_module_names}
    for found in named.values():
        modules |= {file.parts[0].partition(".")[0] for file in found.files or ()}
    sys.meta_path[:] = [_Restricted(finder, frozenset(modules), frozenset(named)) for finder in sys.meta_path]


def _with_their_own(requirements: Iterable[str]) -> dict[str, Distribution]:
    """The distributions that are named, and by them in turn, without extras; those not installed are left out."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, Distribution] = {}
    open_ = [Requirement(line) for line in requirements if line.strip()]
    while open_:
        wanted = open_.pop()
        name = canonicalize_name(wanted.name)
        if name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # its import fails, and says so
            continue
        open_ += map(Requirement, found[name].requires or ())
    return found


class _Restricted:
    """A finder of `sys.meta_path` that finds some top-level modules and distributions only."""

    def __init__(self, finder: Any, modules: frozenset[str], distributions: frozenset[str]) -> None:
        self._finder, self._modules, self._distributions = finder, modules, distributions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        top = name.partition(".")[0]
        if top not in self._modules and not top.startswith("_sysconfigdata"):  # Python's own, named after the platform
            return None
        return self._finder.find_spec(name, path, target)

    def find_distributions(self, *context: Any) -> Iterator[Distribution]:
        from packaging.utils import canonicalize_name

        find = getattr(self._finder, "find_distributions", lambda *_: ())
        return (found for found in find(*context) if canonicalize_name(found.name) in self._distributions)


class Collector(logging.Handler):
    """Keeps the text of every record of level WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.messages.append(record.getMessage())


def main(name: str, images_file: str, embeddings_file: str) -> None:
    """Load the folder `name`, embed the images, write the result."""
    declared_only(Path(name, "requirements.txt").read_text(encoding="utf-8").splitlines())

    import numpy as np
    import torch
    from transformers import AutoConfig, AutoImageProcessor, AutoModel
    from transformers.utils import logging as transformers_logging

    collector = Collector()
    logging.getLogger().addHandler(collector)
    transformers_logging.get_logger("transformers").addHandler(collector)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AutoConfig.from_pretrained(name, trust_remote_code=True)
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
        model, loading_info = AutoModel.from_pretrained(
            name, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
        )
        pixel_values = processor(list(np.load(images_file)), return_tensors="pt")["pixel_values"]  # (N, 3, S, S)
        with torch.no_grad():
            embeddings = model.eval()(pixel_values).pooler_output  # (N, E)
    np.savez(embeddings_file, pixel_values=pixel_values.numpy(), embeddings=embeddings.numpy())
    said = [str(warning.message) for warning in caught] + collector.messages
    info = {key: sorted(map(str, value)) for key, value in loading_info.items() if value}
    print(json.dumps({"warnings": said, "loading_info": info}))


if __name__ == "__main__":
    main(*sys.argv[1:])
