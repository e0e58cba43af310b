# SPDX-License-Identifier: GPL-2.0-only
"""Snapshots to look at: a busy engine with two cached devices and a flash volume, and what history it had."""

from __future__ import annotations

import dataclasses
import random

from bcachectl.snapshot import (
    AllocatorSnapshot,
    AllocCounters,
    BtreeSnapshot,
    BucketCounts,
    EventSnapshot,
    FifoSnapshot,
    GcSnapshot,
    GenSnapshot,
    JournalSnapshot,
    MapSnapshot,
    PrioSnapshot,
    RequestCounters,
    SetSnapshot,
    VolumeSnapshot,
    WindowSnapshot,
    WritebackSnapshot,
)
from bcachectl.views.history import History

NBUCKETS = 16384
BUCKET_BYTES = 512 << 10


def sample_map(cells: int) -> MapSnapshot:
    """A map with runs of states, as a cache that has been written for a while has it."""
    generator = random.Random(7)
    states = "r"
    while len(states) < cells:
        states += generator.choice("uuccccccccdddmof") * generator.randrange(1, 9)
    states = states[:cells]
    fills = tuple(0 if state == "u" else generator.randrange(20, 101) for state in states)
    return MapSnapshot(states=states, fills=fills, buckets_per_cell=NBUCKETS / cells)


def sample_volume(name: str = "bcache0", **changes: object) -> VolumeSnapshot:
    """A cached device in writeback mode with dirty data."""
    volume = VolumeSnapshot(
        name=name, uuid="6c0e1c5a-0d34-4b7e-9d6c-3a5b1f0e7d21", label="home", kind="cached", slot=0, size_bytes=2 << 40,
        state="dirty", mode="writeback", dirty_sectors=2_516_582, has_dirty=True, attached=True,
        backing_path="/dev/sdb", backing_bytes=2 << 40,
        writeback=WritebackSnapshot(running=True, percent=10, delay_s=30, rate_sectors=8192, target_sectors=1_677_721,
                                    proportional_sectors=20971, integral_sectors=-300, in_flight=12,
                                    written_sectors=90000, keys_done=1200, keys_failed=0),
        windows=(WindowSnapshot("total", 87000, 13000, 10, 500, 3, 1 << 20),
                 WindowSnapshot("five_minute", 900, 100, 0, 5, 0, 4096)),
        requests=RequestCounters(reads=100_500, writes=40_000, flushes=200, discards=0, read_sectors=900_000,
                                 written_sectors=640_000, errors=0))
    return dataclasses.replace(volume, **changes)  # type: ignore[arg-type]


def sample_snapshot(cells: int = 0, **changes: object) -> SetSnapshot:
    """A busy set without anything to worry about."""
    histogram = [0] * 97
    histogram[:6] = [12000, 3000, 1000, 300, 80, 4]
    snapshot = SetSnapshot(
        t_ns=753_000_000_000, source="engine", version="0.1", uuid="2d6c1f0e-7b5a-4c1e-8a55-90a1b2c3d4e5",
        cache_path="/dev/nvme0n1p3", cache_bytes=NBUCKETS * BUCKET_BYTES, block_bytes=4096, bucket_bytes=BUCKET_BYTES,
        pid=4711, uptime_ns=753_000_000_000, failed=None,
        allocator=AllocatorSnapshot(
            nbuckets=NBUCKETS, first_bucket=1, bucket_bytes=BUCKET_BYTES,
            counts=BucketCounts(unused=1500, free=157, open=9, clean=11500, dirty=3000, metadata=153, reserved=65),
            gens=GenSnapshot(histogram=tuple(histogram), max=5, need_gc=5),
            prio=PrioSnapshot(quantiles=tuple(range(12, 12 + 31 * 40, 40)), average=620, sectors_per_quantile=468_000,
                              zero=3, btree=153, min_prio=31000, rescale_sectors=8000),
            replacement="lru", discard=False,
            reserves=(FifoSnapshot("BTREE", 127, 127), FifoSnapshot("PRIO", 1, 1), FifoSnapshot("MOVINGGC", 15, 15),
                      FifoSnapshot("NONE", 9, 15)),
            free_inc=FifoSnapshot("free_inc", 5, 63), avail_nbuckets=12900, in_use_percent=21, prio_blocked=0,
            invalidate_needs_gc=False, gc_mark_valid=True, waiting_tasks=0,
            counters=AllocCounters(allocations=5120, alloc_fails=0, invalidations=5230, prio_writes=84, discards=0)),
        map=sample_map(cells) if cells else None,
        gc=GcSnapshot(running=False, runs=3, nodes=212, last_duration_ns=41_000_000, last_end_ns=700_000_000_000,
                      sectors_to_gc=810_000, progress_percent=None),
        journal=JournalSnapshot(seq=5123, last_seq=5060, pins=64, pins_size=8191, njournal=64, cur_idx=12, last_idx=7,
                                free_buckets=59, blocks_free=88, is_full=False, delay_ms=100, writes=5100,
                                full_waits=0),
        btree=BtreeSnapshot(depth=1, nodes_cached=212, cache_bytes=55 << 20, limit_bytes=256 << 20, dirty_leaves=31,
                            keys_cached=412_345, node_reads=212, node_writes=900, splits=40),
        volumes=(sample_volume(),
                 sample_volume("bcache1", label="", mode="writethrough", state="clean", dirty_sectors=0,
                               has_dirty=False, slot=1, backing_path="/dev/sdc"),
                 sample_volume("bcache2", kind="flash", label="fast", mode="writeback", backing_path=None, slot=2,
                               size_bytes=8 << 30, writeback=None)),
        events=(EventSnapshot(751_000_000_000, "bcache_prio_write", "buckets=1 seq=84"),
                *(EventSnapshot(752_000_000_000 + index, "bcache_invalidate", f"bucket={900 + index} sectors=1024")
                  for index in range(5)),
                EventSnapshot(752_900_000_000, "bcache_alloc", "bucket=901 reserve=NONE")))
    return dataclasses.replace(snapshot, **changes)  # type: ignore[arg-type]


def sample_history(snapshot: SetSnapshot, samples: int = 60) -> History:
    """``samples`` seconds that end in ``snapshot``, with a load that comes and goes."""
    history = History()
    generator = random.Random(3)
    reads = hits = writes = 0
    for index in range(samples + 1):
        load = 1 + index % 20
        reads += 40 * load
        hits += generator.randrange(25, 40) * load
        writes += 15 * load if index % 30 > 10 else 0
        volumes = tuple(
            dataclasses.replace(volume, windows=(WindowSnapshot("total", hits, reads - hits, 0, 0, 0, 0),),
                                requests=RequestCounters(reads=reads, writes=writes, read_sectors=reads * 8,
                                                         written_sectors=writes * 16))
            if number == 0 else dataclasses.replace(volume, windows=(), requests=None)
            for number, volume in enumerate(snapshot.volumes))
        counters = AllocCounters(allocations=writes // 30, alloc_fails=0, invalidations=writes // 30,
                                 prio_writes=writes // 900)
        history.add(dataclasses.replace(
            snapshot, t_ns=snapshot.t_ns - (samples - index) * 1_000_000_000, volumes=volumes,
            allocator=dataclasses.replace(snapshot.allocator, counters=counters)))
    return history
