# SPDX-License-Identifier: GPL-2.0-only
"""A client of a volume that is a block device, with the methods of `tests.nbd_client.NbdClient`.

Each request is one call of a thread: pread and pwrite with O_DIRECT, pwritev2 with RWF_DSYNC for FUA (the kernel sends
it so, and a flush after it), fsync for a flush, BLKDISCARD and BLKZEROOUT.  So up to `WORKERS` requests are in flight.

The kernel takes with O_DIRECT nothing smaller than the device's logical block.  Such a request goes through the page
cache, as that of any program would, and is done when its pages are on the device; requests that share a block all go
that way.

A block device has no connection that could break: requests that a dead engine had under way wait in the kernel for
whoever takes the device over.  `BlockClient.receive` raises ConnectionError then, if it was told of the server.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import queue
import struct
import threading

from tests.nbd_client import (
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    FLAG_FUA,
    Reply,
)
from tests.program import Process
from tests.require import patience

WORKERS = 32
_BLKDISCARD, _BLKZEROOUT, _BLKSSZGET, _BLKROGET, _BLKGETSIZE64 = 0x1277, 0x127F, 0x1268, 0x125E, 0x80081272
_SYNC_AND_WAIT = 7                      # SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE, _WAIT_AFTER
_LOOK_S = 0.1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


_Asked = tuple[int, int, int, int, bytes, int]
"""Cookie, command, offset, length, data, flags."""


class BlockClient:
    """An open block device; close it when done."""

    def __init__(self, device: str, server: Process | None = None, *, timeout_s: float = 60) -> None:
        """``server``: the process that serves the device, to see when it has died."""
        self.device = device
        self._server = server
        self._timeout_s = patience(timeout_s)
        self._fd = os.open(device, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        self._cached_fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        os.posix_fadvise(self._cached_fd, 0, 0, os.POSIX_FADV_RANDOM)       # nobody reads ahead
        self.size_bytes = int(struct.unpack("Q", fcntl.ioctl(self._fd, _BLKGETSIZE64, bytes(8)))[0])
        self.block_bytes = int(struct.unpack("i", fcntl.ioctl(self._fd, _BLKSSZGET, bytes(4)))[0])
        self.next_cookie = 1
        self._in_flight: set[int] = set()
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Reply | Exception] = queue.SimpleQueue()
        self._workers = 0

    def __enter__(self) -> BlockClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- one at a time

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at an offset."""
        return bytes(self._do(CMD_READ, offset, length).data)

    def write(self, offset: int, data: bytes | memoryview, *, fua: bool = False) -> None:
        """Write and wait until it is done."""
        self._do(CMD_WRITE, offset, len(data), data, FLAG_FUA if fua else 0)

    def flush(self) -> None:
        """Make everything durable that is done."""
        self._do(CMD_FLUSH, 0, 0)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Say that a range is not needed."""
        self._do(CMD_TRIM, offset, length, b"", FLAG_FUA if fua else 0)

    def write_zeroes(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Make a range read as zeros."""
        self._do(CMD_WRITE_ZEROES, offset, length, b"", FLAG_FUA if fua else 0)

    def read_all(self, piece_bytes: int = 1 << 20) -> bytes:
        """The whole device."""
        return b"".join(self.read(offset, min(piece_bytes, self.size_bytes - offset))
                        for offset in range(0, self.size_bytes, piece_bytes))

    def close(self) -> None:
        """Close the device; requests under way keep it open until they are done."""
        for _ in range(self._workers):
            self._asked.put(None)
        self._workers = 0
        fds = [fd for fd in (self._fd, self._cached_fd) if fd >= 0]
        self._fd = self._cached_fd = -1
        if self._is_served():
            _close_all(fds)
        else:
            # The last one to close a device waits for what is under way, and only the next engine can end that.
            threading.Thread(target=_close_all, args=(fds,), daemon=True).start()

    # --- many at once

    def send(self, command: int, offset: int, length: int, data: bytes | memoryview = b"", flags: int = 0) -> int:
        """Begin a request; its cookie."""
        cookie, self.next_cookie = self.next_cookie, self.next_cookie + 1
        self._asked.put((cookie, command, offset, length, bytes(data), flags))
        self._in_flight.add(cookie)
        if self._workers < min(WORKERS, len(self._in_flight)):
            self._workers += 1
            threading.Thread(target=self._work, daemon=True).start()
        return cookie

    def receive(self) -> Reply:
        """The next request that is done, whichever that is."""
        waited_s = 0.0
        while True:
            try:
                reply = self._done.get(timeout=_LOOK_S)
            except queue.Empty:
                if not self._is_served():
                    raise ConnectionError("the server is gone") from None
                waited_s += _LOOK_S
                if waited_s > self._timeout_s:
                    raise TimeoutError(f"{self.device}: no answer for {waited_s:.0f} s") from None
                continue
            if isinstance(reply, Exception):
                raise reply
            if reply.error and not self._is_served():
                raise ConnectionError("the server is gone")
            self._in_flight.remove(reply.cookie)
            return reply

    @property
    def in_flight(self) -> int:
        """How many requests wait for their answer."""
        return len(self._in_flight)

    # --- inside

    def _is_served(self) -> bool:
        return self._server is None or self._server.poll() is None

    def _do(self, command: int, offset: int, length: int, data: bytes | memoryview = b"", flags: int = 0) -> Reply:
        assert not self._in_flight, "requests are in flight"
        self.send(command, offset, length, data, flags)
        reply = self.receive()
        if reply.error:
            text = f"{os.strerror(reply.error)} (command {command}, {length} bytes at {offset} of {self.device})"
            raise OSError(reply.error, text)
        return reply

    def _work(self) -> None:
        memory = mmap.mmap(-1, 1 << 20)         # O_DIRECT wants it aligned
        while (request := self._asked.get()) is not None:
            _, _, _, length, _, _ = request
            if length > len(memory):
                memory = mmap.mmap(-1, length)
            try:
                self._done.put(self._carry_out(request, memory))
            except Exception as bug:            # the thread's end would be a request without an answer
                self._done.put(bug)
                raise

    def _carry_out(self, request: _Asked, memory: mmap.mmap) -> Reply:
        cookie, command, offset, length, data, flags = request
        reply = Reply(cookie)
        try:
            if command == CMD_READ:
                reply.data = self._read(memory, offset, length)
            elif command == CMD_WRITE:
                self._write(memory, offset, data, is_fua=bool(flags & FLAG_FUA))
            elif command == CMD_FLUSH:
                os.fsync(self._fd)
            else:
                self._without_data(command, offset, length, is_fua=bool(flags & FLAG_FUA))
        except OSError as error:
            reply.error = error.errno or errno.EIO
        return reply

    def _fits(self, offset: int, length: int) -> bool:
        return not (offset | length) % self.block_bytes

    def _read(self, memory: mmap.mmap, offset: int, length: int) -> bytearray:
        if not self._fits(offset, length):
            data = bytearray(os.pread(self._cached_fd, length, offset))
            # The page must not be there when the device is read directly, and no error may be told from it later.
            os.posix_fadvise(self._cached_fd, offset, length, os.POSIX_FADV_DONTNEED)
        else:
            with memoryview(memory) as view:
                done = 0
                while done < length:
                    count = os.preadv(self._fd, [view[done:length]], offset + done)
                    if not count:
                        break
                    done += count
                data = bytearray(view[:done])
        if len(data) != length:
            raise OSError(errno.EINVAL, "beyond the end")
        return data

    def _write(self, memory: mmap.mmap, offset: int, data: bytes, *, is_fua: bool) -> None:
        length = len(data)
        if not self._fits(offset, length):
            if os.pwrite(self._cached_fd, data, offset) != length:
                raise OSError(errno.ENOSPC, "beyond the end")
            if _libc.sync_file_range(self._cached_fd, offset, length, _SYNC_AND_WAIT):
                raise OSError(ctypes.get_errno(), "written back")
            os.posix_fadvise(self._cached_fd, offset, length, os.POSIX_FADV_DONTNEED)
            if is_fua:
                os.fsync(self._cached_fd)
            return
        with memoryview(memory) as view:
            view[:length] = data
            done = 0
            while done < length:
                done += os.pwritev(self._fd, [view[done:length]], offset + done, os.RWF_DSYNC if is_fua else 0)

    def _without_data(self, command: int, offset: int, length: int, *, is_fua: bool) -> None:
        request = {CMD_TRIM: _BLKDISCARD, CMD_WRITE_ZEROES: _BLKZEROOUT}[command]
        try:
            fcntl.ioctl(self._fd, request, struct.pack("QQ", offset, length))
        except OSError as error:
            # A discard is advice, and a device need not know it.  The kernel looks at that first, and only then whether
            # the device may be written.
            if command != CMD_TRIM or error.errno != errno.EOPNOTSUPP:
                raise
            if struct.unpack("i", fcntl.ioctl(self._fd, _BLKROGET, bytes(4)))[0]:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from error
        if is_fua:
            os.fsync(self._fd)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
