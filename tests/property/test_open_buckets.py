# SPDX-License-Identifier: GPL-2.0-only
"""What tells that no open bucket ends at a position, against the index of those that do."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from bcachectl.engine.buckets import Buckets
from bcachectl.engine.open_buckets import NEAR, SectorAllocator
from bcachectl.ondisk.geometry import Geometry

GEOMETRY = Geometry(block_size_sectors=8, bucket_size_sectors=64, nbuckets=400, first_bucket=1)


@given(steps=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6), st.integers(0, 3), st.booleans()), max_size=200))
def test_near_counts_the_indexed_positions(steps: list[tuple[int, int, int, bool]]) -> None:
    buckets = Buckets(GEOMETRY)
    numbers = iter(range(1, 400))
    alloc = SimpleNamespace(available_nowait=lambda _reserve: 1, alloc_nowait=lambda _reserve: next(numbers))
    sectors = SectorAllocator(cast(Any, SimpleNamespace(buckets=buckets, alloc=alloc, geometry=GEOMETRY)))
    for block, nblocks, write_point, flash in steps:
        # Positions that meet often, some of them in the same counter.
        position = 8 * (block % 20) + 8 * NEAR * (block // 20)
        sectors.alloc_nowait(position, 8 * nblocks, write_point=write_point, flash=flash)
        expected = Counter(place >> 3 & (NEAR - 1) for place in sectors.by_position)
        assert {index: count for index, count in enumerate(sectors.near) if count} == expected
