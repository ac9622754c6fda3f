# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""nibabel's `.nii.gz` by Intel's ISA-L: half of the time from a CT to its map is gzip, and this one is 3 to 8 times faster.

Importing it registers it. Files have no name and date in their header, so that equal volumes are equal files.
"""

from isal import igzip
from nibabel.openers import ImageOpener


def open_gzip(path: str, mode: str = "rb", compresslevel: int = 1) -> igzip.IGzipFile:
    """Open a gzip file; `compresslevel` is ISA-L's, 0 to 3."""
    raw = open(path, mode)
    try:
        file = igzip.IGzipFile("", mode, compresslevel, raw, mtime=0)
    except BaseException:
        raw.close()
        raise
    file.myfileobj = raw  # closed with it
    return file


ImageOpener.compress_ext_map[".gz"] = (open_gzip, ("mode", "compresslevel"))
