# SPDX-License-Identifier: GPL-2.0-only
"""``fsck --files``: lost ranges of an ext4 volume are given the names of its files."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bcachectl.commands.fsck_files import lost_files
from bcachectl.fsck.check import Check
from bcachectl.fsck.check_backing import Backing
from bcachectl.fsck.findings import Finding, Loss
from bcachectl.ondisk.superblock import SB_SECTOR, Superblock, encode_superblock
from bcachectl.ondisk.uuids import UuidEntry
from tests.require import need_tool

DATA_OFFSET_BYTES = 8192


def ext4_backing(tmp_path: Path) -> tuple[Path, list[int]]:
    """A backing device with an ext4 that holds two files, and the blocks of one of them."""
    mke2fs, debugfs = need_tool("mke2fs"), need_tool("debugfs")
    tree = tmp_path / "tree"
    (tree / "photos").mkdir(parents=True)
    (tree / "photos/cat.raw").write_bytes(b"cat " * 20_000)
    (tree / "notes").write_bytes(b"note" * 20_000)
    path = tmp_path / "backing.img"
    with path.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run([mke2fs, "-q", "-F", "-t", "ext4", "-b", "4096", "-d", str(tree), "-E",
                    f"offset={DATA_OFFSET_BYTES}", str(path), "3000"], check=True)
    with path.open("r+b") as file:
        file.seek(SB_SECTOR * 512)
        file.write(encode_superblock(Superblock(version=1, uuid=b"b" * 16, set_uuid=b"s" * 16, block_size=8,
                                                data_offset=16)))
    told = subprocess.run([debugfs, "-R", "blocks /photos/cat.raw", f"{path}?offset={DATA_OFFSET_BYTES}"], check=True,
                          capture_output=True, text=True).stdout
    return path, [int(word) for word in told.split()]


def test_lost_blocks_get_names(tmp_path: Path) -> None:
    path, blocks = ext4_backing(tmp_path)
    data = path.read_bytes()
    backing = Backing(str(path), lambda sector, count: data[sector << 9:(sector + count) << 9], len(data) >> 9)
    check = Check(backing.read, backing.size_sectors, [backing])
    check.walk.uuids = (UuidEntry(uuid=b"b" * 16),)
    first, last = blocks[2] * 4096, (blocks[2] + 3) * 4096
    check.findings.append(Finding("BTREE_CSUM", "btree node", "bad checksum",
                                  losses=(Loss(0, "bcache0", 24, 0, ((first, last),)),)))
    lines = lost_files(check)
    assert lines == ["bcache0 (ext4, as its backing device alone shows it): 3 blocks lost",
                     "  /photos/cat.raw: 3 blocks"]


def test_nothing_lost_is_said() -> None:
    zeros = Backing("none", lambda _sector, count: bytes(count << 9), 1 << 14)
    assert lost_files(Check(zeros.read, zeros.size_sectors)) == ["--files: no range of any volume is lost."]
