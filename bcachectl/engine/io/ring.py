# SPDX-License-Identifier: GPL-2.0-only
"""`Ring`, io_uring over mmap and memoryview.

The ring is memory shared with the kernel: two index rings and an array of 64-byte entries.

::

    submission: our tail -> kernel's head     array of slot numbers -> entries (`_SQE`)
    completion: kernel's tail -> our head     (user_data u64, result i32, flags u32)

An entry's user_data is the number of a client of the ring, shifted by `CLIENT_SHIFT`, and the client's own number of
the entry.

Entries lie in numbered slots, and the index ring says in which order the kernel takes them.  So an entry that is used
again and again, such as the answer to one tag of a ublk device, is written once in a slot that `Ring.reserve` gave;
from then on two or three stores and a `Ring.publish` send it.

Most completions are told to whom they belong as a list (`Ring.take`).  A `QuickClient` has its own in columns, and
serves itself: as long as nobody else has anything to do, `Ring.serve` stays where it is, turn after turn.  This module
is one of those that can be compiled, and with it such a turn makes no Python object at all.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from array import array
from time import monotonic_ns
from typing import Protocol

try:
    import cython
except ImportError:
    from bcachectl import plain as cython

if not cython.compiled:
    from bcachectl.engine.io.enter import enter_ring, enter_ring_for

RING_ENTRIES = 256
"""Entries of the submission ring; more Ios than the completion ring holds wait in a queue."""
MIN_SHARED_SLOTS = 128
"""Slots that `Ring.reserve` leaves to Ios."""
CLIENT_SHIFT = 32
WORD_MASK = 0xFFFFFFFF
"""Of 32 bits.  Compiled, an index that is added to ends there by itself; a literal of that size would be a Python
integer."""
QUIET_WAIT_NS = 1_000_000
"""For so long at most completions of quiet reads are left unheard."""
ALONE_NS = 100_000_000
"""So long at most `Ring.serve` serves quick clients alone; the engine's clock stands still meanwhile."""

_SYS_SETUP = 425
_OFF_SQES = 0x10000000
_SETUP_CLAMP, _SETUP_SUBMIT_ALL, _SETUP_COOP_TASKRUN, _SETUP_SQE128 = 1 << 4, 1 << 7, 1 << 8, 1 << 10
_SETUP_SINGLE_ISSUER, _SETUP_DEFER_TASKRUN = 1 << 12, 1 << 13
_WAITED_IN = (_SETUP_CLAMP | _SETUP_SUBMIT_ALL | _SETUP_SINGLE_ISSUER | _SETUP_DEFER_TASKRUN,
              _SETUP_CLAMP | _SETUP_SUBMIT_ALL | _SETUP_COOP_TASKRUN)
_FEAT_SINGLE_MMAP = 1

# opcode flags ioprio fd | off addr | len rw_flags user_data | buf_index personality splice_fd addr3 pad
_SQE = struct.Struct("<BBHiQQIIQHHiQQ")
_PARAMS = struct.Struct("<10I10I10I")
assert _SQE.size == 64
assert _PARAMS.size == 120

_syscall = ctypes.CDLL(None, use_errno=True)["syscall"]
_syscall.argtypes = (ctypes.c_long,) * 7
_syscall.restype = ctypes.c_long


class Arrivals:
    """The completions of a `QuickClient` that it has not looked at: (number, result), the first ``count`` of both
    columns.
    """

    def __init__(self, capacity: int) -> None:
        self.numbers = array("I", bytes(4 * capacity))
        self.results = array("i", bytes(4 * capacity))
        self.count = 0

    def put(self, number: int, result: int) -> None:
        """Add one."""
        self.numbers[self.count] = number
        self.results[self.count] = result
        self.count += 1


