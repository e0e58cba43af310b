# SPDX-License-Identifier: GPL-2.0-only
"""The seam to the exports: a `Request` goes in through `Volume.submit`, and comes back in `Front.completed`.

An export (NBD, loop, ublk) knows nothing of caches.  It does four things:

1. for a read it may first ask `Volume.read_nowait`; if the answer is not `NOT_NOW` the data lies in one piece at that
   byte of the cache device and the export reads it itself, at once, without suspending anything in between, or pins
   the bucket (`bcachectl.engine.buckets.Buckets.pin`) until it has read; `Volume.reads` answers for many, or for one
   extent of a read after the other;
2. writes it may first offer to the volume's `bcachectl.engine.write_batch.WriteBatch`, if it has one; what that places
   on the cache device the export writes there itself, at once, or as a group in flight
   (`bcachectl.engine.write_group`);
3. otherwise it makes a `Request` and calls `Volume.submit`;
4. after each `Sched.run` it takes the requests out of `Front.completed` and answers its clients.  ``error`` is 0 or
   an errno.

Sectors are 512 bytes and relative to the volume.  A request that is not aligned to ``block_size_sectors`` is allowed
on a cached device (it bypasses the cache) and answered with EINVAL on a flash-only volume when it writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from bcachectl.engine.read_batch import ReadBatch
    from bcachectl.engine.write_batch import WriteBatch

REQ_READ, REQ_WRITE, REQ_FLUSH, REQ_DISCARD, REQ_WRITE_ZEROES, REQ_STATUS = range(6)
"""What a `Request` asks.  REQ_STATUS fills ``extents`` for NBD's block status."""

REQ_FUA = 1
"""`Request.flags`: the data is durable when the request completes."""
REQ_PREFLUSH = 2
"""`Request.flags`: all that was acknowledged before is durable when the request completes."""
REQ_META = 4
"""`Request.flags`: file system metadata (kept in the cache whatever the read-ahead policy says)."""
REQ_RAHEAD = 8
"""`Request.flags`: read-ahead or background I/O."""
REQ_SYNC = 16
"""`Request.flags`: someone waits for this write (REQ_SYNC of the block layer)."""

NOT_NOW = -1
"""`Volume.read_nowait`: the read needs more than one lookup in memory; use `Volume.submit`."""

EXTENT_HOLE, EXTENT_CLEAN, EXTENT_DIRTY = range(3)
"""What REQ_STATUS says of a range: not in the cache, in the cache and on the backing device, only in the cache."""


class Request:
    """One request of a client.

    ``sector`` and ``nsectors`` say where; ``buf`` is filled by a read and taken from by a write, ``nsectors * 512``
    bytes, and must stay as it is until the request comes back.  ``stream`` (16 bits) stands for the issuing task: it
    drives sequential detection and the write point.  ``tag`` belongs to the export."""

    __slots__ = ("op", "sector", "nsectors", "buf", "flags", "stream", "tag", "error", "extents", "start_ns")

    def __init__(
        self, op: int, sector: int, nsectors: int, buf: Any = None, flags: int = 0, stream: int = 0, tag: Any = None
    ) -> None:
        self.op = op
        self.sector = sector
        self.nsectors = nsectors
        self.buf = buf
        self.flags = flags
        self.stream = stream
        self.tag = tag
        self.error = 0
        self.extents: list[tuple[int, int]] = []
        self.start_ns = 0


class Volume(Protocol):
    """An exported device: a cached device or a flash-only volume."""

    @property
    def name(self) -> str:
        """``bcache0``, ``bcache1`` ... in the order of the uuid entries."""
        ...

    @property
    def uuid(self) -> bytes:
        """The backing device's or flash-only volume's uuid."""
        ...

    @property
    def label(self) -> str:
        """The label, up to its first NUL."""
        ...

    @property
    def size_sectors(self) -> int:
        """What a client can use."""
        ...

    @property
    def block_size_sectors(self) -> int:
        """The unit that requests should keep to."""
        ...

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        ...

    @property
    def reads(self) -> ReadBatch | None:
        """Says where many reads lie, in columns; None if only `reads_nowait` does."""
        ...

    @property
    def batch(self) -> WriteBatch | None:
        """Takes writes that need not wait; None if all writes go by `submit`."""
        ...

    def read_nowait(self, sector: int, nsectors: int) -> int:
        """Byte offset on the cache device where the whole range lies in one piece, or NOT_NOW."""
        ...

    def reads_nowait(self, reads: list[tuple[int, int]]) -> list[int]:
        """`read_nowait` for each (sector, nsectors), which is cheaper than one after the other."""
        ...

    def submit(self, request: Request) -> None:
        """Take a request; it comes back in `Front.completed`, possibly before this returns."""
        ...

    def submit_all(self, requests: list[Request]) -> None:
        """`submit` each of some requests that came together, which may be cheaper; they come back in any order."""
        ...


class Front:
    """Where completed requests wait for their exports, in the order they completed."""

    __slots__ = ("completed",)

    def __init__(self) -> None:
        self.completed: list[Request] = []

    def complete(self, request: Request, error: int = 0) -> None:
        """Give a request back."""
        request.error = error
        self.completed.append(request)
