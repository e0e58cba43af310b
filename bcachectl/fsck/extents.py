# SPDX-License-Identifier: GPL-2.0-only
"""`Extents`: pieces of the address space of a set's volumes as columns, and what happens where they overlap.

An extent is ``[start, end)`` in positions (`bcachectl.ondisk.bkey`: ``inode << 44 | sector``) with the pointer to its
first sector.  Columns that are *flat* are sorted and do not overlap.  Two flat columns are combined by `overlay`, which
is the kernel's rule for the sets of a node and for the journal on top of them (extents.c, bch_extent_sort_fixup): the
newer one wins sector by sector; holes, check keys and stale keys hide what is under them like any other key; keys of
size 0 do nothing.  A stream that is not flat (the journal's keys, in the order of insertion) becomes so by `flatten`.

All of this is numpy over whole nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bcachectl.ondisk.bkey import KEY_SIZE_MAX, PTR_DEV, KeyColumns

U64 = npt.NDArray[np.uint64]

GEN_BITS = 8
"""A pointer's sector stands above its gen: moving on by n sectors adds ``n << GEN_BITS``."""
CELLS_PER_ROW = 16
"""How many cells a row may paint, on average, before `flatten` divides."""


class Extents(NamedTuple):
    """Columns of equal length.  ``nptrs`` is 0 for a hole; ``ptr`` is the raw pointer to the sector at ``start``."""

    start: U64
    end: U64
    dirty: npt.NDArray[np.bool_]
    nptrs: npt.NDArray[np.uint8]
    ptr: U64
    csum: npt.NDArray[np.uint8]

    @property
    def size(self) -> U64:
        """Sectors of each extent."""
        return self.end - self.start

    def take(self, rows: npt.NDArray[np.intp] | npt.NDArray[np.bool_] | slice) -> Extents:
        """The rows that an index, a mask or a slice selects."""
        return Extents._make(column[rows] for column in self)


def empty() -> Extents:
    """No extents."""
    return Extents(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.bool_), np.zeros(0, np.uint8),
                   np.zeros(0, np.uint64), np.zeros(0, np.uint8))


def from_keys(keys: KeyColumns) -> Extents:
    """The leaf keys of one set; those of size 0 are left out.  The caller has left out keys that start below 0."""
    rows = keys.size > 0
    pos = keys.pos[rows]
    return Extents(pos - keys.size[rows], pos, keys.dirty[rows], keys.nptrs[rows], keys.ptr[rows], keys.csum[rows])


def without(keys: KeyColumns, rows: npt.NDArray[np.bool_]) -> KeyColumns:
    """The keys that are not among ``rows``."""
    return KeyColumns._make(column[~rows] for column in keys) if rows.any() else keys


def concatenate(parts: list[Extents]) -> Extents:
    """The rows of all ``parts``, one behind the other."""
    if not parts:
        return empty()
    return Extents._make(np.concatenate(columns) for columns in zip(*parts, strict=True))


def is_flat(extents: Extents) -> bool:
    """Sorted, and none overlaps the next."""
    return bool((extents.end[:-1] <= extents.start[1:]).all())


def overlay(under: Extents, over: Extents) -> Extents:
    """Both together, flat; where they overlap, ``over`` wins.  Both are flat."""
    if not len(over.start):
        return under
    if not len(under.start):
        return over
    rows = touched(under.start, under.end, over)
    return _merged(under.take(~rows), _merged(_gaps(under.take(rows), over), over))


def touched(start: U64, end: U64, over: Extents) -> npt.NDArray[np.bool_]:
    """Which of the flat rows [start, end) are cut or hidden by ``over``, which is flat."""
    first = np.searchsorted(end, over.start, "right")
    last = np.searchsorted(start, over.end, "left")
    some = last > first
    steps = np.zeros(len(end) + 1, np.int64)
    np.add.at(steps, first[some], 1)
    np.add.at(steps, last[some], -1)
    rows: npt.NDArray[np.bool_] = np.cumsum(steps[:-1]) > 0
    return rows


def _gaps(under: Extents, over: Extents) -> Extents:
    # What ``over`` leaves of ``under``.  Row i is touched by those of ``over`` in [first[i], last[i]), and n of them
    # leave n + 1 gaps.
    first = np.searchsorted(over.end, under.start, "right")
    last = np.searchsorted(over.start, under.end, "left")
    touching = np.maximum(last - first, 0)
    gaps = touching + 1
    row = np.repeat(np.arange(len(under.start)), gaps)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(gaps) - gaps, gaps)
    before = np.clip(first[row] + nth - 1, 0, len(over.start) - 1)
    behind = np.clip(first[row] + nth, 0, len(over.start) - 1)
    start = np.where(nth == 0, under.start[row], over.end[before])
    end = np.where(nth == touching[row], under.end[row], over.start[behind])
    return cut(under.take(row), start, end)


