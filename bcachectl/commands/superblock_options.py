# SPDX-License-Identifier: GPL-2.0-only
"""``--bucket-size`` and ``--set-uuid`` of several verbs: what was found instead is said, never passed over."""

from __future__ import annotations

import sys

from bcachectl.errors import UsageError
from bcachectl.fsck.rescue import BUCKET_SIZES, set_halves
from bcachectl.fsck.walk import Read
from bcachectl.ondisk.superblock import Superblock
from bcachectl.units import format_sectors, format_uuid, parse_size, parse_uuid

SETS_SHOWN = 4


def parse_bucket_size(text: str | None) -> int | None:
    """Sectors; UsageError for what is no bucket size."""
    if text is None:
        return None
    size_bytes = parse_size(text)
    if size_bytes >> 9 not in BUCKET_SIZES or size_bytes % 512:
        raise UsageError(f"--bucket-size {text}: is no bucket size; that is a power of two from 4 KiB to 4 GiB")
    return size_bytes >> 9


def parse_set_uuid(text: str | None) -> bytes | None:
    """The 16 bytes; UsageError for what is no uuid."""
    return None if text is None else parse_uuid(text)


def check_given(path: str, read: Read, size_sectors: int, found: Superblock | None, *, bucket_size: int | None,
                set_uuid: bytes | None) -> None:
    """UsageError if the device is not of the set that was named; a line if its buckets are of another size."""
    if set_uuid is not None and (found is None or found.set_uuid != set_uuid):
        halves = set_halves(read, size_sectors)
        if set_uuid[:8] not in halves:
            others = ", ".join(f"{format_uuid(half + bytes(8))[:18]}-..." for half in halves[:SETS_SHOWN])
            there = f"those that are there are of a set {others}" if others else "there is none of any set"
            raise UsageError(f"{path}: has no journal entry of set {format_uuid(set_uuid)}; {there}"
                             + (f", and buckets of {format_sectors(bucket_size)} hold nothing of that set"
                                if bucket_size is not None and not others else ""))
    if bucket_size is not None and found is not None and found.bucket_size != bucket_size:
        print(f"bcachectl: {path}: has buckets of {format_sectors(found.bucket_size)}, not of "
              f"{format_sectors(bucket_size)}, by what is on it; going by that", file=sys.stderr)
