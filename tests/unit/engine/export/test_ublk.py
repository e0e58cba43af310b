# SPDX-License-Identifier: GPL-2.0-only
"""The ublk export without a ublk driver: layouts, command numbers, marks, and what is lacking."""

from __future__ import annotations

import errno
import os
import struct
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bcachectl.blockdev import BlockDevice, open_device
from bcachectl.engine.buckets import Buckets
from bcachectl.engine.export import ublk, ublk_control
from bcachectl.engine.export import ublk_wire as wire
from bcachectl.engine.export.ublk import UblkExport
from bcachectl.engine.export.ublk_control import UblkControl
from bcachectl.engine.front import (
    NOT_NOW,
    REQ_DISCARD,
    REQ_FLUSH,
    REQ_FUA,
    REQ_META,
    REQ_READ,
    REQ_WRITE,
    REQ_WRITE_ZEROES,
    Front,
    Request,
)
from bcachectl.engine.io.loop import Loop, make_backend, make_sched
from bcachectl.engine.io.uring import RingBackend
from bcachectl.engine.node import HAS_PTR, Node
from bcachectl.engine.read_batch import ReadBatch
from bcachectl.engine.sched import NS_PER_S
from bcachectl.errors import DeviceError, WrongState
from bcachectl.ondisk.bkey import MAX_POS
from bcachectl.ondisk.geometry import Geometry


@pytest.mark.parametrize(("command", "number"), [
    (wire.ADD_DEV, 0xC0207504), (wire.DEL_DEV, 0xC0207505), (wire.START_DEV, 0xC0207506), (wire.STOP_DEV, 0xC0207507),
    (wire.SET_PARAMS, 0xC0207508), (wire.GET_PARAMS, 0x80207509), (wire.GET_DEV_INFO, 0x80207502),
    (wire.START_USER_RECOVERY, 0xC0207510), (wire.END_USER_RECOVERY, 0xC0207511), (wire.GET_FEATURES, 0x80207513),
    (wire.DEL_DEV_ASYNC, 0x80207514), (wire.FETCH_REQ, 0xC0107520), (wire.COMMIT_AND_FETCH_REQ, 0xC0107521),
])
def test_commands_have_the_numbers_of_the_header(command: int, number: int) -> None:
    assert wire.encoded(command) == number


def test_device_information_goes_there_and_back() -> None:
    info = wire.DevInfo(queues=2, depth=64, state=wire.STATE_QUIESCED, max_io_bytes=512 << 10, dev_id=7, pid=4321,
                        flags=wire.F_USER_RECOVERY | wire.F_CMD_IOCTL_ENCODE, mark=0x1122334455667788)
    raw = info.encode()
    assert wire.decode_dev_info(raw) == info
    assert struct.unpack_from("<HH", raw, 0) == (2, 64)
    assert struct.unpack_from("<I", raw, 8) == (512 << 10,)
    assert struct.unpack_from("<I", raw, 12) == (7,)
    assert struct.unpack_from("<Q", raw, 24) == (info.flags,)
    assert struct.unpack_from("<Q", raw, 32) == (info.mark,)


def params(**changes: int) -> wire.Params:
    wanted = {"size_sectors": 12345, "block_bytes": 4096, "max_io_bytes": 512 << 10, "read_only": False,
              "max_discard_sectors": 2048, "max_zeroes_sectors": 4096} | changes
    return wire.Params(**wanted)  # type: ignore[arg-type]


def test_parameters_say_what_is_true() -> None:
    raw = params().encode()
    length, types, attributes = struct.unpack_from("<III", raw)
    assert (length, types) == (60, 3)
    assert attributes == wire.ATTR_VOLATILE_CACHE | wire.ATTR_FUA
    assert raw[12:16] == bytes([12, 12, 12, 12])
    assert struct.unpack_from("<I", raw, 16) == (1024,)
    assert wire.decode_size_sectors(raw) == 12345
    alignment, granularity, discard, zeroes, segments = struct.unpack_from("<IIIIH", raw, 40)
    assert (alignment, granularity, discard, zeroes, segments) == (0, 4096, 2048, 4096, 1)


