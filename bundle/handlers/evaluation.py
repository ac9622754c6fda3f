# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare heat maps with ground-truth masks: those of the network, or those of any other tool."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from tqdm import tqdm

from bundle.errors import InputError
from bundle.explain.heat import to_voxels
from bundle.explain.maps import to_scan_space
from bundle.metrics import LocalisationMetric, SurvivalMetric
from bundle.transforms import LoadCTd

__all__ = ["ScoreScans", "ceiling_map", "score_maps"]


def ceiling_map(mask: MetaTensor, image: MetaTensor, lung: torch.Tensor, cell: int) -> MetaTensor:
    """The mask as a map with cells of `cell` voxels can best show it, on the mask's own grid.

    Args:
        mask: ground truth on the scan's grid, (1, D, H, W).
        image, lung: what the network saw, (1, D', H', W').
        cell: side of a cell of the map, in voxels of `image`.
    """
    shape = tuple(image.shape[1:])
    resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=torch.float32)
    seen = resample(mask, dst_affine=image.affine, spatial_size=shape).as_tensor()[None] * lung[None]
    pad = [n for size in reversed(shape) for n in (0, -size % cell)]
    cells = F.avg_pool3d(F.pad(seen, pad), cell)
    best = to_voxels(cells, cell, shape, None)[0]
    return to_scan_space(MetaTensor(best, affine=image.affine), mask.affine, mask.shape[1:])


class ScoreScans:
    """Handler that feeds a MONAI evaluator's predictions and maps into the metrics, scan by scan.

    Expects the output of :class:`~bundle.explain.MapToHeatd` and :class:`~bundle.explain.HeatToScand`, and in the
    batch what `LoadCTd` gives; a scan may have no `gt_mask` or no `confounder_mask`.

    Args:
        survival: metric of the predicted distributions.
        localisation: metric of the maps.
        cell: side of a cell of the map in voxels of the network's grid.
    """

    def __init__(self, survival: SurvivalMetric, localisation: LocalisationMetric, cell: int) -> None:
        self.survival = survival
        self.localisation = localisation
        self.cell = cell

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)

    def reset(self, engine: Engine) -> None:
        self.survival.reset()
        self.localisation.reset()

    def add(self, engine: Engine) -> None:
        for scan, output in zip(engine.state.batch, engine.state.output):
            who = [scan["patient_id"]]
            self.survival(output["pmf"].cpu()[None], output["label"].cpu()[None], patient_id=who)
            mask = scan.get("gt_mask")
            ceiling = None
            if mask is not None and bool(mask.any()):
                ceiling = ceiling_map(mask, scan["image"], torch.as_tensor(scan["lung"]), self.cell)
            time, event = output["label"].cpu()
            self.localisation(
                [output["scan_heat"].cpu()], [mask], [scan.get("confounder_mask")], [ceiling], [time], [event], who
            )


def score_maps(records: list[dict], maps_dir: str, localisation: LocalisationMetric) -> None:
    """Score the heat maps `<patient_id>_heat.nii.gz` that any tool wrote on the scans' own grids.

    Raises:
        InputError: every map that is missing, unreadable or on another grid than its mask, in one message.
    """
    faults = []
    load = LoadCTd(keys=("heat",), mask_keys=("gt_mask", "confounder_mask"), hounsfield=False)
    for record in tqdm(records, desc="scoring maps", unit="scan"):
        heat = Path(maps_dir) / f"{record['patient_id']}_heat.nii.gz"
        if not heat.is_file():
            faults.append(f"{record['patient_id']}: there is no {heat}")
            continue
        if "gt_mask" not in record:
            continue
        try:
            scan = load({**record, "heat": str(heat)})
            localisation(
                [scan["heat"]],
                [scan["gt_mask"]],
                [scan.get("confounder_mask")],
                None,
                [record["time"]],
                [record["event"]],
                [record["patient_id"]],
            )
        except InputError as e:
            faults.append(str(e))
    if faults:
        raise InputError(f"{len(faults)} of {len(records)} maps can't be scored: " + "; ".join(faults))
