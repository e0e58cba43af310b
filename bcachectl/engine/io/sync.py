# SPDX-License-Identifier: GPL-2.0-only
"""`SyncBackend`: performs each Io at once, with one system call; and `perform`, the meaning of an Io in plain words.

For image files in the page cache nothing is faster, and nothing is simpler to debug.  A slow device makes the engine
wait, so `bcachectl.engine.io.uring` is the choice for block devices.
"""

from __future__ import annotations

import errno
import os

from bcachectl.engine.io.medium import Medium
from bcachectl.engine.sched import DISCARD, FLUSH, FUA, PREFLUSH, READ, WRITE, WRITE_ZEROES, Io


def perform(io: Io, medium: Medium) -> None:
    """Do what ``io`` asks of ``medium`` and set ``io.error``."""
    offset_bytes = io.sector << 9
    try:
        if io.op == READ:
            medium.read_into(offset_bytes, memoryview(io.buf).cast("B"))
        elif io.op == WRITE or io.op == WRITE_ZEROES:
            if io.flags & PREFLUSH:
                medium.sync()
            if io.op == WRITE:
                medium.write_from(offset_bytes, io.joined())
            else:
                medium.write_zeroes(offset_bytes, io.nsectors << 9)
            if io.flags & FUA:
                medium.sync()
        elif io.op == FLUSH:
            # Nothing can be volatile on a device that is never written; a read-only medium may not even know fsync.
            if not medium.read_only:
                medium.sync()
        else:
            assert io.op == DISCARD, io
            medium.trim(offset_bytes, io.nsectors << 9)
    except OSError as error:
        io.error = error.errno or errno.EIO
    else:
        io.error = 0


class SyncBackend:
    """Ios are done when `submit` returns."""

    def __init__(self, media: list[Medium]) -> None:
        self.media = media
        self.done: list[Io] = []

    def submit(self, ios: list[Io]) -> None:
        """Perform the Ios one after the other."""
        for io in ios:
            medium = self.media[io.device]
            if not self._perform_quickly(io, medium):
                perform(io, medium)
        self.done += ios

    def reap(self) -> list[Io]:
        """All that was submitted since the last call."""
        done, self.done = self.done, []
        return done

    def fileno(self) -> int:
        """No descriptor."""
        return -1

    def pending(self) -> int:
        """How many wait for `reap`."""
        return len(self.done)

    def close(self) -> None:
        """Nothing to free."""

    @staticmethod
    def _perform_quickly(io: Io, medium: Medium) -> bool:
        # The two usual Ios without the layers of `perform`.  Anything short or wrong is done again, properly.
        if medium.fd < 0 or medium.direct or io.flags:
            return False
        try:
            if io.op == WRITE and not medium.read_only:
                parts = io.buf if type(io.buf) is tuple else (io.buf,)
                return os.pwritev(medium.fd, parts, io.sector << 9) == io.nsectors << 9
            if io.op == READ:
                return os.preadv(medium.fd, (io.buf,), io.sector << 9) == io.nsectors << 9
        except OSError:
            pass
        return False
