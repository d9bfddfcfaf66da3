"""The demo: `python space/app.py --model FOLDER_OR_ID`. On a Space of the Hub its settings are environment variables.

    ADAPTFACE_MODEL       model folder, or id on the Hub
    ADAPTFACE_REVISION    commit, tag or branch of it
    ADAPTFACE_DETECTOR    file of the face detector; else it is fetched from the Hub

The model's Python code is run: name only one that you trust.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

# Before gradio and huggingface_hub are imported: they count uses, and tell.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
sys.path[:0] = [
    str(folder) for folder in (Path(__file__).parent, Path(__file__).parents[1]) if (folder / "adaptface").is_dir()
]  # a checkout, or a Space that holds the package

from safetensors import SafetensorError, safe_open  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from transformers.utils import cached_file  # noqa: E402

from adaptface import FaceEmbedder  # noqa: E402
from demo.door import Door  # noqa: E402
from demo.photos import MOST_OF_REQUEST  # noqa: E402
from demo.ui import VISITS, Demo, build, look_of_page  # noqa: E402


def training_data(model: str, revision: str | None) -> str | None:
    """What the header of a release's weights says that they were trained on."""
    try:
        file = cached_file(model, "model.safetensors", revision=revision)
        with safe_open(file, framework="pt") as weights:
            return (weights.metadata() or {}).get("training_data")
    except (OSError, SafetensorError):
        return None


def finds_faces(embedder: FaceEmbedder) -> bool:
    """Whether there is a face detector, now rather than when the first photo comes."""
    try:
        embedder.detector  # noqa: B018
    except (ImportError, OSError, ValueError) as error:
        logging.warning("only aligned face crops are taken: %s", error)
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("ADAPTFACE_MODEL"), help="default: $ADAPTFACE_MODEL")
    parser.add_argument("--revision", default=os.environ.get("ADAPTFACE_REVISION") or None, help="on the Hub")
    parser.add_argument("--device", help="default: the accelerator, else the CPU")
    parser.add_argument("--host", help="default: $GRADIO_SERVER_NAME, else this machine alone")
    parser.add_argument("--port", type=int, help="default: $GRADIO_SERVER_PORT, else the first free one from 7860")
    arguments = parser.parse_args()
    if not arguments.model:
        parser.error("no model: give --model FOLDER_OR_ID, or set ADAPTFACE_MODEL")
    try:
        embedder = FaceEmbedder.from_pretrained(arguments.model, revision=arguments.revision, device=arguments.device)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last two: torch has no such device
        sys.exit(f"{arguments.model}: {error}")
    demo = Demo(embedder, finds_faces(embedder))
    folder = Path(arguments.model)
    name = folder.resolve().name if folder.is_dir() else arguments.model
    page = build(demo, name, training_data(arguments.model, arguments.revision))
    try:
        page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            share=False,
            show_error=False,  # an error of Python's may name folders
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            max_file_size=1,  # nothing is uploaded
            state_session_capacity=VISITS,
            app_kwargs={"middleware": [Middleware(Door, most_bytes=MOST_OF_REQUEST)]},
            **look_of_page(),
        )
    except OSError as error:  # the port is taken
        sys.exit(str(error))


if __name__ == "__main__":
    main()
