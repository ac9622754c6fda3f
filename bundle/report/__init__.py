# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The HTML reports of an inference run and of an evaluation, their pictures and figures."""

from bundle.report.report import ScanViews, metric_groups, write_cohort_page, write_evaluation_report, write_scan_report

__all__ = ["ScanViews", "metric_groups", "write_cohort_page", "write_evaluation_report", "write_scan_report"]
