# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Implants: known disease put into real chest CTs, to train on, to test with and to measure maps.

What the phantoms are in a made-up chest, these are in a real one: vessels, hila, fissures, breathing, scanners are all
there, and still it is known where death comes from. An anatomy is deformed, disease and its harmless look-alikes are drawn
into the lung, then the scanner's offset and noise are added. The diseased share of the lung shortens life::

    log T = log(base) - effect * share + noise * N(0, 1)

All volumes are in RAS order; lengths are mm, densities HU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
from scipy import ndimage

from bundle.errors import InputError

__all__ = ["DISEASES", "Anatomy", "Implant", "ImplantParams", "make_implant", "outcomes"]

EARLIEST = 1.0  # months
TRIES = 20  # deformations drawn until the lungs stay within the scan


@dataclass(frozen=True)
class Anatomy:
    """A real chest CT: `image` in HU, `lung` (bool), both (D, H, W) in RAS order, voxels of `spacing` mm a side."""

    image: np.ndarray
    lung: np.ndarray
    spacing: float


@dataclass
class Implant:
    """One scan: `image` (int16 HU); bool `lung`, `gt` (what kills), `confounder` (what looks like it); diseased `share`."""

    image: np.ndarray
    lung: np.ndarray
    gt: np.ndarray
    confounder: np.ndarray
    share: float


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ImplantParams:
    """Everything that may be changed about a cohort of implants; None stands for what :data:`DISEASES` says of the disease.

    Raises:
        InputError: a value out of range.
    """

    disease: str = option("fibrosis", "what kills")
    diseased: float = option(0.7, "share of the scans that have it")
    count: tuple[int, int] | None = option(None, "lesions in a diseased scan, least and most")
    radius: tuple[float, float] | None = option(None, "of a lesion, mm")
    contrast: tuple[float, float] | None = option(None, "of a lesion, HU")
    lookalikes: tuple[str, ...] | None = option(None, "harmless findings in everyone, or the word none")
    lookalike_count: tuple[int, int] = option((0, 3), "of each kind in every scan")
    gravity: tuple[float, float] = option(
        (0.0, 90.0), "HU by which the lung's back is denser than its front; harmless, 0 0 for none"
    )
    rotation: float = option(4.0, "degrees by which the anatomy is turned about each axis, standard deviation")
    scaling: float = option(0.05, "factor by which it is stretched along each axis and sheared, standard deviation")
    elastic: float = option(4.0, "mm by which a point is moved by the elastic deformation, standard deviation of each axis")
    elastic_length: float = option(30.0, "mm over which the elastic deformation changes")
    offset: float = option(12.0, "HU by which a scanner may be off, at most")
    noise_hu: tuple[float, float] = option((15.0, 60.0), "standard deviation of the scanner's noise")
    base: float = option(55.0, "months that a healthy patient lives (median)")
    effect: float | None = option(None, "log T falls by this times the diseased share of the lung")
    noise: float = option(0.35, "standard deviation of log T beside that")
    censoring_window: tuple[float, float] = option((12.0, 84.0), "months, between which the end of follow-up is drawn")
    censoring: float | None = option(None, "share of the scans to censor: the window is stretched until it is so")
    last: float = option(99.0, "months; who lives longer is censored then")

    def __post_init__(self) -> None:
        if self.disease not in DISEASES:
            raise InputError(f"disease is {self.disease}; expected one of {', '.join(DISEASES)}.")
        for name, value in vars(self).items():
            if isinstance(value, tuple) and name != "lookalikes" and not 0 <= value[0] <= value[1]:
                raise InputError(f"{name} is {value[0]} {value[1]}; expected two numbers from 0 up, the smaller first.")
            if isinstance(value, float) and not 0 <= value < np.inf:
                raise InputError(f"{name} is {value}; expected 0 or more.")
        for name in ("diseased", "censoring"):
            if (getattr(self, name) or 0) > 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected a share from 0 to 1.")
        for name in ("base", "last", "elastic_length"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}; expected more than 0.")
        if self.scaling > 0.3:
            raise InputError(f"scaling is {self.scaling}; expected at most 0.3: more is no chest.")
        if self.censoring_window[0] <= 0:
            raise InputError("censoring_window must begin after month 0.")
        for kind in self.lookalikes or ():
            if kind not in DISEASES or kind == self.disease:
                others = ", ".join(k for k in DISEASES if k != self.disease)
                raise InputError(f"lookalikes has {kind}; expected some of {others}, none of which is the disease.")

    @property
    def kind(self) -> Kind:
        """The disease as it is drawn."""
        given = {name: getattr(self, name) for name in ("count", "radius", "contrast", "effect")}
        return replace(DISEASES[self.disease], **{name: value for name, value in given.items() if value is not None})

    @property
    def others(self) -> tuple[str, ...]:
        """The look-alikes; nodules, emphysema and fibrosis, without the disease itself, where none are named."""
        if self.lookalikes is not None:
            return self.lookalikes
        return tuple(k for k in ("nodules", "emphysema", "fibrosis") if k != self.disease)


