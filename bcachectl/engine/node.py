# SPDX-License-Identifier: GPL-2.0-only
"""`Node`: one btree node in memory, as columns, and the overlap rules of extents.

A *position* is one integer, ``inode << 44 | sector``; an extent covers the half-open range of positions
``[start, end)``.  A leaf keeps its extents sorted and free of overlaps::

    ends    array Q   end position of each extent
    meta    array I   size in sectors | `DIRTY` | `HAS_PTR` | `PENDING`
    ptrs    array Q   pointer word, 0 for a hole

On disk a leaf is a log of sets: later sets win over earlier ones, and a written set is never changed.  The columns
hold what all sets together mean.  An extent with `PENDING` is not in any written set yet; the next write
(`Node.take_pending`) makes one set of all of them.  So there is one representation where the kernel keeps one for
each set (bset.c): a key that overwrites others cuts them in the columns, exactly as a reader of the sets would.

What must stay in the columns: holes while they are pending (they mask older sets), and stale extents until the node
is rewritten (gc must know the gens that are still on disk).  Holes that are written can go: the set on disk does the
masking.

An interior node keeps one child for each end position.  ``dead`` holds the other pointer words of its log, replaced
children and markers of freed ones, for gc's sake.

Kernel: bset.c, bch_btree_insert_key; extents.c, bch_extent_insert_fixup and bch_extent_merge.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from bcachectl.engine.extents import Columns, lay_over
from bcachectl.errors import Corrupt
from bcachectl.ondisk.bkey import INODE_SHIFT, MAX_POS, KeyColumns, encode_key_columns
from bcachectl.ondisk.bset import BSET_HEADER_BYTES, BsetImage
from bcachectl.ondisk.geometry import Geometry

try:
    import cython
except ImportError:
    from bcachectl import plain as cython

if not cython.compiled:
    from bisect import bisect_right

    from bcachectl.engine.columns import make_room, u32s, u64s
if TYPE_CHECKING:
    from bcachectl.engine.journal import JournalPin

SIZE_MASK = 0xFFFF
DIRTY = 1 << 16
HAS_PTR = 1 << 17
PENDING = 1 << 18
FLAGS = DIRTY | HAS_PTR
MAX_SIZE = 0xFFFF
"""KEY_SIZE has 16 bits."""
INSERT_SLACK_WORDS = 8
"""A leaf counts as full this many u64s early (btree.c, insert_u64s_remaining)."""


class Extent(NamedTuple):
    """One key of a leaf: the range of positions it covers, ``flags`` of DIRTY and HAS_PTR, and its pointer word."""

    start: int
    end: int
    flags: int
    ptr: int

    def cut(self, start: int, end: int) -> Extent:
        """The part of the extent inside [start, end); its pointer moves along (bset.c, __bch_cut_front)."""
        start, end = max(start, self.start), min(end, self.end)
        moved = (start - self.start) << 8 if self.flags & HAS_PTR else 0
        return Extent(start, end, self.flags, self.ptr + moved)


class Node:
    """One node of the btree.  Only `bcachectl.engine.btree` makes, writes and replaces nodes."""

    __slots__ = (
        "ptr",
        "bucket",
        "sector",
        "level",
        "end",
        "seq",
        "nblocks",
        "written",
        "ends",
        "meta",
        "ptrs",
        "children",
        "dead",
        "bucket_shift",
        "pending_words",
        "pin",
        "dirty_ns",
        "frozen",
        "writing",
        "gone",
        "used",
    )

    def __init__(
        self, *, ptr: int, bucket: int, level: int, end: int, seq: int, nblocks: int, bucket_shift: int
    ) -> None:
        self.ptr = ptr
        self.bucket = bucket
        self.sector = (ptr >> 8) & ((1 << 43) - 1)
        self.level = level
        self.end = end
        self.seq = seq
        self.nblocks = nblocks
        self.written = 0
        self.ends = array("Q")
        self.meta = array("I")
        self.ptrs = array("Q")
        self.children: list[Node | None] = []
        self.dead = array("Q")
        self.bucket_shift = bucket_shift
        self.pending_words = 0
        self.pin: JournalPin | None = None
        self.dirty_ns = 0
        self.frozen = False
        self.writing = False
        self.gone = False
        self.used = 0

    def __repr__(self) -> str:
        return f"<Node bucket {self.bucket} level {self.level} keys {len(self.ends)}>"

    # Leaves.

    def extent(self, index: int) -> Extent:
        """The extent at an index of the columns."""
        end, meta = self.ends[index], self.meta[index]
        return Extent(end - (meta & SIZE_MASK), end, meta & FLAGS, self.ptrs[index])

    def first_index(self, start: int) -> int:
        """Index of the first extent that ends after ``start``; ``len(ends)`` if none does."""
        return bisect_right(self.ends, start)

    def overlapping(self, start: int, end: int) -> list[Extent]:
        """Every extent that shares a sector with [start, end), uncut, holes and stale ones included."""
        found = []
        for index in range(bisect_right(self.ends, start), len(self.ends)):
            here = self.extent(index)
            if here.start >= end:
                break
            found.append(here)
        return found

    def insert(self, new: Extent, pending: int = PENDING) -> list[tuple[int, int]]:
        """Lay ``new`` over whatever it overlaps; returns the ranges of dirty data it overwrote.

        ``pending`` is PENDING, or 0 while the sets of the node are being combined.
        """
        overwritten: list[tuple[int, int]] = []
        self.insert_range(new.start, new.end, new.flags, new.ptr, pending, overwritten)
        return overwritten

    def insert_range(self, start: int, end: int, flags: int, ptr: int, pending: int,
                     overwritten: list[tuple[int, int]] | None) -> int:
        """`insert`; returns how many dirty sectors it overwrote, whose ranges go to ``overwritten`` if that is a list.
        """
        size_mask, dirty, has_ptr, is_pending, all_flags = SIZE_MASK, DIRTY, HAS_PTR, PENDING, FLAGS
        max_size = MAX_SIZE
        ends, metas, ptrs = self.ends, self.meta, self.ptrs
        size = end - start
        assert 0 < size <= max_size, (start, end)
        first = last = bisect_right(ends, start)
        count, sectors = len(ends), 0
        has_head = has_tail = False
        head_meta = head_ptr = tail_end = tail_meta = tail_ptr = 0
        end_at, meta_at, ptr_at = u64s(ends), u32s(metas), u64s(ptrs)
        while last < count:
            old_end, meta = end_at[last], meta_at[last]
            old_start = old_end - (meta & size_mask)
            if old_start >= end:
                break
            if meta & dirty:
                low, high = start if start > old_start else old_start, end if end < old_end else old_end
                sectors += high - low
                if overwritten is not None:
                    overwritten.append((low, high))
            if meta & is_pending:
                self.pending_words -= 3 if meta & has_ptr else 2
            if old_start < start:
                has_head = True
                head_meta, head_ptr = meta - (old_end - start), ptr_at[last]
            if old_end > end:
                has_tail = True
                tail_end, tail_meta, tail_ptr = old_end, meta - (end - old_start), ptr_at[last]
                if meta & has_ptr:
                    tail_ptr += (end - old_start) << 8
            last += 1
        if has_head:
            if head_meta & is_pending:
                self.pending_words += 3 if head_meta & has_ptr else 2
        elif first and first == last and pending and end_at[first - 1] == start:
            # A pending neighbour that ends where this one starts, on the disk as well, is extended instead
            # (bch_extent_merge).
            meta = meta_at[first - 1]
            before = meta & size_mask
            if (
                meta & is_pending
                and meta & all_flags == flags
                and before + size <= max_size
                and (
                    not flags & has_ptr
                    or (
                        ptr_at[first - 1] + (before << 8) == ptr
                        and not (ptr_at[first - 1] ^ ptr) >> (8 + self.bucket_shift)
                    )
                )
            ):
                end_at[first - 1] = end
                meta_at[first - 1] = meta + size
                return sectors
        if pending:
            self.pending_words += 3 if flags & has_ptr else 2
        if has_tail and tail_meta & is_pending:
            self.pending_words += 3 if tail_meta & has_ptr else 2
        pieces = 1 + has_head + has_tail
        if pieces != last - first:
            make_room(ends, first, last, pieces)
            make_room(metas, first, last, pieces)
            make_room(ptrs, first, last, pieces)
            end_at, meta_at, ptr_at = u64s(ends), u32s(metas), u64s(ptrs)
        if has_head:
            end_at[first], meta_at[first], ptr_at[first] = start, head_meta, head_ptr
            first += 1
        end_at[first], meta_at[first], ptr_at[first] = end, size | flags | pending, ptr
        if has_tail:
            first += 1
            end_at[first], meta_at[first], ptr_at[first] = tail_end, tail_meta, tail_ptr
        return sectors

    def overwrite_dirty(self, start: int, end: int, ptr: int) -> bool:
        """What `insert` does of a dirty extent that covers exactly one that is there and dirty: only the pointer
        changes.  False, and nothing done, if there is none such.
        """
        ends, all_flags, pending, size_mask = self.ends, FLAGS, PENDING, SIZE_MASK
        index, count = bisect_right(ends, start), len(ends)
        if index == count or u64s(ends)[index] != end:
            return False
        meta_at = u32s(self.meta)
        meta = meta_at[index]
        if meta & size_mask != end - start or meta & all_flags != all_flags:
            return False
        if not meta & pending:
            meta_at[index] = meta | pending
            self.pending_words += 3
        u64s(self.ptrs)[index] = ptr
        return True

    def drop_written_holes(self) -> None:
        """Forget holes that are in a written set: nothing in memory lies beneath them."""
        meta = np.array(self.meta, np.uint32)
        keep = (meta & np.uint32(HAS_PTR | PENDING)) != 0
        if not keep.all():
            self.set_columns(np.array(self.ends, np.uint64)[keep], meta[keep], np.array(self.ptrs, np.uint64)[keep])

    def set_columns(
        self, ends: npt.NDArray[np.uint64], meta: npt.NDArray[np.uint32], ptrs: npt.NDArray[np.uint64]
    ) -> None:
        """Replace all extents."""
        self.ends = array("Q", ends.tobytes())
        self.meta = array("I", meta.tobytes())
        self.ptrs = array("Q", ptrs.tobytes())

    def take_pending(self) -> bytes:
        """The pending extents as the keys of a set; they count as written from now on."""
        meta = np.array(self.meta, np.uint32)
        chosen = np.nonzero(meta & np.uint32(PENDING))[0]
        picked = meta[chosen]
        keys = encode_extents(np.array(self.ends, np.uint64)[chosen], picked, np.array(self.ptrs, np.uint64)[chosen])
        assert len(keys) == self.pending_words * 8, (len(keys), self.pending_words)
        meta &= np.uint32(~PENDING & 0xFFFFFFFF)
        self.meta = array("I", meta.tobytes())
        self.pending_words = 0
        self.drop_written_holes()
        return keys

    def has_room(self, words: int, geometry: Geometry) -> bool:
        """Whether the node's log can take a set of what is pending and ``words`` u64s more."""
        header_bytes, slack_words, block_bytes = BSET_HEADER_BYTES, INSERT_SLACK_WORDS, geometry.block_bytes
        set_bytes = header_bytes + 8 * (self.pending_words + words + (0 if self.level else slack_words))
        return self.written + (set_bytes + block_bytes - 1) // block_bytes <= self.nblocks

    def is_settled(self, seq: int, write_bytes: int) -> bool:
        """Whether keys of entry ``seq`` that were inserted change nothing about the leaf: it holds that entry or an
        older one, so it is dirty already, and what is pending is no more than ``write_bytes``.
        """
        pin, header_bytes = self.pin, BSET_HEADER_BYTES
        return pin is not None and pin.seq <= seq and header_bytes + 8 * self.pending_words <= write_bytes

    # Interior nodes.

    def child_index(self, position: int) -> int:
        """Index of the child that holds extents starting at ``position``: the first whose end is greater."""
        return min(bisect_right(self.ends, position), len(self.ends) - 1)

    def set_children(self, entries: list[tuple[int, int, Node | None]]) -> None:
        """Replace all children by (end, pointer word, node or None), in order."""
        self.ends = array("Q", [entry[0] for entry in entries])
        self.ptrs = array("Q", [entry[1] for entry in entries])
        self.children = [entry[2] for entry in entries]


