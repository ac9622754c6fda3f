# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI's 3-D ResNet-10 with Cox's loss and its Grad-CAM (Selvaraju et al., ICCV 2017)."""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.nets import resnet10
from monai.visualize import GradCAM
from torch import Tensor
from tqdm import tqdm

from scripts.research.peers.cohort import Cohort, Predict, Scan

TITLE = "3-D ResNet-10, Cox, Grad-CAM"
EPOCHS, BATCH = 20, 12
LAYER = "layer2"  # 24 mm; that of the last layer has 96 mm, which is half a lung


def box_of(lung: Tensor) -> tuple[slice, ...]:
    """The box around the lung."""
    spots = lung.nonzero()
    return tuple(slice(int(a), int(b) + 1) for a, b in zip(spots.min(0).values, spots.max(0).values))


def volume(scan: Scan) -> tuple[Tensor, tuple[slice, ...]]:
    """What the network sees, (2, D, H, W): the image within the lung, and the lung; and where that is in the scan."""
    lung = scan.mask("lung_mask")
    box = box_of(lung)
    return torch.stack([scan.image[box] * lung[box], lung[box]]), box


def batch_of(volumes: list[Tensor]) -> Tensor:
    """Volumes, padded at their ends to one size, (N, 2, D, H, W)."""
    size = [max(v.shape[axis] for v in volumes) for axis in (1, 2, 3)]
    ends = [[p for n, have in zip(size[::-1], v.shape[:0:-1]) for p in (0, n - have)] for v in volumes]
    return torch.stack([F.pad(v.float(), end) for v, end in zip(volumes, ends)])


def drawn_within(stratum: Tensor) -> list[Tensor]:
    """Numbers of scans in batches of one stratum each, in random order: patients are compared within it alone."""
    batches = []
    for k in stratum.unique():
        own = (stratum == k).nonzero()[:, 0]
        batches += own[torch.randperm(len(own))].tensor_split(-(-len(own) // BATCH))
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


def train(cohort: Cohort, device: torch.device) -> nn.Module:
    """Fixed epochs; a batch's partial likelihood, left and right swapped at random, some offset and contrast."""
    network = resnet10(
        spatial_dims=3, n_input_channels=2, num_classes=1, conv1_t_size=3, conv1_t_stride=2, widen_factor=0.5
    ).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    batches = sum(-(-int(count) // BATCH) for count in cohort.stratum.bincount())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=EPOCHS * batches)
    volumes = [volume(scan)[0].half() for scan in cohort.train]
    for _ in tqdm(range(EPOCHS), desc="ResNet-10", unit="epoch", leave=False):
        for drawn in drawn_within(cohort.stratum):
            x = batch_of([volumes[i].flip(1) if torch.rand(()) < 0.5 else volumes[i] for i in drawn])
            shift, contrast = 0.02 * torch.randn(2, len(x), 1, 1, 1)
            x[:, 0] = x[:, 1] * (x[:, 0] * (1 + contrast) + shift)
            risk = network(x.to(device))[:, 0].cpu()
            loss = -cohort.log_likelihood(risk, drawn) / len(drawn)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def fit(cohort: Cohort, seed: int) -> Predict:
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = train(cohort, device)
    cam = GradCAM(network, LAYER, postprocessing=lambda x: x)  # as it is: scaled by scan it can't be compared

    def predict(scan: Scan) -> tuple[float, np.ndarray]:
        x, box = volume(scan)
        with torch.no_grad():
            risk = float(network(x[None].to(device)))
        lung = scan.mask("lung_mask")
        heat = torch.zeros(lung.shape)
        heat[box] = cam(x[None].to(device), class_idx=0)[0, 0].detach().cpu()
        return risk, (heat * lung).numpy()

    return predict
