# SPDX-License-Identifier: GPL-2.0-only
"""Groups of writes of a ublk device, on a running set in image files.

The driver is played by a file: its mapping shows what the test asks, and every command for it fails at once, which says
that the engine has answered.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bcachectl.engine import exported_writes, write_group
from bcachectl.engine.cached_dev import CachedDev
from bcachectl.engine.export import ublk, ublk_writes
from bcachectl.engine.export import ublk_wire as wire
from bcachectl.engine.export.host import EngineHost, HostOptions
from bcachectl.engine.export.ublk import UblkExport
from bcachectl.engine.front import REQ_READ, REQ_WRITE, Request
from bcachectl.engine.io.uring import RingBackend
from bcachectl.engine.node import Node
from bcachectl.engine.sched import Task
from bcachectl.engine.write_batch import Placed
from tests.vm.engine_side import bcachectl

TAGS, BUFFER_BYTES = 32, 64 << 10


class Control:
    """What the export asks of the driver's control device."""

    def io_command(self, command: int) -> int:
        """As `UblkControl.io_command`."""
        return wire.encoded(command)


class Answer:
    """Whom a request's answer goes to."""

    def answered(self, request: Request) -> None:
        """It was answered."""


class Device:
    """The export and what the test does with it; ``answers`` are the results by tag, as they came."""

    def __init__(self, host: EngineHost, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = host
        self.cset = host.cset
        volume = host.cset.volumes[0]
        assert isinstance(volume, CachedDev)
        self.volume = volume
        self.path = path
        path.write_bytes(bytes(4096))
        self.backend = RingBackend(list(host.media), waited_in=True)
        self.export = UblkExport(host.loop, self.backend, Control(), volume,  # type: ignore[arg-type]
                                 host.media[0], host.cset.buckets, mark=1, stream=1, block_bytes=4096,
                                 can_discard=True, can_zero=True)
        monkeypatch.setattr(ublk, "_open_when_there", lambda _path: os.open(path, os.O_RDWR))
        self.export._open(wire.DevInfo(1, TAGS, 0, BUFFER_BYTES, 0, 1, 0, 1))
        self.quiet_fd = os.eventfd(0)
        self.cache_fd = host.media[0].fd
        self.backend.wait(self.quiet_fd, 0.05)
        self.answers: list[tuple[int, int]] = []
        reads = self.export._reads
        assert reads is not None and reads.writes is not None, "the volume keeps writes back"
        self.reads, self.writes = reads, reads.writes
        self.content: dict[int, bytes] = {}
        self.first_commit = self.export._first_slot

    def ask(self, asked: dict[int, tuple[int, bytes]]) -> None:
        """Writes on tags, (sector, data) each, that come together."""
        with self.path.open("r+b") as file:
            for tag, (sector, data) in asked.items():
                file.seek(tag * wire.IO_DESC.size)
                file.write(wire.IO_DESC.pack(wire.OP_WRITE, len(data) >> 9, sector, 0))
                self.export._buffers[tag][:len(data)] = data
        for tag in asked:
            self.reads.arrivals.put(tag, 0)
        self.reads.serve()

    async def turn(self) -> None:
        """Whatever the ring and the engine have to do now."""
        self.backend.wait(self.quiet_fd, 0.002)
        await self.cset.sched.yield_now()

    async def answered(self, count: int) -> None:
        """Wait until so many more requests are answered."""
        count += self.export._ended
        until_s = time.monotonic() + 60             # a flush of the test's disk may take its time
        while self.export._ended < count:
            assert time.monotonic() < until_s, "never answered"
            await self.turn()

    def result(self, tag: int) -> int:
        """The answer to the tag's last request."""
        return int(self.backend.ring.sqe_i32[16 * (self.first_commit + tag) + wire.IO_CMD_RESULT_WORD])

    async def read(self, sector: int, nbytes: int) -> bytes:
        """What the volume has."""
        buf = bytearray(nbytes)
        request = Request(REQ_READ, sector, nbytes >> 9, buf, tag=Answer())
        self.volume.submit(request)
        while self.cset.requests_in_flight:
            await self.cset.idle.wait()
        assert not request.error
        return bytes(buf)

    def is_quiet(self) -> bool:
        """Nothing of a group is left over."""
        return not (self.volume.ranges.groups or self.volume.dirty_writers or self.writes.runs
                    or self.writes.group or self.cset.requests_in_flight)


Story = Callable[[Device], Awaitable[None]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Story], None]]:
    """Runs a story on a set that is known to be dirty."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    cache, backing = tmp_path / "cache.img", tmp_path / "backing.img"
    for path, size_bytes in ((cache, 512 << 20), (backing, 16 << 20)):
        with path.open("wb") as file:
            file.truncate(size_bytes)
    bcachectl("format", "--cache", cache, "--backing", backing, "--bucket-size", "64k", "--block-size", "4k",
              "--cache-mode", "writeback", directory=tmp_path)
    host = EngineHost(HostOptions(
        cache=str(cache), backings=(str(backing),), use_nbd=False, tail=str(tmp_path / "tail"), tunables=(
        ("congested_write_threshold_us", "0"), ("writeback_running", "0"))))

    def on(story: Story) -> None:
        async def whole() -> None:
            await host.start()
            device = Device(host, tmp_path / "ublkc", monkeypatch)
            first = Request(REQ_WRITE, 0, 8, bytes(4096), tag=Answer())
            device.volume.submit(first)
            while host.cset.requests_in_flight:
                await host.cset.idle.wait()
            await story(device)
            device.export.abort()
            for _ in range(200):
                await device.turn()
            assert device.is_quiet()
            device.backend.close()
            os.close(device.quiet_fd)
            await host.stop()

        host.loop.run(whole())

    yield on
    host.close()


def data_for(count: int, seed: int, *, kib: int = 4) -> list[bytes]:
    dice = random.Random(seed)
    return [dice.randbytes(kib << 10) for _ in range(count)]


def test_a_group_is_one_write_and_answered_when_its_keys_are_made(run: Callable[[Story], None]) -> None:
    async def story(device: Device) -> None:
        data = data_for(8, 1)
        device.ask({tag: (800 - 16 * tag, data[tag]) for tag in range(8)})
        assert device.writes.runs == 1, "the data of all lies side by side"
        assert device.volume.ranges.writing(device.volume.data_offset + 800, device.volume.data_offset + 801)
        assert device.export._ended == TAGS
        await device.answered(8)
        assert device.host.tail is not None and device.host.tail.has_more(), "nothing was flushed"
        assert device.is_quiet()
        for tag in range(8):
            assert device.result(tag) == 4096
            assert await device.read(800 - 16 * tag, 4096) == data[tag]
        assert device.volume.dirty_sectors == 8 * 9
    run(story)


def test_data_that_does_not_lie_side_by_side_is_several_writes(run: Callable[[Story], None]) -> None:
    """Some go on where another stream has written: into its bucket."""
    async def story(device: Device) -> None:
        for sector in (4096, 8192):
            device.volume.submit(Request(REQ_WRITE, sector, 8, bytes(4096), stream=sector, tag=Answer()))
        while device.cset.requests_in_flight:
            await device.cset.idle.wait()
        data = data_for(20, 2, kib=16)
        sectors = [64 * tag for tag in range(20)]
        sectors[5], sectors[12] = 4104, 8200
        device.ask({tag: (sectors[tag], data[tag]) for tag in range(20)})
        assert device.writes.runs >= 3, "two of them lie apart"
        await device.answered(20)
        for tag in range(20):
            assert device.result(tag) == 16384
            assert await device.read(sectors[tag], 16384) == data[tag]
    run(story)


def test_one_that_fails_begins_anew_by_itself(run: Callable[[Story], None]) -> None:
    """The entry is pointed at a descriptor that cannot be written; the requests still can."""
    async def story(device: Device) -> None:
        data = data_for(4, 3)
        bad_fd = os.open("/dev/zero", os.O_RDONLY)
        device.backend.ring.sqe_i32[16 * (device.first_commit + 2 * TAGS) + 1] = bad_fd
        device.ask({tag: (160 + 8 * tag, data[tag]) for tag in range(4)})
        assert device.writes.runs == 1
        await device.answered(4)
        os.close(bad_fd)
        assert device.is_quiet()
        assert [await device.read(160 + 8 * tag, 4096) for tag in range(4)] == data
        assert [device.result(tag) for tag in range(4)] == [4096] * 4
        assert device.cset.io_errors_seen == 1
    run(story)


def test_a_write_that_overlaps_a_group_comes_after_it(run: Callable[[Story], None]) -> None:
    async def story(device: Device) -> None:
        old, new = data_for(2, 4)
        device.ask({0: (320, old), 1: (400, old)})
        device.ask({2: (320, new)})
        assert device.writes.waiting == 1, "one group at a time"
        await device.answered(3)
        assert await device.read(320, 4096) == new
        assert await device.read(400, 4096) == old
    run(story)


def test_the_next_group_waits_for_as_many_though_not_for_long(run: Callable[[Story], None]) -> None:
    async def story(device: Device) -> None:
        data = data_for(6, 5)
        device.ask({tag: (8 * tag, data[tag]) for tag in range(4)})
        await device.answered(4)
        device.writes.until_ns = 1 << 62                # whatever the time is
        device.ask({0: (480, data[4])})
        assert (device.writes.waiting, device.writes.group, device.backend.ring.gathering) == (1, None, 1)
        device.ask({tag: (480 + 8 * tag, data[5]) for tag in (1, 2, 3)})
        assert (device.writes.waiting, device.writes.runs, device.backend.ring.gathering) == (0, 1, 0)
        await device.answered(4)
        device.ask({0: (640, data[4])})                 # and if the others do not come
        await device.answered(1)
        assert device.backend.ring.gathering == 0
        assert await device.read(640, 4096) == data[4]
    run(story)


def test_an_export_that_is_given_up_leaves_no_write_in_flight(run: Callable[[Story], None]) -> None:
    async def story(device: Device) -> None:
        device.ask({tag: (8 * tag, data) for tag, data in enumerate(data_for(4, 6))})
        device.ask({9: (640, data_for(1, 7)[0])})
        device.export.abort()
        assert device.volume.ranges.groups == []
        await device.turn()
        assert device.cset.requests_in_flight == 0
    run(story)


def test_errors_of_the_set_come_back(run: Callable[[Story], None]) -> None:
    """The set fails while the data is on its way: it gets no key."""
    async def story(device: Device) -> None:
        device.ask({0: (80, data_for(1, 8)[0])})
        device.cset.fail("a test wants it")
        await device.answered(1)
        assert device.volume.io_disable, "it holds dirty data"
        assert device.result(0) == -errno.EIO
        assert device.is_quiet()
    run(story)


def test_keys_that_have_to_wait(run: Callable[[Story], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the leaf were being split when the data is written."""
    async def story(device: Device) -> None:
        commit, found = write_group.commit_nowait, []

        def not_at_first(dev: CachedDev, placed: Placed) -> bool:
            found.append(len(found) > 0 and commit(dev, placed))
            return found[-1]

        for module in (exported_writes, write_group):
            monkeypatch.setattr(module, "commit_nowait", not_at_first)
        data = data_for(4, 9)
        device.ask({tag: (8 * tag, data[tag]) for tag in range(4)})
        await device.answered(4)
        assert found == [False, True]
        assert device.is_quiet()
        assert [await device.read(8 * tag, 4096) for tag in range(4)] == data
    run(story)


