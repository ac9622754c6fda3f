# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Learning from scans alone, and going on from given weights, by the bundle's commands."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from bundle.errors import InputError
from bundle.metrics.validation import CodeUse, ExplainedShare
from bundle.networks import CodebookNet, MaskedAutoencoder, ReconstructionLoss, SurvivalMapNet
from bundle.networks.patches import CONTRAST
from bundle.run import Pretrained, TrainedModel, fine_tuned
from bundle.run.codebooks import fit_hazards
from bundle.survival.ridge_cox import ridge_cox

from .commands import TRAIN, run, stopped_after, train
from .conftest import absolute_table

FINETUNE = [*TRAIN, "configs/finetune.json"]
FROZEN = {"all": (), "blocks": ("embed.", "position."), "head": ("embed.", "position.", "blocks.")}
PRETRAIN = [*TRAIN, "configs/pretrain.json"]
BOOKS = {"recipe": "codebook", "codebook_def#books": 3, "codebook_def#words": 20}


def settings_of(model) -> dict:
    return json.loads((model.parent / "settings.json").read_text())


def weights_of(model) -> dict[str, torch.Tensor]:
    return torch.load(model, weights_only=True)


def finetune(cohort, folder, pretrained, config=FINETUNE, **override):
    """As `train` does, without the options that fine-tuning takes from the given weights."""
    given = {"max_epochs": 2, "val_interval": 1, "batch_size": 4, "pretrained": str(pretrained), **override}
    run(config, cohort=str(cohort), ckpt_dir=str(folder), output_dir=str(folder), **given)
    return folder / "model.pt"


def pretrain(cohort, folder, **override):
    run(PRETRAIN, cohort=str(cohort), ckpt_dir=str(folder), **{"network_def#dim": 16, "val_interval": 1, **override})
    return folder / "model.pt"


@pytest.fixture(scope="module")
def images(tiny_cohort, tmp_path_factory):
    """The tiny cohort's scans without outcomes."""
    path = tmp_path_factory.mktemp("images") / "images.csv"
    absolute_table(tiny_cohort)[["patient_id", "image"]].to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory, root):
    with contextlib.chdir(root):
        return pretrain(images, tmp_path_factory.mktemp("pretrained"), max_epochs=3, vector_quantisation=True)


# ---------------------------------------------------------------------------------------------------------- fine-tuning


def test_without_learning_it_is_the_network_that_was_given(trained, tiny_cohort, tmp_path):
    model = finetune(tiny_cohort, tmp_path, trained, learning_rate=0, severity=False)
    given, found = weights_of(trained), weights_of(model)
    assert given.keys() == found.keys() and all(torch.equal(value, found[name]) for name, value in given.items())
    image = torch.rand(2, 1, 16, 16, 16)
    assert torch.equal(TrainedModel(trained).network(image), TrainedModel(model).network(image))
    origin = settings_of(model)["fine_tuned_from"]
    assert origin["weights_sha256"] == settings_of(trained)["weights_sha256"] and origin["trainable"] == "all"


@pytest.mark.parametrize("trainable, frozen", FROZEN.items())
def test_what_is_frozen_stays_to_the_bit_and_the_rest_moves(trainable, frozen, trained, tiny_cohort, tmp_path):
    given, found = weights_of(trained), weights_of(finetune(tiny_cohort, tmp_path, trained, trainable=trainable))
    same = {name for name in given if torch.equal(given[name], found[name])}
    assert same == {name for name in given if name.startswith(frozen)} | {"head.log_beta"}  # which is no parameter here


def test_another_last_month_moves_the_upper_bound_alone(trained, tiny_cohort, tmp_path):
    model = finetune(tiny_cohort, tmp_path, trained, learning_rate=0, tmax=150)
    settings, before = settings_of(model), settings_of(trained)
    assert settings["objective"]["tmax"] == 150 and settings["network"]["loc_range"][1] == 180
    assert settings["network"]["loc_range"][0] == before["network"]["loc_range"][0]
    assert len(settings["outcomes"]["pmf"]) == 150
    image, out = str(tiny_cohort.parent / "p0.nii.gz"), tmp_path / "out"
    run("configs/inference.json", image=image, ckpt=str(model), output_dir=str(out), shifts=1)
    assert "survival_150m" in pd.read_csv(out / "survival_curves.csv").columns


