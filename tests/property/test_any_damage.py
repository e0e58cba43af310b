# SPDX-License-Identifier: GPL-2.0-only
"""Whole structures with anything in them, checksums right again: fsck judges, repairs, and then has nothing to say.

Unlike the cases of tests/damage.py nobody thought of these.  The rules: nothing but the project's own exceptions, and
those only as a refusal; a second check finds no more than what the first repair said that it leaves; a write-back of
the same image says what it would do, or why not.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bcachectl.errors import BcachectlError
from bcachectl.fsck.check import Check, run
from bcachectl.fsck.repair import plan_repair
from bcachectl.fsck.rescue import superblock_instead
from bcachectl.fsck.writeback import find_dirty, source, with_all_entries, writes
from bcachectl.fsck.writeback_target import orphans
from bcachectl.ondisk.jset import JSET_HEADER_BYTES
from tests.fsck.image import Image
from tests.fsck.test_damage import apply, base_image, check, serious

STORIES = ("gen_churn", "dirty_crash", "flash_volume")
KINDS = ("superblock", "backing", "journal", "prio", "uuids", "header", "key")
ODD = (0, 1, 0xFF, 0xFFFF, 1 << 20, (1 << 20) - 1, 1 << 36, 1 << 43, 1 << 44, 1 << 60, 2 << 60, 1 << 63, (1 << 63) - 1,
       (1 << 64) - 1, 4095 << 51, 1 << 51)

Wound = tuple[str, int, int, int, bool]
"""Kind of structure, which one, which word of it, its new value, whether bits are flipped rather than replaced."""

wounds = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 1000), st.integers(0, 5000),
                            st.one_of(st.sampled_from(ODD), st.integers(0, (1 << 64) - 1),
                                      st.integers(0, 63).map(lambda bit: 1 << bit)), st.booleans()),
                  min_size=1, max_size=3)


def put(image: Image, wound: Wound) -> None:
    """One word of one structure, and its checksum."""
    kind, which, word, value, is_flip = wound

    def replaced(at: int) -> int:
        old, = struct.unpack("<Q", image.cache.get(at, 8))
        return old ^ value if is_flip else value

    if kind in ("superblock", "backing"):
        device = image.cache if kind == "superblock" or not image.backings else image.backings[
            which % len(image.backings)]
        offset = 8 * (1 + word % 30)
        old, = struct.unpack("<Q", device.get(4096 + offset, 8))
        image.sb(offset, "Q", old ^ value if is_flip else value, device=device)
    elif kind == "journal":
        entry = image.walk.replay[-1 - which % len(image.walk.replay)]
        offset = 16 + 8 * (word % ((JSET_HEADER_BYTES + len(entry.jset.keys) - 16) // 8))
        if offset == 24:
            return  # The length, which the checksum needs.
        image.jset(entry, offset, "Q", replaced(image.entry_at(entry) + offset))
    elif kind == "prio":
        number = which % len(image.walk.prio_buckets)
        offset = 8 * (1 + word % (image.walk.geometry.meta_bytes // 8 - 1))
        image.prio(number, offset, "Q", replaced(image.bucket(image.walk.prio_buckets[number]) + offset))
    elif kind == "uuids":
        at = image.uuid_at + 8 * (word % (16 * 3))
        image.cache.put(at, struct.pack("<Q", replaced(at)))
    else:
        node = image.nodes[which % len(image.nodes)]
        number = word % len(node.sets)
        at = image.set_at(node, number)
        keys = struct.unpack("<I", image.cache.get(at + 28, 4))[0]
        offset = 8 + 8 * (which % 2) if kind == "header" else 32 + 8 * (word % max(keys, 1))
        if offset + 8 <= 32 + 8 * keys:
            image.bset(node, number, offset, "Q", replaced(at + offset))


def wounded(base: Image, all_wounds: list[Wound]) -> Image:
    image = base.fresh()
    for wound in all_wounds:
        put(image, wound)
    return image


@pytest.fixture(scope="module", params=STORIES)
def base(request: pytest.FixtureRequest, _golden_unpacked: Callable[[str], Path]) -> Image:
    return base_image(_golden_unpacked(request.param))


@settings(max_examples=120)
@given(wounds)
@example([("key", 0, 1, 2 << 60, True)])
@example([("uuids", 0, 7, 1 << 32, True)])
@example([("journal", 0, 0, (1 << 64) - 1, False)])
@example([("key", 976, 3014, 1 << 63, True)])
def test_repair_of_anything(base: Image, all_wounds: list[Wound]) -> None:
    image = wounded(base, all_wounds)
    before = check(image)
    try:
        repair = plan_repair(before, safe_only=False)
    except BcachectlError:
        return  # A refusal: no room for a rebuild.
    apply(image, repair)
    after = serious(check(image))
    assert set(after) <= {finding.code for finding in repair.left}, (serious(before), after)
    preened = plan_repair(before, safe_only=True)
    assert all(finding.is_safe or finding.code == "BACKING_FORGOTTEN" for finding in preened.repaired)


@settings(max_examples=60)
@given(wounds)
def test_write_back_of_anything(base: Image, all_wounds: list[Wound]) -> None:
    image = wounded(base, all_wounds)
    members = [device.as_backing() for device in image.backings]
    instead = superblock_instead(image.cache.read, image.cache.size_sectors, members)
    found = run(Check(image.cache.read, image.cache.size_sectors, instead=instead))
    if found.walk.superblock is None or not found.walk.superblock.cache_sync or found.walk.newest is None:
        return
    found = with_all_entries(found)
    dirty = find_dirty(found)
    orphans(found, dirty, members)
    for inode in dirty.by_inode:
        own = source(dirty, inode, first_sector=16, end_sector=1 << 30)
        assert all(start >= 16 for start, _pieces in writes(own.extents))
