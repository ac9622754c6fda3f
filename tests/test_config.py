# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What a config can't mean is refused in one sentence before anything is built, and a switch is a switch."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from bundle.errors import InputError
from bundle.maps import GridShiftInferer
from bundle.networks import SurvivalMapNet
from bundle.run import share_of_window
from bundle.run.config import check_config, flat
from bundle.survival import CenTime, SurvivalMapLoss

from .commands import TRAIN, command_line, run, train

CONFIGS = ("train", "inference", "evaluate")
OVERRIDES = sorted(str(p) for p in Path("configs").rglob("*/*.json") if p.parent.name != "tracking")


def checked(config="configs/train.json", **override) -> ConfigParser:
    """A config with overrides, as its first step sees it."""
    parser = ConfigParser()
    parser.read_config(config)
    parser.read_meta("configs/metadata.json")
    parser.update(override)
    parser.parse()
    check_config(parser, config if isinstance(config, str) else config[0])
    return parser


# ------------------------------------------------------------------------------------------------------------ switches


@pytest.mark.parametrize(
    "text, value", [("false", False), ("False", False), ("true", True), ("no", False), ("1", True), (0, False)]
)
@pytest.mark.parametrize("switch", ["texture", "film_context", "center_tokens", "learn_beta"])
def test_a_switch_of_the_network_is_what_the_command_line_says(switch, text, value):
    parser = checked(**{f"network_def#{switch}": text})
    assert parser.get_parsed_content("network_def").arguments[switch] is value


def test_every_switch_of_every_config_takes_words():
    """Whatever argument a component declares to be a bool, wherever in the config its value is written."""
    for name in CONFIGS:
        switches = [key for key, value in flat(checked(f"configs/{name}.json").config) if isinstance(value, bool)]
        assert len(switches) >= 5
        for key in switches:
            assert checked(f"configs/{name}.json", **{key: "False"})[key] is False, key
            assert checked(f"configs/{name}.json", **{key: "TRUE"})[key] is True, key


@pytest.mark.parametrize("key", ["network_def#texture", "resume", "lung_mask_fill", "objective#mixture"])
def test_what_is_no_switch_is_refused(key):
    with pytest.raises(InputError, match=f"--{key} is maybe .expected true or false"):
        checked(**{key: "maybe"})


def test_the_switch_is_saved_and_used(tiny_cohort, tmp_path):
    model = train(
        tiny_cohort, tmp_path, max_epochs=1, **{"network_def#texture": "false", "network_def#film_context": "true"}
    )
    network = json.loads((model.parent / "settings.json").read_text())["network"]
    assert network["texture"] is False and network["film_context"] is True


