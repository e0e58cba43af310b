# SPDX-License-Identifier: GPL-2.0-only
"""A leaf against a dictionary of sectors: `Node.insert`, `Node.take_pending` and `load_leaf` in lockstep with it.

The disk is the list of sets that were taken so far.  Loading them must give what the columns gave when the last one was
taken, whatever was inserted since: a written set is never changed, and what is pending is nowhere else.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bcachectl.engine.node import DIRTY, HAS_PTR, PENDING, SIZE_MASK, Extent, Node, load_leaf
from bcachectl.ondisk.bkey import INODE_SHIFT, MAX_POS
from bcachectl.ondisk.bset import decode_node, encode_bset
from bcachectl.ondisk.geometry import Geometry

GEOMETRY = Geometry(block_size_sectors=1, bucket_size_sectors=128, nbuckets=1000, first_bucket=1)
SPACE = 96
SEED = 0x0000000002DB0001
MAGIC = 0x1234

Cell = tuple[int, int]
"""What one sector holds: flags, and the pointer word moved to that sector."""


def cells(node: Node) -> dict[int, Cell]:
    """The columns of a leaf, sector by sector; holes are left out."""
    found: dict[int, Cell] = {}
    for index in range(len(node.ends)):
        extent = node.extent(index)
        if extent.flags & HAS_PTR:
            for position in range(extent.start, extent.end):
                found[position] = (extent.flags, extent.ptr + ((position - extent.start) << 8))
    return found


class LeafMachine(RuleBasedStateMachine):
    """Inserts, writes and reloads of one leaf."""

    @initialize(inode=st.integers(0, 3))
    def start(self, inode: int) -> None:
        self.base = inode << INODE_SHIFT
        self.node = self.fresh()
        self.model: dict[int, Cell] = {}
        self.on_disk: dict[int, Cell] = {}
        self.disk = bytearray(GEOMETRY.node_blocks * GEOMETRY.block_bytes)
        self.next_sector = 1 << 20

    def fresh(self) -> Node:
        return Node(ptr=SEED, bucket=3, level=0, end=MAX_POS, seq=77, nblocks=GEOMETRY.node_blocks,
                    bucket_shift=GEOMETRY.bucket_shift)

    @rule(start=st.integers(0, SPACE - 1), size=st.integers(1, 24), kind=st.sampled_from(["clean", "dirty", "hole"]),
          sequential=st.booleans())
    def insert(self, start: int, size: int, kind: str, sequential: bool) -> None:
        if not self.node.has_room(9, GEOMETRY):
            return
        if not sequential:
            self.next_sector += 1000
        left = GEOMETRY.bucket_size_sectors - self.next_sector % GEOMETRY.bucket_size_sectors
        if left < size:
            self.next_sector += left
        first, last = self.base + start, self.base + start + size
        flags = {"clean": HAS_PTR, "dirty": HAS_PTR | DIRTY, "hole": 0}[kind]
        ptr = self.next_sector << 8 | 5 if flags else 0
        self.next_sector += size
        was_dirty = {position for position in range(first, last) if self.model.get(position, (0, 0))[0] & DIRTY}
        overwritten = self.node.insert(Extent(first, last, flags, ptr))
        assert {position for low, high in overwritten for position in range(low, high)} == was_dirty
        assert sum(high - low for low, high in overwritten) == len(was_dirty)
        for position in range(first, last):
            if flags:
                self.model[position] = (flags, ptr + ((position - first) << 8))
            else:
                self.model.pop(position, None)

    @precondition(lambda self: self.model)
    @rule(which=st.integers(0, 1000), short=st.booleans())
    def overwrite(self, which: int, short: bool) -> None:
        """Exactly one extent that is dirty, or not."""
        if not self.node.has_room(9, GEOMETRY):
            return
        extent = self.node.extent(which % len(self.node.ends))
        self.next_sector += GEOMETRY.bucket_size_sectors - self.next_sector % GEOMETRY.bucket_size_sectors
        ptr = self.next_sector << 8 | 5
        end = extent.end - short
        fits = extent.flags == DIRTY | HAS_PTR and not short
        if end > extent.start and self.node.overwrite_dirty(extent.start, end, ptr):
            assert fits
            for position in range(extent.start, end):
                self.model[position] = (extent.flags, ptr + ((position - extent.start) << 8))
        else:
            assert not fits

    @precondition(lambda self: self.node.pending_words)
    @rule()
    def write(self) -> None:
        raw = encode_bset(self.node.take_pending(), seq=77, magic=MAGIC, seed=SEED, block_bytes=GEOMETRY.block_bytes)
        at = self.node.written * GEOMETRY.block_bytes
        self.disk[at:at + len(raw)] = raw
        self.node.written += len(raw) // GEOMETRY.block_bytes
        assert self.node.written <= self.node.nblocks, "has_room promised"
        self.on_disk = dict(self.model)

    @precondition(lambda self: self.node.written)
    @rule()
    def crash(self) -> None:
        images, written = decode_node(self.disk, magic=MAGIC, seed=SEED, block_bytes=GEOMETRY.block_bytes,
                                      node_blocks=GEOMETRY.node_blocks, where="bucket 3")
        assert written == self.node.written
        self.node = self.fresh()
        self.node.written = written
        load_leaf(self.node, images, "bucket 3")
        self.model = dict(self.on_disk)

    @rule(start=st.integers(0, SPACE), size=st.integers(1, 40))
    def look(self, start: int, size: int) -> None:
        first, last = self.base + start, self.base + start + size
        seen = {position: extent for extent in self.node.overlapping(first, last)
                for position in range(max(first, extent.start), min(last, extent.end)) if extent.flags & HAS_PTR}
        assert set(seen) == {position for position in self.model if first <= position < last}

    @invariant()
    def agrees(self) -> None:
        assert cells(self.node) == self.model

    @invariant()
    def is_in_order(self) -> None:
        end, words = 0, 0
        for index, meta in enumerate(self.node.meta):
            extent = self.node.extent(index)
            assert end <= extent.start < extent.end
            assert meta & SIZE_MASK == extent.end - extent.start
            end = extent.end
            if meta & HAS_PTR:
                inside = (extent.ptr >> 8) % GEOMETRY.bucket_size_sectors
                assert inside + extent.end - extent.start <= GEOMETRY.bucket_size_sectors, "an extent crosses a bucket"
            if meta & PENDING:
                words += 3 if meta & HAS_PTR else 2
        assert words == self.node.pending_words


TestLeaf = LeafMachine.TestCase
TestLeaf.settings = settings(max_examples=60, stateful_step_count=60)
