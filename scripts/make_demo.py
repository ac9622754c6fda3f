# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Make demo/chest_ct.nii.gz: a public chest CT (see demo/README.md), resampled until it is small enough to keep."""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from monai.transforms import LoadImage, Spacing


def resample(source: Path, target: Path, spacing: tuple[float, float, float], mode: str, dtype: type) -> None:
    """Resample a volume to `spacing` (mm), keeping its orientation and place, and write it as NIfTI."""
    volume: MetaTensor = LoadImage(image_only=True, ensure_channel_first=True)(source)
    out = Spacing(spacing, mode=mode, padding_mode="border")(volume)
    nib.save(nib.Nifti1Image(np.asarray(out[0].round(), dtype=dtype), np.asarray(out.affine, dtype=float)), target)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.make_demo", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with ct/chest_lungpetctdx_A0001_ct.nii.gz")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write to (default demo)")
    args = parser.parse_args()
    source = args.data / "ct" / "chest_lungpetctdx_A0001_ct.nii.gz"
    box = args.data / "ct" / "chest_lungpetctdx_A0001_tumour_boxmask.nii.gz"
    spacing = (2.2, 2.2, 5.0)
    resample(source, args.out / "chest_ct.nii.gz", spacing, "bilinear", np.int16)
    resample(box, args.out / "chest_ct_tumour_box.nii.gz", spacing, "nearest", np.uint8)


if __name__ == "__main__":
    main()
