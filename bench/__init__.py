# SPDX-License-Identifier: GPL-2.0-only
"""Measurements, never tests: they print figures beside their targets and beside a peer that ran in the same minute."""

import os

# As `bcachectl.__main__` has it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
