# SPDX-License-Identifier: GPL-2.0-only
"""Counts, map, gens and priorities in bulk agree with counting one by one."""

from __future__ import annotations

import numpy as np
import pytest

from bcachectl.census import (
    BTREE_PRIO,
    INITIAL_PRIO,
    STATE_CLEAN,
    STATE_DIRTY,
    STATE_METADATA,
    STATE_UNUSED,
    census,
    gen_snapshot,
    prio_snapshot,
)
from bcachectl.snapshot import GEN_GUARD, QUANTILES


@pytest.mark.parametrize(("nbuckets", "cells"), [(1, 1), (7, 3), (600, 80), (600, 5000), (5000, 3), (513, 1),
                                                 (200000, 7)])
def test_every_bucket_is_counted_once(nbuckets: int, cells: int) -> None:
    generator = np.random.default_rng(nbuckets)
    state = generator.integers(0, 7, nbuckets).astype(np.uint8)
    used = generator.integers(0, 1025, nbuckets).astype(np.uint16)
    counts, buckets = census(state, used, bucket_size_sectors=1024, cells=cells)
    expected = [int((state == number).sum()) for number in range(7)]
    assert [counts.unused, counts.free, counts.open, counts.clean] == expected[:4]
    assert [counts.dirty, counts.metadata, counts.reserved] == expected[4:]
    assert buckets is not None
    assert len(buckets.states) == len(buckets.fills) == min(cells, nbuckets)
    assert all(0 <= fill <= 100 for fill in buckets.fills)
    assert census(state, used, bucket_size_sectors=1024, cells=0) == (counts, None)


def test_dirty_shows_before_anything_else() -> None:
    state = np.full(8, STATE_CLEAN, np.uint8)
    state[5:7] = STATE_DIRTY
    used = np.full(8, 512, np.uint16)
    _counts, buckets = census(state, used, bucket_size_sectors=1024, cells=1)
    assert buckets is not None
    assert (buckets.states, buckets.fills, buckets.buckets_per_cell) == ("d", (50,), 8.0)
    state[6] = STATE_CLEAN
    _counts, buckets = census(state, used, bucket_size_sectors=1024, cells=1)
    assert buckets is not None
    assert buckets.states == "c"


def test_metadata_is_full_and_unused_is_empty() -> None:
    state = np.array([STATE_UNUSED, STATE_METADATA], np.uint8)
    _counts, buckets = census(state, np.zeros(2, np.uint16), bucket_size_sectors=8, cells=2)
    assert buckets is not None
    assert (buckets.states, buckets.fills) == ("um", (0, 100))


def test_gens_wrap_and_the_guard_collects_the_rest() -> None:
    gen = np.array([0, 3, 250, 200, 96], np.uint8)
    last_gc = np.array([0, 254, 250, 0, 0], np.uint8)
    found = gen_snapshot(gen, last_gc, need_gc=7)
    assert found.max == 200
    assert found.need_gc == 7
    assert found.histogram[0] == 2
    assert found.histogram[5] == 1
    assert found.histogram[GEN_GUARD] == 2
    assert sum(found.histogram) == 5
    assert found.headroom == 0


@pytest.mark.parametrize("count", [1, 31, 32, 33, 1000])
def test_quantiles_are_those_of_a_sort(count: int) -> None:
    generator = np.random.default_rng(count)
    prio = np.concatenate([generator.integers(1, INITIAL_PRIO + 1, count), [0, 0, BTREE_PRIO]]).astype(np.uint16)
    found = prio_snapshot(prio, bucket_size_sectors=64)
    # sysfs.c: sort descending, cut off btree buckets in front and zeros behind.
    data = sorted((int(value) for value in prio if value not in (0, BTREE_PRIO)), reverse=True)
    assert found.quantiles == tuple(INITIAL_PRIO - data[count * (i + 1) // (QUANTILES + 1)] for i in range(QUANTILES))
    assert found.average == sum(INITIAL_PRIO - value for value in data) // count
    assert (found.zero, found.btree) == (2, 1)
    assert found.sectors_per_quantile == count * 64 // 32


def test_no_priorities_at_all() -> None:
    found = prio_snapshot(np.zeros(10, np.uint16), bucket_size_sectors=64)
    assert (found.quantiles, found.average, found.zero) == ((), 0, 10)


def test_gens_are_counted_in_pairs() -> None:
    draw = np.random.default_rng(4)
    for count in (0, 1, 2, 999, 1 << 18, (1 << 19) + 7):
        gen, last_gc = draw.integers(0, 256, count, dtype=np.uint8), draw.integers(0, 256, count, dtype=np.uint8)
        expected = np.bincount(gen - last_gc, minlength=256)
        found = gen_snapshot(gen, last_gc, need_gc=0)
        assert list(found.histogram) == [*expected[:GEN_GUARD].tolist(), int(expected[GEN_GUARD:].sum())]
        assert found.max == int((gen - last_gc).max(initial=0))
