# SPDX-License-Identifier: GPL-2.0-only
"""The leaves of a btree that is damaged: `expand`.

1. Below a damaged interior node, what its sets still say are hints (`bcachectl.fsck.salvage`): one is followed if the
   node that it leads to has a good checksum, which is seeded with the very pointer.
2. Of several pointers into one bucket at most one is right.
3. Where leaves are missing, or pointers are wrong, every bucket that nothing claims is asked whether a leaf stands in
   it (`find_leaves`).  It takes the place of the lost one whose range it fits in; one that fits nowhere may have keys
   that are missed (`bcachectl.fsck.strays`).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Container, Generator, Iterable
from contextlib import suppress
from typing import NamedTuple

from bcachectl.errors import BcachectlError
from bcachectl.fsck import extents as extent
from bcachectl.fsck import levels
from bcachectl.fsck.check_journal import leftovers
from bcachectl.fsck.records import Progress, Slot
from bcachectl.fsck.salvage import (
    SalvagedSet,
    older_keys,
    own_keys,
    read_sets,
    read_what_can_be,
    real_gen,
    salvage_sets,
)
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk import validity
from bcachectl.ondisk.bkey import (
    INODE_SHIFT,
    MAX_INODE,
    MAX_OFFSET,
    MAX_POS,
    SECTOR_MASK,
    Bkey,
    KeyColumns,
    Ptr,
    ptr_make,
)
from bcachectl.ondisk.magic import bset_magic

HEADS_AT_ONCE = 256
"""So many buckets are asked together whether they begin with a node."""
DEPTH_LIMIT = 16
"""Levels of a btree that are followed below a damaged node."""


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
    buf, _unread = read_what_can_be(walk, slot.lost.sector, slot.nsectors)
    seed = ptr_make(slot.lost.sector, slot.lost.gen, slot.lost.dev)
    gen = None if buf is None else real_gen(buf, bset_magic(walk.superblock.set_uuid), seed, walk.geometry.block_bytes)
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
    buf, _unread = read_what_can_be(walk, sector, geometry.node_sectors)
    gen = None if buf is None else real_gen(buf, magic, ptr_make(sector, 0), geometry.block_bytes)
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
