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
    """Rates per second over the time since the snapshot before; a ratio is None where nothing was looked up.

    What the source of the snapshots does not count is None as well.
    """

    t_ns: int
    reads: float
    writes: float
    read_bytes: float
    written_bytes: float
    hit_ratio_percent: float | None
    bypassed_bytes: float
    dirty_bytes: int
    writeback_bytes: float | None
    allocations: float | None
    invalidations: float | None
    alloc_fails: float | None
    prio_writes: float | None
    gc_running: bool | None


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
        steps = {name: after[name] - before[name] for name in after if name in before}
        if min(steps.values()) < 0:
            return

        def rate(name: str) -> float | None:
            return steps[name] / seconds if name in steps else None

        looked_up = steps["hits"] + steps["misses"]
        self.samples.append(Sample(
            t_ns=snapshot.t_ns,
            reads=steps["reads"] / seconds,
            writes=steps["writes"] / seconds,
            read_bytes=steps["read_sectors"] * 512 / seconds,
            written_bytes=steps["written_sectors"] * 512 / seconds,
            hit_ratio_percent=steps["hits"] * 100 / looked_up if looked_up else None,
            bypassed_bytes=steps["bypassed_sectors"] * 512 / seconds,
            dirty_bytes=512 * snapshot.dirty_sectors,
            writeback_bytes=rate("writeback_bytes"),
            allocations=rate("allocations"),
            invalidations=rate("invalidations"),
            alloc_fails=rate("alloc_fails"),
            prio_writes=rate("prio_writes"),
            gc_running=(steps["gc_runs"] > 0 or bool(snapshot.gc is not None and snapshot.gc.running)
                        if "gc_runs" in steps else None),
        ))

    @property
    def newest(self) -> Sample | None:
        """The rates of the last interval, None before there were two snapshots."""
        return self.samples[-1] if self.samples else None


def _totals(snapshot: SetSnapshot) -> dict[str, int]:
    # What the source does not count is left out.
    totals = dict.fromkeys(("reads", "writes", "read_sectors", "written_sectors", "hits", "misses", "bypassed_sectors"),
                           0)
    writeback = []
    for volume in snapshot.volumes:
        if volume.requests is not None:
            totals["reads"] += volume.requests.reads
            totals["writes"] += volume.requests.writes
            totals["read_sectors"] += volume.requests.read_sectors
            totals["written_sectors"] += volume.requests.written_sectors
        if volume.writeback is not None:
            writeback.append(volume.writeback.written_sectors)
        hits, misses, bypassed = _lookups(volume)
        totals["hits"] += hits
        totals["misses"] += misses
        totals["bypassed_sectors"] += bypassed
    if None not in writeback:
        totals["writeback_bytes"] = 512 * sum(sectors or 0 for sectors in writeback)
    counters = snapshot.allocator.counters
    if counters is not None or snapshot.source != "kernel":
        for name in ("allocations", "invalidations", "alloc_fails", "prio_writes"):
            totals[name] = getattr(counters, name) if counters is not None else 0
    runs = snapshot.gc.runs if snapshot.gc is not None else 0
    if runs is not None:
        totals["gc_runs"] = runs
    return totals


def _lookups(volume: VolumeSnapshot) -> tuple[int, int, int]:
    for window in volume.windows:
        if window.name == "total":
            return window.hits, window.misses, window.bypassed_sectors
    return 0, 0, 0
