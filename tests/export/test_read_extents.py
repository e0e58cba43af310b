# SPDX-License-Identifier: GPL-2.0-only
"""Large reads over NBD, which lie in many extents: whatever lies where, the client gets what was written."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from bcachectl.engine.cached_dev import CachedDev
from bcachectl.engine.export.host import HostOptions
from bcachectl.engine.export.nbd_connection import Connection
from bcachectl.engine.node import Node
from tests.export.faulty import Hosted, hosted
from tests.export.test_engine_run import make_set
from tests.nbd_client import CMD_READ, CMD_WRITE, NbdClient
from tests.over import Client, only

SIZE_BYTES = 16 << 20


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Hosted]:
    """A set on a backing device of known content, the cache file read as it is."""
    only("nbd", "reads from the page cache")
    make_set(tmp_path, backing_bytes=SIZE_BYTES + 8192, mode="writethrough")
    with (tmp_path / "back0.img").open("r+b") as file:
        file.seek(8192)
        file.write(random.Random(7).randbytes(SIZE_BYTES))
    options = HostOptions(cache=str(tmp_path / "cache.img"), backings=(str(tmp_path / "back0.img"),), debug_checks=True,
                          tunables=(("sequential_cutoff", "0"), ("congested_read_threshold_us", "0"),
                                    ("congested_write_threshold_us", "0")))
    with hosted(options, make_faults=None) as engine:
        yield engine


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the reads that became requests."""
    lengths: list[int] = []
    ask = Connection.request

    def request(self: Connection, magic: int, flags: int, command: int, cookie: int, offset: int, length: int) -> None:
        if command == CMD_READ:
            lengths.append(length)
        ask(self, magic, flags, command, cookie, offset, length)

    monkeypatch.setattr(Connection, "request", request)
    return lengths


def content() -> bytearray:
    return bytearray(random.Random(7).randbytes(SIZE_BYTES))


def scatter(client: Client, image: bytearray, dice: random.Random, count: int) -> None:
    """Writes of all sizes anywhere: extents of all sizes, with gaps between them that only the backing device has."""
    for _ in range(count):
        length = dice.choice((512, 4096, 4096, 12288, 65536, 262144))
        offset = dice.randrange(0, (SIZE_BYTES - length) // 512) * 512
        data = dice.randbytes(length)
        client.write(offset, data)
        image[offset:offset + length] = data


def forget_half(fd: int) -> None:
    """Take every other 64 KiB of a file out of memory."""
    os.fsync(fd)
    for start in range(0, os.fstat(fd).st_size, 128 << 10):
        os.posix_fadvise(fd, start, 64 << 10, os.POSIX_FADV_DONTNEED)


def compare(client: Client, image: bytearray, dice: random.Random, count: int) -> None:
    """Large reads, many at once."""
    asked: dict[int, tuple[int, int]] = {}
    for _ in range(count):
        length = dice.choice((131072 + 512, 262144, 1 << 20, 1 << 20, dice.randrange(257, 2048) * 512))
        offset = dice.randrange(0, (SIZE_BYTES - length) // 512) * 512
        asked[client.send(CMD_READ, offset, length)] = offset, length
        if dice.random() < 0.3:
            asked[client.send(CMD_READ, offset, 4096)] = offset, 4096
    while client.in_flight:
        reply = client.receive()
        offset, length = asked.pop(reply.cookie)
        assert reply.error == 0
        assert reply.data == image[offset:offset + length], (offset, length)


@pytest.mark.parametrize("structured", [True, False])
def test_what_was_written_is_read(running: Hosted, structured: bool) -> None:
    dice, image = random.Random(1), content()
    with NbdClient(running.socket, structured=structured) as client:
        for _ in range(6):
            scatter(client, image, dice, 40)
            compare(client, image, dice, 40)
        assert client.read_all() == image


def test_an_extent_that_is_not_in_memory(running: Hosted, asked: list[int]) -> None:
    """Then the read is a request; here for half of the cache device."""
    dice, image = random.Random(2), content()
    with NbdClient(running.socket, structured=True) as client:
        scatter(client, image, dice, 100)
        client.read_all()
        fd = running.nbd.quick_fd
        for _ in range(4):
            forget_half(fd)
            asked.clear()
            compare(client, image, dice, 30)
            assert asked or not running.nbd.nowait_flag


@pytest.mark.parametrize("structured", [True, False])
def test_it_is_one_read_served_at_once(running: Hosted, asked: list[int], structured: bool) -> None:
    (volume,) = running.host.cset.volumes
    assert isinstance(volume, CachedDev)
    data = os.urandom(196608)
    with NbdClient(running.socket, structured=structured) as client:
        client.write(0, data)
        leaf = volume.cset.btree.root
        assert isinstance(leaf, Node)
        assert len(leaf.ends) >= 6, "buckets have 32 KiB"
        before, sectors = volume.stats.read_requests, volume.stats.read_sectors
        assert client.read(0, len(data)) == data
        assert volume.stats.read_requests == before + 1
        assert volume.stats.read_sectors == sectors + 384
    assert not asked


def test_a_client_that_takes_nothing_for_a_while(running: Hosted) -> None:
    """More than the arena holds waits to be sent, among writes."""
    dice, image = random.Random(5), content()
    with NbdClient(running.socket, structured=True) as client:
        client.read_all()
        asked = {client.send(CMD_READ, index << 20, 1 << 20): index << 20 for index in range(SIZE_BYTES >> 20)}
        written = {client.send(CMD_WRITE, (index << 20) + 4096, 4096, dice.randbytes(4096)): index
                   for index in range(0, SIZE_BYTES >> 20, 5)}
        while client.in_flight:
            reply = client.receive()
            assert reply.error == 0
            if reply.cookie in asked:
                start = asked[reply.cookie]
                assert len(reply.data) == 1 << 20
                assert reply.data[8192:] == image[start + 8192:start + (1 << 20)]
        assert len(written) == 4
