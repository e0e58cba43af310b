# SPDX-License-Identifier: GPL-2.0-only
"""The fixtures themselves: golden images unpack to what the kernel left, loop devices go away again."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl import discovery
from tests.conftest import TESTS

pytestmark = pytest.mark.golden


@pytest.mark.parametrize("name", sorted(path.name for path in (TESTS / "golden").iterdir() if path.is_dir()))
def test_golden_images_are_whole(golden: Callable[..., Path], name: str) -> None:
    story = golden(name)
    images = sorted(story.glob("*.img"))
    assert [image.name for image in images][-1] == "cache.img"
    for image in images:
        assert image.stat().st_size % (1 << 20) == 0
        with image.open("rb") as file:
            superblock = file.read(8192)[4096:]
        assert superblock[24:40] == bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")
    for truth in story.glob("truth?.json"):
        assert len(json.loads(truth.read_text())["sha256"]) == 64


def test_writable_copy_is_equal_and_apart(golden: Callable[..., Path]) -> None:
    source, copy = golden("fresh"), golden("fresh", writable=True)
    for image in copy.glob("*.img"):
        there = (source / image.name).read_bytes()
        assert hashlib.sha256(image.read_bytes()).digest() == hashlib.sha256(there).digest()
        image.write_bytes(b"changed")
        assert (source / image.name).read_bytes() == there


def test_loop_device(loop_device: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x" * 8192)
    device = loop_device(tmp_path / "disk", read_only=True)
    assert Path(device).read_bytes() == b"x" * 8192
    with pytest.raises(PermissionError), Path(device).open("r+b", buffering=0) as file:
        file.write(bytes(4096))


def test_loop_devices_of_tests_beside_are_not_seen(loop_device: Callable[..., str], tmp_path: Path) -> None:
    with tempfile.NamedTemporaryFile() as other:
        other.truncate(1 << 20)
        (tmp_path / "own").write_bytes(bytes(1 << 20))
        own, foreign = loop_device(tmp_path / "own"), loop_device(other.name)
        seen = [node.path for node in discovery.enumerate_devices()]
    assert own in seen
    assert foreign not in seen
