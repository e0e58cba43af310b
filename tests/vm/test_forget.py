# SPDX-License-Identifier: GPL-2.0-only
"""The kernel registers a set that was made to forget one of its backing devices, and the other volume is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl import cli
from tests.vm.kernel_side import Visit


@pytest.mark.timeout(400)
def test_kernel_registers_a_set_that_forgot_a_device(golden: Callable[..., Path], tmp_path: Path) -> None:
    story = golden("two_backing", writable=True)
    cache, alive = story / "cache.img", story / "back0.img"
    words = ["forget-backing", cache, "bcache1", "--export", tmp_path / "saved.img", "--backup", tmp_path / "undo"]
    assert cli.run([str(word) for word in words]) == 0
    visit = Visit(tmp_path / "share", cache=cache, backings=[alive])
    visit.register()
    visit.copy_out()
    visit.stop()
    seen = visit.run()
    assert seen.result.complaints() == []
    truth = json.loads((golden("two_backing") / "truth0.json").read_text())["sha256"]
    assert hashlib.sha256(seen.contents[0]).hexdigest() == truth
    assert cli.run(["fsck", str(cache), str(alive)]) == 0
