# SPDX-License-Identifier: GPL-2.0-only
"""Measurements, never tests: they print figures beside their targets and beside a peer that ran in the same minute."""
