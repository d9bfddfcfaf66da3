"""The model card: numbers come from the results, gaps say so, and Hugging Face's own classes read it back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from jinja2 import Environment, meta

from adaptface.card import TEMPLATE, build_card
from adaptface.settings import TrainSettings
from configuration_adaptface import AdaptFaceConfig

COUNTS = {"base": 22_056_576, "per_expert": 442_368, "adapters": 1_327_104, "router": 99_331, "projection": 197_120}


def _row(kind: str = "adaptface", **values: Any) -> dict[str, Any]:
    row = {
        "benchmark": "lfw", "data": "unspecified",
        "protocol": {"score": "d = 2 - 2 cos", "folds": "10 contiguous folds"},
        "embedder": {"kind": kind, "name": "/home/someone/runs/x/best", "weights_sha256": "5ha"},
        "pairs": 6000, "accuracy": 0.98765, "accuracy_std": 0.0043, "auc": 0.99912, "eer": 0.0123,
        "tar_at_far": [{"far": 0.001, "tar": 0.9321}], "warnings": [],
    }  # fmt: skip
    return row | values


def _card(
    config: AdaptFaceConfig | None = None,
    rows: list[dict[str, Any]] | None = None,
    settings: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[str, dict[str, Any]]:
    """Text and metadata of a card, as read back by huggingface_hub."""
    results = None if rows is None else {"results": rows}
    config = config or AdaptFaceConfig(backbone_revision="1234abc")
    text = str(build_card(config, COUNTS, results, settings, name="user/faces", weights_sha256="5ha", **kwargs))
    return text, ModelCard(text).data.to_dict()


def test_numbers_and_protocol_come_from_the_results() -> None:
    stranger = {"kind": "adaptface", "name": "someone/better", "weights_sha256": "other"}
    peer = {"kind": "onnx", "name": "peer.onnx"}
    text, metadata = _card(rows=[_row(), _row(embedder=stranger, accuracy=0.999), _row(embedder=peer, accuracy=0.5)])
    assert "| lfw | better (adaptface) | 6,000 | 99.90" in text
    assert "| lfw | **this model** | 6,000 | 98.77 ± 0.43 | 0.9991 | 1.23 | 93.21 @ 0.001 |" in text
    assert "| lfw | peer.onnx (onnx) | 6,000 | 50.00" in text
    assert "score: d = 2 - 2 cos; folds: 10 contiguous folds." in text
    assert "/home/someone" not in text
    (model,) = metadata["model-index"]
    (result,) = model["results"]  # the peer's numbers are not this model's
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("accuracy", 0.98765), ("roc_auc", 0.99912)]
    assert "10 contiguous folds" in result["metrics"][0]["name"]


def test_metadata_says_what_the_hub_needs() -> None:
    _, metadata = _card(settings={"train_data": "hf://someone/faces"}, license_id="cc-by-nc-4.0")
    expected = {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "base_model": "facebook/dinov2-small",
        "base_model_relation": "adapter",
        "license": "cc-by-nc-4.0",
        "datasets": ["someone/faces"],
    }
    assert {key: metadata.get(key) for key in expected} == expected
    assert "model-index" not in metadata and "metrics" not in metadata


def test_without_results_or_settings_the_gaps_are_named() -> None:
    text, metadata = _card()
    assert "Accuracy, AUC, EER and TAR@FAR: not measured." in text
    assert "Not evaluated" in text
    assert "| training data | not stated |" in text and "| learning rate | not stated |" in text
    assert "### Decision thresholds\n\nNot measured." in text
    assert metadata["license"] == "other" and metadata["license_name"] == "terms-of-the-training-data"


def test_synthetic_faces_are_called_synthetic() -> None:
    text, metadata = _card(rows=[_row(data="synthetic")], settings={"train_data": "synthetic"})
    assert "> **Trained on synthetic (rendered) faces only" in text
    assert "| lfw (synthetic faces) | **this model**" in text
    assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == "lfw (synthetic faces)"
    assert metadata["license"] == "apache-2.0"
    assert "synthetic" not in _card(rows=[_row()], settings={"train_data": "hf://someone/faces"})[0].lower()


def test_a_local_base_makes_a_development_release(tmp_path: Path) -> None:
    text, metadata = _card(AdaptFaceConfig(backbone=str(tmp_path), backbone_config={}))
    assert "> **Development release" in text and f"`{tmp_path.name}`" in text
    assert str(tmp_path) not in text
    assert "base_model" not in metadata


def test_thresholds_and_warnings_are_shown() -> None:
    point = {"far": 0.001, "threshold": 0.41, "threshold_interval": [0.39, None], "measured_far": 0.001}
    point |= {"far_interval": [0.0003, 0.0029], "tar": 0.9, "tar_interval": [0.88, 0.92]}
    calibration = {"slope": 12.0, "intercept": -3.0, "prior": 0.5, "log_loss": 0.1}
    config = AdaptFaceConfig(
        thresholds={
            "benchmark": "lfw", "data": "synthetic", "pairs": 6000, "genuine": 3000, "impostor": 3000,
            "embedding": "summed", "operating_points": [point], "calibration": calibration,
        }
    )  # fmt: skip
    text, _ = _card(config, rows=[_row(warnings=["3 pairs repeat an earlier pair"])])
    assert "| 0.001 | 0.4100 (0.3900 to ?) | 0.100 % (0.030 to 0.290) | 90.00 % (88.00 to 92.00) |" in text
    assert "Measured on lfw (synthetic faces): 3,000 impostor and 3,000 genuine pairs; summed." in text
    assert "1 / (1 + exp(3.000 - 12.000 s))" in text
    assert "lfw, warning: 3 pairs repeat an earlier pair." in text


@pytest.mark.parametrize(
    ("adaptation", "words"),
    [
        ({"domains": ["faces"]}, "embeddings by plain LoRA: rank 16, scaling 4, on [facebook/dinov2-small]"),
        ({}, "domain-aware LoRA (DA-LoRA): 3 experts mixed per image by a router, rank 16, scaling 4, on [facebook"),
        ({"adaptation": "frozen"}, "by a trained projection, without adapters, on [facebook/dinov2-small]"),
        ({"adaptation": "full"}, "by full fine-tuning, without adapters, of [facebook/dinov2-small]"),
        ({"adaptation": "frozen"}, "This repository holds all but the base."),
        ({"adaptation": "full"}, "This repository holds all of them."),
    ],
)
def test_each_adaptation_is_named(adaptation: dict[str, Any], words: str) -> None:
    assert words in _card(AdaptFaceConfig(**adaptation))[0]


@pytest.mark.parametrize(
    ("adaptation", "parts", "has_experts"),
    [
        ({}, {"base": "22,056,576", "adapters": "1,327,104 (3 x 442,368)", "router": "99,331"}, True),
        ({"domains": ["faces"]}, {"base": "22,056,576", "adapters": "1,327,104"}, False),
        ({"adaptation": "frozen"}, {"base": "22,056,576"}, False),
        ({"adaptation": "full"}, {"base": "22,056,576"}, False),
    ],
)
def test_a_card_speaks_of_no_part_that_the_model_lacks(
    adaptation: dict[str, Any], parts: dict[str, str], has_experts: bool
) -> None:
    config = AdaptFaceConfig(**adaptation)
    text, metadata = _card(config, settings=yaml.safe_load(TrainSettings().to_yaml()))
    table = text.partition("|---|---:|\n")[2].partition("\n\n")[0].splitlines()
    expected = parts | {"projection": "197,120"}
    assert table == [f"| {part} | {count} |" for part, count in expected.items()]
    assert ("| experts | general, pose, age |" in text) == has_experts
    assert ("DA-LoRA" in text) == has_experts and ("which experts the router mixed" in text) == has_experts
    has_adapters = config.adaptation == "lora"
    assert ("| adapted matrices | attention |" in text) == has_adapters and ("lora" in metadata["tags"]) == has_adapters
    assert ("The base is fetched" in text) == (config.adaptation != "full")


def test_the_example_loads_the_repository_or_names_the_folder_as_one() -> None:
    text = _card()[0]
    assert "\n# user/faces\n" in text and '\nsource = "user/faces"\n' in text and "local folder" not in text
    folder = str(build_card(AdaptFaceConfig(), COUNTS, None, None, name="release"))
    assert "\n# release (local folder)\n" in folder and '\nsource = "./release"  # a local folder' in folder
    assert '("release"' not in folder


@pytest.mark.parametrize("license_id", ["not a licence", "Apache-2.0", "apache 2.0", "mit\n", ""])
def test_a_licence_that_the_hub_cannot_know_is_refused(license_id: str) -> None:
    with pytest.raises(ValueError, match=r"no licence id of the Hub; give one of https://.*apache-2\.0"):
        _card(license_id=license_id)


@pytest.mark.parametrize(
    ("name", "dataset"), [("CFP_FP", "cfp-fp"), ("人脸对比", "人脸对比"), ("Été 2", "été-2"), ("***", "benchmark")]
)
def test_a_benchmark_of_any_name_has_a_dataset_in_the_metadata(name: str, dataset: str) -> None:
    _, metadata = _card(rows=[_row(benchmark=name)])
    assert {result["dataset"]["type"] for result in metadata["model-index"][0]["results"]} == {dataset}


@pytest.mark.parametrize("license_id", ["mit", "cc-by-nc-4.0", "openrail++", "llama3.1", "other"])
def test_licence_ids_of_the_hub_are_taken(license_id: str) -> None:
    assert _card(license_id=license_id)[1]["license"] == license_id


class TestDevelopmentPairs:
    """What a checkpoint was chosen on measures nothing of it."""

    @pytest.mark.parametrize(
        "settings",
        [
            {"train_data": "/data/faces", "dev_pairs": "/data/dev_pairs.csv"},
            {"train_data": "synthetic", "dev_pairs": None},  # the run renders its own
        ],
    )
    def test_their_results_are_named_so_and_stay_out_of_the_index(self, settings: dict[str, Any]) -> None:
        peer = {"kind": "onnx", "name": "peer.onnx"}
        rows = [_row(benchmark="dev_pairs"), _row(benchmark="dev_pairs", embedder=peer), _row()]
        text, metadata = _card(rows=rows, settings=settings)
        assert "> **The checkpoint was chosen on dev_pairs, as the best of its run: its results" in text
        assert "| dev_pairs | **this model** (chosen on these pairs) |" in text
        assert "| dev_pairs | peer.onnx (onnx) |" in text and "| lfw | **this model** |" in text
        (result,) = metadata["model-index"][0]["results"]
        assert result["dataset"]["name"] == "lfw"

    def test_they_alone_make_no_index(self) -> None:
        text, metadata = _card(rows=[_row(benchmark="dev")], settings={"dev_pairs": "/data/dev.csv"})
        assert "(chosen on these pairs)" in text and "model-index" not in metadata and "metrics" not in metadata

    def test_without_settings_they_are_not_stated(self) -> None:
        assert "chosen on one of these benchmarks: not stated" in _card(rows=[_row()])[0]
        assert "chosen on" not in _card(rows=[_row()], settings={"dev_pairs": "/data/dev_pairs.csv"})[0]


def test_what_every_card_says() -> None:
    text = _card()[0]
    for phrase in (
        "Embeddings are personal data", "No presentation-attack detection", "Out of scope", "## Licence", "## Citation",
        "Error rates per group of people (skin tone, sex, age): not measured.", "trust_remote_code=True",
    ):  # fmt: skip
        assert phrase in text


def test_all_settings_in_the_card_exist() -> None:
    """A renamed setting would otherwise turn into "not stated"."""
    settings = yaml.safe_load(TrainSettings(train_data="hf://someone/faces").to_yaml())
    training = _card(settings=settings)[0].partition("## Training")[2].partition("## Evaluation")[0]
    assert "not stated" not in training and "| learning rate | 0.0001 |" in training


def test_a_placeholder_or_a_missing_number_stops_the_card() -> None:
    with pytest.raises(ValueError, match="gap"):
        _card(settings={"train_data": "TODO"})
    with pytest.raises(ValueError, match="results of lfw: nan is no finite number"):
        _card(rows=[_row(auc=float("nan"))])


def test_the_template_and_the_builder_name_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """jinja2 renders an unknown name as nothing, and ignores a value that is not asked for."""
    given: dict[str, Any] = {}
    original = ModelCard.from_template

    def spy(card_data: Any, **kwargs: Any) -> ModelCard:
        given.update(kwargs)
        return original(card_data, **kwargs)

    monkeypatch.setattr(ModelCard, "from_template", spy)
    _card()
    template = Environment().parse(TEMPLATE.read_text(encoding="utf-8"))
    assert meta.find_undeclared_variables(template) == {*given} - {"template_str"} | {"card_data"}


def test_nothing_given_is_changed() -> None:
    rows, settings = [_row()], {"train_data": "synthetic"}
    before = copy.deepcopy((rows, settings))
    _card(rows=rows, settings=settings)
    assert json.dumps((rows, settings)) == json.dumps(before)