def encode_extents(ends: npt.NDArray[np.uint64], meta: npt.NDArray[np.uint32], ptrs: npt.NDArray[np.uint64]) -> bytes:
    """Columns of a leaf as bkeys."""
    size = meta & np.uint32(SIZE_MASK)
    has_ptr = (meta & np.uint32(HAS_PTR)) != 0
    return encode_key_columns(ends, size, (meta & np.uint32(DIRTY)) != 0, has_ptr.astype(np.uint8), ptrs)


def load_leaf(node: Node, images: list[BsetImage], where: str) -> None:
    """Combine the sets of a leaf, oldest first, into its columns (extents.c, bch_extent_sort_fixup).  Corrupt if they
    cannot be.
    """
    whole: Columns | None = None
    for number, image in enumerate(images):
        keys = image.keys
        live = keys.size > 0
        if not live.all():
            keys = KeyColumns(*(column[live] for column in keys))  # type: ignore[arg-type]
        if len(keys.pos) == 0:
            continue
        low = keys.pos & np.uint64((1 << INODE_SHIFT) - 1)
        if (keys.size > low).any():
            raise Corrupt(where, "bad, short offset")
        if (keys.nptrs > 1).any():
            raise Corrupt(where, "keys with several pointers (a set of several caches) are not supported")
        if int(keys.pos[-1]) > node.end:
            raise Corrupt(where, "short btree key")
        # A check key is a placeholder: it masks what is older and holds nothing.
        real = (keys.nptrs == 1) & (keys.ptr >> np.uint64(51) == 0)
        flags = np.zeros(len(real), np.uint32)
        flags[real] = HAS_PTR
        flags[real & keys.dirty] |= np.uint32(DIRTY)
        starts = keys.pos - keys.size.astype(np.uint64)
        if (starts[1:] < keys.pos[:-1]).any():
            raise Corrupt(where, f"keys of set {number} overlap or are out of order")
        here = Columns(starts, keys.pos, flags, np.where(real, keys.ptr, np.uint64(0)))
        whole = here if whole is None else lay_over(whole, here)
    if whole is not None:
        # Holes have done their masking.
        whole = whole.take((whole.flags & np.uint32(HAS_PTR)) != 0)
        meta = (whole.end - whole.start).astype(np.uint32) | whole.flags
        node.set_columns(whole.end, meta, whole.ptr)


__all__ = [
    "DIRTY",
    "FLAGS",
    "HAS_PTR",
    "MAX_POS",
    "PENDING",
    "SIZE_MASK",
    "Extent",
    "Node",
    "encode_extents",
    "load_leaf",
]
