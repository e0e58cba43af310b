# SPDX-License-Identifier: GPL-2.0-only
"""`Stripes`: how much of each stripe of a raid is dirty, for backing devices that must read before they write a part
of one.

A raid of level 4, 5 or 6 computes parity over a whole stripe.  Writing all of it costs no read, writing a part does.
So, on such a device (`bcachectl.engine.bdev.Bdev.partial_stripes_expensive`):

* a write to a stripe that has dirty data already stays in the cache, whatever else speaks against it
  (`bcachectl.engine.request.should_writeback`);
* stripes that are dirty as a whole are written back first (`bcachectl.engine.writeback.Writeback`).

1. `CachedDev.start_caching` makes the counters, all zero, and has the device's leaves counted, in order.
2. Behind what was counted so far (``counted_to``) changes of the map are not noted here: the count will see them.
3. From then on each dirty extent that comes or goes is noted, by `CacheSet.account_dirty`.

Elsewhere nothing is counted and nothing costs anything.  Kernel: writeback.c, bcache_dev_sectors_dirty_add and
refill_full_stripes; writeback.h, bcache_dev_stripe_dirty; super.c, bcache_device_init.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from bcachectl.engine.node import DIRTY
from bcachectl.errors import Corrupt

if TYPE_CHECKING:
    from bcachectl.engine.cached_dev import CachedDev

STRIPE_MIN_SECTORS = 4 << 11
"""A smaller stripe is counted as a multiple of it that is at least so large (bcache.h, BCH_MIN_STRIPE_SZ)."""
STRIPE_NONE_SECTORS = 1 << 31
"""Of a device that gives no optimal size."""


def stripe_size_of(optimal_io_sectors: int) -> int:
    """The stripe size in sectors, by the device's optimal size of requests, 0 if it gives none."""
    if not optimal_io_sectors:
        return STRIPE_NONE_SECTORS
    if optimal_io_sectors < STRIPE_MIN_SECTORS:
        return -(-STRIPE_MIN_SECTORS // optimal_io_sectors) * optimal_io_sectors
    return optimal_io_sectors


class Stripes:
    """Dirty sectors by stripe; positions are those of the map, the device's first is ``base``."""

    __slots__ = ("base", "limit", "stripe_size_sectors", "dirty", "counted_to")

    def __init__(self, base: int, *, stripe_size_sectors: int, size_sectors: int) -> None:
        self.base = base
        self.limit = base + size_sectors
        self.stripe_size_sectors = stripe_size_sectors
        self.dirty = array("I", bytes(4 * -(-size_sectors // stripe_size_sectors)))
        self.counted_to = base

    def note(self, start: int, end: int, *, sign: int) -> None:
        """Dirty data came to (sign 1) or went from (sign -1) [start, end)."""
        self._add(start, min(end, self.counted_to), sign)

    def _add(self, start: int, end: int, sign: int) -> None:
        size, dirty = self.stripe_size_sectors, self.dirty
        start -= self.base
        end -= self.base
        while start < end:
            stripe = start // size
            stop = min(end, (stripe + 1) * size)
            count = dirty[stripe] + sign * (stop - start)
            assert 0 <= count <= size, (stripe, count)
            dirty[stripe] = count
            start = stop

    def is_dirty(self, start: int, end: int) -> bool:
        """Whether a stripe that [start, end) touches has dirty data."""
        size = self.stripe_size_sectors
        first, last = (start - self.base) // size, (end - 1 - self.base) // size
        return any(self.dirty[first : last + 1])

    def full_from(self, position: int) -> Iterator[tuple[int, int]]:
        """The stripes that are dirty as a whole, from the one of ``position`` on and then from the start."""
        size = self.stripe_size_sectors
        full = np.flatnonzero(np.frombuffer(self.dirty, np.uint32) == size)
        split = int(np.searchsorted(full, (position - self.base) // size))
        for stripe in [*full[split:].tolist(), *full[:split].tolist()]:
            yield self.base + stripe * size, self.base + (stripe + 1) * size

    async def count(self, dev: CachedDev) -> None:
        """Count what is dirty already, leaf by leaf; one that cannot be read fails the set."""
        try:
            await self._count(dev)
        except Corrupt as bad:
            dev.cset.fail(str(bad))

    async def _count(self, dev: CachedDev) -> None:
        while self.counted_to < self.limit and dev.stripes is self and not dev.cset.io_disabled:
            leaf = await dev.cset.btree.leaf(self.counted_to)
            start, stop = self.counted_to, min(leaf.end, self.limit)
            for extent in leaf.overlapping(start, stop):
                if extent.flags & DIRTY:
                    self._add(max(start, extent.start), min(extent.end, stop), 1)
            self.counted_to = stop
