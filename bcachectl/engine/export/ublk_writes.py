# SPDX-License-Identifier: GPL-2.0-only
"""`UblkWrites`: the plain writes of a ublk device, a group at a time, from the ring into the ring.

What `UblkReads` finds to be such a write waits here (`UblkWrites.add`) while another group is on its way, so that many
share what follows; most of that costs the same for one write as for all:

1. `UblkWrites.start` has the volume's batch place all that wait.  What it declines is left to the owner; what it would
   take soon goes on waiting.  What lies side by side on the cache device is one entry of the ring, a WRITEV of the
   tags' buffers.
2. When all of these have ended, `UblkWrites.conclude` has the keys made
   (`bcachectl.engine.exported_writes.ExportedWrites`).
3. Every tag is answered (`UblkWrites.answer`), and the next group may start.

All of that happens between two looks at the ring, as long as no task of the engine has anything to do.

Who keeps several writes in flight sends the next ones as soon as he is answered, one after the other.  The first of
them waits for as many as there were before, though not for long (`UblkWrites.may_start`): a group of one, and then
another for the rest, would take twice as long as one for all.

A group that fails begins anew, each write as a request of its own.

One of the modules that can be compiled: per write it knows columns and numbers only.
"""

from __future__ import annotations

import errno
from array import array
from time import monotonic_ns
from typing import TYPE_CHECKING, Protocol

from bcachectl.engine.export import ublk_wire as wire
from bcachectl.engine.front import REQ_WRITE, Request
from bcachectl.engine.io.ring import Ring
from bcachectl.engine.write_batch import MAX_WRITES, SOON, Placed, WriteBatch
from bcachectl.engine.write_group import commit_later

try:
    import cython
except ImportError:
    from bcachectl import plain as cython

if not cython.compiled:
    # Compiled, these are addresses, and a pointer (descs_c.pxd).
    from operator import getitem as desc_of

    kept_descs = list
if TYPE_CHECKING:
    from bcachectl.engine.exported_writes import ExportedWrites

PATIENCE_SHIFT = 1
"""For this part of the time that a group took, half of it, the next one waits for more."""
MAX_PATIENCE_NS = 4_000_000
HOLD_NS = 50_000_000
"""So long at most a write waits for what `SOON` is about; then it is left to the owner."""
RETRY_NS = 500_000
"""When those that are held are placed again, if nothing else comes before."""
WRITE_NUMBER = 1 << 17
"""The number of a write in the ring, with the tag of its first part."""


class Owner(Protocol):
    """Whom the rest is for."""

    def take(self, others: list[int], ended: int) -> None:
        """Tags with a request that is to go to the volume by itself."""
        ...

    def set_clock(self) -> None:
        """Bring the engine's clock up to now."""
        ...


class Group:
    """Writes that were placed together, by their tags; what their request is tagged with.  ``placed``: None once their
    data has ended.
    """

    def __init__(self, writes: UblkWrites, numbers: list[int], placed: Placed) -> None:
        self.writes = writes
        self.numbers = numbers
        self.placed: Placed | None = placed

    def answered(self, request: Request) -> None:
        """All of the keys are made, or none of it counts."""
        self.writes.answer(self.numbers, request.error)


