# SPDX-License-Identifier: GPL-2.0-only
"""Start of a set: `start_existing` recovers one that has run before, `start_new` makes one of a formatted device.

An existing set, each step relying on those before it (super.c, run_cache_set):

1. The journal says which entries count; the newest names the prio chain, the uuid array and the root.
2. The prio sets give gens and priorities.  They are a lower bound.
3. The whole tree is visited, and every pointer, markers of freed nodes included, raises its bucket's gen.
4. The journal's keys do the same, and pin their buckets until they are inserted; so do the keys that a killed engine
   has left in its tail (`bcachectl.engine.tail`).
5. Now the gens are final: the tree is marked, and the first free buckets are taken from those that hold nothing.
6. Journal, allocator and gc run; the journal's keys are inserted again, in order.  What was in the tail comes last; it
   is journaled as if it were new.
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
from bcachectl.engine.buckets import MARK_DIRTY, MARK_NONE, MARK_RECLAIMABLE, MAX_SECTORS_USED, PTR_DEV_SHIFT
from bcachectl.engine.extents import Columns
from bcachectl.engine.journal import JournalPin
from bcachectl.engine.node import DIRTY, HAS_PTR, Extent
from bcachectl.engine.request import insert_keys
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
    left = b""
    if cset.tail is not None:
        left = (cset.tail.left if cset.read_only else cset.tail.take_over)(newest.seq, newest.csum)
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
    inherited = _key_columns(cset, left, "the tail of a killed engine")
    cset.inherited_keys = len(inherited.start)
    _mark_keys(cset, inherited)
    cset.gens_final = True
    cset.dirty_by_inode = await cset.gc.first_marks()
    if cset.read_only:
        await _replay(cset, entries, pins)
        await _insert(cset, _extents(cset, inherited), None)
        return
    cset.alloc.initial_fill()
    cset.sync = True
    cset.journal.open_entry(newest.seq + 1)
    cset.run_allocator()
    cset.run_journal()
    cset.run_late_threads()
    await _replay(cset, entries, pins)
    if cset.tail is not None and await insert_keys(cset, _extents(cset, inherited), durable=True):
        cset.tail.settle()
    if cset.failed:
        raise Corrupt(cset.cache.name, cset.failed)
    await cset.write_superblock()


def _mark_journal(cset: CacheSet, entries: list[Jset]) -> dict[int, JournalPin]:
    # The journal's keys raise gens, and pin and mark their buckets until they are replayed (journal.c,
    # bch_journal_mark).
    present = {jset.seq: jset for jset in entries}
    pins: dict[int, JournalPin] = {}
    for seq in range(entries[0].seq, entries[-1].seq + 1):
        pin = JournalPin(seq, 1 if seq in present else 0)
        pins[seq] = pin
        cset.journal.pins.append(pin)
    for jset in entries:
        _mark_keys(cset, _journal_keys(cset, jset))
    return pins


def _mark_keys(cset: CacheSet, keys: Columns) -> None:
    buckets = cset.buckets
    ptrs = keys.ptr[keys.flags > 0]
    buckets.raise_gens(ptrs)
    bucket = buckets.buckets_of(ptrs)
    np.add.at(buckets.pin, bucket, 1)
    is_dirty = (keys.flags[keys.flags > 0] & np.uint32(DIRTY)) != 0
    buckets.mark[bucket[is_dirty]] = MARK_DIRTY
    clean = bucket[~is_dirty]
    buckets.mark[clean[buckets.mark[clean] == MARK_NONE]] = MARK_RECLAIMABLE
    which, place = np.unique(bucket, return_inverse=True)
    sectors = np.bincount(place, weights=(keys.end - keys.start)[keys.flags > 0], minlength=len(which))
    buckets.sectors_used[which] = np.minimum(buckets.sectors_used[which] + sectors, MAX_SECTORS_USED)


def _journal_keys(cset: CacheSet, jset: Jset) -> Columns:
    return _key_columns(cset, jset.keys, f"journal entry {jset.seq}")


def _key_columns(cset: CacheSet, raw: bytes, where: str) -> Columns:
    # The extents of an entry, in the order in which they were added, holes without flags; Corrupt if one is impossible.
    keys = decode_key_columns(raw, len(raw) // 8)
    live = keys.size > 0
    end, size, ptr = keys.pos[live], keys.size[live].astype(np.uint64), keys.ptr[live]
    if (size > end & np.uint64((1 << INODE_SHIFT) - 1)).any() or (keys.nptrs[live] > 1).any():
        raise Corrupt(where, "bad, short offset")
    is_real = (keys.nptrs[live] == 1) & (ptr >> np.uint64(PTR_DEV_SHIFT) == 0)
    wrong = is_real & ~cset.buckets.in_range_mask(ptr, size)
    if wrong.any():
        raise Corrupt(where, f"key with a pointer out of range ({int(ptr[wrong][0]):#x})")
    flags = np.where(is_real, np.where(keys.dirty[live], HAS_PTR | DIRTY, HAS_PTR), 0).astype(np.uint32)
    return Columns(end - size, end, flags, np.where(is_real, ptr, np.uint64(0)))


async def _replay(cset: CacheSet, entries: list[Jset], pins: dict[int, JournalPin]) -> None:
    # Inserts the journal's keys again, in order (journal.c, bch_journal_replay).
    for jset in entries:
        pin = None if cset.read_only else pins[jset.seq]
        extents = _extents(cset, _journal_keys(cset, jset))
        await _insert(cset, extents, pin)
        cset.replayed_keys += len(extents)
        cset.replayed_entries += 1
        cset.journal.unpin(pin)
        # Leaves that have filled up are written meanwhile.
        await cset.sched.yield_now()
    cset.events.emit(
        "bcache_journal_replay", keys=cset.replayed_keys, entries=cset.replayed_entries, seq=entries[-1].seq
    )


def _extents(cset: CacheSet, keys: Columns) -> list[Extent]:
    # Written back long ago, and its bucket reused: it masks what is older, and holds nothing.
    buckets = cset.buckets
    stale = (keys.flags > 0) & buckets.stale_mask(buckets.buckets_of(keys.ptr), keys.ptr)
    keys.flags[stale] &= np.uint32(~DIRTY & 0xFFFFFFFF)
    return list(map(Extent, keys.start.tolist(), keys.end.tolist(), keys.flags.tolist(), keys.ptr.tolist()))


async def _insert(cset: CacheSet, extents: list[Extent], pin: JournalPin | None) -> None:
    for new in extents:
        if not cset.btree.insert_nowait(new, pin):
            await cset.btree.insert(new, pin)
        if new.flags:
            cset.buckets.unpin(cset.buckets.bucket_of(new.ptr))


async def start_new(cset: CacheSet) -> None:
    """Make and run a set on a device that has never been run."""
    if cset.tail is not None:
        cset.tail.take_over(0, 0)
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
