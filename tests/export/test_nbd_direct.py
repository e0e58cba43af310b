# SPDX-License-Identifier: GPL-2.0-only
"""Read hits that go past the engine's tasks into the ring, as they do on a cache device with direct I/O."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from bcachectl.blockdev import open_device
from bcachectl.engine import stats
from bcachectl.engine.buckets import Buckets
from bcachectl.engine.cached_dev import CachedDev
from bcachectl.engine.export import nbd_direct
from bcachectl.engine.export.host import EngineHost, HostOptions
from bcachectl.engine.export.nbd_direct import MAX_FLIGHTS, DirectReads, Read
from bcachectl.engine.front import Request
from bcachectl.engine.io import ring
from bcachectl.engine.io.loop import make_backend, make_sched
from bcachectl.engine.io.uring import RingBackend
from bcachectl.engine.sched import NS_PER_S, Io
from bcachectl.engine.streams import Congestion
from bcachectl.errors import DeviceError
from bcachectl.ondisk.geometry import Geometry
from tests.export.faulty import Hosted, hosted
from tests.export.test_engine_run import make_set
from tests.nbd_client import CMD_READ, CMD_WRITE, FLAG_FUA, NbdClient
from tests.require import patience

SIZE_BYTES = 8 << 20


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Hosted]:
    """A set that holds its whole volume; the reads go to another file than the set's, once `redirect` says so."""
    make_set(tmp_path, backing_bytes=SIZE_BYTES + 8192)
    options = HostOptions(cache=str(tmp_path / "cache.img"), backings=(str(tmp_path / "back0.img"),), debug_checks=True,
                          tunables=(("cache_mode", "writeback"), ("writeback_running", "0"), ("sequential_cutoff", "0"),
                                    ("congested_read_threshold_us", "0"), ("congested_write_threshold_us", "0")))
    with hosted(options) as engine:
        if not isinstance(engine.host.backend, RingBackend):
            pytest.skip("not here: io_uring")
        yield engine


def redirect(running: Hosted, path: Path) -> DirectReads:
    """Hits are read from ``path`` from now on, by clients that are there as well, of whom nothing is in flight."""
    host = running.host
    assert host.nbd is not None
    assert isinstance(host.backend, RingBackend)
    reads = DirectReads(host.backend, os.open(path, os.O_RDONLY), host.cset.buckets, host.cset.congestion)
    host.nbd.direct_reads = reads
    for connection in list(host.nbd.connections.values()):      # its thread may take one away meanwhile
        if connection.volume is not None:
            connection.choose(connection.volume)
    return reads


def is_idle(reads: DirectReads) -> bool:
    """Whether all slots are free, soon: a client may have its answer before the engine has noted that it left."""
    deadline_s = time.monotonic() + patience(10)
    while len(reads.free) < MAX_FLIGHTS and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return len(reads.free) == MAX_FLIGHTS


