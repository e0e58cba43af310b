# SPDX-License-Identifier: GPL-2.0-only
"""`Oracle`: the rules of its head, one by one; then a right engine passes and each wrong one is caught."""

from __future__ import annotations

import random

import pytest

from tests.sim import passthrough
from tests.sim.oracle import ANYTHING, BASE, ZEROS, Oracle, OracleError, Write, stamp, stamps, unstamp
from tests.sim.power import mixed
from tests.sim.world import Backing, Setup, World


def oracle(*, settles: bool = True) -> Oracle:
    made = Oracle()
    made.add_volume(0, 64, initial=BASE, settles=settles)
    return made


def write(o: Oracle, *, fua: bool = False) -> Write:
    done = o.begin_write(0, 0, 1, fua=fua)
    o.end_write(done)
    return done


def flush(o: Oracle) -> None:
    o.end_flush(o.begin_flush(0))


def test_stamps_tell_where_they_come_from() -> None:
    data = stamps(3, 7, 9, 42)
    assert unstamp(data[:512], 3, 7) == 42
    assert unstamp(data[512:], 3, 8) == 42
    assert unstamp(bytes(512), 3, 7) == ZEROS
    assert "sector 7" in str(unstamp(data[:512], 3, 8))
    assert "volume 3" in str(unstamp(data[:512], 2, 7))
    assert "mixed" in str(unstamp(stamp(0, 0, 1)[:256] + stamp(0, 0, 2)[256:], 0, 0))
    assert "foreign" in str(unstamp(b"x" * 512, 0, 0))


def test_a_plain_write_may_be_lost_and_a_flushed_one_not() -> None:
    o = oracle()
    first = write(o)
    assert o.crash_values(0, 0) == {BASE, first.value}
    assert o.live_values(0, 0) == {first.value}
    flush(o)
    assert o.crash_values(0, 0) == {first.value}


def test_fua_is_durable_when_answered_and_not_before() -> None:
    o = oracle()
    fua = o.begin_write(0, 0, 1, fua=True)
    assert o.crash_values(0, 0) == {BASE, fua.value}
    o.end_write(fua)
    assert o.crash_values(0, 0) == {fua.value}


def test_a_flush_covers_what_was_answered_before_it_began() -> None:
    o = oracle()
    first = write(o)
    going = o.begin_flush(0)
    second = write(o)
    o.end_flush(going)
    assert o.crash_values(0, 0) == {first.value, second.value}


def test_a_later_unflushed_write_leaves_the_durable_one() -> None:
    o = oracle()
    first = write(o, fua=True)
    second = write(o)
    third = o.begin_write(0, 0, 1)
    assert o.crash_values(0, 0) == {first.value, second.value, third.value}
    assert o.live_values(0, 0) == {second.value, third.value}


def test_concurrent_writes_may_win_either_way() -> None:
    o = oracle()
    first, second = o.begin_write(0, 0, 1), o.begin_write(0, 0, 1)
    o.end_write(first)
    o.end_write(second)
    assert o.live_values(0, 0) == {first.value, second.value}
    flush(o)
    assert o.crash_values(0, 0) == {first.value, second.value}


def test_a_failed_write_may_be_there_or_not_and_a_failed_flush_does_nothing() -> None:
    o = oracle()
    first = write(o)
    failed = o.begin_write(0, 0, 1)
    o.end_write(failed, error=5)
    assert o.live_values(0, 0) == {first.value, failed.value}
    o.end_flush(o.begin_flush(0), error=5)
    assert BASE in o.crash_values(0, 0)


def test_a_discard_allows_zeros_and_old_values_until_it_is_followed_by_a_write() -> None:
    o = oracle()
    first = write(o, fua=True)
    gone = o.begin_write(0, 0, 1, discard=True)
    o.end_write(gone)
    assert o.live_values(0, 0) == {first.value, ANYTHING}
    for value in (BASE, ZEROS, first.value):
        o.end_read(o.begin_read(0, 0, 1), stamp(0, 0, value))
    last = write(o, fua=True)
    with pytest.raises(OracleError):
        o.end_read(o.begin_read(0, 0, 1), stamp(0, 0, first.value))
    assert o.crash_values(0, 0) == {last.value}


def test_a_read_may_see_a_write_that_runs_beside_it() -> None:
    o = oracle()
    first = write(o)
    read = o.begin_read(0, 0, 1)
    second = write(o)
    assert read.allowed == [{first.value, second.value}]
    o.end_read(read, stamp(0, 0, first.value))
    with pytest.raises(OracleError, match=f"write {first.value}, allowed: write {second.value}"):
        o.end_read(o.begin_read(0, 0, 1), stamp(0, 0, first.value))


@pytest.mark.parametrize("settles", [True, False])
def test_the_first_read_after_a_crash_decides_in_writeback(settles: bool) -> None:
    o = oracle(settles=settles)
    first = write(o)
    after = o.after_crash()
    assert after.live_values(0, 0) == {BASE, first.value}
    after.end_read(after.begin_read(0, 0, 1), stamp(0, 0, first.value))
    assert after.live_values(0, 0) == ({first.value} if settles else {BASE, first.value})
    later = write(after, fua=True)
    assert after.crash_values(0, 0) == {later.value}


# With engines.

SETUP = Setup(nbuckets=128, backings=(Backing(data_sectors=256), Backing(data_sectors=128)))


def life(wrong: str, seed: int) -> None:
    world = World(SETUP, f"{wrong}/{seed}", engine=passthrough.engine(wrong))
    world.run(world.up())
    for crash in range(3):
        chooser = random.Random(f"{seed}/{crash}")
        stop_at = chooser.randrange(10, 200)
        world.points = 0
        task = world.sched.spawn(mixed(world, chooser, 60), "mixed")
        task.observed = True
        world._turn([])
        while not task.done and world.steps < stop_at:
            world.step()
        if task.error is not None:
            raise task.error
        world = world.revive(f"{seed}/{crash}", images=world.survivors(chooser))
        world.run(world.up())
        world.run(world.verify(everything=True, twice=True))


def lives(wrong: str, seeds: int) -> None:
    for seed in range(seeds):
        life(wrong, seed)


def test_a_right_engine_passes() -> None:
    lives("", 12)


@pytest.mark.parametrize("wrong", ["flush", "fua", "early", "place", "lost", "old"])
def test_a_wrong_engine_is_caught(wrong: str) -> None:
    with pytest.raises(OracleError):
        lives(wrong, 40)


def test_a_seed_replays() -> None:
    texts = []
    for _ in range(2):
        with pytest.raises(OracleError) as caught:
            lives("fua", 40)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
