# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image
from torch import nn

from bundle.errors import InputError
from bundle.explain import (
    EXPLAINERS,
    applicable,
    chosen,
    explain,
    features,
    gradients,
    perturbation,
    polycam,
    tokens_of_scan,
)
from bundle.explain.cubelets import Cubelets, apart, cohort_sheet
from bundle.explain.scan import death_target
from bundle.explain.volumes import Explanations, doubt
from bundle.maps.heat import spread
from bundle.metrics.faithfulness import agreement, cascading_randomisation, faithfulness, shift_agreement
from bundle.networks import ClinicalNet, CodebookNet, SurvivalMapNet
from bundle.survival import CenTime
from bundle.survival.readout import patient_numbers

from .commands import run

SIZE = 24
LESION = (slice(8, 16), slice(0, 8), slice(8, 16))  # whole windows of two patches of 4 voxels


def scan_with(lesion: bool = True, seed: int = 0) -> torch.Tensor:
    image = 0.17 + 0.007 * torch.randn(1, 1, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    if lesion:
        image[(0, 0, *LESION)] = 0.9
    return image.clamp(0, 1)


@pytest.fixture(scope="module")
def network() -> SurvivalMapNet:
    """Has learnt in a second that what is bright kills."""
    torch.manual_seed(0)
    net = SurvivalMapNet(patch_size=4, dim=16)
    images = torch.cat([scan_with(i % 2 == 0, i) for i in range(4)])
    months, optimiser = torch.tensor([20.0, 90.0] * 2), torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(40):
        optimiser.zero_grad()
        (patient_numbers(net(images))[0] - months).square().mean().backward()
        optimiser.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def codebook() -> CodebookNet:
    """One book of two words: usual lung, and bright lung, which is dangerous."""
    net = CodebookNet(books=1, words=2, few=1)
    net.centres[0, :, 0] = torch.tensor([0.0, 6.0])
    net.hazard.data[0] = torch.tensor([0.0, 1.0])
    return net.eval()


def half_lung() -> torch.Tensor:
    lung = torch.zeros(1, 1, SIZE, SIZE, SIZE)
    lung[..., 2:19, :13, 5:] = 1
    return lung


@pytest.mark.parametrize("level", ["input", "output"])
def test_gradients_are_those_of_the_whole_network(network, level):
    image, lung = scan_with(), half_lung()
    scan = tokens_of_scan(network, image, lung)
    seen = []

    def keep(module, args):
        seen.append(args[0].detach().requires_grad_())
        return (seen[0], *args[1:])

    place = network.blocks[0] if level == "input" else network.head
    handle = place.register_forward_pre_hook(keep)
    target = -patient_numbers(network(image, lung))[0].sum()
    handle.remove()
    (expected,) = torch.autograd.grad(target, seen[0])
    assert torch.allclose(scan.features(level), seen[0], atol=1e-6)
    assert torch.allclose(gradients.gradient(scan, level), expected, atol=1e-6)
    assert float(scan.score(scan.features(level)[None], level)) == pytest.approx(float(target), abs=1e-3)


@pytest.mark.parametrize("level", ["input", "output"])
def test_integrated_gradients_are_complete(network, level):
    scan = tokens_of_scan(network, scan_with(), fill="air")
    found = gradients.integrated_gradients(scan, level)
    nothing, everything = scan.kept(torch.stack([torch.zeros(len(found)), torch.ones(len(found))]))
    error = abs(float(found.sum() - (everything - nothing))) / abs(float(everything - nothing))
    assert error < 0.01 and scan.found["completeness_error"] == pytest.approx(error, abs=1e-3)
    assert float(everything - nothing) > 10  # months


def test_cam_formulas_against_loops():
    x, g = torch.randn(7, 3).double(), torch.randn(7, 3).double()
    tokens, channels = range(7), range(3)
    alpha = [[g[i, k] ** 2 / (2 * g[i, k] ** 2 + x[:, k].sum() * g[i, k] ** 3) for k in channels] for i in tokens]
    weights = {
        "gradcam": [sum(g[i, k] for i in tokens) / 7 for k in channels],
        "gradcam++": [sum(alpha[i][k] * max(g[i, k], 0) for i in tokens) for k in channels],
        "xgradcam": [sum(g[i, k] * x[i, k] / sum(x[j, k] for j in tokens) for i in tokens) for k in channels],
    }
    expected = {n: [max(sum(w[k] * x[i, k] for k in channels), 0) for i in tokens] for n, w in weights.items()}
    expected["layercam"] = [max(sum(max(g[i, k], 0) * x[i, k] for k in channels), 0) for i in tokens]
    assert expected.keys() == gradients.CAMS.keys()
    for name, values in expected.items():
        assert torch.allclose(gradients.CAMS[name](x, g), torch.tensor(values).double()), name
    for formula in gradients.CAMS.values():  # no gradient, no map, and no NaN
        assert not formula(x, 0 * g).any() and formula(0 * x, g).isfinite().all()


def test_smoothgrad_without_noise_is_gradient_x_input(network, monkeypatch):
    scan = tokens_of_scan(network, scan_with())
    again = gradients.smoothgrad(scan, "input")
    assert torch.equal(again, gradients.smoothgrad(scan, "input"))
    monkeypatch.setattr(gradients, "NOISE", 1e-9)
    assert torch.allclose(gradients.smoothgrad(scan, "input"), gradients.gradient_x_input(scan, "input"), atol=1e-5)


def test_features_are_those_on_the_way(network):
    seen, handles = {}, []
    for number, block in enumerate(network.blocks, 1):
        handles.append(block.register_forward_hook(lambda m, a, out, n=number: seen.setdefault(n, out)))
    handles.append(network.head.to_location[-1].register_forward_pre_hook(lambda m, a: seen.setdefault("head", a[0])))
    network(scan_with())
    for handle in handles:
        handle.remove()
    scan = tokens_of_scan(network, scan_with())
    for level, of in {"block1": 1, "output": 2, "head": "head"}.items():
        assert torch.allclose(features.norm(scan, level), seen[of].norm(dim=1), atol=1e-5)
    assert torch.allclose(features.change(scan, "block2"), (seen[2] - seen[1]).norm(dim=1), atol=1e-5)
    colours = features.pca(scan, "output")
    x = seen[2] - seen[2].mean(0)
    for k, axis in enumerate(torch.linalg.svd(x, full_matrices=False)[2][:3]):
        inside = (colours[:, k] > 0) & (colours[:, k] < 1)
        assert torch.corrcoef(torch.stack([colours[inside, k], (x @ axis)[inside]]))[0, 1].abs() > 0.999
    assert set(applicable(network)) >= {"norm_input", "pca_block1", "change_block1", "change_block2", "gradcam_output"}
    assert "norm_block2" not in applicable(network)  # it is the output


@pytest.mark.parametrize("window", [0, 2])
def test_rollout_against_matrices(window):
    net = SurvivalMapNet(patch_size=4, dim=32, window=window).eval()
    scan = tokens_of_scan(net, scan_with(), half_lung())
    index, flow = scan.index, scan.survival_map[0, -1][tuple(scan.index.T)]
    alike = torch.ones(len(index), len(index), dtype=torch.bool)
    if window:
        alike = (index[:, None] // window == index[None] // window).all(2)
    for number in (2, 1):
        block, x = net.blocks[number - 1], scan.features({2: "block1", 1: "input"}[number])
        q, k, _ = block.attention.qkv(block.norm1(x)).view(len(x), 3, 2, 16).unbind(1)
        score = torch.einsum("nhd,mhd->hnm", q, k) / 4
        seen = score.masked_fill(~alike, -torch.inf).softmax(2).mean(0)
        flow = flow @ (0.5 * torch.eye(len(x)) + 0.5 * seen)
    assert torch.allclose(features.rollout(scan), flow, atol=1e-6) and float(flow.sum()) == pytest.approx(1, abs=1e-5)


def test_occlusion_is_what_replacing_voxels_gives(network):
    image, lung = scan_with(), half_lung()
    scan = tokens_of_scan(network, image, lung, usual=0.1)
    values = scan.lay(perturbation.occlusion(scan))[0]
    changed = image.clone()
    changed[..., 8:16, 0:8, 8:16] = torch.where(lung > 0, 0.1, image)[..., 8:16, 0:8, 8:16]
    expected = patient_numbers(network(changed, lung))[0] - patient_numbers(network(image, lung))[0]
    assert values[2, 0, 2] == pytest.approx(float(expected), abs=1e-3) and float(expected) > 5
    assert float(values.sum()) == pytest.approx(float(values[scan.share[0] > 0].sum()))  # nothing outside the lung


def test_replacing_whole_windows_is_a_short_cut(network):
    scan = tokens_of_scan(network, scan_with(), half_lung())
    whole = (torch.rand(3, len(scan.index)) < 0.5).float()[:, scan.first]
    x, other = scan.features("input"), scan.features("input", True)
    assert torch.allclose(scan.kept(whole), scan.score(other + whole[:, :, None] * (x - other)), atol=1e-3)
    assert not torch.equal(scan.first, torch.arange(len(scan.index)))


@pytest.mark.parametrize("kind", ["network", "codebook"])
@pytest.mark.parametrize("method", ["occlusion", "keep_only", "rise"])
def test_perturbations_find_a_planted_lesion(kind, method, request):
    net = request.getfixturevalue(kind)
    scan = tokens_of_scan(net, scan_with())
    values = spread(scan.lay(EXPLAINERS[method].of(scan))[None], scan.cell, (SIZE,) * 3, None)[0, 0]
    lesion = torch.zeros(SIZE, SIZE, SIZE, dtype=torch.bool)
    lesion[LESION] = True
    assert lesion.flatten()[values.argmax()], method
    assert values[lesion].mean() > 2 * values[~lesion].mean().abs()


def test_codebook_tokens_say_what_the_network_says(codebook):
    image = scan_with()
    scan = tokens_of_scan(codebook, image)
    everything = scan.kept(torch.ones(1, len(scan.index)))
    assert float(everything) == pytest.approx(-float(patient_numbers(codebook(image))[0]), abs=1e-3)
    assert set(scan.evidence.tolist()) == {0.0, 1.0}
    assert scan.lay(scan.evidence)[0, 4:8, :4, 4:8].mean() == 1
    objective = CenTime()
    scan.target = death_target(objective, 60)
    assert 0 <= float(scan.kept(torch.ones(1, len(scan.index)))) <= 1


def test_poly_cam_against_a_loop(network):
    scan = tokens_of_scan(network, scan_with())
    masks, brought, lost = polycam.layer(scan, "input", 1)
    x, other = scan.features("input"), scan.features("input", True)
    for k in (0, 5):
        mask = (x[:, k] - x[:, k].min()) / (x[:, k].max() - x[:, k].min())
        full, none = scan.score(x[None]), scan.score(other[None])
        with_it, without = (other + m[:, None] * (x - other) for m in (mask, 1 - mask))
        assert float(scan.score(with_it[None]) - none) == pytest.approx(float(brought[k]), abs=1e-3)
        assert float(full - scan.score(without[None])) == pytest.approx(float(lost[k]), abs=1e-3)
    grid = torch.arange(36.0).view(1, 6, 6, 1).expand(1, 6, 6, 6)
    assert torch.equal(polycam.coarser(grid, torch.ones_like(grid), 1), grid)
    flat = torch.full((1, 5, 5, 5), 3.0)
    assert torch.allclose(polycam.coarser(flat, torch.ones_like(flat), 2), flat)  # not darker where a cube is cut off
    for sign in ("+", "-", "+-"):
        values = polycam.poly_cam(sign)(scan)
        assert values.shape == (len(scan.index),) and values.isfinite().all() and values.min() >= 0
    maps = []
    for worst in (-1.0, 0.0):  # a channel that lengthens life doesn't take away from what others find
        changes = torch.linspace(0, 1, len(masks))
        changes[0] = worst
        scan.memo = {("layer", place): (masks, changes, changes) for place in ("input", "block1", "output")}
        maps.append(polycam.poly_cam("+")(scan))
    assert torch.equal(*maps)


def test_explain_gives_maps_of_a_batch(network, codebook):
    batch = {"image": torch.cat([scan_with(), scan_with(False)]), "lung": half_lung().expand(2, -1, -1, -1, -1)}
    for name in ("gradcam_input", "pca_head", "occlusion"):
        found = explain(network, batch, name)
        assert found.shape == (2, 3 if "pca" in name else 1, 6, 6, 6)
        assert torch.equal(found[1:], explain(network, {k: v[1:] for k, v in batch.items()}, name))
    weights = explain(network, batch, "weight")
    assert torch.allclose(weights, network(batch["image"], batch["lung"])[:, -1:], atol=1e-6)
    assert float(explain(network, batch, "heat", death=0.3)[0].sum()) == pytest.approx(0.3, abs=1e-5)
    assert explain(codebook, batch, "evidence").shape == (2, 1, 12, 12, 12)
    with pytest.raises(InputError, match="cubelets is a picture"):
        explain(network, batch, "cubelets")


@pytest.mark.parametrize(
    ("names", "kind", "said"),
    [
        ("gradcan", "network", "no explainer .*did you mean gradcam"),
        ("gradcam", "codebook", "doesn't apply to these weights of a CodebookNet"),
        ("heat,evidence", "network", "evidence doesn't apply to these weights of a SurvivalMapNet"),
        ("norm_block9", "network", "doesn't apply"),
        ("heat,,location", "network", "is no explainer"),
        (True, "network", "True is no explainer"),
    ],
)
def test_bad_names_are_one_sentence(names, kind, said, request):
    with pytest.raises(InputError, match=said) as error:
        chosen(names, request.getfixturevalue(kind))
    assert "\n" not in str(error.value)


def test_names_with_and_without_levels(network, codebook):
    assert list(chosen("gradcam, heat", network)) == ["gradcam_input", "gradcam_output", "heat"]
    assert list(chosen(("gradcam++_input",), network)) == ["gradcam++_input"]
    assert set(chosen("all", codebook)) == set(applicable(codebook)) and chosen(None, codebook) == {}
    with pytest.raises(InputError, match="it doesn't look at the scan"):
        chosen("heat", ClinicalNet(clinical_dim=2))


def test_cubelets_are_apart():
    centres = torch.tensor([[0.0, 0, 0], [1, 0, 0], [9, 0, 0], [20, 0, 0]])
    assert apart(torch.tensor([1, 0, 2, 3]), centres, num=3, least=5) == [1, 2, 3]


def test_a_cohorts_sheet_has_its_worst_and_best_patches_two_of_a_patient(tmp_path):
    def of(*months: float) -> Cubelets:
        n = len(months)
        return Cubelets(np.array(months), np.full(n, -500.0), np.ones((n, 3)), np.zeros((n, 5, 5)), np.ones(2), 1)

    of(5, 50, 60, 95).save(tmp_path / "b.npz")
    figure = cohort_sheet({"a": of(1, 2, 3, 90), "b": Cubelets.load(tmp_path / "b.npz")})
    rows = [[ax.get_title().split("\n") for ax in part.axes if ax.get_title()] for part in figure.subfigs]
    found = [[f"{who} {said.split(', ')[1]}" for who, _, said in row] for row in rows]
    assert found[0] == ["a 1 months", "a 2 months", "b 5 months", "b 50 months"]
    assert found[1] == ["b 95 months", "a 90 months", "b 60 months", "a 3 months"]
    assert rows[0][0][1:] == ["1, 1, 1 mm", "-500 HU, 1 months"]


def test_inference_of_a_cohort_leaves_its_cubelets(tiny_cohort, trained, tmp_path):
    two = pd.read_csv(tiny_cohort).head(2)
    two.assign(image=[str(tiny_cohort.parent / name) for name in two.image])[["patient_id", "image"]].to_csv(
        tmp_path / "two.csv", index=False
    )
    options = {"ckpt": str(trained), "output_dir": str(tmp_path / "out"), "shifts": 1}
    run("configs/inference.json", **options, cohort=str(tmp_path / "two.csv"), explain="cubelets")
    assert np.asarray(Image.open(tmp_path / "out" / "cubelets.png")).std() > 1
    run("configs/inference.json", **options, image=str(tiny_cohort.parent / two.image[0]))
    assert not (tmp_path / "out" / "cubelets.png").exists()  # it isn't of these scans


def test_faithfulness_prefers_the_true_map(network):
    scan = tokens_of_scan(network, scan_with())
    values = perturbation.occlusion(scan)
    good, bad = faithfulness(scan.kept, values), faithfulness(scan.kept, -values)
    assert good["insertion"] > 0.8 > bad["insertion"] and good["deletion"] < 0.2 < bad["deletion"]
    assert good["comprehensiveness"] > bad["comprehensiveness"] and good["sufficiency"] < bad["sufficiency"]
    constant = torch.ones(2, 1)[:, 0]
    assert set(faithfulness(lambda masks: 5 + 0 * masks[:, 0], constant).values()) == {None}


def test_deletion_and_insertion_are_those_of_quantus(network, monkeypatch):
    quantus = pytest.importorskip("quantus", exc_type=ImportError, reason="Quantus, of requirements-dev.txt, is not there")
    scan = tokens_of_scan(network, scan_with())
    values = perturbation.rise(scan)  # has no ties

    class Kept(nn.Module):
        def forward(self, masks):
            return scan.kept(masks.flatten(1).float()).unsqueeze(1)

    monkeypatch.setattr("bundle.metrics.faithfulness.STEPS", 24)  # which divides the number of tokens
    seen = (values - values.min(), values.max() - values)  # Quantus takes no map that is below 0 throughout
    nothing, everything = (float(scan.kept(torch.full((1, len(values)), x))) for x in (0.0, 1.0))
    for name, start in (("deletion", 1.0), ("insertion", 0.0)):
        how = {"perturb_baseline": 1 - start, "normalise": False, "disable_warnings": True}
        flip = quantus.PixelFlipping(features_in_step=len(values) // 24, **how)
        for each in seen:
            found, maps = faithfulness(scan.kept, each), each[None, None].numpy()
            (curve,) = flip(Kept().eval(), np.full_like(maps, start), np.zeros(1, int), maps, softmax=False)
            curve = (np.array([everything if start else nothing, *curve]) - nothing) / (everything - nothing)
            assert found[name] == pytest.approx(np.trapezoid(curve, dx=1 / 24), abs=1e-4)


def test_randomisation_shift_and_agreement(network, codebook):
    def see(net: nn.Module) -> dict[str, torch.Tensor]:
        return {name: explain(net, {"image": scan_with()}, name) for name in ("location", "norm_input")}

    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = cascading_randomisation(network, see)
    assert list(found) == ["head", "blocks.1", "blocks.0", "position", "embed"]
    assert abs(found["embed"]["location"]) < 0.9 < agreement(*[see(network)["location"]] * 2)
    assert found["head"]["norm_input"] == pytest.approx(1) and abs(found["embed"]["norm_input"]) < 0.9
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    evidence = cascading_randomisation(codebook, lambda net: {"": explain(net, {"image": scan_with()}, "evidence")})
    assert list(evidence) == ["hazard"]  # the other numbers are single ones
    lung = half_lung()
    shifted = shift_agreement(lambda image, lung: {"same": image[0, 0], "none": 0 * lung[0, 0]}, scan_with(), lung)
    assert shifted == {"same": pytest.approx(1), "none": None}


def test_inference_leaves_every_map_on_the_scans_grid(tiny_cohort, trained, tmp_path):
    config, options = "configs/inference.json", {"ckpt": str(trained), "output_dir": str(tmp_path)}
    options |= {"image": str(tiny_cohort.parent / "p0.nii.gz"), "shifts": 1, "sigma": 0, "refine": False}
    run(config, **options, explain="weight,location,pca_output,integrated_gradients_input,cubelets")
    scan, volumes = nib.load(options["image"]), {}
    for path in (tmp_path / "maps").glob("*.nii.gz"):
        image = nib.load(path)
        assert image.shape == scan.shape and np.allclose(image.affine, scan.affine), path
        volumes[path.name.removesuffix(".nii.gz").removeprefix("p0_")] = image
    assert set(volumes) == {"heat", "weight", "location", "pca_output", "integrated_gradients_input"}
    values = {name: np.asarray(image.dataobj) for name, image in volumes.items()}
    assert values["weight"].sum() == pytest.approx(1, abs=1e-4)
    assert agreement(*(torch.tensor(values[name]) for name in ("weight", "location"))) == pytest.approx(-1, abs=1e-3)
    assert np.allclose(values["heat"], values["weight"] * values["heat"].sum(), atol=1e-6)
    assert values["pca_output"].dtype.names == ("R", "G", "B") and values["pca_output"]["G"].max() == 255
    assert b"completeness_error" in volumes["integrated_gradients_input"].header["descrip"].tobytes()
    assert len(np.unique(values["integrated_gradients_input"])) <= 64  # of 4 x 4 x 4 patches, none smoothed away
    assert np.asarray(Image.open(tmp_path / "maps" / "p0_cubelets.png")).std() > 1
    before = (tmp_path / "maps" / "p0_weight.nii.gz").stat().st_mtime_ns
    run(config, **options, explain="weight,location,pca_output,integrated_gradients_input,cubelets")
    assert (tmp_path / "maps" / "p0_weight.nii.gz").stat().st_mtime_ns == before
    run(config, **options, explain="weight", explain_target="death")
    assert (tmp_path / "maps" / "p0_weight.nii.gz").stat().st_mtime_ns > before


def test_a_map_that_says_nothing_is_said(network):
    image, lung = (MetaTensor(x[0], affine=torch.eye(4)) for x in (scan_with(), torch.ones_like(scan_with())))
    image.meta |= {"original_affine": torch.eye(4), "spatial_shape": (SIZE,) * 3}
    scan = {"patient_id": "a", "image": image, "lung": lung}
    model = SimpleNamespace(network=network, objective=CenTime(variance=0.01), familiarity=[None])
    output = {"pred": network(image[None])[0], "pmf": torch.ones(100) / 100}
    for target, notes in {
        "location": None,
        "death": "the explanation layercam_input of the target death is 0 everywhere",
    }.items():
        explanations = Explanations(model, "layercam_input,occlusion", target, "mean", 5, 4, (-1000, 200))
        found = list(explanations.of(scan, output))
        assert [each.name for each in found] == ["layercam_input", "occlusion"]
        assert (scan.get("notes") or "").startswith(notes or "") and bool(notes) == ("notes" in scan)
    assert doubt(torch.tensor([torch.nan]), {}) and "20%" in doubt(torch.ones(1), {"completeness_error": 0.2})


def test_evaluation_scores_each_map(tiny_cohort, trained, tmp_path):
    options = {"cohort": str(tiny_cohort), "ckpt": str(trained), "output_dir": str(tmp_path), "shifts": 1}
    run("configs/evaluate.json", **options, explain=["heat", "location", "occlusion", "pca_input"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["explanations"]) == ["heat", "location", "occlusion"]
    heat = {name: {**entry} for name, entry in metrics["localisation"].items() if isinstance(entry, dict)}
    heat.pop("average_precision_ceiling")
    assert all(metrics["explanations"]["heat"][name] == entry for name, entry in heat.items())
    table = pd.read_csv(tmp_path / "metrics_per_scan.csv")
    assert {"average_precision", "heat_average_precision", "occlusion_auroc"} <= set(table)
    died = table.dropna(subset="auroc")
    assert len(died) and np.allclose(died["auroc"], died["heat_auroc"])
    assert (tmp_path / "maps" / f"{table['patient_id'][0]}_pca_input.nii.gz").is_file()
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("config", "override", "said"),
    [
        ("configs/inference.json", {"explain": "heet"}, "heet is no explainer"),
        ("configs/inference.json", {"explain": "rise", "explain_fill": "water"}, "--explain_fill is water"),
        ("configs/inference.json", {"explain": "rise", "explain_target": "life"}, "--explain_target is life"),
        (["configs/inference.json", "configs/ensemble.json"], {"explain": "heat"}, "leave it out for an ensemble"),
        ("configs/evaluate.json", {"explain": "heat", "maps_dir": "."}, "leave it out with --maps_dir"),
    ],
)
def test_bad_options_are_one_sentence(tiny_cohort, trained, tmp_path, config, override, said):
    with pytest.raises(InputError, match=said):
        run(config, cohort=str(tiny_cohort), ckpt=str(trained), output_dir=str(tmp_path), **override)
