# SPDX-License-Identifier: GPL-2.0-only
"""What is wrong with backing devices, by a look at little of the cache: `dirty_beyond`, `run_later`.

`dirty_beyond`: whether they are large enough for their dirty data.  Nothing on the disks says how large a backing
device was.  What its cache holds for places behind its end tells that it is not whole.  The keys for these places are
in few leaves, mostly in one, so this costs what the journal, the prio sets and the nodes on the way cost, and not the
whole btree.  `run_later` asks the uuid array alone.

These are early words, for who is about to write: a set with damage is for others to judge, and says nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bcachectl.fsck.check_backing import ran_later, slot_of
from bcachectl.fsck.live import leaf_extents
from bcachectl.fsck.records import Record
from bcachectl.fsck.walk import Read, Walk
from bcachectl.ondisk.bkey import INODE_SHIFT
from bcachectl.ondisk.superblock import Superblock


def dirty_beyond(read: Read, size_sectors: int, ends: Mapping[bytes, int]) -> set[bytes]:
    """Of the backing devices that end at the sectors ``ends``, by uuid, those with live dirty data behind the end."""
    walk = Walk(read, size_sectors, within=())
    behind: dict[bytes, tuple[int, int]] = {}
    for item in walk.structures():
        if isinstance(item, Record) and item.value is walk.uuids:
            slots = {uuid: slot_of(walk, uuid) for uuid in ends}
            behind = {uuid: ((slot << INODE_SHIFT) + ends[uuid], slot + 1 << INODE_SHIFT)
                      for uuid, slot in slots.items() if slot is not None}
            walk.within = tuple(behind.values())
    found: set[bytes] = set()
    for _slot, extents in leaf_extents(walk):
        dirty = extents.take(extents.dirty)
        found |= {uuid for uuid, (start, end) in behind.items() if uuid not in found
                  and bool(((dirty.end > np.uint64(start)) & (dirty.start < np.uint64(end))).any())}
        if len(found) == len(behind):
            break
    return found


def run_later(read: Read, size_sectors: int, superblocks: Mapping[str, Superblock]) -> list[str]:
    """Of the backing devices by name, those that are dirty and have run later than the set knows (`ran_later`)."""
    walk = Walk(read, size_sectors, within=())
    for item in walk.structures():
        if isinstance(item, Record) and item.value is walk.uuids:
            break
    return [name for name, sb in superblocks.items() if ran_later(walk, sb, slot_of(walk, sb.uuid))]
