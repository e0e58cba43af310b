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

Where a write takes its time, as to a device, the export leaves steps 2 and 3 to the engine: `WriteBatch.serve`.

The order is that of `bcachectl.engine.request.insert_data`: the bucket is dirty before a key to it exists, the data is
written before its key is journaled, the key is journaled before it is inserted.  That room for the keys is there, in
the journal's open entry and in the leaves, is known before anything is written.

What is in flight elsewhere counts as usual: a write that overlaps one is declined, fills that it overlaps are
cancelled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bcachectl.engine.front import NOT_NOW, Request
from bcachectl.engine.node import FLAGS, Extent, Node
from bcachectl.engine.request import keeps_back
from bcachectl.engine.write_group import serve_placed
from bcachectl.ondisk.bkey import KEY_BYTES, pack_dirty_keys

try:
    import cython
except ImportError:
    from bcachectl import plain as cython

if not cython.compiled:
    from bisect import bisect_right
if TYPE_CHECKING:
    from bcachectl.engine.cached_dev import CachedDev

WORDS_PER_INSERT = 6
"""The most u64s that one insert adds to a leaf's pending set: a key of three, and the other half of one it cuts in
two."""


class WriteBatch:
    """The batch of one cached device: empty but between `place` and `commit`.

    ``extents`` are (start, end, pointer word), ``leaves`` where their keys go, ``pins`` the buckets that hold a pin for
    one of them.
    """

    __slots__ = ("dev", "extents", "leaves", "pins")

    def __init__(self, dev: CachedDev) -> None:
        self.dev = dev
        self.extents: list[tuple[int, int, int]] = []
        self.leaves: list[Node] = []
        self.pins: list[int] = []

    def place(self, writes: list[tuple[int, int]], stream: int) -> list[int]:
        """Where the data of each (sector, nsectors) is to be written now, a byte of the cache device; or NOT_NOW.

        The sectors are the volume's.  After this comes `commit`, `serve` or `abandon`, before anything else of the
        engine runs.
        """
        assert not self.extents, "what was placed before is committed, served or abandoned"
        dev = self.dev
        if not keeps_back(dev):
            return [NOT_NOW] * len(writes)
        cset = dev.cset
        room = cset.journal.room_bytes() // KEY_BYTES
        ranges, streams, sectors, buckets = dev.ranges, dev.streams, cset.sectors, cset.buckets
        extents, root, has_room = self.extents, cset.btree.root, self._rooms(len(writes))
        data_offset, base, mask, size_sectors = dev.data_offset, dev.base, dev.block_mask, dev.size_sectors
        cutoff_bytes, now_ns, shift = dev.sequential_cutoff >> 9 << 9, cset.sched.now_ns, buckets.bucket_shift
        open_bucket, marked = None, -1
        places = []
        for sector, nsectors in writes:
            places.append(NOT_NOW)
            first = sector + data_offset
            if len(extents) == room or (first | nsectors) & mask or sector + nsectors > size_sectors:
                continue
            if ranges.writes and ranges.writing(first, first + nsectors):
                continue
            start = base + first
            leaf: Node | None = root
            while leaf is not None and leaf.level:
                leaf = leaf.children[bisect_right(leaf.ends, start)]
            if leaf is None or start + nsectors > leaf.end or not has_room(leaf):
                continue
            if cutoff_bytes and streams.reaches(first, nsectors, cutoff_bytes, stream=stream, now_ns=now_ns):
                continue
            ptr = sectors.take(open_bucket, start, nsectors) if open_bucket is not None else 0
            if not ptr:
                ptr = sectors.alloc_whole(start, nsectors, write_point=stream)
                if not ptr:
                    continue
                open_bucket = sectors.last_used()
                self.pins.append((ptr >> 8) >> shift)
            if cutoff_bytes:
                streams.note(first, nsectors, stream=stream, now_ns=now_ns)
            if ranges.fills:
                ranges.cancel_fills(first, first + nsectors)
            if (ptr >> 8) >> shift != marked:
                # Before the key is in the map: a gc that runs later must not take the bucket for clean.
                marked = (ptr >> 8) >> shift
                buckets.mark_dirty(marked)
            extents.append((start, start + nsectors, ptr))
            self.leaves.append(leaf)
            places[-1] = (ptr >> 8) << 9
        return places

    def _rooms(self, count: int) -> Callable[[Node], bool]:
        # Whether ``count`` inserts into a leaf need not wait; asked of each leaf once.
        known: dict[Node, bool] = {}
        geometry = self.dev.cset.geometry

        def has_room(leaf: Node) -> bool:
            found = known.get(leaf)
            if found is None:
                found = known[leaf] = not leaf.frozen and leaf.has_room(WORDS_PER_INSERT * count, geometry)
            return found

        return has_room

    def commit(self, duration_ns: int) -> None:
        """The data of all that was placed is written, in ``duration_ns``: put it in journal and map."""
        extents, leaves = self.extents, self.leaves
        if not extents:
            return
        dev = self.dev
        cset = dev.cset
        btree = cset.btree
        cset.congestion.account(duration_ns, is_write=True)
        pin = cset.journal.add_nowait(pack_dirty_keys(extents))
        assert pin is not None, "there was room when the writes were placed"
        for (start, end, ptr), leaf in zip(extents, leaves, strict=True):
            if leaf.overwrite_dirty(start, end, ptr):
                btree.inserts += 1
            else:
                btree.insert_into(leaf, Extent(start, end, FLAGS, ptr), pin)
        for leaf in dict.fromkeys(leaves):
            btree.touched(leaf, pin)
        cset.journal.unpin(pin)
        self._drop_pins()
        cset.cache.submitted += len(extents)
        self._count()
        self.extents, self.leaves = [], []

    def hand_over(self) -> list[tuple[int, int, int]]:
        """What was placed, for someone who writes data and keys in his own time; each has a pin on its bucket."""
        buckets, extents = self.dev.cset.buckets, self.extents
        if extents:
            for _start, _end, ptr in extents:
                buckets.pin_at[buckets.bucket_of(ptr)] += 1
            self._count()
            self.abandon()
        return extents

    def serve(self, request: Request) -> None:
        """Have the engine write what was placed: its data lies in ``request.buf``, in the order of placing.  The
        request comes back when all of it is in journal and map, or with an error; where it is says the placing alone.
        """
        serve_placed(self.dev, request, self.hand_over())

    def _count(self) -> None:
        # What every request of its kind counts for.
        dev = self.dev
        cset, stats = dev.cset, dev.stats
        nsectors = sum(end - start for start, end, _ptr in self.extents)
        cset.gc.note_sectors(nsectors)
        cset.alloc.rescale_for_all(nsectors)
        stats.write_requests += len(self.extents)
        stats.write_sectors += nsectors
        dev.writeback.note_request()

    def abandon(self) -> None:
        """Not all of the data could be written: no key is made, and the sectors are lost until gc finds them."""
        self._drop_pins()
        self.extents, self.leaves = [], []

    def _drop_pins(self) -> None:
        for bucket in self.pins:
            self.dev.cset.buckets.unpin(bucket)
        self.pins.clear()
