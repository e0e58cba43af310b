# SPDX-License-Identifier: GPL-2.0-only
"""The stories that power loss and errors interrupt.  Each is small: a few hundred Ios on a cache of 4 KiB buckets.

With 512-byte blocks a node holds about 160 keys and eight sets, a journal bucket eight entries, and gc is due after
some 300 sectors, so everything that happens once a day on a real set happens within seconds here.
"""

from __future__ import annotations

import random
from collections.abc import Coroutine
from typing import Any

from bcachectl.engine.sched import READ
from bcachectl.ondisk.superblock import BdevState
from tests.sim.power import Story, mixed
from tests.sim.world import FLASH, Backing, Setup, World

WRITETHROUGH = Setup(backings=(Backing(mode="writethrough"),), settles=False)


def rng(w: World) -> random.Random:
    """The story's own choices."""
    return random.Random(f"story/{w.seed}")


async def scatter(w: World, volume: int, sectors: list[int], nsectors: int = 1, *, at_once: int = 4) -> None:
    """Write at each of ``sectors``, several at a time."""
    for index in range(0, len(sectors), at_once):
        await w.together(*[w.write(volume, sector, nsectors, sync=True) for sector in sectors[index:index + at_once]])


# 1. First attach.

async def first_attach(w: World) -> None:
    await w.up()
    await w.write(0, 0, 9, fua=True)
    await w.read(0, 100, 8)
    await w.write(0, 4, 3)
    await w.flush(0)
    await w.write(0, 40, 8)


async def attach_by_hand(w: World) -> None:
    await w.up()
    await w.write(0, 0, 8, fua=True)
    await w.write(0, 16, 8)
    await w.cset.attach("bcache0")
    await w.write(0, 4, 8, fua=True)
    await w.read(0, 0, 32)
    await w.write(0, 20, 8)
    await w.flush(0)


# 2. Overwrites in writeback, of all alignments, several at a time.

async def overwrite_prepare(w: World) -> None:
    await scatter(w, 0, list(range(0, 256, 8)), 8)
    await w.flush(0)


async def overwrite(w: World) -> None:
    dice = rng(w)
    for _ in range(14):
        asks = []
        for _ in range(3):
            nsectors = dice.randrange(1, 20)
            sector = dice.randrange(0, 256 - nsectors)
            asks.append(w.write(0, sector, nsectors, fua=dice.random() < 0.3, preflush=dice.random() < 0.1))
        if dice.random() < 0.3:
            asks.append(w.flush(0))
        await w.together(*asks)


# 3. Miss fills, raced by writes.

async def miss_fill(w: World) -> None:
    dice = rng(w)
    for _ in range(16):
        sector = dice.randrange(0, 300)
        asks = [w.read(0, sector, dice.randrange(1, 40))]
        if dice.random() < 0.7:
            there = max(0, sector + dice.randrange(-8, 30))
            asks.append(w.write(0, there, dice.randrange(1, 12), fua=dice.random() < 0.2))
        if dice.random() < 0.3:
            asks.append(w.read(0, sector + 5, 20))
        await w.together(*asks)
        await w.read(0, sector, 40)
    await w.flush(0)


# 4. Invalidation and reuse of buckets: more is written through than the cache holds.

async def reuse_prepare(w: World) -> None:
    # One at a time: what does not find a free bucket at once is not kept.
    await scatter(w, 0, list(range(0, 4800, 8)), 8, at_once=1)
    await w.flush(0)


async def reuse(w: World) -> None:
    dice = rng(w)
    for _ in range(20):
        asks = [w.write(0, dice.randrange(0, 740) * 8, 8, fua=dice.random() < 0.2) for _ in range(2)]
        asks.append(w.read(0, dice.randrange(0, 740) * 8, 16))
        await w.together(*asks)
    await w.flush(0)


