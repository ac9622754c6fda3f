# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A network of few numbers: codebooks of local texture, one hazard a word, and their sum over the lung."""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bundle.errors import InputError
from bundle.networks.descriptors import DESCRIPTORS, at, blur, describe, level_and_spread, tokens_at
from bundle.networks.patches import to_grid


class CodebookNet(nn.Module):
    """CT -> survival map with a location and a weight for every voxel of the lung.

    1. :func:`~bundle.networks.descriptors.describe` says what the tissue around a voxel is like, less what is usual in
       this scan.
    2. Each codebook has words, found by k-means on a few of the descriptors, which no outcome has shaped. A voxel has
       one word of every book.
    3. Each word has a hazard, 0 for tissue that doesn't shorten life. A voxel's evidence is the mean of its words' hazards,
       smoothed over 5 mm. It is told at every second voxel an axis, and interpolated between.
    4. The root of the mean square of the evidence is the patient's risk, on the scale of the evidence, and tells the months.
    5. A student draws the map: the logistic regression, on all words of a voxel at once, that tells the hottest voxels of
       the cohort from the others. It sees what the mean over books can't: which words go together.
    6. The weight is a base that all voxels have plus the square of what the student says (of the evidence where there is
       no student), as a share of the whole lung's: a lung without evidence is evenly lit.

    :class:`bundle.run.CodebookStage` fits books, hazards and months from a cohort at once. That is a convex problem, and
    needs far fewer patients than the steps of a transformer.

    Args:
        books: number of codebooks.
        words: of each book.
        few: descriptors that a book looks at.
        clinical_dim: length of the clinical vector, 0 for none; a linear function of it moves all locations alike.
        loc_range: months between which locations lie, as of :class:`~bundle.networks.SurvivalMapNet`.

    Raises:
        InputError: an argument is out of range.

    Example::

        >>> CodebookNet(books=2, words=5)(torch.rand(1, 1, 12, 12, 12)).shape
        torch.Size([1, 2, 12, 12, 12])
    """

    def __init__(
        self,
        books: int = 36,
        words: int = 250,
        few: int = 6,
        clinical_dim: int = 0,
        loc_range: Sequence[float] = (-5.0, 120.0),
    ) -> None:
        super().__init__()
        numbers = {"books": books, "words": words, "few": few}
        if min(numbers.values()) < 1 or few > len(DESCRIPTORS) or clinical_dim < 0:
            raise InputError(f"books, words and few (of {len(DESCRIPTORS)} descriptors) must be positive: {numbers}.")
        self.low, self.high = float(loc_range[0]), float(loc_range[1])
        self.arguments = {**numbers, "clinical_dim": clinical_dim, "loc_range": [self.low, self.high]}
        self.clinical_dim = clinical_dim
        self.stride = 1  # voxels from one cell of the map to the next
        self.smoothing = 1.8  # standard deviation of the Gaussian, in voxels
        self.register_buffer("mean", torch.zeros(len(DESCRIPTORS)))
        self.register_buffer("spread", torch.ones(len(DESCRIPTORS)))
        self.register_buffer("chosen", torch.zeros(books, few, dtype=torch.long))
        self.register_buffer("centres", torch.zeros(books, words, few))
        self.hazard = nn.Parameter(torch.zeros(books, words))
        self.register_buffer("student", torch.zeros(books, words))  # log odds
        self.register_buffer("student_bias", torch.zeros(()))
        self.register_buffer("student_scale", torch.zeros(()))  # evidence of a voxel that it is sure of; 0: no student
        self.register_buffer("base", torch.tensor(1e-6))
        self.offset = nn.Parameter(torch.tensor(self.high / 2))  # months without any evidence
        self.slope = nn.Parameter(torch.tensor(self.high / 2))  # months that go with evidence of 1
        self.power = nn.Parameter(torch.ones(()))
        self.clinical_months = nn.Parameter(torch.zeros(clinical_dim))

    def standardised(self, described: Tensor, level: Tensor, spread: Tensor) -> Tensor:
        """Descriptors (M, 29) less the scan's own level and spread, then as the cohort's are spread, within 6."""
        return (((described - level) / spread - self.mean) / self.spread).clamp(-6.0, 6.0)

    def words_of(self, x: Tensor) -> Tensor:
        """The word of every book that each token is nearest to, (M, books) of int16, from (M, 29)."""
        found: list[Tensor] = []
        for part in x.split(4096):  # as many as a processor's cache holds, with their distances
            words = [nearest(part[:, self.chosen[book]], self.centres[book]) for book in range(self.chosen.shape[0])]
            found.append(torch.stack(words, 1).to(torch.int16))
        return torch.cat(found)

    def evidence(self, words: Tensor) -> Tensor:
        """The mean hazard of the words (M, books) of each token, (M,)."""
        nothing = torch.zeros((), dtype=self.hazard.dtype, device=words.device)
        return summed(nothing, self.hazard, words) / words.shape[1]

    def drawn(self, words: Tensor, evidence: Tensor) -> Tensor:
        """What the map shows of each token, (M,), on the scale of the evidence: what the student says, if there is one."""
        if not bool(self.student_scale > 0):
            return evidence
        return self.student_scale * summed(self.student_bias, self.student, words).sigmoid()

    def months(self, evidence: Tensor) -> Tensor:
        """Location in months of lung with some evidence, 0 to 1, throughout."""
        months = self.offset - self.slope * evidence.clamp_min(1e-6) ** self.power
        return months.clamp(self.low, self.high)

    def forward(self, image: Tensor, lung: Tensor | None = None, clinical: Tensor | None = None) -> Tensor:
        """The survival map of each scan, (B, 2, D, H, W); arguments and errors as of :class:`SurvivalMapNet`."""
        image, lung = to_grid(image, lung, 1)
        if self.clinical_dim > 0 and (clinical is None or clinical.shape[1] != self.clinical_dim):
            raise ValueError(f"clinical must be a vector of length {self.clinical_dim} a scan.")
        maps: list[Tensor] = []
        for b in range(image.shape[0]):
            mask = torch.ones_like(image[b, 0]) if lung is None else lung[b, 0]
            maps.append(self.map_of(image[b, 0], mask))
        found = torch.stack(maps)
        if clinical is not None and self.clinical_dim > 0:
            months = (clinical.to(image.dtype) @ self.clinical_months).view(-1, 1, 1, 1, 1)
            found = torch.cat([found[:, :1] + months * (found[:, -1:] > 0), found[:, 1:]], 1)
        return found

    def map_of(self, image: Tensor, lung: Tensor) -> Tensor:
        """The map of one scan, (2, D, H, W), from image and lung (D, H, W)."""
        tokens = tokens_at(lung)
        if len(tokens) == 0:
            raise ValueError("a scan of the batch has no lung voxel.")
        described = describe(image, lung, tokens)
        level, spread = level_and_spread(described)
        words = self.words_of(self.standardised(described, level, spread))
        evidence = self.evidence(words)
        cells = torch.div(tokens, 2, rounding_mode="floor")
        patient = self.months(root_mean(smoothed(evidence, cells, 0.5 * self.smoothing)))
        drawn = between_tokens(self.drawn(words, evidence), cells, 0.5 * self.smoothing, lung)
        return self.read(drawn.clamp_min(0), patient, lung)

    def read(self, drawn: Tensor, patient: Tensor, lung: Tensor) -> Tensor:
        """The map (2, D, H, W) of what is drawn at each voxel (D, H, W) and the patient's months."""
        weight = (self.base + drawn.square()) * lung
        weight = weight / weight.sum()
        location = self.months(drawn)
        location = (location + patient - (location * weight).sum()) * lung
        return torch.stack([location, weight])


