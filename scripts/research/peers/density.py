# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Share of the lung from -600 to -250 HU, nothing learnt: as dense as ground glass and reticulation are."""

import numpy as np

from scripts.research.peers.cohort import Cohort, Predict, Scan

TITLE = "share of lung from −600 to −250 HU"


def fit(cohort: Cohort, seed: int) -> Predict:
    def predict(scan: Scan) -> tuple[float, np.ndarray]:
        hu, (_, place, _) = 1200 * scan.image - 1000, scan.tokens()
        dense = ((hu >= -600) & (hu <= -250)).float()
        return float(dense[scan.mask("lung_mask")].mean()), scan.on_grid(dense[place.unbind(1)], place, smooth=1.8)

    return predict
