# SPDX-License-Identifier: GPL-2.0-only
"""The map of extents against a dictionary of sectors: whoever wrote a sector last owns it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcachectl.fsck import extents as extent
from bcachectl.fsck.extents import Extents
from bcachectl.ondisk.bkey import KEY_SIZE_MAX, PTR_CHECK_DEV, ptr_gen, ptr_make, ptr_sector

SPACE = 60
BUCKET = 16
Key = tuple[int, int, bool, int]
"""start, size, dirty, pointer's sector or -1 for a hole"""

keys = st.lists(st.tuples(st.integers(0, SPACE - 8), st.integers(1, 8), st.booleans(), st.integers(-1, 200)),
                max_size=12)


def columns(some: list[Key]) -> Extents:
    return Extents(
        np.array([key[0] for key in some], np.uint64), np.array([key[0] + key[1] for key in some], np.uint64),
        np.array([key[2] for key in some], np.bool_), np.array([key[3] >= 0 for key in some], np.uint8),
        np.array([ptr_make(key[3], 7) if key[3] >= 0 else 0 for key in some], np.uint64),
        np.zeros(len(some), np.uint8))


def owners(some: list[Key]) -> dict[int, tuple[bool, int]]:
    found = {}
    for start, size, dirty, sector in some:
        for at in range(start, start + size):
            found[at] = (dirty, sector + at - start if sector >= 0 else -1)
    return found


def sectors(found: Extents) -> dict[int, tuple[bool, int]]:
    assert extent.is_flat(found)
    assert (found.end > found.start).all()
    said = {}
    for start, end, dirty, nptrs, ptr in zip(*(column.tolist() for column in found[:5]), strict=True):
        assert not nptrs or ptr_gen(ptr) == 7
        for at in range(start, end):
            said[at] = (dirty, ptr_sector(ptr) + at - start if nptrs else -1)
    return said


@given(keys)
def test_flatten(some: list[Key]) -> None:
    assert sectors(extent.flatten(columns(some))) == owners(some)


@given(keys)
def test_flatten_in_halves(some: list[Key]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extent, "CELLS_PER_ROW", 0)
        assert sectors(extent.flatten(columns(some))) == owners(some)


@given(keys, keys)
def test_overlay(under: list[Key], over: list[Key]) -> None:
    both = extent.overlay(extent.flatten(columns(under)), extent.flatten(columns(over)))
    assert sectors(both) == owners(under + over)


@given(keys, st.integers(0, SPACE), st.integers(0, SPACE))
def test_clip(some: list[Key], one: int, other: int) -> None:
    start, end = min(one, other), max(one, other)
    clipped = extent.clip(extent.flatten(columns(some)), start=start, end=end)
    assert sectors(clipped) == {at: owner for at, owner in owners(some).items() if start <= at < end}


@given(keys)
def test_merge(some: list[Key]) -> None:
    flat = extent.flatten(columns(some))
    merged = extent.merge(flat, bucket_size_sectors=BUCKET)
    assert sectors(merged) == owners(some)
    for row in range(len(merged.start) - 1):
        follows = merged.end[row] == merged.start[row + 1] and merged.dirty[row] == merged.dirty[row + 1]
        first, second = int(merged.ptr[row]), int(merged.ptr[row + 1])
        kinds = int(merged.nptrs[row]), int(merged.nptrs[row + 1])
        continues = ptr_sector(first) + int(merged.size[row]) == ptr_sector(second)
        same_bucket = ptr_sector(first) // BUCKET == ptr_sector(second) // BUCKET
        assert not (follows and kinds == (0, 0))
        assert not (follows and kinds == (1, 1) and continues and same_bucket)


def test_merge_stops_at_the_longest_key() -> None:
    half = KEY_SIZE_MAX // 2 + 10
    some = [(0, half, True, 0), (half, half, True, half), (2 * half, half, True, 2 * half)]
    merged = extent.merge(columns(some), bucket_size_sectors=1 << 20)
    assert merged.size.tolist() == [KEY_SIZE_MAX, 3 * half - KEY_SIZE_MAX]
    assert [ptr_sector(ptr) for ptr in merged.ptr.tolist()] == [0, KEY_SIZE_MAX]


def test_the_pointer_of_a_cache_miss_is_no_place() -> None:
    """It is random but for its device number; moved on like a sector, it can become a pointer to the cache."""
    nonce = PTR_CHECK_DEV << 51 | (1 << 43) - 4 << 8 | 7
    miss = Extents(np.array([0], np.uint64), np.array([16], np.uint64), np.zeros(1, np.bool_), np.ones(1, np.uint8),
                   np.array([nonce], np.uint64), np.zeros(1, np.uint8))
    assert extent.clip(miss, start=8, end=16).ptr.tolist() == [nonce]
    over = columns([(4, 8, True, 100)])
    assert extent.overlay(miss, over).ptr.tolist() == [nonce, ptr_make(100, 7), nonce]
