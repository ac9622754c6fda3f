# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What a model says of real scans as they are: months, familiarity, and whether vessels light up.

Predicts every scan by `configs/inference.json`, and writes a table and a sheet of pictures. A voxel of the lung is called
central vessel if it is above -500 HU, smoothed over 3 mm, and deeper than 15 mm below the surface of the closed lung.
Tumours and scars there count as vessels. The edge is what lies within 6 mm of the surface of the lung mask. The heat of both
is compared with their share of the lung: 1 is what an evenly lit lung gives.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.image import imread
from monai.transforms import Compose, Orientationd, Spacingd
from scipy import ndimage
from tqdm import tqdm

from bundle.errors import InputError
from bundle.files import write_text
from bundle.report.pictures import write_png
from bundle.report.report import believed
from bundle.transforms import LoadCTd
from scripts.jobs import markdown, overrides, run_module

HEAD = """\
# Real scans

Made by `python -m scripts.research.real_scans SCAN...`. Nothing was put into these scans, and what disease they have is not
marked. Some have nodules or emphysema (`demo/anatomies/README.md`); A0001 and A0002 are patients with lung cancer. The
weights know implanted fibrosis alone, so none of this heat is a finding.

Of the weights: {verdict}.

*Vessels*: share of the heat in central vessels over their share of the lung; 1 is an evenly lit lung, and 2 the most that
is wanted. Central vessels are what is above -500 HU and deeper than 15 mm: tumours and scars there, too. *Edge*: the same
within 6 mm of the surface of the lung mask. *Familiarity*: share of the training scans that look as strange or stranger.
The weights in `models/` were trained on implants in lidc-idri_0001, 0002, 0028, 0295 and chest_pyradiomics_lung1: these
chests they have seen.

"""
FOOT = """
Each picture goes through the hottest voxel, and is scaled to it.

![Heat of the scans above, each through its hottest voxel]({picture})
"""
EDGE = 6  # mm
COLUMNS = ("scan", "months", "95 %", "familiarity", "vessels", "edge", "message")


def on_grid(path: Path, heat: Path, lung: Path) -> dict:
    """A scan, its heat and its lung mask in RAS and voxels of 3 mm, (D, H, W) each."""
    keys = ("image", "heat", "lung_mask")
    volumes = {"image": str(path), "heat": str(heat), "lung_mask": str(lung)}
    steps = [
        LoadCTd(keys=("image", "heat"), mask_keys=("lung_mask",), hounsfield=False),
        Orientationd(keys, axcodes="RAS", labels=None),
        Spacingd(keys, pixdim=(3.0, 3.0, 3.0), mode=["bilinear", "bilinear", "nearest"]),
    ]
    found = Compose(steps)({"patient_id": path.name, **volumes})
    return {key: np.asarray(found[key][0]) for key in keys}


def central_vessels(hu: np.ndarray, lung: np.ndarray) -> np.ndarray:
    """Voxels of 3 mm of central vessels."""
    closed = ndimage.binary_closing(np.pad(lung, 6), ndimage.generate_binary_structure(3, 1), iterations=5)[6:-6, 6:-6, 6:-6]
    depth = ndimage.distance_transform_edt(closed) * 3
    return lung & (depth > 15) & (ndimage.gaussian_filter(hu, 0.5) > -500)


def notes_of(message: str, verdict: str) -> str:
    """What a message says of its scan: all but the weights' verdict, which every scan has."""
    return "; ".join(part for part in message.replace(verdict, "").split("; ") if part)


def row_of(name: str, path: Path, row: pd.Series, maps: Path, verdict: str) -> dict:
    """A row of the table about one scan."""
    if row["status"] != "ok":
        return {**dict.fromkeys(COLUMNS, ""), "scan": name, "message": row["message"]}
    scan = on_grid(path, maps / f"{name}_heat.nii.gz", maps / f"{name}_lung.nii.gz")
    lung, heat = scan["lung_mask"] > 0, scan["heat"].clip(0)
    edge = lung & (ndimage.distance_transform_edt(np.pad(lung, 1))[1:-1, 1:-1, 1:-1] * 3 <= EDGE)

    def ratio(part: np.ndarray) -> str:
        return f"{heat[part].sum() / heat[lung].sum() / (part.sum() / lung.sum()):.2f}" if part.any() else ""

    months, interval = f"{row['median_months']:.1f}", f"{row['lower_months']:.0f}–{row['upper_months']:.0f}"
    known, said = f"{row['familiarity']:.2f}", notes_of(row["message"], verdict)
    vessels = central_vessels(scan["image"], lung)
    return dict(zip(COLUMNS, (name, months, interval, known, ratio(vessels), ratio(edge), said), strict=True))


def sheet(names: list[str], maps: Path) -> Figure:
    """The heat pictures of the scans, one below the other."""
    pictures = {name: maps / f"{name}_heat.png" for name in names if (maps / f"{name}_heat.png").is_file()}
    figure = Figure(figsize=(11, 4.6 * max(1, len(pictures))), facecolor="black", layout="constrained")
    for ax, (name, path) in zip(np.atleast_1d(figure.subplots(max(1, len(pictures)), 1)), pictures.items()):
        ax.imshow(imread(path))
        ax.set_title(name, color="white", fontsize=11)
        ax.set_axis_off()
    return figure


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m scripts.research.real_scans",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("images", nargs="+", type=Path, help="scans: files or folders of DICOM slices")
    p.add_argument("--ckpt", type=Path, default=Path("models/model.pt"), help="weights (default models/model.pt)")
    p.add_argument("--out", type=Path, default=Path("runs/real_scans"), metavar="DIR", help="folder of work")
    p.add_argument("--page", type=Path, default=Path("docs/results/real_scans.md"), metavar="MD", help="page of results")
    p.add_argument("--picture", type=Path, metavar="PNG", help="sheet of pictures (default beside the page)")
    args = p.parse_args(argv)
    try:
        names = {path.name.split(".")[0]: path.resolve() for path in args.images}
        if len(names) < len(args.images):
            raise InputError("two of the scans have the same name (expected names that differ).")
        args.out.mkdir(parents=True, exist_ok=True)
        cohort = pd.DataFrame({"patient_id": list(names), "image": [str(path) for path in names.values()]})
        cohort.to_csv(args.out / "cohort.csv", index=False)
        infer = {"cohort": args.out / "cohort.csv", "ckpt": args.ckpt, "output_dir": args.out}
        try:
            run_module(
                "monai.bundle", "run", "--config_file", "configs/inference.json", *overrides(infer),
                log=args.out / "log.txt", threads=2,
            )  # fmt: skip
        except RuntimeError:  # of scans that are refused, which the table says
            if not (args.out / "predictions.csv").is_file():
                raise
        table = pd.read_csv(args.out / "predictions.csv", dtype={"patient_id": str}, index_col="patient_id")
        table["message"] = table["message"].fillna("")
        maps = args.out / "maps"
        scans = tqdm(names.items(), desc="real scans", unit="scan")
        verdict = believed(json.loads(args.ckpt.with_name("settings.json").read_text(encoding="utf-8")))["verdict"]
        rows = [row_of(name, path, table.loc[name], maps, verdict) for name, path in scans]
        head = HEAD.format(verdict=verdict)
        picture = args.picture or args.page.with_suffix(".png")
        foot = FOOT.format(picture=os.path.relpath(picture, args.page.parent))
        write_text(args.page, head + markdown(pd.DataFrame(rows)) + foot)
        write_png(picture, sheet(list(names), maps))
    except (InputError, RuntimeError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
