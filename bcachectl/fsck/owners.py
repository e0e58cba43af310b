# SPDX-License-Identifier: GPL-2.0-only
"""Whose the data of each slot is, where the uuid array does not say: `slot_plan`.

The array has no checksum and no second copy, and its slots are only ever added or retired, never freed.  So a slot that
is free now and was not free in an array that an older journal entry names has been lost, and is taken from there.

Where that tells nothing, data is left without an owner, and backing devices that say they are attached are forgotten.
Giving one to the other is a guess that can destroy a file system, so each `Choice` is told, with its `Evidence`:

* a device that ends before the data does cannot be the one;
* clean data is on the right device too, so some of it is compared;
* data before sector 8 of a device, where its superblock is, can only be a flash-only volume's.

What the user assigns counts.  Without that a device is chosen only if it is the one that fits and either its data
agrees or there is no other device and no other slot.  Dirty data that is left without an owner is not repaired, since
nobody can take a repair's wrong guess back.  Clean data without an owner is dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bcachectl.errors import BcachectlError, WrongState
from bcachectl.fsck import extents as extent
from bcachectl.fsck.check import Check
from bcachectl.fsck.check_backing import Backing, read_backing
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.salvage import leaf_map
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk import validity
from bcachectl.ondisk.bkey import INODE_SHIFT, PTR_OFFSET, Bkey
from bcachectl.ondisk.magic import INVALID_UUID
from bcachectl.ondisk.superblock import SB_SECTOR, BdevState, Superblock
from bcachectl.ondisk.uuids import UUID_FLASH_ONLY, UuidEntry, decode_uuids

ASSIGN_NONE = b"none"
"""Assigned to a slot: nobody's; it is retired, and its dirty data kept as an orphan."""
ASSIGN_FLASH = b"flash"
"""Assigned to a slot: a flash-only volume."""
COMPARED_EXTENTS = 256
COMPARED_SECTORS = 8
EQUAL_SHARE = 0.9
"""Clean data that a write was changing when power failed differs by right."""
LOST_CODES = ("UUID_PTR", "UUID_IO", "UUID_STALE")


class Evidence(NamedTuple):
    """What speaks for a backing device: whether it is large enough, and how much clean data agrees with it."""

    device: str
    uuid: bytes
    label: bytes
    fits: bool
    compared: int
    equal: int

    @property
    def agrees(self) -> bool:
        """Its content is that of the slot's clean data."""
        return self.fits and self.compared > 0 and self.equal >= self.compared * EQUAL_SHARE

    @property
    def disagrees(self) -> bool:
        """It cannot be the one."""
        return not self.fits or (self.compared > 0 and not self.agrees)


class Choice(NamedTuple):
    """A slot that has data and no owner, and what becomes of it: ``outcome`` in words, empty if it has to be told."""

    inode: int
    dirty_sectors: int
    clean_sectors: int
    evidence: tuple[Evidence, ...]
    outcome: str


class SlotPlan(NamedTuple):
    """The array as it should be, the slots whose clean data goes, and every choice; undecided ones block a repair."""

    entries: tuple[UuidEntry, ...]
    dropped: frozenset[int]
    choices: tuple[Choice, ...]
    forgotten: tuple[str, ...]
    """Backing devices that no slot is for afterwards."""

    @property
    def is_decided(self) -> bool:
        """Nothing has to be told."""
        return all(choice.outcome for choice in self.choices)


def live_extents(check: Check) -> Extents:
    """Everything that a repair keeps, in order, but for extents in other structures' places."""
    parts = [leaf_map(check.walk, slot, check.journal, known_buckets=check.known_buckets).kept for slot in check.slots]
    live = extent.concatenate(parts)
    live = live.take(np.argsort(live.start, kind="stable"))
    if check.dropped:
        pairs = zip(live.start.tolist(), PTR_OFFSET.get(live.ptr).tolist(), strict=True)
        live = live.take(np.array([pair not in check.dropped for pair in pairs], np.bool_))
    return live


