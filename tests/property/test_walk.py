# SPDX-License-Identifier: GPL-2.0-only
"""The offline walk meets arbitrary damage with `Damage` records: it never raises, always ends, and is never silent.

Each example takes an image of the kernel's and breaks it: bytes overwritten anywhere that something stands, or, worse,
with checksums made good again, so that what the pointers say is wrong and nothing else tells.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcachectl.errors import DeviceError
from bcachectl.fsck.live import leaf_extents, too_stale
from bcachectl.fsck.records import Damage, JournalEntry, Node
from bcachectl.fsck.walk import Walk
from bcachectl.ondisk.bkey import ptr_make
from bcachectl.ondisk.bset import BSET_HEADER_BYTES, decode_bset_header
from bcachectl.ondisk.crc64 import crc64, crc64_seeded
from bcachectl.ondisk.jset import JSET_HEADER_BYTES
from bcachectl.ondisk.superblock import SB_BYTES, SB_SECTOR, judge_csum

SB_START = SB_SECTOR << 9


class Image:
    """An image with what stands where, so that damage can be aimed."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        walk = Walk(reader(self.data), len(self.data) >> 9)
        self.journal: list[tuple[int, JournalEntry]] = []
        self.nodes: list[Node] = []
        self.structures: list[tuple[int, int]] = []
        self.bucket_bytes = 0
        for item in walk.structures():
            assert not isinstance(item, Damage) or item.is_harmless
            if isinstance(item, Damage):
                continue
            if not isinstance(item.value, JournalEntry) or item.value in walk.replay:
                self.structures.append((item.sector << 9, item.nsectors << 9))
            if isinstance(item.value, Node):
                self.nodes.append(item.value)
            if isinstance(item.value, JournalEntry):
                self.journal.append((item.sector << 9, item.value))
        self.bucket_bytes = walk.geometry.bucket_bytes
        self.block_bytes = walk.geometry.block_bytes


def reader(data: bytes | bytearray) -> Callable[[int, int], bytes]:
    def read(sector: int, count: int) -> bytes:
        piece = bytes(data[sector << 9:(sector + count) << 9])
        if sector < 0 or len(piece) != count << 9:
            raise DeviceError(f"cannot read {count} sectors at {sector}")
        return piece

    return read


def walk_whole(data: bytes | bytearray) -> tuple[Walk, list[Damage]]:
    walk = Walk(reader(data), len(data) >> 9)
    damages = [item for item in walk.structures() if isinstance(item, Damage)]
    for _slot, found in leaf_extents(walk):
        assert (found.end > found.start).all()
        too_stale(walk, found)
    return walk, damages


@pytest.fixture(scope="module")
def image(_golden_unpacked: Callable[[str], Path]) -> Image:
    return Image(_golden_unpacked("gen_churn") / "cache.img")


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.floats(0, 1), st.binary(min_size=1, max_size=40)), min_size=1,
                max_size=4))
def test_overwritten_bytes(image: Image, wounds: list[tuple[int, float, bytes]]) -> None:
    data = bytearray(image.data)
    for which, where, junk in wounds:
        start, length = image.structures[which % len(image.structures)]
        at = start + int(where * (length - len(junk)))
        data[at:at + len(junk)] = junk
    walk_whole(data)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, (1 << 64) - 1), st.booleans())
def test_wrong_words_with_good_checksums(image: Image, which: int, word: int, value: int, in_node: bool) -> None:
    data = bytearray(image.data)
    if in_node:
        node = image.nodes[which % len(image.nodes)]
        start = node.bucket * image.bucket_bytes
        header = decode_bset_header(data, start)
        if not header.keys:
            return
        at = start + BSET_HEADER_BYTES + 8 * (word % header.keys)
        data[at:at + 8] = value.to_bytes(8, "little")
        seed = ptr_make(start >> 9, node.gen)
        csum = crc64_seeded(bytes(data[start + 8:start + header.set_bytes]), seed)
        data[start:start + 8] = csum.to_bytes(8, "little")
    else:
        start, entry = image.journal[which % len(image.journal)]
        length = JSET_HEADER_BYTES + len(entry.jset.keys)
        at = start + 16 + 8 * (word % ((length - 16) // 8))
        if at == start + 24:
            return
        data[at:at + 8] = value.to_bytes(8, "little")
        data[start:start + 8] = crc64(bytes(data[start + 8:start + length])).to_bytes(8, "little")
    walk_whole(data)


@settings(max_examples=60)
@given(st.integers(2, (SB_BYTES - 1832) // 8), st.integers(0, (1 << 64) - 1))
def test_wrong_superblock_with_good_checksum(image: Image, word: int, value: int) -> None:
    data = bytearray(image.data)
    at = SB_START + 8 * word
    data[at:at + 8] = value.to_bytes(8, "little")
    data[SB_START:SB_START + 8] = judge_csum(data[SB_START:SB_START + SB_BYTES])[1].to_bytes(8, "little")
    walk_whole(data)


@settings(max_examples=30)
@given(st.integers(0, 1 << 14))
def test_cut_short(image: Image, sectors: int) -> None:
    _walk, damages = walk_whole(image.data[:min(sectors << 9, len(image.data) - 512)])
    assert damages


def test_any_wrong_byte_is_noticed(image: Image) -> None:
    """One flipped bit in anything that has a checksum is a damage, or a shorter journal."""
    whole = Walk(reader(image.data), len(image.data) >> 9)
    for _item in whole.structures():
        pass
    for start, _length in image.structures:
        data = bytearray(image.data)
        data[start + 33] ^= 4
        walk, damages = walk_whole(data)
        is_uuids = any(start == ptr.sector << 9 for ptr in whole.replay[-1].jset.uuid_bucket.ptrs)
        assert damages or len(walk.journal) < len(whole.journal) or is_uuids
