# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The network: what its map promises, its attention against plain loops, its inputs checked, TorchScript."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor

from bundle.errors import InputError
from bundle.networks import SurvivalMapNet
from bundle.networks.attention import Attention, tokens_of
from bundle.networks.heads import HEADS, Head
from bundle.networks.patches import PatchEmbed, neighbours_correlation, on_grid, share_of_lung, soft_histogram


def lively(**kwargs) -> SurvivalMapNet:
    """A small network whose every part has something to say: zero initialisations are drawn at random."""
    net = SurvivalMapNet(**{"dim": 32, **kwargs})
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
    return net.eval()


def ball(size: int, radius: float, centre: tuple[float, float, float]) -> Tensor:
    """A ball of ones, (1, 1, size, size, size)."""
    axis = torch.arange(size, dtype=torch.float32)
    z, y, x = [(axis - c).square() for c in centre]
    return ((z[:, None, None] + y[:, None] + x) <= radius**2).float()[None, None]


def two_lungs() -> Tensor:
    """Lungs of two scans, of different sizes and places, with borders that cut patches and windows, (2, 1, 24, ...)."""
    return torch.cat([ball(24, 9.3, (11, 12, 10)), ball(24, 6.1, (14, 8, 15))])


def without_position(net: SurvivalMapNet) -> SurvivalMapNet:
    """The same network, blind to where a patch lies."""
    nn.init.zeros_(net.position.weight)
    nn.init.zeros_(net.position.bias)
    return net


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ the map


@pytest.mark.parametrize("head", HEADS)
def test_weights_sum_to_one_over_the_lung_and_are_zero_outside(head):
    lung = two_lungs()
    location, weight = lively(head=head)(torch.rand(2, 1, 24, 24, 24), lung).unbind(1)
    torch.testing.assert_close(weight.sum((1, 2, 3)), torch.ones(2))
    share = F.avg_pool3d(lung, 4)[:, 0]
    assert 0 < (share >= 0.25).float().mean() < 1
    assert bool((weight[share >= 0.25] > 0).all())
    assert bool((weight[share < 0.25] == 0).all()) and bool((location[share < 0.25] == 0).all())


def test_a_lung_thinner_than_a_patch_keeps_its_best_patches():
    lung = torch.zeros(2, 1, 16, 16, 16)
    lung[0, 0, 5, 5, 5] = 1  # one voxel in all: 1/64 of its patch
    lung[1] = 1
    weight = lively()(torch.rand(2, 1, 16, 16, 16), lung)[:, 1]
    assert weight[0, 1, 1, 1] == 1 and weight[0].sum() == 1
    assert int((weight[1] > 0).sum()) == 4**3


def test_the_narrow_window_shows_patches_once_more():
    """What enters the first layer: 8 voxels, 8 standardised, mean, log of the deviation, and 8 in the narrow window."""
    embed, seen = PatchEmbed(2, 2, 4, narrow_window=(0.25, 0.75), texture=False), []
    embed.layers.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.tensor([0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0, 0.9]).view(1, 1, 2, 2, 2)
    index = torch.zeros(1, 4, dtype=torch.long)
    embed(image, None, index)
    assert seen[0].shape == (1, 26)
    torch.testing.assert_close(seen[0][0, 18:], torch.tensor([0.0, -1.0, -0.5, 0.0, 0.5, 1.0, 0.0, 0.4]))
    lung = (image < 1).float()  # what is no lung is as the mean of what is
    embed(image, lung, index)
    assert float(seen[1][0, 24]) == pytest.approx(((image * lung).sum() / 7 - 0.5).item() / 0.25)


def test_the_soft_histogram_is_that_of_numpy_where_values_lie_on_levels_and_a_share_of_both_between():
    values = torch.randint(0, 13, (5, 64)) / 12
    inside = (torch.rand(5, 64) > 0.3).float()
    shares = soft_histogram(values, inside, 13)
    for row, value, keep in zip(shares, values.numpy(), inside.numpy() > 0):
        counts, _ = np.histogram(value[keep] * 12, bins=np.arange(14) - 0.5)
        np.testing.assert_allclose(row, counts / keep.sum(), atol=1e-5)
    between = soft_histogram(torch.tensor([[0.3, -1.0, 7.0, 0.9]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]]), 3)
    torch.testing.assert_close(between, torch.tensor([[1.4, 0.6, 1.0]]) / 3)
    assert not soft_histogram(torch.rand(1, 8), torch.zeros(1, 8), 4).any()


