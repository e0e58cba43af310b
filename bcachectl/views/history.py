# SPDX-License-Identifier: GPL-2.0-only
"""`History`: what two snapshots say that one does not, the rates, kept for the sparklines.

A snapshot's counters only grow, so a `Sample` is a difference of two divided by the time between them.  Where the
counters go back (the set was restarted, its statistics were cleared) there is no sample, rather than a wrong one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from bcachectl.snapshot import SetSnapshot, VolumeSnapshot

MAX_SAMPLES = 600


@dataclass(frozen=True, slots=True)
class Sample:
    """Rates per second over the time since the snapshot before; a ratio is None where nothing was looked up."""

    t_ns: int
    reads: float
    writes: float
    read_bytes: float
    written_bytes: float
    hit_ratio_percent: float | None
    bypassed_bytes: float
    dirty_bytes: int
    writeback_bytes: float
    allocations: float
    invalidations: float
    alloc_fails: float
    prio_writes: float
    gc_running: bool


class History:
    """The last `MAX_SAMPLES` samples, oldest first, and the snapshot to compare the next one with."""

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._last: SetSnapshot | None = None

    def add(self, snapshot: SetSnapshot) -> None:
        """Take a snapshot into account."""
        last, self._last = self._last, snapshot
        if last is None or last.uuid != snapshot.uuid or snapshot.t_ns <= last.t_ns:
            return
        before, after = _totals(last), _totals(snapshot)
        seconds = (snapshot.t_ns - last.t_ns) / 1e9
        steps = {name: after[name] - before[name] for name in after}
        if min(steps.values()) < 0:
            return
        looked_up = steps["hits"] + steps["misses"]
        self.samples.append(Sample(
            t_ns=snapshot.t_ns,
            reads=steps["reads"] / seconds,
            writes=steps["writes"] / seconds,
            read_bytes=steps["read_sectors"] * 512 / seconds,
            written_bytes=steps["written_sectors"] * 512 / seconds,
            hit_ratio_percent=steps["hits"] * 100 / looked_up if looked_up else None,
            bypassed_bytes=steps["bypassed_sectors"] * 512 / seconds,
            dirty_bytes=512 * sum(volume.dirty_sectors for volume in snapshot.volumes),
            writeback_bytes=steps["writeback_sectors"] * 512 / seconds,
            allocations=steps["allocations"] / seconds,
            invalidations=steps["invalidations"] / seconds,
            alloc_fails=steps["alloc_fails"] / seconds,
            prio_writes=steps["prio_writes"] / seconds,
            gc_running=steps["gc_runs"] > 0 or (snapshot.gc is not None and snapshot.gc.running),
        ))

    @property
    def newest(self) -> Sample | None:
        """The rates of the last interval, None before there were two snapshots."""
        return self.samples[-1] if self.samples else None


def _totals(snapshot: SetSnapshot) -> dict[str, int]:
    totals = dict.fromkeys(("reads", "writes", "read_sectors", "written_sectors", "hits", "misses", "bypassed_sectors",
                            "writeback_sectors"), 0)
    for volume in snapshot.volumes:
        if volume.requests is not None:
            totals["reads"] += volume.requests.reads
            totals["writes"] += volume.requests.writes
            totals["read_sectors"] += volume.requests.read_sectors
            totals["written_sectors"] += volume.requests.written_sectors
        if volume.writeback is not None:
            totals["writeback_sectors"] += volume.writeback.written_sectors
        hits, misses, bypassed = _lookups(volume)
        totals["hits"] += hits
        totals["misses"] += misses
        totals["bypassed_sectors"] += bypassed
    counters = snapshot.allocator.counters
    for name in ("allocations", "invalidations", "alloc_fails", "prio_writes"):
        totals[name] = getattr(counters, name) if counters is not None else 0
    totals["gc_runs"] = snapshot.gc.runs if snapshot.gc is not None else 0
    return totals


def _lookups(volume: VolumeSnapshot) -> tuple[int, int, int]:
    for window in volume.windows:
        if window.name == "total":
            return window.hits, window.misses, window.bypassed_sectors
    return 0, 0, 0
