"""Commands about people's photos: find, embed, compare, enroll, search, look inside.

What needs a decision ends with exit code 0 for "yes" and 3 for "no".
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptface.cli.common import FAILED, NO, AsJson, Revision, app, failing_clearly, print_json


class Faces(StrEnum):
    """Which faces of a photo are taken."""

    largest = "largest"
    central = "central"
    all = "all"


class Method(StrEnum):
    """How embeddings are laid out in a plane."""

    tsne = "tsne"
    umap = "umap"


def _cosine(threshold: float | None) -> float | None:
    """Refuses what is no cosine similarity."""
    if threshold is not None and not -1 <= threshold <= 1:  # also NaN
        raise typer.BadParameter(f"{threshold} is no cosine similarity, -1 to 1")
    return threshold


ModelOption = Annotated[str, typer.Option("--model", help="Model folder or Hub id.")]
Detector = Annotated[
    Path | None, typer.Option(help="File of the face detector (YuNet). Default: ADAPTFACE_DETECTOR, or the Hub's.")
]
Aligned = Annotated[bool, typer.Option("--aligned", help="Images are aligned, square face crops: look for no face.")]
Which = Annotated[Faces, typer.Option("--faces", help="Which face of a photo.")]
Engine = Annotated[
    str,
    typer.Option(help="What computes: torch, torch-compiled, or on a CPU onnx, onnx-int8, openvino, openvino-bf16."),
]
Far = Annotated[float, typer.Option(help="False accept rate of the threshold, one that was measured for the model.")]
Threshold = Annotated[
    float | None,
    typer.Option(help="Cosine similarity above which it is a match, in its place.", callback=_cosine),
]
BatchSize = Annotated[int, typer.Option("--batch_size", help="Faces in one forward pass.", min=1)]
Workers = Annotated[
    int | None, typer.Option(help="Threads that read photos and find faces. Default: one a CPU.", min=1)
]


def _load(model: str, revision: str | None, engine: str, detector: Path | None) -> Any:
    from transformers.utils.logging import disable_progress_bar

    from adaptface.faces import FaceEmbedder

    disable_progress_bar()
    return FaceEmbedder.from_pretrained(model, revision=revision, engine=engine, detector=detector)


@app.command()
def detect(
    photos: Annotated[list[Path], typer.Argument(help="Photos.")],
    faces: Which = Faces.all,
    detector: Detector = None,
    as_json: AsJson = False,
) -> None:
    """Find faces: box, landmarks and score, in pixels of the upright photo.

    Exit code 3 if a photo shows none, 1 if one cannot be read; the others are answered all the same.
    """
    from adaptface.detection import FaceDetector, choose
    from image_processing_adaptface import AdaptFaceImageProcessor

    found, errors = {}, {}
    with failing_clearly("detect"):
        finder, processor = FaceDetector(detector), AdaptFaceImageProcessor()
    for photo in photos:
        try:
            image = processor.load(photo)
        except (OSError, ValueError) as error:
            errors[str(photo)] = str(error)
        else:
            found[str(photo)] = [face.to_dict() for face in choose(finder.detect(image), faces.value, image.size)]
    if as_json:
        print_json({"faces": found, "errors": errors})
    else:
        for name, those in found.items():
            typer.echo(f"{name}: {len(those)} face{'' if len(those) == 1 else 's'}")
            for face in those:
                left, top, width, height = face["box"]
                typer.echo(f"  {width:.0f} x {height:.0f} px at ({left:.0f}, {top:.0f}), score {face['score']:.2f}")
    _fail_of(errors, "detect")
    if not all(found.values()):
        raise typer.Exit(NO)


def _fail_of(errors: dict[str, str], command: str) -> None:
    """Ends a command that some of its photos could not be used for, after all others."""
    for error in errors.values():
        typer.echo(f"adaptface {command}: {error}", err=True)
    if errors:
        raise typer.Exit(FAILED)


@app.command()
def embed(
    source: Annotated[Path, typer.Argument(help="Folder of photos, with all folders below it, or one photo.")],
    out: Annotated[Path, typer.Argument(help="File to make: .parquet (all that is known of a face) or .npz.")],
    model: ModelOption,
    revision: Revision = None,
    aligned: Aligned = False,
    faces: Which = Faces.largest,
    engine: Engine = "torch",
    detector: Detector = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Embed a folder of photos into one file. Broken off, the same command goes on where it stopped.

    Photos that cannot be read or show no face are named and left out.
    """
    from adaptface.photo_folder import embed_folder

    with failing_clearly("embed"):
        report = embed_folder(
            _load(model, revision, engine, detector), source, out,
            progress=not as_json, aligned=aligned, faces=faces.value, batch_size=batch_size, workers=workers,
        )  # fmt: skip
    _print_report(report, out, "embedded", as_json)


