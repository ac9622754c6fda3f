# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The model zoo's checks: this repository and what is packed here pass; each broken bundle has its sentence."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bundle.sharing.install import install
from bundle.sharing.manifest import MANIFEST, manifest_of
from bundle.sharing.pack import UNKNOWN_LICENSE, pack
from scripts import verify_bundle
from scripts.verify_bundle import CHECKS, faults_of

from .hostile_bundles import packed as zip_of


@pytest.fixture(scope="module")
def zipped(root, tmp_path_factory) -> Path:
    """The shipped weights as a bundle."""
    out = tmp_path_factory.mktemp("zipped") / "survival_map.zip"
    with pytest.MonkeyPatch.context() as patch:  # what the model says of a phantom is not looked at here
        patch.setattr("bundle.sharing.pack.predict", lambda *_: ({"risk": 1.0}, np.zeros((2, 2, 2), np.float32)))
        pack(root / "models", out, data="Implants in five chests", data_license="CC BY 3.0")
    return out


@pytest.fixture(scope="module")
def whole(zipped, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed") / "survival_map"
    assert install(zipped, folder).findings == []
    return folder


def test_this_repository_has_no_fault(root):
    assert list(faults_of(root)) == []


def code_of(path: Path) -> int:
    with pytest.raises(SystemExit) as end:
        verify_bundle.main([str(path)])
    return end.value.code


def test_what_is_packed_passes_as_zip_and_as_folder(zipped, whole, capsys):
    for path in (zipped, whole):
        assert code_of(path) == 0
        assert f"{path.name}: 0 faults." in capsys.readouterr().out


def test_of_a_bundle_that_the_audit_finds_hostile_nothing_is_run(zipped, tmp_path, capsys):
    with zipfile.ZipFile(zipped) as archive:
        files = {name.removeprefix("survival_map/"): archive.read(name) for name in archive.namelist()}
    config = json.loads(files["configs/inference.json"])
    config["imports"].append(f"$open('{tmp_path / 'ran'}', 'w')")
    files["configs/inference.json"] = json.dumps(config).encode()
    files[MANIFEST] = manifest_of({name: data for name, data in files.items() if name != MANIFEST})
    (tmp_path / "hostile.zip").write_bytes(zip_of(files))
    assert code_of(tmp_path / "hostile.zip") == 1
    assert "audit: configs/inference.json · imports" in capsys.readouterr().out and not (tmp_path / "ran").exists()


def test_what_is_no_bundle_is_unreadable(tmp_path, capsys):
    (tmp_path / "a.zip").write_bytes(b"no zip")
    assert code_of(tmp_path / "a.zip") == code_of(tmp_path / "gone") == 2
    assert "no zip that can be read" in capsys.readouterr().err


def edited(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A change of a JSON file of the bundle."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def written(name: str, data: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(data) and None


def other_script(folder: Path) -> None:
    """A model.ts with the right shapes and other numbers."""
    script = torch.jit.load(folder / "models" / "model.ts")
    with torch.no_grad():
        script.hazard.mul_(1.5)
    script.save(str(folder / "models" / "model.ts"))


METADATA, INFERENCE, TRAIN = "configs/metadata.json", "configs/inference.json", "configs/train.json"
BROKEN = {
    "no licence": ("files", lambda f: (f / "LICENSE").unlink(), "LICENSE is missing."),
    "no weights": ("files", lambda f: (f / "models/model.pt").unlink(), "models/model.pt is missing."),
    "an empty README": ("files", lambda f: (f / "docs/README.md").write_bytes(b""), "docs/README.md is empty."),
    "a patient": ("files", written("a.dcm", "x"), "a.dcm is a DICOM file, which names its patient: leave it out."),
    "a key": ("files", written("docs/k.pem", "x"), "docs/k.pem is a key or a password: leave it out."),
    "a link": ("files", lambda f: (f / "x.txt").symlink_to("LICENSE"), "x.txt is a link (expected a file)."),
    "a large file": (
        "files",
        lambda f: (f / "models/big.pt").touch() or open(f / "models/big.pt", "wb").truncate(30_000_000),
        "models/big.pt has 30 MB (expected at most 25; name its address in large_files.yml).",
    ),
    "no JSON": ("metadata and version", written(METADATA, "{"), "configs/metadata.json can't be read as JSON"),
    "no authors": (
        "metadata and version",
        edited(METADATA, lambda m: m.pop("authors")),
        "configs/metadata.json: 'authors' is a required property.",
    ),
    "a version of two numbers": (
        "metadata and version",
        edited(METADATA, lambda m: m.update(version="1.0")),
        "configs/metadata.json · version: '1.0' does not match",
    ),
    "a version without changelog": (
        "metadata and version",
        edited(METADATA, lambda m: m.update(version="9.0.0")),
        "configs/metadata.json: version 9.0.0 is not in the changelog (expected an entry on what is new).",
    ),
    "an old version": (
        "metadata and version",
        edited(METADATA, lambda m: m["changelog"].update({"0.10.0": "more"})),
        "but the changelog goes up to 0.10.0.",
    ),
    "a package that isn't named": (
        "metadata and version",
        edited(METADATA, lambda m: m["required_packages_version"].pop("scipy")),
        "required_packages_version lacks scipy, which requirements.txt has.",
    ),
    "another licence": ("README and licences", written("LICENSE", "Mine"), "LICENSE is another than Apache-2.0"),
    "data without licence": (
        "README and licences",
        written("docs/data_license.txt", UNKNOWN_LICENSE),
        "docs/data_license.txt doesn't say under which licence the training data are",
    ),
    "a README that promises": (
        "README and licences",
        written("docs/README.md", "Cures all."),
        'docs/README.md doesn\'t say the intended use, "Research use only, not for diagnosis or treatment".',
    ),
    "no inferer": (
        "keys and properties of configs",
        edited(INFERENCE, lambda c: c.pop("inferer")),
        "configs/inference.json has no inferer.",
    ),
    "no evaluator": (
        "keys and properties of configs",
        edited(INFERENCE, lambda c: c.pop("evaluator")),
        "configs/inference.json: Property 'evaluator' with config ID 'evaluator' not in the config.",
    ),
    "an interval that validation doesn't have": (
        "keys and properties of configs",
        edited(TRAIN, lambda c: c["train"]["handlers"][0].update(interval="@max_epochs")),
        "configs/train.json: the property val_interval is not where MONAI's train workflows refer to it.",
    ),
    "an argument too few": (
        "keys and properties of configs",
        edited(INFERENCE, lambda c: c["dataset"].pop("data")),
        "missing 1 required positional argument: 'data'",
    ),
    "no epochs": (
        "keys and properties of configs",
        edited(TRAIN, lambda c: c["train"]["trainer"].pop("max_epochs")),
        "configs/train.json has no train#trainer#max_epochs.",
    ),
    "three channels": (
        "network in and out",
        edited(METADATA, lambda m: m["network_data_format"]["outputs"]["pred"].update(num_channels=3)),
        "network in and out: ValueError: output channel number `2` doesn't match: `3`.",
    ),
    "TorchScript of other weights": ("TorchScript", other_script, "models/model.ts gives other maps than the network, by"),
    "weights of another run": (
        "TorchScript",
        edited("models/settings.json", lambda s: s.update(weights_sha256="0" * 64)),
        "belongs to other weights than",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_bundle_has_one_sentence(name, whole, tmp_path, monkeypatch):
    check, breaks, sentence = BROKEN[name]
    folder = Path(shutil.copytree(whole, tmp_path / "broken"))
    breaks(folder)
    monkeypatch.setattr(verify_bundle, "CHECKS", {check: CHECKS[check]})
    (fault,) = faults_of(folder)
    assert sentence in fault and "\n" not in fault
