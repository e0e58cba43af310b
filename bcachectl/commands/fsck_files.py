# SPDX-License-Identifier: GPL-2.0-only
"""``bcachectl fsck --files``: the files that lost ranges belong to, by the file systems' own tools, read-only.

debugfs of e2fsprogs tells it for ext4 and its elders, xfs_db of xfsprogs for xfs.  debugfs can look inside a device
behind the bcache superblock; xfs_db cannot, so it is given a read-only loop device, which takes root.

Both see the backing device without the cache, and without a replay of the file system's own journal.  What of the file
system's structures was in the cache only, or in its journal only, is missing from the answer; that is said.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bcachectl.errors import BcachectlError, DeviceError
from bcachectl.fsck.check import Check
from bcachectl.fsck.check_backing import read_backing, slot_of
from bcachectl.fsck.findings import Loss
from bcachectl.units import counted

BLOCKS_LIMIT = 1 << 15
"""So many blocks are asked for; more are a matter for the file system's own check."""
BLOCKS_PER_LINE = 256
TOOL_SECONDS = 600
EXT4_MAGIC_BYTE, EXT4_INCOMPAT_BYTE, EXT4_NEEDS_RECOVERY = 0x438, 0x460, 4
XFS_MAGIC = b"XFSB"
_XFS_BLOCK = re.compile(r"block \d+ \(\d+/\d+\) type (\S+)(?: inode \d+ ?(.*))?")


def lost_files(check: Check) -> list[str]:
    """Lines that name files, or say why they cannot be named."""
    losses: dict[int, list[Loss]] = {}
    for finding in check.findings:
        for loss in finding.losses:
            if loss.ranges:
                losses.setdefault(loss.inode, []).append(loss)
    lines: list[str] = []
    for inode, own in losses.items():
        lines.extend(_of_volume(check, inode, own))
    return lines or ["--files: no range of any volume is lost."]


def _of_volume(check: Check, inode: int, losses: Sequence[Loss]) -> list[str]:
    volume = losses[0].volume
    for backing in check.backings:
        sb, _found = read_backing(backing)
        if sb is None or slot_of(check.walk, sb.uuid) != inode:
            continue
        try:
            head = backing.read(sb.data_offset, 16)
        except DeviceError as error:
            return [f"--files: the start of {volume} cannot be read ({error})."]
        try:
            if head[EXT4_MAGIC_BYTE:EXT4_MAGIC_BYTE + 2] == b"\x53\xef":
                return _ext4(backing.name, sb.data_offset << 9, head, losses)
            if head[:4] == XFS_MAGIC:
                return _xfs(backing.name, sb.data_offset << 9, int.from_bytes(head[4:8], "big"), losses)
        except BcachectlError as error:
            return [f"--files: the files of {volume} cannot be named: {error}."]
        return [f"--files: {volume} holds no file system that is known here (ext4, xfs), or its start is in the cache."]
    return [f"--files: name the backing device of {volume} to learn which files are hit."]


