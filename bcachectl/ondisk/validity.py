# SPDX-License-Identifier: GPL-2.0-only
"""Which keys the kernel would follow (extents.c: __ptr_invalid, bch_btree_ptr_bad, bch_extent_bad).

Two judgements, of growing strength:

* *invalid*: the key makes no sense on this device; except for an extent of size 0, which is merely skipped, finding one
  fails the whole set;
* *bad*: not usable.  Invalid keys are bad, and so are those without a pointer (holes), with one to a cache that is not
  there (check keys), or with one whose bucket was reused since (stale).

A bad key still hides what older keys of the node say about its range.  The kernel has no such thing as a bad bucket:
``gens`` below are the generations as the pointers of the whole tree have raised them, never as the prio sets have them.

Each question is asked about one `Bkey` and, for extents, about whole `KeyColumns`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from bcachectl.ondisk.bkey import MAX_CACHES_PER_SET, PTR_DEV, PTR_GEN, PTR_OFFSET, SECTOR_MASK, Bkey, KeyColumns, Ptr
from bcachectl.ondisk.geometry import Geometry

BUCKET_GC_GEN_MAX = 96
"""A pointer further behind its bucket than this fails the set: "key too stale"."""

_GEN_BEHIND_MAX = 128

Mask = npt.NDArray[np.bool_]
"""One answer per key of a `KeyColumns`."""


class Gens(Protocol):
    """The generation of each bucket, by its number."""

    def __getitem__(self, bucket: int, /) -> int:
        """The generation of one bucket."""


def gen_after(gen: int, other: int) -> int:
    """How far ``gen`` is ahead of ``other``, 0 if it is behind; generations wrap at 256 (bcache.h, gen_after)."""
    ahead = (gen - other) & 0xFF
    return 0 if ahead > _GEN_BEHIND_MAX else ahead


def ptr_available(ptr: Ptr, caches: int = 1) -> bool:
    """The pointer names a cache of the set."""
    return ptr.dev < min(caches, MAX_CACHES_PER_SET)


def ptr_problem(key: Bkey, geometry: Geometry) -> str:
    """The first thing wrong with where a key points, in the kernel's words; empty if nothing is."""
    for ptr in key.ptrs:
        if ptr_available(ptr):
            bucket = geometry.bucket_of(ptr.sector)
            if key.size + ptr.sector % geometry.bucket_size_sectors > geometry.bucket_size_sectors:
                return "bad, length too big"
            if bucket < geometry.first_bucket:
                return "bad, short offset"
            if bucket >= geometry.nbuckets:
                return "bad, offset past end of device"
    return ""


def ptr_stale(key: Bkey, geometry: Geometry, gens: Gens) -> int:
    """How many generations the stalest available pointer of a key is behind its bucket; 0 if none is."""
    return max((gen_after(int(gens[geometry.bucket_of(p.sector)]), p.gen) for p in key.ptrs if ptr_available(p)),
               default=0)


def status(key: Bkey, geometry: Geometry, gens: Gens) -> str:
    """The kernel's word for a key, empty for a good one (extents.c, bch_ptr_status)."""
    problem = ptr_problem(key, geometry)
    if problem:
        return problem
    if ptr_stale(key, geometry, gens):
        return "stale"
    if key.inode == 0 and key.end == 0:
        return "bad, null key"
    if not key.ptrs:
        return "bad, no pointers"
    if not key.size:
        return "zeroed key"
    return ""


def btree_ptr_invalid(key: Bkey, geometry: Geometry) -> bool:
    """A key of an interior node, the root's or the uuid array's makes no sense."""
    return not key.ptrs or not key.size or key.dirty or ptr_problem(key, geometry) != ""


def btree_ptr_bad(key: Bkey, geometry: Geometry, gens: Gens) -> bool:
    """A key of an interior node is not to be followed; markers of freed nodes are bad, their position being zero."""
    if (key.inode == 0 and key.end == 0) or btree_ptr_invalid(key, geometry):
        return True
    return not all(ptr_available(p) for p in key.ptrs) or ptr_stale(key, geometry, gens) > 0


def extent_invalid(key: Bkey, geometry: Geometry) -> bool:
    """A leaf's key makes no sense; with size 0 it is only to be skipped, otherwise it fails the set."""
    return not key.size or key.start < 0 or ptr_problem(key, geometry) != ""


def extent_bad(key: Bkey, geometry: Geometry, gens: Gens) -> bool:
    """A leaf's key is not usable for a lookup."""
    if not key.ptrs or extent_invalid(key, geometry):
        return True
    return not all(ptr_available(p) for p in key.ptrs) or ptr_stale(key, geometry, gens) > 0


# The same for whole columns.

def columns_available(keys: KeyColumns) -> Mask:
    """Which keys have a pointer to the set's cache."""
    available: Mask = (keys.nptrs != 0) & (PTR_DEV.get(keys.ptr) == 0)
    return available


def columns_out_of_range(keys: KeyColumns, geometry: Geometry) -> Mask:
    """Which keys point where no extent or node can be."""
    sector = PTR_OFFSET.get(keys.ptr)
    bucket = sector // geometry.bucket_size_sectors
    crosses = keys.size + sector % geometry.bucket_size_sectors > geometry.bucket_size_sectors
    out: Mask = crosses | (bucket < geometry.first_bucket) | (bucket >= geometry.nbuckets)
    return columns_available(keys) & out


def extents_fatal(keys: KeyColumns, geometry: Geometry) -> Mask:
    """Which keys of a leaf fail the set: invalid ones, save those of size 0."""
    too_long = keys.size > (keys.pos & SECTOR_MASK)
    fatal: Mask = (keys.size != 0) & (too_long | columns_out_of_range(keys, geometry))
    return fatal


def btree_ptrs_invalid(keys: KeyColumns, geometry: Geometry) -> Mask:
    """Which keys of an interior node fail the set."""
    invalid: Mask = (keys.nptrs == 0) | (keys.size == 0) | keys.dirty | columns_out_of_range(keys, geometry)
    return invalid


def columns_staleness(keys: KeyColumns, geometry: Geometry, gens: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """How many generations each key's pointer is behind its bucket; 0 for a pointer that leads to no bucket."""
    behind = np.zeros(len(keys.pos), np.uint8)
    in_range = columns_available(keys) & ~columns_out_of_range(keys, geometry)
    ptr = keys.ptr[in_range]
    bucket = (PTR_OFFSET.get(ptr) // geometry.bucket_size_sectors).astype(np.intp)
    ahead = gens[bucket] - PTR_GEN.get(ptr).astype(np.uint8)
    behind[in_range] = np.where(ahead > _GEN_BEHIND_MAX, 0, ahead)
    return behind


def extents_bad(keys: KeyColumns, geometry: Geometry, gens: npt.NDArray[np.uint8]) -> Mask:
    """Which keys of a leaf are not usable for a lookup."""
    bad: Mask = ((keys.size == 0) | ~columns_available(keys) | extents_fatal(keys, geometry)
                 | (columns_staleness(keys, geometry, gens) != 0))
    return bad
