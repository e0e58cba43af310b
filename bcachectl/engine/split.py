# SPDX-License-Identifier: GPL-2.0-only
"""`Splitter`: replaces btree nodes by others: a split, a rewrite, a coalescing, a new root.

All of them are one operation, `Splitter.publish`: some neighbouring nodes go, others come, and the tree on disk
changes at one moment:

1. The old nodes are frozen: inserts wait, lookups go on.
2. The new nodes are written and awaited; nothing points to them yet.
3. One set is appended to the parent: pointers to the new nodes, and for each old node a marker, a key at position 0
   that carries the old bucket's next gen.  From now on, on disk, the old pointers are stale.  A parent without room
   is itself replaced, in the same way.  A root has no parent: a journal entry names the new one instead.
4. The tree in memory is changed, the old nodes' journal pins are dropped and their buckets freed.

Until step 3 is durable the bumped gens must not reach the prio sets, or a crash would leave the old pointers stale
and the new ones unwritten: ``prio_blocked`` counts the markers under way.

Only one such operation runs at a time (``Btree.structure``), and it never waits for a bucket while it holds that
lock: it checks the reserve first (btree.c, btree_check_reserve).

Kernel: btree.c, btree_split, btree_gc_coalesce, btree_gc_rewrite_node, bch_btree_set_root.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from bcachectl.engine.alloc import NO_BUCKET, Reserve
from bcachectl.engine.node import FLAGS, HAS_PTR, Node, encode_extents
from bcachectl.engine.sched import FUA
from bcachectl.errors import errno_text
from bcachectl.ondisk.bkey import MAX_POS, pack_key
from bcachectl.ondisk.bset import BSET_HEADER_BYTES, encode_bset
from bcachectl.ondisk.magic import bset_magic

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet

KEY_BYTES = 24
"""A key with one pointer."""

Children = list[tuple[int, int, Node | None]]
"""An interior node's children: end position, pointer word, and the node if it is in memory."""


