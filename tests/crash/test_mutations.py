# SPDX-License-Identifier: GPL-2.0-only
"""Take one flush, one FUA or one wait out of the engine: a story must notice.

A mutation changes what the disks see (`World.mutate`) or replaces one function of the core.  Seeds and points are
searched until a check fails; a mutation that survives the search means that a test is missing.  That the same stories
pass without the mutation is what the other tests of this directory say.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from bcachectl.engine import recovery, request, write_batch
from bcachectl.engine.alloc import Allocator
from bcachectl.engine.bdev import Bdev
from bcachectl.engine.btree import Btree
from bcachectl.engine.buckets import MARK_RECLAIMABLE
from bcachectl.engine.journal import Journal
from bcachectl.engine.sched import DISCARD, FLUSH, FUA, PREFLUSH, READ, Io
from bcachectl.engine.split import Splitter
from bcachectl.engine.tail import Tail
from tests.crash.stories import STORIES
from tests.sim.power import Choose, run_story
from tests.sim.world import SimFailure

SEARCH_S = 60.0
"""Seconds of processor time after which a mutation counts as survived; it takes 15 at most."""

Mutate = Callable[[Io], bool]


@dataclass(frozen=True)
class Mutation:
    """``stories`` are tried in turn; ``io`` changes Ios (True: answered at once), ``patch`` the core."""

    name: str
    stories: tuple[str, ...]
    io: Mutate | None = None
    patch: Callable[[pytest.MonkeyPatch], None] | None = None


def without(what: str, flags: int) -> Mutate:
    """Writes of this kind lose these flags."""
    def mutate(io: Io) -> bool:
        if io.what == what:
            io.flags &= ~flags
        return False
    return mutate


def not_awaited(what: str, *, flags: int = FUA | PREFLUSH, backing: bool | None = None) -> Mutate:
    """The engine goes on before writes of this kind are done."""
    def mutate(io: Io) -> bool:
        if io.what == what and io.op not in (READ, DISCARD) and backing in (None, io.device > 0):
            io.flags &= ~flags
            return True
        return False
    return mutate


def no_flush_of_backing(io: Io) -> bool:
    """A flush of a backing device does nothing."""
    if io.op == FLUSH and io.device > 0:
        io.flags = 0
        io.op = READ
        io.nsectors = 0
        io.buf = bytearray()
    return False


def no_flags_on_backing(io: Io) -> bool:
    """Writes to a backing device lose FUA and PREFLUSH."""
    if io.device > 0 and io.what != "backing superblock":
        io.flags = 0
    return False


def head_first(patch: pytest.MonkeyPatch) -> None:
    """A set of a node is written in one piece: torn, its head may be there without the rest."""
    async def write(self: Bdev, sector: int, buf: memoryview, what: str) -> int:
        return await self.write(sector, buf, PREFLUSH | FUA, what)
    patch.setattr(Bdev, "write_head_last", write)


def prio_not_written(patch: pytest.MonkeyPatch) -> None:
    """free_inc is released before its gens are on disk."""
    async def write(self: Allocator) -> bool:
        return True
    patch.setattr(Allocator, "_write_prios", write)


def flush_without_journal(patch: pytest.MonkeyPatch) -> None:
    """FUA and flushes are acknowledged before the journal entry."""
    async def wait(self: Journal, seq: int) -> bool:
        return True
    patch.setattr(Journal, "wait_durable", wait)


def old_nodes_freed_early(patch: pytest.MonkeyPatch) -> None:
    """The buckets of replaced nodes get new content before the parent, or the journal, names the new nodes."""
    publish = Splitter.publish

    async def early(self: Splitter, old: list[Any], new: list[Any]) -> bool:
        for node in old:
            await self.cset.cache.write(node.sector, bytes(512), FUA, "reused")
        return await publish(self, old, new)
    patch.setattr(Splitter, "publish", early)


def old_journal_bucket_early(patch: pytest.MonkeyPatch) -> None:
    """A journal bucket is used again although leaves still need its entries."""
    reclaim = Journal.reclaim

    def early(self: Journal, **options: Any) -> None:
        kept = [pin.count for pin in self.pins]
        for pin in list(self.pins)[:-1]:
            pin.count = 0
        reclaim(self, **options)
        for pin, count in zip(self.pins, kept[len(kept) - len(self.pins):], strict=True):
            pin.count = count
    patch.setattr(Journal, "reclaim", early)


def prio_not_blocked(patch: pytest.MonkeyPatch) -> None:
    """Gens of freed nodes get into the prio sets before the parent says that the nodes are gone."""
    write_prios = Allocator._write_prios

    async def unblocked(self: Allocator) -> bool:
        blocked, self.prio_blocked = self.prio_blocked, 0
        try:
            return await write_prios(self)
        finally:
            self.prio_blocked += blocked
    patch.setattr(Allocator, "_write_prios", unblocked)


def gc_does_not_write_leaves(patch: pytest.MonkeyPatch) -> None:
    """gc's marks take for granted what the leaves do not say on disk, and the moves, which are journaled besides
    (docs/decisions/0028), are nowhere.
    """
    write_leaf = Btree.write_leaf

    def unjournaled(self: Btree, new: Any) -> Any:
        pin = self.cset.journal.pins[-1]
        pin.count += 1
        return pin
    patch.setattr(Btree, "_journal_move", unjournaled)

    async def skipped(self: Btree, leaf: Any) -> None:
        if not self.cset.gc.running:
            await write_leaf(self, leaf)
    patch.setattr(Btree, "write_leaf", skipped)


def dirty_data_obsoleted_early(patch: pytest.MonkeyPatch) -> None:
    """A write past the cache makes dirty data obsolete before it is durable itself."""
    async def covers(*_args: Any) -> bool:
        return False
    patch.setattr(request, "_covers_dirty", covers)


def fills_not_cancelled(patch: pytest.MonkeyPatch) -> None:
    """A write lets the fills go on that it overlaps."""
    async def enter(self: request.Ranges, start: int, end: int) -> tuple[int, int]:
        while self.writing(start, end):
            await self.queue.wait()
        self.writes.append((start, end))
        return start, end
    patch.setattr(request.Ranges, "enter", enter)


def batch_before_dirty(patch: pytest.MonkeyPatch) -> None:
    """A batch is taken although the backing superblock does not say DIRTY yet."""
    def keeps_back(dev: Any) -> bool:
        return bool(dev.attached and dev.cset.sync and not dev.cset.io_disabled)
    patch.setattr(write_batch, "keeps_back", keeps_back)


def batch_lets_fills_go_on(patch: pytest.MonkeyPatch) -> None:
    """A batch does not cancel the fills that it overlaps."""
    place, cancel = write_batch.WriteBatch.place, request.Ranges.cancel_fills

    def unseen(self: write_batch.WriteBatch, writes: list[tuple[int, int]], stream: int) -> list[int]:
        request.Ranges.cancel_fills = lambda *_: None  # type: ignore[assignment, method-assign]
        try:
            return place(self, writes, stream)
        finally:
            request.Ranges.cancel_fills = cancel  # type: ignore[method-assign]
    patch.setattr(write_batch.WriteBatch, "place", unseen)


def batch_in_clean_buckets(patch: pytest.MonkeyPatch) -> None:
    """The buckets that a batch writes to are not marked dirty: gc's marks call them reclaimable."""
    place = write_batch.WriteBatch.place

    def unmarked(self: write_batch.WriteBatch, writes: list[tuple[int, int]], stream: int) -> list[int]:
        buckets = self.dev.cset.buckets
        places = place(self, writes, stream)
        for place_bytes in places:
            if place_bytes >= 0 and buckets.pin_at[place_bytes >> 9 >> buckets.bucket_shift] < 2:
                buckets.set_mark(place_bytes >> 9 >> buckets.bucket_shift, MARK_RECLAIMABLE, 1)
        return places
    patch.setattr(write_batch.WriteBatch, "place", unmarked)


