# SPDX-License-Identifier: GPL-2.0-only
"""A set with as many extents as one likes, on sparse files, opened by an engine in this process; and a clock on every
step that a task of it takes.

The extents lie in random order on the cache, as after a long life; the volume's data is zeros.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from bcachectl.blockdev import open_device
from bcachectl.engine.bdev import Bdev
from bcachectl.engine.cache_set import CacheSet, Options
from bcachectl.engine.cached_dev import CachedDev
from bcachectl.engine.io.loop import make_backend
from bcachectl.engine.io.medium import Medium
from bcachectl.engine.sched import Io, Sched, Task
from bcachectl.ondisk.superblock import SB_BYTES, BdevState, CacheMode, Superblock, encode_superblock
from bench.fsck import BACKING_UUID, BLOCK_SECTORS, KEY_SECTORS, SET_UUID, Writer

DATA_OFFSET = 16


def make_set(directory: Path, keys: int, *, spare_buckets: int = 0, dirty_every: int = 2) -> int:
    """Write ``cache.img`` and ``back.img``; the number of buckets."""
    directory.mkdir(exist_ok=True)
    writer = Writer(directory / "cache.img", keys, spare_buckets=spare_buckets, dirty_every=dirty_every, scattered=True)
    writer.write()
    sb = Superblock(version=1, uuid=BACKING_UUID, set_uuid=SET_UUID, block_size=BLOCK_SECTORS, data_offset=DATA_OFFSET)
    sb = sb.with_state(BdevState.DIRTY if dirty_every else BdevState.CLEAN).with_cache_mode(CacheMode.WRITEBACK)
    with (directory / "back.img").open("wb") as file:
        file.truncate((2 * keys * KEY_SECTORS + DATA_OFFSET << 9) + (1 << 20))
        file.seek(4096)
        file.write(encode_superblock(sb)[:SB_BYTES])
    return writer.geometry.nbuckets


class TimedSched(Sched):
    """A scheduler that notes how long steps took: the longest of each task's name, and every one above a limit."""

    def __init__(self) -> None:
        super().__init__()
        self.longest_ns: dict[str, int] = {}
        self.total_ns: dict[str, int] = {}
        self.steps: dict[str, int] = {}

    def _step(self, task: Task[Any]) -> None:
        start = time.thread_time_ns()
        super()._step(task)
        took = time.thread_time_ns() - start
        name = task.name
        self.total_ns[name] = self.total_ns.get(name, 0) + took
        self.steps[name] = self.steps.get(name, 0) + 1
        if took > self.longest_ns.get(name, 0):
            self.longest_ns[name] = took

    def report(self) -> str:
        """One line for each name, the longest step first."""
        return "\n".join(f"    {name:<24} {longest / 1e6:8.2f} ms longest, {self.steps[name]:>7} steps, "
                         f"{self.total_ns[name] / 1e6:9.1f} ms in all"
                         for name, longest in sorted(self.longest_ns.items(), key=lambda item: -item[1]))


class Opened:
    """A set that runs in this process, without an export."""

    def __init__(self, directory: Path, *, sched: Sched | None = None, options: Options | None = None,
                 write: bool = True) -> None:
        self.media: list[Medium] = [open_device(str(directory / name), write=write)
                                    for name in ("cache.img", "back.img")]
        self.backend = make_backend(self.media)
        self.sched = sched or Sched()
        bdevs = [Bdev(self.sched, index, medium.path, size_sectors=medium.size_bytes >> 9)
                 for index, medium in enumerate(self.media)]
        self.cset = CacheSet(self.sched, bdevs[0], entropy=random.Random(1), options=options)
        self.backing = bdevs[1]
        self.start_ns = time.monotonic_ns()

    def turn(self, done: list[Io] | None = None) -> bool:
        """One run of the scheduler; whether it gave Ios."""
        ios = self.sched.run(time.monotonic_ns() - self.start_ns, self.backend.reap() + (done or []))
        if ios:
            self.backend.submit(ios)
        return bool(ios)

    def run(self, coro: Any) -> Any:
        """Run until a coroutine is done; its result."""
        task = self.sched.spawn(coro, "main")
        task.observed = True
        while not task.done:
            self.turn()
        if task.error is not None:
            raise task.error
        return task.result

    def open(self) -> CachedDev:
        """Start the set and take the backing device in."""
        self.run(self.cset.start())
        device = self.run(self.cset.register_backing(self.backing))
        assert isinstance(device, CachedDev)
        return device

    def close(self) -> None:
        """Let go of the files; the set is as after a crash."""
        self.backend.close()
        for medium in self.media:
            medium.close()
