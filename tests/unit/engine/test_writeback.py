# SPDX-License-Identifier: GPL-2.0-only
"""T19: the rate controller and the rate limiter against numbers worked out by hand from the specification."""

from __future__ import annotations

import pytest

from bcachectl.engine.sched import NS_PER_S
from bcachectl.engine.writeback import RATE_MAX, Rate, quotient

NOW = 100 * NS_PER_S
KEEPS_UP = NOW
BEHIND = NOW - NS_PER_S


def step(rate: Rate, *, dirty: int, target: int, next_ns: int = KEEPS_UP, in_use: int = 30, used: int = 600) -> Rate:
    rate.next_ns = next_ns
    rate.update(dirty=dirty, target=target, now_ns=NOW, nbuckets=1000, avail_nbuckets=1000 - used, in_use=in_use,
                bucket_size=1024)
    return rate


CONTROLLER = [
    # dirty, target, next, integral before -> P, integral after, rate
    (5000, 1000, KEEPS_UP, 0, 100, 20000, 102),
    (5000, 1000, BEHIND, 0, 100, 0, 100),
    (5000, 1000, BEHIND, 50000, 100, 50000, 105),
    (1000, 5000, KEEPS_UP, 30000, -100, 10000, 8),
    (1000, 5000, KEEPS_UP, 0, -100, 0, 8),
    (1000, 5000, KEEPS_UP, -30000, -100, -30000, 8),
    (1000, 1039, KEEPS_UP, 0, 0, 0, 8),
    (1000, 1041, KEEPS_UP, 0, -1, 0, 8),
    (1079, 1000, BEHIND, 0, 1, 0, 8),
    (1400, 1000, BEHIND, -9999, 10, -9999, 10),
    (1400, 1000, BEHIND, -10000, 10, -10000, 9),
    (1000, 1000, KEEPS_UP, 500000, 0, 500000, 50),
    (1 << 50, 0, BEHIND, 0, (1 << 50) // 40, 0, RATE_MAX),
]


@pytest.mark.parametrize(("dirty", "target", "next_ns", "integral", "p", "after", "rate"), CONTROLLER)
def test_t19_controller(dirty: int, target: int, next_ns: int, integral: int, p: int, after: int, rate: int) -> None:
    controller = Rate()
    controller.integral = integral
    step(controller, dirty=dirty, target=target, next_ns=next_ns)
    assert (controller.proportional, controller.integral, controller.rate) == (p, after, rate)
    assert controller.change == rate - 1024
    assert controller.target == target


FRAGMENTED = [(50, 0), (51, 1), (57, 7), (58, 10), (64, 70), (65, 1000), (70, 6000)]


@pytest.mark.parametrize(("in_use", "term"), FRAGMENTED)
def test_t19_fragmentation(in_use: int, term: int) -> None:
    # 60000 dirty sectors in 600 buckets of 1024: 100 a bucket, fragmentation 10.
    controller = step(Rate(), dirty=60000, target=60000, in_use=in_use)
    assert controller.proportional == 100 * term


def test_t19_fragmentation_only_counts_above_three_and_above_p() -> None:
    dense = step(Rate(), dirty=600 * 1024 // 4 + 1, target=0, in_use=60)
    assert dense.proportional == (600 * 1024 // 4 + 1) // 40, "fragmentation 3 is not above 3"
    high = step(Rate(), dirty=60000, target=0, in_use=51)
    assert high.proportional == 1500, "P of 1500 is above 100 * 1"
    off = Rate()
    off.writeback_consider_fragment = False
    assert step(off, dirty=60000, target=60000, in_use=70).proportional == 0
    assert step(Rate(), dirty=0, target=0, in_use=70).proportional == 0


def test_t19_division_truncates_towards_zero() -> None:
    values = (-81, -80, -41, -40, -39, -1, 0, 39, 40)
    assert [quotient(value, 40) for value in values] == [-2, -2, -1, -1, 0, 0, 0, 0, 1]


def test_t19_limiter() -> None:
    rate = Rate()
    rate.rate, rate.next_ns = 512, NOW
    assert rate.delay_ns(512, NOW) == NS_PER_S
    assert rate.delay_ns(512 * 100, NOW) == 5 * NS_PER_S // 2, "never more than 2.5 s"
    rate.next_ns = NOW - 60 * NS_PER_S
    assert rate.delay_ns(0, NOW) == 0
    assert rate.next_ns == NOW - 2 * NS_PER_S, "at most 2 s of credit"
    assert rate.delay_ns(512 * 3, NOW) == NS_PER_S