class Lung:
    """What drawing lesions asks of a lung: mm from the pleura, places, and smooth noise of its own shape."""

    def __init__(self, lung: np.ndarray, spacing: float, rng: np.random.Generator) -> None:
        self.mask, self.mm, self.rng = lung, spacing, rng
        self.depth = ndimage.distance_transform_edt(lung) * spacing
        self.voxels = np.argwhere(lung)
        self.grid = [np.arange(n, dtype=np.float32) * spacing for n in lung.shape]

    def noise(self, mm: float) -> np.ndarray:
        """Smooth noise over `mm`, mean 0 and standard deviation 1."""
        values = ndimage.gaussian_filter(self.rng.standard_normal(self.mask.shape, np.float32), mm / self.mm, truncate=3.0)
        return (values - values.mean()) / values.std()

    def place(self, shallow: float, deep: float, low: float = 0.0, back: float = 0.0) -> np.ndarray:
        """A voxel between two depths (mm), more often towards the base and the back the larger `low` and `back`."""
        depth = self.depth[tuple(self.voxels.T)]
        possible = self.voxels[(depth >= shallow) & (depth <= deep)]
        possible = possible if len(possible) else self.voxels
        where = (possible - self.voxels.min(0)) / np.maximum(
            np.ptp(self.voxels, 0), 1
        )  # 0 to 1: left to right, back to front, base to top
        preference = np.exp(-low * where[:, 2] - back * where[:, 1])
        return possible[self.rng.choice(len(possible), p=preference / preference.sum())]

    def ball(self, centre: np.ndarray, radius: float, rough: np.ndarray, soft: float) -> np.ndarray:
        """A ball with an uneven surface: 1 inside, 0 outside, over `soft` mm in between."""
        d = [(g - c * self.mm) ** 2 for g, c in zip(self.grid, centre)]
        distance = np.sqrt(d[0][:, None, None] + d[1][None, :, None] + d[2][None, None, :])
        return np.clip((radius * (1 + 0.2 * np.clip(rough, -2, 2)) - distance) / soft + 0.5, 0, 1)


# A drawer adds one lesion to `image` where `free`, and returns how much of each voxel it is, from 0 to 1.


def tissue(image: np.ndarray) -> np.ndarray:
    """How much of a voxel is aerated lung rather than vessel or wall: 1 below -650 HU, 0 above -250."""
    return np.clip((-250 - image) / 400, 0, 1)


def fibrosis(image: np.ndarray, lung: Lung, free: np.ndarray, radius: float, contrast: float) -> np.ndarray:
    """Reticulation and ground glass under the pleura, no deeper than 28 mm: a net of lines with darker meshes."""
    part = lung.ball(lung.place(0, 2 * lung.mm, low=2.0, back=1.0), radius, lung.noise(8), 6.0) * (lung.depth < 28) * free
    lines = np.exp(-((lung.noise(4.5) / 0.45) ** 2))
    pattern = contrast * (0.45 + 1.2 * lines) * (1 + 0.25 * lung.noise(10))
    image += part * tissue(image) * pattern
    return part


def ground_glass(image: np.ndarray, lung: Lung, free: np.ndarray, radius: float, contrast: float) -> np.ndarray:
    """A haze through which vessels stay visible, with a soft edge."""
    part = lung.ball(lung.place(4, np.inf, low=0.5, back=0.5), radius, lung.noise(10), 12.0) * free
    image += part * tissue(image) * contrast * (1 + 0.15 * lung.noise(6))
    return part


