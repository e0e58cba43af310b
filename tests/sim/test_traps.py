# SPDX-License-Identifier: GPL-2.0-only
"""The cases T6 to T21 of the specification's list of traps that need a running core."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from bcachectl.engine import request as path
from bcachectl.engine.front import REQ_DISCARD, REQ_FUA, REQ_META, REQ_RAHEAD, REQ_READ, REQ_SYNC, REQ_WRITE, Request
from bcachectl.engine.sched import DISCARD, FLUSH, FUA, OP_NAMES, PREFLUSH, READ, WRITE, Io
from bcachectl.errors import Corrupt, Refused
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, BdevState, encode_superblock
from tests.sim import image
from tests.sim.disk import SECTOR
from tests.sim.oracle import Oracle
from tests.sim.power import Tally, crash, drain, stop_and_start
from tests.sim.world import FLASH, Backing, Setup, World


def world(setup: Setup | None = None, seed: str = "trap") -> World:
    made = World(setup or Setup(), seed)
    made.run(made.up(), "up")
    return made


def every_point(w: World, where: str, *, wanted: Callable[[int], bool] = lambda number: True) -> Tally:
    """From now on power fails at every point that is wanted."""
    tally = Tally()

    def point(number: int) -> None:
        tally.points += 1
        if wanted(number):
            crash(w, f"{where} io={number}", tally, depth=0)

    w.on_point = point
    return tally


async def several(w: World, count: int, *, fua: bool = True, space: int = 64) -> None:
    dice = random.Random(count)
    for _ in range(count):
        await w.write(0, dice.randrange(0, space), 1, fua=fua)


# T6

def test_t6_the_newest_entry_is_found_after_every_journal_write() -> None:
    w = world(seed="t6")
    newest: dict[str, list[int]] = {"keep": [], "drop": []}

    def point(_number: int) -> None:
        if w._due[0][2].what != "journal":
            return
        for style, seqs in newest.items():
            images = [disk.survive(random.Random(1), style) for disk in w.disks]
            found = image.check(images[0], "t6")
            assert found is not None
            seqs.append(found.newest.seq)
            after = w.revive(f"t6/{style}{len(seqs)}", images=images)
            after.run(after.up())
            assert after.cset.replayed_entries == len(found.entries)
            after.run(after.verify())

    w.on_point = point
    w.run(several(w, 45))
    w.on_point = None
    buckets = {index for index, _offset, _entry in image.Image(w.disks[0].now, "t6").read().all_journal}
    assert len(buckets) == len(w.cset.sb.d), "the journal did not go round"
    first = newest["drop"][0]
    assert newest["drop"] == list(range(first, first + len(newest["drop"]))), "the last durable entry is the newest"
    assert newest["keep"] == [seq + 1 for seq in newest["drop"]], "the one in flight is, if it arrived"
    stop_and_start(w, "t6")


def test_t6_a_gap_in_seq_is_fatal() -> None:
    w = world(seed="t6gap")
    w.run(several(w, 6))
    data = bytearray(w.disks[0].now)
    found = image.Image(data, "t6").read()
    assert len(found.entries) >= 3, "nothing to take away"
    missing = found.entries[1].seq
    for index, offset, entry in found.all_journal:
        if entry.seq == missing:
            start = found.sb.d[index] * found.geometry.bucket_bytes + offset
            data[start:start + 8] = bytes(8)
            behind = [other.seq for at, _offset, other in found.all_journal if at == index and other.seq > missing]
            if behind:
                # The walk of a bucket ends at a bad entry; put the later ones back to its start to make a true gap.
                length = sum(other.blocks for at, _o, other in found.all_journal if at == index and other.seq > missing)
                block = found.geometry.block_bytes
                source = start + entry.blocks * block
                data[start:start + length * block] = data[source:source + length * block]
                data[start + length * block:source + length * block] = bytes(source - start)
    after = w.revive("t6gap/after", images=[data, *[bytearray(disk.now) for disk in w.disks[1:]]])
    with pytest.raises(Corrupt, match=f"journal entries {missing}-{missing} missing! \\(replaying"):
        after.run(after.up())


def test_t6_only_what_a_discard_leaves_is_no_gap() -> None:
    """Whole buckets of the oldest entries may be gone if discard is on, as a kernel that was killed leaves it."""
    for is_on, blocks_gone, is_taken in ((True, 8, True), (True, 1, False), (False, 8, False)):
        w = world(Setup(discard=is_on), seed="t6discard")
        w.run(several(w, 12))
        found = image.Image(w.disks[0].now, "t6discard").read()
        places = {entry.seq: (index, offset) for index, offset, entry in found.all_journal}
        index = places[found.entries[0].seq][0]
        assert places[found.entries[-1].seq][0] != index, "all in one bucket"
        data = bytearray(w.disks[0].now)
        start = found.sb.d[index] * found.geometry.bucket_bytes
        data[start:start + blocks_gone * found.geometry.block_bytes] = bytes(blocks_gone * found.geometry.block_bytes)
        after = w.revive("t6discard/after", images=[data, *[bytearray(disk.now) for disk in w.disks[1:]]])
        if is_taken:
            after.run(after.up())
            assert after.cset.replayed_entries == sum(places[entry.seq][0] != index for entry in found.entries)
        else:
            with pytest.raises(Corrupt, match="missing! \\(replaying"):
                after.run(after.up())


# T9

def test_t9_a_crash_between_prio_write_and_journal_entry_leaves_the_old_chain() -> None:
    w = world(Setup(nbuckets=1400), seed="t9")
    cases = 0
    before: list[int] = []

    def point(_number: int) -> None:
        nonlocal cases
        writer = w.cset.prios
        flying = [held.io.what for held in w.disks[0].flying.values()]
        written = writer.writing and writer.current != writer.journaled
        if not written or "prio" in flying:
            return
        images = [disk.survive(random.Random(1), "keep") for disk in w.disks]
        for held in w.disks[0].flying.values():
            if held.io.what == "journal":
                size = len(held.data)
                start = held.io.sector * 512
                images[0][start:start + size] = w.disks[0].durable[start:start + size]
        found = image.check(images[0], "t9")
        assert found is not None
        assert found.prio_chain[0] == writer.journaled[0]
        before.append(found.prio_chain[0])
        after = w.revive(f"t9/{cases}", images=images)
        after.run(after.up())
        after.run(after.verify())
        cases += 1

    async def fill() -> None:
        for start in range(0, 1200, 8):
            await w.write(0, start, 8)

    w.on_point = point
    w.run(fill())
    assert cases > 2
    assert len(set(before)) > 1, "one prio write only"


# T10

def test_t10_a_bucket_reused_96_times_waits_for_gc_and_old_pointers_stay_stale() -> None:
    w = world(Setup(backings=(Backing(mode="writethrough"),), settles=False), seed="t10")
    w.run(w.write(0, 0, 8))
    buckets = w.cset.buckets
    found = w.cset.btree.leaf_nowait(w.volumes[0].base)
    assert found is not None
    extent = found.extent(0)
    bucket = buckets.bucket_of(extent.ptr)
    buckets.pin_at[bucket] = 0
    buckets.last_gc_at[bucket] = buckets.gen_at[bucket]
    for step in range(1, 129):
        buckets.bump_gen(bucket)
        assert buckets.is_stale(extent.ptr), step
        assert buckets.can_invalidate(bucket) == (step < 96)
    for _ in range(128, 40, -1):
        buckets.gen_at[bucket] = (buckets.gen_at[bucket] - 1) & 255
    assert buckets.is_stale(extent.ptr)
    w.run(w.verify())
    w.run(w.cset.run_gc())
    w.run(w.cset.run_gc())
    assert (buckets.gen_at[bucket] - buckets.last_gc_at[bucket]) & 255 == 0, "gc drops the stale key"
    w.run(w.verify())


def test_t10_gc_lets_a_busy_bucket_go_round_more_than_256_times() -> None:
    w = world(Setup(nbuckets=520, backings=(Backing(data_sectors=5000, mode="writethrough"),), settles=False,
                    replacement=1), seed="t10b")

    async def churn() -> None:
        for start in range(0, 4800, 48):
            await w.together(*[w.write(0, start + part, 8) for part in range(0, 48, 8)])

    for _ in range(3):
        w.run(churn())
        gap = w.cset.buckets.gen - w.cset.buckets.last_gc
        assert int(gap.max()) <= 96
    w.run(w.verify())
    stop_and_start(w, "t10b")


# T11

@pytest.mark.parametrize("mode", ["writethrough", "writeback", "writearound", "none"])
def test_t11_a_write_between_a_miss_and_its_insert_wins(mode: str) -> None:
    w = world(Setup(backings=(Backing(mode=mode),), settles=False), seed=f"t11{mode}")
    w.delay = lambda io: 50_000_000 if io.device == 1 and io.op == READ else None

    async def later(milliseconds: int) -> None:
        await w.sleep(milliseconds)
        await w.write(0, 4, 6, fua=True)

    w.run(w.together(w.read(0, 0, 16, nowait=False), later(5)))
    w.delay = None
    w.run(w.verify(twice=True))
    assert w.cset.failed is None


@pytest.mark.parametrize("mode", ["writethrough", "writeback", "writearound", "none"])
def test_t11_a_miss_beside_a_write_in_flight_leaves_nothing_stale(mode: str) -> None:
    """The kernel's defect: a bypassed write has made its hole, the backing device is slow, a miss caches old data."""
    w = world(Setup(backings=(Backing(mode=mode),), settles=False), seed=f"t11b{mode}")
    w.delay = lambda io: 50_000_000 if io.device == 1 and io.op == WRITE else None

    async def later(milliseconds: int) -> None:
        await w.sleep(milliseconds)
        await w.read(0, 0, 16, nowait=False)

    w.run(w.together(w.write(0, 4, 6, fua=True), later(1), later(10), later(49)))
    w.delay = None
    w.run(w.verify(twice=True))
    stop_and_start(w, "t11b")


