# SPDX-License-Identifier: GPL-2.0-only
"""`Ring`, io_uring over mmap and memoryview; and `RingBackend`, which performs Ios on it.

The ring is memory shared with the kernel: two index rings and an array of 64-byte entries.

::

    submission: our tail -> kernel's head     array of slot numbers -> entries (`_SQE`)
    completion: kernel's tail -> our head     (user_data u64, result i32, flags u32)

An entry's user_data is the index of a `_Flight`, which holds the Io, the memory it uses, and how far it got.

What goes where (`RingBackend.submit`):

1. A medium without a descriptor, and what the ring has no entry for (discard of a block device), is performed at once.
2. A read of a file in the page cache is tried with RWF_NOWAIT, a plain write of one is done at once: a copy in memory
   costs less than a trip through the ring.  What is not in memory takes the ring, so other work goes on.
3. All else takes the ring.  PREFLUSH is an fdatasync entry before the write's own; FUA is RWF_DSYNC.

A short read or write goes into the ring again for the rest; an empty read is the end of a file that shrank: EIO.
With O_DIRECT, memory that is not aligned is replaced by a copy that is.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections import deque
from typing import Any

import numpy as np

from bcachectl.engine.io.medium import Medium
from bcachectl.engine.io.sync import perform
from bcachectl.engine.sched import DISCARD, FLUSH, FUA, PREFLUSH, READ, WRITE, WRITE_ZEROES, Io

RING_ENTRIES = 256
"""Entries of the submission ring; more Ios than the completion ring holds wait in a queue."""

_SYS_SETUP, _SYS_ENTER = 425, 426
_OFF_SQES = 0x10000000
_SETUP_CLAMP, _SETUP_SUBMIT_ALL = 1 << 4, 1 << 7
_FEAT_SINGLE_MMAP = 1
_ENTER_GETEVENTS = 1
_OP_FSYNC, _OP_FALLOCATE, _OP_READ, _OP_WRITE = 3, 17, 22, 23
_FSYNC_DATASYNC = 1
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2

# opcode flags ioprio fd | off addr | len rw_flags user_data | buf_index personality splice_fd addr3 pad
_SQE = struct.Struct("<BBHiQQIIQHHiQQ")
_PARAMS = struct.Struct("<10I10I10I")
assert _SQE.size == 64
assert _PARAMS.size == 120

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc["syscall"]
_syscall.argtypes = (ctypes.c_long,) * 7
_syscall.restype = ctypes.c_long


class Ring:
    """One io_uring.  OSError if the kernel has none, or forbids it."""

    def __init__(self, entries: int = RING_ENTRIES) -> None:
        params = bytearray(_PARAMS.size)
        where = ctypes.addressof(ctypes.c_char.from_buffer(params))
        self.fd = -1
        for flags in (_SETUP_CLAMP | _SETUP_SUBMIT_ALL, _SETUP_CLAMP):
            _PARAMS.pack_into(params, 0, 0, 0, flags, *(0,) * 27)
            self.fd = _syscall(_SYS_SETUP, entries, where, 0, 0, 0, 0)
            if self.fd >= 0:
                break
        if self.fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        fields = _PARAMS.unpack(params)
        self.sq_entries, self.cq_entries = fields[0], fields[1]
        sq_offsets, cq_offsets = fields[10:20], fields[20:30]
        if not fields[5] & _FEAT_SINGLE_MMAP:
            os.close(self.fd)
            raise OSError(errno.ENOSYS, "io_uring of this kernel is too old")
        length = max(sq_offsets[6] + self.sq_entries * 4, cq_offsets[5] + self.cq_entries * 16)
        self._mmap = mmap.mmap(self.fd, length, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=0)
        self._sqes = mmap.mmap(self.fd, self.sq_entries * 64, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=_OFF_SQES)
        whole = memoryview(self._mmap)
        self._u32 = whole[:length & ~3].cast("I")
        cqes = whole[cq_offsets[5]:cq_offsets[5] + self.cq_entries * 16]
        self._cq_u64, self._cq_i32 = cqes.cast("Q"), cqes.cast("i")
        self._sq_head, self._sq_tail = sq_offsets[0] // 4, sq_offsets[1] // 4
        self._sq_mask = self._u32[sq_offsets[2] // 4]
        self._cq_head, self._cq_tail = cq_offsets[0] // 4, cq_offsets[1] // 4
        self._cq_mask = self._u32[cq_offsets[2] // 4]
        array = sq_offsets[6] // 4
        for index in range(self.sq_entries):        # entry i of the index ring is slot i, for good
            self._u32[array + index] = index
        self._tail = self._u32[self._sq_tail]

    def push(self, opcode: int, *, fd: int, offset: int, address: int, length: int, op_flags: int,
             user_data: int) -> bool:
        """Write one entry; False if the ring is full.  The kernel sees it with the next `enter`."""
        if (self._tail - self._u32[self._sq_head]) & 0xFFFFFFFF >= self.sq_entries:
            return False
        _SQE.pack_into(self._sqes, (self._tail & self._sq_mask) * 64, opcode, 0, 0, fd, offset, address, length,
                       op_flags, user_data, 0, 0, 0, 0, 0)
        self._tail = (self._tail + 1) & 0xFFFFFFFF
        return True

    def enter(self, min_complete: int = 0) -> None:
        """Hand the pushed entries to the kernel and wait for ``min_complete`` completions."""
        self._u32[self._sq_tail] = self._tail
        while True:
            unsent = (self._tail - self._u32[self._sq_head]) & 0xFFFFFFFF
            if not unsent and not min_complete:
                return
            flags = _ENTER_GETEVENTS if min_complete else 0
            sent = _syscall(_SYS_ENTER, self.fd, unsent, min_complete, flags, 0, 0)
            if sent < 0:
                code = ctypes.get_errno()
                if code in (errno.EBUSY, errno.EAGAIN):
                    # Completions must be taken first, or memory is short.  If something completed the ring is polled
                    # readable and `enter` is called again after the reaping; otherwise nobody would come back here.
                    if self._u32[self._cq_head] != self._u32[self._cq_tail]:
                        return
                    os.sched_yield()
                elif code != errno.EINTR:
                    raise OSError(code, os.strerror(code))
            elif sent == unsent:
                return

    def reap(self) -> list[tuple[int, int]]:
        """The (user_data, result) of all completions there are."""
        u32 = self._u32
        head, tail = u32[self._cq_head], u32[self._cq_tail]
        done = []
        while head != tail:
            index = head & self._cq_mask
            done.append((self._cq_u64[2 * index], self._cq_i32[4 * index + 2]))
            head = (head + 1) & 0xFFFFFFFF
        u32[self._cq_head] = head
        return done

    def close(self) -> None:
        """Give the ring back; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Flight:
    # An Io in the ring.  `array` pins the memory; `bounce` is the aligned stand-in for it.  `flushing`: the entry in
    # the ring is the fdatasync before the write.
    __slots__ = ("io", "medium", "array", "bounce", "address", "done_bytes", "flushing")

    def __init__(self, io: Io, medium: Medium) -> None:
        self.io = io
        self.medium = medium
        self.array: Any = None
        self.bounce: mmap.mmap | None = None
        self.address = 0
        self.done_bytes = 0
        self.flushing = False


