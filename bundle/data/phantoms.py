# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Phantoms: scans in which it is known where death comes from, to train on, to test with and to measure maps.

Complexities 1 to 8 are cubes drawn in units v, written as HU = -800 + 40 v: background noise has v of standard
deviation 0.2, a bright structure v = 20. Complexity 9 is a chest in HU. All lengths are voxels of a 64^3 cube and grow
with its size. In those who die (event 1) a structure sets the time in months; everybody else is censored at 99 months.
In 10 to 13 what is drawn sets a hazard only: the time of death is drawn from a Weibull distribution, and so is who is
censored before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from bundle.errors import InputError

__all__ = ["COMPLEXITIES", "Phantom", "PhantomCohort", "PhantomParams", "fibrosis_covariates", "make_phantom"]

CENSORED_AT = 99.0


@dataclass(frozen=True)
class PhantomParams:
    """Everything that may be changed about a phantom; lengths in voxels of a 64^3 cube.

    Raises:
        InputError: a value out of range.
    """

    size: int = 64
    noise: float = 0.2
    bright: float = 20.0
    central_radius: tuple[float, float] = (20.0, 29.0)
    sphere_count: tuple[int, int] = (1, 3)
    sphere_radius: tuple[float, float] = (10.0, 20.0)
    corner_radius: tuple[float, float] = (15.0, 33.0)
    confounder_radius: float = 25.0
    bubble_radius: tuple[float, float] = (5.0, 7.0)
    bubble_layers: tuple[int, int] = (2, 4)
    bubble_count: tuple[int, int] = (20, 29)
    small_count: tuple[int, int] = (1, 5)
    small_radius: tuple[float, float] = (8.0, 14.0)
    texture_sigma: float = 1.5
    lesion_count: tuple[int, int] = (0, 4)
    lesion_radius: tuple[float, float] = (6.0, 16.0)
    contrast: float = 2.0

    def __post_init__(self) -> None:
        if self.size < 16:
            raise InputError(f"size is {self.size}; expected at least 16 voxels a side.")
        if self.noise < 0:
            raise InputError(f"noise is {self.noise}; expected 0 or more.")
        for name, value in vars(self).items():
            if isinstance(value, tuple) and not (0 < value[1] >= value[0] >= 0 and (value[0] > 0 or "count" in name)):
                raise InputError(f"{name} is {value}; expected a range of two positive numbers, the smaller first.")
        # Times must stay above 0, and spheres within the cube.
        most = {"central_radius": 33, "corner_radius": 34, "sphere_radius": 31, "small_radius": 31, "lesion_radius": 31}
        for name, radius in most.items():
            if (value := getattr(self, name))[1] > radius:
                raise InputError(f"{name} is {value}; expected at most {radius} voxels of a cube of 64.")
        if self.bubble_layers[1] >= self.size / 2:
            raise InputError(f"bubble_layers is {self.bubble_layers}; expected fewer than half the {self.size} voxels a side.")

    @property
    def scale(self) -> float:
        return self.size / 64


@dataclass
class Phantom:
    """One scan: `image` in HU (int16), masks (bool, same shape), `time` in months and `event` (1 died, 0 censored).

    `gt_mask` is what causes death, empty in a survivor; `confounder_mask` what looks like it and doesn't, None where
    the complexity has none; `gt_filled_mask` (3 only) the bubbles with the air inside; `lung_mask` (9 only);
    `gt_severe_mask` (11 only) the more dangerous part of `gt_mask`. `true_risk` (10 to 13) is the log of the factor by
    which the expected time is shortened: what an oracle would rank patients by.
    """

    image: np.ndarray
    gt_mask: np.ndarray
    confounder_mask: np.ndarray | None
    time: float
    event: int
    gt_filled_mask: np.ndarray | None = None
    lung_mask: np.ndarray | None = None
    gt_severe_mask: np.ndarray | None = None
    true_risk: float | None = None


def ball(size: int, centre: np.ndarray, radius: float) -> np.ndarray:
    """Voxels nearer than `radius` to `centre`, in a cube."""
    x, y, z = ((np.arange(size) - c) ** 2 for c in centre)
    return x[:, None, None] + y[None, :, None] + z[None, None, :] < radius**2


