# SPDX-License-Identifier: GPL-2.0-only
"""``--read-only`` and ``--overlay`` write nothing: on devices that would refuse it, and by the files' hashes.

Two kinds of devices refuse: a read-only loop device, whose writes end with EPERM in the kernel, and a file on a
read-only mount, which cannot even be opened for writing.  An engine that tried would end with an error, and the images
are those of crashed kernels, so there is much that recovery would like to write.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.export.engine import Engine
from tests.require import need_root
from tests.system.sets import digest, options

STORIES = ("dirty_crash", "thrash_crash", "two_backing", "flash_volume", "fifo_discard")


@pytest.fixture
def read_only_files(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """A directory as a read-only mount shows it."""
    need_root()
    point = tmp_path / "read-only"
    point.mkdir()

    def mount(directory: Path) -> Path:
        subprocess.run(["mount", "--bind", str(directory), str(point)], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(point)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            next(point.glob("*.img")).open("r+b")
        return point

    yield mount
    subprocess.run(["umount", str(point)], check=False, capture_output=True)


def truths(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("truth*.json"))]


def check(engine: Engine, expected: list[dict[str, Any]]) -> None:
    for index, truth in enumerate(expected):
        with engine.client(f"bcache{index}") as client:
            assert hashlib.sha256(client.read_all()).hexdigest() == truth["sha256"]


def tell(engine: Engine, overlay: Path | None) -> None:
    """Writes: accepted with an overlay, refused without."""
    with engine.client("bcache0") as client:
        if overlay is not None:
            client.write(0, b"overlay." * 8192, fua=True)
            client.trim(1 << 20, 1 << 20)
            client.flush()
        else:
            with pytest.raises(PermissionError):
                client.write(0, bytes(4096))
            with pytest.raises(PermissionError):
                client.trim(0, 4096)
            client.flush()


@pytest.mark.parametrize("has_overlay", [False, True], ids=["read-only", "overlay"])
@pytest.mark.parametrize("story", STORIES)
def test_devices_that_refuse_writes(story: str, has_overlay: bool, golden: Callable[..., Path], tmp_path: Path,
                                    loop_device: Callable[..., str]) -> None:
    directory = golden(story)
    images = sorted(directory.glob("*.img"))
    before = [digest(image) for image in images]
    cache = loop_device(directory / "cache.img", read_only=True)
    backings = [loop_device(image, read_only=True) for image in images if image.name != "cache.img"]
    overlay = tmp_path / "overlay" if has_overlay else None
    words = [*options(Path(cache), *map(Path, backings)), "--export", "nbd", "--debug-checks",
             *(["--overlay", str(overlay)] if overlay else ["--read-only"])]
    with Engine(tmp_path, *words) as engine:
        check(engine, truths(directory))
        tell(engine, overlay)
        assert engine.stop() == 0
        assert engine.errors == ""
    if overlay is not None:
        with Engine(tmp_path, *words) as engine, engine.client("bcache0") as client:
            assert client.read(0, 65536) == b"overlay." * 8192
    assert [digest(image) for image in images] == before


@pytest.mark.parametrize("has_overlay", [False, True], ids=["read-only", "overlay"])
def test_files_that_cannot_be_written(has_overlay: bool, golden: Callable[..., Path], tmp_path: Path,
                                      read_only_files: Callable[[Path], Path]) -> None:
    directory = golden("dirty_crash")
    before = {image: (digest(image), image.stat().st_mtime_ns) for image in sorted(directory.glob("*.img"))}
    there = read_only_files(directory)
    overlay = tmp_path / "overlay" if has_overlay else None
    words = [*options(there / "cache.img", there / "back0.img"), "--export", "nbd",
             *(["--overlay", str(overlay)] if overlay else ["--read-only"])]
    with Engine(tmp_path, *words) as engine:
        check(engine, truths(directory))
        tell(engine, overlay)
        assert engine.stop() == 0
        assert engine.errors == ""
    assert {image: (digest(image), image.stat().st_mtime_ns) for image in before} == before


def test_without_either_it_says_so(golden: Callable[..., Path], tmp_path: Path, loop_device: Callable[..., str],
                                   read_only_files: Callable[[Path], Path]) -> None:
    directory = golden("dirty_crash")
    there = read_only_files(directory)
    with Engine(tmp_path, *options(there / "cache.img", there / "back0.img"), expect_failure=True) as engine:
        assert engine.status == 1
        assert len(engine.errors.splitlines()) == 1
        assert str(there / "cache.img") in engine.errors
    cache = loop_device(directory / "cache.img", read_only=True)
    with Engine(tmp_path, *options(Path(cache), directory / "back0.img"), expect_failure=True) as engine:
        assert engine.status == 1
        assert len(engine.errors.splitlines()) == 1
        assert cache in engine.errors
