# SPDX-License-Identifier: GPL-2.0-only
"""Btree nodes: two sets of a root that Linux 6.12 wrote, and the kernel's checks in their order."""

from __future__ import annotations

import struct

import pytest

from bcachectl.errors import Corrupt
from bcachectl.ondisk.bkey import MAX_POS, pack_key, position, ptr_make
from bcachectl.ondisk.bset import BsetImage, check_node_end, decode_bset_header, decode_node, encode_bset
from bcachectl.ondisk.crc64 import crc64, crc64_seeded
from bcachectl.ondisk.magic import bset_magic

SEED = 0x0000000002DB0001
MAGIC = 0x967552EF5D498FEB
FIRST_SET = bytes.fromhex("""
    61ae76f269be56ea eb8f495dfef75296 d1ec3d37b98b2f4d 01000000 0c000000
    0000001000000090 30b8010000000000 0100970200000000
    0000001000000090 80d7030000000000 0100600200000000
    0000001000000090 c0f7050000000000 0100e80200000000
    ffff0f1000000090 ffffffffffffff7f 0100be0200000000
""")
SIXTH_SET = bytes.fromhex("""
    f12d35488b40b67c eb8f495dfef75296 d1ec3d37b98b2f4d 01000000 06000000
    0000001000000090 0000000000000000 02009f0300000000
    ffff0f1000000090 ffffffffffffff7f 01009e0300000000
""")
KERNEL_MAGIC = struct.unpack_from("<Q", FIRST_SET, 8)[0]

SEQ = 0x5EC
BLOCK_BYTES = 512
NODE_BLOCKS = 8
KEYS = b"".join(pack_key(position(0, 100 * n), 8, False, ptr_make(1000 + n, 1)) for n in range(1, 4))


def node(*sets: bytes) -> bytearray:
    buf = bytearray(NODE_BLOCKS * BLOCK_BYTES)
    log = b"".join(bytes(s) for s in sets)
    buf[:len(log)] = log
    return buf


def bset(keys: bytes = KEYS, *, seq: int = SEQ) -> bytearray:
    return encode_bset(keys, seq=seq, magic=MAGIC, seed=SEED, block_bytes=BLOCK_BYTES)


def decode(buf: bytes | bytearray) -> tuple[list[BsetImage], int]:
    return decode_node(buf, magic=MAGIC, seed=SEED, block_bytes=BLOCK_BYTES, node_blocks=NODE_BLOCKS, where="bucket 44")


def complaint(buf: bytes | bytearray) -> str:
    with pytest.raises(Corrupt) as caught:
        decode(buf)
    return f"{caught.value.why} at {caught.value.where}"


def resealed(buf: bytearray, block: int) -> bytearray:
    """The node with the checksum of the set at ``block`` made right again."""
    offset = block * BLOCK_BYTES
    header = decode_bset_header(buf, offset)
    struct.pack_into("<Q", buf, offset, crc64_seeded(buf[offset + 8:offset + header.set_bytes], SEED))
    return buf


@pytest.mark.parametrize("raw", [FIRST_SET, SIXTH_SET])
def test_T1_seeded_checksums_of_two_sets_of_one_node(raw: bytes) -> None:
    assert crc64_seeded(raw[8:], SEED) == struct.unpack_from("<Q", raw)[0]
    again = encode_bset(raw[32:], seq=0x4D2F8BB9373DECD1, magic=KERNEL_MAGIC, seed=SEED, block_bytes=4096)
    assert again[:len(raw)] == raw
    assert len(again) == 4096


def test_T1_keys_of_the_kernels_node() -> None:
    buf = FIRST_SET.ljust(4096, b"\xaa") + SIXTH_SET.ljust(4096, b"\0") + bytes(8192)
    sets, written = decode_node(buf, magic=KERNEL_MAGIC, seed=SEED, block_bytes=4096, node_blocks=4, where="bucket 731")
    assert written == 2
    assert [s.block for s in sets] == [0, 1]
    assert sets[0].keys.pos.tolist() == [0x1B830, 0x3D780, 0x5F7C0, MAX_POS]
    assert sets[1].keys.pos.tolist() == [0, MAX_POS]
    assert sets[1].keys.ptr.tolist() == [ptr_make(927 * 256, 2), ptr_make(926 * 256, 1)]


def test_T1_the_seed_is_the_pointer_to_the_node_for_every_set() -> None:
    sets, written = decode(node(bset(), bset(), bset()))
    assert (len(sets), written) == (3, 3)
    wrong = bytearray(bset()) + encode_bset(KEYS, seq=SEQ, magic=MAGIC, seed=SEED + (1 << 8), block_bytes=BLOCK_BYTES)
    assert complaint(node(wrong)) == "bad checksum at bucket 44, block 1, 9 keys"


