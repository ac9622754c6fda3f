# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The phantoms by name, and cohorts of them."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bundle.errors import InputError
from bundle.phantoms import cubes
from bundle.phantoms.chest import Chest, chest
from bundle.phantoms.phantom import CENSORED_AT, Phantom, PhantomParams

FAINT = (-820, -780)  # HU between which structures no brighter than the noise are seen


@dataclass(frozen=True)
class PhantomKind:
    """An entry of PHANTOMS.

    Attributes:
        number: its other name. It seeds every voxel, so it never changes.
        draw: from an empty body and whether the patient dies, the scan; its docstring's first line says what is drawn.
        body: made of random numbers and PhantomParams.
        drawn_outcome: who dies is drawn too, as in life, and `draw` is told in vain.
        window: HU between which pictures show it.
    """

    number: int
    draw: Callable[..., Phantom]
    body: type = cubes.Cube
    drawn_outcome: bool = False
    window: tuple[int, int] = (-900, 50)

    @property
    def text(self) -> str:
        return inspect.getdoc(self.draw).partition("\n")[0]


PHANTOMS = {
    "central-sphere": PhantomKind(1, cubes.central_sphere),
    "spheres": PhantomKind(2, cubes.spheres),
    "honeycomb": PhantomKind(3, cubes.honeycomb),
    "corner-sphere": PhantomKind(4, cubes.corner_sphere, window=FAINT),
    "spheres-honeycomb": PhantomKind(5, cubes.spheres_honeycomb),
    "spheres-honeycomb-corner": PhantomKind(6, cubes.spheres_honeycomb_corner),
    "counted-spheres": PhantomKind(7, cubes.counted_spheres),
    "texture": PhantomKind(8, cubes.texture, window=FAINT),
    "chest": PhantomKind(9, chest, Chest, window=(-1100, 200)),
    "harmless-honeycomb": PhantomKind(10, cubes.harmless_honeycomb, drawn_outcome=True),
    "mild-severe": PhantomKind(11, cubes.mild_severe, drawn_outcome=True),
    "faint-spheres": PhantomKind(12, cubes.faint_spheres, drawn_outcome=True, window=FAINT),
    "protective-honeycomb": PhantomKind(13, cubes.protective_honeycomb, drawn_outcome=True),
}


def phantom_name(phantom: str | int) -> str:
    """The name of a phantom that is given by name or number.

    Raises:
        InputError: there is no such phantom.

    Example:
        >>> phantom_name(9), phantom_name("9"), phantom_name("chest")
        ('chest', 'chest', 'chest')
    """
    for name, kind in PHANTOMS.items():
        if str(phantom) in (name, str(kind.number)):
            return name
    raise InputError(f"there is no phantom {phantom}; expected 1 to {len(PHANTOMS)} or one of {', '.join(PHANTOMS)}.")


def make_phantom(phantom: str | int, rng: np.random.Generator, dies: bool, params: PhantomParams) -> Phantom:
    """Draw one phantom, given by name or number; `dies` means nothing where the outcome is drawn.

    Raises:
        InputError: there is no such phantom.

    Example:
        >>> scan = make_phantom("spheres", np.random.default_rng(0), True, PhantomParams(size=32))
        >>> scan.image.shape, scan.event, bool(scan.gt_mask.any())
        ((32, 32, 32), 1, True)
    """
    kind = PHANTOMS[phantom_name(phantom)]
    return kind.draw(kind.body(rng, params), dies)


@dataclass(frozen=True)
class PhantomCohort(Sequence):
    """A sequence of (patient_id, phantom), each drawn when it is asked for.

    Scan i is the same whatever `num` is: those who die are spread evenly over the scans.

    Args:
        phantom: name or number.
        num: scans.
        seed: fixes every voxel.
        feature_fraction: share of the patients who die; means nothing where the outcome is drawn.
        params: of every phantom.

    Raises:
        InputError: there is no such phantom, `num` is below 1 or `feature_fraction` outside [0, 1].
    """

    phantom: str | int
    num: int
    seed: int
    feature_fraction: float = 0.5
    params: PhantomParams = PhantomParams()

    def __post_init__(self) -> None:
        object.__setattr__(self, "phantom", phantom_name(self.phantom))
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
        number = PHANTOMS[self.phantom].number
        rng = np.random.default_rng([self.seed, number, index])
        return f"phantom{number}_seed{self.seed}_{index:04d}", make_phantom(self.phantom, rng, dies, self.params)

    def covariates(self, index: int, phantom: Phantom) -> dict[str, str]:
        """Clinical columns of scan `index` as fibrosis studies have them, which know something of the outcome.

        A severity between 0 and 1, by the time of death or the true risk, lowers lung function and raises age and the
        shares of men, of smokers and of those treated. "" is missing: a tenth to a third of the values of DLCO, more
        in the sick, and some of FVC and smoking. They are drawn apart from the scan, which stays as it is.
        """
        rng = np.random.default_rng([self.seed, PHANTOMS[self.phantom].number, index, 1])
        if phantom.true_risk is None:
            severity = phantom.event * (1 - phantom.time / CENSORED_AT)
        else:
            severity = 1 - np.exp(-max(phantom.true_risk, 0.0))
        fvc = rng.normal(90 - 20 * severity, 14)
        dlco = rng.normal(0.7 * fvc - 10 * severity, 10)
        smoking = [0.5 - 0.2 * severity, 0.4 + 0.2 * severity, 0.1]
        values = {
            "age": f"{rng.normal(64 + 6 * severity, 8):.0f}",
            "sex": "male" if rng.random() < 0.5 + 0.3 * severity else "female",
            "fvc_percent": f"{max(fvc, 20.0):.0f}",
            "dlco_percent": f"{max(dlco, 10.0):.0f}",
            "smoking": str(rng.choice(["never", "former", "current"], p=smoking)),
            "antifibrotic": "yes" if rng.random() < 0.2 + 0.4 * severity else "no",
        }
        missing = {"fvc_percent": 0.05, "dlco_percent": 0.1 + 0.2 * severity, "smoking": 0.1}
        return {name: "" if rng.random() < missing.get(name, 0) else value for name, value in values.items()}