# T12

def test_t12_a_write_over_an_extent_under_write_back_survives() -> None:
    w = world(seed="t12")

    async def story() -> None:
        await w.tune("bcache0", "writeback_running", "0")
        await w.write(0, 0, 16, fua=True)
        w.delay = lambda io: 40_000_000 if io.device == 1 and io.what == "writeback" else None
        for name, value in (("writeback_percent", "0"), ("writeback_delay", "0"), ("writeback_running", "1")):
            await w.tune("bcache0", name, value)
        await w.sleep(20)
        assert w.cset.devices[0].writeback.in_flight, "nothing is being written back"
        await w.write(0, 4, 4, fua=True)
        await w.sleep(400)

    tally = every_point(w, "story=t12 seed=0")
    w.run(story())
    assert tally.recoveries > 10
    w.on_point = None
    w.run(w.verify(twice=True))
    stop_and_start(w, "t12")


# T13

def test_t13_attach_detach_attach_takes_slots_0_1_2() -> None:
    w = world(Setup(settles=False), seed="t13")
    slots = [w.cset.devices[0].slot]

    async def around() -> None:
        await w.write(0, 0, 8, fua=True)
        await w.cset.detach("bcache0")
        await w.cset.attach("bcache0")
        slots.append(w.cset.devices[0].slot)

    w.run(around())
    w.run(around())
    assert slots == [0, 1, 2]
    again = stop_and_start(w, "t13")
    assert again.cset.devices[0].slot == 2
    assert [entry.is_retired for entry in again.cset.uuids[:4]] == [True, True, False, False]


