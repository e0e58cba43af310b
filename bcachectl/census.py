# SPDX-License-Identifier: GPL-2.0-only
"""From the columns of all buckets to the numbers that `bcachectl.snapshot` shows: counts, map, gens, priorities.

The engine has the columns in memory and an offline look reads them from the device; what is said about them is the
same.  Everything is done in bulk, since a tick may cost 20 ms and there may be millions of buckets.

A bucket's *state* is a number from 0, the index of its letter in `MAP_STATES`.  Seven counters fit into one 64-bit
word, so the buckets of a cell are counted by state with one addition each.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bcachectl.snapshot import GEN_GUARD, MAP_STATES, QUANTILES, BucketCounts, GenSnapshot, MapSnapshot, PrioSnapshot

STATE_UNUSED, STATE_FREE, STATE_OPEN, STATE_CLEAN, STATE_DIRTY, STATE_METADATA, STATE_RESERVED = range(7)

INITIAL_PRIO, BTREE_PRIO = 32768, 65535

_COUNTER_BITS = 9
_COUNTER_MAX = (1 << _COUNTER_BITS) - 1
_CHUNK = 1 << 16
"""Buckets looked at at a time: numpy widens what it counts to 64 bits, and that much stays in the processor's cache."""

_DIRTY_SHARE = 4
"""A cell counts as dirty if one in so many of its buckets is: dirty data is what must not be overlooked."""

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]


def census(state: U8, sectors_used: U16, *, bucket_size_sectors: int,
           cells: int) -> tuple[BucketCounts, MapSnapshot | None]:
    """Counts of all buckets by state, and their map in about ``cells`` cells (None for 0)."""
    nbuckets = len(state)
    wanted = max(1, min(cells, nbuckets))
    # Cells so large that a counter could overflow are counted in parts.
    parts = -(-nbuckets // (wanted * _COUNTER_MAX))
    starts = np.arange(wanted * parts, dtype=np.int64) * nbuckets // (wanted * parts)
    weights = np.left_shift(np.uint64(1), np.arange(7, dtype=np.uint64) * np.uint64(_COUNTER_BITS))
    packed = np.empty(len(starts), np.uint64)
    step = max(1, len(starts) * _CHUNK // nbuckets)
    for first in range(0, len(starts), step):
        low = int(starts[first])
        high = int(starts[first + step]) if first + step < len(starts) else nbuckets
        part = starts[first:first + step] - low
        packed[first:first + step] = np.add.reduceat(np.take(weights, state[low:high]), part)
    shifts = np.arange(7, dtype=np.uint64) * np.uint64(_COUNTER_BITS)
    counts = ((packed[:, None] >> shifts) & np.uint64(_COUNTER_MAX)).astype(np.int64)
    counts = counts.reshape(wanted, parts, 7).sum(axis=1)
    total = BucketCounts(*counts.sum(axis=0).tolist())
    if not cells:
        return total, None
    sizes = counts.sum(axis=1)
    dominant = counts.argmax(axis=1)
    dominant[counts[:, STATE_DIRTY] * _DIRTY_SHARE >= np.maximum(sizes, 1)] = STATE_DIRTY
    used = np.add.reduceat(sectors_used, starts[::parts], dtype=np.uint64)
    whole = np.array([STATE_OPEN, STATE_METADATA, STATE_RESERVED])
    fills = used.astype(np.int64) * 100 // (sizes * bucket_size_sectors)
    fills = np.where(np.isin(dominant, whole), 100, np.minimum(fills, 100))
    states = "".join([MAP_STATES[index] for index in dominant.tolist()])
    return total, MapSnapshot(states=states, fills=tuple(fills.tolist()), buckets_per_cell=nbuckets / wanted)


def gen_snapshot(gen: U8, last_gc: U8, *, need_gc: int) -> GenSnapshot:
    """How far gens are ahead of the oldest pointers."""
    distance = gen - last_gc
    # Two at a time: half as many to widen and to count.
    even = len(distance) & ~1
    pairs = np.zeros(1 << 16, np.int64)
    for first in range(0, even, 4 * _CHUNK):
        pairs += np.bincount(distance[first:min(even, first + 4 * _CHUNK)].view(np.uint16), minlength=1 << 16)
    both = pairs.reshape(256, 256)
    counts = both.sum(axis=0) + both.sum(axis=1) + np.bincount(distance[even:], minlength=256)
    farthest = int(np.flatnonzero(counts)[-1]) if len(gen) else 0
    histogram = [*counts[:GEN_GUARD].tolist(), int(counts[GEN_GUARD:].sum())]
    return GenSnapshot(histogram=tuple(histogram), max=farthest, need_gc=need_gc)


def prio_snapshot(prio: U16, *, bucket_size_sectors: int, min_prio: int | None = None,
                  rescale_sectors: int | None = None) -> PrioSnapshot:
    """Priorities as priority_stats tells them, from a count of each priority instead of a sort (sysfs.c)."""
    counts = np.zeros(BTREE_PRIO + 1, np.int64)
    for first in range(0, len(prio), 4 * _CHUNK):
        counts += np.bincount(prio[first:first + 4 * _CHUNK], minlength=BTREE_PRIO + 1)
    # Descending priorities: rank r is in the first group whose running total exceeds r.
    running = np.cumsum(counts[BTREE_PRIO - 1:0:-1])
    count = int(running[-1])
    quantiles: list[int] = []
    average = 0
    if count:
        ranks = [count * (number + 1) // (QUANTILES + 1) for number in range(QUANTILES)]
        places = np.searchsorted(running, ranks, side="right")
        quantiles = [INITIAL_PRIO - (BTREE_PRIO - 1 - place) for place in places.tolist()]
        total = int((counts[1:BTREE_PRIO] * np.arange(1, BTREE_PRIO)).sum())
        average = (INITIAL_PRIO * count - total) // count
    return PrioSnapshot(quantiles=tuple(quantiles), average=average,
                        sectors_per_quantile=count * bucket_size_sectors // (QUANTILES + 1), zero=int(counts[0]),
                        btree=int(counts[BTREE_PRIO]), min_prio=min_prio, rescale_sectors=rescale_sectors)
