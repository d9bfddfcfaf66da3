"""Put together what a Space of the Hub needs: `python space/stage.py FOLDER --model you/AdaptFace`."""

import argparse
import shutil
import sys
from pathlib import Path

SPACE = Path(__file__).resolve().parent
ROOT = SPACE.parent
sys.path.insert(0, str(ROOT))

from adaptface.files import new_folder, write_text  # noqa: E402

CODE = ("configuration_adaptface.py", "image_processing_adaptface.py", "modeling_adaptface.py", "LICENSE")
OWN = ("README.md", "app.py", "requirements.txt")


def stage(folder: Path, model: str | None = None) -> None:
    """Write a Space's files into a new folder.

    Args:
        folder: where to; there must be nothing.
        model (`str`, *optional*): id on the Hub that the Space's page links to.
    Raises:
        FileExistsError: there is something already.
    """
    with new_folder(folder) as staged:
        for source in (*(SPACE / name for name in OWN), *(ROOT / name for name in CODE)):
            shutil.copyfile(source, staged / source.name)
        for source in (SPACE / "demo", ROOT / "adaptface"):
            shutil.copytree(source, staged / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        if model:
            card = (staged / "README.md").read_text(encoding="utf-8")
            write_text(staged / "README.md", card.replace("models: []", f"models:\n- {model}", 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("--model", help="id on the Hub, for the Space's page to link to")
    arguments = parser.parse_args()
    try:
        stage(arguments.folder, arguments.model)
    except OSError as error:
        sys.exit(str(error))
    print(f"{arguments.folder} is ready to be uploaded; space/README.md says how")


if __name__ == "__main__":
    main()