def summed(start: Tensor, table: Tensor, words: Tensor) -> Tensor:
    """`start`, a number, and what a table (books, size) has for each word (M, books) of a token, added up, (M,)."""
    total = start.expand(words.shape[0])
    for book in range(words.shape[1]):
        total = total + table[book][words[:, book].long()]
    return total


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """Index of the centre (K, n) that is nearest to each row of x (M, n), (M,)."""
    return (x @ centres.T - 0.5 * centres.square().sum(1)).argmax(1)


def blurred(values: Tensor, cells: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Values (M,) laid on their cells (M, 3) of a grid and blurred, and the blur of ones there, (d, h, w) each."""
    size: list[int] = (cells.amax(0) + 1).tolist()
    volume = torch.zeros(size, dtype=values.dtype, device=values.device)
    inside = torch.zeros_like(volume)
    volume[cells[:, 0], cells[:, 1], cells[:, 2]] = values
    inside[cells[:, 0], cells[:, 1], cells[:, 2]] = 1.0
    return blur(volume, sigma), blur(inside, sigma)


def smoothed(values: Tensor, cells: Tensor, sigma: float) -> Tensor:
    """Values (M,) in cells (M, 3), blurred over these alone."""
    total, count = blurred(values, cells, sigma)
    return at(total / count.clamp_min(1e-6), cells)


def between_tokens(values: Tensor, cells: Tensor, sigma: float, lung: Tensor) -> Tensor:
    """:func:`smoothed` values at every voxel of `lung` (D, H, W), by trilinear interpolation; cell k is at voxel 2 k."""
    total, count = blurred(values, cells, sigma)
    size = [2 * n - 1 for n in total.shape]
    fine = F.interpolate(torch.stack([total, count]).unsqueeze(0), size, mode="trilinear", align_corners=True)[0]
    pad = [0, lung.shape[2] - size[2], 0, lung.shape[1] - size[1], 0, lung.shape[0] - size[0]]  # below 0, it crops
    fine = F.pad(fine.unsqueeze(0), [min(n, 1) for n in pad], mode="replicate")[0]
    fine = F.pad(fine, [n - min(n, 1) for n in pad])
    return fine[0] / fine[1].clamp_min(1e-6)


def root_mean(evidence: Tensor, inside: Tensor | None = None) -> Tensor:
    """The root of the mean square of the evidence above 0, of all or `inside`: steep, so that a small lesion can move it."""
    square = evidence.clamp_min(0).square()
    mean = square.mean() if inside is None else (square * inside).sum() / inside.sum()
    return mean.clamp_min(1e-24).sqrt()
