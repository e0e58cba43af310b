# SPDX-License-Identifier: GPL-2.0-only
"""`Leaves`: what is live in all leaves of a set together, counted leaf by leaf in the cheapest way that is sure.

1. Plain leaves that were added up as they were scanned (`bcachectl.fsck.counted`) are taken all at once, or not at all.
2. Other plain leaves have a tally, or get one (`bcachectl.fsck.tally`).
3. Every other leaf, and each with data in a bucket of metadata, is given to the caller, who reads its map
   (`bcachectl.fsck.salvage`), judges its extents, and adds what it keeps.

In the end `Leaves.shared` tells whether two extents have a sector in common, and where.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from bcachectl.fsck.extents import U64, Extents
from bcachectl.fsck.records import PlainLeaf, Slot
from bcachectl.fsck.tally import RUN_BITS, RUN_MASK, Place, Spread, Tally, joined_spreads, run_buckets
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.bkey import INODE_SHIFT, PTR_OFFSET

RUNS_AT_ONCE = 1 << 17
LEAVES_AT_ONCE = 64


class Leaves:
    """The sums so far: extents, sectors, dirty data by device number, the buckets in use."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.extents = self.dirty_sectors = self.clean_sectors = 0
        self.dirty: dict[int, Spread] = {}
        self.used: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._plain: dict[int, PlainLeaf] = {}
        self._is_all_plain = self._is_counted = False
        self._counted_places: list[Place] = []
        self._taken: list[U64] = []

    def note(self, leaf: PlainLeaf) -> None:
        """A leaf that the walk came across."""
        self._plain[leaf.place.sector] = leaf

    def count(self, slots: Sequence[Slot], metadata: npt.NDArray[np.bool_], *,
              is_sure: bool) -> Iterator[list[Slot]]:
        """Count what needs no further look; of each `LEAVES_AT_ONCE` slots those that are left.

        ``metadata`` are its buckets; without ``is_sure`` keys or generations are missing, and no leaf is believed.
        """
        self.used = np.zeros(self.walk.geometry.nbuckets, np.bool_)
        leaves = self._plain_leaves(slots, is_sure)
        self._is_counted = self._take_counted(leaves, metadata)
        tallied = self._tallied(slots, leaves)
        for _number in range(0, len(slots), LEAVES_AT_ONCE):
            yield self._add_tallies(list(islice(tallied, LEAVES_AT_ONCE)), metadata)

    def add(self, kept: Extents) -> None:
        """Add what a leaf keeps that was left."""
        if not len(kept.start):
            return
        size, sector = kept.size, PTR_OFFSET.get(kept.ptr)
        self._taken.append(sector << np.uint64(RUN_BITS) | size)
        self.used[(sector >> np.uint64(self.walk.geometry.bucket_shift)).astype(np.intp)] = True
        self._add(len(size), int(size[kept.dirty].sum()), int(size[~kept.dirty].sum()))
        dirty = kept.take(kept.dirty)
        inodes = dirty.start >> np.uint64(INODE_SHIFT)
        for inode in np.unique(inodes).tolist():
            rows = dirty.take(inodes == inode)
            spread = Spread(int(rows.size.sum()), int(rows.start.min()), int(rows.end.max()))
            self.dirty = joined_spreads(self.dirty, {inode: spread})

    def shared(self) -> bool:
        """Whether two extents use a sector; to be asked once, when all leaves were counted or added."""
        counted = self.walk.counted
        if counted is not None and self._is_counted:
            if all(map(counted.claim, self._taken)):
                return False
            # Only runs tell whether they share a sector, where they share a block.
            self._taken += [tally.taken for tally in self.walk.tallies(self._counted_places) if tally is not None]
        taken = np.concatenate([np.zeros(0, np.uint64), *self._taken])
        self._taken.clear()
        return len(_overlapping(taken)) > 0

    def _add(self, extents: int, dirty_sectors: int, clean_sectors: int) -> None:
        self.extents += extents
        self.dirty_sectors += dirty_sectors
        self.clean_sectors += clean_sectors

    def _plain_leaves(self, slots: Sequence[Slot], is_sure: bool) -> list[PlainLeaf | None]:
        # For each slot, its leaf if that is plain and may be believed.
        plain, self._plain = self._plain, {}
        leaves = [plain.get(slot.leaf.sector) if slot.leaf is not None and slot.strays is None and not slot.lacks_set
                  and is_sure else None for slot in slots]
        found = [leaf if leaf is not None and (leaf.place.start, leaf.place.end) == (slot.start, slot.end) else None
                 for slot, leaf in zip(slots, leaves, strict=True)]
        self._is_all_plain = sum(leaf is not None for leaf in found) == len(plain)
        return found

    def _take_counted(self, leaves: Sequence[PlainLeaf | None], metadata: npt.NDArray[np.bool_]) -> bool:
        # Add what all leaves without a tally hold, if that can be done, and every one of them is still what it was.
        counted = self.walk.counted
        if counted is None or not self._is_all_plain or not counted.settle(self.walk.gens):
            return False
        if bool((counted.used & metadata).any()):
            return False
        self.used |= counted.used
        self._counted_places = [leaf.place for leaf in leaves if leaf is not None and leaf.tally is None]
        self.dirty = counted.dirty
        self._add(counted.extents, counted.dirty_sectors, counted.clean_sectors)
        return True

    def _tallied(self, slots: Sequence[Slot],
                 leaves: Sequence[PlainLeaf | None]) -> Iterator[tuple[Slot, Tally | None]]:
        # Each leaf that is not counted yet with its tally, None if it has none.  Tallies that newer generations
        # overtook are made anew.
        walk = self.walk
        rest = [(slot, leaf) for slot, leaf in zip(slots, leaves, strict=True)
                if leaf is None or leaf.tally is not None or not self._is_counted]
        is_late = [leaf is not None and (leaf.tally is None or leaf.raised != walk.raised) for _slot, leaf in rest]
        places = [leaf.place for (_slot, leaf), late in zip(rest, is_late, strict=True) if leaf is not None and late]
        again = walk.tallies(places) if places else iter(())
        for (slot, leaf), late in zip(rest, is_late, strict=True):
            yield slot, next(again) if late else leaf.tally if leaf is not None else None

    def _add_tallies(self, leaves: Sequence[tuple[Slot, Tally | None]], metadata: npt.NDArray[np.bool_]) -> list[Slot]:
        # Those that are left have no tally, or a bucket of metadata.
        tallies = [tally for _slot, tally in leaves if tally is not None]
        taken = np.concatenate([np.zeros(0, np.uint64), *(tally.taken for tally in tallies)])
        buckets = run_buckets(taken, self.walk.geometry)
        if metadata[buckets].any():
            if len(leaves) > 1:
                return [slot for leaf in leaves for slot in self._add_tallies([leaf], metadata)]
            return [slot for slot, _tally in leaves]
        self.used[buckets] = True
        self._taken.append(taken)
        for tally in tallies:
            self._add(tally.extents, tally.dirty_sectors, tally.clean_sectors)
            self.dirty = joined_spreads(self.dirty, tally.dirty)
        return [slot for slot, tally in leaves if tally is None]


def overlapping(parts: Sequence[Extents]) -> U64:
    """The sectors of the cache at which extents begin that share a sector with another one."""
    return _overlapping(np.concatenate([PTR_OFFSET.get(part.ptr) << np.uint64(RUN_BITS) | part.size for part in parts]))


def _overlapping(taken: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # The sectors at which runs begin that share a sector with their neighbour.  Sorts in place, and looks at some
    # neighbours at a time: there may be one run for every key of the set.
    taken.sort()
    found = [np.zeros(0, np.uint64)]
    for at in range(0, len(taken), RUNS_AT_ONCE):
        some = taken[at:at + RUNS_AT_ONCE + 1]
        sector = some >> np.uint64(RUN_BITS)
        rows = np.flatnonzero(sector[:-1] + (some[:-1] & np.uint64(RUN_MASK)) > sector[1:])
        found += [sector[rows], sector[rows + 1]]
    return np.concatenate(found)


