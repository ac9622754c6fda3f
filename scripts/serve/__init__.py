# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A server that predicts scans which are uploaded to it: `python -m scripts.serve`; see docs/serving.md."""
