# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What hospitals have: scan files, DICOM folders, contours, tables, archives of scans."""

from bundle.reading.dicom import choose_series, list_series, read_dicom
from bundle.reading.scan_file import IMAGE_SUFFIXES, check_scan_file, read_nifti
from bundle.reading.series import Series
from bundle.reading.tables import read_table

__all__ = [
    "IMAGE_SUFFIXES",
    "Series",
    "check_scan_file",
    "choose_series",
    "list_series",
    "read_dicom",
    "read_nifti",
    "read_table",
]
