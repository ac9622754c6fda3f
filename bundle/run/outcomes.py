# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What became of the patients of an inference run, where the cohort knows, against what was predicted."""

from typing import Any

import torch

from bundle.metrics import SurvivalMetric
from bundle.report.figures import kaplan_meier_by_risk, predicted_against_real
from bundle.report.pictures import png
from bundle.run.scans import censored_at, outcomes, without_trained_on


def against_outcomes(found: list[tuple[dict, list[float]]], settings: dict) -> dict[str, Any]:
    """What `cohort.html` says of predictions whose outcome the cohort knows: `said`, `metrics`, `pictures`.

    Patients whom the weights were trained on don't count; who was followed beyond the model's last month is censored there.

    Args:
        found: the record of each scan and its P(T = 1..tmax months).
        settings: of the weights.
    """
    known = [record for record, _ in found if "time" in record]
    if not known:
        return {"said": [], "metrics": None, "pictures": {}}
    unseen = without_trained_on(known, settings)
    said = [f"The outcome is known of {len(known)} of {len(found)} scans."]
    if len(unseen) < len(known):
        said.append(f"The weights were trained on the patients of {len(known) - len(unseen)} of these; they don't count.")
    if settings.get("trained_on_left_out"):
        said.append("Whom the weights were trained on is not recorded: be sure that it is none of these.")
    if not unseen:
        return {"said": said, "metrics": None, "pictures": {}}
    pmf, metric = {record["patient_id"]: each for record, each in found}, SurvivalMetric()
    scored = censored_at(len(next(iter(pmf.values()))), unseen)
    names = [record["patient_id"] for record in scored]
    metric(torch.tensor([pmf[name] for name in names], dtype=torch.float64), outcomes(scored), patient_id=names)
    table = metric.table()
    outcome = table["time"], table["event"]
    figures = {
        "predicted_against_real": predicted_against_real(table["median_months"], *outcome),
        "kaplan_meier_by_risk": kaplan_meier_by_risk(-table["mean_months"], *outcome),
    }
    pictures = {name: png(figure) for name, figure in figures.items()}
    return {"said": said, "metrics": metric.aggregate(), "pictures": pictures}
