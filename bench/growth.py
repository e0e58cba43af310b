# SPDX-License-Identifier: GPL-2.0-only
"""What grows with the work: a btree of 10^4, 10^6, 10^7 extents, a cache of 10^4 to 2 * 10^6 buckets.

Each size runs in a process of its own, which opens a set that was made for it and then does one thing after the other:

* open: until the set runs; every node is read, checked and marked twice;
* lookup: 4 KiB read hits at random, as an export asks for them (`CachedDev.read_nowait`);
* insert: 4 KiB extents at random into the btree, with all writes and splits of nodes that follow from them;
* gc: a whole run that nobody disturbs, and the longest step of it;
* buckets: one round of each replacement policy, one rescale, the longest step of a round;
* memory: resident, above that of the smallest set.

CPU time of the process; the longest step is what a request has to wait for at worst.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bcachectl.engine.alloc import Reserve
from bcachectl.engine.cache_set import Options
from bcachectl.engine.node import HAS_PTR, Extent
from bcachectl.ondisk.superblock import Replacement
from bench.bulk import DATA_OFFSET, Opened, TimedSched, make_set
from bench.fsck import KEY_SECTORS
from bench.process import machine, row
from tests.export.engine import ROOT

EXTENTS = (10_000, 1_000_000, 10_000_000)
BUCKETS = (10_000, 100_000, 2_000_000)
LOOKUPS = 200_000
INSERTS = 60_000
STEP = 2 * KEY_SECTORS


class One:
    """One size, in this process."""

    def __init__(self, directory: Path, keys: int) -> None:
        self.keys = keys
        self.sched = TimedSched()
        # Room for every leaf: what is not in memory costs what the device costs.
        self.opened = Opened(directory, sched=self.sched, options=Options(node_cache_bytes=1 << 30))
        self.dice = random.Random(1)

    def bulk(self) -> dict[str, float]:
        """What reads every node: the start, and a gc."""
        found = {"open_s": self.cpu_s(self.opened.open),
                 "gc_s": self.cpu_s(lambda: self.opened.run(self.opened.cset.gc.run_now()))}
        self.opened.close()
        return found

    def measure(self) -> dict[str, float]:
        """All figures."""
        found: dict[str, float] = {}
        found["open_s"] = self.cpu_s(self.opened.open)
        found["nbuckets"] = self.opened.cset.buckets.nbuckets
        found["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        places = [self.dice.randrange(self.keys) * STEP for _ in range(LOOKUPS)]
        found["empty_ns"] = self.cpu_s(lambda: self.each(places, lambda place, _count: place)) / LOOKUPS * 1e9
        read_nowait = self.opened.cset.devices[0].read_nowait
        assert all(read_nowait(place, KEY_SECTORS) >= 0 for place in places[:1000])
        found["lookup_ns"] = self.cpu_s(lambda: self.each(places, read_nowait)) / LOOKUPS * 1e9 - found["empty_ns"]
        self.sched.longest_ns.clear()
        found["gc_s"] = self.cpu_s(lambda: self.opened.run(self.opened.cset.gc.run_now()))
        found["gc_step_ms"] = self.longest_ms("gc")
        found["insert_ns"] = self.cpu_s(lambda: self.opened.run(self.insert())) / INSERTS * 1e9
        found["split_step_ms"] = self.longest_ms("insert")
        for policy in Replacement:
            found[f"{policy.name}_ms"] = self.cpu_s(lambda policy=policy: self.invalidate(policy)) * 1e3  # type: ignore[misc]
            found[f"{policy.name}_step_ms"] = self.longest_ms("main")
        alloc = self.opened.cset.alloc
        alloc.rescale(self.opened.cset.buckets.rescale_step_sectors())
        found["rescale_ms"] = self.cpu_s(
            lambda: alloc.rescale(self.opened.cset.buckets.rescale_step_sectors())) * 1e3
        self.opened.close()
        return found

    @staticmethod
    def cpu_s(work: Callable[[], Any]) -> float:
        """Processor time of one piece of work."""
        start = time.process_time()
        work()
        return time.process_time() - start

    @staticmethod
    def each(places: list[int], ask: Callable[[int, int], Any]) -> None:
        """Ask for every place."""
        for place in places:
            ask(place, KEY_SECTORS)

    def longest_ms(self, name: str) -> float:
        """The longest step of a task since the last question."""
        longest = self.sched.longest_ns.get(name, 0) / 1e6
        self.sched.longest_ns.clear()
        return longest

    async def insert(self) -> None:
        """Insert between the keys that are there; the data may lie anywhere."""
        task = self.sched.spawn(self._insert(), "insert")
        await task

    async def _insert(self) -> None:
        cset = self.opened.cset
        bucket = await cset.alloc.alloc(Reserve.NONE)
        ptr = cset.geometry.sector_of(bucket) << 8 | cset.buckets.gen_at[bucket]
        base = self.opened.cset.devices[0].base + DATA_OFFSET + KEY_SECTORS
        for number in range(INSERTS):
            start = base + self.dice.randrange(self.keys) * STEP
            new = Extent(start, start + KEY_SECTORS, HAS_PTR, ptr)
            if not cset.btree.insert_nowait(new, None):
                await cset.btree.insert(new, None)
            if number % 32 == 31:
                await self.sched.yield_now()

    def invalidate(self, policy: Replacement) -> None:
        """One round for an empty free_inc.  The allocator's own task sleeps: the free lists are full."""
        alloc = self.opened.cset.alloc
        alloc.replacement = policy
        for bucket in alloc.free_inc.buckets:
            self.opened.cset.buckets.unpin(bucket)
        alloc.free_inc.buckets.clear()
        self.opened.run(alloc.invalidate())


