# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The HTML reports of an inference run and of an evaluation, their pictures and figures."""

from bundle.report.report import metric_groups, patient_section, write_evaluation_report, write_report

__all__ = ["metric_groups", "patient_section", "write_evaluation_report", "write_report"]
