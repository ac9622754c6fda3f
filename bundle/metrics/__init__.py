# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How right the predicted times are, and how right the maps are: metrics with bootstrap intervals."""

from bundle.metrics.bootstrap import bootstrap, with_interval
from bundle.metrics.distribution import MapDistribution
from bundle.metrics.localisation import LocalisationMetric
from bundle.metrics.survival import SurvivalMetric
from bundle.metrics.validation import ConcordanceIndex, ExplainedShare, MeanLogLikelihood, PartialLogLikelihood, code_metrics

__all__ = [
    "ConcordanceIndex",
    "ExplainedShare",
    "LocalisationMetric",
    "MapDistribution",
    "MeanLogLikelihood",
    "PartialLogLikelihood",
    "SurvivalMetric",
    "bootstrap",
    "code_metrics",
    "with_interval",
]
