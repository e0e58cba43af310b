# SPDX-License-Identifier: GPL-2.0-only
"""A journal that is full to its last block: what kernels do with it, and that they take the set after a repair."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl import cli
from tests.fsck.full_journal import fill_journal
from tests.fsck.image import Image
from tests.vm.kernel_side import Visit


@pytest.mark.timeout(400)
def test_kernel_registers_after_the_repair(golden: Callable[..., Path], tmp_path: Path) -> None:
    story = golden("dirty_crash", writable=True)
    cache, backing = story / "cache.img", story / "back0.img"
    image = Image(cache.read_bytes(), [])
    fill_journal(image)
    cache.write_bytes(image.cache.content())
    assert cli.run(["fsck", str(cache), str(backing)]) == 4
    assert cli.run(["fsck", "-p", str(cache), str(backing), "--backup", str(tmp_path / "undo")]) == 1
    visit = Visit(tmp_path / "share", cache=cache, backings=[backing])
    visit.register()
    visit.copy_out()
    visit.stop()
    seen = visit.run()
    assert seen.result.complaints() == []
    truth = json.loads((golden("dirty_crash") / "truth0.json").read_text())["sha256"]
    assert hashlib.sha256(seen.contents[0]).hexdigest() == truth
