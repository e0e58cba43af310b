# SPDX-License-Identifier: GPL-2.0-only
"""`Journal`: a ring of buckets that makes leaf keys durable before their btree nodes are.

Invariant: every key that was acknowledged as durable is in a written set of a leaf, or in an entry from the newest
entry's ``last_seq`` on.

Life of an entry:

1. It is open: `Journal.add` appends keys to it.  Each operation holds a reference to the entry's `JournalPin` until
   its keys are in the btree in memory; the dirty leaf then holds one until the leaf is written.
2. It is written: because someone waits for it, because `journal_delay_ms` have passed, or because it is full.  One
   write at a time, in the order of seq, each with PREFLUSH and FUA, so that data and nodes written before are durable
   before it.  The header is made at this moment: it names the root, the uuid array and the prio chain as they are
   now.
3. When its pin and all older ones are free, ``last_seq`` of later entries passes it.
4. Its bucket is used again when all entries in it are older than ``last_seq``.

About step 4 the kernel looks at ``last_seq`` in memory; if the write that overwrites the bucket is torn, the newest
entry that is left still asks for the entries that were overwritten, and the set cannot start.  Here such a bucket is
entered with an entry without keys, which fits one sector: either it is there, and asks for nothing old, or the old
entry is.

The very last block of the ring is kept for such an entry without keys.  When there is no other place, a start that
was interrupted often enough can still name a new root: the entry in that block is written again where it is, in one
sector, with the roots as they are now.

Keys of steps 1 and 2 are in the `bcachectl.engine.tail.Tail` as well, where there is one.

Kernel: journal.c, the essay in journal.h.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from bcachectl.engine.sched import FUA, NS_PER_MS, NS_PER_S, PREFLUSH, WaitQueue
from bcachectl.errors import Corrupt, errno_text
from bcachectl.ondisk.jset import (
    JSET_HEADER_BYTES,
    JSET_MAX_BYTES,
    Jset,
    decode_jset,
    encode_jset,
    walk_journal_bucket,
)
from bcachectl.ondisk.magic import jset_magic

if TYPE_CHECKING:
    from bcachectl.engine.cache_set import CacheSet

MAX_PINS = 32767
EARLY_WRITE_BYTES = JSET_MAX_BYTES // 2
"""An entry is written from this size on, without waiting for `journal_delay_ms`: what comes meanwhile goes into the
next, and nobody meets a full one unless the device cannot keep up."""
FLUSH_BATCH = 8
"""Leaves written at once when the journal needs space (journal.h, BTREE_FLUSH_NR)."""
PATIENCE_NS = 60 * NS_PER_S
"""How long a start may have no room in the journal and replay nothing before it gives up."""


class JournalPin:
    """Keeps an entry alive: ``count`` references, one of them the entry's own until its write is submitted."""

    __slots__ = ("seq", "count")

    def __init__(self, seq: int, count: int) -> None:
        self.seq = seq
        self.count = count

    def __repr__(self) -> str:
        return f"<JournalPin {self.seq} count {self.count}>"


