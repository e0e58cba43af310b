# SPDX-License-Identifier: GPL-2.0-only
"""How a command waits for work that lasts: one line on a terminal, JSON lines on request, silence otherwise.

`wait_for` looks at the set about once a second while the engine, or the kernel, works.  It says how much dirty data is
left, how fast it goes, when it will be done, and why it does not go on where that can be known (``detach`` that never
ends is an old complaint).  The kernel tells of dirty data in steps, 100 MiB of 2 GiB, so a rate needs several of them,
and whether anything goes on is told by the keys that writeback has done.

A signal that asks the program to end counts as an interrupt meanwhile, so that a job can put back what it changed.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bcachectl.control import KERNEL, Job, LiveSet
from bcachectl.errors import WrongState
from bcachectl.snapshot import SetSnapshot, VolumeSnapshot
from bcachectl.units import counted, format_sectors
from bcachectl.views.alerts import why_stalled
from bcachectl.views.panels import format_duration

LOOK_S = 1.0
RATE_LOOKS = 15
"""Over how many looks the rate is taken: long enough for the bursts of writeback, short enough to follow it."""

STALL_LOOKS = 5
"""Looks without progress that make a stall."""

RATE_STEPS = 4
"""Steps of a rounded amount that make a rate: the error of one step is then a quarter of it at most."""

LOOKS_KEPT = 600
ALL_VOLUMES = "*"
"""For ``volume`` of `wait_for`: the dirty data of all counts."""


class DirtyProgress:
    """How the dirty data of a volume goes down, from one look to the next."""

    def __init__(self) -> None:
        self.looks: deque[tuple[int, int, int]] = deque(maxlen=LOOKS_KEPT)
        self._step_sectors = 1

    def add(self, t_ns: int, dirty_sectors: int, *, step_sectors: int = 1, keys_done: int | None = None) -> None:
        """Note a look: an amount that is exact to ``step_sectors``, and what else shows that something goes on."""
        self.looks.append((t_ns, dirty_sectors, keys_done or 0))
        self._step_sectors = step_sectors

    @property
    def rate_sectors(self) -> float | None:
        """Sectors a second that were written back, None before that can be told."""
        if len(self.looks) < 2 or self.looks[-1][0] <= self.looks[0][0]:
            return None
        last_ns, last, _ = self.looks[-1]
        first_ns, first, _ = self.looks[max(0, len(self.looks) - RATE_LOOKS)]
        if self._step_sectors > 1:
            # The newest look since which there were enough steps.
            enough = last + RATE_STEPS * self._step_sectors
            since = next((look for look in reversed(self.looks) if look[1] >= enough), None)
            if since is None:
                return None
            first_ns, first, _ = since
        return max(0.0, (first - last) * 1e9 / (last_ns - first_ns))

    @property
    def is_stalled(self) -> bool:
        """Nothing was written back for the last `STALL_LOOKS` looks."""
        if len(self.looks) < STALL_LOOKS:
            return False
        (_, first, first_keys), (_, last, last_keys) = self.looks[-STALL_LOOKS], self.looks[-1]
        return last >= first > 0 and last_keys == first_keys


def wait_for(live: LiveSet, job: Job, doing: str, *, volume: str = "", as_json: bool = False) -> None:
    """Return when the job has ended; raise what it raised.  ``volume`` names the one whose dirty data counts."""
    progress = DirtyProgress()
    shows = sys.stderr.isatty() and not as_json
    with _ending_interrupts():
        try:
            while not job.wait(LOOK_S):
                snapshot = _look(live)
                if snapshot is None:
                    continue
                found = _counted(snapshot, volume)
                if found is not None and found.dirty_sectors is not None:
                    progress.add(snapshot.t_ns, found.dirty_sectors, step_sectors=found.dirty_step_sectors,
                                 keys_done=snapshot.writeback_keys_done)
                if as_json:
                    print(json.dumps(progress_record(snapshot, found, progress, doing)), flush=True)
                elif shows:
                    print(f"\r\x1b[K{progress_line(snapshot, found, progress, doing)}", end="", file=sys.stderr,
                          flush=True)
        finally:
            job.close()
            if shows and progress.looks:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def _ending_interrupts() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _look(live: LiveSet) -> SetSnapshot | None:
    # A set of the kernel's that ends is gone a moment before its job notices; what an engine answers is its matter.
    try:
        return live.snapshot(0)
    except WrongState:
        if live.source == KERNEL:
            return None
        raise


def _counted(snapshot: SetSnapshot, volume: str) -> VolumeSnapshot | None:
    # Of all volumes the first that has something dirty stands for the set, with the sum.
    if volume != ALL_VOLUMES:
        return next((one for one in snapshot.volumes if one.name == volume), None)
    cached = [one for one in snapshot.volumes if one.kind == "cached"]
    if not cached:
        return None
    first = next((one for one in cached if one.has_dirty), cached[0])
    return dataclasses.replace(first, dirty_sectors=sum(one.dirty_sectors or 0 for one in cached),
                               dirty_step_sectors=max(one.dirty_step_sectors for one in cached))


def progress_record(snapshot: SetSnapshot, volume: VolumeSnapshot | None, progress: DirtyProgress,
                    doing: str) -> dict[str, Any]:
    """One look as the JSON line of ``--json``."""
    record: dict[str, Any] = {"kind": "progress", "doing": doing, "t_ns": snapshot.t_ns}
    if volume is not None and volume.dirty_sectors is not None:
        rate = progress.rate_sectors
        record |= {"volume": volume.name, "dirty_bytes": volume.dirty_sectors * 512,
                   "rate_bytes": None if rate is None else int(rate * 512),
                   "eta_s": int(volume.dirty_sectors / rate) if rate else None,
                   "stall": why_stalled(snapshot, volume) if progress.is_stalled else None}
    elif snapshot.gc is not None:
        record |= {"percent": snapshot.gc.progress_percent, "nodes": snapshot.gc.nodes}
    return record


def progress_line(snapshot: SetSnapshot, volume: VolumeSnapshot | None, progress: DirtyProgress, doing: str) -> str:
    """One look as a line for people."""
    if volume is None:
        gc = snapshot.gc
        if gc is None or not gc.running:
            return doing
        return f"{doing}: {counted(gc.nodes, 'node') if gc.progress_percent is None else f'{gc.progress_percent} %'}"
    line = f"{doing}: {format_sectors(volume.dirty_sectors)} dirty"
    rate = progress.rate_sectors
    if progress.is_stalled:
        return f"{line}, stalled: {why_stalled(snapshot, volume)}"
    if rate and volume.dirty_sectors is not None:
        eta_ns = int(volume.dirty_sectors / rate * 1e9)
        line += f", {format_sectors(int(rate))}/s, {format_duration(eta_ns)} left"
    return line
