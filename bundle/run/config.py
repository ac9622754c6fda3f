# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A config is checked whole before any of it is built: misspelt keys, switches as text, values that nothing can use.

MONAI sets whatever key a command line names, so that a misspelt one is ignored, and Python Fire hands over ``false`` as
a text, which is true.
"""

import difflib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pydoc import locate
from typing import Any

import torch
from monai.bundle import ConfigParser, ReferenceResolver
from monai.bundle.config_item import ConfigComponent
from monai.bundle.properties import InferProperties, TrainProperties
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS
from monai.utils import ensure_tuple, str2bool

from bundle.errors import InputError

PATHS = ("bundle_root", "cohort", "image", "ckpt", "lungmask_weights", "pretrained")
PATHS += ("ckpt_dir", "output_dir", "cache_dir", "maps_dir")
# The least value of each key that is a whole number, and of each that is any.
COUNTS = {"tmax": 2, "fold": 0, "num_workers": 0, "seed": 0}
COUNTS |= dict.fromkeys(("batch_size", "horizon", "jobs", "max_epochs", "patience", "shifts", "val_interval"), 1)
NUMBERS = {"learning_rate": 0, "sigma": 0}
# What MONAI itself reads of a config, whether anything in the config refers to it or not.
MONAI_KEYS = {"_meta_", "imports", "initialize", "run", "finalize", *DEFAULT_MLFLOW_SETTINGS["configs"]}
MONAI_KEYS |= {re.split("::|#", p["id"])[0] for p in (*TrainProperties.values(), *InferProperties.values())}

_REFERENCE = re.compile(r"@([\w:#]+)")


def running_config() -> tuple[ConfigParser | None, str | None]:
    """The parser of the config that is being evaluated, and its first file; None each where there is none."""
    parser, file = None, None
    frame = inspect.currentframe()  # MONAI hands an expression nothing of its parser, but that is among the callers
    while frame is not None:
        if parser is None and isinstance(frame.f_locals.get("self"), ConfigParser):
            parser = frame.f_locals["self"]
        if frame.f_code.co_name == "create_workflow" and frame.f_locals.get("config_file"):
            file = ensure_tuple(frame.f_locals["config_file"])[0]
        frame = frame.f_back
    return parser, file


def flat(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a config with its id, such as ``network_def#depth``.

    Example::

        >>> dict(flat({"a": 1, "b": {"c": [2, 3]}}))
        {'a': 1, 'b#c#0': 2, 'b#c#1': 3}
    """
    if isinstance(config, (dict, list)) and config:
        items = config.items() if isinstance(config, dict) else enumerate(config)
        for name, value in items:
            yield from flat(value, f"{key}#{name}" if key else str(name))
    else:
        yield key, config


def check_config(parser: ConfigParser, file: str | None = None) -> None:
    """Refuse what a config can't mean, and turn texts into the switches and paths that they stand for, in place.

    Args:
        parser: of the config with all its overrides; it is parsed again.
        file: its first file, whose keys an override may repeat; without one, every key is taken to be known.

    Raises:
        InputError: every fault that was found, one after the other.
    """
    config = parser.config
    faults = list(unknown_keys(config, ConfigParser.load_config_file(file))) if file else []
    leaves = list(flat(config))
    for key, value in leaves:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            parser[key] = value.lower() == "true"
    for key in PATHS:
        if type(config.get(key)) is float:  # 1.50 is 1.5 by now
            faults.append(f"--{key} is the number {config[key]} (expected a path; put ./ before its name).")
        if type(config.get(key)) is int:
            config[key] = str(config[key])
    if isinstance(config.get("spacing"), (int, float)):
        config["spacing"] = [float(config["spacing"])] * 3  # the same along every axis
    faults += number_faults(config)
    for key, name in leaves:
        if key.endswith("#_target_"):
            faults += component_faults(parser, key.removesuffix("#_target_"), name)
    faults += device_faults(config)
    if faults:
        raise InputError("\n       ".join(faults))
    parser.parse(reset=True)


