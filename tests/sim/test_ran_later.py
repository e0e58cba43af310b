# SPDX-License-Identifier: GPL-2.0-only
"""An older copy of a cache beside a newer dirty backing device is refused, and nothing else is taken for one:
docs/decisions/0029."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from bcachectl.errors import Refused
from bcachectl.fsck.check import Check, run
from bcachectl.fsck.check_backing import Backing as Member
from tests.fsck.test_no_false import reader
from tests.sim.world import Backing, Setup, World

SETUP = Setup(settles=False, backings=(Backing(data_sectors=2000),))
START_S = 1_700_000_000


def images_of(world: World) -> list[bytearray]:
    return [bytearray(disk.now) for disk in world.disks]


def dirtied(seed: str, images: list[bytearray] | None, wall_s: int, *, setup: Setup = SETUP) -> World:
    """A world that has come up at a time, written, and ended as if killed."""
    world = World(setup, seed, images=images, wall_s=wall_s)

    async def story() -> None:
        await world.up()
        await world.tune("bcache0", "writeback_running", "0")
        await world.write(0, 100, 8, fua=True, quick=False)

    world.run(story())
    return world


def cleaned(seed: str, images: list[bytearray], wall_s: int) -> World:
    world = World(SETUP, seed, images=images, wall_s=wall_s)

    async def story() -> None:
        await world.up()
        await world.cset.flush_volume("bcache0")
        await world.cset.stop()

    world.run(story())
    return world


def notes(images: list[bytearray]) -> set[str]:
    check = run(Check(*reader(images[0]), [Member("backing0", *reader(images[1]))]))
    return {finding.code for finding in check.findings}


def test_an_older_copy_of_the_cache_is_refused() -> None:
    first = dirtied("first", None, START_S)
    copy = bytearray(first.disks[0].now)
    second = cleaned("second", images_of(first), START_S + 1000)
    third = dirtied("third", images_of(second), START_S + 2000)
    mixed = [copy, bytearray(third.disks[1].now)]
    assert "BACKING_NEWER" in notes(mixed)
    late = World(SETUP, "late", images=[bytearray(image) for image in mixed], wall_s=START_S + 3000)
    with pytest.raises(Refused, match=r"older copy of itself.*--force=inconsistent"):
        late.run(late.up())
    assert bytes(late.disks[1].now) == bytes(mixed[1])
    forced = dirtied("forced", mixed, START_S + 3000, setup=replace(SETUP, options={"accept_newer": True}))
    again = images_of(forced)
    assert "BACKING_NEWER" not in notes(again)
    # What was accepted once is not asked about again, even if the clock is set back.
    dirtied("again", again, START_S - 5000)


@pytest.mark.parametrize("shift_s", [1000, 0, -1000, -1_000_000])
@pytest.mark.parametrize("is_clean", [True, False])
def test_power_failures_and_clocks_are_no_older_copies(shift_s: int, is_clean: bool) -> None:
    """Power fails anywhere in a start and the first write after it; the clock goes on, stands still or is set back."""
    first = dirtied("first", None, START_S)
    images = images_of(first)
    if is_clean:
        images = images_of(cleaned("clean", images, START_S + 10))
    world = World(SETUP, "second", images=images, wall_s=START_S + 20 + shift_s)
    dice = random.Random(f"{shift_s} {is_clean}")
    taken: list[list[bytearray]] = []
    world.on_point = lambda _number: taken.append(world.survivors(dice))

    async def story() -> None:
        await world.up()
        await world.tune("bcache0", "writeback_running", "0")
        await world.write(0, 300, 8, fua=True, quick=False)
        await world.write(0, 100, 8, fua=True, quick=False)

    world.run(story())
    taken.append(images_of(world))
    assert len(taken) > 10
    for number, survivors in enumerate(taken):
        assert "BACKING_NEWER" not in notes(survivors), number
        for later_s in (10, -2_000_000):
            after = World(SETUP, f"after {number}", images=[bytearray(image) for image in survivors],
                          wall_s=START_S + shift_s + later_s)
            after.run(after.up())
