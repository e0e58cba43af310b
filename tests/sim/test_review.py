# SPDX-License-Identifier: GPL-2.0-only
"""What reviews of the core found: races that need one Io to be slow, and errors that must not be the end.

Each test makes exactly the Ios slow, or fail, that its story needs; what it would look like otherwise is in its
docstring.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from errno import EIO, EROFS
from typing import Any

import pytest

from bcachectl.engine import stripes
from bcachectl.engine.btree import Btree
from bcachectl.engine.node import DIRTY, Node
from bcachectl.engine.prios import PrioWriter
from bcachectl.engine.sched import FLUSH, NS_PER_MS, READ, WRITE, Io
from bcachectl.errors import BcachectlError, WrongState
from bcachectl.ondisk.superblock import (
    SB_BYTES,
    SB_SECTOR,
    BdevState,
    CacheMode,
    Superblock,
    decode_superblock,
    encode_superblock,
)
from tests.sim.disk import SECTOR
from tests.sim.power import drain
from tests.sim.world import FLASH, Backing, Setup, World

SLOW_NS = 500 * NS_PER_MS
ONE_CACHED = Setup(settles=False)
SMALL_NODE_CACHE = Setup(nbuckets=1200, settles=False, backings=(Backing(data_sectors=4000),),
                         options={"node_cache_bytes": 3 * 4096})


def up(setup: Setup, seed: str) -> World:
    world = World(setup, seed)
    world.run(world.up(), "up")
    return world


def slow(wanted: Callable[[Io], bool]) -> Callable[[Io], int | None]:
    return lambda io: SLOW_NS if wanted(io) else None


def fail_next(world: World, device: int, wanted: Callable[[Io], bool]) -> None:
    """The next Io of a device that is wanted fails."""
    pending = [wanted]

    def on_io(io: Io) -> None:
        if io.device == device and pending and pending[0](io):
            pending.pop()
            world.disks[device].fail_ios[world.disks[device].serial + 1] = EIO

    world.on_io = on_io


def stop_while_dirty(world: World) -> None:
    """Eight sectors of the first device stay dirty when the set stops."""
    async def story() -> None:
        await world.tune("bcache0", "writeback_running", "0")
        await world.write(0, 0, 8, fua=True)
        await world.cset.stop()

    world.run(story())
    drain(world)


def with_superblock(world: World, device: int, change: Callable[[Superblock], Superblock]) -> list[bytearray]:
    """What the disks hold, with another superblock on one of them."""
    images = [bytearray(disk.now) for disk in world.disks]
    at = slice(SB_SECTOR * SECTOR, SB_SECTOR * SECTOR + SB_BYTES)
    raw = bytes(images[device][at])
    images[device][at] = encode_superblock(change(decode_superblock(raw)), raw)
    return images


async def refused(coro: Any) -> str:
    """Await what may be refused; the text."""
    try:
        await coro
    except BcachectlError as error:
        return str(error)
    return ""


async def many_leaves(world: World) -> list[Node | None]:
    """Scatter keys until there are several leaves, all of them written; the root's children."""
    sectors = list(range(0, 1600, 2))
    random.Random(1).shuffle(sectors)
    for first in range(0, len(sectors), 8):
        await world.together(*[world.write(0, sector, 1, sync=True) for sector in sectors[first:first + 8]])
    await world.flush(0)
    await world.cset.btree.flush_all()
    children: list[Node | None] = world.cset.btree.root.children
    assert len(children) > 4
    return children


def drop(btree: Btree, index: int) -> None:
    """Evict a leaf that is clean."""
    leaf = btree.root.children[index]
    if leaf is not None:
        btree.root.children[index] = None
        btree.forget(leaf)


