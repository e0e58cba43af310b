# SPDX-License-Identifier: GPL-2.0-only
"""Keys outside the range of their leaf, where no lookup finds them: `with_strays` gives them to the leaf that owns it.

They come from leaves that were put together though another lay between them, and from a parent whose separator is not
where its children meet; then leaves are good, and their keys seem to lie outside.  Such a key is good by its checksum,
and still names the place of data that may exist nowhere else.  Which of several claims of the same sectors counts:

1. A key of the journal, then any key of the leaf that owns the range, whatever it says: live or stale, dirty or clean,
   a hole or the mark of a read miss.  That is what every lookup has found, so it is newer, or was all that anyone saw.
2. A stray key that is dirty, if its bucket was not used again.  A clean one is dropped: the backing device has it.

So strays are laid under everything that the owner of the range has (`bcachectl.fsck.salvage.leaf_map`).  That nothing
contradicts one does not say that it is the newest: something newer may have been written in its range, written back and
forgotten.  Every write of a client is in the journal for a while, so its older entries are asked:

* `TAG_STRAY`: the last write of these sectors that they tell of is this one, or has the same content.  It is sure.
* `TAG_DOUBTED`: they do not tell.  It is kept, and its range is unknown besides.
* `TAG_CONTRADICTED`: they tell of another one.  It is dropped, and listed as lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bcachectl.errors import BcachectlError
from bcachectl.fsck import extents as extent
from bcachectl.fsck.extents import GEN_BITS, Extents
from bcachectl.fsck.live import staleness
from bcachectl.fsck.records import Slot
from bcachectl.fsck.salvage import (
    TAG_CONTRADICTED,
    TAG_DOUBTED,
    TAG_STRAY,
    bucket_of,
    is_stray,
    older_keys,
    outside,
    own_keys,
)
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.bkey import PTR_DEV, PTR_OFFSET


def with_strays(walk: Walk, slots: Sequence[Slot], *, known_buckets: int) -> list[Slot]:
    """The slots, each with what the leaves of others say of its range.

    The gens of buckets from ``known_buckets`` on are not known.
    """
    parts = [_astray(walk, slot) for slot in slots
             if slot.is_astray or (slot.leaf is None and slot.lost is not None and slot.level == 0)]
    every = extent.concatenate(parts)
    if not len(every.start):
        return list(slots)
    strays = _judged(walk, every, known_buckets)
    found = []
    for slot in slots:
        own = extent.clip(strays, start=slot.start, end=slot.end)
        found.append(slot._replace(strays=own) if len(own.start) else slot)
    return found


def _astray(walk: Walk, slot: Slot) -> Extents:
    # The dirty keys of a leaf outside its range.
    rows = outside(own_keys(walk, slot), slot)
    return rows.take(is_stray(rows))


def _judged(walk: Walk, every: Extents, known_buckets: int) -> Extents:
    # As a flat map.  Of several in one place one that the journal knows comes first; else nobody knows which.
    history = older_keys(walk)[0]
    pieces = _pieces(every, np.concatenate([history.start, history.end]))
    place = np.searchsorted(history.end, pieces.start, "right")
    is_told = place < len(history.start)
    is_same = np.zeros(len(pieces.start), np.bool_)
    if len(history.start):
        told = history.take(np.minimum(place, len(history.start) - 1))
        is_told &= told.start <= pieces.start
        told = _tail(told, pieces.start)
        is_data = is_told & (told.nptrs > 0) & (PTR_DEV.get(told.ptr) == 0)
        is_same = is_data & (told.ptr == pieces.ptr)
        for row in np.flatnonzero(is_data & ~is_same & (staleness(walk, told) == 0)).tolist():
            is_same[row] = _has_same_content(walk, pieces.take(slice(row, row + 1)), told.take(slice(row, row + 1)))
    is_sure = is_same & (bucket_of(walk, pieces) < known_buckets)
    tags = np.where(is_sure, TAG_STRAY, np.where(is_told & ~is_same, TAG_CONTRADICTED, TAG_DOUBTED)).astype(np.uint8)
    pieces = pieces._replace(csum=tags)
    return extent.flatten(extent.concatenate(
        [pieces.take(tags == tag) for tag in (TAG_CONTRADICTED, TAG_DOUBTED, TAG_STRAY)]))


def _pieces(rows: Extents, bounds: npt.NDArray[np.uint64]) -> Extents:
    # The rows, cut at all bounds.
    bounds = np.unique(bounds)
    first, last = np.searchsorted(bounds, rows.start, "right"), np.searchsorted(bounds, rows.end, "left")
    count = np.maximum(last - first, 0) + 1
    row = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    if not len(bounds):
        return rows
    before = bounds[np.clip(first[row] + nth - 1, 0, len(bounds) - 1)]
    behind = bounds[np.clip(first[row] + nth, 0, len(bounds) - 1)]
    return extent.cut(rows.take(row), np.where(nth == 0, rows.start[row], before),
                      np.where(nth == count[row] - 1, rows.end[row], behind))


def _tail(rows: Extents, start: npt.NDArray[np.uint64]) -> Extents:
    # Each row from ``start`` on; rows that ``start`` is not in are not looked at.
    moved = np.where(rows.start <= start, start - rows.start, np.uint64(0)) << np.uint64(GEN_BITS)
    return rows._replace(start=start, ptr=rows.ptr + moved)


def _has_same_content(walk: Walk, one: Extents, other: Extents) -> bool:
    # Moving gc of a kernel copies data without the journal.
    count = int(one.size[0])
    first, second = (int(PTR_OFFSET.get(each.ptr)[0]) for each in (one, other))
    try:
        return walk.read(first, count) == walk.read(second, count)
    except BcachectlError:
        return False
