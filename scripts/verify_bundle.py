# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Check what a pull request to the MONAI model zoo is checked for; one sentence for each fault.

    python -m scripts.verify_bundle                   # this repository
    python -m scripts.verify_bundle survival_map.zip  # what scripts.share packed, or a folder of it

A bundle from elsewhere is audited first, and nothing of it is run if the audit finds anything. Exit codes: 0 no fault,
1 faults, 2 unreadable.

Source: https://github.com/Project-MONAI/model-zoo, CONTRIBUTING.md and ci/verify_bundle.py.
"""

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import monai.bundle
import torch
from jsonschema import Draft202012Validator
from monai.bundle import ConfigParser, ConfigWorkflow

from bundle.errors import InputError
from bundle.sharing.audit import HOME, audit
from bundle.sharing.install import install
from bundle.sharing.pack import UNKNOWN_LICENSE
from bundle.sharing.source import ZipSource, open_source

METADATA = "configs/metadata.json"
REQUIRED = (
    "LICENSE",
    METADATA,
    "configs/inference.json",
    "configs/train.json",
    "configs/logging.conf",
    "models/model.pt",
    "models/settings.json",
    "docs/README.md",
    "docs/data_license.txt",
)
FORBIDDEN = {
    "*.pyc *.pyo .DS_Store Thumbs.db *.ipynb_checkpoints* *.swp *~ *.bak": "a leftover of an editor or of Python",
    "*.dcm *.dicom DICOMDIR": "a DICOM file, which names its patient",
    "*.pem *.key id_rsa* id_ed25519* .env .netrc": "a key or a password",
    "*.pkl *.pickle *.joblib": "a pickle, which runs code as it is opened",
    "*.zip *.tar *.tar.gz *.tgz *.7z *.rar": "an archive, which nobody looks into",
}
MAX_FILE = 25_000_000  # bytes; larger ones go into large_files.yml
SCHEMA = HOME / "tests" / "metadata_schema.json"  # the zoo's own is downloaded
KEYS = {
    "configs/inference.json": "bundle_root dataset_dir device network_def inferer output_dir preprocessing postprocessing",
    "configs/train.json": "bundle_root dataset_dir device output_dir val_interval network_def train#trainer#max_epochs "
    "train#dataset#data train#handlers train#inferer train#preprocessing validate#evaluator validate#handlers "
    "validate#dataset#data validate#inferer validate#preprocessing validate#key_metric",
}
WORKFLOWS = {"configs/train.json": "train", "configs/inference.json": "infer"}
TOLERANCE = 1e-4  # of the largest value of a channel


def names_of(folder: Path) -> list[str]:
    """The files of a bundle: of a git repository those it doesn't ignore, of a folder all."""
    if (folder / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return sorted(name for name in listed.stdout.split("\0") if name and (folder / name).exists())
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(path.as_posix() for path in paths if "__pycache__" not in path.parts)  # which a run of it leaves


def file_faults(folder: Path) -> Iterator[str]:
    """What is missing, forbidden or too large."""
    names = names_of(folder)
    for name in REQUIRED:
        if name not in names:
            yield f"{name} is missing."
        elif (folder / name).stat().st_size == 0:
            yield f"{name} is empty."
    for name in names:
        path = folder / name
        for patterns, what in FORBIDDEN.items():
            if any(fnmatch(PurePosixPath(name).name, pattern) for pattern in patterns.split()):
                yield f"{name} is {what}: leave it out."
        if path.is_symlink():
            yield f"{name} is a link (expected a file)."
        elif path.stat().st_size > MAX_FILE:
            size = path.stat().st_size / 1e6
            yield f"{name} has {size:.0f} MB (expected at most {MAX_FILE / 1e6:.0f}; name its address in large_files.yml)."


def metadata_faults(folder: Path) -> Iterator[str]:
    """What of `configs/metadata.json` is not as the schema says; version, changelog and packages."""
    try:
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    except ValueError as e:
        yield f"{METADATA} can't be read as JSON: {e}."
        return
    errors = sorted(Draft202012Validator(json.loads(SCHEMA.read_text())).iter_errors(metadata), key=lambda e: list(e.path))
    for error in errors:
        yield f"{METADATA}{''.join(f' · {part}' for part in error.path)}: {error.message}."
    if errors:
        return
    version, changelog = metadata["version"], metadata["changelog"]
    newest = max(changelog, key=lambda text: [int(number) for number in re.findall(r"\d+", text)])
    if version not in changelog:
        yield f"{METADATA}: version {version} is not in the changelog (expected an entry on what is new)."
    elif version != newest:
        yield f"{METADATA}: version is {version}, but the changelog goes up to {newest}."
    if (folder / "pyproject.toml").is_file():
        packaged = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["version"]
        if packaged != version:
            yield f"pyproject.toml has version {packaged}, {METADATA} has {version} (expected the same)."
    if (folder / "requirements.txt").is_file():
        needed = re.findall(r"^[\w.-]+", (folder / "requirements.txt").read_text(), re.M)
        missing = sorted(set(needed) - metadata["required_packages_version"].keys() - {"torch", "monai", "numpy"})
        if missing:
            yield f"{METADATA} · required_packages_version lacks {', '.join(missing)}, which requirements.txt has."


def document_faults(folder: Path) -> Iterator[str]:
    """Licences, and what a reader must be told."""
    if "Apache License" not in (folder / "LICENSE").read_text(encoding="utf-8")[:500]:
        yield "LICENSE is another than Apache-2.0, which the model zoo expects of code."
    if (folder / "docs/data_license.txt").read_text(encoding="utf-8").strip() in ("", UNKNOWN_LICENSE.strip()):
        yield "docs/data_license.txt doesn't say under which licence the training data are (pack with --data_license)."
    use = json.loads((folder / METADATA).read_text(encoding="utf-8")).get("intended_use", "")
    if not use:
        yield f"{METADATA} has no intended_use."
    elif use.lower() not in " ".join((folder / "docs/README.md").read_text(encoding="utf-8").split()).lower():
        yield f'docs/README.md doesn\'t say the intended use, "{use}".'


def config_faults(folder: Path) -> Iterator[str]:
    """Keys that programs which read a bundle expect, by name and as MONAI's workflows have them."""
    for name, keys in KEYS.items():
        parser = ConfigParser()
        parser.read_config(str(folder / name))
        missing = [key for key in keys.split() if key not in parser]
        if missing:
            yield f"{name} has no {', '.join(missing)}."
            continue
        options = {"config_file": str(folder / name), "meta_file": str(folder / METADATA), "bundle_root": str(folder)}
        workflow = ConfigWorkflow(**options, logging_file=False, workflow_type=WORKFLOWS[name])
        workflow.initialize()
        try:
            wrong = workflow.check_properties() or []
        except KeyError as e:
            yield f"{name}: {e.args[0]}"
            continue
        for wanted in wrong:
            yield f"{name}: the property {wanted} is not where MONAI's {WORKFLOWS[name]} workflows refer to it."


def network_faults(folder: Path) -> Iterator[str]:
    """Whether the network takes and gives what the metadata say."""
    options = {"meta_file": str(folder / METADATA), "config_file": str(folder / "configs/inference.json")}
    monai.bundle.verify_net_in_out(net_id="network_def", **options, bundle_root=str(folder), device="cpu", n=5)
    return iter(())


def torchscript_faults(folder: Path) -> Iterator[str]:
    """Whether the weights become TorchScript that gives what the network gives; and a `model.ts` that is there as well."""
    config, options = str(folder / "configs/inference.json"), {"bundle_root": str(folder), "device": "cpu"}
    parser = ConfigParser()
    parser.read_config(config)
    parser.update(options)
    network = parser.get_parsed_content("network_def").eval()
    generator = torch.Generator().manual_seed(0)
    image, lung = torch.rand(1, 1, 18, 16, 20, generator=generator), torch.zeros(1, 1, 18, 16, 20)
    lung[:, :, 3:14, 2:12, 1:19] = 1
    clinical = torch.rand(1, network.clinical_dim, generator=generator) if network.clinical_dim > 0 else None
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        expected = network(image, lung, clinical)
        scale = expected.abs().amax((0, 2, 3, 4)).clamp_min(1e-12)
        exported, shipped = Path(temporary) / "model.ts", folder / "models/model.ts"
        monai.bundle.ckpt_export(
            net_id="network_def", filepath=str(exported), ckpt_file=str(folder / "models/model.pt"),
            meta_file=str(folder / METADATA), config_file=config, **options,
        )  # fmt: skip
        for path in [exported, *([shipped] if shipped.is_file() else [])]:
            found = torch.jit.load(path, map_location="cpu").eval()(image, lung, clinical)
            off = float(((found - expected).abs().amax((0, 2, 3, 4)) / scale).max())
            if not off <= TOLERANCE:
                what = "models/model.ts" if path == shipped else "TorchScript of models/model.pt"
                yield f"{what} gives other maps than the network, by {off:.1e} (expected within {TOLERANCE:g})."


CHECKS: dict[str, Callable[[Path], Iterator[str]]] = {
    "files": file_faults,
    "metadata and version": metadata_faults,
    "README and licences": document_faults,
    "keys and properties of configs": config_faults,
    "network in and out": network_faults,
    "TorchScript": torchscript_faults,
}


def faults_of(folder: Path) -> Iterator[str]:
    """The faults of a bundle's folder that is trusted; after missing files or unreadable metadata nothing is run."""
    for name, check in CHECKS.items():
        try:
            found = list(check(folder))
        except Exception as e:  # MONAI raises whatever a config, a network or torch raises
            while not isinstance(e, InputError) and e.__cause__ is not None:
                e = e.__cause__  # of which MONAI says only where it was
            found = [f"{name}: {type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}"]
        yield from found
        if found and check in (file_faults, metadata_faults):
            return


def verify(path: Path) -> list[str]:
    """The faults of a bundle: this repository, or a zip or folder that scripts.share packed.

    Raises:
        InputError: there is no bundle to read.
    """
    if path.resolve() == HOME:
        return list(faults_of(HOME))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "bundle"
        zipped = isinstance(open_source(path), ZipSource)
        report = install(path, folder) if zipped else audit(path)
        if report.findings:
            return [f"audit: {finding}." for finding in report.findings]
        return list(faults_of(folder if zipped else path.resolve()))


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m scripts.verify_bundle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("bundle", type=Path, nargs="?", default=HOME, metavar="ZIP_OR_FOLDER", help="by default this repository")
    path = p.parse_args(argv).bundle
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    hook = sys.excepthook
    try:
        faults = verify(path)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        sys.excepthook = hook  # which a config's first step replaces
        logging.disable(logging.NOTSET)
    print("\n".join(faults + [f"checked: {', '.join(CHECKS)}"] if not faults else faults))
    print(f"{path.resolve().name}: {len(faults)} fault{'s' * (len(faults) != 1)}.")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
