# SPDX-License-Identifier: GPL-2.0-only
"""Hours of reads and writes with gc and write-back at work, in a time that passes only as processor time is used.

An engine in this process serves 4 KiB requests on a set of a million extents.  They arrive at random moments of one
busy second out of 25; a gc begins with every other of these, besides those that the engine wants itself.  The clock
jumps to the next arrival or timer when there is nothing to do, and otherwise moves on by the processor time that each
turn of the scheduler took.  The devices take no time, and data is not stored.  So a latency is what a request waits for
the one thread and what that does for it: stalls by gc, write-back, invalidation, splits or Python itself show, noise of
the machine mostly does not.

Then comes a burst of writes, and the engine is dropped, as in a crash, and started again: what that takes, with a full
journal to replay and leaves of many sets.
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bcachectl.engine.front import NOT_NOW, REQ_READ, REQ_SYNC, REQ_WRITE, Request
from bcachectl.engine.io.sync import SyncBackend
from bcachectl.engine.sched import DISCARD, FLUSH, NS_PER_S, READ, WRITE, Io
from bench.bulk import Opened, TimedSched, make_set
from bench.fsck import KEY_SECTORS
from bench.process import machine, row

STEP = 2 * KEY_SECTORS
PERIOD_S = 25
"""One second of these is busy."""
BURST = 100_000
"""Writes before the crash, so that the journal holds what it can."""
TARGET = 3.0
"""p99 of reads while gc runs, at most so many times p99 without."""
DROPPED = ("data", "writeback", "moving gc")


class MetadataOnly(SyncBackend):
    """Performs Ios of metadata at once, and only pretends to do the others."""

    def submit(self, ios: list[Io]) -> None:
        """Start the Ios; they are done when this returns."""
        kept: list[Io] = []
        for io in ios:
            if io.op in (FLUSH, DISCARD) or (io.op in (READ, WRITE) and io.what in DROPPED):
                self.done.append(io)
            else:
                io.flags = 0            # nothing of this has to survive
                kept.append(io)
        super().submit(kept)


class Hours:
    """Traffic on one engine, and how long each request took."""

    def __init__(self, directory: Path, keys: int, *, per_s: float, write_share: float) -> None:
        self.keys = keys
        self.mean_ns = 1e9 / (per_s * PERIOD_S)
        self.write_share = write_share
        self.sched = TimedSched()
        self.opened = Opened(directory, sched=self.sched)
        self.opened.backend.close()
        self.opened.backend = MetadataOnly(self.opened.media)
        self.device = self.opened.open()
        self.cset = self.opened.cset
        self.dice = random.Random(7)
        self.began_ns = self.now_ns = self.sched.now_ns
        self.buffer = bytearray(KEY_SECTORS << 9)
        self.latency: dict[tuple[str, bool], list[float]] = {
            (kind, collecting): [] for kind in ("read", "write") for collecting in (False, True)}

    def run(self, simulated_s: float) -> None:
        """Serve for so many simulated seconds."""
        for number in range(int(simulated_s / PERIOD_S)):
            if number % 2:
                self.cset.gc.force()
            self._busy_second()
            self._quiet_until(self.began_ns + (number + 1) * PERIOD_S * NS_PER_S)

    def burst(self, requests: int) -> None:
        """So many writes within a second, or as fast as they are served."""
        self.mean_ns, self.write_share = 1e9 / requests, 1.0
        self._busy_second()

    def _quiet_until(self, end_ns: int) -> None:
        # Timers only.
        while self.now_ns < end_ns:
            self.now_ns = max(self.now_ns, min(end_ns, self.sched.next_timer_ns() or end_ns))
            start = time.thread_time_ns()
            self._turn()
            self.now_ns += time.thread_time_ns() - start

    def _busy_second(self) -> None:
        arrival = self.now_ns
        end_ns = self.now_ns + NS_PER_S
        while self.now_ns < end_ns:
            timer = self.sched.next_timer_ns()
            self.now_ns = max(self.now_ns, arrival if timer is None else min(arrival, timer))
            start = time.thread_time_ns()
            answered: list[tuple[str, bool, int]] = []
            while arrival <= self.now_ns:
                if self._arrive(arrival):
                    answered.append(("read", self.cset.gc.running, arrival))
                arrival += int(self.dice.expovariate(1.0) * self.mean_ns)
            self._turn()
            self.now_ns += time.thread_time_ns() - start
            for request in self.cset.front.completed:
                assert not request.error, request
                kind, collecting, came = request.tag
                answered.append((kind, collecting or self.cset.gc.running, came))
            self.cset.front.completed.clear()
            for kind, collecting, came in answered:
                self.latency[kind, collecting].append((self.now_ns - came) / 1e3)

    def _arrive(self, arrival: int) -> bool:
        # One request; True if it is answered at once.
        sector = self.dice.randrange(self.keys) * STEP
        is_write = self.dice.random() < self.write_share
        if not is_write and self.device.read_nowait(sector, KEY_SECTORS) != NOT_NOW:
            return True
        op, kind = (REQ_WRITE, "write") if is_write else (REQ_READ, "read")
        self.device.submit(Request(op, sector, KEY_SECTORS, self.buffer, REQ_SYNC if is_write else 0, 1,
                                   (kind, self.cset.gc.running, arrival)))
        return False

    def _turn(self) -> None:
        # Until nothing can go on without time passing; what yields goes on in the next turn.
        while True:
            ios = self.sched.run(self.now_ns, self.opened.backend.reap())
            if not ios:
                return
            self.opened.backend.submit(ios)


def percentiles(values: list[float]) -> str:
    """Median, p99, p99.9 and maximum."""
    found = np.percentile(np.array(values), [50, 99, 99.9, 100])
    return " ".join(f"{value:.0f}" for value in found.tolist())


def main() -> int:
    """Measure and print; 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--requests", type=int, default=600_000)
    parser.add_argument("--steps", action="store_true", help="print the longest step of every task")
    asked = parser.parse_args()
    per_s = asked.requests / (asked.hours * 3600)
    print(f"hours: {asked.hours:g} h of {per_s:.0f} requests a second on {asked.keys} extents ({machine()}, "
          f"Python {sys.version.split()[0]})")
    with tempfile.TemporaryDirectory(prefix="bcachectl-bench-") as name:
        make_set(Path(name), asked.keys, spare_buckets=1000, dirty_every=0)
        hours = Hours(Path(name), asked.keys, per_s=per_s, write_share=0.4)
        gc.collect()
        gc.freeze()
        start = time.process_time()
        hours.run(asked.hours * 3600)
        spent = time.process_time() - start
        cset = hours.cset
        for kind in ("read", "write"):
            row(f"{kind}s: median, p99, p99.9, longest, no gc", percentiles(hours.latency[kind, False]) + " us")
            row(f"  while gc runs ({len(hours.latency[kind, True])} of them)",
                percentiles(hours.latency[kind, True]) + " us")
        ratio = float(np.percentile(hours.latency["read", True], 99) / np.percentile(hours.latency["read", False], 99))
        row("  p99 of reads while gc runs / without", f"{ratio:.2f}", f"< {TARGET:.0f}")
        row("gc runs; splits; written back; CPU a request",
            f"{cset.gc.runs}; {cset.splitter.splits}; {hours.device.writeback.keys_done} keys; "
            f"{spent / asked.requests * 1e6:.0f} us")
        if asked.steps:
            print(hours.sched.report())
        hours.burst(BURST)
        hours.opened.close()
        again = Opened(Path(name))
        start = time.process_time()
        again.run(again.cset.start())
        spent = time.process_time() - start
        row("start after that, as after a crash",
            f"{spent:.2f} s; {again.cset.replayed_keys} keys replayed", "< 3 s")
        again.close()
    print(f"  memory at its highest: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
    return 0 if ratio < TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
