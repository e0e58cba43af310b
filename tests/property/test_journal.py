# SPDX-License-Identifier: GPL-2.0-only
"""The journal against two sets of keys: those that were acknowledged as durable, and those that leaves have on disk.

The machine adds keys on behalf of leaves, waits for some, writes leaves, answers Ios in any order, and lets power fail.
After each crash the journal reads what is left: no entry is missing, and every durable key is in an entry or in a
leaf.  Whatever was asked for is done in the end: a full journal makes progress by having leaves written.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bcachectl.engine.bdev import Bdev
from bcachectl.engine.journal import Journal, JournalPin
from bcachectl.engine.sched import FUA, Io, Sched, Task, WaitQueue
from bcachectl.ondisk.bkey import decode_keys, pack_key
from bcachectl.ondisk.geometry import Geometry
from tests.sim.disk import SimDisk

GEOMETRY = Geometry(block_size_sectors=1, bucket_size_sectors=8, nbuckets=64, first_bucket=3)
LEAVES = 4
LEAF_SECTOR = 32 * 8


class Leaf:
    """What the journal knows of a leaf."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pin: JournalPin | None = None
        self.pending: list[int] = []
        self.writing = False


class Set:
    """The little of a `CacheSet` that the journal sees; it is its own btree, and its leaves have one sector each."""

    def __init__(self, disk: SimDisk) -> None:
        self.tail = None
        self.disk = disk
        self.sched = Sched()
        self.geometry = GEOMETRY
        self.sb = SimpleNamespace(set_uuid=bytes(range(16)), d=tuple(range(3, 7)), discard=False)
        self.cache = Bdev(self.sched, 0, "cache", size_sectors=disk.size_sectors)
        self.events = self.btree = self
        self.prios = SimpleNamespace(current=[9])
        self.root = SimpleNamespace(level=0)
        self.root_serial = 0
        self.uuid_array = SimpleNamespace(journal_key=self.root_key)
        self.sync, self.io_disabled, self.stopping, self.read_only = True, False, False, False
        self.running, self.replayed_keys = False, 0
        self.meta_sectors_written = 0
        self.leaves = [Leaf(number) for number in range(LEAVES)]
        self.dirty_leaves: dict[Leaf, None] = {}
        self.in_leaves: set[int] = set()
        self.changed = WaitQueue(self.sched, "changed")
        self.journal = Journal(self)  # type: ignore[arg-type]

    def emit(self, name: str, **fields: Any) -> None:
        """No one looks."""

    def root_key(self) -> bytes:
        return pack_key(1 << 50, 8, False, self.root_serial << 8)

    def fail(self, text: str) -> None:
        raise AssertionError(text)

    def check_io(self, error: int, where: str) -> None:
        assert not error, where

    def insert(self, leaf: Leaf, key: int, pin: JournalPin) -> None:
        leaf.pending.append(key)
        if leaf.pin is None or pin.seq < leaf.pin.seq:
            pin.count += 1
            self.journal.unpin(leaf.pin)
            leaf.pin = pin
        self.dirty_leaves[leaf] = None

    async def write_leaf(self, leaf: Leaf) -> None:
        while leaf.writing:
            await self.changed.wait()
        if not leaf.pending:
            return
        leaf.writing = True
        pin, leaf.pin = leaf.pin, None
        keys, leaf.pending = leaf.pending, []
        del self.dirty_leaves[leaf]
        await self.cache.write(LEAF_SECTOR + leaf.number, bytes(512), FUA, "btree")
        self.in_leaves.update(keys)
        leaf.writing = False
        self.journal.unpin(pin)
        self.journal.space.wake_all()
        self.changed.wake_all()


