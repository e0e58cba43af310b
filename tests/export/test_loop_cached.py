# SPDX-License-Identifier: GPL-2.0-only
"""A loop device's small writes that the engine takes in batches, and reads in many extents: what was acknowledged is
there, whichever way it went.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from bcachectl.engine.export import fuse
from bcachectl.engine.export.fuse import FuseFile
from bcachectl.engine.export.host import HostOptions
from bcachectl.engine.export.loopdev import LoopExport
from tests.block_client import BlockClient
from tests.export import test_read_extents as extents
from tests.export.faulty import Hosted, hosted
from tests.export.test_engine_run import make_set
from tests.export.test_write_batch import SIZE_BYTES, send_many, taken
from tests.over import only
from tests.require import need, need_root

__all__ = ["taken"]


@pytest.fixture(autouse=True)
def _machine() -> None:
    only("loop", "small writes over FUSE")
    need_root()
    need(os.path.exists("/dev/fuse") and os.path.exists("/dev/loop-control"), "FUSE and loop devices")


@pytest.fixture
def running(tmp_path: Path, taken: list[int]) -> Iterator[Hosted]:
    """A set in writeback mode with something dirty, on a loop device."""
    make_set(tmp_path, cache_bytes=128 << 20, backing_bytes=SIZE_BYTES + 8192, bucket="128k")
    options = HostOptions(cache=str(tmp_path / "cache.img"), backings=(str(tmp_path / "back0.img"),), debug_checks=True,
                          use_nbd=False, use_loop=True,
                          tunables=(("cache_mode", "writeback"), ("writeback_running", "0"), ("sequential_cutoff", "0"),
                                    ("congested_read_threshold_us", "0"), ("congested_write_threshold_us", "0")))
    with hosted(options, make_faults=None) as engine:
        with client_of(engine) as client:
            client.write(0, bytes(SIZE_BYTES))
        taken.clear()
        yield engine


def client_of(engine: Hosted) -> BlockClient:
    device = engine.host.ready()[0].device
    assert device is not None
    return BlockClient(device)


def file_of(engine: Hosted) -> FuseFile:
    (export,) = engine.host.block_exports.values()
    assert isinstance(export, LoopExport)
    return export.file


@pytest.mark.parametrize("gathered_bytes", [fuse.MAX_GATHERED_BYTES, 16384])
def test_what_was_acknowledged_is_there(running: Hosted, taken: list[int], gathered_bytes: int,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """With the smaller limit many a large write takes the arena with it in which small ones of the same turn lie."""
    monkeypatch.setattr(fuse, "MAX_GATHERED_BYTES", gathered_bytes)
    dice = random.Random(1)
    image = bytearray(SIZE_BYTES)
    with client_of(running) as client:
        for _ in range(4):
            send_many(client, image, dice, 250)
            assert client.read_all() == image
    assert sum(taken) > 50, sum(taken)
    assert max(taken) > 1, "no batch of several writes"


def test_a_write_that_fails_begins_anew(running: Hosted, taken: list[int], tmp_path: Path) -> None:
    dice = random.Random(2)
    image = bytearray(SIZE_BYTES)
    file = file_of(running)
    good, file._write_fd = file._write_fd, os.open(tmp_path / "cache.img", os.O_RDONLY)
    with client_of(running) as client:
        send_many(client, image, dice, 200)
        assert client.read_all() == image
        assert not sum(taken)
        os.close(file._write_fd)
        file._write_fd = good
        send_many(client, image, dice, 200)
        assert client.read_all() == image
    assert sum(taken)


def test_reads_in_many_extents(tmp_path: Path) -> None:
    """With gaps that only the backing device has, and with half of the cache not in memory."""
    make_set(tmp_path, backing_bytes=extents.SIZE_BYTES + 8192)
    with (tmp_path / "back0.img").open("r+b") as file:
        file.seek(8192)
        file.write(extents.content())
    options = HostOptions(cache=str(tmp_path / "cache.img"), backings=(str(tmp_path / "back0.img"),), debug_checks=True,
                          use_nbd=False, use_loop=True,
                          tunables=(("sequential_cutoff", "0"), ("congested_read_threshold_us", "0"),
                                    ("congested_write_threshold_us", "0")))
    dice, image = random.Random(4), extents.content()
    with hosted(options, make_faults=None) as engine, client_of(engine) as client:
        for turn in range(6):
            extents.scatter(client, image, dice, 40)
            if turn % 2:
                extents.forget_half(file_of(engine)._read_fd)
            extents.compare(client, image, dice, 40)
        assert client.read_all() == image
        (volume,) = engine.host.cset.volumes
        assert volume.stats.cache_hits > 100