# -------------------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    "config, key, hint",
    [
        ("train", "max_epoch", "--max_epoch is no key of this config (did you mean max_epochs?)"),
        ("train", "learning_rat", "--learning_rat is no key of this config (did you mean learning_rate?)"),
        (
            "train",
            "network_def#detph",
            "--network_def#detph: SurvivalMapNet has no argument detph (did you mean depth?)",
        ),
        ("train", "optimizer#weigth_decay", "AdamW has no argument weigth_decay (did you mean weight_decay?)"),
        ("train", "train#trainer#max_epoch", "SupervisedTrainer has no argument max_epoch (did you mean max_epochs?)"),
        (
            "train",
            "load_transforms#4#lung_liters",
            "QualityGated has no argument lung_liters (did you mean lung_litres?)",
        ),
        ("train", "train#patince", "--train#patince is no key of this config (did you mean patience?)"),
        ("train", "validate#key_metrics", "--validate#key_metrics is no key of this config (did you mean key_metric?)"),
        ("inference", "lungmask", "--lungmask is no key of this config (did you mean lung_mask?)"),
        ("inference", "fold", "--fold is no key of this config"),
        (
            "inference",
            "evaluator#val_handler",
            "ScanEvaluator has no argument val_handler (did you mean val_handlers?)",
        ),
        ("evaluate", "figure", "--figure is no key of this config (did you mean figures?)"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_right_name(config, key, hint):
    with pytest.raises(InputError) as fault:
        checked(f"configs/{config}.json", **{key: 1})
    assert hint in str(fault.value)


def test_all_faults_are_said_at_once(tiny_cohort):
    done = command_line(
        "--config_file", "configs/train.json", "--max_epoch", "1", "--learning_rat", "0.1", "--batch_size", "0"
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(
        word in done.stderr for word in ("did you mean max_epochs", "did you mean learning_rate", "--batch_size is 0")
    )


def test_a_key_that_an_expression_reads_and_a_note_are_welcome():
    parser = checked(**{"speed": 0.5, "learning_rate": "$0.002 * @speed", "_note": "for Thursday"})
    assert parser.get_parsed_content("learning_rate") == 0.001


@pytest.mark.parametrize("name", [*OVERRIDES, *(f"configs/{n}.json" for n in ("finetune", "multi_gpu_train", "pretrain"))])
def test_shipped_overrides_of_training_pass(name):
    checked(["configs/train.json", name])


@pytest.mark.parametrize("base", ["inference", "evaluate"])
def test_the_ensemble_passes(base):
    checked([f"configs/{base}.json", "configs/ensemble.json"])


def test_a_component_that_does_not_exist_is_named():
    with pytest.raises(InputError, match="--network_def#_target_ is bundle.networks.SurvivalNet .*there is nothing of"):
        checked(**{"network_def#_target_": "bundle.networks.SurvivalNet"})


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "override, message",
    [
        ({"max_epochs": 0}, "--max_epochs is 0 .expected a whole number, at least 1"),
        ({"batch_size": 0}, "--batch_size is 0 .expected a whole number, at least 1"),
        ({"batch_size": "many"}, "--batch_size is many"),
        ({"max_epochs": 2.5}, "--max_epochs is 2.5"),
        ({"learning_rate": -1}, "--learning_rate is -1"),
        ({"seed": "abc"}, "--seed is abc"),
        ({"device": "cuda:7"}, "--device cuda:7 can't be used"),
        ({"device": "gpu"}, "--device gpu can't be used"),
        ({"ckpt_dir": 1.5}, "--ckpt_dir is the number 1.5"),
    ],
)
def test_a_value_that_nothing_can_use_is_one_sentence(override, message):
    with pytest.raises(InputError, match=message):
        checked(**override)


@pytest.mark.parametrize("hu", [5, [-900], [-700, -900], [-1100, -700], [-900, 300], "wide", [-900, "high"]])
def test_a_narrow_window_outside_the_window_is_one_sentence(hu):
    message = "^--narrow_hu_window is .* .expected null, or two ascending HU within hu_window, -1000 to 200"
    with pytest.raises(InputError, match=message):
        share_of_window(hu, [-1000, 200])


def test_a_narrow_window_of_one_number_ends_a_training_in_one_sentence(tiny_cohort, tmp_path):
    with pytest.raises(InputError, match="--narrow_hu_window is 5 .expected null, or two ascending HU"):
        train(tiny_cohort, tmp_path, narrow_hu_window=5)


def test_a_folder_may_be_called_by_a_number(tiny_cohort, tmp_path, monkeypatch):
    assert checked(ckpt_dir=123)["ckpt_dir"] == "123"


def test_spacing_may_be_one_number(tiny_cohort, tmp_path):
    model = train(tiny_cohort, tmp_path, max_epochs=1, spacing=3)
    assert json.loads((model.parent / "settings.json").read_text())["preprocessing"]["spacing"] == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("tracking", ["mlflow", "configs/tracking/mlflow.json"])
def test_mlflow_that_is_not_installed_is_one_sentence(tracking, tiny_cohort, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "mlflow" else find(name, *more))
    with pytest.raises(InputError, match="MLflow is not installed: pip install -r requirements-mlflow.txt"):
        run(TRAIN, cohort=str(tiny_cohort), ckpt_dir=str(tmp_path), output_dir=str(tmp_path), tracking=tracking)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_horizon_beyond_the_last_month_is_refused(config, tiny_cohort, tmp_path, trained):
    args = {"cohort": str(tiny_cohort), "output_dir": str(tmp_path), "horizon": 101}
    args |= {"ckpt_dir": str(tmp_path)} if config == "train" else {"ckpt": str(trained)}
    with pytest.raises(InputError, match="horizon is 101 months .expected at most tmax.* 100"):
        run(TRAIN if config == "train" else f"configs/{config}.json", **args)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["inference", "evaluate"])
def test_an_override_within_the_transforms_works_everywhere(config, tiny_cohort, tmp_path, trained):
    args = {"cohort": str(tiny_cohort), "ckpt": str(trained), "output_dir": str(tmp_path)}
    run(f"configs/{config}.json", **args, **{"load_transforms#4#lung_litres": [0.3, 10]})
    assert any(tmp_path.iterdir())


def test_nothing_stands_in_the_way_of_an_override():
    """A macro's content can't be overridden, and its file is sought in the folder where the command is run."""
    for path in Path("configs").rglob("*.json"):
        config = json.loads(path.read_text())
        assert not [key for key, value in flat(config) if isinstance(value, str) and value.startswith("%")], path


def test_a_run_from_another_folder(tiny_cohort, tmp_path, root, trained):
    args = ["--config_file", str(root / "configs" / "inference.json"), "--bundle_root", str(root), "--shifts", "1"]
    args += ["--image", str(tiny_cohort.parent / "p4.nii.gz"), "--ckpt", str(trained), "--output_dir", "out"]
    command = [sys.executable, "-m", "monai.bundle", "run", *args]
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "predictions.csv").is_file()


def test_a_package_that_is_missing_is_named(root):
    code = "import sys; sys.modules['filelock'] = None; from monai.bundle import run; run(config_file='configs/train.json')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 1 and "ModuleNotFoundError: import of filelock" in done.stderr


# ------------------------------------------------------------------------------------------------- configs as they ship


def test_defaults_in_code_are_those_of_the_config():
    config = ConfigParser.load_config_file("configs/train.json")
    inference = ConfigParser.load_config_file("configs/inference.json")
    parts = {
        SurvivalMapNet: config["network_def"],
        CenTime: config["objective"],
        SurvivalMapLoss: config["loss"],
        GridShiftInferer: {key: inference[key] for key in ("sigma", "refine")},
    }
    for kind, written in parts.items():
        defaults = {p.name: p.default for p in inspect.signature(kind).parameters.values() if p.default is not p.empty}
        for key, value in written.items():
            plain = not (isinstance(value, dict) or str(value)[:1] in "$@") and key in defaults
            assert not plain or defaults[key] == value, (kind, key)


def test_expressions_are_few_and_short():
    for name, most in {"train": 40, "inference": 40, "evaluate": 40}.items():
        config = ConfigParser.load_config_file(f"configs/{name}.json")
        expressions = [value for _, value in flat(config) if isinstance(value, str) and value.startswith("$")]
        assert len(expressions) <= most and max(map(len, expressions)) <= 100
        assert not any("lambda" in value for value in expressions)


def test_a_device_by_name_is_used():
    parser = checked(device="cpu")
    assert parser.get_parsed_content("device") == torch.device("cpu")
