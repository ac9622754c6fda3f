# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The networks as ONNX: the dense form gives their maps, and onnxruntime those of the dense form."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from bundle.errors import InputError
from bundle.networks import CodebookNet, SurvivalMapNet, network_from
from bundle.networks.dense import dense
from bundle.networks.descriptors import jacobi
from scripts.export_onnx import export_onnx, main, scan_of

HERE = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
FORMS = {
    "map": {"dim": 32, "extra": 1, "clinical_dim": 2},
    "overlapping": {"dim": 16, "overlap": 0.5, "head": "hazard", "texture": False},
    "wide windows": {"dim": 16, "window": 3, "head": "attention", "depth": 1},
    "codebooks": {"name": "CodebookNet", "books": 5, "words": 20, "clinical_dim": 1},
    "taught codebooks": {"name": "CodebookNet", "books": 5, "words": 20, "clinical_dim": 1},
}


def made(name: str) -> torch.nn.Module:
    """A network of random weights, all of them."""
    network = network_from({"name": "SurvivalMapNet", **FORMS[name]}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in network.parameters():
            part.add_(0.05 * torch.randn(part.shape, generator=generator))
    if isinstance(network, CodebookNet):
        network.centres.normal_(generator=generator)
        network.chosen.copy_(torch.randint(29, network.chosen.shape, generator=generator))
        network.hazard.data.uniform_(-0.3, 1, generator=generator)
        if name.startswith("taught"):
            network.student.normal_(generator=generator), network.student_scale.fill_(0.5)
    return network


@pytest.mark.parametrize("size", [[16, 16, 16], [17, 21, 14], [9, 30, 23]])
@pytest.mark.parametrize("name", FORMS)
def test_the_dense_form_gives_the_networks_map(name, size):
    network = made(name)
    scan = scan_of(network, size, seed=1)
    with torch.no_grad():
        expected, found = network(**scan), dense(network)(**scan)
    scale = expected.abs().amax((0, 2, 3, 4), keepdim=True)
    assert found.shape == expected.shape and float(((found - expected).abs() / scale).max()) < 1e-5


def test_the_whole_volume_may_be_lung():
    for name in FORMS:
        network = made(name)
        scan = scan_of(network, [12, 10, 16], seed=2) | {"lung": torch.ones(1, 1, 12, 10, 16)}
        with torch.no_grad():
            torch.testing.assert_close(dense(network)(**scan), network(**scan), rtol=1e-4, atol=1e-5)


def test_jacobis_eigenvalues_are_those_of_torch():
    matrix = torch.randn(500, 3, 3, generator=torch.Generator().manual_seed(0))
    matrix = matrix + matrix.transpose(1, 2)
    matrix[0], matrix[1], matrix[2] = 0, torch.eye(3), torch.ones(3, 3)
    torch.testing.assert_close(jacobi(matrix), torch.linalg.eigvalsh(matrix), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="needs requirements-onnx.txt")
@pytest.mark.parametrize("name, most", [("map", 1e-4), ("codebooks", 1e-2)])  # a voxel may lie between two words
def test_onnxruntime_gives_the_networks_map(name, most, tmp_path):
    voxels, months = export_onnx(made(name), tmp_path / "m.onnx")
    assert voxels < most and months < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_what_has_no_such_form_is_one_sentence(tmp_path):
    for network in (
        SurvivalMapNet(window=0),
        SurvivalMapNet(film_context=True),
        network_from({"name": "ClinicalNet", "clinical_dim": 1}),
    ):
        with pytest.raises(InputError, match="has no form for ONNX as it is"):
            dense(network)


def test_no_weights_are_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--ckpt", str(tmp_path / "model.pt"), "--out", str(tmp_path / "m.onnx")])
    assert end.value.code == 2 and "there is no weights file" in capsys.readouterr().err
    assert not list(Path(tmp_path).iterdir())
