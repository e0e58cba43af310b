# SPDX-License-Identifier: GPL-2.0-only
"""Writes that are large beside the cache: an NBD client may send 32 MiB at once, and several of them.

Nothing of a write is written back before all of it is in the map, so a write that is kept back must find room for all
of it in what is free, whatever else speaks for keeping it back.
"""

from __future__ import annotations

from typing import Any

import pytest

from bcachectl.engine import stripes
from bcachectl.engine.sched import READ, Io
from tests.sim.world import Backing, Setup, World

CACHE_SECTORS = 600 * 8
LARGE = CACHE_SECTORS + 1200
STRIPE = 64


def up(backing: Backing, seed: str) -> World:
    world = World(Setup(nbuckets=600, backings=(backing,), settles=False), seed)
    world.run(world.up(), "up")
    return world


async def prepare(w: World) -> None:
    for name, text in (("sequential_cutoff", "0"), ("writeback_percent", "0"), ("writeback_delay", "0")):
        await w.tune("bcache0", name, text)


def test_one_larger_than_the_cache_over_what_is_being_written_back() -> None:
    w = up(Backing(data_sectors=8000), "over")
    dev: Any = w.volumes[0]

    def slow(io: Io) -> int | None:
        return 50_000_000 if io.what == "writeback" and io.op == READ else None

    async def story() -> None:
        await prepare(w)
        w.delay = slow
        await w.write(0, 100, 8, quick=False)
        while not dev.writeback.in_flight:
            await w.sleep(1)
        assert dev.writeback.overlaps(dev.base, dev.limit)
        await w.write(0, 0, LARGE, quick=False)
        await w.verify(everything=True)

    w.run(story())


@pytest.mark.parametrize("running", ["0", "1"])
def test_one_larger_than_the_cache_over_a_dirty_stripe(monkeypatch: pytest.MonkeyPatch, running: str) -> None:
    monkeypatch.setattr(stripes, "STRIPE_MIN_SECTORS", STRIPE)
    w = up(Backing(data_sectors=8000, raid_stripe_sectors=STRIPE), "stripe")

    async def story() -> None:
        await prepare(w)
        await w.tune("bcache0", "writeback_running", running)
        await w.write(0, 100, 8, quick=False)
        await w.write(0, 0, LARGE, quick=False)
        await w.verify(everything=True)

    w.run(story())


@pytest.mark.parametrize("running", ["0", "1"])
def test_many_at_once_that_are_larger_than_the_cache_together(running: str) -> None:
    w = up(Backing(data_sectors=12_000), "many")
    each = CACHE_SECTORS // 8 - 8

    async def story() -> None:
        await prepare(w)
        await w.tune("bcache0", "writeback_running", running)
        await w.together(*[w.write(0, index * 640, each, sync=True, quick=False) for index in range(18)])
        assert w.volumes[0].batch is not None
        await w.verify(everything=True)

    w.run(story())
