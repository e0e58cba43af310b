# SPDX-License-Identifier: GPL-2.0-only
"""What exports do to a cache device in the page cache themselves, where reading and writing are copies in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable

from bcachectl.engine.front import Volume
from bcachectl.engine.io.medium import Medium


def read_fd(cache: Medium) -> int:
    """The descriptor for hits, -1 if there is none that goes through the page cache."""
    return -1 if cache.direct else cache.fd


def write_fd(cache: Medium) -> int:
    """The descriptor for small writes, -1 if the device is none of ours to write, or a call could wait for it: a write
    into the page cache of a file is done when the call returns, one to a block device keeps everybody waiting.
    """
    return -1 if cache.direct or cache.is_block or cache.read_only else cache.fd


def read_hit(volume: Volume, fd: int, flags: int, sector: int, data: memoryview) -> bool:
    """Fill ``data`` if all of it is in the cache, in as many extents as it may be, and nothing has to be waited for."""
    reads = volume.reads
    if reads is None:
        return _read_run(fd, flags, volume.read_nowait(sector, len(data) >> 9), data)
    at = 0
    while at < len(data):
        reads.sectors[0] = sector + (at >> 9)
        reads.lengths[0] = (len(data) - at) >> 9
        reads.place(1, True)
        end = at + (reads.lengths[0] << 9)
        if not _read_run(fd, flags, reads.places[0], data[at:end]):
            reads.drop()
            return False
        at = end
    reads.settle_as_one()
    return True


def _read_run(fd: int, flags: int, place: int, data: memoryview) -> bool:
    try:
        return place >= 0 and os.preadv(fd, (data,), place, flags) == len(data)
    except OSError:
        return False


def write_all(fd: int, parts: Iterable[tuple[int, memoryview]]) -> bool:
    """Write each (place in bytes, data), where the place is not negative; what lies side by side goes in one call.
    False as soon as one fails.
    """
    side_by_side: list[memoryview] = []
    first = end = -1
    for place, data in parts:
        if place < 0:
            continue
        if place != end:
            if not _write_run(fd, side_by_side, first, end):
                return False
            side_by_side, first = [], place
        side_by_side.append(data)
        end = place + len(data)
    return _write_run(fd, side_by_side, first, end)


def _write_run(fd: int, data: list[memoryview], first: int, end: int) -> bool:
    try:
        return not data or os.pwritev(fd, data, first) == end - first
    except OSError:
        return False
