# SPDX-License-Identifier: GPL-2.0-only
"""`Tallier`: what a leaf holds, counted in whole columns; it declines every leaf that is not beyond doubt.

Nearly all leaves of nearly all sets are *plain*: every set has a good checksum and keys in order, every key lies in the
range of its leaf and points into one bucket.  `Tallier.tally` reads such a leaf once and gives a `Tally`; no object is
made for a key.  For anything else, and for anything rare, it gives None, and the caller asks `Walk` and
`bcachectl.fsck.salvage` instead, which know what to say about it.  So this file never makes a finding, and must decline
whenever those would make one.

1. The log: headers, checksums, nothing of the node's own behind its end (`Tallier.log`).
2. The first set, which holds most keys of most leaves, usually has keys of three words and of one volume; its columns
   are checked in a few passes (`Tallier.base`).  All other sets, and the journal, become one small map.
3. Rows of the first set that the map touches are cut as `bcachectl.fsck.extents` has it; all others are only counted.
4. Rows that follow each other on the cache device, in one bucket, are one *run*.  Generations are looked up by run, and
   the runs (`Tally.taken`) are what is kept, to see whether two extents use the same sectors.

Where `bcachectl.fsck.scan` is compiled, it is asked first, and does 2 to 4 at once.  It declines more than this does.
It can also add leaves up, so that nothing is kept of each of them (`Tallier.count`).

A tally holds for the generations it was made with.  `Tally.marks` are the pointers whose generation is another than
their bucket's, in order; if they, or whatever comes later, raise a generation, the leaf has to be tallied again.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bcachectl.errors import BcachectlError, Corrupt
from bcachectl.fsck import extents as extent
from bcachectl.fsck.counting import CountingScan
from bcachectl.fsck.extents import GEN_BITS, U64, Extents
from bcachectl.fsck.fast_crc import crc64_address
from bcachectl.fsck.scan import IS_COMPILED, Scan, rows_of
from bcachectl.ondisk import validity
from bcachectl.ondisk.bkey import (
    HIGH_ONE,
    INODE_SHIFT,
    KEY_DIRTY,
    KEY_PTRS,
    KEY_SIZE,
    KEY_SIZE_MAX,
    MAX_INODE,
    PTR_DEV,
    SECTOR_MASK,
    SHORTEST_KEY_WORDS,
    KeyColumns,
    decode_key_columns,
)
from bcachectl.ondisk.bset import BSET_HEADER_BYTES, BSET_VERSION
from bcachectl.ondisk.crc64 import crc64, crc64_seeded
from bcachectl.ondisk.geometry import Geometry

RUN_BITS = 21
"""Low bits of a word of `Tally.taken` that are the length of the run in sectors; the sector stands above."""
RUN_MASK = (1 << RUN_BITS) - 1

_HEADER = struct.Struct("<QQQII")
_HEAD = struct.Struct("<QQ")
_SEQ_WORD, _SEQ_END = 2, 24
_KEY_WORDS = 3
_ONE_POINTER = HIGH_ONE | 1 << KEY_PTRS.offset
_VARIES = KEY_SIZE.mask | KEY_DIRTY.mask
_BEHIND_MAX = 128
_SIZE_SHIFT, _SIZE_WIDTH, _SIZE_MASK = np.uint64(KEY_SIZE.offset), np.uint64(KEY_SIZE.size), np.uint64(KEY_SIZE_MAX)
_GEN_SHIFT, _RUN_SHIFT = np.uint64(GEN_BITS), np.uint64(RUN_BITS)
_NONE: U64 = np.zeros(0, np.uint64)
_ZERO = np.zeros(1, np.intp)
_ALL_ONES = (1 << 64) - 1
_CSUM_WORDS = BSET_HEADER_BYTES // 8 - 1
"""A checksum covers the header behind itself as well."""


class Spread(NamedTuple):
    """Dirty data of one volume: sectors of it, and the positions between which it lies."""

    sectors: int
    start: int
    end: int

    def joined(self, other: Spread) -> Spread:
        """Both of one volume together."""
        return Spread(self.sectors + other.sectors, min(self.start, other.start), max(self.end, other.end))


class Place(NamedTuple):
    """A leaf: its first sector, the raw pointer to it, its length, and the positions it covers."""

    sector: int
    seed: int
    nsectors: int
    start: int
    end: int


class Tally(NamedTuple):
    """What is live in a leaf with the journal on top: extents, sectors, dirty data by device number."""

    extents: int
    dirty_sectors: int
    clean_sectors: int
    dirty: dict[int, Spread]
    taken: U64
    marks: U64


class _Rows(NamedTuple):
    # Extents with data, in order: their ends less ``offset``, sectors, pointers; 1 for dirty ones, None if none is.
    offset: int
    end: U64
    size: U64
    ptr: U64
    dirty: U64 | None

    def take(self, rows: npt.NDArray[np.bool_]) -> _Rows:
        return _Rows(self.offset, self.end[rows], self.size[rows], self.ptr[rows],
                     None if self.dirty is None else self.dirty[rows])

    def as_extents(self) -> Extents:
        end = self.end + np.uint64(self.offset)
        count = len(end)
        dirty = np.zeros(count, np.bool_) if self.dirty is None else self.dirty != 0
        return Extents(end - self.size, end, dirty, np.ones(count, np.uint8), self.ptr, np.zeros(count, np.uint8))


class _Runs(NamedTuple):
    # Runs of rows: their first rows, and their pointers from the first to behind the last sector.  ``behind`` is how
    # many generations each is behind its bucket, modulo 256; None if none is.
    heads: npt.NDArray[np.intp]
    ptr: U64
    end: U64
    behind: npt.NDArray[np.uint8] | None


class Tallier:
    """Tallies the leaves of one cache device with the generations in ``gens`` and the keys of the journal."""

    def __init__(self, read: Callable[[int, int], bytes], geometry: Geometry, magic: int, gens: npt.NDArray[np.uint8],
                 journal: Extents, fd: int = -1, rows: U64 | None = None) -> None:
        """``gens`` must know every bucket; ``journal`` is a flat map without keys that no kernel accepts, or pointers
        with the bit set that no kernel looks at.  ``fd``, if not -1, is where pread gives what ``read`` does.
        ``rows`` are those of the journal, if they are there already (`with_gens`)."""
        bucket_sectors = geometry.bucket_size_sectors
        assert bucket_sectors <= RUN_MASK and not bucket_sectors & (bucket_sectors - 1)
        self.read, self.geometry, self.magic, self.gens, self.journal = read, geometry, magic, gens, journal
        self._shift = np.uint64(GEN_BITS + geometry.bucket_shift)
        self._in_bucket = np.uint64((bucket_sectors - 1) << GEN_BITS)
        self._bucket_end = bucket_sectors << GEN_BITS
        self._ptr_min = geometry.first_bucket * bucket_sectors << GEN_BITS
        self._ptr_limit = min(geometry.nbuckets * bucket_sectors << GEN_BITS, 1 << PTR_DEV.offset)
        self._rows = rows
        self.scan: CountingScan | None = None
        if IS_COMPILED and sys.byteorder == "little":
            self._rows = rows_of(journal) if rows is None else rows
            self.scan = CountingScan(geometry, gens, self._rows, magic, crc64_address())
        self.can_count = self.scan is not None and self.scan.can_count
        self._fd = fd

    def with_gens(self, gens: npt.NDArray[np.uint8]) -> Tallier:
        """Another one of the same set."""
        return Tallier(self.read, self.geometry, self.magic, gens, self.journal, self._fd, self._rows)

    @property
    def piece_leaves(self) -> int:
        """So many leaves `count` takes."""
        return len(self.scan.buffers) if self.scan is not None and self.can_count else 1

    def tally(self, place: Place) -> Tally | None:
        """What the leaf holds; None if it takes more than counting to tell."""
        view = self._read(place)
        if view is None:
            return None
        log = self.log(view, place)
        if not log:
            return None
        scan = self.scan
        if scan is not None and place.nsectors == scan.node_sectors and scan.leaf(view.cast("Q"), log, place.start,
                                                                                  place.end):
            return _scanned(scan)
        return self._tally(view, log, place)

    def count(self, piece: Sequence[Place]) -> list[U64 | Tally | None]:
        """Up to `piece_leaves` leaves are added to what `CountingScan.settle` tells about all of them together, and the
        marks of each are given; for one that is not for that, what `tally` says."""
        scan = self.scan
        if scan is None or not self.can_count:
            return [self.tally(place) for place in piece]
        assert len(piece) <= self.piece_leaves
        asked = [self._staged(scan, number, place) for number, place in enumerate(piece)]
        if self._fd >= 0 and scan.can_check:
            is_counted = scan.read_and_count(self._fd, asked)
            return [_words(scan.marks_of(number)) if is_counted[number] else self.tally(place)
                    for number, place in enumerate(piece)]
        logs = scan.stage(self._fd, asked)
        for number, (place, log) in enumerate(zip(piece, logs, strict=True)):
            if log and not self._is_sound(scan, number, place, log):
                scan.drop(number)
                logs[number] = None
        is_counted = scan.count(len(piece))
        return [_words(scan.marks_of(number)) if is_counted[number]
                else self.tally(place) if log is not None or place.nsectors != scan.node_sectors else None
                for number, (place, log) in enumerate(zip(piece, logs, strict=True))]

    def _staged(self, scan: CountingScan, number: int, place: Place) -> tuple[int, int, int, int]:
        # What `CountingScan.stage` is asked about a leaf; nothing of one that it is not for.
        if place.nsectors != scan.node_sectors or place.sector % self.geometry.bucket_size_sectors:
            return 0, 0, 0, 0
        if self._fd < 0:
            try:
                scan.buffers[number][:] = self.read(place.sector, place.nsectors)
            except BcachectlError:
                return 0, 0, 0, 0
        return place.sector, place.start, place.end, place.seed

    def _is_sound(self, scan: CountingScan, number: int, place: Place, log: list[tuple[int, int]]) -> bool:
        # By its checksums.
        view, seed = scan.buffers[number], place.seed ^ _ALL_ONES
        words = view.cast("Q")
        for at, count in log:
            if crc64(view[(at - _CSUM_WORDS) * 8:(at + count) * 8], seed) != words[at - BSET_HEADER_BYTES // 8]:
                return False
        block = scan.doubtful_block(number)
        return not block or not self._is_more_behind(view, place, block, words[_SEQ_WORD],
                                                     len(view) // self.geometry.block_bytes)

    def _read(self, place: Place) -> memoryview | None:
        if place.sector % self.geometry.bucket_size_sectors:
            return None
        try:
            return memoryview(self.read(place.sector, place.nsectors))
        except BcachectlError:
            return None

    def _tally(self, view: memoryview, log: list[tuple[int, int]], place: Place) -> Tally | None:
        # In columns.
        words = np.frombuffer(view, "<u8")
        at, count = log[0]
        rows, marks = self.base(words[at:at + count], place), _NONE
        is_mixed = rows is None
        if rows is None:
            first = self._keys(words, log[:1], place)
            if first is None:
                return None
            rows, marks = _rows_of(first[0]), first[1]
        over = extent.empty()
        is_leaf = self._is_leaf(rows, place.nsectors)
        if len(log) > 1:
            rest = self._keys(words, log[1:], place)
            if rest is None:
                return None
            is_leaf = is_leaf or self._is_leaf(_rows_of(rest[0]), place.nsectors)
            over, marks = extent.flatten(extent.from_keys(rest[0])), np.concatenate([marks, rest[1]])
        if not is_leaf:
            return None
        if len(self.journal.start):
            over = extent.overlay(over, extent.clip(self.journal, start=place.start, end=place.end))
        return self._count(rows, over, marks, is_marked=is_mixed)

    # The log of a node.

    def log(self, view: memoryview, place: Place) -> list[tuple[int, int]]:
        """The keys of each set, oldest first, as the index of their first word and how many words; empty if anything
        is wrong with the node."""
        block_bytes = self.geometry.block_bytes
        node_blocks = (place.nsectors << 9) // block_bytes
        node_seq: int = _HEADER.unpack_from(view)[2]
        found: list[tuple[int, int]] = []
        block = 0
        while block < node_blocks:
            offset = block * block_bytes
            csum, magic, seq, version, keys = _HEADER.unpack_from(view, offset)
            if seq != node_seq:
                break
            end = offset + BSET_HEADER_BYTES + keys * 8
            blocks = -(-(end - offset) // block_bytes)
            if not seq or version != BSET_VERSION or magic != self.magic or block + blocks > node_blocks:
                return []
            if (found and not keys) or crc64_seeded(view[offset + 8:end], place.seed) != csum:
                return []
            found.append(((offset + BSET_HEADER_BYTES) // 8, keys))
            block += blocks
        if block < node_blocks and self._is_more_behind(view, place, block, node_seq, node_blocks):
            return []
        return found

    def _is_more_behind(self, view: memoryview, place: Place, block: int, node_seq: int, node_blocks: int) -> bool:
        # A set of this node behind the end of its log, or one that would be if its number were right.
        block_bytes = self.geometry.block_bytes
        seqs = np.frombuffer(view, "<u8", node_blocks * block_bytes // 8)[_SEQ_WORD::block_bytes // 8]
        if node_seq in seqs[block:].tolist():
            return True
        offset = block * block_bytes
        csum, magic, _seq, version, keys = _HEADER.unpack_from(view, offset)
        end = offset + BSET_HEADER_BYTES + keys * 8
        if magic != self.magic or not keys or version > BSET_VERSION or end > len(view):
            return False
        head = _HEAD.pack(magic, node_seq)
        begun = crc64_seeded(head, place.seed) if version else crc64(head)
        return bool(crc64(view[offset + _SEQ_END:end], begun) == csum)

    # Keys.

    def base(self, words: U64, place: Place) -> _Rows | None:
        """The keys of a set that all have one pointer and are of one volume; None if they are not that, or not plain.

        What is not seen here, an extent that crosses its bucket, `_runs` sees.
        """
        count = len(words) // _KEY_WORDS
        if not count or len(words) != count * _KEY_WORDS:
            return None
        high, end, ptr = words.reshape(count, _KEY_WORDS).T.copy()
        inode = int(high[0]) & MAX_INODE
        # Only bits of the two fields that differ from key to key may be left.
        high ^= np.uint64(_ONE_POINTER | inode)
        bits = int(np.bitwise_or.reduce(high))
        if bits & ~_VARIES:
            return None
        high >>= _SIZE_SHIFT
        dirty: U64 | None = None
        if bits & KEY_DIRTY.mask:
            dirty = high >> _SIZE_WIDTH
            high &= _SIZE_MASK
        size = high
        if int(end.max()) > SECTOR_MASK or int(ptr.max()) >= self._ptr_limit or int(ptr.min()) < self._ptr_min:
            return None
        # Signed, so that an extent larger than its end lies before everything.
        start = (end - size).view(np.int64)
        if not int(size.min()) or not bool((start[1:] >= end.view(np.int64)[:-1]).all()) or int(start[0]) < 0:
            return None
        offset = inode << INODE_SHIFT
        if offset + int(start[0]) < place.start or offset + int(end[-1]) > place.end or inode == MAX_INODE:
            return None
        return _Rows(offset, end, size, ptr, dirty)

    def _keys(self, words: U64, log: list[tuple[int, int]], place: Place) -> tuple[KeyColumns, U64] | None:
        # The keys of some sets, of any kind, and the pointers that mark; None if a rule speaks against one.
        parts = [words[at:at + count] for at, count in log]
        stream = parts[0] if len(parts) == 1 else np.concatenate(parts)
        try:
            keys = decode_key_columns(stream.data, len(stream))
        except Corrupt:
            return None
        bounds = _set_bounds(keys, [count for _at, count in log])
        if bounds is None or int(keys.nptrs.max(initial=0)) > 1:
            return None
        is_next = np.ones(len(keys.pos), np.bool_)
        is_next[bounds[:-1]] = False
        if bool(((keys.pos[1:] < keys.pos[:-1]) & is_next[1:]).any()):
            return None
        if bool(validity.extents_fatal(keys, self.geometry).any()):
            return None
        rows = keys.size > 0
        end = keys.pos[rows]
        if len(end):
            start = end - keys.size[rows]
            number = np.cumsum(~is_next)[rows]
            if bool(((start[1:] < end[:-1]) & (number[1:] == number[:-1])).any()):
                return None
            if int(start.min()) < place.start or int(end.max()) > place.end:
                return None
        usable = validity.columns_available(keys) & ~validity.columns_out_of_range(keys, self.geometry)
        ptr = keys.ptr[usable]
        if int(ptr.max(initial=0)) >= self._ptr_limit:
            return None
        behind = self._behind(ptr)
        if behind is None:
            return keys, _NONE
        return None if _is_too_stale(behind) else (keys, ptr[behind != 0])

    def _is_leaf(self, rows: _Rows, nsectors: int) -> bool:
        # One extent that cannot be taken for a pointer to a node is enough (`bcachectl.fsck.levels`).
        if rows.dirty is not None:
            return True
        if len(rows.size) and int(rows.size[0]) != nsectors:
            return True
        return bool(((rows.size != nsectors) | (rows.ptr & self._in_bucket != 0)).any())

    # Counting.

    def _behind(self, ptr: U64) -> npt.NDArray[np.uint8] | None:
        # How many generations pointers are behind their buckets, modulo 256; None if all are theirs.
        own = ptr.astype(np.uint8)
        now = self.gens[(ptr >> self._shift).view(np.int64)]
        return None if bool((own == now).all()) else now - own

    def _runs(self, rows: _Rows) -> _Runs | None:
        # None if one crosses its bucket or is too far behind it.
        ptr = rows.ptr
        end = rows.size << _GEN_SHIFT
        end += ptr
        place = ptr & ~self._in_bucket
        starts = place[1:] != place[:-1]
        starts |= end[:-1] != ptr[1:]
        tails = np.flatnonzero(starts)
        heads = np.concatenate((_ZERO, tails + 1))
        first, last = ptr[heads], end[np.append(tails, len(ptr) - 1)]
        if int(((first & self._in_bucket) + (last - first)).max()) > self._bucket_end:
            return None
        behind = self._behind(first)
        if behind is not None and _is_too_stale(behind):
            return None
        return _Runs(heads, first, last, behind)

    def _count(self, rows: _Rows, over: Extents, marks: U64, *, is_marked: bool) -> Tally | None:
        hit = rows.take(np.zeros(len(rows.end), np.bool_))
        if len(over.start) and len(rows.end):
            end = rows.end + np.uint64(rows.offset)
            is_touched = extent.touched(end - rows.size, end, over)
            hit, rows = rows.take(is_touched), rows.take(~is_touched)
            over = extent.overlay(hit.as_extents(), over)
        pieces = over.take((over.nptrs > 0) & (PTR_DEV.get(over.ptr) == 0))
        cut = _Rows(0, pieces.end, pieces.size, pieces.ptr,
                    pieces.dirty.astype(np.uint64) if pieces.dirty.any() else None)
        tallies: list[Tally | None] = []
        # Rows that the map touches are judged as they stand, and counted as it leaves them.
        for part, is_counted, is_base in ((rows, True, True), (hit, False, True), (cut, True, False)):
            runs = self._runs(part) if len(part.end) else None
            if runs is None and len(part.end):
                return None
            if runs is not None and runs.behind is not None and is_base and not is_marked:
                marks = np.concatenate([marks, runs.ptr[runs.behind != 0]])
            if runs is not None and is_counted:
                tallies.append(_tally_rows(part, runs))
        return _sum(tallies, marks)


def _words(data: bytes) -> U64:
    # Mostly there are none.
    return np.frombuffer(data, np.uint64) if data else _NONE


def _scanned(scan: Scan) -> Tally:
    # What the scan found.
    dirty = {inode: Spread(sectors, start, end) for inode, sectors, start, end in scan.spreads()}
    return Tally(scan.extents, scan.dirty_sectors, scan.sectors - scan.dirty_sectors, dirty,
                 np.frombuffer(scan.taken(), np.uint64), np.frombuffer(scan.marks(), np.uint64))


def _is_too_stale(behind: npt.NDArray[np.uint8]) -> bool:
    return bool(((behind > validity.BUCKET_GC_GEN_MAX) & (behind <= _BEHIND_MAX)).any())


def _rows_of(keys: KeyColumns) -> _Rows:
    # The keys that have data; of the oldest set that is all there is to know.
    rows = (keys.size > 0) & validity.columns_available(keys)
    dirty = keys.dirty[rows].astype(np.uint64)
    return _Rows(0, keys.pos[rows], keys.size[rows].astype(np.uint64), keys.ptr[rows], dirty if dirty.any() else None)


def _set_bounds(keys: KeyColumns, counts: list[int]) -> npt.NDArray[np.intp] | None:
    # Where each set's keys end among all keys; None if a key crosses from one set into the next.
    if len(counts) == 1:
        return np.array([len(keys.pos)], np.intp)
    ends = np.cumsum(keys.nptrs.astype(np.int64) + SHORTEST_KEY_WORDS)
    wanted = np.cumsum(counts)
    bounds: npt.NDArray[np.intp] = np.searchsorted(ends, wanted) + 1
    return bounds if bool((ends[bounds - 1] == wanted).all()) else None


def _tally_rows(rows: _Rows, runs: _Runs) -> Tally | None:
    # A dirty extent whose bucket was used again is for others to report.
    lengths = (runs.end - runs.ptr) >> _GEN_SHIFT
    taken = (runs.ptr >> _GEN_SHIFT << _RUN_SHIFT) | lengths
    count, dirty = len(rows.end), rows.dirty
    if runs.behind is not None:
        is_stale = (runs.behind > 0) & (runs.behind <= _BEHIND_MAX)
        rows_of = np.diff(runs.heads, append=count)
        if dirty is not None and bool(dirty[np.repeat(is_stale, rows_of)].any()):
            return None
        count -= int(rows_of[is_stale].sum())
        taken, lengths = taken[~is_stale], lengths[~is_stale]
    spreads = _spreads(rows) if dirty is not None else {}
    dirty_sectors = sum(spread.sectors for spread in spreads.values())
    return Tally(count, dirty_sectors, int(lengths.sum()) - dirty_sectors, spreads, taken, _NONE)


def _spreads(rows: _Rows) -> dict[int, Spread]:
    dirty = rows.dirty
    assert dirty is not None
    first, last = int(dirty.argmax()), len(dirty) - 1 - int(dirty[::-1].argmax())
    if not dirty[first]:
        return {}
    start = rows.offset + int(rows.end[first]) - int(rows.size[first])
    end = rows.offset + int(rows.end[last])
    if start >> INODE_SHIFT == (end - 1) >> INODE_SHIFT:
        return {start >> INODE_SHIFT: Spread(int(np.dot(dirty, rows.size)), start, end)}
    inodes = (rows.end - np.uint64(1)) >> np.uint64(INODE_SHIFT)
    found: dict[int, Spread] = {}
    for inode in np.unique(inodes).tolist():
        found |= _spreads(rows.take(inodes == inode))
    return found


def _sum(tallies: list[Tally | None], marks: U64) -> Tally | None:
    # All of them together; None if one of them declined.
    count = dirty_sectors = clean_sectors = 0
    spreads: dict[int, Spread] = {}
    for tally in tallies:
        if tally is None:
            return None
        count += tally.extents
        dirty_sectors += tally.dirty_sectors
        clean_sectors += tally.clean_sectors
        spreads = joined_spreads(spreads, tally.dirty)
    taken = [tally.taken for tally in tallies if tally is not None]
    return Tally(count, dirty_sectors, clean_sectors, spreads,
                 taken[0] if len(taken) == 1 else np.concatenate([_NONE, *taken]), marks)


def joined_spreads(spreads: dict[int, Spread], more: dict[int, Spread]) -> dict[int, Spread]:
    """Both together."""
    joined = dict(spreads)
    for inode, spread in more.items():
        joined[inode] = joined[inode].joined(spread) if inode in joined else spread
    return joined


def run_buckets(taken: U64, geometry: Geometry) -> npt.NDArray[np.int64]:
    """The bucket of each run of `Tally.taken`."""
    return (taken >> np.uint64(RUN_BITS + geometry.bucket_shift)).view(np.int64)
