# SPDX-License-Identifier: GPL-2.0-only
"""Stamped writes: what is in a sector tells which write put it there.

A write of a plan has a tag (seed << 32 | number) and fills its range with the 16 bytes (tag, byte offset of the
write) over and over, so every sector says who wrote it and whether it is torn.  `draw` makes a plan from a seed, the
same one everywhere: in a virtual machine, over NBD, and when a killed run is judged.  It is the draw of
tests/golden/workload.py, call for call.

Only the standard library is imported, and little of it: Python is slow in a virtual machine.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import NamedTuple


class Op(NamedTuple):
    """One step of a plan: a write or a read, and whether a flush follows it."""

    number: int
    is_read: bool
    offset_bytes: int
    length_bytes: int
    flush_after: bool


def draw(*, seed: int, ops: int, size_bytes: int, max_kib: int = 32, reads: float = 0.2, hot: float = 0.0,
         block_bytes: int = 4096, span: float = 1.0, flushes: float = 0.01) -> Iterator[Op]:
    """The plan of a seed: ``ops`` steps on a device of ``size_bytes``, of at most ``max_kib`` each.

    ``reads`` is the share of reads, ``hot`` that of requests into the first sixteenth, ``flushes`` that of flushes.
    """
    rng = random.Random(seed)
    blocks = int(size_bytes * span) // block_bytes
    for number in range(ops):
        count = rng.randint(1, max_kib * 1024 // block_bytes)
        base = rng.randrange(blocks) if rng.random() >= hot else rng.randrange(max(1, blocks // 16))
        count = min(count, blocks - base)
        is_read = rng.random() < reads
        yield Op(number, is_read, base * block_bytes, count * block_bytes, rng.random() < flushes)


def tag(seed: int, number: int) -> int:
    """The tag of a plan's write."""
    return seed << 32 | number


def content(write_tag: int, offset_bytes: int, length_bytes: int) -> bytes:
    """The bytes of a write."""
    return struct.pack("<QQ", write_tag, offset_bytes) * (length_bytes // 16)