def test_a_write_during_a_long_lookup_is_not_overwritten_by_the_fill() -> None:
    """A read over two leaves waits for the second; a FUA write to the first comes and goes.  The fill of the gap that
    the read saw there would lay old data over it."""
    w = up(SMALL_NODE_CACHE, "long lookup")

    async def story() -> None:
        await w.tune("bcache0", "sequential_cutoff", "0")
        await w.tune("bcache0", "writeback_running", "0")
        await many_leaves(w)
        btree = w.cset.btree
        tried = 0
        for index in range(len(btree.root.ends) - 1):
            gap = (btree.root.ends[index] & ((1 << 44) - 1)) - 16 - 1 | 1
            gap -= 2
            await w.read(0, gap - 1, 1, nowait=False)
            drop(btree, index + 1)
            if btree.root.children[index] is None:
                continue
            tried += 1
            w.delay = slow(lambda io: io.what == "btree" and io.op == READ)

            async def write(sector: int = gap) -> None:
                await w.sleep(1)
                await w.write(0, sector, 1, fua=True)

            await w.together(w.read(0, gap, 16, nowait=False), write())
            w.delay = None
            await w.sleep(200)
            await w.read(0, gap, 1, nowait=False)
        assert tried

    w.run(story())


def test_a_write_that_waits_its_turn_while_the_device_is_detached() -> None:
    """It must not go to the cache, where nobody would look for it, nor say DIRTY in a superblock without a set."""
    w = up(ONE_CACHED, "detach meanwhile")

    async def story() -> None:
        await w.tune("bcache0", "sequential_cutoff", "0")
        await w.tune("bcache0", "cache_mode", "none")
        w.delay = slow(lambda io: io.device == 1 and io.what == "data")

        async def second() -> None:
            await w.sleep(1)
            await w.write(0, 0, 16)

        async def detach() -> None:
            await w.sleep(2)
            dev = w.cset.devices[0]
            dev.sb = dev.sb.with_cache_mode(CacheMode.WRITEBACK)
            dev.cache_mode = CacheMode.WRITEBACK
            await w.cset.detach("bcache0")

        await w.together(w.write(0, 0, 8), second(), detach())
        w.delay = None
        await w.sleep(1000)
        await w.read(0, 0, 16)

    w.run(story())
    assert w.superblock(0).state == BdevState.NONE


@pytest.mark.parametrize("nth", [1, 2])
def test_a_detach_that_fails_leaves_a_device_that_works(nth: int) -> None:
    """Both writes of the superblock may fail: the device stays attached, is written back, and can be detached later."""
    w = up(ONE_CACHED, f"failed detach {nth}")
    w.is_calm = False

    async def story() -> None:
        dev = w.cset.devices[0]
        set_uuid = dev.sb.set_uuid
        await w.write(0, 0, 8, fua=True)
        await w.cset.flush_volume("bcache0")
        seen: list[Io] = []

        def wanted(io: Io) -> bool:
            if io.what == "backing superblock":
                seen.append(io)
            return len(seen) == nth

        fail_next(w, 1, wanted)
        assert "could not be detached" in await refused(w.cset.detach("bcache0"))
        assert dev.attached
        assert dev.sb.set_uuid == set_uuid
        await w.write(0, 8, 8, fua=True)
        assert w.superblock(0).state == BdevState.DIRTY
        assert w.superblock(0).set_uuid == set_uuid
        await w.cset.flush_volume("bcache0")
        assert w.superblock(0).state == BdevState.CLEAN
        await w.write(0, 16, 8, fua=True)

    w.run(story())
    w.run(w.cset.stop())
    drain(w)
    again = w.revive("failed detach, again")
    again.run(again.up())
    again.run(again.verify(everything=True))
    again.run(again.cset.detach("bcache0"))
    again.run(again.verify(everything=True))