def _merged(some: Extents, others: Extents) -> Extents:
    # Both together in order; no row of one overlaps one of the other.
    if not len(some.start):
        return others
    if not len(others.start):
        return some
    places = np.searchsorted(some.start, others.start) + np.arange(len(others.start))
    is_some = np.ones(len(some.start) + len(others.start), np.bool_)
    is_some[places] = False
    pairs: Iterator[tuple[Any, Any]] = zip(some, others, strict=True)
    return Extents._make(_interleaved(column, other, is_some, places) for column, other in pairs)


def _interleaved(column: npt.NDArray[Any], other: npt.NDArray[Any], is_column: npt.NDArray[np.bool_],
                 places: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    both = np.empty(len(is_column), column.dtype)
    both[is_column] = column
    both[places] = other
    return both


def flatten(extents: Extents) -> Extents:
    """Any extents, the later row newer, as a flat map.

    The bounds of all rows cut the address space into cells; each row paints its cells, and what is left of it is one
    piece for every stretch of its cells.  Rows that would paint too many are dealt with in halves.
    """
    if is_flat(extents):
        return extents
    count = len(extents.start)
    bounds = np.sort(np.concatenate([extents.start, extents.end]))
    bounds = bounds[np.diff(bounds, prepend=~bounds[0]) != 0]
    first, last = np.searchsorted(bounds, extents.start), np.searchsorted(bounds, extents.end)
    cells = last - first
    total = int(cells.sum())
    if total > CELLS_PER_ROW * count + CELLS_PER_ROW ** 2:
        older, newer = extents.take(slice(0, count // 2)), extents.take(slice(count // 2, count))
        return overlay(flatten(older), flatten(newer))
    owner = np.full(len(bounds), -1, np.intp)
    # Of several values for one place numpy keeps the last.
    owner[np.repeat(first - np.cumsum(cells) + cells, cells) + np.arange(total)] = np.repeat(np.arange(count), cells)
    heads = np.flatnonzero(np.diff(owner, prepend=-1))
    tails = np.append(heads[1:], len(bounds) - 1)
    rows = owner[heads]
    heads, tails, rows = heads[rows >= 0], tails[rows >= 0], rows[rows >= 0]
    return cut(extents.take(rows), bounds[heads], bounds[tails])


def clip(extents: Extents, *, start: int, end: int) -> Extents:
    """What lies in [start, end) of flat extents."""
    first = int(np.searchsorted(extents.end, np.uint64(start), "right"))
    last = int(np.searchsorted(extents.start, np.uint64(end), "left"))
    some = extents.take(slice(first, max(first, last)))
    return cut(some, np.maximum(some.start, np.uint64(start)), np.minimum(some.end, np.uint64(end)))


def merge(extents: Extents, *, bucket_size_sectors: int) -> Extents:
    """Flat extents with neighbours joined where the kernel joins keys (extents.c, bch_extent_merge).

    They must continue each other on the volume and in the same bucket with the same gen, and agree in the dirty bit;
    no joined extent is longer than a key can say.
    """
    count = len(extents.start)
    if count < 2:
        return extents
    sector = extents.ptr >> np.uint64(GEN_BITS)
    bucket_sectors = np.uint64(bucket_size_sectors)
    joined = (extents.end[:-1] == extents.start[1:]) & (extents.dirty[:-1] == extents.dirty[1:])
    joined &= (extents.nptrs[:-1] == extents.nptrs[1:]) & (extents.csum[:-1] == 0) & (extents.csum[1:] == 0)
    continues = extents.ptr[:-1] + (extents.size[:-1] << np.uint64(GEN_BITS)) == extents.ptr[1:]
    same_bucket = sector[:-1] // bucket_sectors == sector[1:] // bucket_sectors
    joined &= (extents.nptrs[1:] == 0) | (continues & same_bucket)
    heads = np.flatnonzero(np.concatenate(([True], ~joined)))
    tails = np.append(heads[1:], count) - 1
    start, end = extents.start[heads], extents.end[tails]
    pieces = -(-(end - start).astype(np.int64) // KEY_SIZE_MAX)
    if int(pieces.max()) == 1:
        return cut(extents.take(heads), start, end)
    group = np.repeat(np.arange(len(heads)), pieces)
    nth = np.arange(len(group)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    piece_start = start[group] + (nth * KEY_SIZE_MAX).astype(np.uint64)
    piece_end = np.minimum(piece_start + np.uint64(KEY_SIZE_MAX), end[group])
    return cut(extents.take(heads[group]), piece_start, piece_end)


def cut(extents: Extents, start: U64, end: U64) -> Extents:
    """New bounds within (or joined beyond the end of) each extent: a pointer to the cache follows the start, others,
    which lead nowhere, stay; what is empty goes."""
    moved = np.where((extents.nptrs > 0) & (PTR_DEV.get(extents.ptr) == 0),
                     (start - extents.start) << np.uint64(GEN_BITS), np.uint64(0))
    rows = end > start
    cut = extents._replace(start=start, end=end, ptr=extents.ptr + moved)
    return cut if bool(rows.all()) else cut.take(rows)
