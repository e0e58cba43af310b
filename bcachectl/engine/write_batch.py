# SPDX-License-Identifier: GPL-2.0-only
"""`WriteBatch`: small writes in writeback mode that need not wait for anything, many at a time and without a task each.

A write that finds everything ready takes three steps:

1. `WriteBatch.place` looks whether `bcachectl.engine.request.write` would keep the write back, and would not have to
   wait on its way.  If so, it takes sectors from the write point's open bucket, which is marked dirty.  Whatever is not
   so plain is declined (`NOT_NOW`) and takes the way of all other requests.
2. The export writes the data where it was told to: what was placed one after the other lies side by side, so one
   system call carries many.
3. `WriteBatch.commit` appends all keys to the journal at once and puts them in their leaves; the export answers.
   If the data could not be written it is `WriteBatch.abandon` instead, and each write begins anew as a request.

So it is where nothing else of the engine runs between the steps, as on files in the page cache.  Where the data takes
its time, as to a device, the writes become a group in flight first, which everyone else sees: an export that has their
data in one piece leaves the rest to the engine (`bcachectl.engine.write_group`), others use
`bcachectl.engine.exported_writes`.

The order is that of `bcachectl.engine.request.insert_data`: the bucket is dirty before a key to it exists, the data is
written before its key is journaled, the key is journaled before it is inserted.  That room for the keys is there, in
the journal's open entry and in the leaves, is known before anything is written.

What is in flight elsewhere counts as usual: a write that overlaps one is declined, fills that it overlaps are
cancelled.

What comes and goes are columns (`Placed`): this is one of the modules that can be compiled.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from bcachectl.engine.alloc import Reserve
from bcachectl.engine.buckets import MARK_DIRTY
from bcachectl.engine.front import NOT_NOW
from bcachectl.engine.node import FLAGS, PENDING, Node
from bcachectl.engine.open_buckets import NEAR
from bcachectl.engine.request import CUTOFF_CACHE_ADD
from bcachectl.engine.streams import RECENT_IO, RECENT_NS
from bcachectl.ondisk.bkey import DIRTY_KEY3, INODE_SHIFT, KEY_BYTES, SECTOR_MASK
from bcachectl.ondisk.superblock import CacheMode

try:
    import cython
except ImportError:
    from bcachectl import plain as cython

if not cython.compiled:
    from bisect import bisect_right
if TYPE_CHECKING:
    from bcachectl.engine.cached_dev import CachedDev
    from bcachectl.engine.journal import JournalPin

_WRITEBACK, _GENERAL = CacheMode.WRITEBACK, Reserve.NONE
MAX_WRITES = 256
"""Writes of one batch."""
SOON = -2
"""As NOT_NOW, for what ends soon: the leaf that the key would go in is being made anew, the allocator has no bucket
ready, or the journal's open entry no room."""
ROOM_SHIFT = 3
"""A leaf without room for the keys of a batch is made anew if less than this part of it, an eighth, is free."""
WORDS_PER_INSERT = 6
"""The most u64s that one insert adds to a leaf's pending set: a key of three, and the other half of one it cuts in
two."""


def keeps_back(dev: CachedDev) -> bool:
    """Whether `bcachectl.engine.request.mode_for` would now say BACK of any small aligned write without flags that is
    not sequential, and `bcachectl.engine.request.write` would not have to wait for the superblock first.
    """
    cset = dev.cset
    return (
        dev.attached
        and dev.cache_mode == _WRITEBACK
        and dev.is_known_dirty
        and not (dev.detaching or dev.io_disable or dev.read_only)
        and cset.sync
        and not (cset.io_disabled or cset.stopping)
        and cset.congestion.value >= 0
        and cset.buckets.in_use_percent <= min(cset.cutoff_writeback, cset.cutoff_writeback_sync, CUTOFF_CACHE_ADD)
    )


