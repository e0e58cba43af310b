# SPDX-License-Identifier: GPL-2.0-only
"""Sets of keys that are gone without a trace, as where a block was lost: what only the journal still tells of."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bcachectl.fsck import ages, salvage
from bcachectl.fsck import extents as extent
from bcachectl.fsck.check import Check, run
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.findings import Severity
from bcachectl.fsck.repair import plan_repair
from bcachectl.fsck.writeback import find_dirty
from bcachectl.ondisk.bkey import SECTOR_MASK, Ptr, encode_key_columns, ptr_make
from bcachectl.ondisk.bset import encode_bset
from bcachectl.ondisk.magic import bset_magic
from tests.fsck.covered import assert_all_covered
from tests.fsck.image import Image
from tests.fsck.test_strays import apply
from tests.fsck.test_writeback import load

STORIES = ("deep_crash", "killed", "two_backing", "flash_volume")


def check(image: Image) -> Check:
    return run(Check(image.cache.read, image.cache.size_sectors, [device.as_backing() for device in image.backings]))


def serious(checked: Check) -> list[str]:
    return [finding.code for finding in checked.findings if finding.severity is not Severity.NOTE]


def by_sector(checked: Check) -> dict[int, tuple[int, int]]:
    """Every dirty sector: its device number and the sector of the cache that has it."""
    found: dict[int, tuple[int, int]] = {}
    for inode, extents in find_dirty(checked).by_inode.items():
        for start, end, ptr in _rows(extents):
            found |= {position: (inode, (ptr >> 8) + position - start) for position in range(start, end)}
    return found


def _rows(extents: Extents) -> list[tuple[int, int, int]]:
    ptr = extents.ptr & np.uint64((1 << 51) - 1)
    return list(zip(extents.start.tolist(), extents.end.tolist(), ptr.tolist(), strict=True))


def leaves(image: Image) -> range:
    return range(sum(not node.level for node in image.nodes))


def without_last_set(golden: Callable[..., Path], name: str, number: int, nbytes: int = 512) -> Image:
    """The images, with zeros where the last set of a leaf begins."""
    good = load(golden, name)
    node = [node for node in good.nodes if not node.level][number]
    image = good.fresh()
    image.cache.put(image.set_at(node, len(node.sets) - 1), bytes(nbytes))
    return image


@pytest.mark.parametrize("name", STORIES)
def test_dirty_data_of_a_set_that_is_gone_is_kept(golden: Callable[..., Path], name: str) -> None:
    good = load(golden, name)
    truth = by_sector(check(good))
    told = 0
    for number in leaves(good):
        before = check(without_last_set(golden, name, number))
        if "BTREE_SET_MISSING" not in serious(before):
            continue
        told += 1
        found, unknown = by_sector(before), find_dirty(before).unknown
        assert truth.items() <= found.items(), number
        # What the set said to be clean by now may count as dirty, where it is said that this is not known.
        assert all(any(start <= position < end for start, end in unknown) for position in found.keys() - truth.keys())
        assert before.totals.dirty_sectors == len(found)
        lost = {position for extents in find_dirty(before).lost.values() for start, end, _ptr in _rows(extents)
                for position in range(start, end)}
        assert lost.isdisjoint(truth)
    assert told >= {"deep_crash": 24, "killed": 5}.get(name, 1)


@pytest.mark.parametrize(("name", "number"), [("deep_crash", 2), ("deep_crash", 20), ("killed", 0), ("killed", 5),
                                              ("two_backing", 0), ("flash_volume", 0)])
def test_a_repair_puts_it_back(golden: Callable[..., Path], name: str, number: int) -> None:
    truth = by_sector(check(load(golden, name)))
    image = without_last_set(golden, name, number)
    before = check(image)
    assert "BTREE_SET_MISSING" in serious(before)
    assert bool(plan_repair(before, safe_only=True).steps) == (not find_dirty(before).unknown)
    repair = plan_repair(before, safe_only=False)
    assert not repair.left
    apply(image, repair)
    after = check(image)
    assert not serious(after)
    assert by_sector(after) == truth


def test_an_offline_write_back_does_not_call_a_device_clean(golden: Callable[..., Path]) -> None:
    """Where the journal does not reach back to the beginning, more may have been in the set than it tells."""
    before = check(without_last_set(golden, "killed", 0))
    [finding] = [finding for finding in before.findings if finding.code == "BTREE_SET_MISSING"]
    assert finding.unknown
    assert find_dirty(before).unknown == list(finding.unknown)


def test_what_was_replaced_since_is_not_missed(golden: Callable[..., Path]) -> None:
    """A bucket that was used again tells that its data was written back and forgotten."""
    image = without_last_set(golden, "two_backing", 0)
    before = check(image)
    assert "BTREE_SET_MISSING" in serious(before)
    for bucket in range(before.walk.geometry.nbuckets):
        if before.used[bucket]:
            image.bucket_gen(bucket, lambda gen: gen + 1)
    assert "BTREE_SET_MISSING" not in serious(check(image))


@pytest.mark.parametrize("name", STORIES)
def test_a_leaf_that_has_nothing_left(golden: Callable[..., Path], name: str) -> None:
    """Its first set is empty, as that of a new root, and the next is gone."""
    good = load(golden, name)
    for node in [node for node in good.nodes if not node.level][:3]:
        image = good.fresh()
        image.bset(node, 0, 28, "I", 0)
        image.cache.put(image.bucket(node.bucket) + good.walk.geometry.block_bytes,
                        bytes((node.sets[-1].block + 1) * good.walk.geometry.block_bytes))
        # The journal does not reach back to all of the one that was killed.
        assert "BTREE_SET_MISSING" in serious(check(image)) or name == "killed"


def made_anew(good: Image, number: int, since: int) -> tuple[Image, Extents]:
    """The images with a leaf that was made anew without all that the journal tells of from an entry on, and what of
    that was dirty, as flat extents."""
    image, walk = good.fresh(), good.walk
    node = [node for node in good.nodes if not node.level][number]
    slot = next(slot for slot in walk.slots if slot.start == node.start)
    told = ages.told_keys(walk)
    told = told.take((told.seq >= since) & (told.seq < walk.replay[0].jset.seq))
    recent = extent.clip(extent.flatten(told.rows), start=node.start, end=node.end)
    gone = recent.take(recent.dirty & (recent.nptrs > 0))
    kept = extent.overlay(salvage.own_keys(walk, slot), recent._replace(csum=np.ones(len(recent.start), np.uint8)))
    kept = kept.take((kept.csum == 0) & (kept.nptrs > 0))
    keys = encode_key_columns(kept.end, kept.size.astype(np.uint32), kept.dirty, kept.nptrs, kept.ptr)
    assert walk.superblock is not None
    ptr = ptr_make(walk.geometry.sector_of(node.bucket), node.gen)
    data = encode_bset(keys, seq=77, magic=bset_magic(walk.superblock.set_uuid), seed=ptr,
                       block_bytes=walk.geometry.block_bytes)
    image.cache.put(image.bucket(node.bucket), data.ljust(node.nsectors << 9, b"\0"))
    return image, gone


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_clean_data_that_a_new_leaf_has_forgotten(golden: Callable[..., Path], number: int) -> None:
    """A gc makes a leaf anew without data that was written back and whose bucket is to be used again; the generations
    that say so are not on the device yet when power fails."""
    good = load(golden, "killed")
    image, gone = made_anew(good, number, 800)
    assert len(gone.start)
    # As if the data had not been written back: nothing else may have taken it away.
    assert "BTREE_SET_MISSING" in serious(check(image))
    for start, end, ptr in _rows(gone):
        sector = (ptr & (1 << 51) - 1) >> 8
        image.backings[0].put((start & SECTOR_MASK) << 9, image.cache.read(sector, end - start))
    assert "BTREE_SET_MISSING" not in serious(check(image))
    # Without the backing device nobody knows.
    assert "BTREE_SET_MISSING" not in serious(run(Check(image.cache.read, image.cache.size_sectors)))


def test_a_leaf_that_may_be_younger_than_the_journal(golden: Callable[..., Path]) -> None:
    """It may have been made with the end of data in it, of which the entry was lost with the power."""
    good = load(golden, "thrash_crash")
    told = ages.Ages(good.walk, ages.told_keys(good.walk))
    [young] = [number for number, node in enumerate(node for node in good.nodes if not node.level)
               if told.since(Ptr(0, good.walk.geometry.sector_of(node.bucket), node.gen)) is None]
    image, gone = made_anew(good, young, 0)
    assert len(gone.start)
    assert "BTREE_SET_MISSING" not in serious(check(image))


def test_generations_that_have_gone_round(golden: Callable[..., Path]) -> None:
    """Entries from before so many prio writes that a generation may be the same again tell nothing."""
    walk = load(golden, "killed").walk
    chains = [walk.prio_chain(entry.jset) for entry in walk.journal]
    writes = sum(one != other for one, other in pairwise(chains))
    assert writes > salvage.PRIO_WRITES_LIMIT
    seqs = [seq for seq, _rows in salvage.older_entries(walk)]
    assert seqs == list(range(seqs[0], walk.replay[0].jset.seq))
    seen = [walk.prio_chain(entry.jset) for entry in walk.journal if entry.jset.seq >= seqs[0]]
    assert sum(one != other for one, other in pairwise(seen)) == salvage.PRIO_WRITES_LIMIT
    assert not salvage.older_keys(walk)[1]


def test_since_when_a_leaf_is_there(golden: Callable[..., Path]) -> None:
    """One in the first set of the root is as old as that; one in a later set is older than those behind it."""
    good = load(golden, "deep_crash")
    told = ages.Ages(good.walk, ages.told_keys(good.walk))
    root = next(node for node in good.nodes if node.level)
    sector = good.walk.geometry.sector_of
    first = min(entry.jset.seq for entry in good.walk.journal
                if Ptr(0, sector(root.bucket), root.gen) in entry.jset.btree_root.ptrs)
    since = [(len(node.sets), told.since(Ptr(0, sector(node.bucket), node.gen)))
             for node in good.nodes if not node.level]
    # Those without a later set were made with the root, or after it; of the last ones nothing tells.
    assert {number for count, number in since if count == 1} == {first, 131, 136, None}
    assert sum(number is not None and number < first for count, number in since if count > 1) >= 24
    assert told.since(Ptr(0, sector(root.bucket), root.gen)) == first
    # Of the next generation of a bucket nothing is known.
    assert told.since(Ptr(0, sector(root.bucket), root.gen + 1)) is None


@pytest.mark.parametrize("name", ["attached_clean", "deep_crash", "dirty_crash", "two_backing", "flash_volume",
                                  "thrash_crash", "killed", "gen_churn", "fifo_discard"])
def test_nothing_vanishes_from_a_leaf(golden: Callable[..., Path], name: str) -> None:
    """What the kernel added to a leaf that is there since is covered in it, whatever became of it."""
    assert_all_covered(check(load(golden, name)))
