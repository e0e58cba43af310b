# SPDX-License-Identifier: GPL-2.0-only
"""Rules about the journal that need more than one entry, and entries that the kernel's own reading cannot reach.

`leftovers` finds every valid entry in all journal buckets, block by block, whatever stands before it.  A power failure
tears at most the newest entry, so no entry behind a damaged one may be newer than the newest that can be reached; if
one is, an entry in the middle was damaged later, and the kernel would take an old state for the current one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bcachectl.errors import BcachectlError, Corrupt
from bcachectl.fsck.findings import Finding
from bcachectl.fsck.records import JournalEntry
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.bkey import INODE_SHIFT
from bcachectl.ondisk.crc64 import crc64
from bcachectl.ondisk.jset import JSET_HEADER_BYTES, JSET_MAX_BYTES, JSET_VERSION, decode_jset
from bcachectl.ondisk.magic import jset_magic
from bcachectl.units import counted


def check_journal(walk: Walk) -> Iterator[Finding]:
    """Every rule about numbers, order and keys of the entries."""
    yield from _check_numbers(walk)
    yield from _check_ring(walk)
    yield from _check_keys(walk)
    newest = walk.newest
    if newest is None:
        return
    beyond = [entry for entry in leftovers(walk) if entry.jset.seq > newest.seq]
    if beyond:
        last = max(entry.jset.seq for entry in beyond)
        yield Finding("JOURNAL_CSUM", f"journal bucket {beyond[0].index}",
                      f"entries up to {last} cannot be reached; the newest that can is {newest.seq}",
                      sector=_sector(walk, beyond[0]))
    yield from _wrong_magics(walk)
    yield from _check_full(walk)


def leftovers(walk: Walk) -> Iterator[JournalEntry]:
    """Valid entries in the journal buckets that a walk from the bucket's start does not reach."""
    sb, geometry = walk.superblock, walk.geometry
    assert sb is not None
    magic, block_bytes = jset_magic(sb.set_uuid), geometry.block_bytes
    reached = _ends(walk)
    for index, bucket in enumerate(sb.d):
        if index in walk.journal_exhausted:
            continue
        try:
            buf = walk.read(geometry.sector_of(bucket), geometry.bucket_size_sectors)
        except BcachectlError:
            continue
        magics = np.frombuffer(buf, "<u8").reshape(-1, block_bytes // 8)[:, 1]
        for block in np.flatnonzero(magics == magic).tolist():
            offset_bytes = block * block_bytes
            if offset_bytes < reached.get(index, 0):
                continue
            jset = decode_jset(buf, offset_bytes, magic=magic, block_bytes=block_bytes,
                               limit_bytes=len(buf) - offset_bytes)
            if jset is not None:
                yield JournalEntry(index, offset_bytes, jset)


def _ends(walk: Walk) -> dict[int, int]:
    # Where the entries that can be reached end, by index of the journal bucket.
    ends: dict[int, int] = {}
    for entry in walk.journal:
        end = entry.offset_bytes + entry.jset.blocks * walk.geometry.block_bytes
        ends[entry.index] = max(ends.get(entry.index, 0), end)
    return ends


def _wrong_magics(walk: Walk) -> Iterator[Finding]:
    # A damaged magic ends a bucket's entries as if nothing had ever stood there.
    sb, geometry = walk.superblock, walk.geometry
    assert sb is not None
    magic = jset_magic(sb.set_uuid).to_bytes(8, "little")
    reached = _ends(walk)
    for index, bucket in enumerate(sb.d):
        if index in walk.journal_blank:
            continue
        end = reached.get(index, 0)
        sector, sectors = geometry.sector_of(bucket) + (end >> 9), min(JSET_MAX_BYTES, geometry.bucket_bytes - end) >> 9
        try:
            buf = walk.read(sector, 1) if sectors else b""
            if not any(buf[:8]) or buf[8:16] == magic:
                continue
            buf = walk.read(sector, sectors)
        except BcachectlError:
            continue
        length = JSET_HEADER_BYTES + int.from_bytes(buf[28:32], "little") * 8
        if len(buf) < length:
            continue
        if int.from_bytes(buf[:8], "little") == crc64(magic + buf[16:length]):
            yield Finding("JOURNAL_TORN", f"journal bucket {index}, byte {end}", "bad magic", sector=sector)


def _check_numbers(walk: Walk) -> Iterator[Finding]:
    by_seq: dict[int, JournalEntry] = {}
    for entry in walk.journal:
        jset = entry.jset
        where, sector = f"journal entry {jset.seq} in bucket {entry.index}", _sector(walk, entry)
        # What no start reads any more, such as what stands behind the entry that a repair has made, need not be right.
        is_needed = jset.seq >= walk.replay[0].jset.seq
        if is_needed and not 0 < jset.last_seq <= jset.seq:
            yield Finding("JOURNAL_LAST_SEQ", where, f"last_seq {jset.last_seq} of entry {jset.seq}", sector=sector)
        if is_needed and jset.version > JSET_VERSION:
            yield Finding("JOURNAL_VERSION", where, f"version {jset.version}", sector=sector)
        other = by_seq.setdefault(jset.seq, entry)
        if other is not entry and other.jset != jset:
            yield Finding("JOURNAL_SEQ_TWICE", where, f"another entry {jset.seq} stands in bucket {other.index}",
                          sector=sector)
    for before, after in zip(walk.replay, walk.replay[1:], strict=False):
        if after.jset.last_seq < before.jset.last_seq:
            yield Finding("JOURNAL_LAST_SEQ", f"journal entry {after.jset.seq} in bucket {after.index}",
                          f"last_seq goes back from {before.jset.last_seq} to {after.jset.last_seq}",
                          sector=_sector(walk, after))


def _check_ring(walk: Walk) -> Iterator[Finding]:
    # Ascending within a bucket; the newest of each bucket ascends around the ring but for one step down.
    highest: dict[int, int] = {}
    by_place = sorted(walk.journal, key=lambda entry: (entry.index, entry.offset_bytes))
    is_broken = False
    for entry in by_place:
        is_broken |= entry.jset.seq <= highest.get(entry.index, 0) and entry.jset.seq >= walk.replay[0].jset.seq
        highest[entry.index] = max(entry.jset.seq, highest.get(entry.index, 0))
    ring = [highest[index] for index in sorted(highest)]
    steps_down = sum(after < before for before, after in zip(ring, [*ring[1:], *ring[:1]], strict=True))
    if is_broken or (len(ring) > 1 and steps_down > 1):
        yield Finding("JOURNAL_RING", "journal", f"newest entries by journal bucket: {ring}")


def _check_full(walk: Walk) -> Iterator[Finding]:
    # A replay that needs a new root waits for room in the journal, which only the replay could make.  Our engine can
    # write an entry without keys again that stands in the last block; a kernel cannot.
    sb, geometry, newest = walk.superblock, walk.geometry, walk.replay[-1]
    assert sb is not None
    following = (newest.index + 1) % len(sb.d)
    needed = {entry.index for entry in walk.replay}
    end = newest.offset_bytes + newest.jset.blocks * geometry.block_bytes
    if end >= geometry.bucket_bytes and following in needed and following != newest.index:
        yield Finding("JOURNAL_FULL", "journal", f"entries {walk.replay[0].jset.seq}-{newest.jset.seq} fill all "
                      f"{len(sb.d)} journal buckets", sector=_sector(walk, newest))


def _check_keys(walk: Walk) -> Iterator[Finding]:
    sound = walk.sound_journal
    if sound is not None and int(sound.pos.max(initial=0)) >> INODE_SHIFT < walk.geometry.nr_uuids:
        return
    for entry, keys in zip(walk.replay, walk.journal_keys, strict=True):
        if isinstance(keys, Corrupt):
            continue  # The walk has said so.
        inodes = keys.pos >> np.uint64(INODE_SHIFT)
        wrong = np.flatnonzero((inodes >= walk.geometry.nr_uuids) & (keys.size > 0))
        if len(wrong):
            yield Finding("JOURNAL_KEY_INODE", f"journal entry {entry.jset.seq} in bucket {entry.index}",
                          f"{counted(len(wrong), 'key')}, the first of device number {int(inodes[wrong[0]])}",
                          sector=_sector(walk, entry))


def _sector(walk: Walk, entry: JournalEntry) -> int:
    assert walk.superblock is not None
    return walk.geometry.sector_of(walk.superblock.d[entry.index]) + (entry.offset_bytes >> 9)
