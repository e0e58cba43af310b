# SPDX-License-Identifier: GPL-2.0-only
"""Rules between a set and its backing devices: superblock, membership, state against the dirty keys.

A backing device that says *clean* must hold everything.  The kernel marks a device clean before the cleared dirty bits
of the last keys are on the cache device, so a dirty key alone proves nothing, and the data is compared.  Where a write
was in flight when power failed the two differ by right; `IN_FLIGHT_SECTORS` bounds that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from bcachectl.errors import BcachectlError, Corrupt
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.findings import Finding
from bcachectl.fsck.flags import Settled, settle
from bcachectl.fsck.tally import Spread
from bcachectl.fsck.walk import Read, Walk
from bcachectl.ondisk.bkey import INODE_SHIFT, PTR_OFFSET
from bcachectl.ondisk.magic import BCACHE_MAGIC
from bcachectl.ondisk.superblock import (
    BDEV_DATA_START_DEFAULT,
    SB_BYTES,
    SB_SECTOR,
    BdevState,
    Superblock,
    check_backing_features,
    judge_csum,
    parse_superblock,
)
from bcachectl.units import counted, format_uuid

COMPARE_SECTORS = 2048
"""Dirty data is compared in pieces of this length."""
IN_FLIGHT_SECTORS = 8192
"""So many sectors may differ on a clean device: writes that were in flight when power failed."""
SAMPLES, SAMPLE_SECTORS = 256, 8
"""How much of the dirty data is looked at where a spread of it is enough."""


class Backing(NamedTuple):
    """A backing device that fsck was given; of a metadata image there is no data."""

    name: str
    read: Read
    size_sectors: int
    has_data: bool = True
    logical_block_sectors: int = 1


class Held(Protocol):
    """The dirty data that a cache holds: how much by device number, and all of one device number's."""

    @property
    def dirty(self) -> dict[int, Spread]:
        """Sectors by device number, and where they lie."""

    def dirty_extents(self, inode: int) -> Extents:
        """Every dirty extent of a device number."""

    def may_lack(self, inode: int) -> bool:
        """Dirty data of a device number may be missing from all that."""


def read_backing(backing: Backing) -> tuple[Superblock | None, list[Finding]]:
    """The superblock if anything can be done with it, and what is wrong with it."""
    name = backing.name
    try:
        raw = backing.read(SB_SECTOR, SB_BYTES >> 9)
    except BcachectlError as error:
        return None, [Finding("BACKING_IO", "backing superblock", str(error), sector=SB_SECTOR, device=name)]
    sb = parse_superblock(raw)
    found: list[Finding] = []

    def add(code: str, why: str) -> None:
        found.append(Finding(code, "backing superblock", why, sector=SB_SECTOR, device=name))

    if sb.magic != BCACHE_MAGIC:
        add("BACKING_MAGIC", "Not a bcache superblock (bad magic)")
        return None, found
    stored, expected = judge_csum(raw)
    if stored != expected:
        add("BACKING_CSUM", f"Bad checksum: {stored:#x}, expected {expected:#x}")
    if sb.offset != SB_SECTOR:
        add("BACKING_OFFSET", "Not a bcache superblock (bad offset)")
    if not sb.is_backing:
        add("BACKING_KIND" if sb.is_cache else "BACKING_VERSION", f"version {sb.version}")
        return None, found
    if sb.uuid == bytes(16):
        add("BACKING_UUID", "Bad UUID")
    if sb.data_offset < BDEV_DATA_START_DEFAULT or sb.data_offset >= backing.size_sectors:
        add("BACKING_DATA_OFFSET", f"Bad data offset {sb.data_offset}")
    if not sb.block_size:
        add("BACKING_BLOCK_SIZE", "block size 0")
    elif sb.block_size < backing.logical_block_sectors:
        add("BACKING_BLOCK_SIZE", f"blocks of {sb.block_size} sectors, the device's of "
                                  f"{backing.logical_block_sectors}")
    try:
        check_backing_features(sb)
    except Corrupt as error:
        add("BACKING_FEATURE", error.why)
    if sb.cache_mode is None:
        add("BACKING_MODE", f"flags {sb.flags:#x}")
    if sb.unknown_flags:
        add("BACKING_FLAGS", f"unknown flag bits {sb.unknown_flags:#x}")
    return sb, found