def test_sets_of_several_blocks() -> None:
    sets, written = decode(node(bset(KEYS * 10), bset()))
    assert [s.block for s in sets] == [0, 2]
    assert [len(s.keys.pos) for s in sets] == [30, 3]
    assert written == 3


def test_the_first_set_may_be_empty() -> None:
    sets, written = decode(node(bset(b"")))
    assert (len(sets), written) == (1, 1)
    assert len(sets[0].keys.pos) == 0


def test_a_node_may_be_full() -> None:
    sets, written = decode(node(*[bset()] * NODE_BLOCKS))
    assert (len(sets), written) == (NODE_BLOCKS, NODE_BLOCKS)


def test_older_data_behind_the_log_is_ignored() -> None:
    sets, written = decode(node(bset(), bset(seq=SEQ + 1), bset(seq=SEQ + 2)))
    assert (len(sets), written) == (1, 1)


def test_version_0_is_not_seeded() -> None:
    buf = node(bset())
    struct.pack_into("<I", buf, 24, 0)
    struct.pack_into("<Q", buf, 0, crc64(buf[8:32 + len(KEYS)]))
    assert len(decode(buf)[0]) == 1


# The checks, in the kernel's order.

def test_check_1_bad_header() -> None:
    assert complaint(bytes(4096)) == "bad btree header at bucket 44, block 0, 0 keys"


def test_check_2_unsupported_version() -> None:
    buf = node(bset())
    struct.pack_into("<I", buf, 24, 2)
    assert complaint(buf) == "unsupported bset version at bucket 44, block 0, 9 keys"


@pytest.mark.parametrize("keys", [508, 1 << 31])
def test_check_3_a_set_that_passes_the_end(keys: int) -> None:
    buf = node(bset(), bset())
    struct.pack_into("<I", buf, BLOCK_BYTES + 28, keys)
    assert complaint(buf) == f"bad btree header at bucket 44, block 1, {keys} keys"


def test_check_4_magic() -> None:
    buf = node(bset())
    buf[8] ^= 1
    assert complaint(buf) == "bad magic at bucket 44, block 0, 9 keys"
    assert complaint(resealed(buf, 0)) == "bad magic at bucket 44, block 0, 9 keys"


@pytest.mark.parametrize("offset", [0, 7, 32, 32 + len(KEYS) - 1])
def test_T1_one_wrong_byte_of_a_set(offset: int) -> None:
    buf = node(bset(), bset())
    buf[BLOCK_BYTES + offset] ^= 0x10
    assert complaint(buf) == "bad checksum at bucket 44, block 1, 9 keys"


def test_check_6_empty_set() -> None:
    assert complaint(node(bset(), bset(b""))) == "empty set at bucket 44, block 1, 0 keys"


@pytest.mark.parametrize("stray", [2, 3, 7])
def test_check_7_a_set_behind_the_end_of_the_log(stray: int) -> None:
    buf = node(bset())
    buf[stray * BLOCK_BYTES:(stray + 1) * BLOCK_BYTES] = bset()
    assert complaint(buf) == f"corrupted btree at bucket 44, block {stray}, 9 keys"


def test_check_8_short_btree_key() -> None:
    check_node_end(300, 300, "bucket 44")
    with pytest.raises(Corrupt) as caught:
        check_node_end(301, 300, "bucket 44")
    assert caught.value.why == "short btree key"


def test_version_is_judged_before_length_magic_and_checksum() -> None:
    buf = node(bset())
    struct.pack_into("<QII", buf, 16, SEQ, 2, 1 << 31)
    assert complaint(buf).startswith("unsupported bset version")
    struct.pack_into("<I", buf, 24, 1)
    buf[8] ^= 1
    assert complaint(buf).startswith("bad btree header")
    struct.pack_into("<I", buf, 28, 9)
    assert complaint(buf).startswith("bad magic")


def test_a_wrong_first_set_is_found_before_a_stray_one() -> None:
    buf = node(bset())
    buf[40] ^= 1
    buf[3 * BLOCK_BYTES:4 * BLOCK_BYTES] = bset()
    assert complaint(buf).startswith("bad checksum at bucket 44, block 0")


def test_a_key_that_runs_past_its_set() -> None:
    assert complaint(node(bset(KEYS[:-8]))) == \
        "runs past the end of its set at bucket 44, block 0, 8 keys, key at word 6 of 8"


# Writing.

def test_encode_pads_with_zeros() -> None:
    raw = bset(KEYS * 10)
    assert len(raw) == 2 * BLOCK_BYTES
    assert not any(raw[32 + 10 * len(KEYS):])
    header = decode_bset_header(raw)
    assert (header.version, header.keys, header.seq, header.magic) == (1, 90, SEQ, MAGIC)


def test_encode_refuses_seq_0() -> None:
    with pytest.raises(AssertionError):
        bset(seq=0)


def test_magic_of_a_set() -> None:
    assert bset_magic(bytes(8) + b"x" * 8) == 0x90135C78B99E07F5