async def gen_wrap_prepare(w: World) -> None:
    """Buckets that hold nothing were used 250 times before."""
    buckets = w.cset.buckets
    busy = set(w.cset.alloc.on_lists())
    for bucket in range(buckets.first_bucket, buckets.nbuckets):
        if bucket not in busy and buckets.mark_at[bucket] == 0 and buckets.pin_at[bucket] == 0:
            buckets.gen_at[bucket] = buckets.last_gc_at[bucket] = 250
    for _ in range(6):
        await scatter(w, 0, list(range(0, 4800, 8)), 8, at_once=2)
    await w.flush(0)


# 5. Prio writes: the chain has two sets, and free_inc is emptied again and again.

async def prio_write(w: World) -> None:
    for start in range(0, 800, 32):
        await scatter(w, 0, list(range(start, start + 32, 8)), 8)
    await w.flush(0)


# 6. The journal goes round.

async def journal_wrap(w: World) -> None:
    dice = rng(w)
    for _ in range(70):
        await w.write(0, dice.randrange(0, 64), 1, fua=True)


async def journal_batches(w: World) -> None:
    """Entries of several blocks, so that one that enters an old bucket can be torn."""
    dice = rng(w)
    for _ in range(40):
        await w.together(*[w.write(0, dice.randrange(0, 120) * 2, 1, fua=dice.random() < 0.05) for _ in range(24)])
        await w.flush(0)


# 7. Leaves fill up and are split; then the root is.

async def split_prepare(w: World) -> None:
    sectors = list(range(0, 200, 2))
    rng(w).shuffle(sectors)
    await scatter(w, 0, sectors, at_once=8)
    await w.flush(0)


async def split(w: World) -> None:
    sectors = list(range(200, 480, 2))
    rng(w).shuffle(sectors)
    await scatter(w, 0, sectors, at_once=6)
    await w.write(0, 1, 1, fua=True)


# 8. gc, with leaves to coalesce.

async def gc_prepare(w: World) -> None:
    sectors = list(range(0, 900, 2))
    rng(w).shuffle(sectors)
    await scatter(w, 0, sectors, at_once=8)
    await scatter(w, 0, list(range(0, 896, 16)), 16, at_once=8)
    await w.flush(0)


async def gc(w: World) -> None:
    async def traffic() -> None:
        dice = rng(w)
        for _ in range(8):
            await w.write(0, dice.randrange(0, 880), dice.randrange(1, 9), fua=dice.random() < 0.4)
            await w.read(0, dice.randrange(0, 880), 16)

    await w.together(w.cset.run_gc(), traffic())
    await w.cset.run_gc()
    await w.write(0, 3, 1, fua=True)


async def gc_slices(w: World) -> None:
    """gc walks a few keys at a time and puts a few marks in force at a time; writes split what it walks over, and
    enough is written for buckets to be invalidated meanwhile.
    """
    async def traffic() -> None:
        dice = rng(w)
        for _ in range(30):
            await w.together(w.write(0, dice.randrange(0, 1150), dice.randrange(1, 9), fua=dice.random() < 0.3),
                             w.write(0, dice.randrange(0, 280) * 4, 4, sync=True),
                             w.read(0, dice.randrange(0, 1150), 16))

    await w.tune("bcache0", "writeback_percent", "0")
    await w.tune("bcache0", "writeback_delay", "0")
    await w.together(w.cset.run_gc(), traffic())
    await w.together(w.cset.run_gc(), w.write(0, 3, 1, fua=True))


async def leaves_come_and_go_prepare(w: World) -> None:
    sectors = list(range(0, 1200, 2))
    rng(w).shuffle(sectors)
    await scatter(w, 0, sectors, at_once=8)
    await w.flush(0)


async def leaves_come_and_go(w: World) -> None:
    """Requests across leaves that have to be loaded, which takes long, with writes in between."""
    dice = rng(w)
    w.delay = lambda io: 20_000_000 if io.what == "btree" and io.op == READ else None
    base = w.cset.devices[0].base + w.cset.devices[0].data_offset
    for _ in range(30):
        ends = [end - base for end in w.cset.btree.root.ends if 0 < end - base < 1150]
        sector = max(0, dice.choice(ends) - dice.randrange(1, 20)) if ends else 0
        await w.read(0, max(0, sector - 2), 1, nowait=False)
        await w.together(w.read(0, sector, dice.randrange(8, 50), nowait=False),
                         w.write(0, sector + dice.randrange(0, 9), dice.randrange(1, 4), fua=True),
                         w.write(0, dice.randrange(0, 1150), dice.randrange(1, 60)),
                         w.read(0, dice.randrange(0, 1150), 40, nowait=False))
        await w.read(0, sector, 20, nowait=False)
    w.delay = None