def test_what_is_not_known_below_is_not_announced() -> None:
    raw = params(max_discard_sectors=0, max_zeroes_sectors=0, block_bytes=512).encode()
    assert struct.unpack_from("<I", raw, 4) == (1,)
    assert raw[12:16] == bytes([9, 9, 9, 9])
    assert raw[40:] == bytes(20)
    assert struct.unpack_from("<I", params(read_only=True).encode(), 8)[0] & wire.ATTR_READ_ONLY


def test_marks_tell_sets_and_volumes_apart() -> None:
    one, two = bytes(range(16)), bytes(range(16, 32))
    marks = {ublk_control.mark_of(cset, volume) for cset in (one, two) for volume in (one, two)}
    assert len(marks) == 4
    assert len({mark >> 32 for mark in marks}) == 2
    assert all(mark >> 32 and mark & 0xFFFFFFFF for mark in marks), "0 is what a server without marks leaves there"
    assert ublk_control.mark_of(one, two) == ublk_control.mark_of(one, two)


def test_a_kernel_without_the_driver_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ublk_control, "CONTROL_PATH", str(tmp_path / "ublk-control"))
    assert not ublk_control.is_available()
    with pytest.raises(WrongState, match=r"not loaded; load it \(modprobe ublk_drv.*--export nbd"):
        ublk_control.UblkControl()


def test_something_else_at_its_place_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ublk_control, "CONTROL_PATH", str(tmp_path))
    with pytest.raises(WrongState, match="needs root and the kernel's module"):
        ublk_control.UblkControl()


# An export whose device is a plain file: its mapping shows what the test writes there, and every command for it fails
# (EOPNOTSUPP), so that a commit which the kernel began is told from one that it never began (ECANCELED).

DEV_ID = 3


@pytest.mark.parametrize(("answer", "waits"), [(0, False), (errno.ENODEV, False), (errno.EOPNOTSUPP, True)])
def test_a_device_is_forgotten_without_waiting_for_who_has_it_open(answer: int, waits: bool) -> None:
    asked = []

    class Control(UblkControl):
        def __init__(self) -> None:
            self.fd = -1

        def _command(self, command: int, dev_id: int, *, data: int = 0, buffer: bytearray | None = None,
                     limit_s: float | None = None) -> int:
            asked.append((command, limit_s))
            if answer and command == wire.DEL_DEV_ASYNC:
                raise OSError(answer, os.strerror(answer))
            return 0

    Control().delete(0)
    assert asked[0] == (wire.DEL_DEV_ASYNC, None)
    assert asked[1:] == ([(wire.DEL_DEV, ublk_control.DELETE_TIMEOUT_S)] if waits else [])


class FakeVolume:
    """A volume that says where its sectors are, and keeps what it is asked.  ``place`` is the byte on the cache device
    where each read lies.
    """

    name, uuid, label = "bcache0", bytes(16), ""
    size_sectors, block_size_sectors, read_only = 4096, 8, False
    base = data_offset = 0
    serves_hits = True
    batch = exported = None

    def __init__(self, place: int, buckets: Buckets) -> None:
        self.place = place
        self.requests: list[Request] = []
        self.leaf = Node(ptr=0, bucket=1, level=0, end=MAX_POS, seq=0, nblocks=1, bucket_shift=buckets.bucket_shift)
        self.reads = ReadBatch(self, cast(Any, SimpleNamespace(btree=SimpleNamespace(root=self.leaf), buckets=buckets)))

    def map(self, sector: int, nsectors: int) -> None:
        """Have one extent."""
        if self.place != NOT_NOW:
            self.leaf.ends, self.leaf.meta, self.leaf.ptrs = (
                array("Q", [sector + nsectors]), array("I", [nsectors | HAS_PTR]), array("Q", [self.place >> 9 << 8]))

    def count_hits(self, hits: ReadBatch) -> None:
        """Nobody asks."""

    def submit(self, request: Request) -> None:
        """Keep it."""
        self.requests.append(request)

    def submit_all(self, requests: list[Request]) -> None:
        """Keep them."""
        self.requests += requests


