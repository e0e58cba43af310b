# SPDX-License-Identifier: GPL-2.0-only
"""`FuseFile`: a volume as one file, served over /dev/fuse without a library; what a loop device is set up on.

A FUSE mount may lie on a plain file: its root is then a file and not a directory, and the whole file system is our
volume.  Life:

1. `FuseFile.mount` opens /dev/fuse and mounts it on the file at ``path``.  The kernel sends INIT; `FuseFile.on_ready`
   answers it with our limits.
2. Requests come one per read(2): 80 bytes of header, the payload of a write behind them in page-aligned memory.  Each
   answer is one write(2).  A read whose data is in the cache and in memory is answered on the spot.
   Small writes of a turn are gathered, with their payloads one after the other, and what the volume's
   `bcachectl.engine.write_batch.WriteBatch` places of them is written at once.
3. `FuseFile.unmount` takes the mount away; `FuseFile.abort` closes /dev/fuse first, so that whoever still waits for an
   answer gets an error instead.

All I/O is direct (FOPEN_DIRECT_IO): nothing is cached above the engine.  A hole punched into the file must read as
zeros, and the loop driver uses it for write zeroes as well as for discard; so it is REQ_WRITE_ZEROES here, never
REQ_DISCARD, after which the content would be undefined.  Where zeros would have to be written one by one it is refused,
which the loop driver understands: nobody wants an fstrim to fill a disk with zeros.

Whoever opens the file, looks at it or unmounts it waits for this loop.  So nobody does that from the loop's own
thread (`bcachectl.engine.io.loop.Loop.call_in_thread`).  Layouts: include/uapi/linux/fuse.h; little-endian machines.
"""

from __future__ import annotations

import ctypes
import errno
import os
from struct import Struct
from time import monotonic_ns
from typing import NamedTuple

from bcachectl.engine.export.buffers import PAGE_BYTES, Buffer, BufferPool
from bcachectl.engine.export.page_cache import read_fd, read_hit, write_all, write_fd
from bcachectl.engine.front import (
    NOT_NOW,
    REQ_FLUSH,
    REQ_READ,
    REQ_WRITE,
    REQ_WRITE_ZEROES,
    Request,
    Volume,
)
from bcachectl.engine.io.loop import Loop
from bcachectl.engine.io.medium import Medium
from bcachectl.errors import DeviceError, WrongState

MAX_TRANSFER_BYTES = 256 << 10
"""Of one request.  Every read of /dev/fuse needs memory for a whole write: more would cost memory, not gain speed."""
MAX_BACKGROUND = 256
"""Requests that the kernel may have in flight; its own default of 12 would be a loop device's depth."""
MAX_REQUESTS_PER_TURN = 64
MAX_GATHERED_BYTES = 64 << 10
"""A longer write is a request of its own."""
ARENA_BYTES = 2 * MAX_TRANSFER_BYTES
"""Where writes are gathered: as many as leave room for the largest that may come next."""

_OP_FORGET, _OP_GETATTR, _OP_SETATTR, _OP_OPEN, _OP_READ, _OP_WRITE = 2, 3, 4, 14, 15, 16
_OP_STATFS, _OP_RELEASE, _OP_FSYNC, _OP_FLUSH, _OP_INIT, _OP_INTERRUPT = 17, 18, 20, 25, 26, 36
_OP_DESTROY, _OP_BATCH_FORGET, _OP_FALLOCATE = 38, 42, 43
_ASYNC_READ, _BIG_WRITES, _ASYNC_DIO, _MAX_PAGES = 1, 1 << 5, 1 << 15, 1 << 22
_OPEN_DIRECT_IO, _OPEN_PARALLEL_WRITES = 1, 1 << 6
_PUNCH_HOLE, _ZERO_RANGE, _KEEP_SIZE = 2, 16, 1

