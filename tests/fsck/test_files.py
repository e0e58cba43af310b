# SPDX-License-Identifier: GPL-2.0-only
"""``fsck --files``: lost ranges of ext4 and xfs volumes are given the names of their files, read-only."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl.commands.fsck_files import lost_files
from bcachectl.fsck.check import Check
from bcachectl.fsck.check_backing import Backing
from bcachectl.fsck.findings import Finding, Loss
from bcachectl.ondisk.superblock import SB_SECTOR, Superblock, encode_superblock
from bcachectl.ondisk.uuids import UuidEntry
from tests.require import need_tool

DATA_OFFSET_BYTES = 8192


def backing_image(tmp_path: Path, volume_bytes: int) -> Path:
    """A backing device with room for a file system behind its superblock."""
    path = tmp_path / "backing.img"
    with path.open("wb") as file:
        file.truncate(DATA_OFFSET_BYTES + volume_bytes)
        file.seek(SB_SECTOR * 512)
        file.write(encode_superblock(Superblock(version=1, uuid=b"b" * 16, set_uuid=b"s" * 16, block_size=8,
                                                data_offset=16)))
    return path


def ext4_backing(tmp_path: Path) -> tuple[Path, list[int]]:
    """A backing device with an ext4 that holds two files, and the blocks of one of them."""
    mke2fs, debugfs = need_tool("mke2fs"), need_tool("debugfs")
    tree = tmp_path / "tree"
    (tree / "photos").mkdir(parents=True)
    (tree / "photos/cat.raw").write_bytes(b"cat " * 20_000)
    (tree / "notes").write_bytes(b"note" * 20_000)
    path = backing_image(tmp_path, 16 << 20)
    subprocess.run([mke2fs, "-q", "-F", "-t", "ext4", "-b", "4096", "-d", str(tree), "-E",
                    f"offset={DATA_OFFSET_BYTES}", str(path), "3000"], check=True)
    told = subprocess.run([debugfs, "-R", "blocks /photos/cat.raw", f"{path}?offset={DATA_OFFSET_BYTES}"], check=True,
                          capture_output=True, text=True).stdout
    return path, [int(word) for word in told.split()]


def xfs_backing(tmp_path: Path, loop_device: Callable[..., str]) -> tuple[Path, int]:
    """A backing device with an xfs that holds two files, and the first block of one of them."""
    mkfs, xfs_db = need_tool("mkfs.xfs"), need_tool("xfs_db")
    for name in ("cat", "notes"):
        (tmp_path / name).write_bytes(name.encode() * 20_000)
    proto = tmp_path / "proto"
    proto.write_text(f"/none\n0 0\nd--755 0 0\nphotos d--755 0 0\ncat.raw ---644 0 0 {tmp_path}/cat\n$\n"
                     f"notes ---644 0 0 {tmp_path}/notes\n$\n")
    path = backing_image(tmp_path, 320 << 20)
    loop = loop_device(path, offset_bytes=DATA_OFFSET_BYTES)
    subprocess.run([mkfs, "-q", "-p", str(proto), loop], check=True)
    told = subprocess.run([xfs_db, "-r", "-c", "blockget -n -v", loop], check=True, capture_output=True,
                          text=True).stdout
    number = re.search(r"inode (\d+) name photos/cat.raw", told)
    assert number is not None
    blocks = subprocess.run([xfs_db, "-r", "-c", f"inode {number[1]}", "-c", "bmap", "-c", "sb 0", "-c",
                             "print agblocks", loop], check=True, capture_output=True, text=True).stdout
    match = re.search(r"startblock \d+ \((\d+)/(\d+)\).*agblocks = (\d+)", blocks, re.DOTALL)
    assert match is not None
    group, block, group_blocks = map(int, match.groups())
    return path, group * group_blocks + block


def files_of(path: Path, first: int, last: int) -> list[str]:
    """What is said about lost bytes [first, last) of the volume, in two findings."""
    data = path.read_bytes()
    backing = Backing(str(path), lambda sector, count: data[sector << 9:(sector + count) << 9], len(data) >> 9)
    check = Check(backing.read, backing.size_sectors, [backing])
    check.walk.uuids = (UuidEntry(uuid=b"b" * 16),)
    middle = first + 4096
    for start, end in ((first, middle), (middle, last)):
        check.findings.append(Finding("BTREE_CSUM", "btree node", "bad checksum",
                                      losses=(Loss(0, "bcache0", end - start >> 9, 0, ((start, end),)),)))
    return lost_files(check)


def test_ext4(tmp_path: Path) -> None:
    path, blocks = ext4_backing(tmp_path)
    before = path.read_bytes()
    assert files_of(path, blocks[2] * 4096, (blocks[2] + 3) * 4096) == [
        "bcache0 (ext4, as its backing device alone shows it): 3 blocks lost", "  /photos/cat.raw: 3 blocks"]
    assert files_of(path, 0, 8192)[1:] == ["  in no file (free, or the file system's own): 2 blocks"]
    assert path.read_bytes() == before


def test_ext4_with_a_journal_to_replay(tmp_path: Path) -> None:
    path, blocks = ext4_backing(tmp_path)
    debugfs = need_tool("debugfs")
    subprocess.run([debugfs, "-w", "-R", "feature needs_recovery", f"{path}?offset={DATA_OFFSET_BYTES}"], check=True,
                   capture_output=True)
    assert "without its journal, which is to be replayed" in files_of(path, blocks[2] * 4096, blocks[4] * 4096)[0]


def test_xfs(tmp_path: Path, loop_device: Callable[..., str]) -> None:
    path, block = xfs_backing(tmp_path, loop_device)
    before = path.read_bytes()
    assert files_of(path, block * 4096, (block + 3) * 4096) == [
        "bcache0 (xfs, as its backing device alone shows it): 3 blocks lost", "  /photos/cat.raw: 3 blocks"]
    assert files_of(path, 0, 8192)[1:] == ["  in no file (free, or the file system's own): 2 blocks"]
    assert path.read_bytes() == before


def test_xfs_without_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_tool("xfs_db")
    path = backing_image(tmp_path, 1 << 20)
    with path.open("r+b") as file:
        file.seek(DATA_OFFSET_BYTES)
        file.write(b"XFSB" + (4096).to_bytes(4, "big"))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    [line] = files_of(path, 0, 8192)
    assert "takes root" in line
    assert f"--offset {DATA_OFFSET_BYTES}" in line


def test_what_else_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = Backing("none", lambda _sector, count: bytes(count << 9), 1 << 14)
    assert lost_files(Check(zeros.read, zeros.size_sectors)) == ["--files: no range of any volume is lost."]
    path = backing_image(tmp_path, 1 << 20)
    assert "holds no file system that is known" in files_of(path, 0, 8192)[0]
    path, blocks = ext4_backing(tmp_path)
    monkeypatch.setattr("shutil.which", lambda _name, path=None: None)
    assert "install e2fsprogs" in files_of(path, blocks[0] * 4096, blocks[2] * 4096)[0]
