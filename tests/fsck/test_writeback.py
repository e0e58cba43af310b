# SPDX-License-Identifier: GPL-2.0-only
"""Write-back without the set: what it brings to the backing devices, what it leaves out, and how it goes on.

The law of all of it, `judge`: a sector of a backing device that is not as it should be afterwards is in the lost or in
the unknown ranges; and where only data cannot be read, exactly the dirty sectors there are lost.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bcachectl.errors import BcachectlError, DeviceError, Refused, WrongState
from bcachectl.fsck import extents as extent
from bcachectl.fsck import rescue_map
from bcachectl.fsck.check import Check, run
from bcachectl.fsck.check_backing import Backing
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.rescue import guess_superblock, superblock_problem
from bcachectl.fsck.rescue_map import Owner, RescueMap
from bcachectl.fsck.writeback import (
    AHEAD_EXTENTS,
    AHEAD_SECTORS,
    PIECE_SECTORS,
    Copy,
    Dirty,
    find_dirty,
    source,
    with_all_entries,
    writes,
)
from bcachectl.fsck.writeback_target import member, orphans
from bcachectl.ondisk.bkey import INODE_SHIFT, PTR_OFFSET
from bcachectl.ondisk.magic import INVALID_UUID
from bcachectl.ondisk.superblock import BdevState
from tests.damage import cases
from tests.fsck.image import Image, keep, stored

STORIES = ("attached_clean", "dirty_crash", "deep_crash", "thrash_crash", "killed", "two_backing", "flash_volume",
           "fifo_discard", "gen_churn")
DIRTY = ("dirty_crash", "deep_crash", "thrash_crash", "killed", "two_backing", "flash_volume")
DATA_OFFSET = 16


class PowerLoss(Exception):
    """The end of a run, at a write of the test's choice."""


class Disk:
    """A backing device in memory that may stop before a write."""

    def __init__(self, content: bytes, stop_before: int = -1) -> None:
        self.content = bytearray(content)
        self.stop_before = stop_before
        self.writes: list[tuple[int, int]] = []

    def write(self, sector: int, data: memoryview) -> None:
        assert sector >= DATA_OFFSET
        assert len(data) % 512 == 0
        assert 0 < len(data) <= PIECE_SECTORS << 9
        if len(self.writes) == self.stop_before:
            raise PowerLoss
        self.writes.append((sector, len(data) >> 9))
        self.content[sector << 9:(sector << 9) + len(data)] = data


LOADED: dict[str, Image] = {}
EXAMINED: dict[str, tuple[Check, Dirty]] = {}
TRUTHS: dict[str, list[bytes]] = {}


def load(golden: Callable[..., Path], name: str) -> Image:
    """The images of a story, read once; nobody edits what this gives, see `Image.fresh`."""
    return keep(LOADED, name, lambda: stored(golden(name)))


def truths_of(golden: Callable[..., Path], name: str) -> list[bytes]:
    """Its backing devices as they are when nothing is damaged."""
    return keep(TRUTHS, name, lambda: written_back(load(golden, name)))


def check_of(image: Image) -> Check:
    guess = None
    if superblock_problem(image.cache.read, image.cache.size_sectors):
        guess = guess_superblock(image.cache.read, image.cache.size_sectors,
                                 [device.as_backing() for device in image.backings],
                                 bucket_size=image.walk.geometry.bucket_size_sectors)
        if guess is None:
            raise BcachectlError("no superblock, and nothing to go by")
    check = run(Check(image.cache.read, image.cache.size_sectors, [device.as_backing() for device in image.backings],
                      instead=guess, judges_backings=False))
    if check.walk.newest is None:
        raise BcachectlError("no journal entry is left")
    return with_all_entries(check)


def examined(image: Image) -> tuple[Check, Dirty]:
    """The check of an image and its dirty data; those of images without edits are kept."""
    def examine() -> tuple[Check, Dirty]:
        check = check_of(image)
        return check, find_dirty(check)

    name = next((name for name, each in LOADED.items() if each is image), None)
    return examine() if name is None else keep(EXAMINED, name, examine)


