# SPDX-License-Identifier: GPL-2.0-only
"""`snapshot`: a whole set as the live view shows it; `Accounting`: how well the cache served each volume lately.

The kernel adds what was counted to four windows every 300/22 s, and lets three of them fade by 1/32 every 1, 12 and 288
of these ticks: five minutes, an hour, a day (stats.c, scale_accounting).  Here the totals count at once, and
`Accounting.run` does the rest.

A snapshot looks and changes nothing of the set.  What is said about all buckets comes from `bcachectl.census`, in bulk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bcachectl import census
from bcachectl.engine.alloc import Reserve
from bcachectl.engine.buckets import MARK_DIRTY, MARK_METADATA, MARK_RECLAIMABLE
from bcachectl.engine.cached_dev import CachedDev
from bcachectl.engine.flash_dev import FlashVolume
from bcachectl.engine.sched import NS_PER_S
from bcachectl.snapshot import (
    AbsentSnapshot,
    AllocatorSnapshot,
    AllocCounters,
    BtreeSnapshot,
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
from bcachectl.units import format_uuid

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet

TICK_NS = 300 * NS_PER_S // 22
"""Time between two ticks (stats.c, accounting_delay)."""

FADE_TICKS = {"five_minute": 1, "hour": 12, "day": 288}
"""After how many ticks a window loses 1/32 of what it holds."""

COUNTERS = ("cache_hits", "cache_misses", "cache_bypass_hits", "cache_bypass_misses", "cache_miss_collisions",
            "bypassed_sectors")
EVENTS_SHOWN = 64

_FADE = 32
_SCALE_BITS = 16
_MARK_TO_STATE = census.STATE_CLEAN - MARK_RECLAIMABLE
assert (MARK_DIRTY + _MARK_TO_STATE, MARK_METADATA + _MARK_TO_STATE) == (census.STATE_DIRTY, census.STATE_METADATA)


LARGE_NBUCKETS = 1 << 17
KEEP_NS = 4 * NS_PER_S
"""For so long the gens and priorities of a large set are shown as they were: counting a million takes a millisecond
each, and whoever watches asks every second."""

Volume = CachedDev | FlashVolume


class Summaries:
    """What is said about the gens and the priorities of all buckets; of a large set it may be `KEEP_NS` old."""

    __slots__ = ("cset", "gen", "prio", "gen_ns", "prio_ns")

    def __init__(self, cset: CacheSet) -> None:
        self.cset = cset
        self.gen: GenSnapshot | None = None
        self.prio: PrioSnapshot | None = None
        self.gen_ns = self.prio_ns = 0

    def look(self) -> tuple[GenSnapshot, PrioSnapshot]:
        """Both; at most one of them is counted anew in one go, once they are known."""
        buckets, now_ns = self.cset.buckets, self.cset.sched.now_ns
        first = buckets.first_bucket
        oldest_ns = now_ns - KEEP_NS if buckets.nbuckets >= LARGE_NBUCKETS else now_ns
        gen, prio = self.gen, self.prio
        counted = False
        if gen is None or self.gen_ns <= oldest_ns:
            counted = gen is not None and oldest_ns < now_ns
            gen = census.gen_snapshot(buckets.gen[first:], buckets.last_gc[first:], need_gc=buckets.need_gc)
            self.gen, self.gen_ns = gen, now_ns
        if prio is None or (self.prio_ns <= oldest_ns and not counted):
            prio = census.prio_snapshot(buckets.prio[first:],
                                        bucket_size_sectors=self.cset.geometry.bucket_size_sectors)
            self.prio, self.prio_ns = prio, now_ns
        return (replace(gen, need_gc=buckets.need_gc),
                replace(prio, min_prio=buckets.min_prio, rescale_sectors=buckets.rescale_sectors))


class Windows:
    """The fading windows of one volume; fed with its totals."""

    __slots__ = ("ticks", "seen", "sums")

    def __init__(self) -> None:
        self.ticks = 0
        self.seen = [0] * len(COUNTERS)
        self.sums = {name: [0] * len(COUNTERS) for name in FADE_TICKS}

    def tick(self, totals: list[int]) -> None:
        """Take in what is new since the last tick, and let those fade whose time has come."""
        self.ticks += 1
        for name, sums in self.sums.items():
            for index, total in enumerate(totals):
                sums[index] += max(0, total - self.seen[index]) << _SCALE_BITS
            if self.ticks % FADE_TICKS[name] == 0:
                sums[:] = [value * (_FADE - 1) // _FADE for value in sums]
        self.seen = totals


class Accounting:
    """The windows of every volume, by uuid, and the totals that were cleared (``clear_stats``)."""

    __slots__ = ("cset", "windows", "cleared")

    def __init__(self, cset: CacheSet) -> None:
        self.cset = cset
        self.windows: dict[bytes, Windows] = {}
        self.cleared: dict[bytes, list[int]] = {}

    async def run(self) -> None:
        """Tick until the set stops; nobody needs to wait for the last tick."""
        while not self.cset.stopping:
            await self.cset.sched.sleep_until(self.cset.sched.now_ns + TICK_NS)
            self.tick()

    def tick(self) -> None:
        """Feed the windows of every volume."""
        for volume in self.cset.volumes:
            self.windows.setdefault(volume.uuid, Windows()).tick(_totals(volume))

    def clear(self, volume: Volume) -> None:
        """Begin the totals of a volume anew; the windows go on (stats.c, bch_cache_accounting_clear)."""
        self.cleared[volume.uuid] = _totals(volume)

    def of_volume(self, volume: Volume) -> tuple[WindowSnapshot, ...]:
        """All four windows of a volume, the total first."""
        totals = _totals(volume)
        cleared = self.cleared.get(volume.uuid, [0] * len(COUNTERS))
        shown = [WindowSnapshot("total", *(total - before for total, before in zip(totals, cleared, strict=True)))]
        sums = self.windows.get(volume.uuid, Windows()).sums
        shown += [WindowSnapshot(name, *(value >> _SCALE_BITS for value in sums[name])) for name in FADE_TICKS]
        return tuple(shown)

    def of_set(self) -> tuple[WindowSnapshot, ...]:
        """The four windows of all volumes together."""
        names = ("total", *FADE_TICKS)
        sums = {name: [0] * len(COUNTERS) for name in names}
        for volume in self.cset.volumes:
            for window in self.of_volume(volume):
                parts = (window.hits, window.misses, window.bypass_hits, window.bypass_misses, window.collisions,
                         window.bypassed_sectors)
                sums[window.name] = [one + other for one, other in zip(sums[window.name], parts, strict=True)]
        return tuple(WindowSnapshot(name, *sums[name]) for name in names)


def _totals(volume: Volume) -> list[int]:
    return [getattr(volume.stats, name) for name in COUNTERS]


def snapshot(cset: CacheSet, cells: int) -> SetSnapshot:
    """The set as it is now, with a map of all buckets in ``cells`` cells; the rim adds who runs it."""
    geometry = cset.geometry
    allocator, buckets = allocator_snapshot(cset, cells)
    return SetSnapshot(
        t_ns=cset.sched.now_ns, source="engine", version="", uuid=format_uuid(cset.uuid), cache_path=cset.cache.name,
        cache_bytes=geometry.nbuckets * geometry.bucket_bytes, block_bytes=geometry.block_bytes,
        bucket_bytes=geometry.bucket_bytes, pid=None, uptime_ns=cset.sched.now_ns, failed=cset.failed,
        allocator=allocator, map=buckets, gc=_gc(cset), journal=_journal(cset), btree=_btree(cset),
        volumes=tuple(volume_snapshot(cset, volume) for volume in cset.volumes), events=_events(cset),
        cache_io_errors=cset.io_errors_seen, cache_read_races=cset.cache_read_races,
        congested=cset.congestion.value, written_sectors=cset.sectors.sectors_written,
        btree_written_sectors=cset.btree.sectors_written, metadata_written_sectors=cset.meta_sectors_written,
        read_only=cset.read_only, absent=tuple(_absent(cset)))


def _absent(cset: CacheSet) -> Iterator[AbsentSnapshot]:
    # Live slots with dirty data and without a device.
    here = {volume.slot for volume in cset.volumes}
    for slot, sectors in sorted(cset.dirty_by_inode.items()):
        if not sectors or slot in here or slot >= len(cset.uuid_array.entries):
            continue
        entry = cset.uuid_array.entries[slot]
        if not entry.is_free and not entry.is_retired:
            yield AbsentSnapshot(slot, format_uuid(entry.uuid), entry.label_text, sectors)


def allocator_snapshot(cset: CacheSet, cells: int) -> tuple[AllocatorSnapshot, MapSnapshot | None]:
    """The allocator's part, and the map."""
    alloc, buckets = cset.alloc, cset.buckets
    size = cset.geometry.bucket_size_sectors
    # Unused stays 0, the other marks are the states of their names; arithmetic is ten times a lookup's speed.
    state = buckets.mark + (buckets.mark > 0) * np.uint8(_MARK_TO_STATE)
    used = buckets.sectors_used.copy()
    on_lists = np.array(alloc.on_lists(), np.int64)
    state[on_lists] = census.STATE_FREE
    used[on_lists] = 0
    state[np.array([buckets.bucket_of(here.ptr) for here in cset.sectors.open_now()], np.int64)] = census.STATE_OPEN
    state[:buckets.first_bucket] = census.STATE_RESERVED
    state[cset.journal.buckets] = census.STATE_RESERVED
    counts, cells_map = census.census(state, used, bucket_size_sectors=size, cells=cells)
    event_counts = cset.events.counts
    gens, prio = cset.summaries.look()
    return AllocatorSnapshot(
        nbuckets=buckets.nbuckets, first_bucket=buckets.first_bucket, bucket_bytes=cset.geometry.bucket_bytes,
        counts=counts, gens=gens, prio=prio,
        replacement=alloc.replacement.name.lower(), discard=alloc.discard,
        reserves=tuple(FifoSnapshot(reserve.name, len(alloc.free[reserve]), alloc.free[reserve].size)
                       for reserve in Reserve),
        free_inc=FifoSnapshot("free_inc", len(alloc.free_inc), alloc.free_inc.size),
        avail_nbuckets=buckets.avail_nbuckets, in_use_percent=buckets.in_use_percent, prio_blocked=alloc.prio_blocked,
        invalidate_needs_gc=alloc.invalidate_needs_gc, gc_mark_valid=True, waiting_tasks=len(alloc.bucket_wait),
        counters=AllocCounters(
            allocations=alloc.allocations, alloc_fails=event_counts.get("bcache_alloc_fail", 0),
            invalidations=event_counts.get("bcache_invalidate", 0), prio_writes=cset.prios.writes,
            discards=alloc.discards)), cells_map


