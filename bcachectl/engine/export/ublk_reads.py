# SPDX-License-Identifier: GPL-2.0-only
"""`UblkReads`: the read hits of a ublk device, from the ring into the ring.

Every request of the device passes here twice: when it has come, as the completion of its tag's last fetch or commit,
and when its read or write has ended.  What is a read hit is answered without anybody else, and plain writes are left
to `bcachectl.engine.export.ublk_writes.UblkWrites`; the rest comes into `UblkReads.others`.
`bcachectl.engine.export.ublk` says what the entries of the ring mean.

One of the modules that can be compiled: it knows columns and numbers only.
"""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING, Protocol

from bcachectl.engine.export import ublk_wire as wire
from bcachectl.engine.export.ublk_writes import WRITE_NUMBER, UblkWrites
from bcachectl.engine.io.ring import WORD_MASK, Arrivals, Ring
from bcachectl.engine.read_batch import MAX_READS, ReadBatch
from bcachectl.engine.write_batch import MAX_WRITES
from bcachectl.engine.write_group import MAX_GROUP_SECTORS

try:
    import cython
except ImportError:
    from bcachectl import plain as cython

if not cython.compiled:
    # Compiled, these are addresses, and a pointer (descs_c.pxd).
    from operator import getitem as desc_of

    kept_descs = list
if TYPE_CHECKING:
    from bcachectl.engine.buckets import Buckets

READ_NUMBER = 1 << 16
"""The number of a tag's read in the ring; that of its commit is the tag's own."""
QUIET_BYTES = 16 << 10
"""A read of no more than this is over soon, and wakes us up no sooner than the request that follows it."""
_WRITE_MASK = 0xFF | wire.FLAG_FUA | wire.FLAG_META
HAND_OVER_READS = 8
"""So many reads are gathered before the kernel may begin with them.  A device that is handed all 32 of a turn at once
has nothing to do while the next 32 are looked up (docs/decisions/0021)."""


class Owner(Protocol):
    """Whom the rest is for."""

    def take(self, others: list[int], ended: int) -> None:
        """Tags with a request that is no hit; how many tags' fetches have come back for good."""
        ...


