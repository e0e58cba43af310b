# SPDX-License-Identifier: GPL-2.0-only
"""`EntryLane` writes entries of the journal from between two turns of the engine: no task, no Io, no loop.

For writes that are answered when their keys are in the journal on the device (docs/decisions/0030), so that a group of
them need not leave the ring.  An entry is two entries of the ring that are written once: fdatasync, and linked to it
the write with RWF_DSYNC.  What ends in another way than as a whole is written once more as any other Io, whose error
counts.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

from bcachectl.engine.io.ring import Arrivals
from bcachectl.engine.io.uring import FSYNC_DATASYNC, OP_FSYNC, OP_WRITE, SQE_IO_LINK, RingBackend
from bcachectl.engine.journal import Entry, Journal
from bcachectl.engine.sched import FUA, PREFLUSH
from bcachectl.ondisk.jset import JSET_MAX_BYTES

if TYPE_CHECKING:
    from bcachectl.engine.io.loop import Loop

_FLUSH, _WRITE = 0, 1


class EntryLane:
    """One set's; a `bcachectl.engine.io.ring.QuickClient` and a `bcachectl.engine.journal.EntryWriter`."""

    def __init__(self, loop: Loop, backend: RingBackend, fd: int, journal: Journal) -> None:
        """``fd``: of the cache device.  OSError if the ring has no room."""
        self.loop = loop
        self.journal = journal
        self.ring = backend.ring
        self.arrivals = Arrivals(4)
        # Of compiled columns, an attribute is a new object each time.
        self._numbers, self._results = memoryview(self.arrivals.numbers), memoryview(self.arrivals.results)
        self._sqe_u64, self._sqe_u32 = memoryview(self.ring.sqe_u64), memoryview(self.ring.sqe_u32)
        self._memory = mmap.mmap(-1, JSET_MAX_BYTES)
        self._first_slot = self.ring.reserve(2)
        self._entry: Entry | None = None
        self._left = 0                          # entries of the ring in flight
        self._is_whole = True
        base = backend.add_quick(self)
        self.ring.fill(self._first_slot + _FLUSH, OP_FSYNC, fd=fd, op_flags=FSYNC_DATASYNC, flags=SQE_IO_LINK,
                       user_data=base | _FLUSH)
        self.ring.fill(self._first_slot + _WRITE, OP_WRITE, fd=fd, op_flags=os.RWF_DSYNC, user_data=base | _WRITE,
                       address=ctypes.addressof(ctypes.c_char.from_buffer(self._memory)))

    def write_entry(self, entry: Entry) -> None:
        """Publish it."""
        assert self._entry is None, "one entry at a time"
        nbytes, slot = len(entry.data), self._first_slot + _WRITE
        self._memory[:nbytes] = entry.data
        self._sqe_u64[8 * slot + 1] = entry.sector << 9
        self._sqe_u32[16 * slot + 6] = nbytes
        self._entry, self._left, self._is_whole = entry, 2, True
        self.ring.publish(self._first_slot + _FLUSH)
        self.ring.publish(slot)

    def serve(self) -> bool:
        """Tell the journal of an entry that has ended; whether the engine has something to do because of it."""
        arrivals, entry = self.arrivals, self._entry
        for index in range(arrivals.count):
            assert entry is not None, "what has ended was begun"
            wanted = len(entry.data) if self._numbers[index] == _WRITE else 0
            self._is_whole = self._is_whole and self._results[index] == wanted
            self._left -= 1
        arrivals.count = 0
        if entry is not None and not self._left:
            self._entry = None
            for quick in self.ring.quick:
                quick.finish()
            if self._is_whole:
                self.loop.set_clock()
                self.journal.entry_ended(0)
                self.loop.answer()
            else:
                self.loop.sched.spawn(self._again(entry), "journal entry, once more")
        return self.journal.cset.wants_turn()

    def finish(self) -> None:
        """Nothing is left to be told."""

    async def _again(self, entry: Entry) -> None:
        cache = self.journal.cset.cache
        self.journal.entry_ended(await cache.write(entry.sector, entry.data, PREFLUSH | FUA, "journal"))
