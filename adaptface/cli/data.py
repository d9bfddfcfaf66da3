"""Commands about training faces."""

import os
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from adaptface.cli.common import AsJson, Metadata, Split, app, failing_clearly, print_json


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
    metadata: Metadata = None,
    split: Split = "train",
    as_json: AsJson = False,
) -> None:
    """Copy training faces into another format, images byte for byte; goes on where it was broken off."""
    from adaptface.data.convert import convert as convert_faces
    from adaptface.data.convert import kind_of

    with failing_clearly("convert"):
        found = asdict(convert_faces(source, destination, to, metadata=metadata, split=split, progress=not as_json))
    if as_json:
        print_json({"destination": str(destination), **found})
    else:
        counts = ", ".join(f"{found[name]:,} {name}" for name in ("images", "identities", "bytes"))
        typer.echo(f"{destination}: {counts}; read back and equal to the source, checksum {found['checksum'][:16]}")
        if kind_of(destination, to) == "records":
            typer.echo("Records hold no names: identities are numbers from 0, in the order of the source's names.")


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Image folder, .rec, list, parquet, Hub data set.")],
    metadata: Metadata = None,
    split: Split = "train",
    benchmark: Annotated[
        list[str] | None, typer.Option(help="Benchmark, as for eval_benchmarks.py, that must share no image.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder of benchmarks that do not hold theirs.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw it: a .png, .pdf or .svg file.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that decode.", min=0)] = os.cpu_count() or 1,
    as_json: AsJson = False,
) -> None:
    """Count images, identities, sizes and modes of training faces; find broken files, duplicates and overlaps."""
    from adaptface.data.benchmarks import load_benchmark
    from adaptface.data.inspection import as_text, draw, inspect_faces
    from adaptface.data.sources import open_source

    with failing_clearly("inspect"):
        faces = open_source(source, metadata=metadata, split=split, domains=None)
        benchmarks = {Path(name).name: load_benchmark(name, images).images for name in benchmark or ()}
        report = inspect_faces(faces, benchmarks, workers, progress=not as_json)
        if picture is not None:
            draw(report, faces, picture)
    print_json(report) if as_json else typer.echo(as_text(report))


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
    metadata: Metadata = None,
    split: Split = "train",
    workers: Annotated[int, typer.Option(help="Processes that decode.", min=0)] = os.cpu_count() or 1,
    as_json: AsJson = False,
) -> None:
    """Measure illumination and sharpness of training faces, take yaw and age from a table, and label their domains.

    Training reads what is written by `--domain_labels FILE`. Measurements are kept: run again with other thresholds.
    """
    from adaptface.data.domains import Known, Rule, as_text, check_place, label_faces, read_known
    from adaptface.data.sources import open_source

    sys.path.append(os.getcwd())  # an estimator may lie here
    out = out or Path(f"{Path(os.path.abspath(source)).name}.domains.csv")
    with failing_clearly("domains"):
        rule = Rule(yaw_threshold, age_gap, age_range)
        if table is None and (yaw or landmarks or age):
            raise ValueError("yaw, landmarks and age are taken from a table; give --table FILE")
        faces = open_source(source, metadata=metadata, split=split, domains=None)
        check_place(faces, source, out)
        known = read_known(faces, table, yaw, age, landmarks) if table else Known()
        report = label_faces(faces, out, known, age_estimator, rule, workers, progress=not as_json)
    print_json(report) if as_json else typer.echo(as_text(report))
