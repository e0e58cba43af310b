# SPDX-License-Identifier: GPL-2.0-only
"""`BufferPool`: page-aligned memory for requests, with room for a reply's header in front of the data.

::

    |<---- one page ---->|<-- capacity, a power of two -->|
    |          header -->|data                            |

The header of a reply lies directly in front of its data, so header and data leave in one piece; the data is aligned for
direct I/O.  Buffers are used again: fresh memory costs a page fault every 4 KiB.
"""

from __future__ import annotations

import ctypes
import mmap

PAGE_BYTES = 4096
MIN_CAPACITY_BYTES = 4096
MAX_POOLED_BYTES = 64 << 20
"""What the pool keeps; of more than this the largest are given back to the system."""


class Buffer:
    """Memory of one request, its data at ``address``; goes back by `BufferPool.release`."""

    __slots__ = ("memory", "view", "capacity_bytes", "address")

    def __init__(self, capacity_bytes: int) -> None:
        self.memory = mmap.mmap(-1, PAGE_BYTES + capacity_bytes)
        self.view = memoryview(self.memory)
        self.capacity_bytes = capacity_bytes
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + PAGE_BYTES

    def data(self, length_bytes: int) -> memoryview:
        """The first bytes of the data."""
        return self.view[PAGE_BYTES:PAGE_BYTES + length_bytes]


class BufferPool:
    """Free buffers by capacity."""

    def __init__(self) -> None:
        self.free: dict[int, list[Buffer]] = {}
        self.pooled_bytes = 0

    def take(self, length_bytes: int) -> Buffer:
        """A buffer for at least ``length_bytes``; what it holds is undefined."""
        capacity = MIN_CAPACITY_BYTES if length_bytes <= MIN_CAPACITY_BYTES else 1 << (length_bytes - 1).bit_length()
        free = self.free.get(capacity)
        if free:
            self.pooled_bytes -= capacity
            return free.pop()
        return Buffer(capacity)

    def release(self, buffer: Buffer) -> None:
        """Give a buffer back; nobody may use it any more."""
        self.pooled_bytes += buffer.capacity_bytes
        self.free.setdefault(buffer.capacity_bytes, []).append(buffer)
        while self.pooled_bytes > MAX_POOLED_BYTES:
            # The small ones are asked for most often, and must not find the pool full of large ones.
            capacity = max(size for size, free in self.free.items() if free)
            self.free[capacity].pop()
            self.pooled_bytes -= capacity
