# SPDX-License-Identifier: GPL-2.0-only
"""Devices that fail under a running engine, a disk that fills up, and the proof that read-only means read-only."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl.engine.export.host import HostOptions
from bcachectl.errors import BcachectlError
from tests.export.engine import Engine
from tests.export.faulty import ALL, Faults, FaultyMedium, hosted
from tests.export.test_engine_run import make_set
from tests.export.test_golden_serve import options_for
from tests.require import need_root


def options_of(directory: Path, **more: object) -> HostOptions:
    return HostOptions(cache=str(directory / "cache.img"),
                       backings=tuple(str(path) for path in sorted(directory.glob("back*.img"))),
                       debug_checks=True, **more)  # type: ignore[arg-type]


def refuses_writes(_index: int) -> Faults:
    return Faults(forbid_writes=True)


@pytest.mark.parametrize("story", ["dirty_crash", "deep_crash", "two_backing", "flash_volume"])
def test_a_read_only_engine_never_tries_to_write(story: str, golden: Callable[..., Path]) -> None:
    with hosted(options_of(golden(story), read_only=True), refuses_writes) as running:
        with running.client() as client:
            client.read_all()
            with pytest.raises(OSError) as caught:
                client.write(0, bytes(4096))
            assert caught.value.errno == errno.EPERM
            client.flush()


@pytest.mark.parametrize("option", ["--read-only", "--overlay"])
def test_devices_are_opened_for_reading_only(option: str, golden: Callable[..., Path], tmp_path: Path) -> None:
    directory = golden("two_backing")
    extra = [option, tmp_path / "overlay"] if option == "--overlay" else [option]
    with Engine(tmp_path, *options_for(directory), *extra, "--export", "nbd") as engine:
        modes = {}
        for entry in Path(f"/proc/{engine.process.pid}/fd").iterdir():
            try:
                target = os.readlink(entry)
            except FileNotFoundError:
                continue                    # what a thread of the engine has done its errand with is closed by now
            if target.endswith(".img"):
                facts = Path(f"/proc/{engine.process.pid}/fdinfo/{entry.name}").read_text()
                modes[Path(target).name] = int(facts.split("flags:")[1].split()[0], 8) & os.O_ACCMODE
        assert modes == {"cache.img": os.O_RDONLY, "back0.img": os.O_RDONLY, "back1.img": os.O_RDONLY}


def test_clean_data_survives_a_dying_cache_device(tmp_path: Path) -> None:
    make_set(tmp_path)
    data = random.Random(1).randbytes(8 << 20)
    with hosted(options_of(tmp_path)) as running, running.client() as client:
        for offset in range(0, len(data), 65536):
            client.write(offset, data[offset:offset + 65536])
        running.faults[0].read = running.faults[0].write = ALL
        running.faults[0].flush = True
        for offset in range(0, len(data), 65536):
            assert client.read(offset, 65536) == data[offset:offset + 65536]
        assert running.host.failed is not None
        client.write(0, b"n" * 4096, fua=True)
        assert client.read(0, 8192) == b"n" * 4096 + data[4096:8192]
    with open(tmp_path / "back0.img", "rb") as file:
        file.seek(8192)
        assert file.read(8192) == b"n" * 4096 + data[4096:8192]


def test_dirty_data_that_cannot_be_read_is_an_error_and_never_old_data(tmp_path: Path) -> None:
    make_set(tmp_path, mode="writeback")
    with hosted(options_of(tmp_path)) as running, running.client() as client:
        client.write(0, b"d" * 65536)
        running.faults[0].read = ALL
        with pytest.raises(OSError) as caught:
            client.read(0, 65536)
        assert caught.value.errno == errno.EIO


def test_a_failing_backing_device_is_reported_to_the_client(tmp_path: Path) -> None:
    make_set(tmp_path)
    with hosted(options_of(tmp_path)) as running, running.client() as client:
        client.write(0, b"1" * 65536)
        running.faults[1].write = ALL
        with pytest.raises(OSError) as caught:
            client.write(0, b"2" * 65536)
        assert caught.value.errno == errno.EIO
        running.faults[1].write = (0, 0)
        # Old or new, in the cache as on the backing device.
        assert client.read(0, 65536) in (b"1" * 65536, b"2" * 65536)
        running.faults[1].flush = True
        with pytest.raises(OSError):
            client.flush()
        running.faults[1].flush = False
        client.flush()


@pytest.mark.parametrize("index", [0, 1])
def test_a_device_that_fails_at_the_start(tmp_path: Path, index: int) -> None:
    make_set(tmp_path)

    def faults(number: int) -> Faults:
        return Faults(read=ALL) if number == index else Faults()

    with pytest.raises(BcachectlError, match="img"), hosted(options_of(tmp_path), faults):
        pass


def test_a_full_disk_under_the_cache_image(tmp_path: Path, require_tool: Callable[[str], str]) -> None:
    need_root()
    mount, umount = require_tool("mount"), require_tool("umount")
    options = make_set(tmp_path)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run([mount, "-t", "tmpfs", "-o", "size=12m", "none", str(small)], check=True)
    try:
        subprocess.run(["cp", "--sparse=always", str(tmp_path / "cache.img"), str(small / "cache.img")], check=True)
        data = random.Random(2).randbytes(24 << 20)
        with Engine(tmp_path, "--cache", small / "cache.img", *options[2:], "--export", "nbd",
                    "--set", "sequential_cutoff=0") as engine:
            with engine.client() as client:
                for offset in range(0, len(data), 65536):
                    client.write(offset, data[offset:offset + 65536])
                client.flush()
                assert client.read_all()[:len(data)] == data
            assert engine.stop() == 1
            assert len(engine.errors.splitlines()) == 1
            assert "the set has failed" in engine.errors
    finally:
        subprocess.run([umount, str(small)], check=True)
    with open(tmp_path / "back0.img", "rb") as file:
        file.seek(8192)
        assert file.read(len(data)) == data


def test_a_faulty_medium_counts_writes(tmp_path: Path) -> None:
    make_set(tmp_path)
    with hosted(options_of(tmp_path)) as running:
        cache = running.host.media[0]
        assert isinstance(cache, FaultyMedium)
        assert cache.writes > 0
