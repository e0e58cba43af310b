# SPDX-License-Identifier: GPL-2.0-only
"""Keys: an extent of a backing device or volume, and the pointer to where the cache has it (bcache_ondisk.h, bkey).

A key is two words and one word per pointer.  KEY_OFFSET is where the extent *ends*; nothing outside this package sees
it.  Three forms are in use:

* `Bkey`, a NamedTuple with ``start`` and ``end``: for reading by people and by the offline tools;
* words: the bytes on the device, made by `pack_key`;
* `KeyColumns`, one numpy column per field: what the engine and every bulk question use.  There a *position* is one
  integer, ``inode << 44 | sector``, so keys compare as integers do.  Sectors of 2^44 (8 PiB) and more do not fit and
  are refused; the one exception is the kernel's MAX_KEY, the position of the rightmost child of a tree: `MAX_POS`.

::

    63 62  60 59 58 57  56  55  54      37   36   35       20 19        0
    +-+------+-----+------+----+----------+-------+-----------+-----------+
    |1| ptrs | 0 0 | csum | 0  | 0        | dirty | size      | inode     |  high
    +-+------+-----+------+----+----------+-------+-----------+-----------+
    | offset: the end of the extent, exclusive, in sectors                |  low
    +-+--------------+-----------------------------------------+----------+
    |0| dev          | sector on the cache device              | gen      |  ptr[0]
    +-+--------------+-----------------------------------------+----------+
     63 62         51 50                                      8 7        0

Bit 63 of ``high`` is always written as 1 and never tested.  KEY_CSUM is not counted in a key's length, which is why the
feature behind it never worked; it is read, shown and never written.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from construct import Array, BitsInteger, BitStruct, ByteSwapped, Flag, Int64ul, this
from construct import Struct as Layout

from bcachectl.errors import Corrupt
from bcachectl.ondisk.bitmask import Bitmask
from bcachectl.ondisk.crc64 import Buffer

HIGH_LAYOUT = ByteSwapped(BitStruct(       # from bit 63 down
    "one" / Flag,
    "ptrs" / BitsInteger(3),
    "pad0" / BitsInteger(2),
    "csum" / BitsInteger(2),
    "pad1" / Flag,
    "unused" / BitsInteger(18),
    "dirty" / Flag,
    "size" / BitsInteger(16),
    "inode" / BitsInteger(20),
))

PTR_LAYOUT = ByteSwapped(BitStruct(
    "unused" / Flag,
    "dev" / BitsInteger(12),
    "sector" / BitsInteger(43),
    "gen" / BitsInteger(8),
))

LAYOUT = Layout(
    "high" / HIGH_LAYOUT,
    "offset" / Int64ul,
    "ptr" / Array(this.high.ptrs, PTR_LAYOUT),
)

KEY_INODE = Bitmask(0, 20)
KEY_SIZE = Bitmask(20, 16)
KEY_DIRTY = Bitmask(36, 1)
KEY_CSUM = Bitmask(56, 2)
KEY_PTRS = Bitmask(60, 3)
HIGH_ONE = 1 << 63

PTR_GEN = Bitmask(0, 8)
PTR_OFFSET = Bitmask(8, 43)
PTR_DEV = Bitmask(51, 12)
PTR_CHECK_DEV = 4095
"""Device number of a check key, the placeholder of a cache miss under way; the rest of its pointer is random."""

MAX_CACHES_PER_SET = 8
KEY_SIZE_MAX = (1 << 16) - 1
BKEY_PAD_WORDS = 8
"""Words of a key that stands in a header: room for six pointers."""

INODE_SHIFT = 44
SECTOR_MASK = (1 << INODE_SHIFT) - 1
MAX_POS = (1 << 64) - 1
MAX_INODE = (1 << 20) - 1
MAX_OFFSET = (1 << 63) - 1

_MASK64 = (1 << 64) - 1
_DOUBLINGS = 4              # `_key_starts` leaps over 2 ** 4 keys in a stream
_LONG_STREAM_WORDS = 512    # of this length; in a shorter one it visits each
SHORTEST_KEY_WORDS = 2
_KEY2 = struct.Struct("<QQ")
_KEY3 = struct.Struct("<QQQ")
_PAD = struct.Struct(f"<{BKEY_PAD_WORDS}Q")
DIRTY_KEY3 = HIGH_ONE | 1 << 60 | 1 << 36
KEY_BYTES = _KEY3.size
"""Bytes of a key with one pointer."""


class Ptr(NamedTuple):
    """Where the cache holds an extent: cache index in the set, first sector, generation of the bucket at that time."""

    dev: int
    sector: int
    gen: int


class Bkey(NamedTuple):
    """One key, decoded.  ``start`` is negative if the size exceeds the offset, which is invalid."""

    inode: int
    start: int
    end: int
    dirty: bool
    csum: int
    ptrs: tuple[Ptr, ...]

    @property
    def size(self) -> int:
        """Sectors of the extent, or of the node that an interior key points to."""
        return self.end - self.start


class KeyColumns(NamedTuple):
    """Many keys as columns of equal length.

    ``ptr`` is the raw word of the first pointer, 0 if there is none: sets have had one cache since kernel 5.10, and
    no kernel ever wrote a second pointer.  ``high`` is the raw first word, for what the other columns leave out.
    """

    pos: npt.NDArray[np.uint64]
    size: npt.NDArray[np.uint32]
    dirty: npt.NDArray[np.bool_]
    nptrs: npt.NDArray[np.uint8]
    ptr: npt.NDArray[np.uint64]
    csum: npt.NDArray[np.uint8]
    high: npt.NDArray[np.uint64]


def ptr_make(sector: int, gen: int, dev: int = 0) -> int:
    """The word of a pointer."""
    return dev << 51 | sector << 8 | gen


def ptr_sector(ptr: int) -> int:
    """First sector on the cache device."""
    return ptr >> 8 & (1 << 43) - 1


def ptr_gen(ptr: int) -> int:
    """Generation of the bucket when the pointer was made."""
    return ptr & 0xFF


def ptr_dev(ptr: int) -> int:
    """Cache index in the set, or `PTR_CHECK_DEV`."""
    return ptr >> 51 & 0xFFF


def position(inode: int, sector: int) -> int:
    """The integer that keys are ordered by; MAX_KEY's inode and offset give `MAX_POS`."""
    if inode == MAX_INODE and sector == MAX_OFFSET:
        return MAX_POS
    pos = inode << INODE_SHIFT | sector
    if sector > SECTOR_MASK or pos == MAX_POS:
        raise Corrupt(f"key {inode}:{sector}", "beyond 8 PiB")
    return pos


