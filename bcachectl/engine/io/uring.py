# SPDX-License-Identifier: GPL-2.0-only
"""`RingBackend` performs Ios on a `bcachectl.engine.io.ring.Ring`.

Client 0 of the ring are the Ios: an entry's number is the index of a `_Flight`, which holds the Io, the memory it uses,
and how far it got.  Other entries belong to a `RingClient`, or to a `bcachectl.engine.io.ring.QuickClient`.

What goes where (`RingBackend.submit`):

1. A medium without a descriptor, and what the ring has no entry for (discard of a block device), is performed at once.
2. A read of a file in the page cache is tried with RWF_NOWAIT, a plain write of one is done at once: a copy in memory
   costs less than a trip through the ring.  What is not in memory takes the ring, so other work goes on.
3. All else takes the ring.  PREFLUSH is an fdatasync entry before the write's own; FUA is RWF_DSYNC.

A short read or write goes into the ring again for the rest; an empty read is the end of a file that shrank: EIO.
With O_DIRECT, memory that is not aligned is replaced by a copy that is.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
from collections import deque
from collections.abc import Sequence
from time import monotonic_ns
from typing import Any, Protocol

import numpy as np

from bcachectl.engine.io.medium import Medium
from bcachectl.engine.io.ring import CLIENT_SHIFT, RING_ENTRIES, QuickClient, Ring
from bcachectl.engine.io.sync import perform
from bcachectl.engine.sched import DISCARD, FLUSH, FUA, NS_PER_S, PREFLUSH, READ, WRITE, WRITE_ZEROES, Io

_OP_POLL_ADD, _OP_FALLOCATE = 6, 17
OP_WRITEV, OP_FSYNC, OP_READ, OP_WRITE, OP_URING_CMD = 2, 3, 22, 23, 46
SQE_IO_LINK = 1 << 2
"""Flag of an entry: the next one begins when this one has succeeded, and fails with ECANCELED when it has not."""
FSYNC_DATASYNC = 1
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2

LOOK_NS = 200_000
"""How long the backend looks whether something completes before it sleeps (docs/decisions/0024)."""
LOOKS_SKIPPED_MAX = 256

MAX_KEPT, MAX_KEPT_SECTORS = 4, 256
"""Stand-ins for memory that is not aligned, which are used again: of each size, and how long at most."""

_POLL_CLIENT = (1 << CLIENT_SHIFT) - 1
"""No client, but the loop's epoll; client 0 are the Ios."""
_POLL = _POLL_CLIENT << CLIENT_SHIFT


class _Flight:
    # An Io in the ring.  `array` pins the memory; `bounce` is the aligned stand-in for it.  `flushing`: an fdatasync
    # goes before the write, which is linked to it.  `entries` are in the ring, and `result` is what has come of others:
    # an error, or what they have done together.
    __slots__ = ("io", "medium", "array", "bounce", "address", "done_bytes", "flushing", "entries", "result")

    def __init__(self, io: Io, medium: Medium) -> None:
        self.io = io
        self.medium = medium
        self.array: Any = None
        self.bounce: _Bounce | None = None
        self.address = 0
        self.done_bytes = 0
        self.flushing = False
        self.entries = 0
        self.result = 0


class _Bounce:
    # Aligned memory for a device that wants that; ``address`` is looked up once.

    __slots__ = ("address", "memory")

    def __init__(self, nbytes: int) -> None:
        self.memory = memoryview(mmap.mmap(-1, nbytes))
        self.address: int = np.frombuffer(self.memory, np.uint8).__array_interface__["data"][0]

    def fill(self, parts: Sequence[Any]) -> None:
        memory, at = self.memory, 0
        for part in parts:
            data = part if type(part) is bytes else memoryview(part).cast("B")
            end = at + len(data)
            memory[at:end] = data
            at = end


