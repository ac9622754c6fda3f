# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether a bundle does here what it did where it was packed: a phantom, and what the model said of it."""

import contextlib
import gzip
import io
import json
import sys
import tempfile
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pandas as pd
import torch

from bundle.errors import InputError, input_error_of
from bundle.phantoms import PhantomParams, make_phantom
from bundle.sharing.audit import HOME

PHANTOM = "try/phantom.nii.gz"
EXPECTED = "try/expected.json"
HEAT = "try/expected_heat.npy"
SIZE = 48  # voxels a side
FIELD = 321.0  # mm a side
TOLERANCE = 1e-4  # of the largest value, where torch or the processor is another


class Differs(InputError):
    """The results of a bundle are not those of where it was packed."""


def phantom_file() -> bytes:
    """A chest with fibrosis, always the same one, as .nii.gz."""
    phantom = make_phantom("chest", np.random.default_rng(3), True, PhantomParams(size=SIZE))
    image = nib.Nifti1Image(phantom.image, np.diag([FIELD / SIZE] * 3 + [1.0]))
    return gzip.compress(image.to_bytes(), mtime=0)


def predict(phantom: bytes, weights: Path) -> tuple[dict, np.ndarray]:
    """The numbers of `predictions.csv` and the heat, (D, H, W) float32, by this copy's code with some weights.

    Raises:
        InputError: the model can't be run.
    """
    weights = weights.resolve()
    threads, hook = torch.get_num_threads(), sys.excepthook
    torch.set_num_threads(1)  # sums depend on how the work is shared
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(HOME), contextlib.redirect_stdout(sys.stderr):
        image = Path(folder) / "phantom.nii.gz"
        image.write_bytes(phantom)
        options = {"image": str(image), "ckpt": str(weights), "output_dir": folder, "device": "cpu", "logging_file": False}
        options["shifts"] = 1  # seconds rather than half a minute
        try:
            monai.bundle.run(config_file="configs/inference.json", **options)
        except Exception as e:
            raise (input_error_of(e) or e) from e
        finally:
            torch.set_num_threads(threads)
            sys.excepthook = hook
        row = pd.read_csv(Path(folder) / "predictions.csv").iloc[0]
        heat = nib.load(Path(folder) / "maps" / "phantom_heat.nii.gz").get_fdata(dtype=np.float32)
    return {name: float(row[name]) for name in row.index if isinstance(row[name], (int, float, np.number))}, heat


def machine() -> dict[str, str]:
    """What the last bits of a result depend on."""
    return {"torch": str(torch.__version__), "processor": torch.backends.cpu.get_cpu_capability()}


def expected_of(prediction: dict, heat: np.ndarray) -> tuple[bytes, bytes]:
    """The files `EXPECTED` and `HEAT`."""
    buffer = io.BytesIO()
    np.save(buffer, heat, allow_pickle=False)
    known = {name: None if np.isnan(value) else value for name, value in prediction.items()}
    return (json.dumps({**machine(), "prediction": known}, indent=2) + "\n").encode(), buffer.getvalue()


def try_bundle(folder: Path) -> str:
    """Run the bundle's model on its phantom, by this copy's code, and compare.

    Returns:
        A sentence on how alike the results are.

    Raises:
        Differs: the results are others.
        InputError: something is missing.
    """
    try:
        expected = json.loads((folder / EXPECTED).read_bytes())
        heat = np.load(io.BytesIO((folder / HEAT).read_bytes()), allow_pickle=False)
        phantom = (folder / PHANTOM).read_bytes()
        prediction, same = expected["prediction"], all(expected[name] == value for name, value in machine().items())
        if not isinstance(prediction, dict):
            raise TypeError("prediction is no table of numbers by name")
    except OSError as e:
        raise InputError(f"{e.filename} is missing: {folder} holds no bundle that was packed by scripts.share.") from e
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{folder / EXPECTED} or {HEAT} can't be read: {e}.") from e
    found, found_heat = predict(phantom, folder / "models" / "model.pt")
    if found_heat.shape != heat.shape or found.keys() != prediction.keys():
        raise Differs(f"{folder} gives other results than it did where it was packed: they have another shape.")
    if np.array_equal(found_heat, heat) and all(alike(found[name], value, 0) for name, value in prediction.items()):
        return "the same as where it was packed, bit for bit"
    off = float(np.abs(found_heat - heat).max() / max(np.abs(heat).max(), 1e-30))
    others = [name for name, value in prediction.items() if not alike(found[name], value, TOLERANCE)]
    if same or off > TOLERANCE or others:
        what = f"heat by {off:.1e} of its peak" + (f", {', '.join(others)}" if others else "")
        expected_to_be = "the same bits, with this torch and processor" if same else f"within {TOLERANCE:g}"
        raise Differs(f"{folder} gives other results than where it was packed: {what} (expected {expected_to_be}).")
    return (
        f"within {TOLERANCE:g} of where it was packed (heat within {off:.1e} of its peak), with another torch or processor"
    )


def alike(found: float, expected: float | None, tolerance: float) -> bool:
    """Whether two numbers of `predictions.csv` are; None stands for none."""
    if expected is None or np.isnan(found):
        return expected is None and bool(np.isnan(found))
    return abs(found - expected) <= tolerance * max(1.0, abs(expected))
