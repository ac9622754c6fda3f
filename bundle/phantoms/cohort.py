# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Cohorts of phantoms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bundle.errors import InputError
from bundle.phantoms.chest import chest
from bundle.phantoms.cubes import (
    CENSORED_AT,
    Phantom,
    PhantomParams,
    bubbles,
    central_sphere,
    corner_sphere,
    counted_spheres,
    drawn_outcome,
    faint_lesions,
    lesions_with_honeycomb,
    protecting_honeycomb,
    random_spheres,
    spheres_among_bubbles,
    spheres_bubbles_and_corner,
    texture,
    two_kinds_of_lesion,
)

__all__ = ["COMPLEXITIES", "PhantomCohort", "fibrosis_covariates", "make_phantom"]


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
