# SPDX-License-Identifier: GPL-2.0-only
"""Keys in their three forms: decoded, as words, and as columns."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from bcachectl.errors import Corrupt
from bcachectl.ondisk.bkey import (
    KEY_CSUM,
    KEY_DIRTY,
    KEY_INODE,
    KEY_PTRS,
    KEY_SIZE,
    MAX_INODE,
    MAX_OFFSET,
    MAX_POS,
    PTR_CHECK_DEV,
    PTR_DEV,
    PTR_GEN,
    PTR_OFFSET,
    Bkey,
    Ptr,
    decode_key_columns,
    decode_keys,
    decode_padded_key,
    encode_key,
    encode_key_columns,
    pack_key,
    position,
    ptr_dev,
    ptr_gen,
    ptr_make,
    ptr_sector,
    text,
)

EXTENT = pack_key(position(0, 24), 8, True, ptr_make(0x3700, 1))
HOLE = pack_key(position(0, 64), 16, False, None)
CHILD = pack_key(MAX_POS, 256, False, ptr_make(0x3300, 1))


# One key.

def test_words_of_a_key_as_the_kernel_writes_them() -> None:
    assert struct.pack("<3Q", 0x90000000100FFFFF, 0x7FFFFFFFFFFFFFFF, 0x0000000000330001) == CHILD
    assert struct.pack("<3Q", 0x9000001000800000, 24, 0x370001) == EXTENT
    assert struct.pack("<2Q", 0x8000000001000000, 64) == HOLE


def test_T3_the_offset_of_a_key_is_its_end() -> None:
    [key] = decode_keys(EXTENT)
    assert (key.inode, key.start, key.end, key.size) == (0, 16, 24, 8)


@pytest.mark.parametrize("data_offset", [16, 2048])
def test_T3_keys_of_a_backing_device_include_its_data_offset(data_offset: int) -> None:
    [key] = decode_keys(pack_key(position(3, data_offset + 8), 8, False, 0))
    assert key.start == data_offset
    assert text(key).startswith(f"3:{data_offset} len 8 ")


def test_every_field_of_a_key() -> None:
    raw = struct.pack("<5Q", 1 << 63 | 3 << 60 | 2 << 56 | 1 << 36 | 500 << 20 | 77, 1000,
                      ptr_make(99, 7, 1), ptr_make((1 << 43) - 1, 255, 7), ptr_make(5, 0, PTR_CHECK_DEV))
    [key] = decode_keys(raw)
    assert key == Bkey(77, 500, 1000, True, 2, (Ptr(1, 99, 7), Ptr(7, (1 << 43) - 1, 255), Ptr(PTR_CHECK_DEV, 5, 0)))
    assert encode_key(key) == raw


def test_the_top_bit_and_the_unused_bits_are_ignored() -> None:
    plain = decode_keys(struct.pack("<2Q", 8 << 20, 8))
    assert plain == decode_keys(struct.pack("<2Q", 1 << 63 | 3 << 58 | 1 << 55 | 0x3FFFF << 37 | 8 << 20, 8))


def test_masks_are_where_the_words_have_them() -> None:
    high = struct.unpack_from("<Q", EXTENT)[0]
    assert (KEY_INODE.get(high), KEY_SIZE.get(high), KEY_DIRTY.get(high), KEY_CSUM.get(high), KEY_PTRS.get(high)) == (
        0, 8, 1, 0, 1)
    pointer = ptr_make(1234567, 200, 4095)
    assert (ptr_sector(pointer), ptr_gen(pointer), ptr_dev(pointer)) == (1234567, 200, 4095)
    assert (PTR_OFFSET.get(pointer), PTR_GEN.get(pointer), PTR_DEV.get(pointer)) == (1234567, 200, 4095)
    assert ptr_dev(pointer | 1 << 63) == 4095


def test_padded_key() -> None:
    pad = bytes(3) + CHILD + b"\xaa" * 40
    assert decode_padded_key(pad, 3).ptrs == (Ptr(0, 0x3300, 1),)
    overfull = struct.pack("<8Q", 7 << 60, 0, *range(1, 7))
    assert len(decode_padded_key(overfull, 0).ptrs) == 6


def test_positions() -> None:
    assert position(0, 0) == 0
    assert position(1, 0) > position(0, (1 << 44) - 1)
    assert position(MAX_INODE, MAX_OFFSET) == MAX_POS
    for inode, sector in ((5, 1 << 44), (MAX_INODE, (1 << 44) - 1), (0, MAX_OFFSET)):
        with pytest.raises(Corrupt) as caught:
            position(inode, sector)
        assert caught.value.why == "beyond 8 PiB"


def test_pack_key_refuses_what_the_size_field_cannot_hold() -> None:
    pack_key(1 << 20, 65535, False, None)
    with pytest.raises(AssertionError):
        pack_key(1 << 20, 65536, False, None)


# Texts.

@pytest.mark.parametrize(("key", "line"), [
    (Bkey(0, 160, 216, True, 0, (Ptr(0, 6792, 6),)), "0:160 len 56 -> [0:6792 gen 6] dirty"),
    (Bkey(0, 40, 48, False, 0, (Ptr(0, 6160, 1),)), "0:40 len 8 -> [0:6160 gen 1]"),
    (Bkey(1, 0, 8, False, 0, ()), "1:0 len 8 -> []"),
    (Bkey(1, 0, 8, False, 0, (Ptr(PTR_CHECK_DEV, 77, 3),)), "1:0 len 8 -> [check dev]"),
    (Bkey(1, 0, 8, False, 0, (Ptr(0, 16, 3), Ptr(1, 32, 4))), "1:0 len 8 -> [0:16 gen 3, 1:32 gen 4]"),
    (Bkey(1, 0, 8, True, 1, (Ptr(0, 16, 3), Ptr(0, 1, 2))), "1:0 len 8 -> [0:16 gen 3, 0:1 gen 2] dirty cs1 102"),
    (Bkey(0, -8, 8, False, 0, ()), "0:18446744073709551608 len 16 -> []"),
])
def test_text_of_a_key(key: Bkey, line: str) -> None:
    assert text(key) == line


# Many keys.

def test_columns_of_keys_with_one_pointer() -> None:
    columns = decode_key_columns(EXTENT + CHILD, 6)
    assert columns.pos.tolist() == [24, MAX_POS]
    assert columns.size.tolist() == [8, 256]
    assert columns.dirty.tolist() == [True, False]
    assert columns.nptrs.tolist() == [1, 1]
    assert columns.ptr.tolist() == [0x370001, 0x330001]
    assert columns.csum.tolist() == [0, 0]
    assert columns.high.tolist() == [0x9000001000800000, 0x90000000100FFFFF]
    dtypes = [np.uint64, np.uint32, np.bool_, np.uint8, np.uint64, np.uint8, np.uint64]
    assert [column.dtype for column in columns] == dtypes


@pytest.mark.parametrize("repeat", [1, 7, 200])
def test_columns_of_keys_of_several_lengths(repeat: int) -> None:
    several = encode_key(Bkey(9, 0, 5, False, 0, (Ptr(0, 1, 1), Ptr(0, 2, 2), Ptr(0, 3, 3))))
    stream = (HOLE + EXTENT + several + HOLE + CHILD) * repeat
    columns = decode_key_columns(stream, len(stream) // 8)
    assert columns.pos.tolist() == [64, 24, position(9, 5), 64, MAX_POS] * repeat
    assert columns.nptrs.tolist() == [0, 1, 3, 0, 1] * repeat
    assert columns.ptr.tolist() == [0, 0x370001, ptr_make(1, 1), 0, 0x330001] * repeat


def test_rows_of_equal_length_that_are_not_keys() -> None:
    # Six words: two keys of three words by the first key, but the second row starts inside another key.
    stream = EXTENT + HOLE + struct.pack("<Q", 1 << 63)
    with pytest.raises(Corrupt) as caught:
        decode_key_columns(stream, 6)
    assert caught.value.why == "runs past the end of its set"
    assert caught.value.where == "key at word 5 of 6"


def test_columns_of_no_keys() -> None:
    columns = decode_key_columns(b"", 0)
    assert [len(column) for column in columns] == [0] * 7
    assert encode_key_columns(*columns[:5]) == b""


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("repeat", [1, 300])
def test_a_key_that_runs_past_the_end(cut: int, repeat: int) -> None:
    stream = (HOLE + EXTENT) * repeat
    nr_u64s = len(stream) // 8 - cut
    for decode in (lambda: decode_key_columns(stream, nr_u64s), lambda: decode_keys(stream[:nr_u64s * 8])):
        with pytest.raises(Corrupt) as caught:
            decode()
        assert caught.value.why == "runs past the end of its set"
        assert caught.value.where == f"key at word {repeat * 5 - 3} of {nr_u64s}"


@pytest.mark.parametrize(("inode", "offset"), [(0, 1 << 44), (MAX_INODE, MAX_OFFSET - 1), (0, MAX_OFFSET),
                                               (MAX_INODE, (1 << 64) - 1), (MAX_INODE, (1 << 44) - 1)])
def test_keys_beyond_8_pib(inode: int, offset: int) -> None:
    with pytest.raises(Corrupt) as caught:
        decode_key_columns(EXTENT + struct.pack("<3Q", 9 << 60 | inode, offset, 0), 6)
    assert caught.value.why == "beyond 8 PiB"
    assert caught.value.where == f"key {inode}:{offset}"


def test_columns_are_copies() -> None:
    stream = bytearray(EXTENT * 2)
    columns = decode_key_columns(stream, 6)
    stream[:] = bytes(len(stream))
    assert columns.ptr.tolist() == [0x370001] * 2
    assert columns.high.tolist() == [0x9000001000800000] * 2
    for column in columns:
        column[0] = 1


def test_columns_back_to_words() -> None:
    for stream in (EXTENT + CHILD, HOLE + EXTENT + HOLE + CHILD, HOLE * 3):
        columns = decode_key_columns(stream, len(stream) // 8)
        assert encode_key_columns(*columns[:5]) == stream


def test_columns_with_several_pointers_cannot_be_written() -> None:
    columns = decode_key_columns(encode_key(Bkey(9, 0, 5, False, 0, (Ptr(0, 1, 1), Ptr(0, 2, 2)))), 4)
    with pytest.raises(AssertionError):
        encode_key_columns(*columns[:5])