def nothing_in_the_tail(patch: pytest.MonkeyPatch) -> None:
    """The next engine does not find the keys that are not on the device."""
    patch.setattr(Tail, "add", lambda *_: None)


def tail_settled_early(patch: pytest.MonkeyPatch) -> None:
    """What was inherited is forgotten before it is in the journal on the device."""
    take_over = Tail.take_over

    def early(self: Tail, newest_seq: int, newest_csum: int) -> bytes:
        keys = take_over(self, newest_seq, newest_csum)
        self.settle()
        return keys
    patch.setattr(Tail, "take_over", early)


def tail_not_settled(patch: pytest.MonkeyPatch) -> None:
    """What was inherited is inherited again by the engine after the next."""
    patch.setattr(Tail, "settle", lambda _: None)


def tail_signed_late(patch: pytest.MonkeyPatch) -> None:
    """That an entry is one's own is noted only when it is on the device."""
    begun, written, late = Tail.begun, Tail.written, dict[tuple[int, int], int]()

    def late_begun(self: Tail, seq: int) -> None:
        begun(self, seq, late[id(self), seq])
        written(self, seq)
    patch.setattr(Tail, "begun", lambda self, seq, csum: late.update({(id(self), seq): csum}))
    patch.setattr(Tail, "written", late_begun)


