# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""One scan as explainers see it: tokens on a grid, and what becomes of the target where some of them are replaced."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bundle.errors import InputError
from bundle.networks import CodebookNet, SurvivalMapNet
from bundle.networks.attention import tokens_of
from bundle.networks.codebook_net import root_mean, smoothed
from bundle.networks.descriptors import blur, describe, level_and_spread, tokens_at
from bundle.survival.readout import death_by, patient_numbers

FILLS = ("mean", "blur", "air")
BLUR = 5.0  # voxels
BATCH = 2**13  # tokens that pass the network at once: as many as a processor's cache holds

Target = Callable[[Tensor], Tensor]  # a survival map (B, C, d, h, w) -> one number a patient, (B,); more is worse


def earliness(survival_map: Tensor) -> Tensor:
    """The target ``location``: months of the patient's location, with a minus, so that more is worse."""
    return -patient_numbers(survival_map)[0]


def death_target(objective: nn.Module, horizon: int, later: float = 0.0) -> Target:
    """The target ``death``: P(T <= horizon months), with all locations `later` by these months."""

    def target(survival_map: Tensor) -> Tensor:
        location = survival_map[:, :1] + later * (survival_map[:, -1:] > 0)
        return death_by(objective.pmf(torch.cat([location, survival_map[:, 1:]], 1)), horizon)

    return target


def filled(image: Tensor, lung: Tensor, fill: str, usual: float | None = None) -> Tensor:
    """A scan (D, H, W) of which all lung is replaced: HU window scaled to [0, 1], lung in {0, 1}.

    ``mean`` is lung as the training scans have it, `usual` (without one, the scan's median), ``blur`` this scan's own
    without its detail, and ``air`` the bottom of the window.

    Raises:
        InputError: there is no such fill.
    """
    if fill not in FILLS:
        raise InputError(f"--explain_fill is {fill} (expected one of {', '.join(FILLS)}).")
    if fill == "blur":
        level = blur(image * lung, BLUR) / blur(lung, BLUR).clamp_min(1e-3)
    elif fill == "mean":
        level = image[lung > 0].median() if usual is None else image.new_tensor(usual)
    else:
        level = image.new_tensor(0.0)
    return torch.where(lung > 0, level, image)


