# SPDX-License-Identifier: GPL-2.0-only
"""A `SetSnapshot` of a set that the kernel's driver runs, filled as far as its files tell.

`look` reads a set, `volumes_of` its volumes.  What the kernel keeps to itself (free lists, gens, the map, the journal's
ring, requests in flight) is None.  Two files cost more than a look may: ``internal/bset_tree_stats`` walks the whole
btree and is never read; ``priority_stats`` sorts all buckets while the allocator waits, and is read by `Priorities`,
again only after a hundred times as long as it took.
"""

from __future__ import annotations

import os
import re
import time
from typing import Any

from bcachectl.snapshot import (
    AllocatorSnapshot,
    BtreeSnapshot,
    BucketPercents,
    GcSnapshot,
    JournalSnapshot,
    PrioSnapshot,
    RequestCounters,
    SetSnapshot,
    VolumeSnapshot,
    WindowSnapshot,
    WritebackSnapshot,
)
from bcachectl.sysfs.tree import Node, Sysfs, attribute, chosen, number, sectors, size
from bcachectl.units import parse_hprint

WINDOWS = ("total", "five_minute", "hour", "day")

_REST = 100
"""How many times as long as a read of priority_stats took there is none."""

_AVERAGE_MAX = 1 << 16
"""Above this the average of priority_stats is one of no buckets (unsigned arithmetic on nothing)."""