def test_t13_a_crash_between_uuid_array_and_superblock_retires_the_slot() -> None:
    w = World(Setup(), "t13b")
    found: list[tuple[int, bool]] = []

    def point(_number: int) -> None:
        if w._due[0][2].what != "backing superblock":
            return
        images = [w.disks[0].survive(random.Random(1), "keep"), w.disks[1].survive(random.Random(1), "drop")]
        after = w.revive(f"t13b/{len(found)}", images=images)
        after.run(after.up())
        after.run(after.verify(everything=True))
        found.append((after.cset.devices[0].slot, after.cset.uuids[0].is_retired))

    w.on_point = point
    w.run(w.up())
    assert (1, True) in found


# T14

def test_t14_a_device_that_ran_without_its_set_gets_a_new_slot_and_its_old_cached_data_is_gone() -> None:
    w = world(seed="t14")
    w.run(w.tune("bcache0", "writeback_running", "0"))
    w.run(w.write(0, 0, 16, fua=True))
    w.run(w.cset.stop())
    drain(w)
    assert w.superblock(0).state == BdevState.DIRTY
    # What a forced `running` does: the state says so, and then data is written without the cache.
    images = [bytearray(disk.now) for disk in w.disks]
    start = SB_SECTOR * SECTOR
    stale = w.superblock(0).with_state(BdevState.STALE)
    images[1][start:start + SB_BYTES] = encode_superblock(stale, bytes(images[1][start:start + SB_BYTES]))
    judge = Oracle()
    judge.add_volume(0, 2048, initial=0, settles=False)
    after = World(w.setup, "t14/after", images=images, oracle=judge)
    after.run(after.up())
    dev = after.cset.devices[0]
    assert (dev.slot, dev.sb.state) == (1, BdevState.CLEAN)
    assert after.cset.uuids[0].is_retired
    after.run(after.verify(everything=True, twice=True))
    again = stop_and_start(after, "t14")
    assert again.cset.devices[0].slot == 1


