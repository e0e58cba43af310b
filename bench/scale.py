# SPDX-License-Identifier: GPL-2.0-only
"""Two million buckets: a sparse cache of 1 TiB with buckets of 512 KiB.

Measured through the program, as a user has it: format, the first start, a start of a set that has run, memory, the CPU
of an engine that serves nothing.  Measured in this process: one lru invalidation round with every bucket a candidate of
random priority and use, from the choice of the victims to the last of them on free_inc; it is done in slices, and the
time is that of all of them.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bcachectl.blockdev import open_device
from bcachectl.engine.bdev import Bdev
from bcachectl.engine.buckets import MARK_RECLAIMABLE, Buckets
from bcachectl.engine.cache_set import CacheSet
from bcachectl.engine.io.loop import Loop, make_backend
from bcachectl.engine.io.medium import Medium
from bcachectl.engine.sched import NS_PER_S, Sched
from bench.process import cpu_s, machine, memory_bytes, row
from tests.export.engine import ROOT, Engine

CACHE_BYTES = 1 << 40
SMALL_BYTES = 1 << 30
BUCKET_KIB = 512
NBUCKETS = CACHE_BYTES // (BUCKET_KIB << 10)
ROUNDS = 5
IDLE_S = 10


def format_set(directory: Path, cache_bytes: int) -> float:
    """Make and format a set of sparse files in ``directory``; the seconds that the format took."""
    directory.mkdir()
    for name, size_bytes in (("cache.img", cache_bytes), ("back0.img", SMALL_BYTES)):
        with (directory / name).open("wb") as file:
            file.truncate(size_bytes)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bcachectl", "format", "--cache", str(directory / "cache.img"), "--backing",
                    str(directory / "back0.img"), "--bucket-size", f"{BUCKET_KIB}k"],
                   check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.perf_counter() - start


def run(directory: Path, *, idle_s: float = 0.0) -> tuple[float, int, int, float]:
    """Start an engine and stop it: seconds until it is ready, memory then, most memory, CPU share while it idles."""
    start = time.perf_counter()
    with Engine(directory, "--cache", directory / "cache.img", "--backing", directory / "back0.img",
                "--export", "nbd") as engine:
        ready_s = time.perf_counter() - start
        pid = engine.process.pid
        time.sleep(min(idle_s, 2.0))        # the allocator's first round belongs to the start
        before = cpu_s(pid)
        time.sleep(idle_s)
        used = (cpu_s(pid) - before) / idle_s if idle_s else 0.0
        return ready_s, memory_bytes(pid), memory_bytes(pid, "VmHWM"), used


def column_bytes(buckets: Buckets) -> int:
    """The arrays of `bcachectl.engine.buckets.Buckets`, touched or not."""
    columns = (getattr(buckets, name) for name in buckets.__slots__ if hasattr(buckets, name))
    return sum(column.nbytes for column in columns if isinstance(column, np.ndarray))


def invalidate(directory: Path) -> tuple[list[float], int, int]:
    """Milliseconds of invalidation rounds, victims of a round, and bytes of the bucket columns."""
    devices: list[Medium] = [open_device(str(directory / "cache.img"), write=True, exclusive=True)]
    backend = make_backend(devices)
    sched = Sched()
    cset = CacheSet(sched, Bdev(sched, 0, devices[0].path, size_sectors=CACHE_BYTES >> 9), entropy=random.Random(1))
    loop = Loop(sched, backend, cset.front)
    loop.run(cset.start())
    loop.run(sched.sleep_until(sched.now_ns + NS_PER_S))       # the allocator's own first round
    buckets, alloc = cset.buckets, cset.alloc
    draw = np.random.default_rng(1)
    took_ms = []
    victims = 0
    for _ in range(ROUNDS):
        alloc.free_inc.buckets.clear()
        buckets.prio[:] = draw.integers(1, 32769, NBUCKETS, dtype=np.uint16)
        buckets.sectors_used[:] = draw.integers(0, 1025, NBUCKETS, dtype=np.uint16)
        buckets.mark[:] = MARK_RECLAIMABLE
        buckets.pin[:] = 0
        buckets.last_gc[:] = buckets.gen
        start = time.perf_counter()
        loop.run(alloc.invalidate())
        took_ms.append((time.perf_counter() - start) * 1e3)
        victims = len(alloc.free_inc)
    size_bytes = column_bytes(buckets)
    backend.close()
    devices[0].close()
    return took_ms, victims, size_bytes


def main() -> None:
    """Measure and print."""
    print(f"scale: {NBUCKETS} buckets of {BUCKET_KIB} KiB in a sparse file ({machine()})")
    with tempfile.TemporaryDirectory(prefix="bcachectl-bench-") as name:
        large, small = Path(name, "large"), Path(name, "small")
        row("format", f"{format_set(large, CACHE_BYTES):.2f} s", "< 5 s")
        format_set(small, SMALL_BYTES)
        first_s, _, first_peak, _ = run(large)
        row("engine run until ready, new set", f"{first_s:.2f} s", "< 5 s")
        again_s, rss, peak, idle = run(large, idle_s=IDLE_S)
        small_s, small_rss, small_peak, _ = run(small)
        small_s, small_rss, small_peak, _ = run(small)
        row("engine run until ready, set that has run", f"{again_s:.2f} s", "< 5 s")
        row("  the same of 1 GiB", f"{small_s:.2f} s")
        row("memory a bucket: resident, above that of 1 GiB", f"{(rss - small_rss) / NBUCKETS:.1f} B", "< 64 B")
        row("  at its highest, new set", f"{(first_peak - small_peak) / NBUCKETS:.1f} B")
        row("  at its highest, set that has run", f"{(peak - small_peak) / NBUCKETS:.1f} B")
        row(f"CPU of an engine that serves nothing, {IDLE_S} s", f"{idle:.2%}", "< 0.1 %")
        took_ms, victims, size_bytes = invalidate(large)
        row("memory a bucket: all columns", f"{size_bytes / NBUCKETS:.1f} B", "< 64 B")
        took_ms.sort()
        row(f"lru invalidation of {victims} out of all", f"{took_ms[len(took_ms) // 2]:.1f} ms", "< 50 ms")
        row("  fastest, slowest round", f"{took_ms[0]:.1f} {took_ms[-1]:.1f} ms")


if __name__ == "__main__":
    main()