def text(key: Bkey) -> str:
    """A key as the kernel's debugfs file prints it (extents.c, bch_extent_to_text)."""
    pointers = ", ".join("check dev" if p.dev == PTR_CHECK_DEV else f"{p.dev}:{p.sector} gen {p.gen}" for p in key.ptrs)
    line = f"{key.inode}:{key.start & _MASK64} len {key.size} -> [{pointers}]"
    if key.dirty:
        line += " dirty"
    if key.csum:
        # The kernel prints the word behind the first pointer, whatever it is.
        second = ptr_make(key.ptrs[1].sector, key.ptrs[1].gen, key.ptrs[1].dev) if len(key.ptrs) > 1 else 0
        line += f" cs{key.csum} {second:x}"
    return line


# Single keys.

def pack_key(pos: int, size: int, dirty: bool, ptr: int | None) -> bytes:
    """The words of one key with one pointer or none."""
    if pos == MAX_POS:
        high, low = HIGH_ONE | size << 20 | MAX_INODE, MAX_OFFSET
    else:
        high, low = HIGH_ONE | size << 20 | pos >> INODE_SHIFT, pos & SECTOR_MASK
    assert 0 <= size <= KEY_SIZE_MAX, size
    if dirty:
        high |= 1 << 36
    if ptr is None:
        return _KEY2.pack(high, low)
    return _KEY3.pack(high | 1 << 60, low, ptr)