# T15

def test_t15_a_full_journal_with_slow_leaves_makes_progress() -> None:
    w = world(seed="t15")
    w.delay = lambda io: 300_000_000 if io.what == "btree" else None

    async def many(first: int) -> None:
        for number in range(25):
            await w.write(0, (first + number * 40) % 2000, 1, fua=True)
            await w.write(0, (first * 7 + number * 13) % 2000, 1)

    w.run(w.together(*[many(first) for first in range(8)]))
    w.delay = None
    w.run(w.verify())
    stop_and_start(w, "t15")


# T16

def check_lists(w: World) -> None:
    """I1 to I5, and I16 against the bytes that power loss would leave."""
    cset = w.cset
    buckets, alloc = cset.buckets, cset.alloc
    on_lists = alloc.on_lists()
    assert len(on_lists) == len(set(on_lists)), "a bucket on two lists"
    open_now = [buckets.bucket_of(each.ptr) for each in cset.sectors.open_now()]
    assert len(open_now) == len(set(open_now)), "two open buckets share one"
    for bucket in on_lists:
        assert cset.geometry.first_bucket <= bucket < cset.geometry.nbuckets
        assert buckets.pin_at[bucket] == 1, f"bucket {bucket} has {buckets.pin_at[bucket]} pins"
    metadata = set(cset.metadata_buckets()) | {node.bucket for node in cset.btree.nodes()}
    assert not metadata & set(on_lists), "metadata on a free list"
    assert not set(open_now) & set(on_lists)
    assert alloc.prio_blocked >= 0


def check_durable_gens(w: World, exempt: set[int]) -> None:
    """What stands on a free list has its gen on disk."""
    found = image.check(w.disks[0].survive(random.Random(1), "drop"), "t16")
    assert found is not None
    for free in w.cset.alloc.free:
        for bucket in free.buckets:
            if bucket not in exempt:
                assert found.disk_gens[bucket] == w.cset.buckets.gen_at[bucket], f"bucket {bucket} released early"


@pytest.mark.parametrize("replacement", [0, 1, 2])
def test_t16_lists_pins_and_durable_gens_after_every_step(replacement: int) -> None:
    setup = Setup(backings=(Backing(data_sectors=6000, mode="writethrough"),), settles=False, replacement=replacement)
    w = world(setup, seed=f"t16{replacement}")
    exempt = set(w.cset.alloc.on_lists())
    steps = 0

    def point(_number: int) -> None:
        nonlocal steps
        steps += 1
        check_lists(w)
        exempt.intersection_update(w.cset.alloc.on_lists())
        if steps % 40 == 0:
            check_durable_gens(w, exempt)

    async def churn() -> None:
        dice = random.Random(replacement)
        for start in range(0, 5600, 32):
            await w.together(*[w.write(0, start + part, 8, fua=dice.random() < 0.05) for part in range(0, 32, 8)],
                             w.read(0, dice.randrange(0, 5000), 24))

    w.on_point = point
    w.run(churn())
    w.on_point = None
    assert w.cset.prios.writes > 5
    w.run(w.cset.stop())
    drain(w)
    pins = [bucket for bucket in range(w.cset.geometry.nbuckets) if w.cset.buckets.pin_at[bucket]]
    allowed = set(w.cset.alloc.on_lists()) | {w.cset.buckets.bucket_of(each.ptr) for each in w.cset.sectors.open_now()}
    assert set(pins) == allowed, "pins that nobody holds"


