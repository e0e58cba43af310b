# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl fsck --files``: the files that lost ranges belong to, by the file systems' own tools, read-only.

debugfs of e2fsprogs tells it for ext4, xfs_db of xfsprogs for xfs.  Both see the backing device without the cache, so
what the file system itself still had in the cache may be missing from the answer; that is said.
"""

from __future__ import annotations

import shutil
import subprocess

from bcachectl.fsck.check import Check
from bcachectl.fsck.check_backing import read_backing, slot_of
from bcachectl.fsck.findings import Loss

BLOCKS_LIMIT = 4096
TOOL_SECONDS = 120
EXT4_MAGIC_BYTE = 0x438
XFS_MAGIC = b"XFSB"


def lost_files(check: Check) -> list[str]:
    """Lines that name files, or say why they cannot be named."""
    losses: dict[int, Loss] = {}
    for finding in check.findings:
        for loss in finding.losses:
            if loss.ranges:
                losses.setdefault(loss.inode, loss)
    lines: list[str] = []
    for inode, loss in losses.items():
        lines.extend(_of_volume(check, inode, loss))
    return lines or ["--files: no range of any volume is lost."]


def _of_volume(check: Check, inode: int, loss: Loss) -> list[str]:
    for backing in check.backings:
        sb, _found = read_backing(backing)
        if sb is None or slot_of(check.walk, sb.uuid) != inode:
            continue
        head = backing.read(sb.data_offset, 16)
        if head[EXT4_MAGIC_BYTE:EXT4_MAGIC_BYTE + 2] == b"\x53\xef":
            block_bytes = 1024 << int.from_bytes(head[0x418:0x41C], "little")
            return _ext4(backing.name, sb.data_offset << 9, block_bytes, loss)
        if head[:4] == XFS_MAGIC:
            return _xfs(backing.name, sb.data_offset << 9, int.from_bytes(head[4:8], "big"), loss)
        return [f"--files: {loss.volume} holds no file system that is known here (ext4, xfs)."]
    return [f"--files: name the backing device of {loss.volume} to learn which files are hit."]


def _blocks(loss: Loss, block_bytes: int) -> list[int]:
    blocks = [block for first, last in loss.ranges for block in range(first // block_bytes, -(-last // block_bytes))]
    return sorted(set(blocks))[:BLOCKS_LIMIT]


def _ext4(device: str, offset_bytes: int, block_bytes: int, loss: Loss) -> list[str]:
    tool = shutil.which("debugfs") or shutil.which("debugfs", path="/usr/sbin:/sbin")
    if tool is None:
        return [f"--files: {loss.volume} is ext4; install e2fsprogs (debugfs) to name its files."]
    target = f"{device}?offset={offset_bytes}"
    blocks = _blocks(loss, block_bytes)
    inodes: dict[str, int] = {}
    for line in _ask([tool, "-R", "icheck " + " ".join(map(str, blocks)), target])[1:]:
        words = line.split()
        if len(words) == 2 and words[1].isdigit():
            inodes[words[1]] = inodes.get(words[1], 0) + 1
    lines = [f"{loss.volume} (ext4, as its backing device alone shows it): {len(blocks)} blocks lost"]
    if inodes:
        for line in _ask([tool, "-R", "ncheck " + " ".join(inodes), target])[1:]:
            number, _, path = line.partition("\t")
            lines.append(f"  {path}: {inodes.get(number.strip(), 0)} blocks")
    return lines


def _xfs(device: str, offset_bytes: int, block_bytes: int, loss: Loss) -> list[str]:
    tool = shutil.which("xfs_db") or shutil.which("xfs_db", path="/usr/sbin:/sbin")
    if tool is None:
        return [f"--files: {loss.volume} is xfs; install xfsprogs (xfs_db) to name its files."]
    if offset_bytes:
        return [f"--files: {loss.volume} is xfs; xfs_db reads no file system that starts inside {device}: attach a "
                f"loop device with --offset {offset_bytes} --read-only, and ask it `blockget -n`, `fsblock N`, "
                f"`blockuse -n` for the blocks of {block_bytes} bytes that the ranges above lie in."]
    return []


def _ask(command: list[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=TOOL_SECONDS)
    return done.stdout.splitlines()
