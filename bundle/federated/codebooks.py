# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The codebook network of several sites by sums alone: books, stratified ridge-Cox, months.

In each round every site gets the mean of the last answers. It makes the next state of the fit of them, which is the same
everywhere, and answers with that state and its own sums at it, a patient. So the server has nothing to do but average, and a
site that missed rounds is told all that it needs.
"""

import math

import numpy as np
import torch
from torch import Tensor

from bundle.data import ScanCache
from bundle.errors import InputError
from bundle.federated.sums import MINIMUM
from bundle.networks.codebook_net import nearest
from bundle.run.codebooks import (
    ROUNDS,
    CodebookStage,
    MonthsFit,
    Tokens,
    clinical_of,
    floored,
    hazards_of,
    risk_of,
    rooted,
    shares_of,
    teach,
    words_of,
)
from bundle.run.scans import outcomes
from bundle.survival.ridge_cox import breslow

TOKENS = 500  # of a scan, that k-means sees
HAZARDS = 40  # rounds of gradient steps
MONTHS = 16  # rounds of Newton's steps
PHASES = ["tokens", *["words"] * ROUNDS, "shares", *["hazards"] * HAZARDS, "risk", *["months"] * MONTHS, "student"]
STUDENT = ("student", "student_bias", "student_scale")

Arrays = dict[str, np.ndarray]


class SharedCodebooks:
    """A site's part in the fit of :class:`~bundle.networks.CodebookNet` to all sites' scans.

    Each of :data:`PHASES` has a method ``tell_...``, the site's own sums at a state, over its number of scans, and a
    method ``next_...``, the state that follows from the mean of all sites' sums.

    - tokens, words: mean and covariance of the tokens' descriptors; then k-means, from centres drawn by the seed.
    - shares: mean and square of each word's root share, to standardise it.
    - hazards: gradient of the site's own log partial likelihood (its risk sets are its own patients), at the hazards of
      all and at those without each site; ridge-Cox by gradient steps of Barzilai and Borwein's length.
    - risk, months: mean, square and logarithm of risks out of fold, so that each site is a fold; the summed likelihood with
      two derivatives, by Newton's steps.
    - student: each site teaches one on its own scans by the hazards of all; kept is their mean.

    Sums over fewer than :data:`~bundle.federated.sums.MINIMUM` tokens or deaths are told as 0.

    Source: Barzilai and Borwein, IMA J Numer Anal 8 (1988) 141; for strata, Kalbfleisch and Prentice, section 4.4.

    Args:
        stage: of the site's own training; its network is fitted.
        scans: its training scans.
        index: of the site among all.
        sites: how many there are.
    """

    def __init__(self, stage: CodebookStage, scans: list[Tokens], index: int, sites: int) -> None:
        self.stage, self.scans, self.index, self.sites = stage, scans, index, sites
        self.network = stage.network.requires_grad_(False)
        dataset: ScanCache = stage.train
        self.outcome, self.clinical = outcomes(dataset.data), clinical_of(dataset.data)
        draw = torch.Generator().manual_seed(stage.seed)
        tokens = (scan.centred() for scan in self.scans)
        self.samples = [s[torch.randperm(len(s), generator=draw)[:TOKENS]] for s in tokens]
        self.words: list[Tensor] | None = None
        draw.manual_seed(stage.seed)
        for chosen in self.network.chosen:
            chosen.copy_(torch.randperm(len(self.network.mean), generator=draw)[: len(chosen)])

    def answer(self, message: Arrays, number: int) -> Arrays:
        """The answer of round `number`, from 1, to the mean of the answers before."""
        state = self.next(message, number)
        told = getattr(self, f"tell_{PHASES[number - 1]}")(state)
        present = np.zeros(self.sites)
        present[self.index] = 1.0
        own = {"present": present, **told}
        return state | {f"own.{key}": np.asarray(value) / len(self.scans) for key, value in own.items()}

    def next(self, message: Arrays, number: int) -> Arrays:
        """The state of round `number`."""
        if number == 1:
            return {}
        state = {key: value for key, value in message.items() if key.startswith("state.")}
        own = {key.removeprefix("own."): value for key, value in message.items() if key.startswith("own.")}
        if not own:
            raise InputError(f"round {number} came without the sums of the round before.")
        present = own.pop("present")
        patients = 1 / present.max()  # of the sites that answered: each told 1 over its patients, weighted by them
        return state | getattr(self, f"next_{PHASES[number - 2]}")(state, own, patients)

    def tell_tokens(self, state: Arrays) -> Arrays:
        mean = torch.stack([s.mean(0) for s in self.samples]).sum(0)
        second = torch.stack([s.T @ s / len(s) for s in self.samples]).sum(0)
        return {"mean": mean.double().numpy(), "second": second.double().numpy()}

    def next_tokens(self, state: Arrays, own: Arrays, patients: float) -> Arrays:
        mean = own["mean"]
        covariance = own["second"] - np.outer(mean, mean)
        spread = np.sqrt(np.maximum(np.diag(covariance), 0)) + 1e-3
        alike = torch.tensor(covariance / np.outer(spread, spread))
        draw = torch.Generator().manual_seed(self.stage.seed)
        centres = []
        for chosen in self.network.chosen:
            root = torch.linalg.cholesky(alike[chosen][:, chosen] + 1e-3 * torch.eye(len(chosen), dtype=alike.dtype))
            z = torch.randn(self.network.centres.shape[1], len(chosen), generator=draw, dtype=alike.dtype)
            centres.append((z @ root.T).clamp(-6, 6))
        return {"state.mean": mean, "state.spread": spread, "state.centres": torch.stack(centres).numpy()}

    def put_books(self, state: Arrays) -> None:
        for name in ("mean", "spread", "centres"):
            getattr(self.network, name).copy_(torch.as_tensor(state[f"state.{name}"]))

    def tell_words(self, state: Arrays) -> Arrays:
        self.put_books(state)
        network = self.network
        x = ((torch.cat(self.samples) - network.mean) / network.spread).clamp(-6.0, 6.0)
        counts, totals = [], []
        for chosen, centres in zip(network.chosen, network.centres, strict=True):
            few = x[:, chosen]
            word = nearest(few, centres)
            count = torch.bincount(word, minlength=len(centres))
            told = (count >= MINIMUM).unsqueeze(1)
            counts.append(count * told[:, 0])
            totals.append(torch.zeros_like(centres).index_add_(0, word, few) * told)
        return {"count": torch.stack(counts).double().numpy(), "total": torch.stack(totals).double().numpy()}

    def next_words(self, state: Arrays, own: Arrays, patients: float) -> Arrays:
        count = own["count"][..., None]
        return {"state.centres": np.where(count > 0, own["total"] / np.maximum(count, 1e-12), state["state.centres"])}

    def rooted_shares(self, state: Arrays) -> Tensor:
        """Root shares of the words in the site's scans, (n, books, size)."""
        if self.words is None:
            self.put_books(state)
            self.words = [words_of(self.network, scan) for scan in self.scans]
        return rooted(torch.stack([shares_of(words, self.network.centres.shape[1]) for words in self.words])).double()

    def tell_shares(self, state: Arrays) -> Arrays:
        x = self.rooted_shares(state)
        return {"x": x.sum(0).numpy(), "xx": x.square().sum(0).numpy()}

    def next_shares(self, state: Arrays, own: Arrays, patients: float) -> Arrays:
        spread = floored(torch.tensor(np.sqrt(np.maximum(own["xx"] - own["x"] ** 2, 0)))).numpy()
        start = np.zeros((1 + self.sites, own["x"].size + self.clinical.shape[1]))
        found = {"x_mean": own["x"], "x_spread": spread, "c": start, "c_before": start, "g_before": start}
        return {f"state.{key}": value for key, value in found.items()} | {"state.patients": np.array([patients])}

    def features(self, state: Arrays) -> Tensor:
        """What a patient's log hazard is linear in, (n, D), each with a prior of variance 1: words, then covariates."""
        x = (self.rooted_shares(state) - torch.as_tensor(state["state.x_mean"])) / torch.as_tensor(state["state.x_spread"])
        x = x.flatten(1)
        return torch.cat([x / math.sqrt(x.shape[1]), self.clinical.double()], 1)

    def tell_hazards(self, state: Arrays) -> Arrays:
        """The gradient of minus the log partial likelihood; 0 for the fit without this site."""
        x, c = self.features(state), torch.as_tensor(state["state.c"])
        gradient = torch.zeros_like(c)
        if self.outcome[:, 1].sum() >= MINIMUM:
            for fit in range(len(c)):
                if fit != 1 + self.index:
                    slope = c[fit].clone().requires_grad_(True)
                    (gradient[fit],) = torch.autograd.grad(-breslow(x @ slope, self.outcome.double()), slope)
        return {"g": gradient.numpy()}

    def next_hazards(self, state: Arrays, own: Arrays, patients: float) -> Arrays:
        c, before = state["state.c"], state["state.c_before"]
        g = patients * own["g"] + c
        least = 1 / (1 + patients)
        s, y = c - before, g - state["state.g_before"]
        with np.errstate(invalid="ignore", divide="ignore"):
            step = ((s * y).sum(1) / (y * y).sum(1)).clip(0.25 * least, 1.0)
        step = np.where((s == 0).all(1), least, step)[:, None]
        return {"state.c": c - step * g, "state.c_before": c, "state.g_before": g}

    def put_hazards(self, state: Arrays, fit: int) -> None:
        """Hazards of one of the fits: 0 is of all sites, 1 + k without site k."""
        slope = torch.as_tensor(state["state.c"][fit])[: self.network.hazard.numel()].view_as(self.network.hazard)
        self.network.hazard.copy_(hazards_of(slope))

    def unseen_risk(self, state: Arrays) -> Tensor:
        """Risk of each of the site's scans by the hazards that were fitted without the site, (n,)."""
        self.rooted_shares(state)
        self.put_hazards(state, 1 + self.index)
        return torch.stack([risk_of(self.network, w, s.index) for w, s in zip(self.words, self.scans, strict=True)])

    def tell_risk(self, state: Arrays) -> Arrays:
        risk = self.unseen_risk(state).double()
        told = {"risk": risk, "square": risk.square(), "log": risk.clamp_min(1e-6).log()}
        return {key: value.sum().numpy() for key, value in told.items()}

    def next_risk(self, state: Arrays, own: Arrays, patients: float) -> Arrays:
        start = self.months_fit(state | {"state.top": np.ones(1)}).start.numpy()
        size = len(start)
        # The largest risk is one patient's, and not told. Of those above `top` many would have the lowest month alike.
        top = own["risk"] + 2 * np.sqrt(np.maximum(own["square"] - own["risk"] ** 2, 0))
        found = {"top": np.atleast_1d(top), "base": np.atleast_1d(np.exp(2 * own["log"]))}
        found |= {"u": start, "trial": start, "loss": np.array([1e30]), "damping": np.array([1.0])}
        found |= {"gradient": np.zeros(size), "hessian": np.eye(size)}
        return {f"state.{key}": value for key, value in found.items()}

    def months_fit(self, state: Arrays) -> MonthsFit:
        risk = self.unseen_risk(state)
        top, patients = float(state["state.top"][0]), float(state["state.patients"][0])
        return MonthsFit(self.network, risk, self.outcome, self.stage.objective, self.clinical, top, patients)

    def tell_months(self, state: Arrays) -> Arrays:
        fit, u = self.months_fit(state), torch.tensor(state["state.trial"], requires_grad=True)
        loss = fit.loss(u)
        (gradient,) = torch.autograd.grad(loss, u)
        hessian = torch.autograd.functional.hessian(fit.loss, u.detach())
        found = {"loss": loss.detach().view(1), "gradient": gradient, "hessian": hessian}
        return {key: (value * len(self.scans)).numpy() for key, value in found.items()}

    def next_months(self, state: Arrays, own: Arrays, patients: float) -> Arrays:
        """A step of Levenberg and Marquardt's kind: back, and shorter, where the likelihood fell."""
        kept = {key: state[f"state.{key}"] for key in ("u", "loss", "gradient", "hessian")}
        damping = state["state.damping"]
        if own["loss"][0] < kept["loss"][0]:
            kept = {"u": state["state.trial"], **own}
            damping = np.maximum(damping / 5, 1e-4)
        else:
            damping = damping * 5
        values, vectors = np.linalg.eigh(kept["hessian"])
        step = vectors @ ((vectors.T @ kept["gradient"]) / (np.abs(values) + damping))
        found = {**kept, "damping": damping, "trial": kept["u"] - step}
        return {f"state.{key}": value for key, value in found.items()}

    def tell_student(self, state: Arrays) -> Arrays:
        risk = self.unseen_risk(state)
        self.put_hazards(state, 0)
        teach(self.network, self.words, self.scans, risk, self.stage.seed)
        found = {name: getattr(self.network, name) for name in STUDENT}
        return {name: (value.double() * len(self.scans)).numpy() for name, value in found.items()}

    def next_student(self, state: Arrays, own: Arrays, patients: float) -> Arrays:
        return {f"state.{name}": own[name] for name in STUDENT}

    def finish(self, message: Arrays) -> None:
        """Put the fit of all into the stage of this site."""
        state, stage = self.next(message, len(PHASES) + 1), self.stage
        fit = self.months_fit(state)  # with the risk by hazards without this site
        variance = fit.keep(torch.as_tensor(state["state.u"]))
        if variance is not None:
            stage.objective.variance = variance
        stage.location = self.network.months(fit.risk.float())  # covariates' months have seen the outcome: they are left out
        self.put_hazards(state, 0)
        self.network.base.copy_(torch.as_tensor(state["state.base"][0]))
        for name in STUDENT:
            getattr(self.network, name).copy_(torch.as_tensor(state[f"state.{name}"]))
