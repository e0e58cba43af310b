# SPDX-License-Identifier: GPL-2.0-only
"""What an insert means for its leaf."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any, cast

from bcachectl.engine.btree import LEAF_WRITE_BYTES, Btree
from bcachectl.engine.journal import JournalPin
from bcachectl.engine.node import Node
from bcachectl.ondisk.bkey import MAX_POS

SEQ = 7


class Tree:
    """A leaf in a tree that only notes what it is told."""

    def __init__(self, held: int | None, pending_words: int, writing: int) -> None:
        self.told: list[object] = []
        cset = SimpleNamespace(
            sb=SimpleNamespace(set_uuid=bytes(16)), geometry=SimpleNamespace(node_sectors=64), read_only=False,
            sched=SimpleNamespace(now_ns=5, spawn=lambda coro, _name: (coro.close(), self.told.append("written"))),
            journal=SimpleNamespace(unpin=self.told.append))
        self.leaf = Node(ptr=0, bucket=1, level=0, end=MAX_POS, seq=1, nblocks=64, bucket_shift=10)
        self.btree = Btree(cast(Any, cset), self.leaf)
        self.leaf.pending_words, self.leaf.writing = pending_words, bool(writing)
        if held is not None:
            self.leaf.pin = JournalPin(held, 1)
            self.btree.dirty_leaves[self.leaf] = None

    def state(self) -> tuple[object, ...]:
        """All but that the leaf was used."""
        return self.leaf.pin, list(self.btree.dirty_leaves), self.leaf.dirty_ns, list(self.told)


def test_a_settled_leaf_stays_as_it_is() -> None:
    """What `Placed.insert` leaves out for it is what `Btree.touched` would not do; else there is something to do."""
    words = LEAF_WRITE_BYTES // 8
    settled = 0
    for held, pending, writing in product((None, SEQ - 1, SEQ, SEQ + 1), (3, words - 4, words, 2 * words), (0, 1)):
        tree = Tree(held, pending, writing)
        before, pin = tree.state(), JournalPin(SEQ, 1)
        is_settled = tree.leaf.is_settled(SEQ, tree.btree.leaf_write_bytes)
        tree.btree.touched(tree.leaf, pin)
        assert (tree.btree.changes, tree.leaf.used) == (1, 1)
        if is_settled:
            settled += 1
            assert (tree.state(), pin.count) == (before, 1)
        elif not writing:
            assert tree.state() != before
    assert settled == 8
