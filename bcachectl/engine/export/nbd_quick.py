# SPDX-License-Identifier: GPL-2.0-only
"""`QuickTransmission`: an NBD client on a cache device in the page cache, where a hit is a copy in memory.

Requests are served as they come, the plain ones without an object each:

* a read that `bcachectl.engine.front.Volume.reads_nowait` knows is read from the page cache straight behind its reply
  header in the transmit arena: nothing is copied in Python, and one ``send`` carries all such replies of a turn;
* small writes are gathered; at the end of the turn they are offered to the volume's
  `bcachectl.engine.write_batch.WriteBatch`, and what that places is written straight from the receive buffer;
* everything else takes the way of all requests (`Connection.request`).

The arena is used from its front to ``_arena_end``; up to ``_arena_queued`` it is in the connection's ``out`` already.
It is empty again when all has left.
"""

from __future__ import annotations

import mmap
import os
from time import monotonic_ns
from typing import TYPE_CHECKING

from bcachectl.engine.export import nbd_wire as wire
from bcachectl.engine.export.buffers import PAGE_BYTES
from bcachectl.engine.export.nbd_request import MAX_QUICK_WRITE_BYTES, GatheredWrite
from bcachectl.engine.front import NOT_NOW, Volume

if TYPE_CHECKING:
    from bcachectl.engine.export.nbd_connection import Connection

ARENA_BYTES = 2 << 20
"""Transmit arena of a connection: replies to reads that were served at once."""
LARGE_BYTES = 64 << 10
"""From this size on a quick reply's data is page-aligned, which the kernel copies faster, and sent at once."""
MAX_QUICK_BYTES = 1 << 20
"""A longer read takes the way of all other requests."""
MAX_BATCH = 64


