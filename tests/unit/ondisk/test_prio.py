# SPDX-License-Identifier: GPL-2.0-only
"""Prio sets: layout, checksum over the whole buffer, and the two ways to be refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from bcachectl.errors import Corrupt
from bcachectl.ondisk.crc64 import crc64
from bcachectl.ondisk.prio import decode_prio_set, encode_prio_set

MAGIC = 0x6750E15F87337F91
PRIO = np.array([0, 32768, 65535, 7], np.uint16)
GEN = np.array([0, 1, 255, 96], np.uint8)


def encoded(into: bytearray | None = None) -> bytearray:
    return encode_prio_set(seq=5, next_bucket=19, prio=PRIO, gen=GEN, magic=MAGIC, meta_bytes=4096, into=into)


def test_T1_layout_of_a_prio_set() -> None:
    buf = encoded()
    assert struct.unpack_from("<QQQIIQ", buf) == (crc64(buf[8:]), MAGIC, 5, 0, 0, 19)
    assert buf[40:52] == bytes.fromhex("0000 00  0080 01  ffff ff  0700 60")
    assert len(buf) == 4096
    assert not any(buf[52:])


def test_round_trip() -> None:
    prio_set = decode_prio_set(encoded(), MAGIC, 19)
    assert (prio_set.seq, prio_set.next_bucket) == (5, 19)
    assert len(prio_set.prio) == len(prio_set.gen) == (4096 - 40) // 3
    assert prio_set.prio[:4].tolist() == PRIO.tolist()
    assert prio_set.gen[:4].tolist() == GEN.tolist()


@pytest.mark.parametrize("offset", [0, 8, 16, 32, 40, 4095])
def test_T1_one_wrong_byte_of_a_prio_set(offset: int) -> None:
    buf = encoded()
    buf[offset] ^= 1
    with pytest.raises(Corrupt) as caught:
        decode_prio_set(buf, MAGIC, 19)
    assert caught.value.why == "bad csum reading priorities"
    assert caught.value.where == "prio set at bucket 19"


def test_another_sets_magic() -> None:
    with pytest.raises(Corrupt) as caught:
        decode_prio_set(encoded(), MAGIC ^ 1, 19)
    assert caught.value.why == "bad magic reading priorities"


def test_the_checksum_covers_what_the_buffer_held_before() -> None:
    buf = bytearray(b"\xee" * 4096)
    again = encoded(into=buf)
    assert again is buf
    assert buf[52:] == b"\xee" * (4096 - 52)
    assert decode_prio_set(buf, MAGIC, 1).gen[4] == 0xEE


def test_decoded_columns_do_not_follow_the_buffer() -> None:
    buf = encoded()
    prio_set = decode_prio_set(buf, MAGIC, 1)
    buf[42] = 9
    assert prio_set.gen[0] == 0
