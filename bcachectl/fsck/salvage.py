# SPDX-License-Identifier: GPL-2.0-only
"""What can still be known where the btree is damaged: `salvage_sets`, `expand`, `leaf_map`.

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
* Pointers in a damaged interior node are hints.  A hint is followed if the node that it leads to has a good checksum,
  which is seeded with the very pointer.
* An extent that no kernel accepts hides its range and counts as lost.
* Where a prio set is lost the generations of its buckets are unknown, so nobody can tell whether a clean extent is out
  of date: it is dropped.  Buckets with dirty data are never used again, so dirty extents are kept.
* What lies outside a leaf's range is not the leaf's any more; what it alone says is given to the owner of the range,
  below all else (`bcachectl.fsck.strays`).
* The journal's keys come on top of everything.

Rows of the maps made here carry a tag in the ``csum`` column, whose own meaning no kernel ever used.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Container, Generator, Iterable
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bcachectl.errors import BcachectlError, Corrupt
from bcachectl.fsck import extents as extent
from bcachectl.fsck import levels
from bcachectl.fsck.check_journal import leftovers
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.live import staleness
from bcachectl.fsck.records import Progress, Slot
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
    Bkey,
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
HEADS_AT_ONCE = 256
"""So many buckets are asked together whether they begin with a node."""
DEPTH_LIMIT = 16
"""Levels of a btree that are followed below a damaged node."""

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
    buf, unread = _read_what_can_be(walk, ptr.sector, nsectors)
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
            gen = _real_gen(buf, magic, seed, block_bytes)
            if gen is not None:
                return salvage_sets(buf, magic=magic, seed=seed & ~0xFF | gen, block_bytes=block_bytes, unread=unread)
        return found
    # Zeros look like the end of the log, and the newest keys may have stood there.
    if written_blocks in unread or has_lost_set(buf, written_blocks=written_blocks, magic=magic, seed=seed,
                                                block_bytes=block_bytes):
        return salvage_sets(buf, magic=magic, seed=seed, block_bytes=block_bytes, unread=unread)
    return [SalvagedSet(image.block, image.keys, True) for image in sets]


def _read_what_can_be(walk: Walk, sector: int, nsectors: int) -> tuple[bytes | None, frozenset[int]]:
    # Zeros for the blocks that cannot be read, and their numbers: no set has a good checksum with them.  Halves, since
    # a failing device takes seconds for each request that fails.  None if nothing can be read.
    block_sectors = walk.geometry.block_size_sectors
    blocks = nsectors // block_sectors
    try:
        return walk.read(sector, nsectors), frozenset()
    except BcachectlError:
        if blocks < 2:
            return None, frozenset(range(blocks))
    half = blocks // 2
    first, unread = _read_what_can_be(walk, sector, half * block_sectors)
    second, others = _read_what_can_be(walk, sector + half * block_sectors, nsectors - half * block_sectors)
    unread |= {half + block for block in others}
    if first is None and second is None:
        return None, unread
    return (first or bytes(half * block_sectors << 9)) + (second or bytes(nsectors - half * block_sectors << 9)), unread


def _real_gen(buf: bytes, magic: int, seed: int, block_bytes: int) -> int | None:
    # The generation that makes the first set's checksum right, if the pointer's own does not.
    for gen in range(256):
        node = _Node(buf, magic, seed & ~0xFF | gen, block_bytes)
        if node.header(0)[1] == magic and node.is_valid(0):
            return gen
    return None


# Interior nodes.

def expand(walk: Walk, lost_ranges: Iterable[tuple[int, int]] = (),
           claimed: Container[int] = ()) -> Generator[Progress, None, list[Slot]]:
    """The leaves in key order, with those below damaged interior nodes that can still be found.

    ``lost_ranges`` are those of children whose pointers are bad.  Leaves that nothing points to any more are looked for
    in all buckets that are not ``claimed``.  Raises gens by what damaged nodes say, so it comes before any `leaf_map`.
    """
    slots = _each_its_own(walk, _expand(walk))
    for start, end in lost_ranges:
        slots = [part for slot in slots for part in _without(slot, start=start, end=end)]
        slots = sorted([*slots, Slot(start, end, None, 0)], key=lambda slot: slot.start)
    if any(slot.leaf is slot.lost is None or slot.is_astray or _has_other_gen(walk, slot) for slot in slots):
        ptrs = [slot.leaf or slot.lost or Ptr(0, 0, 0) for slot in slots]
        candidates = yield from find_leaves(walk, claimed, {walk.geometry.bucket_of(ptr.sector) for ptr in ptrs})
        slots = [part for slot in slots
                 for part in (_fill(slot, candidates) if slot.leaf is slot.lost is None else [slot])]
        # Where pointers are wrong, one that is missed nowhere may be missed after all: its keys are strays.
        taken = {slot.leaf for slot in slots}
        slots += [each.slot._replace(end=each.slot.start, is_astray=True) for each in candidates
                  if each.slot.leaf not in taken]
        slots.sort(key=lambda slot: slot.start)
    return slots


def _each_its_own(walk: Walk, slots: list[Slot]) -> list[Slot]:
    # Where several pointers lead into one bucket, all but one are wrong: a leaf that could be read is its parent's; of
    # others only one whose range has some of the keys may be.
    leaves = {walk.geometry.bucket_of(slot.leaf.sector) for slot in slots if slot.leaf is not None}
    buckets = [walk.geometry.bucket_of(slot.lost.sector) if slot.lost is not None else -1 for slot in slots]
    claims = Counter(buckets)
    is_wrong = [bucket in leaves or (bucket >= 0 and claims[bucket] > 1 and not _has_own_keys(walk, slot))
                for slot, bucket in zip(slots, buckets, strict=True)]
    left = Counter(bucket for bucket, wrong in zip(buckets, is_wrong, strict=True) if bucket >= 0 and not wrong)
    slots = [slot._replace(is_doubtful=True) if left[bucket] > 1 else slot
             for slot, bucket in zip(slots, buckets, strict=True)]
    return [Slot(slot.start, slot.end, None, 0) if wrong else slot for slot, wrong in zip(slots, is_wrong, strict=True)]


def _has_own_keys(walk: Walk, slot: Slot) -> bool:
    return len(extent.clip(own_keys(walk, slot), start=slot.start, end=slot.end).start) > 0


def _has_other_gen(walk: Walk, slot: Slot) -> bool:
    # A leaf is good but for the generation in the pointer to it: that was overwritten, and makes others look replaced.
    if slot.lost is None or slot.level:
        return False
    assert walk.superblock is not None
    buf, _unread = _read_what_can_be(walk, slot.lost.sector, slot.nsectors)
    seed = ptr_make(slot.lost.sector, slot.lost.gen, slot.lost.dev)
    gen = None if buf is None else _real_gen(buf, bset_magic(walk.superblock.set_uuid), seed, walk.geometry.block_bytes)
    return gen not in (None, slot.lost.gen)


def _without(slot: Slot, *, start: int, end: int) -> list[Slot]:
    # What is left of a slot outside [start, end), or an empty one at its start: its keys there are strays then.
    if slot.end <= start or end <= slot.start:
        return [slot]
    slot = slot._replace(is_astray=slot.leaf is not None)
    parts = [slot._replace(end=start)] if slot.start < start else []
    parts += [slot._replace(start=end)] if end < slot.end else []
    return parts or ([slot._replace(end=slot.start)] if slot.leaf is not None or slot.lost is not None else [])


def _fill(slot: Slot, candidates: list[Candidate]) -> list[Slot]:
    # The leaves among ``candidates`` whose keys all lie in the range of a lost one.  A leaf that was split stays where
    # it was, and only its parent told that it is no more: of several that overlap the one that the journal knows best
    # is taken, and is doubtful.  One more, of which nothing is left, may have stood wherever they leave a gap.
    fitting = [each for each in candidates if slot.start <= each.slot.start and each.slot.end <= slot.end]
    chosen: list[Slot] = []
    for candidate in sorted(fitting, key=lambda each: -each.known_keys):
        each = candidate.slot
        others = [other for other in chosen if other.start < each.end and each.start < other.end]
        for other in others:
            chosen[chosen.index(other)] = other._replace(is_doubtful=True)
        if not others:
            chosen.append(each)
    if not chosen:
        return [slot]
    chosen.sort(key=lambda each: each.start)
    starts = [slot.start, *(each.end for each in chosen[:-1])]
    pairs = [(Slot(start, each.start, None, 0), each) for start, each in zip(starts, chosen, strict=True)]
    every = [part for pair in pairs for part in pair] + [Slot(chosen[-1].end, slot.end, None, 0)]
    return [part for part in every if part.start < part.end]


def highest_seq(walk: Walk) -> int:
    """The number of the newest journal entry, in or out of reach."""
    return max(entry.jset.seq for entry in [*walk.journal, *leftovers(walk)])


def fresh_node_seq(walk: Walk, highest: int, bucket: int) -> int:
    """The number that a rebuild gives the node that it writes to ``bucket``; `find_leaves` leaves such nodes out.

    They are what an interrupted rebuild left behind, copies of what is there.  ``highest`` is `highest_seq`.
    """
    assert walk.superblock is not None
    words = walk.superblock.set_uuid + highest.to_bytes(8, "little") + bucket.to_bytes(8, "little")
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "little") | 1


class Candidate(NamedTuple):
    """A leaf that nothing points to, and how many keys of the journal it has."""

    slot: Slot
    known_keys: int


def find_leaves(walk: Walk, claimed: Container[int],
                known: Container[int]) -> Generator[Progress, None, list[Candidate]]:
    """Leaves in buckets that nothing claims, by their magic and a checksum that fits the bucket's generation.

    That need not be all of them: of some the first set may be damaged, or nothing left.  It takes a read for each
    bucket; those of `HEADS_AT_ONCE` are announced together.
    """
    geometry = walk.geometry
    found: list[Candidate] = []
    recent = extent.overlay(older_keys(walk)[0], walk.journal_map)
    highest = highest_seq(walk)
    told = set(zip(recent.start.tolist(), recent.ptr.tolist(), strict=True))
    for first in range(geometry.first_bucket, geometry.nbuckets, HEADS_AT_ONCE):
        yield Progress("lost leaves", first, geometry.nbuckets)
        buckets = [bucket for bucket in range(first, min(first + HEADS_AT_ONCE, geometry.nbuckets))
                   if bucket not in claimed and bucket not in known]
        for bucket in buckets if walk.fd >= 0 else ():
            with suppress(OSError):
                os.posix_fadvise(walk.fd, geometry.sector_of(bucket) << 9, 512, os.POSIX_FADV_WILLNEED)
        for bucket in buckets:
            candidate = _candidate(walk, bucket, highest, told)
            if candidate is not None:
                found.append(candidate)
    yield Progress("lost leaves", geometry.nbuckets, geometry.nbuckets)
    return sorted(found, key=lambda each: each.slot.start)


def _candidate(walk: Walk, bucket: int, highest: int, told: Container[tuple[int, int]]) -> Candidate | None:
    # ``told`` are start and pointer of the keys of the journal; None if there is no leaf in the bucket.
    assert walk.superblock is not None
    geometry, magic = walk.geometry, bset_magic(walk.superblock.set_uuid)
    sector = geometry.sector_of(bucket)
    try:
        if struct.unpack_from("<Q", walk.read(sector, 1), 8)[0] != magic:
            return None
    except BcachectlError:
        return None
    buf, _unread = _read_what_can_be(walk, sector, geometry.node_sectors)
    gen = None if buf is None else _real_gen(buf, magic, ptr_make(sector, 0), geometry.block_bytes)
    if buf is None or gen is None or struct.unpack_from("<Q", buf, 16)[0] == fresh_node_seq(walk, highest, bucket):
        return None
    if gen != int(walk.gens[bucket]) and validity.gen_after(int(walk.gens[bucket]), gen):
        return None
    sets = [image for image in salvage_sets(buf, magic=magic, seed=ptr_make(sector, gen),
                                            block_bytes=geometry.block_bytes) if image.is_valid]
    starts = [image.keys.pos[image.keys.size > 0] - image.keys.size[image.keys.size > 0] for image in sets]
    ends = [image.keys.pos[image.keys.size > 0] for image in sets]
    is_leaf = levels.may_be_leaf(walk.read, sets, geometry.node_sectors, magic, geometry)
    if not is_leaf or not any(len(end) for end in ends):
        return None
    walk.mark_columns([image.keys for image in sets], 0)
    first = int(min(start.min() for start in starts if len(start)))
    last = int(max(end.max() for end in ends if len(end)))
    known_keys = sum(pair in told for image in sets for pair in zip(
        (image.keys.pos - image.keys.size).tolist(), image.keys.ptr.tolist(), strict=True))
    return Candidate(Slot(first, last, Ptr(0, sector, gen), geometry.node_sectors), known_keys)


def _expand(walk: Walk) -> list[Slot]:
    slots: list[Slot] = []
    at = 0
    for slot in sorted(walk.slots, key=lambda each: each.start):
        if slot.start > at:
            slots.append(Slot(at, slot.start, None, 0))
        if slot.leaf is None and slot.lost is not None:
            slots.extend(_below(walk, slot, {walk.geometry.bucket_of(slot.lost.sector)}, DEPTH_LIMIT))
        else:
            slots.append(slot)
        at = max(at, slot.end)
    if at < MAX_POS:
        slots.append(Slot(at, MAX_POS, None, 0))
    return slots


def _below(walk: Walk, slot: Slot, seen: set[int], depth: int) -> list[Slot]:
    # The leaves below one pointer, whatever state the nodes between are in.
    assert slot.lost is not None
    sets = read_sets(walk, slot.lost, slot.nsectors)
    if not sets:
        return [slot if slot.level == 0 else Slot(slot.start, slot.end, None, 0)]
    if _is_of_another_level(walk, [image for image in sets if image.is_valid], slot):
        return [Slot(slot.start, slot.end, None, 0)]
    walk.mark_columns([image.keys for image in sets if image.is_valid], slot.level)
    if slot.level == 0 or not depth:
        return [slot]
    slots: list[Slot] = []
    start = slot.start
    is_whole = all(image.is_valid or image.is_whole for image in sets)
    rows = sorted((int(pos), -number, row) for number, image in enumerate(sets)
                  for row, pos in enumerate(image.keys.pos))
    for pos, minus_number, row in rows:
        image = sets[-minus_number]
        key = interior_key(image.keys, row)
        if not start < pos <= slot.end:
            continue
        if validity.btree_ptr_invalid(key, walk.geometry):
            # Its leaves, if there were any, are not those of the next child.
            slots.append(Slot(start, pos, None, 0))
            start = pos
            continue
        if validity.btree_ptr_bad(key, walk.geometry, walk.gens):
            continue
        bucket = walk.geometry.bucket_of(key.ptrs[0].sector)
        child = read_sets(walk, key.ptrs[0], key.size)
        is_node = bool(child) and any(each.is_valid for each in child or [])
        if bucket in seen or not (is_node or image.is_valid):
            slots.append(Slot(start, pos, None, 0))
            start = pos
            continue
        seen.add(bucket)
        below = Slot(start, pos, None, key.size, key.ptrs[0], slot.level - 1)
        if not is_whole and slot.level == 1:
            # Another child may have stood before this one.
            first = min((int((each.keys.pos - each.keys.size)[each.keys.size > 0].min()) for each in child or []
                         if each.is_valid and (each.keys.size > 0).any()), default=pos)
            if start < first < pos:
                slots.append(Slot(start, first, None, 0))
                below = below._replace(start=first)
        found = _below(walk, below, seen, depth - 1)
        if not is_whole and slot.level > 1:
            found = [found[0]._replace(is_doubtful=True), *found[1:]]
        slots.extend(found)
        start = pos
    if start < slot.end:
        slots.append(Slot(start, slot.end, None, 0))
    return slots


def _is_of_another_level(walk: Walk, sets: list[SalvagedSet], slot: Slot) -> bool:
    # Pointers to nodes would be taken for clean data, or data for nodes.
    assert walk.superblock is not None
    judge = levels.is_leaf if slot.level else levels.is_interior
    return bool(sets) and judge(walk.read, sets, slot.nsectors, bset_magic(walk.superblock.set_uuid), walk.geometry)


def interior_key(keys: KeyColumns, row: int) -> Bkey:
    """A row of an interior node as a key."""
    pos, size, ptr = int(keys.pos[row]), int(keys.size[row]), int(keys.ptr[row])
    inode, end = (MAX_INODE, MAX_OFFSET) if pos == MAX_POS else (pos >> INODE_SHIFT, pos & SECTOR_MASK)
    ptrs = (Ptr(ptr >> 51 & 0xFFF, ptr >> 8 & (1 << 43) - 1, ptr & 0xFF),) if keys.nptrs[row] else ()
    return Bkey(inode, end - size, end, bool(keys.dirty[row]), 0, ptrs)


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
