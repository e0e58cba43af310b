# SPDX-License-Identifier: GPL-2.0-only
"""`QuickTransmission`: an NBD client on a cache device in the page cache, where a hit is a copy in memory.

Requests are served as they come, the plain ones without an object each:

* a read that the volume's `bcachectl.engine.read_batch.ReadBatch` knows, in one extent or in several, is read from the
  page cache straight behind its reply header in the transmit arena: nothing is copied in Python, and one ``send``
  carries all such replies of a turn;
* small writes are gathered; at the end of the turn they are offered to the volume's
  `bcachectl.engine.write_batch.WriteBatch`, and what that places is written straight from the receive buffer;
* everything else takes the way of all requests (`Connection.request`).

The arena is used from its front to ``_arena_end``; up to ``_arena_queued`` it is in the connection's ``out`` already.
It is empty again when all has left.

One of the modules that can be compiled.
"""

from __future__ import annotations

import mmap
import os
from array import array
from time import monotonic_ns
from typing import TYPE_CHECKING

from bcachectl.engine.export import nbd_wire as wire
from bcachectl.engine.export.buffers import PAGE_BYTES
from bcachectl.engine.export.nbd_request import MAX_QUICK_WRITE_BYTES
from bcachectl.engine.front import Volume
from bcachectl.engine.read_batch import MAX_READS, ReadBatch
from bcachectl.engine.write_batch import WriteBatch

try:
    import cython
except ImportError:
    from bcachectl import plain as cython

if not cython.compiled:
    from bcachectl.engine.export.page_cache import write_all

    # Compiled, these are loads, stores and system calls (nbd_c.pxd).
    request_at = wire.REQUEST.unpack_from
    put_chunk, put_simple = wire.DATA_CHUNK.pack_into, wire.SIMPLE_REPLY.pack_into

    def read_at(fd: int, arena: memoryview, at: int, length: int, place: int, flags: int) -> int:
        """Read into the arena; how much there was, -1 for an error."""
        try:
            return os.preadv(fd, (arena[at:at + length],), place, flags)
        except OSError:
            return -1

    def write_places(fd: int, rx: memoryview, places: array[int], starts: array[int], lengths: array[int],
                     count: int) -> bool:
        """Write each payload that has a place; what lies side by side goes in one call.  False if anything failed."""
        return write_all(fd, [(places[index], rx[starts[index]:starts[index] + (lengths[index] << 9)])
                              for index in range(count)])

if TYPE_CHECKING:
    from bcachectl.engine.export.nbd_connection import Connection

ARENA_BYTES = 2 << 20
"""Transmit arena of a connection: replies to reads that were served at once."""
LARGE_BYTES = 64 << 10
"""From this size on a quick reply's data is page-aligned, which the kernel copies faster, and sent at once."""
SMALL_BYTES = 4096
"""A read of at most this size is not expected to lie in several extents."""
MAX_QUICK_BYTES = 1 << 20
"""A longer read takes the way of all other requests."""
MAX_BATCH = 64
"""Writes that are gathered at most."""