def spheres(
    rng: np.random.Generator,
    p: PhantomParams,
    count: tuple[int, int],
    radius: tuple[float, float],
    gap: float = -np.inf,
) -> tuple[np.ndarray, int]:
    """A random number of spheres wholly inside the cube, and that number.

    With a `gap` (voxels) spheres keep at least that distance; one that finds no place in 200 tries is left out.
    """
    number = int(rng.integers(count[0], count[1] + 1))
    mask = np.zeros((p.size,) * 3, bool)
    placed: list[tuple[np.ndarray, float]] = []
    for _ in range(number):
        for _ in range(200):
            r = rng.uniform(*radius) * p.scale
            centre = rng.uniform(r, p.size - 1 - r, 3)
            if all(np.linalg.norm(centre - other) >= r + s + gap * p.scale for other, s in placed):
                placed.append((centre, r))
                mask |= ball(p.size, centre, r)
                break
    return mask, len(placed)


def honeycomb(rng: np.random.Generator, p: PhantomParams) -> tuple[np.ndarray, np.ndarray]:
    """Touching hollow bubbles along the faces, in layers: walls one voxel thick, and walls with what they enclose."""
    wall, filled = np.zeros((2,) + (p.size,) * 3, bool)
    for layer in range(1, int(rng.integers(p.bubble_layers[0], p.bubble_layers[1] + 1)) + 1):
        for _ in range(int(rng.integers(p.bubble_count[0], p.bubble_count[1] + 1))):
            centre = rng.integers(layer, p.size - layer, 3)
            centre[rng.integers(3)] = rng.choice([layer, p.size - 1 - layer])
            radius = round(rng.uniform(*p.bubble_radius) * p.scale)
            low = np.maximum(centre - radius - 1, 0)
            box = tuple(slice(a, min(c + radius + 2, p.size)) for a, c in zip(low, centre))
            x, y, z = ((np.arange(s.start, s.stop) - c) ** 2 for s, c in zip(box, centre))
            distance = x[:, None, None] + y[None, :, None] + z[None, None, :]
            wall[box] |= (distance >= radius**2) & (distance < (radius + 1) ** 2)
            filled[box] |= distance < (radius + 1) ** 2
    return wall, filled


def months(value: float, low: float, high: float) -> float:
    return float(np.clip(value, low, high))


# Each drawer gives (v, gt, confounder, time, gt_filled) for a scan on background noise v.


def central_sphere(rng, v, dies, p):
    gt, time = np.zeros(v.shape, bool), CENSORED_AT
    if dies:
        radius = rng.integers(int(p.central_radius[0]), int(p.central_radius[1]) + 1)
        gt, time = ball(p.size, np.full(3, p.size / 2), radius * p.scale), 34.0 - radius
    v[gt] = p.bright
    return v, gt, None, time, None


def random_spheres(rng, v, dies, p):
    gt, time = np.zeros(v.shape, bool), CENSORED_AT
    if dies:
        gt, _ = spheres(rng, p, p.sphere_count, p.sphere_radius)
        time = months(40 - 160 * gt.mean(), 2, 40)
    v[gt] = p.bright
    return v, gt, None, time, None


def bubbles(rng, v, dies, p):
    gt, filled, time = np.zeros(v.shape, bool), np.zeros(v.shape, bool), CENSORED_AT
    if dies:
        gt, filled = honeycomb(rng, p)
        time = months(60 - 200 * gt.mean(), 2, 60)
    v[gt] = p.bright
    return v, gt, None, time, filled


def corner_sphere(rng, v, dies, p):
    gt, time = np.zeros(v.shape, bool), CENSORED_AT
    if dies:
        radius = rng.integers(int(p.corner_radius[0]), int(p.corner_radius[1]) + 1)
        gt, time = ball(p.size, np.full(3, p.size), radius * p.scale), 35.0 - radius
    v[gt] = 0  # the average of the background, so only the missing noise shows it
    return v, gt, None, time, None