def test_covariates_are_taken_from_the_given_weights_or_start_anew(tiny_cohort, tmp_path):
    given = train(tiny_cohort, tmp_path / "given", clinical={"age": "numeric"})
    older = absolute_table(tiny_cohort).assign(size=range(16))
    older["age"] += 7.5
    older.to_csv(tmp_path / "older.csv", index=False)
    same = finetune(tmp_path / "older.csv", tmp_path / "same", given, learning_rate=0)
    assert settings_of(same)["clinical"] == settings_of(given)["clinical"]  # and not standardised by the new cohort
    assert torch.equal(weights_of(same)["clinical_months.weight"], weights_of(given)["clinical_months.weight"])
    other = {"clinical": {"size": "numeric"}}
    anew = weights_of(finetune(tmp_path / "older.csv", tmp_path / "anew", given, learning_rate=0, **other))
    assert not anew["clinical_months.weight"].any() and not anew["blocks.0.film.weight"].any()
    moved = weights_of(finetune(tmp_path / "older.csv", tmp_path / "moved", given, trainable="head", **other))
    assert moved["blocks.0.film.weight"].any() and torch.equal(moved["embed.layers.0.bias"], anew["embed.layers.0.bias"])
    older.drop(columns="age").to_csv(tmp_path / "ageless.csv", index=False)
    with pytest.raises(InputError, match="column age: named as clinical but missing"):
        finetune(tmp_path / "ageless.csv", tmp_path / "no", given)
    without = finetune(tmp_path / "ageless.csv", tmp_path / "without", given, clinical={})
    assert "clinical_months.weight" not in weights_of(without)


def test_what_cannot_be_fine_tuned_is_one_sentence(trained, tiny_cohort, tmp_path):
    config, age = [*TRAIN, "configs/network/clinical_only.json"], {"age": "numeric"}
    run(config, cohort=str(tiny_cohort), ckpt_dir=str(tmp_path / "blind"), clinical=age, max_epochs=1)
    blind = tmp_path / "blind" / "model.pt"
    for ckpt, message in (
        (tmp_path / "none.pt", "there is no weights file .*none.pt"),
        (trained.parent, "is a folder .expected the model.pt in it"),
        (blind, "never looks at a scan"),
    ):
        with pytest.raises(InputError, match=message):
            finetune(tiny_cohort, tmp_path / "run", ckpt)
    with pytest.raises(InputError, match="--pretrained is missing"):
        run(FINETUNE, cohort=str(tiny_cohort), ckpt_dir=str(tmp_path / "run"))
    for override, message in (
        ({"spacing": 2}, "--spacing .* contradicts"),
        ({"trainable": "heads"}, 'trainable must be one of all, blocks, head, got "heads"'),
    ):
        with pytest.raises(InputError, match=message):
            finetune(tiny_cohort, tmp_path / "run", trained, **override)
    shutil.copytree(trained.parent, tmp_path / "copy", ignore=shutil.ignore_patterns("cache", "tensorboard"))
    torch.save({"embed.layers.0.weight": torch.zeros(3)}, tmp_path / "copy" / "model.pt")
    with pytest.raises(InputError, match="belongs to other weights"):
        finetune(tiny_cohort, tmp_path / "run", tmp_path / "copy" / "model.pt")


def test_a_run_does_not_go_on_from_other_weights(trained, localising, tiny_cohort, tmp_path):
    finetune(tiny_cohort, tmp_path, trained)
    moved = tmp_path / "moved"
    shutil.copytree(trained.parent, moved, ignore=shutil.ignore_patterns("cache", "tensorboard"))
    finetune(tiny_cohort, tmp_path, moved / "model.pt")  # the same weights elsewhere: a finished run
    with pytest.raises(InputError, match="other settings .*fine_tuned_from.weights_sha256"):
        finetune(tiny_cohort, tmp_path, localising)


def test_given_codebooks_keep_their_books_and_fit_hazards_anew(tiny_cohort, tmp_path):
    given = train(tiny_cohort, tmp_path / "given", **BOOKS)
    found = finetune(tiny_cohort, tmp_path / "run", given, seed=1)  # another split and other folds; k-means would move
    settings = settings_of(found)
    assert settings["network"]["name"] == "CodebookNet" and settings["network"]["books"] == 3
    before, after = weights_of(given), weights_of(found)
    for name in ("mean", "spread", "chosen", "centres"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["hazard"], after["hazard"])
    assert np.corrcoef(before["hazard"].flatten(), after["hazard"].flatten())[0, 1] > 0.5


