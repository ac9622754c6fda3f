# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Pack the model of a run as a bundle: what `monai.bundle` needs, a model card, and nothing of a patient."""

import getpass
import io
import json
import re
import socket
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import monai
import numpy as np
import pandas as pd
import torch
from monai.data import save_net_with_metadata

from bundle.data.cohort import patient_digest
from bundle.errors import InputError
from bundle.files import write_atomically
from bundle.run import TrainedModel, read_settings
from bundle.sharing.audit import HOME, audit_source
from bundle.sharing.card import model_card
from bundle.sharing.manifest import MANIFEST, SIGNATURE, manifest_of, sign
from bundle.sharing.source import ZipSource
from bundle.sharing.trial import EXPECTED, HEAT, PHANTOM, expected_of, phantom_file, predict

NAME = "survival_map"  # the folder in the zip, by which monai.bundle loads it
CODE = ("bundle/**/*.py", "bundle/report/templates/*", "bundle/report/vendor/*", "scripts/__init__.py", "scripts/share.py")
SHIPPED = ("configs/**/*.json", "configs/logging.conf", "requirements.txt", "LICENSE")
UNKNOWN_LICENSE = "The packer did not say under which licence the training data are. Ask before you use the model.\n"
_PATHS = (
    r"(?<![\w.:/@])/(?:home|root|Users|mnt|media|data|datasets|scratch|work|srv|tmp|var|opt|workspace|net|nfs|gpfs)/[\w.\-/]+"
    r"|\b[A-Za-z]:\\[\w.\-\\]+|\\\\[\w.\-]+\\[\w.\-\\]+|(?<!\w)~/[\w.\-/]+"
)
SUSPECTS = {
    "a path of a machine": re.compile(_PATHS),
    "an identifier of DICOM": re.compile(r"(?<![\w.])[012]\.(?:\d+\.){4,}\d+"),
    "an e-mail address": re.compile(r"[\w.+\-]+@[\w\-]+\.[a-z]{2,}"),
}
_WORD = re.compile(r"[\w.\-]{2,}")
_NOBODY = {"root", "user", "admin", "localhost", "runner", "ubuntu"}


def pack(
    ckpt_dir: Path, out: Path, data: str = "", data_license: str = "", public_ids: bool = False, key: Path | None = None
) -> list[str]:
    """Write a bundle of a run's model; the same run gives the same bytes.

    Args:
        ckpt_dir: folder of the run, with `model.pt` and `settings.json`; `history.csv` and `metrics.json` if there.
        out: zip to write.
        data: what the training data are, for the model card.
        data_license: their licence.
        public_ids: keep the hashes of the training patients' ids, by which evaluation leaves these patients out. They
            are left out otherwise: whoever guesses an id can check whether its patient was among them.
        key: file of the private ed25519 key (PEM) to sign with.

    Returns:
        What was looked at in search of patients, and what a receiver should know.

    Raises:
        InputError: the run has no model, or something of a patient or a machine would be packed.
    """
    files, settings = bundle_files(ckpt_dir, data, data_license, public_ids)
    looked = look_for_patients(files, settings)
    files[MANIFEST] = manifest_of(files)
    if key is not None:
        files[SIGNATURE] = sign(files[MANIFEST], key)
    packed = zip_of(files)
    found = audit_source(ZipSource(packed, out.name), out.name).findings
    if found:
        raise InputError("the audit would refuse this bundle:\n       " + "\n       ".join(map(str, found)))
    write_atomically(out, lambda temporary: temporary.write_bytes(packed))
    if not public_ids:
        left_out = (
            f"the hashes of {len(settings['trained_on'])} training patients' ids were left out (--public_ids keeps them)"
        )
        looked.append(f"{left_out}: evaluation can't know them, and can't leave these patients out")
    return looked


def bundle_files(ckpt_dir: Path, data: str, data_license: str, public_ids: bool) -> tuple[dict[str, bytes], dict]:
    """The files of a bundle by name, without manifest, and the settings of the run as they are."""
    if not (HOME / "configs" / "inference.json").is_file():
        raise InputError(f"{HOME} has no configs; pack from a copy of the repository.")
    weights = ckpt_dir / "model.pt"
    settings = read_settings(weights)
    shared = settings if public_ids else {**settings, "trained_on": [], "trained_on_left_out": len(settings["trained_on"])}
    if not public_ids:
        shared.pop("cohort_sha256", None)
    shipped = {p.relative_to(HOME).as_posix(): p for pattern in (*CODE, *SHIPPED) for p in HOME.glob(pattern)}
    files = {name: path.read_bytes() for name, path in shipped.items()}
    metadata = json.loads(files["configs/metadata.json"])
    metadata["data_source"] = data or "not described by the packer"
    here = {"monai_version": monai.__version__, "pytorch_version": torch.__version__, "numpy_version": np.__version__}
    metadata |= {name: str(version).split("+")[0] for name, version in here.items()}
    metadata["network_data_format"]["outputs"]["pred"]["num_channels"] = 2 + settings["network"].get("extra", 0)
    files["configs/metadata.json"] = _json(metadata)
    files["models/model.pt"] = weights.read_bytes()
    files["models/settings.json"] = _json(shared)
    files["models/model.ts"] = torchscript(weights, metadata)
    files[PHANTOM] = phantom_file()
    prediction, heat = predict(files[PHANTOM], weights)
    files[EXPECTED], files[HEAT] = expected_of(prediction, heat)
    files["docs/README.md"] = model_card(settings, metadata, data, _history(ckpt_dir), _metrics(ckpt_dir)).encode()
    files["docs/data_license.txt"] = (f"{data_license}\n" if data_license else UNKNOWN_LICENSE).encode()
    return files, settings


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _history(ckpt_dir: Path) -> pd.DataFrame | None:
    path = ckpt_dir / "history.csv"
    return pd.read_csv(path) if path.is_file() else None