def copies(image: Image, disks: list[Disk], *, retries: int = 0, maps: list[Extents] | None = None) -> list[Copy]:
    """A copy for each backing device, not run yet."""
    check, dirty = examined(image)
    assert check.walk.superblock is not None
    assert check.walk.newest is not None
    made: list[Copy] = []
    for number, (device, disk) in enumerate(zip(image.backings, disks, strict=True)):
        found = member(check.walk, dirty, device.as_backing())
        own = source(dirty, found.inode, first_sector=DATA_OFFSET, end_sector=device.size_sectors)
        owner = Owner(check.walk.superblock.set_uuid, found.superblock.uuid, check.walk.newest.seq)
        made.append(Copy(image.cache.read, image.cache.read, image.cache.announce, disk, own, owner,
                         end_sector=device.size_sectors, earlier=maps[number] if maps else None, retries=retries))
    return made


def finish(copy: Copy) -> None:
    steps = list(copy.run())
    assert all(before.done_sectors <= after.done_sectors for before, after in itertools.pairwise(steps))
    assert not steps or steps[-1].done_sectors == steps[-1].total_sectors


def written_back(image: Image) -> list[bytes]:
    """The backing devices as they are when nothing is damaged."""
    disks = [Disk(device.content()) for device in image.backings]
    for copy in copies(image, disks):
        finish(copy)
        assert not len(copy.lost.start)
        assert not len(copy.unknown.start)
    return [bytes(disk.content) for disk in disks]


def sectors(rows: Extents) -> set[int]:
    return {sector for start, end in zip(rows.start.tolist(), rows.end.tolist(), strict=True)
            for sector in range(start, end)}


def differing(one: bytes, other: bytes) -> set[int]:
    rows = np.frombuffer(one, np.uint8).reshape(-1, 512) != np.frombuffer(other, np.uint8).reshape(-1, 512)
    return set(np.flatnonzero(rows.any(axis=1)).tolist())


def judge(copy: Copy, disk: Disk, before: bytes, truth: bytes) -> None:
    """Whatever was damaged: what is wrong is said to be, and what is said to be lost was not written."""
    lost = sectors(copy.lost)
    unknown = copy.unknown
    wrong = differing(bytes(disk.content), truth)
    missing = {sector for sector in wrong - lost
               if not bool(((unknown.start <= sector) & (unknown.end > sector)).any())}
    assert missing == set()
    assert all(disk.content[sector << 9:(sector + 1) << 9] == before[sector << 9:(sector + 1) << 9] for sector in lost)


@pytest.mark.parametrize("name", STORIES)
def test_content(golden: Callable[..., Path], name: str) -> None:
    """Every volume with a backing device has there what its users wrote."""
    truths = sorted(golden(name).glob("truth*.json"))
    for content, truth in zip(truths_of(golden, name), truths, strict=False):
        assert hashlib.sha256(content[DATA_OFFSET << 9:]).hexdigest() == json.loads(truth.read_text())["sha256"]


@pytest.mark.parametrize("name", DIRTY)
def test_twice_is_once(golden: Callable[..., Path], name: str) -> None:
    image = load(golden, name)
    first = truths_of(golden, name)
    again = Image.fresh(image)
    for device, content in zip(again.backings, first, strict=True):
        device.base = content
    assert written_back(again) == first


@pytest.mark.parametrize("name", DIRTY)
def test_unreadable_data(golden: Callable[..., Path], name: str) -> None:
    """Exactly the dirty sectors that cannot be read are lost."""
    base = load(golden, name)
    truths = truths_of(golden, name)
    dice = random.Random(name)
    dirty = examined(base)[1].by_inode
    every = extent.concatenate(list(dirty.values()))
    for share in (0.001, 0.3, 1.0):
        image = base.fresh()
        for start, size in zip(PTR_OFFSET.get(every.ptr).tolist(), every.size.tolist(), strict=True):
            image.cache.unreadable |= {sector for sector in range(start, start + size) if dice.random() < share}
        disks = [Disk(device.content()) for device in image.backings]
        for copy, disk, device, truth in zip(copies(image, disks), disks, image.backings, truths, strict=True):
            finish(copy)
            own = copy.source.extents
            expected = {start + offset for start, size, at in zip(
                own.start.tolist(), own.size.tolist(), PTR_OFFSET.get(own.ptr).tolist(), strict=True)
                for offset in range(size) if at + offset in image.cache.unreadable}
            assert sectors(copy.lost) == expected
            assert not len(copy.unknown.start)
            judge(copy, disk, device.content(), truth)