def test_hazards_are_pulled_toward_a_multiple_of_those_given():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 300, generator=generator)
    given = torch.randn(300, generator=generator)
    said = (x @ given) / (x @ given).std()
    outcome = torch.stack([(50 - 20 * said).clamp_min(1), torch.ones(12)], 1)
    plain, pulled = ridge_cox(x, outcome), ridge_cox(x, outcome, toward=given)
    unscaled = ridge_cox(x, outcome, toward=5 * given)
    torch.testing.assert_close(pulled, unscaled)  # their scale is not known
    alike = [float(torch.corrcoef(torch.stack([found, given]))[0, 1]) for found in (plain, pulled)]
    assert alike[0] < 0.5 and alike[1] > 0.9
    # the same by one more covariate, written out
    wide = torch.cat([x / 300**0.5, said[:, None]], 1) * 301**0.5
    own = ridge_cox(wide, outcome) * 301**0.5
    expected = own[:300] / 300**0.5 + own[300] * given / (x @ given).std()
    torch.testing.assert_close(pulled, expected, atol=2e-3, rtol=2e-2)
    shares = torch.rand(12, 2, 10, generator=generator)
    kept = fit_hazards(shares, torch.tensor([[1.0 + i, 0.0] for i in range(12)]), given=torch.ones(2, 10))
    assert not kept.any()  # nobody died: nothing is known, not even which way is dangerous


# --------------------------------------------------------------------------------------------------------- pre-training


def test_what_is_hidden_is_never_seen():
    net = MaskedAutoencoder(dim=16).eval()
    for layer in (*(block.attention.out for block in net.blocks), net.to_voxels):
        torch.nn.init.normal_(layer.weight)
    lung = torch.zeros(1, 1, 16, 16, 18)
    lung[..., 2:14, :, :] = 1
    image = torch.rand(1, 1, 16, 16, 18)
    found = net(image, lung)
    hidden = found[:, 1:2] > 0
    assert 0.3 < hidden[lung > 0].float().mean() < 0.7 and not hidden[lung == 0].any()
    other = net(torch.where(hidden, torch.rand_like(image), image), lung)
    torch.testing.assert_close(other[:, 0:1][hidden], found[:, 0:1][hidden], atol=1e-4, rtol=1e-4)
    changed = net(torch.where(hidden, image, torch.rand_like(image)), lung)
    assert not torch.allclose(changed[:, 0:1][hidden], found[:, 0:1][hidden])
    torch.testing.assert_close(net(image, lung), found)  # the same patches are hidden each time


def test_the_loss_and_the_explained_share_are_those_of_a_loop():
    net = MaskedAutoencoder(dim=16, vector_quantisation=True, codes=8)
    image, lung = torch.rand(2, 1, 12, 12, 12), (torch.rand(2, 1, 12, 12, 12) > 0.3).float()
    found = net(image, lung).detach()
    voxels = zip(found[:, 0].flatten().tolist(), image.flatten().tolist(), found[:, 1].flatten().tolist())
    errors = [(CONTRAST * (told - true)) ** 2 for told, true, hidden in voxels if hidden]
    loss = sum(errors) / len(errors) + float(found[0, 3, 0, 0, 0])
    assert float(ReconstructionLoss()(found, image)) == pytest.approx(loss, rel=1e-4)
    share, used = ExplainedShare(), CodeUse(False)
    error = variance = 0.0
    for one, scan in zip(found, image):
        share.update((one[None], scan[None]))
        used.update((one[None], scan[None]))
        truth = scan[0][one[1] > 0].numpy()
        error += ((one[0][one[1] > 0].numpy() - truth) ** 2).sum()
        variance += len(truth) * truth.var()
    assert share.compute() == pytest.approx(1 - error / variance, rel=1e-4)
    codes = found[:, 2][found[:, 2] >= 0]
    assert used.compute() == len(codes.unique()) and set(codes.tolist()) <= set(range(8))
    perplexity = CodeUse(True)
    even = torch.arange(4.0).view(1, 1, 1, 2, 2).expand(1, 4, 1, 2, 2)
    perplexity.update((even, None))
    assert perplexity.compute() == pytest.approx(4)


def test_a_cell_of_tokens_comes_out_where_it_was():
    net = MaskedAutoencoder(patch_size=2, dim=4)
    volume = torch.rand(1, 4, 6, 8)
    cells = volume.view(1, 2, 2, 3, 2, 4, 2).permute(0, 1, 3, 5, 2, 4, 6).reshape(1, 2, 3, 4, 8)
    assert torch.equal(net.volume(cells), volume)


