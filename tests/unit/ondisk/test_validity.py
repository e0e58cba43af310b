# SPDX-License-Identifier: GPL-2.0-only
"""Which keys are invalid, stale or bad, asked of one key and of columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from bcachectl.ondisk.bkey import MAX_INODE, MAX_OFFSET, PTR_CHECK_DEV, Bkey, Ptr, decode_key_columns, encode_key
from bcachectl.ondisk.geometry import Geometry
from bcachectl.ondisk.validity import (
    btree_ptr_bad,
    btree_ptr_invalid,
    btree_ptrs_invalid,
    columns_available,
    columns_staleness,
    extent_bad,
    extent_invalid,
    extents_bad,
    extents_fatal,
    gen_after,
    ptr_stale,
    status,
)

GEOMETRY = Geometry(block_size_sectors=8, bucket_size_sectors=128, nbuckets=1000, first_bucket=2)
GENS = np.full(1000, 5, np.uint8)


@dataclass(frozen=True)
class Case:
    """A key and what the kernel thinks of it as a leaf's key and as an interior node's."""

    key: Bkey
    status: str
    extent_invalid: bool
    extent_bad: bool
    btree_invalid: bool
    btree_bad: bool


def extent(sector: int, gen: int = 5, *, size: int = 8, end: int = 1000, dev: int = 0, dirty: bool = False) -> Bkey:
    return Bkey(0, end - size, end, dirty, 0, (Ptr(dev, sector, gen),))


CASES = {
    "good": Case(extent(256), "", False, False, False, False),
    "whole bucket": Case(extent(256, size=128), "", False, False, False, False),
    "dirty": Case(extent(256, dirty=True), "", False, False, True, True),
    "crosses its bucket": Case(extent(256 + 121), "bad, length too big", True, True, True, True),
    "before the first bucket": Case(extent(255 - 8), "bad, short offset", True, True, True, True),
    "last bucket": Case(extent(999 * 128), "", False, False, False, False),
    "past the last bucket": Case(extent(1000 * 128), "bad, offset past end of device", True, True, True, True),
    "stale": Case(extent(256, 4), "stale", False, True, False, True),
    "newer than its bucket": Case(extent(256, 6), "", False, False, False, False),
    "hole": Case(Bkey(0, 0, 8, False, 0, ()), "bad, no pointers", False, True, True, True),
    "size 0": Case(extent(256, size=0), "zeroed key", True, True, True, True),
    "check key": Case(extent(1 << 42, 99, dev=PTR_CHECK_DEV), "", False, True, False, True),
    "another cache": Case(extent(256, dev=1), "", False, True, False, True),
    "longer than its offset": Case(extent(256, size=9, end=8), "", True, True, False, False),
    "freed marker": Case(Bkey(0, -128, 0, False, 0, (Ptr(0, 256, 5),)), "bad, null key", True, True, False, True),
    "root": Case(Bkey(MAX_INODE, MAX_OFFSET - 128, MAX_OFFSET, False, 0, (Ptr(0, 256, 5),)), "",
                 False, False, False, False),
}


@pytest.mark.parametrize("name", CASES)
def test_one_key(name: str) -> None:
    case = CASES[name]
    assert status(case.key, GEOMETRY, GENS) == case.status
    assert extent_invalid(case.key, GEOMETRY) == case.extent_invalid
    assert extent_bad(case.key, GEOMETRY, GENS) == case.extent_bad
    assert btree_ptr_invalid(case.key, GEOMETRY) == case.btree_invalid
    assert btree_ptr_bad(case.key, GEOMETRY, GENS) == case.btree_bad


def test_columns_agree() -> None:
    stream = b"".join(encode_key(case.key) for case in CASES.values())
    columns = decode_key_columns(stream, len(stream) // 8)
    keys = [case.key for case in CASES.values()]
    assert extents_bad(columns, GEOMETRY, GENS).tolist() == [case.extent_bad for case in CASES.values()]
    assert btree_ptrs_invalid(columns, GEOMETRY).tolist() == [case.btree_invalid for case in CASES.values()]
    assert extents_fatal(columns, GEOMETRY).tolist() == [k.size != 0 and extent_invalid(k, GEOMETRY) for k in keys]
    assert columns_available(columns).tolist() == [bool(k.ptrs) and k.ptrs[0].dev == 0 for k in keys]
    assert columns_staleness(columns, GEOMETRY, GENS).tolist() == [int(name == "stale") for name in CASES]


def test_any_pointer_counts() -> None:
    key = Bkey(0, 0, 8, False, 0, (Ptr(0, 256, 5), Ptr(0, 512, 3)))
    assert ptr_stale(key, GEOMETRY, GENS) == 2
    assert extent_bad(key, GEOMETRY, GENS)
    assert status(key, GEOMETRY, GENS) == "stale"


@pytest.mark.parametrize(("gen", "other", "ahead"), [(5, 5, 0), (6, 5, 1), (5, 6, 0), (0, 255, 1), (128, 0, 128),
                                                     (129, 0, 0), (96, 0, 96), (4, 200, 60)])
def test_T10_generations_wrap(gen: int, other: int, ahead: int) -> None:
    assert gen_after(gen, other) == ahead


def test_T10_a_pointer_up_to_128_generations_behind_never_reads_as_valid() -> None:
    for behind in range(1, 129):
        gens = np.full(1000, behind, np.uint8)
        assert extent_bad(extent(256, 0), GEOMETRY, gens)
        stream = encode_key(extent(256, 0))
        columns = decode_key_columns(stream, 3)
        assert columns_staleness(columns, GEOMETRY, gens).tolist() == [behind]
        assert extents_bad(columns, GEOMETRY, gens).all()