class QuickClient(Protocol):
    """A client of the ring that serves most of its completions by itself, with no task and no Io of the engine."""

    @property
    def arrivals(self) -> Arrivals:
        """Where its completions go."""
        ...

    def serve(self) -> bool:
        """Take the arrivals; whether something is left that the engine has to hear of."""
        ...

    def finish(self) -> None:
        """Before anything else of the engine runs: tell it what was served, and what is left."""
        ...


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
        words = whole[:length & ~3].cast("I")
        self._u32 = words
        cqes = whole[cq_offsets[5]:cq_offsets[5] + self.cq_entries * 16]
        self._cq_u64, self._cq_i32 = cqes.cast("Q"), cqes.cast("i")
        self._sq_head, self._sq_tail = sq_offsets[0] // 4, sq_offsets[1] // 4
        self.sq_mask = words[sq_offsets[2] // 4]
        self._cq_head, self._cq_tail = cq_offsets[0] // 4, cq_offsets[1] // 4
        self._cq_mask = words[cq_offsets[2] // 4]
        first = sq_offsets[6] // 4
        self.sq_array = words[first:first + self.sq_entries]
        self.tail = words[self._sq_tail]
        entries_view = memoryview(self._sqes)
        self.sqe_u64, self.sqe_u32, self.sqe_i32 = (entries_view.cast(kind) for kind in ("Q", "I", "i"))
        self.quick: list[QuickClient] = []
        self.quiet_reads = 0
        """Reads of quick clients in flight of whose end nobody has to hear at once."""
        self.is_alone = False
        self.gathering = 0
        """Quick clients that hold something back until more comes (`gather`)."""
        self._gather_ns = self._gather_count = 0
        self._arrivals: list[Arrivals | None] = []  # of the quick clients, by their numbers
        self._shared_slots: int = self.sq_entries   # slots below this number are `push`'s own
        self._pushed = 0                            # of them, not yet taken by the kernel, at most
        self._next_slot = 0
        self._given_back: dict[int, list[int]] = {}

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

    def add_quick(self, number: int, client: QuickClient) -> None:
        """From now on the completions of the client with this number go into his columns."""
        while len(self._arrivals) <= number:
            self._arrivals.append(None)
        self._arrivals[number] = client.arrivals
        self.quick.append(client)

    def remove_quick(self, number: int, client: QuickClient) -> None:
        """The client has no entry in the ring any more."""
        self._arrivals[number] = None
        self.quick.remove(client)

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
        tail = self.tail
        self.sq_array[tail & self.sq_mask] = slot
        tail += 1
        self.tail = tail if cython.compiled else tail & WORD_MASK

    @property
    def room(self) -> int:
        """How often `push` would find a free slot now."""
        return self._shared_slots - self._pushed

    def push(self, opcode: int, *, fd: int, user_data: int, offset: int = 0, address: int = 0, length: int = 0,
             op_flags: int = 0, flags: int = 0, payload: bytes = b"") -> bool:
        """Publish an entry in a slot that is free; False if none is before the next `enter`."""
        if self._pushed >= self._shared_slots:
            return False
        slot = self._next_slot
        self._next_slot = slot + 1 if slot + 1 < self._shared_slots else 0
        self._pushed += 1
        self.fill(slot, opcode, fd=fd, offset=offset, address=address, length=length, op_flags=op_flags,
                  user_data=user_data, flags=flags, payload=payload)
        self.publish(slot)
        return True

    def gather(self, count: int, limit_ns: int) -> None:
        """A quick client, which counts as ``gathering``, would rather be served when ``count`` more have come, or when
        ``limit_ns`` have passed.
        """
        self._gather_count, self._gather_ns = count, limit_ns

    def enter(self, min_complete: int = 0) -> None:
        """Hand the pushed entries to the kernel and wait for ``min_complete`` completions."""
        self._u32[self._sq_tail] = self.tail
        while True:
            unsent = (self.tail - self._u32[self._sq_head]) & WORD_MASK
            if not unsent and not min_complete:
                break
            sent = enter_ring(self.fd, unsent, min_complete, min_complete > 0)
            if sent in (-errno.EBUSY, -errno.EAGAIN):
                # Completions must be taken first, or memory is short.  If something completed the ring is polled
                # readable and `enter` is called again after the reaping; otherwise nobody would come back here.
                if self._u32[self._cq_head] != self._u32[self._cq_tail]:
                    return
                os.sched_yield()
            elif sent < 0 and sent != -errno.EINTR:
                raise OSError(-sent, os.strerror(-sent))
            elif sent == unsent:
                break
        self._pushed = 0

    def hand_over(self) -> None:
        """Let the kernel begin with what was published.  It need not take all; `wait` gives it the rest."""
        words = self._u32
        words[self._sq_tail] = self.tail
        unsent = (self.tail - words[self._sq_head]) & WORD_MASK
        if enter_ring(self.fd, unsent, 0, False) == unsent:
            self._pushed = 0

    def wait(self, timeout_ns: int, count: int = 1) -> None:
        """Hand the entries to the kernel and sleep until ``count`` entries completed, a signal came, or the time is
        over; one system call.  A negative time is for ever; with 0 it does not sleep.
        """
        words = self._u32
        words[self._sq_tail] = self.tail
        unsent = (self.tail - words[self._sq_head]) & WORD_MASK
        if timeout_ns <= 0:
            sent = enter_ring(self.fd, unsent, count if timeout_ns < 0 else 0, True)
        else:
            sent = enter_ring_for(self.fd, unsent, count, timeout_ns)
        if sent == unsent:
            self._pushed = 0
        elif sent >= 0 or sent in (-errno.ETIME, -errno.EINTR, -errno.EBUSY, -errno.EAGAIN):
            self.enter()                            # what was not taken goes now, without sleeping
        else:
            raise OSError(-sent, os.strerror(-sent))

    def take(self) -> dict[int, list[tuple[int, int]]]:
        """Take all completions there are.  Those of quick clients go into their columns; of all others it gives
        (number, result), by the client.
        """
        words, user_data, results = self._u32, self._cq_u64, self._cq_i32
        head, tail, mask = words[self._cq_head], words[self._cq_tail], self._cq_mask
        found: dict[int, list[tuple[int, int]]] = {}
        here: list[tuple[int, int]] = []
        arrivals: Arrivals | None = None
        quick_end, last = len(self._arrivals), -1
        client_shift, word_mask = CLIENT_SHIFT, WORD_MASK
        while head != tail:
            index = head & mask
            data = user_data[index + index]
            client = data >> client_shift
            if client != last:
                last = client
                arrivals = self._arrivals[client] if client < quick_end else None
                if arrivals is None:
                    here = found.setdefault(client, [])
            if arrivals is not None:
                arrivals.put(data & word_mask, results[4 * index + 2])
            else:
                here.append((data & word_mask, results[4 * index + 2]))
            head = head + 1 & word_mask
        words[self._cq_head] = head
        return found

    def take_served(self) -> dict[int, list[tuple[int, int]]]:
        """As `take`, and quick clients have served what they could.  ``is_alone`` is true if they got something, and it
        was all that needed to be done.
        """
        found = self.take()
        served, left = False, bool(found)
        for client in self.quick:
            if client.arrivals.count or self.gathering:
                # Who gathers may have waited long enough, even if what came is not his.
                served = served or client.arrivals.count > 0
                left = client.serve() or left
        self.is_alone = served and not left
        return found

    def serve(self, timeout_ns: int) -> dict[int, list[tuple[int, int]]]:
        """`wait`, and `take`, again and again, until there is something that not only quick clients hear of; or the
        time is over; or for `ALONE_NS`.  What `take` gave.

        The next request of a client who has one in flight comes with the end of his last read, and wakes us once
        instead of twice; so the end of quiet reads alone is waited for less eagerly.  With many in flight every second
        is waited for: the device must not run dry.
        """
        began_ns, left_ns = monotonic_ns(), timeout_ns
        while True:
            quiet = self.quiet_reads
            if self.gathering and left_ns:
                self.wait(self._gather_ns if left_ns < 0 or left_ns > self._gather_ns else left_ns,
                          self._gather_count if self.gathering == 1 else 1)
            elif not quiet or not left_ns:
                self.wait(left_ns)
            elif 0 < left_ns < QUIET_WAIT_NS:
                self.wait(left_ns, 1 + (quiet + 1 >> 1))
            else:
                self.wait(QUIET_WAIT_NS, 1 + (quiet + 1 >> 1))
            found = self.take_served()
            spent_ns = monotonic_ns() - began_ns
            if not self.is_alone or not left_ns or spent_ns >= ALONE_NS:
                return found
            if timeout_ns > 0:
                left_ns = timeout_ns - spent_ns
                if left_ns <= 0:
                    return found

    def close(self) -> None:
        """Give the ring back; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