def check_backings(walk: Walk, backings: Sequence[Backing], held: Held) -> Iterator[Finding]:
    """Every rule for every backing device; ``held`` is the live dirty data."""
    seen: dict[bytes, str] = {}
    for backing in backings:
        sb, found = read_backing(backing)
        yield from found
        if sb is None:
            continue
        if sb.uuid in seen:
            yield Finding("BACKING_TWICE", "backing superblock", f"uuid {format_uuid(sb.uuid)} is that of "
                          f"{seen[sb.uuid]}", device=backing.name)
        seen[sb.uuid] = backing.name
        if any(finding.code == "BACKING_CSUM" for finding in found):
            settled = settled_backing(walk, backing, held)
            if settled.words:
                yield Finding("BACKING_GUESSED", "backing superblock", ", ".join(settled.words), sector=SB_SECTOR,
                              device=backing.name)
        if walk.superblock is not None and walk.superblock.cache_sync and walk.newest is not None:
            yield from _check_member(walk, backing, sb, held)


def settled_backing(walk: Walk, backing: Backing, held: Held) -> Settled:
    """What to write over a backing superblock that fails its checksum."""
    raw = backing.read(SB_SECTOR, SB_BYTES >> 9)
    sb = parse_superblock(raw)
    is_member = walk.superblock is not None and sb.set_uuid == walk.superblock.set_uuid
    return settle(sb, raw, held, slot=slot_of(walk, sb.uuid), is_member=is_member)


def slot_of(walk: Walk, uuid: bytes) -> int | None:
    """The device number under which the set knows a backing device."""
    return next((slot for slot, entry in enumerate(walk.uuids)
                 if entry.uuid == uuid and not entry.is_free and not entry.is_flash_only), None)


def ran_later(walk: Walk, sb: Superblock, slot: int | None) -> bool:
    """Whether a dirty device's superblock was written in a run that began after the last one that the set knows of.

    The kernel reads it (last_mount), attaches the device (last_reg, in the uuid array), and only then marks it dirty.
    But the journal entry that leads to the new array is not waited for, and clocks are set back: it is no proof.
    """
    if slot is None or sb.state is not BdevState.DIRTY:
        return False
    # An entry that a repair has made says 0.
    return 0 < walk.uuids[slot].last_reg < sb.last_mount


