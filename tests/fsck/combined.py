# SPDX-License-Identifier: GPL-2.0-only
"""Several kinds of damage at once: `damaged` makes them from a seed, `judge` holds what fsck, its repair and a
write-back say against the undamaged image.

Two to five cases of tests/damage.py in one image, now and then with sectors that cannot be read, bytes that are flipped
or a device that was cut short.  What is asked, whatever the damage:

* nothing dirty is missing after a repair, nor wrong after a write-back, that was not listed as lost or as unknown;
* what a repair keeps has the content that it had;
* fsck finds nothing after a repair but what the repair said that it leaves;
* a repair that is interrupted, once or twice, can be run again and loses no more.

Damage to the newest journal entry looks like a power failure while it was being written, and nothing on the devices
tells one from the other: a note says so, and what is true then is the state before that entry (`is_newest_torn`).
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bcachectl.errors import BcachectlError
from bcachectl.fsck.check import Check
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.owners import live_extents
from bcachectl.fsck.repair import plan_repair
from bcachectl.fsck.rescue_map import Owner
from bcachectl.fsck.writeback import Copy, find_dirty, source
from bcachectl.fsck.writeback_target import member
from bcachectl.ondisk.bkey import INODE_SHIFT
from bcachectl.ondisk.jset import decode_jset
from bcachectl.ondisk.magic import jset_magic
from tests.damage import Case, cases
from tests.fsck.flip import Byte, metadata
from tests.fsck.image import Image, keep
from tests.fsck.test_damage import MOVED, apply, base_image, check, per_position, per_sector, serious
from tests.fsck.test_interrupted import interrupted
from tests.fsck.test_writeback import Disk, check_of, written_back

MOVING = (*MOVED, "short_key", "key_before")
"""Cases that change a key with its checksum: it no longer says where it was, and nobody can list what that costs."""
CASES_MAX = 5
DEVICES_MAX = 4


class Truth(NamedTuple):
    """An undamaged image: its metadata, its live extents, its dirty positions, its backing devices written back."""

    image: Image
    metadata: list[Byte]
    live: Extents
    dirty: set[int]
    backings: list[bytes]


class Listed(NamedTuple):
    """Positions that a check says are lost, and ranges that nothing is known about."""

    lost: set[int]
    unknown: list[tuple[int, int]]

    def has(self, position: int) -> bool:
        """The position is among them."""
        return position in self.lost or self.is_unknown(position)

    def is_unknown(self, position: int) -> bool:
        """Nothing is known about the position."""
        return any(start <= position < end for start, end in self.unknown)


TRUTHS: dict[str, Truth] = {}


def truth(golden: Callable[..., Path], base: str) -> Truth:
    """What is true of a story."""
    return keep(TRUTHS, base, lambda: truth_of(base_image(golden(base))))


def truth_of(image: Image) -> Truth:
    """What is true of an undamaged image."""
    extents = live_extents(check(image.fresh()))
    return Truth(image, list(metadata(image)), extents, per_sector(extents, dirty=True), written_back(image))


def is_newest_torn(image: Image, truth: Truth) -> bool:
    """Where the newest journal entry of ``truth`` stood there is none now, as after a power failure."""
    newest, walk = truth.image.walk.replay[-1], truth.image.walk
    assert walk.superblock is not None
    nbytes = newest.jset.blocks * walk.geometry.block_bytes
    try:
        buf = image.cache.read(truth.image.entry_at(newest) >> 9, nbytes >> 9)
    except BcachectlError:
        return False
    return decode_jset(buf, 0, magic=jset_magic(walk.superblock.set_uuid), block_bytes=walk.geometry.block_bytes,
                       limit_bytes=nbytes) is None


def truth_before_newest(truth: Truth) -> Truth:
    """What was true while the newest journal entry had not been written."""
    torn = truth.image.fresh()
    torn.cache.flip(torn.entry_at(truth.image.walk.replay[-1]))
    return truth_of(Image(torn.cache.content(), [device.content() for device in torn.backings]))


def bases() -> dict[str, list[Case]]:
    """The cases by image; an image that never ran has nothing to lose."""
    found: dict[str, list[Case]] = {}
    for case in cases():
        if case.base != "fresh":
            found.setdefault(case.base, []).append(case)
    return found


def damaged(truth: Truth, pool: list[Case], dice: random.Random) -> tuple[Image, list[str]]:
    """A damaged copy and the names of what was done to it; what finds its place damaged already is left out."""
    image, names = truth.image.fresh(), []

    def attempt(name: str, edit: Callable[[], object]) -> None:
        try:
            edit()
        except (BcachectlError, AssertionError, StopIteration, LookupError, ValueError, struct.error):
            return
        names.append(name)

    for case in dice.sample(pool, min(len(pool), dice.randint(1, CASES_MAX))):
        attempt(case.name, lambda case=case: case.edit(image))  # type: ignore[misc]
    kind = dice.random()
    for _ in range(dice.randint(1, 3)):
        byte, mask, count = dice.choice(truth.metadata), dice.randrange(1, 256), dice.choice((1, 8, 64))
        first = byte.offset >> 9 if dice.random() < 0.7 else dice.randrange(8, image.cache.size_sectors)
        if kind < 0.25:
            attempt(f"flip {byte.offset} {mask:#x}", lambda at=byte.offset, mask=mask: image.cache.flip(at, mask))  # type: ignore[misc]
        elif kind < 0.5:
            image.cache.unreadable.update(range(first, min(first + count, image.cache.size_sectors)))
            names.append(f"unreadable {first}+{count}")
    if kind > 0.95:
        image.cache.size_sectors = dice.randrange(image.cache.size_sectors // 4, image.cache.size_sectors)
        names.append(f"cut at {image.cache.size_sectors}")
    return image, names


def copy_of(image: Image) -> Image:
    """The same devices, to be changed by themselves."""
    other = image.fresh()
    for mine, its in zip([other.cache, *other.backings], [image.cache, *image.backings], strict=True):
        mine.edits, mine.unreadable, mine.size_sectors = dict(its.edits), set(its.unreadable), its.size_sectors
    return other


def listed(checked: Check) -> Listed:
    """What a check says is lost or unknown."""
    lost: set[int] = set()
    unknown: list[tuple[int, int]] = []
    for finding in checked.findings:
        unknown += finding.unknown
        for loss in finding.losses:
            base = (loss.inode << INODE_SHIFT) + checked.data_offset(loss.inode)
            for start, end in loss.ranges:
                lost.update(range(base + (start >> 9), base + (end >> 9)))
    return Listed(lost, unknown)


def wrong_after_writeback(image: Image, truth: Truth) -> Iterator[tuple[str, int]]:
    """Device and sector of all that a write-back leaves wrong without saying so."""
    try:
        checked = check_of(image)
    except BcachectlError:
        return
    dirty = find_dirty(checked)
    assert checked.walk.superblock is not None
    assert checked.walk.newest is not None
    for device, good in zip(image.backings, truth.backings, strict=False):  # A case may add a copy of one.
        try:
            found = member(checked.walk, dirty, device.as_backing())
        except BcachectlError:
            continue
        entries = checked.walk.uuids
        if any(entry.uuid == found.superblock.uuid and entries[slot].is_free
               for slot, entry in enumerate(truth.image.walk.uuids) if slot < len(entries)):
            # What the slot has that it really had is an orphan, and listed as one: it may be older than the device.
            continue
        own = source(dirty, found.inode, first_sector=found.superblock.data_offset, end_sector=device.size_sectors)
        owner = Owner(checked.walk.superblock.set_uuid, found.superblock.uuid, checked.walk.newest.seq)
        disk = Disk(device.content())
        copy = Copy(image.cache.read, image.cache.read, image.cache.announce, disk, own, owner,
                    end_sector=device.size_sectors)
        assert [step.done_sectors for step in copy.run()][-1:] in ([], [sum(own.extents.size.tolist())])
        ours = np.frombuffer(bytes(disk.content), np.uint8).reshape(-1, 512)
        differs = np.flatnonzero((ours != np.frombuffer(good, np.uint8)[:ours.size].reshape(-1, 512)).any(axis=1))
        is_silent = differs >= found.superblock.data_offset
        for rows in (copy.lost, copy.unknown):
            for start, end in zip(rows.start.tolist(), rows.end.tolist(), strict=True):
                is_silent &= (differs < start) | (differs >= end)
        yield from ((device.name, sector) for sector in differs[is_silent].tolist())


def judge(image: Image, truth: Truth, dice: random.Random, *, safe_only: bool) -> Iterator[str]:
    """What is wrong with the repair of a damaged image, and with a write-back after it."""
    before = check(image)
    told = listed(before)
    try:
        repair = plan_repair(before, safe_only=safe_only)
    except BcachectlError:
        return
    if not repair.steps:
        return  # Nothing is written, so nothing is lost by it.
    left = {finding.code for finding in repair.left}
    work = copy_of(image)
    apply(work, repair)
    after = check(work)
    yield from (f"fsck finds {code} after the repair" for code in serious(after)
                # Nobody could look at a device that the set did not know.
                if code not in left and not code.startswith("BACKING_"))
    extents = live_extents(after)
    missing = truth.dirty - per_sector(extents, dirty=True)
    if silent := [position for position in missing if not told.has(position)]:
        yield f"{len(silent)} dirty sectors are missing and not listed, the first at {min(silent)}"
    yield from _wrong_content(work, truth, extents, told)
    silent = [sector for _name, sector in wrong_after_writeback(copy_of(work), truth)
              if not any(told.has((inode << INODE_SHIFT) + sector) for inode in range(DEVICES_MAX))]
    if silent:
        yield f"{len(silent)} sectors are wrong after a write-back of what was repaired, the first {silent[0]}"
    again = copy_of(image)
    for _ in range(dice.choice((1, 1, 2))):
        steps = plan_repair(check(again), safe_only=safe_only).steps
        interrupted(again, steps, dice.randint(0, sum(map(len, steps))), dice)
    last = plan_repair(check(again), safe_only=safe_only)
    apply(again, last)
    finally_ = check(again)
    # Here as well, a device that the set did not know could not be looked at before.
    if more := {finding.code for finding in last.left if not finding.code.startswith("BACKING_")} - left:
        yield f"an interrupted repair leaves {sorted(more)} besides"
    lost = truth.dirty - per_sector(live_extents(finally_), dirty=True) - missing
    if any(not told.has(position) for position in lost):
        yield f"an interrupted repair loses {len(lost)} dirty sectors more"


def _wrong_content(work: Image, truth: Truth, extents: Extents, told: Listed) -> Iterator[str]:
    (position, sector), (good_position, good_sector) = per_position(extents), per_position(truth.live)
    if not len(position) or not len(good_position):
        return
    place = np.minimum(np.searchsorted(good_position, position), len(good_position) - 1)
    is_known = good_position[place] == position
    wrong = [int(each) for each in position[~is_known] if not told.is_unknown(int(each))]
    for row in np.flatnonzero(is_known & (sector != good_sector[place])).tolist():
        if told.is_unknown(int(position[row])):
            continue
        try:
            data = work.cache.read(int(sector[row]), 1)
        except BcachectlError:
            continue
        if data != truth.image.cache.read(int(good_sector[place[row]]), 1):
            wrong.append(int(position[row]))
    if wrong:
        yield f"{len(wrong)} sectors have other content, the first at {wrong[0]}"
