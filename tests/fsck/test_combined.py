# SPDX-License-Identifier: GPL-2.0-only
"""Several kinds of damage at once, from seeds; and what such a search has found, each by itself."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl.fsck.check import Check
from bcachectl.fsck.owners import live_extents
from bcachectl.fsck.repair import plan_repair
from bcachectl.fsck.salvage import leaf_map
from bcachectl.ondisk.bkey import PTR_OFFSET, ptr_make
from bcachectl.ondisk.superblock import BdevState
from tests.damage import _live_rows, cases
from tests.fsck.combined import (
    MOVING,
    Truth,
    bases,
    damaged,
    is_newest_torn,
    judge,
    listed,
    truth,
    truth_before_newest,
    wrong_after_writeback,
)
from tests.fsck.image import Image, keep
from tests.fsck.test_damage import apply, check, serious

CASES = {case.name: case for case in cases()}
BASES = bases()
FIRST, _, LAST = os.environ.get("BCACHECTL_COMBINED", "4").partition("-")
SEEDS = range(int(FIRST), int(LAST) + 1) if LAST else range(int(FIRST))
EARLIER: dict[str, Truth] = {}


def truth_for(golden: Callable[..., Path], base: str, image: Image) -> Truth:
    """What a damaged image is held against: the undamaged one, or that before its newest journal entry."""
    known = truth(golden, base)
    if not is_newest_torn(image, known):
        return known
    return keep(EARLIER, base, lambda: truth_before_newest(known))


@pytest.mark.parametrize("base", sorted(BASES))
def test_combinations(golden: Callable[..., Path], base: str, record_property: Callable[[str, object], None]) -> None:
    """Whatever comes together, nothing is lost in silence."""
    known = truth(golden, base)
    for seed in SEEDS:
        dice = random.Random(f"{base} {seed}")
        image, names = damaged(known, BASES[base], dice)
        if any(word in name for name in names for word in MOVING):
            check(image)
            continue
        held_against = truth_for(golden, base, image)
        where = f"{base}, seed {seed}: {', '.join(names)}"
        assert not list(wrong_after_writeback(image, held_against)), where
        for safe_only in (True, False):
            assert not list(judge(image, held_against, dice, safe_only=safe_only)), f"{where}; safe_only={safe_only}"
    record_property("combined", len(SEEDS))


@pytest.mark.parametrize("base", ["two_backing", "killed", "deep_crash"])
def test_a_damaged_newest_entry_is_one_that_was_never_written(golden: Callable[..., Path], base: str) -> None:
    """Nothing tells it from a power failure; with whatever else is damaged the state is that before it."""
    known = truth(golden, base)
    image = known.image.fresh()
    image.cache.flip(image.entry_at(known.image.walk.replay[-1]) + 77)
    image.prio(0, 100, "B", 0x5A, fix=False)
    assert "JOURNAL_TORN" in {finding.code for finding in check(image).findings}
    before = truth_for(golden, base, image)
    assert before.live.ptr.tolist() != known.live.ptr.tolist()
    assert not list(wrong_after_writeback(image, before))
    for safe_only in (True, False):
        assert not list(judge(image, before, random.Random(1), safe_only=safe_only))


def one_leaf(checked: Check, image: Image) -> tuple[int, list[int]]:
    """A leaf with several sets, as the sector it begins at and the sectors its later sets begin at."""
    block_sectors = checked.walk.geometry.block_size_sectors
    node = next(node for node in image.nodes if not node.level and len(node.sets) > 2)
    sector = checked.walk.geometry.sector_of(node.bucket)
    return sector, [sector + image_set.block * block_sectors for image_set in node.sets[1:]]


@pytest.mark.parametrize("base", ["deep_crash", "killed", "thrash_crash"])
def test_an_unreadable_block_is_not_the_end_of_a_node(golden: Callable[..., Path], base: str) -> None:
    """Where the newest set of a node begins in a sector that cannot be read, its keys are missed, not forgotten."""
    known = truth(golden, base)
    checked = check(known.image.fresh())
    _sector, sets = one_leaf(checked, known.image)
    image = known.image.fresh()
    image.cache.unreadable.add(sets[-1])
    found = check(image)
    assert serious(found) == ["BTREE_IO"]
    slot = next(slot for slot in found.slots if slot.lost is not None)
    leaf = leaf_map(found.walk, slot, found.journal, known_buckets=found.known_buckets)
    # The journal of some goes back to the first entry, and tells of all that is dirty.
    assert leaf.is_unknown or leaf.is_clean_unknown
    assert listed(found).unknown == ([(slot.start, slot.end)] if leaf.is_unknown else [])
    assert not plan_repair(found, safe_only=True).steps
    assert not list(wrong_after_writeback(image, known))
    assert not list(judge(image, known, random.Random(1), safe_only=False))


@pytest.mark.parametrize("field", ["size", "dirty", "position"])
def test_keys_that_only_look_like_keys(golden: Callable[..., Path], field: str) -> None:
    """One flipped bit in a key, as bit rot has it: what the set says about itself, even what it costs, is not sure."""
    known = truth(golden, "killed")
    image = known.image.fresh()
    node = next(node for node in image.nodes if not node.level and bool(node.sets[0].keys.dirty.any()))
    row = int(node.sets[0].keys.dirty.argmax())
    at = image.set_at(node, 0) + image.key_at(node, 0, row)
    image.cache.flip(*{"size": (at + 3, 0x10), "dirty": (at + 4, 0x10), "position": (at + 9, 0x04)}[field])
    found = check(image)
    assert serious(found) == ["BTREE_CSUM"]
    assert listed(found).unknown == [(node.start, node.end)]
    assert not plan_repair(found, safe_only=True).steps
    assert not list(judge(image, known, random.Random(1), safe_only=False))


@pytest.mark.parametrize("part", ["checksum", "magic", "number"])
def test_keys_that_are_beyond_doubt(golden: Callable[..., Path], part: str) -> None:
    """Where only the header of a set is damaged, what that costs is known exactly."""
    known = truth(golden, "killed")
    image = known.image.fresh()
    node = next(node for node in image.nodes if not node.level and len(node.sets) > 1)
    image.cache.flip(image.set_at(node, 0) + {"checksum": 5, "magic": 8, "number": 16}[part])
    found = check(image)
    assert len(serious(found)) == 1
    assert not listed(found).unknown
    assert not list(judge(image, known, random.Random(1), safe_only=False))


@pytest.mark.parametrize("name", ["child_twice_deep_crash", "extent_overlap_killed"])
def test_a_write_back_says_what_fsck_does_not_know(golden: Callable[..., Path], name: str) -> None:
    known = truth(golden, CASES[name].base)
    image = known.image.fresh()
    CASES[name].edit(image)
    assert not list(wrong_after_writeback(image, known))


@pytest.mark.parametrize("names", [("set_magic_first_interior_deep_crash", "child_beyond_deep_crash"),
                                   ("set_zero_interior_deep_crash", "root_level_200_deep_crash")])
def test_a_leaf_that_is_lost_twice_is_not_its_neighbour_s(golden: Callable[..., Path], names: tuple[str, ...]) -> None:
    """Neither its parent nor the device knows it any more: its range is unknown, not part of the next leaf's."""
    known = truth(golden, "deep_crash")
    image = known.image.fresh()
    for name in names:
        CASES[name].edit(image)
    if "child_beyond" not in names[1]:
        leaf = next(node for node in image.nodes if not node.level and node.start)
        first = image.walk.geometry.sector_of(leaf.bucket)
        image.cache.unreadable.update(range(first, first + leaf.nsectors))
        assert listed(check(image)).unknown
    assert not list(wrong_after_writeback(image, known))
    assert not list(judge(image, known, random.Random(1), safe_only=False))