def buckets_of_the_tail_not_kept(patch: pytest.MonkeyPatch) -> None:
    """What was inherited raises no gen, and pins and marks no bucket, until it is inserted."""
    start, mark = recovery._mark_journal, recovery._mark_keys

    def journal(cset: Any, entries: Any) -> Any:
        patch.setattr(recovery, "_mark_keys", mark)
        pins = start(cset, entries)

        def unmarked(cset: Any, keys: Any) -> None:
            for bucket in cset.buckets.buckets_of(keys.ptr[keys.flags > 0]).tolist():
                late.append((cset, bucket))
        patch.setattr(recovery, "_mark_keys", unmarked)
        return pins

    async def insert(cset: Any, extents: Any, *, durable: bool) -> bool:
        for owner, bucket in late:
            if owner is cset:
                cset.buckets.pin[bucket] += 1
        late.clear()
        return await request.insert_keys(cset, extents, durable=durable)

    late: list[tuple[Any, int]] = []
    patch.setattr(recovery, "_mark_journal", journal)
    patch.setattr(recovery, "insert_keys", insert)


MUTATIONS = (
    Mutation("journal without PREFLUSH", ("overwrite", "split"), without("journal", PREFLUSH)),
    Mutation("journal without FUA", ("overwrite",), without("journal", FUA)),
    Mutation("journal not awaited", ("overwrite",), not_awaited("journal")),
    Mutation("nodes without PREFLUSH and FUA", ("interior", "split"), without("btree", FUA | PREFLUSH)),
    Mutation("nothing in the tail", ("exported", "overwrite"), patch=nothing_in_the_tail),
    Mutation("tail settled early", ("exported", "overwrite"), patch=tail_settled_early),
    Mutation("tail not settled", ("exported", "overwrite"), patch=tail_not_settled),
    Mutation("tail signed late", ("exported", "overwrite"), patch=tail_signed_late),
    Mutation("buckets of the tail not kept", ("exported", "overwrite"), patch=buckets_of_the_tail_not_kept),
    Mutation("leaf set without PREFLUSH", ("moving_gc", "fills_and_gc"), without("btree", PREFLUSH)),
    Mutation("nodes not awaited", ("interior", "leaf_sets"), not_awaited("btree")),
    Mutation("node set head first", ("leaf_sets",), patch=head_first),
    Mutation("prio sets not awaited", ("prio_write", "reuse"), not_awaited("prio")),
    Mutation("free_inc released before the prio write", ("reuse", "reuse_fifo"), patch=prio_not_written),
    Mutation("FUA acknowledged before the journal", ("overwrite",), patch=flush_without_journal),
    Mutation("un-dirtied before the backing flush", ("writeback",), no_flush_of_backing),
    Mutation("FUA not passed to the backing device", ("modes", "miss_fill"), no_flags_on_backing),
    Mutation("DIRTY superblock not awaited", ("first_attach", "overwrite"), not_awaited("backing superblock")),
    Mutation("uuid array not awaited", ("first_attach", "flash"), not_awaited("uuids")),
    Mutation("data not awaited", ("overwrite",), not_awaited("data", backing=False)),
    Mutation("data of a batch not awaited", ("batches",), not_awaited("data of a batch")),
    Mutation("data of a group not awaited", ("groups",), not_awaited("data of a group")),
    Mutation("data of placed writes not awaited", ("placed",), not_awaited("data of placed writes")),
    Mutation("data of an export not awaited", ("exported",), not_awaited("data of an export")),
    Mutation("batch before DIRTY", ("batches_first",), patch=batch_before_dirty),
    Mutation("batch lets fills go on", ("batches_and_fills",), patch=batch_lets_fills_go_on),
    Mutation("batch in clean buckets", ("batches",), patch=batch_in_clean_buckets),
    Mutation("old nodes freed early", ("split", "gc"), patch=old_nodes_freed_early),
    Mutation("superblock in one piece", ("first_attach_many_journal_buckets",), not_awaited("superblock")),
    Mutation("prio write not blocked by freed nodes", ("interior", "gc_always_rewrite"), patch=prio_not_blocked),
    Mutation("gc does not write leaves", ("moving_gc", "leaf_sets"), patch=gc_does_not_write_leaves),
    Mutation("dirty data obsoleted early", ("obsoletes",), patch=dirty_data_obsoleted_early),
    Mutation("fills not cancelled", ("miss_fill_writeback", "around"), patch=fills_not_cancelled),
    Mutation("journal bucket reused early", ("journal_wrap",), patch=old_journal_bucket_early),
)


def some(seed: int, end: float) -> Choose:
    """A third of the points, another third for each seed."""
    return lambda number: (seed,) if number % 3 == seed % 3 and time.process_time() < end else ()


def search(mutation: Mutation, seconds: float) -> str:
    """The failure that a mutation leads to; empty if none was found in time."""
    end = time.process_time() + seconds
    seed = 0
    while time.process_time() < end:
        seed += 1
        for name in mutation.stories:
            try:
                run_story(STORIES[name], seed, some(seed, end), mutate=mutation.io)
            except SimFailure as error:
                return str(error)
    return ""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name.replace(" ", "_") for mutation in MUTATIONS])
def test_mutation_is_caught(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutation.patch is not None:
        mutation.patch(monkeypatch)
    found = search(mutation, SEARCH_S)
    assert found, "nothing noticed"
    print(found)
