# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A cohort of implants as the peers read it: scans, their tokens, and folds that leave whole anatomies out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.data import DataLoader
from torch import Tensor
from tqdm import tqdm

from bundle.files import file_sha256, load_checked, save_checked
from bundle.survival.cox import partial_log_likelihood
from scripts.research.peers import descriptors

Predict = Callable[["Scan"], tuple[float, np.ndarray]]  # risk, and heat >= 0 on the scan's grid


@dataclass
class Scan:
    """A row of a cohort, in the folder of its table; volumes and tokens are read when they are asked for."""

    folder: Path
    row: pd.Series

    def volume(self, column: str) -> Tensor:
        return torch.from_numpy(np.asarray(nib.load(self.folder / self.row[column]).dataobj).astype(np.float32))

    def mask(self, column: str) -> Tensor:
        return self.volume(column) > 0

    @property
    def image(self) -> Tensor:
        """(D, H, W), 0 to 1 for -1000 to 200 HU."""
        return ((self.volume("image") + 1000) / 1200).clamp(0, 1)

    @cached_property
    def file(self) -> Path:
        """Its tokens; of another file if descriptors changed."""
        return self.folder / f"tokens_{file_sha256(descriptors.__file__)[:8]}" / f"{self.row.patient_id}.pt"

    def describe(self) -> None:
        """Write its tokens, unless they are there."""
        if not self.file.is_file():
            tokens, place = descriptors.describe(self.image, self.mask("lung_mask"))
            lesion = self.mask("gt_mask")[place.unbind(1)]
            self.file.parent.mkdir(exist_ok=True)
            save_checked({"tokens": tokens.half(), "place": place.short(), "lesion": lesion}, self.file)

    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Descriptors (M, 41), less the scan's own median and spread; places (M, 3); whether a lesion is there (M,)."""
        found = load_checked(self.file)
        return descriptors.centre(found["tokens"].float()), found["place"].long(), found["lesion"]

    def on_grid(self, value: Tensor, place: Tensor, smooth: float = 0.0) -> np.ndarray:
        return descriptors.to_voxels(value, place, self.mask("lung_mask"), smooth)


class Cohort:
    """Scans to fit on (the first `num` of splits train and val) and to measure on (test)."""

    def __init__(self, table: Path, num: int | None = None) -> None:
        self.folder = table.parent
        rows = [row for _, row in pd.read_csv(table).iterrows()]
        self.train = [Scan(table.parent, row) for row in rows if row.split != "test"][:num]
        self.test = [Scan(table.parent, row) for row in rows if row.split == "test"]
        self.time, self.event = outcome(self.train)

    def describe(self, jobs: int) -> None:
        """Write the tokens of all scans."""
        scans = [scan for scan in self.train + self.test if not scan.file.is_file()]
        done = DataLoader(scans, batch_size=None, collate_fn=Scan.describe, num_workers=jobs if jobs > 1 else 0)
        list(tqdm(done, desc="descriptors", unit="scan", disable=not scans))

    def sample(self, number: int, seed: int, lesions: int = 0) -> tuple[Tensor, Tensor]:
        """Of each training scan as many tokens, drawn at random, (N, number, 41), and whether they lie in a lesion.

        Args:
            lesions: at most so many of them are drawn among the tokens in lesions, where there are any.
        """
        g, tokens, inside = torch.Generator().manual_seed(seed), [], []
        for scan in self.train:
            x, _, lesion = scan.tokens()
            ill = lesion.nonzero()[:, 0]
            ill = ill[torch.randperm(len(ill), generator=g)[:lesions]]
            drawn = torch.cat([ill, torch.randint(len(x), (number - len(ill),), generator=g)])
            tokens.append(x[drawn])
            inside.append(lesion[drawn])
        return torch.stack(tokens), torch.stack(inside)

    @cached_property
    def stratum(self) -> Tensor:
        """Number of each training scan's anatomy, (N,)."""
        anatomy = [scan.row.anatomy for scan in self.train]
        return torch.tensor([sorted(set(anatomy)).index(name) for name in anatomy])

    def log_likelihood(self, log_hazard: Tensor, scans: Tensor | None = None) -> Tensor:
        """Cox's log partial likelihood of training scans, all or those of these numbers; a baseline hazard each anatomy."""
        scans = torch.arange(len(self.train)) if scans is None else scans
        total, stratum = log_hazard.new_zeros(()), self.stratum[scans]
        for k in stratum.unique():
            own = stratum == k
            total = total + partial_log_likelihood(log_hazard[own], self.time[scans[own]], self.event[scans[own]])
        return total

    def folds(self, most: int = 4) -> list[tuple[Tensor, Tensor]]:
        """Indices of training scans to fit on and to choose by, which share no anatomy."""
        fold = self.stratum % most
        return [((fold != k).nonzero()[:, 0], (fold == k).nonzero()[:, 0]) for k in fold.unique()]


def scaler(x: Tensor) -> Callable[[Tensor], Tensor]:
    """What standardises tokens by those of a sample (N, M, F), and clips them at six deviations."""
    mean, spread = x.mean((0, 1)), x.std((0, 1)) + 1e-3
    return lambda tokens: ((tokens - mean) / spread).clamp(-6, 6)


def outcome(scans: list[Scan]) -> tuple[Tensor, Tensor]:
    """Months and events, (N,) each, in double."""
    return tuple(torch.tensor([float(scan.row[key]) for scan in scans], dtype=torch.float64) for key in ("time", "event"))