async def rewriting_prepare(w: World) -> None:
    await w.tune("", "gc_always_rewrite", "1")
    await interior_prepare(w)


# 9. Moving gc empties sparse buckets.

async def moving_prepare(w: World) -> None:
    await w.tune("", "copy_gc_enabled", "1")
    await scatter(w, 0, list(range(0, 400, 8)), 8)
    for start in range(0, 400, 8):
        await w.write(0, start + 1, 6, sync=True)
    await w.flush(0)


async def moving_gc(w: World) -> None:
    for turn in range(3):
        await w.together(w.cset.run_gc(), w.write(0, turn * 16, 3, fua=True), w.read(0, 64, 32),
                         w.write(0, turn * 8 + 100, 4))
    await w.flush(0)


# 10. Write-back until clean, while writes go on.

async def writeback_prepare(w: World) -> None:
    await w.tune("bcache0", "writeback_running", "0")
    await scatter(w, 0, list(range(0, 300, 10)), 7)
    await w.flush(0)


async def wait_state(w: World, volume: int, *states: BdevState) -> None:
    """Until the backing superblock says one of ``states``."""
    for _ in range(600):
        if w.superblock(volume).state in states or w.cset.failed:
            return
        await w.sleep(200)
    assert not w.is_calm, f"the backing device stays {w.superblock(volume).state.name}"


async def writeback(w: World) -> None:
    await w.tune("bcache0", "writeback_delay", "0")
    await w.tune("bcache0", "writeback_percent", "0")
    await w.tune("bcache0", "writeback_running", "1")
    dice = rng(w)
    for _ in range(6):
        await w.together(w.write(0, dice.randrange(0, 300), dice.randrange(1, 9), fua=dice.random() < 0.5),
                         w.read(0, dice.randrange(0, 300), 8))
    await wait_state(w, 0, BdevState.CLEAN)
    await w.write(0, 11, 5, fua=True)


# 11. Detach, and attach again in the next slot.

async def detach(w: World) -> None:
    async def traffic() -> None:
        dice = rng(w)
        for _ in range(10):
            await w.write(0, dice.randrange(0, 300), dice.randrange(1, 9), fua=dice.random() < 0.5)
            await w.read(0, dice.randrange(0, 300), 8)

    await w.together(w.cset.detach("bcache0"), traffic())
    await wait_state(w, 0, BdevState.NONE)
    await w.write(0, 5, 20, fua=True)
    await w.cset.attach("bcache0")
    await w.write(0, 7, 3, fua=True)
    await w.read(0, 0, 64)


# 12. Mode changes.

async def modes(w: World) -> None:
    dice = rng(w)
    for mode in ("writeback", "writethrough", "writeback", "writearound", "none", "writeback", "writethrough"):
        await w.tune("bcache0", "cache_mode", mode)
        for _ in range(3):
            await w.together(w.write(0, dice.randrange(0, 120), dice.randrange(1, 17), fua=dice.random() < 0.3),
                             w.read(0, dice.randrange(0, 120), dice.randrange(1, 24)))
        await w.flush(0)


async def obsoletes(w: World) -> None:
    """Durable dirty data is overwritten past the cache, and the journal says so while the newer data is not durable."""
    dice = rng(w)
    await w.tune("bcache0", "writeback_running", "0")
    for mode in ("writethrough", "writearound", "none", "writethrough"):
        await w.tune("bcache0", "cache_mode", "writeback")
        for start in range(0, 64, 16):
            await w.write(0, start, 16, fua=True)
        await w.tune("bcache0", "cache_mode", mode)
        for _ in range(3):
            await w.write(0, dice.randrange(0, 56), dice.randrange(1, 9))
        await w.zeroes(0, dice.randrange(0, 56), dice.randrange(1, 9))
        await w.sleep(130)
        await w.read(0, 0, 64)


