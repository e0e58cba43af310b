# SPDX-License-Identifier: GPL-2.0-only
"""Gens and priorities of a large set are counted once in a while, never both in one go, and those of a small one always
anew.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from bcachectl.engine.buckets import Buckets
from bcachectl.engine.sched import NS_PER_S, Sched
from bcachectl.engine.stats import KEEP_NS, LARGE_NBUCKETS, Summaries
from bcachectl.ondisk.geometry import Geometry


def made(nbuckets: int) -> Any:
    geometry = Geometry(block_size_sectors=8, bucket_size_sectors=1024, nbuckets=nbuckets, first_bucket=1)
    return SimpleNamespace(buckets=Buckets(geometry), sched=Sched(), geometry=geometry)


def test_a_small_set_is_always_counted() -> None:
    cset = made(600)
    summaries = Summaries(cset)
    assert summaries.look()[0].max == 0
    cset.buckets.gen_at[7], cset.buckets.prio_at[7] = 9, 5
    gens, prio = summaries.look()
    assert (gens.max, prio.zero) == (9, 598)


def test_a_large_set_is_counted_in_turns() -> None:
    cset = made(LARGE_NBUCKETS)
    summaries = Summaries(cset)
    summaries.look()
    cset.buckets.gen_at[7], cset.buckets.prio_at[7] = 9, 5
    cset.buckets.need_gc = 9
    seen = []
    for second in range(3 * KEEP_NS // NS_PER_S):
        cset.sched.now_ns = second * NS_PER_S
        gens, prio = summaries.look()
        assert gens.need_gc == 9, "what costs nothing is always new"
        seen.append((gens.max == 9, prio.zero == LARGE_NBUCKETS - 2))
    assert seen[:5] == [(False, False)] * 4 + [(True, False)]
    assert seen[5:] == [(True, True)] * (len(seen) - 5)