def test_neighbours_correlation_is_that_of_pairs_of_neighbours():
    x, inside = torch.rand(3, 4, 4, 4), (torch.rand(3, 4, 4, 4) > 0.2).float()
    for patch, mask, value in zip(x, inside, neighbours_correlation_of(x, inside)):
        pairs = [
            (patch[a] - patch[b]).item() ** 2
            for a, b in product(product(range(4), repeat=3), repeat=2)
            if sum(abs(i - j) for i, j in zip(a, b)) == 1 and a < b and mask[a] and mask[b]
        ]
        expected = 1 - np.mean(pairs) / (2 * np.var(patch[mask > 0].numpy()))
        assert float(value) == pytest.approx(expected, abs=1e-4)
    noise = torch.rand(200, 4, 4, 4)
    board = torch.tensor([[[(i + j + k) % 2 for k in range(4)] for j in range(4)] for i in range(4)]).float()[None]
    ramp = torch.arange(4.0).expand(1, 4, 4, 4)
    whole = torch.ones(200, 4, 4, 4)
    assert abs(float(neighbours_correlation_of(noise, whole).mean())) < 0.05
    assert float(neighbours_correlation_of(board, whole[:1])) == pytest.approx(-1)
    assert float(neighbours_correlation_of(ramp, whole[:1])) == pytest.approx(1 - 1 / 3 / (2 * 1.25))
    assert float(neighbours_correlation_of(whole[:1], whole[:1])) == 1


def neighbours_correlation_of(x: Tensor, inside: Tensor) -> Tensor:
    x, inside = x.reshape(len(x), -1), inside.reshape(len(x), -1)
    count = inside.sum(1, keepdim=True)
    centred = (x - (x * inside).sum(1, keepdim=True) / count) * inside
    return neighbours_correlation(centred, inside, centred.square().sum(1, keepdim=True) / count, 4)


def test_a_patch_has_the_same_histogram_however_its_voxels_lie():
    """What enters the first layer: 64 voxels, 64 standardised, mean, log of the deviation, histogram and correlation."""
    embed, seen = PatchEmbed(4, 4, 4, texture=True), []
    embed.layers.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image, index = torch.rand(1, 1, 4, 4, 4), torch.zeros(1, 4, dtype=torch.long)
    embed(image, None, index)
    embed(image.flatten()[torch.randperm(64)].view_as(image), None, index)
    assert seen[0].shape == (1, 64 + 64 + 2 + 13 + 1)
    torch.testing.assert_close(seen[0][:, 128:-1], seen[1][:, 128:-1])
    torch.testing.assert_close(seen[0][0, 130:-1], 2 * soft_histogram(image.view(1, 64), torch.ones(1, 64), 13)[0])
    assert seen[0][0, -1] == 2 * neighbours_correlation_of(image[0], torch.ones(1, 64))


def test_what_lies_outside_the_lung_changes_nothing():
    net, lung, image = lively(), two_lungs(), torch.rand(2, 1, 24, 24, 24)
    close(net(torch.where(lung > 0, image, torch.rand_like(image)), lung), net(image, lung))


