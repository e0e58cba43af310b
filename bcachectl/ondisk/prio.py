# SPDX-License-Identifier: GPL-2.0-only
"""Prio sets: the priority and the generation of every bucket (bcache_ondisk.h, prio_set; super.c, bch_prio_write).

The newest journal entry names the bucket of the first set; each set names the bucket of the next one.  In the *last*
set ``next_bucket`` still holds the start of the chain before, so a reader counts `Geometry.prio_buckets` sets and
stops.  Bucket b is entry ``b % prios_per_bucket`` of set ``b // prios_per_bucket``; buckets below first_bucket have
entries too.

The gens are lower bounds: pointers in the btree and the journal may carry newer ones.

::

    0      8       16    24        28    32           40
    | csum | magic | seq | version | pad | next_bucket | prio u16, gen u8 | prio u16, gen u8 | ...
           (-------------------------- csum covers all of meta_bytes -------------------------->)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from construct import Array, Computed, Int8ul, Int16ul, Int32ul, Int64ul, Padding, this
from construct import Struct as Layout

from bcachectl.errors import Corrupt
from bcachectl.ondisk.crc64 import Buffer, crc64
from bcachectl.ondisk.geometry import BUCKET_DISK_BYTES, PRIO_SET_HEADER_BYTES

BUCKET_LAYOUT = Layout(
    "prio" / Int16ul,
    "gen" / Int8ul,
)

LAYOUT = Layout(
    "_meta_bytes" / Computed(lambda ctx: ctx._params.meta_bytes),
    "_count" / Computed(lambda ctx: (ctx._params.meta_bytes - 40) // 3),
    "csum" / Int64ul,
    "magic" / Int64ul,
    "seq" / Int64ul,              # the same in all sets of one write
    "version" / Int32ul,          # 0, not checked
    "pad" / Int32ul,
    "next_bucket" / Int64ul,
    "data" / Array(this._count, BUCKET_LAYOUT),
    Padding((this._meta_bytes - 40) % 3),
)
"""Parse and build with ``meta_bytes=...``."""

_HEADER = struct.Struct("<QQQIIQ")
_BUCKET = np.dtype([("prio", "<u2"), ("gen", "u1")])
assert _HEADER.size == PRIO_SET_HEADER_BYTES
assert _BUCKET.itemsize == BUCKET_DISK_BYTES


@dataclass(frozen=True, slots=True)
class PrioSet:
    """One set; ``prio`` and ``gen`` have `Geometry.prios_per_bucket` elements, of which the last set uses only some."""

    seq: int
    next_bucket: int
    prio: npt.NDArray[np.uint16]
    gen: npt.NDArray[np.uint8]


def decode_prio_set(buf: Buffer, magic: int, bucket: int) -> PrioSet:
    """The set in ``buf``, exactly meta_bytes long, which was read from ``bucket``; Corrupt if the kernel refuses it."""
    where = f"prio set at bucket {bucket}"
    csum, found_magic, seq, _version, _pad, next_bucket = _HEADER.unpack_from(buf)
    if csum != crc64(memoryview(buf)[8:]):
        raise Corrupt(where, "bad csum reading priorities")
    if found_magic != magic:
        raise Corrupt(where, "bad magic reading priorities")
    count = (len(buf) - PRIO_SET_HEADER_BYTES) // BUCKET_DISK_BYTES
    data = np.frombuffer(buf, _BUCKET, count, PRIO_SET_HEADER_BYTES)
    return PrioSet(seq, next_bucket, data["prio"].astype(np.uint16), data["gen"].astype(np.uint8))


def encode_prio_set(seq: int, next_bucket: int, prio: npt.NDArray[np.uint16], gen: npt.NDArray[np.uint8], magic: int,
                    meta_bytes: int, into: bytearray | None = None) -> bytearray:
    """The set as it is written, ``meta_bytes`` long.

    ``into`` is a buffer to use again: what it holds behind the last entry stays, as in the kernel, and is covered by
    the checksum.
    """
    buf = bytearray(meta_bytes) if into is None else into
    assert len(buf) == meta_bytes
    assert len(prio) == len(gen)
    assert PRIO_SET_HEADER_BYTES + len(prio) * BUCKET_DISK_BYTES <= meta_bytes, "more buckets than a prio set holds"
    data = np.frombuffer(buf, _BUCKET, len(prio), PRIO_SET_HEADER_BYTES)
    data["prio"] = prio
    data["gen"] = gen
    _HEADER.pack_into(buf, 0, 0, magic, seq, 0, 0, next_bucket)
    struct.pack_into("<Q", buf, 0, crc64(memoryview(buf)[8:]))
    return buf
