"""The `adaptface` command."""

import json
import os
import shlex
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from adaptface import __version__
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
    from adaptface.data.convert import kind_of

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
        if kind_of(destination, to) == "records":
            typer.echo("Records hold no names: identities are numbers from 0, in the order of the source's names.")


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Image folder, .rec, list, parquet, Hub data set.")],
    metadata: Annotated[Path | None, typer.Option(help="CSV of an image folder: file[,identity][,domain].")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    benchmark: Annotated[
        list[str] | None, typer.Option(help="Benchmark, as for eval_benchmarks.py, that must share no image.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder of benchmarks that do not hold theirs.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw it: a .png, .pdf or .svg file.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that decode.", min=0)] = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count images, identities, sizes and modes of training faces; find broken files, duplicates and overlaps."""
    from adaptface.data.benchmarks import load_benchmark
    from adaptface.data.inspection import as_text, draw, inspect_faces
    from adaptface.data.sources import open_source

    try:
        faces = open_source(source, metadata=metadata, split=split, domains=None)
        benchmarks = {Path(name).name: load_benchmark(name, images).images for name in benchmark or ()}
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


class Precision(StrEnum):
    """Of the weights of a release."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@app.command()
def release(
    run: Annotated[Path, typer.Argument(help="Run folder: best/ or last/, settings.yaml, results/results.json.")],
    repo_id: Annotated[
        str | None, typer.Option("--repo_id", help="Hub repository, user/name. Default: a local folder.")
    ] = None,
    push: Annotated[bool, typer.Option("--push", help="Push the release to --repo_id, and tag its version.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    version: Annotated[str, typer.Option(help="Version of the release; its tag is v and this.")] = __version__,
    out: Annotated[Path | None, typer.Option(help="Release folder. Default: release/ of the run.")] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="Hub licence id of the weights, e.g. apache-2.0.")
    ] = None,
    dtype: Annotated[
        Precision, typer.Option(help="Of the weights in the file; they load as float32.")
    ] = Precision.bfloat16,
    allow_full: Annotated[bool, typer.Option("--allow_full", help="Publish a fully fine-tuned base as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Stage a run as a release folder, load it in a clean process, and push it if asked to.

    The folder holds adapters, configuration, processor, code and card; no weight of a frozen base, no path, no image.
    """
    from adaptface.card import is_local
    from adaptface.hub import push_release, require_token, tag_of
    from adaptface.release import ReleaseError, model_folder, stage_release

    folder, results, settings = out or run / "release", run / "results" / "results.json", run / "settings.yaml"
    pushed = None
    try:
        tag_of(version)
        if push:
            if repo_id is None:
                raise ValueError("--push needs --repo_id user/name")
            require_token(repo_id)
        model_dir = model_folder(run)
        staged = stage_release(
            model_dir,
            results if results.is_file() else None,
            folder,
            settings=settings if settings.is_file() else None,
            repo_id=repo_id,
            license_id=license_id,
            allow_full=allow_full,
            dtype=dtype.value,
            version=version,
        )
        if push and repo_id is not None:
            pushed = push_release(
                folder, repo_id, version=version, private=True if private else None, allow_full=allow_full
            )
    except (ReleaseError, OSError, ValueError) as error:
        typer.echo(f"adaptface release: {error}", err=True)
        raise typer.Exit(1) from error
    size = (folder / "model.safetensors").stat().st_size
    if as_json:
        found = {"folder": str(folder), "weights_bytes": size, **staged._asdict()}
        typer.echo(json.dumps({**found, "pushed": asdict(pushed) if pushed else None}, indent=2))
        return
    if not results.is_file():
        typer.echo(f"No {results}: the card says 'not measured'.")
    typer.echo(f"{folder}: model.safetensors has {size / 1e6:.2f} MB; loaded in a clean process, its embeddings differ")
    typer.echo(f"from those of {model_dir} by at most {staged.difference:.1e}, where the weights are rounded alike.")
    if dtype == "bfloat16":
        typer.echo(f"Rounding them to bfloat16 left a cosine of at least {staged.cosine:.6f} of the embeddings tried.")
    if pushed:
        done = "now holds it" if pushed.changed else "held exactly this already, nothing was sent"
        typer.echo(f"{pushed.url} ({'private' if pushed.private else 'public'}) {done}: {pushed.tag}, {pushed.commit}")
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if is_local(config["backbone"]) and config["adaptation"] != "full":
        typer.echo("Not pushed, and not to be: its base is a folder of this machine, without which nobody can load it.")
        return
    command = ["adaptface", "release", str(run), "--repo_id", repo_id or "USER/NAME", "--push"]
    command += ["--private"] * private + ["--allow_full"] * allow_full
    given = {"--version": version if version != __version__ else None, "--out": out, "--license": license_id}
    given["--dtype"] = dtype.value if dtype != "bfloat16" else None
    command += [word for name, value in given.items() if value is not None for word in (name, str(value))]
    typer.echo(f"Not pushed. To push it: {shlex.join(command)}")


class Form(StrEnum):
    """What a model can be exported to."""

    backbone = "backbone"
    peft = "peft"


class Dtype(StrEnum):
    """Precision of exported weights; `auto` loses nothing."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Model folder or Hub id.")],
    out: Annotated[Path, typer.Argument(help="New or empty folder; not that of a release, but PEFT's in its peft/.")],
    to: Annotated[Form, typer.Option(help="A plain Dinov2Model with the adapters merged in, or an adapter of PEFT.")],
    domain_mix: Annotated[
        str | None,
        typer.Option("--domain_mix", help="Fixed mix of the experts: general=0.5,pose=0.5 or pose. Default: uniform."),
    ] = None,
    base_license: Annotated[
        str | None,
        typer.Option("--base_license", help="Backbone: the base's licence, which must allow changed copies."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the weights.")] = Dtype.auto,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
) -> None:
    """Write a model in a form that needs no code of ours. It gives the CLS token before the projection.

    `backbone` holds the base's weights, so it asks for the base's licence; `peft` holds adapters only.
    """
    import torch

    from adaptface.embedders import check_model
    from adaptface.export import base_name, export_backbone, export_peft, parse_mix
    from modeling_adaptface import AdaptFaceModel

    try:
        check_model(model, revision)
        loaded = AdaptFaceModel.from_pretrained(model, revision=revision, dtype=torch.float32)  # merged exactly
        mix = None if domain_mix is None else parse_mix(domain_mix, loaded.config.domains)
        precision = None if dtype == "auto" else getattr(torch, dtype)
        typer.echo(f"base: {base_name(loaded)}")
        if to == "peft":
            export_peft(loaded, out, mix, precision)
        elif base_license is None:
            raise ValueError(
                f"a backbone holds the weights of {base_name(loaded)}: read its licence, and if it allows to pass on "
                "changed copies give it by --base_license ID, such as apache-2.0; --to peft holds none of them"
            )
        else:
            export_backbone(loaded, out, base_license=base_license, domain_mix=mix, dtype=precision)
    except (OSError, ValueError) as error:
        typer.echo(f"adaptface export: {error}", err=True)
        raise typer.Exit(1) from error
    for file in sorted(out.rglob("*")):
        if file.is_file():
            typer.echo(f"{file}: {file.stat().st_size:,} bytes")


def main() -> None:
    """Entry point of the `adaptface` command."""
    printable_output()
    app()


if __name__ == "__main__":
    main()
