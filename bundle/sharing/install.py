# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Install a bundle: it is audited, and written only if nothing was found."""

import json
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bundle.errors import InputError
from bundle.run.settings import FORMAT
from bundle.sharing.audit import HOME, Audit, audit_source
from bundle.sharing.source import ZipSource, open_source

PACKAGES = {"monai_version": "monai", "pytorch_version": "torch", "numpy_version": "numpy"}


def install(path: Path, out: Path, key: Path | None = None) -> Audit:
    """Audit a bundle and, if nothing is found, unpack what was audited.

    Args:
        path: zip.
        out: folder to write; it must not be there.
        key: file of the public ed25519 key (PEM) by which it must be signed.

    Returns:
        The audit; `out` is there only if it has no findings.

    Raises:
        InputError: there is no bundle to read, it is of a later version, or the folder can't be written.
    """
    if out.exists():
        raise InputError(f"--out {out} is there already (expected a new folder).")
    source = open_source(path)
    if not isinstance(source, ZipSource):
        raise InputError(f"{path} is a folder (expected a zip); it needs no install.")
    report = audit_source(source, path.name, key)
    if report.findings:
        return report
    report.notes += version_notes(source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".tmp-", dir=out.parent))
    except OSError as e:
        raise InputError(f"--out {out} can't be written: {e.strerror}.") from e
    try:
        for name in source.names():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(source.read(name))
        folder.chmod(0o755)
        os.rename(folder, out)
    except OSError as e:
        raise InputError(f"--out {out} can't be written: {e.strerror}.") from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def version_notes(source: ZipSource) -> list[str]:
    """Which packages are here in another version than the bundle names.

    Raises:
        InputError: its settings are of a later version of Survival Map.
    """
    names = source.names()
    if "models/settings.json" in names:
        found = json.loads(source.read("models/settings.json"))
        if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
            raise InputError(
                f"its settings.json has format {found['format']}; this version reads {FORMAT}: update it first."
            )
    metadata = json.loads(source.read("configs/metadata.json")) if "configs/metadata.json" in names else {}
    own = json.loads((HOME / "configs" / "metadata.json").read_text(encoding="utf-8"))
    wanted = {package: metadata.get(key) for key, package in PACKAGES.items()}
    wanted |= metadata.get("required_packages_version") or {}
    notes = []
    if metadata.get("name") == own["name"] and metadata.get("version") != own["version"]:
        notes.append(f"the bundle is version {metadata.get('version')}; this is {own['version']}")
    for package, expected in wanted.items():
        try:
            here = version(str(package)).split("+")[0]
        except PackageNotFoundError:
            here = "missing"
        if expected and here != expected:
            notes.append(f"{package} is {here} here; the bundle was made with {expected}")
    return notes
