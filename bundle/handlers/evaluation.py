# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare heat maps with ground-truth masks: those of the network, or those of any other tool."""

from pathlib import Path

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from tqdm import tqdm

from bundle.data.stream import ScanStream
from bundle.errors import InputError, input_error_of, unforeseen
from bundle.maps.heat import to_voxels
from bundle.maps.scan_space import to_scan_space
from bundle.metrics import LocalisationMetric, MapDistribution, SurvivalMetric
from bundle.transforms import LoadCTd


def mask_cells(
    mask: MetaTensor, image: MetaTensor, lung: torch.Tensor, cell: int, grid: tuple[int, int, int]
) -> torch.Tensor:
    """Share of each cell of the map that the mask covers inside the lung, (1, d, h, w).

    Args:
        mask: ground truth on the scan's grid, (1, D, H, W).
        image, lung: what the network saw, (1, D', H', W').
        cell: side of a cell of the map, in voxels of `image`.
        grid: cells of the map, (d, h, w); they cover the image and may reach beyond its end.
    """
    shape = tuple(image.shape[1:])
    resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=torch.float32)
    seen = resample(mask, dst_affine=image.affine, spatial_size=shape).as_tensor()[None] * lung[None]
    pad = [n for cells, size in zip(reversed(grid), reversed(shape)) for n in (0, cells * cell - size)]
    return F.avg_pool3d(F.pad(seen, pad), cell)[0]


def ceiling_map(cells: torch.Tensor, mask: MetaTensor, image: MetaTensor, lung: torch.Tensor, cell: int) -> MetaTensor:
    """The mask as a map with cells of `cell` voxels can best show it, on the mask's own grid.

    Args:
        cells: from :func:`mask_cells`, with the other arguments as there.
    """
    best = to_voxels(cells[None], cell, tuple(image.shape[1:]), None)[0]
    return to_scan_space(MetaTensor(best, affine=image.affine), mask.affine, mask.shape[1:], lung)


class ScoreScans:
    """Handler that feeds a MONAI evaluator's predictions and maps into the metrics, scan by scan.

    Expects the output of :class:`~bundle.maps.MapToHeatd` and :class:`~bundle.maps.HeatToScand`, and in the batch what
    `LoadCTd` gives; a scan may have no `gt_mask` or no `confounder_mask`. A scan that can't be scored doesn't end the
    run: the stream notes what was wrong.

    Args:
        survival: metric of the predicted distributions.
        localisation: metric of the maps.
        distribution: of the maps' locations and weights.
        cell: side of a cell of the map in voxels of the network's grid.
        stream: of the scans.
    """

    def __init__(
        self,
        survival: SurvivalMetric,
        localisation: LocalisationMetric,
        distribution: MapDistribution,
        cell: int,
        stream: ScanStream,
    ) -> None:
        self.survival = survival
        self.localisation = localisation
        self.distribution = distribution
        self.cell = cell
        self.stream = stream

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)

    def reset(self, engine: Engine) -> None:
        for metric in (self.survival, self.localisation, self.distribution):
            metric.reset()

    def add(self, engine: Engine) -> None:
        for scan, output in zip(engine.state.batch, engine.state.output):  # no output of a scan without a prediction
            try:
                self.score(scan, output)
            except Exception as e:
                patient_id = scan["patient_id"]
                self.stream.note(patient_id, str(input_error_of(e) or unforeseen(patient_id, e, "scoring")))

    def score(self, scan: dict, output: dict) -> None:
        """Score one scan of a decollated batch. The metrics know either all of it or nothing."""
        who, mask, survival_map = [scan["patient_id"]], scan.get("gt_mask"), output["pred"].cpu()
        pmf, outcome = output["pmf"].cpu(), output["label"].cpu()
        cells, ceiling = None, None
        if mask is not None and bool(mask.any()):
            lung, grid = torch.as_tensor(scan["lung"]), tuple(survival_map.shape[1:])
            cells = mask_cells(mask, scan["image"], lung, self.cell, grid)
            ceiling = ceiling_map(cells, mask, scan["image"], lung, self.cell)
            cells = cells[0]
        self.localisation(
            [output["scan_heat"].cpu()],
            [mask],
            confounder=[scan.get("confounder_mask")],
            ceiling=[ceiling],
            time=outcome[:1],
            event=outcome[1:],
            patient_id=who,
        )
        self.distribution([survival_map], [cells], who)
        self.survival(pmf[None], outcome[None], patient_id=who)


def score_maps(stream: ScanStream, maps_dir: str, localisation: LocalisationMetric) -> None:
    """Score the heat maps `<patient_id>_heat.nii.gz` that any tool wrote on the scans' own grids.

    Args:
        stream: of the scans, with their masks; notes every map that is missing, unreadable or on another grid.
        maps_dir: folder of the maps.
        localisation: the metric of the maps.
    """
    load = LoadCTd(keys=("heat",), mask_keys=("gt_mask", "confounder_mask"), hounsfield=False)
    for record in tqdm(stream.data, desc="scoring maps", unit="scan"):
        patient_id = record["patient_id"]
        heat = Path(maps_dir) / f"{patient_id}_heat.nii.gz"
        try:
            if not heat.is_file():
                raise InputError(f"patient {patient_id}: there is no {heat}.")
            scan = load({**record, "heat": str(heat)})
            localisation(
                [scan["heat"]],
                [scan.get("gt_mask")],
                confounder=[scan.get("confounder_mask")],
                time=[record["time"]],
                event=[record["event"]],
                patient_id=[patient_id],
            )
        except Exception as e:
            stream.note(patient_id, str(input_error_of(e) or unforeseen(patient_id, e, "scoring")))