def spheres_among_bubbles(rng, v, dies, p, corner=False):
    """5, and with `corner` 6: what of a lesion lies inside the corner sphere can't be seen and is no cause."""
    gt, time = np.zeros(v.shape, bool), CENSORED_AT
    confounder, _ = honeycomb(rng, p)
    hidden = ball(p.size, np.full(3, p.size), p.confounder_radius * p.scale) if corner else np.zeros(v.shape, bool)
    if dies:
        lesion, _ = spheres(rng, p, p.sphere_count, p.sphere_radius)
        gt = lesion & ~hidden
        time = months(40 - 160 * gt.mean(), 2, 40)
    confounder = (confounder | hidden) & ~gt
    v[gt | confounder] = p.bright
    return v, gt, confounder, time, None


def spheres_bubbles_and_corner(rng, v, dies, p):
    return spheres_among_bubbles(rng, v, dies, p, corner=True)


def counted_spheres(rng, v, dies, p):
    gt, time = np.zeros(v.shape, bool), CENSORED_AT
    if dies:
        # Apart, because who can't tell two spheres from one can't count them.
        gt, number = spheres(rng, p, p.small_count, p.small_radius, gap=2)
        time = months(45 - 7 * number - 40 * gt.mean(), 2, 45)
    v[gt] = p.bright
    return v, gt, None, time, None


def texture(rng, v, dies, p):
    gt, time = np.zeros(v.shape, bool), CENSORED_AT
    if dies:
        gt, _ = spheres(rng, p, (1, 2), p.sphere_radius)
        time = months(40 - 160 * gt.mean(), 2, 40)
        inside = ndimage.gaussian_filter(rng.normal(size=v.shape), p.texture_sigma * p.scale)[gt]
        # the very mean and standard deviation of the background, whatever the size of the sample
        v[gt] = v[~gt].mean() + v[~gt].std() * (inside - inside.mean()) / inside.std()
    return v, gt, None, time, None


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Gaussian noise smoothed by `sigma` voxels, with mean 0 and standard deviation 1."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), sigma, mode="reflect")
    return (noise - noise.mean()) / noise.std()


# Each drawer of 10 to 13 gives (v, gt, confounder, risk, gt_severe).

RISK = 20.0  # of a scan that is all lesion; a tenth of it shortens the expected time by the factor exp(2)


def drawn_outcome(rng: np.random.Generator, risk: float) -> tuple[float, int]:
    """Time and event: death by a Weibull distribution of shape 1.5 and scale 80 exp(-risk) months; a censoring time
    that is uniform on 5 to 99 months comes before it in about 30 % of the patients."""
    death = 80 * np.exp(-risk) * rng.weibull(1.5)
    censoring = rng.uniform(5, CENSORED_AT)
    return months(min(death, censoring), 1, CENSORED_AT - 1), int(death <= censoring)


def lesions_with_honeycomb(rng, v, p):
    gt, _ = spheres(rng, p, p.lesion_count, p.lesion_radius)
    wall, _ = honeycomb(rng, p)
    confounder = wall & ~gt & (rng.random() < 0.5)
    v[gt | confounder] = p.bright
    return v, gt, confounder, RISK * gt.mean(), None


def two_kinds_of_lesion(rng, v, p):
    """Same mean and standard deviation; the noise of the severe kind, three times as dangerous, is smooth."""
    mild, _ = spheres(rng, p, (0, 2), p.lesion_radius)
    severe, _ = spheres(rng, p, (0, 2), p.lesion_radius)
    severe &= ~mild
    smooth = smooth_noise(rng, v.shape, p.texture_sigma * p.scale)
    for mask, noise in ((mild, rng.normal(size=v.shape)), (severe, smooth)):
        if mask.any():
            v[mask] = p.bright * (0.5 + 0.1 * (noise[mask] - noise[mask].mean()) / noise[mask].std())
    return v, mild | severe, None, RISK / 2 * (mild.mean() + 3 * severe.mean()), severe


def faint_lesions(rng, v, p):
    gt, _ = spheres(rng, p, p.lesion_count, p.lesion_radius)
    v[gt] += p.contrast * p.noise
    return v, gt, None, RISK * gt.mean(), None


def protecting_honeycomb(rng, v, p):
    """Half of the patients have a honeycomb, and live longer for it: its mask is that of the confounder."""
    v, gt, shield, risk, _ = lesions_with_honeycomb(rng, v, p)
    return v, gt, shield, risk + 0.5 - float(shield.any()), None