class Splitter:
    """Structural changes of the btree."""

    __slots__ = ("cset", "splits", "rewrites", "coalesced", "sectors_written", "making_room")

    def __init__(self, cset: CacheSet) -> None:
        self.cset = cset
        self.splits = 0
        self.rewrites = 0
        self.coalesced = 0
        self.sectors_written = 0
        self.making_room: set[Node] = set()

    # The operations.

    def make_room(self, leaf: Node, words: int) -> None:
        """Begin to `split` a leaf, unless that is on its way."""
        if not (leaf.frozen or leaf.gone or leaf in self.making_room or leaf.has_room(words, self.cset.geometry)):
            self.making_room.add(leaf)
            self.cset.sched.spawn(self._make_room(leaf, words), "make room")

    async def _make_room(self, leaf: Node, words: int) -> None:
        try:
            await self.split(leaf, words=words, wait=False)
        finally:
            self.making_room.discard(leaf)

    async def split(self, leaf: Node, *, words: int = 3, wait: bool = True) -> None:
        """Make room for inserts of ``words`` u64s, no more than an eighth of a node, where ``leaf`` is: compact it, and
        divide it if that is not enough.  Without ``wait`` nothing is done if there are no buckets for it.
        """
        cset = self.cset
        while not cset.io_disabled:
            if leaf.gone or leaf.frozen or leaf.has_room(words, cset.geometry):
                return
            if not self.has_reserve(leaf.level):
                if not wait:
                    return
                await cset.alloc.bucket_wait.wait()
                continue
            async with cset.btree.structure:
                if leaf.gone or leaf.frozen or leaf.has_room(words, cset.geometry) or not self.has_reserve(leaf.level):
                    continue
                await self._freeze([leaf])
                self.splits += 1
                await self._replace_leaves([leaf], self._divide(self._live(leaf), leaf.end, leaf.nblocks))
                return

    async def rewrite(self, node: Node) -> bool:
        """Write a node anew without its stale keys; False if it changed or buckets are short."""
        cset = self.cset
        async with cset.btree.structure:
            if node.gone or node.frozen or not self.has_reserve(node.level) or not cset.btree.path(node):
                return False
            await self._freeze([node])
            self.rewrites += 1
            if node.level:
                return await self._replace_interior(node, children_of(node))
            await self._replace_leaves([node], self._divide(self._live(node), node.end, node.nblocks))
            return True

    async def coalesce(self, leaves: list[Node]) -> bool:
        """Put the extents of neighbouring leaves of one parent into one leaf less, if they fit well
        (btree_gc_coalesce).  False, and nothing done, if they are no neighbours any more: since the caller has found
        them another may have come between them.
        """
        cset = self.cset
        geometry = cset.geometry
        async with cset.btree.structure:
            paths = [cset.btree.path(leaf) for leaf in leaves]
            if any(leaf.gone or leaf.frozen or len(path) < 2 for leaf, path in zip(leaves, paths, strict=True)):
                return False
            if not _are_neighbours(paths[0][-2], leaves) or not self.has_reserve(0, len(leaves)):
                return False
            counts = [int(np.count_nonzero(np.array(leaf.meta, np.uint32) & np.uint32(HAS_PTR))) for leaf in leaves]
            two_thirds = geometry.node_blocks * 2 // 3
            if self._blocks(sum(counts)) > two_thirds * (len(leaves) - 1):
                return False
            await self._freeze(leaves)
            columns = [self._live(leaf) for leaf in leaves]
            merged = tuple(np.concatenate([column[part] for column in columns]) for part in range(3))
            groups = self._divide(merged, leaves[-1].end, geometry.node_blocks, into=len(leaves) - 1)
            self.coalesced += 1
            await self._replace_leaves(leaves, groups)
            return True

    async def first_root(self) -> Node | None:
        """The root of a new set: one empty leaf, written; the caller puts it in force."""
        bucket = await self.cset.alloc.alloc(Reserve.BTREE)
        if bucket == NO_BUCKET:
            return None
        node = self._new_node(bucket, 0, MAX_POS)
        return node if await self._write_new([(node, b"")]) else None

    def has_reserve(self, level: int, extra: int = 0) -> bool:
        """Whether enough buckets are kept for replacing a node of ``level`` and everything above it."""
        # One more than the kernel asks for: the uuid array takes its bucket from the same list at any time.
        wanted = (self.cset.btree.root.level - level) * 2 + 2 + extra
        free = self.cset.alloc.free[Reserve.BTREE]
        return len(free) >= min(wanted, free.size)

    # Pieces.

    async def _freeze(self, nodes: list[Node]) -> None:
        for node in nodes:
            node.frozen = True
        for node in nodes:
            while node.writing:
                await self.cset.btree.changed.wait()

    def _live(self, leaf: Node) -> tuple[np.ndarray, ...]:
        # The columns of a leaf without holes and stale extents: nothing is masked in a new node.
        meta = np.array(leaf.meta, np.uint32)
        ptrs = np.array(leaf.ptrs, np.uint64)
        buckets = self.cset.buckets
        keep = (meta & np.uint32(HAS_PTR)) != 0
        keep[keep] = ~buckets.stale_mask(buckets.buckets_of(ptrs[keep]), ptrs[keep])
        return np.array(leaf.ends, np.uint64)[keep], meta[keep] & np.uint32(FLAGS | 0xFFFF), ptrs[keep]

    def _blocks(self, count: int) -> int:
        # Blocks of a set of ``count`` extents.
        return -(-(BSET_HEADER_BYTES + KEY_BYTES * count) // self.cset.geometry.block_bytes)

    def _divide(
        self, columns: tuple[np.ndarray, ...], end: int, nblocks: int, into: int = 0
    ) -> list[tuple[int, tuple[np.ndarray, ...]]]:
        # Cuts the columns for new leaves: (end position, columns) each.  One leaf if that leaves a fifth of it free;
        # else two, the first with three fifths of the keys (btree.c, btree_split); more if that is what it takes.
        count = len(columns[0])
        if not into:
            into = 1 if self._blocks(count) * 5 <= nblocks * 4 else max(2, -(-self._blocks(count) * 5 // (nblocks * 4)))
        if into == 2 and count >= 2:
            cuts = [0, max(1, min(count - 1, count * 3 // 5)), count]
        else:
            into = max(1, min(into, count))
            cuts = [count * part // into for part in range(into + 1)]
        groups = []
        for low, high in itertools.pairwise(cuts):
            here = end if high == count else int(columns[0][high - 1])
            groups.append((here, tuple(column[low:high] for column in columns)))
        return groups

    def _new_node(self, bucket: int, level: int, end: int) -> Node:
        cset = self.cset
        geometry = cset.geometry
        ptr = geometry.sector_of(bucket) << 8 | cset.buckets.gen_at[bucket]
        cset.buckets.unpin(bucket)
        seq = 0
        while seq == 0:
            seq = cset.entropy.getrandbits(64)
        return Node(
            ptr=ptr,
            bucket=bucket,
            level=level,
            end=end,
            seq=seq,
            nblocks=geometry.node_blocks,
            bucket_shift=geometry.bucket_shift,
        )

    def _take(self, level: int, end: int) -> Node:
        # A new node from the reserve that was checked before.
        bucket = self.cset.alloc.alloc_nowait(Reserve.BTREE)
        assert bucket != NO_BUCKET, "the btree reserve was checked"
        return self._new_node(bucket, level, end)

    async def _write_new(self, nodes: list[tuple[Node, bytes]]) -> bool:
        # Writes the first set of each new node; all are durable when this returns True.
        cset = self.cset
        magic, block_bytes = bset_magic(cset.sb.set_uuid), cset.geometry.block_bytes
        ios = []
        for node, keys in nodes:
            raw = encode_bset(keys, seq=node.seq, magic=magic, seed=node.ptr, block_bytes=block_bytes)
            node.written = len(raw) // block_bytes
            assert node.written <= node.nblocks, node
            self.sectors_written += len(raw) >> 9
            ios.append(cset.cache.write(node.sector, memoryview(raw), FUA, "btree"))
        errors = [await io for io in ios]
        if any(errors):
            cset.fail(f"writing a new btree node failed: {errno_text(max(errors))}")
            return False
        return True

    async def _replace_leaves(self, old: list[Node], groups: list[tuple[int, tuple[np.ndarray, ...]]]) -> None:
        new = []
        for end, columns in groups:
            if self.cset.alloc.available_nowait(Reserve.BTREE) == 0:
                break
            node = self._take(0, end)
            node.set_columns(*columns)
            new.append((node, encode_extents(*columns)))
        if len(new) < len(groups) or not await self._write_new(new):
            self._give_up(old, [node for node, _keys in new])
            return
        await self.publish(old, [node for node, _keys in new])

    async def _replace_interior(self, node: Node, children: Children) -> bool:
        # Puts new nodes with these children in the place of an interior node.
        geometry = self.cset.geometry
        count = len(children)
        into = 1 if self._blocks(count) * 5 <= node.nblocks * 4 else 2
        cuts = [0, count] if into == 1 else [0, count * 3 // 5, count]
        new = []
        for low, high in itertools.pairwise(cuts):
            if self.cset.alloc.available_nowait(Reserve.BTREE) == 0:
                break
            part = children[low:high]
            fresh = self._take(node.level, node.end if high == count else part[-1][0])
            fresh.set_children(part)
            new.append((fresh, b"".join(pack_key(end, geometry.node_sectors, False, ptr) for end, ptr, _child in part)))
        if len(new) < into or not await self._write_new(new):
            self._give_up([node], [fresh for fresh, _keys in new])
            return False
        return await self.publish([node], [fresh for fresh, _keys in new])

    def _give_up(self, old: list[Node], new: list[Node]) -> None:
        # Nothing points to the new nodes; the old ones go on as they were.
        for node in new:
            node.gone = True
            self.cset.buckets.free(node.bucket)
        for node in old:
            node.frozen = False
        self.cset.btree.changed.wake_all()

    # Publishing.

    async def publish(self, old: list[Node], new: list[Node]) -> bool:
        """Put ``new``, which are written, in the place of ``old``, neighbours under one parent; False if the set
        failed.
        """
        btree = self.cset.btree
        ok = await (self._publish_root(old[0], new) if old[0] is btree.root else self._publish_under(old, new))
        if not ok:
            for node in old:
                node.frozen = False
            btree.changed.wake_all()
            return False
        for node in new:
            btree.cache(node)
        for node in old:
            while node.writing:
                await btree.changed.wait()
            btree.forget(node)
            btree.dirty_leaves.pop(node, None)
            self.cset.journal.unpin(node.pin)
            node.pin = None
            self.cset.buckets.free(node.bucket)
        btree.changed.wake_all()
        return True

    async def _publish_root(self, old: Node, new: list[Node]) -> bool:
        cset = self.cset
        geometry = cset.geometry
        root = new[0]
        if len(new) > 1:
            if self.cset.alloc.available_nowait(Reserve.BTREE) == 0:
                return False
            root = self._take(old.level + 1, MAX_POS)
            root.set_children([(node.end, node.ptr, node) for node in new])
            keys = b"".join(pack_key(node.end, geometry.node_sectors, False, node.ptr) for node in new)
            if not await self._write_new([(root, keys)]):
                return False
        cset.btree.root = root
        return await cset.journal.write_meta()

    async def _publish_under(self, old: list[Node], new: list[Node]) -> bool:
        cset = self.cset
        alloc, buckets, geometry = cset.alloc, cset.buckets, cset.geometry
        parent = cset.btree.path(old[0])[-2]
        # Before a word of it is on the disk: a parent's set that says otherwise takes a leaf's keys out of the map.
        assert _are_neighbours(parent, old), "what is replaced lies side by side under one parent"
        # From here until the parent's set is durable these gens must not get into the prio sets.
        alloc.prio_blocked += len(old)
        markers = [node.ptr & ~0xFF | buckets.bump_gen(node.bucket) for node in old]
        if parent.has_room(3 * (len(markers) + len(new)), geometry):
            keys = b"".join(pack_key(0, geometry.node_sectors, False, marker) for marker in markers)
            keys += b"".join(pack_key(node.end, geometry.node_sectors, False, node.ptr) for node in new)
            ok = await cset.btree.append_interior(parent, keys)
            if ok:
                parent.set_children(self._exchanged(parent, old, new))
                parent.dead.extend(node.ptr for node in old)
                parent.dead.extend(markers)
        else:
            await self._freeze([parent])
            ok = await self._replace_interior(parent, self._exchanged(parent, old, new))
        alloc.prio_blocked -= len(old)
        if not alloc.prio_blocked:
            alloc.alloc_wait.wake_all()
        if not ok and not cset.io_disabled:
            # The gens were bumped in memory and nothing on disk says so; going on would lose the old nodes.
            cset.fail("no buckets to replace a btree node")
        return ok

    def _exchanged(self, parent: Node, old: list[Node], new: list[Node]) -> Children:
        # The parent's children with ``old`` exchanged for ``new``.
        assert _are_neighbours(parent, old), "what was replaced lay side by side under one parent"
        children, first = children_of(parent), parent.child_index(old[0].end - 1)
        children[first : first + len(old)] = [(node.end, node.ptr, node) for node in new]
        return children


def children_of(node: Node) -> Children:
    """An interior node's children."""
    return list(zip(node.ends, node.ptrs, node.children, strict=True))


def _are_neighbours(parent: Node, nodes: list[Node]) -> bool:
    # Whether these are children of ``parent`` that follow each other.
    first = parent.child_index(nodes[0].end - 1)
    return list(parent.ptrs[first : first + len(nodes)]) == [node.ptr for node in nodes]
