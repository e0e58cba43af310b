# SPDX-License-Identifier: GPL-2.0-only
"""The client of a block device, on a loop device, whose file says what has become of its requests; and the seam."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import over
from tests.block_client import BlockClient
from tests.nbd_client import CMD_FLUSH, CMD_READ, CMD_WRITE, FLAG_FUA

SIZE_BYTES = 16 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(SIZE_BYTES))
    return path


@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_one_thing_at_a_time(image: Path, loop_device: Callable[..., str], sector_bytes: int) -> None:
    """Requests of all sizes, those smaller than a sector and larger than a worker's memory among them."""
    model = bytearray(image.read_bytes())
    dice = random.Random(2)
    with BlockClient(loop_device(image, sector_bytes=sector_bytes)) as client:
        assert (client.size_bytes, client.block_bytes) == (SIZE_BYTES, sector_bytes)
        for number in range(60):
            length = 512 * dice.choice((1, 8, 9, 100, 1000, 5000))
            start = dice.randrange((SIZE_BYTES - length) // 512) * 512
            if number % 3:
                model[start:start + length] = data = dice.randbytes(length)
                client.write(start, data, fua=number % 2 == 0)
            assert client.read(start, length) == model[start:start + length]
        client.flush()
        client.trim(1 << 20, 1 << 20)
        client.write_zeroes(8 << 20, 1 << 20, fua=True)
        model[8 << 20:9 << 20] = bytes(1 << 20)
        assert client.read(8 << 20, 1 << 20) == bytes(1 << 20)
        model[1 << 20:2 << 20] = client.read(1 << 20, 1 << 20)      # whatever a trim leaves
        assert client.read_all() == model
        with pytest.raises(OSError, match=r"command 0, 4096 bytes at 16777216") as caught:
            client.read(SIZE_BYTES, 4096)
        assert caught.value.errno == errno.EINVAL
    assert image.read_bytes() == model


def test_many_at_once(image: Path, loop_device: Callable[..., str]) -> None:
    model = bytearray(image.read_bytes())
    dice = random.Random(3)
    with BlockClient(loop_device(image)) as client:
        asked = {}
        for start in range(0, SIZE_BYTES, 65536):
            if dice.random() < 0.5:
                model[start:start + 65536] = data = dice.randbytes(65536)
                client.send(CMD_WRITE, start, 65536, data, FLAG_FUA if dice.random() < 0.1 else 0)
            else:
                asked[client.send(CMD_READ, start, 65536)] = start
        client.send(CMD_FLUSH, 0, 0)
        assert client.in_flight == SIZE_BYTES // 65536 + 1
        while client.in_flight:
            reply = client.receive()
            assert reply.error == 0
            if reply.cookie in asked:
                assert reply.data == model[asked[reply.cookie]:][:65536]
    assert image.read_bytes() == model


def test_a_device_that_cannot_be_written(image: Path, loop_device: Callable[..., str]) -> None:
    with BlockClient(loop_device(image, read_only=True)) as client:
        with pytest.raises(PermissionError):
            client.write(0, bytes(4096))
        with pytest.raises(PermissionError):
            client.trim(0, 4096)
        client.flush()
        assert len(client.read(0, 4096)) == 4096


def test_the_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--cache", "nbd", "--export", "nbd", "--debug-checks"]
    assert over.exported(words) == words
    monkeypatch.setattr(over, "EXPORT", "ublk")
    monkeypatch.setattr(over, "left_by_the_dead", list)
    assert over.exported(words) == ["--cache", "nbd", "--export", "ublk", "--debug-checks"]
    assert over.exported(["--export", "loop"]) == ["--export", "ublk"]
    assert over.exported(["--export=nbd"]) == ["--export=nbd"]
    monkeypatch.setattr(over, "left_by_the_dead", lambda: ["a device"])
    assert over.exported(words) == ["--cache", "nbd", "--export", "ublk", "--recover", "--debug-checks"]
    with pytest.raises(pytest.skip.Exception, match="only over nbd: its socket"):
        over.only("nbd", "its socket")
