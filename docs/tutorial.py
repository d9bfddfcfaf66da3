# %% [markdown]
# # From nothing to a released face model
#
# This tutorial renders faces, trains a small AdaptFace model on them, measures it, uses it, looks inside it, exports it
# and stages a release. It needs a checkout with `pip install -e '.[gallery,onnx]'` done in it, no GPU, no download and
# no picture of any person, and takes a minute or two on a CPU.
#
# **All faces here are synthetic and the base is tiny and random. No number below says anything about real faces.**
#
# It is a script in cells: VS Code and Jupytext open it as a notebook, and `python docs/tutorial.py` runs it. It writes
# to a new temporary folder, or to the one that the environment variable `ADAPTFACE_TUTORIAL` names.

# %%
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import adaptface
from adaptface import FaceEmbedder, Gallery
from adaptface.data.sources import open_source
from adaptface.explain_page import explain, explain_folder
from adaptface.export import export_peft
from adaptface.onnx_export import export_onnx

checkout = Path(adaptface.__file__).resolve().parents[1]
if not (checkout / "train_accelerate.py").is_file():
    raise SystemExit("this tutorial runs the scripts of a checkout: install it there, pip install -e '.[gallery,onnx]'")
work = Path(os.environ.get("ADAPTFACE_TUTORIAL") or tempfile.mkdtemp(prefix="adaptface-tutorial-")).absolute()
run = work / "run"


def python(*words: object) -> None:
    """Runs one of the project's commands, as you would in a terminal; it prints what it does."""
    print("$ python", *words, flush=True)
    subprocess.run([sys.executable, *map(str, words)], cwd=checkout, check=True)


print("everything goes to", work)

# %% [markdown]
# ## Train
#
# A recipe is a YAML file of settings; any of them can be given on the command line, too. This is the quickstart's
# recipe with fewer people and fewer epochs. `train_data: synthetic` in it renders the faces: `train/` to learn from,
# and `dev/` with other people, of whom `dev_pairs.csv` pairs images. `backbone: tiny-random` writes a small Dinov2 with
# random weights in the place of the real one.
#
# The base stays frozen. What trains are three LoRA experts, the router that mixes them for each image, and the
# projection to the embedding.

# %%
python(
    "train_accelerate.py", "recipes/quickstart.yaml", "--output_dir", run, "--synthetic_identities", 160,
    "--epochs", 10, "--eval_every_epochs", 5, "--num_workers", 0,
)  # fmt: skip

# %% [markdown]
# ## Measure
#
# The ten-fold protocol on the development pairs, for the trained model and for its base as it was. `--write_thresholds`
# also puts into the model's config above which similarity two faces count as one person, at each false accept rate that
# so few pairs can support.
#
# These pairs chose `best/` as well, so that the result is a little too good. A proper benchmark shares nobody with
# them.

# %%
python(
    "eval_benchmarks.py", "--model", run / "best", "--zero_shot", run / "base",
    "--benchmark", run / "synthetic/dev_pairs.csv", "--write_thresholds", "dev_pairs", "--output_dir", run / "results",
)  # fmt: skip

# %% [markdown]
# ## Use it: are these two the same person?
#
# `FaceEmbedder` reads images, finds and aligns faces, embeds them as the evaluation did, and compares. Rendered faces
# are square crops already, hence `aligned=True`, and no detector is needed. `far` is one of the measured rates.

# %%
embedder = FaceEmbedder.from_pretrained(run / "best")
rates = {point["far"]: point["threshold"] for point in embedder.config.thresholds["operating_points"]}
print("thresholds at false accept rates:", {far: round(threshold, 3) for far, threshold in rates.items()})

dev = run / "synthetic/dev"
with (run / "synthetic/dev_pairs.csv").open(newline="", encoding="utf-8") as file:
    pairs = list(csv.DictReader(file))
for same in ("1", "0"):
    pair = next(pair for pair in pairs if pair["same"] == same)
    answer = embedder.verify(dev / pair["image_a"], dev / pair["image_b"], far=0.01, aligned=True)
    print(
        f"{pair['image_a']} and {pair['image_b']}: similarity {answer.similarity:.3f}, threshold "
        f"{answer.threshold:.3f}, same person: {answer.same} (in truth: {same == '1'})"
    )
    for warning in answer.warnings:
        print("  warning:", warning)

