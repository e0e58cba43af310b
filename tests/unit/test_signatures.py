# SPDX-License-Identifier: GPL-2.0-only
"""Foreign signatures: each of the table is found where it stands, and bcache's own devices hold none."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl.signatures import HEAD_BYTES, MAGICS, Magic, ask_blkid, find_signatures
from tests.require import need_tool

SIZE_BYTES = 8 << 20


def names(data: bytes | bytearray) -> list[str]:
    return [found.name for found in find_signatures(lambda at, count: bytes(data[at:at + count]), len(data))]


@pytest.mark.parametrize("magic", MAGICS, ids=lambda magic: f"{magic.name}-{magic.offset_bytes}")
def test_each_magic(magic: Magic) -> None:
    data = bytearray(SIZE_BYTES)
    data[magic.offset_bytes:magic.offset_bytes + len(magic.magic)] = magic.magic
    assert names(data) == ["ext2" if magic.name == "ext" else magic.name]
    assert magic.offset_bytes + len(magic.magic) <= HEAD_BYTES


def test_nothing_on_zeros() -> None:
    for size in (512, 4096, 8192, 1 << 20, (1 << 20) + 512):
        assert names(bytes(size)) == []


def test_a_boot_sector_alone_is_no_partition_table() -> None:
    data = bytearray(SIZE_BYTES)
    data[510:512] = b"\x55\xaa"
    assert names(data) == []


@pytest.mark.parametrize("story", ["fresh", "dirty_crash", "gen_churn", "two_backing"])
def test_none_on_bcache_devices(golden: Callable[..., Path], story: str) -> None:
    for image in golden(story).glob("*.img"):
        assert names(image.read_bytes()) == []


def test_blkid(tmp_path: Path) -> None:
    need_tool("blkid")
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE_BYTES))
    assert ask_blkid(str(image)) is None
    subprocess.run([need_tool("mke2fs"), "-q", "-F", "-t", "ext4", image], check=True)
    assert ask_blkid(str(image)) == "ext4"


def test_blkid_does_not_report_bcache(golden: Callable[..., Path]) -> None:
    need_tool("blkid")
    assert ask_blkid(str(golden("fresh") / "cache.img")) is None
