# SPDX-License-Identifier: GPL-2.0-only
"""`PassThrough`: an engine without a cache, right or wrong on purpose, to test the simulated disk and the oracle with.

``wrong`` names one mistake: "flush" answers flushes without flushing, "fua" drops FUA, "early" answers a write before
the disk has, "place" writes one sector too far, "lost" drops every seventh write, "old" answers reads from before.
"""

from __future__ import annotations

import random
from typing import Any

from bcachectl.engine.bdev import Bdev
from bcachectl.engine.front import (
    NOT_NOW,
    REQ_DISCARD,
    REQ_FLUSH,
    REQ_FUA,
    REQ_PREFLUSH,
    REQ_READ,
    REQ_WRITE_ZEROES,
    Front,
    Request,
)
from bcachectl.engine.sched import FUA, PREFLUSH, Sched
from bcachectl.engine.tail import Tail


class PassVolume:
    """A backing device as it is."""

    def __init__(self, engine: PassThrough, bdev: Bdev, data_offset: int) -> None:
        self.engine = engine
        self.bdev = bdev
        self.data_offset = data_offset
        self.uuid = bytes(16)
        self.name = "bcache0"
        self.label = ""
        self.size_sectors = bdev.size_sectors - data_offset
        self.block_size_sectors = 1
        self.read_only = False
        self.reads = self.batch = None

    def reads_nowait(self, reads: list[tuple[int, int]]) -> list[int]:
        return [self.read_nowait(sector, nsectors) for sector, nsectors in reads]

    def read_nowait(self, sector: int, nsectors: int) -> int:
        """Never."""
        return NOT_NOW

    def submit_all(self, requests: list[Request]) -> None:
        for request in requests:
            self.submit(request)

    def submit(self, request: Request) -> None:
        """Pass it on."""
        self.engine.serial += 1
        self.engine.sched.spawn(self._serve(request, self.engine.serial), "request")

    async def _serve(self, request: Request, serial: int) -> None:
        wrong, bdev, front = self.engine.wrong, self.bdev, self.engine.front
        sector = request.sector + self.data_offset
        flags = 0
        if request.flags & REQ_FUA and wrong != "fua":
            flags |= FUA
        if request.flags & REQ_PREFLUSH and wrong != "flush":
            flags |= PREFLUSH
        if request.op == REQ_FLUSH:
            front.complete(request, 0 if wrong == "flush" else await bdev.flush())
        elif request.op == REQ_READ:
            if wrong == "old" and serial % 3 == 0:
                request.buf[:] = self.engine.last_read[:1] * len(request.buf)
                front.complete(request, 0)
                return
            error = await bdev.read(sector, request.buf)
            self.engine.last_read = bytes(request.buf)
            front.complete(request, error)
        elif request.op == REQ_DISCARD:
            front.complete(request, await bdev.discard(sector, request.nsectors))
        elif request.op == REQ_WRITE_ZEROES:
            front.complete(request, await bdev.write_zeroes(sector, request.nsectors, flags))
        elif wrong == "lost" and serial % 7 == 0:
            front.complete(request, 0)
        else:
            if wrong == "place" and request.sector:
                sector -= 1
            io = bdev.write(sector, request.buf, flags)
            if wrong == "early":
                front.complete(request, 0)
                await io
            else:
                front.complete(request, await io)


class PassThrough:
    """What `World` needs of a `CacheSet`."""

    def __init__(self, sched: Sched, wrong: str) -> None:
        self.sched = sched
        self.wrong = wrong
        self.front = Front()
        self.volumes: list[PassVolume] = []
        self.failed: str | None = None
        self.serial = 0
        self.last_read = bytes(512)

    async def start(self) -> None:
        """Nothing to recover."""

    async def stop(self) -> None:
        """Nothing to close."""

    async def register_backing(self, bdev: Bdev) -> PassVolume:
        """Serve a device."""
        self.volumes.append(PassVolume(self, bdev, 16))
        return self.volumes[-1]


def engine(wrong: str = "") -> Any:
    """What `World` takes as ``engine``."""

    def make(sched: Sched, _cache: Bdev, _entropy: random.Random, _options: dict[str, Any], _tail: Tail) -> PassThrough:
        return PassThrough(sched, wrong)

    return make
