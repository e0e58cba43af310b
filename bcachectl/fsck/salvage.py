# SPDX-License-Identifier: GPL-2.0-only
"""What can still be known where the btree is damaged: `salvage_sets`, `leaf_map`.

Whoever judges the cost of damage and whoever repairs it must agree, so both ask here.  The rules:

* A set whose checksum holds is believed.  A set that fails is believed about what it *hides*, never about where data
  is: its keys mask what older sets say, and count as lost.  Unless only its header is damaged (`SalvagedSet.is_whole`),
  that is not all that may be lost: the range of the leaf is unknown besides.
* Clean extents of sets older than a damaged one are dropped: the lost set may have said that they are out of date, and
  the backing device has the data.  Dirty ones are kept, they exist nowhere else.
* What a damaged set said is known as far as the journal still says it: entries that need not be replayed any more hold
  the keys that went into the sets (`older_keys`).  They stand where the damaged set stood.  Keys that were replaced
  without the journal (write-back, moving gc, fills) name buckets that were used again, if they are out of date.
* Sectors of a node that cannot be read cost the sets that they belong to, not the node; where a set may have begun in
  one, it is a damaged set, and not the end of the node.  So is a set of which only the journal tells
  (`bcachectl.fsck.lacking`).
* Pointers in a damaged interior node are hints (`bcachectl.fsck.expand`).
* An extent that no kernel accepts hides its range and counts as lost.
* Where a prio set is lost the generations of its buckets are unknown, so nobody can tell whether a clean extent is out
  of date: it is dropped.  Buckets with dirty data are never used again, so dirty extents are kept.
* What lies outside a leaf's range is not the leaf's any more; what it alone says is given to the owner of the range,
  below all else (`bcachectl.fsck.strays`).
* The journal's keys come on top of everything.

Rows of the maps made here carry a tag in the ``csum`` column, whose own meaning no kernel ever used.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Container
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bcachectl.errors import BcachectlError, Corrupt
from bcachectl.fsck import extents as extent
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.live import staleness
from bcachectl.fsck.records import Slot
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk import validity
from bcachectl.ondisk.bkey import (
    INODE_SHIFT,
    MAX_INODE,
    MAX_OFFSET,
    MAX_POS,
    PTR_DEV,
    PTR_OFFSET,
    SECTOR_MASK,
    KeyColumns,
    Ptr,
    decode_key_columns,
    ptr_make,
)
from bcachectl.ondisk.bset import BSET_HEADER_BYTES, BSET_VERSION, decode_node
from bcachectl.ondisk.crc64 import crc64, crc64_seeded
from bcachectl.ondisk.magic import bset_magic

OLDER_KEYS_LIMIT = 1 << 18
"""So many keys of entries that need not be replayed are looked at, the newest."""
PRIO_WRITES_LIMIT = 64
"""Entries from before so many prio writes are not looked at: between two of them the generation of a bucket rises once
when it is to be used again, and once more when a btree node in it is freed.  After 128 times it seems not to have."""
TAG_NONE, TAG_STRAY, TAG_DOUBTED, TAG_JOURNAL, TAG_UNKNOWN_GEN, TAG_LOST, TAG_CONTRADICTED = 0, 1, 2, 5, 6, 7, 8

_HEADER = struct.Struct("<QQQII")


class SalvagedSet(NamedTuple):
    """One set of a node: the block it starts at, its keys as far as they can be read, whether its checksum holds.

    ``is_whole`` says that these are all of its keys, as they were written.
    """

    block: int
    keys: KeyColumns
    is_valid: bool
    is_whole: bool = True


class LeafMap(NamedTuple):
    """A leaf with the journal on top: what is live, what is lost, and dirty extents whose bucket was used again.

    ``too_stale`` are raw keys that the kernel would fail the set for; ``is_unknown`` says that not all is known that
    the leaf held, ``is_lost`` that nothing is.  ``is_clean_unknown``: the journal tells of all dirty data, and of no
    clean extent that a read has filled in.
    """

    kept: Extents
    lost: Extents
    stale_dirty: Extents
    too_stale: Extents
    is_unknown: bool
    is_lost: bool
    is_clean_unknown: bool
    strays: Extents
    """Those of ``kept`` and ``lost`` that another leaf has outside its range."""


class _Node:
    # The bytes of a node and how its sets are judged.

    def __init__(self, buf: bytes, magic: int, seed: int, block_bytes: int) -> None:
        self.view = memoryview(buf)
        self.magic, self.seed, self.block_bytes = magic, seed, block_bytes
        self.blocks = len(buf) // block_bytes
        self.seq = self.header(0)[2]

    def header(self, block: int) -> tuple[int, int, int, int, int]:
        csum, magic, seq, version, keys = _HEADER.unpack_from(self.view, block * self.block_bytes)
        return csum, magic, seq, version, keys

    def set_blocks(self, keys: int) -> int:
        return -(-(BSET_HEADER_BYTES + keys * 8) // self.block_bytes)

    def is_valid(self, block: int, *, seq: int | None = None, magic: int | None = None) -> bool:
        """The set at ``block`` has a good checksum; with ``seq`` or ``magic`` as if it said that."""
        return self._difference(block, seq, magic) == 0

    def has_sure_keys(self, block: int) -> bool:
        """The set at ``block`` has the keys that were written: what is damaged is its header, or one byte of its
        checksum.  No other damage leaves a checksum that differs in one byte, but for one time in 2^53."""
        difference = self._difference(block, self.seq, self.magic)
        return difference is not None and any(not difference & ~(0xFF << shift) for shift in range(0, 64, 8))

    def _difference(self, block: int, seq: int | None, magic: int | None) -> int | None:
        # Between the checksum that is there and the right one; None if the header makes no sense.
        csum, found_magic, found_seq, version, keys = self.header(block)
        if version > BSET_VERSION or block + self.set_blocks(keys) > self.blocks:
            return None
        if (found_magic if magic is None else magic) != self.magic:
            return None
        start = block * self.block_bytes
        body: bytes | memoryview = self.view[start + 8:start + BSET_HEADER_BYTES + keys * 8]
        if seq is not None or magic is not None:
            head = struct.pack("<QQ", self.magic, found_seq if seq is None else seq)
            body = head + bytes(body[16:])
        return csum ^ (crc64_seeded(body, self.seed) if version else crc64(body))

    def vote(self) -> None:
        """Settle which number the node has, if set 0 cannot be believed."""
        # The number that most sets with a good checksum agree on; set 0's own word counts if there is none.
        votes = Counter(self.header(block)[2] for block in range(self.blocks)
                        if self.header(block)[1] == self.magic and self.is_valid(block))
        first = self.header(0)[2]
        if votes and first not in votes:
            self.seq = max(votes, key=lambda seq: votes[seq])

    def next_valid(self, block: int) -> int | None:
        for later in range(block + 1, self.blocks):
            if self.header(later)[2] == self.seq and self.is_valid(later):
                return later
        return None


def salvage_sets(buf: bytes, *, magic: int, seed: int, block_bytes: int,
                 unread: Container[int] = ()) -> list[SalvagedSet]:
    """Every set of a node, oldest first, damaged ones with the keys that still look like keys.

    ``unread`` are blocks that could not be read and are zeros: a set may have begun there.
    """
    node = _Node(buf, magic, seed, block_bytes)
    node.vote()
    found: list[SalvagedSet] = []
    block = 0
    while block < node.blocks:
        _csum, _magic, seq, _version, keys = node.header(block)
        start = block * block_bytes + BSET_HEADER_BYTES
        if seq == node.seq and node.is_valid(block):
            try:
                columns = decode_key_columns(node.view[start:start + keys * 8], keys)
                # Only the first set of a node may be empty; any other has lost its keys.
                found.append(SalvagedSet(block, columns, keys > 0 or not found, keys > 0 or not found))
            except Corrupt:
                found.append(_damaged(node, block, node.view[start:start + keys * 8]))
            block += node.set_blocks(keys)
            continue
        later = node.next_valid(block)
        is_member = (block == 0 or seq == node.seq or later is not None or block in unread
                     or node.is_valid(block, seq=node.seq))
        if not is_member:
            break
        end = (later or node.blocks) * block_bytes
        if start + keys * 8 <= end:
            end = start + keys * 8
        found.append(_damaged(node, block, node.view[start:end]))
        if found[-1].is_whole:
            # The next one stands where it ends, damaged or not.
            block += node.set_blocks(keys)
            continue
        if later is None:
            break
        block = later
    return found


def _damaged(node: _Node, block: int, words: memoryview) -> SalvagedSet:
    # Keys that merely look like keys may have said something else: more dirty data, or other places.
    keys = plausible_keys(words)
    nr_u64s = 2 * len(keys.pos) + int(keys.nptrs.sum())
    return SalvagedSet(block, keys, False, 0 < nr_u64s == node.header(block)[4] and node.has_sure_keys(block))


def has_lost_set(buf: bytes, *, written_blocks: int, magic: int, seed: int, block_bytes: int) -> bool:
    """Behind the log of a good node stands a set of its own with a wrong number or magic, by its checksum."""
    node = _Node(buf, magic, seed, block_bytes)
    if written_blocks >= node.blocks or not written_blocks:
        return False
    return node.header(written_blocks)[4] > 0 and node.is_valid(written_blocks, seq=node.header(0)[2])


def plausible_keys(words: bytes | memoryview) -> KeyColumns:
    """The keys at the start of ``words`` that look like keys in order; junk in between is stepped over."""
    values = struct.unpack(f"<{len(words) // 8}Q", words[:len(words) // 8 * 8])
    good: list[tuple[int, int, int]] = []
    at = last = 0
    while at + 1 < len(values):
        high, low = values[at], values[at + 1]
        nptrs = high >> 60 & 7
        if not high >> 63 or nptrs > 1 or at + 2 + nptrs > len(values):
            break
        is_max = high & MAX_INODE == MAX_INODE and low == MAX_OFFSET
        pos = MAX_POS if is_max else (high & MAX_INODE) << INODE_SHIFT | low & SECTOR_MASK
        if pos >= last and (low <= SECTOR_MASK or is_max):
            good.append((high, pos, values[at + 2] if nptrs else 0))
            last = pos
        at += 2 + nptrs
    high_column = np.array([row[0] for row in good], np.uint64)
    return KeyColumns(
        np.array([row[1] for row in good], np.uint64),
        (high_column >> np.uint64(20) & np.uint64(0xFFFF)).astype(np.uint32),
        (high_column >> np.uint64(36) & np.uint64(1)).astype(np.bool_),
        (high_column >> np.uint64(60) & np.uint64(7)).astype(np.uint8), np.array([row[2] for row in good], np.uint64),
        np.zeros(len(good), np.uint8), high_column)


def read_sets(walk: Walk, ptr: Ptr, nsectors: int) -> list[SalvagedSet] | None:
    """The sets of the node at ``ptr``; None if none of it can be read."""
    assert walk.superblock is not None
    buf, unread = read_what_can_be(walk, ptr.sector, nsectors)
    if buf is None:
        return None
    magic, seed = bset_magic(walk.superblock.set_uuid), ptr_make(ptr.sector, ptr.gen, ptr.dev)
    block_bytes = walk.geometry.block_bytes
    try:
        sets, written_blocks = decode_node(buf, magic=magic, seed=seed, block_bytes=block_bytes,
                                     node_blocks=len(buf) // block_bytes, where="")
    except Corrupt:
        found = salvage_sets(buf, magic=magic, seed=seed, block_bytes=block_bytes, unread=unread)
        if not any(image.is_valid for image in found):
            gen = real_gen(buf, magic, seed, block_bytes)
            if gen is not None:
                return salvage_sets(buf, magic=magic, seed=seed & ~0xFF | gen, block_bytes=block_bytes, unread=unread)
        return found
    # Zeros look like the end of the log, and the newest keys may have stood there.
    if written_blocks in unread or has_lost_set(buf, written_blocks=written_blocks, magic=magic, seed=seed,
                                                block_bytes=block_bytes):
        return salvage_sets(buf, magic=magic, seed=seed, block_bytes=block_bytes, unread=unread)
    return [SalvagedSet(image.block, image.keys, True) for image in sets]


def read_what_can_be(walk: Walk, sector: int, nsectors: int) -> tuple[bytes | None, frozenset[int]]:
    """The bytes of a node with zeros for the blocks that cannot be read, and the numbers of those: no set has a good
    checksum with them.  None if nothing can be read.
    """
    # Halves, since a failing device takes seconds for each request that fails.
    block_sectors = walk.geometry.block_size_sectors
    blocks = nsectors // block_sectors
    try:
        return walk.read(sector, nsectors), frozenset()
    except BcachectlError:
        if blocks < 2:
            return None, frozenset(range(blocks))
    half = blocks // 2
    first, unread = read_what_can_be(walk, sector, half * block_sectors)
    second, others = read_what_can_be(walk, sector + half * block_sectors, nsectors - half * block_sectors)
    unread |= {half + block for block in others}
    if first is None and second is None:
        return None, unread
    return (first or bytes(half * block_sectors << 9)) + (second or bytes(nsectors - half * block_sectors << 9)), unread


def real_gen(buf: bytes, magic: int, seed: int, block_bytes: int) -> int | None:
    """The generation that makes the first set's checksum right, if the pointer's own does not."""
    for gen in range(256):
        node = _Node(buf, magic, seed & ~0xFF | gen, block_bytes)
        if node.header(0)[1] == magic and node.is_valid(0):
            return gen
    return None


# Leaves.

def journal_map(walk: Walk) -> Extents:
    """The journal's keys as a flat map; those that no kernel accepts are tagged as lost."""
    if walk.plain_journal is not None:
        return _retag(walk.plain_journal, np.ones(len(walk.plain_journal.start), np.bool_), TAG_JOURNAL)
    parts: list[Extents] = []
    for entry, found in zip(walk.replay, walk.journal_keys, strict=True):
        keys = plausible_keys(entry.jset.keys) if isinstance(found, Corrupt) else found
        part = _tagged(walk, SalvagedSet(0, keys, keys is found))
        parts.append(_retag(part, part.csum == TAG_NONE, TAG_JOURNAL))
    return extent.flatten(extent.concatenate(parts))


