# SPDX-License-Identifier: GPL-2.0-only
"""A block device dies under a running engine, from one request to the next, for good: every request ends with EIO.

The dying device is a loop device on a file that another process serves through FUSE; SIGKILL to that process is what
kills the device.  What was on it is still in the file, as on a disk whose cable was pulled, so the stories go on: with
the backing device alone, or with both devices plugged in again.
"""

from __future__ import annotations

import contextlib
import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bcachectl.ondisk.superblock import SB_BYTES, BdevState, decode_superblock
from tests.acceptance import Acceptance
from tests.export.engine import ROOT, Engine
from tests.over import Client
from tests.require import need_root
from tests.stamps import content, draw, tag
from tests.system.sets import MODES, make_set, need_loop_export, options, sentence

SIZE_BYTES = 48 << 20
DATA_OFFSET_BYTES = 8192
CLEAN_MODES = tuple(mode for mode in MODES if mode != "writeback")

_SERVER = """
import sys, time
from pathlib import Path
from tests.export.served import serve
with serve([Path(sys.argv[1])], Path(sys.argv[2], "s"), loop_directory=Path(sys.argv[2])) as served:
    print(served.devices[0], flush=True)
    time.sleep(300)
"""

Kill = Callable[[], None]


@contextlib.contextmanager
def mortal(image: Path, directory: Path) -> Iterator[tuple[Path, Kill]]:
    """A block device on an image, and what kills it."""
    directory.mkdir()
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(image), str(directory)], stdout=subprocess.PIPE,
                              text=True, cwd=ROOT)
    device = ""

    def kill() -> None:
        server.kill()
        server.wait(10)

    try:
        assert server.stdout is not None
        device = server.stdout.readline().strip()
        assert device.startswith("/dev/loop"), device
        yield Path(device), kill
    finally:
        kill()
        if server.stdout is not None:
            server.stdout.close()
        if device:
            subprocess.run(["losetup", "--detach", device], check=False)
        subprocess.run(["umount", "--lazy", str(directory / "bcache0")], check=False, capture_output=True)


class Story:
    """Stamped writes, one after the other; what they were answered, and what the volume may hold then."""

    def __init__(self) -> None:
        self.acceptance = Acceptance(SIZE_BYTES)
        self.seed = 0
        self.refused = 0

    def go(self, client: Client, ops: int) -> None:
        """Write, read and flush; errors are counted, wrong data is a failure."""
        self.seed += 1
        for op in draw(seed=self.seed, ops=ops, size_bytes=SIZE_BYTES, max_kib=64, flushes=0.05):
            write_tag = tag(self.seed, op.number)
            try:
                if op.is_read:
                    client.read(op.offset_bytes, op.length_bytes)
                else:
                    handle = self.acceptance.send_write(write_tag, op.offset_bytes, op.length_bytes)
                    client.write(op.offset_bytes, content(write_tag, op.offset_bytes, op.length_bytes))
                    self.acceptance.acknowledge_write(handle)
                if op.flush_after:
                    flush = self.acceptance.send_flush()
                    client.flush()
                    self.acceptance.acknowledge_flush(flush)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.ENOSPC):
                    raise
                self.refused += 1

    def flush(self, client: Client) -> None:
        flush = self.acceptance.send_flush()
        client.flush()
        self.acceptance.acknowledge_flush(flush)


def state_of(backing: Path) -> BdevState:
    with backing.open("rb") as file:
        file.seek(4096)
        return decode_superblock(file.read(SB_BYTES)).state


@pytest.mark.parametrize("mode", CLEAN_MODES)
def test_a_clean_cache_dies_and_nobody_notices(mode: str, tmp_path: Path) -> None:
    need_loop_export()
    cache, backing = tmp_path / "cache.img", tmp_path / "back0.img"
    make_set(tmp_path, cache_bytes=24 << 20, backing_bytes=SIZE_BYTES + DATA_OFFSET_BYTES, mode=mode)
    story = Story()
    with mortal(cache, tmp_path / "fuse") as (device, kill):
        with Engine(tmp_path, *options(device, backing), "--export", "nbd") as engine, \
                engine.client() as client:
            story.go(client, 400)
            kill()
            story.go(client, 400)
            story.flush(client)
            found = client.read_all()
            assert engine.stop() == 1
            assert "the set has failed" in sentence(engine.errors)
    assert story.refused == 0
    assert story.acceptance.judge(found) == []
    with backing.open("rb") as file:
        file.seek(DATA_OFFSET_BYTES)
        assert file.read() == found
    assert state_of(backing) == BdevState.NONE


