# SPDX-License-Identifier: GPL-2.0-only
"""Opening devices: what is refused, and that what is written is read back."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import time
from pathlib import Path

import pytest

from bcachectl import blockdev
from bcachectl.blockdev import is_parity_raid, open_device
from bcachectl.errors import DeviceError


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(64 << 10))
    return path


def test_missing_directory_character_device_and_empty_file_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for path, word in ((tmp_path / "none", "no such file"), (tmp_path, "directory"),
                       (Path("/dev/null"), "character device"), (empty, "empty")):
        with pytest.raises(DeviceError, match=word) as caught:
            open_device(str(path))
        assert str(path) in str(caught.value)
        assert caught.value.errno


def test_written_bytes_are_read_back(image: Path) -> None:
    with open_device(str(image), write=True) as device:
        assert (device.size_bytes, device.logical_block_bytes, device.is_block) == (64 << 10, 512, False)
        device.write(4096, b"x" * 512)
        device.flush()
        assert device.read(4096, 512) == b"x" * 512
        device.zero(4096, 1024)
        assert device.read(4096, 1024) == bytes(1024)


def test_a_hole_is_punched(image: Path) -> None:
    with open_device(str(image), write=True) as device:
        device.flush()
        before = os.fstat(device.fd).st_blocks
        device.discard(8192, 32768)
        assert device.read(8192, 32768) == bytes(32768)
        assert os.fstat(device.fd).st_blocks < before
        assert device.size_bytes == image.stat().st_size


def test_ranges_outside_are_refused(image: Path) -> None:
    with open_device(str(image), write=True) as device:
        for call in (lambda: device.read(65536, 1), lambda: device.write(65535, b"ab"), lambda: device.read(-1, 1)):
            with pytest.raises(DeviceError, match="the device ends at byte 65536"):
                call()
    assert image.stat().st_size == 65536


def test_read_only_refuses_every_write(image: Path) -> None:
    before = image.read_bytes()
    with open_device(str(image)) as device:
        for call in (lambda: device.write(0, b"a"), lambda: device.discard(0, 512), lambda: device.zero(0, 512)):
            with pytest.raises(DeviceError) as caught:
                call()
            assert caught.value.errno == errno.EROFS
    assert image.read_bytes() == before


def test_one_writer_at_a_time(image: Path) -> None:
    with open_device(str(image), write=True, exclusive=True):
        for write in (True, False):
            with pytest.raises(DeviceError, match="in use"):
                open_device(str(image), write=write, exclusive=True)
        open_device(str(image)).close()
    with open_device(str(image), exclusive=True), open_device(str(image), exclusive=True):
        pass


def test_direct_io_takes_unaligned_buffers(image: Path) -> None:
    try:
        device = open_device(str(image), write=True, direct=True)
    except DeviceError:
        pytest.skip("this file system has no direct I/O")
    with device:
        expected = image.read_bytes()
        assert device.read(100, 5000) == expected[100:5100]
        device.write(4096, memoryview(b"?" + b"y" * 4096)[1:])
        assert device.read(4096, 4096) == b"y" * 4096
        with pytest.raises(DeviceError, match="logical block"):
            device.write(4096, b"short")


def test_direct_io_is_aligned_as_the_file_system_says(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        with open_device(str(image), write=True, direct=True) as device:
            told_bytes = device.logical_block_bytes
    except DeviceError:
        pytest.skip("this file system has no direct I/O")
    assert told_bytes in (512, 1024, 2048, 4096)
    # A kernel that does not tell: the same is found out by reading.
    monkeypatch.setattr(blockdev, "_STATX_DIOALIGN", 0)
    with open_device(str(image), write=True, direct=True) as device:
        assert device.logical_block_bytes == told_bytes


@pytest.mark.parametrize(("alignments", "expected_bytes"), [((4, 512), 512), ((512, 4096), 4096), ((4096, 512), 4096),
                                                            ((0, 0), 0), ((512, 65536), 0)])
def test_what_a_file_system_says_of_direct_io(image: Path, monkeypatch: pytest.MonkeyPatch,
                                              alignments: tuple[int, int], expected_bytes: int) -> None:
    class Libc:
        @staticmethod
        def statx(_fd: int, _path: bytes, _flags: int, mask: int, buf: ctypes.Array[ctypes.c_char]) -> int:
            struct.pack_into("=I", buf, 0, mask)
            struct.pack_into("=II", buf, 152, *alignments)
            return 0

    try:
        open_device(str(image), direct=True).close()
    except DeviceError:
        pytest.skip("this file system has no direct I/O")
    monkeypatch.setattr(blockdev, "_libc", Libc)
    if not expected_bytes:
        with pytest.raises(DeviceError, match="does not take direct I/O"):
            open_device(str(image), direct=True)
        return
    with open_device(str(image), direct=True) as device:
        assert device.logical_block_bytes == expected_bytes
        assert device.read(100, 5000) == image.read_bytes()[100:5100]


def make_disk(sysfs: Path, name: str, number: int, *, level: str = "", slaves: tuple[str, ...] = ()) -> Path:
    """A disk as sysfs shows it."""
    disk = sysfs / "devices" / name
    (disk / "slaves").mkdir(parents=True)
    (disk / "dev").write_text(f"9:{number}\n")
    (sysfs / "dev/block").mkdir(parents=True, exist_ok=True)
    (sysfs / "dev/block" / f"9:{number}").symlink_to(disk)
    if level:
        (disk / "md").mkdir()
        (disk / "md" / "level").write_text(f"{level}\n")
    for slave in slaves:
        (disk / "slaves" / slave).symlink_to(sysfs / "devices" / slave)
    return disk


def test_a_raid_with_parity_is_known_below_partitions_and_mappings(tmp_path: Path) -> None:
    make_disk(tmp_path, "md5", 5, level="raid5")
    make_disk(tmp_path, "md1", 1, level="raid1", slaves=("sda",))
    make_disk(tmp_path, "sda", 10)
    make_disk(tmp_path, "dm-0", 20, slaves=("md1", "md5"))
    make_disk(tmp_path, "dm-1", 21, slaves=("dm-0",))
    make_disk(tmp_path, "dm-2", 22, slaves=("md1",))
    partition = tmp_path / "devices/md5/md5p1"
    partition.mkdir()
    (tmp_path / "dev/block/9:6").symlink_to(partition)
    found = {number: is_parity_raid(os.makedev(9, number), sys=str(tmp_path)) for number in (5, 1, 10, 20, 21, 22, 6)}
    assert found == {5: True, 1: False, 10: False, 20: True, 21: True, 22: False, 6: True}
    assert not is_parity_raid(os.makedev(9, 99), sys=str(tmp_path))


def test_what_is_announced_is_in_memory_when_it_is_read(tmp_path: Path) -> None:
    image = tmp_path / "image"
    content = bytes(range(256)) * 4096
    image.write_bytes(content)
    with open_device(str(image), write=True) as device:
        device.flush()
        os.posix_fadvise(device.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        device.announce(4096, 8192)
        device.announce(1 << 40, 4096)                          # what is not there is said by the read
        buf = bytearray(8192)
        for _ in range(1000):
            try:
                assert os.preadv(device.fd, [buf], 4096, device.nowait_flag) == len(buf)
                break
            except BlockingIOError:
                time.sleep(0.01)
        assert bytes(buf) == content[4096:12288]
        with pytest.raises(DeviceError):
            device.read(1 << 40, 4096)
