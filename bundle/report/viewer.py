# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What the viewer of a report holds: small volumes as text, the viewer's code, and the policy that binds the page."""

import base64
import gzip
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from markupsafe import Markup
from scipy import ndimage

if TYPE_CHECKING:
    from bundle.report.report import ScanViews

HERE = Path(__file__).parent
NIIVUE = HERE / "vendor" / "niivue-0.69.0.umd.js.gz"
LICENCE = HERE / "vendor" / "LICENSE.niivue.txt"
WIDTHS = (0.0, 2.0, 2.5, 3.0, 4.0, 6.0)  # mm, of a report's voxels: the first that has few enough
MOST_VOXELS = 2_500_000
MOST_BYTES = 4_500_000  # of CT and maps, so that a page with the viewer has at most 6 MB


def blocks_of(shape: tuple[int, ...], spacing: np.ndarray) -> tuple[int, ...]:
    """How many voxels an axis become one, so that a report has at most 2.5 million voxels of 2 to 3 mm where it can."""
    for width in WIDTHS:
        blocks = tuple(max(1, round(width / mm)) for mm in spacing)
        if np.prod([-(-n // k) for n, k in zip(shape, blocks)]) <= MOST_VOXELS:
            break
    return blocks


def block_means(voxels: np.ndarray, blocks: tuple[int, ...]) -> np.ndarray:
    """Means over blocks of voxels; those at the end may be smaller."""
    out = voxels.astype(np.float32)
    for axis, k in enumerate(blocks):
        if k > 1:
            starts = np.arange(0, out.shape[axis], k)
            sizes = np.diff([*starts, out.shape[axis]]).reshape([-1 if i == axis else 1 for i in range(3)])
            out = np.add.reduceat(out, starts, axis) / sizes
    return out


def block_affine(affine: np.ndarray, blocks: tuple[int, ...]) -> np.ndarray:
    """The affine of :func:`block_means` (RAS, mm)."""
    out = affine.copy()
    out[:3, :3] *= blocks
    out[:3, 3] += affine[:3, :3] @ ((np.array(blocks) - 1) / 2)
    return out


def volume_text(voxels: np.ndarray, affine: np.ndarray, low: float, high: float) -> str:
    """A volume as a gzipped NIfTI of 8 bits in base64; values from `low` to `high` come back to half a step."""
    step = max(high - low, 1e-30) / 255
    image = nib.Nifti1Image(np.rint((np.nan_to_num(voxels, nan=low) - low) / step).clip(0, 255).astype(np.uint8), affine)
    image.header.set_slope_inter(step, low)
    image.header.set_xyzt_units("mm")
    return base64.b64encode(gzip.compress(image.to_bytes(), 6, mtime=0)).decode()


def volumes(views: "ScanViews", hu_window: tuple[float, float]) -> tuple[dict[str, Any], str]:
    """The volumes of a page as the viewer reads them, and their spacing in words."""
    blocks = blocks_of(views.hu.shape, np.linalg.norm(views.affine[:3, :3], axis=0))
    affine = block_affine(views.affine, blocks)
    outlines = {"lung": views.lung} | views.masks
    outlines = [{"name": name, "base64": _outline(mask, blocks, affine)} for name, mask in outlines.items()]
    ct = volume_text(block_means(views.hu, blocks), affine, *hu_window)
    overlays, left_out, flat, room = [], [], [], MOST_BYTES - len(ct) - sum(len(each["base64"]) for each in outlines)
    for name, (voxels, unit) in views.overlays.items():
        small = np.nan_to_num(block_means(voxels, blocks), posinf=0, neginf=0)
        most = max(float(small.max()), 1e-30)
        flat += [name] if small.min() == small.max() else []
        overlay = {"name": name, "unit": unit, "most": most}
        overlay["base64"] = volume_text(small, affine, min(0.0, float(small.min())), most)
        room -= len(overlay["base64"])
        overlays.append(overlay) if room > 0 or not overlays else left_out.append(name)
    content = {"ct": ct, "outlines": outlines, "masked": views.masked, "overlays": overlays}
    content |= {"left_out": left_out, "flat": flat}
    return content, times(np.linalg.norm(affine[:3, :3], axis=0))


def _outline(mask: np.ndarray, blocks: tuple[int, ...], affine: np.ndarray) -> str:
    """A mask as the viewer reads it: 1 inside, 2 at its surface. One that fills no block by half keeps its fullest."""
    share = block_means(mask, blocks)
    inside = (share > 0) & (share >= min(0.5, share.max()))
    return volume_text(inside + 1 * (inside & ~ndimage.binary_erosion(inside)), affine, 0, 255)


def times(spacing: Any) -> str:
    """Three lengths as text.

    >>> times((3.0, 3.0, 2.5))
    '3 × 3 × 2.5'
    """
    return " × ".join(f"{float(f'{mm:.3g}'):g}" for mm in spacing)


@cache
def script(name: str) -> Markup:
    """A script of the templates' folder, to stand in a page as it is."""
    return Markup((HERE / "templates" / name).read_text(encoding="utf-8"))


@cache
def niivue() -> tuple[str, str]:
    """The viewer's code as gzipped base64, and the source expression that lets a page run it."""
    packed = NIIVUE.read_bytes()
    return base64.b64encode(packed).decode(), _allowed(gzip.decompress(packed))


def policy(name: str, viewer: bool = False) -> str:
    """The Content-Security-Policy of a page with one script of ours: nothing is loaded, nothing else runs."""
    scripts = [_allowed(script(name).encode()), *([niivue()[1], "'wasm-unsafe-eval'"] if viewer else [])]
    parts = ["default-src 'none'", "style-src 'unsafe-inline'", f"script-src {' '.join(scripts)}"]
    parts += ["img-src data: blob:", "connect-src data: blob:"] if viewer else ["img-src 'self' file: data:"]
    return "; ".join([*parts, "base-uri 'none'", "form-action 'none'"])


def _allowed(code: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code).digest()).decode()}'"
