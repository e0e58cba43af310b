# SPDX-License-Identifier: GPL-2.0-only
"""A backing device for which parts of a stripe are expensive: the counters, and what follows from them.

The stripes here are of 64 sectors, so that a small device has many; the least size of a real one is lifted.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from bcachectl.engine import stripes
from bcachectl.engine.node import DIRTY, Extent
from bcachectl.engine.sched import WRITE
from bcachectl.engine.writeback import Writeback
from bcachectl.ondisk.superblock import CacheMode
from tests.sim.power import Story, mixed, run_story, stop_and_start
from tests.sim.world import Backing, Setup, World

STRIPE = 64
RAID = Setup(nbuckets=900, backings=(Backing(raid_stripe_sectors=STRIPE),), settles=False)
PLAIN = Setup(nbuckets=900, settles=False)


@pytest.fixture(autouse=True)
def small_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stripes, "STRIPE_MIN_SECTORS", STRIPE)


def up(setup: Setup, seed: str) -> World:
    world = World(setup, seed)
    world.run(world.up(), "up")
    return world


def counted(world: World) -> dict[int, int]:
    """Dirty sectors by stripe, from the map itself."""
    found: dict[int, int] = {}
    dev: Any = world.volumes[0]
    for leaf in world.cset.btree.nodes():
        for index in range(len(leaf.ends) if leaf.level == 0 else 0):
            extent = leaf.extent(index)
            if extent.flags & DIRTY:
                for sector in range(extent.start - dev.base, extent.end - dev.base):
                    found[sector // STRIPE] = found.get(sector // STRIPE, 0) + 1
    return found


def counters(world: World) -> dict[int, int]:
    """The same by the engine's counters."""
    dev: Any = world.volumes[0]
    assert dev.stripes is not None
    return {stripe: count for stripe, count in enumerate(dev.stripes.dirty) if count}


@pytest.mark.parametrize("seed", range(4))
def test_counters_follow_the_map_across_writeback_and_a_start(seed: int) -> None:
    world = up(RAID, f"stripes/{seed}")
    world.run(mixed(world, random.Random(seed), 120), "traffic")
    assert counters(world) == counted(world) != {}
    again = stop_and_start(world, f"seed={seed}")
    assert counters(again) == counted(again)


@pytest.mark.parametrize(("setup", "stays"), [(RAID, True), (PLAIN, False)], ids=["raid", "plain"])
def test_a_write_to_a_dirty_stripe_stays_in_the_cache_although_it_would_bypass(setup: Setup, stays: bool) -> None:
    world = up(setup, "bypass")
    written: list[int] = []
    world.on_io = lambda io: written.append(io.sector) if io.op == WRITE and io.device == 1 else None

    async def story(w: World) -> None:
        await w.tune("bcache0", "writeback_running", "0")
        await w.write(0, 100, 8)
        await w.tune("bcache0", "sequential_cutoff", "4096")
        written.clear()
        await w.write(0, 108, 8)       # goes on where the first ended: a run that is longer than the cutoff

    world.run(story(world))
    assert (written == []) is stays


def test_full_stripes_are_written_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    world = up(RAID, "full")
    dev: Any = world.volumes[0]
    taken: list[int] = []
    next_group = Writeback._next_group

    def seen(self: Writeback) -> list[Extent]:
        group = next_group(self)
        taken.extend(extent.start - dev.base for extent in group)
        return group

    monkeypatch.setattr(Writeback, "_next_group", seen)

    async def story(w: World) -> None:
        await w.tune("bcache0", "writeback_running", "0")
        await w.tune("bcache0", "sequential_cutoff", "0")
        for sector in (0, 300, 700):
            await w.write(0, sector, 8)
        full = 20 * STRIPE - dev.data_offset
        for sector in range(full, full + STRIPE, 16):
            await w.write(0, sector, 16)
        await w.tune("bcache0", "writeback_percent", "0")
        await w.tune("bcache0", "writeback_running", "1")
        await w.cset.flush_volume("bcache0")

    world.run(story(world))
    in_full_stripe = [start // STRIPE == 20 for start in taken]
    assert sorted(in_full_stripe, reverse=True) == in_full_stripe
    assert sum(in_full_stripe) >= 2
    assert len(in_full_stripe) - sum(in_full_stripe) == 3
    assert counters(world) == {}


def test_power_loss_on_a_raid() -> None:
    async def traffic(w: World) -> None:
        await mixed(w, random.Random(3), 60)

    tally = run_story(Story("raid", RAID, traffic), 1, lambda number: (0,) if number % 23 == 1 else ())
    assert tally.recoveries > 5


def test_a_detach_and_another_attach_begin_anew() -> None:
    world = up(RAID, "attach")
    dev: Any = world.volumes[0]

    async def story(w: World) -> None:
        await mixed(w, random.Random(5), 60)
        await w.cset.detach("bcache0")
        assert dev.stripes is None
        assert not w.cset.stripes
        await w.cset.attach("bcache0")
        assert dev.cache_mode == CacheMode.WRITEBACK
        await mixed(w, random.Random(6), 60)

    world.run(story(world))
    assert counters(world) == counted(world)
