# SPDX-License-Identifier: GPL-2.0-only
"""What goes on in slices goes on: gc, invalidation and the collecting of dirty data, interrupted at any of them."""

from __future__ import annotations

import numpy as np

from bcachectl.engine.alloc import Reserve
from bcachectl.engine.buckets import MARK_DIRTY, Lowest
from tests.sim.world import Setup, World


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