class Placed:
    """Writes that have their sectors: the first ``count`` of the columns ``starts``, ``ends`` (positions) and ``ptrs``
    (pointer words), and the leaf in which each key goes.
    """

    def __init__(self, dev: CachedDev) -> None:
        self.dev = dev
        self.base = dev.base
        self.starts, self.ends, self.ptrs = (array("Q", bytes(8 * MAX_WRITES)) for _ in range(3))
        self.keys = array("Q", bytes(KEY_BYTES * MAX_WRITES))
        self.words = self.keys
        self.count = 0
        self.leaves: list[Node] = []
        buckets = dev.cset.buckets
        self.pins, self.shift = buckets.pin_at, buckets.bucket_shift + 8

    def overlaps(self, start: int, end: int) -> bool:
        """Whether one of them is to any of the sectors [start, end) of the backing device."""
        starts, ends = self.starts, self.ends
        start += self.base
        end += self.base
        for index in range(self.count):
            if starts[index] < end and start < ends[index]:
                return True
        return False

    def sectors_sum(self) -> int:
        """Sectors of all of them."""
        starts, ends, total = self.starts, self.ends, 0
        for index in range(self.count):
            total += ends[index] - starts[index]
        return total

    def pack_keys(self) -> bytes:
        """Their keys, as `bcachectl.ondisk.bkey.pack_dirty_keys` has them."""
        starts, ends, ptrs = self.starts, self.ends, self.ptrs
        dirty_key3, inode_shift, sector_mask, words = DIRTY_KEY3, INODE_SHIFT, SECTOR_MASK, self.words
        for index in range(self.count):
            end = ends[index]
            words[3 * index] = dirty_key3 | (end - starts[index]) << 20 | end >> inode_shift
            words[3 * index + 1] = end & sector_mask
            words[3 * index + 2] = ptrs[index]
        return self.keys[:3 * self.count].tobytes()

    def pin_all(self) -> None:
        """A pin for each on its bucket."""
        ptrs, pins, shift = self.ptrs, self.pins, self.shift
        for index in range(self.count):
            pins[ptrs[index] >> shift] += 1

    def unpin_all(self) -> None:
        """Drop those."""
        ptrs, pins, shift = self.ptrs, self.pins, self.shift
        for index in range(self.count):
            pins[ptrs[index] >> shift] -= 1

    def find_leaves(self) -> bool:
        """Look again where the keys go, as time has passed; False if one would have to wait there."""
        starts, ends, leaves = self.starts, self.ends, self.leaves
        root = self.dev.cset.btree.root
        leaves.clear()
        rooms, last = Rooms(self.dev, self.count), None
        for index in range(self.count):
            start = starts[index]
            leaf: Node | None = root
            while leaf is not None and leaf.level:
                leaf = leaf.children[bisect_right(leaf.ends, start)]
            if leaf is None or ends[index] > leaf.end:
                return False
            if leaf is not last:
                if not rooms.has_room(leaf):
                    return False
                last = leaf
            leaves.append(leaf)
        return True

    def insert(self, pin: JournalPin) -> None:
        """Put all keys in their leaves, which have room; they are in the entry of ``pin``."""
        cset = self.dev.cset
        btree, slot = cset.btree, self.base >> INODE_SHIFT
        starts, ends, ptrs, leaves = self.starts, self.ends, self.ptrs, self.leaves
        flags, pending = FLAGS, PENDING
        became_dirty = 0
        has_stripes = bool(cset.stripes) and slot in cset.stripes
        for index in range(self.count):
            leaf = leaves[index]
            start, end, ptr = starts[index], ends[index], ptrs[index]
            if leaf.overwrite_dirty(start, end, ptr):
                continue
            if has_stripes:
                overwritten: list[tuple[int, int]] = []
                leaf.insert_range(start, end, flags, ptr, pending, overwritten)
                for first, last in overwritten:
                    cset.account_dirty(first, first - last)
                cset.account_dirty(start, end - start)
            else:
                became_dirty += end - start
                became_dirty -= leaf.insert_range(start, end, flags, ptr, pending, None)
        if became_dirty:
            cset.dirty_by_inode[slot] = cset.dirty_by_inode.get(slot, 0) + became_dirty
        btree.inserts += self.count
        seq, write_bytes, settled = pin.seq, btree.leaf_write_bytes, 0
        for leaf in dict.fromkeys(leaves):
            if leaf.is_settled(seq, write_bytes):
                leaf.used = 1
                settled += 1
            else:
                btree.touched(leaf, pin)
        btree.changes += settled


class Rooms:
    """Whether ``count`` inserts into a leaf need not wait; asked of each leaf once.

    Who finds a leaf too full has it made anew, and need not fill it up one by one until the last key does.
    """

    def __init__(self, dev: CachedDev, count: int) -> None:
        self.known: dict[Node, bool] = {}
        self.cset = dev.cset
        self.geometry = dev.cset.geometry
        self.words = WORDS_PER_INSERT * count

    def has_room(self, leaf: Node) -> bool:
        """The answer."""
        found = self.known.get(leaf)
        if found is None:
            found = not (leaf.frozen or leaf.gone) and leaf.has_room(self.words, self.geometry)
            if not found:
                self.cset.splitter.make_room(leaf, min(self.words, self.geometry.node_sectors << 6 >> ROOM_SHIFT))
            self.known[leaf] = found
        return found


