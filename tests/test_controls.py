# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What the causal checks do to a scan, and weights that they are done with."""

from __future__ import annotations

import numpy as np

from bundle.phantoms.cohort import make_phantom
from bundle.phantoms.cubes import PhantomParams
from scripts.research.controls import Trained, first_slices, replaced


def test_a_share_of_the_lesion_grows_slice_by_slice_from_nothing_to_all():
    mask = np.zeros((8, 4, 4), bool)
    mask[2:6, 1:3] = True
    sizes = [int(first_slices(mask, share).sum()) for share in (0.0, 0.25, 0.5, 1.0)]
    assert sizes == [0, 8, 16, 32] and not (first_slices(mask, 0.5) & ~mask).any()


def test_an_erased_lesion_is_background_and_all_else_stays():
    scan = make_phantom(6, np.random.default_rng(1), True, PhantomParams(size=32))
    hu = replaced(scan, scan.gt_mask, np.random.default_rng(0))
    assert scan.image[scan.gt_mask].min() > -100 and hu[scan.gt_mask].max() < -700
    assert np.array_equal(hu[~scan.gt_mask], scan.image[~scan.gt_mask])


def test_the_controls_read_the_shipped_weights_whatever_network_they_are_of(root):
    trained = Trained(root / "models")
    scan = make_phantom(6, np.random.default_rng(1), True, PhantomParams(size=20)).image
    assert 0 < trained.months(scan) < trained.model.objective.tmax
    for weights in (trained.weights(scan), trained.weights_of_nothing(scan)):
        assert weights.shape == scan.shape and np.isclose(weights.sum(), 1, rtol=1e-4)
