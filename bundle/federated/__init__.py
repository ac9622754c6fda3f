# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Hospitals train together by NVIDIA FLARE: what one of them computes and sends, and its place in a FLARE job."""
