"""A publisher's process: pushes releases and models as it is told. Run by path.

Standard input holds one JSON job a line, standard output one JSON answer: what the job returns, `{"error": ...}` if it
fails, and under `waits` the pauses that huggingface_hub made before it tried again (none is really made). The jobs:

    {"do": "push", "folder", "repo_id", "version", "private", "token"}          push_release
    {"do": "release", "words": [...], "token"}                                  `adaptface release`, with what it prints
    {"do": "push_to_hub", "source", "repo_id", "token", "remote", "save"}       model and processor, remote code or not
    {"do": "download", "repo_id", "revision", "token"}                          snapshot_download
    {"do": "together", "jobs": [...]}                                           in threads

A token is put where `hf auth login` or HF_TOKEN would have it.
"""

import contextlib
import io
import json
import os
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

answers, sys.stdout = sys.stdout, sys.stderr

from huggingface_hub import snapshot_download  # noqa: E402
from huggingface_hub.utils import _http  # noqa: E402
from transformers import AutoImageProcessor, AutoModel  # noqa: E402

from adaptface.cli import app  # noqa: E402
from adaptface.hub import push_release  # noqa: E402
from image_processing_adaptface import AdaptFaceImageProcessor  # noqa: E402
from modeling_adaptface import AdaptFaceModel  # noqa: E402

waits: list[float] = []
_http.time = types.SimpleNamespace(**{**vars(time), "sleep": waits.append})


def push(job: dict) -> dict:
    return asdict(push_release(Path(job["folder"]), job["repo_id"], version=job["version"], private=job.get("private")))


def release(job: dict) -> dict:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = app(["release", *job["words"]], standalone_mode=False)
    return {"code": code or 0, "out": out.getvalue(), "err": err.getvalue()}


def push_to_hub(job: dict) -> dict:
    parts: list[Any] = [AdaptFaceModel, AdaptFaceImageProcessor]
    options = {}
    if job.get("remote"):
        parts, options = [AutoModel, AutoImageProcessor], {"trust_remote_code": True}
    for part in (part.from_pretrained(job["source"], **options) for part in parts):
        if job.get("save"):
            part.save_pretrained(job["save"], push_to_hub=True, repo_id=job["repo_id"], token=job["token"])
        else:
            part.push_to_hub(job["repo_id"], token=job["token"])
    return {"module": type(part).__module__}


def download(job: dict) -> dict:
    return {"folder": snapshot_download(job["repo_id"], revision=job.get("revision"), token=job.get("token"))}


def do(job: dict) -> dict:
    try:
        return {"push": push, "release": release, "push_to_hub": push_to_hub, "download": download}[job["do"]](job)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


for line in sys.stdin:
    job = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if job.get("token"):
        os.environ["HF_TOKEN"] = job["token"]
    waits.clear()
    if job["do"] == "together":
        with ThreadPoolExecutor() as pool:
            answer = {"answers": list(pool.map(do, job["jobs"]))}
    else:
        answer = do(job)
    print(json.dumps({**answer, "waits": waits}), file=answers, flush=True)
