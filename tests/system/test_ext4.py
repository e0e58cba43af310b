# SPDX-License-Identifier: GPL-2.0-only
"""ext4 on the loop export, several times as large as the cache: filled, checked, found again by the next engine, and
again without any engine after a detach, on the backing file alone.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bcachectl.ondisk.superblock import SB_BYTES, BdevState, decode_superblock
from tests.export.engine import Engine
from tests.over import need_block_export
from tests.system.sets import MODES, make_set, mounted, run

FILES = 60
DATA_OFFSET_BYTES = 8192


def contents(seed: int) -> Iterator[tuple[str, bytes]]:
    """Names and data of a tree of files of many sizes."""
    draw = random.Random(seed)
    for number in range(FILES):
        yield f"directory{number % 7}/file{number}", draw.randbytes(draw.choice((100, 5000, 70_000, 1 << 20, 3 << 20)))


def fill(point: Path, seed: int) -> None:
    for name, data in contents(seed):
        (point / name).parent.mkdir(exist_ok=True)
        (point / name).write_bytes(data)


def check(point: Path, seed: int) -> None:
    for name, data in contents(seed):
        assert (point / name).read_bytes() == data, name


@pytest.mark.parametrize("mode", MODES)
def test_a_file_system_survives_restart_and_detach(tmp_path: Path, mode: str, require_tool: Callable[[str], str],
                                                   loop_device: Callable[..., str]) -> None:
    need_block_export()
    mkfs, fsck = require_tool("mkfs.ext4"), require_tool("fsck.ext4")
    options = [*make_set(tmp_path, cache_bytes=24 << 20, backing_bytes=160 << 20, mode=mode), "--export", "loop"]
    point = tmp_path / "point"

    def is_clean(device: str) -> None:
        done = subprocess.run([fsck, "-fn", device], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    with Engine(tmp_path, *options, "--debug-checks") as engine:
        device = engine.volumes[0]["device"]
        subprocess.run([mkfs, "-q", "-F", device], check=True)
        with mounted(device, point):
            fill(point, 1)
        is_clean(device)
        with mounted(device, point):
            check(point, 1)
            fill(point, 2)
        is_clean(device)
        assert engine.stop() == 0
        assert engine.errors == ""
    with Engine(tmp_path, *options) as engine:
        device = engine.volumes[0]["device"]
        is_clean(device)
        with mounted(device, point, "-o", "ro"):
            check(point, 2)
        run("detach", tmp_path / "back0.img", "--wait", engine=engine)
        with mounted(device, point):        # it goes on without its cache
            check(point, 2)
            (point / "last").write_bytes(b"written after the detach")
        assert engine.stop() == 0
        assert engine.errors == ""
    with (tmp_path / "back0.img").open("rb") as file:
        file.seek(4096)
        assert decode_superblock(file.read(SB_BYTES)).state == BdevState.NONE
    bare = loop_device(tmp_path / "back0.img", offset_bytes=DATA_OFFSET_BYTES)
    is_clean(bare)
    with mounted(bare, point, "-o", "ro"):
        check(point, 2)
        assert (point / "last").read_bytes() == b"written after the detach"
