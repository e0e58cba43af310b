# SPDX-License-Identifier: GPL-2.0-only
"""The uuid array: fields, slots free and retired, odd labels, and its older form."""

from __future__ import annotations

import pytest

from bcachectl.errors import Corrupt
from bcachectl.ondisk.magic import INVALID_UUID
from bcachectl.ondisk.uuids import UuidEntry, decode_uuids, decode_uuids_v0, encode_uuids

VECTOR = bytes(range(1, 17)) + b"vol0\nrest".ljust(32, b"\0") + bytes.fromhex(
    "01000000 02000000 03000000 01000000 0080000000000000") + bytes(56)


def test_T1_fields_of_an_entry() -> None:
    [entry] = decode_uuids(VECTOR)
    assert entry == UuidEntry(uuid=bytes(range(1, 17)), label=b"vol0\nrest".ljust(32, b"\0"), first_reg=1, last_reg=2,
                              invalidated=3, flags=1, sectors=32768)
    assert entry.is_flash_only
    assert not entry.is_free
    assert not entry.is_retired
    assert encode_uuids([entry], 128) == VECTOR


def test_slots_behind_the_last_entry_are_free() -> None:
    raw = encode_uuids(decode_uuids(VECTOR), 4096)
    assert len(raw) == 4096
    entries = decode_uuids(raw)
    assert len(entries) == 32
    assert [entry.is_free for entry in entries] == [False] + [True] * 31


def test_a_retired_slot_is_neither_free_nor_in_use() -> None:
    entry = UuidEntry(uuid=INVALID_UUID)
    assert entry.is_retired
    assert not entry.is_free


def test_label_ends_at_nul_or_newline() -> None:
    assert UuidEntry(label=b"a\nb".ljust(32, b"\0")).label_text == "a"
    assert UuidEntry(label=b"a\0b\n".ljust(32, b"x")).label_text == "a"
    assert UuidEntry(label=b"x" * 32).label_text == "x" * 32
    assert UuidEntry(label=b"\xfe" + bytes(31)).label_text == "\\xfe"


def test_odd_padding_and_labels_are_kept() -> None:
    raw = VECTOR[:72] + b"p" * 56
    assert encode_uuids(decode_uuids(raw), 128) == raw


def test_entries_of_jset_version_0() -> None:
    raw = bytes(range(1, 17)) + b"old".ljust(32, b"\0") + bytes.fromhex("01000000 02000000 03000000 ffffffff")
    [entry] = decode_uuids_v0(raw)
    assert (entry.uuid, entry.label_text, entry.first_reg, entry.last_reg, entry.invalidated) == (
        bytes(range(1, 17)), "old", 1, 2, 3)
    assert (entry.flags, entry.sectors) == (0, 0)


def test_a_cut_array_is_corrupt() -> None:
    for decode in (decode_uuids, decode_uuids_v0):
        with pytest.raises(Corrupt):
            decode(VECTOR[:100])


def test_more_entries_than_the_array_has() -> None:
    with pytest.raises(AssertionError):
        encode_uuids([UuidEntry()] * 2, 128)
