# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Make the demo: a public chest CT and the box of its tumour (see demo/README.md), resampled until small enough to keep.

python -m scripts.make_demo --data DIR
"""

import argparse
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.transforms import LoadImage, Spacing

SPACING = (2.2, 2.2, 5.0)  # mm
MADE = {  # file: source in ct/, how it is resampled, type of its voxels
    "chest_ct.nii.gz": ("chest_lungpetctdx_A0001_ct.nii.gz", "bilinear", np.int16),
    "chest_ct_tumour_box.nii.gz": ("chest_lungpetctdx_A0001_tumour_boxmask.nii.gz", "nearest", np.uint8),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.make_demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with ct/, which holds the sources")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder to write to (default demo)")
    args = parser.parse_args()
    for name, (source, mode, dtype) in MADE.items():
        path = args.data / "ct" / source
        if not path.is_file():
            sys.exit(f"error: --data {args.data}: there is no {path} (expected the public scan that demo/README.md names)")
        volume = LoadImage(image_only=True, ensure_channel_first=True)(path)
        out = Spacing(SPACING, mode=mode, padding_mode="border")(volume)
        nib.save(nib.Nifti1Image(np.asarray(out[0].round(), dtype), np.asarray(out.affine, float)), args.out / name)


if __name__ == "__main__":
    main()