# 13. Flash-only volumes.

async def flash(w: World) -> None:
    await w.flash_create(FLASH, 256)
    await scatter(w, FLASH, list(range(0, 128, 16)), 13)
    await w.flush(FLASH)
    await w.discard(FLASH, 20, 30)
    await w.read(FLASH, 0, 64)
    await w.write(FLASH, 24, 5, fua=True)
    await w.flash_create(FLASH + 1, 64)
    await w.write(FLASH + 1, 0, 64, fua=True)
    await w.flash_remove(FLASH)
    await w.write(FLASH + 1, 10, 10)
    await w.flush(FLASH + 1)


# 14. Two backing devices and a flash-only volume.

async def cached_and_flash_prepare(w: World) -> None:
    await w.flash_create(FLASH, 600)


async def traffic(w: World) -> None:
    await mixed(w, rng(w), 50)


# 15. A clean stop.

async def stop(w: World) -> None:
    await w.cset.stop()


async def stop_busy(w: World) -> None:
    """A stop while requests, a gc and a detach are under way; what comes after it began may be refused."""
    dice = rng(w)
    busy = [w.write(0, dice.randrange(0, 250), dice.randrange(1, 40), fua=dice.random() < 0.3) for _ in range(6)]
    await w.together(*busy, w.read(0, 100, 60), w.cset.run_gc(), later_stop(w))


async def later_stop(w: World) -> None:
    await w.sleep(1)
    await w.cset.stop()


async def settings(w: World) -> None:
    """Everything that is kept in a superblock or in the uuid array is changed while writes go on."""
    async def change() -> None:
        for volume, name, text in (("bcache0", "label", "first"), ("", "cache_replacement_policy", "fifo"),
                                   ("bcache0", "cache_mode", "writethrough"), ("", "discard", "1"),
                                   ("bcache0", "label", "a label of exactly thirty-two byt"[:32]),
                                   ("bcache0", "cache_mode", "writeback"), ("", "cache_replacement_policy", "random")):
            await w.tune(volume, name, text)

    dice = rng(w)
    await w.together(change(), scatter(w, 0, [dice.randrange(0, 200) for _ in range(20)], 5, at_once=2))
    await w.flush(0)


async def idle(w: World) -> None:
    """Timers: the journal's 100 ms, the leaves' 30 s, the pauses of writeback."""
    dice = rng(w)
    for pause_ms in (10, 99, 101, 5000, 30_001, 31_000, 200):
        for _ in range(3):
            await w.write(0, dice.randrange(0, 200), dice.randrange(1, 9))
        await w.read(0, dice.randrange(0, 200), 16)
        await w.sleep(pause_ms)


# 16. Discards, of the client and of the allocator.

async def discards(w: World) -> None:
    dice = rng(w)
    for _ in range(14):
        await w.together(w.write(0, dice.randrange(0, 740) * 8, 8, fua=dice.random() < 0.3),
                         w.discard(0, dice.randrange(0, 5000), dice.randrange(1, 64)),
                         w.read(0, dice.randrange(0, 5000), 16))
    await w.flush(0)


# 17. Writes around the cache, against fills of the same place.

async def around(w: World) -> None:
    dice = rng(w)
    for _ in range(18):
        sector = dice.randrange(0, 150)
        await w.together(w.read(0, sector, dice.randrange(1, 32)),
                         w.write(0, sector + dice.randrange(0, 9), dice.randrange(1, 16), fua=dice.random() < 0.3),
                         w.read(0, sector, dice.randrange(1, 32)))
        await w.read(0, sector, 32)
    await w.flush(0)


TWO_BACKINGS = (Backing(), Backing(data_sectors=600, mode="writethrough", data_offset=64))
# 18. Many leaves, and interior nodes that fill up; sets of several blocks.

