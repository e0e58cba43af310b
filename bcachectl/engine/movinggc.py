# SPDX-License-Identifier: GPL-2.0-only
"""`MovingGc`: after a gc, empties buckets that hold little, by copying what they hold into new ones (movinggc.c).

Only with ``copy_gc_enabled``.  A copy is put in the map by `Btree.replace`, which does nothing where a write came
first.  The old bucket cannot be reused before the next gc, which writes every dirty leaf before its marks count; so a
move that is lost in a crash loses nothing.  The keys of dirty data are journaled all the same
(docs/decisions/0028)."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from bcachectl.engine.alloc import Reserve
from bcachectl.engine.buckets import MARK_METADATA, Lowest
from bcachectl.engine.gc import LEAF_COST_KEYS
from bcachectl.engine.node import DIRTY, HAS_PTR, Extent, Node
from bcachectl.engine.sched import Task
from bcachectl.errors import Corrupt
from bcachectl.ondisk.bkey import INODE_SHIFT

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet

MOVING_IN_FLIGHT = 64


class MovingGc:
    """Moving gc of a running set."""

    __slots__ = ("cset", "enabled", "moved_keys", "moved_sectors", "collisions", "in_flight")

    def __init__(self, cset: CacheSet) -> None:
        self.cset = cset
        self.enabled = False
        self.moved_keys = 0
        self.moved_sectors = 0
        self.collisions = 0
        self.in_flight = 0

    async def choose_sources(self) -> int:
        """Set `Buckets.move` on the emptiest buckets whose data fits the MOVINGGC reserve; returns how many
        (bch_moving_gc).
        """
        alloc, buckets = self.cset.alloc, self.cset.buckets
        size = 1 << buckets.bucket_shift
        lowest = Lowest(alloc.heap_size)
        step = self.cset.options.slice_buckets
        for first in range(buckets.first_bucket, buckets.nbuckets, step):
            if first > buckets.first_bucket:
                await self.cset.gc.pause()
            part = slice(first, first + step)
            used = buckets.sectors_used[part]
            candidate = np.flatnonzero(
                (buckets.mark[part] != MARK_METADATA) & (used > 0) & (used < size) & (buckets.pin[part] == 0)
            )
            lowest.add(first + candidate, used[candidate].astype(np.uint32))
            buckets.move[part] = 0
        index, sectors = lowest.in_order()
        room = size * len(alloc.free[Reserve.MOVINGGC])
        chosen = index[np.cumsum(sectors.astype(np.int64)) <= room]
        buckets.move[chosen] = 1
        return len(chosen)

    async def run(self) -> None:
        """Move the live data of the chosen buckets, if enabled."""
        try:
            await self._run()
        except Corrupt as bad:
            self.cset.fail(str(bad))

    async def _run(self) -> None:
        cset = self.cset
        if not cset.running:
            # The replay is not over: a move would be journaled after keys that are newer and not in the map yet.
            return
        if not self.enabled or cset.io_disabled or cset.stopping or not await self.choose_sources():
            return
        position = looked_at = 0
        tasks: deque[Task[None]] = deque()
        while not (cset.io_disabled or cset.stopping):
            if looked_at >= cset.options.slice_keys:
                looked_at = 0
                await cset.gc.pause()
                continue
            leaf = await cset.btree.leaf(position)
            looked_at += len(leaf.ends) + LEAF_COST_KEYS
            end = leaf.end
            for extent in self._keys_to_move(leaf, position):
                if len(tasks) >= MOVING_IN_FLIGHT:
                    await tasks.popleft()
                tasks.append(cset.sched.spawn(self._move_or_fail(extent), "moving gc"))
            if end == cset.btree.root.end:
                break
            position = end
        for task in tasks:
            await task
        cset.events.emit("bcache_moving_gc_end", keys=self.moved_keys)

    def _keys_to_move(self, leaf: Node, position: int) -> list[Extent]:
        # What a leaf has from ``position`` on in the chosen buckets.
        buckets = self.cset.buckets
        first = leaf.first_index(position)
        ptrs = np.array(leaf.ptrs[first:], np.uint64)
        index = np.flatnonzero(np.array(leaf.meta[first:], np.uint32) & np.uint32(HAS_PTR))
        index = index[buckets.move[buckets.buckets_of(ptrs[index])] > 0]
        return [extent for extent in map(leaf.extent, (first + index).tolist()) if not buckets.is_stale(extent.ptr)]

    async def _move_or_fail(self, extent: Extent) -> None:
        self.in_flight += 1
        try:
            await self._move(extent)
        except Corrupt as bad:
            self.cset.fail(str(bad))
        self.in_flight -= 1

    async def _move(self, extent: Extent) -> None:
        cset = self.cset
        buckets = cset.buckets
        if buckets.is_stale(extent.ptr):
            return
        source = buckets.bucket_of(extent.ptr)
        buckets.pin_at[source] += 1
        size = extent.end - extent.start
        buf = bytearray(size << 9)
        error = await cset.cache.read((extent.ptr >> 8) & ((1 << 43) - 1), buf, "moving gc")
        position, done = extent.start, 0
        while not error and position < extent.end:
            flash = cset.is_flash(extent.start >> INODE_SHIFT)
            # Never waits for a bucket, nor for those of a split: gc would have to make them, and gc waits for this.
            piece = cset.sectors.alloc_nowait(
                position, extent.end - position, write_point=0, flash=flash, reserve=Reserve.MOVINGGC
            )
            if piece is None:
                break
            bucket = buckets.bucket_of(piece.ptr)
            if extent.flags & DIRTY:
                buckets.mark_dirty(bucket)
            part = extent.cut(position, position + piece.nsectors)
            data = memoryview(buf)[done << 9 : (done + piece.nsectors) << 9]
            error = await cset.cache.write((piece.ptr >> 8) & ((1 << 43) - 1), data, 0, "moving gc")
            if not error:
                moved = await cset.btree.replace(part, part._replace(ptr=piece.ptr), is_move=True)
                self.moved_sectors += moved
                self.collisions += moved == 0
            buckets.unpin(bucket)
            position += piece.nsectors
            done += piece.nsectors
        if error:
            cset.count_io_error(error, "moving gc")
        buckets.unpin(source)
        self.moved_keys += 1
