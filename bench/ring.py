# SPDX-License-Identifier: GPL-2.0-only
"""The engine's loop without an export: 4 KiB read hits with O_DIRECT, 32 in flight, beside fio on the same file.

What is measured is what a ublk device does for a read hit but for the commands of the driver: the loop's turn, a
completion taken from the ring, the lookup with all it notes (`bcachectl.engine.front.Volume.read_nowait`), a pin, and
an entry of the ring that was written once.  The engine's set is real: a cache image that holds its volume as a whole.

fio and the engine take turns on that cache image, round after round; a figure is the median of the rounds' ratios, with
the smallest and the largest behind it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bcachectl.blockdev import open_device
from bcachectl.engine.bdev import Bdev
from bcachectl.engine.buckets import Buckets
from bcachectl.engine.cache_set import CacheSet, Options
from bcachectl.engine.export.ublk_reads import HAND_OVER_READS
from bcachectl.engine.front import NOT_NOW, REQ_FLUSH, REQ_WRITE, Front, Request, Volume
from bcachectl.engine.io.loop import Loop, make_backend, make_entropy, make_sched
from bcachectl.engine.io.medium import Medium
from bcachectl.engine.io.ring import Arrivals
from bcachectl.engine.io.uring import OP_READ, RingBackend
from bcachectl.engine.sched import NS_PER_MS, WaitQueue
from bench.process import machine
from tests.export.engine import ROOT

SIZE_BYTES = 256 << 20
CACHE_BYTES = 1 << 30
BLOCK_BYTES = 4096
FILL_BYTES = 1 << 20
TARGET = 0.8


@dataclass
class Side:
    """What was measured of one of the two."""

    iops: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)

    def note(self, reads: int, seconds: float, cpu_s: float) -> None:
        """One turn."""
        self.iops.append(reads / seconds)
        self.cpu_us.append(cpu_s * 1e6 / max(1, reads))


class Reader:
    """Keeps ``depth`` reads of random blocks in flight; a client of the ring, as a ublk device is."""

    def __init__(self, backend: RingBackend, volume: Volume, cache: Medium, buckets: Buckets, depth: int) -> None:
        self.backend = backend
        self.volume = volume
        self.buckets = buckets
        self.depth = depth
        draw = random.Random(1)
        blocks = volume.size_sectors // 8
        self.sectors = [draw.randrange(blocks) * 8 for _ in range(1 << 16)]
        self.reads = self.misses = self.failed = self.in_flight = 0
        self.is_over = False
        self.pinned = [0] * depth
        memory = np.frombuffer(mmap.mmap(-1, depth * BLOCK_BYTES), np.uint8)
        self.memory = memory
        address = memory.__array_interface__["data"][0]
        self.first_slot = backend.ring.reserve(depth)
        self.arrivals = Arrivals(backend.ring.cq_entries)
        self.base = backend.add_quick(self)
        for index in range(depth):
            backend.ring.fill(self.first_slot + index, OP_READ, fd=cache.fd, user_data=self.base | index,
                              address=address + index * BLOCK_BYTES, length=BLOCK_BYTES)

    def begin(self) -> None:
        """Put the first reads into the ring."""
        self.in_flight = self.depth
        self._next(list(range(self.depth)))

    def serve(self) -> bool:
        """Reads have ended; each is followed by another one."""
        pin_at, pinned, arrivals = self.buckets.pin_at, self.pinned, self.arrivals
        indices = list(arrivals.numbers[:arrivals.count])
        results, arrivals.count = arrivals.results[:arrivals.count], 0
        for index, result in zip(indices, results, strict=True):
            pin_at[pinned[index]] -= 1
            if result != BLOCK_BYTES:
                self.failed += 1
        self.reads += len(indices)
        if self.is_over:
            self.in_flight -= len(indices)
        else:
            self._next(indices)
        return False

    def finish(self) -> None:
        """Nothing is left for the engine."""

    def _next(self, indices: list[int]) -> None:
        ring, read_nowait, sectors = self.backend.ring, self.volume.read_nowait, self.sectors
        sqe_u64, array, mask, tail = ring.sqe_u64, ring.sq_array, ring.sq_mask, ring.tail
        pin_at, pinned, shift = self.buckets.pin_at, self.pinned, self.buckets.bucket_shift + 9
        first_slot, number = self.first_slot, self.reads
        handed_over = tail
        for index in indices:
            place = read_nowait(sectors[number & 0xFFFF], 8)
            if place == NOT_NOW:
                self.misses += 1
                place = 0
            number += 1
            bucket = place >> shift
            pin_at[bucket] += 1
            pinned[index] = bucket
            slot = first_slot + index
            sqe_u64[8 * slot + 1] = place
            array[tail & mask] = slot
            tail = tail + 1 & 0xFFFFFFFF
            if tail - handed_over & 0xFFFFFFFF >= HAND_OVER_READS:
                ring.tail = handed_over = tail
                ring.hand_over()
        ring.tail = tail


class _Asked:
    # The tag of a request that a coroutine waits for.
    def __init__(self, wait: WaitQueue) -> None:
        self.wait = wait
        self.is_done = False

    def answered(self, request: Request) -> None:
        assert not request.error
        self.is_done = True
        self.wait.wake_all()


class Bench:
    """A set on two image files, all of its volume in the cache, in this process."""

    def __init__(self, directory: Path, depth: int) -> None:
        self.cache_path = directory / "cache.img"
        paths = [self.cache_path, directory / "back0.img"]
        for path, size_bytes in zip(paths, (CACHE_BYTES, SIZE_BYTES + 8192), strict=True):
            with path.open("wb") as file:
                file.truncate(size_bytes)
        subprocess.run([sys.executable, "-m", "bcachectl", "format", "--cache", str(paths[0]), "--backing",
                        str(paths[1]), "--bucket-size", "512k"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        self.media: list[Medium] = [open_device(str(path), write=True, exclusive=True, direct=True) for path in paths]
        self.sched = make_sched()
        backend = make_backend(self.media, waited_in=True)
        assert isinstance(backend, RingBackend)
        self.backend = backend
        bdevs = [Bdev(self.sched, index, medium.path, size_sectors=medium.size_bytes >> 9)
                 for index, medium in enumerate(self.media)]
        self.cset = CacheSet(self.sched, bdevs[0], entropy=make_entropy(), options=Options())
        front: Front = self.cset.front
        self.loop = Loop(self.sched, backend, front)
        self.loop.run(self._fill(bdevs[1]))
        self.reader = Reader(backend, self.cset.volumes[0], self.media[0], self.cset.buckets, depth)

    async def _fill(self, backing: Bdev) -> None:
        await self.cset.start()
        await self.cset.register_backing(backing)
        # Dirty data waits for room in the cache, where clean data would do without.
        for name, text in (("sequential_cutoff", "0"), ("cache_mode", "writeback"), ("writeback_running", "0")):
            await self.cset.tunables.set("bcache0", name, text)
        wait = WaitQueue(self.sched, "filled")
        data = memoryview(mmap.mmap(-1, FILL_BYTES))
        data[:] = random.Random(2).randbytes(FILL_BYTES)
        for sector in range(0, SIZE_BYTES >> 9, FILL_BYTES >> 9):
            await self._ask(wait, REQ_WRITE, sector, FILL_BYTES >> 9, data)
        await self._ask(wait, REQ_FLUSH, 0, 0, None)
        # As a cache has it in everyday use: the cutoff that makes every read note its run.
        await self.cset.tunables.set("bcache0", "sequential_cutoff", str(4 << 20))

    async def _ask(self, wait: WaitQueue, operation: int, sector: int, nsectors: int, data: memoryview | None) -> None:
        tag = _Asked(wait)
        self.cset.volumes[0].submit(Request(operation, sector, nsectors, data, 0, 0, tag))
        while not tag.is_done:
            await wait.wait()

    def turn(self, seconds: float, side: Side) -> None:
        """The engine reads for so long."""
        reader, start, before = self.reader, time.monotonic(), _cpu_s()
        reader.reads, reader.is_over = 0, False
        self.loop.run(self._read(seconds))
        side.note(reader.reads, time.monotonic() - start, _cpu_s() - before)

    async def _read(self, seconds: float) -> None:
        reader = self.reader
        reader.begin()
        await self.sched.sleep_until(self.sched.now_ns + int(seconds * 1e9))
        reader.is_over = True
        while reader.in_flight:
            await self.sched.sleep_until(self.sched.now_ns + NS_PER_MS)

    def fio(self, seconds: float, side: Side) -> None:
        """fio reads the same blocks of the same file, through an io_uring of its own with all that makes it fast."""
        cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
        first = self.cset.volumes[0].read_nowait(0, 8)
        done = subprocess.run(
            ["fio", "--name=turn", f"--filename={self.cache_path}", "--ioengine=io_uring", "--direct=1", "--bs=4k",
             "--rw=randread", f"--iodepth={self.reader.depth}", f"--offset={first}", f"--size={SIZE_BYTES}",
             "--time_based", f"--runtime={seconds}", "--norandommap", "--randrepeat=0", "--invalidate=0", "--thread",
             "--output-format=json"], capture_output=True, text=True, check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
        side.note(job["read"]["total_ios"], job["read"]["runtime"] / 1e3,
                  used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime)

    def close(self) -> None:
        """Stop in good order."""
        self.backend.remove_quick(self.reader.base, self.reader)
        self.loop.run(self.cset.stop())
        self.loop.close()
        self.backend.close()
        for medium in self.media:
            medium.close()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--directory", default=None, help="where the images lie; their file system must know O_DIRECT")
    asked = parser.parse_args()
    print(f"ring: {asked.rounds} rounds of {asked.seconds} s, 4 KiB O_DIRECT reads, {asked.depth} in flight "
          f"({machine()}, Python {sys.version.split()[0]})")
    engine, fio = Side(), Side()
    with tempfile.TemporaryDirectory(prefix="bcachectl-bench-", dir=asked.directory) as name:
        bench = Bench(Path(name), asked.depth)
        bench.turn(0.5, Side())
        for _ in range(asked.rounds):
            bench.fio(asked.seconds, fio)
            bench.turn(asked.seconds, engine)
        reader = bench.reader
        assert not reader.failed, "reads have failed"
        assert not reader.misses, "not every read was a hit"
        bench.close()
    for what, side in (("fio", fio), ("engine", engine)):
        print(f"  {what:<8} {statistics.median(side.iops):>9.0f}/s  {statistics.median(side.cpu_us):>6.2f} us CPU")
    ratios = [mine / theirs for mine, theirs in zip(engine.iops, fio.iops, strict=True)]
    print(f"  engine / fio: {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})   "
          f"target {TARGET}")


if __name__ == "__main__":
    main()
