# SPDX-License-Identifier: GPL-2.0-only
"""A superblock for a cache device whose own cannot be believed: `guess_superblock`.

What the damaged superblock still says is taken where the rest of the device bears it out; the rest is found there:

1. Journal entries, without knowing the set: an entry checks itself, and its magic tells the first half of the set uuid,
   which is all that any magic needs.
2. The newest entry names the bucket of the first prio set.  The bucket size is the one that puts a prio set there, and
   the root and the uuid array at the start of a bucket.
3. The places of the entries behind each other tell the block size.
4. Without any entry, bucket size and set uuid have to be known, and are believed if buckets of that
   size hold prio sets or btree nodes of that set (`EVIDENCE_BUCKETS`).  What a start needs is gone then, but what is
   left can be looked at.

The journal stands at the start of the device, so only that is searched (`SCAN_LIMIT_SECTORS`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from bcachectl.errors import BcachectlError, Corrupt
from bcachectl.fsck.check import Check
from bcachectl.fsck.check_backing import Backing, read_backing
from bcachectl.fsck.check_sizes import journal_shortfall
from bcachectl.fsck.flags import cache_flags
from bcachectl.fsck.walk import Read
from bcachectl.ondisk.crc64 import crc64
from bcachectl.ondisk.geometry import PAGE_SECTORS, Geometry
from bcachectl.ondisk.jset import JSET_HEADER_BYTES, JSET_MAX_BYTES, JSET_VERSION, Jset, decode_jset
from bcachectl.ondisk.magic import BCACHE_MAGIC, JSET_MAGIC, bset_magic, prio_magic
from bcachectl.ondisk.superblock import (
    CACHE_VERSIONS,
    CDEV_WITH_FEATURES,
    CDEV_WITH_UUID,
    FEATURE_INCOMPAT_LARGE_BUCKET,
    SB_BYTES,
    SB_JOURNAL_BUCKETS,
    SB_SECTOR,
    Superblock,
    check_superblock,
    decode_superblock,
    parse_superblock,
)

SCAN_LIMIT_SECTORS = 1 << 23
CHUNK_SECTORS = 2048
EVIDENCE_BUCKETS = 1 << 16
"""So many buckets are looked at for structures of a set that left no journal entry."""
BUCKET_SIZES = tuple(1 << shift for shift in range(3, 24))
BLOCK_SIZES = (8, 4, 2, 1)
RAW_BUCKET_SIZE_MAX = 32768


class _Found(NamedTuple):
    # A journal entry and the sector it stands at.
    sector: int
    magic: int
    jset: Jset


def open_check(read: Read, size_sectors: int, backings: Sequence[Backing] = (), *, bucket_size: int | None = None,
               set_uuid: bytes | None = None, logical_block_sectors: int = 1, fd: int = -1,
               looking: Read | None = None) -> Check:
    """A check of a cache device, by a guessed superblock if its own is damaged or is not what the caller knows.

    ``looking`` reads what it takes to find that.
    """
    check = Check(read, size_sectors, backings, fd=fd, instead=superblock_instead(
        looking or read, size_sectors, backings, bucket_size=bucket_size, set_uuid=set_uuid))
    check.walk.logical_block_sectors = logical_block_sectors
    return check


def superblock_instead(read: Read, size_sectors: int, backings: Sequence[Backing] = (), *,
                       bucket_size: int | None = None, set_uuid: bytes | None = None) -> Superblock | None:
    """What to go by in place of the device's own superblock; None if that one is good, or nothing better is found."""
    if not superblock_problem(read, size_sectors, bucket_size=bucket_size, set_uuid=set_uuid):
        return None
    guess = guess_superblock(read, size_sectors, backings, bucket_size=bucket_size, set_uuid=set_uuid)
    if guess is not None and not superblock_problem(read, size_sectors):
        # It is good by itself and contradicts what was given; so does the device.
        own = decode_superblock(read(SB_SECTOR, SB_BYTES >> 9))
        if (own.set_uuid, own.block_size, own.bucket_size, own.d) == (guess.set_uuid, guess.block_size,
                                                                      guess.bucket_size, guess.d):
            return None
    return guess


def superblock_problem(read: Read, size_sectors: int, *, bucket_size: int | None = None,
                       set_uuid: bytes | None = None) -> str:
    """What is wrong with the superblock, by itself or against what is known better, empty if nothing is."""
    try:
        sb = decode_superblock(read(SB_SECTOR, SB_BYTES >> 9))
        check_superblock(sb, device_sectors=size_sectors, for_kernel=False)
    except BcachectlError as error:
        return error.why if isinstance(error, Corrupt) else str(error)
    if not sb.is_cache:
        return ""
    if bucket_size not in (None, sb.bucket_size) or set_uuid not in (None, sb.set_uuid):
        return "it contradicts what was given"
    within, behind = journal_shortfall(read, sb) if sb.cache_sync else (0, 0)
    return "too few journal buckets" if behind > within else ""


