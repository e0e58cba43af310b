# SPDX-License-Identifier: GPL-2.0-only
"""`Buckets`: the state of every bucket, as columns; `Marks`: what a garbage collection finds out about them.

A bucket is the unit of space.  Its ``gen`` says which pointers to it are valid: a pointer with an older gen is
*stale*.  A bucket is reused only through a new gen, so nothing has to look for its old keys (bcache.h, the essay at
its head).

| column | kept as | meaning |
|---|---|---|
| gen | u8 | current generation |
| last_gc | u8 | oldest gen of any pointer to the bucket that the last gc found |
| prio | u16 | replacement priority; `INITIAL_PRIO` when filled or hit, `BTREE_PRIO` for metadata, 0 never used |
| mark | u8 | what gc found in it: `MARK_NONE`, `MARK_RECLAIMABLE`, `MARK_DIRTY`, `MARK_METADATA` |
| sectors_used | u16 | live sectors, saturating at `MAX_SECTORS_USED` |
| move | u8 | chosen by moving gc as a source |
| pin | i32 | more than 0: must not be invalidated |

Each column is a numpy array for bulk questions and a memoryview of the same memory (``*_at``) for single elements.

Marks stay valid while a gc runs: the gc collects into `Marks` of its own and replaces the columns when it is done,
some buckets at a time.
What changes meanwhile (an allocation, a free, a bucket becoming dirty) is noted in both.  So the allocator never
waits for a gc that could have been answered by the marks of the last one, which the kernel's allocator did until
6.10."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bcachectl.ondisk.geometry import Geometry

INITIAL_PRIO = 32768
BTREE_PRIO = 65535
BUCKET_GC_GEN_MAX = 96
"""A bucket this many gens ahead of its oldest pointer is not invalidated before a gc (bcache.h)."""
MAX_SECTORS_USED = 8191

MARK_NONE, MARK_RECLAIMABLE, MARK_DIRTY, MARK_METADATA = range(4)

PTR_SECTOR_MASK = (1 << 43) - 1
PTR_DEV_SHIFT = 51

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U64 = npt.NDArray[np.uint64]


class Marks:
    """One gc's findings: mark and sectors by bucket, and how far back the oldest pointer to each lies (``gap``)."""

    __slots__ = ("mark", "sectors", "gap", "gen")

    def __init__(self, buckets: Buckets, *, keep_pinned: bool) -> None:
        count = len(buckets.gen)
        self.mark = np.zeros(count, np.uint8)
        self.sectors = np.zeros(count, np.uint32)
        self.gap = np.zeros(count, np.uint8)
        self.gen = buckets.gen.copy()
        if keep_pinned:
            pinned = np.flatnonzero(buckets.pin > 0)
            self.mark[pinned] = buckets.mark[pinned]
            self.sectors[pinned] = buckets.sectors_used[pinned]

    def note_pointers(self, bucket: npt.NDArray[np.int64], gen: U8) -> None:
        """Remember the oldest pointer to each bucket, fresh or stale (btree.c, __bch_btree_mark_key, step 1)."""
        behind = self.gen[bucket] - gen
        np.maximum.at(self.gap, bucket, np.where(behind > 128, 0, behind).astype(np.uint8))

    def add(self, bucket: npt.NDArray[np.int64], mark: U8, sectors: npt.NDArray[np.uint32]) -> None:
        """Count fresh pointers: the highest mark wins, the sectors add up."""
        np.maximum.at(self.mark, bucket, mark)
        np.add.at(self.sectors, bucket, sectors)


