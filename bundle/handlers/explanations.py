# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Write and score explanations during an evaluation."""

from pathlib import Path

import torch
from ignite.engine import Engine, Events

from bundle.data.stream import ScanStream
from bundle.errors import InputError, input_error_of, unforeseen
from bundle.explain.cubelets import Cubelets
from bundle.explain.volumes import Explanation, Explanations, write_explanation
from bundle.metrics import LocalisationMetric


class ExplainScans:
    """Handler that writes every explanation of a scan, and scores those that are hot or cold.

    Expects what :class:`~bundle.handlers.ScoreScans` does. A scan that can't be explained doesn't end the run.

    Args:
        explanations: of the scans.
        output_dir: its `maps/` gets the files.
        stream: of the scans; notes what was wrong.
        maps_dir: of another tool's maps, which can't be explained (an InputError); None to predict.

    Attributes:
        metrics: of the maps that are scored, by name.
    """

    def __init__(self, explanations: Explanations, output_dir: str, stream: ScanStream, maps_dir: str | None) -> None:
        if explanations.chosen and maps_dir is not None:
            raise InputError("--explain explains a network; leave it out with --maps_dir.")
        self.explanations = explanations
        self.output_dir = Path(output_dir)
        self.stream = stream
        self.metrics = {n: LocalisationMetric() for n, (entry, _) in explanations.chosen.items() if entry.hot}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)

    def add(self, engine: Engine) -> None:
        for scan, output in zip(engine.state.batch, engine.state.output):  # no output of a scan without a prediction
            try:
                for each in self.explanations.of(scan, output):
                    write_explanation(self.output_dir, scan, each)
                    self.score(scan, output, each)
            except Exception as e:
                patient_id = scan["patient_id"]
                self.stream.note(patient_id, str(input_error_of(e) or unforeseen(patient_id, e, "explaining")))

    def score(self, scan: dict, output: dict, explanation: Explanation) -> None:
        """Score one map; one that is hot where it is better for the patient, from its coldest voxel of the lung on."""
        name, volume, hot, _ = explanation
        if hot == 0 or isinstance(volume, Cubelets):
            return
        if hot < 0:
            inside = output["scan_heat"].cpu() > 0
            volume = torch.where(inside, volume[inside].max() - volume, 0.0) if bool(inside.any()) else 0 * volume
        self.metrics[name](
            [volume],
            [scan.get("gt_mask")],
            confounder=[scan.get("confounder_mask")],
            time=output["label"].cpu()[:1],
            event=output["label"].cpu()[1:],
            patient_id=[scan["patient_id"]],
        )