def guess_superblock(read: Read, size_sectors: int, backings: Sequence[Backing] = (), *,
                     bucket_size: int | None = None, set_uuid: bytes | None = None) -> Superblock | None:
    """The superblock that the device should have; None if there is too little to go by."""
    try:
        raw = read(SB_SECTOR, SB_BYTES >> 9)
    except BcachectlError:
        raw = bytes(SB_BYTES)
    old = parse_superblock(raw)
    guess = _guess(read, size_sectors, backings, old, bucket_size, set_uuid)
    return replace(guess, flags=cache_flags(guess, raw)) if guess is not None else None


def _guess(read: Read, size_sectors: int, backings: Sequence[Backing], old: Superblock, bucket_size: int | None,
           set_uuid: bytes | None) -> Superblock | None:
    # But for the flags, which are as they were.
    if old.is_backing and old.magic == BCACHE_MAGIC and set_uuid is None:
        return None
    entries = _scan(read, size_sectors, (JSET_MAGIC ^ int.from_bytes(set_uuid[:8], "little")) if set_uuid else None)
    if not entries:
        return _without_journal(read, size_sectors, old, bucket_size or old.bucket_size, set_uuid or old.set_uuid)
    newest = max(entries, key=lambda entry: entry.jset.seq)
    entries = [entry for entry in entries if entry.magic == newest.magic]
    half = _half_of(newest.magic)
    # What is damaged counts last: the first half may be right and the second not.
    known = [set_uuid or b"", *(sb.set_uuid for sb in map(_superblock_of, backings) if sb is not None), old.set_uuid]
    full = next((uuid for uuid in known if uuid[:8] == half and len(uuid) == 16), half + half)
    size = _bucket_size(read, size_sectors, newest.jset, full, [bucket_size or 0, old.bucket_size])
    if not size:
        return None
    return _compose(old, entries, size_sectors, size, full)


def _without_journal(read: Read, size_sectors: int, old: Superblock, size: int, set_uuid: bytes) -> Superblock | None:
    if size not in BUCKET_SIZES or not any(set_uuid):
        return None
    if not _has_structures(read, size_sectors, size, set_uuid):
        return None
    # The smallest block, unless a larger one is known: every structure starts at one of those too.
    if old.block_size not in BLOCK_SIZES:
        old = replace(old, block_size=1)
    return _compose(old, [], size_sectors, size, set_uuid)


