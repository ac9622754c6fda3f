# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Sharing a trained model: pack it, audit what another packed, install it, try it."""
