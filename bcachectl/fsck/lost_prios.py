# SPDX-License-Identifier: GPL-2.0-only
"""`lost_prio_sets`: buckets that hold a prio set and that no other structure claims; `may_be_prio_set`.

Where the chain of prio sets is damaged, its later buckets are no longer known as metadata.  A key that says that data
is in one would be believed: a pointer is judged by its bucket and its generation only.  So the buckets are asked: one
that begins with a prio set of this very set, with a good checksum, has had no data written to it since.  Those that the
set has left behind are not told from those that it uses: data is in none of them.

A prio set that is damaged itself is not found.  What stands there may be data, and the wrong thing the pointer to it.
If it still has the magic of one, or nothing at all, an extent there is doubtful.
"""

from __future__ import annotations

from collections.abc import Container

from bcachectl.errors import BcachectlError
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.magic import prio_magic
from bcachectl.ondisk.prio import decode_prio_set


def lost_prio_sets(walk: Walk, claimed: Container[int]) -> list[int]:
    """The buckets that hold a whole prio set, other than those that are ``claimed``."""
    assert walk.superblock is not None
    geometry, magic = walk.geometry, prio_magic(walk.superblock.set_uuid)
    if geometry.meta_sectors < geometry.bucket_size_sectors:
        # Behind the set there may be data.
        return []
    first = magic.to_bytes(8, "little")
    found = []
    for bucket in range(geometry.first_bucket, geometry.nbuckets):
        if bucket in claimed:
            continue
        sector = geometry.sector_of(bucket)
        try:
            if walk.read(sector, 1)[8:16] == first:
                decode_prio_set(walk.read(sector, geometry.meta_sectors), magic, bucket)
                found.append(bucket)
        except BcachectlError:
            continue
    return found


def may_be_prio_set(walk: Walk, bucket: int) -> bool:
    """What stands in a bucket that a damaged chain leads to may have been a prio set."""
    assert walk.superblock is not None
    try:
        first = walk.read(walk.geometry.sector_of(bucket), 1)
    except BcachectlError:
        return True
    return not any(first) or first[8:16] == prio_magic(walk.superblock.set_uuid).to_bytes(8, "little")
