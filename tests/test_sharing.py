# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Sharing: the audit finds each hostile bundle and runs none; what is packed here audits clean, installs and runs."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import monai.data
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from bundle.errors import InputError
from bundle.metrics.verdict import in_words
from bundle.run import TrainedModel, scans_to_evaluate
from bundle.sharing.audit import audit, audit_source, verify
from bundle.sharing.install import install
from bundle.sharing.manifest import sign
from bundle.sharing.pack import _in_order, pack
from bundle.sharing.source import ZipSource
from bundle.sharing.trial import EXPECTED, HEAT, Differs, try_bundle
from scripts import share

from . import hostile_bundles, zoo_bundles
from .hostile_bundles import ADVISORIES, ATTACKS, CANARY, ZIPS


@pytest.fixture(scope="module")
def harmless() -> dict[str, bytes]:
    return zoo_bundles.bundle_files(zoo_bundles.segmentation())


@pytest.fixture(autouse=True)
def _nothing_ran():
    Path(CANARY).unlink(missing_ok=True)
    modules = set(sys.modules)
    yield
    assert not Path(CANARY).exists()
    assert not {"evil", "subprocess_evil"} & (set(sys.modules) - modules)


def findings(data: bytes) -> list[str]:
    return list(map(str, audit_source(ZipSource(data, "b.zip"), "b.zip").findings))


@pytest.mark.parametrize("name", ATTACKS)
def test_the_audit_finds_a_hostile_bundle(name, harmless):
    change, file, words = ATTACKS[name]
    files = dict(harmless)
    change(files)
    found = [each for each in audit_source(ZipSource(hostile_bundles.packed(files), "b.zip"), "b.zip").findings]
    assert any(each.file == file and re.search(words, f"{each.key} {each.what}") for each in found), found


@pytest.mark.parametrize("name", ZIPS)
def test_the_audit_finds_a_hostile_zip(name, harmless):
    build, words = ZIPS[name]
    assert any(re.search(words, each) for each in findings(build(dict(harmless))))


def test_each_advisory_has_a_hostile_bundle():
    assert set(ADVISORIES.values()) <= ATTACKS.keys() | ZIPS.keys()
    assert len(ATTACKS) + len(ZIPS) >= 100 and len(ADVISORIES) >= 15


@pytest.mark.parametrize("make", zoo_bundles.BUNDLES, ids=lambda make: make.__name__)
def test_no_false_alarm_on_bundles_as_those_of_the_model_zoo(make, tmp_path):
    files = zoo_bundles.bundle_files(make())
    assert findings(hostile_bundles.packed({f"name/{name}": data for name, data in files.items()})) == []
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert audit(tmp_path).findings == []


@pytest.mark.parametrize("stack", [[], ["objective/cox", "clinical/fibrosis"], ["multi_gpu_train", "schedule/beta"]])
def test_no_false_alarm_on_our_own_configs_stacked_or_not(stack, root, tmp_path):
    shutil.copytree(root / "configs", tmp_path / "configs")
    shutil.copytree(root / "models", tmp_path / "models")
    names = ["train", *stack] if stack else []
    if names:  # as MONAI merges them
        merged = ConfigParser.load_config_files([str(root / "configs" / f"{name}.json") for name in names])
        (tmp_path / "configs" / "merged.json").write_text(json.dumps(merged))
    assert audit(tmp_path).findings == []


def test_the_command_ends_with_0_1_or_2(harmless, tmp_path, capsys):
    def code(files: dict[str, bytes] | bytes) -> int:
        data = files if isinstance(files, bytes) else hostile_bundles.packed(files)
        (tmp_path / "b.zip").write_bytes(data)
        with pytest.raises(SystemExit) as end:
            share.main(["audit", str(tmp_path / "b.zip")])
        return end.value.code

    assert code(harmless) == 0
    assert code(harmless | {"x.py": b""}) == 1
    assert "x.py: code of the bundle's own" in capsys.readouterr().out
    assert code(b"no zip") == 2
    assert code({"a.txt": b"no bundle"}) == 2
    assert "no folder configs" in capsys.readouterr().err


def test_the_audit_does_not_judge_the_folder_it_runs_from(root):
    with pytest.raises(InputError, match="can't judge its own folder"):
        audit(root)


def test_a_link_in_a_folder_is_found(harmless, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "inference.json").write_bytes(harmless["configs/inference.json"])
    (tmp_path / "data").symlink_to("/etc")
    assert [each.file for each in audit(tmp_path).findings] == ["data"]


