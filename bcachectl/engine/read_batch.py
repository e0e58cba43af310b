# SPDX-License-Identifier: GPL-2.0-only
"""`place_reads`: where the data of reads lies that need nothing but a lookup in memory, many at a time.

For each read that lies in one fresh extent of a leaf in memory it does what `bcachectl.engine.request.read` does for a
hit: the bucket's priority, the sequential run, the counters, the ageing of all priorities.  The answer holds until
something else of the engine runs, since only then a bucket may be reused; who reads later has to pin it.

What is the same for all reads of a batch is looked up once, and counted once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bcachectl.engine.buckets import INITIAL_PRIO, PTR_SECTOR_MASK
from bcachectl.engine.front import NOT_NOW
from bcachectl.engine.node import HAS_PTR, SIZE_MASK, Node
from bcachectl.engine.streams import RECENT_IO, RECENT_NS, Streams
from bcachectl.ondisk.superblock import CacheMode

try:
    import cython
except ImportError:
    from bcachectl import plain as cython

if not cython.compiled:
    from bisect import bisect_right
if TYPE_CHECKING:
    from bcachectl.engine.cached_dev import CachedDev


def place_reads(dev: CachedDev, reads: list[tuple[int, int]]) -> list[int]:
    """The byte on the cache device for each (sector, nsectors) of the volume, or NOT_NOW."""
    cset = dev.cset
    if not dev.attached or cset.io_disabled or dev.io_disable:
        return [NOT_NOW] * len(reads)
    root, base, buckets = cset.btree.root, dev.base + dev.data_offset, cset.buckets
    gen_at, prio_at, shift = buckets.gen_at, buckets.prio_at, buckets.bucket_shift
    size_mask, has_ptr, sector_mask, initial_prio = SIZE_MASK, HAS_PTR, PTR_SECTOR_MASK, INITIAL_PRIO
    places: list[int] = []
    hits: list[tuple[int, int]] = []
    for read in reads:
        sector, nsectors = read
        start = base + sector
        node: Node | None = root
        while node is not None and node.level:
            node = node.children[bisect_right(node.ends, start)]
        if node is not None:
            ends = node.ends
            index = bisect_right(ends, start)
            if index < len(ends):
                end, meta = ends[index], node.meta[index]
                offset = start - end + (meta & size_mask)
                if offset >= 0 and start + nsectors <= end and meta & has_ptr:
                    ptr = node.ptrs[index]
                    at = (ptr >> 8) & sector_mask
                    bucket = at >> shift
                    if not 0 < (gen_at[bucket] - ptr) & 255 <= 128:
                        prio_at[bucket] = initial_prio
                        node.used = 1
                        hits.append(read)
                        places.append((at + offset) << 9)
                        continue
        places.append(NOT_NOW)
    if hits:
        _count(dev, hits)
    return places


def _count(dev: CachedDev, hits: list[tuple[int, int]]) -> None:
    cset, stats, writeback = dev.cset, dev.stats, dev.writeback
    count, nsectors = len(hits), sum([hit[1] for hit in hits])
    stats.read_requests += count
    stats.read_sectors += nsectors
    writeback.idle_rounds = 0
    if writeback.at_full_speed:
        writeback.note_request()
    passed, passed_sectors = count, nsectors
    if not (dev.detaching or dev.cache_mode == CacheMode.NONE):
        passed = passed_sectors = 0
        cutoff_bytes = dev.sequential_cutoff >> 9 << 9
        if cutoff_bytes:
            passed, passed_sectors = _note_all(dev.streams, hits, dev.data_offset, cutoff_bytes, cset.sched.now_ns)
    stats.cache_bypass_hits += passed
    stats.bypassed_sectors += passed_sectors
    stats.cache_hits += count - passed
    buckets = cset.buckets
    buckets.rescale_sectors -= nsectors - passed_sectors
    while buckets.rescale_sectors < 0:
        cset.alloc.rescale(0)


def _note_all(
    streams: Streams, hits: list[tuple[int, int]], data_offset: int, cutoff_bytes: int, now_ns: int
) -> tuple[int, int]:
    # `Streams.note` for each of them, as stream 0: how many reach the cutoff, and how many sectors they have.  The rule
    # stands here again because a call for each would cost more than it does; tests/property/test_streams.py compares.
    recent, since_ns = streams.recent, now_ns - RECENT_NS
    count = sectors = 0
    run, average = streams.lengths.get(0, (0, 0))
    for sector, nsectors in hits:
        start = sector + data_offset
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
            count += 1
            sectors += nsectors
    if len(streams.lengths) > 4 * RECENT_IO:
        del streams.lengths[next(iter(streams.lengths))]
    streams.lengths[0] = (run, average)
    return count, sectors