class Chest:
    """Body, lungs, vessels, trachea, ribs and spine of a random person, in HU on a 321 mm cube (RAS axes)."""

    FIELD = 321.0  # mm: 107 voxels of 3 mm, the spacing of the shipped configuration

    def __init__(self, rng: np.random.Generator, p: PhantomParams) -> None:
        self.rng, self.mm = rng, self.FIELD / p.size
        axis = (np.arange(p.size) + 0.5) * self.mm - self.FIELD / 2
        x, y, z = axis[:, None, None], axis[None, :, None], axis[None, None, :]  # right, front, top
        shape = (p.size,) * 3
        width, depth = rng.uniform(140, 150), rng.uniform(100, 110)
        body = (x / width) ** 2 + (y / depth) ** 2 + 0 * z < 1
        muscle = (x / (width - 14)) ** 2 + (y / (depth - 14)) ** 2 + 0 * z < 1
        image = np.full(shape, -1000.0)
        image[body], image[muscle] = -100.0, 40.0

        # Lungs: half ellipsoids on a dome-shaped diaphragm, flattened towards the mediastinum; the heart is left out.
        self.lung = np.zeros(shape, bool)
        bottom = rng.uniform(-130, -115)
        for side in (-1, 1):
            a, b, c = rng.uniform(52, 58), rng.uniform(76, 84), rng.uniform(215, 235)
            u = (x - side * 64) / a
            w = (y + 2) / b
            h = (z - bottom) / c
            dome = bottom + 38 * np.clip(1 - u**2 - w**2, 0, None)
            self.lung |= (np.abs(u) ** 2.5 + np.abs(w) ** 2.5 + np.abs(h) ** 2.5 < 1) & (z > dome)
        heart = ((x + 18) / 52) ** 2 + ((y - 34) / 46) ** 2 + ((z + 62) / 56) ** 2 < 1
        self.lung &= ~heart & (np.abs(x) > 12)
        self.depth = ndimage.distance_transform_edt(self.lung) * self.mm  # mm from the pleura
        image[self.lung] = -860 + 14 * (y + 0 * x + 0 * z)[self.lung] / 80 * -1
        image[self.lung] += 12 * smooth_noise(rng, shape, 24 / self.mm)[self.lung]

        # Spine, ribs, trachea with the main bronchi.
        image[((x / 16) ** 2 + ((y + 84) / 16) ** 2 + 0 * z < 1) & muscle] = 350
        ring = (x / (width - 17)) ** 2 + (y / (depth - 17)) ** 2
        rib = (np.abs(ring - 1) < 0.06) & (np.mod(z + 0.35 * y + rng.uniform(0, 30), 30) < 9)
        image[rib & ~self.lung] = 450
        self.airway = (x**2 + (y + 18) ** 2 < 81) & (z > 5)
        for side in (-1, 1):
            s = np.clip((5 - z) / 40, 0, 1)
            self.airway |= ((x - side * 38 * s) ** 2 + (y + 18) ** 2 < 49) & (z <= 5) & (z > -35)
        image[self.airway & ~self.lung] = -1000
        self.lung &= ~self.airway

        # Vessels branch from the hilum and thin out towards the pleura.
        self.vessel = np.zeros(shape, bool)
        for side in (-1, 1):
            for _ in range(11):
                self.branch(np.array([side * 26.0, -14.0, -20.0]), side, rng.uniform(4.0, 6.0))
        self.vessel &= self.lung
        image[self.vessel] = rng.uniform(10, 40)
        self.image = image

    def branch(self, start: np.ndarray, side: int, radius: float, depth: int = 0) -> None:
        rng = self.rng
        direction = rng.normal(size=3) + [side * 0.9, 0, 0] if depth == 0 else rng.normal(size=3)
        direction = direction / np.linalg.norm(direction)
        length = rng.uniform(45, 75) / (1 + 0.5 * depth)
        for t in np.arange(0, length, self.mm / 2):
            self.tube(start + t * direction, radius * (1 - 0.5 * t / length))
        if depth < 2:
            for _ in range(2):
                turn = start + rng.uniform(0.5, 1) * length * direction
                self.branch(turn, side, radius * 0.55, depth + 1)

    def tube(self, point: np.ndarray, radius: float) -> None:
        """Mark the voxels within `radius` mm (at least the nearest voxel) of a point in mm."""
        centre = (point + self.FIELD / 2) / self.mm - 0.5
        reach = radius / self.mm
        low = np.maximum(np.floor(centre - reach), 0).astype(int)
        high = np.minimum(np.ceil(centre + reach) + 1, self.vessel.shape).astype(int)
        if (low >= high).any():
            return
        x, y, z = ((np.arange(a, b) - c) ** 2 for a, b, c in zip(low, high, centre))
        near = x[:, None, None] + y[None, :, None] + z[None, None, :] < max(reach, 0.6) ** 2
        self.vessel[tuple(slice(a, b) for a, b in zip(low, high))] |= near

    def subpleural_patch(self, free: np.ndarray) -> np.ndarray:
        """A patch along the pleura, 15-35 mm thick, more often at the bases, within `free` voxels."""
        rng = self.rng
        rim = np.argwhere(free & (self.depth < 2 * self.mm) & (self.depth > 0))
        if not len(rim):
            return np.zeros_like(free)
        # bases and back are where fibrosis starts
        preference = np.exp(-(rim[:, 2] * self.mm) / 70.0 - (rim[:, 1] * self.mm) / 130.0)
        centre = rim[rng.choice(len(rim), p=preference / preference.sum())]
        radius = rng.uniform(30, 52) / self.mm
        patch = ball(free.shape[0], centre, radius) & (self.depth < rng.uniform(16, 34))
        return patch & free & ~self.vessel


