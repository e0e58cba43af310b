# SPDX-License-Identifier: GPL-2.0-only
"""Since when a btree node has been there: `Ages.since` gives a journal entry that was written later than the node.

The sets of a node are never changed: what a key covers that once went into a node is covered there for good, by it or
by what replaced it.  Only when a node is made anew, of what is live in others (split, coalescing, rewriting by gc), do
keys vanish: holes, and data whose bucket is to be used again, though its generation on the device does not tell that
yet (alloc.c, invalidate_buckets; the prio sets follow).  So of a key that the journal tells of and no leaf has, it
counts whether it went into the very node that is there now.  No node says when it was made, but other things do:

* A journal entry names the root.
* A node whose bucket has the priority of metadata in the prio sets, in its own generation, was there before them.
* A dirty key in a later set of a leaf, just as a journal entry has it, was added to the leaf about when that entry was
  made.  Of a key that was cut by another what is left may be added once more, but no part that begins where it began;
  nor does anything else add a dirty key again, but for a replay, which does so with all that came later.
* A node was there before those that stand in later sets of its parent; one that stands in the first set, before the
  parent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bcachectl.errors import BcachectlError, Corrupt
from bcachectl.fsck import extents as extent
from bcachectl.fsck.check_structures import PRIO_BTREE
from bcachectl.fsck.expand import DEPTH_LIMIT, interior_key
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.salvage import entry_keys, older_entries, read_sets
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk import validity
from bcachectl.ondisk.bkey import KeyColumns, Ptr, ptr_make
from bcachectl.ondisk.bset import decode_node
from bcachectl.ondisk.jset import Jset
from bcachectl.ondisk.magic import bset_magic, prio_magic
from bcachectl.ondisk.prio import decode_prio_set


class Told(NamedTuple):
    """Keys of the journal in the order of their entries, not flat, and the number of each one's entry."""

    rows: Extents
    seq: npt.NDArray[np.uint64]

    def take(self, which: npt.NDArray[Any]) -> Told:
        """The rows that an index or a mask selects."""
        return Told(self.rows.take(which), self.seq[which])


class _Place(NamedTuple):
    # Where the pointer to a node stands: its parent, and the number of the set there.
    parent: Ptr
    number: int


def told_keys(walk: Walk) -> Told:
    """All keys of the journal as far as its entries reach back without a gap; none if that is not beyond replay."""
    entries = older_entries(walk)
    if entries:
        with suppress(Corrupt):
            entries += [(entry.jset.seq, entry_keys(walk, entry.jset.keys)) for entry in walk.replay]
    return Told(extent.concatenate([rows for _seq, rows in entries]),
                np.repeat(np.array([seq for seq, _rows in entries], np.uint64),
                          [len(rows.start) for _seq, rows in entries]))