@pytest.mark.parametrize(("base", "first"), [("deep_crash", -2), ("deep_crash", -3), ("killed", -2),
                                             ("thrash_crash", -2)])
def test_two_damaged_sets_in_a_row(golden: Callable[..., Path], base: str, first: int) -> None:
    """That all keys of one are known does not say that there is none behind it."""
    known = truth(golden, base)
    image = known.image.fresh()
    node = next(node for node in image.nodes if not node.level and len(node.sets) > -first)
    count = len(node.sets)
    image.cache.flip(image.set_at(node, count + first) + 16, 0x5A)
    image.cache.put(image.set_at(node, count + first + 1), bytes(range(8)))
    found = check(image)
    slot = next(slot for slot in found.slots if slot.lost is not None)
    assert (slot.start, slot.end) == (node.start, node.end)
    leaf = leaf_map(found.walk, slot, found.journal, known_buckets=found.known_buckets)
    assert leaf.is_unknown or leaf.is_clean_unknown
    assert not list(wrong_after_writeback(image, known))
    for safe_only in (True, False):
        assert not list(judge(image, known, random.Random(1), safe_only=safe_only))


@pytest.mark.parametrize(("damage", "number", "is_dirty"), [
    ("prio_in_journal_gen_churn", 0, False), ("prio_in_journal_deep_crash", 0, True), ("prio_third_csum", 4, False),
    ("prio_third_csum", 4, True), ("prio_csum_deep_crash", 1, True), ("prio_csum_deep_crash", 4, False),
    ("prio_csum_deep_crash", 4, True),
])
def test_an_extent_where_a_prio_set_is_that_nothing_leads_to(golden: Callable[..., Path], damage: str, number: int,
                                                             is_dirty: bool) -> None:
    """The chain breaks off before it, or leads elsewhere; what stands there is no data."""
    known = truth(golden, CASES[damage].base)
    image = known.image.fresh()
    bucket = image.walk.prio_buckets[number]
    node, (set_number, row) = next((node, rows[0]) for node in image.nodes if not node.level
                                   if (rows := _live_rows(image, node, dirty=is_dirty)))
    image.key(node, set_number, row, ptr=ptr_make(image.walk.geometry.sector_of(bucket), int(image.walk.gens[bucket])))
    CASES[damage].edit(image)
    found = check(image)
    live = live_extents(found)
    assert bucket not in {image.walk.geometry.bucket_of(sector) for sector in PTR_OFFSET.get(live.ptr).tolist()}
    # Clean data in a bucket whose generation nobody knows is dropped anyway.
    assert ("EXTENT_IN_METADATA" in serious(found)) == (is_dirty or bucket < found.known_buckets)
    for safe_only in (True, False):
        assert not list(judge(image, known, random.Random(1), safe_only=safe_only))