def nodules(image: np.ndarray, lung: Lung, free: np.ndarray, radius: float, contrast: float) -> np.ndarray:
    """A solid ball, `contrast` HU above water."""
    part = lung.ball(lung.place(radius, np.inf), radius, lung.noise(5), 4.0) * free
    image += part * np.maximum(contrast - image, 0)
    return part


def emphysema(image: np.ndarray, lung: Lung, free: np.ndarray, radius: float, contrast: float) -> np.ndarray:
    """Holes of a few mm that run together, more often at the top; small vessels are thinned out."""
    part = lung.ball(lung.place(0, np.inf, low=-1.5), radius, lung.noise(10), 8.0) * free
    holes = np.clip(0.75 + 0.5 * lung.noise(4), 0.2, 1)
    image += part * holes * tissue(image) * np.clip(-985 - image, -contrast, 0)
    return part


def texture(image: np.ndarray, lung: Lung, free: np.ndarray, radius: float, contrast: float) -> np.ndarray:
    """Mottling: the mean density stays, light and dark spots of some 8 mm come in."""
    part = lung.ball(lung.place(4, np.inf), radius, lung.noise(10), 8.0) * free
    change = part * tissue(image) * contrast * np.clip(lung.noise(3.5), -2, 2)
    image += change - part * change.sum() / max(part.sum(), 1e-6)
    return part


@dataclass(frozen=True)
class Kind:
    """How a disease is drawn: how many lesions, their radius (mm) and contrast (HU), and how deadly it is (`effect`).

    Effects are such that the disease moves log T of a cohort by about as much as the default noise does.
    """

    draw: Callable[[np.ndarray, Lung, np.ndarray, float, float], np.ndarray]
    count: tuple[int, int]
    radius: tuple[float, float]
    contrast: tuple[float, float]
    effect: float


DISEASES = {
    "fibrosis": Kind(fibrosis, (1, 5), (12, 40), (150, 350), 14.0),
    "ground_glass": Kind(ground_glass, (1, 4), (12, 35), (120, 300), 14.0),
    "nodules": Kind(nodules, (1, 8), (5, 10), (-50, 60), 250.0),
    "emphysema": Kind(emphysema, (1, 5), (12, 35), (90, 200), 14.0),
    "texture": Kind(texture, (1, 4), (12, 35), (90, 160), 14.0),
}


