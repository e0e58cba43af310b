# SPDX-License-Identifier: GPL-2.0-only
"""Backing devices whose superblock and cache disagree: what happened, what can be done, what each choice loses.

`judge` looks at a backing superblock and, if it is at hand, the checked set; nothing here writes.  The states, in the
kernel's words (sysfs ``state``):

=============  ====================================  =====================================
state          the cache                             then
=============  ====================================  =====================================
dirty          not at hand, or of another set        its newest data is missing
dirty          has no slot for it                    the kernel refuses to attach it
dirty          has a slot                            all is well; it only has to run
inconsistent   not at hand                           it ran without; what it misses is unknown
inconsistent   has a slot with dirty data            two histories: one has to give way
clean          has dirty data that differs           one of them is wrong
no cache       has a slot with dirty data            as if it had been detached by force
no cache       has such data, which the device has   a power failure ended a detach
no device      has a slot with dirty data            `absent`: the data waits for its device
=============  ====================================  =====================================

There are two ways out, `USE_ALONE` and `KEEP_DIRTY`.

* `USE_ALONE`: the device is marked detached (state no cache, no set), and the set forgets its slot, so that nothing of
  it ever shows again.  What only the cache has is lost.
* `KEEP_DIRTY`, for a clean device: its state becomes dirty, and the set writes the data back when it runs.  For one
  that ran alone, or may have: the dirty data is copied over what is there, and then the device is marked detached and
  the slot forgotten as well; the *clean* data of the cache is older than what was written meanwhile, and would hide it.

A dirty device is never made to look clean: it says *dirty* until the user has chosen (docs/promises.md, P4).
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import NamedTuple

from bcachectl.fsck import extents as extent
from bcachectl.fsck.check import Check
from bcachectl.fsck.check_backing import (
    IN_FLIGHT_SECTORS,
    Backing,
    any_differs,
    differing_sectors,
    settled_backing,
    slot_of,
)
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.flags import settle
from bcachectl.fsck.rescue_map import joined, marked
from bcachectl.ondisk.bkey import INODE_SHIFT
from bcachectl.ondisk.superblock import (
    BDEV_DATA_START_DEFAULT,
    SB_BYTES,
    SB_SECTOR,
    BdevState,
    Superblock,
    encode_superblock,
    judge_csum,
)
from bcachectl.units import counted, format_sectors, format_uuid

USE_ALONE, KEEP_DIRTY = "use-backing-alone", "keep-dirty"


class Loss(NamedTuple):
    """What a choice loses: sectors and ranges of the volume in bytes; None where nobody knows."""

    sectors: int | None
    ranges: tuple[tuple[int, int], ...]
    text: str


class Choice(NamedTuple):
    """A way out: the option that takes it (empty: another command does), what it does, what it loses."""

    option: str
    does: str
    loss: Loss


class Verdict(NamedTuple):
    """What is known of a backing device: ``slot`` is its device number, if the set at hand has one for it."""

    state: str
    story: str
    slot: int | None
    dirty: Extents
    choices: tuple[Choice, ...]

    def choice(self, option: str) -> Choice | None:
        """The choice of that name, if it makes sense here."""
        return next((choice for choice in self.choices if choice.option == option), None)

    @property
    def copies(self) -> bool:
        """Whether keeping the dirty data means to copy it: the device ran without the set, or may have."""
        return self.state in ("inconsistent", "no cache")


NOTHING = Loss(0, (), "nothing")


def is_sound(backing: Backing) -> bool:
    """Its superblock has the right checksum."""
    stored, expected = judge_csum(backing.read(SB_SECTOR, SB_BYTES >> 9))
    return stored == expected


def likely(sb: Superblock, backing: Backing, check: Check | None) -> Superblock:
    """What to go by where the superblock ``sb`` of a device fails its checksum: dirty, if nothing tells better."""
    raw = backing.read(SB_SECTOR, SB_BYTES >> 9)
    settled = settle(sb, raw, None, slot=None, is_member=False) if check is None else settled_backing(
        check.walk, backing, check)
    if settled.superblock is not None:
        return settled.superblock
    is_told = check is not None and slot_of(check.walk, sb.uuid) is not None
    found = replace(sb, offset=SB_SECTOR, keys=len(sb.d))
    return found if is_told and sb.state is not BdevState.CLEAN else found.with_state(BdevState.DIRTY)


def judge(sb: Superblock, backing: Backing, check: Check | None, cache: str) -> Verdict:
    """The verdict on a backing device whose superblock is ``sb``; ``check`` is of the cache device named ``cache``."""
    if check is None:
        return _without_cache(sb, backing.name)
    assert check.walk.superblock is not None
    set_uuid = check.walk.superblock.set_uuid
    if sb.set_uuid not in (set_uuid, bytes(16)):
        verdict = _without_cache(sb, backing.name)
        return verdict._replace(story=f"{cache} is not its cache: that is of set {format_uuid(set_uuid)}, the device "
                                      f"of set {format_uuid(sb.set_uuid)}. {verdict.story}")
    slot = slot_of(check.walk, sb.uuid)
    if slot is None:
        return _without_slot(sb, check, backing.name, cache)
    if slot not in check.dirty:
        return _without_dirty(sb, slot)
    return _with_dirty(sb, backing, check, cache, slot, check.dirty_extents(slot))


def absent(check: Check, slot: int, cache: str) -> Verdict:
    """The verdict on a device number of a set, without the backing device that it belongs to."""
    name, entry = check.volume_name(slot), check.walk.uuids[slot]
    if slot not in check.dirty:
        story = f"{cache} holds no dirty data of {name}: its backing device has all its data."
        return Verdict("not at hand", story, slot, extent.empty(), ())
    if entry.is_flash_only and not entry.is_retired:
        story = f"{name} lives on {cache} alone; it has no backing device to agree with."
        return Verdict("flash-only", story, slot, extent.empty(), ())
    dirty = check.dirty_extents(slot)
    size = format_sectors(check.dirty[slot].sectors)
    ranges = ranges_of(dirty, slot, BDEV_DATA_START_DEFAULT)
    lost = Loss(check.dirty[slot].sectors, ranges,
                f"{size} that only the cache has, in {counted(len(ranges), 'range')}")
    word = str(slot) if entry.is_free or entry.is_retired else format_uuid(entry.uuid)
    command = f"`bcachectl forget-backing {cache} {word}"
    choices = (Choice("", f"find the device: `bcachectl writeback {cache} DEVICE` gives it its data", NOTHING),
               Choice("", f"{command} --export FILE` saves the data into a file and frees its space", NOTHING),
               Choice("", f"{command} --accept-loss` gives the data up and frees its space", lost))
    story = f"{cache} holds {size} of dirty data of {name}, and its backing device was not named."
    return Verdict("not at hand", story, slot, dirty, choices)


def ownerless(check: Check) -> dict[int, int]:
    """Dirty sectors by slot, of slots that no device owns."""
    entries = check.walk.uuids
    return {slot: dirty.sectors for slot, dirty in sorted(check.dirty.items())
            if slot >= len(entries) or entries[slot].is_free or entries[slot].is_retired}


def alone(sb: Superblock, raw: bytes) -> bytes:
    """The superblock of a detached device, as the end of a detach writes it (super.c, cached_dev_detach_finish)."""
    return encode_superblock(replace(sb.with_state(BdevState.NONE), set_uuid=bytes(16)), raw)


def dirty_again(sb: Superblock, raw: bytes, set_uuid: bytes) -> bytes:
    """The superblock of a device that needs its cache."""
    return encode_superblock(replace(sb.with_state(BdevState.DIRTY), set_uuid=set_uuid), raw)


def ranges_of(dirty: Extents, slot: int, data_offset: int) -> tuple[tuple[int, int], ...]:
    """Extents as half-open byte ranges of the volume."""
    base = (slot << INODE_SHIFT) + data_offset
    rows = joined(marked(dirty.start, dirty.end, 0))
    return tuple((start - base << 9, end - base << 9)
                 for start, end in zip(rows.start.tolist(), rows.end.tolist(), strict=True))


def _without_cache(sb: Superblock, name: str) -> Verdict:
    state = sb.state.word
    if sb.state is BdevState.NONE:
        return Verdict(state, "It needs no cache, and belongs to no set.", None, extent.empty(), ())
    if sb.state is BdevState.CLEAN:
        story = "It holds all its data by itself, but does not come up before its cache does."
        return Verdict(state, story, None, extent.empty(), (_clean_alone("runs without one from now on"),))
    unknown = Loss(None, (), f"unknown: everything that was written in writeback mode and not written back; "
                             f"the device was started last {_time(sb.last_mount)}")
    find = Choice("", f"find the cache device of set {format_uuid(sb.set_uuid)} (`bcachectl list` shows what is here), "
                      f"and name it with --cache", NOTHING)
    use = Choice(USE_ALONE, "mark the device detached, so that it runs without a cache from now on", unknown)
    if sb.state is BdevState.DIRTY:
        story = ("Its newest data is in its cache alone, and no cache was named that has it. What the device holds is "
                 "older, and need not fit together.")
    else:
        story = ("It ran without its cache while data was dirty there. What it holds lacks that data, and has what "
                 "was written since.")
    return Verdict(state, story, None, extent.empty(), (find, use))


def _clean_alone(then: str) -> Choice:
    return Choice(USE_ALONE, f"mark the device detached, so that it {then}", NOTHING)


def _without_slot(sb: Superblock, check: Check, name: str, cache: str) -> Verdict:
    verdict = _without_cache(sb, name)
    if sb.state in (BdevState.NONE, BdevState.CLEAN):
        return verdict
    retired = ownerless(check)
    if not retired:
        story = f"The set on {cache} does not know the device, and holds no dirty data that nobody owns."
        lost = Loss(None, (), f"unknown: {cache} has nothing of it, so what was never written back is gone already")
        choices = tuple(choice._replace(loss=lost) for choice in verdict.choices if choice.option)
        return verdict._replace(story=story, choices=choices)
    listed = ", ".join(f"slot {slot} ({format_sectors(sectors)})" for slot, sectors in sorted(retired.items()))
    story = (f"The set on {cache} does not know the device, but holds dirty data that nobody owns: {listed}. A detach "
             "that was forced, and an attach after it, leave that.")
    command = f"bcachectl writeback --slot {min(retired)} --to {name} --force=overwrite {cache}"
    rescue = Choice("", f"`{command}` writes that of a slot to the device, if it is the device's", NOTHING)
    total = Loss(None, (), f"unknown: what of {format_sectors(sum(retired.values()))} is this device's")
    alone_choice = Choice(USE_ALONE, "mark the device detached; the cache is left as it is", total)
    return verdict._replace(story=story, choices=(rescue, alone_choice))


def _without_dirty(sb: Superblock, slot: int) -> Verdict:
    state = sb.state.word
    if sb.state is BdevState.STALE:
        story = "It ran without its cache, but the cache has no dirty data of it, so the device lacks nothing."
        use = Choice(USE_ALONE, "mark the device detached and let the set forget its older copies", NOTHING)
        return Verdict(state, story, slot, extent.empty(), (use,))
    use = _clean_alone("runs without a cache, and let the set forget its copies")
    choices = (use,) if sb.state is BdevState.CLEAN else ()
    return Verdict(state, "Its cache holds no dirty data of it, so the device has all its data.", slot, extent.empty(),
                   choices)


def _with_dirty(sb: Superblock, backing: Backing, check: Check, cache: str, slot: int, dirty: Extents) -> Verdict:
    state, sectors = sb.state.word, int(dirty.size.sum())
    ranges = ranges_of(dirty, slot, sb.data_offset)
    size = format_sectors(sectors)
    given_up = Loss(sectors, ranges,
                    f"{size} that only the cache has, in {counted(len(ranges), 'range of the volume')}")
    use = Choice(USE_ALONE, "mark the device detached and let the set forget it; --export FILE saves the dirty data "
                            "first", given_up)
    if sb.state is BdevState.DIRTY:
        run = Choice("", f"run the set, or write it back: `bcachectl writeback {cache} {backing.name}`", NOTHING)
        return Verdict(state, f"All is well: its cache has {size} of newer data, and the device says so.", slot, dirty,
                       (run, use))
    if sb.state is BdevState.CLEAN:
        differs = differing_sectors(check.walk, backing, dirty) if backing.has_data else sectors
        if differs <= IN_FLIGHT_SECTORS or differs * 2 <= sectors:
            story = (f"Its cache has {size} that are marked dirty, and {format_sectors(differs)} of them differ: no "
                     "more than a power failure leaves. The next start settles that.")
            return Verdict(state, story, slot, dirty, ())
        story = (f"It says that it is clean, but its cache has {size} of dirty data, and {format_sectors(differs)} of "
                 "that are not on the device.")
        keep = Choice(KEEP_DIRTY, "mark the device dirty, so that the set writes the data back when it runs; right, "
                                  "unless the cache device is an older copy of itself", NOTHING)
        return Verdict(state, story, slot, dirty, (keep, use))
    if sb.state is BdevState.NONE and backing.has_data and not any_differs(check.walk, backing, dirty):
        story = (f"Its cache still marks {size} as dirty, and all of that is on the device as well: power failed when "
                 "a detach had just ended.")
        use = Choice(USE_ALONE, "leave the device detached, as it is, and let the set forget it", NOTHING)
        return Verdict(state, story, slot, dirty, (use,))
    since = "while it ran without the cache" if sb.state is BdevState.STALE else "since it was marked detached"
    kept = Loss(sectors, ranges, f"whatever was written to {counted(len(ranges), 'range')} there ({size}) {since}")
    keep = Choice(KEEP_DIRTY, "copy the cache's dirty data over what the device holds there, then mark the device "
                              "detached and let the set forget it", kept)
    story = (f"It ran without its cache, which has {size} of dirty data of it: two histories, each with data that the "
             "other lacks." if sb.state is BdevState.STALE else
             f"It says that it has no cache, but one has {size} of dirty data for it, as after a detach by force.")
    return Verdict(state, story, slot, dirty, (keep, use))


def _time(seconds: int) -> str:
    if not seconds:
        return "at a time that is not recorded"
    return "on " + datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d at %H:%M:%S UTC")
