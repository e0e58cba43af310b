# SPDX-License-Identifier: GPL-2.0-only
"""The runs of many reads, counted together, are those of each counted by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from bcachectl.engine.buckets import Buckets
from bcachectl.engine.read_batch import ReadBatch, note_hits
from bcachectl.engine.streams import RECENT_NS, Streams
from bcachectl.ondisk.geometry import Geometry

OFFSET = 16
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
