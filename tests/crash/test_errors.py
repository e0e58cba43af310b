# SPDX-License-Identifier: GPL-2.0-only
"""Errors: the n-th Io of the cache or of a backing device fails, n = 1, 2, ...; and devices that die.

What must hold: no read returns a value that the oracle does not allow, nothing that was acknowledged as durable is gone
when the devices work again, every request is answered, and the set goes on or fails with a text.  What a failed request
or command asked for may have happened or not.
"""

from __future__ import annotations

import os
import random
from errno import EIO

import pytest

from bcachectl.errors import BcachectlError
from tests.crash.stories import STORIES
from tests.sim import image
from tests.sim.power import Story, build, drain, text_of
from tests.sim.world import SimFailure, World

EVERYTHING = os.environ.get("BCACHECTL_CRASH") == "all"
SEED = int(os.environ.get("BCACHECTL_SIM_SEED") or 1)
POINTS = os.environ.get("BCACHECTL_SIM_POINTS", "")
SHARE = 6
"""Errors per story and device that are tried when not all are."""

NAMES = ("first_attach", "overwrite", "miss_fill", "reuse", "prio_write", "split", "gc", "moving_gc", "writeback",
         "detach", "flash", "cached_and_flash", "stop", "modes", "small_node_cache", "settings", "discards", "around",
         "leaves_come_and_go", "placed", "exported")


async def tolerant(world: World, story: Story) -> None:
    """The story, where commands may be refused because of the error."""
    try:
        await story.body(world)
    except BcachectlError:
        pass


def run_with_error(story: Story, seed: int, device: int, nth: int, *, dies: bool = False) -> bool:
    """Run with the ``nth`` Io of a device failing (and all later ones if it ``dies``); False if the story has fewer."""
    where = f"story={story.name} seed={seed} device={device} error at io={nth} dies={dies}"
    world = build(story, seed)
    world.is_calm = False
    disk = world.disks[device]
    at = disk.serial + nth
    if dies:
        disk.gone_from = at
    else:
        disk.fail_ios[at] = EIO
    failed: str | None = None
    try:
        world.run(tolerant(world, story), "story")
        reached = disk.serial >= at
        if world.volumes and story.ends and reached:
            world.run(world.verify(), "verify")
        if story.ends:
            world.run(_stop(world), "stop")
        drain(world)
        failed = world.cset.failed
        chooser = random.Random(where)
        images = world.survivors(chooser)
        image.check(images[0], "after the error")
        after = world.revive(where, images=images)
        after.run(after.up(), "up")
        after.run(after.verify(twice=True), "verify")
    except SimFailure as error:
        raise SimFailure(f"{where}: {error} [failed: {failed}; {disk.failed[:3]}]") from error
    except Exception as error:
        raise SimFailure(f"{where}: {text_of(error)} [failed: {failed}; {disk.failed[:3]}]") from error
    return reached


async def _stop(world: World) -> None:
    try:
        await world.cset.stop()
    except BcachectlError:
        pass


def errors_of(story: Story, device: int) -> list[int]:
    """Which Ios are made to fail."""
    if POINTS:
        first, _, last = POINTS.partition("-")
        return list(range(int(first), int(last or first) + 1))
    dice = random.Random(f"{story.name}/{device}/{SEED}")
    return [1, 2, 3] + sorted(dice.sample(range(4, 240), SHARE))


@pytest.mark.parametrize("dies", [False, True], ids=["once", "dies"])
@pytest.mark.parametrize("device", [0, 1], ids=["cache", "backing"])
@pytest.mark.parametrize("name", NAMES)
def test_error(name: str, device: int, dies: bool) -> None:
    story = STORIES[name]
    if device > len(story.setup.backings):
        device = 0
    if EVERYTHING and not POINTS:
        nth = 1
        while run_with_error(story, SEED, device, nth, dies=dies):
            nth += 1
        return
    for nth in errors_of(story, device):
        if not run_with_error(story, SEED, device, nth, dies=dies):
            break
