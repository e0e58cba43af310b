# SPDX-License-Identifier: GPL-2.0-only
"""Every format is stated twice, with construct and with struct or numpy.  Both agree, byte for byte, both ways.

And no decoder meets bytes with anything but `Corrupt`, or None for a journal entry.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from construct import Array, GreedyRange
from hypothesis import given
from hypothesis import strategies as st

from bcachectl.errors import Corrupt
from bcachectl.ondisk import bkey, bset, jset, prio, superblock, uuids
from bcachectl.ondisk.bkey import (
    MAX_INODE,
    MAX_OFFSET,
    Bkey,
    KeyColumns,
    Ptr,
    decode_key_columns,
    decode_keys,
    encode_key,
    encode_key_columns,
    pack_key,
    position,
    ptr_make,
)
from bcachectl.ondisk.bset import decode_bset_header, decode_node, encode_bset
from bcachectl.ondisk.crc64 import crc64_seeded
from bcachectl.ondisk.geometry import Geometry
from bcachectl.ondisk.jset import decode_jset, encode_jset, judge_jset, walk_journal_bucket
from bcachectl.ondisk.prio import decode_prio_set, encode_prio_set
from bcachectl.ondisk.superblock import (
    BACKING_VERSIONS,
    BDEV,
    SB_BYTES,
    decode_superblock,
    encode_superblock,
    judge_csum,
    parse_superblock,
)
from bcachectl.ondisk.uuids import UuidEntry, decode_uuids, decode_uuids_v0, encode_uuids
from bcachectl.ondisk.validity import (
    btree_ptr_invalid,
    btree_ptrs_invalid,
    columns_staleness,
    extent_bad,
    extent_invalid,
    extents_bad,
    extents_fatal,
    ptr_problem,
    ptr_stale,
)

u8, u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
words = st.lists(u64, max_size=40)


def raw_words(values: list[int]) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


# Keys.

pointers = st.builds(Ptr, st.sampled_from([0, 0, 0, 1, 7, 4095]), st.integers(0, (1 << 43) - 1), u8)


@st.composite
def keys(draw: st.DrawFn, max_ptrs: int = 7, csum: bool = True) -> Bkey:
    size = draw(st.integers(0, 65535))
    ptrs = tuple(draw(st.lists(pointers, max_size=max_ptrs)))
    if draw(st.integers(0, 9)) == 0:
        inode, end = MAX_INODE, MAX_OFFSET
    else:
        inode, end = draw(st.integers(0, MAX_INODE)), draw(st.integers(0, (1 << 44) - 2))
    return Bkey(inode, end - size, end, draw(st.booleans()), draw(st.integers(0, 3)) if csum else 0, ptrs)


def as_layout(key: Bkey) -> dict[str, Any]:
    return {
        "high": {"one": True, "ptrs": len(key.ptrs), "pad0": 0, "csum": key.csum, "pad1": False, "unused": 0,
                 "dirty": key.dirty, "size": key.size, "inode": key.inode},
        "offset": key.end,
        "ptr": [{"unused": False, "dev": p.dev, "sector": p.sector, "gen": p.gen} for p in key.ptrs],
    }


def from_layout(parsed: Any) -> Bkey:
    high = parsed.high
    return Bkey(high.inode, parsed.offset - high.size, parsed.offset, high.dirty, high.csum,
                tuple(Ptr(p.dev, p.sector, p.gen) for p in parsed.ptr))


@given(keys())
def test_bkey_is_built_alike(key: Bkey) -> None:
    raw = bkey.LAYOUT.build(as_layout(key))
    assert encode_key(key) == raw
    assert decode_keys(raw) == [key]
    if len(key.ptrs) <= 1 and not key.csum:
        ptr = ptr_make(key.ptrs[0].sector, key.ptrs[0].gen, key.ptrs[0].dev) if key.ptrs else None
        assert pack_key(position(key.inode, key.end), key.size, key.dirty, ptr) == raw


@given(u64, u64, st.lists(u64, min_size=7, max_size=7))
def test_bkey_is_read_alike_whatever_its_unused_bits(high: int, low: int, ptrs: list[int]) -> None:
    raw = raw_words([high, low, *ptrs[:high >> 60 & 7]])
    parsed = bkey.LAYOUT.parse(raw)
    assert bkey.LAYOUT.build(parsed) == raw
    assert decode_keys(raw) == [from_layout(parsed)]


@given(st.lists(keys(), max_size=60))
def test_columns_hold_what_the_keys_say(stream: list[Bkey]) -> None:
    raw = b"".join(encode_key(key) for key in stream)
    columns = decode_key_columns(raw, len(raw) // 8)
    assert [from_layout(parsed) for parsed in GreedyRange(bkey.LAYOUT).parse(raw)] == stream
    assert columns.pos.tolist() == [position(key.inode, key.end) for key in stream]
    assert columns.size.tolist() == [key.size for key in stream]
    assert columns.dirty.tolist() == [key.dirty for key in stream]
    assert columns.nptrs.tolist() == [len(key.ptrs) for key in stream]
    assert columns.csum.tolist() == [key.csum for key in stream]
    assert columns.ptr.tolist() == [ptr_make(k.ptrs[0].sector, k.ptrs[0].gen, k.ptrs[0].dev) if k.ptrs else 0
                                    for k in stream]


@given(st.lists(keys(max_ptrs=1, csum=False), max_size=60), st.integers(1, 40))
def test_columns_are_written_as_the_keys_are(stream: list[Bkey], repeat: int) -> None:
    raw = b"".join(encode_key(key) for key in stream) * repeat
    columns = decode_key_columns(raw, len(raw) // 8)
    assert len(columns.pos) == len(stream) * repeat
    assert encode_key_columns(*columns[:5]) == raw


@given(words, st.integers(1, 30))
def test_any_words_give_the_same_keys_or_are_corrupt_in_both_forms(values: list[int], repeat: int) -> None:
    raw = raw_words(values * repeat)
    plain: list[Bkey] | str
    columns: KeyColumns | str
    try:
        plain = decode_keys(raw)
    except Corrupt as error:
        plain = str(error)
    try:
        columns = decode_key_columns(raw, len(raw) // 8)
    except Corrupt as error:
        columns = str(error)
    if isinstance(columns, str):
        assert columns == plain or "beyond 8 PiB" in columns
    else:
        assert not isinstance(plain, str)
        assert columns.size.tolist() == [key.size for key in plain]


# Whether keys are usable.

GEOMETRY = Geometry(block_size_sectors=8, bucket_size_sectors=64, nbuckets=40, first_bucket=2)
near_pointers = st.builds(Ptr, st.sampled_from([0, 0, 0, 0, 1, 4095]), st.integers(0, 42 * 64), u8)


@st.composite
def near_keys(draw: st.DrawFn) -> Bkey:
    end = draw(st.integers(0, 100))
    size = draw(st.integers(0, 70))
    return Bkey(draw(st.integers(0, 2)), end - size, end, draw(st.booleans()), 0,
                tuple(draw(st.lists(near_pointers, max_size=1))))


@given(st.lists(near_keys(), max_size=30), st.lists(u8, min_size=40, max_size=40))
def test_columns_are_judged_as_the_keys_are(stream: list[Bkey], generations: list[int]) -> None:
    gens = np.array(generations, np.uint8)
    raw = b"".join(encode_key(key) for key in stream)
    columns = decode_key_columns(raw, len(raw) // 8)
    assert extents_bad(columns, GEOMETRY, gens).tolist() == [extent_bad(k, GEOMETRY, gens) for k in stream]
    assert extents_fatal(columns, GEOMETRY).tolist() == [k.size > 0 and extent_invalid(k, GEOMETRY) for k in stream]
    assert btree_ptrs_invalid(columns, GEOMETRY).tolist() == [btree_ptr_invalid(k, GEOMETRY) for k in stream]
    assert columns_staleness(columns, GEOMETRY, gens).tolist() == [
        0 if ptr_problem(k, GEOMETRY) else ptr_stale(k, GEOMETRY, gens) for k in stream]


# Sets of a btree node.

@given(words, u64.filter(bool), u64, u64, st.sampled_from([512, 1024, 4096]))
def test_bset_is_built_and_read_alike(body: list[int], seq: int, magic: int, seed: int, block_bytes: int) -> None:
    raw = encode_bset(raw_words(body), seq=seq, magic=magic, seed=seed, block_bytes=block_bytes)
    parsed = bset.LAYOUT.parse(raw)
    stated = bset.LAYOUT.build({"csum": parsed.csum, "magic": magic, "seq": seq, "version": 1, "keys": len(body),
                                "d": body})
    assert raw == stated.ljust(len(raw), b"\0")
    assert parsed.csum == crc64_seeded(stated[8:], seed)
    header = decode_bset_header(raw)
    assert [getattr(header, field.name) for field in fields(header)] == [parsed[field.name] for field in fields(header)]


@given(st.lists(st.lists(keys(max_ptrs=1, csum=False), min_size=1, max_size=20), min_size=1, max_size=6), u64, u64)
def test_a_node_gives_back_its_sets(sets: list[list[Bkey]], magic: int, seed: int) -> None:
    streams = [b"".join(encode_key(key) for key in stream) for stream in sets]
    log = b"".join(encode_bset(stream, seq=9, magic=magic, seed=seed, block_bytes=512) for stream in streams)
    buf = log + bytes(1024)
    images, written = decode_node(buf, magic=magic, seed=seed, block_bytes=512, node_blocks=len(buf) // 512, where="")
    assert written == len(log) // 512
    assert [encode_key_columns(*image.keys[:5]) for image in images] == streams


@given(st.binary(min_size=2048, max_size=2048), st.integers(0, 12), st.booleans())
def test_a_node_of_any_bytes_is_read_or_corrupt(noise: bytes, nr_u64s: int, is_sealed: bool) -> None:
    buf = bytearray(noise)
    struct.pack_into("<QII", buf, 16, 5, 1, nr_u64s)
    if is_sealed:
        struct.pack_into("<QQ", buf, 0, 0, 77)
        struct.pack_into("<Q", buf, 0, crc64_seeded(buf[8:32 + 8 * nr_u64s], 3))
    with contextlib.suppress(Corrupt):
        decode_node(buf, magic=77, seed=3, block_bytes=512, node_blocks=4, where="")


# Journal entries.

@given(u64.filter(bool), u64, keys(max_ptrs=6), keys(max_ptrs=6), u16, u64, words, u64)
def test_jset_is_built_and_read_alike(seq: int, last_seq: int, uuid_bucket: Bkey, btree_root: Bkey, level: int,
                                      prio_bucket: int, body: list[int], magic: int) -> None:
    last_seq = last_seq % seq + 1
    raw = encode_jset(seq=seq, last_seq=last_seq, uuid_bucket=encode_key(uuid_bucket),
                      btree_root=encode_key(btree_root), btree_level=level, prio_bucket0=prio_bucket,
                      keys=raw_words(body), magic=magic, block_bytes=512)
    parsed = jset.LAYOUT.parse(raw)
    stated = jset.LAYOUT.build({
        "csum": parsed.csum, "magic": magic, "seq": seq, "version": 1, "keys": len(body), "last_seq": last_seq,
        "uuid_bucket": padded(uuid_bucket), "btree_root": padded(btree_root), "btree_level": level, "pad": bytes(6),
        "prio_bucket": [prio_bucket] + [0] * 7, "d": body})
    assert raw == stated.ljust(len(raw), b"\0")
    entry = decode_jset(raw, 0, magic=magic, block_bytes=512, limit_bytes=len(raw))
    assert entry is not None
    assert (entry.seq, entry.last_seq, entry.version, entry.btree_level) == (
        parsed.seq, parsed.last_seq, parsed.version, parsed.btree_level)
    assert (entry.uuid_bucket, entry.btree_root) == (uuid_bucket, btree_root)
    assert list(entry.prio_bucket) == list(parsed.prio_bucket)
    assert entry.keys == raw_words(list(parsed.d))
    assert entry.blocks == len(raw) // 512


def padded(key: Bkey) -> list[int]:
    raw = encode_key(key).ljust(64, b"\0")
    return list(struct.unpack("<8Q", raw))


@given(st.binary(max_size=2048), st.integers(0, 2048), u32)
def test_a_journal_bucket_of_any_bytes_is_walked(noise: bytes, offset: int, nr_u64s: int) -> None:
    buf = bytearray(noise)
    if len(buf) >= offset + 32:
        struct.pack_into("<Q", buf, offset + 8, 77)
        struct.pack_into("<I", buf, offset + 28, nr_u64s)
    assert judge_jset(buf, offset, magic=77, limit_bytes=1024)
    assert walk_journal_bucket(buf, magic=77, block_bytes=512) == []


# Prio sets.

@given(st.integers(52, 300), st.data(), u64, u64, u64)
def test_prio_set_is_built_and_read_alike(meta_bytes: int, data: st.DataObject, seq: int, next_bucket: int,
                                          magic: int) -> None:
    count = (meta_bytes - 40) // 3
    buckets = data.draw(st.lists(st.tuples(u16, u8), min_size=count, max_size=count))
    raw = encode_prio_set(seq=seq, next_bucket=next_bucket, prio=np.array([p for p, _ in buckets], np.uint16),
                          gen=np.array([g for _, g in buckets], np.uint8), magic=magic, meta_bytes=meta_bytes)
    parsed = prio.LAYOUT.parse(raw, meta_bytes=meta_bytes)
    stated = prio.LAYOUT.build({
        "csum": parsed.csum, "magic": magic, "seq": seq, "version": 0, "pad": 0, "next_bucket": next_bucket,
        "data": [{"prio": p, "gen": g} for p, g in buckets]}, meta_bytes=meta_bytes)
    assert raw == stated
    prio_set = decode_prio_set(raw, magic, 1)
    assert (prio_set.seq, prio_set.next_bucket) == (parsed.seq, parsed.next_bucket)
    assert prio_set.prio.tolist() == [entry.prio for entry in parsed.data]
    assert prio_set.gen.tolist() == [entry.gen for entry in parsed.data]


@given(u16, u8)
def test_a_bucket_of_a_prio_set_takes_three_bytes(priority: int, gen: int) -> None:
    raw = prio.BUCKET_LAYOUT.build({"prio": priority, "gen": gen})
    written = encode_prio_set(seq=1, next_bucket=0, prio=np.array([0, priority], np.uint16),
                              gen=np.array([0, gen], np.uint8), magic=1, meta_bytes=64)
    assert written[43:46] == raw
    assert len(raw) == 3


@given(st.binary(min_size=40, max_size=200))
def test_a_prio_set_of_any_bytes_is_corrupt(noise: bytes) -> None:
    with pytest.raises(Corrupt, match="reading priorities"):
        decode_prio_set(noise, 1, 0)


# The uuid array.

@given(st.lists(st.builds(UuidEntry, st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32), u32, u32,
                          u32, u32, u64, st.binary(min_size=56, max_size=56)), max_size=5))
def test_uuid_entries_are_built_and_read_alike(entries: list[UuidEntry]) -> None:
    layout = Array(len(entries), uuids.LAYOUT)
    stated = layout.build([{field.name: getattr(entry, field.name) for field in fields(entry)} for entry in entries])
    assert encode_uuids(entries, len(stated)) == stated
    assert decode_uuids(stated) == entries


@given(st.lists(st.binary(min_size=64, max_size=64), max_size=5))
def test_old_uuid_entries_are_read_alike(raw: list[bytes]) -> None:
    for entry, parsed in zip(decode_uuids_v0(b"".join(raw)), map(uuids.LAYOUT_V0.parse, raw), strict=True):
        assert (entry.uuid, entry.label, entry.first_reg, entry.last_reg, entry.invalidated) == (
            parsed.uuid, parsed.label, parsed.first_reg, parsed.last_reg, parsed.invalidated)


# Superblocks.

@st.composite
def raw_superblocks(draw: st.DrawFn) -> bytes:
    keys_in_use = draw(st.integers(0, 256))
    noise = np.random.default_rng(draw(u32)).bytes(SB_BYTES)
    raw = bytearray(draw(st.sampled_from([bytes(SB_BYTES), noise])))
    struct.pack_into("<QQ", raw, 8, 8, draw(st.one_of(st.integers(0, 8), u64)))
    raw[24:40] = bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")
    for offset in draw(st.lists(st.integers(40, 205), max_size=8)):
        raw[offset] = draw(u8)
    struct.pack_into("<H", raw, 206, keys_in_use)
    struct.pack_into("<Q", raw, 0, judge_csum(raw)[1])
    return bytes(raw)


@given(raw_superblocks())
def test_superblock_is_read_and_written_alike(raw: bytes) -> None:
    parsed = superblock.LAYOUT.parse(raw)
    assert superblock.LAYOUT.build(parsed) == raw
    sb = decode_superblock(raw)
    assert encode_superblock(sb, raw) == raw
    for name in ("csum", "offset", "version", "magic", "uuid", "set_uuid", "label", "flags", "seq", "feature_compat",
                 "feature_incompat", "feature_ro_compat", "block_size", "nr_in_set", "nr_this_dev", "last_mount",
                 "first_bucket", "keys", "obso_bucket_size_hi"):
        assert getattr(sb, name) == parsed[name], name
    assert sb.bucket_size_raw == parsed.bucket_size
    assert sb.d == tuple(parsed.d)[:parsed["keys"]]
    union = parsed.nbuckets_or_data_offset
    if sb.version == BDEV:
        assert (sb.nbuckets, sb.data_offset) == (0, 16)
    elif sb.version in BACKING_VERSIONS:
        assert (sb.nbuckets, sb.data_offset) == (0, union)
    else:
        assert (sb.nbuckets, sb.data_offset) == (union, 0)


@given(raw_superblocks())
def test_superblock_written_anew_says_the_same(raw: bytes) -> None:
    sb = decode_superblock(raw)
    parsed = superblock.LAYOUT.parse(raw)
    parsed.pad, parsed.tail, parsed.rest = [0] * 5, bytes(6), bytes(SB_BYTES - 2264)
    parsed.d = [*sb.d] + [0] * (256 - sb.keys)
    if sb.version == BDEV:
        parsed.nbuckets_or_data_offset = 0
    stated = bytearray(superblock.LAYOUT.build(parsed))
    struct.pack_into("<Q", stated, 0, judge_csum(stated)[1])
    assert encode_superblock(sb) == bytes(stated)


@given(st.binary(min_size=256, max_size=256), st.booleans())
def test_a_superblock_of_any_bytes_is_read_or_corrupt(noise: bytes, is_sealed: bool) -> None:
    raw = bytearray(noise.ljust(SB_BYTES, b"\0"))
    struct.pack_into("<Q", raw, 8, 8)
    raw[24:40] = bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")
    if is_sealed:
        struct.pack_into("<Q", raw, 0, judge_csum(raw)[1])
    with contextlib.suppress(Corrupt):
        sb = decode_superblock(raw)
        assert sb == parse_superblock(raw)
        superblock.check_superblock(sb, device_sectors=1 << 60)