# T18

def way(w: World, op: int, sector: int = 0, nsectors: int = 8, flags: int = 0, stream: int = 0) -> str:
    made = path.mode_for(w.cset.devices[0], Request(op, sector, nsectors, None, flags, stream), sector + 16)
    return {path.BYPASS: "bypass", path.THROUGH: "through", path.BACK: "back"}[made]


IN_USE = [
    (39, 0, "back"), (40, 0, "back"), (41, 0, "through"), (41, REQ_SYNC, "back"), (41, REQ_META, "back"),
    (41, REQ_FUA, "back"), (69, REQ_SYNC, "back"), (70, REQ_SYNC, "back"), (71, REQ_SYNC, "through"),
    (95, 0, "through"), (96, REQ_SYNC, "bypass"),
]


@pytest.mark.parametrize(("in_use", "flags", "expected"), IN_USE)
def test_t18_in_use(in_use: int, flags: int, expected: str) -> None:
    w = world(seed="t18")
    w.cset.buckets.in_use_percent = in_use
    assert way(w, REQ_WRITE, flags=flags) == expected


MODES = [
    ("writethrough", "through", "through"), ("writeback", "through", "back"), ("writearound", "through", "bypass"),
    ("none", "bypass", "bypass"),
]


@pytest.mark.parametrize(("mode", "read", "write"), MODES)
def test_t18_modes(mode: str, read: str, write: str) -> None:
    w = world(Setup(backings=(Backing(mode=mode),), block_sectors=2, bucket_sectors=16), seed="t18")
    assert (way(w, REQ_READ), way(w, REQ_WRITE)) == (read, write)
    assert way(w, REQ_DISCARD) == "bypass"
    assert way(w, REQ_READ, sector=1) == way(w, REQ_READ, nsectors=3) == "bypass", "not aligned to the set's block"
    w.cset.devices[0].readahead_cache_policy = "meta-only"
    assert way(w, REQ_READ, flags=REQ_RAHEAD) == "bypass"
    assert way(w, REQ_READ, flags=REQ_RAHEAD | REQ_META) == read
    w.cset.devices[0].detaching = True
    assert (way(w, REQ_READ), way(w, REQ_WRITE)) == ("bypass", "bypass")


def test_t18_sequential_cutoff_at_the_boundary() -> None:
    w = world(seed="t18")
    w.cset.devices[0].sequential_cutoff = 64 << 9
    ways = [way(w, REQ_WRITE, sector=start, nsectors=8, stream=3) for start in range(0, 96, 8)]
    assert ways == ["back"] * 7 + ["bypass"] * 5, "the eighth request brings the run to 64 sectors"
    assert way(w, REQ_WRITE, sector=500, nsectors=8, stream=9) == "back"
    w.cset.devices[0].sequential_cutoff = 0
    assert way(w, REQ_WRITE, sector=96, nsectors=8, stream=3) == "back", "0 turns it off"


def test_t18_a_run_is_forgotten_after_five_seconds() -> None:
    w = world(seed="t18")
    w.cset.devices[0].sequential_cutoff = 16 << 9
    assert way(w, REQ_WRITE, sector=0, nsectors=8, stream=3) == "back"
    w.run(w.sleep(5001))
    assert way(w, REQ_WRITE, sector=8, nsectors=8, stream=3) == "back"
    assert way(w, REQ_WRITE, sector=16, nsectors=8, stream=3) == "bypass"


def test_t18_congestion() -> None:
    w = world(seed="t18")
    congestion = w.cset.congestion
    assert congestion.limit_sectors() == 0
    for _ in range(40):
        congestion.account(100_000_000, is_write=True)
    assert congestion.limit_sectors() >= 1
    assert way(w, REQ_WRITE, nsectors=256) == "bypass"
    congestion.read_threshold_us = congestion.write_threshold_us = 0
    assert congestion.limit_sectors() == 0