class FakeControl:
    """The numbers of commands, for a driver that knows ioctl numbers; its devices have 100 tags."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def add(self, **_: int) -> wire.DevInfo:
        """As `UblkControl.add`."""
        self.asked.append("add")
        return wire.DevInfo(1, 100, 0, 64 << 10, DEV_ID, 1, 0, 1)

    def set_params(self, _dev_id: int, _params: wire.Params) -> None:
        """As `UblkControl.set_params`."""

    def stop(self, _dev_id: int) -> None:
        """As `UblkControl.stop`."""
        self.asked.append("stop")

    def delete(self, _dev_id: int) -> None:
        """As `UblkControl.delete`."""
        self.asked.append("delete")

    def io_command(self, command: int) -> int:
        """As `UblkControl.io_command`."""
        return wire.encoded(command)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[BlockDevice]:
    path = tmp_path / "cache.img"
    path.write_bytes(b"".join(b"%4095d\n" % number for number in range(32)))
    with open_device(str(path), write=True) as device:
        yield device


@dataclass
class Set:
    """An export and what the test needs of it."""

    export: UblkExport
    volume: FakeVolume
    backend: RingBackend
    buckets: Buckets
    device: Path

    def ask(self, tag: int, operation: int, sector: int, nsectors: int) -> None:
        """What the driver does: a descriptor, and the completion of the tag's fetch."""
        with self.device.open("r+b") as file:
            file.seek(tag * wire.IO_DESC.size)
            file.write(wire.IO_DESC.pack(operation, nsectors, sector, 0))
        self.volume.map(sector, nsectors)
        reads = self.export._reads
        assert reads is not None
        reads.arrivals.put(tag, 0)
        reads.serve()
        reads.finish()

    def settle(self) -> None:
        """Everything that the ring has begun comes to its end."""
        for _ in range(4):
            self.backend.wait(0, 0.05)


@pytest.fixture
def served(image: BlockDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Set]]:
    device = tmp_path / "ublkc"
    device.write_bytes(bytes(4096))
    monkeypatch.setattr(ublk, "_open_when_there", lambda path: os.open(device, os.O_RDWR))
    made: list[Set] = []

    def serve(place: int) -> Set:
        backend = make_backend([image], waited_in=True)
        assert isinstance(backend, RingBackend)
        buckets = Buckets(Geometry(block_size_sectors=8, bucket_size_sectors=8, nbuckets=32, first_bucket=1))
        volume = FakeVolume(place, buckets)
        loop = Loop(make_sched(), backend, Front())
        export = UblkExport(loop, backend, cast(Any, FakeControl()), volume, image, buckets, mark=1,
                            stream=1, block_bytes=512, can_discard=True, can_zero=True)
        export._open(wire.DevInfo(1, 8, 0, 64 << 10, DEV_ID, 1, 0, 1))
        made.append(Set(export, volume, backend, buckets, device))
        made[-1].settle()
        assert export._ended == 8, "the fetches have failed, for this is no ublk device"
        export._ended = 0
        return made[-1]

    yield serve
    for one in made:
        one.export.abort()
        one.export.loop.close()
        one.backend.close()


def test_a_read_hit_is_read_and_answered_by_the_kernel(served: Callable[[int], Set], image: BlockDevice) -> None:
    one = served(8192)
    one.ask(2, wire.OP_READ, 16, 8)
    assert list(one.buckets.pin_at) == [0, 0, 1, *[0] * 29], "nobody may reuse the bucket while it is read"
    one.settle()
    assert one.export._buffers[2][:4096] == image.read(8192, 4096)
    assert one.export._ended == 1, "the commit was begun"
    assert not any(one.buckets.pin_at)
    assert one.volume.requests == []