@pytest.mark.parametrize("quantised", [False, True])
def test_it_learns_to_tell_hidden_patches_of_what_is_smooth(quantised):
    net, loss = MaskedAutoencoder(dim=32, vector_quantisation=quantised, codes=32), ReconstructionLoss()
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), 0.005)

    def smooth(number):
        small = torch.rand(number, 1, 3, 3, 3)
        return torch.nn.functional.interpolate(small, (16, 16, 16), mode="trilinear", align_corners=True)

    explained = []
    for step in range(251):
        if step in (0, 250):
            net.eval()
            metric, image = ExplainedShare(), smooth(16)
            metric.update((net(image), image))
            explained.append(metric.compute())
            net.train()
        image = smooth(8)
        optimizer.zero_grad()
        loss(net(image), image).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert explained[0] == pytest.approx(0, abs=0.1) and explained[1] > 0.15


def test_pretraining_leaves_pictures_use_of_codes_and_weights_that_predict_nothing(pretrained, images, tmp_path):
    history = pd.read_csv(pretrained.parent / "history.csv")
    assert (history.val_code_perplexity <= history.val_codes_used + 1e-6).all() and (history.val_codes_used >= 1).all()
    assert (pretrained.parent / "figures" / "reconstructions.png").stat().st_size > 10_000
    settings = settings_of(pretrained)
    assert settings["network"]["name"] == "MaskedAutoencoder" and len(settings["trained_on"]) == 16
    with pytest.raises(InputError, match="has seen no outcome and predicts nothing: fine-tune it"):
        run("configs/inference.json", cohort=str(images), ckpt=str(pretrained), output_dir=str(tmp_path))


def test_a_pretraining_goes_on_to_the_same_weights(pretrained, images, tmp_path):
    with stopped_after(2):
        pretrain(images, tmp_path, max_epochs=3, vector_quantisation=True)
    again = weights_of(pretrain(images, tmp_path, max_epochs=3, vector_quantisation=True))
    assert all(torch.equal(value, again[name]) for name, value in weights_of(pretrained).items())


def test_fine_tuning_takes_patches_and_blocks_of_a_pretraining(pretrained, tiny_cohort, tmp_path):
    model = finetune(tiny_cohort, tmp_path, pretrained, trainable="head", recipe="network")
    given, found = weights_of(pretrained), weights_of(model)
    taken = [name for name in found if name.startswith(("embed.", "position.", "blocks."))]
    assert taken and all(torch.equal(given[name], found[name]) for name in taken)
    assert settings_of(model)["network"]["name"] == "SurvivalMapNet" and settings_of(model)["network"]["dim"] == 16
    assert Pretrained(str(pretrained)).recipe == "auto"  # codebooks may still win


def test_names_of_weights_are_those_of_the_survival_map_net():
    own, other = (net.state_dict() for net in (MaskedAutoencoder(dim=16), SurvivalMapNet(dim=16)))
    shared = [name for name in other if name.startswith(("embed.", "position.", "blocks."))]
    assert {name: other[name].shape for name in shared} == {name: own[name].shape for name in own if name in shared}
    assert len(shared) == len([name for name in own if not name.startswith(("hidden", "to_voxels"))])


def test_a_table_too_small_to_validate_is_one_sentence(images, tmp_path):
    pd.read_csv(images)[:1].to_csv(tmp_path / "one.csv", index=False)
    with pytest.raises(InputError, match="0 train, 1 val scans"):
        pretrain(tmp_path / "one.csv", tmp_path / "run")


@pytest.mark.parametrize("arguments", [{"mask_share": 0}, {"mask_share": 1.0}, {"codes": 1}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(InputError, match="must be"):
        MaskedAutoencoder(**arguments)


def test_the_given_network_is_no_codebook_for_the_transformer(tmp_path):
    class Given:
        network, settings = CodebookNet(books=1, words=2), {}

    net = fine_tuned(Given(), "all", {}, 0, [-5.0, 120.0], 0.1, 0)
    assert isinstance(net, SurvivalMapNet) and all(p.requires_grad or "log_beta" in n for n, p in net.named_parameters())
    with pytest.raises(InputError, match="--trainable head has no effect on codebooks"):
        fine_tuned(Given(), "head", {}, 0, [-5.0, 120.0], 0.1, 0)