@pytest.mark.parametrize("name", DIRTY)
@pytest.mark.parametrize("seed", range(2))
def test_unreadable_anything(golden: Callable[..., Path], name: str, seed: int) -> None:
    """Sectors of metadata too, the superblock and the journal among them."""
    base = load(golden, name)
    truths = truths_of(golden, name)
    dice = random.Random(f"{name} {seed}")
    image = base.fresh()
    geometry, newest = base.walk.geometry, base.walk.newest
    assert newest is not None
    targets = [geometry.sector_of(node.bucket) for node in base.nodes]
    targets += [geometry.sector_of(bucket) for bucket in base.walk.prio_buckets]
    targets += [8, image.entry_at(base.walk.replay[-1]) >> 9]
    for target in dice.sample(targets, dice.randint(1, 3)):
        image.cache.unreadable |= set(range(target, target + dice.choice((1, 8))))
    disks = [Disk(device.content()) for device in image.backings]
    try:
        made = copies(image, disks)
    except BcachectlError:
        return   # The backing device's slot, or everything, is out of reach; nothing was written.
    for copy, disk, device, truth in zip(made, disks, image.backings, truths, strict=True):
        finish(copy)
        judge(copy, disk, device.content(), truth)


@pytest.mark.parametrize("name", ["dirty_crash", "two_backing"])
def test_flipped_metadata(golden: Callable[..., Path], name: str) -> None:
    """A flipped byte in any node, prio set or journal entry; the law holds.

    Save for the newest entry, whose damage nobody can tell from a write that power failure tore.
    """
    base = load(golden, name)
    truths = truths_of(golden, name)
    places = [base.set_at(node, number) + offset for node in base.nodes for number in range(len(node.sets))
              for offset in (0, 8, 24, 28, 40)]
    places += [base.bucket(bucket) + 50 for bucket in base.walk.prio_buckets]
    places += [base.entry_at(entry) + 30 for entry in base.walk.replay[:-1]] + [4096, 4096 + 190]
    for place in random.Random(name).sample(places, min(12, len(places))):
        image = base.fresh()
        image.cache.flip(place)
        disks = [Disk(device.content()) for device in image.backings]
        for copy, disk, device, truth in zip(copies(image, disks), disks, image.backings, truths, strict=True):
            finish(copy)
            judge(copy, disk, device.content(), truth)


def saved(copy: Copy) -> Extents:
    """The map as it comes back from a file."""
    text = "\n".join(rescue_map.render(copy.rescue_map()))
    return rescue_map.parse(text, "map", copy.owner)


@pytest.mark.parametrize("name", ["dirty_crash", "two_backing", "thrash_crash"])
def test_killed_at_every_write(golden: Callable[..., Path], name: str) -> None:
    """Killed before the n-th write and started again with the map, for n = 0, 1, 2, ...; it ends the same."""
    base = load(golden, name)
    truths = truths_of(golden, name)
    total = [len(disk_writes) for disk_writes in _write_counts(base)]
    for number in range(len(base.backings)):
        points = range(total[number]) if total[number] < 8 else sorted(
            random.Random(name).sample(range(total[number]), 8))
        for point in points:
            disks = [Disk(device.content()) for device in base.backings]
            disks[number].stop_before = point
            first = copies(base, disks)[number]
            with pytest.raises(PowerLoss):
                finish(first)
            again = Disk(disks[number].content)
            maps = [saved(first)] * len(disks)
            disks[number] = again
            second = copies(base, disks, maps=maps)[number]
            finish(second)
            assert bytes(again.content) == truths[number]
            assert len(again.writes) <= total[number] - point
            assert first.copied_sectors >= second.skipped_sectors


def _write_counts(image: Image) -> list[list[tuple[int, int]]]:
    disks = [Disk(device.content()) for device in image.backings]
    for copy in copies(image, disks):
        finish(copy)
    return [disk.writes for disk in disks]


