# SPDX-License-Identifier: GPL-2.0-only
"""`Streams`: who reads or writes sequentially; `Congestion`: whether the cache device is too slow to be worth it.

A request that continues where another ended within the last 5 seconds belongs to that one's run, whoever issued it;
the run's length, or the average of the issuing stream's runs, whichever is greater, is what the sequential cutoff is
compared with (request.c, check_should_bypass; bch_get_congested)."""

from __future__ import annotations

from bcachectl.engine.alloc import Entropy
from bcachectl.engine.sched import NS_PER_MS, NS_PER_S, Sched

RECENT_IO = 128
RECENT_NS = 5 * NS_PER_S
CONGESTED_MAX = 1024


class Streams:
    """Recent runs of one device by the sector where they ended, oldest first: bytes, time.  By stream: bytes of its
    run, average.
    """

    __slots__ = ("recent", "lengths")

    def __init__(self) -> None:
        self.recent: dict[int, tuple[int, int]] = {}
        self.lengths: dict[int, tuple[int, int]] = {}

    def note(self, start: int, nsectors: int, *, stream: int, now_ns: int) -> int:
        """Count a request; returns the sectors that the cutoff is compared with."""
        recent = self.recent
        nbytes = nsectors << 9
        run, average = self.lengths.get(stream, (0, 0))
        found = recent.pop(start, None)
        if found is not None and now_ns - found[1] < RECENT_NS:
            nbytes += found[0]
        else:
            # A new run begins: the stream's last one goes into its average (add_sequential).
            average = (average * 7 + run) >> 3
            if len(recent) >= RECENT_IO:
                del recent[next(iter(recent))]
        recent[start + nsectors] = (nbytes, now_ns)
        self.set_run(stream, nbytes, average)
        return max(nbytes, average) >> 9

    def set_run(self, stream: int, nbytes: int, average: int) -> None:
        """The stream's run has this length now, and its runs this average."""
        if len(self.lengths) > 4 * RECENT_IO:
            del self.lengths[next(iter(self.lengths))]
        self.lengths[stream] = (nbytes, average)


class Congestion:
    """How slow the cache device has been lately: 0 or below; the lower, the slower (io.c, bch_bbio_count_io_errors)."""

    __slots__ = ("sched", "entropy", "value", "noted_ns", "read_threshold_us", "write_threshold_us")

    def __init__(self, sched: Sched, entropy: Entropy) -> None:
        self.sched = sched
        self.entropy = entropy
        self.value = 0
        self.noted_ns = 0
        self.read_threshold_us = 2000
        self.write_threshold_us = 20000

    def account(self, duration_ns: int, *, is_write: bool) -> None:
        """Count one finished data I/O of the cache device."""
        threshold = self.write_threshold_us if is_write else self.read_threshold_us
        if not threshold:
            return
        us = duration_ns // 1000
        if us > threshold:
            milli = us // 1024
            self.noted_ns = self.sched.now_ns
            self.value -= min(milli, max(0, CONGESTED_MAX + self.value))
        elif self.value < 0:
            self.value += 1

    def limit_sectors(self) -> int:
        """Requests of this many sectors or more bypass the cache; 0 if it is not congested (bch_get_congested)."""
        if not (self.read_threshold_us or self.write_threshold_us) or self.value >= 0:
            return 0
        level = (self.sched.now_ns - self.noted_ns) // NS_PER_MS + self.value
        if level >= 0:
            return 0
        level += CONGESTED_MAX
        if level > 0:
            level = (64 + level % 64) << (level // 64) >> 6
        level -= self.entropy.getrandbits(32).bit_count()
        return max(level, 1)
