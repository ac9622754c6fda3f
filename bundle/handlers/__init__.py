# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers: schedules, reproducible and resumable training, files written by evaluation and inference."""

from bundle.handlers.evaluation import ScoreScans, score_maps
from bundle.handlers.explanations import ExplainScans
from bundle.handlers.failed import failed_scans
from bundle.handlers.figures import draw_reconstructions, draw_training, report_evaluation, save_figure
from bundle.handlers.metrics_writer import MetricsWriter, format_metrics_table
from bundle.handlers.tracking import HistoryWriter, MlflowHandler, Progress, WandbHandler, loss_of
from bundle.handlers.training import EpochSeed, GradientClip, geometric

__all__ = [
    "EpochSeed",
    "ExplainScans",
    "GradientClip",
    "HistoryWriter",
    "MetricsWriter",
    "MlflowHandler",
    "Progress",
    "ScoreScans",
    "WandbHandler",
    "draw_reconstructions",
    "draw_training",
    "failed_scans",
    "format_metrics_table",
    "geometric",
    "loss_of",
    "report_evaluation",
    "save_figure",
    "score_maps",
]
