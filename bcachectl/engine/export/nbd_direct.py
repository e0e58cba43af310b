# SPDX-License-Identifier: GPL-2.0-only
"""`DirectReads`: read hits of NBD clients on a cache device that goes past the page cache, many in flight at once.

Each read in flight has a slot: a buffer, and an entry of the ring that was written once (`Ring.reserve`).

1. The reads of a turn that `bcachectl.engine.front.Volume.reads_nowait` knows get a slot each (`DirectReads.start`):
   the offset and the length are stored in its entry, and nothing else.  The loop hands all of them over with the system
   call in which it sleeps.
2. A read's bucket is pinned until it has ended, so its gen cannot change meanwhile (docs/decisions/0021).
3. Reads have ended (`DirectReads.landed`): the reply's header is written in front of each one's data, and the clients
   get all of theirs with one call.  Then the slots are free again.  What a client does not take at once keeps its
   buffer, and the slot gets another one.
4. A read that fails, or is short, becomes a `bcachectl.engine.front.Request` like any other: of clean data the backing
   device has a copy.

Each end of a read is heard at once.  To wait for half of those in flight, as a ublk device does, saves some of the
processor time of each, but client and device then wait for one another in turns, and a third fewer are served.
"""

from __future__ import annotations

from time import monotonic_ns
from typing import Protocol

from bcachectl.engine.buckets import Buckets
from bcachectl.engine.export import nbd_wire as wire
from bcachectl.engine.export.buffers import Buffer, BufferPool
from bcachectl.engine.front import NOT_NOW
from bcachectl.engine.io.uring import OP_READ, RingBackend
from bcachectl.engine.streams import Congestion

MAX_FLIGHTS = 128
"""The clients' half of the completion ring must hold them, and the ring their entries."""
SLOT_BYTES = 16 << 10
"""A longer read gets a buffer of its own."""
MAX_DIRECT_BYTES = 256 << 10
"""A longer read takes the way of all other requests."""

Read = tuple[int, int, int]
"""A client's cookie, the byte of the volume, the length in bytes."""


class Reader(Protocol):
    """The connection that asked, as `DirectReads` sees it."""

    is_open: bool
    is_structured: bool
    in_flight: int
    replies: list[memoryview]
    """What is to be sent, header and data in one piece."""
    reply_slots: list[int]
    """The slot that each of them is in."""

    def read_again(self, read: Read) -> None:
        """A read failed: ask the volume."""
        ...

    def flush(self) -> None:
        """Send what there is."""
        ...


class DirectReads:
    """The reads of one server from the cache device ``fd``; a client of the backend's ring as long as that lives."""

    def __init__(self, backend: RingBackend, fd: int, buckets: Buckets, congestion: Congestion) -> None:
        self.backend = backend
        self.buckets = buckets
        self.congestion = congestion
        self.pool = BufferPool()
        self.free = list(range(MAX_FLIGHTS))
        self.buffers = [self.pool.take(SLOT_BYTES) for _ in self.free]
        self.flights: list[tuple[Reader, int, int, int, int, int] | None] = [None] * MAX_FLIGHTS
        ring = backend.ring
        self._first_entry = ring.reserve(MAX_FLIGHTS)
        self._base = backend.add_client(self)
        for slot, buffer in enumerate(self.buffers):
            ring.fill(self._first_entry + slot, OP_READ, fd=fd, user_data=self._base | slot, address=buffer.address)

    def start(self, reader: Reader, reads: list[Read], places: list[int]) -> list[Read]:
        """Read each at its place of the cache device, a byte; those that were not started, because they have none or
        too many are in flight.
        """
        ring, flights, free, pin_at = self.backend.ring, self.flights, self.free, self.buckets.pin_at
        words, halves, array, mask, tail = ring.sqe_u64, ring.sqe_u32, ring.sq_array, ring.sq_mask, ring.tail
        words_each, first_entry, shift = ring.entry_bytes >> 3, self._first_entry, self.buckets.bucket_shift + 9
        left: list[Read] = []
        # Not by the engine's clock: it stands still while the loop sleeps, and that would count as a slow device.
        now_ns = monotonic_ns()
        for read, place in zip(reads, places, strict=True):
            cookie, offset, length = read
            if place == NOT_NOW or not free:
                left.append(read)
                continue
            slot = free.pop()
            if length > SLOT_BYTES:
                self.pool.release(self._give(slot, length))
            bucket = place >> shift
            pin_at[bucket] += 1
            entry = first_entry + slot
            at = entry * words_each
            words[at + 1] = place
            halves[at + at + 6] = length
            array[tail & mask] = entry
            tail = tail + 1 & 0xFFFFFFFF
            flights[slot] = reader, cookie, offset, length, bucket, now_ns
        ring.tail = tail
        reader.in_flight += len(reads) - len(left)
        self.backend.awaited_reads += len(reads) - len(left)
        if not self.backend.waited_in:
            ring.enter()
        return left

    def landed(self, completions: list[tuple[int, int]]) -> None:
        """Reads have ended."""
        flights, buffers, pin_at, congestion = self.flights, self.buffers, self.buckets.pin_at, self.congestion
        pack_chunk, pack_simple = wire.DATA_CHUNK.pack_into, wire.SIMPLE_REPLY.pack_into
        # Quick reads count for something only if slow ones have been counted.
        slow_ns = congestion.read_threshold_us * 1000 if congestion.value >= 0 else -1
        now_ns = monotonic_ns()
        readers: dict[Reader, None] = {}
        self.backend.awaited_reads -= len(completions)
        for slot, result in completions:
            flight = flights[slot]
            assert flight is not None, "a slot whose entry completes is in flight"
            reader, cookie, offset, length, bucket, began_ns = flight
            flights[slot] = None
            pin_at[bucket] -= 1
            if now_ns - began_ns > slow_ns:
                congestion.account(now_ns - began_ns, is_write=False)
            if result != length or not reader.is_open:
                self._spoiled(slot, reader, (cookie, offset, length))
                continue
            reader.in_flight -= 1
            view = buffers[slot].view
            if reader.is_structured:
                pack_chunk(view, 4068, 0x668E33EF, 1, 1, cookie, length + 8, offset)
                reader.replies.append(view[4068:4096 + length])
            else:
                pack_simple(view, 4080, 0x67446698, 0, cookie)
                reader.replies.append(view[4080:4096 + length])
            reader.reply_slots.append(slot)
            readers[reader] = None
        for reader in readers:
            reader.flush()

    def sent(self, slots: list[int]) -> None:
        """What was in these slots has left, or goes nowhere."""
        for slot in slots:
            if self.buffers[slot].capacity_bytes > SLOT_BYTES:
                self.pool.release(self._give(slot, SLOT_BYTES))
        self.free += slots

    def keep(self, slot: int) -> Buffer:
        """The buffer of a slot, for someone who needs it longer than the slot."""
        self.free.append(slot)
        return self._give(slot, SLOT_BYTES)

    def _spoiled(self, slot: int, reader: Reader, read: Read) -> None:
        self.sent([slot])
        if reader.is_open:
            reader.read_again(read)
        else:
            reader.in_flight -= 1

    def _give(self, slot: int, length: int) -> Buffer:
        # Another buffer for a slot; the one that it had.
        ring = self.backend.ring
        old, buffer = self.buffers[slot], self.pool.take(length)
        self.buffers[slot] = buffer
        ring.sqe_u64[(self._first_entry + slot) * (ring.entry_bytes >> 3) + 2] = buffer.address
        return old
