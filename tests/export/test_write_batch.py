# SPDX-License-Identifier: GPL-2.0-only
"""Small writes over NBD that the engine takes in batches: what was acknowledged is there, whichever way it went."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from bcachectl.engine import cached_dev
from bcachectl.engine.export.host import HostOptions
from bcachectl.engine.write_batch import WriteBatch
from tests.export.engine import Engine
from tests.export.faulty import Hosted, hosted
from tests.export.test_engine_run import make_set
from tests.nbd_client import CMD_READ, CMD_WRITE, FLAG_FUA, NbdClient
from tests.over import Client

SIZE_BYTES = 8 << 20


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many writes each batch took."""
    sizes: list[int] = []

    class Counting(WriteBatch):
        def commit(self, duration_ns: int) -> None:
            sizes.append(self.placed.count)
            super().commit(duration_ns)

    monkeypatch.setattr(cached_dev, "WriteBatch", Counting)
    return sizes


@pytest.fixture
def running(tmp_path: Path, taken: list[int]) -> Iterator[Hosted]:
    """A set in writeback mode with something dirty, whose cache may be written at once."""
    make_set(tmp_path, backing_bytes=SIZE_BYTES + 8192)
    options = HostOptions(cache=str(tmp_path / "cache.img"), backings=(str(tmp_path / "back0.img"),), debug_checks=True,
                          tunables=(("cache_mode", "writeback"), ("writeback_running", "0"), ("sequential_cutoff", "0"),
                                    ("congested_read_threshold_us", "0"), ("congested_write_threshold_us", "0")))
    with hosted(options) as engine:
        fd = os.open(tmp_path / "cache.img", os.O_RDWR)
        engine.nbd.quick_write_fd = fd
        with engine.client() as client:
            client.write(0, bytes(SIZE_BYTES))
        yield engine
    os.close(fd)


def send_many(client: Client, image: bytearray, dice: random.Random, count: int) -> None:
    """Writes of all sizes that do not overlap, many at once, with reads and FUA writes among them."""
    position = 0
    for _ in range(count):
        length = dice.choice((512, 4096, 4096, 4096, 4096, 8192, 20480, 32768, 65536, 66048))
        position += dice.randrange(0, 8) * 512
        if dice.random() < 0.9:
            position = -(-position // 4096) * 4096          # else it bypasses the cache
        if position + length > SIZE_BYTES:
            break
        data = dice.randbytes(length)
        client.send(CMD_WRITE, position, length, data, FLAG_FUA if dice.random() < 0.1 else 0)
        image[position:position + length] = data
        if dice.random() < 0.2:
            client.send(CMD_READ, position, length)         # either is right: both are in flight
        position += length
    while client.in_flight:
        assert client.receive().error == 0


def test_what_was_acknowledged_is_there(running: Hosted, taken: list[int]) -> None:
    dice = random.Random(1)
    image = bytearray(SIZE_BYTES)
    with running.client() as client:
        for _ in range(4):
            send_many(client, image, dice, 250)
            assert client.read_all() == image
    assert sum(taken) > 200, taken
    assert max(taken) > 1, "no batch of several writes"


def test_a_write_that_fails_begins_anew(running: Hosted, taken: list[int], tmp_path: Path) -> None:
    dice = random.Random(2)
    image = bytearray(SIZE_BYTES)
    server = running.nbd
    good, server.quick_write_fd = server.quick_write_fd, os.open(tmp_path / "cache.img", os.O_RDONLY)
    with running.client() as client:
        send_many(client, image, dice, 200)
        assert client.read_all() == image
        assert not sum(taken)
        os.close(server.quick_write_fd)
        server.quick_write_fd = good
        send_many(client, image, dice, 200)
        assert client.read_all() == image
    assert sum(taken)


def test_a_write_that_comes_in_pieces(running: Hosted, taken: list[int]) -> None:
    dice = random.Random(3)
    with NbdClient(running.socket) as client:
        data = dice.randbytes(20480)
        taken.clear()
        client._socket.sendall(header(1, 4096, 8192) + data[:5000])
        client._socket.sendall(data[5000:8192] + header(2, 65536, 12288)[:11])
        client._socket.sendall(header(2, 65536, 12288)[11:] + data[8192:])
        assert [client._socket.recv(16, 0x100)[8:] for _ in range(2)] == [bytes(7) + b"\1", bytes(7) + b"\2"]
        assert client.read(4096, 8192) == data[:8192]
        assert client.read(65536, 12288) == data[8192:]
    assert sum(taken) == 2


def test_a_request_that_ends_beyond_64_bits_is_refused(running: Hosted, taken: list[int]) -> None:
    """Offset and length together are small again in 64 bits."""
    with NbdClient(running.socket) as client:
        taken.clear()
        for command, data, error in ((CMD_READ, b"", errno.EINVAL), (CMD_WRITE, bytes([7]) * 8192, errno.ENOSPC)):
            client.send(command, (1 << 64) - 4096, 8192, data)
            assert client.receive().error == error
        assert client.read(0, 8192) == bytes(8192)
    assert not taken


def header(cookie: int, offset: int, length: int) -> bytes:
    """A write request without its payload."""
    return (0x25609513).to_bytes(4, "big") + bytes((0, 0, 0, 1)) + cookie.to_bytes(8, "big") \
        + offset.to_bytes(8, "big") + length.to_bytes(4, "big")


def test_after_a_kill(tmp_path: Path) -> None:
    """What was flushed is there when the engine was killed; nothing is lost that was written in batches before."""
    make_set(tmp_path, backing_bytes=SIZE_BYTES + 8192)
    words = ["--cache", tmp_path / "cache.img", "--backing", tmp_path / "back0.img", "--export", "nbd",
             "--set", "cache_mode=writeback"]
    image = bytearray(SIZE_BYTES)
    with Engine(tmp_path, *words) as engine:
        with engine.client() as client:
            client.write(0, bytes(SIZE_BYTES))
            for seed in range(3):
                send_many(client, image, random.Random(seed), 250)
            client.flush()
            engine.kill()
    with Engine(tmp_path, *words) as engine, engine.client() as client:
        assert client.read_all() == image
