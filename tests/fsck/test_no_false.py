# SPDX-License-Identifier: GPL-2.0-only
"""No false finding on a good image: those of the kernel's driver, and what the engine leaves on simulated disks.

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
from bcachectl.ondisk.superblock import BdevState
from tests.crash.stories import STORIES, scatter, wait_state
from tests.fsck.covered import assert_all_covered
from tests.sim.power import Story, build, drain
from tests.sim.world import Backing as Member
from tests.sim.world import Setup, World

GOLDEN = ("fresh", "attached_clean", "dirty_crash", "deep_crash", "thrash_crash", "killed", "two_backing",
          "flash_volume", "fifo_discard", "gen_churn")
SEED = int(os.environ.get("BCACHECTL_SIM_SEED") or 1)
EVERY = int(os.environ.get("BCACHECTL_NOFALSE_EVERY") or 0)
"""Every how many points an image is taken; 0 for the few of an ordinary run."""
SHARE = 8 / 260
NOTES: Counter[str] = Counter()
TRUE = ("JOURNAL_FULL", "BACKING_DETACHED_DIRTY")
"""A start that finds the ring full may leave it so.  The next start of an engine finds its way out; a kernel stands
still when it registers one of these images.  A device whose detach ended just before power failed, and that was written
to since, has other data than keys that still say dirty; which is newer nothing tells, and `resolve` asks."""


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
            if finding.severity > Severity.NOTE and finding.code not in TRUE]


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


async def read_more_than_fits(w: World) -> None:
    for name, text in (("writeback_percent", "0"), ("writeback_delay", "0"), ("sequential_cutoff", "0")):
        await w.tune("bcache0", name, text)
    await w.tune("", "gc_always_rewrite", "1")
    for start in range(0, 4480, 8):
        await w.read(0, start, 8, nowait=False)


def test_what_was_written_back_is_forgotten(record_property: Callable[[str, object], None]) -> None:
    """Few writes, written back at once, among reads that take their buckets: some leaves are made anew without them
    before the prio sets say why, and power fails then.  Who goes by the journal alone misses them at some of these.
    """
    images = 0

    async def body(w: World) -> None:
        nonlocal images
        dice = random.Random(f"story/{w.seed}")
        for turn in range(8):
            w.on_point = None
            await scatter(w, 0, [4480 + turn * 2000 + 8 * dice.randrange(0, 200) for _ in range(14)], 8)
            await w.flush(0)
            await wait_state(w, 0, BdevState.CLEAN)
            await w.cset.run_gc()
            w.on_point = point
            for number in range(50):
                await w.read(0, 8 * dice.randrange(0, 560), 8, nowait=False)
                if number % 5 == 4:
                    await w.cset.run_gc()

    def point(number: int) -> None:
        nonlocal images
        if number % 9 == 0:
            found = serious(world.survivors(random.Random(number)))
            assert found == [], f"io={number}: {found}"
            images += 1

    setup = Setup(nbuckets=560, replacement=2, backings=(Member(data_sectors=24480),), settles=False)
    world = build(Story("mine", setup, body, read_more_than_fits), 6)
    world.run(body(world))
    assert images > 100
    record_property("images", images)
