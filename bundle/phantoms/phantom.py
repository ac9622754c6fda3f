# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What every phantom is, what may be changed about it, and the shapes that several are made of."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from bundle.errors import InputError

CENSORED_AT = 99.0  # months; of everybody who doesn't die


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
            raise InputError(f"bubble_layers is {self.bubble_layers}; expected fewer than half of {self.size} voxels.")


@dataclass
class Phantom:
    """One scan of which it is known what causes death. Masks are bool and have the image's shape.

    Attributes:
        image: HU, int16, (D, H, W).
        gt_mask: what causes death; empty in a survivor.
        time: months until death or censoring.
        event: 1 died, 0 censored.
        confounder_mask: what looks like the cause and isn't; None where nothing does.
        gt_filled_mask: of a honeycomb that causes death, its walls with the air inside.
        gt_severe_mask: the more dangerous part of `gt_mask`, where there are two kinds.
        lung_mask: of a chest.
        true_risk: where the outcome is drawn, log of the factor by which the expected time is shortened: what an
            oracle would rank patients by.
    """

    image: np.ndarray
    gt_mask: np.ndarray
    time: float
    event: int
    confounder_mask: np.ndarray | None = None
    gt_filled_mask: np.ndarray | None = None
    gt_severe_mask: np.ndarray | None = None
    lung_mask: np.ndarray | None = None
    true_risk: float | None = None


def ball(size: int, centre: np.ndarray, radius: float) -> np.ndarray:
    """Voxels nearer than `radius` to `centre` in a cube of `size` voxels a side."""
    x, y, z = ((np.arange(size) - c) ** 2 for c in centre)
    return x[:, None, None] + y[None, :, None] + z[None, None, :] < radius**2


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Gaussian noise smoothed by `sigma` voxels, with mean 0 and standard deviation 1."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), sigma, mode="reflect")
    return (noise - noise.mean()) / noise.std()
