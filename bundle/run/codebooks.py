# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Fit :class:`~bundle.networks.CodebookNet` to a cohort, and predict each of its scans without having seen its outcome."""

import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ignite.distributed as idist
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bundle.data import ScanCache, patient_of
from bundle.data.fingerprint import code_digest
from bundle.data.splits import draw_folds
from bundle.errors import InputError
from bundle.files import DamagedFile, load_checked, save_checked
from bundle.maps.familiarity import Familiarity, fit_familiarity, look
from bundle.networks import CodebookNet
from bundle.networks.codebook_net import nearest, root_mean, smoothed
from bundle.networks.descriptors import describe, level_and_spread, tokens_at
from bundle.run.scans import outcomes
from bundle.survival import Objective
from bundle.survival.cox import minimise
from bundle.survival.objectives import classical_log_likelihood
from bundle.survival.ridge_cox import ridge_cox

logger = logging.getLogger(__name__)

RECIPES = ("auto", "codebook", "network")
FOLDS = 10
SAMPLE = 40_000  # tokens of a cohort that k-means sees
BOOK_SAMPLE = 20_000  # of them for each book
ROUNDS = 8  # of k-means
HOTTEST = 0.005  # share of a cohort's tokens that are sure to the student
GRADED = 4  # power of the evidence of others, over that of these: disease of a second kind is not told to be harmless
TAUGHT = 2000  # tokens of a scan that it sees
BATCH = 4096
LEAST_AT_SITE = 10  # patients that a site must have to be a stratum of its own


class Tokens(NamedTuple):
    """What is kept of a scan: descriptors (M, 29) of its tokens, and their voxels (M, 3)."""

    described: Tensor
    index: Tensor

    @classmethod
    def of(cls, image: Tensor, lung: Tensor) -> "Tokens":
        """Those of a scan: image and lung are (1, D, H, W)."""
        index = tokens_at(lung[0])
        return cls(describe(image[0], lung[0], index).half(), index.to(torch.int16))

    @classmethod
    def cached(cls, dataset: ScanCache, item: int) -> "Tokens":
        """Those of a scan of a dataset, kept in a file of its cache that is named after the scan and this code."""
        record = dataset.data[item]
        name = dataset.key(record).decode() + code_digest("networks/descriptors.py")
        path = dataset.cache_dir / f"{hashlib.sha256(name.encode()).hexdigest()}.tokens.pt"
        try:
            if path.is_file():
                return cls(*load_checked(path))
        except DamagedFile as e:
            logger.warning(f"{e}; it is made again.")
        scan = dataset._cachecheck(record)
        found = cls.of(scan["image"], scan["lung"])
        save_checked(tuple(found), path)
        return found

    def centred(self) -> Tensor:
        """Descriptors less the scan's own level and over its own spread, (M, 29)."""
        described = self.described.float()
        level, spread = level_and_spread(described)
        return (described - level) / spread