def test_killed_with_bad_sectors(golden: Callable[..., Path]) -> None:
    """Lost ranges stay lost across a resume without retries; one with retries saves what can be read by then."""
    base = load(golden, "dirty_crash")
    truth = truths_of(golden, "dirty_crash")[0]
    image = base.fresh()
    disk = Disk(image.backings[0].content())
    [probe] = copies(image, [disk])
    first = int(PTR_OFFSET.get(probe.source.extents.ptr)[3])
    image.cache.unreadable = {first, first + 2}
    [copy] = copies(image, [disk])
    finish(copy)
    assert copy.bad_sectors == 2
    text = "\n".join(rescue_map.render(copy.rescue_map()))
    assert text.count("  -") == 2
    image.cache.unreadable = set()
    [without_retry] = copies(image, [disk], maps=[saved(copy)])
    finish(without_retry)
    assert sectors(without_retry.lost) == sectors(copy.lost)
    assert without_retry.copied_sectors == 0
    [retry] = copies(image, [disk], maps=[saved(copy)], retries=1)
    finish(retry)
    assert not len(retry.lost.start)
    assert retry.copied_sectors == 2
    assert bytes(disk.content) == truth


def test_retries(golden: Callable[..., Path]) -> None:
    """A sector that can be read the third time."""
    image = load(golden, "dirty_crash")
    truth = truths_of(golden, "dirty_crash")[0]
    disk = Disk(image.backings[0].content())
    [copy] = copies(image, [disk], retries=2)
    hard = int(PTR_OFFSET.get(copy.source.extents.ptr)[1])
    failures = 2

    def read(sector: int, count: int) -> bytes:
        nonlocal failures
        if sector <= hard < sector + count:
            if count == 1 and failures == 0:
                return image.cache.read(sector, count)
            failures -= count == 1
            raise DeviceError("read failed", errno=5)
        return image.cache.read(sector, count)

    copy.read = copy.read_sector = read
    finish(copy)
    assert failures == 0
    assert not len(copy.lost.start)
    assert bytes(disk.content) == truth


def test_writes_are_large_and_in_order(golden: Callable[..., Path]) -> None:
    image = load(golden, "deep_crash")
    disk = Disk(image.backings[0].content())
    [copy] = copies(image, [disk])
    finish(copy)
    ends = [start + count for start, count in disk.writes]
    assert disk.writes == sorted(disk.writes)
    assert all(end <= start for end, (start, _count) in zip(ends, disk.writes[1:], strict=False))
    merged = extent.merge(copy.source.extents, bucket_size_sectors=1 << 40)
    assert len(disk.writes) <= len(merged.start) + copy.end_sector // PIECE_SECTORS + 1


@pytest.mark.parametrize("name", DIRTY)
def test_what_is_read_was_announced_not_long_before(golden: Callable[..., Path], name: str) -> None:
    """A device that is asked for one sector after the other is slow; one that is asked for all of them forgets."""
    image = load(golden, name)
    for copy in copies(image, [Disk(device.content()) for device in image.backings]):
        waiting: list[tuple[int, int]] = []
        most_extents = most_sectors = 0

        def announce(sector: int, count: int, waiting: list[tuple[int, int]] = waiting) -> None:
            waiting.append((sector, count))

        def read(sector: int, count: int, waiting: list[tuple[int, int]] = waiting) -> bytes:
            nonlocal most_extents, most_sectors
            most_extents = max(most_extents, len(waiting))
            most_sectors = max(most_sectors, sum(nsectors for _, nsectors in waiting))
            assert waiting.pop(0) == (sector, count)
            return image.cache.read(sector, count)

        copy.announce, copy.read, copy.read_sector = announce, read, read
        finish(copy)
        assert not waiting
        assert most_sectors <= AHEAD_SECTORS + PIECE_SECTORS
        assert most_extents >= min(len(copy.source.extents.start), AHEAD_EXTENTS) or most_sectors >= AHEAD_SECTORS


