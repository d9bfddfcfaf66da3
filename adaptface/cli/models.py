"""Commands about models: what one is made of, its release, and its other forms."""

import json
import shlex
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from adaptface import __version__
from adaptface.cli.common import AsJson, Model, Revision, app, failing_clearly, print_json


@app.command()
def info(
    model: Model,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Show what a model is made of: base, experts, router, projection, and what of it trains."""
    from adaptface.embedders import check_model  # after parsing: `--help` need not wait for torch
    from modeling_adaptface import AdaptFaceModel

    with failing_clearly("info"):
        check_model(model, revision)
        loaded = AdaptFaceModel.from_pretrained(model, revision=revision)
    if as_json:
        config = loaded.config
        named = {"backbone": config.backbone, "backbone_revision": config.backbone_revision, "domains": config.domains}
        print_json({"model": model, **named, **loaded.summary()})
    else:
        typer.echo(loaded.summary_table())


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
    as_json: AsJson = False,
) -> None:
    """Stage a run as a release folder, load it in a clean process, and push it if asked to.

    The folder holds adapters, configuration, processor, code and card; no weight of a frozen base, no path, no image.
    """
    from adaptface.card import is_local
    from adaptface.hub import push_release, require_token, tag_of
    from adaptface.release import ReleaseError, model_folder, stage_release

    folder, results, settings = out or run / "release", run / "results" / "results.json", run / "settings.yaml"
    pushed = None
    with failing_clearly("release", ReleaseError):
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
    size = (folder / "model.safetensors").stat().st_size
    if as_json:
        found = {"folder": str(folder), "weights_bytes": size, **staged._asdict()}
        print_json({**found, "pushed": asdict(pushed) if pushed else None})
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
    onnx = "onnx"
    peft = "peft"


class Dtype(StrEnum):
    """Precision of exported weights; `auto` loses nothing."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


@app.command()
def export(
    model: Model,
    out: Annotated[
        Path, typer.Argument(help="New or empty folder, an .onnx file; not in a release, but PEFT's in its peft/.")
    ],
    to: Annotated[
        Form,
        typer.Option(help="A plain Dinov2Model with the adapters merged in, one ONNX file, or an adapter of PEFT."),
    ],
    domain_mix: Annotated[
        str | None,
        typer.Option("--domain_mix", help="Fixed mix of the experts: general=0.5,pose=0.5 or pose. Default: uniform."),
    ] = None,
    base_license: Annotated[
        str | None,
        typer.Option("--base_license", help="Backbone, ONNX: the base's licence, which must allow changed copies."),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="ONNX: round the matrices to int8; docs/deploy.md has its loss.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the weights.")] = Dtype.auto,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Write a model in a form that needs no code of ours.

    `onnx` is the whole model; the others give the CLS token before the projection. `backbone` and `onnx` hold the
    base's weights, so they ask for the base's licence; `peft` holds adapters only.
    """
    import torch

    from adaptface.embedders import check_model
    from adaptface.export import base_name, export_backbone, export_peft, parse_mix
    from adaptface.onnx_export import export_onnx
    from image_processing_adaptface import AdaptFaceImageProcessor
    from modeling_adaptface import AdaptFaceModel, weights_sha256

    with failing_clearly("export"):
        check_model(model, revision)
        loaded = AdaptFaceModel.from_pretrained(model, revision=revision, dtype=torch.float32)  # merged exactly
        if to == "onnx" and (domain_mix is not None or dtype != "auto"):
            raise ValueError("an ONNX file is float32 and mixes the experts itself; leave out --domain_mix and --dtype")
        if int8 and to != "onnx":
            raise ValueError("--int8 goes with --to onnx")
        mix = None if domain_mix is None else parse_mix(domain_mix, loaded.config.domains)
        precision = None if dtype == "auto" else getattr(torch, dtype)
        if not as_json:
            typer.echo(f"base: {base_name(loaded)}")
        if to == "peft":
            export_peft(loaded, out, mix, precision)
        elif base_license is None:
            raise ValueError(
                f"{out} would hold the weights of {base_name(loaded)}: read its licence, and if it allows to pass on "
                "changed copies give it by --base_license ID, such as apache-2.0; --to peft holds none of them"
            )
        elif to == "onnx":
            processor = AdaptFaceImageProcessor.from_pretrained(model, revision=revision)
            digest = weights_sha256(model, revision, {})
            export_onnx(loaded, processor, out, base_license=base_license, quantize=int8, digest=digest)
        else:
            export_backbone(loaded, out, base_license=base_license, domain_mix=mix, dtype=precision)
    files = [out] if out.is_file() else sorted(file for file in out.rglob("*") if file.is_file())
    sizes = {str(file): file.stat().st_size for file in files}
    if as_json:
        print_json({"base": base_name(loaded), "bytes": sizes})
        return
    for name, size in sizes.items():
        typer.echo(f"{name}: {size:,} bytes")
