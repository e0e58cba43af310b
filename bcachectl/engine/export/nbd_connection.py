# SPDX-License-Identifier: GPL-2.0-only
"""`Connection`: one NBD client of `bcachectl.engine.export.nbd.NbdServer`.

Its life:

1. `bcachectl.engine.export.nbd_handshake.Handshake` talks until an export is chosen.
2. Transmission.  One ``recv_into`` takes all that has come, and every whole request in it is served: those that are
   plain by `QuickTransmission` if the cache device is in the page cache, by `DirectTransmission` if it goes past it;
   all others become a `bcachectl.engine.front.Request` each (`Connection.request`), whose tag is a `Pending`.  Its data
   lies in a pooled buffer that has room for the reply's header.  A write too large to be in the receive buffer as a
   whole is received straight into that buffer.
3. Answers gather in ``out`` until `Connection.flush`.  Whoever has its answers usually asks again within microseconds,
   and to be woken up costs more than that; so a connection that is alone, with an engine that has nothing else to do,
   looks again for `SPIN_NS` before it goes back to the loop (`Connection._stay`).  Looking in vain makes it look more
   and more seldom.
4. The client says goodbye (what is in flight is finished and sent), or vanishes (what is in flight goes nowhere).

A client may be slow, hostile, or both, so everything has a limit (`bcachectl.engine.export.nbd_request`).  At a limit
the connection is ``blocked``: it parses no further, although whole requests may lie in the receive buffer.  No event
will come for those, hence every `Connection.flush` that makes room parses again; forgetting that is a hang.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from itertools import islice
from time import monotonic_ns
from typing import TYPE_CHECKING

from bcachectl.engine.export import nbd_wire as wire
from bcachectl.engine.export.buffers import PAGE_BYTES, Buffer
from bcachectl.engine.export.nbd_direct import IOV_MAX, DirectTransmission, Read
from bcachectl.engine.export.nbd_handshake import Handshake
from bcachectl.engine.export.nbd_quick import QuickTransmission
from bcachectl.engine.export.nbd_request import (
    MAX_IN_FLIGHT,
    MAX_IN_FLIGHT_BYTES,
    MAX_STATUS_BYTES,
    MAX_UNSENT,
    OPERATIONS,
    RX_BYTES,
    GatheredWrite,
    Pending,
    PendingWrites,
    refusal,
    status_reply,
)
from bcachectl.engine.front import REQ_FUA, REQ_READ, REQ_STATUS, REQ_WRITE, Request, Volume

if TYPE_CHECKING:
    from bcachectl.engine.export.nbd import NbdServer

RECEIVES_PER_TURN = 16
PARSES_PER_TURN = 8
"""So one client that asks for much and takes it quickly does not keep the others waiting."""
SPIN_NS = 50_000
"""How long a connection looks for the next request before it lets the loop sleep."""
STAY_NS = 500_000
"""How long it may keep the loop waiting in all, while requests come."""
SPIN_REQUESTS_MAX = 2
SPINS_SKIPPED_MAX = 256


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
        self.rx = memoryview(bytearray(RX_BYTES))
        self.rx_start = self.rx_end = 0
        self._skip_bytes = 0                # of a refused write's payload
        self._spins_skipped = 0             # so many turns pass between two spins in vain
        self._turns_to_spin = 0
        self.payload: tuple[Pending, memoryview, int, int] | None = None      # with sector and bytes received
        self.transmission: QuickTransmission | DirectTransmission | None = None
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
        return (self.transmission is not None and 0 < self.transmission.served <= SPIN_REQUESTS_MAX
                and len(self.server.connections) == 1
                and not (self.in_flight or self.out or self.blocked or self.is_leaving)
                and not (loop.sched.ready or loop.sched.outbox or loop.backend.pending()))

    def _stay(self) -> None:
        # Serves what comes within `SPIN_NS` of the last answer, without a turn of the loop.
        now_ns = monotonic_ns()
        leave_ns, spin_end_ns = now_ns + STAY_NS, now_ns + SPIN_NS
        receive, rx = self.sock.recv_into, self.rx
        while True:
            try:
                count = receive(rx[self.rx_end:])
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
            self.rx_end += count
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
                if self.payload is not None:
                    pending, data, sector, got = self.payload
                    count = self.sock.recv_into(data[got:])
                    if got + count < len(data):
                        self.payload = pending, data, sector, got + count
                    else:
                        self.payload = None
                        self._submit(REQ_WRITE, pending, sector, data)
                else:
                    count = self.sock.recv_into(self.rx[self.rx_end:])
                    self.rx_end += count
                    self._parse()
                if not count:
                    self.close()
                if self.payload is None or not self.is_open:
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
        if self.transmission is not None:
            self.transmission.serve()
        start, end = self.rx_start, self.rx_end
        if start == end:
            self.rx_start = self.rx_end = 0
        elif start:
            self.rx[:end - start] = self.rx[start:end]
            self.rx_start, self.rx_end = 0, end - start

    def _negotiate(self) -> None:
        handshake = self.handshake
        while not handshake.is_over and handshake.volume is None:
            used = handshake.feed(self.rx[self.rx_start:self.rx_end])
            self.rx_start += used
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
        direct = self.server.direct_reads
        self.transmission = (QuickTransmission(self, volume) if direct is None
                             else DirectTransmission(self, volume, direct))

    def write_alone(self, write: GatheredWrite) -> None:
        """A gathered write that the batch does not take becomes a request."""
        cookie, offset, length, at = write
        buffer = self.server.pool.take(length)
        data = buffer.data(length)
        data[:] = self.rx[at:at + length]
        self.in_flight += 1
        self.in_flight_bytes += length
        self._submit(REQ_WRITE, Pending(self, cookie, 0, length, buffer), offset >> 9, data)

    def skip(self, available_bytes: int) -> int:
        """How much of what has come belongs to the payload of a refused write."""
        skipped = min(self._skip_bytes, available_bytes)
        self._skip_bytes -= skipped
        return skipped

    def request(self, magic: int, flags: int, command: int, cookie: int, offset: int, length: int) -> None:
        """The way of all requests.  Its header has left the receive buffer; a payload follows there."""
        if magic != wire.REQUEST_MAGIC or command == wire.CMD_DISC:
            self.is_leaving = True
            return
        error = refusal(self, flags, command, offset, length)
        if error:
            self._skip_bytes = length if command == wire.CMD_WRITE else 0
            self._send_error(cookie, error, is_read=command in (wire.CMD_READ, wire.CMD_BLOCK_STATUS))
            return
        if command == wire.CMD_BLOCK_STATUS:
            length = min(length, MAX_STATUS_BYTES)
        has_data = command in (wire.CMD_READ, wire.CMD_WRITE)
        buffer = self.server.pool.take(length) if has_data else None
        pending = Pending(self, cookie, flags, length, buffer)
        self.in_flight += 1
        if buffer is None:
            self._submit(OPERATIONS[command], pending, offset >> 9, None)
            return
        self.in_flight_bytes += length
        data = buffer.data(length)
        if command == wire.CMD_WRITE:
            start = self.rx_start
            there = min(length, self.rx_end - start)
            data[:there] = self.rx[start:start + there]
            self.rx_start = start + there
            if there < length:
                self.payload = pending, data, offset >> 9, there
                return
        self._submit(OPERATIONS[command], pending, offset >> 9, data)

    def _submit(self, operation: int, pending: Pending, sector: int, data: memoryview | None) -> None:
        assert self.volume is not None, "a connection that transmits has a volume"
        flags = REQ_FUA if pending.flags & wire.CMD_FLAG_FUA and operation not in (REQ_READ, REQ_STATUS) else 0
        self.volume.submit(Request(operation, sector, pending.length >> 9, data, flags, self.stream, pending))

    # Answering

    def answer(self, pending: Pending, request: Request) -> None:
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
            self.out.append((memoryview(status_reply(self.handshake.contexts, pending, request.extents)), None))
        else:
            self.out.append((memoryview(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, pending.cookie)), None))
        self.server.active.add(self)

    def answer_writes(self, pending: PendingWrites, error: int) -> None:
        """Put the replies to writes that the engine has written together among what is to be sent."""
        assert self.server.direct_reads is not None, "only `DirectTransmission` has writes of this kind"
        self.server.direct_reads.backend.client_ios -= 1
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
        self._submit(REQ_READ, Pending(self, cookie, 0, length, buffer), offset >> 9, buffer.data(length))

    def _send_data(self, pending: Pending, buffer: Buffer, offset: int) -> None:
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

    def flush(self) -> None:
        """Send what there is; parse what waited for room; then wait for the events that matter now."""
        for _ in range(PARSES_PER_TURN):
            if not (self.is_open and self.send() and self.blocked and self._may_go_on()):
                break
            self._parse()
        else:
            # What the last of them has answered; if all is parsed now, nothing else would bring us here.
            if self.is_open:
                self.send()
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
        return not self.is_leaving and self.has_room()

    def has_room(self) -> bool:
        """Whether what is in flight and what waits to be sent are below their limits."""
        return (self.in_flight < MAX_IN_FLIGHT and self.in_flight_bytes < MAX_IN_FLIGHT_BYTES
                and len(self.out) < MAX_UNSENT)

    def send(self) -> bool:
        """Send what there is; True if everything has left."""
        out = self.out
        try:
            if self.transmission is not None:
                self.transmission.hand_over()
            while out:
                if len(out) == 1:
                    sent = self.sock.send(out[0][0])
                else:
                    sent = self.sock.sendmsg([segment for segment, _ in islice(out, IOV_MAX)])
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
        return True

    def _release_sent(self, buffer: Buffer) -> None:
        self.in_flight_bytes -= buffer.capacity_bytes
        self.server.pool.release(buffer)

    def leave(self) -> None:
        """Parse nothing any more; close as soon as all is answered and sent."""
        self.is_leaving = True
        if self.payload is not None:
            self._drop_payload()
        self.flush()

    def close(self) -> None:
        """Close at once.  Requests in flight go on in the engine; their answers go nowhere."""
        if not self.is_open:
            return
        self.is_open = False
        self.transmission = None
        if self.payload is not None:
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
        assert self.payload is not None, "a payload is under way"
        pending = self.payload[0]
        self.payload = None
        self.in_flight -= 1
        self.in_flight_bytes -= pending.length
        assert pending.buffer is not None, "a write has a buffer"
        self.server.pool.release(pending.buffer)
