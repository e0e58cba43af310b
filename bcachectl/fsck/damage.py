# SPDX-License-Identifier: GPL-2.0-only
"""`damage_of`: the damage that keeps a structure from being read, by the error that reading it raised.

`bcachectl.ondisk` knows no codes, only the kernel's messages.  The `Codes` of each kind of structure say which code
each of its messages has; a test holds that no message is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from bcachectl.errors import BcachectlError, Corrupt
from bcachectl.fsck.findings import DamageCode
from bcachectl.fsck.records import Damage


class Codes(NamedTuple):
    """The codes of one kind of structure: where the device cannot be read, by message, and for any other message."""

    io: DamageCode
    by_message: Mapping[str, DamageCode]
    other: DamageCode

    def of(self, error: BcachectlError) -> DamageCode:
        """The code of what reading raised."""
        return self.by_message.get(error.why, self.other) if isinstance(error, Corrupt) else self.io


SUPERBLOCK = Codes("SB_IO", {
    "Not a bcache superblock (bad offset)": "SB_OFFSET",
    "Not a bcache superblock (bad magic)": "SB_MAGIC",
    "Bad checksum": "SB_CSUM",
    "Bad UUID": "SB_UUID",
    "Unsupported compatible feature found": "SB_FEATURE",
    "Unsupported read-only compatible feature found": "SB_FEATURE",
    "Unsupported incompatible feature found": "SB_FEATURE",
    "Superblock block size smaller than device block size": "SB_BLOCK_SIZE",
    "Bad block size (not power of 2)": "SB_BLOCK_SIZE",
    "Bad block size (larger than page size)": "SB_BLOCK_SIZE",
    "Bad bucket size (not power of 2)": "SB_BUCKET_SIZE",
    "Bad bucket size (smaller than page size)": "SB_BUCKET_SIZE",
    "Too many journal buckets": "SB_JOURNAL_BUCKETS",
    "Journal buckets not sequential": "SB_JOURNAL_BUCKETS",
    "Too many buckets": "SB_NBUCKETS",
    "Not enough buckets": "SB_NBUCKETS",
    "ca->sb.nbuckets is too small": "SB_NBUCKETS",
    "Invalid superblock: device too small": "SB_DEVICE_SIZE",
    "Bad cache device number in set": "SB_NR_IN_SET",
    "Invalid superblock: first bucket comes before end of super": "SB_FIRST_BUCKET",
    "Unsupported superblock version": "SB_VERSION",
    # Of a backing device, which is not for this check.
    "Bad data offset": "SB_UNUSABLE",
}, other="SB_UNUSABLE")
JOURNAL_BUCKET = Codes("JOURNAL_IO", {}, other="JOURNAL_TORN")
PRIO_SET = Codes("PRIO_IO", {
    "bad csum reading priorities": "PRIO_CSUM",
    "bad magic reading priorities": "PRIO_MAGIC",
}, other="PRIO_IO")
UUID_ARRAY = Codes("UUID_IO", {}, other="UUID_IO")
BTREE_NODE = Codes("BTREE_IO", {
    "bad btree header": "BTREE_HEADER",
    "unsupported bset version": "BTREE_VERSION",
    "bad magic": "BTREE_MAGIC",
    "bad checksum": "BTREE_CSUM",
    "empty set": "BTREE_EMPTY_SET",
    "corrupted btree": "BTREE_CORRUPTED",
    "short btree key": "BTREE_SHORT_KEY",
    "beyond 8 PiB": "BTREE_KEYS",
    "runs past the end of its set": "BTREE_KEYS",
}, other="BTREE_KEYS")
EXTENTS: Mapping[str, DamageCode] = {
    "bad, length too big": "EXTENT_CROSSES_BUCKET",
    "bad, short offset": "EXTENT_IN_RESERVED",
    "bad, offset past end of device": "EXTENT_BEYOND_DEVICE",
    "bad, size larger than its offset": "EXTENT_SIZE",
}
"""What is wrong with one extent (`bcachectl.ondisk.validity.ptr_problem`)."""


def damage_of(error: BcachectlError, codes: Codes, where: str, sector: int, nsectors: int, start: int = 0,
              end: int = 0) -> Damage:
    """The structure at ``where`` could not be read, so the keys from ``start`` to ``end`` cannot be known."""
    code = codes.of(error)
    if isinstance(error, Corrupt):
        detail = error.where.partition(", ")[2]
        return Damage(code, f"{where}, {detail}" if detail else where, error.why, sector, nsectors, start, end)
    return Damage(code, where, f"IO error ({error})", sector, nsectors, start, end)
