# SPDX-License-Identifier: GPL-2.0-only
"""A set made to forget a backing device: its slot is retired, its extents are gone, and their buckets are free again.

The kernel's detach retires the slot as well (super.c, bch_cached_dev_detach: `INVALID_UUID` and the time in
``invalidated``), but only after everything dirty is written back, which a dead device never lets it do; and it leaves
the keys in the tree.  Keys that say dirty are never dropped by any gc, so their buckets are lost for good.

`find_slot` says whose data is meant, `held` what the cache has of it, `plan_forget` makes the writes: a rebuild as fsck
makes one, with its order and its safety (`repair`): the set is the old one until one sector switches to the new one.
A damaged set is refused, since a rebuild would settle the damage on the way, and that is fsck's to ask for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from bcachectl.errors import Refused, UsageError, WrongState
from bcachectl.fsck.check import Check
from bcachectl.fsck.findings import Severity
from bcachectl.fsck.repair import RepairWrite, plan_rebuild
from bcachectl.fsck.salvage import leaf_map
from bcachectl.ondisk.bkey import INODE_SHIFT
from bcachectl.ondisk.magic import INVALID_UUID
from bcachectl.ondisk.uuids import UuidEntry
from bcachectl.units import format_uuid, parse_uuid

SLOT_DIGITS_MAX = 6


class Held(NamedTuple):
    """What a cache has of one device number: sectors that only it has, and sectors that the device has too."""

    dirty_sectors: int
    clean_sectors: int


def refuse_damaged(check: Check, path: str) -> None:
    """Errors first: what they cost is not this verb's to decide."""
    errors = [finding for finding in check.findings if finding.severity is Severity.ERROR]
    if errors:
        codes = ", ".join(dict.fromkeys(finding.code for finding in errors))
        raise Refused(f"{path}: is damaged ({codes}); `bcachectl fsck` tells what that costs and repairs it, do that "
                      "first")


def find_slot(check: Check, path: str, wanted: str) -> int:
    """The slot that ``wanted`` names by uuid, label, bcacheN, or the number of a slot with or without an owner."""
    walk = check.walk
    names = {slot: check.volume_name(slot) for slot, entry in enumerate(walk.uuids)
             if not entry.is_free and not entry.is_retired}
    if wanted.isdigit() and len(wanted) <= SLOT_DIGITS_MAX:
        slot = int(wanted)
        if slot in names or (slot < len(walk.uuids) and slot in check.dirty):
            return slot
        raise WrongState(f"{wanted}: is no slot of the set on {path} that has an owner or dirty data; it has: "
                         f"{_list(check, names)}")
    found = [slot for slot, name in names.items() if wanted in (name, walk.uuids[slot].label_text)]
    if not found:
        try:
            uuid = parse_uuid(wanted)
        except UsageError:
            uuid = b""
        found = [slot for slot in names if walk.uuids[slot].uuid == uuid]
    if len(found) == 1:
        return found[0]
    trouble = "is the label of several devices" if found else "is no backing device"
    raise WrongState(f"{wanted}: {trouble} of the set on {path}; it has: {_list(check, names)}")


def held(check: Check, slot: int) -> Held:
    """What the cache has under a slot."""
    clean = 0
    start, end = slot << INODE_SHIFT, slot + 1 << INODE_SHIFT
    for leaf in check.slots:
        if leaf.start < end and start < leaf.end:
            kept = leaf_map(check.walk, leaf, check.journal, known_buckets=check.known_buckets).kept
            own = kept.take((kept.start >= start) & (kept.start < end) & ~kept.dirty)
            clean += int(own.size.sum())
    return Held(check.dirty[slot].sectors if slot in check.dirty else 0, clean)


def plan_forget(check: Check, slot: int, *, now_s: int) -> tuple[tuple[RepairWrite, ...], ...]:
    """The writes that make the set forget ``slot``."""
    entries = list(check.walk.uuids)
    entries[slot] = retired(entries[slot], now_s)
    check.walk.uuids = tuple(entries)
    return plan_rebuild(check, without=slot)


def retired(entry: UuidEntry, now_s: int) -> UuidEntry:
    """The entry as a detach leaves it; one that was retired before keeps its time."""
    return replace(entry, uuid=INVALID_UUID, invalidated=entry.invalidated or now_s)


def _list(check: Check, names: dict[int, str]) -> str:
    live = [f"{name} ({format_uuid(check.walk.uuids[slot].uuid)})" for slot, name in names.items()]
    orphans = [f"slot {slot}" for slot in sorted(check.dirty) if slot not in names]
    return ", ".join([*live, *orphans]) or "none"
