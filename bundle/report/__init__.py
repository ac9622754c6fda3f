# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The HTML report of an inference run and its pictures."""

from .report import failed_section, patient_section, write_report

__all__ = ["failed_section", "patient_section", "write_report"]
