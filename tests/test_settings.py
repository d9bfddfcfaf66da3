"""Settings: recipe, then command line; every mistake is named with its remedy."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from adaptface.settings import MODEL_FIELDS, TrainSettings, changed_settings, describe_settings, read_settings
from configuration_adaptface import AdaptFaceConfig

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_command_line_overrides_recipe_overrides_default(tmp_path: Path) -> None:
    path = recipe(tmp_path, "learning_rate: 1e-3\nepochs: 7\nrandaugment_magnitude: [2, 9]\n")
    settings = read_settings([path, "--epochs", "9", "--domains=general,pose", "--router_layer", "2"])
    assert (settings.learning_rate, settings.epochs, settings.batch_size) == (1e-3, 9, 128)
    assert (settings.domains, settings.randaugment_magnitude, settings.router_layer) == (["general", "pose"], [2, 9], 2)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("false", False)])
def test_switches_read_their_word(text: str, value: bool) -> None:
    assert read_settings(["--use_rslora", text]).use_rslora is value


def test_null_and_lists_by_yaml_or_commas() -> None:
    settings = read_settings(["--adapter_layers", "[0, 2]", "--router_layer", "null", "--trackers="])
    assert (settings.adapter_layers, settings.router_layer, settings.trackers) == ([0, 2], None, [])
    assert read_settings(["--adapter_layers", "0,2"]).adapter_layers == [0, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        (["--zzzz", "1"], "unknown setting 'zzzz'; --help lists all"),
        (["--epochs", "many"], "epochs: 'many' is not a whole number"),
        (["--epochs", "2.5"], "epochs: '2.5' is not a whole number"),
        (["--epochs", "0"], "epochs: 0 is too small; the least is 1"),
        (["--learning_rate", "nan"], "learning_rate: 'nan' is not a finite number"),
        (["--learning_rate", "-1"], "learning_rate: -1.0 must be above 0"),
        (["--flip", "1.5"], "flip: 1.5 is too large; the most is 1"),
        (["--use_rslora", "yes"], "use_rslora: 'yes' is not true or false"),
        (["--seed"], "--seed has no value"),
        (["--domains", "[general, pose"], "domains: .* is not a list; write"),
        (["--head", "softmax"], "head: 'softmax' is not one of cosface, arcface, adaface"),
        (["--trackers", "mlflow"], "trackers: 'mlflow' is not one of tensorboard, trackio, wandb"),
        (["--domains", "a,a"], "domains: .* must name each expert once"),
        (["--domains", "[]"], "domains: .* at least one"),
        (["--randaugment_magnitude", "9,2"], "randaugment_magnitude: .* is no range"),
        (["--epochs", "null"], "epochs: has no value"),
        (["stray", "words"], "recipe stray does not exist"),
        (["--epochs", "3", "stray"], "'stray' stands where a setting is expected"),
        (["--frozen_dtype", "bfloat16"], "needs mixed_precision: bf16"),
        (["--overwrite", "true", "--resume", "auto"], "overwrite: true contradicts resume"),
        (["--stream", "true", "--domain_labels", "x.csv"], "stream: true .* contradicts domain_labels; drop one"),
    ],
)
def test_mistakes_are_named_with_their_remedy(words: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_settings(words)


@pytest.mark.parametrize("text", ["epochs: [1", "- epochs", "epoch: 3", "epochs: {a: 1}", "seed: true", "flip: true"])
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"recipe|epochs|seed|flip"):
        read_settings([recipe(tmp_path, text)])


def test_paths_expand_variables_or_say_which_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTFACE_REAL_FACES", "/faces")
    assert read_settings(["--train_data", "${ADAPTFACE_REAL_FACES}/train"]).train_data == "/faces/train"
    monkeypatch.delenv("ADAPTFACE_REAL_FACES")
    with pytest.raises(ValueError, match=r"train_data: .*environment variable ADAPTFACE_REAL_FACES, which is not set"):
        read_settings(["--train_data", "${ADAPTFACE_REAL_FACES}/train"])


@pytest.mark.parametrize("name", [
    "lfw.bin", "cfp_fp.bin", "agedb_30.bin", "calfw.bin", "CPLFW.bin", "ijbc.bin", "lfw_pairs.csv", "my_lfw.bin",
    "lfw/pairs.txt", "AgeDB30.txt", "cfpfp.bin", "lfwpairs.csv", "xqlfw.bin", "sllfw_pairs.txt", "vgg2_fp.bin",
    "rfw/pairs.csv", "tinyface.csv", "IJB-C.csv", "age-db-30.bin",
])  # fmt: skip
def test_no_checkpoint_is_selected_on_a_benchmark(name: str) -> None:
    with pytest.raises(ValueError, match=r"dev_pairs: .* is a benchmark"):
        TrainSettings(dev_pairs=f"data/{name}")
    with pytest.raises(ValueError, match=r"dev_images: .* is a benchmark"):
        TrainSettings(dev_pairs="mine.csv", dev_images=f"data/{name}")
    for harmless in ("data/my_dev.bin", "data/self_made/pairs.csv", "image_db/pairs.csv", "halfway/surfwear.csv"):
        assert TrainSettings(dev_pairs=harmless).dev_pairs == harmless


def test_a_benchmark_is_told_by_its_form_and_by_the_folder_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "Protocol" / "Split" / "FP"
    (folder / "01").mkdir(parents=True)
    for name in ("same.txt", "diff.txt"):
        (folder / "01" / name).write_text("1,2\n", encoding="utf-8")
    (tmp_path / "list.txt").write_text("10\t300\nA 1 2\n", encoding="utf-8")
    (tmp_path / "own.txt").write_text("a.png b.png 1\n", encoding="utf-8")
    (tmp_path / "lfw").mkdir()
    for path in (folder, tmp_path / "list.txt"):
        with pytest.raises(ValueError, match="is a benchmark"):
            TrainSettings(dev_pairs=str(path))
    assert TrainSettings(dev_pairs=str(tmp_path / "own.txt")).dev_pairs
    monkeypatch.chdir(tmp_path / "lfw")
    with pytest.raises(ValueError, match="is a benchmark"):
        TrainSettings(dev_pairs="pairs.csv")


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"output_dir: .* cannot be made, .*file is a file"):
            TrainSettings(output_dir=str(folder))


def test_recipes_of_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 3", encoding="utf-8-sig")
    assert read_settings([str(path)]).seed == 3
    path.write_text("seed: 3", encoding="utf-16")
    with pytest.raises(ValueError, match=r"recipe .*recipe.yaml is not UTF-8 text .byte 0.; save it as UTF-8"):
        read_settings([str(path)])


def test_yaml_and_command_line_as_people_write_them(tmp_path: Path) -> None:
    assert read_settings([recipe(tmp_path, "mixed_precision: no\nresume: no")]).mixed_precision == "no"
    settings = read_settings(["--dry_run", "--seed", "3", "--overwrite"])
    assert settings.dry_run and settings.overwrite and settings.seed == 3
    with pytest.raises(ValueError, match="sets epochs twice"):
        read_settings([recipe(tmp_path, "epochs: 3\nseed: 1\nepochs: 4")])


def test_a_recipe_that_overwrites_can_be_resumed_by_hand(tmp_path: Path) -> None:
    afresh = recipe(tmp_path, "overwrite: true")
    assert read_settings([afresh]).overwrite
    resumed = read_settings([afresh, "--resume", "auto"])
    assert resumed.resume == "auto" and not resumed.overwrite


def test_the_written_settings_read_back_equal(tmp_path: Path) -> None:
    settings = TrainSettings(learning_rate=3e-7, domains=["müde", "alt"], adapter_layers=[1, 2], margin=0.1)
    assert read_settings([recipe(tmp_path, settings.to_yaml())]) == settings


def test_only_what_shapes_the_run_is_held_on_resume() -> None:
    saved = yaml.safe_load(TrainSettings().to_yaml())
    harmless = TrainSettings(
        output_dir="elsewhere", num_workers=1, trackers=["wandb"], keep_checkpoints=9, resume="auto"
    )
    assert changed_settings(saved, harmless) == []
    assert changed_settings(saved, TrainSettings(seed=1, margin=0.2)) == ["seed: 0 -> 1", "margin: None -> 0.2"]


def test_model_settings_are_the_configuration_with_the_same_defaults() -> None:
    settings, config = TrainSettings(), AdaptFaceConfig(**TrainSettings().model_arguments())
    default = AdaptFaceConfig()
    for name in MODEL_FIELDS:
        assert getattr(config, name) == getattr(default, name), name
    assert AdaptFaceConfig(**dataclasses.replace(settings, domains=["one"]).model_arguments()).router_layer is None


def test_help_documents_every_setting() -> None:
    text = describe_settings()
    assert all(f"--{field.name} " in text for field in dataclasses.fields(TrainSettings))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_name_their_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTFACE_REAL_FACES", "/faces")
    settings = read_settings([str(path)])
    assert settings.output_dir == f"runs/{path.stem}"
    assert f"train_accelerate.py recipes/{path.name}" in path.read_text(encoding="utf-8")


def test_lora_recipe_is_the_dalora_recipe_with_one_expert() -> None:
    dalora, lora = (read_settings([str(path)]) for path in RECIPES if path.stem.startswith("casia"))
    assert lora == dataclasses.replace(dalora, domains=["general"], output_dir=lora.output_dir)


def recipe_named(name: str) -> TrainSettings:
    return read_settings([str(next(path for path in RECIPES if path.stem == name))])


def test_the_reference_recipe_has_the_numbers_of_the_reference() -> None:
    settings = recipe_named("casia_dalora_vits")
    assert (settings.backbone, settings.image_size, settings.domains) == (
        "facebook/dinov2-small", 224, ["general", "pose", "age"],
    )  # fmt: skip
    assert (settings.epochs, settings.batch_size, settings.learning_rate, settings.weight_decay) == (
        40,
        128,
        1e-4,
        0.05,
    )
    assert (settings.schedule, settings.head, settings.scale, settings.margin) == ("cosine", "cosface", 64.0, 0.35)
    assert (settings.adapter_targets, settings.lora_rank) == ("attention", 16)


def test_froundation_recipe_has_the_published_numbers() -> None:
    settings = recipe_named("froundation_vits")
    assert settings.batch_size * settings.gradient_accumulation == 512
    config = AdaptFaceConfig(**settings.model_arguments())
    assert (config.scaling, settings.margin, settings.lora_dropout, settings.gradient_clip) == (4.0, 0.30, 0.25, 5.0)
    assert (settings.head, settings.scale, settings.epochs, settings.learning_rate) == ("cosface", 64.0, 40, 1e-4)
    assert (settings.schedule, settings.randaugment_ops, settings.randaugment_magnitude) == ("froundation", 4, [1, 16])
    assert (settings.flip, settings.weight_decay, settings.min_learning_rate) == (0.5, 0.05, 1e-6)