def volume_snapshot(cset: CacheSet, volume: Volume) -> VolumeSnapshot:
    """One volume, cached device or flash-only."""
    stats = volume.stats
    requests = RequestCounters(
        reads=stats.read_requests, writes=stats.write_requests, flushes=stats.other_requests,
        read_sectors=stats.read_sectors, written_sectors=stats.write_sectors, errors=stats.errors)
    windows = cset.accounting.of_volume(volume)
    if not isinstance(volume, CachedDev):
        return VolumeSnapshot(
            name=volume.name, uuid=format_uuid(volume.uuid), label=volume.label, kind="flash", slot=volume.slot,
            size_bytes=volume.size_sectors * 512, state="dirty" if volume.dirty_sectors else "clean", mode="writeback",
            dirty_sectors=volume.dirty_sectors, has_dirty=volume.dirty_sectors > 0, attached=True, windows=windows,
            requests=requests)
    return VolumeSnapshot(
        name=volume.name, uuid=format_uuid(volume.uuid), label=volume.label, kind="cached",
        slot=volume.slot if volume.attached else None, size_bytes=volume.size_sectors * 512, state=volume.state,
        mode=volume.cache_mode.name.lower(), dirty_sectors=volume.dirty_sectors, has_dirty=volume.has_dirty,
        attached=volume.attached, backing_path=volume.backing.name, backing_bytes=volume.backing.size_sectors * 512,
        backing_io_errors=volume.io_errors, io_disabled=volume.io_disable, writeback=_writeback(volume),
        windows=windows, requests=requests)


