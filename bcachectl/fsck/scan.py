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
3. Keys that follow each other on the cache device, in one bucket, are one run.  The few whose generation is not that of
   their bucket are looked at again (`_settle`).
4. The rows are counted (`_count`).

`Scan.leaf` gives what one leaf holds, with the generations as they are; `bcachectl.fsck.counting` adds leaves up.

Rows stand in arrays of words, four each: start, end, pointer to the first sector, kind.  The kind of what only hides
others is 0, of clean data 1, of dirty data 3.

Numbers have 64 bits when compiled: none may be negative or become larger, unless a later check declines the leaf.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bcachectl.fsck.extents import Extents
from bcachectl.ondisk.bkey import HIGH_ONE, KEY_DIRTY, KEY_PTRS, KEY_SIZE, PTR_DEV
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
_ROW_WORDS, RUN_WORDS, SPREAD_WORDS = 4, 3, 4
_BEHIND_MAX = 128
GOOD, DOUBTFUL, OTHER_FORM = 1, 0, -1
"""What is said of a leaf: it is known; it is not; it is not what `Scan._base` is for."""


def room(words: int) -> memoryview:
    """Memory that is not there before it is used."""
    return np.empty(words, np.uint64).data


def rows_of(extents: Extents) -> npt.NDArray[np.uint64]:
    """The map as `Scan` has it."""
    is_data = (extents.nptrs > 0) & (PTR_DEV.get(extents.ptr) == 0)
    kind = np.where(is_data, 1 + 2 * extents.dirty.astype(np.uint64), np.uint64(0))
    return np.stack([extents.start, extents.end, extents.ptr, kind], 1).astype(np.uint64).ravel()


