# SPDX-License-Identifier: GPL-2.0-only
"""Btree nodes on the device: a log of sets of keys (bcache_ondisk.h, bset; btree.c, bch_btree_node_read_done).

A node fills its bucket from the start.  Each set begins at a block boundary and is never rewritten; later sets are
newer and win.  All sets of a node carry the node's own random ``seq``; the log ends at the first block that has
another, or at the node's end.  Blocks behind it hold whatever the bucket held before.

::

    block 0                    1         2                   3
    | set 0                    | set 1   | set 2    padding  | old data ...
    header 32 bytes: csum u64, magic u64, seq u64, version u32, keys u32 (u64s, not keys); then the keys

The checksum starts from the pointer to the node, the same for every set of it.  There is no second copy and no repair:
a node that fails one check fails the whole set.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from construct import Array, Int32ul, Int64ul, this
from construct import Struct as Layout

from bcachectl.errors import Corrupt
from bcachectl.ondisk.bkey import KeyColumns, decode_key_columns
from bcachectl.ondisk.crc64 import Buffer, crc64, crc64_seeded

BSET_HEADER_BYTES = 32
BSET_VERSION = 1
BSET_VERSION_UNSEEDED = 0

LAYOUT = Layout(
    "csum" / Int64ul,
    "magic" / Int64ul,
    "seq" / Int64ul,
    "version" / Int32ul,
    "keys" / Int32ul,             # u64s that follow
    "d" / Array(this.keys, Int64ul),
)

_HEADER = struct.Struct("<QQQII")
_SEQ = struct.Struct("<Q")
_SEQ_OFFSET = 16
assert _HEADER.size == BSET_HEADER_BYTES


@dataclass(frozen=True, slots=True)
class BsetHeader:
    """The 32 bytes before the keys."""

    csum: int
    magic: int
    seq: int
    version: int
    keys: int

    @property
    def set_bytes(self) -> int:
        """Length of the set without padding."""
        return BSET_HEADER_BYTES + self.keys * 8


class BsetImage(NamedTuple):
    """One set as read: the block of the node it starts at, and its keys."""

    block: int
    seq: int
    keys: KeyColumns


def decode_bset_header(buf: Buffer, offset: int = 0) -> BsetHeader:
    """The header at ``offset``, not judged."""
    return BsetHeader(*_HEADER.unpack_from(buf, offset))


def encode_bset(keys: bytes, *, seq: int, magic: int, seed: int, block_bytes: int) -> bytearray:
    """A set as it is written: version 1, zeros up to the block's end, checksum seeded with the pointer to the node."""
    assert seq, "seq 0 means a bad node"
    assert len(keys) % 8 == 0
    set_bytes = BSET_HEADER_BYTES + len(keys)
    buf = bytearray(-(-set_bytes // block_bytes) * block_bytes)
    _HEADER.pack_into(buf, 0, 0, magic, seq, BSET_VERSION, len(keys) // 8)
    buf[BSET_HEADER_BYTES:set_bytes] = keys
    struct.pack_into("<Q", buf, 0, crc64_seeded(memoryview(buf)[8:set_bytes], seed))
    return buf


def decode_node(buf: Buffer, *, magic: int, seed: int, block_bytes: int, node_blocks: int,
                where: str) -> tuple[list[BsetImage], int]:
    """All sets of a node, oldest first, and the number of blocks that its log fills.

    ``seed`` is the raw pointer word that leads to the node.  ``where`` names its bucket, as in ``bucket 44``; together
    with ``why`` it makes the kernel's line: *why* at *where*.
    """
    view = memoryview(buf).cast("B")
    assert len(view) >= node_blocks * block_bytes
    if not node_blocks:
        # The key that leads here says less than a block; to the kernel no set fits.
        raise Corrupt(f"{where}, block 0", "bad btree header")
    node_seq: int = _SEQ.unpack_from(view, _SEQ_OFFSET)[0]
    sets: list[BsetImage] = []
    written = 0
    while written < node_blocks:
        offset = written * block_bytes
        header = BsetHeader(*_HEADER.unpack_from(view, offset))
        if header.seq != node_seq:
            break
        spot = f"{where}, block {written}, {header.keys} keys"
        if not node_seq:
            raise Corrupt(spot, "bad btree header")
        if header.version > BSET_VERSION:
            raise Corrupt(spot, "unsupported bset version")
        blocks = -(-header.set_bytes // block_bytes)
        if written + blocks > node_blocks:
            raise Corrupt(spot, "bad btree header")
        if header.magic != magic:
            raise Corrupt(spot, "bad magic")
        body = view[offset + 8:offset + header.set_bytes]
        if header.csum != (crc64_seeded(body, seed) if header.version else crc64(body)):
            raise Corrupt(spot, "bad checksum")
        if sets and not header.keys:
            raise Corrupt(spot, "empty set")
        try:
            columns = decode_key_columns(view[offset + BSET_HEADER_BYTES:offset + header.set_bytes], header.keys)
        except Corrupt as error:
            raise Corrupt(f"{spot}, {error.where}", error.why) from None
        sets.append(BsetImage(written, node_seq, columns))
        written += blocks
    _check_no_set_behind(view, node_seq, written, block_bytes=block_bytes, node_blocks=node_blocks, where=where)
    return sets, written


def check_node_end(last_pos: int, node_pos: int, where: str) -> None:
    """The last check of a node: no key, once its sets are merged, lies behind the key that points to the node."""
    if last_pos > node_pos:
        raise Corrupt(where, "short btree key")


def _check_no_set_behind(view: memoryview, node_seq: int, written: int, *, block_bytes: int, node_blocks: int,
                         where: str) -> None:
    # A set of this node behind the end of its log means that a set between them was lost.
    words = np.frombuffer(view, "<u8", node_blocks * block_bytes // 8).reshape(node_blocks, -1)
    strays = np.flatnonzero(words[written:, _SEQ_OFFSET // 8] == node_seq)
    if len(strays):
        block = written + int(strays[0])
        header = decode_bset_header(view, block * block_bytes)
        raise Corrupt(f"{where}, block {block}, {header.keys} keys", "corrupted btree")