def slot_plan(check: Check, live: Extents, assign: Mapping[int, bytes]) -> SlotPlan:
    """The uuid array for the live extents; ``assign`` gives slots to uuids, to `ASSIGN_NONE` or `ASSIGN_FLASH`."""
    inodes = live.start >> np.uint64(INODE_SHIFT)
    used = [inode for inode in np.unique(inodes).tolist() if inode < check.walk.geometry.nr_uuids]
    entries = _best_array(check, used)
    ownerless = [inode for inode in used if entries[inode].is_free]
    for inode in assign:
        if inode not in ownerless:
            raise WrongState(f"--assign {inode}: slot {inode} is not one that has data and no owner; those are "
                             f"{', '.join(map(str, ownerless)) or 'none'}")
    members = [each for each in map(_attached, check.backings) if each is not None
               and each[1].set_uuid[:8] == _set_half(check)]
    own_uuids = {sb.uuid for _backing, sb in members}
    # A backing device that is there is no flash-only volume, whatever its slot says.
    entries = [replace(entry, flags=0, sectors=0) if entry.is_flash_only and entry.uuid in own_uuids else entry
               for entry in entries]
    known = {entry.uuid for entry in entries if not entry.is_free}
    forgotten = [each for each in members if each[1].uuid not in known and each[1].uuid not in assign.values()]
    choices: list[Choice] = []
    dropped: set[int] = set()
    still = list(ownerless)
    flash = {inode for inode in ownerless if _is_flash(live.take(inodes == inode), inode)}
    # What is sure comes first.
    for inode in sorted(ownerless, key=lambda inode: (inode not in assign, inode not in flash)):
        own = live.take(inodes == inode)
        choice, entry = _choose(check, inode, own, forgotten, still, assign.get(inode))
        still = [other for other in still if other != inode or entry is None]
        if entry is not None:
            entries[inode] = entry
            forgotten = [each for each in forgotten if each[1].uuid != entry.uuid]
        elif not bool(own.dirty.any()):
            dropped.add(inode)
        choices.append(choice)
    if _is_lost(check) and all(choice.outcome for choice in choices):
        # No data that could be theirs is left: any slot that nothing ever used will do.
        free = [slot for slot, entry in enumerate(entries) if entry.is_free and slot not in used]
        # One that is dirty lacks data, and would be taken for clean as soon as it has a slot with nothing in it.
        settled = [each for each in forgotten if each[1].state is BdevState.CLEAN][:len(free)]
        for (_backing, sb), slot in zip(settled, free, strict=False):
            entries[slot] = UuidEntry(uuid=sb.uuid, label=sb.label)
    owners = {entry.uuid for entry in entries if not entry.is_free}
    names = tuple(backing.name for backing in check.backings if _superblock(backing)[1].uuid not in owners)
    return SlotPlan(tuple(entries), frozenset(dropped), tuple(sorted(choices)), names)


def is_array(entries: list[UuidEntry]) -> bool:
    """It may be a uuid array: it has free slots, and nothing where nothing ever is."""
    odd = any(any(entry.pad) or entry.flags & ~UUID_FLASH_ONLY.mask for entry in entries)
    return any(entry.is_free for entry in entries) and not odd


def _is_lost(check: Check) -> bool:
    return not check.walk.uuids or not is_array(list(check.walk.uuids)) or any(
        finding.code in LOST_CODES for finding in check.findings)


def _set_half(check: Check) -> bytes:
    assert check.walk.superblock is not None
    return check.walk.superblock.set_uuid[:8]


def _best_array(check: Check, used: list[int]) -> list[UuidEntry]:
    walk = check.walk
    entries = [UuidEntry()] * walk.geometry.nr_uuids
    if walk.uuids and not any(finding.code in LOST_CODES for finding in check.findings):
        # A pointer that is too short hides slots, one with odd fields in it is still the array that the kernel reads.
        found = list(walk.uuids)
        entries[:len(found)] = found[:len(entries)]
    if walk.uuids and not is_array(entries) and not _has_member(check, entries):
        entries = [UuidEntry()] * walk.geometry.nr_uuids
    is_lost = _is_lost(check)
    for older in _arrays(walk):
        for slot, entry in enumerate(older[:len(entries)]):
            if entries[slot].is_free and not entry.is_free and (slot in used or is_lost):
                entries[slot] = entry
    return entries


def _has_member(check: Check, entries: list[UuidEntry]) -> bool:
    uuids = {each[1].uuid for each in map(_attached, check.backings) if each is not None}
    return any(entry.uuid in uuids for entry in entries)


def _arrays(walk: Walk) -> list[list[UuidEntry]]:
    # The arrays that journal entries name, the newest first, at their full length.
    found: list[list[UuidEntry]] = []
    seen: set[int] = set()
    for entry in reversed(walk.journal):
        key = entry.jset.uuid_bucket
        if key.ptrs and key.ptrs[0].sector not in seen:
            seen.add(key.ptrs[0].sector)
            array = _array_at(walk, key)
            if is_array(array):
                found.append(array)
    return found


