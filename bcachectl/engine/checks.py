# SPDX-License-Identifier: GPL-2.0-only
"""The expensive checks behind ``--debug-checks``: what must hold in a running set whenever no task is in the middle
of a step.

The names are those of the invariants: I for the allocator, J for the journal, B for the btree, W for writeback.  A
failed check is a bug of the engine, hence an assertion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bcachectl.engine.buckets import BTREE_PRIO, MARK_DIRTY, MARK_METADATA, MARK_RECLAIMABLE
from bcachectl.engine.node import DIRTY, HAS_PTR, PENDING, SIZE_MASK, Node
from bcachectl.ondisk.bkey import INODE_SHIFT

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet


def check_set(cset: CacheSet) -> None:
    """All checks."""
    check_lists(cset)
    check_open_buckets(cset)
    check_btree(cset)
    if not cset.read_only:
        check_journal(cset)


def check_lists(cset: CacheSet) -> None:
    """I1 to I5, I18, I20: the free lists, and who is never on them."""
    buckets, alloc = cset.buckets, cset.alloc
    listed = alloc.on_lists()
    on_list = np.zeros(buckets.nbuckets, bool)
    for bucket in listed:
        assert buckets.first_bucket <= bucket < buckets.nbuckets, ("I1", bucket)
        assert not on_list[bucket], ("I2: twice on the free lists", bucket)
        on_list[bucket] = True
        assert buckets.pin_at[bucket] == 1, ("I4", bucket, buckets.pin_at[bucket])
    for bucket in cset.metadata_buckets():
        assert not on_list[bucket], ("I3: metadata on a free list", bucket)
    assert int(buckets.pin.min()) >= 0, "I5"
    for free in (*alloc.free, alloc.free_inc):
        assert len(free) <= free.size, "I20"
    assert alloc.prio_blocked >= 0, "I21"
    assert 0 <= buckets.avail_nbuckets <= buckets.nbuckets, "I26"
    if not cset.prios.writing:
        assert cset.prios.current == cset.prios.journaled, "I18"


def check_open_buckets(cset: CacheSet) -> None:
    """I22, I23: the open buckets."""
    buckets = cset.buckets
    seen: dict[int, None] = {}
    for open_bucket in cset.sectors.open_now():
        last = (
            (open_bucket.ptr >> 8) - 1
            if (open_bucket.ptr >> 8) & ((1 << buckets.bucket_shift) - 1) == 0
            else open_bucket.ptr >> 8
        )
        bucket = last >> buckets.bucket_shift
        assert bucket not in seen, ("I23", bucket)
        seen[bucket] = None
        assert (open_bucket.ptr >> 8) + open_bucket.sectors_free == (bucket + 1) << buckets.bucket_shift, (
            "I22",
            bucket,
        )
        assert buckets.pin_at[bucket] >= 1, ("I22: open without a pin", bucket)
        assert buckets.gen_at[bucket] == open_bucket.ptr & 0xFF, ("I22: stale open bucket", bucket)


def _check_children(node: Node) -> None:
    # Each is where its parent says, and a leaf's extents begin where its range does.
    begin = 0
    for end, child in zip(node.ends, node.children, strict=True):
        if child is not None:
            assert child.end == end, ("B1: child's end", child)
            assert child.level == node.level - 1, ("B3", child)
            if not child.level and len(child.ends):
                assert child.extent(0).start >= begin, ("B2: before the leaf's range", child)
        begin = end


def check_btree(cset: CacheSet) -> None:
    """I6 to I9, I24, B1 to B4, W2: every node in memory, every extent in it."""
    buckets = cset.buckets
    on_list = np.zeros(buckets.nbuckets, bool)
    on_list[cset.alloc.on_lists()] = True
    dirty: dict[int, int] = {}
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    complete = True
    for node in cset.btree.nodes():
        assert buckets.mark_at[node.bucket] == MARK_METADATA, ("I7", node)
        assert buckets.prio_at[node.bucket] == BTREE_PRIO, ("I7: prio", node)
        assert not buckets.is_stale(node.ptr) or node.frozen, ("reachable and stale", node)
        assert not on_list[node.bucket], ("I3: node on a free list", node)
        ends = np.array(node.ends, np.uint64)
        assert bool((ends[1:] > ends[:-1]).all()), ("B1: order", node)
        if node.level:
            assert node.ends[-1] == node.end, ("B1: last child", node)
            _check_children(node)
            complete &= None not in node.children
            continue
        meta = np.array(node.meta, np.uint32)
        size = (meta & np.uint32(SIZE_MASK)).astype(np.uint64)
        starts = ends - size
        assert bool((size > 0).all()), ("B2: empty extent", node)
        assert bool((starts[1:] >= ends[:-1]).all()), ("B2: overlap", node)
        assert not len(ends) or int(ends[-1]) <= node.end, ("B2: beyond the leaf's end", node)
        pending = (meta & np.uint32(PENDING)) != 0
        words = np.where((meta & np.uint32(HAS_PTR)) != 0, 3, 2)
        assert int(words[pending].sum()) == node.pending_words, ("pending words", node)
        assert cset.read_only or bool(node.pending_words) == (node in cset.btree.dirty_leaves) or node.frozen, (
            "dirty list",
            node,
        )
        has_ptr = (meta & np.uint32(HAS_PTR)) != 0
        ptrs = np.array(node.ptrs, np.uint64)[has_ptr]
        bucket = buckets.buckets_of(ptrs)
        fresh = ~buckets.stale_mask(bucket, ptrs)
        is_dirty = (meta & np.uint32(DIRTY)) != 0
        assert not on_list[bucket[fresh]].any(), ("I6: fresh pointer to a free bucket", node)
        marks = buckets.mark[bucket[fresh]]
        dirty_here = is_dirty[has_ptr][fresh]
        assert bool((marks[dirty_here] == MARK_DIRTY).all()), ("I8", node)
        assert bool(((marks == MARK_RECLAIMABLE) | (marks == MARK_DIRTY)).all()), ("I9", node)
        sectors = (ptrs[fresh] >> np.uint64(8)) & np.uint64((1 << 43) - 1)
        pieces.append((sectors, size[has_ptr][fresh]))
        slots = (ends - np.uint64(1)) >> np.uint64(INODE_SHIFT)
        for slot in np.unique(slots[is_dirty]).tolist():
            dirty[slot] = dirty.get(slot, 0) + int(size[is_dirty & (slots == slot)].sum())
    if pieces:
        sectors = np.concatenate([piece[0] for piece in pieces])
        sizes = np.concatenate([piece[1] for piece in pieces])
        order = np.argsort(sectors)
        assert bool((sectors[order][1:] >= (sectors + sizes)[order][:-1]).all()), (
            "I24: extents overlap on the cache device"
        )
    if complete:
        counted = {slot: count for slot, count in cset.dirty_by_inode.items() if count}
        assert counted == {slot: count for slot, count in dirty.items() if count}, ("W2", counted, dirty)
        for slot, stripes in cset.stripes.items():
            if stripes.counted_to == stripes.limit:
                assert sum(stripes.dirty) == dirty.get(slot, 0), ("W2: stripes", slot)


def check_journal(cset: CacheSet) -> None:
    """J2, J4, J5: seq, pins, and the ring."""
    journal = cset.journal
    assert journal.pins[-1].seq == journal.seq, "J4"
    assert [pin.seq for pin in journal.pins] == list(range(journal.last_seq, journal.seq + 1)), "J4: gaps"
    assert all(pin.count >= 0 for pin in journal.pins), "J4: negative"
    assert journal.durable_last_seq <= journal.last_seq, "J2"
    for index, seq in enumerate(journal.bucket_seq):
        if seq >= journal.last_seq:
            inside = (index - journal.last_idx) % len(journal.buckets) <= (journal.cur_idx - journal.last_idx) % len(
                journal.buckets
            )
            assert inside, ("J5", index, seq)
