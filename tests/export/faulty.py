# SPDX-License-Identifier: GPL-2.0-only
"""`FaultyMedium`, a device that fails on purpose, and `hosted`, an engine in this process whose devices can be such.

Faults: errors for reads or writes that touch a range of sectors, from a moment on; writes that raise AssertionError,
which is a proof that nobody writes.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest

from bcachectl.engine.export.host import EngineHost, HostOptions
from bcachectl.engine.export.nbd import NbdServer
from bcachectl.engine.io.medium import Medium
from tests.block_client import BlockClient
from tests.export.served import Stopper
from tests.nbd_client import NbdClient
from tests.over import EXPORT, Client, only
from tests.require import patience

ALL = (0, 1 << 62)


@dataclass
class Faults:
    """What fails: byte ranges and the errno."""

    read: tuple[int, int] = (0, 0)
    write: tuple[int, int] = (0, 0)
    flush: bool = False
    errno: int = 5
    forbid_writes: bool = False


class FaultyMedium:
    """A medium over another one."""

    def __init__(self, below: Medium, faults: Faults) -> None:
        self.below = below
        self.faults = faults
        self.fd = -1
        self.path = below.path
        self.size_bytes = below.size_bytes
        self.logical_block_bytes = below.logical_block_bytes
        self.optimal_io_bytes = below.optimal_io_bytes
        self.partial_stripes_expensive = below.partial_stripes_expensive
        self.is_block = below.is_block
        self.direct = False
        self.can_discard = below.can_discard
        self.can_zero = below.can_zero
        self.read_only = below.read_only
        self.nowait_flag = 0
        self.writes = 0

    def read_into(self, offset_bytes: int, buf: memoryview) -> None:
        self._check(self.faults.read, offset_bytes, len(buf))
        self.below.read_into(offset_bytes, buf)

    def write_from(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        self._write(offset_bytes, len(data))
        self.below.write_from(offset_bytes, data)

    def sync(self) -> None:
        if self.faults.flush:
            raise OSError(self.faults.errno, os.strerror(self.faults.errno))
        self.below.sync()

    def trim(self, offset_bytes: int, length_bytes: int) -> None:
        self._write(offset_bytes, length_bytes)
        self.below.trim(offset_bytes, length_bytes)

    def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        self._write(offset_bytes, length_bytes)
        self.below.write_zeroes(offset_bytes, length_bytes)

    def close(self) -> None:
        self.below.close()

    def _write(self, offset_bytes: int, length_bytes: int) -> None:
        assert not self.faults.forbid_writes, f"a write of {length_bytes} bytes at {offset_bytes} to {self.path}"
        self.writes += 1
        self._check(self.faults.write, offset_bytes, length_bytes)

    def _check(self, range_bytes: tuple[int, int], offset_bytes: int, length_bytes: int) -> None:
        if offset_bytes < range_bytes[1] and range_bytes[0] < offset_bytes + length_bytes:
            raise OSError(self.faults.errno, os.strerror(self.faults.errno))


class Hosted:
    """A running engine of this process."""

    def __init__(self, host: EngineHost, faults: list[Faults]) -> None:
        self.host = host
        self.faults = faults

    def client(self, volume: str = "bcache0") -> Client:
        """A client of a volume; the caller closes it."""
        place = next(place for place in self.host.ready() if place.volume == volume)
        if EXPORT:
            assert place.device is not None
            return BlockClient(place.device)
        return NbdClient(self.socket, volume)

    @property
    def socket(self) -> str:
        """The NBD socket, for a test that is about NBD."""
        return self.nbd.path

    @property
    def nbd(self) -> NbdServer:
        """The NBD server, for a test that is about NBD."""
        only("nbd", "what its server does")
        assert self.host.nbd is not None
        return self.host.nbd


@contextmanager
def hosted(options: HostOptions, make_faults: Callable[[int], Faults] | None = lambda _: Faults()) -> Iterator[Hosted]:
    """Run an engine whose every device is faulty as ``make_faults`` says, or with its devices as they are if that is
    None; orderly stop at the end.
    """
    with tempfile.TemporaryDirectory(prefix="bcachectl-") as runtime, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", runtime)
        if EXPORT:
            options = replace(options, use_ublk=True, use_nbd=False)
        made: list[tuple[Hosted, Stopper]] = []
        ready = threading.Event()
        failures: list[BaseException] = []

        async def main(host: EngineHost, stopper: Stopper) -> None:
            await host.start()
            ready.set()
            while not stopper.stopped:
                await stopper.wait.wait()
            await host.stop()

        def run() -> None:
            # All in one thread: a ring that is slept in belongs to the one that made it.
            try:
                host = EngineHost(options)
                faults = [] if make_faults is None else [make_faults(index) for index in range(len(host.media))]
                if faults:
                    host.media[:] = [FaultyMedium(medium, fault)
                                     for medium, fault in zip(host.media, faults, strict=True)]
                stopper = Stopper(host.loop)
                made.append((Hosted(host, faults), stopper))
                try:
                    host.loop.run(main(host, stopper))
                finally:
                    host.close()
            except BaseException as error:
                failures.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            ready.wait(patience(60))
            if not failures:
                yield made[0][0]
        finally:
            for _, stopper in made:
                os.write(stopper.write_fd, b"x")
            thread.join(patience(60))
            assert not thread.is_alive(), "the engine did not stop"
            for _, stopper in made:
                os.close(stopper.read_fd)
                os.close(stopper.write_fd)
        if failures:
            raise failures[0]
