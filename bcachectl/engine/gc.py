# SPDX-License-Identifier: GPL-2.0-only
"""`Gc`: finds out what every bucket holds, in slices between which requests go on; tidies the btree on its way.

A run:

1. New `Marks` are begun; the marks in force stay in force until the end.
2. From left to right each leaf is visited: its pointers are marked, it is rewritten if too much of it is stale,
   neighbours that fit together are put together, and if it is dirty it is written.  All these writes are awaited
   before the end: the marks say that a bucket is clean or empty only if the disk says so too (un-dirtied keys
   are not journaled).
3. The interior nodes, all in memory, are marked at one moment.
4. The new marks are put in force, a range of buckets at a time (`Buckets.put_in_force`): each bucket's marks are true
   before and after, so it does not matter which of them have changed already.
5. The allocator is told; then moving gc looks for sparse buckets.

When: after 1/16 of the cache has been written, or when the allocator found too little to invalidate.  A run that
could not tell anything new, because nothing changed since the last one, waits for a change.

No step takes long.  A slice marks at most `Options.slice_keys` keys; a large leaf takes several.  Then `Gc.pause`
lets others go first: for `SLEEP_NS` if requests come in, so that hardly any of them meets a slice; for
`HURRY_SLEEP_NS` if the allocator has asked for this run; only for one turn if someone waits for a bucket or nobody
asks for anything.

What needs no barrier: buckets allocated during a run are marked by the allocator, in the new marks too, and pinned
buckets keep their marks.

Kernel: btree.c, bch_btree_gc, btree_gc_recurse, bch_btree_gc_finish, bch_btree_check.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bcachectl.engine.buckets import (
    BTREE_PRIO,
    INITIAL_PRIO,
    MARK_DIRTY,
    MARK_METADATA,
    MARK_RECLAIMABLE,
    Buckets,
    Marks,
)
from bcachectl.engine.node import DIRTY, HAS_PTR, SIZE_MASK, Node
from bcachectl.engine.sched import NS_PER_MS, NS_PER_S, Task, WaitQueue
from bcachectl.errors import Corrupt
from bcachectl.ondisk.bkey import INODE_SHIFT

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet

GC_MERGE_NODES = 4
LEAF_COST_KEYS = 1024
"""What a visit of a leaf costs besides its keys."""
WRITE_COST_KEYS = 1 << 12
"""What writing a leaf costs."""
SLEEP_NS = 20 * NS_PER_MS
"""Pause between two slices while requests come in (the kernel's is 100 ms, after ten nodes or more)."""
HURRY_SLEEP_NS = 1 * NS_PER_MS
"""The same when the run is wanted soon."""
REWRITE_STALE = 10
"""A node with a pointer this many gens behind is rewritten, so that last_gc can advance (btree.c, gc_rewrite)."""
KEY_TOO_STALE = 96


class Gc:
    """Garbage collection of a running set."""

    __slots__ = (
        "cset",
        "queue",
        "done",
        "sectors_to_gc",
        "running",
        "runs",
        "last_duration_ns",
        "last_start_ns",
        "nodes",
        "nkeys",
        "data_sectors",
        "changes_seen",
        "forced",
        "position",
        "always_rewrite",
        "after_writeback",
        "slice_left",
        "requests_seen",
    )

    def __init__(self, cset: CacheSet) -> None:
        self.cset = cset
        self.queue = WaitQueue(cset.sched, "gc")
        self.done = WaitQueue(cset.sched, "gc done")
        self.sectors_to_gc = 0
        self.running = False
        self.runs = 0
        self.last_duration_ns = 0
        self.last_start_ns = 0
        self.nodes = 0
        self.nkeys = 0
        self.data_sectors = 0
        self.changes_seen = -1
        self.forced = False
        self.position = 0
        self.always_rewrite = False
        self.after_writeback = False
        self.slice_left = 0
        self.requests_seen = 0
        self._reset_sectors()

    def _reset_sectors(self) -> None:
        geometry = self.cset.geometry
        self.sectors_to_gc = geometry.bucket_size_sectors * geometry.nbuckets // 16

    def note_sectors(self, sectors: int) -> None:
        """Count inserted sectors; enough of them start a run."""
        self.sectors_to_gc -= sectors
        if self.sectors_to_gc < 0 and not self.running:
            self.wake()

    def wake(self) -> None:
        """Look again whether there is reason to run."""
        self.queue.wake_all()

    def force(self) -> None:
        """Run once, if anything changed since the last run."""
        if self.btree_changed():
            self.sectors_to_gc = -1
            self.wake()

    async def run_now(self) -> None:
        """Run, and return when a whole run that began after this call is done."""
        cset = self.cset
        self.forced = True
        wanted = self.runs + (2 if self.running else 1)
        self.wake()
        while self.runs < wanted and not (cset.io_disabled or cset.stopping):
            await self.done.wait()

    async def run(self) -> None:
        """The gc thread (btree.c, bch_gc_thread)."""
        cset = self.cset
        while not (cset.stopping or cset.io_disabled):
            if self.forced or self.sectors_to_gc < 0 or (cset.alloc.invalidate_needs_gc and self.btree_changed()):
                self.forced = False
                await self._collect()
                await cset.movinggc.run()
            elif cset.alloc.invalidate_needs_gc:
                # Nothing changed since the last run, so another finds nothing new.  Look again soon.
                await self.queue.wait(deadline_ns=cset.sched.now_ns + NS_PER_S // 4)
                alloc = cset.alloc
                if alloc.invalidate_needs_gc and len(alloc.bucket_wait) and not self.btree_changed():
                    # Someone waits.  The allocator looks again, since a read may have pinned what it passed over, and
                    # makes do with what it finds.
                    alloc.gc_finished()
            else:
                await self.queue.wait()
        self.done.wake_all()

    def btree_changed(self) -> bool:
        """Whether a run could find anything that the last one did not."""
        return self.cset.btree.changes != self.changes_seen

    async def _collect(self) -> None:
        cset = self.cset
        self.running = True
        self.last_start_ns = cset.sched.now_ns
        self.changes_seen = cset.btree.changes
        self._reset_sectors()
        cset.events.emit("bcache_gc_start")
        marks = cset.buckets.start_gc()
        self.nodes = self.nkeys = self.data_sectors = 0
        try:
            ok = await self._walk(marks)
            if ok:
                self._mark_interior(marks)
        except Corrupt as error:
            cset.fail(str(error))
            ok = False
        if ok and not cset.io_disabled:
            await self._put_in_force()
            self.runs += 1
        else:
            cset.buckets.marks = None
        self.running = False
        self.last_duration_ns = cset.sched.now_ns - self.last_start_ns
        cset.events.emit("bcache_gc_end", nodes=self.nodes, keys=self.nkeys)
        if ok:
            cset.alloc.gc_finished()
            await self._rewrite_interior()
        self.done.wake_all()

    async def pause(self) -> None:
        """End a slice: others go first, for as long as the essay says."""
        cset = self.cset
        seen = cset.requests_seen()
        busy = cset.requests_in_flight > 0 or seen != self.requests_seen
        self.requests_seen = seen
        self.slice_left = cset.options.slice_keys
        if not busy or cset.stopping or len(cset.alloc.bucket_wait):
            await cset.sched.yield_now()
        else:
            hurry = cset.alloc.invalidate_needs_gc or self.sectors_to_gc < 0
            sleep_ns = HURRY_SLEEP_NS if hurry else SLEEP_NS
            await cset.sched.sleep_until(cset.sched.now_ns + sleep_ns)

    async def _walk(self, marks: Marks) -> bool:
        cset = self.cset
        writes: list[Task[None]] = []
        window: list[Node] = []
        seen: Node | None = None
        stalest = bad = count = 0
        self.position = 0
        self.slice_left = cset.options.slice_keys
        while True:
            if cset.io_disabled or cset.stopping:
                return False
            if self.slice_left <= 0:
                await self.pause()
                continue
            leaf = await cset.btree.leaf(self.position)
            if leaf.frozen:
                await cset.btree.changed.wait()
                continue
            if leaf is not seen:
                if seen is not None and self.position != seen.end:
                    # That one was divided half-way: what comes before this leaf now was not visited.
                    window.clear()
                seen, stalest, bad, count = leaf, 0, 0, 0
            # All that ends at `position` or before is marked, in this leaf or in one that it has replaced.
            first = leaf.first_index(self.position)
            last = min(len(leaf.ends), first + self.slice_left)
            behind, bad_here = self._mark_leaf(leaf, marks, first, last)
            stalest, bad, count = max(stalest, behind), bad + bad_here, count + last - first
            self.slice_left -= last - first
            if last < len(leaf.ends):
                self.position = leaf.ends[last - 1]
                continue
            self.slice_left -= LEAF_COST_KEYS
            self.nodes += 1
            self.position = end = leaf.end
            await self._tidy(leaf, window, writes, rewrite=stalest > REWRITE_STALE or bad * 2 > count > 0)
            if end == cset.btree.root.end:
                break
        for task in writes:
            await task
        return True

    async def _tidy(self, leaf: Node, window: list[Node], writes: list[Task[None]], *, rewrite: bool) -> None:
        # Rewrites a marked leaf, or writes what is pending in it and puts it together with those before it.
        cset = self.cset
        if (rewrite or self.always_rewrite) and await cset.splitter.rewrite(leaf):
            window.clear()
            return
        if leaf.gone:
            # What replaced it has all its keys, and is durable.
            window.clear()
            return
        if leaf.pending_words:
            # Also if a write is under way: what became pending since is not in it.
            writes.append(cset.sched.spawn(cset.btree.write_leaf(leaf), "gc write leaf"))
            self.slice_left -= WRITE_COST_KEYS
        elif leaf.writing:
            writes.append(cset.sched.spawn(self._await_leaf(leaf), "gc await leaf"))
        window.append(leaf)
        if len(window) > 1 and await cset.splitter.coalesce(window[-GC_MERGE_NODES:]):
            window.clear()
        del window[: -GC_MERGE_NODES + 1]

    async def _await_leaf(self, leaf: Node) -> None:
        while leaf.writing:
            await self.cset.btree.changed.wait()

    def _mark_leaf(self, leaf: Node, marks: Marks, first: int, last: int) -> tuple[int, int]:
        # Marks the pointers of a leaf's keys ``first`` to ``last``; returns how far behind the stalest is, and how many
        # keys are bad.
        buckets = self.cset.buckets
        meta = np.array(leaf.meta[first:last], np.uint32)
        has_ptr = (meta & np.uint32(HAS_PTR)) != 0
        ptrs = np.array(leaf.ptrs[first:last], np.uint64)[has_ptr]
        count = len(meta)
        if len(ptrs) == 0:
            return 0, count
        meta = meta[has_ptr]
        bucket = buckets.buckets_of(ptrs)
        gens = (ptrs & np.uint64(255)).astype(np.uint8)
        marks.note_pointers(bucket, gens)
        behind = buckets.gen[bucket] - gens
        stale = (behind > 0) & (behind <= 128)
        stalest = int(behind[stale].max(initial=0))
        if stalest > KEY_TOO_STALE:
            raise Corrupt(f"btree node at bucket {leaf.bucket}", "key too stale")
        fresh = ~stale
        here = bucket[fresh]
        if (buckets.mark[here] == MARK_METADATA).any():
            wrong = int(here[buckets.mark[here] == MARK_METADATA][0])
            raise Corrupt(f"bucket {wrong}", "inconsistent ptrs: mark = 3, level = 0")
        sectors = meta[fresh] & np.uint32(SIZE_MASK)
        dirty = (meta[fresh] & np.uint32(DIRTY)) != 0
        marks.add(here, np.where(dirty, MARK_DIRTY, MARK_RECLAIMABLE).astype(np.uint8), sectors)
        good = len(here)
        self.nkeys += good
        self.data_sectors += int(sectors.sum())
        return stalest, count - good

    def _mark_interior(self, marks: Marks) -> None:
        # All pointers to nodes, at one moment; pointers that interior nodes hold besides count for last_gc only.
        cset = self.cset
        node_sectors = cset.geometry.node_sectors
        ptrs = [cset.btree.root.ptr]
        other: list[int] = []
        for node in cset.btree.nodes():
            if node.level:
                ptrs.extend(node.ptrs)
                other.extend(node.dead)
        every = np.array(ptrs + other, np.uint64)
        marks.note_pointers(cset.buckets.buckets_of(every), (every & np.uint64(255)).astype(np.uint8))
        bucket = cset.buckets.buckets_of(np.array(ptrs, np.uint64))
        marks.mark[bucket] = MARK_METADATA
        marks.sectors[bucket] = node_sectors

    async def _put_in_force(self) -> None:
        # In parts, since there may be millions of buckets.  Whatever changes meanwhile changes both kinds of marks.
        buckets = self.cset.buckets
        buckets.complete_marks(self.cset.metadata_buckets())
        self._protect_writeback()
        step = self.cset.options.slice_buckets
        for first in range(0, buckets.nbuckets, step):
            if first:
                await self.pause()
            buckets.put_in_force(first, first + step)
        buckets.end_gc()

    def _protect_writeback(self) -> None:
        # What is being written back must not be reclaimed (bch_btree_gc_finish).
        for ptr in self.cset.writeback_pointers():
            if not self.cset.buckets.is_stale(ptr):
                self.cset.buckets.mark_dirty(self.cset.buckets.bucket_of(ptr))

    async def _rewrite_interior(self) -> None:
        # Interior nodes keep replaced pointers on disk; the stalest must not get too far behind.
        cset = self.cset
        for node in [node for node in cset.btree.nodes() if node.level]:
            dead = np.array(node.dead, np.uint64)
            behind = cset.buckets.gen[cset.buckets.buckets_of(dead)] - (dead & np.uint64(255)).astype(np.uint8)
            if ((behind > REWRITE_STALE) & (behind <= 128)).any():
                await cset.splitter.rewrite(node)

    # Start-up.

    async def check(self) -> None:
        """Visit every node of the tree, bring gens and priorities up to the pointers', and mark (btree.c,
        bch_btree_check).

        The root is loaded.  Raises Corrupt if any node cannot be read.
        """
        cset = self.cset
        self.position = 0
        while True:
            leaf = await cset.btree.leaf(self.position)
            self._correct(leaf)
            if leaf.end == cset.btree.root.end:
                break
            self.position = leaf.end

    def _correct(self, leaf: Node) -> None:
        buckets = self.cset.buckets
        meta = np.array(leaf.meta, np.uint32)
        ptrs = np.array(leaf.ptrs, np.uint64)[(meta & np.uint32(HAS_PTR)) != 0]
        buckets.raise_gens(ptrs)
        bucket = buckets.buckets_of(ptrs)
        bucket = bucket[buckets.prio[bucket] == BTREE_PRIO]
        buckets.prio[bucket] = INITIAL_PRIO

    async def first_marks(self) -> dict[int, int]:
        """After `check` and the journal's keys, when all gens are final: mark the whole tree.

        Returns the dirty sectors by inode.  Raises Corrupt for a data pointer into a metadata bucket.
        """
        cset = self.cset
        buckets = cset.buckets
        marks = Marks(buckets, keep_pinned=True)
        buckets.marks = marks
        buckets.mark[cset.metadata_buckets()] = MARK_METADATA
        nodes = [cset.btree.root.ptr]
        for node in cset.btree.nodes():
            if node.level:
                nodes.extend(node.ptrs)
        bucket = buckets.buckets_of(np.array(nodes, np.uint64))
        buckets.mark[bucket] = MARK_METADATA
        buckets.prio[bucket] = BTREE_PRIO
        dirty: dict[int, int] = {}
        self.position = 0
        while True:
            leaf = await cset.btree.leaf(self.position)
            drop_stale_dirty(leaf, buckets)
            self._mark_leaf(leaf, marks, 0, len(leaf.ends))
            _count_dirty(leaf, dirty)
            if leaf.end == cset.btree.root.end:
                break
            self.position = leaf.end
        self._mark_interior(marks)
        buckets.finish_gc(cset.metadata_buckets())
        return dirty


def drop_stale_dirty(leaf: Node, buckets: Buckets) -> None:
    """Dirty extents whose bucket was reused hold nothing: they stop counting as dirty (the kernel only logs them)."""
    meta = np.array(leaf.meta, np.uint32)
    dirty = np.nonzero((meta & np.uint32(DIRTY)) != 0)[0]
    if len(dirty) == 0:
        return
    ptrs = np.array(leaf.ptrs, np.uint64)[dirty]
    for index in dirty[buckets.stale_mask(buckets.buckets_of(ptrs), ptrs)].tolist():
        leaf.meta[index] &= ~DIRTY


def _count_dirty(leaf: Node, dirty: dict[int, int]) -> None:
    meta = np.array(leaf.meta, np.uint32)
    chosen = (meta & np.uint32(DIRTY)) != 0
    inode = (np.array(leaf.ends, np.uint64)[chosen] - np.uint64(1)) >> np.uint64(INODE_SHIFT)
    size = meta[chosen] & np.uint32(SIZE_MASK)
    for slot in np.unique(inode).tolist():
        dirty[slot] = dirty.get(slot, 0) + int(size[inode == slot].sum())
