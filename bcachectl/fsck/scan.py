# SPDX-License-Identifier: GPL-2.0-only
# cython: wraparound=False
"""`Scan`: what `bcachectl.fsck.tally` finds out about a leaf, key by key instead of column by column.

Compiled (packaging/compile.py), one pass over a leaf's words takes a fraction of the time of a dozen passes over its
columns; as plain Python it would take a hundred times as long, so there `Tallier` does not ask it.  It knows only
what is beyond doubt.  `Scan.leaf` says False for everything else, and then the columns are asked, which know more; so
nothing is lost where this file is cautious, and what it does say must be what the columns say
(tests/property/test_scan.py).

1. The sets but the first, and the journal's keys in the range of the leaf, become one flat map of *rows* (`_decode`,
   `_lay`): newer over older.
2. The keys of the first set are counted as they pass (`_base`), if they are all of one volume and have one pointer to
   the cache each.  Otherwise the first set becomes the bottom of the map.  A key that a row touches is cut (`_cut`):
   what is left of it is a row as well.
3. Keys that follow each other on the cache device, in one bucket, are one run.  One whose generation is that of its
   bucket is done with (`_close`); the few others are looked at again (`_settle`).
4. The rows are counted (`_count`).

Rows stand in arrays of words, four each: start, end, pointer to the first sector, kind.  The kind of what only hides
others is 0, of clean data 1, of dirty data 3.

Numbers have 64 bits when compiled: none may be negative or become larger, unless a later check declines the leaf.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bcachectl.fsck.extents import Extents
from bcachectl.ondisk.bkey import HIGH_ONE, KEY_PTRS, PTR_DEV
from bcachectl.ondisk.geometry import Geometry
from bcachectl.ondisk.validity import BUCKET_GC_GEN_MAX

try:
    import cython
except ImportError:
    from bcachectl import plain as cython

IS_COMPILED: bool = cython.compiled

JOURNAL_ROWS_MAX = 4096
"""Rows of the journal in one leaf; more are left to the columns."""
SPREADS_MAX = 16
"""Volumes with dirty data in one leaf."""

_ROW_WORDS, _RUN_WORDS, _SPREAD_WORDS = 4, 3, 4
_BEHIND_MAX = 128
_GOOD, _DOUBTFUL, _OTHER_FORM = 1, 0, -1


def _room(words: int) -> memoryview:
    # Memory that is not there before it is used.
    return np.empty(words, np.uint64).data


class Scan:
    """Scans leaves of ``geometry.node_sectors``, one after the other, with the generations in ``gens``.

    After `leaf` the results stand in the attributes.  ``journal`` is a flat map without keys that no kernel accepts.
    """

    def __init__(self, geometry: Geometry, gens: npt.NDArray[np.uint8], journal: Extents) -> None:
        bucket_sectors = geometry.bucket_size_sectors
        self.gens = gens.data
        self.node_sectors = geometry.node_sectors
        self.shift = 8 + geometry.bucket_shift
        self.in_bucket = (bucket_sectors - 1) << 8
        self.bucket_end = bucket_sectors << 8
        self.ptr_min = geometry.first_bucket * bucket_sectors << 8
        self.ptr_limit = min(geometry.nbuckets * bucket_sectors << 8, 1 << PTR_DEV.offset)
        self.gen_max, self.behind_max = BUCKET_GC_GEN_MAX, _BEHIND_MAX
        self.base_high = (HIGH_ONE | 1 << KEY_PTRS.offset) >> 37
        self.place_start = self.place_end = 0

        is_data = (journal.nptrs > 0) & (PTR_DEV.get(journal.ptr) == 0)
        kind = np.where(is_data, 1 + 2 * journal.dirty.astype(np.uint64), np.uint64(0))
        self.journal_rows = len(kind)
        self.journal = np.stack([journal.start, journal.end, journal.ptr, kind], 1).astype(np.uint64).ravel().data

        # A key has two words at least.  Where one row lies over another, there may be two more than before.
        rows = geometry.node_bytes // 8 + 2 * JOURNAL_ROWS_MAX + 16
        self.rows, self.others = _room(_ROW_WORDS * rows), _room(_ROW_WORDS * rows)
        self.cuts = _room(_ROW_WORDS * 2 * rows)
        self.odd = _room(_RUN_WORDS * rows)
        self.spread_words = _room(_SPREAD_WORDS * SPREADS_MAX)
        self.taken_words, self.mark_words = _room(4 * rows), _room(2 * rows)
        self.is_leaf = 0
        self.nodd = self.ncuts = self.nspreads = self.ntaken = self.nmarks = 0
        self.extents = self.dirty_sectors = self.sectors = 0

    def leaf(self, words: memoryview, log: list[tuple[int, int]], start: int, end: int) -> bool:
        """Whether it is known what the leaf holds whose sets' keys stand at ``log`` (first word, how many)."""
        done = self._leaf(words, log, start, end, 1)
        return (self._leaf(words, log, start, end, 0) if done == _OTHER_FORM else done) == _GOOD

    def taken(self) -> bytes:
        """The words of `bcachectl.fsck.tally.Tally.taken`."""
        return bytes(memoryview(self.taken_words)[:self.ntaken])

    def marks(self) -> bytes:
        """The words of `bcachectl.fsck.tally.Tally.marks`."""
        return bytes(memoryview(self.mark_words)[:self.nmarks])

    def spreads(self) -> list[tuple[int, int, int, int]]:
        """Dirty data of each volume: its device number, sectors, start, end."""
        words = memoryview(self.spread_words)[:_SPREAD_WORDS * self.nspreads].tolist()
        return [(words[at], words[at + 1], words[at + 2], words[at + 3]) for at in range(0, len(words), _SPREAD_WORDS)]

    def _leaf(self, words: memoryview, log: list[tuple[int, int]], start: int, end: int, has_base: int) -> int:
        self.place_start, self.place_end = start, end
        self.is_leaf = self.nodd = self.ncuts = self.nspreads = self.ntaken = self.nmarks = 0
        self.extents = self.dirty_sectors = self.sectors = 0
        count = 0
        for at, length in log[has_base:]:
            over = self._decode(words, at, at + length, self.cuts)
            if over < 0:
                return _DOUBTFUL
            count = self._over(over, count)
        over = self._with_journal()
        if over < 0:
            return _DOUBTFUL
        count = self._over(over, count)
        if has_base:
            at, length = log[0]
            done = self._base(words, at, at + length, count)
            if done != _GOOD:
                return done
        if not self.is_leaf or not self._settle() or not self._count(self.rows, count):
            return _DOUBTFUL
        return _GOOD if self._count(self.cuts, self.ncuts) else _DOUBTFUL

    # The map.

    def _over(self, over: int, count: int) -> int:
        # So many rows at ``cuts`` over the ``count`` rows of the map; how many there are then.
        if not over:
            return count
        count = _lay(self.rows, count, self.cuts, over, self.others)
        self.rows, self.others = self.others, self.rows
        return count

    def _with_journal(self) -> int:
        # What lies in the range of the leaf, in ``cuts``; -1 if it is too much.
        journal, start, end = self.journal, self.place_start, self.place_end
        low, high = 0, self.journal_rows
        while low < high:
            middle = (low + high) >> 1
            if journal[4 * middle + 1] > start:
                high = middle
            else:
                low = middle + 1
        count = 0
        while low < self.journal_rows and journal[4 * low] < end:
            if count == JOURNAL_ROWS_MAX:
                return -1
            first, last, ptr, kind = journal[4 * low], journal[4 * low + 1], journal[4 * low + 2], journal[4 * low + 3]
            if first < start:
                if kind:
                    ptr += (start - first) << 8
                first = start
            if last > end:
                last = end
            count = _put(self.cuts, count, first, last, ptr, kind)
            low += 1
        return count

    def _decode(self, words: memoryview, at: int, stop: int, rows: memoryview) -> int:
        # A set of any keys as rows; -1 if a rule speaks against one of them.
        previous, last_end, count = 0, self.place_start, 0
        while at < stop:
            if at + 2 > stop:
                return -1
            high, low = words[at], words[at + 1]
            nptrs, size, inode = high >> 60 & 7, high >> 20 & 0xFFFF, high & 0xFFFFF
            if nptrs > 1 or at + 2 + nptrs > stop or low >> 44 or inode == 0xFFFFF:
                return -1
            pos = inode << 44 | low
            if pos < previous:
                return -1
            previous, ptr, kind = pos, 0, 0
            if nptrs:
                ptr = words[at + 2]
                # Others are those of cache misses, random but for the device number.
                if not ptr >> 51 & 0xFFF:
                    if ptr >> 63:
                        return -1
                    if ptr >= self.ptr_min and ptr < self.ptr_limit:
                        if (ptr & self.in_bucket) + (size << 8) > self.bucket_end or not self._judge(ptr):
                            return -1
                        kind = 1 | high >> 35 & 2
                    elif size:
                        return -1
            if size:
                if low < size or pos < last_end + size or pos > self.place_end:
                    return -1
                last_end = pos
                count = _put(rows, count, pos - size, pos, ptr, kind)
                if kind and (kind > 1 or size != self.node_sectors or ptr & self.in_bucket):
                    self.is_leaf = 1
            at += 2 + nptrs
        return count

    def _judge(self, ptr: int) -> int:
        # A pointer by its generation: 0 if it is too old to be, and a mark if it is not its bucket's.
        behind = (self.gens[ptr >> self.shift] - ptr) & 0xFF
        if behind:
            if behind > self.gen_max and behind <= self.behind_max:
                return 0
            self.mark_words[self.nmarks] = ptr
            self.nmarks += 1
        return 1

    # The first set.

    def _base(self, words: memoryview, at: int, stop: int, count: int) -> int:
        # Its keys, less what the ``count`` rows of the map hide.  What is not seen here of a wrong one, `_close` sees.
        if at == stop or (stop - at) % 3:
            return _OTHER_FORM
        rows, base_high, ptr_min, ptr_limit = self.rows, self.base_high, self.ptr_min, self.ptr_limit
        in_bucket, node_sectors, place_end = self.in_bucket, self.node_sectors, self.place_end
        inode = words[at] & 0xFFFFF
        offset = inode << 44
        last = offset if offset > self.place_start else self.place_start
        # Up to here, no key touches a row.
        row, untouched_end = 0, rows[0] if count else place_end
        head = tail = length = is_dirty = lows = evidence = 0
        extents = sectors = dirty_sectors = dirty_start = dirty_end = 0
        if inode == 0xFFFFF:
            return _OTHER_FORM
        while at < stop:
            high, low, ptr = words[at], words[at + 1], words[at + 2]
            at += 3
            if high >> 37 != base_high or high & 0xFFFFF != inode:
                return _OTHER_FORM
            size, dirty = high >> 20 & 0xFFFF, high >> 36 & 1
            pos = offset | low
            if not size or ptr < ptr_min or ptr >= ptr_limit:
                return _OTHER_FORM
            if pos < last + size:
                return _DOUBTFUL
            last = pos
            lows |= low
            evidence |= dirty | (size ^ node_sectors) | ptr & in_bucket
            if pos > untouched_end:
                while row < count and rows[4 * row + 1] <= pos - size:
                    row += 1
                untouched_end = rows[4 * row] if row < count else place_end
                if row < count and pos > untouched_end:
                    if not self._cut(pos - size, pos, ptr, dirty, row, count):
                        return _DOUBTFUL
                    continue
            if ptr != tail or not ptr & in_bucket:
                if length and not self._close(head, tail, length, is_dirty):
                    return _DOUBTFUL
                head = ptr
                length = is_dirty = 0
            tail = ptr + (size << 8)
            length += 1
            extents += 1
            sectors += size
            if dirty:
                if not dirty_sectors:
                    dirty_start = pos - size
                is_dirty = 1
                dirty_sectors += size
                dirty_end = pos
        if lows >> 44 or last > place_end or (length and not self._close(head, tail, length, is_dirty)):
            return _DOUBTFUL
        if evidence:
            self.is_leaf = 1
        self.extents, self.sectors = extents, sectors
        if dirty_sectors:
            return self._note(inode, dirty_sectors, dirty_start, dirty_end)
        return _GOOD

    def _cut(self, start: int, end: int, ptr: int, dirty: int, row: int, count: int) -> int:
        # A key that the row touches, and maybe others behind it: it is judged as it stands, and what is left is kept.
        if (ptr & self.in_bucket) + ((end - start) << 8) > self.bucket_end or not self._judge(ptr):
            return 0
        rows, at = self.rows, start
        while row < count and rows[4 * row] < end:
            if rows[4 * row] > at:
                self.ncuts = _put(self.cuts, self.ncuts, at, rows[4 * row], ptr + ((at - start) << 8), 1 + 2 * dirty)
            at = rows[4 * row + 1]
            row += 1
        if at < end:
            self.ncuts = _put(self.cuts, self.ncuts, at, end, ptr + ((at - start) << 8), 1 + 2 * dirty)
        return 1

    def _close(self, head: int, tail: int, length: int, is_dirty: int) -> int:
        # A run of so many keys; 0 if it crosses its bucket.
        if (head & self.in_bucket) + (tail - head) > self.bucket_end:
            return 0
        if self.gens[head >> self.shift] == head & 0xFF:
            self.taken_words[self.ntaken] = head >> 8 << 21 | (tail - head) >> 8
            self.ntaken += 1
            return 1
        odd, at = self.odd, 3 * self.nodd
        odd[at], odd[at + 1], odd[at + 2] = head, tail, length << 1 | is_dirty
        self.nodd += 1
        return 1

    def _settle(self) -> int:
        # Runs with other generations than their buckets'; 0 if one is too old, or dirty data was reused.
        odd = self.odd
        for index in range(self.nodd):
            head, tail, length = odd[3 * index], odd[3 * index + 1], odd[3 * index + 2]
            if not self._judge(head):
                return 0
            behind = (self.gens[head >> self.shift] - head) & 0xFF
            if behind <= self.behind_max:
                if length & 1:
                    return 0
                self.extents -= length >> 1
                self.sectors -= (tail - head) >> 8
            else:
                self.taken_words[self.ntaken] = head >> 8 << 21 | (tail - head) >> 8
                self.ntaken += 1
        return 1

    # Counting.

    def _count(self, rows: memoryview, count: int) -> int:
        # Rows with data; 0 if one is too old, or dirty and reused.
        for index in range(count):
            kind = rows[4 * index + 3]
            if not kind:
                continue
            start, end, ptr = rows[4 * index], rows[4 * index + 1], rows[4 * index + 2]
            if ptr < self.ptr_min or ptr >= self.ptr_limit:
                return 0
            if (ptr & self.in_bucket) + ((end - start) << 8) > self.bucket_end:
                return 0
            behind = (self.gens[ptr >> self.shift] - ptr) & 0xFF
            if behind and behind <= self.behind_max:
                if behind > self.gen_max or kind > 1:
                    return 0
                continue
            self.taken_words[self.ntaken] = ptr >> 8 << 21 | (end - start)
            self.ntaken += 1
            self.extents += 1
            self.sectors += end - start
            if kind > 1 and self._note((end - 1) >> 44, end - start, start, end) != _GOOD:
                return 0
        return 1

    def _note(self, inode: int, sectors: int, start: int, end: int) -> int:
        # Dirty data of a volume.
        words = self.spread_words
        self.dirty_sectors += sectors
        for at in range(0, 4 * self.nspreads, 4):
            if words[at] == inode:
                words[at + 1] += sectors
                if start < words[at + 2]:
                    words[at + 2] = start
                if end > words[at + 3]:
                    words[at + 3] = end
                return _GOOD
        if self.nspreads == SPREADS_MAX:
            return _DOUBTFUL
        at = 4 * self.nspreads
        words[at], words[at + 1], words[at + 2], words[at + 3] = inode, sectors, start, end
        self.nspreads += 1
        return _GOOD


