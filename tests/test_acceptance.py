# SPDX-License-Identifier: GPL-2.0-only
"""The judge must be able to say no: each kind of loss it looks for is made, and found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance import Acceptance, acceptance_of_run
from tests.conftest import TESTS
from tests.stamps import Op, content, draw, tag

pytestmark = pytest.mark.unit
SIZE_BYTES = 64 << 10


def put(volume: bytearray, write_tag: int, offset_bytes: int, length_bytes: int) -> None:
    volume[offset_bytes:offset_bytes + length_bytes] = content(write_tag, offset_bytes, length_bytes)


def test_settled_writes_must_be_there() -> None:
    acceptance, volume = Acceptance(SIZE_BYTES), bytearray(SIZE_BYTES)
    acceptance.acknowledge_write(acceptance.send_write(5, 4096, 8192))
    assert not acceptance.judge(volume), "not flushed: may be lost"
    flush = acceptance.send_flush()
    assert not acceptance.judge(volume), "flush not acknowledged: may be lost"
    acceptance.acknowledge_flush(flush)
    assert acceptance.judge(volume)
    put(volume, 5, 4096, 8192)
    assert not acceptance.judge(volume)
    volume[4096 + 512:4096 + 1024] = bytes(512)
    assert len(acceptance.judge(volume)) == 1, "one sector lost"


def test_a_write_that_was_never_sent_is_refused() -> None:
    acceptance, volume = Acceptance(SIZE_BYTES), bytearray(SIZE_BYTES)
    put(volume, 7, 0, 4096)
    assert acceptance.judge(volume)


def test_older_content_is_refused_after_a_flush_and_allowed_before() -> None:
    acceptance, volume = Acceptance(SIZE_BYTES), bytearray(SIZE_BYTES)
    acceptance.acknowledge_write(acceptance.send_write(1, 0, 4096))
    acceptance.settle_all()
    acceptance.acknowledge_write(acceptance.send_write(2, 0, 4096))
    for write_tag in (1, 2):
        put(volume, write_tag, 0, 4096)
        assert not acceptance.judge(volume)
    volume[:4096] = bytes(4096)
    assert acceptance.judge(volume)
    acceptance.settle_all()
    put(volume, 1, 0, 4096)
    assert acceptance.judge(volume)


def test_a_flush_covers_what_was_acknowledged_before_it_was_sent() -> None:
    acceptance, volume = Acceptance(SIZE_BYTES), bytearray(SIZE_BYTES)
    write = acceptance.send_write(1, 0, 4096)
    flush = acceptance.send_flush()
    acceptance.acknowledge_write(write)
    acceptance.acknowledge_flush(flush)
    assert not acceptance.judge(volume), "it was still on its way"


def test_fua_settles_a_write_alone() -> None:
    acceptance, volume = Acceptance(SIZE_BYTES), bytearray(SIZE_BYTES)
    acceptance.acknowledge_write(acceptance.send_write(1, 8192, 4096))
    acceptance.acknowledge_write(acceptance.send_write(2, 0, 4096, fua=True))
    assert len(acceptance.judge(volume)) == 8
    put(volume, 2, 0, 4096)
    assert not acceptance.judge(volume)


def test_torn_sectors_and_wrong_places_are_refused() -> None:
    acceptance, volume = Acceptance(SIZE_BYTES), bytearray(SIZE_BYTES)
    acceptance.acknowledge_write(acceptance.send_write(1, 0, 4096))
    put(volume, 1, 0, 4096)
    volume[256:512] = bytes(256)
    assert "torn" in acceptance.judge(volume)[0]
    put(volume, 1, 0, 4096)
    volume[0:512] = content(1, 512, 512)
    assert acceptance.judge(volume), "right write, wrong place"


def test_what_a_kill_left_open_stays_open_until_it_is_written() -> None:
    first, volume = Acceptance(SIZE_BYTES), bytearray(SIZE_BYTES)
    first.acknowledge_write(first.send_write(1, 0, 4096))
    first.settle_all()
    first.acknowledge_write(first.send_write(2, 0, 8192))
    put(volume, 1, 0, 4096)
    assert not first.judge(volume)
    second = first.carry_over(volume)
    assert not second.judge(volume)
    put(volume, 2, 0, 8192)
    assert not second.judge(volume), "the other value comes up"
    third = second.carry_over(volume)
    put(volume, 1, 0, 4096)
    assert not third.judge(volume), "and goes again"
    put(volume, 0, 0, 4096)
    assert third.judge(volume), "but never what was settled over"
    third.acknowledge_write(third.send_write(3, 0, 4096))
    third.settle_all()
    put(volume, 1, 0, 4096)
    assert third.judge(volume)
    put(volume, 3, 0, 4096)
    assert not third.judge(volume)


def test_zeroes() -> None:
    acceptance = Acceptance(SIZE_BYTES, content(1, 0, SIZE_BYTES))
    acceptance.acknowledge_write(acceptance.send_write(0, 0, 4096, zeroes=True))
    acceptance.settle_all()
    assert acceptance.judge(content(1, 0, SIZE_BYTES))
    assert not acceptance.judge(bytes(4096) + content(1, 0, SIZE_BYTES)[4096:])


def test_run_by_numbers() -> None:
    plan = [Op(0, False, 0, 4096, True), Op(1, True, 0, 4096, False), Op(2, False, 0, 4096, True),
            Op(3, True, 0, 4096, False), Op(4, False, 4096, 4096, False), Op(5, False, 8192, 4096, False)]
    acceptance = acceptance_of_run(plan, seed=9, last_acknowledged=2, acceptance=Acceptance(SIZE_BYTES))
    volume = bytearray(SIZE_BYTES)
    assert acceptance.judge(volume), "the flush after write 0 was over when write 2 was acknowledged"
    put(volume, tag(9, 0), 0, 4096)
    assert not acceptance.judge(volume)
    put(volume, tag(9, 4), 4096, 4096)
    assert not acceptance.judge(volume), "write 4 may have been under way"
    put(volume, tag(9, 5), 8192, 4096)
    assert acceptance.judge(volume), "write 5 cannot have been"


def test_draw_is_that_of_the_golden_workload(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.write_bytes(bytes(1 << 20))
    arguments = {"seed": 3, "ops": 300, "max_kib": 32, "hot": 0.3}
    command = [sys.executable, str(TESTS / "golden" / "workload.py"), str(device), str(tmp_path / "out.json")]
    for name, value in arguments.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    expected = bytearray(1 << 20)
    written_bytes = 0
    for op in draw(size_bytes=1 << 20, reads=0.3, **arguments):   # type: ignore[arg-type]
        if not op.is_read:
            put(expected, tag(3, op.number), op.offset_bytes, op.length_bytes)
            written_bytes += op.length_bytes
    assert device.read_bytes() == expected
    assert json.loads((tmp_path / "out.json").read_text())["bytes_written"] == written_bytes
