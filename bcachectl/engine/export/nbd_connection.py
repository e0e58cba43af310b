# SPDX-License-Identifier: GPL-2.0-only
"""`Connection`: one NBD client of `bcachectl.engine.export.nbd.NbdServer`.

Its life:

1. `bcachectl.engine.export.nbd_handshake.Handshake` talks until an export is chosen.
2. Transmission.  One ``recv_into`` takes all that has come, `Connection._parse` serves every whole request in it:

   * a read that `bcachectl.engine.front.Volume.reads_nowait` knows at once is read from the page cache straight behind
     its reply header in the transmit arena: no object is made, nothing is copied in Python, and one ``send`` carries
     all such replies of a turn;
   * on a cache device that goes past the page cache the reads of a turn are started together, and answered when they
     have ended (`bcachectl.engine.export.nbd_direct`);
   * small writes are gathered; at the end of the turn `Connection._write_batch` offers them to the volume's
     `bcachectl.engine.write_batch.WriteBatch`, and writes what that places straight from the receive buffer; past the
     page cache `Connection._write_directly` copies it to memory that a device can read, and the engine writes it;
   * everything else becomes a `bcachectl.engine.front.Request`, whose tag is a `_Pending`.  Its data lies in a pooled
     buffer that has room for the reply's header.  A write too large to be in the receive buffer as a whole is
     received straight into that buffer.

3. Answers gather in ``out`` until `Connection.flush`.  Whoever has its answers usually asks again within microseconds,
   and to be woken up costs more than that; so a connection that is alone, with an engine that has nothing else to do,
   looks again for `SPIN_NS` before it goes back to the loop (`Connection._stay`).  Looking in vain makes it look more
   and more seldom.
4. The client says goodbye (what is in flight is finished and sent), or vanishes (what is in flight goes nowhere).

A client may be slow, hostile, or both.  So everything has a limit: what is in flight, what waits to be sent.  At a
limit the connection is ``blocked``: it parses no further, although whole requests may lie in the receive buffer.  No
event will come for those, hence every `Connection.flush` that makes room parses again; forgetting that is a hang.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import socket
from collections import deque
from itertools import islice
from struct import pack
from time import monotonic_ns
from typing import TYPE_CHECKING

from bcachectl.engine.export import nbd_wire as wire
from bcachectl.engine.export.buffers import PAGE_BYTES, Buffer
from bcachectl.engine.export.nbd_direct import MAX_DIRECT_BYTES, DirectReads, Read
from bcachectl.engine.export.nbd_handshake import Handshake
from bcachectl.engine.front import (
    EXTENT_CLEAN,
    EXTENT_DIRTY,
    NOT_NOW,
    REQ_DISCARD,
    REQ_FLUSH,
    REQ_FUA,
    REQ_READ,
    REQ_STATUS,
    REQ_WRITE,
    REQ_WRITE_ZEROES,
    Request,
    Volume,
)

if TYPE_CHECKING:
    from bcachectl.engine.export.nbd import NbdServer

RX_BYTES = 256 << 10
ARENA_BYTES = 2 << 20
"""Transmit arena of a connection: replies to reads that were served at once."""
LARGE_BYTES = 64 << 10
"""From this size on a quick reply's data is page-aligned, which the kernel copies faster, and sent at once."""
MAX_QUICK_BYTES = 1 << 20
"""A longer read takes the way of all other requests."""
MAX_QUICK_WRITE_BYTES = 64 << 10
"""A longer write takes the way of all other requests."""
MAX_BATCH = 64
RECEIVES_PER_TURN = 16
PARSES_PER_TURN = 8
"""So one client that asks for much and takes it quickly does not keep the others waiting."""
SPIN_NS = 50_000
"""How long a connection looks for the next request before it lets the loop sleep."""
STAY_NS = 500_000
"""How long it may keep the loop waiting in all, while requests come."""
SPIN_REQUESTS_MAX = 2
SPINS_SKIPPED_MAX = 256
MAX_IN_FLIGHT = 1024
MAX_IN_FLIGHT_BYTES = 64 << 20
MAX_UNSENT = 4096
"""Answers that a client has not taken yet."""
MAX_STATUS_BYTES = 1 << 30
"""How much of a block status request is answered; a client asks again for the rest."""
_IOV_MAX = 512

