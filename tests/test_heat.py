# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Heat: nothing of a patient's risk is lost on its way to voxels. Grid shifts: a finer map, still a survival map."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from scipy.stats import entropy
from sklearn.metrics import average_precision_score
from torch import Tensor

from bundle.errors import InputError
from bundle.grids import mask_on_grid
from bundle.maps import GridShiftInferer, patch_heat, to_scan_space, to_voxels
from bundle.maps.refinement import appearance_ratio, bin_of, likelihood_ratio
from bundle.networks import SurvivalMapNet
from bundle.survival import Severity, death_by, log_pmf, severity_numbers


def random_map(*grid: int, batch: int = 2) -> Tensor:
    location = 60 * torch.rand(batch, *grid)
    weight = torch.rand(batch, *grid).flatten(1).softmax(1).view(batch, *grid)
    return torch.stack([location, weight], 1)


def random_lung(*shape: int, batch: int = 2) -> Tensor:
    lung = F.interpolate(torch.rand(batch, 1, 4, 4, 4), shape, mode="trilinear") > 0.5
    assert 0.05 < lung.float().mean() < 0.95
    return lung.float()


# ---------------------------------------------------------------------------------------------------------- heat


def test_patch_heat_sums_to_the_probability_of_death():
    survival_map = random_map(3, 4, 5)
    death = death_by(log_pmf(survival_map, 100, 36.0).exp(), 24)
    heat = patch_heat(survival_map, death)
    assert heat.shape == (2, 1, 3, 4, 5)
    torch.testing.assert_close(heat.sum((1, 2, 3, 4)), death)
    torch.testing.assert_close(heat[:, 0], death.view(2, 1, 1, 1) * survival_map[:, 1])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(16, 16, 16), (13, 15, 9)])
