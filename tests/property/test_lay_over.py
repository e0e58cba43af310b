# SPDX-License-Identifier: GPL-2.0-only
"""Sets of a leaf combined in bulk against the same extents inserted one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bcachectl.engine.extents import Columns, lay_over
from bcachectl.engine.node import DIRTY, HAS_PTR, Extent, Node


@st.composite
def a_set(draw: st.DrawFn) -> list[Extent]:
    """Extents in order, none overlapping, as a set of a leaf has them."""
    found, position = [], draw(st.integers(1, 9))
    for _ in range(draw(st.integers(0, 14))):
        position += draw(st.sampled_from((0, 0, 1, 3, 8)))
        size = draw(st.integers(1, 12))
        flags = draw(st.sampled_from((0, HAS_PTR, HAS_PTR | DIRTY)))
        ptr = draw(st.integers(1, 50)) << 13 | draw(st.integers(0, 255)) if flags else 0
        found.append(Extent(position, position + size, flags, ptr))
        position += size
    return found


def columns(extents: list[Extent]) -> Columns:
    return Columns(*(np.array([extent[part] for extent in extents], dtype)
                     for part, dtype in enumerate((np.uint64, np.uint64, np.uint32, np.uint64))))


@given(sets=st.lists(a_set(), min_size=1, max_size=5))
def test_sets_laid_over_each_other_in_bulk_are_what_single_inserts_make(sets: list[list[Extent]]) -> None:
    node = Node(ptr=0x0000000002DB0001, bucket=3, level=0, end=1 << 44, seq=1, nblocks=64, bucket_shift=7)
    whole = columns(sets[0])
    for extent in sets[0]:
        node.insert(extent, 0)
    for keys in sets[1:]:
        whole = lay_over(whole, columns(keys))
        for extent in keys:
            node.insert(extent, 0)
    found = [Extent(*row) for row in zip(*(column.tolist() for column in whole), strict=True)]
    assert found == [node.extent(index) for index in range(len(node.ends))]