def _print_report(report: Any, out: Path, done: str, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json({"out": str(out), **asdict(report)})
        return
    kept = f", {report.kept} of them kept from before" if report.kept else ""
    typer.echo(f"{out}: {report.faces} faces of {report.photos} photos {done}{kept}")
    for name, error in list(report.errors.items())[:10]:
        typer.echo(f"  left out: {name}: {error}", err=True)
    if len(report.errors) > 10:
        typer.echo(f"  and {len(report.errors) - 10} more; --json names all", err=True)


@app.command()
def verify(
    first: Annotated[Path, typer.Argument(help="A photo.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    model: ModelOption,
    revision: Revision = None,
    far: Far = 0.001,
    threshold: Threshold = None,
    aligned: Aligned = False,
    faces: Which = Faces.largest,
    engine: Engine = "torch",
    detector: Detector = None,
    as_json: AsJson = False,
) -> None:
    """Do two photos show one person? Exit code 0: yes; 3: no; 1: it cannot be told."""
    with failing_clearly("verify"):
        answer = _load(model, revision, engine, detector).verify(
            str(first), str(second), far=far, threshold=threshold, aligned=aligned, faces=faces.value
        )
    if as_json:
        print_json(answer.to_dict())
    else:
        words = {True: "the same person", False: "different people", None: "undecided"}[answer.same]
        typer.echo(f"{words}: similarity {answer.similarity:.4f}")
        if answer.threshold is not None:
            at = f", a false accept rate of {answer.far:g} on {answer.source['benchmark']}" if answer.source else ""
            typer.echo(f"threshold {answer.threshold:.4f}{at}")
        if answer.match_probability is not None:
            typer.echo(f"match probability {answer.match_probability:.3f}, of pairs half of which are matches")
        for warning in answer.warnings:
            typer.echo(f"warning: {warning}", err=True)
    if not answer.same:
        raise typer.Exit(FAILED if answer.same is None else NO)


@app.command()
def enroll(
    gallery: Annotated[Path, typer.Argument(help="Gallery, a .parquet file; made if it is not there.")],
    source: Annotated[
        Path, typer.Argument(help="Folder (a sub-folder a person, or a photo a person), photo, or .parquet of `embed`.")
    ],
    model: ModelOption,
    identity: Annotated[str | None, typer.Option(help="Whose all these photos are.")] = None,
    revision: Revision = None,
    aligned: Aligned = False,
    faces: Which = Faces.largest,
    engine: Engine = "torch",
    detector: Detector = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Add people to a gallery. Embeddings are personal data: the file is readable by its owner alone."""
    from adaptface.gallery import Gallery
    from adaptface.photo_folder import enroll_folder

    with failing_clearly("enroll"):
        embedder = _load(model, revision, engine, detector)
        with Gallery.updating(gallery, embedder.config.embedding_size, model=embedder.identity()) as people:
            report = enroll_folder(
                embedder, people, source, identity,
                progress=not as_json, aligned=aligned, faces=faces.value, batch_size=batch_size, workers=workers,
            )  # fmt: skip
            if not people.templates:
                raise ValueError(
                    f"none of {report.photos} photos gave a face; the first: {next(iter(report.errors.values()))}"
                )
    _print_report(report, gallery, f"enrolled, {len(people)} people in it", as_json)


@app.command()
def remove(
    gallery: Annotated[Path, typer.Argument(help="Gallery.")],
    identities: Annotated[list[str], typer.Argument(help="People to take out of it, with all their templates.")],
    as_json: AsJson = False,
) -> None:
    """Remove people from a gallery; nothing of them stays in the file."""
    from adaptface.gallery import Gallery

    with failing_clearly("remove", KeyError), Gallery.updating(gallery) as people:
        removed = people.remove(*identities)
    if as_json:
        print_json({"gallery": str(gallery), "removed": removed, "identities": len(people)})
    else:
        typer.echo(f"{gallery}: {removed} templates removed, {len(people)} people left")


@app.command()
def search(
    gallery: Annotated[Path, typer.Argument(help="Gallery.")],
    photos: Annotated[list[Path], typer.Argument(help="Photos of people to look for.")],
    model: ModelOption,
    revision: Revision = None,
    k: Annotated[int, typer.Option("-k", help="People to show at most.", min=1)] = 5,
    far: Far = 0.001,
    threshold: Threshold = None,
    aligned: Aligned = False,
    faces: Which = Faces.largest,
    engine: Engine = "torch",
    detector: Detector = None,
    as_json: AsJson = False,
) -> None:
    """Who is this, among the people of a gallery?

    Exit code 3 if a face matches nobody, 1 if a photo cannot be read or shows no face; the others are answered all the
    same.

    The more people are enrolled, the more false matches a threshold lets pass: see docs/gallery.md.
    """
    from adaptface.gallery import Gallery

    with failing_clearly("search"):
        embedder = _load(model, revision, engine, detector)
        people = Gallery.load(gallery, model=embedder.identity())
        if threshold is None:
            if not embedder.config.thresholds:
                raise ValueError(
                    f"{model} has no threshold: measure one with eval_benchmarks.py --write_thresholds NAME, or give "
                    "--threshold (-1 shows the nearest, whoever it is)"
                )
            threshold = embedder.config.threshold(far)
        found = embedder.embed([str(photo) for photo in photos], aligned=aligned, faces=faces.value, on_error="skip")
        matches = people.search(found.embeddings, k=k, threshold=threshold)
    answers = [
        {
            "photo": str(photos[face.image]),
            **({} if face.face is None else {"box": face.face.to_dict()["box"]}),
            "matches": [
                {"identity": match.identity, "similarity": match.similarity, "source": match.source} for match in those
            ],
            "warnings": list(face.warnings),
        }
        for face, those in zip((found[row] for row in range(len(found))), matches, strict=True)
    ]
    errors = {str(photos[image]): text for image, text in found.errors.items()}
    if as_json:
        print_json({"threshold": threshold, "identities": len(people), "faces": answers, "errors": errors})
    else:
        for answer in answers:
            typer.echo(f"{answer['photo']}: {'' if answer['matches'] else 'no match'}")
            for match in answer["matches"]:
                source = f" ({match['source']})" if match["source"] else ""
                typer.echo(f"  {match['similarity']:.4f}  {match['identity']}{source}")
            for warning in answer["warnings"]:
                typer.echo(f"  warning: {warning}", err=True)
        typer.echo(f"threshold {threshold:.4f}, {len(people)} people")
    _fail_of(errors, "search")
    if not all(matches):
        raise typer.Exit(NO)


@app.command()
def explain(
    source: Annotated[str, typer.Argument(help="A photo, or a set of aligned faces: folder, .rec, list, parquet.")],
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Page to write, NAME.html, or a new folder for PNGs.")],
    revision: Revision = None,
    aligned: Aligned = False,
    method: Annotated[Method, typer.Option(help="How a set's embeddings are laid out.")] = Method.tsne,
    most: Annotated[int, typer.Option(help="Embeddings of a set that are laid out.", min=1)] = 2000,
    detector: Detector = None,
    as_json: AsJson = False,
) -> None:
    """Look inside a model: attention, router's mix and adapters' updates for a photo; mixes and embeddings of a set.

    The page holds the face: do not publish it.
    """
    from adaptface.data.sources import open_source
    from adaptface.detection import NoFaceError
    from adaptface.explain_page import explain as explain_image
    from adaptface.explain_page import explain_folder

    with failing_clearly("explain"):
        embedder = _load(model, revision, "torch", detector)
        parts = (embedder.embedder.model, embedder.processor)
        if Path(source).is_file() and not source.endswith((".rec", ".csv", ".parquet", ".lst")):
            landmarks = None
            if not aligned:
                if not (found := embedder.detect(source, "largest")):
                    raise NoFaceError(f"{source}: no face was found; give --aligned if it is a face crop already")
                landmarks = [found[0].landmarks]
            files = explain_image(*parts, source, out, landmarks)
        else:
            files = explain_folder(
                *parts, open_source(source, domains=None, training=False), out, method.value, most, progress=not as_json
            )
    if as_json:
        print_json({"files": [str(file) for file in files]})
    else:
        for file in files:
            typer.echo(f"{file}: {file.stat().st_size:,} bytes")
