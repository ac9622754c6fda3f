# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The baseline that doesn't look at the scan: a survival map from clinical covariates alone."""

import torch
import torch.nn as nn
from torch import Tensor

from bundle.errors import InputError
from bundle.networks.patches import share_of_lung, to_grid


class ClinicalNet(nn.Module):
    """Clinical vector -> survival map with the same location and the same weight everywhere in the lung.

    It takes the place of :class:`~bundle.networks.SurvivalMapNet` in every config, whose arguments and errors it
    shares. Under a Cox objective it is Cox regression.

    Args:
        stride: side of the map's cells in voxels.
        loc_bias: location in months of an untrained network; learnt.

    Raises:
        InputError: there are no clinical columns.
    """

    def __init__(self, clinical_dim: int, stride: int = 4, loc_bias: float = 60.0, extra: int = 0) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.arguments = arguments
        if clinical_dim < 1:
            raise InputError("a network of clinical covariates needs some: name columns in the key clinical.")
        self.clinical_dim = clinical_dim
        self.stride = stride
        self.unit = 30.0  # months of a layer's output of 1, which can move by tens of months in a training
        self.to_location = nn.Linear(clinical_dim, 1)
        nn.init.normal_(self.to_location.weight, std=0.01)
        nn.init.constant_(self.to_location.bias, loc_bias / self.unit)
        # With a bias: the average patient, whose covariates are 0, has a shape of their own.
        self.to_extra = nn.Linear(clinical_dim, extra) if extra > 0 else None
        if self.to_extra is not None:
            nn.init.zeros_(self.to_extra.weight)
            nn.init.zeros_(self.to_extra.bias)

    def forward(self, image: Tensor, lung: Tensor | None = None, clinical: Tensor | None = None) -> Tensor:
        image, lung = to_grid(image, lung, self.stride)
        if clinical is None or clinical.shape[1] != self.clinical_dim:
            raise ValueError(f"clinical must be a vector of length {self.clinical_dim} a scan.")
        inside = (share_of_lung(image, lung, self.stride, 0.0) > 0).to(image.dtype).unsqueeze(1)
        total = inside.sum((2, 3, 4), keepdim=True)
        if bool((total == 0).any()):
            raise ValueError("a scan of the batch has no lung voxel.")
        clinical = clinical.to(image.dtype)
        said = self.unit * self.to_location(clinical)
        if self.to_extra is not None:
            said = torch.cat([said, 3 * torch.tanh(self.to_extra(clinical))], 1)
        return torch.cat([said[:, :, None, None, None] * inside, inside / total], 1)
