# SPDX-License-Identifier: GPL-2.0-only
"""``fake("dirty_crash")``: the kernel's files of that story, and a driver that answers to writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.sysfs.fake import FakeKernel


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], FakeKernel]:
    return lambda story: FakeKernel(tmp_path / "kernel", story, monkeypatch)
