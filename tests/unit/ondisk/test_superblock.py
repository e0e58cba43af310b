# SPDX-License-Identifier: GPL-2.0-only
"""Superblocks: a vector of make-bcache, every line of the kernel's checks in its order, and round trips."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest

from bcachectl.errors import Corrupt
from bcachectl.ondisk.magic import BCACHE_MAGIC
from bcachectl.ondisk.superblock import (
    BDEV,
    BDEV_STATE,
    BDEV_WITH_FEATURES,
    BDEV_WITH_OFFSET,
    CDEV,
    CDEV_WITH_FEATURES,
    CDEV_WITH_UUID,
    SB_BYTES,
    BdevState,
    CacheMode,
    Replacement,
    Superblock,
    check_superblock,
    decode_superblock,
    encode_superblock,
    judge_csum,
    parse_superblock,
)

MAKE_BCACHE = bytes.fromhex("""
    f13327a60556d85b 0800000000000000 0000000000000000
    c68573f64e1a45ca 8265f57f48ba6d81
    9da38ce22d7b4361 93f30d20a15f096d
    46955e65c6c44127 a7e12bfcde980edd
""") + bytes(32 + 80) + bytes.fromhex("b004000000000000 0800 0004 0100 0000 00000000 0100 0000") + bytes(SB_BYTES - 208)

CACHE = Superblock(version=CDEV_WITH_UUID, uuid=b"u" * 16, set_uuid=b"s" * 16, flags=1, nbuckets=1200, block_size=8,
                   bucket_size_raw=1024, nr_in_set=1, first_bucket=1, keys=9, d=tuple(range(1, 10)))
BACKING = Superblock(version=BDEV_WITH_OFFSET, uuid=b"b" * 16, set_uuid=b"s" * 16, data_offset=2048, block_size=1)
DEVICE_SECTORS = 1200 * 1024


def why_not(raw: bytes) -> str:
    with pytest.raises(Corrupt) as caught:
        decode_superblock(raw)
    return caught.value.why


def complaint(sb: Superblock, **arguments: Any) -> str:
    with pytest.raises(Corrupt) as caught:
        check_superblock(sb, **{"device_sectors": DEVICE_SECTORS, "logical_block_sectors": 1, **arguments})
    return caught.value.why


def patched(raw: bytes, offset: int, piece: bytes) -> bytes:
    return raw[:offset] + piece + raw[offset + len(piece):]


# Reading.

def test_T1_superblock_of_make_bcache() -> None:
    sb = decode_superblock(MAKE_BCACHE)
    assert sb.csum == 0x5BD85605A62733F1
    assert (sb.version, sb.nbuckets, sb.block_size, sb.bucket_size) == (0, 1200, 8, 1024)
    assert (sb.nr_in_set, sb.nr_this_dev) == (1, 0)
    assert (sb.first_bucket, sb.keys, sb.d) == (1, 0, ())
    assert sb.is_cache
    assert not sb.cache_sync
    assert judge_csum(MAKE_BCACHE) == (0x5BD85605A62733F1, 0x5BD85605A62733F1)
    check_superblock(sb, device_sectors=DEVICE_SECTORS)


@pytest.mark.parametrize(("offset", "why"), [
    (0, "Bad checksum"),
    (7, "Bad checksum"),
    (8, "Not a bcache superblock (bad offset)"),
    (16, "Bad checksum"),
    (24, "Not a bcache superblock (bad magic)"),
    (39, "Not a bcache superblock (bad magic)"),
    (40, "Bad checksum"),
    (184, "Bad checksum"),
    (205, "Bad checksum"),
    (206, "Bad checksum"),
    (207, "Too many journal buckets"),
])
def test_T1_one_wrong_byte_of_a_superblock(offset: int, why: str) -> None:
    wrong = bytearray(MAKE_BCACHE)
    wrong[offset] ^= 0x40
    assert why_not(bytes(wrong)) == why


def test_T1_what_the_checksum_does_not_cover() -> None:
    raw = encode_superblock(CACHE)
    assert why_not(patched(raw, 208 + 8 * 8, b"\x63")) == "Bad checksum"
    for offset in (208 + 8 * 9, 2256, 2258, 4095):
        decode_superblock(patched(raw, offset, b"\x63"))


def test_offset_is_judged_before_magic_and_magic_before_the_checksum() -> None:
    assert why_not(bytes(SB_BYTES)) == "Not a bcache superblock (bad offset)"
    assert why_not(patched(bytes(SB_BYTES), 8, b"\x08")) == "Not a bcache superblock (bad magic)"
    assert why_not(patched(patched(bytes(SB_BYTES), 8, b"\x08"), 24, BCACHE_MAGIC)) == "Bad checksum"


@pytest.mark.parametrize("keys", [257, 487, 65535])
def test_keys_are_bounded_before_the_checksum(keys: int) -> None:
    raw = patched(encode_superblock(CACHE), 206, struct.pack("<H", keys))
    assert len(parse_superblock(raw).d) == 256
    assert why_not(raw) == "Too many journal buckets"
    stored, expected = judge_csum(raw)
    assert stored != expected


# Judging, in the kernel's order: (line of the table, what is wrong, the message).

FAULTS: list[tuple[int, dict[str, Any], str]] = [
    (5, {"uuid": bytes(16)}, "Bad UUID"),
    (6, {"block_size": 0}, "Superblock block size smaller than device block size"),
    (6, {"logical_block_sectors": 32}, "Superblock block size smaller than device block size"),
    (8, {"version": 5, "feature_compat": 1}, "Unsupported compatible feature found"),
    (9, {"version": 5, "feature_ro_compat": 1 << 63}, "Unsupported read-only compatible feature found"),
    (10, {"version": 5, "feature_incompat": 4}, "Unsupported incompatible feature found"),
    (11, {"keys": 257, "d": tuple(range(1, 257))}, "Too many journal buckets"),
    (12, {"nbuckets": 1 << 63}, "Too many buckets"),
    (13, {"nbuckets": 127}, "Not enough buckets"),
    (14, {"block_size": 3}, "Bad block size (not power of 2)"),
    (15, {"block_size": 16}, "Bad block size (larger than page size)"),
    (16, {"bucket_size_raw": 1000}, "Bad bucket size (not power of 2)"),
    (16, {"bucket_size_raw": 0}, "Bad bucket size (not power of 2)"),
    (17, {"bucket_size_raw": 4}, "Bad bucket size (smaller than page size)"),
    (18, {"device_sectors": 1000}, "Invalid superblock: device too small"),
    (19, {"set_uuid": bytes(16)}, "Bad UUID"),
    (20, {"nr_in_set": 0}, "Bad cache device number in set"),
    (20, {"nr_this_dev": 1}, "Bad cache device number in set"),
    (20, {"nr_in_set": 9}, "Bad cache device number in set"),
    (21, {"keys": 3, "d": (1, 2, 4)}, "Journal buckets not sequential"),
    (22, {"first_bucket": 1000, "keys": 256, "d": tuple(range(1000, 1256))}, "Too many journal buckets"),
    (23, {"first_bucket": 0, "keys": 0, "d": ()}, "Invalid superblock: first bucket comes before end of super"),
    (24, {"nbuckets": 512}, "ca->sb.nbuckets is too small"),
]


def test_a_good_cache_superblock_passes() -> None:
    check_superblock(CACHE, device_sectors=DEVICE_SECTORS)


@pytest.mark.parametrize(("line", "changes", "why"), FAULTS)
def test_each_line_of_the_kernels_table(line: int, changes: dict[str, Any], why: str) -> None:
    arguments = {name: changes[name] for name in ("device_sectors", "logical_block_sectors") if name in changes}
    fields = {name: value for name, value in changes.items() if name not in arguments}
    assert complaint(replace(CACHE, **fields), **arguments) == why


@pytest.mark.parametrize("first", range(len(FAULTS)))
def test_the_earlier_line_is_reported(first: int) -> None:
    line, changes, why = FAULTS[first]
    for later_line, later, _ in FAULTS[first + 1:]:
        if later_line == line or (changes.keys() & later.keys()) - {"version"}:
            continue
        both = {**later, **changes}
        arguments = {name: both.pop(name) for name in ("device_sectors", "logical_block_sectors") if name in both}
        assert complaint(replace(CACHE, **both), **arguments) == why, (line, later_line)


def test_the_device_may_be_exactly_as_large_as_its_buckets() -> None:
    check_superblock(CACHE, device_sectors=DEVICE_SECTORS)
    assert complaint(CACHE, device_sectors=DEVICE_SECTORS - 1) == "Invalid superblock: device too small"


def test_T2_the_kernel_needs_more_than_512_buckets() -> None:
    check_superblock(replace(CACHE, nbuckets=513), device_sectors=DEVICE_SECTORS)
    assert complaint(replace(CACHE, nbuckets=512)) == "ca->sb.nbuckets is too small"
    check_superblock(replace(CACHE, nbuckets=512), device_sectors=DEVICE_SECTORS, for_kernel=False)
    check_superblock(replace(CACHE, nbuckets=128), device_sectors=DEVICE_SECTORS, for_kernel=False)


def test_backing_superblocks() -> None:
    check_superblock(BACKING, device_sectors=1)
    check_superblock(replace(BACKING, version=BDEV_WITH_FEATURES, feature_incompat=1 << 40), device_sectors=1)
    check_superblock(replace(BACKING, block_size=64), device_sectors=1)
    assert complaint(replace(BACKING, data_offset=15)) == "Bad data offset"
    assert complaint(replace(BACKING, version=BDEV_WITH_FEATURES, data_offset=8)) == "Bad data offset"
    assert complaint(replace(BACKING, block_size=1), logical_block_sectors=8) == \
        "Superblock block size smaller than device block size"
    assert complaint(replace(BACKING, uuid=bytes(16))) == "Bad UUID"


@pytest.mark.parametrize("version", [2, 7, 1 << 40])
def test_T24_unknown_versions_are_read_but_refused(version: int) -> None:
    sb = decode_superblock(encode_superblock(replace(CACHE, version=version)))
    assert not sb.is_cache
    assert not sb.is_backing
    assert sb.nbuckets == 1200
    assert complaint(sb) == "Unsupported superblock version"


# What the fields mean.

@pytest.mark.parametrize(("version", "is_cache"), [(0, True), (1, False), (3, True), (4, False), (5, True), (6, False)])
def test_T24_versions_0_to_6(version: int, is_cache: bool) -> None:
    sb = replace(CACHE if is_cache else BACKING, version=version)
    if version == BDEV:
        sb = replace(sb, data_offset=16)
    again = decode_superblock(encode_superblock(sb))
    assert replace(again, csum=0) == sb
    assert (again.is_cache, again.is_backing) == (is_cache, not is_cache)


def test_version_1_means_data_offset_16_and_leaves_the_field_alone() -> None:
    raw = encode_superblock(replace(BACKING, version=BDEV_WITH_OFFSET, data_offset=4096))
    old = patched(raw, 16, b"\x01")
    sb = parse_superblock(old)
    assert sb.data_offset == 16
    assert encode_superblock(sb, old)[184:192] == struct.pack("<Q", 4096)
    assert encode_superblock(sb)[184:192] == bytes(8)


def test_T24_labels() -> None:
    assert replace(BACKING, label=b"x" * 32).label_text == "x" * 32
    assert replace(BACKING, label=b"db\0garbage".ljust(32, b"\xff")).label_text == "db"
    assert replace(BACKING, label=b"a\xffb".ljust(32, b"\0")).label_text == "a\\xffb"
    assert replace(BACKING, label="größe".encode().ljust(32, b"\0")).label_text == "größe"


def test_flags_of_a_cache() -> None:
    sb = replace(CACHE, flags=0).with_sync(True).with_discard(True).with_replacement(Replacement.RANDOM)
    assert sb.flags == 0b1011
    assert (sb.cache_sync, sb.discard, sb.replacement) == (True, True, Replacement.RANDOM)
    assert sb.with_sync(False).flags == 0b1010
    assert replace(sb, flags=7 << 2).replacement is None
    assert sb.unknown_flags == 0


def test_flags_of_a_backing_device() -> None:
    sb = BACKING.with_cache_mode(CacheMode.WRITEAROUND).with_state(BdevState.DIRTY)
    assert sb.flags == 2 | 2 << 61
    assert (sb.cache_mode, sb.state) == (CacheMode.WRITEAROUND, BdevState.DIRTY)
    assert replace(sb, flags=9).cache_mode is None
    assert BDEV_STATE.get(sb.with_state(BdevState.STALE).flags) == 3


def test_flags_that_make_bcache_stores_for_an_unknown_policy() -> None:
    sb = replace(CACHE, flags=(-22 << 2) & ((1 << 34) - 1))
    assert sb.replacement == Replacement.RANDOM
    assert sb.unknown_flags != 0
    assert decode_superblock(encode_superblock(sb)).flags == sb.flags
    assert sb.with_sync(True).unknown_flags == sb.unknown_flags


def test_T25_bucket_sizes_in_three_forms() -> None:
    assert replace(CACHE, bucket_size_raw=8, feature_incompat=2).bucket_size == 8, "features count from version 5 on"
    five = replace(CACHE, version=CDEV_WITH_FEATURES)
    assert replace(five, bucket_size_raw=1024, obso_bucket_size_hi=3).bucket_size == 1024
    assert replace(five, bucket_size_raw=8, feature_incompat=2).bucket_size == 256
    assert replace(five, bucket_size_raw=17, feature_incompat=2).bucket_size == 131072
    assert replace(five, bucket_size_raw=0, obso_bucket_size_hi=2, feature_incompat=1).bucket_size == 131072
    assert replace(five, bucket_size_raw=8, obso_bucket_size_hi=2, feature_incompat=3).bucket_size == 256
    assert replace(five, feature_incompat=1).is_obso_large_bucket
    assert not replace(five, feature_incompat=3).is_obso_large_bucket
    assert not replace(CACHE, feature_incompat=1).is_obso_large_bucket
    check_superblock(replace(five, bucket_size_raw=10, feature_incompat=2), device_sectors=DEVICE_SECTORS)


@pytest.mark.parametrize("order", [32, 64, 65535])
def test_a_bucket_size_beyond_32_bits_is_refused(order: int) -> None:
    sb = replace(CACHE, version=CDEV_WITH_FEATURES, bucket_size_raw=order, feature_incompat=2)
    assert sb.bucket_size == 0
    assert complaint(sb) == "Bad bucket size (not power of 2)"


def test_geometry_of_a_cache() -> None:
    geometry = CACHE.geometry
    assert (geometry.block_bytes, geometry.bucket_bytes) == (4096, 524288)
    assert (geometry.nbuckets, geometry.first_bucket) == (1200, 1)


# Writing.

def test_T25_unknown_bytes_survive() -> None:
    base = bytearray(encode_superblock(replace(CACHE, flags=1 | 1 << 40, feature_incompat=1 << 50, feature_compat=7,
                                               feature_ro_compat=9, obso_bucket_size_hi=0xBEEF)))
    base[144:184] = b"p" * 40
    base[208 + 8 * 9:208 + 8 * 256] = b"j" * (8 * 247)
    base[2258:] = b"t" * (SB_BYTES - 2258)
    base[0:8] = struct.pack("<Q", judge_csum(bytes(base))[1])
    raw = bytes(base)
    sb = decode_superblock(raw)
    assert encode_superblock(sb, raw) == raw
    changed = encode_superblock(replace(sb.with_sync(False), seq=sb.seq + 1), raw)
    differing = [i for i in range(SB_BYTES) if changed[i] != raw[i]]
    assert set(differing) <= {*range(8), 104, 112}
    assert decode_superblock(changed).seq == sb.seq + 1


def test_T25_feature_words_of_a_backing_device_are_kept() -> None:
    sb = replace(BACKING, version=BDEV_WITH_FEATURES, feature_compat=1, feature_incompat=2, feature_ro_compat=3,
                 first_bucket=7)
    raw = encode_superblock(sb)
    assert decode_superblock(raw).feature_ro_compat == 3
    assert encode_superblock(decode_superblock(raw), raw) == raw


def test_encode_of_the_make_bcache_vector() -> None:
    assert encode_superblock(decode_superblock(MAKE_BCACHE)) == MAKE_BCACHE


def test_journal_buckets_of_a_first_run() -> None:
    sb = replace(CACHE, version=CDEV, keys=0, d=(), first_bucket=3).with_journal_buckets(4)
    assert (sb.keys, sb.d) == (4, (3, 4, 5, 6))
    again = decode_superblock(encode_superblock(sb))
    assert again.d == sb.d


def test_encode_refuses_a_wrong_number_of_journal_buckets() -> None:
    with pytest.raises(AssertionError):
        encode_superblock(replace(CACHE, keys=8))
