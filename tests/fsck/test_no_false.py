# SPDX-License-Identifier: GPL-2.0-only
"""No finding on a good image: those of the kernel's driver, and what the engine leaves on simulated disks.

The simulated ones are taken at any moment of the crash stories: after power loss and before recovery, after recovery,
and after a clean stop.  `make nofalse` takes every tenth point of every story; the tests take a few of each.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from bcachectl.fsck.check import Check, run
from bcachectl.fsck.check_backing import Backing
from bcachectl.fsck.findings import Severity
from bcachectl.fsck.walk import Read
from tests.crash.stories import STORIES
from tests.fsck.covered import assert_all_covered
from tests.sim.power import build, drain
from tests.sim.world import World

GOLDEN = ("fresh", "attached_clean", "dirty_crash", "deep_crash", "thrash_crash", "killed", "two_backing",
          "flash_volume", "fifo_discard", "gen_churn")
SEED = int(os.environ.get("BCACHECTL_SIM_SEED") or 1)
EVERY = int(os.environ.get("BCACHECTL_NOFALSE_EVERY") or 0)
"""Every how many points an image is taken; 0 for the few of an ordinary run."""
SHARE = 8 / 260
NOTES: Counter[str] = Counter()


def reader(image: bytes | bytearray) -> tuple[Read, int]:
    view = memoryview(image)
    return (lambda sector, count: bytes(view[sector << 9:(sector + count) << 9])), len(image) >> 9


def serious(images: list[bytes] | list[bytearray]) -> list[str]:
    """What fsck finds on a cache device and its backing devices, notes left out."""
    read, size_sectors = reader(images[0])
    backings = [Backing(f"backing{number}", *reader(image)) for number, image in enumerate(images[1:])]
    check = run(Check(read, size_sectors, backings))
    assert_all_covered(check)
    NOTES.update(finding.code for finding in check.findings if finding.severity is Severity.NOTE)
    return [f"{finding.code} {finding.structure}: {finding.why} {finding.key}" for finding in check.findings
            if finding.severity > Severity.NOTE]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(golden: Callable[..., Path], name: str) -> None:
    story = golden(name)
    assert serious([image.read_bytes() for image in [story / "cache.img", *sorted(story.glob("back*.img"))]]) == []


def judge(world: World, where: str) -> None:
    found = serious([disk.now for disk in world.disks])
    assert found == [], f"{where}: {found}"


@pytest.mark.parametrize("name", STORIES)
def test_simulated(name: str) -> None:
    dice = random.Random(f"nofalse/{name}/{SEED}")
    world = build(STORIES[name], SEED)
    images = 0

    def point(number: int) -> None:
        nonlocal images
        if number % EVERY if EVERY else dice.random() > SHARE:
            return
        where = f"story={name} seed={SEED} io={number}"
        survivors = world.survivors(random.Random(where))
        found = serious(survivors)
        assert found == [], f"{where}: {found}"
        images += 1
        if images % 3 == 0:
            after = world.revive(where, images=survivors)
            after.run(after.up(), "up")
            judge(after, f"{where} after recovery")
            after.run(after.cset.stop(), "stop")
            drain(after)
            judge(after, f"{where} after a clean stop")
            images += 2

    async def body() -> None:
        await STORIES[name].body(world)

    world.on_point = point
    world.run(body())
    world.on_point = None
    judge(world, f"story={name} seed={SEED} at its end")
    print(f"{name}: {images + 1} images, notes {dict(NOTES)}")