def chest(rng, dies, p):
    """9: fibrosis-like reticulation near the pleura sets the time by its volume; ground glass and nodules don't."""
    body = Chest(rng, p)
    image, lung, shape = body.image, body.lung, body.lung.shape
    gt = np.zeros(shape, bool)
    time = CENSORED_AT
    if dies:
        for _ in range(int(rng.integers(1, 5))):
            gt |= body.subpleural_patch(lung)
        time = months(62 - 600 * gt.sum() / lung.sum(), 2, 60)
    glass = np.zeros(shape, bool)
    for _ in range(int(rng.integers(0, 4))):
        glass |= body.subpleural_patch(lung & ~gt)
    nodules = np.zeros(shape, bool)
    inner = np.argwhere(lung & ~gt & (body.depth > 12))
    for _ in range(int(rng.integers(0, 4))):
        nodules |= ball(p.size, inner[rng.integers(len(inner))], rng.uniform(5, 9) / body.mm)
    nodules &= lung & ~gt
    glass &= ~nodules
    image[glass] = -600 + 15 * smooth_noise(rng, shape, 12 / body.mm)[glass]
    image[nodules] = 60
    # Honeycomb cysts of about 9 mm: walls where a band-pass noise is near 0, air inside.
    band = smooth_noise(rng, shape, 3.6 / body.mm)
    image[gt] = np.where(np.abs(band) < 0.55, -280.0, -890.0)[gt]
    image = ndimage.gaussian_filter(image, 1.2 / body.mm / 2.355)
    image += rng.normal(0, 20 * p.noise / 0.2, shape)
    hu = np.clip(np.round(image), -1024, 3071).astype(np.int16)
    return Phantom(hu, gt, glass | nodules, time, int(dies), lung_mask=lung)


CUBES = {
    1: central_sphere,
    2: random_spheres,
    3: bubbles,
    4: corner_sphere,
    5: spheres_among_bubbles,
    6: spheres_bubbles_and_corner,
    7: counted_spheres,
    8: texture,
}
HAZARDS = {10: lesions_with_honeycomb, 11: two_kinds_of_lesion, 12: faint_lesions, 13: protecting_honeycomb}
COMPLEXITIES = (*CUBES, 9, *HAZARDS)


def check_complexity(complexity: int) -> None:
    if complexity not in COMPLEXITIES:
        raise InputError(f"complexity is {complexity}; expected one of {', '.join(map(str, COMPLEXITIES))}.")


