# SPDX-License-Identifier: GPL-2.0-only
"""`SectorAllocator`: hands out sectors for data from 128 open buckets.

Data that will be needed together should die together: a sequential stream continues in the bucket of its last extent,
and otherwise each write point (a stream of requests) keeps to a bucket of its own.  Flash-only volumes and cached
devices never share one, since the former's buckets stay dirty for ever (alloc.c, pick_data_bucket and
bch_alloc_sectors).

An open bucket holds one pin while it has sectors left; the key that takes the last ones inherits it, every other key
gets one of its own. Whoever inserts the key drops its pin.

One of the modules that can be compiled: what a group of writes takes is counted in C."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

from bcachectl.engine.alloc import NO_BUCKET, Reserve
from bcachectl.engine.node import MAX_SIZE

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet

_GENERAL = Reserve.NONE
MAX_OPEN_BUCKETS = 128
NEAR = 4096
"""Counters of `SectorAllocator.near`."""


class OpenBucket:
    """A bucket being filled: ``ptr`` is its next free sector, ``position`` the end of the last extent it was given."""

    __slots__ = ("ptr", "position", "sectors_free", "write_point", "flash")

    def __init__(self) -> None:
        self.ptr = 0
        self.position = 0
        self.sectors_free = 0
        self.write_point = 0
        self.flash = False


class Piece(NamedTuple):
    """Sectors handed out: where on the cache device (a pointer word), and how many."""

    ptr: int
    nsectors: int


class SectorAllocator:
    """The open buckets, least recently used first, with their positions and write points indexed.  ``last_used``: that
    of the last allocation.  ``near``: how many positions are indexed whose block of 4 KiB has this number, modulo
    `NEAR`; where there is none, nothing needs to be looked for.
    """

    __slots__ = ("cset", "bucket_shift", "bucket_sectors", "block", "max_sectors", "pin_at", "gen_at", "lru",
                 "last_used", "by_position", "near", "by_write_point", "sectors_written")

    def __init__(self, cset: CacheSet) -> None:
        buckets = cset.buckets
        self.cset = cset
        self.bucket_shift, self.bucket_sectors = buckets.bucket_shift, 1 << buckets.bucket_shift
        self.block = cset.geometry.block_size_sectors
        self.max_sectors = MAX_SIZE & -self.block
        self.pin_at, self.gen_at = buckets.pin_at, buckets.gen_at
        self.lru: dict[OpenBucket, None] = {OpenBucket(): None for _ in range(MAX_OPEN_BUCKETS)}
        self.last_used = next(reversed(self.lru))
        self.by_position: dict[int, OpenBucket] = {}
        self.near = array("H", bytes(2 * NEAR))
        self.by_write_point: dict[tuple[bool, int], dict[OpenBucket, None]] = {
            (False, 0): dict(self.lru),
            (True, 0): {},
        }
        self.sectors_written = 0

    def _pick(self, position: int, write_point: int, flash: bool) -> OpenBucket:
        # A sequential continuation, else the least recently used of the same write point, else the least recently
        # used of all.
        found = self.by_position.get(position)
        if found is not None and found.flash == flash:
            return found
        same = self.by_write_point.get((flash, write_point))
        if same:
            return next(iter(same))
        return next(iter(self.lru))

    def alloc_nowait(
        self, position: int, nsectors: int, *, write_point: int, flash: bool, reserve: Reserve = _GENERAL
    ) -> Piece | None:
        """Up to ``nsectors`` for an extent that starts at ``position``; None if no bucket is free."""
        open_bucket = self._pick(position, write_point, flash)
        if open_bucket.sectors_free == 0 and not self._open(open_bucket, reserve):
            return None
        count = min(nsectors, open_bucket.sectors_free, self.max_sectors)
        return Piece(self._take(open_bucket, position, count, write_point, flash), count)

    def _open(self, open_bucket: OpenBucket, reserve: Reserve) -> bool:
        # A new bucket for one that is full; False if none is free.
        bucket, shift = self.cset.alloc.alloc_nowait(reserve), self.bucket_shift
        if bucket == NO_BUCKET:
            return False
        open_bucket.sectors_free = self.bucket_sectors
        open_bucket.ptr = (bucket << shift) << 8 | self.gen_at[bucket]
        return True

    def _take(self, open_bucket: OpenBucket, position: int, count: int, write_point: int, flash: bool) -> int:
        # The next ``count`` sectors of a bucket that has them.
        ptr = open_bucket.ptr
        self._reindex(open_bucket, position + count, write_point, flash)
        open_bucket.sectors_free -= count
        open_bucket.ptr += count << 8
        self.sectors_written += count
        if open_bucket.sectors_free < self.block:
            open_bucket.sectors_free = 0
        if open_bucket.sectors_free:
            self.pin_at[ptr >> 8 >> self.bucket_shift] += 1
        return ptr

    def took(self, position: int, nsectors: int) -> None:
        """Someone has given out ``nsectors`` more of the bucket that was `last_used`, for the same write point, up to
        an extent that ends at ``position``; at least a block is left.  The bucket's place among the others stays, and
        the keys get no pin: the open bucket has one.
        """
        open_bucket = self.last_used
        self._move(open_bucket, position)
        open_bucket.ptr += nsectors << 8
        open_bucket.sectors_free -= nsectors
        self.sectors_written += nsectors

    def alloc_whole(self, position: int, nsectors: int, write_point: int) -> int:
        """A pointer word to ``nsectors`` in one piece for a cached device; 0 if `alloc_nowait` would have to cut them,
        or has no bucket.
        """
        open_bucket = self._pick(position, write_point, False)
        if nsectors > self.max_sectors:
            return 0
        if open_bucket.sectors_free < nsectors and (
            open_bucket.sectors_free
            or nsectors > self.bucket_sectors
            or not self.cset.alloc.available_nowait(_GENERAL)
            or not self._open(open_bucket, _GENERAL)
        ):
            return 0
        return self._take(open_bucket, position, nsectors, write_point, False)

    async def alloc(
        self, position: int, nsectors: int, *, write_point: int, flash: bool, reserve: Reserve = _GENERAL
    ) -> Piece | None:
        """Like `alloc_nowait`, but waits for a free bucket; None only if the set has failed."""
        while True:
            piece = self.alloc_nowait(position, nsectors, write_point=write_point, flash=flash, reserve=reserve)
            if piece is not None or self.cset.io_disabled:
                return piece
            await self.cset.alloc.bucket_wait.wait()

    def _move(self, open_bucket: OpenBucket, position: int) -> None:
        # Its last extent ends at ``position``.
        by_position, near, before, near_mask = self.by_position, self.near, open_bucket.position, NEAR - 1
        if by_position.get(before) is open_bucket:
            del by_position[before]
            near[before >> 3 & near_mask] -= 1
        if position not in by_position:
            near[position >> 3 & near_mask] += 1
        by_position[position] = open_bucket
        open_bucket.position = position

    def _reindex(self, open_bucket: OpenBucket, position: int, write_point: int, flash: bool) -> None:
        # Most recently used from now on, under its new position and write point.
        self._move(open_bucket, position)
        if open_bucket is self.last_used and open_bucket.write_point == write_point and open_bucket.flash == flash:
            return
        self.last_used = open_bucket
        lru, by_write_point = self.lru, self.by_write_point
        before = (open_bucket.flash, open_bucket.write_point)
        old = by_write_point[before]
        del old[open_bucket]
        if not old:
            del by_write_point[before]
        by_write_point.setdefault((flash, write_point), {})[open_bucket] = None
        del lru[open_bucket]
        lru[open_bucket] = None
        open_bucket.write_point = write_point
        open_bucket.flash = flash

    def open_now(self) -> list[OpenBucket]:
        """The open buckets that have sectors left."""
        return [open_bucket for open_bucket in self.lru if open_bucket.sectors_free]
