# SPDX-License-Identifier: GPL-2.0-only
"""`ReadBatch`: where the data of reads lies that need nothing but a lookup in memory, many at a time.

For each read that lies in one fresh extent of a leaf in memory `ReadBatch.place` does what
`bcachectl.engine.request.read` does for a hit: the bucket's priority.  The rest, the sequential run, the counters, the
ageing of all priorities, is left for `ReadBatch.settle`, which has to be called before anything else of the engine
runs.  Only until then the answer holds, since something else may reuse a bucket; who reads later has to pin it.

What comes and goes are columns, which are there once: this is one of the modules that can be compiled, and then a read
makes no Python object.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Protocol

from bcachectl.engine.buckets import INITIAL_PRIO, PTR_SECTOR_MASK
from bcachectl.engine.front import NOT_NOW
from bcachectl.engine.node import HAS_PTR, SIZE_MASK, Node
from bcachectl.engine.streams import RECENT_IO, RECENT_NS, Streams

try:
    import cython
except ImportError:
    from bcachectl import plain as cython

if not cython.compiled:
    from bisect import bisect_right
if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet

MAX_READS = 256
"""Reads of one batch."""
MAX_HITS = 1024
"""Hits that are not counted yet; more are counted at once."""


class Readable(Protocol):
    """A volume, as a batch sees it."""

    base: int
    """Position of its sector 0."""

    @property
    def data_offset(self) -> int:
        """Sectors before those that clients see."""
        ...

    @property
    def serves_hits(self) -> bool:
        """Whether the map says where its data is."""
        ...

    def count_hits(self, hits: ReadBatch) -> None:
        """Count the first ``hit_count`` of the columns ``hit_sectors`` and ``hit_lengths``."""
        ...


class ReadBatch:
    """The batch of one volume: reads are the first ``count`` of ``sectors`` and ``lengths`` (nsectors), the answers
    those of ``places``: the byte on the cache device, or NOT_NOW.
    """

    def __init__(self, volume: Readable, cset: CacheSet) -> None:
        self.volume = volume
        self.btree = cset.btree
        buckets = cset.buckets
        self.gen_at, self.prio_at, self.shift = buckets.gen_at, buckets.prio_at, buckets.bucket_shift
        self.sectors, self.lengths = array("Q", bytes(8 * MAX_READS)), array("Q", bytes(8 * MAX_READS))
        self.places = array("q", bytes(8 * MAX_READS))
        self.hit_sectors, self.hit_lengths = array("Q", bytes(8 * MAX_HITS)), array("Q", bytes(8 * MAX_HITS))
        self.hit_count = 0

    def places_of(self, reads: list[tuple[int, int]]) -> list[int]:
        """The place of each (sector, nsectors) of the volume, all counted."""
        found: list[int] = []
        sectors, lengths = self.sectors, self.lengths
        for first in range(0, len(reads), MAX_READS):
            count = 0
            for sector, nsectors in reads[first:first + MAX_READS]:
                sectors[count] = sector
                lengths[count] = nsectors
                count += 1
            self.place(count)
            found += self.places[:count]
        self.settle()
        return found

    def place(self, count: int, shortens: bool = False) -> None:
        """Answer the first ``count`` reads.  With ``shortens`` one that begins in an extent and ends behind it is made
        as long as lies there.
        """
        sectors, lengths, places = self.sectors, self.lengths, self.places
        if not self.volume.serves_hits:
            for number in range(count):
                places[number] = NOT_NOW
            return
        if self.hit_count + count > MAX_HITS:
            self.settle()
        hit_sectors, hit_lengths, hit_count = self.hit_sectors, self.hit_lengths, self.hit_count
        root, base = self.btree.root, self.volume.base + self.volume.data_offset
        gen_at, prio_at, shift = self.gen_at, self.prio_at, self.shift
        size_mask, has_ptr, sector_mask, initial_prio = SIZE_MASK, HAS_PTR, PTR_SECTOR_MASK, INITIAL_PRIO
        for number in range(count):
            start = base + sectors[number]
            node: Node | None = root
            while node is not None and node.level:
                node = node.children[bisect_right(node.ends, start)]
            places[number] = NOT_NOW
            if node is None:
                continue
            ends = node.ends
            index = bisect_right(ends, start)
            if index == len(ends):
                continue
            end, meta = ends[index], node.meta[index]
            offset = start - end + (meta & size_mask)
            if offset < 0 or not meta & has_ptr or (start + lengths[number] > end and not shortens):
                continue
            ptr = node.ptrs[index]
            at = (ptr >> 8) & sector_mask
            bucket = at >> shift
            if 0 < (gen_at[bucket] - ptr) & 255 <= 128:
                continue
            if start + lengths[number] > end:
                lengths[number] = end - start
            prio_at[bucket] = initial_prio
            node.used = 1
            hit_sectors[hit_count] = sectors[number]
            hit_lengths[hit_count] = lengths[number]
            hit_count += 1
            places[number] = (at + offset) << 9
        self.hit_count = hit_count

    def settle_as_one(self) -> None:
        """Count what was placed one after the other as one read."""
        if self.hit_count:
            self.hit_lengths[0] = hit_sectors_sum(self)
            self.hit_count = 1
            self.settle()

    def drop(self) -> None:
        """Count nothing of what was placed: it is asked for once more, in another way."""
        self.hit_count = 0

    def settle(self) -> None:
        """Count what was placed."""
        if self.hit_count:
            self.volume.count_hits(self)
            self.hit_count = 0


def hit_sectors_sum(hits: ReadBatch) -> int:
    """Sectors of all hits."""
    lengths, total = hits.hit_lengths, 0
    for number in range(hits.hit_count):
        total += lengths[number]
    return total


def note_hits(hits: ReadBatch, streams: Streams, cutoff_bytes: int, now_ns: int) -> tuple[int, int]:
    """`bcachectl.engine.streams.Streams.note` for each hit, as stream 0: how many reach the cutoff, and how many
    sectors they have.

    The rule stands here again because a call for each would cost more than it does; tests/property/test_streams.py
    compares.
    """
    recent, since_ns = streams.recent, now_ns - RECENT_NS
    sectors, lengths, offset = hits.hit_sectors, hits.hit_lengths, hits.volume.data_offset
    passed = passed_sectors = 0
    run, average = streams.lengths.get(0, (0, 0))
    for number in range(hits.hit_count):
        start, nsectors = sectors[number] + offset, lengths[number]
        nbytes = nsectors << 9
        found = recent.pop(start, None)
        if found is not None and found[1] > since_ns:
            nbytes += found[0]
        else:
            average = (average * 7 + run) >> 3
            if len(recent) >= RECENT_IO:
                del recent[next(iter(recent))]
        recent[start + nsectors] = (nbytes, now_ns)
        run = nbytes
        if nbytes >= cutoff_bytes or average >= cutoff_bytes:
            passed += 1
            passed_sectors += nsectors
    if len(streams.lengths) > 4 * RECENT_IO:
        del streams.lengths[next(iter(streams.lengths))]
    streams.lengths[0] = (run, average)
    return passed, passed_sectors
