# SPDX-License-Identifier: GPL-2.0-only
"""What of a cache device is metadata: `collect` gives it region by region, for an image that holds no data of anybody.

It goes by a finished `Check`, that is, by what fsck looked at.  Damage does not stop it, bytes are taken as they are:

1. `plan` lists the buckets: the journal, the chain of prio sets as far as it leads, uuid arrays (older ones too, as far
   as they look like one), every btree node that the walk met, good or damaged.  If the tree is damaged, also every
   bucket whose first sector has the magic of a btree set or a prio set.
2. Of each bucket `_Filter` keeps the blocks that belong to such a structure.  Behind the log of a node, and between the
   journal's entries, stands what the bucket held before: data of users.  It is left out.
3. Sectors that cannot be read are named in `Region.bad`.

Where a structure is damaged nobody knows for certain what belongs to it.  So whoever makes an image runs fsck on the
result; if that finds anything else, ``keep_all`` takes the structures as long as they can be.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from bcachectl.errors import BcachectlError
from bcachectl.fsck.check import Check
from bcachectl.fsck.findings import Severity
from bcachectl.fsck.walk import Read, Walk
from bcachectl.ondisk import validity
from bcachectl.ondisk.bkey import Bkey
from bcachectl.ondisk.bset import BSET_HEADER_BYTES, BSET_VERSION
from bcachectl.ondisk.crc64 import crc64
from bcachectl.ondisk.geometry import UUID_ENTRY_BYTES, Geometry
from bcachectl.ondisk.jset import JSET_HEADER_BYTES, JSET_MAX_BYTES, JSET_VERSION_UUIDV1, walk_journal_bucket
from bcachectl.ondisk.magic import bset_magic, jset_magic, prio_magic
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, Superblock
from bcachectl.ondisk.uuids import UUID_ENTRY_V0_BYTES, UUID_FLASH_ONLY, decode_uuids

SUPERBLOCK, JOURNAL, PRIO, UUIDS, UUIDS_V0, NODE = "superblock", "journal", "prio", "uuids", "uuids of 64 bytes", "node"
"""Kinds of structures."""
CHAIN_LIMIT = 1 << 16
SCAN_PREFIXES = ("JOURNAL_", "PRIO_", "UUID_", "BTREE_", "BUCKET_", "SB_")
"""Findings after which metadata is looked for by magic."""


@dataclass(slots=True)
class Region:
    """Sectors [sector, sector + len(keep)) of a device, and what of them is kept.

    ``headers`` are structures with a checksum in their first eight bytes and a magic in the next: offset -> the byte
    behind what the checksum covers.  ``uuids`` are uuid arrays: offset, end, bytes of an entry.
    """

    sector: int
    buf: bytearray
    keep: npt.NDArray[np.bool_]
    bad: npt.NDArray[np.bool_]
    kinds: tuple[str, ...]
    headers: dict[int, int] = field(default_factory=dict)
    uuids: list[tuple[int, int, int]] = field(default_factory=list)

    def runs(self) -> Iterator[tuple[int, int, bool]]:
        """(first sector, end sector, readable) of what is kept or unreadable, in order; counted from the region."""
        state = np.where(self.bad, 2, np.where(self.keep, 1, 0))
        edges = [0, *(np.flatnonzero(state[1:] != state[:-1]) + 1).tolist(), len(state)]
        for start, end in pairwise(edges):
            if start < end and state[start]:
                yield start, end, bool(state[start] == 1)


class Touched:
    """Reads on behalf of a check and notes where more than one sector was read."""

    def __init__(self, read: Read) -> None:
        self.read_through = read
        self.ranges: set[tuple[int, int]] = set()

    def read(self, sector: int, count: int) -> bytes:
        """Read whole sectors."""
        if count > 1:
            self.ranges.add((sector, count))
        return self.read_through(sector, count)


def superblock_region(read: Read) -> Region:
    """The superblock of any device."""
    buf, bad = read_carefully(read, SB_SECTOR, SB_BYTES >> 9)
    return Region(SB_SECTOR, buf, np.ones(len(bad), np.bool_), bad, (SUPERBLOCK,))


def plan(check: Check, touched: Touched) -> dict[int, list[tuple[str, int]]]:
    """Bucket -> the structures that may be in it, each with its length in sectors."""
    walk = check.walk
    sb, found = walk.superblock, _Buckets(walk.geometry)
    if sb is None or not sb.is_cache or not sb.cache_sync:
        return {}
    for bucket in sb.d:
        found.add(JOURNAL, bucket, walk.geometry.bucket_size_sectors)
    for entry in [*walk.journal]:
        newest = walk.newest is not None and entry.jset.seq == walk.newest.seq
        kind = UUIDS if entry.jset.version >= JSET_VERSION_UUIDV1 else UUIDS_V0
        key = entry.jset.uuid_bucket
        if not validity.btree_ptr_invalid(key, walk.geometry) and (
                _is_uuid_array(walk, key) or (newest and not _is_used_again(walk, key))):
            found.add(kind, walk.geometry.bucket_of(key.ptrs[0].sector), key.size)
        if newest and sb.nr_this_dev < len(entry.jset.prio_bucket):
            for bucket in _prio_chain(walk, entry.jset.prio_bucket[sb.nr_this_dev]):
                found.add(PRIO, bucket, walk.geometry.meta_sectors)
    for bucket, what in check.claims.items():
        if "node" in what:
            found.add(NODE, bucket, walk.geometry.node_sectors)
    for slot in check.slots:
        for ptr in (slot.leaf, slot.lost):
            if ptr is not None:
                found.add(NODE, walk.geometry.bucket_of(ptr.sector), slot.nsectors)
    for finding in check.findings:
        if finding.bucket is not None and finding.structure.startswith("btree node"):
            found.add(NODE, finding.bucket, walk.geometry.node_sectors)
    _add_touched(found, touched, walk)
    if any(finding.severity is Severity.ERROR and finding.code.startswith(SCAN_PREFIXES)
           for finding in check.findings):
        _add_by_magic(found, walk, sb)
    return dict(sorted(found.by_bucket.items()))


def collect(check: Check, read: Read, buckets: dict[int, list[tuple[str, int]]], *,
            keep_all: bool = False) -> Iterator[Region]:
    """The regions of a cache device in ascending order."""
    yield superblock_region(read)
    walk, sb = check.walk, check.walk.superblock
    if sb is None:
        return
    damaged = {finding.bucket for finding in check.findings if finding.severity > Severity.NOTE}
    damaged |= {bucket for bucket, what in check.claims.items() if what == "damaged btree node"}
    keep = _Filter(walk.geometry, sb.set_uuid, keep_all)
    for bucket, structures in buckets.items():
        sector = walk.geometry.sector_of(bucket)
        count = min(max(nsectors for _kind, nsectors in structures), walk.size_sectors - sector)
        if sector < SB_SECTOR + (SB_BYTES >> 9) or count <= 0:
            continue
        buf, bad = read_carefully(read, sector, count)
        region = Region(sector, buf, np.zeros(count, np.bool_), bad, tuple(kind for kind, _nsectors in structures))
        for kind, nsectors in structures:
            keep.mark(region, kind, min(nsectors, count),
                      is_damaged=bucket in damaged or bucket not in check.claims)
        gone = np.repeat(~region.keep, 512)
        np.frombuffer(region.buf, np.uint8)[gone] = 0
        yield region


def read_carefully(read: Read, sector: int, count: int) -> tuple[bytearray, npt.NDArray[np.bool_]]:
    """Sectors as far as they can be read, and which of them cannot; those are zeros."""
    bad = np.zeros(count, np.bool_)
    try:
        return bytearray(read(sector, count)), bad
    except BcachectlError:
        if count == 1:
            bad[0] = True
            return bytearray(512), bad
    half = count // 2
    left, left_bad = read_carefully(read, sector, half)
    right, right_bad = read_carefully(read, sector + half, count - half)
    return left + right, np.concatenate([left_bad, right_bad])


class _Buckets:
    # The structures by bucket; what points out of the device is left out.

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.by_bucket: dict[int, list[tuple[str, int]]] = {}

    def add(self, kind: str, bucket: int, nsectors: int) -> None:
        if not 0 <= bucket < self.geometry.nbuckets or not nsectors:
            return
        structures = self.by_bucket.setdefault(bucket, [])
        structure = (kind, min(nsectors, self.geometry.bucket_size_sectors))
        if structure not in structures:
            structures.append(structure)


def _prio_chain(walk: Walk, bucket: int) -> Iterator[int]:
    # As far as the pointers lead, whatever the checksums say.
    for _number in range(min(walk.geometry.prio_buckets, CHAIN_LIMIT)):
        if not walk.geometry.first_bucket <= bucket < walk.geometry.nbuckets:
            return
        yield bucket
        buf, bad = read_carefully(walk.read, walk.geometry.sector_of(bucket), 1)
        if bad[0]:
            return
        bucket = int.from_bytes(buf[32:40], "little")


def _is_uuid_array(walk: Walk, key: Bkey) -> bool:
    # There is no checksum; an array has free slots, and nothing in its padding.
    if key.size != walk.geometry.meta_sectors:
        return False
    try:
        entries = decode_uuids(walk.read(key.ptrs[0].sector, key.size))
    except BcachectlError:
        return False
    is_odd = any(any(entry.pad) or entry.flags & ~UUID_FLASH_ONLY.mask for entry in entries)
    return any(entry.is_free for entry in entries) and not is_odd


def _is_used_again(walk: Walk, key: Bkey) -> bool:
    # The bucket of the array has a newer generation, and what is there does not look like an array: anybody's data.
    if not validity.ptr_stale(key, walk.geometry, walk.gens):
        return False
    try:
        entries = decode_uuids(walk.read(key.ptrs[0].sector, key.size))
    except BcachectlError:
        return False
    return any(any(entry.pad) or entry.flags & ~UUID_FLASH_ONLY.mask for entry in entries)


def _add_touched(found: _Buckets, touched: Touched, walk: Walk) -> None:
    # What fsck read besides, where it has the magic of a set: nodes that only a damaged one led to.
    assert walk.superblock is not None
    magic = bset_magic(walk.superblock.set_uuid).to_bytes(8, "little")
    size = walk.geometry.bucket_size_sectors
    for sector, count in sorted(touched.ranges):
        for bucket in range(sector // size, (sector + count - 1) // size + 1):
            if bucket in found.by_bucket or bucket < walk.geometry.first_bucket:
                continue
            nsectors = min(walk.geometry.node_sectors, walk.size_sectors - bucket * size)
            buf, _bad = read_carefully(walk.read, bucket * size, max(nsectors, 0))
            if any(buf[at + 8:at + 16] == magic for at in range(0, len(buf), walk.geometry.block_bytes)):
                found.add(NODE, bucket, nsectors)


def _add_by_magic(found: _Buckets, walk: Walk, sb: Superblock) -> None:
    node, prio = bset_magic(sb.set_uuid).to_bytes(8, "little"), prio_magic(sb.set_uuid).to_bytes(8, "little")
    for bucket in range(sb.first_bucket, min(sb.nbuckets, walk.size_sectors // sb.bucket_size)):
        try:
            magic = walk.read(walk.geometry.sector_of(bucket), 1)[8:16]
        except BcachectlError:
            continue
        if magic == node:
            found.add(NODE, bucket, walk.geometry.node_sectors)
        elif magic == prio:
            found.add(PRIO, bucket, walk.geometry.meta_sectors)


class _Filter:
    # Which blocks of a structure belong to it.

    def __init__(self, geometry: Geometry, set_uuid: bytes, keep_all: bool) -> None:
        self.geometry, self.keep_all = geometry, keep_all
        self.jset, self.prio, self.bset = jset_magic(set_uuid), prio_magic(set_uuid), bset_magic(set_uuid)

    def mark(self, region: Region, kind: str, nsectors: int, *, is_damaged: bool) -> None:
        """Add what belongs to one structure at the start of the region to what is kept of it."""
        if self.keep_all or kind in (UUIDS, UUIDS_V0):
            region.keep[:nsectors] = True
        if kind in (UUIDS, UUIDS_V0):
            entry_bytes = UUID_ENTRY_BYTES if kind == UUIDS else UUID_ENTRY_V0_BYTES
            region.uuids.append((0, (nsectors << 9) // entry_bytes * entry_bytes, entry_bytes))
        elif kind == JOURNAL:
            self._journal(region, nsectors)
        elif kind == PRIO:
            self._prio(region, nsectors)
        elif kind == NODE:
            self._node(region, nsectors, is_damaged)

    def _keep(self, region: Region, start: int, end: int) -> None:
        # Bytes to whole blocks.
        block = self.geometry.block_size_sectors
        region.keep[(start >> 9) // block * block:-(-end // 512 // block) * block] = True

    def _blocks(self, region: Region, nsectors: int, word: int) -> npt.NDArray[np.uint64]:
        # One word of the first sector of each block.
        count = nsectors // self.geometry.block_size_sectors
        words = np.frombuffer(region.buf, "<u8", count * self.geometry.block_bytes // 8).reshape(count, -1)
        column: npt.NDArray[np.uint64] = words[:, word]
        return column

    def _journal(self, region: Region, nsectors: int) -> None:
        block_bytes, limit = self.geometry.block_bytes, nsectors << 9
        at = [int(block) * block_bytes for block in np.flatnonzero(self._blocks(region, nsectors, 1) == self.jset)]
        for number, offset in enumerate(at):
            length = JSET_HEADER_BYTES + struct.unpack_from("<I", region.buf, offset + 28)[0] * 8
            if length <= min(JSET_MAX_BYTES, limit - offset):
                region.headers[offset] = offset + length
            else:
                length = min([JSET_MAX_BYTES, limit - offset, *(later - offset for later in at[number + 1:number + 2])])
            self._keep(region, offset, offset + length)
        # An entry whose magic alone is damaged ends the bucket; its checksum tells.
        entries = walk_journal_bucket(region.buf, magic=self.jset, block_bytes=block_bytes)
        end = entries[-1][0] + entries[-1][1].blocks * block_bytes if entries else 0
        if end + JSET_HEADER_BYTES > limit or end in region.headers:
            return
        length = JSET_HEADER_BYTES + struct.unpack_from("<I", region.buf, end + 28)[0] * 8
        if length > min(JSET_MAX_BYTES, limit - end):
            return
        body = self.jset.to_bytes(8, "little") + region.buf[end + 16:end + length]
        if crc64(body) == struct.unpack_from("<Q", region.buf, end)[0]:
            region.headers[end] = end + length
            self._keep(region, end, end + length)

    def _prio(self, region: Region, nsectors: int) -> None:
        length = nsectors << 9
        csum, magic = struct.unpack_from("<QQ", region.buf)
        if self.keep_all or magic == self.prio or csum == crc64(memoryview(region.buf)[8:length]):
            region.keep[:nsectors] = True
            region.headers[0] = length

    def _node(self, region: Region, nsectors: int, is_damaged: bool) -> None:
        block_bytes = self.geometry.block_bytes
        blocks = nsectors // self.geometry.block_size_sectors
        if not blocks:
            return
        magics, seqs = self._blocks(region, nsectors, 1), self._blocks(region, nsectors, 2)
        log = list(self._log(region, blocks, seqs))
        end = log[-1][1] if log else 0
        starts = {block for block, _end in log}
        if end < blocks and self._is_plausible(region, end, blocks):
            starts.add(end)
        starts |= {int(block) for block in np.flatnonzero((seqs == seqs[0]) & (seqs != 0)) if int(block) >= end}
        if is_damaged:
            starts |= {int(block) for block in np.flatnonzero(magics == self.bset)}
        last = 0
        for block in sorted(starts):
            keys = struct.unpack_from("<I", region.buf, block * block_bytes + 28)[0]
            set_end = block + self._set_blocks(keys)
            offset = block * block_bytes
            # A bad pointer may lead to another structure, which has its own headers.
            is_ours = set(region.kinds) == {NODE} or int(magics[block]) == self.bset
            if set_end <= blocks and is_ours:
                region.headers[offset] = offset + BSET_HEADER_BYTES + keys * 8
            last = max(last, set_end if set_end <= blocks else blocks)
        if starts:
            self._keep(region, 0, last * block_bytes)
        elif not self.keep_all:
            # Nothing here looks like a node: the header says what is wrong, the rest may be anybody's.
            region.buf[BSET_HEADER_BYTES:512] = bytes(512 - BSET_HEADER_BYTES)
            region.keep[:1] = True

    def _log(self, region: Region, blocks: int, seqs: npt.NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
        # The sets as the kernel finds them, by the node's number alone.
        block = 0
        while block < blocks and seqs[0] and seqs[block] == seqs[0] and self._is_plausible(region, block, blocks):
            keys = struct.unpack_from("<I", region.buf, block * self.geometry.block_bytes + 28)[0]
            yield block, block + self._set_blocks(keys)
            block += self._set_blocks(keys)

    def _set_blocks(self, keys: int) -> int:
        return -(-(BSET_HEADER_BYTES + keys * 8) // self.geometry.block_bytes)

    def _is_plausible(self, region: Region, block: int, blocks: int) -> bool:
        version, keys = struct.unpack_from("<II", region.buf, block * self.geometry.block_bytes + 24)
        seq = struct.unpack_from("<Q", region.buf, block * self.geometry.block_bytes + 16)[0]
        may_be_empty = seq and not block
        return bool(version <= BSET_VERSION and block + self._set_blocks(keys) <= blocks and (keys or may_be_empty))
