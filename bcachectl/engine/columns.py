# SPDX-License-Identifier: GPL-2.0-only
"""What is done to the columns of a node, a key at a time.

Compiled modules have it from columns_c.pxd: there a column is memory, and nobody looks at an index.
"""

from __future__ import annotations

from array import array


def u64s(column: array[int]) -> array[int]:
    """The items of a column of type Q, until its length changes."""
    return column


def u32s(column: array[int]) -> array[int]:
    """The items of a column of type I, until its length changes."""
    return column


def make_room(column: array[int], first: int, last: int, count: int) -> None:
    """Have ``count`` items, of any value, in place of those in [first, last)."""
    column[first:last] = array(column.typecode, bytes(count * column.itemsize))
