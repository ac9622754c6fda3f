# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Phantoms that are cubes of noise with structures in them.

The first line of a docstring is shown by `python -m scripts.make_phantoms --help`.
"""

import numpy as np
from scipy import ndimage

from bundle.phantoms.phantom import CENSORED_AT, Phantom, PhantomParams, ball, smooth_noise

RISK = 20.0  # of a scan that is all lesion; a tenth of it shortens the expected time by the factor exp(2)


class Cube:
    """A cube of noise, and what can be drawn in it: the same at any size.

    Args:
        rng: fixes every voxel.
        params: lengths are in voxels of a 64^3 cube.

    Attributes:
        v: brightness of each voxel; 0 is the background, and HU are -800 + 40 v.
    """

    FIELD = None  # mm: voxels may have any spacing

    def __init__(self, rng: np.random.Generator, params: PhantomParams) -> None:
        self.rng, noise, self.fate = rng.spawn(3)
        self.params, self.scale = params, params.size / 64
        self.v = noise.normal(0, params.noise, (params.size,) * 3)

    def ball(self, centre: float, radius: float) -> np.ndarray:
        """A ball on the cube's diagonal: `centre` 0.5 is the middle, 1 a corner."""
        size = self.params.size
        return ball(size, np.full(3, centre * size), radius * self.scale)

    def spheres(self, count: tuple[int, int], radius: tuple[float, float], gap: float = -np.inf) -> tuple[np.ndarray, int]:
        """A random number of spheres wholly inside the cube, and that number.

        With a `gap` spheres keep at least that distance; one that finds no place in 200 tries is left out.
        """
        size, mask = self.params.size, np.zeros(self.v.shape, bool)
        placed: list[tuple[np.ndarray, float]] = []
        for _ in range(int(self.rng.integers(count[0], count[1] + 1))):
            for _ in range(200):
                r = self.rng.uniform(*radius) * self.scale
                centre = self.rng.uniform(r, size - 1 - r, 3)
                if all(np.linalg.norm(centre - other) >= r + s + gap * self.scale for other, s in placed):
                    placed.append((centre, r))
                    mask |= ball(size, centre, r)
                    break
        return mask, len(placed)

    def honeycomb(self) -> tuple[np.ndarray, np.ndarray]:
        """Touching hollow bubbles along the faces, in layers: walls one voxel thick, and walls with what they enclose."""
        rng, p = self.rng, self.params
        wall, filled = np.zeros((2, *self.v.shape), bool)
        for layer in range(1, int(rng.integers(p.bubble_layers[0], p.bubble_layers[1] + 1)) + 1):
            for _ in range(int(rng.integers(p.bubble_count[0], p.bubble_count[1] + 1))):
                centre = rng.integers(layer, p.size - layer, 3)
                centre[rng.integers(3)] = rng.choice([layer, p.size - 1 - layer])
                radius = round(rng.uniform(*p.bubble_radius) * self.scale)
                low = np.maximum(centre - radius - 1, 0)
                box = tuple(slice(a, min(c + radius + 2, p.size)) for a, c in zip(low, centre, strict=True))
                x, y, z = ((np.arange(s.start, s.stop) - c) ** 2 for s, c in zip(box, centre, strict=True))
                distance = x[:, None, None] + y[None, :, None] + z[None, None, :]
                wall[box] |= (distance >= radius**2) & (distance < (radius + 1) ** 2)
                filled[box] |= distance < (radius + 1) ** 2
        return wall, filled

    def scan(self, dies: bool, gt: np.ndarray, time: float, v: np.ndarray | float | None = None, **masks) -> Phantom:
        """The scan of a patient who dies of `gt` at `time`, or of a survivor, who has nothing of it.

        Args:
            v: brightness of what lies in `gt`; bright by default.
            masks: more masks of the phantom. Everybody has the bright `confounder_mask`, but where `gt` is.
        """
        if dies:
            return self.laid(gt, v, masks, time=float(time), event=1)
        nothing = np.zeros_like(gt)
        masks = {name: mask if name == "confounder_mask" else nothing for name, mask in masks.items()}
        return self.laid(nothing, v, masks, time=CENSORED_AT, event=0)

    def scan_at_risk(self, gt: np.ndarray, risk: float, v: np.ndarray | None = None, **masks) -> Phantom:
        """The scan of a patient whose outcome is drawn.

        Death is Weibull distributed with shape 1.5 and scale 80 exp(-risk) months. A censoring time, uniform on 5 to
        99 months, comes before it in about 30 % of the patients.
        """
        death = 80 * np.exp(-risk) * self.fate.weibull(1.5)
        censoring = self.fate.uniform(5, CENSORED_AT)
        time = float(np.clip(min(death, censoring), 1, CENSORED_AT - 1))
        return self.laid(gt, v, masks, time=time, event=int(death <= censoring), true_risk=risk)

    def laid(self, gt: np.ndarray, v: np.ndarray | float | None, masks: dict, **outcome) -> Phantom:
        bright = self.params.bright
        self.v[gt] = np.broadcast_to(bright if v is None else v, gt.shape)[gt]
        if "confounder_mask" in masks:
            masks["confounder_mask"] = masks["confounder_mask"] & ~gt
            self.v[masks["confounder_mask"]] = bright
        return Phantom(np.round(-800 + 40 * self.v).astype(np.int16), gt, **masks, **outcome)