class QuickTransmission:
    """The transmission of one connection; ``served`` are the quick requests of the last `serve`."""

    def __init__(self, connection: Connection, volume: Volume) -> None:
        self.connection = connection
        self.volume = volume
        self.served = 0
        # Behind the replies to reads there is always room for those to one batch of writes.
        self._arena = memoryview(mmap.mmap(-1, ARENA_BYTES + MAX_BATCH * wire.SIMPLE_REPLY.size))
        self._arena_queued = self._arena_end = 0

    def serve(self) -> None:
        """Serve every whole request in the connection's receive buffer."""
        # The hot loop: everything it needs is a local variable.
        connection, volume = self.connection, self.volume
        rx, server = connection.rx, connection.server
        quick_fd, unaligned = server.quick_fd, connection.handshake.block_bytes - 1
        unpack_request = wire.REQUEST.unpack_from
        size_bytes, start, end, filled = connection.size_bytes, connection.rx_start, connection.rx_end, self._arena_end
        start += connection.skip(end - start)
        batch: list[GatheredWrite] = []
        self.served = 0
        if not connection.out:
            filled = self._use_again()
        has_batch = volume.batch is not None and server.quick_write_fd >= 0
        while end - start >= 28:
            magic, flags, command, cookie, offset, length = unpack_request(rx, start)
            if command == 0 and quick_fd >= 0:
                used, filled = self._read(start, end, filled)
                start += used
                if not connection.is_open:
                    return
                if connection.blocked:
                    break
                if used:
                    continue
            elif command == 1 and not flags and has_batch and not (offset | length) & unaligned \
                    and magic == 0x25609513 and 0 < length <= MAX_QUICK_WRITE_BYTES and offset + length <= size_bytes:
                if end - start < 28 + length:
                    break                   # the rest of it comes with the next event
                if filled > ARENA_BYTES or not connection.has_room():
                    connection.blocked = True
                    break
                batch.append((cookie, offset, length, start + 28))
                start += 28 + length
                self.served += 1
                if len(batch) == MAX_BATCH:
                    filled = self._write(batch, filled)
                    batch = []
                continue
            if not connection.has_room():
                connection.blocked = True
                break
            connection.rx_start = start + 28
            connection.request(magic, flags, command, cookie, offset, length)
            start = connection.rx_start
            start += connection.skip(end - start)
            if connection.is_leaving or connection.payload is not None:
                break
        self._arena_end = self._write(batch, filled) if batch else filled
        connection.rx_start = start

    def _read(self, start: int, end: int, filled: int) -> tuple[int, int]:
        # Serves the reads at the head of what has come, as far as they are quick: the hits from the page cache, the
        # others as requests.  How many bytes of requests were used, and where the arena is filled to.
        connection, arena = self.connection, self._arena
        unaligned, size_bytes = connection.handshake.block_bytes - 1, connection.size_bytes
        fd, nowait, preadv = connection.server.quick_fd, connection.server.nowait_flag, os.preadv
        structured = connection.is_structured
        pack_chunk, pack_simple = wire.DATA_CHUNK.pack_into, wire.SIMPLE_REPLY.pack_into
        header_bytes = wire.DATA_CHUNK.size if structured else wire.SIMPLE_REPLY.size
        room = ARENA_BYTES - filled
        asked: list[tuple[int, int]] = []
        reads: list[tuple[int, int]] = []
        for magic, flags, command, cookie, offset, length in \
                wire.REQUEST.iter_unpack(connection.rx[start:end - (end - start) % wire.REQUEST.size]):
            if command or flags or (offset | length) & unaligned or magic != 0x25609513 \
                    or not 0 < length <= MAX_QUICK_BYTES or offset + length > size_bytes:
                break
            room -= header_bytes + length if length < LARGE_BYTES else header_bytes + length + PAGE_BYTES
            if room < 0:
                connection.blocked = not reads
                break
            asked.append((cookie, offset))
            reads.append((offset >> 9, length >> 9))
            if length >= LARGE_BYTES:
                break                       # it is sent at once
        if not reads:
            return 0, filled
        used = 0
        for (cookie, offset), (_, nsectors), place in zip(asked, reads, self.volume.reads_nowait(reads), strict=True):
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
                if not connection.has_room():
                    connection.blocked = True
                    break
                connection.request(wire.REQUEST_MAGIC, 0, wire.CMD_READ, cookie, offset, length)
            else:
                header_start = data_start - header_bytes
                if header_start != filled:
                    self._queue(filled, header_start)
                if structured:
                    pack_chunk(arena, header_start, wire.CHUNK_MAGIC, 1, 1, cookie, length + 8, offset)
                else:
                    pack_simple(arena, header_start, wire.SIMPLE_REPLY_MAGIC, 0, cookie)
                filled = data_start + length
                self.served += 1
            used += wire.REQUEST.size
        if reads[-1][1] << 9 >= LARGE_BYTES and not connection.blocked:
            self._arena_end = filled
            connection.send()
            filled = self._arena_end if connection.out else self._use_again()
        return used, filled

    def _write(self, batch: list[GatheredWrite], filled: int) -> int:
        # Does at once what the volume's batch takes and puts the replies in the arena; the others become requests.
        # Returns where the arena is filled to.
        connection, quick = self.connection, self.volume.batch
        assert quick is not None, "writes gather where the volume has a batch"
        rx = connection.rx
        places = quick.place([(offset >> 9, length >> 9) for _, offset, length, _ in batch], connection.stream)
        began_ns = monotonic_ns()
        if _write_places(connection.server.quick_write_fd, places,
                         [rx[at:at + length] for _, _, length, at in batch]):
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
                connection.write_alone(write)
        return filled

    # Sending

    def hand_over(self) -> None:
        """Put what the arena holds among what is to be sent."""
        self._queue(self._arena_end, self._arena_end)

    def _use_again(self) -> int:
        # All that was to be sent has left, so the arena is free unless it holds what was not handed over yet.  Gives
        # where it is filled to.
        if self._arena_queued == self._arena_end:
            self._arena_queued = self._arena_end = 0
        return self._arena_end

    def _queue(self, end: int, start: int) -> None:
        # What the arena holds up to ``end`` is to be sent; what is sent after it begins at ``start``.
        if end > self._arena_queued:
            self.connection.out.append((self._arena[self._arena_queued:end], None))
        self._arena_queued = start


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