_IN = Struct("<IIQQIIIHH")              # length, opcode, unique, node, uid, gid, pid, extensions, padding
_OUT = Struct("<IiQ")                   # length, -errno, unique
_IO = Struct("<QQIIQII")                # handle, offset, size, flags, lock owner, open flags, padding
_INIT_IN = Struct("<IIII")              # major, minor, read-ahead, flags
_INIT_OUT = Struct("<IIIIHHIIHHI28x")   # ... background, congestion, max_write, granularity, max_pages, align, flags2
_ATTR_OUT = Struct("<QII6Q10I")         # valid, ns, padding; ino size blocks times; ns mode nlink uid gid rdev blksize
_OPEN_OUT = Struct("<QII")
_WRITE_OUT = Struct("<II")
_STATFS_OUT = Struct("<5Q4I24x")
_FALLOCATE = Struct("<QQQII")           # handle, offset, length, mode, padding
_HEADER_BYTES = _IN.size + _IO.size
_MS_NOSUID, _MS_NODEV, _MNT_DETACH = 2, 4, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


class _Pending:
    # A request in flight: the tag of a `Request`.
    __slots__ = ("file", "unique", "buffer", "length")

    def __init__(self, file: FuseFile, unique: int, buffer: Buffer | None, length: int) -> None:
        self.file = file
        self.unique = unique
        self.buffer = buffer
        self.length = length

    def answered(self, request: Request) -> None:
        """The engine has completed the request."""
        self.file.answer(self, request)


class _Write(NamedTuple):
    # A small write whose payload lies in the arena.
    unique: int
    offset: int
    data: memoryview