def pack_dirty_keys(extents: Iterable[tuple[int, int, int]]) -> bytes:
    """`pack_key` of many dirty extents (start, end, pointer word), in one piece; none reaches `MAX_POS`."""
    words: list[int] = []
    for start, end, ptr in extents:
        words += (DIRTY_KEY3 | (end - start) << 20 | end >> INODE_SHIFT, end & SECTOR_MASK, ptr)
    return struct.pack(f"<{len(words)}Q", *words)


def encode_key(key: Bkey) -> bytes:
    """The words of a decoded key, with all its pointers."""
    assert 0 <= key.size <= KEY_SIZE_MAX, key
    high = HIGH_ONE | len(key.ptrs) << 60 | key.csum << 56 | int(key.dirty) << 36 | key.size << 20 | key.inode
    return struct.pack(f"<{2 + len(key.ptrs)}Q", high, key.end, *(ptr_make(p.sector, p.gen, p.dev) for p in key.ptrs))


def decode_padded_key(buf: Buffer, offset: int) -> Bkey:
    """A key in a header, `BKEY_PAD_WORDS` long; what stands behind its last pointer means nothing.

    Pointers that the pad has no room for (KEY_PTRS = 7) are left out.
    """
    return _padded_key(bytes(buf[offset:offset + _PAD.size]))


@lru_cache(maxsize=64)
def _padded_key(data: bytes) -> Bkey:
    # Journal entries say mostly the same.
    words = _PAD.unpack(data)
    return _bkey(words[0], words[1], words[2:2 + (words[0] >> 60 & 7)])


def decode_keys(words: Buffer) -> list[Bkey]:
    """Every key of a stream, in order; Corrupt if the last one runs past the end."""
    values = struct.unpack(f"<{len(words) // 8}Q", words)
    keys = []
    at = 0
    while at < len(values):
        stop = at + SHORTEST_KEY_WORDS + (values[at] >> 60 & 7)
        if stop > len(values):
            raise Corrupt(f"key at word {at} of {len(values)}", "runs past the end of its set")
        keys.append(_bkey(values[at], values[at + 1], values[at + 2:stop]))
        at = stop
    return keys


def _bkey(high: int, low: int, ptrs: tuple[int, ...]) -> Bkey:
    return Bkey(high & 0xFFFFF, low - (high >> 20 & 0xFFFF), low, bool(high >> 36 & 1), high >> 56 & 3,
                tuple(Ptr(p >> 51 & 0xFFF, p >> 8 & (1 << 43) - 1, p & 0xFF) for p in ptrs))


# Many keys at once.

def decode_key_columns(buf: Buffer, nr_u64s: int) -> KeyColumns:
    """The ``nr_u64s`` words at the start of ``buf`` as columns.

    Corrupt if a key runs past the end, or lies beyond 8 PiB without being MAX_KEY.
    """
    words = np.frombuffer(buf, "<u8", nr_u64s)
    high, low, ptr = _split_words(words)
    nptrs = KEY_PTRS.get(high).astype(np.uint8)
    # Shifting inode to the top drops every other field of the word.
    pos = np.bitwise_or(high << INODE_SHIFT, low)
    if len(low) and (int(low.max()) > SECTOR_MASK or int(pos.max()) == MAX_POS):
        # The bits of MAX_KEY are those of MAX_POS already; nothing else may have them.
        is_max = (low == MAX_OFFSET) & (KEY_INODE.get(high) == MAX_INODE)
        wrong = np.flatnonzero(((low > SECTOR_MASK) | (pos == MAX_POS)) & ~is_max)
        if len(wrong):
            raise Corrupt(f"key {high[wrong[0]] & MAX_INODE}:{low[wrong[0]]}", "beyond 8 PiB")
    return KeyColumns(pos, KEY_SIZE.get(high).astype(np.uint32), KEY_DIRTY.get(high).astype(np.bool_), nptrs, ptr,
                      KEY_CSUM.get(high).astype(np.uint8), high)


