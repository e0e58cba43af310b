# SPDX-License-Identifier: GPL-2.0-only
"""``make damage`` says how many cases there are; ``python -m tests.damage`` lists them."""

from __future__ import annotations

import os

import pytest

from tests.damage import cases


def pytest_report_header(config: pytest.Config) -> list[str]:
    """A line at the head of a complete run."""
    if os.environ.get("BCACHECTL_DAMAGE") != "all":
        return []
    every = cases()
    return [f"{len(every)} cases of damage to {len({case.base for case in every})} images"]