class ScanTokens:
    """Tokens of one scan, M of them; a subclass for each network knows what they are.

    Args:
        network: in evaluation mode.
        image: (1, 1, D, H, W), HU window scaled to [0, 1].
        lung: (1, 1, D, H, W) in {0, 1}; None for no mask.
        clinical: (1, clinical_dim) or None.
        target: of the explanation.
        fill: what replaces lung, of :data:`FILLS`.
        usual: level of lung in the training scans, for the fill ``mean``; None if not known.
        death: P(death by the horizon), which is what heat sums to.

    Attributes:
        index: cell of each token, (M, 3).
        shape: of the grid, (d, h, w).
        cell: side of a cell in voxels.
        found: numbers that an explainer found beside its map.
    """

    def __init__(
        self,
        network: nn.Module,
        image: Tensor,
        lung: Tensor | None = None,
        clinical: Tensor | None = None,
        target: Target = earliness,
        fill: str = "mean",
        usual: float | None = None,
        death: float = 1.0,
    ) -> None:
        self.network = network
        self.image = image.as_subclass(Tensor)
        self.lung = torch.ones_like(self.image) if lung is None else lung.as_subclass(Tensor).to(self.image.dtype)
        self.clinical = clinical
        self.target = target
        self.filled = filled(self.image[0, 0], self.lung[0, 0], fill, usual)[None, None]
        self.fill = fill
        self.death = death
        self.found: dict[str, float] = {}
        self.memo: dict = {}  # of what several explainers need
        with torch.no_grad():
            self.survival_map = network(self.image, self.lung, clinical)
            self.prepare()

    @staticmethod
    def levels(network: nn.Module) -> tuple[str, ...]:
        """Names of the places in a network whose features can be seen."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Find the tokens of the scan and of its filled one."""
        raise NotImplementedError

    def kept(self, masks: Tensor) -> Tensor:
        """The target, (k,), with a share of each token kept, (k, M) in [0, 1], and the rest from the filled scan."""
        with torch.no_grad():
            return torch.cat([self.kept_batch(part) for part in masks.split(self.batch)])

    @property
    def batch(self) -> int:
        """Scans that pass the network at once."""
        return max(1, BATCH // len(self.index))

    def lay(self, values: Tensor) -> Tensor:
        """Values of tokens, (M,) or (M, C), on the grid, (C, d, h, w); 0 where there is no token."""
        values = values.detach().view(len(self.index), -1)
        grid = values.new_zeros(*self.shape, values.shape[1])
        grid[tuple(self.index.T)] = values
        return grid.permute(3, 0, 1, 2)

    def pick(self, grid: Tensor) -> Tensor:
        """Values of the tokens, (..., M), on a grid (..., d, h, w)."""
        z, y, x = self.index.T
        return grid[..., z, y, x]


class TransformerTokens(ScanTokens):
    """Tokens of a :class:`~bundle.networks.SurvivalMapNet`, one a patch, as its transformer sees them.

    FiLM's context is held as the scan has it.
    """

    @staticmethod
    def levels(network: nn.Module) -> tuple[str, ...]:
        blocks = [f"block{number}" for number in range(1, len(network.blocks))]  # the last block's is the output
        return ("input", *blocks, "output", "head")

    def prepare(self) -> None:
        self.stages, self.copies = {}, {}
        x, self.tokens, self.share, self.known, self.context = self.network.embedded(self.image, self.lung, self.clinical)
        self.cell, self.shape, self.index = self.network.stride, tuple(self.share.shape[1:]), self.tokens.index[:, 1:]
        windows = torch.div(self.tokens.slots, max(1, self.network.window**3), rounding_mode="floor")
        _, window, counts = torch.unique_consecutive(windows, return_inverse=True, return_counts=True)
        self.first = (counts.cumsum(0) - counts)[window]  # the first token in the window of each
        for place, image in {"": self.image, "filled ": self.filled}.items():
            x = self.network.embedded(image, self.lung, self.clinical)[0]
            self.stages[place + "input"] = x
            for number, block in enumerate(self.network.blocks, 1):
                x = block(x, self.tokens, self.context)
                self.stages[f"{place}block{number}"] = x
            self.stages[place + "output"] = x
        centred = x = self.stages["output"]
        if self.network.center_tokens:
            centred = x - x.mean(0)
        self.stages["head"] = self.network.head.to_location[:-1](centred)

    def features(self, level: str, of_filled: bool = False) -> Tensor:
        """What is at a place in the network, (M, n)."""
        return self.stages["filled " * of_filled + level]

    def score(self, x: Tensor, level: str = "input") -> Tensor:
        """The target, (k,), with other tokens, (k, M, dim), at the transformer's ``input`` or ``output``."""
        k = len(x)
        if k not in self.copies:
            share = self.share.expand(k, -1, -1, -1)
            self.copies = {k: (tokens_of(share, self.network.window), share)}
        tokens, share = self.copies[k]
        x = x.reshape(-1, x.shape[2])
        if level == "input":
            for block in self.network.blocks:
                x = block(x, tokens, self.context.expand(k, -1))
        return self.target(self.network.read(x, tokens, share, self.known.expand(k, -1)))

    def kept_batch(self, masks: Tensor) -> Tensor:
        # Tokens see their own window alone: where each window is replaced as a whole, so is what leaves the blocks.
        level = "output" if torch.equal(masks, masks[:, self.first]) else "input"
        x, other = self.features(level), self.features(level, True)
        return self.score(other + masks.unsqueeze(2) * (x - other), level)


class CodebookTokens(ScanTokens):
    """Tokens of a :class:`~bundle.networks.CodebookNet`: every second voxel an axis, with its descriptors.

    What is replaced is a token's evidence, for the fill ``mean`` by the scan's median. The scan's own level and spread are
    held as they are.
    """

    @staticmethod
    def levels(network: nn.Module) -> tuple[str, ...]:
        return ("descriptors",)

    def prepare(self) -> None:
        net, lung = self.network, self.lung[0, 0]
        voxels = tokens_at(lung)
        self.cell, self.index = 2, torch.div(voxels, 2, rounding_mode="floor")
        self.shape = tuple(-(-n // 2) for n in lung.shape)
        described = describe(self.image[0, 0], lung, voxels)
        level, spread = level_and_spread(described)
        self.described = net.standardised(described, level, spread)
        self.evidence = net.evidence(net.words_of(self.described))
        # What most of this lung has. The mean of descriptors is no tissue, and has been seen to look worse than disease.
        self.other = self.evidence.median().expand(1)
        if self.fill != "mean":
            other = net.standardised(describe(self.filled[0, 0], lung, voxels), level, spread)
            self.other = net.evidence(net.words_of(other))
        self.months = self.clinical @ net.clinical_months if net.clinical_dim > 0 else 0.0

    def features(self, level: str) -> Tensor:
        return self.described

    def kept_batch(self, masks: Tensor) -> Tensor:
        sigma = 0.5 * self.network.smoothing
        evidence = self.other + masks * (self.evidence - self.other)
        risk = torch.stack([root_mean(smoothed(one, self.index, sigma)) for one in evidence])
        months = self.network.months(risk) + self.months
        return self.target(torch.stack([months, torch.ones_like(months)], 1)[:, :, None, None, None])


KINDS = {SurvivalMapNet: TransformerTokens, CodebookNet: CodebookTokens}