def _check_member(walk: Walk, backing: Backing, sb: Superblock, held: Held) -> Iterator[Finding]:
    assert walk.superblock is not None
    name, cache = backing.name, walk.superblock
    slot = slot_of(walk, sb.uuid)
    own = held.dirty.get(slot, Spread(0, 0, 0)) if slot is not None else Spread(0, 0, 0)
    sectors = own.sectors

    def say(code: str, why: str) -> Finding:
        return Finding(code, "backing superblock", why, sector=SB_SECTOR, device=name)

    if sb.set_uuid not in (cache.set_uuid, bytes(16)):
        yield say("BACKING_OTHER_SET", f"set {format_uuid(sb.set_uuid)}")
        return
    if sb.block_size and sb.block_size < cache.block_size:
        yield say("BACKING_BLOCK_SIZE", f"block size {sb.block_size} sectors, the set's is {cache.block_size}")
    if sb.state is BdevState.NONE:
        if sectors and slot is not None:
            is_there = backing.has_data and not any_differs(walk, backing, held.dirty_extents(slot))
            yield say("BACKING_DETACHED_KEYS" if is_there else "BACKING_DETACHED_DIRTY",
                      f"{counted(sectors, 'dirty sector')} in slot {slot}")
        elif slot is None:
            yield say("BACKING_NOT_ATTACHED", f"state {sb.state.word}")
    elif sb.state is BdevState.STALE:
        yield say("BACKING_INCONSISTENT", "state inconsistent")
    elif slot is None:
        yield say("BACKING_FORGOTTEN", f"state {sb.state.word}, uuid {format_uuid(sb.uuid)}")
    elif sb.state is BdevState.CLEAN and sectors and not backing.has_data:
        yield say("BACKING_CLEAN_KEYS", f"{counted(sectors, 'dirty sector')}; whether they differ, an image does "
                                        "not tell")
    elif sb.state is BdevState.CLEAN and sectors:
        differs = differing_sectors(walk, backing, held.dirty_extents(slot))
        is_wrong = differs > IN_FLIGHT_SECTORS and differs * 2 > sectors
        yield say("BACKING_CLEAN_DIRTY" if is_wrong else "BACKING_CLEAN_KEYS",
                  f"{differs} of {sectors} dirty sectors differ")
    elif sb.state is BdevState.DIRTY and not sectors:
        yield say("BACKING_DIRTY_CLEAN", "no dirty key")
    if ran_later(walk, sb, slot):
        assert slot is not None
        yield say("BACKING_NEWER", f"last_mount {sb.last_mount}, last_reg {walk.uuids[slot].last_reg} in slot {slot}")
    if slot is None or not sectors:
        return
    base = slot << INODE_SHIFT
    if own.end - base > backing.size_sectors:
        yield say("BACKING_SMALL", f"a dirty extent ends at sector {own.end - base}, the device at "
                                   f"{backing.size_sectors}")
    if own.start - base < sb.data_offset:
        yield say("BACKING_BEFORE_DATA", f"a dirty extent begins at sector {own.start - base}, the data at "
                                         f"{sb.data_offset}")


def differing_samples(walk: Walk, backing: Backing, dirty: Extents) -> tuple[int, int]:
    """Of a spread of dirty extents, how many begin with other content on the backing device, of how many.

    What the cache cannot read says nothing.
    """
    differing = compared = 0
    for row in np.unique(np.linspace(0, max(len(dirty.start) - 1, 0), min(SAMPLES, len(dirty.start))).astype(np.intp)):
        start, ptr = int(dirty.start[row]) & (1 << INODE_SHIFT) - 1, int(PTR_OFFSET.get(dirty.ptr)[row])
        count = min(int(dirty.size[row]), SAMPLE_SECTORS)
        try:
            ours, theirs = walk.read(ptr, count), backing.read(start, count)
        except BcachectlError:
            continue
        compared += 1
        differing += ours != theirs
    return differing, compared


def any_differs(walk: Walk, backing: Backing, dirty: Extents) -> bool:
    """Whether any sector of dirty extents has other content on the backing device, or cannot be read."""
    return any(differing_sectors(walk, backing, dirty.take(slice(row, row + 1))) for row in range(len(dirty.start)))


def differing_sectors(walk: Walk, backing: Backing, dirty: Extents) -> int:
    """How many sectors of dirty extents have other content on the backing device; unreadable ones count."""
    differs = 0
    sectors = PTR_OFFSET.get(dirty.ptr).tolist()
    for start, end, ptr in zip(dirty.start.tolist(), dirty.end.tolist(), sectors, strict=True):
        sector = start & (1 << INODE_SHIFT) - 1
        for done in range(0, end - start, COMPARE_SECTORS):
            count = min(COMPARE_SECTORS, end - start - done)
            try:
                ours = np.frombuffer(walk.read(ptr + done, count), np.uint8).reshape(count, 512)
                theirs = np.frombuffer(backing.read(sector + done, count), np.uint8).reshape(count, 512)
            except BcachectlError:
                differs += count
                continue
            differs += int((ours != theirs).any(axis=1).sum())
    return differs
