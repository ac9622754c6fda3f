# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The numbers and words that say how scans are prepared, checked before anything is built with them."""

from collections.abc import Sequence
from typing import Any

from bundle.errors import checked_numbers
from bundle.transforms.load import SPACING_MM
from bundle.transforms.lung import check_method


def check_preprocessing(
    spacing: float | Sequence[float] | str, hu_window: Sequence[float], lung_mask: str, margin: float
) -> dict[str, Any]:
    """Check what a config or a command line says of preprocessing, and bring it into one form.

    Args:
        spacing: of the voxels that the network sees, mm: one number, or one for each axis; "native": as they are.
        hu_window: HU that become 0 and 1.
        lung_mask: one of :data:`~bundle.transforms.LUNG_METHODS`.
        margin: around the lung, mm; 0 if the spacing is "native", which differs from scan to scan.

    Raises:
        InputError: what was given, and what was expected.

    Example::

        >>> check_preprocessing(3, [-1000, 200], "auto", 6)
        {'spacing': [3.0, 3.0, 3.0], 'hu_window': [-1000.0, 200.0], 'lung_mask': 'auto', 'margin': 6.0}
    """
    least, most = SPACING_MM
    native = spacing == "native"
    if not native:
        sides = [spacing] * 3 if type(spacing) in (int, float) else spacing
        expected = f"one number or three, {least:g} to {most:g} mm, such as 3 or [3, 3, 3], or native"
        spacing = checked_numbers("spacing", sides, 3, expected, lambda *mm: least <= min(mm) <= max(mm) <= most)
    around = "0 where the spacing is native" if native else "a number of mm, at least 0"
    return {
        "spacing": spacing,
        "hu_window": checked_numbers(
            "hu_window", hu_window, 2, "two ascending HU, such as [-1000, 200]", lambda low, high: low < high
        ),
        "lung_mask": check_method(lung_mask),
        "margin": checked_numbers("margin", margin, 1, around, lambda mm: mm == 0 or (mm > 0 and not native))[0],
    }
