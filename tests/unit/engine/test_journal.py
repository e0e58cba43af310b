# SPDX-License-Identifier: GPL-2.0-only
"""The journal when its ring is full.

The guard: a bucket that the newest durable entry still asks for is entered with an entry of one sector.

A start has used the last free bucket; then the only leaf that held the old entries is written, and the next bucket
holds entries that are obsolete in memory and not yet on disk.  Power fails at each Io from there on.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from bcachectl.engine.journal import Journal, JournalPin
from bcachectl.errors import Corrupt
from bcachectl.ondisk.bkey import decode_keys
from tests.property.test_journal import GEOMETRY, JournalMachine, Set
from tests.sim.disk import SimDisk


def full_ring() -> Any:
    """A machine whose journal has no block left, and whose oldest entry is held by one leaf."""
    machine: Any = JournalMachine()
    machine.start()
    machine.add(leaf=0, count=1, wait=True)
    machine.drain()
    while machine.set.journal.free_buckets(1) > 0 or machine.set.journal.blocks_free > 0:
        machine.meta()
        machine.drain()
    machine.crash(draw=1)
    while machine.set.journal.blocks_free > 0:
        machine.meta()
        machine.drain()
    assert machine.set.journal.free_buckets(0) == 0
    return machine


def read_back(machine: Any, draw: int) -> None:
    """What the journal reads if power fails now."""
    disk = SimDisk("cache", GEOMETRY.nbuckets * 8, seed="x", image=machine.disk.survive(random.Random(draw)))
    after = Set(disk)
    reading = after.sched.spawn(after.journal.read(), "read")
    reading.observed = True
    ios = after.sched.run(0, [])
    while ios:
        for io in ios:
            disk.begin(io)
            disk.finish(io)
        ios = after.sched.run(0, ios)
    if reading.error is not None:
        raise reading.error
    assert reading.result is not None
    found = {key.start for entry in reading.result for key in decode_keys(entry.keys)}
    assert machine.durable <= found | machine.set.in_leaves


def guarded_bucket(machine: Any) -> set[int]:
    """Write many keys with power failing at every Io; the sizes of the journal writes."""
    for leaf in range(1, 4):
        for _ in range(3):
            machine.add(leaf=leaf, count=11, wait=True)
    sizes = set()
    while machine.flying or not all(task.done for task in machine.tasks):
        sizes.update(io.nsectors for io in machine.flying if io.what == "journal")
        for draw in range(25):
            read_back(machine, draw)
        if machine.flying:
            machine.answer(which=0, error=0)
        else:
            machine.later(milliseconds=50)
    return sizes


def test_a_bucket_that_is_still_asked_for_is_entered_with_one_sector() -> None:
    sizes = guarded_bucket(full_ring())
    assert max(sizes) > 1, "no entry could have been torn"


def test_without_the_guard_entries_go_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = full_ring()
    reclaim = Journal.reclaim

    def unguarded(self: Journal, **options: Any) -> None:
        reclaim(self, **options)
        self.guarded = False

    monkeypatch.setattr(Journal, "reclaim", unguarded)
    with pytest.raises(Corrupt, match="missing"):
        guarded_bucket(machine)


def start_again(machine: Any) -> Any:
    """The set after power loss, its entries read and held; a machine's `crash` without what follows."""
    after = Set(SimDisk("cache", GEOMETRY.nbuckets * 8, seed="again", image=machine.disk.survive(random.Random(1))))
    machine.set, machine.disk, machine.flying, machine.tasks = after, after.disk, [], []
    reading = after.sched.spawn(after.journal.read(), "read")
    machine.tasks.append(reading)
    machine.drain()
    for entry in reading.result:
        after.journal.pins.append(JournalPin(entry.seq, 1))
    after.journal.seq = after.journal.pins[-1].seq
    after.journal.reclaim()
    after.journal.open_entry(after.journal.seq + 1)
    after.sched.spawn(after.journal.run(), "journal writer")
    machine.turn([])
    return after


def test_a_new_root_finds_a_place_in_a_journal_that_is_full_to_its_last_block() -> None:
    machine = full_ring()
    for serial in range(40, 43):
        after = start_again(machine)
        while after.journal.blocks_free:
            machine.spawn(machine.new_root())
            machine.drain()
        assert after.journal.free_buckets(0) == 0
        after.root_serial = serial
        machine.spawn(machine.new_root())
        machine.drain()
        assert machine.durable_root == serial + 1
        after = start_again(machine)
        assert after.journal.newest_is_bare


def test_a_start_that_no_room_can_be_made_for_ends_with_a_sentence() -> None:
    machine = full_ring()
    # As another driver leaves it: keys up to the last block.
    after = start_again(machine)
    after.journal.newest_is_bare = False
    assert after.journal.blocks_free == 0
    said: list[str] = []

    def fail(text: str) -> None:
        said.append(text)
        after.io_disabled = True
        after.journal.wake_everyone()

    after.fail = fail
    task = after.sched.spawn(after.journal.write_meta(), "meta")
    machine.tasks.append(task)
    for _ in range(1000):
        machine.later(milliseconds=100)
        if task.done:
            break
    assert task.result is False
    assert "--read-only" in said[0]
