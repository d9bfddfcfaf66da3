"""The configuration: what it derives, what it refuses, what it writes."""

import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from transformers import Dinov2Config

import configuration_adaptface
from configuration_adaptface import AdaptFaceConfig


def test_defaults_are_the_reference() -> None:
    config = AdaptFaceConfig()
    assert (config.backbone, config.num_domains, config.lora_rank) == ("facebook/dinov2-small", 3, 16)
    assert config.backbone_config.hidden_size == 384 and config.backbone_config.num_hidden_layers == 12
    assert config.scaling == 16 / 4  # rsLoRA, alpha / sqrt(r)
    assert AdaptFaceConfig(use_rslora=False).scaling == 1.0
    assert config.router_layer == 6 and config.has_router
    assert config.adapted_layers == list(range(12))
    assert AdaptFaceConfig(adapter_layers=[7, 6]).adapted_layers == [6, 7]


@pytest.mark.parametrize("values", [{"domains": ["general"]}, {"adaptation": "frozen"}, {"adaptation": "full"}])
def test_no_router_where_there_is_nothing_to_mix(values: dict[str, Any]) -> None:
    config = AdaptFaceConfig(**values)
    assert not config.has_router and config.router_layer is None
    assert bool(config.adapted_layers) == ("adaptation" not in values)


THRESHOLDS = {
    "operating_points": [{"far": 0.01, "threshold": 0.3}, {"far": 0.001, "threshold": 0.4}],
    "calibration": {"slope": 10.0, "intercept": -3.0},
}


def test_thresholds_and_match_probability() -> None:
    config = AdaptFaceConfig(thresholds=THRESHOLDS)
    assert config.threshold(0.001) == 0.4
    with pytest.raises(ValueError, match=r"no threshold at a false accept rate of 0\.0001: measured are 0\.01, 0\.001"):
        config.threshold(1e-4)
    assert config.match_probability(0.3) == pytest.approx(0.5)
    odds = math.exp(10 * 0.5 - 3) * 0.01 / 0.99  # Bayes: posterior odds are likelihood ratio times prior odds
    assert config.match_probability(0.5, prior=0.01) == pytest.approx(odds / (1 + odds))
    assert config.match_probability(-200) == 0 and config.match_probability(200) == 1  # no overflow
    for call in (lambda: AdaptFaceConfig().threshold(0.01), lambda: AdaptFaceConfig().match_probability(0.5)):
        with pytest.raises(ValueError, match="was measured"):
            call()


def test_round_trip_through_json(tmp_path: Path) -> None:
    base = Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2)
    base._name_or_path = "/home/someone/secret"
    config = AdaptFaceConfig(backbone_config=base, domains=["a", "b"], router_layer=0, thresholds=THRESHOLDS)
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert "secret" not in text
    assert json.loads(text)["auto_map"] == {"AutoConfig": "configuration_adaptface.AdaptFaceConfig"}
    again = AdaptFaceConfig.from_pretrained(tmp_path)
    written = {k: v for k, v in config.to_dict().items() if k != "architectures"}
    assert {k: v for k, v in again.to_dict().items() if k in written} == written
    assert again.router_layer == 0 and again.thresholds == THRESHOLDS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"thresholds": {"1e-3": 0.4}}, "thresholds=.*: leave them to eval_benchmarks.py --write_thresholds"),
        ({"thresholds": THRESHOLDS | {"calibration": {"slope": None, "intercept": 0}}}, "thresholds=.*: leave them"),
        ({"adaptation": "lore"}, "adaptation='lore': choose one of lora, frozen, full"),
        ({"adapter_targets": "qkv"}, "adapter_targets='qkv': choose one of attention"),
        ({"lora_rank": 0}, "lora_rank=0: give a whole number above 0"),
        ({"lora_rank": 4.5}, "lora_rank=4.5"),
        ({"lora_rank": True}, "lora_rank=True"),
        ({"embedding_size": -1}, "embedding_size=-1"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf: give a finite number"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0: give a number in \[0, 1\)"),
        ({"router_dropout": "0.1"}, "router_dropout='0.1'"),
        ({"domains": []}, r"domains=\[\]: give a list of at least one name"),
        ({"domains": "age"}, "domains='age': give a list"),
        ({"domains": None}, "domains=None: give a list"),
        ({"adapter_layers": 3}, "adapter_layers=3: name blocks"),
        ({"adapter_layers": "12"}, "adapter_layers='12': name blocks"),
        ({"backbone_config": "x"}, "backbone_config='x': give a Dinov2Config or a dict"),
        ({"use_rslora": "no"}, "use_rslora='no': give True or False"),
        ({"lora_alpha": True}, "lora_alpha=True: give a finite number"),
        ({"domains": ["a", "a"]}, "each of them once"),
        ({"domains": ["a/b", "c"]}, "domains.*give names of letters"),
        ({"domains": ["..", "c"]}, "domains.*give names of letters"),
        ({"domains": ["old ", "c"]}, "domains.*give names of letters"),
        ({"domains": ["Pose", "pose"]}, "domains.*differ in more than their case"),
        ({"domains": ["a", ""]}, "domains"),
        ({"adapter_layers": []}, r"adapter_layers=\[\]: name blocks of the base, 0 to 11"),
        ({"adapter_layers": [12]}, r"adapter_layers=\[12\]"),
        ({"adapter_layers": [3, 3]}, "each once"),
        ({"router_layer": 12}, "router_layer=12: give a block from 0 to 11"),
        ({"router_layer": 3, "adapter_layers": [1, 2]}, "router_layer=3: give a block from 0 to 2"),
        ({"image_size": 225}, "image_size=225: give a multiple of the base's patch size, 14"),
        ({"backbone_config": {"model_type": "vit"}}, "model_type='vit'"),
        ({"backbone_config": {"drop_path_rate": 0.1}}, "drop_path_rate=0.1.*set it to 0"),
    ],
)
def test_errors_name_field_value_and_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptFaceConfig(**values)


# ---------------------------------------------------------------------------------------- versions of transformers


def test_the_range_of_transformers_is_one() -> None:
    root = Path(configuration_adaptface.__file__).parent
    oldest, unknown = configuration_adaptface.OLDEST_TRANSFORMERS, configuration_adaptface.UNKNOWN_TRANSFORMERS
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"transformers>={oldest},<{unknown}" in project["dependencies"]
    assert f"transformers>={oldest},<{unknown}" in (root / "README.md").read_text(encoding="utf-8")
    lines = {name: (root / name).read_text(encoding="utf-8") for name in ("constraints.txt", "constraints-oldest.txt")}
    assert f"\ntransformers=={oldest}." in lines["constraints-oldest.txt"], "the oldest is tested"
    assert f"\ntransformers=={int(unknown) - 1}." in lines["constraints.txt"], "and the newest major"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("4.56.2", "ImportError: transformers>=4.57 is required .*pip install -U 'transformers>=4.57'"),
        ("6.0.1", "AdaptFace is tested up to transformers 6, this is 6.0.1: look for a newer release of this model"),
        ("5.99.0", ""),
    ],
)
def test_other_transformers_are_told(version: str, said: str) -> None:
    code = (
        f"import importlib.metadata as m, transformers; real = m.version; transformers.__version__ = {version!r}\n"
        f"m.version = lambda name: {version!r} if name == 'transformers' else real(name)\n"
        "import configuration_adaptface"
    )
    root = Path(configuration_adaptface.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert re.search(said, " ".join(done.stderr.split())) if said else done.stderr == "", done.stderr
    assert (done.returncode != 0) == said.startswith("ImportError")
