# SPDX-License-Identifier: GPL-2.0-only
"""What else is on a device: file systems, partition tables and volume managers, known by their magic bytes.

`find_signatures` is asked before a superblock is written over something.  It errs on the side of finding too much: an
override costs one option, a lost file system costs more.  bcache's own superblock is not in the table; whoever asks
here reads that one properly.  Where ``blkid`` is installed it is asked as well, because it knows more kinds.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import NamedTuple

Read = Callable[[int, int], bytes]
"""``read(offset_bytes, nbytes)``: the bytes of the device."""

HEAD_BYTES = 264 << 10
"""Everything that `MAGICS` and the ZFS labels reach from the start."""
BLKID_TIMEOUT_S = 20


class Signature(NamedTuple):
    """Something that is on the device: its name as blkid spells it, and the byte where its magic stands."""

    name: str
    offset_bytes: int


class Magic(NamedTuple):
    """``magic`` at ``offset_bytes`` means ``name``."""

    name: str
    offset_bytes: int
    magic: bytes


MAGICS: tuple[Magic, ...] = (
    Magic("xfs", 0, b"XFSB"),
    Magic("crypto_LUKS", 0, b"LUKS\xba\xbe"),
    Magic("crypto_LUKS", 0x4000, b"SKUL\xba\xbe"),
    Magic("linux_raid_member", 0, b"\xfc\x4e\x2b\xa9"),
    Magic("linux_raid_member", 4096, b"\xfc\x4e\x2b\xa9"),
    Magic("squashfs", 0, b"hsqs"),
    Magic("DM_integrity", 0, b"integrt\0"),
    Magic("DM_verity_hash", 0, b"verity\0\0"),
    Magic("vdo", 0, b"dmvdo001"),
    Magic("ceph_bluestore", 0, b"bluestore block device"),
    Magic("ntfs", 3, b"NTFS    "),
    Magic("exfat", 3, b"EXFAT   "),
    Magic("ReFS", 3, b"ReFS\0\0\0\0"),
    Magic("BitLocker", 3, b"-FVE-FS-"),
    Magic("vfat", 54, b"FAT12   "),
    Magic("vfat", 54, b"FAT16   "),
    Magic("vfat", 82, b"FAT32   "),
    Magic("apfs", 32, b"NXSB"),
    Magic("dm_thin_pool", 32, (27022010).to_bytes(8, "little")),
    Magic("dm_cache", 32, (0o6142003).to_bytes(8, "little")),
    Magic("LVM2_member", 24, b"LVM2 001"),
    Magic("LVM2_member", 512 + 24, b"LVM2 001"),
    Magic("LVM2_member", 1024 + 24, b"LVM2 001"),
    Magic("LVM2_member", 1536 + 24, b"LVM2 001"),
    Magic("stratis", 512 + 4, b"!Stra0tis\x86\xff\x02^Arh"),
    Magic("gpt", 512, b"EFI PART"),
    Magic("gpt", 4096, b"EFI PART"),
    Magic("ext", 0x438, b"\x53\xef"),
    Magic("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    Magic("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    Magic("hfsplus", 1024, b"H+\0\x04"),
    Magic("nilfs2", 1030, b"\x34\x34"),
    Magic("bcachefs", 4096 + 24, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef")),
    Magic("ocfs2", 8192, b"OCFSV2"),
    Magic("iso9660", 0x8001, b"CD001"),
    Magic("udf", 0x8001, b"BEA01"),
    Magic("jfs", 0x8000, b"JFS1"),
    Magic("reiserfs", 0x2034, b"ReIsEr"),
    Magic("reiserfs", 0x10034, b"ReIsEr"),
    Magic("btrfs", 0x10040, b"_BHRfS_M"),
    Magic("gfs2", 0x10000, b"\x01\x16\x19\x70"),
    *(Magic("swap", page - 10, magic)
      for page in (4096, 8192, 16384, 32768, 65536) for magic in (b"SWAPSPACE2", b"SWAP-SPACE")),
)

_ZFS_UBERBLOCKS = range(128 << 10, 256 << 10, 1024)
_ZFS_MAGIC = 0x00BAB10C
_RAID_MAGIC = b"\xfc\x4e\x2b\xa9"


def find_signatures(read: Read, size_bytes: int) -> list[Signature]:
    """Everything foreign on a device of ``size_bytes``, in the order of the table."""
    head = read(0, min(HEAD_BYTES, size_bytes))
    found = [Signature(_ext_kind(head) if magic.name == "ext" else magic.name, magic.offset_bytes)
             for magic in MAGICS if head.startswith(magic.magic, magic.offset_bytes)]
    for offset_bytes in _ZFS_UBERBLOCKS:
        word = head[offset_bytes:offset_bytes + 8]
        if _ZFS_MAGIC in (int.from_bytes(word, "little"), int.from_bytes(word, "big")):
            found.append(Signature("zfs_member", offset_bytes))
            break
    found += _at_the_end(read, size_bytes)
    if _has_partitions(head) and not found:
        found.append(Signature("dos", 510))
    return found


def ask_blkid(path: str) -> str | None:
    """The name that ``blkid`` has for what is at ``path``; None if it is not there, finds nothing or finds bcache."""
    blkid = shutil.which("blkid") or shutil.which("blkid", path="/usr/sbin:/sbin")
    if blkid is None:
        return None
    try:
        answer = subprocess.run([blkid, "-p", "-o", "export", "--", path], capture_output=True, text=True,
                                errors="replace", timeout=BLKID_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    fields = dict(line.split("=", 1) for line in answer.stdout.splitlines() if "=" in line)
    name = fields.get("TYPE") or fields.get("PTTYPE")
    if answer.returncode == 8:  # blkid found several kinds and cannot decide.
        return name or "several kinds at once"
    return None if name == "bcache" else name


def _at_the_end(read: Read, size_bytes: int) -> Iterator[Signature]:
    # md 1.0 and 0.90 and the backup of a GPT stand at places counted from the end.
    sectors = size_bytes >> 9
    for name, offset_bytes, magic in (
        ("linux_raid_member", ((sectors - 16) & ~7) << 9, _RAID_MAGIC),
        ("linux_raid_member", (size_bytes & ~0xFFFF) - 0x10000, _RAID_MAGIC),
        ("gpt", (sectors - 1) << 9, b"EFI PART"),
        ("gpt", (size_bytes & ~0xFFF) - 4096, b"EFI PART"),
    ):
        if HEAD_BYTES <= offset_bytes <= size_bytes - len(magic) and read(offset_bytes, len(magic)) == magic:
            yield Signature(name, offset_bytes)


def _ext_kind(head: bytes) -> str:
    compat, incompat, ro_compat = (int.from_bytes(head[at:at + 4], "little") for at in (0x45C, 0x460, 0x464))
    if incompat & ~0x16 or ro_compat & ~0x7:  # Anything that ext3 did not know.
        return "ext4"
    return "ext3" if compat & 0x4 else "ext2"


def _has_partitions(head: bytes) -> bool:
    # 55 aa alone also ends every boot sector: ask for four plausible entries, one of them in use.
    if head[510:512] != b"\x55\xaa":
        return False
    entries = [head[at:at + 16] for at in range(446, 510, 16)]
    return all(entry[0] in (0x00, 0x80) for entry in entries) and any(
        entry[4] and int.from_bytes(entry[12:16], "little") for entry in entries)