def test_a_replayed_key_whose_bucket_was_reused_is_not_dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its journal entry outlived its bucket.  Counted as dirty, it would keep the device dirty for ever."""
    w = up(ONE_CACHED, "stale replay")

    async def write() -> None:
        await w.tune("bcache0", "writeback_running", "0")
        await w.write(0, 100, 8, fua=True)

    w.run(write())
    dev = w.cset.devices[0]
    leaf = w.cset.btree.leaf_nowait(dev.base + 116)
    assert leaf is not None
    [extent] = leaf.overlapping(dev.base + 116, dev.base + 124)
    reused = w.cset.buckets.bucket_of(extent.ptr)
    read = PrioWriter.read

    async def read_newer(self: PrioWriter, first: int) -> None:
        await read(self, first)
        self.cset.buckets.gen_at[reused] += 1 + (extent.ptr & 255) - self.cset.buckets.gen_at[reused]

    monkeypatch.setattr(PrioWriter, "read", read_newer)
    after = World(w.setup, "stale replay, after", images=[bytearray(disk.now) for disk in w.disks])
    after.run(after.up())
    dev = after.cset.devices[0]
    assert dev.dirty_sectors == 0
    assert not any(meta & DIRTY for node in after.cset.btree.nodes() for meta in node.meta)
    after.run(after.cset.flush_volume("bcache0"))
    assert after.superblock(0).state == BdevState.CLEAN
    after.run(after.cset.detach("bcache0"))


def test_gc_writes_what_became_pending_during_a_write_of_the_leaf() -> None:
    """Keys that are not journaled, of moves above all, must be on disk before the marks of a gc count."""
    w = up(replace(ONE_CACHED, backings=(Backing(mode="writethrough"),)), "pending during write")

    async def story() -> None:
        await w.tune("bcache0", "sequential_cutoff", "0")
        await w.write(0, 0, 8, fua=True)
        leaf = w.cset.btree.root
        w.delay = slow(lambda io: io.what == "btree" and io.op == WRITE)
        writing = w.sched.spawn(w.cset.btree.write_leaf(leaf), "write leaf")
        await w.sleep(1)
        assert leaf.writing
        await w.read(0, 200, 8, nowait=False)
        await w.sleep(20)
        assert leaf.pending_words, "the fill did not come in time"
        await w.cset.run_gc()
        assert not leaf.pending_words
        assert writing.done

    w.run(story())


def test_a_preflush_that_the_backing_device_fails_is_reported() -> None:
    w = up(ONE_CACHED, "failed preflush")
    w.is_calm = False

    async def story() -> None:
        await w.write(0, 0, 8, fua=True)
        fail_next(w, 1, lambda io: io.op == FLUSH)
        assert await w.write(0, 8, 8, preflush=True) == EIO
        assert await w.write(0, 8, 8, preflush=True) == 0

    w.run(story())


def test_two_attaches_at_once() -> None:
    """The second must not retire the slot that the first has just given out."""
    w = up(Setup(backings=(Backing(member=False),), settles=False), "two attaches")

    async def story() -> None:
        answers = await w.together(refused(w.cset.attach("bcache0")), refused(w.cset.attach("bcache0")))
        assert sorted(bool(answer) for answer in answers) == [False, True]
        assert w.cset.devices[0].slot == 0
        await w.write(0, 0, 8, fua=True)

    w.run(story())
    assert sum(not entry.is_free for entry in w.cset.uuids) == 1


def test_two_changes_of_a_superblock_and_the_first_dirty_write() -> None:
    """Each change starts from what the one before it left; else the second would take DIRTY back."""
    w = up(ONE_CACHED, "superblock turns")
    w.delay = slow(lambda io: io.what == "backing superblock")

    async def later(milliseconds: int, coro: Any) -> None:
        await w.sleep(milliseconds)
        await coro

    async def story() -> None:
        await w.tune("bcache0", "writeback_running", "0")
        await w.together(w.tune("bcache0", "label", "x"), later(5, w.write(0, 0, 8, fua=True)),
                         later(10, w.tune("bcache0", "cache_mode", "writethrough")))

    w.run(story())
    assert w.superblock(0).state == BdevState.DIRTY
    assert w.superblock(0).label_text == "x"
    assert w.superblock(0).cache_mode == CacheMode.WRITETHROUGH


def test_a_backing_superblock_says_when_its_run_began() -> None:
    """As the kernel has it; so it is never later than what the uuid array says of the device."""
    w = up(ONE_CACHED, "last_mount")
    began_s = w.sched.wall_s

    async def story() -> None:
        await w.tune("bcache0", "writeback_running", "0")
        await w.sleep(90_000)
        await w.write(0, 1000, 16, fua=True)

    w.run(story())
    assert w.sched.wall_s >= began_s + 90
    assert w.superblock(0).state == BdevState.DIRTY
    assert w.superblock(0).last_mount <= began_s
    assert w.superblock(0).last_mount <= w.cset.uuids[0].last_reg


@pytest.mark.parametrize("end", [1000, 1008])
def test_a_backing_device_smaller_than_its_dirty_data_is_refused(end: int) -> None:
    w = up(ONE_CACHED, "truncated")

    async def story() -> None:
        await w.tune("bcache0", "writeback_running", "0")
        await w.write(0, 1000, 16, fua=True)
        await w.cset.stop()

    w.run(story())
    images = [bytearray(disk.now) for disk in w.disks]
    images[1] = images[1][:(16 + end) * SECTOR]
    after = World(w.setup, "truncated, after", images=images)
    with pytest.raises(WrongState, match="smaller than the dirty data"):
        after.run(after.up())


def test_a_leaf_that_cannot_be_read_fails_the_set_and_nothing_else() -> None:
    w = up(SMALL_NODE_CACHE, "unreadable leaf")
    w.is_calm = False

    async def story() -> None:
        await many_leaves(w)
        btree = w.cset.btree
        for index in range(len(btree.root.children)):
            drop(btree, index)
        fail_next(w, 0, lambda io: io.what == "btree" and io.op == READ)
        answers = [await w.read(0, sector, 1, nowait=False) for sector in range(0, 1600, 100)]
        assert set(answers) <= {0, EIO}
        assert "io error reading bucket: Input/output error" in w.cset.failed
        await w.cset.stop()

    w.run(story())


def test_a_stop_after_writeback_met_a_bad_leaf() -> None:
    """What was in flight when the set failed must not keep a stop from ending."""
    w = up(SMALL_NODE_CACHE, "bad leaf in writeback")
    w.is_calm = False

    async def story() -> None:
        await w.tune("bcache0", "writeback_running", "0")
        await many_leaves(w)
        btree = w.cset.btree

        def on_io(io: Io) -> None:
            # The leaves leave memory while the data is copied, and none can be read again.
            if io.device == 1 and io.op == FLUSH:
                for index, leaf in enumerate(btree.root.children):
                    if leaf is not None and not leaf.pending_words and not leaf.writing:
                        drop(btree, index)
            if io.device == 0 and io.what == "btree" and io.op == READ:
                w.disks[0].fail_ios[w.disks[0].serial + 1] = EIO

        w.on_io = on_io
        assert await refused(w.cset.flush_volume("bcache0"))
        assert w.cset.failed
        await w.cset.stop()

    w.run(story())


def test_a_write_larger_than_the_free_space_replaces_what_it_overwrites() -> None:
    """All of it together finds no room, since what it replaces would make some; so it has to go in by and by."""
    w = up(Setup(backings=()), "large overwrite")

    async def story() -> None:
        await w.flash_create(FLASH, 3000)
        for sector in range(0, 3000, 100):
            await w.write(FLASH, sector, 100)
        for _ in range(2):
            await w.write(FLASH, 0, 2000, fua=True)
        await w.read(FLASH, 0, 2000)

    w.run(story())


def test_write_back_waits_for_the_journal() -> None:
    """A key that only memory has is written back, and power fails: the cache still has an older clean copy, which is
    read until it is dropped, and then the newer data appears that nobody had flushed."""
    world = up(Setup(), "unjournaled")
    seen: list[tuple[int, int]] = []

    def on_io(io: Io) -> None:
        if io.op == WRITE and io.what == "writeback":
            journal = world.cset.journal
            seen.append((len(journal.keys), journal.seq - 1 - journal.written_seq))

    async def story(w: World) -> None:
        await w.tune("", "journal_delay_ms", "5000")
        await w.write(0, 64, 8, fua=True, quick=False)
        await w.cset.flush_volume("bcache0")
        world.on_io = on_io
        await w.write(0, 64, 8, quick=False)
        await w.cset.flush_volume("bcache0")

    world.run(story(world))
    assert seen == [(0, 0)], "keys in memory only, and entries on their way, when the data was written back"


def test_what_is_dirty_in_a_leaf_that_has_left_memory_is_written_back() -> None:
    """A pass over more leaves than memory holds finds one dirty key, and forgets its leaf on the way to the end.  Each
    pass would do the same, and a flush or a detach never end."""
    w = up(SMALL_NODE_CACHE, "forgotten leaf")

    async def story() -> None:
        await many_leaves(w)
        await w.cset.flush_volume("bcache0")
        await w.write(0, 0, 1, fua=True)
        btree = w.cset.btree
        await btree.flush_all()
        for index in range(1, len(btree.root.children)):
            drop(btree, index)
        begun_ns = w.sched.now_ns
        await w.cset.flush_volume("bcache0")
        assert w.sched.now_ns - begun_ns < SLOW_NS
        await w.cset.detach("bcache0")

    w.run(story())
    assert w.superblock(0).state == BdevState.NONE
    w.check_backings_alone("after the detach")


def test_write_back_that_waits_for_the_journal_does_not_begin_after_a_stop() -> None:
    """The stop itself writes the entry that it waits for; what it began then would still be under way afterwards."""
    w = up(ONE_CACHED, "stopped while waiting")
    begun: list[str] = []

    async def story() -> None:
        await w.tune("", "journal_delay_ms", "5000")
        await w.tune("bcache0", "writeback_running", "0")
        await w.write(0, 64, 8, fua=True, quick=False)
        await w.write(0, 96, 8, quick=False)
        w.delay = slow(lambda io: io.what == "journal")
        await w.tune("bcache0", "writeback_running", "1")
        await w.sleep(100)
        assert len(w.cset.journal.written), "nobody waits"
        w.on_io = lambda io: begun.append(io.what)
        await w.cset.stop()

    w.run(story())
    assert "journal" in begun
    assert "writeback" not in begun


def test_a_write_through_is_over_before_it_is_served_again() -> None:
    """Its leaf cannot be read, so it is written once more, without the cache, and answered.  The first attempt must
    not arrive on the backing device after that: a later write may be there by then."""
    w = up(replace(SMALL_NODE_CACHE, backings=(Backing(data_sectors=4000, mode="writethrough"),)), "through twice")
    w.is_calm = False

    async def story() -> None:
        await w.tune("bcache0", "sequential_cutoff", "0")
        await many_leaves(w)
        btree = w.cset.btree
        for index in range(len(btree.root.children)):
            drop(btree, index)
        fail_next(w, 0, lambda io: io.what == "btree" and io.op == READ)
        writes: list[Io] = []

        def delay(io: Io) -> int | None:
            if io.device == 1 and io.op == WRITE and io.what == "data":
                writes.append(io)
            return SLOW_NS if writes == [io] else None

        w.delay = delay
        assert await w.write(0, 100, 1, quick=False) == 0
        assert w.cset.failed
        assert await w.write(0, 100, 1, quick=False) == 0
        assert len(writes) == 3
        await w.sleep(1000)
        await w.read(0, 100, 1, nowait=False)

    w.run(story())


def test_a_write_that_waits_while_its_device_is_attached_meets_a_bad_leaf() -> None:
    """The set fails, and the write goes to the backing device: the engine must not end."""
    w = up(replace(SMALL_NODE_CACHE, backings=(Backing(data_sectors=4000), Backing(member=False))), "attached in vain")
    w.is_calm = False

    async def story() -> None:
        await w.tune("bcache0", "writeback_running", "0")
        await many_leaves(w)
        await w.tune("bcache1", "cache_mode", "writethrough")
        w.delay = slow(lambda io: io.device == 2 and io.what == "data")

        async def second() -> None:
            await w.sleep(1)
            assert await w.write(1, 0, 16, quick=False) == 0

        async def attach() -> None:
            await w.sleep(2)
            await w.cset.attach("bcache1")
            btree = w.cset.btree
            await w.sleep(400)
            await btree.flush_all()
            assert not w.cset.failed
            for index in range(len(btree.root.children)):
                drop(btree, index)
            fail_next(w, 0, lambda io: io.what == "btree" and io.op == READ)

        await w.together(w.write(1, 0, 8, quick=False), second(), attach())
        assert w.cset.failed
        assert not w.cset.devices[1].attached
        await w.read(1, 0, 16)

    w.run(story())


def test_a_bad_leaf_while_stripes_are_counted_fails_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the engine goes on with the devices that have nothing dirty."""
    monkeypatch.setattr(stripes, "STRIPE_MIN_SECTORS", 64)
    w = up(replace(SMALL_NODE_CACHE, backings=(Backing(data_sectors=4000, raid_stripe_sectors=64),)), "bad stripes")
    w.run(many_leaves(w))
    w.run(w.cset.flush_volume("bcache0"))
    w.run(w.cset.stop())
    drain(w)
    again = w.revive("bad stripes, again")
    again.is_calm = False

    async def story() -> None:
        await again.up()
        btree = again.cset.btree
        for index, leaf in enumerate(btree.root.children):
            if leaf is not None and not leaf.pending_words:
                drop(btree, index)
        fail_next(again, 0, lambda io: io.what == "btree" and io.op == READ)
        await again.sleep(1000)
        assert "io error reading bucket: Input/output error" in again.cset.failed
        await again.read(0, 0, 8)
        await again.cset.stop()

    again.run(story())