class RingBackend:
    """Performs Ios on a `Ring`; many devices, one descriptor to wait for."""

    def __init__(self, media: list[Medium]) -> None:
        self.media = media
        self.ring = Ring()
        self.done: list[Io] = []
        self.flights: list[_Flight | None] = []
        self.free: list[int] = []
        self.waiting: deque[int] = deque()
        self.in_ring = 0

    def submit(self, ios: list[Io]) -> None:
        """Start the Ios; what can be done at once is done at once."""
        for io in ios:
            medium = self.media[io.device]
            if medium.fd < 0 or self._perform_in_memory(io, medium):
                if medium.fd < 0:
                    perform(io, medium)
                self.done.append(io)
            elif (io.op in (DISCARD, WRITE_ZEROES) and (medium.is_block or io.flags)) \
                    or (medium.read_only and io.op != READ) or (io.op == DISCARD and not medium.can_discard):
                perform(io, medium)
                self.done.append(io)
            else:
                self._launch(io, medium)
        self._push_waiting()
        self.ring.enter()

    def reap(self) -> list[Io]:
        """What is done by now."""
        if self.in_ring:
            again = False
            for index, result in self.ring.reap():
                self.in_ring -= 1
                again = self._landed(index, result) or again
            if again or self.waiting:
                self._push_waiting()
            self.ring.enter()
        done, self.done = self.done, []
        return done

    def fileno(self) -> int:
        """The ring's descriptor; it polls readable while completions are there."""
        return self.ring.fd

    def pending(self) -> int:
        """Ios that were submitted and not yet given back."""
        return len(self.flights) - len(self.free) + len(self.done)

    def close(self) -> None:
        """Wait for what the kernel still holds, then close the ring."""
        while self.in_ring:
            self.ring.enter(min_complete=1)
            self.in_ring -= len(self.ring.reap())
        self.ring.close()

    @staticmethod
    def _perform_in_memory(io: Io, medium: Medium) -> bool:
        if medium.direct or medium.is_block or io.flags:
            return False
        try:
            if io.op == READ:
                return os.preadv(medium.fd, (io.buf,), io.sector << 9, medium.nowait_flag) == io.nsectors << 9
            if io.op == WRITE and not medium.read_only:
                return os.pwritev(medium.fd, (io.buf,), io.sector << 9) == io.nsectors << 9
        except OSError:
            pass                                    # EAGAIN; or an error, which the ring will meet again and report
        return False

    def _launch(self, io: Io, medium: Medium) -> None:
        flight = _Flight(io, medium)
        if io.op in (READ, WRITE):
            flight.array = np.frombuffer(io.buf, np.uint8)
            flight.address = flight.array.__array_interface__["data"][0]
            if medium.direct and flight.address & (medium.logical_block_bytes - 1):
                flight.bounce = mmap.mmap(-1, io.nsectors << 9)
                aligned = np.frombuffer(flight.bounce, np.uint8)
                if io.op == WRITE:
                    aligned[:] = flight.array
                flight.address = aligned.__array_interface__["data"][0]
            flight.flushing = io.op == WRITE and bool(io.flags & PREFLUSH)
        if self.free:
            index = self.free.pop()
            self.flights[index] = flight
        else:
            index = len(self.flights)
            self.flights.append(flight)
        self.waiting.append(index)

    def _push_waiting(self) -> None:
        # The completion ring must never overflow, so no more are in the ring than it holds.
        while self.waiting and self.in_ring < self.ring.cq_entries:
            if not self._push(self.waiting[0]):
                self.ring.enter()
                if not self._push(self.waiting[0]):
                    return
            self.waiting.popleft()
            self.in_ring += 1

    def _push(self, index: int) -> bool:
        flight = self.flights[index]
        assert flight is not None
        io, fd, push = flight.io, flight.medium.fd, self.ring.push
        if io.op == FLUSH or flight.flushing:
            return push(_OP_FSYNC, fd=fd, offset=0, address=0, length=0, op_flags=_FSYNC_DATASYNC, user_data=index)
        offset_bytes, left_bytes = (io.sector << 9) + flight.done_bytes, (io.nsectors << 9) - flight.done_bytes
        if io.op in (READ, WRITE):
            return push(_OP_READ if io.op == READ else _OP_WRITE, fd=fd, offset=offset_bytes,
                        address=flight.address + flight.done_bytes, length=left_bytes,
                        op_flags=os.RWF_DSYNC if io.flags & FUA else 0, user_data=index)
        return push(_OP_FALLOCATE, fd=fd, offset=offset_bytes, address=left_bytes,
                    length=_FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE, op_flags=0, user_data=index)

    def _landed(self, index: int, result: int) -> bool:
        # True if the flight goes on with another entry.
        flight = self.flights[index]
        assert flight is not None
        io = flight.io
        if result in (-errno.EINTR, -errno.EAGAIN):
            self.waiting.append(index)
            return True
        if result >= 0 and flight.flushing:
            flight.flushing = False
            self.waiting.append(index)
            return True
        if result >= 0 and io.op in (READ, WRITE):
            flight.done_bytes += result
            if result and flight.done_bytes < io.nsectors << 9:
                self.waiting.append(index)
                return True
            result = 0 if flight.done_bytes == io.nsectors << 9 else -errno.EIO
        if result < 0 and io.op in (DISCARD, WRITE_ZEROES):
            perform(io, flight.medium)              # notes that the device knows no holes; writes zeros in full
        else:
            io.error = -result if result < 0 else 0
        if flight.bounce is not None and io.op == READ and not io.error:
            flight.array[:] = np.frombuffer(flight.bounce, np.uint8)
        self.flights[index] = None
        self.free.append(index)
        self.done.append(io)
        return False
