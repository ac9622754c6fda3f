# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What one hospital computes in a federated training, and the whole of what it sends."""

import logging
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from monai.fl.utils.exchange_object import ExchangeObject

from bundle.data.fingerprint import code_digest
from bundle.errors import InputError
from bundle.federated.codebooks import PHASES, SharedCodebooks
from bundle.federated.sums import clinical_encoding, death_priors, kinds, look_sums, shared_familiarity, site_sums
from bundle.files import file_sha256
from bundle.maps.familiarity import look
from bundle.run.codebooks import Tokens
from bundle.run.scans import training_cohort

ROOT = Path(__file__).parents[2]  # this site's own copy of the bundle
CONFIGS = ["configs/train.json", "configs/federated.json"]
# What a job may set, and what belongs to the site alone. Nothing else of a config is anybody's to change.
OF_THE_JOB = ("tmax", "horizon", "seed", "learning_rate", "batch_size", "spacing", "hu_window", "lung_mask")
OF_THE_JOB += ("margin", "severity")
OF_THE_SITE = ("cohort", "ckpt_dir", "device", "num_workers", "on_fault", "lungmask_weights", "lung_mask_fill")
SUMS, LOOKS, NET = "sums", "looks", "net."

Message = dict[str, np.ndarray]


def bundle_digest() -> str:
    """SHA-256 of what must be the same at every site: the configs, and the code that computes what is averaged."""
    code = code_digest("networks/*.py", "survival/*.py", "federated/*.py", "data/clinical.py", "transforms/*.py")
    code += code_digest("run/codebooks.py", "maps/familiarity.py")
    return code + "".join(file_sha256(ROOT / name)[:8] for name in CONFIGS)


