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
        start, end, flags, ptr = new
        ends, metas, ptrs = self.ends, self.meta, self.ptrs
        size = end - start
        assert 0 < size <= MAX_SIZE, new
        first = last = bisect_right(ends, start)
        count = len(ends)
        overwritten: list[tuple[int, int]] = []
        head: tuple[int, int, int] | None = None
        tail: tuple[int, int, int] | None = None
        while last < count:
            old_end, meta = ends[last], metas[last]
            old_start = old_end - (meta & SIZE_MASK)
            if old_start >= end:
                break
            if meta & DIRTY:
                overwritten.append((max(old_start, start), min(old_end, end)))
            if meta & PENDING:
                self.pending_words -= 3 if meta & HAS_PTR else 2
            if old_start < start:
                head = (start, (meta & ~SIZE_MASK) | (start - old_start), ptrs[last])
            if old_end > end:
                moved = (end - old_start) << 8 if meta & HAS_PTR else 0
                tail = (old_end, (meta & ~SIZE_MASK) | (old_end - end), ptrs[last] + moved)
            last += 1
        pieces = []
        if head is not None:
            pieces.append(head)
            if head[1] & PENDING:
                self.pending_words += 3 if head[1] & HAS_PTR else 2
        elif first and first == last and pending and ends[first - 1] == start:
            # A pending neighbour that ends where this one starts, on the disk as well, is extended instead
            # (bch_extent_merge).
            before = metas[first - 1]
            size_before = before & SIZE_MASK
            if (
                before & PENDING
                and before & FLAGS == flags
                and size_before + size <= MAX_SIZE
                and (
                    not flags & HAS_PTR
                    or (
                        ptrs[first - 1] + (size_before << 8) == ptr
                        and not (ptrs[first - 1] ^ ptr) >> (8 + self.bucket_shift)
                    )
                )
            ):
                ends[first - 1] = end
                metas[first - 1] = before + size
                return overwritten
        pieces.append((end, size | flags | pending, ptr))
        if pending:
            self.pending_words += 3 if flags & HAS_PTR else 2
        if tail is not None:
            pieces.append(tail)
            if tail[1] & PENDING:
                self.pending_words += 3 if tail[1] & HAS_PTR else 2
        if len(pieces) == 1 and first == last:
            ends.insert(first, end)
            metas.insert(first, size | flags | pending)
            ptrs.insert(first, ptr)
        else:
            ends[first:last] = array("Q", [piece[0] for piece in pieces])
            metas[first:last] = array("I", [piece[1] for piece in pieces])
            ptrs[first:last] = array("Q", [piece[2] for piece in pieces])
        return overwritten

    def overwrite_dirty(self, start: int, end: int, ptr: int) -> bool:
        """What `insert` does of a dirty extent that covers exactly one that is there and dirty: only the pointer
        changes.  False, and nothing done, if there is none such.
        """
        ends, metas = self.ends, self.meta
        index = bisect_right(ends, start)
        if index == len(ends) or ends[index] != end:
            return False
        meta = metas[index]
        if meta & SIZE_MASK != end - start or meta & FLAGS != FLAGS:
            return False
        if not meta & PENDING:
            metas[index] = meta | PENDING
            self.pending_words += 3
        self.ptrs[index] = ptr
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
        set_bytes = BSET_HEADER_BYTES + 8 * (self.pending_words + words + (0 if self.level else INSERT_SLACK_WORDS))
        return self.written + -(-set_bytes // geometry.block_bytes) <= self.nblocks

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