def test_total_heat_is_the_probability_of_death(shape, masked):
    death = torch.tensor([0.8, 0.03])
    grid = [-(-n // 4) for n in shape]
    lung = random_lung(*shape) if masked else None
    heat = to_voxels(patch_heat(random_map(*grid), death), 4, shape, lung)
    assert heat.shape == (2, 1, *shape) and bool((heat >= 0).all())
    torch.testing.assert_close(heat.sum((1, 2, 3, 4)), death)
    if lung is not None:
        assert bool((heat[lung == 0] == 0).all()) and bool((heat[lung == 1] > 0).all())


def test_a_patch_is_spread_evenly_over_its_cell():
    heat = random_map(2, 3, 2)[:, 1:]
    voxels = to_voxels(heat, 3, (6, 9, 6), None)
    for z, y, x in np.ndindex(6, 9, 6):
        torch.testing.assert_close(voxels[:, 0, z, y, x], heat[:, 0, z // 3, y // 3, x // 3] / 27)


def test_the_cut_cells_of_the_border_take_their_share():
    """A cell cut by the image's border keeps the density of the others; the sum is right all the same."""
    voxels = to_voxels(torch.full((1, 1, 2, 1, 1), 0.25), 4, (6, 4, 4), None)
    torch.testing.assert_close(voxels, torch.full((1, 1, 6, 4, 4), 0.5 / 96))


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_flipped_heat_gives_flipped_voxels(axis):
    heat, lung = patch_heat(random_map(3, 4, 2), torch.tensor([0.5, 0.9])), random_lung(12, 16, 8)
    voxels = to_voxels(heat, 4, (12, 16, 8), lung)
    flipped = to_voxels(heat.flip(axis), 4, (12, 16, 8), lung.flip(axis))
    torch.testing.assert_close(flipped, voxels.flip(axis))


def test_a_patient_without_risk_has_no_heat():
    heat = to_voxels(torch.zeros(1, 1, 2, 2, 2), 4, (8, 8, 8), random_lung(8, 8, 8, batch=1))
    assert bool((heat == 0).all())


# --------------------------------------------------------------------------------------------------- grid shifts


def whole(volume: Tensor, patch: int, mode: str = "constant") -> Tensor:
    """Padded to whole patches."""
    return F.pad(volume, [n for size in volume.shape[:1:-1] for n in (0, -size % patch)], mode=mode)


def softmin_map(location: Tensor, beta: float, inside: Tensor | None = None) -> Tensor:
    score = -beta * location
    score = score if inside is None else score.masked_fill(~inside, -torch.inf)
    weight = score.flatten(1).softmax(1).view_as(location)
    return torch.stack([location * (weight > 0), weight], 1)


def brightness(patch: int, beta: float):
    """The brighter a patch, the shorter its life; patches without lung have no weight. As plain as a network gets."""

    def network(image: Tensor, lung: Tensor | None = None) -> Tensor:
        inside = None if lung is None else F.avg_pool3d(whole(lung, patch), patch)[:, 0] >= 0.25
        return softmin_map(60 - 50 * F.avg_pool3d(whole(image, patch, "replicate"), patch)[:, 0], beta, inside)

    return network


def grids(shifts: int, stride: int, sigma: float = 0.0, refine: bool = False, **kwargs) -> GridShiftInferer:
    return GridShiftInferer(shifts, stride, sigma, refine, **kwargs)


def shifted(image: Tensor, lung: Tensor, shift: Sequence[int]) -> tuple[Tensor, Tensor]:
    """With so many voxels in front, and behind what makes whole patches of 4 of the rest."""
    pad = [n for start, size in zip(shift[::-1], image.shape[:1:-1]) for n in (start, -size % 4)]
    return F.pad(image, pad, mode="replicate"), F.pad(lung, pad)


def sphere(size: int, radius: float) -> Tensor:
    axis = (torch.arange(size) - (size - 1) / 2 - 0.7).square()
    return ((axis[:, None, None] + axis[:, None] + axis) <= radius**2).float()[None, None]


def test_one_shift_is_the_network_itself():
    net = SurvivalMapNet(patch_size=4, dim=16).eval()
    image, lung = torch.rand(1, 1, 16, 16, 16), random_lung(16, 16, 16, batch=1)
    torch.testing.assert_close(grids(1, 4)(image, net, lung=lung), net(image, lung), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shifts", [2, 4])
@pytest.mark.parametrize("shape", [(16, 16, 16), (13, 18, 9)])
@pytest.mark.parametrize("masked", [True, False])
def test_the_mean_of_grids_is_a_survival_map(shifts, shape, masked):
    net = SurvivalMapNet(patch_size=4, dim=16).eval()
    nn.init.normal_(net.head.to_location[-1].weight, std=0.2)
    lung = None
    if masked:
        lung = random_lung(*shape)
        lung[:, :, 6:] = 0
    location, weight = grids(shifts, 4)(torch.rand(2, 1, *shape), net, lung=lung).unbind(1)
    assert weight.shape == (2, *[-(-n // 4) * shifts for n in shape])
    torch.testing.assert_close(weight.sum((1, 2, 3)), torch.ones(2))
    assert bool(location.isfinite().all()) and bool(((location != 0) == (weight > 0)).all())
    if masked:
        # Cells further from the lung than any patch that holds some of it have no weight.
        near = F.max_pool3d(lung, 7, stride=1, padding=3)
        near = F.max_pool3d(near, 4 // shifts, ceil_mode=True)[:, 0]
        cells = weight[:, : near.shape[1], : near.shape[2], : near.shape[3]]
        assert bool((cells[near == 0] == 0).all()) and bool((near == 0).any())


@pytest.mark.parametrize("shifts", [2, 4])
def test_each_cell_is_the_mean_of_the_patches_that_cover_it(shifts):
    """Brightness is a known function of place, so the map of shifted grids can be written down cell by cell."""
    patch, size = 4, 12
    cell = patch // shifts
    image = torch.rand(1, 1, size, size, size)
    network = brightness(patch, beta=0.2)
    location, weight = grids(shifts, patch)(image, network)[0]

    mean, log = torch.zeros(2, *[size // cell] * 3)
    patients = []
    cells = list(product(range(size // cell), repeat=3))
    for shift in product({2: (0, 3), 4: (0, 5, 2, 7)}[shifts], repeat=3):
        z, y, x = [n * cell for n in shift]
        loc, w = network(F.pad(image, [x, 0, y, 0, z, 0], mode="replicate"))[0]
        # the patch of this grid that holds the cell's first voxel
        at = torch.tensor([[(n * cell + s) // patch for n, s in zip(c, (z, y, x))] for c in cells]).unbind(1)
        mean += loc[at].view_as(mean) / shifts**3
        log += w[at].log().view_as(log) / shifts**3
        patients.append(float((loc * w).sum()))
    torch.testing.assert_close(weight, log.exp() / log.exp().sum())
    torch.testing.assert_close(weight, (-0.2 * mean).flatten().softmax(0).view_as(mean))
    torch.testing.assert_close(location, mean + float(np.median(patients)) - (weight * mean).sum())


@pytest.mark.parametrize("shape", [(12, 12, 12), (13, 9, 10)])
def test_the_patient_location_is_the_median_of_the_grids(shape):
    net = SurvivalMapNet(patch_size=4, dim=16).eval()
    nn.init.normal_(net.head.to_location[-1].weight, std=0.2)
    image, lung = torch.rand(2, 1, *shape), random_lung(*shape)
    location, weight = grids(2, 4)(image, net, lung=lung).unbind(1)
    patients = []
    for shift in product((0, 2), repeat=3):
        patients.append(net(*shifted(image, lung, shift)).prod(1).sum((1, 2, 3)).detach())
    torch.testing.assert_close((location * weight).sum((1, 2, 3)), torch.from_numpy(np.median(torch.stack(patients), 0)))


@pytest.mark.parametrize("share, seen_by, months", [(0.2, 7, 0), (0.6, 1, 100)])
def test_a_patient_is_as_ill_as_most_grids_say(share, seen_by, months):
    """A bright cube of one patch, cut up by all grids but one into halves, quarters or eighths."""
    image, said = torch.zeros(1, 1, 16, 16, 16), []
    image[..., 4:8, 4:8, 4:8] = 1.0

    def network(image: Tensor, lung: Tensor | None = None) -> Tensor:
        survival_map = softmin_map(torch.where(F.avg_pool3d(image, 4, ceil_mode=True)[:, 0] > share, 0.0, 100.0), 1.0)
        said.append(float(survival_map.prod(1).sum()))
        return survival_map

    location, weight = grids(2, 4)(image, network).unbind(1)
    assert sum(one < 1 for one in said) == seen_by
    assert float((location * weight).sum()) == pytest.approx(months, abs=1e-3)


def test_extra_channels_go_through_the_grids_and_change_nothing_else():
    net = SurvivalMapNet(patch_size=4, dim=16, extra=2).eval()
    nn.init.normal_(net.head.to_location[-1].weight, std=0.2)
    nn.init.normal_(net.to_extra.weight, std=0.2)
    image, lung = torch.rand(2, 1, 13, 9, 10), random_lung(13, 9, 10)
    inferer = grids(2, 4, sigma=0.5, refine=True)
    survival_map = inferer(image, net, lung=lung)
    patients = []
    for shift in product((0, 2), repeat=3):
        one = net(*shifted(image, lung, shift))
        patients.append((one[:, 1:3] * one[:, 3:]).sum((2, 3, 4)).detach())
    patient = torch.from_numpy(np.median(torch.stack(patients), 0))
    torch.testing.assert_close((survival_map[:, 1:3] * survival_map[:, 3:]).sum((2, 3, 4)), patient)
    net.to_extra = None
    torch.testing.assert_close(survival_map[:, [0, 3]], inferer(image, net, lung=lung))


def test_a_wall_one_voxel_thick_stays_thin():
    """Every patch that holds some of the wall is hot alike; the shifted grids tell which voxel of it that was."""

    def holds(image: Tensor) -> Tensor:
        return softmin_map(100 - 90 * (F.max_pool3d(whole(image, 4), 4)[:, 0] > 0.5).float(), 0.1)

    wall = torch.zeros(1, 1, 16, 16, 16)
    wall[:, :, 6] = 1
    heat = grids(4, 4)(wall, holds)[0, 1]
    assert float(heat[6].sum()) > 0.8


@pytest.mark.parametrize(
    "shifts, few, begin",
    [
        (1, False, {0: 1}),
        (2, False, {0: 4, 6: 4}),
        (4, False, {0: 16, 2: 16, 5: 16, 7: 16}),
        (4, True, {0: 2, 2: 2, 5: 2, 7: 2}),
        (1, True, {0: 1}),
    ],
)
def test_grids_begin_in_either_half_of_an_attention_window(shifts, few, begin):
    """Windows are two patches of 4 wide: a patch that lies at their front in some grids lies at their back in others."""
    places = []

    def network(image: Tensor) -> Tensor:
        places.append(image[0, 0].nonzero()[0])
        return torch.ones(1, 2, *[-(-size // 4) for size in image.shape[2:]])

    image = torch.zeros(1, 1, 12, 12, 12)
    image[..., 11, 11, 11] = 1
    grids(shifts, 4, few_origins=few)(image, network)
    for axis in (torch.stack(places) - 11).unbind(1):
        assert dict(zip(*(n.tolist() for n in axis.unique(return_counts=True)))) == begin


def test_few_origins_say_of_a_patient_what_all_do():
    """Of disease along the faces of a scan, too: how patches cut it depends on the axis, and 0 is where it fits them."""
    inferers = grids(4, 4), grids(4, 4, few_origins=True), grids(2, 4)
    off = []
    for width in range(1, 7):
        rind = torch.ones(1, 1, 24, 24, 24)
        rind[..., width:-width, width:-width, width:-width] = 0
        every, eight, two_an_axis = ((m[:, 0] * m[:, 1]).sum() for m in (f(rind, brightness(4, 0.1)) for f in inferers))
        off.append(torch.stack([eight - every, two_an_axis - every]).abs())
    eight, two_an_axis = torch.stack(off).mean(0).tolist()
    assert eight < 0.25 * two_an_axis, (eight, two_an_axis)


SEVERITY = Severity(-5.0, 120.0, -1e6, [0.0] * 8, [1.0] * 8, [0.1, 5.0, 1.0, -1.0, 0.3, 2.0, -3.0, 4.0], offset=2.0)


def ill_network(**kwargs) -> SurvivalMapNet:
    """Patches in danger, more and less so, everywhere."""
    net = SurvivalMapNet(patch_size=4, dim=16, **kwargs).eval()
    nn.init.normal_(net.head.to_location[-1].weight, std=0.3)
    nn.init.constant_(net.head.bias, 40.0)
    return net


@pytest.mark.parametrize("head", ["lse", "softmin", "attention", "hazard"])
def test_severity_is_fitted_to_and_used_with_the_same_numbers(head):
    """The medians of those of 8 origins; what all origins say of the patient is moved by what these tell, once."""
    net, image, lung = ill_network(head=head), torch.rand(2, 1, 13, 18, 16), random_lung(13, 18, 16)
    few, every = grids(4, 4, few_origins=True), grids(4, 4)
    _, numbers = few.read(image, net, lung=lung)
    plain, same = every.read(image, net, lung=lung)
    assert len(few.origins) == 8 and len(every.origins) == 64 and set(few.origins) < set(every.origins)
    torch.testing.assert_close(same, numbers, rtol=0, atol=0)
    each = []
    for origin in few.origins:
        moved, inside = shifted(image, lung, [start + 4 * (start % 2) for start in origin])
        with torch.no_grad():
            one = net(moved, inside)
            share = F.avg_pool3d(whole(inside, 4), 4)[:, 0] * (one[:, 1] > 0)
            each.append(severity_numbers(one, net.danger(one, share), share))
    torch.testing.assert_close(numbers, torch.from_numpy(np.median(torch.stack(each), 0)))
    found = grids(4, 4, severity=SEVERITY)(image, net, lung=lung)
    torch.testing.assert_close(found[:, 1], plain[:, 1], rtol=0, atol=0)
    inside = plain[:, 1] > 0
    months = SEVERITY(numbers).view(2, 1, 1, 1) * inside
    torch.testing.assert_close(found[:, 0], plain[:, 0] + months)
    assert float(months.abs().max()) > 0.1 and bool((found[:, 0][~inside] == 0).all())


def test_several_networks_have_a_severity_each():
    ill, other, image = ill_network(clinical_dim=2), ill_network(clinical_dim=2), torch.rand(1, 1, 16, 16, 16)
    clinical = torch.randn(1, 2)
    plain = grids(2, 4)(image, ill, clinical=clinical)
    inferer = grids(2, 4, severity={ill: SEVERITY, other: None})
    assert float((inferer(image, ill, clinical=clinical) - plain)[:, 0].abs().min()) > 0.1
    torch.testing.assert_close(inferer(image, other, clinical=clinical), grids(2, 4)(image, other, clinical=clinical))


def test_the_lung_moves_with_the_image():
    """A network that only looks at the lung: its weights must stay around the middle of the lung."""
    lung = torch.zeros(1, 1, 16, 16, 16)
    lung[..., 4:12, 4:12, 4:12] = 1
    weight = grids(2, 4)(torch.rand(1, 1, 16, 16, 16), brightness(4, beta=0.0), lung=lung)[0, 1]
    place = torch.arange(8) * 2 + 0.5
    for axis in range(3):
        others = [n for n in range(3) if n != axis]
        assert float((weight.sum(others) * place).sum()) == pytest.approx(7.5, abs=1e-4)


def test_sharper_than_one_grid_on_a_sphere():
    patch = 8
    truth = sphere(32, 9.0)
    image = truth + 0.05 * torch.randn_like(truth)
    network = brightness(patch, beta=0.1)
    score = {}
    for shifts in (1, 2, 4):
        survival_map = grids(shifts, patch)(image, network)
        heat = to_voxels(patch_heat(survival_map, torch.ones(1)), patch // shifts, (32, 32, 32), None)
        score[shifts] = average_precision_score(truth.flatten(), heat.flatten())
        torch.testing.assert_close(heat.sum(), torch.tensor(1.0))
    assert score[2] > score[1] + 0.02 and score[4] > score[2] - 0.001


def test_smoothing_is_a_gaussian_whose_width_is_in_cells():
    point = torch.full((1, 13, 13, 13), 1e-30)
    point[0, 6, 6, 6] = 1.0
    said = torch.stack([torch.full_like(point, 40.0), point], 1)
    location, weight = grids(1, 4, sigma=1.5)(torch.zeros(1, 1, 52, 52, 52), lambda image: said)[0]
    place, line = torch.arange(13.0), weight.sum((1, 2))
    assert float((place * line).sum()) == pytest.approx(6, abs=1e-4)
    # The Gaussian is cut at three sigma, which costs 3 % of its variance.
    assert float(((place - 6).square() * line).sum()) == pytest.approx(1.5**2, rel=0.05)
    assert float((location * weight).sum()) == pytest.approx(40, abs=1e-3)


def test_refinement_finds_the_bright_voxels_within_hot_patches():
    image = torch.full((1, 1, 16, 16, 16), 0.2)
    image[:, :, 7, 2:14, 2:14] = 1.0
    network = brightness(4, beta=0.2)
    plain, refined = (grids(4, 4, refine=refine)(image, network) for refine in (False, True))
    wall = image[0, 0] > 0.5
    assert float(refined[0, 1][wall].sum()) > 2 * float(plain[0, 1][wall].sum())
    for survival_map in (plain, refined):
        assert float(survival_map[0, 1].sum()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close((plain[:, 0] * plain[:, 1]).sum(), (refined[:, 0] * refined[:, 1]).sum())
    flipped = grids(4, 4, refine=True)(image.flip(3), network)
    torch.testing.assert_close(flipped[:, 1].flip(2)[0, :, 8], refined[0, 1, :, 8], rtol=0.5, atol=1e-4)


def test_refinement_leaves_alone_what_brightness_does_not_explain():
    image, lung = torch.full((1, 1, 16, 16, 16), 0.5), random_lung(16, 16, 16, batch=1)
    plain, refined = (grids(4, 4, refine=r)(image, brightness(4, 0.2), lung=lung) for r in (False, True))
    torch.testing.assert_close(refined, plain)


@pytest.mark.parametrize("masked", [False, True])
def test_refinement_finds_nothing_in_a_map_that_knows_nothing(masked):
    """The border of the lung weighs less than what lies further in, where the lesions are."""
    image = 0.3 + 0.02 * torch.randn(1, 1, 32, 32, 32)
    image[..., 10:18, 10:18, 10:18] += 0.5
    lung = torch.zeros_like(image)
    lung[..., 3:29, 3:29, 3:29] = 1

    def even(image: Tensor, lung: Tensor | None) -> Tensor:
        inside = F.avg_pool3d(torch.ones_like(image) if lung is None else lung, 4, ceil_mode=True)[:, 0] > 0
        return softmin_map(torch.full(inside.shape, 40.0), 1.0, inside)

    lung = lung if masked else None
    plain, refined = (grids(4, 4, 0.5, refine=r)(image, even, lung=lung)[0, 1] for r in (False, True))
    torch.testing.assert_close(refined, plain, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape, sigma, rtol, share", [((64,), 1.5, 0.01, 0.999), ((24, 24), 1.0, 0.05, 0.99)])
def test_the_ratio_is_that_of_smoothed_histograms(shape, sigma, rtol, share):
    values, weight, even = (torch.rand(n, 5000) for n in (len(shape), 1, 1))
    where, places = torch.zeros(5000, dtype=torch.long), []
    for v, bins in zip(values, shape):
        where = where * bins + bin_of(v, bins)
        ordered = np.sort(v.double().numpy())
        low, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.001, 0.999))
        places.append(np.clip(np.floor((v.double().numpy() - low) / (high - low) * bins), 0, bins - 1).astype(int))
    ratio = likelihood_ratio(where, shape, weight[0], even[0], sigma)
    hot, all_ = np.zeros((2, *shape))
    np.add.at(hot, tuple(places), weight[0].numpy() / weight[0].numpy().sum())
    np.add.at(all_, tuple(places), even[0].numpy() / even[0].numpy().sum())
    hot, all_ = (gaussian_filter(h, sigma, mode="constant", truncate=4) + 1e-6 for h in (hot, all_))
    # MONAI's Gaussian is a little wider, the more so the narrower it is; and a few cells fall beside a bin's edge in single
    # precision
    assert np.isclose(ratio, (hot / all_)[tuple(places)], rtol=rtol).mean() > share


def test_the_ratio_of_brightness_keeps_a_texture_and_an_evenly_bright_lesion_as_they_are():
    image = torch.rand(32, 32, 32)
    lesion = torch.zeros(32, 32, 32, dtype=torch.bool)
    lesion[8:16, 8:16, 8:16] = True
    weight = torch.where(lesion, 1.0, 1e-6).flatten()

    def ratio_of(image):
        where = bin_of(image.flatten(), 64)
        return likelihood_ratio(where, (64,), weight, torch.ones_like(weight), 1.5).view(32, 32, 32)

    assert float(ratio_of(image).std()) < 0.25  # of 512 draws in 64 bins
    image[lesion] = 3.0
    ratio = ratio_of(image)
    assert float(ratio[lesion].std()) < 1e-3 and float(ratio[lesion].min()) > 20
    assert float(ratio[~lesion].max()) < 1


def test_refinement_has_no_say_outside_the_lung():
    brightness, weight, even = torch.rand(3, 2, 20, 20, 20)
    inside = torch.rand(2, 20, 20, 20) < 0.7
    ratio = appearance_ratio(brightness, inside, weight * inside, even * inside)
    assert (ratio[~inside] == 1).all() and (ratio[inside] != 1).any()


def test_refinement_keeps_noise_and_an_evenly_bright_lesion_as_they_are():
    image = torch.rand(1, 32, 32, 32)
    weight = torch.full((1, 32, 32, 32), 1e-6)
    lesion = torch.zeros_like(weight, dtype=torch.bool)
    lesion[:, 8:16, 8:16, 8:16] = True
    weight[lesion] = 1.0
    inside, even = weight > 0, torch.ones_like(weight)
    ratio = appearance_ratio(image, inside, weight, even)
    assert 0.5 < float(ratio[~lesion].mean()) < 1.1 and float(ratio[~lesion].std()) < 0.6  # by 512 draws in 576 bins
    image[lesion] = 3.0
    ratio = appearance_ratio(image, inside, weight, even)
    core = torch.zeros_like(lesion)
    core[:, 9:15, 9:15, 9:15] = True
    assert float(ratio[core].std()) < 1e-3 and float(ratio[lesion].min()) > 4
    assert float(ratio[~lesion].quantile(0.95)) < 0.5


def test_refinement_completes_a_lesion_of_another_texture():
    """Of the brightness of the rest but smooth, and hot in a half of it only."""
    image = 0.5 + 0.1 * torch.randn(1, 32, 32, 32)
    image[:, 8:24, 8:24, 8:24] = 0.5 + 0.01 * torch.randn(1, 16, 16, 16)
    weight = torch.full((1, 32, 32, 32), 1e-6)
    weight[:, 8:16, 8:24, 8:24] = 1.0
    ratio = appearance_ratio(image, weight > 0, weight, torch.ones_like(weight))
    assert float(ratio[:, 16:23, 9:23, 9:23].quantile(0.05)) > 3 * float(ratio[:, 25:].quantile(0.95))


def test_refinement_does_not_show_what_protects_as_danger():
    """As bright as the lesion, and found safer than all the rest."""
    image = 0.3 + 0.02 * torch.randn(1, 32, 32, 32)
    lesion, shield = torch.zeros(2, 1, 32, 32, 32, dtype=torch.bool)
    lesion[:, 4:12, 4:12, 4:12] = shield[:, 18:28, 18:28, 18:28] = True
    image[lesion | shield] = 0.8
    weight = torch.where(lesion, 1.0, torch.where(shield, 0.01, 0.05))
    refined = weight * appearance_ratio(image, weight > 0, weight, torch.ones_like(weight))
    assert float(refined[shield].max()) < 0.3 * float(refined[~lesion & ~shield].mean())
    assert float(refined[lesion].mean()) > 100 * float(refined[~lesion].mean())


def test_refinement_adds_the_less_the_less_a_map_says(monkeypatch):
    """Noise that happens to prefer what is bright: the looks' power is its divergence from an even map."""
    image = torch.rand(2, 16, 16, 16)
    even = 1 + torch.rand(2, 16, 16, 16)
    weight = even * torch.where(image > 0.9, torch.tensor([1.5, 200.0]).view(2, 1, 1, 1), 1.0)
    inside = torch.ones_like(image) > 0
    ratio = appearance_ratio(image, inside, weight, even)
    monkeypatch.setattr("bundle.maps.refinement.SAYS_ENOUGH", 1e-9)
    looks = appearance_ratio(image, inside, weight, even)
    divergence = entropy(weight[0].flatten().numpy(), even[0].flatten().numpy())  # normalises both
    assert divergence < 0.05 and float(ratio[0].max()) < 1.2 < float(looks[0].max())
    torch.testing.assert_close(ratio[0], looks[0].pow(float(divergence) / 0.5), rtol=1e-4, atol=0)
    torch.testing.assert_close(ratio[1], looks[1])


@pytest.mark.parametrize("shifts, stride", [(3, 4), (0, 4), (8, 4)])
def test_shifts_that_do_not_divide_the_stride_are_refused(shifts, stride):
    with pytest.raises(InputError, match="must divide the stride"):
        GridShiftInferer(shifts, stride)


@pytest.mark.parametrize(
    "axes, mm, shear",
    [
        ((0, 1, 2), (1.7, 1.7, 1), 0),
        ((1, 2, 0), (-1.7, 0.9, -1.5), 0),
        ((2, 0, 1), (5, -0.5, 1), 0),
        ((0, 1, 2), (1, 1, 2), 0.3),
    ],
)
def test_scan_space_equals_a_general_resampling_that_keeps_the_sum(axes, mm, shear):
    rotation = Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix()
    own, scan = np.eye(4), np.eye(4)
    own[:3, :3], own[:3, 3] = 3 * rotation, [5, -20, 7]
    scan[:3, :3] = rotation[:, axes] * mm @ np.array([[1, 0, shear], [0, 1, 0], [0, 0, 1]])
    shape = (50, 60, 40)
    middle = own[:3, :3] @ [9.5, 11.5, 8.5] + own[:3, 3]
    scan[:3, 3] = middle - scan[:3, :3] @ [n / 2 for n in shape]
    volume = MetaTensor(torch.rand(1, 20, 24, 18), affine=torch.tensor(own))
    found = to_scan_space(volume, torch.tensor(scan), shape)
    general = SpatialResample(mode="bilinear", padding_mode="zeros")(volume, torch.tensor(scan), spatial_size=shape)
    general = (general * (volume.sum() / general.sum())).as_tensor()
    torch.testing.assert_close(found.as_tensor(), general, rtol=1e-4, atol=1e-6)
    assert found.shape == (1, *shape) and np.allclose(found.affine, scan)
    assert (found == 0).any() and found.sum().item() == pytest.approx(volume.sum().item(), rel=1e-4)


@pytest.mark.parametrize("mm", [1.1, 2.99, 4.3])
def test_heat_stays_in_the_lung_and_is_as_hot_at_its_border(mm):
    lung = torch.zeros(1, 20, 20, 20)
    lung[:, 4:15, 5:16, 3:14] = 1
    own, scan = np.diag([3.0, 3, 3, 1]), np.diag([mm, mm, mm, 1])
    shape = (int(60 / mm),) * 3
    volume = MetaTensor(lung / lung.sum(), affine=torch.tensor(own))
    found = to_scan_space(volume, torch.tensor(scan), shape, lung).as_tensor()
    inside = torch.from_numpy(mask_on_grid(MetaTensor(lung, affine=torch.tensor(own)), torch.tensor(scan), shape))
    assert ((found[0] > 0) == (inside > 0)).all()
    torch.testing.assert_close(found[0][inside > 0], (1 / inside.sum()).expand(int(inside.sum())))  # even, as it was
    assert (to_scan_space(volume, torch.tensor(scan), shape)[0][inside == 0] > 0).any()
    everywhere = torch.ones_like(lung)
    spread = MetaTensor(torch.rand(1, 20, 20, 20), affine=torch.tensor(own))
    within = slice(3, -3)
    both = [to_scan_space(spread, torch.tensor(scan), shape, mask)[0, within, within, within] for mask in (None, everywhere)]
    torch.testing.assert_close(both[1] / both[1].sum(), both[0] / both[0].sum(), rtol=1e-4, atol=1e-9)
