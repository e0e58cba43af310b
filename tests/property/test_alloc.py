# SPDX-License-Identifier: GPL-2.0-only
"""The allocator and the prio writer against a dictionary: what each bucket holds, by number.

The machine plays everybody else: it takes buckets, puts data or metadata in them, dirties and empties them, runs gc
with marks that it knows to be true, answers Ios and journal entries when it likes.  After every step the invariants of
the allocator's specification hold: I1 to I6, I15 to I18, I20, I21, I25.  The gens on disk are read from the disk.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bcachectl.engine.alloc import NO_BUCKET, Allocator, Reserve
from bcachectl.engine.bdev import Bdev
from bcachectl.engine.buckets import (
    BTREE_PRIO,
    INITIAL_PRIO,
    MARK_DIRTY,
    MARK_METADATA,
    MARK_NONE,
    MARK_RECLAIMABLE,
    Buckets,
    Marks,
)
from bcachectl.engine.cache_set import Options
from bcachectl.engine.prios import PrioWriter
from bcachectl.engine.sched import DISCARD, FUA, PREFLUSH, Io, Sched, WaitQueue
from bcachectl.ondisk.geometry import Geometry
from bcachectl.ondisk.magic import prio_magic
from bcachectl.ondisk.prio import decode_prio_set
from bcachectl.ondisk.superblock import Replacement
from tests.sim.disk import SimDisk

SET_UUID = bytes(range(16))


class Set:
    """The little of a `CacheSet` that allocator and prio writer see."""

    def __init__(self, nbuckets: int, machine: AllocMachine, *, slice_buckets: int = 1 << 17) -> None:
        self.sched = Sched()
        self.geometry = Geometry(block_size_sectors=1, bucket_size_sectors=8, nbuckets=nbuckets, first_bucket=3)
        self.cache = Bdev(self.sched, 0, "cache", size_sectors=nbuckets * 8, can_discard=True)
        self.entropy = random.Random(5)
        self.events = self.gc = self.journal = self
        self.options = Options(slice_buckets=slice_buckets)
        self.io_disabled = self.stopping = False
        self.sync = True
        self.failed: str | None = None
        self.meta_sectors_written = 0
        self.machine = machine
        self.set_uuid = SET_UUID
        self.sb = self
        self.gc_wanted = False
        self.journal_queue = WaitQueue(self.sched, "journal")
        self.journal_asked = 0
        self.journal_done = 0
        self.buckets = Buckets(self.geometry)
        self.alloc = Allocator(self, self.buckets)  # type: ignore[arg-type]
        self.prios = PrioWriter(self)  # type: ignore[arg-type]

    def emit(self, name: str, **fields: Any) -> None:
        if name == "bcache_invalidate":
            self.machine.invalidated(fields["bucket"])

    def wake(self) -> None:
        self.gc_wanted = True

    async def write_meta(self) -> bool:
        self.journal_asked += 1
        wanted = self.journal_asked
        while self.journal_done < wanted:
            await self.journal_queue.wait()
        return True

    def fail(self, text: str) -> None:
        raise AssertionError(text)

    def invalidate(self) -> None:
        """A whole round, with nothing in between."""
        task = self.sched.spawn(self.alloc.invalidate(), "invalidate")
        while not task.done:
            self.sched.run(self.sched.now_ns, [])


class AllocMachine(RuleBasedStateMachine):
    """Buckets on their way around."""

    @initialize(policy=st.sampled_from(list(Replacement)), nbuckets=st.sampled_from([600, 1400]),
                slice_buckets=st.sampled_from([1 << 17, 100]))
    def start(self, policy: Replacement, nbuckets: int, slice_buckets: int) -> None:
        self.holds: dict[int, str] = {}
        self.set = Set(nbuckets, self, slice_buckets=slice_buckets)
        self.disk = SimDisk("cache", nbuckets * 8, seed="alloc")
        self.flying: list[Io] = []
        self.chain = 0
        self.disk_gens = np.zeros(nbuckets, np.uint8)
        alloc = self.set.alloc
        alloc.replacement = policy
        self.journal_buckets = list(range(3, 7))
        self.gc()
        alloc.initial_fill()
        self.initial = set(alloc.on_lists())
        for bucket in list(range(7, nbuckets - 60)):
            if bucket not in self.initial:
                self.holds[bucket] = "clean" if bucket % 5 else "dirty"
        self.gc()
        self.set.sched.spawn(alloc.run(), "allocator")
        self.turn([])

    # What happens outside of the allocator.

    def turn(self, done: list[Io]) -> None:
        for io in self.set.sched.run(self.set.sched.now_ns, done):
            self.disk.begin(io)
            self.flying.append(io)

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 7))
    def answer(self, which: int) -> None:
        io = self.flying.pop(which % len(self.flying))
        self.disk.finish(io)
        self.turn([io])

    @precondition(lambda self: self.set.journal_done < self.set.journal_asked)
    @rule()
    def journal_entry(self) -> None:
        # What an entry does: PREFLUSH and FUA, and its header names the chain.
        io = Io(1, 0, 0, 1, bytes(512), PREFLUSH | FUA, "journal")
        self.disk.begin(io)
        self.disk.finish(io)
        self.set.journal_done += 1
        self.chain = self.set.prios.current[0]
        self.read_chain()
        self.set.journal_queue.wake_all()
        self.turn([])

    def read_chain(self) -> None:
        geometry, number, gens = self.set.geometry, self.chain, []
        for _ in range(geometry.prio_buckets):
            start = number * geometry.bucket_bytes
            found = decode_prio_set(self.disk.durable[start:start + geometry.meta_bytes], prio_magic(SET_UUID), number)
            gens.append(found.gen)
            number = found.next_bucket
        self.disk_gens = np.concatenate(gens)[:geometry.nbuckets]

    def invalidated(self, bucket: int) -> None:
        assert self.holds.pop(bucket, "clean") == "clean", f"bucket {bucket} was in use"

    @rule(is_on=st.booleans())
    def discards(self, is_on: bool) -> None:
        self.set.alloc.discard = is_on

    @rule(reserve=st.sampled_from(list(Reserve)), many=st.integers(1, 6))
    def take(self, reserve: Reserve, many: int) -> None:
        for _ in range(many):
            if reserve == Reserve.PRIO:
                return
            bucket = self.set.alloc.alloc_nowait(reserve)
            if bucket == NO_BUCKET:
                break
            assert bucket not in self.holds
            if bucket in self.initial:
                self.initial.discard(bucket)
            else:
                assert self.disk_gens[bucket] == self.set.buckets.gen[bucket], "I16: reused before its gen was durable"
            self.holds[bucket] = "meta" if reserve == Reserve.BTREE else "clean"
            self.set.buckets.unpin(bucket)
        self.turn([])

    def some(self, kind: str, which: int) -> int | None:
        found = [bucket for bucket in sorted(self.holds) if self.holds[bucket] == kind]
        return found[which % len(found)] if found else None

    @rule(which=st.integers(0, 9999))
    def write_back(self, which: int) -> None:
        bucket = self.some("dirty", which)
        if bucket is not None:
            self.holds[bucket] = "clean"

    @rule(which=st.integers(0, 9999))
    def dirty(self, which: int) -> None:
        bucket = self.some("clean", which)
        if bucket is not None and self.set.buckets.mark_at[bucket] != MARK_NONE:
            self.set.buckets.mark_dirty(bucket)
            self.holds[bucket] = "dirty"

    @rule(which=st.integers(0, 9999))
    def empty(self, which: int) -> None:
        bucket = self.some("clean", which)
        if bucket is not None:
            del self.holds[bucket]

    @rule(which=st.integers(0, 9999))
    def free_node(self, which: int) -> None:
        bucket = self.some("meta", which)
        if bucket is not None:
            self.set.alloc.prio_blocked += 1
            self.set.buckets.bump_gen(bucket)
            self.set.buckets.free(bucket)
            self.set.alloc.prio_blocked -= 1
            del self.holds[bucket]

    @rule(which=st.integers(0, 9999), sectors=st.integers(1, 400))
    def hit(self, which: int, sectors: int) -> None:
        bucket = self.some("clean", which)
        if bucket is not None:
            self.set.buckets.prio_at[bucket] = INITIAL_PRIO
        self.set.alloc.rescale(sectors)

    def mark(self, marks: Marks, first: int, last: int) -> None:
        number = np.array(sorted(bucket for bucket in self.holds if first <= bucket < last), np.int64)
        kinds = {"clean": MARK_RECLAIMABLE, "dirty": MARK_DIRTY, "meta": MARK_METADATA}
        marks.add(number, np.array([kinds[self.holds[bucket]] for bucket in number.tolist()], np.uint8),
                  np.full(len(number), 5, np.uint32))

    def metadata(self) -> list[int]:
        return self.journal_buckets + [bucket for bucket in self.set.prios.current + self.set.prios.journaled if bucket]

    @precondition(lambda self: self.set.buckets.marks is None)
    @rule()
    def gc(self) -> None:
        self.mark(self.set.buckets.start_gc(), 0, self.set.buckets.nbuckets)
        self.set.buckets.finish_gc(self.metadata())
        self.gc_ended()

    def gc_ended(self) -> None:
        self.set.gc_wanted = False
        self.set.alloc.gc_finished()
        self.turn([])

    @precondition(lambda self: self.set.buckets.marks is None)
    @rule()
    def gc_begins(self) -> None:
        self.set.buckets.start_gc()
        self.walked = self.forced = 0

    @precondition(lambda self: self.set.buckets.marks is not None)
    @rule(many=st.integers(100, 700))
    def gc_goes_on(self, many: int) -> None:
        """Marks some buckets, or puts some marks in force; anything may happen in between."""
        buckets = self.set.buckets
        assert buckets.marks is not None
        if self.walked < buckets.nbuckets:
            self.mark(buckets.marks, self.walked, self.walked + many)
            self.walked += many
            return
        if not self.forced:
            buckets.complete_marks(self.metadata())
        buckets.put_in_force(self.forced, self.forced + many)
        self.forced += many
        if self.forced >= buckets.nbuckets:
            buckets.end_gc()
            self.gc_ended()

    @invariant()
    def marks_are_true(self) -> None:
        # I7 to I9: whatever is held is marked so, whichever marks are in force.
        mark_at = self.set.buckets.mark_at
        for bucket, kind in self.holds.items():
            if kind == "clean":
                assert mark_at[bucket] in (MARK_RECLAIMABLE, MARK_DIRTY), f"I9: bucket {bucket}"
            else:
                assert mark_at[bucket] == (MARK_DIRTY if kind == "dirty" else MARK_METADATA), f"I7 I8: bucket {bucket}"

    # What must hold.

    @invariant()
    def lists(self) -> None:
        alloc, buckets = self.set.alloc, self.set.buckets
        on_lists = alloc.on_lists()
        assert all(3 <= bucket < buckets.nbuckets for bucket in on_lists), "I1"
        assert len(on_lists) == len(set(on_lists)), "I2"
        chain = {bucket for bucket in self.set.prios.current + self.set.prios.journaled if bucket}
        assert not set(on_lists) & (set(self.holds) | set(self.journal_buckets) | chain), "I3 I6"
        assert all(buckets.pin_at[bucket] == 1 for bucket in on_lists), "I4"
        assert all(len(free) <= free.size for free in [*alloc.free, alloc.free_inc]), "I20"
        discarded = [io.sector // 8 for io in self.flying if io.op == DISCARD]
        assert discarded in ([], [next(iter(alloc.free_inc.buckets), None)]), "nobody gets a bucket before its discard"

    @invariant()
    def free_lists_are_durable(self) -> None:
        # I15, I16: nothing on disk is ahead, and what may be taken has its gen there.
        buckets, alloc = self.set.buckets, self.set.alloc
        assert ((buckets.gen - self.disk_gens) < 128).all(), "I15"
        for free in alloc.free:
            for bucket in free.buckets:
                if bucket not in self.initial:
                    assert self.disk_gens[bucket] == buckets.gen[bucket], f"I16: bucket {bucket}"

    @invariant()
    def prios(self) -> None:
        buckets, writer = self.set.buckets, self.set.prios
        assert ((buckets.prio <= INITIAL_PRIO) | (buckets.prio == BTREE_PRIO)).all(), "I25"
        data = (buckets.mark == MARK_RECLAIMABLE) | (buckets.mark == MARK_DIRTY)
        assert not (data & (buckets.prio == BTREE_PRIO)).any(), "I25"
        if not writer.writing:
            assert writer.current == writer.journaled, "I18"
        assert len(set(writer.journaled)) == len(writer.journaled) or not any(writer.journaled), "I18"
        assert self.chain == writer.journaled[0] or writer.writing, "I19"


TestAlloc = AllocMachine.TestCase
TestAlloc.settings = settings(max_examples=25, stateful_step_count=60)