class Lowest:
    """The buckets of the ``count`` lowest values, found in parts; among equals those that came first."""

    __slots__ = ("count", "limit", "index", "value")

    def __init__(self, count: int) -> None:
        self.count = count
        self.limit = 1 << 32
        self.index = np.empty(0, np.int64)
        self.value = np.empty(0, np.uint32)

    def add(self, index: npt.NDArray[np.int64], value: npt.NDArray[np.uint32]) -> None:
        """Take in what is lower than what is kept so far; ``index`` ascends, and is above all that came before."""
        if self.limit < 1 << 32:
            lower = value < np.uint32(self.limit)
            index, value = index[lower], value[lower]
        self.index = np.concatenate((self.index, index))
        self.value = np.concatenate((self.value, value))
        if self.count <= 0:
            self.index, self.value = self.index[:0], self.value[:0]
        elif len(self.value) >= self.count:
            self.limit = int(np.partition(self.value, self.count - 1)[self.count - 1])
            keep = self.value < np.uint32(self.limit)
            keep[np.flatnonzero(self.value == np.uint32(self.limit))[: self.count - np.count_nonzero(keep)]] = True
            self.index, self.value = self.index[keep], self.value[keep]

    def in_order(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Buckets and values, the lowest value first."""
        order = np.argsort(self.value, kind="stable")
        return self.index[order], self.value[order]


class Buckets:
    """All buckets of the cache device; see the module's essay for the columns."""

    __slots__ = (
        "geometry",
        "nbuckets",
        "first_bucket",
        "bucket_shift",
        "gen",
        "last_gc",
        "prio",
        "mark",
        "sectors_used",
        "move",
        "pin",
        "gen_at",
        "last_gc_at",
        "prio_at",
        "mark_at",
        "sectors_used_at",
        "move_at",
        "pin_at",
        "avail_nbuckets",
        "in_use_percent",
        "need_gc",
        "min_prio",
        "rescale_sectors",
        "marks",
    )

    def __init__(self, geometry: Geometry) -> None:
        count = geometry.nbuckets
        self.geometry = geometry
        self.nbuckets = count
        self.first_bucket = geometry.first_bucket
        self.bucket_shift = geometry.bucket_shift
        self.gen: U8 = np.zeros(count, np.uint8)
        self.last_gc: U8 = np.zeros(count, np.uint8)
        self.prio: U16 = np.zeros(count, np.uint16)
        self.mark: U8 = np.zeros(count, np.uint8)
        self.sectors_used: U16 = np.zeros(count, np.uint16)
        self.move: U8 = np.zeros(count, np.uint8)
        self.pin: npt.NDArray[np.int32] = np.zeros(count, np.int32)
        self.gen_at = memoryview(self.gen.data)
        self.last_gc_at = memoryview(self.last_gc.data)
        self.prio_at = memoryview(self.prio.data)
        self.mark_at = memoryview(self.mark.data)
        self.sectors_used_at = memoryview(self.sectors_used.data)
        self.move_at = memoryview(self.move.data)
        self.pin_at = memoryview(self.pin.data)
        self.avail_nbuckets = 0
        self.in_use_percent = 0
        self.need_gc = 0
        self.min_prio = 0
        self.rescale_sectors = 0
        self.marks: Marks | None = None

    # Pointers.

    def bucket_of(self, ptr: int) -> int:
        """The bucket that a pointer word points into."""
        return ((ptr >> 8) & PTR_SECTOR_MASK) >> self.bucket_shift

    def is_stale(self, ptr: int) -> bool:
        """Whether the bucket was given a new gen since the pointer was made (bcache.h, ptr_stale)."""
        behind = (self.gen_at[((ptr >> 8) & PTR_SECTOR_MASK) >> self.bucket_shift] - ptr) & 255
        return 0 < behind <= 128

    def in_range(self, ptr: int, nsectors: int) -> bool:
        """Whether ``nsectors`` at the pointer lie inside one allocatable bucket of device 0."""
        sector = (ptr >> 8) & PTR_SECTOR_MASK
        bucket = sector >> self.bucket_shift
        return (
            ptr >> PTR_DEV_SHIFT == 0
            and self.first_bucket <= bucket < self.nbuckets
            and (sector & ((1 << self.bucket_shift) - 1)) + nsectors <= 1 << self.bucket_shift
        )

    def in_range_mask(self, ptrs: U64, nsectors: U64) -> npt.NDArray[np.bool_]:
        """`in_range` for a whole column."""
        bucket = self.buckets_of(ptrs)
        inside = (ptrs >> np.uint64(8)) & np.uint64((1 << self.bucket_shift) - 1)
        mask: npt.NDArray[np.bool_] = (
            (ptrs >> np.uint64(PTR_DEV_SHIFT) == 0)
            & (bucket >= self.first_bucket)
            & (bucket < self.nbuckets)
            & (inside + nsectors <= np.uint64(1 << self.bucket_shift))
        )
        return mask

    def buckets_of(self, ptrs: U64) -> npt.NDArray[np.int64]:
        """`bucket_of` for a whole column."""
        sectors = (ptrs >> np.uint64(8)) & np.uint64(PTR_SECTOR_MASK)
        return (sectors >> np.uint64(self.bucket_shift)).astype(np.int64)

    def stale_mask(self, bucket: npt.NDArray[np.int64], ptrs: U64) -> npt.NDArray[np.bool_]:
        """`is_stale` for a whole column; ``bucket`` is `buckets_of` of it."""
        behind = self.gen[bucket] - (ptrs & np.uint64(255)).astype(np.uint8)
        return (behind > 0) & (behind <= 128)

    def raise_gens(self, ptrs: U64) -> None:
        """Bring the gens up to those of pointers that are ahead of them (btree.c, bch_initial_mark_key).

        Gens on disk are a lower bound: a pointer may carry a gen that no prio_write has recorded yet.
        """
        bucket = self.buckets_of(ptrs)
        gens = (ptrs & np.uint64(255)).astype(np.uint8)
        ahead = gens - self.gen[bucket]
        for index in np.nonzero((ahead > 0) & (ahead < 128))[0].tolist():
            # One at a time, because two pointers to one bucket may both be ahead: the later gen wins.
            here, gen = int(bucket[index]), int(gens[index])
            if 0 < (gen - self.gen_at[here]) & 255 < 128:
                self.gen_at[here] = gen

    # State.

    def bump_gen(self, bucket: int) -> int:
        """Give the bucket its next gen and return it (alloc.c, bch_inc_gen)."""
        gen = (self.gen_at[bucket] + 1) & 255
        self.gen_at[bucket] = gen
        self.need_gc = max(self.need_gc, (gen - self.last_gc_at[bucket]) & 255)
        return gen

    def bump_gens(self, bucket: npt.NDArray[np.int64]) -> None:
        """`bump_gen` for many buckets, no two of them the same."""
        self.gen[bucket] += 1
        self.need_gc = max(self.need_gc, int((self.gen[bucket] - self.last_gc[bucket]).max(initial=0)))

    def unpin(self, bucket: int) -> None:
        """Drop one pin."""
        self.pin_at[bucket] -= 1
        assert self.pin_at[bucket] >= 0, bucket

    def set_mark(self, bucket: int, mark: int, sectors: int) -> None:
        """Set mark and used sectors, for a running gc as well."""
        self.mark_at[bucket] = mark
        self.sectors_used_at[bucket] = min(sectors, MAX_SECTORS_USED)
        if self.marks is not None:
            self.marks.mark[bucket] = mark
            self.marks.sectors[bucket] = sectors

    def mark_dirty(self, bucket: int) -> None:
        """The bucket is about to get dirty data: it must not be reclaimed, whatever gc has seen of it."""
        self.mark_at[bucket] = MARK_DIRTY
        if self.marks is not None:
            self.marks.mark[bucket] = MARK_DIRTY

    def taken(self) -> None:
        """One available bucket less."""
        if self.avail_nbuckets > 0:
            self.avail_nbuckets -= 1
            self._update_in_use()

    def free(self, bucket: int) -> None:
        """Give up a metadata bucket: nothing points to it any more (alloc.c, __bch_bucket_free)."""
        self.set_mark(bucket, MARK_NONE, 0)
        if self.avail_nbuckets < self.nbuckets:
            self.avail_nbuckets += 1
            self._update_in_use()

    def _update_in_use(self) -> None:
        self.in_use_percent = (self.nbuckets - self.avail_nbuckets) * 100 // self.nbuckets

    # gc.

    def start_gc(self) -> Marks:
        """Begin to collect new marks; those of pinned buckets are kept (btree.c, btree_gc_start)."""
        self.marks = Marks(self, keep_pinned=True)
        return self.marks

    def finish_gc(self, metadata: list[int]) -> None:
        """Put all collected marks in force at once; ``metadata`` lists journal, prio and uuid buckets."""
        self.complete_marks(metadata)
        self.put_in_force(0, self.nbuckets)
        self.end_gc()

    def complete_marks(self, metadata: list[int]) -> None:
        """Add what no key tells to the collected marks (btree.c, bch_btree_gc_finish)."""
        assert self.marks is not None, "marks are completed while a gc collects them"
        self.marks.mark[metadata] = MARK_METADATA

    def put_in_force(self, first: int, last: int) -> None:
        """Put the collected marks of buckets ``first`` to ``last`` in force."""
        marks, part = self.marks, slice(first, last)
        assert marks is not None, "marks are put in force while a gc collects them"
        self.mark[part] = marks.mark[part]
        self.sectors_used[part] = np.minimum(marks.sectors[part], MAX_SECTORS_USED)
        self.last_gc[part] = marks.gen[part] - marks.gap[part]

    def end_gc(self) -> None:
        """All collected marks are in force: count what they say."""
        self.marks = None
        self.need_gc = int((self.gen - self.last_gc)[self.first_bucket :].max(initial=0))
        free = (self.pin[self.first_bucket :] == 0) & (self.mark[self.first_bucket :] <= MARK_RECLAIMABLE)
        self.avail_nbuckets = int(np.count_nonzero(free))
        self._update_in_use()

    def candidate_mask(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Which of the buckets ``first`` to ``last`` may be invalidated (alloc.c, bch_can_invalidate_bucket)."""
        mask: npt.NDArray[np.bool_] = self.mark[first:last] <= MARK_RECLAIMABLE
        mask &= self.pin[first:last] == 0
        mask &= self.gen[first:last] - self.last_gc[first:last] < BUCKET_GC_GEN_MAX
        mask[: max(0, self.first_bucket - first)] = False
        return mask

    def candidates(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """The numbers of those."""
        return np.flatnonzero(self.candidate_mask(first, last)) + first

    def can_invalidate(self, bucket: int) -> bool:
        """`candidates` for one bucket."""
        return (
            self.mark_at[bucket] <= MARK_RECLAIMABLE
            and self.pin_at[bucket] == 0
            and (self.gen_at[bucket] - self.last_gc_at[bucket]) & 255 < BUCKET_GC_GEN_MAX
        )

    # Priorities.

    def rescale_step_sectors(self) -> int:
        """Traffic between two rescales: 1/1024 of the cache (alloc.c, bch_rescale_priorities)."""
        return max(1, (self.nbuckets << self.bucket_shift) // 1024)

    def rescale(self, times: int = 1) -> None:
        """Age every unpinned data bucket so many times by one; a priority of 0 stays and `BTREE_PRIO` is left alone."""
        view = slice(self.first_bucket, self.nbuckets)
        prio = self.prio[view]
        eligible = (prio != 0) & (prio != BTREE_PRIO) & (self.pin[view] == 0)
        last = eligible & (prio >= times)       # those that the last of the passes finds
        prio -= np.minimum(prio, np.uint16(min(times, BTREE_PRIO))) * eligible
        self.min_prio = int(prio.min(initial=BTREE_PRIO, where=last))
