# SPDX-License-Identifier: GPL-2.0-only
"""What a running set looks like at one moment: frozen records that the views show and that travel as JSON.

A `SetSnapshot` is filled by whoever knows the set: the engine (`bcachectl.engine.stats`), the kernel's sysfs, or, for a
set that does not run, an offline walk.  The views never ask where it came from.  What a source cannot know is None, or
an empty tuple; a number is never made up.

Units are in the names; sizes in JSON are whole numbers of bytes or sectors.  Counters only grow while a set runs, so
two snapshots give a rate.  `to_json` and `from_json` are each other's inverse; unknown names in JSON are ignored, so
that an older program reads a newer engine.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

SCHEMA = 1
"""Version of the JSON form; it changes when a field changes its meaning or disappears."""

GEN_GUARD = 96
"""A bucket whose gen is this far past its last_gc is not invalidated before a gc (bcache.h, BUCKET_GC_GEN_MAX)."""

QUANTILES = 31
"""How many priorities the kernel's priority_stats gives."""

MAP_STATES = "ufocdmr"
"""A bucket map's letters: unused, free (on a list), open, clean, dirty, metadata, reserved (journal, superblock)."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FifoSnapshot:
    """Fill of a list of buckets: a reserve (``BTREE``, ``PRIO``, ``MOVINGGC``, ``NONE``) or ``free_inc``."""

    name: str
    used: int
    size: int


@dataclass(frozen=True, slots=True)
class BucketCounts:
    """Every bucket of the cache device is counted once."""

    unused: int
    free: int
    open: int
    clean: int
    dirty: int
    metadata: int
    reserved: int


@dataclass(frozen=True, slots=True)
class GenSnapshot:
    """How far gens have moved since the last gc.

    ``histogram[n]`` counts buckets with gen - last_gc = n; its last element, n = `GEN_GUARD`, also counts all beyond.
    """

    histogram: tuple[int, ...]
    max: int
    need_gc: int

    @property
    def headroom(self) -> int:
        """How many more times the worst bucket may be reused before it needs a gc."""
        return max(0, GEN_GUARD - self.max)


@dataclass(frozen=True, slots=True)
class PrioSnapshot:
    """Priorities as priority_stats tells them: distances from INITIAL_PRIO, 0 is just used and 32768 longest ago.

    ``quantiles`` are in the kernel's order, most valuable bucket first; btree buckets and those with priority 0 are
    apart.
    """

    quantiles: tuple[int, ...]
    average: int
    sectors_per_quantile: int
    zero: int
    btree: int
    min_prio: int | None = None
    rescale_sectors: int | None = None


@dataclass(frozen=True, slots=True)
class AllocCounters:
    """What the allocator has done since the set started."""

    allocations: int = 0
    alloc_fails: int = 0
    invalidations: int = 0
    prio_writes: int = 0
    discards: int = 0


@dataclass(frozen=True, slots=True)
class AllocatorSnapshot:
    """The allocator: lists, counts, gens, priorities, and who waits for what."""

    nbuckets: int
    first_bucket: int
    bucket_bytes: int
    counts: BucketCounts
    gens: GenSnapshot | None
    prio: PrioSnapshot | None
    replacement: str
    discard: bool
    reserves: tuple[FifoSnapshot, ...] = ()
    free_inc: FifoSnapshot | None = None
    avail_nbuckets: int | None = None
    in_use_percent: int | None = None
    prio_blocked: int | None = None
    invalidate_needs_gc: bool | None = None
    gc_mark_valid: bool | None = None
    waiting_tasks: int | None = None
    counters: AllocCounters | None = None


@dataclass(frozen=True, slots=True)
class MapSnapshot:
    """All buckets in order, as cells of nearly equal size.

    ``states[i]`` is the state (a letter of `MAP_STATES`) that stands for cell i: dirty wins when it holds at least a
    quarter, otherwise the most frequent one.  ``fills[i]`` is the percentage of the cell's sectors that are in use.
    """

    states: str
    fills: tuple[int, ...]
    buckets_per_cell: float


@dataclass(frozen=True, slots=True)
class GcSnapshot:
    """Garbage collection and moving gc."""

    running: bool
    runs: int
    nodes: int
    last_duration_ns: int
    last_end_ns: int | None
    sectors_to_gc: int
    progress_percent: int | None
    moving_enabled: bool = False
    moving_running: bool = False
    moved_sectors: int = 0


@dataclass(frozen=True, slots=True)
class JournalSnapshot:
    """The journal's ring of buckets and its open entries."""

    seq: int
    last_seq: int
    pins: int
    pins_size: int
    njournal: int
    cur_idx: int
    last_idx: int
    free_buckets: int
    blocks_free: int
    is_full: bool
    delay_ms: int
    writes: int = 0
    full_waits: int = 0