def test_a_dirty_cache_dies_and_its_volume_is_stopped(tmp_path: Path) -> None:
    need_loop_export()
    cache, backing = tmp_path / "cache.img", tmp_path / "back0.img"
    make_set(tmp_path, cache_bytes=32 << 20, backing_bytes=SIZE_BYTES + DATA_OFFSET_BYTES, mode="writeback")
    story = Story()
    with mortal(cache, tmp_path / "fuse") as (device, kill):
        with Engine(tmp_path, *options(device, backing), "--export", "nbd") as engine, \
                engine.client() as client:
            story.go(client, 200)
            kill()
            story.go(client, 300)
            assert story.refused > 100
            with pytest.raises(OSError, match="Input/output error"):
                client.read(0, 4096)
            assert engine.stop() == 1
            assert "the set has failed" in sentence(engine.errors)
    # Its dirty data is on the cache, so it does not come up without it.
    assert state_of(backing) == BdevState.DIRTY
    other = tmp_path / "other"
    other.mkdir()
    make_set(other, cache_bytes=24 << 20, backing_bytes=32 << 20)
    with Engine(other, *options(other / "cache.img", backing), "--export", "nbd", expect_failure=True) as engine:
        assert "belongs to set" in sentence(engine.errors)
        assert engine.status == 4
    # Plugged in again, all is there.
    with Engine(tmp_path, *options(cache, backing), "--export", "nbd") as engine, engine.client() as client:
        assert story.acceptance.judge(client.read_all()) == []
        assert engine.stop() == 0
        assert engine.errors == ""


@pytest.mark.parametrize("mode", MODES)
def test_the_backing_device_dies(mode: str, tmp_path: Path) -> None:
    need_loop_export()
    cache, backing = tmp_path / "cache.img", tmp_path / "back0.img"
    make_set(tmp_path, cache_bytes=32 << 20, backing_bytes=SIZE_BYTES + DATA_OFFSET_BYTES, mode=mode)
    story = Story()
    with mortal(backing, tmp_path / "fuse") as (device, kill):
        with Engine(tmp_path, *options(cache, device), "--export", "nbd") as engine, \
                engine.client() as client:
            story.go(client, 200)
            kill()
            story.go(client, 300)
            assert story.refused > 100
            engine.stop()
            assert len(engine.errors.splitlines()) <= 1
            assert "Traceback" not in engine.errors
    with Engine(tmp_path, *options(cache, backing), "--export", "nbd") as engine, engine.client() as client:
        assert story.acceptance.judge(client.read_all()) == []
        assert engine.stop() == 0
        assert engine.errors == ""


@pytest.mark.parametrize("mode", MODES)
def test_the_disk_under_the_backing_image_is_full(mode: str, tmp_path: Path) -> None:
    need_root()
    small = tmp_path / "small"
    small.mkdir()
    make_set(tmp_path, cache_bytes=32 << 20, backing_bytes=SIZE_BYTES + DATA_OFFSET_BYTES, mode=mode)
    story = Story()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(small)], check=True)
    try:
        backing = small / "back0.img"
        subprocess.run(["cp", "--sparse=always", str(tmp_path / "back0.img"), str(backing)], check=True)
        words = [*options(tmp_path / "cache.img", backing), "--export", "nbd", "--set", "writeback_delay=0",
                 "--set", "writeback_percent=0"]
        with Engine(tmp_path, *words) as engine, engine.client() as client:
            story.go(client, 900)
            # In writeback mode it is the writing back that fails, and the data stays where it is.
            assert story.refused > 0 or mode == "writeback"
            engine.stop()
            assert len(engine.errors.splitlines()) <= 1
            assert "Traceback" not in engine.errors
        subprocess.run(["mount", "-o", "remount,size=100m", str(small)], check=True)
        with Engine(tmp_path, *words) as engine, engine.client() as client:
            assert story.acceptance.judge(client.read_all()) == []
            assert engine.stop() == 0
            assert engine.errors == ""
    finally:
        subprocess.run(["umount", str(small)], check=True)
