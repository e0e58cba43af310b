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

`Scan.leaf` gives what one leaf holds, with the generations as they are.  `Scan.count` adds leaves to what all leaves
hold that were counted before, and keeps no more of them than sums, and a bit for each block that is taken
(`Scan._keep`).  It takes the generations that it has for those that buckets have in the end.  Keys with others wait, as
if they were live, for `Scan.settle`, which knows them all.

Leaves are counted by the piece.  Where the checksum can be made without the interpreter (`bcachectl.fsck.fast_crc`),
`Scan.read_and_count` does all of it, one leaf after the other in the same memory, which stays in the processor's cache.
Otherwise the caller makes the checksums between `Scan.stage` and `Scan.count`.  Other threads run meanwhile; each time
that two of them want the interpreter at once, one sleeps for as long as a leaf takes, so what is asked of it must be
little and seldom.

Rows stand in arrays of words, four each: start, end, pointer to the first sector, kind.  The kind of what only hides
others is 0, of clean data 1, of dirty data 3.

Numbers have 64 bits when compiled: none may be negative or become larger, unless a later check declines the leaf.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bcachectl.fsck.extents import Extents
from bcachectl.ondisk.bkey import HIGH_ONE, KEY_DIRTY, KEY_PTRS, KEY_SIZE, PTR_DEV
from bcachectl.ondisk.bset import BSET_VERSION
from bcachectl.ondisk.geometry import Geometry
from bcachectl.ondisk.validity import BUCKET_GC_GEN_MAX

try:
    import cython
except ImportError:
    from bcachectl import plain as cython

if not cython.compiled:
    from bcachectl.fsck.fill import crc_words, fill_words

IS_COMPILED: bool = cython.compiled

JOURNAL_ROWS_MAX = 4096
"""Rows of the journal in one leaf; more are left to the columns."""
SPREADS_MAX = 16
"""Volumes with dirty data in one leaf."""
ALL_SPREADS_MAX = 64
"""Volumes with dirty data in all leaves that are counted together."""
LATE_MAX = 1 << 20
"""Runs that can wait for `Scan.settle`."""
PIECE_BYTES, PIECE_LEAVES_MAX = 4 << 20, 64
"""The most that is counted at once."""
CLAIM_BYTES_MAX = 32 << 20
"""For the bits of all blocks; where they need more, leaves are not counted together."""
COUNTED_BEHIND_MAX = BUCKET_GC_GEN_MAX // 2
"""So far behind its bucket a pointer may be in a leaf that is counted; if generations rise by no more than this
afterwards, none of them is too far behind in the end."""

_ROW_WORDS, _RUN_WORDS, _SPREAD_WORDS = 4, 3, 4
_SEED, _SETS, _MARKS_END, _DOUBTFUL_BLOCK, _STAGED_WORDS = 3, 4, 5, 6, 7
"""Of a leaf that waits: its sector, start, end, raw pointer, how many sets, where its marks end, doubtful block; then
its log."""
_BEHIND_MAX = 128
_GOOD, _DOUBTFUL, _OTHER_FORM = 1, 0, -1
_ALL_BITS, _LOW_HALF = (1 << 64) - 1, (1 << 32) - 1


def _room(words: int) -> memoryview:
    # Memory that is not there before it is used.
    return np.empty(words, np.uint64).data


def rows_of(extents: Extents) -> npt.NDArray[np.uint64]:
    """The map as `Scan` has it."""
    is_data = (extents.nptrs > 0) & (PTR_DEV.get(extents.ptr) == 0)
    kind = np.where(is_data, 1 + 2 * extents.dirty.astype(np.uint64), np.uint64(0))
    return np.stack([extents.start, extents.end, extents.ptr, kind], 1).astype(np.uint64).ravel()