def test_a_set_that_fails_while_a_device_is_attached_leaves_it_without_a_cache() -> None:
    """Otherwise it would be attached to a dead set, and its requests wait for ever for what was done before."""
    w = up(Setup(backings=(Backing(data_sectors=4000),)), "attached to a failing set")
    w.is_calm = False

    async def story() -> None:
        await w.cset.detach("bcache0")
        await w.write(0, 0, 16, quick=False)
        w.delay = slow(lambda io: io.what == "backing superblock")

        async def attach() -> None:
            assert "failed: meanwhile" in await refused(w.cset.attach("bcache0"))

        async def fail() -> None:
            await w.sleep(100)
            w.cset.fail("meanwhile")

        await w.together(attach(), fail())
        dev = w.cset.devices[0]
        assert not dev.attached
        assert dev.sb.state == BdevState.NONE
        await w.write(0, 4, 8, quick=False)
        await w.read(0, 0, 16)

    w.run(story())


def test_what_is_dirty_in_a_set_of_the_old_large_buckets_is_written_back() -> None:
    """Clients may only read such a set, but its dirty data has to get out of it.  A flush, or a detach, waited for
    ever."""
    w = up(ONE_CACHED, "old buckets")

    stop_while_dirty(w)
    images = with_superblock(w, 0, lambda sb: replace(sb, version=5, feature_incompat=1))
    after = World(w.setup, "old buckets, after", images=images, oracle=w.oracle)
    after.run(after.up())
    after.is_calm = False
    assert after.run(after.write(0, 8, 8)) == EROFS
    after.run(after.cset.flush_volume("bcache0"))
    assert after.superblock(0).state == BdevState.CLEAN
    after.run(after.cset.detach("bcache0"))
    after.run(after.verify(everything=True))
    after.check_backings_alone("after the detach")


