# SPDX-License-Identifier: GPL-2.0-only
"""P6: the engine does not guess what an unknown feature of a backing device means."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bcachectl.ondisk.superblock import BDEV_WITH_FEATURES, SB_BYTES, SB_SECTOR, decode_superblock, encode_superblock
from tests.over import exported
from tests.require import patience

OFFSET = SB_SECTOR << 9


@pytest.mark.parametrize(("word", "text"), [
    ("feature_incompat", "Unsupported incompatible feature found"),
    ("feature_ro_compat", "Unsupported read-only compatible feature found"),
])
def test_p6_unknown_features_of_a_backing_device(golden: Callable[..., Path], word: str, text: str) -> None:
    story = golden("fresh", writable=True)
    cache, backing = story / "cache.img", story / "back0.img"
    with backing.open("r+b") as file:
        file.seek(OFFSET)
        sb = decode_superblock(file.read(SB_BYTES))
        file.seek(OFFSET)
        file.write(encode_superblock(replace(sb, version=BDEV_WITH_FEATURES, **{word: 1 << 7})))
    before = cache.read_bytes(), backing.read_bytes()
    command = [sys.executable, "-m", "bcachectl", "engine", "run", "--cache", str(cache), "--backing", str(backing),
               *exported(["--export", "nbd"]), "--no-live"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=patience(60), check=False)
    assert ended.returncode == 1
    assert text in ended.stderr
    assert str(backing) in ended.stderr
    assert (cache.read_bytes(), backing.read_bytes()) == before