@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 30, 5), (4, 4, 4), (3, 2, 1)])
@pytest.mark.parametrize("window", [0, 2])
def test_any_size_gives_a_map_of_whole_patches(shape, window):
    survival_map = lively(window=window)(torch.rand(1, 1, *shape))
    assert survival_map.shape == (1, 2, *[-(-n // 4) for n in shape])
    torch.testing.assert_close(survival_map[:, 1].sum(), torch.tensor(1.0))


@pytest.mark.parametrize("overlap, stride", [(0.0, 4), (0.5, 2), (0.25, 3), (0.9, 1)])
def test_overlap_sets_the_distance_of_patches(overlap, stride):
    net = lively(overlap=overlap)
    assert net.stride == stride
    assert net(torch.rand(1, 1, 12, 12, 12)).shape[2:] == (12 // stride,) * 3


def test_an_overlapping_patch_sees_voxels_of_its_neighbours_centred_on_its_cell():
    net = lively(overlap=0.5, window=0, depth=0, head="softmin")
    image = torch.rand(1, 1, 16, 16, 16)
    location = net(image)[0, 0]
    for i in range(16):
        changed = image.clone()
        changed[0, 0, i, 8, 8] += 1
        differs = (net(changed)[0, 0] - location).abs().amax((1, 2)) > 1e-4
        # The patch of cell k covers voxels 2k - 1 ... 2k + 2.
        assert differs.nonzero().flatten().tolist() == [k for k in range(8) if 2 * k - 1 <= i <= 2 * k + 2]


def test_overlapping_patches_say_the_same_without_a_mask_and_beside_a_scan_with_one():
    net, image, lung = lively(patch_size=8, overlap=0.5), torch.rand(2, 1, 24, 24, 24), torch.ones(2, 1, 24, 24, 24)
    lung[1, :, :8] = 0
    close(net(image[:1]), net(image, lung)[:1])


@pytest.mark.parametrize("patch_size, stride", [(4, 4), (4, 2), (4, 3), (5, 2), (3, 1), (1, 1)])
@pytest.mark.parametrize("mode", ["replicate", "constant"])
def test_patches_are_those_of_a_sliding_window(patch_size, stride, mode):
    image = torch.rand(2, 1, 2 * stride, 3 * stride, 4 * stride)
    index = (torch.rand(2, 2, 3, 4) > 0.4).nonzero()
    patches = PatchEmbed(patch_size, stride, 4).gather(image, index, mode == "replicate")
    before = (patch_size - stride) // 2
    padded = F.pad(image, [before, patch_size - stride - before] * 3, mode=mode)
    for row, (b, *cell) in zip(patches, index.tolist()):
        z, y, x = [slice(n * stride, n * stride + patch_size) for n in cell]
        assert torch.equal(row, padded[b, 0, z, y, x].flatten())


def test_batch_of_two_equals_two_singles():
    net, lung, image = lively(film_context=True, clinical_dim=3), two_lungs(), torch.rand(2, 1, 24, 24, 24)
    clinical = torch.randn(2, 3)
    together = net(image, lung, clinical)
    apart = torch.cat([net(image[i : i + 1], lung[i : i + 1], clinical[i : i + 1]) for i in range(2)])
    close(together, apart)


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("full", [True, False])
def test_padding_a_scan_to_the_size_of_its_batch_changes_nothing(window, full):
    net, image = lively(window=window), torch.rand(2, 1, 24, 24, 24)
    lung = torch.ones_like(image) if full else two_lungs()
    pad = [0, 8, 0, 4, 0, 13]  # at the end, as a batch is padded; 13 is no whole number of patches
    padded = net(F.pad(image, pad), F.pad(lung, pad))
    close(padded[:, :, :6, :6, :6], net(image, lung))
    assert padded[:, :, 6:].abs().sum() + padded[:, :, :, 6:].abs().sum() + padded[..., 6:].abs().sum() == 0


def test_shifting_a_scan_by_whole_windows_shifts_its_map():
    net, image, lung = lively(), torch.rand(2, 1, 24, 24, 24), two_lungs()
    pad = [8, 0, 16, 0, 8, 0]
    close(net(F.pad(image, pad), F.pad(lung, pad))[:, :, 2:, 4:, 2:], net(image, lung))


@pytest.mark.parametrize("window", [0, 2, 3, 4])
@pytest.mark.parametrize("axis", [2, 3, 4])
def test_flipped_scan_gives_flipped_map(window, axis):
    """Position and the order of voxels in a patch are the only things that know left from right."""
    net = without_position(lively(window=window))
    first, voxels = net.embed.layers[0].weight.data, 4**3
    for part in (first[:, :voxels], first[:, voxels : 2 * voxels], first[:, -voxels:]):
        cube = part.view(-1, 4, 4, 4)
        part.copy_(((cube + cube.flip(axis - 1)) / 2).flatten(1))
    size = 4 * (2 if window == 0 else 2 * window)  # the grid of windows maps onto itself
    image = torch.rand(2, 1, size, size, size)
    lung = (torch.rand(image.shape[0], 1, size // 4, size // 4, size // 4) > 0.3).float()
    for n in (2, 3, 4):
        lung = lung.repeat_interleave(4, n)
    survival_map = net(image, lung)
    close(net(image.flip(axis), lung.flip(axis)), survival_map.flip(axis))
    assert (survival_map.flip(axis) - survival_map).abs().max() > 1


def test_evidence_stays_within_its_window():
    net, image = lively(window=2, depth=3, head="softmin"), torch.rand(1, 1, 24, 24, 24)
    before = net(image)[0, 0]
    image[0, 0, 9, 9, 9] += 1  # patch (2, 2, 2), window (1, 1, 1)
    differs = (net(image)[0, 0] - before).abs() > 1e-4
    window = torch.zeros_like(differs)
    window[2:4, 2:4, 2:4] = True
    assert torch.equal(differs, window)


def test_absolute_hu_changes_the_map():
    net, image = lively(), torch.rand(1, 1, 16, 16, 16)
    location, shifted = net(image)[:, 0], net(image + 0.1)[:, 0]
    assert bool(((location - shifted).abs() > 0.1).float().mean() > 0.9)


# ----------------------------------------------------------------------------------------------------- attention


def naive_attention(attention: Attention, x: Tensor, together: Tensor) -> Tensor:
    """Masked dense attention over all tokens (M, dim); `together` (M, M) says who may see whom."""
    q, k, v = attention.qkv(x).chunk(3, 1)
    width = q.shape[1] // attention.num_heads
    heads = []
    for h in range(attention.num_heads):
        part = slice(h * width, (h + 1) * width)
        score = (q[:, part] @ k[:, part].t() / math.sqrt(width)).masked_fill(~together, -math.inf)
        heads.append(score.softmax(1) @ v[:, part])
    return attention.out(torch.cat(heads, 1))


@pytest.mark.parametrize("window", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("full", [True, False])
def test_attention_equals_masked_dense_attention(window, full):
    attention = Attention(32, window)
    assert attention.num_heads == 2
    nn.init.normal_(attention.out.weight)
    keep = torch.rand(2, 7, 5, 6) > 0.4
    if full:
        keep = torch.ones(2, 6, 3, 3) if window == 3 else torch.ones(2, 4, 4, 4)
    tokens = tokens_of(keep.float(), window)
    assert (tokens.mask is None) == (full or window < 2)
    assert tokens.counts == keep.flatten(1).sum(1).tolist()
    x, index = torch.randn(len(tokens.index), 32), tokens.index
    together = index[:, None, 0] == index[None, :, 0]
    if window > 0:
        together = together & (index[:, None, 1:] // window == index[None, :, 1:] // window).all(2)
    torch.testing.assert_close(attention(x, tokens), naive_attention(attention, x, together), rtol=1e-4, atol=1e-5)


def test_windows_hold_each_token_once_and_no_window_is_empty():
    keep = torch.rand(2, 5, 6, 7) > 0.7
    index, _, slots, mask = tokens_of(keep.float(), 2)
    assert sorted(index.tolist()) == keep.nonzero().tolist()
    assert bool((slots.diff() > 0).all()) and bool((index[:, 0].diff() >= 0).all())
    windows = {}
    for cell, slot in zip(index.tolist(), slots.tolist()):
        place = (cell[1] % 2 * 2 + cell[2] % 2) * 2 + cell[3] % 2
        assert slot % 8 == place
        windows.setdefault((cell[0], cell[1] // 2, cell[2] // 2, cell[3] // 2), set()).add(slot // 8)
    assert all(len(rows) == 1 for rows in windows.values())
    assert mask.shape == (len(windows), 8) and int(mask.sum()) == len(index) and bool(mask.any(1).all())


def test_attention_starts_silent():
    assert bool((Attention(16, 2)(torch.randn(8, 16), tokens_of(torch.ones(1, 2, 2, 2), 2)) == 0).all())


# ---------------------------------------------------------------------------------------------------------- FiLM


def test_film_is_the_identity_at_initialisation_and_not_afterwards():
    image, lung, clinical = torch.rand(2, 1, 24, 24, 24), two_lungs(), torch.randn(2, 3)
    net = SurvivalMapNet(dim=16, clinical_dim=3, film_context=True).eval()
    plain = SurvivalMapNet(dim=16).eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k in plain.state_dict()})
    before = net(image, lung, clinical)
    torch.testing.assert_close(before, plain(image, lung))
    nn.init.normal_(net.blocks[1].film.weight)
    after = net(image, lung, clinical)
    assert (after - before)[:, 0].abs().max() > 0.1
    # The clinical vector of one scan speaks in its own map only.
    clinical[1] += 1
    changed = net(image, lung, clinical)
    close(changed[:1], after[:1])
    assert (changed - after)[1, 0].abs().max() > 0.01


def test_film_formula():
    block = lively(depth=1, clinical_dim=2).blocks[0]
    x, context = torch.randn(5, 32), torch.randn(2, 2)
    keep = torch.zeros(2, 2, 2, 2)
    keep[0, 0, 0], keep[1, :, 0, 0], keep[1, 0, 1, 0] = 1, 1, 1
    tokens = tokens_of(keep, 2)
    modulated = block(x, tokens, context)
    film, block.film = block.film, None
    plain = block(x, tokens, context)
    scale, shift = film(context).chunk(2, 1)
    for token, i in enumerate([0, 0, 1, 1, 1]):
        torch.testing.assert_close(modulated[token], plain[token] * (1 + torch.tanh(scale[i])) + shift[i])


# ---------------------------------------------------------------------------------------------------------- head

WITH_DANGER = [name for name, head in HEADS.items() if hasattr(head, "danger")]


def head_of(name: str, loc_range=(-5.0, 120.0), beta: float = 1 / 15) -> Head:
    return HEADS[name](16, 1, loc_range, beta, False)


def test_lse_head_is_the_log_mean_exp_of_the_raw_locations():
    net, image, lung = lively(head="lse"), torch.rand(2, 1, 24, 24, 24), two_lungs()
    net.head.set_beta_factor(0.5)
    raw = lively(head="softmin")
    raw.load_state_dict(net.state_dict())
    location, weight = [v.flatten(1).double() for v in net(image, lung).unbind(1)]
    raw_location, raw_weight = [v.flatten(1).double() for v in raw(image, lung).unbind(1)]
    close(weight, raw_weight)
    for i in range(2):
        loc = raw_location[i][raw_weight[i] > 0]
        share = F.avg_pool3d(lung[i], 4).flatten().double()[raw_weight[i] > 0]
        assert len(loc) > 10 and loc.std() > 1 and share.min() < 0.5
        beta = 0.5 / 15
        expected = -((share * (-beta * loc).exp()).sum() / share.sum()).log() / beta
        torch.testing.assert_close((location[i] * weight[i]).sum(), expected, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(raw_weight[i][raw_weight[i] > 0], torch.softmax(-beta * loc, 0), rtol=1e-4, atol=0)
        # One number a scan moves all locations.
        moved = (location - raw_location)[i][raw_weight[i] > 0]
        torch.testing.assert_close(moved, moved.mean().expand_as(moved), rtol=0, atol=1e-3)
        assert moved.mean() > 0.05


@torch.no_grad()
def test_twice_the_disease_is_a_shorter_life():
    """A bright patch has a life 40 months shorter than a dark one; more bright ones shorten the scan's life."""
    net = without_position(SurvivalMapNet(dim=16, depth=0, loc_range=(0, 1e4)).eval())  # as good as no bounds
    flat = torch.zeros(1, 1, 4, 4, 4)
    net.head.to_location[-1].weight *= -40 / float(net(flat + 1)[0, 0] - net(flat)[0, 0])
    months = []
    for patches in (4, 8, 16):
        image = (torch.arange(64) < patches).float().view(1, 1, 4, 4, 4)
        for axis in (2, 3, 4):
            image = image.repeat_interleave(4, axis)
        location, weight = net(image)[0].flatten(1)
        months.append(float((location * weight).sum() - net(flat)[0, 0]))
    # -1/beta * log of the mean of exp(0) over dark and exp(40 beta) over bright patches
    expected = [-15 * math.log1p(n / 64 * math.expm1(40 / 15)) for n in (4, 8, 16)]
    assert months == pytest.approx(expected, abs=1e-2)
    assert 0 > months[0] > months[1] + 1 > months[2] + 2


def test_locations_stay_within_their_range_and_untouched_in_its_middle():
    head = head_of("softmin", (0, 120))
    for scale in (1.0, 1e3):
        x = 60 + scale * torch.randn(1, 500)
        y, _ = head.weigh(x, torch.ones(1, 500))
        assert bool((y >= 0).all()) and bool((y <= 120).all())
        torch.testing.assert_close(y, 120 * torch.sigmoid((x - 60) / 30))
        near = (x - 60).abs() < 3
        assert bool(near.any()) or scale > 1
        torch.testing.assert_close(y[near], x[near], rtol=0, atol=0.01)


@pytest.mark.parametrize("head", ["lse", "softmin"])
def test_the_lower_bound_gives_way_where_it_holds_up_the_months(head):
    net, image = SurvivalMapNet(dim=16, head=head), torch.rand(1, 1, 16, 16, 16)
    location, weight = net(image)[0].flatten(1)
    (location * weight).sum().backward()
    nn.init.constant_(net.head.bias, -1e4)  # everything is diseased
    free = float(net.head.lower.grad)
    net.head.lower.grad = None
    location, weight = net(image)[0].flatten(1)
    torch.testing.assert_close(location, torch.full_like(location, -5.0))
    (location * weight).sum().backward()
    assert float(net.head.lower.grad) == pytest.approx(30) and 0 < free < 0.6 * 30
    with torch.no_grad():
        net.head.lower -= 1
    torch.testing.assert_close(net(image)[0, 0].flatten(), torch.full_like(location, -35.0))


def test_heads_own_what_they_learn():
    learnt = {name: {k for k, p in head_of(name).named_parameters() if p.requires_grad and "." not in k} for name in HEADS}
    bounded = {name: {"bias", "lower"} for name in ("lse", "softmin", "attention")}
    assert learnt == {**bounded, "hazard": {"bias", "log_rate"}, "mean": {"bias"}}
    assert SurvivalMapNet(dim=16, learn_beta=True).head.log_beta.requires_grad


@pytest.mark.parametrize("loc_range", [(60, 120), (70, 120), (10,)])
def test_a_range_without_the_months_of_an_untrained_network_is_refused(loc_range):
    with pytest.raises(InputError, match="loc_range must be two months, the first below half of the second"):
        SurvivalMapNet(dim=16, loc_range=loc_range)


@pytest.mark.parametrize("clinical_dim", [0, 2])
@pytest.mark.parametrize("head", WITH_DANGER)
def test_danger_of_a_patch_is_read_off_the_map(head, clinical_dim):
    """Whatever moved all locations of a scan: the log-mean-exp, covariates."""
    net, image, lung = lively(head=head, clinical_dim=clinical_dim), torch.rand(2, 1, 24, 24, 24), two_lungs()
    nn.init.constant_(net.head.bias, 40.0)
    said, clinical = [], torch.randn(2, 2) if clinical_dim else None
    net.head.to_location.register_forward_hook(lambda module, args, out: said.append(out[:, 0]))
    with torch.no_grad():
        survival_map = net(image, lung, clinical)
        share = share_of_lung(image, lung, 4)
        found = net.danger(survival_map, share, clinical)
    months = on_grid(30 * said[0] + 40, tokens_of(share, 2).index, list(share.shape))
    location = -5 + 125 * torch.sigmoid((months - 57.5) * 4 / 125)
    expected = torch.sigmoid((40 - months) / 30 - 3) if head == "hazard" else (120 - location) / 125
    close(found[share > 0], expected[share > 0])
    assert float(found[share > 0].std()) > 0.005


def test_hazard_head_adds_hazards_and_attributes_them_exactly():
    head = head_of("hazard")
    nn.init.constant_(head.log_rate, 2.0)
    danger, lung = torch.rand(2, 50) * 0.9 + 0.05, torch.ones(2, 50)
    lung[1, 30:] = 0
    location, weight = head.weigh(60 - 30 * (danger.logit() + 3), lung)
    for i, n in ((0, 50), (1, 30)):
        hazards = math.exp(2.0) * danger[i, :n].numpy() / 120 / n
        share = weight[i, :n].detach().numpy()
        patient = (share * location[i, :n].detach().numpy()).sum()
        assert patient == pytest.approx(1 / (1 / 120 + hazards.sum()), rel=1e-5)
        np.testing.assert_allclose(share, hazards / hazards.sum(), rtol=1e-5)


def test_mean_head_is_average_pooling_and_its_weights_are_grad_cam():
    features, linear = torch.randn(1, 40, 8, requires_grad=True), torch.randn(8)
    months = 30 * (features @ linear) + 60
    patient = months.mean()
    gradient = torch.autograd.grad(-patient, features, retain_graph=True)[0]
    cam = (gradient.mean(1, keepdim=True) * features).sum(2).relu()
    location, weight = head_of("mean").weigh(months, torch.ones(1, 40))
    close((location * weight).sum(), patient)
    torch.testing.assert_close(weight, cam / cam.sum(), rtol=1e-4, atol=1e-5)


def test_attention_head_weighs_locations_by_a_softmax_of_its_own():
    head, x, seen = head_of("attention"), torch.randn(12, 16), []
    nn.init.normal_(head.to_score[-1].weight)
    head.to_score.register_forward_hook(lambda module, args, out: seen.append(out[:, 0]))
    share = torch.tensor([[1.0, 0.5, 0, 1, 1, 1], [0, 1, 1, 0.25, 1, 1]]).view(2, 1, 2, 3)
    index = torch.ones_like(share).nonzero()
    location, weight = head(x, index, share)
    expected = (share.numpy() > 0) * np.exp(seen[0].detach().numpy()).reshape(share.shape)
    np.testing.assert_allclose(weight.detach(), expected / expected.sum((1, 2, 3), keepdims=True), rtol=1e-5)
    months = on_grid(30 * head.to_location(x)[:, 0] + 60, index, [2, 1, 2, 3])
    torch.testing.assert_close(location, -5 + 125 * torch.sigmoid((months - 57.5) * 4 / 125))


def test_centred_tokens_say_nothing_of_what_all_patches_of_a_scan_share():
    net, seen = lively(center_tokens=True), []
    net.head.to_location.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    weight = net(torch.rand(2, 1, 24, 24, 24), two_lungs())[:, 1]
    before, after = seen
    counts = (weight > 0).flatten(1).sum(1).tolist()
    assert counts[0] != counts[1] and sum(counts) == len(before)
    for x, centred in zip(before.split(counts), after.split(counts)):
        close(centred, x - x.mean(0, keepdim=True))
        assert x.mean(0).abs().max() > 0.01


@pytest.mark.parametrize("beta", [0.1, 8.0])
def test_a_patch_that_is_half_lung_counts_half_and_none_without(beta):
    head = head_of("lse", (0, 1e4), beta)
    lung = torch.tensor([[1.0, 0.5, 1.0, 0.25, 1.0, 0.75] + 900 * [0.0]])
    location = torch.randn(1, 906) * 5 + 60
    location[:, 6:] = 10
    expected = -math.log(float((lung * (-beta * location.double()).exp()).sum() / lung.sum())) / beta
    assert float(head.log_mean_exp(location, lung)) == pytest.approx(expected, rel=1e-5)
    moved, weight = head.weigh(location, lung)
    own, _ = head.softmin(location, lung)
    torch.testing.assert_close((moved * weight).sum(1), head.log_mean_exp(own, lung)[:, 0])


@pytest.mark.parametrize("head", HEADS)
def test_heat_of_patches_that_say_the_same_is_even_over_the_lung(head):
    share, x = torch.tensor([[1.0, 0.5, 0.0, 0.25, 1.0, 0.75]]).view(1, 1, 2, 3), torch.randn(1, 16)
    index = (share > 0).nonzero()
    _, weight = head_of(head)(x.expand(len(index), 16), index, share)
    np.testing.assert_allclose(weight[share > 0].detach(), 0.2, rtol=1e-5)


def test_the_beta_of_a_schedule_is_part_of_the_state():
    net, image = lively(head="softmin"), torch.rand(1, 1, 16, 16, 16)
    net.head.set_beta_factor(1e-4)
    assert (net(image)[:, 1] * 64 - 1).abs().max() < 0.01  # nearly the mean
    assert net.state_dict()["head.log_beta"].exp() == pytest.approx(1e-4 / 15)
    assert not net.head.log_beta.requires_grad
    assert lively(head="softmin", beta=3.0)(image)[:, 1].max() > 0.5


def test_an_untrained_network_says_about_half_of_the_upper_bound_everywhere():
    location = SurvivalMapNet(dim=16, loc_range=(-5, 84))(torch.rand(1, 1, 16, 16, 16))[:, 0]
    assert (location - 42).abs().max() < 15


# --------------------------------------------------------------------------------------- gradients, types, errors


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_gradients_of_a_constant_image_are_finite(head, value):
    net = lively(head=head, film_context=True)
    image = torch.full((2, 1, 24, 24, 24), value, requires_grad=True)
    survival_map = net(image, two_lungs())
    (survival_map[:, 0] * survival_map[:, 1]).sum().backward()
    assert bool(image.grad.isfinite().all())
    for name, parameter in net.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


def test_every_parameter_learns():
    net = lively(film_context=True, clinical_dim=2, head_layers=2, learn_beta=True)
    survival_map = net(torch.rand(2, 1, 24, 24, 24), two_lungs(), torch.randn(2, 2))
    (survival_map[:, 0] * survival_map[:, 1]).sum().backward()
    learnt = [(name, p.grad) for name, p in net.named_parameters() if p.requires_grad]
    assert [name for name, gradient in learnt if gradient is None or gradient.abs().max() == 0] == []


def test_a_metatensor_is_an_image_like_any_other():
    net, image, lung = lively(), torch.rand(2, 1, 24, 24, 24), two_lungs()
    close(torch.Tensor(net(MetaTensor(image), MetaTensor(lung)).detach()), net(image, lung))


def test_extra_channels_start_at_zero_and_leave_location_and_weight_alone():
    image, lung = torch.rand(2, 1, 24, 24, 24), two_lungs()
    torch.manual_seed(1)
    plain = SurvivalMapNet(dim=16).eval()
    torch.manual_seed(1)
    net = SurvivalMapNet(dim=16, extra=3).eval()
    assert net.state_dict().keys() - plain.state_dict().keys() == {"to_extra.weight"}
    survival_map = net(image, lung)
    assert survival_map.shape == (2, 5, 6, 6, 6)
    assert bool((survival_map[:, 1:4] == 0).all())
    assert torch.equal(survival_map[:, [0, 4]], plain(image, lung))
    nn.init.normal_(net.to_extra.weight, std=5.0)
    survival_map = net(image, lung)
    assert torch.equal(survival_map[:, [0, 4]], plain(image, lung))
    inside = survival_map[:, 4] > 0
    extra = survival_map[:, 1:4].transpose(0, 1)
    assert bool((extra[:, ~inside] == 0).all()) and 1 < float(extra.abs().max()) <= 3


@pytest.mark.parametrize(
    "kwargs",
    [
        *({"window": window, "film_context": True, "center_tokens": True, "overlap": 0.5} for window in (0, 2, 4)),
        *({"head": head, "extra": 2} for head in HEADS),
        {"narrow_window": None, "texture": False},
        {"clinical_dim": 2},
    ],
)
def test_torchscript_equals_eager(kwargs):
    net = lively(**kwargs)
    scripted = torch.jit.script(net)
    for shape in [(1, 1, 16, 16, 16), (2, 1, 24, 24, 24), (1, 1, 9, 14, 7)]:
        image, clinical = torch.rand(shape), torch.randn(shape[0], 2) if net.clinical_dim else None
        lung = two_lungs()[: shape[0], :, : shape[2], : shape[3], : shape[4]].contiguous()
        for mask in (None, lung):
            torch.testing.assert_close(scripted(image, mask, clinical), net(image, mask, clinical))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"narrow_window": [0.5, 0.2]}, "narrow_window must be two ascending shares"),
        ({"narrow_window": [-0.1, 0.2]}, "narrow_window must be two ascending shares"),
        ({"patch_size": 0}, "patch_size"),
        ({"overlap": 1.0}, "overlap"),
        ({"overlap": -0.1}, "overlap"),
        ({"dim": 40}, "dim must be a multiple of 16"),
        ({"dim": 0}, "dim must be a multiple of 16"),
        ({"depth": -1}, "negative"),
        ({"window": -1}, "negative"),
        ({"clinical_dim": -1}, "negative"),
        ({"extra": -1}, "negative"),
        ({"head": "max"}, "head"),
        ({"head_layers": 3}, "head_layers"),
        ({"beta": 0.0}, "beta"),
    ],
)
def test_constructor_errors(kwargs, message):
    with pytest.raises(InputError, match=message):
        SurvivalMapNet(**kwargs)


@pytest.mark.parametrize("shape", [(16, 16, 16), (1, 16, 16, 16), (1, 2, 16, 16, 16)])
def test_image_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="image must be"):
        SurvivalMapNet(dim=16)(torch.rand(shape))


def test_lung_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="shape of the image"):
        SurvivalMapNet(dim=16)(torch.rand(1, 1, 16, 16, 16), torch.ones(1, 1, 16, 16, 12))


def test_scan_without_lung_is_refused():
    lung = torch.ones(2, 1, 16, 16, 16)
    lung[1] = 0
    with pytest.raises(ValueError, match="scan 1 .* no lung"):
        SurvivalMapNet(dim=16)(torch.rand(2, 1, 16, 16, 16), lung)


@pytest.mark.parametrize("clinical_dim, clinical", [(2, None), (0, torch.zeros(1, 2)), (2, torch.zeros(1, 3))])
def test_clinical_vector_of_another_length_is_refused(clinical_dim, clinical):
    with pytest.raises(ValueError, match=f"length {clinical_dim}"):
        SurvivalMapNet(dim=16, clinical_dim=clinical_dim)(torch.rand(1, 1, 16, 16, 16), None, clinical)