class Ages:
    """The btree of a set that was walked, above its leaves, and what the journal tells."""

    def __init__(self, walk: Walk, told: Told) -> None:
        self.walk = walk
        assert walk.newest is not None
        every, seq = {entry.jset.seq: entry.jset for entry in walk.journal}, walk.newest.seq
        # Behind a gap there may be entries of an earlier life of the set.
        self.jsets: dict[int, Jset] = {}
        while seq in every:
            self.jsets[seq] = every[seq]
            seq -= 1
        self._places: dict[Ptr, _Place] = {}
        self._children: dict[Ptr, list[list[Ptr]]] = {}
        self._nsectors: dict[Ptr, int] = {}
        told = told.take(told.rows.dirty)
        self._told = told.take(np.argsort(told.rows.ptr, kind="stable"))
        self._added: dict[Ptr, list[int]] = {}
        self._read_tree()

    def since(self, node: Ptr) -> int | None:
        """The number of an entry of which all keys, and all of later entries, went into the node if they lie in its
        range, and not into one that it was made of; None if nothing tells."""
        known: list[int] = []
        for _level in range(DEPTH_LIMIT):
            known += [*self._as_root(node), *self._as_metadata(node), *self._by_keys(node)]
            place = self._places.get(node)
            if place is None:
                break
            later = self._children[place.parent][place.number + 1:]
            known += [seq for children in later for child in children for seq in self._by_keys(child)]
            if place.number:
                break
            node = place.parent
        return min(known, default=None)

    def _read_tree(self) -> None:
        # Nodes that were freed still stand where they stood, and their pointers in older sets: those do not count.
        walk, newest = self.walk, self.walk.newest
        assert newest is not None
        leaves = {slot.leaf for slot in walk.slots}
        todo = [(newest.btree_root, min(newest.btree_level, DEPTH_LIMIT))]
        while todo:
            key, level = todo.pop()
            node = key.ptrs[0] if key.ptrs else None
            if node is None or (not level and node not in leaves):
                continue
            self._nsectors[node] = key.size
            for number, keys in enumerate(self._interior_sets(node) if level else ()):
                self._children.setdefault(node, []).append([])
                for child in (interior_key(keys, row) for row in range(len(keys.pos))):
                    if validity.btree_ptr_bad(child, walk.geometry, walk.gens) or child.ptrs[0] in self._places:
                        continue
                    self._places[child.ptrs[0]] = _Place(node, number)
                    self._children[node][number].append(child.ptrs[0])
                    todo.append((child, level - 1))

    def _interior_sets(self, node: Ptr) -> list[KeyColumns]:
        walk, nsectors = self.walk, self._nsectors[node]
        assert walk.superblock is not None
        block_bytes = walk.geometry.block_bytes
        try:
            sets, _written = decode_node(
                walk.read(node.sector, nsectors), magic=bset_magic(walk.superblock.set_uuid),
                seed=ptr_make(node.sector, node.gen, node.dev), block_bytes=block_bytes,
                node_blocks=(nsectors << 9) // block_bytes, where="")
        except BcachectlError:
            return []
        return [image.keys for image in sets]

    def _as_root(self, node: Ptr) -> Iterator[int]:
        return (seq for seq, jset in self.jsets.items() if node in jset.btree_root.ptrs)

    def _as_metadata(self, node: Ptr) -> Sequence[int]:
        walk = self.walk
        assert walk.superblock is not None and walk.newest is not None
        number, row = divmod(walk.geometry.bucket_of(node.sector), walk.geometry.prios_per_bucket)
        if number >= len(walk.prio_buckets):
            return ()
        place = walk.prio_buckets[number]
        try:
            data = walk.read(walk.geometry.sector_of(place), walk.geometry.meta_sectors)
            prio_set = decode_prio_set(data, prio_magic(walk.superblock.set_uuid), place)
        except BcachectlError:
            return ()
        if prio_set.gen[row] != node.gen or prio_set.prio[row] != PRIO_BTREE:
            return ()
        # The entry that led to these prio sets first, as far as entries are there.
        seq, chain = walk.newest.seq, walk.prio_chain(walk.newest)
        while seq - 1 in self.jsets and walk.prio_chain(self.jsets[seq - 1]) == chain:
            seq -= 1
        return (seq,)

    def _by_keys(self, node: Ptr) -> list[int]:
        # The oldest entry of which a dirty key was added to a leaf.
        if node not in self._added:
            is_leaf = node in self._nsectors and node not in self._children
            self._added[node] = self._first_added(node) if is_leaf else []
        return self._added[node]

    def _first_added(self, leaf: Ptr) -> list[int]:
        sets = read_sets(self.walk, leaf, self._nsectors[leaf]) or []
        rows = extent.concatenate([extent.from_keys(image.keys) for image in sets[1:] if image.is_valid])
        rows = rows.take(rows.dirty & (rows.nptrs > 0))
        told = self._told
        if not len(rows.start) or not len(told.seq):
            return []
        at = np.minimum(np.searchsorted(told.rows.ptr, rows.ptr), len(told.seq) - 1)
        is_told = (told.rows.ptr[at] == rows.ptr) & (told.rows.start[at] == rows.start)
        return [int(told.seq[at[is_told]].min())] if is_told.any() else []
