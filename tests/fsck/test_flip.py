# SPDX-License-Identifier: GPL-2.0-only
"""A share of all flips of `tests.fsck.flip`; with BCACHECTL_FLIPS=all each of them, in shards."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fsck.flip import flips, metadata, shard
from tests.fsck.image import Image

SHARE = 400
SHARD = os.environ.get("BCACHECTL_SHARD") or "1/1"


@pytest.mark.timeout(0 if os.environ.get("BCACHECTL_FLIPS") == "all" else 300)
@pytest.mark.parametrize("name", ["attached_clean", "two_backing", "gen_churn"])
def test_flips(golden: Callable[..., Path], name: str, record_property: Callable[[str, object], None]) -> None:
    image = Image((golden(name) / "cache.img").read_bytes(), [])
    every = shard(list(metadata(image)), SHARD)
    if os.environ.get("BCACHECTL_FLIPS") != "all":
        by_structure: dict[str, list[object]] = {}
        for byte in every:
            by_structure.setdefault(byte.structure, []).append(byte)
        dice = random.Random(name)
        every = [byte for some in by_structure.values() for byte in dice.sample(some, min(len(some), SHARE // 5))]
    counts = flips(image, every, 1)
    record_property("flips", [(structure, outcome, count) for (structure, outcome), count in sorted(counts.items())])
    print(name, len(every), "bytes:", dict(counts))
