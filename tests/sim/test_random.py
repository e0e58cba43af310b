# SPDX-License-Identifier: GPL-2.0-only
"""Random sets under random traffic, with power loss at random points.  ``make sim SEED=n`` takes all points of seed n.

Everything is drawn from the seed: geometry, number of backing devices, modes, policy, discard, whether writeback runs,
flash-only volumes, size of the node cache and of slices, how slow the disks are, the requests, the commands beside
them, the points.
"""

from __future__ import annotations

import os
import random

import pytest

from bcachectl.errors import WrongState
from tests.sim.power import Story, mixed, run_story
from tests.sim.world import FLASH, Backing, Setup, World

FIRST = int(os.environ.get("BCACHECTL_SIM_SEED") or 0)
SEEDS = [FIRST] if FIRST else range(1, 25)
MODES = ("writeback", "writeback", "writethrough", "writearound", "none")


def story(seed: int) -> Story:
    """The story of a seed."""
    dice = random.Random(f"random/{seed}")
    block = dice.choice((1, 1, 2, 8))
    bucket = block * dice.choice((8, 16, 32)) if block < 8 else 64
    backings = tuple(Backing(data_sectors=dice.choice((600, 1200, 3000)) // 8 * 8, mode=dice.choice(MODES),
                             data_offset=dice.choice((16, 64))) for _ in range(dice.randrange(0, 3)))
    node_bytes = max(8, bucket) << 9
    options = {"node_cache_bytes": dice.randrange(2, 5) * node_bytes} if dice.random() < 0.4 else {}
    if seed % 3 == 0:
        # Every walk over the tree or the buckets is interrupted again and again.
        options |= {"slice_keys": dice.choice((20, 40, 80)), "slice_buckets": 64}
    setup = Setup(nbuckets=dice.choice((560, 600, 900)), bucket_sectors=max(8, bucket), block_sectors=block,
                  backings=backings, settles=False, atomic_sectors=dice.choice((1, block)), discard=dice.random() < 0.3,
                  replacement=dice.randrange(3), sluggish=dice.random() < 0.5, options=options)
    flash = dice.randrange(0, 2) if backings else 1
    scattered = dice.random() < 0.5

    async def prepare(w: World) -> None:
        for number in range(flash):
            await w.flash_create(FLASH + number, 512)
        await w.tune("", "copy_gc_enabled", str(dice.randrange(2)))
        for number in range(len(backings)):
            for name, value in (("writeback_percent", dice.choice(("0", "10"))),
                                ("writeback_delay", dice.choice(("0", "5"))),
                                ("writeback_running", dice.choice(("0", "1", "1")))):
                await w.tune(f"bcache{number}", name, value)
        if scattered:
            # Several leaves, so that requests span them.
            sectors = list(range(0, 504, 2 * setup.atomic_sectors))
            dice.shuffle(sectors)
            volume = dice.choice(sorted(w.volumes))
            unit = max(setup.atomic_sectors, block if volume >= FLASH else 1)
            for start in range(0, len(sectors), 6):
                await w.together(*[w.write(volume, sector // unit * unit, unit, sync=True)
                                   for sector in sectors[start:start + 6]])

    async def command(w: World) -> None:
        name = f"bcache{dice.randrange(len(backings))}" if backings else ""
        roll = dice.randrange(7 if backings else 1)
        try:
            if roll == 0:
                await w.cset.run_gc()
            elif roll in (1, 2):
                await w.cset.detach(name)
            elif roll in (3, 4):
                await w.cset.attach(name)
            elif roll == 5:
                await w.cset.flush_volume(name)
            else:
                await w.tune(name, "cache_mode", dice.choice(MODES))
        except WrongState:
            pass

    async def body(w: World) -> None:
        for _ in range(5):
            commands = [command(w) for _ in range(dice.choice((0, 0, 1, 2)))]
            await w.together(mixed(w, dice, 24, width=40, align=setup.atomic_sectors), *commands)
            if dice.random() < 0.3:
                await w.sleep(dice.choice((50, 500, 31_000)))

    return Story(f"random{seed}", setup, body, prepare)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_traffic(seed: int) -> None:
    dice = random.Random(f"points/{seed}")
    wanted = 1.0 if FIRST else 0.06
    tally = run_story(story(seed), seed, lambda number: (number,) if dice.random() < wanted else ())
    print(seed, tally)
