# SPDX-License-Identifier: GPL-2.0-only
"""Random sets under random traffic, with power loss at random points.  ``make sim SEED=n`` takes all points of seed n.

Everything is drawn from the seed: geometry, number of backing devices, modes, policy, discard, whether writeback runs,
flash-only volumes, the requests and the points.
"""

from __future__ import annotations

import os
import random

import pytest

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
    setup = Setup(nbuckets=dice.choice((560, 600, 900)), bucket_sectors=max(8, bucket), block_sectors=block,
                  backings=backings, settles=False, atomic_sectors=dice.choice((1, block)), discard=dice.random() < 0.3,
                  replacement=dice.randrange(3))
    flash = dice.randrange(0, 2) if backings else 1

    async def prepare(w: World) -> None:
        for number in range(flash):
            await w.flash_create(FLASH + number, 512)
        await w.tune("", "copy_gc_enabled", str(dice.randrange(2)))
        for number in range(len(backings)):
            for name, value in (("writeback_percent", dice.choice(("0", "10"))),
                                ("writeback_delay", dice.choice(("0", "5"))),
                                ("writeback_running", dice.choice(("0", "1", "1")))):
                await w.tune(f"bcache{number}", name, value)

    async def body(w: World) -> None:
        for _ in range(5):
            await mixed(w, dice, 24, width=40, align=setup.atomic_sectors)
            if dice.random() < 0.4:
                await w.cset.run_gc()
            if dice.random() < 0.3:
                await w.sleep(dice.choice((50, 500, 31_000)))
            if backings and dice.random() < 0.3:
                await w.tune(f"bcache{dice.randrange(len(backings))}", "cache_mode", dice.choice(MODES))

    return Story(f"random{seed}", setup, body, prepare)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_traffic(seed: int) -> None:
    dice = random.Random(f"points/{seed}")
    wanted = 1.0 if FIRST else 0.06
    tally = run_story(story(seed), seed, lambda number: (number,) if dice.random() < wanted else ())
    print(seed, tally)
