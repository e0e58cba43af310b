# SPDX-License-Identifier: GPL-2.0-only
"""Where dirty data may go: `member` judges a backing device of the set, `orphans` lists data that has none.

Writing to the wrong device, or over data that is newer, cannot be taken back.  So `member` refuses, with the reason:

* a device of another set, one that is no backing device, one whose superblock is damaged (fsck repairs it first);
* one that was detached: its slot is retired, and it may have been written to since (`orphans` is the way);
* one that ran without its cache (STALE, sysfs's ``inconsistent``): it may hold newer data than the cache;
* one that says it is clean, but most of the dirty data is not on it: the cache may be an older copy of itself.
* one that is dirty, but has run later than the set knows, for the same reason.  Only these three can be overridden;
* one whose uuid stands in two slots that both have dirty data: it would get only that of the first;
* one that ends before the last of its dirty data: it was cut short, or is not the device that was attached.

A slot is an orphan if the uuid array has no live entry for it and dirty keys still name it.  A detach that was forced
leaves that behind; so does a uuid array that cannot be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bcachectl.errors import BcachectlError, Refused, WrongState
from bcachectl.fsck.check import Check
from bcachectl.fsck.check_backing import IN_FLIGHT_SECTORS, Backing, differing_samples, ran_later, read_backing, slot_of
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.findings import Severity
from bcachectl.fsck.owners import evidence_for, live_extents
from bcachectl.fsck.walk import Walk
from bcachectl.fsck.writeback import Dirty, sectors_of
from bcachectl.ondisk.bkey import INODE_SHIFT
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, BdevState, Superblock, encode_superblock
from bcachectl.ondisk.uuids import UuidEntry
from bcachectl.units import format_uuid

HAZARD_STALE = "inconsistent"


class Member(NamedTuple):
    """A backing device of the set that may be written to: its superblock, as bytes and decoded, and its slot."""

    backing: Backing
    raw: bytes
    superblock: Superblock
    inode: int

    @property
    def is_clean(self) -> bool:
        """Its superblock says already that it needs no cache."""
        return self.superblock.state is BdevState.CLEAN

    @property
    def settled_state(self) -> str:
        """The word for the state that it gets once it has all its data."""
        return (BdevState.NONE if self.superblock.state is BdevState.STALE else BdevState.CLEAN).word

    def marked_clean(self) -> bytes:
        """Its superblock with the state CLEAN; bytes that no field stands for are kept.

        One that ran without the set is detached instead: the clean data that the cache has of it is older than what was
        written meanwhile, and would hide that.  The next attach takes a new slot.
        """
        if self.superblock.state is BdevState.STALE:
            sb = replace(self.superblock.with_state(BdevState.NONE), set_uuid=bytes(16))
            return encode_superblock(sb, self.raw)
        return encode_superblock(self.superblock.with_state(BdevState.CLEAN), self.raw)


class Orphan(NamedTuple):
    """Dirty data of a slot without a live entry; ``entry`` is what the uuid array still says about it."""

    inode: int
    state: str
    entry: UuidEntry | None
    extents: int
    dirty_sectors: int
    end_sector: int
    likely: tuple[str, ...]


def superblock_of(backing: Backing, *, may_fail_csum: bool = False) -> Superblock:
    """The superblock of a backing device; an error if there is something wrong with it."""
    sb, found = read_backing(backing)
    serious = [finding for finding in found if finding.severity is Severity.ERROR
               and not (may_fail_csum and finding.code == "BACKING_CSUM")]
    if sb is None and any(finding.code == "BACKING_KIND" for finding in found):
        raise Refused(f"{backing.name}: is a cache device; name the backing devices of the set")
    if sb is None or serious:
        why = f" ({serious[0].why})" if serious else ""
        raise BcachectlError(f"{backing.name}: has no good superblock of a backing device{why}; `bcachectl fsck` with "
                             "this device can repair a damaged one")
    return sb


def member(walk: Walk, dirty: Dirty, backing: Backing, *, force_stale: bool = False) -> Member:
    """The backing device as a place to write to, or the reason why not."""
    assert walk.superblock is not None
    name, sb, set_uuid = backing.name, superblock_of(backing), walk.superblock.set_uuid
    if sb.state is BdevState.NONE:
        raise WrongState(f"{name}: is detached, so no dirty data belongs to it any more; --orphans lists data that a "
                         "forced detach left behind")
    # A set uuid that was put together from its first half, which is all that the journal tells, fits by that half.
    is_guess = set_uuid[:8] == set_uuid[8:]
    if sb.set_uuid != set_uuid and not (is_guess and sb.set_uuid[:8] == set_uuid[:8]):
        raise WrongState(f"{name}: belongs to set {format_uuid(sb.set_uuid)}, the cache to set {format_uuid(set_uuid)}")
    if sb.state is BdevState.STALE and not force_stale:
        raise Refused(f"{name}: ran without its cache while data was dirty, and may hold newer data than the cache",
                      hazard=HAZARD_STALE)
    inode = slot_of(walk, sb.uuid)
    if inode is None:
        raise WrongState(f"{name}: the set knows no device {format_uuid(sb.uuid)}; --orphans lists dirty data without "
                         "a known device, and --slot with --to writes it")
    own = dirty.by_inode.get(inode)
    others = [slot for slot, entry in enumerate(walk.uuids)
              if entry.uuid == sb.uuid and slot > inode and not entry.is_flash_only and slot in dirty.by_inode]
    if others:
        raise Refused(f"{name}: slots {inode} and {others[0]} of the set both have its uuid; `bcachectl fsck` settles "
                      "that, and what the second one has is an orphan then (--orphans)")
    if sb.state is BdevState.CLEAN and own is not None and not force_stale:
        differing, compared = differing_samples(walk, backing, own)
        if differing * 2 > compared and sectors_of(own) > IN_FLIGHT_SECTORS:
            raise Refused(f"{name}: says that it is clean, and most of the cache's dirty data is not on it: either "
                          "that is wrong, or the cache device is an older copy of itself and the device's data newer; "
                          "`bcachectl resolve` tells more", hazard=HAZARD_STALE)
    if ran_later(walk, sb, inode) and not force_stale:
        raise Refused(f"{name}: has run later than the set knows: the cache device may be an older copy of itself, and "
                      "the device's data newer; or power failed just then, or the clock was set back",
                      hazard=HAZARD_STALE)
    end = int(own.end.max()) - (inode << INODE_SHIFT) if own is not None else 0
    if end > backing.size_sectors:
        raise Refused(f"{name}: is too small: dirty data of it ends at sector {end}, the device at sector "
                      f"{backing.size_sectors}; was it, or an image of it, cut short?")
    return Member(backing, backing.read(SB_SECTOR, SB_BYTES >> 9), sb, inode)


def orphans(check: Check, dirty: Dirty, candidates: Sequence[Backing]) -> list[Orphan]:
    """Every slot with dirty data and without a live entry; ``candidates`` may be the devices that it came from."""
    entries = check.walk.uuids
    found: list[Orphan] = []
    live: Extents | None = None
    for inode, extents in sorted(dirty.by_inode.items()):
        entry = entries[inode] if inode < len(entries) else None
        if entry is not None and not entry.is_free and not entry.is_retired:
            continue
        state = "unknown" if entry is None else "retired" if entry.is_retired else "free"
        end = int(extents.end.max()) - (inode << INODE_SHIFT)
        likely = [each for each in candidates if _may_be(check, each, entry, end_sector=end)]
        if likely:
            live = live_extents(check) if live is None else live
            own = live.take(live.start >> np.uint64(INODE_SHIFT) == inode)
            likely = _by_content(check, likely, own, inode)
        names = tuple(each.name for each in likely)
        found.append(Orphan(inode, state, entry, len(extents.start), sectors_of(extents), end, names))
    return found


def _by_content(check: Check, likely: list[Backing], own: Extents, inode: int) -> list[Backing]:
    # Clean data of the slot is on the right device too: one whose content is another's cannot be it, and the one that
    # agrees most comes first.
    ranked: list[tuple[float, Backing]] = []
    for each in likely:
        sb, _found = read_backing(each)
        if sb is not None and len(own.start):
            evidence = evidence_for(check.walk, each, sb, own, inode)
            if not evidence.disagrees:
                ranked.append((evidence.equal / max(evidence.compared, 1), each))
    return [each for _share, each in sorted(ranked, key=lambda pair: -pair[0])]


def _may_be(check: Check, candidate: Backing, entry: UuidEntry | None, *, end_sector: int) -> bool:
    # Large enough, with the label that the slot keeps if it keeps one, and no live member of the set; but one that was
    # attached anew after the slot was retired may well be the device that was torn off.
    sb, _found = read_backing(candidate)
    if sb is None or candidate.size_sectors < end_sector:
        return False
    slot = slot_of(check.walk, sb.uuid)
    if slot is not None:
        is_later = entry is not None and 0 < entry.invalidated <= check.walk.uuids[slot].first_reg
        if not is_later:
            return False
    return entry is None or not entry.label_text or entry.label_text == sb.label_text