class WriteBatch:
    """The batch of one cached device: empty but between `place` and `commit`.

    Writes are the first ``count`` of ``sectors`` and ``lengths`` (nsectors), the answers those of ``places``.
    ``placed`` are those that were not declined; the first ``pinned`` of ``pins`` are the buckets that hold a pin for
    one of them.
    """

    def __init__(self, dev: CachedDev) -> None:
        self.dev = dev
        self.sectors, self.lengths = array("Q", bytes(8 * MAX_WRITES)), array("Q", bytes(8 * MAX_WRITES))
        self.places = array("q", bytes(8 * MAX_WRITES))
        self.placed = Placed(dev)
        self.spare: Placed | None = None
        self.pins, self.pinned = array("Q", bytes(8 * MAX_WRITES)), 0
        self.mark_at = dev.cset.buckets.mark_at
        self.uncounted = self.uncounted_sectors = 0

    def place(self, writes: list[tuple[int, int]], stream: int) -> list[int]:
        """Where the data of each (sector, nsectors) is to be written now, a byte of the cache device; or NOT_NOW.

        The sectors are the volume's.  After this comes `commit`, `hand_over` or `abandon`, before anything else of the
        engine runs.
        """
        count, sectors, lengths, places = 0, self.sectors, self.lengths, self.places
        for sector, nsectors in writes[:MAX_WRITES]:
            sectors[count] = sector
            lengths[count] = nsectors
            count += 1
        self.place_columns(count, stream)
        return [max(place, NOT_NOW) for place in places[:count]] + [NOT_NOW] * (len(writes) - count)

    def place_columns(self, count: int, stream: int) -> None:
        """`place` for the first ``count`` of the columns; in ``places`` it may say `SOON` instead of NOT_NOW."""
        dev, placed = self.dev, self.placed
        assert not placed.count, "what was placed before is committed, served or abandoned"
        writes, lengths, places, not_now, soon = self.sectors, self.lengths, self.places, NOT_NOW, SOON
        for number in range(count):
            places[number] = not_now
        if not keeps_back(dev):
            return
        cset = dev.cset
        placed.base = dev.base
        room = min(cset.journal.room_bytes() // KEY_BYTES, count)
        ranges, streams, sectors, buckets = dev.ranges, dev.streams, cset.sectors, cset.buckets
        starts, ends, ptrs, leaves = placed.starts, placed.ends, placed.ptrs, placed.leaves
        root, rooms, last_leaf, open_bucket = cset.btree.root, Rooms(dev, count), None, None
        data_offset, base, mask, size_sectors = dev.data_offset, dev.base, dev.block_mask, dev.size_sectors
        shift, block, by_position, near, near_mask = placed.shift, mask + 1, sectors.by_position, sectors.near, NEAR - 1
        pins, mark_at, dirty = self.pins, self.mark_at, MARK_DIRTY
        cutoff_bytes, now_ns = dev.sequential_cutoff >> 9 << 9, cset.sched.now_ns
        since_ns, recent = now_ns - RECENT_NS, streams.recent
        run_bytes, average = streams.lengths.get(stream, (0, 0)) if cutoff_bytes else (0, 0)
        has_writes, has_fills = bool(ranges.writes or ranges.groups), bool(ranges.fills)
        ptr = marked = got = next_ptr = free = taken = position = nbytes = bytes_average = 0
        for number in range(count):
            nsectors, first = lengths[number], writes[number] + data_offset
            if (first | nsectors) & mask or writes[number] + nsectors > size_sectors \
                    or (has_writes and ranges.writing(first, first + nsectors)):
                continue
            if got == room:
                places[number] = soon
                continue
            start = base + first
            leaf: Node | None = root
            while leaf is not None and leaf.level:
                leaf = leaf.children[bisect_right(leaf.ends, start)]
            if leaf is None or start + nsectors > leaf.end:
                continue
            if leaf is not last_leaf:
                if not rooms.has_room(leaf):
                    places[number] = soon
                    continue
                last_leaf = leaf
            if cutoff_bytes:
                # What `Streams.note` would say.  The rule stands here again because a call for each would cost more
                # than it does; tests/property/test_streams.py compares.
                found = recent.get(first)
                nbytes, bytes_average = nsectors << 9, average
                if found is not None and found[1] > since_ns:
                    nbytes += found[0]
                else:
                    bytes_average = (average * 7 + run_bytes) >> 3
                    found = None
                if nbytes >= cutoff_bytes or bytes_average >= cutoff_bytes:
                    continue
            if open_bucket is not None and free >= nsectors + block \
                    and (not near[start >> 3 & near_mask] or by_position.get(start, open_bucket) is open_bucket):
                # More of the bucket of the last one, whose place among the others stays.
                ptr = next_ptr
                next_ptr += nsectors << 8
                free -= nsectors
                taken += nsectors
                position = start + nsectors
            else:
                if taken:
                    sectors.took(position, taken)
                    taken = 0
                ptr = sectors.alloc_whole(start, nsectors, stream)
                if not ptr:
                    places[number] = not_now if cset.alloc.available_nowait(_GENERAL) else soon
                    continue
                open_bucket = sectors.last_used
                next_ptr, free = open_bucket.ptr, open_bucket.sectors_free
                pins[self.pinned] = ptr >> shift
                self.pinned += 1
            if cutoff_bytes:
                # And what it would do.
                if recent.pop(first, None) is None or found is None:
                    if len(recent) >= RECENT_IO:
                        del recent[next(iter(recent))]
                recent[first + nsectors] = (nbytes, now_ns)
                run_bytes, average = nbytes, bytes_average
            if has_fills:
                ranges.cancel_fills(first, first + nsectors)
            if ptr >> shift != marked:
                # Before the key is in the map: a gc that runs later must not take the bucket for clean.
                marked = ptr >> shift
                if mark_at[marked] != dirty or buckets.marks is not None:
                    buckets.mark_dirty(marked)
            starts[got], ends[got], ptrs[got] = start, start + nsectors, ptr
            leaves.append(leaf)
            got += 1
            places[number] = (ptr >> 8) << 9
        if taken:
            sectors.took(position, taken)
        if got == room < count:
            cset.journal.request_write()
        if cutoff_bytes and got:
            streams.set_run(stream, run_bytes, average)
        placed.count = got

    def commit(self, duration_ns: int) -> None:
        """The data of all that was placed is written, in ``duration_ns``: put it in journal and map."""
        placed = self.placed
        if not placed.count:
            return
        cset = self.dev.cset
        cset.congestion.account(duration_ns, is_write=True)
        pin = cset.journal.add_nowait(placed.pack_keys())
        assert pin is not None, "there was room when the writes were placed"
        placed.insert(pin)
        cset.journal.unpin(pin)
        cset.cache.submitted += placed.count
        self._count()
        self.settle()
        self.abandon()

    def hand_over(self) -> Placed:
        """What was placed, for someone who writes data and keys in his own time; each has a pin on its bucket.
        `settle` is still to be called.
        """
        placed = self.placed
        if placed.count:
            placed.pin_all()
            self._count()
            self.placed, self.spare = self.spare or Placed(self.dev), None
            self._drop_pins()
        return placed

    def take_back(self, placed: Placed) -> None:
        """Nobody needs what `hand_over` gave any more: it is for the next ones."""
        placed.count = 0
        placed.leaves.clear()
        self.spare = placed

    def _count(self) -> None:
        self.uncounted += self.placed.count
        self.uncounted_sectors += self.placed.sectors_sum()

    def settle(self) -> None:
        """Count what was committed or handed over, as every request of its kind; before anything else of the engine
        runs.
        """
        if not self.uncounted:
            return
        dev, nsectors = self.dev, self.uncounted_sectors
        cset, stats = dev.cset, dev.stats
        stats.write_requests += self.uncounted
        stats.write_sectors += nsectors
        self.uncounted = self.uncounted_sectors = 0
        cset.gc.note_sectors(nsectors)
        cset.alloc.rescale_for_all(nsectors)
        dev.writeback.note_request()

    def abandon(self) -> None:
        """Not all of the data could be written: no key is made, and the sectors are lost until gc finds them."""
        self._drop_pins()
        self.placed.count = 0
        self.placed.leaves.clear()

    def _drop_pins(self) -> None:
        pin_at, pins = self.placed.pins, self.pins
        for index in range(self.pinned):
            bucket = pins[index]
            assert pin_at[bucket] > 0, bucket
            pin_at[bucket] -= 1
        self.pinned = 0
