# SPDX-License-Identifier: GPL-2.0-only
"""The fading windows against stats.c's arithmetic, and the snapshot of a set against the set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bcachectl.engine.stats import COUNTERS, FADE_TICKS, TICK_NS, Windows
from bcachectl.snapshot import MAP_STATES
from tests.sim.world import Setup, World


def test_windows_fade_by_a_32nd_at_their_own_pace() -> None:
    windows = Windows()
    totals = [0] * len(COUNTERS)
    model = dict.fromkeys(FADE_TICKS, 0)
    for tick in range(1, 2000):
        totals[0] += tick % 7
        windows.tick(list(totals))
        for name, every in FADE_TICKS.items():
            model[name] += (tick % 7) << 16
            if tick % every == 0:
                model[name] = model[name] * 31 // 32
    assert {name: sums[0] for name, sums in windows.sums.items()} == model
    assert all(sums[1:] == [0] * (len(COUNTERS) - 1) for sums in windows.sums.values())


def test_totals_that_begin_anew_do_no_harm() -> None:
    windows = Windows()
    windows.tick([10] * len(COUNTERS))
    windows.tick([3] * len(COUNTERS))
    windows.tick([5] * len(COUNTERS))
    assert windows.sums["day"] == [12 << 16] * len(COUNTERS)


@pytest.fixture
def w() -> Iterator[World]:
    world = World(Setup(), "stats")
    world.run(world.up(), "up")
    yield world
    world.run(world.cset.stop(), "stop")


def test_a_snapshot_of_a_set_with_dirty_data(w: World) -> None:
    async def story() -> None:
        await w.tune("bcache0", "writeback_running", "0")
        await w.write(0, 0, 16, fua=True)
        await w.read(0, 0, 8, nowait=False)
        await w.read(0, 512, 8, nowait=False)
        await w.sleep(100)

    w.run(story())
    cset = w.cset
    snapshot = cset.snapshot(64)
    counts = snapshot.allocator.counts
    assert sum((counts.unused, counts.free, counts.open, counts.clean, counts.dirty, counts.metadata,
                counts.reserved)) == cset.geometry.nbuckets
    assert counts.free == len(cset.alloc.on_lists())
    assert counts.open == len(cset.sectors.open_now())
    assert counts.reserved == cset.geometry.first_bucket + len(cset.journal.buckets)
    assert counts.dirty + counts.open >= 2
    assert snapshot.map is not None
    assert len(snapshot.map.states) == 64
    assert set(snapshot.map.states) <= set(MAP_STATES)
    assert [(fifo.name, fifo.used, fifo.size) for fifo in snapshot.allocator.reserves] == [
        (name, len(free), free.size)
        for name, free in zip(("BTREE", "PRIO", "MOVINGGC", "NONE"), cset.alloc.free, strict=True)]
    volume = snapshot.volumes[0]
    assert (volume.name, volume.kind, volume.state, volume.mode) == ("bcache0", "cached", "dirty", "writeback")
    assert volume.dirty_sectors == 16
    assert volume.requests is not None
    assert (volume.requests.reads, volume.requests.writes, volume.requests.written_sectors) == (2, 1, 16)
    total = volume.windows[0]
    assert (total.name, total.hits, total.misses, total.hit_ratio_percent) == ("total", 1, 1, 50)
    assert snapshot.allocator.counters is not None
    assert snapshot.allocator.counters.allocations == cset.alloc.allocations
    assert snapshot.events[-1].serial == cset.events.serial
    assert snapshot.failed is None


def test_looking_changes_nothing(w: World) -> None:
    state = w.cset.entropy.getstate()
    first = w.cset.snapshot(100)
    assert w.cset.snapshot(100) == first
    assert w.cset.entropy.getstate() == state


def test_the_windows_of_a_running_set(w: World) -> None:
    async def story() -> None:
        await w.read(0, 0, 8, nowait=False)
        await w.sleep(100)
        for _ in range(31):
            await w.read(0, 0, 8, nowait=False)
        await w.sched.sleep_until(w.sched.now_ns + TICK_NS + 1)

    w.run(story())
    shown = {window.name: window for window in w.cset.snapshot(0).volumes[0].windows}
    assert shown["total"].hits == 31
    assert shown["day"].hits == 31
    # 31 hits less a 32nd, and one miss less a 32nd, rounded down.
    assert (shown["five_minute"].hits, shown["five_minute"].misses) == (30, 0)


def test_a_failed_set_says_so(w: World) -> None:
    w.cset.fail("made up")
    assert w.cset.snapshot(10).failed == "made up"