def one(keys: int, spare_buckets: int) -> dict[str, float]:
    """A size in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="bcachectl-bench-") as name:
        make_set(Path(name), keys, spare_buckets=spare_buckets, dirty_every=0)
        done = subprocess.run([sys.executable, "-m", "bench.growth", "--one", name, "--keys", str(keys)],
                              stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> int:
    """Measure and print; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", default="")
    parser.add_argument("--keys", type=int, default=0)
    parser.add_argument("--bulk", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one and asked.bulk:
        print(json.dumps(One(Path(asked.one), asked.keys).bulk()))
        return 0
    if asked.one:
        print(json.dumps(One(Path(asked.one), asked.keys).measure()))
        return 0
    print(f"growth ({machine()}, Python {sys.version.split()[0]})")
    small = 0.0
    opened_s = 0.0
    for keys in EXTENTS:
        found = one(keys, 3000)
        small = small or found["rss"]
        row(f"{keys} extents: open, extents a second", f"{found['open_s']:.2f} s {keys / found['open_s']:.2g}",
            "< 3 s" if keys == 1_000_000 else "")
        opened_s = max(opened_s, found["open_s"]) if keys <= 1_000_000 else opened_s
        row("  lookup; insert with writes and splits",
            f"{found['lookup_ns']:.0f} ns; {found['insert_ns'] / 1e3:.1f} us")
        row("  gc; longest step of it; longest of an insert",
            f"{found['gc_s'] * 1e3:.0f} ms; {found['gc_step_ms']:.1f} ms; {found['split_step_ms']:.1f} ms")
        if keys > EXTENTS[0]:
            row("  memory an extent", f"{(found['rss'] - small) / keys:.0f} B")
    for nbuckets in BUCKETS:
        found = one(10_000, nbuckets)
        row(f"{found['nbuckets']:.0f} buckets: open", f"{found['open_s']:.2f} s")
        row("  a round of lru, fifo, random", " ".join(f"{found[f'{policy.name}_ms']:.1f}" for policy in Replacement)
            + " ms", "< 50 ms")
        row("  longest step of each", " ".join(f"{found[f'{policy.name}_step_ms']:.2f}" for policy in Replacement)
            + " ms")
        row("  rescale; longest step of gc", f"{found['rescale_ms']:.2f} {found['gc_step_ms']:.2f} ms")
    return 0 if opened_s < 3.0 else 1


if __name__ == "__main__":
    sys.exit(main())