class UblkReads:
    """The read hits of one device, a `bcachectl.engine.io.ring.QuickClient`.

    ``others`` and ``ended`` are what its owner takes in `finish`.
    """

    def __init__(self, ring: Ring, reads: ReadBatch, buckets: Buckets, owner: Owner, descs: list[memoryview],
                 first_commit: int, *, serves_hits: bool, writes: UblkWrites | None) -> None:
        """``descs``: the words of each tag's descriptor.  The tags' commits are entries in the slots of the ring from
        ``first_commit`` on, their reads in as many slots behind.  ``writes``: who takes plain writes, if anybody.
        """
        count = len(descs)
        self.ring = ring
        self.reads = reads
        self.owner = owner
        self.writes = writes
        self.serves_hits = serves_hits
        self.arrivals = Arrivals(ring.cq_entries)
        self.others: list[int] = []
        self.ended = 0
        self.pin_at, self.shift = buckets.pin_at, buckets.bucket_shift + 9
        self.first_commit, self.first_read = first_commit, first_commit + count
        self.quiet = 0                                      # quiet reads in flight
        self.tags = array("I", bytes(4 * MAX_READS))        # of the reads of a turn
        self.buckets = array("i", [-1] * count)             # by tag: the bucket that its read in flight has pinned
        self.descs = kept_descs(descs)

    def serve(self) -> bool:
        """Drop the pins of reads that have ended, and answer those of the requests that are hits."""
        arrivals, reads, writes, pins, buckets = self.arrivals, self.reads, self.writes, self.pin_at, self.buckets
        numbers, results, words = arrivals.numbers, arrivals.results, self.ring.sqe_u32
        sectors, lengths, tags, descs = reads.sectors, reads.lengths, self.tags, self.descs
        first_read, read_number, quiet_bytes, cancelled = self.first_read, READ_NUMBER, QUIET_BYTES, -errno.ECANCELED
        write_number, write_mask, op_write = WRITE_NUMBER, _WRITE_MASK, wire.OP_WRITE
        max_writes, max_write_sectors = MAX_WRITES, MAX_GROUP_SECTORS
        quiet = count = 0
        for index in range(arrivals.count):
            number, result = numbers[index], results[index]
            if number >= write_number and writes is not None:
                writes.landed(number - write_number, result)
            elif number >= read_number:
                # Ended, well or not; if not, its commit comes back with ECANCELED.
                number -= read_number
                pins[buckets[number]] -= 1
                buckets[number] = -1
                if words[16 * (first_read + number) + 6] <= quiet_bytes:
                    quiet += 1
            elif not result:
                desc = desc_of(descs, number)
                word = desc[0]
                if writes is not None and word & write_mask == op_write and word >> 32 <= max_write_sectors \
                        and writes.waiting < max_writes:
                    writes.add(number)
                elif word & 0xFF or count == MAX_READS:
                    self.others.append(number)
                else:
                    tags[count] = number
                    sectors[count] = desc[1]
                    lengths[count] = word >> 32
                    count += 1
            elif result == cancelled:
                self.others.append(number)
            else:
                self.ended += 1
        arrivals.count = 0
        self.quiet -= quiet
        self.ring.quiet_reads -= quiet
        if count:
            if self.serves_hits:
                reads.place(count)
                self._publish(count)
            else:
                self.others.extend(tags[:count])
        if writes is not None:
            if writes.is_written:
                reads.settle()
                writes.conclude()
                writes.is_due = writes.wants_turn()
            if writes.may_start():
                writes.start(self.others)
            return bool(self.others) or self.ended > 0 or writes.is_due
        return bool(self.others) or self.ended > 0

    def _publish(self, count: int) -> None:
        # Send each read, and the commit that is linked to it, to the kernel.
        ring, reads = self.ring, self.reads
        sqe_u64, sqe_u32, sqe_i32, slots = ring.sqe_u64, ring.sqe_u32, ring.sqe_i32, ring.sq_array
        mask, tail, handed_over = ring.sq_mask, ring.tail, ring.tail
        quiet_bytes, gathered, result_word = QUIET_BYTES, 2 * HAND_OVER_READS, wire.IO_CMD_RESULT_WORD
        places, lengths, tags, buckets, pins, shift = (
            reads.places, reads.lengths, self.tags, self.buckets, self.pin_at, self.shift)
        first_commit, first_read, quiet, word_mask = self.first_commit, self.first_read, 0, WORD_MASK
        for index in range(count):
            number, place = tags[index], places[index]
            if place < 0:
                self.others.append(number)
                continue
            bucket = place >> shift
            pins[bucket] += 1
            buckets[number] = bucket
            length = lengths[index] << 9
            if length <= quiet_bytes:
                quiet += 1
            slot = first_read + number
            sqe_u64[8 * slot + 1] = place
            sqe_u32[16 * slot + 6] = length
            slots[tail & mask] = slot
            slot = first_commit + number
            sqe_i32[16 * slot + result_word] = length
            slots[tail + 1 & mask] = slot
            tail = tail + 2 & word_mask
            if tail - handed_over & word_mask >= gathered:
                ring.tail = handed_over = tail
                ring.hand_over()
        ring.tail = tail
        self.quiet += quiet
        ring.quiet_reads += quiet

    def commit(self, number: int, result: int) -> None:
        """Answer the request of a tag, and fetch its next one."""
        slot = self.first_commit + number
        self.ring.sqe_i32[16 * slot + wire.IO_CMD_RESULT_WORD] = result
        self.ring.publish(slot)

    def finish(self) -> None:
        """Before anything else of the engine runs: count the hits; the owner takes what is left."""
        self.reads.settle()
        if self.writes is not None:
            self.writes.finish(self.others)
        if self.others or self.ended:
            others, self.others = self.others, []
            ended, self.ended = self.ended, 0
            self.owner.take(others, ended)

    def forget(self) -> None:
        """Nothing comes any more: the reads that are in flight are nobody's."""
        self.ring.quiet_reads -= self.quiet
        self.quiet = 0
        if self.writes is not None:
            self.writes.forget()
