# SPDX-License-Identifier: GPL-2.0-only
"""The runs of many reads or writes, counted together, are those of each counted by itself."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from bcachectl.engine import write_batch
from bcachectl.engine.buckets import Buckets
from bcachectl.engine.front import NOT_NOW
from bcachectl.engine.node import Node
from bcachectl.engine.open_buckets import SectorAllocator
from bcachectl.engine.read_batch import ReadBatch, note_hits
from bcachectl.engine.streams import RECENT_NS, Streams
from bcachectl.engine.write_batch import WriteBatch
from bcachectl.ondisk.bkey import MAX_POS, pack_dirty_keys
from bcachectl.ondisk.geometry import Geometry

OFFSET = 16
STREAM = 3
CUTOFF_BYTES = 64 << 10
GEOMETRY = Geometry(block_size_sectors=8, bucket_size_sectors=8, nbuckets=32, first_bucket=1)
READS = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=60)


def hits_of(reads: list[tuple[int, int]]) -> ReadBatch:
    """A batch in which all of these were placed."""
    cset = SimpleNamespace(btree=None, buckets=Buckets(GEOMETRY))
    batch = ReadBatch(cast(Any, SimpleNamespace(data_offset=OFFSET)), cast(Any, cset))
    for number, (sector, nsectors) in enumerate(reads):
        batch.hit_sectors[number], batch.hit_lengths[number] = sector, nsectors
    batch.hit_count = len(reads)
    return batch


@given(turns=st.lists(st.tuples(st.sampled_from([0, 1, RECENT_NS - 1, RECENT_NS, RECENT_NS + 1]), READS), max_size=6),
       scale=st.sampled_from([1, 8]))
def test_a_batch_counts_as_its_reads_do(turns: list[tuple[int, list[tuple[int, int]]]], scale: int) -> None:
    together, each, now_ns = Streams(), Streams(), 0
    for later_ns, steps in turns:
        now_ns += later_ns
        reads = [(sector * scale, nsectors * scale) for sector, nsectors in steps]
        notes = [each.note(sector + OFFSET, nsectors, stream=0, now_ns=now_ns) for sector, nsectors in reads]
        passed = [nsectors for (_, nsectors), note in zip(reads, notes, strict=True) if note << 9 >= CUTOFF_BYTES]
        assert note_hits(hits_of(reads), together, CUTOFF_BYTES, now_ns) == (len(passed), sum(passed))
        assert (list(together.recent.items()), together.lengths) == (list(each.recent.items()), each.lengths)


def batch_of(streams: Streams, now_ns: int) -> WriteBatch:
    """The batch of a device whose cache has room for anything, in the one bucket that it takes."""
    leaf = Node(ptr=0, bucket=1, level=0, end=MAX_POS, seq=0, nblocks=1 << 20, bucket_shift=40)
    geometry = Geometry(block_size_sectors=1, bucket_size_sectors=1 << 15, nbuckets=32, first_bucket=1)
    buckets = Buckets(geometry)
    alloc = SimpleNamespace(available_nowait=lambda _reserve: 1, alloc_nowait=lambda _reserve: 1)
    cset = SimpleNamespace(journal=SimpleNamespace(room_bytes=lambda: 1 << 20), buckets=buckets, alloc=alloc,
                           btree=SimpleNamespace(root=leaf), geometry=geometry, sched=SimpleNamespace(now_ns=now_ns))
    cset.sectors = SectorAllocator(cast(Any, cset))
    ranges = SimpleNamespace(writes=[], groups=[], fills=[])
    return WriteBatch(cast(Any, SimpleNamespace(cset=cset, base=0, data_offset=OFFSET, block_mask=0, streams=streams,
                                                size_sectors=1 << 30, ranges=ranges, sequential_cutoff=CUTOFF_BYTES)))


@given(turns=st.lists(st.tuples(st.sampled_from([0, 1, RECENT_NS - 1, RECENT_NS, RECENT_NS + 1]), READS), max_size=6),
       scale=st.sampled_from([1, 8]))
def test_a_batch_declines_what_is_sequential(turns: list[tuple[int, list[tuple[int, int]]]], scale: int) -> None:
    together, each, now_ns = Streams(), Streams(), RECENT_NS
    for later_ns, steps in turns:
        now_ns += later_ns
        writes = [(sector * scale, nsectors * scale) for sector, nsectors in steps]
        with mock.patch.object(write_batch, "keeps_back", return_value=True):
            batch = batch_of(together, now_ns)
            places = batch.place(writes, STREAM)
        for (sector, nsectors), place in zip(writes, places, strict=True):
            after = deepcopy(each)
            note = after.note(sector + OFFSET, nsectors, stream=STREAM, now_ns=now_ns)
            assert (place == NOT_NOW) == (note << 9 >= CUTOFF_BYTES)
            if place != NOT_NOW:
                each = after
        assert (list(together.recent.items()), together.lengths) == (list(each.recent.items()), each.lengths)
        placed = batch.placed
        extents = list(zip(placed.starts, placed.ends, placed.ptrs, strict=True))[:placed.count]
        assert placed.pack_keys() == pack_dirty_keys(extents)
        assert [ptr >> 8 << 9 for _, _, ptr in extents] == [place for place in places if place != NOT_NOW]
