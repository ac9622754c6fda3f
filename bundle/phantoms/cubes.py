# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Phantoms that are cubes of noise with structures in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from bundle.errors import InputError

__all__ = ["Phantom", "PhantomParams"]


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