# T20

def recorded(mode: str, ask: str) -> list[str]:
    """The writes and flushes that one request causes, in the order of submission, with what they wait for."""
    # A bucket that has room for both writes, so that no bucket is allocated on the way.
    w = world(Setup(bucket_sectors=64, backings=(Backing(mode=mode),), settles=False), seed=f"t20{mode}{ask}")
    w.run(w.tune("bcache0", "writeback_running", "0"))
    lines: list[str] = []

    def seen(io: Io) -> None:
        if io.op not in (READ, DISCARD):
            flags = ("+preflush" if io.flags & PREFLUSH else "") + ("+fua" if io.flags & FUA else "")
            name = io.what if io.op == WRITE else OP_NAMES[io.op]
            lines.append(f"{'cache' if io.device == 0 else 'backing'} {name}{flags}")

    async def story() -> None:
        await w.write(0, 0, 8, stream=7)
        await w.sleep(400)
        w.on_io = seen
        if ask == "flush":
            await w.flush(0)
        else:
            await w.write(0, 16, 8, fua="fua" in ask, preflush="preflush" in ask, stream=7, quick=False)
        w.on_io = None

    w.run(story())
    return lines


JOURNAL = "cache journal+preflush+fua"
ORDERS = [
    ("writeback", "plain", ["cache data"]),
    ("writeback", "fua", ["cache data", JOURNAL]),
    ("writeback", "preflush", ["backing flush", "cache data", JOURNAL]),
    ("writeback", "flush", ["backing flush", JOURNAL]),
    ("writethrough", "plain", ["backing data", "cache data"]),
    ("writethrough", "fua", ["backing data+fua", "cache data", JOURNAL]),
    ("writethrough", "preflush", ["backing data+preflush", "cache data", JOURNAL]),
    ("writethrough", "preflush+fua", ["backing data+preflush+fua", "cache data", JOURNAL]),
    ("writethrough", "flush", ["backing flush", JOURNAL]),
    ("writearound", "plain", ["backing data"]),
    ("writearound", "fua", ["backing data+fua", JOURNAL]),
    ("writearound", "flush", ["backing flush", JOURNAL]),
    ("none", "preflush+fua", ["backing data+preflush+fua", JOURNAL]),
]


@pytest.mark.parametrize(("mode", "ask", "expected"), ORDERS)
def test_t20_order_of_flushes_and_fua(mode: str, ask: str, expected: list[str]) -> None:
    assert recorded(mode, ask) == expected


def test_t20_the_superblock_says_dirty_before_the_first_dirty_write_is_acknowledged() -> None:
    w = world(seed="t20")
    lines: list[str] = []
    w.on_io = lambda io: lines.append(f"{io.device} {io.what}") if io.op in (WRITE, FLUSH) else None
    w.run(w.write(0, 0, 8, fua=True))
    assert lines[0] == "1 backing superblock"
    assert w.superblock(0).state == BdevState.DIRTY


# T21

def test_t21_a_flash_only_volume() -> None:
    w = World(Setup(backings=()), "t21")
    w.run(w.up())
    for size in (0, 1, 511):
        with pytest.raises(Refused):
            w.run(w.cset.volume_create(size))
    assert not w.cset.volumes
    assert all(entry.is_free for entry in w.cset.uuids), "a slot was left behind"

    async def story() -> None:
        await w.flash_create(FLASH, 512)
        await w.read(FLASH, 0, 512)
        for start in range(0, 512, 16):
            await w.write(FLASH, start, 8)
        await w.read(FLASH, 0, 512)
        await w.flash_create(FLASH + 1, 64)
        await w.write(FLASH + 1, 0, 64, fua=True)
        await w.flash_remove(FLASH)
        await w.cset.run_gc()

    w.run(story())
    w.run(w.verify())
    found = image.check(w.disks[0].now, "t21")
    assert found is not None
    assert found.dirty_sectors(0) == 0, "removal leaves no dirty space"
    assert found.dirty_sectors(1) == 64
    again = stop_and_start(w, "t21")
    assert [volume.uuid for volume in again.cset.volumes] == [w.flash[FLASH + 1]]


