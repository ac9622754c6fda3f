# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A config is checked whole before any of it is built: misspelt keys, switches as text, values that nothing can use.

MONAI sets whatever key a command line names, so that a misspelt one is ignored, and Python Fire hands over ``false`` as a
text, which is true. Neither may pass without a word.
"""

from __future__ import annotations

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

__all__ = ["check_config", "flat", "running_config"]

PATHS = ("bundle_root", "cohort", "image", "ckpt", "ckpt_dir", "output_dir", "cache_dir", "maps_dir", "lungmask_weights")
# The least value of each key that is a number, and whether it is a whole one.
NUMBERS = {
    "batch_size": (1, int),
    "fold": (0, int),
    "horizon": (1, int),
    "jobs": (1, int),
    "learning_rate": (0, float),
    "max_epochs": (1, int),
    "num_workers": (0, int),
    "patience": (1, int),
    "seed": (0, int),
    "shifts": (1, int),
    "sigma": (0, float),
    "tmax": (2, int),
    "val_interval": (1, int),
}
# What MONAI itself reads of a config, whether anything in the config refers to it or not.
MONAI_KEYS = {"_meta_", "imports", "initialize", "run", "finalize", *DEFAULT_MLFLOW_SETTINGS["configs"]}
MONAI_KEYS |= {re.split("::|#", p["id"])[0] for p in (*TrainProperties.values(), *InferProperties.values())}

_REFERENCE = re.compile(r"@([\w:#]+)")


def running_config() -> tuple[ConfigParser | None, str | None]:
    """The parser of the config that is being evaluated, and its first file; None each where there is none.

    MONAI hands an expression nothing of the parser that evaluates it, so the callers are searched for it.
    """
    parser, file = None, None
    frame = inspect.currentframe()
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


def components(config: Any, key: str = "") -> Iterator[tuple[str, dict]]:
    """Every part of a config that has a ``_target_``, with its id."""
    if isinstance(config, dict) and "_target_" in config:
        yield key, config
    if isinstance(config, (dict, list)):
        for name, value in config.items() if isinstance(config, dict) else enumerate(config):
            yield from components(value, f"{key}#{name}" if key else str(name))


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
    for key, value in list(flat(config)):
        if isinstance(value, str) and value.lower() in ("true", "false"):
            parser[key] = value.lower() == "true"
    for key in PATHS:
        if isinstance(config.get(key), (int, float)) and not isinstance(config.get(key), bool):
            if isinstance(config[key], float):
                faults.append(f"--{key} is the number {config[key]} (expected a path; put ./ before its name).")
            config[key] = str(config[key])
    if isinstance(config.get("spacing"), (int, float)):
        config["spacing"] = [float(config["spacing"])] * 3  # the same along every axis
    faults += number_faults(config)
    for key, component in list(components(config)):
        faults += component_faults(parser, key, component)
    faults += device_faults(config)
    if faults:
        raise InputError("\n       ".join(faults))
    parser.parse(reset=True)


def unknown_keys(config: dict, written: dict) -> Iterator[str]:
    """A sentence on each key at the top of a config that is not `written` in its first file and that nothing reads.

    One that starts with ``_`` is a note.
    """
    read = {re.split("::|#", name)[0] for _, v in flat(config) if isinstance(v, str) for name in _REFERENCE.findall(v)}
    for key in config.keys() - written.keys() - read - MONAI_KEYS:
        if not key.startswith("_"):
            yield f"--{key} is no key of this config{nearest(key, sorted(written))}."


def nearest(name: str, known: list[str]) -> str:
    """``(did you mean X?)`` of the known name that is most alike, if one is."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {match[0]}?)" if match else ""


def number_faults(config: dict) -> Iterator[str]:
    """A sentence on each number at the top of a config that is none, or too small."""
    for key, (least, kind) in NUMBERS.items():
        value = config.get(key)
        if value is None or isinstance(value, dict) or str(value)[:1] in ("$", "@"):
            continue
        number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not (number and value >= least):
            yield f"--{key} is {value} (expected a {'whole ' if kind is int else ''}number, at least {least})."


def component_faults(parser: ConfigParser, key: str, component: dict) -> Iterator[str]:
    """A sentence on each argument of a component that it doesn't take, or that is no switch where one is expected."""
    name = component["_target_"]
    if name == "MLFlowHandler" and importlib.util.find_spec("mlflow") is None:
        yield "--tracking mlflow needs the package mlflow: pip install mlflow."
    target = locate(ConfigComponent(component, key, parser.locator).resolve_module_name())
    if target is None:
        yield f"{key}: there is nothing called {name}."
        return
    parameters, open_ended = parameters_of(target)
    for argument in component.keys() - ConfigComponent.non_arg_keys:
        if argument in parameters:
            if "bool" in str(parameters[argument].annotation).split(" | ") or parameters[argument].annotation is bool:
                yield from switch_faults(parser, f"{key}#{argument}")
        elif not open_ended:
            short = name.split(".")[-1]
            yield f"--{key}#{argument}: {short} has no argument {argument}{nearest(argument, list(parameters))}."


def parameters_of(target: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters of a class or function by name, and whether it takes any other.

    ``**kwargs`` of a constructor are taken to be those of its base classes' constructors.
    """
    kinds = target.__mro__ if inspect.isclass(target) else [target]
    found: dict[str, inspect.Parameter] = {}
    for kind in kinds:
        if inspect.isclass(kind) and "__init__" not in vars(kind):
            continue
        try:
            parameters = inspect.signature(kind.__init__ if inspect.isclass(kind) else kind).parameters
        except (ValueError, TypeError):  # written in C
            return found, True
        found = dict(parameters) | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return found, False
    return found, True


def switch_faults(parser: ConfigParser, key: str) -> Iterator[str]:
    """Make a bool of the value that a switch has, wherever in the config that is written; a sentence if it is none."""
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
    """A sentence if ``device`` names one that isn't there; the name becomes the device."""
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
