# SPDX-License-Identifier: GPL-2.0-only
"""What goes on in slices goes on: gc, invalidation and the collecting of dirty data, interrupted at any of them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from bcachectl.engine import checks
from bcachectl.engine.alloc import Reserve
from bcachectl.engine.buckets import MARK_DIRTY, Lowest
from bcachectl.engine.node import Node
from bcachectl.ondisk.bkey import MAX_POS
from tests.sim.world import Backing, Setup, World


def test_a_few_clean_buckets_are_given_out_when_gc_knows_nothing_new() -> None:
    """Fewer than free_inc takes, and nothing in the tree changes: whoever waits must get them all the same."""
    world = World(Setup(), "few")

    async def story() -> None:
        await world.up()
        cset = world.cset
        await cset.run_gc()
        await world.sleep(2000)
        buckets, alloc = cset.buckets, cset.alloc
        few = buckets.candidates(0, buckets.nbuckets)
        buckets.mark[few[3:]] = MARK_DIRTY
        for _ in range(len(alloc.free[Reserve.NONE]) + len(alloc.free_inc) + 1):
            buckets.set_mark(await alloc.alloc(Reserve.NONE), MARK_DIRTY, 8)
        assert cset.gc.changes_seen == cset.btree.changes, "no gc could have helped"

    world.cset.options.debug_checks = False
    world.run(story())


def test_what_a_read_had_pinned_is_given_out_later() -> None:
    """All that is clean is pinned by reads when a bucket is wanted; afterwards nothing changes but the pins."""
    world = World(Setup(), "pinned")

    async def story() -> None:
        await world.up()
        cset = world.cset
        await cset.run_gc()
        await world.sleep(2000)
        buckets, alloc = cset.buckets, cset.alloc
        clean = buckets.candidates(0, buckets.nbuckets)
        buckets.pin[clean] += 1

        async def unpin() -> None:
            await world.sleep(3000)
            buckets.pin[clean] -= 1

        world.sched.spawn(unpin(), "unpin")
        for _ in range(len(alloc.free[Reserve.NONE]) + len(alloc.free_inc) + 3):
            buckets.set_mark(await alloc.alloc(Reserve.NONE), MARK_DIRTY, 8)
        assert cset.gc.changes_seen == cset.btree.changes, "no gc could have helped"

    world.cset.options.debug_checks = False
    world.run(story())


def test_the_lowest_of_all_are_found_in_parts() -> None:
    draw = np.random.default_rng(3)
    for count in (0, 1, 7, 100, 5000):
        value = draw.integers(0, 50, 3000, dtype=np.uint32)
        value[draw.integers(0, 3000, 20)] = 0xFFFFFFFF
        index = np.flatnonzero(draw.random(3000) < 0.7)
        lowest = Lowest(count)
        for first in range(0, len(index), 97):
            part = index[first:first + 97]
            lowest.add(part, value[part])
        expected = sorted(index.tolist(), key=lambda bucket: (value[bucket], bucket))[:count]
        found, values = lowest.in_order()
        assert found.tolist() == expected
        assert values.tolist() == value[expected].tolist()


SLICES = {"slice_keys": 20, "slice_buckets": 64}
"""So small that everything is interrupted again and again."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["writeback", "writethrough"])
def test_marks_are_true_at_every_moment_of_a_gc(mode: str, seed: int) -> None:
    """Inserts, splits, invalidations, write-back and moves go on while gc marks a few keys and puts a few marks in
    force; each of them would find it out if a bucket that holds something were marked as if it did not.
    """
    setup = Setup(nbuckets=700, backings=(Backing(data_sectors=6000, mode=mode),), settles=False, options=SLICES)
    world = World(setup, f"marks/{seed}")
    dice = random.Random(seed)
    during: list[str] = []

    def look(_point: int) -> None:
        cset = world.cset
        if cset.running and not cset.io_disabled:
            checks.check_lists(cset)
            checks.check_btree(cset)
            if cset.gc.running:
                during.append("walk" if cset.gc.position < MAX_POS else "force")

    async def ask() -> None:
        sector = dice.choice((dice.randrange(0, 600), dice.randrange(0, 5800)))
        if dice.random() < 0.75:
            await world.write(0, sector, dice.randrange(1, 9), fua=dice.random() < 0.2, sync=True)
        else:
            await world.read(0, sector, dice.randrange(1, 20))

    async def traffic() -> None:
        for _ in range(100):
            await world.together(*[ask() for _ in range(3)])
        during.append("over")

    async def collect() -> None:
        while "over" not in during:
            await world.cset.run_gc()

    async def story() -> None:
        await world.up()
        await world.tune("", "copy_gc_enabled", "1")
        for name, text in (("writeback_percent", "0"), ("writeback_delay", "0"), ("sequential_cutoff", "0")):
            await world.tune("bcache0", name, text)
        for start in range(0, 900, 2):
            await world.write(0, start, 1)
        world.on_point = look
        await world.together(collect(), traffic())
        splits, runs = world.cset.splitter.splits, world.cset.gc.runs
        assert splits > 3
        assert runs >= 2
        assert during.count("walk") > 50
        assert "force" in during
        await world.verify(everything=True)

    world.run(story())


def test_a_leaf_that_is_divided_behind_gc_is_not_passed_over() -> None:
    """gc has marked all of a leaf that comes before the cut when the leaf is divided.  Then it goes on in the second
    half; what it visited before that half's sibling is no neighbour of it, and is not put together with it.
    """
    setup = Setup(nbuckets=700, backings=(Backing(data_sectors=6000),), settles=False, options=SLICES)
    world = World(setup, "divided")

    def leaf_of(sector: int) -> Node:
        dev = world.cset.devices[0]
        leaf = world.cset.btree.leaf_nowait(dev.base + dev.data_offset + sector)
        assert leaf is not None
        return leaf

    async def story() -> None:
        await world.up()
        cset = world.cset
        for name, text in (("writeback_percent", "0"), ("sequential_cutoff", "0")):
            await world.tune("bcache0", name, text)
        for sector in range(0, 300, 2):
            await world.write(0, sector, 1, sync=True)
        first, second = leaf_of(0), leaf_of(298)
        assert first is not second, "no leaf was divided"
        cut = max(sector for sector in range(300) if leaf_of(sector) is first)
        for sector in range(0, cut - 40, 32):
            await world.write(0, sector, 32, sync=True)
        sector = 300
        while second.has_room(24, cset.geometry):
            await world.write(0, sector, 1, sync=True)
            sector += 2
        assert leaf_of(0) is first
        assert leaf_of(sector - 2) is second

        async def divide() -> None:
            behind = second.ends[len(second.ends) * 6 // 10]
            while not behind <= cset.gc.position < MAX_POS:
                await world.sched.yield_now()
            assert leaf_of(cut + 5) is second, "divided too early"
            await world.together(*[world.write(0, cut + 5 + 2 * index | 1, 1, sync=True) for index in range(12)])
            assert not first.gone
            assert leaf_of(cut + 5).end <= behind, "gc has not passed the cut"

        await world.together(cset.run_gc(), divide())
        await world.verify(everything=True)

    world.run(story())