def _metrics(ckpt_dir: Path) -> dict | None:
    path = ckpt_dir / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else None


def torchscript(weights: Path, metadata: dict) -> bytes:
    """The network as TorchScript, with the metadata that `monai.bundle.load` reads.

    torch also writes where each line of Python came from, with the paths of this machine, and a number for the file:
    these are left out.

    Raises:
        InputError: the network can't be TorchScript.
    """
    buffer = io.BytesIO()
    try:
        script = torch.jit.script(TrainedModel(str(weights)).network.eval())
        save_net_with_metadata(script, buffer, include_config_vals=False, meta_values=metadata)
    except (RuntimeError, torch.jit.frontend.NotSupportedError) as e:
        raise InputError(f"the network can't become TorchScript: {str(e).splitlines()[0]}") from e
    with zipfile.ZipFile(buffer) as archive:
        names = [name for name in archive.namelist() if not name.endswith((".debug_pkl", ".data/serialization_id"))]
        files = {name: archive.read(name) for name in names}
    return zip_of({n: _in_order(data) if n.endswith(".py") else data for n, data in files.items()}, base="")


def _in_order(code: bytes) -> bytes:
    """Code of TorchScript with the constants of a class by name: torch writes them as a set has them."""
    return re.sub(
        rb"(?:^  \w+ : Final\[.*\n)+", lambda m: b"".join(sorted(m[0].splitlines(keepends=True))), code, flags=re.M
    )


def zip_of(files: Mapping[str, bytes], base: str = f"{NAME}/") -> bytes:
    """A zip of the same bytes wherever and whenever it is made: nothing in it is compressed or dated."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(base + name)  # of 1980
            info.create_system, info.external_attr = 3, 0o100644 << 16
            archive.writestr(info, files[name])
    return buffer.getvalue()


def look_for_patients(files: Mapping[str, bytes], settings: dict) -> list[str]:
    """Look for patients and machines in all that isn't shipped with this copy.

    Returns:
        What was looked at.

    Raises:
        InputError: something was found.
    """
    own = [name for name in files if not (HOME / name).is_file() or (HOME / name).read_bytes() != files[name]]
    own += [name for name in ("models/model.pt", "models/settings.json") if name not in own]
    digests = set(settings["trained_on"])
    machine = {name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 3} - _NOBODY
    faults = [f"{name}: {what}" for name in sorted(own) for what in _traces(_text_of(name, files[name]), digests, machine)]
    if faults:
        more = f"\n       and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise InputError("this would be packed as well:\n       " + "\n       ".join(faults[:20]) + more)
    return [
        f"looked at {', '.join(sorted(own))}; not at the numbers of tensors and volumes",
        f"for ids of the {len(digests)} training patients, by their hashes (not for numbers of fewer than 5 digits)",
        f"for {', '.join(SUSPECTS)}, the names of this user and machine",
        "no table, image or map of the cohort is packed; settings.json has figures of the cohort as a whole: how many,"
        " their survival curve, and for each clinical column its mean or its categories",
    ]


def _text_of(name: str, data: bytes) -> str:
    """What of a file could name anybody: all but the numbers of tensors and volumes."""
    if name.endswith((".pt", ".ts")):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [each for each in archive.namelist() if not re.search(r"/(data|constants)/\d+$", each)]
            data = b"\n".join([*(each.encode() for each in members), *map(archive.read, members)])
        return "\n".join(re.findall(r"[ -~]{3,}", data.decode("latin1")))
    return "" if name.endswith((".npy", ".nii.gz")) else data.decode("utf-8")


def _traces(text: str, digests: set[str], machine: set[str]) -> Iterator[str]:
    for what, pattern in SUSPECTS.items():
        if found := pattern.search(text):
            yield f"{what}, {found[0][:60]}"
    for word in set(_words(text)):
        if patient_digest(word) in digests and not (word.isdecimal() and len(word) < 5):
            yield f"the id of a training patient, {word}"
        if word in machine:
            yield f"the name of this user or machine, {word}"


def _words(text: str) -> Iterable[str]:
    """All that could be an id: words with dots and dashes, and their parts."""
    for word in _WORD.findall(text):
        yield word
        yield word.strip("._-")
        yield from re.split(r"[.\-]", word)
        yield word.removesuffix(".nii.gz").removesuffix(".nii")
