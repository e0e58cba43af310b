# SPDX-License-Identifier: GPL-2.0-only
"""Tests, one directory a group; each group is a pytest marker of the same name."""
