# SPDX-License-Identifier: GPL-2.0-only
"""Journal entries (bcache_ondisk.h, jset; journal.c, journal_read_bucket).

An entry carries the leaf keys that were inserted since the one before, and the roots of everything else: pointers to
the uuid array and to the btree's root, and the bucket of the first prio set.  Entries have no gaps in ``seq``; those
from ``last_seq`` of the newest one on may hold keys that no btree node on the device has yet.

Entries fill a journal bucket from its start, each on a block boundary; none crosses into the next bucket.  What stands
behind the last one is older, so the walk of a bucket ends at the first block that is no valid entry.

::

    0      8       16    24        28     32         40            104          168     170   176           240
    | csum | magic | seq | version | keys | last_seq | uuid_bucket | btree_root | level | pad | prio_bucket | keys ...
                                                     (two keys, each padded  )               (8 u64s     )
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from construct import Array, Bytes, Int16ul, Int32ul, Int64ul, this
from construct import Struct as Layout

from bcachectl.ondisk.bkey import BKEY_PAD_WORDS, MAX_CACHES_PER_SET, Bkey, decode_padded_key
from bcachectl.ondisk.crc64 import Buffer, crc64

JSET_HEADER_BYTES = 240
JSET_VERSION_UUIDV1 = 1
JSET_VERSION = 1
JSET_MAX_BYTES = 32 << 10
"""The largest entry with 4 KiB pages (journal.h, JSET_BITS)."""

LAYOUT = Layout(
    "csum" / Int64ul,
    "magic" / Int64ul,
    "seq" / Int64ul,
    "version" / Int32ul,
    "keys" / Int32ul,                           # u64s that follow
    "last_seq" / Int64ul,
    "uuid_bucket" / Array(8, Int64ul),          # a key and what the pad holds behind it
    "btree_root" / Array(8, Int64ul),
    "btree_level" / Int16ul,
    "pad" / Bytes(6),
    "prio_bucket" / Array(8, Int64ul),          # per cache of the set
    "d" / Array(this.keys, Int64ul),
)

_PAD_BYTES = BKEY_PAD_WORDS * 8
_HEADER = struct.Struct(f"<QQQIIQ{_PAD_BYTES}s{_PAD_BYTES}sH6x{MAX_CACHES_PER_SET}Q")
_LENGTHS = struct.Struct("<QQQII")
_UUID_BUCKET_OFFSET = 40
_BTREE_ROOT_OFFSET = 104
assert _HEADER.size == JSET_HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Jset:
    """One entry; ``keys`` is its raw key stream, ``blocks`` the blocks it takes in its bucket."""

    seq: int
    last_seq: int
    version: int
    uuid_bucket: Bkey
    btree_root: Bkey
    btree_level: int
    prio_bucket: tuple[int, ...]
    keys: bytes
    blocks: int
    csum: int


def judge_jset(buf: Buffer, offset: int, *, magic: int, limit_bytes: int) -> str:
    """Why the bytes at ``offset`` are no entry, in the kernel's words; empty if they are one.

    ``limit_bytes`` is what is left of the bucket at ``offset``.
    """
    if min(limit_bytes, len(buf) - offset) < JSET_HEADER_BYTES:
        return "too short"
    csum, found_magic, _seq, _version, keys = _LENGTHS.unpack_from(buf, offset)
    if found_magic != magic:
        return "bad magic"
    set_bytes = JSET_HEADER_BYTES + keys * 8
    if set_bytes > min(limit_bytes, JSET_MAX_BYTES, len(buf) - offset):
        return "too big"
    if csum != crc64(memoryview(buf)[offset + 8:offset + set_bytes]):
        return "bad csum"
    return ""


def decode_jset(buf: Buffer, offset: int, *, magic: int, block_bytes: int, limit_bytes: int) -> Jset | None:
    """The entry at ``offset``, or None if there is none; `judge_jset` says why."""
    if judge_jset(buf, offset, magic=magic, limit_bytes=limit_bytes):
        return None
    csum, _magic, seq, version, nr_u64s, last_seq, _uuid, _root, level, *prio_bucket = _HEADER.unpack_from(buf, offset)
    set_bytes = JSET_HEADER_BYTES + nr_u64s * 8
    return Jset(seq, last_seq, version, decode_padded_key(buf, offset + _UUID_BUCKET_OFFSET),
                decode_padded_key(buf, offset + _BTREE_ROOT_OFFSET), level, tuple(prio_bucket),
                bytes(buf[offset + JSET_HEADER_BYTES:offset + set_bytes]), -(-set_bytes // block_bytes), csum)


def encode_jset(*, seq: int, last_seq: int, uuid_bucket: bytes, btree_root: bytes, btree_level: int,
                prio_bucket0: int, keys: bytes | bytearray, magic: int, block_bytes: int) -> bytearray:
    """An entry as it is written, zeros up to the block's end.

    ``uuid_bucket`` and ``btree_root`` are the words of their keys; ``prio_bucket0`` is the first prio set of cache 0.
    """
    assert 0 < last_seq <= seq, (last_seq, seq)
    assert len(keys) % 8 == 0
    set_bytes = JSET_HEADER_BYTES + len(keys)
    assert set_bytes <= JSET_MAX_BYTES, set_bytes
    buf = bytearray(-(-set_bytes // block_bytes) * block_bytes)
    _HEADER.pack_into(buf, 0, 0, magic, seq, JSET_VERSION, len(keys) // 8, last_seq, uuid_bucket, btree_root,
                      btree_level, prio_bucket0, *[0] * (MAX_CACHES_PER_SET - 1))
    buf[JSET_HEADER_BYTES:set_bytes] = keys
    struct.pack_into("<Q", buf, 0, crc64(memoryview(buf)[8:set_bytes]))
    return buf


def walk_journal_bucket(buf: Buffer, *, magic: int, block_bytes: int) -> list[tuple[int, Jset]]:
    """The entries of one journal bucket, each with the byte at which it starts, up to the first block that is none."""
    found = []
    offset = 0
    while offset < len(buf):
        jset = decode_jset(buf, offset, magic=magic, block_bytes=block_bytes, limit_bytes=len(buf) - offset)
        if jset is None:
            break
        found.append((offset, jset))
        offset += jset.blocks * block_bytes
    return found
