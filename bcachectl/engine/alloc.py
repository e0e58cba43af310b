# SPDX-License-Identifier: GPL-2.0-only
"""The bucket allocator: free lists by `Reserve`, ``free_inc``, invalidation, and the task that refills them.

Invariant: a bucket on a free list is never pointed to by a fresh pointer, in memory or on disk, whatever crash comes.

Life of a bucket (alloc.c, the essay at its head):

1. It holds nothing, or clean data.  `Allocator.invalidate` picks it by the replacement policy, bumps its gen, pins it
   and pushes it on ``free_inc``.  From now on its old keys are stale in memory, but not yet on disk.
2. When ``free_inc`` is full, `PrioWriter.write` writes all gens to new prio buckets and a journal entry that names
   them.
3. Only then are the buckets released: discarded if that is on, and pushed on the free lists, PRIO first.
4. `Allocator.alloc_nowait` pops it, for data or metadata; its pin passes to whoever took it.
5. gc finds out when nothing, or only clean data, points to it, and all begins again.

Two deviations from the kernel, both towards safety.  If the prio write cannot run for lack of buckets the kernel
drains ``free_inc`` all the same (its gens are not durable then); here the buckets stay until a prio write succeeded.
And the kernel waits until ``free_inc`` is completely full, which never happens when few buckets are clean: here a gc
that could not help lets a partly filled one through."""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from bcachectl.engine.buckets import (
    BTREE_PRIO,
    INITIAL_PRIO,
    MARK_METADATA,
    MARK_NONE,
    MARK_RECLAIMABLE,
    Buckets,
    Lowest,
)
from bcachectl.engine.sched import NS_PER_S, WaitQueue
from bcachectl.ondisk.superblock import Replacement

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet

VICTIMS_PER_SLICE = 256
"""Buckets invalidated or released before others have their turn."""

NO_BUCKET = -1
"""What the allocator gives when it has nothing, or when the set has failed."""


class Entropy(Protocol):
    """Where randomness comes from; handed in, so that a run can be repeated."""

    def getrandbits(self, k: int, /) -> int:
        """``k`` random bits."""
        ...


class Reserve(IntEnum):
    """Who a free bucket is kept for (bcache.h)."""

    BTREE = 0
    PRIO = 1
    MOVINGGC = 2
    NONE = 3


_BTREE, _PRIO, _MOVINGGC, _NONE = Reserve
"""Python 3.11 calls a function for each member that is looked up in its enumeration."""
_NAMES = tuple(reserve.name for reserve in Reserve)


def fifo_size(requested: int) -> int:
    """Capacity of a list made for ``requested`` buckets (util.h, init_fifo): rounded up to 2^n - 1 above four."""
    return requested if requested <= 4 else (1 << (requested - 1).bit_length()) - 1


class FreeList:
    """A fifo of bucket numbers with a fixed capacity."""

    __slots__ = ("buckets", "size")

    def __init__(self, size: int) -> None:
        self.buckets: deque[int] = deque()
        self.size = size

    def push(self, bucket: int) -> bool:
        """Append if there is room."""
        if len(self.buckets) >= self.size:
            return False
        self.buckets.append(bucket)
        return True

    def __len__(self) -> int:
        return len(self.buckets)

    @property
    def full(self) -> bool:
        """No room left."""
        return len(self.buckets) >= self.size


