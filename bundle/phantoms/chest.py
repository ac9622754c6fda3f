# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A phantom of a chest, in HU."""

import numpy as np
from scipy import ndimage

from bundle.phantoms.phantom import CENSORED_AT, Phantom, PhantomParams, ball, smooth_noise


class Chest:
    """Body, lungs, vessels, trachea, ribs and spine of a random person, on a cube of 321 mm a side (RAS axes).

    Args:
        rng: fixes every voxel.
        params: of which the size and the noise matter.

    Attributes:
        image: HU, float, (D, H, W).
        lung, vessel, airway: masks, bool, of the same shape; vessels are in the lung, airways are not.
        depth: mm from the pleura, 0 outside the lung.
        mm: edge of a voxel.
    """

    FIELD = 321.0  # mm: 107 voxels of 3 mm, the spacing of the shipped configuration

    def __init__(self, rng: np.random.Generator, params: PhantomParams) -> None:
        size = params.size
        self.rng, self.params, self.mm, shape = rng, params, self.FIELD / size, (size,) * 3
        axis = (np.arange(size) + 0.5) * self.mm - self.FIELD / 2
        x, y, z = axis[:, None, None], axis[None, :, None], axis[None, None, :]  # right, front, top
        width, depth = rng.uniform(140, 150), rng.uniform(100, 110)
        body = (x / width) ** 2 + (y / depth) ** 2 + 0 * z < 1
        muscle = (x / (width - 14)) ** 2 + (y / (depth - 14)) ** 2 + 0 * z < 1
        image = np.full(shape, -1000.0)
        image[body], image[muscle] = -100.0, 40.0

        self.lung = self.draw_lungs(x, y, z)
        self.depth = ndimage.distance_transform_edt(self.lung) * self.mm
        image[self.lung] = -860 + 14 * (y + 0 * x + 0 * z)[self.lung] / 80 * -1
        image[self.lung] += 12 * smooth_noise(rng, shape, 24 / self.mm)[self.lung]

        # Spine and ribs, trachea with the main bronchi.
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
                self.draw_branch(np.array([side * 26.0, -14.0, -20.0]), side, rng.uniform(4.0, 6.0))
        self.vessel &= self.lung
        image[self.vessel] = rng.uniform(10, 40)
        self.image = image

    def draw_lungs(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Half ellipsoids on a dome-shaped diaphragm, flattened towards the mediastinum; the heart is left out."""
        rng, lung = self.rng, np.zeros(np.broadcast_shapes(x.shape, y.shape, z.shape), bool)
        bottom = rng.uniform(-130, -115)
        for side in (-1, 1):
            a, b, c = rng.uniform(52, 58), rng.uniform(76, 84), rng.uniform(215, 235)
            u = (x - side * 64) / a
            w = (y + 2) / b
            h = (z - bottom) / c
            dome = bottom + 38 * np.clip(1 - u**2 - w**2, 0, None)
            lung |= (np.abs(u) ** 2.5 + np.abs(w) ** 2.5 + np.abs(h) ** 2.5 < 1) & (z > dome)
        heart = ((x + 18) / 52) ** 2 + ((y - 34) / 46) ** 2 + ((z + 62) / 56) ** 2 < 1
        return lung & ~heart & (np.abs(x) > 12)

    def draw_branch(self, start: np.ndarray, side: int, radius: float, generation: int = 0) -> None:
        """Add a vessel and the two that leave it, up to the third generation; lengths in mm."""
        rng = self.rng
        direction = rng.normal(size=3) + ([side * 0.9, 0, 0] if generation == 0 else 0)
        direction = direction / np.linalg.norm(direction)
        length = rng.uniform(45, 75) / (1 + 0.5 * generation)
        for t in np.arange(0, length, self.mm / 2):
            self.draw_blob(start + t * direction, radius * (1 - 0.5 * t / length))
        if generation < 2:
            for _ in range(2):
                turn = start + rng.uniform(0.5, 1) * length * direction
                self.draw_branch(turn, side, radius * 0.55, generation + 1)

    def draw_blob(self, point: np.ndarray, radius: float) -> None:
        """Add to the vessels what is within `radius` mm of a point in mm, at least its nearest voxel."""
        centre = (point + self.FIELD / 2) / self.mm - 0.5
        reach = radius / self.mm
        low = np.maximum(np.floor(centre - reach), 0).astype(int)
        high = np.minimum(np.ceil(centre + reach) + 1, self.vessel.shape).astype(int)
        if (low >= high).any():
            return
        x, y, z = ((np.arange(a, b) - c) ** 2 for a, b, c in zip(low, high, centre, strict=True))
        near = x[:, None, None] + y[None, :, None] + z[None, None, :] < max(reach, 0.6) ** 2
        self.vessel[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] |= near

    def subpleural_patch(self, free: np.ndarray) -> np.ndarray:
        """A patch along the pleura, 16-34 mm thick, more often at the bases and the back, within `free` voxels."""
        rng = self.rng
        rim = np.argwhere(free & (self.depth < 2 * self.mm) & (self.depth > 0))
        if not len(rim):
            return np.zeros_like(free)
        # Fibrosis begins there.
        preference = np.exp(-(rim[:, 2] * self.mm) / 70.0 - (rim[:, 1] * self.mm) / 130.0)
        centre = rim[rng.choice(len(rim), p=preference / preference.sum())]
        radius = rng.uniform(30, 52) / self.mm
        patch = ball(free.shape[0], centre, radius) & (self.depth < rng.uniform(16, 34))
        return patch & free & ~self.vessel


def chest(body: Chest, dies: bool) -> Phantom:
    """A chest: fibrosis-like patches near the pleura; ground glass and nodules are harmless."""
    rng, image, lung, shape = body.rng, body.image, body.lung, body.lung.shape
    gt, glass, nodules = np.zeros((3, *shape), bool)
    time = CENSORED_AT
    if dies:
        for _ in range(int(rng.integers(1, 5))):
            gt |= body.subpleural_patch(lung)
        time = float(np.clip(62 - 600 * gt.sum() / lung.sum(), 2, 60))
    for _ in range(int(rng.integers(0, 4))):
        glass |= body.subpleural_patch(lung & ~gt)
    inner = np.argwhere(lung & ~gt & (body.depth > 12))
    for _ in range(int(rng.integers(0, 4))):
        nodules |= ball(len(lung), inner[rng.integers(len(inner))], rng.uniform(5, 9) / body.mm)
    nodules &= lung & ~gt
    glass &= ~nodules
    image[glass] = -600 + 15 * smooth_noise(rng, shape, 12 / body.mm)[glass]
    image[nodules] = 60
    # Honeycomb cysts of about 9 mm: walls where a band-pass noise is near 0, air inside.
    band = smooth_noise(rng, shape, 3.6 / body.mm)
    image[gt] = np.where(np.abs(band) < 0.55, -280.0, -890.0)[gt]
    image = ndimage.gaussian_filter(image, 1.2 / body.mm / 2.355)
    image += rng.normal(0, 20 * body.params.noise / 0.2, shape)
    hu = np.clip(np.round(image), -1024, 3071).astype(np.int16)
    return Phantom(hu, gt, time, int(dies), glass | nodules, lung_mask=lung)
