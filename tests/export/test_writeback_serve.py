# SPDX-License-Identifier: GPL-2.0-only
"""A set whose dirty data was written back offline, run by the engine afterwards: every volume reads as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from bcachectl import cli
from tests.export.engine import Engine


@pytest.mark.parametrize("story", ["dirty_crash", "two_backing", "flash_volume"])
def test_engine_after_writeback(story: str, golden: Callable[..., Path], tmp_path: Path) -> None:
    """The keys still say dirty; the engine takes that as it is, and its own write-back does no harm."""
    truths = [json.loads(path.read_text()) for path in sorted(golden(story).glob("truth*.json"))]
    images = golden(story, writable=True)
    backings = [str(path) for path in sorted(images.glob("back*.img"))]
    assert cli.run(["writeback", str(images / "cache.img"), *backings]) == 0
    options = ["--cache", str(images / "cache.img"), *(word for path in backings for word in ("--backing", path))]
    for _start in range(2):
        with Engine(tmp_path, *options, "--export", "nbd", "--debug-checks") as engine:
            for number, truth in enumerate(truths):
                with engine.client(f"bcache{number}") as client:
                    assert sha256(client.read_all(1 << 20)).hexdigest() == truth["sha256"]
        assert engine.status == 0
    assert cli.run(["fsck", str(images / "cache.img"), *backings]) == 0
