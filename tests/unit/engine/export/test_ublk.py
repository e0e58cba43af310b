# SPDX-License-Identifier: GPL-2.0-only
"""The ublk export without a ublk driver: layouts, command numbers, marks, and what is lacking."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from bcachectl.engine.export import ublk_control
from bcachectl.engine.export import ublk_wire as wire
from bcachectl.errors import WrongState


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
