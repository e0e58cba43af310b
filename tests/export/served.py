# SPDX-License-Identifier: GPL-2.0-only
"""`serve`: image files behind the real loop, backend and exports, without a cache: each volume is its file.

The loop runs in a thread of the test, so the test itself is the client.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bcachectl.blockdev import open_device
from bcachectl.engine.bdev import Bdev
from bcachectl.engine.export.loopdev import LoopExport
from bcachectl.engine.export.nbd import NbdServer
from bcachectl.engine.front import (
    EXTENT_CLEAN,
    EXTENT_DIRTY,
    EXTENT_HOLE,
    NOT_NOW,
    REQ_DISCARD,
    REQ_FLUSH,
    REQ_FUA,
    REQ_READ,
    REQ_STATUS,
    REQ_WRITE,
    Front,
    Request,
)
from bcachectl.engine.io.loop import Loop, make_backend, make_sched
from bcachectl.engine.io.medium import Medium
from bcachectl.engine.sched import FUA, Sched, WaitQueue


class FileVolume:
    """A volume that is one device; ``is_quick``: reads are answered by `read_nowait`."""

    def __init__(self, sched: Sched, front: Front, bdev: Bdev, *, is_quick: bool, read_only: bool) -> None:
        self.sched = sched
        self.front = front
        self.bdev = bdev
        self.is_quick = is_quick
        self.read_only = read_only
        self.name = f"bcache{bdev.index}"
        self.uuid = bytes([bdev.index] * 16)
        self.label = "label"
        self.size_sectors = bdev.size_sectors
        self.block_size_sectors = 1
        self.seen: list[tuple[int, int, int, int]] = []
        self.delay_ns = 0
        self.fail_with = 0
        self.reads = self.batch = None

    def reads_nowait(self, reads: list[tuple[int, int]]) -> list[int]:
        return [self.read_nowait(sector, nsectors) for sector, nsectors in reads]

    def read_nowait(self, sector: int, nsectors: int) -> int:
        """The quick answer works for volume 0 only: it is the "cache device"."""
        return sector << 9 if self.is_quick and self.bdev.index == 0 else NOT_NOW

    def submit_all(self, requests: list[Request]) -> None:
        for request in requests:
            self.submit(request)

    def submit(self, request: Request) -> None:
        """Serve it in a task."""
        self.seen.append((request.op, request.sector, request.nsectors, request.flags))
        self.sched.spawn(self._serve(request), "request")

    async def _serve(self, request: Request) -> None:
        bdev, error = self.bdev, self.fail_with
        if self.delay_ns:
            await self.sched.sleep_until(self.sched.now_ns + self.delay_ns)
        flags = FUA if request.flags & REQ_FUA else 0
        if error:
            pass
        elif request.op == REQ_READ:
            error = await bdev.read(request.sector, request.buf)
        elif request.op == REQ_WRITE:
            error = await bdev.write(request.sector, request.buf, flags)
        elif request.op == REQ_FLUSH:
            error = await bdev.flush()
        elif request.op == REQ_STATUS:
            third = request.nsectors // 3
            request.extents = [(third, EXTENT_HOLE), (third, EXTENT_DIRTY),
                               (request.nsectors - 2 * third, EXTENT_CLEAN)]
        elif request.op == REQ_DISCARD:
            error = await bdev.discard(request.sector, request.nsectors)
        else:
            error = await bdev.write_zeroes(request.sector, request.nsectors, flags)
        self.front.complete(request, error)


class Served:
    """What `serve` gives: the volumes and the socket."""

    def __init__(self, loop: Loop, volumes: list[FileVolume], server: NbdServer, path: Path,
                 devices: list[str]) -> None:
        self.loop = loop
        self.volumes = volumes
        self.server = server
        self.path = path
        self.devices = devices


class Stopper:
    # A pipe that ends the loop's main coroutine from the other thread.
    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.read_fd, self.write_fd = os.pipe()
        self.wait = WaitQueue(loop.sched, "stop")
        self.stopped = False
        loop.register(self.read_fd, self)

    def on_ready(self, fd: int, events: int) -> None:
        os.read(fd, 1)
        self.stopped = True
        self.wait.wake_all()


@contextmanager
def serve(images: list[Path], socket_path: Path, *, backend: str = "auto", is_quick: bool = True,
          read_only: bool = False, direct: bool = False, loop_directory: Path | None = None) -> Iterator[Served]:
    """Serve the images over NBD until the block ends."""
    sched, front = make_sched(), Front()
    media: list[Medium] = [open_device(str(image), write=not read_only, exclusive=True, direct=direct)
                           for image in images]
    engine = make_backend(media, backend)
    loop = Loop(sched, engine, front)
    volumes = [FileVolume(sched, front, Bdev(sched, index, str(image), size_sectors=media[index].size_bytes >> 9,
                                             can_discard=True, read_only=read_only),
                          is_quick=is_quick, read_only=read_only)
               for index, image in enumerate(images)]
    server = NbdServer(loop, volumes, media[0], str(socket_path))
    stopper = Stopper(loop)
    failures: list[BaseException] = []

    exports = [] if loop_directory is None else [
        LoopExport(loop, volume, media[0], str(loop_directory), stream=volume.bdev.index,
                   can_zero=True)
        for volume in volumes]
    ready = threading.Event()
    devices: list[str] = []

    async def main() -> None:
        for export in exports:
            devices.append(await export.start())
        ready.set()
        while not stopper.stopped:
            await stopper.wait.wait()
        for export in exports:
            while await export.is_in_use():
                await sched.sleep_until(sched.now_ns + 50_000_000)
            await export.stop()
        await server.stop()

    def run() -> None:
        try:
            loop.run(main())
        except BaseException as error:
            failures.append(error)
            for export in exports:
                export.abort()
            server.close()
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(30)
    try:
        yield Served(loop, volumes, server, socket_path, devices)
    finally:
        if thread.is_alive():
            os.write(stopper.write_fd, b"x")
        thread.join(30)
        assert not thread.is_alive(), "the loop did not stop"
        loop.close()
        engine.close()
        for medium in media:
            medium.close()
        os.close(stopper.read_fd)
        os.close(stopper.write_fd)
    if failures:
        raise failures[0]
    assert not socket_path.exists()
