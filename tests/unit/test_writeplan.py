# SPDX-License-Identifier: GPL-2.0-only
"""Plans of writes: the order of writes and flushes, and undo plans for writes that overlap."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bcachectl.blockdev import BlockDevice, open_device
from bcachectl.errors import DeviceError, Refused
from bcachectl.writeplan import (
    Plan,
    Write,
    apply,
    apply_with_undo,
    describe,
    read_undo,
    save_undo,
    undo_path,
    undo_plan,
)


class Recorder:
    """A device that notes what is asked of it."""

    def __init__(self, name: str, log: list[tuple[Any, ...]], *, can_discard: bool = True) -> None:
        self.name = name
        self.log = log
        self.can_discard = can_discard

    def write(self, offset_bytes: int, data: bytes) -> None:
        self.log.append((self.name, "write", offset_bytes, data))

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        self.log.append((self.name, "zero", offset_bytes, length_bytes))

    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        self.log.append((self.name, "discard", offset_bytes, length_bytes))

    def flush(self) -> None:
        self.log.append((self.name, "flush"))


def test_each_step_is_durable_before_the_next() -> None:
    log: list[tuple[Any, ...]] = []
    devices: Any = {"a": Recorder("a", log), "b": Recorder("b", log, can_discard=False)}
    plan = Plan("test", (
        (Write("a", 0, 512, "one"), Write("b", 512, 3, "two", b"abc"), Write("a", 1024, 2, "three", b"de")),
        (Write("b", 0, 4096, "four", discard=True), Write("a", 0, 4096, "five", discard=True)),
        (Write("b", 0, 1, "six", b"x"),)))
    apply(plan, devices)
    assert log == [
        ("a", "zero", 0, 512), ("b", "write", 512, b"abc"), ("a", "write", 1024, b"de"), ("a", "flush"), ("b", "flush"),
        ("a", "discard", 0, 4096), ("b", "flush"), ("a", "flush"),
        ("b", "write", 0, b"x"), ("b", "flush")]
    assert describe(plan)[3] == "b: discard 4096 bytes at byte 0: four"
    assert len(describe(plan)) == len(plan.writes) == 6


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(64 << 10))
    return path


def test_overlapping_writes_are_taken_back_in_reverse(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    name = str(image)
    plan = Plan("test", (
        (Write(name, 0, 4096, "zeros"), Write(name, 1024, 1024, "middle", b"m" * 1024)),
        (Write(name, 512, 1024, "later", b"l" * 1024), Write(name, 60 << 10, 4096, "end", b"e" * 4096))))
    with open_device(name, write=True) as device:
        save_undo(plan, {name: device}, tmp_path / "undo")
        apply(plan, {name: device})
        assert image.read_bytes()[512:1536] == b"l" * 1024
        verb, entries, saved = read_undo(tmp_path / "undo")
        back = undo_plan(verb, entries, saved, {name: device}, force_changed=False)
        assert [write.what for write in back.writes] == [
            "end, as before test", "later, as before test", "middle, as before test", "zeros, as before test"]
        apply(back, {name: device})
    assert image.read_bytes() == before


def test_what_could_not_be_read_is_written_and_not_put_back(image: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A superblock in a bad sector can be repaired; there is nothing to go back to, and the rest goes back."""
    before, name = image.read_bytes(), str(image)
    writes = Write(name, 4096, 4096, "superblock", b"s" * 4096), Write(name, 0, 512, "other", b"o" * 512)
    plan = Plan("test", (writes,))
    read = BlockDevice.read

    def failing(device: BlockDevice, offset_bytes: int, nbytes: int) -> bytes:
        if offset_bytes == 4096:
            raise DeviceError("read failed", errno=5)
        return read(device, offset_bytes, nbytes)

    with open_device(name, write=True) as device:
        with monkeypatch.context() as patch:
            patch.setattr(BlockDevice, "read", failing)
            apply_with_undo(plan, {name: device}, tmp_path / "undo")
        verb, entries, saved = read_undo(tmp_path / "undo")
        apply(undo_plan(verb, entries, saved, {name: device}, force_changed=False), {name: device})
    assert image.read_bytes() == before[:4096] + b"s" * 4096 + before[8192:]


def test_half_applied_plan_is_taken_back_too(image: Path, tmp_path: Path) -> None:
    """Power failed between two steps: what was not written yet is as before, which is as good as after."""
    before = image.read_bytes()
    name = str(image)
    plan = Plan("test", ((Write(name, 0, 4096, "one", b"1" * 4096),), (Write(name, 8192, 4096, "two", b"2" * 4096),)))
    with open_device(name, write=True) as device:
        save_undo(plan, {name: device}, tmp_path / "undo")
        apply(Plan("test", plan.steps[:1]), {name: device})
        verb, entries, saved = read_undo(tmp_path / "undo")
        apply(undo_plan(verb, entries, saved, {name: device}, force_changed=False), {name: device})
        assert image.read_bytes() == before
        device.write(8192, b"x")
        with pytest.raises(Refused, match="changed after test"):
            undo_plan(verb, entries, saved, {name: device}, force_changed=False)


def test_undo_file_of_a_link_names_the_device(image: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(image)
    with open_device(str(link)) as device:
        save_undo(Plan("test", ((Write(str(link), 0, 512, "one"),),)), {str(link): device}, tmp_path / "undo")
    assert read_undo(tmp_path / "undo")[1][0]["device"] == str(image)


def test_undo_names_are_not_taken_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    first = undo_path("wipe", ["/dev/sda", "b.img"], now_s=1000)
    assert first == tmp_path / "bcachectl/undo/wipe-sda+b.img-1000.undo"
    first.parent.mkdir(parents=True)
    first.touch()
    assert undo_path("wipe", ["/dev/sda", "b.img"], now_s=1000).name == "wipe-sda+b.img-1000-2.undo"
    assert len(undo_path("wipe", ["x" * 300], now_s=1000).name) < 120


def test_a_torn_write_counts_as_unchanged(tmp_path: Path) -> None:
    """Power failed in the middle: some sectors are old, some new; a sector that is neither is refused."""
    path = tmp_path / "device"
    path.write_bytes(b"o" * 4096)
    undo = tmp_path / "undo"
    plan = Plan("fsck", ((Write(str(path), 0, 2048, "node", b"n" * 2048),),))
    with open_device(str(path), write=True) as device:
        save_undo(plan, {str(path): device}, undo)
        verb, entries, saved = read_undo(undo)
        devices = {entries[0]["device"]: device}
        device.write(512, b"n" * 1024)
        assert len(undo_plan(verb, entries, saved, devices, force_changed=False).writes) == 1
        device.write(1600, b"x")
        with pytest.raises(Refused, match="was changed after fsck"):
            undo_plan(verb, entries, saved, devices, force_changed=False)