# %% [markdown]
# A model this small errs often at a rate this strict. `answer.warnings` says what may make an embedding worse;
# `answer.source` says on what the threshold was measured.
#
# ## Who is this? A gallery
#
# Half of the development people are enrolled with four images each. The other half are strangers: for them the right
# answer is an empty list, "no match". How often the answers are right is printed.

# %%
people = sorted(folder.name for folder in dev.iterdir() if folder.is_dir())
enrolled, strangers = people[::2], people[1::2]
gallery = Gallery(embedder.config.embedding_size, model=embedder.identity())
for person in enrolled:
    files = sorted((dev / person).glob("*.png"))[:4]
    gallery.enroll(person, embedder.embed(files, aligned=True).embeddings, [file.name for file in files])
gallery.save(work / "gallery.parquet")
print(f"enrolled: {len(gallery)} people, {gallery.templates} templates")

probes = {person: sorted((dev / person).glob("*.png"))[4] for person in people}
queries = embedder.embed(list(probes.values()), aligned=True).embeddings  # (people, E)
found = dict(zip(probes, gallery.search(queries, k=1, threshold=rates[0.01]), strict=True))
for person in (enrolled[0], strangers[0]):
    match = found[person][0] if found[person] else None
    print(f"{person}:", f"{match.identity}, similarity {match.similarity:.3f}" if match else "no match")
named = {person: found[person][0].identity for person in people if found[person]}
print(f"named rightly: {sum(named.get(person) == person for person in enrolled)} of {len(enrolled)} enrolled people")
print(f"no match: {sum(person not in named for person in strangers)} of {len(strangers)} strangers")
nearest = gallery.search(queries[::2], k=1)  # whoever it is: without a threshold
first = sum(matches[0].identity == person for matches, person in zip(nearest, enrolled, strict=True))
print(f"nearest without a threshold: {first} of {len(enrolled)} enrolled people")

# %% [markdown]
# A gallery compares a probe with every template, so a stranger is accepted more often than the rate of one comparison
# says. Embeddings are personal data: of real people, `gallery.parquet` is a file to protect.
#
# ## Look inside
#
# A page for one face: what each block attends to, how the router mixed the experts, how much the adapters change each
# matrix. And one for a set of faces. Open them in a browser; they need no network.

# %%
model, processor = embedder.embedder.model, embedder.processor
explain(model, processor, probes[enrolled[0]], work / "face.html")
explain_folder(model, processor, open_source(dev, domains=None), work / "faces.html")
mix = embedder.embed(probes[enrolled[0]], aligned=True)[0].domain_mix
print("look inside:", work / "face.html", "and", work / "faces.html")
print("how the experts were mixed for that face:", {name: round(weight, 2) for name, weight in mix.items()})

# %% [markdown]
# ## Take it elsewhere
#
# One ONNX file holds the whole model, router included, for onnxruntime without torch and without this project. It
# holds the base's weights, so whoever exports it states the base's licence; this random base is ours, under the
# project's. A PEFT adapter holds none of them: plain `peft` puts it on a plain `Dinov2Model`.

# %%
file = export_onnx(model, processor, work / "model.onnx", base_license="apache-2.0")
print(f"{file.path.name}: {file.size / 1e6:.1f} MB, embeddings within {file.distance:.0e} (cosine distance)")
export_peft(model, work / "peft")
print("PEFT:", ", ".join(sorted(str(path.relative_to(work)) for path in (work / "peft").rglob("*.safetensors"))))

# %% [markdown]
# ## Release
#
# A release folder is what goes to the Hub: adapters, configuration, processor, code and a model card with the results
# above, and no weight of the base. It is loaded once more in a clean process, and the embeddings are compared. With a
# base from the Hub, `--repo_id you/AdaptFace --push` would publish it; this one has a base that only this folder has.

# %%
python("-m", "adaptface.cli", "release", run)
print("release:", ", ".join(sorted(path.name for path in (run / "release").iterdir())))

# %% [markdown]
# ## From here
#
# - your own faces and a real base: the README's "Make a model", and docs/training.md
# - what the numbers mean: docs/evaluation.md
# - publish and pin: docs/releasing.md; serve: docs/deploy.md
