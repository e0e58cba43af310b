# SPDX-License-Identifier: GPL-2.0-only
"""What a running set looks like at one moment: frozen records that the views show and that travel as JSON.

A `SetSnapshot` is filled by whoever knows the set: the engine (`bcachectl.engine.stats`), the kernel's driver through
sysfs (`bcachectl.sysfs.look`), or, for a set that does not run, an offline walk.  The views never ask where it came
from.  What a source cannot know is None, or an empty tuple; a number is never made up.  Most sizes of the kernel's are
rounded down, to three digits or fewer, as its files print them (`bcachectl.units.parse_hprint`).

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
class BucketPercents:
    """Shares of all buckets in whole percents, rounded down: all that the kernel's priority_stats says of them."""

    unused: int
    clean: int
    dirty: int
    metadata: int


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
    zero: int | None
    btree: int | None
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
    """The allocator: lists, counts, gens, priorities, and who waits for what.

    A source that cannot count buckets may know their ``percents``.
    """

    nbuckets: int
    first_bucket: int | None
    bucket_bytes: int
    counts: BucketCounts | None
    gens: GenSnapshot | None
    prio: PrioSnapshot | None
    replacement: str
    discard: bool | None
    reserves: tuple[FifoSnapshot, ...] = ()
    free_inc: FifoSnapshot | None = None
    avail_nbuckets: int | None = None
    in_use_percent: int | None = None
    prio_blocked: int | None = None
    invalidate_needs_gc: bool | None = None
    gc_mark_valid: bool | None = None
    waiting_tasks: int | None = None
    counters: AllocCounters | None = None
    percents: BucketPercents | None = None


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
    """Garbage collection and moving gc.

    The kernel tells of the last gc only when it ended, and of durations the average and the longest.
    """

    running: bool | None
    runs: int | None
    nodes: int | None
    last_duration_ns: int | None
    last_end_ns: int | None
    sectors_to_gc: int | None
    progress_percent: int | None
    moving_enabled: bool = False
    moving_running: bool | None = False
    moved_sectors: int | None = 0
    average_duration_ns: int | None = None
    max_duration_ns: int | None = None


@dataclass(frozen=True, slots=True)
class JournalSnapshot:
    """The journal's ring of buckets and its open entries.  The kernel tells of ``pins`` and ``delay_ms``."""

    seq: int | None
    last_seq: int | None
    pins: int | None
    pins_size: int | None
    njournal: int | None
    cur_idx: int | None
    last_idx: int | None
    free_buckets: int | None
    blocks_free: int | None
    is_full: bool | None
    delay_ms: int | None
    writes: int | None = 0
    full_waits: int | None = 0
    reclaimed_buckets: int | None = None


@dataclass(frozen=True, slots=True)
class BtreeSnapshot:
    """The btree and the cache of its nodes; ``nodes`` and ``used_percent`` are those that the last gc saw."""

    depth: int
    nodes_cached: int | None
    cache_bytes: int
    limit_bytes: int | None
    dirty_leaves: int | None
    keys_cached: int | None
    node_reads: int | None = 0
    node_writes: int | None = 0
    splits: int | None = 0
    nodes: int | None = None
    used_percent: int | None = None


@dataclass(frozen=True, slots=True)
class WindowSnapshot:
    """Cache statistics over one window: ``total``, ``five_minute``, ``hour`` or ``day`` (stats.c).

    ``told_percent`` is the kernel's own ratio: its decaying windows count in fractions of requests, which its other
    files cut off.
    """

    name: str
    hits: int
    misses: int
    bypass_hits: int
    bypass_misses: int
    collisions: int
    bypassed_sectors: int
    told_percent: int | None = None

    @property
    def hit_ratio_percent(self) -> int:
        """Hits of a hundred requests that were looked up in the cache; 0 if there were none."""
        if self.told_percent is not None:
            return self.told_percent
        looked_up = self.hits + self.misses
        return self.hits * 100 // looked_up if looked_up else 0


@dataclass(frozen=True, slots=True)
class RequestCounters:
    """Requests of clients since the set started."""

    reads: int = 0
    writes: int = 0
    flushes: int | None = 0
    discards: int | None = 0
    read_sectors: int = 0
    written_sectors: int = 0
    errors: int | None = 0


@dataclass(frozen=True, slots=True)
class WritebackSnapshot:
    """Writeback of one cached device and its rate controller; rates are in sectors per second."""

    running: bool
    percent: int
    delay_s: int
    rate_sectors: int | None
    target_sectors: int | None
    proportional_sectors: int | None
    integral_sectors: int | None
    in_flight: int | None
    written_sectors: int | None = 0
    keys_done: int | None = 0
    keys_failed: int | None = 0
    detaching: bool | None = False


@dataclass(frozen=True, slots=True)
class VolumeSnapshot:
    """One exported device: ``kind`` is ``cached`` or ``flash``; ``device_path`` is the kernel's, ``/dev/bcache0``.

    ``dirty_step_sectors`` says how coarse ``dirty_sectors`` is: the kernel rounds it down, 2 GiB to 100 MiB.
    ``has_dirty`` lasts until a pass of writeback found nothing more and the state is clean.  The kernel does not tell
    what of a flash-only volume is in use: None.
    """

    name: str
    uuid: str | None
    label: str
    kind: str
    slot: int | None
    size_bytes: int
    state: str
    mode: str
    dirty_sectors: int | None
    has_dirty: bool
    attached: bool
    backing_path: str | None = None
    backing_bytes: int | None = None
    backing_io_errors: int = 0
    io_disabled: bool = False
    writeback: WritebackSnapshot | None = None
    windows: tuple[WindowSnapshot, ...] = ()
    requests: RequestCounters | None = None
    device_path: str | None = None
    dirty_step_sectors: int = 1


@dataclass(frozen=True, slots=True)
class EventSnapshot:
    """One structured event: a tracepoint's name and its fields as text, ``key=value`` by ``key=value``."""

    t_ns: int
    name: str
    detail: str
    serial: int = 0


@dataclass(frozen=True, slots=True)
class AbsentSnapshot:
    """A backing device that the set knows and that is not here, and the dirty data that the cache keeps for it."""

    slot: int
    uuid: str
    label: str
    dirty_sectors: int


@dataclass(frozen=True, slots=True)
class SetSnapshot:
    """A whole cache set.  ``source`` says who knows it: ``engine``, ``kernel`` or ``offline``.

    ``damages`` counts what an offline walk could not read or the kernel would refuse.  The keys that writeback has done
    are counted by volume in an engine, and here by the kernel.
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
    writeback_keys_done: int | None = None
    writeback_keys_failed: int | None = None
    absent: tuple[AbsentSnapshot, ...] = ()
    """Backing devices with dirty data that are not here; an engine knows them, the kernel's sysfs does not tell."""

    @property
    def dirty_sectors(self) -> int:
        """What exists only in the cache, as far as it is known."""
        return (sum(volume.dirty_sectors or 0 for volume in self.volumes)
                + sum(device.dirty_sectors for device in self.absent))


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
