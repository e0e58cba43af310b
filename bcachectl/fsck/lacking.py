# SPDX-License-Identifier: GPL-2.0-only
"""Sets of keys that are gone without a trace: `lacking` finds the leaves that should have had them.

Where the header of a node's last set is overwritten, with zeros say, the log of sets seems to end before it, as it does
after a power failure.  But then the keys of that set would still have to be replayed.  So the journal's older entries
are asked, which need not be replayed any more because what they say is in the leaves.  As far as they reach back
without a gap they know every write, every zeroing and every write around the cache.  Dirty data that they tell of last,
and whose bucket was not used again since, must be in its leaf: as it was, clean by now, or moved.  A leaf that has
nothing at all for these sectors has lost a set.

A leaf may be ahead of the journal when power fails: it was written with the end of data in it whose journal entry was
not written any more.  So only what the journal says behind everything that is in the leaf is missed.  What is lost
begins with the first key of a set, and nothing that came later is in the sets before.

Such a leaf is treated as one with a damaged set at its end (`bcachectl.fsck.salvage.leaf_map`): the older entries stand
where that set stood, and the range of the leaf is unknown besides.

Not found are sets of which the journal does not tell any more, and keys that hid older ones of the same sectors: then
the leaf has something for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bcachectl.errors import Corrupt
from bcachectl.fsck import extents as extent
from bcachectl.fsck import rescue_map
from bcachectl.fsck.extents import GEN_BITS, Extents
from bcachectl.fsck.live import staleness
from bcachectl.fsck.records import Slot
from bcachectl.fsck.salvage import bucket_of, entry_keys, older_entries, older_keys, own_keys, slot_sets
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.bkey import INODE_SHIFT, PTR_DEV

_OWN = 1


class _Told(NamedTuple):
    # Keys of the journal in the order of their entries, not flat, and the number of each one's entry.
    rows: Extents
    seq: npt.NDArray[np.uint64]

    def take(self, which: npt.NDArray[Any]) -> _Told:
        return _Told(self.rows.take(which), self.seq[which])


def lacking(walk: Walk, slots: Sequence[Slot], journal: Extents, *, known_buckets: int) -> list[int]:
    """For each slot, how many dirty sectors its leaf must have and has not; 0 for one whose sets are damaged anyway.

    The gens of buckets from ``known_buckets`` on are not known.
    """
    missing = [0] * len(slots)
    wanted = _outside_of(_live(walk, older_keys(walk)[0], known_buckets), journal)
    if not len(wanted.start):
        return missing
    told: _Told | None = None
    first = np.searchsorted(wanted.end, np.array([slot.start for slot in slots], np.uint64), "right").tolist()
    last = np.searchsorted(wanted.start, np.array([slot.end for slot in slots], np.uint64), "left").tolist()
    for number, slot in enumerate(slots):
        if first[number] >= last[number] or slot.strays is not None or slot.leaf is None:
            continue
        # Few leaves, as a rule, have nothing for some of it, and only these are looked at closely.
        here = extent.clip(wanted.take(slice(first[number], last[number])), start=slot.start, end=slot.end)
        here = _outside_of(here, _covered(walk, slot))
        if len(here.start):
            told = _told(walk) if told is None else told
            missing[number] = int(_behind(walk, slot, told, here).size.sum())
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


def _behind(walk: Walk, slot: Slot, told: _Told, missing: Extents) -> Extents:
    # What of ``missing`` the journal says behind everything that is in the leaf.
    told = told.take((told.rows.start < slot.end) & (told.rows.end > slot.start))
    newer = told.take(told.seq > _newest_in(told, own_keys(walk, slot)))
    return _outside_of(missing, _outside_of(missing, extent.flatten(newer.rows)))


def _told(walk: Walk) -> _Told:
    entries = older_entries(walk)
    if entries:
        with suppress(Corrupt):
            entries += [(entry.jset.seq, entry_keys(walk, entry.jset.keys)) for entry in walk.replay]
    return _Told(extent.concatenate([rows for _seq, rows in entries]),
                 np.repeat(np.array([seq for seq, _rows in entries], np.uint64),
                           [len(rows.start) for _seq, rows in entries]))


def _newest_in(told: _Told, own: Extents) -> int:
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


def _outside_of(rows: Extents, others: Extents) -> Extents:
    # What of flat rows no row of the flat map ``others`` covers, whatever that says.
    rows = rows._replace(csum=np.zeros(len(rows.start), np.uint8))
    both = extent.overlay(rows, others._replace(csum=np.full(len(others.start), _OWN, np.uint8)))
    return both.take(both.csum != _OWN)