def _writeback(dev: CachedDev) -> WritebackSnapshot:
    writeback, rate = dev.writeback, dev.writeback.rate
    return WritebackSnapshot(
        running=writeback.writeback_running, percent=writeback.writeback_percent, delay_s=writeback.writeback_delay,
        rate_sectors=rate.rate, target_sectors=writeback.target_sectors() if dev.attached else 0,
        proportional_sectors=rate.proportional, integral_sectors=rate.integral_scaled,
        in_flight=len(writeback.in_flight), written_sectors=writeback.sectors_done, keys_done=writeback.keys_done,
        keys_failed=writeback.keys_failed, detaching=dev.detaching)


def _gc(cset: CacheSet) -> GcSnapshot:
    gc = cset.gc
    progress = None
    if gc.running:
        leaves = sum(len(node.ends) for node in cset.btree.nodes() if node.level == 1) or 1
        progress = min(99, gc.nodes * 100 // leaves)
    return GcSnapshot(
        running=gc.running, runs=gc.runs, nodes=gc.nodes, last_duration_ns=gc.last_duration_ns,
        last_end_ns=gc.last_start_ns + gc.last_duration_ns if gc.runs else None, sectors_to_gc=gc.sectors_to_gc,
        progress_percent=progress, moving_enabled=cset.movinggc.enabled, moving_running=cset.movinggc.in_flight > 0,
        moved_sectors=cset.movinggc.moved_sectors)


def _journal(cset: CacheSet) -> JournalSnapshot:
    journal = cset.journal
    return JournalSnapshot(
        seq=journal.seq, last_seq=journal.last_seq, pins=len(journal.pins), pins_size=0, njournal=len(journal.buckets),
        cur_idx=journal.cur_idx, last_idx=journal.last_idx, free_buckets=journal.free_buckets(0),
        blocks_free=journal.blocks_free, is_full=journal.full, delay_ms=journal.delay_ms, writes=journal.writes)


def _btree(cset: CacheSet) -> BtreeSnapshot:
    btree = cset.btree
    nodes = btree.nodes()
    return BtreeSnapshot(
        depth=btree.root.level, nodes_cached=len(nodes), cache_bytes=btree.cached_bytes,
        limit_bytes=cset.options.node_cache_bytes, dirty_leaves=len(btree.dirty_leaves),
        keys_cached=sum(len(node.ends) for node in nodes if not node.level), node_reads=btree.reads,
        splits=cset.splitter.splits)


def _events(cset: CacheSet) -> tuple[EventSnapshot, ...]:
    shown = []
    for record in list(cset.events.ring)[-EVENTS_SHOWN:]:
        detail = " ".join(f"{key}={value}" for key, value in record.items() if key not in ("serial", "t_ns", "event"))
        shown.append(EventSnapshot(record["t_ns"], record["event"], detail, record["serial"]))
    return tuple(shown)
