# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Explanations of the scans of a run, in their own space and in files."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from bundle.errors import InputError
from bundle.explain import chosen, tokens_of_scan
from bundle.explain.cubelets import Cubelets, cubelets
from bundle.explain.scan import FILLS, ScanTokens, death_target
from bundle.files import write_atomically
from bundle.maps.heat import spread, to_voxels
from bundle.maps.scan_space import on_scan_grid, to_scan_space
from bundle.report.pictures import write_png
from bundle.survival.readout import death_by, patient_numbers

logger = logging.getLogger(__name__)

TINY = 1e-8  # a map below says nothing: where P(death) is 0 or 1, say
TARGETS = ("location", "death")
SHARES = ("heat", "weight")  # a voxel of a finer grid has less of them
FINISHED = ("heat", "location", "weight")  # told by the finished map, which is finer than the tokens


class Explanation(NamedTuple):
    """One explanation of one scan."""

    name: str
    volume: Tensor | Cubelets  # (1, D, H, W), or (3, D, H, W) of red, green and blue, on the scan's own grid; or patches
    hot: int  # see :class:`bundle.explain.Explainer`
    found: dict[str, float]  # numbers beside the map


class Explanations:
    """Explains the scans of a run as they come; without names it does nothing.

    Args:
        model: a :class:`~bundle.run.TrainedModel`.
        names: what `--explain` names.
        target: ``location`` in months, or ``death`` by the horizon, of gradients and perturbations.
        fill: what replaces lung, of :data:`bundle.explain.scan.FILLS`.
        horizon: months.
        cell: of the finished map, in voxels.
        hu_window: HU that are 0 and 1 in the image.

    Raises:
        InputError: a name, target or fill is unknown or doesn't apply to the network, or the model is an ensemble.
    """

    def __init__(
        self,
        model: Any,
        names: str | Sequence[str] | None,
        target: str,
        fill: str,
        horizon: int,
        cell: int,
        hu_window: tuple[float, float],
    ) -> None:
        if names and hasattr(model, "networks"):
            raise InputError("--explain explains one model; leave it out for an ensemble.")
        for option, value, known in (("target", target, TARGETS), ("fill", fill, FILLS)):
            if value not in known:
                raise InputError(f"--explain_{option} is {value} (expected {' or '.join(known)}).")
        self.network, self.objective = model.network, getattr(model, "objective", None)
        self.chosen = chosen(names, self.network)
        self.target, self.fill, self.horizon, self.cell, self.hu_window = target, fill, horizon, cell, hu_window
        self.usual = model.familiarity[0].mean[0] if model.familiarity[0] else None
        self.options = [list(self.chosen), target, fill]  # all that the files depend on besides the weights and the scan

    def of(self, scan: dict, output: dict) -> Iterator[Explanation]:
        """The explanations of a scan of a decollated batch and its output, one at a time: a CT's are large.

        What can't be trusted is added to the scan's notes.
        """
        if not self.chosen:
            return
        tokens = self.tokens(scan, output)
        for name, (explainer, level) in self.chosen.items():
            tokens.found = {}
            if explainer.of is cubelets:
                yield Explanation(name, cubelets(tokens, np.asarray(scan["image"].affine), self.hu_window), 0, {})
                continue
            with torch.no_grad():
                values = None if name in FINISHED else tokens.lay(explainer.of(tokens, level))
            if said := doubt(values, tokens.found):
                note = f"the explanation {name} of the target {self.target} {said}"
                logger.warning(f"{scan['patient_id']}: {note}.")
                scan["notes"] = "; ".join(filter(None, [scan.get("notes"), note]))
            yield Explanation(name, self.in_scan_space(name, values, tokens, scan, output), explainer.hot, tokens.found)

    def tokens(self, scan: dict, output: dict) -> ScanTokens:
        """A scan as explainers see it; its patient's months are those of the finished map."""
        device = next(self.network.parameters()).device
        image, lung = (torch.as_tensor(scan[key]).as_subclass(Tensor)[None].to(device) for key in ("image", "lung"))
        clinical = None
        if len(scan.get("clinical", [])):
            clinical = torch.tensor([[float(x) for x in scan["clinical"]]], device=device)
        death = float(death_by(output["pmf"][None], self.horizon))
        tokens = tokens_of_scan(self.network, image, lung, clinical, fill=self.fill, usual=self.usual, death=death)
        finished = torch.as_tensor(output["pred"]).as_subclass(Tensor)[None].to(device)
        later = float(patient_numbers(finished)[0] - patient_numbers(tokens.survival_map)[0])
        tokens.survival_map[:, 0] += later * (tokens.survival_map[:, -1] > 0)
        if self.target == "death":
            tokens.target = death_target(self.objective, self.horizon, later)
        return tokens

    def in_scan_space(self, name: str, values: Tensor | None, tokens: ScanTokens, scan: dict, output: dict) -> Tensor:
        """Values on the token grid (C, d, h, w), or of the finished map, on the grid of the scan's file."""
        image, meta = scan["image"], scan["image"].meta
        grid = meta["original_affine"], tuple(meta["spatial_shape"])
        if name == "heat":
            return output["scan_heat"].cpu()
        cell, size = tokens.cell, tuple(image.shape[1:])
        if values is None:
            values = torch.as_tensor(output["pred"]).as_subclass(Tensor)[[0 if name == "location" else -1]]
            cell = 1 if values.shape[1:] == size else self.cell
        bring = to_voxels if name in SHARES else spread
        lung = tokens.lung if values.shape[0] == 1 else torch.ones_like(tokens.lung)
        voxels = bring(values[None].to(tokens.lung), cell, size, lung)[0]
        onto = to_scan_space if name in SHARES else on_scan_grid
        inside = torch.as_tensor(scan["lung"]).as_subclass(Tensor)
        return torch.cat([onto(MetaTensor(part[None].cpu(), affine=image.affine), *grid, inside) for part in voxels])

    def write(self, output_dir: Path, scan: dict, output: dict) -> list[Path]:
        """Write all explanations of a scan; returns the files."""
        return [path for each in self.of(scan, output) for path in write_explanation(output_dir, scan, each)]


