# SPDX-License-Identifier: GPL-2.0-only
"""Power fails at points of the simulated stories, and the kernel is the one that comes up (traps.md, T7).

`tests.sim` runs the engine on simulated disks that lose, keep or tear what was not flushed.  What the disks hold after
such a moment is written into files, many for one boot, and for each the kernel must register the set, say nothing but
its news, and return content that the simulation's oracle allows.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash.stories import STORIES
from tests.sim.oracle import Oracle
from tests.sim.power import Story, build
from tests.sim.world import World
from tests.vm import machine

SECTOR = 512


@dataclass
class Moment:
    """What a power loss left: the images, and the oracle that judges them."""

    name: str
    images: list[bytes]
    oracle: Oracle


def moments(story: Story, *, seed: int, every: int, limit: int) -> list[Moment]:
    """Every n-th point of a story."""
    world = build(story, seed)
    found: list[Moment] = []

    def point(number: int) -> None:
        if number % every == 1 and len(found) < limit:
            name = f"{story.name}-{seed}-{number}"
            images = world.survivors(random.Random(name))
            found.append(Moment(name, [bytes(image) for image in images], world.oracle.after_crash()))

    async def body(world: World) -> None:
        done: Awaitable[None] = story.body(world)
        await done

    world.on_point = point
    world.run(body(world))
    return found


# Stories whose sets have one backing device, in the order of the alphabet; the kernel takes their geometry.
CHOSEN = {"overwrite": 40, "reuse": 60, "split": 60, "gc": 60, "writeback": 40, "journal_wrap": 60, "prio_write": 60}

SCRIPT = """
one() {
    mkdir -p /tmp/set
    cp /job/$1.cache /tmp/set/cache
    cp /job/$1.backing /tmp/set/backing
    cache=$(losetup -f)
    losetup $cache /tmp/set/cache
    backing=$(losetup -f)
    losetup $backing /tmp/set/backing
    register $cache $backing
    link=/sys/block/${backing#/dev/}/bcache/dev
    wait_for 60 test -e $link
    volume=$(basename $(readlink $link))
    wait_volume $volume
    dd if=/dev/$volume of=/job/$1.out bs=64k 2>/dev/null || fail "reading $1"
    stop_all
    losetup -d $cache
    losetup -d $backing
    echo "$1 done"
}
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("series", ["6.12", "6.1"])
def test_t7_kernel_comes_up_after_power_loss(tmp_path: Path, series: str) -> None:
    share = tmp_path / "job"
    share.mkdir()
    all_moments: list[Moment] = []
    for name, every in CHOSEN.items():
        all_moments += moments(STORIES[name], seed=7 if series == "6.12" else 8, every=every, limit=3)
    assert len(all_moments) >= 2 * len(CHOSEN)
    script = SCRIPT
    for moment in all_moments:
        (share / f"{moment.name}.cache").write_bytes(moment.images[0])
        (share / f"{moment.name}.backing").write_bytes(moment.images[1])
        script += f"one {moment.name}\n"
    done = machine.run(script, [], share, timeout_s=800, series=series).check()
    assert done.complaints() == []
    for moment in all_moments:
        content = (share / f"{moment.name}.out").read_bytes()
        assert len(content) == moment.oracle.sizes[0] * SECTOR
        for _volume, sector in list(moment.oracle.held):
            piece = content[sector * SECTOR:(sector + 1) * SECTOR]
            moment.oracle.check_image(0, sector, piece, f"{moment.name}: the kernel reads")