def _has_structures(read: Read, size_sectors: int, size: int, set_uuid: bytes) -> bool:
    # A prio set tells the bucket size by its checksum; a node tells the set.
    node, prio = (magic(set_uuid).to_bytes(8, "little") for magic in (bset_magic, prio_magic))
    prio_bytes = Geometry(1, size, size_sectors // size, 1).meta_sectors << 9
    has_node = has_other_prio = False
    for bucket in range(1, min(size_sectors // size, EVIDENCE_BUCKETS)):
        magic = _read_around(read, bucket * size, 1)[8:16]
        has_node |= magic == node
        if magic == prio:
            buf = _read_around(read, bucket * size, prio_bytes >> 9)
            if int.from_bytes(buf[:8], "little") == crc64(memoryview(buf)[8:]):
                return True
            has_other_prio = True
    return has_node and not has_other_prio


def set_halves(read: Read, size_sectors: int) -> list[bytes]:
    """The first 8 bytes of the uuid of each set that left journal entries here, the one with the newest entry first."""
    newest: dict[int, int] = {}
    for entry in _scan(read, size_sectors, None):
        newest[entry.magic] = max(newest.get(entry.magic, 0), entry.jset.seq)
    return [_half_of(magic) for magic in sorted(newest, key=lambda magic: -newest[magic])]


def _half_of(magic: int) -> bytes:
    return (magic ^ JSET_MAGIC).to_bytes(8, "little")


def _compose(old: Superblock, entries: list[_Found], size_sectors: int, size: int, set_uuid: bytes) -> Superblock:
    block_size = _block_size(entries, size, old.block_size)
    fits = old.nbuckets * size <= size_sectors and old.nbuckets * size * 10 > size_sectors * 9
    nbuckets = old.nbuckets if fits else size_sectors // size
    first_bucket = 23 // size + 1
    if entries and first_bucket < old.first_bucket <= min(entry.sector for entry in entries) // size:
        first_bucket = old.first_bucket
    buckets = {entry.sector // size for entry in entries}
    count = _journal_length(buckets, first_bucket, Geometry(block_size, size, nbuckets, first_bucket).njournal_default)
    if 0 < old.keys <= SB_JOURNAL_BUCKETS and _journal_length(buckets, first_bucket, old.keys) == old.keys:
        count = old.keys
    is_large = size > RAW_BUCKET_SIZE_MAX
    version = old.version if old.version in CACHE_VERSIONS else CDEV_WITH_UUID
    if is_large:
        version = CDEV_WITH_FEATURES
    uuid = old.uuid if any(old.uuid) else hashlib.sha256(b"cache" + set_uuid).digest()[:16]
    return Superblock(
        version=version, uuid=uuid, set_uuid=set_uuid, label=old.label, flags=old.flags, seq=old.seq,
        feature_incompat=FEATURE_INCOMPAT_LARGE_BUCKET if is_large else 0, nbuckets=nbuckets, block_size=block_size,
        bucket_size_raw=size.bit_length() - 1 if is_large else size, nr_in_set=1, nr_this_dev=0,
        last_mount=old.last_mount, first_bucket=first_bucket, keys=count,
        d=tuple(range(first_bucket, first_bucket + count)))


def _journal_length(buckets: set[int], first_bucket: int, likely: int) -> int:
    # How many buckets the journal has if it should have ``likely``: more if there are entries in most of those behind.
    # A few may be anywhere: they were written to a wrong place, or are another journal's in somebody's data.
    end = first_bucket + likely
    behind = sorted(bucket for bucket in buckets if end <= bucket < first_bucket + SB_JOURNAL_BUCKETS)
    last = max((bucket for number, bucket in enumerate(behind, 1) if number * 2 > bucket - end), default=end - 1)
    return last - first_bucket + 1


def _superblock_of(backing: Backing) -> Superblock | None:
    return read_backing(backing)[0]


def _scan(read: Read, size_sectors: int, magic: int | None) -> list[_Found]:
    # Every journal entry at the start of the device, whatever set it is of, unless ``magic`` says so.
    found: list[_Found] = []
    for start in range(0, min(size_sectors, SCAN_LIMIT_SECTORS), CHUNK_SECTORS):
        count = min(CHUNK_SECTORS + (JSET_MAX_BYTES >> 9), size_sectors - start)
        buf = _read_around(read, start, count)
        words = np.frombuffer(buf, "<u8").reshape(-1, 64)[:CHUNK_SECTORS]
        lengths = np.frombuffer(buf, "<u4").reshape(-1, 128)[:CHUNK_SECTORS]
        rows = (lengths[:, 6] == JSET_VERSION) & (lengths[:, 7] <= JSET_MAX_BYTES // 8) & (words[:, 2] > 0)
        rows &= (words[:, 4] > 0) & (words[:, 4] <= words[:, 2]) & (words[:, 5] >> np.uint64(63) == 1)
        for row in np.flatnonzero(rows).tolist():
            offset, own = row << 9, int(words[row, 1])
            length = JSET_HEADER_BYTES + int(lengths[row, 7]) * 8
            if magic not in (None, own) or int(words[row, 0]) != crc64(buf[offset + 8:offset + length]):
                continue
            jset = decode_jset(buf, offset, magic=own, block_bytes=512, limit_bytes=len(buf) - offset)
            if jset is not None:
                found.append(_Found(start + row, own, jset))
    return found


def _read_around(read: Read, start: int, count: int) -> bytes:
    # Zeros where a page cannot be read.
    try:
        return read(start, count)
    except BcachectlError:
        if count <= PAGE_SECTORS:
            return bytes(count << 9)
    return b"".join(_read_around(read, at, min(PAGE_SECTORS, start + count - at))
                    for at in range(start, start + count, PAGE_SECTORS))


def _bucket_size(read: Read, size_sectors: int, newest: Jset, set_uuid: bytes, likely: list[int]) -> int:
    # A root, and the uuid array, stand at the start of a bucket: that rules out what an old prio set elsewhere says.
    sectors = [key.ptrs[0].sector for key in (newest.btree_root, newest.uuid_bucket) if key.ptrs]
    good = [size for size in dict.fromkeys([*likely, *BUCKET_SIZES]) if size in BUCKET_SIZES]
    fitting = [size for size in good if all(sector % size == 0 for sector in sectors)]
    by_prio_set = [size for size in good if _has_prio_set(read, size_sectors, newest.prio_bucket[0] * size, set_uuid)]
    found = [size for size in by_prio_set if size in fitting]
    # The prio set may be gone as well.
    found += [size for size in fitting if sectors and size in likely]
    return (found or by_prio_set or [0])[0]


def _has_prio_set(read: Read, size_sectors: int, sector: int, set_uuid: bytes) -> bool:
    try:
        return 0 < sector < size_sectors and read(sector, 1)[8:16] == prio_magic(set_uuid).to_bytes(8, "little")
    except BcachectlError:
        return False


def _block_size(entries: list[_Found], bucket_size: int, likely: int) -> int:
    by_sector = sorted(entries)
    for size in dict.fromkeys([likely, *BLOCK_SIZES]):
        if size not in BLOCK_SIZES or any(entry.sector % size for entry in entries):
            continue
        is_consistent = True
        for before, after in pairwise(by_sector):
            sectors = -(-(JSET_HEADER_BYTES + len(before.jset.keys)) // (size << 9)) * size
            if after.jset.seq == before.jset.seq + 1 and before.sector // bucket_size == after.sector // bucket_size:
                is_consistent &= before.sector + sectors == after.sector
        if is_consistent:
            return size
    return 1