class Scan:
    """Scans leaves of ``geometry.node_sectors``, one after the other, with the generations in ``gens``.

    After `leaf` its results stand in the attributes.  ``journal`` are the `rows_of` a flat map without keys that no
    kernel accepts.
    """

    def __init__(self, geometry: Geometry, gens: npt.NDArray[np.uint8], journal: npt.NDArray[np.uint64]) -> None:
        bucket_sectors = geometry.bucket_size_sectors
        self.gens = gens.data
        self.node_sectors = geometry.node_sectors
        self.shift = 8 + geometry.bucket_shift
        self.in_bucket = (bucket_sectors - 1) << 8
        self.bucket_end = bucket_sectors << 8
        self.ptr_min = geometry.first_bucket * bucket_sectors << 8
        self.ptr_limit = min(geometry.nbuckets * bucket_sectors << 8, 1 << PTR_DEV.offset)
        self.gen_max, self.behind_max = BUCKET_GC_GEN_MAX, _BEHIND_MAX
        self.journal_rows_max, self.spreads_max = JOURNAL_ROWS_MAX, SPREADS_MAX
        self.form, self.fixed = HIGH_ONE | 1 << KEY_PTRS.offset, (1 << 64) - 1 & ~(KEY_SIZE.mask | KEY_DIRTY.mask)
        self.place_start = self.place_end = 0

        self.journal_rows, self.journal = len(journal) // _ROW_WORDS, journal.data

        # A key has two words at least.  Where one row lies over another, there may be two more than before.
        rows = geometry.node_bytes // 8 + 2 * JOURNAL_ROWS_MAX + 16
        self.rows, self.others = room(_ROW_WORDS * rows), room(_ROW_WORDS * rows)
        self.cuts = room(_ROW_WORDS * 2 * rows)
        self.odd = room(RUN_WORDS * rows)
        self.spread_words = room(SPREAD_WORDS * SPREADS_MAX)
        self.taken_words = room(4 * rows)
        self.log_words = room(2 * geometry.node_bytes // geometry.block_bytes + 2)
        # Those of several leaves, where they are counted together.
        self.mark_words = room(2 * rows)
        self.is_counting = self.first_mark = 0
        self.is_leaf = self.nsets = self.nodd = self.ncuts = self.nspreads = self.ntaken = self.nmarks = 0
        self.extents = self.dirty_sectors = self.sectors = 0

    def leaf(self, words: memoryview, log: list[tuple[int, int]], start: int, end: int) -> bool:
        """Whether it is known what the leaf holds whose sets' keys stand at ``log`` (first word, how many)."""
        log_words = memoryview(self.log_words)
        for index, (at, length) in enumerate(log):
            log_words[2 * index], log_words[2 * index + 1] = at, length
        self.is_counting, self.gen_max, self.nsets, self.first_mark = 0, BUCKET_GC_GEN_MAX, len(log), 0
        with cython.nogil:
            done = self._leaf(words, start, end)
        return done == GOOD

    def taken(self) -> bytes:
        """The words of `bcachectl.fsck.tally.Tally.taken`."""
        return bytes(memoryview(self.taken_words)[:self.ntaken])

    def marks(self) -> bytes:
        """The words of `bcachectl.fsck.tally.Tally.marks`."""
        return bytes(memoryview(self.mark_words)[:self.nmarks])

    def spreads(self) -> list[tuple[int, int, int, int]]:
        """Dirty data of each volume in the last leaf: its device number, sectors, start, end."""
        return spreads_in(memoryview(self.spread_words)[:SPREAD_WORDS * self.nspreads])

    def _leaf(self, words: memoryview, start: int, end: int) -> int:
        done: int = self._in_form(words, start, end, 1)
        return self._in_form(words, start, end, 0) if done == OTHER_FORM else done

    def _in_form(self, words: memoryview, start: int, end: int, has_base: int) -> int:
        self.place_start, self.place_end, self.nmarks = start, end, self.first_mark
        self.is_leaf = self.nodd = self.ncuts = self.nspreads = self.ntaken = 0
        self.extents = self.dirty_sectors = self.sectors = 0
        count = 0
        for index in range(has_base, self.nsets):
            at = self.log_words[2 * index]
            over = self._decode(words, at, at + self.log_words[2 * index + 1], self.cuts)
            if over < 0:
                return DOUBTFUL
            count = self._over(over, count)
        over = self._with_journal()
        if over < 0:
            return DOUBTFUL
        count = self._over(over, count)
        if has_base:
            at = self.log_words[0]
            done: int = self._base(words, at, at + self.log_words[1], count)
            if done != GOOD:
                return done
        if not self.is_leaf or not (self._judge_odd() if self.is_counting else self._settle()):
            return DOUBTFUL
        if not self._count(self.rows, count):
            return DOUBTFUL
        return GOOD if self._count(self.cuts, self.ncuts) else DOUBTFUL

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
            if count == self.journal_rows_max:
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

    @cython.boundscheck(False)  # type: ignore[untyped-decorator]
    def _base(self, words: memoryview, at: int, stop: int, count: int) -> int:
        # Its keys, less what the ``count`` rows of the map hide.
        if at == stop or (stop - at) % 3:
            return OTHER_FORM
        if at < 0 or stop > len(words) or 4 * count > len(self.rows) or stop - at > len(self.taken_words):
            return DOUBTFUL
        rows, taken, gens, shift = self.rows, self.taken_words, self.gens, self.shift
        ptr_min, ptr_limit, in_bucket, bucket_end = self.ptr_min, self.ptr_limit, self.in_bucket, self.bucket_end
        inode = words[at] & 0xFFFFF
        form, fixed, offset = self.form | inode, self.fixed, inode << 44
        last = offset if offset > self.place_start else self.place_start
        # Up to here, no key touches a row.
        row, untouched_end = 0, rows[0] if count else self.place_end
        extents = (stop - at) // 3
        head = tail = ntaken = seen = sectors = dirty_sectors = dirty_start = dirty_end = 0
        if inode == 0xFFFFF:
            return OTHER_FORM
        self._find_evidence(words, at, stop)
        while at < stop:
            high, low, ptr = words[at], words[at + 1], words[at + 2]
            at += 3
            size, dirty = high >> 20 & 0xFFFF, high >> 36 & 1
            pos = offset | low
            if (high ^ form) & fixed or low >> 44 or not size:
                return OTHER_FORM
            if pos < last + size:
                return DOUBTFUL
            last = pos
            if pos > untouched_end:
                while row < count and rows[4 * row + 1] <= pos - size:
                    row += 1
                untouched_end = rows[4 * row] if row < count else self.place_end
                if row < count and pos > untouched_end:
                    if ptr < ptr_min or ptr >= ptr_limit:
                        return OTHER_FORM
                    if not self._cut(pos - size, pos, ptr, dirty, row, count):
                        return DOUBTFUL
                    extents -= 1
                    continue
            if dirty > seen:
                dirty_start = pos - size
                seen = 1
            dirty_sectors += size * dirty
            if dirty:
                dirty_end = pos
            if ptr == tail and ptr & in_bucket:
                # Of the bucket and the generation of the key before it.
                tail += size << 8
                if (ptr & in_bucket) + (size << 8) > bucket_end:
                    return DOUBTFUL
                continue
            if ptr < ptr_min or ptr >= ptr_limit:
                return OTHER_FORM
            if (ptr & in_bucket) + (size << 8) > bucket_end:
                return DOUBTFUL
            if gens[ptr >> shift] != ptr & 0xFF:
                self._postpone(ptr, ptr + (size << 8), 2 | dirty)
                sectors += size
                continue
            if tail:
                taken[ntaken] = head >> 8 << 21 | (tail - head) >> 8
                ntaken += 1
                sectors += (tail - head) >> 8
            head, tail = ptr, ptr + (size << 8)
        if last > self.place_end:
            return DOUBTFUL
        if tail:
            taken[ntaken] = head >> 8 << 21 | (tail - head) >> 8
            ntaken += 1
            sectors += (tail - head) >> 8
        self.extents, self.sectors, self.ntaken = extents, sectors, ntaken
        if dirty_sectors:
            return self._note(inode, dirty_sectors, dirty_start, dirty_end)
        return GOOD

    def _find_evidence(self, words: memoryview, at: int, stop: int) -> int:
        # Of keys of the first set, that this is a leaf: one that could not be a pointer to a node.  Mostly the first.
        while at < stop and not self.is_leaf:
            high, ptr = words[at], words[at + 2]
            if high >> 36 & 1 or high >> 20 & 0xFFFF != self.node_sectors or ptr & self.in_bucket:
                self.is_leaf = 1
            at += 3
        return 1

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

    def _postpone(self, head: int, tail: int, what: int) -> int:
        # A key with another generation than its bucket's: 2, and 1 more if it is dirty.
        odd, at = self.odd, 3 * self.nodd
        odd[at], odd[at + 1], odd[at + 2] = head, tail, what
        self.nodd += 1
        return 1

    def _settle(self) -> int:
        # Keys with other generations than their buckets'; 0 if one is too old, or dirty data was reused.
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

    def _judge_odd(self) -> int:
        # The runs that `_settle` would judge, which wait.
        for index in range(self.nodd):
            if not self._judge(self.odd[3 * index]):
                return 0
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
            if behind and self.is_counting:
                if behind > self.gen_max and behind <= self.behind_max:
                    return 0
                self._postpone(ptr, ptr + ((end - start) << 8), 2 | kind >> 1)
            elif behind and behind <= self.behind_max:
                if behind > self.gen_max or kind > 1:
                    return 0
                continue
            else:
                self.taken_words[self.ntaken] = ptr >> 8 << 21 | (end - start)
                self.ntaken += 1
            self.extents += 1
            self.sectors += end - start
            if kind > 1 and self._note((end - 1) >> 44, end - start, start, end) != GOOD:
                return 0
        return 1

    def _note(self, inode: int, sectors: int, start: int, end: int) -> int:
        # Dirty data of a volume.
        self.dirty_sectors += sectors
        count = add_spread(self.spread_words, self.nspreads, self.spreads_max, inode, sectors, start, end)
        if count < 0:
            return DOUBTFUL
        self.nspreads = count
        return GOOD


def spreads_in(view: memoryview) -> list[tuple[int, int, int, int]]:
    """Rows of spreads, as tuples."""
    words = view.tolist()
    return [(words[at], words[at + 1], words[at + 2], words[at + 3]) for at in range(0, len(words), SPREAD_WORDS)]


def add_spread(words: memoryview, count: int, limit: int, inode: int, sectors: int, start: int, end: int) -> int:
    """Add dirty data of a volume to ``count`` spreads; how many there are then, -1 if that would be above ``limit``."""
    for at in range(0, 4 * count, 4):
        if words[at] == inode:
            words[at + 1] += sectors
            if start < words[at + 2]:
                words[at + 2] = start
            if end > words[at + 3]:
                words[at + 3] = end
            return count
    if count == limit:
        return -1
    at = 4 * count
    words[at], words[at + 1], words[at + 2], words[at + 3] = inode, sectors, start, end
    return count + 1


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
