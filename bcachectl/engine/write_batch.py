# SPDX-License-Identifier: GPL-2.0-only
"""`WriteBatch`: small writes in writeback mode that need not wait for anything, many at a time and without a task each.

A write that finds everything ready takes three steps, and nothing else of the engine runs between them:

1. `WriteBatch.place` looks whether `bcachectl.engine.request.write` would keep the write back, and would not have to
   wait on its way.  If so, it takes sectors from the write point's open bucket, which is marked dirty.  Whatever is not
   so plain is declined (`NOT_NOW`) and takes the way of all other requests.
2. The export writes the data where it was told to: what was placed one after the other lies side by side, so one
   system call carries many.
3. `WriteBatch.commit` appends all keys to the journal at once and puts them in their leaves; the export answers.
   If the data could not be written it is `WriteBatch.abandon` instead, and each write begins anew as a request.

The order is that of `bcachectl.engine.request.insert_data`: the bucket is dirty before a key to it exists, the data is
written before its key is journaled, the key is journaled before it is inserted.  That room for the keys is there, in
the journal's open entry and in the leaves, is known before anything is written.

What is in flight elsewhere counts as usual: a write that overlaps one is declined, fills that it overlaps are
cancelled.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from bcachectl.engine.front import NOT_NOW
from bcachectl.engine.node import DIRTY, HAS_PTR, Extent, Node
from bcachectl.engine.request import keeps_back
from bcachectl.ondisk.bkey import KEY_BYTES, pack_dirty_keys

if TYPE_CHECKING:
    from bcachectl.engine.cached_dev import CachedDev

WORDS_PER_INSERT = 6
"""The most u64s that one insert adds to a leaf's pending set: a key of three, and the other half of one it cuts in
two."""


class WriteBatch:
    """The batch of one cached device: empty but between `place` and `commit`."""

    __slots__ = ("dev", "placed")

    def __init__(self, dev: CachedDev) -> None:
        self.dev = dev
        self.placed: list[tuple[tuple[int, int, int], Node]] = []

    def place(self, writes: list[tuple[int, int]], stream: int) -> list[int]:
        """Where the data of each (sector, nsectors) is to be written now, a byte of the cache device; or NOT_NOW.

        The sectors are the volume's.  After this comes `commit` or `abandon`, before anything else of the engine runs.
        """
        assert not self.placed
        dev = self.dev
        cset = dev.cset
        room = cset.journal.room_bytes() // KEY_BYTES if keeps_back(dev) else 0
        ranges, streams, buckets = dev.ranges, dev.streams, cset.buckets
        mask, cutoff_sectors, now_ns = dev.block_mask, dev.sequential_cutoff >> 9, cset.sched.now_ns
        words = WORDS_PER_INSERT * len(writes)
        places = []
        for sector, nsectors in writes:
            places.append(NOT_NOW)
            first = sector + dev.data_offset
            last = first + nsectors
            if not room or (first | nsectors) & mask or sector + nsectors > dev.size_sectors:
                continue
            if ranges.writes and ranges.writing(first, last):
                continue
            leaf = self._leaf(dev.base + first, dev.base + last, words)
            if leaf is None:
                continue
            if 0 < cutoff_sectors <= streams.run_sectors(first, nsectors, stream=stream, now_ns=now_ns):
                continue
            ptr = cset.sectors.alloc_whole(dev.base + first, nsectors, write_point=stream)
            if not ptr:
                continue
            streams.note(first, nsectors, stream=stream, now_ns=now_ns)
            if ranges.fills:
                ranges.cancel_fills(first, last)
            # Before the key is in the map: a gc that runs later must not take the bucket for clean.
            buckets.mark_dirty(buckets.bucket_of(ptr))
            self.placed.append(((dev.base + first, dev.base + last, ptr), leaf))
            places[-1] = (ptr >> 8) << 9
            room -= 1
        return places

    def _leaf(self, start: int, end: int, words: int) -> Node | None:
        # The leaf for keys of [start, end), if an insert there need not wait.
        cset = self.dev.cset
        node: Node | None = cset.btree.root
        while node is not None and node.level:
            node = node.children[bisect_right(node.ends, start)]
        if node is None or node.frozen or end > node.end or not node.has_room(words, cset.geometry):
            return None
        return node

    def commit(self, duration_ns: int) -> None:
        """The data of all that was placed is written, in ``duration_ns``: put it in journal and map."""
        placed, self.placed = self.placed, []
        if not placed:
            return
        dev = self.dev
        cset = dev.cset
        cset.congestion.account(duration_ns, is_write=True)
        pin = cset.journal.add_nowait(pack_dirty_keys([extent for extent, _leaf in placed]))
        assert pin is not None, "there was room when the writes were placed"
        nsectors = 0
        for (start, end, ptr), leaf in placed:
            cset.btree.insert_into(leaf, Extent(start, end, HAS_PTR | DIRTY, ptr), pin)
            cset.buckets.unpin(cset.buckets.bucket_of(ptr))
            cset.alloc.rescale(end - start)
            nsectors += end - start
        cset.journal.unpin(pin)
        cset.gc.note_sectors(nsectors)
        cset.cache.submitted += len(placed)
        dev.stats.write_requests += len(placed)
        dev.stats.write_sectors += nsectors
        dev.writeback.note_request()

    def abandon(self) -> None:
        """Not all of the data could be written: no key was made, and the sectors are lost until gc finds them."""
        buckets = self.dev.cset.buckets
        for (_start, _end, ptr), _leaf in self.placed:
            buckets.unpin(buckets.bucket_of(ptr))
        self.placed = []
