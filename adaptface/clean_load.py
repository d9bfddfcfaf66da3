"""Load a released model as a stranger would: transformers only, in a process that cannot import this project.

    python -P clean_load.py FOLDER_OR_REPO_ID images.npy embeddings.npz

Run by path, never imported: `adaptface.release` starts it in a fresh interpreter. It embeds the images (uint8, shape
`(N, H, W, 3)`) in float32 and writes `pixel_values` and `embeddings`; standard output is one line of JSON with what
the load had to say (`warnings`, `loading_info`).
"""

import json
import logging
import sys
import warnings

PROJECT = ("adaptface", "configuration_adaptface", "modeling_adaptface", "image_processing_adaptface")


class ProjectBlocker:
    """Makes `import adaptface` and the flat modules fail, wherever they are installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if path is None and name.partition(".")[0] in PROJECT:
            raise ModuleNotFoundError(f"No module named {name!r}: the release must bring its own code", name=name)


class Collector(logging.Handler):
    """Keeps the text of every record of level WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main(name: str, images_file: str, embeddings_file: str) -> None:
    """Load `name`, embed the images, write the result."""
    sys.meta_path.insert(0, ProjectBlocker())

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
