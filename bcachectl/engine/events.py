# SPDX-License-Identifier: GPL-2.0-only
"""`Trace`: the engine's structured events, under the kernel's tracepoint names (include/trace/events/bcache.h).

An event is a plain dict: ``{"t_ns": ..., "event": "bcache_alloc", "bucket": 17, "reserve": "NONE"}``.  The last
`KEPT` are kept for the live view; whoever records them all (``--trace FILE``) sets ``recording`` and takes
``recorded`` away from time to time."""

from __future__ import annotations

from collections import deque
from typing import Any

from bcachectl.engine.sched import Sched

KEPT = 512
"""Events kept for the live view."""


class Trace:
    """A ring of the last events, numbered from 1 so that a reader can ask for what is new; counts by name."""

    __slots__ = ("sched", "ring", "serial", "counts", "recording", "recorded")

    def __init__(self, sched: Sched) -> None:
        self.sched = sched
        self.ring: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.serial = 0
        self.counts: dict[str, int] = {}
        self.recording = False
        self.recorded: list[dict[str, Any]] = []

    def emit(self, event: str, **fields: Any) -> None:
        """Note an event with its fields; the time is the scheduler's."""
        self.serial += 1
        self.counts[event] = self.counts.get(event, 0) + 1
        record = {"serial": self.serial, "t_ns": self.sched.now_ns, "event": event, **fields}
        self.ring.append(record)
        if self.recording:
            self.recorded.append(record)

    def since(self, serial: int) -> list[dict[str, Any]]:
        """The kept events with a higher number than ``serial``, oldest first."""
        return [record for record in self.ring if record["serial"] > serial]
