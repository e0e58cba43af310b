# SPDX-License-Identifier: GPL-2.0-only
"""Volumes that come and go while the engine runs are exported, and taken away, at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl import blockdev
from bcachectl.engine.export.host import HostOptions
from bcachectl.engine.front import Volume
from bcachectl.errors import DeviceError
from tests import program
from tests.export.engine import ROOT, Engine
from tests.export.faulty import hosted
from tests.export.test_engine_run import make_set
from tests.export.test_loop import is_left_behind
from tests.nbd_client import NbdClient, list_exports
from tests.over import need_block_export, only
from tests.require import patience


def run(engine: Engine, *words: str | Path) -> str:
    done = program.run([*map(str, words)], environment={**os.environ, "XDG_RUNTIME_DIR": engine.runtime.name},
                       timeout_s=patience(60))
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(engine: Engine, *words: str | Path) -> str:
    with pytest.raises(AssertionError) as error:
        run(engine, *words)
    return str(error.value)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + patience(10)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def new_device(directory: Path) -> Path:
    """A file that is to be attached later."""
    path = directory / "second.img"
    with path.open("wb") as file:
        file.truncate(16 << 20)
    return path


def test_over_nbd(tmp_path: Path) -> None:
    options = make_set(tmp_path)
    second = new_device(tmp_path)
    with Engine(tmp_path, *options, "--export", "nbd") as engine:
        uuid = Path(engine.socket()).stem
        run(engine, "volume", "create", uuid, "8M")
        assert len(list_exports(engine.socket())) == 2
        name = list_exports(engine.socket())[1]
        with NbdClient(engine.socket(), name) as client:
            assert client.size_bytes == 8 << 20
            client.write(4096, b"f" * 8192)
            client.flush()
            run(engine, "volume", "remove", name, "--force=data")
            with pytest.raises(OSError):
                client.read(4096, 8192)
        assert len(list_exports(engine.socket())) == 1
        run(engine, "format", "--backing", second)
        run(engine, "attach", second, uuid)
        name = list_exports(engine.socket())[1]
        with NbdClient(engine.socket(), name) as client:
            client.write(0, b"s" * 4096, fua=True)
        run(engine, "set", "bcache0", "cache_mode=writeback")
        run(engine, "detach", name, "--wait")
        with NbdClient(engine.socket(), name) as client:
            assert client.read(0, 4096) == b"s" * 4096
    assert (engine.status, engine.errors) == (0, "")
    with second.open("rb") as file:
        file.seek(8192)
        assert file.read(4096) == b"s" * 4096


def test_a_device_that_was_refused_can_be_attached_later(tmp_path: Path) -> None:
    """And a device whose node has gone meanwhile, as a disk's that was pulled, keeps nobody from being attached."""
    options = make_set(tmp_path)
    second = new_device(tmp_path)
    with Engine(tmp_path, *options, "--export", "nbd") as engine:
        uuid = Path(engine.socket()).stem
        run(engine, "format", "--backing", second)
        good = second.read_bytes()
        second.write_bytes(bytes(len(good)))
        assert "superblock" in refused(engine, "attach", second, uuid)
        second.write_bytes(good)
        for path in tmp_path.glob("back*.img"):
            path.unlink()
        run(engine, "attach", second, uuid)
        assert "is in use" in refused(engine, "attach", tmp_path / "cache.img", uuid)
        assert len(list_exports(engine.socket())) == 2
    assert (engine.status, engine.errors) == (0, "")


def test_a_device_of_larger_blocks_is_attached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clients are told what it can do; those that are here already go on with what they were told.  A request that
    is smaller than a block would be an error of the device, and after 64 of those it is disabled."""
    words = [str(word) for word in make_set(tmp_path)]
    second = new_device(tmp_path)
    with hosted(HostOptions(cache=words[1], backings=(words[3],))) as running, NbdClient(running.socket) as before:
        def bcachectl(*words: str) -> None:
            done = subprocess.run([sys.executable, "-m", "bcachectl", *words], capture_output=True, text=True, cwd=ROOT,
                                  timeout=patience(60))
            assert done.returncode == 0, done.stderr

        bcachectl("format", "--backing", str(second), "--block", "4k")
        monkeypatch.setattr(blockdev, "_FILE_BLOCK_BYTES", 4096)
        bcachectl("attach", str(second), Path(running.socket).stem)
        with NbdClient(running.socket, "bcache1") as client:
            assert client.block_sizes is not None
            assert client.block_sizes[0] == 4096
            with pytest.raises(OSError, match="Invalid argument"):
                client.write(512, b"s" * 512)
            client.write(4096, b"s" * 4096)
        before.write(512, b"f" * 512)
        assert before.read(512, 512) == b"f" * 512


def test_a_volume_that_gets_no_block_device_is_served_otherwise(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No loop device may be free, no ublk device be had: the engine goes on, and says so."""
    words = [str(word) for word in make_set(tmp_path)]
    with hosted(HostOptions(cache=words[1], backings=(words[3],))) as running:
        async def fails(volume: Volume) -> None:
            raise DeviceError(f"no device for {volume.name}")

        monkeypatch.setattr(running.host, "_start_block_export", fails)
        done = subprocess.run([sys.executable, "-m", "bcachectl", "volume", "create", Path(running.socket).stem, "8M"],
                              capture_output=True, text=True, cwd=ROOT, timeout=patience(60))
        assert done.returncode == 0, done.stderr
        wait_until(lambda: bool(running.host.warnings))
        assert "bcache1: has no block device: no device for bcache1" in running.host.warnings
        with running.client("bcache1") as client:
            client.write(0, b"f" * 4096, fua=True)


def test_as_block_devices(tmp_path: Path) -> None:
    need_block_export()
    options = make_set(tmp_path, backings=2)
    with Engine(tmp_path, *options, "--export", "loop") as engine:
        runtime = Path(engine.runtime.name)
        assert len({volume["device"] for volume in engine.volumes}) == 2

        def made() -> int:
            return len([left for left in is_left_behind(runtime) if left.startswith(("loop", "ublk"))])

        (uuid,) = (path.stem for path in runtime.rglob("*.sock"))
        run(engine, "volume", "create", uuid, "8M")
        wait_until(lambda: made() == 3)
        run(engine, "volume", "remove", "bcache2", "--force=data")
        wait_until(lambda: made() == 2)
        assert engine.stop() == 0
        assert engine.errors == ""
        assert is_left_behind(runtime) == [str(runtime / "bcachectl")]


def test_engine_stop_removes_what_a_killed_engine_left(tmp_path: Path) -> None:
    only("loop", "a ublk device is removed by its set's name (tests/vm/test_ublk.py)")
    need_block_export()
    with Engine(tmp_path, *make_set(tmp_path), "--export", "loop") as engine:
        runtime = Path(engine.runtime.name)
        engine.kill()
        assert [left for left in is_left_behind(runtime) if left.startswith("loop")] != []
        assert "left by an engine that was killed" in run(engine, "engine", "stop")
        assert is_left_behind(runtime) == [str(runtime / "bcachectl")]
