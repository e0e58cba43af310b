# SPDX-License-Identifier: GPL-2.0-only
"""With BCACHECTL_VM_KERNEL=6.1 (``make vm KERNEL=6.1``) only what runs on that kernel is run; else everything."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = os.environ.get("BCACHECTL_VM_KERNEL")
    if not wanted:
        return
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        series = parameters.get("series") or getattr(parameters.get("case"), "series", wanted)
        (kept if series == wanted else left_out).append(item)
    items[:] = kept
    if left_out:
        config.hook.pytest_deselected(items=left_out)
