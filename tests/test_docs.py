# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/ as a site, and what goes with a release."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml


def build(root: Path, folder: Path) -> subprocess.CompletedProcess:
    """`mkdocs build --strict` of a copy of the pages."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="needs requirements-docs.txt")
def test_the_site_builds_and_a_broken_link_would_stop_it(root, tmp_path):
    shutil.copytree(root / "docs", tmp_path / "docs")
    shutil.copy(root / "mkdocs.yml", tmp_path)
    done = build(root, tmp_path)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 15
    loaded = [re.findall(r'(?:src|<link[^>]*href)="(https?:[^"]*)', page.read_text()) for page in pages]
    assert not any(loaded), "a page loads something from the network"
    for link in ("gone.md", "data.md#gone"):
        (tmp_path / "docs" / "method.md").write_text(f"# Method\n\n[there]({link})\n")
        done = build(root, tmp_path)
        assert done.returncode != 0 and "gone" in done.stderr


def test_one_version_is_everywhere(root):
    version = json.loads((root / "configs" / "metadata.json").read_text())["version"]
    assert tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"] == version
    assert re.search(r"^## (\S+)$", (root / "CHANGELOG.md").read_text(), re.M)[1] == version
    assert yaml.safe_load((root / "CITATION.cff").read_text())["version"] == version


def test_the_citation_has_what_its_format_needs(root):
    """Citation File Format 1.2.0: https://github.com/citation-file-format/citation-file-format/blob/1.2.0/schema.json."""
    found = yaml.safe_load((root / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    assert found["cff-version"] == "1.2.0" and found["type"] == "software" and found["license"] == "Apache-2.0"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date-released"])
    assert found["authors"] == [{"name": "Survival Map contributors"}]