@pytest.fixture(scope="module")
def run_folder(trained, tmp_path_factory) -> Path:
    """A finished run, with an evaluation beside it."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("model.pt", "settings.json", "history.csv"):
        shutil.copy(trained.parent / name, folder)
    entry = {"value": 0.7, "lower": 0.6, "upper": 0.8, "num_scans": 16}
    (folder / "metrics.json").write_text(json.dumps({"survival": {"c_index": entry, "num_scans": 16}}))
    return folder


@pytest.fixture(scope="module")
def packed(run_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "survival_map.zip"
    looked = pack(run_folder, out, data="Bright blocks", data_license="CC0")
    assert any("hashes of 14 training patients' ids were left out" in line for line in looked)
    return out


def test_what_is_packed_audits_clean_and_is_whole(packed, run_folder):
    report = audit(packed)
    assert report.findings == []
    with zipfile.ZipFile(packed) as archive:
        names = {name.removeprefix("survival_map/") for name in archive.namelist()}
        files = {name: archive.read(f"survival_map/{name}") for name in names}
    wanted = ["configs/metadata.json", "configs/train.json", "models/model.pt", "models/model.ts", "docs/README.md"]
    assert {*wanted, "docs/data_license.txt", "LICENSE", "manifest.json", "bundle/run/start.py"} <= names
    digests = json.loads(files["manifest.json"])["files"]
    assert digests == {n: hashlib.sha256(d).hexdigest() for n, d in files.items() if n != "manifest.json"}
    assert files["models/model.pt"] == (run_folder / "model.pt").read_bytes()
    assert b"0.700 | 0.600 to 0.800 | 16" in files["docs/README.md"] and b"Bright blocks" in files["docs/README.md"]
    settings = json.loads(files["models/settings.json"])
    assert settings["trained_on"] == [] and settings["trained_on_left_out"] == 14
    assert in_words(settings["learnt"])[1:].encode() in files["docs/README.md"]


def test_evaluation_says_that_it_can_not_know_whom_to_leave_out(packed, tiny_cohort, caplog):
    settings = json.loads(zipfile.ZipFile(packed).read("survival_map/models/settings.json"))
    assert len(scans_to_evaluate(str(tiny_cohort), settings, None, "fail")) == 16
    assert "whom the weights were trained on was left out" in caplog.text


def test_nothing_of_a_patient_or_of_this_machine_is_packed(packed, trained, tiny_cohort):
    with zipfile.ZipFile(packed) as archive:
        text = b"".join(archive.read(n) for n in archive.namelist() if "/bundle/" not in n and "/configs/" not in n)
    digests = json.loads((trained.parent / "settings.json").read_text())["trained_on"]
    assert not any(digest.encode() in text for digest in digests)
    assert str(tiny_cohort.parent).encode() not in text and str(Path.cwd()).encode() not in text
    with zipfile.ZipFile(packed) as archive:
        script = zipfile.ZipFile(io.BytesIO(archive.read("survival_map/models/model.ts")))
    assert not any(str(Path.cwd()).encode() in script.read(name) for name in script.namelist())


def stored(packed: Path) -> tuple[dict, np.ndarray]:
    """What a bundle expects of its model."""
    with zipfile.ZipFile(packed) as archive:
        expected = json.loads(archive.read(f"survival_map/{EXPECTED}"))
        heat = np.load(io.BytesIO(archive.read(f"survival_map/{HEAT}")))
    return {name: np.nan if value is None else value for name, value in expected["prediction"].items()}, heat


def test_the_same_run_gives_the_same_bytes(packed, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("bundle.sharing.pack.predict", lambda phantom, weights: stored(packed))
    pack(run_folder, tmp_path / "again.zip", data="Bright blocks", data_license="CC0")
    assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()


def test_torchscript_does_not_depend_on_the_order_of_a_set():
    code = b"class A(Module):\n  x : Final[int] = 1\n  b : Final[int] = 2\n  def forward(self):\n"
    assert _in_order(code).index(b"  b :") < _in_order(code).index(b"  x :") and len(_in_order(code)) == len(code)


@pytest.mark.parametrize(
    "text, words",
    [
        ("See /home/maria/cohort.csv", "a path of a machine, /home/maria/cohort.csv"),
        (r"See C:\Users\maria\cohort.csv", "a path of a machine"),
        ("Series 1.2.840.113619.2.55.3", "an identifier of DICOM"),
        ("Ask maria@hospital.org", "an e-mail address"),
        ("All but p3.nii.gz", "the id of a training patient, p3"),
    ],
)
def test_a_trace_of_a_patient_or_a_machine_is_refused(text, words, run_folder, tmp_path, monkeypatch):
    zeros = np.zeros((2, 2, 2), np.float32)
    monkeypatch.setattr("bundle.sharing.pack.predict", lambda phantom, weights: ({"risk": 1.0}, zeros))
    with pytest.raises(InputError, match=re.escape(words)):
        pack(run_folder, tmp_path / "b.zip", data=text)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_model_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="there is no weights file"):
        pack(tmp_path, tmp_path / "b.zip")


def test_install_then_try(packed, tmp_path):
    assert install(packed, tmp_path / "here").findings == []
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
    assert audit(tmp_path / "here").findings == []
    assert try_bundle(tmp_path / "here") == "the same as where it was packed, bit for bit"
    (tmp_path / "here" / EXPECTED).unlink()
    with pytest.raises(InputError, match="expected.json is missing"):
        try_bundle(tmp_path / "here")


@pytest.mark.parametrize(
    "factor, torch_version, words",
    [
        (1 + 1e-5, torch.__version__, r"heat by 1.\de-05 of its peak \(expected the same bits"),
        (1 + 1e-5, "1.0", None),
        (1.01, "1.0", r"heat by .* of its peak \(expected within 0.0001\)"),
    ],
)
def test_try_tells_other_results(factor, torch_version, words, packed, tmp_path, monkeypatch):
    install(packed, tmp_path / "here")
    prediction, heat = stored(packed)
    monkeypatch.setattr("bundle.sharing.trial.predict", lambda phantom, weights: (prediction, heat * np.float32(factor)))
    monkeypatch.setattr(torch, "__version__", torch_version)
    if words is None:
        assert "within 0.0001" in try_bundle(tmp_path / "here")
        monkeypatch.setattr("bundle.sharing.trial.predict", lambda phantom, weights: (prediction | {"risk": 9e9}, heat))
        words = "risk"
    with pytest.raises(Differs, match=words):
        try_bundle(tmp_path / "here")


def test_torchscript_gives_what_the_network_gives(packed, trained, tmp_path):
    install(packed, tmp_path / "here")
    script, metadata, _ = monai.data.load_net_with_metadata(str(tmp_path / "here" / "models" / "model.ts"))
    network = TrainedModel(str(trained)).network.eval()
    image = torch.rand(1, 1, 16, 16, 16)
    assert torch.equal(script(image), network(image)) and metadata["name"] == "Survival Map"


def changed(packed: Path, out: Path, change) -> Path:
    with zipfile.ZipFile(packed) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    out.write_bytes(hostile_bundles.packed(files))
    return out


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: f.update({"survival_map/docs/README.md": b"other"}), "its SHA-256 is not the one of manifest.json"),
        (lambda f: f.pop("survival_map/docs/README.md"), "it is in manifest.json, but missing"),
        (lambda f: f.update({"survival_map/docs/more.md": b"more"}), "it is not in manifest.json"),
        (lambda f: f.update({"survival_map/manifest.json": b"{}"}), "it can't be read"),
        (lambda f: f.update({"survival_map/bundle/run/start.py": b"import os"}), "code that differs from this copy's"),
    ],
)
def test_a_changed_bundle_is_not_installed_and_leaves_nothing(change, words, packed, tmp_path):
    bad = changed(packed, tmp_path / "bad.zip", change)
    assert any(words in str(each) for each in install(bad, tmp_path / "here").findings)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.zip"]


def test_install_says_what_is_wrong(packed, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is there already"):
        install(packed, tmp_path)
    (tmp_path / "half.zip").write_bytes(packed.read_bytes()[:1000])
    with pytest.raises(InputError, match="no zip that can be read"):
        install(tmp_path / "half.zip", tmp_path / "here")
    monkeypatch.setattr("bundle.sharing.install.FORMAT", 0)
    with pytest.raises(InputError, match="has format 1; this version reads 0"):
        install(packed, tmp_path / "here")
    monkeypatch.setattr("bundle.sharing.install.version", lambda package: "0.1")
    monkeypatch.setattr("bundle.sharing.install.FORMAT", 1)
    notes = install(packed, tmp_path / "here").notes
    assert any(note.startswith("monai is 0.1 here; the bundle was made with") for note in notes)


def test_only_the_packer_can_sign(packed, tmp_path):
    pytest.importorskip("cryptography", reason="signatures need cryptography")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    for name in ("packer", "stranger"):
        key = Ed25519PrivateKey.generate()
        private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
        public = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pem").write_bytes(private)
        (tmp_path / f"{name}.pub").write_bytes(public)
    manifest = zipfile.ZipFile(packed).read("survival_map/manifest.json")
    signature = sign(manifest, tmp_path / "packer.pem")
    signed = changed(packed, tmp_path / "s.zip", lambda f: f.update({"survival_map/manifest.json.sig": signature}))
    assert verify(signed, tmp_path / "packer.pub").findings == [] == audit(signed, tmp_path / "packer.pub").findings
    assert any(
        "not the signature of the owner of stranger.pub" in str(f)
        for f in verify(signed, tmp_path / "stranger.pub").findings
    )
    assert any("not signed" in str(f) for f in audit(packed, tmp_path / "packer.pub").findings)
    other = changed(signed, tmp_path / "o.zip", lambda f: f.update({"survival_map/manifest.json": manifest + b" "}))
    assert any("not the signature" in str(f) for f in verify(other, tmp_path / "packer.pub").findings)
    with pytest.raises(InputError, match="no public key in PEM"):
        verify(signed, tmp_path / "packer.pem")