@pytest.mark.parametrize("what", ["journal", "uuids", "btree"])
def test_a_volume_whose_removal_fails_is_not_said_to_be_removed(what: str) -> None:
    """The set fails half-way; the next start may find the volume."""
    w = up(replace(SMALL_NODE_CACHE, backings=()), f"removal {what}")
    w.is_calm = False

    async def story() -> None:
        await w.flash_create(FLASH, 2000)
        sectors = list(range(0, 1600, 2))
        random.Random(1).shuffle(sectors)
        for first in range(0, len(sectors), 8):
            await w.together(*[w.write(FLASH, sector, 1) for sector in sectors[first:first + 8]])
        await w.flush(FLASH)
        btree = w.cset.btree
        await btree.flush_all()
        for index in range(len(btree.root.children)):
            drop(btree, index)
        fail_next(w, 0, lambda io: io.what == what)
        assert "is not removed" in await refused(w.flash_remove(FLASH))
        assert w.cset.failed
        await w.cset.stop()

    w.run(story())


def test_a_set_that_fails_while_a_device_that_says_clean_becomes_dirty() -> None:
    """Power may have failed before its superblock said so; now it is registered, and nobody else knows of it yet.  It
    would stay attached, and its requests wait for ever."""
    w = up(ONE_CACHED, "fails at dirty")

    stop_while_dirty(w)
    images = with_superblock(w, 1, lambda sb: sb.with_state(BdevState.CLEAN))
    again = World(w.setup, "fails at dirty, again", images=images, oracle=w.oracle)
    again.is_calm = False

    async def fail() -> None:
        await again.sleep(200)
        assert again.cset.running
        again.cset.fail("for the test")

    async def story() -> None:
        again.delay = slow(lambda io: io.what == "backing superblock")
        why, _ = await again.together(refused(again.up()), fail())
        assert "for the test" in why
        assert not again.cset.devices

    again.run(story())