class Looks:
    """Whether to look before the next sleep: always, as long as something is found, and after every time in vain twice
    as many sleeps pass as before, up to `LOOKS_SKIPPED_MAX`.
    """

    def __init__(self) -> None:
        self._skipped = 0
        self._left = 0

    def is_due(self) -> bool:
        """Whether to look now; asked before each sleep."""
        self._left -= 1
        return self._left < 0

    def ended(self, *, found: bool) -> None:
        """What came of it."""
        self._skipped = 0 if found else min(2 * self._skipped + 1, LOOKS_SKIPPED_MAX)
        self._left = self._skipped


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
        self.client_ios = 0
        """Reads and writes in flight that a process waits for, and that a device is to end."""
        self.is_looking_for_requests = False
        """Processes wait for answers and send their next requests soon, in another way than by this ring."""
        self._device_looks, self._request_looks = Looks(), Looks()
        self._may_look = len(os.sched_getaffinity(0)) > 1   # with one processor, nobody else would run meanwhile
        self._bounces: dict[int, list[_Bounce]] = {}        # by their sectors
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

    def add_quick(self, client: QuickClient) -> int:
        """As `add_client`, for one who serves himself."""
        self._last_client += 1
        self.ring.add_quick(self._last_client, client)
        return self._last_client << CLIENT_SHIFT

    def remove_quick(self, base: int, client: QuickClient) -> None:
        """As `remove_client`."""
        self.ring.remove_quick(base >> CLIENT_SHIFT, client)

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
        if self.in_ring or self.clients or self.ring.quick:
            self._sort_out(self.ring.take_served())
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
        timeout_ns = 0 if self.done else int(timeout_s * NS_PER_S)
        self._sort_out((self._look(timeout_ns) if timeout_ns else {}) or self.ring.serve(timeout_ns))
        is_due, self._is_poll_due = self._is_poll_due, False
        return is_due

    def _look(self, timeout_ns: int) -> dict[int, list[tuple[int, int]]]:
        # What completes within `LOOK_NS`, if it is worth looking.  A device that is quick enough and a process that
        # sends its next request soon are two questions.
        if not self._may_look or not (self.client_ios or self.is_looking_for_requests):
            return {}
        looks = self._device_looks if self.client_ios else self._request_looks
        if not looks.is_due():
            return {}
        end_ns = monotonic_ns() + (LOOK_NS if timeout_ns < 0 else min(LOOK_NS, timeout_ns))
        while True:
            landed = self.ring.serve(0)
            if landed or monotonic_ns() >= end_ns:
                looks.ended(found=bool(landed))
                return landed

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
            self.in_ring -= len(self.ring.take().get(0, ()))
        self.ring.close()

    def _push_poll(self, fd: int) -> bool:
        return self.ring.push(_OP_POLL_ADD, fd=fd, op_flags=select.POLLIN, user_data=_POLL)

    def _sort_out(self, landed: dict[int, list[tuple[int, int]]]) -> None:
        # What the ring has completed: Ios are done, or go on; the rest is told to the clients.
        for quick in self.ring.quick:
            quick.finish()
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
                parts = io.buf if type(io.buf) is tuple else (io.buf,)
                return os.pwritev(medium.fd, parts, io.sector << 9) == io.nsectors << 9
        except OSError:
            pass                                    # EAGAIN; or an error, which the ring will meet again and report
        return False

    def _launch(self, io: Io, medium: Medium) -> None:
        flight = _Flight(io, medium)
        if io.op == WRITE and medium.direct and type(io.buf) in (bytes, tuple):
            # Such memory is never aligned.
            self._bounce(flight).fill(io.buf if type(io.buf) is tuple else (io.buf,))
        elif io.op in (READ, WRITE):
            flight.array = np.frombuffer(io.joined(), np.uint8)
            flight.address = flight.array.__array_interface__["data"][0]
            if medium.direct and flight.address & (medium.logical_block_bytes - 1):
                bounce = self._bounce(flight)
                if io.op == WRITE:
                    bounce.fill((flight.array.data,))
        flight.flushing = io.op == WRITE and bool(io.flags & PREFLUSH)
        if self.free:
            index = self.free.pop()
            self.flights[index] = flight
        else:
            index = len(self.flights)
            self.flights.append(flight)
        self.waiting.append(index)

    def _bounce(self, flight: _Flight) -> _Bounce:
        # Aligned memory for a flight.
        nsectors = flight.io.nsectors
        kept = self._bounces.get(nsectors)
        bounce = flight.bounce = kept.pop() if kept else _Bounce(nsectors << 9)
        flight.address = bounce.address
        return bounce

    def _push_waiting(self) -> None:
        # The completion ring must not overflow; the other half of it is the clients'.
        while self.waiting and self.in_ring < self.max_in_ring:
            if not self._push(self.waiting[0]):
                self.ring.enter()
                if not self._push(self.waiting[0]):
                    return
            self.waiting.popleft()

    def _push(self, index: int) -> bool:
        flight = self.flights[index]
        assert flight is not None, "an index that is waiting or lands is in flight"
        io, fd, push = flight.io, flight.medium.fd, self.ring.push
        wanted = 2 if flight.flushing else 1
        if self.ring.room < wanted:
            return False
        flight.entries, flight.result = wanted, 0
        self.in_ring += wanted
        if io.op == FLUSH or flight.flushing:
            push(OP_FSYNC, fd=fd, op_flags=FSYNC_DATASYNC, user_data=index,
                 flags=SQE_IO_LINK if flight.flushing else 0)
        offset_bytes, left_bytes = (io.sector << 9) + flight.done_bytes, (io.nsectors << 9) - flight.done_bytes
        if io.op in (READ, WRITE):
            push(OP_READ if io.op == READ else OP_WRITE, fd=fd, offset=offset_bytes,
                 address=flight.address + flight.done_bytes, length=left_bytes,
                 op_flags=os.RWF_DSYNC if io.flags & FUA else 0, user_data=index)
        elif io.op != FLUSH:
            push(_OP_FALLOCATE, fd=fd, offset=offset_bytes, address=left_bytes,
                 length=_FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE, user_data=index)
        return True

    def _landed(self, index: int, result: int) -> bool:
        # True if the flight goes on with another entry.
        flight = self.flights[index]
        assert flight is not None, "a completion is of an Io that is in the ring"
        io = flight.io
        before = flight.result
        if before < 0 and (result >= 0 or before != -errno.ECANCELED):
            result = before                     # a write whose fdatasync failed is canceled: that is not its error
        elif result >= 0:
            result += before
        flight.entries, flight.result = flight.entries - 1, result
        if flight.entries:
            return False
        if result in (-errno.EINTR, -errno.EAGAIN):
            self.waiting.append(index)
            return True
        if result >= 0 and io.op in (READ, WRITE):
            flight.flushing = False
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
            flight.array[:] = np.frombuffer(flight.bounce.memory, np.uint8)
        if flight.bounce is not None and io.nsectors <= MAX_KEPT_SECTORS:
            kept = self._bounces.setdefault(io.nsectors, [])
            if len(kept) < MAX_KEPT:
                kept.append(flight.bounce)
        self.flights[index] = None
        self.free.append(index)
        self.done.append(io)
        return False
