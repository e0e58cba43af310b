# SPDX-License-Identifier: GPL-2.0-only
"""The still picture of a device against the running set that left it there."""

from __future__ import annotations

import dataclasses

import pytest

from bcachectl.errors import Corrupt, WrongState
from bcachectl.fsck.still import Still
from tests.sim.world import SECTOR, Backing, Setup, World


def still_of(image: bytes | bytearray) -> Still:
    return Still("cache.img", lambda sector, count: bytes(image[sector * SECTOR:(sector + count) * SECTOR]),
                 len(image) // SECTOR)


@pytest.fixture(scope="module")
def w() -> World:
    world = World(Setup(backings=(Backing(), Backing(mode="writethrough"))), "still")
    world.run(world.up(), "up")

    async def story() -> None:
        await world.tune("bcache0", "writeback_running", "0")
        for index in range(60):
            await world.write(0, 16 * index, 8, fua=True)
            await world.write(1, 8 * index, 8)
        await world.flash_create(100, 64)
        await world.write(100, 0, 32, fua=True)
        await world.sleep(1000)
        await world.cset.stop()

    world.run(story())
    return world


def test_what_is_dirty_and_where_it_lies(w: World) -> None:
    running, still = w.cset.snapshot(100), still_of(w.disks[0].now).snapshot(100)
    assert still.source == "offline"
    assert still.damages == 0
    assert still.uuid == running.uuid
    ours = {volume.slot: (volume.kind, volume.dirty_sectors) for volume in running.volumes}
    assert {volume.slot: (volume.kind, volume.dirty_sectors) for volume in still.volumes} == ours
    assert ours[0] == ("cached", 480)
    assert ours[1] == ("cached", 0)
    assert ours[2] == ("flash", 32)
    # A stop leaves no bucket open or on a list; what was is unused or holds what it was filled with.
    there, here = running.allocator.counts, still.allocator.counts
    assert (here.free, here.open) == (0, 0)
    assert here.reserved == there.reserved
    assert here.dirty >= there.dirty
    assert sum(dataclasses.astuple(here)) == sum(dataclasses.astuple(there))
    assert still.map is not None
    assert len(still.map.states) == 100
    assert still.journal is not None
    assert running.journal is not None
    assert still.journal.njournal == running.journal.njournal
    assert still.btree is not None
    assert still.btree.depth == w.cset.btree.root.level
    assert still.allocator.prio is not None
    assert still.allocator.gens is not None
    assert still.allocator.gens.max < 5


def test_a_map_of_any_size_from_one_walk(w: World) -> None:
    still = still_of(w.disks[0].now)
    for cells in (0, 7, 600, 5000):
        found = still.snapshot(cells).map
        assert (found is None) == (cells == 0)
        if found is not None:
            assert len(found.states) == min(cells, 600)


def test_damage_is_counted_and_shown(w: World) -> None:
    image = bytearray(w.disks[0].now)
    root = w.cset.btree.root
    node = root if not root.level else next(node for node in w.cset.btree.nodes() if not node.level)
    image[node.sector * SECTOR + 40] ^= 0xFF
    found = still_of(image).snapshot(0)
    assert found.damages == 1
    assert "bad checksum" in found.events[0].detail


def test_what_is_no_cache_of_a_set(w: World) -> None:
    with pytest.raises(WrongState, match="is a backing device"):
        still_of(w.disks[1].now)
    with pytest.raises(Corrupt):
        still_of(bytes(1 << 20))
    with pytest.raises(WrongState, match="no set has used yet"):
        still_of(World(Setup(), "fresh").disks[0].now)
