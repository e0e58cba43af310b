# SPDX-License-Identifier: GPL-2.0-only
"""`DirectReads`: read hits of NBD clients on a cache device that goes past the page cache, many in flight at once.

1. A read that `bcachectl.engine.front.Volume.read_nowait` knows gets a buffer and an entry in the ring
   (`DirectReads.start`); no task is made.  All entries of a turn are handed over with one call (`DirectReads.submit`).
2. Its bucket is pinned until the read has ended, so its gen cannot change meanwhile (docs/decisions/0021).
3. The data has arrived (`DirectReads.landed`): the connection sends it.  A read that fails, or is short, becomes a
   `bcachectl.engine.front.Request` like any other: of clean data the backing device has a copy.
"""

from __future__ import annotations

from time import monotonic_ns
from typing import Protocol

from bcachectl.engine.buckets import Buckets
from bcachectl.engine.export.buffers import Buffer
from bcachectl.engine.io.uring import OP_READ, RingBackend
from bcachectl.engine.streams import Congestion

MAX_FLIGHTS = 192
"""The clients' half of the completion ring must hold them."""
MAX_DIRECT_BYTES = 256 << 10
"""A longer read takes the way of all other requests."""


class Reader(Protocol):
    """Who asked, as `DirectReads` sees it: a request in flight with its buffer."""

    length: int
    buffer: Buffer | None

    def arrived(self, offset: int) -> None:
        """The data is in the buffer."""
        ...

    def failed(self, offset: int) -> None:
        """It is not."""
        ...


class DirectReads:
    """The reads of one server from the cache device ``fd``; a client of the backend's ring as long as that lives."""

    def __init__(self, backend: RingBackend, fd: int, buckets: Buckets, congestion: Congestion) -> None:
        self.backend = backend
        self.fd = fd
        self.buckets = buckets
        self.congestion = congestion
        self.free = list(range(MAX_FLIGHTS))
        self.flights: list[tuple[Reader, int, int, int] | None] = [None] * MAX_FLIGHTS
        self._is_unsent = False
        self._base = backend.add_client(self)

    def start(self, reader: Reader, place: int, offset: int) -> bool:
        """Read ``reader.length`` bytes at ``place`` of the cache device into its buffer; ``offset`` is the volume's.

        False if too many are in flight.
        """
        if not self.free or reader.buffer is None:
            return False
        number, ring = self.free[-1], self.backend.ring
        for _ in range(2):
            if ring.push(OP_READ, fd=self.fd, offset=place, address=reader.buffer.address, length=reader.length,
                         op_flags=0, user_data=self._base | number):
                break
            ring.enter()
        else:
            return False
        self.free.pop()
        bucket = (place >> 9) >> self.buckets.bucket_shift
        self.buckets.pin_at[bucket] += 1
        # Not by the engine's clock: it stands still while the loop sleeps, and that would count as a slow device.
        self.flights[number] = reader, offset, bucket, monotonic_ns()
        self._is_unsent = True
        return True

    def submit(self) -> None:
        """Hand over what was started."""
        if self._is_unsent:
            self._is_unsent = False
            if not self.backend.waited_in:
                self.backend.ring.enter()

    def landed(self, completions: list[tuple[int, int]]) -> None:
        """Reads have ended."""
        flights, pin_at, now_ns, account = self.flights, self.buckets.pin_at, monotonic_ns(), self.congestion.account
        for number, result in completions:
            flight = flights[number]
            assert flight is not None
            reader, offset, bucket, began_ns = flight
            flights[number] = None
            self.free.append(number)
            pin_at[bucket] -= 1
            account(now_ns - began_ns, is_write=False)
            if result == reader.length:
                reader.arrived(offset)
            else:
                reader.failed(offset)