def test_long_extents_are_cut() -> None:
    rows = Extents(np.array([5, 3 * PIECE_SECTORS], np.uint64), np.array([2 * PIECE_SECTORS + 7, 3 * PIECE_SECTORS + 1],
                                                                        np.uint64),
                   np.ones(2, np.bool_), np.ones(2, np.uint8), np.array([1000 << 8, 9 << 8], np.uint64),
                   np.zeros(2, np.uint8))
    found = [(start, int(pieces.end[-1]), PTR_OFFSET.get(pieces.ptr).tolist()) for start, pieces in writes(rows)]
    assert found == [(5, PIECE_SECTORS, [1000]), (PIECE_SECTORS, 2 * PIECE_SECTORS, [1000 + PIECE_SECTORS - 5]),
                     (2 * PIECE_SECTORS, 2 * PIECE_SECTORS + 7, [1000 + 2 * PIECE_SECTORS - 5]),
                     (3 * PIECE_SECTORS, 3 * PIECE_SECTORS + 1, [9])]


# Maps.

OWNER = Owner(b"s" * 16, b"d" * 16, 7)


def test_map_format() -> None:
    """As GNU ddrescue's manual has it: contiguous blocks from 0 on, hexadecimal, one status each."""
    rows = extent.overlay(rescue_map.ranges([(16, 32), (40, 48)], rescue_map.DONE),
                          rescue_map.ranges([(32, 33)], rescue_map.LOST))
    lines = list(rescue_map.render(RescueMap(OWNER, rows, 48, 100)))
    table = [line.split() for line in lines if not line.startswith("#")]
    assert table[0] == ["0x00006000", "?", "1"]
    assert [(int(pos, 16), int(size, 16), status) for pos, size, status in table[1:]] == [
        (0, 8192, "?"), (8192, 8192, "+"), (16384, 512, "-"), (16896, 3584, "?"), (20480, 4096, "+"),
        (24576, 26624, "?")]
    back = rescue_map.parse("\n".join(lines), "map", OWNER)
    assert sectors(rescue_map.of_status(back, rescue_map.DONE)) == {*range(16, 32), *range(40, 48)}
    assert sectors(rescue_map.of_status(back, rescue_map.LOST)) == {32}


@pytest.mark.parametrize(("change", "error"), [
    (lambda text: "", Refused), (lambda text: "# Mapfile. Created by GNU ddrescue\n0 ? 1\n", Refused),
    (lambda text: text.replace("device", "devices"), Refused),
    (lambda text: text.replace("64646464", "65656565"), Refused),
    (lambda text: text.replace("journal 7", "journal 6"), WrongState),
    (lambda text: text.replace("journal 7", "journal x"), BcachectlError),
    (lambda text: text.replace("  +", "  @"), BcachectlError),
    (lambda text: text.replace("  +", ""), BcachectlError),
    (lambda text: text.replace("0x00004000", "0x-1"), BcachectlError),
    (lambda text: text + "\n0x0  0x10000  +", BcachectlError)])
def test_map_of_something_else(change: Callable[[str], str], error: type[BcachectlError]) -> None:
    text = "\n".join(rescue_map.render(RescueMap(OWNER, rescue_map.ranges([(16, 32)], rescue_map.DONE), 32, 64)))
    with pytest.raises(error, match="map"):
        rescue_map.parse(change(text), "map", OWNER)


@pytest.mark.parametrize("name", ["set_csum_last_leaf_killed", "set_csum_last_leaf_deep_crash"])
def test_what_doubtful_keys_named_is_written_again(golden: Callable[..., Path], name: str) -> None:
    """A node that could not be read well in the first run, and can be in the second: older data gives way to newer."""
    [case] = [case for case in cases() if case.name == name]
    base = load(golden, case.base)
    damaged = base.fresh()
    case.edit(damaged)
    disk = Disk(damaged.backings[0].content())
    [first] = copies(damaged, [disk])
    finish(first)
    assert len(first.unknown.start)
    rows = first.rescue_map().rows
    assert sectors(rescue_map.of_status(rows, rescue_map.DOUBTED))
    assert not sectors(rescue_map.of_status(rows, rescue_map.DONE)) & sectors(first.unknown)
    [second] = copies(base, [disk], maps=[saved(first)])
    finish(second)
    assert bytes(disk.content) == truths_of(golden, case.base)[0]


def test_doubtful_keys_that_are_the_same_again() -> None:
    rows = extent.overlay(rescue_map.ranges([(16, 32)], rescue_map.DONE),
                          rescue_map.ranges([(40, 48)], rescue_map.DOUBTED))
    owner = OWNER._replace(keys=rescue_map.fingerprint(rows))
    text = "\n".join(rescue_map.render(RescueMap(owner, rows, 48, 100)))
    done = {same: sectors(rescue_map.of_status(rescue_map.parse(text, "map", each), rescue_map.DONE))
            for same, each in ((True, owner), (False, OWNER._replace(keys="0" * 16)))}
    assert done == {True: {*range(16, 32), *range(40, 48)}, False: set(range(16, 32))}


