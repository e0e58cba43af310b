# SPDX-License-Identifier: GPL-2.0-only
"""Groups of small writes, as a block device's export makes them, from several clients on a small cache in writeback
mode: gc, invalidation, write-back, moves, splits and the journal's way round all go on at once, in slices of any size.

Everything is drawn from the seed; ``make sim SEED=n`` takes that one.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.sim.world import Backing, Setup, World

FIRST = int(os.environ.get("BCACHECTL_SIM_SEED") or 0)
FOUND = (87, 191)
"""In these, leaves that were no neighbours any more were put together."""
SEEDS = [FIRST] if FIRST else [*range(1, 9), *FOUND]
CLIENTS = (1, 3, 8)
ROUNDS = 60


def setup_of(dice: random.Random) -> Setup:
    """The shape of a seed's set."""
    bucket = dice.choice((8, 16, 32))
    nbuckets = dice.choice((560, 700, 1400, 2500))
    options = {"slice_keys": dice.choice((20, 40, 80, 4096)), "slice_buckets": dice.choice((64, 256, 1 << 17))}
    if dice.random() < 0.3:
        options["node_cache_bytes"] = dice.randrange(3, 8) * (bucket << 9)
    return Setup(nbuckets=nbuckets, bucket_sectors=bucket,
                 backings=(Backing(data_sectors=dice.choice((1200, 3000, 6000))),), settles=False,
                 sluggish=dice.random() < 0.2, options=options, discard=dice.random() < 0.3,
                 replacement=dice.randrange(3))


async def client(w: World, dice: random.Random) -> None:
    """Groups for the most part, and something of everything else."""
    size = w.setup.backings[0].data_sectors
    for _ in range(ROUNDS):
        unit = dice.choice((1, 1, 2, 8))
        span = dice.choice((size, size, size // 4))
        writes = [(dice.randrange(0, span - unit), unit) for _ in range(dice.choice((1, 4, 16, 32)))]
        draw = dice.random()
        if draw < 0.6:
            await w.write_group(0, writes)
            if dice.random() < 0.1:
                await w.flush(0)
        elif draw < 0.7:
            await w.write_placed(0, writes)
        elif draw < 0.8:
            await w.write_batch(0, writes)
        elif draw < 0.9:
            await w.read(0, dice.randrange(0, size - 64), dice.randrange(1, 64))
        elif draw < 0.93:
            await w.flush(0)
        elif draw < 0.95:
            await w.zeroes(0, dice.randrange(0, size - 64), dice.randrange(1, 64))
        elif draw < 0.96:
            await w.discard(0, dice.randrange(0, size - 64), dice.randrange(1, 64))
        else:
            await w.write(0, dice.randrange(0, size - 200), dice.randrange(1, 200), sync=True)
        if dice.random() < 0.05:
            await w.sleep(dice.choice((1, 30, 600)))


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_of_writes(seed: int) -> None:
    dice = random.Random(f"stress/{seed}")
    world = World(setup_of(dice), f"stress{seed}")
    done: list[bool] = []

    async def clients() -> None:
        await world.together(*[client(world, random.Random(f"{seed}/{number}"))
                               for number in range(dice.choice(CLIENTS))])
        done.append(True)

    async def collect() -> None:
        draws = random.Random(f"gc/{seed}")
        while not done:
            await world.sleep(draws.choice((1, 5, 50)))
            if draws.random() < 0.5:
                await world.cset.run_gc()

    async def story() -> None:
        await world.up()
        await world.tune("", "copy_gc_enabled", str(dice.randrange(2)))
        await world.tune("bcache0", "writeback_percent", dice.choice(("0", "10")))
        await world.tune("bcache0", "writeback_delay", "0")
        await world.tune("bcache0", "sequential_cutoff", "0")
        await world.tune("", "congested_write_threshold_us", "0")
        await world.together(collect(), clients())
        await world.verify(everything=True)

    world.cset.options.debug_checks = seed % 3 == 0
    world.run(story())
    assert world.cset.splitter.splits > 1
    assert world.cset.gc.runs > 1


def test_a_stop_waits_for_a_leaf_that_is_made_anew() -> None:
    """Nobody's request does, so nothing else would."""
    world = World(Setup(settles=False), "room")

    async def story() -> None:
        await world.up()
        await world.write_group(0, [(8 * number, 8) for number in range(20)])
        leaf, splitter = world.cset.btree.leaf_nowait(world.volumes[0].base), world.cset.splitter
        assert leaf is not None

        async def something_slow() -> None:
            async with world.cset.btree.structure:
                await world.sleep(500)

        async def stop() -> None:
            await world.sleep(1)
            splitter.make_room(leaf, leaf.nblocks * world.cset.geometry.block_bytes // 8)
            await world.cset.stop()

        await world.together(something_slow(), stop())
        assert not splitter.making_room
        assert splitter.splits == 1
        assert leaf.gone

    world.run(story())
