# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How alike two maps of one lung are, whatever their scale."""

import numpy as np
from scipy.stats import spearmanr


def rank_correlation(first: np.ndarray, other: np.ndarray, where: np.ndarray) -> float | None:
    """Spearman's rank correlation of two maps of one shape over the voxels of a mask; None if one is constant there.

    Example:
        >>> heat = np.arange(8.0).reshape(2, 2, 2)
        >>> round(rank_correlation(heat, heat**3, heat > 2), 3)
        1.0
    """
    a, b = first[where], other[where]
    if len(a) < 2 or a.min() == a.max() or b.min() == b.max():
        return None
    return float(spearmanr(a, b).statistic)


def dice(first: np.ndarray, other: np.ndarray) -> float | None:
    """Twice the common part of two masks of one shape over the sum of both; None if both are empty.

    Example:
        >>> dice(np.array([True, True, False]), np.array([True, False, False])) == 2 / 3
        True
    """
    total = int(first.sum()) + int(other.sum())
    return 2 * int((first & other).sum()) / total if total else None
