# SPDX-License-Identifier: GPL-2.0-only
"""``engine run`` from outside: signals, idleness, devices of both kinds, and every bad input ends with one sentence."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl.blockdev import open_device
from bcachectl.engine.export import ublk_control
from bcachectl.errors import DeviceError
from tests import program
from tests.export.engine import ROOT, Engine
from tests.export.test_golden_serve import digest, options_for
from tests.export.test_loop import is_left_behind
from tests.fsck.image import Image
from tests.nbd_client import CMD_WRITE, NbdClient
from tests.over import exported, need_block_export, only
from tests.require import need, need_root, patience

MODES = ("writethrough", "writeback", "writearound", "none")


def make_set(directory: Path, *, cache_bytes: int = 64 << 20, backing_bytes: int = 96 << 20, backings: int = 1,
             mode: str = "writethrough", bucket: str = "32k") -> list[str | Path]:
    """A new set of image files; the options that run it."""
    paths = [directory / "cache.img", *(directory / f"back{index}.img" for index in range(backings))]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(cache_bytes if path.name == "cache.img" else backing_bytes)
    words: list[str | Path] = ["format", "--cache", paths[0], "--bucket-size", bucket, "--cache-mode", mode]
    for path in paths[1:]:
        words += ["--backing", path]
    done = program.run([*map(str, words)], environment={**os.environ, "PYTHONPATH": str(ROOT)}, timeout_s=patience(60))
    assert done.returncode == 0, done.stderr
    return options_for(directory)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    options = make_set(tmp_path, mode="writeback")
    data = os.urandom(1 << 20)
    with Engine(tmp_path, *options, "--export", "nbd") as engine:
        path = engine.place()
        with engine.client() as client:
            client.write(0, data)
        assert engine.stop(number) == 0
        assert engine.errors == ""
        assert not os.path.exists(path)
        assert list(Path(engine.runtime.name).rglob("*.sock")) == []
    with Engine(tmp_path, *options, "--export", "nbd") as engine, engine.client() as client:
        assert client.read(0, 1 << 20) == data


@pytest.mark.parametrize("mode", MODES)
def test_what_was_flushed_survives_sigkill(tmp_path: Path, mode: str) -> None:
    options = make_set(tmp_path, mode=mode)
    draw = random.Random(8)
    model = bytearray(96 << 20)
    for _ in range(3):
        with Engine(tmp_path, *options, "--export", "nbd", "--debug-checks") as engine:
            with engine.client() as client:
                for _ in range(300):
                    length = 512 * draw.choice((1, 8, 8, 32, 200))
                    start = draw.randrange((80 << 20) // 512) * 512
                    if draw.random() < 0.7:
                        model[start:start + length] = data = draw.randbytes(length)
                        client.write(start, data, fua=draw.random() < 0.1)
                    else:
                        assert client.read(start, length) == model[start:start + length]
                client.flush()
                engine.kill()
        with Engine(tmp_path, *options, "--export", "nbd") as engine, engine.client() as client:
            assert client.read_all() == model[:client.size_bytes]


def test_an_idle_engine_uses_no_cpu(tmp_path: Path) -> None:
    with Engine(tmp_path, *make_set(tmp_path), "--export", "nbd") as engine:
        time.sleep(1)

        def used_s() -> float:
            fields = Path(f"/proc/{engine.process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before = used_s()
        time.sleep(4)
        assert used_s() - before <= patience(0.04)


def test_events_are_recorded(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with Engine(tmp_path, *make_set(tmp_path, mode="writeback"), "--export", "nbd", "--trace", trace) as engine, \
            engine.client() as client:
        for index in range(64):
            client.write(index << 20, bytes([index]) * 65536)
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    assert "bcache_alloc" in {event["event"] for event in events}
    assert all(earlier["t_ns"] <= later["t_ns"] for earlier, later in itertools.pairwise(events))


# --- bad input: one sentence, the right status, nothing written

def refused(directory: Path, *options: str | Path, status: int, word: str) -> None:
    images = sorted(directory.glob("*.img"))
    before = [digest(image) for image in images]
    with Engine(directory, *options, expect_failure=True) as engine:
        lines = engine.errors.splitlines()
        assert len(lines) == 1, engine.errors
        assert word in lines[0]
        assert engine.status == status, lines[0]
    assert [digest(image) for image in images] == before


def test_paths_that_are_no_devices(tmp_path: Path) -> None:
    options = make_set(tmp_path)
    backing = options[2:]
    (tmp_path / "empty").touch()
    for path, word in ((tmp_path / "none", "no such file"), (tmp_path, "directory"), ("/dev/null", "character device"),
                       (tmp_path / "empty", "empty")):
        refused(tmp_path, "--cache", path, *backing, "--export", "nbd", status=1, word=word)
        refused(tmp_path, *options[:2], "--backing", path, "--export", "nbd", status=1, word=word)


def test_devices_in_the_wrong_place(tmp_path: Path) -> None:
    options = make_set(tmp_path)
    cache, backing = options[1], options[3]
    refused(tmp_path, "--cache", backing, "--export", "nbd", status=4, word="is a backing device")
    refused(tmp_path, "--cache", cache, "--backing", cache, "--export", "nbd", status=2, word="twice")
    other = tmp_path / "other"
    other.mkdir()
    strangers = make_set(other)
    refused(tmp_path, "--cache", cache, "--backing", strangers[1], "--export", "nbd", status=4, word="cache device")
    (tmp_path / "plain.img").write_bytes(bytes(1 << 20))
    refused(tmp_path, "--cache", tmp_path / "plain.img", "--export", "nbd", status=1, word="plain.img")


def test_a_damaged_superblock(tmp_path: Path) -> None:
    options = make_set(tmp_path)
    with open(options[1], "r+b") as file:
        file.seek(4096 + 200)
        file.write(b"\xff")
    refused(tmp_path, *options, "--export", "nbd", status=1, word="Bad checksum")


def test_a_truncated_image(golden: Callable[..., Path], tmp_path: Path) -> None:
    directory = golden("dirty_crash", writable=True)
    os.truncate(directory / "cache.img", 20 << 20)
    refused(directory, *options_for(directory), "--export", "nbd", status=1, word="cache.img")


def test_two_engines_on_one_set(tmp_path: Path) -> None:
    options = make_set(tmp_path)
    with Engine(tmp_path, *options, "--export", "nbd"):
        second = tmp_path / "second"
        second.mkdir()
        with Engine(second, *options, "--export", "nbd", expect_failure=True) as other:
            assert other.status == 3
            assert "in use by another engine" in other.errors


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    options = make_set(tmp_path)
    if not ublk_control.is_available():
        refused(tmp_path, *options, "--export", "ublk", status=4, word="the kernel's ublk driver is not loaded")
    refused(tmp_path, *options, "--export", "ublk", "--io", "sync", status=2, word="exclude each other")
    refused(tmp_path, *options, "--export=nbd", "--recover", status=2, word="--recover: only ublk devices")
    refused(tmp_path, *options, "--read-only", "--overlay", "x", status=2, word="exclude each other")
    refused(tmp_path, *options, "--direct", "--overlay", "x", status=2, word="exclude each other")
    refused(tmp_path, *options, "--set", "cache_mode", status=2, word="cache_mode=writeback")
    refused(tmp_path, *options, "--read-only", "--export", "nbd", status=4, word="never been run")


@pytest.fixture
def _direct_io(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(4096))
    try:
        open_device(str(probe), direct=True).close()
    except DeviceError:
        pytest.skip("not here: a file system with direct I/O below the temporary directory")


@pytest.mark.usefixtures("_direct_io")
@pytest.mark.parametrize("io", ["auto", "sync"])
@pytest.mark.parametrize("mode", MODES)
def test_direct_io_on_files(tmp_path: Path, mode: str, io: str) -> None:
    """Past the page cache, killed in the middle, and then through it again."""
    options = make_set(tmp_path, mode=mode)
    draw = random.Random(11)
    model = bytearray((96 << 20) - 8192)
    for words in (["--direct"], ["--direct"], []):
        with Engine(tmp_path, *options, "--export", "nbd", "--io", io, "--debug-checks", *words) as engine:
            with engine.client() as client:
                for _ in range(200):
                    length = draw.choice((512, 4096, 4096, 5120, 65536, 1 << 20))
                    offset = draw.randrange(0, (len(model) - length) // 512) * 512
                    if draw.random() < 0.5:
                        model[offset:offset + length] = data = draw.randbytes(length)
                        client.write(offset, data)
                    else:
                        assert client.read(offset, length) == model[offset:offset + length]
                client.flush()
                assert client.read_all(1 << 20) == model[:client.size_bytes]
            engine.kill()


def test_a_file_system_without_direct_io(tmp_path: Path) -> None:
    need_root()
    need("ramfs" in Path("/proc/filesystems").read_text(), "ramfs")
    place = tmp_path / "ram"
    place.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", str(place)], check=True)
    try:
        options = make_set(place)
        refused(tmp_path, *options, "--direct", "--export", "nbd", status=1,
                word="does not take direct I/O, as some file systems do not; leave out --direct")
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_foreign_overlay(golden: Callable[..., Path], tmp_path: Path) -> None:
    directory = golden("dirty_crash", writable=True)
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"somebody's data" * 1000)
    before = foreign.read_bytes()
    refused(directory, *options_for(directory), "--overlay", foreign, "--export", "nbd", status=4,
            word="not an overlay")
    assert foreign.read_bytes() == before


# --- the loop export

@pytest.fixture
def _loops() -> None:
    need_block_export()


@pytest.mark.usefixtures("_loops")
@pytest.mark.parametrize("mode", MODES)
def test_fio_verifies_on_a_loop_device(tmp_path: Path, mode: str, require_tool: Callable[[str], str]) -> None:
    fio = require_tool("fio")
    options = make_set(tmp_path, mode=mode, cache_bytes=48 << 20)
    with Engine(tmp_path, *options, "--export", "loop", "--debug-checks") as engine:
        device = engine.volumes[0]["device"]
        for index, pattern in enumerate(("randwrite", "write", "randrw")):
            subprocess.run([fio, "--name=verify", f"--filename={device}", "--direct=1", "--ioengine=libaio",
                            "--iodepth=16", f"--rw={pattern}", "--bsrange=4k-64k", "--blockalign=4k", "--size=80m",
                            "--io_size=24m", "--verify=crc32c", "--verify_fatal=1", f"--randseed={index}"],
                           check=True, capture_output=True, cwd=tmp_path)
        runtime = Path(engine.runtime.name)
        assert engine.stop() == 0
        assert engine.errors == ""
        assert [left for left in is_left_behind(runtime) if "loop" in left or "fuse" in left or "ublk" in left] == []


@pytest.mark.usefixtures("_loops")
def test_the_list_says_where_volumes_are(tmp_path: Path) -> None:
    options = make_set(tmp_path)
    with Engine(tmp_path, *options, "--export", "loop") as engine:
        device = engine.volumes[0]["device"]
        environment = {**os.environ, "XDG_RUNTIME_DIR": engine.runtime.name}
        listed, text = (program.run(["list", *words], environment=environment, timeout_s=patience(60)).stdout
                        for words in (["--json"], []))
    assert [volume["device"] for found in json.loads(listed)["engines"] for volume in found["volumes"]] == [device]
    assert f"at {device}" in text


@pytest.mark.usefixtures("_loops")
def test_ext4_in_writeback(tmp_path: Path, require_tool: Callable[[str], str]) -> None:
    mkfs, e2fsck, mount, umount = (require_tool(name) for name in ("mkfs.ext4", "e2fsck", "mount", "umount"))
    options = make_set(tmp_path, mode="writeback", cache_bytes=32 << 20)
    point = tmp_path / "point"
    point.mkdir()
    sums = {}
    with Engine(tmp_path, *options, "--export", "loop") as engine:
        device = engine.volumes[0]["device"]
        subprocess.run([mkfs, "-q", "-F", device], check=True)
        subprocess.run([mount, device, str(point)], check=True)
        try:
            for index in range(40):
                data = random.Random(index).randbytes(1 << 20)
                (point / f"file{index}").write_bytes(data)
                sums[index] = hashlib.sha256(data).digest()
        finally:
            subprocess.run([umount, str(point)], check=True)
        subprocess.run([e2fsck, "-fn", device], check=True, capture_output=True)
    assert (engine.status, engine.errors) == (0, "")
    with Engine(tmp_path, *options, "--export", "loop") as engine:
        subprocess.run([mount, "-o", "ro", engine.volumes[0]["device"], str(point)], check=True)
        try:
            for index, expected in sums.items():
                assert hashlib.sha256((point / f"file{index}").read_bytes()).digest() == expected
        finally:
            subprocess.run([umount, str(point)], check=True)


@pytest.mark.usefixtures("_loops")
def test_a_mounted_device_is_waited_for(tmp_path: Path, require_tool: Callable[[str], str]) -> None:
    mkfs, mount, umount = (require_tool(name) for name in ("mkfs.ext4", "mount", "umount"))
    options = make_set(tmp_path)
    point = tmp_path / "point"
    point.mkdir()
    with Engine(tmp_path, *options, "--export", "loop") as engine:
        device = engine.volumes[0]["device"]
        subprocess.run([mkfs, "-q", "-F", device], check=True)
        subprocess.run([mount, device, str(point)], check=True)
        engine.process.send_signal(signal.SIGTERM)
        time.sleep(patience(1.5))
        assert engine.process.poll() is None
        assert f"{device} is in use" in engine.errors
        (point / "file").write_bytes(b"still there")
        subprocess.run([umount, str(point)], check=True)
        assert engine.wait() == 0


@pytest.mark.usefixtures("_loops")
def test_block_devices_as_cache_and_backing(tmp_path: Path, loop_device: Callable[..., str]) -> None:
    make_set(tmp_path, mode="writeback")
    cache, backing = loop_device(tmp_path / "cache.img"), loop_device(tmp_path / "back0.img")
    data = os.urandom(8 << 20)
    options = ["--cache", cache, "--backing", backing, "--export", "nbd"]
    with Engine(tmp_path, *options) as engine:
        with engine.client() as client:
            client.write(4096, data)
            client.write(512, b"x" * 512, fua=True)
            client.flush()
            client.trim(32 << 20, 1 << 20)
            assert client.read(4096, len(data)) == data
        second = tmp_path / "second"
        second.mkdir()
        with Engine(second, *options, expect_failure=True) as other:
            assert "is in use" in other.errors
    assert (engine.status, engine.errors) == (0, "")
    with Engine(tmp_path, *options, "--read-only") as engine, engine.client() as client:
        assert client.read(4096, len(data)) == data
        assert client.read(512, 512) == b"x" * 512


def large_sectors(tmp_path: Path, loop_device: Callable[..., str]) -> list[str]:
    """A new set on loop devices with sectors of 4096 bytes; the options that run it."""
    for name in ("cache.img", "back0.img"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(64 << 20)
    cache, backing = (loop_device(tmp_path / name, sector_bytes=4096) for name in ("cache.img", "back0.img"))
    subprocess.run([sys.executable, "-m", "bcachectl", "format", "--cache", cache, "--backing", backing,
                    "--bucket-size", "32k", "--writeback"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return ["--cache", cache, "--backing", backing, "--export", "nbd", "--debug-checks"]


@pytest.mark.usefixtures("_loops")
def test_devices_with_large_sectors(tmp_path: Path, loop_device: Callable[..., str]) -> None:
    data = os.urandom(2 << 20)
    with Engine(tmp_path, *large_sectors(tmp_path, loop_device)) as engine:
        with engine.client() as client:
            client.write(8192, data)
            client.flush()
            assert client.read(8192, len(data)) == data
    assert (engine.status, engine.errors) == (0, "")


@pytest.mark.usefixtures("_loops")
def test_a_request_of_half_a_sector_is_refused(tmp_path: Path, loop_device: Callable[..., str]) -> None:
    only("nbd", "the kernel sends a device no request smaller than its sectors")
    with Engine(tmp_path, *large_sectors(tmp_path, loop_device)) as engine:
        with NbdClient(engine.socket()) as client:
            assert client.block_sizes == (4096, 4096, 32 << 20)
            with pytest.raises(OSError):
                client.read(512, 512)
    assert (engine.status, engine.errors) == (0, "")


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    # Standard output is closed before the ready lines are written: the engine still ends in good order.
    options = make_set(tmp_path)
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with tempfile.TemporaryDirectory(prefix="bcachectl-") as runtime:
        words = exported(["--export", "nbd", *options])
        done = subprocess.run([sys.executable, "-m", "bcachectl", "engine", "run", "--no-live", *words],
                              stdout=write_fd, stderr=subprocess.PIPE, cwd=ROOT, timeout=patience(30),
                              env={**os.environ, "XDG_RUNTIME_DIR": runtime})
        assert list(Path(runtime).rglob("*.sock")) == []
    os.close(write_fd)
    assert done.returncode != 0
    assert done.stderr == b""


def test_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    options = make_set(tmp_path)
    need(os.path.exists("/dev/full"), "/dev/full")
    with Engine(tmp_path, *options, "--export", "nbd", "--trace", "/dev/full") as engine:
        with engine.client() as client:
            client.write(0, bytes(4096), fua=True)
            assert client.read(0, 4096) == bytes(4096)
        assert engine.stop() == 1
        assert engine.errors == "bcachectl: /dev/full: recording has stopped: No space left on device\n"
    refused(tmp_path, *options, "--export", "nbd", "--trace", tmp_path, status=1, word="directory")


@pytest.mark.usefixtures("_loops")
def test_ext4_on_an_overlay(tmp_path: Path, require_tool: Callable[[str], str]) -> None:
    # An overlay cannot zero quickly, so holes are refused; mkfs and mount must get along with that.
    mkfs, e2fsck, mount, umount = (require_tool(name) for name in ("mkfs.ext4", "e2fsck", "mount", "umount"))
    options = make_set(tmp_path)
    with Engine(tmp_path, *options, "--export", "nbd"):
        pass
    before = [digest(image) for image in sorted(tmp_path.glob("*.img"))]
    point = tmp_path / "point"
    point.mkdir()
    with Engine(tmp_path, *options, "--overlay", tmp_path / "overlay", "--export", "loop") as engine:
        device = engine.volumes[0]["device"]
        subprocess.run([mkfs, "-q", "-F", device], check=True)
        subprocess.run([mount, device, str(point)], check=True)
        try:
            (point / "file").write_bytes(b"here" * 100000)
            subprocess.run(["fstrim", str(point)], check=False, capture_output=True)
        finally:
            subprocess.run([umount, str(point)], check=True)
        subprocess.run([e2fsck, "-fn", device], check=True, capture_output=True)
    assert (engine.status, engine.errors) == (0, "")
    assert [digest(image) for image in sorted(tmp_path.glob("*.img"))] == before


@pytest.mark.parametrize("backend", ["sync", "uring"])
def test_every_io_backend(tmp_path: Path, backend: str) -> None:
    options = [*make_set(tmp_path, mode="writeback"), "--export", "nbd", "--io", backend, "--debug-checks"]
    data = random.Random(3).randbytes(12 << 20)
    with Engine(tmp_path, *options) as engine, engine.client() as client:
        for offset in range(0, len(data), 192 << 10):
            client.write(offset, data[offset:offset + (192 << 10)])
        client.trim(64 << 20, 1 << 20)
        client.write_zeroes(65 << 20, 1 << 20, fua=True)
        client.flush()
        engine.kill()
    with Engine(tmp_path, *options) as engine, engine.client() as client:
        assert client.read(0, len(data) + (1 << 20)) == data + bytes(1 << 20)
        assert client.read(65 << 20, 1 << 20) == bytes(1 << 20)
    assert (engine.status, engine.errors) == (0, "")


def test_a_device_that_was_cut_short_is_refused_before_anything_is_written(golden: Callable[..., Path],
                                                                          tmp_path: Path) -> None:
    story = golden("dirty_crash", writable=True)
    cache, backing = story / "cache.img", story / "back0.img"
    with backing.open("r+b") as file:
        file.truncate(8 << 20)
    before = [hashlib.sha256(path.read_bytes()).digest() for path in (cache, backing)]
    with Engine(tmp_path, "--cache", cache, "--backing", backing, "--export", "nbd", expect_failure=True) as engine:
        assert engine.status == 4
        assert engine.errors.count("\n") == 1
        assert "back0.img is smaller than the dirty data that its cache holds for it" in engine.errors
    assert [hashlib.sha256(path.read_bytes()).digest() for path in (cache, backing)] == before


def test_a_device_that_ran_later_is_refused_before_anything_is_written(golden: Callable[..., Path],
                                                                       tmp_path: Path) -> None:
    """The cache may be an older copy of itself: a sentence, and a word that overrides it, once."""
    story = golden("dirty_crash", writable=True)
    cache, backing = story / "cache.img", story / "back0.img"
    image = Image(cache.read_bytes(), [backing.read_bytes()])
    image.sb(200, "I", image.walk.uuids[0].last_reg + 1, device=image.backings[0])
    backing.write_bytes(image.backings[0].content())
    before = [hashlib.sha256(path.read_bytes()).digest() for path in (cache, backing)]
    words: list[str | Path] = ["--cache", cache, "--backing", backing, "--export", "nbd"]
    with Engine(tmp_path, *words, expect_failure=True) as engine:
        assert engine.status == 3
        assert engine.errors.count("\n") == 1
        assert "older copy of itself" in engine.errors
        assert "--force=inconsistent" in engine.errors
    with Engine(tmp_path, *words, "--force=dirty", expect_failure=True) as engine:
        assert engine.status == 2
    for reading in (["--read-only"], ["--overlay", tmp_path / "overlay"]):
        with Engine(tmp_path, *words, *reading) as engine:
            assert engine.errors.count("\n") == 1
            assert "older copy of itself" in engine.errors
    assert [hashlib.sha256(path.read_bytes()).digest() for path in (cache, backing)] == before
    with Engine(tmp_path, *words, "--force=inconsistent", "--set", "writeback_running=0") as engine:
        engine.kill()
    with Engine(tmp_path, *words) as engine:
        assert engine.errors == ""


def test_dirty_data_of_a_device_that_is_not_here(golden: Callable[..., Path], tmp_path: Path) -> None:
    """The engine goes on without it, and says how much waits for it."""
    story = golden("two_backing", writable=True)
    words: list[str | Path] = ["--cache", story / "cache.img", "--backing", story / "back0.img", "--export", "nbd"]
    with Engine(tmp_path, *words) as engine:
        environment = {**os.environ, "XDG_RUNTIME_DIR": engine.runtime.name, "PYTHONPATH": str(ROOT)}
        status = [sys.executable, "-m", "bcachectl", "status"]
        page = subprocess.run(status, env=environment, capture_output=True, text=True, check=True).stdout
        found = json.loads(subprocess.run([*status, "--json"], env=environment, capture_output=True, check=True).stdout)
    [absent] = found["absent"]
    assert absent["slot"] == 1
    assert absent["dirty_sectors"] > 0
    assert f"Absent      backing device {absent['uuid']}" in page
    assert "Nothing is lost" in page
    assert max(map(len, page.splitlines())) < 200


def test_large_writes_at_once_that_are_larger_than_the_cache_together(tmp_path: Path) -> None:
    """Each is less than is kept back at one time; all of them together would never find room."""
    options = make_set(tmp_path, cache_bytes=24 << 20, backing_bytes=64 << 20, mode="writeback", bucket="16k")
    data, each = os.urandom(5 << 19), 5 << 19
    with Engine(tmp_path, *options, "--export", "nbd", "--set", "sequential_cutoff=0") as engine:
        with engine.client() as client:
            for n in range(24):
                client.send(CMD_WRITE, n * each, each, data)
            while client.in_flight:
                assert client.receive().error == 0
            for n in range(24):
                assert client.read(n * each, each) == data
    assert engine.status == 0