def _array_at(walk: Walk, key: Bkey) -> list[UuidEntry]:
    geometry = walk.geometry
    if validity.btree_ptr_invalid(key, geometry) or validity.ptr_stale(key, geometry, walk.gens):
        return []
    try:
        return decode_uuids(walk.read(key.ptrs[0].sector, geometry.meta_sectors))
    except BcachectlError:
        return []


def _attached(backing: Backing) -> tuple[Backing, Superblock] | None:
    sb, _found = read_backing(backing)
    if sb is None or not any(sb.uuid) or sb.state not in (BdevState.CLEAN, BdevState.DIRTY):
        return None
    return backing, sb


def _choose(check: Check, inode: int, own: Extents, forgotten: list[tuple[Backing, Superblock]],
            ownerless: list[int], assigned: bytes | None) -> tuple[Choice, UuidEntry | None]:
    evidence = tuple(evidence_for(check.walk, backing, sb, own, inode) for backing, sb in forgotten)
    size = own.size.astype(np.int64)
    dirty, clean = int(size[own.dirty].sum()), int(size[~own.dirty].sum())
    end = int(own.end.max()) - (inode << INODE_SHIFT)
    entry: UuidEntry | None = None
    outcome = ""
    fitting = [each for each in evidence if not each.disagrees]
    agreeing = [each for each in fitting if each.agrees]
    is_flash = _is_flash(own, inode)
    if assigned == ASSIGN_NONE:
        entry, outcome = UuidEntry(uuid=INVALID_UUID), "retired, as told; its dirty data is kept as an orphan"
    elif assigned == ASSIGN_FLASH or (assigned is None and is_flash):
        why = "as told" if assigned else "it has data where a backing device has its superblock"
        uuid = hashlib.sha256(b"volume" + _set_half(check) + inode.to_bytes(4, "little")).digest()[:16]
        entry, outcome = UuidEntry(uuid=uuid, flags=UUID_FLASH_ONLY.mask, sectors=end), f"a flash-only volume: {why}"
    elif assigned is not None:
        label = next((sb.label for _backing, sb in map(_superblock, check.backings) if sb.uuid == assigned), bytes(32))
        entry, outcome = UuidEntry(uuid=assigned, label=label), "given to the device, as told"
    elif len(agreeing) == 1:
        [best] = agreeing
        entry = UuidEntry(uuid=best.uuid, label=best.label)
        outcome = f"given to {best.device}: {best.equal} of {best.compared} clean extents agree with it"
    elif len(ownerless) == len(forgotten) == len(fitting) == 1 and not fitting[0].compared:
        [best] = fitting
        entry = UuidEntry(uuid=best.uuid, label=best.label)
        outcome = f"given to {best.device}: the only slot without an owner, the only device without a slot"
    elif not dirty:
        outcome = "its clean data is dropped"
    return Choice(inode, dirty, clean, evidence, outcome), entry


def _is_flash(own: Extents, inode: int) -> bool:
    return int(own.start.min()) - (inode << INODE_SHIFT) < SB_SECTOR


def _superblock(backing: Backing) -> tuple[Backing, Superblock]:
    sb, _found = read_backing(backing)
    return backing, sb if sb is not None else Superblock()


def evidence_for(walk: Walk, backing: Backing, sb: Superblock, own: Extents, inode: int) -> Evidence:
    """What speaks for a device as the owner of a slot whose live extents are ``own``."""
    base = inode << INODE_SHIFT
    fits = int(own.end.max()) - base <= backing.size_sectors and int(own.start.min()) - base >= sb.data_offset
    compared = equal = 0
    clean = own.take(~own.dirty)
    if fits and backing.has_data and len(clean.start):
        rows = np.unique(np.linspace(0, len(clean.start) - 1, COMPARED_EXTENTS).astype(np.intp))
        for start, size, sector in zip(clean.start[rows].tolist(), clean.size[rows].tolist(),
                                       PTR_OFFSET.get(clean.ptr)[rows].tolist(), strict=True):
            count = min(size, COMPARED_SECTORS)
            try:
                ours, theirs = walk.read(sector, count), backing.read(start - base, count)
            except BcachectlError:
                continue
            if any(ours) or any(theirs):
                compared += 1
                equal += ours == theirs
    return Evidence(backing.name, sb.uuid, sb.label, fits, compared, equal)


def flash_sectors(entry: UuidEntry, end_sector: int, block_size_sectors: int) -> UuidEntry:
    """A flash-only volume's slot that covers all of its data; without any size and data it is retired."""
    size_sectors = entry.sectors if entry.is_volume else 0
    sectors = max(size_sectors, -(-end_sector // block_size_sectors) * block_size_sectors)
    return replace(entry, sectors=sectors) if sectors else replace(entry, uuid=INVALID_UUID)