def doubt(values: Tensor | None, found: dict[str, float]) -> str:
    """Why a map says nothing, or not what it should; empty if nothing speaks against it."""
    if values is not None and not bool(values.isfinite().all()):
        return "is not finite"
    if values is not None and float(values.abs().max()) < TINY:
        return "is 0 everywhere"
    if (error := found.get("completeness_error", 0)) > 0.1:
        return f"doesn't add up (completeness error {error:.0%})"
    return ""


def write_explanation(output_dir: Path, scan: dict, explanation: Explanation) -> list[Path]:
    """Write `maps/<patient_id>_<name>.nii.gz`, with its numbers in the header's description; returns the files.

    Of cubelets a picture and, for the cohort's, what is on it: .png and .npz.
    """
    name, volume, _, found = explanation
    path = output_dir / "maps" / f"{scan['patient_id']}_{name}"
    if isinstance(volume, Cubelets):
        picture, patches = (path.with_name(f"{path.name}.{kind}") for kind in ("png", "npz"))
        write_png(picture, volume.picture())
        volume.save(patches)
        return [picture, patches]
    path = path.with_name(f"{path.name}.nii.gz")
    voxels = np.asarray(volume, dtype=np.float32)
    if len(voxels) == 3:
        colours = np.rint(255 * voxels).clip(0, 255).astype(np.uint8).transpose(1, 2, 3, 0)
        voxels = np.ascontiguousarray(colours).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    else:
        voxels = voxels[0]
    image = nib.Nifti1Image(voxels, np.asarray(scan["image"].meta["original_affine"], dtype=np.float64))
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = " ".join([name, *(f"{key} {value:.3g}" for key, value in found.items())])[:79]
    write_atomically(path, image.to_filename)
    for key, value in found.items():
        logger.info(f"{scan['patient_id']}, {name}: {key.replace('_', ' ')} {value:.2%}.")
    return [path]
