# SPDX-License-Identifier: GPL-2.0-only
# cython: wraparound=False
"""`CountingScan`: what all leaves of a set hold together, added up leaf by leaf.

It keeps no more of the leaves that were counted than sums, and a bit for each block that is taken
(`CountingScan._keep`).  It takes the generations that it has for those that buckets have in the end.  Keys with others
wait, as if they were live, for `CountingScan.settle`, which knows them all.

Leaves are counted by the piece.  Where the checksum can be made without the interpreter (`bcachectl.fsck.fast_crc`),
`CountingScan.read_and_count` does all of it, one leaf after the other in the same memory, which stays in the
processor's cache.  Otherwise the caller makes the checksums between `CountingScan.stage` and `CountingScan.count`.
Other threads run meanwhile; each time that two of them want the interpreter at once, one sleeps for as long as a leaf
takes, so what is asked of it must be little and seldom.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bcachectl.fsck.scan import IS_COMPILED, RUN_WORDS, SPREAD_WORDS, Scan, room, spreads_in
from bcachectl.ondisk.bset import BSET_VERSION
from bcachectl.ondisk.geometry import Geometry
from bcachectl.ondisk.validity import BUCKET_GC_GEN_MAX

try:
    import cython
except ImportError:
    from bcachectl import plain as cython

if not cython.compiled:
    from bcachectl.fsck.fill import crc_words, fill_words
    from bcachectl.fsck.scan import DOUBTFUL, GOOD, add_spread

ALL_SPREADS_MAX = 64
"""Volumes with dirty data in all leaves together."""
LATE_MAX = 1 << 20
"""Runs that can wait for `CountingScan.settle`."""
PIECE_BYTES, PIECE_LEAVES_MAX = 4 << 20, 64
"""The most that is counted at once."""
CLAIM_BYTES_MAX = 32 << 20
"""For the bits of all blocks; where they need more, leaves are not counted together."""
COUNTED_BEHIND_MAX = BUCKET_GC_GEN_MAX // 2
"""So far behind its bucket a pointer may be in a leaf that is counted; if generations rise by no more than this
afterwards, none of them is too far behind in the end."""

_SEED, _SETS, _MARKS_END, _DOUBTFUL_BLOCK, _STAGED_WORDS = 3, 4, 5, 6, 7
"""Of a leaf that waits: its sector, start, end, raw pointer, how many sets, where its marks end, doubtful block; then
its log."""
_ALL_BITS, _LOW_HALF = (1 << 64) - 1, (1 << 32) - 1


class CountingScan(Scan):
    """A `Scan` that adds up leaves of nodes with ``magic``.  After `settle` the sums stand in the attributes."""

    def __init__(self, geometry: Geometry, gens: npt.NDArray[np.uint8], journal: npt.NDArray[np.uint64], magic: int,
                 crc: int) -> None:
        """``crc`` is `bcachectl.fsck.fast_crc.crc64_address`; without it, compiled code makes no checksums."""
        super().__init__(geometry, gens, journal)
        self.magic, self.version, self.crc = magic, BSET_VERSION, crc
        self.can_check = crc != 0 or not IS_COMPILED
        self.block_words, self.node_blocks = geometry.block_bytes // 8, geometry.node_bytes // geometry.block_bytes
        self.block_shift, self.in_block = geometry.block_size_sectors.bit_length() - 1, geometry.block_size_sectors - 1
        self.all_spreads_max, self.head_words, self.last_doubtful = ALL_SPREADS_MAX, room(2), 0

        blocks = geometry.nbuckets * geometry.bucket_size_sectors >> self.block_shift
        self.can_count = blocks // 8 < CLAIM_BYTES_MAX and not geometry.block_size_sectors & self.in_block
        self.is_unsure = self.is_begun = 0
        leaf_words = geometry.node_bytes // 8
        nleaves = min(max(PIECE_BYTES // geometry.node_bytes, 1), PIECE_LEAVES_MAX) if self.can_count else 0
        piece = room(leaf_words * nleaves)
        self.leaf_words, self.piece_words = leaf_words, piece
        self.mark_words = room(len(self.mark_words) * max(nleaves, 1))
        self.buffers = [piece[number * leaf_words:(number + 1) * leaf_words].cast("B") for number in range(nleaves)]
        """Room for the leaves of a piece."""
        self.staged_size = _STAGED_WORDS + 2 * self.node_blocks + 2
        self.staged_words = room(self.staged_size * nleaves)
        self.claims = np.zeros(blocks // 64 + 1 if self.can_count else 0, np.uint64)
        self.claim_words = self.claims.data
        self.late, self.late_max = room(RUN_WORDS * LATE_MAX if self.can_count else 0), LATE_MAX
        self.all_spread_words = room(SPREAD_WORDS * ALL_SPREADS_MAX)
        self.nlate = self.nall_spreads = 0
        self.all_extents = self.all_dirty_sectors = self.all_sectors = 0

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
        return done == GOOD and not self.is_unsure

    def claim(self, runs: npt.NDArray[np.uint64]) -> bool:
        """Take the blocks of runs, as `bcachectl.fsck.tally.Tally.taken` has them; False if some are taken already."""
        for run in runs.tolist():
            self._claim(run >> 21, run & 0x1FFFFF)
        return not self.is_unsure

    def all_spreads(self) -> list[tuple[int, int, int, int]]:
        """`spreads` of all leaves that were counted."""
        return spreads_in(memoryview(self.all_spread_words)[:SPREAD_WORDS * self.nall_spreads])

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
        if done != GOOD or self._keep() != GOOD:
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

    # What is kept.

    def _keep(self) -> int:
        # The leaf that was scanned is added to what was counted; `DOUBTFUL` if there is no room for it.
        if self.nlate + self.nodd > self.late_max or self.nall_spreads + self.nspreads > self.all_spreads_max:
            return DOUBTFUL
        for index in range(3 * self.nodd):
            self.late[3 * self.nlate + index] = self.odd[index]
        self.nlate += self.nodd
        self._claim_taken()
        for index in range(0, 4 * self.nspreads, 4):
            self.nall_spreads = add_spread(
                self.all_spread_words, self.nall_spreads, self.all_spreads_max, self.spread_words[index],
                self.spread_words[index + 1], self.spread_words[index + 2], self.spread_words[index + 3])
        self.all_extents += self.extents
        self.all_sectors += self.sectors
        self.all_dirty_sectors += self.dirty_sectors
        return GOOD

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
                return DOUBTFUL
            self.all_extents -= length >> 1
            self.all_sectors -= (tail - head) >> 8
        return GOOD
