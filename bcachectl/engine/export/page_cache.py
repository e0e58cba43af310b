# SPDX-License-Identifier: GPL-2.0-only
"""What exports do to a cache device in the page cache themselves, where reading and writing are copies in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable

from bcachectl.engine.io.medium import Medium


def read_fd(cache: Medium) -> int:
    """The descriptor for hits, -1 if there is none that goes through the page cache."""
    return -1 if cache.direct else cache.fd


def write_fd(cache: Medium) -> int:
    """The descriptor for small writes, -1 if the device is none of ours to write, or a call could wait for it: a write
    into the page cache of a file is done when the call returns, one to a block device keeps everybody waiting.
    """
    return -1 if cache.direct or cache.is_block or cache.read_only else cache.fd


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
