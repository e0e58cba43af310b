# SPDX-License-Identifier: GPL-2.0-only
"""Start of a set: `start_existing` recovers one that has run before, `start_new` makes one of a formatted device.

An existing set, each step relying on those before it (super.c, run_cache_set):

1. The journal says which entries count; the newest names the prio chain, the uuid array and the root.
2. The prio sets give gens and priorities.  They are a lower bound.
3. The whole tree is visited, and every pointer, markers of freed nodes included, raises its bucket's gen.
4. The journal's keys do the same, and pin their buckets until they are inserted.
5. Now the gens are final: the tree is marked, and the first free buckets are taken from those that hold nothing.
6. Journal, allocator and gc run; the journal's keys are inserted again, in order.
7. The superblock is written with its new last_mount.

A read-only set stops before the free buckets, replays in memory, and writes nothing.

A new set: the journal buckets are cleared, prio sets, uuid array and an empty root are written, then the first
journal entry, and only then the superblock with CACHE_SYNC.  A crash before that leaves the device new.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bcachectl.engine.alloc import Reserve
from bcachectl.engine.btree import Btree
from bcachectl.engine.buckets import MARK_NONE, MARK_RECLAIMABLE, MAX_SECTORS_USED, PTR_DEV_SHIFT
from bcachectl.engine.journal import JournalPin
from bcachectl.engine.node import DIRTY, HAS_PTR, Extent
from bcachectl.errors import Corrupt
from bcachectl.ondisk.bkey import INODE_SHIFT, decode_key_columns, ptr_make
from bcachectl.ondisk.jset import Jset
from bcachectl.ondisk.uuids import UuidEntry

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet

MAX_BTREE_LEVEL = 16


async def start_existing(cset: CacheSet) -> None:
    """Recover and run a set; raises Corrupt or DeviceError, and then the set must not be used."""
    entries = await cset.journal.read()
    newest = entries[-1]
    await cset.prios.read(newest.prio_bucket[cset.sb.nr_this_dev])
    root = newest.btree_root
    if len(root.ptrs) != 1 or newest.btree_level > MAX_BTREE_LEVEL:
        raise Corrupt("journal", "bad btree root")
    pointer = root.ptrs[0]
    word = ptr_make(pointer.sector, pointer.gen, pointer.dev)
    if not cset.buckets.in_range(word, cset.geometry.node_sectors):
        raise Corrupt("journal", f"the btree root lies out of range (pointer {word:#x})")
    await cset.uuid_array.read(newest)
    cset.buckets.raise_gens(np.array([word], np.uint64))
    cset.btree = await Btree.open(cset, word, newest.btree_level)
    await cset.gc.check()
    pins = _mark_journal(cset, entries)
    cset.gens_final = True
    cset.dirty_by_inode = await cset.gc.first_marks()
    if cset.read_only:
        await _replay(cset, entries, pins)
        return
    cset.alloc.initial_fill()
    cset.sync = True
    cset.journal.open_entry(newest.seq + 1)
    cset.run_allocator()
    cset.run_journal()
    cset.run_late_threads()
    await _replay(cset, entries, pins)
    if cset.failed:
        raise Corrupt(cset.cache.name, cset.failed)
    await cset.write_superblock()


def _mark_journal(cset: CacheSet, entries: list[Jset]) -> dict[int, JournalPin]:
    # The journal's keys raise gens, and pin and mark their buckets until they are replayed (journal.c,
    # bch_journal_mark).
    buckets = cset.buckets
    present = {jset.seq: jset for jset in entries}
    pins: dict[int, JournalPin] = {}
    for seq in range(entries[0].seq, entries[-1].seq + 1):
        pin = JournalPin(seq, 1 if seq in present else 0)
        pins[seq] = pin
        cset.journal.pins.append(pin)
    for jset in entries:
        for new, is_real in _journal_keys(cset, jset):
            if is_real:
                buckets.raise_gens(np.array([new.ptr], np.uint64))
                bucket = buckets.bucket_of(new.ptr)
                buckets.pin_at[bucket] += 1
                if new.flags & DIRTY:
                    buckets.mark_dirty(bucket)
                elif buckets.mark_at[bucket] == MARK_NONE:
                    buckets.mark_at[bucket] = MARK_RECLAIMABLE
                size = buckets.sectors_used_at[bucket] + new.end - new.start
                buckets.sectors_used_at[bucket] = min(size, MAX_SECTORS_USED)
    return pins


def _journal_keys(cset: CacheSet, jset: Jset) -> list[tuple[Extent, bool]]:
    # The extents of an entry, in order, and whether each points to data; Corrupt if one is impossible.
    found = []
    keys = decode_key_columns(jset.keys, len(jset.keys) // 8)
    for position, size, dirty, nptrs, ptr in zip(
        keys.pos.tolist(),
        keys.size.tolist(),
        keys.dirty.tolist(),
        keys.nptrs.tolist(),
        keys.ptr.tolist(),
        strict=True,
    ):
        if size == 0:
            continue
        if size > position & ((1 << INODE_SHIFT) - 1) or nptrs > 1:
            raise Corrupt(f"journal entry {jset.seq}", "bad, short offset")
        is_real = nptrs == 1 and ptr >> PTR_DEV_SHIFT == 0
        if is_real and not cset.buckets.in_range(ptr, size):
            raise Corrupt(f"journal entry {jset.seq}", f"key with a pointer out of range ({ptr:#x})")
        flags = (HAS_PTR | (DIRTY if dirty else 0)) if is_real else 0
        found.append((Extent(position - size, position, flags, ptr if is_real else 0), is_real))
    return found


async def _replay(cset: CacheSet, entries: list[Jset], pins: dict[int, JournalPin]) -> None:
    # Inserts the journal's keys again, in order (journal.c, bch_journal_replay).
    for jset in entries:
        pin = pins[jset.seq]
        for new, is_real in _journal_keys(cset, jset):
            if is_real and cset.buckets.is_stale(new.ptr):
                # Written back long ago, and its bucket reused: it masks what is older, and holds nothing.
                new = new._replace(flags=new.flags & ~DIRTY)
            await cset.btree.insert(new, None if cset.read_only else pin)
            if is_real:
                cset.buckets.unpin(cset.buckets.bucket_of(new.ptr))
            cset.replayed_keys += 1
        cset.replayed_entries += 1
        if not cset.read_only:
            cset.journal.unpin(pin)
    cset.events.emit(
        "bcache_journal_replay", keys=cset.replayed_keys, entries=cset.replayed_entries, seq=entries[-1].seq
    )


async def start_new(cset: CacheSet) -> None:
    """Make and run a set on a device that has never been run."""
    await cset.journal.clear()
    cset.uuid_array.entries = [UuidEntry() for _ in range(cset.geometry.nr_uuids)]
    cset.buckets.start_gc()
    cset.buckets.finish_gc(cset.metadata_buckets())
    cset.alloc.initial_fill()
    cset.gens_final = True
    cset.journal.open_entry(1)
    cset.run_allocator()
    if not await cset.prios.write(wait=True):
        raise Corrupt(cset.cache.name, cset.failed or "the first priorities could not be written")
    await cset.uuid_array.write_bucket()
    root = await cset.splitter.first_root()
    if root is None:
        raise Corrupt(cset.cache.name, cset.failed or "the first btree node could not be written")
    cset.btree = Btree(cset, root)
    cset.btree.cache(root)
    # With CACHE_SYNC buckets become free by a prio write only, and that takes buckets itself.
    while not cset.alloc.free[Reserve.PRIO].full and not cset.io_disabled:
        await cset.alloc.bucket_wait.wait()
    cset.sync = True
    cset.run_journal()
    if not await cset.journal.write_meta():
        raise Corrupt(cset.cache.name, cset.failed or "the first journal entry could not be written")
    cset.run_late_threads()
    # Only now: with CACHE_SYNC before the first entry a crash would leave a set that cannot start.
    await cset.write_superblock(lambda sb: sb.with_sync(True))