class Journal:
    """The journal of a running set."""

    __slots__ = (
        "cset",
        "tail",
        "magic",
        "buckets",
        "bucket_seq",
        "seq",
        "pins",
        "keys",
        "blocks_free",
        "sector",
        "resume_sector",
        "resume_blocks",
        "kept_blocks",
        "newest_sector",
        "newest_is_bare",
        "rewrites_wanted",
        "rewrites_begun",
        "rewrites_done",
        "cur_idx",
        "last_idx",
        "durable_last_seq",
        "written_seq",
        "wanted",
        "deadline_ns",
        "do_reserve",
        "guarded",
        "delay_ms",
        "wake",
        "space",
        "written",
        "relieving",
        "closing",
        "writes",
        "reclaims",
        "flush_writes",
    )

    def __init__(self, cset: CacheSet) -> None:
        sched = cset.sched
        self.cset = cset
        self.tail = cset.tail
        self.magic = jset_magic(cset.sb.set_uuid)
        self.buckets = list(cset.sb.d)
        self.bucket_seq = [0] * len(self.buckets)
        self.seq = 0
        self.pins: deque[JournalPin] = deque()
        self.keys = bytearray()
        self.blocks_free = 0
        self.sector = 0
        self.resume_sector = 0
        self.resume_blocks = 0
        self.kept_blocks = 0
        self.newest_sector = 0
        self.newest_is_bare = False
        self.rewrites_wanted = 0
        self.rewrites_begun = 0
        self.rewrites_done = 0
        self.cur_idx = 0
        self.last_idx = 0
        self.durable_last_seq = 0
        self.written_seq = 0
        self.wanted = False
        self.deadline_ns: int | None = None
        self.do_reserve = 0
        self.guarded = False
        self.delay_ms = 100
        self.wake = WaitQueue(sched, "journal writer")
        self.space = WaitQueue(sched, "journal space")
        self.written = WaitQueue(sched, "journal written")
        self.relieving = False
        self.closing = False
        self.writes = 0
        self.reclaims = 0
        self.flush_writes = 0

    # Adding.

    @property
    def request_max_bytes(self) -> int:
        """The most keys that one `add` may bring: they fit one block together with the header (request.c,
        bch_keylist_realloc).
        """
        return self.cset.geometry.block_bytes - JSET_HEADER_BYTES

    @property
    def last_seq(self) -> int:
        """The oldest entry whose keys may be in no written leaf."""
        return self.pins[0].seq

    def room_bytes(self) -> int:
        """How much `add_nowait` would take now."""
        if self.guarded or len(self.pins) > MAX_PINS - 2:
            return 0
        blocks = self.blocks_free - self.kept_blocks
        capacity = min(blocks * self.cset.geometry.block_bytes, JSET_MAX_BYTES) - JSET_HEADER_BYTES
        return max(0, capacity - len(self.keys))

    def add_nowait(self, keys: bytes) -> JournalPin | None:
        """Append ``keys`` to the open entry and take a reference to it; None if they do not fit now."""
        if not len(keys) <= self.room_bytes():
            return None
        if self.tail is not None:
            self.tail.add(self.seq, keys)
        self.keys += keys
        pin = self.pins[-1]
        pin.count += 1
        if self.deadline_ns is None:
            self.deadline_ns = self.cset.sched.now_ns + self.delay_ms * NS_PER_MS
            self.wake.wake_all()
        if len(self.keys) > EARLY_WRITE_BYTES and not self.wanted:
            self.request_write()
        return pin

    async def add(self, keys: bytes) -> JournalPin | None:
        """Like `add_nowait`, but waits for space; None if the set has failed, or is new and not journaled yet."""
        assert len(keys) <= self.request_max_bytes, "the keys of one call fit one block of the journal"
        while self.cset.sync and not self.cset.io_disabled:
            pin = self.add_nowait(keys)
            if pin is not None:
                return pin
            if self.keys or self.guarded:
                self.request_write()
            else:
                self._relieve_if_full()
                if not self.full:
                    continue
            await self.space.wait()
        return None

    def request_write(self) -> None:
        """Have the open entry written without delay."""
        self.wanted = True
        self.wake.wake_all()

    async def wait_durable(self, seq: int) -> bool:
        """Have entry ``seq`` written and wait for it; False if the set failed."""
        if seq == self.seq:
            self.request_write()
        while self.written_seq < seq:
            if self.cset.io_disabled:
                return False
            await self.written.wait()
        return True

    async def wait_for_keys(self) -> bool:
        """Wait until every key added so far is durable; False if the set failed."""
        return await self.wait_durable(self.seq if self.keys else self.seq - 1)

    async def write_meta(self) -> bool:
        """Write an entry with the roots as they are now, and wait for it (journal.c, bch_journal_meta); False if the
        set failed.
        """
        cset = self.cset
        if not cset.sync:
            return not cset.io_disabled
        # A rewrite that has begun does not hold what is to be made durable now; the next one does.
        seq, begun = self.seq, self.rewrites_begun
        self.rewrites_wanted = begun + 1
        self.request_write()
        while self.written_seq < seq and self.rewrites_done <= begun:
            if cset.io_disabled:
                return False
            await self.written.wait()
        return True

    def unpin(self, pin: JournalPin | None) -> None:
        """Drop a reference; the last one of the oldest entry may make room."""
        if pin is None:
            return
        pin.count -= 1
        assert pin.count >= 0, pin
        if pin.count == 0 and pin is self.pins[0] and len(self.space):
            self.reclaim()

    # Space.

    def free_buckets(self, reserve: int) -> int:
        """Journal buckets that may be entered, keeping back ``reserve``."""
        count = (
            self.last_idx - self.cur_idx
            if self.cur_idx < self.last_idx
            else len(self.buckets) + self.last_idx - self.cur_idx
        )
        return max(0, count - 1 - reserve)

    @property
    def full(self) -> bool:
        """Nothing can be added before old entries are given up."""
        return self.blocks_free <= self.kept_blocks or len(self.pins) > MAX_PINS - 2

    def reclaim(self, *, use_reserve: bool = False) -> None:
        """Give up old entries, and enter the next bucket if the current one has no room (journal.c,
        journal_reclaim).
        """
        self._drop_free_pins()
        pins = self.pins
        while self.last_idx != self.cur_idx and self.bucket_seq[self.last_idx] < pins[0].seq:
            self.last_idx = (self.last_idx + 1) % len(self.buckets)
            self.reclaims += 1
        if self.blocks_free == 0 and self.free_buckets(0 if use_reserve else self.do_reserve) > 0:
            geometry = self.cset.geometry
            self.cur_idx = (self.cur_idx + 1) % len(self.buckets)
            self.sector = geometry.sector_of(self.buckets[self.cur_idx])
            self.blocks_free = geometry.bucket_size_sectors // geometry.block_size_sectors
            self.guarded = self.bucket_seq[self.cur_idx] >= self.durable_last_seq > 0
            self.bucket_seq[self.cur_idx] = 0
            self.resume_blocks = 0
        elif self.blocks_free == 0 and self.resume_blocks:
            # An earlier start was interrupted after it had entered the last bucket there was; a replay that needs a
            # new root would wait for room, which only the replay can make.  So that bucket is filled up.
            self.sector, self.blocks_free, self.resume_blocks = self.resume_sector, self.resume_blocks, 0
        self.kept_blocks = int(self.free_buckets(0) == 0)
        if not self.full:
            self.space.wake_all()

    def _drop_free_pins(self) -> None:
        while len(self.pins) > 1 and self.pins[0].count == 0:
            self.pins.popleft()

    def _relieve_if_full(self) -> None:
        self.reclaim()
        if self.full and not self.relieving:
            self.relieving = True
            self.cset.sched.spawn(self._relieve(), "journal relief")

    async def _relieve(self) -> None:
        # Writes the leaves that hold the oldest entries until there is room (journal.c, btree_flush_write).
        cset = self.cset
        progress, since_ns = -1, cset.sched.now_ns
        while self.full and not cset.io_disabled:
            pin = self.pins[0]
            if cset.running or progress != cset.replayed_keys + self.reclaims:
                progress, since_ns = cset.replayed_keys + self.reclaims, cset.sched.now_ns
            elif cset.sched.now_ns - since_ns >= PATIENCE_NS:
                # The newest entry has keys and lies in the last block: another driver filled the ring to its end.
                cset.fail("the journal is full to its last block and its replay needs room; serve the set with "
                          "'engine run --read-only', or save its data with 'bcachectl writeback'")
                break
            leaves = [leaf for leaf in cset.btree.dirty_leaves if leaf.pin is pin][:FLUSH_BATCH]
            if leaves:
                self.flush_writes += len(leaves)
                for task in [cset.sched.spawn(cset.btree.write_leaf(leaf), "flush leaf") for leaf in leaves]:
                    await task
            elif pin.count:
                # An operation between journal and btree holds it, or a leaf's write is on its way.
                await self.space.wait(deadline_ns=cset.sched.now_ns + NS_PER_MS)
            elif len(self.pins) == 1:
                await self.space.wait(deadline_ns=cset.sched.now_ns + NS_PER_MS)
            self.reclaim()
        self.relieving = False
        self.space.wake_all()

    # Writing.

    async def run(self) -> None:
        """Write entries as they are wanted; ends when the set failed, or is closing and nothing is left to write."""
        while await self._wanted():
            if not await self._write_next():
                return
        self.cset.events.emit("bcache_journal_idle", seq=self.seq)

    async def _wanted(self) -> bool:
        # Waits until the open entry is to be written.
        cset = self.cset
        while not cset.io_disabled:
            if self.wanted or (self.deadline_ns is not None and self.deadline_ns <= cset.sched.now_ns):
                return True
            if self.closing:
                return bool(self.keys)
            await self.wake.wait(deadline_ns=self.deadline_ns)
        return False

    async def _write_next(self) -> bool:
        # Writes the open entry, or does something so that it can be; False if the set failed.
        if self.blocks_free == 0:
            # Only an entry without keys can be here: nothing can be added without a block.
            self.reclaim(use_reserve=True)
            if self.blocks_free == 0:
                self._relieve_if_full()
                if self.newest_is_bare and self.rewrites_begun < self.rewrites_wanted:
                    return await self._rewrite_newest()
                if self.blocks_free == 0:
                    await self.space.wait()
                return True
        return await self._write_entry()

    def _encode(self, seq: int, last_seq: int, keys: bytes | bytearray) -> bytearray:
        # An entry with the roots as they are now, which is written next.
        cset = self.cset
        raw = encode_jset(
            seq=seq,
            last_seq=last_seq,
            uuid_bucket=cset.uuid_array.journal_key(),
            btree_root=cset.btree.root_key(),
            btree_level=cset.btree.root.level,
            prio_bucket0=cset.prios.current[0],
            keys=keys,
            magic=self.magic,
            block_bytes=cset.geometry.block_bytes,
        )
        if self.tail is not None:
            self.tail.begun(seq, int.from_bytes(raw[:8], "little"))
        return raw

    async def _write_entry(self) -> bool:
        # Writes the open entry, which is open no more; False if the set failed.
        cset = self.cset
        geometry = cset.geometry
        self._drop_free_pins()
        seq, last_seq, is_bare, sector = self.seq, self.last_seq, not self.keys, self.sector
        assert is_bare or not self.guarded, "the first entry of a bucket that is still asked for has no keys"
        raw = self._encode(seq, last_seq, self.keys)
        blocks = len(raw) // geometry.block_bytes
        assert blocks <= self.blocks_free, (blocks, self.blocks_free)
        self.sector += blocks * geometry.block_size_sectors
        self.blocks_free -= blocks
        self.bucket_seq[self.cur_idx] = seq
        data = memoryview(raw)
        if self.guarded:
            data = data[: cset.cache.atomic_sectors << 9]
        self.guarded = False
        self.pins[-1].count -= 1
        self.open_entry(seq + 1)
        self.reclaim()
        cset.events.emit("bcache_journal_write", seq=seq, last_seq=last_seq, sectors=len(data) >> 9)
        if not self._is_written(len(data), last_seq, await self._write(sector, data)):
            return False
        self.written_seq = seq
        if self.tail is not None:
            self.tail.written(seq)
        self.newest_sector, self.newest_is_bare = sector, is_bare
        self._written()
        return True

    async def _rewrite_newest(self) -> bool:
        # Writes the newest entry again where it is.  It has no keys, and what counts of it is in its first sector:
        # either the old or the new one is there.  Its seq stays, so that none is missing.
        self.rewrites_begun += 1
        begun, seq = self.rewrites_begun, self.written_seq
        self._drop_free_pins()
        last_seq = min(self.last_seq, seq)
        raw = self._encode(seq, last_seq, b"")
        data = memoryview(raw)[: self.cset.cache.atomic_sectors << 9]
        self.cset.events.emit("bcache_journal_write", seq=seq, last_seq=last_seq, sectors=len(data) >> 9)
        if not self._is_written(len(data), last_seq, await self._write(self.newest_sector, data)):
            return False
        self.rewrites_done = begun
        # The open entry has no keys, so whoever wanted it has what was wanted.
        self.wanted = self.rewrites_wanted > begun
        self._written()
        return True

    async def _write(self, sector: int, data: memoryview) -> int:
        return await self.cset.cache.write(sector, data, PREFLUSH | FUA, "journal")

    def _is_written(self, nbytes: int, last_seq: int, error: int) -> bool:
        cset = self.cset
        if error:
            cset.fail(f"writing the journal failed: {errno_text(error)}")
            return False
        self.writes += 1
        cset.meta_sectors_written += nbytes >> 9
        self.durable_last_seq = last_seq
        return True

    def _written(self) -> None:
        self.written.wake_all()
        self.reclaim()
        # Whoever waits for space looks again, even if there is none: it is the waiters who ask for relief.
        self.space.wake_all()

    def open_entry(self, seq: int) -> None:
        """Start to fill entry ``seq`` (journal.c, bch_journal_next)."""
        self.seq = seq
        self.pins.append(JournalPin(seq, 1))
        self.keys = bytearray()
        self.wanted = False
        self.deadline_ns = None

    def close(self) -> None:
        """Write what is pending without delay, then end `run`."""
        self.closing = True
        self.wake.wake_all()

    def wake_everyone(self) -> None:
        """The set has failed: whoever waits has to look."""
        for queue in (self.wake, self.space, self.written):
            queue.wake_all()

    # Reading.

    async def read(self) -> list[Jset]:
        """The entries to replay, oldest first, none missing (journal.c, bch_journal_read); raises Corrupt.

        So it does, unlike the kernel, where newer entries stand behind a damaged one.  A power failure damages none but
        the newest, since one entry is written at a time; what can be read then is an older state that looks whole.

        Sets up where writing goes on: in the bucket after the newest entry's, or behind that entry if none is free.
        """
        cset, geometry = self.cset, self.cset.geometry
        found: dict[int, Jset] = {}
        places: dict[int, tuple[int, int]] = {}
        empty: set[int] = set()
        beyond_seq = 0
        pattern = self.magic.to_bytes(8, "little")
        raw = bytearray(geometry.bucket_bytes)
        for index, bucket in enumerate(self.buckets):
            cset.check_io(await cset.cache.read(geometry.sector_of(bucket), raw, "journal"), f"journal bucket {bucket}")
            entries = walk_journal_bucket(raw, magic=self.magic, block_bytes=geometry.block_bytes)
            if not entries and pattern not in raw:
                empty.add(index)
            end = 0
            for offset, jset in entries:
                end = offset + jset.blocks * geometry.block_bytes
                if jset.seq not in found:
                    found[jset.seq], places[jset.seq] = jset, (index, offset)
                self.bucket_seq[index] = max(self.bucket_seq[index], jset.seq)
            beyond_seq = max(beyond_seq, self._highest_seq(raw, end))
        if not found:
            raise Corrupt("journal", "no journal entries found")
        newest = found[max(found)]
        if beyond_seq > newest.seq:
            raise Corrupt("journal", f"a damaged entry has newer ones behind it, up to {beyond_seq}, which cannot be "
                                     f"reached; the newest that can is {newest.seq}")
        # A kernel discards journal buckets by the oldest entry that is needed now; that it is needed no more is only
        # said by the next entry, which a crash may prevent (journal.c, do_journal_discard).  So whole buckets of the
        # oldest entries may be gone.
        oldest = min((seq for seq in found if seq >= newest.last_seq), default=newest.seq)
        index, offset = places[oldest]
        is_discarded = cset.sb.discard and not offset and (index - 1) % len(self.buckets) in empty
        first = oldest if is_discarded else newest.last_seq
        missing = [seq for seq in range(first, newest.seq + 1) if seq not in found]
        if missing:
            raise Corrupt("journal", f"journal entries {missing[0]}-{missing[-1]} missing! "
                                     f"(replaying {newest.last_seq}-{newest.seq})")
        self._go_on_behind(newest, *places[newest.seq])
        return [found[seq] for seq in range(newest.last_seq, newest.seq + 1) if seq in found]

    def _go_on_behind(self, newest: Jset, index: int, offset: int) -> None:
        # The newest entry stands at a byte of a bucket.
        geometry = self.cset.geometry
        end = offset + newest.blocks * geometry.block_bytes
        sector = geometry.sector_of(self.buckets[index])
        self.newest_sector, self.newest_is_bare = sector + (offset >> 9), not newest.keys
        self.resume_sector = sector + (end >> 9)
        self.resume_blocks = (geometry.bucket_bytes - end) // geometry.block_bytes
        self.cur_idx = index
        self.last_idx = (index + 1) % len(self.buckets)
        self.blocks_free = 0
        self.written_seq = newest.seq
        self.durable_last_seq = newest.last_seq

    def _highest_seq(self, raw: bytearray, offset: int) -> int:
        # Of the entries in a bucket that stand there from ``offset`` on, wherever they begin; 0 if there are none.
        block_bytes = self.cset.geometry.block_bytes
        is_magic = np.frombuffer(raw, "<u8")[offset // 8 + 1 :: block_bytes // 8] == self.magic
        highest = 0
        for block in np.flatnonzero(is_magic).tolist():
            at = offset + block * block_bytes
            jset = decode_jset(raw, at, magic=self.magic, block_bytes=block_bytes, limit_bytes=len(raw) - at)
            if jset is not None:
                highest = max(highest, jset.seq)
        return highest

    async def clear(self) -> None:
        """Wipe every journal bucket that has an entry of this set's magic anywhere: a set uuid may have been used
        before.
        """
        cset = self.cset
        geometry = cset.geometry
        raw = bytearray(geometry.bucket_bytes)
        pattern = self.magic.to_bytes(8, "little")
        for bucket in self.buckets:
            cset.check_io(await cset.cache.read(geometry.sector_of(bucket), raw, "journal"), f"journal bucket {bucket}")
            if pattern in raw:
                error = await cset.cache.write(geometry.sector_of(bucket), bytes(len(raw)), 0, "journal")
                cset.check_io(error, f"journal bucket {bucket}")
        cset.check_io(await cset.cache.flush(), "cache device")