@pytest.mark.parametrize("names", [
    # A leaf whose pointer is bad and the next one both end at one place: neither is the whole range.
    ("child_beyond_deep_crash", "child_twice_deep_crash"),
    # A pointer has the generation of another one's bucket, or leads where that should, so that a leaf has no pointer.
    ("child_same_deep_crash", "child_gen_deep_crash", "separator_lower_deep_crash"),
    ("child_same_deep_crash", "child_into_journal_deep_crash"),
    # A pointer leads into the leaf before, and the one to that is wrong as well.
    ("child_not_at_start_deep_crash", "child_same_deep_crash"),
    # The wrong length of a pointer hides that it leads to an interior node.
    ("child_not_at_start_deep_crash", "child_is_interior_deep_crash"),
    # Nothing is left of a leaf whose parent is damaged too: it is not the room between two others.
    ("set_zero_leaf_deep_crash", "set_zero_interior_deep_crash"),
    ("set_zero_leaf_deep_crash", "set_zero_interior_deep_crash", "child_dirty_deep_crash"),
])
def test_what_a_lost_leaf_had_is_nobody_else_s(golden: Callable[..., Path], names: tuple[str, ...]) -> None:
    known = truth(golden, "deep_crash")
    image = known.image.fresh()
    for name in names:
        CASES[name].edit(image)
    assert not list(wrong_after_writeback(image, known))
    for safe_only in (True, False):
        assert not list(judge(image, known, random.Random(1), safe_only=safe_only))


def test_an_old_prio_set_does_not_tell_the_bucket_size(golden: Callable[..., Path]) -> None:
    """The chain leads to a bucket that is no prio set; by another bucket size it would lead to one that was."""
    known = truth(golden, "deep_crash")
    image = known.image.fresh()
    for name in ("prio_in_journal_deep_crash", "sb_nr_this_dev_1_deep_crash", "child_in_journal_deep_crash"):
        CASES[name].edit(image)
    assert check(image).walk.geometry == known.image.walk.geometry
    for safe_only in (True, False):
        assert not list(judge(image, known, random.Random(1), safe_only=safe_only))


def test_an_entry_in_a_wrong_place_does_not_make_the_journal_longer(golden: Callable[..., Path]) -> None:
    """Without a superblock the journal is as long as its entries tell, but not for one that was written elsewhere."""
    known = truth(golden, "deep_crash")
    image = known.image.fresh()
    CASES["sb_magic_deep_crash"].edit(image)
    entry = known.image.walk.replay[-1]
    node = next(node for node in image.nodes if not node.level and len(node.sets) > 1)
    nbytes = entry.jset.blocks * known.image.walk.geometry.block_bytes
    image.cache.put(image.set_at(node, 0), image.cache.get(image.entry_at(entry), nbytes))
    found = check(image)
    assert known.image.walk.superblock is not None and found.walk.superblock is not None
    assert found.walk.superblock.d == known.image.walk.superblock.d
    assert serious(found) == ["BTREE_MAGIC", "SB_MAGIC"]
    for safe_only in (True, False):
        assert not list(judge(image, known, random.Random(1), safe_only=safe_only))


