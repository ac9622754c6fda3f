# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
from isal import igzip

import bundle.fast_gzip


def test_volumes_are_plain_gzip_and_equal_volumes_equal_files(tmp_path):
    values = np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32)
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"{name}.nii.gz")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes())[352:] == values.tobytes(order="F")
    (tmp_path / "c.nii.gz").write_bytes(gzip.compress(nib.Nifti1Image(values, np.eye(4)).to_bytes()))
    assert (nib.load(tmp_path / "c.nii.gz").get_fdata() == values).all()


def test_closing_closes_the_file_beneath(tmp_path):
    with bundle.fast_gzip.open_gzip(str(tmp_path / "a.gz"), "wb") as file:
        raw = file.fileobj
        assert isinstance(file, igzip.IGzipFile) and not raw.closed
        file.write(b"x")
    assert raw.closed
