# SPDX-License-Identifier: GPL-2.0-only
"""Journal entries: the first one of a set that Linux 6.12 wrote, and where the walk of a bucket ends."""

from __future__ import annotations

import struct

import pytest

from bcachectl.ondisk.bkey import Bkey, Ptr, decode_keys, pack_key, position
from bcachectl.ondisk.jset import decode_jset, encode_jset, judge_jset, walk_journal_bucket

MAGIC = 0x22139E4747B5D82C
UUID_BUCKET = struct.pack("<3Q", 0x9000000010000000, 0, 0x0000000000370001)
BTREE_ROOT = struct.pack("<3Q", 0x90000000100FFFFF, 0x7FFFFFFFFFFFFFFF, 0x0000000000330001)
KEYS = pack_key(position(0, 24), 8, True, 0x370001) + pack_key(position(0, 64), 16, False, None)


def entry(seq: int = 1, keys: bytes = b"", block_bytes: int = 512, magic: int = MAGIC) -> bytearray:
    return encode_jset(seq=seq, last_seq=1, uuid_bucket=UUID_BUCKET, btree_root=BTREE_ROOT, btree_level=0,
                       prio_bucket0=21, keys=keys, magic=magic, block_bytes=block_bytes)


def test_T1_first_entry_of_a_new_set() -> None:
    buf = entry()
    assert struct.unpack_from("<QQQIIQ", buf) == (0xC7236955FA2C40B7, MAGIC, 1, 1, 0, 1)
    jset = decode_jset(buf, 0, magic=MAGIC, block_bytes=512, limit_bytes=512)
    assert jset is not None
    assert (jset.seq, jset.last_seq, jset.version, jset.btree_level, jset.blocks) == (1, 1, 1, 0, 1)
    assert jset.prio_bucket == (21, 0, 0, 0, 0, 0, 0, 0)
    assert jset.uuid_bucket.ptrs == (Ptr(0, 0x3700, 1),)
    assert jset.uuid_bucket.size == 256
    assert jset.btree_root == Bkey(0xFFFFF, (1 << 63) - 1 - 256, (1 << 63) - 1, False, 0, (Ptr(0, 0x3300, 1),))
    assert jset.keys == b""


@pytest.mark.parametrize("offset", [*range(8), 16, 24, 32, 40, 104, 168, 176, 239])
def test_T1_one_wrong_byte_of_an_entry(offset: int) -> None:
    buf = entry()
    buf[offset] ^= 1
    assert judge_jset(buf, 0, magic=MAGIC, limit_bytes=512) == "bad csum"
    assert decode_jset(buf, 0, magic=MAGIC, block_bytes=512, limit_bytes=512) is None


def test_what_ends_a_walk() -> None:
    buf = entry(keys=KEYS)
    assert judge_jset(buf, 0, magic=MAGIC, limit_bytes=512) == ""
    assert judge_jset(buf, 0, magic=MAGIC ^ 1, limit_bytes=512) == "bad magic"
    assert judge_jset(buf, 0, magic=MAGIC, limit_bytes=240) == "too big"
    assert judge_jset(buf, 0, magic=MAGIC, limit_bytes=239) == "too short"
    struct.pack_into("<I", buf, 28, 1 << 31)
    assert judge_jset(buf, 0, magic=MAGIC, limit_bytes=1 << 40) == "too big"


def test_an_entry_is_at_most_32_kib() -> None:
    most = bytes((32768 - 240) // 8 * 8)
    buf = entry(keys=most, block_bytes=4096) + bytes(4096)
    assert judge_jset(buf, 0, magic=MAGIC, limit_bytes=len(buf)) == ""
    struct.pack_into("<I", buf, 28, len(most) // 8 + 1)
    assert judge_jset(buf, 0, magic=MAGIC, limit_bytes=len(buf)) == "too big"
    with pytest.raises(AssertionError):
        entry(keys=most + bytes(8))


def test_keys_come_back_as_written() -> None:
    jset = decode_jset(entry(keys=KEYS), 0, magic=MAGIC, block_bytes=512, limit_bytes=512)
    assert jset is not None
    assert jset.keys == KEYS
    assert decode_keys(jset.keys) == [Bkey(0, 16, 24, True, 0, (Ptr(0, 0x3700, 1),)), Bkey(0, 48, 64, False, 0, ())]


def test_T5_entries_begin_where_the_last_ones_blocks_end() -> None:
    long = KEYS * 20
    bucket = bytearray(8192)
    first, second = entry(7, long), entry(8)
    bucket[:len(first)] = first
    bucket[len(first):len(first) + 512] = second
    found = walk_journal_bucket(bucket, magic=MAGIC, block_bytes=512)
    assert [(offset, jset.seq, jset.blocks) for offset, jset in found] == [(0, 7, 3), (1536, 8, 1)]


def test_the_walk_meets_older_entries_behind_newer_ones() -> None:
    bucket = bytearray(entry(9) + entry(3) + bytes(512) + entry(4))
    assert [jset.seq for _, jset in walk_journal_bucket(bucket, magic=MAGIC, block_bytes=512)] == [9, 3]


def test_padding_that_is_not_zero_does_not_matter() -> None:
    buf = entry(keys=KEYS)
    buf[240 + len(KEYS):] = b"\xaa" * (512 - 240 - len(KEYS))
    assert judge_jset(buf, 0, magic=MAGIC, limit_bytes=512) == ""


def test_an_entry_never_crosses_its_bucket() -> None:
    bucket = bytearray(entry(7) + entry(8, KEYS * 20))[:1024]
    assert [jset.seq for _, jset in walk_journal_bucket(bucket, magic=MAGIC, block_bytes=512)] == [7]


def test_an_unused_bucket_holds_nothing() -> None:
    assert walk_journal_bucket(bytes(8192), magic=MAGIC, block_bytes=512) == []


def test_garbage_behind_a_padded_key_is_ignored() -> None:
    buf = encode_jset(seq=1, last_seq=1, uuid_bucket=UUID_BUCKET + b"\xaa" * 40, btree_root=BTREE_ROOT, btree_level=2,
                      prio_bucket0=21, keys=b"", magic=MAGIC, block_bytes=512)
    jset = decode_jset(buf, 0, magic=MAGIC, block_bytes=512, limit_bytes=512)
    assert jset is not None
    assert jset.uuid_bucket.ptrs == (Ptr(0, 0x3700, 1),)
    assert jset.btree_level == 2
