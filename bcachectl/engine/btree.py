# SPDX-License-Identifier: GPL-2.0-only
"""`Btree`: lookup, insert and write of nodes.  How nodes are replaced is in `bcachectl.engine.split`.

Invariant: what can be reached on disk from the newest journal entry's root, plus the keys of the live journal
entries, is the map.

* Interior nodes stay in memory from start-up on; leaves are loaded when needed and evicted, clean ones only, past the
  memory limit.
* A leaf insert is a plain function on a leaf in memory.  The keys go to the columns; the leaf becomes dirty and keeps
  the oldest journal entry that it has keys of alive until it is written.
* A leaf is written by appending a set to its log, its header last (`Bdev.write_head_last`): power loss leaves the set
  or no trace of it.
* A leaf whose log is full is replaced; while that goes on it is *frozen*: it can be read, and inserts wait.
* Whoever waits for something reads the tree again afterwards: nodes may have been replaced.

Kernel: btree.c; the essay in btree.h.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np

from bcachectl.engine.gc import drop_stale_dirty
from bcachectl.engine.node import DIRTY, FLAGS, HAS_PTR, PENDING, SIZE_MASK, Extent, Node, load_leaf
from bcachectl.engine.sched import NS_PER_S, Mutex, Task, WaitQueue
from bcachectl.errors import Corrupt, errno_text
from bcachectl.ondisk.bkey import MAX_POS, KeyColumns, pack_key
from bcachectl.ondisk.bset import BSET_HEADER_BYTES, BsetImage, decode_node, encode_bset
from bcachectl.ondisk.magic import bset_magic

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet
    from bcachectl.engine.journal import JournalPin

LEAF_WRITE_BYTES = 4096 - 48
LEAF_WRITE_SHIFT, LEAF_WRITE_SLACK_BYTES = 3, 1024
"""A set that grew past a page is written at once (btree.c, bch_btree_leaf_dirty); in nodes of more than 32 KiB, when it
is about to grow past an eighth of the node.  What is pending is in the journal; each such write flushes the device, and
a set that ends just before a block does takes no further one."""
LEAF_WRITE_DELAY_NS = 30 * NS_PER_S
"""A dirty leaf is written at the latest after this time."""


class Btree:
    """The btree of a running set."""

    __slots__ = (
        "cset",
        "magic",
        "leaf_write_bytes",
        "root",
        "leaves",
        "dirty_leaves",
        "loading",
        "structure",
        "changed",
        "flush_wake",
        "cached_bytes",
        "inserts",
        "sectors_written",
        "splits",
        "reads",
        "changes",
        "keyed_root",
        "kept_root_key",
    )

    def __init__(self, cset: CacheSet, root: Node) -> None:
        self.cset = cset
        self.magic = bset_magic(cset.sb.set_uuid)
        self.leaf_write_bytes = max(
            LEAF_WRITE_BYTES, (cset.geometry.node_sectors << 9 >> LEAF_WRITE_SHIFT) - LEAF_WRITE_SLACK_BYTES)
        self.root = root
        self.leaves: dict[Node, None] = {}
        self.dirty_leaves: dict[Node, None] = {}
        self.loading: dict[int, Task[Node]] = {}
        self.structure = Mutex(cset.sched, "btree structure")
        self.changed = WaitQueue(cset.sched, "btree changed")
        self.flush_wake = WaitQueue(cset.sched, "leaf flusher")
        self.cached_bytes = 0
        self.inserts = 0
        self.sectors_written = 0
        self.splits = 0
        self.reads = 0
        self.changes = 0
        self.keyed_root: Node | None = None         # whose key this is
        self.kept_root_key = b""

    @classmethod
    async def open(cls, cset: CacheSet, ptr: int, level: int) -> Btree:
        """The tree whose root is at ``ptr``; raises Corrupt if the root cannot be read."""
        btree = cls(
            cset,
            Node(ptr=ptr, bucket=0, level=level, end=MAX_POS, seq=1, nblocks=1, bucket_shift=cset.buckets.bucket_shift),
        )
        btree.root = await btree.read_node(ptr, level, MAX_POS)
        btree.cache(btree.root)
        return btree

    # Lookup.

    def leaf_nowait(self, position: int) -> Node | None:
        """The leaf that holds extents starting at ``position``, if it is in memory."""
        node: Node | None = self.root
        while node is not None and node.level:
            node = node.children[bisect_right(node.ends, position)] if position < MAX_POS else node.children[-1]
        return node

    async def leaf(self, position: int) -> Node:
        """The leaf that holds extents starting at ``position``, loaded if need be.  Corrupt if it cannot be read."""
        while True:
            node = self.root
            while node.level:
                index = node.child_index(position)
                child = node.children[index]
                if child is None:
                    break
                node = child
            else:
                return node
            await self.load(node, index)

    async def lookup(self, start: int, end: int) -> list[Extent]:
        """What the cache holds of [start, end): fresh extents cut to the range, in order, not touching each other's
        sectors.
        """
        found: list[Extent] = []
        position = start
        while position < end:
            leaf = await self.leaf(position)
            for extent in leaf.overlapping(position, min(end, leaf.end)):
                if extent.flags & HAS_PTR and not self.cset.buckets.is_stale(extent.ptr):
                    found.append(extent.cut(position, end))
            position = max(position + 1, leaf.end)
        return found

    def path(self, leaf: Node) -> list[Node]:
        """The nodes from the root down to ``leaf``; empty if it is not in the tree any more."""
        path = [self.root]
        position = leaf.end - 1
        while path[-1].level > leaf.level:
            node = path[-1]
            child = node.children[node.child_index(position)]
            if child is None:
                return []
            path.append(child)
        return path if path[-1] is leaf else []

    # Loading.

    async def load(self, parent: Node, index: int) -> Node:
        """Bring a child into memory; two tasks that want the same child share one read."""
        ptr, end = parent.ptrs[index], parent.ends[index]
        task = self.loading.get(ptr)
        if task is None:
            task = self.cset.sched.spawn(self._load_child(parent, ptr, end), "load node")
            self.loading[ptr] = task
        return await task

    async def _load_child(self, parent: Node, ptr: int, end: int) -> Node:
        try:
            node = await self.read_node(ptr, parent.level - 1, end)
            while parent.gone or parent.frozen:
                # The parent is being replaced by nodes that took over its children; find who has this child now.
                if not parent.gone:
                    await self.changed.wait()
                parents = self.path_to_level(end, node.level + 1)
                if parents is None:
                    return node
                parent = parents
            here = parent.child_index(end - 1)
            if parent.ptrs[here] == ptr:
                if parent.children[here] is None:
                    parent.children[here] = node
                    self.cache(node)
                existing = parent.children[here]
                assert existing is not None, "a child that was just put in its place is there"
                return existing
            return node
        finally:
            del self.loading[ptr]

    def path_to_level(self, end: int, level: int) -> Node | None:
        """The interior node of ``level`` over the key ``end``."""
        node = self.root
        while node.level > level:
            child = node.children[node.child_index(end - 1)]
            if child is None:
                return None
            node = child
        return node if node.level == level else None

    async def read_node(self, ptr: int, level: int, end: int) -> Node:
        """Read and verify one node (btree.c, bch_btree_node_read_done); raises Corrupt."""
        cset = self.cset
        geometry = cset.geometry
        bucket = cset.buckets.bucket_of(ptr)
        where = f"btree node at bucket {bucket}"
        if not cset.buckets.in_range(ptr, geometry.node_sectors):
            raise Corrupt(where, f"spotted btree ptr out of range (pointer {ptr:#x})")
        raw = bytearray(geometry.node_sectors << 9)
        sector = (ptr >> 8) & ((1 << 43) - 1)
        error = await cset.cache.read(sector, raw, "btree")
        if error and cset.running:
            # To a running set the node is as lost as if it were corrupt, and it fails (btree.c, bch_btree_node_read).
            raise Corrupt(where, f"io error reading bucket: {errno_text(error)}")
        cset.check_io(error, where)
        self.reads += 1
        images, written = decode_node(
            raw,
            magic=self.magic,
            seed=ptr,
            block_bytes=geometry.block_bytes,
            node_blocks=geometry.node_blocks,
            where=where,
        )
        node = Node(
            ptr=ptr,
            bucket=bucket,
            level=level,
            end=end,
            seq=images[0].seq,
            nblocks=geometry.node_blocks,
            bucket_shift=geometry.bucket_shift,
        )
        node.written = written
        if level:
            self._load_interior(node, images, where)
        else:
            load_leaf(node, images, where)
            self._check_leaf(node, where)
            if cset.gens_final:
                drop_stale_dirty(node, cset.buckets)
        return node

    def _load_interior(self, node: Node, images: list[BsetImage], where: str) -> None:
        # The newest fresh pointer of each end position is a child; everything else is remembered for its gen.
        buckets = self.cset.buckets
        newest: dict[int, int] = {}
        every: list[int] = []
        for image in images:
            keys: KeyColumns = image.keys
            self._check_pointers(keys, where)
            buckets.raise_gens(keys.ptr)
        for image in images:
            for position, ptr in zip(image.keys.pos.tolist(), image.keys.ptr.tolist(), strict=True):
                every.append(ptr)
                if position and not buckets.is_stale(ptr):
                    newest[position] = ptr
        children = sorted(newest.items())
        if not children:
            raise Corrupt(where, "interior node without children")
        if children[-1][0] != node.end:
            raise Corrupt(
                where, "short btree key" if children[-1][0] > node.end else "last child does not reach the node's end"
            )
        node.set_children([(position, ptr, None) for position, ptr in children])
        live = set(newest.values())
        node.dead.extend(ptr for ptr in every if ptr not in live)

    def _check_pointers(self, keys: KeyColumns, where: str) -> None:
        node_sectors = self.cset.geometry.node_sectors
        for position, size, nptrs, ptr in zip(
            keys.pos.tolist(), keys.size.tolist(), keys.nptrs.tolist(), keys.ptr.tolist(), strict=True
        ):
            if nptrs != 1 or size != node_sectors or not self.cset.buckets.in_range(ptr, size):
                raise Corrupt(where, f"spotted btree ptr {position:#x} -> {ptr:#x} size {size}")
        if keys.dirty.any():
            raise Corrupt(where, "spotted dirty btree ptr")

    def _check_leaf(self, node: Node, where: str) -> None:
        meta = np.array(node.meta, np.uint32)
        has_ptr = (meta & np.uint32(HAS_PTR)) != 0
        ptrs = np.array(node.ptrs, np.uint64)[has_ptr]
        if len(ptrs) == 0:
            return
        buckets = self.cset.buckets
        size = (meta & np.uint32(SIZE_MASK))[has_ptr].astype(np.uint64)
        sectors = (ptrs >> np.uint64(8)) & np.uint64((1 << 43) - 1)
        mask = np.uint64((1 << buckets.bucket_shift) - 1)
        bucket = buckets.buckets_of(ptrs)
        wrong = (
            (bucket < buckets.first_bucket)
            | (bucket >= buckets.nbuckets)
            | ((sectors & mask) + size > mask + np.uint64(1))
        )
        if wrong.any():
            index = int(np.nonzero(wrong)[0][0])
            raise Corrupt(
                where,
                f"spotted extent with a pointer out of range (sector {int(sectors[index])}, "
                f"{int(size[index])} sectors)",
            )

    # The node cache.

    def cache(self, node: Node) -> None:
        """Count a node in, and evict the leaves least recently cached while there are too many."""
        if node.level:
            return
        self.leaves[node] = None
        self.cached_bytes += self.cset.geometry.node_sectors << 9
        if self.cached_bytes > self.cset.options.node_cache_bytes:
            self._evict()

    def forget(self, node: Node) -> None:
        """Count a node out."""
        node.gone = True
        if node in self.leaves:
            del self.leaves[node]
            self.cached_bytes -= self.cset.geometry.node_sectors << 9

    def _evict(self) -> None:
        node_bytes = self.cset.geometry.node_sectors << 9
        for leaf in list(self.leaves)[:-1]:
            if self.cached_bytes <= self.cset.options.node_cache_bytes:
                return
            if leaf.used:
                # It was used since the last round: give it another one.
                leaf.used = 0
                del self.leaves[leaf]
                self.leaves[leaf] = None
                continue
            if leaf.pending_words or leaf.writing or leaf.frozen or leaf.pin is not None:
                continue
            path = self.path(leaf)
            if len(path) < 2:
                continue
            parent = path[-2]
            if parent.frozen:
                continue
            parent.children[parent.child_index(leaf.end - 1)] = None
            del self.leaves[leaf]
            leaf.gone = True
            self.cached_bytes -= node_bytes

    # Insert.

    def insert_nowait(self, new: Extent, pin: JournalPin | None) -> bool:
        """Insert an extent that lies in one leaf, if that leaf is in memory and has room."""
        leaf = self.leaf_nowait(new.start)
        if leaf is None or leaf.frozen or leaf.gone or new.end > leaf.end:
            return False
        if not self.cset.read_only and not leaf.has_room(3, self.cset.geometry):
            return False
        if new.flags == FLAGS and leaf.overwrite_dirty(new.start, new.end, new.ptr):
            self.inserts += 1
            self.touched(leaf, pin)
        else:
            self.insert_into(leaf, new, pin)
        return True

    def insert_into(self, leaf: Node, new: Extent, pin: JournalPin | None) -> None:
        """Insert an extent into a leaf that has room for it, and account for dirty data."""
        cset = self.cset
        for start, end in leaf.insert(new):
            cset.account_dirty(start, -(end - start))
        if new.flags & DIRTY:
            cset.account_dirty(new.start, new.end - new.start)
        self.inserts += 1
        self.touched(leaf, pin)

    def touched(self, leaf: Node, pin: JournalPin | None) -> None:
        """Keys of a journal entry were inserted into a leaf: it holds the entry, and is to be written.  Of a leaf that
        `Node.is_settled`, this is ``changes`` and ``used`` only.
        """
        cset = self.cset
        self.changes += 1
        leaf.used = 1
        if pin is not None and (leaf.pin is None or pin.seq < leaf.pin.seq):
            pin.count += 1
            cset.journal.unpin(leaf.pin)
            leaf.pin = pin
        if cset.read_only:
            return
        if leaf not in self.dirty_leaves:
            if not self.dirty_leaves:
                self.flush_wake.wake_all()
            self.dirty_leaves[leaf] = None
            leaf.dirty_ns = cset.sched.now_ns
        if BSET_HEADER_BYTES + 8 * leaf.pending_words > self.leaf_write_bytes and not leaf.writing:
            cset.sched.spawn(self.write_leaf(leaf), "write leaf")

    async def insert(self, new: Extent, pin: JournalPin | None) -> bool:
        """Insert an extent, cut at the ends of leaves; False if the set failed meanwhile."""
        position = new.start
        while position < new.end:
            leaf = await self.leaf_with_room(position)
            if leaf is None:
                return False
            part = new.cut(position, min(new.end, leaf.end))
            self.insert_into(leaf, part, pin)
            position = part.end
        return True

    async def leaf_with_room(self, position: int, *, wait: bool = True) -> Node | None:
        """A leaf for an insert at ``position``: in memory, not frozen, with room; None if the set failed, or (without
        ``wait``) if there are no buckets for a split.
        """
        cset = self.cset
        while not cset.io_disabled:
            leaf = await self.leaf(position)
            if leaf.frozen:
                await self.changed.wait()
            elif cset.read_only or leaf.has_room(3, cset.geometry):
                return leaf
            elif not wait and not cset.splitter.has_reserve(leaf.level):
                return None
            else:
                await cset.splitter.split(leaf, wait=wait)
        return None

    async def replace(self, old: Extent, new: Extent, *, is_move: bool = False) -> int:
        """Replace what is left of ``old`` by the corresponding parts of ``new``; returns the sectors replaced.

        The caller has copied the data of ``old`` somewhere; parts that were overwritten since are not touched.  Not
        journaled: a lost replacement only means that the copy is made again (btree.c, bch_btree_insert with a replace
        key).

        A move of dirty data is journaled (`_journal_move`).  It never waits for buckets or for room in the journal;
        what would have to is not replaced.
        """
        replaced = 0
        position = old.start
        while position < old.end:
            leaf = await self.leaf_with_room(position, wait=not is_move)
            if leaf is None:
                return replaced
            stop = min(old.end, leaf.end)
            for extent in leaf.overlapping(position, stop):
                part = extent.cut(position, stop)
                if part.flags != old.flags or part.ptr != old.cut(part.start, part.end).ptr:
                    continue
                if not leaf.has_room(3, self.cset.geometry):
                    # The node became full half-way: go on from here in the node that replaces it.
                    stop = part.start
                    break
                here, pin = new.cut(part.start, part.end), None
                if is_move and here.flags & DIRTY:
                    pin = self._journal_move(here)
                    if pin is None:
                        continue
                self.insert_into(leaf, here, pin)
                self.cset.journal.unpin(pin)
                replaced += part.end - part.start
            if stop == position:
                await self.cset.splitter.split(leaf, wait=not is_move)
            position = stop
        return replaced

    def _journal_move(self, new: Extent) -> JournalPin | None:
        # The entry that the old place is in may live longer than its bucket, if something else in it waits for the
        # btree all the while.  A replay would put that key, stale by then, over the moved one; so the new place comes
        # after it.  Not after the key of a write that is between journal and btree: that one is newer.
        cset = self.cset
        if cset.is_being_written(new.start, new.end):
            return None
        return cset.journal.add_nowait(pack_key(new.end, new.end - new.start, True, new.ptr))

    # Write.

    async def write_leaf(self, leaf: Node) -> None:
        """Append what is pending to the leaf's log; when this returns it is durable, or the set has failed."""
        cset = self.cset
        while leaf.writing:
            await self.changed.wait()
        if not leaf.pending_words or cset.io_disabled or leaf.gone or cset.read_only:
            return
        leaf.writing = True
        pin, leaf.pin = leaf.pin, None
        del self.dirty_leaves[leaf]
        if await self._append_set(leaf, leaf.take_pending()):
            leaf.writing = False
            cset.journal.unpin(pin)
            cset.journal.space.wake_all()
        else:
            leaf.writing = False
        self.changed.wake_all()

    async def append_interior(self, node: Node, keys: bytes) -> bool:
        """Append one set to an interior node: its keys become visible all together."""
        return await self._append_set(node, keys)

    async def _append_set(self, node: Node, keys: bytes) -> bool:
        cset = self.cset
        geometry = cset.geometry
        raw = encode_bset(keys, seq=node.seq, magic=self.magic, seed=node.ptr, block_bytes=geometry.block_bytes)
        sector = node.sector + node.written * geometry.block_size_sectors
        assert node.written + len(raw) // geometry.block_bytes <= node.nblocks, node
        node.written += len(raw) // geometry.block_bytes
        self.sectors_written += len(raw) >> 9
        error = await cset.cache.write_head_last(sector, memoryview(raw), "btree")
        if error:
            cset.fail(f"writing the btree node at bucket {node.bucket} failed: {errno_text(error)}")
            return False
        return True

    async def flush_all(self) -> None:
        """Write every dirty leaf and wait for it, as at an orderly stop (super.c, cache_set_flush)."""
        while not self.cset.io_disabled:
            tasks = [self.cset.sched.spawn(self.write_leaf(leaf), "write leaf") for leaf in self.dirty_leaves]
            writing = [leaf for leaf in self.leaves if leaf.writing]
            if not tasks and not writing:
                return
            for task in tasks:
                await task
            if not tasks:
                await self.changed.wait()

    async def run_flusher(self) -> None:
        """Write dirty leaves that have waited long enough (btree.c, btree_node_write_work)."""
        cset = self.cset
        while not (cset.stopping or cset.io_disabled):
            deadline = None
            for leaf in list(self.dirty_leaves):
                due = leaf.dirty_ns + LEAF_WRITE_DELAY_NS
                if due <= cset.sched.now_ns:
                    if not leaf.writing:
                        cset.sched.spawn(self.write_leaf(leaf), "write leaf")
                else:
                    deadline = due
                    break
            await self.flush_wake.wait(deadline_ns=deadline)

    def root_key(self) -> bytes:
        """The root pointer as the journal's header holds it."""
        root = self.root
        if root is not self.keyed_root:
            self.keyed_root = root
            self.kept_root_key = pack_key(MAX_POS, self.cset.geometry.node_sectors, False, root.ptr)
        return self.kept_root_key

    def nodes(self) -> list[Node]:
        """Every node in memory, parents before children."""
        found = [self.root]
        for node in found:
            found.extend(child for child in node.children if child is not None)
        return found


__all__ = ["DIRTY", "FLAGS", "HAS_PTR", "PENDING", "Btree", "Extent"]
