# SPDX-License-Identifier: GPL-2.0-only
"""Sets of keys that are gone without a trace, as where a block was lost: what only the journal still tells of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bcachectl.fsck.check import Check, run
from bcachectl.fsck.extents import Extents
from bcachectl.fsck.findings import Severity
from bcachectl.fsck.repair import plan_repair
from bcachectl.fsck.writeback import find_dirty
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