def test_old_entries_behind_the_new_one(golden: Callable[..., Path]) -> None:
    """A repair's journal entry takes a sector of its bucket; what stands behind it is not read by any start."""
    known = truth(golden, "two_backing")
    image = known.image.fresh()
    for name in ("root_level_1_two_backing", "journal_version_9_two_backing", "journal_full_two_backing"):
        CASES[name].edit(image)
    assert not list(judge(image, known, random.Random(1), safe_only=True))


@pytest.mark.parametrize("damage", ["prio_last_byte_deep_crash", "prio_data_deep_crash", "prio_zero_deep_crash"])
def test_an_extent_in_a_damaged_prio_set_is_doubtful(golden: Callable[..., Path], damage: str) -> None:
    """One of the two is wrong, and nobody knows which."""
    known = truth(golden, "deep_crash")
    image = known.image.fresh()
    for name in ("extent_in_metadata_deep_crash", damage):
        CASES[name].edit(image)
    assert "EXTENT_IN_METADATA" in serious(check(image))
    assert not list(wrong_after_writeback(image, known))
    for safe_only in (True, False):
        assert not list(judge(image, known, random.Random(1), safe_only=safe_only))


def test_an_interior_node_is_not_taken_for_a_leaf(golden: Callable[..., Path]) -> None:
    """Below a damaged node a pointer leads to another interior node; its keys would pass for clean data."""
    known = truth(golden, "gen_churn")
    image = known.image.fresh()
    for name in ("child_is_interior_gen_churn", "set_csum_first_interior_gen_churn"):
        CASES[name].edit(image)
    for safe_only in (True, False):
        assert not list(judge(image, known, random.Random(1), safe_only=safe_only))


def test_a_leaf_that_is_left_no_range(golden: Callable[..., Path]) -> None:
    """Two pointers end at one place, the first of all, and one of them leads nowhere."""
    known = truth(golden, "gen_churn")
    image = known.image.fresh()
    for name in ("child_twice_gen_churn", "child_beyond_gen_churn"):
        CASES[name].edit(image)
    assert any(slot.end == 0 for slot in check(image).slots)
    for safe_only in (True, False):
        assert not list(judge(image, known, random.Random(1), safe_only=safe_only))


def test_metadata_is_not_put_where_nothing_can_be_read(golden: Callable[..., Path]) -> None:
    known = truth(golden, "dirty_crash")
    image = known.image.fresh()
    CASES["prio_csum_dirty_crash"].edit(image)
    places = [write.offset_bytes >> 9 for write in plan_repair(check(image), safe_only=True).steps[0]]
    image.cache.unreadable.update(place + 7 for place in places)
    repair = plan_repair(check(image), safe_only=True)
    assert not {write.offset_bytes >> 9 for write in repair.steps[0]} & set(places)
    apply(image, repair)
    assert not serious(check(image))


def test_an_unreadable_journal_bucket_may_have_cost_anything(golden: Callable[..., Path]) -> None:
    image = truth(golden, "dirty_crash").image.fresh()
    CASES["journal_unreadable"].edit(image)
    finding = next(finding for finding in check(image).findings if finding.code == "JOURNAL_IO")
    assert finding.unknown
    assert not finding.is_safe


def test_a_device_without_a_uuid_owns_nothing(golden: Callable[..., Path]) -> None:
    image = truth(golden, "dirty_crash").image.fresh()
    for name in ("uuid_array_zero_dirty_crash", "backing_uuid_zero_dirty_crash"):
        CASES[name].edit(image)
    before = check(image)
    repair = plan_repair(before, safe_only=False)
    assert "BACKING_FORGOTTEN" in {finding.code for finding in repair.left}
    apply(image, repair)
    assert set(serious(check(image))) <= {finding.code for finding in repair.left}


@pytest.mark.parametrize("state", [BdevState.CLEAN, BdevState.DIRTY])
def test_a_dirty_device_is_not_given_an_empty_slot(golden: Callable[..., Path], state: BdevState) -> None:
    """It would look as if nothing were missing on it."""
    image = truth(golden, "two_backing").image.fresh()
    for name in ("journal_uuids_beyond_two_backing", "backing_unknown_uuid_two_backing"):
        CASES[name].edit(image)
    stranger = image.backings[0]
    flags = int.from_bytes(stranger.get(4096 + 104, 8), "little")
    image.sb(104, "Q", flags & ~(3 << 61) | int(state) << 61, device=stranger)
    left = [finding.device for finding in plan_repair(check(image), safe_only=False).left
            if finding.code == "BACKING_FORGOTTEN"]
    assert left == ([stranger.name] if state is BdevState.DIRTY else [])