def _put(rows: memoryview, count: int, start: int, end: int, ptr: int, kind: int) -> int:
    # One more row behind ``count`` others; how many there are then.
    at = 4 * count
    rows[at], rows[at + 1], rows[at + 2], rows[at + 3] = start, end, ptr, kind
    return count + 1


def _lay(under: memoryview, nunder: int, over: memoryview, nover: int, out: memoryview) -> int:
    # Two flat maps as one; where they overlap, ``over`` wins.  How many rows that makes.
    count = row = 0
    for index in range(nunder):
        start, end, ptr, kind = (under[4 * index], under[4 * index + 1], under[4 * index + 2], under[4 * index + 3])
        at = start
        while row < nover and over[4 * row] < end:
            first, last = over[4 * row], over[4 * row + 1]
            if first > at:
                count = _put(out, count, at, first, ptr + ((at - start) << 8 if kind else 0), kind)
            if last > at:
                at = last
            if last > end:
                # It reaches into the next one, and comes out behind that.
                break
            count = _put(out, count, first, last, over[4 * row + 2], over[4 * row + 3])
            row += 1
        if at < end:
            count = _put(out, count, at, end, ptr + ((at - start) << 8 if kind else 0), kind)
    while row < nover:
        count = _put(out, count, over[4 * row], over[4 * row + 1], over[4 * row + 2], over[4 * row + 3])
        row += 1
    return count
