"""The `adaptface` command."""

import json
from typing import Annotated

import typer

app = typer.Typer(help="AdaptFace: domain-aware LoRA face embeddings on a frozen DINOv2.", no_args_is_help=True)


@app.callback()
def adaptface() -> None:
    """AdaptFace: domain-aware LoRA face embeddings on a frozen DINOv2."""


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="Model folder or Hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model is made of: base, experts, router, projection, and what of it trains."""
    from modeling_adaptface import AdaptFaceModel  # after parsing: `--help` need not wait for torch

    try:
        loaded = AdaptFaceModel.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        typer.echo(f"adaptface info: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        config = loaded.config
        named = {"backbone": config.backbone, "backbone_revision": config.backbone_revision, "domains": config.domains}
        typer.echo(json.dumps({"model": model, **named, **loaded.summary()}, indent=2))
    else:
        typer.echo(loaded.summary_table())


def main() -> None:
    """Entry point of the `adaptface` command."""
    app()


if __name__ == "__main__":
    main()
