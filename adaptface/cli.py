"""The `adaptface` command."""

import json
import os
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from adaptface.report import printable_output

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
    from adaptface.embedders import check_model  # after parsing: `--help` need not wait for torch
    from modeling_adaptface import AdaptFaceModel

    try:
        check_model(model, revision)
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


class Kind(StrEnum):
    """Formats of training faces that can be written."""

    folder = "folder"
    records = "records"
    parquet = "parquet"


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Image folder, .rec, parquet, Hub data set: whatever training takes.")],
    destination: Annotated[Path, typer.Argument(help="New folder, or the .rec file to write.")],
    to: Annotated[Kind | None, typer.Option(help="Format. Default: records for a .rec, else folder.")] = None,
    metadata: Annotated[Path | None, typer.Option(help="CSV of an image folder: file[,identity][,domain].")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Copy training faces into another format, images byte for byte; goes on where it was broken off."""
    from adaptface.data.convert import convert as convert_faces

    try:
        found = asdict(convert_faces(source, destination, to, metadata=metadata, split=split, progress=not as_json))
    except (OSError, ValueError) as error:
        typer.echo(f"adaptface convert: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps({"destination": str(destination), **found}, indent=2))
    else:
        counts = ", ".join(f"{found[name]:,} {name}" for name in ("images", "identities", "bytes"))
        typer.echo(f"{destination}: {counts}; read back and equal to the source, checksum {found['checksum'][:16]}")


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Image folder, .rec, list, parquet, Hub data set.")],
    metadata: Annotated[Path | None, typer.Option(help="CSV of an image folder: file[,identity][,domain].")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    benchmark: Annotated[list[Path] | None, typer.Option(help="Pair list that must share no image.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw it: a .png, .pdf or .svg file.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that decode.", min=0)] = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count images, identities, sizes and modes of training faces; find broken files, duplicates and overlaps."""
    from adaptface.data.benchmarks import load_pairs
    from adaptface.data.inspection import as_text, draw, inspect_faces
    from adaptface.data.sources import open_source

    try:
        faces = open_source(source, metadata=metadata, split=split, domains=None)
        benchmarks = {path.name: load_pairs(path).images for path in benchmark or ()}
        report = inspect_faces(faces, benchmarks, workers, progress=not as_json)
        if picture is not None:
            draw(report, faces, picture)
    except (OSError, ValueError) as error:
        typer.echo(f"adaptface inspect: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(json.dumps(report, indent=2) if as_json else as_text(report))


@app.command()
def domains(
    source: Annotated[str, typer.Argument(help="Image folder, .rec, list, parquet, Hub data set.")],
    out: Annotated[
        Path | None, typer.Option(help="Sidecar to write: .csv or .parquet. Default: NAME.domains.csv, here.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="CSV or parquet of what is known; its column `file` names images by their key.")
    ] = None,
    yaw: Annotated[str | None, typer.Option(help="Column of the table: yaw, or a proxy of it.")] = None,
    landmarks: Annotated[
        bool, typer.Option("--landmarks", help="Yaw proxy from the table's lefteye_x, lefteye_y ... nose_y.")
    ] = False,
    age: Annotated[str | None, typer.Option(help="Column of the table: age in years.")] = None,
    age_estimator: Annotated[
        str, typer.Option("--age_estimator", help="module:function that takes a PIL image and returns years.")
    ] = "",
    yaw_threshold: Annotated[
        float, typer.Option("--yaw_threshold", help="'pose' is a yaw beyond it, in the yaw's own unit.")
    ] = 0.35,
    age_gap: Annotated[
        float, typer.Option("--age_gap", help="'age' is so many years from the median of the identity.")
    ] = 15,
    age_range: Annotated[
        tuple[float, float], typer.Option("--age_range", help="'age' is below the first, or from the second on.")
    ] = (18, 55),
    metadata: Annotated[Path | None, typer.Option(help="CSV of an image folder: file[,identity][,domain].")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    workers: Annotated[int, typer.Option(help="Processes that decode.", min=0)] = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure illumination and sharpness of training faces, take yaw and age from a table, and label their domains.

    Training reads what is written by `--domain_labels FILE`. Measurements are kept: run again with other thresholds.
    """
    from adaptface.data.domains import Known, Rule, as_text, check_place, label_faces, read_known
    from adaptface.data.sources import open_source

    sys.path.append(os.getcwd())  # an estimator may lie here
    out = out or Path(f"{Path(os.path.abspath(source)).name}.domains.csv")
    try:
        rule = Rule(yaw_threshold, age_gap, age_range)
        if table is None and (yaw or landmarks or age):
            raise ValueError("yaw, landmarks and age are taken from a table; give --table FILE")
        faces = open_source(source, metadata=metadata, split=split, domains=None)
        check_place(faces, source, out)
        known = read_known(faces, table, yaw, age, landmarks) if table else Known()
        report = label_faces(faces, out, known, age_estimator, rule, workers, progress=not as_json)
    except (OSError, ValueError) as error:
        typer.echo(f"adaptface domains: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(json.dumps(report, indent=2) if as_json else as_text(report))


def main() -> None:
    """Entry point of the `adaptface` command."""
    printable_output()
    app()


if __name__ == "__main__":
    main()
