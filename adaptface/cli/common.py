"""What all commands share: the application, its options and how it fails.

Exit codes: 0 done (and "yes", where a command answers yes or no), 1 it failed, or a photo could not be used, and it
says why on standard error, 2 it was called wrongly, 3 the answer is "no": not the same person, no match, no face found
by `detect`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptface.report import printable_output

FAILED, NO = 1, 3

app = typer.Typer(help="AdaptFace: domain-aware LoRA face embeddings on a frozen DINOv2.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="Model folder or Hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Metadata = Annotated[Path | None, typer.Option(help="CSV of an image folder: file[,identity][,domain].")]
Split = Annotated[str, typer.Option(help="Split of a data set.")]


@app.callback()
def adaptface() -> None:
    """AdaptFace: domain-aware LoRA face embeddings on a frozen DINOv2."""


@contextmanager
def failing_clearly(command: str, *errors: type[Exception]) -> Iterator[None]:
    """Ends a command with exit code 1 and the words of an error that its user can mend.

    Args:
        command: its name.
        errors: classes of such errors beside OSError, ValueError and ImportError.
    """
    mendable: tuple[type[Exception], ...] = (OSError, ValueError, ImportError, *errors)
    try:
        yield
    except mendable as error:
        typer.echo(f"adaptface {command}: {error}", err=True)
        raise typer.Exit(FAILED) from error


def print_json(content: Any) -> None:
    """Content on standard output, for programs."""
    typer.echo(json.dumps(content, indent=2))


def main() -> None:
    """Entry point of the `adaptface` command."""
    printable_output()
    app()
