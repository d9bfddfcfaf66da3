"""Project tasks for a machine that has Python 3.11+ and nothing else: `python3 dev.py TASK`.

    setup       make the virtual environment and install the project with the versions of constraints.txt
    quickstart  setup, then render faces, train, evaluate and stage a release (CPU, a few minutes)
    check       setup, then format, lint, types and the fast tests
    test        setup, then everything: check, and the slow, distributed and real-face tests; releases also with the
                oldest transformers that is supported, and the demo in a browser, in environments of their own
    fix         setup, then mend what the formatter and linter can mend
    docs        setup, then write the API reference to build/api

The environment lives in .venv, or in the folder that ADAPTFACE_VENV names. Only the standard library is used here.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = Path(os.environ.get("ADAPTFACE_VENV", ROOT / ".venv")).absolute()
OLDEST = ENVIRONMENT.with_name(f"{ENVIRONMENT.name}-oldest")  # the oldest libraries that load a release
SPACE = ENVIRONMENT.with_name(f"{ENVIRONMENT.name}-space")  # the demo's libraries, and what drives a browser
RUN = "runs/quickstart"


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(*arguments: str, python: Path | None = None) -> None:
    """Runs the environment's Python with `arguments` in the project's root; ends the task if that fails."""
    print("$ python", *arguments, flush=True)
    done = subprocess.run([str(python or python_of(ENVIRONMENT)), *arguments], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def setup() -> None:
    """Installs what pyproject.toml and constraints.txt ask for, unless this was done before."""
    install(ENVIRONMENT, "pyproject.toml", "constraints.txt", options=["-c", "constraints.txt", "-e", ".[test]"])


def install(environment: Path, *wanted: str, options: list[str]) -> None:
    """Makes a virtual environment and has pip install what the files `wanted` say, unless this was done before."""
    content = b"".join((ROOT / name).read_bytes() for name in wanted)
    digest = hashlib.sha256(content + str(ROOT).encode()).hexdigest()
    stamp = environment / "adaptface-setup"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == digest:
        return
    print(f"installing into {environment}: some minutes the first time", flush=True)
    python = python_of(environment)
    # An interrupted or half-made environment has no working pip: make it anew.
    probe = [str(python), "-m", "pip", "--version"]
    if not python.is_file() or subprocess.run(probe, capture_output=True, check=False).returncode:
        venv.create(environment, with_pip=True, clear=True)
    run("-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *options, python=python)
    # pip would do this on one processor; without it each process would, where PYTHONDONTWRITEBYTECODE is set.
    subprocess.run([str(python), "-m", "compileall", "-qq", "-j", "0", str(environment)], check=False)
    stamp.write_text(digest, encoding="utf-8")


def quickstart() -> None:
    """The main job on embedded synthetic faces, from nothing to a release folder loaded in a clean process."""
    run("train_accelerate.py", "recipes/quickstart.yaml", "--output_dir", RUN)
    run(
        "eval_benchmarks.py", "--model", f"{RUN}/best", "--zero_shot", f"{RUN}/base",
        "--benchmark", f"{RUN}/synthetic/dev_pairs.csv", "--write_thresholds", "dev_pairs",
        "--output_dir", f"{RUN}/results",
    )  # fmt: skip
    run("-m", "adaptface.cli", "release", RUN)


def check() -> None:
    """What every change must pass: format, lint, types, fast tests."""
    run("-m", "ruff", "format", "--check", ".")
    run("-m", "ruff", "check", ".")
    run("-m", "mypy")
    run_tests("not slow and not distributed")


def test() -> None:
    """What CI runs."""
    check()
    install(OLDEST, "constraints-oldest.txt", options=["-r", "constraints-oldest.txt"])
    os.environ["ADAPTFACE_OLD_PYTHON"] = str(python_of(OLDEST))
    demo, tested = "space/requirements.txt", "constraints-space.txt"
    install(SPACE, demo, tested, options=["-r", demo, "-c", tested, "playwright"])
    os.environ["ADAPTFACE_SPACE_PYTHON"] = str(python_of(SPACE))
    run_tests("slow or distributed")


def run_tests(marked: str) -> None:
    """Tests on all processors, up to four, each of which computes with one thread; a file's tests share one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run("-m", "pytest", "-q", "-n", "logical", "--maxprocesses", "4", "--dist", "loadfile", "-m", marked)


def fix() -> None:
    """Formats, and mends what the linter can mend."""
    run("-m", "ruff", "check", "--fix", ".")
    run("-m", "ruff", "format", ".")


def docs() -> None:
    """The API reference, from the docstrings."""
    run("docs/reference.py")


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  (a stranger's python3 may be older)
        sys.exit(f"AdaptFace needs Python 3.11 or newer; this is {sys.version.split()[0]}")
    tasks = {task.__name__: task for task in (setup, quickstart, check, test, fix, docs)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="python3 dev.py TASK"
    )
    parser.add_argument("task", choices=tasks)
    task = tasks[parser.parse_args().task]
    setup()
    if task is not setup:
        task()


if __name__ == "__main__":
    main()
