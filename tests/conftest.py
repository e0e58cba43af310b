# SPDX-License-Identifier: GPL-2.0-only
"""Fixtures that all groups share, and two rules of the run.

* A test gets the marker of its directory: everything below tests/sim is `sim`.
* With BCACHECTL_REQUIRE=all a skipped test is a failed one, see `tests.require`.
"""

from __future__ import annotations

import lzma
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from bcachectl import discovery
from bcachectl.discovery import BlockNode
from tests import over
from tests.require import all_required, need, need_root, need_tool, patience

# A shell that starts the tests in the background has them ignore SIGINT, and whatever they start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).resolve().parent
GROUPS = ("unit", "property", "sim", "crash", "golden", "fsck", "cli", "export", "system", "vm")
_HOLE_BYTES = 64 << 10

# Machines differ in speed, and a run must be repeatable: no deadlines, and the same examples every time.
# HYPOTHESIS_PROFILE=search looks for new ones.
hypothesis.settings.register_profile("repeat", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


def pytest_configure() -> None:
    """What is compiled must be what is tested."""
    for compiled in (TESTS.parent / "bcachectl").rglob("*.so"):
        name = compiled.name.split(".")[0]
        for source in (compiled.with_name(name + ".py"), compiled.with_name(name + ".pxd")):
            if source.exists() and source.stat().st_mtime > compiled.stat().st_mtime:
                pytest.exit(f"{source} is newer than what was compiled from it: 'make compiled' or 'make plain'", 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        try:
            group = item.path.relative_to(TESTS).parts[0]
        except ValueError:
            continue
        limit = item.get_closest_marker("timeout")
        if limit is not None:
            item.add_marker(pytest.mark.timeout(patience(limit.args[0])), append=False)
        if group in GROUPS:
            item.add_marker(group)
        elif group == "test_tidy.py":
            item.add_marker("tidy")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item,
                              call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and all_required() and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        report.outcome = "failed"
        report.longrepr = f"{reason}\nBCACHECTL_REQUIRE=all: nothing may be left out"
    return report


@pytest.fixture(autouse=bool(over.EXPORT))
def _no_device_is_left() -> Iterator[None]:
    """Only an engine that a test has killed may leave a device, which is then removed."""
    yield
    dead = over.left_by_the_dead()
    over.remove(dead)
    assert [info for info in over.devices() if info not in dead] == []


@pytest.fixture(autouse=True)
def _only_own_loop_devices(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests that run beside this one have loop devices on copies of the same images: here they are not seen."""
    own = f"{tmp_path_factory.getbasetemp()}/"
    everything = discovery.enumerate_devices

    def own_devices() -> list[BlockNode]:
        return [node for node in everything() if node.kind != "loop" or (node.file or "").startswith(own)]

    monkeypatch.setattr(discovery, "enumerate_devices", own_devices)


@pytest.fixture
def require_tool() -> Callable[[str], str]:
    """``require_tool("fio")`` gives the program's path, or leaves the test out."""
    return need_tool


def unpack_sparse(packed: Path, target: Path) -> None:
    """Unpack an .xz file, leaving holes where it is zero."""
    size_bytes = 0
    with lzma.open(packed) as source, target.open("wb") as out:
        while piece := source.read(_HOLE_BYTES):
            if piece.count(0) != len(piece):
                out.seek(size_bytes)
                out.write(piece)
            size_bytes += len(piece)
        out.truncate(size_bytes)


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file, holes as holes."""
    with source.open("rb") as file, target.open("wb") as out:
        position = 0
        while piece := file.read(_HOLE_BYTES):
            if piece.count(0) != len(piece):
                out.seek(position)
                out.write(piece)
            position += len(piece)
        out.truncate(position)


@pytest.fixture(scope="session")
def _golden_unpacked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    done: dict[str, Path] = {}

    def unpacked(name: str) -> Path:
        if name not in done:
            source = TESTS / "golden" / name
            assert source.is_dir(), f"no golden image is called {name}"
            target = tmp_path_factory.mktemp(f"golden-{name}")
            for path in sorted(source.rglob("*")):
                there = target / path.relative_to(source)
                if path.is_dir():
                    there.mkdir()
                elif path.suffix == ".xz":
                    unpack_sparse(path, there.with_suffix(""))
                    there.with_suffix("").chmod(0o444)
                else:
                    shutil.copyfile(path, there)
            done[name] = target
        return done[name]

    return unpacked


@pytest.fixture
def golden(_golden_unpacked: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """``golden("fresh")``: a directory with that story's files, images unpacked; all tests share it, none may write.

    ``golden("fresh", writable=True)``: a copy of the images (cache.img, back0.img, ...) for this test alone.
    """

    def give(name: str, *, writable: bool = False) -> Path:
        source = _golden_unpacked(name)
        if not writable:
            return source
        target = tmp_path / f"golden-{name}"
        target.mkdir()
        for image in sorted(source.glob("*.img")):
            copy_sparse(image, target / image.name)
        return target

    return give


@pytest.fixture
def loop_device() -> Generator[Callable[..., str], None, None]:
    """``loop_device(path)`` gives the name of a loop device on a file; it is detached when the test is over.

    ``read_only=True`` makes one that refuses writes; ``sector_bytes=4096`` one with large sectors.
    """
    need_root()
    losetup = need_tool("losetup")
    need(os.path.exists("/dev/loop-control"), "loop devices")
    attached: list[str] = []

    def attach(path: Path | str, *, read_only: bool = False, sector_bytes: int = 512, offset_bytes: int = 0) -> str:
        command = [losetup, "--show", "--find", "--sector-size", str(sector_bytes), "--offset", str(offset_bytes)]
        if read_only:
            command.append("--read-only")
        # Two processes may be given the same free device; losetup then says so, and the next try finds another.
        for _ in range(5):
            done = subprocess.run([*command, os.fspath(path)], capture_output=True, text=True)
            if done.returncode == 0:
                attached.append(done.stdout.strip())
                return attached[-1]
        raise OSError(f"losetup: {done.stderr.strip()}")

    try:
        yield attach
    finally:
        for device in reversed(attached):
            subprocess.run([losetup, "--detach", device], check=False)