class QuickTransmission:
    """The transmission of one connection; ``served`` are the quick requests of the last `serve`."""

    def __init__(self, connection: Connection, volume: Volume) -> None:
        self.connection = connection
        self.volume = volume
        self.served = 0
        self.rx = connection.rx
        # Behind the replies to reads there is always room for those to one batch of writes.
        self._arena = memoryview(mmap.mmap(-1, ARENA_BYTES + MAX_BATCH * wire.SIMPLE_REPLY.size))
        self.arena = self._arena
        self._arena_queued = self._arena_end = 0
        reads: ReadBatch | None = volume.reads
        self.reads = reads
        # The reads of a turn: for the volume's batch, in its columns.
        self.sectors, self.lengths = array("Q", bytes(8 * MAX_READS)), array("Q", bytes(8 * MAX_READS))
        self.places = array("q", bytes(8 * MAX_READS))
        if reads is not None:
            self.sectors, self.lengths, self.places = reads.sectors, reads.lengths, reads.places
        self.cookies = array("Q", bytes(8 * MAX_READS))
        # The writes that are gathered; the batch's own columns are others' meanwhile.
        self.batch: WriteBatch | None = volume.batch
        self.write_cookies, self.write_offsets, self.write_lengths = (
            array("Q", bytes(8 * MAX_BATCH)) for _ in range(3))
        self.write_starts = array("q", bytes(8 * MAX_BATCH))

    def serve(self) -> None:
        """Serve every whole request in the connection's receive buffer."""
        # The hot loop: everything it needs is a local variable.
        connection, rx = self.connection, self.rx
        server = connection.server
        quick_fd, unaligned, arena_bytes = server.quick_fd, connection.handshake.block_bytes - 1, ARENA_BYTES
        size_bytes, start, end, filled = connection.size_bytes, connection.rx_start, connection.rx_end, self._arena_end
        max_write_bytes, max_batch = MAX_QUICK_WRITE_BYTES, MAX_BATCH
        cookies, offsets, lengths, starts = (
            self.write_cookies, self.write_offsets, self.write_lengths, self.write_starts)
        start += connection.skip(end - start)
        gathered = 0
        self.served = 0
        if not connection.out:
            filled = self._use_again()
        has_batch = self.batch is not None and server.quick_write_fd >= 0
        while end - start >= 28:
            magic, flags, command, cookie, offset, length = request_at(rx, start)
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
                    and magic == 0x25609513 and 0 < length <= max_write_bytes and length <= size_bytes \
                    and offset <= size_bytes - length:
                there = end - start - 28
                if there < length:
                    break                   # the rest of it comes with the next event
                if filled > arena_bytes or (not gathered and not connection.has_room()):
                    connection.blocked = True
                    break
                cookies[gathered] = cookie
                offsets[gathered] = offset
                lengths[gathered] = length
                starts[gathered] = start + 28
                gathered += 1
                start += 28 + length
                self.served += 1
                if gathered == max_batch:
                    filled = self._write(gathered, filled)
                    gathered = 0
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
        self._arena_end = self._write(gathered, filled) if gathered else filled
        connection.rx_start = start

    def _read(self, start: int, end: int, filled: int) -> tuple[int, int]:
        # Serves the reads at the head of what has come, as far as they are quick: the hits from the page cache, the
        # others as requests.  How many bytes of requests were used, and where the arena is filled to.
        connection, rx, arena, places = self.connection, self.rx, self.arena, self.places
        unaligned, size_bytes = connection.handshake.block_bytes - 1, connection.size_bytes
        fd, nowait = connection.server.quick_fd, connection.server.nowait_flag
        max_count, max_bytes, large_bytes, page_bytes = MAX_READS, MAX_QUICK_BYTES, LARGE_BYTES, PAGE_BYTES
        small_bytes = SMALL_BYTES
        chunk_magic, simple_magic = wire.CHUNK_MAGIC, wire.SIMPLE_REPLY_MAGIC
        structured = connection.is_structured
        header_bytes = wire.DATA_CHUNK.size if structured else wire.SIMPLE_REPLY.size
        cookies, sectors, lengths = self.cookies, self.sectors, self.lengths
        room, at, count, is_large, has_batch = ARENA_BYTES - filled, start, 0, False, self.reads is not None
        while end - at >= 28 and count < max_count and not is_large:
            magic, flags, command, cookie, offset, length = request_at(rx, at)
            if command or flags or (offset | length) & unaligned or magic != 0x25609513 \
                    or not 0 < length <= max_bytes or length > size_bytes or offset > size_bytes - length:
                break
            is_large = length >= large_bytes            # it is sent at once
            room -= header_bytes + length + (page_bytes if is_large else 0)
            if room < 0:
                connection.blocked = not count
                is_large = False
                break
            cookies[count] = cookie
            sectors[count] = offset >> 9
            lengths[count] = length >> 9
            count += 1
            at += 28
        if not count:
            return 0, filled
        self._place(count)
        used = 0
        late: list[tuple[int, int, int]] = []
        for index in range(count):
            cookie, offset, length, place = cookies[index], sectors[index] << 9, lengths[index] << 9, places[index]
            data_start = filled + header_bytes
            if length >= large_bytes:
                data_start = (data_start + page_bytes - 1) // page_bytes * page_bytes
            if place >= 0:
                got = read_at(fd, arena, data_start, length, place, nowait)
            else:
                got = self._read_extents(offset, length, data_start) if has_batch and length > small_bytes else 0
            if got != length:
                if not connection.has_room():
                    connection.blocked = True
                    break
                # Not now: whoever is asked may use the columns.
                late.append((cookie, offset, length))
            else:
                header_start = data_start - header_bytes
                if header_start != filled:
                    self._queue(filled, header_start)
                if structured:
                    put_chunk(arena, header_start, chunk_magic, 1, 1, cookie, length + 8, offset)
                else:
                    put_simple(arena, header_start, simple_magic, 0, cookie)
                filled = data_start + length
                self.served += 1
            used += 28
        for cookie, offset, length in late:
            connection.request(wire.REQUEST_MAGIC, 0, wire.CMD_READ, cookie, offset, length)
        if is_large and not connection.blocked:
            self._arena_end = filled
            connection.send()
            filled = self._arena_end if connection.out else self._use_again()
        return used, filled

    def _read_extents(self, offset: int, length: int, at: int) -> int:
        # Reads into the arena at ``at`` what lies in several extents; how much there was, less than ``length`` if
        # anything of it is not to be had at once.  `page_cache.read_hit` once more, since compiled it is 1.7 times as
        # fast for 256 extents.
        reads, arena, done = self.reads, self.arena, 0
        fd, nowait = self.connection.server.quick_fd, self.connection.server.nowait_flag
        assert reads is not None, "who asks has a volume with a batch"
        while done < length:
            # The first of the columns is used up by now.
            self.sectors[0] = (offset + done) >> 9
            self.lengths[0] = (length - done) >> 9
            reads.place(1, True)
            nbytes = self.lengths[0] << 9
            got = read_at(fd, arena, at + done, nbytes, self.places[0], nowait) if self.places[0] >= 0 else 0
            if got != nbytes:
                reads.drop()
                return done
            done += nbytes
        reads.settle_as_one()
        return done

    def _place(self, count: int) -> None:
        reads = self.reads
        if reads is not None:
            reads.place(count)
            reads.settle()
            return
        asked = [(self.sectors[index], self.lengths[index]) for index in range(count)]
        for index, place in enumerate(self.volume.reads_nowait(asked)):
            self.places[index] = place

    def _write(self, count: int, filled: int) -> int:
        # Does at once what the volume's batch takes and puts the replies in the arena; the others become requests.
        # Returns where the arena is filled to.
        connection, quick, arena = self.connection, self.batch, self.arena
        assert quick is not None, "writes gather where the volume has a batch"
        cookies, offsets, sizes, starts = (
            self.write_cookies, self.write_offsets, self.write_lengths, self.write_starts)
        sectors, lengths, places = quick.sectors, quick.lengths, quick.places
        simple_magic = wire.SIMPLE_REPLY_MAGIC
        for index in range(count):
            sectors[index] = offsets[index] >> 9
            lengths[index] = sizes[index] >> 9
        quick.place_columns(count, connection.stream)
        began_ns = monotonic_ns()
        is_written = write_places(connection.server.quick_write_fd, self.rx, places, starts, lengths, count)
        if is_written:
            quick.commit(monotonic_ns() - began_ns)
        else:
            quick.abandon()
        late: list[int] = []
        for index in range(count):
            if is_written and places[index] >= 0:
                put_simple(arena, filled, simple_magic, 0, cookies[index])
                filled += 16
            else:
                late.append(index)
        for index in late:
            connection.write_alone((cookies[index], offsets[index], sizes[index], starts[index]))
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
