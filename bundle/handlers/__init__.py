# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers: schedules, reproducible and resumable training, files written by evaluation and inference."""

from .evaluation import ScoreScans, score_maps
from .figures import draw_training, report_evaluation, save_figure
from .metrics_writer import MetricsWriter, format_metrics_table
from .prediction_writer import PredictionWriter
from .schedules import geometric, step
from .tracking import HistoryWriter, Progress, WandbHandler
from .training import EpochSeed, GradientClip, RunCheckpoint

__all__ = [
    "EpochSeed",
    "GradientClip",
    "HistoryWriter",
    "MetricsWriter",
    "PredictionWriter",
    "Progress",
    "RunCheckpoint",
    "ScoreScans",
    "WandbHandler",
    "draw_training",
    "format_metrics_table",
    "geometric",
    "report_evaluation",
    "save_figure",
    "score_maps",
    "step",
]
