# SPDX-License-Identifier: GPL-2.0-only
"""``--bucket-size`` and ``--set-uuid`` of fsck and writeback: what was found instead is said, never passed over."""

from __future__ import annotations

import sys

from bcachectl.errors import UsageError
from bcachectl.fsck.rescue import set_halves
from bcachectl.fsck.walk import Read
from bcachectl.ondisk.superblock import Superblock
from bcachectl.units import format_sectors, format_uuid

SETS_SHOWN = 4


def check_given(path: str, read: Read, size_sectors: int, found: Superblock | None, *, bucket_size: int | None,
                set_uuid: bytes | None) -> None:
    """UsageError if the device is not of the set that was named; a line if its buckets are of another size."""
    if set_uuid is not None and (found is None or found.set_uuid != set_uuid):
        halves = set_halves(read, size_sectors)
        if set_uuid[:8] not in halves:
            others = ", ".join(f"{format_uuid(half + bytes(8))[:18]}-..." for half in halves[:SETS_SHOWN])
            there = f"those that are there are of a set {others}" if others else "there is none of any set"
            raise UsageError(f"{path}: has no journal entry of set {format_uuid(set_uuid)}; {there}")
    if bucket_size is not None and found is not None and found.bucket_size != bucket_size:
        print(f"bcachectl: {path}: has buckets of {format_sectors(found.bucket_size)}, not of "
              f"{format_sectors(bucket_size)}: there the first prio set stands; going by that", file=sys.stderr)
