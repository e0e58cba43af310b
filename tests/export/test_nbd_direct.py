# SPDX-License-Identifier: GPL-2.0-only
"""Read hits that go past the engine's tasks into the ring, as they do on a cache device with direct I/O."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from bcachectl.engine.export.host import HostOptions
from bcachectl.engine.export.nbd_direct import MAX_FLIGHTS, DirectReads
from bcachectl.engine.io.uring import RingBackend
from tests.export.faulty import Hosted, hosted
from tests.export.test_engine_run import make_set
from tests.nbd_client import CMD_READ, CMD_WRITE, NbdClient

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
    """Hits are read from ``path`` from now on."""
    host = running.host
    assert host.nbd is not None
    assert isinstance(host.backend, RingBackend)
    reads = DirectReads(host.backend, os.open(path, os.O_RDONLY), host.cset.buckets, host.cset.congestion, host.sched)
    host.nbd.direct_reads = reads
    return reads


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
    assert len(reads.free) == MAX_FLIGHTS
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
    assert len(reads.free) == MAX_FLIGHTS
