# SPDX-License-Identifier: GPL-2.0-only
"""`read_journal`: every bucket of the journal, its entries and what stands behind them.

1. Buckets that lie behind each other are read together, `PIECE_BYTES` at a time, by several threads.  Most hold no
   entry, and that is seen for a whole piece at once: no block of theirs begins with the magic.
2. Where a piece cannot be read, or a bucket is larger, it is read by itself: first as much as entries may take, the
   rest where they come close to that.
3. What stands behind the entries is only looked at for blocks that could begin one (`JournalBucket.is_exhausted`).
   Nothing is lost where that cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bcachectl.errors import BcachectlError
from bcachectl.fsck.damage import JOURNAL_BUCKET, damage_of
from bcachectl.fsck.fill import fill_words
from bcachectl.fsck.records import Damage, JournalEntry, Record
from bcachectl.fsck.threads import in_order
from bcachectl.ondisk.crc64 import Buffer
from bcachectl.ondisk.jset import JSET_MAX_BYTES, judge_jset, walk_journal_bucket
from bcachectl.ondisk.magic import jset_magic
from bcachectl.ondisk.superblock import Superblock

PIECE_BYTES = 4 << 20
BUCKET_PIECE_BYTES, ENTRIES_BYTES = 1 << 20, 256 << 10
"""What stands behind a piece of this size matters only if the valid part of the bucket comes close to its end.  The
smaller one is for who looks at entries only."""
THREADS_MIN_BYTES = 16 << 20
"""A smaller journal is read before a thread has begun."""


class JournalBucket(NamedTuple):
    """One bucket by its number in the journal: its valid entries from the start on, what is wrong with it, whether no
    block behind the entries could begin another one, and whether zeros begin where they end."""

    number: int
    entries: Sequence[Record] = ()
    damage: Damage | None = None
    is_exhausted: bool = False
    is_blank: bool = False


class _Place(NamedTuple):
    # A bucket by its number in the journal, and on the device.
    number: int
    bucket: int


def read_journal(read: Callable[[int, int], bytes], sb: Superblock, *, fd: int = -1, threads: int = 1,
                 entries_only: bool = False) -> Generator[JournalBucket, None, None]:
    """The buckets in the order of the superblock; with ``entries_only`` no look behind the entries.

    ``fd``, if not -1, is where pread gives what ``read`` does.
    """
    reader = _Reader(read, sb, fd, entries_only)
    if len(sb.d) * sb.geometry.bucket_bytes < THREADS_MIN_BYTES:
        threads = 1
    with closing(in_order(reader.read_piece, reader.pieces(), threads)) as found:
        for piece in found:
            yield from piece


class _Reader:
    def __init__(self, read: Callable[[int, int], bytes], sb: Superblock, fd: int, entries_only: bool) -> None:
        self.read, self.fd, self.sb, self.geometry, self.entries_only = read, fd, sb, sb.geometry, entries_only
        self.magic = jset_magic(sb.set_uuid)
        # Memory that is new each time would take as long as reading.
        self._idle: list[bytearray] = []

    def pieces(self) -> list[list[_Place]]:
        """Buckets behind each other, as many as are read together."""
        size, block = self.geometry.bucket_bytes, self.geometry.block_bytes
        count = 1 if self.entries_only or size % block else max(PIECE_BYTES // size, 1)
        pieces: list[list[_Place]] = []
        for number, bucket in enumerate(self.sb.d):
            if pieces and len(pieces[-1]) < count and bucket == pieces[-1][-1].bucket + 1:
                pieces[-1].append(_Place(number, bucket))
            else:
                pieces.append([_Place(number, bucket)])
        return pieces

    def read_piece(self, piece: Sequence[_Place]) -> list[JournalBucket]:
        """All buckets of one piece."""
        size = self.geometry.bucket_bytes
        if len(piece) == 1:
            return [self._read_bucket(piece[0])]
        buf = self._idle.pop() if self._idle else bytearray(max(PIECE_BYTES, size))
        try:
            view = memoryview(buf)[:len(piece) * size]
            if not self._fill(view, self.geometry.sector_of(piece[0].bucket)):
                return list(map(self._read_bucket, piece))
            is_possible = self._begins(view).reshape(len(piece), -1).max(axis=1).tolist()
            return [self._judge(place, view[number * size:(number + 1) * size]) if is_possible[number]
                    else JournalBucket(place.number, is_exhausted=True, is_blank=not any(view[number * size:][:8]))
                    for number, place in enumerate(piece)]
        finally:
            self._idle.append(buf)

    def _fill(self, view: memoryview, sector: int) -> bool:
        # Whether all of it could be read.
        if self.fd >= 0:
            return fill_words(self.fd, view, sector << 9)
        try:
            data = self.read(sector, len(view) >> 9)
        except BcachectlError:
            return False
        if len(data) == len(view):
            view[:] = data
        return len(data) == len(view)

    def _begins(self, buf: Buffer) -> npt.NDArray[np.bool_]:
        # Whether each block could begin an entry, by its second word.
        words: npt.NDArray[np.uint64] = np.frombuffer(buf, "<u8")[1::self.geometry.block_bytes // 8]
        is_magic: npt.NDArray[np.bool_] = words == np.uint64(self.magic)
        return is_magic

    def _read_bucket(self, place: _Place) -> JournalBucket:
        sector, bucket_bytes = self.geometry.sector_of(place.bucket), self.geometry.bucket_bytes
        entries_bytes = min(ENTRIES_BYTES, bucket_bytes)
        length_bytes = entries_bytes if self.entries_only else min(BUCKET_PIECE_BYTES, bucket_bytes)
        has_more = False
        while True:
            try:
                buf = self.read(sector, length_bytes >> 9)
            except BcachectlError as error:
                if length_bytes > entries_bytes and not has_more:
                    # It may be only what stands behind the entries.
                    length_bytes = entries_bytes
                    continue
                where = f"journal bucket {place.number}"
                return JournalBucket(place.number, damage=damage_of(error, JOURNAL_BUCKET, where, sector,
                                                                    length_bytes >> 9))
            end = self._end(buf)
            if length_bytes == bucket_bytes or end + JSET_MAX_BYTES <= length_bytes:
                return self._judge(place, buf)
            length_bytes, has_more = bucket_bytes, True

    def _end(self, buf: Buffer) -> int:
        # The byte where the entries end.
        found = walk_journal_bucket(buf, magic=self.magic, block_bytes=self.geometry.block_bytes)
        return found[-1][0] + found[-1][1].blocks * self.geometry.block_bytes if found else 0

    def _judge(self, place: _Place, buf: Buffer) -> JournalBucket:
        # The start of the bucket, in which all entries are.
        geometry, sector = self.geometry, self.geometry.sector_of(place.bucket)
        block_bytes, where = geometry.block_bytes, f"journal bucket {place.number}"
        found = walk_journal_bucket(buf, magic=self.magic, block_bytes=block_bytes)
        end = found[-1][0] + found[-1][1].blocks * block_bytes if found else 0
        entries = [Record(f"journal entry {jset.seq} in bucket {place.number}", sector + (offset_bytes >> 9),
                          jset.blocks * geometry.block_size_sectors, JournalEntry(place.number, offset_bytes, jset))
                   for offset_bytes, jset in found]
        why = judge_jset(buf, end, magic=self.magic, limit_bytes=len(buf) - end) if end < len(buf) else ""
        damage = None
        if why in ("too big", "bad csum"):
            damage = Damage("JOURNAL_TORN", f"{where}, byte {end}", why, sector + (end >> 9), 1, is_harmless=True)
        is_exhausted = not self.entries_only and self._is_exhausted(place, buf, end)
        is_blank = end + 8 <= len(buf) and not any(buf[end:end + 8])
        return JournalBucket(place.number, entries, damage, is_exhausted, is_blank)

    def _is_exhausted(self, place: _Place, buf: Buffer, end: int) -> bool:
        rest = self.geometry.bucket_bytes - len(buf)
        if self._begins(memoryview(buf)[end:]).any():
            return False
        try:
            sector = self.geometry.sector_of(place.bucket) + (len(buf) >> 9)
            return not rest or not self._begins(self.read(sector, rest >> 9)).any()
        except BcachectlError:
            return False
