# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What the expressions and components of a bundle's configs may name: a list of what is known to do no harm.

A name counts by where what it stands for is defined, so that another way to it (``torch.hub.os.system``) is found. Only
modules of this machine's MONAI, torch, ignite, numpy and bundle are looked into; nothing of a bundle is imported.
"""

import inspect
import re
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import ignite
import ignite.distributed
import ignite.engine
import ignite.handlers
import ignite.metrics
import monai
import numpy
import torch
import torch.distributed
from monai.bundle import ComponentLocator

import bundle

ROOTS = {"monai": monai, "torch": torch, "ignite": ignite, "numpy": numpy, "bundle": bundle}
MONAI_GLOBALS = {"monai": "monai", "torch": "torch", "np": "numpy", "numpy": "numpy"}  # what MONAI lets expressions see

BUILTINS = set(
    "abs all any bool dict divmod enumerate filter float frozenset int isinstance issubclass len list map max min print "
    "range repr reversed round set slice sorted str sum tuple zip".split()
)
# Of the standard library, and of numpy and torch, which have much that writes files or runs code.
NAMES = {
    *(f"os.path.{name}" for name in "join exists isfile isdir basename dirname abspath normpath splitext relpath".split()),
    *(f"logging.{name}" for name in "DEBUG INFO WARNING ERROR CRITICAL getLogger info warning".split()),
    *(f"itertools.{name}" for name in "chain product repeat count islice zip_longest".split()),
    *(f"torch.{name}" for name in "device Tensor Size Generator random.manual_seed eye cat stack".split()),
    *(
        f"torch.{name}"
        for name in "FloatTensor LongTensor as_tensor from_numpy is_tensor set_float32_matmul_precision".split()
    ),
    *(f"torch.{name}" for name in "ones zeros full rand randn randint arange linspace tensor where nan_to_num".split()),
    *(f"torch.{name}" for name in "abs sum mean max min argmax softmax sigmoid exp log sqrt clamp round floor ceil".split()),
    *(f"torch.{name}" for name in "flatten permute squeeze unsqueeze float32 inf nan pi".split()),
    *(f"torch.cuda.{name}" for name in "is_available device_count set_device current_device empty_cache".split()),
    *(
        f"numpy.{name}"
        for name in "array asarray zeros ones full arange linspace pi inf nan e newaxis concatenate stack".split()
    ),
    *(
        f"numpy.{name}"
        for name in "abs sum mean std max min argmax exp log log2 sqrt clip round floor ceil where prod".split()
    ),
    *(f"numpy.{name}" for name in "unique sort transpose squeeze expand_dims moveaxis random.seed random.rand".split()),
    *("glob.glob", "json.load", "json.loads", "json.dumps", "copy.copy", "copy.deepcopy", "functools.partial"),
    *(
        "datetime.datetime",
        "datetime.date",
        "datetime.timedelta",
        "pathlib.Path",
        "pandas.read_csv",
        "collections.OrderedDict",
    ),
    *("pathlib.Path.cwd", "datetime.datetime.now", "datetime.date.today"),
    *("torch.autograd.grad_mode.no_grad", "torch.autograd.grad_mode.inference_mode"),
    *("torch.serialization.load", "monai.config.print_config", "monai.auto3dseg.utils.datafold_read"),
}
MODULES = set("os os.path logging itertools glob json copy functools datetime pathlib collections math".split())
# Modules, and below them all that is defined there.
PREFIXES = (
    *(f"monai.{name}." for name in "transforms networks losses metrics inferers engines handlers optimizers data".split()),
    *(f"monai.apps.{name}." for name in "detection pathology vista3d generation reconstruction deepedit deepgrow".split()),
    *("monai.visualize.", "monai.utils.enums.", "monai.utils.dist."),
    *("torch.nn.", "torch.optim.", "torch.utils.data.", "torch.backends.", "math."),
    *(f"torch.distributed.distributed_c10d.{name}" for name in ("get_", "is_", "init_process_group", "destroy_", "barrier")),
    *("ignite.engine.", "ignite.handlers.", "ignite.metrics.", "ignite.distributed."),
    *(f"monai.utils.misc.{name}" for name in ("set_determinism", "ensure_tuple", "first", "fall_back_tuple")),
    "bundle.",
)
# What of these runs commands or strangers' code, unpickles, downloads, or writes any file.
NOT = (
    *(f"bundle.{name}." for name in "files reading phantoms report errors sharing fast_gzip".split()),
    *("monai.data.utils.pickle_", "monai.data.torchscript_utils.", "monai.networks.trt_compiler."),
    *("monai.networks.utils.convert_to", "monai.networks.utils.save_state", "monai.losses.perceptual."),
    *(
        "ignite.distributed.launcher.",
        "ignite.distributed.utils.spawn",
        *(f"ignite.handlers.{name}" for name in "mlflow clearml neptune polyaxon visdom wandb".split()),
    ),
    *("torch.utils.data.datapipes.", "torch.backends._", "monai.networks.nets.flexible_unet.FlexUNetEncoderRegister"),
    "monai.networks.layers.gmm.",  # compiles code with its arguments on the command line
    *("monai.networks.nets.resnet.get_pretrained_resnet_medicalnet", "ignite.metrics.gan.", "ignite.metrics.fid"),
    "monai.data.utils.create_file_basename",
)
# An argument or key that makes code run, and what is harmless there.
READERS = set("itkreader nibabelreader numpyreader pilreader pydicomreader nrrdreader wsireader".split())
READERS |= set("itkwriter nibabelwriter pilwriter avgmerger zarravgmerger cucim openslide tifffile".split())
RISKY_KEYS = {
    "weights_only": ("true, or else a pickle in the file runs", lambda v: v is True),
    "allow_pickle": ("false, or else a pickle in the file runs", lambda v: v is False),
    "pickle_module": ("left out", lambda v: v in (None, "pickle")),
    "reader": ("one of MONAI's readers", lambda v: v is None or str(v).lower() in READERS),
    "writer": ("one of MONAI's writers", lambda v: v is None or str(v).lower() in READERS),
    "merger_cls": ("one of MONAI's mergers", lambda v: v is None or str(v).lower() in READERS),
    "pretrained": ("false: true downloads weights", lambda v: v in (None, False)),
    "_debug_": ("left out", lambda v: v in (None, False)),
    "_mode_": ("default or callable", lambda v: v in ("default", "callable")),
    "dataset_name_or_id": ("a plain name", lambda v: str(v).replace("_", "").replace("-", "").isalnum()),
    "pretrained_url": ("left out: it is downloaded", lambda v: v is None),
    "compile_kwargs": ("left out: it may name a compiler", lambda v: v in (None, {})),
    "postprocessing_file": ("left out: it is unpickled", lambda v: v is None),
    "shell": ("false", lambda v: v in (None, False)),
}
OUTPUTS = ("output_dir", "ckpt_dir", "save_dir", "log_dir", "cache_dir", "dirname", "export_dir", "filename")
OUTPUTS += ("final_filename", "file_prefix", "filename_prefix", "mapping_file_path", "output_postfix")
STRICT_KEYS = set(RISKY_KEYS)  # whose values must be written out, and never be a reference that can't be followed


def within(value: Any) -> bool:
    """Whether a value, if it is a path, stays in the bundle."""
    return not re.match(r"[/\\~]|\w:|.*\.\.", str(value))


RISKY_KEYS |= {name: ("a place within the bundle", within) for name in OUTPUTS}
READ_MODES = (None, "r", "rb", "rt")


@dataclass(frozen=True)
class Known:
    """What an allowed name stands for; `module` if it is a module, through which others are reached."""

    home: str
    value: Any = None
    module: bool = False


@cache
def known(name: str) -> Known | None:
    """What a dotted name stands for if a bundle may use it, else None."""
    root, *rest = name.split(".")
    if any(part.startswith("_") or part == "mro" for part in rest):
        return None
    if root not in ROOTS:
        if name in MODULES:
            return Known(name, module=True)
        return Known(name) if name in NAMES or name.startswith("math.") else None
    value, home = ROOTS[root], root
    for part in rest:
        try:
            value = getattr(value, part)
        except Exception:  # an import on demand can raise anything
            return None
        if isinstance(value, ModuleType):
            home = value.__name__
            if home.partition(".")[0] not in ROOTS:
                return None
        else:
            home = home_of(value, f"{home}.{part}")
    if isinstance(value, ModuleType):
        return Known(home, module=True)
    return Known(home, value) if allowed(home, value) else None


def home_of(value: Any, path: str) -> str:
    """Where a class or function is defined; for any other value, the path that led to it."""
    if path.startswith("torch.") and value is getattr(torch._C._VariableFunctions, path[6:], torch):
        return path  # torch's own functions on tensors name no module
    module = getattr(value, "__module__", None) if inspect.isclass(value) or inspect.isroutine(value) else None
    return f"{module}.{value.__qualname__}" if isinstance(module, str) else path


def allowed(home: str, value: Any) -> bool:
    """Whether a bundle may use what is defined there."""
    if isinstance(value, (torch.dtype, numpy.dtype)) or (inspect.isclass(value) and issubclass(value, numpy.generic)):
        return True
    return home in NAMES or (home.startswith(PREFIXES) and not home.startswith(NOT))


@cache
def component(target: str) -> Known | None:
    """What the text of a ``_target_`` stands for if a bundle may use it: a dotted name, or one of MONAI's own."""
    if "." in target:
        found = known(target)
        return None if found is None or found.module else found
    modules = _locator().get_component_module_name(target)
    found = [known(f"{m}.{target}") for m in ([modules] if isinstance(modules, str) else modules or [])]
    return found[0] if found and all(found) else None


@cache
def _locator() -> ComponentLocator:
    return ComponentLocator(excludes=[])


def downloads(value: Any) -> bool:
    """Whether a callable downloads weights where it isn't told not to, by `pretrained`."""
    try:
        argument = inspect.signature(value).parameters.get("pretrained")
    except (ValueError, TypeError):
        return False
    return argument is not None and argument.default is True


def parameters(value: Any) -> list[str]:
    """The names of a callable's parameters, in order."""
    try:
        return list(inspect.signature(value).parameters)
    except (ValueError, TypeError):
        return []
