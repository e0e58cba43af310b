# SPDX-License-Identifier: GPL-2.0-only
"""Keys outside the range of their leaf: what such a key alone knows is put where lookups find it, and nothing else."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from bcachectl.engine import split
from bcachectl.engine.node import Node as EngineNode
from bcachectl.fsck import repair as repair_module
from bcachectl.fsck.check import Check
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.findings import Finding
from bcachectl.fsck.owners import live_extents
from bcachectl.fsck.records import Node
from bcachectl.fsck.repair import plan_repair
from bcachectl.fsck.writeback import find_dirty
from bcachectl.ondisk.bkey import INODE_SHIFT, MAX_POS, PTR_OFFSET, encode_key_columns
from bcachectl.ondisk.bset import BSET_HEADER_BYTES
from tests.damage import _live_rows, cases
from tests.fsck.combined import Truth, judge, listed, truth, truth_of, wrong_after_writeback
from tests.fsck.image import Image
from tests.fsck.test_damage import apply, check, per_position, per_sector, serious
from tests.fsck.test_interrupted import states
from tests.sim.world import Backing, Setup, World

CASES = {case.name: case for case in cases()}

def strays(checked: Check) -> list[Finding]:
    return [finding for finding in checked.findings if finding.code == "BTREE_STRAY"]


# What an engine made once: gc put the second half of a divided leaf together with the leaf before the first half.

MERGED = Setup(nbuckets=700, backings=(Backing(data_sectors=6000),), settles=False)


def merged_wrongly(seed: str, monkeypatch: pytest.MonkeyPatch, *,
                   is_told: bool = True) -> tuple[World, Image, set[int]]:
    """A set whose power failed just behind that, and what was dirty before; with ``is_told`` the journal still says all
    that is in the first leaf."""
    world = World(MERGED, seed)
    cset = world.cset

    async def leaves() -> list[EngineNode]:
        # Written, so that the journal need not be replayed.
        for leaf in list(cset.btree.dirty_leaves):
            await cset.btree.write_leaf(leaf)
        return sorted((node for node in cset.btree.nodes() if not node.level), key=lambda node: node.end)

    async def story() -> set[int]:
        await world.up()
        for name, text in (("writeback_running", "0"), ("sequential_cutoff", "0"), ("writeback_percent", "0")):
            await world.tune("bcache0", name, text)
        for sector in range(0, 480, 2):
            await world.write(0, sector, 1, fua=True, quick=False)
        end = (await leaves())[0].end - 16 & (1 << INODE_SHIFT) - 1
        for sector in range(0, end if is_told else end - 32, 32):
            await world.write(0, sector, 32, fua=True, quick=False)
        first, _between, last = (await leaves())[:3]
        good = Image(bytes(world.survivors(random.Random(seed))[0]), [])
        dirty = per_sector(live_extents(check(good)), dirty=True)
        monkeypatch.setattr(split, "_are_neighbours", lambda _parent, _nodes: True)
        assert await cset.splitter.coalesce([first, last])
        monkeypatch.undo()
        return dirty

    dirty = world.run(story())
    images = world.survivors(random.Random(seed))
    return world, Image(bytes(images[0]), [bytes(image) for image in images[1:]]), dirty


@pytest.mark.parametrize("is_told", [True, False])
def test_a_leaf_that_was_merged_wrongly(monkeypatch: pytest.MonkeyPatch, is_told: bool) -> None:
    """All dirty data is there after the repair, and the engine reads it."""
    world, image, dirty = merged_wrongly("merged", monkeypatch, is_told=is_told)
    before = check(image)
    assert serious(before) == ["BTREE_KEY_BEFORE", "BTREE_STRAY"]
    told = listed(before)
    assert not told.lost
    assert bool(told.unknown) != is_told
    assert {position for start, end in told.unknown for position in range(start, end)} <= dirty
    assert before.totals.dirty_sectors == len(dirty)
    assert not before.totals.lost_dirty_sectors
    found = find_dirty(before)
    assert per_sector(found.by_inode[0], dirty=True) == dirty
    assert not found.lost
    assert found.unknown == told.unknown
    assert bool(plan_repair(before, safe_only=True).steps) == is_told
    repair = plan_repair(before, safe_only=False)
    assert not repair.left
    apply(image, repair)
    after = check(image)
    assert not serious(after)
    assert not find_dirty(after).unknown
    assert per_sector(live_extents(after), dirty=True) == dirty
    revived = world.revive("merged again", images=[bytearray(device.content())
                                                   for device in (image.cache, *image.backings)])
    revived.run(revived.up(), "up")
    revived.run(revived.verify(everything=True), "verify")


# A separator in a parent that is not where its children meet.

class Cut(NamedTuple):
    """Two neighbouring nodes, and the key between them in their parent: the number of its set and its row."""

    parent: Node
    number: int
    row: int
    left: Node
    right: Node


def cuts(image: Image, level: int) -> Iterator[Cut]:
    """Wherever two nodes of a level meet below one parent."""
    by_ptr = {(image.walk.geometry.sector_of(node.bucket), node.gen): node for node in image.nodes}
    for parent in image.nodes:
        if parent.level != level + 1:
            continue
        for number, bset in enumerate(parent.sets):
            for row, ptr in enumerate(bset.keys.ptr.tolist()):
                left = by_ptr.get((int(PTR_OFFSET.get(ptr)), ptr & 0xFF))
                right = next((node for node in image.nodes if node.level == level and left is not None
                              and node.start == left.end < parent.end), None)
                if left is not None and right is not None and left.end == int(bset.keys.pos[row]):
                    yield Cut(parent, number, row, left, right)


def moved(image: Image, cut: Cut, pos: int) -> None:
    image.key(cut.parent, cut.number, cut.row, pos=(pos >> INODE_SHIFT, pos & (1 << INODE_SHIFT) - 1))


def middle(node: Node) -> int:
    """A position with keys of the node on both sides."""
    ends = np.unique(np.concatenate([bset.keys.pos[bset.keys.size > 0] for bset in node.sets]))
    return int(ends[len(ends) // 2])


@pytest.mark.parametrize("where", ["lower", "higher", "beyond"])
def test_a_separator_that_was_moved(golden: Callable[..., Path], where: str) -> None:
    """Keys of good leaves appear to lie outside of them; none is lost for that."""
    known = truth(golden, "deep_crash")
    tried = 0
    for cut in cuts(known.image, 0):
        if min(len(bset.keys.pos) for node in (cut.left, cut.right) for bset in node.sets) < 2:
            continue
        pos = {"lower": middle(cut.left), "higher": middle(cut.right), "beyond": cut.right.end}[where]
        if not cut.left.start < pos <= cut.right.end < MAX_POS:
            continue
        image = known.image.fresh()
        moved(image, cut, pos)
        before = check(image)
        assert serious(before)
        told = listed(before)
        assert not told.lost
        assert not list(wrong_after_writeback(image, known))
        repair = plan_repair(before, safe_only=False)
        apply(image, repair)
        after = check(image)
        assert not serious(after), cut
        left = live_extents(after)
        assert per_sector(left, dirty=True) == known.dirty, f"{where}: {cut.left.bucket} {cut.right.bucket}"
        assert int(left.size[left.dirty].sum()) == before.totals.dirty_sectors == len(known.dirty)
        judge_places(left, known)
        tried += 1
        if tried == 6:
            break
    assert tried


def judge_places(left: Extents, known: Truth) -> None:
    """Every dirty sector is where it was."""
    (pos, sector), (good_pos, good_sector) = (per_position(extents.take(extents.dirty))
                                              for extents in (left, known.live))
    assert pos.tolist() == good_pos.tolist()
    assert sector.tolist() == good_sector.tolist()


@pytest.mark.parametrize("where", ["lower", "higher"])
def test_a_separator_between_interior_nodes(golden: Callable[..., Path], where: str,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole leaves are on the wrong side."""
    image = truth(golden, "dirty_crash").image.fresh()
    CASES["prio_csum_dirty_crash"].edit(image)
    with monkeypatch.context() as patch:
        patch.setattr(repair_module._Rebuild, "_keys_per_node", lambda _rebuild: 6)
        apply(image, plan_repair(check(image), safe_only=True))
    deep = truth_of(Image(image.cache.content(), [device.content() for device in image.backings]))
    assert max(node.level for node in deep.image.nodes) > 1
    assert deep.dirty == truth(golden, "dirty_crash").dirty
    for cut in list(cuts(deep.image, 1))[:6]:
        image = deep.image.fresh()
        pos = middle(cut.left if where == "lower" else cut.right)
        assert cut.left.start < pos < cut.right.end
        moved(image, cut, pos)
        before = check(image)
        assert serious(before)
        assert before.totals.dirty_sectors == len(deep.dirty)
        assert not list(wrong_after_writeback(image, deep))
        apply(image, plan_repair(before, safe_only=False))
        after = check(image)
        assert not serious(after)
        judge_places(live_extents(after), deep)


