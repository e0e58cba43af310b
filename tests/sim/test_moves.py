# SPDX-License-Identifier: GPL-2.0-only
"""Moving gc beside an operation that waits between journal and btree: docs/decisions/0028."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bcachectl.engine.alloc import NO_BUCKET, Reserve
from bcachectl.engine.node import Extent, Node
from bcachectl.engine.split import Splitter
from tests.sim.world import Backing, Setup, World

SETUP = Setup(nbuckets=700, bucket_sectors=16, settles=False, backings=(Backing(data_sectors=6000),))
SPARSE = 10
"""The sector that will be alone in its bucket."""


class Scene:
    """A set with several leaves, one of which is full while the buckets for splits are used up."""

    def __init__(self, seed: str, patch: pytest.MonkeyPatch) -> None:
        self.world = World(SETUP, seed)
        self.is_short = False
        has_reserve = Splitter.has_reserve
        patch.setattr(Splitter, "has_reserve", lambda splitter, level, extra=0: (
            not self.is_short and has_reserve(splitter, level, extra)))

    def extent(self, sector: int) -> Extent:
        """The key of a sector, as memory has it."""
        dev: Any = self.world.volumes[0]
        position = dev.base + dev.data_offset + sector
        leaf: Node = self.world.cset.btree.leaf_nowait(position)
        [found] = leaf.overlapping(position, position + 1)
        return found

    def bucket(self, sector: int) -> int:
        """Where its data is."""
        return int(self.world.cset.buckets.bucket_of(self.extent(sector).ptr))

    async def set_up(self, *, shares: bool = False) -> None:
        """Up to the moment when a write waits for a split; its journal entry has the key of `SPARSE` too.  With
        ``shares`` a sparse bucket has something of the full leaf as well.
        """
        w, cset = self.world, self.world.cset
        await w.up()
        for target, name, text in (("bcache0", "sequential_cutoff", "0"), ("bcache0", "writeback_running", "0"),
                                   ("", "copy_gc_enabled", "1")):
            await w.tune(target, name, text)
        sectors = list(range(1000, 3000, 2))
        random.Random(1).shuffle(sectors)
        for first in range(0, len(sectors), 8):
            await w.together(*[w.write(0, sector, 1, sync=True, quick=False) for sector in sectors[first:first + 8]])
        await w.cset.run_gc()
        # A bucket that has just been opened.
        filler = 401
        await w.write(0, 400, 1, quick=False, stream=77)
        await w.write(0, filler, 1, quick=False, stream=77)
        while self.bucket(filler) == self.bucket(filler - 1):
            filler += 1
            await w.write(0, filler, 1, quick=False, stream=77)
        for sector in range(2041, 2061, 2) if shares else ():
            # One of them does not happen to go on where something else ends.
            await w.write(0, sector, 1, quick=False, stream=77)
            if self.bucket(sector) == self.bucket(filler):
                break
        else:
            assert not shares
        dev: Any = w.volumes[0]
        full = await cset.btree.leaf(dev.base + 2016)
        times = 0
        while full.has_room(3, cset.geometry):
            await w.write(0, 2001 + 2 * (times % 20), 1, fua=True, quick=False)
            await cset.btree.write_leaf(full)
            times += 1
        assert not full.gone
        assert full is await cset.btree.leaf(dev.base + 2016 + 61)
        self.is_short = True
        await w.write(0, SPARSE, 1, quick=False, stream=77)
        seq = cset.journal.seq
        assert shares or self.bucket(SPARSE) == self.bucket(filler)
        self.waiting = w.sched.spawn(w.write(0, 2001, 1, fua=True, quick=False), "waits for a split")
        self.waiting.observed = True
        await w.sleep(1)
        assert len(cset.alloc.bucket_wait) == 1
        assert cset.journal.pins[-1].count >= 2
        assert cset.journal.seq == seq
        await w.flush(0)
        for stream in (77, 79):
            # The first fills the bucket up, the second makes that obsolete.
            for sector in (filler, *range(100, 130)):
                await w.write(0, sector, 1, quick=False, stream=stream)

    async def go_on(self) -> None:
        """There are buckets again, and the write ends."""
        self.is_short = False
        self.world.cset.alloc.bucket_wait.wake_all()
        await self.waiting

    async def move(self) -> None:
        """Two gcs: moving gc follows the first."""
        before = self.bucket(SPARSE)
        await self.world.cset.run_gc()
        await self.world.sleep(100)
        assert self.bucket(SPARSE) != before, "it was not moved"
        assert not self.waiting.done
        await self.world.cset.run_gc()


def test_moving_gc_does_not_wait_for_buckets_that_gc_has_to_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves into a full leaf; if they waited for its split, no gc would ever run again."""
    scene = Scene("moves do not wait", monkeypatch)

    async def story() -> None:
        await scene.set_up(shares=True)
        cset = scene.world.cset
        await cset.run_gc()
        await scene.world.sleep(100)
        assert cset.movinggc.moved_keys
        assert not cset.movinggc.in_flight
        assert not scene.waiting.done
        await cset.run_gc()
        await scene.go_on()
        await scene.world.verify()
        await scene.world.cset.stop()

    scene.world.run(story())


