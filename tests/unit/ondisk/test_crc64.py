# SPDX-License-Identifier: GPL-2.0-only
"""The checksum against published values, and against a second library."""

from __future__ import annotations

import random

import anycrc
import pytest

from bcachectl.ondisk.crc64 import crc64, crc64_seeded


@pytest.mark.parametrize(("data", "expected"), [
    (b"123456789", 0x62EC59E3F1A4F00A),
    (b"", 0),
    (bytes(8), 0x03534142A6CE566D),
])
def test_T1_crc64_check_values(data: bytes, expected: int) -> None:
    assert crc64(data) == expected


def test_T1_crc64_seeded_vector() -> None:
    assert crc64_seeded(b"hello world" * 7, 0x0123456789ABCDEF) == 0x417D5E13BCE8D637


def test_all_ones_is_the_seed_of_the_plain_checksum() -> None:
    assert crc64_seeded(b"bcache", (1 << 64) - 1) == crc64(b"bcache")


def test_a_checksum_can_be_continued() -> None:
    assert crc64(b"456789", crc64(b"123")) == crc64(b"123456789")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_taken_and_left_alone(kind: type) -> None:
    buf = kind(b"123456789")
    assert crc64(buf) == 0x62EC59E3F1A4F00A
    assert bytes(buf) == b"123456789"


def test_agrees_with_another_library() -> None:
    source = random.Random(1)
    plain = anycrc.Model("CRC64-WE")
    for length in (1, 7, 8, 63, 64, 200, 4096, 70001):
        data = source.randbytes(length)
        seed = source.getrandbits(64)
        seeded = anycrc.CRC(64, 0x42F0E1EBA9EA3693, seed, False, False, (1 << 64) - 1)
        assert crc64(data) == plain.calc(data)
        assert crc64_seeded(data, seed) == seeded.calc(data)