# Which of two claims counts.

def inserted(image: Image, node: Node, *, end: int, size: int, ptr: int, dirty: bool) -> None:
    """A key as the first of a node's last set, so that it lies before the node's range, or as the last of it."""
    number = len(node.sets) - 1
    at = image.set_at(node, number)
    words = struct.unpack("<I", image.cache.get(at + 28, 4))[0]
    keys = image.cache.get(at + BSET_HEADER_BYTES, words * 8)
    new = encode_key_columns(np.array([end], np.uint64), np.array([size], np.uint32), np.array([dirty]),
                             np.ones(1, np.uint8), np.array([ptr], np.uint64))
    body = new + keys if end <= node.start else keys + new
    block_bytes = image.walk.geometry.block_bytes
    blocks = -(-(BSET_HEADER_BYTES + len(body)) // block_bytes)
    assert node.sets[number].block + blocks <= (node.nsectors << 9) // block_bytes, "no room"
    image.cache.put(at + 28, struct.pack("<I", words + 3))
    image.cache.put(at + BSET_HEADER_BYTES, body)
    image.fix_set(node, number)


def two_leaves(known: Truth) -> tuple[Node, Node, int, int, int]:
    """A leaf with a dirty key that the journal does not touch, and the next leaf; end, size and pointer of the key."""
    leaves = sorted((node for node in known.image.nodes if not node.level), key=lambda node: node.start)
    for leaf, following in pairwise(leaves):
        try:
            [(number, row)] = _live_rows(known.image, leaf, dirty=True)
        except AssertionError:
            continue
        keys = leaf.sets[number].keys
        return leaf, following, int(keys.pos[row]), int(keys.size[row]), int(keys.ptr[row])
    raise AssertionError("no such leaves")


def free_place(image: Image, live: Extents) -> int:
    """A pointer to a bucket that nothing is in, with its generation."""
    walk = image.walk
    used = {walk.geometry.bucket_of(int(sector)) for sector in PTR_OFFSET.get(live.ptr).tolist()}
    used |= set(check(image.fresh()).claims)
    bucket = next(bucket for bucket in range(walk.geometry.nbuckets - 1, 0, -1) if bucket not in used)
    return walk.geometry.sector_of(bucket) << 8 | int(walk.gens[bucket])


def test_the_key_in_range_wins(golden: Callable[..., Path]) -> None:
    """It is what every lookup has found: the stray one is older, or was never seen."""
    known = truth(golden, "deep_crash")
    image = known.image.fresh()
    _leaf, following, end, size, _ptr = two_leaves(known)
    inserted(image, following, end=end, size=size, ptr=free_place(known.image, known.live), dirty=True)
    before = check(image)
    assert serious(before) == ["BTREE_KEY_BEFORE"]
    assert not listed(before).lost
    assert not listed(before).unknown
    apply(image, plan_repair(before, safe_only=True))
    after = check(image)
    assert not serious(after)
    judge_places(live_extents(after), known)


def test_the_journal_wins(golden: Callable[..., Path]) -> None:
    known = truth(golden, "deep_crash")
    image = known.image.fresh()
    journal = known.image.walk.journal_map
    leaves = sorted((node for node in known.image.nodes if not node.level), key=lambda node: node.start)
    row = next(row for row in range(len(journal.start)) if int(journal.end[row]) <= leaves[-1].start
               and journal.dirty[row])
    start, end = int(journal.start[row]), int(journal.end[row])
    inserted(image, leaves[-1], end=end, size=end - start, ptr=free_place(known.image, known.live), dirty=True)
    before = check(image)
    assert "BTREE_STRAY" not in serious(before)
    apply(image, plan_repair(before, safe_only=False))
    judge_places(live_extents(check(image)), known)


def gap_before(known: Truth) -> tuple[Node, int]:
    """A leaf and the end of a stretch of 8 positions before it that nothing, live or stale, speaks of."""
    leaves = sorted((node for node in known.image.nodes if not node.level), key=lambda node: node.start)
    history = [entry.jset for entry in known.image.walk.journal]
    assert history
    for leaf, following in pairwise(leaves[1:]):
        starts = np.concatenate([bset.keys.pos - bset.keys.size for bset in leaf.sets])
        ends = np.concatenate([bset.keys.pos for bset in leaf.sets])
        journal = known.image.walk.journal_map
        for end in range(leaf.start + 16, leaf.end, 8):
            if leaf.start >> INODE_SHIFT != end >> INODE_SHIFT or end & (1 << INODE_SHIFT) - 1 < 24:
                continue
            if not bool(((starts < end) & (ends > end - 8)).any()) and not bool(
                    ((journal.start < end) & (journal.end > end - 8)).any()):
                return following, end
    raise AssertionError("no such gap")


def test_what_nothing_contradicts_is_kept_and_doubted(golden: Callable[..., Path]) -> None:
    """Whether something newer was written back since, nobody knows: it is kept, said, and not done by -p."""
    known = truth(golden, "deep_crash")
    image = known.image.fresh()
    node, end = gap_before(known)
    inserted(image, node, end=end, size=8, ptr=free_place(known.image, known.live), dirty=True)
    before = check(image)
    assert serious(before) == ["BTREE_KEY_BEFORE", "BTREE_STRAY"]
    [finding] = strays(before)
    assert finding.unknown == ((end - 8, end),)
    assert not finding.losses
    assert (end - 8, end) in find_dirty(before).unknown
    assert before.totals.dirty_sectors == len(known.dirty) + 8
    assert not plan_repair(before, safe_only=True).steps
    apply(image, plan_repair(before, safe_only=False))
    after = check(image)
    assert not serious(after)
    assert per_sector(live_extents(after), dirty=True) == known.dirty | set(range(end - 8, end))
    assert not find_dirty(after).unknown


def test_a_clean_one_is_dropped(golden: Callable[..., Path]) -> None:
    known = truth(golden, "deep_crash")
    image = known.image.fresh()
    node, end = gap_before(known)
    inserted(image, node, end=end, size=8, ptr=free_place(known.image, known.live), dirty=False)
    before = check(image)
    assert serious(before) == ["BTREE_KEY_BEFORE"]
    assert before.totals.lost_clean_sectors == 8
    assert [loss.clean_sectors for finding in before.findings for loss in finding.losses] == [8]
    apply(image, plan_repair(before, safe_only=True))
    after = check(image)
    assert not serious(after)
    judge_places(live_extents(after), known)


def test_a_stale_one_is_lost(golden: Callable[..., Path]) -> None:
    """Its bucket was used again: the data is gone, and that is said."""
    known = truth(golden, "deep_crash")
    image = known.image.fresh()
    node, end = gap_before(known)
    ptr = free_place(known.image, known.live)
    inserted(image, node, end=end, size=8, ptr=ptr & ~0xFF | (ptr - 1) & 0xFF, dirty=True)
    before = check(image)
    assert serious(before) == ["BTREE_KEY_BEFORE", "BTREE_PTR_STALE_DIRTY"]
    assert listed(before).lost == set(range(end - 8, end))
    apply(image, plan_repair(before, safe_only=False))
    after = check(image)
    assert not serious(after)
    judge_places(live_extents(after), known)


def test_one_behind_its_leaf(golden: Callable[..., Path]) -> None:
    """The same at the other end, and in the same words."""
    known = truth(golden, "deep_crash")
    image = known.image.fresh()
    leaves = sorted((node for node in known.image.nodes if not node.level), key=lambda node: node.start)
    _following, end = gap_before(known)
    before_it = next(node for node in reversed(leaves) if node.end <= end - 8 and len(node.sets[-1].keys.pos))
    inserted(image, before_it, end=end, size=8, ptr=free_place(known.image, known.live), dirty=True)
    before = check(image)
    assert serious(before) == ["BTREE_SHORT_KEY", "BTREE_STRAY"]
    apply(image, plan_repair(before, safe_only=False))
    after = check(image)
    assert not serious(after)
    assert per_sector(live_extents(after), dirty=True) == known.dirty | set(range(end - 8, end))


def test_strays_of_a_damaged_leaf(golden: Callable[..., Path]) -> None:
    """A leaf that fails its checksum elsewhere has the key in a good set."""
    known = truth(golden, "deep_crash")
    tried = 0
    leaves = sorted((node for node in known.image.nodes if not node.level), key=lambda node: node.start)
    _node, end = gap_before(known)
    for node in leaves:
        if node.start < end or len(node.sets) < 3:
            continue
        image = known.image.fresh()
        inserted(image, node, end=end, size=8, ptr=free_place(known.image, known.live), dirty=True)
        image.cache.flip(image.set_at(node, 1) + 20)
        before = check(image)
        assert "BTREE_STRAY" in serious(before)
        assert not plan_repair(before, safe_only=True).steps
        apply(image, plan_repair(before, safe_only=False))
        after = check(image)
        assert not serious(after)
        assert set(range(end - 8, end)) <= per_sector(live_extents(after), dirty=True)
        tried += 1
        if tried == 2:
            break
    assert tried


@pytest.mark.parametrize("is_copy", [True, False])
def test_what_older_entries_of_the_journal_say(monkeypatch: pytest.MonkeyPatch, is_copy: bool) -> None:
    """Data that was moved has the content that they tell of; other content is older than they are."""
    _world, image, dirty = merged_wrongly("merged", monkeypatch)
    node, number, row = next((node, number, row) for node in image.nodes if not node.level
                             for number, bset in enumerate(node.sets) for row in range(len(bset.keys.pos))
                             if int(bset.keys.pos[row]) <= node.start and int(bset.keys.size[row]) > 1)
    keys = node.sets[number].keys
    end, size, ptr = int(keys.pos[row]), int(keys.size[row]), int(keys.ptr[row])
    place = free_place(image, live_extents(check(image)))
    image.key(node, number, row, ptr=place)
    if is_copy:
        image.cache.put(int(PTR_OFFSET.get(place)) << 9, image.cache.read(int(PTR_OFFSET.get(ptr)), size))
    before = check(image)
    assert listed(before).lost == (set() if is_copy else set(range(end - size, end)))
    assert not listed(before).unknown
    assert before.totals.lost_dirty_sectors == (0 if is_copy else size)
    assert bool(plan_repair(before, safe_only=True).steps) == is_copy
    apply(image, plan_repair(before, safe_only=False))
    after = check(image)
    assert not serious(after)
    assert per_sector(live_extents(after), dirty=True) == dirty - (set() if is_copy else set(range(end - size, end)))


def test_an_interrupted_repair_of_strays(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each write, torn as well; the last one loses nothing."""
    _world, whole, wanted = merged_wrongly("merged", monkeypatch)
    repair = plan_repair(check(whole), safe_only=False)
    for where, reached in states(repair, random.Random(1)):
        image = whole.fresh()
        devices = {"": image.cache, **{device.name: device for device in image.backings}}
        for write, data in reached:
            devices[write.device].put(write.offset_bytes, data)
        apply(image, plan_repair(check(image), safe_only=False))
        after = check(image)
        assert not serious(after), where
        assert per_sector(live_extents(after), dirty=True) == wanted, where


def test_strays_and_other_damage(golden: Callable[..., Path]) -> None:
    """A separator that was moved, and the leaf that owns the range damaged as well."""
    known = truth(golden, "deep_crash")
    tried = 0
    for cut in cuts(known.image, 0):
        pos = middle(cut.left)
        if not cut.left.start < pos < cut.left.end or len(cut.right.sets) < 2:
            continue
        image = known.image.fresh()
        moved(image, cut, pos)
        image.cache.flip(image.set_at(cut.right, 1) + 40)
        for safe_only in (True, False):
            assert not list(judge(image, known, random.Random(1), safe_only=safe_only))
        assert not list(wrong_after_writeback(image, known))
        tried += 1
        if tried == 3:
            break
    assert tried
