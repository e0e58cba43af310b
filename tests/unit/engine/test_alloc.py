# SPDX-License-Identifier: GPL-2.0-only
"""T17: victims of the three policies against the formulas written out, rescale; sizes and order of the lists."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bcachectl.engine.alloc import NO_BUCKET, Allocator, Reserve, fifo_size
from bcachectl.engine.buckets import BTREE_PRIO, INITIAL_PRIO, MARK_DIRTY, MARK_METADATA, MARK_NONE, MARK_RECLAIMABLE
from bcachectl.ondisk.superblock import Replacement
from tests.property.test_alloc import Set


def made(nbuckets: int = 1200, policy: Replacement = Replacement.LRU) -> tuple[Any, list[int]]:
    """A set whose buckets have random states, and the list of buckets that get invalidated."""
    victims: list[int] = []
    cset: Any = Set(nbuckets, SimpleNamespace(invalidated=victims.append))  # type: ignore[arg-type]
    cset.alloc.replacement = policy
    dice = random.Random(nbuckets)
    buckets = cset.buckets
    for bucket in range(nbuckets):
        buckets.mark_at[bucket] = dice.choice((MARK_NONE, MARK_RECLAIMABLE, 1, MARK_DIRTY, MARK_METADATA))
        buckets.prio_at[bucket] = dice.choice((0, 1, dice.randrange(20000, 32769), 30000))
        buckets.sectors_used_at[bucket] = dice.randrange(1, 9) if buckets.mark_at[bucket] else 0
        buckets.pin_at[bucket] = dice.random() < 0.2
        buckets.gen_at[bucket] = dice.randrange(0, 120)
    buckets.min_prio = 20000
    return cset, victims


def can_invalidate(buckets: Any, bucket: int) -> bool:
    return (bucket >= buckets.first_bucket and buckets.mark_at[bucket] in (MARK_NONE, MARK_RECLAIMABLE)
            and buckets.pin_at[bucket] == 0 and (buckets.gen_at[bucket] - buckets.last_gc_at[bucket]) % 256 < 96)


def lru_value(buckets: Any, bucket: int) -> int:
    """bucket_prio of alloc.c, in unsigned 32-bit arithmetic."""
    least = buckets.min_prio
    return (buckets.prio_at[bucket] - least + (INITIAL_PRIO - least) // 8) * buckets.sectors_used_at[bucket] % 2 ** 32


def test_t17_lru_takes_the_least_valuable() -> None:
    cset, victims = made()
    buckets = cset.buckets
    eligible = [bucket for bucket in range(buckets.nbuckets) if can_invalidate(buckets, bucket)]
    values = {bucket: lru_value(buckets, bucket) for bucket in eligible}
    assert max(values.values()) > 2 ** 31, "a priority below min_prio wraps to a huge value"
    cset.invalidate()
    room = cset.alloc.free_inc.size
    assert len(victims) == room == 7
    assert sorted(values[bucket] for bucket in victims) == sorted(values.values())[:room]
    assert [values[bucket] for bucket in victims] == sorted(values[bucket] for bucket in victims)


def test_t17_empty_buckets_go_first_whatever_their_priority() -> None:
    cset, victims = made()
    buckets = cset.buckets
    buckets.mark[:] = MARK_RECLAIMABLE
    buckets.sectors_used[:] = 1
    buckets.pin[:] = 0
    buckets.gen[:] = 0
    buckets.prio[:] = 20000
    for bucket in (700, 33, 1100):
        buckets.sectors_used_at[bucket], buckets.prio_at[bucket] = 0, INITIAL_PRIO
    cset.invalidate()
    assert victims[:3] == [33, 700, 1100]


def test_t17_fifo_goes_round_and_remembers_where_it_was() -> None:
    cset, victims = made(policy=Replacement.FIFO)
    buckets = cset.buckets
    eligible = [bucket for bucket in range(buckets.nbuckets) if can_invalidate(buckets, bucket)]
    expected = eligible + eligible
    for turn in range(3 * len(eligible) // 7):
        cset.invalidate()
        cset.alloc.free_inc.buckets.clear()
        if len(victims) > len(eligible) - 8:
            break
        assert victims == expected[:7 * (turn + 1)]
    assert cset.alloc.fifo_last_bucket == victims[-1] + 1


def test_t17_fifo_gives_up_after_one_round() -> None:
    cset, victims = made(policy=Replacement.FIFO)
    cset.buckets.mark[:] = MARK_DIRTY
    cset.buckets.mark_at[900], cset.buckets.pin_at[900], cset.buckets.gen_at[900] = MARK_NONE, 0, 0
    cset.invalidate()
    assert victims == [900]
    assert len(cset.alloc.free_inc) == 1


def test_t17_random_draws_half_as_often_as_there_are_buckets() -> None:
    cset, victims = made(policy=Replacement.RANDOM)
    buckets = cset.buckets
    draws = random.Random(5)
    expected: list[int] = []
    for _ in range(buckets.nbuckets // 2):
        if len(expected) == 7:
            break
        bucket = draws.getrandbits(64) % (buckets.nbuckets - 3) + 3
        if bucket not in expected and can_invalidate(buckets, bucket):
            expected.append(bucket)
    cset.invalidate()
    assert victims == expected


@pytest.mark.parametrize("policy", list(Replacement))
def test_t17_what_an_invalidation_does(policy: Replacement) -> None:
    cset, victims = made(policy=policy)
    before = cset.buckets.gen.copy()
    cset.invalidate()
    for bucket in victims:
        assert cset.buckets.gen_at[bucket] == (int(before[bucket]) + 1) % 256
        assert cset.buckets.prio_at[bucket] == INITIAL_PRIO
        assert cset.buckets.pin_at[bucket] == 1
    others = np.ones(cset.buckets.nbuckets, bool)
    others[victims] = False
    assert (cset.buckets.gen[others] == before[others]).all()
    assert list(cset.alloc.free_inc.buckets) == victims


def test_t17_rescale_stops_at_0_and_leaves_the_btree_alone() -> None:
    cset, _victims = made()
    buckets = cset.buckets
    buckets.prio[:] = 10
    buckets.pin[:] = 0
    buckets.prio_at[5], buckets.prio_at[6], buckets.prio_at[7], buckets.pin_at[8] = 0, BTREE_PRIO, 1, 1
    step = 1200 * 8 // 1024
    assert buckets.rescale_step_sectors() == step
    cset.alloc.rescale(1)
    assert (buckets.prio_at[5], buckets.prio_at[6], buckets.prio_at[7], buckets.prio_at[8]) == (0, BTREE_PRIO, 0, 10)
    assert (buckets.prio_at[9], buckets.prio_at[2]) == (9, 10), "reserved buckets have no age"
    assert buckets.min_prio == 0, "a bucket that reaches 0 takes min_prio along"
    for _ in range(step - 1):
        cset.alloc.rescale(1)
    assert buckets.prio_at[9] == 9, "one pass for each step"
    cset.alloc.rescale(1)
    assert buckets.prio_at[9] == 8
    assert buckets.min_prio == 8


@pytest.mark.parametrize("sectors", [1, 9, 10, 36, 37, 400])
def test_traffic_counted_together_ages_as_if_it_came_one_by_one(sectors: int) -> None:
    (together, _), (each, _) = made(), made()
    for cset in (together, each):
        cset.buckets.prio_at[5], cset.buckets.prio_at[6], cset.buckets.prio_at[7] = 3, BTREE_PRIO, 4
    together.alloc.rescale_for_all(sectors)
    for _ in range(sectors):
        each.alloc.rescale(1)
    assert together.buckets.prio.tolist() == each.buckets.prio.tolist()
    assert together.buckets.rescale_sectors == each.buckets.rescale_sectors
    assert together.buckets.min_prio == each.buckets.min_prio


def test_t17_unknown_policies_free_nothing() -> None:
    cset, victims = made()
    cset.alloc.replacement = 5
    cset.invalidate()
    assert not victims


@pytest.mark.parametrize(("nbuckets", "moving", "free_inc", "heap", "btree"),
                         [(600, 1, 4, 8, 31), (1024, 1, 4, 8, 31), (1200, 2, 7, 16, 31), (2560, 4, 15, 32, 31),
                          (16384, 15, 63, 128, 127), (65536, 63, 255, 512, 255)])
def test_list_sizes(nbuckets: int, moving: int, free_inc: int, heap: int, btree: int) -> None:
    alloc = Set(nbuckets, SimpleNamespace()).alloc  # type: ignore[arg-type]
    sizes = [free.size for free in alloc.free]
    assert (sizes[Reserve.MOVINGGC], sizes[Reserve.NONE], sizes[Reserve.BTREE]) == (moving, moving, btree)
    assert (alloc.free_inc.size, alloc.heap_size) == (free_inc, heap)
    assert [fifo_size(number) for number in (1, 4, 5, 8, 9, 1000)] == [1, 4, 7, 7, 15, 1023]


def test_prio_is_refilled_first_and_general_buckets_are_taken_first() -> None:
    cset, _victims = made()
    cset.buckets.pin[:] = 1
    alloc = cset.alloc
    fill(alloc)
    assert not alloc._push_released()
    alloc.released = 0
    assert list(alloc.free[Reserve.PRIO].buckets) == [100]
    general = list(alloc.free[Reserve.NONE].buckets)
    assert [alloc.alloc_nowait(Reserve.BTREE) for _ in general] == general
    first = alloc.free[Reserve.BTREE].buckets[0]
    assert alloc.alloc_nowait(Reserve.BTREE) == first
    assert alloc.alloc_nowait(Reserve.NONE) == NO_BUCKET


def fill(alloc: Allocator, *, more: int = 0) -> None:
    """All free lists are full, of buckets from 100 on; a bucket that has no room yet, and so many more, are released.
    """
    alloc.released = 1 + more + sum(free.size for free in alloc.free)
    alloc.free_inc.buckets.extend(range(100, 100 + alloc.released))
    while alloc._push_released():
        pass


def test_a_bucket_that_is_taken_is_replaced_at_once() -> None:
    """By one whose gen is durable; so the allocator has its turn when there is none of these left."""
    cset, _victims = made()
    cset.buckets.pin[:] = 1
    alloc, general = cset.alloc, cset.alloc.free[Reserve.NONE]
    fill(alloc, more=2)
    task = cset.sched.spawn(alloc.alloc_wait.wait(), "allocator")
    cset.sched.run(0, [])
    for left in (2, 1):
        assert alloc.alloc_nowait(Reserve.NONE) != NO_BUCKET
        assert general.full
        assert alloc.released == len(alloc.free_inc) == left
        assert not cset.sched.ready
    assert alloc.alloc_nowait(Reserve.NONE) != NO_BUCKET
    assert general.full
    assert cset.sched.ready == type(cset.sched.ready)([task])


@pytest.mark.parametrize("state", ["discard is on", "a discard is on its way", "somebody waits for a bucket"])
def test_what_only_the_allocator_can_do_is_left_to_it(state: str) -> None:
    cset, _victims = made()
    cset.buckets.pin[:] = 1
    alloc = cset.alloc
    fill(alloc, more=2)
    alloc.discard, alloc.discarding = state == "discard is on", state == "a discard is on its way"
    if state.startswith("somebody"):
        cset.sched.spawn(alloc.bucket_wait.wait(), "somebody")
    task = cset.sched.spawn(alloc.alloc_wait.wait(), "allocator")
    cset.sched.run(0, [])
    assert alloc.alloc_nowait(Reserve.NONE) != NO_BUCKET
    assert alloc.released == 3
    assert cset.sched.ready[0] is task