class UblkWrites:
    """The writes of one device.  ``is_due``: the engine has something to do because of them, `finish` at first."""

    def __init__(self, ring: Ring, batch: WriteBatch, exported: ExportedWrites, owner: Owner,
                 descs: list[memoryview], first_write: int, first_commit: int, buffer_address: int,
                 buffer_bytes: int, stream: int) -> None:
        """``descs``: the words of each tag's descriptor.  Writes use as many slots of the ring from ``first_write`` on,
        filled but for place, address and count of buffers.
        """
        self.ring, self.batch, self.exported, self.owner = ring, batch, exported, owner
        self.descs = kept_descs(descs)
        self.first_write, self.first_commit = first_write, first_commit
        self.buffer_address, self.buffer_bytes = buffer_address, buffer_bytes
        self.stream = stream
        self.sched = exported.dev.cset.sched
        self.tags = array("I", bytes(4 * MAX_WRITES))           # that wait
        self.waiting = 0
        vectors = array("Q", bytes(16 * MAX_WRITES))            # address and bytes of each buffer of a group
        self.vectors, self.vectors_address = vectors, vectors.buffer_info()[0]
        self.expected = array("q", bytes(8 * len(descs)))       # bytes of the entry in flight, by its tag
        self.runs = 0                                           # entries in flight
        self.error = 0
        self.began_ns = 0
        self.group: Group | None = None                         # that is on its way
        self.is_written = False                                 # its data is, or will not be
        self.is_gathering = False
        self.awaited = 0                                        # writes that the next group waits for
        self.until_ns = 0                                       # and how long
        self.held_ns = 0                                        # since when one is held; or 0
        self.is_due = False
        self.is_open = True

    def add(self, number: int) -> None:
        """A tag has a plain write."""
        self.tags[self.waiting] = number
        self.waiting += 1

    def may_start(self) -> bool:
        """Whether the next group is to start.  If not, the ring is told when it would be."""
        if self.group is not None or not self.waiting:
            return False
        left_ns = self.until_ns - monotonic_ns()
        if self.waiting >= self.awaited or left_ns <= 0:
            return True
        if not self.is_gathering:
            self.is_gathering = True
            self.ring.gathering += 1
        self.ring.gather(self.awaited - self.waiting, left_ns)
        return False

    def _gathered(self) -> None:
        if self.is_gathering:
            self.is_gathering = False
            self.ring.gathering -= 1

    def start(self, declined: list[int]) -> None:
        """Place what waits and begin to write its data.  The tags of what the batch does not place are appended to
        ``declined``.
        """
        self._gathered()
        batch, tags, descs, count, soon, kept = self.batch, self.tags, self.descs, self.waiting, SOON, 0
        sectors, lengths, places = batch.sectors, batch.lengths, batch.places
        for index in range(count):
            desc = desc_of(descs, tags[index])
            sectors[index] = desc[1]
            lengths[index] = desc[0] >> 32
        batch.place_columns(count, self.stream)
        now_ns = monotonic_ns()
        may_hold = not self.held_ns or now_ns - self.held_ns < HOLD_NS
        numbers: list[int] = []
        for index in range(count):
            if places[index] == soon and may_hold:
                tags[kept] = tags[index]
                kept += 1
            elif places[index] < 0:
                declined.append(tags[index])
            else:
                lengths[len(numbers)] = lengths[index]
                numbers.append(tags[index])
        self.waiting = kept
        self.held_ns = 0 if not kept else self.held_ns or now_ns
        if numbers:
            placed = self.exported.begin()
            self.group = Group(self, numbers, placed)
            self.error, self.is_written = 0, False
            self.began_ns = now_ns
            self._publish(numbers, placed)
        elif kept:
            self.awaited, self.until_ns = MAX_WRITES, now_ns + RETRY_NS
            self.may_start()
        # Few buckets may be left, or gc has reason to run.
        self.is_due = self.is_due or self.wants_turn()

    def _publish(self, numbers: list[int], placed: Placed) -> None:
        # An entry for each run of data that lies side by side.
        ring, ptrs, lengths, vectors, expected = self.ring, placed.ptrs, self.batch.lengths, self.vectors, self.expected
        sqe_u64, sqe_u32 = ring.sqe_u64, ring.sqe_u32
        count, first, nbytes, slot, next_ptr = len(numbers), 0, 0, 0, 0
        for index in range(count):
            number, length = numbers[index], lengths[index] << 9
            if not index or ptrs[index] != next_ptr:
                first, nbytes = index, 0
                slot = self.first_write + number
                sqe_u64[8 * slot + 1] = (ptrs[index] >> 8) << 9
                sqe_u64[8 * slot + 2] = self.vectors_address + 16 * index
                ring.publish(slot)
                self.runs += 1
            vectors[2 * index] = self.buffer_address + number * self.buffer_bytes
            vectors[2 * index + 1] = length
            nbytes += length
            next_ptr = ptrs[index] + (length >> 1)
            sqe_u32[16 * slot + 6] = index + 1 - first
            expected[numbers[first]] = nbytes

    def landed(self, number: int, result: int) -> None:
        """An entry has ended."""
        if result != self.expected[number]:
            self.error = -result if result < 0 else errno.EIO
        self.runs -= 1
        if not self.runs:
            self.is_written = self.is_due = True

    def finish(self, declined: list[int]) -> None:
        """Before anything else of the engine runs: `conclude`, do not wait for more, and count what was done."""
        if self.is_written:
            self.conclude()
        if self.waiting and self.group is None:
            self.start(declined)
        self.batch.settle()
        self.is_due = False

    def conclude(self) -> None:
        """The data of the group is written: have its keys made, and answer."""
        group, exported = self.group, self.exported
        self.is_written = False
        if group is None or group.placed is None:
            return
        placed, group.placed = group.placed, None
        self.owner.set_clock()
        if self.error:
            exported.failed(placed, self.error)
            self.answer(group.numbers, self.error)
        elif exported.written(placed, monotonic_ns() - self.began_ns):
            self.answer(group.numbers, 0)
        else:
            commit_later(exported.dev, placed, Request(REQ_WRITE, 0, 0, None, 0, 0, group))

    def wants_turn(self) -> bool:
        """Whether the engine has something to do."""
        sched = self.sched
        if not sched.ready and not sched.outbox:
            return self.error != 0
        return self.error != 0 or self.exported.dev.cset.wants_turn()

    def answer(self, numbers: list[int], error: int) -> None:
        """Answer the requests of these tags, and fetch their next ones; after an error they begin anew."""
        if not self.is_open:
            return
        self.group = None
        now_ns = monotonic_ns()
        self.awaited = self.waiting + len(numbers)
        self.until_ns = now_ns + min(now_ns - self.began_ns >> PATIENCE_SHIFT, MAX_PATIENCE_NS)
        if error:
            self.owner.take(numbers, 0)
        else:
            self._commit(numbers)
        if self.may_start():
            declined: list[int] = []
            self.start(declined)
            if declined:
                self.owner.take(declined, 0)

    def _commit(self, numbers: list[int]) -> None:
        ring, descs, first_commit, result_word = self.ring, self.descs, self.first_commit, wire.IO_CMD_RESULT_WORD
        sqe_i32 = ring.sqe_i32
        for index in range(len(numbers)):
            number = numbers[index]
            desc = desc_of(descs, number)
            slot = first_commit + number
            sqe_i32[16 * slot + result_word] = desc[0] >> 32 << 9
            ring.publish(slot)

    def forget(self) -> None:
        """Nothing comes any more, and nobody is to be answered."""
        self.is_open = False
        self.runs = 0
        self.batch.settle()
        self._gathered()
        group, self.group = self.group, None
        if group is not None and group.placed is not None:
            self.exported.lost(group.placed)
