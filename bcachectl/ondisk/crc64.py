# SPDX-License-Identifier: GPL-2.0-only
"""The checksum of every bcache structure: CRC-64/WE, and the seeded form that btree nodes use.

Polynomial 0x42F0E1EBA9EA3693, not reflected, register starts at all ones, result inverted (kernel: lib/crc64.c and
util.h, bch_crc64).  The work is done by the library fastcrc; docs/decisions/0001-crc-library.md says why.

A set of a btree node starts the register at the pointer that leads to the node instead of at all ones, so that a node
found at the wrong place does not pass (btree.c, btree_csum_set).  The library continues a finished checksum: it takes
the *result* so far, which is the inverted register, hence the inversion in `crc64_seeded`.
"""

from __future__ import annotations

from fastcrc.crc64 import we

Buffer = bytes | bytearray | memoryview
"""Anything a decoder reads from."""

_ALL_ONES = (1 << 64) - 1


def crc64(data: Buffer, previous: int = 0) -> int:
    """CRC-64/WE of ``data``, continued from the checksum ``previous`` of the bytes before it."""
    return we(data, previous)


def crc64_seeded(data: Buffer, seed: int) -> int:
    """The checksum with the register started at ``seed``, the raw pointer word of a btree node's key."""
    return we(data, seed ^ _ALL_ONES)