class FuseFile:
    """One volume, one file."""

    def __init__(self, loop: Loop, volume: Volume, cache: Medium, pool: BufferPool, path: str, *, stream: int,
                 can_zero: bool) -> None:
        self.loop = loop
        self.can_zero = can_zero
        self.volume = volume
        self.path = path
        self.pool = pool
        self.stream = stream
        self.size_bytes = volume.size_sectors << 9
        self.fd = -1
        self.is_mounted = False
        self.in_flight = 0
        self._gathered: list[Request] = []      # what came in this turn, for the volume to take together
        self._writes: list[_Write] = []
        self._read_fd = read_fd(cache)
        self._write_fd = write_fd(cache) if volume.batch is not None else -1
        self._nowait_flag = cache.nowait_flag
        self._header = memoryview(bytearray(_HEADER_BYTES))
        self._arena_bytes = ARENA_BYTES if self._write_fd >= 0 else MAX_TRANSFER_BYTES
        self._arena = pool.take(self._arena_bytes)
        self._arena_used = 0                    # bytes, by ``_writes``

    def mount(self) -> None:
        """Put the volume at ``path``, a plain file that is there already."""
        try:
            self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
        except OSError as error:
            raise WrongState(f"/dev/fuse: {error.strerror}; a loop device needs the kernel's fuse module, "
                             "--export nbd does not") from error
        options = f"fd={self.fd},rootmode=100600,user_id={os.getuid()},group_id={os.getgid()}"
        if _libc.mount(b"bcachectl", os.fsencode(self.path), b"fuse", _MS_NOSUID | _MS_NODEV, options.encode()):
            code = ctypes.get_errno()
            os.close(self.fd)
            self.fd = -1
            raise DeviceError(f"{self.path}: cannot mount FUSE there: {os.strerror(code)}", errno=code)
        self.is_mounted = True
        self.loop.register(self.fd, self)

    def unmount(self) -> None:
        """Take the mount away; from a thread, and when nobody has the file open."""
        if self.is_mounted:
            self.is_mounted = False
            unmount(self.path)

    def abort(self) -> None:
        """Answer nobody any more; what waits in the kernel fails with an error."""
        if self.fd >= 0:
            self.loop.unregister(self.fd)
            os.close(self.fd)
            self.fd = -1

    def on_ready(self, fd: int, events: int) -> None:
        """Requests are there."""
        self._take_requests()
        if self._writes:
            self._serve_writes()
        if self._gathered:
            gathered, self._gathered = self._gathered, []
            self.volume.submit_all(gathered)

    def _take_requests(self) -> None:
        for _ in range(MAX_REQUESTS_PER_TURN):
            try:
                got = os.readv(self.fd, (self._header, self._payload(MAX_TRANSFER_BYTES)))
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):      # ENOENT: a request withdrawn while we read it
                    continue
                self.abort()                                        # ENODEV: unmounted
                return
            if got >= _IN.size:
                self._request(got)
            if self.fd < 0 or self._arena_used > self._arena_bytes - MAX_TRANSFER_BYTES:
                return

    def _payload(self, size: int) -> memoryview:
        start = PAGE_BYTES + self._arena_used
        return self._arena.view[start:start + size]

    def _request(self, got: int) -> None:
        _, opcode, unique, *_ = _IN.unpack_from(self._header)
        if opcode in (_OP_READ, _OP_WRITE):
            _, offset, size, *_ = _IO.unpack_from(self._header, _IN.size)
            if opcode == _OP_READ:
                self._read(unique, offset, size)
            else:
                self._write(unique, offset, size, got - _HEADER_BYTES)
        elif opcode in (_OP_FSYNC, _OP_FLUSH):
            if opcode == _OP_FLUSH or self.volume.read_only:
                self._reply(unique, 0)                              # FLUSH is close(2), no promise
            else:
                self._submit(REQ_FLUSH, unique, 0, 0)
        elif opcode == _OP_FALLOCATE:
            _, offset, size, mode, _ = _FALLOCATE.unpack_from(self._header, _IN.size)
            self._fallocate(unique, offset, size, mode)
        elif opcode in (_OP_GETATTR, _OP_SETATTR):
            # A change of size is quietly not made; loop never asks for one.  Nothing is cached: a stat of a dead
            # engine's file must fail, for that is how it is known.
            self._reply(unique, 0, _ATTR_OUT.pack(0, 0, 0, 1, self.size_bytes, self.size_bytes >> 9, 0, 0, 0,
                                                  0, 0, 0, 0o100600, 1, 0, 0, 0, 4096, 0))
        elif opcode == _OP_OPEN:
            self._reply(unique, 0, _OPEN_OUT.pack(0, _OPEN_DIRECT_IO | _OPEN_PARALLEL_WRITES, 0))
        elif opcode == _OP_INIT:
            self._init(unique)
        elif opcode == _OP_STATFS:
            blocks = self.size_bytes >> 12
            self._reply(unique, 0, _STATFS_OUT.pack(blocks, 0, 0, 1, 0, 4096, 255, 4096, 0))
        elif opcode in (_OP_RELEASE, _OP_DESTROY):
            self._reply(unique, 0)
        elif opcode not in (_OP_FORGET, _OP_BATCH_FORGET, _OP_INTERRUPT):
            self._reply(unique, errno.ENOSYS)

    def _init(self, unique: int) -> None:
        major, minor, read_ahead, flags = _INIT_IN.unpack_from(self._header, _IN.size)
        # Only 40 + 40 bytes of INIT are in `_header`, which holds all that is looked at.
        if major < 7 or (major == 7 and minor < 28):
            self._reply(unique, errno.EPROTO)
            return
        wanted = _ASYNC_READ | _BIG_WRITES | _ASYNC_DIO | _MAX_PAGES
        self._reply(unique, 0, _INIT_OUT.pack(7, min(minor, 31), read_ahead, flags & wanted, MAX_BACKGROUND,
                                              MAX_BACKGROUND * 3 // 4, MAX_TRANSFER_BYTES, 1,
                                              MAX_TRANSFER_BYTES // PAGE_BYTES, 0, 0))

    def _read(self, unique: int, offset: int, size: int) -> None:
        # The file ends on a sector, and a read at or past the end gets what there is.
        size = max(0, min(size, self.size_bytes - offset, MAX_TRANSFER_BYTES))
        if not size:
            self._reply(unique, 0)
            return
        if (offset | size) & 511:
            self._reply(unique, errno.EINVAL)
            return
        buffer = self.pool.take(size)
        if self._read_fd >= 0 and read_hit(self.volume, self._read_fd, self._nowait_flag, offset >> 9,
                                           buffer.data(size)):
            self._reply_data(unique, buffer, size)
            return
        self._submit(REQ_READ, unique, offset, size, buffer, buffer.data(size))

    def _write(self, unique: int, offset: int, size: int, got: int) -> None:
        error = 0
        if self.volume.read_only:
            error = errno.EROFS
        elif (offset | size) & 511 or got != size or not size:
            error = errno.EINVAL
        elif offset + size > self.size_bytes:
            error = errno.ENOSPC
        if error:
            self._reply(unique, error)
            return
        data = self._payload(size)
        if self._write_fd >= 0 and size <= MAX_GATHERED_BYTES:
            self._writes.append(_Write(unique, offset, data))
            self._arena_used += -(-size // PAGE_BYTES) * PAGE_BYTES
            return
        # The payload stays where it was read, and the arena with it; what it has of other writes is served before.
        buffer, self._arena, self._arena_used = self._arena, self.pool.take(self._arena_bytes), 0
        self._submit(REQ_WRITE, unique, offset, size, buffer, data)

    def _serve_writes(self) -> None:
        # What the volume's batch takes is written and answered now; the others become requests.
        writes, self._writes, self._arena_used = self._writes, [], 0
        batch = self.volume.batch
        assert batch is not None, "writes gather where the volume has a batch"
        places = batch.place([(write.offset >> 9, len(write.data) >> 9) for write in writes], self.stream)
        began_ns = monotonic_ns()
        if write_all(self._write_fd, zip(places, [write.data for write in writes], strict=True)):
            batch.commit(monotonic_ns() - began_ns)
        else:
            batch.abandon()
            places = [NOT_NOW] * len(writes)
        for place, (unique, offset, data) in zip(places, writes, strict=True):
            size = len(data)
            if place >= 0:
                self._reply(unique, 0, _WRITE_OUT.pack(size, 0))
            else:
                buffer = self.pool.take(size)
                buffer.data(size)[:] = data
                self._submit(REQ_WRITE, unique, offset, size, buffer, buffer.data(size))

    def _fallocate(self, unique: int, offset: int, size: int, mode: int) -> None:
        is_known = mode & (_PUNCH_HOLE | _ZERO_RANGE) and not mode & ~(_PUNCH_HOLE | _ZERO_RANGE | _KEEP_SIZE)
        if not is_known or not self.can_zero:
            self._reply(unique, errno.EOPNOTSUPP)
        elif self.volume.read_only:
            self._reply(unique, errno.EROFS)
        elif (offset | size) & 511 or not size or offset + size > self.size_bytes:
            self._reply(unique, errno.EINVAL)
        else:
            self._submit(REQ_WRITE_ZEROES, unique, offset, size)

    def _submit(self, operation: int, unique: int, offset: int, size: int, buffer: Buffer | None = None,
                data: memoryview | None = None) -> None:
        self.in_flight += 1
        self._gathered.append(Request(operation, offset >> 9, size >> 9, data, 0, self.stream,
                                      _Pending(self, unique, buffer, size)))

    def answer(self, pending: _Pending, request: Request) -> None:
        """Give the kernel the answer to a completed request."""
        self.in_flight -= 1
        buffer = pending.buffer
        if request.op == REQ_READ and not request.error:
            assert buffer is not None, "a read has a buffer"
            self._reply_data(pending.unique, buffer, pending.length)
            return
        if buffer is not None:
            self.pool.release(buffer)
        is_written = request.op == REQ_WRITE and not request.error
        self._reply(pending.unique, request.error, _WRITE_OUT.pack(pending.length, 0) if is_written else b"")

    def _reply_data(self, unique: int, buffer: Buffer, size: int) -> None:
        start = PAGE_BYTES - _OUT.size
        _OUT.pack_into(buffer.memory, start, _OUT.size + size, 0, unique)
        self._send(buffer.view[start:PAGE_BYTES + size])
        self.pool.release(buffer)

    def _reply(self, unique: int, error: int, payload: bytes = b"") -> None:
        self._send(_OUT.pack(_OUT.size + len(payload), -error, unique) + payload)

    def _send(self, reply: bytes | memoryview) -> None:
        # The one who asked may be gone (ENOENT), or the mount (ENODEV): then nobody needs the answer.
        if self.fd >= 0:
            try:
                os.write(self.fd, reply)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EINTR):
                    raise


def unmount(path: str) -> None:
    """Take the mount at ``path`` away, also one whose engine is dead."""
    if _libc.umount2(os.fsencode(path), _MNT_DETACH):
        code = ctypes.get_errno()
        if code != errno.EINVAL:                    # EINVAL: nothing is mounted there
            raise DeviceError(f"{path}: cannot unmount: {os.strerror(code)}", errno=code)