def test_hits_agree_with_what_was_written(running: Hosted, tmp_path: Path) -> None:
    dice = random.Random(1)
    image = bytearray(dice.randbytes(SIZE_BYTES))
    with NbdClient(running.socket) as client:
        client.write(0, image)
        client.flush()
        reads = redirect(running, tmp_path / "cache.img")
        for turn in range(20):
            asked = {}
            for _ in range(300 if turn % 5 == 0 else 40):
                length = dice.choice((512, 4096, 4096, 12288, 65536, 300 << 10))
                offset = dice.randrange(0, (SIZE_BYTES - length) // 512) * 512
                asked[client.send(CMD_READ, offset, length)] = (offset, length)
            while client.in_flight:
                reply = client.receive()
                offset, length = asked[reply.cookie]
                assert reply.error == 0
                assert reply.data == image[offset:offset + length]
            offset = dice.randrange(0, SIZE_BYTES // 4096) * 4096
            image[offset:offset + 4096] = dice.randbytes(4096)
            client.write(offset, image[offset:offset + 4096])
    assert is_idle(reads)
    assert int(running.host.cset.buckets.pin.max()) <= 1, "a bucket is pinned for ever"


def test_reads_that_fail_are_asked_of_the_volume(running: Hosted, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    image = random.Random(2).randbytes(SIZE_BYTES)
    with NbdClient(running.socket, structured=True) as client:
        client.write(0, image)
        redirect(running, tmp_path / "empty")
        assert client.read_all(65536) == image


def test_a_client_that_vanishes(running: Hosted, tmp_path: Path) -> None:
    image = random.Random(3).randbytes(SIZE_BYTES)
    with NbdClient(running.socket) as client:
        client.write(0, image)
    reads = redirect(running, tmp_path / "cache.img")
    for _ in range(5):
        client = NbdClient(running.socket)
        for block in range(100):
            client.send(CMD_READ, block * 4096, 4096)
        client._socket.close()
    with NbdClient(running.socket) as client:
        client.send(CMD_WRITE, 0, 4096, image[:4096])
        assert client.receive().error == 0
        assert client.read_all(65536) == image
    assert is_idle(reads)


def test_beside_ublk_devices_an_answer_does_not_wait_for_a_timer(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With those the loop sleeps in the ring, and goes on sleeping while the ring's clients serve themselves.  What
    such a client leaves to an export has to be sent all the same."""
    # The thread that waits in the ring is not the one that made it here; and no timer is to help.
    monkeypatch.setattr(ring, "_WAITED_IN", ring._WAITED_IN[1:])
    monkeypatch.setattr(stats, "TICK_NS", 3600 * NS_PER_S)
    monkeypatch.setattr(EngineHost, "_make_backend", lambda host: make_backend(host.media, waited_in=True))
    make_set(tmp_path, backing_bytes=SIZE_BYTES + 8192)
    options = HostOptions(cache=str(tmp_path / "cache.img"), backings=(str(tmp_path / "back0.img"),),
                          tunables=(("cache_mode", "writeback"), ("writeback_running", "0"),
                                    ("writeback_percent", "0")))
    with hosted(options) as running, NbdClient(running.socket, timeout_s=10) as client:
        client.write(0, b"x" * 65536)
        client.flush()
        reads = redirect(running, tmp_path / "cache.img")
        for _ in range(10):
            assert client.read(0, 4096) == b"x" * 4096
        assert is_idle(reads)


def test_the_time_that_the_loop_has_slept_is_no_slow_device(tmp_path: Path) -> None:
    """The engine's clock is that of the last turn when a read begins."""
    path = tmp_path / "cache.img"
    path.write_bytes(bytes(8192))
    sched = make_sched()
    congestion = Congestion(sched, random.Random(1))
    congestion.read_threshold_us = 5_000_000
    arrived: list[int] = []

    class Asked:
        is_open, is_structured, in_flight = True, False, 0
        replies: ClassVar[list[memoryview]] = []
        reply_slots: ClassVar[list[int]] = []

        def flush(self) -> None:
            arrived.extend(self.reply_slots)

        def read_again(self, read: Read) -> None:
            raise AssertionError

    with open_device(str(path)) as device:
        backend = make_backend([device])
        if not isinstance(backend, RingBackend):
            pytest.skip("not here: io_uring")
        buckets = Buckets(Geometry(block_size_sectors=8, bucket_size_sectors=8, nbuckets=32, first_bucket=1))
        reads = DirectReads(backend, device.fd, buckets, congestion)
        assert reads.start(Asked(), [(1, 0, 4096)], [4096]) == []
        sched.run(10 * NS_PER_S, [])
        while not arrived:
            backend.ring.enter(min_complete=1)
            backend.reap()
        backend.close()
    assert congestion.value == 0


def direct_set(directory: Path) -> HostOptions:
    """A new set of files that an engine opens past the page cache."""
    make_set(directory, backing_bytes=SIZE_BYTES + 8192)
    try:
        open_device(str(directory / "cache.img"), direct=True).close()
    except DeviceError:
        pytest.skip("not here: a file system with direct I/O below the temporary directory")
    return HostOptions(cache=str(directory / "cache.img"), backings=(str(directory / "back0.img"),), direct=True)


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[Hosted]:
    """A set in writeback mode past the page cache, its loop asleep in the ring."""
    options = replace(direct_set(tmp_path), debug_checks=True,
                      tunables=(("cache_mode", "writeback"), ("writeback_running", "0"), ("sequential_cutoff", "0"),
                                ("congested_read_threshold_us", "0"), ("congested_write_threshold_us", "0")))
    with hosted(options, None) as engine:
        if not isinstance(engine.host.backend, RingBackend):
            pytest.skip("not here: io_uring")
        yield engine


def test_a_set_that_is_only_read_refuses_writes_as_ever(tmp_path: Path) -> None:
    options = direct_set(tmp_path)
    with hosted(options, None):
        pass                                    # a set that has never run cannot be read only
    with hosted(replace(options, read_only=True), None) as engine, NbdClient(engine.socket) as client:
        client.send(CMD_WRITE, 0, 4096, bytes(4096))
        assert client.receive().error == errno.EPERM
        client.send(CMD_READ, 0, 4096)
        assert client.receive().data == bytes(4096)


@pytest.mark.parametrize("structured", [False, True])
def test_reads_and_writes_in_flight_together(direct: Hosted, structured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[int] = []
    serve_placed = nbd_direct.serve_placed

    def counted(dev: CachedDev, request: Request) -> None:
        placed.append(dev.batch.placed.count)
        serve_placed(dev, request)

    monkeypatch.setattr(nbd_direct, "serve_placed", counted)
    dice = random.Random(4)
    image = bytearray(dice.randbytes(SIZE_BYTES))
    with NbdClient(direct.socket, structured=structured) as client:
        client.write(0, image)
        client.flush()
        for _ in range(40):
            # What is in flight together lies apart, so that each read has one right answer.
            blocks = dice.sample(range(SIZE_BYTES // 65536), 60)
            asked = {}
            for block in blocks:
                offset = block * 65536 + dice.randrange(0, 4) * 512
                length = dice.choice((512, 4096, 4096, 4096, 12288, 32768))
                if dice.random() < 0.5:
                    asked[client.send(CMD_READ, offset, length)] = (offset, length)
                else:
                    image[offset:offset + length] = data = dice.randbytes(length)
                    client.send(CMD_WRITE, offset, length, data, FLAG_FUA if dice.random() < 0.1 else 0)
            while client.in_flight:
                reply = client.receive()
                assert reply.error == 0
                if reply.cookie in asked:
                    offset, length = asked[reply.cookie]
                    assert reply.data == image[offset:offset + length]
        assert client.read_all(1 << 20) == image
    assert sum(placed) > 100
    assert max(placed) > 1, "no writes went together"
    assert direct.nbd.direct_reads is not None
    assert is_idle(direct.nbd.direct_reads)
    volume = direct.host.cset.devices[0]
    assert not volume.ranges.writes
    assert not volume.dirty_writers
    # A read may be answered a moment before its bucket is let go.
    until_s = time.monotonic() + 20
    while int(direct.host.cset.buckets.pin.max()) > 1:
        assert time.monotonic() < until_s, "a bucket is pinned for ever"
        time.sleep(0.01)


def test_a_client_that_takes_its_answers_late(direct: Hosted) -> None:
    """More than the socket holds waits to be sent, and the slots are free for others meanwhile."""
    image = random.Random(5).randbytes(SIZE_BYTES)
    with NbdClient(direct.socket) as client, NbdClient(direct.socket) as other:
        client.write(0, image)
        asked = {client.send(CMD_READ, offset, 65536): offset for offset in range(0, SIZE_BYTES, 65536)}
        for offset in range(0, SIZE_BYTES, 40960):
            assert other.read(offset, 4096) == image[offset:offset + 4096]
        while client.in_flight:
            reply = client.receive()
            assert reply.error == 0
            offset = asked[reply.cookie]
            assert reply.data == image[offset:offset + 65536]
        assert client.read_all(1 << 20) == image
    assert direct.nbd.direct_reads is not None
    assert is_idle(direct.nbd.direct_reads)


def test_placed_writes_that_fail(direct: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients hear of it, and what was there before is there still."""
    image = random.Random(6).randbytes(1 << 20)
    backend, failed = direct.host.backend, []
    assert isinstance(backend, RingBackend)
    submit = backend.submit

    def failing(ios: list[Io]) -> None:
        for io in ios:
            if io.what == "data of placed writes":
                io.error = errno.EIO
                failed.append(io)
                backend.done.append(io)
        submit([io for io in ios if not io.error])

    with NbdClient(direct.socket) as client:
        client.write(0, image)
        client.flush()
        monkeypatch.setattr(backend, "submit", failing)
        cookies = [client.send(CMD_WRITE, block * 8192, 4096, bytes(4096)) for block in range(20)]
        for _ in cookies:
            assert client.receive().error == errno.EIO
        monkeypatch.undo()
        assert client.read_all(65536)[:len(image)] == image
        client.write(8192, bytes(4096))
        assert client.read(8192, 4096) == bytes(4096)
    assert failed
    assert not direct.host.cset.devices[0].ranges.writes