def test_a_read_that_is_short_goes_to_the_volume(served: Callable[[int], Set], image: BlockDevice) -> None:
    """As one that fails; the volume knows what to do about it."""
    one = served(image.size_bytes - 4096)
    one.ask(5, wire.OP_READ, 40, 16)
    one.settle()
    (request,) = one.volume.requests
    assert (request.op, request.sector, request.nsectors, len(request.buf)) == (REQ_READ, 40, 16, 8192)
    assert one.export._ended == 0, "the tag was not answered"
    assert not any(one.buckets.pin_at)
    request.error = errno.EIO
    request.tag.answered(request)
    assert one.backend.ring.sqe_i32[16 * (one.export._first_slot + 5) + wire.IO_CMD_RESULT_WORD] == -errno.EIO
    one.settle()
    assert one.export._ended == 1


@pytest.mark.parametrize(("word", "operation", "flags", "has_data"), [
    (wire.OP_READ, REQ_READ, 0, True),
    (wire.OP_WRITE, REQ_WRITE, 0, True),
    (wire.OP_WRITE | wire.FLAG_FUA | wire.FLAG_META, REQ_WRITE, REQ_FUA | REQ_META, True),
    (wire.OP_DISCARD, REQ_DISCARD, 0, False),
    (wire.OP_WRITE_ZEROES, REQ_WRITE_ZEROES, 0, False),
    (wire.OP_FLUSH, REQ_FLUSH, 0, False),
])
def test_other_requests_go_to_the_volume(served: Callable[[int], Set], word: int, operation: int, flags: int,
                                         has_data: bool) -> None:
    one = served(NOT_NOW)
    one.ask(7, word, 24, 8)
    (request,) = one.volume.requests
    assert (request.op, request.flags) == (operation, flags)
    assert (request.buf is not None) == has_data
    assert (request.sector, request.nsectors) == ((0, 0) if operation == REQ_FLUSH else (24, 8))
    request.tag.answered(request)
    result = one.backend.ring.sqe_i32[16 * (one.export._first_slot + 7) + wire.IO_CMD_RESULT_WORD]
    assert result == (4096 if operation in (REQ_READ, REQ_WRITE) else 0)


def test_an_operation_that_nobody_knows(served: Callable[[int], Set]) -> None:
    one = served(NOT_NOW)
    one.ask(0, 15, 24, 8)
    assert one.volume.requests == []
    assert one.backend.ring.sqe_i32[16 * one.export._first_slot + wire.IO_CMD_RESULT_WORD] == -errno.EOPNOTSUPP


def test_a_device_that_the_ring_has_no_room_for_is_taken_away_again(
        image: BlockDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fetch was begun, so none comes back; whoever waited for them would wait for ever."""
    device = tmp_path / "ublkc"
    device.write_bytes(bytes(4096))
    monkeypatch.setattr(ublk, "_open_when_there", lambda path: os.open(device, os.O_RDWR))
    backend = RingBackend([image], waited_in=True)
    loop = Loop(make_sched(), backend, Front())
    control = FakeControl()
    buckets = Buckets(Geometry(block_size_sectors=8, bucket_size_sectors=8, nbuckets=32, first_bucket=1))
    export = UblkExport(loop, backend, cast(Any, control), FakeVolume(NOT_NOW, buckets), image, buckets,
                        mark=1, stream=1, block_bytes=512, can_discard=True, can_zero=True)

    async def start() -> None:
        task = loop.sched.spawn(export.start(), "start")
        task.observed = True
        await loop.sched.sleep_until(loop.sched.now_ns + 10 * NS_PER_S)
        assert task.done, "it waits for what never comes"
        await task

    try:
        with pytest.raises(DeviceError, match="no room for another device"):
            loop.run(start())
    finally:
        loop.close()
        backend.close()
    assert control.asked == ["add", "stop", "delete"]