class Allocator:
    """Free buckets of one cache device, and the coroutine that makes more of them."""

    __slots__ = (
        "cset",
        "buckets",
        "free",
        "free_inc",
        "heap_size",
        "fifo_last_bucket",
        "invalidate_needs_gc",
        "prio_blocked",
        "alloc_wait",
        "bucket_wait",
        "released",
        "replacement",
        "discard",
        "collected",
        "gc_runs",
        "discards",
        "discarding",
        "allocations",
    )

    def __init__(self, cset: CacheSet, buckets: Buckets) -> None:
        count = buckets.nbuckets
        unit = (1 << (count - 1).bit_length()) >> 10
        self.cset = cset
        self.buckets = buckets
        self.free = [
            FreeList(fifo_size(min(max(count >> 7, 32), 256))),
            FreeList(buckets.geometry.prio_buckets),
            FreeList(fifo_size(unit)),
            FreeList(fifo_size(unit)),
        ]
        self.free_inc = FreeList(fifo_size(4 * unit))
        self.heap_size = 8 * unit
        self.fifo_last_bucket = 0
        self.invalidate_needs_gc = False
        self.prio_blocked = 0
        self.alloc_wait = WaitQueue(cset.sched, "allocator")
        self.bucket_wait = WaitQueue(cset.sched, "bucket_wait")
        self.released = 0
        self.replacement = Replacement.LRU
        self.discard = False
        self.collected = False
        self.gc_runs = 0
        self.discards = 0
        self.discarding = False
        self.allocations = 0

    # Taking buckets.

    def alloc_nowait(self, reserve: Reserve) -> int:
        """A free bucket with one pin, or NO_BUCKET (alloc.c, bch_bucket_alloc): general ones first, then the
        reserve's.
        """
        if self.cset.io_disabled:
            return NO_BUCKET
        general, kept = self.free[_NONE].buckets, self.free[reserve].buckets
        if general:
            bucket = general.popleft()
        elif kept:
            bucket = kept.popleft()
        else:
            self.cset.events.emit("bcache_alloc_fail", reserve=_NAMES[reserve])
            self.alloc_wait.wake_all()
            return NO_BUCKET
        if not self._refill():
            self.alloc_wait.wake_all()
        buckets = self.buckets
        assert buckets.pin_at[bucket] == 1, bucket
        size = 1 << buckets.bucket_shift
        if reserve <= _PRIO:
            buckets.set_mark(bucket, MARK_METADATA, size)
            buckets.prio_at[bucket] = BTREE_PRIO
        else:
            buckets.set_mark(bucket, MARK_RECLAIMABLE, size)
            buckets.prio_at[bucket] = INITIAL_PRIO
        buckets.move_at[bucket] = 0
        buckets.taken()
        self.allocations += 1
        self.cset.events.emit("bcache_alloc", bucket=bucket, reserve=_NAMES[reserve])
        return bucket

    async def alloc(self, reserve: Reserve) -> int:
        """Like `alloc_nowait`, but waits for a bucket; NO_BUCKET only if the set has failed."""
        while True:
            bucket = self.alloc_nowait(reserve)
            if bucket != NO_BUCKET or self.cset.io_disabled:
                return bucket
            await self.bucket_wait.wait()

    def available_nowait(self, reserve: Reserve) -> int:
        """How many `alloc_nowait` calls for the reserve would succeed now."""
        if self.cset.io_disabled:
            return 0
        return len(self.free[_NONE].buckets) + len(self.free[reserve].buckets)

    # Making buckets free.

    def initial_fill(self) -> None:
        """Fill PRIO and BTREE from buckets that hold nothing (btree.c, bch_initial_gc_finish).

        Their new gens are not on disk, which is safe only because no pointer to them exists anywhere.
        """
        buckets = self.buckets
        candidates = buckets.candidates(0, buckets.nbuckets)
        wanted = self.free[_PRIO].size + self.free[_BTREE].size
        for bucket in candidates[buckets.mark[candidates] == MARK_NONE][:wanted].tolist():
            self._bump(bucket)
            is_kept = self.free[_PRIO].push(bucket) or self.free[_BTREE].push(bucket)
            assert is_kept, "both reserves together have room for what was wanted"

    async def run(self) -> None:
        """The allocator thread (alloc.c, bch_allocator_thread); ends when the set stops or fails."""
        cset = self.cset
        while True:
            if not await self._release():
                return
            while True:
                while self.invalidate_needs_gc:
                    if cset.stopping or cset.io_disabled:
                        return
                    await self.alloc_wait.wait()
                if cset.stopping or cset.io_disabled:
                    return
                marks = self.gc_runs
                await self.invalidate()
                # A prio write for fewer buckets than it takes itself gains nothing.
                worth = self.collected and len(self.free_inc) > self.free[_PRIO].size
                if self.free_inc.full or not cset.sync or worth:
                    break
                if marks == self.gc_runs:
                    # Else the marks have changed half-way, and what was passed over may be free now.
                    self.request_gc()
            self.collected = False
            while not await self._write_prios():
                if cset.stopping or cset.io_disabled:
                    return
            self.released = len(self.free_inc)

    async def _write_prios(self) -> bool:
        # Makes the gens of free_inc durable.  False: try again; the caller looks at stopping first.
        cset = self.cset
        while self.prio_blocked:
            if cset.stopping or cset.io_disabled:
                return False
            await self.alloc_wait.wait()
        if not cset.sync:
            return True
        if await cset.prios.write(wait=False):
            return True
        if not cset.io_disabled and not cset.stopping:
            # No buckets for the prio sets.  The kernel gives free_inc away here; see the essay.
            self.request_gc()
            await self.alloc_wait.wait(deadline_ns=cset.sched.now_ns + NS_PER_S)
        return False

    async def _release(self) -> bool:
        # Moves the buckets whose gens are durable from free_inc to the free lists; False if the set stops meanwhile.
        # Whoever waits for a bucket is woken once for all that came, not once for each.
        cset = self.cset
        pushed = 0
        while self.released:
            pushed += 1
            if pushed % VICTIMS_PER_SLICE == 0:
                self.bucket_wait.wake_all()
                await cset.sched.yield_now()
            if self.released and self.discard and cset.cache.can_discard:
                bucket, size = self.free_inc.buckets[0], 1 << self.buckets.bucket_shift
                self.discarding = True
                await cset.cache.discard(bucket << self.buckets.bucket_shift, size)
                self.discards += 1
                self.bucket_wait.wake_all()
            while self.released and not self._push_released():
                if cset.stopping or cset.io_disabled:
                    return False
                self.bucket_wait.wake_all()
                await self.alloc_wait.wait()
            self.discarding = False
        self.bucket_wait.wake_all()
        return not (cset.stopping or cset.io_disabled)

    def _refill(self) -> bool:
        # What `_release` would do now that a bucket was taken, without its turn; False if the allocator has something
        # to do.
        if not self.released or self.discard or self.discarding or len(self.bucket_wait) \
                or not self._push_released():
            return False
        return self.released > 0

    def _push_released(self) -> bool:
        # PRIO is refilled first, so that a prio write can always go on (alloc.c, bch_allocator_push).
        buckets = self.free_inc.buckets
        for reserve in (_PRIO, _BTREE, _MOVINGGC, _NONE):
            if self.free[reserve].push(buckets[0]):
                buckets.popleft()
                self.released -= 1
                return True
        return False

    def request_gc(self) -> None:
        """Too little can be invalidated: ask for a gc, and invalidate nothing before it is done."""
        self.invalidate_needs_gc = True
        self.collected = False
        self.cset.gc.wake()

    def gc_finished(self) -> None:
        """A gc ended: look for victims again."""
        self.gc_runs += 1
        self.collected = self.invalidate_needs_gc
        self.invalidate_needs_gc = False
        self.alloc_wait.wake_all()

    # Invalidation.

    async def invalidate(self) -> None:
        """Pick victims by the replacement policy until free_inc is full or none is left."""
        if self.replacement == Replacement.LRU:
            await self._invalidate_lru()
        elif self.replacement == Replacement.FIFO:
            await self._invalidate_fifo()
        elif self.replacement == Replacement.RANDOM:
            await self._invalidate_random()

    async def _invalidate_lru(self) -> None:
        # The lowest `_lru_value` first.  Among equals the lowest bucket number goes first; the kernel's order among
        # equals is that of its heap.
        buckets, step = self.buckets, self.cset.options.slice_buckets
        room = min(self.free_inc.size - len(self.free_inc), self.heap_size)
        if room <= 0:
            return
        lowest = Lowest(room)
        for first in range(0, buckets.nbuckets, step):
            if first:
                await self.cset.sched.yield_now()
            value = self._lru_value(first, first + step)
            mask = buckets.candidate_mask(first, first + step)
            if lowest.limit < 1 << 32:
                mask &= value < np.uint32(lowest.limit)
            index = np.flatnonzero(mask)
            lowest.add(first + index, value[index])
        victims, _value = lowest.in_order()
        await self._invalidate_all(victims)

    def _lru_value(self, first: int, last: int) -> npt.NDArray[np.uint32]:
        # (prio - min_prio + (INITIAL_PRIO - min_prio) / 8) * sectors_used, in u32 arithmetic (alloc.c, bucket_prio).
        buckets = self.buckets
        value = buckets.prio[first:last].astype(np.uint32)
        value += np.uint32((INITIAL_PRIO - buckets.min_prio) // 8 - buckets.min_prio & 0xFFFFFFFF)
        value *= buckets.sectors_used[first:last]
        return value

    async def _invalidate_fifo(self) -> None:
        buckets, step = self.buckets, self.cset.options.slice_buckets
        left = buckets.nbuckets
        while left > 0 and not self.free_inc.full:
            if left < buckets.nbuckets:
                await self.cset.sched.yield_now()
            if not buckets.first_bucket <= self.fifo_last_bucket < buckets.nbuckets:
                self.fifo_last_bucket = buckets.first_bucket
            first = self.fifo_last_bucket
            last = min(buckets.nbuckets, first + min(left, step))
            candidates = buckets.candidates(first, last)
            room = min(self.free_inc.size - len(self.free_inc), VICTIMS_PER_SLICE)
            if len(candidates) > room:
                candidates = candidates[:room]
                last = int(candidates[-1]) + 1
            self._invalidate_now(candidates)
            self.fifo_last_bucket = last
            left -= last - first

    async def _invalidate_random(self) -> None:
        buckets = self.buckets
        span = buckets.nbuckets - buckets.first_bucket
        for attempt in range(1, buckets.nbuckets // 2 + 1):
            if self.free_inc.full:
                return
            bucket = self.cset.entropy.getrandbits(64) % span + buckets.first_bucket
            if buckets.can_invalidate(bucket):
                self._invalidate_now(np.array([bucket]))
            if attempt % VICTIMS_PER_SLICE == 0:
                await self.cset.sched.yield_now()

    async def _invalidate_all(self, victims: npt.NDArray[np.int64]) -> None:
        # A round of a large cache takes thousands.  Each is looked at again: it may have been pinned or dirtied.
        can_invalidate = self.buckets.can_invalidate
        for first in range(0, len(victims), VICTIMS_PER_SLICE):
            if first:
                await self.cset.sched.yield_now()
            part = victims[first : first + VICTIMS_PER_SLICE]
            self._invalidate_now(part[[can_invalidate(bucket) for bucket in part.tolist()]])

    def _invalidate_now(self, victims: npt.NDArray[np.int64]) -> None:
        # A key with the old gen must never match again (alloc.c, __bch_invalidate_one_bucket).
        buckets, emit = self.buckets, self.cset.events.emit
        numbers = victims.tolist()
        for bucket, sectors in zip(numbers, buckets.sectors_used[victims].tolist(), strict=True):
            emit("bcache_invalidate", bucket=bucket, sectors=sectors)
        buckets.bump_gens(victims)
        buckets.prio[victims] = INITIAL_PRIO
        buckets.pin[victims] += 1
        self.free_inc.buckets.extend(numbers)
        assert len(self.free_inc) <= self.free_inc.size, "no more is invalidated than free_inc has room for"

    def _bump(self, bucket: int) -> None:
        buckets = self.buckets
        assert buckets.can_invalidate(bucket), bucket
        buckets.bump_gen(bucket)
        buckets.prio_at[bucket] = INITIAL_PRIO
        buckets.pin_at[bucket] += 1

    # Priorities.

    def rescale(self, sectors: int) -> None:
        """Count traffic; age all priorities once for each 1/1024 of the cache (alloc.c, bch_rescale_priorities)."""
        buckets = self.buckets
        buckets.rescale_sectors -= sectors
        if buckets.rescale_sectors < 0:
            buckets.rescale_sectors += buckets.rescale_step_sectors()
            buckets.rescale()

    def rescale_for_all(self, sectors: int) -> None:
        """Count the traffic of many requests, as `rescale` would for each of them."""
        buckets = self.buckets
        buckets.rescale_sectors -= sectors
        if buckets.rescale_sectors < 0:
            step = buckets.rescale_step_sectors()
            times = -(buckets.rescale_sectors // step)
            buckets.rescale_sectors += times * step
            buckets.rescale(times)

    def on_lists(self) -> list[int]:
        """Every bucket on a free list or on free_inc."""
        return [bucket for free in self.free for bucket in free.buckets] + list(self.free_inc.buckets)
