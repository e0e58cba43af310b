# SPDX-License-Identifier: GPL-2.0-only
"""`assert_all_covered`: what was added to a leaf is covered in it for good, on any image that was left well.

It is what `bcachectl.fsck.lacking` goes by where the journal tells that the leaf was there already.
"""

from __future__ import annotations

import numpy as np

from bcachectl.fsck import ages, salvage
from bcachectl.fsck import extents as extent
from bcachectl.fsck.check import Check

TOLD = 9


def assert_all_covered(checked: Check) -> int:
    """How many keys of the journal must be covered in leaves, as all of them are."""
    walk, count = checked.walk, 0
    if walk.newest is None:
        return 0
    told = ages.told_keys(walk)
    tree = ages.Ages(walk, told)
    for slot in checked.slots:
        since = tree.since(slot.leaf) if slot.leaf is not None else None
        if since is None:
            continue
        rows = told.take((told.seq > since) & (told.seq < walk.replay[0].jset.seq)).rows
        rows = extent.clip(extent.flatten(rows), start=slot.start, end=slot.end)
        count += len(rows.start)
        own = extent.flatten(extent.concatenate([extent.from_keys(each.keys)
                                                 for each in salvage.slot_sets(walk, slot) or []]))
        rows = extent.overlay(rows._replace(csum=np.full(len(rows.start), TOLD, np.uint8)), own)
        assert not (rows.csum == TOLD).any(), slot.leaf
    return count
