# SPDX-License-Identifier: GPL-2.0-only
"""How a command waits for work that lasts: one line on a terminal, JSON lines on request, silence otherwise.

`wait_for` looks at the set about once a second while the engine works, and says how much dirty data is left, how fast
it goes, when it will be done, and why it does not go on where that can be known (``detach`` that never ends is an old
complaint).
"""

from __future__ import annotations

import json
import sys
from collections import deque
from typing import Any

from bcachectl.control import Job, LiveSet
from bcachectl.snapshot import SetSnapshot, VolumeSnapshot
from bcachectl.units import format_sectors
from bcachectl.views.alerts import why_stalled
from bcachectl.views.panels import format_duration

LOOK_S = 1.0
RATE_LOOKS = 15
"""Over how many looks the rate is taken: long enough for the bursts of writeback, short enough to follow it."""

STALL_LOOKS = 5
"""Looks without progress that make a stall."""


class DirtyProgress:
    """How the dirty data of a volume goes down, from one look to the next."""

    def __init__(self) -> None:
        self.looks: deque[tuple[int, int]] = deque(maxlen=RATE_LOOKS)

    def add(self, t_ns: int, dirty_sectors: int) -> None:
        """Note a look."""
        self.looks.append((t_ns, dirty_sectors))

    @property
    def rate_sectors(self) -> float | None:
        """Sectors a second that were written back, None before there are two looks."""
        if len(self.looks) < 2 or self.looks[-1][0] <= self.looks[0][0]:
            return None
        (first_ns, first), (last_ns, last) = self.looks[0], self.looks[-1]
        return max(0.0, (first - last) * 1e9 / (last_ns - first_ns))

    @property
    def is_stalled(self) -> bool:
        """Nothing was written back for the last `STALL_LOOKS` looks."""
        if len(self.looks) < STALL_LOOKS:
            return False
        recent = list(self.looks)[-STALL_LOOKS:]
        return recent[-1][1] >= recent[0][1] > 0


def wait_for(live: LiveSet, job: Job, doing: str, *, volume: str = "", as_json: bool = False) -> None:
    """Return when the job has ended; raise what it raised.  ``volume`` names the one whose dirty data counts."""
    progress = DirtyProgress()
    shows = sys.stderr.isatty() and not as_json
    try:
        while not job.wait(LOOK_S):
            snapshot = live.snapshot(0)
            found = next((one for one in snapshot.volumes if one.name == volume), None)
            if found is not None:
                progress.add(snapshot.t_ns, found.dirty_sectors)
            if as_json:
                print(json.dumps(progress_record(snapshot, found, progress, doing)), flush=True)
            elif shows:
                print(f"\r\x1b[K{progress_line(snapshot, found, progress, doing)}", end="", file=sys.stderr, flush=True)
    finally:
        if shows and progress.looks:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def progress_record(snapshot: SetSnapshot, volume: VolumeSnapshot | None, progress: DirtyProgress,
                    doing: str) -> dict[str, Any]:
    """One look as the JSON line of ``--json``."""
    record: dict[str, Any] = {"kind": "progress", "doing": doing, "t_ns": snapshot.t_ns}
    if volume is not None:
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
        return doing + (f": {gc.nodes} nodes" if gc.progress_percent is None else f": {gc.progress_percent} %")
    line = f"{doing}: {format_sectors(volume.dirty_sectors)} dirty"
    rate = progress.rate_sectors
    if progress.is_stalled:
        return f"{line}, stalled: {why_stalled(snapshot, volume)}"
    if rate:
        eta_ns = int(volume.dirty_sectors / rate * 1e9)
        line += f", {format_sectors(int(rate))}/s, {format_duration(eta_ns)} left"
    return line