_CACHE_STATES = {EXTENT_CLEAN: 1, EXTENT_DIRTY: 2}
"""Flags of the context ``bcachectl:cache``: 0 not in the cache, 1 clean, 2 dirty."""

# Which request flags each command may carry.
_ALLOWED_FLAGS = {
    wire.CMD_READ: wire.CMD_FLAG_DF | wire.CMD_FLAG_FUA,
    wire.CMD_WRITE: wire.CMD_FLAG_FUA,
    wire.CMD_FLUSH: wire.CMD_FLAG_FUA,
    wire.CMD_TRIM: wire.CMD_FLAG_FUA,
    wire.CMD_WRITE_ZEROES: wire.CMD_FLAG_FUA | wire.CMD_FLAG_NO_HOLE | wire.CMD_FLAG_FAST_ZERO,
    wire.CMD_BLOCK_STATUS: wire.CMD_FLAG_REQ_ONE | wire.CMD_FLAG_FUA,
}
_OPERATIONS = {
    wire.CMD_READ: REQ_READ, wire.CMD_WRITE: REQ_WRITE, wire.CMD_FLUSH: REQ_FLUSH, wire.CMD_TRIM: REQ_DISCARD,
    wire.CMD_WRITE_ZEROES: REQ_WRITE_ZEROES, wire.CMD_BLOCK_STATUS: REQ_STATUS,
}
_Write = tuple[int, int, int, int]
"""A write whose payload is in the receive buffer: cookie, offset, length, where the payload begins."""
_WRITING = frozenset((wire.CMD_WRITE, wire.CMD_TRIM, wire.CMD_WRITE_ZEROES))


class _Pending:
    # A request in flight: the tag of a `Request`.
    __slots__ = ("connection", "cookie", "flags", "length", "buffer")

    def __init__(self, connection: Connection, cookie: int, flags: int, length: int, buffer: Buffer | None) -> None:
        self.connection = connection
        self.cookie = cookie
        self.flags = flags
        self.length = length
        self.buffer = buffer

    def answered(self, request: Request) -> None:
        """The engine has completed the request."""
        self.connection.answer(self, request)


class _PendingWrites:
    # Writes in flight that the engine writes together: the tag of their one `Request`.
    __slots__ = ("connection", "cookies", "buffer", "length")

    def __init__(self, connection: Connection, cookies: list[int], buffer: Buffer, length: int) -> None:
        self.connection = connection
        self.cookies = cookies
        self.buffer = buffer
        self.length = length

    def answered(self, request: Request) -> None:
        """The engine has completed them."""
        self.connection.answer_writes(self, request.error)