async def interior_prepare(w: World) -> None:
    await w.flash_create(FLASH, 4000)
    sectors = list(range(0, 2400, 2))
    rng(w).shuffle(sectors)
    await scatter(w, FLASH, sectors, at_once=8)
    await w.flush(FLASH)


async def interior(w: World) -> None:
    dice = rng(w)
    sectors = list(range(1, 2400, 5))
    dice.shuffle(sectors)
    for turn in range(4):
        await scatter(w, FLASH, sectors[turn * 40:turn * 40 + 40], at_once=5)
        await w.together(w.cset.run_gc(), w.write(FLASH, dice.randrange(0, 3000), 1, fua=True),
                         w.read(FLASH, dice.randrange(0, 3000), 32), w.discard(FLASH, dice.randrange(0, 2000), 100))
    for start in range(0, 800, 160):
        await w.write(FLASH, start, 150, fua=True)
    await w.cset.run_gc()


async def fills_and_gc(w: World) -> None:
    dice = rng(w)
    for _ in range(5):
        await w.together(*[w.read(0, dice.randrange(0, 500), dice.randrange(1, 9), nowait=False) for _ in range(4)])
        await w.together(w.cset.run_gc(), w.read(0, dice.randrange(0, 500), 20))


async def full_prepare(w: World) -> None:
    await w.flash_create(FLASH, 3600)
    await scatter(w, FLASH, list(range(0, 3600, 8)), 8, at_once=3)
    await w.flush(FLASH)


async def full(w: World) -> None:
    """Three quarters of the cache hold data that never leaves it, and are overwritten: each write waits for a gc."""
    dice = rng(w)
    for _ in range(12):
        writes = [w.write(FLASH, dice.randrange(0, 440) * 8, 8 * dice.choice((1, 1, 4)), fua=dice.random() < 0.3)
                  for _ in range(3)]
        await w.together(*writes, w.read(FLASH, dice.randrange(0, 3500), 32))
    await w.write(FLASH, 800, 512)
    await w.flush(FLASH)


async def full_writeback_prepare(w: World) -> None:
    for name, text in (("writeback_percent", "0"), ("writeback_delay", "0"), ("sequential_cutoff", "0")):
        await w.tune("bcache0", name, text)
    await scatter(w, 0, list(range(0, 3200, 32)), 32, at_once=4)


async def full_writeback(w: World) -> None:
    """Faster than it can be written back: past both cutoffs, and waiting for buckets."""
    dice = rng(w)
    for _ in range(8):
        await w.together(*[w.write(0, dice.randrange(0, 700) * 8, dice.choice((8, 64, 200)), fua=dice.random() < 0.2,
                                   sync=dice.random() < 0.5) for _ in range(5)])
    await w.flush(0)


async def leaf_sets(w: World) -> None:
    dice = rng(w)
    for _ in range(5):
        sectors = [dice.randrange(0, 1000) for _ in range(30)]
        await scatter(w, 0, sectors, at_once=10)
        await w.cset.run_gc()
    await w.flush(0)


SLICES = {"slice_keys": 20, "slice_buckets": 64}
"""So small that every walk and every round over the buckets is interrupted again and again."""


# 19. Writes that the engine takes in batches, among requests that they meet in flight.

async def batch_soon(w: World, delay_ns: int, writes: list[tuple[int, int]]) -> None:
    """Offer a batch a little later."""
    await w.sched.sleep_until(w.sched.now_ns + delay_ns)
    await w.write_batch(0, writes)


async def batches(w: World) -> None:
    dice = rng(w)
    for _ in range(16):
        asks: list[Coroutine[Any, Any, Any]] = []
        for _ in range(3):
            writes = [(dice.randrange(0, 300), dice.randrange(1, 5)) for _ in range(dice.randrange(1, 9))]
            asks.append(batch_soon(w, dice.randrange(0, 600_000), writes))
        if dice.random() < 0.4:
            asks.append(w.write(0, dice.randrange(0, 300), dice.randrange(1, 9), fua=True))
        if dice.random() < 0.6:
            asks.append(w.read(0, dice.randrange(200, 500), dice.randrange(1, 40), nowait=False))
        if dice.random() < 0.3:
            asks.append(w.flush(0))
        if dice.random() < 0.15:
            asks.append(w.cset.run_gc())
        await w.together(*asks)
        if dice.random() < 0.3:
            await w.read(0, dice.randrange(0, 460), 40)
    await w.flush(0)