def make_phantom(complexity: int, rng: np.random.Generator, dies: bool, params: PhantomParams) -> Phantom:
    """Draw one phantom. Whether it `dies` is up to the caller in 1 to 9, and drawn in 10 to 13.

    Raises:
        InputError: no such complexity.
    """
    check_complexity(complexity)
    if complexity == 9:
        return chest(rng, dies, params)
    geometry, noise, fate = rng.spawn(3)  # the same structures at any size
    v = noise.normal(0, params.noise, (params.size,) * 3)
    filled = severe = risk = None
    if complexity in HAZARDS:
        v, gt, confounder, risk, severe = HAZARDS[complexity](geometry, v, params)
        time, event = drawn_outcome(fate, risk)
    else:
        v, gt, confounder, time, filled = CUBES[complexity](geometry, v, dies, params)
        event = int(dies)
    hu = np.round(-800 + 40 * v).astype(np.int16)
    return Phantom(hu, gt, confounder, time, event, gt_filled_mask=filled, gt_severe_mask=severe, true_risk=risk)


@dataclass(frozen=True)
class PhantomCohort(Sequence):
    """(patient_id, phantom) of a cohort in which `feature_fraction` of the patients die of what can be seen; each is drawn
    when it is asked for.

    Scan i is the same whatever `num` is: those who die are spread evenly over the scans. In 10 to 13 who dies is drawn,
    and `feature_fraction` has no say.

    Raises:
        InputError: no such complexity, `num` below 1 or `feature_fraction` outside [0, 1].
    """

    complexity: int
    num: int
    seed: int
    feature_fraction: float = 0.5
    params: PhantomParams = PhantomParams()

    def __post_init__(self) -> None:
        check_complexity(self.complexity)
        if self.num < 1:
            raise InputError(f"num is {self.num}; expected at least 1 scan.")
        if not 0 <= self.feature_fraction <= 1:
            raise InputError(f"feature_fraction is {self.feature_fraction}; expected 0 to 1.")

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> tuple[str, Phantom]:
        if not 0 <= index < self.num:
            raise IndexError(f"no scan {index} in a cohort of {self.num}.")
        dies = int((index + 1) * self.feature_fraction + 1e-9) > int(index * self.feature_fraction + 1e-9)
        rng = np.random.default_rng([self.seed, self.complexity, index])
        patient_id = f"phantom{self.complexity}_seed{self.seed}_{index:04d}"
        return patient_id, make_phantom(self.complexity, rng, dies, self.params)


def fibrosis_covariates(phantom: Phantom, seed: int, complexity: int, index: int) -> dict[str, str]:
    """Clinical columns as fibrosis studies have them, which know something of the outcome; "" where missing.

    A severity between 0 and 1, by the time of death or, in 10 to 13, by the true risk, lowers lung function and raises
    age and the shares of men, of smokers and of those treated. A tenth to a third of the values of DLCO are missing, more
    in the sick, and some of FVC and smoking. The numbers are drawn apart from the scan, which stays as it is.

    Args:
        phantom: whose outcome it is.
        seed, complexity, index: of the scan, as :class:`PhantomCohort` draws it.
    """
    rng = np.random.default_rng([seed, complexity, index, 1])
    if phantom.true_risk is None:
        severity = phantom.event * (1 - phantom.time / CENSORED_AT)
    else:
        severity = 1 - np.exp(-max(phantom.true_risk, 0.0))
    fvc = rng.normal(90 - 20 * severity, 14)
    dlco = rng.normal(0.7 * fvc - 10 * severity, 10)
    values = {
        "age": f"{rng.normal(64 + 6 * severity, 8):.0f}",
        "sex": "male" if rng.random() < 0.5 + 0.3 * severity else "female",
        "fvc_percent": f"{max(fvc, 20.0):.0f}",
        "dlco_percent": f"{max(dlco, 10.0):.0f}",
        "smoking": str(rng.choice(["never", "former", "current"], p=[0.5 - 0.2 * severity, 0.4 + 0.2 * severity, 0.1])),
        "antifibrotic": "yes" if rng.random() < 0.2 + 0.4 * severity else "no",
    }
    missing = {"fvc_percent": 0.05, "dlco_percent": 0.1 + 0.2 * severity, "smoking": 0.1}
    return {name: "" if rng.random() < missing.get(name, 0) else value for name, value in values.items()}
