# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What made the tables and pictures in docs/."""