class Priorities:
    """The newest ``priority_stats`` of a set, read with restraint."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._text: str | None = None
        self._next_s = 0.0

    def text(self) -> str | None:
        """What the file said at the last look."""
        started = time.monotonic()
        if started >= self._next_s:
            self._text = attribute(self.directory, "cache0/priority_stats")
            ended = time.monotonic()
            self._next_s = ended + _REST * (ended - started)
        return self._text


def parse_priority_stats(text: str | None) -> tuple[BucketPercents | None, PrioSnapshot | None]:
    """Shares and priorities of ``priority_stats``; None for what is not there (sysfs.c, SHOW(__bch_cache))."""
    values = dict(re.findall(r"(?m)^([A-Za-z ]+):\s*(.*)$", text or ""))
    try:
        percents = BucketPercents(**{name.lower(): int(values[name].rstrip("%"))
                                     for name in ("Unused", "Clean", "Dirty", "Metadata")})
        average = int(values["Average"])
        quantiles = tuple(int(word) for word in values["Quantiles"].strip("[]").split())
        step = int(values["Sectors per Q"])
    except (KeyError, ValueError):
        return None, None
    if average > _AVERAGE_MAX:
        return percents, None
    return percents, PrioSnapshot(quantiles=quantiles, average=average, sectors_per_quantile=step, zero=None,
                                  btree=None)


def look(sysfs: Sysfs, uuid: str, priorities: Priorities | None) -> SetSnapshot | None:
    """The set now; None if the kernel does not run it."""
    directory = sysfs.set_directory(uuid)
    nbuckets = number(directory, "cache0/nbuckets")
    bucket_bytes = size(directory, "bucket_size")
    if nbuckets is None or bucket_bytes is None:
        return None
    disk = sysfs.cache_disk(uuid)
    now_ns = time.monotonic_ns()
    io_disabled = number(directory, "internal/io_disable")
    return SetSnapshot(
        t_ns=now_ns, source="kernel", version=os.uname().release, uuid=uuid,
        cache_path=sysfs.device_path(disk) if disk else "", cache_bytes=nbuckets * bucket_bytes,
        block_bytes=size(directory, "block_size") or 512, bucket_bytes=bucket_bytes, pid=None, uptime_ns=None,
        failed="the kernel has disabled its I/O (io_disable); its log tells why" if io_disabled else None,
        allocator=_allocator(directory, nbuckets, bucket_bytes, priorities), map=None, gc=_gc(directory, now_ns),
        journal=_journal(directory), btree=_btree(directory), volumes=volumes_of(sysfs, uuid),
        cache_io_errors=number(directory, "cache0/io_errors") or 0,
        cache_read_races=number(directory, "internal/cache_read_races") or 0,
        congested=sectors(directory, "congested"), written_sectors=sectors(directory, "cache0/written"),
        btree_written_sectors=sectors(directory, "cache0/btree_written"),
        metadata_written_sectors=sectors(directory, "cache0/metadata_written"),
        writeback_keys_done=number(directory, "internal/writeback_keys_done"),
        writeback_keys_failed=number(directory, "internal/writeback_keys_failed"))


def _allocator(directory: str, nbuckets: int, bucket_bytes: int, priorities: Priorities | None) -> AllocatorSnapshot:
    percents, prio = parse_priority_stats(priorities.text()) if priorities is not None else (None, None)
    available = number(directory, "cache_available_percent")
    discard = number(directory, "cache0/discard")
    return AllocatorSnapshot(
        nbuckets=nbuckets, first_bucket=None, bucket_bytes=bucket_bytes, counts=None, percents=percents, gens=None,
        prio=prio, replacement=chosen(attribute(directory, "cache0/cache_replacement_policy")) or "-",
        discard=None if discard is None else bool(discard),
        in_use_percent=None if available is None else 100 - available)


def _gc(directory: str, now_ns: int) -> GcSnapshot:
    def duration(name: str) -> int | None:
        found = number(directory, f"internal/btree_gc_{name}_duration_ms")
        return None if found is None else found * 1_000_000

    ago_s = number(directory, "internal/btree_gc_last_sec")
    has_run = ago_s is not None and ago_s >= 0
    return GcSnapshot(
        running=None, runs=None, nodes=number(directory, "internal/btree_nodes") if has_run else None,
        last_duration_ns=None, last_end_ns=now_ns - ago_s * 1_000_000_000 if ago_s is not None and has_run else None,
        sectors_to_gc=None, progress_percent=None,
        moving_enabled=bool(number(directory, "internal/copy_gc_enabled")), moving_running=None, moved_sectors=None,
        average_duration_ns=duration("average") if has_run else None,
        max_duration_ns=duration("max") if has_run else None)


def _journal(directory: str) -> JournalSnapshot:
    return JournalSnapshot(
        seq=None, last_seq=None, pins=number(directory, "internal/active_journal_entries"), pins_size=None,
        njournal=None, cur_idx=None, last_idx=None, free_buckets=None, blocks_free=None, is_full=None,
        delay_ms=number(directory, "journal_delay_ms"), writes=None, full_waits=None,
        reclaimed_buckets=number(directory, "internal/reclaimed_journal_buckets"))


def _btree(directory: str) -> BtreeSnapshot | None:
    depth = number(directory, "tree_depth")
    if depth is None:
        return None
    return BtreeSnapshot(depth=depth, nodes_cached=None, cache_bytes=size(directory, "btree_cache_size") or 0,
                         limit_bytes=None, dirty_leaves=None, keys_cached=None, node_reads=None, node_writes=None,
                         splits=None, nodes=number(directory, "internal/btree_nodes"),
                         used_percent=number(directory, "internal/btree_used_percent"))


def volumes_of(sysfs: Sysfs, uuid: str) -> tuple[VolumeSnapshot, ...]:
    """The volumes of a set that runs."""
    return tuple(volume(sysfs, node) for node in sysfs.nodes() if node.set_uuid == uuid)


def volume(sysfs: Sysfs, node: Node) -> VolumeSnapshot:
    """What one device's files say."""
    directory = node.directory
    disk = sysfs.path(f"class/block/{node.volume}") if node.volume else ""
    common: dict[str, Any] = {"name": node.name, "label": attribute(directory, "label") or "", "slot": node.slot,
              "size_bytes": (number(disk, "size") or 0) << 9, "attached": node.set_uuid is not None,
              "requests": _requests(disk) if disk else None,
              "device_path": sysfs.device_path(node.volume) if node.volume else None}
    if node.disk is None:
        return VolumeSnapshot(**common, uuid=None, kind="flash", state="-", mode="-", dirty_sectors=None,
                              has_dirty=True)
    state = attribute(directory, "state") or "-"
    dirty_bytes, step_bytes = 0, 0
    text = attribute(directory, "dirty_data")
    if text:
        dirty_bytes, step_bytes = parse_hprint(text)
    backing = sysfs.path(f"class/block/{node.disk}")
    backing_sectors = number(backing, "size")
    return VolumeSnapshot(
        **common, uuid=attribute(directory, "backing_dev_uuid"), kind="cached", state=state,
        mode=chosen(attribute(directory, "cache_mode")) or "-", dirty_sectors=dirty_bytes >> 9 if text else None,
        dirty_step_sectors=max(1, -(-step_bytes // 512)), has_dirty=state == "dirty",
        backing_path=sysfs.device_path(node.disk),
        backing_bytes=None if backing_sectors is None else backing_sectors << 9,
        backing_io_errors=number(directory, "io_errors") or 0, io_disabled=bool(number(directory, "io_disable")),
        writeback=_writeback(directory), windows=_windows(directory))


def _writeback(directory: str) -> WritebackSnapshot | None:
    running = number(directory, "writeback_running")
    percent, delay_s = number(directory, "writeback_percent"), number(directory, "writeback_delay")
    if running is None or percent is None or delay_s is None:
        return None
    debug = dict(re.findall(r"(?m)^([a-z ]+):\s*(\S+)$", attribute(directory, "writeback_rate_debug") or ""))

    def term(name: str) -> int | None:
        return parse_hprint(debug[name])[0] // 512 if name in debug else None

    return WritebackSnapshot(
        running=bool(running), percent=percent, delay_s=delay_s, rate_sectors=sectors(directory, "writeback_rate"),
        target_sectors=term("target"), proportional_sectors=term("proportional"), integral_sectors=term("integral"),
        in_flight=None, written_sectors=None, keys_done=None, keys_failed=None, detaching=None)


def _windows(directory: str) -> tuple[WindowSnapshot, ...]:
    found = []
    for name in WINDOWS:
        counters = [number(directory, f"stats_{name}/{counter}") for counter in (
            "cache_hits", "cache_misses", "cache_bypass_hits", "cache_bypass_misses", "cache_miss_collisions")]
        known = [counter for counter in counters if counter is not None]
        if len(known) == len(counters):
            bypassed = sectors(directory, f"stats_{name}/bypassed") or 0
            ratio = number(directory, f"stats_{name}/cache_hit_ratio")
            found.append(WindowSnapshot(name, known[0], known[1], known[2], known[3], known[4], bypassed, ratio))
    return tuple(found)


def _requests(disk: str) -> RequestCounters | None:
    # Documentation/block/stat.rst.  A driver that works on bios counts no flushes there.
    fields = (attribute(disk, "stat") or "").split()
    if len(fields) < 8:
        return None
    values = [int(word) for word in fields]
    return RequestCounters(reads=values[0], read_sectors=values[2], writes=values[4], written_sectors=values[6],
                           flushes=None, discards=values[11] if len(values) > 11 else None, errors=None)
