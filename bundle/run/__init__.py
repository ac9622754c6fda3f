# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A job from its start to its results: what the configs name of it."""

from bundle.run import distributed
from bundle.run.checkpoint import BestModel, CollapseGuard, Patience, RunCheckpoint
from bundle.run.engine import ScanEvaluator, prepare_batch
from bundle.run.finish import Finish
from bundle.run.parallel import run_parallel
from bundle.run.predict import cores, evaluate, predict
from bundle.run.results import PredictionWriter
from bundle.run.scans import (
    cohort_identity,
    margin_voxels,
    outcomes,
    scans_to_evaluate,
    scans_to_infer,
    share_of_window,
    training_cohort,
)
from bundle.run.settings import load_weights, preprocessing_settings, read_settings, training_settings
from bundle.run.start import begin, exit_on_sigterm, folder_of, make_folder, require
from bundle.run.trained import Ensemble, TrainedModel
from bundle.run.training import censoring_weights, check_outcomes, parameter_groups, usual_epochs

__all__ = [
    "BestModel",
    "CollapseGuard",
    "Ensemble",
    "Finish",
    "Patience",
    "PredictionWriter",
    "RunCheckpoint",
    "ScanEvaluator",
    "TrainedModel",
    "begin",
    "censoring_weights",
    "check_outcomes",
    "cohort_identity",
    "cores",
    "distributed",
    "evaluate",
    "exit_on_sigterm",
    "folder_of",
    "load_weights",
    "make_folder",
    "margin_voxels",
    "outcomes",
    "parameter_groups",
    "predict",
    "prepare_batch",
    "preprocessing_settings",
    "read_settings",
    "require",
    "run_parallel",
    "scans_to_evaluate",
    "scans_to_infer",
    "share_of_window",
    "training_cohort",
    "training_settings",
    "usual_epochs",
]
