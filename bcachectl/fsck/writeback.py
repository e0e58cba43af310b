# SPDX-License-Identifier: GPL-2.0-only
"""Write-back without the set running: `find_dirty` says what is dirty, `Copy` brings it to a backing device.

The cache is only ever read.  The way of one run:

1. `find_dirty` takes a finished `Check` and reads the leaves once more, the journal on top, as `salvage` has it: dirty
   extents by device number, dirty extents that are known to be lost, and ranges of positions whose keys are unknown.
2. A `Source` is that for one device number, in sectors of the device that it goes to.  What lies outside the data of
   that device (`Source.misplaced`) is never written: it would hit the superblock, or the end.
3. `Copy.run` copies in the order of the backing device.  Neighbours make one write of up to `PIECE_SECTORS`.  What the
   next writes need lies anywhere on the cache; it is announced, so that the device has many reads to do at once.  A
   read that fails is halved until single sectors remain; what cannot be read is lost, and the backing device keeps
   there what it had.
4. The lost sectors are tried again, sector by sector, as often as asked for.
5. The caller flushes the device, and only then marks its superblock clean.

`Copy.rescue_map` may be asked for at any time.  Its finished ranges are durable only after a flush, so whoever keeps
the map flushes the backing device first.  Doing a range twice is harmless: the same bytes are written again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from bcachectl.errors import BcachectlError
from bcachectl.fsck import extents as extent
from bcachectl.fsck import rescue_map
from bcachectl.fsck.check import Check, run
from bcachectl.fsck.check_journal import leftovers
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.records import Slot
from bcachectl.fsck.rescue_map import DONE, DOUBTED, LOST, UNKNOWN, Owner, RescueMap
from bcachectl.fsck.salvage import leaf_map, read_sets
from bcachectl.fsck.walk import Read
from bcachectl.ondisk.bkey import INODE_SHIFT, MAX_POS, PTR_OFFSET

PIECE_SECTORS = 8192
"""The longest write, and what a range of the map grows by."""
AHEAD_EXTENTS, AHEAD_SECTORS = 512, 2 * PIECE_SECTORS
"""How far ahead of the copy reads are announced, whichever is reached first."""


class Target(Protocol):
    """The device that data goes to."""

    def write(self, sector: int, data: memoryview) -> None:
        """Write whole sectors; DeviceError if it fails."""


class Dirty(NamedTuple):
    """What a cache holds that its backing devices do not, in positions.

    ``by_inode`` is what can be copied, ``lost`` what is known to be lost, ``unknown`` where keys may be missing.
    """

    by_inode: dict[int, Extents]
    lost: dict[int, Extents]
    unknown: list[tuple[int, int]]


class Source(NamedTuple):
    """The dirty data of one device number in sectors of the device that it goes to; all flat."""

    extents: Extents
    lost: Extents
    misplaced: Extents
    unknown: Extents


class Progress(NamedTuple):
    """Sectors that are dealt with, of how many, and how many of them are lost so far."""

    done_sectors: int
    total_sectors: int
    lost_sectors: int


def with_all_entries(check: Check) -> Check:
    """The check once more, with every journal entry that can still be read, if some were out of reach.

    An unreadable sector makes a whole bucket of the journal unreadable, and nobody knows whether an entry stood there
    that was newer than all others; so such a check is doubtful whatever is found.
    """
    walk, codes = check.walk, {finding.code for finding in check.findings}
    if "JOURNAL_IO" in codes and walk.superblock is not None:
        geometry = walk.geometry
        buckets = frozenset(walk.superblock.d)
        check = run(Check(_Patched(walk.read, buckets, geometry.bucket_size_sectors).read, walk.size_sectors,
                          check.backings, instead=check.instead, judges_backings=check.judges_backings))
        check.is_doubtful = True
        codes |= {finding.code for finding in check.findings}
    if "JOURNAL_CSUM" not in codes or check.walk.newest is None:
        return check
    walk, is_doubtful = check.walk, "JOURNAL_IO" in codes
    check = run(Check(walk.read, walk.size_sectors, check.backings, instead=check.instead, more=list(leftovers(walk)),
                      judges_backings=check.judges_backings))
    check.is_doubtful |= is_doubtful
    return check


class _Patched:
    # Reads zeros for the sectors of some buckets that cannot be read.
    def __init__(self, read: Read, buckets: frozenset[int], bucket_size_sectors: int) -> None:
        self.read_through, self.buckets, self.bucket_size_sectors = read, buckets, bucket_size_sectors

    def read(self, sector: int, count: int) -> bytes:
        try:
            return self.read_through(sector, count)
        except BcachectlError:
            if sector // self.bucket_size_sectors not in self.buckets:
                raise
            if count == 1:
                return bytes(512)
        half = count // 2
        return self.read(sector, half) + self.read(sector + half, count - half)


def find_dirty(check: Check) -> Dirty:
    """All dirty data of the checked set; nothing is sure anywhere if keys of the journal are missing."""
    kept: list[Extents] = []
    lost: list[Extents] = []
    unknown: list[tuple[int, int]] = []
    for slot in check.slots:
        leaf = leaf_map(check.walk, slot, check.journal, known_buckets=check.known_buckets)
        is_dropped = np.zeros(len(leaf.kept.start), np.bool_)
        if check.dropped:
            pairs = zip(leaf.kept.start.tolist(), PTR_OFFSET.get(leaf.kept.ptr).tolist(), strict=True)
            is_dropped = np.array([pair in check.dropped for pair in pairs], np.bool_)
        kept.append(leaf.kept.take(leaf.kept.dirty & ~is_dropped))
        lost += [part.take(part.dirty) for part in (leaf.kept.take(is_dropped), leaf.lost, leaf.stale_dirty)]
        if leaf.is_unknown or ((slot.leaf is None or len(leaf.lost.start)) and not _is_sound(check, slot)):
            unknown.append((slot.start, slot.end))
    unknown += [(slot.start, slot.end) for slot in check.unknown + check.doubted]
    if check.is_doubtful:
        unknown = [(0, MAX_POS)]
    return Dirty(_by_inode(extent.concatenate(kept)), _by_inode(extent.concatenate(lost)), list(_united(unknown)))


def source(dirty: Dirty, inode: int, *, first_sector: int, end_sector: int, shift_sectors: int = 0) -> Source:
    """The dirty data of ``inode`` for a device whose data is [first_sector, end_sector).

    Keys name sectors of a backing device, its superblock included; ``shift_sectors`` is what comes off for an image
    that begins with the data itself.
    """
    base = (inode << INODE_SHIFT) + shift_sectors
    every = _moved(dirty.by_inode.get(inode, extent.empty()), base)
    inside = extent.clip(every, start=first_sector, end=end_sector)
    before = extent.clip(every, start=0, end=first_sector)
    behind = extent.clip(every, start=end_sector, end=1 << INODE_SHIFT)
    lost = _moved(dirty.lost.get(inode, extent.empty()), base)
    lost = rescue_map.without(lost._replace(nptrs=np.ones_like(lost.nptrs)), every)
    first, last = inode << INODE_SHIFT, inode + 1 << INODE_SHIFT
    pairs = [(max(start, first) - base, min(end, last) - base) for start, end in dirty.unknown
             if start < last and first < end]
    pairs = [(max(start, first_sector), min(end, end_sector)) for start, end in pairs]
    unknown = rescue_map.ranges([(start, end) for start, end in pairs if start < end], UNKNOWN)
    return Source(inside, rescue_map.marked(lost.start, lost.end, LOST), extent.concatenate([before, behind]),
                  rescue_map.joined(unknown))


def sectors_of(extents: Extents) -> int:
    """Sectors of all rows together."""
    return int(extents.size.sum())


def writes(extents: Extents) -> Iterator[tuple[int, Extents]]:
    """The writes that copy flat extents: the sector each begins at, and the extents it is put together from."""
    if not len(extents.start):
        return
    # Long extents are cut at multiples of a piece, so that one write never takes more memory than that.
    pieces = _cut_at_pieces(extents)
    number = pieces.start // np.uint64(PIECE_SECTORS)
    is_head = (pieces.end[:-1] != pieces.start[1:]) | (number[:-1] != number[1:])
    heads = np.flatnonzero(np.concatenate(([True], is_head))).tolist()
    for first, last in zip(heads, [*heads[1:], len(pieces.start)], strict=True):
        yield int(pieces.start[first]), pieces.take(slice(first, last))


class Copy:
    """One copy of a `Source` to a `Target`; ``read`` reads the cache, ``read_sector`` a single sector with all care,
    ``announce`` is told before which sectors will be read.
    """

    def __init__(self, read: Read, read_sector: Read, announce: Callable[[int, int], None], target: Target,
                 found: Source, owner: Owner, *, end_sector: int, earlier: Extents | None = None,
                 retries: int = 0) -> None:
        """``earlier`` is the map of a run that was interrupted: what it finished is not copied again, and what it lost
        is tried again only if there are ``retries``."""
        self.read, self.read_sector, self.announce, self.target = read, read_sector, announce, target
        self.source, self.owner, self.end_sector, self.retries = found, owner, end_sector, retries
        before = extent.empty() if earlier is None else earlier
        finished, given_up = (rescue_map.of_status(before, status) for status in (DONE, LOST))
        self.finished = finished
        """What an earlier run has done, whether or not the keys can still be read."""
        todo = rescue_map.without(found.extents, finished)
        bad = rescue_map.within(todo, given_up)
        self.todo = rescue_map.without(todo, bad)
        self.bad: list[tuple[int, int]] = list(zip(bad.start.tolist(), bad.end.tolist(), strict=True))
        """Sorted ranges that could not be read."""
        self.at = 0
        """All of `todo` before this sector is dealt with."""
        self.copied_sectors = 0
        self.skipped_sectors = sectors_of(found.extents) - sectors_of(todo)
        """What need not be copied because an earlier run did."""

    def run(self) -> Iterator[Progress]:
        """Copy, a piece with each step; DeviceError if the target cannot be written."""
        total = sectors_of(self.todo) + self.bad_sectors
        done = self.bad_sectors
        for start, pieces in self._announced(writes(self.todo)):
            bad = self._copy(start, pieces)
            end = int(pieces.end[-1])
            self.bad += bad
            self.at = end
            done += end - start
            yield Progress(done, total, self.bad_sectors)
        self.at = self.end_sector
        self.bad.sort()
        for _attempt in range(self.retries):
            for number, (start, end) in enumerate(tuple(self.bad)):
                if number % 16 == 0:
                    yield Progress(done, total, self.bad_sectors)
                self._retry(start, end)

    @property
    def bad_sectors(self) -> int:
        """Sectors that could not be read."""
        return sum(end - start for start, end in self.bad)

    @property
    def lost(self) -> Extents:
        """All that is lost: unreadable, out of place, or known by damaged keys only; less what was saved earlier."""
        parts = [self.source.lost, self.source.misplaced, rescue_map.ranges(sorted(self.bad), LOST)]
        every = extent.empty()
        for part in parts:
            every = extent.overlay(every, part)
        every = every._replace(nptrs=np.ones(len(every.start), np.uint8))
        left = rescue_map.without(every, self.finished)
        return rescue_map.joined(rescue_map.marked(left.start, left.end, LOST))

    @property
    def unknown(self) -> Extents:
        """Ranges where dirty data may have been that nothing is known about."""
        return self.source.unknown

    def rescue_map(self) -> RescueMap:
        """How far it is."""
        done = extent.clip(self.todo, start=0, end=self.at) if self.at else extent.empty()
        done = extent.overlay(rescue_map.marked(done.start, done.end, DONE),
                              rescue_map.marked(self.finished.start, self.finished.end, DONE))
        done = done._replace(nptrs=np.ones(len(done.start), np.uint8))
        doubted = rescue_map.within(done, self.source.unknown)
        rows = extent.overlay(self.source.unknown, rescue_map.marked(done.start, done.end, DONE))
        rows = extent.overlay(rows, rescue_map.marked(doubted.start, doubted.end, DOUBTED))
        return RescueMap(self.owner, extent.overlay(rows, self.lost), self.at, self.end_sector)

    # Reading and writing.

    def _announced(self, each: Iterator[tuple[int, Extents]]) -> Iterator[tuple[int, Extents]]:
        # The same writes, those that follow announced.
        ahead: deque[tuple[int, Extents]] = deque()
        extents = sectors = 0
        for start, pieces in each:
            sizes = pieces.size.tolist()
            for sector, count in zip(PTR_OFFSET.get(pieces.ptr).tolist(), sizes, strict=True):
                self.announce(sector, count)
            ahead.append((start, pieces))
            extents += len(sizes)
            sectors += sum(sizes)
            while len(ahead) > 1 and (extents > AHEAD_EXTENTS or sectors > AHEAD_SECTORS):
                first, gone = ahead.popleft()
                extents -= len(gone.start)
                sectors -= sectors_of(gone)
                yield first, gone
        yield from ahead

    def _copy(self, start: int, pieces: Extents) -> list[tuple[int, int]]:
        # One write, or several around the sectors that cannot be read; those are returned.
        end = int(pieces.end[-1])
        buf = memoryview(bytearray((end - start) << 9))
        bad: list[tuple[int, int]] = []
        sectors = PTR_OFFSET.get(pieces.ptr).tolist()
        for first, last, sector in zip(pieces.start.tolist(), pieces.end.tolist(), sectors, strict=True):
            for offset, count in self._fill(sector, buf[(first - start) << 9:(last - start) << 9]):
                bad.append((first + offset, first + offset + count))
        at = start
        for first, last in [*bad, (end, end)]:
            if at < first:
                self.target.write(at, buf[(at - start) << 9:(first - start) << 9])
                self.copied_sectors += first - at
            at = last
        return bad

    def _fill(self, sector: int, buf: memoryview) -> list[tuple[int, int]]:
        # Read into ``buf``; (offset, count) of the sectors that cannot be read.  Halves, so that a large good part of
        # a range with one bad sector costs few requests of a device that takes seconds for each failure.
        count = len(buf) >> 9
        try:
            buf[:] = self.read(sector, count) if count > 1 else self.read_sector(sector, 1)
            return []
        except BcachectlError:
            if count == 1:
                return [(0, 1)]
        half = count // 2
        bad = self._fill(sector, buf[:half << 9])
        for offset, length in self._fill(sector + half, buf[half << 9:]):
            if bad and bad[-1][0] + bad[-1][1] == half + offset:
                bad[-1] = (bad[-1][0], bad[-1][1] + length)
            else:
                bad.append((half + offset, length))
        return bad

    def _retry(self, start: int, end: int) -> None:
        # One range of bad sectors once more; what is still bad takes its place.
        rows = extent.clip(self.source.extents, start=start, end=end)
        still: list[tuple[int, int]] = []
        for first, pieces in writes(rows):
            still += self._copy(first, pieces)
        place = self.bad.index((start, end))
        self.bad[place:place + 1] = still


def _is_sound(check: Check, slot: Slot) -> bool:
    # Every set has a good checksum.  The keys of one that has not may look like keys and yet name other sectors than
    # they did, so any dirty data in the leaf's range may be missing or out of date.
    ptr = slot.leaf or (slot.lost if slot.level == 0 else None)
    sets = read_sets(check.walk, ptr, slot.nsectors) if ptr is not None else None
    return bool(sets) and all(image.is_valid for image in sets or [])


def _united(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    # Any ranges, in order and without overlaps.
    at: tuple[int, int] | None = None
    for start, end in sorted(ranges):
        if at is not None and start <= at[1]:
            at = at[0], max(at[1], end)
            continue
        if at is not None:
            yield at
        at = start, end
    if at is not None:
        yield at


def _by_inode(extents: Extents) -> dict[int, Extents]:
    every = extents.take(np.argsort(extents.start, kind="stable"))
    inodes = every.start >> np.uint64(INODE_SHIFT)
    return {int(inode): extent.flatten(every.take(inodes == inode)) for inode in np.unique(inodes)}


def _moved(extents: Extents, base: int) -> Extents:
    # From positions to sectors of a device; what lies before its first sector has no place there.
    rows = extent.clip(extents, start=base, end=(base | (1 << INODE_SHIFT) - 1) + 1)
    return rows._replace(start=rows.start - np.uint64(base), end=rows.end - np.uint64(base))


def _cut_at_pieces(extents: Extents) -> Extents:
    piece = np.uint64(PIECE_SECTORS)
    first = extents.start // piece
    count = ((extents.end - np.uint64(1)) // piece - first).astype(np.int64) + 1
    if int(count.max()) == 1:
        return extents
    row = np.repeat(np.arange(len(count)), count)
    nth = (np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)).astype(np.uint64)
    start = np.maximum(extents.start[row], (first[row] + nth) * piece)
    end = np.minimum(extents.end[row], (first[row] + nth + np.uint64(1)) * piece)
    moved = (start - extents.start[row]) << np.uint64(extent.GEN_BITS)
    cut = extents.take(row)
    return cut._replace(start=start, end=end, ptr=cut.ptr + moved)
