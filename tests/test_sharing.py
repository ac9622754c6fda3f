# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Sharing: the audit finds each hostile bundle and runs none; what is packed here audits clean, installs and runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from bundle.sharing.audit import audit, audit_source
from bundle.sharing.source import ZipSource

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