async def batches_first(w: World) -> None:
    """Nothing is dirty yet, though a bucket is open, and only a flush follows."""
    await w.write(0, 100, 2, fua=True)
    await w.tune("bcache0", "cache_mode", "writeback")
    await w.write_batch(0, [(8, 2)])
    await w.flush(0)
    await w.read(0, 0, 64)
    await batches(w)


async def batches_and_fills(w: World) -> None:
    dice = rng(w)
    await w.write(0, 0, 2, fua=True)
    for _ in range(20):
        sector = dice.randrange(8, 1960)
        writes = [(sector + dice.randrange(-4, 24), dice.randrange(1, 4)) for _ in range(dice.randrange(1, 4))]
        await w.together(w.read(0, sector, dice.randrange(8, 32), nowait=False),
                         batch_soon(w, dice.randrange(0, 200_000), writes))
        await w.read(0, sector - 8, 56)


# 20. Writes that come together and share a task, as from a block device.

async def groups(w: World, *, kind: str = "submitted") -> None:
    dice = rng(w)

    async def soon(writes: list[tuple[int, int]]) -> None:
        await w.sched.sleep_until(w.sched.now_ns + dice.randrange(0, 600_000))
        if kind == "placed":
            await w.write_placed(0, writes)
        elif kind == "exported":
            await w.write_exported(0, writes)
        else:
            await w.write_group(0, writes)

    for _ in range(14):
        asks: list[Coroutine[Any, Any, Any]] = []
        for _ in range(3):
            writes = [(dice.randrange(0, 300), dice.randrange(1, 5)) for _ in range(dice.randrange(1, 9))]
            asks.append(soon(writes))
        if dice.random() < 0.5:
            asks.append(w.zeroes(0, dice.randrange(0, 300), dice.randrange(1, 9)))
        if dice.random() < 0.5:
            asks.append(w.read(0, dice.randrange(200, 500), dice.randrange(1, 40), nowait=False))
        if dice.random() < 0.3:
            asks.append(w.flush(0))
        if dice.random() < 0.2:
            asks.append(w.cset.run_gc())
        await w.together(*asks)
        if dice.random() < 0.3:
            await w.read(0, dice.randrange(0, 460), 40)
    await w.flush(0)


async def placed(w: World) -> None:
    await groups(w, kind="placed")
    # A device that takes its time is congested, and then nothing is placed.
    assert w.placed_writes > 20 or w.setup.sluggish or not w.is_calm, w.placed_writes


async def exported(w: World) -> None:
    await groups(w, kind="exported")
    assert w.exported_writes > 20 or w.setup.sluggish or not w.is_calm, w.exported_writes