def test_what_was_moved_outlives_its_old_place_in_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flushed write is moved, its old bucket is given out again, and power fails while the entry that names the old
    bucket is still held by the write that waits."""
    scene = Scene("moved", monkeypatch)
    w = scene.world

    async def story() -> None:
        await scene.set_up()
        cset = w.cset
        old = scene.bucket(SPARSE)
        gen = cset.buckets.gen_at[old]
        await scene.move()
        while cset.buckets.gen_at[old] == gen or old in cset.alloc.free_inc.buckets:
            taken = cset.alloc.alloc_nowait(Reserve.NONE)
            if taken == NO_BUCKET:
                await w.sleep(300)
            else:
                cset.buckets.mark_dirty(taken)
        assert not scene.waiting.done

    w.run(story())
    scene.is_short = False
    after = w.revive("moved, after", images=[bytearray(disk.now) for disk in w.disks])
    after.run(after.up())
    after.run(after.verify(everything=True))
    after.run(after.cset.stop())
    w.run(scene.go_on())


def test_a_move_leaves_a_write_that_is_under_way_alone() -> None:
    """Its key may be in the journal already; that of a move, which has older data, must not come after it."""
    w = World(Setup(settles=False), "move and write")

    async def story() -> None:
        await w.up()
        await w.tune("bcache0", "writeback_running", "0")
        await w.write(0, 64, 8, fua=True)
        dev: Any = w.volumes[0]
        position = dev.base + dev.data_offset + 64
        [old] = w.cset.btree.leaf_nowait(position).overlapping(position, position + 8)
        piece = w.cset.sectors.alloc_nowait(position, 8, write_point=0, flash=False)
        assert piece is not None
        claim = await dev.ranges.enter(dev.data_offset + 70, dev.data_offset + 71)
        assert await w.cset.btree.replace(old, old._replace(ptr=piece.ptr), is_move=True) == 0
        dev.ranges.leave(claim)
        seq = w.cset.journal.seq
        assert await w.cset.btree.replace(old, old._replace(ptr=piece.ptr), is_move=True) == 8
        assert len(w.cset.journal.keys) == 24
        assert w.cset.journal.seq == seq

    w.run(story())


def test_nothing_moves_before_the_replay_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer keys of what would move may not be in the map yet, and their entries are older than that of the move."""
    scene = Scene("moves and replay", monkeypatch)

    async def story() -> None:
        await scene.set_up()
        cset = scene.world.cset
        cset.running = False
        await cset.run_gc()
        await scene.world.sleep(100)
        assert not cset.movinggc.moved_keys
        cset.running = True
        await scene.move()
        await scene.go_on()
        await cset.stop()

    scene.world.run(story())
