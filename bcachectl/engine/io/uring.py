# SPDX-License-Identifier: GPL-2.0-only
"""`Ring`, io_uring over mmap and memoryview; and `RingBackend`, which performs Ios on it.

The ring is memory shared with the kernel: two index rings and an array of 64-byte entries.

::

    submission: our tail -> kernel's head     array of slot numbers -> entries (`_SQE`)
    completion: kernel's tail -> our head     (user_data u64, result i32, flags u32)

An entry's user_data is the index of a `_Flight`, which holds the Io, the memory it uses, and how far it got; or it
belongs to a `RingClient`.

Entries lie in numbered slots, and the index ring says in which order the kernel takes them.  So an entry that is used
again and again, such as the answer to one tag of a ublk device, is written once in a slot that `Ring.reserve` gave;
from then on two or three stores and a `Ring.publish` send it.

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
import select
import struct
from collections import deque
from typing import Any, Protocol

import numpy as np

from bcachectl.engine.io.completions import CLIENT_SHIFT, take_completions
from bcachectl.engine.io.medium import Medium
from bcachectl.engine.io.sync import perform
from bcachectl.engine.sched import DISCARD, FLUSH, FUA, PREFLUSH, READ, WRITE, WRITE_ZEROES, Io

RING_ENTRIES = 256
"""Entries of the submission ring; more Ios than the completion ring holds wait in a queue."""
HAND_OVER_READS = 8
"""How many reads a client of the ring gathers before the kernel may begin with them.  A device that is handed all 32 of
a turn at once has nothing to do while the next 32 are looked up (docs/decisions/0021)."""
QUIET_WAIT_S = 0.001
"""For so long at most completions of quiet reads are left unheard."""
MIN_SHARED_SLOTS = 128
"""Slots that `Ring.reserve` leaves to Ios."""

_SYS_SETUP, _SYS_ENTER = 425, 426
_OFF_SQES = 0x10000000
_SETUP_CLAMP, _SETUP_SUBMIT_ALL, _SETUP_COOP_TASKRUN, _SETUP_SQE128 = 1 << 4, 1 << 7, 1 << 8, 1 << 10
_SETUP_SINGLE_ISSUER, _SETUP_DEFER_TASKRUN = 1 << 12, 1 << 13
_WAITED_IN = (_SETUP_CLAMP | _SETUP_SUBMIT_ALL | _SETUP_SINGLE_ISSUER | _SETUP_DEFER_TASKRUN,
              _SETUP_CLAMP | _SETUP_SUBMIT_ALL | _SETUP_COOP_TASKRUN)
_FEAT_SINGLE_MMAP = 1
_ENTER_GETEVENTS, _ENTER_EXT_ARG = 1, 8
_OP_FSYNC, _OP_POLL_ADD, _OP_FALLOCATE, _OP_READ, _OP_WRITE = 3, 6, 17, 22, 23
OP_READ = _OP_READ
OP_URING_CMD = 46
SQE_IO_LINK = 1 << 2
"""Flag of an entry: the next one begins when this one has succeeded, and fails with ECANCELED when it has not."""
_FSYNC_DATASYNC = 1
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2

_POLL_CLIENT = (1 << CLIENT_SHIFT) - 1
"""No client, but the loop's epoll; client 0 are the Ios."""
_POLL = _POLL_CLIENT << CLIENT_SHIFT

# opcode flags ioprio fd | off addr | len rw_flags user_data | buf_index personality splice_fd addr3 pad
_SQE = struct.Struct("<BBHiQQIIQHHiQQ")
_PARAMS = struct.Struct("<10I10I10I")
_TIMESPEC = struct.Struct("<qq")
_GETEVENTS_ARG = struct.Struct("<QIIQ")     # signal mask, its size, padding, address of a timespec
assert _SQE.size == 64
assert _PARAMS.size == 120

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc["syscall"]
_syscall.argtypes = (ctypes.c_long,) * 7
_syscall.restype = ctypes.c_long
# Without declared types a call costs half.  Numbers are then passed as 32 bits, so the last two arguments, which go to
# the kernel as 64, are ready-made objects.
_quick_syscall = _libc["syscall"]
_NO_POINTER, _NO_BYTES = ctypes.c_void_p(None), ctypes.c_size_t(0)


