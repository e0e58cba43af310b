# SPDX-License-Identifier: GPL-2.0-only
"""The loop export: a real block device that the kernel, mkfs and fio use; nothing is left behind."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl.engine.export import loopdev
from bcachectl.engine.front import REQ_FLUSH, REQ_WRITE_ZEROES
from tests import over
from tests.export.served import serve
from tests.over import EXPORT
from tests.require import need, need_root

SIZE_BYTES = 64 << 20
_BLKDISCARD, _BLKZEROOUT, _BLKGETSIZE64 = 0x1277, 0x127F, 0x80081272


@pytest.fixture(autouse=True)
def _machine() -> None:
    need_root()
    need(os.path.exists("/dev/fuse"), "/dev/fuse")
    need(os.path.exists("/dev/loop-control"), "loop devices")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image0"
    path.write_bytes(random.Random(1).randbytes(SIZE_BYTES))
    return path


def is_left_behind(directory: Path) -> list[str]:
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8")
    devices = [entry.name for entry in Path("/sys/block").glob("loop*")
               if (loopdev.backing_file(entry.name) or "").startswith(str(directory))]
    if EXPORT:
        devices += [f"ublkb{info.dev_id}" for info in over.devices()]
    return devices + [line for line in mounts.splitlines() if str(directory) in line] \
        + [str(path) for path in directory.glob("*")]


@pytest.mark.parametrize("is_quick", [True, False])
def test_reads_writes_flushes_and_holes(image: Path, tmp_path: Path, is_quick: bool) -> None:
    model = bytearray(image.read_bytes())
    draw = random.Random(5)
    directory = tmp_path / "run"
    with serve([image], tmp_path / "s", is_quick=is_quick, loop_directory=directory) as served:
        (device,) = served.devices
        assert loopdev.backing_file(device) == str(directory / "bcache0")
        assert Path("/sys/block", Path(device).name, "loop/dio").read_text() == "1\n"
        fd = os.open(device, os.O_RDWR | os.O_DIRECT)
        try:
            number = struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
            assert number == SIZE_BYTES
            with mmap.mmap(-1, 2 << 20) as memory, memoryview(memory) as view:
                for _ in range(150):
                    start = draw.randrange(SIZE_BYTES // 512 - 4096) * 512
                    length = draw.choice((512, 4096, 4096, 65536, 1 << 20, 2 << 20))
                    if draw.random() < 0.5:
                        view[:length] = data = draw.randbytes(length)
                        model[start:start + length] = data
                        assert os.pwritev(fd, [view[:length]], start) == length
                    else:
                        assert os.preadv(fd, [view[:length]], start) == length
                        assert view[:length] == model[start:start + length]
            os.fsync(fd)
            assert REQ_FLUSH in [seen[0] for seen in served.volumes[0].seen]
            for request, start in ((_BLKDISCARD, 1 << 20), (_BLKZEROOUT, 8 << 20)):
                fcntl.ioctl(fd, request, struct.pack("QQ", start, 1 << 20))
                model[start:start + (1 << 20)] = bytes(1 << 20)
            assert REQ_WRITE_ZEROES in [seen[0] for seen in served.volumes[0].seen]
            with mmap.mmap(-1, 1 << 20) as memory:
                os.preadv(fd, [memory], 1 << 20)
                assert memory[:] == bytes(1 << 20)
        finally:
            os.close(fd)
    assert image.read_bytes() == bytes(model)
    assert is_left_behind(directory) == []


def test_ext4_lives_on_it(image: Path, tmp_path: Path, require_tool: Callable[[str], str]) -> None:
    mkfs, e2fsck, mount, umount = (require_tool(name) for name in ("mkfs.ext4", "e2fsck", "mount", "umount"))
    directory, point = tmp_path / "run", tmp_path / "point"
    point.mkdir()
    data = random.Random(6).randbytes(20 << 20)
    with serve([image], tmp_path / "s", loop_directory=directory) as served:
        (device,) = served.devices
        subprocess.run([mkfs, "-q", "-F", device], check=True)
        subprocess.run([mount, device, str(point)], check=True)
        try:
            (point / "file").write_bytes(data)
            os.sync()
        finally:
            subprocess.run([umount, str(point)], check=True)
        subprocess.run([e2fsck, "-fn", device], check=True, capture_output=True)
        subprocess.run([mount, "-o", "ro", device, str(point)], check=True)
        try:
            assert (point / "file").read_bytes() == data
        finally:
            subprocess.run([umount, str(point)], check=True)
    subprocess.run([e2fsck, "-fn", str(image)], check=True, capture_output=True)
    assert is_left_behind(directory) == []


def test_the_kernel_looks_for_partitions(image: Path, tmp_path: Path) -> None:
    # Which tables it knows is its own affair; the kernel's /dev/bcacheN may be partitioned, so this one may be.
    with serve([image], tmp_path / "s", loop_directory=tmp_path / "run") as served:
        (device,) = served.devices
        assert Path("/sys/block", Path(device).name, "loop/partscan").read_text() == "1\n"
    assert is_left_behind(tmp_path / "run") == []


def test_a_read_only_volume_is_a_read_only_device(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    with serve([image], tmp_path / "s", read_only=True, loop_directory=tmp_path / "run") as served:
        (device,) = served.devices
        assert Path("/sys/block", Path(device).name, "ro").read_text() == "1\n"
        with open(device, "rb") as file:
            assert file.read(1 << 20) == before[:1 << 20]
    assert image.read_bytes() == before


_KILLED = """
import sys, time
from pathlib import Path
from tests import over
from tests.export.served import serve
from tests.over import EXPORT
with serve([Path(sys.argv[1])], Path(sys.argv[2]), loop_directory=Path(sys.argv[3])) as served:
    print(served.devices[0], flush=True)
    time.sleep(60)
"""


def test_what_a_killed_engine_left_is_cleaned_up(image: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    root = Path(__file__).resolve().parents[2]
    engine = subprocess.Popen([sys.executable, "-c", _KILLED, str(image), str(tmp_path / "s"), str(directory)],
                              stdout=subprocess.PIPE, text=True, cwd=root)
    assert engine.stdout is not None
    device = engine.stdout.readline().strip()
    assert device.startswith("/dev/loop")
    with open(device, "rb") as file:
        file.read(4096)
    engine.send_signal(signal.SIGKILL)
    engine.wait(10)
    assert loopdev.is_stale(str(directory / "bcache0"))
    with serve([image], tmp_path / "s", loop_directory=directory) as served:
        with open(served.devices[0], "rb") as file:
            assert file.read(4096) == image.read_bytes()[:4096]
    assert is_left_behind(directory) == []


def read_until_it_fails(device: str) -> None:
    for _ in range(50):
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, 4096) as memory:
                os.preadv(fd, [memory], 0)
        finally:
            os.close(fd)
        time.sleep(0.05)


def test_a_failing_engine_takes_its_device_away(image: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"

    async def bug() -> None:
        raise ZeroDivisionError

    def story() -> None:
        with serve([image], tmp_path / "s", loop_directory=directory, is_quick=False) as served:
            served.loop.sched.spawn(bug(), "bug")
            with pytest.raises(OSError):
                read_until_it_fails(served.devices[0])

    with pytest.raises(ZeroDivisionError):
        story()
    assert is_left_behind(directory) == []