def test_map_of_a_cache_that_knew_more() -> None:
    """A failing cache may lose its newest journal entries between two runs; what was written back stays so."""
    text = "\n".join(rescue_map.render(RescueMap(OWNER, rescue_map.ranges([(16, 32)], rescue_map.DONE), 32, 64)))
    assert rescue_map.parse(text, "map", OWNER._replace(journal_seq=5)) is not None


# Whose data it is.

def as_member(image: Image, device: Backing | None = None) -> None:
    check, dirty = examined(image)
    member(check.walk, dirty, device or image.backings[0].as_backing())


def test_refusals(golden: Callable[..., Path]) -> None:
    base = load(golden, "dirty_crash")
    as_member(base)
    with pytest.raises(Refused, match="cache device"):
        as_member(base, base.cache.as_backing())
    image = base.fresh()
    image.backings[0].size_sectors = 2048
    with pytest.raises(Refused, match="cut short"):
        as_member(image)
    image = base.fresh()
    image.sb(56, "16s", b"another set uuid", device=image.backings[0])
    with pytest.raises(WrongState, match="belongs to set"):
        as_member(image)
    image = base.fresh()
    image.sb(24, "16s", b"x" * 16, device=image.backings[0])
    with pytest.raises(BcachectlError, match="no good superblock"):
        as_member(image)
    image = base.fresh()
    image.backings[0].flip(4096 + 100)
    with pytest.raises(BcachectlError, match="Bad checksum"):
        as_member(image)


@pytest.mark.parametrize(("state", "error", "words"), [(BdevState.NONE, WrongState, "is detached"),
                                                       (BdevState.STALE, Refused, "--force=inconsistent")])
def test_states(golden: Callable[..., Path], state: BdevState, error: type[BcachectlError], words: str) -> None:
    image = load(golden, "dirty_crash").fresh()
    raw = image.backings[0].get(4096 + 104, 8)
    image.sb(104, "Q", int.from_bytes(raw, "little") & ~(3 << 61) | state << 61, device=image.backings[0])
    with pytest.raises(error, match=words):
        as_member(image)


def test_orphans(golden: Callable[..., Path]) -> None:
    """A slot that a forced detach retired: nothing is dropped, and its data is found."""
    base = load(golden, "two_backing")
    check, dirty = examined(base)
    assert orphans(check, dirty, []) == []
    image = base.fresh()
    inode = min(dirty.by_inode)
    image.uuid(inode, 0, "16s", INVALID_UUID)
    image.uuid(inode, 56, "I", 1700000000)
    check = check_of(image)
    found = find_dirty(check)
    [orphan] = orphans(check, found, [device.as_backing() for device in image.backings])
    assert (orphan.inode, orphan.state) == (inode, "retired")
    assert orphan.dirty_sectors == int(dirty.by_inode[inode].size.sum())
    assert orphan.entry is not None
    assert orphan.entry.invalidated == 1700000000
    assert orphan.likely == ("back0",)
    own = source(found, inode, first_sector=0, end_sector=1 << 40, shift_sectors=DATA_OFFSET)
    plain = source(dirty, inode, first_sector=0, end_sector=1 << 40)
    assert sectors(own.extents) == {sector - DATA_OFFSET for sector in sectors(plain.extents)}


def test_never_over_the_superblock(golden: Callable[..., Path]) -> None:
    """Keys that lie before the data or behind the end of the device are lost, not written."""
    _check, dirty = examined(load(golden, "dirty_crash"))
    [(inode, rows)] = dirty.by_inode.items()
    first = int(rows.start[0]) - (inode << INODE_SHIFT)
    own = source(dirty, inode, first_sector=first + 3, end_sector=first + 5)
    assert sectors(own.extents) <= {first + 3, first + 4}
    assert sectors(own.misplaced) | sectors(own.extents) == {
        sector - (inode << INODE_SHIFT) for sector in sectors(rows)}