BIG_BACKING = (Backing(data_sectors=6000, mode="writethrough"),)
STORIES = {story.name: story for story in (
    Story("first_attach", Setup(), first_attach, boots=False),
    Story("first_attach_many_journal_buckets", Setup(nbuckets=6000), first_attach, boots=False),
    Story("attach_by_hand", Setup(backings=(Backing(member=False),), settles=False), attach_by_hand, boots=False),
    Story("overwrite", Setup(), overwrite, overwrite_prepare),
    Story("batches", Setup(), batches, overwrite_prepare),
    Story("groups", Setup(), groups, overwrite_prepare),
    Story("groups_sluggish", Setup(sluggish=True, settles=False), groups, overwrite_prepare),
    Story("placed", Setup(), placed, overwrite_prepare),
    Story("exported", Setup(), exported, overwrite_prepare),
    Story("exported_sluggish", Setup(sluggish=True, settles=False), exported, overwrite_prepare),
    Story("placed_sluggish", Setup(sluggish=True, settles=False), placed, overwrite_prepare),
    Story("batches_and_fills", Setup(), batches_and_fills),
    Story("batches_first", WRITETHROUGH, batches_first),
    Story("overwrite_4k", Setup(bucket_sectors=64, block_sectors=8, atomic_sectors=8), traffic),
    Story("miss_fill", WRITETHROUGH, miss_fill),
    Story("miss_fill_writeback", Setup(), miss_fill),
    Story("reuse", Setup(backings=BIG_BACKING, settles=False), reuse, reuse_prepare),
    Story("reuse_fifo", Setup(backings=BIG_BACKING, settles=False, replacement=1), reuse, reuse_prepare),
    Story("reuse_random", Setup(backings=BIG_BACKING, settles=False, replacement=2), reuse, reuse_prepare),
    Story("gen_wrap", Setup(nbuckets=520, backings=BIG_BACKING, settles=False), reuse, gen_wrap_prepare),
    Story("prio_write", Setup(nbuckets=1400), prio_write),
    Story("journal_wrap", Setup(), journal_wrap),
    Story("journal_batches", Setup(), journal_batches),
    Story("obsoletes", Setup(settles=False), obsoletes),
    Story("split", Setup(), split, split_prepare),
    Story("gc", Setup(), gc, gc_prepare),
    Story("gc_slices", Setup(options=SLICES), gc_slices, gc_prepare),
    Story("gc_slices_writethrough", Setup(backings=BIG_BACKING, settles=False, options=SLICES), gc_slices,
          reuse_prepare),
    Story("reuse_slices", Setup(backings=BIG_BACKING, settles=False, options=SLICES), reuse, reuse_prepare),
    Story("reuse_fifo_slices", Setup(backings=BIG_BACKING, settles=False, replacement=1, options=SLICES), reuse,
          reuse_prepare),
    Story("full_slices", Setup(backings=(), options=SLICES), full, full_prepare),
    Story("moving_gc_slices", Setup(nbuckets=1200, options=SLICES), moving_gc, moving_prepare),
    Story("interior_slices", Setup(nbuckets=1200, backings=(), options=SLICES), interior, interior_prepare),
    Story("interior", Setup(nbuckets=1200, backings=()), interior, interior_prepare),
    Story("small_node_cache", Setup(nbuckets=1200, backings=(), options={"node_cache_bytes": 3 * 4096}), interior,
          interior_prepare),
    Story("leaves_come_and_go", Setup(nbuckets=1200, options={"node_cache_bytes": 2 * 4096}), leaves_come_and_go,
          leaves_come_and_go_prepare),
    Story("fills_and_gc", WRITETHROUGH, fills_and_gc),
    Story("full", Setup(backings=()), full, full_prepare),
    Story("full_writeback", Setup(backings=(Backing(data_sectors=6000),), settles=False), full_writeback,
          full_writeback_prepare),
    Story("leaf_sets", Setup(), leaf_sets),
    Story("moving_gc", Setup(nbuckets=1200), moving_gc, moving_prepare),
    Story("writeback", Setup(), writeback, writeback_prepare),
    Story("detach", Setup(settles=False), detach, writeback_prepare),
    Story("modes", Setup(settles=False), modes),
    Story("flash", Setup(backings=()), flash),
    Story("cached_and_flash", Setup(backings=TWO_BACKINGS, settles=False), traffic, cached_and_flash_prepare),
    Story("stop", Setup(), stop, overwrite_prepare, ends=False),
    Story("stop_busy", Setup(), stop_busy, overwrite_prepare, ends=False),
    Story("settings", Setup(settles=False, discard=True), settings),
    Story("idle", Setup(), idle),
    Story("gc_always_rewrite", Setup(nbuckets=1200, backings=()), interior, rewriting_prepare),
    Story("discards", Setup(backings=BIG_BACKING, settles=False, discard=True), discards, reuse_prepare),
    Story("around", Setup(backings=(Backing(mode="writearound"),), settles=False), around),
)}
