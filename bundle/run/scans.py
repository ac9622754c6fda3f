# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Which scans a job is about."""

import hashlib
import json
import logging
import os

import torch

from bundle.data import encode_clinical, longest_follow_up, patient_of, read_cohort, single_scan, split_cohort
from bundle.data.clinical import clinical_kinds
from bundle.data.cohort import patient_digest
from bundle.errors import InputError
from bundle.reading.dicom import is_dicom

USUAL_TMAX = 100  # months

logger = logging.getLogger(__name__)


def usual_tmax(cohort: str | None) -> int:
    """Last month of the model: 100 or, where a patient was followed longer, the next ten months after that."""
    longest = 0.0 if cohort is None else longest_follow_up(cohort)
    tmax = max(USUAL_TMAX, 10 * int(longest // 10) + 10)
    if tmax > USUAL_TMAX:
        logger.info(f"tmax, the last month of the model, is {tmax}: the longest follow-up is {longest:g} months.")
    return tmax


def training_cohort(
    cohort: str | None, fold: int | None, seed: int, clinical: dict[str, str], tmax: int, on_fault: str
) -> dict[str, list[dict]]:
    """Records by part (train, val, test) of a checked cohort; all empty while no cohort is named."""
    if cohort is None:
        return {"train": [], "val": [], "test": []}
    records = read_cohort(cohort, clinical=clinical, tmax=tmax, on_fault=on_fault)
    parts = split_cohort(records, fold=fold, seed=seed)
    months = sorted(record["time"] for record in records)
    sizes = ", ".join(f"{len(rows)} {part}" for part, rows in parts.items())
    followed = f"followed for {months[0]:g} to {months[-1]:g} months"
    logger.info(f"cohort: {sizes} scans; {sum(r['event'] for r in records)} of patients who died; {followed}.")
    if months[-1] < 12:
        logger.warning("nobody was followed for a year: are these times in years? Months are expected.")
    return parts


def image_cohort(cohort: str | None, seed: int, on_fault: str) -> dict[str, list[dict]]:
    """Records by part (train, val) of a checked cohort whose outcomes are not asked; both empty while none is named.

    The parts are those of the column ``split``, whose test scans are left out; else a tenth of the patients validates.
    """
    if cohort is None:
        return {"train": [], "val": []}
    records = read_cohort(cohort, need_outcome=False, on_fault=on_fault)
    if all("split" in record for record in records):
        part = {record["patient_id"]: record["split"] for record in records}
    else:
        patients = sorted({patient_of(record) for record in records})
        order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(seed)).tolist()
        validate = {patients[i] for i in order[: max(1, len(patients) // 10)]}
        part = {record["patient_id"]: "val" if patient_of(record) in validate else "train" for record in records}
    parts = {name: [record for record in records if part[record["patient_id"]] == name] for name in ("train", "val")}
    sizes = ", ".join(f"{len(rows)} {name}" for name, rows in parts.items())
    if not all(parts.values()):
        raise InputError(f"{cohort}: {sizes} scans (expected at least 1 of each).")
    logger.info(f"images: {sizes} scans; no outcome is asked.")
    return parts


def cohort_identity(parts: dict[str, list[dict]]) -> dict:
    """Who is in a cohort and what became of them, for `settings.json`: digests that name nobody and no image."""
    records = [(part, record) for part in ("train", "val") for record in parts[part]]
    known = [
        [part, r["patient_id"], r.get("time"), r.get("event"), *r.get("covariates", {}).values()] for part, r in records
    ]
    return {
        "cohort_sha256": hashlib.sha256(json.dumps(known).encode()).hexdigest(),
        "trained_on": sorted({patient_digest(patient_of(record)) for _, record in records}),
    }


def outcomes(records: list[dict]) -> torch.Tensor:
    """(time in months, event) of each record, (N, 2)."""
    return torch.tensor([[r["time"], r["event"]] for r in records]).view(-1, 2)


def scans_to_evaluate(cohort: str | None, settings: dict | None, split: str | None, on_fault: str) -> list[dict]:
    """The scans of a cohort to evaluate: those of `split`, without any that the weights were trained on.

    Who was followed beyond the model's last month counts as censored there, and `note` says so.

    Args:
        cohort: CSV file; None gives an empty list.
        settings: of the weights; None (maps of another tool) leaves no scan out.
        split: value of the column ``split`` to keep; None for ``test`` where the cohort has it, else all.
        on_fault: ``fail`` or ``skip``, for :func:`bundle.data.read_cohort`.

    Raises:
        InputError: the cohort has no such scan, or none that the weights haven't seen.
    """
    if cohort is None:
        return []
    settings = settings or {"clinical": {}, "objective": {"tmax": None}, "trained_on": []}
    kinds, tmax = clinical_kinds(settings["clinical"]), settings["objective"]["tmax"]
    records = read_cohort(cohort, clinical=kinds, need_clinical=False, on_fault=on_fault)
    splits = {r.get("split") for r in records}
    if split is None and "test" in splits:
        split = "test"
    if split is not None:
        if split not in splits:
            raise InputError(f'{cohort} has no scan with split "{split}".')
        records = [r for r in records if r.get("split") == split]
    if settings.get("trained_on_left_out"):
        logger.warning("whom the weights were trained on was left out of the bundle: be sure that none is evaluated here.")
    unseen = without_trained_on(records, settings)
    if len(unseen) < len(records):
        logger.info(f"evaluating {len(unseen)} of {len(records)} scans; the weights know patients of the others' ids.")
    if not unseen:
        raise InputError(
            f"the weights were trained on patients with the ids of all {len(records)} scans to evaluate in {cohort} "
            "(expected others; patients of another hospital need ids of their own, such as B_P001)."
        )
    return encode_clinical(censored_at(tmax, unseen), settings["clinical"])


def without_trained_on(records: list[dict], settings: dict) -> list[dict]:
    """The records of patients whose ids are not among those that weights with these settings were trained on."""
    seen = set(settings["trained_on"])
    return [r for r in records if patient_digest(patient_of(r)) not in seen]


def censored_at(tmax: int | None, records: list[dict]) -> list[dict]:
    """The records with who was followed beyond `tmax` months censored there."""
    if not (beyond := sum(r["time"] > tmax for r in records) if tmax else 0):
        return records
    logger.info(f"{beyond} of {len(records)} scans count as censored at month {tmax}, the model's last.")
    note = f"followed up to month {{:g}}, counted as censored at {tmax}, the model's last"
    return [
        r | {"time": float(tmax), "event": 0, "note": note.format(r["time"])} if r["time"] > tmax else r for r in records
    ]


def scans_to_infer(
    image: str | None, cohort: str | None, encoding: dict, series: str | None = None, dicom_out: bool = False
) -> list[dict]:
    """The scans to predict: one image or the rows of a cohort; empty while none is named.

    Args:
        image: file or DICOM folder; its covariates are all missing.
        cohort: CSV file.
        encoding: of covariates, from the settings of the weights.
        series: SeriesInstanceUID to take from a DICOM folder; None lets the folder's chest CT be chosen.
        dicom_out: whether maps are to be written as DICOM.

    Raises:
        InputError: both are named, or a series of what is no folder, or DICOM is to be written of what is none.
    """
    if image is not None and cohort is not None:
        raise InputError("give --image or --cohort, not both.")
    if series is not None and not (image is not None and is_dicom(image)):
        raise InputError("--series names one of the DICOM series of a folder: give the folder as --image.")
    records = []
    if image is not None:
        if dicom_out and os.path.exists(image) and not is_dicom(image):
            raise InputError("--dicom_out true needs the slices of a DICOM series: give their folder or ZIP as --image.")
        records = [record | {"series": series} for record in single_scan(image)]
    elif cohort is not None:
        kinds = clinical_kinds(encoding)
        records = read_cohort(cohort, need_outcome=False, clinical=kinds, need_clinical=False, on_fault="row")
    return encode_clinical(records, encoding)
