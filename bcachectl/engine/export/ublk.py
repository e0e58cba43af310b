# SPDX-License-Identifier: GPL-2.0-only
"""`UblkExport`: a volume as /dev/ublkbN, served from the ring that carries the engine's own Ios.

::

    file system -> /dev/ublkbN -> ublk driver -> (a completion in our ring) -> this engine -> cache and backing device

Every tag of the device has a buffer, a descriptor that the driver fills in (`ublk_wire`), and three entries of the ring
that are written once:

* commit: the answer to the tag's request, and at the same time the fetch of its next one;
* read: of the cache device into the tag's buffer, linked to the commit;
* write: to the cache device, from the buffers of this tag and of others.

A request arrives as the completion of the tag's last fetch or commit.  What follows:

1. A read that `MappedVolume.reads` knows at once is served by `UblkReads`: offset and length are stored
   in the read, the length in the commit, and both are published.  The kernel reads and answers without asking us again,
   and no byte passes through Python.  Since nobody can look at the gen afterwards, the bucket is pinned until the read
   has ended.
2. Plain writes are served in groups by `UblkWrites`; neither does their data pass through Python.
3. A read that fails or is short takes its commit along (ECANCELED).  Then, as for writes that failed and for all other
   requests, a `bcachectl.engine.front.Request` goes to the volume, whose answer is a commit.

**When the engine dies** the driver keeps the device, and the requests that were not answered; a mounted file system
waits.  `UblkExport.recover` takes the device over, and those requests come again.  So a request may be carried out
twice, or half before and whole after: reads change nothing, and a write, a discard or zeroes that come twice leave what
they leave once, because whoever sent one may not touch the same sectors until it was answered.  And what was answered
must be there for the next engine, flushed or not, since nobody has seen a power loss.  So an engine with ublk devices
has a `bcachectl.engine.tail.Tail`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from typing import Protocol

from bcachectl.engine.buckets import Buckets
from bcachectl.engine.export import ublk_wire as wire
from bcachectl.engine.export.loopdev import is_claimed
from bcachectl.engine.export.ublk_control import UblkControl
from bcachectl.engine.export.ublk_reads import READ_NUMBER, UblkReads
from bcachectl.engine.export.ublk_writes import WRITE_NUMBER, UblkWrites
from bcachectl.engine.exported_writes import ExportedWrites
from bcachectl.engine.front import (
    REQ_DISCARD,
    REQ_FLUSH,
    REQ_FUA,
    REQ_META,
    REQ_READ,
    REQ_WRITE,
    REQ_WRITE_ZEROES,
    Request,
    Volume,
)
from bcachectl.engine.io.loop import Loop
from bcachectl.engine.io.medium import Medium
from bcachectl.engine.io.uring import OP_READ, OP_URING_CMD, OP_WRITEV, SQE_IO_LINK, RingBackend
from bcachectl.engine.read_batch import ReadBatch
from bcachectl.engine.sched import WaitQueue
from bcachectl.errors import DeviceError

QUEUES = 2
"""Hardware queues that are announced; the driver takes no more than there are processors."""
DEPTH = 64
"""Requests of one queue in flight."""
MAX_IO_BYTES = 512 << 10
"""Of one request.  Every tag has a buffer of this size, of which only what is used takes memory."""
MAX_BLOCK_BYTES = 4096
MAX_DISCARD_SECTORS = 1 << 21
"""A gigabyte: more in one request would keep what overlaps it waiting for long."""
OPEN_TIMEOUT_S = 5.0

_OPERATIONS = {wire.OP_READ: REQ_READ, wire.OP_WRITE: REQ_WRITE, wire.OP_FLUSH: REQ_FLUSH,
               wire.OP_DISCARD: REQ_DISCARD, wire.OP_WRITE_ZEROES: REQ_WRITE_ZEROES}


class MappedVolume(Volume, Protocol):
    """A volume that says where reads lie, many at a time and in columns."""

    @property
    def reads(self) -> ReadBatch:
        """Its batch."""
        ...

    @property
    def exported(self) -> ExportedWrites | None:
        """Takes what its batch of writes has placed; None if that has none."""
        ...


class _Tag:
    # The tag of the requests that came on one tag of the device.
    __slots__ = ("export", "index")

    def __init__(self, export: UblkExport, index: int) -> None:
        self.export = export
        self.index = index

    def answered(self, request: Request) -> None:
        """The engine has completed the request."""
        result = request.nsectors << 9 if request.op in (REQ_READ, REQ_WRITE) else 0
        self.export.commit(self.index, -request.error if request.error else result)


class UblkExport:
    """One volume's ublk device."""

    def __init__(self, loop: Loop, backend: RingBackend, control: UblkControl, volume: MappedVolume,
                 cache: Medium, buckets: Buckets, *, mark: int, stream: int,
                 block_bytes: int, can_discard: bool, can_zero: bool) -> None:
        """``block_bytes``: the largest logical block of the devices.  ``can_discard``, ``can_zero``: what is below the
        cache knows such requests.
        """
        self.loop = loop
        self.backend = backend
        self.control = control
        self.volume = volume
        self.cache = cache
        self.buckets = buckets
        self.mark = mark
        self.stream = stream
        block_bytes = min(max(block_bytes, volume.block_size_sectors << 9), MAX_BLOCK_BYTES)
        self.params = wire.Params(volume.size_sectors, block_bytes, MAX_IO_BYTES, volume.read_only,
                                  MAX_DISCARD_SECTORS if can_discard else 0, MAX_DISCARD_SECTORS if can_zero else 0)
        self.device: str | None = None
        self.dev_id = -1
        self.is_taken_over = False
        self.ended_wait = WaitQueue(loop.sched, "ublk tags ended")
        self._fd = -1
        self._base = -1
        self._first_slot = self._tag_count = 0
        self._ended = 0                         # tags whose fetch has come back for good
        self._tags: list[_Tag] = []
        self._maps: list[mmap.mmap] = []
        self._views: list[memoryview] = []      # of the maps: released before those are closed
        self._descs: list[memoryview] = []      # by tag: the three words of its descriptor
        self._buffers: list[memoryview] = []    # by tag
        self._reads: UblkReads | None = None

    async def start(self) -> str:
        """Make the device; its name, ``/dev/ublkb0``."""
        info = self.control.add(queues=min(QUEUES, os.cpu_count() or 1), depth=DEPTH, max_io_bytes=MAX_IO_BYTES,
                                mark=self.mark)
        self.dev_id = info.dev_id
        try:
            self.control.set_params(info.dev_id, self.params)
            self._open(info)
            await self.loop.call_in_thread(lambda: self.control.start(info.dev_id))
        except OSError as error:
            await self.stop()
            raise DeviceError(f"/dev/ublkb{info.dev_id}: cannot be started: {error.strerror}",
                              errno=error.errno or 0) from error
        self.device = f"/dev/ublkb{info.dev_id}"
        return self.device

    async def recover(self, info: wire.DevInfo) -> str:
        """Take the device over that another engine has left; its name."""
        self.dev_id = info.dev_id
        self.is_taken_over = True
        self.device = f"/dev/ublkb{info.dev_id}"
        size_sectors = self.control.size_sectors(info.dev_id)
        if size_sectors != self.volume.size_sectors:
            raise DeviceError(f"{self.device}: has {size_sectors} sectors, and {self.volume.name} has "
                              f"{self.volume.size_sectors}; unmount it, and remove it with 'bcachectl engine stop'")
        try:
            await self.loop.call_in_thread(lambda: self.control.begin_recovery(info.dev_id))
            self._open(info)
            await self.loop.call_in_thread(lambda: self.control.end_recovery(info.dev_id))
        except OSError as error:
            # The device stays: whoever uses it waits on, and the next engine may fare better.
            self.abort()
            raise DeviceError(f"{self.device}: cannot be taken over: {error.strerror}",
                              errno=error.errno or 0) from error
        return self.device

    async def is_in_use(self) -> bool:
        """Whether a mount or another program holds the device exclusively."""
        device = self.device
        return device is not None and await self.loop.call_in_thread(lambda: is_claimed(device))

    async def stop(self, *, wait: bool = True) -> None:
        """Take the device away; without ``wait``, also from those who have it open, who then get errors."""
        dev_id, self.dev_id = self.dev_id, -1
        self.device = None
        if dev_id >= 0:
            await self.loop.call_in_thread(lambda: self.control.stop(dev_id))
            while self._ended < self._tag_count:
                await self.ended_wait.wait()
            self.abort()
            await self.loop.call_in_thread(lambda: self.control.delete(dev_id))

    def abort(self) -> None:
        """Let go of the device and leave it to the driver, for an engine that takes it over."""
        self.device = None
        if self._base >= 0:
            assert self._reads is not None, "a device with a place in the ring has its reads"
            self.backend.remove_quick(self._base, self._reads)
            self._reads.forget()
            self._reads = None
            self._base = -1
            if self._ended == self._tag_count:
                self.backend.ring.give_back(self._first_slot, 3 * self._tag_count)
        # The driver counts a mapping as an open device, and so does the deletion of a device.
        for view in (*self._descs, *self._views):
            view.release()
        self._descs.clear()
        self._views.clear()
        for mapped in self._maps:
            mapped.close()
        self._maps.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # Requests

    def take(self, others: list[int], ended: int) -> None:
        """Requests have come that are no read hits, fetches have come back."""
        if ended:
            self._ended += ended
            self.ended_wait.wake_all()
        if others:
            self.loop.set_clock()
            requests = [request for request in map(self._request, others) if request is not None]
            self.volume.submit_all(requests)

    def set_clock(self) -> None:
        """Writes have ended while the engine's clock stood still."""
        self.loop.set_clock()

    def commit(self, index: int, result: int) -> None:
        """Answer the request of a tag, and fetch its next one."""
        if self._reads is not None:
            self._reads.commit(index, result)

    def _request(self, index: int) -> Request | None:
        # What the driver asks on a tag; None if it is answered already.
        word, sector = self._descs[index][:2]
        nsectors = word >> 32
        operation = _OPERATIONS.get(word & 0xFF)
        if operation is None:
            self.commit(index, -errno.EOPNOTSUPP)
            return None
        flags = (REQ_FUA if word & wire.FLAG_FUA else 0) | (REQ_META if word & wire.FLAG_META else 0)
        if operation == REQ_FLUSH:
            sector = nsectors = 0               # the block layer leaves anything there
        data = self._buffers[index][:nsectors << 9] if operation in (REQ_READ, REQ_WRITE) else None
        return Request(operation, sector, nsectors, data, flags, self.stream, self._tags[index])

    # Setting up

    def _open(self, info: wire.DevInfo) -> None:
        # Opens the device's other side, and puts a fetch for every tag into the ring.
        path = f"/dev/ublkc{info.dev_id}"
        self._fd = _open_when_there(path)
        count = info.queues * info.depth
        memory = mmap.mmap(-1, count * info.max_io_bytes)
        data = memoryview(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._buffers = [data[index * info.max_io_bytes:(index + 1) * info.max_io_bytes] for index in range(count)]
        self._tags = [_Tag(self, index) for index in range(count)]
        for queue in range(info.queues):
            length = -(-info.depth * wire.IO_DESC.size // mmap.PAGESIZE) * mmap.PAGESIZE
            mapped = mmap.mmap(self._fd, length, mmap.MAP_SHARED, mmap.PROT_READ,
                               offset=queue * wire.DESC_STRIDE_BYTES)
            self._maps.append(mapped)
            raw = memoryview(mapped)
            words = raw.cast("Q")
            self._views += (words, raw)
            self._descs += (words[3 * tag:3 * tag + 3] for tag in range(info.depth))
        ring = self.backend.ring
        self._first_slot = ring.reserve(3 * count)
        batch, exported, writes = self.volume.batch, self.volume.exported, None
        if batch is not None and exported is not None and self.cache.fd >= 0:
            writes = UblkWrites(ring, batch, exported, self, self._descs, self._first_slot + 2 * count,
                                self._first_slot, address, info.max_io_bytes, self.stream)
        self._reads = UblkReads(ring, self.volume.reads, self.buckets, self, self._descs, self._first_slot,
                                serves_hits=self.cache.fd >= 0, writes=writes)
        self._base = self.backend.add_quick(self._reads)
        self._tag_count = count                 # only now: `stop` waits for the fetches of so many to come back
        fetch, commit = (self.control.io_command(command)
                         for command in (wire.FETCH_REQ, wire.COMMIT_AND_FETCH_REQ))
        for index in range(count):
            buffer_address = address + index * info.max_io_bytes
            payload = wire.IO_CMD.pack(index // info.depth, index % info.depth, 0, buffer_address)
            ring.fill(self._first_slot + index, OP_URING_CMD, fd=self._fd, user_data=self._base | index,
                      offset=commit, payload=payload)
            ring.fill(self._first_slot + count + index, OP_READ, fd=self.cache.fd, flags=SQE_IO_LINK,
                      user_data=self._base | READ_NUMBER | index, address=buffer_address)
            ring.fill(self._first_slot + 2 * count + index, OP_WRITEV, fd=self.cache.fd,
                      user_data=self._base | WRITE_NUMBER | index)
            if not ring.push(OP_URING_CMD, fd=self._fd, user_data=self._base | index, offset=fetch, payload=payload):
                ring.enter()
                ring.push(OP_URING_CMD, fd=self._fd, user_data=self._base | index, offset=fetch, payload=payload)
        ring.enter()


def _open_when_there(path: str) -> int:
    # The node may come a moment after the device, and the driver lets go of a dead engine a moment later still.
    deadline_s = time.monotonic() + OPEN_TIMEOUT_S
    while True:
        try:
            return os.open(path, os.O_RDWR)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EBUSY, errno.EACCES) or time.monotonic() > deadline_s:
                raise
        time.sleep(0.01)
