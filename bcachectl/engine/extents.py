# SPDX-License-Identifier: GPL-2.0-only
"""`lay_over`: puts one set of extents over another, thousands at a time.

What `bcachectl.engine.node.Node.insert` does for one extent: what lies beneath is cut back, cut at its front, divided
or dropped.  A leaf that is read from the device is put together set by set, so this is most of what a start of a large
set does.

Kernel: extents.c, bch_extent_sort_fixup.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Columns(NamedTuple):
    """Extents in order, none overlapping: start and end positions, flags, pointer words (0 for holes)."""

    start: npt.NDArray[np.uint64]
    end: npt.NDArray[np.uint64]
    flags: npt.NDArray[np.uint32]
    ptr: npt.NDArray[np.uint64]

    def take(self, which: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Columns:
        """Some of them."""
        return Columns(self.start[which], self.end[which], self.flags[which], self.ptr[which])


def lay_over(below: Columns, above: Columns) -> Columns:
    """``above`` and what is left of ``below`` beneath it, in order."""
    # Which of those above overlap each of those below: from `first` up to, not including, `last`.
    first = np.searchsorted(above.end, below.start, side="right")
    last = np.searchsorted(above.start, below.end, side="left")
    hit = np.flatnonzero(last > first)
    if len(hit) == 0:
        return _merge(below, above)
    # An extent under n others can have n + 1 pieces left: before the first, between two, behind the last.
    count = last[hit] - first[hit]
    piece = np.repeat(hit, count + 1)
    ordinal = np.arange(len(piece)) - np.repeat(np.cumsum(count + 1) - (count + 1), count + 1)
    is_first, is_last = ordinal == 0, ordinal == np.repeat(count, count + 1)
    number = first[piece] + ordinal
    before = above.end[np.maximum(number - 1, 0)]
    behind = above.start[np.minimum(number, len(above.start) - 1)]
    start = np.where(is_first, below.start[piece], np.maximum(before, below.start[piece]))
    end = np.where(is_last, below.end[piece], np.minimum(behind, below.end[piece]))
    left = start < end
    piece, start, end = piece[left], start[left], end[left]
    ptr = below.ptr[piece]
    # The pointer moves along with the front (bset.c, __bch_cut_front); a hole has none.
    ptr = np.where(ptr != 0, ptr + ((start - below.start[piece]) << np.uint64(8)), ptr)
    untouched = np.flatnonzero(last <= first)
    pieces = Columns(start, end, below.flags[piece], ptr)
    return _merge(_merge(below.take(untouched), pieces), above)


def _merge(one: Columns, other: Columns) -> Columns:
    # Two that do not overlap, as one in order.
    both = Columns(*(np.concatenate(pair) for pair in zip(one, other, strict=True)))  # type: ignore[arg-type]
    return both.take(np.argsort(both.end, kind="stable"))