def _blocks(losses: Sequence[Loss], block_bytes: int) -> list[int]:
    return sorted({block for loss in losses for first, last in loss.ranges
                   for block in range(first // block_bytes, -(-last // block_bytes))})


def _report(volume: str, kind: str, blocks: int, asked: int, found: Counter[str], journal: str) -> list[str]:
    lines = [f"{volume} ({kind}, as its backing device alone shows it{journal}): {counted(blocks, 'block')} lost"]
    if asked < blocks:
        lines.append(f"  only the first {asked} were asked for")
    lines += [f"  {path}: {counted(count, 'block')}" for path, count in sorted(found.items())]
    others = asked - found.total()
    if others:
        lines.append(f"  in no file (free, or the file system's own): {counted(others, 'block')}")
    return lines


def _ext4(device: str, offset_bytes: int, head: bytes, losses: Sequence[Loss]) -> list[str]:
    tool = _tool("debugfs", "e2fsprogs")
    block_bytes = 1024 << int.from_bytes(head[0x418:0x41C], "little")
    target = f"{os.path.abspath(device)}?offset={offset_bytes}"
    blocks = _blocks(losses, block_bytes)
    asked = blocks[:BLOCKS_LIMIT]
    inodes: Counter[str] = Counter()
    for line in _ask([tool, "-f", "-", target], [f"icheck {words}" for words in _in_lines(asked)]):
        words = line.split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
            inodes[words[1]] += 1
    found: Counter[str] = Counter()
    for line in _ask([tool, "-f", "-", target], [f"ncheck {words}" for words in _in_lines(list(inodes))]):
        number, tab, path = line.partition("\t")
        if tab and number.strip() in inodes:
            found[path] += inodes.pop(number.strip())
    # What is left has no name: the journal and its like, or a file that was deleted while open.
    for number in [number for number in inodes if int(number) > 10]:
        found[f"inode {number}"] += inodes.pop(number)
    needs_recovery = int.from_bytes(head[EXT4_INCOMPAT_BYTE:EXT4_INCOMPAT_BYTE + 4], "little") & EXT4_NEEDS_RECOVERY
    return _report(losses[0].volume, "ext4", len(blocks), len(asked), found,
                   " without its journal, which is to be replayed" if needs_recovery else "")


def _xfs(device: str, offset_bytes: int, block_bytes: int, losses: Sequence[Loss]) -> list[str]:
    tool = _tool("xfs_db", "xfsprogs")
    blocks = _blocks(losses, block_bytes)
    asked = blocks[:BLOCKS_LIMIT]
    found: Counter[str] = Counter()
    with _loop(device, offset_bytes) as loop:
        log = shutil.which("xfs_logprint", path=_path())
        is_clean = log is not None and any("state: <CLEAN>" in line for line in _ask([log, "-t", loop], []))
        script = ["blockget -n"]
        for block in asked:
            script += [f"daddr {block * block_bytes >> 9}", "blockuse -n"]
        for line in _ask([tool, "-r", loop], script):
            match = _XFS_BLOCK.fullmatch(line.strip())
            if match is not None and match[2]:
                found["/" + match[2]] += 1
    return _report(losses[0].volume, "xfs", len(blocks), len(asked), found,
                   "" if is_clean else " without its log, which is to be replayed")


@contextmanager
def _loop(device: str, offset_bytes: int) -> Iterator[str]:
    # A read-only device that begins where the volume does.
    losetup = _tool("losetup", "mount")
    if os.geteuid() or not os.path.exists("/dev/loop-control"):
        raise BcachectlError(f"xfs_db reads no file system that starts inside {device}, and a loop device, which would "
                             f"show it, takes root; as root this command makes one (--offset {offset_bytes})")
    made = subprocess.run([losetup, "--show", "--find", "--read-only", "--offset", str(offset_bytes), device],
                          capture_output=True, text=True, check=False)
    if made.returncode:
        raise BcachectlError(f"no loop device can be made ({made.stderr.strip()})")
    loop = made.stdout.strip()
    try:
        yield loop
    finally:
        subprocess.run([losetup, "--detach", loop], check=False)


def _in_lines(words: Sequence[object]) -> Iterator[str]:
    for first in range(0, len(words), BLOCKS_PER_LINE):
        yield " ".join(map(str, words[first:first + BLOCKS_PER_LINE]))


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _tool(name: str, package: str) -> str:
    found = shutil.which(name, path=_path())
    if found is None:
        raise BcachectlError(f"the program {name} is missing; install {package}")
    return found


def _ask(command: list[str], script: Sequence[str]) -> list[str]:
    try:
        done = subprocess.run(command, input="".join(f"{line}\n" for line in script), capture_output=True, text=True,
                              errors="replace", check=False, timeout=TOOL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BcachectlError(f"{os.path.basename(command[0])} did not answer for {TOOL_SECONDS} s") from error
    except OSError as error:
        raise BcachectlError(f"{command[0]} cannot be started ({error.strerror})") from error
    return done.stdout.splitlines()
