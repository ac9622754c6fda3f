# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The regions of a map and the lung as a segmentation that 3D Slicer opens, with names and colours."""

from pathlib import Path

import numpy as np
import slicerio
from monai.data import MetaTensor

from bundle.files import write_atomically
from bundle.grids import mask_on_grid
from bundle.report.regions import LUNG_COLOUR, segments

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_segmentation(path: Path, scan: dict, output: dict) -> list[Path]:
    """Write ranked regions and lung mask of a scan as `.seg.nrrd` on the grid of its NIfTI maps; nothing if it has neither.

    Format: https://slicer.readthedocs.io/en/latest/developer_guide/modules/segmentations.html

    Args:
        scan: of a decollated batch, as :class:`~bundle.transforms.LoadCTd` read it.
        output: its ``heat``, as :class:`~bundle.maps.MapToHeatd` has it.

    Returns:
        the files.
    """
    image, heat = scan["image"], np.asarray(output["heat"].cpu()[0])
    grid, shape = np.asarray(image.meta["original_affine"], dtype=float), image.meta["spatial_shape"]
    affine, lung, masked = np.asarray(image.affine, dtype=float), scan["lung"][0] > 0, scan["lung_mask_source"] != "none"
    ranks, names, colours = segments(heat, np.asarray(image[0]), np.asarray(lung), affine, masked)
    layers, described = [], []
    if names:
        layers.append(mask_on_grid(MetaTensor(ranks[None], affine=affine), grid, shape))
        described += [
            {"id": f"Heat_{rank}", "name": name, "color": colour, "labelValue": rank, "layer": 0}
            for rank, (name, colour) in enumerate(zip(names, colours), 1)
        ]
    if masked:
        described.append({"id": "Lung", "name": "Lung", "color": LUNG_COLOUR, "labelValue": 1, "layer": len(layers)})
        layers.append(mask_on_grid(scan["lung_mask"], grid, shape))
    if not layers:
        return []
    content = {"voxels": np.stack(layers), "ijkToLPS": _LPS_TO_RAS @ grid, "segments": described}
    content |= {"containedRepresentationNames": ["Binary labelmap"]}
    # Regions lie in the lung, so they are a layer each; the fastest compression halves the time of a CT's.
    write_atomically(path, lambda temporary: slicerio.write_segmentation(str(temporary), content, compression_level=1))
    return [path]