def unknown_keys(config: dict, written: dict) -> Iterator[str]:
    """A sentence on each key that is not `written` in the first file, nor read, nor a note (``_...``).

    Keys at the top, and those of the sections that are only read part by part, such as ``train``.
    """
    texts = [value for _, value in flat(config) if isinstance(value, str)]
    read = {name.replace("::", "#") for text in texts for name in _REFERENCE.findall(text)}
    sections = {"": (config, written)}
    for name in written.keys() - read:
        if isinstance(written[name], dict) and "_target_" not in written[name] and isinstance(config.get(name), dict):
            sections[f"{name}#"] = (config[name], written[name])
    for prefix, (found, known) in sections.items():
        for key in found.keys() - known.keys():
            whole = prefix + key
            used = whole in MONAI_KEYS or any(f"{name}#".startswith(f"{whole}#") for name in read)
            if not used and not key.startswith("_"):
                yield f"--{whole} is no key of this config{nearest(key, known)}."


def nearest(name: str, known: dict) -> str:
    """``(did you mean X?)`` of the known name that is most alike, if one is."""
    match = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {match[0]}?)" if match else ""


def number_faults(config: dict) -> Iterator[str]:
    """A sentence on each number at the top of a config that is none, or too small."""
    for key, least in (COUNTS | NUMBERS).items():
        value = config.get(key)
        if value is None or isinstance(value, dict) or str(value)[:1] in ("$", "@"):
            continue
        kinds, expected = (int, "a whole number") if key in COUNTS else ((int, float), "a number")
        if isinstance(value, bool) or not isinstance(value, kinds) or value < least:
            yield f"--{key} is {value} (expected {expected}, at least {least})."


def component_faults(parser: ConfigParser, key: str, name: str) -> Iterator[str]:
    """A sentence on each argument of a component that it doesn't take, or that is no switch where one is expected."""
    if name.split(".")[-1] in ("MLFlowHandler", "MlflowHandler") and importlib.util.find_spec("mlflow") is None:
        yield "MLflow is not installed: pip install -r requirements-mlflow.txt."
    component = parser[key]
    target = locate(ConfigComponent(component, key, parser.locator).resolve_module_name())
    if target is None:
        yield f"--{key}#_target_ is {name} (expected a class or function; there is nothing of that name)."
        return
    parameters, open_ended = parameters_of(target)
    for argument in component.keys() - ConfigComponent.non_arg_keys:
        if argument in parameters:
            annotation = parameters[argument].annotation
            if annotation is bool or "bool" in str(annotation).split(" | "):
                yield from switch_faults(parser, f"{key}#{argument}")
        elif not open_ended:
            short = name.split(".")[-1]
            yield f"--{key}#{argument}: {short} has no argument {argument}{nearest(argument, parameters)}."


def parameters_of(target: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters of a class or function by name, and whether it takes any other."""
    calls = [target]
    if inspect.isclass(target):  # ``**kwargs`` of a constructor are those of its base classes' constructors
        calls = [vars(kind)["__init__"] for kind in target.__mro__ if "__init__" in vars(kind)]
    found: dict[str, inspect.Parameter] = {}
    for call in calls:
        try:
            parameters = inspect.signature(call).parameters
        except (ValueError, TypeError):  # written in C
            return found, True
        found = dict(parameters) | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return found, False
    return found, True


def switch_faults(parser: ConfigParser, key: str) -> Iterator[str]:
    """Make a bool of the value that a switch has, wherever in the config it is written; a sentence if it is none."""
    value = parser.get(key)
    while isinstance(value, str) and re.fullmatch(r"@[\w:#]+", value):
        key, value = ReferenceResolver.normalize_id(value[1:]), parser.get(value[1:])
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value.startswith("$")):
        return
    try:
        parser[key] = str2bool(str(value))
    except ValueError:
        yield f"--{key.replace('::', '#')} is {value} (expected true or false)."


def device_faults(config: dict) -> Iterator[str]:
    """Make a device of the name in ``device``; a sentence if it isn't there."""
    name = config.get("device")
    if name is None or str(name).startswith("$"):
        return
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "meta"):
            torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError, ImportError):
        count = torch.cuda.device_count()
        there = "only cpu is here" if count == 0 else "expected cpu" + "".join(f", cuda:{i}" for i in range(count))
        yield f"--device {name} can't be used ({there})."
        return
    config["device"] = f"$torch.device('{device}')"