def older_entries(walk: Walk) -> list[tuple[int, Extents]]:
    """The entries before those to be replayed, without a gap, the oldest first: the number and the keys of each."""
    by_seq = {entry.jset.seq: entry.jset for entry in walk.journal}
    seq, words = walk.replay[0].jset.seq if walk.replay else 0, 0
    chains = [walk.prio_chain(entry.jset) for entry in walk.replay]
    prio_writes = sum(one != other for one, other in pairwise(chains))
    found: list[tuple[int, Extents]] = []
    while seq - 1 in by_seq and words < OLDER_KEYS_LIMIT * 3:
        seq -= 1
        jset = by_seq[seq]
        prio_writes += walk.prio_chain(jset) != chains[0]
        chains[0] = walk.prio_chain(jset)
        words += len(jset.keys) // 8
        if prio_writes > PRIO_WRITES_LIMIT:
            break
        try:
            found.append((seq, entry_keys(walk, jset.keys)))
        except Corrupt:
            break
    return found[::-1]


def entry_keys(walk: Walk, keys: bytes) -> Extents:
    """The keys of a journal entry in their order; raises Corrupt."""
    return _tagged(walk, SalvagedSet(0, decode_key_columns(keys, len(keys) // 8), True))


def older_keys(walk: Walk) -> tuple[Extents, bool]:
    """The keys of `older_entries` as a flat map; whether that is all there ever were: the first entry of a set has the
    number 1."""
    if walk.older is None:
        entries = older_entries(walk)
        first = entries[0][0] if entries else walk.replay[0].jset.seq if walk.replay else 0
        walk.older = extent.flatten(extent.concatenate([rows for _seq, rows in entries])), first == 1
    return walk.older


def leaf_map(walk: Walk, slot: Slot, journal: Extents, *, known_buckets: int) -> LeafMap:
    """The extents of one leaf by the rules above, with `journal_map` on top.

    The gens of buckets from ``known_buckets`` on are not known.
    """
    sets = slot_sets(walk, slot)
    merged = extent.empty() if slot.strays is None else slot.strays
    too_stale = astray = older = extent.empty()
    is_all_known = False
    if not sets or not all(image.is_valid for image in sets):
        older, is_all_known = older_keys(walk)
        older = extent.clip(older, start=slot.start, end=slot.end)
        # Only a known generation tells that a bucket was used again since.
        is_sure = bucket_of(walk, older) < known_buckets
        is_all_known &= bool(is_sure.all())
        older = older.take(is_sure)
    if not sets:
        merged = extent.overlay(merged, older)
    for image in sets or []:
        rows = _tagged(walk, image)
        behind = staleness(walk, rows) > validity.BUCKET_GC_GEN_MAX
        if image.is_valid:
            too_stale = extent.concatenate([too_stale, rows.take(behind & (rows.csum == TAG_NONE))])
        else:
            # What the journal says hides what was there before; where that is out of date the set said something newer.
            is_clean = ~merged.dirty & (merged.nptrs > 0)
            dropped = _retag(merged.take(is_clean), np.ones(int(is_clean.sum()), np.bool_), TAG_LOST)
            merged = extent.overlay(extent.overlay(merged.take(~is_clean), older), dropped)
        merged = extent.overlay(merged, extent.flatten(rows))
        if not image.is_valid:
            merged = extent.overlay(merged, older.take((older.nptrs > 0) & (staleness(walk, older) == 0)))
    if len(merged.start) and (int(merged.start[0]) < slot.start or int(merged.end[-1]) > slot.end):
        astray = outside(merged, slot)
        # What is dirty is the owner's of the range, to be judged there.
        astray = astray.take(~is_stray(astray))
        astray = _retag(astray, np.ones(len(astray.start), np.bool_), TAG_LOST)
        merged = extent.clip(merged, start=slot.start, end=slot.end)
    merged = extent.overlay(merged, extent.clip(journal, start=slot.start, end=slot.end))
    is_unsure = ~merged.dirty & (merged.nptrs > 0) & (bucket_of(walk, merged) >= known_buckets)
    merged = _retag(merged, is_unsure & (merged.csum <= TAG_JOURNAL), TAG_UNKNOWN_GEN)
    merged = extent.concatenate([merged, astray])
    has_data = (merged.nptrs > 0) & ((PTR_DEV.get(merged.ptr) == 0) | (merged.csum == TAG_LOST))
    stale = (staleness(walk, merged) > 0) & (bucket_of(walk, merged) < walk.geometry.nbuckets)
    kept = has_data & ~stale & (merged.csum <= TAG_JOURNAL)
    lost = has_data & ~stale & (merged.csum > TAG_JOURNAL)
    stale_dirty = has_data & stale & merged.dirty & (merged.csum < TAG_JOURNAL)
    # Where no set is good the node may be another's altogether.
    is_unknown = not any(image.is_valid for image in sets or []) or not all(
        image.is_valid or image.is_whole for image in sets or [])
    is_clean_unknown = is_unknown and is_all_known
    is_unknown = (is_unknown and not is_all_known) or slot.is_doubtful
    is_lost = not sets and not is_all_known and not kept.any()
    strays = (kept | lost) & np.isin(merged.csum, (TAG_STRAY, TAG_DOUBTED, TAG_CONTRADICTED))
    return LeafMap(merged.take(kept), merged.take(lost), merged.take(stale_dirty), too_stale, is_unknown, is_lost,
                   is_clean_unknown, merged.take(strays))


def slot_sets(walk: Walk, slot: Slot) -> list[SalvagedSet] | None:
    """The sets of the leaf of a slot, damaged or not; None if there is none, or none of it can be read.  A set that is
    gone without a trace is a damaged one without keys.
    """
    ptr = slot.leaf or (slot.lost if slot.level == 0 else None)
    sets = read_sets(walk, ptr, slot.nsectors) if ptr is not None else None
    if sets and slot.lacks_set:
        gone = SalvagedSet(sets[-1].block + 1, decode_key_columns(b"", 0), is_valid=False, is_whole=False)
        return [*sets, gone]
    return sets


def own_keys(walk: Walk, slot: Slot) -> Extents:
    """All keys of the leaf of a slot as one flat map, newer over older, what cannot be believed tagged as lost."""
    merged = extent.empty()
    for image in slot_sets(walk, slot) or []:
        merged = extent.overlay(merged, extent.flatten(_tagged(walk, image)))
    return merged


def is_stray(extents: Extents) -> npt.NDArray[np.bool_]:
    """Which of what lies outside its leaf names a place of dirty data that can be believed."""
    is_here = (extents.nptrs > 0) & (PTR_DEV.get(extents.ptr) == 0)
    stray: npt.NDArray[np.bool_] = extents.dirty & is_here & (extents.csum == TAG_NONE)
    return stray


def outside(extents: Extents, slot: Slot) -> Extents:
    """What of flat extents does not lie in the range of a slot."""
    return extent.concatenate([extent.clip(extents, start=0, end=slot.start),
                               extent.clip(extents, start=slot.end, end=MAX_POS)])


def bucket_of(walk: Walk, extents: Extents) -> npt.NDArray[np.uint64]:
    """The bucket of each extent's pointer, whatever it says."""
    bucket: npt.NDArray[np.uint64] = PTR_OFFSET.get(extents.ptr) // np.uint64(walk.geometry.bucket_size_sectors)
    return bucket


def _tagged(walk: Walk, image: SalvagedSet) -> Extents:
    # The keys of a set as extents; what a kernel refuses is lost and hides its range.
    keys = image.keys
    fatal = validity.extents_fatal(keys, walk.geometry)
    tags = np.where(fatal | (not image.is_valid), TAG_LOST, TAG_NONE).astype(np.uint8)
    size = np.minimum(keys.size, keys.pos & np.uint64(SECTOR_MASK)).astype(np.uint32)
    # Of several pointers the first counts, as it does for the kernel's reads.
    return extent.from_keys(keys._replace(size=size, csum=tags, nptrs=np.minimum(keys.nptrs, 1)))


def _retag(extents: Extents, rows: npt.NDArray[np.bool_], tag: int) -> Extents:
    return extents._replace(csum=np.where(rows, tag, extents.csum).astype(np.uint8))