def checked_job(job: Mapping[str, Any]) -> dict:
    """A job's settings, which come from another machine: known keys, and values that MONAI takes for no expression.

    Raises:
        InputError: a key is not the job's to set, a text is more than a name, or the job is of another bundle.
    """

    def plain(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        if isinstance(value, Mapping):
            return all(plain(key) and plain(part) for key, part in value.items())
        named = isinstance(value, str) and re.fullmatch(r"\w[\w .+-]*", value) is not None
        return named or (isinstance(value, (bool, int, float)) and np.isfinite(value))

    known = (*OF_THE_JOB, "sites", "recipe", "rounds", "local_epochs", "clinical", "bundle")
    for key, value in job.items():
        if key not in known:
            raise InputError(f"the job sets {key} (expected one of {', '.join(known)}).")
        if not plain(value):
            raise InputError(f"the job sets {key} to {value!r} (expected numbers and plain names).")
    if job["bundle"] != bundle_digest():
        raise InputError("the job was made by another version of this bundle: all sites and the job need the same one.")
    if job["recipe"] not in ("codebook", "network"):
        raise InputError(f'the job has the recipe "{job["recipe"]}" (expected codebook or network).')
    return dict(job)


def training_rounds(job: Mapping[str, Any]) -> int:
    """Rounds between the one of sums and the one of finishing."""
    return len(PHASES) if job["recipe"] == "codebook" else job["rounds"]


class Site:
    """A hospital in a federated training: it answers one message a round, and keeps all else to itself.

    - Round 0: the message is empty; the answer is :func:`~bundle.federated.sums.site_sums`.
    - Then the message has the mean of all sites' sums, and of what they answered last. In round 1 the site adds
      :func:`~bundle.federated.sums.look_sums`, whose mean every later message has. With the recipe "network" the site trains
      the mean of their networks for `local_epochs` by MONAI's `MonaiAlgo`, and answers with the weights; with "codebook" it
      answers as :class:`~bundle.federated.codebooks.SharedCodebooks`.
    - In the last round the site finishes the network of all on its own scans (verdict, and months where the recipe is
      "network"); familiar is what looks like the scans of any site. It writes `model.pt` and `settings.json` into its own
      `ckpt_dir`, and answers what it was told.

    Each answer comes with the number of scans that the site trains on, by which a mean is weighted. A site that missed
    rounds, or was started again, goes on with the next one. Risk sets and likelihoods are those of the site's patients.

    Args:
        name: of the site.
        job: settings that all sites share, from :func:`checked_job`: `sites` (their names), `recipe`, `rounds` and
            `local_epochs` of a network, `clinical` (each column "numeric", or its categories), `tmax`, `seed` and
            others of :data:`OF_THE_JOB`.
        own: settings of this site, of :data:`OF_THE_SITE`.

    Raises:
        InputError: a setting of the site is unknown or missing; the cohort is at fault, or too small.
    """

    def __init__(self, name: str, job: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        unknown = own.keys() - set(OF_THE_SITE)
        if unknown or not {"cohort", "ckpt_dir"} <= own.keys():
            raise InputError(f"site {name} sets {', '.join(own)} (expected cohort, ckpt_dir and any of {OF_THE_SITE[2:]}).")
        if name not in job["sites"]:
            raise InputError(f"the job is of {', '.join(job['sites'])}, not of {name}.")
        self.name = name
        self.index, self.sites = job["sites"].index(name), len(job["sites"])
        self.job, self.own = dict(job), dict(own)
        self.clinical = self.job["clinical"]
        seed, on_fault = self.job.get("seed", 0), self.own.get("on_fault", "fail")
        cohort = training_cohort(self.own["cohort"], None, seed, kinds(self.clinical), self.job["tmax"], on_fault)
        self.records = cohort["train"]
        self.algo: MonaiAlgo | None = None
        self.looks = torch.empty(0)
        self.shared: SharedCodebooks | None = None

    def answer(self, message: Message, number: int) -> tuple[Message, int]:
        """The answer to the message of round `number`, and its weight in the mean.

        Raises:
            InputError: the message lacks what the round needs; the site can't train, or its network is not finite.
        """
        if number == 0:
            return {SUMS: site_sums(self.records, self.clinical)}, len(self.records)
        if SUMS not in message:
            raise InputError(f"round {number} came without the sums of round 0.")
        if self.algo is None:
            self.build(message[SUMS])
        if number == 1:
            looks = look_sums(self.looks, self.index, self.sites)
        elif LOOKS in message:
            looks = message[LOOKS]
        else:
            raise InputError(f"round {number} came without the looks of round 1.")
        last = number > training_rounds(self.job)
        if self.shared is not None:
            found = self.shared.finish(message) if last else self.shared.answer(message, number)
        else:
            weights = {k.removeprefix(NET): torch.as_tensor(v) for k, v in message.items() if k.startswith(NET)}
            if not weights and number > 1:
                raise InputError(f"round {number} came without a network.")
            if last:
                found = self.part("network_def").load_state_dict(weights)
            else:
                trained = self.train(weights or self.first_weights(), number)
                found = {NET + key: value for key, value in trained.items()}
        if last:
            stage = self.part("train#codebooks")
            stage.familiarity = shared_familiarity(looks, self.looks, self.index)
            stage.write()
            self.part("train#best").finish(self.part("train#finish"))
            return message, len(self.records)
        if not all(np.isfinite(value).all() for value in found.values()):
            raise InputError(f"the answer of site {self.name} to round {number} is not finite.")
        return {SUMS: message[SUMS], LOOKS: looks, **found}, len(self.records)

    def build(self, sums: np.ndarray) -> None:
        """Make the training of this site's own config, with what all sites share; preprocess the scans."""
        job = self.job
        priors = death_priors(sums, job["tmax"])
        options = {key: job[key] for key in OF_THE_JOB if key in job} | self.own
        options |= {
            "recipe": job["recipe"],
            "max_epochs": job["rounds"] * job["local_epochs"],
            "clinical": kinds(self.clinical),
            "clinical_encoding": clinical_encoding(sums, self.clinical),
            "network_def#loc_range": priors["loc_range"],
            "network_def#beta": priors["beta"],
            "codebook_def#loc_range": priors["loc_range"],
        }
        algo = MonaiAlgo(
            str(ROOT),
            local_epochs=job["local_epochs"],
            send_weight_diff=False,
            config_train_filename=CONFIGS,
            train_kwargs=options,
            config_evaluate_filename=None,
        )
        algo.initialize({ExtraItems.CLIENT_NAME: self.name})
        algo.train_workflow.run()
        self.algo = algo
        if any(True for _ in self.part("objective").parameters()):
            raise InputError("the objective learns parameters of its own, which sites do not share.")
        dataset = self.part("train#dataset")
        scans = [Tokens.cached(dataset, i) for i in range(len(dataset.data))]
        self.looks = torch.stack([look(scan.described) for scan in scans])
        if job["recipe"] == "codebook":
            self.shared = SharedCodebooks(self.part("train#codebooks"), scans, self.index, self.sites)

    def part(self, name: str) -> Any:
        """A part of the site's training, by its id in the config."""
        return self.algo.train_workflow.parser.get_parsed_content(name)

    def first_weights(self) -> dict[str, torch.Tensor]:
        """Those that every site starts from: by the seed alone, whatever else the site has drawn."""
        network = self.part("network_def")
        torch.manual_seed(self.job.get("seed", 0))
        return type(network)(**network.arguments).state_dict()

    def train(self, weights: dict[str, torch.Tensor], number: int) -> Message:
        """The network's weights after the local epochs of round `number`, from the weights of all."""
        trainer, scheduler = self.algo.trainer, self.part("lr_scheduler")
        steps = len(self.part("train#dataloader"))
        trainer.state.epoch = (number - 1) * self.job["local_epochs"]
        trainer.state.iteration = done = trainer.state.epoch * steps
        if scheduler.last_epoch != done:  # rounds were missed
            scheduler.last_epoch = done
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_lr(), strict=True):
                group["lr"] = rate
        self.algo.train(ExchangeObject(weights=weights))
        return {key: value.numpy().copy() for key, value in self.algo.get_weights().weights.items()}


@contextmanager
def kept_at_site(path: Path) -> Iterator[None]:
    """Write what this thread logs into a file of the site, and nowhere else: FLARE sends a site's error log to the server.

    Messages of a training name patients where a scan is at fault.
    """
    thread = threading.get_ident()
    path.parent.mkdir(parents=True, exist_ok=True)
    own = logging.FileHandler(path)
    own.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    own.addFilter(lambda record: record.thread == thread)
    root = logging.getLogger()
    others = list(root.handlers)

    def not_this(record: logging.LogRecord) -> bool:
        return record.thread != thread

    for handler in others:
        handler.addFilter(not_this)
    root.addHandler(own)
    try:
        yield
    finally:
        root.removeHandler(own)
        own.close()
        for handler in others:
            handler.removeFilter(not_this)