class JournalMachine(RuleBasedStateMachine):
    """Keys on their way to the disk."""

    @initialize()
    def start(self) -> None:
        self.serial = 0
        self.durable: set[int] = set()
        self.durable_root = 0
        self.crashes = 0
        self.disk = SimDisk("cache", GEOMETRY.nbuckets * 8, seed="journal")
        self.flying: list[Io] = []
        self.tasks: list[Task[Any]] = []
        self.set = Set(self.disk)
        self.set.journal.reclaim()
        self.set.journal.open_entry(1)
        self.go()
        self.spawn(self.set.journal.write_meta())
        self.drain()

    def go(self) -> None:
        self.set.journal.do_reserve = 1
        self.set.sched.spawn(self.set.journal.run(), "journal writer")
        self.turn([])

    def spawn(self, coro: Any) -> None:
        task = self.set.sched.spawn(coro, "op")
        task.observed = True
        self.tasks.append(task)

    def turn(self, done: list[Io], later_ns: int = 0) -> None:
        for io in self.set.sched.run(self.set.sched.now_ns + later_ns, done):
            self.disk.begin(io)
            self.flying.append(io)
        for task in self.tasks:
            if task.error is not None:
                raise task.error

    async def op(self, leaf: Leaf, keys: list[int], wait: bool) -> None:
        journal = self.set.journal
        raw = b"".join(pack_key(key + 8, 8, False, 8 << 8) for key in keys)
        pin = await journal.add(raw)
        assert pin is not None
        if wait:
            assert await journal.wait_durable(pin.seq)
            self.durable.update(keys)
        for key in keys:
            self.set.insert(leaf, key, pin)
        journal.unpin(pin)

    @rule(leaf=st.integers(0, LEAVES - 1), count=st.integers(1, 11), wait=st.booleans())
    def add(self, leaf: int, count: int, wait: bool) -> None:
        keys = [(self.serial + number) * 8 for number in range(1, count + 1)]
        self.serial += count
        self.spawn(self.op(self.set.leaves[leaf], keys, wait))
        self.turn([])

    @rule(leaf=st.integers(0, LEAVES - 1))
    def write_leaf(self, leaf: int) -> None:
        self.spawn(self.set.write_leaf(self.set.leaves[leaf]))
        self.turn([])

    async def new_root(self) -> None:
        self.set.root_serial += 1
        serial = self.set.root_serial
        assert await self.set.journal.write_meta()
        self.durable_root = max(self.durable_root, serial)

    @rule()
    def meta(self) -> None:
        self.spawn(self.new_root())
        self.turn([])

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 5), error=st.just(0))
    def answer(self, which: int, error: int) -> None:
        io = self.flying.pop(which % len(self.flying))
        self.disk.finish(io)
        self.turn([io])

    @rule(milliseconds=st.sampled_from([1, 50, 200]))
    def later(self, milliseconds: int) -> None:
        self.turn([], milliseconds * 1_000_000)

    @rule()
    def drain(self) -> None:
        self.turn([])
        for _ in range(5000):
            if all(task.done for task in self.tasks):
                self.tasks.clear()
                return
            if self.flying:
                io = self.flying.pop(0)
                self.disk.finish(io)
                self.turn([io])
            else:
                timer_ns = self.set.sched.next_timer_ns()
                assert timer_ns is not None, "deadlock: the journal does not get on"
                self.turn([], max(0, timer_ns - self.set.sched.now_ns))
        raise AssertionError(f"no end: {[task for task in self.tasks if not task.done]}")

    @rule(draw=st.integers(0, 1 << 30), roots=st.integers(0, 4))
    def crash(self, draw: int, roots: int = 0) -> None:
        self.crashes += 1
        image = self.disk.survive(random.Random(draw))
        in_leaves = self.set.in_leaves
        self.disk = SimDisk("cache", GEOMETRY.nbuckets * 8, seed=f"journal{self.crashes}", image=image)
        self.set = Set(self.disk)
        self.set.in_leaves = in_leaves
        self.flying, self.tasks = [], []
        reading = self.set.sched.spawn(self.set.journal.read(), "read")
        self.tasks.append(reading)
        reading.observed = True
        self.turn([])
        while self.flying:
            io = self.flying.pop()
            self.disk.finish(io)
            self.turn([io])
        self.tasks.clear()
        entries = reading.result
        assert entries
        journal = self.set.journal
        self.set.root_serial = entries[-1].btree_root.ptrs[0].sector
        assert self.set.root_serial >= self.durable_root
        replayed: list[int] = []
        for entry in entries:
            pin = JournalPin(entry.seq, 1)
            journal.pins.append(pin)
        for entry, pin in zip(entries, list(journal.pins), strict=True):
            for key in decode_keys(entry.keys):
                replayed.append(key.start)
                self.set.insert(self.set.leaves[key.start // 8 % LEAVES], key.start, pin)
        assert self.durable <= in_leaves | set(replayed), sorted(self.durable - in_leaves - set(replayed))[:5]
        assert len(replayed) == len(set(replayed))
        self.durable.update(replayed)
        journal.seq = entries[-1].seq
        journal.reclaim()
        journal.open_entry(entries[-1].seq + 1)
        self.set.sched.spawn(self.set.journal.run(), "journal writer")
        # The replay needs new roots, and holds every entry until it has them.
        for _ in range(roots):
            self.spawn(self.new_root())
            self.drain()
        for pin in list(journal.pins)[: len(entries)]:
            journal.unpin(pin)
        journal.do_reserve = 1
        self.turn([])

    @invariant()
    def pins_are_in_order(self) -> None:
        journal = self.set.journal
        seqs = [pin.seq for pin in journal.pins]
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs))), "J4"
        assert seqs[-1] == journal.seq
        assert all(pin.count >= 0 for pin in journal.pins)
        assert journal.pins[-1].count >= 1
        live = [index for index, seq in enumerate(journal.bucket_seq) if seq >= journal.pins[0].seq]
        span = (journal.cur_idx - journal.last_idx) % len(journal.buckets)
        if not self.crashes:
            assert all((index - journal.last_idx) % len(journal.buckets) <= span for index in live), "J5"


TestJournal = JournalMachine.TestCase
TestJournal.settings = settings(max_examples=60, stateful_step_count=70)
