# SPDX-License-Identifier: GPL-2.0-only
"""`Counted`: plain leaves that are added up where they are scanned, by threads, and nothing is kept of each of them.

A tally of a leaf (`bcachectl.fsck.tally`) holds for the generations that it was made with, and carries a word for every
run of data, to be sorted with those of all others.  Where `bcachectl.fsck.counting` is compiled, most
sets need neither:

1. Each thread has a `Tallier` of its own, all with the generations that were known before the first leaf.  A thread
   takes the next piece of leaves, and `counts` gives what it says of each, in the order of the leaves.
2. What pointers say about generations goes to the walk, as with tallies.
3. When the walk is over, `Counted.settle` adds up what the threads have, and judges by the generations that buckets
   have then.

All together, or nothing: if one bucket of what was counted has got another generation, if a block is taken twice, if
there is anything else that takes more than a sum to tell, `settle` says so and the leaves have to be tallied.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from bcachectl.fsck.counting import COUNTED_BEHIND_MAX, CountingScan
from bcachectl.fsck.extents import U64
from bcachectl.fsck.tally import Place, Spread, Tallier, Tally, joined_spreads
from bcachectl.fsck.threads import in_order

LATE_MIN = 10_000
"""Fewer runs that have waited are judged before a thread has begun."""


class Counted:
    """What the leaves hold that ``talliers``, all with the generations ``gens``, have counted.

    ``raised`` is how often generations had been raised then.  The sums are there after `settle`.
    """

    def __init__(self, talliers: Sequence[Tallier], gens: npt.NDArray[np.uint8], raised: int) -> None:
        self.talliers, self.gens, self.raised, self.geometry = tuple(talliers), gens, raised, talliers[0].geometry
        self.extents = self.dirty_sectors = self.clean_sectors = 0
        self.dirty: dict[int, Spread] = {}
        self.used: npt.NDArray[np.bool_] = np.zeros(len(gens), np.bool_)
        self._scans: list[CountingScan] = [tallier.scan for tallier in talliers if tallier.scan is not None]

    def counts(self, places: Sequence[Place]) -> Generator[U64 | Tally | None, None, None]:
        """What `Tallier.count` says about each place, in order."""
        idle, leaves = list(self.talliers), self.talliers[0].piece_leaves

        def count(piece: Sequence[Place]) -> list[U64 | Tally | None]:
            tallier = idle.pop()
            try:
                return tallier.count(piece)
            finally:
                idle.append(tallier)

        pieces = [places[at:at + leaves] for at in range(0, len(places), leaves)]
        with closing(in_order(count, pieces, len(idle))) as found:
            yield from itertools.chain.from_iterable(found)

    def settle(self, gens: npt.NDArray[np.uint8]) -> bool:
        """Sum up, by the generations in the end; False if what was counted is not to be used."""
        raised = gens - self.gens
        claims = np.bitwise_or.reduce([scan.claims for scan in self._scans])
        if raised.any() and (int(raised.max()) > COUNTED_BEHIND_MAX or raised[self._used(claims)].any()):
            return False
        threads = len(self._scans) if max(scan.nlate for scan in self._scans) >= LATE_MIN else 1
        if not all(list(in_order(lambda scan: scan.settle(gens), self._scans, threads))):
            return False
        claims = self._scans[0].claims
        for scan in self._scans[1:]:
            if bool((claims & scan.claims).any()):
                return False
            claims |= scan.claims
        for scan in self._scans:
            self.extents += scan.all_extents
            self.dirty_sectors += scan.all_dirty_sectors
            self.clean_sectors += scan.all_sectors - scan.all_dirty_sectors
            self.dirty = joined_spreads(self.dirty, {inode: Spread(sectors, start, end)
                                                     for inode, sectors, start, end in scan.all_spreads()})
        self.used = self._used(claims)
        return True

    def _used(self, claims: U64) -> npt.NDArray[np.bool_]:
        # The buckets that have a bit.
        blocks, count = self.geometry.bucket_size_sectors // self.geometry.block_size_sectors, self.geometry.nbuckets
        if blocks % 64:
            parts: npt.NDArray[Any] = np.unpackbits(claims.view(np.uint8), bitorder="little")[:count * blocks]
        else:
            parts = claims[:count * (blocks // 64)]
        # Column by column: there are few, and many rows.
        used = np.zeros(count, np.bool_)
        for column in parts.reshape(count, -1).T:
            used |= column != 0
        return used

    def claim(self, runs: U64) -> bool:
        """Add runs of others, after `settle`; False if one of them shares a block."""
        return self._scans[0].claim(runs)
