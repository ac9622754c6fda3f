# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers: schedules, reproducible and resumable training, files written by evaluation and inference."""

from .evaluation import ScoreScans, score_maps
from .metrics_writer import MetricsWriter, format_metrics_table
from .prediction_writer import PredictionWriter
from .schedules import geometric, step
from .tracking import Progress, WandbHandler
from .training import EpochSeed, GradientClip, RunCheckpoint

__all__ = [
    "EpochSeed",
    "GradientClip",
    "MetricsWriter",
    "PredictionWriter",
    "Progress",
    "RunCheckpoint",
    "ScoreScans",
    "WandbHandler",
    "format_metrics_table",
    "geometric",
    "score_maps",
    "step",
]