def counted_steps(device: Device, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often tasks of each name take a step from now on."""
    real, steps = device.cset.sched._step, Counter[str]()

    def step(task: Task[Any]) -> None:
        steps[task.name] += 1
        real(task)

    monkeypatch.setattr(device.cset.sched, "_step", step)
    return steps


def test_a_group_needs_no_task(run: Callable[[Story], None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(device: Device) -> None:
        steps = counted_steps(device, monkeypatch)
        device.cset.journal.delay_ms = 60_000
        for number in range(20):
            device.ask({tag: (8 * tag, data) for tag, data in enumerate(data_for(4, number))})
            await device.answered(4)
        assert steps["group of writes"] == 0
        assert steps["journal"] < 10, "one entry for all that come within its delay; others are of the prio buckets"
    run(story)


async def ask_of_a_frozen_leaf(device: Device, data: list[bytes]) -> Node:
    """Three writes of a leaf that is frozen, none of which is answered for a while; the leaf."""
    leaf = device.cset.btree.leaf_nowait(device.volume.base + device.volume.data_offset)
    assert leaf is not None
    leaf.frozen, ended = True, device.export._ended
    device.ask({tag: (8 * tag, data[tag]) for tag in range(3)})
    for _ in range(10):
        await device.turn()
    assert device.export._ended == ended
    return leaf


def test_writes_wait_for_a_leaf_that_is_made_anew(run: Callable[[Story], None],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in a group afterwards, and never tasks; others are not kept back."""
    async def story(device: Device) -> None:
        steps, data = counted_steps(device, monkeypatch), data_for(4, 3)
        monkeypatch.setattr(ublk_writes, "HOLD_NS", 60_000_000_000)
        leaf = await ask_of_a_frozen_leaf(device, data)
        assert (device.writes.waiting, device.writes.group) == (3, None)
        device.ask({3: (24, data[3])})
        leaf.frozen = False
        await device.answered(4)
        assert device.is_quiet()
        assert device.writes.held_ns == 0
        assert not steps["request"]
        assert [await device.read(8 * tag, 4096) for tag in range(4)] == data
    run(story)


def test_nothing_waits_for_ever(run: Callable[[Story], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the leaf is not ready for in time is left to the engine, whose task waits in its own way."""
    async def story(device: Device) -> None:
        steps, data = counted_steps(device, monkeypatch), data_for(3, 4)
        monkeypatch.setattr(ublk_writes, "HOLD_NS", 1)
        leaf = await ask_of_a_frozen_leaf(device, data)
        assert device.writes.waiting == 0
        assert steps["request"] >= 3
        leaf.frozen = False
        device.cset.btree.changed.wake_all()
        await device.answered(3)
        assert [await device.read(8 * tag, 4096) for tag in range(3)] == data
    run(story)


def test_leaves_are_made_anew_before_they_are_full(run: Callable[[Story], None],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no write has to become a task of its own."""
    async def story(device: Device) -> None:
        steps, dice = counted_steps(device, monkeypatch), random.Random(2)
        monkeypatch.setattr(ublk_writes, "HOLD_NS", 60_000_000_000)
        content: dict[int, bytes] = {}
        for number in range(150):
            sectors = [8 * place for place in dice.sample(range(2000), TAGS)]
            datas = data_for(TAGS, number, kib=4)
            device.ask({tag: (sector, data) for tag, (sector, data) in enumerate(zip(sectors, datas, strict=True))})
            content.update(zip(sectors, datas, strict=True))
            await device.answered(TAGS)
        assert device.cset.splitter.splits >= 3
        assert steps["make room"] >= 3
        assert not steps["request"]
        for sector in dice.sample(sorted(content), 100):
            assert await device.read(sector, 4096) == content[sector]
    run(story)
