"""Commands about this machine."""

from typing import Annotated

import typer

from adaptface.cli.common import AsJson, app, failing_clearly, print_json


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def estimate(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Recipe of a training run; any setting may follow as --key value.")],
    images: Annotated[int | None, typer.Option(help="Training images. Default: those of the data.", min=1)] = None,
    identities: Annotated[int | None, typer.Option(help="Identities in them.", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a recipe for a few steps here, and predict time, memory and the largest batch that fits.

    Needs neither the data nor the base. Other GPUs are estimated from their published speed, not measured.
    """
    from adaptface.estimate import as_text
    from adaptface.estimate import estimate as estimate_run
    from adaptface.settings import read_settings

    with failing_clearly("estimate"):
        found = estimate_run(read_settings([recipe, *context.args]), images, identities)
    print_json(found) if as_json else typer.echo(as_text(found))
