# SPDX-License-Identifier: GPL-2.0-only
"""`Bdev`: one device as the engine sees it.  Every method makes an `Io`, submits it, and returns it to be awaited.

``await cache.read(sector, buf)`` suspends until the device has answered and gives 0 or an errno.  Two Ios that may run
side by side are made first and awaited after::

    there = backing.write(sector, buf)
    here = cache.write(sector, buf)
    error = await there or await here

A `Bdev` knows no file descriptor: the rim opens the real device at the same index and performs the Ios.
"""

from __future__ import annotations

from typing import Any

from bcachectl.engine.sched import DISCARD, FLUSH, FUA, PREFLUSH, READ, WRITE, WRITE_ZEROES, Io, Sched


class Bdev:
    """A device by its index, with the limits that the engine has to respect.

    ``size_sectors``: whole size.  ``atomic_sectors``: the largest aligned write that power loss never tears (the
    logical block size).  ``optimal_io_sectors``: the queue's io_opt, 0 if it gives none (stripe size of a raid).
    ``partial_stripes_expensive``: writing a part of a stripe costs a read first."""

    __slots__ = (
        "sched",
        "index",
        "name",
        "size_sectors",
        "atomic_sectors",
        "optimal_io_sectors",
        "partial_stripes_expensive",
        "can_discard",
        "read_only",
        "submitted",
    )

    def __init__(
        self,
        sched: Sched,
        index: int,
        name: str,
        *,
        size_sectors: int,
        atomic_sectors: int = 1,
        optimal_io_sectors: int = 0,
        partial_stripes_expensive: bool = False,
        can_discard: bool = False,
        read_only: bool = False,
    ) -> None:
        self.sched = sched
        self.index = index
        self.name = name
        self.size_sectors = size_sectors
        self.atomic_sectors = atomic_sectors
        self.optimal_io_sectors = optimal_io_sectors
        self.partial_stripes_expensive = partial_stripes_expensive
        self.can_discard = can_discard
        self.read_only = read_only
        self.submitted = 0

    def read(self, sector: int, buf: bytearray | memoryview, what: str = "data") -> Io:
        """Read into the whole of ``buf``, whose length is a multiple of 512."""
        return self._submit(READ, sector, len(buf) >> 9, buf, 0, what)

    def write(self, sector: int, buf: bytes | bytearray | memoryview, flags: int = 0, what: str = "data") -> Io:
        """Write the whole of ``buf``; ``flags`` of PREFLUSH and FUA."""
        return self._submit(WRITE, sector, len(buf) >> 9, buf, flags, what)

    def write_parts(self, sector: int, parts: tuple[Any, ...], what: str = "data") -> Io:
        """Write several buffers side by side."""
        return self._submit(WRITE, sector, sum(map(len, parts)) >> 9, parts, 0, what)

    def flush(self) -> Io:
        """Make everything the device has acknowledged durable."""
        return self._submit(FLUSH, 0, 0, None, 0, "flush")

    def discard(self, sector: int, nsectors: int) -> Io:
        """Tell the device that the range is not needed; what it reads as afterwards is undefined."""
        return self._submit(DISCARD, sector, nsectors, None, 0, "discard")

    def write_zeroes(self, sector: int, nsectors: int, flags: int = 0) -> Io:
        """Make the range read as zeros."""
        return self._submit(WRITE_ZEROES, sector, nsectors, None, flags, "zeroes")

    async def write_head_last(self, sector: int, buf: memoryview, what: str) -> int:
        """Write ``buf`` so that power loss leaves either all of it or nothing that its first sectors vouch for.

        The header (checksum, magic, seq) is in the first atomic unit.  The rest is made durable first, then that unit
        with FUA.  Without this a torn set of a btree node, which kernels refuse to read, could be left behind.  The
        PREFLUSH is needed for a single unit too: keys that were not journaled may name data the device has not made
        durable.
        """
        head_bytes = self.atomic_sectors << 9
        if len(buf) > head_bytes:
            error = await self.write(sector + self.atomic_sectors, buf[head_bytes:], 0, what)
            if error:
                return error
            error = await self.write(sector, buf[:head_bytes], PREFLUSH | FUA, what)
        else:
            error = await self.write(sector, buf, PREFLUSH | FUA, what)
        return error

    def _submit(self, op: int, sector: int, nsectors: int, buf: object, flags: int, what: str) -> Io:
        assert op in (READ, FLUSH) or not self.read_only, f"{what} to read-only {self.name}"
        assert 0 <= sector <= sector + nsectors <= self.size_sectors, (what, sector, nsectors)
        self.submitted += len(buf) if type(buf) is tuple else 1
        return self.sched.submit(Io(op, self.index, sector, nsectors, buf, flags, what))
