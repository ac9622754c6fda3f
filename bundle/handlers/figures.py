# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Save the figures of a training and of an evaluation, and put an evaluation's into a report."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import ignite.distributed as idist
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.utils.data import Dataset

from bundle.files import write_atomically
from bundle.metrics import MapDistribution, SurvivalMetric
from bundle.networks import MaskedAutoencoder
from bundle.report import write_evaluation_report
from bundle.report.figures import (
    calibration,
    kaplan_meier_by_risk,
    map_distribution,
    predicted_against_real,
    reconstructions,
    training_curves,
)
from bundle.report.pictures import png, svg

logger = logging.getLogger(__name__)

CALIBRATION_AT = (12, 24, 60)


def save_figure(figure: Figure, folder: Path, name: str) -> bytes:
    """Write `<name>.png` and `<name>.svg` into a folder, made if it isn't there; returns the PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = png(figure, dpi=150)
    write_atomically(folder / f"{name}.png", lambda path: path.write_bytes(picture))
    write_atomically(folder / f"{name}.svg", lambda path: path.write_bytes(svg(figure)))
    return picture


def draw_training(ckpt_dir: str) -> None:
    """Draw `history.csv` of a training into `figures/training_curves.png` and `.svg` beside it, if there is one."""
    history = Path(ckpt_dir) / "history.csv"
    if idist.get_rank() == 0 and history.is_file():
        save_figure(training_curves(pd.read_csv(history)), history.parent / "figures", "training_curves")


@torch.no_grad()
def draw_reconstructions(
    network: MaskedAutoencoder, dataset: Dataset, hu_window: Sequence[float], ckpt_dir: str, number: int = 3
) -> None:
    """Draw what a network tells of hidden patches of the first scans into `figures/reconstructions.png` and `.svg`."""
    network.eval()
    device, shown = next(network.parameters()).device, []
    for i in range(min(number, len(dataset))):
        image, lung = (torch.as_tensor(dataset[i][key]).to(device) for key in ("image", "lung"))
        shown.append((image[0].cpu().numpy(), network(image[None], lung[None])[0].cpu().numpy()))
    save_figure(reconstructions(shown, hu_window), Path(ckpt_dir) / "figures", "reconstructions")


def report_evaluation(
    output_dir: str,
    survival: SurvivalMetric,
    distribution: MapDistribution,
    ckpt: str | Sequence[str] | None = None,
    figures: bool = True,
    settings: dict | None = None,
) -> None:
    """Draw an evaluation into `figures/` and write `report.html` with its figures and what `metrics.json` holds.

    In a distributed run every process must call this; the first one draws while the others wait.

    Args:
        output_dir: where :class:`~bundle.handlers.MetricsWriter` wrote.
        survival: the metric of the predictions; without any (maps of another tool) there is nothing to draw.
        distribution: of the maps' locations and weights.
        ckpt: weights; with a `history.csv` beside them the training is drawn as well (an ensemble's isn't).
        figures: if false, nothing is drawn or written.
        settings: of the weights, which say what their training learnt; None for maps of another tool.
    """
    if not figures:
        return
    table, groups = survival.table(), distribution.aggregate()  # every process takes part in the gather
    if idist.get_rank() == 0:
        folder = Path(output_dir)
        drawn = evaluation_figures(table, groups, ckpt)
        pictures = {name: save_figure(figure, folder / "figures", name) for name, figure in drawn.items()}
        metrics = json.loads((folder / "metrics.json").read_text())
        write_evaluation_report(folder / "report.html", metrics, pictures, settings)
        logger.info(f"report: {folder / 'report.html'}")
    idist.barrier()  # a process that ends with an error, because a scan failed, ends the others


def evaluation_figures(table: pd.DataFrame, groups: Mapping, ckpt: str | Sequence[str] | None) -> dict[str, Figure]:
    """The figures of an evaluation by name, from :meth:`~bundle.metrics.SurvivalMetric.table` and the maps' distribution."""
    figures = {}
    if len(table):
        outcome = table["time"], table["event"]
        death = {horizon: table[f"death_{horizon}m"] for horizon in CALIBRATION_AT}
        figures = {
            "predicted_against_real": predicted_against_real(table["median_months"], *outcome),
            "kaplan_meier_by_risk": kaplan_meier_by_risk(-table["mean_months"], *outcome),
            "calibration": calibration(death, *outcome),
            "map_distribution": map_distribution(groups),
        }
        one = isinstance(ckpt, (str, Path))
        if one and (history := Path(ckpt).with_name("history.csv")).is_file():
            figures["training_curves"] = training_curves(pd.read_csv(history))
    return figures