@torch.no_grad()
def fit_books(network: CodebookNet, scans: Sequence[Tokens], seed: int) -> None:
    """k-means of the scans' tokens, as many of each; no outcome is asked."""
    g = torch.Generator().manual_seed(seed)
    each = -(-SAMPLE // len(scans))
    sample = torch.cat([tokens[torch.randperm(len(tokens), generator=g)[:each]] for tokens in (s.centred() for s in scans)])
    network.mean.copy_(sample.mean(0))
    network.spread.copy_(sample.std(0) + 1e-3)
    x = ((sample - network.mean) / network.spread).clamp(-6.0, 6.0)
    size = network.centres.shape[1]
    for chosen, centres in zip(network.chosen, network.centres, strict=True):
        chosen.copy_(torch.randperm(x.shape[1], generator=g)[: len(chosen)])
        few = x[torch.randperm(len(x), generator=g)[:BOOK_SAMPLE]][:, chosen]
        centres.copy_(few[torch.randint(len(few), (size,), generator=g)])
        for _ in range(ROUNDS):
            word = nearest(few, centres)
            count = torch.bincount(word, minlength=size).unsqueeze(1)
            total = torch.zeros_like(centres).index_add_(0, word, few)
            centres.copy_(torch.where(count > 0, total / count.clamp_min(1), centres))


@torch.no_grad()
def words_of(network: CodebookNet, scan: Tokens) -> Tensor:
    """The words of a scan's tokens, (M, books)."""
    described = scan.described.float()
    return network.words_of(network.standardised(described, *level_and_spread(described)))


def shares_of(words: Tensor, size: int) -> Tensor:
    """How much of a scan's lung each word is, (books, size)."""
    return torch.stack([torch.bincount(book.long(), minlength=size) for book in words.unbind(1)]) / len(words)


def fit_hazards(
    shares: Tensor,
    outcome: Tensor,
    adjust: Tensor | None = None,
    strata: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Hazards (books, size) of the words from their shares (N, books, size) in the lungs of a cohort.

    Where hazards of another cohort are `given`, few scans move them little.
    """
    x = rooted(shares)
    x = (x - x.mean(0)) / floored(x.std(0).nan_to_num(0))
    toward = None if given is None else given.sqrt().flatten()  # coefficients again
    slope = ridge_cox(x.flatten(1), outcome, adjust=adjust, strata=strata, toward=toward)
    return hazards_of(slope.view(shares.shape[1:]))


def hazards_of(slope: Tensor) -> Tensor:
    """Hazards of words from their coefficients: the square of one above 0, 1 for the largest.

    Most words are of harmless tissue, and their noise would outweigh the few that tell.
    """
    slope = slope.clamp_min(0)
    return (slope / slope.max().clamp_min(1e-12)).square()


def rooted(shares: Tensor) -> Tensor:
    """The fourth root of shares of words, which brings that of a rare word nearer to normal."""
    return (shares + 1e-4) ** 0.25


def floored(spread: Tensor) -> Tensor:
    """Deviations (books, size) of words, with a floor for one that hardly varies."""
    return (spread.square() + spread.median(1, keepdim=True).values.square()).sqrt().clamp_min(1e-6)


@torch.no_grad()
def risk_of(network: CodebookNet, words: Tensor, index: Tensor) -> Tensor:
    """The risk of a scan by the network's hazards, a number, as :meth:`CodebookNet.forward` has it."""
    return root_mean(smoothed(network.evidence(words), index.long() // 2, 0.5 * network.smoothing))


def fit_odds(words: Tensor, told: Tensor, size: int, epochs: int, decay: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logistic regression on the words (M, books) of tokens: log odds of each word, (books, size), and those of any token.

    Args:
        told: what is to be learned of each token, 0 to 1, (M,).
        size: words of a book.
        epochs: passes over the tokens.
        decay: of the weights, as of AdamW; the log odds of any token have none.
        g: draws the batches.
    """
    odds = nn.EmbeddingBag(words.shape[1] * size, 1, mode="sum")
    nn.init.zeros_(odds.weight)
    bias = nn.Parameter(torch.logit(told.mean(), 1e-6).view(1))
    groups = [{"params": odds.parameters(), "weight_decay": decay}, {"params": bias, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.03)
    steps = epochs * -(-len(words) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    of_book = size * torch.arange(words.shape[1])
    for _ in range(steps):
        token = torch.randint(len(words), (BATCH,), generator=g)
        loss = F.binary_cross_entropy_with_logits(odds(words[token].long() + of_book)[:, 0] + bias, told[token])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return odds.weight.detach().view(-1, size), bias.detach()[0]


@torch.no_grad()
def teach(network: CodebookNet, words: Sequence[Tensor], scans: Sequence[Tokens], risk: Tensor, seed: int) -> None:
    """Fit the student to tell the cohort's hottest tokens, by the network's hazards, from the cold ones; no mask is asked.

    Its scale is such that what it says of the scans is in all as large as their risk (N,). Where hazards are all 0 there is
    no student.

    Source of learning from one's own answers: Lee, ICML workshop on representation learning, 2013 (pseudo-labels).
    """
    g = torch.Generator().manual_seed(seed)
    cells, sigma = [scan.index.long() // 2 for scan in scans], 0.5 * network.smoothing
    evidence = [smoothed(network.evidence(w), c, sigma) for w, c in zip(words, cells, strict=True)]
    some = torch.cat([e[torch.randint(len(e), (TAUGHT,), generator=g)] for e in evidence])
    bar = some.kthvalue(max(1, int((1 - HOTTEST) * len(some)))).values
    network.student_scale.zero_()
    if bar <= 0:
        return
    seen, told = [], []
    for w, e in zip(words, evidence, strict=True):
        hot = (e > bar).nonzero()[:, 0]
        hot = hot[torch.randperm(len(hot), generator=g)[: TAUGHT // 4]]
        token = torch.cat([hot, torch.randint(len(e), (TAUGHT - len(hot),), generator=g)])
        seen.append(w[token])
        told.append((e[token] / bar).clamp(0, 1) ** GRADED)
    with torch.enable_grad():
        odds, bias = fit_odds(torch.cat(seen), torch.cat(told), network.centres.shape[1], 8, 1.0, g)
    network.student.copy_(odds)
    network.student_bias.copy_(bias)
    network.student_scale.fill_(1.0)
    drawn = [network.drawn(w, e) for w, e in zip(words, evidence, strict=True)]
    said = [root_mean(smoothed(d, c, sigma)) for d, c in zip(drawn, cells, strict=True)]
    network.student_scale.copy_((risk.square().mean() / torch.stack(said).square().mean()).sqrt())


def fit_months(network: CodebookNet, risk: Tensor, outcome: Tensor, objective: Objective, clinical: Tensor) -> float | None:
    """Fit months and covariates to risks (N,) of scans whose outcomes the risk has not seen; returns the variance.

    See :class:`MonthsFit`.
    """
    fit = MonthsFit(network, risk, outcome, objective, clinical, top=risk.max(), patients=len(risk))
    return fit.keep(minimise(fit.loss, fit.start))


class MonthsFit:
    """Months and covariates that go with risks (N,) of scans whose outcomes the risk has not seen.

    offset - slope * risk^power has the highest likelihood under the objective, with the objective's variance, if it has
    one, in months squared. It falls with the risk, and stays within the network's range: where few died the likelihood
    would push it beyond, where all are alike. Covariates (N, K) have a prior of 20 months each.

    Args:
        network: whose months are fitted.
        top: risk that a power of the risk is relative to.
        patients: of the whole fit, over which the prior is spread; these may be some of them.
    """

    def __init__(
        self,
        network: CodebookNet,
        risk: Tensor,
        outcome: Tensor,
        objective: Objective,
        clinical: Tensor,
        top: Tensor | float,
        patients: float,
    ) -> None:
        self.network, self.trial, self.patients = network, copy.copy(objective), patients
        self.risk, self.outcome, self.clinical = risk.double(), outcome.double(), clinical.double()
        self.top = torch.as_tensor(top, dtype=torch.float64).clamp_min(1e-6)
        self.varies = hasattr(objective, "variance")
        self.start = torch.tensor([0.0, -1.0, 0.0, 5.0] + [0.0] * clinical.shape[1], dtype=torch.float64)

    def unknown(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        span = self.network.high - self.network.low
        above = span * u[0].sigmoid()  # of the offset, over the lowest month
        return self.network.low + above, above * u[1].sigmoid(), 4 ** torch.tanh(u[2]), 20 * u[4:]

    def loss(self, u: Tensor) -> Tensor:
        """Mean negative log-likelihood of these patients, and the prior."""
        offset, slope, power, covariates = self.unknown(u)
        location = offset - slope * (self.risk / self.top) ** power + self.clinical @ covariates
        if self.varies:
            self.trial.variance = u[3].exp() + 1
        prior = (u[2].square() + u[4:].square().sum()) / (2 * self.patients)
        time, event = self.outcome.unbind(1)
        if self.varies:
            return prior - classical_log_likelihood(self.trial.log_pmf(as_maps(location)), time, event).mean()
        return prior - self.trial.likelihood(location, time, event) / len(self.risk)

    def keep(self, u: Tensor) -> float | None:
        """Put what was found into the network; returns the variance, if there is one."""
        offset, slope, power, covariates = self.unknown(u)
        with torch.no_grad():
            self.network.offset.copy_(offset)
            self.network.power.copy_(power)
            self.network.slope.copy_(slope / self.top**power)
            self.network.clinical_months.copy_(covariates)
        return float(u[3].exp()) + 1 if self.varies else None


def out_of_fold(
    network: CodebookNet,
    words: Sequence[Tensor],
    scans: Sequence[Tokens],
    outcome: Tensor,
    folds: Tensor,
    adjust: Tensor,
    strata: Tensor,
    given: Tensor | None = None,
) -> Tensor:
    """Risk of each scan (N,) by hazards that were fitted without its fold; the network is left with those of all.

    The books are the same throughout: they have seen no outcome. Nor have `given` hazards seen any of these scans.
    """
    shares = torch.stack([shares_of(w, network.centres.shape[1]) for w in words])
    risk = torch.zeros(len(scans))
    for fold in folds.unique():
        inside = folds != fold
        network.hazard.data.copy_(fit_hazards(shares[inside], outcome[inside], adjust[inside], strata[inside], given))
        for i in (~inside).nonzero()[:, 0].tolist():
            risk[i] = risk_of(network, words[i], scans[i].index)
    network.hazard.data.copy_(fit_hazards(shares, outcome, adjust, strata, given))
    return risk


def unseen_months(
    network: CodebookNet, risk: Tensor, outcome: Tensor, objective: Objective, clinical: Tensor, folds: Tensor
) -> Tensor:
    """Months that covariates (N, K) add for each scan, (N,), by a :func:`fit_months` without the scan's fold."""
    found, trial = torch.zeros(len(risk)), copy.deepcopy(network).requires_grad_(False)
    for fold in folds.unique() if clinical.shape[1] > 0 else []:
        inside = folds != fold
        fit_months(trial, risk[inside], outcome[inside], objective, clinical[inside])
        found[~inside] = clinical[~inside] @ trial.clinical_months
    return found


def site_folds(records: Sequence[dict], seed: int) -> list[int]:
    """Folds by the column ``site`` where the cohort has two sites or more: its scanner must not help to tell the outcome.

    Else ten folds of patients, or fewer where fewer died; of ten patients or fewer each is a fold.
    """
    sites = sorted({str(record.get("site", "")) for record in records})
    if len(sites) > 1:
        return [sites.index(str(record.get("site", ""))) % FOLDS for record in records]
    patients = sorted({patient_of(record) for record in records})
    if len(patients) <= FOLDS:
        return [patients.index(patient_of(record)) for record in records]
    deaths = sum(record["event"] for record in records)
    return draw_folds(records, int(min(FOLDS, max(2, deaths))), seed)


def strata_of(records: Sequence[dict]) -> Tensor:
    """Stratum of each patient (N,): its `site`, where that has enough patients to compare; all others together are one.

    Each site has its own baseline hazard: that its scanner or its patients differ from others' must not pass for disease.
    """
    sites = [str(record.get("site", "")) for record in records]
    large = [site for site, count in sorted(Counter(sites).items()) if count >= LEAST_AT_SITE]
    return torch.tensor([large.index(site) if site in large else -1 for site in sites])


class CodebookStage:
    """What a training learns before the transformer: codebooks, the look of its scans, and out-of-fold predictions.

    All of it is in `codebooks.pt` of the run's folder, with a checksum, and read from there when a run goes on.

    Args:
        recipe: ``"codebook"`` for codebooks alone, ``"network"`` for the config's network alone, ``"auto"`` for whichever
            the validation scans support.
        network: untrained, on CPU.
        train: training scans.
        val: validation scans.
        objective: what the readout is; its variance is fitted to out-of-fold predictions.
        ckpt_dir: folder of the run.
        seed: of k-means and folds.
        given: the network has the books and hazards of another cohort. Its books stay, and its hazards are fitted anew
            from there.

    Raises:
        InputError: another recipe; a recipe "codebook" for an objective that has neither months nor hazards.
    """

    def __init__(
        self,
        recipe: str,
        network: CodebookNet,
        train: ScanCache,
        val: ScanCache,
        objective: Objective,
        ckpt_dir: str,
        seed: int = 0,
        given: bool = False,
    ) -> None:
        if recipe not in RECIPES:
            raise InputError(f'recipe must be one of {", ".join(RECIPES)}, got "{recipe}".')
        self.recipe = recipe
        self.network = network
        self.train, self.val = train, val
        self.path = Path(ckpt_dir) / "codebooks.pt"
        self.seed = seed
        self.given = network.hazard.detach().clone() if given else None
        plain = not objective.extra and not getattr(objective, "mixture", False)
        self.readable = plain and (hasattr(objective, "variance") or hasattr(objective, "fit_baseline"))
        if recipe == "codebook" and not self.readable:
            raise InputError(f'the recipe "codebook" needs an objective of months or hazards, not {objective.name}.')
        self.objective = copy.deepcopy(objective).cpu().requires_grad_(False)
        self.asked = [objective.name, self.objective.arguments]
        self.familiarity: Familiarity | None = None
        self.location: Tensor | None = None  # out of fold, of each training scan
        self.folds: Tensor | None = None

    @property
    def fitted(self) -> bool:
        """Whether there is a codebook network to choose."""
        return self.location is not None

    def run(self) -> None:
        """Fit all there is to fit, or read it; of several processes the first does, and the others read."""
        if idist.get_rank() == 0 and not self.load():
            self.fit()
        idist.barrier()
        if idist.get_rank() > 0:
            self.load()

    def load(self) -> bool:
        try:
            state = load_checked(self.path) if self.path.is_file() else None
        except DamagedFile as e:
            logger.warning(f"{e}; it is made again.")
            state = None
        if state is None or state["identity"] != self.identity():
            return False
        self.familiarity = Familiarity(*state["familiarity"])
        if state["network"] is not None:
            self.network.load_state_dict(state["network"])
            self.objective = type(self.objective)(**state["objective"]).requires_grad_(False)
            self.location = state["location"]
        return True

    def identity(self) -> list:
        """What the fit depends on, to compare."""
        told = ("patient_id", "time", "event", "clinical", "site")
        scans = [[self.train.key(r).decode(), *(str(r.get(name)) for name in told)] for r in self.train.data]
        code = code_digest("networks/*.py", "run/codebooks.py", "survival/*.py", "maps/familiarity.py", "data/splits.py")
        given = None if self.given is None else self.given.tolist()
        return [scans, self.network.arguments, self.recipe, self.asked, self.seed, code, given]

    def fit(self) -> None:
        """Fit all there is to fit, and write it."""
        self.describe()
        if self.folds is not None:
            self.learn()
        self.write()

    def write(self) -> None:
        """Write what was fitted, for :meth:`run` to read."""
        state = {"identity": self.identity(), "familiarity": list(vars(self.familiarity).values()), "network": None}
        if self.fitted:
            state["network"] = self.network.state_dict()
            state |= {"objective": self.objective.arguments, "location": self.location}
        save_checked(state, self.path)

    def describe(self) -> None:
        """What no outcome shapes: tokens, the look of the scans, folds, books and words."""
        records = self.train.data
        self.scans = [Tokens.cached(self.train, i) for i in tqdm(range(len(records)), desc="describing", unit="scan")]
        folds = torch.tensor(site_folds(records, self.seed))
        self.familiarity = fit_familiarity(torch.stack([look(scan.described) for scan in self.scans]), folds.tolist())
        several = len(folds.unique()) > 1
        if self.recipe == "codebook" and not several:
            raise InputError('the recipe "codebook" needs two patients or more to train on, to leave each out once.')
        if self.recipe != "network" and self.readable and several:
            self.folds = folds
            if self.given is None:
                fit_books(self.network, self.scans, self.seed)
            self.words = [words_of(self.network, scan) for scan in tqdm(self.scans, desc="codebooks", unit="scan")]

    def learn(self) -> None:
        """All that outcomes of the training scans tell: hazards, months and readout, then the student that draws maps."""
        teach(self.network, self.words, self.scans, self.fit_outcomes(), self.seed)

    def fit_outcomes(self) -> Tensor:
        """Hazards, months and readout from the outcomes of the training scans, whose risks out of fold it returns, (N,)."""
        clinical, outcome = clinical_of(self.train.data), outcomes(self.train.data)
        strata = strata_of(self.train.data)
        risk = out_of_fold(self.network, self.words, self.scans, outcome, self.folds, clinical, strata, self.given)
        self.network.base.copy_(risk.square().median())  # half of the patients have more evidence than base
        variance = fit_months(self.network, risk, outcome, self.objective, clinical)
        if variance is not None:
            self.objective.variance = variance
        added = unseen_months(self.network, risk, outcome, self.objective, clinical, self.folds)
        self.location = self.network.months(risk).detach() + added
        if hasattr(self.objective, "fit_baseline"):
            self.objective.fit_baseline(self.location, outcome)
        return risk

    def located(self, risk: Tensor, clinical: Tensor) -> Tensor:
        """Patients' locations in months, (N,), from their risks and covariates."""
        with torch.no_grad():
            return self.network.months(risk) + clinical @ self.network.clinical_months

    def predict(self, dataset: ScanCache) -> Tensor:
        """Locations of the scans of a dataset, (N,)."""
        scans = [Tokens.cached(dataset, i) for i in range(len(dataset.data))]
        risk = torch.stack([risk_of(self.network, words_of(self.network, scan), scan.index) for scan in scans])
        return self.located(risk, clinical_of(dataset.data))


def clinical_of(records: Sequence[dict]) -> Tensor:
    """Clinical vectors of encoded records, (N, K)."""
    return torch.tensor([[float(x) for x in record.get("clinical", [])] for record in records]).view(len(records), -1)


def as_maps(location: Tensor) -> Tensor:
    """Locations of patients (N,) as survival maps of one patch, (N, 2, 1, 1, 1)."""
    return torch.stack([location, torch.ones_like(location)], 1).view(-1, 2, 1, 1, 1)