class Connection:
    """One client."""

    def __init__(self, server: NbdServer, sock: socket.socket, serial: int) -> None:
        self.server = server
        self.sock = sock
        self.fd = sock.fileno()
        self.stream = serial & 0xFFFF
        self.handshake = Handshake(server.volumes, server.block_bytes)
        self.volume: Volume | None = None
        self.size_bytes = 0
        self.is_open = True
        self.is_leaving = False             # parses nothing any more; closes when all is answered and sent
        self.blocked = False
        self.in_flight = 0
        self.in_flight_bytes = 0
        self.out: deque[tuple[memoryview, Buffer | None]] = deque()
        self.is_structured = False
        self.replies: list[memoryview] = []         # to direct reads, each in a slot
        self.reply_slots: list[int] = []
        self._rx = memoryview(bytearray(RX_BYTES))
        self._rx_start = self._rx_end = 0
        self._skip_bytes = 0                # of a refused write's payload
        self._spins_skipped = 0             # so many turns pass between two spins in vain
        self._turns_to_spin = 0
        self._served = 0                    # quick requests of the last parse
        self._payload: tuple[_Pending, memoryview, int, int] | None = None      # with sector and bytes received
        self._arena = memoryview(bytearray(0))
        self._arena_queued = self._arena_end = 0      # what is between them is not yet in `out`
        self._events = select.EPOLLIN
        self.out.append((memoryview(bytes(self.handshake.out)), None))
        self.handshake.out.clear()

    # Receiving

    def on_ready(self, fd: int, events: int) -> None:
        """The socket is readable, writable, or gone."""
        if events & select.EPOLLIN and not self.blocked and not self.is_leaving:
            self._receive()
        elif events & (select.EPOLLHUP | select.EPOLLERR):
            self.close()
        if self.is_open:
            self.flush()
            if self._may_stay():
                self._turns_to_spin -= 1
                if self._turns_to_spin < 0:
                    self._stay()

    def _may_stay(self) -> bool:
        # Nobody else waits for anything, and the next that can happen here is a request.  A client that keeps many in
        # flight is better served by a turn of the loop, in which more of them gather.
        loop = self.server.loop
        return (self.is_open and 0 < self._served <= SPIN_REQUESTS_MAX and len(self.server.connections) == 1
                and not (self.in_flight or self.out or self.blocked or self.is_leaving)
                and not (loop.sched.ready or loop.sched.outbox or loop.backend.pending()))

    def _stay(self) -> None:
        # Serves what comes within `SPIN_NS` of the last answer, without a turn of the loop.
        now_ns = monotonic_ns()
        leave_ns, spin_end_ns = now_ns + STAY_NS, now_ns + SPIN_NS
        receive, rx = self.sock.recv_into, self._rx
        while True:
            try:
                count = receive(rx[self._rx_end:])
            except BlockingIOError:
                if monotonic_ns() < spin_end_ns:
                    continue
                self._spins_skipped = min(2 * self._spins_skipped + 1, SPINS_SKIPPED_MAX)
                self._turns_to_spin = self._spins_skipped
                return
            except OSError:
                count = 0
            if not count:
                self.close()
                return
            self._rx_end += count
            self._spins_skipped = 0
            self._parse()
            if self.is_open:
                self.flush()
            now_ns = monotonic_ns()
            if now_ns > leave_ns or not self._may_stay():
                return
            spin_end_ns = now_ns + SPIN_NS

    def _receive(self) -> None:
        # One call for requests, since all that has come fits; for the payload of a large write as many as it takes.
        try:
            for _ in range(RECEIVES_PER_TURN):
                if self._payload is not None:
                    pending, data, sector, got = self._payload
                    count = self.sock.recv_into(data[got:])
                    if got + count < len(data):
                        self._payload = pending, data, sector, got + count
                    else:
                        self._payload = None
                        self._submit(REQ_WRITE, pending, sector, data)
                else:
                    count = self.sock.recv_into(self._rx[self._rx_end:])
                    self._rx_end += count
                    self._parse()
                if not count:
                    self.close()
                if self._payload is None or not self.is_open:
                    return
        except BlockingIOError:
            return
        except OSError:
            self.close()

    def _parse(self) -> None:
        # Serve every whole request in the receive buffer, then move what is left to its front.
        self.blocked = False
        if self.volume is None:
            self._negotiate()
        if self.volume is not None and self.is_open and self.server.direct_reads is not None:
            self._transmit_directly(self.volume, self.server.direct_reads)
        elif self.volume is not None and self.is_open:
            self._transmit()
        start, end = self._rx_start, self._rx_end
        if start == end:
            self._rx_start = self._rx_end = 0
        elif start:
            self._rx[:end - start] = self._rx[start:end]
            self._rx_start, self._rx_end = 0, end - start

    def _negotiate(self) -> None:
        handshake = self.handshake
        while not handshake.is_over and handshake.volume is None:
            used = handshake.feed(self._rx[self._rx_start:self._rx_end])
            self._rx_start += used
            if not used:
                break
        if handshake.out:
            self.out.append((memoryview(bytes(handshake.out)), None))
            handshake.out.clear()
        if handshake.is_over:
            self.is_leaving = True
        elif handshake.volume is not None:
            self.choose(handshake.volume)

    def choose(self, volume: Volume) -> None:
        """The negotiation is over: requests for the volume follow."""
        self.volume = volume
        self.is_structured = self.handshake.structured
        self.size_bytes = volume.size_sectors << 9
        # Behind the replies to reads there is always room for those to one batch of writes.
        self._arena = memoryview(mmap.mmap(-1, ARENA_BYTES + MAX_BATCH * wire.SIMPLE_REPLY.size))

    def _transmit(self) -> None:
        # The hot loop: everything it needs is a local variable.
        volume, rx = self.volume, self._rx
        assert volume is not None, "a connection that transmits has a volume"
        quick_fd, unaligned = self.server.quick_fd, self.handshake.block_bytes - 1
        unpack_request = wire.REQUEST.unpack_from
        size_bytes, start, end, filled = self.size_bytes, self._rx_start, self._rx_end, self._arena_end
        start += self._skip(end - start)
        batch: list[_Write] = []
        self._served = 0
        has_batch = volume.batch is not None and self.server.quick_write_fd >= 0
        while end - start >= 28:
            magic, flags, command, cookie, offset, length = unpack_request(rx, start)
            if command == 0 and quick_fd >= 0:
                used, filled = self._read_quickly(start, end, filled)
                start += used
                if not self.is_open:
                    return
                if self.blocked:
                    break
                if used:
                    continue
            elif command == 1 and not flags and has_batch and not (offset | length) & unaligned \
                    and magic == 0x25609513 and 0 < length <= MAX_QUICK_WRITE_BYTES and offset + length <= size_bytes:
                if end - start < 28 + length:
                    break                   # the rest of it comes with the next event
                if filled > ARENA_BYTES or not self._has_room():
                    self.blocked = True
                    break
                batch.append((cookie, offset, length, start + 28))
                start += 28 + length
                self._served += 1
                if len(batch) == MAX_BATCH:
                    filled = self._write_batch(batch, filled)
                    batch = []
                continue
            if not self._has_room():
                self.blocked = True
                break
            self._rx_start = start + 28
            self._request(magic, flags, command, cookie, offset, length)
            start = self._rx_start
            start += self._skip(end - start)
            if self.is_leaving or self._payload is not None:
                break
        self._arena_end = self._write_batch(batch, filled) if batch else filled
        self._rx_start = start

    def _read_quickly(self, start: int, end: int, filled: int) -> tuple[int, int]:
        # Serves the reads at the head of what has come, as far as they are quick: the hits from the page cache, the
        # others as requests.  How many bytes of requests were used, and where the arena is filled to.
        volume, arena, unaligned, size_bytes = self.volume, self._arena, self.handshake.block_bytes - 1, self.size_bytes
        assert volume is not None, "a connection that transmits has a volume"
        fd, nowait, preadv = self.server.quick_fd, self.server.nowait_flag, os.preadv
        structured = self.handshake.structured
        pack_chunk, pack_simple = wire.DATA_CHUNK.pack_into, wire.SIMPLE_REPLY.pack_into
        header_bytes = wire.DATA_CHUNK.size if structured else wire.SIMPLE_REPLY.size
        room = ARENA_BYTES - filled
        asked: list[tuple[int, int]] = []
        reads: list[tuple[int, int]] = []
        for magic, flags, command, cookie, offset, length in \
                wire.REQUEST.iter_unpack(self._rx[start:end - (end - start) % wire.REQUEST.size]):
            if command or flags or (offset | length) & unaligned or magic != 0x25609513 \
                    or not 0 < length <= MAX_QUICK_BYTES or offset + length > size_bytes:
                break
            room -= header_bytes + length if length < LARGE_BYTES else header_bytes + length + PAGE_BYTES
            if room < 0:
                self.blocked = not reads
                break
            asked.append((cookie, offset))
            reads.append((offset >> 9, length >> 9))
            if length >= LARGE_BYTES:
                break                       # it is sent at once
        if not reads:
            return 0, filled
        used = 0
        for (cookie, offset), (_, nsectors), place in zip(asked, reads, volume.reads_nowait(reads), strict=True):
            length = nsectors << 9
            data_start = filled + header_bytes
            if length >= LARGE_BYTES:
                data_start = (data_start + PAGE_BYTES - 1) & -PAGE_BYTES
            got = 0
            if place >= 0:
                try:
                    got = preadv(fd, (arena[data_start:data_start + length],), place, nowait)
                except OSError:
                    got = 0
            if got != length:
                if not self._has_room():
                    self.blocked = True
                    break
                self._request(wire.REQUEST_MAGIC, 0, wire.CMD_READ, cookie, offset, length)
            else:
                header_start = data_start - header_bytes
                if header_start != filled:
                    self._queue_arena(filled, header_start)
                if structured:
                    pack_chunk(arena, header_start, wire.CHUNK_MAGIC, 1, 1, cookie, length + 8, offset)
                else:
                    pack_simple(arena, header_start, wire.SIMPLE_REPLY_MAGIC, 0, cookie)
                filled = data_start + length
                self._served += 1
            used += wire.REQUEST.size
        if reads[-1][1] << 9 >= LARGE_BYTES and not self.blocked:
            self._arena_end = filled
            self._send()
            filled = self._arena_end
        return used, filled

    def _write_batch(self, batch: list[_Write], filled: int) -> int:
        # Does at once what the volume's batch takes and puts the replies in the arena; the others become requests.
        # Returns where the arena is filled to.
        assert self.volume is not None and self.volume.batch is not None, "writes gather where the volume has a batch"
        quick, rx = self.volume.batch, self._rx
        places = quick.place([(offset >> 9, length >> 9) for _, offset, length, _ in batch], self.stream)
        began_ns = monotonic_ns()
        if _write_places(self.server.quick_write_fd, places, [rx[at:at + length] for _, _, length, at in batch]):
            quick.commit(monotonic_ns() - began_ns)
        else:
            quick.abandon()
            places = [NOT_NOW] * len(batch)
        pack_simple, arena = wire.SIMPLE_REPLY.pack_into, self._arena
        for write, place in zip(batch, places, strict=True):
            if place >= 0:
                pack_simple(arena, filled, wire.SIMPLE_REPLY_MAGIC, 0, write[0])
                filled += 16
            else:
                self._write_alone(write)
        return filled

    def _transmit_directly(self, volume: Volume, direct: DirectReads) -> None:
        # As `_transmit`, for a cache device that goes past the page cache: what is plain is gathered and begins at the
        # end.  Nothing of it is answered before, so the order among it and the others is free.
        rx, unpack_request, unaligned = self._rx, wire.REQUEST.unpack_from, self.handshake.block_bytes - 1
        size_bytes, start, end = self.size_bytes, self._rx_start, self._rx_end
        has_batch = volume.batch is not None and not volume.read_only
        start += self._skip(end - start)
        reads: list[Read] = []
        writes: list[_Write] = []
        room, room_bytes = MAX_IN_FLIGHT - self.in_flight, MAX_IN_FLIGHT_BYTES - self.in_flight_bytes
        while end - start >= 28:
            if room <= 0 or room_bytes <= 0 or len(self.out) >= MAX_UNSENT:
                self.blocked = True
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
            self._rx_start = start + 28
            in_flight, in_flight_bytes = self.in_flight, self.in_flight_bytes
            self._request(magic, flags, command, cookie, offset, length)
            room, room_bytes = room - self.in_flight + in_flight, room_bytes - self.in_flight_bytes + in_flight_bytes
            start = self._rx_start
            start += self._skip(end - start)
            if self.is_leaving or self._payload is not None:
                break
        self._served = len(reads) + len(writes)
        if reads:
            free = len(direct.free)
            places = volume.reads_nowait([(offset >> 9, length >> 9) for _, offset, length in reads[:free]])
            left = direct.start(self, reads[:free], places) + reads[free:]
            self.in_flight += len(left)
            for read in left:
                self.read_again(read)
        if writes:
            self._write_directly(volume, writes)
        self._rx_start = start

    def _write_directly(self, volume: Volume, writes: list[_Write]) -> None:
        # What the volume's batch places becomes one request, its data in one piece; the others each become one.
        batch, pool, rx = volume.batch, self.server.pool, self._rx
        assert batch is not None, "writes gather where the volume has a batch"
        places = batch.place([(offset >> 9, length >> 9) for _, offset, length, _ in writes], self.stream)
        placed = [write for write, place in zip(writes, places, strict=True) if place >= 0]
        if placed:
            total = sum([length for _, _, length, _ in placed])
            buffer = pool.take(total)
            data = buffer.data(total)
            filled = 0
            for _, _, length, at in placed:
                data[filled:filled + length] = rx[at:at + length]
                filled += length
            self.in_flight += len(placed)
            self.in_flight_bytes += total
            pending = _PendingWrites(self, [cookie for cookie, _, _, _ in placed], buffer, total)
            batch.serve(Request(REQ_WRITE, 0, 0, data, 0, self.stream, pending))
        for write, place in zip(writes, places, strict=True):
            if place < 0:
                self._write_alone(write)

    def _write_alone(self, write: _Write) -> None:
        cookie, offset, length, at = write
        buffer = self.server.pool.take(length)
        data = buffer.data(length)
        data[:] = self._rx[at:at + length]
        self.in_flight += 1
        self.in_flight_bytes += length
        self._submit(REQ_WRITE, _Pending(self, cookie, 0, length, buffer), offset >> 9, data)

    def _skip(self, available_bytes: int) -> int:
        # How much of what has come belongs to the payload of a refused write.
        skipped = min(self._skip_bytes, available_bytes)
        self._skip_bytes -= skipped
        return skipped

    def _request(self, magic: int, flags: int, command: int, cookie: int, offset: int, length: int) -> None:
        # A request that is not a quick read.  Its header has left the receive buffer; a payload follows there.
        if magic != wire.REQUEST_MAGIC or command == wire.CMD_DISC:
            self.is_leaving = True
            return
        error = self._refusal(flags, command, offset, length)
        if error:
            self._skip_bytes = length if command == wire.CMD_WRITE else 0
            self._send_error(cookie, error, is_read=command in (wire.CMD_READ, wire.CMD_BLOCK_STATUS))
            return
        if command == wire.CMD_BLOCK_STATUS:
            length = min(length, MAX_STATUS_BYTES)
        has_data = command in (wire.CMD_READ, wire.CMD_WRITE)
        buffer = self.server.pool.take(length) if has_data else None
        pending = _Pending(self, cookie, flags, length, buffer)
        self.in_flight += 1
        if buffer is None:
            self._submit(_OPERATIONS[command], pending, offset >> 9, None)
            return
        self.in_flight_bytes += length
        data = buffer.data(length)
        if command == wire.CMD_WRITE:
            start = self._rx_start
            there = min(length, self._rx_end - start)
            data[:there] = self._rx[start:start + there]
            self._rx_start = start + there
            if there < length:
                self._payload = pending, data, offset >> 9, there
                return
        self._submit(_OPERATIONS[command], pending, offset >> 9, data)

    def _refusal(self, flags: int, command: int, offset: int, length: int) -> int:
        # The errno that this request gets without the engine seeing it, or 0.
        assert self.volume is not None, "a connection that transmits has a volume"
        if command not in _OPERATIONS or flags & ~_ALLOWED_FLAGS[command]:
            return errno.EINVAL
        if command in _WRITING and self.volume.read_only:
            return errno.EPERM
        if command == wire.CMD_FLUSH:
            return errno.EINVAL if offset or length else 0
        if (offset | length) & (self.handshake.block_bytes - 1) or not length:
            return errno.EINVAL
        if offset + length > self.size_bytes:
            return errno.ENOSPC if command in (wire.CMD_WRITE, wire.CMD_WRITE_ZEROES) else errno.EINVAL
        if command in (wire.CMD_READ, wire.CMD_WRITE) and length > wire.MAX_PAYLOAD_BYTES:
            return errno.EINVAL
        if flags & wire.CMD_FLAG_FAST_ZERO:
            # Zeros may have to be written; a client that asks for fast ones rather writes them itself.
            return errno.EOPNOTSUPP
        if command == wire.CMD_BLOCK_STATUS and not self.handshake.contexts:
            return errno.EINVAL
        return 0

    def _submit(self, operation: int, pending: _Pending, sector: int, data: memoryview | None) -> None:
        assert self.volume is not None, "a connection that transmits has a volume"
        flags = REQ_FUA if pending.flags & wire.CMD_FLAG_FUA and operation not in (REQ_READ, REQ_STATUS) else 0
        self.volume.submit(Request(operation, sector, pending.length >> 9, data, flags, self.stream, pending))

    # Answering

    def answer(self, pending: _Pending, request: Request) -> None:
        """Put the reply to a completed request among what is to be sent."""
        self.in_flight -= 1
        buffer = pending.buffer
        if buffer is not None:
            self.in_flight_bytes -= pending.length
        if not self.is_open:
            if buffer is not None:
                self.server.pool.release(buffer)
            return
        is_read = request.op == REQ_READ
        if is_read and not request.error:
            assert buffer is not None, "a read has a buffer"
            self._send_data(pending, buffer, request.sector << 9)
            return
        if buffer is not None:
            self.server.pool.release(buffer)
        if request.error:
            self._send_error(pending.cookie, wire.wire_error(request.error),
                             is_read=is_read or request.op == REQ_STATUS)
        elif request.op == REQ_STATUS:
            self._send_status(pending, request)
        else:
            self.out.append((memoryview(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, pending.cookie)), None))
        self.server.active.add(self)

    def answer_writes(self, pending: _PendingWrites, error: int) -> None:
        """Put the replies to writes that the engine has written together among what is to be sent."""
        self.in_flight -= len(pending.cookies)
        self.in_flight_bytes -= pending.length
        self.server.pool.release(pending.buffer)
        if self.is_open:
            pack, code = wire.SIMPLE_REPLY.pack, wire.wire_error(error) if error else 0
            self.out.append((memoryview(b"".join([pack(0x67446698, code, cookie) for cookie in pending.cookies])),
                             None))
            self.server.active.add(self)

    def read_again(self, read: Read) -> None:
        """A read past the engine's tasks was not to be had: it becomes a request, in flight as before."""
        cookie, offset, length = read
        buffer = self.server.pool.take(length)
        self.in_flight_bytes += length
        self._submit(REQ_READ, _Pending(self, cookie, 0, length, buffer), offset >> 9, buffer.data(length))

    def _send_data(self, pending: _Pending, buffer: Buffer, offset: int) -> None:
        # The bytes stay counted as in flight until they are sent: they are memory that the client makes us hold.
        if self.handshake.structured:
            start = PAGE_BYTES - wire.DATA_CHUNK.size
            wire.DATA_CHUNK.pack_into(buffer.memory, start, wire.CHUNK_MAGIC, wire.CHUNK_DONE,
                                      wire.CHUNK_OFFSET_DATA, pending.cookie, pending.length + 8, offset)
        else:
            start = PAGE_BYTES - wire.SIMPLE_REPLY.size
            wire.SIMPLE_REPLY.pack_into(buffer.memory, start, wire.SIMPLE_REPLY_MAGIC, 0, pending.cookie)
        self.in_flight_bytes += buffer.capacity_bytes
        self.out.append((buffer.view[start:PAGE_BYTES + pending.length], buffer))
        self.server.active.add(self)

    def _send_error(self, cookie: int, error: int, *, is_read: bool) -> None:
        if is_read and self.handshake.structured:
            reply = wire.ERROR_CHUNK.pack(wire.CHUNK_MAGIC, wire.CHUNK_DONE, wire.CHUNK_ERROR, cookie, 6, error, 0)
        else:
            reply = wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, cookie)
        self.out.append((memoryview(reply), None))
        self.server.active.add(self)

    def _send_status(self, pending: _Pending, request: Request) -> None:
        contexts = self.handshake.contexts
        for context in contexts:
            runs: list[tuple[int, int]] = []
            for nsectors, kind in request.extents:
                # A cached device's holes are on the backing device, so all of it counts as allocated.
                state = _CACHE_STATES.get(kind, 0) if context == wire.CONTEXT_CACHE else 0
                if runs and runs[-1][1] == state:
                    runs[-1] = runs[-1][0] + (nsectors << 9), state
                else:
                    runs.append((nsectors << 9, state))
            if pending.flags & wire.CMD_FLAG_REQ_ONE:
                del runs[1:]
            done = wire.CHUNK_DONE if context == contexts[-1] else 0
            payload = pack(">I", wire.CONTEXT_IDS[context]) + b"".join(pack(">II", *run) for run in runs)
            self.out.append((memoryview(wire.CHUNK.pack(wire.CHUNK_MAGIC, done, wire.CHUNK_BLOCK_STATUS,
                                                        pending.cookie, len(payload)) + payload), None))

    def flush(self) -> None:
        """Send what there is; parse what waited for room; then wait for the events that matter now."""
        for _ in range(PARSES_PER_TURN):
            if not (self.is_open and self._send() and self.blocked and self._may_go_on()):
                break
            self._parse()
        if not self.is_open:
            return
        is_sent = not self.out
        if self.is_leaving and is_sent and not self.in_flight:
            self.close()
            return
        events = 0 if self.blocked or self.is_leaving else select.EPOLLIN
        if not is_sent or (self.blocked and self._may_go_on()):
            # Nothing to send, but requests to parse: the socket is writable at once, and the next turn goes on here.
            events |= select.EPOLLOUT
        if events != self._events:
            self._events = events
            self.server.loop.modify(self.fd, events)

    def _may_go_on(self) -> bool:
        return not self.is_leaving and self._has_room()

    def _has_room(self) -> bool:
        return (self.in_flight < MAX_IN_FLIGHT and self.in_flight_bytes < MAX_IN_FLIGHT_BYTES
                and len(self.out) < MAX_UNSENT)

    def _send(self) -> bool:
        # True if everything has left.
        out = self.out
        self._queue_arena(self._arena_end, self._arena_end)
        try:
            if self.replies and (out or not self._send_replies()):
                self._keep_replies()
            while out:
                if len(out) == 1:
                    sent = self.sock.send(out[0][0])
                else:
                    sent = self.sock.sendmsg([segment for segment, _ in islice(out, _IOV_MAX)])
                while out and sent >= len(out[0][0]):
                    segment, buffer = out.popleft()
                    sent -= len(segment)
                    if buffer is not None:
                        self._release_sent(buffer)
                if sent:
                    out[0] = out[0][0][sent:], out[0][1]
        except BlockingIOError:
            return False
        except OSError:
            self.close()
            return False
        self._arena_queued = self._arena_end = 0
        return True

    def _send_replies(self) -> bool:
        # True if all of them left, which is usual; those that did not are still there.
        replies, slots = self.replies, self.reply_slots
        if len(replies) > _IOV_MAX:
            return False
        try:
            sent = self.sock.send(replies[0]) if len(replies) == 1 else self.sock.sendmsg(replies)
        except BlockingIOError:
            return False
        gone = 0
        while gone < len(replies) and sent >= len(replies[gone]):
            sent -= len(replies[gone])
            gone += 1
        assert self.server.direct_reads is not None, "replies with slots are those of direct reads"
        self.server.direct_reads.sent(slots[:gone])
        self.replies, self.reply_slots = replies[gone:], slots[gone:]
        if sent:
            self.replies[0] = self.replies[0][sent:]
        return not self.replies

    def _keep_replies(self) -> None:
        # The client does not take them now: their slots are free, their buffers are not.
        assert self.server.direct_reads is not None, "replies with slots are those of direct reads"
        for reply, slot in zip(self.replies, self.reply_slots, strict=True):
            buffer = self.server.direct_reads.keep(slot)
            self.in_flight_bytes += buffer.capacity_bytes
            self.out.append((reply, buffer))
        self.replies, self.reply_slots = [], []

    def _queue_arena(self, end: int, start: int) -> None:
        # What the arena holds up to ``end`` is to be sent; what is sent after it begins at ``start``.
        if end > self._arena_queued:
            self.out.append((self._arena[self._arena_queued:end], None))
        self._arena_queued = start

    def _release_sent(self, buffer: Buffer) -> None:
        self.in_flight_bytes -= buffer.capacity_bytes
        self.server.pool.release(buffer)

    def leave(self) -> None:
        """Parse nothing any more; close as soon as all is answered and sent."""
        self.is_leaving = True
        if self._payload is not None:
            self._drop_payload()
        self.flush()

    def close(self) -> None:
        """Close at once.  Requests in flight go on in the engine; their answers go nowhere."""
        if not self.is_open:
            return
        self.is_open = False
        if self._payload is not None:
            self._drop_payload()
        for _, buffer in self.out:
            if buffer is not None:
                self._release_sent(buffer)
        self.out.clear()
        if self.replies:
            assert self.server.direct_reads is not None, "replies with slots are those of direct reads"
            self.server.direct_reads.sent(self.reply_slots)
            self.replies, self.reply_slots = [], []
        self.server.forget(self)
        self.sock.close()

    def _drop_payload(self) -> None:
        # The rest of the write will not come: the write never was.
        assert self._payload is not None, "a payload is under way"
        pending = self._payload[0]
        self._payload = None
        self.in_flight -= 1
        self.in_flight_bytes -= pending.length
        assert pending.buffer is not None, "a write has a buffer"
        self.server.pool.release(pending.buffer)


def _write_places(fd: int, places: list[int], payloads: list[memoryview]) -> bool:
    # Writes each payload that has a place; what lies side by side goes in one call.  False if anything failed.
    side_by_side: list[memoryview] = []
    first = end = NOT_NOW
    for place, payload in [*zip(places, payloads, strict=True), (NOT_NOW, memoryview(b""))]:
        if place == NOT_NOW and payload:
            continue
        if place != end:
            try:
                if side_by_side and os.pwritev(fd, side_by_side, first) != end - first:
                    return False
            except OSError:
                return False
            side_by_side, first = [], place
        side_by_side.append(payload)
        end = place + len(payload)
    return True