# Each of these draws what those who die have, and when they do.


def central_sphere(cube: Cube, dies: bool) -> Phantom:
    """A bright sphere in the centre; the larger, the shorter the life."""
    low, high = cube.params.central_radius
    radius = cube.rng.integers(int(low), int(high) + 1)
    return cube.scan(dies, cube.ball(0.5, radius), 34 - radius)


def spheres(cube: Cube, dies: bool) -> Phantom:
    """1-3 bright spheres anywhere; time falls with their volume."""
    gt, _ = cube.spheres(cube.params.sphere_count, cube.params.sphere_radius)
    return cube.scan(dies, gt, np.clip(40 - 160 * gt.mean(), 2, 40))


def honeycomb(cube: Cube, dies: bool) -> Phantom:
    """A honeycomb of hollow bubbles along the faces; time falls with the volume of the walls."""
    gt, filled = cube.honeycomb()
    return cube.scan(dies, gt, np.clip(60 - 200 * gt.mean(), 2, 60), gt_filled_mask=filled)


def corner_sphere(cube: Cube, dies: bool) -> Phantom:
    """A corner sphere of the background's average brightness, without its noise."""
    low, high = cube.params.corner_radius
    radius = cube.rng.integers(int(low), int(high) + 1)
    return cube.scan(dies, cube.ball(1, radius), 35 - radius, v=0)


def spheres_honeycomb(cube: Cube, dies: bool, corner_radius: float = 0) -> Phantom:
    """1-3 bright spheres; a harmless honeycomb is in everybody."""
    corner = cube.ball(1, corner_radius)  # what of a sphere lies in it can't be seen, and is no cause
    wall, _ = cube.honeycomb()
    gt = cube.spheres(cube.params.sphere_count, cube.params.sphere_radius)[0] & ~corner
    return cube.scan(dies, gt, np.clip(40 - 160 * gt.mean(), 2, 40), confounder_mask=wall | corner)


def spheres_honeycomb_corner(cube: Cube, dies: bool) -> Phantom:
    """1-3 bright spheres; a harmless honeycomb and a harmless bright sphere in one corner are in everybody."""
    return spheres_honeycomb(cube, dies, cube.params.confounder_radius)


def counted_spheres(cube: Cube, dies: bool) -> Phantom:
    """1-5 spheres: more or larger ones, shorter life."""
    # Apart, because nobody can count two spheres that look like one.
    gt, number = cube.spheres(cube.params.small_count, cube.params.small_radius, gap=2)
    return cube.scan(dies, gt, np.clip(45 - 7 * number - 40 * gt.mean(), 2, 45))


def texture(cube: Cube, dies: bool) -> Phantom:
    """1-2 spheres of another texture, with the background's mean and variance."""
    gt, _ = cube.spheres((1, 2), cube.params.sphere_radius)
    smooth = ndimage.gaussian_filter(cube.rng.normal(size=gt.shape), cube.params.texture_sigma * cube.scale)
    # The very mean and standard deviation of the background, however small the sample is.
    inside, outside = smooth[gt], cube.v[~gt]
    v = outside.mean() + outside.std() * (smooth - inside.mean()) / inside.std()
    return cube.scan(dies, gt, np.clip(40 - 160 * gt.mean(), 2, 40), v)


# What is drawn in these sets a risk only; the outcome is drawn, whatever `dies` says.


def harmless_honeycomb(cube: Cube, dies: bool, benefit: float = 0) -> Phantom:
    """0-4 bright spheres; a random half has a harmless honeycomb."""
    gt, _ = cube.spheres(cube.params.lesion_count, cube.params.lesion_radius)
    wall, _ = cube.honeycomb()
    wall &= ~gt & (cube.rng.random() < 0.5)
    return cube.scan_at_risk(gt, RISK * gt.mean() + benefit * (0.5 - float(wall.any())), confounder_mask=wall)


def protective_honeycomb(cube: Cube, dies: bool) -> Phantom:
    """0-4 bright spheres; a random half has a honeycomb that protects (confounder_mask)."""
    return harmless_honeycomb(cube, dies, benefit=1)


def mild_severe(cube: Cube, dies: bool) -> Phantom:
    """0-2 spheres each of two kinds, alike but for texture; one is three times as dangerous (gt_severe_mask)."""
    v, p = cube.v, cube.params
    mild, _ = cube.spheres((0, 2), p.lesion_radius)
    severe, _ = cube.spheres((0, 2), p.lesion_radius)
    severe &= ~mild
    smooth = smooth_noise(cube.rng, v.shape, p.texture_sigma * cube.scale)
    for mask, noise in ((mild, cube.rng.normal(size=v.shape)), (severe, smooth)):
        if mask.any():
            v[mask] = p.bright * (0.5 + 0.1 * (noise[mask] - noise[mask].mean()) / noise[mask].std())
    return cube.scan_at_risk(mild | severe, RISK / 2 * (mild.mean() + 3 * severe.mean()), v, gt_severe_mask=severe)


def faint_spheres(cube: Cube, dies: bool) -> Phantom:
    """0-4 faint spheres, brighter than the background by --contrast times its noise."""
    gt, _ = cube.spheres(cube.params.lesion_count, cube.params.lesion_radius)
    return cube.scan_at_risk(gt, RISK * gt.mean(), cube.v + cube.params.contrast * cube.params.noise)