class Scan:
    """Scans leaves of ``geometry.node_sectors``, one after the other, with the generations in ``gens``.

    After `leaf` its results stand in the attributes, after `settle` those of all leaves that were counted.
    ``journal`` are the `rows_of` a flat map without keys that no kernel accepts, ``magic`` that of the set's nodes.
    """

    def __init__(self, geometry: Geometry, gens: npt.NDArray[np.uint8], journal: npt.NDArray[np.uint64],
                 magic: int = 0, crc: int = 0) -> None:
        """``crc`` is `bcachectl.fsck.fast_crc.crc64_address`; without it, compiled code makes no checksums."""
        bucket_sectors = geometry.bucket_size_sectors
        self.gens = gens.data
        self.magic, self.version, self.crc = magic, BSET_VERSION, crc
        self.can_check = crc != 0 or not IS_COMPILED
        self.node_sectors, self.block_words = geometry.node_sectors, geometry.block_bytes // 8
        self.node_blocks = geometry.node_bytes // geometry.block_bytes
        self.block_shift, self.in_block = geometry.block_size_sectors.bit_length() - 1, geometry.block_size_sectors - 1
        self.shift = 8 + geometry.bucket_shift
        self.in_bucket = (bucket_sectors - 1) << 8
        self.bucket_end = bucket_sectors << 8
        self.ptr_min = geometry.first_bucket * bucket_sectors << 8
        self.ptr_limit = min(geometry.nbuckets * bucket_sectors << 8, 1 << PTR_DEV.offset)
        self.gen_max, self.behind_max = BUCKET_GC_GEN_MAX, _BEHIND_MAX
        self.journal_rows_max, self.spreads_max, self.all_spreads_max = JOURNAL_ROWS_MAX, SPREADS_MAX, ALL_SPREADS_MAX
        self.form, self.varying = HIGH_ONE | 1 << KEY_PTRS.offset, KEY_SIZE.mask | KEY_DIRTY.mask
        self.place_start = self.place_end = 0

        self.journal_rows, self.journal = len(journal) // _ROW_WORDS, journal.data

        # A key has two words at least.  Where one row lies over another, there may be two more than before.
        rows = geometry.node_bytes // 8 + 2 * JOURNAL_ROWS_MAX + 16
        self.rows, self.others = _room(_ROW_WORDS * rows), _room(_ROW_WORDS * rows)
        self.cuts = _room(_ROW_WORDS * 2 * rows)
        self.odd = _room(_RUN_WORDS * rows)
        self.spread_words = _room(_SPREAD_WORDS * SPREADS_MAX)
        self.taken_words = _room(4 * rows)
        self.log_words, self.head_words = _room(2 * self.node_blocks + 2), _room(2)
        self.first_mark = self.last_doubtful = 0
        self.is_leaf = self.nsets = self.nodd = self.ncuts = self.nspreads = self.ntaken = self.nmarks = 0
        self.extents = self.dirty_sectors = self.sectors = 0

        # What all leaves that are counted hold together.
        blocks = geometry.nbuckets * bucket_sectors >> self.block_shift
        self.can_count = blocks // 8 < CLAIM_BYTES_MAX and not geometry.block_size_sectors & self.in_block
        self.is_counting = self.is_unsure = self.is_begun = 0
        leaf_words = geometry.node_bytes // 8
        nleaves = min(max(PIECE_BYTES // geometry.node_bytes, 1), PIECE_LEAVES_MAX) if self.can_count else 0
        piece = _room(leaf_words * nleaves)
        self.leaf_words, self.piece_words, self.mark_words = leaf_words, piece, _room(2 * rows * max(nleaves, 1))
        self.buffers = [piece[number * leaf_words:(number + 1) * leaf_words].cast("B") for number in range(nleaves)]
        """Room for the leaves of a piece."""
        self.staged_size = _STAGED_WORDS + 2 * self.node_blocks + 2
        self.staged_words = _room(self.staged_size * nleaves)
        self.claims = np.zeros(blocks // 64 + 1 if self.can_count else 0, np.uint64)
        self.claim_words = self.claims.data
        self.late, self.late_max = _room(_RUN_WORDS * LATE_MAX if self.can_count else 0), LATE_MAX
        self.all_spread_words = _room(_SPREAD_WORDS * ALL_SPREADS_MAX)
        self.nlate = self.nall_spreads = 0
        self.all_extents = self.all_dirty_sectors = self.all_sectors = 0

    def leaf(self, words: memoryview, log: list[tuple[int, int]], start: int, end: int) -> bool:
        """Whether it is known what the leaf holds whose sets' keys stand at ``log`` (first word, how many)."""
        log_words = memoryview(self.log_words)
        for index, (at, length) in enumerate(log):
            log_words[2 * index], log_words[2 * index + 1] = at, length
        self.is_counting, self.gen_max, self.nsets, self.first_mark = 0, BUCKET_GC_GEN_MAX, len(log), 0
        with cython.nogil:
            done = self._leaf(words, start, end)
        return done == _GOOD

    def read_and_count(self, fd: int, leaves: Sequence[tuple[int, int, int, int]]) -> list[bool]:
        """`stage` and `count` of leaves that ``fd`` has, checksums and all; only if `can_check`."""
        self._wait(leaves)
        self.is_counting, self.gen_max = 1, COUNTED_BEHIND_MAX
        nleaves = len(leaves)
        with cython.nogil:
            self._read_and_count(fd, nleaves)
        return self._counted(nleaves)

    def stage(self, fd: int, leaves: Sequence[tuple[int, int, int, int]]) -> list[list[tuple[int, int]] | None]:
        """Leaves (sector, start, end, raw pointer) wait for `count`: those read there from ``fd``, or if that is -1
        those in the first of `buffers`; none at sector 0.

        Gives for each the keys of each set, oldest first, as the index of their first word and how many words; empty if
        anything is wrong, None if it could not be read.  What takes a checksum to tell is for the caller to look at:
        those of the sets, and whether at `doubtful_block`, if that is not 0, there is a set of the node whose number is
        wrong.
        """
        staged, size, nleaves, found = memoryview(self.staged_words), self.staged_size, len(leaves), []
        self._wait(leaves)
        with cython.nogil:
            self._stage(fd, nleaves)
        for at in range(0, size * nleaves, size):
            log = staged[at + _STAGED_WORDS:at + _STAGED_WORDS + 2 * staged[at + _SETS]].tolist()
            found.append(list(zip(log[::2], log[1::2], strict=True)) if staged[at] else None)
        return found

    def doubtful_block(self, number: int) -> int:
        """Of a leaf that waits."""
        return self.staged_words[self.staged_size * number + _DOUBTFUL_BLOCK]

    def drop(self, number: int) -> None:
        """That leaf does not wait any more."""
        self.staged_words[self.staged_size * number + _SETS] = 0

    def count(self, nleaves: int) -> list[bool]:
        """`leaf` for each that waits, and if it is known, it is added to what the leaves before it hold."""
        self.is_counting, self.gen_max = 1, COUNTED_BEHIND_MAX
        with cython.nogil:
            self._piece(nleaves)
        return self._counted(nleaves)

    def marks_of(self, number: int) -> bytes:
        """The words of `bcachectl.fsck.tally.Tally.marks` of a leaf that was counted."""
        staged, at = memoryview(self.staged_words), self.staged_size * number
        first = staged[at - self.staged_size + _MARKS_END] if number else 0
        return bytes(memoryview(self.mark_words)[first:staged[at + _MARKS_END]])

    def settle(self, gens: npt.NDArray[np.uint8]) -> bool:
        """Judge the runs that have waited by the generations that buckets have in the end.

        False if that makes more than counting of it: then what was counted is not to be used.
        """
        self.gens, self.gen_max, self.is_counting = gens.data, COUNTED_BEHIND_MAX, 0
        with cython.nogil:
            done = self._judge_late()
        return done == _GOOD and not self.is_unsure

    def claim(self, runs: npt.NDArray[np.uint64]) -> bool:
        """Take the blocks of runs, as `bcachectl.fsck.tally.Tally.taken` has them; False if some are taken already."""
        for run in runs.tolist():
            self._claim(run >> 21, run & 0x1FFFFF)
        return not self.is_unsure

    def taken(self) -> bytes:
        """The words of `bcachectl.fsck.tally.Tally.taken`."""
        return bytes(memoryview(self.taken_words)[:self.ntaken])

    def marks(self) -> bytes:
        """The words of `bcachectl.fsck.tally.Tally.marks`."""
        return bytes(memoryview(self.mark_words)[:self.nmarks])

    def spreads(self) -> list[tuple[int, int, int, int]]:
        """Dirty data of each volume in the last leaf: its device number, sectors, start, end."""
        return _spreads_in(memoryview(self.spread_words)[:_SPREAD_WORDS * self.nspreads])

    def all_spreads(self) -> list[tuple[int, int, int, int]]:
        """`spreads` of all leaves that were counted."""
        return _spreads_in(memoryview(self.all_spread_words)[:_SPREAD_WORDS * self.nall_spreads])

    def _wait(self, leaves: Sequence[tuple[int, int, int, int]]) -> None:
        staged, at = memoryview(self.staged_words), 0
        for leaf in leaves:
            staged[at], staged[at + 1], staged[at + 2], staged[at + _SEED] = leaf
            at += self.staged_size

    def _counted(self, nleaves: int) -> list[bool]:
        staged = memoryview(self.staged_words)
        return [staged[at + _SETS] > 0 for at in range(0, self.staged_size * nleaves, self.staged_size)]

    def _read_and_count(self, fd: int, nleaves: int) -> int:
        # Each in the place of the first.
        staged, words, claims = self.staged_words, self.piece_words[:self.leaf_words], self.claim_words
        self.nmarks = 0
        if not self.is_begun:
            # Written, not only asked for: else the first look at a page and the first bit in it are two faults.
            self.is_begun = 1
            for index in range(len(claims)):
                claims[index] = 0
        for number in range(nleaves):
            at = self.staged_size * number
            staged[at + _SETS] = 0
            if staged[at] and fill_words(fd, words, staged[at] << 9):
                self.nsets = self._log(words)
                if self.nsets and self._is_sound(words, staged[at + _SEED]):
                    staged[at + _SETS] = self.nsets
                    self._add_leaf(words, at)
            staged[at + _MARKS_END] = self.nmarks
        return 1

    def _is_sound(self, words: memoryview, seed: int) -> int:
        # By the checksums of the sets in ``log_words``, and of one behind them that would be of this node if its number
        # were right.
        seed ^= _ALL_BITS
        for index in range(self.nsets):
            at, length = self.log_words[2 * index], self.log_words[2 * index + 1]
            if crc_words(self.crc, words, at - 3, at + length, seed) != words[at - 4]:
                return 0
        if not self.last_doubtful:
            return 1
        at = self.last_doubtful * self.block_words
        length, version = words[at + 3] >> 32, words[at + 3] & _LOW_HALF
        if not length or version > self.version or at + 4 + length > self.leaf_words:
            return 1
        self.head_words[0], self.head_words[1] = self.magic, words[2]
        begun = crc_words(self.crc, self.head_words, 0, 2, seed if version else 0)
        return crc_words(self.crc, words, at + 3, at + 4 + length, begun) != words[at]

    def _stage(self, fd: int, nleaves: int) -> int:
        staged, log_words = self.staged_words, self.log_words
        for number in range(nleaves):
            at, first = self.staged_size * number, self.leaf_words * number
            staged[at + _SETS] = staged[at + _DOUBTFUL_BLOCK] = 0
            if staged[at] and fd >= 0 and not fill_words(fd, self.piece_words[first:first + self.leaf_words],
                                                         staged[at] << 9):
                staged[at] = 0
            if staged[at]:
                nsets = self._log(self.piece_words[first:first + self.leaf_words])
                staged[at + _SETS], staged[at + _DOUBTFUL_BLOCK] = nsets, self.last_doubtful
                for index in range(2 * nsets):
                    staged[at + _STAGED_WORDS + index] = log_words[index]
        return 1

    def _piece(self, nleaves: int) -> int:
        # The leaves that wait.  Those that are not counted have no sets then.
        staged, log_words = self.staged_words, self.log_words
        self.nmarks = 0
        for number in range(nleaves):
            at, first = self.staged_size * number, self.leaf_words * number
            self.nsets = staged[at + _SETS]
            if self.nsets:
                for index in range(2 * self.nsets):
                    log_words[index] = staged[at + _STAGED_WORDS + index]
                self._add_leaf(self.piece_words[first:first + self.leaf_words], at)
            staged[at + _MARKS_END] = self.nmarks
        return 1

    def _add_leaf(self, words: memoryview, at: int) -> int:
        # The leaf that waits at that word, whose sets are in ``log_words``; if it is not known it has none then.
        self.first_mark = self.nmarks
        done = self._leaf(words, self.staged_words[at + 1], self.staged_words[at + 2])
        if done != _GOOD or self._keep() != _GOOD:
            self.nmarks, self.staged_words[at + _SETS] = self.first_mark, 0
        return 1

    def _log(self, words: memoryview) -> int:
        # The sets in ``log_words``, and how many they are.
        count = block = 0
        block_words, node_blocks = self.block_words, self.node_blocks
        seq = words[2]
        while block < node_blocks:
            at = block * block_words
            if words[at + 2] != seq:
                break
            length = words[at + 3] >> 32
            blocks = (4 + length + block_words - 1) // block_words
            if not seq or words[at + 3] & _LOW_HALF != self.version or words[at + 1] != self.magic:
                return 0
            if (count and not length) or block + blocks > node_blocks:
                return 0
            self.log_words[2 * count], self.log_words[2 * count + 1] = at + 4, length
            count += 1
            block += blocks
        self.last_doubtful = block if block < node_blocks and words[block * block_words + 1] == self.magic else 0
        while block < node_blocks:
            if words[block * block_words + 2] == seq:
                return 0
            block += 1
        return count

    def _leaf(self, words: memoryview, start: int, end: int) -> int:
        done: int = self._in_form(words, start, end, 1)
        return self._in_form(words, start, end, 0) if done == _OTHER_FORM else done

    def _in_form(self, words: memoryview, start: int, end: int, has_base: int) -> int:
        self.place_start, self.place_end, self.nmarks = start, end, self.first_mark
        self.is_leaf = self.nodd = self.ncuts = self.nspreads = self.ntaken = 0
        self.extents = self.dirty_sectors = self.sectors = 0
        count = 0
        for index in range(has_base, self.nsets):
            at = self.log_words[2 * index]
            over = self._decode(words, at, at + self.log_words[2 * index + 1], self.cuts)
            if over < 0:
                return _DOUBTFUL
            count = self._over(over, count)
        over = self._with_journal()
        if over < 0:
            return _DOUBTFUL
        count = self._over(over, count)
        if has_base:
            at = self.log_words[0]
            done: int = self._base(words, at, at + self.log_words[1], count)
            if done != _GOOD:
                return done
        if not self.is_leaf or not (self._judge_odd() if self.is_counting else self._settle()):
            return _DOUBTFUL
        if not self._count(self.rows, count):
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
            return _OTHER_FORM
        if at < 0 or stop > len(words) or 4 * count > len(self.rows) or stop - at > len(self.taken_words):
            return _DOUBTFUL
        rows, taken, gens, shift = self.rows, self.taken_words, self.gens, self.shift
        ptr_min, ptr_limit, in_bucket, bucket_end = self.ptr_min, self.ptr_limit, self.in_bucket, self.bucket_end
        inode = words[at] & 0xFFFFF
        form, fixed, offset = self.form | inode, ~self.varying & _ALL_BITS, inode << 44
        last = offset if offset > self.place_start else self.place_start
        # Up to here, no key touches a row.
        row, untouched_end = 0, rows[0] if count else self.place_end
        extents = (stop - at) // 3
        head = tail = ntaken = seen = sectors = dirty_sectors = dirty_start = dirty_end = 0
        if inode == 0xFFFFF:
            return _OTHER_FORM
        self._find_evidence(words, at, stop)
        while at < stop:
            high, low, ptr = words[at], words[at + 1], words[at + 2]
            at += 3
            size, dirty = high >> 20 & 0xFFFF, high >> 36 & 1
            pos = offset | low
            if (high ^ form) & fixed or low >> 44 or not size:
                return _OTHER_FORM
            if pos < last + size:
                return _DOUBTFUL
            last = pos
            if pos > untouched_end:
                while row < count and rows[4 * row + 1] <= pos - size:
                    row += 1
                untouched_end = rows[4 * row] if row < count else self.place_end
                if row < count and pos > untouched_end:
                    if ptr < ptr_min or ptr >= ptr_limit:
                        return _OTHER_FORM
                    if not self._cut(pos - size, pos, ptr, dirty, row, count):
                        return _DOUBTFUL
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
                    return _DOUBTFUL
                continue
            if ptr < ptr_min or ptr >= ptr_limit:
                return _OTHER_FORM
            if (ptr & in_bucket) + (size << 8) > bucket_end:
                return _DOUBTFUL
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
            return _DOUBTFUL
        if tail:
            taken[ntaken] = head >> 8 << 21 | (tail - head) >> 8
            ntaken += 1
            sectors += (tail - head) >> 8
        self.extents, self.sectors, self.ntaken = extents, sectors, ntaken
        if dirty_sectors:
            return self._note(inode, dirty_sectors, dirty_start, dirty_end)
        return _GOOD

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
        if self.nspreads == self.spreads_max:
            return _DOUBTFUL
        at = 4 * self.nspreads
        words[at], words[at + 1], words[at + 2], words[at + 3] = inode, sectors, start, end
        self.nspreads += 1
        return _GOOD

    # All leaves together.

    def _keep(self) -> int:
        # The leaf that was scanned is added to what was counted; `_DOUBTFUL` if there is no room for it.
        if self.nlate + self.nodd > self.late_max or self.nall_spreads + self.nspreads > self.all_spreads_max:
            return _DOUBTFUL
        for index in range(3 * self.nodd):
            self.late[3 * self.nlate + index] = self.odd[index]
        self.nlate += self.nodd
        self._claim_taken()
        for index in range(0, 4 * self.nspreads, 4):
            self._add_spread(self.spread_words[index], self.spread_words[index + 1], self.spread_words[index + 2],
                             self.spread_words[index + 3])
        self.all_extents += self.extents
        self.all_sectors += self.sectors
        self.all_dirty_sectors += self.dirty_sectors
        return _GOOD

    @cython.boundscheck(False)  # type: ignore[untyped-decorator]
    def _claim_taken(self) -> int:
        # Most runs are one block.  They end before the device does, and the device before the bits.
        taken, claims = self.taken_words, self.claim_words
        block_shift, block_sectors = self.block_shift, self.in_block + 1
        in_block, one, is_twice = self.in_block, 1, 0
        for index in range(self.ntaken):
            sector, length = taken[index] >> 21, taken[index] & 0x1FFFFF
            if length != block_sectors or sector & in_block:
                self._claim(sector, length)
                continue
            block = sector >> block_shift
            bit = one << (block & 63)
            is_twice |= claims[block >> 6] & bit
            claims[block >> 6] |= bit
        if is_twice:
            self.is_unsure = 1
        return 1

    def _claim(self, sector: int, length: int) -> int:
        # The blocks of a run.  Where it does not consist of whole blocks, bits do not tell who shares one.
        claims = self.claim_words
        if (sector | length) & self.in_block:
            self.is_unsure = 1
        block, last = sector >> self.block_shift, (sector + length - 1) >> self.block_shift
        while block <= last:
            first = block & 63
            count = last + 1 - block if last >> 6 == block >> 6 else 64 - first
            bits = _ALL_BITS >> (64 - count) << first
            if claims[block >> 6] & bits:
                self.is_unsure = 1
            claims[block >> 6] |= bits
            block += count
        return 1

    def _add_spread(self, inode: int, sectors: int, start: int, end: int) -> int:
        words = self.all_spread_words
        for at in range(0, 4 * self.nall_spreads, 4):
            if words[at] == inode:
                words[at + 1] += sectors
                if start < words[at + 2]:
                    words[at + 2] = start
                if end > words[at + 3]:
                    words[at + 3] = end
                return 1
        at = 4 * self.nall_spreads
        words[at], words[at + 1], words[at + 2], words[at + 3] = inode, sectors, start, end
        self.nall_spreads += 1
        return 1

    def _judge_late(self) -> int:
        # Dirty data that was reused is for others to report, and so is a pointer from the future.
        late = self.late
        for index in range(self.nlate):
            head, tail, length = late[3 * index], late[3 * index + 1], late[3 * index + 2]
            behind = (self.gens[head >> self.shift] - head) & 0xFF
            if not behind:
                self._claim(head >> 8, (tail - head) >> 8)
                continue
            if behind > self.behind_max or length & 1:
                return _DOUBTFUL
            self.all_extents -= length >> 1
            self.all_sectors -= (tail - head) >> 8
        return _GOOD


def _spreads_in(view: memoryview) -> list[tuple[int, int, int, int]]:
    words = view.tolist()
    return [(words[at], words[at + 1], words[at + 2], words[at + 3]) for at in range(0, len(words), _SPREAD_WORDS)]


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
