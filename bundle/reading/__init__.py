# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What hospitals have: scan files, DICOM folders, contours, archives of scans."""

from .dicom import Series, choose_series, find_series, list_series, read_dicom
from .scan_file import check_scan_file

__all__ = [
    "Series",
    "check_scan_file",
    "choose_series",
    "find_series",
    "list_series",
    "read_dicom",
]
