# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Begin a training from given weights: what is taken from them, what starts anew, and what stays as it is."""

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from bundle.data import fit_clinical
from bundle.data.clinical import clinical_kinds
from bundle.errors import InputError
from bundle.networks import ClinicalNet, CodebookNet, MaskedAutoencoder, SurvivalMapNet, network_from
from bundle.run.scans import cohort_identity
from bundle.run.settings import read_settings
from bundle.run.trained import load_weights

logger = logging.getLogger(__name__)

BACKBONE = ("embed.", "position.", "blocks.")
BOOKS = ("mean", "spread", "chosen", "centres", "hazard")  # of a codebook network; months are fitted anew
FROZEN = {"all": (), "blocks": BACKBONE[:2], "head": BACKBONE}  # by what is trainable


class Pretrained:
    """Given weights, of a training or of a pre-training without outcomes, with what must be as it was there.

    Args:
        ckpt: weights file, with its `settings.json` in the same folder.

    Raises:
        InputError: there is no such file, it is damaged, or its network doesn't look at scans.
    """

    def __init__(self, ckpt: str | None) -> None:
        if ckpt is None:
            raise InputError("--pretrained is missing: give the model.pt of a training or a pre-training.")
        if Path(ckpt).is_dir():
            raise InputError(f"--pretrained {ckpt} is a folder (expected the model.pt in it).")
        self.settings = read_settings(ckpt)
        self.network = load_weights(network_from(self.settings["network"]), ckpt).requires_grad_(False)
        if isinstance(self.network, ClinicalNet):
            raise InputError(f"--pretrained {ckpt} never looks at a scan (expected weights of a network that does).")
        self.clinical = clinical_kinds(self.settings.get("clinical", {}))
        self.preprocessing: dict = self.settings["preprocessing"]
        taken = {key: self.preprocessing[key] for key in ("spacing", "hu_window", "lung_mask", "margin")}
        taken |= {"clinical": self.clinical} if self.clinical else {}
        words = ", ".join(f"{key} {value}" for key, value in taken.items())
        logger.info(f"fine-tuning a {type(self.network).__name__}. Taken from it: its architecture; {words}.")

    @property
    def recipe(self) -> str:
        """Which of the two networks of a training goes on from here; what saw no outcome must win against codebooks."""
        kinds = {CodebookNet: "codebook", SurvivalMapNet: "network", MaskedAutoencoder: "auto"}
        return kinds[type(self.network)]

    def encoding(self, records: list[dict], columns: dict[str, str]) -> dict:
        """How covariates become the clinical vector: as they did, for the same `columns`; else fitted to `records`."""
        return self.settings["clinical"] if columns and columns == self.clinical else fit_clinical(records, columns)

    def identity(self, parts: dict[str, list[dict]], trainable: str) -> dict:
        """:func:`bundle.run.cohort_identity`, and what is given; whose outcomes these weights know counts as trained on."""
        own = cohort_identity(parts)
        seen = [] if isinstance(self.network, MaskedAutoencoder) else self.settings["trained_on"]
        if known := {*own["trained_on"]} & {*seen}:
            same = f"{len(known)} of {len(own['trained_on'])} patients have ids that the given weights were trained on"
            logger.warning(f"{same}: if these are the same patients, the verdict will be too good.")
        origin = {"weights_sha256": self.settings["weights_sha256"], "network": type(self.network).__name__}
        before = (self.settings.get(key) or {} for key in ("learnt", "fine_tuned_from"))
        if any(one.get("simulated") for one in before):
            origin["simulated"] = True
            logger.warning("the given weights learnt from simulated survival times: what they know may not hold.")
        own["trained_on"] = sorted({*own["trained_on"], *seen})
        return {**own, "fine_tuned_from": {**origin, "trainable": trainable}}


def fine_tuned(
    given: Pretrained,
    trainable: str,
    clinical_encoding: dict,
    clinical_dim: int,
    loc_range: Sequence[float],
    beta: float,
    extra: int,
) -> SurvivalMapNet:
    """The network to train: its architecture and all weights that fit are the given ones.

    A layer of covariates fits only covariates that are encoded in the same way; the rest starts anew, and the log says
    so. The upper bound of locations follows the cohort's `tmax`. Where codebooks are given, all of it is new.

    Args:
        given: weights.
        trainable: ``"all"``; ``"blocks"`` to keep the embedding of patches as it is; ``"head"`` to keep the blocks, too.
        clinical_encoding: of the cohort.
        clinical_dim, loc_range, beta, extra: see :class:`~bundle.networks.SurvivalMapNet`; a given head keeps its lower
            bound and its beta.

    Raises:
        InputError: `trainable` is something else, or isn't "all" and codebooks are given.
    """
    if trainable not in FROZEN:
        raise InputError(f'trainable must be one of {", ".join(FROZEN)}, got "{trainable}".')
    own = {"clinical_dim": clinical_dim, "loc_range": list(loc_range), "beta": beta, "extra": extra}
    if isinstance(given.network, CodebookNet):
        if trainable != "all":
            raise InputError(f"--trainable {trainable} has no effect on codebooks, as the given weights are; leave it out.")
        return SurvivalMapNet(**own)
    known = inspect.signature(SurvivalMapNet).parameters
    taken = {name: value for name, value in given.network.arguments.items() if name in known}
    if isinstance(given.network, SurvivalMapNet):
        own |= {"loc_range": [given.network.head.low, own["loc_range"][1]], "beta": taken["beta"]}
    network = SurvivalMapNet(**{**taken, **own})
    skipped = () if clinical_encoding == given.settings.get("clinical", {}) else (".film.", "clinical_months.")
    state, weights = network.state_dict(), given.network.state_dict()
    fits = [name for name in state if name in weights and weights[name].shape == state[name].shape]
    fits = [name for name in fits if not any(part in name for part in skipped)]
    network.load_state_dict(state | {name: weights[name] for name in fits})
    for name, parameter in network.named_parameters():
        if name in fits and name.startswith(FROZEN[trainable]):
            parameter.requires_grad_(False)
    anew = {"film" if ".film." in name else name.split(".")[0] for name in state.keys() - fits}
    logger.info(f"starts anew: {', '.join(sorted(anew)) or 'nothing'}; trained: {trainable}.")
    return network


def given_codebooks(given: Pretrained, clinical_dim: int, loc_range: Sequence[float]) -> CodebookNet:
    """A codebook network of the given books and hazards, or a new one where there are none."""
    books = given.network if isinstance(given.network, CodebookNet) else None
    size = {name: books.arguments[name] for name in ("books", "words", "few")} if books else {}
    network = CodebookNet(**size, clinical_dim=clinical_dim, loc_range=loc_range)
    if books is not None:
        with torch.no_grad():
            for name in BOOKS:
                getattr(network, name).copy_(getattr(books, name))
    return network
