# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A job from its start to its results."""

from .checkpoint import RunCheckpoint
from .engine import ScanEvaluator, prepare_batch
from .ensemble import joint_settings, member_files, member_networks, member_settings
from .finish import finish_training
from .parallel import run_parallel
from .results import PredictionWriter
from .scans import margin_voxels, outcomes, scans_to_evaluate, scans_to_infer, share_of_window, training_cohort
from .settings import load_weights, read_settings, reconcile, training_settings
from .start import begin, exit_on_sigterm, flag, make_folder, require

__all__ = [
    "PredictionWriter",
    "RunCheckpoint",
    "ScanEvaluator",
    "begin",
    "exit_on_sigterm",
    "finish_training",
    "flag",
    "joint_settings",
    "load_weights",
    "make_folder",
    "margin_voxels",
    "member_files",
    "member_networks",
    "member_settings",
    "outcomes",
    "prepare_batch",
    "read_settings",
    "reconcile",
    "require",
    "run_parallel",
    "scans_to_evaluate",
    "scans_to_infer",
    "share_of_window",
    "training_cohort",
    "training_settings",
]
