# SPDX-License-Identifier: GPL-2.0-only
"""NBD on a cache device that goes past the page cache: `DirectTransmission` gathers what a client asks in one turn,
`DirectReads` are the read hits of all clients, many in flight at once.

What is plain is gathered and begins at the end of the turn; nothing of it is answered before, so the order among it and
other requests is free.  Small writes are offered to the volume's `bcachectl.engine.write_batch.WriteBatch`; what that
places is copied to memory that a device can read, and the engine writes it as one request.

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
from typing import TYPE_CHECKING, Protocol

from bcachectl.engine.buckets import Buckets
from bcachectl.engine.export import nbd_wire as wire
from bcachectl.engine.export.buffers import Buffer, BufferPool
from bcachectl.engine.export.nbd_request import (
    MAX_IN_FLIGHT,
    MAX_IN_FLIGHT_BYTES,
    MAX_QUICK_WRITE_BYTES,
    MAX_UNSENT,
    GatheredWrite,
    PendingWrites,
)
from bcachectl.engine.front import NOT_NOW, REQ_WRITE, Request, Volume
from bcachectl.engine.io.uring import OP_READ, RingBackend
from bcachectl.engine.streams import Congestion
from bcachectl.engine.write_group import serve_placed

if TYPE_CHECKING:
    from bcachectl.engine.export.nbd_connection import Connection

MAX_FLIGHTS = 128
"""The clients' half of the completion ring must hold them, and the ring their entries."""
SLOT_BYTES = 16 << 10
"""A longer read gets a buffer of its own."""
MAX_DIRECT_BYTES = 256 << 10
"""A longer read takes the way of all other requests."""
IOV_MAX = 512

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
        backend.is_looking_for_requests = True
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
        self.backend.client_ios += len(reads) - len(left)
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
        self.backend.client_ios -= len(completions)
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


class DirectTransmission:
    """The transmission of one connection; ``served`` are the plain requests of the last `serve`."""

    def __init__(self, connection: Connection, volume: Volume, reads: DirectReads) -> None:
        self.connection = connection
        self.volume = volume
        self.reads = reads
        self.served = 0

    def serve(self) -> None:
        """Serve every whole request in the connection's receive buffer."""
        connection, volume, direct = self.connection, self.volume, self.reads
        rx, unpack_request, unaligned = connection.rx, wire.REQUEST.unpack_from, connection.handshake.block_bytes - 1
        size_bytes, start, end = connection.size_bytes, connection.rx_start, connection.rx_end
        has_batch = volume.batch is not None and not volume.read_only
        start += connection.skip(end - start)
        reads: list[Read] = []
        writes: list[GatheredWrite] = []
        room, room_bytes = MAX_IN_FLIGHT - connection.in_flight, MAX_IN_FLIGHT_BYTES - connection.in_flight_bytes
        while end - start >= 28:
            if room <= 0 or room_bytes <= 0 or len(connection.out) >= MAX_UNSENT:
                connection.blocked = True
                break
            magic, flags, command, cookie, offset, length = unpack_request(rx, start)
            if command < 2 and not flags and not (offset | length) & unaligned and magic == 0x25609513 \
                    and 0 < length <= MAX_DIRECT_BYTES and offset + length <= size_bytes:
                if not command:
                    reads.append((cookie, offset, length))
                    start += 28
                    room, room_bytes = room - 1, room_bytes - length
                    continue
                if has_batch and length <= MAX_QUICK_WRITE_BYTES:
                    if end - start < 28 + length:
                        break               # the rest of it comes with the next event
                    writes.append((cookie, offset, length, start + 28))
                    start += 28 + length
                    room, room_bytes = room - 1, room_bytes - length
                    continue
            connection.rx_start = start + 28
            in_flight, in_flight_bytes = connection.in_flight, connection.in_flight_bytes
            connection.request(magic, flags, command, cookie, offset, length)
            room -= connection.in_flight - in_flight
            room_bytes -= connection.in_flight_bytes - in_flight_bytes
            start = connection.rx_start
            start += connection.skip(end - start)
            if connection.is_leaving or connection.payload is not None:
                break
        self.served = len(reads) + len(writes)
        if reads:
            free = len(direct.free)
            places = volume.reads_nowait([(offset >> 9, length >> 9) for _, offset, length in reads[:free]])
            left = direct.start(connection, reads[:free], places) + reads[free:]
            connection.in_flight += len(left)
            for read in left:
                connection.read_again(read)
        if writes:
            self._write(writes)
        connection.rx_start = start

    def _write(self, writes: list[GatheredWrite]) -> None:
        # What the volume's batch places becomes one request, its data in one piece; the others each become one.
        connection, batch, pool = self.connection, self.volume.batch, self.reads.pool
        assert batch is not None, "writes gather where the volume has a batch"
        rx = connection.rx
        places = batch.place([(offset >> 9, length >> 9) for _, offset, length, _ in writes], connection.stream)
        placed = [write for write, place in zip(writes, places, strict=True) if place >= 0]
        if placed:
            total = sum([length for _, _, length, _ in placed])
            buffer = pool.take(total)
            data = buffer.data(total)
            filled = 0
            for _, _, length, at in placed:
                data[filled:filled + length] = rx[at:at + length]
                filled += length
            connection.in_flight += len(placed)
            connection.in_flight_bytes += total
            pending = PendingWrites(connection, [cookie for cookie, _, _, _ in placed], buffer, total)
            self.reads.backend.client_ios += 1
            serve_placed(batch.dev, Request(REQ_WRITE, 0, 0, data, 0, connection.stream, pending))
        for write, place in zip(writes, places, strict=True):
            if place < 0:
                connection.write_alone(write)

    # Sending

    def hand_over(self) -> None:
        """Send the replies that lie in slots, if nothing waits before them; what the client does not take now is put
        among what is to be sent.  Raises OSError if the client is gone.
        """
        connection = self.connection
        if connection.replies and (connection.out or not self._send_replies()):
            self._keep_replies()

    def _send_replies(self) -> bool:
        # True if all of them left, which is usual; those that did not are still there.
        connection = self.connection
        replies, slots = connection.replies, connection.reply_slots
        if len(replies) > IOV_MAX:
            return False
        try:
            sent = connection.sock.send(replies[0]) if len(replies) == 1 else connection.sock.sendmsg(replies)
        except BlockingIOError:
            return False
        gone = 0
        while gone < len(replies) and sent >= len(replies[gone]):
            sent -= len(replies[gone])
            gone += 1
        self.reads.sent(slots[:gone])
        connection.replies, connection.reply_slots = replies[gone:], slots[gone:]
        if sent:
            connection.replies[0] = connection.replies[0][sent:]
        return not connection.replies

    def _keep_replies(self) -> None:
        # The client does not take them now: their slots are free, their buffers are not.
        connection = self.connection
        for reply, slot in zip(connection.replies, connection.reply_slots, strict=True):
            buffer = self.reads.keep(slot)
            connection.in_flight_bytes += buffer.capacity_bytes
            connection.out.append((reply, buffer))
        connection.replies, connection.reply_slots = [], []