_WAIT_BYTES = ctypes.c_size_t(_GETEVENTS_ARG.size)
_WAIT_ENDS = (errno.ETIME, errno.EINTR, errno.EBUSY, errno.EAGAIN)


class Ring:
    """One io_uring.  OSError if the kernel has none, or forbids it.

    ``entry_bytes`` is 64, or 128 for commands with a long payload.  A ring that is ``waited_in`` belongs to the one
    thread that made it, and completes nothing but in `enter` and `wait`, which makes each completion cheaper; another
    ring completes at any time and may be polled.
    """

    def __init__(self, entries: int = RING_ENTRIES, *, entry_bytes: int = 64, waited_in: bool = False) -> None:
        params = bytearray(_PARAMS.size)
        where = ctypes.addressof(ctypes.c_char.from_buffer(params))
        self.fd = -1
        wide = _SETUP_SQE128 if entry_bytes == 128 else 0
        for flags in (*(_WAITED_IN if waited_in else ()), _SETUP_CLAMP | _SETUP_SUBMIT_ALL, _SETUP_CLAMP):
            _PARAMS.pack_into(params, 0, 0, 0, flags | wide, *(0,) * 27)
            self.fd = _syscall(_SYS_SETUP, entries, where, 0, 0, 0, 0)
            if self.fd >= 0:
                break
        if self.fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        fields = _PARAMS.unpack(params)
        self.sq_entries, self.cq_entries = fields[0], fields[1]
        self.entry_bytes = entry_bytes
        sq_offsets, cq_offsets = fields[10:20], fields[20:30]
        if not fields[5] & _FEAT_SINGLE_MMAP:
            os.close(self.fd)
            raise OSError(errno.ENOSYS, "io_uring of this kernel is too old")
        length = max(sq_offsets[6] + self.sq_entries * 4, cq_offsets[5] + self.cq_entries * 16)
        self._mmap = mmap.mmap(self.fd, length, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=0)
        self._sqes = mmap.mmap(self.fd, self.sq_entries * entry_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE,
                               offset=_OFF_SQES)
        whole = memoryview(self._mmap)
        self._u32 = whole[:length & ~3].cast("I")
        cqes = whole[cq_offsets[5]:cq_offsets[5] + self.cq_entries * 16]
        self._cq_u64, self._cq_i32 = cqes.cast("Q"), cqes.cast("i")
        self._sq_head, self._sq_tail = sq_offsets[0] // 4, sq_offsets[1] // 4
        self.sq_mask = self._u32[sq_offsets[2] // 4]
        self._cq_head, self._cq_tail = cq_offsets[0] // 4, cq_offsets[1] // 4
        self._cq_mask = self._u32[cq_offsets[2] // 4]
        array = sq_offsets[6] // 4
        self.sq_array = self._u32[array:array + self.sq_entries]
        self.tail = self._u32[self._sq_tail]
        entries_view = memoryview(self._sqes)
        self.sqe_u64, self.sqe_u32, self.sqe_i32 = (entries_view.cast(kind) for kind in ("Q", "I", "i"))
        self._shared_slots: int = self.sq_entries   # slots below this number are `push`'s own
        self._pushed = 0                            # of them, not yet taken by the kernel, at most
        self._next_slot = 0
        self._given_back: dict[int, list[int]] = {}
        self._timeout = ctypes.create_string_buffer(_TIMESPEC.size)
        self._wait_arguments = ctypes.create_string_buffer(
            _GETEVENTS_ARG.pack(0, 0, 0, ctypes.addressof(self._timeout)), _GETEVENTS_ARG.size)
        self._wait_pointer = ctypes.c_void_p(ctypes.addressof(self._wait_arguments))

    def reserve(self, count: int) -> int:
        """Take ``count`` slots out of `push`'s use, for an owner who fills each once and publishes it many times; the
        first one's number.  OSError if too few would be left.
        """
        given_back = self._given_back.get(count)
        if given_back:
            return given_back.pop()
        if self._shared_slots - count < MIN_SHARED_SLOTS:
            raise OSError(errno.ENOSPC, "the ring has no room for another device")
        self.enter()
        self._shared_slots -= count
        self._next_slot = 0
        return self._shared_slots

    def give_back(self, first: int, count: int) -> None:
        """The owner of slots from `reserve` is gone, and the kernel has none of them."""
        self._given_back.setdefault(count, []).append(first)

    def fill(self, slot: int, opcode: int, *, fd: int, user_data: int, offset: int = 0, address: int = 0,
             length: int = 0, op_flags: int = 0, flags: int = 0, payload: bytes = b"") -> None:
        """Write the entry of a slot.  ``payload`` is a command's, from byte 48 on; its command is in ``offset``."""
        start = slot * self.entry_bytes
        _SQE.pack_into(self._sqes, start, opcode, flags, 0, fd, offset, address, length, op_flags, user_data,
                       0, 0, 0, 0, 0)
        if payload:
            self._sqes[start + 48:start + 48 + len(payload)] = payload

    def publish(self, slot: int) -> None:
        """Hand the entry of a slot to the kernel with the next `enter` or `wait`; not again before that."""
        self.sq_array[self.tail & self.sq_mask] = slot
        self.tail = (self.tail + 1) & 0xFFFFFFFF

    def push(self, opcode: int, *, fd: int, user_data: int, offset: int = 0, address: int = 0, length: int = 0,
             op_flags: int = 0, payload: bytes = b"") -> bool:
        """Publish an entry in a slot that is free; False if none is before the next `enter`."""
        if self._pushed >= self._shared_slots:
            return False
        slot = self._next_slot
        self._next_slot = slot + 1 if slot + 1 < self._shared_slots else 0
        self._pushed += 1
        self.fill(slot, opcode, fd=fd, offset=offset, address=address, length=length, op_flags=op_flags,
                  user_data=user_data, payload=payload)
        self.publish(slot)
        return True

    def enter(self, min_complete: int = 0) -> None:
        """Hand the pushed entries to the kernel and wait for ``min_complete`` completions."""
        self._u32[self._sq_tail] = self.tail
        while True:
            unsent = (self.tail - self._u32[self._sq_head]) & 0xFFFFFFFF
            if not unsent and not min_complete:
                break
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
                break
        self._pushed = 0

    def hand_over(self) -> None:
        """Let the kernel begin with what was published.  It need not take all; `wait` gives it the rest."""
        u32 = self._u32
        u32[self._sq_tail] = self.tail
        unsent = (self.tail - u32[self._sq_head]) & 0xFFFFFFFF
        if _quick_syscall(_SYS_ENTER, self.fd, unsent, 0, 0, _NO_POINTER, _NO_BYTES) == unsent:
            self._pushed = 0

    def wait(self, timeout_s: float, count: int = 1) -> None:
        """Hand the entries to the kernel and sleep until ``count`` entries completed, a signal came, or the time is
        over; one system call.  A negative time is for ever; with 0 it does not sleep.
        """
        u32 = self._u32
        u32[self._sq_tail] = self.tail
        unsent = (self.tail - u32[self._sq_head]) & 0xFFFFFFFF
        if timeout_s <= 0:
            sent = _quick_syscall(_SYS_ENTER, self.fd, unsent, count if timeout_s < 0 else 0, _ENTER_GETEVENTS,
                                  _NO_POINTER, _NO_BYTES)
        else:
            _TIMESPEC.pack_into(self._timeout, 0, int(timeout_s), int(timeout_s % 1 * 1e9))
            sent = _quick_syscall(_SYS_ENTER, self.fd, unsent, count, _ENTER_GETEVENTS | _ENTER_EXT_ARG,
                                  self._wait_pointer, _WAIT_BYTES)
        if sent == unsent:
            self._pushed = 0
        elif sent >= 0 or ctypes.get_errno() in _WAIT_ENDS:
            self.enter()                            # what was not taken goes now, without sleeping
        else:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def reap(self) -> dict[int, list[tuple[int, int]]]:
        """All completions there are: (number, result), by the client that user_data names."""
        words = self._u32
        if words[self._cq_head] == words[self._cq_tail]:
            return {}
        return take_completions(words, self._cq_u64, self._cq_i32, self._cq_head, self._cq_tail, self._cq_mask)

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


class RingClient(Protocol):
    """Someone who puts entries of his own into the backend's ring; see `RingBackend.add_client`."""

    def landed(self, completions: list[tuple[int, int]]) -> None:
        """(number, result) of the client's entries that completed, in that order."""
        ...


class RingBackend:
    """Performs Ios on a `Ring`; many devices, one descriptor to wait for.

    A backend that is ``waited_in`` is one whose owner sleeps in `wait`: one system call for each turn hands over what
    was submitted, of Ios and of clients, and takes what completed.
    """

    def __init__(self, media: list[Medium], *, entries: int = RING_ENTRIES, waited_in: bool = False) -> None:
        self.media = media
        self.waited_in = waited_in
        self.ring = Ring(entries, waited_in=waited_in)
        self.done: list[Io] = []
        self.flights: list[_Flight | None] = []
        self.free: list[int] = []
        self.waiting: deque[int] = deque()
        self.in_ring = 0
        self.max_in_ring = self.ring.cq_entries // 2
        self.clients: dict[int, RingClient] = {}
        self.quiet_reads = 0
        """Reads of clients in flight of whose end nobody has to hear at once."""
        self.has_answers = False
        """A client has given an export something to send; whoever sleeps in `wait` looks, and resets it."""
        self._last_client = 0
        self._is_polled = False
        self._is_poll_due = False

    def add_client(self, client: RingClient) -> int:
        """Give a client's entries their place; his user_data is this plus a number of less than 32 bits."""
        self._last_client += 1
        self.clients[self._last_client] = client
        return self._last_client << CLIENT_SHIFT

    def remove_client(self, base: int) -> None:
        """The client has no entry in the ring any more."""
        del self.clients[base >> CLIENT_SHIFT]

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
        if not self.waited_in:
            self.ring.enter()

    def reap(self) -> list[Io]:
        """What is done by now."""
        if self.in_ring or self.clients:
            self._collect()
            if not self.waited_in:
                self.ring.enter()
        done, self.done = self.done, []
        return done

    def wait(self, fd: int, timeout_s: float) -> bool:
        """Hand over all that was submitted, and sleep until something completes, ``fd`` is readable, a signal comes,
        or the time is over (never, if it is negative).  True if ``fd`` is readable.
        """
        if not self._is_polled:
            self._is_polled = self._push_poll(fd)
        if self.done:
            self.ring.wait(0)
        elif self.quiet_reads and timeout_s:
            # The next request of a client who has one in flight comes with the end of his last read, and wakes us once
            # instead of twice.  With many in flight every second is waited for: the device must not run dry.
            limit_s = QUIET_WAIT_S if timeout_s < 0 else min(timeout_s, QUIET_WAIT_S)
            self.ring.wait(limit_s, 1 + (self.quiet_reads + 1 >> 1))
        else:
            self.ring.wait(timeout_s)
        self._collect()
        is_due, self._is_poll_due = self._is_poll_due, False
        return is_due

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
            self.in_ring -= len(self.ring.reap().get(0, ()))
        self.ring.close()

    def _push_poll(self, fd: int) -> bool:
        return self.ring.push(_OP_POLL_ADD, fd=fd, op_flags=select.POLLIN, user_data=_POLL)

    def _collect(self) -> None:
        # Take what the ring has completed: Ios are done, or go on; the rest is told to the clients.
        landed = self.ring.reap()
        again = False
        for index, result in landed.pop(0, ()):
            self.in_ring -= 1
            again = self._landed(index, result) or again
        if again or self.waiting:
            self._push_waiting()
        for client, completions in landed.items():
            if client == _POLL_CLIENT:
                self._is_polled, self._is_poll_due = False, True
            elif client in self.clients:
                self.clients[client].landed(completions)

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
        # The completion ring must not overflow; the other half of it is the clients'.
        while self.waiting and self.in_ring < self.max_in_ring:
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
