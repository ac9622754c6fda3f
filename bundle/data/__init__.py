# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
