# SPDX-License-Identifier: GPL-2.0-only
"""`where`: for a range of a running volume, which device has the valid copy of each piece, and where it lies there.

The answer is that of one moment for each leaf of the btree; requests that go on meanwhile may change what comes later.
It has the form that an offline walk gives too (``bcachectl where --cache``): one dict a piece, in order, without gaps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bcachectl.engine.buckets import PTR_SECTOR_MASK
from bcachectl.engine.cached_dev import CachedDev
from bcachectl.engine.flash_dev import FlashVolume
from bcachectl.engine.node import DIRTY, HAS_PTR, Extent
from bcachectl.errors import UsageError
from bcachectl.ondisk.bkey import INODE_SHIFT, SECTOR_MASK

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet

MAX_PIECES = 10_000
"""A longer answer would not fit a line of the control protocol; ask for less."""


async def where(cset: CacheSet, volume: CachedDev | FlashVolume, *, sector: int, count: int) -> list[dict[str, Any]]:
    """The pieces of ``count`` sectors from ``sector`` on; UsageError if the volume ends before."""
    if sector < 0 or count < 1 or sector + count > volume.size_sectors:
        raise UsageError(f"{volume.name} has {volume.size_sectors} sectors; {sector}+{count} is behind its end")
    if isinstance(volume, CachedDev) and not volume.attached:
        return [_elsewhere(volume, sector, sector + count)]
    base = volume.base + volume.data_offset
    position, end = base + sector, base + sector + count
    pieces: list[dict[str, Any]] = []
    while position < end:
        leaf = await cset.btree.leaf(position)
        stop = min(leaf.end, end)
        for extent in leaf.overlapping(position, stop):
            if not extent.flags & HAS_PTR or cset.buckets.is_stale(extent.ptr):
                continue
            low, high = max(extent.start, position), min(extent.end, stop)
            if low > position:
                pieces.append(_elsewhere(volume, position - base, low - base))
            pieces.append(_cached(cset, volume, extent, start=low, end=high))
            position = high
        if position < stop:
            pieces.append(_elsewhere(volume, position - base, stop - base))
        position = stop
        if len(pieces) > MAX_PIECES:
            raise UsageError(f"{volume.name}: the range has more than {MAX_PIECES} pieces; ask for fewer sectors")
    return pieces


def _cached(cset: CacheSet, volume: CachedDev | FlashVolume, extent: Extent, *, start: int, end: int) -> dict[str, Any]:
    base = volume.base + volume.data_offset
    bucket = cset.buckets.bucket_of(extent.ptr)
    return {"start": start - base, "end": end - base, "state": "dirty" if extent.flags & DIRTY else "clean",
            "device": "cache", "device_sector": ((extent.ptr >> 8) & PTR_SECTOR_MASK) + start - extent.start,
            "bucket": bucket, "gen": extent.ptr & 255, "prio": cset.buckets.prio_at[bucket],
            "key": f"{extent.start >> INODE_SHIFT}:{extent.start & SECTOR_MASK} len {extent.end - extent.start}"}


def _elsewhere(volume: CachedDev | FlashVolume, start: int, end: int) -> dict[str, Any]:
    # What the cache does not have: the backing device does, and a flash-only volume reads zeros.
    if isinstance(volume, FlashVolume):
        return {"start": start, "end": end, "state": "hole", "device": "zeros", "device_sector": None}
    return {"start": start, "end": end, "state": "uncached", "device": "backing",
            "device_sector": start + volume.data_offset}
