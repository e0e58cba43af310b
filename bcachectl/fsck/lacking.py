# SPDX-License-Identifier: GPL-2.0-only
"""Sets of keys that are gone without a trace: `lacking` finds the leaves that should have had them.

Where the header of a node's last set is overwritten, with zeros say, the log of sets seems to end before it, as it does
after a power failure.  But then the keys of that set would still have to be replayed.  So the journal's older entries
are asked, which need not be replayed any more because what they say is in the leaves.  As far as they reach back
without a gap they know every write, every zeroing and every write around the cache.  Dirty data that they tell of last,
and whose bucket was not used again since, must be in its leaf: as it was, clean by now, or moved.  A leaf that has
nothing at all for these sectors may have lost a set.

But it may have forgotten them by right, in three ways, none of which the journal tells of:

* A leaf is made anew of what is live.  Clean data whose bucket is to be used again is not live any more, while the
  generations on the device still say that it is: the prio sets follow when enough buckets have come together, and a gc
  may run in between.  A kernel's moving gc, too, can leave such a key of the old place behind.
* A leaf that was made with the end of data in it, whose journal entry was lost with the power.
* In a leaf that is ahead of the journal something else is newer than what seems to be missing, as a rule; what is lost
  begins with the first key of a set, and nothing that came later is in the sets before.

So only what the journal says behind everything that is in the leaf is missed, and only

* if it went into the very leaf that is there (`bcachectl.fsck.ages`): of that nothing vanishes; or
* if the leaf was there before the newest entry, so that no lost entry had a part in making it, and the data is not on
  the backing device.  Data of a volume without one is nowhere else.

Such a leaf is treated as one with a damaged set at its end (`bcachectl.fsck.salvage.leaf_map`): the older entries stand
where that set stood, and the range of the leaf is unknown besides.

Not found are sets of which the journal does not tell any more, and keys that hid older ones of the same sectors: then
the leaf has something for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bcachectl.errors import BcachectlError
from bcachectl.fsck import extents as extent
from bcachectl.fsck import rescue_map
from bcachectl.fsck.ages import Ages, Told, told_keys
from bcachectl.fsck.check_backing import Backing, read_backing, slot_of
from bcachectl.fsck.extents import GEN_BITS, Extents
from bcachectl.fsck.live import staleness
from bcachectl.fsck.records import Slot
from bcachectl.fsck.salvage import bucket_of, older_keys, own_keys, slot_sets
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.bkey import INODE_SHIFT, PTR_DEV, PTR_OFFSET, SECTOR_MASK

_OWN = 1


def lacking(walk: Walk, slots: Sequence[Slot], journal: Extents, *, known_buckets: int,
            backings: Sequence[Backing] = ()) -> list[int]:
    """For each slot, how many dirty sectors its leaf must have and has not; 0 for one whose sets are damaged anyway.

    The gens of buckets from ``known_buckets`` on are not known.  ``backings`` are compared where the journal does not
    tell enough.
    """
    missing = [0] * len(slots)
    wanted = _outside_of(_live(walk, older_keys(walk)[0], known_buckets), journal)
    if not len(wanted.start):
        return missing
    told: Told | None = None
    ages: Ages | None = None
    first = np.searchsorted(wanted.end, np.array([slot.start for slot in slots], np.uint64), "right").tolist()
    last = np.searchsorted(wanted.start, np.array([slot.end for slot in slots], np.uint64), "left").tolist()
    for number, slot in enumerate(slots):
        if first[number] >= last[number] or slot.strays is not None or slot.leaf is None:
            continue
        # Few leaves, as a rule, have nothing for some of it, and only these are looked at closely.
        here = extent.clip(wanted.take(slice(first[number], last[number])), start=slot.start, end=slot.end)
        here = _outside_of(here, _covered(walk, slot))
        if len(here.start):
            told = told_keys(walk) if told is None else told
            ages = Ages(walk, told) if ages is None else ages
            missing[number] = int(_behind(walk, slot, told, ages, here, backings).size.sum())
    return missing


def _covered(walk: Walk, slot: Slot) -> Extents:
    # What the leaf has any key for, as a flat map; everything if one of its sets is damaged.
    sets = slot_sets(walk, slot) or []
    if not sets or not all(image.is_valid for image in sets):
        return rescue_map.ranges([(slot.start, slot.end)], _OWN)
    rows = extent.concatenate([extent.from_keys(image.keys) for image in sets])
    if not len(rows.start):
        return rows
    order = np.argsort(rows.start, kind="stable")
    start, end = rows.start[order], np.maximum.accumulate(rows.end[order])
    heads = np.flatnonzero(np.concatenate(([True], start[1:] > end[:-1])))
    return rescue_map.marked(start[heads], end[np.append(heads[1:], len(start)) - 1], _OWN)


def _behind(walk: Walk, slot: Slot, told: Told, ages: Ages, missing: Extents, backings: Sequence[Backing]) -> Extents:
    # What of ``missing`` the journal says behind everything that is in the leaf.
    assert slot.leaf is not None
    since = ages.since(slot.leaf)
    if since is None:
        return extent.empty()
    told = told.take((told.rows.start < slot.end) & (told.rows.end > slot.start))
    told = told.take(told.seq > _newest_in(told, own_keys(walk, slot)))
    missing = _within(missing, extent.flatten(told.rows))
    sure = _within(missing, extent.flatten(told.take(told.seq > since).rows))
    doubtful = _outside_of(missing, sure)
    return missing if len(sure.start) or _is_only_here(walk, doubtful, backings) else extent.empty()


def _is_only_here(walk: Walk, rows: Extents, backings: Sequence[Backing]) -> bool:
    # Some of the data is not on its backing device, or can be on none.
    by_inode = {slot: backing for backing in backings if backing.has_data
                and (sb := read_backing(backing)[0]) is not None and (slot := slot_of(walk, sb.uuid)) is not None}
    for start, end, sector in zip(rows.start.tolist(), rows.end.tolist(), PTR_OFFSET.get(rows.ptr).tolist(),
                                  strict=True):
        inode, backing = start >> INODE_SHIFT, by_inode.get(start >> INODE_SHIFT)
        if walk.uuids[inode].is_flash_only:
            return True
        try:
            if backing is not None and walk.read(sector, end - start) != backing.read(start & SECTOR_MASK, end - start):
                return True
        except BcachectlError:
            return True
    return False


def _newest_in(told: Told, own: Extents) -> int:
    # The newest entry of which some key is among those of the leaf.
    if not len(own.start):
        return 0
    rows = told.rows
    at = np.minimum(np.searchsorted(own.end, rows.start, "right"), len(own.start) - 1)
    start = np.maximum(rows.start, own.start[at])
    is_same = (start < rows.end) & (start < own.end[at]) & (rows.nptrs > 0) & (own.nptrs[at] > 0)
    is_same &= rows.ptr + ((start - rows.start) << np.uint64(GEN_BITS)) \
        == own.ptr[at] + ((start - own.start[at]) << np.uint64(GEN_BITS))
    return int(told.seq[is_same].max(initial=0))


def _live(walk: Walk, rows: Extents, known_buckets: int) -> Extents:
    # What must be in a leaf: dirty, still there, of a device that the set knows.
    if not len(rows.start):
        return rows
    known = [slot for slot, entry in enumerate(walk.uuids) if not (entry.is_free or entry.is_retired)]
    is_known = np.isin(rows.start >> np.uint64(INODE_SHIFT), np.array(known, np.uint64))
    rows = rows.take(rows.dirty & (rows.nptrs > 0) & (PTR_DEV.get(rows.ptr) == 0) & (rows.csum == 0) & is_known)
    return rows.take((bucket_of(walk, rows) < known_buckets) & (staleness(walk, rows) == 0))


def _within(rows: Extents, others: Extents) -> Extents:
    # What of flat rows the flat map ``others`` covers.
    return _outside_of(rows, _outside_of(rows, others))


def _outside_of(rows: Extents, others: Extents) -> Extents:
    # What of flat rows no row of the flat map ``others`` covers, whatever that says.
    rows = rows._replace(csum=np.zeros(len(rows.start), np.uint8))
    both = extent.overlay(rows, others._replace(csum=np.full(len(others.start), _OWN, np.uint8)))
    return both.take(both.csum != _OWN)