def deform(anatomy: Anatomy, rng: np.random.Generator, p: ImplantParams) -> tuple[np.ndarray, np.ndarray]:
    """Image (float32) and lung of an anatomy turned, stretched, sheared and bent at random, on the same grid."""
    shape = anatomy.image.shape
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians(rng.normal(0, p.rotation, 3))):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        about = np.eye(3)
        about[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turn = turn @ about
    matrix = turn @ (np.eye(3) + p.scaling * np.clip(rng.standard_normal((3, 3)), -2, 2) * (0.5 + 0.5 * np.eye(3)))
    centre = (np.array(shape, float) - 1) / 2
    places = np.indices(shape, np.float32)
    moved = np.einsum("ij,j...->i...", matrix.astype(np.float32), places - centre[:, None, None, None].astype(np.float32))
    coarse = [max(4, round(n * anatomy.spacing / 10)) for n in shape]  # smooth noise needs no fine grid
    for axis in range(3):
        bend = ndimage.gaussian_filter(rng.standard_normal(coarse), p.elastic_length / 10, mode="nearest")
        bend = ndimage.zoom(bend / bend.std(), np.array(shape) / coarse, order=1, grid_mode=True, mode="nearest")
        moved[axis] += centre[axis] + p.elastic / anatomy.spacing * bend
    image = ndimage.map_coordinates(anatomy.image.astype(np.float32), moved, order=1, mode="nearest")
    lung = ndimage.map_coordinates(anatomy.lung.astype(np.float32), moved, order=1, mode="constant")
    return image, lung > 0.5


def cut_off(lung: np.ndarray) -> float:
    """How much of the lung's widest slice lies in an end slice, the largest along any axis: 0 where lungs are whole."""
    areas = [lung.sum(tuple(i for i in range(3) if i != axis)) for axis in range(3)]
    return max(max(area[0], area[-1]) / max(area.max(), 1) for area in areas)


def draw_lesions(image: np.ndarray, lung: Lung, kind: Kind, count: tuple[int, int], free: np.ndarray) -> np.ndarray:
    """Draw a random number of lesions into `image`; how much of each voxel they are."""
    parts = np.zeros(image.shape, np.float32)
    for _ in range(lung.rng.integers(count[0], count[1] + 1)):
        radius, contrast = lung.rng.uniform(*kind.radius), lung.rng.uniform(*kind.contrast)
        # Lesions of one kind that meet flow together: nothing is drawn twice.
        parts = np.maximum(parts, kind.draw(image, lung, free * (1 - parts), radius, contrast))
    return parts


def make_implant(
    anatomy: Anatomy, rng: np.random.Generator, diseased: bool, params: ImplantParams = ImplantParams()
) -> Implant:
    """One scan of an anatomy, diseased or not; the same generator state gives the same voxels.

    Raises:
        InputError: nothing of the lung is left.
    """
    shape_rng, disease_rng, other_rng, scanner = rng.spawn(4)
    whole = max(0.25, cut_off(anatomy.lung))
    for _ in range(TRIES):
        image, mask = deform(anatomy, shape_rng, params)
        if cut_off(mask) <= whole:
            break
    if not mask.any():
        raise InputError("the lung mask is empty.")
    lung = Lung(mask, anatomy.spacing, disease_rng)
    gt = np.zeros(image.shape, np.float32)
    if diseased:
        gt = draw_lesions(image, lung, params.kind, params.kind.count, mask.astype(np.float32))
    causal = gt > 0.5
    lung.rng = other_rng
    free = mask * (1 - np.clip(2 * ndimage.maximum_filter(gt, 3), 0, 1))  # look-alikes keep off what kills
    confounder = np.zeros(mask.shape, bool)
    for name in params.others:
        part = draw_lesions(image, lung, DISEASES[name], params.lookalike_count, free)
        confounder |= part > 0.5
        free = free * (1 - np.clip(2 * part, 0, 1))
    back = np.flatnonzero(mask.any((0, 2)))
    place = (back[-1] - np.arange(image.shape[1])) / max(np.ptp(back), 1) - 0.5  # -0.5 in front, 0.5 at the back
    image += other_rng.uniform(*params.gravity) * place[None, :, None] * (mask * tissue(image))
    image += scanner.uniform(-params.offset, params.offset)
    grain = ndimage.gaussian_filter(
        scanner.standard_normal(image.shape, np.float32), scanner.uniform(0, 0.5)
    )  # the kernel's sharpness
    image += scanner.uniform(*params.noise_hu) * grain / grain.std()
    hu = np.clip(np.round(image), -1024, 3071).astype(np.int16)
    return Implant(hu, mask, causal, confounder, float(causal.sum() / mask.sum()))


def outcomes(share: Sequence[float], seed: int, params: ImplantParams) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Observed months, event (1 died, 0 censored) and true months of scans whose diseased shares are given.

    ``log T = log(base) - effect * share + noise * N(0, 1)``; follow-up ends at a time uniform on `censoring_window`, which
    is stretched, where a share to censor is given, until that very share of the cohort is censored.
    """
    share = np.asarray(share, float)
    rng = np.random.default_rng([seed, len(share), 1])
    true = params.base * np.exp(-params.kind.effect * share + params.noise * rng.standard_normal(len(share)))
    true = np.maximum(true, EARLIEST)
    end = rng.uniform(*params.censoring_window, len(share))
    if params.censoring is not None:
        # Who has the largest T / end is censored first; between the last to be censored and the next lies the factor.
        ratio = np.sort(true / end)[::-1]
        k = round(params.censoring * len(share))
        end = end * (ratio[0] * 2 if k == 0 else ratio[-1] / 2 if k == len(share) else np.sqrt(ratio[k - 1] * ratio[k]))
    end = np.maximum(end, EARLIEST)
    event = (true <= np.minimum(end, params.last)).astype(int)
    return np.minimum(true, np.minimum(end, params.last)), event, true


def options() -> list[tuple[str, object, str]]:
    """Name, default and help of every parameter, for a command line."""
    return [(f.name, f.default, f.metadata["help"]) for f in fields(ImplantParams)]
