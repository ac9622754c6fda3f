# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A job from its start to its results: what the configs name of it."""

# ruff: noqa: F401
from bundle.run import distributed
from bundle.run.checkpoint import BestModel, CollapseGuard, Patience, RunCheckpoint
from bundle.run.codebooks import CodebookStage
from bundle.run.engine import ScanEnsembleEvaluator, ScanEvaluator, cores, evaluate, prepare_batch, prepare_images
from bundle.run.parallel import predict, run_parallel
from bundle.run.pretrained import Pretrained, fine_tuned, given_codebooks
from bundle.run.results import PredictionWriter
from bundle.run.scans import (
    cohort_identity,
    image_cohort,
    outcomes,
    scans_to_evaluate,
    scans_to_infer,
    training_cohort,
    usual_tmax,
)
from bundle.run.settings import (
    margin_voxels,
    preprocessing_settings,
    pretraining_settings,
    read_settings,
    share_of_window,
    training_settings,
)
from bundle.run.start import begin, folder_of, make_folder, require
from bundle.run.trained import Ensemble, TrainedModel
from bundle.run.training import Finish, censoring_weights, check_outcomes, parameter_groups, usual_epochs
