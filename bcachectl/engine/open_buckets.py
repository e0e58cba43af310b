# SPDX-License-Identifier: GPL-2.0-only
"""`SectorAllocator`: hands out sectors for data from 128 open buckets.

Data that will be needed together should die together: a sequential stream continues in the bucket of its last extent,
and otherwise each write point (a stream of requests) keeps to a bucket of its own.  Flash-only volumes and cached
devices never share one, since the former's buckets stay dirty for ever (alloc.c, pick_data_bucket and
bch_alloc_sectors).

An open bucket holds one pin while it has sectors left; the key that takes the last ones inherits it, every other key
gets one of its own. Whoever inserts the key drops its pin."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bcachectl.engine.alloc import NO_BUCKET, Reserve
from bcachectl.engine.node import MAX_SIZE

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet

MAX_OPEN_BUCKETS = 128


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
    """The open buckets, least recently used first, with their positions and write points indexed."""

    __slots__ = ("cset", "lru", "by_position", "by_write_point", "sectors_written")

    def __init__(self, cset: CacheSet) -> None:
        self.cset = cset
        self.lru: dict[OpenBucket, None] = {OpenBucket(): None for _ in range(MAX_OPEN_BUCKETS)}
        self.by_position: dict[int, OpenBucket] = {}
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
        self, position: int, nsectors: int, *, write_point: int, flash: bool, reserve: Reserve = Reserve.NONE
    ) -> Piece | None:
        """Up to ``nsectors`` for an extent that starts at ``position``; None if no bucket is free."""
        cset = self.cset
        buckets = cset.buckets
        open_bucket = self._pick(position, write_point, flash)
        if open_bucket.sectors_free == 0:
            bucket = cset.alloc.alloc_nowait(reserve)
            if bucket == NO_BUCKET:
                return None
            open_bucket.sectors_free = 1 << buckets.bucket_shift
            open_bucket.ptr = (bucket << buckets.bucket_shift) << 8 | buckets.gen_at[bucket]
        count = min(nsectors, open_bucket.sectors_free, MAX_SIZE & -cset.geometry.block_size_sectors)
        piece = Piece(open_bucket.ptr, count)
        self._reindex(open_bucket, position + count, write_point, flash)
        open_bucket.sectors_free -= count
        open_bucket.ptr += count << 8
        self.sectors_written += count
        if open_bucket.sectors_free < cset.geometry.block_size_sectors:
            open_bucket.sectors_free = 0
        if open_bucket.sectors_free:
            buckets.pin_at[buckets.bucket_of(piece.ptr)] += 1
        return piece

    def last_used(self) -> OpenBucket:
        """The open bucket of the last `alloc_nowait`."""
        return next(reversed(self.lru))

    def took(self, position: int, nsectors: int) -> None:
        """Someone has given out ``nsectors`` more of the bucket that was `last_used`, for the same write point, up to
        an extent that ends at ``position``; at least a block is left.  The bucket's place among the others stays, and
        the keys get no pin: the open bucket has one.
        """
        open_bucket = self.last_used()
        if self.by_position.get(open_bucket.position) is open_bucket:
            del self.by_position[open_bucket.position]
        open_bucket.position = position
        self.by_position[position] = open_bucket
        open_bucket.ptr += nsectors << 8
        open_bucket.sectors_free -= nsectors
        self.sectors_written += nsectors

    def alloc_whole(self, position: int, nsectors: int, *, write_point: int) -> int:
        """A pointer word to ``nsectors`` in one piece for a cached device; 0 if `alloc_nowait` would have to cut them,
        or has no bucket.
        """
        open_bucket = self._pick(position, write_point, False)
        if open_bucket.sectors_free < nsectors and (
            open_bucket.sectors_free
            or nsectors > min(1 << self.cset.buckets.bucket_shift, MAX_SIZE & -self.cset.geometry.block_size_sectors)
            or not self.cset.alloc.available_nowait(Reserve.NONE)
        ):
            return 0
        piece = self.alloc_nowait(position, nsectors, write_point=write_point, flash=False)
        assert piece is not None and piece.nsectors == nsectors, piece
        return piece.ptr

    async def alloc(
        self, position: int, nsectors: int, *, write_point: int, flash: bool, reserve: Reserve = Reserve.NONE
    ) -> Piece | None:
        """Like `alloc_nowait`, but waits for a free bucket; None only if the set has failed."""
        while True:
            piece = self.alloc_nowait(position, nsectors, write_point=write_point, flash=flash, reserve=reserve)
            if piece is not None or self.cset.io_disabled:
                return piece
            await self.cset.alloc.bucket_wait.wait()

    def _reindex(self, open_bucket: OpenBucket, position: int, write_point: int, flash: bool) -> None:
        # Most recently used from now on, under its new position and write point.
        if self.by_position.get(open_bucket.position) is open_bucket:
            del self.by_position[open_bucket.position]
        self.by_position[position] = open_bucket
        old = self.by_write_point[open_bucket.flash, open_bucket.write_point]
        del old[open_bucket]
        if not old:
            del self.by_write_point[open_bucket.flash, open_bucket.write_point]
        self.by_write_point.setdefault((flash, write_point), {})[open_bucket] = None
        del self.lru[open_bucket]
        self.lru[open_bucket] = None
        open_bucket.position = position
        open_bucket.write_point = write_point
        open_bucket.flash = flash

    def open_now(self) -> list[OpenBucket]:
        """The open buckets that have sectors left."""
        return [open_bucket for open_bucket in self.lru if open_bucket.sectors_free]