def encode_key_columns(pos: npt.NDArray[np.uint64], size: npt.NDArray[np.uint32], dirty: npt.NDArray[np.bool_],
                       nptrs: npt.NDArray[np.uint8], ptr: npt.NDArray[np.uint64]) -> bytes:
    """The words of many keys with one pointer or none each."""
    is_max = pos == MAX_POS
    high = (size.astype(np.uint64) << 20 | dirty.astype(np.uint64) << 36 | nptrs.astype(np.uint64) << 60
            | pos >> INODE_SHIFT | HIGH_ONE)
    low = pos & SECTOR_MASK
    low[is_max] = MAX_OFFSET
    if nptrs.all():
        words = np.empty((len(pos), 3), "<u8")
        words[:, 0] = high
        words[:, 1] = low
        words[:, 2] = ptr
        assert int(nptrs.max(initial=1)) == 1, "a key with several pointers"
        return words.tobytes()
    assert int(nptrs.max()) <= 1, "a key with several pointers"
    ends = np.cumsum(nptrs.astype(np.int64) + SHORTEST_KEY_WORDS)
    starts = np.concatenate(([0], ends[:-1]))
    stream = np.empty(int(ends[-1]), "<u8")
    stream[starts] = high
    stream[starts + 1] = low
    has_ptr = nptrs != 0
    stream[starts[has_ptr] + 2] = ptr[has_ptr]
    return stream.tobytes()


def _split_words(words: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], ...]:
    """The columns high, low and first pointer of a key stream, copied out of it."""
    nr_u64s = len(words)
    if nr_u64s:
        stride = SHORTEST_KEY_WORDS + (int(words[0]) >> 60 & 7)
        if nr_u64s % stride == 0:
            # Rows as long as the first key hold one key each exactly if they all say so.
            rows = words.reshape(-1, stride)
            high = rows[:, 0].copy()
            if bool((high >> 60 & 7 == stride - SHORTEST_KEY_WORDS).all()):
                ptr = rows[:, 2].copy() if stride > SHORTEST_KEY_WORDS else np.zeros(len(rows), np.uint64)
                return high, rows[:, 1].copy(), ptr
    starts = _key_starts(words)
    high = words[starts]
    has_ptr = KEY_PTRS.get(high) != 0
    ptr = np.zeros(len(starts), np.uint64)
    ptr[has_ptr] = words[starts[has_ptr] + 2]
    return high, words[starts + 1], ptr


def _key_starts(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """The indices at which keys of different lengths start.

    Each length is known only from the key's own first word, a chain.  Following it in Python costs 70 ns a key, so
    the successor of *every* word is computed as if a key started there, and composed with itself to reach 16 keys
    ahead.  Of a long stream only every 16th key is then visited in Python, and the keys between are found for all of
    them at once.  Two words past the end stand for "ended exactly" and "ran past the end" and succeed themselves.
    """
    nr_u64s = len(words)
    following = np.arange(nr_u64s + 2, dtype=np.intp)
    following[:nr_u64s] += SHORTEST_KEY_WORDS
    following[:nr_u64s] += (words >> 60 & 7).astype(np.intp)
    np.minimum(following, nr_u64s + 1, out=following)
    leap = following
    doublings = _DOUBLINGS if nr_u64s >= _LONG_STREAM_WORDS else 0
    for _ in range(doublings):
        leap = leap[leap]
    heads = []
    at = 0
    leaps = memoryview(leap.data)
    while at < nr_u64s:
        heads.append(at)
        at = leaps[at]
    columns = [np.array(heads, np.intp)]
    for _ in range((1 << doublings) - 1):
        columns.append(following[columns[-1]])
    starts = np.stack(columns, 1).ravel()
    if at != nr_u64s:
        last = int(starts[starts < nr_u64s].max())
        raise Corrupt(f"key at word {last} of {nr_u64s}", "runs past the end of its set")
    return starts[starts < nr_u64s]