@dataclass(frozen=True, slots=True)
class BtreeSnapshot:
    """The btree and the cache of its nodes."""

    depth: int
    nodes_cached: int
    cache_bytes: int
    limit_bytes: int
    dirty_leaves: int
    keys_cached: int
    node_reads: int = 0
    node_writes: int = 0
    splits: int = 0


@dataclass(frozen=True, slots=True)
class WindowSnapshot:
    """Cache statistics over one window: ``total``, ``five_minute``, ``hour`` or ``day`` (stats.c)."""

    name: str
    hits: int
    misses: int
    bypass_hits: int
    bypass_misses: int
    collisions: int
    bypassed_sectors: int

    @property
    def hit_ratio_percent(self) -> int:
        """Hits of a hundred requests that were looked up in the cache; 0 if there were none."""
        looked_up = self.hits + self.misses
        return self.hits * 100 // looked_up if looked_up else 0


@dataclass(frozen=True, slots=True)
class RequestCounters:
    """Requests of clients since the set started."""

    reads: int = 0
    writes: int = 0
    flushes: int = 0
    discards: int = 0
    read_sectors: int = 0
    written_sectors: int = 0
    errors: int = 0


@dataclass(frozen=True, slots=True)
class WritebackSnapshot:
    """Writeback of one cached device and its rate controller; rates are in sectors per second."""

    running: bool
    percent: int
    delay_s: int
    rate_sectors: int
    target_sectors: int
    proportional_sectors: int
    integral_sectors: int
    in_flight: int
    written_sectors: int = 0
    keys_done: int = 0
    keys_failed: int = 0
    detaching: bool = False


@dataclass(frozen=True, slots=True)
class VolumeSnapshot:
    """One exported device: ``kind`` is ``cached`` or ``flash``."""

    name: str
    uuid: str
    label: str
    kind: str
    slot: int | None
    size_bytes: int
    state: str
    mode: str
    dirty_sectors: int
    has_dirty: bool
    attached: bool
    backing_path: str | None = None
    backing_bytes: int | None = None
    backing_io_errors: int = 0
    io_disabled: bool = False
    writeback: WritebackSnapshot | None = None
    windows: tuple[WindowSnapshot, ...] = ()
    requests: RequestCounters | None = None


@dataclass(frozen=True, slots=True)
class EventSnapshot:
    """One structured event: a tracepoint's name and its fields as text, ``key=value`` by ``key=value``."""

    t_ns: int
    name: str
    detail: str
    serial: int = 0


@dataclass(frozen=True, slots=True)
class SetSnapshot:
    """A whole cache set.  ``source`` says who knows it: ``engine``, ``kernel`` or ``offline``.

    ``damages`` counts what an offline walk could not read or the kernel would refuse.
    """

    t_ns: int
    source: str
    version: str
    uuid: str
    cache_path: str
    cache_bytes: int
    block_bytes: int
    bucket_bytes: int
    pid: int | None
    uptime_ns: int | None
    failed: str | None
    allocator: AllocatorSnapshot
    map: MapSnapshot | None
    gc: GcSnapshot | None
    journal: JournalSnapshot | None
    btree: BtreeSnapshot | None
    volumes: tuple[VolumeSnapshot, ...]
    events: tuple[EventSnapshot, ...] = ()
    cache_io_errors: int = 0
    cache_read_races: int = 0
    congested: int | None = None
    written_sectors: int | None = None
    btree_written_sectors: int | None = None
    metadata_written_sectors: int | None = None
    read_only: bool = False
    damages: int = 0


def to_json(record: Any) -> Any:
    """A record as what `json.dumps` takes."""
    if dataclasses.is_dataclass(record):
        return {name: to_json(getattr(record, name)) for name in _field_types(typing.cast(Any, type(record)))}
    if isinstance(record, tuple):
        return [to_json(item) for item in record] if record and not isinstance(record[0], int) else list(record)
    return record


def from_json(cls: type[T], value: Any) -> T:
    """The record of class ``cls`` that `to_json` wrote; ValueError if a field without default is missing."""
    try:
        return typing.cast(T, _decode(cls, value))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a {cls.__name__}: {error}") from None


@functools.cache
def _field_types(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _decode(wanted: Any, value: Any) -> Any:
    # The types in use are plain values, ``X | None``, ``tuple[X, ...]`` and records; nothing else is needed.
    if isinstance(wanted, types.UnionType):
        return None if value is None else _decode(typing.get_args(wanted)[0], value)
    if typing.get_origin(wanted) is tuple:
        item = typing.get_args(wanted)[0]
        return tuple(value) if item in (int, str) else tuple(_decode(item, element) for element in value)
    if dataclasses.is_dataclass(wanted):
        record: Any = wanted
        known = _field_types(record)
        return record(**{name: _decode(known[name], element) for name, element in value.items() if name in known})
    return value
